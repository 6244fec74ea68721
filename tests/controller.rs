//! `hone controller` against an API server: what it makes, what it tells, what it leaves alone.
//!
//! The server is tests/support/api_server.rs; the tests play Job controller and kubelet on it. Where KUBECONFIG names a real
//! cluster, `a_real_cluster_gives_the_same` does there what needs no part played.

#[path = "support/api_server.rs"]
mod api_server;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use api_server::ApiServer;
use hone::controller::{self, Options};
use hone::fault::Kind;
use hone::report::Report;
use hone::workspace::Settings;
use serde_json::{Value, json};

const NAMESPACE: &str = "team";

/// A controller in a thread of its own; it stops with the value.
struct Running {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<hone::fault::Result<()>>>,
}

fn start(config: kube::Config, change: impl FnOnce(&mut Options)) -> Running {
    let mut options = Options {
        namespace: None,
        settings: Settings { image: Some("registry.example.com/hone:1".into()), ..Settings::default() },
        elect: false,
        lease_namespace: "hone-system".into(),
        identity: "one".into(),
        address: "127.0.0.1:0".parse().unwrap(),
    };
    change(&mut options);
    let stop = Arc::new(AtomicBool::new(false));
    let asked = stop.clone();
    let thread = std::thread::spawn(move || {
        hone::source::install_crypto();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let ended = runtime.block_on(async {
            let client = kube::Client::try_from(config).unwrap();
            let stopped = async {
                while !asked.load(Ordering::Relaxed) {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            };
            controller::run_with(client, &options, &Report::silent(), stopped).await
        });
        runtime.shutdown_background();
        ended
    });
    Running { stop, thread: Some(thread) }
}

impl Running {
    fn stop(mut self) -> hone::fault::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(std::thread::panicking() || matches!(ended, Ok(Ok(()))), "{ended:?}");
        }
    }
}

fn controlled() -> (ApiServer, Running) {
    let server = ApiServer::start().without("nodeclaims").without("nodepools");
    let running = start(server.config(), |_| {});
    (server, running)
}

fn workspace(name: &str) -> Value {
    json!({
        "apiVersion": "kaito.sh/v1beta1", "kind": "Workspace", "metadata": {"name": name, "namespace": NAMESPACE},
        "resource": {
            "instanceType": "Standard_NC24ads_A100_v4", "labelSelector": {"matchLabels": {"apps": "tuning"}},
        },
        "tuning": {
            "preset": {"name": "phi-3-mini-4k-instruct"}, "method": "qlora",
            "input": {"urls": ["https://host.example/a.parquet"]},
            "output": {"image": "registry.example.com/adapter:1", "imagePushSecret": "login"},
        },
    })
}

fn job(server: &ApiServer, name: &str) -> Value {
    server.wait("a Job", |server| server.get("jobs", NAMESPACE, name))
}

fn revision(job: &Value) -> String {
    job["metadata"]["annotations"]["workspace.kaito.io/revision"].as_str().unwrap().to_owned()
}

fn state(server: &ApiServer, name: &str, wanted: &str) -> Value {
    server.wait(&format!("{name} {wanted}"), |server| {
        server.get("workspaces", NAMESPACE, name).filter(|workspace| workspace["status"]["state"] == wanted)
    })
}

/// `status reason message` of a condition.
fn condition(workspace: &Value, name: &str) -> String {
    let conditions = workspace["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let found = conditions.iter().find(|condition| condition["type"] == name).cloned().unwrap_or_default();
    format!(
        "{} {} {}",
        found["status"].as_str().unwrap_or_default(),
        found["reason"].as_str().unwrap_or_default(),
        found["message"].as_str().unwrap_or_default()
    )
}

fn annotation(workspace: &Value, name: &str) -> Option<String> {
    workspace["metadata"]["annotations"][format!("hone.sh/{name}")].as_str().map(str::to_owned)
}

/// Waits for a message in a state; a look between two changes may show one without the other.
fn wait_message_in(server: &ApiServer, name: &str, state: &str, part: &str) {
    server.wait(&format!("{name} {state}: {part}"), |server| {
        let workspace = server.get("workspaces", NAMESPACE, name)?;
        let told = condition(&workspace, "WorkspaceSucceeded").contains(part);
        (told && workspace["status"]["state"] == state).then_some(())
    });
}

fn wait_message(server: &ApiServer, name: &str, part: &str) -> Value {
    server.wait(&format!("{name}: {part}"), |server| {
        server
            .get("workspaces", NAMESPACE, name)
            .filter(|workspace| condition(workspace, "WorkspaceSucceeded").contains(part))
    })
}

/// A pod of the Job, with the state of its container, as the kubelet tells it.
fn pod(server: &ApiServer, name: &str, suffix: &str, state: Value) {
    let job = job(server, name);
    server.put("pods", json!({
        "metadata": {
            "name": format!("{name}-{suffix}"), "namespace": NAMESPACE,
            "labels": job["spec"]["template"]["metadata"]["labels"],
            "ownerReferences": [{
                "apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": job["metadata"]["uid"], "controller": true,
            }],
        },
        "spec": {"nodeName": "node-1", "containers": []},
        "status": {"containerStatuses": [{
            "name": name, "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": state,
        }]},
    }));
}

fn ended(code: i32, message: &Value, second: u32) -> Value {
    json!({"terminated": {
        "exitCode": code, "message": format!("{message}\n"), "finishedAt": format!("2026-01-01T01:00:{second:02}Z"),
    }})
}

fn job_status(server: &ApiServer, name: &str, status: Value) {
    server.merge("jobs", NAMESPACE, name, &json!({"status": status}));
}

fn condition_of_job(name: &str) -> Value {
    json!([{"type": name, "status": "True", "reason": "PodFailurePolicy", "message": "matched"}])
}

#[test]
fn a_workspace_becomes_a_job_and_its_end_the_status() {
    let (server, _running) = controlled();
    server.put(
        "nodes",
        json!({
            "metadata": {"name": "node-1", "labels": {"apps": "tuning"}},
            "status": {"conditions": [{"type": "Ready", "status": "True"}]},
        }),
    );
    server.put("workspaces", workspace("w"));
    let made = job(&server, "w");
    let owner = &made["metadata"]["ownerReferences"][0];
    let uid = server.get("workspaces", NAMESPACE, "w").unwrap()["metadata"]["uid"].clone();
    assert_eq!((&owner["uid"], &owner["controller"]), (&uid, &json!(true)));
    assert_eq!(made["spec"]["template"]["spec"]["containers"][0]["image"], "registry.example.com/hone:1");
    assert_eq!(revision(&made), "1");
    assert!(server.get("configmaps", NAMESPACE, "qlora-params-template").is_some());
    let pending = state(&server, "w", "Pending");
    assert!(condition(&pending, "NodesReady").starts_with("True"), "{pending:#}");

    job_status(&server, "w", json!({"active": 1}));
    pod(&server, "w", "a", json!({"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}));
    // Running from the first pod on, as KAITO has it.
    wait_message_in(&server, "w", "Running", "waiting: ImagePullBackOff: no such image");

    server.set_log(
        NAMESPACE,
        "w-a",
        "{\"unit\":\"steps\",\"done\":20,\"total\":90}\n{\"step\":20,\"loss\":1.5,\"eta_seconds\":75.0}\n",
    );
    pod(&server, "w", "a", json!({"running": {"startedAt": "2026-01-01T00:00:00Z"}}));
    let running = wait_message(&server, "w", "step 20 of 90, loss 1.5000, 1m15s left");
    assert_eq!(running["status"]["workerNodes"], json!(["node-1"]));
    server.wait("the step", |server| {
        let workspace = server.get("workspaces", NAMESPACE, "w")?;
        (annotation(&workspace, "step").as_deref() == Some("20 of 90")).then_some(())
    });
    assert!(condition(&running, "JobStarted").starts_with("True WorkspaceTuningJobStatusStarted"));

    let said = json!({"code": 0, "kind": "ok", "step": 90, "loss": 0.75, "image": "h/adapter:1", "digest": "sha256:abc"});
    pod(&server, "w", "a", ended(0, &said, 1));
    job_status(
        &server,
        "w",
        json!({"active": null, "succeeded": 1, "conditions": condition_of_job("Complete")}),
    );
    let done = state(&server, "w", "Succeeded");
    assert_eq!(
        condition(&done, "WorkspaceSucceeded"),
        "True workspaceSucceeded workspace succeeds: pushed h/adapter:1 (sha256:abc); 90 steps, loss 0.7500"
    );
    let done = server.wait("annotations", |server| {
        server.get("workspaces", NAMESPACE, "w").filter(|workspace| annotation(workspace, "digest").is_some())
    });
    assert_eq!((annotation(&done, "eta"), annotation(&done, "exit-code").as_deref()), (None, Some("0")));
    let reasons: Vec<Value> = server.list("events").iter().map(|event| event["reason"].clone()).collect();
    for reason in ["JobCreated", "Pending", "Running", "Succeeded"] {
        assert!(reasons.contains(&json!(reason)), "{reason}: {reasons:?}");
    }
    assert!(!server.requests().iter().any(|request| request.contains("secrets")), "no Secret is read");
}

#[test]
fn a_failure_is_told_and_a_retry_that_succeeds_is_none() {
    let (server, _running) = controlled();
    server.put("workspaces", workspace("w"));
    job(&server, "w");
    let network = json!({"code": 20, "kind": "network", "message": "registry.example.com does not answer"});
    pod(&server, "w", "a", ended(20, &network, 1));
    job_status(&server, "w", json!({"active": 1, "failed": 1}));
    let told = "tried again after 1 failed: exit code 20 (network): registry.example.com does not answer";
    wait_message_in(&server, "w", "Running", told);
    pod(&server, "w", "b", ended(0, &json!({"code": 0, "kind": "ok"}), 2));
    job_status(
        &server,
        "w",
        json!({"active": null, "succeeded": 1, "conditions": condition_of_job("Complete")}),
    );
    state(&server, "w", "Succeeded");

    server.put("workspaces", workspace("v"));
    job(&server, "v");
    let data =
        json!({"code": 11, "kind": "data", "message": "a.parquet: row 3 is empty", "help": "look at it"});
    pod(&server, "v", "a", ended(11, &data, 1));
    job_status(&server, "v", json!({"failed": 1, "conditions": condition_of_job("Failed")}));
    let failed = state(&server, "v", "Failed");
    assert_eq!(
        condition(&failed, "WorkspaceSucceeded"),
        "False workspaceFailed workspace failed: exit code 11 (data): a.parquet: row 3 is empty; look at it"
    );
    assert!(condition(&failed, "JobStarted").starts_with("False WorkspaceTuningJobStatusFailed"));
}

#[test]
fn new_inputs_are_a_new_revision() {
    let (server, _running) = controlled();
    server.put(
        "configmaps",
        json!({
            "metadata": {"name": "mine", "namespace": NAMESPACE},
            "data": {"training_config.yaml": "training_config: {QuantizationConfig: {load_in_4bit: true}}"},
        }),
    );
    let mut wanted = workspace("w");
    wanted["tuning"]["config"] = json!("mine");
    server.put("workspaces", wanted);
    let first = job(&server, "w");
    let again = |wanted: &str| {
        server.wait(&format!("revision {wanted}"), |server| {
            server.get("jobs", NAMESPACE, "w").filter(|job| revision(job) == wanted)
        })
    };
    let other = json!({"tuning": {"input": {"urls": ["https://host.example/b.parquet"]}}});
    server.merge("workspaces", NAMESPACE, "w", &other);
    let second = again("2");
    assert_ne!(first["metadata"]["uid"], second["metadata"]["uid"]);
    assert!(second.to_string().contains("b.parquet"));

    let config = "training_config: {QuantizationConfig: {load_in_4bit: true}, LoraConfig: {r: 16}}";
    server.merge("configmaps", NAMESPACE, "mine", &json!({"data": {"training_config.yaml": config}}));
    again("3");
    assert_eq!(server.list("controllerrevisions").len(), 3);

    // What cannot be done is told, and the Job goes on.
    server.merge(
        "configmaps",
        NAMESPACE,
        "mine",
        &json!({"data": {"training_config.yaml": "training_config: {LoraConfg: {}}"}}),
    );
    wait_message(
        &server,
        "w",
        "the change is not applied: ConfigMap mine:1:19: \"LoraConfg\" is not a section; did you mean LoraConfig?",
    );
    assert_eq!(revision(&job(&server, "w")), "3");
    server.merge("configmaps", NAMESPACE, "mine", &json!({"data": {"training_config.yaml": config}}));
    server.wait("the message gone", |server| {
        let workspace = server.get("workspaces", NAMESPACE, "w")?;
        (!condition(&workspace, "WorkspaceSucceeded").contains("not applied")).then_some(())
    });
    // KAITO's webhook refuses this; without one, the controller does.
    server.merge("workspaces", NAMESPACE, "w", &json!({"tuning": {"preset": {"name": "phi-4"}}}));
    wait_message(
        &server,
        "w",
        "the change is not applied: tuning.preset: cannot be changed; make another Workspace",
    );
    assert_eq!(revision(&job(&server, "w")), "3");
}

#[test]
fn a_mistake_is_a_failure_until_it_is_mended() {
    let (server, _running) = controlled();
    let mut wanted = workspace("w");
    wanted["tuning"]["preset"]["name"] = json!("phi-3-mini-4k-instrct");
    wanted["tuning"]["output"]["imagePushSecret"] = json!("");
    server.put("workspaces", wanted);
    let failed = state(&server, "w", "Failed");
    let told = condition(&failed, "WorkspaceSucceeded");
    assert!(
        told.contains("did you mean phi-3-mini-4k-instruct?") && told.contains("imagePushSecret: missing"),
        "{told}"
    );
    assert!(server.list("jobs").is_empty());
    server.merge("workspaces", NAMESPACE, "w", &json!({"tuning": workspace("w")["tuning"]}));
    job(&server, "w");
    state(&server, "w", "Pending");

    let mut wanted = workspace("v");
    wanted["tuning"]["config"] = json!("later");
    server.put("workspaces", wanted);
    wait_message(&server, "v", "there is no ConfigMap later in namespace team");
    server.put(
        "configmaps",
        json!({
            "metadata": {"name": "later", "namespace": NAMESPACE},
            "data": {"training_config.yaml": "training_config: {QuantizationConfig: {load_in_4bit: true}}"},
        }),
    );
    job(&server, "v");
}

#[test]
fn what_belongs_to_others_is_left_alone() {
    let (server, _running) = controlled();
    let mut serves = workspace("serves");
    serves["inference"] = json!({"preset": {"name": "phi-4"}});
    serves.as_object_mut().unwrap().remove("tuning");
    let mut kaitos = workspace("kaitos");
    kaitos["metadata"]["finalizers"] = json!(["workspace.finalizer.kaito.sh"]);
    let mut ignored = workspace("ignored");
    ignored["metadata"]["annotations"] = json!({"hone.sh/ignore": "true"});
    for other in [serves, kaitos, ignored] {
        server.put("workspaces", other);
    }
    let foreign = json!({"metadata": {"name": "taken", "namespace": NAMESPACE}, "spec": {"template": {}}});
    server.put("jobs", foreign);
    server.put("workspaces", workspace("taken"));
    wait_message(&server, "taken", "Job taken is not of this Workspace");
    server.put("workspaces", workspace("last"));
    job(&server, "last");
    for name in ["serves", "kaitos", "ignored"] {
        let workspace = server.get("workspaces", NAMESPACE, name).unwrap();
        assert!(workspace["status"].is_null(), "{workspace:#}");
        assert!(server.get("jobs", NAMESPACE, name).is_none());
    }
    assert!(server.get("jobs", NAMESPACE, "taken").unwrap()["metadata"]["labels"].is_null());
}

#[test]
fn nothing_is_done_where_kaitos_controller_is() {
    let server = ApiServer::start().without("nodeclaims").without("nodepools");
    server.put(
        "validatingwebhookconfigurations",
        json!({"metadata": {"name": "validation.workspace.kaito.sh"}}),
    );
    let running = start(server.config(), |_| {});
    server.put("workspaces", workspace("w"));
    server.wait("the watch", |server| {
        server.requests().contains(&"GET /apis/kaito.sh/v1beta1/workspaces".into()).then_some(())
    });
    running.stop().unwrap();
    assert!(
        server.list("jobs").is_empty()
            && server.get("workspaces", NAMESPACE, "w").unwrap()["status"].is_null()
    );
}

#[test]
fn conflicts_and_expired_watches_are_gone_through() {
    let (server, _running) = controlled();
    server.fail_next("PATCH", "workspaces", 409, 2);
    server.fail_next("PATCH", "jobs", 409, 1);
    server.put("workspaces", workspace("w"));
    job(&server, "w");
    state(&server, "w", "Pending");
    server.expire_watches();
    server.put("workspaces", workspace("v"));
    job(&server, "v");
    state(&server, "v", "Pending");
}

#[test]
fn a_job_that_is_gone_after_its_end_is_not_done_again() {
    let (server, _running) = controlled();
    server.put("workspaces", workspace("w"));
    job(&server, "w");
    job_status(&server, "w", json!({"succeeded": 1, "conditions": condition_of_job("Complete")}));
    state(&server, "w", "Succeeded");
    let made = || {
        server
            .requests()
            .iter()
            .filter(|request| *request == "PATCH /apis/batch/v1/namespaces/team/jobs/w")
            .count()
    };
    let before = made();
    server.delete("jobs", NAMESPACE, "w", "background");
    assert!(server.get("jobs", NAMESPACE, "w").is_none());
    // A look that comes after the deletion: the annotation of another is a change.
    server.merge("workspaces", NAMESPACE, "w", &json!({"metadata": {"annotations": {"other/note": "x"}}}));
    server.put("workspaces", workspace("v"));
    job(&server, "v");
    assert_eq!(made(), before);
    assert_eq!(server.get("workspaces", NAMESPACE, "w").unwrap()["status"]["state"], "Succeeded");
}

/// By its time to live, which deletes in the foreground, and by a person in both ways.
#[test]
fn what_is_over_stays_over_however_its_job_goes() {
    let (server, _running) = controlled();
    for (name, ttl) in [("ttl", Some("1s")), ("foreground", None), ("background", None)] {
        let mut wanted = workspace(name);
        if let Some(ttl) = ttl {
            wanted["metadata"]["annotations"] = json!({"hone.sh/ttl": ttl});
        }
        server.put("workspaces", wanted);
        let uid = job(&server, name)["metadata"]["uid"].clone();
        job_status(&server, name, json!({"succeeded": 1, "conditions": condition_of_job("Complete")}));
        state(&server, name, "Succeeded");
        if ttl.is_none() {
            server.delete("jobs", NAMESPACE, name, name);
        }
        server.wait("no Job", |server| server.get("jobs", NAMESPACE, name).is_none().then_some(()));
        for _ in 0..30 {
            std::thread::sleep(Duration::from_millis(100));
            let again = server.get("jobs", NAMESPACE, name);
            assert!(again.is_none_or(|job| job["metadata"]["uid"] == uid), "{name} is trained again");
            assert_eq!(server.get("workspaces", NAMESPACE, name).unwrap()["status"]["state"], "Succeeded");
        }
    }
}

#[test]
fn a_node_is_asked_for_and_given_back() {
    let server = ApiServer::start();
    let _running = start(server.config(), |_| {});
    server.put("workspaces", workspace("w"));
    let claim = server.wait("a NodeClaim", |server| server.list("nodeclaims").into_iter().next());
    let name = claim["metadata"]["name"].as_str().unwrap().to_owned();
    assert!(name.starts_with("ws") && name.len() == 11, "{name}");
    assert_eq!(claim["spec"]["taints"], json!([{"key": "sku", "value": "gpu", "effect": "NoSchedule"}]));
    assert_eq!(claim["spec"]["resources"]["requests"]["ephemeral-storage"], "1024Gi");
    assert_eq!(claim["metadata"]["labels"]["karpenter.sh/nodepool"], "kaito");
    assert_eq!(claim["metadata"]["labels"]["apps"], "tuning", "what the pod's affinity looks for");
    assert!(claim["spec"]["requirements"].to_string().contains("Standard_NC24ads_A100_v4"));
    let ready = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}});
    server.merge("nodeclaims", "", &name, &ready);
    server.merge("workspaces", NAMESPACE, "w", &json!({"metadata": {"annotations": {"other/note": "x"}}}));
    server.wait("NodeClaimReady", |server| {
        let workspace = server.get("workspaces", NAMESPACE, "w")?;
        condition(&workspace, "NodeClaimReady").starts_with("True").then_some(())
    });
    let finalizers = |server: &ApiServer| {
        server.get("workspaces", NAMESPACE, "w").map(|w| w["metadata"]["finalizers"].clone())
    };
    assert_eq!(finalizers(&server), Some(json!(["hone.sh/nodes"])));
    job_status(&server, "w", json!({"succeeded": 1, "conditions": condition_of_job("Complete")}));
    server.wait("no NodeClaim", |server| server.list("nodeclaims").is_empty().then_some(()));
    state(&server, "w", "Succeeded");
    server.wait("no finalizer", |server| (finalizers(server)? == json!([])).then_some(()));

    server.put("workspaces", workspace("v"));
    server.wait("a NodeClaim", |server| server.list("nodeclaims").into_iter().next());
    job(&server, "v");
    server.wait("its finalizer", |server| {
        let workspace = server.get("workspaces", NAMESPACE, "v")?;
        (workspace["metadata"]["finalizers"] == json!(["hone.sh/nodes"])).then_some(())
    });
    server.delete("workspaces", NAMESPACE, "v", "background");
    server.wait("all gone", |server| {
        let gone = server.get("workspaces", NAMESPACE, "v").is_none()
            && server.get("jobs", NAMESPACE, "v").is_none();
        (gone && server.list("nodeclaims").is_empty()).then_some(())
    });
}

#[test]
fn fifty_workspaces() {
    let (server, _running) = controlled();
    for number in 0..50 {
        server.put("workspaces", workspace(&format!("w{number}")));
    }
    server.wait("fifty Jobs", |server| (server.list("jobs").len() == 50).then_some(()));
    server.wait("fifty states", |server| {
        server
            .list("workspaces")
            .iter()
            .all(|workspace| workspace["status"]["state"] == "Pending")
            .then_some(())
    });
    // Nothing changes any more, so nothing is written any more.
    let quiet = || server.requests().iter().filter(|request| request.starts_with("PATCH")).count();
    server.wait("rest", |_| {
        let before = quiet();
        std::thread::sleep(Duration::from_millis(300));
        (quiet() == before).then_some(())
    });
    assert!(quiet() <= 50 * 5, "{} writes for 50 Workspaces", quiet());
}

#[test]
fn one_leads_and_the_next_takes_over() {
    let server = ApiServer::start().without("nodeclaims").without("nodepools");
    let elect = |identity: &'static str| {
        move |options: &mut Options| {
            options.elect = true;
            options.identity = identity.into();
        }
    };
    let holder = |server: &ApiServer| {
        let lease = server.get("leases", "hone-system", "hone-controller")?;
        Some(lease["spec"]["holderIdentity"].as_str().unwrap_or_default().to_owned())
    };
    let first = start(server.config(), elect("one"));
    server.wait("one leads", |server| (holder(server)? == "one").then_some(()));
    let _second = start(server.config(), elect("two"));
    server.put("workspaces", workspace("w"));
    job(&server, "w");
    assert_eq!(holder(&server).as_deref(), Some("one"));
    first.stop().unwrap();
    server.wait("two leads", |server| (holder(server)? == "two").then_some(()));
    server.put("workspaces", workspace("v"));
    job(&server, "v");

    // Who finds another's name in the Lease stops, so that two never lead.
    let third = start(server.config(), elect("three"));
    drop(_second);
    server.wait("three leads", |server| (holder(server)? == "three").then_some(()));
    server.merge("leases", "hone-system", "hone-controller", &json!({"spec": {"holderIdentity": "four"}}));
    let ended = {
        let mut third = third;
        third.thread.take().unwrap().join().unwrap()
    };
    assert_eq!(ended.unwrap_err().kind, Kind::Interrupted);
}

/// With KUBECONFIG: a Workspace with a mistake, mended, run suspended, and deleted, in a namespace of its own.
#[test]
fn a_real_cluster_gives_the_same() {
    if std::env::var_os("KUBECONFIG").is_none() {
        eprintln!("KUBECONFIG is not set: no real cluster to ask");
        return;
    }
    real::run();
}

mod real {
    use super::*;
    use kube::api::{Api, DeleteParams, DynamicObject, Patch, PatchParams, PostParams};
    use kube::core::{ApiResource, GroupVersionKind};

    pub fn run() {
        hone::source::install_crypto();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let config = kube::Config::infer().await.unwrap();
            let client = kube::Client::try_from(config.clone()).unwrap();
            let namespace = format!("hone-test-{}", std::process::id());
            apply(
                &client,
                "apiextensions.k8s.io",
                "v1",
                "CustomResourceDefinition",
                hone::workspace::crd::definition(),
            )
            .await;
            let space = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}});
            apply(&client, "", "v1", "Namespace", space).await;
            let only = namespace.clone();
            let running = start(config, |options| options.namespace = Some(only));
            let outcome = tokio::time::timeout(Duration::from_secs(120), story(&client, &namespace)).await;
            let namespaces = Api::<DynamicObject>::all_with(client, &resource("", "v1", "Namespace"));
            namespaces.delete(&namespace, &DeleteParams::default()).await.unwrap();
            outcome.expect("within two minutes");
            drop(running);
        });
    }

    async fn story(client: &kube::Client, namespace: &str) {
        let workspaces = api(client, namespace, "kaito.sh", "v1beta1", "Workspace");
        let jobs = api(client, namespace, "batch", "v1", "Job");
        let mut wanted = workspace("w");
        wanted["metadata"] = json!({"name": "w", "annotations": {"hone.sh/queue-name": "nobody"}});
        wanted["tuning"]["preset"]["name"] = json!("phi-3-mini-4k-instrct");
        let wrong: DynamicObject = serde_json::from_value(wanted).unwrap();
        workspaces.create(&PostParams::default(), &wrong).await.unwrap();
        until(&workspaces, "w", |found| found.data["status"]["state"] == "Failed").await;
        let mended = json!({"tuning": {"preset": {"name": "phi-3-mini-4k-instruct"}}});
        workspaces.patch("w", &PatchParams::default(), &Patch::Merge(&mended)).await.unwrap();
        until(&jobs, "w", |job| job.data["spec"]["suspend"] == true).await;
        until(&workspaces, "w", |found| found.data["status"]["state"] == "Pending").await;
        workspaces.delete("w", &DeleteParams::default()).await.unwrap();
        while jobs.get_opt("w").await.unwrap().is_some() {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    async fn until(api: &Api<DynamicObject>, name: &str, holds: impl Fn(&DynamicObject) -> bool) {
        while !api.get_opt(name).await.unwrap().is_some_and(|object| holds(&object)) {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    async fn apply(client: &kube::Client, group: &str, version: &str, kind: &str, object: Value) {
        let api = Api::<DynamicObject>::all_with(client.clone(), &resource(group, version, kind));
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        api.patch(&name, &PatchParams::apply("hone-test").force(), &Patch::Apply(&object)).await.unwrap();
    }

    fn api(
        client: &kube::Client,
        namespace: &str,
        group: &str,
        version: &str,
        kind: &str,
    ) -> Api<DynamicObject> {
        Api::namespaced_with(client.clone(), namespace, &resource(group, version, kind))
    }

    fn resource(group: &str, version: &str, kind: &str) -> ApiResource {
        ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind))
    }
}
