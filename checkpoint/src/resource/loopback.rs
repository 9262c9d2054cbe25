//! Whether the loopback device is up.
//!
//! Of all that a network namespace holds, this is the only thing that a program
//! takes for granted and that nobody outside can have had a reason to change.

use std::{
    fs, io,
    os::fd::{AsFd, BorrowedFd},
};

use nix::unistd::Pid;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink::SocketAddrNetlink, recv,
    sendto, socket_with,
};

use super::files::in_netns;

const SET_LINK: u16 = 16;
const REQUEST_ACK: u16 = 0x1 | 0x4;
const UP: u32 = 1;
/// Its number in every namespace.
const INDEX: u32 = 1;

/// Tells it by what is local there, which needs no look from inside.
pub(crate) fn dump(init: Pid) -> io::Result<bool> {
    let local = fs::read_to_string(format!("/proc/{init}/net/fib_trie"))?;
    Ok(local.lines().any(|line| line.trim_start_matches(['|', '-', ' ']) == "127.0.0.1"))
}

/// Brings it up.
pub(crate) fn restore(netns: BorrowedFd<'_>) -> io::Result<()> {
    let socket = in_netns(netns, || {
        let (family, kind) = (AddressFamily::NETLINK, SocketType::RAW);
        Ok(socket_with(family, kind, SocketFlags::CLOEXEC, None)?)
    })?;
    let mut request = Vec::with_capacity(32);
    request.extend(32_u32.to_ne_bytes());
    request.extend(SET_LINK.to_ne_bytes());
    request.extend(REQUEST_ACK.to_ne_bytes());
    request.extend([0; 8]); // sequence number, port
    request.extend([0; 4]); // family, type
    for word in [INDEX, UP, UP] {
        request.extend(word.to_ne_bytes());
    }
    sendto(&socket, &request, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
    let mut answer = [0; 64];
    recv(socket.as_fd(), &mut answer[..], RecvFlags::empty())?;
    let code = answer[16..].first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
    if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader},
        process::{Command, Stdio},
    };

    use super::*;

    #[test]
    fn it_comes_up_where_it_was_up() {
        if !nix::unistd::geteuid().is_root() {
            return println!("SKIP loopback: needs root");
        }
        let mut child = Command::new("unshare")
            .args(["--net", "sh", "-c", "echo ready && exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut String::new()).unwrap();
        let pid = Pid::from_raw(child.id().try_into().unwrap());
        let netns = fs::File::open(format!("/proc/{pid}/ns/net")).unwrap();
        assert!(!dump(pid).unwrap());
        restore(netns.as_fd()).unwrap();
        assert!(dump(pid).unwrap());
        restore(netns.as_fd()).unwrap();
        assert!(dump(Pid::this()).unwrap(), "this host's is up");
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
