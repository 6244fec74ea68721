//! Metrics of a run -> TensorBoard, MLflow, a Prometheus pushgateway, OpenTelemetry, a Kubeflow TrainJob.
//!
//! Each tracker has a thread and a bounded queue. The run puts a point into the queue and goes on; a point that finds
//! the queue full is dropped and counted. Points that a tracker could not deliver are reported once, at the end, and do
//! not fail the run.

mod tensorboard;
mod mlflow;
mod gateway;
mod telemetry;
mod kubeflow;

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value as Json;

use crate::fault::{Fault, Result};
use crate::report::clean::never_show;
use crate::report::{Event, Progress, Report, Sink, Stage};
pub use kubeflow::Kubeflow;

/// LIMIT: points that wait for a tracker. A service that is slower for longer than this loses some.
const QUEUE_POINTS: usize = 4096;
/// LIMIT: points sent in one request.
const BATCH_POINTS: usize = 256;
/// The time that points are collected before they are sent.
const COLLECT: Duration = Duration::from_secs(2);
/// The time that the end of a run waits for trackers.
const GRACE: Duration = Duration::from_secs(15);
/// Failures in a row after which a tracker is asked less often, for so long.
const PAUSE: Duration = Duration::from_secs(30);

/// Parts of the names of headers that hold secrets.
const SECRET_HEADERS: [&str; 6] = ["auth", "key", "token", "secret", "password", "cookie"];

/// The trackers of a run. `plan` and the environment fill it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options {
    /// Folder for TensorBoard's event files.
    pub tensorboard: Option<PathBuf>,
    /// A run in MLflow.
    pub mlflow: Option<Mlflow>,
    /// Address of a pushgateway, without `/metrics`.
    pub pushgateway: Option<String>,
    /// Address of an OTLP/HTTP receiver, without `/v1/metrics`, and its headers.
    pub otlp: Option<(String, Vec<(String, String)>)>,
    /// The TrainJob that this pod belongs to.
    pub kubeflow: Option<Kubeflow>,
    /// Name of the run.
    pub name: String,
    /// Certificates that are trusted besides the built-in ones.
    pub ca_file: Option<PathBuf>,
}

/// The address of MLflow, and the run that it shows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Mlflow {
    /// `http://host:5000`
    pub uri: String,
    /// Name of the experiment.
    pub experiment: String,
    /// A run to go on with.
    pub run: Option<String>,
    /// File that remembers the run for a restart.
    pub remembered: PathBuf,
    /// `Authorization`, if the service wants one.
    pub authorization: Option<String>,
}

/// Values of one step, named as TRL names them.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    /// The time of the measurement.
    pub time: SystemTime,
    /// The optimizer step.
    pub step: u64,
    /// Names and values.
    pub values: Vec<(Cow<'static, str>, f64)>,
    /// Steps of the whole run, and how long the rest may take; of optimizer steps only.
    pub steps: Option<u64>,
    /// Seconds to the end of training.
    pub seconds_left: Option<f64>,
}

impl Point {
    /// Returns a moment without values.
    fn now() -> Point {
        Point { time: SystemTime::now(), step: 0, values: Vec::new(), steps: None, seconds_left: None }
    }

    /// Milliseconds since 1970.
    fn milliseconds(&self) -> u64 {
        self.time.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64)
    }
}

/// The end of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct End {
    /// Whether the run ended with a fault.
    pub failed: bool,
    /// The page that explains the run, if it was written.
    pub report: Option<PathBuf>,
}

/// A place that metrics go to. Called from the tracker's own thread only.
trait Tracker: Send {
    fn name(&self) -> &'static str;
    /// Receives the settings of the run, once, before any point.
    fn begin(&mut self, _settings: &[(String, String)]) -> std::result::Result<(), String> {
        Ok(())
    }
    fn points(&mut self, points: &[Point]) -> std::result::Result<(), String>;
    fn end(&mut self, _end: &End) -> std::result::Result<(), String> {
        Ok(())
    }
}

/// Passes everything on, and gives points to the trackers.
pub struct Trackers {
    sink: Arc<dyn Sink>,
    running: Mutex<Vec<Running>>,
    /// Steps of the whole run, once it trains.
    steps: AtomicU64,
}

/// A tracker's thread, seen from the run.
struct Running {
    name: &'static str,
    queue: SyncSender<Point>,
    dropped: u64,
    outcome: Arc<Outcome>,
    end: Arc<Mutex<Option<End>>>,
    thread: JoinHandle<()>,
}

/// The message of a tracker's thread.
#[derive(Default)]
struct Outcome {
    lost: AtomicU64,
    why: Mutex<Option<String>>,
}

impl Options {
    /// Returns whether nothing is tracked.
    pub fn is_empty(&self) -> bool {
        self.tensorboard.is_none()
            && self.mlflow.is_none()
            && self.pushgateway.is_none()
            && self.otlp.is_none()
            && self.kubeflow.is_none()
    }

    /// Adds values that only the environment has: secrets (MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and
    /// MLFLOW_TRACKING_PASSWORD, and OTEL_EXPORTER_OTLP_HEADERS), and the variables that Kubeflow's controller sets in
    /// a pod.
    pub fn with_secrets(mut self, environment: &dyn Fn(&str) -> Option<String>) -> Options {
        let text = |name: &str| environment(name).filter(|text| !text.is_empty());
        if let Some(mlflow) = &mut self.mlflow {
            let pair = text("MLFLOW_TRACKING_USERNAME").zip(text("MLFLOW_TRACKING_PASSWORD"));
            let secrets = [text("MLFLOW_TRACKING_PASSWORD"), text("MLFLOW_TRACKING_TOKEN")];
            secrets.into_iter().flatten().for_each(|secret| never_show(&secret));
            let basic = pair.map(|(user, password)| {
                format!("Basic {}", crate::words::base64(format!("{user}:{password}").as_bytes()))
            });
            basic.iter().for_each(|basic| never_show(basic.trim_start_matches("Basic ")));
            let bearer = text("MLFLOW_TRACKING_TOKEN").map(|token| format!("Bearer {token}"));
            mlflow.authorization = bearer.or(basic);
        }
        if let (Some((_, headers)), Some(given)) = (&mut self.otlp, text("OTEL_EXPORTER_OTLP_HEADERS")) {
            let pairs = given.split(',').filter_map(|pair| pair.split_once('='));
            *headers = pairs.map(|(name, value)| (name.trim().to_owned(), value.trim().to_owned())).collect();
            let is_secret = |name: &str| SECRET_HEADERS.iter().any(|part| name.to_lowercase().contains(part));
            for (_, value) in headers.iter().filter(|(name, _)| is_secret(name)) {
                // A server may quote only the token of `Bearer TOKEN`.
                never_show(value.rsplit(' ').next().unwrap_or(value));
            }
        }
        self.kubeflow = Kubeflow::of(environment);
        self
    }
}

impl Trackers {
    /// Starts the trackers in front of `report`.
    ///
    /// # Errors
    /// Config: the certificates cannot be used.
    pub fn start(
        options: &Options,
        settings: Vec<(String, String)>,
        report: &Report,
    ) -> Result<Arc<Trackers>> {
        let mut trackers: Vec<Box<dyn Tracker>> = Vec::new();
        if let Some(folder) = &options.tensorboard {
            trackers.push(Box::new(tensorboard::EventFile::new(folder.clone())));
        }
        let caller = || crate::source::call::Caller::new(options.ca_file.as_deref());
        if let Some(mlflow) = &options.mlflow {
            trackers.push(Box::new(mlflow::Service::new(mlflow.clone(), options.name.clone(), caller()?)));
        }
        if let Some(url) = &options.pushgateway {
            trackers.push(Box::new(gateway::Gateway::new(url, &options.name, caller()?)));
        }
        if let Some((url, headers)) = &options.otlp {
            let telemetry = telemetry::Receiver::new(url, headers.clone(), &options.name, caller()?);
            trackers.push(Box::new(telemetry));
        }
        if let Some(kubeflow) = &options.kubeflow {
            trackers.push(Box::new(kubeflow::Controller::new(kubeflow.clone())));
        }
        let settings = Arc::new(settings);
        let started = trackers.into_iter().map(|tracker| Running::start(tracker, settings.clone()));
        let running = started.collect::<Result<Vec<_>>>()?;
        Ok(Arc::new(Trackers { sink: report.sink(), running: Mutex::new(running), steps: AtomicU64::new(0) }))
    }

    fn give(&self, step: u64, values: Vec<(Cow<'static, str>, f64)>, seconds_left: Option<f64>) {
        let steps = seconds_left.map(|_| self.steps.load(Ordering::Relaxed)).filter(|steps| *steps > 0);
        let point = Point { step, values, steps, seconds_left, ..Point::now() };
        for running in self.lock().iter_mut() {
            running.dropped += u64::from(running.queue.try_send(point.clone()).is_err());
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Running>> {
        self.running.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Sends the end of the run to the trackers and waits for them, for no longer than the grace in all. Lost points
    /// are a warning.
    pub fn finish(&self, end: &End) {
        self.finish_within(end, GRACE);
    }

    fn finish_within(&self, end: &End, grace: Duration) {
        let until = Instant::now() + grace;
        let running = std::mem::take(&mut *self.lock());
        for Running { end: place, .. } in &running {
            *place.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(end.clone());
        }
        let threads: Vec<_> = running
            .into_iter()
            .map(|Running { name, queue, dropped, outcome, thread, .. }| {
                drop(queue); // the thread sees that no point follows
                (name, dropped, outcome, thread)
            })
            .collect();
        for (name, dropped, outcome, thread) in threads {
            while !thread.is_finished() && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(10));
            }
            let late = !thread.is_finished();
            let lost = outcome.lost.load(Ordering::Relaxed);
            let why = outcome.why.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
            if late || dropped + lost > 0 || why.is_some() {
                let why = why.unwrap_or_else(|| "it did not answer in time".into());
                let text = format!(
                    "{name}: {dropped} points were dropped and {lost} not delivered, which does not change the run: {why}"
                );
                self.sink.event(&Event::Warning { stage: Stage::Train, text });
            }
        }
    }
}

impl Sink for Trackers {
    fn event(&self, event: &Event) {
        match event {
            Event::Step(metrics) => self.give(
                metrics.step,
                vec![
                    ("loss".into(), metrics.loss),
                    ("grad_norm".into(), metrics.grad_norm),
                    ("learning_rate".into(), metrics.learning_rate),
                    ("epoch".into(), metrics.epoch),
                    ("num_tokens".into(), metrics.num_tokens as f64),
                    ("tokens_per_second".into(), metrics.tokens_per_second),
                ],
                Some(metrics.eta_seconds),
            ),
            Event::Evaluated { step, epoch, eval_loss, accuracy, sources } => {
                let mut values: Vec<(Cow<'static, str>, f64)> = vec![
                    ("eval_loss".into(), *eval_loss),
                    ("eval_perplexity".into(), eval_loss.exp()),
                    ("eval_mean_token_accuracy".into(), *accuracy),
                    ("epoch".into(), *epoch),
                ];
                values.extend(sources.iter().map(|(name, value)| (name.clone().into(), *value)));
                self.give(*step, values, None);
            }
            _ => {}
        }
        self.sink.event(event);
    }

    fn progress(&self, progress: &Progress) {
        if progress.stage == Stage::Train
            && let Some(steps) = progress.total
        {
            self.steps.store(steps, Ordering::Relaxed);
        }
        self.sink.progress(progress);
    }
}

impl Running {
    fn start(mut tracker: Box<dyn Tracker>, settings: Arc<Vec<(String, String)>>) -> Result<Running> {
        let (queue, points) = sync_channel(QUEUE_POINTS);
        let (name, outcome, end) = (tracker.name(), Arc::new(Outcome::default()), Arc::new(Mutex::new(None)));
        let (told, ending) = (outcome.clone(), end.clone());
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
            work(tracker.as_mut(), &settings, &points, &told);
            let end: Option<End> = ending.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
            if let Some(end) = end {
                told.note(tracker.end(&end));
            }
        });
        let thread =
            thread.map_err(|error| Fault::machine(&format!("start the thread of {name}"), &error))?;
        Ok(Running { name, queue, dropped: 0, outcome, end, thread })
    }
}

impl Outcome {
    fn note(&self, done: std::result::Result<(), String>) -> bool {
        let Err(why) = done else { return true };
        *self.why.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) =
            Some(crate::report::clean::clean(&why, 300));
        false
    }
}

/// Takes points until no more can come. After a failure the same points are tried once more with the next ones; a
/// tracker that fails again pauses, and points that wait too long are lost.
fn work(
    tracker: &mut dyn Tracker,
    settings: &[(String, String)],
    points: &Receiver<Point>,
    outcome: &Outcome,
) {
    let (mut began, mut batch, mut quiet_until) = (false, Vec::new(), None::<Instant>);
    loop {
        let open = collect(points, &mut batch);
        let pausing = open && quiet_until.is_some_and(|until| Instant::now() < until);
        if !batch.is_empty() && !pausing {
            // The first point comes when the run owns its folder and trains.
            began = began || outcome.note(tracker.begin(settings));
            if began && outcome.note(tracker.points(&batch)) {
                batch.clear();
                quiet_until = None;
            } else {
                quiet_until = Some(Instant::now() + PAUSE);
            }
        }
        let surplus = if open { batch.len().saturating_sub(QUEUE_POINTS) } else { batch.len() };
        outcome.lost.fetch_add(surplus as u64, Ordering::Relaxed);
        batch.drain(..surplus);
        if !open {
            return;
        }
    }
}

/// Adds the points that come within a while; false if none can come any more.
fn collect(points: &Receiver<Point>, batch: &mut Vec<Point>) -> bool {
    let (until, most) = (Instant::now() + COLLECT, batch.len() + BATCH_POINTS);
    loop {
        match points.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(point) => batch.push(point),
            Err(RecvTimeoutError::Timeout) => return true,
            Err(RecvTimeoutError::Disconnected) => return false,
        }
        if batch.len() >= most {
            return true;
        }
    }
}

/// Posts JSON; an answer that is no success is an error with the service's words.
fn post(
    caller: &crate::source::call::Caller,
    url: &str,
    headers: &[(String, String)],
    body: &Json,
) -> std::result::Result<Json, String> {
    let call = crate::source::call::Call {
        method: "POST",
        url,
        content_type: "application/json",
        headers,
        body: body.to_string().into_bytes(),
    };
    let (status, body) = caller.call(&call)?;
    if !(200..300).contains(&status) {
        return Err(format!("HTTP {status}: {}", String::from_utf8_lossy(&body)));
    }
    Ok(serde_json::from_slice(&body).unwrap_or(Json::Null))
}

/// Returns the folder for trackers' files beside the results.
pub fn folder(output: &Path) -> PathBuf {
    output.join(crate::run_folder::TRACKERS)
}

#[cfg(test)]
mod tests;
