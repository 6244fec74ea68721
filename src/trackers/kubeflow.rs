//! Points -> the progress of a Kubeflow TrainJob: its controller gives a pod an address, a token and certificates, and
//! shows in the TrainJob's status what the pod posts there.

use std::borrow::Cow;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value as Json, json};

use super::{End, Point, Tracker, post};
use crate::source::call::Caller;
use crate::words;

/// The controller is asked no more often.
const INTERVAL: Duration = Duration::from_secs(5);
const DATE: &str = "%Y-%m-%dT%H:%M:%SZ";

/// The values that the controller gives a pod.
#[derive(Clone, Debug, PartialEq)]
pub struct Kubeflow {
    /// `KUBEFLOW_TRAINER_SERVER_URL`
    pub url: String,
    /// `KUBEFLOW_TRAINER_SERVER_CA_CERT`: a file.
    pub ca_file: Option<PathBuf>,
    /// `KUBEFLOW_TRAINER_SERVER_TOKEN`: a file, whose content changes from time to time.
    pub token_file: Option<PathBuf>,
}

impl Kubeflow {
    /// Returns the values of the environment; `None` outside a TrainJob, or if `DISABLE_KUBEFLOW_INTEGRATION` is TRUE.
    pub fn of(environment: &dyn Fn(&str) -> Option<String>) -> Option<Kubeflow> {
        let text = |name: &str| environment(name).filter(|text| !text.is_empty());
        let off = text("DISABLE_KUBEFLOW_INTEGRATION").is_some_and(|text| text.eq_ignore_ascii_case("true"));
        let url = text("KUBEFLOW_TRAINER_SERVER_URL").filter(|_| !off)?;
        let file = |name: &str| text(name).map(PathBuf::from);
        let (ca_file, token_file) =
            (file("KUBEFLOW_TRAINER_SERVER_CA_CERT"), file("KUBEFLOW_TRAINER_SERVER_TOKEN"));
        Some(Kubeflow { url, ca_file, token_file })
    }
}

/// The controller.
pub struct Controller {
    options: Kubeflow,
    caller: Option<Caller>,
    metrics: Vec<(Cow<'static, str>, f64)>,
    newest: Option<Point>,
    told_at: Option<Instant>,
}

impl Controller {
    /// Returns a controller that has received nothing yet.
    pub fn new(options: Kubeflow) -> Controller {
        Controller { options, caller: None, metrics: Vec::new(), newest: None, told_at: None }
    }

    fn take(&mut self, point: &Point) {
        for (name, value) in &point.values {
            match self.metrics.iter_mut().find(|(known, _)| known == name) {
                Some((_, newest)) => *newest = *value,
                None => self.metrics.push((name.clone(), *value)),
            }
        }
        if point.steps.is_some() {
            self.newest = Some(point.clone());
        }
    }

    /// Returns the status; `ended`: all is done.
    fn status(&self, ended: bool) -> Json {
        let mut status = json!({"lastUpdatedTime": words::date(SystemTime::now(), DATE)});
        let mut metrics: Vec<(Cow<str>, String)> =
            self.metrics.iter().map(|(name, value)| (name.clone(), value.to_string())).collect();
        if let Some(Point { step, steps: Some(steps), seconds_left, .. }) = &self.newest {
            // 100 says that the run ended.
            let percent = (100 * step / (*steps).max(1)).min(99);
            status["progressPercentage"] = if ended { 100 } else { percent }.into();
            let left = if ended { Some(0.0) } else { *seconds_left };
            if let Some(left) = left {
                status["estimatedRemainingSeconds"] = (left.max(0.0) as u64).into();
            }
            metrics.push(("current_step".into(), step.to_string()));
            metrics.push(("total_steps".into(), steps.to_string()));
        }
        let metric = |(name, value): &(Cow<str>, String)| json!({"name": name, "value": value});
        status["metrics"] = metrics.iter().map(metric).collect();
        json!({"trainerStatus": status})
    }

    fn tell(&mut self, ended: bool) -> Result<(), String> {
        let token = match &self.options.token_file {
            None => return Err("KUBEFLOW_TRAINER_SERVER_TOKEN names no file".into()),
            Some(file) => {
                let token =
                    crate::plain::text(file).map_err(|error| format!("{}: {error}", file.display()))?;
                crate::report::clean::never_show(&token);
                token
            }
        };
        let caller = match self.caller.take() {
            Some(caller) => caller,
            None => Caller::new(self.options.ca_file.as_deref()).map_err(|fault| fault.in_a_line())?,
        };
        let headers = [("authorization".to_owned(), format!("Bearer {}", token.trim()))];
        let told = post(&caller, &self.options.url, &headers, &self.status(ended));
        self.caller = Some(caller);
        self.told_at = Some(Instant::now());
        told.map(|_| ())
    }
}

impl Tracker for Controller {
    fn name(&self) -> &'static str {
        "kubeflow"
    }

    fn points(&mut self, points: &[Point]) -> Result<(), String> {
        points.iter().for_each(|point| self.take(point));
        match self.told_at.is_some_and(|at| at.elapsed() < INTERVAL) {
            true => Ok(()), // These are sent again with the next points or at the end.
            false => self.tell(false),
        }
    }

    fn end(&mut self, end: &End) -> Result<(), String> {
        if end.failed { Ok(()) } else { self.tell(true) }
    }
}
