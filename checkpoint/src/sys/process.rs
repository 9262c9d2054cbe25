//! Starting the skeleton: exec of an open file, birth with a chosen pid.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use nix::unistd::Pid;

/// Replaces the calling process by the program in `file`.
pub(crate) fn exec(file: BorrowedFd<'_>) -> io::Error {
    let argv = [c"dunlin-skeleton".as_ptr(), std::ptr::null()];
    let envp = [std::ptr::null::<libc::c_char>()];
    // SAFETY: both lists end with a null pointer, their strings are static.
    unsafe { libc::fexecve(file.as_raw_fd(), argv.as_ptr(), envp.as_ptr()) };
    io::Error::last_os_error()
}

/// Forks a child with pid `pid` that executes the program in `file`
/// (`clone3(2)` with `set_tid`), and returns when it does.
pub(crate) fn spawn(file: BorrowedFd<'_>, pid: Pid) -> io::Result<Pid> {
    let tid = pid.as_raw();
    let mut args = [0_u64; 11];
    args[0] = u64::from(libc::CLONE_VFORK.cast_unsigned());
    args[4] = u64::try_from(libc::SIGCHLD).expect("small");
    args[8] = &raw const tid as u64;
    args[9] = 1;
    // SAFETY: without CLONE_VM the child has memory of its own; it only calls
    // fexecve and _exit, which are safe after a fork in any program.
    let ret = unsafe { libc::syscall(libc::SYS_clone3, args.as_ptr(), size_of_val(&args)) };
    match ret {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let _ = exec(file);
            // SAFETY: ends the child without running anything of ours.
            unsafe { libc::_exit(127) }
        }
        child => i32::try_from(child).map(Pid::from_raw).map_err(io::Error::other),
    }
}
