//! The annotations that ask for a network.

use std::collections::HashMap;
use std::net::IpAddr;

use anyhow::{Context, Result, bail};
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use super::Address;

const PREFIX: &str = "dunlin.network.";

/// What a container's interface is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Network {
    /// Bridge in our network namespace.
    pub(super) bridge: String,
    /// Name of the interface inside.
    pub(super) interface: String,
    /// Its MAC.
    pub(super) mac: [u8; 6],
    /// Its addresses.
    pub(super) addresses: Vec<Address>,
    /// Where default routes lead, at most one of each family.
    pub(super) gateways: Vec<IpAddr>,
}

impl Network {
    /// Reads what the specification of container `id` asks for, if it does.
    pub(crate) fn of(spec: &Spec, id: &str) -> Result<Option<Self>> {
        let none = HashMap::new();
        let annotations = spec.annotations().as_ref().unwrap_or(&none);
        let network = parse(annotations, id).context("cannot use its annotations")?;
        if network.is_some() && !has_own_namespace(spec) {
            bail!("{PREFIX}bridge is set but the container has no network namespace of its own");
        }
        Ok(network)
    }
}

/// Name of the host's end of the pair made for a container.
///
/// Two state directories on one host may hold the same id.
pub(crate) fn veth_name(state_dir: &std::path::Path) -> String {
    format!("dl{:012x}", stable_hash(state_dir.as_os_str().as_encoded_bytes()) >> 16)
}

fn parse(annotations: &HashMap<String, String>, id: &str) -> Result<Option<Network>> {
    let mut bridge = None;
    let mut network = Network {
        bridge: String::new(),
        interface: "eth0".into(),
        mac: stable_mac(id),
        addresses: Vec::new(),
        gateways: Vec::new(),
    };
    for (key, value) in annotations {
        let Some(name) = key.strip_prefix(PREFIX) else { continue };
        let wrong = || format!("{key} is {value:?}");
        match name {
            "bridge" => bridge = Some(interface_name(value).with_context(wrong)?),
            "interface" => network.interface = interface_name(value).with_context(wrong)?,
            "mac" => network.mac = mac(value).with_context(wrong)?,
            "address" => network.addresses = list(value, address).with_context(wrong)?,
            "gateway" => {
                network.gateways = list(value, |text| Ok(text.parse()?)).with_context(wrong)?;
            }
            _ => bail!("{key} is unknown"),
        }
    }
    let given = annotations.keys().any(|key| key.starts_with(PREFIX));
    match bridge {
        Some(bridge) => Ok(Some(Network { bridge, ..network })),
        None if given => bail!("{PREFIX}bridge is missing"),
        None => Ok(None),
    }
}

fn list<T>(text: &str, parse: impl Fn(&str) -> Result<T>) -> Result<Vec<T>> {
    text.split(',').map(|item| parse(item.trim())).collect()
}

fn interface_name(text: &str) -> Result<String> {
    let valid = (1..16).contains(&text.len())
        && text != "."
        && text != ".."
        && text.bytes().all(|byte| byte.is_ascii_graphic() && !b"/:".contains(&byte));
    if valid { Ok(text.to_owned()) } else { bail!("not a name for an interface") }
}

fn mac(text: &str) -> Result<[u8; 6]> {
    let bytes = text
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16))
        .collect::<Result<Vec<_>, _>>()
        .ok()
        .and_then(|bytes| <[u8; 6]>::try_from(bytes).ok())
        .context("not a MAC")?;
    if bytes[0] & 1 != 0 {
        bail!("a group's MAC");
    }
    Ok(bytes)
}

fn address(text: &str) -> Result<Address> {
    let (address, prefix) = text.split_once('/').context("no prefix length")?;
    let address: IpAddr = address.parse()?;
    let prefix: u8 = prefix.parse()?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    if longest < prefix {
        bail!("a prefix of {prefix} bits is too long");
    }
    Ok((address, prefix))
}

fn has_own_namespace(spec: &Spec) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    namespaces.into_iter().flatten().any(|namespace| {
        namespace.typ() == LinuxNamespaceType::Network && namespace.path().is_none()
    })
}

/// A locally administered MAC, the same wherever the container runs.
fn stable_mac(id: &str) -> [u8; 6] {
    let [_, _, hash @ ..] = stable_hash(id.as_bytes()).to_be_bytes();
    let mut mac = hash;
    mac[0] = (mac[0] & 0xfc) | 2;
    mac
}

/// FNV-1a: the hashes of the standard library may change from release to
/// release, and both ends of a migration must agree.
fn stable_hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn annotations(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(key, value)| (format!("{PREFIX}{key}"), (*value).into())).collect()
    }

    #[test]
    fn all_keys_are_read() {
        let given = annotations(&[
            ("bridge", "br0"),
            ("interface", "net1"),
            ("mac", "02:00:00:00:00:0a"),
            ("address", "10.0.0.2/24, fd00::2/64"),
            ("gateway", "10.0.0.1,fd00::1"),
        ]);
        let network = parse(&given, "c").unwrap().unwrap();
        assert_eq!(network.bridge, "br0");
        assert_eq!(network.interface, "net1");
        assert_eq!(network.mac, [2, 0, 0, 0, 0, 10]);
        assert_eq!(network.addresses[0], ("10.0.0.2".parse().unwrap(), 24));
        assert_eq!(network.addresses[1], ("fd00::2".parse().unwrap(), 64));
        assert_eq!(network.gateways.len(), 2);
    }

    #[test]
    fn nothing_asked_nothing_made() {
        let other = HashMap::from([("org.example".to_owned(), "x".to_owned())]);
        assert_eq!(parse(&other, "c").unwrap(), None);
    }

    #[test]
    fn wrong_values_are_named() {
        for (key, value) in [
            ("bridge", "a/b"),
            ("bridge", ""),
            ("interface", "longer-than-allowed"),
            ("mac", "02:00:00:00:00"),
            ("mac", "01:00:00:00:00:0a"),
            ("address", "10.0.0.2"),
            ("address", "10.0.0.2/33"),
            ("gateway", "10.0.0"),
            ("colour", "blue"),
        ] {
            let mut given = annotations(&[("bridge", "br0")]);
            given.extend(annotations(&[(key, value)]));
            let err = parse(&given, "c").unwrap_err();
            assert!(err.to_string().contains(&format!("{PREFIX}{key} is")), "{err}");
        }
        assert!(parse(&annotations(&[("mac", "02:00:00:00:00:0a")]), "c").is_err());
    }

    #[test]
    fn macs_are_local_stable_and_differ() {
        assert_eq!(stable_mac("web-1"), stable_mac("web-1"));
        assert_ne!(stable_mac("web-1"), stable_mac("web-2"));
        assert_eq!(stable_mac("web-1")[0] & 3, 2);
        assert_eq!(stable_hash(b"a"), 0xaf63_dc4c_8601_ec8c, "FNV-1a's own test vector");
    }
}
