//! State of a run -> Prometheus text, or OpenMetrics if the request asks for it.

use std::fmt::Write;

use super::{State, machine::Sample};
use crate::endpoint::{PROMETHEUS, Reply};

/// Text format of the metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Prometheus' text format, version 0.0.4.
    Text,
    /// OpenMetrics 1.0.0.
    OpenMetrics,
}

/// Returns the format that an `Accept` header asks for; `None` if it does not ask for text.
pub fn format(accept: &str) -> Option<Format> {
    match () {
        () if accept.contains("application/openmetrics-text") => Some(Format::OpenMetrics),
        () if accept.contains("text/plain") => Some(Format::Text),
        () => None,
    }
}

/// Returns the page of metrics in this format.
pub fn reply(format: Format, state: &State, sample: &Sample) -> Reply {
    let mut page = Page { format, text: String::new() };
    page.state(state);
    page.gpus(sample);
    let content_type = match format {
        Format::Text => PROMETHEUS,
        Format::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
    };
    if format == Format::OpenMetrics {
        page.text += "# EOF\n";
    }
    Reply { status: 200, content_type, body: page.text }
}

struct Page {
    format: Format,
    text: String,
}

impl Page {
    fn state(&mut self, state: &State) {
        if let Some(stage) = state.stage {
            let label = format!("{{stage=\"{stage}\"}}");
            self.gauge("hone_stage", "The stage that is running.", &[(label, 1.0)]);
        }
        let step = state.step.as_ref();
        let gauges = [
            (
                "hone_training_steps",
                "Optimizer steps of the whole run.",
                state.steps.map(|steps| steps as f64),
            ),
            ("hone_training_step", "The last logged optimizer step.", step.map(|step| step.step as f64)),
            ("hone_training_epoch", "Passes over the data so far.", step.map(|step| step.epoch)),
            ("hone_training_loss", "Loss for each supervised token.", step.map(|step| step.loss)),
            ("hone_evaluation_loss", "Loss of the newest evaluation.", state.eval_loss),
            ("hone_training_learning_rate", "Learning rate.", step.map(|step| step.learning_rate)),
            ("hone_training_gradient_norm", "Norm before clipping.", step.map(|step| step.grad_norm)),
            (
                "hone_training_tokens_per_second",
                "Tokens trained in a second.",
                step.map(|step| step.tokens_per_second),
            ),
            ("hone_training_eta_seconds", "Time to the end of training.", step.map(|step| step.eta_seconds)),
        ];
        for (name, help, value) in gauges {
            let values: Vec<(String, f64)> = value.map(|value| (String::new(), value)).into_iter().collect();
            self.gauge(name, help, &values);
        }
        let tokens = step.map_or(0, |step| step.num_tokens);
        self.counter("hone_training_tokens", "Tokens trained.", tokens);
        self.counter("hone_warnings", "Warnings of this run.", state.warnings);
    }

    fn gpus(&mut self, sample: &Sample) {
        let gpus = sample.gpus.as_deref().unwrap_or_default();
        let each = |read: &dyn Fn(&super::machine::Gpu) -> Option<f64>| -> Vec<(String, f64)> {
            let labelled = |gpu| read(gpu).map(|value| (format!("{{gpu=\"{}\"}}", gpu.id), value));
            gpus.iter().filter_map(labelled).collect()
        };
        let load = each(&|gpu| gpu.load_percent.map(|load| f64::from(load) / 100.0));
        self.gauge("hone_gpu_utilization_ratio", "Share of time in which a kernel ran.", &load);
        let temperature = each(&|gpu| gpu.temperature_celsius.map(f64::from));
        self.gauge("hone_gpu_temperature_celsius", "Temperature of the GPU.", &temperature);
        let used = each(&|gpu| Some(gpu.memory_used_bytes as f64));
        self.gauge("hone_gpu_memory_used_bytes", "Memory of the GPU in use.", &used);
        let total = each(&|gpu| Some(gpu.memory_bytes as f64));
        self.gauge("hone_gpu_memory_bytes", "Memory of the GPU.", &total);
    }

    /// Writes a gauge; one without values is left out.
    fn gauge(&mut self, name: &str, help: &str, values: &[(String, f64)]) {
        if values.is_empty() {
            return;
        }
        let _ = write!(self.text, "# HELP {name} {help}\n# TYPE {name} gauge\n");
        for (labels, value) in values {
            let _ = writeln!(self.text, "{name}{labels} {value}");
        }
    }

    /// Writes a counter. OpenMetrics names the family without `_total`, the older format with it.
    fn counter(&mut self, name: &str, help: &str, value: u64) {
        let family = match self.format {
            Format::Text => format!("{name}_total"),
            Format::OpenMetrics => name.to_owned(),
        };
        let _ = write!(self.text, "# HELP {family} {help}\n# TYPE {family} counter\n{name}_total {value}\n");
    }
}
