//! Object stores and datasets of the hub: the real binary with servers that check every signature themselves.
//! `tests/stores/run` does the same with moto's S3 and Azurite.

#[path = "support/http.rs"]
mod http;
#[path = "support/job.rs"]
mod job;

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use hone::source::digest;
use http::{Reply, Request, Server};
use job::{Work, done, end, golden_path};
use sha2::{Digest, Sha256};

const STEPS: &str = "--set TrainingArguments.max_steps=1 --set TrainingArguments.max_length=64 --device cpu";
const KEY: &str = "AKIDEXAMPLE";
/// A secret that must never appear in a message or a request.
const SECRET: &str = "canary-secret-5c1d";
/// The same for Azure, in base64: `canary-secret-az`.
const ACCOUNT_KEY: &str = "Y2FuYXJ5LXNlY3JldC1heg==";

fn rows(name: &str) -> Vec<u8> {
    std::fs::read(golden_path(&format!("_data/{name}"))).unwrap()
}

fn hmac(key: &[u8], text: &[u8]) -> Vec<u8> {
    let mut block = [0; 64];
    block[..key.len()].copy_from_slice(key);
    let pad = |byte: u8| block.map(|key| key ^ byte);
    let inner = Sha256::new().chain_update(pad(0x36)).chain_update(text).finalize();
    Sha256::new().chain_update(pad(0x5c)).chain_update(inner).finalize().to_vec()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Returns whether the request carries AWS's signature (version 4) for its content, computed here independently.
fn is_signed_for_s3(request: &Request) -> bool {
    let Some(authorization) = request.header("authorization") else { return false };
    let field = |name: &str| {
        let from = authorization.split_once(&format!("{name}="))?.1;
        Some(from.split(',').next()?.trim().to_owned())
    };
    let (Some(credential), Some(names), Some(signature)) =
        (field("Credential"), field("SignedHeaders"), field("Signature"))
    else {
        return false;
    };
    let scope: Vec<&str> = credential.split('/').collect();
    let [KEY, date, region, "s3", "aws4_request"] = scope[..] else { return false };
    let (path, query) = request.target.split_once('?').unwrap_or((&request.target, ""));
    // A plus stands for a blank, which the signature writes as %20.
    let escaped = |text: &str| -> String {
        let one = |byte: u8| match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                char::from(byte).to_string()
            }
            _ => format!("%{byte:02X}"),
        };
        text.bytes().map(one).collect()
    };
    let mut query: Vec<String> = url::form_urlencoded::parse(query.as_bytes())
        .map(|(name, value)| format!("{}={}", escaped(&name), escaped(&value)))
        .collect();
    query.sort();
    let headers: String = names
        .split(';')
        .map(|name| format!("{name}:{}\n", request.header(name).unwrap_or_default().trim()))
        .collect();
    let payload = request.header("x-amz-content-sha256").unwrap_or_default();
    let canonical = format!("{}\n{path}\n{}\n{headers}\n{names}\n{payload}", request.method, query.join("&"));
    let to_sign = format!(
        "AWS4-HMAC-SHA256\n{}\n{}\n{}",
        request.header("x-amz-date").unwrap_or_default(),
        scope[1..].join("/"),
        digest(canonical.as_bytes())
    );
    let key = [date, region, "s3", "aws4_request"]
        .iter()
        .fold(format!("AWS4{SECRET}").into_bytes(), |key, part| hmac(&key, part.as_bytes()));
    hex(&hmac(&key, to_sign.as_bytes())) == signature
}

/// Returns whether it carries Azure's shared key signature, which covers the range and the conditions.
fn is_signed_for_azure(request: &Request) -> bool {
    let header = |name: &str| request.header(name).unwrap_or_default();
    let length = Some(header("content-length")).filter(|length| *length != "0").unwrap_or_default();
    let standard = [
        "content-md5",
        "content-type",
        "date",
        "if-modified-since",
        "if-match",
        "if-none-match",
        "if-unmodified-since",
        "range",
    ];
    let standard: Vec<&str> = standard.iter().map(|name| header(name)).collect();
    let own: String = request
        .headers
        .iter()
        .filter(|(name, _)| name.starts_with("x-ms-"))
        .map(|(name, value)| format!("{name}:{value}\n"))
        .collect();
    let (path, query) = request.target.split_once('?').unwrap_or((&request.target, ""));
    let mut pairs: Vec<String> = url::form_urlencoded::parse(query.as_bytes())
        .map(|(name, value)| format!("\n{}:{value}", name.to_lowercase()))
        .collect();
    pairs.sort();
    let resource = format!("/account{path}{}", pairs.concat());
    let to_sign = format!("{}\n\n\n{length}\n{}\n{own}{resource}", request.method, standard.join("\n"));
    let signature = base64(&hmac(b"canary-secret-az", to_sign.as_bytes()));
    request.header("authorization") == Some(&format!("SharedKey account:{signature}"))
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let group = |part: &[u8]| {
        let bits = (0..3).fold(0_u32, |bits, at| bits << 8 | u32::from(*part.get(at).unwrap_or(&0)));
        (0..4)
            .map(|at| match at <= part.len() {
                true => char::from(DIGITS[(bits >> (18 - 6 * at)) as usize & 63]),
                false => '=',
            })
            .collect::<String>()
    };
    bytes.chunks(3).map(group).collect()
}

type Objects = BTreeMap<String, Vec<u8>>;

fn etag(content: &[u8]) -> String {
    format!("\"{}\"", &digest(content)[..32])
}

/// Returns an object, or the requested range of it, under the conditions that stores support.
fn object(request: &Request, content: &[u8]) -> Reply {
    let etag = etag(content);
    if request.header("if-match").is_some_and(|wanted| wanted != etag) {
        return Reply::status(412);
    }
    Reply::file(request, content, &etag).header("Last-Modified", "Sun, 06 Nov 1994 08:49:37 GMT")
}

/// Returns S3's and Google's list of a bucket.
fn list_xml(request: &Request, objects: &Objects) -> Reply {
    let query = request.target.split_once('?').map_or("", |(_, query)| query);
    let prefix = url::form_urlencoded::parse(query.as_bytes()).find(|(name, _)| name == "prefix");
    let prefix = prefix.map(|(_, value)| value.into_owned()).unwrap_or_default();
    let entries: String = objects
        .iter()
        .filter(|(name, _)| name.starts_with(&prefix))
        .map(|(name, content)| {
            format!(
                "<Contents><Key>{name}</Key><Size>{}</Size><ETag>{}</ETag>\
                 <LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>",
                content.len(),
                etag(content).replace('"', "&quot;")
            )
        })
        .collect();
    Reply::ok(format!(
        "<?xml version=\"1.0\"?><ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
    ))
}

fn s3(objects: Objects) -> Server {
    Server::start(move |_, request| {
        if !is_signed_for_s3(request) {
            return Reply::status(403);
        }
        bucket(request, &objects)
    })
}

fn bucket(request: &Request, objects: &Objects) -> Reply {
    let (path, query) = request.target.split_once('?').unwrap_or((&request.target, ""));
    match path.strip_prefix("/bucket") {
        Some("" | "/") if query.contains("list-type=2") => list_xml(request, objects),
        Some(name) => {
            let decoded = url::form_urlencoded::parse(name.trim_start_matches('/').as_bytes()).next();
            let name = decoded.map(|(name, _)| name.into_owned()).unwrap_or_default();
            objects.get(&name).map_or(Reply::status(404), |content| object(request, content))
        }
        None => Reply::status(404),
    }
}

/// Returns `hone run` of one step on the golden Llama.
fn command(work: &Work, more: &str) -> Command {
    let arguments = format!("run --cache cache --output out {STEPS} {more}");
    work.hone(&arguments.split_whitespace().collect::<Vec<_>>())
}

fn on_s3(work: &Work, server: &Server, more: &str) -> Command {
    let mut command = command(work, more);
    command
        .env("AWS_ENDPOINT_URL", server.url(""))
        .env("AWS_ACCESS_KEY_ID", KEY)
        .env("AWS_REGION", "eu-west-1");
    command.env("AWS_SECRET_ACCESS_KEY", SECRET);
    command
}

fn work() -> Work {
    let work = Work::new();
    work.copy("llama3/model", "model");
    work
}

fn adapter_of_local_data() -> Vec<u8> {
    let work = Work::with_llama();
    done(&mut command(&work, "--model model --name x --data data.parquet"));
    work.read("out/adapter_model.safetensors")
}

/// Data from a pattern and a model from a folder of a bucket: signed, cached, and the same run as with local files.
#[test]
fn a_run_from_a_bucket_is_the_run_of_the_local_files() {
    let mut objects: Objects = [
        ("rows/2024 a/part 1.parquet", rows("messages.parquet")),
        ("rows/2024 a/_SUCCESS", Vec::new()),
        ("rows/2024 a/notes.txt", b"no data".to_vec()),
        ("rows/other.jsonl", b"{}".to_vec()),
    ]
    .into_iter()
    .map(|(name, content)| (name.to_owned(), content))
    .collect();
    for entry in std::fs::read_dir(golden_path("llama3/model")).unwrap().map(|entry| entry.unwrap()) {
        let name = format!("models/tiny/{}", entry.file_name().into_string().unwrap());
        objects.insert(name, std::fs::read(entry.path()).unwrap());
    }
    objects.insert("models/tiny/original/model.safetensors".into(), b"not taken".to_vec());
    let server = s3(objects);
    let expected = adapter_of_local_data();
    for data in ["s3://bucket/rows/*/*.parquet", "s3://bucket/rows/2024%20a/"] {
        let work = Work::new();
        let more = format!("--model s3://bucket/models/tiny --name x --data {data}");
        let ended = done(&mut on_s3(&work, &server, &more));
        assert!(work.read("out/adapter_model.safetensors") == expected, "{data}");
        assert!(!format!("{ended:?}").contains(SECRET));
        // Another run asks whether the data is still the same, and downloads nothing.
        let before = server.requests().len();
        let mut again = on_s3(&work, &server, &more);
        done(again.args(["--set", "TrainingArguments.seed=7", "--set", "earlier_results=move"]));
        let later = &server.requests()[before..];
        assert!(later.iter().any(|request| request.header("if-none-match").is_some()), "{later:?}");
        assert!(!later.iter().any(|request| request.target.ends_with("model.safetensors")), "{later:?}");
    }
}

#[test]
fn a_download_that_was_cut_off_goes_on_under_a_signed_range_and_a_changed_object_begins_anew() {
    let (first, second) = (rows("messages.parquet"), rows("text.parquet"));
    for changes in [false, true] {
        let (asked, changed) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (first, second) = (first.clone(), second.clone());
        let server = Server::start(move |_, request| {
            assert!(is_signed_for_s3(request), "{request:?}");
            match asked.fetch_add(1, Ordering::SeqCst) {
                0 => object(request, &first).cut(1000),
                _ if changes => {
                    changed.store(true, Ordering::SeqCst);
                    object(request, &second)
                }
                _ => object(request, &first),
            }
        });
        let work = work();
        let mut run = on_s3(&work, &server, "--model model --data s3://bucket/rows.parquet");
        done(&mut run);
        let asked = server.requests();
        assert_eq!(asked[1].header("range"), Some("bytes=1000-"), "{asked:?}");
        assert!(asked[1].header("if-match").is_some());
        assert_eq!(asked.len(), if changes { 3 } else { 2 });
    }
}

#[test]
fn azures_shared_key_covers_what_is_asked() {
    let content = rows("messages.parquet");
    let listed = content.len();
    let (cut, whole) = (AtomicBool::new(true), content.clone());
    let server = Server::start(move |_, request| {
        if !is_signed_for_azure(request) {
            return Reply::status(403);
        }
        if request.target.contains("comp=list") {
            return Reply::ok(format!(
                "<?xml version=\"1.0\"?><EnumerationResults><Blobs><Blob><Name>rows/a.parquet</Name><Properties>\
                 <Last-Modified>Sun, 06 Nov 1994 08:49:37 GMT</Last-Modified><Content-Length>{listed}</Content-Length>\
                 <Content-Type>x</Content-Type><Etag>0x1</Etag></Properties></Blob></Blobs><NextMarker/></EnumerationResults>"
            ));
        }
        let reply = object(request, &whole);
        if cut.swap(false, Ordering::SeqCst) { reply.cut(2000) } else { reply }
    });
    let work = work();
    let mut run = command(&work, "--model model --name x --data az://container/rows/");
    run.env("AZURE_STORAGE_ACCOUNT_NAME", "account").env("AZURE_STORAGE_ACCOUNT_KEY", ACCOUNT_KEY);
    done(run.env("AZURE_STORAGE_ENDPOINT", server.url("/account")));
    assert!(work.read("out/adapter_model.safetensors") == adapter_of_local_data());
    let resumed = server.requests().iter().any(|request| request.header("range") == Some("bytes=2000-"));
    assert!(resumed, "{:?}", server.requests());
}

#[test]
fn googles_store_is_read_without_credentials_where_an_emulator_is_named() {
    let objects: Objects = [("rows/a.parquet".to_owned(), rows("messages.parquet"))].into();
    let server = Server::start(move |_, request| bucket(request, &objects));
    let work = work();
    let mut run = command(&work, "--model model --name x --data gs://bucket/rows/a.parquet");
    done(run.env("STORAGE_EMULATOR_HOST", server.url("").trim_start_matches("http://")));
    assert!(work.read("out/adapter_model.safetensors") == adapter_of_local_data());
    assert!(server.requests().iter().all(|request| request.header("authorization").is_none()));
}

#[test]
fn what_a_store_refuses_says_who_must_act() {
    let server = s3([("rows.parquet".to_owned(), rows("messages.parquet"))].into());
    let told = |more: &str, change: &dyn Fn(&mut Command)| {
        let work = work();
        let mut run = on_s3(&work, &server, &format!("--model model {more}"));
        change(&mut run);
        let ended = end(&mut run);
        assert!(!ended.stderr.contains(SECRET), "{}", ended.stderr);
        (ended.code, ended.stderr)
    };
    let (code, text) = told("--data s3://bucket/rows.parquet", &|run| {
        run.env("AWS_SECRET_ACCESS_KEY", "wrong");
    });
    assert!(
        code == Some(13) && text.contains("s3://bucket/rows.parquet: access refused (HTTP 403)"),
        "{text}"
    );
    assert!(text.contains("AWS_SKIP_SIGNATURE=true"), "{text}");
    let (code, text) = told("--data s3://bucket/none.parquet", &|_| {});
    assert!(code == Some(11) && text.contains("no such file (HTTP 404)"), "{text}");
    let (code, text) = told("--data s3://bucket/empty/", &|_| {});
    assert!(
        code == Some(11)
            && text.contains("s3://bucket/empty/: the folder contains no data file: it is empty"),
        "{text}"
    );
    let (code, text) = told("--data s3://user:word@bucket/rows.parquet", &|_| {});
    assert!(
        code == Some(10) && text.contains("credentials and the endpoint belong in the environment"),
        "{text}"
    );
    assert!(!text.contains("word"), "{text}");
}

#[test]
fn a_bucket_of_another_region_is_told_with_it() {
    let server = Server::start(|_, _| Reply::status(301).header("x-amz-bucket-region", "ap-south-1"));
    let work = work();
    let ended = end(&mut on_s3(&work, &server, "--model model --data s3://bucket/rows.parquet"));
    assert_eq!(ended.code, Some(10), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("the bucket is in region ap-south-1")
            && ended.stderr.contains("set AWS_REGION")
    );
}

/// A pod's identity: the token from a local address signs the requests, and one token serves all of them.
#[test]
fn the_identity_of_a_pod_signs() {
    let content = rows("messages.parquet");
    let server = Server::start(move |_, request| match request.target.as_str() {
        "/identity" => Reply::ok(format!(
            r#"{{"AccessKeyId": "{KEY}", "SecretAccessKey": "{SECRET}", "Token": "session", "Expiration": "2099-01-01T00:00:00Z"}}"#
        )),
        _ if is_signed_for_s3(request) && request.header("x-amz-security-token") == Some("session") => {
            object(request, &content)
        }
        _ => Reply::status(403),
    });
    let work = work();
    work.write("identity", "pod-token");
    let mut run =
        on_s3(&work, &server, "--model model --data s3://bucket/a.parquet --data s3://bucket/b.parquet");
    run.env_remove("AWS_ACCESS_KEY_ID").env_remove("AWS_SECRET_ACCESS_KEY");
    run.env("AWS_CONTAINER_CREDENTIALS_FULL_URI", server.url("/identity"));
    done(run.env("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", work.path("identity")));
    let asked: Vec<String> = server.requests().iter().map(|request| request.target.clone()).collect();
    assert_eq!(asked, ["/identity", "/bucket/a.parquet", "/bucket/b.parquet"]);
    assert_eq!(server.requests()[0].header("authorization"), Some("pod-token"));
}

// ---- the hub's datasets

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

fn hub(revisions: BTreeMap<&'static str, Objects>) -> Server {
    Server::start(move |_, request| {
        let path = request.target.split('?').next().unwrap().replace("%2F", "/");
        if let Some(revision) = path.strip_prefix("/api/datasets/org/rows/revision/") {
            let Some(files) = revisions.get(revision) else { return Reply::status(404) };
            let sibling = |(name, content): (&String, &Vec<u8>)| {
                serde_json::json!({"rfilename": name, "size": content.len(),
                    "lfs": {"sha256": digest(content), "size": content.len()}})
            };
            let siblings: Vec<_> = files.iter().map(sibling).collect();
            return Reply::ok(serde_json::json!({"sha": COMMIT, "siblings": siblings}).to_string());
        }
        let name = path.strip_prefix(&format!("/datasets/org/rows/resolve/{COMMIT}/"));
        let found = name.and_then(|name| revisions.values().find_map(|files| files.get(name)));
        found.map_or(Reply::status(404), |content| Reply::file(request, content, &etag(content)))
    })
}

fn files(list: &[(&str, &str)]) -> Objects {
    list.iter().map(|(name, golden)| ((*name).to_owned(), rows(golden))).collect()
}

fn from_hub(server: &Server, data: &str) -> (Option<i32>, String, Vec<String>) {
    let work = work();
    let before = server.requests().len();
    let mut run = command(&work, &format!("--model model --name x --data {data}"));
    let ended = end(run.env("HF_ENDPOINT", server.url("")));
    let asked = server.requests().into_iter().skip(before).map(|request| request.target.clone());
    let asked = asked
        .filter_map(|target| Some(target.split_once("/resolve/")?.1[COMMIT.len() + 1..].to_owned()))
        .collect();
    (ended.code, ended.stderr, asked)
}

#[test]
fn a_dataset_of_the_hub_is_its_conversion_at_one_commit() {
    let converted = files(&[
        ("default/test/0000.parquet", "text.parquet"),
        ("default/train/0000.parquet", "messages.parquet"),
        ("other/train/0000.parquet", "text.parquet"),
    ]);
    let mut own = files(&[("data/train.jsonl", "messages.jsonl"), ("data/test.jsonl", "messages.jsonl")]);
    own.get_mut("data/test.jsonl").unwrap().push(b'\n'); // another digest
    let server =
        hub([("refs/convert/parquet", converted), ("main", own.clone()), ("v1", own.clone())].into());
    let taken = |data: &str| {
        let (code, text, asked) = from_hub(&server, data);
        assert_eq!(code, Some(0), "{data}: {text}");
        asked.join(" ")
    };
    assert_eq!(taken("hf://datasets/org/rows"), "default/train/0000.parquet");
    assert_eq!(taken("hf://datasets/org/rows?config=other"), "other/train/0000.parquet");
    assert_eq!(taken("hf://datasets/org/rows?split=test"), "default/test/0000.parquet");
    assert_eq!(taken("hf://datasets/org/rows@v1"), "data/train.jsonl");
    assert_eq!(taken("hf://datasets/org/rows/data/test.jsonl"), "data/test.jsonl");
    assert_eq!(taken("hf://datasets/org/rows@v1/data/t*.jsonl"), "data/test.jsonl data/train.jsonl");
    for (data, code, words) in [
        ("hf://datasets/org/rows?split=none", 10, "; there are test, train"),
        ("hf://datasets/org/rows@v9", 10, "the hub does not know it"),
        ("hf://datasets/org/rows/none/", 11, "the dataset has no such file or folder"),
    ] {
        let (found, text, _) = from_hub(&server, data);
        assert!(found == Some(code) && text.contains(words), "{data}: {text}");
    }
    let partial = files(&[("default/partial-train/0000.parquet", "messages.parquet")]);
    let server = hub([("refs/convert/parquet", partial), ("main", own)].into());
    let (code, text, asked) = from_hub(&server, "hf://datasets/org/rows");
    assert!(code == Some(0) && asked == ["data/train.jsonl"], "{text}");
    assert!(text.contains("the hub converted only a part"), "{text}");
}

/// An adapter is written below a folder of a bucket, with a signature over what is sent.
#[test]
fn an_adapter_is_pushed_to_a_bucket() {
    let taken = Arc::new(std::sync::Mutex::new(Objects::new()));
    let written = taken.clone();
    let server = Server::start(move |index, request| {
        if !is_signed_for_s3(request)
            || request.header("x-amz-content-sha256") != Some(&digest(&request.body))
        {
            return Reply::status(403);
        }
        assert_eq!(request.method, "PUT");
        if index == 1 {
            return Reply::status(500);
        }
        let name = request.target.strip_prefix("/bucket/").unwrap().to_owned();
        let reply = Reply::status(200).header("ETag", etag(&request.body));
        written.lock().unwrap().insert(name, request.body.clone());
        reply
    });
    let work = Work::with_llama();
    let ended =
        done(&mut on_s3(&work, &server, "--model model --data data.parquet --push s3://bucket/runs/a"));
    let names = ["README.md", "adapter_config.json", "adapter_model.safetensors"];
    let taken = taken.lock().unwrap();
    assert_eq!(taken.keys().cloned().collect::<Vec<_>>(), names.map(|name| format!("runs/a/{name}")));
    for name in names {
        assert!(taken[&format!("runs/a/{name}")] == work.read(&format!("out/{name}")), "{name}");
    }
    let last = server.requests().last().unwrap().target.clone();
    assert_eq!(last, "/bucket/runs/a/adapter_config.json", "where it is, the adapter is whole");
    assert!(!format!("{ended:?}").contains(SECRET));
    assert_eq!(work.json("out/hone.json")["published"][0]["destination"], "s3://bucket/runs/a");

    let mut wrong = on_s3(&work, &server, "--model model --data data.parquet --push s3://bucket/runs/a");
    let ended = end(wrong.env("AWS_SECRET_ACCESS_KEY", "another"));
    assert_eq!(ended.code, Some(13), "{}", ended.stderr);
}
