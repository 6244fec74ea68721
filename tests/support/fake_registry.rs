//! A scripted registry that misbehaves on demand in ways that no real one does when asked.

// Each test program uses a part of it.
#![allow(dead_code)]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use crate::random::Random;

/// A status that closes the connection.
const HANG_UP: u16 = 0;

/// The faults of the registry. The default is a registry without login that works.
#[derive(Clone, Copy, Default)]
pub struct Manners {
    /// Requires a token, and hands one out to anyone.
    pub bearer: bool,
    /// At this authorized request, counted from 1, every token handed out so far expires.
    pub expire_at: Option<u32>,
    /// No token allows an upload.
    pub deny: bool,
    /// The first n requests below a repository get this status.
    pub fail_first: Option<(u32, u16)>,
    /// The first n requests of `/v2/`, which ask for the kind of login, get this status.
    pub fail_probe: Option<(u32, u16)>,
    /// Larger PUTs get 413.
    pub monolithic_bytes_max: Option<usize>,
    /// At larger PUTs the connection is closed, as some proxies do instead of answering 413.
    pub hang_up_bytes: Option<usize>,
    /// Uploads are taken and never answered.
    pub silent_uploads: bool,
    /// The tag points to other bytes than were pushed.
    pub other_manifest: bool,
    /// Chunks after the first are answered 201 and dropped.
    pub first_chunk_only: bool,
    /// Blobs must be sent to another origin, which takes no login.
    pub upload_elsewhere: bool,
    /// The first n downloads of a blob break off after this many bytes.
    pub cut_blobs: Option<(u32, usize)>,
    /// Blobs have the right length but the wrong content.
    pub damaged_blobs: bool,
    /// Refuses every upload and quotes this.
    pub echo: Option<&'static str>,
    /// Seed of the failures that `Fake::disturb` asks for.
    pub random: Option<u64>,
}

pub struct Fake {
    /// `127.0.0.1:port`
    pub host: String,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    log: Vec<String>,
    blobs: HashMap<String, Vec<u8>>,
    manifests: HashMap<String, Vec<u8>>,
    upload: Vec<u8>,
    tokens: u32,
    uses: u32,
    expired: u32,
    failures: u32,
    probes: u32,
    cuts: u32,
    requests: u64,
    /// One of this number of requests fails at random; 0: none.
    disturbed: u64,
}

struct Request {
    method: String,
    path: String,
    authorization: Option<String>,
    /// First byte of `Range: bytes=N-`.
    start: usize,
    body: Vec<u8>,
}

struct Answer(u16, Vec<(&'static str, String)>, Vec<u8>);

impl Fake {
    /// Serves until the test's process ends.
    pub fn start(manners: Manners) -> Fake {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let state = Arc::new(Mutex::new(State::default()));
        let (shared, name) = (state.clone(), host.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (shared, name) = (shared.clone(), name.clone());
                std::thread::spawn(move || serve(stream, &name, manners, &shared));
            }
        });
        Fake { host, state }
    }

    /// Adds an artifact as oras does: layers with a title (none: an image's) and their content.
    pub fn artifact(&self, tag: &str, layers: &[(Option<&str>, Vec<u8>)]) {
        let mut state = self.state.lock().unwrap();
        let described: Vec<serde_json::Value> = layers
            .iter()
            .map(|(title, content)| {
                let hex = hone::source::digest(content);
                state.blobs.insert(hex.clone(), content.clone());
                let annotations =
                    title.map(|title| serde_json::json!({"org.opencontainers.image.title": title}));
                serde_json::json!({"mediaType": "application/octet-stream", "digest": format!("sha256:{hex}"),
                    "size": content.len(), "annotations": annotations.unwrap_or(serde_json::json!({}))})
            })
            .collect();
        let manifest = serde_json::json!({"schemaVersion": 2, "layers": described}).to_string();
        self.manifest(tag, &mut state, manifest);
    }

    /// Stores any manifest under a tag and its digest.
    pub fn put_manifest(&self, tag: &str, manifest: serde_json::Value) {
        self.manifest(tag, &mut self.state.lock().unwrap(), manifest.to_string());
    }

    fn manifest(&self, tag: &str, state: &mut State, manifest: String) {
        let manifest = manifest.into_bytes();
        state.manifests.insert(format!("sha256:{}", hone::source::digest(&manifest)), manifest.clone());
        state.manifests.insert(tag.to_owned(), manifest);
    }

    /// Lets one of so many requests fail at random from now on; 0: none.
    pub fn disturb(&self, one_of: u64) {
        self.state.lock().unwrap().disturbed = one_of;
    }

    /// Returns the digest of the image of a tag, if there is one. All its parts must be there.
    pub fn image(&self, tag: &str) -> Option<String> {
        let state = self.state.lock().unwrap();
        let bytes = state.manifests.get(tag)?;
        let manifest: serde_json::Value = serde_json::from_slice(bytes).unwrap();
        for part in manifest["layers"].as_array().unwrap().iter().chain([&manifest["config"]]) {
            let hex = part["digest"].as_str().unwrap().trim_start_matches("sha256:");
            let blob = state.blobs.get(hex).unwrap_or_else(|| panic!("{tag} lacks its part {hex}"));
            assert_eq!(hone::source::digest(blob), hex, "a part of {tag}");
        }
        Some(format!("sha256:{}", hone::source::digest(bytes)))
    }

    pub fn log(&self) -> Vec<String> {
        self.state.lock().unwrap().log.clone()
    }

    pub fn saw(&self, start: &str) -> bool {
        self.log().iter().any(|line| line.starts_with(start))
    }
}

fn serve(stream: TcpStream, host: &str, manners: Manners, state: &Mutex<State>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut writer = stream;
    while let Some(request) = read(&mut reader) {
        let Some(Answer(status, headers, body)) = answer(&request, host, manners, &mut state.lock().unwrap())
        else {
            // Silence: the connection stays open until the client leaves.
            let _ = reader.read(&mut [0]);
            return;
        };
        if status == HANG_UP {
            return;
        }
        let cut = headers.iter().find(|(name, _)| *name == "x-cut").map(|(_, promised)| promised.clone());
        let length = cut.clone().unwrap_or_else(|| body.len().to_string());
        let mut text = format!("HTTP/1.1 {status} X\r\ncontent-length: {length}\r\n");
        for (name, value) in headers {
            text += &format!("{name}: {value}\r\n");
        }
        let body = if request.method == "HEAD" { Vec::new() } else { body };
        if writer.write_all(&[text.as_bytes(), b"\r\n", &body].concat()).is_err() || cut.is_some() {
            return;
        }
    }
}

fn read(reader: &mut BufReader<TcpStream>) -> Option<Request> {
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|&count| count > 0)?;
    let mut words = line.split(' ');
    let (method, path) = (words.next()?.to_string(), words.next()?.to_string());
    let (mut length, mut authorization, mut start) = (0, None, 0);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        match line.trim_end().split_once(": ") {
            None => break,
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                length = value.parse().ok()?
            }
            Some((name, value)) if name.eq_ignore_ascii_case("authorization") => {
                authorization = Some(value.to_string())
            }
            Some((name, value)) if name.eq_ignore_ascii_case("range") => {
                start = value.trim_start_matches("bytes=").trim_end_matches('-').parse().ok()?
            }
            Some(_) => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some(Request { method, path, authorization, start, body })
}

fn answer(request: &Request, host: &str, manners: Manners, state: &mut State) -> Option<Answer> {
    let login = if request.authorization.is_some() { " (authorized)" } else { "" };
    let range = if request.start > 0 { format!(" from {}", request.start) } else { String::new() };
    state.log.push(format!("{} {}{login}{range}", request.method, request.path));
    let plain = |status| Some(Answer(status, Vec::new(), Vec::new()));
    state.requests += 1;
    if let Some(seed) = manners.random.filter(|_| state.disturbed > 0) {
        let mut random = Random(seed ^ (state.requests << 32));
        if random.next().is_multiple_of(state.disturbed) {
            return match random.below(24) {
                0 => None,
                1..=5 => plain(HANG_UP),
                6..=8 => plain(429),
                9..=11 => Some(Answer(503, vec![("retry-after", "2".into())], b"<html>busy</html>".to_vec())),
                _ => plain(*random.pick(&[500, 502, 503, 504])),
            };
        }
    }
    let fails = |&(count, _): &(u32, u16)| request.path == "/v2/" && state.probes < count;
    if let Some((_, status)) = manners.fail_probe.filter(fails) {
        state.probes += 1;
        return plain(status);
    }
    if request.path.starts_with("/token") {
        state.tokens += 1;
        return Some(Answer(
            200,
            Vec::new(),
            format!(r#"{{"token":"token-{}"}}"#, state.tokens).into_bytes(),
        ));
    }
    let elsewhere = manners.upload_elsewhere && request.method == "PUT" && request.path.contains("/uploads/");
    if manners.bearer && !elsewhere {
        let token = request
            .authorization
            .as_deref()
            .and_then(|text| text.strip_prefix("Bearer token-")?.parse().ok());
        let mut valid = token.is_some_and(|number: u32| number > state.expired);
        state.uses += u32::from(valid);
        if valid && manners.expire_at == Some(state.uses) {
            (state.expired, valid) = (state.tokens, false);
        }
        if !valid {
            let challenge = format!(r#"Bearer realm="http://{host}/token",service="fake""#);
            return Some(Answer(401, vec![("www-authenticate", challenge)], Vec::new()));
        }
    }
    if request.path == "/v2/" {
        return plain(200);
    }
    if let Some((count, status)) = manners.fail_first
        && state.failures < count
    {
        state.failures += 1;
        return plain(status);
    }
    let (path, query) = request.path.split_once('?').unwrap_or((&request.path, ""));
    let name = path.rsplit('/').next().unwrap_or_default().to_string();
    let origin = match manners.upload_elsewhere {
        true => format!("http://{}", host.replace("127.0.0.1", "localhost")),
        false => String::new(),
    };
    let upload = || vec![("location", format!("{origin}/v2/team/a/blobs/uploads/1"))];
    match (request.method.as_str(), path.contains("/uploads/"), path.contains("/manifests/")) {
        ("POST", true, _) if manners.deny => Some(Answer(403, Vec::new(), error("DENIED", "not yours"))),
        ("POST", true, _) if manners.echo.is_some() => Some(Answer(
            401,
            Vec::new(),
            error("UNAUTHORIZED", &format!("bad password {}", manners.echo.unwrap_or_default())),
        )),
        ("POST", true, _) => {
            state.upload.clear();
            Some(Answer(202, upload(), Vec::new()))
        }
        ("PUT", true, _) if manners.silent_uploads => None,
        ("PUT", true, _) if manners.monolithic_bytes_max.is_some_and(|max| request.body.len() > max) => {
            plain(413)
        }
        ("PUT", true, _) if manners.hang_up_bytes.is_some_and(|max| request.body.len() > max) => {
            plain(HANG_UP)
        }
        ("PATCH", true, _) => {
            let dropped = manners.first_chunk_only && !state.upload.is_empty();
            if !dropped {
                state.upload.extend(&request.body);
            }
            let range = ("range", format!("0-{}", state.upload.len() - 1));
            let status = if manners.first_chunk_only { 201 } else { 202 };
            Some(Answer(status, [upload(), vec![range]].concat(), Vec::new()))
        }
        ("PUT", true, _) => {
            let mut blob = std::mem::take(&mut state.upload);
            blob.extend(&request.body);
            state.blobs.insert(query.trim_start_matches("digest=sha256%3A").to_string(), blob);
            Some(Answer(201, upload(), Vec::new()))
        }
        ("PUT", _, true) => {
            let digest = format!("sha256:{}", hone::source::digest(&request.body));
            state.manifests.insert(digest, request.body.clone());
            state.manifests.insert(name, request.body.clone());
            Some(Answer(201, upload(), Vec::new()))
        }
        (_, _, true) if manners.other_manifest => Some(Answer(200, Vec::new(), b"{}".to_vec())),
        (_, _, true) => match state.manifests.get(&name) {
            Some(manifest) => Some(Answer(200, Vec::new(), manifest.clone())),
            None => plain(404),
        },
        _ => match state.blobs.get(name.trim_start_matches("sha256:")) {
            Some(blob) => Some(blob_from(blob.clone(), request.start, manners, &mut state.cuts)),
            None => plain(404),
        },
    }
}

fn blob_from(mut blob: Vec<u8>, start: usize, manners: Manners, cuts: &mut u32) -> Answer {
    if manners.damaged_blobs {
        blob.iter_mut().for_each(|byte| *byte ^= 1);
    }
    let promised = blob.len() - start.min(blob.len());
    let mut part = blob.split_off(start.min(blob.len()));
    let mut headers = Vec::new();
    if let Some((count, bytes)) = manners.cut_blobs
        && *cuts < count
        && bytes < part.len()
    {
        *cuts += 1;
        part.truncate(bytes);
        headers.push(("x-cut", promised.to_string()));
    }
    Answer(if start > 0 { 206 } else { 200 }, headers, part)
}

fn error(code: &str, message: &str) -> Vec<u8> {
    format!(r#"{{"errors":[{{"code":"{code}","message":"{message}"}}]}}"#).into_bytes()
}
