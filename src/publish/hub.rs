//! An adapter's files -> a commit in a repository of the Hugging Face hub, by the hub's own protocol: the repository
//! and its branch are created if they do not exist, large files go to its store of large files (Git LFS), and one
//! commit takes all. Files that the hub has already are not sent again, so that an interrupted push is continued. If
//! the repository has all files unchanged, there is no commit.
//!
//! The token goes to the hub's own origin only; addresses of the store of large files carry signatures of their own.

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use serde_json::{Value as Json, json};
use url::Url;

use crate::fault::{Fault, Kind, Result};
use crate::report::{Report, Stage, Task, Unit};
use crate::source::send::{Answer, Content, Sender, Sending};
use crate::source::{self, Hub};

/// Bytes of a file by which the hub decides how it is kept.
const SAMPLE_BYTES: u64 = 512;
/// LIMIT: the largest file that goes into the commit itself; cards and configurations have kilobytes.
const REGULAR_BYTES_MAX: u64 = 8 << 20;
/// LIMIT: parts of a large file.
const PARTS_MAX: u64 = 10_000;
const MAIN: &str = "main";
const LFS_TYPE: &str = "application/vnd.git-lfs+json";

/// A repository of models.
#[derive(Clone, Debug, PartialEq)]
pub struct Repository {
    /// `OWNER/NAME`, or `NAME`: one of the token's owner.
    pub name: String,
    /// The branch that the commit goes to; it is made if it is not there.
    pub revision: String,
    /// Whether a new repository is private; an old one that is public is refused then. `None`: the hub decides.
    pub private: Option<bool>,
}

impl Repository {
    /// Parses `OWNER/NAME[@REVISION]` or `NAME[@REVISION]`.
    ///
    /// # Errors
    /// Config: the text names no repository.
    pub fn parse(text: &str) -> Result<Repository> {
        let (name, revision) = text.split_once('@').unwrap_or((text, MAIN));
        let plain = |part: &str| {
            let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            !part.is_empty() && part.chars().all(known) && !part.starts_with('.') && !part.contains("..")
        };
        let parts: Vec<&str> = name.split('/').collect();
        if parts.len() > 2 || !parts.iter().all(|part| plain(part)) || !revision.split('/').all(plain) {
            return Err(Fault::config("an address hf:// does not name a repository to push to")
                .help("write hf://OWNER/NAME, or hf://OWNER/NAME@BRANCH"));
        }
        Ok(Repository { name: name.into(), revision: revision.into(), private: None })
    }
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        if self.revision == MAIN { Ok(()) } else { write!(f, "@{}", self.revision) }
    }
}

/// # Errors
/// Auth: there is no token. Config: the hub's address is none.
pub fn check(repository: &Repository) -> Result<()> {
    let hub = Hub::from_environment()?;
    match hub.authorization(&hub.endpoint) {
        Some(_) => Ok(()),
        None => Err(Fault::auth(format!("hf://{repository}: there is no token to push with"))
            .help("set HF_TOKEN to a token of the hub that may write")),
    }
}

/// Sends the files; returns the commit.
///
/// # Errors
/// Auth: the token is missing or may not write. Config: the hub refuses the repository or the commit. Push: the hub
/// could not be reached.
pub fn publish(
    repository: &Repository,
    files: &[(&str, PathBuf)],
    message: &str,
    options: &source::Options,
    report: &Report,
) -> Result<String> {
    check(repository)?;
    let mut push = Push {
        hub: Hub::from_environment()?,
        sender: Sender::new(options)?,
        repository: repository.clone(),
        report,
    };
    push.own_name()?;
    push.make()?;
    let files = files.iter().map(|(name, path)| Outgoing::of(name, path)).collect::<Result<Vec<_>>>()?;
    let mut changes = push.changes(&files)?;
    changes.retain(|change| !change.is_there);
    if changes.is_empty() {
        report.note(Stage::Push, format!("hf://{}: every file is there already", push.repository));
        return push.head();
    }
    push.send_large(&changes)?;
    push.commit(&changes, message)
}

/// A file to send.
struct Outgoing<'a> {
    name: &'a str,
    path: &'a Path,
    bytes: u64,
    sha256: String,
}

impl<'a> Outgoing<'a> {
    fn of(name: &'a str, path: &'a Path) -> Result<Outgoing<'a>> {
        let unread = |error| Fault::storage("read", path, &error);
        let mut file = std::fs::File::open(path).map_err(unread)?;
        let mut hash = <sha2::Sha256 as sha2::Digest>::new();
        let (mut bytes, mut part) = (0, vec![0; 1 << 20]);
        loop {
            match file.read(&mut part).map_err(unread)? {
                0 => break,
                count => {
                    sha2::Digest::update(&mut hash, &part[..count]);
                    bytes += count as u64;
                }
            }
        }
        let sha256 = crate::words::hex(sha2::Digest::finalize(hash));
        Ok(Outgoing { name, path, bytes, sha256 })
    }

    /// Returns Git's name for the content. The hub states it for files that are not large.
    fn blob(&self) -> Result<String> {
        let content = self.head(REGULAR_BYTES_MAX)?;
        let mut hash = <sha1::Sha1 as sha1::Digest>::new();
        sha1::Digest::update(&mut hash, format!("blob {}\0", content.len()));
        sha1::Digest::update(&mut hash, content);
        Ok(crate::words::hex(sha1::Digest::finalize(hash)))
    }

    /// Reads at most `most` bytes from the beginning.
    fn head(&self, most: u64) -> Result<Vec<u8>> {
        let mut head = Vec::new();
        let read = std::fs::File::open(self.path).and_then(|file| file.take(most).read_to_end(&mut head));
        read.map_err(|error| Fault::storage("read", self.path, &error))?;
        Ok(head)
    }
}

/// The hub's answer to the names, sizes and beginnings of files.
#[derive(Deserialize)]
struct Modes {
    files: Vec<Mode>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Mode {
    path: String,
    upload_mode: String,
    #[serde(default)]
    oid: Option<String>,
}

/// The answer of the store of large files.
#[derive(Deserialize)]
struct Batch {
    objects: Vec<Object>,
}

#[derive(Deserialize)]
struct Object {
    oid: String,
    #[serde(default)]
    actions: Option<Actions>,
    #[serde(default)]
    error: Option<Json>,
}

#[derive(Deserialize)]
struct Actions {
    #[serde(default)]
    upload: Option<Action>,
    #[serde(default)]
    verify: Option<Action>,
}

#[derive(Deserialize)]
struct Action {
    href: String,
    /// For parts: `chunk_size`, and an address for each number.
    #[serde(default)]
    header: serde_json::Map<String, Json>,
}

/// A file and how the hub keeps it.
struct Change<'a> {
    file: &'a Outgoing<'a>,
    is_large: bool,
    /// The repository has the same content at this path already.
    is_there: bool,
}

struct Push<'a> {
    hub: Hub,
    sender: Sender,
    repository: Repository,
    report: &'a Report,
}

impl Push<'_> {
    /// Completes `NAME` to `OWNER/NAME` with the token's owner.
    fn own_name(&mut self) -> Result<()> {
        if self.repository.name.contains('/') {
            return Ok(());
        }
        let answer = self.ask("GET", &["api", "whoami-v2"], None)?;
        let told: Json = self.json(self.accepted(answer)?)?;
        let owner =
            told["name"].as_str().ok_or_else(|| self.unclear("it does not name the token's owner"))?;
        self.repository = Repository {
            name: Repository::parse(&format!("{owner}/{}", self.repository.name))?.name,
            ..self.repository.clone()
        };
        Ok(())
    }

    /// Makes the repository and the branch if they are not there.
    fn make(&self) -> Result<()> {
        let name = self.repository.name.clone();
        let (owner, own) = name.split_once('/').expect("it has an owner by now");
        let found = self.ask("GET", &["api", "models", owner, own], None)?;
        if found.status == 404 {
            let mut wanted = json!({"name": own, "organization": owner, "type": "model"});
            if let Some(private) = self.repository.private {
                wanted["private"] = private.into();
            }
            let made = self.ask("POST", &["api", "repos", "create"], Some(&wanted))?;
            // 409: another process made it meanwhile.
            if made.status != 409 {
                self.accepted(made)?;
                self.report.note(Stage::Push, format!("hf://{name}: the repository was made"));
            }
        } else {
            let told: Json = self.json(self.accepted(found)?)?;
            if self.repository.private == Some(true) && told["private"] == false {
                return Err(Fault::config(format!(
                    "hf://{name} is public, and hub_private_repo asks for a private one"
                ))
                .help("name another repository, or make this one private on its page"));
            }
        }
        if self.repository.revision == MAIN {
            return Ok(());
        }
        let branch = self.ask(
            "POST",
            &["api", "models", owner, own, "branch", &self.repository.revision],
            Some(&json!({})),
        )?;
        if branch.status == 409 { Ok(()) } else { self.accepted(branch).map(|_| ()) }
    }

    /// Asks how files are kept, and which of them are there.
    fn changes<'f>(&self, files: &'f [Outgoing]) -> Result<Vec<Change<'f>>> {
        let described = |file: &Outgoing| {
            let sample = BASE64_STANDARD.encode(file.head(SAMPLE_BYTES)?);
            Ok(json!({"path": file.name, "sample": sample, "size": file.bytes}))
        };
        let list = files.iter().map(described).collect::<Result<Vec<_>>>()?;
        let answer = self.at_repository("preupload", &json!({"files": list}))?;
        let modes: Modes = self.json(answer)?;
        let change = |file: &'f Outgoing| {
            let mode = modes.files.iter().find(|mode| mode.path == file.name);
            let mode =
                mode.ok_or_else(|| self.unclear(&format!("it does not say how it keeps {}", file.name)))?;
            let is_large = match mode.upload_mode.as_str() {
                "lfs" if file.bytes > 0 => true, // the store of large files takes no empty ones
                "lfs" | "regular" if file.bytes <= REGULAR_BYTES_MAX => false,
                other => {
                    return Err(self.unclear(&format!("{} of {} bytes as {other:?}", file.name, file.bytes)));
                }
            };
            let own = if is_large { file.sha256.clone() } else { file.blob()? };
            Ok(Change { file, is_large, is_there: mode.oid == Some(own) })
        };
        files.iter().map(change).collect()
    }

    /// Sends the files that the store of large files does not have.
    fn send_large(&self, changes: &[Change]) -> Result<()> {
        let large = changes.iter().filter(|change| change.is_large);
        let missing: Vec<&Outgoing> = large.map(|change| change.file).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let objects: Vec<Json> =
            missing.iter().map(|file| json!({"oid": file.sha256, "size": file.bytes})).collect();
        let wanted = json!({
            "operation": "upload", "transfers": ["basic", "multipart"], "hash_algo": "sha256", "objects": objects,
            "ref": {"name": self.repository.revision},
        });
        let mut url = self.url(&[]);
        url.set_path(&format!(
            "{}/{}.git/info/lfs/objects/batch",
            url.path().trim_end_matches('/'),
            self.repository.name
        ));
        let answer = self.post(&url, LFS_TYPE, wanted.to_string().into_bytes())?;
        let batch: Batch = self.json(self.accepted(answer)?)?;
        let bytes = missing.iter().map(|file| file.bytes).sum();
        let name = format!("hf://{}", self.repository);
        let task = Arc::new(self.report.task(Stage::Push, Unit::Bytes, &name, Some(bytes)));
        let mut before = 0;
        for file in missing {
            let object = batch.objects.iter().find(|object| object.oid == file.sha256);
            let object = object.ok_or_else(|| self.unclear(&format!("it does not mention {}", file.name)))?;
            if let Some(error) = &object.error {
                return Err(self.refused(&format!("{}: {}", file.name, text(&error["message"]))));
            }
            // Without actions the store has it already.
            if let Some(Actions { upload: Some(upload), verify }) = &object.actions {
                self.send_one(file, upload, &task)?;
                self.verify(file, verify.as_ref())?;
            }
            before += file.bytes;
            task.set(before);
        }
        Ok(())
    }

    fn send_one(&self, file: &Outgoing, upload: &Action, task: &Arc<Task>) -> Result<()> {
        let whole = |url: &str| self.put(file, url, 0, file.bytes, task).map(|_| ());
        let Some(size) = upload.header.get("chunk_size") else { return whole(&upload.href) };
        let size = size.as_u64().or_else(|| size.as_str()?.parse().ok()).filter(|size| *size > 0);
        let size = size.ok_or_else(|| self.unclear("the size of parts is no number"))?;
        let count = file.bytes.div_ceil(size);
        if count > PARTS_MAX {
            return Err(self.unclear(&format!("{} in {count} parts", file.name)));
        }
        let mut parts = Vec::new();
        for number in 1..=count {
            let keys = [number.to_string(), format!("{number:05}")];
            let named = upload
                .header
                .iter()
                .find(|(key, _)| keys.contains(key) || key.parse::<u64>().is_ok_and(|other| other == number));
            let url = named.and_then(|(_, url)| url.as_str());
            let url = url.ok_or_else(|| self.unclear(&format!("part {number} has no address")))?;
            let from = (number - 1) * size;
            let answer = self.put(file, url, from, size.min(file.bytes - from), task)?;
            let etag = answer.etag.ok_or_else(|| self.unclear(&format!("part {number} has no ETag")))?;
            parts.push(json!({"partNumber": number, "etag": etag}));
        }
        let done = json!({"oid": file.sha256, "parts": parts}).to_string().into_bytes();
        let url = self.parsed(&upload.href)?;
        self.accepted(self.post(&url, LFS_TYPE, done)?).map(|_| ())
    }

    /// Sends a range of a file. The address is signed by itself, so that no token goes with it.
    fn put(&self, file: &Outgoing, url: &str, from: u64, bytes: u64, task: &Arc<Task>) -> Result<Answer> {
        let (url, name) = (self.parsed(url)?, format!("hf://{}: {}", self.repository, file.name));
        let sending = Sending {
            method: reqwest::Method::PUT,
            url: &url,
            name: &name,
            headers: Vec::new(),
            body: Content::Part { file: file.path, from, bytes, task: task.clone() },
        };
        let answer = self.sender.send(&sending, self.report)?;
        match answer.is_success() {
            true => Ok(answer),
            false => Err(Fault::new(Kind::Push, format!("{name}: the store answers {}", answer.told()))
                .help("start again: what was sent is kept")),
        }
    }

    fn verify(&self, file: &Outgoing, action: Option<&Action>) -> Result<()> {
        let Some(action) = action else { return Ok(()) };
        let body = json!({"oid": file.sha256, "size": file.bytes}).to_string().into_bytes();
        self.accepted(self.post(&self.parsed(&action.href)?, LFS_TYPE, body)?).map(|_| ())
    }

    /// Returns the newest commit of the branch.
    fn head(&self) -> Result<String> {
        let mut parts = vec!["api", "models"];
        parts.extend(self.repository.name.split('/'));
        parts.extend(["revision", self.repository.revision.as_str()]);
        let told: Json = self.json(self.accepted(self.ask("GET", &parts, None)?)?)?;
        told["sha"].as_str().map(str::to_owned).ok_or_else(|| self.unclear("it names no commit"))
    }

    /// Makes one commit with all changes; returns its hash.
    fn commit(&self, changes: &[Change], message: &str) -> Result<String> {
        let mut lines = vec![json!({"key": "header", "value": {"summary": message, "description": ""}})];
        for Change { file, is_large, .. } in changes {
            lines.push(match is_large {
                true => json!({"key": "lfsFile", "value": {
                    "path": file.name, "algo": "sha256", "oid": file.sha256, "size": file.bytes}}),
                false => json!({"key": "file", "value": {"path": file.name, "encoding": "base64",
                    "content": BASE64_STANDARD.encode(file.head(REGULAR_BYTES_MAX)?)}}),
            });
        }
        let body: String = lines.iter().map(|line| format!("{line}\n")).collect();
        let mut parts = vec!["api", "models"];
        parts.extend(self.repository.name.split('/'));
        parts.extend(["commit", self.repository.revision.as_str()]);
        let answer = self.post(&self.url(&parts), "application/x-ndjson", body.into_bytes())?;
        let told: Json = self.json(self.accepted(answer)?)?;
        match told["commitOid"].as_str() {
            Some(commit) => Ok(commit.to_owned()),
            None => Err(self.unclear("it names no commit")),
        }
    }

    fn at_repository(&self, what: &str, body: &Json) -> Result<Answer> {
        let mut parts = vec!["api", "models"];
        parts.extend(self.repository.name.split('/'));
        parts.extend([what, self.repository.revision.as_str()]);
        self.accepted(self.ask("POST", &parts, Some(body))?)
    }

    fn ask(&self, method: &str, parts: &[&str], body: Option<&Json>) -> Result<Answer> {
        let body = body.map_or(Vec::new(), |body| body.to_string().into_bytes());
        self.request(method, &self.url(parts), "application/json", body)
    }

    fn post(&self, url: &Url, content_type: &str, body: Vec<u8>) -> Result<Answer> {
        self.request("POST", url, content_type, body)
    }

    fn request(&self, method: &str, url: &Url, content_type: &str, body: Vec<u8>) -> Result<Answer> {
        use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderValue};
        let kind = HeaderValue::from_str(content_type).expect("a constant");
        let mut headers = vec![(CONTENT_TYPE, kind.clone())];
        if content_type == LFS_TYPE {
            headers.push((ACCEPT, kind));
        }
        headers.extend(self.hub.authorization(url).map(|token| (AUTHORIZATION, token.clone())));
        let name = format!("hf://{}", self.repository);
        let method = reqwest::Method::from_bytes(method.as_bytes()).expect("a constant");
        let sending = Sending { method, url, name: &name, headers, body: Content::Bytes(body) };
        self.sender.send(&sending, self.report)
    }

    /// Returns `{endpoint}/{parts}`, with each part escaped.
    fn url(&self, parts: &[&str]) -> Url {
        let mut url = self.hub.endpoint.clone();
        url.path_segments_mut().expect("an http address has a path").pop_if_empty().extend(parts);
        url
    }

    fn parsed(&self, text: &str) -> Result<Url> {
        usable(text, &self.hub.endpoint)
            .ok_or_else(|| self.unclear("an address for a large file is none that may be used"))
    }

    fn json<T: serde::de::DeserializeOwned>(&self, answer: Answer) -> Result<T> {
        serde_json::from_slice(&answer.body)
            .map_err(|error| self.unclear(&format!("it is not what was asked for: {error}")))
    }

    /// Returns an answer of success, or the fault that it stands for.
    fn accepted(&self, answer: Answer) -> Result<Answer> {
        match answer.status {
            200..300 => Ok(answer),
            401 | 403 => Err(Fault::auth(format!("hf://{}: {}", self.repository, answer.told()))
                .help("HF_TOKEN must be a token that may write to this repository, or make it")),
            _ => Err(self.refused(&answer.told())),
        }
    }

    fn refused(&self, why: &str) -> Fault {
        Fault::config(format!("hf://{}: the hub refuses: {why}", self.repository))
            .help("correct the repository or the branch; the adapter is safe in its folder")
    }

    fn unclear(&self, what: &str) -> Fault {
        let message = format!("hf://{}: the hub's answer cannot be used: {what}", self.repository);
        Fault::new(Kind::Push, message).help("the adapter is safe in its folder; HF_ENDPOINT must be a hub")
    }
}

/// Returns an address for a large file that the hub named, if files may go there.
fn usable(text: &str, hub: &Url) -> Option<Url> {
    let url = Url::parse(text).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
    // A hub that is reached by TLS does not send files elsewhere in clear text.
    let url = url.filter(|url| hub.scheme() == "http" || url.scheme() == "https");
    url.filter(|url| !source::forbidden_host(url))
}

fn text(value: &Json) -> String {
    value.as_str().map_or_else(|| value.to_string(), |text| text.chars().take(300).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_files_go_nowhere_in_clear_text_from_a_hub_of_tls() {
        let may = |text: &str, hub: &str| usable(text, &Url::parse(hub).unwrap()).is_some();
        for (text, by_tls, in_clear) in [
            ("https://store.example/part?sig=1", true, true),
            ("http://store.example/part", false, true),
            ("https://169.254.169.254/part", false, false),
            ("ftp://store.example/part", false, false),
            ("no address", false, false),
        ] {
            assert_eq!(may(text, "https://hub.example"), by_tls, "{text}");
            assert_eq!(may(text, "http://localhost:8080/hub"), in_clear, "{text}");
        }
    }
}
