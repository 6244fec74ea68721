//! A folder of results -> the page of one run. Values that were not recorded are shown as missing, never guessed.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value as Json};

use crate::adapter;
use crate::fault::Fault;
use crate::run_folder::{METRICS, RECORD, TIMELINE};
use crate::words::size;

use super::chart::{Chart, Series, Unit, smoothed, written};
use super::html::{escaped, facts, folded, page, section, table};
use super::measured::Measured;
use super::story::{Failure, Story, plain_text};

/// Answers to held-out rows, which a run makes if it is asked.
const ANSWERS: &str = "answers.json";
/// LIMIT: `hone.json` lists data files. Values of JSON take sixteen times their text in memory.
const RECORD_BYTES_MAX: u64 = 16 << 20;
/// LIMIT: columns of the table of evaluations.
const COLUMNS_MAX: usize = 64;
/// Lines that are drawn behind their mean from so many points on.
const SMOOTH_FROM: usize = 60;

/// All that a folder says of its run.
pub struct Run {
    /// The folder.
    pub folder: PathBuf,
    /// `report.json`
    pub story: Story,
    /// `hone.json`
    record: Json,
    adapter: Json,
    /// The answers of base and tuned model to the same rows.
    answers: Json,
    /// `metrics.jsonl`
    metrics: Measured,
    /// `timeline.jsonl`, the newest line of each step.
    timeline: Measured,
    /// The reason why the machine failed to read a file, so that the page lacks something.
    pub unread: Option<Fault>,
}

impl Run {
    /// Reads the files that exist. Files that belong to no run count as absent; `unread` lists those that the machine
    /// failed to read.
    pub fn of(folder: &Path, story: Story) -> Run {
        let mut unread = None;
        let mut json = |name: &str| {
            let text = plain_text(&folder.join(name), RECORD_BYTES_MAX);
            let text = text.unwrap_or_else(|fault| {
                unread = Some(fault);
                None
            });
            text.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or(Json::Null)
        };
        let (record, adapter, answers) = (json(RECORD), json(adapter::CONFIG_FILE), json(ANSWERS));
        let metrics = Measured::read(&folder.join(METRICS));
        let timeline = Measured::newest(&folder.join(TIMELINE));
        let unread = unread.or_else(|| metrics.unread.clone()).or_else(|| timeline.unread.clone());
        Run { story, record, adapter, answers, metrics, timeline, folder: folder.to_owned(), unread }
    }

    /// Returns the places that the adapter was sent to.
    fn published(&self) -> impl Iterator<Item = &Json> {
        self.fact("published").as_array().into_iter().flatten()
    }

    /// Returns whether nothing in the folder is of a run.
    pub fn is_empty(&self) -> bool {
        self.story.starts.is_empty() && self.record.is_null() && self.metrics.is_empty()
    }

    /// Returns a fact by its name, from the story or, for older results, from `hone.json`.
    pub fn fact(&self, name: &str) -> &Json {
        match self.story.facts.get(name) {
            Some(fact) => fact,
            None => &self.record[name],
        }
    }

    /// Returns the value in force of a key, and its origin.
    pub fn setting(&self, name: &str) -> Option<String> {
        let value = &self.fact("plan")["values"][name]["value"];
        (!value.is_null()).then(|| text(value))
    }

    /// Returns the base model's name.
    pub fn model(&self) -> String {
        let from_adapter = || self.adapter["base_model_name_or_path"].as_str().map(str::to_owned);
        self.setting("model name").or_else(from_adapter).unwrap_or_else(|| "unknown model".into())
    }

    /// Returns points of a metric over the steps.
    pub fn points(&self, name: &str) -> Vec<(f64, f64)> {
        self.metrics.points(name)
    }

    /// Returns the points of a value that differs from start to start.
    pub fn timed(&self, name: &str) -> Vec<(f64, f64)> {
        self.timeline.points(name)
    }

    /// Returns names of the metrics that evaluations of single sources have.
    pub fn sources(&self) -> Vec<String> {
        let of_source =
            |name: &&String| name.starts_with("eval_") && name.ends_with("_loss") && *name != "eval_loss";
        self.metrics.names().filter(of_source).cloned().collect()
    }

    fn failure(&self) -> Option<&Failure> {
        self.story.last()?.fault.as_ref()
    }

    /// Returns the state of the run: a word and the style of it.
    pub fn state(&self) -> (String, &'static str) {
        let trained = !self.fact("trained").is_null();
        match (self.story.last(), self.failure()) {
            (_, Some(failure)) if failure.exit_code == 30 || failure.exit_code == 31 => {
                (format!("Stopped by a signal, exit code {}", failure.exit_code), "warn")
            }
            (_, Some(failure)) => {
                (format!("Failed: {}, exit code {}", failure.kind, failure.exit_code), "bad")
            }
            (Some(start), None) if start.ended.is_some() => ("Finished".into(), "good"),
            (None, None) if trained => ("Finished".into(), "good"),
            _ => ("Not finished: it still runs, or it was killed".into(), "warn"),
        }
    }

    /// Returns the largest memory in use, of the whole run or of its timeline.
    pub fn memory_peak(&self) -> Option<u64> {
        let told = self.fact("memory used")["peak_bytes"].as_u64();
        let seen = self.timed("memory_bytes").iter().map(|(_, bytes)| *bytes as u64).max();
        told.or(seen)
    }
}

/// Returns the page of one run.
pub fn html(run: &Run) -> String {
    let (state, style) = run.state();
    let title = format!("LoRA adapter for {}", run.model());
    let mut body = format!(
        "<span class=\"state {style}\">{}</span>\n<h1>{}</h1>\n<p class=\"sub\">{}</p>\n",
        escaped(&state),
        escaped(&title),
        escaped(&subtitle(run))
    );
    body += &failure(run);
    body += &cards(run);
    body += &section("Course of training", &charts(run));
    body += &section("Evaluation", &evaluation(run));
    body += &section("What to do next", &next(run));
    body += &section("Warnings", &warnings(run));
    body += &section("Data", &data(run));
    body += &section("Settings", &settings(run));
    body += &section("Memory", &memory(run));
    body += &section("Environment", &environment(run));
    body += &section("Provenance", &provenance(run));
    body += &section("Log", &log(run));
    body += &footer(run);
    page(&title, &body)
}

fn subtitle(run: &Run) -> String {
    let began = run.story.starts.first().map(|start| start.began).or(run.record["started"].as_u64());
    let when = began.map(|seconds| format!("started {} UTC", date(seconds)));
    let starts = (run.story.starts.len() > 1).then(|| format!("{} starts", run.story.starts.len()));
    let folder = run.setting("output folder").unwrap_or_else(|| run.folder.display().to_string());
    let parts = [when, starts, Some(format!("results in {folder}"))];
    parts.into_iter().flatten().collect::<Vec<_>>().join(" · ")
}

/// Returns a time such as `2026-11-27 08:45`.
fn date(seconds: u64) -> String {
    let time = std::time::UNIX_EPOCH.checked_add(std::time::Duration::from_secs(seconds));
    time.map_or_else(String::new, |time| crate::words::date(time, "%Y-%m-%d %H:%M"))
}

/// Returns the section about a failure, with which a failed run's page begins: the reason and the remedy.
fn failure(run: &Run) -> String {
    let Some(failure) = run.failure() else { return String::new() };
    let remedy = failure
        .help
        .as_deref()
        .map_or(String::new(), |help| format!("<h3>What to do</h3>\n<p>{}</p>\n", escaped(help)));
    let retry = match failure.retry_helps {
        true => "Starting it again can succeed without a change; it continues from what is finished.",
        false => "Starting it again without a change would fail in the same way.",
    };
    format!(
        "<div class=\"box bad\"><h2>{} Exit code {}.</h2>\n<pre>{}</pre>\n{remedy}<p>{retry}</p></div>\n",
        escaped(&failure.meaning),
        failure.exit_code,
        escaped(&failure.message)
    )
}

fn cards(run: &Run) -> String {
    let trained = run.fact("trained");
    let losses = run.points("loss");
    let number = |name: &str| trained[name].as_f64();
    let first = number("first_loss").or(losses.first().map(|point| point.1));
    let last = number("loss").or(losses.last().map(|point| point.1));
    let plain = |value: f64| written(value, Unit::Plain);
    let evaluated = run.points("eval_loss");
    let best = evaluated.iter().map(|point| point.1).fold(f64::INFINITY, f64::min);
    let tokens = number("tokens").or(run.points("num_tokens").last().map(|point| point.1));
    let steps = number("steps").or(losses.last().map(|point| point.0));
    let seconds = number("seconds").map(duration);
    let cards: Vec<(Option<String>, &str)> = vec![
        (first.zip(last).map(|(first, last)| format!("{} → {}", plain(first), plain(last))), "training loss"),
        (best.is_finite().then(|| plain(best)), "best evaluation loss"),
        (steps.map(|steps| format!("{steps}")), "optimizer steps"),
        (tokens.map(plain), "tokens"),
        (number("tokens_per_second").map(plain), "tokens a second"),
        (seconds, "training time of the last start"),
        (run.memory_peak().map(size), "largest memory in use"),
    ];
    let card = |(value, name): (Option<String>, &str)| {
        value.map(|value| format!("<div><b>{}</b><span>{name}</span></div>", escaped(&value)))
    };
    let cards: String = cards.into_iter().filter_map(card).collect();
    if cards.is_empty() { cards } else { format!("<div class=\"cards\">{cards}</div>\n") }
}

/// Returns a duration such as `2 h 5 min`, `12 min 3 s` or `4.2 s`.
pub(super) fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        0..60 => format!("{seconds:.1} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
    }
}

fn charts(run: &Run) -> String {
    let loss = run.points("loss");
    let mut losses = Vec::new();
    if loss.len() >= SMOOTH_FROM {
        losses.push(Series { faint: true, ..Series::line("each line", loss.clone(), 0) });
        losses.push(Series::line("training, mean", smoothed(&loss), 0));
    } else {
        losses.push(Series::line("training", loss, 0));
    }
    losses.push(Series { dots: true, ..Series::line("evaluation", run.points("eval_loss"), 1) });
    let chart = |title: &str, series: Vec<Series>, unit, from_zero| {
        Chart { title: title.into(), series, unit, from_zero }.html()
    };
    let one = |title: &str, points, colour, unit, from_zero| {
        chart(title, vec![Series::line(title, points, colour)], unit, from_zero)
    };
    let accuracy =
        Series { dots: true, ..Series::line("token accuracy", run.points("eval_mean_token_accuracy"), 2) };
    let sources = run.sources().into_iter().enumerate().map(|(place, name)| {
        let shown = name.trim_start_matches("eval_").trim_end_matches("_loss");
        Series { dots: true, ..Series::line(shown, run.points(&name), place) }
    });
    let charts = [
        chart("Loss", losses, Unit::Plain, false),
        chart("Evaluation loss by source", sources.collect(), Unit::Plain, false),
        chart("Token accuracy of evaluations", vec![accuracy], Unit::Plain, false),
        one("Learning rate", run.points("learning_rate"), 2, Unit::Plain, true),
        one("Gradient norm before clipping", run.points("grad_norm"), 3, Unit::Plain, true),
        one("Tokens a second", run.timed("tokens_per_second"), 5, Unit::Plain, true),
        one("Memory in use", run.timed("memory_bytes"), 7, Unit::Bytes, true),
    ];
    let drawn: String = charts.concat();
    if drawn.is_empty() {
        return "<p class=\"soft\">No step was logged.</p>\n".into();
    }
    let missing = match run.timed("tokens_per_second").is_empty() {
        true => "<p class=\"soft\">Speed and memory over time were not recorded.</p>\n",
        false => "",
    };
    format!("<div class=\"charts\">\n{drawn}</div>\n{missing}")
}

fn evaluation(run: &Run) -> String {
    let lines = &run.metrics.evaluations;
    let told = run.fact("evaluation");
    let mut rows: Vec<(&str, String)> = Vec::new();
    if let Some(step) = told["best_step"].as_u64() {
        let metric = text(&told["metric"]);
        rows.push(("best", escaped(&format!("step {step}: {metric} {}", number(&told["best_metric"])))));
    }
    if let Some(which) = told["adapter"].as_str() {
        rows.push(("the adapter is of", escaped(which)));
    }
    if let Some(why) = told["stopped_early"].as_str() {
        rows.push(("stopped early", escaped(why)));
    }
    let mut html = facts(&rows);
    if lines.is_empty() {
        let why = match run.failure() {
            Some(_) => "before the run ended",
            None => "because no rows were set aside, or eval_strategy was no",
        };
        return html + &format!("<p class=\"soft\">No evaluation was made {why}.</p>\n") + &prompts(run);
    }
    let mut names: Vec<String> = Vec::new();
    for key in lines.iter().flat_map(serde_json::Map::keys) {
        if names.len() < COLUMNS_MAX && !names.contains(key) {
            names.push(key.clone());
        }
    }
    let best = told["best_step"].as_u64();
    let cell = |line: &Map<String, Json>, name: &String| {
        let value = line.get(name).unwrap_or(&Json::Null);
        let shown = if name == "step" { text(value) } else { number(value) };
        let marked = name == "step" && value.as_u64() == best && best.is_some();
        if marked { format!("<b>{} (best)</b>", escaped(&shown)) } else { escaped(&shown) }
    };
    let row = |line: &Map<String, Json>| names.iter().map(|name| cell(line, name)).collect::<Vec<String>>();
    let rows: Vec<Vec<String>> = lines.iter().map(row).collect();
    let head: Vec<&str> = names.iter().map(String::as_str).collect();
    let whole = table(&head, &rows);
    let told = run.metrics.evaluations_told;
    let all = if told > rows.len() { "The first" } else { "All" };
    html +=
        &if rows.len() > 12 { folded(&format!("{all} {} evaluations", rows.len()), &whole) } else { whole };
    html + &prompts(run)
}

/// Answers of the base and of the tuned model to the same prompts, if the run made them.
fn prompts(run: &Run) -> String {
    let Some(list) = run.answers["pairs"].as_array() else { return String::new() };
    let cell = |value: &Json| {
        let text = value.as_str().or(value["text"].as_str()).unwrap_or_default();
        format!("<pre>{}</pre>", escaped(text))
    };
    let row = |one: &Json| vec![cell(&one["prompt"]), cell(&one["base"]), cell(&one["tuned"])];
    let rows: Vec<Vec<String>> = list.iter().map(row).collect();
    // A run of an older hone does not record it; its rows were held out if there were any.
    let title = match run.answers["held_out"].as_bool() {
        Some(false) => "Prompts that were trained on",
        _ => "Held-out prompts",
    };
    format!("<h3>{title}</h3>\n{}", table(&["prompt", "base", "tuned"], &rows))
}

fn warnings(run: &Run) -> String {
    let warnings = run.story.notes.iter().filter(|note| note.warning);
    warnings.map(|note| format!("<div class=\"warning\">{}</div>\n", escaped(&note.text))).collect()
}

fn data(run: &Run) -> String {
    let told = run.fact("data rows");
    let count = |name: &str| told[name].as_u64();
    let share = count("learned").zip(count("tokens")).filter(|(_, tokens)| *tokens > 0);
    let rows: Vec<(&str, Option<String>)> = vec![
        ("rows to train on", count("train").map(|rows| rows.to_string())),
        ("rows to evaluate on", count("evaluation").map(|rows| rows.to_string())),
        ("rows dropped", count("dropped").map(|rows| rows.to_string())),
        ("tokens in an epoch", count("tokens").map(|tokens| written(tokens as f64, Unit::Plain))),
        (
            "share that is learned",
            share.map(|(learned, tokens)| format!("{:.1} %", 100.0 * learned as f64 / tokens as f64)),
        ),
        ("longest example", count("longest").map(|tokens| format!("{tokens} tokens"))),
    ];
    let rows: Vec<(&str, String)> =
        rows.into_iter().filter_map(|(name, value)| Some((name, escaped(&value?)))).collect();
    let mut html = facts(&rows);
    if rows.is_empty() {
        html += "<p class=\"soft\">Counts of the data were not recorded.</p>\n";
    }
    html += &lengths(told);
    let stages = ["download", "read", "tokenize"];
    let notes = run.story.notes.iter().filter(|note| stages.contains(&note.stage.as_str()));
    let notes: String = notes.map(|note| format!("{}\n", escaped(&note.text))).collect();
    if notes.is_empty() { html } else { html + &format!("<h3>As it was read</h3>\n<pre>{notes}</pre>\n") }
}

fn lengths(told: &Json) -> String {
    let Some(bars) = told["lengths"].as_array() else { return String::new() };
    let rows = |bar: &Json| bar[2].as_u64().unwrap_or(0);
    let most = bars.iter().map(rows).max().unwrap_or(0).max(1);
    let line = |bar: &Json| {
        let width = 100.0 * rows(bar) as f64 / most as f64;
        let drawn = if rows(bar) > 0 {
            format!("<div class=\"bar\" style=\"width:{width:.1}%\"></div>")
        } else {
            String::new()
        };
        format!(
            "<tr><td>{} to {}</td><td>{}</td><td>{drawn}</td></tr>\n",
            escaped(&text(&bar[0])),
            escaped(&text(&bar[1])),
            rows(bar)
        )
    };
    let lines: String = bars.iter().skip_while(|bar| rows(bar) == 0).map(line).collect();
    format!("<h3>Tokens of an example</h3>\n<table class=\"bars\">\n{lines}</table>\n")
}

fn settings(run: &Run) -> String {
    let plan = run.fact("plan");
    let Some(values) = plan["values"].as_object() else {
        return "<p class=\"soft\">The plan was not recorded.</p>\n".into();
    };
    let row = |(name, value): (&String, &Json)| {
        vec![
            format!("<code>{}</code>", escaped(name)),
            escaped(&text(&value["value"])),
            format!("<span class=\"soft\">{}</span>", escaped(&text(&value["origin"]))),
        ]
    };
    let is_default = |value: &Json| value["origin"] == "default";
    let head = ["setting", "value", "from"];
    let given: Vec<Vec<String>> = values.iter().filter(|(_, value)| !is_default(value)).map(row).collect();
    let others: Vec<Vec<String>> = values.iter().filter(|(_, value)| is_default(value)).map(row).collect();
    let mut html = table(&head, &given);
    if !others.is_empty() {
        html += &folded(&format!("{} settings with their defaults", others.len()), &table(&head, &others));
    }
    let ignored = plan["ignored"].as_array().into_iter().flatten();
    let ignored: Vec<Vec<String>> =
        ignored.map(|one| vec![escaped(&text(&one["name"])), escaped(&text(&one["why"]))]).collect();
    if !ignored.is_empty() {
        let title = format!("{} keys without effect", ignored.len());
        html += &folded(&title, &table(&["key", "why"], &ignored));
    }
    html
}

fn memory(run: &Run) -> String {
    let plan = run.fact("memory plan");
    let Some(terms) = plan["terms"].as_object() else {
        return "<p class=\"soft\">The memory plan was not recorded.</p>\n".into();
    };
    let planned = plan["bytes"].as_u64().unwrap_or(0);
    let used = run.memory_peak();
    let widest = planned.max(used.unwrap_or(0)).max(1) as f64;
    let line = |name: &str, bytes: u64, class: &str| {
        let width = 100.0 * bytes as f64 / widest;
        format!(
            "<tr><td>{}</td><td>{}</td><td><div class=\"{class}\" style=\"width:{width:.1}%\"></div></td></tr>\n",
            escaped(name),
            size(bytes)
        )
    };
    let parts =
        terms.iter().filter_map(|(name, bytes)| Some((name, bytes.as_u64()?))).filter(|(_, b)| *b > 0);
    let mut lines: String = parts.map(|(name, bytes)| line(name, bytes, "bar")).collect();
    lines += &line("planned in all", planned, "bar");
    lines += &used.map_or(String::new(), |used| line("largest in use", used, "bar used"));
    let mut rows: Vec<(&str, String)> = Vec::new();
    rows.extend(plan["choice"].as_str().map(|choice| ("chosen", escaped(choice))));
    rows.extend(plan["memory"].as_u64().map(|bytes| ("may be used", escaped(&size(bytes)))));
    rows.extend(
        plan["tokens_per_second"].as_f64().map(|speed| ("predicted", format!("{speed:.0} tokens a second"))),
    );
    format!("<table class=\"bars names\">\n{lines}</table>\n{}", facts(&rows))
}

fn environment(run: &Run) -> String {
    let told = run.fact("environment");
    let Some(values) = told.as_object() else {
        return "<p class=\"soft\">The environment was not recorded.</p>\n".into();
    };
    let shown = |(name, value): (&String, &Json)| match (name.as_str(), value) {
        (_, Json::Null) => None,
        ("machine_memory_bytes", value) => Some(("memory of the machine".into(), size(value.as_u64()?))),
        (name, value) => Some((name.replace('_', " "), text(value))),
    };
    let mut rows: Vec<(String, String)> = values.iter().filter_map(shown).collect();
    if let Some(digest) = run.fact("binary_sha256").as_str() {
        rows.push(("SHA-256 of the program".into(), digest.into()));
    }
    let rows: Vec<(&str, String)> =
        rows.iter().map(|(name, value)| (name.as_str(), escaped(value))).collect();
    facts(&rows)
}

fn provenance(run: &Run) -> String {
    let told = run.fact("provenance");
    let code = |value: &str| format!("<code>{}</code>", escaped(value));
    let mut rows: Vec<(&str, String)> = Vec::new();
    for (name, key) in
        [("base model", "base"), ("revision", "revision"), ("configuration, SHA-256", "configuration_sha256")]
    {
        rows.extend(told[key].as_str().map(|value| (name, code(value))));
    }
    let fingerprint =
        run.fact("fingerprint").as_str().map(|value| ("model, data and options together", code(value)));
    rows.extend(fingerprint);
    rows.extend(run.fact("adapter_sha256").as_str().map(|value| ("adapter, SHA-256", code(value))));
    rows.extend(run.fact("image")["digest"].as_str().map(|value| ("image", code(value))));
    for place in run.published().filter(|place| place["image"] != true) {
        let revision = place["revision"].as_str().map_or(String::new(), |revision| format!(", {revision}"));
        rows.push(("sent to", code(&format!("{}{revision}", text(&place["destination"])))));
    }
    let mut html = facts(&rows);
    let list = |value: &Json, name: &str, digest: &str| -> Vec<Vec<String>> {
        let files = value.as_array().into_iter().flatten();
        files.map(|file| vec![escaped(&text(&file[name])), code(&text(&file[digest]))]).collect()
    };
    let files = list(&told["model_files"], "name", "sha256");
    if !files.is_empty() {
        html += &format!("<h3>Small files of the base</h3>\n{}", table(&["file", "SHA-256"], &files));
    }
    let data = list(&self::data_files(run), "name", "sha256");
    match data.is_empty() {
        true => html,
        false => html + &format!("<h3>Data</h3>\n{}", table(&["file", "SHA-256"], &data)),
    }
}

fn data_files(run: &Run) -> Json {
    match &run.fact("provenance")["data"] {
        Json::Null => run.record["data"].clone(),
        told => told.clone(),
    }
}

/// Returns the commands with the names of this run.
fn next(run: &Run) -> String {
    let command = |title: &str, lines: &str| format!("<h3>{title}</h3>\n<pre>{}</pre>\n", escaped(lines));
    if run.fact("trained").is_null() {
        let again = run.failure().is_none_or(|failure| failure.retry_helps);
        return match (again, run.story.starts.is_empty()) {
            (true, _) => "<p>Start the same command again with the same output folder: it continues from its newest checkpoint.</p>\n".into(),
            (false, _) => String::new(),
        };
    }
    let folder = run.setting("output folder").unwrap_or_else(|| run.folder.display().to_string());
    let image = run.fact("image")["reference"].as_str();
    let base = ["model address", "model folder"].into_iter().find_map(|name| run.setting(name));
    let base = base.unwrap_or_else(|| run.model());
    let name = short_name(image.unwrap_or(&folder));
    let remote = image.filter(|image| !image.starts_with("oci:"));
    let mut html = String::new();
    if let Some(image) = image {
        html += &command(
            "Pull the adapter",
            &format!("hone pull {} {}", quoted(image), quoted(&format!("./{name}"))),
        );
    } else {
        html +=
            &command("Push the adapter", &format!("hone push {} REGISTRY/REPOSITORY:TAG", quoted(&folder)));
    }
    let on_hub =
        run.published().find_map(|place| place["destination"].as_str().filter(|at| at.starts_with("hf://")));
    let source = match (remote, on_hub) {
        (Some(image), _) => format!("oci://{image}"),
        (None, Some(address)) => address.to_owned(),
        (None, None) => folder.clone(),
    };
    html += &command(
        "Serve the base with it",
        &format!("hone serve {} --adapter {}", quoted(&base), quoted(&format!("{name}={source}"))),
    );
    if let Some(image) = remote {
        html += &command("Serve it in a cluster with KAITO's Workspaces", &workspace(run, &name, image));
    }
    html + &folded(
        "In Python, with peft",
        &format!(
            "<pre>{}</pre>\n",
            escaped(&format!(
                "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\
                 base = AutoModelForCausalLM.from_pretrained({:?})\nmodel = PeftModel.from_pretrained(base, {:?})",
                base.trim_start_matches("hf://"),
                folder
            ))
        ),
    )
}

fn workspace(run: &Run, name: &str, image: &str) -> String {
    let preset =
        run.setting("model address").and_then(|model| model.strip_prefix("preset:").map(str::to_owned));
    let preset = preset.unwrap_or_else(|| "NAME-OF-THE-PRESET".into());
    format!(
        "cat > workspace.yaml <<'END'\napiVersion: kaito.sh/v1beta1\nkind: Workspace\nmetadata:\n  name: {name}\n\
         resource:\n  instanceType: INSTANCE-TYPE\n  labelSelector: {{matchLabels: {{apps: {name}}}}}\ninference:\n  preset: {{name: {preset}}}\n\
         \x20 adapters:\n    - source: {{name: {name}, image: {image:?}}}\n      strength: \"1.0\"\nEND\n\
         hone render -f workspace.yaml | kubectl apply -f -"
    )
}

/// Returns a name of letters, digits and dashes: the last part of an address or path.
fn short_name(text: &str) -> String {
    let text = text.strip_prefix("oci:").unwrap_or(text); // a layout on disk
    let last = text.trim_end_matches('/').rsplit('/').next().unwrap_or(text);
    let last = last.split(['@', ':']).find(|part| !part.is_empty()).unwrap_or("adapter");
    let plain = |letter: char| if letter.is_ascii_alphanumeric() { letter.to_ascii_lowercase() } else { '-' };
    let name: String = last.chars().map(plain).collect();
    let name = name.trim_matches('-');
    if name.is_empty() { "adapter".into() } else { name.chars().take(40).collect() }
}

/// Returns a word of a shell's command line.
fn quoted(word: &str) -> String {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "/.:_-=@+,%".contains(letter);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    }
}

fn log(run: &Run) -> String {
    let line = |note: &super::story::Note| {
        let mark = if note.warning { "warning: " } else { "" };
        format!("{:>8.1} s  {:<9} {mark}{}\n", note.seconds, note.stage, note.text)
    };
    let lines: String = run.story.notes.iter().map(line).collect();
    let starts: Vec<Vec<String>> = run
        .story
        .starts
        .iter()
        .map(|start| {
            let end = match (&start.fault, start.ended) {
                (Some(failure), _) => format!("exit code {}: {}", failure.exit_code, failure.message),
                (None, Some(_)) => "finished".into(),
                (None, None) => "no end was recorded: it was killed, or it still runs".into(),
            };
            let lasted = start.ended.map(|ended| duration(ended.saturating_sub(start.began) as f64));
            vec![escaped(&date(start.began)), escaped(&lasted.unwrap_or_default()), escaped(&end)]
        })
        .collect();
    let starts = match starts.len() > 1 {
        true => table(&["start (UTC)", "lasted", "end"], &starts),
        false => String::new(),
    };
    match lines.is_empty() {
        true => starts,
        false => starts + &folded("Notes of the newest start", &format!("<pre>{}</pre>\n", escaped(&lines))),
    }
}

fn footer(run: &Run) -> String {
    let version =
        run.fact("environment")["hone"].as_str().or(run.record["hone"].as_str()).unwrap_or("unknown");
    format!(
        "<footer>Made by hone {}. Every number is also in <code>metrics.jsonl</code>, <code>timeline.jsonl</code> and \
         <code>report.json</code> beside this page.</footer>\n",
        escaped(version)
    )
}

/// Returns a value as people write it.
pub(super) fn text(value: &Json) -> String {
    match value {
        Json::Null => "null".into(),
        Json::String(text) => text.clone(),
        Json::Array(items) => items.iter().map(text).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

/// Returns a number in few letters, anything else as it is.
pub(super) fn number(value: &Json) -> String {
    value.as_f64().map_or_else(
        || if value.is_null() { String::new() } else { text(value) },
        |value| written(value, Unit::Plain),
    )
}
