//! The command line of KAITO's inference pods -> that of `hone serve`, and the flags without effect.
//!
//! Both runtimes' scripts are called `inference_api.py`: vLLM's takes vLLM's flags, the transformers runtime's those of
//! its ModelConfig (KAITO v0.12, `pkg/model/interface.go`, `presets/workspace/inference`; v0.3 for `/chat`). Each
//! folder of adapters below /mnt/adapter is an id of its own under vLLM; the transformers runtime answers with their
//! sum, at the strengths of variables of their names.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::adapter::CONFIG_FILE as ADAPTER_CONFIG;
use crate::fault::{Fault, Result};
use crate::workspace::inference::{self as config, Config};

/// The folders into which KAITO puts weights and adapters.
const WEIGHTS: &str = "/workspace/weights";
const ADAPTERS: &str = "/mnt/adapter";
const PORT: u16 = 5000;

/// The program whose flags they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runtime {
    /// vLLM.
    Vllm,
    /// transformers' `generate`.
    Transformers,
}

/// Flags that take no value of their own in either runtime.
const SWITCHES: [&str; 8] = [
    "enable-lora",
    "allow-remote-files",
    "trust-remote-code",
    "load-in-4bit",
    "load-in-8bit",
    "enable-prefix-caching",
    "enforce-eager",
    "enable-auto-tool-choice",
];
/// Flags that ask for nothing that hone does otherwise.
const AS_IS: [&str; 9] = [
    "enable-lora",
    "allow-remote-files",
    "download-dir",
    "combination-type",
    "device-map",
    "max-lora-rank",
    "max-loras",
    "kaito-kv-cache-cpu-memory-utilization",
    "pipeline",
];

/// The request of a pod.
#[derive(Debug, Default)]
struct Asked {
    model: Option<String>,
    revision: Option<String>,
    name: Option<String>,
    port: Option<String>,
    context: Option<String>,
    sequences: Option<String>,
    gpu_memory: Option<f64>,
    config: Option<String>,
    adapters: Option<String>,
    warnings: Vec<String>,
}

/// Returns the command line of `hone serve`, and warnings.
///
/// # Errors
/// Usage: a flag without its value, or a setting that one server of one GPU cannot have. Config: the mounted
/// configuration.
pub fn serve(
    runtime: Runtime,
    flags: &[String],
    environment: &dyn Fn(&str) -> Option<String>,
) -> Result<(Vec<OsString>, Vec<String>)> {
    let mut asked = read(flags)?;
    let folder = asked.adapters.clone().unwrap_or_else(|| ADAPTERS.into());
    let adapters = adapters(Path::new(&folder), &mut asked.warnings);
    let config = configuration(&mut asked, !adapters.is_empty())?;
    let name = config.name.or(asked.name);
    let port = port(asked.port.as_deref(), environment)?;
    let mut arguments = vec!["serve".to_owned(), model(asked.model, asked.revision)?];
    let mut flag = |name: &str, value: String| arguments.push(format!("--{name}={value}"));
    flag("listen", format!("0.0.0.0:{port}"));
    flag("cache", WEIGHTS.into());
    if let Some(tokens) = config.context.map(|tokens| tokens.to_string()).or(asked.context) {
        flag("context", tokens);
    }
    if let Some(count) = config.sequences.map(|count| count.to_string()).or(asked.sequences) {
        flag("sequences", count);
    }
    if let Some(share) = config.gpu_memory.or(asked.gpu_memory) {
        flag("set", format!("memory_max={share}"));
    }
    for (name, path) in &adapters {
        flag("adapter", format!("{name}={}", path.display()));
    }
    let sum = (runtime == Runtime::Transformers && !adapters.is_empty()).then(|| sum(&adapters, environment));
    match (sum.transpose()?, name) {
        // The one id that clients of this runtime know is the sum.
        (Some(parts), name) => {
            let name = name.unwrap_or_else(|| "combined_adapter".into());
            flag("name", format!("{name}-base"));
            flag("mix", format!("{name}={parts}"));
        }
        (None, Some(name)) => flag("name", name),
        (None, None) => {}
    }
    let arguments = ["hone".to_owned()].into_iter().chain(arguments).map(OsString::from).collect();
    Ok((arguments, asked.warnings))
}

fn read(flags: &[String]) -> Result<Asked> {
    let mut asked = Asked::default();
    let mut left = flags.iter().peekable();
    while let Some(argument) = left.next() {
        let Some(flag) = argument.strip_prefix("--") else {
            return Err(Fault::usage(format!("inference_api.py: {argument:?} is no flag")));
        };
        let (name, mut value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        let key = name.replace('_', "-");
        if value.is_none() && !SWITCHES.contains(&key.as_str()) {
            value = left.next_if(|next| !next.starts_with("--")).cloned();
        }
        take(&mut asked, name, &key, value)?;
    }
    Ok(asked)
}

fn take(asked: &mut Asked, name: &str, key: &str, value: Option<String>) -> Result<()> {
    let needed = || {
        value
            .clone()
            .filter(|value| !value.is_empty())
            .ok_or_else(|| Fault::usage(format!("inference_api.py --{name}: the value is missing")))
    };
    let is_one = |value: &Option<String>| value.as_deref() == Some("1");
    match key {
        "model" | "pretrained-model-name-or-path" => asked.model = Some(needed()?),
        "revision" | "code-revision" => asked.revision = Some(needed()?),
        "served-model-name" => asked.name = Some(needed()?),
        "port" => asked.port = Some(needed()?),
        "max-model-len" => {
            asked.context = Some(needed()?).filter(|tokens| tokens != "auto" && tokens != "-1")
        }
        "max-num-seqs" => asked.sequences = Some(needed()?),
        "gpu-memory-utilization" => {
            let text = needed()?;
            let share = text.parse::<f64>().ok().filter(|share| *share > 0.0 && *share <= 1.0);
            asked.gpu_memory = Some(share.ok_or_else(|| {
                Fault::usage(format!(
                    "inference_api.py --{name}={text}: expected a number above 0, at most 1"
                ))
            })?);
        }
        "kaito-config-file" => asked.config = Some(needed()?),
        "kaito-adapters-dir" => asked.adapters = Some(needed()?),
        "pipeline-parallel-size" if !is_one(&value) => {
            return Err(Fault::usage(format!(
                "inference_api.py --{name}={}: hone serves from one node",
                needed()?
            ))
            .help("take an instance type that holds the model, with resource.count 1"));
        }
        "tensor-parallel-size" | "data-parallel-size" | "pipeline-parallel-size" if is_one(&value) => {}
        "tensor-parallel-size" | "data-parallel-size" => asked
            .warnings
            .push(format!("--{name}={}: hone serves with one GPU; the others stay idle", needed()?)),
        known if AS_IS.contains(&known) => {}
        _ => asked.warnings.push(format!("inference_api.py --{name} has no effect")),
    }
    Ok(())
}

/// Returns the model's address in the form of `hone serve`.
fn model(model: Option<String>, revision: Option<String>) -> Result<String> {
    let model = model.unwrap_or_else(|| WEIGHTS.into());
    Ok(match model.as_str() {
        local if local.starts_with(['/', '.']) => model,
        remote if remote.contains("://") => {
            return Err(Fault::usage(format!(
                "inference_api.py --model={}: weights that are streamed from a store cannot be served",
                crate::report::clean::without_secrets(remote)
            ))
            .help("switch KAITO's model streaming off, so that weights are downloaded"));
        }
        repository => match revision {
            Some(revision) => format!("hf://{repository}@{revision}"),
            None => format!("hf://{repository}"),
        },
    })
}

/// Returns the port: 5000, and one more for each rank, as KAITO's scripts have it.
fn port(asked: Option<&str>, environment: &dyn Fn(&str) -> Option<String>) -> Result<u16> {
    let number = |name: &str, text: &str| {
        text.parse::<u16>().map_err(|_| Fault::usage(format!("{name}: expected a port, found {text:?}")))
    };
    match (asked, environment("LOCAL_RANK").filter(|rank| !rank.is_empty())) {
        (Some(text), _) => number("inference_api.py --port", text),
        (None, Some(rank)) => Ok(PORT.saturating_add(number("LOCAL_RANK", &rank)?)),
        (None, None) => Ok(PORT),
    }
}

/// Reads the mounted file, whose values override the flags.
fn configuration(asked: &mut Asked, adapters: bool) -> Result<Config> {
    let Some(path) = &asked.config else { return Ok(Config::default()) };
    let text = std::fs::read_to_string(path)
        .map_err(|error| Fault::config(format!("--kaito-config-file {path}: cannot be read: {error}")))?;
    let config = config::read(path, &text, adapters)?;
    asked.warnings.extend(config.unused.iter().cloned());
    Ok(config)
}

/// Returns folders of adapters by their names; other folders are reported.
fn adapters(root: &Path, warnings: &mut Vec<String>) -> Vec<(String, PathBuf)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(root).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if !path.is_dir() || name.starts_with('.') {
            continue;
        }
        match path.join(ADAPTER_CONFIG).is_file() {
            true => found.push((name, path)),
            false => warnings.push(format!("{} holds no adapter and is ignored", path.display())),
        }
    }
    found.sort();
    found
}

/// Returns the sum of the adapters, such as `a:1,b:0.5`. An adapter's strength is the variable of its name, or 1.
fn sum(adapters: &[(String, PathBuf)], environment: &dyn Fn(&str) -> Option<String>) -> Result<String> {
    let part = |(name, _): &(String, PathBuf)| {
        let text = environment(name).filter(|text| !text.is_empty()).unwrap_or_else(|| "1.0".into());
        match text.trim().parse::<f32>().is_ok_and(|strength| (0.0..=1.0).contains(&strength)) {
            true => Ok(format!("{name}:{}", text.trim())),
            false => Err(Fault::config(format!(
                "the strength of adapter {name}: expected a number from 0 to 1, found {text:?}"
            ))),
        }
    };
    adapters.iter().map(part).collect::<Result<Vec<_>>>().map(|parts| parts.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(runtime: Runtime, flags: &str, environment: &[(&str, &str)]) -> Result<(String, Vec<String>)> {
        let flags: Vec<String> = flags.split_whitespace().map(str::to_owned).collect();
        let find = |name: &str| {
            environment.iter().find(|(other, _)| *other == name).map(|(_, value)| value.to_string())
        };
        let (arguments, warnings) = serve(runtime, &flags, &find)?;
        let words: Vec<String> = arguments.iter().map(|word| word.to_string_lossy().into_owned()).collect();
        Ok((words.join(" "), warnings))
    }

    #[test]
    fn vllms_flags_as_kaito_renders_them() {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("inference_config.yaml");
        std::fs::write(&config, "vllm:\n  max-num-seqs: 4\n  cpu-offload-gb: 0\n").unwrap();
        for name in ["tone", "support", "lost+found"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
        }
        for name in ["tone", "support"] {
            std::fs::write(folder.path().join(name).join(ADAPTER_CONFIG), "{}").unwrap();
        }
        let root = folder.path().display();
        let flags = format!(
            "--model=microsoft/phi-4 --code-revision=abc --download-dir=/workspace/weights --served-model-name phi-4 \
             --max-model-len=auto --gpu-memory-utilization=0.84 --enable-lora --tensor-parallel-size=1 \
             --compilation-config.pass_config.fuse_allreduce_rms=False --kaito-adapters-dir={root} \
             --kaito-config-file={}",
            config.display()
        );
        let (said, warnings) = line(Runtime::Vllm, &flags, &[]).unwrap();
        assert_eq!(
            said,
            format!(
                "hone serve hf://microsoft/phi-4@abc --listen=0.0.0.0:5000 --cache=/workspace/weights --sequences=4 \
                 --set=memory_max=0.84 --adapter=support={root}/support --adapter=tone={root}/tone --name=phi-4"
            )
        );
        let told = warnings.join("\n");
        for part in ["lost+found holds no adapter", "vllm.cpu-offload-gb", "fuse_allreduce"] {
            assert!(told.contains(part), "{part}: {told}");
        }
        assert_eq!(warnings.len(), 3, "{told}");
    }

    #[test]
    fn the_transformers_runtime_answers_with_the_sum() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a", "b"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
            std::fs::write(folder.path().join(name).join(ADAPTER_CONFIG), "{}").unwrap();
        }
        let root = folder.path().display();
        let flags = format!(
            "--served_model_name=phi --torch_dtype=bfloat16 --pipeline text-generation --allow_remote_files \
             --pretrained_model_name_or_path=/workspace/tfs/weights --kaito-adapters-dir {root}"
        );
        let (said, warnings) =
            line(Runtime::Transformers, &flags, &[("b", "0.5"), ("LOCAL_RANK", "1")]).unwrap();
        assert_eq!(
            said,
            format!(
                "hone serve /workspace/tfs/weights --listen=0.0.0.0:5001 --cache=/workspace/weights \
                 --adapter=a={root}/a --adapter=b={root}/b --name=phi-base --mix=phi=a:1.0,b:0.5"
            )
        );
        assert_eq!(warnings, ["inference_api.py --torch_dtype has no effect"]);
        assert!(
            line(Runtime::Transformers, &flags, &[("b", "2")]).unwrap_err().message.contains("adapter b")
        );
    }

    #[test]
    fn what_cannot_be_done_ends_with_a_message() {
        for (flags, part) in [
            ("--model=az://store/phi", "streamed"),
            ("--model=a/b --pipeline-parallel-size=2", "one node"),
            ("--model", "the value is missing"),
            ("phi-4", "is no flag"),
            ("--port=http", "expected a port"),
            ("--gpu-memory-utilization=90", "expected a number above 0, at most 1"),
            ("--kaito-config-file=/nowhere/x.yaml", "cannot be read"),
        ] {
            let fault = line(Runtime::Vllm, flags, &[]).unwrap_err();
            assert!(fault.message.contains(part), "{flags}: {fault}");
        }
        let (_, warnings) = line(Runtime::Vllm, "--model=a/b --data-parallel-size=4", &[]).unwrap();
        assert!(warnings[0].contains("the others stay idle"), "{warnings:?}");
    }
}
