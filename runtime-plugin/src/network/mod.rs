//! A container's network: an interface on a bridge of this host where it asks
//! for one, and its announcement where it takes over the address of a container
//! that ran elsewhere.
//!
//! The interface is asked for by annotations `dunlin.network.*` of a container
//! that has a network namespace of its own. One that somebody else made is
//! taken as it is. Either way a restored container is mute until it is thawed
//! ([`Hold`]), since its address is still in use.

mod config;
mod netlink;

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use dunlin_checkpoint::Hold;
use nix::net::if_::{if_nameindex, if_nametoindex};
use nix::sched::{CloneFlags, setns};
use nix::unistd::Pid;

pub(crate) use config::{Network, veth_name};
use netlink::Netlink;

/// How long a new pair of interfaces may take to come up.
const UP: Duration = Duration::from_secs(5);

/// A container that is neither heard nor hears anything until it is told to.
#[derive(Debug)]
pub(crate) struct Muted {
    hold: Hold,
    inside: Netlink,
    init: Pid,
    /// Interfaces whose addresses are announced, and their MACs.
    interfaces: Vec<(u32, Vec<u8>)>,
    /// What the container should not see changed.
    knobs: Vec<(&'static str, String)>,
}

/// While set, the kernel announces an interface's addresses, by gratuitous ARP
/// and unsolicited neighbour advertisement, when its MAC is set, even to what
/// it was.
const NOTIFY: [&str; 2] = ["ipv4/conf/all/arp_notify", "ipv6/conf/all/ndisc_notify"];

/// Gives a container its interface and joins it to the bridge.
pub(crate) fn attach(network: &Network, veth: &str, init: Pid) -> Result<()> {
    let mut outside = Netlink::open()?;
    let mut inside = in_namespace(init, Netlink::open)?;
    let bridge = index(&network.bridge)?;
    let inner = plug(network, veth, init, &mut outside)?;
    let loopback = in_namespace(init, || index("lo"))?;
    inside.set_up(loopback)?;
    let outer = index(veth)?;
    outside.set_up(outer)?;
    inside.set_up(inner)?;
    // A bridge opens a port when it has learnt that its link is up, which is
    // some time after the fact: what is said before is lost.
    let start = Instant::now();
    while !outside.is_up(outer)? {
        if UP < start.elapsed() {
            bail!("interface {veth} did not come up");
        }
        thread::sleep(Duration::from_millis(1));
    }
    outside.set_master(outer, bridge)?;
    for (address, prefix) in &network.addresses {
        inside.add_address(inner, *address, *prefix)?;
    }
    for gateway in &network.gateways {
        inside.add_default_route(inner, *gateway)?;
    }
    Ok(())
}

/// Removes the host's end, and with it the container's; it may be gone already.
pub(crate) fn detach(veth: &str) -> Result<()> {
    match if_nametoindex(veth) {
        Ok(index) => Netlink::open()?.delete(index),
        Err(nix::errno::Errno::ENODEV) => Ok(()),
        Err(err) => Err(err).with_context(|| format!("cannot find interface {veth}")),
    }
}

/// Cuts off a new container, before it has an address; `None` when it has the
/// network of this host.
pub(crate) fn mute(init: Pid) -> Result<Option<Muted>> {
    let Some(mut hold) = Hold::of(init).context("cannot enter its network")? else {
        return Ok(None);
    };
    hold.arrive().context("cannot hold back its packets")?;
    let inside = in_namespace(init, Netlink::open)?;
    Ok(Some(Muted { hold, inside, init, interfaces: Vec::new(), knobs: Vec::new() }))
}

/// Lets a new container speak that joins a namespace in which another one was
/// held before.
pub(crate) fn release(init: Pid) -> Result<()> {
    Hold::release(init).context("cannot let its packets pass")
}

impl Muted {
    /// Prepares the announcement of all that the container has.
    pub(crate) fn prepare(&mut self) -> Result<()> {
        let indices = in_namespace(self.init, || {
            Ok(if_nameindex()?.iter().map(nix::net::if_::Interface::index).collect::<Vec<_>>())
        })?;
        for index in indices {
            if let Some(mac) = self.inside.announceable(index)? {
                self.interfaces.push((index, mac));
            }
        }
        self.knobs = in_namespace(self.init, || {
            let swap = |knob| Ok(swap_knob(knob, "1")?.map(|before| (knob, before)));
            NOTIFY.into_iter().filter_map(|knob| swap(knob).transpose()).collect()
        })?;
        Ok(())
    }

    /// Lets the container be heard and tells its neighbours where it is now.
    pub(crate) fn unmute(&mut self) -> Result<()> {
        self.hold.lift().context("cannot let its packets pass")?;
        for (index, mac) in &self.interfaces {
            if let Err(err) = self.inside.set_mac(*index, mac) {
                tracing::warn!("an address is not announced: {err:#}");
            }
        }
        Ok(())
    }

    /// Takes back what [`Muted::unmute`] needed and the container should not see.
    pub(crate) fn settle(self) -> Result<()> {
        in_namespace(self.init, || {
            self.knobs.iter().try_for_each(|(knob, before)| write_knob(knob, before))
        })
    }
}

/// Makes the pair of interfaces; gives the index of the inner one.
fn plug(network: &Network, veth: &str, init: Pid, outside: &mut Netlink) -> Result<u32> {
    let name = &network.interface;
    outside.add_veth(veth, outer_mac(network.mac), name, network.mac, init)?;
    in_namespace(init, || index(name))
}

fn index(name: &str) -> Result<u32> {
    if_nametoindex(name).with_context(|| format!("there is no interface {name}"))
}

/// A bridge takes the lowest MAC of its ports for its own; ours is high so that
/// coming and going containers do not change it.
fn outer_mac(mut mac: [u8; 6]) -> [u8; 6] {
    mac[0] = 0xfe;
    mac
}

/// Runs `work` in the network namespace of a process.
fn in_namespace<T: Send>(pid: Pid, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let path = format!("/proc/{pid}/ns/net");
    let namespace = fs::File::open(&path).with_context(|| format!("cannot open {path}"))?;
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            setns(&namespace, CloneFlags::CLONE_NEWNET)
                .with_context(|| format!("cannot enter {path} (fd {})", namespace.as_raw_fd()))?;
            work()
        });
        worker.join().unwrap_or_else(|_| bail!("the thread in {path} panicked"))
    })
}

/// Sets a value below `/proc/sys/net`, which is that of the caller's namespace.
///
/// A kernel without IPv6 lacks half of them.
fn write_knob(knob: &str, value: &str) -> Result<()> {
    let path = format!("/proc/sys/net/{knob}");
    match fs::write(&path, value) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
        written => written.with_context(|| format!("cannot write {path}")),
    }
}

/// Sets a value below `/proc/sys/net` and gives what it was.
fn swap_knob(knob: &str, value: &str) -> Result<Option<String>> {
    let path = format!("/proc/sys/net/{knob}");
    match fs::read_to_string(&path) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(err) => Err(err).with_context(|| format!("cannot read {path}")),
        Ok(before) => write_knob(knob, value).map(|()| Some(before.trim().to_owned())),
    }
}

/// An address and the length of its network's prefix.
type Address = (IpAddr, u8);
