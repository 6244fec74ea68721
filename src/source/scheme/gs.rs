//! `gs://BUCKET/NAME`: Google Cloud Storage.
//!
//! Credentials are those of Google's own libraries: the file `GOOGLE_APPLICATION_CREDENTIALS` (the key of a service
//! account or of a user), else gcloud's application default, else the identity of the pod or machine.
//! `STORAGE_EMULATOR_HOST` names another server, which is asked without credentials. Public buckets need
//! `GOOGLE_SKIP_SIGNATURE=true`.

use std::sync::Arc;

use object_store::ObjectStore;
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};

use super::{Caught, Scheme, retries};

/// The scheme of Google Cloud Storage.
pub static SCHEME: Scheme = Scheme {
    name: "gs",
    help: "credentials are looked for in GOOGLE_APPLICATION_CREDENTIALS, gcloud's application default and the identity of \
           the pod or machine; a public bucket needs GOOGLE_SKIP_SIGNATURE=true",
    open,
};

fn open(bucket: &str, client: Caught) -> object_store::Result<Arc<dyn ObjectStore>> {
    let mut builder = GoogleCloudStorageBuilder::from_env()
        .with_bucket_name(bucket)
        .with_retry(retries())
        .with_http_connector(client);
    if let Some(host) = std::env::var("STORAGE_EMULATOR_HOST").ok().filter(|host| !host.trim().is_empty()) {
        let endpoint = if host.contains("://") { host } else { format!("http://{host}") };
        builder = builder
            .with_config(GoogleConfigKey::BaseUrl, endpoint)
            .with_config(GoogleConfigKey::SkipSignature, "true");
    }
    Ok(Arc::new(builder.build()?))
}
