//! From a Workspace to what a cluster gets: rendered Jobs, refusals, and the files below jobs/.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use expect_test::{Expect, expect};
use hone::fault::Kind;
use hone::workspace::kind::Workspace;
use hone::workspace::{Asked, Rendered, Settings, config_name, files, inputs_hash, render, yaml};
use k8s_openapi::api::batch::v1::Job;
use serde_json::{Value, json};

/// A Workspace like those of the examples, changed by `change`.
fn workspace(change: impl FnOnce(&mut Value)) -> Workspace {
    let mut value = json!({
        "apiVersion": "kaito.sh/v1beta1", "kind": "Workspace", "metadata": {"name": "tune"},
        "resource": {
            "instanceType": "Standard_NC24ads_A100_v4", "labelSelector": {"matchLabels": {"app": "tuning"}},
        },
        "tuning": {
            "preset": {"name": "phi-3-mini-4k-instruct"}, "method": "qlora",
            "input": {"urls": ["https://host/a.parquet"]},
            "output": {"image": "registry.example.com/adapter:1", "imagePushSecret": "login"},
        },
    });
    change(&mut value);
    serde_json::from_value(value).unwrap()
}

fn rendered(workspace: &Workspace, config: Option<&str>) -> hone::fault::Result<Rendered> {
    render(&Asked { workspace, config, settings: &Settings::default(), revision: 1 })
}

fn job(workspace: &Workspace) -> Value {
    json!(rendered(workspace, None).unwrap().job)
}

fn pod(job: &Value) -> &Value {
    &job["spec"]["template"]["spec"]
}

fn container(job: &Value) -> &Value {
    &pod(job)["containers"][0]
}

/// Mounts as `volume -> path`, each with its source.
fn mounts(job: &Value) -> String {
    let mut text = String::new();
    for (volume, mount) in
        pod(job)["volumes"].as_array().unwrap().iter().zip(container(job)["volumeMounts"].as_array().unwrap())
    {
        assert_eq!(volume["name"], mount["name"]);
        let mut source = volume.as_object().unwrap().clone();
        source.remove("name");
        let (at, read_only) = (mount["mountPath"].as_str().unwrap(), mount["readOnly"] == true);
        let sub = mount["subPath"].as_str().map_or(String::new(), |sub| format!(" sub {sub}"));
        let mode = if read_only { " ro" } else { "" };
        text +=
            &format!("{} -> {at}{sub}{mode}: {}\n", volume["name"].as_str().unwrap(), Value::from(source));
    }
    text
}

fn arguments(job: &Value) -> String {
    container(job)["args"]
        .as_array()
        .unwrap()
        .iter()
        .map(|text| format!("{}\n", text.as_str().unwrap()))
        .collect()
}

fn refused(workspace: &Workspace, config: Option<&str>, kind: Kind, expected: Expect) {
    let fault = rendered(workspace, config).unwrap_err();
    assert_eq!(fault.kind, kind, "{fault}");
    expected.assert_eq(&format!("{fault}\n"));
}

#[test]
fn the_job_of_a_workspace_as_users_write_it() {
    let job = job(&workspace(|_| {}));
    expect![[r#""#]].assert_eq(&yaml::write(&[job]));
}

#[test]
fn every_input_and_output() {
    let claim = |name: &str| json!({"persistentVolumeClaim": {"claimName": name}});
    let inputs = [
        ("urls", json!({"urls": ["https://h/a.parquet?sig=x", "http://h/b.parquet"]})),
        ("image", json!({"name": "rows", "image": "h/data:1", "imagePullSecrets": ["pull", "login"]})),
        ("volume", json!({"volumeSource": claim("data")})),
    ];
    let outputs = [
        ("image", json!({"image": "h/adapter:1", "imagePushSecret": "login"})),
        ("volume", json!({"volumeSource": claim("adapters")})),
    ];
    let mut text = String::new();
    for (input_name, input) in &inputs {
        for (output_name, output) in &outputs {
            let job = job(&workspace(|value| {
                value["tuning"]["input"] = input.clone();
                value["tuning"]["output"] = output.clone();
            }));
            text += &format!("# {input_name} to {output_name}\n{}{}", arguments(&job), mounts(&job));
        }
    }
    expect![[r#""#]].assert_eq(&text);
}

#[test]
fn methods_versions_and_configurations() {
    let lora = workspace(|value| {
        value["apiVersion"] = json!("kaito.sh/v1alpha1");
        value["tuning"]["method"] = json!("LoRA");
    });
    let map = rendered(&lora, None).unwrap().config_map.unwrap();
    assert_eq!(map.metadata.name.as_deref(), Some("lora-params-template"));
    assert!(!map.data.unwrap()["training_config.yaml"].contains("load_in_4bit"));
    let named = workspace(|value| value["tuning"]["config"] = json!("mine"));
    assert_eq!(config_name(&named), "mine");
    refused(&named, None, Kind::Config, expect![[r#""#]]);
    let config = "training_config:\n  QuantizationConfig: {load_in_4bit: true}\n  TrainingArguments: {output_dir: out}\n";
    let rendered = rendered(&named, Some(config)).unwrap();
    assert_eq!(rendered.config_map, None);
    assert!(mounts(&json!(rendered.job)).contains("results-volume -> /mnt/out: "));
    let broken = config.replace("output_dir", "output_dri");
    refused(&named, Some(&broken), Kind::Config, expect![[r#""#]]);
    let taken = config.replace("out}", "/mnt/config/x}");
    refused(&named, Some(&taken), Kind::Config, expect![[r#""#]]);
}

#[test]
fn annotations_shape_the_job() {
    let job = job(&workspace(|value| {
        value["metadata"] = json!({
            "name": "tune", "namespace": "team", "uid": "u-1",
            "annotations": {
                "hone.sh/image": "registry.example.com/hone:1", "hone.sh/gpus": "0", "hone.sh/cpu": "4",
                "hone.sh/model": "oci://h/model:1", "hone.sh/cache-claim": "cache", "hone.sh/work-claim": "work",
                "hone.sh/queue-name": "q", "hone.sh/priority-class": "low", "hone.sh/service-account": "robot",
                "hone.sh/retries": "2", "hone.sh/deadline": "2h", "hone.sh/ttl": "1d", "hone.sh/grace-period": "60",
                "hone.sh/run-as-user": "1000", "hone.sh/ca-config-map": "ca", "hone.sh/spot": "false",
                "hone.sh/env": "HONE_LOG=terminal\nTOKEN=secret:keys/token",
                "hone.sh/config-overrides": "TrainingArguments.max_steps=3", "hone.sh/image-pull-secrets": "images",
            },
        });
    }));
    expect![[r#""#]].assert_eq(&yaml::write(&[job]));
}

#[test]
fn what_no_retry_helps_ends_the_job() {
    let job = job(&workspace(|_| {}));
    let rules = &job["spec"]["podFailurePolicy"]["rules"];
    assert_eq!(rules[0]["onPodConditions"], json!([{"type": "DisruptionTarget", "status": "True"}]));
    assert_eq!(
        (&rules[1]["action"], &rules[1]["onExitCodes"]["containerName"]),
        (&json!("FailJob"), &json!("tune"))
    );
    for kind in Kind::ALL {
        let listed = rules[1]["onExitCodes"]["values"].as_array().unwrap().contains(&json!(kind.exit_code()));
        assert_eq!(listed, !kind.retry_helps(), "{}", kind.name());
    }
    assert_eq!(pod(&job)["restartPolicy"], "Never", "a failure policy wants it");
}

#[test]
fn tolerations_are_kaitos() {
    let keys = |instance: &str| {
        let job = job(&workspace(|value| value["resource"]["instanceType"] = json!(instance)));
        let list = pod(&job)["tolerations"].as_array().unwrap().clone();
        list.iter().map(|toleration| toleration["key"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(keys("Standard_NC24ads_A100_v4"), ["gpu", "sku", "kubernetes.azure.com/scalesetpriority"]);
    assert_eq!(keys("p4d.24xlarge"), ["gpu", "sku"]);
}

#[test]
fn nodes_have_the_selectors_labels() {
    let job = job(&workspace(|value| {
        value["resource"]["labelSelector"] = json!({
            "matchLabels": {"app": "a", "zone": "b"},
            "matchExpressions": [{"key": "gpu", "operator": "Exists"}],
        });
    }));
    let terms = &pod(&job)["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"];
    let expected = json!([
        {"key": "app", "operator": "In", "values": ["a"]}, {"key": "zone", "operator": "In", "values": ["b"]},
        {"key": "gpu", "operator": "Exists"},
    ]);
    assert_eq!(terms["nodeSelectorTerms"], json!([{"matchExpressions": expected}]));
}

#[test]
fn gpus_of_the_instance_type_and_what_does_not_fit() {
    let on = |instance: &str, preset: &str| {
        workspace(|value| {
            value["resource"]["instanceType"] = json!(instance);
            value["tuning"]["preset"]["name"] = json!(preset);
        })
    };
    let gpus =
        |workspace: &Workspace| container(&job(workspace))["resources"]["limits"]["nvidia.com/gpu"].clone();
    assert_eq!(gpus(&on("Standard_NC24ads_A100_v4", "phi-4")), "1");
    assert_eq!(gpus(&on("Standard_NC96ads_A100_v4", "phi-4")), "4");
    assert_eq!(gpus(&on("", "phi-4")), "1");
    let told =
        |instance: &str, preset: &str| rendered(&on(instance, preset), None).unwrap().warnings.join("\n");
    expect![[r#""#]].assert_eq(&told("Standard_NC96ads_A100_v4", "phi-4"));
    expect![[r#""#]].assert_eq(&told("Standard_NC6s_v3", "phi-3-mini-4k-instruct"));
    expect![[r#""#]].assert_eq(&told("m7i.large", "phi-4"));
    assert_eq!(told("Standard_NC24ads_A100_v4", "phi-4"), "");
    refused(&on("g6.xlarge", "llama-3.3-70b-instruct"), None, Kind::Capacity, expect![[r#""#]]);
}

#[test]
fn what_is_rendered_is_understood_as_it_was_written() {
    for file in examples() {
        let Ok(applied) = files::apply(&[file.clone()], &Settings::default()) else { continue };
        let text = yaml::write(&applied.objects);
        for (document, object) in yaml::read("f", &text).unwrap().iter().zip(&applied.objects) {
            assert_eq!(&document.value, object, "{}", file.display());
            if document.kind() == "Job" {
                assert_eq!(&json!(document.typed::<Job>().unwrap()), object, "{}", file.display());
            }
        }
    }
}

#[test]
fn other_inputs_are_another_run_and_what_the_controller_writes_is_not() {
    let one = workspace(|_| {});
    let hash = |workspace: &Workspace| inputs_hash(workspace, "config");
    let other = |change: fn(&mut Value)| hash(&workspace(change)) != hash(&one);
    assert!(other(|value| value["tuning"]["input"]["urls"][0] = json!("https://host/b.parquet")));
    assert!(other(|value| value["metadata"]["annotations"] = json!({"hone.sh/gpus": "0"})));
    assert!(!other(
        |value| value["metadata"]["annotations"] = json!({"hone.sh/step": "7", "other/note": "x"})
    ));
    assert!(!other(|value| value["status"] = json!({"state": "Running"})));
    assert_ne!(inputs_hash(&one, "config"), inputs_hash(&one, "another"));
}

/// The two Workspaces that hone was first asked to serve, with their placeholders.
fn as_users_bring_them(name: &str) -> String {
    let preset = format!("phi-3-mini-{name}-instruct");
    std::fs::read_to_string(root("tests/fixtures/workspaces/phi-3-mini.yaml"))
        .unwrap()
        .replace("PRESET", &preset)
}

#[test]
fn placeholders_are_refused_and_names_render() {
    for name in ["4k", "128k"] {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("workspace.yaml");
        let text = as_users_bring_them(name);
        std::fs::write(&file, &text).unwrap();
        let fault = files::apply(&[file.clone()], &Settings::default()).unwrap_err();
        assert_eq!(fault.kind, Kind::Config);
        assert!(fault.message.contains("tuning.output.image"), "{fault}");
        let text = text.replace("ACR_REPO_HERE", "mine").replace("IMAGE_NAME_HERE", "adapter");
        std::fs::write(&file, text.replace("ACR_REGISTRY_SECRET_HERE", "login")).unwrap();
        let applied = files::apply(&[file], &Settings::default()).unwrap();
        let kinds: Vec<&Value> = applied.objects.iter().map(|object| &object["kind"]).collect();
        assert_eq!(kinds, ["ConfigMap", "Job"]);
        assert_eq!(applied.warnings.len(), 1, "a V100 is told: {:?}", applied.warnings);
    }
}

/// `UPDATE_JOBS=1 cargo test --test workspace` writes them.
#[test]
fn jobs_are_what_hone_renders() {
    for file in examples() {
        let Ok(applied) = files::apply(&[file.clone()], &Settings::default()) else {
            assert!(file.ends_with("serve-the-adapter.yaml"), "{}", file.display());
            continue;
        };
        let name = file.file_name().unwrap();
        let head = format!("# hone render -f examples/workspaces/{}\n", name.to_str().unwrap());
        same(&root("jobs").join(name), &(head + &yaml::write(&applied.objects)));
    }
}

fn same(file: &Path, expected: &str) {
    if std::env::var_os("UPDATE_JOBS").is_some() {
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, expected).unwrap();
    }
    let found = std::fs::read_to_string(file).unwrap_or_default();
    assert!(found == expected, "{}: run UPDATE_JOBS=1 cargo test --test workspace", file.display());
}

#[test]
fn flags_write_a_workspace_that_renders() {
    let flags = [
        "tune",
        "--preset",
        "microsoft/Phi-3-mini-4k-instruct",
        "--data",
        "https://h/a.parquet",
        "--push",
        "h.example/adapter:1",
        "--secret",
        "login",
        "--instance",
        "Standard_NC24ads_A100_v4",
        "--annotate",
        "work-claim=results",
    ];
    let tune = hone(&flags, "");
    assert!(tune.status.success());
    let written = String::from_utf8(tune.stdout).unwrap();
    expect![[r#""#]].assert_eq(&written);
    let render = hone(&["render", "-f", "-", "--format", "json"], &written);
    assert!(render.status.success(), "{}", String::from_utf8_lossy(&render.stderr));
    let list: Value = serde_json::from_slice(&render.stdout).unwrap();
    assert_eq!(
        (&list["kind"], &list["items"][1]["metadata"]["name"]),
        (&json!("List"), &json!("tune-phi-3-mini-4k-instruct"))
    );
    let refused = |flags: &[&str]| {
        let output = hone(flags, "");
        format!("{} {}", output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr))
    };
    expect![[r#""#]].assert_eq(&refused(&[
        "tune",
        "--preset",
        "gpt-oss-20b",
        "--data",
        "https://h/a",
        "--push",
        "h/a:1",
        "--secret",
        "s",
    ]));
    expect![[r#""#]].assert_eq(&refused(&[
        "tune",
        "--preset",
        "phi-4",
        "--data",
        "a.parquet",
        "--push",
        "h/a:1",
        "--secret",
        "s",
    ]));
    expect![[r#""#]].assert_eq(&refused(&[
        "tune",
        "--preset",
        "phi-4",
        "--data",
        "https://h/a",
        "--push",
        "h/a:1",
    ]));
}

#[test]
fn files_that_cannot_be_rendered() {
    let told = |text: &str| {
        let output = hone(&["render", "-f", "-"], text);
        format!("{} {}", output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr))
    };
    expect![[r#""#]].assert_eq(&told("kind: Secret\nmetadata: {name: s}\n"));
    expect![[r#""#]].assert_eq(&told(
        "kind: Workspace\napiVersion: kaito.sh/v2\nmetadata: {name: w}\ntuning: {method: qlora}\n",
    ));
    expect![[r#""#]].assert_eq(&told("kind: Workspace\nresource: {instanceTypo: x}\n"));
}

fn hone(arguments: &[&str], input: &str) -> Output {
    use std::io::Write;
    let mut child = Command::new(env!("CARGO_BIN_EXE_hone"))
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn examples() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root("examples/workspaces")).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> = entries.collect();
    files.sort();
    assert!(files.len() >= 5);
    files
}

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}
