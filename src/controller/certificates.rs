//! Certificates of the webhook -> a Secret of the controller's own namespace, and the trust that the API server has in
//! them.
//!
//! The controller makes them itself, for the name of its Service, and renews them after two thirds of their life. All
//! replicas serve with the pair in the Secret. A new pair is trusted (`caBundle`) before it is used, and the previous
//! one stays trusted beside it, so that the API server never sees a certificate that it does not know. The authority's
//! key is never stored.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, PostParams};
use kube::{Client, ResourceExt};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::workspace::{MANAGED_BY, MANAGER};

/// The Secret, of type kubernetes.io/tls.
pub const SECRET: &str = "hone-webhook";
/// The Service that leads to the webhook.
pub const SERVICE: &str = "hone-webhook";
/// The ValidatingWebhookConfiguration.
pub const CONFIGURATION: &str = "validation.hone.sh";
/// The time at which the pair in the Secret is to be renewed.
const RENEWAL: &str = "hone.sh/renewal";
/// Clocks of machines differ.
const SKEW: SignedDuration = SignedDuration::from_hours(1);

/// A certificate with its key, and the authorities that are to be trusted, the newest first. All in PEM.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    chain: String,
    key: String,
    trust: String,
    renewal: Timestamp,
}

impl Pair {
    /// Returns a new authority and a certificate for `host`, which it signed. `trusted`: the authority before, in PEM.
    fn make(
        host: &str,
        valid: Duration,
        now: Timestamp,
        trusted: Option<&str>,
    ) -> Result<Pair, rcgen::Error> {
        let valid = SignedDuration::try_from(valid).unwrap_or(SignedDuration::from_hours(24));
        let time = |at: Timestamp| {
            rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(at.as_second().max(0) as u64)
        };
        let dated = |mut params: CertificateParams, name: &str| {
            params.distinguished_name = DistinguishedName::new();
            params.distinguished_name.push(DnType::CommonName, name);
            params.not_before = time(now - SKEW);
            params.not_after = time(now + valid);
            params
        };
        let mut authority = dated(CertificateParams::new(Vec::new())?, "hone webhook authority");
        authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let authority_key = KeyPair::generate()?;
        let trusted_now = authority.self_signed(&authority_key)?.pem();
        let mut server = dated(CertificateParams::new(vec![host.to_owned()])?, "hone webhook");
        server.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        server.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let chain = server.signed_by(&key, &Issuer::new(authority, authority_key))?.pem();
        Ok(Pair {
            chain,
            key: key.serialize_pem(),
            trust: trusted_now + trusted.unwrap_or_default(),
            renewal: now + valid * 2 / 3,
        })
    }

    /// Reads the pair in a Secret. `None`: there is none, or it cannot be used to serve.
    fn of(secret: &Secret) -> Option<Pair> {
        let data = secret.data.as_ref()?;
        let text = |name: &str| String::from_utf8(data.get(name)?.0.clone()).ok();
        let renewal = secret.annotations().get(RENEWAL)?.parse().ok()?;
        let pair = Pair { chain: text("tls.crt")?, key: text("tls.key")?, trust: text("ca.crt")?, renewal };
        pair.config().map(|_| pair)
    }

    fn secret(&self, namespace: &str, old: Option<&Secret>) -> Secret {
        let bytes = |text: &str| ByteString(text.as_bytes().to_vec());
        let data = [("tls.crt", &self.chain), ("tls.key", &self.key), ("ca.crt", &self.trust)];
        Secret {
            metadata: ObjectMeta {
                name: Some(SECRET.into()),
                namespace: Some(namespace.into()),
                labels: Some(BTreeMap::from([(MANAGED_BY.into(), MANAGER.into())])),
                annotations: Some(BTreeMap::from([(RENEWAL.into(), self.renewal.to_string())])),
                resource_version: old.and_then(ResourceExt::resource_version),
                ..ObjectMeta::default()
            },
            type_: Some("kubernetes.io/tls".into()),
            data: Some(data.into_iter().map(|(name, text)| (name.into(), bytes(text))).collect()),
            ..Secret::default()
        }
    }

    /// Returns the configuration of a server. `None`: the certificate and its key do not match.
    fn config(&self) -> Option<Arc<ServerConfig>> {
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(self.chain.as_bytes()).collect();
        let key = PrivateKeyDer::from_pem_slice(self.key.as_bytes()).ok()?;
        let builder = ServerConfig::builder().with_no_client_auth();
        let mut config = builder.with_single_cert(chain.ok()?, key).ok()?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Some(Arc::new(config))
    }
}

/// The last line of a certificate in PEM.
const END: &str = "-----END CERTIFICATE-----";

/// Returns the first certificate of a text in PEM.
fn first(pem: &str) -> Option<&str> {
    pem.find(END).map(|at| pem[..at + END.len()].trim_start())
}

/// LIMIT: authorities of a bundle; replicas that begin at the same time add one each.
const AUTHORITIES_MAX: usize = 8;

/// Returns the certificates of both texts, each once, the first text's first.
fn joined(pem: &str, more: &str) -> String {
    let mut list: Vec<&str> = Vec::new();
    for found in [pem, more].iter().flat_map(|text| text.split_inclusive(END)).map(str::trim) {
        let whole = found.starts_with("-----BEGIN CERTIFICATE-----") && found.ends_with(END);
        if whole && !list.contains(&found) && list.len() < AUTHORITIES_MAX {
            list.push(found);
        }
    }
    list.iter().map(|pem| format!("{pem}\n")).collect()
}

/// Keeps the Secret and the trust as they should be.
pub struct Keeper {
    /// Client of the API server.
    pub client: Client,
    /// The controller's own namespace.
    pub namespace: String,
    /// Life of a certificate.
    pub valid: Duration,
    /// Time in which API servers learn of a new trust.
    pub spread: Duration,
}

impl Keeper {
    /// Returns the host name that the API server requests.
    fn host(&self) -> String {
        format!("{SERVICE}.{}.svc", self.namespace)
    }

    /// Returns the certificate to serve with now. Renews the pair if it is due, and restores a `caBundle` that somebody
    /// changed.
    ///
    /// # Errors
    /// The errors of the API server. A conflict with another replica is one; the next look finds the pair that it
    /// wrote.
    pub async fn look(&self) -> kube::Result<Arc<ServerConfig>> {
        let secrets = Api::<Secret>::namespaced(self.client.clone(), &self.namespace);
        let old = secrets.get_opt(SECRET).await?;
        let now = Timestamp::now();
        let known = old.as_ref().and_then(Pair::of);
        let pair = match known.clone().filter(|pair| now < pair.renewal) {
            Some(pair) => pair,
            None => {
                let trusted = known.as_ref().and_then(|pair| first(&pair.trust));
                let pair = Pair::make(&self.host(), self.valid, now, trusted)
                    .map_err(|error| kube::Error::Service(format!("no certificate: {error}").into()))?;
                // The pair is trusted before it is stored, since other replicas serve with it from then on. Another
                // replica may have been faster, so authorities that are trusted now stay trusted until the Secret shows
                // which pair counts.
                self.trust(&pair.trust, true).await?;
                if known.is_some() {
                    // The previous pair serves until every API server has read the new trust.
                    tokio::time::sleep(self.spread).await;
                }
                let secret = pair.secret(&self.namespace, old.as_ref());
                match &old {
                    None => secrets.create(&PostParams::default(), &secret).await?,
                    Some(_) => secrets.replace(SECRET, &PostParams::default(), &secret).await?,
                };
                tracing::info!(target: "hone", "the webhook's certificate is renewed; the next renewal is at {}", pair.renewal);
                pair
            }
        };
        self.trust(&pair.trust, false).await?;
        let broken = || kube::Error::Service("the webhook's certificate cannot be served with".into());
        pair.config().ok_or_else(broken)
    }

    /// Writes the authorities into the ValidatingWebhookConfiguration, unless they are there. `beside`: those that are
    /// there stay too.
    async fn trust(&self, pem: &str, beside: bool) -> kube::Result<()> {
        let api = Api::<ValidatingWebhookConfiguration>::all(self.client.clone());
        let Some(mut configuration) = api.get_opt(CONFIGURATION).await? else {
            let missing = format!(
                "ValidatingWebhookConfiguration {CONFIGURATION} is not installed; jobs/webhook holds it"
            );
            return Err(kube::Error::Service(missing.into()));
        };
        let mut changed = false;
        for webhook in configuration.webhooks.iter_mut().flatten() {
            let bundle = &mut webhook.client_config.ca_bundle;
            let now = bundle.as_ref().map(|bundle| String::from_utf8_lossy(&bundle.0)).unwrap_or_default();
            let wanted = if beside { joined(pem, &now) } else { pem.to_owned() };
            let wanted = ByteString(wanted.into_bytes());
            changed |= bundle.as_ref() != Some(&wanted);
            *bundle = Some(wanted);
        }
        if changed {
            api.replace(CONFIGURATION, &PostParams::default(), &configuration).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_survives_its_secret_and_trusts_the_one_before() {
        crate::source::install_crypto();
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let month = Duration::from_secs(30 * 24 * 3600);
        let one = Pair::make("hone-webhook.a.svc", month, now, None).unwrap();
        assert_eq!(one.renewal.as_second() - now.as_second(), 20 * 24 * 3600);
        let secret = one.secret("a", None);
        assert_eq!(Pair::of(&secret), Some(one.clone()));
        let two = Pair::make("hone-webhook.a.svc", month, now, first(&one.trust)).unwrap();
        assert!(two.trust.ends_with(one.trust.trim_end()), "both are trusted");
        let three = Pair::make("hone-webhook.a.svc", month, now, first(&two.trust)).unwrap();
        assert!(!three.trust.contains(one.trust.trim()), "the one before the last is not");

        // Two replicas that renew at the same time take no trust from each other.
        let both = joined(&two.trust, &one.trust);
        assert_eq!(both.matches("BEGIN").count(), 2, "each once");
        let other = Pair::make("hone-webhook.a.svc", month, now, first(&one.trust)).unwrap();
        let all = joined(&other.trust, &both);
        assert_eq!(all.matches("BEGIN").count(), 3);
        assert!(all.contains(first(&two.trust).unwrap()) && joined("", "nonsense").is_empty());

        let mut broken = secret;
        broken.data.as_mut().unwrap().insert("tls.key".into(), ByteString(two.key.into_bytes()));
        assert_eq!(Pair::of(&broken), None, "a key of another certificate");
    }
}
