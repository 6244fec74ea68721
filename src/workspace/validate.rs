//! A Workspace -> all its mistakes at once: by the rules of KAITO's webhook, and mistakes that would crash or hang
//! later.
//!
//! Source: KAITO v0.12, `api/v1beta1/workspace_validation.go`. Where hone is stricter the comment says why.

use std::net::IpAddr;

use url::{Host, Url};

use super::annotations::object_name;
use super::kind::{Destination, Inference, Preset, Resource, Source, Tuning, Workspace};
use super::pod;
use super::several;
use super::templates::Method;
use crate::facts::presets;
use crate::fault::Result;
use crate::fetch;
use crate::registry::Target;
use crate::spec::{Mistakes, Origin};

/// Schemes of data beside http and https.
const PLACES: [&str; 5] = ["hf", "s3", "gs", "az", "oci"];

/// LIMIT: nodes of a Workspace. A larger number is a typing error.
const NODES_MAX: i32 = 100;

/// Names that lead to the machine itself or to a cloud's metadata.
const HOSTS_REFUSED: [&str; 4] =
    ["localhost", "metadata.google.internal", "metadata.google", "instance-data.ec2.internal"];

/// Checks a new Workspace. `own_model`: its weights are named by hand, so the catalogue need not know the preset.
///
/// # Errors
/// Config: all mistakes, each with its field.
pub fn create(workspace: &Workspace, own_model: bool) -> Result<()> {
    let mut rules = Rules::default();
    rules.workspace(workspace, own_model);
    rules.0.into_result_of("the Workspace")
}

/// Checks a change of a Workspace. Unlike KAITO's webhook, it checks a new input or output as on creation.
///
/// # Errors
/// Config: fields that cannot change, and what `create` refuses.
pub fn update(old: &Workspace, new: &Workspace, own_model: bool) -> Result<()> {
    let mut rules = Rules::default();
    rules.unchanged(old, new);
    rules.workspace(new, own_model);
    rules.0.into_result_of("the Workspace")
}

#[derive(Default)]
struct Rules(Mistakes);

impl Rules {
    fn wrong(&mut self, field: &str, why: impl std::fmt::Display) {
        self.0.add(&Origin::Default, format!("{field}: {why}"));
    }

    fn workspace(&mut self, workspace: &Workspace, own_model: bool) {
        let name = workspace.name();
        if name.len() > 63 || name.contains('.') || object_name(name).is_none() {
            self.wrong(
                "metadata.name",
                format!(
                    "expected up to 63 of a-z, 0-9 and -, with a letter or digit at both ends, found {name:?}"
                ),
            );
        }
        match (&workspace.inference, &workspace.tuning) {
            (None, None) => self.wrong("tuning", "either inference or tuning must be specified, not neither"),
            (Some(_), Some(_)) => {
                self.wrong("tuning", "either inference or tuning must be specified, but not both")
            }
            (None, Some(tuning)) => {
                self.resource(&workspace.resource);
                if several::is_set(workspace) {
                    self.name_of_a_service(name, "trains on several nodes");
                }
                self.tuning(tuning, own_model);
            }
            (Some(inference), None) => {
                self.name_of_a_service(name, "serves");
                self.resource_that_serves(&workspace.resource);
                self.inference(inference, own_model);
            }
        }
    }

    /// A Service, and pods with a number behind it, have the name too. Kubernetes refuses Services that begin with a
    /// digit, and cannot create such pods if the name is longer.
    fn name_of_a_service(&mut self, name: &str, does: &str) {
        const LENGTH_MAX: usize = 52;
        if name.len() > LENGTH_MAX || name.starts_with(|c: char| c.is_ascii_digit()) {
            self.wrong(
                "metadata.name",
                format!("a Workspace that {does} needs a letter first and at most {LENGTH_MAX} characters, found {name:?}"),
            );
        }
    }

    fn resource_that_serves(&mut self, resource: &Resource) {
        if let Some(count) = resource.count.filter(|count| !(1..=NODES_MAX).contains(count)) {
            self.wrong("resource.count", format!("expected 1 to {NODES_MAX} servers, found {count}"));
        }
        if resource.partition.is_some() {
            self.wrong("resource.partition", "a part of a GPU cannot serve; remove it");
        }
        self.selector(resource);
    }

    /// KAITO checks strengths only when they change, and its servers ignore a wrong one or end.
    fn inference(&mut self, inference: &Inference, own_model: bool) {
        match &inference.preset {
            None if inference.template.is_some() => {
                self.wrong("inference.template", "a pod of one's own is KAITO's to serve; name a preset");
            }
            None => self.wrong("inference.preset", "missing; `hone model --preset NAME` knows the names"),
            Some(preset) => self.preset("inference.preset", preset, own_model),
        }
        if !inference.config.is_empty() {
            self.object("inference.config", "a ConfigMap", &inference.config);
        }
        let mut names = std::collections::BTreeSet::new();
        for (place, adapter) in inference.adapters.iter().enumerate() {
            let field = format!("inference.adapters[{place}]");
            let source = adapter.source.clone().unwrap_or_default();
            let given = [!source.image.is_empty(), source.volume_source.is_some()];
            if given.iter().filter(|given| **given).count() != 1 {
                self.wrong(&format!("{field}.source"), "exactly one of image and volumeSource must be given");
            }
            if !source.urls.is_empty() {
                self.wrong(&format!("{field}.source.urls"), "an adapter comes from an image or a volume");
            }
            if !source.name.is_empty() && (source.name.contains('.') || object_name(&source.name).is_none()) {
                self.wrong(
                    &format!("{field}.source.name"),
                    format!("expected a-z, 0-9 and -, found {:?}", source.name),
                );
            }
            // An adapter without a name has one by its place.
            let name = super::serve::adapter_name(adapter, place);
            if !names.insert(name.clone()) {
                self.wrong(&format!("{field}.source.name"), format!("{name} stands there twice"));
            }
            match source.image.strip_prefix(super::serve::TUNED) {
                Some(name) => self.object(&format!("{field}.source.image"), "a Workspace", name),
                None if !source.image.is_empty() => {
                    self.image(&format!("{field}.source.image"), &source.image, false)
                }
                None => {}
            }
            for secret in &source.image_pull_secrets {
                self.object(&format!("{field}.source.imagePullSecrets"), "a Secret", secret);
            }
            self.volume(&format!("{field}.source.volumeSource"), &source.volume_source);
            let strength = adapter.strength.as_deref().map(|text| (text, text.trim().parse::<f64>()));
            if let Some((text, _)) = strength
                .filter(|(_, number)| !number.as_ref().is_ok_and(|number| (0.0..=1.0).contains(number)))
            {
                self.wrong(
                    &format!("{field}.strength"),
                    format!("expected a number from 0 to 1, found {text:?}"),
                );
            }
        }
    }

    fn resource(&mut self, resource: &Resource) {
        if let Some(count) = resource.count.filter(|count| !(1..=NODES_MAX).contains(count)) {
            self.wrong("resource.count", format!("expected 1 to {NODES_MAX} nodes, found {count}"));
        }
        if resource.partition.is_some() {
            self.wrong("resource.partition", "a part of a GPU cannot tune; remove it");
        }
        self.selector(resource);
    }

    fn selector(&mut self, resource: &Resource) {
        let Some(selector) = &resource.label_selector else {
            return self.wrong(
                "resource.labelSelector",
                "missing; name labels of the nodes, such as matchLabels: {apps: tuning}",
            );
        };
        let labels = selector.match_labels.iter().flatten().map(|(key, value)| (key, vec![value.clone()]));
        let expressions = selector.match_expressions.iter().flatten();
        let expressions =
            expressions.map(|expression| (&expression.key, expression.values.clone().unwrap_or_default()));
        for (key, values) in labels.chain(expressions) {
            self.label(key, &values);
        }
        for expression in selector.match_expressions.iter().flatten() {
            let (known, values) = match expression.operator.as_str() {
                "In" | "NotIn" => (true, true),
                "Exists" | "DoesNotExist" => (true, false),
                _ => (false, false),
            };
            let has_values = expression.values.as_ref().is_some_and(|values| !values.is_empty());
            if !known || values != has_values {
                self.wrong(
                    "resource.labelSelector.matchExpressions",
                    format!(
                        "{} {}: expected In or NotIn with values, Exists or DoesNotExist without",
                        expression.key, expression.operator
                    ),
                );
            }
        }
    }

    /// Kubernetes' syntax of labels.
    fn label(&mut self, key: &str, values: &[String]) {
        const FIELD: &str = "resource.labelSelector";
        const ALLOWED: &str = "up to 63 of A-Z, a-z, 0-9, -, _ and ., with a letter or digit at both ends";
        let name = |text: &str| {
            let ends = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
            text.len() <= 63
                && ends(text.chars().next())
                && ends(text.chars().next_back())
                && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        let (prefix, last) = key.split_once('/').map_or((None, key), |(prefix, last)| (Some(prefix), last));
        if !name(last) || prefix.is_some_and(|prefix| object_name(prefix).is_none()) {
            self.wrong(FIELD, format!("{key:?} cannot be the name of a label: allowed are {ALLOWED}, behind a domain and a / if any"));
        }
        for value in values.iter().filter(|value| !value.is_empty() && !name(value)) {
            self.wrong(FIELD, format!("{value:?} cannot be the value of a label: allowed are {ALLOWED}"));
        }
    }

    fn tuning(&mut self, tuning: &Tuning, own_model: bool) {
        if Method::named(&tuning.method).is_none() {
            self.wrong("tuning.method", format!("expected lora or qlora, found {:?}", tuning.method));
        }
        match &tuning.preset {
            None => self.wrong("tuning.preset", "missing; `hone model --preset NAME` knows the names"),
            Some(preset) => self.preset("tuning.preset", preset, own_model),
        }
        if !tuning.config.is_empty() {
            self.object("tuning.config", "a ConfigMap", &tuning.config);
        }
        match &tuning.input {
            None => self.wrong("tuning.input", "missing; give urls, image or volumeSource"),
            Some(input) => self.input(input),
        }
        match &tuning.output {
            None => self.wrong("tuning.output", "missing; give image and imagePushSecret, or volumeSource"),
            Some(output) => self.output(output),
        }
    }

    /// KAITO takes any `a/b` for a preset and fails when it looks it up.
    fn preset(&mut self, field: &str, preset: &Preset, own_model: bool) {
        let name_field = &format!("{field}.name");
        match presets::find(&preset.name) {
            _ if preset.name.is_empty() => self.wrong(name_field, "missing"),
            Ok(known) => {
                if let Some(why) = &known.refused {
                    self.wrong(name_field, format!("{} is not trained: {why}", known.name));
                }
            }
            Err(_) if own_model => {}
            Err(fault) => self.wrong(name_field, fault.in_a_line()),
        }
        if let Some(options) = &preset.preset_options {
            if !options.image.is_empty() {
                self.image(&format!("{field}.presetOptions.image"), &options.image, false);
            }
            for secret in &options.image_pull_secrets {
                self.object(&format!("{field}.presetOptions.imagePullSecrets"), "a Secret", secret);
            }
            if !options.model_access_secret.is_empty() {
                self.object(
                    &format!("{field}.presetOptions.modelAccessSecret"),
                    "a Secret",
                    &options.model_access_secret,
                );
            }
        }
    }

    fn input(&mut self, input: &Source) {
        let given = [!input.urls.is_empty(), !input.image.is_empty(), input.volume_source.is_some()];
        if given.iter().filter(|given| **given).count() != 1 {
            self.wrong("tuning.input", "exactly one of urls, image and volumeSource must be given");
        }
        for url in &input.urls {
            self.data_address("tuning.input.urls", url);
        }
        if !input.image.is_empty() {
            self.image("tuning.input.image", &input.image, false);
        }
        for secret in &input.image_pull_secrets {
            self.object("tuning.input.imagePullSecrets", "a Secret", secret);
        }
        self.volume("tuning.input.volumeSource", &input.volume_source);
    }

    fn output(&mut self, output: &Destination) {
        if output.image.is_empty() == output.volume_source.is_none() {
            self.wrong("tuning.output", "exactly one of image and volumeSource must be given");
        }
        if !output.image.is_empty() {
            self.image("tuning.output.image", &output.image, true);
            match output.image_push_secret.as_str() {
                "" => self.wrong(
                    "tuning.output.imagePushSecret",
                    "missing; an image needs the Secret to push it with",
                ),
                secret => self.object("tuning.output.imagePushSecret", "a Secret", secret),
            }
        }
        self.volume("tuning.output.volumeSource", &output.volume_source);
    }

    fn volume(&mut self, field: &str, source: &Option<serde_json::Value>) {
        if let Some(Err(fault)) = source.as_ref().map(|source| pod::from_source("volume", source, field)) {
            self.0.add(&Origin::Default, fault.in_a_line());
        }
    }

    fn object(&mut self, field: &str, kind: &str, name: &str) {
        if object_name(name).is_none() {
            let hint = placeholder(name);
            self.wrong(
                field,
                format!("{name:?} cannot be the name of {kind}: allowed are a-z, 0-9, - and .{hint}"),
            );
        }
    }

    fn image(&mut self, field: &str, image: &str, pushed: bool) {
        match Target::parse(image) {
            Err(fault) => {
                let told = match placeholder(image) {
                    "" => fault.in_a_line(),
                    hint => fault.message + hint,
                };
                self.wrong(field, told);
            }
            Ok(Target::Layout { .. }) => self.wrong(field, "a folder on disk is no image of a registry"),
            Ok(_) if pushed && image.contains('@') => {
                self.wrong(field, "a digest names what already exists; give a tag to push to");
            }
            Ok(_) => {}
        }
    }

    /// Every place that `hone run` takes data from, but for paths: those are of a volume.
    fn data_address(&mut self, field: &str, text: &str) {
        let scheme = text.trim().split_once("://").map(|(scheme, _)| scheme.to_ascii_lowercase());
        if let Some("http" | "https") | None = scheme.as_deref() {
            return self.url(field, text);
        }
        // Digest, layout, weight and limit are the plan's matter.
        let address = text.split_once('#').map_or(text, |(address, _)| address);
        let known = address.split_once("://").is_some_and(|(name, _)| PLACES.contains(&name));
        match fetch::Data::parse(address) {
            Ok(_) if known => {}
            Err(fault) if known => self.wrong(field, fault.in_a_line()),
            _ => self.wrong(
                field,
                format!(
                    "{}:// is no place that a pod reads; expected http, https, {}; files of a volume are given by volumeSource",
                    scheme.unwrap_or_default(),
                    PLACES.join(", ")
                ),
            ),
        }
    }

    /// KAITO looks at addresses written out only; names that lead to such are refused when they are connected to.
    fn url(&mut self, field: &str, text: &str) {
        let Ok(url) = Url::parse(text) else {
            return self
                .wrong(field, "not a valid URL; expected https://host/file.parquet or another data file");
        };
        // The part after the host may hold a secret.
        let name = format!("{}://{}", url.scheme(), url.host_str().unwrap_or_default());
        let refused = match url.host() {
            None => true,
            Some(Host::Domain(host)) => {
                let host = host.trim_end_matches('.').to_lowercase();
                HOSTS_REFUSED.contains(&host.as_str()) || host.ends_with(".localhost")
            }
            Some(Host::Ipv4(address)) => inside(IpAddr::V4(address)),
            Some(Host::Ipv6(address)) => inside(IpAddr::V6(address)),
        };
        if refused {
            self.wrong(field, format!("{name}: loopback, private and link-local hosts are refused; give a public host, or its name"));
        }
    }

    fn unchanged(&mut self, old: &Workspace, new: &Workspace) {
        if old.tuning.is_some() != new.tuning.is_some() {
            return self.wrong("tuning", "it cannot be added or removed; make another Workspace");
        }
        let mut fixed = |field: &str, same: bool| {
            if !same {
                self.wrong(field, "cannot be changed; make another Workspace");
            }
        };
        let (before, after) = (&old.resource, &new.resource);
        // Servers may become more or fewer.
        fixed(
            "resource.count",
            new.inference.is_some() || before.count.unwrap_or(1) == after.count.unwrap_or(1),
        );
        fixed("resource.instanceType", before.instance_type == after.instance_type);
        fixed("resource.labelSelector", before.label_selector == after.label_selector);
        fixed("resource.partition", before.partition == after.partition);
        if let (Some(before), Some(after)) = (&old.inference, &new.inference) {
            fixed("inference.preset", before.preset == after.preset);
        }
        let (Some(before), Some(after)) = (&old.tuning, &new.tuning) else { return };
        fixed("tuning.preset", before.preset == after.preset);
        fixed("tuning.method", before.method == after.method);
        let name =
            |tuning: &Tuning| tuning.input.as_ref().map(|input| input.name.clone()).unwrap_or_default();
        fixed("tuning.input.name", name(before) == name(after));
    }
}

/// Whether an address is loopback, private or link-local.
fn inside(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => v4.is_loopback() || v4.is_private() || v4.is_link_local() || v4.is_unspecified(),
        IpAddr::V6(v6) => {
            v6.is_loopback() || v6.is_unique_local() || v6.is_unicast_link_local() || v6.is_unspecified()
        }
    }
}

/// A hint if the text looks like a placeholder of a documentation.
fn placeholder(text: &str) -> &'static str {
    let word = |word: &str| {
        word.len() > 5 && word.contains('_') && word.chars().all(|c| c.is_ascii_uppercase() || c == '_')
    };
    match text.split(['/', '.', ':']).any(word) {
        true => "; this looks like a placeholder: put your own name there",
        false => "",
    }
}

#[cfg(test)]
mod tests {
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

    /// The valid Workspace with `field` (dots between) set or, with null, removed.
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
        check(
            &[("tuning.method", Value::Null)],
            expect![[r#"tuning.method: expected lora or qlora, found """#]],
        );
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
            told(&[
                ("tuning.input.urls", json!(["https://example.com/b"])),
                ("tuning.config", json!("mine"))
            ]),
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
            assert_eq!(
                told(&[(field, value)]),
                format!("{field}: cannot be changed; make another Workspace")
            );
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
        let image = |strength: Value| json!([{"source": {"name": "a", "image": "h.example/a:1"}, "strength": strength}]);
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
}
