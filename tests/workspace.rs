//! From a Workspace to the objects of a cluster: rendered Jobs, refusals, and the files below jobs/.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use expect_test::{Expect, expect};
use hone::controller::install;
use hone::fault::Kind;
use hone::workspace::crd;
use hone::workspace::kind::Workspace;
use hone::workspace::{Asked, Rendered, Settings, config_name, files, inputs_hash, render, yaml};
use k8s_openapi::api::batch::v1::Job;
use serde_json::{Value, json};

/// Returns a Workspace like those of the examples, changed by `change`.
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

/// Returns the mounts as `volume -> path`, each with its source.
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
    expect![[r#"
        apiVersion: batch/v1
        kind: Job
        metadata:
          annotations:
            workspace.kaito.io/revision: "1"
          labels:
            app.kubernetes.io/managed-by: hone
            kaito.sh/workspace: tune
          name: tune
        spec:
          backoffLimit: 6
          podFailurePolicy:
            rules:
            - action: Ignore
              onPodConditions:
              - status: "True"
                type: DisruptionTarget
            - action: FailJob
              onExitCodes:
                containerName: tune
                operator: In
                values:
                - 2
                - 10
                - 11
                - 12
                - 13
                - 14
                - 15
                - 70
          template:
            metadata:
              labels:
                app.kubernetes.io/managed-by: hone
                kaito.sh/workspace: tune
            spec:
              affinity:
                nodeAffinity:
                  requiredDuringSchedulingIgnoredDuringExecution:
                    nodeSelectorTerms:
                    - matchExpressions:
                      - key: app
                        operator: In
                        values:
                        - tuning
              automountServiceAccountToken: false
              containers:
              - args:
                - run
                - --config=/mnt/config/training_config.yaml
                - --model=oci://mcr.microsoft.com/aks/kaito/kaito-phi-3-mini-4k-instruct:0.2.0
                - --name=phi-3-mini-4k-instruct
                - --data=https://host/a.parquet
                - --push=registry.example.com/adapter:1
                env:
                - name: HONE_LOG
                  value: json
                - name: HONE_DEVICE
                  value: cuda
                - name: HONE_CACHE
                  value: /mnt/cache
                - name: HONE_OUTPUT
                  value: /mnt/results
                - name: HONE_EARLIER_RESULTS
                  value: move
                - name: HONE_METRICS
                  value: 0.0.0.0:5000
                - name: DEFAULT_TARGET_MODULES
                  value: k_proj,q_proj,v_proj,o_proj,gate_proj,down_proj,up_proj
                - name: HONE_DOCKER_CONFIG
                  value: /mnt/docker
                image: hone:cuda
                name: tune
                ports:
                - containerPort: 5000
                  name: metrics
                resources:
                  limits:
                    nvidia.com/gpu: "1"
                  requests:
                    cpu: "2"
                    ephemeral-storage: 24Gi
                    memory: 6Gi
                    nvidia.com/gpu: "1"
                securityContext:
                  allowPrivilegeEscalation: false
                  capabilities:
                    drop:
                    - ALL
                  readOnlyRootFilesystem: true
                terminationMessagePolicy: FallbackToLogsOnError
                volumeMounts:
                - mountPath: /mnt/config
                  name: config-volume
                  readOnly: true
                - mountPath: /mnt/results
                  name: results-volume
                - mountPath: /mnt/cache
                  name: cache-volume
                - mountPath: /tmp
                  name: tmp
                - mountPath: /mnt/docker
                  name: docker-config
                  readOnly: true
              enableServiceLinks: false
              imagePullSecrets:
              - name: login
              restartPolicy: Never
              securityContext:
                fsGroup: 65532
                fsGroupChangePolicy: OnRootMismatch
                runAsGroup: 65532
                runAsNonRoot: true
                runAsUser: 65532
                seccompProfile:
                  type: RuntimeDefault
              terminationGracePeriodSeconds: 300
              tolerations:
              - effect: NoSchedule
                key: gpu
                operator: Equal
              - effect: NoSchedule
                key: sku
                value: gpu
              - effect: NoSchedule
                key: kubernetes.azure.com/scalesetpriority
                operator: Equal
                value: spot
              volumes:
              - configMap:
                  name: qlora-params-template
                name: config-volume
              - emptyDir: {}
                name: results-volume
              - emptyDir: {}
                name: cache-volume
              - emptyDir: {}
                name: tmp
              - name: docker-config
                projected:
                  defaultMode: 288
                  sources:
                  - secret:
                      items:
                      - key: .dockerconfigjson
                        path: config.json
                      name: login
    "#]]
    .assert_eq(&yaml::write(&[job]));
}

#[test]
fn every_input_and_output() {
    let claim = |name: &str| json!({"persistentVolumeClaim": {"claimName": name}});
    let inputs = [
        ("urls", json!({"urls": ["https://h/a.parquet?sig=x", "http://h/b.parquet"]})),
        (
            "places",
            json!({"urls": ["hf://datasets/o/n#limit=9", "s3://b/rows/*.parquet", "gs://b/a.csv", "az://c/a.json", "oci://h/d:1"], "imagePullSecrets": ["pull"]}),
        ),
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
    expect![[r##"
        # urls to image
        run
        --config=/mnt/config/training_config.yaml
        --model=oci://mcr.microsoft.com/aks/kaito/kaito-phi-3-mini-4k-instruct:0.2.0
        --name=phi-3-mini-4k-instruct
        --data=https://h/a.parquet?sig=x
        --data=http://h/b.parquet
        --push=h/adapter:1
        config-volume -> /mnt/config ro: {"configMap":{"name":"qlora-params-template"}}
        results-volume -> /mnt/results: {"emptyDir":{}}
        cache-volume -> /mnt/cache: {"emptyDir":{}}
        tmp -> /tmp: {"emptyDir":{}}
        docker-config -> /mnt/docker ro: {"projected":{"defaultMode":288,"sources":[{"secret":{"items":[{"key":".dockerconfigjson","path":"config.json"}],"name":"login"}}]}}
        # urls to volume
        run
        --config=/mnt/config/training_config.yaml
        --model=oci://mcr.microsoft.com/aks/kaito/kaito-phi-3-mini-4k-instruct:0.2.0
        --name=phi-3-mini-4k-instruct
        --data=https://h/a.parquet?sig=x
        --data=http://h/b.parquet
        config-volume -> /mnt/config ro: {"configMap":{"name":"qlora-params-template"}}
        results-volume -> /mnt/results: {"persistentVolumeClaim":{"claimName":"adapters"}}
        cache-volume -> /mnt/cache: {"emptyDir":{}}
        tmp -> /tmp: {"emptyDir":{}}
        # places to image
        run
        --config=/mnt/config/training_config.yaml
        --model=oci://mcr.microsoft.com/aks/kaito/kaito-phi-3-mini-4k-instruct:0.2.0
        --name=phi-3-mini-4k-instruct
        --data=hf://datasets/o/n#limit=9
        --data=s3://b/rows/*.parquet
        --data=gs://b/a.csv
        --data=az://c/a.json
        --data=oci://h/d:1
        --push=h/adapter:1
        config-volume -> /mnt/config ro: {"configMap":{"name":"qlora-params-template"}}
        results-volume -> /mnt/results: {"emptyDir":{}}
        cache-volume -> /mnt/cache: {"emptyDir":{}}
        tmp -> /tmp: {"emptyDir":{}}
        docker-config -> /mnt/docker ro: {"projected":{"defaultMode":288,"sources":[{"secret":{"items":[{"key":".dockerconfigjson","path":"config.json"}],"name":"login"}},{"secret":{"items":[{"key":".dockerconfigjson","path":"config.d/pull.json"}],"name":"pull"}}]}}
        # places to volume
        run
        --config=/mnt/config/training_config.yaml
        --model=oci://mcr.microsoft.com/aks/kaito/kaito-phi-3-mini-4k-instruct:0.2.0
        --name=phi-3-mini-4k-instruct
        --data=hf://datasets/o/n#limit=9
        --data=s3://b/rows/*.parquet
        --data=gs://b/a.csv
        --data=az://c/a.json
        --data=oci://h/d:1
        config-volume -> /mnt/config ro: {"configMap":{"name":"qlora-params-template"}}
        results-volume -> /mnt/results: {"persistentVolumeClaim":{"claimName":"adapters"}}
        cache-volume -> /mnt/cache: {"emptyDir":{}}
        tmp -> /tmp: {"emptyDir":{}}
        docker-config -> /mnt/docker ro: {"projected":{"defaultMode":288,"sources":[{"secret":{"items":[{"key":".dockerconfigjson","path":"config.d/pull.json"}],"name":"pull"}}]}}
        # image to image
        run
        --config=/mnt/config/training_config.yaml
        --model=oci://mcr.microsoft.com/aks/kaito/kaito-phi-3-mini-4k-instruct:0.2.0
        --name=phi-3-mini-4k-instruct
        --data=oci://h/data:1
        --push=h/adapter:1
        config-volume -> /mnt/config ro: {"configMap":{"name":"qlora-params-template"}}
        results-volume -> /mnt/results: {"emptyDir":{}}
        cache-volume -> /mnt/cache: {"emptyDir":{}}
        tmp -> /tmp: {"emptyDir":{}}
        docker-config -> /mnt/docker ro: {"projected":{"defaultMode":288,"sources":[{"secret":{"items":[{"key":".dockerconfigjson","path":"config.json"}],"name":"login"}},{"secret":{"items":[{"key":".dockerconfigjson","path":"config.d/pull.json"}],"name":"pull"}}]}}
        # image to volume
        run
        --config=/mnt/config/training_config.yaml
        --model=oci://mcr.microsoft.com/aks/kaito/kaito-phi-3-mini-4k-instruct:0.2.0
        --name=phi-3-mini-4k-instruct
        --data=oci://h/data:1
        config-volume -> /mnt/config ro: {"configMap":{"name":"qlora-params-template"}}
        results-volume -> /mnt/results: {"persistentVolumeClaim":{"claimName":"adapters"}}
        cache-volume -> /mnt/cache: {"emptyDir":{}}
        tmp -> /tmp: {"emptyDir":{}}
        docker-config -> /mnt/docker ro: {"projected":{"defaultMode":288,"sources":[{"secret":{"items":[{"key":".dockerconfigjson","path":"config.d/pull.json"}],"name":"pull"}},{"secret":{"items":[{"key":".dockerconfigjson","path":"config.d/login.json"}],"name":"login"}}]}}
        # volume to image
        run
        --config=/mnt/config/training_config.yaml
        --model=oci://mcr.microsoft.com/aks/kaito/kaito-phi-3-mini-4k-instruct:0.2.0
        --name=phi-3-mini-4k-instruct
        --push=h/adapter:1
        config-volume -> /mnt/config ro: {"configMap":{"name":"qlora-params-template"}}
        results-volume -> /mnt/results: {"emptyDir":{}}
        data-volume -> /mnt/data: {"persistentVolumeClaim":{"claimName":"data"}}
        cache-volume -> /mnt/cache: {"emptyDir":{}}
        tmp -> /tmp: {"emptyDir":{}}
        docker-config -> /mnt/docker ro: {"projected":{"defaultMode":288,"sources":[{"secret":{"items":[{"key":".dockerconfigjson","path":"config.json"}],"name":"login"}}]}}
        # volume to volume
        run
        --config=/mnt/config/training_config.yaml
        --model=oci://mcr.microsoft.com/aks/kaito/kaito-phi-3-mini-4k-instruct:0.2.0
        --name=phi-3-mini-4k-instruct
        config-volume -> /mnt/config ro: {"configMap":{"name":"qlora-params-template"}}
        results-volume -> /mnt/results: {"persistentVolumeClaim":{"claimName":"adapters"}}
        data-volume -> /mnt/data: {"persistentVolumeClaim":{"claimName":"data"}}
        cache-volume -> /mnt/cache: {"emptyDir":{}}
        tmp -> /tmp: {"emptyDir":{}}
    "##]].assert_eq(&text);
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
    refused(
        &named,
        None,
        Kind::Config,
        expect![[r#"
        tuning.config: there is no ConfigMap mine in namespace default
          help: apply it, or give its file with -f; without tuning.config the method's default is used
    "#]],
    );
    let config = "training_config:\n  QuantizationConfig: {load_in_4bit: true}\n  TrainingArguments: {output_dir: out}\n";
    let rendered = rendered(&named, Some(config)).unwrap();
    assert_eq!(rendered.config_map, None);
    assert!(mounts(&json!(rendered.job)).contains("results-volume -> /mnt/out: "));
    let broken = config.replace("output_dir", "output_dri");
    refused(
        &named,
        Some(&broken),
        Kind::Config,
        expect![[r#"
        ConfigMap mine:3:23: TrainingArguments.output_dri is not a key; did you mean output_dir?
          help: `hone keys` lists every key; `hone plan` shows what a configuration resolves to
    "#]],
    );
    let taken = config.replace("out}", "/mnt/config/x}");
    refused(
        &named,
        Some(&taken),
        Kind::Config,
        expect![[r#"
        TrainingArguments.output_dir: /mnt/config/x lies in /mnt/config, which holds something else
          help: leave output_dir out, or name another folder below /mnt
    "#]],
    );
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
    expect![[r#"
        apiVersion: batch/v1
        kind: Job
        metadata:
          annotations:
            workspace.kaito.io/revision: "1"
          labels:
            app.kubernetes.io/managed-by: hone
            kaito.sh/workspace: tune
            kueue.x-k8s.io/queue-name: q
          name: tune
          namespace: team
          ownerReferences:
          - apiVersion: kaito.sh/v1beta1
            blockOwnerDeletion: true
            controller: true
            kind: Workspace
            name: tune
            uid: u-1
        spec:
          activeDeadlineSeconds: 7200
          backoffLimit: 2
          podFailurePolicy:
            rules:
            - action: Ignore
              onPodConditions:
              - status: "True"
                type: DisruptionTarget
            - action: FailJob
              onExitCodes:
                containerName: tune
                operator: In
                values:
                - 2
                - 10
                - 11
                - 12
                - 13
                - 14
                - 15
                - 70
          suspend: true
          template:
            metadata:
              labels:
                app.kubernetes.io/managed-by: hone
                azure.workload.identity/use: "true"
                kaito.sh/workspace: tune
            spec:
              affinity:
                nodeAffinity:
                  requiredDuringSchedulingIgnoredDuringExecution:
                    nodeSelectorTerms:
                    - matchExpressions:
                      - key: app
                        operator: In
                        values:
                        - tuning
              automountServiceAccountToken: false
              containers:
              - args:
                - run
                - --config=/mnt/config/training_config.yaml
                - --model=oci://h/model:1
                - --name=phi-3-mini-4k-instruct
                - --data=https://host/a.parquet
                - --push=registry.example.com/adapter:1
                - --set=TrainingArguments.max_steps=3
                env:
                - name: HONE_DEVICE
                  value: cpu
                - name: HONE_CACHE
                  value: /mnt/cache
                - name: HONE_OUTPUT
                  value: /mnt/results
                - name: HONE_EARLIER_RESULTS
                  value: move
                - name: HONE_METRICS
                  value: 0.0.0.0:5000
                - name: DEFAULT_TARGET_MODULES
                  value: k_proj,q_proj,v_proj,o_proj,gate_proj,down_proj,up_proj
                - name: HONE_DOCKER_CONFIG
                  value: /mnt/docker
                - name: HONE_CA_FILE
                  value: /mnt/ca/ca.crt
                - name: HONE_LOG
                  value: terminal
                - name: TOKEN
                  valueFrom:
                    secretKeyRef:
                      key: token
                      name: keys
                image: registry.example.com/hone:1
                name: tune
                ports:
                - containerPort: 5000
                  name: metrics
                resources:
                  requests:
                    cpu: "4"
                    ephemeral-storage: 1Gi
                    memory: 8Gi
                securityContext:
                  allowPrivilegeEscalation: false
                  capabilities:
                    drop:
                    - ALL
                  readOnlyRootFilesystem: true
                terminationMessagePolicy: FallbackToLogsOnError
                volumeMounts:
                - mountPath: /mnt/config
                  name: config-volume
                  readOnly: true
                - mountPath: /mnt/results
                  name: results-volume
                  subPath: tune
                - mountPath: /mnt/cache
                  name: cache-volume
                - mountPath: /tmp
                  name: tmp
                - mountPath: /mnt/docker
                  name: docker-config
                  readOnly: true
                - mountPath: /mnt/ca
                  name: ca
                  readOnly: true
              enableServiceLinks: false
              imagePullSecrets:
              - name: login
              - name: images
              priorityClassName: low
              restartPolicy: Never
              securityContext:
                fsGroup: 1000
                fsGroupChangePolicy: OnRootMismatch
                runAsGroup: 1000
                runAsNonRoot: true
                runAsUser: 1000
                seccompProfile:
                  type: RuntimeDefault
              serviceAccountName: robot
              terminationGracePeriodSeconds: 60
              tolerations:
              - effect: NoSchedule
                key: gpu
                operator: Equal
              - effect: NoSchedule
                key: sku
                value: gpu
              volumes:
              - configMap:
                  name: qlora-params-template
                name: config-volume
              - name: results-volume
                persistentVolumeClaim:
                  claimName: work
              - name: cache-volume
                persistentVolumeClaim:
                  claimName: cache
              - emptyDir: {}
                name: tmp
              - name: docker-config
                projected:
                  defaultMode: 288
                  sources:
                  - secret:
                      items:
                      - key: .dockerconfigjson
                        path: config.json
                      name: login
              - configMap:
                  name: ca
                name: ca
          ttlSecondsAfterFinished: 86400
    "#]]
    .assert_eq(&yaml::write(&[job]));
}

#[test]
fn weights_are_where_they_are_said_to_be() {
    let model = |preset: Value, address: Option<&str>| {
        let job = job(&workspace(|value| {
            value["tuning"]["preset"] = preset;
            if let Some(address) = address {
                value["metadata"]["annotations"] = json!({"hone.sh/model": address});
            }
        }));
        arguments(&job).lines().find(|line| line.starts_with("--model=")).unwrap()[8..].to_owned()
    };
    let named = |name: &str| json!({"name": name});
    assert_eq!(model(named("phi-4"), None), "oci://mcr.microsoft.com/aks/kaito/kaito-phi-4:0.2.0");
    let falcon = "hf://tiiuae/falcon-7b@ec89142b67d748a1865ea4451372db8313ada0d8";
    assert_eq!(model(named("falcon-7b"), None), falcon);
    let own = json!({"name": "phi-4", "presetOptions": {"image": "registry.example.com/phi-4:1"}});
    assert_eq!(model(own, None), "oci://registry.example.com/phi-4:1");
    for address in ["/mnt/cache/phi", "hf://me/mine@main", "oci://h/m:1", "preset:phi-4"] {
        assert_eq!(model(named("my-own"), Some(address)), address);
    }
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
    assert_eq!(told("Standard_NC96ads_A100_v4", "phi-4"), "", "all four are used");
    expect!["resource.instanceType Standard_NC6s_v3 has v100-16 GPUs, which cannot compute in bf16: hone would end with exit code 10. Take an instance with an A10, A100, H100 or newer, such as Standard_NC24ads_A100_v4"].assert_eq(&told("Standard_NC6s_v3", "phi-3-mini-4k-instruct"));
    expect!["resource.instanceType m7i.large is not in the table of GPUs: its memory is not checked"]
        .assert_eq(&told("m7i.large", "phi-4"));
    assert_eq!(told("Standard_NC24ads_A100_v4", "phi-4"), "");
    refused(
        &on("g6.xlarge", "llama-3.3-70b-instruct"),
        None,
        Kind::Capacity,
        expect![[r#"
            resource.instanceType g6.xlarge: training needs at least 40.4 GiB, but only 21.1 GiB can be used on l4: base, 4 bits with scales 32.9 GiB, embedding 2.0 GiB, output head 2.0 GiB, adapter, its gradient and two moments 1.7 GiB, a weight expanded for a product 904.0 MiB, context and kernels 600.0 MiB, logits of a chunk 250.5 MiB, one layer at work 95.3 MiB, workspace of products 32.0 MiB, norms and biases 5.0 MiB, gaps between blocks 3.0 MiB
              help: lower LoraConfig.r; use a larger card, such as l40s
        "#]],
    );
}

/// One process for each GPU: memory and CPUs for all of them, and memory that they share.
#[test]
fn all_gpus_of_an_instance_type_are_used() {
    let on = |instance: &str| {
        let job = job(&workspace(|value| value["resource"]["instanceType"] = json!(instance)));
        let requests = &container(&job)["resources"]["requests"];
        let text = |name: &str| requests[name].as_str().unwrap().to_owned();
        let mounted = mounts(&job);
        let shared = mounted.lines().find(|line| line.contains("/dev/shm")).map(str::to_owned);
        (text("nvidia.com/gpu"), text("cpu"), text("memory"), shared)
    };
    let text = |part: &str| part.to_owned();
    assert_eq!(on("Standard_NC24ads_A100_v4"), (text("1"), text("2"), text("6Gi"), None));
    let shared = r#"dshm -> /dev/shm: {"emptyDir":{"medium":"Memory"}}"#;
    assert_eq!(on("Standard_NC96ads_A100_v4"), (text("4"), text("8"), text("21Gi"), Some(text(shared))));
}

/// A base that no node holds is shared over the ranks of all nodes, and each pod asks for the memory of its own ranks.
#[test]
fn nodes_that_are_too_small_alone_share_the_base() {
    let on = |nodes: u32| {
        workspace(|value| {
            value["resource"] = json!({"instanceType": "g5.xlarge", "count": nodes, "labelSelector": {}});
            value["tuning"]["preset"]["name"] = json!("llama-3.3-70b-instruct");
        })
    };
    assert_eq!(rendered(&on(1), None).unwrap_err().kind, Kind::Capacity);
    let memory = |nodes: u32| {
        let job = job(&on(nodes));
        container(&job)["resources"]["requests"]["memory"].as_str().unwrap().to_owned()
    };
    assert_eq!(memory(4), memory(8));
}

/// The differences of a Job on several nodes from a Job on one node.
#[test]
fn a_job_on_several_nodes() {
    let several = |change: &dyn Fn(&mut Value)| {
        workspace(|value| {
            value["resource"]["count"] = json!(2);
            change(value);
        })
    };
    let rendered = rendered(&several(&|_| {}), None).unwrap();
    let job = json!(rendered.job);
    let mut spec = job["spec"].clone();
    spec["podFailurePolicy"]["rules"].as_array_mut().unwrap().drain(..2);
    for field in ["affinity", "containers", "securityContext", "tolerations", "volumes", "imagePullSecrets"] {
        spec["template"]["spec"].as_object_mut().unwrap().remove(field);
    }
    let environment = container(&job)["env"].as_array().unwrap().iter().filter(|variable| {
        let name = variable["name"].as_str().unwrap();
        ["HONE_NODES", "HONE_MASTER", "HONE_RANKS"].iter().any(|start| name.starts_with(start))
    });
    let environment: Vec<Value> = environment.cloned().collect();
    let parts = [json!(rendered.service), spec, json!(environment), container(&job)["ports"].clone()];
    expect![[r#"
        apiVersion: v1
        kind: Service
        metadata:
          labels:
            app.kubernetes.io/managed-by: hone
            kaito.sh/workspace: tune
          name: tune-ranks
        spec:
          clusterIP: None
          ports:
          - name: ranks
            port: 29500
            protocol: TCP
            targetPort: ranks
          publishNotReadyAddresses: true
          selector:
            batch.kubernetes.io/job-name: tune
          type: ClusterIP
        ---
        backoffLimitPerIndex: 6
        completionMode: Indexed
        completions: 2
        maxFailedIndexes: 0
        parallelism: 2
        podFailurePolicy:
          rules:
          - action: Ignore
            onExitCodes:
              containerName: tune
              operator: In
              values:
              - 30
              - 31
        successPolicy:
          rules:
          - succeededIndexes: "0"
        template:
          metadata:
            labels:
              app.kubernetes.io/managed-by: hone
              kaito.sh/workspace: tune
          spec:
            terminationGracePeriodSeconds: 300
            automountServiceAccountToken: false
            subdomain: tune-ranks
            enableServiceLinks: false
            restartPolicy: Never
        ---
        - name: HONE_NODES
          value: "2"
        - name: HONE_MASTER_ADDR
          value: tune-0.tune-ranks
        - name: HONE_MASTER_PORT
          value: "29500"
        - name: HONE_RANKS_WAIT
          value: "1800"
        - name: HONE_RANKS_TOKEN
          valueFrom:
            fieldRef:
              apiVersion: v1
              fieldPath: metadata.labels['batch.kubernetes.io/controller-uid']
        ---
        - containerPort: 5000
          name: metrics
        - containerPort: 29500
          name: ranks
    "#]]
    .assert_eq(&yaml::write(&parts));
    expect!["resource.count is 2: checkpoints are on the disk of pod 0 and are lost with it, and every failure of a node creates all pods anew: set hone.sh/work-claim to a ReadWriteMany claim, so that the set resumes"].assert_eq(&rendered.warnings.join("\n"));
    let shared = several(&|value| {
        value["metadata"]["annotations"] = json!({
            "hone.sh/work-claim": "work", "hone.sh/cache-claim": "work", "hone.sh/gpus": "0",
            "hone.sh/env": "HONE_RANKS_TOKEN=secret:ranks/token", "hone.sh/queue-name": "team", "hone.sh/retries": "2",
        });
        value["tuning"]["input"] = json!({"volumeSource": {"persistentVolumeClaim": {"claimName": "rows"}}});
    });
    let rendered = self::rendered(&shared, None).unwrap();
    expect!["resource.count is 2: the claims rows, work are mounted by the pods of 2 nodes at once, which needs the access mode ReadWriteMany (ReadOnlyMany is enough for data); with ReadWriteOnce all pods but one wait for ever"].assert_eq(&rendered.warnings.join("\n"));
    let job = json!(rendered.job);
    assert_eq!((&job["spec"]["backoffLimitPerIndex"], &job["spec"]["suspend"]), (&json!(2), &json!(true)));
    assert!(!mounts(&job).contains("/dev/shm"), "ranks on CPUs share no memory");
    let tokens =
        container(&job)["env"].as_array().unwrap().iter().filter(|one| one["name"] == "HONE_RANKS_TOKEN");
    let tokens: Vec<&Value> = tokens.collect();
    assert_eq!(tokens.len(), 1);
    assert_eq!(
        tokens[0]["valueFrom"]["secretKeyRef"]["name"], "ranks",
        "the user's Secret replaces the Job's uid"
    );
}

#[test]
fn what_is_rendered_is_understood_as_it_was_written() {
    for file in examples() {
        let Ok(applied) = files::apply(std::slice::from_ref(&file), &Settings::default()) else { continue };
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

/// Returns the two Workspaces that hone was first asked to serve, with their placeholders.
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
        let fault = files::apply(std::slice::from_ref(&file), &Settings::default()).unwrap_err();
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

/// The runtime for Kubeflow Trainer has what a rendered Job has, as far as Trainer leaves it to the runtime.
#[test]
fn the_runtime_for_kubeflow_is_a_job_of_hone() {
    let read = |name: &str| {
        let text = std::fs::read_to_string(root("examples/kubeflow").join(name)).unwrap();
        yaml::read(name, &text).unwrap().remove(0).value
    };
    let runtime = read("runtime.yaml");
    let set = &runtime["spec"]["template"]["spec"];
    let node = &set["replicatedJobs"][0];
    assert_eq!(
        node["template"]["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"],
        "trainer"
    );
    let spec: k8s_openapi::api::batch::v1::JobSpec =
        serde_json::from_value(node["template"]["spec"].clone()).unwrap();
    assert_eq!(json!(spec), node["template"]["spec"], "no field is unknown");
    let rendered = job(&workspace(|value| value["resource"]["count"] = json!(2)));
    let codes = |rules: &Value| {
        let rules = rules["rules"].as_array().unwrap().iter();
        let fail = rules.clone().find(|rule| rule["action"] == "FailJob").unwrap();
        fail["onExitCodes"]["values"].clone()
    };
    let ours = &node["template"]["spec"];
    assert_eq!(codes(&ours["podFailurePolicy"]), codes(&rendered["spec"]["podFailurePolicy"]));
    assert_eq!(
        (&ours["backoffLimit"], &set["failurePolicy"]["rules"][0]["action"]),
        (&json!(0), &json!("FailJobSet"))
    );
    let theirs = &ours["template"]["spec"];
    let field = |pod: &Value, name: &str| pod[name].clone();
    for name in
        ["automountServiceAccountToken", "restartPolicy", "securityContext", "terminationGracePeriodSeconds"]
    {
        assert_eq!(field(theirs, name), field(pod(&rendered), name), "{name}");
    }
    let container = &theirs["containers"][0];
    for name in ["securityContext", "terminationMessagePolicy"] {
        assert_eq!(field(container, name), field(self::container(&rendered), name), "{name}");
    }
    let own = self::container(&rendered)["env"].as_array().unwrap();
    for variable in
        container["env"].as_array().unwrap().iter().filter(|variable| variable["name"] != "TRAIN_JOB")
    {
        let known = own.iter().find(|other| other["name"] == variable["name"]);
        let token = variable["name"] == "HONE_RANKS_TOKEN";
        let path = |variable: &Value| variable["valueFrom"]["fieldRef"]["fieldPath"].clone();
        let same = known.is_some_and(|known| match token {
            true => path(known) == path(variable),
            false => known["value"] == variable["value"],
        });
        assert!(same, "{variable}: {known:?}");
    }
    let job = read("train-job.yaml");
    assert_eq!(job["spec"]["runtimeRef"]["name"], runtime["metadata"]["name"]);
    assert_eq!(job["spec"]["trainer"]["args"][0], "run");
}

/// `UPDATE_JOBS=1 cargo test --test workspace` writes them.
#[test]
fn jobs_are_what_hone_renders() {
    for file in examples() {
        let Ok(applied) = files::apply(std::slice::from_ref(&file), &Settings::default()) else {
            assert!(file.ends_with("serve-the-adapter.yaml"), "{}", file.display());
            continue;
        };
        let name = file.file_name().unwrap();
        let head = format!("# hone render -f examples/workspaces/{}\n", name.to_str().unwrap());
        same(&root("jobs").join(name), &(head + &yaml::write(&applied.objects)));
    }
}

#[test]
fn what_a_cluster_gets_is_what_hone_writes() {
    let head = "# The controller, its rights and its namespace; the image is yours to name.\n";
    let controller = yaml::write(&install::objects("hone:cpu"));
    same(&root("jobs/controller.yaml"), &(head.to_owned() + &controller));
    let head = "# KAITO's Workspace, for clusters where KAITO is not installed.\n";
    same(&root("jobs/crd.yaml"), &(head.to_owned() + &yaml::write(&[crd::definition()])));
    let head = "# Reviews of Workspaces by the controller. It answers them if HONE_WEBHOOK is true:\n\
        # kubectl set env -n hone-system deployment/hone-controller HONE_WEBHOOK=true\n";
    same(&root("jobs/webhook/webhook.yaml"), &(head.to_owned() + &yaml::write(&install::webhook())));
    same(&root("jobs/webhook/kustomization.yaml"), &yaml::write(&[install::webhook_component()]));
}

/// The chart's templates with its own values are the controller of jobs/controller.yaml, except for the variables that
/// are empty.
#[test]
fn the_chart_makes_the_same_controller() {
    let files = install::chart();
    for (path, text) in &files {
        same(&root("jobs/chart").join(path), text);
    }
    same(&root("jobs/kustomization.yaml"), &yaml::write(&[install::kustomization()]));
    let text = |name: &str| files.iter().find(|(path, _)| *path == name).unwrap().1.clone();
    let values = yaml::read("values.yaml", &text("values.yaml")).unwrap()[0].value.clone();
    let value = regex::Regex::new(r"\{\{ \.Values\.(\w+)( \| quote)? \}\}").unwrap();
    let is_set =
        |name: &str| !["", "false"].contains(&values[name].as_str().unwrap_or(&values[name].to_string()));
    let choice = regex::Regex::new(r"(?s)\s*\{\{- if \.Values\.(\w+) \}\}(.*?)\s*\{\{- end \}\}").unwrap();
    let template = text("templates/controller.yaml");
    let chosen =
        choice.replace_all(
            &template,
            |found: &regex::Captures| {
                if is_set(&found[1]) { found[2].to_owned() } else { String::new() }
            },
        );
    let made = value.replace_all(&chosen, |found: &regex::Captures| {
        let value = values.get(&found[1]).unwrap_or_else(|| panic!("no value {}", &found[1]));
        let plain = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        if found.get(2).is_some() { format!("{plain:?}") } else { plain }
    });
    let made = made.replace("{{ .Release.Namespace }}", install::NAMESPACE);
    assert!(!made.contains("{{"), "{made}");
    let mut made: Vec<Value> =
        yaml::read("chart", &made).unwrap().iter().map(|found| found.value.clone()).collect();
    let container = &mut made.last_mut().unwrap()["spec"]["template"]["spec"]["containers"][0];
    container.as_object_mut().unwrap().remove("imagePullPolicy");
    assert_eq!(made, install::objects("hone:cpu")[1..]);
    let webhook = text("templates/webhook.yaml");
    let inner = webhook
        .strip_prefix("{{- if .Values.webhook }}\n")
        .and_then(|text| text.strip_suffix("{{- end }}\n"));
    let inner = inner.unwrap().replace("{{ .Release.Namespace }}", install::NAMESPACE);
    let made: Vec<Value> =
        yaml::read("webhook", &inner).unwrap().iter().map(|found| found.value.clone()).collect();
    assert_eq!(made, install::webhook());
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
    expect![[r#"
        apiVersion: kaito.sh/v1beta1
        kind: Workspace
        metadata:
          annotations:
            hone.sh/work-claim: results
          name: tune-phi-3-mini-4k-instruct
        resource:
          instanceType: Standard_NC24ads_A100_v4
          labelSelector:
            matchLabels:
              apps: tune-phi-3-mini-4k-instruct
        tuning:
          preset:
            name: phi-3-mini-4k-instruct
          method: qlora
          input:
            urls:
            - https://h/a.parquet
          output:
            image: h.example/adapter:1
            imagePushSecret: login
    "#]]
    .assert_eq(&written);
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
    expect![[r#"
        2 error (usage, exit code 2): --preset gpt-oss-20b: it is not trained: mixture of experts
    "#]]
    .assert_eq(&refused(&[
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
    expect![[r#"
        2 error (usage, exit code 2): --data a.parquet: a cluster cannot reach it
          help: give addresses (https://, hf://datasets/, s3://, gs://, az://, oci://), or one claim (pvc://CLAIM)
    "#]]
    .assert_eq(&refused(&[
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
    expect![[r#"
        2 error (usage, exit code 2): --secret is missing: a push needs a Secret of type kubernetes.io/dockerconfigjson
          help: kubectl create secret docker-registry NAME --docker-server=... --docker-username=... --docker-password=...
    "#]].assert_eq(&refused(&[
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
    expect![[r#"
        10 error (config, exit code 10): no Workspace in what was given
          help: give the file of one with -f; `hone tune --help` writes one
    "#]]
    .assert_eq(&told("kind: Secret\nmetadata: {name: s}\n"));
    expect![[r#"
        10 error (config, exit code 10): -:1: Workspace w: apiVersion: expected kaito.sh/v1alpha1 or kaito.sh/v1beta1, found "kaito.sh/v2"
    "#]].assert_eq(&told(
        "kind: Workspace\napiVersion: kaito.sh/v2\nmetadata: {name: w}\ntuning: {method: qlora}\n",
    ));
    expect![[r#"
        10 error (config, exit code 10): -:2:12: resource.instanceTypo is not a field of Workspace
          help: remove what is not known, or correct its name
    "#]]
    .assert_eq(&told("kind: Workspace\nresource: {instanceTypo: x}\n"));
}

/// Fields of KAITO that change nothing here are reported, for Workspaces that tune and those that serve.
#[test]
fn fields_without_effect_are_told() {
    let told = |rest: &str| {
        let head = "apiVersion: kaito.sh/v1beta1\nkind: Workspace\nmetadata: {name: w}\nresource:\n  \
                    labelSelector: {matchLabels: {apps: w}}\n  preferredNodes: [n1]\n";
        let output = hone(&["render", "-f", "-"], &format!("{head}{rest}"));
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let preset = |more: &str| format!("{{name: phi-4, accessMode: private{more}}}");
    let tuning = "method: qlora\n  input: {urls: [\"https://h.example/a.parquet\"]}\n  output: {volumeSource: {emptyDir: {}}}\n";
    for (place, text) in [
        ("tuning", format!("tuning:\n  preset: {}\n  {tuning}", preset(""))),
        ("inference", format!("inference:\n  preset: {}\n", preset(""))),
    ] {
        let told = told(&text);
        assert!(told.contains("resource.preferredNodes has no effect"), "{told}");
        assert!(told.contains(&format!("{place}.preset.accessMode private has no effect")), "{told}");
    }
    let text = format!("inference:\n  preset: {}\n", preset(", presetOptions: {image: h.example/phi:1}"));
    assert!(!told(&text).contains("accessMode"), "{}", told(&text));
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
