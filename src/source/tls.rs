//! Whom to trust: the system's certificate authorities, plus those of a file -> a client builder.

use std::path::{Path, PathBuf};

use reqwest::{Certificate, ClientBuilder};

use crate::fault::{Fault, Result};

/// Chooses ring for every TLS connection of the process. Call it any number of times; the first provider
/// installed stays.
pub fn install_crypto() {
    let _already_installed = rustls::crypto::ring::default_provider().install_default();
}

/// A client builder that trusts the system's authorities (`SSL_CERT_FILE` and `SSL_CERT_DIR` replace them) and
/// those in `ca_file`. On a machine without any, the client works for plain HTTP and trusts no HTTPS server.
///
/// # Errors
/// Config: `ca_file` or `SSL_CERT_FILE` cannot be read or holds no certificate.
pub fn client_builder(ca_file: Option<&Path>) -> Result<ClientBuilder> {
    install_crypto();
    if let Some(file) = std::env::var_os("SSL_CERT_FILE").map(PathBuf::from) {
        // reqwest reads it by itself, but passes over a missing file and then trusts nobody.
        certificates(&file).map_err(|fault| fault.at("SSL_CERT_FILE"))?;
    }
    let extra = match ca_file {
        Some(file) => certificates(file)?,
        None => Vec::new(),
    };
    let builder = || reqwest::Client::builder().tls_certs_merge(extra.clone());
    // Building fails where the system has no authority at all.
    if extra.is_empty() && builder().build().is_err() {
        return Ok(reqwest::Client::builder().tls_certs_only([]));
    }
    Ok(builder())
}

fn certificates(file: &Path) -> Result<Vec<Certificate>> {
    let unusable = |why: String| {
        Fault::config(format!("certificate file {}: {why}", file.display()))
            .help("give a PEM file of certificate authorities: -----BEGIN CERTIFICATE-----")
    };
    let pem = std::fs::read(file).map_err(|error| unusable(format!("cannot be read: {error}")))?;
    let certificates =
        Certificate::from_pem_bundle(&pem).map_err(|_| unusable("is not valid PEM".to_owned()))?;
    if certificates.is_empty() {
        return Err(unusable("holds no certificate".to_owned()));
    }
    Ok(certificates)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::Kind;

    #[test]
    fn installing_twice_is_fine() {
        install_crypto();
        install_crypto();
    }

    #[test]
    fn a_useless_certificate_file_is_a_config_fault_that_names_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ca.pem");
        for content in [None, Some(""), Some("not a certificate")] {
            if let Some(content) = content {
                std::fs::write(&file, content).unwrap();
            }
            let fault = client_builder(Some(&file)).unwrap_err();
            assert_eq!(fault.kind, Kind::Config);
            assert!(fault.message.contains("ca.pem"), "{fault}");
        }
    }
}
