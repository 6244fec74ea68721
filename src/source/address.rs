//! Addresses no URL may lead to: link-local ones, where clouds hand out the machine's credentials.
//!
//! A literal is checked in the URL and in every redirect; a name is checked by our resolver, on the very
//! addresses that are then connected to, so that a name cannot change its mind in between.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::{Host, Url};

/// Metadata services outside the link-local range: Azure's wire server and the IPv6 one of AWS.
const METADATA: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
];

pub fn forbidden(address: IpAddr) -> bool {
    let address = address.to_canonical();
    METADATA.contains(&address)
        || match address {
            IpAddr::V4(v4) => v4.is_link_local(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        }
}

/// Whether the host is a forbidden address written out. `Url` has decoded decimal, octal and hex forms.
pub fn forbidden_host(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(address)) => forbidden(IpAddr::V4(address)),
        Some(Host::Ipv6(address)) => forbidden(IpAddr::V6(address)),
        Some(Host::Domain(_)) | None => false,
    }
}

/// The host name resolves to forbidden addresses only.
#[derive(Debug)]
pub struct Forbidden;

impl fmt::Display for Forbidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the host name leads to a link-local address")
    }
}

impl std::error::Error for Forbidden {}

/// The system's resolver, less forbidden addresses.
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
        for address in ["169.254.169.254", "::ffff:169.254.1.1", "fe80::1", "168.63.129.16", "fd00:ec2::254"]
        {
            assert!(forbidden(address.parse().unwrap()), "{address}");
        }
        for address in ["127.0.0.1", "10.0.0.1", "192.168.1.1", "::1", "fd00::1", "8.8.8.8"] {
            assert!(!forbidden(address.parse().unwrap()), "{address}");
        }
    }
}
