//! Points -> OpenTelemetry metrics by OTLP over HTTP, in JSON (opentelemetry-proto 1.x, ExportMetricsServiceRequest).

use serde_json::{Value as Json, json};

use super::{Point, Tracker, post};
use crate::source::call::Caller;

/// An OTLP receiver, such as the collector.
pub struct Receiver {
    url: String,
    headers: Vec<(String, String)>,
    name: String,
    caller: Caller,
}

impl Receiver {
    /// Returns a receiver at this address, which has no `/v1/metrics` at its end.
    pub fn new(url: &str, headers: Vec<(String, String)>, name: &str, caller: Caller) -> Receiver {
        let url = format!("{}/v1/metrics", url.trim_end_matches('/'));
        Receiver { url, headers, name: name.to_owned(), caller }
    }
}

/// Returns a request with one gauge for each name, which has a data point for each step.
fn request(points: &[Point], run: &str) -> Json {
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in points.iter().flat_map(|point| &point.values) {
        if !names.contains(&name.as_ref()) {
            names.push(name);
        }
    }
    let text = |key: &str, value: &str| json!({"key": key, "value": {"stringValue": value}});
    let data_point = |point: &Point, value: f64| {
        json!({
            "timeUnixNano": (u128::from(point.milliseconds()) * 1_000_000).to_string(), "asDouble": value,
            "attributes": [{"key": "step", "value": {"intValue": point.step.to_string()}}],
        })
    };
    let gauge = |name: &&str| {
        let values = points.iter().flat_map(|point| {
            let of_name = point.values.iter().filter(|(key, value)| key == name && value.is_finite());
            of_name.map(|(_, value)| data_point(point, *value)).collect::<Vec<_>>()
        });
        json!({"name": name, "gauge": {"dataPoints": values.collect::<Vec<_>>()}})
    };
    json!({"resourceMetrics": [{
        "resource": {"attributes": [text("service.name", "hone"), text("service.instance.id", run)]},
        "scopeMetrics": [{
            "scope": {"name": "hone", "version": env!("CARGO_PKG_VERSION")},
            "metrics": names.iter().map(gauge).collect::<Vec<_>>(),
        }],
    }]})
}

impl Tracker for Receiver {
    fn name(&self) -> &'static str {
        "OpenTelemetry"
    }

    fn points(&mut self, points: &[Point]) -> Result<(), String> {
        post(&self.caller, &self.url, &self.headers, &request(points, &self.name)).map(|_| ())
    }
}
