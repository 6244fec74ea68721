//! Flags of `hone serve` -> how a model is served.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::parser::ValueSource;
use clap::{ArgMatches, Args};

use super::command::{Command, RegistryArguments};
use super::job::{assignments, origin, setting, settings};
use super::size::ServingSize;
use super::values::{positive, wrong};
use crate::serving;
use crate::spec::Request;

/// Serve a model with adapters over HTTP: OpenAI's API, KAITO's /chat, and a page to talk to it
#[derive(Args)]
#[command(after_help = "Examples:\n  hone serve ./phi-3 --adapter support=./adapter\n  \
    hone serve hf://microsoft/phi-4 --adapter a=./a --adapter b=oci://registry.example.com/adapters/b:1 \\\n    \
    --mix both=a:0.7,b:0.3 --listen 0.0.0.0:5000")]
pub(super) struct Serve {
    /// Base model: a folder, hf://OWNER/NAME, oci://IMAGE or preset:NAME
    #[arg(value_name = "MODEL", env = "HONE_MODEL")]
    model: String,
    /// Name of the base in requests [default: derived from MODEL]
    #[arg(long, value_name = "NAME", env = "HONE_NAME")]
    name: Option<String>,
    /// An adapter's name and address: a folder, oci://IMAGE or hf://OWNER/NAME; may be repeated
    #[arg(long, value_name = "NAME=SOURCE", env = "HONE_ADAPTER", value_delimiter = ' ')]
    adapter: Vec<String>,
    /// Name of a weighted sum of adapters, each with its strength; may be repeated
    #[arg(long, value_name = "NAME=A:0.7,B:0.3", env = "HONE_MIX", value_delimiter = ' ')]
    mix: Vec<String>,
    /// Name of the model, adapter or mix that answers requests without a model [default: the only mix, or the base]
    #[arg(long, value_name = "NAME", env = "HONE_DEFAULT")]
    default: Option<String>,
    /// JSON file with adapters and mixes; the server follows its changes (docs/serving.md)
    #[arg(long, value_name = "FILE", env = "HONE_ADAPTERS_FILE")]
    adapters_file: Option<PathBuf>,
    /// Address and port to listen on
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:8000", env = "HONE_LISTEN")]
    listen: SocketAddr,
    /// Second address that answers GET /v1/models without the key, for an internal network
    #[arg(long, value_name = "ADDRESS:PORT", env = "HONE_STATUS")]
    status: Option<SocketAddr>,
    /// Device: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", env = "HONE_DEVICE")]
    device: Option<String>,
    /// Folder for downloads
    #[arg(long, value_name = "DIR", env = "HONE_CACHE")]
    cache: Option<String>,
    /// Use of a prompt by /chat: template (as a message of the chat template) or raw (continued as it is)
    #[arg(long, value_name = "HOW", default_value = "template", env = "HONE_CHAT", value_parser = ["template", "raw"])]
    chat: String,
    #[command(flatten)]
    size: ServingSize,
    /// Largest number of requests that wait; further requests are answered with 429
    #[arg(long, value_name = "COUNT", default_value = "1024", env = "HONE_WAITING", value_parser = positive)]
    waiting: usize,
    /// Allow requests to change adapters and mixes: images, repositories of the hub, and folders below this one
    #[arg(long, value_name = "DIR", env = "HONE_ALLOW_ADAPTER_CHANGES")]
    allow_adapter_changes: Option<PathBuf>,
    /// Key that clients must send as Authorization: Bearer KEY; prefer the variable, because lists of processes show
    /// flags
    #[arg(long, value_name = "KEY", env = "HONE_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Origin of web pages that may ask this server; * allows all; may be repeated
    #[arg(long, value_name = "ORIGIN", env = "HONE_ALLOWED_ORIGINS", value_delimiter = ',')]
    allowed_origins: Vec<String>,
    /// Certificate chain (PEM), for HTTPS
    #[arg(long, value_name = "FILE", env = "HONE_TLS_CHAIN", requires = "tls_key")]
    tls_chain: Option<PathBuf>,
    /// Private key of the certificate (PEM)
    #[arg(long, value_name = "FILE", env = "HONE_TLS_KEY", requires = "tls_chain")]
    tls_key: Option<PathBuf>,
    /// Seconds that running answers have to finish after SIGTERM
    #[arg(long, value_name = "SECONDS", default_value = "25", env = "HONE_GRACE")]
    grace: u32,
    #[command(flatten)]
    registry: RegistryArguments,
    /// Any key: --set QuantizationConfig.load_in_4bit=false; may be repeated
    #[arg(long, value_name = "SECTION.KEY=VALUE", env = "HONE_SET")]
    set: Vec<String>,
}

/// A key as a header can hold it. Files and Secrets often end with a line break, which is no part of it.
fn key(text: &str) -> Result<String, String> {
    let key = text.trim();
    // An empty Secret must not leave the server open.
    if key.is_empty() {
        return Err("--api-key (HONE_API_KEY) is empty: give a key, or remove it to serve without one".into());
    }
    match key.chars().all(|c| c == ' ' || c.is_ascii_graphic()) {
        true => Ok(key.to_owned()),
        false => {
            Err("--api-key (HONE_API_KEY): expected visible ASCII characters, since it is sent in a header"
                .into())
        }
    }
}

impl Serve {
    pub(super) fn command(self, matches: &ArgMatches) -> Result<Command, String> {
        let request = self.request(matches)?;
        Ok(Command::Serve { request, options: Box::new(self.options()?) })
    }

    fn request(&self, matches: &ArgMatches) -> Result<Request, String> {
        let mut settings = settings(matches);
        let variable = matches.value_source("set") == Some(ValueSource::EnvVariable);
        for given in &self.set {
            let all = if variable { assignments(given).collect() } else { vec![given.as_str()] };
            for assignment in all {
                settings.push(setting(assignment, origin(matches, "set"))?);
            }
        }
        Ok(Request { settings, ..Request::default() })
    }

    fn options(self) -> Result<serving::Options, String> {
        let pair = |flag: &str, text: &String, expected: &str| match text.split_once('=') {
            Some((name, rest)) if !name.is_empty() && !rest.is_empty() => {
                Ok((name.to_owned(), rest.to_owned()))
            }
            _ => Err(wrong(flag, text, expected)),
        };
        let part = |text: &str| {
            let (name, strength) = text.split_once(':')?;
            let strength = strength.parse::<f32>().ok().filter(|s| (-16.0..=16.0).contains(s))?;
            Some((name.to_owned(), strength))
        };
        let key = self.api_key.as_deref().map(key).transpose()?;
        if let Some(text) = self.allowed_origins.iter().find(|text| !crate::server::is_origin(text)) {
            return Err(wrong(
                "allowed-origins",
                text,
                "SCHEME://HOST[:PORT], such as https://chat.example.com, or *",
            ));
        }
        let adapters = self.adapter.iter().map(|text| pair("adapter", text, "NAME=SOURCE"));
        let mut mixes = Vec::new();
        for text in &self.mix {
            const EXPECTED: &str = "NAME=A:STRENGTH,B:STRENGTH, such as both=a:0.7,b:0.3";
            let (name, parts) = pair("mix", text, EXPECTED)?;
            let parts: Option<Vec<_>> = parts.split(',').map(part).collect();
            mixes.push((name, parts.ok_or_else(|| wrong("mix", text, EXPECTED))?));
        }
        Ok(serving::Options {
            adapters: adapters.collect::<Result<_, _>>()?,
            mixes,
            default: self.default,
            status: self.status,
            adapters_file: self.adapters_file,
            size: self.size.size(),
            waiting: self.waiting,
            raw_chat: self.chat == "raw",
            adapter_folder: self.allow_adapter_changes,
            grace: std::time::Duration::from_secs(self.grace.into()),
            server: crate::server::Options {
                listen: self.listen,
                tls: self.tls_chain.zip(self.tls_key),
                key,
                origins: self.allowed_origins,
                ..crate::server::Options::default()
            },
        })
    }
}
