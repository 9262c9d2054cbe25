//! Kernel resources, one file each: what dumps a thing and what restores it.
//!
//! State that only the process itself can ask for goes through the stub in two
//! steps: `ask` adds the questions to a batch, `answer` reads them out of its
//! results. The other way round, `restore` adds calls to a batch.

pub(crate) mod creds;
pub(crate) mod files;
pub(crate) mod fs;
pub(crate) mod limits;
pub(crate) mod loopback;
pub(crate) mod memory;
pub(crate) mod mm;
pub(crate) mod pages;
pub(crate) mod shared;
pub(crate) mod signals;
pub(crate) mod sysv;
pub(crate) mod threads;
pub(crate) mod timers;
pub(crate) mod tree;
