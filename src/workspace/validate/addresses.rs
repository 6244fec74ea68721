//! Images, addresses of data and names of objects in a Workspace -> what is wrong with them.

use std::net::IpAddr;

use url::{Host, Url};

use super::Rules;
use crate::fetch;
use crate::registry::Target;
use crate::workspace::annotations::object_name;

/// Schemes of data beside http and https.
const PLACES: [&str; 5] = ["hf", "s3", "gs", "az", "oci"];

/// Names that lead to the machine itself or to a cloud's metadata.
const HOSTS_REFUSED: [&str; 4] =
    ["localhost", "metadata.google.internal", "metadata.google", "instance-data.ec2.internal"];

impl Rules {
    pub(super) fn object(&mut self, field: &str, kind: &str, name: &str) {
        if object_name(name).is_none() {
            let hint = placeholder(name);
            self.wrong(
                field,
                format!("{name:?} cannot be the name of {kind}: allowed are a-z, 0-9, - and .{hint}"),
            );
        }
    }

    pub(super) fn image(&mut self, field: &str, image: &str, pushed: bool) {
        match Target::parse(image) {
            Err(fault) => {
                let told = match placeholder(image) {
                    "" => fault.in_a_line(),
                    hint => fault.message + hint,
                };
                self.wrong(field, told);
            }
            Ok(Target::Layout { .. }) => self.wrong(field, "a folder on disk is no image of a registry"),
            Ok(_) if pushed && image.contains('@') => {
                self.wrong(field, "a digest names what already exists; give a tag to push to");
            }
            Ok(_) => {}
        }
    }

    /// Checks an address of data: all places that `hone run` reads from, except paths, which belong to a volume.
    pub(super) fn data_address(&mut self, field: &str, text: &str) {
        let scheme = text.trim().split_once("://").map(|(scheme, _)| scheme.to_ascii_lowercase());
        if let Some("http" | "https") | None = scheme.as_deref() {
            return self.url(field, text);
        }
        // Digest, layout, weight and limit are the plan's matter.
        let address = text.split_once('#').map_or(text, |(address, _)| address);
        let known = address.split_once("://").is_some_and(|(name, _)| PLACES.contains(&name));
        match fetch::Data::parse(address) {
            Ok(_) if known => {}
            Err(fault) if known => self.wrong(field, fault.in_a_line()),
            _ => self.wrong(
                field,
                format!(
                    "{}:// is no place that a pod reads; expected http, https, {}; files of a volume are given by volumeSource",
                    scheme.unwrap_or_default(),
                    PLACES.join(", ")
                ),
            ),
        }
    }

    /// Checks the address as it is written, as KAITO does. If a name leads to a link-local address, the connection is
    /// refused.
    pub(super) fn url(&mut self, field: &str, text: &str) {
        let Ok(url) = Url::parse(text) else {
            return self
                .wrong(field, "not a valid URL; expected https://host/file.parquet or another data file");
        };
        // The part after the host may hold a secret.
        let name = format!("{}://{}", url.scheme(), url.host_str().unwrap_or_default());
        let refused = match url.host() {
            None => true,
            Some(Host::Domain(host)) => {
                let host = host.trim_end_matches('.').to_lowercase();
                HOSTS_REFUSED.contains(&host.as_str()) || host.ends_with(".localhost")
            }
            Some(Host::Ipv4(address)) => inside(IpAddr::V4(address)),
            Some(Host::Ipv6(address)) => inside(IpAddr::V6(address)),
        };
        if refused {
            self.wrong(field, format!("{name}: loopback, private and link-local hosts are refused; give a public host, or its name"));
        }
    }
}

/// Returns whether an address is loopback, private or link-local.
fn inside(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => v4.is_loopback() || v4.is_private() || v4.is_link_local() || v4.is_unspecified(),
        IpAddr::V6(v6) => {
            v6.is_loopback() || v6.is_unique_local() || v6.is_unicast_link_local() || v6.is_unspecified()
        }
    }
}

/// Returns a hint if the text looks like a placeholder of a documentation.
fn placeholder(text: &str) -> &'static str {
    let word = |word: &str| {
        word.len() > 5 && word.contains('_') && word.chars().all(|c| c.is_ascii_uppercase() || c == '_')
    };
    match text.split(['/', '.', ':']).any(word) {
        true => "; this looks like a placeholder: put your own name there",
        false => "",
    }
}
