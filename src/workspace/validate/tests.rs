//! Tests of `validate`: KAITO's tables, and faults that KAITO lets through.

use super::*;
use expect_test::{Expect, expect};
use serde_json::{Value, json};

fn valid() -> Value {
    json!({
        "metadata": {"name": "tune"},
        "resource": {"instanceType": "Standard_NC24ads_A100_v4", "labelSelector": {"matchLabels": {"a": "b"}}},
        "tuning": {
            "preset": {"name": "phi-4"}, "method": "lora",
            "input": {"urls": ["https://example.com/a.parquet"]},
            "output": {"image": "example.com/adapter:1", "imagePushSecret": "login"},
        },
    })
}

fn read(value: Value) -> Workspace {
    serde_json::from_value(value).unwrap()
}

/// Returns the valid Workspace with `field` (dots between) set or, with null, removed.
fn changed(changes: &[(&str, Value)]) -> Workspace {
    let mut root = valid();
    for (path, value) in changes {
        let (parents, last) = path.rsplit_once('.').unwrap_or(("", path));
        let parent =
            parents.split('.').filter(|part| !part.is_empty()).fold(&mut root, |at, part| &mut at[part]);
        match value.is_null() {
            true => _ = parent.as_object_mut().unwrap().remove(last),
            false => parent[last] = value.clone(),
        }
    }
    read(root)
}

fn told(changes: &[(&str, Value)]) -> String {
    create(&changed(changes), false).map_or_else(|fault| fault.message, |()| "valid".into())
}

fn check(changes: &[(&str, Value)], expected: Expect) {
    expected.assert_eq(&told(changes));
}

/// KAITO's TestTuningSpecValidateCreate.
#[test]
fn tuning() {
    check(&[], expect!["valid"]);
    for method in ["qlora", "QLoRA", "LORA"] {
        assert_eq!(told(&[("tuning.method", json!(method))]), "valid", "{method}");
    }
    check(
        &[("tuning.input", Value::Null)],
        expect!["tuning.input: missing; give urls, image or volumeSource"],
    );
    check(
        &[("tuning.output", Value::Null)],
        expect!["tuning.output: missing; give image and imagePushSecret, or volumeSource"],
    );
    check(
        &[("tuning.preset", Value::Null)],
        expect!["tuning.preset: missing; `hone model --preset NAME` knows the names"],
    );
    check(
        &[("tuning.preset.name", json!("phi-5"))],
        expect![[r#"tuning.preset.name: "phi-5" is not a preset; did you mean phi-2?"#]],
    );
    check(
        &[("tuning.preset.name", json!("someone/model"))],
        expect![[
            r#"tuning.preset.name: "someone/model" is not a preset; use one of phi-4, phi-4-mini-instruct, phi-3-mini-4k-instruct, phi-3-mini-128k-instruct, phi-3-medium-4k-instruct, phi-3-medium-128k-instruct, phi-3.5-mini-instruct, mistral-7b, qwen2.5-coder-7b-instruct, qwen2.5-coder-32b-instruct, falcon-7b, falcon-40b, phi-2, falcon-7b-instruct, falcon-40b-instruct, mistral-7b-instruct, llama-3.1-8b-instruct, llama-3.3-70b-instruct, deepseek-r1-distill-llama-8b, deepseek-r1-distill-qwen-14b, gemma-3-4b-instruct, gemma-3-27b-instruct, ministral-3-3b-instruct, ministral-3-8b-instruct, ministral-3-14b-instru…"#
        ]],
    );
    check(
        &[("tuning.preset.name", json!("gpt-oss-20b"))],
        expect!["tuning.preset.name: gpt-oss-20b is not trained: mixture of experts"],
    );
    check(
        &[("tuning.method", json!("full"))],
        expect![[r#"tuning.method: expected lora or qlora, found "full""#]],
    );
    check(&[("tuning.method", Value::Null)], expect![[r#"tuning.method: expected lora or qlora, found """#]]);
    check(
        &[("tuning.config", json!("My Params"))],
        expect![[
            r#"tuning.config: "My Params" cannot be the name of a ConfigMap: allowed are a-z, 0-9, - and ."#
        ]],
    );
    assert!(
        create(&changed(&[("tuning.preset.name", json!("my-own"))]), true).is_ok(),
        "its weights are named by hand"
    );
}

#[test]
fn data_comes_from_every_place_that_a_run_takes() {
    let input = |value: Value| told(&[("tuning.input", value)]);
    for url in [
        "hf://datasets/owner/name",
        "hf://datasets/owner/name@main/rows/*.parquet#layout=alpaca&limit=10",
        "s3://bucket/rows/*.parquet",
        "gs://bucket/rows/",
        "az://container/a.jsonl.gz#sha256=e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "oci://registry.example.com/team/rows:1",
        "HTTPS://example.com/a.parquet",
    ] {
        assert_eq!(input(json!({"urls": [url]})), "valid", "{url}");
    }
    for (url, told) in [
        ("hf://owner/name", "tuning.input.urls: "),
        ("hf://datasets/owner", "tuning.input.urls: an address hf://datasets/ does not name a dataset"),
        ("s3://key:secret@bucket/a", "tuning.input.urls: s3://bucket/a: expected s3://BUCKET/NAME"),
        ("oci://oci:folder", "tuning.input.urls: oci://oci:folder names no image"),
        ("file:///etc/passwd", "tuning.input.urls: file:// is no place that a pod reads"),
        ("ftp://example.com/a", "tuning.input.urls: ftp:// is no place that a pod reads"),
    ] {
        let refused = input(json!({"urls": [url]}));
        assert!(refused.starts_with(told) && !refused.contains("secret"), "{url}: {refused}");
    }
}

/// KAITO's TestDataSourceValidateCreate and TestDataDestinationValidateCreate.
#[test]
fn inputs_and_outputs() {
    let claim = json!({"persistentVolumeClaim": {"claimName": "rows"}});
    let input = |value: Value| told(&[("tuning.input", value)]);
    assert_eq!(input(json!({"urls": ["http://example.com/a", "https://203.0.113.7/b"]})), "valid");
    assert_eq!(input(json!({"volumeSource": claim})), "valid");
    assert_eq!(input(json!({"image": "data", "imagePullSecrets": ["a.b"]})), "valid");
    for url in [
        "ftp://example.com/a",
        "file:///etc/passwd",
        "http://127.0.0.1/a",
        "http://10.0.0.1/a",
        "http://169.254.169.254/a",
        "http://[::1]/a",
        "http://metadata.google.internal/a",
        "http://LOCALHOST./a",
        "http://a.localhost/",
        "http://2130706433/",
        "http://[::ffff:10.0.0.1]/",
        "http://0.0.0.0/",
        "https://",
        "nothing",
    ] {
        assert!(input(json!({"urls": [url]})).starts_with("tuning.input.urls: "), "{url}");
    }
    expect!["tuning.input.urls: http://10.0.0.1: loopback, private and link-local hosts are refused; give a public host, or its name"].assert_eq(&input(json!({"urls": ["http://user:secret@10.0.0.1/a?sig=secret"]})));
    expect!["tuning.input.image: image `!ValidImage` is not a valid reference: expected [registry[:port]/]repository[:tag]; write `registry.example.com/team/adapter:v1`"].assert_eq(&input(json!({"image": "!ValidImage"})));
    expect!["tuning.input: exactly one of urls, image and volumeSource must be given"]
        .assert_eq(&input(json!({})));
    expect!["tuning.input: exactly one of urls, image and volumeSource must be given"]
        .assert_eq(&input(json!({"urls": ["https://h/a"], "volumeSource": claim})));
    expect!["tuning.input.volumeSource: persistentVolumeClam is not a kind of volume; give one source of a pod's volume, such as persistentVolumeClaim: {claimName: NAME}"].assert_eq(&input(json!({"volumeSource": {"persistentVolumeClam": {}}})));
    expect!["valid"].assert_eq(&input(json!({"volumeSource": {"nfs": {"server": "h"}}})));
    let output = |value: Value| told(&[("tuning.output", value)]);
    assert_eq!(output(json!({"volumeSource": claim})), "valid");
    expect!["tuning.output.imagePushSecret: missing; an image needs the Secret to push it with"]
        .assert_eq(&output(json!({"image": "example.com/a:1"})));
    expect!["tuning.output: exactly one of image and volumeSource must be given"].assert_eq(&output(
        json!({"image": "example.com/a:1", "imagePushSecret": "s", "volumeSource": claim}),
    ));
    expect!["tuning.output: exactly one of image and volumeSource must be given"]
        .assert_eq(&output(json!({})));
    expect!["tuning.output.image: image `example.com/Adapter:1` has upper-case letters in its repository; allowed are a-z, 0-9 and single . _ - / between them; use `example.com/adapter:1`"]
        .assert_eq(&output(json!({"image": "example.com/Adapter:1", "imagePushSecret": "s"})));
    expect![[r#"
        2 mistakes in the Workspace
          tuning.output.image: image `ACR_REPO_HERE.azurecr.io/IMAGE_NAME_HERE:0.0.1` has upper-case letters in its repository; allowed are a-z, 0-9 and single . _ - / between them; this looks like a placeholder: put your own name there
          tuning.output.imagePushSecret: "ACR_REGISTRY_SECRET_HERE" cannot be the name of a Secret: allowed are a-z, 0-9, - and .; this looks like a placeholder: put your own name there"#]].assert_eq(&output(json!({
        "image": "ACR_REPO_HERE.azurecr.io/IMAGE_NAME_HERE:0.0.1", "imagePushSecret": "ACR_REGISTRY_SECRET_HERE",
    })));
    let digest = format!("example.com/a@sha256:{}", "0".repeat(64));
    expect!["tuning.output.image: a digest names what already exists; give a tag to push to"]
        .assert_eq(&output(json!({"image": digest, "imagePushSecret": "s"})));
}

/// KAITO's rows of TestResourceSpecValidateCreate that tune, and TestWorkspaceValidateCreate.
#[test]
fn resources_and_names() {
    assert_eq!(told(&[("resource.count", json!(1))]), "valid");
    assert_eq!(told(&[("resource.count", json!(8))]), "valid");
    check(&[("resource.count", json!(0))], expect!["resource.count: expected 1 to 100 nodes, found 0"]);
    let long = format!("a{}", "b".repeat(52));
    assert_eq!(told(&[("metadata.name", json!(long))]), "valid");
    for name in [long.as_str(), "1a"] {
        let refused = told(&[("resource.count", json!(2)), ("metadata.name", json!(name))]);
        assert!(refused.contains("trains on several nodes needs a letter first"), "{refused}");
    }
    check(
        &[("resource.partition", json!({"mode": "mig"}))],
        expect!["resource.partition: a part of a GPU cannot tune; remove it"],
    );
    check(
        &[("resource.labelSelector", Value::Null)],
        expect![
            "resource.labelSelector: missing; name labels of the nodes, such as matchLabels: {apps: tuning}"
        ],
    );
    let expression = json!({"matchExpressions": [{"key": "a", "operator": "Is", "values": ["b"]}]});
    check(
        &[("resource.labelSelector", expression)],
        expect![
            "resource.labelSelector.matchExpressions: a Is: expected In or NotIn with values, Exists or DoesNotExist without"
        ],
    );
    check(
        &[("inference", json!({}))],
        expect!["tuning: either inference or tuning must be specified, but not both"],
    );
    check(
        &[("tuning", Value::Null)],
        expect!["tuning: either inference or tuning must be specified, not neither"],
    );
    assert_eq!(
        told(&[("tuning", Value::Null), ("inference", json!({"preset": {"name": "phi-4"}}))]),
        "valid"
    );
    for name in ["", "A", "a.b", "-a", "a_b", &"a".repeat(64)] {
        assert!(told(&[("metadata.name", json!(name))]).starts_with("metadata.name: "), "{name}");
    }
}

/// KAITO's tables of updates.
#[test]
fn updates() {
    let told = |changes: &[(&str, Value)]| {
        update(&read(valid()), &changed(changes), false)
            .map_or_else(|fault| fault.message, |()| "valid".into())
    };
    assert_eq!(told(&[]), "valid");
    assert_eq!(
        told(&[("tuning.input.urls", json!(["https://example.com/b"])), ("tuning.config", json!("mine"))]),
        "valid"
    );
    assert_eq!(
        told(&[("tuning.output.image", json!("example.com/adapter:2")), ("resource.count", json!(1))]),
        "valid"
    );
    for (field, value) in [
        ("tuning.preset", json!({"name": "phi-4-mini-instruct"})),
        ("tuning.method", json!("qlora")),
        ("tuning.input.name", json!("other")),
        ("resource.instanceType", json!("p4d.24xlarge")),
        ("resource.labelSelector", json!({})),
    ] {
        assert_eq!(told(&[(field, value)]), format!("{field}: cannot be changed; make another Workspace"));
    }
    assert!(
        told(&[("tuning", Value::Null), ("inference", json!({"preset": {"name": "phi-4"}}))])
            .starts_with("tuning: it cannot be added or removed")
    );
    assert!(
        told(&[("tuning.input.urls", json!(["http://10.0.0.1/"]))]).contains("refused"),
        "KAITO checks it on creation only"
    );
}

/// KAITO's TestAdapterSpecValidateCreateorUpdate, on creation too.
#[test]
fn adapters() {
    let told = |adapters: Value| {
        let inference = json!({"preset": {"name": "phi-4"}, "adapters": adapters});
        told(&[("tuning", Value::Null), ("inference", inference)])
    };
    let image =
        |strength: Value| json!([{"source": {"name": "a", "image": "h.example/a:1"}, "strength": strength}]);
    for strength in [json!("0"), json!("0.5"), json!("1.0"), Value::Null] {
        assert_eq!(told(image(strength)), "valid");
    }
    for strength in ["not a number", "1.5", "-1", "NaN", ""] {
        let refused = told(image(json!(strength)));
        assert!(
            refused.starts_with("inference.adapters[0].strength: expected a number from 0 to 1"),
            "{refused}"
        );
    }
    let claim = json!({"persistentVolumeClaim": {"claimName": "c"}});
    assert_eq!(told(json!([{"source": {"name": "a", "volumeSource": claim}}])), "valid");
    assert_eq!(told(json!([{"source": {"name": "a", "image": "workspace://tuned"}}])), "valid");
    // KAITO takes a name with dots; one that is too long for an id of the server is refused before it is served.
    assert_eq!(told(json!([{"source": {"name": "tone.v1", "image": "h/a:1"}}])), "valid");
    let long = "a".repeat(129);
    assert!(
        told(json!([{"source": {"name": long, "image": "h/a:1"}}]))
            .contains("source.name: expected up to 128")
    );
    for (adapter, part) in [
        (json!([{}]), "exactly one of image and volumeSource"),
        (json!([{"source": {"name": "a", "urls": ["https://h/a"], "image": "h/a:1"}}]), "source.urls"),
        (json!([{"source": {"name": "A/b", "image": "h/a:1"}}]), "source.name"),
        (json!([{"source": {"name": "a", "image": "workspace://A_B"}}]), "source.image"),
        (
            json!([{"source": {"name": "a", "image": "h/a:1"}}, {"source": {"name": "a", "image": "h/b:1"}}]),
            "a stands there twice",
        ),
    ] {
        assert!(told(adapter.clone()).contains(part), "{adapter}: {}", told(adapter.clone()));
    }
    let own = json!({"template": {"spec": {}}});
    assert!(super::create(&changed(&[("tuning", Value::Null), ("inference", own)]), false).is_err());
}

#[test]
fn everything_is_told_at_once() {
    check(
        &[
            ("metadata.name", json!("A")),
            ("resource.count", json!(101)),
            ("tuning.method", json!("x")),
            ("tuning.input", json!({})),
        ],
        expect![[r#"
            4 mistakes in the Workspace
              metadata.name: expected up to 63 of a-z, 0-9 and -, with a letter or digit at both ends, found "A"
              resource.count: expected 1 to 100 nodes, found 101
              tuning.method: expected lora or qlora, found "x"
              tuning.input: exactly one of urls, image and volumeSource must be given"#]],
    );
}
