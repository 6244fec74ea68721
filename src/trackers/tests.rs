//! Trackers that answer, that are gone, slow or wrong. The tests compare the points that they receive, and check that
//! the run is not disturbed.

use super::*;
use crate::report::{StepMetrics, Unit};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;

/// Passes nothing on but warnings.
#[derive(Default)]
struct Heard(Mutex<Vec<String>>);

impl Sink for Heard {
    fn event(&self, event: &Event) {
        if let Event::Warning { text, .. } = event {
            self.0.lock().unwrap().push(text.clone());
        }
    }
    fn progress(&self, _: &Progress) {}
}

/// Method, path and body.
type Asked = (String, String, String);

/// Starts a server that answers each request as `answer` says (`None`: never), until the process ends. Returns its
/// address, and the requests to it.
fn server(
    answer: impl Fn(&str, &str) -> Option<(u16, String)> + Send + 'static,
) -> (String, Arc<Mutex<Vec<Asked>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let asked: Arc<Mutex<Vec<Asked>>> = Arc::default();
    let seen = asked.clone();
    std::thread::spawn(move || {
        let mut silent = Vec::new();
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut first = String::new();
            reader.read_line(&mut first).unwrap();
            let mut length = 0;
            loop {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
                    length = value.trim().parse().unwrap();
                }
                if line.trim().is_empty() {
                    break;
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).unwrap();
            let mut words = first.split(' ').map(str::to_owned);
            let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            seen.lock().unwrap().push((method.clone(), path.clone(), String::from_utf8_lossy(&body).into()));
            match answer(&method, &path) {
                None => silent.push(stream),
                Some((status, body)) => {
                    let head = format!(
                        "HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
                        body.len()
                    );
                    let _ = stream.write_all((head + &body).as_bytes());
                }
            }
        }
    });
    (address, asked)
}

fn step(step: u64) -> Event {
    Event::Step(StepMetrics {
        step,
        loss: 1.5,
        grad_norm: 0.5,
        learning_rate: 1e-4,
        epoch: 0.25,
        num_tokens: 99,
        tokens_per_second: 10.0,
        eta_seconds: 1.0,
    })
}

/// Sends two steps and an evaluation through these trackers. Returns the warnings, and the time that the run spent in
/// giving points.
fn run(options: &Options, grace: Duration) -> (Vec<String>, Duration) {
    let heard = Arc::new(Heard::default());
    let settings = vec![("learning rate".to_owned(), "1e-4".to_owned())];
    let trackers = Trackers::start(options, settings, &Report::new(heard.clone())).unwrap();
    let report = Report::new(trackers.clone());
    let _task = report.task(Stage::Train, Unit::Steps, "training", Some(40));
    let began = Instant::now();
    report.say(step(10));
    report.say(step(20));
    report.say(Event::Evaluated {
        step: 20,
        epoch: 0.5,
        eval_loss: 2.0,
        accuracy: 0.5,
        sources: vec![("eval_support_loss".into(), 2.25)],
    });
    let spent = began.elapsed();
    trackers.finish_within(&End { failed: false, report: None }, grace);
    (heard.0.lock().unwrap().clone(), spent)
}

const GENEROUS: Duration = Duration::from_secs(30);

#[test]
fn mlflow_gets_a_run_with_parameters_metrics_and_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let (uri, asked) = server(|_, path| {
        let path = path.strip_prefix("/api/2.0/mlflow/").expect("MLflow's API");
        let info = "{\"run\":{\"info\":{\"run_id\":\"abc\",\"artifact_uri\":\"mlflow-artifacts:/0/abc/artifacts\"}}}";
        Some(match path {
            "experiments/get-by-name?experiment_name=tuning" => (404, "{}".into()),
            "experiments/create" => (200, "{\"experiment_id\":\"7\"}".into()),
            "runs/create" | "runs/get?run_id=abc" => (200, info.into()),
            _ => (200, "{}".into()),
        })
    });
    let mlflow = Mlflow {
        uri,
        experiment: "tuning".into(),
        remembered: folder.path().join("runs/mlflow-run"),
        ..Mlflow::default()
    };
    let options = Options { mlflow: Some(mlflow), name: "first".into(), ..Options::default() };
    assert_eq!(run(&options, GENEROUS).0, [""; 0]);
    let list = asked.lock().unwrap().clone();
    let bodies = |path: &str| -> Vec<Json> {
        let of_path = list.iter().filter(|(_, asked, _)| asked.ends_with(path));
        of_path.map(|(_, _, body)| serde_json::from_str(body).unwrap()).collect()
    };
    assert_eq!(
        (&bodies("runs/create")[0]["run_name"], &bodies("runs/create")[0]["experiment_id"]),
        (&"first".into(), &"7".into())
    );
    let batches = bodies("runs/log-batch");
    assert_eq!(batches[0]["params"].to_string(), "[{\"key\":\"learning_rate\",\"value\":\"1e-4\"}]");
    let metrics: Vec<(String, u64)> = batches[1..]
        .iter()
        .flat_map(|batch| batch["metrics"].as_array().unwrap().clone())
        .map(|metric| (metric["key"].as_str().unwrap().to_owned(), metric["step"].as_u64().unwrap()))
        .collect();
    assert!(
        metrics.contains(&("loss".into(), 10)) && metrics.contains(&("eval_loss".into(), 20)),
        "{metrics:?}"
    );
    assert_eq!(bodies("runs/update").last().unwrap()["status"], "FINISHED");
    // A restart goes on with the same run.
    assert_eq!(run(&options, GENEROUS).0, [""; 0]);
    let list = asked.lock().unwrap().clone();
    assert_eq!(list.iter().filter(|(_, path, _)| path.ends_with("runs/create")).count(), 1);
}

#[test]
fn a_gateway_and_a_receiver_get_the_newest_and_all_values() {
    let (gateway, pushed) = server(|_, _| Some((200, String::new())));
    let (otlp, received) = server(|_, _| Some((200, "{}".into())));
    let options = Options {
        pushgateway: Some(gateway),
        otlp: Some((format!("{otlp}/"), vec![("x-key".into(), "k".into())])),
        name: "a run/1".into(),
        ..Options::default()
    };
    assert_eq!(run(&options, GENEROUS).0, [""; 0]);
    let (method, path, body) = pushed.lock().unwrap().last().unwrap().clone();
    assert_eq!((method.as_str(), path.as_str()), ("PUT", "/metrics/job/hone/instance/a-run-1"));
    assert!(body.contains("hone_training_step 20\n") && body.contains("hone_evaluation_loss 2\n"), "{body}");
    assert!(body.contains("hone_stage{stage=\"finished\"} 1\n"), "{body}");
    let (_, path, body) = received.lock().unwrap()[0].clone();
    assert_eq!(path, "/v1/metrics");
    let body: Json = serde_json::from_str(&body).unwrap();
    let metrics = &body["resourceMetrics"][0]["scopeMetrics"][0]["metrics"];
    assert_eq!(metrics[0]["name"], "loss");
    let points = metrics[0]["gauge"]["dataPoints"].as_array().unwrap();
    assert_eq!((points.len(), &points[1]["attributes"][0]["value"]["intValue"]), (2, &"20".into()));
}

#[test]
fn trackers_that_are_gone_or_wrong_are_told_once_and_cost_the_run_nothing() {
    let gone = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        format!("http://{}", listener.local_addr().unwrap())
    };
    let (wrong, _) = server(|_, _| Some((500, "<script>no</script>".into())));
    let (silent, _) = server(|_, _| None);
    for (url, why) in [(gone, "refused"), (wrong, "HTTP 500: <script>"), (silent, "in time")] {
        let folder = tempfile::tempdir().unwrap();
        let mlflow = Mlflow { uri: url.clone(), remembered: folder.path().join("run"), ..Mlflow::default() };
        let options = Options {
            tensorboard: Some(folder.path().join("no/such\0folder")),
            mlflow: Some(mlflow),
            pushgateway: Some(url.clone()),
            otlp: Some((url, Vec::new())),
            ..Options::default()
        };
        let (warnings, spent) = run(&options, Duration::from_millis(1500));
        assert_eq!(warnings.len(), 4, "{warnings:?}");
        assert!(
            warnings[0].starts_with("TensorBoard: 0 points were dropped and 3 not delivered"),
            "{warnings:?}"
        );
        assert!(warnings[1..].iter().all(|text| text.contains(why)), "{why}: {warnings:?}");
        assert!(spent < Duration::from_secs(5), "giving three points waited for an answer: {spent:?}");
    }
}

#[test]
fn a_full_queue_drops_and_counts() {
    let (silent, _) = server(|_, _| None);
    let heard = Arc::new(Heard::default());
    let options = Options { otlp: Some((silent, Vec::new())), ..Options::default() };
    let trackers = Trackers::start(&options, Vec::new(), &Report::new(heard.clone())).unwrap();
    // The thread takes a batch and waits for an answer. Later points fill the queue.
    let count = QUEUE_POINTS as u64 + 2 * BATCH_POINTS as u64 + 100;
    (0..count).for_each(|place| trackers.event(&step(place)));
    let dropped = trackers.lock()[0].dropped;
    assert!(dropped >= 100, "{dropped}");
    trackers.finish_within(&End::default(), Duration::ZERO);
    assert!(heard.0.lock().unwrap()[0].contains(&format!("{dropped} points were dropped")));
}

#[test]
fn event_files_begin_with_their_version_and_hold_every_point() {
    let folder = tempfile::tempdir().unwrap();
    let options = Options { tensorboard: Some(folder.path().join("runs")), ..Options::default() };
    assert_eq!(run(&options, GENEROUS).0, [""; 0]);
    let files: Vec<_> = std::fs::read_dir(folder.path().join("runs")).unwrap().collect();
    let bytes = std::fs::read(files[0].as_ref().unwrap().path()).unwrap();
    let (mut at, mut records) = (0, Vec::new());
    while at < bytes.len() {
        let length = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
        records.push(bytes[at + 12..at + 12 + length].to_vec());
        at += length + 16;
    }
    let holds = |record: &[u8], text: &str| record.windows(text.len()).any(|part| part == text.as_bytes());
    assert_eq!(records.len(), 5, "version, session, three points");
    assert!(holds(&records[0], "brain.Event:2"));
    assert!(holds(&records[2], "train/loss") && holds(&records[4], "eval/mean_token_accuracy"));
    assert!(holds(&records[4], "eval/support_loss"));
}

#[test]
fn secrets_come_from_the_environment_only() {
    let options = Options {
        mlflow: Some(Mlflow::default()),
        otlp: Some(("http://x".into(), Vec::new())),
        ..Options::default()
    };
    let variables = [
        ("MLFLOW_TRACKING_USERNAME", "u"),
        ("MLFLOW_TRACKING_PASSWORD", "p"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "a=b, c=d=e"),
    ];
    let read =
        |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.to_string());
    let filled = options.with_secrets(&read);
    assert_eq!(filled.mlflow.unwrap().authorization.unwrap(), "Basic dTpw");
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    assert_eq!(filled.otlp.unwrap().1, [pair("a", "b"), pair("c", "d=e")]);
}

#[test]
fn a_service_that_quotes_its_secret_does_not_get_it_into_a_warning() {
    let secrets = ["canary-of-mlflow", "canary-of-telemetry", "canary-of-kubeflow"];
    let of_path = move |path: &str| {
        let at = ["mlflow", "v1/metrics"].iter().position(|part| path.contains(part)).unwrap_or(2);
        format!("no: {}", secrets[at])
    };
    let (url, _) = server(move |_, path| Some((401, of_path(path))));
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("token"), secrets[2]).unwrap();
    let variables = [
        ("MLFLOW_TRACKING_USERNAME", "u".to_owned()),
        ("MLFLOW_TRACKING_PASSWORD", secrets[0].into()),
        ("OTEL_EXPORTER_OTLP_HEADERS", format!("Authorization=Bearer {}, tenant=tuning", secrets[1])),
        ("KUBEFLOW_TRAINER_SERVER_URL", url.clone()),
        ("KUBEFLOW_TRAINER_SERVER_TOKEN", folder.path().join("token").display().to_string()),
    ];
    let read =
        |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.clone());
    let mlflow = Mlflow { uri: url.clone(), remembered: folder.path().join("run"), ..Mlflow::default() };
    let options = Options { mlflow: Some(mlflow), otlp: Some((url, Vec::new())), ..Options::default() };
    let (warnings, _) = run(&options.with_secrets(&read), GENEROUS);
    assert_eq!(warnings.len(), 3, "{warnings:?}");
    assert!(warnings.iter().all(|text| text.contains("no: ***")), "{warnings:?}");
}

#[test]
fn a_train_job_is_told_its_progress_and_its_end() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("token"), "canary\n").unwrap();
    let (url, asked) = server(|_, _| Some((200, "{}".into())));
    let variables = [
        ("KUBEFLOW_TRAINER_SERVER_URL", format!("{url}/status")),
        ("KUBEFLOW_TRAINER_SERVER_TOKEN", folder.path().join("token").display().to_string()),
    ];
    let read =
        |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.clone());
    let options = Options::default().with_secrets(&read);
    assert!(!options.is_empty() && Options::default().with_secrets(&|_| None).is_empty());
    let off = |name: &str| if name.starts_with("DISABLE") { Some("TRUE".into()) } else { read(name) };
    assert!(Options::default().with_secrets(&off).is_empty());
    assert_eq!(run(&options, GENEROUS).0, [""; 0]);
    let list = asked.lock().unwrap().clone();
    let status =
        |at: usize| -> Json { serde_json::from_str::<Json>(&list[at].2).unwrap()["trainerStatus"].clone() };
    assert_eq!(list.len(), 2, "points that come at once, and the end");
    let (first, last) = (status(0), status(1));
    assert_eq!((&first["progressPercentage"], &first["estimatedRemainingSeconds"]), (&50.into(), &1.into()));
    assert_eq!((&last["progressPercentage"], &last["estimatedRemainingSeconds"]), (&100.into(), &0.into()));
    let metric = |name: &str| {
        let list = last["metrics"].as_array().unwrap();
        list.iter().find(|metric| metric["name"] == name).map(|metric| metric["value"].clone())
    };
    assert_eq!(metric("eval_loss"), Some("2".into()));
    assert_eq!((metric("current_step"), metric("total_steps")), (Some("20".into()), Some("40".into())));
}
