//! Several folders of results -> one page: their outcomes side by side, their curves in one picture, the settings that
//! differ.

use std::collections::BTreeSet;

use super::chart::{Chart, Series, Unit, smoothed, written};
use super::html::{escaped, folded, page, section, table};
use super::page::{Run, duration, number};

/// Returns the page.
pub fn html(runs: &[Run]) -> String {
    let names = names(runs);
    let title = format!("{} runs compared", runs.len());
    let models: BTreeSet<String> = runs.iter().map(Run::model).collect();
    let models = models.into_iter().collect::<Vec<_>>().join(", ");
    let mut body = format!("<h1>{}</h1>\n<p class=\"sub\">{}</p>\n", escaped(&title), escaped(&models));
    body += &section("Outcomes", &outcomes(runs, &names));
    body += &section("Curves", &curves(runs, &names));
    body += &section("Settings that differ", &settings(runs, &names));
    body += &section("Data", &data(runs, &names));
    page(&title, &body)
}

/// Returns the shortest last part of each folder's path that differs from the others'.
fn names(runs: &[Run]) -> Vec<String> {
    let parts = |run: &Run, count: usize| {
        let all: Vec<String> =
            run.folder.components().map(|part| part.as_os_str().to_string_lossy().into_owned()).collect();
        all[all.len().saturating_sub(count)..].join("/")
    };
    let distinct = |count: &usize| {
        let names: BTreeSet<String> = runs.iter().map(|run| parts(run, *count)).collect();
        names.len() == runs.len()
    };
    let count = (1..8).find(distinct).unwrap_or(8);
    runs.iter().map(|run| parts(run, count)).collect()
}

fn outcomes(runs: &[Run], names: &[String]) -> String {
    let evaluated = |run: &Run| {
        let losses = run.points("eval_loss");
        losses.into_iter().min_by(|a, b| a.1.total_cmp(&b.1))
    };
    let best = runs.iter().filter_map(evaluated).map(|point| point.1).fold(f64::INFINITY, f64::min);
    let row = |(run, name): (&Run, &String)| {
        let (state, style) = run.state();
        let trained = run.fact("trained");
        let lowest = evaluated(run).map_or(String::new(), |(step, loss)| {
            let text = escaped(&format!("{} at step {step}", written(loss, Unit::Plain)));
            if loss == best && runs.len() > 1 { format!("<b>{text}</b>") } else { text }
        });
        vec![
            format!("<b>{}</b>", escaped(name)),
            format!("<span class=\"state {style}\">{}</span>", escaped(&state)),
            escaped(&number(&trained["loss"])),
            lowest,
            escaped(&number(&trained["steps"])),
            escaped(&number(&trained["tokens"])),
            escaped(&number(&trained["tokens_per_second"])),
            escaped(&trained["seconds"].as_f64().map(duration).unwrap_or_default()),
            escaped(&run.memory_peak().map(crate::words::size).unwrap_or_default()),
        ]
    };
    let rows: Vec<Vec<String>> = runs.iter().zip(names).map(row).collect();
    let head = ["run", "state", "loss", "best evaluation", "steps", "tokens", "tokens/s", "time", "memory"];
    table(&head, &rows)
}

fn curves(runs: &[Run], names: &[String]) -> String {
    let chart = |title: &str, points: &dyn Fn(&Run) -> Vec<(f64, f64)>, unit, from_zero, dots| {
        let series = runs.iter().zip(names).enumerate();
        let series = series
            .map(|(place, (run, name))| Series { dots, ..Series::line(name.as_str(), points(run), place) })
            .collect();
        Chart { title: title.into(), series, unit, from_zero }.html()
    };
    let drawn = [
        chart("Training loss, smoothed", &|run| smoothed(&run.points("loss")), Unit::Plain, false, false),
        chart("Evaluation loss", &|run| run.points("eval_loss"), Unit::Plain, false, true),
        chart(
            "Token accuracy of evaluations",
            &|run| run.points("eval_mean_token_accuracy"),
            Unit::Plain,
            false,
            true,
        ),
        chart("Learning rate", &|run| run.points("learning_rate"), Unit::Plain, true, false),
        chart("Gradient norm before clipping", &|run| run.points("grad_norm"), Unit::Plain, true, false),
        chart("Tokens a second", &|run| run.timed("tokens_per_second"), Unit::Plain, true, false),
        chart("Memory in use", &|run| run.timed("memory_bytes"), Unit::Bytes, true, false),
    ]
    .concat();
    if drawn.is_empty() { drawn } else { format!("<div class=\"charts\">\n{drawn}</div>\n") }
}

/// Returns settings by name, those that differ first; the others are folded away.
fn settings(runs: &[Run], names: &[String]) -> String {
    let all = runs.iter().flat_map(|run| run.fact("plan")["values"].as_object());
    let mut seen = BTreeSet::new();
    let keys: Vec<String> =
        all.flat_map(serde_json::Map::keys).filter(|key| seen.insert(*key)).cloned().collect();
    let values =
        |key: &String| runs.iter().map(|run| run.setting(key).unwrap_or_default()).collect::<Vec<_>>();
    let row = |key: &String| {
        let cells = values(key).into_iter().map(|value| escaped(&value));
        std::iter::once(format!("<code>{}</code>", escaped(key))).chain(cells).collect::<Vec<_>>()
    };
    let differs = |key: &&String| values(key).windows(2).any(|pair| pair[0] != pair[1]);
    let (other, same): (Vec<&String>, Vec<&String>) = keys.iter().partition(differs);
    let head: Vec<&str> = std::iter::once("setting").chain(names.iter().map(String::as_str)).collect();
    let rows = |keys: &[&String]| keys.iter().map(|key| row(key)).collect::<Vec<_>>();
    let differing = match (other.is_empty(), keys.is_empty()) {
        (_, true) => "<p class=\"soft\">No plan was recorded.</p>\n".into(),
        (true, _) => "<p class=\"soft\">None.</p>\n".into(),
        _ => table(&head, &rows(&other)),
    };
    let same = if same.is_empty() { String::new() } else { table(&head, &rows(&same)) };
    differing + &folded("Settings that are the same", &same)
}

fn data(runs: &[Run], names: &[String]) -> String {
    let row = |(run, name): (&Run, &String)| {
        let told = run.fact("data rows");
        let counts = ["train", "evaluation", "dropped", "tokens", "learned", "longest"];
        let cells = counts.map(|count| escaped(&number(&told[count])));
        std::iter::once(format!("<b>{}</b>", escaped(name))).chain(cells).collect::<Vec<_>>()
    };
    let rows: Vec<Vec<String>> = runs.iter().zip(names).map(row).collect();
    table(&["run", "to train on", "to evaluate on", "dropped", "tokens", "learned", "longest"], &rows)
}
