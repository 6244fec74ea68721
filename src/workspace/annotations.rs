//! A Workspace's annotations -> options of its Job or servers. One table; docs/annotations.md holds it.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{EnvVar, EnvVarSource, SecretKeySelector};

use super::kind::Workspace;
use crate::fault::Result;
use crate::spec::{Mistakes, Origin, keys};

/// Prefix of all annotations of hone.
pub const PREFIX: &str = "hone.sh/";

/// The writer of an annotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The user writes it, and it is an input of the run.
    Input,
    /// The controller writes it.
    Output,
}

/// One annotation that Workspaces may have.
#[derive(Debug)]
pub struct Annotation {
    /// The name without the prefix.
    pub name: &'static str,
    /// Form of its value, for people.
    pub value: &'static str,
    /// The side that writes it: the user or the controller.
    pub side: Side,
    /// The meaning of the annotation, in a sentence.
    pub about: &'static str,
}

const fn input(name: &'static str, value: &'static str, about: &'static str) -> Annotation {
    Annotation { name, value, side: Side::Input, about }
}

const fn output(name: &'static str, value: &'static str, about: &'static str) -> Annotation {
    Annotation { name, value, side: Side::Output, about }
}

/// All annotations, those of the user first.
#[rustfmt::skip]
pub const TABLE: [Annotation; 33] = [
    input("image", "an image", "The program's image, in place of `--image`."),
    input("image-pull-policy", "Always, IfNotPresent or Never", "Pull policy of that image; unset: Kubernetes' default."),
    input("image-pull-secrets", "names, separated by commas", "Secrets for pulling that image."),
    input("model", "hf://, oci:// or an absolute path", "Source of the base model's weights, in place of the preset's: a mirror, a fork, a folder of the image or below /mnt/cache (`cache-claim`)."),
    input("gpus", "a whole number", "Number of GPUs of the pod, in place of the instance type's; 0 trains on the CPU."),
    input("cpu", "a quantity", "CPU request."),
    input("memory", "a quantity", "Memory request, in place of the plan's."),
    input("ephemeral-storage", "a quantity", "Request for the node's disk, in place of the plan's."),
    input("cache-claim", "a PersistentVolumeClaim", "Keeps weights and downloads between pods and Workspaces; unset: they are on the node's disk and are lost with the pod."),
    input("work-claim", "a PersistentVolumeClaim", "Keeps checkpoints and results of an image output, so that a new pod continues the training; unset: the node's disk. Several nodes need the access mode ReadWriteMany."),
    input("queue-name", "a Kueue LocalQueue", "Queue of the Job: it starts suspended until Kueue admits it; the pods of several nodes start together or not at all."),
    input("priority-class", "a PriorityClass", "Priority of the pod."),
    input("service-account", "a ServiceAccount", "Identity of the pod, for registries and object stores that accept it."),
    input("retries", "a whole number", "Number of failures that are tried again (`backoffLimit`; on several nodes `backoffLimitPerIndex`); unset: 6. If a retry cannot help, the Job ends at once."),
    input("deadline", "a duration", "Longest run time of the Job, after which Kubernetes ends it (`activeDeadlineSeconds`)."),
    input("ttl", "a duration", "Time from the end of the Job until Kubernetes removes it (`ttlSecondsAfterFinished`)."),
    input("grace-period", "a duration", "Time that a stopped pod has to write a checkpoint, or to finish its answers; unset: 5m, and 1m for servers."),
    input("run-as-user", "a whole number from 1", "User and group id of the pod, for volumes that belong to this id; unset: 65532."),
    input("ca-config-map", "a ConfigMap", "ConfigMap whose key ca.crt holds root certificates that are trusted besides the built-in ones."),
    input("config-overrides", "lines of Section.key=value", "Keys that override training_config.yaml, as `--set` does."),
    input("env", "lines of NAME=value", "Environment of the container; `NAME=secret:SECRET/KEY` takes the value from a Secret."),
    input("spot", "true or false", "true: the pod tolerates Azure's spot nodes; unset: true if the cloud is Azure, as in KAITO."),
    input("node-class", "a name", "Node class of the nodes that the controller requests from Karpenter; unset: default."),
    input("ignore", "true or false", "true: `hone controller` ignores this Workspace."),
    output("revision", "a number", "Revision of the inputs that the current Job was made from."),
    output("step", "of steps", "Step that training has reached."),
    output("loss", "a number", "Loss of the last logged step."),
    output("eta", "a duration", "Estimated time until the end of the training."),
    output("digest", "sha256:...", "Digest of the image that was pushed last."),
    output("pushed", "an image with its digest", "Image that was pushed last; servers that name this Workspace follow it."),
    output("adapters", "names, images, digests and strengths", "Adapters that the servers use, as the servers report them."),
    output("exit-code", "a number", "Exit code of the last container that ended."),
    output("node-claim", "a name", "NodeClaim or NodePool made for this Workspace."),
];

/// The options that the annotations set.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options {
    /// Image of hone.
    pub image: Option<String>,
    /// `Always`, `IfNotPresent` or `Never`.
    pub image_pull_policy: Option<String>,
    /// Secrets that the image is pulled with.
    pub image_pull_secrets: Vec<String>,
    /// Address of the weights in place of the preset's.
    pub model: Option<String>,
    /// GPUs of the pod.
    pub gpus: Option<u32>,
    /// CPU request, as a quantity of Kubernetes.
    pub cpu: Option<String>,
    /// Memory request, as a quantity of Kubernetes.
    pub memory: Option<String>,
    /// Request for the node's disk, as a quantity of Kubernetes.
    pub ephemeral_storage: Option<String>,
    /// PersistentVolumeClaim for downloads.
    pub cache_claim: Option<String>,
    /// PersistentVolumeClaim for checkpoints and results.
    pub work_claim: Option<String>,
    /// LocalQueue of Kueue.
    pub queue_name: Option<String>,
    /// PriorityClass of the pod.
    pub priority_class: Option<String>,
    /// ServiceAccount of the pod.
    pub service_account: Option<String>,
    /// Failures that are tried again.
    pub retries: Option<i32>,
    /// Seconds after which the Job is ended.
    pub deadline_seconds: Option<i64>,
    /// Seconds after its end when the Job is removed.
    pub ttl_seconds: Option<i32>,
    /// Seconds to write a checkpoint when the pod is stopped.
    pub grace_seconds: Option<i64>,
    /// User and group of the pod.
    pub run_as_user: Option<i64>,
    /// ConfigMap whose ca.crt is trusted too.
    pub ca_config_map: Option<String>,
    /// Assignments `Section.key=value` over the configuration.
    pub config_overrides: Vec<String>,
    /// Environment of the container.
    pub env: Vec<EnvVar>,
    /// Whether spot nodes are tolerated.
    pub spot: Option<bool>,
    /// Node class of requested nodes.
    pub node_class: Option<String>,
    /// Whether the controller leaves the Workspace alone.
    pub ignore: bool,
}

/// Reads all annotations of hone.
///
/// # Errors
/// Config: unknown annotations with our prefix, and values that are not what they must be; all of them.
pub fn read(workspace: &Workspace) -> Result<Options> {
    let mut reader = Reader { workspace, mistakes: Mistakes::default() };
    reader.refuse_unknown();
    let options = Options {
        image: reader.text("image"),
        image_pull_policy: reader
            .with("image-pull-policy", |text| word(text, &["Always", "IfNotPresent", "Never"])),
        image_pull_secrets: reader.with("image-pull-secrets", names).unwrap_or_default(),
        model: reader.with("model", address),
        gpus: reader.with("gpus", |text| text.parse().ok().filter(|gpus| *gpus <= GPUS_MAX)),
        cpu: reader.with("cpu", quantity),
        memory: reader.with("memory", quantity),
        ephemeral_storage: reader.with("ephemeral-storage", quantity),
        cache_claim: reader.with("cache-claim", object_name),
        work_claim: reader.with("work-claim", object_name),
        queue_name: reader
            .with("queue-name", |text| object_name(text).filter(|text| text.len() <= LABEL_BYTES_MAX)),
        priority_class: reader.with("priority-class", object_name),
        service_account: reader.with("service-account", object_name),
        retries: reader.with("retries", |text| text.parse().ok().filter(|retries| *retries >= 0)),
        deadline_seconds: reader.with("deadline", seconds),
        ttl_seconds: reader.with("ttl", |text| seconds(text)?.try_into().ok()),
        grace_seconds: reader.with("grace-period", seconds),
        run_as_user: reader
            .with("run-as-user", |text| text.parse().ok().filter(|user| (1..=USER_MAX).contains(user))),
        ca_config_map: reader.with("ca-config-map", object_name),
        config_overrides: reader.with("config-overrides", assignments).unwrap_or_default(),
        env: reader.with("env", environment).unwrap_or_default(),
        spot: reader.with("spot", boolean),
        node_class: reader.with("node-class", object_name),
        ignore: reader.with("ignore", boolean).unwrap_or(false),
    };
    reader.mistakes.into_result_of("the Workspace").map(|()| options)
}

/// Returns the annotations that are inputs of the run, by full name; the controller's own are not.
pub fn inputs(workspace: &Workspace) -> BTreeMap<&str, &str> {
    let annotations = workspace.metadata.annotations.iter().flatten();
    annotations
        .filter(|(name, _)| {
            name.strip_prefix(PREFIX)
                .is_some_and(|name| find(name).is_none_or(|known| known.side == Side::Input))
        })
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect()
}

/// Returns the table in Markdown; docs/annotations.md holds it.
pub fn markdown() -> String {
    let row = |annotation: &Annotation| {
        format!("| `{PREFIX}{}` | {} | {} |\n", annotation.name, annotation.value, annotation.about)
    };
    let table = |side| {
        let rows = TABLE.iter().filter(|annotation| annotation.side == side);
        rows.fold("| annotation | value | what it does |\n|---|---|---|\n".to_owned(), |table, annotation| {
            table + &row(annotation)
        })
    };
    format!("{}\nWritten by `hone controller`:\n\n{}", table(Side::Input), table(Side::Output))
}

/// LIMIT: the largest user id that Kubernetes accepts.
const USER_MAX: i64 = i32::MAX as i64;
/// LIMIT: bytes of a label's value, which the queue's name becomes.
const LABEL_BYTES_MAX: usize = 63;
/// LIMIT: no node has more.
const GPUS_MAX: u32 = 64;

fn find(name: &str) -> Option<&'static Annotation> {
    TABLE.iter().find(|annotation| annotation.name == name)
}

struct Reader<'a> {
    workspace: &'a Workspace,
    mistakes: Mistakes,
}

impl Reader<'_> {
    fn refuse_unknown(&mut self) {
        for name in self.workspace.metadata.annotations.iter().flatten().map(|(name, _)| name) {
            let Some(rest) = name.strip_prefix(PREFIX).filter(|rest| find(rest).is_none()) else { continue };
            let known = TABLE.iter().map(|annotation| annotation.name);
            let hint = match keys::nearest(known, rest) {
                Some(near) => format!("did you mean {PREFIX}{near}?"),
                None => "docs/annotations.md lists all".into(),
            };
            self.mistakes.add(&Origin::Default, format!("metadata.annotations: {name} is not known; {hint}"));
        }
    }

    fn text(&mut self, name: &str) -> Option<String> {
        self.with(name, |text| Some(text.to_owned()))
    }

    /// Returns the value as `read` understands it. An empty value counts as none.
    fn with<T>(&mut self, name: &str, read: impl Fn(&str) -> Option<T>) -> Option<T> {
        let text = self.workspace.annotation(&format!("{PREFIX}{name}"))?.trim();
        if text.is_empty() {
            return None;
        }
        let value = read(text);
        if value.is_none() {
            let expected = find(name).expect("a name of the table").value;
            let message =
                format!("metadata.annotations[{PREFIX}{name}]: expected {expected}, found {text:?}");
            self.mistakes.add(&Origin::Default, message);
        }
        value
    }
}

fn word(text: &str, words: &[&str]) -> Option<String> {
    words.contains(&text).then(|| text.to_owned())
}

fn boolean(text: &str) -> Option<bool> {
    text.parse().ok()
}

/// Returns a DNS-1123 subdomain, as names of objects are.
pub(super) fn object_name(text: &str) -> Option<String> {
    let label = |label: &str| {
        let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        !label.is_empty() && !label.starts_with('-') && !label.ends_with('-') && label.bytes().all(inner)
    };
    (text.len() <= 253 && text.split('.').all(label)).then(|| text.to_owned())
}

fn address(text: &str) -> Option<String> {
    let known = ["hf://", "oci://", "preset:", "/"];
    known.iter().any(|start| text.starts_with(start)).then(|| text.to_owned())
}

/// Parses names and drops duplicates, because Kubernetes refuses a list with duplicates.
fn names(text: &str) -> Option<Vec<String>> {
    let mut names = Vec::new();
    for name in text.split(',') {
        let name = object_name(name.trim())?;
        if !names.contains(&name) {
            names.push(name);
        }
    }
    Some(names)
}

/// Reads Kubernetes' quantities in the usual forms: `500m`, `1.5`, `20Gi`, `1e3`.
fn quantity(text: &str) -> Option<String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.').len();
    let (number, unit) = text.split_at(digits);
    let units = ["", "m", "k", "M", "G", "T", "P", "Ki", "Mi", "Gi", "Ti", "Pi"];
    (number.parse::<f64>().is_ok() && units.contains(&unit)).then(|| text.to_owned())
}

/// Reads a duration: `90`, `90s`, `15m`, `2h` or `7d`.
fn seconds(text: &str) -> Option<i64> {
    let (number, unit) = match text.char_indices().next_back()? {
        (_, last) if last.is_ascii_digit() => (text, 1),
        (at, 's') => (&text[..at], 1),
        (at, 'm') => (&text[..at], 60),
        (at, 'h') => (&text[..at], 60 * 60),
        (at, 'd') => (&text[..at], 24 * 60 * 60),
        _ => return None,
    };
    number.parse::<i64>().ok().filter(|number| *number >= 0)?.checked_mul(unit)
}

fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
}

fn assignments(text: &str) -> Option<Vec<String>> {
    let whole = |line: &str| line.split_once('=').is_some_and(|(key, _)| !key.trim().is_empty());
    lines(text).map(|line| whole(line).then(|| line.to_owned())).collect()
}

/// Parses variables. Of two lines with the same name the last counts, as in a shell.
fn environment(text: &str) -> Option<Vec<EnvVar>> {
    let mut list: Vec<EnvVar> = Vec::new();
    for line in lines(text) {
        let variable = variable(line)?;
        list.retain(|other| other.name != variable.name);
        list.push(variable);
    }
    Some(list)
}

fn variable(line: &str) -> Option<EnvVar> {
    let (name, value) = line.split_once('=')?;
    let letter = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    let starts_well = name.bytes().next().is_some_and(|byte| !byte.is_ascii_digit());
    if !starts_well || !name.bytes().all(letter) {
        return None;
    }
    let name = name.to_owned();
    Some(match value.strip_prefix("secret:") {
        None => EnvVar { name, value: Some(value.into()), ..EnvVar::default() },
        Some(place) => {
            let (secret, key) = place.split_once('/')?;
            let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            let key = Some(key).filter(|key| !key.is_empty() && key.chars().all(allowed))?;
            secret_variable(name, object_name(secret)?, key.into())
        }
    })
}

pub(super) fn secret_variable(name: String, secret: String, key: String) -> EnvVar {
    let selector = SecretKeySelector { name: secret, key, optional: None };
    let source = EnvVarSource { secret_key_ref: Some(selector), ..EnvVarSource::default() };
    EnvVar { name, value_from: Some(source), ..EnvVar::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;

    fn workspace(annotations: &[(&str, &str)]) -> Workspace {
        let mut workspace = Workspace::default();
        let named = annotations.iter().map(|(name, value)| (format!("{PREFIX}{name}"), value.to_string()));
        workspace.metadata.annotations = Some(named.collect());
        workspace
    }

    #[test]
    fn values_become_options() {
        let options = read(&workspace(&[
            ("gpus", "0"),
            ("deadline", "2h"),
            ("ttl", "7d"),
            ("grace-period", "90"),
            ("memory", "20Gi"),
            ("image-pull-secrets", "a, b.c, a"),
            ("env", "A=0\nA=1\n# why\nTOKEN=secret:keys/token\nEMPTY=\n"),
            ("config-overrides", "LoraConfig.r=16"),
            ("priority-class", " "),
        ]))
        .unwrap();
        assert_eq!(
            (options.gpus, options.deadline_seconds, options.ttl_seconds),
            (Some(0), Some(7200), Some(604_800))
        );
        assert_eq!((options.grace_seconds, options.memory.as_deref()), (Some(90), Some("20Gi")));
        assert_eq!(options.image_pull_secrets, ["a", "b.c"]);
        assert_eq!((options.config_overrides.len(), options.priority_class), (1, None));
        let env = serde_json::to_string(&options.env).unwrap();
        expect![[r#"[{"name":"A","value":"1"},{"name":"TOKEN","valueFrom":{"secretKeyRef":{"key":"token","name":"keys"}}},{"name":"EMPTY","value":""}]"#]].assert_eq(&env);
    }

    #[test]
    fn everything_wrong_is_told_together() {
        let fault = read(&workspace(&[
            ("gpu", "1"),
            ("gpus", "-1"),
            ("ttl", "soon"),
            ("cache-claim", "My_Claim"),
            ("env", "1A=x"),
            ("memory", "20 GB"),
            ("spot", "yes"),
            ("model", "models/phi"),
        ]))
        .unwrap_err();
        expect![[r#"
            8 mistakes in the Workspace
              metadata.annotations: hone.sh/gpu is not known; did you mean hone.sh/gpus?
              metadata.annotations[hone.sh/model]: expected hf://, oci:// or an absolute path, found "models/phi"
              metadata.annotations[hone.sh/gpus]: expected a whole number, found "-1"
              metadata.annotations[hone.sh/memory]: expected a quantity, found "20 GB"
              metadata.annotations[hone.sh/cache-claim]: expected a PersistentVolumeClaim, found "My_Claim"
              metadata.annotations[hone.sh/ttl]: expected a duration, found "soon"
              metadata.annotations[hone.sh/env]: expected lines of NAME=value, found "1A=x"
              metadata.annotations[hone.sh/spot]: expected true or false, found "yes""#]]
        .assert_eq(&fault.message);
    }

    #[test]
    fn what_the_controller_writes_is_no_input() {
        let workspace = workspace(&[("gpus", "1"), ("step", "3"), ("loss", "2.5")]);
        assert_eq!(inputs(&workspace).into_iter().collect::<Vec<_>>(), [("hone.sh/gpus", "1")]);
        assert!(read(&workspace).is_ok());
    }

    #[test]
    fn every_name_of_the_table_is_read_or_written_once() {
        let mut names: Vec<&str> = TABLE.iter().map(|annotation| annotation.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), TABLE.len());
        let code = include_str!("annotations.rs");
        for annotation in TABLE.iter().filter(|annotation| annotation.side == Side::Input) {
            let read = ["text", "with"].iter().any(|how| {
                code.replace([' ', '\n'], "").contains(&format!("reader.{how}(\"{}\"", annotation.name))
            });
            assert!(read, "{} is in the table and never read", annotation.name);
        }
    }
}
