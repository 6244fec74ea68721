//! The API server's refusals, defaults and records: validation by kind, fields that cannot change, owners of fields.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use hyper::Method;
use serde_json::{Value, json};

/// Returns the present time as Kubernetes writes it.
pub fn now() -> String {
    let seconds = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    jiff::Timestamp::from_second(seconds as i64).unwrap().to_string()
}

pub fn is_over(job: &Value) -> bool {
    let conditions = job["status"]["conditions"].as_array().cloned().unwrap_or_default();
    conditions.iter().any(|condition| {
        ["Complete", "Failed"].map(Value::from).contains(&condition["type"]) && condition["status"] == "True"
    })
}

/// Kinds whose specification's changes are not counted.
pub const WITHOUT_GENERATION: [&str; 6] =
    ["configmaps", "services", "secrets", "events", "leases", "controllerrevisions"];

/// Returns whether the roles that `hone controller` is installed with, and those of its webhook, allow a request.
pub fn is_allowed(namespace: &str, group: &str, resource: &str, name: &str, verb: &str) -> bool {
    static ROLES: std::sync::OnceLock<Vec<Value>> = std::sync::OnceLock::new();
    let roles = ROLES.get_or_init(|| {
        let objects = hone::controller::install::objects("i").into_iter();
        let objects = objects.chain(hone::controller::install::webhook());
        let bound = |object: &Value| {
            let kind = object["kind"].as_str().unwrap_or_default();
            let users =
                object["metadata"]["name"].as_str().is_some_and(|name| name.starts_with("hone-workspaces-"));
            ["Role", "ClusterRole"].contains(&kind) && !users
        };
        objects.filter(bound).collect()
    });
    let has = |rule: &Value, field: &str, wanted: &str| {
        rule[field].as_array().is_some_and(|list| list.iter().any(|one| one == wanted))
    };
    let rules = roles
        .iter()
        .filter(|role| role["kind"] == "ClusterRole" || role["metadata"]["namespace"] == namespace)
        .flat_map(|role| role["rules"].as_array().cloned().unwrap_or_default());
    rules.into_iter().any(|rule| {
        has(&rule, "apiGroups", group)
            && has(&rule, "resources", resource)
            && has(&rule, "verbs", verb)
            && (rule["resourceNames"].is_null() || has(&rule, "resourceNames", name))
    })
}

/// Fills in the defaults of the stored version.
pub fn defaults(plural: &str, object: &mut Value) {
    let mut fill = |path: &[&str], value: Value| {
        let (last, parents) = path.split_last().unwrap();
        let mut at = &mut *object;
        for name in parents {
            match at.get_mut(*name).filter(|child| child.is_object()) {
                Some(child) => at = child,
                None => return,
            }
        }
        at.as_object_mut().unwrap().entry(last.to_string()).or_insert(value);
    };
    match plural {
        "workspaces" => {
            fill(&["resource", "count"], json!(1));
            fill(&["tuning", "preset", "accessMode"], json!("public"));
            fill(&["inference", "preset", "accessMode"], json!("public"));
        }
        "jobs" => {
            fill(&["spec", "completionMode"], json!("NonIndexed"));
            fill(&["spec", "podReplacementPolicy"], json!("Failed"));
            fill(&["spec", "suspend"], json!(false));
        }
        "services" => fill(&["spec", "clusterIP"], json!("10.0.0.7")),
        "customresourcedefinitions" => {
            object["status"] = json!({"conditions": [{"type": "Established", "status": "True"}]});
        }
        _ => {}
    }
}

/// Checks that a request is well formed.
pub fn form(
    method: &Method,
    kind: &str,
    query: &HashMap<String, String>,
) -> Result<(), (u16, &'static str, String)> {
    if *method == Method::PATCH && kind.contains("apply-patch") && !query.contains_key("fieldManager") {
        return Err((
            422,
            "Invalid",
            "PatchOptions.meta.k8s.io \"\" is invalid: fieldManager: Required value".into(),
        ));
    }
    if *method == Method::PATCH && !kind.contains("apply-patch") && query.contains_key("force") {
        return Err((422, "Invalid", "force: Forbidden: may not be specified for non-apply patch".into()));
    }
    Ok(())
}

pub fn validate(plural: &str, old: Option<&Value>, new: &Value) -> Result<(), String> {
    let meta = &new["metadata"];
    labels("metadata.labels", &meta["labels"])?;
    if let Some(old) = old.filter(|old| old["metadata"]["deletionTimestamp"].is_string()) {
        let had = old["metadata"]["finalizers"].as_array().cloned().unwrap_or_default();
        let has = meta["finalizers"].as_array().cloned().unwrap_or_default();
        if has.iter().any(|finalizer| !had.contains(finalizer)) {
            return Err("metadata.finalizers: Forbidden: no new finalizers can be added if the object is being deleted".into());
        }
    }
    match plural {
        "jobs" => job(old, new),
        "statefulsets" => stateful_set(old, new),
        "nodeclaims" => same(old, new, &[&["spec"]], "spec is immutable"),
        "controllerrevisions" => same(old, new, &[&["data"]], "field is immutable"),
        "services" => service(old, new),
        "events" => event(old, new),
        _ => Ok(()),
    }
}

fn at<'a>(object: &'a Value, path: &[&str]) -> &'a Value {
    path.iter().fold(object, |at, name| &at[*name])
}

fn same(old: Option<&Value>, new: &Value, paths: &[&[&str]], why: &str) -> Result<(), String> {
    let Some(old) = old else { return Ok(()) };
    for path in paths {
        if at(old, path) != at(new, path) {
            return Err(format!("{}: Invalid value: {why}", path.join(".")));
        }
    }
    Ok(())
}

fn job(old: Option<&Value>, new: &Value) -> Result<(), String> {
    let spec = &new["spec"];
    pod("spec.template", &spec["template"])?;
    if new["metadata"]["name"].as_str().is_some_and(|name| name.len() > 63) {
        return Err("metadata.name: Invalid value: must be no more than 63 characters".into());
    }
    indexed(new)?;
    let waits = old.is_some_and(|old| old["spec"]["suspend"] == true && old["status"]["startTime"].is_null());
    let fixed: [&[&str]; 6] = [
        &["spec", "podFailurePolicy"],
        &["spec", "successPolicy"],
        &["spec", "backoffLimitPerIndex"],
        &["spec", "completionMode"],
        &["spec", "selector"],
        &["spec", "completions"],
    ];
    same(old, new, &fixed, "field is immutable")?;
    if waits { Ok(()) } else { same(old, new, &[&["spec", "template"]], "field is immutable") }
}

/// Checks the fields that only an Indexed Job may have, and the rules for its pods' names.
fn indexed(new: &Value) -> Result<(), String> {
    let spec = &new["spec"];
    if spec["completionMode"] != "Indexed" {
        let only = ["backoffLimitPerIndex", "maxFailedIndexes", "successPolicy"];
        return match only.into_iter().find(|field| !spec[*field].is_null()) {
            Some(field) => Err(format!("spec.{field}: Invalid value: requires indexed completion mode")),
            None => Ok(()),
        };
    }
    let Some(count) = spec["completions"].as_u64() else {
        return Err("spec.completions: Required value: when completion mode is Indexed".into());
    };
    if !spec["maxFailedIndexes"].is_null() && spec["backoffLimitPerIndex"].is_null() {
        return Err("spec.backoffLimitPerIndex: Required value: when maxFailedIndexes is specified".into());
    }
    let last =
        format!("{}-{}", new["metadata"]["name"].as_str().unwrap_or_default(), count.saturating_sub(1));
    if last.len() > 63 {
        return Err(format!(
            "metadata.name: Invalid value: will not able to create pod with invalid DNS label: {last}"
        ));
    }
    Ok(())
}

fn stateful_set(old: Option<&Value>, new: &Value) -> Result<(), String> {
    let spec = &new["spec"];
    pod("spec.template", &spec["template"])?;
    let selector = &spec["selector"]["matchLabels"];
    let template = &spec["template"]["metadata"]["labels"];
    let selected = |(name, value): (&String, &Value)| template[name] == *value;
    if !selector.as_object().is_some_and(|labels| labels.iter().all(selected)) {
        return Err(
            "spec.template.metadata.labels: Invalid value: `selector` does not match template `labels`"
                .into(),
        );
    }
    let fixed: [&[&str]; 4] = [
        &["spec", "selector"],
        &["spec", "serviceName"],
        &["spec", "podManagementPolicy"],
        &["spec", "volumeClaimTemplates"],
    ];
    same(
        old,
        new,
        &fixed,
        "updates to statefulset spec for fields other than 'replicas', 'template', ... are forbidden",
    )
}

/// Checks the name of a Service, a DNS-1035 label: a letter first, and no dots.
fn service(old: Option<&Value>, new: &Value) -> Result<(), String> {
    let name = new["metadata"]["name"].as_str().unwrap_or_default();
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let begins = name.starts_with(|c: char| c.is_ascii_lowercase());
    if !begins || name.ends_with('-') || name.len() > 63 || !name.chars().all(allowed) {
        return Err(format!(
            "metadata.name: Invalid value: {name:?}: a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character"
        ));
    }
    same(old, new, &[&["spec", "clusterIP"]], "field is immutable")
}

fn pod(path: &str, template: &Value) -> Result<(), String> {
    labels(&format!("{path}.labels"), &template["metadata"]["labels"])?;
    let spec = &template["spec"];
    let user = &spec["securityContext"]["runAsUser"];
    if user.as_i64().is_some_and(|user| !(0..=i64::from(i32::MAX)).contains(&user)) {
        return Err(format!(
            "{path}.spec.securityContext.runAsUser: Invalid value: {user}: must be between 0 and 2147483647, inclusive"
        ));
    }
    let affinity = at(
        spec,
        &["affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution", "nodeSelectorTerms"],
    );
    for expression in affinity
        .as_array()
        .into_iter()
        .flatten()
        .flat_map(|term| term["matchExpressions"].as_array().cloned().unwrap_or_default())
    {
        label_key(&format!("{path}.spec.affinity"), expression["key"].as_str().unwrap_or_default())?;
        for value in expression["values"].as_array().into_iter().flatten() {
            label_value(&format!("{path}.spec.affinity"), value)?;
        }
    }
    for container in spec["containers"].as_array().into_iter().flatten() {
        let grace = spec["terminationGracePeriodSeconds"].as_i64().unwrap_or(30);
        let sleep = at(container, &["lifecycle", "preStop", "sleep", "seconds"]).as_i64();
        if sleep.is_some_and(|seconds| seconds <= 0 || seconds >= grace) {
            return Err(format!(
                "{path}.spec.containers[0].lifecycle.preStop: Invalid value: must be greater than 0 and less than terminationGracePeriodSeconds ({grace})"
            ));
        }
        for variable in container["env"].as_array().into_iter().flatten() {
            let key = &variable["valueFrom"]["secretKeyRef"]["key"];
            let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            if key.as_str().is_some_and(|key| key.is_empty() || !key.chars().all(allowed)) {
                return Err(format!(
                    "{path}.spec.containers[0].env.valueFrom.secretKeyRef.key: Invalid value: {key}"
                ));
            }
        }
    }
    for volume in spec["volumes"].as_array().into_iter().flatten() {
        let claim = &volume["persistentVolumeClaim"];
        if claim.is_object() && claim["claimName"].as_str().is_none_or(str::is_empty) {
            return Err(format!("{path}.spec.volumes.persistentVolumeClaim.claimName: Required value"));
        }
        let kinds = [
            "",
            "DirectoryOrCreate",
            "Directory",
            "FileOrCreate",
            "File",
            "Socket",
            "CharDevice",
            "BlockDevice",
        ];
        if volume["hostPath"]["type"].as_str().is_some_and(|kind| !kinds.contains(&kind)) {
            return Err(format!(
                "{path}.spec.volumes.hostPath.type: Unsupported value: {}",
                volume["hostPath"]["type"]
            ));
        }
    }
    Ok(())
}

fn labels(path: &str, labels: &Value) -> Result<(), String> {
    for (key, value) in labels.as_object().into_iter().flatten() {
        label_key(path, key)?;
        label_value(path, value)?;
    }
    Ok(())
}

fn is_name(text: &str) -> bool {
    let ends = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    text.len() <= 63
        && ends(text.chars().next())
        && ends(text.chars().next_back())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}

fn label_key(path: &str, key: &str) -> Result<(), String> {
    match is_name(key.rsplit('/').next().unwrap_or_default()) {
        true => Ok(()),
        false => Err(format!(
            "{path}: Invalid value: {key:?}: name part must consist of alphanumeric characters, '-', '_' or '.'"
        )),
    }
}

fn label_value(path: &str, value: &Value) -> Result<(), String> {
    match value.as_str() {
        Some("") => Ok(()),
        Some(text) if is_name(text) => Ok(()),
        _ => Err(format!(
            "{path}: Invalid value: {value}: a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.'"
        )),
    }
}

fn event(old: Option<&Value>, new: &Value) -> Result<(), String> {
    if new["regarding"].is_null() {
        return Ok(());
    }
    for (field, most) in [("note", 1024), ("action", 128), ("reason", 128), ("reportingInstance", 128)] {
        let text = new[field].as_str().unwrap_or_default();
        if text.len() > most {
            return Err(format!("{field}: Invalid value: \"\": can have at most {most} characters"));
        }
        if text.is_empty() && field != "note" {
            return Err(format!("{field}: Required value"));
        }
    }
    for field in ["eventTime", "reportingController"] {
        if new[field].as_str().is_none_or(str::is_empty) {
            return Err(format!("{field}: Required value"));
        }
    }
    let fixed: [&[&str]; 4] = [&["note"], &["reason"], &["regarding"], &["eventTime"]];
    same(old, new, &fixed, "field is immutable")
}

/// The owner of each leaf of an object: by server-side apply, or by any other write.
#[derive(Clone, Debug, Default)]
pub struct Owners {
    applied: BTreeMap<String, BTreeSet<Vec<String>>>,
    written: BTreeMap<String, BTreeSet<Vec<String>>>,
}

impl Owners {
    /// Returns a field with another value that somebody else owns.
    pub fn conflict(&self, manager: &str, object: &Value, body: &Value) -> Option<String> {
        let others = self.applied.iter().filter(|(name, _)| *name != manager).chain(&self.written);
        let owned: BTreeSet<&Vec<String>> = others.flat_map(|(_, paths)| paths).collect();
        leaves(body).into_iter().find_map(|path| {
            let names: Vec<&str> = path.iter().map(String::as_str).collect();
            (owned.contains(&path) && at(object, &names) != at(body, &names)).then(|| path.join("."))
        })
    }

    /// Takes them over; the fields that this manager no longer applies and nobody else owns.
    pub fn apply(&mut self, manager: &str, body: &Value) -> Vec<Vec<String>> {
        let now = leaves(body);
        for paths in self.applied.values_mut().chain(self.written.values_mut()) {
            paths.retain(|path| !now.contains(path) || at_all(body, path).is_null());
        }
        let before = self.applied.insert(manager.into(), now.clone()).unwrap_or_default();
        let others: BTreeSet<Vec<String>> = self
            .applied
            .iter()
            .filter(|(name, _)| *name != manager)
            .chain(&self.written)
            .flat_map(|(_, paths)| paths.clone())
            .collect();
        before.into_iter().filter(|path| !now.contains(path) && !others.contains(path)).collect()
    }

    pub fn write(&mut self, manager: &str, object: &Value, body: &Value) {
        let changed = leaves(body).into_iter().filter(|path| at_all(object, path) != at_all(body, path));
        self.written.entry(manager.into()).or_default().extend(changed);
    }
}

fn at_all<'a>(object: &'a Value, path: &[String]) -> &'a Value {
    path.iter().fold(object, |at, name| &at[name])
}

/// Returns the paths of all leaves. A list is one leaf. Fields of the server itself have no owner.
fn leaves(object: &Value) -> BTreeSet<Vec<String>> {
    fn walk(value: &Value, path: &mut Vec<String>, found: &mut BTreeSet<Vec<String>>) {
        match value {
            Value::Object(fields) if !fields.is_empty() => {
                for (name, child) in fields {
                    path.push(name.clone());
                    walk(child, path, found);
                    path.pop();
                }
            }
            _ => _ = found.insert(path.clone()),
        }
    }
    let mut found = BTreeSet::new();
    walk(object, &mut Vec::new(), &mut found);
    let kept = [
        vec!["apiVersion".to_owned()],
        vec!["kind".into()],
        vec!["metadata".into(), "name".into()],
        vec!["metadata".into(), "namespace".into()],
    ];
    found.retain(|path| !kept.contains(path));
    found
}

pub fn take_away(object: &mut Value, path: &[String]) {
    let Some((last, parents)) = path.split_last() else { return };
    let parent = parents.iter().try_fold(&mut *object, |at, name| at.get_mut(name));
    if let Some(Value::Object(fields)) = parent {
        fields.remove(last);
    }
}
