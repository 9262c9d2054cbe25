//! Standard streams that lead out of the container.
//!
//! A container's stdin, stdout and stderr usually belong to whoever started
//! it: a pipe to a log reader, a terminal, a file on the host. They are not
//! moved; whoever restores the container gives new ones.

use std::os::fd::OwnedFd;

use rustix::fs::{FileType, OFlags};

use super::{Collector, Failure, Making, Source, Target, pipe, set_status, table::Held, tty, unix};

/// For each description the standard stream that replaces it: that of init's
/// own fds 0 to 2, and every other way into the same object.
pub(super) fn assign(source: &Source<'_>) -> Vec<Option<u8>> {
    let held = &source.tables.held;
    let mut assigned = vec![None; held.len()];
    let streams: Vec<(u8, usize)> = (0..3)
        .filter_map(|n| Some((n, source.tables.lookup(source.ctx.init, i32::from(n))?)))
        .filter(|(_, id)| leads_out(&held[*id], source))
        .collect();
    for (n, id) in streams.iter().rev() {
        assigned[*id] = Some(*n);
    }
    for (_, id) in &streams {
        for (other, same) in source.tables.same_object(&held[*id]) {
            let mode = same.info.oflags() & OFlags::ACCMODE;
            let fits = |(_, id): &&(u8, usize)| {
                held[*id].object() == same.object()
                    && held[*id].info.oflags() & OFlags::ACCMODE == mode
            };
            if assigned[other].is_none() {
                assigned[other] = streams.iter().find(fits).map(|(n, _)| *n);
            }
        }
    }
    // The terminal may be open as /dev/tty too.
    for (n, id) in &streams {
        let Some(terminal) = tty::slave(&held[*id]) else { continue };
        for (other, held) in held.iter().enumerate() {
            if assigned[other].is_none() && tty::slave(held) == Some(terminal) {
                assigned[other] = Some(*n);
            }
        }
    }
    assigned
}

/// Whether the other end, or the file itself, is not the container's.
fn leads_out(held: &Held, source: &Source<'_>) -> bool {
    if held.anon_inode().is_some() || held.info.oflags().contains(OFlags::PATH) {
        return false;
    }
    let in_container =
        || source.root.path(held).is_some_and(|path| source.root.leads_to(&path, held));
    match held.file_type() {
        FileType::Fifo => pipe::leads_out(held, source),
        FileType::Socket => unix::leads_out(held, source),
        FileType::RegularFile | FileType::Directory => source.root.path(held).is_none(),
        // A terminal's other end is with whoever shows it.
        FileType::CharacterDevice if tty::is_terminal(held) => tty::leads_out(held, source),
        FileType::CharacterDevice => rustix::termios::isatty(&held.fd) || !in_container(),
        _ => false,
    }
}

/// Names what stays behind with the stream.
pub(super) fn judge(held: &Held, out: &mut Collector<'_>) {
    let is_pipe = held.file_type() == FileType::Fifo && held.info.can_read();
    if is_pipe && rustix::io::ioctl_fionread(&held.fd).is_ok_and(|queued| queued > 0) {
        out.losses.push("leaves input behind that nobody has read yet".to_owned());
    }
}

pub(super) fn open(n: u8, flags: OFlags, target: &Target<'_>) -> Result<OwnedFd, Failure> {
    let stream = target.stdio.get(usize::from(n)).ok_or(Failure::Damaged("no such stream"))?;
    let fd = stream.try_clone_to_owned().making("duplicate a standard stream")?;
    // The program counts on its blocking mode; the rest is the giver's affair.
    let kept = rustix::fs::fcntl_getfl(&fd).making("read the flags")? - OFlags::NONBLOCK;
    set_status(fd, kept | (flags & OFlags::NONBLOCK))
}
