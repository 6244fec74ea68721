//! An adapter and rows -> how well the base predicts their answers without it and with it: `hone eval`.
//!
//! Loss and accuracy are over the tokens that training learns of, by the same template and mask. Exact match generates
//! greedily and compares with the row's own answer, white space around both aside.

use serde_json::{Value as Json, json};

use crate::answers::{self, How};
use crate::dataset::{self, Example};
use crate::device;
use crate::fault::{Fault, Result};
use crate::generate::Sampling;
use crate::interrupt;
use crate::model::decoder::Decoder;
use crate::model::lora::Lora;
use crate::report::{Report, Stage, Unit};
use crate::spec::{Environment, Request};
use crate::train::order;
use crate::tuned::{Named, Rows, Split, Sum, Tuned};

/// LIMIT: rows of one pass, so that a long micro-batch does not need a training's memory.
const PASS_TOKENS_MAX: usize = 8192;

/// The request of `hone eval`, apart from the job.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// The adapters, which are added.
    pub adapters: Vec<Named>,
    /// Part of the rows; `None`: as the data says.
    pub split: Option<Split>,
    /// Most rows.
    pub rows: usize,
    /// Most rows that are generated for; 0 is none.
    pub generate: usize,
}

/// The quality of a model's predictions of the rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measures {
    /// Mean over the answers' tokens, in nats.
    pub loss: f64,
    /// Share of tokens that are the most probable one.
    pub accuracy: f64,
    /// Number of those tokens.
    pub tokens: usize,
}

/// Answers that are the rows' own, of so many that were generated.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Exact {
    /// Answers that are equal.
    pub matched: usize,
    /// Answers that were generated.
    pub of: usize,
}

/// The result of `hone eval`.
pub struct Evaluation {
    tuned: Tuned,
    rows: Rows,
    /// The base alone.
    pub base: Measures,
    /// The base with the adapters.
    pub with_adapter: Measures,
    /// The figures of the base, and those with the adapter.
    pub exact: Option<(Exact, Exact)>,
    seconds: f64,
}

/// Measures the base and the base with the adapters.
///
/// # Errors
/// As [`Tuned::find`] and [`Tuned::rows`]; Data: rows with nothing to learn.
pub fn run(
    request: &Request,
    options: &Options,
    environment: Environment,
    report: &Report,
) -> Result<Evaluation> {
    let began = std::time::Instant::now();
    let tuned = Tuned::find(&options.adapters, request, environment, report)?;
    let device = device::open(tuned.plan.device, report)?;
    let tokenizer = tuned.tokenizer()?;
    let rows = tuned.rows(options.split, options.rows, &tokenizer, report)?;
    let examples: Vec<Example> = rows.encoded.iter().map(|row| row.example.clone()).collect();
    let decoder = tuned.decoder(&device, report)?;
    let sum = tuned.sum(decoder.dtype, &device)?;
    let batch = tuned.plan.train.eval_batch_examples;
    let base = measure(&decoder, None, &examples, batch, report)?;
    let with_adapter = measure(&decoder, Some(&sum), &examples, batch, report)?;
    drop(sum);
    let exact = match options.generate {
        0 => None,
        most => exact(&tuned, &rows, most, decoder, &tokenizer, report)?,
    };
    Ok(Evaluation { tuned, rows, base, with_adapter, exact, seconds: began.elapsed().as_secs_f64() })
}

/// Loss and accuracy over the examples' targets.
///
/// # Errors
/// Data: no token to learn. Model: a loss that is no number.
pub fn measure(
    decoder: &Decoder,
    sum: Option<&Sum>,
    examples: &[Example],
    batch_examples: usize,
    report: &Report,
) -> Result<Measures> {
    let progress = report.task(Stage::Evaluate, Unit::Rows, "evaluation", Some(examples.len() as u64));
    let indices: Vec<usize> = (0..examples.len()).collect();
    let (mut loss, mut hits, mut tokens) = (0.0, 0, 0);
    for group in indices.chunks(batch_examples.max(1)) {
        for batch in order::batches(examples, &[group.to_vec()], None, PASS_TOKENS_MAX, |_| 0) {
            let mixture = sum.map(|sum| sum.on(batch.rows()));
            let lora = mixture.as_ref().map_or(Lora::None, Lora::Mixed);
            for (of_token, hit) in decoder.scores(&batch, lora)? {
                loss += of_token;
                hits += usize::from(hit);
                tokens += 1;
            }
            interrupt::check()?;
        }
        progress.advance(group.len() as u64);
    }
    match tokens {
        0 => Err(Fault::data("the rows have no token to learn: nothing can be measured")
            .help("name rows with answers")),
        _ if !f64::is_finite(loss) => Err(not_a_number(loss, sum.is_some())),
        _ => Ok(Measures { loss: loss / tokens as f64, accuracy: hits as f64 / tokens as f64, tokens }),
    }
}

fn not_a_number(loss: f64, with_adapter: bool) -> Fault {
    let of = if with_adapter { "base and adapter" } else { "the model alone" };
    Fault::model(format!("the loss of {of} is {loss}: a layer's results are beyond the largest number"))
        .help("the checkpoint or the adapter is damaged, or an adapter's scale or strength is too large")
}

/// `None` if no row has an answer apart from a prompt, as plain text.
fn exact(
    tuned: &Tuned,
    rows: &Rows,
    most: usize,
    decoder: Decoder,
    tokenizer: &dataset::Tokenizer,
    report: &Report,
) -> Result<Option<(Exact, Exact)>> {
    let is_text = |record: &dataset::Record| matches!(record.conversation, dataset::Conversation::Text(_));
    let records: Vec<dataset::Record> =
        rows.records.iter().filter(|record| !is_text(record)).take(most).cloned().collect();
    if records.is_empty() {
        report.note(Stage::Evaluate, "rows of plain text have no answer: no exact match");
        return Ok(None);
    }
    let options = answers::token_options(&tuned.plan.tokens);
    let encoded = dataset::encode_rows(&records, tokenizer, &options, &Report::silent())?;
    let mut questions = answers::of_rows(&encoded, &records, tokenizer, None);
    let room = decoder.facts.positions_max;
    questions.retain(|question| question.prompt.len() < room);
    if questions.is_empty() {
        return Ok(None);
    }
    let chat = tuned.chat(tokenizer)?;
    let how = How {
        sampling: Sampling::greedy(),
        stop_tokens: tuned.defaults(tokenizer, chat.as_ref())?.stop_tokens,
    };
    let folders: Vec<_> = tuned.members.iter().map(|member| member.folder.as_path()).collect();
    let strengths: Vec<f64> = tuned.members.iter().map(|member| member.named.strength).collect();
    let engine = answers::engine(decoder, &folders, &questions, report)?;
    let pairs = answers::ask(&engine, questions, &strengths, &how, tokenizer, report)?;
    let count = |given: fn(&answers::Pair) -> &answers::Given| {
        let is_it = |pair: &&answers::Pair| {
            pair.question.reference.as_ref().is_some_and(|reference| given(pair).is(reference))
        };
        Exact { matched: pairs.iter().filter(is_it).count(), of: pairs.len() }
    };
    Ok(Some((count(|pair| &pair.base), count(|pair| &pair.tuned))))
}

impl Measures {
    /// Returns e to the power of the loss.
    pub fn perplexity(&self) -> f64 {
        self.loss.exp()
    }

    fn json(&self, exact: Option<Exact>) -> Json {
        json!({
            "loss": self.loss, "perplexity": self.perplexity(), "token_accuracy": self.accuracy,
            "exact_match": exact.map(|exact| json!({"matched": exact.matched, "of": exact.of})),
        })
    }
}

impl Evaluation {
    /// Returns a table for people.
    pub fn text(&self) -> String {
        let (base, tuned) = (&self.base, &self.with_adapter);
        let number = |value: f64| match value {
            value if value.abs() >= 1e5 => format!("{value:.3e}"),
            value if value.abs() >= 100.0 => format!("{value:.1}"),
            value => format!("{value:.4}"),
        };
        let percent = |share: f64| format!("{:.1} %", 100.0 * share);
        let mut lines = vec![
            ["", "base", "tuned", "change"].map(str::to_owned),
            ["loss".into(), number(base.loss), number(tuned.loss), format!("{:+.4}", tuned.loss - base.loss)],
            [
                "perplexity".into(),
                number(base.perplexity()),
                number(tuned.perplexity()),
                format!("x {:.3}", (tuned.loss - base.loss).exp()),
            ],
            [
                "token accuracy".into(),
                percent(base.accuracy),
                percent(tuned.accuracy),
                format!("{:+.1}", 100.0 * (tuned.accuracy - base.accuracy)),
            ],
        ];
        if let Some((base, tuned)) = self.exact {
            let of = |exact: Exact| format!("{} of {}", exact.matched, exact.of);
            let change = tuned.matched as i64 - base.matched as i64;
            lines.push(["exact match".into(), of(base), of(tuned), format!("{change:+}")]);
        }
        let width = |column: usize| lines.iter().map(|line| line[column].len()).max().unwrap_or(0);
        let widths = [width(0), width(1), width(2), width(3)];
        let mut text = self.tuned.text();
        text += &format!("rows:    {}\n", self.rows.told());
        text += &format!("tokens:  {} of answers, {:.1} s\n\n", base.tokens, self.seconds);
        for [name, base, tuned, change] in &lines {
            let [a, b, c, d] = widths;
            text += format!("{name:a$}  {base:>b$}  {tuned:>c$}  {change:>d$}").trim_end();
            text.push('\n');
        }
        text
    }

    /// Returns the same for machines.
    pub fn json(&self) -> Json {
        let mut json = self.tuned.json();
        json["rows"] = self.rows.json();
        json["tokens"] = self.base.tokens.into();
        json["seconds"] = self.seconds.into();
        json["without_adapter"] = self.base.json(self.exact.map(|(base, _)| base));
        json["with_adapter"] = self.with_adapter.json(self.exact.map(|(_, tuned)| tuned));
        json
    }
}
