//! Points -> the newest values at a Prometheus pushgateway, for runs that end before anyone scrapes them.

use super::{End, Point, Tracker};
use crate::metrics::{self, State};
use crate::report::StepMetrics;
use crate::source::call::{Call, Caller};

/// A pushgateway.
pub struct Gateway {
    url: String,
    caller: Caller,
    state: State,
}

impl Gateway {
    /// Pushes to the group of job `hone` and this instance.
    pub fn new(url: &str, name: &str, caller: Caller) -> Gateway {
        let instance: String = name
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '-' })
            .collect();
        let url = format!("{}/metrics/job/hone/instance/{instance}", url.trim_end_matches('/'));
        Gateway { url, caller, state: State::default() }
    }

    fn take(&mut self, point: &Point) {
        let value = |name: &str| point.values.iter().find(|(key, _)| *key == name).map(|(_, value)| *value);
        if let Some(eval_loss) = value("eval_loss") {
            self.state.eval_loss = Some(eval_loss);
            return;
        }
        let number = |name: &str| value(name).unwrap_or(0.0);
        self.state.step = Some(StepMetrics {
            step: point.step,
            loss: number("loss"),
            grad_norm: number("grad_norm"),
            learning_rate: number("learning_rate"),
            epoch: number("epoch"),
            num_tokens: number("num_tokens") as u64,
            tokens_per_second: number("tokens_per_second"),
            eta_seconds: 0.0,
        });
    }

    fn push(&self) -> Result<(), String> {
        let body = metrics::text(&self.state).into_bytes();
        let content_type = "text/plain; version=0.0.4";
        let call = Call { method: "PUT", url: &self.url, content_type, headers: &[], body };
        match self.caller.call(&call)? {
            (200..300, _) => Ok(()),
            (status, body) => Err(format!("HTTP {status}: {}", String::from_utf8_lossy(&body))),
        }
    }
}

impl Tracker for Gateway {
    fn name(&self) -> &'static str {
        "pushgateway"
    }

    fn points(&mut self, points: &[Point]) -> Result<(), String> {
        points.iter().for_each(|point| self.take(point));
        self.state.stage = Some("train");
        self.push()
    }

    fn end(&mut self, end: &End) -> Result<(), String> {
        self.state.stage = Some(if end.failed { "failed" } else { "finished" });
        self.push()
    }
}
