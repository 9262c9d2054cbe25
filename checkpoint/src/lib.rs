//! Freeze, dump and restore of Linux process trees.
//!
//! Synchronous, knows no HTTP and no OCI, opens no connection. ptrace binds a
//! task to the thread that seized it, so a [`Frozen`] or [`Nascent`] stays on
//! the thread that made it.

mod error;
pub mod image;
pub mod options;
pub mod verdict;

mod dump;
mod freeze;
mod hold;
mod host;
mod inspect;
mod intervals;
mod precopy;
mod proc;
mod resource;
mod restore;
pub mod skeleton;
mod stub;
mod sys;
mod transfer;

pub use dump::{DumpReport, Frozen, Parked, freeze, inspect};
pub use error::{DumpError, RestoreError};
pub use hold::Hold;
pub use options::{Options, TcpPolicy};
pub use precopy::{Precopy, RoundReport};
pub use resource::files::silence;
pub use restore::{Nascent, RestoreReport, Sandbox, restore};
pub use verdict::{Finding, Judgement, Verdict};
