//! What `/proc` says of a process (`proc(5)`), parsed once.

mod maps;
mod read;
mod status;
mod tasks;

pub(crate) use maps::{Vma, VmaKind, vmas, vmas_again};
pub(crate) use read::{read, text};
pub(crate) use status::{Stat, Status};
pub(crate) use tasks::{processes_below, threads};
