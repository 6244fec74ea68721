//! `hone controller` against an API server: the objects that it creates, its reports, and the objects that it leaves
//! alone.
//!
//! The server is tests/support/api_server.rs; the tests play Job controller and kubelet on it. If KUBECONFIG names a
//! real cluster, `a_real_cluster_gives_the_same` repeats there the parts that need no acting.

#[path = "support/api_server.rs"]
mod api_server;
#[path = "controller/several.rs"]
mod several;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

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
        webhook: None,
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

/// Returns `status reason message` of a condition.
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

/// Writes a pod of the Job, with the state of its container, as the kubelet reports it.
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
    server.wait("three revisions", |server| (server.list("controllerrevisions").len() == 3).then_some(()));

    // An impossible change is reported, and the Job goes on.
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
    serves["inference"] = json!({"template": {"spec": {}}});
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
    server.fail_next("POST", "jobs", 409, 1);
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
            .filter(|request| *request == "POST /apis/batch/v1/namespaces/team/jobs")
            .count()
    };
    let before = made();
    server.delete("jobs", NAMESPACE, "w", "background");
    assert!(server.get("jobs", NAMESPACE, "w").is_none());
    // A look that comes after the deletion: the annotation of another is a change.
    server.merge("workspaces", NAMESPACE, "w", &json!({"metadata": {"annotations": {"other/note": "x"}}}));
    server.put("workspaces", workspace("v"));
    job(&server, "v");
    assert_eq!(made(), before + 1, "the Job of v alone");
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

    // A controller that finds another's name in the Lease stops, so that two never lead.
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

/// An API server that was away, and one that stands still.
#[test]
fn seconds_after_the_server_is_back_new_workspaces_are_seen() {
    let (server, _running) = controlled();
    server.put("workspaces", workspace("before"));
    job(&server, "before");
    server.go_down();
    std::thread::sleep(Duration::from_secs(3));
    server.come_up();
    server.put("workspaces", workspace("after"));
    let begun = Instant::now();
    job(&server, "after");
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    server.hang(true);
    std::thread::sleep(Duration::from_secs(1));
    server.hang(false);
    server.put("workspaces", workspace("last"));
    job(&server, "last");
    server.fail_next("WATCH", "workspaces", 503, 3);
    server.expire_watches();
    server.put("workspaces", workspace("again"));
    job(&server, "again");
}

/// The lead is given up in time, and the reason is the true one.
#[test]
fn a_leader_whose_server_hangs_stops_and_says_why() {
    let server = ApiServer::start().without("nodeclaims").without("nodepools");
    let mut running = start(server.config(), |options| options.elect = true);
    server.put("workspaces", workspace("w"));
    job(&server, "w");
    server.hang(true);
    let begun = Instant::now();
    let ended = running.thread.take().unwrap().join().unwrap().unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(15), "its Lease runs out: {:?}", begun.elapsed());
    assert_eq!(
        (ended.kind, ended.message.as_str()),
        (Kind::Interrupted, "the leader's Lease could not be renewed for 10 s")
    );
}

/// Requests `/readyz` of a running controller.
fn readyz(address: std::net::SocketAddr) -> String {
    read(address, "/readyz")
}

/// Returns the answers of a running controller to GET.
fn read(address: std::net::SocketAddr, path: &str) -> String {
    use std::io::{Read, Write};
    let mut text = String::new();
    let Ok(mut stream) = std::net::TcpStream::connect(address) else { return text };
    write!(stream, "GET {path} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n").unwrap();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn readyz_knows_whether_workspaces_can_be_listed() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let server = ApiServer::start().without("nodeclaims").without("nodepools");
    let _running = start(server.config(), |options| options.address = free);
    server.wait("ready", |_| readyz(free).starts_with("HTTP/1.1 200").then_some(()));
    server.deny("LIST", "workspaces", true);
    server.wait("not ready", |_| readyz(free).contains("workspaces cannot be watched").then_some(()));
    server.deny("LIST", "workspaces", false);
    server.wait("ready again", |_| readyz(free).starts_with("HTTP/1.1 200").then_some(()));
}

/// Every refusal of a Job by the API server is in the status and an Event, and mending its cause is enough.
#[test]
fn what_the_server_refuses_is_told_and_can_be_mended() {
    let (server, _running) = controlled();
    server.deny("POST", "jobs", true);
    server.put("workspaces", workspace("w"));
    wait_message_in(&server, "w", "Failed", "the API server refuses it: jobs is forbidden");
    assert!(server.list("controllerrevisions").is_empty(), "nothing was made, nothing is written down");
    server.wait("its Event", |server| {
        let told = |event: &Value| event["note"].to_string().contains("jobs is forbidden");
        server.list("events").iter().any(told).then_some(())
    });
    // The selector may be changed, since no Job was ever made from the first one.
    let other = json!({"resource": {"labelSelector": {"matchLabels": {"apps": "others"}}}});
    server.merge("workspaces", NAMESPACE, "w", &other);
    server.deny("POST", "jobs", false);
    job(&server, "w");
    state(&server, "w", "Pending");

    // A Job that runs goes on while what would come after it is refused.
    let mut wanted = workspace("v");
    wanted["tuning"]["output"] =
        json!({"volumeSource": {"csi": {"driver": "d", "nodePublishSecretRef": {"name": "s"}}}});
    server.put("workspaces", wanted);
    let first = job(&server, "v");
    server.fail_next("POST", "jobs", 403, u32::MAX);
    let change = json!({"tuning": {"input": {"urls": ["https://host.example/b.parquet"]}}});
    server.merge("workspaces", NAMESPACE, "v", &change);
    wait_message(&server, "v", "the change is not applied: the API server refuses it: jobs is forbidden");
    assert_eq!(job(&server, "v")["metadata"]["uid"], first["metadata"]["uid"]);
}

/// Label syntax, users and names that the API server would refuse are reported before a request.
#[test]
fn mistakes_of_syntax_are_told_in_one_line() {
    let (server, _running) = controlled();
    let mut wanted = workspace("w");
    wanted["resource"]["labelSelector"]["matchLabels"] = json!({"a b": "c", "d": "bad value!"});
    wanted["metadata"]["annotations"] =
        json!({"hone.sh/run-as-user": "99999999999", "hone.sh/queue-name": "q".repeat(80)});
    server.put("workspaces", wanted);
    let failed = state(&server, "w", "Failed");
    let told = condition(&failed, "WorkspaceSucceeded");
    assert!(told.contains("hone.sh/run-as-user") && told.contains("hone.sh/queue-name"), "{told}");
    assert!(!told.contains('\n') && !told.contains("\\n") && !told.contains("hone plan"), "{told}");
    server.merge("workspaces", NAMESPACE, "w", &json!({"metadata": {"annotations": null}}));
    wait_message(&server, "w", "\"bad value!\"");
    let told = wait_message(&server, "w", "\"a b\"");
    let said = condition(&told, "WorkspaceSucceeded");
    assert!(said.contains("2 mistakes in the Workspace: resource.labelSelector"), "{said}");
}

/// Reasons that only Events have.
#[test]
fn a_pod_that_cannot_be_made_or_mounted_says_why() {
    let (server, _running) = controlled();
    let warning = |about: &Value, kind: &str, reason: &str, message: &str| {
        server.put("events", json!({
            "metadata": {"name": format!("{reason}.1"), "namespace": NAMESPACE}, "type": "Warning", "reason": reason,
            "lastTimestamp": jiff::Timestamp::now().to_string(), "note": message, "regarding": {"kind": kind, "name": about["metadata"]["name"], "uid": about["metadata"]["uid"]},
        }));
    };
    server.put("workspaces", workspace("quota"));
    warning(
        &job(&server, "quota"),
        "Job",
        "FailedCreate",
        "pods \"quota-x\" is forbidden: exceeded quota: gpus",
    );
    wait_message_in(
        &server,
        "quota",
        "Pending",
        "waiting: FailedCreate: pods \"quota-x\" is forbidden: exceeded quota",
    );

    server.put("workspaces", workspace("mount"));
    job(&server, "mount");
    job_status(&server, "mount", json!({"active": 1}));
    pod(&server, "mount", "a", json!({"waiting": {"reason": "ContainerCreating"}}));
    let made = server.get("pods", NAMESPACE, "mount-a").unwrap();
    warning(&made, "Pod", "FailedMount", "MountVolume.SetUp failed: secret \"login\" not found");
    wait_message_in(
        &server,
        "mount",
        "Running",
        "waiting: FailedMount: MountVolume.SetUp failed: secret \"login\" not found",
    );
    pod(&server, "mount", "a", json!({"running": {"startedAt": "2026-01-01T00:00:00Z"}}));
    server.wait("no longer", |server| {
        let workspace = server.get("workspaces", NAMESPACE, "mount")?;
        (!condition(&workspace, "WorkspaceSucceeded").contains("FailedMount")).then_some(())
    });
}

/// Claims that are gone, that are being deleted, and that must be replaced.
#[test]
fn a_node_that_is_gone_is_asked_for_again() {
    let server = ApiServer::start();
    let _running = start(server.config(), |_| {});
    server.put("workspaces", workspace("w"));
    let alive = |server: &ApiServer| -> Vec<Value> {
        let claims = server.list("nodeclaims").into_iter();
        claims.filter(|claim| claim["metadata"]["deletionTimestamp"].is_null()).collect()
    };
    let one = || {
        server.wait("one claim", |server| match alive(server).as_slice() {
            [claim] => Some(claim["metadata"]["name"].as_str().unwrap().to_owned()),
            _ => None,
        })
    };
    let first = one();
    job(&server, "w");
    // Karpenter deletes one that it could not launch.
    server.delete("nodeclaims", "", &first, "background");
    assert_eq!(one(), first, "the name is free again");
    // One that is held by Karpenter's finalizer is no node.
    server.merge(
        "nodeclaims",
        "",
        &first,
        &json!({"metadata": {"finalizers": ["karpenter.sh/termination"]}}),
    );
    server.delete("nodeclaims", "", &first, "background");
    let second = server.wait("another", |server| {
        let claim = alive(server).into_iter().next()?;
        Some(claim["metadata"]["name"].as_str().unwrap().to_owned()).filter(|name| *name != first)
    });
    server.release("nodeclaims", "", &first, "karpenter.sh/termination");
    // A claim's spec cannot be changed: another class is another claim.
    server.merge(
        "workspaces",
        NAMESPACE,
        "w",
        &json!({"metadata": {"annotations": {"hone.sh/node-class": "other"}}}),
    );
    server.wait("the other class", |server| match alive(server).as_slice() {
        [claim] => (claim["spec"]["nodeClassRef"]["name"] == "other"
            && claim["metadata"]["name"] != second.as_str())
        .then_some(()),
        _ => None,
    });
    server.wait("revision 2", |server| {
        server.get("jobs", NAMESPACE, "w").filter(|job| revision(job) == "2").map(|_| ())
    });
    job_status(&server, "w", json!({"failed": 1, "conditions": condition_of_job("Failed")}));
    server.wait("given back", |server| alive(server).is_empty().then_some(()));
    let failed = state(&server, "w", "Failed");
    server.wait("nothing stale", |server| {
        let workspace = server.get("workspaces", NAMESPACE, "w")?;
        (condition(&workspace, "NodeClaimReady").trim().is_empty()).then_some(())
    });
    drop(failed);
}

/// A node is asked for once the Job or the servers are there, and given back when nothing can go on.
#[test]
fn what_is_refused_costs_no_node() {
    let server = ApiServer::start();
    let _running = start(server.config(), |_| {});
    server.deny("POST", "jobs", true);
    server.deny("PATCH", "statefulsets", true);
    server.put("workspaces", workspace("w"));
    server.put("workspaces", serving("chat", json!([])));
    wait_message_in(&server, "w", "Failed", "jobs is forbidden");
    wait_message(&server, "chat", "statefulsets is forbidden");
    assert!(!server.requests().contains(&"POST /apis/karpenter.sh/v1/nodeclaims".into()));
    server.deny("POST", "jobs", false);
    server.deny("PATCH", "statefulsets", false);
    server.wait("two claims", |server| (server.list("nodeclaims").len() == 2).then_some(()));
    // Nobody can make the Job again: its node goes.
    server.deny("POST", "jobs", true);
    server.delete("jobs", NAMESPACE, "w", "background");
    server.wait("one claim", |server| {
        let claims = server.list("nodeclaims");
        (claims.len() == 1 && claims[0]["metadata"]["labels"]["kaito.sh/workspace"] == "chat").then_some(())
    });
}

/// Karpenter and KAITO are installed and removed while the controller runs.
#[test]
fn who_else_is_there_is_noticed() {
    let server = ApiServer::start().without("nodeclaims").without("nodepools");
    server.put(
        "validatingwebhookconfigurations",
        json!({"metadata": {"name": "validation.workspace.kaito.sh"}}),
    );
    let _running = start(server.config(), |_| {});
    server.put("workspaces", workspace("w"));
    std::thread::sleep(Duration::from_secs(1));
    assert!(server.list("jobs").is_empty());
    server.delete("validatingwebhookconfigurations", "", "validation.workspace.kaito.sh", "background");
    server.install("nodeclaims", true);
    job(&server, "w");
    server.wait("a NodeClaim", |server| server.list("nodeclaims").into_iter().next());
    server.install("nodeclaims", false);
    server.put("workspaces", workspace("v"));
    job(&server, "v");
}

/// A Job of somebody else blocks the name until it is gone.
#[test]
fn a_foreign_job_that_goes_frees_the_name() {
    let (server, _running) = controlled();
    server.put(
        "jobs",
        json!({"metadata": {"name": "taken", "namespace": NAMESPACE}, "spec": {"template": {}}}),
    );
    server.put("workspaces", workspace("taken"));
    wait_message(&server, "taken", "Job taken is not of this Workspace");
    server.delete("jobs", NAMESPACE, "taken", "background");
    server.wait("ours", |server| {
        let job = server.get("jobs", NAMESPACE, "taken")?;
        (job["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "hone").then_some(())
    });
    state(&server, "taken", "Pending");
}

/// Between two states, the status neither flickers nor has a wrong message.
#[test]
fn states_do_not_flicker() {
    let (server, _running) = controlled();
    server.put("workspaces", workspace("w"));
    job(&server, "w");
    job_status(&server, "w", json!({"active": 1}));
    pod(&server, "w", "a", json!({"running": {"startedAt": "2026-01-01T00:00:00Z"}}));
    state(&server, "w", "Running");
    // Evicted: no retry is counted, and for a moment there is no pod.
    server.delete("pods", NAMESPACE, "w-a", "background");
    job_status(&server, "w", json!({"active": 0, "terminating": 0}));
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(server.get("workspaces", NAMESPACE, "w").unwrap()["status"]["state"], "Running");
    // Its last pod has ended well, and the Job is not Complete yet.
    pod(&server, "w", "b", ended(0, &json!({"code": 0, "kind": "ok"}), 2));
    server.wait("its exit code", |server| {
        let workspace = server.get("workspaces", NAMESPACE, "w")?;
        (annotation(&workspace, "exit-code").as_deref() == Some("0")).then_some(())
    });
    let told = condition(&server.get("workspaces", NAMESPACE, "w").unwrap(), "WorkspaceSucceeded");
    assert!(!told.contains("tried again"), "{told}");
    let pendings = server.list("events").iter().filter(|event| event["reason"] == "Pending").count();
    assert_eq!(pendings, 1);
}

/// Every Event has its own note, within the server's limit of bytes. A default of v1alpha1 is no change.
#[test]
fn events_are_their_own_and_versions_defaults_are_no_change() {
    let (server, _running) = controlled();
    let mut wanted = workspace("w");
    wanted["metadata"]["annotations"] = json!({"hone.sh/cpu": "ö".repeat(900)});
    server.put("workspaces", wanted);
    let event = server.wait("a long Event", |server| {
        server
            .list("events")
            .into_iter()
            .find(|event| event["note"].as_str().is_some_and(|note| note.contains("öö")))
    });
    assert!(event["note"].as_str().unwrap().len() <= 1024);

    let mut cpu = workspace("cpu");
    cpu["resource"].as_object_mut().unwrap().remove("instanceType");
    cpu["metadata"]["annotations"] = json!({"hone.sh/gpus": "0"});
    server.put("workspaces", cpu);
    job(&server, "cpu");
    job_status(&server, "cpu", json!({"succeeded": 1, "conditions": condition_of_job("Complete")}));
    state(&server, "cpu", "Succeeded");
    server.write_through_v1alpha1(NAMESPACE, "cpu", &json!({"metadata": {"labels": {"a": "b"}}}));
    let change = json!({"tuning": {"input": {"urls": ["https://host.example/b.parquet"]}}});
    server.write_through_v1alpha1(NAMESPACE, "cpu", &change);
    server.wait("revision 2", |server| {
        server.get("jobs", NAMESPACE, "cpu").filter(|job| revision(job) == "2").map(|_| ())
    });
    let told = condition(&server.get("workspaces", NAMESPACE, "cpu").unwrap(), "WorkspaceSucceeded");
    assert!(!told.contains("not applied"), "{told}");
    // The Event follows the Job.
    server.wait("the Event of revision 2", |server| {
        let mut events = server.list("events").into_iter();
        let of_job = |event: &Value| event["reason"] == "JobCreated" && event["regarding"]["name"] == "cpu";
        events.find(|event| of_job(event) && event["note"].to_string().contains("revision 2")).map(|_| ())
    });
}

/// A controller that starts after the end: of a Job that is still there, and of one that only its Events remember.
#[test]
fn ends_that_nobody_saw() {
    let server = ApiServer::start().without("nodeclaims").without("nodepools");
    let running = start(server.config(), |_| {});
    for name in ["there", "gone"] {
        server.put("workspaces", workspace(name));
        job(&server, name);
        job_status(&server, name, json!({"active": 1}));
        state(&server, name, "Running");
    }
    running.stop().unwrap();
    let uid = job(&server, "gone")["metadata"]["uid"].clone();
    let over = json!({"active": null, "succeeded": 1, "conditions": condition_of_job("Complete")});
    job_status(&server, "there", over.clone());
    job_status(&server, "gone", over);
    server.delete("jobs", NAMESPACE, "gone", "background");
    server.put(
        "events",
        json!({
            "metadata": {"name": "gone.1", "namespace": NAMESPACE}, "type": "Normal", "reason": "Completed",
            "note": "Job completed", "regarding": {"kind": "Job", "name": "gone", "uid": uid},
            "eventTime": "2026-02-01T00:00:00.000000Z",
        }),
    );
    let free = format!("127.0.0.1:{}", free_port()).parse().unwrap();
    let running = start(server.config(), |_| {});
    state(&server, "there", "Succeeded");
    state(&server, "gone", "Succeeded");
    assert!(server.get("jobs", NAMESPACE, "gone").is_none(), "it is not trained again");
    // The next controller also counts Workspaces that are over without a Job, and those that serve.
    running.stop().unwrap();
    server.put("workspaces", serving("chat", json!([])));
    let _running = start(server.config(), |options| options.address = free);
    server.wait("a StatefulSet", |server| server.get("statefulsets", NAMESPACE, "chat"));
    set_ready(&server, "chat", 1);
    server.wait("counts", |_| {
        let text = read(free, "/metrics");
        let has = |line: &str| text.contains(&format!("hone_workspaces{{state=\"{line}\n"));
        (has("Succeeded\"} 2") && has("Ready\"} 1") && has("Pending\"} 0")).then_some(())
    });
}

/// A namespace that is being deleted takes no new objects. No status reports this, and requests are not repeated again
/// and again.
#[test]
fn a_namespace_that_ends_is_left_in_peace() {
    let (server, _running) = controlled();
    let why = "configmaps \"qlora-params-template\" is forbidden: unable to create new content in namespace team because it is being terminated";
    server.refuse("POST", "configmaps", Some(why));
    server.put("workspaces", workspace("w"));
    let asked =
        || server.requests().iter().filter(|request| request.ends_with("namespaces/team/configmaps")).count();
    server.wait("a try", |_| (asked() > 0).then_some(()));
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(asked(), 1);
    assert!(
        server.get("workspaces", NAMESPACE, "w").unwrap()["status"].is_null()
            && server.list("events").is_empty()
    );
    server.refuse("POST", "configmaps", None);
    server.merge("workspaces", NAMESPACE, "w", &json!({"metadata": {"annotations": {"other/note": "x"}}}));
    job(&server, "w");
}

/// The real program as a process of its own, with a kubeconfig; it ends with the value.
struct Process {
    child: std::process::Child,
    _folder: tempfile::TempDir,
}

impl Process {
    fn start(server: &ApiServer) -> Process {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("kubeconfig");
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": server.config().cluster_url.to_string()}}],
            "users": [{"name": "test", "user": {}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        });
        std::fs::write(&file, config.to_string()).unwrap();
        let child = std::process::Command::new(env!("CARGO_BIN_EXE_hone"))
            .args(["-q", "controller", "--address", "127.0.0.1:0"])
            .env("KUBECONFIG", &file)
            .spawn()
            .unwrap();
        Process { child, _folder: folder }
    }

    /// Returns the megabytes that the process had at most, by the kernel's count.
    fn peak(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() / 1024
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

/// Returns whether the request reads Events.
fn is_of_events(request: &str) -> bool {
    request.starts_with("GET ") && request.ends_with("/events")
}

/// At rest a Workspace costs no request, and a thousand at once bounded ones, in bounded memory.
#[test]
fn a_thousand_workspaces() {
    const COUNT: usize = 1000;
    /// LIMIT: of the container in jobs/controller.yaml, in megabytes.
    const MEMORY_MAX: usize = 256;
    const REST: Duration = Duration::from_secs(20);
    /// The first pause before Events of a Workspace are read.
    const EVENTS_PAUSE: Duration = Duration::from_secs(5);
    let server = ApiServer::start().without("nodeclaims").without("nodepools");
    let (process, began) = (Process::start(&server), Instant::now());
    for number in 0..COUNT {
        server.put("workspaces", workspace(&format!("w{number}")));
    }
    server.wait_longer("a thousand states", |server| {
        let pending = |workspace: &Value| annotation(workspace, "revision").is_some();
        (server.list("workspaces").iter().filter(|workspace| pending(workspace)).count() == COUNT)
            .then_some(())
    });
    let requests = server.requests().len();
    // Events of a Workspace that waits are read after pauses that double; a slow machine needs more of them.
    let events = server.requests().iter().filter(|request| is_of_events(request)).count();
    let looks = (began.elapsed().as_secs_f64() / EVENTS_PAUSE.as_secs_f64() + 1.0).log2();
    assert!(
        events as f64 <= looks * COUNT as f64,
        "{events} readings of Events, {looks:.1} for each Workspace"
    );
    let others = requests - events;
    assert!(others <= 10 * COUNT, "{others} other requests for {COUNT} Workspaces");
    for number in 0..COUNT {
        let name = format!("w{number}");
        job_status(&server, &name, json!({"active": 1}));
        pod(&server, &name, "a", json!({"running": {"startedAt": "2026-01-01T00:00:00Z"}}));
    }
    server.wait_longer("a thousand running", |server| {
        let running = |workspace: &Value| workspace["status"]["workerNodes"] == json!(["node-1"]);
        (server.list("workspaces").iter().filter(|workspace| running(workspace)).count() == COUNT)
            .then_some(())
    });
    let running = server.requests().len() - requests;
    assert!(running <= 8 * COUNT, "{running} requests until {COUNT} ran");
    for number in 0..COUNT {
        let name = format!("w{number}");
        let said = json!({"code": 0, "kind": "ok", "image": "h/adapter:1", "digest": "sha256:abc"});
        pod(&server, &name, "a", ended(0, &said, 1));
        job_status(
            &server,
            &name,
            json!({"active": null, "succeeded": 1, "conditions": condition_of_job("Complete")}),
        );
    }
    server.wait_longer("a thousand ends", |server| {
        let over = |workspace: &Value| annotation(workspace, "digest").is_some();
        (server.list("workspaces").iter().filter(|workspace| over(workspace)).count() == COUNT).then_some(())
    });
    std::thread::sleep(Duration::from_secs(2));
    let before = server.requests().len();
    std::thread::sleep(REST);
    let rest = (server.requests().len() - before) as f64 * 60.0 / REST.as_secs_f64();
    let peak = process.peak();
    println!(
        "{COUNT} Workspaces: {requests} requests until made, {running} until running, {rest:.0} a minute at rest; {peak} MB at most"
    );
    assert!(rest <= 0.5 * COUNT as f64, "{rest} requests a minute at rest");
    assert!(peak <= MEMORY_MAX, "{peak} MB");
}

fn serving(name: &str, adapters: Value) -> Value {
    let mut object = workspace(name);
    object.as_object_mut().unwrap().remove("tuning");
    object["inference"] = json!({"preset": {"name": "phi-3-mini-128k-instruct"}, "adapters": adapters});
    object
}

fn set_ready(server: &ApiServer, name: &str, ready: i32) {
    let set = server.get("statefulsets", NAMESPACE, name).unwrap();
    let status = json!({
        "observedGeneration": set["metadata"]["generation"], "replicas": 1, "readyReplicas": ready,
        "currentRevision": "a", "updateRevision": "a",
    });
    server.merge("statefulsets", NAMESPACE, name, &json!({"status": status}));
}

/// Returns the adapters that the servers of a Workspace are given.
fn told(server: &ApiServer, name: &str) -> Value {
    let map = server.get("configmaps", NAMESPACE, &format!("{name}-adapters")).unwrap();
    serde_json::from_str(map["data"]["adapters.json"].as_str().unwrap()).unwrap()
}

fn arguments(set: &Value) -> Vec<String> {
    serde_json::from_value(set["spec"]["template"]["spec"]["containers"][0]["args"].clone()).unwrap()
}

#[test]
fn a_workspace_that_serves_becomes_a_server_and_its_state() {
    let (server, _running) = controlled();
    let adapter = json!([{"source": {"name": "support", "image": "h.example/adapter:1"}, "strength": "1.0"}]);
    server.put("workspaces", serving("chat", adapter));
    let set = server.wait("a StatefulSet", |server| server.get("statefulsets", NAMESPACE, "chat"));
    let said = arguments(&set);
    assert_eq!(said[0], "serve");
    assert!(said.contains(&"--adapters-file=/mnt/served/adapters.json".to_owned()), "{said:?}");
    assert_eq!(
        told(&server, "chat"),
        json!({
            "adapters": [{"name": "support", "source": "oci://h.example/adapter:1"}],
            "mixes": [{"name": "chat", "adapters": [{"name": "support", "strength": 1.0}]}],
        })
    );
    let service = server.get("services", NAMESPACE, "chat").unwrap();
    assert_eq!(service["spec"]["ports"][0]["port"], 80);
    assert_eq!(server.get("services", NAMESPACE, "chat-headless").unwrap()["spec"]["clusterIP"], "None");
    let pending = state(&server, "chat", "Pending");
    assert!(
        condition(&pending, "InferenceReady").starts_with("False WorkspaceInferenceStatusPending"),
        "{pending:#}"
    );
    set_ready(&server, "chat", 1);
    let ready = state(&server, "chat", "Ready");
    for (name, reason) in [
        ("InferenceReady", "True WorkspaceInferenceStatusSuccess"),
        ("WorkspaceSucceeded", "True workspaceSucceeded"),
        ("WorkspaceReady", "True workspaceSucceeded"),
    ] {
        assert!(condition(&ready, name).starts_with(reason), "{ready:#}");
    }
    set_ready(&server, "chat", 0);
    state(&server, "chat", "NotReady");

    // Another strength changes the servers' ConfigMap, and no pod; a wrong one changes nothing.
    let before = server.get("statefulsets", NAMESPACE, "chat").unwrap();
    let adapters = |strength: &str| json!({"inference": {"adapters": [{"source": {"name": "support", "image": "h.example/adapter:1"}, "strength": strength}]}});
    server.merge("workspaces", NAMESPACE, "chat", &adapters("0.5"));
    let half = |server: &ApiServer| told(server, "chat")["mixes"][0]["adapters"][0]["strength"] == 0.5;
    server.wait("half of it", |server| half(server).then_some(()));
    let after = server.wait("its hash", |server| {
        let set = server.get("statefulsets", NAMESPACE, "chat")?;
        (set["metadata"]["annotations"] != before["metadata"]["annotations"]).then_some(set)
    });
    assert_eq!(after["spec"], before["spec"], "the pods stay as they are");
    assert_eq!(after["metadata"]["generation"], before["metadata"]["generation"]);
    let twice = json!([
        {"source": {"name": "adapter-1", "image": "h.example/adapter:1"}}, {"source": {"image": "h.example/adapter:1"}},
    ]);
    let base = json!([{"source": {"name": "phi-3-mini-128k-instruct", "image": "h.example/adapter:1"}}]);
    for (list, told) in [
        (twice, "inference.adapters[1].source.name: adapter-1 stands there twice"),
        (
            base,
            "inference.adapters[0].source.name: phi-3-mini-128k-instruct is the name of the base for clients",
        ),
    ] {
        server.merge("workspaces", NAMESPACE, "chat", &json!({"inference": {"adapters": list}}));
        wait_message(&server, "chat", told);
    }
    server.merge("workspaces", NAMESPACE, "chat", &adapters("2"));
    wait_message(
        &server,
        "chat",
        "inference.adapters[0].strength: expected a number from 0 to 1, found \"2\"",
    );
    assert!(half(&server));
    let quiet = server.requests().len();
    std::thread::sleep(Duration::from_secs(3));
    assert!(server.requests().len() - quiet <= 4, "{:?}", &server.requests()[quiet..]);
    server.delete("workspaces", NAMESPACE, "chat", "background");
    server.wait("all gone", |server| server.list("statefulsets").is_empty().then_some(()));
}

#[test]
fn what_serves_follows_what_is_tuned() {
    let (server, _running) = controlled();
    let adapters = json!([{"source": {"name": "newest", "image": "workspace://w"}}]);
    server.put("workspaces", serving("chat", adapters));
    wait_message(&server, "chat", "there is no Workspace w in this namespace");
    server.put("workspaces", workspace("w"));
    wait_message(&server, "chat", "Workspace w has not pushed its adapter yet");
    job(&server, "w");
    let pushed = |digest: &str, second| {
        let said =
            json!({"code": 0, "kind": "ok", "image": "registry.example.com/adapter:1", "digest": digest});
        pod(&server, "w", digest, ended(0, &said, second));
        job_status(&server, "w", json!({"succeeded": 1, "conditions": condition_of_job("Complete")}));
        server.wait(digest, |server| {
            server.get("configmaps", NAMESPACE, "chat-adapters")?;
            let source = format!("oci://registry.example.com/adapter@{digest}");
            (told(server, "chat")["adapters"] == json!([{"name": "newest", "source": source}])).then_some(())
        });
    };
    pushed("sha256:aa", 1);
    let change = json!({"tuning": {"input": {"urls": ["https://host.example/b.parquet"]}}});
    server.merge("workspaces", NAMESPACE, "w", &change);
    server.wait("revision 2", |server| {
        server.get("jobs", NAMESPACE, "w").filter(|job| revision(job) == "2").map(|_| ())
    });
    pushed("sha256:bb", 2);
}

/// A server as far as the controller asks one: `/v1/models` on port 5001 of a loopback address of its own, answering
/// what is in the cell. It stops with the value.
struct Asked {
    address: std::net::Ipv4Addr,
    says: Arc<std::sync::Mutex<Value>>,
    count: Arc<std::sync::atomic::AtomicUsize>,
    stop: Arc<AtomicBool>,
}

impl Asked {
    fn start(last: u8) -> Asked {
        use std::io::{Read, Write};
        let address = std::net::Ipv4Addr::new(127, 77, 5, last);
        let listener = std::net::TcpListener::bind((address, 5001)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let asked = Asked { address, says: Arc::default(), count: Arc::default(), stop: Arc::default() };
        let (says, count, stop) = (asked.says.clone(), asked.count.clone(), asked.stop.clone());
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let Ok((mut stream, _)) = listener.accept() else {
                    std::thread::sleep(Duration::from_millis(5));
                    continue;
                };
                stream.set_nonblocking(false).unwrap();
                let mut head = [0; 2048];
                let bytes = stream.read(&mut head).unwrap_or(0);
                assert!(head[..bytes].starts_with(b"GET /v1/models "));
                count.fetch_add(1, Ordering::Relaxed);
                let body = says.lock().unwrap().to_string();
                let length = body.len();
                _ = write!(
                    stream,
                    "HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
                );
            }
        });
        asked
    }

    /// Makes the server answer as one that has applied the ConfigMap, or has not.
    fn take(&self, server: &ApiServer, name: &str, refused: Option<&str>, digest: &str) {
        let map = server.get("configmaps", NAMESPACE, &format!("{name}-adapters")).unwrap();
        let file = hone::serving::live::file_digest(map["data"]["adapters.json"].as_str().unwrap());
        let mix = &told(server, name)["mixes"][0];
        let parts: Vec<Value> = mix["adapters"].as_array().unwrap().iter().map(|part| {
            json!({"name": part["name"], "strength": part["strength"], "digest": digest, "source": "oci://h.example/adapter:1"})
        }).collect();
        *self.says.lock().unwrap() = json!({
            "data": [{"id": "base", "adapters": []}, {"id": mix["name"], "adapters": parts}], "default": mix["name"],
            "adapters_file": {"digest": file, "refused": refused},
        });
    }

    fn pod(&self, server: &ApiServer, name: &str, number: u32) {
        let set = server.get("statefulsets", NAMESPACE, name).unwrap();
        server.put(
            "pods",
            json!({
                "metadata": {
                    "name": format!("{name}-{number}"), "namespace": NAMESPACE,
                    "labels": set["spec"]["template"]["metadata"]["labels"],
                },
                "spec": {"nodeName": format!("node-{number}"), "containers": []},
                "status": {
                    "podIP": self.address.to_string(), "conditions": [{"type": "Ready", "status": "True"}],
                },
            }),
        );
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn wait_adapters(server: &ApiServer, name: &str, part: &str) -> Value {
    server.wait(&format!("{name}: {part}"), |server| {
        server
            .get("workspaces", NAMESPACE, name)
            .filter(|found| condition(found, "AdaptersReady").contains(part))
    })
}

/// B2: adapters change in servers that go on, and the status says which answer, by digest.
#[test]
fn adapters_change_while_servers_go_on() {
    let (server, _running) = controlled();
    let adapters = |strength: &str| json!([{"source": {"name": "support", "image": "h.example/adapter:1"}, "strength": strength}]);
    let mut wanted = serving("chat", adapters("1.0"));
    wanted["resource"]["count"] = json!(2);
    server.put("workspaces", wanted);
    server.wait("a StatefulSet", |server| server.get("statefulsets", NAMESPACE, "chat"));
    let asked = [Asked::start(1), Asked::start(2)];
    for (number, one) in asked.iter().enumerate() {
        one.take(&server, "chat", None, "sha256:aa");
        one.pod(&server, "chat", number as u32);
    }
    let ready =
        wait_adapters(&server, "chat", "True AdaptersAnswer support of h.example/adapter:1 (sha256:aa) at 1");
    server.wait("the annotation", |server| {
        let workspace = server.get("workspaces", NAMESPACE, "chat")?;
        (annotation(&workspace, "adapters")? == "support of h.example/adapter:1 (sha256:aa) at 1.0")
            .then_some(())
    });
    assert_eq!(ready["status"]["workerNodes"], json!(["node-0", "node-1"]));

    // One server takes the change, the other does not yet.
    server.merge("workspaces", NAMESPACE, "chat", &json!({"inference": {"adapters": adapters("0.5")}}));
    server.wait("the change", |server| {
        (told(server, "chat")["mixes"][0]["adapters"][0]["strength"] == 0.5).then_some(())
    });
    asked[0].take(&server, "chat", None, "sha256:aa");
    wait_adapters(&server, "chat", "False AdaptersPending 1 of 2 servers have applied them");
    asked[1].take(&server, "chat", None, "sha256:aa");
    wait_adapters(&server, "chat", "True AdaptersAnswer support of h.example/adapter:1 (sha256:aa) at 0.5");

    // The server reports an adapter of another base, and its earlier adapters go on.
    let other =
        json!({"inference": {"adapters": [{"source": {"name": "support", "image": "h.example/other:1"}}]}});
    server.merge("workspaces", NAMESPACE, "chat", &other);
    server.wait("the change", |server| {
        (told(server, "chat")["adapters"][0]["source"] == "oci://h.example/other:1").then_some(())
    });
    for one in &asked {
        one.take(
            &server,
            "chat",
            Some("the adapter oci://h.example/other:1 was trained over phi-4"),
            "sha256:aa",
        );
    }
    let refused = wait_adapters(
        &server,
        "chat",
        "False AdaptersRefused the adapter oci://h.example/other:1 was trained over phi-4",
    );
    assert_eq!(
        annotation(&refused, "adapters").as_deref(),
        Some("support of h.example/adapter:1 (sha256:aa) at 0.5")
    );
    server.wait("its Event", |server| {
        let told = |event: &Value| {
            event["reason"] == "AdaptersRefused" && event["note"].to_string().contains("phi-4")
        };
        server.list("events").iter().any(told).then_some(())
    });

    // Mended, everybody is left in peace.
    server.merge("workspaces", NAMESPACE, "chat", &json!({"inference": {"adapters": adapters("1.0")}}));
    server.wait("the change", |server| {
        (told(server, "chat")["adapters"][0]["source"] == "oci://h.example/adapter:1").then_some(())
    });
    asked.iter().for_each(|one| one.take(&server, "chat", None, "sha256:aa"));
    wait_adapters(&server, "chat", "True AdaptersAnswer support of h.example/adapter:1 (sha256:aa) at 1");
    std::thread::sleep(Duration::from_millis(500));
    let (quiet, count) = (server.requests().len(), asked[0].count.load(Ordering::Relaxed));
    std::thread::sleep(Duration::from_secs(3));
    assert!(server.requests().len() - quiet <= 4, "{:?}", &server.requests()[quiet..]);
    assert_eq!(asked[0].count.load(Ordering::Relaxed), count, "servers at rest are not asked");

    // Fields that somebody else changes or removes are restored.
    let strong = json!({"data": {"adapters.json": "{}"}});
    server.merge("configmaps", NAMESPACE, "chat-adapters", &strong);
    let right = |server: &ApiServer| {
        server.get("configmaps", NAMESPACE, "chat-adapters")?;
        (told(server, "chat")["adapters"][0]["name"] == "support").then_some(())
    };
    server.wait("it is put right", right);
    server.delete("configmaps", NAMESPACE, "chat-adapters", "background");
    server.wait("it is there again", right);

    server.merge("workspaces", NAMESPACE, "chat", &json!({"inference": {"adapters": null}}));
    server.wait("no adapters", |server| {
        let workspace = server.get("workspaces", NAMESPACE, "chat")?;
        (annotation(&workspace, "adapters").is_none()
            && condition(&workspace, "AdaptersReady").trim().is_empty())
        .then_some(())
    });
    assert_eq!(told(&server, "chat"), json!({"adapters": [], "mixes": []}));
}

fn warn(server: &ApiServer, about: &Value, reason: &str, message: &str) {
    let meta = &about["metadata"];
    server.put(
        "events",
        json!({
            "metadata": {"name": format!("{}.{reason}", meta["name"].as_str().unwrap()), "namespace": NAMESPACE},
            "type": "Warning", "reason": reason, "note": message,
            "lastTimestamp": jiff::Timestamp::now().to_string(),
            "regarding": {"kind": about["kind"], "name": meta["name"], "uid": meta["uid"]},
        }),
    );
}

/// Returns a server's pod, as the kubelet and the scheduler report it.
fn server_pod(server: &ApiServer, name: &str, status: Value) -> Value {
    let set = server.get("statefulsets", NAMESPACE, name).unwrap();
    let pod = format!("{name}-0");
    let labels = set["spec"]["template"]["metadata"]["labels"].clone();
    server.put(
        "pods",
        json!({
            "metadata": {"name": pod, "namespace": NAMESPACE, "labels": labels}, "spec": {"containers": []},
            "status": status,
        }),
    );
    server.get("pods", NAMESPACE, &pod).unwrap()
}

fn container_state(name: &str, state: Value, last: Value) -> Value {
    json!({"containerStatuses": [{
        "name": name, "image": "", "imageID": "", "ready": false, "restartCount": 1, "state": state, "lastState": last,
    }]})
}

fn wait_inference(server: &ApiServer, name: &str, part: &str) -> Value {
    server.wait(&format!("{name}: {part}"), |server| {
        let found = server.get("workspaces", NAMESPACE, name)?;
        condition(&found, "InferenceReady").contains(part).then_some(found)
    })
}

/// The status says why pods of servers cannot be created, mounted, pulled, scheduled or started, with KAITO's reasons.
#[test]
fn a_server_that_does_not_begin_says_why() {
    let (server, _running) = controlled();
    server.put("workspaces", serving("chat", json!([])));
    let set = server.wait("a StatefulSet", |server| server.get("statefulsets", NAMESPACE, "chat"));
    let quota = "create Pod chat-0 in StatefulSet chat failed error: pods \"chat-0\" is forbidden: exceeded quota: gpus";
    warn(&server, &set, "FailedCreate", quota);
    wait_inference(
        &server,
        "chat",
        "False WorkspaceInferenceStatusPending Inference workload is not ready: FailedCreate: create Pod chat-0",
    );
    let waits = container_state("chat", json!({"waiting": {"reason": "ContainerCreating"}}), json!({}));
    let pod = server_pod(&server, "chat", waits);
    warn(
        &server,
        &pod,
        "FailedMount",
        "MountVolume.SetUp failed for volume \"docker-config\": secret \"pull\" not found",
    );
    wait_inference(&server, "chat", "FailedMount: MountVolume.SetUp failed for volume");
    server.wait("its Event", |server| {
        let told =
            |event: &Value| event["note"].to_string().contains("FailedMount") && event["type"] == "Warning";
        server
            .list("events")
            .iter()
            .any(|event| told(event) && event["regarding"]["name"] == "chat")
            .then_some(())
    });
    let said = json!({"code": 12, "kind": "model", "message": "config.json: no such family"});
    let ended = |code: i32, reason: &str, message: String| json!({"terminated": {"exitCode": code, "reason": reason, "message": message}});
    let waiting = |reason: &str, message: &str| json!({"waiting": {"reason": reason, "message": message}});
    let unscheduled = json!({"conditions": [{
        "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
        "message": "0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims",
    }]});
    let back_off = || waiting("CrashLoopBackOff", "back-off 10s restarting failed container");
    let cases = [
        (
            unscheduled,
            "Unschedulable 0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims",
        ),
        (
            container_state("chat", waiting("ImagePullBackOff", "no such image"), json!({})),
            "ImagePullError ImagePullBackOff: no such image",
        ),
        (
            container_state(
                "chat",
                waiting("CreateContainerConfigError", "secret \"keys\" not found"),
                json!({}),
            ),
            "ContainerStartError CreateContainerConfigError: secret \"keys\" not found",
        ),
        (
            container_state("chat", back_off(), ended(12, "Error", said.to_string())),
            "ContainerCrashLoopBackOff exit code 12 (model): config.json: no such family",
        ),
        (
            container_state("chat", back_off(), ended(137, "OOMKilled", String::new())),
            "ContainerOOMKilled exit code 137 (OOMKilled): killed for its memory; raise hone.sh/memory",
        ),
        (
            json!({"reason": "Evicted", "message": "The node was low on resource: ephemeral-storage"}),
            "PodEvicted The node was low on resource",
        ),
    ];
    for (status, told) in cases {
        server_pod(&server, "chat", status);
        wait_inference(&server, "chat", told);
    }
    // The server loads. Earlier reports are gone, and its node does not stay in the status when the pod goes.
    server_pod(&server, "chat", container_state("chat", json!({"running": {}}), json!({})));
    wait_inference(
        &server,
        "chat",
        "WorkspaceInferenceStatusPending Inference workload is not ready: 0 of 1 servers are",
    );
    server.merge("pods", NAMESPACE, "chat-0", &json!({"spec": {"nodeName": "node-1"}}));
    let nodes = |wanted: Value| {
        server.wait("worker nodes", |server| {
            (server.get("workspaces", NAMESPACE, "chat")?["status"]["workerNodes"] == wanted).then_some(())
        })
    };
    nodes(json!(["node-1"]));
    server.delete("pods", NAMESPACE, "chat-0", "background");
    nodes(Value::Null);
}

/// Every object of a server that somebody deletes or changes is restored a moment later, and then all is at rest.
#[test]
fn what_is_changed_of_a_server_is_put_right() {
    let server = ApiServer::start().without("nodeclaims").without("nodepools");
    let running = start(server.config(), |_| {});
    let mut wanted = serving("chat", json!([]));
    wanted["resource"]["count"] = json!(2);
    server.put("workspaces", wanted);
    server.wait("a budget", |server| server.get("poddisruptionbudgets", NAMESPACE, "chat"));
    for (plural, name) in [
        ("services", "chat"),
        ("services", "chat-headless"),
        ("configmaps", "chat-adapters"),
        ("poddisruptionbudgets", "chat"),
        ("statefulsets", "chat"),
    ] {
        let uid = server.wait(name, |server| server.get(plural, NAMESPACE, name))["metadata"]["uid"].clone();
        server.delete(plural, NAMESPACE, name, "background");
        server.wait(&format!("{plural} {name} again"), |server| {
            server.get(plural, NAMESPACE, name).filter(|found| found["metadata"]["uid"] != uid)
        });
    }
    let replicas = |server: &ApiServer| {
        server.get("statefulsets", NAMESPACE, "chat").filter(|set| set["spec"]["replicas"] == 2).map(|_| ())
    };
    server.merge("statefulsets", NAMESPACE, "chat", &json!({"spec": {"replicas": 5}}));
    server.wait("kubectl scale is overruled", replicas);
    let ports = json!({"spec": {"ports": [{"name": "http", "port": 81, "protocol": "TCP"}]}});
    server.merge("services", NAMESPACE, "chat", &ports);
    server.wait("the port", |server| {
        (server.get("services", NAMESPACE, "chat")?["spec"]["ports"][0]["port"] == 80).then_some(())
    });
    server.merge("services", NAMESPACE, "chat", &json!({"metadata": {"labels": null}}));
    server.wait("the labels", |server| {
        server.get("services", NAMESPACE, "chat")?["metadata"]["labels"]["kaito.sh/workspace"]
            .is_string()
            .then_some(())
    });
    // Fields that others own stay, and fields that change by themselves do not count.
    server.merge("services", NAMESPACE, "chat", &json!({"metadata": {"annotations": {"cloud/id": "7"}}, "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}}}));
    set_ready(&server, "chat", 1);
    std::thread::sleep(Duration::from_millis(700));
    let quiet = server.requests().len();
    std::thread::sleep(Duration::from_secs(2));
    assert!(server.requests().len() - quiet <= 4, "{:?}", &server.requests()[quiet..]);
    assert_eq!(
        server.get("services", NAMESPACE, "chat").unwrap()["metadata"]["annotations"]["cloud/id"],
        "7"
    );

    // One server needs no budget: nothing could be let go.
    server.merge("workspaces", NAMESPACE, "chat", &json!({"resource": {"count": 1}}));
    server.wait("no budget", |server| server.list("poddisruptionbudgets").is_empty().then_some(()));

    // While no controller runs; and a field that an earlier one wrote, which cannot be changed.
    running.stop().unwrap();
    server.delete("services", NAMESPACE, "chat", "background");
    let old = json!({"metadata": {"annotations": {"hone.sh/spec-hash": "earlier"}}, "spec": {"serviceName": "earlier"}});
    server.merge("statefulsets", NAMESPACE, "chat", &old);
    let pod = server_pod(&server, "chat", json!({}));
    let _running = start(server.config(), |_| {});
    server.wait("the Service", |server| server.get("services", NAMESPACE, "chat"));
    server.wait("a new set", |server| {
        (server.get("statefulsets", NAMESPACE, "chat")?["spec"]["serviceName"] == "chat-headless")
            .then_some(())
    });
    assert_eq!(server.get("pods", NAMESPACE, "chat-0"), Some(pod), "its pods go on");
    let text = server.list("events").iter().map(ToString::to_string).collect::<String>();
    assert!(text.contains("is repaired"), "{text}");
}

/// For servers, objects of somebody else are not touched, nothing is created beside them, and their end is noticed.
#[test]
fn names_that_are_taken_are_told_and_waited_for() {
    let (server, _running) = controlled();
    let object = |name: &str| json!({"metadata": {"name": name, "namespace": NAMESPACE}, "spec": {"ports": [{"port": 1}]}});
    for (plural, name, kind) in [
        ("services", "one", "Service one"),
        ("statefulsets", "two", "StatefulSet two"),
        ("configmaps", "three-adapters", "ConfigMap three-adapters"),
        ("services", "four-headless", "Service four-headless"),
    ] {
        server.put(plural, object(name));
        let workspace = name.split('-').next().unwrap();
        server.put("workspaces", serving(workspace, json!([])));
        wait_message(
            &server,
            workspace,
            &format!("{kind} is not of this Workspace: rename the Workspace, or remove the"),
        );
        assert!(server.get(plural, NAMESPACE, name).unwrap()["metadata"]["labels"].is_null(), "{kind}");
        let made = server.list("statefulsets").len() + server.list("services").len();
        assert_eq!(made, usize::from(plural != "configmaps"), "nothing is made beside {kind}");
        server.delete(plural, NAMESPACE, name, "background");
        server.wait(&format!("{workspace} is made"), |server| {
            server.get("statefulsets", NAMESPACE, workspace)?["metadata"]["ownerReferences"]
                .is_array()
                .then_some(())
        });
        server.delete("workspaces", NAMESPACE, workspace, "background");
        server.wait("all gone", |server| {
            (server.list("statefulsets").is_empty() && server.list("services").is_empty()).then_some(())
        });
    }
}

/// Names that Kubernetes cannot give to a Service or to the pods of a StatefulSet.
#[test]
fn a_server_needs_a_name_that_all_its_objects_can_have() {
    let (server, _running) = controlled();
    let long = "a".repeat(53);
    for name in ["7b-chat", &long] {
        server.put("workspaces", serving(name, json!([])));
        wait_message(
            &server,
            name,
            "metadata.name: a Workspace that serves needs a letter first and at most 52 characters",
        );
    }
    server.put("workspaces", serving(&long[1..], json!([])));
    // Its objects are written one after the other.
    server.wait("a Service", |server| server.get("services", NAMESPACE, &long[1..]));
    server.wait("a StatefulSet", |server| server.get("statefulsets", NAMESPACE, &long[1..]));
    assert_eq!(server.list("statefulsets").len(), 1);
    // One that tunes may have more, as its Job may.
    server.put("workspaces", workspace(&"b".repeat(63)));
    job(&server, &"b".repeat(63));
}

/// KAITO's webhook refuses such a change. Without a webhook, the earlier objects go on, and undoing the change is
/// enough.
#[test]
fn what_tunes_cannot_become_what_serves() {
    let (server, _running) = controlled();
    const WHY: &str = "tuning: it cannot be added or removed; make another Workspace";
    server.put("workspaces", workspace("w"));
    let first = job(&server, "w");
    let tuning = workspace("w")["tuning"].clone();
    let inference = serving("w", json!([]))["inference"].clone();
    let serve = json!({"tuning": null, "inference": inference});
    let tune = json!({"tuning": tuning, "inference": null});
    server.merge("workspaces", NAMESPACE, "w", &serve);
    wait_message(&server, "w", WHY);
    assert_eq!(job(&server, "w")["metadata"]["uid"], first["metadata"]["uid"]);
    server.merge("workspaces", NAMESPACE, "w", &tune);
    let silent = |server: &ApiServer| {
        let found = server.get("workspaces", NAMESPACE, "w")?;
        (!condition(&found, "WorkspaceSucceeded").contains("not applied")).then_some(found)
    };
    server.wait("the message gone", silent);
    // The same after its end, when no Job is left.
    job_status(&server, "w", json!({"succeeded": 1, "conditions": condition_of_job("Complete")}));
    state(&server, "w", "Succeeded");
    server.delete("jobs", NAMESPACE, "w", "background");
    server.merge("workspaces", NAMESPACE, "w", &serve);
    wait_message_in(&server, "w", "Succeeded", &format!("; the change is not applied: {WHY}"));
    server.merge("workspaces", NAMESPACE, "w", &tune);
    assert_eq!(server.wait("the message gone", silent)["status"]["state"], "Succeeded");
    assert!(server.list("jobs").is_empty() && server.list("statefulsets").is_empty());

    server.put("workspaces", serving("v", json!([])));
    let set = server.wait("a StatefulSet", |server| server.get("statefulsets", NAMESPACE, "v"));
    server.merge("workspaces", NAMESPACE, "v", &tune);
    wait_message(&server, "v", WHY);
    assert_eq!(
        server.get("statefulsets", NAMESPACE, "v").unwrap()["metadata"]["uid"],
        set["metadata"]["uid"]
    );
    assert!(server.list("jobs").is_empty());
}

/// A finished Workspace stays finished if it is replaced, or edited to something invalid and back. Another Workspace of
/// its name is a new one.
#[test]
fn what_is_over_stays_over_whatever_is_written() {
    let (server, _running) = controlled();
    server.put("workspaces", workspace("w"));
    job(&server, "w");
    job_status(&server, "w", json!({"succeeded": 1, "conditions": condition_of_job("Complete")}));
    state(&server, "w", "Succeeded");
    server.wait("its revision", |server| annotation(&server.get("workspaces", NAMESPACE, "w")?, "revision"));
    server.delete("jobs", NAMESPACE, "w", "background");
    let made = || {
        server
            .requests()
            .iter()
            .filter(|request| *request == "POST /apis/batch/v1/namespaces/team/jobs")
            .count()
    };
    let before = made();
    server.replace("workspaces", NAMESPACE, "w", workspace("w"));
    server.wait("its revision again", |server| {
        (annotation(&server.get("workspaces", NAMESPACE, "w")?, "revision")? == "1").then_some(())
    });
    for _ in 0..2 {
        server.merge(
            "workspaces",
            NAMESPACE,
            "w",
            &json!({"tuning": {"input": {"urls": ["ftp://host.example/a"]}}}),
        );
        wait_message_in(&server, "w", "Succeeded", "; the change is not applied: ");
        server.merge("workspaces", NAMESPACE, "w", &json!({"tuning": workspace("w")["tuning"]}));
        server.wait("the message gone", |server| {
            let found = server.get("workspaces", NAMESPACE, "w")?;
            (!condition(&found, "WorkspaceSucceeded").contains("not applied")).then_some(())
        });
    }
    assert_eq!(made(), before, "it is not trained again");
    assert_eq!(server.get("workspaces", NAMESPACE, "w").unwrap()["status"]["state"], "Succeeded");

    // The Workspace is deleted and applied again from the output of `kubectl get -o yaml`, before the collector has
    // seen it.
    let mut printed = server.get("workspaces", NAMESPACE, "w").unwrap();
    for field in ["uid", "creationTimestamp", "resourceVersion", "generation"] {
        printed["metadata"].as_object_mut().unwrap().remove(field);
    }
    printed.as_object_mut().unwrap().remove("status");
    let old = server.list("controllerrevisions")[0]["metadata"]["uid"].clone();
    server.stop_collector(true);
    server.delete("workspaces", NAMESPACE, "w", "background");
    server.put("workspaces", printed);
    assert_eq!(revision(&job(&server, "w")), "1", "another Workspace is trained");
    server.stop_collector(false);
    server.wait("its own record", |server| {
        server.list("controllerrevisions").iter().any(|found| found["metadata"]["uid"] != old).then_some(())
    });
}

/// A node costs money: it is given back even where somebody took the finalizer away.
#[test]
fn a_finalizer_that_is_removed_by_hand_leaves_no_node() {
    let server = ApiServer::start();
    let _running = start(server.config(), |_| {});
    server.put("workspaces", workspace("w"));
    let there = |server: &ApiServer| {
        let found = server.get("workspaces", NAMESPACE, "w")?;
        (found["metadata"]["finalizers"] == json!(["hone.sh/nodes"])).then_some(())
    };
    job(&server, "w");
    server.wait("its finalizer", there);
    server.merge("workspaces", NAMESPACE, "w", &json!({"metadata": {"finalizers": []}}));
    server.wait("it is back", there);
    server.put("workspaces", serving("chat", json!([])));
    let chats = |server: &ApiServer| {
        let found = server.get("workspaces", NAMESPACE, "chat")?;
        (found["metadata"]["finalizers"] == json!(["hone.sh/nodes"]) && server.list("nodeclaims").len() == 2)
            .then_some(())
    };
    server.wait("a server's finalizer", chats);
    server.merge("workspaces", NAMESPACE, "chat", &json!({"metadata": {"finalizers": []}}));
    server.wait("it is back", chats);
    server.delete("workspaces", NAMESPACE, "chat", "background");
    server.wait("one claim", |server| (server.list("nodeclaims").len() == 1).then_some(()));
    // Both at once: without the finalizer the Workspace is gone before the controller sees it.
    let mut gone = server.get("workspaces", NAMESPACE, "w").unwrap();
    gone["metadata"]["finalizers"] = json!([]);
    gone["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    server.put("workspaces", gone);
    server.wait("no claim", |server| server.list("nodeclaims").is_empty().then_some(()));
}

/// Refusals of a server's objects are reported. When the cause is mended in the cluster, the controller goes on by
/// itself.
#[test]
fn a_quota_against_a_server_is_told() {
    let (server, _running) = controlled();
    let quota = "services \"chat\" is forbidden: exceeded quota: few, requested: services=1, used: services=3, limited: services=3";
    server.refuse("PATCH", "services", Some(quota));
    server.put("workspaces", serving("chat", json!([])));
    let told = wait_message(
        &server,
        "chat",
        &format!("the Workspace is not applied: the API server refuses it: {quota}"),
    );
    assert!(
        condition(&told, "InferenceReady").starts_with("False WorkspaceInferenceStatusFailed"),
        "{told:#}"
    );
    server.refuse("PATCH", "services", None);
    server.wait("a StatefulSet", |server| server.get("statefulsets", NAMESPACE, "chat"));
    wait_inference(&server, "chat", "0 of 1 servers are");
}

/// Repeated failures of the API server are reported in the server's own words, and no end is forgotten because of them.
#[test]
fn errors_that_repeat_are_told_and_undo_no_end() {
    let server = ApiServer::start().without("nodeclaims").without("nodepools");
    let running = start(server.config(), |_| {});
    server.put("workspaces", workspace("done"));
    job(&server, "done");
    job_status(&server, "done", json!({"succeeded": 1, "conditions": condition_of_job("Complete")}));
    state(&server, "done", "Succeeded");
    running.stop().unwrap();
    server.delete("jobs", NAMESPACE, "done", "background");
    server.wait("no Job", |server| server.list("jobs").is_empty().then_some(()));
    server.fail_next("LIST", "controllerrevisions", 500, u32::MAX);
    server.fail_next("PATCH", "services", 500, u32::MAX);
    server.put("workspaces", serving("chat", json!([])));
    server.put("workspaces", workspace("new"));
    let _running = start(server.config(), |_| {});
    let found = wait_inference(
        &server,
        "chat",
        "Inference workload is not ready: the API server answers 500: the server is currently unable",
    );
    assert!(condition(&found, "JobStarted").trim().is_empty(), "{found:#}");
    wait_message_in(&server, "new", "Pending", "unable to handle the request");
    assert_eq!(server.get("workspaces", NAMESPACE, "done").unwrap()["status"]["state"], "Succeeded");
    server.fail_next("LIST", "controllerrevisions", 500, 0);
    server.fail_next("PATCH", "services", 500, 0);
    job(&server, "new");
    server.wait("a StatefulSet", |server| server.get("statefulsets", NAMESPACE, "chat"));
    assert_eq!(server.list("jobs").len(), 1, "what is done is not done again");
}

/// The image that a tuning Workspace pushed is served while it tunes again, and after it is gone.
#[test]
fn what_was_pushed_is_served_on() {
    let (server, _running) = controlled();
    server.put("workspaces", workspace("w"));
    job(&server, "w");
    let said =
        json!({"code": 0, "kind": "ok", "image": "registry.example.com/adapter:1", "digest": "sha256:aa"});
    pod(&server, "w", "a", ended(0, &said, 1));
    job_status(&server, "w", json!({"succeeded": 1, "conditions": condition_of_job("Complete")}));
    server.put(
        "workspaces",
        serving("chat", json!([{"source": {"name": "newest", "image": "workspace://w"}}])),
    );
    let serves = |server: &ApiServer, source: &str| {
        server.get("configmaps", NAMESPACE, "chat-adapters")?;
        (told(server, "chat")["adapters"][0]["source"] == source).then_some(())
    };
    let first = "oci://registry.example.com/adapter@sha256:aa";
    server.wait("the first", |server| serves(server, first));
    // The second try goes to another repository, and fails.
    let output = json!({"image": "registry.example.com/other:1", "imagePushSecret": "login"});
    server.merge("workspaces", NAMESPACE, "w", &json!({"tuning": {"output": output}}));
    server.wait("revision 2", |server| server.get("jobs", NAMESPACE, "w").filter(|job| revision(job) == "2"));
    job_status(&server, "w", json!({"failed": 1, "conditions": condition_of_job("Failed")}));
    state(&server, "w", "Failed");
    server.merge("workspaces", NAMESPACE, "chat", &json!({"resource": {"count": 2}}));
    server.wait("two servers", |server| {
        (server.get("statefulsets", NAMESPACE, "chat")?["spec"]["replicas"] == 2).then_some(())
    });
    assert!(serves(&server, first).is_some());
    server.delete("workspaces", NAMESPACE, "w", "background");
    wait_message(
        &server,
        "chat",
        "the Workspace is not applied: inference.adapters[0].source.image: there is no Workspace w",
    );
    assert!(serves(&server, first).is_some(), "servers go on with it");
}

/// The configuration of KAITO's servers: settings that have a meaning here become flags, the others are reported once.
#[test]
fn a_server_follows_its_configuration() {
    let (server, _running) = controlled();
    let mut wanted = serving("chat", json!([]));
    wanted["inference"]["config"] = json!("servers");
    server.put("workspaces", wanted);
    wait_message(&server, "chat", "there is no ConfigMap servers in namespace team");
    let config = |text: &str| {
        json!({
            "metadata": {"name": "servers", "namespace": NAMESPACE}, "data": {"inference_config.yaml": text},
        })
    };
    server.put(
        "configmaps",
        config("vllm:\n  max-model-len: 2048\n  served-model-name: phi\n  swap-space: 4\n"),
    );
    let set = server.wait("a StatefulSet", |server| server.get("statefulsets", NAMESPACE, "chat"));
    let said = arguments(&set);
    assert!(
        said.contains(&"--context=2048".to_owned()) && said.contains(&"--name=phi".to_owned()),
        "{said:?}"
    );
    let noted = |server: &ApiServer| {
        let told = |event: &&Value| {
            event["note"].to_string().contains("vllm.swap-space: hone serve has no such setting")
        };
        server.list("events").iter().filter(told).count()
    };
    server.wait("its Event", |server| (noted(server) == 1).then_some(()));
    server.put("configmaps", config("vllm:\n  max-model-len: 1024\n"));
    server.wait("another context", |server| {
        arguments(&server.get("statefulsets", NAMESPACE, "chat")?)
            .contains(&"--context=1024".to_owned())
            .then_some(())
    });
    server.put("configmaps", config("vllm:\n  max-model-len: many\n"));
    wait_message(
        &server,
        "chat",
        "ConfigMap servers:2:18: vllm.max-model-len: expected a whole number from 1",
    );
    assert!(
        arguments(&server.get("statefulsets", NAMESPACE, "chat").unwrap())
            .contains(&"--context=1024".to_owned())
    );
    assert_eq!(noted(&server), 1, "once");

    // A grace period leaves time for requests on their way, and after the last answer.
    server.put("configmaps", config(""));
    for (grace, drains, sleeps) in
        [("2m", "--grace=110", json!(5)), ("5s", "--grace=1", json!(4)), ("1", "--grace=1", Value::Null)]
    {
        server.merge(
            "workspaces",
            NAMESPACE,
            "chat",
            &json!({"metadata": {"annotations": {"hone.sh/grace-period": grace}}}),
        );
        server.wait(grace, |server| {
            let set = server.get("statefulsets", NAMESPACE, "chat")?;
            let container = &set["spec"]["template"]["spec"]["containers"][0];
            let fits = container["lifecycle"]["preStop"]["sleep"]["seconds"] == sleeps;
            (arguments(&set).contains(&drains.to_owned()) && fits).then_some(())
        });
    }
}

/// One node for each server; of more than are wanted, an idle one goes.
#[test]
fn servers_get_a_node_each() {
    let server = ApiServer::start();
    let _running = start(server.config(), |_| {});
    let mut wanted = serving("chat", json!([]));
    wanted["resource"]["count"] = json!(3);
    server.put("workspaces", wanted);
    let claims = |server: &ApiServer| {
        let alive = |claim: &Value| claim["metadata"]["deletionTimestamp"].is_null();
        server.list("nodeclaims").into_iter().filter(alive).collect::<Vec<_>>()
    };
    let three = server.wait("three claims", |server| Some(claims(server)).filter(|claims| claims.len() == 3));
    let set = server.wait("a StatefulSet", |server| server.get("statefulsets", NAMESPACE, "chat"));
    for (number, claim) in three.iter().enumerate() {
        let node = json!({"status": {"nodeName": format!("node-{number}"), "conditions": [{"type": "Ready", "status": "True"}]}});
        server.merge("nodeclaims", "", claim["metadata"]["name"].as_str().unwrap(), &node);
        // The second node's server is the one that goes.
        if number != 1 {
            server.put(
                "pods",
                json!({
                    "metadata": {
                        "name": format!("chat-{number}"), "namespace": NAMESPACE,
                        "labels": set["spec"]["template"]["metadata"]["labels"],
                    },
                    "spec": {"nodeName": format!("node-{number}"), "containers": []}, "status": {},
                }),
            );
        }
    }
    server.wait("all there", |server| {
        let workspace = server.get("workspaces", NAMESPACE, "chat")?;
        condition(&workspace, "NodeClaimReady").starts_with("True").then_some(())
    });
    server.merge("workspaces", NAMESPACE, "chat", &json!({"resource": {"count": 2}}));
    let two = server.wait("two claims", |server| Some(claims(server)).filter(|claims| claims.len() == 2));
    let nodes: Vec<&str> = two.iter().map(|claim| claim["status"]["nodeName"].as_str().unwrap()).collect();
    assert!(!nodes.contains(&"node-1"), "{nodes:?}");
    // One that is lost is asked for again.
    let lost = two[0]["metadata"]["name"].as_str().unwrap().to_owned();
    server.delete("nodeclaims", "", &lost, "background");
    server.wait("two again", |server| {
        let names = claims(server);
        (names.len() == 2 && names.iter().all(|claim| claim["metadata"]["name"] != *lost)).then_some(())
    });
    server.delete("workspaces", NAMESPACE, "chat", "background");
    server.wait("none", |server| claims(server).is_empty().then_some(()));
}

/// Returns a port of this machine that was free just now.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Returns the webhook's answer to an AdmissionReview over TLS, requested as the API server does: by the Service's
/// name, and with trust in the bundle of the ValidatingWebhookConfiguration alone. Error: curl's message.
fn reviewed(server: &ApiServer, port: u16, review: &Value) -> Result<Value, String> {
    let trust = || server.get("validatingwebhookconfigurations", "", "validation.hone.sh");
    loop {
        let before = trust();
        let said = reviewed_once(server, port, review);
        // An API server asks with the newest trust; this one was overtaken.
        if said.is_ok() || trust() == before {
            return said;
        }
    }
}

fn reviewed_once(server: &ApiServer, port: u16, review: &Value) -> Result<Value, String> {
    let configuration = server.get("validatingwebhookconfigurations", "", "validation.hone.sh").unwrap();
    let bundle = configuration["webhooks"][0]["clientConfig"]["caBundle"].as_str().unwrap_or_default();
    let folder = tempfile::tempdir().unwrap();
    let (file, body) = (folder.path().join("ca.crt"), folder.path().join("review.json"));
    std::fs::write(&file, decoded(bundle)).unwrap();
    std::fs::write(&body, review.to_string()).unwrap();
    let host = format!("hone-webhook.hone-system.svc:{port}");
    let asked = std::process::Command::new("curl")
        .args(["-sS", "--fail", "--max-time", "10", "--noproxy", "*", "--cacert"])
        .arg(&file)
        .args(["--connect-to", &format!("{host}:127.0.0.1:{port}"), "-H", "Content-Type: application/json"])
        .arg("--data-binary")
        .arg(format!("@{}", body.display()))
        .arg(format!("https://{host}/validate"))
        .output()
        .unwrap();
    match asked.status.success() {
        true => Ok(serde_json::from_slice(&asked.stdout).unwrap()),
        false => Err(String::from_utf8_lossy(&asked.stderr).into_owned()),
    }
}

/// Returns bytes of a text in base64, as objects carry them.
fn decoded(text: &str) -> Vec<u8> {
    let bytes: k8s_openapi::ByteString = serde_json::from_value(json!(text)).unwrap();
    bytes.0
}

fn review(uid: &str, operation: &str, object: &Value, old: &Value) -> Value {
    json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": {
        "uid": uid, "operation": operation, "namespace": NAMESPACE, "name": "w", "object": object, "oldObject": old,
    }})
}

#[test]
fn workspaces_are_reviewed_over_tls_with_certificates_that_are_renewed() {
    let server = ApiServer::start().without("nodeclaims").without("nodepools");
    let (port, health) = (free_port(), free_port());
    let webhook = controller::webhook::Options {
        address: format!("127.0.0.1:{port}").parse().unwrap(),
        valid: Duration::from_secs(6),
        pause: Duration::from_millis(200),
    };
    let _running = start(server.config(), |options| {
        options.address = format!("127.0.0.1:{health}").parse().unwrap();
        options.webhook = Some(webhook.clone());
    });
    // Another replica, which shares the Secret and may be the one that renews.
    let other = free_port();
    let _other = start(server.config(), |options| {
        options.elect = true;
        options.identity = "two".into();
        let address = format!("127.0.0.1:{other}").parse().unwrap();
        options.webhook = Some(controller::webhook::Options { address, ..webhook.clone() });
    });
    let health = format!("127.0.0.1:{health}").parse().unwrap();
    server.wait("what is missing", |_| {
        readyz(health)
            .contains("ValidatingWebhookConfiguration validation.hone.sh is not installed")
            .then_some(())
    });
    let [configuration] = controller::install::webhook()
        .into_iter()
        .filter(|object| object["kind"] == "ValidatingWebhookConfiguration")
        .collect::<Vec<_>>()
        .try_into()
        .unwrap();
    server.put("validatingwebhookconfigurations", configuration);
    server.wait("ready", |_| readyz(health).starts_with("HTTP/1.1 200").then_some(()));

    let good = workspace("w");
    let said = reviewed(&server, port, &review("u-1", "CREATE", &good, &Value::Null)).unwrap();
    assert_eq!(
        (said["kind"].as_str(), said["apiVersion"].as_str()),
        (Some("AdmissionReview"), Some("admission.k8s.io/v1"))
    );
    assert_eq!(said["response"], json!({"uid": "u-1", "allowed": true, "warnings": []}));
    let mut wrong = good.clone();
    wrong["tuning"]["preset"]["name"] = json!("phi-3-mini-4k-instrct");
    let said = reviewed(&server, port, &review("u-2", "CREATE", &wrong, &Value::Null)).unwrap();
    assert_eq!(
        (&said["response"]["allowed"], &said["response"]["status"]["code"]),
        (&json!(false), &json!(422))
    );
    let message = said["response"]["status"]["message"].as_str().unwrap();
    assert!(
        message.contains("tuning.preset.name") && message.contains("phi-3-mini-4k-instruct"),
        "{message}"
    );
    // An error that the controller would refuse later is reported now; its own writes to a wrong Workspace pass.
    let mut annotated = wrong.clone();
    annotated["metadata"]["finalizers"] = json!(["hone.sh/nodes"]);
    let said = reviewed(&server, port, &review("u-3", "UPDATE", &annotated, &wrong)).unwrap();
    assert_eq!(said["response"]["allowed"], true);
    // A configuration that is there counts; a mistake in it is a warning.
    let mut configured = good.clone();
    configured["tuning"]["config"] = json!("mine");
    server.put(
        "configmaps",
        json!({
            "metadata": {"name": "mine", "namespace": NAMESPACE},
            "data": {"training_config.yaml": "training_config: {LoraConfig: {rank: 8}}"},
        }),
    );
    let said = reviewed(&server, port, &review("u-4", "CREATE", &configured, &Value::Null)).unwrap();
    let warning = said["response"]["warnings"][0].as_str().unwrap();
    assert!(said["response"]["allowed"] == true && warning.contains("LoraConfig.rank"), "{said}");

    // Another certificate after two thirds of six seconds, and no request fails meanwhile.
    let secret = || server.get("secrets", "hone-system", "hone-webhook").unwrap()["data"]["tls.crt"].clone();
    let (before, begun) = (secret(), Instant::now());
    let mut asked = 0;
    while secret() == before {
        assert!(begun.elapsed() < Duration::from_secs(20), "it is not renewed");
        for port in [port, other] {
            reviewed(&server, port, &review("u-5", "CREATE", &good, &Value::Null)).unwrap();
        }
        asked += 1;
    }
    for _ in 0..10 {
        for port in [port, other] {
            reviewed(&server, port, &review("u-6", "CREATE", &good, &Value::Null)).unwrap();
        }
        asked += 1;
    }
    assert!(asked > 10);
    // A trust that somebody takes away is written again.
    let name = "validation.hone.sh";
    let mut stripped = server.get("validatingwebhookconfigurations", "", name).unwrap();
    stripped["webhooks"][0]["clientConfig"].as_object_mut().unwrap().remove("caBundle");
    server.put("validatingwebhookconfigurations", stripped);
    server.wait("the trust", |server| {
        let found = server.get("validatingwebhookconfigurations", "", name)?;
        found["webhooks"][0]["clientConfig"]["caBundle"].is_string().then_some(())
    });
    reviewed(&server, port, &review("u-7", "CREATE", &good, &Value::Null)).unwrap();

    // A Secret that somebody spoils is made again.
    let spoiled = json!({"data": {"tls.key": "bm9uc2Vuc2U="}});
    server.merge("secrets", "hone-system", "hone-webhook", &spoiled);
    server.wait("another key", |server| {
        let secret = server.get("secrets", "hone-system", "hone-webhook")?;
        (secret["data"]["tls.key"] != spoiled["data"]["tls.key"]).then_some(())
    });
    // Both may have made another key at first; one of them stays.
    let answers = |id: &str, server: &ApiServer| {
        let ask = |port| reviewed(server, port, &review(id, "CREATE", &good, &Value::Null)).ok();
        ask(port).and(ask(other)).map(|_| ())
    };
    server.wait("both answer", |server| answers("u-9", server));

    // A body that is no review gets no verdict, and the server goes on.
    server.wait("a refusal", |server| {
        let told = reviewed(server, port, &json!({"request": {}})).unwrap_err();
        told.contains("400").then_some(())
    });
    let mut plain = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    std::io::Write::write_all(&mut plain, b"POST /validate HTTP/1.1\r\nhost: h\r\n\r\n").unwrap();
    server.wait("both answer still", |server| answers("u-8", server));
}

/// With KUBECONFIG: Workspaces that tune and serve, with a mistake, mended, changed and deleted, in a namespace of
/// their own. The same story runs against the server in memory, so that it is known to hold.
#[test]
fn a_real_cluster_gives_the_same() {
    let server = ApiServer::start().without("nodeclaims").without("nodepools");
    real::run(|| Some((server.config_of_admin(), server.config())));
    if std::env::var_os("KUBECONFIG").is_none() {
        eprintln!("KUBECONFIG is not set: no real cluster to ask");
        return;
    }
    real::run(|| None);
}

mod real {
    use super::*;
    use kube::api::{Api, DeleteParams, DynamicObject, Patch, PatchParams, PostParams};
    use kube::core::{ApiResource, GroupVersionKind};

    /// Returns the user's configuration and the controller's; `None`: both are what KUBECONFIG names.
    pub fn run(configs: impl FnOnce() -> Option<(kube::Config, kube::Config)>) {
        hone::source::install_crypto();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (user, config) = match configs() {
                Some(both) => both,
                None => {
                    let config = kube::Config::infer().await.unwrap();
                    (config.clone(), config)
                }
            };
            let client = kube::Client::try_from(user).unwrap();
            let namespace = format!("hone-test-{}", std::process::id());
            apply(
                &client,
                "apiextensions.k8s.io",
                "v1",
                "CustomResourceDefinition",
                hone::workspace::crd::definition(),
            )
            .await;
            let definitions = resource("apiextensions.k8s.io", "v1", "CustomResourceDefinition");
            let definitions = Api::<DynamicObject>::all_with(client.clone(), &definitions);
            until(&definitions, "workspaces.kaito.sh", |found| {
                let conditions = found.data["status"]["conditions"].as_array().cloned().unwrap_or_default();
                conditions.iter().any(|one| one["type"] == "Established" && one["status"] == "True")
            })
            .await;
            let space = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}});
            apply(&client, "", "v1", "Namespace", space).await;
            let only = namespace.clone();
            let running = start(config, |options| options.namespace = Some(only));
            let story = async {
                serves(&client, &namespace).await;
                tunes(&client, &namespace).await;
            };
            let outcome = tokio::time::timeout(Duration::from_secs(300), story).await;
            let namespaces = Api::<DynamicObject>::all_with(client, &resource("", "v1", "Namespace"));
            namespaces.delete(&namespace, &DeleteParams::default()).await.unwrap();
            outcome.expect("within five minutes");
            drop(running);
        });
    }

    /// Changes a server's objects by its Workspace and by hand.
    async fn serves(client: &kube::Client, namespace: &str) {
        let workspaces = api(client, namespace, "kaito.sh", "v1beta1", "Workspace");
        let [sets, services, maps] = [("apps", "StatefulSet"), ("", "Service"), ("", "ConfigMap")]
            .map(|(g, k)| api(client, namespace, g, "v1", k));
        let adapters = |strength: &str| json!([{"source": {"name": "support", "image": "h.example/adapter:1"}, "strength": strength}]);
        let mut wanted = serving("chat", adapters("1.0"));
        // If hone's own Deployment runs too, both write the same.
        let image = "registry.example.com/hone:1";
        wanted["metadata"] = json!({"name": "chat", "annotations": {"hone.sh/image": image}});
        let wanted: DynamicObject = serde_json::from_value(wanted).unwrap();
        workspaces.create(&PostParams::default(), &wanted).await.unwrap();
        until(&workspaces, "chat", |found| found.data["status"]["state"] == "Pending").await;
        until(&services, "chat", |found| found.data["spec"]["ports"][0]["port"] == 80).await;
        let before = sets.get("chat").await.unwrap();
        let change = json!({"inference": {"adapters": adapters("0.5")}});
        workspaces.patch("chat", &PatchParams::default(), &Patch::Merge(&change)).await.unwrap();
        until(&maps, "chat-adapters", |map| map.data["data"]["adapters.json"].to_string().contains("0.5"))
            .await;
        let uid = services.get("chat").await.unwrap().metadata.uid;
        services.delete("chat", &DeleteParams::default()).await.unwrap();
        until(&services, "chat", |found| found.metadata.uid != uid).await;
        let scaled = json!({"spec": {"replicas": 3}});
        sets.patch("chat", &PatchParams::default(), &Patch::Merge(&scaled)).await.unwrap();
        until(&sets, "chat", |set| set.data["spec"]["replicas"] == 1).await;
        let after = sets.get("chat").await.unwrap();
        assert_eq!(after.data["spec"]["template"], before.data["spec"]["template"], "no pod starts again");
        workspaces.delete("chat", &DeleteParams::default()).await.unwrap();
    }

    async fn tunes(client: &kube::Client, namespace: &str) {
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
        // An API server alone collects no garbage; then this object of nobody stays too.
        let maps = api(client, namespace, "", "v1", "ConfigMap");
        let owner = json!([{"apiVersion": "v1", "kind": "ConfigMap", "name": "nobody", "uid": "0a0a0a0a-0000-4000-8000-000000000000"}]);
        let nobodys = json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "of-nobody", "ownerReferences": owner},
        });
        maps.create(&PostParams::default(), &serde_json::from_value(nobodys).unwrap()).await.unwrap();
        workspaces.delete("w", &DeleteParams::default()).await.unwrap();
        let begun = Instant::now();
        while jobs.get_opt("w").await.unwrap().is_some() {
            tokio::time::sleep(Duration::from_millis(200)).await;
            if begun.elapsed() > Duration::from_secs(60) && maps.get_opt("of-nobody").await.unwrap().is_some()
            {
                eprintln!(
                    "this cluster collects no garbage: the Job of a deleted Workspace is not looked for"
                );
                return;
            }
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
