//! The promises of `source`: whole files, or a fault that says who must act, for every behaviour of the server.

#[path = "support/alone.rs"]
mod alone;
#[path = "support/http.rs"]
mod http;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hone::fault::{Fault, Kind};
use hone::report::{Event, Progress, Report, Sink};
use hone::source::call::{Call, Caller};
use hone::source::send::{Content, Sender, Sending};
use hone::source::{self, File, Options, Source, Speed};
use sha2::{Digest, Sha256};

use http::{Reply, Request, Server};

/// A secret in a URL's query and user part. It must appear nowhere.
const CANARY: &str = "canary-7f3a";
const TAG: &str = "\"v1\"";

/// A cache, a report, and options that are fast enough for tests.
struct Desk {
    folder: tempfile::TempDir,
    options: Options,
    log: Arc<Log>,
}

impl Desk {
    fn new() -> Desk {
        let folder = tempfile::tempdir().unwrap();
        let options = Options {
            cache: folder.path().join("cache"),
            connect_timeout: Duration::from_secs(5),
            read_timeout: Duration::from_secs(5),
            speed: Speed::LEAST,
            total_timeout: Duration::from_secs(60),
            attempts_max: 3,
            backoff: Duration::from_millis(2),
            file_bytes_max: 10 << 20,
            endings: hone::dataset::ENDINGS,
            ca_file: None,
        };
        Desk { folder, options, log: Arc::default() }
    }

    fn fetch_all(&self, sources: &[String]) -> Result<Vec<File>, Fault> {
        let sources: Vec<Source> = sources.iter().map(|text| Source::parse(text).unwrap()).collect();
        let fetched = source::fetch(&sources, &self.options, &Report::new(self.log.clone()));
        self.check_invariants(&fetched);
        fetched
    }

    fn fetch(&self, source: &str) -> Result<File, Fault> {
        self.fetch_all(&[source.to_owned()]).map(|mut files| files.remove(0))
    }

    /// Fetches, and expects exactly these bytes.
    fn expect(&self, source: &str, content: &[u8]) -> File {
        let file = self.fetch(source).unwrap_or_else(|fault| panic!("{fault}\n{}", self.log.text()));
        assert!(fs::read(&file.path).unwrap() == content, "other bytes");
        assert_eq!((file.bytes, file.sha256.as_str()), (content.len() as u64, digest(content).as_str()));
        file
    }

    /// Fetches, and expects a fault of this kind that contains `words`.
    fn refuse(&self, source: &str, kind: Kind, words: &str) -> Fault {
        let fault = self.fetch(source).expect_err("must fail");
        assert_eq!(fault.kind, kind, "{fault}");
        assert!(fault.to_string().contains(words), "`{words}` is not in: {fault}");
        fault
    }

    /// Checks that final names hold whole content and that the canary is nowhere.
    fn check_invariants(&self, fetched: &Result<Vec<File>, Fault>) {
        for path in files_below(&self.options.cache.join("sha256")) {
            let content = fs::read(&path).unwrap();
            assert_eq!(path.file_name().unwrap().to_str().unwrap(), digest(&content));
        }
        for path in files_below(&self.options.cache) {
            let content = String::from_utf8_lossy(&fs::read(&path).unwrap()).into_owned();
            assert!(!content.contains(CANARY) && !path.to_string_lossy().contains(CANARY), "{path:?}");
        }
        let told = format!("{fetched:?}{}", self.log.text());
        assert!(!told.contains(CANARY), "{told}");
    }
}

#[derive(Default)]
struct Log(Mutex<Vec<String>>);

impl Log {
    fn text(&self) -> String {
        self.0.lock().unwrap().join("\n")
    }
}

impl Sink for Log {
    fn event(&self, event: &Event) {
        self.0.lock().unwrap().push(format!("{event:?}"));
    }
    fn progress(&self, progress: &Progress) {
        self.0.lock().unwrap().push(format!("{progress:?}"));
    }
}

fn digest(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Returns 300 kB that look like parquet from outside, which is more than socket buffers pass in one read.
fn content() -> Vec<u8> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    b"PAR1".iter().copied().chain(std::iter::repeat_with(&mut next).take(300_000)).collect()
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}

/// Returns the address of `file.parquet` on a server that follows `script`, and the server.
fn served(script: impl Fn(usize, &Request) -> Reply + Send + Sync + 'static) -> (Server, String) {
    let server = Server::start(script);
    let url = server.url("/file.parquet");
    (server, url)
}

fn ranges(server: &Server) -> Vec<Option<usize>> {
    server.requests().iter().map(Request::range_start).collect()
}

// Servers that behave.

#[test]
fn a_plain_download() {
    let (server, url) = served(|_, _| Reply::ok(content()));
    let desk = Desk::new();
    let file = desk.expect(&url, &content());
    assert_eq!(file.name, url);
    let requests = server.requests();
    assert_eq!(requests.len(), 1);
    assert_eq!(requests[0].method, "GET");
    assert_eq!(requests[0].header("accept-encoding"), Some("identity"));
    assert!(requests[0].header("user-agent").unwrap().starts_with("hone/"));
    assert_eq!(requests[0].range_start(), None);
    assert!(desk.log.text().contains("downloaded"), "{}", desk.log.text());
}

#[test]
fn an_unknown_length_is_fine() {
    let (_server, url) = served(|_, _| Reply::ok(content()).without("Content-Length"));
    Desk::new().expect(&url, &content());
}

#[test]
fn progress_ends_at_the_total() {
    let (_server, url) = served(|_, _| Reply::ok(content()));
    let desk = Desk::new();
    desk.expect(&url, &content());
    let total = content().len();
    let text = desk.log.text();
    assert!(text.contains(&format!("done: {total}, total: Some({total}), finished: true")), "{text}");
}

#[test]
fn same_basename_same_file_and_order_are_kept() {
    let server = Server::files(
        [("/a/train.parquet", "PAR1 a"), ("/b/train.parquet", "PAR1 b")]
            .map(|(path, content)| (path.to_owned(), content.as_bytes().to_vec()))
            .into(),
    );
    let desk = Desk::new();
    let urls = ["/b/train.parquet", "/a/train.parquet", "/b/train.parquet"].map(|path| server.url(path));
    let files = desk.fetch_all(&urls).unwrap();
    let contents: Vec<String> = files.iter().map(|file| fs::read_to_string(&file.path).unwrap()).collect();
    assert_eq!(contents, ["PAR1 b", "PAR1 a", "PAR1 b"]);
    assert_eq!(files.iter().map(|file| file.name.as_str()).collect::<Vec<_>>(), urls);
}

// Bodies that stop, and servers that change their content.

#[test]
fn a_cut_body_is_resumed_where_it_stopped() {
    let (server, url) = served(|index, request| match index {
        0 => Reply::file(request, &content(), TAG).cut(100_000),
        _ => Reply::file(request, &content(), TAG),
    });
    Desk::new().expect(&url, &content());
    assert_eq!(ranges(&server), [None, Some(100_000)]);
    assert_eq!(server.requests()[1].header("if-range"), Some(TAG));
}

/// No byte is there that a range could follow.
#[test]
fn a_body_that_never_began_is_asked_for_whole() {
    let (server, url) = served(|index, request| match index {
        0 => Reply::file(request, &content(), TAG).cut(0),
        _ => Reply::file(request, &content(), TAG),
    });
    Desk::new().expect(&url, &content());
    assert_eq!(ranges(&server), [None, None]);
}

#[test]
fn the_next_process_resumes_too() {
    let (server, url) = served(|index, request| match index {
        0 => Reply::file(request, &content(), TAG).cut(100_000),
        1..=3 => Reply::status(503),
        _ => Reply::file(request, &content(), TAG),
    });
    let desk = Desk::new();
    desk.refuse(&url, Kind::Network, "503");
    desk.expect(&url, &content());
    assert_eq!(ranges(&server).last(), Some(&Some(100_000)));
}

#[test]
fn progress_resets_the_count_of_attempts() {
    let (server, url) = served(|_, request| Reply::file(request, &content(), TAG).cut(50_000));
    Desk::new().expect(&url, &content());
    assert_eq!(server.requests().len(), 7, "more than attempts_max, each of them 50 kB further");
}

#[test]
fn a_reset_connection_is_resumed() {
    let (server, url) = served(|index, request| match index {
        0 => Reply::file(request, &content(), TAG).cut(100_000).reset(),
        _ => Reply::file(request, &content(), TAG),
    });
    Desk::new().expect(&url, &content());
    let requests = server.requests();
    assert_eq!(requests.len(), 2);
    assert!(requests[1].range_start().is_none_or(|start| start <= 100_000));
}

#[test]
fn without_a_strong_validator_it_starts_over() {
    for tag in ["W/\"v1\"", ""] {
        let (server, url) = served(move |index, _| {
            let reply = Reply::ok(content()).header("ETag", tag);
            if index == 0 { reply.cut(100_000) } else { reply }
        });
        Desk::new().expect(&url, &content());
        assert_eq!(ranges(&server), [None, None]);
    }
}

#[test]
fn an_old_last_modified_guards_a_range() {
    const MODIFIED: &str = "Sun, 06 Nov 1994 08:49:37 GMT";
    let (server, url) = served(|index, request| {
        let reply = match request.range_start() {
            None => Reply::ok(content()),
            Some(start) => Reply::status(206)
                .body(&content()[start..])
                .header("Content-Range", format!("bytes {start}-{}/*", content().len() - 1)),
        };
        let reply = reply.header("Last-Modified", MODIFIED).header("Date", "Sun, 06 Nov 1994 09:00:00 GMT");
        if index == 0 { reply.cut(100_000) } else { reply }
    });
    Desk::new().expect(&url, &content());
    assert_eq!(server.requests()[1].header("if-range"), Some(MODIFIED));
    assert_eq!(ranges(&server), [None, Some(100_000)]);
}

#[test]
fn a_server_that_ignores_range_sends_everything_again() {
    let (server, url) = served(|index, _| {
        let reply = Reply::ok(content()).header("ETag", TAG);
        if index == 0 { reply.cut(100_000) } else { reply }
    });
    Desk::new().expect(&url, &content());
    assert_eq!(ranges(&server), [None, Some(100_000)]);
}

#[test]
fn a_file_that_changed_in_between_is_never_mixed() {
    // The second server ignores If-Range and sends the tail of another version.
    for obeys in [true, false] {
        let (_server, url) = served(move |index, request| {
            let new: Vec<u8> = content().iter().map(|byte| byte.wrapping_add(1)).collect();
            match (index, obeys, request.range_start()) {
                (0, ..) => Reply::file(request, &content(), TAG).cut(100_000),
                (_, false, Some(start)) => Reply::status(206)
                    .body(&new[start..])
                    .header("ETag", "\"v2\"")
                    .header("Content-Range", format!("bytes {start}-{}/{}", new.len() - 1, new.len())),
                _ => Reply::file(request, &new, "\"v2\""),
            }
        });
        let new: Vec<u8> = content().iter().map(|byte| byte.wrapping_add(1)).collect();
        Desk::new().expect(&url, &new);
    }
}

#[test]
fn a_wrong_or_missing_content_range_is_not_appended() {
    let total = content().len();
    for wrong in [
        format!("bytes 0-{}/{total}", total - 1),
        format!("bytes 99999-{}/{total}", total - 1),
        format!("bytes 100000-{}/{}", total - 1, total + 1),
        format!("bytes 100000-{}/{total}", total - 2),
        "nonsense".to_owned(),
        String::new(),
    ] {
        let (server, url) = served(move |index, request| match index {
            0 => Reply::file(request, &content(), TAG).cut(100_000),
            1 => Reply::file(request, &content(), TAG).header("Content-Range", wrong.clone()),
            _ => Reply::file(request, &content(), TAG),
        });
        Desk::new().expect(&url, &content());
        assert_eq!(ranges(&server), [None, Some(100_000), None]);
    }
}

/// A body without a length of its own may end too early or too late for the range that its header promises.
#[test]
fn a_range_whose_body_is_shorter_or_longer_than_promised_is_noticed() {
    let total = content().len();
    for (end, more, asked) in [(100_010, &b""[..], Some(100_010)), (total, b"PAR1", None)] {
        let (server, url) = served(move |index, request| match index {
            0 => Reply::file(request, &content(), TAG).cut(100_000),
            1 => Reply::status(206)
                .body([&content()[100_000..end], more].concat())
                .without("Content-Length")
                .header("ETag", TAG)
                .header("Content-Range", format!("bytes 100000-{}/{total}", total - 1)),
            _ => Reply::file(request, &content(), TAG),
        });
        Desk::new().expect(&url, &content());
        assert_eq!(ranges(&server), [None, Some(100_000), asked]);
    }
}

#[test]
fn an_unsatisfiable_range_starts_over() {
    let (server, url) = served(|index, request| match index {
        0 => Reply::file(request, &content(), TAG).cut(100_000),
        1 => Reply::status(416),
        _ => Reply::file(request, &content(), TAG),
    });
    Desk::new().expect(&url, &content());
    assert_eq!(ranges(&server), [None, Some(100_000), None]);
}

#[test]
fn a_part_nobody_asked_for_is_refused() {
    let (_server, url) =
        served(|_, _| Reply::status(206).body("PAR1").header("Content-Range", "bytes 0-3/9"));
    Desk::new().refuse(&url, Kind::Data, "part of the file");
}

#[test]
fn bytes_damaged_in_the_partial_file_are_found_by_the_digest() {
    let (server, url) = served(|index, request| match index {
        0 => Reply::file(request, &content(), TAG).cut(100_000),
        1..=3 => Reply::status(500),
        _ => Reply::file(request, &content(), TAG),
    });
    let desk = Desk::new();
    let url = format!("{url}#sha256={}", digest(&content()));
    desk.refuse(&url, Kind::Network, "500");
    let part = files_below(&desk.options.cache).into_iter().find(|path| path.ends_with("part")).unwrap();
    let mut damaged = fs::read(&part).unwrap();
    assert_eq!(damaged.len(), 100_000);
    damaged[50_000] ^= 1;
    fs::write(&part, damaged).unwrap();
    desk.expect(&url, &content());
    assert_eq!(ranges(&server)[4..], [Some(100_000), None]);
}

#[test]
fn digests_that_servers_state_are_compared_without_being_asked_for() {
    let stated = format!("sha-256=:{}:", STANDARD.encode(Sha256::digest(content())));
    let good = stated.clone();
    let (_server, url) = served(move |_, _| Reply::ok(content()).header("Repr-Digest", good.clone()));
    let desk = Desk::new();
    desk.expect(&url, &content());
    assert!(desk.log.text().contains("checked by the server's SHA-256"), "{}", desk.log.text());

    let (server, url) = served(move |index, _| {
        let mut body = content();
        body[7] ^= u8::from(index == 0);
        Reply::ok(body).header("Repr-Digest", stated.clone())
    });
    Desk::new().expect(&url, &content());
    assert_eq!(server.requests().len(), 2, "the damaged one is downloaded again");

    let (server, url) = served(|_, _| Reply::ok(content()).header("Content-MD5", "JfnnlDI7RTiF9RgfG2JNCw=="));
    Desk::new().refuse(&url, Kind::Network, "both times its MD5 is not the one that the server states");
    assert_eq!(server.requests().len(), 2);
    // A digest identifies the bytes.
    Desk::new().expect(&format!("{url}#sha256={}", digest(&content())), &content());
}

// Responses that are not the file.

#[test]
fn busy_servers_are_asked_again() {
    for (status, retry_after) in
        [(503, "0"), (503, "Sun, 06 Nov 1994 08:49:37 GMT"), (429, "soon"), (408, ""), (500, ""), (425, "-5")]
    {
        let (server, url) = served(move |index, _| match index {
            0 => Reply::status(status).header("Retry-After", retry_after),
            _ => Reply::ok(content()),
        });
        Desk::new().expect(&url, &content());
        assert_eq!(server.requests().len(), 2, "{status}");
    }
}

#[test]
fn a_wait_longer_than_the_time_allowed_is_not_begun() {
    let (server, url) = served(|_, _| Reply::status(429).header("Retry-After", "1000000000"));
    let fault = Desk::new().refuse(&url, Kind::Network, "gave up at attempt 1");
    assert!(fault.message.contains("429") && fault.message.contains("60s allowed"), "{fault}");
    assert_eq!(server.requests().len(), 1);
}

#[test]
fn attempts_end_and_the_last_cause_is_told() {
    let (server, url) = served(|_, _| Reply::status(502));
    Desk::new().refuse(&url, Kind::Network, "gave up at attempt 3: the server answered HTTP 502");
    assert_eq!(server.requests().len(), 3);
}

#[test]
fn final_answers_are_not_asked_again() {
    for (status, kind, words) in [
        (404, Kind::Data, "no such file (HTTP 404)"),
        (410, Kind::Data, "no such file (HTTP 410)"),
        (401, Kind::Auth, "requires credentials"),
        (403, Kind::Auth, "requires credentials"),
        (407, Kind::Config, "proxy"),
        (400, Kind::Data, "HTTP 400"),
        (304, Kind::Data, "HTTP 304"),
        (204, Kind::Data, "HTTP 204"),
    ] {
        let (server, url) = served(move |_, _| Reply::status(status).without("Content-Length"));
        Desk::new().refuse(&url, kind, words);
        assert_eq!(server.requests().len(), 1, "{status}");
    }
}

#[test]
fn an_expired_signature_is_suspected() {
    let (_server, url) = served(|_, _| Reply::status(403));
    Desk::new().refuse(&format!("{url}?sig={CANARY}"), Kind::Auth, "sign a new one");
    let (_server, url) = served(|index, request| match index {
        0 => Reply::file(request, &content(), TAG).cut(100_000),
        _ => Reply::status(403),
    });
    Desk::new().refuse(&url, Kind::Auth, "sign a new one");
}

#[test]
fn a_web_page_is_not_data() {
    const PAGE: &str = "\n<!DOCTYPE html><html><head><title>Sign in \x1b[2J to hub</title>";
    let (_server, url) = served(|_, _| Reply::ok(PAGE));
    let desk = Desk::new();
    let fault =
        desk.refuse(&url, Kind::Data, "HTML page (title: Sign in [2J to hub), expected a parquet file");
    assert!(fault.help.unwrap().contains("raw/resolve"));

    let server = Server::start(|_, _| Reply::ok(PAGE).header("Content-Type", "text/html; charset=utf-8"));
    desk.refuse(&server.url("/download"), Kind::Data, "expected a data file");
    // A server may declare data as a page, and a page may be what a user wants from elsewhere.
    let server = Server::start(|_, _| Reply::ok("PAR1").header("Content-Type", "text/html"));
    desk.expect(&server.url("/download"), b"PAR1");
    let server = Server::start(|_, _| Reply::ok(PAGE));
    desk.expect(&server.url("/page"), PAGE.as_bytes());
}

#[test]
fn compressed_answers_are_refused() {
    let (_server, url) = served(|_, _| Reply::ok(content()).header("Content-Encoding", "gzip"));
    Desk::new().refuse(&url, Kind::Data, "Content-Encoding `gzip`");
}

// Digests.

#[test]
fn the_right_digest_is_accepted_in_either_case() {
    let (_server, url) = served(|_, _| Reply::ok(content()));
    Desk::new().expect(&format!("{url}#sha256={}", digest(&content()).to_uppercase()), &content());
}

#[test]
fn a_wrong_digest_gets_one_more_download() {
    let (server, url) = served(|_, request| Reply::file(request, &content(), TAG));
    let mut desk = Desk::new();
    desk.options.attempts_max = 1;
    let wrong = digest(b"other");
    let fault = desk.refuse(&format!("{url}#sha256={wrong}"), Kind::Data, &wrong);
    assert!(fault.message.contains(&digest(&content())), "{fault}");
    assert_eq!(ranges(&server), [None, None]);
    assert!(files_below(&desk.options.cache.join("sha256")).is_empty());
}

#[test]
fn damage_on_the_way_is_repaired_by_a_second_download() {
    let (server, url) = served(|index, request| {
        let mut body = content();
        body[1000] ^= (index == 0) as u8;
        Reply::file(request, &body, TAG)
    });
    Desk::new().expect(&format!("{url}#sha256={}", digest(&content())), &content());
    assert_eq!(ranges(&server), [None, None]);
}

// Limits.

#[test]
fn too_large_is_known_from_the_length_or_while_it_comes() {
    let mut desk = Desk::new();
    desk.options.file_bytes_max = 200_000;
    let (_server, url) = served(|_, _| Reply::ok(content()));
    desk.refuse(&url, Kind::Capacity, "at least 300004 bytes, the limit for one file is 200000");
    let (_server, url) = served(|_, _| Reply::ok(content()).without("Content-Length"));
    desk.refuse(&url, Kind::Capacity, "the limit for one file is 200000");
    desk.options.file_bytes_max = content().len() as u64;
    desk.expect(&url, &content());
}

#[test]
fn an_endless_body_is_cut() {
    let (server, url) = served(|_, _| Reply::ok(content()).without("Content-Length").repeat());
    let mut desk = Desk::new();
    desk.options.file_bytes_max = 1_000_000;
    desk.refuse(&url, Kind::Capacity, "the limit for one file is 1000000");
    assert_eq!(server.requests().len(), 1);
    let kept: u64 = files_below(&desk.options.cache).iter().map(|path| path.metadata().unwrap().len()).sum();
    assert!(kept < 1000, "nothing of it stays: {kept} bytes");
}

#[test]
fn a_disk_too_small_is_known_before_the_download() {
    let (server, url) = served(|_, _| Reply::ok("PAR1").header("Content-Length", (1u64 << 60).to_string()));
    let mut desk = Desk::new();
    desk.options.file_bytes_max = u64::MAX;
    desk.refuse(&url, Kind::Capacity, "1.0 EiB more are needed");
    assert_eq!(server.requests().len(), 1);
}

#[test]
fn silence_is_bounded() {
    let (server, url) = served(|index, request| match index {
        0 => Reply::file(request, &content(), TAG).cut(100_000).stall(),
        _ => Reply::file(request, &content(), TAG),
    });
    let mut desk = Desk::new();
    desk.options.read_timeout = Duration::from_millis(100);
    desk.expect(&url, &content());
    assert_eq!(ranges(&server), [None, Some(100_000)]);
    assert!(desk.log.text().contains("no data from the server for 100ms"), "{}", desk.log.text());
}

#[test]
fn the_time_for_one_file_is_bounded() {
    let (_server, url) = served(|_, request| Reply::file(request, &content(), TAG).cut(100_000).stall());
    let mut desk = Desk::new();
    desk.options.total_timeout = Duration::from_millis(150);
    desk.refuse(&url, Kind::Network, "not complete after the 150ms allowed for one file");
}

// Connections to the server.

#[test]
fn redirects_are_followed_and_do_not_carry_the_query() {
    let target = Server::start(|_, _| Reply::ok(content()));
    let location = target.url("/signed?x=1");
    let (server, url) = served(move |_, _| Reply::redirect(location.clone()));
    let desk = Desk::new();
    let file = desk.expect(&format!("{url}?sig={CANARY}"), &content());
    assert_eq!(file.name, url);
    assert_eq!(server.requests()[0].target, format!("/file.parquet?sig={CANARY}"));
    assert_eq!(target.requests()[0].target, "/signed?x=1");
    assert_eq!(target.requests()[0].header("referer"), None);
}

#[test]
fn ten_redirects_are_followed_and_no_more() {
    let hops = |count: usize| {
        served(move |index, _| match index < count {
            true => Reply::redirect(format!("/{index}")),
            false => Reply::ok(content()),
        })
    };
    let (_server, url) = hops(10);
    Desk::new().expect(&url, &content());
    let (server, url) = hops(usize::MAX);
    Desk::new().refuse(&url, Kind::Config, "more than 10 times");
    assert_eq!(server.requests().len(), 11);
}

#[test]
fn redirects_to_link_local_addresses_are_refused() {
    if !alone::is_alone("redirects_to_link_local_addresses_are_refused") {
        return;
    }
    for to in ["http://169.254.169.254/latest/", "http://[::ffff:a9fe:a9fe]/", "http://2852039166/"] {
        let (server, url) = served(move |_, _| Reply::redirect(to));
        Desk::new().refuse(&url, Kind::Config, "link-local");
        assert_eq!(server.requests().len(), 1);
    }
}

/// Services of trackers, uploads, and the hub's own address.
#[test]
fn no_service_is_a_metadata_service() {
    if !alone::is_alone("no_service_is_a_metadata_service") {
        return;
    }
    let desk = Desk::new();
    let (caller, sender) = (Caller::new(None).unwrap(), Sender::new(&desk.options).unwrap());
    for host in ["169.254.169.254", "[fd00:ec2::254]", "[::ffff:a9fe:a9fe]", "metadata.google.internal"] {
        let text = format!("http://{host}/latest?token={CANARY}");
        let call = Call { method: "POST", url: &text, content_type: "a/b", headers: &[], body: Vec::new() };
        let why = caller.call(&call).unwrap_err();
        assert!(why.contains("which hone refuses") && !why.contains(CANARY), "{why}");
        let url = url::Url::parse(&text).unwrap();
        let body = Content::Bytes(Vec::new());
        let sending =
            Sending { method: reqwest::Method::PUT, url: &url, name: "it", headers: Vec::new(), body };
        let fault = sender.send(&sending, &Report::silent()).unwrap_err();
        assert!(fault.kind == Kind::Config && fault.message.contains("which hone refuses"), "{fault}");
    }
}

/// Returns the answer to a part of a file that is sent with PUT.
fn send(desk: &Desk, url: &str, file: &Path, from: u64, bytes: u64) -> Result<source::send::Answer, Fault> {
    let report = Report::new(desk.log.clone());
    let task = Arc::new(report.task(hone::report::Stage::Push, hone::report::Unit::Bytes, "it", None));
    let url = url::Url::parse(url).unwrap();
    let body = Content::Part { file, from, bytes, task };
    let sending = Sending { method: reqwest::Method::PUT, url: &url, name: "it", headers: Vec::new(), body };
    Sender::new(&desk.options).unwrap().send(&sending, &report)
}

#[test]
fn what_is_sent_arrives_whole_and_what_passes_is_repeated() {
    let desk = Desk::new();
    let file = desk.folder.path().join("file");
    fs::write(&file, content()).unwrap();
    for passing in [408, 425, 429, 500, 502, 599] {
        let (server, url) = served(move |index, _| match index {
            0..=1 => Reply::status(passing),
            _ => Reply::status(201).body("made").header("ETag", TAG),
        });
        let answer = send(&desk, &url, &file, 100, 299_000).unwrap();
        assert!(answer.is_success() && answer.body == b"made" && answer.told() == "HTTP 201: made");
        assert_eq!(answer.etag.as_deref(), Some(TAG));
        assert_eq!(server.requests().len(), 3, "{passing}");
        for request in server.requests() {
            assert!(request.method == "PUT" && request.body == content()[100..299_100], "{passing}");
        }
        assert!(desk.log.text().contains(&format!("it: HTTP {passing}")), "{}", desk.log.text());
    }
    for lasting in [400, 403, 404, 409, 501] {
        let (server, url) = served(move |_, _| Reply::status(lasting));
        let answer = send(&desk, &url, &file, 0, 0).unwrap();
        assert_eq!((answer.is_success(), answer.told()), (false, format!("HTTP {lasting}")));
        assert_eq!(server.requests().len(), 1, "{lasting}");
    }
}

#[test]
fn sending_ends_after_its_attempts_and_a_file_that_got_shorter_is_not_sent() {
    let desk = Desk::new();
    let file = desk.folder.path().join("file");
    fs::write(&file, content()).unwrap();
    let (server, url) = served(|_, _| Reply::status(503).body("busy").header("Retry-After", "0"));
    let fault = send(&desk, &url, &file, 0, 10).unwrap_err();
    assert_eq!(fault.kind, Kind::Push);
    assert!(fault.message.starts_with("it: no success in 3 attempts: HTTP 503: busy"), "{fault}");
    assert_eq!(server.requests().len(), 3);
    let fault = send(&desk, &url, &file, content().len() as u64 - 5, 10).unwrap_err();
    assert_eq!(fault.kind, Kind::Push, "{fault}");
    let (server, url) = served(|_, _| Reply::ok(vec![b'a'; 16 << 20]));
    assert_eq!(send(&desk, &url, &file, 0, 10).unwrap().body.len(), 16 << 20, "as long as an answer may be");
    assert_eq!(server.requests().len(), 1);
    let (_server, url) = served(|_, _| Reply::ok(vec![b'a'; (16 << 20) + 1]));
    assert!(send(&desk, &url, &file, 0, 10).unwrap_err().message.contains("more than 16777216 bytes"));
}

#[test]
fn https_needs_a_trusted_certificate_for_the_host() {
    let server = Server::start_tls(|_, _| Reply::ok(content()));
    let url = server.url("/file.parquet");
    let mut desk = Desk::new();
    let fault = desk.refuse(&url, Kind::Config, "not trusted");
    assert!(fault.help.unwrap().contains("ca_file"));
    assert!(server.requests().is_empty());

    desk.options.ca_file = Some(http::authority());
    desk.expect(&url, &content());
    let fault = desk.refuse(&url.replace("localhost", "127.0.0.1"), Kind::Config, "not trusted");
    assert!(fault.help.unwrap().contains("host name the certificate was made for"));
}

#[test]
fn a_self_signed_server_is_trusted_where_its_very_certificate_was_given() {
    let server = Server::start_self_signed(|_, _| Reply::ok(content()));
    let url = server.url("/file.parquet");
    let mut desk = Desk::new();
    desk.refuse(&url, Kind::Config, "not trusted");
    for other in ["authority", "server", "self-signed-expired"] {
        desk.options.ca_file = Some(http::certificate(other));
        desk.refuse(&url, Kind::Config, "not trusted");
    }
    desk.options.ca_file = Some(http::certificate("self-signed"));
    desk.refuse(&url.replace("localhost", "127.0.0.1"), Kind::Config, "not trusted");
    assert!(server.requests().is_empty());
    desk.expect(&url, &content());

    let expired = Server::start_expired(|_, _| Reply::ok(content()));
    desk.options.ca_file = Some(http::certificate("self-signed-expired"));
    desk.refuse(&expired.url("/file.parquet"), Kind::Config, "expired");
    assert!(expired.requests().is_empty());
}

#[test]
fn a_redirect_from_https_to_http_is_refused() {
    let plain = Server::start(|_, _| Reply::ok(content()));
    let location = plain.url("/file.parquet");
    let server = Server::start_tls(move |_, _| Reply::redirect(location.clone()));
    let mut desk = Desk::new();
    desk.options.ca_file = Some(http::authority());
    desk.refuse(&server.url("/file.parquet"), Kind::Config, "from https to http");
    assert!(plain.requests().is_empty());
}

#[test]
fn a_server_without_tls_is_named_as_such() {
    let server = Server::start(|_, _| Reply::ok(content()));
    let url = server.url("/file.parquet").replace("http://", "https://");
    let mut desk = Desk::new();
    desk.options.ca_file = Some(http::authority());
    desk.options.attempts_max = 1;
    desk.refuse(&url, Kind::Network, "the TLS handshake failed");
}

#[test]
fn a_refused_connection_is_a_network_fault() {
    let url = format!("http://user:{CANARY}@127.0.0.1:{}/file.parquet?{CANARY}", http::unused_port());
    Desk::new().refuse(&url, Kind::Network, "gave up at attempt 3: 127.0.0.1 refused the connection");
}

#[test]
fn an_unknown_host_is_a_network_fault() {
    let mut desk = Desk::new();
    desk.options.attempts_max = 1;
    // A label has at most 63 bytes, so the resolver refuses it without asking a server.
    let host = "a".repeat(64);
    desk.refuse(&format!("http://{host}/file.parquet"), Kind::Network, "cannot be resolved");
}

// The cache.

#[test]
fn an_unchanged_file_is_not_sent_again() {
    let (server, url) = served(|_, request| Reply::file(request, &content(), TAG));
    let desk = Desk::new();
    let first = desk.expect(&url, &content());
    let second = desk.expect(&url, &content());
    assert_eq!(first, second);
    let requests = server.requests();
    assert_eq!(requests.len(), 2);
    assert_eq!(requests[1].header("if-none-match"), Some(TAG));
    assert!(desk.log.text().contains("unchanged on the server"));
}

#[test]
fn a_newer_file_replaces_the_cached_one() {
    let (_server, url) = served(|index, request| match index {
        0 => Reply::file(request, b"PAR1 old", "\"old\""),
        _ => Reply::file(request, b"PAR1 new", "\"new\""),
    });
    let desk = Desk::new();
    desk.expect(&url, b"PAR1 old");
    desk.expect(&url, b"PAR1 new");
}

#[test]
fn a_file_without_validators_is_downloaded_again() {
    let (server, url) = served(|index, _| Reply::ok(format!("PAR1 {index}")));
    let desk = Desk::new();
    desk.expect(&url, b"PAR1 0");
    desk.expect(&url, b"PAR1 1");
    assert_eq!(server.requests().len(), 2);
}

#[test]
fn a_pinned_file_in_the_cache_needs_no_network() {
    let (server, url) = served(|_, request| Reply::file(request, &content(), TAG));
    let desk = Desk::new();
    let pin = format!("#sha256={}", digest(&content()));
    desk.expect(&format!("{url}{pin}"), &content());
    desk.expect(&format!("{url}{pin}"), &content());
    let elsewhere = format!("http://127.0.0.1:{}/other.parquet{pin}", http::unused_port());
    desk.expect(&elsewhere, &content());
    assert_eq!(server.requests().len(), 1);
}

#[test]
fn a_damaged_cached_file_is_downloaded_again() {
    let (server, url) = served(|_, request| Reply::file(request, &content(), TAG));
    let desk = Desk::new();
    let file = desk.expect(&url, &content());
    let mut damaged = content();
    damaged[7] ^= 1;
    fs::write(&file.path, damaged).unwrap();
    desk.expect(&url, &content());
    assert_eq!(server.requests()[1].header("if-none-match"), None);
    assert!(desk.log.text().contains("damaged on disk"));
}

#[test]
fn a_restarted_job_goes_on_with_the_cached_file() {
    for status in [403, 500] {
        let (_server, url) = served(move |index, request| match index {
            0 => Reply::file(request, &content(), TAG),
            _ => Reply::status(status),
        });
        let desk = Desk::new();
        desk.expect(&url, &content());
        desk.expect(&url, &content());
        assert!(desk.log.text().contains("the cached file is used"), "{status}");
    }
    let (_server, url) = served(|index, request| match index {
        0 => Reply::file(request, &content(), TAG),
        _ => Reply::status(404),
    });
    let desk = Desk::new();
    desk.expect(&url, &content());
    desk.refuse(&url, Kind::Data, "no such file");
}

#[test]
fn a_download_killed_before_its_rename_is_kept() {
    let (server, url) = served(|index, request| match index {
        0 => Reply::file(request, &content(), TAG).cut(100_000),
        1..=3 => Reply::status(500),
        _ => Reply::file(request, &content(), TAG),
    });
    let desk = Desk::new();
    desk.refuse(&url, Kind::Network, "500");
    let part = files_below(&desk.options.cache).into_iter().find(|path| path.ends_with("part")).unwrap();
    fs::write(&part, content()).unwrap();
    desk.expect(&url, &content());
    assert_eq!(
        server.requests()[4].header("if-none-match"),
        Some(TAG),
        "only asked whether it is the newest"
    );
}

#[test]
fn a_pinned_download_killed_before_its_rename_needs_no_network() {
    let (server, url) = served(|index, request| match index {
        0 => Reply::file(request, &content(), TAG).cut(100_000),
        _ => Reply::status(500),
    });
    let desk = Desk::new();
    let url = format!("{url}#sha256={}", digest(&content()));
    desk.refuse(&url, Kind::Network, "500");
    let asked = server.requests().len();
    let part = files_below(&desk.options.cache).into_iter().find(|path| path.ends_with("part")).unwrap();
    fs::write(&part, content()).unwrap();
    desk.expect(&url, &content());
    assert_eq!(server.requests().len(), asked);
}

/// The server says that nothing has changed; the file of before is not the one that is asked for now.
#[test]
fn a_cached_file_of_another_digest_is_not_the_pinned_one() {
    let (_server, url) = served(|_, request| Reply::file(request, &content(), TAG));
    let desk = Desk::new();
    desk.expect(&url, &content());
    desk.refuse(&format!("{url}#sha256={}", digest(b"other")), Kind::Data, "sha256");
}

#[test]
fn queries_are_different_files_and_are_never_written_down() {
    let (server, url) = served(|index, request| Reply::file(request, &[index as u8; 9], TAG));
    let desk = Desk::new();
    desk.expect(&format!("{url}?v=1&sig={CANARY}"), &[0; 9]);
    desk.expect(&format!("{url}?v=2&sig={CANARY}"), &[1; 9]);
    assert!(server.requests().iter().all(|request| request.header("if-none-match").is_none()));
}

#[test]
fn one_download_at_a_time() {
    let (server, url) = served(|_, request| Reply::file(request, &content(), TAG));
    let desk = Desk::new();
    let pinned = format!("{url}#sha256={}", digest(&content()));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| desk.expect(&pinned, &content()));
        }
    });
    assert_eq!(server.requests().len(), 1, "the others waited and found it in the cache");
}

#[test]
fn an_unusable_cache_is_a_config_fault_since_no_retry_helps() {
    let (_server, url) = served(|_, _| Reply::ok(content()));
    let mut desk = Desk::new();
    let file = desk.folder.path().join("file");
    fs::write(&file, "").unwrap();
    desk.options.cache = file;
    desk.refuse(&url, Kind::Config, "cannot create");
}

// Local files.

/// Returns files with these names, each holding its name, and a function that fetches a pattern below their folder.
fn tree(names: &[&str]) -> (Desk, PathBuf) {
    let desk = Desk::new();
    let root = desk.folder.path().join("tree");
    for name in names {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, name).unwrap();
    }
    (desk, root)
}

fn names(desk: &Desk, root: &Path, pattern: &str) -> Vec<String> {
    let files = desk.fetch_all(&[root.join(pattern).display().to_string()]).unwrap();
    let name = |file: &File| {
        let name = file.path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
        assert_eq!(file.sha256, digest(name.as_bytes()));
        assert_eq!(file.name, file.path.display().to_string());
        name
    };
    files.iter().map(name).collect()
}

#[test]
fn directories_give_their_parquet_files_at_any_depth() {
    let (desk, root) = tree(&[
        "data/data/b.parquet",
        "data/data/a.parquet",
        "data/c.PARQUET",
        "data/README.md",
        "data/_SUCCESS",
        "data/_temporary/x.parquet",
        "data/.hidden/x.parquet",
        "data/.x.parquet",
    ]);
    assert_eq!(names(&desk, &root, "data"), ["data/c.PARQUET", "data/data/a.parquet", "data/data/b.parquet"]);
    assert_eq!(names(&desk, &root, "data/data/"), ["data/data/a.parquet", "data/data/b.parquet"]);
}

/// A folder often holds the same rows a second time in another form. One kind is read, and the other is reported.
#[test]
fn a_folder_of_several_kinds_gives_one_of_them_and_tells_the_others() {
    let (desk, root) =
        tree(&["data/b.jsonl.gz", "data/a.jsonl", "data/c.csv", "data/state.json", "data/README.md"]);
    assert_eq!(names(&desk, &root, "data"), ["data/a.jsonl", "data/b.jsonl.gz"]);
    let told = desk.log.text();
    assert!(told.contains("2 data file(s) of one kind are read and 1 files: 1 .csv left aside"), "{told}");
    let (desk, root) = tree(&["data/c.TSV.zst", "data/state.json"]);
    assert_eq!(names(&desk, &root, "data"), ["data/c.TSV.zst"]);
}

/// A folder as the hub has it holds rows to test on. They are read, and a warning says so.
#[test]
fn a_folder_with_several_splits_is_told() {
    let (desk, root) =
        tree(&["test/data/train-0.parquet", "test/data/test-0.parquet", "test/data/valid.parquet"]);
    assert_eq!(names(&desk, &root, "test").len(), 3);
    let told = desk.log.text();
    assert!(told.contains("3 files are read") && told.contains("1 of test, 1 of validation"), "{told}");
    // The name of the folder itself says nothing, and a glob says which files are meant.
    for (files, pattern) in [
        (["train/a.parquet", "train/b.parquet"], "train"),
        (["t/train.parquet", "t/test.parquet"], "t/*.parquet"),
    ] {
        let (desk, root) = tree(&files);
        assert_eq!(names(&desk, &root, pattern).len(), 2);
        assert!(!desk.log.text().contains("no files to train on"), "{}", desk.log.text());
    }
}

#[test]
fn globs_give_what_they_match() {
    let (desk, root) =
        tree(&["a1.parquet", "a2.parquet", "b.parquet", ".a.parquet", "sub/deep/a3.parquet", "n.jsonl"]);
    assert_eq!(names(&desk, &root, "a*.parquet"), ["a1.parquet", "a2.parquet"]);
    assert_eq!(names(&desk, &root, "**/a*.parquet"), ["a1.parquet", "a2.parquet", "sub/deep/a3.parquet"]);
    assert_eq!(names(&desk, &root, "s*"), ["sub/deep/a3.parquet"], "a directory that matches is entered");
    assert_eq!(names(&desk, &root, "*.json*"), ["n.jsonl"]);
    let nothing = root.join("z*.parquet").display().to_string();
    desk.refuse(&nothing, Kind::Data, "no file matches");
}

#[test]
fn a_name_that_exists_is_no_glob() {
    let (desk, root) = tree(&["a[1].parquet", "a1.parquet"]);
    assert_eq!(names(&desk, &root, "a[1].parquet"), ["a[1].parquet"]);
    let url = url::Url::from_file_path(root.join("a[1].parquet")).unwrap();
    desk.expect(url.as_str(), b"a[1].parquet");
}

#[test]
fn what_a_directory_holds_instead_is_told() {
    let (desk, root) = tree(&["data/a.txt", "data/dataset_info.json", "data/LICENSE"]);
    let folder = root.join("data");
    let told = "the folder contains no data file: 3 files: 1 .json, 1 .txt, 1 without extension";
    desk.refuse(&folder.display().to_string(), Kind::Data, told);
    let empty = root.join("empty");
    fs::create_dir(&empty).unwrap();
    desk.refuse(&empty.display().to_string(), Kind::Data, "it is empty");
}

#[test]
fn a_missing_path_is_known_before_any_download() {
    let (server, url) = served(|_, _| Reply::ok(content()));
    let desk = Desk::new();
    let fault = desk.fetch_all(&[url, "/nowhere/a.parquet".to_owned()]).unwrap_err();
    assert_eq!(fault.kind, Kind::Data);
    assert!(fault.message.contains("/nowhere/a.parquet: no such file"), "{fault}");
    assert!(server.requests().is_empty());
}

#[test]
fn local_digests_are_compared() {
    let (desk, root) = tree(&["a.parquet", "b.parquet"]);
    let path = root.join("a.parquet").display().to_string();
    desk.expect(&format!("{path}#sha256={}", digest(b"a.parquet")), b"a.parquet");
    desk.refuse(&format!("{path}#sha256={}", digest(b"x")), Kind::Data, &digest(b"a.parquet"));
    let both = format!("{}#sha256={}", root.display(), digest(b"x"));
    desk.refuse(&both, Kind::Config, "2 files");
}

#[cfg(unix)]
#[test]
fn links_are_followed_as_mounted_volumes_need_but_not_in_circles() {
    let (desk, root) = tree(&["..2026/a.parquet"]);
    std::os::unix::fs::symlink("..2026", root.join("..data")).unwrap();
    std::os::unix::fs::symlink("..data/a.parquet", root.join("a.parquet")).unwrap();
    let files = desk.fetch_all(&[root.display().to_string()]).unwrap();
    assert_eq!(files.len(), 1);
    assert_eq!(files[0].path, root.join("a.parquet"));

    std::os::unix::fs::symlink(".", root.join("again")).unwrap();
    desk.refuse(&root.display().to_string(), Kind::Data, "more than 32 levels");
}
