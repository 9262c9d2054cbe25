//! Requests to rtnetlink (`rtnetlink(7)`), one at a time.

use std::net::IpAddr;

use anyhow::{Context, Result, anyhow, bail};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, State,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::unistd::Pid;

const NEW: u16 = NLM_F_CREATE | NLM_F_EXCL;
const MAIN_TABLE: u8 = 254;

/// A connection to the network namespace it was opened in.
#[derive(Debug)]
pub(super) struct Netlink(Socket);

impl Netlink {
    /// Connects to the namespace of the calling thread.
    pub(super) fn open() -> Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE).context("cannot open rtnetlink")?;
        socket.bind_auto().context("cannot bind to rtnetlink")?;
        socket.connect(&SocketAddr::new(0, 0)).context("cannot connect to rtnetlink")?;
        Ok(Self(socket))
    }

    /// Makes a pair of interfaces, the second one in the namespace of `init`.
    pub(super) fn add_veth(
        &mut self,
        outer: &str,
        outer_mac: [u8; 6],
        inner: &str,
        inner_mac: [u8; 6],
        init: Pid,
    ) -> Result<()> {
        let mut peer = LinkMessage::default();
        peer.attributes = vec![
            LinkAttribute::IfName(inner.into()),
            LinkAttribute::Address(inner_mac.to_vec()),
            LinkAttribute::NetNsPid(u32::try_from(init.as_raw())?),
        ];
        let mut link = LinkMessage::default();
        link.attributes = vec![
            LinkAttribute::IfName(outer.into()),
            LinkAttribute::Address(outer_mac.to_vec()),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Veth),
                LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
            ]),
        ];
        self.request(RouteNetlinkMessage::NewLink(link), NEW)
            .with_context(|| format!("cannot make interface {outer}"))
    }

    /// Brings an interface up.
    pub(super) fn set_up(&mut self, index: u32) -> Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.header.flags = LinkFlags::Up;
        link.header.change_mask = LinkFlags::Up;
        self.request(RouteNetlinkMessage::SetLink(link), 0)
            .with_context(|| format!("cannot bring interface {index} up"))
    }

    /// Makes an interface a port of a bridge.
    pub(super) fn set_master(&mut self, index: u32, bridge: u32) -> Result<()> {
        self.set_link(index, LinkAttribute::Controller(bridge))
            .with_context(|| format!("cannot put interface {index} into bridge {bridge}"))
    }

    /// Sets the MAC of an interface.
    pub(super) fn set_mac(&mut self, index: u32, mac: &[u8]) -> Result<()> {
        self.set_link(index, LinkAttribute::Address(mac.to_vec()))
            .with_context(|| format!("cannot set the MAC of interface {index}"))
    }

    /// Whether an interface is up and the kernel has told everybody.
    pub(super) fn is_up(&mut self, index: u32) -> Result<bool> {
        let link = self.look(index)?;
        Ok(link.attributes.contains(&LinkAttribute::OperState(State::Up)))
    }

    /// The MAC of an interface that is up and has neighbours.
    pub(super) fn announceable(&mut self, index: u32) -> Result<Option<Vec<u8>>> {
        let link = self.look(index)?;
        let flags = link.header.flags;
        if !flags.contains(LinkFlags::Up)
            || flags.intersects(LinkFlags::Noarp | LinkFlags::Loopback)
        {
            return Ok(None);
        }
        Ok(link.attributes.into_iter().find_map(|attribute| match attribute {
            LinkAttribute::Address(mac) => Some(mac),
            _ => None,
        }))
    }

    fn look(&mut self, index: u32) -> Result<LinkMessage> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        let reply = self.exchange(RouteNetlinkMessage::GetLink(link), 0);
        match reply.with_context(|| format!("cannot look at interface {index}"))? {
            Some(RouteNetlinkMessage::NewLink(link)) => Ok(link),
            _ => bail!("no answer about interface {index}"),
        }
    }

    /// Removes an interface.
    pub(super) fn delete(&mut self, index: u32) -> Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        self.request(RouteNetlinkMessage::DelLink(link), 0)
            .with_context(|| format!("cannot remove interface {index}"))
    }

    /// Gives an interface an address that is valid at once.
    pub(super) fn add_address(&mut self, index: u32, address: IpAddr, prefix: u8) -> Result<()> {
        let mut message = AddressMessage::default();
        message.header.family = family(address);
        message.header.prefix_len = prefix;
        message.header.index = index;
        // Nobody may be asked whether the address is free: the container still
        // has it elsewhere.
        message.header.flags = AddressHeaderFlags::Nodad;
        message.attributes =
            vec![AddressAttribute::Local(address), AddressAttribute::Address(address)];
        self.request(RouteNetlinkMessage::NewAddress(message), NEW)
            .with_context(|| format!("cannot give interface {index} address {address}/{prefix}"))
    }

    /// Routes what has no other way through `gateway`.
    pub(super) fn add_default_route(&mut self, index: u32, gateway: IpAddr) -> Result<()> {
        let mut route = RouteMessage::default();
        route.header.address_family = family(gateway);
        route.header.table = MAIN_TABLE;
        route.header.protocol = RouteProtocol::Boot;
        route.header.scope = RouteScope::Universe;
        route.header.kind = RouteType::Unicast;
        route.attributes =
            vec![RouteAttribute::Gateway(RouteAddress::from(gateway)), RouteAttribute::Oif(index)];
        self.request(RouteNetlinkMessage::NewRoute(route), NEW)
            .with_context(|| format!("cannot route through {gateway}"))
    }

    fn set_link(&mut self, index: u32, attribute: LinkAttribute) -> Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.attributes = vec![attribute];
        self.request(RouteNetlinkMessage::SetLink(link), 0)
    }

    fn request(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<()> {
        self.exchange(message, flags | NLM_F_ACK).map(drop)
    }

    /// Sends a request; gives the answer, or `None` for an acknowledgement.
    fn exchange(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Option<RouteNetlinkMessage>> {
        let mut packet = NetlinkMessage::from(message);
        packet.header.flags = NLM_F_REQUEST | flags;
        packet.finalize();
        let mut bytes = vec![0; packet.buffer_len()];
        packet.serialize(&mut bytes);
        self.0.send(&bytes, 0).context("cannot send to rtnetlink")?;
        let (bytes, _) = self.0.recv_from_full().context("cannot hear from rtnetlink")?;
        let packet = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&bytes)?;
        match packet.payload {
            NetlinkPayload::Error(err) if err.code.is_none() => Ok(None),
            NetlinkPayload::Error(err) => Err(err.to_io().into()),
            NetlinkPayload::InnerMessage(message) => Ok(Some(message)),
            other => Err(anyhow!("rtnetlink answered {other:?}")),
        }
    }
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}
