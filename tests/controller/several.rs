//! Workspaces that train on several nodes: their Jobs, and the reports about their pods.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{
    ApiServer, NAMESPACE, annotation, condition, controlled, ended, job, job_status, revision, start, state,
    wait_message, wait_message_in, workspace,
};

fn set_of(name: &str, count: u32) -> Value {
    let mut wanted = workspace(name);
    wanted["resource"]["count"] = json!(count);
    wanted["metadata"]["annotations"] = json!({"hone.sh/work-claim": "shared"});
    wanted
}

/// Creates a pod of the set. `attempt` numbers the pods of one index, and sets the second in which the pod was created.
fn pod(server: &ApiServer, name: &str, index: u32, attempt: u32, status: Value) {
    let job = job(server, name);
    let mut labels = job["spec"]["template"]["metadata"]["labels"].clone();
    labels["batch.kubernetes.io/job-completion-index"] = json!(index.to_string());
    let placed = status["conditions"].is_null();
    server.put("pods", json!({
        "metadata": {
            "name": format!("{name}-{index}-{attempt}"), "namespace": NAMESPACE, "labels": labels,
            "creationTimestamp": format!("2026-01-01T00:00:{attempt:02}Z"),
            "ownerReferences": [{
                "apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": job["metadata"]["uid"], "controller": true,
            }],
        },
        "spec": if placed { json!({"nodeName": format!("node-{index}"), "containers": []}) } else { json!({"containers": []}) },
        "status": status,
    }));
}

fn in_state(name: &str, state: Value) -> Value {
    json!({"containerStatuses": [{
        "name": name, "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": state,
    }]})
}

fn running(name: &str) -> Value {
    in_state(name, json!({"running": {"startedAt": "2026-01-01T00:00:00Z"}}))
}

fn unscheduled(message: &str) -> Value {
    json!({"conditions": [
        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message},
    ]})
}

fn ok() -> Value {
    json!({"code": 0, "kind": "ok", "step": 9, "loss": 0.5, "image": "h/adapter:1", "digest": "sha256:abc"})
}

#[test]
fn a_set_trains_as_one() {
    let (server, _controller) = controlled();
    server.put("workspaces", set_of("w", 3));
    let made = job(&server, "w");
    let spec = &made["spec"];
    assert_eq!(
        (&spec["completionMode"], &spec["completions"], &spec["parallelism"]),
        (&json!("Indexed"), &json!(3), &json!(3))
    );
    let service = server.get("services", NAMESPACE, "w-ranks").unwrap();
    let uid = server.get("workspaces", NAMESPACE, "w").unwrap()["metadata"]["uid"].clone();
    assert_eq!(service["metadata"]["ownerReferences"][0]["uid"], uid);
    let requests = server.requests();
    let at = |part: &str| {
        requests.iter().position(|request| request.starts_with("POST") && request.contains(part))
    };
    assert!(at("/services") < at("/jobs"), "pods look for each other at once");

    job_status(&server, "w", json!({"active": 3}));
    pod(&server, "w", 0, 1, running("w"));
    pod(&server, "w", 1, 1, unscheduled("0/2 nodes"));
    pod(&server, "w", 2, 1, unscheduled("0/2 nodes"));
    wait_message_in(&server, "w", "Running", "waiting: pods 1, 2: Unschedulable: 0/2 nodes; 1 of 3 pods run");
    let part = state(&server, "w", "Running");
    assert_eq!(part["status"]["targetNodeCount"], 3);
    let told = condition(&part, "ResourceReady");
    assert!(told.ends_with("runs on node-0; 2 pods have no node yet"), "{told}");

    server.set_log(NAMESPACE, "w-0-1", "{\"step\":4,\"loss\":1.5,\"eta_seconds\":75.0}\n");
    server.set_log(NAMESPACE, "w-1-1", "{\"step\":4,\"loss\":99.0,\"eta_seconds\":75.0}\n");
    pod(&server, "w", 1, 1, running("w"));
    pod(&server, "w", 2, 1, running("w"));
    let whole = wait_message(&server, "w", "tuning job is running; step 4, loss 1.5000");
    assert_eq!(whole["status"]["workerNodes"], json!(["node-0", "node-1", "node-2"]));
    let told = condition(&whole, "ResourceReady");
    assert!(told.ends_with("runs on node-0, node-1, node-2"), "{told}");

    // Its Service is not to be missing while pods may be created anew.
    server.delete("services", NAMESPACE, "w-ranks", "background");
    server.wait("the Service again", |server| server.get("services", NAMESPACE, "w-ranks"));

    pod(&server, "w", 0, 1, in_state("w", ended(0, &ok(), 1)));
    let lost = json!({"code": 22, "kind": "device", "message": "rank 0 has ended"});
    pod(&server, "w", 1, 1, in_state("w", ended(22, &lost, 5)));
    let complete = json!([{"type": "Complete", "status": "True", "reason": "SuccessPolicy", "message": "m"}]);
    job_status(&server, "w", json!({"active": null, "succeeded": 1, "failed": 1, "conditions": complete}));
    let done = state(&server, "w", "Succeeded");
    assert_eq!(
        condition(&done, "WorkspaceSucceeded"),
        "True workspaceSucceeded workspace succeeds: pushed h/adapter:1 (sha256:abc); 9 steps, loss 0.5000"
    );
    server.wait("the digest", |server| {
        annotation(&server.get("workspaces", NAMESPACE, "w")?, "digest")
            .filter(|digest| digest == "sha256:abc")
    });
}

#[test]
fn the_pod_that_failed_is_named_and_not_those_that_ended_with_it() {
    let (server, _controller) = controlled();
    server.put("workspaces", set_of("w", 2));
    job(&server, "w");
    job_status(&server, "w", json!({"active": 2}));
    let lost = json!({"code": 22, "kind": "device", "message": "rank 1 has ended"});
    let killed = json!({"terminated": {
        "exitCode": 137, "reason": "OOMKilled", "finishedAt": "2026-01-01T01:00:01Z",
    }});
    pod(&server, "w", 1, 1, in_state("w", killed));
    pod(&server, "w", 0, 1, in_state("w", ended(22, &lost, 20)));
    job_status(&server, "w", json!({"active": null, "failed": 2}));
    wait_message_in(
        &server,
        "w",
        "Running",
        "tried again after 1 failed: pod 1: exit code 137 (OOMKilled): killed for its memory; raise hone.sh/memory",
    );
    job_status(&server, "w", json!({"active": 2, "failed": 2}));
    pod(&server, "w", 0, 2, running("w"));
    pod(&server, "w", 1, 2, running("w"));
    let again = server.wait("all again", |server| {
        let workspace = server.get("workspaces", NAMESPACE, "w")?;
        (!condition(&workspace, "WorkspaceSucceeded").contains("pods run")).then_some(workspace)
    });
    assert!(
        condition(&again, "WorkspaceSucceeded").contains("tried again after 1 failed: pod 1"),
        "{again:#}"
    );

    // Kubernetes stops the others when one fails for good.
    let data = json!({"code": 11, "kind": "data", "message": "row 3 is empty", "help": "look at it"});
    pod(&server, "w", 1, 2, in_state("w", ended(11, &data, 40)));
    pod(&server, "w", 0, 2, in_state("w", ended(30, &json!({"code": 30, "kind": "interrupted"}), 55)));
    let failed = json!([{"type": "Failed", "status": "True", "reason": "PodFailurePolicy", "message": "m"}]);
    job_status(&server, "w", json!({"active": null, "failed": 3, "conditions": failed}));
    let failed = state(&server, "w", "Failed");
    assert_eq!(
        condition(&failed, "WorkspaceSucceeded"),
        "False workspaceFailed workspace failed: pod 1: exit code 11 (data): row 3 is empty; look at it"
    );
    server.wait("the code", |server| {
        annotation(&server.get("workspaces", NAMESPACE, "w")?, "exit-code").filter(|code| code == "11")
    });
}

/// A pod is moved off its node, which Karpenter takes away: the node is asked for again, and nothing counts as failed.
#[test]
fn a_pod_that_is_moved_costs_a_node_and_no_retry() {
    let server = ApiServer::start();
    let _controller = start(server.config(), |_| {});
    server.put("workspaces", set_of("w", 2));
    job(&server, "w");
    let names = |server: &ApiServer| -> Vec<String> {
        let claims = server.list("nodeclaims").into_iter();
        claims.map(|claim| claim["metadata"]["name"].as_str().unwrap().to_owned()).collect()
    };
    let two = || server.wait("two claims", |server| Some(names(server)).filter(|names| names.len() == 2));
    let first = two();
    job_status(&server, "w", json!({"active": 2}));
    pod(&server, "w", 0, 1, running("w"));
    pod(&server, "w", 1, 1, running("w"));
    server.wait("both", |server| {
        let workspace = server.get("workspaces", NAMESPACE, "w")?;
        (workspace["status"]["workerNodes"] == json!(["node-0", "node-1"])).then_some(())
    });

    let stopped = json!({"code": 30, "kind": "interrupted", "message": "a checkpoint was written"});
    let mut moved = in_state("w", ended(30, &stopped, 1));
    moved["conditions"] =
        json!([{"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}]);
    pod(&server, "w", 1, 1, moved);
    pod(&server, "w", 0, 1, in_state("w", ended(30, &stopped, 2)));
    server.delete("nodeclaims", "", &first[1], "background");
    // Both were ignored by the policy, so none is counted.
    job_status(&server, "w", json!({"active": 2}));
    pod(&server, "w", 0, 2, running("w"));
    pod(&server, "w", 1, 2, unscheduled("0/1 nodes"));
    wait_message_in(&server, "w", "Running", "waiting: pod 1: Unschedulable: 0/1 nodes; 1 of 2 pods run");
    let again = two();
    assert!(again.contains(&first[0]), "the other node stays: {first:?} {again:?}");
    job_status(
        &server,
        "w",
        json!({"active": null, "succeeded": 1, "conditions": [
            {"type": "Complete", "status": "True", "reason": "SuccessPolicy", "message": "m"},
        ]}),
    );
    server.wait("no claims", |server| names(server).is_empty().then_some(()));
}

#[test]
fn a_service_of_somebody_else_is_told_and_waited_for() {
    let (server, _controller) = controlled();
    let theirs =
        json!({"metadata": {"name": "w-ranks", "namespace": NAMESPACE}, "spec": {"clusterIP": "None"}});
    server.put("services", theirs);
    server.put("workspaces", set_of("w", 2));
    wait_message_in(&server, "w", "Failed", "Service w-ranks is not of this Workspace");
    assert!(server.get("jobs", NAMESPACE, "w").is_none());
    server.delete("services", NAMESPACE, "w-ranks", "background");
    assert_eq!(revision(&job(&server, "w")), "1");
    state(&server, "w", "Pending");

    server.refuse("POST", "services", Some("services \"v-ranks\" is forbidden: exceeded quota"));
    server.put("workspaces", set_of("v", 2));
    wait_message_in(&server, "v", "Failed", "the API server refuses its Service: ");
    server.refuse("POST", "services", None);
    job(&server, "v");
}

/// A set costs one request more than a Job on one node: its Service.
#[test]
fn a_set_at_rest_costs_no_request() {
    let cost = |count: u32| {
        let (server, _controller) = controlled();
        server.put("workspaces", set_of("w", count));
        job(&server, "w");
        job_status(&server, "w", json!({"active": count}));
        for index in 0..count {
            pod(&server, "w", index, 1, running("w"));
        }
        let nodes: Vec<String> = (0..count).map(|index| format!("node-{index}")).collect();
        server.wait("all pods", |server| {
            let workspace = server.get("workspaces", NAMESPACE, "w")?;
            (workspace["status"]["workerNodes"] == json!(nodes)).then_some(())
        });
        let quiet = || server.requests().iter().filter(|request| !request.contains("/events")).count();
        server.wait("rest", |_| {
            let before = quiet();
            std::thread::sleep(std::time::Duration::from_millis(500));
            (quiet() == before).then_some(())
        });
        let posts = server
            .requests()
            .iter()
            .filter(|request| request.starts_with("POST"))
            .cloned()
            .collect::<Vec<_>>();
        // A watch that is behind makes the controller ask for the Service again; the server says that it is there.
        posts.into_iter().filter(|request| !request.contains("/events")).collect::<BTreeSet<_>>()
    };
    let (set, one) = (cost(4), cost(1));
    assert_eq!(set.len(), one.len() + 1, "{set:#?} {one:#?}");
}
