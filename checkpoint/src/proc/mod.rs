//! What `/proc` says of a process (`proc(5)`), parsed once.

mod maps;
mod status;
mod tasks;

pub(crate) use maps::{Vma, VmaKind, vmas, vmas_again};
pub(crate) use status::{Stat, Status};
pub(crate) use tasks::{processes_below, threads};
