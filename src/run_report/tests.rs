//! Pages of finished, failed, old and hostile results.

use super::*;
use crate::fault::Kind;
use crate::report::Report;
use std::fs;

struct Nowhere(Mutex<Vec<String>>);

impl Sink for Nowhere {
    fn event(&self, event: &Event) {
        if let Event::Warning { text, .. } = event {
            self.0.lock().unwrap().push(text.clone());
        }
    }
    fn progress(&self, _: &Progress) {}
}

fn recorder() -> (Arc<Nowhere>, Report) {
    let nowhere = Arc::new(Nowhere(Mutex::default()));
    (nowhere.clone(), Report::new(Arc::new(Recorder::new(nowhere))))
}

const HOSTILE: &str =
    "</title></script><script>alert(1)</script><img src=https://evil.example/x onerror=alert(2)>'\"`${x}";

/// Writes a run's whole story into `folder`. Every text of it is hostile.
fn tell(report: &Report, folder: &Path) {
    let value = |value: &str| json!({"value": value, "origin": HOSTILE});
    let values =
        json!({"model name": value(HOSTILE), "output folder": value(HOSTILE), HOSTILE: value(HOSTILE)});
    report.fact(
        "plan",
        json!({"values": values, "ignored": [{"name": HOSTILE, "why": HOSTILE}], "warnings": []}),
    );
    report.fact("folder", json!({"path": folder, "fingerprint": HOSTILE}));
    report.fact("environment", json!({"device": HOSTILE, "cpu": null, HOSTILE: HOSTILE}));
    report.fact("provenance", json!({"base": HOSTILE, "data": [{"name": HOSTILE, "sha256": HOSTILE}]}));
    report.fact("data rows", json!({"train": 3, "lengths": [[HOSTILE, 2, 3]]}));
    report.fact("memory plan", json!({"terms": {HOSTILE: 5}, "bytes": 5, "choice": HOSTILE}));
    let pair = json!({"prompt": HOSTILE, "base": {"text": HOSTILE}, "tuned": HOSTILE});
    fs::write(folder.join("answers.json"), json!({"pairs": [pair]}).to_string()).unwrap();
    report.note(Stage::Read, HOSTILE);
    report.warn(Stage::Tokenize, HOSTILE);
    for step in 1..=3 {
        report.say(Event::Step(StepMetrics {
            step,
            loss: 1.0,
            grad_norm: 1.0,
            learning_rate: 1e-4,
            epoch: 0.5,
            num_tokens: 9,
            tokens_per_second: 10.0,
            eta_seconds: 0.0,
        }));
    }
    let lines =
        "{\"step\":1,\"loss\":2.0,\"grad_norm\":1.0,\"learning_rate\":1e-4}\n{\"step\":2,\"loss\":1.5}\n";
    let evaluation = json!({"step": 2, "eval_loss": 1.25, format!("eval_{HOSTILE}_loss"): 1.0});
    fs::write(folder.join("metrics.jsonl"), format!("{lines}{evaluation}\nno json\n")).unwrap();
}

/// Expects that the page loads nothing from anywhere, and that its one script is hone's.
fn assert_alone(page: &str) {
    assert_eq!(page.matches("<script").count(), 1, "one script");
    for load in
        ["src=", "href=", "url(", "@import", "<link", "<img", "<iframe", "<object", "fetch(", "import("]
    {
        let outside = page.replace("src=https://evil.example", "");
        assert!(!outside.contains(load), "{load} stands in the page");
    }
    assert!(!page.contains("<img") && !page.contains("alert(1)</script>"), "hostile text is text");
}

#[test]
fn a_finished_run_has_a_page_of_its_own_that_loads_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (nowhere, report) = recorder();
    tell(&report, folder.path());
    report
        .fact("trained", json!({"steps": 2, "loss": 1.5, "first_loss": 2.0, "tokens": 99, "seconds": 61.0}));
    report.fact("image", json!({"reference": "host/team/support:1", "digest": "sha256:ab"}));
    let hub = json!({"destination": format!("hf://org/{HOSTILE}"), "revision": "0123abcd", "image": false});
    report.fact("published", json!([hub]));
    report.fact("ended", true);
    let page = fs::read_to_string(folder.path().join(REPORT)).unwrap();
    assert_alone(&page);
    for text in [
        "Finished",
        "sent to",
        "0123abcd",
        "2 → 1.5",
        "1 min 1 s",
        "hone pull host/team/support:1 ./support",
        "support=oci://host/team/support:1",
    ] {
        assert!(page.contains(text), "{text} is missing");
    }
    assert!(page.contains("<svg") && page.contains("Tokens a second") && page.contains("Memory in use"));
    assert_eq!(*nowhere.0.lock().unwrap(), [HOSTILE], "no warning of its own");
    let story = Story::read(folder.path()).unwrap().unwrap();
    assert_eq!(story.facts["binary_sha256"].as_str().unwrap().len(), 64);
    // The page can be made again from the files, and is the same.
    let again = make(&[folder.path().to_owned()], None).unwrap();
    assert_eq!(fs::read_to_string(again).unwrap(), page);
}

#[test]
fn a_failed_run_begins_with_why_and_a_restart_remembers_it() {
    let folder = tempfile::tempdir().unwrap();
    let (_, report) = recorder();
    tell(&report, folder.path());
    let fault = Fault::new(Kind::Capacity, format!("out of memory {HOSTILE}")).help("lower max_length");
    report.fault(&fault);
    let page = fs::read_to_string(folder.path().join(REPORT)).unwrap();
    assert_alone(&page);
    let place = |text: &str| page.find(text).unwrap_or_else(|| panic!("{text} is missing"));
    assert!(place("Exit code 14") < place("<svg") && place("lower max_length") < place("<svg"));
    assert!(page.contains("Failed: capacity, exit code 14"));
    assert!(!page.contains("because no rows were set aside"), "the run ended before it could know");
    let (_, report) = recorder();
    tell(&report, folder.path());
    report.fact("ended", true);
    let page = fs::read_to_string(folder.path().join(REPORT)).unwrap();
    assert!(
        page.contains("2 starts") && page.contains("exit code 14: out of memory"),
        "the earlier start is told"
    );
    assert!(!page.contains("class=\"box bad\""), "and is not the run's own end");
}

#[test]
fn another_runs_story_is_not_continued() {
    let folder = tempfile::tempdir().unwrap();
    let (_, report) = recorder();
    tell(&report, folder.path());
    let (_, report) = recorder();
    report.fact("folder", json!({"path": folder.path(), "fingerprint": "other"}));
    report.fact("ended", true);
    let story = Story::read(folder.path()).unwrap().unwrap();
    assert_eq!(story.starts.len(), 1);
    assert!(!story.facts.contains_key("plan"));
}

#[test]
fn a_report_that_cannot_be_written_is_a_warning() {
    let folder = tempfile::tempdir().unwrap();
    let (nowhere, report) = recorder();
    report.fact("folder", json!({"path": folder.path().join("gone"), "fingerprint": "a"}));
    report.fact("ended", true);
    let warnings = nowhere.0.lock().unwrap().clone();
    assert!(
        warnings.iter().all(|text| text.contains("changes nothing else")) && !warnings.is_empty(),
        "{warnings:?}"
    );
}

#[test]
fn results_of_older_versions_have_a_page_that_says_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let record = json!({"hone": "0.0.9", "fingerprint": "f", "started": 1_767_225_599, "data": [{"name": "rows.parquet",
        "bytes": 1, "sha256": "ab"}], "trained": {"steps": 3, "loss": 1.0, "first_loss": 2.0, "tokens": 5}});
    fs::write(folder.path().join("hone.json"), record.to_string()).unwrap();
    fs::write(folder.path().join("metrics.jsonl"), "{\"step\":1,\"loss\":2.0}\n").unwrap();
    let page = fs::read_to_string(make(&[folder.path().to_owned()], None).unwrap()).unwrap();
    for text in ["Finished", "2025-12-31 23:59", "rows.parquet", "The plan was not recorded", "hone 0.0.9"] {
        assert!(page.contains(text), "{text} is missing");
    }
    let empty = tempfile::tempdir().unwrap();
    let fault = make(&[empty.path().to_owned()], None).unwrap_err();
    assert_eq!(fault.kind, Kind::Usage);
    let nowhere = empty.path().join("none/page.html");
    assert_eq!(make(&[folder.path().to_owned()], Some(&nowhere)).unwrap_err().kind, Kind::Config);
}

/// Numbers at the ends of their types, values of other types, and files that are something else.
#[test]
fn a_hostile_folder_has_a_page_or_is_refused() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("a");
    fs::create_dir(&folder).unwrap();
    let most = u64::MAX;
    let start = json!({"began": most, "ended": 0, "fault": {"exit_code": 255, "message": HOSTILE}});
    let keys: serde_json::Map<String, Json> =
        (0..50_000).map(|key| (format!("key {key}"), json!({"value": key}))).collect();
    let story = json!({"facts": {"plan": {"values": keys}, "trained": {"seconds": 1e308, "steps": -1, "loss": "x"},
        "data rows": {"lengths": [[1, 2, most], 5, []], "tokens": most, "learned": most},
        "memory plan": {"terms": {"a": most}, "bytes": []}, "memory used": {"peak_bytes": most},
        "published": {"a": 1}, "evaluation": {"best_step": most}},
        "notes": [{"seconds": -1e308, "text": HOSTILE}], "starts": [start, start]});
    fs::write(folder.join("report.json"), story.to_string()).unwrap();
    let lines = [(0, 1e308), (most, -1e308), (1, 5e-324)]
        .map(|(step, loss)| json!({"step": step, "loss": loss, "eval_loss": loss, "memory_bytes": loss}));
    let lines: String = lines.iter().map(|line| format!("{line}\n")).collect();
    for name in ["metrics.jsonl", "timeline.jsonl"] {
        fs::write(folder.join(name), &lines).unwrap();
    }
    for name in ["hone.json", "adapter_config.json", "answers.json"] {
        fs::write(folder.join(name), "[".repeat(100_000)).unwrap();
    }
    let began = Instant::now();
    let page = fs::read_to_string(make(std::slice::from_ref(&folder), None).unwrap()).unwrap();
    assert_alone(&page);
    let both = make(&[folder.clone(), folder.clone()], Some(&parent.path().join("both.html"))).unwrap();
    assert_alone(&fs::read_to_string(both).unwrap());
    assert!(began.elapsed() < std::time::Duration::from_secs(20), "{:?}", began.elapsed());
    // A pipe, a link or a device counts as an absent file.
    for name in ["report.json", "metrics.jsonl", "timeline.jsonl"] {
        fs::remove_file(folder.join(name)).unwrap();
        std::os::unix::fs::symlink("/dev/zero", folder.join(name)).unwrap();
    }
    assert_eq!(make(&[folder], None).unwrap_err().kind, Kind::Usage);
}

/// A page that lacks its curves because a disk failed must not be taken for the run's. The kernel refuses to read the
/// first bytes of a process's memory with EIO.
#[test]
fn a_file_that_the_machine_cannot_read_is_told_and_makes_no_page() {
    for name in ["report.json", "hone.json", "metrics.jsonl", "timeline.jsonl"] {
        let folder = tempfile::tempdir().unwrap();
        let (_, report) = recorder();
        tell(&report, folder.path());
        let _ = fs::remove_file(folder.path().join(name));
        std::os::unix::fs::symlink("/proc/self/mem", folder.path().join(name)).unwrap();
        let fault = make(&[folder.path().to_owned()], None).unwrap_err();
        assert_eq!(fault.kind, Kind::Storage, "{name}: {fault}");
        assert!(fault.message.contains(name), "{fault}");
    }
}

#[test]
fn runs_are_compared_on_one_page() {
    let parent = tempfile::tempdir().unwrap();
    let mut folders = Vec::new();
    for (name, rate) in [("a", "1e-4"), ("b", "2e-4")] {
        let folder = parent.path().join(name);
        fs::create_dir(&folder).unwrap();
        let (_, report) = recorder();
        tell(&report, &folder);
        report.fact("plan", json!({"values": {"learning_rate": {"value": rate, "origin": "flag"}, "seed": {"value": 1, "origin": "default"}}}));
        report.fact("ended", true);
        folders.push(folder);
    }
    let place = make(&folders, Some(&parent.path().join("both.html"))).unwrap();
    let page = fs::read_to_string(place).unwrap();
    assert_alone(&page);
    let differing =
        &page[page.find("Settings that differ").unwrap()..page.find("Settings that are the same").unwrap()];
    assert!(
        differing.contains("1e-4") && differing.contains("2e-4") && !differing.contains("seed"),
        "{differing}"
    );
    assert!(page.contains("data-name=\"a\"") && page.contains("data-name=\"b\""));
}
