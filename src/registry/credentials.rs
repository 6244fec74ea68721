//! Registry + docker's configuration files -> a login and its source. No secret is ever shown.
//!
//! Order: HONE_REGISTRY_USERNAME and HONE_REGISTRY_PASSWORD; the file given as an option (then no other file);
//! DOCKER_CONFIG; REGISTRY_AUTH_FILE; ~/.docker; KAITO's mounts below /root/.docker; podman's auth.json. After a
//! folder's `config.json` come the files of its `config.d`. The first file that knows the registry decides.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use docker_credential::DockerCredential;
use oci_client::Reference;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::fault::{Fault, Result};
use crate::interrupt;
use crate::plain;

/// LIMIT: time of a credential helper; one that asks a cloud takes a second or two.
const HELPER_TIMEOUT: Duration = Duration::from_secs(10);
const HELPER_POLL: Duration = Duration::from_millis(20);
/// LIMIT: size of a helper's answer; tokens have a few kilobytes.
const HELPER_ANSWER_BYTES_MAX: u64 = 64 << 10;
/// LIMIT: size of a configuration file.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// A login and its source.
#[derive(Clone)]
pub(super) struct Credential {
    /// The login.
    pub login: Login,
    /// For messages: a file, an environment variable or a helper; without a login, the places that were searched.
    pub source: String,
}

/// The credentials that the registry is shown.
#[derive(Clone, PartialEq)]
pub(super) enum Login {
    /// No credentials.
    Anonymous,
    /// A user name with a password.
    Password { username: String, password: String },
    /// A refresh token, to be exchanged for a registry token.
    IdentityToken(String),
}

impl Login {
    /// Returns the texts that must never appear in a message.
    pub(super) fn secrets(&self) -> Vec<String> {
        match self {
            Login::Anonymous => Vec::new(),
            Login::Password { password, .. } => vec![password.clone()],
            Login::IdentityToken(token) => vec![token.clone()],
        }
    }
}

/// Finds the login for the registry of an image.
///
/// # Errors
/// Auth: a file that was named is missing, a file is malformed, or a helper failed.
pub(super) fn find(reference: &Reference, docker_config: Option<&Path>) -> Result<Credential> {
    find_in(reference, docker_config, &|name| std::env::var_os(name), Path::new("/root"))
}

fn find_in(
    reference: &Reference,
    docker_config: Option<&Path>,
    variable: &dyn Fn(&str) -> Option<OsString>,
    kaito_home: &Path,
) -> Result<Credential> {
    if let Some(credential) = from_environment(variable)? {
        return Ok(credential);
    }
    let mut searched = Vec::new();
    for file in files(docker_config, variable, kaito_home)? {
        if let Some((login, how)) = from_file(&file, reference)? {
            return Ok(Credential { login, source: format!("{how}{}", file.display()) });
        }
        searched.push(file.display().to_string());
    }
    let source = match searched.is_empty() {
        true => "no docker config.json was found".to_string(),
        false => format!("{} has no entry for {}", searched.join(", "), reference.registry()),
    };
    Ok(Credential { login: Login::Anonymous, source })
}

fn from_environment(variable: &dyn Fn(&str) -> Option<OsString>) -> Result<Option<Credential>> {
    let text =
        |name| variable(name).and_then(|value| value.into_string().ok()).filter(|value| !value.is_empty());
    match (text("HONE_REGISTRY_USERNAME"), text("HONE_REGISTRY_PASSWORD")) {
        (None, None) => Ok(None),
        (Some(username), Some(password)) => Ok(Some(Credential {
            login: Login::Password { username, password },
            source: "HONE_REGISTRY_USERNAME and HONE_REGISTRY_PASSWORD".into(),
        })),
        _ => Err(Fault::auth("only one of HONE_REGISTRY_USERNAME and HONE_REGISTRY_PASSWORD is set")
            .help("set both, or none")),
    }
}

/// Returns existing files, in order of precedence.
fn files(
    docker_config: Option<&Path>,
    variable: &dyn Fn(&str) -> Option<OsString>,
    kaito_home: &Path,
) -> Result<Vec<PathBuf>> {
    if let Some(path) = docker_config {
        let files = with_more(path);
        return match files.is_empty() {
            false => Ok(files),
            true => Err(Fault::auth(format!(
                "{} is neither a docker config.json nor a folder with one",
                path.display()
            ))
            .help("mount the push secret there (key `.dockerconfigjson` or `config.json`)")),
        };
    }
    let under = |name: &str, rest: &str| variable(name).map(|folder| PathBuf::from(folder).join(rest));
    let places = [
        under("DOCKER_CONFIG", ""),
        variable("REGISTRY_AUTH_FILE").map(PathBuf::from),
        under("HOME", ".docker"),
        Some(kaito_home.join(".docker")),
        under("XDG_RUNTIME_DIR", "containers/auth.json"),
    ];
    let mut found: Vec<PathBuf> = Vec::new();
    for file in places.into_iter().flatten().flat_map(|place| with_more(&place)) {
        if !found.contains(&file) {
            found.push(file);
        }
    }
    Ok(found)
}

/// Returns a place's own file, then the files of `config.d` beside it or one folder further down, sorted. KAITO's
/// puller mounts one for each pull secret of an input.
fn with_more(place: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = in_place(place).into_iter().collect();
    for below in ["config.d/*.json", "config.d/*/*.json"] {
        let pattern = format!("{}/{below}", glob::Pattern::escape(&place.to_string_lossy()));
        let found = glob::glob(&pattern).into_iter().flatten().flatten();
        files.extend(found.filter(|path| path.is_file()));
    }
    files
}

/// Returns the file itself, or the file in this folder: docker's name, or the key of a Kubernetes pull secret.
fn in_place(place: &Path) -> Option<PathBuf> {
    [place.to_path_buf(), place.join("config.json"), place.join(".dockerconfigjson")]
        .into_iter()
        .find(|path| path.is_file())
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ConfigFile {
    #[serde(default)]
    auths: HashMap<String, Value>,
    #[serde(default)]
    cred_helpers: HashMap<String, String>,
    creds_store: Option<String>,
}

/// Returns the login, and the name of the helper if one was asked.
fn from_file(path: &Path, reference: &Reference) -> Result<Option<(Login, String)>> {
    let config = read(path)?;
    let keys = keys(reference);
    let helper = keys
        .iter()
        .find_map(|key| Some((key.clone(), config.cred_helpers.get(key)?.clone())))
        .filter(|(_, helper)| !helper.is_empty());
    if let Some((server, helper)) = helper {
        return from_helper(&helper, &server, path);
    }
    for key in &keys {
        if let Some(login) =
            config.auths.get(key).map(|entry| decode(key, entry, path)).transpose()?.flatten()
        {
            return Ok(Some((login, String::new())));
        }
    }
    match config.creds_store.filter(|store| !store.is_empty()) {
        Some(store) => from_helper(&store, &server_name(reference), path),
        None => Ok(None),
    }
}

fn read(path: &Path) -> Result<ConfigFile> {
    let wrong = |what: String| {
        Fault::auth(format!("{}: {what}", path.display()))
            .help("expected docker's config.json: {\"auths\": {...}}")
    };
    let mut text = Vec::new();
    plain::open(path)
        .and_then(|file| file.take(CONFIG_BYTES_MAX).read_to_end(&mut text))
        .map_err(|error| wrong(error.to_string()))?;
    // The parser's own message may quote a value, which may be a password, so only the position is shown.
    serde_json::from_slice(&text)
        .map_err(|error| wrong(format!("wrong JSON at line {}, column {}", error.line(), error.column())))
}

/// Returns the names of a registry in these files, most specific first (podman adds repositories to the host).
fn keys(reference: &Reference) -> Vec<String> {
    let hosts: Vec<&str> = match reference.registry() {
        "docker.io" => vec!["index.docker.io", "docker.io", "registry-1.docker.io"],
        host => vec![host],
    };
    let mut keys = Vec::new();
    for host in &hosts {
        let mut path = reference.repository();
        loop {
            keys.push(format!("{host}/{path}"));
            match path.rsplit_once('/') {
                Some((parent, _)) => path = parent,
                None => break,
            }
        }
    }
    for host in &hosts {
        keys.push(host.to_string());
        for scheme in ["https", "http"] {
            keys.extend(["", "/", "/v1/", "/v1", "/v2/", "/v2"].map(|end| format!("{scheme}://{host}{end}")));
        }
    }
    keys
}

/// Returns the server name that docker passes to a helper.
fn server_name(reference: &Reference) -> String {
    match reference.registry() {
        "docker.io" => "https://index.docker.io/v1/".into(),
        host => host.into(),
    }
}

/// Reads an entry of `auths`. An empty entry only means that a credential store has the login.
fn decode(key: &str, entry: &Value, path: &Path) -> Result<Option<Login>> {
    let text = |field: &str| entry[field].as_str().filter(|text| !text.is_empty());
    if ["auth", "identitytoken", "username"].iter().all(|field| text(field).is_none()) {
        return Ok(None);
    }
    let mut entry = entry.clone();
    if let Some(fields) = entry.as_object_mut() {
        fields.retain(|_, value| value.as_str() != Some(""));
    }
    let alone = json!({ "auths": { key: entry } }).to_string();
    match docker_credential::get_credential_from_reader(alone.as_bytes(), key) {
        Ok(DockerCredential::UsernamePassword(username, password)) => {
            Ok(Some(Login::Password { username, password }))
        }
        Ok(DockerCredential::IdentityToken(token)) => Ok(Some(Login::IdentityToken(token))),
        Err(error) => Err(Fault::auth(format!("{}: entry `{key}`: {error}", path.display()))
            .help("`auth` is base64 of `username:password`; log in again to write it")),
    }
}

fn from_helper(helper: &str, server: &str, path: &Path) -> Result<Option<(Login, String)>> {
    let program = format!("docker-credential-{helper}");
    if helper.contains('/') {
        return Err(Fault::auth(format!(
            "{}: `{helper}` is not the name of a credential helper",
            path.display()
        )));
    }
    let answer = ask(Command::new(&program), server, HELPER_TIMEOUT)
        .map_err(|what| Fault::auth(format!("{program}, named by {}, {what}", path.display())))?;
    Ok(answer.map(|login| (login, format!("{program}, named by "))))
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    username: String,
    secret: String,
}

/// Runs a helper's `get`. Its output may hold a secret and is not shown. Returns `None` if the helper does not know
/// the server.
fn ask(mut program: Command, server: &str, timeout: Duration) -> std::result::Result<Option<Login>, String> {
    let mut child = program
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| format!("cannot be run: {error}"))?;
    // A helper may answer without reading its input; the pipe is closed in any case.
    let _ = child.stdin.take().map(|mut input| input.write_all(server.as_bytes()));
    let output = child.stdout.take().expect("standard output is piped");
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut answer = Vec::new();
        let read = output.take(HELPER_ANSWER_BYTES_MAX).read_to_end(&mut answer);
        // After a timeout there is no receiver.
        let _ = sender.send(read.map(|_| answer));
    });
    let until = Instant::now() + timeout;
    let answer = loop {
        match receiver.recv_timeout(HELPER_POLL) {
            Err(mpsc::RecvTimeoutError::Timeout) if Instant::now() < until && !interrupt::requested() => {}
            ended => break ended,
        }
    };
    // A helper that has answered may take a moment to end, but not longer.
    let status = loop {
        match child.try_wait().map_err(|error| format!("could not be waited for: {error}"))? {
            Some(status) => break status,
            None if answer.is_ok() && Instant::now() < until && !interrupt::requested() => {
                std::thread::sleep(HELPER_POLL);
            }
            None => {
                // The helper may have ended by itself just now.
                let _ = child.kill();
                let _ = child.wait();
                return Err(match answer {
                    Ok(_) => format!("answered and did not end in {timeout:?}"),
                    Err(_) => format!("gave no answer in {timeout:?}"),
                });
            }
        }
    };
    let answer = match answer {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => return Err(format!("gave no answer: {error}")),
        Err(_) => return Err(format!("gave no answer in {timeout:?}")),
    };
    if !status.success() {
        let unknown = String::from_utf8_lossy(&answer).contains("credentials not found");
        return if unknown { Ok(None) } else { Err(format!("failed ({status}); run it by hand to see why")) };
    }
    let HelperAnswer { username, secret } = serde_json::from_slice(&answer)
        .map_err(|_| "gave an answer that is not {Username, Secret}".to_string())?;
    Ok(Some(match username.as_str() {
        "<token>" => Login::IdentityToken(secret),
        _ => Login::Password { username, password: secret },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::Kind;

    /// base64 of `tester:canary`.
    const AUTH: &str = "dGVzdGVyOmNhbmFyeQ==";

    fn reference(text: &str) -> Reference {
        super::super::reference::parse_reference(text).unwrap()
    }

    fn nothing(_: &str) -> Option<OsString> {
        None
    }

    /// Returns the login found for an image in one configuration, as `username:password`.
    fn login(config: Value, image: &str) -> Result<String> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let found = find_in(&reference(image), Some(folder.path()), &nothing, Path::new("/nonexistent"))?;
        Ok(match found.login {
            Login::Anonymous => "anonymous".into(),
            Login::Password { username, password } => format!("{username}:{password}"),
            Login::IdentityToken(token) => format!("token {token}"),
        })
    }

    #[test]
    fn every_spelling_of_a_registry_is_found() {
        for key in [
            "reg.io",
            "https://reg.io",
            "https://reg.io/v1/",
            "http://reg.io/v2/",
            "reg.io/team",
            "reg.io/team/a",
        ] {
            assert_eq!(
                login(json!({ "auths": { key: { "auth": AUTH } } }), "reg.io/team/a").unwrap(),
                "tester:canary",
                "{key}"
            );
        }
        for key in ["https://index.docker.io/v1/", "docker.io", "registry-1.docker.io"] {
            assert_eq!(
                login(json!({ "auths": { key: { "auth": AUTH } } }), "team/a").unwrap(),
                "tester:canary",
                "{key}"
            );
        }
        for key in ["reg.io:5000", "other.io", "reg.io/te"] {
            assert_eq!(
                login(json!({ "auths": { key: { "auth": AUTH } } }), "reg.io/team/a").unwrap(),
                "anonymous",
                "{key}"
            );
        }
    }

    #[test]
    fn every_form_of_an_entry_is_read() {
        let entry = |entry: Value| login(json!({ "auths": { "reg.io": entry } }), "reg.io/a");
        assert_eq!(entry(json!({ "username": "u", "password": "p" })).unwrap(), "u:p");
        assert_eq!(
            entry(json!({ "username": "tester", "password": "canary", "email": "", "auth": AUTH })).unwrap(),
            "tester:canary"
        );
        assert_eq!(entry(json!({ "auth": AUTH, "identitytoken": "t" })).unwrap(), "token t");
        assert_eq!(entry(json!({})).unwrap(), "anonymous");
        assert_eq!(entry(json!({ "auth": "" })).unwrap(), "anonymous");
        for bad in [json!({ "auth": "%%" }), json!({ "auth": "bm9jb2xvbg==" })] {
            assert_eq!(entry(bad).unwrap_err().kind, Kind::Auth);
        }
    }

    #[test]
    fn malformed_files_are_named_without_their_content() {
        let fault = login(json!({ "auths": { "reg.io": "canary" }, "credHelpers": "canary" }), "reg.io/a")
            .unwrap_err();
        assert_eq!(fault.kind, Kind::Auth);
        assert!(fault.message.contains("config.json: wrong JSON at line 1"), "{fault}");
        assert!(!fault.to_string().contains("canary"), "{fault}");
        let missing =
            find_in(&reference("reg.io/a"), Some(Path::new("/nonexistent")), &nothing, Path::new("/"));
        assert_eq!(missing.err().unwrap().kind, Kind::Auth);
    }

    #[test]
    fn places_are_searched_in_order() {
        let home = tempfile::tempdir().unwrap();
        let write = |path: &str, user: &str| {
            let path = home.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(
                path,
                json!({ "auths": { "reg.io": { "username": user, "password": "p" } } }).to_string(),
            )
            .unwrap();
        };
        let username = |variables: &[(&str, String)]| {
            let variable = |name: &str| {
                let found = variables.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| OsString::from(value))
            };
            match find_in(&reference("reg.io/a"), None, &variable, &home.path().join("root")).unwrap().login {
                Login::Password { username, .. } => username,
                _ => "none".into(),
            }
        };
        let at = |path: &str| home.path().join(path).display().to_string();
        assert_eq!(username(&[]), "none");
        write("root/.docker/config.d/secret/push.json", "secret-folder");
        assert_eq!(username(&[]), "secret-folder");
        write("mounts/config.d/b.json", "second");
        assert_eq!(username(&[("DOCKER_CONFIG", at("mounts"))]), "second", "no config.json is needed");
        std::fs::write(home.path().join("mounts/config.json"), r#"{"auths": {"else.io": {}}}"#).unwrap();
        std::fs::write(home.path().join("mounts/config.d/a.json"), "{}").unwrap();
        assert_eq!(
            username(&[("DOCKER_CONFIG", at("mounts"))]),
            "second",
            "an entry in any of them is found"
        );
        let given = find_in(
            &reference("reg.io/a"),
            Some(&home.path().join("mounts")),
            &|_| None,
            &home.path().join("root"),
        );
        assert!(given.unwrap().source.ends_with("mounts/config.d/b.json"));
        write("root/.docker/config.json", "kaito");
        assert_eq!(username(&[]), "kaito");
        write("home/.docker/config.json", "home");
        assert_eq!(username(&[("HOME", at("home"))]), "home");
        write("auth.json", "podman");
        assert_eq!(username(&[("HOME", at("home")), ("REGISTRY_AUTH_FILE", at("auth.json"))]), "podman");
        write("secret/.dockerconfigjson", "mounted");
        let all = [
            ("HOME", at("home")),
            ("DOCKER_CONFIG", at("secret")),
            ("HONE_REGISTRY_USERNAME", "variable".into()),
            ("HONE_REGISTRY_PASSWORD", "p".into()),
        ];
        assert_eq!(username(&all[..2]), "mounted");
        assert_eq!(username(&all), "variable");
        let half = from_environment(&|name| (name == "HONE_REGISTRY_USERNAME").then(|| "u".into()));
        assert_eq!(half.err().unwrap().kind, Kind::Auth);
    }

    #[test]
    fn helpers_answer_fail_and_hang_without_showing_what_they_print() {
        let helper = |script: &str| {
            let mut program = Command::new("sh");
            program.args(["-c", script]);
            ask(program, "reg.io", Duration::from_millis(150))
        };
        assert!(
            helper(r#"read s; echo "{\"Username\":\"u\",\"Secret\":\"$s\"}""#).unwrap().unwrap()
                == Login::Password { username: "u".into(), password: "reg.io".into() }
        );
        assert!(
            helper(r#"echo '{"Username":"<token>","Secret":"t"}'"#).unwrap().unwrap()
                == Login::IdentityToken("t".into())
        );
        assert!(helper("echo credentials not found in native keychain; exit 1").unwrap().is_none());
        let began = std::time::Instant::now();
        let closed = r#"echo '{"Username":"u","Secret":"s"}'; exec sleep 5 >&-"#;
        assert!(
            helper(closed).err().unwrap().contains("did not end"),
            "its output is closed, and it lives on"
        );
        assert!(began.elapsed() < Duration::from_secs(4));
        for script in ["echo canary; echo canary >&2; exit 3", "echo canary", "echo canary; exec sleep 5"] {
            let message = helper(script).err().expect(script);
            assert!(!message.contains("canary"), "{message}");
        }
    }
}
