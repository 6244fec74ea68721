//! The cluster -> whether KAITO's controller is installed, the installed kinds of Karpenter, and whether the API server
//! answers.
//!
//! This is checked at intervals, so that a change is noticed while the controller runs. If a server answers again after
//! it did not, every watch restarts, because a connection may have died silently.

use std::time::Duration;

use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use kube::{Api, Client};
use tokio::sync::watch;

use super::nodes::{self, Provider};

/// KAITO's admission webhook, which is installed with its controller.
const KAITO_WEBHOOK: &str = "validation.workspace.kaito.sh";
/// The pause between two checks.
const INTERVAL: Duration = Duration::from_secs(15);
/// LIMIT: time for an answer.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// Software of the cluster that hone works beside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Presence {
    /// Whether KAITO's admission webhook is installed.
    pub kaito: bool,
    /// The kind of object by which nodes are requested.
    pub provider: Provider,
}

/// Asks the API server which of this software is installed.
///
/// # Errors
/// The errors of the API server, and an error if it takes too long.
pub async fn look(client: &Client) -> kube::Result<Presence> {
    in_time(ANSWER_MAX, async {
        Ok(Presence { kaito: kaito(client).await?, provider: nodes::provider(client).await? })
    })
    .await
}

/// Returns the answer of a request, if it comes in time.
///
/// # Errors
/// The errors of the request, and an error if it took too long.
pub async fn in_time<T>(most: Duration, request: impl Future<Output = kube::Result<T>>) -> kube::Result<T> {
    match tokio::time::timeout(most, request).await {
        Ok(answer) => answer,
        Err(_) => Err(kube::Error::Service(format!("the API server did not answer within {most:?}").into())),
    }
}

async fn kaito(client: &Client) -> kube::Result<bool> {
    let webhooks = Api::<ValidatingWebhookConfiguration>::all(client.clone());
    match webhooks.get_metadata_opt(KAITO_WEBHOOK).await {
        Ok(found) => Ok(found.is_some()),
        // A controller of one namespace has no right to read it. KAITO's finalizer still marks its Workspaces.
        Err(kube::Error::Api(status)) if status.code == 403 => Ok(false),
        Err(error) => Err(error),
    }
}

/// Checks without end. `again` counts how often the server came back.
pub async fn keep(client: &Client, found: &watch::Sender<Presence>, again: &watch::Sender<u64>) {
    let mut answered = true;
    loop {
        tokio::time::sleep(if answered { INTERVAL } else { Duration::from_secs(1) }).await;
        match look(client).await {
            Ok(now) => {
                if !answered {
                    again.send_modify(|count| *count += 1);
                }
                answered = true;
                found.send_if_modified(|before| std::mem::replace(before, now) != now);
            }
            Err(error) => {
                if answered {
                    tracing::warn!(target: "hone", "{error}; it is tried again");
                }
                answered = false;
            }
        }
    }
}
