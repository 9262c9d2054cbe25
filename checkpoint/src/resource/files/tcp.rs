//! Established TCP connections (`TCP_REPAIR`).
//!
//! In repair mode a socket tells and takes its sequence numbers, queues and
//! options, and opens and closes without a packet. The source's is in it only
//! for the moment of reading, and again when it is given up ([`Connections`]);
//! the destination's until the thaw. Packets must not reach either side
//! meanwhile: holding them back is the caller's affair.
//!
//! Not carried: the mark of urgent data, which arrives as ordinary data.

use std::{
    fs, io,
    net::SocketAddr,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
};

use nix::unistd::Pid;
use rustix::{
    net::{RecvFlags, SendFlags, Shutdown, recv, send},
    process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open},
};
use serde::{Deserialize, Serialize};

use super::{Doing, Failure, Making, Refusal, fin};
use crate::sys::sockopt;

const TCP_REPAIR: i32 = 19;
const TCP_REPAIR_QUEUE: i32 = 20;
const TCP_QUEUE_SEQ: i32 = 21;
const TCP_REPAIR_OPTIONS: i32 = 22;
const TCP_TIMESTAMP: i32 = 24;
const TCP_REPAIR_WINDOW: i32 = 29;

const ON: i32 = 1;
const OFF: i32 = 0;
/// Off, without a packet that says so.
const OFF_SILENTLY: i32 = -1;

const RECEIVE_QUEUE: i32 = 1;
const SEND_QUEUE: i32 = 2;

const OPTION_MSS: u32 = 2;
const OPTION_WINDOW: u32 = 3;
const OPTION_SACK: u32 = 4;
const OPTION_TIMESTAMP: u32 = 8;

/// Most that is put into a queue at once.
const CHUNK: usize = 32 << 10;

/// States of a connection, as `TCP_INFO` numbers them.
mod state {
    pub(super) const ESTABLISHED: u8 = 1;
    pub(super) const FIN_WAIT1: u8 = 4;
    pub(super) const FIN_WAIT2: u8 = 5;
    pub(super) const CLOSE_WAIT: u8 = 8;
    pub(super) const LAST_ACK: u8 = 9;
    pub(super) const CLOSING: u8 = 11;
}

/// A connection.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Image {
    /// Sequence number of the first byte of each queue.
    receive_from: u32,
    send_from: u32,
    /// Received and not read.
    received: Vec<u8>,
    /// Sent and not acknowledged.
    sent: Vec<u8>,
    /// Not sent.
    unsent: Vec<u8>,
    /// Whether the peer sends no more.
    fin_received: bool,
    /// Whether we send no more.
    fin_sent: bool,
    /// Largest segment the peer takes.
    mss: u32,
    /// Window scales of the peer and of ours.
    scale: Option<(u8, u8)>,
    selective_acks: bool,
    /// Our clock in timestamps, if they are used.
    timestamp: Option<u32>,
    /// As `TCP_REPAIR_WINDOW` gives them: the peer's window was set by segment
    /// [0], is [1], at most was [2]; ours is [3] from [4] on.
    window: [u32; 5],
}

/// Connections that were dumped: duplicates of the source's sockets.
#[derive(Debug, Default)]
pub(crate) struct Connections(pub(super) Vec<OwnedFd>);

impl Connections {
    /// Lets every connection end here without a word to its peer, who goes on
    /// with the destination. To be kept until the last task has ended.
    pub(crate) fn silence(&self) -> io::Result<()> {
        self.0.iter().try_for_each(|fd| set(fd.as_fd(), TCP_REPAIR, ON))
    }
}

/// Lets every connection of a process end without a word to its peer.
pub fn silence(pid: Pid) -> io::Result<()> {
    let none = PidfdFlags::empty();
    let raw = rustix::process::Pid::from_raw(pid.as_raw()).ok_or(io::ErrorKind::InvalidInput)?;
    let pidfd = pidfd_open(raw, none)?;
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        let is_socket = fs::read_link(entry.path())
            .is_ok_and(|target| target.as_os_str().as_bytes().starts_with(b"socket:"));
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        let (true, Some(number)) = (is_socket, number) else { continue };
        let Ok(fd) = pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()) else { continue };
        // What is no connection refuses, and has nothing to say.
        set(fd.as_fd(), TCP_REPAIR, ON).ok();
    }
    Ok(())
}

fn set(fd: BorrowedFd<'_>, name: i32, value: i32) -> io::Result<()> {
    sockopt::set_int(fd, libc::IPPROTO_TCP, name, value)
}

fn get(fd: BorrowedFd<'_>, name: i32) -> io::Result<u32> {
    sockopt::get_int(fd, libc::IPPROTO_TCP, name).map(i32::cast_unsigned)
}

fn words<const N: usize>(words: [u32; N]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Reads a connection; `info` is what `TCP_INFO` said.
pub(super) fn dump(fd: BorrowedFd<'_>, info: &[u8]) -> Result<Image, Refusal> {
    if !is_known(info[0]) {
        return Err(Refusal::new(
            format!("is a TCP connection in the passing state {}", info[0]),
            "try again in a moment",
        ));
    }
    let received = received(fd).doing("read its queue")?;
    // Repair forgets whether the port may be shared.
    let reuse = sockopt::get_int(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR).doing("read it")?;
    set(fd, TCP_REPAIR, ON).doing("repair a connection (needs CAP_NET_ADMIN)")?;
    let image = read(fd, info, received);
    set(fd, TCP_REPAIR, OFF_SILENTLY)
        .and_then(|()| sockopt::set_int(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, reuse))
        .doing("end the repair of a connection")?;
    image.doing("read a connection")
}

/// Whether a connection in this state can be moved.
fn is_known(state: u8) -> bool {
    use state::{CLOSE_WAIT, CLOSING, ESTABLISHED, FIN_WAIT1, FIN_WAIT2, LAST_ACK};
    matches!(state, ESTABLISHED | FIN_WAIT1 | FIN_WAIT2 | CLOSE_WAIT | LAST_ACK | CLOSING)
}

/// What waits to be read, wherever the program's own looks have got to.
fn received(fd: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let len = usize::try_from(rustix::io::ioctl_fionread(fd)?).map_err(io::Error::other)?;
    // Kernels before 6.9 have no such option for TCP.
    match sockopt::get_int(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF) {
        Ok(looked) if looked >= 0 => {
            sockopt::set_int(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 0)?;
            let data = peek(fd, len);
            sockopt::set_int(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, looked)?;
            data
        }
        _ => peek(fd, len),
    }
}

fn peek(fd: BorrowedFd<'_>, len: usize) -> io::Result<Vec<u8>> {
    let mut data = vec![0; len];
    if len > 0 {
        let (_, got) = recv(fd, &mut data[..], RecvFlags::PEEK | RecvFlags::DONTWAIT)?;
        if got != len {
            return Err(io::Error::other(format!("{got} of {len} bytes")));
        }
    }
    Ok(data)
}

fn read(fd: BorrowedFd<'_>, info: &[u8], received: Vec<u8>) -> io::Result<Image> {
    use state::{CLOSE_WAIT, CLOSING, FIN_WAIT1, FIN_WAIT2, LAST_ACK};
    let (state, options, scales) = (info[0], info[5], info[6]);
    let fin_received = matches!(state, CLOSE_WAIT | LAST_ACK | CLOSING);
    let fin_sent = matches!(state, FIN_WAIT1 | FIN_WAIT2 | LAST_ACK | CLOSING);

    set(fd, TCP_REPAIR_QUEUE, RECEIVE_QUEUE)?;
    let received_len = u32::try_from(received.len()).map_err(io::Error::other)?;
    let receive_from =
        get(fd, TCP_QUEUE_SEQ)?.wrapping_sub(received_len).wrapping_sub(fin_received.into());

    set(fd, TCP_REPAIR_QUEUE, SEND_QUEUE)?;
    let outstanding = sockopt::sent(fd)?.cast_unsigned();
    let unsent = sockopt::unsent(fd)?.cast_unsigned();
    let mut send_from = get(fd, TCP_QUEUE_SEQ)?.wrapping_sub(outstanding);
    // Our FIN counts as a byte until it is acknowledged.
    let fin_waits = fin_sent && state != FIN_WAIT2;
    let queued = outstanding.saturating_sub(fin_waits.into());
    if state == FIN_WAIT2 {
        // Ours is sent once more, so that the peer acknowledges it once more.
        send_from = send_from.wrapping_sub(1);
    }
    let mut sent = peek(fd, queued as usize)?;
    let sent_len = outstanding.saturating_sub(unsent).min(queued);
    let unsent = sent.split_off(sent_len as usize);

    let mut raw = [0; 20];
    sockopt::get(fd, libc::IPPROTO_TCP, TCP_REPAIR_WINDOW, &mut raw)?;
    let mut window = [0; 5];
    for (word, bytes) in window.iter_mut().zip(raw.chunks_exact(4)) {
        *word = bytes.first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes));
    }
    let has_timestamps = options & 1 != 0;
    Ok(Image {
        receive_from,
        send_from,
        received,
        sent,
        unsent,
        fin_received,
        fin_sent,
        mss: get(fd, libc::TCP_MAXSEG)?,
        scale: (options & 4 != 0).then_some((scales & 0xf, scales >> 4)),
        selective_acks: options & 2 != 0,
        timestamp: has_timestamps.then(|| get(fd, TCP_TIMESTAMP)).transpose()?,
        window,
    })
}

/// Takes a new socket into repair and sets what precedes `bind`.
pub(super) fn begin(image: &Image, fd: BorrowedFd<'_>) -> Result<(), Failure> {
    let start = || {
        set(fd, TCP_REPAIR, ON)?;
        for (queue, from) in [(RECEIVE_QUEUE, image.receive_from), (SEND_QUEUE, image.send_from)] {
            set(fd, TCP_REPAIR_QUEUE, queue)?;
            set(fd, TCP_QUEUE_SEQ, from.cast_signed())?;
        }
        Ok::<_, io::Error>(())
    };
    start().making("repair a connection")
}

/// Connects a bound socket without a packet, and fills its queues.
pub(super) fn connect(
    image: &Image,
    fd: BorrowedFd<'_>,
    own: SocketAddr,
    peer: SocketAddr,
) -> Result<(), Failure> {
    let Image { receive_from, send_from, received, sent, .. } = image;
    rustix::net::connect(fd, &peer).making(&format!("connect to {peer}"))?;
    negotiated(image, fd).making("set the options of a connection")?;
    make_room(fd, libc::SO_RCVBUF, libc::SO_RCVBUFFORCE, received.len())
        .and_then(|()| fill(fd, RECEIVE_QUEUE, received))
        .making("fill the receive queue of a connection")?;
    make_room(fd, libc::SO_SNDBUF, libc::SO_SNDBUFFORCE, sent.len())
        .and_then(|()| fill(fd, SEND_QUEUE, sent))
        .making("fill the send queue of a connection")?;
    set_window(image, fd).making("set the window of a connection")?;
    if image.fin_received {
        let seq = receive_from.wrapping_add(u32::try_from(received.len()).unwrap_or(0));
        fin::deliver(peer, own, seq, *send_from).making("end the peer's side of a connection")?;
    }
    Ok(())
}

fn negotiated(image: &Image, fd: BorrowedFd<'_>) -> io::Result<()> {
    let Image { mss, scale, selective_acks, timestamp, .. } = image;
    let mut options = words([OPTION_MSS, *mss]);
    if let Some((theirs, ours)) = scale {
        options.extend(words([OPTION_WINDOW, u32::from(*theirs) | u32::from(*ours) << 16]));
    }
    if *selective_acks {
        options.extend(words([OPTION_SACK, 0]));
    }
    if timestamp.is_some() {
        options.extend(words([OPTION_TIMESTAMP, 0]));
    }
    sockopt::set(fd, libc::IPPROTO_TCP, TCP_REPAIR_OPTIONS, &options)?;
    match timestamp {
        Some(now) => set(fd, TCP_TIMESTAMP, now.cast_signed()),
        None => Ok(()),
    }
}

/// Lets a queue take `len` bytes more than usual.
fn make_room(fd: BorrowedFd<'_>, name: i32, force: i32, len: usize) -> io::Result<()> {
    let has = sockopt::get_int(fd, libc::SOL_SOCKET, name)?;
    let more = i32::try_from(2 * len).unwrap_or(i32::MAX);
    if len == 0 {
        return Ok(());
    }
    sockopt::set_int(fd, libc::SOL_SOCKET, force, has.saturating_add(more) / 2)
}

fn fill(fd: BorrowedFd<'_>, queue: i32, data: &[u8]) -> io::Result<()> {
    set(fd, TCP_REPAIR_QUEUE, queue)?;
    push(fd, data)
}

fn push(fd: BorrowedFd<'_>, mut data: &[u8]) -> io::Result<()> {
    while !data.is_empty() {
        let chunk = &data[..data.len().min(CHUNK)];
        let taken = send(fd, chunk, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?;
        data = &data[taken..];
    }
    Ok(())
}

fn set_window(image: &Image, fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut window = image.window;
    if image.fin_received {
        // It counts as a byte that has not arrived yet.
        window[4] = window[4].wrapping_sub(1);
        window[0] = window[0].wrapping_sub(1);
    }
    sockopt::set(fd, libc::IPPROTO_TCP, TCP_REPAIR_WINDOW, &words(window))
}

/// What is said first when a connection may speak again.
#[derive(Debug)]
pub(super) struct Ending {
    unsent: Vec<u8>,
    fin_sent: bool,
}

impl Image {
    pub(super) fn ending(&self) -> Ending {
        Ending { unsent: self.unsent.clone(), fin_sent: self.fin_sent }
    }
}

/// Ends the repair: from here on the connection speaks.
pub(super) fn arm(ending: &Ending, fd: BorrowedFd<'_>) -> io::Result<()> {
    // The kernel asks the peer where it stands, which says where we are.
    set(fd, TCP_REPAIR, OFF)?;
    make_room(fd, libc::SO_SNDBUF, libc::SO_SNDBUFFORCE, ending.unsent.len())?;
    push(fd, &ending.unsent)?;
    if ending.fin_sent {
        rustix::net::shutdown(fd, Shutdown::Write)?;
    }
    Ok(())
}
