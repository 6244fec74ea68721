//! The trusted certificate authorities (the system's, and those of a file) -> a client builder.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use reqwest::ClientBuilder;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_name;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, DigitallySignedStruct, SignatureScheme};
use rustls_platform_verifier::Verifier;

use crate::fault::{Fault, Result};
use crate::plain;

/// Chooses ring for every TLS connection of the process. Further calls do nothing: the first provider installed
/// stays.
pub fn install_crypto() {
    let _already_installed = rustls::crypto::ring::default_provider().install_default();
}

/// Returns a client builder that trusts the system's authorities (`SSL_CERT_FILE` and `SSL_CERT_DIR` replace them) and
/// those in `ca_file`. A self-signed server certificate is trusted if the user gave that very certificate in `ca_file`
/// or `SSL_CERT_FILE`. On a machine without authorities the client works for plain HTTP and trusts no HTTPS server.
///
/// # Errors
/// Config: `ca_file` or `SSL_CERT_FILE` cannot be read or holds no usable certificate.
pub fn client_builder(ca_file: Option<&Path>) -> Result<ClientBuilder> {
    install_crypto();
    let mut given = Vec::new();
    if let Some(file) = std::env::var_os("SSL_CERT_FILE").map(PathBuf::from) {
        // The verifier reads this file itself, but skips a missing one and then trusts no server.
        given = certificates(&file).map_err(|fault| fault.at("SSL_CERT_FILE"))?;
    }
    let extra = match ca_file {
        Some(file) => certificates(file)?,
        None => Vec::new(),
    };
    given.extend(extra.iter().cloned());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let ordinary = match (Verifier::new_with_extra_roots(extra, provider.clone()), ca_file) {
        (Ok(ordinary), _) => ordinary,
        // It fails if there is no authority at all.
        (Err(_), None) => return Ok(reqwest::Client::builder().tls_certs_only([])),
        (Err(error), Some(file)) => return Err(unusable(file, &error.to_string())),
    };
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring supports TLS 1.2 and 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Trust { ordinary, given }))
        .with_no_client_auth();
    // The protocols that reqwest offers by default.
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(reqwest::Client::builder().tls_backend_preconfigured(config))
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let pem = plain::small(file)
        .map_err(|error| unusable(file, &format!("cannot be read: {error}")).or_machines())?;
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&pem)
        .collect::<std::result::Result<_, _>>()
        .map_err(|_| unusable(file, "is not valid PEM"))?;
    if certificates.is_empty() {
        return Err(unusable(file, "holds no certificate"));
    }
    Ok(certificates)
}

fn unusable(file: &Path, why: &str) -> Fault {
    Fault::config(format!("certificate file {}: {why}", file.display()))
        .help("give a PEM file of certificate authorities: -----BEGIN CERTIFICATE-----")
}

/// The ordinary verification, and one more case. `openssl req -x509`, which Docker's guide to private registries
/// uses, makes a server certificate that is its own authority. webpki refuses an authority as a server; OpenSSL and
/// Go accept it.
#[derive(Debug)]
struct Trust {
    ordinary: Verifier,
    /// The certificates that the user gave, as opposed to the system's.
    given: Vec<CertificateDer<'static>>,
}

impl ServerCertVerifier for Trust {
    fn verify_server_cert(
        &self,
        server: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        match self.ordinary.verify_server_cert(server, intermediates, name, ocsp_response, now) {
            // webpki checks the dates before this, and the name only afterwards.
            Err(error) if is_authority_as_server(&error) && self.given.contains(server) => {
                verify_server_name(&ParsedCertificate::try_from(server)?, name)?;
                Ok(ServerCertVerified::assertion())
            }
            result => result,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        server: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        self.ordinary.verify_tls12_signature(message, server, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        server: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        self.ordinary.verify_tls13_signature(message, server, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.ordinary.supported_verify_schemes()
    }
}

/// Returns whether the error is webpki's for an authority used as a server. rustls has no name of its own for it.
fn is_authority_as_server(error: &rustls::Error) -> bool {
    match error {
        rustls::Error::InvalidCertificate(CertificateError::Other(other)) => {
            matches!(other.0.downcast_ref(), Some(webpki::Error::CaUsedAsEndEntity))
        }
        _ => false,
    }
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

    const NOT_DER: &str = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";

    #[test]
    fn a_useless_certificate_file_is_a_config_fault_that_names_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ca.pem");
        for content in [None, Some(""), Some("not a certificate"), Some(NOT_DER)] {
            if let Some(content) = content {
                std::fs::write(&file, content).unwrap();
            }
            let fault = client_builder(Some(&file)).unwrap_err();
            assert_eq!(fault.kind, Kind::Config);
            assert!(fault.message.contains("ca.pem"), "{fault}");
        }
    }
}
