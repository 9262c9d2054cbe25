//! Packets held back while a container is between two hosts.
//!
//! Dropped in silence, inside the container's network namespace: peers send
//! again what nobody answers, while an answer from a kernel that does not have
//! the sockets (yet, or any more) would be a reset. Neighbours hear nothing
//! either, or the network would learn a place where the container is not.
//!
//! One nf_tables table of each kind, so that no tool and no knowledge of how
//! the namespace is connected is needed. [`Hold::depart`] ends with the
//! process that made it, so that whatever ends an engine leaves its container
//! with a network; [`Hold::keep`] puts one in its place that stays.

mod nft;

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        linux::fs::MetadataExt,
    },
};

use nix::unistd::Pid;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType,
    netlink::{self, SocketAddrNetlink},
    recv, sendto, socket_with,
};

use self::nft::{ARP, Batch, Hook, INET, OWNED};
use crate::resource::files::in_netns;

/// Ends with the engine.
const DEPARTING: &str = "dunlin-hold";
/// Stays.
const KEPT: &str = "dunlin-held";
/// Stays until the restored container takes over.
const ARRIVING: &str = "dunlin-arrival";

const FAMILIES: [u8; 2] = [INET, ARP];

/// The loopback device of every namespace.
const LOOPBACK: u32 = 1;

const IN: Hook = Hook { name: "in", number: 0, device: 4 };
const OUT: Hook = Hook { name: "out", number: 3, device: 5 };
const ARP_OUT: Hook = Hook { number: 1, ..OUT };

/// A network namespace whose packets are dropped. Dropping this lets them pass
/// again if they [depart](Self::depart) and are not [kept](Self::keep).
#[derive(Debug)]
#[must_use = "dropping it lets packets pass"]
pub struct Hold {
    /// Closing it after a change waits for 10 to 30 ms: not in a freeze.
    socket: OwnedFd,
    /// Whether there is something that must not outlive this.
    holds: bool,
}

impl Hold {
    /// Prepares for the network namespace of `pid`; `None` for our own, which
    /// others use too.
    pub fn of(pid: Pid) -> io::Result<Option<Self>> {
        if is_own(pid)? {
            return Ok(None);
        }
        let netns = File::open(format!("/proc/{pid}/ns/net"))?;
        let socket = in_netns(netns.as_fd(), || {
            let (family, kind) = (AddressFamily::NETLINK, SocketType::RAW);
            Ok(socket_with(family, kind, SocketFlags::CLOEXEC, Some(netlink::NETFILTER))?)
        })?;
        Ok(Some(Self { socket, holds: false }))
    }

    /// Stops all that comes and goes.
    pub fn depart(&mut self) -> io::Result<()> {
        let mut batch = Batch::new();
        table(&mut batch, DEPARTING, OWNED, None);
        self.commit(batch)?;
        self.holds = true;
        Ok(())
    }

    /// Stops the same for a container that is being restored, but for what
    /// stays inside. Not even the end of this process lets it pass.
    pub fn arrive(&mut self) -> io::Result<()> {
        let mut batch = Batch::new();
        forget(&mut batch);
        table(&mut batch, ARRIVING, 0, Some(LOOPBACK));
        self.commit(batch)
    }

    /// Holds packets back beyond the end of this process.
    pub fn keep(&mut self) -> io::Result<()> {
        let mut batch = Batch::new();
        table(&mut batch, KEPT, 0, None);
        FAMILIES.iter().for_each(|family| batch.destroy(*family, DEPARTING));
        self.commit(batch)?;
        self.holds = false;
        Ok(())
    }

    /// Lets packets pass.
    pub fn lift(&mut self) -> io::Result<()> {
        let mut batch = Batch::new();
        forget(&mut batch);
        FAMILIES.iter().for_each(|family| batch.destroy(*family, DEPARTING));
        self.commit(batch)
    }

    /// Lets packets of the namespace of `pid` pass that were held back by a
    /// process that is gone.
    pub fn release(pid: Pid) -> io::Result<()> {
        let Some(hold) = Self::of(pid)? else { return Ok(()) };
        let mut batch = Batch::new();
        forget(&mut batch);
        hold.commit(batch)
    }

    fn commit(&self, batch: Batch) -> io::Result<()> {
        sendto(&self.socket, &batch.finish(), SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
        answer(self.socket.as_fd())
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if self.holds
            && let Err(err) = self.lift()
        {
            // Closing the socket does it too, later.
            tracing::debug!(%err, "packets are held back a little longer");
        }
    }
}

/// Whether a process is in the network namespace that we are in.
pub(crate) fn is_own(pid: Pid) -> io::Result<bool> {
    let id = |who: &str| {
        let found = std::fs::metadata(format!("/proc/{who}/ns/net"))?;
        Ok::<_, io::Error>((found.st_dev(), found.st_ino()))
    };
    Ok(id(&pid.to_string())? == id("thread-self")?)
}

/// Makes a table of each family that drops everything, but for `except`.
fn table(batch: &mut Batch, name: &str, flags: u32, except: Option<u32>) {
    for family in FAMILIES {
        batch.table(family, name, flags);
        for hook in [IN, if family == ARP { ARP_OUT } else { OUT }] {
            batch.chain(family, name, hook);
            if let (INET, Some(index)) = (family, except) {
                batch.except(family, name, hook, index);
            }
        }
    }
}

/// Deletes the tables that outlive who made them.
fn forget(batch: &mut Batch) {
    for family in FAMILIES {
        batch.destroy(family, KEPT);
        batch.destroy(family, ARRIVING);
    }
}

/// The first error among the answers, which are all there once the transaction
/// has been sent.
fn answer(socket: BorrowedFd<'_>) -> io::Result<()> {
    let mut buf = [0; 8192];
    let mut first = Ok(());
    loop {
        let len = match recv(socket, &mut buf[..], RecvFlags::DONTWAIT) {
            Ok((_, len)) => len,
            Err(rustix::io::Errno::AGAIN) => return first,
            Err(err) => return Err(err.into()),
        };
        for code in nft::answers(&buf[..len.min(buf.len())]) {
            if code != 0 {
                first = first.and(Err(io::Error::from_raw_os_error(-code)));
            }
        }
    }
}

#[cfg(test)]
mod tests;
