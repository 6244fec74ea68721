//! `az://CONTAINER/NAME`: Azure Blob Storage, in the account `AZURE_STORAGE_ACCOUNT_NAME`.
//!
//! Credentials come from `AZURE_STORAGE_ACCOUNT_KEY`, a shared access signature (`AZURE_STORAGE_SAS_KEY`), a
//! workload identity (`AZURE_FEDERATED_TOKEN_FILE`, as AKS sets it), a client secret, or else the machine's
//! identity. `AZURE_STORAGE_ENDPOINT` names another server. Public containers need `AZURE_SKIP_SIGNATURE=true`.

use std::sync::Arc;

use object_store::ObjectStore;
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};

use super::{Caught, Scheme, retries};

/// The scheme of Azure Blob Storage.
pub static SCHEME: Scheme = Scheme {
    name: "az",
    help: "AZURE_STORAGE_ACCOUNT_NAME names the account; credentials are looked for in AZURE_STORAGE_ACCOUNT_KEY, \
           AZURE_STORAGE_SAS_KEY, the pod's workload identity, AZURE_CLIENT_SECRET and the machine's identity; a public \
           container needs AZURE_SKIP_SIGNATURE=true",
    open,
};

fn open(container: &str, client: Caught) -> object_store::Result<Arc<dyn ObjectStore>> {
    let mut builder = MicrosoftAzureBuilder::from_env()
        .with_container_name(container)
        .with_retry(retries())
        .with_http_connector(client);
    if let Some(endpoint) =
        std::env::var("AZURE_STORAGE_ENDPOINT").ok().filter(|text| !text.trim().is_empty())
    {
        builder = builder.with_config(AzureConfigKey::Endpoint, endpoint).with_allow_http(true);
    }
    Ok(Arc::new(builder.build()?))
}
