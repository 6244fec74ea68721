//! A plan's data -> what will be learned from it, shown before a GPU is paid for: `hone inspect`.
//!
//! Rows are read and tokenized exactly as in a run, and every warning of a run is collected. Nothing is trained,
//! and no weight is read.

mod twins;
mod text;
mod html;

use std::path::Path;
use std::sync::{Arc, Mutex};

use serde_json::{Value as Json, json};

use crate::dataset::{self, Example, Prepared, Set, Tokenizer};
use crate::fault::{Fault, Result};
use crate::fetch;
use crate::plan::Plan;
use crate::report::{Event, Progress, Report, Sink, Stage};
use crate::train::order::{self, Steps};
use crate::{whole, words};

pub use html::page;
pub use twins::Twins;

/// Bars in the histogram of lengths.
const BARS: usize = 16;
/// LIMIT: optimizer steps from which the packing is estimated; an epoch may have millions.
const STEPS_LOOKED_AT: u64 = 64;

/// The rows to show.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Number of rows, drawn at random.
    pub samples: usize,
    /// Seed of the draw.
    pub seed: u64,
    /// Rows to show instead of drawn ones, as FILE:ROW in the form that messages use.
    pub rows: Vec<String>,
}

/// The results of `hone inspect`.
pub struct Review {
    /// Name of the model.
    pub model: String,
    /// Rows of the data.
    pub rows: usize,
    /// Rows to train on.
    pub train: usize,
    /// Rows to evaluate on.
    pub evaluation: usize,
    /// Rows of either set that have nothing to learn or could not be used.
    pub dropped: usize,
    /// Tokens of all rows that are kept.
    pub tokens: u64,
    /// Tokens that are learned.
    pub learned: u64,
    /// Tokens of the longest row before cutting.
    pub longest: usize,
    /// Most tokens per row.
    pub tokens_max: usize,
    /// Rows that were cut.
    pub cut: usize,
    /// Share of the passes' capacity that packing fills; `None` without packing.
    pub packing: Option<f64>,
    /// Optimizer steps of the whole run.
    pub steps: u64,
    /// The histogram: (from, up to, number of rows with so many tokens before cutting).
    pub lengths: Vec<(usize, usize, usize)>,
    /// Copies among the rows.
    pub twins: Twins,
    /// All warnings.
    pub warnings: Vec<String>,
    /// The rows shown.
    pub samples: Vec<Sample>,
}

/// A row as it will be trained.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// FILE:ROW.
    pub place: String,
    /// The sample's tokens.
    pub tokens: usize,
    /// The sample's tokens that are learned.
    pub learned: usize,
    /// Whether it was cut.
    pub cut: bool,
    /// The sample's text, divided by kind of token.
    pub pieces: Vec<Piece>,
}

/// Adjacent tokens of one kind.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// The text of the piece.
    pub text: String,
    /// Whether they are learned.
    pub learned: bool,
    /// Whether they are special tokens.
    pub special: bool,
}

/// Reads and tokenizes the plan's data.
///
/// # Errors
/// The faults of a run for a model, a configuration or rows that cannot be used. Config: a row to show does not
/// exist.
pub fn read(plan: &Plan, options: &Options, report: &Report) -> Result<Review> {
    let heard = Arc::new(Heard { inner: report.clone(), warnings: Mutex::default() });
    let report = &Report::new(heard.clone());
    plan.warnings.iter().for_each(|warning| report.warn(Stage::Plan, warning.as_str()));
    fetch::texts(&plan.base, plan.access(), report)?;
    let tokenizer = Tokenizer::open(&plan.model.folder)?;
    dataset::check_template(&tokenizer, &plan.tokens)?;
    let data = fetch::data(&plan.data, plan.access(), report)?;
    let Prepared { train, evaluation, rows, .. } =
        dataset::prepare(&data, &plan.dataset, &plan.tokens, &tokenizer, &plan.token_cache, report)?;
    let samples = samples(&train, &tokenizer, options)?;
    let sets = [&train, &evaluation];
    let sum = |of: &dyn Fn(&Set, usize) -> u64| -> u64 {
        sets.iter().map(|set| (0..set.len()).map(|index| of(set, index)).sum::<u64>()).sum()
    };
    let lengths: Vec<usize> =
        sets.iter().flat_map(|set| (0..set.len()).map(|index| set.whole(index))).collect();
    let (steps, packing) = packing(&train, plan);
    let (twins, compared) = twins::find(&train, &evaluation, &tokenizer);
    if compared < train.len() + evaluation.len() {
        report.warn(Stage::Read, format!("hone looked for copies among {compared} rows only"));
    }
    Ok(Review {
        model: plan.model_name.clone(),
        rows,
        train: train.len(),
        evaluation: evaluation.len(),
        dropped: rows - train.len() - evaluation.len(),
        tokens: sum(&|set, index| set.tokens(index) as u64),
        learned: sum(&Set::learned),
        longest: lengths.iter().copied().max().unwrap_or(0),
        tokens_max: plan.tokens.tokens_max,
        cut: sum(&|set, index| u64::from(set.whole(index) > set.tokens(index))) as usize,
        packing,
        steps,
        lengths: histogram(lengths.into_iter()),
        twins,
        warnings: heard.warnings.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone(),
        samples,
    })
}

/// Passes events on and collects the warnings.
struct Heard {
    inner: Report,
    warnings: Mutex<Vec<String>>,
}

impl Sink for Heard {
    fn event(&self, event: &Event) {
        match event {
            Event::Warning { text, .. } => {
                self.warnings.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(text.clone());
            }
            event => self.inner.say(event.clone()),
        }
    }

    fn progress(&self, _: &Progress) {}
}

fn samples(rows: &Set, tokenizer: &Tokenizer, options: &Options) -> Result<Vec<Sample>> {
    let chosen: Vec<usize> = match options.rows.is_empty() {
        true => drawn(rows.len(), options),
        false => {
            let find = |wanted: &String| {
                (0..rows.len()).find(|&index| rows.place(index) == *wanted).ok_or_else(|| {
                    Fault::config(format!(
                        "--row {wanted}: no training row with something to learn has this place"
                    ))
                    .help("give FILE:ROW in the form that messages use, counted from 0")
                })
            };
            options.rows.iter().map(find).collect::<Result<_>>()?
        }
    };
    let sample = |index: usize| Sample {
        place: rows.place(index),
        tokens: rows.tokens(index),
        learned: rows.learned(index) as usize,
        cut: rows.whole(index) > rows.tokens(index),
        pieces: pieces(&rows.example(index), tokenizer),
    };
    Ok(chosen.into_iter().map(sample).collect())
}

/// Draws indices without repetition and returns them in ascending order.
fn drawn(rows: usize, options: &Options) -> Vec<usize> {
    let mut state = options.seed;
    let mut chosen = std::collections::BTreeSet::new();
    while chosen.len() < options.samples.min(rows) {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        chosen.insert((state >> 33) as usize % rows);
    }
    chosen.into_iter().collect()
}

fn pieces(example: &Example, tokenizer: &Tokenizer) -> Vec<Piece> {
    let kind =
        |index: usize| (index > 0 && example.supervised[index], tokenizer.is_special(example.ids[index]));
    let mut pieces = Vec::new();
    let mut start = 0;
    for index in 1..=example.ids.len() {
        if index == example.ids.len() || kind(index) != kind(start) {
            let (learned, special) = kind(start);
            pieces.push(Piece { text: tokenizer.text(&example.ids[start..index]), learned, special });
            start = index;
        }
    }
    pieces
}

/// Divides 0 to the longest row into equal steps.
fn histogram(lengths: impl Iterator<Item = usize> + Clone) -> Vec<(usize, usize, usize)> {
    let longest = lengths.clone().max().unwrap_or(0);
    let width = longest.div_ceil(BARS).max(1);
    let mut bars: Vec<(usize, usize, usize)> =
        (0..longest.div_ceil(width)).map(|bar| (bar * width + 1, (bar + 1) * width, 0)).collect();
    for length in lengths.filter(|length| *length > 0) {
        bars[(length - 1) / width].2 += 1;
    }
    bars
}

/// Returns (optimizer steps of the run, share of the passes' capacity that packing fills).
fn packing(rows: &Set, plan: &Plan) -> (u64, Option<f64>) {
    let steps = Steps::new(rows.len(), &plan.train);
    let Some(room) = plan.train.packing.filter(|_| !rows.is_empty()) else { return (steps.total, None) };
    let (mut tokens, mut passes) = (0, 0);
    for step in 0..steps.per_epoch.min(STEPS_LOOKED_AT) {
        for batch in order::batches(rows, &steps.micro_batches(step), Some(room), usize::MAX, |_| 0) {
            tokens += batch.ids.len();
            passes += 1;
        }
    }
    (steps.total, Some(tokens as f64 / (passes.max(1) * room) as f64))
}

impl Review {
    /// Returns the review as lines for people; with colours for a terminal.
    pub fn text(&self, colours: bool) -> String {
        text::write(self, colours)
    }

    /// Returns the review as one self-contained HTML page.
    pub fn html(&self) -> String {
        html::page(self)
    }

    /// Writes the HTML page.
    ///
    /// # Errors
    /// Config: its folder is not there. Storage: the file cannot be written.
    pub fn save(&self, file: &Path) -> Result<()> {
        whole::write_named(file, self.html().as_bytes())
    }

    /// Returns (name, value) of each count, for text and HTML.
    fn facts(&self) -> Vec<(&'static str, String)> {
        let share = |part: u64, whole: u64| format!("{:.1} %", 100.0 * part as f64 / whole.max(1) as f64);
        let rows = (self.train + self.evaluation) as u64;
        let mut facts = vec![
            (
                "rows",
                format!(
                    "{}: {} to train on, {} to evaluate on, {} dropped",
                    words::count(self.rows as u64),
                    words::count(self.train as u64),
                    words::count(self.evaluation as u64),
                    words::count(self.dropped as u64)
                ),
            ),
            (
                "tokens",
                format!("{}, longest row {}", words::count(self.tokens), words::count(self.longest as u64)),
            ),
            (
                "learned",
                format!("{} tokens, {}", words::count(self.learned), share(self.learned, self.tokens)),
            ),
            (
                "cut",
                format!(
                    "{} rows to {} tokens, {}",
                    words::count(self.cut as u64),
                    self.tokens_max,
                    share(self.cut as u64, rows)
                ),
            ),
            ("steps", words::count(self.steps)),
        ];
        if let Some(packing) = self.packing {
            facts.push(("packing", format!("passes are filled to {:.0} %", 100.0 * packing)));
        }
        let Twins { exact, near, overlap } = &self.twins;
        facts.push((
            "duplicates",
            format!(
                "exact copies of an earlier row: {}; nearly so: {}",
                words::count(*exact as u64),
                words::count(*near as u64)
            ),
        ));
        facts.push((
            "overlap",
            format!(
                "rows to evaluate on that are also trained on, exactly or nearly: {}",
                words::count(*overlap as u64)
            ),
        ));
        facts
    }

    /// Returns the review as JSON.
    pub fn json(&self) -> Json {
        let piece =
            |piece: &Piece| json!({"text": piece.text, "learned": piece.learned, "special": piece.special});
        let sample = |sample: &Sample| {
            json!({"place": sample.place, "tokens": sample.tokens, "learned": sample.learned, "cut": sample.cut,
                "pieces": sample.pieces.iter().map(piece).collect::<Vec<_>>()})
        };
        json!({
            "model": self.model,
            "rows": {"all": self.rows, "train": self.train, "evaluation": self.evaluation, "dropped": self.dropped, "cut": self.cut},
            "tokens": {"all": self.tokens, "learned": self.learned, "longest": self.longest, "max": self.tokens_max},
            "steps": self.steps,
            "packing": self.packing,
            "lengths": self.lengths.iter().map(|(from, to, rows)| json!({"from": from, "to": to, "rows": rows})).collect::<Vec<_>>(),
            "duplicates": {"exact": self.twins.exact, "near": self.twins.near},
            "overlap": self.twins.overlap,
            "warnings": self.warnings,
            "samples": self.samples.iter().map(sample).collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_has_a_bar() {
        let bars = histogram([1, 2, 32, 33, 100].into_iter());
        assert_eq!(bars.iter().map(|bar| bar.2).sum::<usize>(), 5);
        assert!(bars.iter().all(|(from, to, _)| from <= to) && bars.last().unwrap().1 >= 100);
        assert_eq!(histogram([].into_iter()), []);
        assert_eq!(histogram([1, 1].into_iter()), [(1, 1, 2)]);
    }

    #[test]
    fn a_draw_has_no_row_twice_and_repeats_with_its_seed() {
        let options = Options { samples: 5, seed: 7, rows: Vec::new() };
        let first = drawn(100, &options);
        assert_eq!((first.len(), first.clone()), (5, drawn(100, &options)));
        assert_ne!(first, drawn(100, &Options { seed: 8, ..options.clone() }));
        assert_eq!(drawn(3, &options), [0, 1, 2]);
    }
}
