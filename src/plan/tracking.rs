//! `report_to` and the addresses of services -> which trackers a run has.

use std::path::{Path, PathBuf};

use super::reader::Reader;
use crate::spec::Origin;
use crate::spec::keys::Section::{Hone as H, TrainingArguments as T};
use crate::trackers::{self, Mlflow, Options};

/// Names of trackers that transformers knows and hone does not, each with a remedy.
const OTHERS: [(&str, &str); 12] = [
    ("wandb", "use tensorboard: `wandb sync` uploads its event files"),
    ("comet_ml", "use tensorboard: `comet upload` takes its event files"),
    ("neptune", "use tensorboard or mlflow"),
    ("clearml", "use tensorboard: ClearML reads its event files"),
    ("dagshub", "use mlflow: DagsHub has an MLflow server for each repository"),
    ("azure_ml", "use mlflow: Azure ML's workspaces are MLflow servers"),
    ("codecarbon", "use tensorboard or mlflow"),
    ("dvclive", "use tensorboard or mlflow"),
    ("flyte", "use tensorboard or mlflow"),
    ("swanlab", "use tensorboard: SwanLab converts its event files"),
    ("trackio", "use tensorboard or mlflow"),
    ("kubeflow", "no setting is needed: a pod of a TrainJob reports to its controller by itself"),
];

/// Returns the trackers' options, without sending a request.
pub(super) fn trackers(reader: &mut Reader, output: &Path, model: &str, ca_file: Option<PathBuf>) -> Options {
    let origin = reader.origin(T, "report_to");
    let names = reader.texts(T, "report_to");
    let name = reader.text(T, "run_name").unwrap_or_else(|| run_name(output, model));
    let logging_dir = reader.text(T, "logging_dir").filter(|folder| !folder.is_empty());
    let own = trackers::folder(output);
    let mut options = Options { name, ca_file, ..Options::default() };
    let mut wants_mlflow = false;
    for word in names.iter().flat_map(|names| names.split(',')).map(|word| word.trim().to_lowercase()) {
        match word.as_str() {
            "" | "none" => {}
            "tensorboard" | "all" => {
                options.tensorboard = Some(logging_dir.clone().map_or(own.clone(), PathBuf::from));
            }
            "mlflow" => wants_mlflow = true,
            other => reader.wrong(&origin, refusal(other)),
        }
    }
    options.pushgateway = address(reader, "pushgateway");
    options.otlp = address(reader, "otlp").map(|url| (url, Vec::new()));
    options.mlflow = mlflow(reader, wants_mlflow, &origin, own.join("mlflow-run"));
    options
}

/// Returns the last part of the output folder, and the model.
fn run_name(output: &Path, model: &str) -> String {
    let folder = output.file_name().map_or(String::new(), |name| name.to_string_lossy().into_owned());
    let model = model.rsplit('/').next().unwrap_or(model);
    format!("{folder}-{model}")
}

fn refusal(word: &str) -> String {
    let known = OTHERS.iter().find(|(name, _)| *name == word);
    match known {
        Some((name, instead)) => {
            format!("TrainingArguments.report_to: hone does not send to {name}; {instead}")
        }
        None => format!(
            "TrainingArguments.report_to: expected tensorboard, mlflow, all or none, found {word:?}; a Prometheus gateway and \
             OpenTelemetry have keys of their own, pushgateway and otlp"
        ),
    }
}

fn address(reader: &mut Reader, key: &str) -> Option<String> {
    let text = reader.text(H, key).filter(|text| !text.is_empty())?;
    let fits = url::Url::parse(&text).is_ok_and(|url| matches!(url.scheme(), "http" | "https"));
    if !fits {
        let origin = reader.origin(H, key);
        reader.wrong(
            &origin,
            format!("{key}: expected http://HOST:PORT or https://HOST, found another address"),
        );
    }
    fits.then_some(text)
}

/// Returns MLflow's options, if `report_to` names it.
fn mlflow(reader: &mut Reader, wanted: bool, origin: &Origin, remembered: PathBuf) -> Option<Mlflow> {
    let uri = address(reader, "mlflow");
    let experiment = reader.text(H, "mlflow_experiment").unwrap_or_default();
    let run = reader.text(H, "mlflow_run");
    if !wanted {
        // The variables of MLflow itself are there for all programs.
        let origin = reader.origin(H, "mlflow");
        if uri.is_some() && !matches!(origin, Origin::Environment(_)) {
            reader
                .warn(format!("{origin}: mlflow has no effect without TrainingArguments.report_to: mlflow"));
        }
        return None;
    }
    let Some(uri) = uri else {
        reader.wrong(
            origin,
            "TrainingArguments.report_to: mlflow needs the address of its server: mlflow: http://HOST:5000, or MLFLOW_TRACKING_URI",
        );
        return None;
    };
    Some(Mlflow { uri, experiment, run, remembered, authorization: None })
}
