//! Base models and data by address: the real binary with a scripted hub, a scripted registry and a real one.

#[path = "support/fake_registry.rs"]
mod fake_registry;
#[path = "support/http.rs"]
mod http;
#[path = "fetch/hubs.rs"]
mod hubs;
#[path = "support/job.rs"]
mod job;
#[path = "fetch/parts.rs"]
mod parts;
#[path = "support/registry.rs"]
mod registry;
#[path = "support/random.rs"]
mod random;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use fake_registry::{Fake, Manners};
use hone::source::digest;
use http::{Reply, Request, Server};
use job::{Ended, Work, done, end, golden_path};
use registry::{Registry, Setup, run};
use serde_json::json;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const REPOSITORY: &str = "org/tiny";
/// A secret that must never appear in a message or reach another host.
const TOKEN: &str = "hf_canarySecret";
const STEPS: &str = "--set TrainingArguments.max_steps=2 --set TrainingArguments.max_length=64 --device cpu";
const WEIGHTS: &str = "model.safetensors";

/// Returns the files of the golden Llama.
fn model() -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(golden_path("llama3/model")).unwrap().map(|entry| entry.unwrap());
    entries
        .map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap()))
        .collect()
}

/// Returns the hub's listing of files; weights are "large" ones with their digest.
fn listing(files: &BTreeMap<String, Vec<u8>>) -> serde_json::Value {
    let sibling = |(name, content): (&String, &Vec<u8>)| match name.ends_with(".safetensors") {
        false => json!({"rfilename": name, "size": content.len()}),
        true => json!({"rfilename": name, "size": content.len(),
            "lfs": {"sha256": digest(content), "size": content.len(), "pointerSize": 134}}),
    };
    json!({"id": REPOSITORY, "sha": COMMIT, "siblings": files.iter().map(sibling).collect::<Vec<_>>()})
}

/// Returns the hub's answers, unless a test replaces them.
fn answer(files: &BTreeMap<String, Vec<u8>>, request: &Request) -> Reply {
    let path = request.target.split('?').next().unwrap();
    if path.starts_with(&format!("/api/models/{REPOSITORY}/revision/")) {
        let known = path.ends_with("/main") || path.ends_with(COMMIT);
        return if known { Reply::ok(listing(files).to_string()) } else { Reply::status(404) };
    }
    if path == "/rows.parquet" {
        return Reply::file(
            request,
            &std::fs::read(golden_path("_data/messages.parquet")).unwrap(),
            "\"rows\"",
        );
    }
    match path.strip_prefix(&format!("/{REPOSITORY}/resolve/{COMMIT}/")).and_then(|name| files.get(name)) {
        Some(content) => Reply::file(request, content, &format!("\"{}\"", digest(content))),
        None => Reply::status(404),
    }
}

fn hub(files: BTreeMap<String, Vec<u8>>) -> Server {
    Server::start(move |_, request| answer(&files, request))
}

fn rows() -> Work {
    let work = Work::new();
    work.copy("_data/messages.parquet", "data.parquet");
    work
}

/// Returns `hone run` of two steps.
fn command(work: &Work, endpoint: &str, model: &str, more: &str) -> Command {
    let output = if more.contains("--output") { "" } else { "--output out" };
    let arguments = format!("run --model {model} --cache cache {output} {STEPS} {more}");
    let mut command = work.hone(&arguments.split_whitespace().collect::<Vec<_>>());
    command.env("HF_ENDPOINT", endpoint);
    command
}

fn refused(work: &Work, endpoint: &str, model: &str) -> Ended {
    end(&mut command(work, endpoint, model, "--data data.parquet"))
}

/// Returns the one folder below `cache/models`.
fn folder(work: &Work) -> String {
    let folders = work.list("cache/models");
    assert_eq!(folders.len(), 1, "{folders:?}");
    format!("cache/models/{}", folders[0])
}

fn files_asked_for(server: &Server) -> Vec<String> {
    let prefix = format!("/{REPOSITORY}/resolve/{COMMIT}/");
    let names = |request: &Request| request.target.strip_prefix(&prefix).map(str::to_owned);
    server.requests().iter().filter_map(names).collect()
}

/// Returns the adapter that results if the model is given as a folder.
fn adapter_of_folder(name: &str) -> Vec<u8> {
    let work = rows();
    work.copy("llama3/model", "model");
    done(&mut command(&work, "http://localhost:1", "model", &format!("--data data.parquet --name {name}")));
    work.read("out/adapter_model.safetensors")
}

#[test]
fn a_run_from_the_hub_is_the_run_of_the_folder_and_asks_once() {
    let mut files = model();
    for other in ["pytorch_model.bin", "README.md", "original/model.safetensors", "consolidated.safetensors"]
    {
        files.insert(other.into(), b"not taken".to_vec());
    }
    let server = hub(files);
    let (work, data) = (Work::new(), format!("--data {}", server.url("/rows.parquet")));
    done(&mut command(&work, &server.url(""), &format!("hf://{REPOSITORY}"), &data));
    assert_eq!(work.read("out/adapter_model.safetensors"), adapter_of_folder("x"));
    let asked = files_asked_for(&server);
    assert_eq!(asked.last().map(String::as_str), Some(WEIGHTS), "{asked:?}");
    let taken = ["README.md", "bin", "original", "consolidated"];
    assert!(!asked.iter().any(|name| taken.iter().any(|other| name.contains(other))), "{asked:?}");
    let order: Vec<String> = server.requests().iter().map(|request| request.target.clone()).collect();
    let at = |end: &str| order.iter().position(|target| target.ends_with(end)).unwrap();
    assert!(at("config.json") < at("/rows.parquet") && at("/rows.parquet") < at(WEIGHTS), "{order:?}");
    let card = work.json("out/adapter_config.json");
    assert_eq!(card["base_model_name_or_path"], REPOSITORY);

    // Another run finds the folder and asks for nothing, not even for the commit of `main`.
    let before = server.requests().len();
    std::fs::remove_dir_all(work.path("out")).unwrap();
    std::fs::copy(golden_path("_data/messages.parquet"), work.path("data.parquet")).unwrap();
    done(&mut command(&work, &server.url(""), &format!("hf://{REPOSITORY}"), "--data data.parquet"));
    assert_eq!(server.requests().len(), before);
}

#[test]
fn a_run_belongs_to_its_commit() {
    let other = COMMIT.replace('0', "f");
    let (files, server, moved_to) = (model(), hub(model()), other.clone());
    let moved = Server::start(move |_, request| match request.target.starts_with("/api/") {
        true => Reply::ok(listing(&files).to_string().replace(COMMIT, &moved_to)),
        false => {
            let target = request.target.replace(&moved_to, COMMIT);
            answer(&files, &Request { target, ..request.clone() })
        }
    });
    let work = rows();
    let run = |server: &Server| command(&work, &server.url(""), "hf://org/tiny", "--data data.parquet");
    done(&mut run(&server));
    let again = done(&mut run(&server));
    assert!(again.stderr.contains("already trained"), "{}", again.stderr);
    // The same files, as far as names and lengths show.
    let ended = end(&mut run(&moved));
    assert_eq!(ended.code, Some(10), "{}", ended.stderr);
    assert!(ended.stderr.contains("of another run"), "{}", ended.stderr);
    assert!(!moved.requests().iter().any(|request| request.target.ends_with(WEIGHTS)));
}

#[test]
fn a_plan_fetches_nothing_and_a_look_fetches_small_files() {
    let server = hub(model());
    let work = rows();
    let hone = |arguments: &str| {
        let mut command = work.hone(&arguments.split(' ').collect::<Vec<_>>());
        done(command.env("HF_ENDPOINT", server.url("")).env("HONE_CACHE", "cache")).stdout
    };
    let plan = "plan --model hf://org/tiny --data data.parquet --cache cache --device cpu";
    let shown = hone(plan);
    let line = |name: &str| shown.lines().find(|line| line.starts_with(name)).unwrap_or("none").to_owned();
    assert!(line("model address").contains("hf://org/tiny@main"), "{shown}");
    assert!(
        line("model folder").contains("cache/models/org--tiny-") && line("model folder").ends_with("--model")
    );
    assert!(shown.contains("model: not on this machine yet"), "{shown}");
    assert!(hone(&format!("{plan} --format json")).contains("not on this machine yet"));
    assert!(server.requests().is_empty() && !work.path("cache").exists());

    let seen = hone("model hf://org/tiny");
    assert!(seen.contains("family") && seen.contains("llama") && seen.contains("missing:"), "{seen}");
    assert!(!files_asked_for(&server).contains(&WEIGHTS.to_owned()));
    assert!(hone(plan).contains("model: llama, 2 layers"), "its facts are here now");
    assert!(line("model folder").contains(&folder(&work)), "the folder is the one that was promised");

    let bench = "bench --model hf://org/tiny --tokens 32 --lengths one --steps 1 --warmup 1 --device cpu";
    assert!(hone(bench).contains("tokens"));
    assert!(files_asked_for(&server).contains(&WEIGHTS.to_owned()), "a measurement needs the weights");
}

#[test]
fn a_model_that_is_not_trained_is_refused_before_its_weights() {
    let mut files = model();
    files.insert("config.json".into(), br#"{"model_type": "mamba"}"#.to_vec());
    let server = hub(files);
    let ended = refused(&rows(), &server.url(""), "hf://org/tiny");
    assert_eq!(ended.code, Some(12), "{}", ended.stderr);
    assert!(!files_asked_for(&server).contains(&WEIGHTS.to_owned()));
}

#[test]
fn the_token_reaches_the_hub_and_nobody_else() {
    let files = Arc::new(model());
    let served = files.clone();
    let storage = Server::start(move |_, request| {
        Reply::file(request, &served[request.target.trim_start_matches('/')], "\"v1\"")
    });
    let elsewhere = storage.url("/");
    let rows = std::fs::read(golden_path("_data/messages.parquet")).unwrap();
    let hub = Server::start(move |_, request| match request.target.as_str() {
        _ if request.header("authorization") != Some(&format!("Bearer {TOKEN}")) => Reply::status(401),
        "/datasets/org/rows/resolve/main/rows.parquet" => Reply::file(request, &rows, "\"rows\""),
        target if target.ends_with(WEIGHTS) => Reply::redirect(format!("{elsewhere}{WEIGHTS}")),
        _ => answer(&files, request),
    });
    let work = Work::new();
    work.write("token", format!("{TOKEN}\n"));
    let data = format!("--data {}", hub.url("/datasets/org/rows/resolve/main/rows.parquet"));
    let mut run = command(&work, &hub.url(""), "hf://org/tiny", &data);
    let ended = done(run.env("HF_TOKEN_PATH", "token"));
    assert!(!format!("{ended:?}").contains(TOKEN));
    assert!(!storage.requests().is_empty());
    for request in storage.requests() {
        assert!(!format!("{request:?}").contains(TOKEN), "{request:?}");
    }

    // Data from any other server is requested without the token.
    let other = self::hub(model());
    let data = format!("--data {}", other.url("/rows.parquet"));
    let mut run = command(&work, &hub.url(""), "hf://org/tiny", &data);
    end(run.env("HF_TOKEN", TOKEN));
    assert!(!other.requests().is_empty() && !format!("{:?}", other.requests()).contains(TOKEN));
    for file in walk(&work.path("cache")).into_iter().chain(walk(&work.path("out"))) {
        let content = std::fs::read(&file).unwrap();
        let found = content.windows(TOKEN.len()).any(|window| window == TOKEN.as_bytes());
        assert!(!found, "{}", file.display());
    }
}

fn walk(folder: &Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}

#[test]
fn what_the_hub_refuses_says_what_to_do() {
    let work = rows();
    // Gated: the listing is open, the files are not.
    let files = model();
    let gated = Server::start(move |_, request| match request.target.starts_with("/api/") {
        true => answer(&files, request),
        false => Reply::status(403),
    });
    let without = refused(&work, &gated.url(""), "hf://org/tiny");
    assert_eq!(without.code, Some(13), "{}", without.stderr);
    assert!(without.stderr.contains("set HF_TOKEN (in a Workspace modelAccessSecret)"), "{}", without.stderr);
    let mut with = command(&work, &gated.url(""), "hf://org/tiny", "--data data.parquet");
    let with = end(with.env("HF_TOKEN", TOKEN));
    assert_eq!(with.code, Some(13), "{}", with.stderr);
    assert!(with.stderr.contains("accept the terms on the repository's page"), "{}", with.stderr);
    assert!(!format!("{with:?}").contains(TOKEN));

    let server = hub(model());
    let unknown = refused(&work, &server.url(""), "hf://org/tiny@v9");
    assert_eq!(unknown.code, Some(10), "{}", unknown.stderr);
    assert!(unknown.stderr.contains("hf://org/tiny@v9: the hub does not know it"), "{}", unknown.stderr);
    assert!(unknown.stderr.contains("check owner, name and revision"), "{}", unknown.stderr);

    let mut only_bin = model();
    let weights = only_bin.remove(WEIGHTS).unwrap();
    only_bin.insert("pytorch_model.bin".into(), weights);
    let server = hub(only_bin);
    let ended = refused(&rows(), &server.url(""), "hf://org/tiny");
    assert_eq!(ended.code, Some(12), "{}", ended.stderr);
    assert!(ended.stderr.contains("no *.safetensors among"), "{}", ended.stderr);
}

#[test]
fn weights_that_were_cut_off_continue_where_they_stopped() {
    let files = model();
    let half = files[WEIGHTS].len() / 2;
    let server = Server::start(move |_, request| {
        let reply = answer(&files, request);
        let first = request.target.ends_with(WEIGHTS) && request.range_start().is_none();
        if first { reply.cut(half).reset() } else { reply }
    });
    let work = rows();
    done(&mut command(&work, &server.url(""), "hf://org/tiny", "--data data.parquet"));
    let ranges: Vec<Option<usize>> = server
        .requests()
        .iter()
        .filter(|request| request.target.ends_with(WEIGHTS))
        .map(Request::range_start)
        .collect();
    assert!(
        ranges.len() == 2 && ranges[0].is_none() && ranges[1].is_some_and(|start| start > 0),
        "{ranges:?}"
    );
}

#[test]
fn a_killed_download_goes_on_with_its_commit() {
    let files = model();
    let half = files[WEIGHTS].len() / 2;
    let moved = Arc::new(AtomicBool::new(false));
    let (small, later) = (files.len() - 1, moved.clone());
    let server = Server::start(move |_, request| {
        let later = later.load(Ordering::SeqCst);
        match (later, request.target.starts_with("/api/"), request.target.ends_with(WEIGHTS)) {
            // `main` is another commit by now; its listing must not be requested.
            (true, true, _) => Reply::status(404),
            (false, _, true) => answer(&files, request).cut(half).stall(),
            _ => answer(&files, request),
        }
    });
    let work = rows();
    let run = || command(&work, &server.url(""), "hf://org/tiny", "--data data.parquet");
    let mut first = work.start_command(&mut run(), "log");
    let parts = || walk(&work.path("cache/url")).into_iter().filter(|path| path.ends_with("part"));
    let bytes = |path| std::fs::metadata(path).map_or(0, |data| data.len());
    first.until("half of the weights", || parts().any(|path| bytes(path) == half as u64));
    first.signal(libc::SIGKILL);
    assert_eq!(first.end().0, None);
    let record = work.json(&format!("{}/.hone-model.json", folder(&work)));
    assert_eq!((&record["whole"], &record["revision"]), (&false.into(), &COMMIT.into()));
    assert_eq!(files_asked_for(&server).len(), small + 1);

    moved.store(true, Ordering::SeqCst);
    let before = server.requests().len();
    done(&mut run());
    let asked = &server.requests()[before..];
    assert!(asked.len() == 1 && asked[0].target.ends_with(WEIGHTS), "{asked:?}");
    assert_eq!(asked[0].range_start(), Some(half));
}

#[test]
fn damaged_weights_are_refused_and_the_folder_stays_unfinished() {
    let files = model();
    let server = Server::start(move |_, request| {
        let mut damaged = files.clone();
        damaged.get_mut(WEIGHTS).unwrap()[1000] ^= 1;
        match request.target.starts_with("/api/") {
            true => answer(&files, request),
            false => answer(&damaged, request),
        }
    });
    let work = rows();
    let ended = refused(&work, &server.url(""), "hf://org/tiny");
    assert_eq!(ended.code, Some(12), "{}", ended.stderr);
    assert!(ended.stderr.contains("sha256 is"), "{}", ended.stderr);
    let folder = folder(&work);
    assert!(!work.path(&format!("{folder}/{WEIGHTS}")).exists());
    assert_eq!(work.json(&format!("{folder}/.hone-model.json"))["whole"], false);
}

#[test]
fn weights_larger_than_the_disk_are_refused_with_both_numbers() {
    let files = model();
    let server = Server::start(move |_, request| {
        let mut listed = listing(&files);
        for sibling in listed["siblings"].as_array_mut().unwrap() {
            if sibling["rfilename"] == WEIGHTS {
                sibling["lfs"]["size"] = (1u64 << 60).into();
            }
        }
        match request.target.starts_with("/api/") {
            true => Reply::ok(listed.to_string()),
            false => answer(&files, request),
        }
    });
    let ended = refused(&rows(), &server.url(""), "hf://org/tiny");
    assert_eq!(ended.code, Some(14), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("hf://org/tiny: 1.0 EiB more are needed, but cache/models/"),
        "{}",
        ended.stderr
    );
    assert!(ended.stderr.contains(" free"), "{}", ended.stderr);
    assert!(!files_asked_for(&server).contains(&WEIGHTS.to_owned()));
}

/// Returns titles and contents, as `oras push` makes layers of a folder's files.
fn titled(files: &BTreeMap<String, Vec<u8>>, below: &str) -> Vec<(String, Vec<u8>)> {
    files.iter().map(|(name, content)| (format!("{below}{name}"), content.clone())).collect()
}

fn put(fake: &Fake, layers: &[(String, Vec<u8>)]) -> String {
    let layers: Vec<_> =
        layers.iter().map(|(title, content)| (Some(title.as_str()), content.clone())).collect();
    fake.artifact("v1", &layers);
    format!("oci://{}/team/a:v1", fake.host)
}

#[test]
fn an_artifact_whose_download_breaks_off_continues_and_is_the_same_run() {
    let manners = Manners { bearer: true, cut_blobs: Some((2, 20_000)), ..Manners::default() };
    let fake = Fake::start(manners);
    let address = put(&fake, &titled(&model(), "weights/"));
    let (server, work) = (hub(model()), Work::new());
    let data = format!("--plain-http --data {}", server.url("/rows.parquet"));
    let mut run = command(&work, "http://localhost:1", &address, &data);
    done(&mut run);
    assert_eq!(work.read("out/adapter_model.safetensors"), adapter_of_folder("a"));
    assert!(
        fake.log().iter().any(|line| line.contains("/blobs/") && line.ends_with(" from 20000")),
        "{:?}",
        fake.log()
    );
    let names = work.list(&folder(&work));
    assert!(!names.iter().any(|name| name.contains("part")), "{names:?}");

    let before = fake.log().len();
    std::fs::remove_dir_all(work.path("out")).unwrap();
    done(&mut command(&work, "http://localhost:1", &address, &data));
    assert_eq!(fake.log().len(), before, "the second run asks the registry nothing");
}

#[test]
fn a_beginning_of_a_file_is_continued_by_the_next_start_and_a_wrong_one_is_not_trusted() {
    let weights = model()[WEIGHTS].clone();
    for (beginning, start) in [(weights[..5000].to_vec(), 5000), (vec![7; 6000], 6000)] {
        let fake = Fake::start(Manners::default());
        let address = put(&fake, &titled(&model(), ""));
        let work = rows();
        let mut look = work.hone(&["model", &address]);
        done(look.env("HONE_CACHE", "cache").env("HONE_PLAIN_HTTP", "true"));
        let part = format!("{}/.hone-part-{}", folder(&work), digest(&weights));
        work.write(&part, beginning);
        done(&mut command(&work, "http://localhost:1", &address, "--plain-http --data data.parquet"));
        assert!(fake.log().iter().any(|line| line.ends_with(&format!(" from {start}"))), "{:?}", fake.log());
        assert_eq!(work.read(&format!("{}/{WEIGHTS}", folder(&work))), weights);
    }
}

#[test]
fn hostile_incomplete_and_damaged_artifacts_are_refused() {
    let mut said = Vec::new();
    for title in ["../config.json", "/etc/config.json", "a/../../b", ""] {
        let fake = Fake::start(Manners::default());
        let mut layers = titled(&model(), "");
        layers.push((title.into(), b"x".to_vec()));
        said.push((put(&fake, &layers), "leads out of the folder", 12));
    }
    let fake = Fake::start(Manners::default());
    said.push((put(&fake, &[("README.md".into(), b"x".to_vec())]), "no config.json among README.md", 12));
    let fake = Fake::start(Manners { damaged_blobs: true, ..Manners::default() });
    said.push((put(&fake, &titled(&model(), "")), "the registry's copy is damaged", 12));
    let fake = Fake::start(Manners::default());
    let huge = json!({"schemaVersion": 2, "layers": [
        {"digest": format!("sha256:{}", "a".repeat(64)), "size": 1u64 << 60,
            "annotations": {"org.opencontainers.image.title": "config.json"}},
        {"digest": format!("sha256:{}", "b".repeat(64)), "size": 5,
            "annotations": {"org.opencontainers.image.title": WEIGHTS}}]});
    fake.put_manifest("v1", huge);
    said.push((format!("oci://{}/team/a:v1", fake.host), "1.0 EiB more are needed", 14));
    fake.artifact("v3", &[(None, b"not an archive, but a layer of an image all the same".repeat(30))]);
    said.push((format!("oci://{}/team/a:v3", fake.host), "damaged archive", 12));
    said.push((format!("oci://{}/team/a:v2", fake.host), "check the image's name and tag", 10));
    for (address, expected, code) in said {
        let work = rows();
        let ended =
            end(&mut command(&work, "http://localhost:1", &address, "--plain-http --data data.parquet"));
        assert_eq!(ended.code, Some(code), "{expected}: {}", ended.stderr);
        assert!(ended.stderr.contains(expected), "{expected}: {}", ended.stderr);
        assert!(!work.path("config.json").exists() && !work.path("cache/config.json").exists());
    }
}

/// Returns a tar archive of files at these paths, gzipped.
fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let mut tar = tar::Builder::new(gzip);
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(content.len() as u64);
        tar.append_data(&mut header, path, *content).unwrap();
    }
    tar.into_inner().unwrap().finish().unwrap()
}

#[test]
fn a_model_somewhere_in_an_image_is_found() {
    let files = model();
    let below = |folder: &str| -> Vec<(String, Vec<u8>)> { titled(&files, folder) };
    let packed = |list: &[(String, Vec<u8>)]| {
        archive(&list.iter().map(|(path, content)| (path.as_str(), content.as_slice())).collect::<Vec<_>>())
    };
    let system = archive(&[
        ("usr/lib/python/config.json", b"{}"),
        ("etc/passwd", b"root"),
        ("models/x/config.json", b"{}"),
    ]);
    let fake = Fake::start(Manners::default());
    fake.artifact("v1", &[(None, system), (None, packed(&below("models/x/")))]);
    // oras makes one archive of a folder.
    let folder_layer = packed(&below("weights/"));
    let hex = digest(&folder_layer);
    fake.artifact("blob", &[(None, folder_layer.clone())]);
    fake.put_manifest(
        "v2",
        json!({"schemaVersion": 2, "layers": [
        {"digest": format!("sha256:{hex}"), "size": folder_layer.len(), "annotations": {
            "org.opencontainers.image.title": "weights", "io.deis.oras.content.unpack": "true"}}]}),
    );
    for tag in ["v1", "v2"] {
        let work = rows();
        let address = format!("oci://{}/team/a:{tag}", fake.host);
        done(&mut command(&work, "http://localhost:1", &address, "--plain-http --data data.parquet"));
        let folder = folder(&work);
        assert_eq!(work.read(&format!("{folder}/{WEIGHTS}")), files[WEIGHTS], "{tag}");
        let left =
            work.list(&folder).into_iter().filter(|name| name.contains("part") || name.contains("unpacked"));
        assert_eq!(left.count(), 0, "{tag}");
    }
    let fake = Fake::start(Manners::default());
    fake.artifact("v1", &[(None, archive(&[("models/config.json", b"{}")]))]);
    let address = format!("oci://{}/team/a:v1", fake.host);
    let ended =
        end(&mut command(&rows(), "http://localhost:1", &address, "--plain-http --data data.parquet"));
    assert_eq!(ended.code, Some(12), "{}", ended.stderr);
    assert!(ended.stderr.contains("no folder in it holds config.json and *.safetensors"), "{}", ended.stderr);
}

/// Writes a folder in OCI's layout: an artifact of titled layers, or an image of one layer.
fn layout(folder: &Path, layers: &[(Option<&str>, Vec<u8>)]) {
    let blobs = folder.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let keep = |content: &[u8]| {
        std::fs::write(blobs.join(digest(content)), content).unwrap();
        json!({"digest": format!("sha256:{}", digest(content)), "size": content.len()})
    };
    let image = layers.iter().all(|(title, _)| title.is_none());
    let mut config = keep(if image {
        br#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}"#
    } else {
        b"{}"
    });
    config["mediaType"] = "application/vnd.oci.image.config.v1+json".into();
    let layer = |(title, content): &(Option<&str>, Vec<u8>)| {
        let mut layer = keep(content);
        layer["mediaType"] = match title {
            Some(_) => "application/vnd.oci.image.layer.v1.tar".into(),
            None => "application/vnd.oci.image.layer.v1.tar+gzip".into(),
        };
        if let Some(title) = title {
            layer["annotations"] = json!({"org.opencontainers.image.title": title});
        }
        layer
    };
    let layers: Vec<_> = layers.iter().map(layer).collect();
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let manifest =
        json!({"schemaVersion": 2, "mediaType": kind, "config": config, "layers": layers}).to_string();
    let mut entry = keep(manifest.as_bytes());
    entry["mediaType"] = kind.into();
    std::fs::write(folder.join("index.json"), json!({"schemaVersion": 2, "manifests": [entry]}).to_string())
        .unwrap();
    std::fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}

#[test]
fn model_and_data_come_from_a_real_registry_with_a_login_in_config_d() {
    let registry = Registry::start(Setup { password: true, ..Setup::default() });
    let work = Work::new();
    let files = model();
    let rows = std::fs::read(golden_path("_data/messages.parquet")).unwrap();
    let layers: Vec<_> = files.iter().map(|(name, content)| (Some(name.as_str()), content.clone())).collect();
    layout(&work.path("model-layout"), &layers);
    layout(&work.path("data-layout"), &[(None, archive(&[("data/rows.parquet", &rows)]))]);
    for name in ["model", "data"] {
        run(Command::new("skopeo")
            .args([
                "copy",
                "-q",
                "--preserve-digests",
                "--dest-tls-verify=false",
                "--dest-creds",
                &registry::login_pair(),
            ])
            .arg(format!("oci:{}", work.path(&format!("{name}-layout")).display()))
            .arg(format!("docker://{}/team/{name}:v1", registry.host)));
    }
    // As KAITO mounts several pull secrets: one file each, and a config.json that knows another registry.
    work.write("docker/config.json", r#"{"auths": {"else.example.com": {"auth": "eDp5"}}}"#);
    work.write("docker/config.d/a.json", "{}");
    work.write("docker/config.d/b.json", std::fs::read(registry.login(registry::PASSWORD)).unwrap());
    let image = |name: &str| format!("oci://{}/team/{name}:v1", registry.host);
    let more = format!("--plain-http --docker-config docker --data {}", image("data"));
    let run = || command(&work, "http://localhost:1", &image("model"), &more);
    let ended = done(&mut run());
    assert!(!format!("{ended:?}").contains(registry::PASSWORD));
    assert_eq!(work.read("out/adapter_model.safetensors"), adapter_of_folder("model"));
    assert_eq!(work.list("cache/images").iter().filter(|name| name.starts_with("data-")).count(), 1);

    // Files that a killed pull left are removed, and the same data is found by its digest.
    work.write("cache/images/.hone-pull-dead/data/half", "x");
    std::fs::remove_dir_all(work.path("out")).unwrap();
    let again = done(&mut run());
    assert!(again.stderr.contains("from the cache"), "{}", again.stderr);
    std::fs::remove_dir_all(work.path("docker/config.d")).unwrap();
    std::fs::remove_dir_all(work.path("cache")).unwrap();
    let refused = end(&mut run());
    assert_eq!(refused.code, Some(13), "{}", refused.stderr);
}

#[test]
fn two_processes_share_a_cache() {
    let server = hub(model());
    let work = rows();
    let start = |output: &str| {
        let more = format!("--data data.parquet --output {output}");
        work.start_command(
            &mut command(&work, &server.url(""), "hf://org/tiny", &more),
            &format!("{output}.log"),
        )
    };
    for running in [start("one"), start("two")] {
        let (code, log) = running.end();
        assert_eq!(code, Some(0), "{log}");
    }
    let asked = files_asked_for(&server);
    assert_eq!(asked.iter().filter(|name| *name == WEIGHTS).count(), 1, "{asked:?}");
    assert_eq!(work.read("one/adapter_model.safetensors"), work.read("two/adapter_model.safetensors"));
}

/// The state of a hub to push to: repositories and whether they are private, large files, commits.
#[derive(Default)]
struct Shelf {
    repositories: BTreeMap<String, bool>,
    large: BTreeMap<String, Vec<u8>>,
    parts: BTreeMap<usize, Vec<u8>>,
    /// Git's or the large store's name of each file of the last commit.
    committed: BTreeMap<String, String>,
    /// Path of the request and its lines.
    commits: Vec<(String, Vec<serde_json::Value>)>,
    branches: Vec<String>,
}

/// Bytes of a part of a large file.
const PART_BYTES: usize = 40_000;

/// Returns a hub that takes commits, and its store of large files, on another host. The store fails at its first
/// request.
fn shelf() -> (Arc<Mutex<Shelf>>, Server, Server) {
    let shelf = Arc::new(Mutex::new(Shelf::default()));
    let parts = shelf.clone();
    let store = Server::start(move |index, request| {
        if index == 0 {
            return Reply::status(503);
        }
        let number: usize =
            request.target.trim_start_matches("/part/").split('?').next().unwrap().parse().unwrap();
        parts.lock().unwrap().parts.insert(number, request.body.clone());
        Reply::status(200).header("ETag", format!("\"part-{number}\""))
    });
    let (on_hub, store_url) = (shelf.clone(), store.url(""));
    let hub = Server::start(move |_, request| {
        if request.header("authorization") != Some(&format!("Bearer {TOKEN}")) {
            return Reply::status(401).body("{\"error\": \"Invalid username or password.\"}");
        }
        let own = format!("http://{}", request.header("host").unwrap());
        shelve(&mut on_hub.lock().unwrap(), request, &own, &store_url)
    });
    (shelf, hub, store)
}

fn shelve(shelf: &mut Shelf, request: &Request, own: &str, store: &str) -> Reply {
    let reply = |json: serde_json::Value| Reply::ok(json.to_string());
    let path = request.target.as_str();
    match (request.method.as_str(), path) {
        ("GET", "/api/whoami-v2") => reply(json!({"type": "user", "name": "me"})),
        ("POST", "/api/repos/create") => {
            let asked = request.json();
            let name =
                format!("{}/{}", asked["organization"].as_str().unwrap(), asked["name"].as_str().unwrap());
            shelf.repositories.insert(name.clone(), asked["private"] == true);
            reply(json!({"url": format!("{own}/{name}")}))
        }
        ("GET", path) if path.contains("/revision/") => reply(json!({"id": "x", "sha": COMMIT})),
        ("GET", _) => match shelf.repositories.get(path.trim_start_matches("/api/models/")) {
            Some(private) => reply(json!({"id": "x", "private": private})),
            None => Reply::status(404).body("{\"error\": \"Repository not found\"}"),
        },
        (_, path) if path.contains("/branch/") => {
            shelf.branches.push(path.rsplit('/').next().unwrap().to_owned());
            Reply::status(200)
        }
        (_, path) if path.contains("/preupload/") => {
            let mode = |file: &serde_json::Value| {
                let name = file["path"].as_str().unwrap();
                let large = name.ends_with(".safetensors");
                json!({"path": name, "uploadMode": if large { "lfs" } else { "regular" }, "shouldIgnore": false,
                    "oid": shelf.committed.get(name)})
            };
            let asked = request.json();
            reply(json!({"files": asked["files"].as_array().unwrap().iter().map(mode).collect::<Vec<_>>()}))
        }
        (_, path) if path.ends_with(".git/info/lfs/objects/batch") => {
            let object = |object: &serde_json::Value| {
                let (oid, bytes) =
                    (object["oid"].as_str().unwrap(), object["size"].as_u64().unwrap() as usize);
                if shelf.large.contains_key(oid) {
                    return json!({"oid": oid, "size": bytes});
                }
                let mut header = json!({"chunk_size": PART_BYTES.to_string()});
                for number in 1..=bytes.div_ceil(PART_BYTES) {
                    header[format!("{number:05}")] = format!("{store}/part/{number}?sig=canary").into();
                }
                json!({"oid": oid, "size": bytes, "actions": {
                    "upload": {"href": format!("{own}/complete"), "header": header},
                    "verify": {"href": format!("{own}/verify")}}})
            };
            let asked = request.json();
            assert_eq!((&asked["operation"], &asked["hash_algo"]), (&"upload".into(), &"sha256".into()));
            reply(json!({"transfer": "multipart",
                "objects": asked["objects"].as_array().unwrap().iter().map(object).collect::<Vec<_>>()}))
        }
        (_, "/complete") => {
            let asked = request.json();
            let whole: Vec<u8> = std::mem::take(&mut shelf.parts).into_values().flatten().collect();
            let parts: Vec<_> =
                asked["parts"].as_array().unwrap().iter().map(|part| part["etag"].clone()).collect();
            assert!(parts.len() > 1 && parts[1] == "\"part-2\"", "{parts:?}");
            assert_eq!(digest(&whole), asked["oid"].as_str().unwrap());
            shelf.large.insert(digest(&whole), whole);
            Reply::status(200)
        }
        (_, "/verify") => Reply::status(200),
        (_, path) if path.contains("/commit/") => {
            let text = String::from_utf8(request.body.clone()).unwrap();
            let lines: Vec<serde_json::Value> =
                text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            for line in &lines[1..] {
                let value = &line["value"];
                let oid = match value["oid"].as_str() {
                    Some(oid) => oid.to_owned(),
                    None => blob(value["content"].as_str().unwrap()),
                };
                shelf.committed.insert(value["path"].as_str().unwrap().to_owned(), oid);
            }
            shelf.commits.push((path.to_owned(), lines));
            reply(
                json!({"success": true, "commitOid": COMMIT, "commitUrl": format!("{own}/commit/{COMMIT}")}),
            )
        }
        other => panic!("{other:?}"),
    }
}

/// Returns Git's own name for content in base64.
fn blob(content: &str) -> String {
    use base64::Engine;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("content");
    std::fs::write(&file, base64::prelude::BASE64_STANDARD.decode(content).unwrap()).unwrap();
    let named = Command::new("git").arg("hash-object").arg(&file).output().expect("git");
    String::from_utf8(named.stdout).unwrap().trim().to_owned()
}

/// Returns `hone run` on the golden Llama that pushes.
fn pushing(endpoint: &str, work: &Work, more: &str) -> Command {
    let mut run = command(work, endpoint, "model", &format!("--data data.parquet {more}"));
    run.env("HF_TOKEN", TOKEN);
    run
}

#[test]
fn an_adapter_goes_to_the_hub_an_image_and_a_folder_in_one_run() {
    let (shelf, hub, store) = shelf();
    let work = Work::with_llama();
    let private = "--set TrainingArguments.hub_private_repo=true";
    let more = format!("--push hf://org/tuned --push oci:image --push file:kept {private}");
    let ended = done(&mut pushing(&hub.url(""), &work, &more));
    let weights = work.read("out/adapter_model.safetensors");
    {
        let shelf = shelf.lock().unwrap();
        assert_eq!(shelf.repositories, BTreeMap::from([("org/tuned".to_owned(), true)]));
        assert_eq!(shelf.large.values().collect::<Vec<_>>(), [&weights], "the parts make the file");
        let [(path, lines)] = shelf.commits.as_slice() else { panic!("{} commits", shelf.commits.len()) };
        assert_eq!(path, "/api/models/org/tuned/commit/main");
        assert!(lines[0]["value"]["summary"].as_str().unwrap().starts_with("End of training: step 2"));
        let place = |line: &serde_json::Value| line["value"]["path"].as_str().unwrap().to_owned();
        let names: Vec<String> = lines[1..].iter().map(place).collect();
        assert_eq!(names, ["README.md", "adapter_model.safetensors", "adapter_config.json"]);
        let config = lines[3]["value"]["content"].as_str().unwrap();
        use base64::Engine;
        let config = base64::prelude::BASE64_STANDARD.decode(config).unwrap();
        assert_eq!(config, work.read("out/adapter_config.json"));
        assert_eq!(
            (&lines[2]["key"], &lines[2]["value"]["oid"]),
            (&"lfsFile".into(), &digest(&weights).into())
        );
    }
    assert_eq!(work.list("kept"), ["README.md", "adapter_config.json", "adapter_model.safetensors"]);
    assert_eq!(work.read("kept/adapter_model.safetensors"), weights);
    let record = work.json("out/hone.json");
    assert_eq!(
        record["published"][0],
        json!({"destination": "hf://org/tuned", "revision": COMMIT, "image": false})
    );
    assert_eq!(record["published"][1]["destination"], "oci:image:latest");
    assert_eq!(record["image"]["digest"], record["published"][1]["revision"]);
    assert!(ended.stdout.contains(COMMIT) && ended.stdout.contains("file:kept"), "{}", ended.stdout);

    // The token reaches the hub alone; signatures of the store are in no message and no result.
    assert!(!store.requests().is_empty() && !format!("{:?}", store.requests()).contains(TOKEN));
    let told = format!("{ended:?}{record}{}", work.text("out/report.html"));
    assert!(!told.contains(TOKEN) && !told.contains("sig=canary"), "{told}");

    // Pushed again, nothing is sent again, and there is no second commit.
    let before = store.requests().len();
    let again = done(&mut pushing(&hub.url(""), &work, &more));
    assert_eq!(store.requests().len(), before);
    assert_eq!(shelf.lock().unwrap().commits.len(), 1);
    assert!(again.stdout.contains(COMMIT), "{}", again.stdout);
    assert!(again.stderr.contains("hf://org/tuned: every file is there already"), "{}", again.stderr);

    // A file that changed is the only one of its commit.
    let config = work.text("out/adapter_config.json").replace("}", " }");
    std::fs::write(work.path("out/adapter_config.json"), config).unwrap();
    let mut by_hand = work.hone(&["push", "out", "hf://org/tuned"]);
    done(by_hand.env("HF_ENDPOINT", hub.url("")).env("HF_TOKEN", TOKEN));
    let shelf = shelf.lock().unwrap();
    let names: Vec<_> = shelf.commits[1].1[1..].iter().map(|line| &line["value"]["path"]).collect();
    assert_eq!((shelf.commits.len(), names), (2, vec![&json!("adapter_config.json")]));
}

#[test]
fn push_to_hub_means_what_transformers_means() {
    let (shelf, hub, _store) = shelf();
    let work = Work::with_llama();
    let keys = "--set TrainingArguments.push_to_hub=true --set TrainingArguments.hub_model_id=tuned \
                --set TrainingArguments.hub_revision=v2";
    done(&mut pushing(&hub.url(""), &work, keys));
    let shelf = shelf.lock().unwrap();
    assert_eq!(shelf.repositories, BTreeMap::from([("me/tuned".to_owned(), false)]), "the token's owner");
    assert_eq!(shelf.branches, ["v2"]);
    assert_eq!(shelf.commits[0].0, "/api/models/me/tuned/commit/v2");
}

#[test]
fn what_the_hub_does_not_take_keeps_nothing_else_from_being_sent() {
    let work = Work::with_llama();
    let push = "--push hf://org/tuned --push file:kept";
    let mut without = pushing("http://localhost:1", &work, push);
    let ended = end(without.env_remove("HF_TOKEN"));
    assert_eq!(ended.code, Some(13), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("there is no token to push with") && work.list("out").is_empty(),
        "{}",
        ended.stderr
    );

    let refusing = Server::start(|_, request| match request.method.as_str() {
        "GET" => Reply::status(404),
        // It quotes what it was sent.
        _ => Reply::status(403).body(format!("{{\"error\": \"You don't have the rights: {TOKEN}\"}}")),
    });
    let ended = end(&mut pushing(&refusing.url(""), &work, push));
    assert_eq!(ended.code, Some(13), "{}", ended.stderr);
    assert!(ended.stderr.contains("You don't have the rights: ***"), "{}", ended.stderr);
    for name in ["termination.json", "out/report.json", "out/report.html"] {
        assert!(!work.text(name).contains(TOKEN), "{name}");
    }
    assert_eq!(work.read("kept/adapter_model.safetensors"), work.read("out/adapter_model.safetensors"));

    // A public repository does not get what was to be private; the finished adapter is pushed by hand.
    let (shelf, hub, store) = shelf();
    shelf.lock().unwrap().repositories.insert("org/tuned".into(), false);
    let private = format!("{push} --set TrainingArguments.hub_private_repo=true");
    let ended = end(&mut pushing(&hub.url(""), &work, &private));
    assert_eq!(ended.code, Some(10), "{}", ended.stderr);
    assert!(ended.stderr.contains("hf://org/tuned is public"), "{}", ended.stderr);
    assert!(store.requests().is_empty());
    let mut by_hand = work.hone(&["push", "out", "hf://org/tuned"]);
    let pushed = done(by_hand.env("HF_ENDPOINT", hub.url("")).env("HF_TOKEN", TOKEN));
    assert_eq!(pushed.stdout, format!("hf://org/tuned\n{COMMIT}\n"));
    assert_eq!(shelf.lock().unwrap().large.len(), 1);
}
