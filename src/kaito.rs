//! The commands that KAITO's own controller writes into its pods -> hone's commands.
//!
//! A tuning pod runs `python3 metrics_server.py & accelerate launch --num_processes=N /workspace/tfs/fine_tuning.py`.
//! In the image of target `kaito`, both programs are hone. The second is the job, which starts the N processes itself.
//! The first does nothing, because the job serves its metrics itself. A serving pod runs `python3
//! /workspace/vllm/inference_api.py` or `accelerate launch /workspace/tfs/inference_api.py` with the flags of its
//! runtime (`inference`). Its startup probe asks whether the server answers.

pub mod inference;
pub mod pod;
pub mod sidecars;
pub mod watch;

use std::ffi::OsString;
use std::path::Path;

use crate::fault::{Fault, Result};

/// The path where KAITO mounts the configuration.
const CONFIG: &str = "/mnt/config/training_config.yaml";
/// The name of the base model in KAITO's adapters.
const BASE: &str = "/workspace/tfs/weights";
const METRICS: &str = "0.0.0.0:5000";

/// Flags of `accelerate launch` that take a value. Only the number of processes has an effect.
const WITH_VALUE: [&str; 12] = [
    "config_file",
    "dynamo_backend",
    "gpu_ids",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
    "mixed_precision",
    "num_cpu_threads_per_process",
    "num_machines",
    "num_processes",
    "rdzv_backend",
    "same_network",
];
const WITHOUT_VALUE: [&str; 5] = ["cpu", "debug", "multi_gpu", "quiet", "use_cpu"];

/// The program that was called.
#[derive(Clone, Debug, PartialEq)]
pub enum Call {
    /// The job.
    Train {
        /// hone's own command line for it.
        arguments: Vec<OsString>,
        /// Warnings about flags without effect.
        warnings: Vec<String>,
    },
    /// The server.
    Serve {
        /// hone's own command line for it.
        arguments: Vec<OsString>,
        /// Warnings about flags without effect.
        warnings: Vec<String>,
    },
    /// KAITO's metrics server.
    MetricsServer,
    /// Checks whether the server of this pod answers. KAITO measures its speed at this point; hone does not.
    Probe,
}

/// Returns the program that the command line calls; `None` if hone was called by its own name.
///
/// Usage: the command calls a script that hone does not replace.
pub fn call(arguments: &[OsString], environment: &dyn Fn(&str) -> Option<String>) -> Option<Result<Call>> {
    let texts: Vec<String> =
        arguments.iter().map(|argument| argument.to_string_lossy().into_owned()).collect();
    let (program, rest) = texts.split_first()?;
    match Path::new(program).file_name()?.to_str()? {
        "accelerate" => Some(accelerate(rest, environment)),
        "python3" => Some(python(rest, environment)),
        _ => None,
    }
}

fn python(arguments: &[String], environment: &dyn Fn(&str) -> Option<String>) -> Result<Call> {
    let (script, rest) =
        arguments.split_first().map_or(("", arguments), |(first, rest)| (first.as_str(), rest));
    match file_name(script) {
        "metrics_server.py" => Ok(Call::MetricsServer),
        "benchmark_entrypoint.py" => Ok(Call::Probe),
        "inference_api.py" => served(inference::Runtime::Vllm, rest, environment),
        _ => Err(Fault::usage(format!(
            "python3 {script}: this program is hone, which replaces only KAITO's metrics_server.py and inference_api.py"
        ))
        .help("this image holds no Python: run the script in another one")),
    }
}

fn served(
    runtime: inference::Runtime,
    flags: &[String],
    environment: &dyn Fn(&str) -> Option<String>,
) -> Result<Call> {
    inference::serve(runtime, flags, environment)
        .map(|(arguments, warnings)| Call::Serve { arguments, warnings })
}

/// Returns whether the server of this pod is healthy, asked over its port.
pub fn is_healthy() -> bool {
    use std::io::{Read, Write};
    const ANSWER_MAX: std::time::Duration = std::time::Duration::from_secs(5);
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], 5000));
    let Ok(mut stream) = std::net::TcpStream::connect_timeout(&address, ANSWER_MAX) else { return false };
    let mut head = [0; 12];
    stream.set_read_timeout(Some(ANSWER_MAX)).is_ok()
        && stream.write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").is_ok()
        && stream.read_exact(&mut head).is_ok()
        && head.ends_with(b" 200")
}

fn accelerate(arguments: &[String], environment: &dyn Fn(&str) -> Option<String>) -> Result<Call> {
    let Some(("launch", rest)) = arguments.split_first().map(|(first, rest)| (first.as_str(), rest)) else {
        return Err(Fault::usage("accelerate: this program is hone, which has only `launch`")
            .help("accelerate launch --num_processes=1 /workspace/tfs/fine_tuning.py"));
    };
    let mut asked = Asked::default();
    let (script, flags) = script(rest, &mut asked)?;
    let Asked { processes, warnings } = asked;
    match script.map(file_name) {
        Some("inference_api.py") => {
            let mut call = served(inference::Runtime::Transformers, flags, environment)?;
            if let Call::Serve { warnings: told, .. } = &mut call {
                told.extend(warnings);
            }
            Ok(call)
        }
        Some("fine_tuning.py") => Ok(Call::Train { arguments: job(processes, environment), warnings }),
        found => Err(Fault::usage(format!(
            "accelerate launch: found {} as the script, expected fine_tuning.py or inference_api.py",
            found.unwrap_or("nothing")
        ))
        .help("this program is hone, which replaces only these two scripts of KAITO's")),
    }
}

/// The settings that the flags of `accelerate launch` ask for.
#[derive(Default)]
struct Asked {
    processes: Option<u32>,
    warnings: Vec<String>,
}

/// Returns the first argument that is not a flag, and the arguments after it.
fn script<'a>(arguments: &'a [String], asked: &mut Asked) -> Result<(Option<&'a str>, &'a [String])> {
    let mut left = arguments.iter();
    while let Some(argument) = left.next() {
        let Some(flag) = argument.strip_prefix("--") else { return Ok((Some(argument), left.as_slice())) };
        let (name, mut value) = match flag.split_once('=') {
            Some((name, value)) => (name.replace('-', "_"), Some(value)),
            None => (flag.replace('-', "_"), None),
        };
        if WITH_VALUE.contains(&name.as_str()) {
            value = value.or_else(|| left.next().map(String::as_str));
        } else if !WITHOUT_VALUE.contains(&name.as_str()) {
            asked.warnings.push(format!("accelerate launch --{name} is not known and has no effect"));
        }
        match name.as_str() {
            "num_processes" => asked.processes = Some(count(&name, value.unwrap_or_default())?),
            "num_machines" => one_machine(count(&name, value.unwrap_or_default())?)?,
            _ => {}
        }
    }
    Ok((None, &[]))
}

fn count(name: &str, value: &str) -> Result<u32> {
    value.parse().ok().filter(|count| *count > 0).ok_or_else(|| {
        Fault::usage(format!("accelerate launch --{name}: expected a whole number from 1, found {value:?}"))
    })
}

fn one_machine(machines: u32) -> Result<()> {
    match machines {
        1 => Ok(()),
        _ => Err(Fault::usage(format!("accelerate launch --num_machines={machines}: hone starts the processes of one machine"))
            .help("start hone on every machine with HONE_NODES, JOB_COMPLETION_INDEX and HONE_MASTER_ADDR, or under torchrun")),
    }
}

/// Returns the command `hone run` for the mounts and variables of the pod. Variables that begin with `HONE_` have their
/// usual effect.
fn job(processes: Option<u32>, environment: &dyn Fn(&str) -> Option<String>) -> Vec<OsString> {
    let mut arguments = vec!["hone", "run"];
    let unset = |name: &str| environment(name).is_none_or(|value| value.is_empty());
    // `spec` reads a place that the pod's environment names.
    if ["YAML_FILE_PATH", "HONE_CONFIG", "HONE_SPEC"].into_iter().all(unset) {
        arguments.extend(["--config", CONFIG]);
    }
    if unset("HONE_NAME") {
        arguments.extend(["--name", BASE]);
    }
    if unset("HONE_METRICS") {
        arguments.extend(["--metrics", METRICS]);
    }
    // KAITO runs a changed Workspace again, with the same volume.
    if unset("HONE_EARLIER_RESULTS") {
        arguments.extend(["--earlier-results", "move"]);
    }
    let ranks = processes.map(|processes| processes.to_string());
    if let Some(ranks) = ranks.as_deref().filter(|_| unset("HONE_RANKS") && unset("HONE_GPUS")) {
        arguments.extend(["--ranks", ranks]);
    }
    arguments.into_iter().map(OsString::from).collect()
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn called(line: &str) -> Option<Result<Call>> {
        let arguments: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
        call(&arguments, &|_| None)
    }

    fn warnings(line: &str) -> Vec<String> {
        match called(line).unwrap().unwrap() {
            Call::Train { warnings, .. } => warnings,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn kaitos_commands_are_the_job_and_nothing() {
        let Call::Train { arguments, warnings } =
            called("accelerate launch --num_processes=1 /workspace/tfs/fine_tuning.py").unwrap().unwrap()
        else {
            panic!()
        };
        let line = arguments.iter().map(|part| part.to_str().unwrap()).collect::<Vec<_>>().join(" ");
        let expected = "hone run --config /mnt/config/training_config.yaml --name /workspace/tfs/weights \
                        --metrics 0.0.0.0:5000 --earlier-results move --ranks 1";
        assert_eq!((line.as_str(), warnings.len()), (expected, 0));
        assert_eq!(called("/usr/bin/python3 metrics_server.py").unwrap().unwrap(), Call::MetricsServer);
        let Call::Serve { arguments, .. } =
            called("/usr/bin/python3 /workspace/vllm/inference_api.py --model=a/b --served-model-name=b")
                .unwrap()
                .unwrap()
        else {
            panic!()
        };
        assert_eq!(arguments[..3], ["hone", "serve", "hf://a/b"]);
        let line = "accelerate launch --num_processes=1 --gpu_ids=all /workspace/tfs/inference_api.py --revision=x --model c/d";
        let Call::Serve { arguments, warnings } = called(line).unwrap().unwrap() else { panic!() };
        assert_eq!((&arguments[2], warnings.len()), (&OsString::from("hf://c/d@x"), 0));
        assert_eq!(called("python3 /workspace/vllm/benchmark_entrypoint.py").unwrap().unwrap(), Call::Probe);
        assert!(called("hone run").is_none() && called("/usr/bin/hone").is_none());
    }

    #[test]
    fn variables_of_the_pod_come_first() {
        let set = |name: &str| (name.starts_with("HONE_") || name == "YAML_FILE_PATH").then(|| "x".into());
        assert_eq!(job(Some(2), &set), ["hone", "run"]);
    }

    #[test]
    fn flags_of_accelerate_are_known_or_told() {
        let known = "--num_machines 1 --mixed_precision=bf16 --gpu-ids all --multi_gpu";
        assert!(warnings(&format!("accelerate launch {known} /x/fine_tuning.py a b")).is_empty());
        let told = warnings("accelerate launch --num_processes 4 --new=1 fine_tuning.py");
        assert!(told.len() == 1 && told[0].contains("--new is not known"), "{told:?}");
        let Call::Train { arguments, .. } =
            called("accelerate launch --num_processes 4 fine_tuning.py").unwrap().unwrap()
        else {
            panic!()
        };
        assert_eq!(arguments[arguments.len() - 2..], ["--ranks", "4"]);
    }

    #[test]
    fn what_hone_is_not_is_a_usage_fault() {
        for line in [
            "accelerate config",
            "accelerate",
            "accelerate launch",
            "accelerate launch --num_processes=0 fine_tuning.py",
            "accelerate launch --num_machines=2 fine_tuning.py",
            "accelerate launch other.py",
            "python3 -m http.server",
            "python3",
        ] {
            let fault = called(line).unwrap().unwrap_err();
            assert_eq!(fault.kind.exit_code(), 2, "{line}: {fault}");
        }
    }
}
