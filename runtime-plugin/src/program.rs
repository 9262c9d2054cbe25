//! What a container's process becomes when it is started.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use oci_spec::runtime::Spec;

/// Runs the program of the specification.
#[derive(Clone)]
pub(crate) struct Program;

impl Executor for Program {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let [program, args @ ..] = args(spec) else { return Err(ExecutorError::InvalidArg) };
        // `Command` also gives SIGPIPE its default action back, which Rust's
        // start-up code took and an exec would hand on.
        let err = Command::new(program).args(args).exec();
        Err(ExecutorError::Execution(format!("exec {program:?}: {err}").into()))
    }

    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let refuse = |text: String| Err(ExecutorValidationError::ArgValidationError(text));
        let [program, ..] = args(spec) else { return refuse("process.args is empty".into()) };
        match find(Path::new(program), spec) {
            Ok(()) => Ok(()),
            // podman turns these words of runc's into its own errors.
            Err(err) if err.kind() == io::ErrorKind::NotFound && !program.contains('/') => {
                refuse(format!("exec: {program:?}: executable file not found in $PATH"))
            }
            Err(err) if err.kind() == io::ErrorKind::NotFound => {
                refuse(format!("exec: {program:?}: stat {program}: no such file or directory"))
            }
            Err(err) if err.kind() == io::ErrorKind::PermissionDenied => {
                refuse(format!("exec: {program:?}: permission denied"))
            }
            Err(err) => refuse(format!("exec: {program:?}: {err}")),
        }
    }
}

fn args(spec: &Spec) -> &[String] {
    spec.process().as_ref().and_then(|p| p.args().as_deref()).unwrap_or_default()
}

/// Looks for an executable the way `execvp` will.
fn find(program: &Path, spec: &Spec) -> io::Result<()> {
    if program.components().count() > 1 || program.is_absolute() {
        return executable(program.to_owned());
    }
    let env = spec.process().as_ref().and_then(|p| p.env().as_deref()).unwrap_or_default();
    let path = env.iter().find_map(|var| var.strip_prefix("PATH=")).unwrap_or("/bin:/usr/bin");
    let mut worst = io::Error::from(io::ErrorKind::NotFound);
    for dir in path.split(':') {
        let dir = if dir.is_empty() { "." } else { dir };
        match executable(Path::new(dir).join(program)) {
            Ok(()) => return Ok(()),
            Err(err) if err.kind() == io::ErrorKind::NotFound => {}
            Err(err) => worst = err,
        }
    }
    Err(worst)
}

fn executable(path: PathBuf) -> io::Result<()> {
    let meta = path.metadata()?;
    if meta.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    if meta.permissions().mode() & 0o111 == 0 {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    Ok(())
}
