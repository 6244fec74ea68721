//! Status changes -> Events of the Workspace; Warnings about a pod or a Job -> the reason why it does not go on.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Event as CoreEvent;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::api::{Api, ListParams, PostParams};
use kube::{Client, Resource};

use super::FIELD_MANAGER;
use super::words::plain;
use crate::workspace::Workspace;

/// LIMIT: of the API server, in bytes.
const NOTE_BYTES_MAX: usize = 1024;
/// LIMIT: of the API server, in bytes.
const INSTANCE_BYTES_MAX: usize = 128;
/// LIMIT: Warnings of one object that are read.
const WARNINGS_MAX: u32 = 50;
/// The age after which a Warning is out of date; the kubelet repeats its own every two minutes.
const WARNING_AGE_MAX: Duration = Duration::from_secs(10 * 60);

/// The seriousness of an Event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weight {
    /// Progress.
    Normal,
    /// Trouble that somebody may have to look at.
    Warning,
}

/// Writes Events in the name of this process.
pub struct Recorder {
    client: Client,
    identity: String,
}

impl Recorder {
    /// Returns a recorder that writes Events through `client` and names `identity` as the reporting instance.
    pub fn new(client: Client, identity: &str) -> Recorder {
        Recorder { client, identity: plain(identity, INSTANCE_BYTES_MAX) }
    }

    /// Writes an Event. An Event that cannot be written is no reason to fail. Each has a name of its own, so that none
    /// shows an older note.
    pub async fn tell(&self, workspace: &Workspace, weight: Weight, reason: &str, note: &str) {
        let now = Timestamp::now();
        let event = Event {
            metadata: ObjectMeta {
                name: Some(format!("{}.{:x}", workspace.name(), now.as_nanosecond())),
                namespace: Some(workspace.namespace().into()),
                ..ObjectMeta::default()
            },
            event_time: Some(MicroTime(now)),
            type_: Some(if weight == Weight::Warning { "Warning" } else { "Normal" }.into()),
            reason: Some(reason.into()),
            action: Some("Reconcile".into()),
            note: Some(plain(note, NOTE_BYTES_MAX)),
            regarding: Some(workspace.object_ref(&())),
            reporting_controller: Some(FIELD_MANAGER.into()),
            reporting_instance: Some(self.identity.clone()),
            ..Event::default()
        };
        let api = Api::<Event>::namespaced(self.client.clone(), workspace.namespace());
        if let Err(error) = api.create(&PostParams::default(), &event).await {
            tracing::warn!(target: "hone", "event {reason} of Workspace {}: {error}", workspace.name());
        }
    }
}

/// Returns the newest Warning about an object, as `Reason: message`. `passed_over`: reasons that are reported in
/// another way.
///
/// # Errors
/// The errors of the API server; a controller without the right to list Events gets none.
pub async fn newest_warning(
    client: &Client,
    namespace: &str,
    uid: &str,
    passed_over: &[&str],
) -> kube::Result<Option<String>> {
    let api = Api::<CoreEvent>::namespaced(client.clone(), namespace);
    let parameters =
        ListParams::default().fields(&format!("involvedObject.uid={uid},type=Warning")).limit(WARNINGS_MAX);
    let list = match api.list(&parameters).await {
        Err(kube::Error::Api(status)) if status.code == 403 => return Ok(None),
        other => other?.items,
    };
    let oldest = Timestamp::now() - SignedDuration::try_from(WARNING_AGE_MAX).expect("minutes");
    let newest = list
        .into_iter()
        .filter(|event| {
            !passed_over.contains(&event.reason.as_deref().unwrap_or_default())
                && time(event).is_none_or(|time| time >= oldest)
        })
        .max_by_key(time);
    Ok(newest.map(|event| {
        let text = |text: Option<String>| text.unwrap_or_default();
        format!("{}: {}", text(event.reason), text(event.message))
    }))
}

/// Returns the end of a Job that is gone, from the Events that its controller left.
///
/// # Errors
/// The errors of the API server.
pub async fn end_of_job(
    client: &Client,
    namespace: &str,
    name: &str,
    since: Option<Timestamp>,
) -> kube::Result<Option<(bool, String)>> {
    let api = Api::<CoreEvent>::namespaced(client.clone(), namespace);
    let parameters = ListParams::default()
        .fields(&format!("involvedObject.kind=Job,involvedObject.name={name}"))
        .limit(WARNINGS_MAX);
    let list = match api.list(&parameters).await {
        Err(kube::Error::Api(status)) if status.code == 403 => return Ok(None),
        other => other?.items,
    };
    /// The reasons of Kubernetes for a failed Job.
    const GIVEN_UP: [&str; 4] =
        ["BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy", "FailedIndexes"];
    let ends = list.into_iter().filter(|event| time(event).is_some_and(|time| Some(time) >= since));
    let newest = ends
        .filter(|event| {
            let reason = event.reason.as_deref().unwrap_or_default();
            reason == "Completed" || GIVEN_UP.contains(&reason)
        })
        .max_by_key(time);
    Ok(newest.map(|event| {
        let reason = event.reason.unwrap_or_default();
        (reason == "Completed", format!("{reason}: {}", event.message.unwrap_or_default()))
    }))
}

/// Returns the time of the last occurrence.
fn time(event: &CoreEvent) -> Option<Timestamp> {
    let series =
        event.series.as_ref().and_then(|series| series.last_observed_time.as_ref()).map(|time| time.0);
    series
        .or(event.last_timestamp.as_ref().map(|time| time.0))
        .or(event.event_time.as_ref().map(|time| time.0))
        .or(event.metadata.creation_timestamp.as_ref().map(|time| time.0))
}
