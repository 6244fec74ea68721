//! The end of a run -> one JSON line for Kubernetes' termination message, which `kubectl describe` and controllers
//! show. A failure to write it never fails a run.

use super::clean::clean;
use crate::fault::Fault;
use serde_json::{Map, Value};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// LIMIT: kubelet limits one container's message to 4 KiB, and the messages of a pod's containers together to 12 KiB.
const LINE_BYTES_MAX: usize = 2048;

/// The end of a run, and its results.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// The reason why the run failed; `None` if it succeeded.
    pub fault: Option<Fault>,
    /// The last logged optimizer step.
    pub step: Option<u64>,
    /// The loss of that step.
    pub loss: Option<f64>,
    /// The loss of the newest evaluation.
    pub eval_loss: Option<f64>,
    /// Folder of the adapter.
    pub output: Option<PathBuf>,
    /// Image with its tag.
    pub image: Option<String>,
    /// Digest of the image.
    pub digest: Option<String>,
}

/// Returns the file for the message: `HONE_TERMINATION_LOG`, or else Kubernetes' own file if it exists.
pub fn path() -> Option<PathBuf> {
    let default = Path::new("/dev/termination-log");
    match std::env::var_os("HONE_TERMINATION_LOG") {
        Some(path) if !path.is_empty() => Some(path.into()),
        _ => default.is_file().then(|| default.to_path_buf()),
    }
}

/// LIMIT: bytes of an old message that are covered; hone's are shorter.
const OLD_BYTES_MAX: u64 = 64 << 10;

/// The words of a start after a kill, for `write_ahead`.
pub const CONTINUES: &str = "it continues from its newest checkpoint";
/// The same of a program that keeps nothing.
pub const BEGINS_ANEW: &str = "nothing is lost";

/// Writes, at the start, the message for a killed process (SIGKILL), since it cannot write then. `again` describes the
/// effect of another start. Every other end of the process replaces this message.
pub fn write_ahead(path: &Path, again: &str) {
    let line = serde_json::json!({
        "code": 137,
        "kind": "killed",
        "message": "hone was killed and could not report a reason: it ran out of memory, or its pod was stopped",
        "help": format!("start it again: {again}; if the container was OOMKilled, give it more memory"),
        "retry_helps": true,
    });
    put(path, &format!("{line}\n"));
}

/// Replaces the file's text. A pipe without a reader is not waited for. A process may end between any two calls, and
/// another thread may be writing its last word: the file is never without a message, so it is not cut before the new
/// text is there, and empty lines cover a longer old text until it is.
fn put(path: &Path, text: &str) {
    let mut open = std::fs::OpenOptions::new();
    open.write(true).create(true).custom_flags(libc::O_NONBLOCK);
    if let Ok(mut file) = open.open(path) {
        let old = file.metadata().map_or(0, |about| about.len().min(OLD_BYTES_MAX) as usize);
        let cover = "\n".repeat(old.saturating_sub(text.len()));
        let _ = file.write_all(format!("{text}{cover}").as_bytes());
        let _ = file.set_len(text.len() as u64);
    }
}

/// Writes the message of a program that ends before any command runs.
pub fn leave(fault: &Fault) {
    if let Some(path) = path() {
        write(&path, &Outcome { fault: Some(fault.clone()), ..Outcome::default() });
    }
}

/// Replaces the file's text. A failure to write is not reported, because the exit code is enough.
pub fn write(path: &Path, outcome: &Outcome) {
    put(path, &line(outcome));
}

/// Returns the line itself.
pub fn line(outcome: &Outcome) -> String {
    let mut characters_max = LINE_BYTES_MAX;
    loop {
        let line = format!("{}\n", Value::Object(fields(outcome, characters_max)));
        if line.len() <= LINE_BYTES_MAX || characters_max == 0 {
            return line;
        }
        characters_max /= 2;
    }
}

/// Returns the line's fields. All texts are cut to the same length, so that the line stays whole JSON.
fn fields(outcome: &Outcome, characters_max: usize) -> Map<String, Value> {
    let text = |text: &str| Value::from(clean(text, characters_max));
    let mut fields = Map::new();
    let (code, kind) = match &outcome.fault {
        Some(fault) => (fault.kind.exit_code(), fault.kind.name()),
        None => (0, "ok"),
    };
    fields.insert("code".into(), code.into());
    fields.insert("kind".into(), kind.into());
    let mut add = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            fields.insert(name.into(), value);
        }
    };
    let fault = outcome.fault.as_ref();
    add("message", fault.map(|fault| text(&fault.message)));
    add("help", fault.and_then(|fault| fault.help.as_deref()).map(text));
    add("retry_helps", fault.map(|fault| fault.kind.retry_helps().into()));
    add("step", outcome.step.map(Value::from));
    add("loss", outcome.loss.map(Value::from));
    add("eval_loss", outcome.eval_loss.map(Value::from));
    add("output", outcome.output.as_ref().map(|path| text(&path.to_string_lossy())));
    add("image", outcome.image.as_deref().map(text));
    add("digest", outcome.digest.as_deref().map(text));
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(outcome: &Outcome) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        std::fs::write(&path, "an older, longer message ".repeat(200)).unwrap();
        write(&path, outcome);
        std::fs::read_to_string(&path).unwrap()
    }

    #[test]
    fn success_and_failure_are_one_line_each() {
        let outcome = Outcome {
            step: Some(50),
            loss: Some(1.25),
            output: Some("/mnt/results".into()),
            image: Some("host/adapter:1".into()),
            digest: Some("sha256:ab".into()),
            ..Outcome::default()
        };
        assert_eq!(
            written(&outcome),
            "{\"code\":0,\"kind\":\"ok\",\"step\":50,\"loss\":1.25,\"output\":\"/mnt/results\",\"image\":\"host/adapter:1\",\"digest\":\"sha256:ab\"}\n"
        );
        let fault = Fault::data("row 3:\n\u{1b}[31mbad").help("look");
        assert_eq!(
            written(&Outcome { fault: Some(fault), ..Outcome::default() }),
            "{\"code\":11,\"kind\":\"data\",\"message\":\"row 3:\\\\n\\\\u{1b}[31mbad\",\"help\":\"look\",\"retry_helps\":false}\n"
        );
    }

    #[test]
    fn long_messages_are_cut_and_the_line_stays_json() {
        for letter in ["x", "\"", "\u{1b}", "界"] {
            let fault = Fault::data(letter.repeat(50_000)).help(letter.repeat(50_000));
            let line = written(&Outcome {
                fault: Some(fault),
                digest: Some("sha256:ab".into()),
                ..Outcome::default()
            });
            assert!(line.len() <= LINE_BYTES_MAX && line.len() > LINE_BYTES_MAX / 4, "{}", line.len());
            let parsed: Value = serde_json::from_str(&line).unwrap();
            assert_eq!((&parsed["code"], &parsed["digest"]), (&11.into(), &"sha256:ab".into()));
        }
    }

    #[test]
    fn what_cannot_be_written_is_no_fault() {
        write(Path::new("/no/such/folder/log"), &Outcome::default());
    }
}
