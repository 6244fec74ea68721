//! The request of `hone serve` -> a server that answers with the model until a signal ends it.

mod identity;
pub mod live;
pub mod room;
mod preview;

pub use preview::{Preview, preview};

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use candle_core::Device;

use crate::adapter;
use crate::dataset::{Chat, Tokenizer};
use crate::device;
use crate::endpoint::{self, Reply};
use crate::fault::{Fault, Result};
use crate::fetch;
use crate::generate::Strength;
use crate::generate::defaults::Defaults;
use crate::generate::engine::{self, Engine};
use crate::interrupt::{self, Standing};
use crate::memory::Machine;
use crate::memory::serving::Plan;
use crate::model::load;
use crate::plan::Serving;
use crate::report::{Report, Stage};
use crate::server::model::{Bring, Brought, Named, Origin};
use crate::server::{self, Model, Server};
use crate::words::size;
use live::Live;
use room::Size;

const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// Settings of a server.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Options of the server's listener.
    pub server: server::Options,
    /// Name and source: a folder, `oci://IMAGE` or `hf://OWNER/NAME`.
    pub adapters: Vec<(String, String)>,
    /// Name and parts.
    pub mixes: Vec<(String, Vec<(String, f32)>)>,
    /// The id that answers requests that name none; `None`: the only mix, else the base.
    pub default: Option<String>,
    /// Address that answers `GET /v1/models` without a key; `None`: there is none.
    pub status: Option<SocketAddr>,
    /// Adapters and mixes that are followed while the server runs.
    pub adapters_file: Option<PathBuf>,
    /// The size of the server.
    pub size: Size,
    /// Most requests that wait.
    pub waiting: usize,
    /// Whether `/chat` continues a prompt as it is.
    pub raw_chat: bool,
    /// Requests may load adapters from below this folder, and from images.
    pub adapter_folder: Option<PathBuf>,
    /// The time that running answers may take after a signal.
    pub grace: Duration,
}

/// Serves until a signal comes. Listens before it loads.
///
/// # Errors
/// The reason that keeps the model or an adapter from being served.
pub fn run(plan: &Serving, options: &Options, report: &Report) -> Result<()> {
    check_names(plan, options)?;
    check_adapter_folder(options.adapter_folder.as_deref())?;
    tell_of_empty_mixes(options, report);
    let server = Server::start(&options.server)?;
    let scheme = if options.server.tls.is_some() { "https" } else { "http" };
    let address = server.address();
    report.note(Stage::Load, format!("listening on {scheme}://{address}; loading the model"));
    let loads = interrupt::stands(Standing::Looking); // nobody has asked anything yet
    let model = Arc::new(model(plan, options, report)?);
    let live = options.adapters_file.as_deref();
    let live = live.map(|file| Live::start(file, model.clone(), bring(plan, report), report)).transpose()?;
    drop(loads);
    server.ready(model.clone());
    live.map(Live::follow).transpose()?;
    let _status = options.status.map(|address| status(address, model.clone(), report)).transpose()?;
    report.note(Stage::Load, format!("ready: {} at {scheme}://{address}", model.names().join(", ")));
    while !interrupt::requested() {
        if let Some(fault) = model.engine.failure() {
            return Err(fault);
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
    report
        .note(Stage::Load, format!("shutting down: {} answers are still being generated", server.running()));
    server.drain(options.grace);
    Ok(())
}

/// Answers `GET /v1/models` for the operator of the server. Only the server's own network should reach the address.
fn status(address: SocketAddr, model: Arc<Model>, report: &Report) -> Result<endpoint::Server> {
    let answer: endpoint::Answer = Arc::new(move |asked| match asked.path {
        "/v1/models" => Reply::json(&server::models(&model)),
        _ => Reply::not_found(),
    });
    let server = endpoint::start(address, answer)?;
    report.note(Stage::Load, format!("status: http://{}/v1/models, without a key", server.address()));
    Ok(server)
}

/// Checks that names differ and that the parts of a mix exist.
fn check_names(plan: &Serving, options: &Options) -> Result<()> {
    let adapters = options.adapters.iter().map(|(name, _)| name);
    let names: Vec<&String> =
        [&plan.model_name].into_iter().chain(adapters).chain(options.mixes.iter().map(|(n, _)| n)).collect();
    if plan.model_name.trim().is_empty() || plan.model_name.contains(char::is_control) {
        return Err(Fault::usage(format!(
            "--name {:?}: requests cannot name the base by it",
            plan.model_name
        ))
        .help("give a name, or leave --name out: it is derived from MODEL"));
    }
    for (at, name) in names.iter().enumerate() {
        if at > 0 && !server::is_name(name) {
            return Err(Fault::usage(format!("the name {name:?}: {}", server::NAME_RULE)));
        }
        if names[..at].contains(name) {
            return Err(Fault::usage(format!("the name {name:?} is used twice"))
                .help("give the model, each adapter and each mix a name of its own"));
        }
    }
    for (mix, parts) in &options.mixes {
        for (at, (part, _)) in parts.iter().enumerate() {
            if parts[..at].iter().any(|(other, _)| other == part) {
                return Err(Fault::usage(format!("--mix {mix}: {part:?} is listed twice"))
                    .help("give it once, with the sum of its strengths"));
            }
            if !options.adapters.iter().any(|(name, _)| name == part) {
                return Err(Fault::usage(format!("--mix {mix}: there is no adapter {part:?}"))
                    .help("name adapters that --adapter loads"));
            }
        }
    }
    // A file of adapters may have it; the file is read later.
    let missing = |default: &&String| !names.contains(default) && options.adapters_file.is_none();
    if let Some(default) = options.default.as_ref().filter(missing) {
        return Err(Fault::usage(format!("--default {default}: there is no model of this name"))
            .help(format!("one of {}", names.into_iter().cloned().collect::<Vec<_>>().join(", "))));
    }
    Ok(())
}

/// A mix that adds nothing is served, since strengths may change later, but not in silence.
fn tell_of_empty_mixes(options: &Options, report: &Report) {
    let empty = |parts: &[(String, f32)]| parts.iter().all(|(_, strength)| *strength == 0.0);
    for (mix, _) in options.mixes.iter().filter(|(_, parts)| empty(parts)) {
        report.warn(Stage::Load, format!("--mix {mix}: every strength is 0, so that it answers as the base"));
    }
}

fn model(plan: &Serving, options: &Options, report: &Report) -> Result<Model> {
    let access = fetch::Access { source: &plan.source, registry: &plan.registry };
    let folder = fetch::weights(&plan.base, access, report)?;
    let device = device::open(plan.device, report)?;
    let tokenizer = Tokenizer::open(&folder)?;
    let chat = Chat::of(&tokenizer, plan.chat_template.as_deref())?;
    if chat.is_none() {
        let told =
            "the model has no chat template: /v1/chat/completions is refused, /chat continues its prompt";
        report.warn(Stage::Load, told);
    }
    let defaults = Defaults::read(&folder, &tokenizer, chat.as_ref())?;
    let bring = bring(plan, report);
    // A missing adapter is reported before gigabytes are loaded.
    let adapters = options.adapters.iter().map(|(name, source)| Ok((name, source, bring(source)?)));
    let adapters = adapters.collect::<Result<Vec<_>>>()?;
    let machine = Machine::of(&device, plan.memory_limit);
    let bytes = adapters
        .iter()
        .map(|(_, _, brought)| room::adapter_bytes(&brought.folder, machine.place, plan.model.precision));
    let described = room::describe(plan, &folder)?;
    let divided = room::divide(plan, &options.size, &described, bytes.sum::<Result<u64>>()?, &machine)?;
    report.note(
        Stage::Load,
        format!("{} of {}: {}", size(divided.bytes()), size(divided.memory), divided.choice()),
    );
    let engine = Arc::new(engine(plan, &folder, options, &described, &divided, &device, report)?);
    let part = |(name, strength): &(String, f32)| Strength { name: name.clone(), strength: *strength };
    let mixes = options.mixes.iter().map(|(name, parts)| (name.clone(), parts.iter().map(part).collect()));
    let model = Model {
        name: plan.model_name.clone(),
        engine,
        tokenizer,
        chat,
        defaults,
        named: Named::new(options.default.clone(), mixes.collect()),
        raw_chat: options.raw_chat,
        bring: options.adapter_folder.clone().map(|root| confined(root, bring.clone())),
    };
    for (name, source, brought) in adapters {
        let digest = brought.origin.digest.clone();
        let adapter = model.load_adapter(name, brought).map_err(|fault| fault.at(source))?;
        report.note(
            Stage::Load,
            format!("Adapter added: {name} (rank {}, from {source}, {digest})", adapter.rank),
        );
    }
    Ok(model)
}

fn engine(
    plan: &Serving,
    folder: &Path,
    options: &Options,
    described: &room::Described,
    divided: &Plan,
    device: &Device,
    report: &Report,
) -> Result<Engine> {
    let mut model = plan.model.clone();
    model.folder = folder.to_owned();
    model.quantization = described.quantization;
    let description = format!("{:?} on {}", model.quantization, device::name(device));
    let decoder = load::load(described.facts.clone(), &model, device, report)?;
    let sizes = engine::Options {
        sequences: options.size.sequences,
        waiting: options.waiting,
        context: Some(divided.context),
        cache_tokens: divided.cache_tokens,
        cache: divided.cache,
    };
    Engine::start(decoder, &sizes, description, report)
}

/// Returns a folder as it is; images and repositories of the hub from the cache, fetched if they are not there. An
/// image that names another base is refused.
fn bring(plan: &Serving, report: &Report) -> Bring {
    let (registry, source, report) = (plan.registry.clone(), plan.source.clone(), report.clone());
    let mut served = match &plan.base {
        fetch::Model::Folder(_) => vec![plan.base.name()],
        base => vec![base.to_string()],
    };
    served.extend(Some(plan.model_name.clone()).filter(|name| *name != served[0]));
    Arc::new(move |text: &str| {
        let access = fetch::Access { source: &source, registry: &registry };
        let adapter = fetch::Adapter::parse(text)?;
        let brought = fetch::adapter(&adapter, access, &report)?;
        if let Some(warning) = identity::check(&adapter.to_string(), &brought.bases, &served)? {
            report.warn(Stage::Load, warning);
        }
        if brought.bases.is_empty()
            && let Some(warning) =
                identity::warning(&adapter.to_string(), &adapter::base_model(&brought.folder), &served)
        {
            report.warn(Stage::Load, warning);
        }
        let origin = Origin { source: adapter.to_string(), digest: brought.digest };
        Ok(Brought { folder: brought.folder, origin })
    })
}

/// Refuses a folder of --allow-adapter-changes that is not there, before requests for its adapters fail one by one.
fn check_adapter_folder(folder: Option<&Path>) -> Result<()> {
    match folder {
        Some(folder) if !folder.is_dir() => {
            Err(Fault::config(format!("--allow-adapter-changes: there is no folder {}", folder.display()))
                .help("create it, or name the folder that holds the adapters"))
        }
        _ => Ok(()),
    }
}

/// Returns the sources that a request may name: a folder below `root`, no link out of it; an image of a registry; or
/// hf://OWNER/NAME.
fn confined(root: PathBuf, bring: Bring) -> Bring {
    Arc::new(move |source: &str| {
        let remote = source.starts_with("hf://") || source.starts_with("oci://");
        if remote && fetch::Adapter::parse(source)?.is_remote() {
            return bring(source);
        }
        let outside = || {
            Fault::config(format!("adapter {source:?} is no folder below that of --allow-adapter-changes"))
        };
        let root = root.canonicalize().map_err(|_| outside())?;
        let folder = root.join(source).canonicalize().map_err(|_| outside())?;
        match folder.starts_with(&root) && folder.is_dir() {
            true => bring(&folder.to_string_lossy()),
            false => Err(outside()),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_names_only_folders_below_the_root() {
        let all: Bring =
            Arc::new(|path| Ok(Brought { folder: PathBuf::from(path), origin: Origin::default() }));
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        std::fs::create_dir_all(root.join("a")).unwrap();
        std::fs::create_dir_all(folder.path().join("other")).unwrap();
        std::os::unix::fs::symlink(folder.path().join("other"), root.join("link")).unwrap();
        let bring = confined(root.clone(), all);
        assert_eq!(bring("a").unwrap().folder, root.canonicalize().unwrap().join("a"));
        assert!(bring("oci://host/a:1").is_ok());
        assert!(bring("hf://org/lora").is_ok());
        for path in ["../other", "link", "/etc", "none", "oci:../other", "oci://oci:/etc", "org/lora"] {
            assert!(bring(path).is_err(), "{path}");
        }
    }
}
