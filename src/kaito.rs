//! The commands that KAITO's own controller writes into a tuning pod -> hone's commands.
//!
//! The pod runs `python3 metrics_server.py & accelerate launch --num_processes=N /workspace/tfs/fine_tuning.py`. In
//! the image of target `kaito`, both programs are hone. The second is the job. The first does nothing, because the
//! job serves its metrics itself.

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

/// Flags of `accelerate launch` that take a value. They have no effect, since hone is one process on one GPU.
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
    /// KAITO's metrics server.
    MetricsServer,
}

/// The program that the command line calls; `None` if hone was called by its own name.
///
/// Usage: the command calls a script that hone does not replace.
pub fn call(arguments: &[OsString], environment: &dyn Fn(&str) -> Option<String>) -> Option<Result<Call>> {
    let texts: Vec<String> =
        arguments.iter().map(|argument| argument.to_string_lossy().into_owned()).collect();
    let (program, rest) = texts.split_first()?;
    match Path::new(program).file_name()?.to_str()? {
        "accelerate" => Some(accelerate(rest, environment)),
        "python3" => Some(python(rest)),
        _ => None,
    }
}

fn python(arguments: &[String]) -> Result<Call> {
    match arguments.first().map(String::as_str) {
        Some(script) if file_name(script) == "metrics_server.py" => Ok(Call::MetricsServer),
        found => Err(Fault::usage(format!(
            "python3 {}: this program is hone, which replaces only metrics_server.py",
            found.unwrap_or_default()
        ))
        .help("this image holds no Python: run the script in another one")),
    }
}

fn accelerate(arguments: &[String], environment: &dyn Fn(&str) -> Option<String>) -> Result<Call> {
    let Some(("launch", rest)) = arguments.split_first().map(|(first, rest)| (first.as_str(), rest)) else {
        return Err(Fault::usage("accelerate: this program is hone, which has only `launch`")
            .help("accelerate launch --num_processes=1 /workspace/tfs/fine_tuning.py"));
    };
    let mut warnings = Vec::new();
    let script = script(rest, &mut warnings)?;
    match script.map(file_name) {
        Some("fine_tuning.py") => Ok(Call::Train { arguments: job(environment), warnings }),
        found => Err(Fault::usage(format!(
            "accelerate launch: found {} as the script, expected fine_tuning.py",
            found.unwrap_or("nothing")
        ))
        .help("this program is hone, which replaces only KAITO's fine_tuning.py")),
    }
}

/// The first argument that is not a flag.
fn script<'a>(arguments: &'a [String], warnings: &mut Vec<String>) -> Result<Option<&'a str>> {
    let mut left = arguments.iter();
    while let Some(argument) = left.next() {
        let Some(flag) = argument.strip_prefix("--") else { return Ok(Some(argument)) };
        let (name, mut value) = match flag.split_once('=') {
            Some((name, value)) => (name.replace('-', "_"), Some(value)),
            None => (flag.replace('-', "_"), None),
        };
        if WITH_VALUE.contains(&name.as_str()) {
            value = value.or_else(|| left.next().map(String::as_str));
        } else if !WITHOUT_VALUE.contains(&name.as_str()) {
            warnings.push(format!("accelerate launch --{name} is not known and has no effect"));
        }
        if name == "num_processes" {
            warnings.extend(of_processes(value.unwrap_or_default())?);
        }
    }
    Ok(None)
}

fn of_processes(value: &str) -> Result<Option<String>> {
    match value.parse::<u32>() {
        Ok(1) => Ok(None),
        Ok(count @ 2..) => Ok(Some(format!(
            "accelerate launch asks for {count} processes, one for each GPU; hone trains in one process on one GPU, and the other GPUs stay idle"
        ))),
        _ => Err(Fault::usage(format!(
            "accelerate launch --num_processes: expected a whole number from 1, found {value:?}"
        ))),
    }
}

/// The command `hone run` for the mounts and variables of the pod. Variables that begin with `HONE_` have their usual
/// effect.
fn job(environment: &dyn Fn(&str) -> Option<String>) -> Vec<OsString> {
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
                        --metrics 0.0.0.0:5000 --earlier-results move";
        assert_eq!((line.as_str(), warnings.len()), (expected, 0));
        assert_eq!(called("/usr/bin/python3 metrics_server.py").unwrap().unwrap(), Call::MetricsServer);
        assert!(called("hone run").is_none() && called("/usr/bin/hone").is_none());
    }

    #[test]
    fn variables_of_the_pod_come_first() {
        let set = |name: &str| (name.starts_with("HONE_") || name == "YAML_FILE_PATH").then(|| "x".into());
        assert_eq!(job(&set), ["hone", "run"]);
    }

    #[test]
    fn flags_of_accelerate_are_known_or_told() {
        let known = "--num_machines 1 --mixed_precision=bf16 --gpu-ids all --multi_gpu";
        assert!(warnings(&format!("accelerate launch {known} /x/fine_tuning.py a b")).is_empty());
        let told = warnings("accelerate launch --num_processes 4 --new=1 fine_tuning.py");
        assert!(told[0].contains("4 processes") && told[1].contains("--new is not known"), "{told:?}");
    }

    #[test]
    fn what_hone_is_not_is_a_usage_fault() {
        for line in [
            "accelerate config",
            "accelerate",
            "accelerate launch",
            "accelerate launch --num_processes=0 fine_tuning.py",
            "accelerate launch other.py",
            "python3 -m http.server",
            "python3",
        ] {
            let fault = called(line).unwrap().unwrap_err();
            assert_eq!(fault.kind.exit_code(), 2, "{line}: {fault}");
        }
    }
}
