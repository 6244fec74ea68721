//! Addresses that no URL may lead to: link-local ones, where clouds answer with the machine's credentials.
//!
//! A literal address is checked in the URL and in every redirect. A name is checked by hone's resolver, on the very
//! addresses that are then connected to, so that it cannot resolve to others in between.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::{Host, Url};

/// Addresses of metadata services outside the link-local range.
const METADATA_V4: [Ipv4Addr; 3] = [
    Ipv4Addr::new(168, 63, 129, 16),   // Azure's wire server
    Ipv4Addr::new(100, 100, 100, 200), // Alibaba
    Ipv4Addr::new(192, 0, 0, 192),     // Oracle
];
/// Beginnings of IPv6 addresses of metadata services. The first covers all that AWS serves to an instance:
/// metadata, EKS' credentials, time.
const METADATA_V6: [&[u16]; 4] = [
    &[0xfd00, 0xec2],
    &[0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254],       // Google
    &[0xfd00, 0xc1, 0, 0, 0, 0, 0xa9fe, 0xa9fe], // Oracle
    &[0xfd00, 0x42, 0, 0, 0, 0, 0, 0x42],        // Scaleway
];
/// Names of metadata services. A proxy would look them up instead of hone.
const METADATA_NAMES: [&str; 5] =
    ["metadata.google.internal", "metadata.goog", "metadata", "instance-data", "instance-data.ec2.internal"];

/// Returns whether no connection may be made to this address.
pub fn forbidden(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => forbidden_v4(v4),
        IpAddr::V6(v6) => {
            v6.is_unicast_link_local()
                || METADATA_V6.iter().any(|start| v6.segments().starts_with(start))
                || embedded(v6).is_some_and(forbidden_v4)
        }
    }
}

fn forbidden_v4(address: Ipv4Addr) -> bool {
    address.is_link_local() || METADATA_V4.contains(&address)
}

/// Returns the IPv4 address that an IPv6 address leads to: NAT64 (`64:ff9b::/96` and `64:ff9b:1::/48`), 6to4
/// (`2002::/16`), and the old compatible form (`::a.b.c.d`).
fn embedded(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let s = address.segments();
    let v4 = |high: u16, low: u16| Some(Ipv4Addr::from((u32::from(high) << 16) | u32::from(low)));
    match s {
        [0x64, 0xff9b, 0 | 1, ..] => v4(s[6], s[7]),
        [0x2002, high, low, ..] => v4(high, low),
        [0, 0, 0, 0, 0, 0, high, low] if high != 0 => v4(high, low),
        _ => None,
    }
}

/// Returns whether the host is a forbidden address or a name of one. `Url` has already decoded decimal, octal and
/// hexadecimal forms.
pub fn forbidden_host(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(address)) => forbidden(IpAddr::V4(address)),
        Some(Host::Ipv6(address)) => forbidden(IpAddr::V6(address)),
        Some(Host::Domain(name)) => {
            let name = name.trim_end_matches('.');
            METADATA_NAMES.iter().any(|known| known.eq_ignore_ascii_case(name))
        }
        None => false,
    }
}

/// The error if a host is a forbidden address, or its name resolves to such addresses only.
#[derive(Debug)]
pub struct Forbidden;

impl fmt::Display for Forbidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the host is a link-local address, or its name leads to one")
    }
}

impl std::error::Error for Forbidden {}

/// The system's resolver without forbidden addresses.
pub struct Resolver;

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            let allowed: Vec<SocketAddr> =
                found.iter().copied().filter(|address| !forbidden(address.ip())).collect();
            if allowed.is_empty() && !found.is_empty() {
                return Err(Forbidden.into());
            }
            Ok(Box::new(allowed.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_link_local_and_metadata_addresses_are_forbidden() {
        for address in [
            "169.254.169.254",
            "169.254.170.2",
            "169.254.170.23",
            "::ffff:169.254.1.1",
            "fe80::1",
            "fe80::a9fe:a9fe",
            "168.63.129.16",
            "100.100.100.200",
            "192.0.0.192",
            "::ffff:100.100.100.200",
            "fd00:ec2::254",
            "fd00:ec2::23",
            "fd20:ce::254",
            "fd00:c1::a9fe:a9fe",
            "fd00:42::42",
            "64:ff9b::a9fe:a9fe",
            "64:ff9b:1::a9fe:a9fe",
            "64:ff9b::100.100.100.200",
            "2002:a9fe:a9fe::1",
            "::169.254.169.254",
        ] {
            assert!(forbidden(address.parse().unwrap()), "{address}");
        }
        for address in [
            "127.0.0.1",
            "10.0.0.1",
            "192.168.1.1",
            "100.100.100.201",
            "192.0.0.191",
            "168.63.129.17",
            "::1",
            "::",
            "fd00::1",
            "fd00:ec3::254",
            "64:ff9b::8.8.8.8",
            "2002:808:808::1",
            "8.8.8.8",
        ] {
            assert!(!forbidden(address.parse().unwrap()), "{address}");
        }
        let host = |text: &str| forbidden_host(&Url::parse(text).unwrap());
        for url in [
            "http://Metadata.Google.Internal/x",
            "http://metadata.google.internal./",
            "http://metadata/",
            "http://0xa9.254.43518/",
        ] {
            assert!(host(url), "{url}");
        }
        assert!(!host("http://metadata.example.org/") && !host("https://host/169.254.169.254"));
    }
}
