//! Servers of a Workspace -> the adapters that they answer with. Each server is queried over HTTP, and only until it
//! has applied the wanted adapters.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;

use crate::workspace::serve::STATUS_PORT;

/// LIMIT: time for an answer.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// LIMIT: bytes of an answer; a server names at most some hundred adapters.
const ANSWER_BYTES_MAX: usize = 1 << 20;
/// Servers of one Workspace that are asked at the same time; a hundred that do not answer take 20 s together.
const CONCURRENCY: usize = 32;

/// A server's statement about its adapters.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Said {
    /// The digest of the file that it read last.
    pub file: String,
    /// The reason why it does not serve that file.
    pub refused: Option<String>,
    /// The adapters that it answers with, for people: `support of h.example/a:1 (sha256:...) at 1`.
    pub parts: Vec<String>,
}

/// The state of a Workspace's adapters.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Adapters {
    /// The Workspace has no adapters.
    #[default]
    None,
    /// Every server answers with these.
    Answer(Vec<String>),
    /// Not every server serves them yet, for this reason.
    Pending(String),
    /// A server refuses them and keeps its earlier adapters.
    Refused(String),
}

/// Answers of servers, by the uid of their pods.
pub type Answers = BTreeMap<String, Result<Said, String>>;

/// Returns a client for requests to servers of the cluster: without proxy, without redirects, with a time limit.
pub fn client() -> reqwest::Client {
    let builder = reqwest::Client::builder().no_proxy().timeout(ANSWER_MAX);
    builder.redirect(reqwest::redirect::Policy::none()).build().unwrap_or_default()
}

/// Asks every pod that is ready.
pub async fn all(client: &reqwest::Client, pods: &[Arc<Pod>]) -> Answers {
    let mut asked = Vec::new();
    for pod in pods.iter().filter(|pod| is_ready(pod)).cloned() {
        let client = client.clone();
        asked.push(async move {
            let uid = pod.metadata.uid.clone().unwrap_or_default();
            (uid, one(&client, &pod).await)
        });
    }
    stream::iter(asked).buffer_unordered(CONCURRENCY).collect().await
}

async fn one(client: &reqwest::Client, pod: &Pod) -> Result<Said, String> {
    let name = pod.metadata.name.clone().unwrap_or_default();
    let status = pod.status.as_ref();
    let address = status.and_then(|status| status.pod_ip.as_deref()?.parse::<IpAddr>().ok());
    let address = address.ok_or_else(|| format!("pod {name} has no address yet"))?;
    // The status port asks for no key, which the controller could not know, because it reads no Secrets.
    let url = format!("http://{}/v1/models", std::net::SocketAddr::new(address, STATUS_PORT as u16));
    let failed = |error: reqwest::Error| format!("pod {name} cannot be queried: {}", error.without_url());
    let mut response = client.get(url).send().await.map_err(failed)?;
    match response.status().as_u16() {
        200 => {}
        status => return Err(format!("pod {name} answers with status {status}")),
    }
    let mut body = Vec::new();
    while let Some(part) = response.chunk().await.map_err(failed)? {
        body.extend_from_slice(&part);
        if body.len() > ANSWER_BYTES_MAX {
            return Err(format!("pod {name} answers with more than {ANSWER_BYTES_MAX} bytes"));
        }
    }
    let models: Value =
        serde_json::from_slice(&body).map_err(|_| format!("pod {name} does not answer in JSON"))?;
    Ok(read(&models))
}

/// Returns the answer of `/v1/models`.
fn read(models: &Value) -> Said {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let file = &models["adapters_file"];
    let default =
        models["data"].as_array().into_iter().flatten().find(|model| model["id"] == models["default"]);
    let parts = default.and_then(|model| model["adapters"].as_array()).into_iter().flatten();
    let part = |part: &Value| {
        let source = text(&part["source"]);
        format!(
            "{} of {} ({}) at {}",
            text(&part["name"]),
            source.strip_prefix("oci://").unwrap_or(&source),
            text(&part["digest"]),
            part["strength"]
        )
    };
    Said {
        file: text(&file["digest"]),
        refused: file["refused"].as_str().map(str::to_owned),
        parts: parts.map(part).collect(),
    }
}

/// Returns the state of the adapters. `file`: the digest of the text that servers should have applied; `pods`: the
/// expected pods.
pub fn stand(answers: &Answers, pods: &[Arc<Pod>], file: &str) -> Adapters {
    let ready: Vec<&Arc<Pod>> = pods.iter().filter(|pod| is_ready(pod)).collect();
    let of = |pod: &Arc<Pod>| answers.get(pod.metadata.uid.as_deref().unwrap_or_default());
    let taken =
        |pod: &&&Arc<Pod>| matches!(of(pod), Some(Ok(said)) if said.file == file && said.refused.is_none());
    let refused = ready
        .iter()
        .filter_map(|pod| of(pod)?.as_ref().ok())
        .find(|said| said.file == file && said.refused.is_some());
    if let Some(why) = refused.and_then(|said| said.refused.clone()) {
        return Adapters::Refused(why);
    }
    let count = ready.iter().filter(taken).count();
    if !ready.is_empty() && count == ready.len() {
        let parts =
            ready.iter().filter_map(|pod| of(pod)?.as_ref().ok()).map(|said| said.parts.clone()).next();
        return Adapters::Answer(parts.unwrap_or_default());
    }
    let trouble = ready.iter().find_map(|pod| of(pod)?.as_ref().err().cloned());
    let told = format!("{count} of {} servers have applied them", ready.len());
    Adapters::Pending(trouble.map_or(told.clone(), |trouble| format!("{told}; {trouble}")))
}

/// Returns whether any server can be asked.
pub fn any_ready(pods: &[Arc<Pod>]) -> bool {
    pods.iter().any(|pod| is_ready(pod))
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    pod.metadata.deletion_timestamp.is_none()
        && conditions.into_iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(uid: &str, ready: bool) -> Arc<Pod> {
        let status = if ready { "True" } else { "False" };
        Arc::new(
            serde_json::from_value(json!({
                "metadata": {"name": uid, "uid": uid},
                "status": {"conditions": [{"type": "Ready", "status": status}]},
            }))
            .unwrap(),
        )
    }

    fn said(file: &str, refused: Option<&str>) -> Result<Said, String> {
        let parts = vec!["support of h/a:1 (sha256:aa) at 0.5".to_owned()];
        Ok(Said { file: file.into(), refused: refused.map(str::to_owned), parts })
    }

    #[test]
    fn an_answer_is_read() {
        let models = json!({
            "data": [
                {"id": "base", "adapters": []},
                {"id": "chat", "adapters": [
                    {"name": "support", "strength": 0.5, "digest": "sha256:aa", "source": "oci://h/a:1"},
                ]},
            ],
            "default": "chat", "adapters_file": {"digest": "sha256:f", "refused": null},
        });
        assert_eq!(Ok(read(&models)), said("sha256:f", None));
        assert_eq!(read(&json!({})), Said::default());
    }

    #[test]
    fn all_that_are_ready_must_have_taken_them() {
        let pods = [pod("one", true), pod("two", true), pod("three", false)];
        let stands = |one, two| {
            let answers = [("one".to_owned(), one), ("two".to_owned(), two)].into();
            stand(&answers, &pods, "new")
        };
        assert_eq!(
            stands(said("new", None), said("new", None)),
            Adapters::Answer(vec!["support of h/a:1 (sha256:aa) at 0.5".into()])
        );
        assert_eq!(
            stands(said("new", None), said("old", None)),
            Adapters::Pending("1 of 2 servers have applied them".into())
        );
        assert_eq!(
            stands(said("new", None), Err("pod two cannot be queried".into())),
            Adapters::Pending("1 of 2 servers have applied them; pod two cannot be queried".into())
        );
        assert_eq!(stands(said("new", None), said("new", Some("no"))), Adapters::Refused("no".into()));
        // A statement about an older file no longer counts.
        assert_eq!(
            stands(said("new", None), said("old", Some("no"))),
            Adapters::Pending("1 of 2 servers have applied them".into())
        );
    }
}
