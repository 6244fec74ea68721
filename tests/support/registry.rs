//! A real docker-registry on loopback (plain or TLS, open or with a password), and adapters to push to it.
//! They need Debian's docker-registry, apache2-utils and openssl; if these are missing, the test fails and is never
//! skipped.

// Each test program uses a part of it.
#![allow(dead_code)]

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use hone::registry::Options;

pub const USER: &str = "tester";
/// Must never appear in a message.
pub const PASSWORD: &str = "canary-s3cret";

/// LIMIT: a registry starts in 0.2 to 0.7 s.
const START_MAX: Duration = Duration::from_secs(60);

pub struct Registry {
    process: Child,
    pub folder: tempfile::TempDir,
    /// `localhost:port`
    pub host: String,
    pub tls: bool,
}

#[derive(Clone, Copy, Default)]
pub struct Setup {
    pub tls: bool,
    pub certificate: Certificate,
    pub password: bool,
    pub read_only: bool,
}

/// The certificate of a registry with TLS; `ca.crt` is the authority to trust.
#[derive(Clone, Copy, Default)]
pub enum Certificate {
    #[default]
    OfAuthority,
    /// A certificate for this host that is its own authority, as Docker's guide to private registries makes it.
    SelfSigned(&'static str),
    /// Likewise for localhost, expired in 2021.
    Expired,
}

impl Registry {
    pub fn start(setup: Setup) -> Registry {
        let folder = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let config = folder.path().join("config.yml");
        std::fs::write(&config, configuration(folder.path(), port, setup)).unwrap();
        let log = std::fs::File::create(folder.path().join("log")).unwrap();
        let process = needed(
            Command::new("docker-registry")
                .arg("serve")
                .arg(&config)
                .stdout(Stdio::null())
                .stderr(log)
                .spawn(),
        );
        let mut registry = Registry { process, folder, host: format!("localhost:{port}"), tls: setup.tls };
        registry.wait(port);
        registry
    }

    fn wait(&mut self, port: u16) {
        let start = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            let ended = self.process.try_wait().unwrap().is_some();
            if ended || start.elapsed() > START_MAX {
                panic!(
                    "docker-registry did not start:\n{}",
                    std::fs::read_to_string(self.path("log")).unwrap()
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Returns options that reach it, with the right password.
    pub fn options(&self) -> Options {
        Options { docker_config: Some(self.login(PASSWORD)), ..self.anonymous() }
    }

    /// Returns options without credentials, wherever the tests run.
    pub fn anonymous(&self) -> Options {
        let empty = self.path("no-login.json");
        std::fs::write(&empty, "{}").unwrap();
        Options {
            docker_config: Some(empty),
            ca_file: self.tls.then(|| self.path("ca.crt")),
            plain_http: !self.tls,
            ..quick()
        }
    }

    /// Returns a docker config.json with a password for this registry.
    pub fn login(&self, password: &str) -> PathBuf {
        login(self.folder.path(), &self.host, password)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Returns few attempts and short waits.
pub fn quick() -> Options {
    Options {
        docker_config: None,
        ca_file: None,
        plain_http: true,
        attempts_max: 3,
        connect_timeout: Duration::from_secs(5),
        read_timeout: Duration::from_secs(10),
    }
}

pub fn login(folder: &Path, host: &str, password: &str) -> PathBuf {
    let path = folder.join(format!("login-{}.json", password.len()));
    let auth = serde_json::json!({ "auths": { host: { "username": USER, "password": password } } });
    std::fs::write(&path, auth.to_string()).unwrap();
    path
}

/// Runs a tool and returns its output. A failure shows all that it printed.
pub fn run(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = needed(command.output());
    let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{command:?}: {status}\n{stdout}\n{stderr}");
    stdout.into_owned()
}

/// Writes the two files of an adapter, with `bytes` of weights that do not compress.
pub fn adapter(folder: &Path, bytes: usize) {
    std::fs::create_dir_all(folder).unwrap();
    let config = r#"{"peft_type": "LORA", "r": 8, "base_model_name_or_path": "org/base"}"#;
    std::fs::write(folder.join("adapter_config.json"), config).unwrap();
    let header = format!(r#"{{"a":{{"dtype":"U8","shape":[{bytes}],"data_offsets":[0,{bytes}]}}}}"#);
    let mut state = 1u64;
    let noise = (0..bytes).map(|_| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 56) as u8
    });
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend(noise);
    std::fs::write(folder.join("adapter_model.safetensors"), file).unwrap();
}

fn needed<T>(result: std::io::Result<T>) -> T {
    result.unwrap_or_else(|error| {
        panic!("a tool is missing ({error}); run tests/install, or: apt-get install docker-registry apache2-utils openssl skopeo umoci")
    })
}

fn configuration(folder: &Path, port: u16, setup: Setup) -> String {
    let home = folder.display();
    let mut text = format!(
        "version: 0.1\nlog: {{level: warn, accesslog: {{disabled: true}}}}\n\
         storage:\n  filesystem: {{rootdirectory: {home}/data}}\n"
    );
    if setup.read_only {
        text += "  maintenance: {readonly: {enabled: true}}\n";
    }
    text += &format!("http:\n  addr: 127.0.0.1:{port}\n  secret: test\n");
    if setup.tls {
        match setup.certificate {
            Certificate::OfAuthority => certificates(folder),
            Certificate::SelfSigned(host) => self_signed(folder, host),
            Certificate::Expired => expired(folder),
        }
        text += &format!("  tls: {{certificate: {home}/tls.crt, key: {home}/tls.key}}\n");
    }
    if setup.password {
        // The cost is 4, because every request is checked anew.
        let line = run(Command::new("htpasswd").args(["-Bbn", "-C", "4", USER, PASSWORD]));
        std::fs::write(folder.join("htpasswd"), line).unwrap();
        text += &format!("auth:\n  htpasswd: {{realm: test, path: {home}/htpasswd}}\n");
    }
    text
}

const NEW_KEY: &str = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";

fn openssl(folder: &Path, arguments: &str) {
    run(Command::new("openssl").args(arguments.split(' ')).current_dir(folder).stdin(Stdio::null()));
}

fn self_signed(folder: &Path, host: &str) {
    let subject = format!("-subj /CN={host} -addext subjectAltName=DNS:{host}");
    openssl(folder, &format!("req -x509 {NEW_KEY} -days 30 {subject} -keyout tls.key -out tls.crt"));
    std::fs::copy(folder.join("tls.crt"), folder.join("ca.crt")).unwrap();
}

fn expired(folder: &Path) {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/tls");
    for (name, to) in [
        ("self-signed-expired.pem", "tls.crt"),
        ("self-signed-expired.pem", "ca.crt"),
        ("server.key", "tls.key"),
    ] {
        std::fs::copy(from.join(name), folder.join(to)).unwrap();
    }
}

/// Makes a certificate authority (ca.crt), and a certificate for localhost signed by it (tls.crt, tls.key).
fn certificates(folder: &Path) {
    let openssl = |arguments: &str| openssl(folder, arguments);
    let key = NEW_KEY;
    openssl(&format!("req -x509 {key} -days 30 -subj /CN=test-authority -keyout ca.key -out ca.crt"));
    openssl(&format!("req {key} -subj /CN=localhost -keyout tls.key -out tls.csr"));
    std::fs::write(
        folder.join("names"),
        "subjectAltName=DNS:localhost,IP:127.0.0.1\nbasicConstraints=CA:FALSE\n",
    )
    .unwrap();
    openssl(
        "x509 -req -in tls.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 30 -extfile names -out tls.crt",
    );
}

/// Returns `user:password` in skopeo's form.
pub fn login_pair() -> String {
    format!("{USER}:{PASSWORD}")
}

/// Returns `skopeo` that trusts this registry.
pub fn skopeo(registry: &Registry) -> Command {
    let mut command = Command::new("skopeo");
    command.env("SSL_CERT_FILE", registry.path("ca.crt"));
    command
}

/// The files that KAITO's puller leaves of an image.
pub struct Pulled {
    pub manifest: serde_json::Value,
    /// Its folder `data`.
    pub data: PathBuf,
}

/// Performs the steps of KAITO's puller in a new `folder`: decompress, untar every layer in order, take `data`.
pub fn pull_as_kaito(registry: &Registry, image: &str, folder: &Path) -> Pulled {
    let (layout, files) = (folder.join("layout"), folder.join("files"));
    std::fs::create_dir_all(&files).unwrap();
    let creds = login_pair();
    run(skopeo(registry)
        .args(["copy", "-q", "--src-creds", &creds, "--dest-decompress", &format!("docker://{image}")])
        .arg(format!("dir:{}", layout.display())));
    let manifest: serde_json::Value =
        serde_json::from_slice(&std::fs::read(layout.join("manifest.json")).unwrap()).unwrap();
    for layer in manifest["layers"].as_array().unwrap() {
        let blob = layout.join(layer["digest"].as_str().unwrap().trim_start_matches("sha256:"));
        run(Command::new("tar").arg("-xf").arg(blob).arg("-C").arg(&files));
    }
    Pulled { manifest, data: files.join("data") }
}
