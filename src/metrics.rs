//! Events of a run -> its current state, served over HTTP: KAITO's JSON, Prometheus text, `/healthz`.
//!
//! The run stores its newest state behind a lock, which is held only for a copy. The run never waits for the network.

mod machine;
mod prometheus;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::{Value, json};

use crate::endpoint::{self, Asked, Reply, Server};
use crate::fault::{Fault, Result};
use crate::report::termination::Outcome;
use crate::report::{Event, Progress, Report, Sink, Stage, StepMetrics};

pub use machine::Sampler;

/// The newest value of each figure; `None` until there is one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    /// Name of the stage that is running.
    pub stage: Option<&'static str>,
    /// Optimizer steps of the whole run.
    pub steps: Option<u64>,
    /// The last logged optimizer step.
    pub step: Option<StepMetrics>,
    /// Loss of the newest evaluation.
    pub eval_loss: Option<f64>,
    /// Warnings so far.
    pub warnings: u64,
}

/// A sink that passes everything on to another one and keeps the newest state.
pub struct Latest {
    sink: Arc<dyn Sink>,
    state: Mutex<State>,
}

impl Latest {
    /// Returns the state before any event; everything is passed on to `sink`.
    pub fn new(sink: Arc<dyn Sink>) -> Latest {
        Latest { sink, state: Mutex::default() }
    }

    /// Returns a copy of the newest state.
    pub fn state(&self) -> State {
        self.lock().clone()
    }

    /// Returns the outcome of a run that failed, with the last step that it logged.
    pub fn outcome(&self, fault: &Fault) -> Outcome {
        let step = self.state().step;
        Outcome {
            fault: Some(fault.clone()),
            step: step.as_ref().map(|step| step.step),
            loss: step.map(|step| step.loss),
            ..Outcome::default()
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Sink for Latest {
    fn event(&self, event: &Event) {
        let mut state = self.lock();
        match event {
            Event::Note { stage, .. } => state.stage = Some(stage.name()),
            Event::Warning { stage, .. } => {
                state.stage = Some(stage.name());
                state.warnings += 1;
            }
            Event::Step(metrics) => state.step = Some(metrics.clone()),
            Event::Evaluated { eval_loss, .. } => state.eval_loss = Some(*eval_loss),
            Event::Fact { .. } | Event::Failed(_) => {}
        }
        drop(state);
        self.sink.event(event);
    }

    fn progress(&self, progress: &Progress) {
        let mut state = self.lock();
        // An evaluation happens during training, which continues afterwards.
        state.stage = Some(match (progress.stage, progress.finished) {
            (Stage::Evaluate, true) => Stage::Train.name(),
            (stage, _) => stage.name(),
        });
        if progress.stage == Stage::Train {
            state.steps = progress.total;
        }
        drop(state);
        self.sink.progress(progress);
    }
}

/// Serves `latest` until the returned value is dropped.
///
/// Config: hone cannot listen on the address.
pub fn serve(address: SocketAddr, latest: Arc<Latest>) -> Result<Server> {
    let sampler = Mutex::new(Sampler::default());
    endpoint::start(address, Arc::new(move |asked| answer(asked, &latest.state(), &sampler)))
}

/// Serves as [`serve`] does. If that fails, the run continues without metrics, and a warning says so.
pub fn offer(address: SocketAddr, latest: Arc<Latest>, report: &Report) -> Option<Server> {
    match serve(address, latest) {
        Ok(server) => {
            report.note(Stage::Plan, format!("metrics: http://{}/metrics", server.address()));
            Some(server)
        }
        Err(fault) => {
            report.warn(Stage::Plan, format!("no metrics: {}", fault.message));
            None
        }
    }
}

fn answer(asked: &Asked, state: &State, sampler: &Mutex<Sampler>) -> Reply {
    match asked.path {
        "/healthz" => Reply::text("ok\n"),
        "/metrics" => {
            let sample = sampler.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
            match prometheus::format(asked.accept) {
                Some(format) => prometheus::reply(format, state, &sample),
                None => Reply::json(&json(state, &sample)),
            }
        }
        _ => Reply::not_found(),
    }
}

/// Returns the run's state as Prometheus text, for a gateway that it is pushed to.
pub fn text(state: &State) -> String {
    prometheus::reply(prometheus::Format::Text, state, &machine::Sample::default()).body
}

/// Returns KAITO's metrics, and the run's own ones under `training`.
fn json(state: &State, sample: &machine::Sample) -> Value {
    let step = state.step.as_ref();
    let mut value = sample.json();
    value["training"] = json!({
        "stage": state.stage,
        "step": step.map(|step| step.step),
        "steps": state.steps,
        "epoch": step.map(|step| step.epoch),
        "loss": step.map(|step| step.loss),
        "eval_loss": state.eval_loss,
        "learning_rate": step.map(|step| step.learning_rate),
        "tokens_per_second": step.map(|step| step.tokens_per_second),
        "eta_seconds": step.map(|step| step.eta_seconds),
    });
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Report, Unit};

    struct Nowhere;
    impl Sink for Nowhere {
        fn event(&self, _: &Event) {}
        fn progress(&self, _: &Progress) {}
    }

    fn trained() -> Arc<Latest> {
        let latest = Arc::new(Latest::new(Arc::new(Nowhere)));
        let report = Report::new(latest.clone());
        let task = report.task(Stage::Train, Unit::Steps, "training", Some(60));
        report.say(Event::Step(StepMetrics {
            step: 10,
            loss: 1.5,
            grad_norm: 0.5,
            learning_rate: 2e-5,
            epoch: 0.25,
            num_tokens: 99,
            tokens_per_second: 1000.0,
            eta_seconds: 30.0,
        }));
        drop(report.task(Stage::Evaluate, Unit::Rows, "evaluation", Some(4)));
        report.say(Event::Evaluated {
            step: 10,
            epoch: 0.25,
            eval_loss: 2.5,
            accuracy: 0.5,
            sources: Vec::new(),
        });
        report.warn(Stage::Train, "careful");
        drop(task);
        latest
    }

    #[test]
    fn the_newest_state_is_told_as_kaito_does_and_more() {
        let asked = Asked { path: "/metrics", accept: "*/*" };
        let reply = answer(&asked, &trained().state(), &Mutex::default());
        let value: Value = serde_json::from_str(&reply.body).unwrap();
        assert_eq!(
            value["training"].to_string(),
            "{\"stage\":\"train\",\"step\":10,\"steps\":60,\"epoch\":0.25,\"loss\":1.5,\"eval_loss\":2.5,\
             \"learning_rate\":0.00002,\"tokens_per_second\":1000.0,\"eta_seconds\":30.0}"
        );
        assert!(value["gpu_info"].is_array() != value["cpu_info"].is_object(), "one of them: {value}");
    }

    #[test]
    fn who_asks_for_text_gets_prometheus() {
        let ask = |path, accept| answer(&Asked { path, accept }, &trained().state(), &Mutex::default());
        let reply =
            ask("/metrics", "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5");
        assert!(reply.content_type.starts_with("application/openmetrics-text"), "{reply:?}");
        assert!(reply.body.ends_with("# EOF\n"));
        let text = ask("/metrics", "text/plain").body;
        assert!(text.contains("# TYPE hone_training_step gauge\nhone_training_step 10\n"), "{text}");
        assert!(text.contains("hone_training_tokens_total 99\n") && !text.contains("# EOF"), "{text}");
        assert_eq!(ask("/healthz", "").body, "ok\n");
        assert_eq!(ask("/", "").status, 404);
    }
}
