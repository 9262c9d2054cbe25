//! What a switch sees of one address: which host claims it, and what must not
//! pass while a container moves.

use std::{
    collections::HashMap,
    net::Ipv4Addr,
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use anyhow::Result;
use nix::{
    net::if_::if_nametoindex,
    sys::socket::{LinkAddr, recvfrom},
};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};

use crate::hosts::Hosts;

/// Something that passed the switch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// When it was looked at, from the start of the capture.
    pub at: Duration,
    /// The host it came from.
    pub host: String,
    /// What it is.
    pub what: What,
}

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// An ARP packet that says where the address is.
    Claim,
    /// A TCP segment from or to the address that resets a connection.
    Reset,
    /// An ICMP error.
    Error,
}

const ETHERNET: usize = 14;
const ARP: u16 = 0x0806;
const ECHO: [u8; 2] = [0, 8];
/// Seen again on its way out of a port.
const OUTGOING: u8 = 4;

/// ARP, ICMP and resets, so that no load can make it miss one.
fn filter() -> [SockFilter; 11] {
    let op = SockFilter::new;
    [
        op(0x28, 0, 0, 12),      // the type of the frame
        op(0x15, 7, 0, 0x0806),  // ARP
        op(0x15, 0, 7, 0x0800),  // else only IPv4
        op(0x30, 0, 0, 23),      // its protocol
        op(0x15, 4, 0, 1),       // ICMP
        op(0x15, 0, 4, 6),       // else only TCP
        op(0xb1, 0, 0, 14),      // the length of the header
        op(0x50, 0, 0, 14 + 13), // the flags behind it
        op(0x45, 0, 1, 4),       // RST
        op(0x06, 0, 0, 0xffff),
        op(0x06, 0, 0, 0),
    ]
}

/// Watches from its making on.
#[derive(Debug)]
pub struct Capture {
    address: Ipv4Addr,
    start: Instant,
    socket: Socket,
    /// Names of the hosts by the index of their port.
    ports: HashMap<usize, String>,
}

impl Capture {
    /// Watches `address` on the switch of `hosts`.
    pub fn start(hosts: &Hosts, address: Ipv4Addr) -> Result<Self> {
        let (socket, ports) = hosts.switch().with(|| {
            let all = i32::from(u16::to_be(0x0003));
            let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(all)))?;
            socket.set_nonblocking(true)?;
            socket.attach_filter(&filter())?;
            // What came before the filter.
            while recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut [0; 64]).is_ok() {}
            let ports = hosts.iter().zip(1..).map(|(host, port)| {
                let index = if_nametoindex(format!("port{port}").as_str())?;
                Ok((usize::try_from(index)?, host.name().to_owned()))
            });
            Ok::<_, anyhow::Error>((socket, ports.collect::<Result<HashMap<_, _>>>()?))
        })??;
        Ok(Self { address, start: Instant::now(), socket, ports })
    }

    /// What has passed since the last call.
    pub fn frames(&self) -> Result<Vec<Frame>> {
        let mut frames = Vec::new();
        let mut buf = [0; 256];
        loop {
            match recvfrom::<LinkAddr>(self.socket.as_raw_fd(), &mut buf) {
                Ok((len, Some(from))) if from.pkttype() != OUTGOING => {
                    let host = self.ports.get(&from.ifindex());
                    let what = self.judge(&buf[..len]);
                    let at = self.start.elapsed();
                    frames.extend(host.zip(what).map(|(host, what)| Frame {
                        at,
                        host: host.clone(),
                        what,
                    }));
                }
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => return Ok(frames),
                Err(err) => return Err(err.into()),
            }
        }
    }

    fn judge(&self, frame: &[u8]) -> Option<What> {
        let ours = self.address.octets();
        let body = frame.get(ETHERNET..)?;
        if frame[12..ETHERNET] == ARP.to_be_bytes() {
            return (body.get(14..18)? == ours).then_some(What::Claim);
        }
        if body.get(9)? == &1 {
            let kind = body.get(usize::from(body[0] & 0xf) * 4)?;
            return (!ECHO.contains(kind)).then_some(What::Error);
        }
        [12..16, 16..20].into_iter().any(|at| body.get(at) == Some(&ours)).then_some(What::Reset)
    }
}

/// The hosts that claimed the address, in order, each as often as it took over
/// from another.
#[must_use]
pub fn claimants(frames: &[Frame]) -> Vec<&str> {
    let claims = frames.iter().filter(|frame| frame.what == What::Claim);
    let mut hosts: Vec<&str> = claims.map(|frame| frame.host.as_str()).collect();
    hosts.dedup();
    hosts
}

#[cfg(test)]
mod tests {
    use std::{
        io::ErrorKind,
        net::{TcpStream, UdpSocket},
    };

    use super::*;

    #[test]
    fn claims_resets_and_errors_are_seen() {
        let hosts = Hosts::new(&["a", "b"]).unwrap();
        let (a, b) = (&hosts["a"], &hosts["b"]);
        let capture = Capture::start(&hosts, b.address()).unwrap();
        a.with(|| {
            let refused = TcpStream::connect((b.address(), 9)).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
            let udp = UdpSocket::bind((a.address(), 0)).unwrap();
            udp.connect((b.address(), 9)).unwrap();
            udp.send(b"x").unwrap();
            assert_eq!(udp.recv(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        })
        .unwrap();
        let frames = capture.frames().unwrap();
        assert_eq!(claimants(&frames), ["b"]);
        for what in [What::Reset, What::Error] {
            assert!(frames.iter().any(|f| f.what == what && f.host == "b"), "{frames:?}");
        }
        assert!(frames.iter().all(|frame| frame.host == "b"), "{frames:?}");
    }
}
