//! Layers of images, models and adapters in them, by the library's own functions: scripted registries, no run and no
//! training.

use std::os::unix::fs::DirEntryExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use hone::fault::{Fault, Kind};
use hone::fetch::{self, Access, Adapter, Data, Model};
use hone::registry::{self as images, ImageFacts, Options, Part, Target};
use hone::report::Report;
use hone::source::{self, Speed, digest};
use serde_json::{Value, json};

use crate::fake_registry::{Fake, Manners};
use crate::http::{Reply, Server};
use crate::random::Random;
use crate::registry::{PASSWORD, adapter, login, quick};
use crate::{WEIGHTS, archive, model, titled};

/// Returns options of downloads that are fast enough for tests.
pub fn sources(cache: &Path) -> source::Options {
    source::Options {
        cache: cache.to_owned(),
        connect_timeout: Duration::from_secs(5),
        read_timeout: Duration::from_secs(5),
        speed: Speed::LEAST,
        total_timeout: Duration::from_secs(60),
        attempts_max: 3,
        backoff: Duration::from_millis(2),
        file_bytes_max: 100 << 20,
        endings: hone::dataset::ENDINGS,
        ca_file: None,
    }
}

fn noise(count: usize) -> Vec<u8> {
    let mut random = Random(7);
    (0..count).map(|_| random.next() as u8).collect()
}

fn part(content: &[u8]) -> Part {
    let digest = format!("sha256:{}", digest(content));
    Part { digest, bytes: content.len() as u64, title: None, unpack: false }
}

/// Downloads one layer to a file.
fn download(host: &str, part: &Part, file: &Path, attempts_max: u32) -> Result<(), Fault> {
    let (image, options) = (format!("{host}/team/a:v1"), Options { attempts_max, ..quick() });
    let mut arrived = Vec::new();
    let pair = [(part, file)].into_iter();
    images::download(&image, pair, &options, &Report::silent(), |part, path| {
        arrived.push((part.digest.clone(), path.to_owned()));
        Ok(())
    })?;
    assert_eq!(arrived, [(part.digest.clone(), file.to_owned())]);
    Ok(())
}

/// A registry that has one layer, and the file that it goes to.
struct Desk {
    fake: Fake,
    folder: tempfile::TempDir,
    part: Part,
}

impl Desk {
    fn new(manners: Manners, content: &[u8]) -> Desk {
        let fake = Fake::start(manners);
        fake.artifact("v1", &[(None, content.to_vec())]);
        Desk { fake, folder: tempfile::tempdir().unwrap(), part: part(content) }
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("part")
    }

    fn begin(&self, bytes: &[u8]) {
        std::fs::write(self.file(), bytes).unwrap();
    }

    fn held(&self) -> Vec<u8> {
        std::fs::read(self.file()).unwrap()
    }

    fn download(&self, attempts_max: u32) -> Result<(), Fault> {
        download(&self.fake.host, &self.part, &self.file(), attempts_max)
    }

    /// Returns the first byte of each request for the layer.
    fn starts(&self) -> Vec<usize> {
        let of_layer = |line: &String| {
            let path = line.contains("/blobs/").then_some(line)?;
            Some(path.rsplit_once(" from ").map_or(0, |(_, start)| start.parse().unwrap()))
        };
        self.fake.log().iter().filter_map(of_layer).collect()
    }
}

#[test]
fn a_layer_that_breaks_off_goes_on_where_it_stopped() {
    let content = noise(70_000);
    let desk = Desk::new(Manners { cut_blobs: Some((2, 20_000)), ..Manners::default() }, &content);
    // Attempts that receive bytes do not count.
    desk.download(1).unwrap();
    assert!(desk.held() == content);
    assert_eq!(desk.starts(), [0, 20_000, 40_000]);
    desk.download(1).unwrap();
    assert_eq!(desk.starts().len(), 3, "a whole file is asked for no more");
}

#[test]
fn attempts_without_a_byte_end_and_keep_the_beginning() {
    let content = noise(9000);
    let desk = Desk::new(Manners { fail_first: Some((3, 503)), ..Manners::default() }, &content);
    desk.begin(&content[..5000]);
    let fault = desk.download(2).unwrap_err();
    assert_eq!(fault.kind, Kind::Network, "{fault}");
    assert!(fault.message.contains("failed after 2 attempts"), "{fault}");
    assert!(desk.held() == content[..5000]);
    desk.download(2).unwrap();
    assert!(desk.held() == content);
    assert_eq!(desk.starts(), [5000; 4]);
}

#[test]
fn a_wrong_beginning_is_given_up_and_a_damaged_layer_is_refused() {
    let content = noise(9000);
    for (wrong, starts) in [(6000, vec![6000, 0]), (9000, vec![0]), (9500, vec![0])] {
        let desk = Desk::new(Manners::default(), &content);
        desk.begin(&vec![7; wrong]);
        desk.download(2).unwrap();
        assert!(desk.held() == content, "{wrong}");
        assert_eq!(desk.starts(), starts, "{wrong}");
    }
    let desk = Desk::new(Manners { damaged_blobs: true, ..Manners::default() }, &content);
    let fault = desk.download(3).unwrap_err();
    assert_eq!(fault.kind, Kind::Model, "{fault}");
    let digest = &desk.part.digest;
    let told = format!("team/a:v1: {}: asked for {digest}, got sha256:", &digest[..19]);
    assert!(fault.message.contains(&told), "{fault}");
    assert_eq!((desk.held().len(), desk.starts().len()), (0, 2));

    let mut desk = Desk::new(Manners::default(), &content);
    desk.part.bytes -= 1;
    let fault = desk.download(3).unwrap_err();
    assert_eq!(fault.kind, Kind::Model, "{fault}");
    assert!(fault.message.contains("longer than its 8999 bytes"), "{fault}");
    assert_eq!((desk.held().len(), desk.starts().len()), (0, 1));
}

#[test]
fn a_registry_without_ranges_sends_everything_again() {
    let content = noise(9000);
    for (status, asked) in [(200, vec![Some(5000)]), (416, vec![Some(5000), None])] {
        let whole = content.clone();
        let server = Server::start(move |_, request| match request.target.contains("/blobs/") {
            true if status == 416 && request.range_start().is_some() => Reply::status(416),
            true => Reply::ok(whole.clone()),
            false => Reply::status(200),
        });
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("part");
        std::fs::write(&file, &content[..5000]).unwrap();
        let host = server.url("").replace("http://", "");
        download(&host, &part(&content), &file, asked.len() as u32).unwrap();
        assert!(std::fs::read(&file).unwrap() == content, "{status}");
        let blobs = server.requests().into_iter().filter(|request| request.target.contains("/blobs/"));
        assert_eq!(blobs.map(|request| request.range_start()).collect::<Vec<_>>(), asked);
    }
}

#[test]
fn a_registry_that_answers_in_short_pieces_is_asked_for_each() {
    let content = noise(9000);
    let whole = content.clone();
    let server = Server::start(move |_, request| match request.target.contains("/blobs/") {
        true => {
            let start = request.range_start().unwrap_or(0);
            let status = if start > 0 { 206 } else { 200 };
            Reply::status(status).body(&whole[start..(start + 4000).min(whole.len())])
        }
        false => Reply::status(200),
    });
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("part");
    download(&server.url("").replace("http://", ""), &part(&content), &file, 1).unwrap();
    assert!(std::fs::read(&file).unwrap() == content);
    assert_eq!(
        server.requests().iter().filter_map(|request| request.range_start()).collect::<Vec<_>>(),
        [4000, 8000]
    );
}

#[test]
fn an_index_leads_to_parts_with_their_titles() {
    let fake = Fake::start(Manners::default());
    let layer = |content: &[u8], unpack: &str| {
        json!({"mediaType": "application/octet-stream", "digest": format!("sha256:{}", digest(content)),
            "size": content.len(), "annotations": {"org.opencontainers.image.title": "weights/a",
            "io.deis.oras.content.unpack": unpack}})
    };
    let inner = json!({"schemaVersion": 2, "layers": [layer(b"one", "true"), layer(b"two", "false")]});
    fake.put_manifest("inner", inner.clone());
    let told = format!("sha256:{}", digest(inner.to_string().as_bytes()));
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let entry = json!({"mediaType": kind, "digest": told, "size": inner.to_string().len(),
        "platform": {"architecture": "amd64", "os": "linux"}});
    let index = "application/vnd.oci.image.index.v1+json";
    fake.put_manifest("v1", json!({"schemaVersion": 2, "mediaType": index, "manifests": [entry]}));
    let parts = images::list(&format!("{}/team/a:v1", fake.host), &quick(), &Report::silent()).unwrap();
    assert_eq!(parts.digest, told);
    let seen: Vec<_> =
        parts.list.iter().map(|part| (part.title.as_deref(), part.unpack, part.bytes)).collect();
    assert_eq!(seen, [(Some("weights/a"), true, 3), (Some("weights/a"), false, 3)]);
}

#[test]
fn a_manifest_that_is_too_large_or_not_what_it_is_said_to_be_is_refused() {
    let said = |reply: Reply| {
        let server = Server::start(move |_, request| match request.target.contains("/manifests/") {
            true => reply.clone(),
            false => Reply::status(200),
        });
        let (host, options) = (server.url("").replace("http://", ""), Options { attempts_max: 1, ..quick() });
        images::list(&format!("{host}/team/a:v1"), &options, &Report::silent()).unwrap_err()
    };
    let manifest = json!({"schemaVersion": 2, "layers": []}).to_string();
    let other = format!("sha256:{}", digest(b"other"));
    let fault = said(Reply::ok(manifest).header("Docker-Content-Digest", other));
    assert!(fault.kind == Kind::Network && fault.message.contains("but it has another"), "{fault}");
    let fault = said(Reply::ok(vec![b' '; (4 << 20) + 1]));
    assert!(fault.kind == Kind::Config && fault.message.contains("exceeds 4194304 bytes"), "{fault}");
}

#[test]
fn a_password_goes_to_no_other_host_in_clear_text() {
    let tokens = Server::start(|_, _| Reply::ok(r#"{"token": "t"}"#));
    // Another host for a client that compares names.
    let realm = tokens.url("/token").replace("localhost", "127.0.0.1");
    let server = Server::start(move |_, request| match request.header("authorization") {
        Some("Bearer t") => Reply::ok(r#"{"schemaVersion": 2, "layers": []}"#),
        _ => Reply::status(401).header("www-authenticate", format!("Bearer realm=\"{realm}\",service=\"s\"")),
    });
    let (host, folder) = (server.url("").replace("http://", ""), tempfile::tempdir().unwrap());
    let list = |docker_config: PathBuf| {
        let options = Options { docker_config: Some(docker_config), ..quick() };
        images::list(&format!("{host}/team/a:v1"), &options, &Report::silent())
    };
    let fault = list(login(folder.path(), &host, PASSWORD)).unwrap_err();
    assert_eq!(fault.kind, Kind::Auth, "{fault}");
    assert!(fault.message.contains("which would get the password") && !fault.to_string().contains(PASSWORD));
    assert!(tokens.requests().is_empty());

    let nothing = folder.path().join("config.json");
    std::fs::write(&nothing, "{}").unwrap();
    assert!(list(nothing).unwrap().list.is_empty(), "without a password nothing is given away");
    assert_eq!(tokens.requests().len(), 1);
}

#[test]
fn redirects_without_end_are_refused_at_once() {
    let server = Server::start(|_, request| match request.target.contains("/blobs/") {
        true => Reply::redirect(request.target.clone()),
        false => Reply::status(200),
    });
    let folder = tempfile::tempdir().unwrap();
    let host = server.url("").replace("http://", "");
    let fault = download(&host, &part(b"content"), &folder.path().join("part"), 3).unwrap_err();
    assert_eq!(fault.kind, Kind::Config, "no repetition helps: {fault}");
    assert!(server.requests().len() < 20, "{} requests", server.requests().len());
}

#[test]
fn sizes_that_nothing_can_have_are_refused_before_anything_is_read() {
    let fake = Fake::start(Manners::default());
    let layer = json!({"mediaType": "application/vnd.oci.image.layer.v1.tar", "size": 1u64 << 60,
        "digest": format!("sha256:{}", "a".repeat(64))});
    fake.put_manifest("v1", json!({"schemaVersion": 2, "layers": [layer]}));
    let work = tempfile::tempdir().unwrap();
    let pull = |target: &str| {
        let to = work.path().join("to");
        images::pull(&Target::parse(target).unwrap(), &to, &quick(), &Report::silent()).unwrap_err()
    };
    let fault = pull(&format!("{}/team/a:v1", fake.host));
    assert!(fault.kind == Kind::Data && fault.message.contains("bytes; at most"), "{fault}");

    let content = archive(&[("data/rows.jsonl", b"{}\n")]);
    fake.artifact("v2", &[(None, content.clone())]);
    let short = json!({"mediaType": "application/octet-stream", "size": content.len() - 1,
        "digest": format!("sha256:{}", digest(&content))});
    fake.put_manifest("v2", json!({"schemaVersion": 2, "layers": [short]}));
    let fault = pull(&format!("{}/team/a:v2", fake.host));
    assert!(fault.kind == Kind::Data && fault.message.contains("the layer is longer than its"), "{fault}");

    let (folder, layout) = (work.path().join("adapter"), work.path().join("layout"));
    adapter(&folder, 100);
    let target = Target::Layout { folder: layout.clone(), tag: "v1".into() };
    let push = || images::push(&folder, &target, &ImageFacts::default(), &quick(), &Report::silent());
    let files = || {
        let entries =
            std::fs::read_dir(layout.join("blobs/sha256")).unwrap().map(|entry| entry.unwrap().ino());
        entries.collect::<std::collections::BTreeSet<u64>>()
    };
    let pushed = push().unwrap();
    let sizes =
        std::fs::read_dir(layout.join("blobs/sha256")).unwrap().map(|entry| entry.unwrap().metadata());
    assert_eq!(pushed.bytes, sizes.map(|data| data.unwrap().len()).sum::<u64>());
    let before = files();
    push().unwrap();
    assert_eq!(files(), before, "blobs that are there are not written again");
    let index = layout.join("index.json");
    let mut told: Value = serde_json::from_slice(&std::fs::read(&index).unwrap()).unwrap();
    told["manifests"][0]["size"] = (1u64 << 40).into();
    std::fs::write(&index, told.to_string()).unwrap();
    let fault = pull(&format!("oci:{}:v1", layout.display()));
    assert!(fault.kind == Kind::Data && fault.message.contains("bytes; at most"), "{fault}");

    // Weights whose header would be longer than the file.
    for header in [20_u64, 21, 1 << 40] {
        let weights = [&header.to_le_bytes()[..], &[b' '; 12]].concat();
        std::fs::write(folder.join(WEIGHTS_OF_ADAPTER), weights).unwrap();
        let fault = push().unwrap_err();
        assert!(fault.kind == Kind::Model && fault.message.contains("its header would have"), "{fault}");
    }
}

#[test]
fn only_wanted_files_are_unpacked_and_later_layers_count() {
    let work = tempfile::tempdir().unwrap();
    let keep = |name: &str, files: &[(&str, &[u8])]| {
        let path = work.path().join(name);
        std::fs::write(&path, archive(files)).unwrap();
        path
    };
    let one = keep("1", &[("a/config.json", b"1"), ("a/notes.txt", b"n"), ("b/config.json", b"gone")]);
    let two = keep("2", &[("a/config.json", b"22"), ("b/.wh.config.json", b"")]);
    let unpack = |to: &Path, most: u64| {
        std::fs::create_dir(to).unwrap();
        images::unpack(&[&one, &two], to, |name| name == "config.json", most, "x")
    };
    let to = work.path().join("to");
    unpack(&to, 100).unwrap();
    assert_eq!(std::fs::read(to.join("a/config.json")).unwrap(), b"22");
    assert!(!to.join("a/notes.txt").exists() && !to.join("b/config.json").exists());
    let fault = unpack(&work.path().join("small"), 2).unwrap_err();
    assert!(fault.kind == Kind::Data && fault.message.contains("its files exceed 2 bytes"), "{fault}");
}

/// Returns the two steps of a model's download, into a cache of its own.
fn fetched(address: &str, check_texts: impl FnOnce(&Path)) -> Result<(tempfile::TempDir, PathBuf), Fault> {
    let cache = tempfile::tempdir().unwrap();
    let (options, registry) = (sources(cache.path()), quick());
    let access = Access { source: &options, registry: &registry };
    let model = Model::parse(address)?;
    check_texts(&fetch::texts(&model, access, &Report::silent())?);
    let folder = fetch::weights(&model, access, &Report::silent())?;
    Ok((cache, folder))
}

fn names_in(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<String> = entries.map(|name| name.into_string().unwrap()).collect();
    names.sort();
    names
}

/// Checks that the folder has the golden model's files, and only hone's record and lock beside them.
fn assert_is_model(folder: &Path) {
    let files = model();
    let own = names_in(folder).into_iter().filter(|name| !name.starts_with('.')).collect::<Vec<_>>();
    assert!(own.contains(&"config.json".to_owned()) && own.contains(&WEIGHTS.to_owned()), "{own:?}");
    assert!(own.iter().all(|name| std::fs::read(folder.join(name)).unwrap() == files[name]), "{own:?}");
    let hidden = names_in(folder).into_iter().filter(|name| name.starts_with('.')).collect::<Vec<_>>();
    assert_eq!(hidden, [".hone-model.json", ".hone.lock"]);
}

#[test]
fn an_artifacts_model_is_the_folder_nearest_to_the_top() {
    let mut layers = vec![("weights/config.json".to_owned(), b"an older layer".to_vec())];
    layers.extend(titled(&model(), "./weights/"));
    layers.push(("weights/deep/config.json".into(), b"{}".to_vec()));
    layers.push(("notes.txt".into(), b"none of the model's".to_vec()));
    let fake = Fake::start(Manners::default());
    let address = crate::put(&fake, &layers);
    let (_cache, folder) = fetched(&address, |folder| {
        let names = names_in(folder);
        assert!(names.contains(&"config.json".into()) && !names.contains(&WEIGHTS.into()), "{names:?}");
    })
    .unwrap();
    assert_is_model(&folder);

    for title in ["../config.json", "/etc/config.json", "a/../../b", "", "a\\b"] {
        let fake = Fake::start(Manners::default());
        let mut layers = titled(&model(), "");
        layers.push((title.into(), b"x".to_vec()));
        let fault = fetched(&crate::put(&fake, &layers), |_| {}).unwrap_err();
        assert_eq!(fault.kind, Kind::Model, "{title:?}: {fault}");
        assert!(fault.message.contains("leads out of the folder"), "{title:?}: {fault}");
    }
}

#[test]
fn an_images_model_is_a_folder_with_both_config_and_weights() {
    let files = titled(&model(), "models/");
    let files: Vec<_> = files.iter().map(|(path, content)| (path.as_str(), content.as_slice())).collect();
    let system = archive(&[
        ("etc/config.json", b"{}"),
        ("data/other.safetensors", b"x"),
        ("data/tokenizer.json", b"{}"),
        ("models/passwd", b"root"),
    ]);
    let fake = Fake::start(Manners::default());
    fake.artifact("v1", &[(None, system.clone()), (None, archive(&files))]);
    fake.artifact("none", &[(None, system)]);
    let (_cache, folder) = fetched(&format!("oci://{}/team/a:v1", fake.host), |_| {}).unwrap();
    assert_is_model(&folder);
    let fault = fetched(&format!("oci://{}/team/a:none", fake.host), |_| {}).unwrap_err();
    assert_eq!(fault.kind, Kind::Model, "{fault}");
    assert!(fault.message.contains("no folder in it holds config.json and *.safetensors"), "{fault}");
}

#[test]
fn an_images_data_is_pulled_once_and_what_killed_pulls_left_is_removed() {
    let fake = Fake::start(Manners::default());
    fake.artifact("v1", &[(None, archive(&[("data/rows.jsonl", b"{}\n"), ("data/z/more.jsonl", b"[]\n")]))]);
    let cache = tempfile::tempdir().unwrap();
    let left = cache.path().join("images/.hone-pull-dead/data");
    std::fs::create_dir_all(&left).unwrap();
    std::fs::write(left.join("half"), "x").unwrap();
    let (options, registry) = (sources(cache.path()), quick());
    let access = Access { source: &options, registry: &registry };
    let data = Data::parse(&format!("oci://{}/team/a:v1", fake.host)).unwrap();
    for _ in 0..2 {
        let files = fetch::data(std::slice::from_ref(&data), access, &Report::silent()).unwrap();
        let texts: Vec<_> = files.iter().map(|file| std::fs::read(&file.path).unwrap()).collect();
        assert_eq!(texts, [b"{}\n", b"[]\n"]);
        assert!(!left.parent().unwrap().exists());
    }
    assert_eq!(fake.log().iter().filter(|line| line.contains("/blobs/")).count(), 1);

    // A folder that is there, such as the root of a volume, gets the files below its folders too.
    let volume = tempfile::tempdir().unwrap();
    let target = Target::parse(&format!("{}/team/a:v1", fake.host)).unwrap();
    images::pull(&target, volume.path(), &quick(), &Report::silent()).unwrap();
    assert_eq!(std::fs::read(volume.path().join("z/more.jsonl")).unwrap(), b"[]\n");
}

#[test]
fn a_folder_that_another_process_fills_is_waited_for_so_long_and_an_unreadable_record_is_told() {
    let cache = tempfile::tempdir().unwrap();
    let model = Model::parse("oci://127.0.0.1:1/team/a:v1").unwrap();
    let folder = model.folder(cache.path()).unwrap();
    std::fs::create_dir_all(&folder).unwrap();
    let lock = std::fs::File::create(folder.join(".hone.lock")).unwrap();
    lock.lock().unwrap();
    let freed = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(1));
        drop(lock);
    });
    let options = source::Options { total_timeout: Duration::from_millis(200), ..sources(cache.path()) };
    let registry = Options { attempts_max: 1, ..quick() };
    let access = Access { source: &options, registry: &registry };
    let fault = fetch::weights(&model, access, &Report::silent()).unwrap_err();
    assert_eq!(fault.kind, Kind::Network, "{fault}");
    assert!(fault.message.contains("another process has been filling it for 200ms"), "{fault}");
    freed.join().unwrap();

    assert_eq!(fetch::revision(&folder).unwrap(), None, "no record");
    std::fs::create_dir(folder.join(".hone-model.json")).unwrap();
    let fault = fetch::revision(&folder).unwrap_err();
    assert!(fault.kind == Kind::Config && fault.message.contains(".hone-model.json"), "{fault}");
}

/// Serves the one image of a layout. A status other than 200 is the answer to everything.
fn registry_of(layout: &Path, status: &Arc<AtomicU16>) -> Server {
    let (layout, status) = (layout.to_owned(), status.clone());
    Server::start(move |_, request| {
        let status = status.load(Ordering::SeqCst);
        let index: Value =
            serde_json::from_slice(&std::fs::read(layout.join("index.json")).unwrap()).unwrap();
        let name = request.target.rsplit('/').next().unwrap();
        let name = if name == "v1" { index["manifests"][0]["digest"].as_str().unwrap() } else { name };
        match name.strip_prefix("sha256:") {
            _ if status != 200 => Reply::status(status),
            Some(hex) => Reply::ok(std::fs::read(layout.join("blobs/sha256").join(hex)).unwrap()),
            None => Reply::status(200),
        }
    })
}

#[test]
fn an_adapters_copy_is_used_while_its_registry_is_away_and_only_then() {
    let work = tempfile::tempdir().unwrap();
    let (folder, layout) = (work.path().join("adapter"), work.path().join("layout"));
    adapter(&folder, 3000);
    let facts = ImageFacts { model_name: "org/base".into(), ..Default::default() };
    let target = Target::Layout { folder: layout.clone(), tag: "v1".into() };
    let pushed = images::push(&folder, &target, &facts, &quick(), &Report::silent()).unwrap();
    let status = Arc::new(AtomicU16::new(200));
    let server = registry_of(&layout, &status);
    let host = server.url("").replace("http://", "");
    let (options, registry) = (sources(&work.path().join("cache")), quick());
    let access = Access { source: &options, registry: &registry };
    let bring = |text: &str| fetch::adapter(&Adapter::parse(text)?, access, &Report::silent());
    let blobs = || server.requests().iter().filter(|request| request.target.contains("/blobs/")).count();
    let tag = format!("oci://{host}/team/a:v1");

    let first = bring(&tag).unwrap();
    assert_eq!((&first.digest, blobs()), (&pushed.digest, 1));
    assert_eq!(first.bases, ["org/base"]);
    for name in ["adapter_config.json", WEIGHTS_OF_ADAPTER] {
        assert!(std::fs::read(first.folder.join(name)).unwrap() == std::fs::read(folder.join(name)).unwrap());
    }
    assert_eq!((bring(&tag).unwrap(), blobs()), (first.clone(), 1), "only asked what the tag names");

    status.store(503, Ordering::SeqCst);
    assert_eq!(bring(&tag).unwrap(), first, "the copy is used while the registry is away");
    let asked = server.requests().len();
    assert_eq!(bring(&format!("oci://{host}/team/a@{}", pushed.digest)).unwrap(), first);
    assert_eq!(server.requests().len(), asked, "a digest cannot move, so nothing is asked");
    status.store(403, Ordering::SeqCst);
    let fault = bring(&tag).unwrap_err();
    assert_eq!(fault.kind, Kind::Auth, "who may not have it any more gets no copy: {fault}");

    status.store(200, Ordering::SeqCst);
    std::fs::write(first.folder.join(WEIGHTS_OF_ADAPTER), "damaged").unwrap();
    assert_eq!((bring(&tag).unwrap(), blobs()), (first, 2));

    let of_layout = bring(&format!("oci:{}:v1", layout.display())).unwrap();
    assert_eq!(of_layout.digest, pushed.digest);
    let of_folder = bring(&folder.display().to_string()).unwrap();
    let [config, weights] = ["adapter_config.json", WEIGHTS_OF_ADAPTER].map(|name| folder.join(name));
    let both = [config, weights].map(|path| std::fs::read(path).unwrap()).concat();
    assert_eq!((of_folder.digest, of_folder.folder), (format!("sha256:{}", digest(&both)), folder.clone()));

    let remote = |text: &str| Adapter::parse(text).map(|adapter| adapter.is_remote());
    assert!(remote(&tag).unwrap() && remote("org/lora").unwrap());
    assert!(!remote(&folder.display().to_string()).unwrap() && !remote("oci:layout").unwrap());
    let fault = remote("org/lora@a/b").unwrap_err();
    assert!(
        fault.message.contains("there is no such folder"),
        "more than one slash is no OWNER/NAME: {fault}"
    );
}

const WEIGHTS_OF_ADAPTER: &str = "adapter_model.safetensors";
