//! Push and pull with a real registry and independent readers (skopeo, umoci), and with a scripted registry that
//! fails.

#[path = "support/fake_registry.rs"]
mod fake_registry;
#[path = "support/registry.rs"]
mod support;
#[path = "support/random.rs"]
mod random;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use fake_registry::{Fake, Manners};
use hone::fault::{Fault, Kind};
use hone::registry::{self, ImageFacts, Options, Pushed, Target};
use hone::report::Report;
use support::{Certificate, PASSWORD, Registry, Setup, adapter, run, skopeo};

const FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

fn push(folder: &Path, target: &str, options: &Options) -> Result<Pushed, Fault> {
    let facts = ImageFacts { model_name: "phi-3".into(), ..Default::default() };
    let result = registry::push(folder, &Target::parse(target)?, &facts, options, &Report::silent());
    if let Err(fault) = &result {
        assert!(!fault.to_string().contains(PASSWORD), "a secret is shown: {fault}");
    }
    result
}

fn pull(target: &str, folder: &Path, options: &Options) -> Result<String, Fault> {
    Ok(registry::pull(&Target::parse(target)?, folder, options, &Report::silent())?.digest)
}

fn assert_same_files(one: &Path, two: &Path) {
    for name in FILES {
        assert!(
            std::fs::read(one.join(name)).unwrap() == std::fs::read(two.join(name)).unwrap(),
            "{name} differs"
        );
    }
}

/// Returns a folder with an `adapter/` of the given size.
fn work(bytes: usize) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    adapter(&folder.path().join("adapter"), bytes);
    folder
}

#[test]
fn tls_and_password_and_every_independent_reader() {
    let registry = Registry::start(Setup { tls: true, password: true, ..Default::default() });
    let work = work(300_000);
    let (adapter, image) = (work.path().join("adapter"), format!("{}/team/adapter:v1", registry.host));
    let pushed = push(&adapter, &image, &registry.options()).unwrap();
    assert_eq!(pushed.reference, image);

    let login = support::login_pair();
    let remote = format!("docker://{image}");
    let inspected = run(skopeo(&registry).args([
        "inspect",
        "--creds",
        &login,
        "--format",
        "{{.Digest}} {{.Os}}/{{.Architecture}}",
        &remote,
    ]));
    assert_eq!(inspected.trim(), format!("{} linux/amd64", pushed.digest));

    let pulled = support::pull_as_kaito(&registry, &image, &work.path().join("pulled"));
    assert_eq!(pulled.manifest["annotations"]["sh.kaito.model.name"], "phi-3");
    assert_same_files(&adapter, &pulled.data);

    // The view of a container runtime.
    let oci = work.path().join("oci");
    run(skopeo(&registry)
        .args(["copy", "-q", "--src-creds", &login, &remote])
        .arg(format!("oci:{}:v1", oci.display())));
    let bundle = work.path().join("bundle");
    run(Command::new("umoci")
        .args(["unpack", "--rootless", "--image"])
        .arg(format!("{}:v1", oci.display()))
        .arg(&bundle));
    assert_same_files(&adapter, &bundle.join("rootfs/data"));

    // The way back.
    let back = work.path().join("back");
    assert_eq!(pull(&image, &back, &registry.options()).unwrap(), pushed.digest);
    assert_same_files(&adapter, &back);
    assert_eq!(
        pull(&image, &back, &registry.options()).unwrap(),
        pushed.digest,
        "a pull over the same files is fine"
    );
    let by_digest = format!("{}/team/adapter@{}", registry.host, pushed.digest);
    pull(&by_digest, &work.path().join("by-digest"), &registry.options()).unwrap();
}

#[test]
fn plain_http_repeats_are_free_and_tags_move() {
    let registry = Registry::start(Setup::default());
    let work = work(9_000_000);
    let (adapter, image) = (work.path().join("adapter"), format!("{}/a:latest", registry.host));
    let first = push(&adapter, &image, &registry.anonymous()).unwrap();
    assert_eq!(push(&adapter, &image, &registry.anonymous()).unwrap(), first);

    support::adapter(&adapter, 1000);
    let second = push(&adapter, &image, &registry.anonymous()).unwrap();
    assert_ne!(second.digest, first.digest);
    assert_eq!(pull(&image, &work.path().join("new"), &registry.anonymous()).unwrap(), second.digest);
    assert_same_files(&adapter, &work.path().join("new"));
}

#[test]
fn refused_logins_are_auth_faults_with_the_registrys_words_and_the_source() {
    let registry = Registry::start(Setup { tls: true, password: true, ..Default::default() });
    let work = work(1000);
    let (adapter, image) = (work.path().join("adapter"), format!("{}/a:v1", registry.host));

    let wrong = Options { docker_config: Some(registry.login("wrong-canary")), ..registry.options() };
    let fault = push(&adapter, &image, &wrong).unwrap_err();
    assert_eq!(fault.kind, Kind::Auth, "{fault}");
    for expected in ["authentication required", "login-12.json", "hone push"] {
        assert!(fault.to_string().contains(expected), "{expected}: {fault}");
    }
    assert!(!fault.to_string().contains("wrong-canary"), "{fault}");

    let fault = push(&adapter, &image, &registry.anonymous()).unwrap_err();
    assert_eq!(fault.kind, Kind::Auth, "{fault}");
    assert!(fault.message.contains("no credentials") && fault.message.contains("no-login.json"), "{fault}");
    let fault = pull(&image, &work.path().join("back"), &registry.anonymous()).unwrap_err();
    assert_eq!(fault.kind, Kind::Auth, "{fault}");
    assert!(!work.path().join("back").exists());
}

#[test]
fn certificates_and_schemes_that_do_not_fit_are_explained() {
    let (tls, plain) =
        (Registry::start(Setup { tls: true, ..Default::default() }), Registry::start(Setup::default()));
    let work = work(1000);
    let adapter = work.path().join("adapter");

    let fault = push(&adapter, &format!("{}/a", tls.host), &Options { ca_file: None, ..tls.anonymous() })
        .unwrap_err();
    assert_eq!(fault.kind, Kind::Config, "{fault}");
    assert!(fault.to_string().contains("--ca-file"), "{fault}");

    let https = Options { plain_http: false, ..plain.anonymous() };
    let fault = push(&adapter, &format!("{}/a", plain.host), &https).unwrap_err();
    assert_eq!(fault.kind, Kind::Config, "{fault}");
    assert!(fault.to_string().contains("--plain-http"), "{fault}");

    let no_certificate = Options { ca_file: Some(adapter.join(FILES[0])), ..tls.anonymous() };
    assert_eq!(push(&adapter, &format!("{}/a", tls.host), &no_certificate).unwrap_err().kind, Kind::Config);
}

/// The whole process reads the variable, so the push runs in a second process of this same test.
#[test]
fn ssl_cert_file_is_honoured() {
    let work = work(1000);
    let adapter = work.path().join("adapter");
    if let Ok(host) = std::env::var("TEST_REGISTRY_HOST") {
        let login = support::login(work.path(), &host, PASSWORD);
        let options = Options { docker_config: Some(login), plain_http: false, ..support::quick() };
        push(&adapter, &format!("{host}/a:v1"), &options).unwrap();
        return;
    }
    let registry = Registry::start(Setup { tls: true, password: true, ..Default::default() });
    run(Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "ssl_cert_file_is_honoured"])
        .env("TEST_REGISTRY_HOST", &registry.host)
        .env("SSL_CERT_FILE", registry.path("ca.crt")));
    pull(&format!("{}/a:v1", registry.host), &work.path().join("back"), &registry.options()).unwrap();
}

/// A certificate as `openssl req -x509` makes it: its own authority and a server's at once.
#[test]
fn a_self_signed_registry_is_trusted_where_its_very_certificate_was_given() {
    let work = work(300_000);
    let adapter = work.path().join("adapter");
    if let Ok(host) = std::env::var("TEST_REGISTRY_HOST") {
        let login = support::login(work.path(), &host, PASSWORD);
        let options = Options { docker_config: Some(login), plain_http: false, ..support::quick() };
        push(&adapter, &format!("{host}/a:v1"), &options).unwrap();
        return;
    }
    let start =
        |certificate| Registry::start(Setup { tls: true, password: true, certificate, ..Default::default() });
    let registry = start(Certificate::SelfSigned("localhost"));
    let image = format!("{}/a:v2", registry.host);
    let pushed = push(&adapter, &image, &registry.options()).unwrap();
    let back = work.path().join("back");
    assert_eq!(pull(&image, &back, &registry.options()).unwrap(), pushed.digest);
    assert_same_files(&adapter, &back);
    run(Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_self_signed_registry_is_trusted_where_its_very_certificate_was_given"])
        .env("TEST_REGISTRY_HOST", &registry.host)
        .env("SSL_CERT_FILE", registry.path("ca.crt")));

    let refused = |registry: &Registry, ca_file: Option<std::path::PathBuf>, words: &str| {
        let options = Options { ca_file, ..registry.options() };
        let fault = push(&adapter, &format!("{}/a:v3", registry.host), &options).unwrap_err();
        assert!(fault.kind == Kind::Config && fault.message.contains(words), "{words}: {fault}");
    };
    let (expired, other) = (start(Certificate::Expired), start(Certificate::SelfSigned("other.test")));
    refused(&registry, None, "certificate");
    // Another certificate with the same subject.
    refused(&registry, Some(expired.path("ca.crt")), "certificate");
    refused(&expired, Some(expired.path("ca.crt")), "expired");
    refused(&other, Some(other.path("ca.crt")), "not valid for name");
}

#[test]
fn what_a_registry_refuses_for_good_is_a_config_fault() {
    let registry = Registry::start(Setup { read_only: true, ..Default::default() });
    let work = work(1000);
    let fault = push(&work.path().join("adapter"), &format!("{}/a", registry.host), &registry.anonymous())
        .unwrap_err();
    assert_eq!(fault.kind, Kind::Config, "{fault}");
    assert!(fault.to_string().contains("405") || fault.to_string().contains("UNSUPPORTED"), "{fault}");

    let back = work.path().join("back");
    let fault = pull(&format!("{}/missing:v9", registry.host), &back, &registry.anonymous()).unwrap_err();
    assert_eq!(fault.kind, Kind::Config, "{fault}");
    assert!(fault.message.contains("missing:v9") && !back.exists(), "{fault}");
}

#[test]
fn an_unreachable_registry_is_a_push_fault_that_says_where_the_adapter_is() {
    let work = work(1000);
    let adapter = work.path().join("adapter");
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let options = Options { attempts_max: 2, ..support::quick() };
    let fault = push(&adapter, &format!("localhost:{port}/a:v1"), &options).unwrap_err();
    assert_eq!(fault.kind, Kind::Push, "{fault}");
    assert!(fault.message.contains("after 2 attempts"), "{fault}");
    assert!(fault.help.unwrap().contains(&format!("hone push {} localhost:{port}/a:v1", adapter.display())));
    let fault = pull(&format!("localhost:{port}/a:v1"), &work.path().join("back"), &options).unwrap_err();
    assert_eq!(fault.kind, Kind::Network, "{fault}");
}

#[test]
fn layouts_hold_several_tags_and_are_read_by_others() {
    let work = work(200_000);
    let (adapter, layout) = (work.path().join("adapter"), work.path().join("layout"));
    let target = |tag: &str| format!("oci:{}:{tag}", layout.display());
    let one = push(&adapter, &target("v1"), &support::quick()).unwrap();
    support::adapter(&adapter, 1000);
    let two = push(&adapter, &target("v2"), &support::quick()).unwrap();
    assert_eq!(push(&adapter, &target("v2"), &support::quick()).unwrap(), two);

    for (tag, pushed) in [("v1", &one), ("v2", &two)] {
        let digest = run(Command::new("skopeo").args(["inspect", "--format", "{{.Digest}}", &target(tag)]));
        assert_eq!(digest.trim(), pushed.digest);
    }
    let back = work.path().join("back");
    assert_eq!(pull(&target("v2"), &back, &support::quick()).unwrap(), two.digest);
    assert_same_files(&adapter, &back);

    let fault = pull(&target("v1"), &back, &support::quick()).unwrap_err();
    assert_eq!(fault.kind, Kind::Config, "another image over these files: {fault}");
    assert_same_files(&adapter, &back);
    let fault = pull(&target("v3"), &work.path().join("none"), &support::quick()).unwrap_err();
    assert!(fault.kind == Kind::Config && fault.to_string().contains("v1, v2"), "{fault}");
    let fault = push(&adapter, &format!("oci:{}", adapter.display()), &support::quick()).unwrap_err();
    assert_eq!(fault.kind, Kind::Config, "a folder with other files: {fault}");
}

#[test]
fn a_damaged_layout_gives_no_files_and_a_cut_pull_is_completed() {
    let work = work(1000);
    let (adapter, layout, back) =
        (work.path().join("adapter"), work.path().join("layout"), work.path().join("back"));
    let target = format!("oci:{}", layout.display());
    push(&adapter, &target, &support::quick()).unwrap();

    std::fs::create_dir(&back).unwrap();
    std::fs::copy(adapter.join(FILES[0]), back.join(FILES[0])).unwrap();
    pull(&target, &back, &support::quick()).unwrap();
    assert_same_files(&adapter, &back);

    let largest = std::fs::read_dir(layout.join("blobs/sha256")).unwrap().map(|entry| entry.unwrap().path());
    let largest = largest.max_by_key(|path| path.metadata().unwrap().len()).unwrap();
    let mut bytes = std::fs::read(&largest).unwrap();
    bytes[700] ^= 1;
    std::fs::write(&largest, bytes).unwrap();
    let fault = pull(&target, &work.path().join("other"), &support::quick()).unwrap_err();
    assert!(fault.kind == Kind::Data && fault.message.contains("damaged"), "{fault}");
    assert!(!work.path().join("other").exists());
}

#[test]
fn an_index_leads_to_its_linux_amd64_image() {
    let work = work(1000);
    let (adapter, layout) = (work.path().join("adapter"), work.path().join("layout"));
    let target = format!("oci:{}:v1", layout.display());
    let pushed = push(&adapter, &target, &support::quick()).unwrap();

    // The tag now points to an index over the same manifest, as `docker buildx` writes one.
    let top = layout.join("index.json");
    let mut index: serde_json::Value = serde_json::from_slice(&std::fs::read(&top).unwrap()).unwrap();
    let mut entry = index["manifests"][0].clone();
    entry["platform"] = serde_json::json!({ "os": "linux", "architecture": "amd64" });
    let mut other = entry.clone();
    other["digest"] = format!("sha256:{}", "0".repeat(64)).into();
    other["platform"]["architecture"] = "arm64".into();
    let inner = serde_json::json!({ "schemaVersion": 2, "manifests": [other, entry] }).to_string();
    let inner_file = work.path().join("inner.json");
    std::fs::write(&inner_file, &inner).unwrap();
    let digest = run(Command::new("sha256sum").arg(&inner_file))[..64].to_string();
    std::fs::rename(&inner_file, layout.join("blobs/sha256").join(&digest)).unwrap();
    index["manifests"][0]["digest"] = format!("sha256:{digest}").into();
    index["manifests"][0]["size"] = inner.len().into();
    std::fs::write(&top, index.to_string()).unwrap();

    let back = work.path().join("back");
    assert_eq!(pull(&target, &back, &support::quick()).unwrap(), pushed.digest);
    assert_same_files(&adapter, &back);
}

/// Pushes to a scripted registry. Returns the result and the requests that the registry got.
fn push_to(manners: Manners, bytes: usize, options: Options) -> (Result<Pushed, Fault>, Fake) {
    let fake = Fake::start(manners);
    let work = work(bytes);
    let login = support::login(work.path(), &fake.host, PASSWORD);
    let options = Options { docker_config: Some(login), ..options };
    let result = push(&work.path().join("adapter"), &format!("{}/team/a:v1", fake.host), &options);
    (result, fake)
}

#[test]
fn bearer_tokens_are_fetched_and_renewed_when_they_expire_on_the_way() {
    let (result, fake) = push_to(Manners { bearer: true, ..Default::default() }, 1000, support::quick());
    result.unwrap();
    assert!(fake.saw("GET /token?scope=repository%3Ateam%2Fa%3Apull%2Cpush"), "{:?}", fake.log());

    // HEAD, POST and PUT of each blob, PUT and GET of the manifest.
    for request in 1..=8 {
        let manners = Manners { bearer: true, expire_at: Some(request), ..Default::default() };
        let (result, fake) = push_to(manners, 1000, support::quick());
        result.unwrap_or_else(|fault| panic!("expired at {request}: {fault}\n{:?}", fake.log()));
    }

    let (result, _) =
        push_to(Manners { bearer: true, deny: true, ..Default::default() }, 1000, support::quick());
    let fault = result.unwrap_err();
    assert!(fault.kind == Kind::Auth && fault.message.contains("DENIED: not yours"), "{fault}");
}

#[test]
fn identity_tokens_are_exchanged() {
    let fake = Fake::start(Manners { bearer: true, ..Default::default() });
    let work = work(1000);
    let config = work.path().join("config.json");
    let auth = serde_json::json!({ "auths": { &fake.host: { "identitytoken": PASSWORD } } });
    std::fs::write(&config, auth.to_string()).unwrap();
    let options = Options { docker_config: Some(config), ..support::quick() };
    push(&work.path().join("adapter"), &format!("{}/team/a:v1", fake.host), &options).unwrap();
    assert!(fake.saw("POST /token") && !fake.saw("GET /token"), "{:?}", fake.log());
}

#[test]
fn passing_failures_are_repeated() {
    for fail in [500, 503, 429] {
        let (result, fake) =
            push_to(Manners { fail_first: Some((2, fail)), ..Default::default() }, 1000, support::quick());
        result.unwrap_or_else(|fault| panic!("{fail}: {fault}\n{:?}", fake.log()));
    }
    let (result, _) =
        push_to(Manners { fail_first: Some((99, 502)), ..Default::default() }, 1000, support::quick());
    let fault = result.unwrap_err();
    assert!(fault.kind == Kind::Push && fault.message.contains("502"), "{fault}");
}

/// Without an answer to the question for the kind of login, a registry must not be taken for one without any.
#[test]
fn a_registry_that_fails_when_it_is_asked_for_its_login_is_asked_again() {
    for fail in [429, 503] {
        let manners = Manners { bearer: true, fail_probe: Some((2, fail)), ..Default::default() };
        let (result, fake) = push_to(manners, 1000, support::quick());
        result.unwrap_or_else(|fault| panic!("{fail}: {fault}\n{:?}", fake.log()));
    }
    let manners = Manners { bearer: true, fail_probe: Some((99, 503)), ..Default::default() };
    let (result, _) = push_to(manners, 1000, support::quick());
    assert_eq!(result.unwrap_err().kind, Kind::Push);
}

#[test]
fn registries_that_refuse_one_long_upload_get_chunks() {
    let manners = Manners { hang_up_bytes: Some(1_000_000), ..Default::default() };
    let (result, fake) = push_to(manners, 2_000_000, support::quick());
    result.unwrap();
    assert!(fake.saw("PATCH"), "{:?}", fake.log());

    let manners = Manners { monolithic_bytes_max: Some(1_000_000), ..Default::default() };
    let (result, fake) = push_to(manners, 9_000_000, support::quick());
    result.unwrap();
    let patches = fake.log().iter().filter(|line| line.starts_with("PATCH")).count();
    assert_eq!(patches, 3, "9 MB in chunks of 4 MiB: {:?}", fake.log());
}

#[test]
fn a_dropped_chunk_is_noticed() {
    let manners =
        Manners { monolithic_bytes_max: Some(1_000_000), first_chunk_only: true, ..Default::default() };
    let (result, fake) = push_to(manners, 9_000_000, support::quick());
    let fault = result.unwrap_err();
    assert!(
        fault.kind == Kind::Push && fault.message.contains("dropped a chunk"),
        "{fault}\n{:?}",
        fake.log()
    );
}

#[test]
fn another_origin_gets_the_blob_and_no_credentials() {
    let manners = Manners { bearer: true, upload_elsewhere: true, ..Default::default() };
    let (result, fake) = push_to(manners, 1000, support::quick());
    result.unwrap();
    let (elsewhere, own): (Vec<String>, Vec<String>) =
        fake.log().into_iter().partition(|line| line.starts_with("PUT") && line.contains("/uploads/"));
    assert_eq!(elsewhere.len(), 2, "{elsewhere:?}");
    assert!(elsewhere.iter().all(|line| !line.ends_with("(authorized)")), "{elsewhere:?}");
    assert!(own.iter().skip(1).all(|line| line.ends_with("(authorized)")), "{own:?}");
}

#[test]
fn silence_ends_and_a_wrong_digest_at_reading_back_is_noticed() {
    let impatient = Options { attempts_max: 2, read_timeout: Duration::from_millis(100), ..support::quick() };
    let (result, _) = push_to(Manners { silent_uploads: true, ..Default::default() }, 1000, impatient);
    let fault = result.unwrap_err();
    assert_eq!(fault.kind, Kind::Push, "{fault}");

    let (result, _) = push_to(Manners { other_manifest: true, ..Default::default() }, 1000, support::quick());
    let fault = result.unwrap_err();
    assert!(fault.kind == Kind::Push && fault.message.contains("the tag leads to"), "{fault}");
}

#[test]
fn a_registry_that_quotes_the_password_does_not_get_it_into_a_message() {
    let (result, _) = push_to(Manners { echo: Some(PASSWORD), ..Default::default() }, 1000, support::quick());
    let fault = result.unwrap_err();
    assert!(fault.kind == Kind::Auth && fault.message.contains("bad password ***"), "{fault}");
}
