//! A container's own interface on a bridge of this host.
//!
//! Asked for by annotations `dunlin.network.*` of a container that has a
//! network namespace of its own. A restored container takes the address of one
//! that still runs elsewhere, so its end of the wire stays mute until it is
//! thawed: the bridge port is disabled, which costs microseconds to undo and
//! tells nobody. Taking a link down instead would cost a second of outage when
//! it comes up again.

mod config;
mod netlink;

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use libcontainer::container::Container;
use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, setns};
use nix::unistd::Pid;

pub(crate) use config::{Network, veth_name};
use netlink::Netlink;

use crate::container::Record;

/// How long a new pair of interfaces may take to come up.
const UP: Duration = Duration::from_secs(5);

/// A container's end of the wire that can be heard only once it is told to.
#[derive(Debug)]
pub(crate) struct Muted {
    port: Port,
    inside: Netlink,
    index: u32,
    init: Pid,
    network: Network,
}

/// The bridge port of a container.
#[derive(Debug)]
pub(crate) struct Port {
    outside: Netlink,
    index: u32,
}

/// A bridge port that lets nothing pass: dropping this opens it again.
#[derive(Debug)]
#[must_use = "dropping it opens the port"]
pub(crate) struct Blocked {
    port: Port,
}

/// Gives a container its interface and joins it to the bridge.
///
/// A muted one is cut off until [`Muted::unmute`].
pub(crate) fn attach(
    network: Network,
    veth: &str,
    init: Pid,
    muted: bool,
) -> Result<Option<Muted>> {
    let mut outside = Netlink::open()?;
    let mut inside = in_namespace(init, Netlink::open)?;
    let bridge = index(&network.bridge)?;
    // The port is open for a moment before it is closed. Nothing may be heard
    // from the container then, or the bridges would lead its traffic here
    // while it runs elsewhere: it has no address yet, and no IPv6 to ask for one.
    let ipv6 = format!("ipv6/conf/{}/disable_ipv6", network.interface);
    let inner = plug(&network, veth, init, &mut outside)?;
    let had_ipv6 = if muted { in_namespace(init, || swap_knob(&ipv6, "1"))? } else { None };
    let loopback = in_namespace(init, || index("lo"))?;
    inside.set_up(loopback)?;
    let outer = index(veth)?;
    outside.set_up(outer)?;
    inside.set_up(inner)?;
    // The kernel opens a port whenever its link comes up, which it learns some
    // time after the fact. So the link joins the bridge when that is over.
    let start = Instant::now();
    while !outside.is_up(outer)? {
        if UP < start.elapsed() {
            bail!("interface {veth} did not come up");
        }
        thread::sleep(Duration::from_millis(1));
    }
    outside.set_master(outer, bridge)?;
    if muted {
        outside.set_port(outer, false)?;
        if let Some(value) = had_ipv6 {
            in_namespace(init, || write_knob(&ipv6, &value))?;
        }
    }
    for (address, prefix) in &network.addresses {
        inside.add_address(inner, *address, *prefix)?;
    }
    for gateway in &network.gateways {
        inside.add_default_route(inner, *gateway)?;
    }
    if !muted {
        return Ok(None);
    }
    let port = Port { outside, index: outer };
    let muted = Muted { port, inside, index: inner, init, network };
    muted.set_notify("1")?;
    Ok(Some(muted))
}

/// Removes the host's end, and with it the container's; it may be gone already.
pub(crate) fn detach(veth: &str) -> Result<()> {
    match if_nametoindex(veth) {
        Ok(index) => Netlink::open()?.delete(index),
        Err(nix::errno::Errno::ENODEV) => Ok(()),
        Err(err) => Err(err).with_context(|| format!("cannot find interface {veth}")),
    }
}

impl Muted {
    /// Lets the container be heard and tells its neighbours where it is now.
    pub(crate) fn unmute(&mut self) -> Result<()> {
        self.port.outside.set_port(self.port.index, true)?;
        self.inside.set_mac(self.index, self.network.mac)
    }

    /// Takes back what [`Muted::unmute`] needed and the container should not see.
    pub(crate) fn settle(self) -> Result<()> {
        self.set_notify("0")
    }

    /// While set, the kernel announces an interface's addresses, by gratuitous
    /// ARP and unsolicited neighbour advertisement, when its MAC is set, even
    /// to what it was.
    fn set_notify(&self, value: &str) -> Result<()> {
        let name = &self.network.interface;
        in_namespace(self.init, || {
            write_knob(&format!("ipv4/conf/{name}/arp_notify"), value)?;
            write_knob(&format!("ipv6/conf/{name}/ndisc_notify"), value)
        })
    }
}

impl Port {
    /// The port of a container that we attached, if we did.
    pub(crate) fn of(container: &Container) -> Result<Option<Self>> {
        let Some(veth) = Record::load(container)?.and_then(|record| record.veth) else {
            return Ok(None);
        };
        Ok(Some(Self { outside: Netlink::open()?, index: index(&veth)? }))
    }

    /// Stops everything that comes and goes.
    pub(crate) fn block(mut self) -> Result<Blocked> {
        self.outside.set_port(self.index, false)?;
        Ok(Blocked { port: self })
    }
}

impl Blocked {
    /// Leaves it blocked for good: what is behind it must not be heard again.
    pub(crate) fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        if let Err(err) = self.port.outside.set_port(self.port.index, true) {
            tracing::error!("a container stays without network: {err:#}");
        }
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
