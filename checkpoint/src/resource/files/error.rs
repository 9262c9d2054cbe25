//! Why one file cannot be carried or made, before its fd is named.

use std::io;

use super::Image;
use crate::RestoreError;

/// Why a description cannot be dumped.
pub(super) struct Refusal {
    pub(super) reason: String,
    pub(super) remedy: &'static str,
}

impl Refusal {
    pub(super) fn new(reason: impl Into<String>, remedy: &'static str) -> Self {
        Self { reason: reason.into(), remedy }
    }

    /// For what no engine here can carry.
    pub(super) fn unmovable(reason: impl Into<String>) -> Self {
        let reason = reason.into();
        Self { reason: format!("{reason}, which cannot be moved"), remedy: "close it first" }
    }
}

/// Names what was tried on the source.
pub(super) trait Doing<T> {
    fn doing(self, what: &str) -> Result<T, Refusal>;
}

impl<T, E: Into<io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, what: &str) -> Result<T, Refusal> {
        self.map_err(|err| {
            let err: io::Error = err.into();
            Refusal::new(format!("does not let us {what}: {err}"), "")
        })
    }
}

/// Why a description cannot be made.
#[derive(Debug)]
pub(super) enum Failure {
    /// The image contradicts itself.
    Damaged(&'static str),
    /// This host does not have it.
    Missing { object: String, reason: String },
    /// The kernel refused.
    Failed { what: String, source: io::Error },
}

impl Failure {
    /// Says for which fd of the image it happened.
    pub(super) fn at(self, image: &Image, file: usize) -> RestoreError {
        let holder = image.tables.iter().find_map(|table| {
            let fd = table.fds.iter().find(|fd| fd.file as usize == file)?;
            Some((table.pid, fd.fd))
        });
        let (pid, name) = match holder {
            Some((pid, fd)) => (pid, format!("fd {fd}")),
            None => (0, "a file in flight".to_owned()),
        };
        match self {
            Self::Damaged(what) => RestoreError::Image(format!("{name} of pid {pid}: {what}")),
            Self::Missing { object, reason } => {
                RestoreError::Missing { object: format!("{name} of pid {pid}, {object}"), reason }
            }
            Self::Failed { what, source } => {
                RestoreError::Process { what: format!("{what} for {name}"), pid, source }
            }
        }
    }
}

/// Names what was tried on the destination.
pub(super) trait Making<T> {
    fn making(self, what: &str) -> Result<T, Failure>;
}

impl<T, E: Into<io::Error>> Making<T> for Result<T, E> {
    fn making(self, what: &str) -> Result<T, Failure> {
        self.map_err(|err| Failure::Failed { what: what.to_owned(), source: err.into() })
    }
}
