//! Points -> a run in MLflow by its REST API 2.0: settings as parameters, metrics in batches, the report as an
//! artifact.

use serde_json::{Value as Json, json};

use super::{End, Mlflow, Point, Tracker, post};
use crate::plain;
use crate::source::call::{Call, Caller};

/// LIMIT: metrics of a request, by MLflow.
const METRICS_MAX: usize = 1000;
/// LIMIT: parameters of a request, and letters of one, by MLflow.
const PARAMETERS_MAX: usize = 100;
const LETTERS_MAX: usize = 500;

/// MLflow's server.
pub struct Service {
    options: Mlflow,
    name: String,
    caller: Caller,
    headers: Vec<(String, String)>,
    run: Option<Json>,
}

impl Service {
    /// Returns a service to which no request was sent yet.
    pub fn new(options: Mlflow, name: String, caller: Caller) -> Service {
        let authorization = options.authorization.clone();
        let headers = authorization.map(|value| ("authorization".to_owned(), value)).into_iter().collect();
        Service { options, name, caller, headers, run: None }
    }

    fn ask(&self, path: &str, body: &Json) -> Result<Json, String> {
        let url = format!("{}/api/2.0/mlflow/{path}", self.options.uri.trim_end_matches('/'));
        post(&self.caller, &url, &self.headers, body).map_err(|why| format!("{path}: {why}"))
    }

    fn get(&self, path: &str) -> Result<(u16, Json), String> {
        let url = format!("{}/api/2.0/mlflow/{path}", self.options.uri.trim_end_matches('/'));
        let call = Call {
            method: "GET",
            url: &url,
            content_type: "application/json",
            headers: &self.headers,
            body: Vec::new(),
        };
        let (status, body) = self.caller.call(&call)?;
        Ok((status, serde_json::from_slice(&body).unwrap_or(Json::Null)))
    }

    /// Returns the experiment of this name, made if there is none.
    fn experiment(&self) -> Result<String, String> {
        let name: String = url::form_urlencoded::byte_serialize(self.options.experiment.as_bytes()).collect();
        let (status, found) = self.get(&format!("experiments/get-by-name?experiment_name={name}"))?;
        let id = |value: &Json| value.as_str().map(str::to_owned);
        if status == 200
            && let Some(id) = id(&found["experiment"]["experiment_id"])
        {
            return Ok(id);
        }
        let made = self.ask("experiments/create", &json!({"name": self.options.experiment}))?;
        id(&made["experiment_id"]).ok_or_else(|| "experiments/create gave no experiment_id".into())
    }

    /// Returns the run that was named or begun by an earlier start, else a new one.
    fn start(&self) -> Result<Json, String> {
        let remembered = plain::text(&self.options.remembered).ok();
        let earlier = self.options.run.clone().or(remembered.map(|text| text.trim().to_owned()));
        if let Some(id) = earlier {
            let plain: String = id.chars().filter(char::is_ascii_alphanumeric).collect();
            let (status, found) = self.get(&format!("runs/get?run_id={plain}"))?;
            if status == 200 && found["run"]["info"]["run_id"].is_string() {
                self.ask("runs/update", &json!({"run_id": plain, "status": "RUNNING"}))?;
                return Ok(found["run"]["info"].clone());
            }
            if self.options.run.is_some() {
                return Err(format!("there is no run {plain} (MLFLOW_RUN_ID)"));
            }
        }
        let now = std::time::SystemTime::now();
        let point = Point { time: now, ..Point::now() };
        let body = json!({
            "experiment_id": self.experiment()?, "run_name": self.name, "start_time": point.milliseconds(),
            "tags": [{"key": "mlflow.source.name", "value": "hone"}, {"key": "mlflow.source.type", "value": "JOB"}],
        });
        let made = self.ask("runs/create", &body)?;
        let info = made["run"]["info"].clone();
        let Some(id) = info["run_id"].as_str() else { return Err("runs/create gave no run_id".into()) };
        if let Some(folder) = self.options.remembered.parent() {
            let _ = std::fs::create_dir_all(folder);
        }
        crate::whole::write(&self.options.remembered, id.as_bytes())
            .map_err(crate::fault::Fault::in_a_line)?;
        Ok(info)
    }

    fn run_id(&self) -> &str {
        self.run.as_ref().and_then(|run| run["run_id"].as_str()).unwrap_or_default()
    }

    /// Puts a file beside the run, if the server keeps artifacts itself.
    fn artifact(&self, file: &std::path::Path) -> Result<(), String> {
        let uri = self.run.as_ref().and_then(|run| run["artifact_uri"].as_str()).unwrap_or_default();
        let Some(path) = uri.strip_prefix("mlflow-artifacts:") else {
            return Err(format!(
                "the report is no artifact: the run's artifacts are at {uri}, which the server does not serve"
            ));
        };
        // mlflow-artifacts:/PATH, or with the host that serves it.
        let path = match path.strip_prefix("//") {
            Some(rest) => rest.split_once('/').map_or("", |(_, path)| path),
            None => path.trim_start_matches('/'),
        };
        let base = self.options.uri.trim_end_matches('/');
        let url = format!("{base}/api/2.0/mlflow-artifacts/artifacts/{path}/report.html");
        let body = std::fs::read(file).map_err(|error| error.to_string())?;
        let call = Call { method: "PUT", url: &url, content_type: "text/html", headers: &self.headers, body };
        match self.caller.call(&call)? {
            (200..300, _) => Ok(()),
            (status, _) => Err(format!("the report was not taken as an artifact: HTTP {status}")),
        }
    }
}

impl Tracker for Service {
    fn name(&self) -> &'static str {
        "MLflow"
    }

    fn begin(&mut self, settings: &[(String, String)]) -> Result<(), String> {
        let run = self.start()?;
        self.run = Some(run);
        for part in settings.chunks(PARAMETERS_MAX) {
            let parameter = |(key, value): &(String, String)| {
                let value: String = value.chars().take(LETTERS_MAX).collect();
                let key: String = key.chars().map(|c| if c == ' ' { '_' } else { c }).collect();
                json!({"key": key, "value": value})
            };
            let parameters: Vec<Json> = part.iter().map(parameter).collect();
            self.ask("runs/log-batch", &json!({"run_id": self.run_id(), "params": parameters}))?;
        }
        Ok(())
    }

    fn points(&mut self, points: &[Point]) -> Result<(), String> {
        let metric = |point: &Point, (name, value): &(std::borrow::Cow<'static, str>, f64)| json!({"key": name, "value": value, "timestamp": point.milliseconds(), "step": point.step});
        let metrics = points.iter().flat_map(|point| {
            let finite = point.values.iter().filter(|(_, value)| value.is_finite());
            finite.map(|value| metric(point, value)).collect::<Vec<_>>()
        });
        let metrics: Vec<Json> = metrics.collect();
        for part in metrics.chunks(METRICS_MAX) {
            self.ask("runs/log-batch", &json!({"run_id": self.run_id(), "metrics": part}))?;
        }
        Ok(())
    }

    fn end(&mut self, end: &End) -> Result<(), String> {
        if self.run.is_none() {
            return Ok(());
        }
        let kept = end.report.as_deref().map_or(Ok(()), |file| self.artifact(file));
        let now = Point::now().milliseconds();
        let status = if end.failed { "FAILED" } else { "FINISHED" };
        self.ask("runs/update", &json!({"run_id": self.run_id(), "status": status, "end_time": now}))?;
        kept
    }
}
