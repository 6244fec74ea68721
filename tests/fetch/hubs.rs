//! The hub's datasets and adapters, and pushes to it, without a run: the result of each answer of a hub.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use hone::fault::{Fault, Kind};
use hone::fetch::{self, Access, Adapter, Data};
use hone::report::Report;
use hone::source::digest;
use serde_json::{Value, json};

use super::parts::sources;
use crate::http::{Reply, Request, Server};
use crate::job::{Ended, Work, end};
use crate::registry::{adapter, quick};
use crate::{COMMIT, PART_BYTES, Shelf, TOKEN, shelve};

const INSIDE: &str = "HONE_TEST_INSIDE";
const WEIGHTS: &str = "adapter_model.safetensors";

/// Runs a test of this file once more, in a process that has its servers in the environment from the beginning.
/// Returns whether this is that process already.
fn inside(test: &str, start: impl FnOnce(&mut Command)) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let mut again = Command::new(std::env::current_exe().unwrap());
    again.args([&format!("hubs::{test}"), "--exact", "--nocapture"]).env(INSIDE, "1");
    start(&mut again);
    let output = again.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let told = format!("{}{}", text(&output.stdout), text(&output.stderr));
    assert!(output.status.success() && told.contains("1 passed"), "{told}");
    false
}

/// Returns a repository's listing; each file holds its own name.
fn listing(commit: &str, names: &[&str]) -> Reply {
    let sibling = |name: &&str| json!({"rfilename": name, "size": name.len(), "lfs": {"sha256": digest(name.as_bytes()), "size": name.len()}});
    Reply::ok(json!({"sha": commit, "siblings": names.iter().map(sibling).collect::<Vec<_>>()}).to_string())
}

fn datasets(request: &Request) -> Reply {
    let path = request.target.split('?').next().unwrap().replace("%2F", "/");
    let rows = ["data/test.jsonl", "data/train.jsonl"];
    match path.strip_prefix("/api/datasets/org/").and_then(|path| path.split_once("/revision/")) {
        Some(("rows", "refs/convert/parquet")) => listing(
            COMMIT,
            &[
                "default/train/0001.parquet",
                "default/train/0000.parquet",
                "default/train/about.md",
                "default/train/0000.parquet/deep.parquet",
                "default/test/0000.parquet",
            ],
        ),
        Some(("rows", "main" | "v1")) => listing(COMMIT, &rows),
        Some(("plain", "main")) => listing(COMMIT, &["test.jsonl", "train.jsonl"]),
        Some(("gated", "refs/convert/parquet")) => Reply::status(401),
        Some(("gated", _)) => listing(COMMIT, &rows),
        Some(("short", _)) => listing("0123abcd", &rows),
        Some(("letters", _)) => listing(&"z".repeat(40), &rows),
        Some(_) => Reply::status(404),
        None => match path.split_once(&format!("/resolve/{COMMIT}/")) {
            Some((_, name)) => Reply::file(request, name.as_bytes(), &format!("\"{name}\"")),
            None => Reply::status(404),
        },
    }
}

/// Returns the contents of the files that an address of data leads to, which are their names.
fn taken(address: &str) -> Result<String, Fault> {
    let cache = tempfile::tempdir().unwrap();
    let (options, registry) = (sources(cache.path()), quick());
    let access = Access { source: &options, registry: &registry };
    let files = fetch::data(&[Data::parse(address)?], access, &Report::silent())?;
    let names = files.iter().map(|file| String::from_utf8(std::fs::read(&file.path).unwrap()).unwrap());
    Ok(names.collect::<Vec<_>>().join(" "))
}

#[test]
fn a_datasets_files_are_those_of_its_conversion_its_path_or_its_split() {
    let name = "a_datasets_files_are_those_of_its_conversion_its_path_or_its_split";
    let server = |again: &mut Command| {
        let server = Server::start(|_, request| datasets(request));
        again.env("HF_ENDPOINT", server.url(""));
    };
    if !inside(name, server) {
        return;
    }
    let of = |rest: &str| taken(&format!("hf://datasets/org/{rest}"));
    let right = digest(b"data/test.jsonl");
    for (rest, names) in [
        ("rows", "default/train/0000.parquet default/train/0001.parquet"),
        ("rows?split=test", "default/test/0000.parquet"),
        ("rows@v1", "data/train.jsonl"),
        ("rows/data", "data/train.jsonl"),
        ("rows/data/test.jsonl", "data/test.jsonl"),
        (format!("rows/data/test.jsonl#sha256={right}").as_str(), "data/test.jsonl"),
        ("rows@v1/data/t*.jsonl", "data/test.jsonl data/train.jsonl"),
        ("plain", "train.jsonl"),
    ] {
        assert_eq!(of(rest).unwrap(), names, "{rest}");
    }
    for (rest, kind, words) in [
        ("plain?config=a", Kind::Config, "configurations are known only"),
        ("gated", Kind::Auth, "401"),
        ("short", Kind::Data, "names no commit"),
        ("letters", Kind::Data, "names no commit"),
        ("rows/none/", Kind::Data, "no such file or folder"),
        (format!("rows/data/train.jsonl#sha256={right}").as_str(), Kind::Data, "sha256"),
        (
            format!("rows#sha256={right}").as_str(),
            Kind::Config,
            "one sha256 is given, but the dataset has 2 files",
        ),
    ] {
        let fault = of(rest).unwrap_err();
        assert_eq!(fault.kind, kind, "{rest}: {fault}");
        assert!(fault.message.contains(words), "{rest}: {fault}");
    }
}

#[test]
fn one_digest_is_for_one_object_of_a_bucket() {
    let listed = |names: &[&str]| {
        let entry = |name: &&str| {
            format!(
                "<Contents><Key>{name}</Key><Size>{}</Size><ETag>&quot;{name}&quot;</ETag>\
                 <LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>",
                name.len()
            )
        };
        let entries: String = names.iter().map(entry).collect();
        Reply::ok(format!("<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"))
    };
    let start = |again: &mut Command| {
        let server = Server::start(move |_, request| match request.target.as_str() {
            path if path.contains("prefix=one") => listed(&["one/a.jsonl"]),
            path if path.contains("list-type=2") => listed(&["two/a.jsonl", "two/b.jsonl"]),
            path => Reply::file(request, path.trim_start_matches("/bucket/").as_bytes(), "\"a\""),
        });
        again.env("AWS_ENDPOINT_URL", server.url("")).env("AWS_REGION", "eu-west-1");
        again.env("AWS_SKIP_SIGNATURE", "true");
    };
    if !inside("one_digest_is_for_one_object_of_a_bucket", start) {
        return;
    }
    let right = digest(b"one/a.jsonl");
    assert_eq!(taken(&format!("s3://bucket/one/#sha256={right}")).unwrap(), "one/a.jsonl");
    assert_eq!(taken("s3://bucket/two/").unwrap(), "two/a.jsonl two/b.jsonl");
    let fault = taken(&format!("s3://bucket/two/#sha256={right}")).unwrap_err();
    assert_eq!(fault.kind, Kind::Config, "{fault}");
    assert!(fault.message.contains("one sha256 is given, but 2 objects are found"), "{fault}");
}

#[test]
fn an_adapter_at_a_commit_is_asked_for_once() {
    let work = tempfile::tempdir().unwrap();
    adapter(work.path(), 500);
    let files: BTreeMap<String, Vec<u8>> = ["adapter_config.json", WEIGHTS]
        .map(|name| (name.to_owned(), std::fs::read(work.path().join(name)).unwrap()))
        .into();
    let server = {
        let files = files.clone();
        Server::start(move |_, request| {
            let path = request.target.split('?').next().unwrap();
            if path.starts_with("/api/models/org/lora/revision/") {
                let sibling =
                    |(name, bytes): (&String, &Vec<u8>)| json!({"rfilename": name, "size": bytes.len()});
                let mut siblings = vec![json!({"rfilename": "README.md", "size": 3})];
                siblings.extend(files.iter().map(sibling));
                return Reply::ok(json!({"sha": COMMIT, "siblings": siblings}).to_string());
            }
            let name = path.strip_prefix(&format!("/org/lora/resolve/{COMMIT}/"));
            let found = name.and_then(|name| files.get(name));
            found.map_or(Reply::status(404), |bytes| Reply::ok(bytes.clone()))
        })
    };
    let start = |again: &mut Command| {
        again.env("HF_ENDPOINT", server.url(""));
    };
    if !inside("an_adapter_at_a_commit_is_asked_for_once", start) {
        let asked: Vec<String> = server.requests().into_iter().map(|request| request.target).collect();
        let listings = asked.iter().filter(|target| target.starts_with("/api/")).count();
        assert_eq!(
            (listings, asked.len()),
            (2, 4),
            "main, its commit, two files, and nothing more: {asked:?}"
        );
        return;
    }
    let (options, registry) = (sources(&work.path().join("cache")), quick());
    let access = Access { source: &options, registry: &registry };
    let bring = |text: &str| fetch::adapter(&Adapter::parse(text)?, access, &Report::silent());
    let first = bring("org/lora").unwrap();
    for (name, bytes) in &files {
        assert!(std::fs::read(first.folder.join(name)).unwrap() == *bytes, "{name}");
    }
    let both = [&files["adapter_config.json"][..], &files[WEIGHTS]].concat();
    assert_eq!((&first.digest, first.bases.len()), (&format!("sha256:{}", digest(&both)), 0));
    assert_eq!(bring(&format!("hf://org/lora@{COMMIT}")).unwrap(), first);
}

/// A hub that takes commits as `shelve` does, its store of large files, and a folder with an adapter.
struct Desk {
    work: Work,
    shelf: Arc<Mutex<Shelf>>,
    store: Server,
    hub: Server,
}

impl Desk {
    /// `odd` may answer a request in another way; it has the store's address.
    fn new(odd: impl Fn(&Request, &str) -> Option<Reply> + Send + Sync + 'static) -> Desk {
        let shelf = Arc::new(Mutex::new(Shelf::default()));
        let (parts, on_hub) = (shelf.clone(), shelf.clone());
        let store = Server::start(move |_, request| {
            let number = request.target.trim_start_matches("/part/").split('?').next().unwrap();
            parts.lock().unwrap().parts.insert(number.parse().unwrap(), request.body.clone());
            Reply::status(200).header("ETag", format!("\"part-{number}\""))
        });
        let store_url = store.url("");
        let hub = Server::start(move |_, request| {
            if request.header("authorization") != Some(&format!("Bearer {TOKEN}")) {
                return Reply::status(401);
            }
            let own = format!("http://{}", request.header("host").unwrap());
            let reply = odd(request, &store_url);
            reply.unwrap_or_else(|| shelve(&mut on_hub.lock().unwrap(), request, &own, &store_url))
        });
        let work = Work::new();
        adapter(&work.path("adapter"), 100_000);
        Desk { work, shelf, store, hub }
    }

    fn push(&self, to: &str) -> Ended {
        let mut push = self.work.hone(&["push", "adapter", to]);
        end(push.env("HF_ENDPOINT", self.hub.url("")).env("HF_TOKEN", TOKEN))
    }

    fn done(&self, to: &str) -> Ended {
        let ended = self.push(to);
        assert_eq!((ended.code, ended.stdout.lines().last()), (Some(0), Some(COMMIT)), "{}", ended.stderr);
        ended
    }

    fn refused(&self, code: i32, words: &str) {
        let ended = self.push("hf://org/tuned");
        assert_eq!(ended.code, Some(code), "{words}: {}", ended.stderr);
        assert!(ended.stderr.contains(words), "{words}: {}", ended.stderr);
        assert!(self.shelf.lock().unwrap().commits.is_empty(), "{words}");
    }

    fn weights(&self) -> Vec<u8> {
        self.work.read(&format!("adapter/{WEIGHTS}"))
    }

    /// Returns the requests for a path that ends like this.
    fn asked(&self, end: &str) -> Vec<Request> {
        let requests = self.hub.requests().into_iter();
        requests.filter(|request| request.target.ends_with(end)).collect()
    }
}

fn decoded(content: &Value) -> Vec<u8> {
    use base64::Engine;
    base64::prelude::BASE64_STANDARD.decode(content.as_str().unwrap()).unwrap()
}

#[test]
fn a_push_sends_what_the_hub_lacks_and_says_what_it_sends() {
    let desk = Desk::new(|_, _| None);
    assert_eq!(desk.done("hf://org/tuned").stdout, format!("hf://org/tuned\n{COMMIT}\n"));
    let weights = desk.weights();
    let size = weights.len();
    {
        let shelf = desk.shelf.lock().unwrap();
        assert_eq!(shelf.repositories, BTreeMap::from([("org/tuned".to_owned(), false)]));
        assert!(shelf.branches.is_empty(), "main is there");
        assert!(shelf.large[&digest(&weights)] == weights);
        let [(_, lines)] = shelf.commits.as_slice() else { panic!("{} commits", shelf.commits.len()) };
        let large = json!({"path": WEIGHTS, "algo": "sha256", "oid": digest(&weights), "size": size});
        assert_eq!(lines[1], json!({"key": "lfsFile", "value": large}));
        assert_eq!(decoded(&lines[2]["value"]["content"]), desk.work.read("adapter/adapter_config.json"));
    }
    let described = desk.asked("/preupload/main")[0].json();
    assert_eq!(decoded(&described["files"][0]["sample"]), weights[..512]);
    assert_eq!(described["files"][0]["size"], size);
    let verified = desk.asked("/verify");
    assert_eq!(verified[0].json(), json!({"oid": digest(&weights), "size": size}));
    let accepts = |end: &str| desk.asked(end)[0].header("accept").unwrap_or("").to_owned();
    assert_eq!(accepts("/info/lfs/objects/batch"), "application/vnd.git-lfs+json");
    assert_ne!(accepts("/preupload/main"), "application/vnd.git-lfs+json");

    let sent = desk.store.requests().len();
    let again = desk.done("hf://org/tuned");
    assert!(again.stderr.contains("every file is there already"), "{}", again.stderr);
    assert_eq!((desk.store.requests().len(), desk.shelf.lock().unwrap().commits.len()), (sent, 1));
}

#[test]
fn a_repository_or_a_branch_that_is_there_meanwhile_is_used() {
    let branches = Mutex::new(0);
    let desk = Desk::new(move |request, _| {
        let mut branches = branches.lock().unwrap();
        let is_branch = request.target.contains("/branch/");
        *branches += u32::from(is_branch);
        (is_branch && *branches > 1).then(|| Reply::status(409))
    });
    for _ in 0..2 {
        desk.done("hf://tuned@v2");
    }
    let shelf = desk.shelf.lock().unwrap();
    assert_eq!(shelf.repositories.keys().collect::<Vec<_>>(), ["me/tuned"], "the token's owner");
    assert_eq!(shelf.branches, ["v2"]);

    let made = |status: u16| {
        Desk::new(move |request, _| {
            (request.target == "/api/repos/create").then(|| Reply::status(status).body("{\"error\": \"no\"}"))
        })
    };
    made(409).done("hf://org/tuned");
    made(403).refused(13, "HF_TOKEN must be a token that may write");
    let ended =
        end(desk.work.hone(&["push", "adapter", "hf://org/tuned"]).env("HF_ENDPOINT", made(409).hub.url("")));
    assert_eq!(ended.code, Some(13), "{}", ended.stderr);
    assert!(ended.stderr.contains("there is no token to push with"), "{}", ended.stderr);
}

/// Returns a hub whose store of large files answers so for the weights; `answer` has the store's address.
fn batch(answer: impl Fn(&str) -> Value + Send + Sync + 'static) -> Desk {
    Desk::new(move |request, store| {
        let asked = request.target.ends_with("/objects/batch").then(|| request.json())?;
        let mut object = answer(store);
        object["oid"] = asked["objects"][0]["oid"].clone();
        Some(Reply::ok(json!({"objects": [object]}).to_string()))
    })
}

fn upload(href: String, header: Value) -> Value {
    json!({"actions": {"upload": {"href": href, "header": header}}})
}

#[test]
fn large_files_go_as_the_store_asks_for_them_or_not_at_all() {
    let whole = batch(|store| upload(format!("{store}/part/7"), json!({})));
    whole.done("hf://org/tuned");
    assert!(whole.shelf.lock().unwrap().parts[&7] == whole.weights());

    // Numbers of parts may have any number of zeros before them.
    let numbered = Desk::new(move |request, store| {
        let asked = request.target.ends_with("/objects/batch").then(|| request.json())?;
        let part = |number: u32| format!("{store}/part/{number}");
        let header = json!({"chunk_size": PART_BYTES, "001": part(1), "002": part(2), "003": part(3)});
        let mut object = upload(format!("http://{}/complete", request.header("host")?), header);
        object["oid"] = asked["objects"][0]["oid"].clone();
        Some(Reply::ok(json!({"objects": [object]}).to_string()))
    });
    numbered.done("hf://org/tuned");
    let weights = numbered.weights();
    assert!(numbered.shelf.lock().unwrap().large[&digest(&weights)] == weights);

    batch(|store| upload(format!("{store}/part/1"), json!({"chunk_size": "0"})))
        .refused(Kind::Push.exit_code().into(), "the size of parts is no number");
    batch(|store| upload(format!("{store}/part/1"), json!({"chunk_size": 1})))
        .refused(Kind::Push.exit_code().into(), &format!("{WEIGHTS} in {} parts", weights.len()));
    batch(|_| json!({"error": {"code": 507, "message": "the quota is used up"}}))
        .refused(10, &format!("{WEIGHTS}: the quota is used up"));
}

#[test]
fn empty_files_are_never_large_and_large_ones_never_in_the_commit() {
    let odd = |request: &Request, _: &str| {
        let asked = request.target.contains("/preupload/").then(|| request.json())?;
        let mode = |file: &Value| {
            let large = file["path"] != "adapter_config.json" && file["size"] != json!((8 << 20) + 1);
            json!({"path": file["path"], "uploadMode": if large { "lfs" } else { "regular" }})
        };
        let files: Vec<Value> = asked["files"].as_array()?.iter().map(mode).collect();
        Some(Reply::ok(json!({"files": files}).to_string()))
    };
    let desk = Desk::new(odd);
    desk.work.write("adapter/README.md", "");
    desk.done("hf://org/tuned");
    let shelf = desk.shelf.lock().unwrap();
    let readme = json!({"path": "README.md", "encoding": "base64", "content": ""});
    assert_eq!(shelf.commits[0].1[1], json!({"key": "file", "value": readme}));

    let desk = Desk::new(odd);
    desk.work.write("adapter/README.md", vec![b'x'; (8 << 20) + 1]);
    desk.refused(Kind::Push.exit_code().into(), "README.md of 8388609 bytes as \"regular\"");
}

#[test]
fn a_folder_gets_the_files_of_an_adapter_that_is_whole() {
    let work = Work::new();
    adapter(&work.path("adapter"), 500);
    let push = |to: &str| end(&mut work.hone(&["push", "adapter", to]));
    assert_eq!(push("file:kept").code, Some(0));
    let same = |name: &str| work.read(&format!("kept/{name}")) == work.read(&format!("adapter/{name}"));
    assert_eq!(work.list("kept"), ["adapter_config.json", WEIGHTS]);
    assert!(same("adapter_config.json") && same(WEIGHTS));
    std::fs::remove_file(Path::new(&work.path("adapter")).join(WEIGHTS)).unwrap();
    let ended = push("file:other");
    assert_eq!(ended.code, Some(10), "{}", ended.stderr);
    assert!(ended.stderr.contains("adapter holds no adapter_model.safetensors"), "{}", ended.stderr);
}
