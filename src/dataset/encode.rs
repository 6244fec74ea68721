//! Records -> examples: token ids, cut to length, and which of them are learned.

use super::problems::Problems;
use super::template::{SOURCE_BYTES_MAX, STACK_BYTES_A_BYTE, Template};
use super::{Conversation, Example, LossOn, Message, Record, TokenOptions, Tokenizer, mask};
use crate::bounds::{Bounds, STACK_BYTES};
use crate::fault::{Fault, Kind, Result};
use crate::interrupt;
use crate::report::{Report, Stage, Unit};
use rayon::prelude::*;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Rows between two reports of progress.
const ROWS_AT_ONCE: usize = 64;
/// LIMIT: memory that one row may take while it is made into tokens.
const ROW_BYTES_MAX: usize = 1 << 30;
/// LIMIT: values that a template nests are dropped by recursion.
const ROW_STACK_BYTES: usize = 64 << 20;
/// A row that fails and took so long has burnt its fuel.
const SLOW_ROW: Duration = Duration::from_millis(250);
const SLOW_ROWS_MAX: usize = 8;
/// LIMIT: memory for compiling a chat template.
const TEMPLATE_BYTES_MAX: usize = 512 << 20;

/// Tokenizes every record, in order. Rows that teach nothing once cut to `tokens_max` are dropped and counted.
///
/// Errors: `Config` when conversations have no chat template, `Data` for rows the template refuses or whose
/// answers it hides, and when nothing is left to learn.
pub fn encode(
    records: &[Record],
    tokenizer: &Tokenizer,
    options: &TokenOptions,
    report: &Report,
) -> Result<Vec<Example>> {
    let encoder = Encoder { tokenizer, options, template: template(records, tokenizer, options)? };
    let task = report.task(Stage::Tokenize, Unit::Rows, "rows", Some(records.len() as u64));
    let row = Row::default();
    let pool = rayon::ThreadPoolBuilder::new()
        .stack_size(ROW_STACK_BYTES)
        .thread_name(|index| format!("rows-{index}"))
        .build()
        .map_err(|error| Fault::capacity(format!("no threads to make tokens in: {error}")))?;
    let encoded: Vec<_> = pool.install(|| {
        let chunks = records.par_chunks(ROWS_AT_ONCE);
        chunks
            .flat_map_iter(|chunk| {
                let examples: Vec<_> =
                    chunk.iter().map(|record| row.encode(&encoder, &record.conversation)).collect();
                task.advance(chunk.len() as u64);
                examples
            })
            .collect()
    });
    drop(task);
    interrupt::check()?;
    let mut examples = Vec::with_capacity(records.len());
    let mut problems = Problems::default();
    let mut refused = Vec::new();
    for (record, example) in records.iter().zip(encoded) {
        match example {
            Ok(example) => examples.push(example),
            Err(problem) => refused.push((&record.file, record.row, problem)),
        }
    }
    refused.sort(); // Records are shuffled; a reader looks from the top of a file.
    for (file, row, problem) in refused {
        problems.add(problem, file, row);
    }
    problems.into_result(
        records.len() as u64,
        "correct or remove these rows, or set ModelConfig.chat_template",
    )?;
    keep_what_teaches(examples, options, report)
}

/// One row at a time, within bounds. Rows that take too long for what they hold are counted; after a few of them the
/// others are not tried, since a dataset has millions.
struct Row {
    bounds: Bounds,
    slow: AtomicUsize,
}

impl Default for Row {
    fn default() -> Row {
        let what = "a row of the dataset, with the chat template and the tokenizer";
        Row { bounds: Bounds::new(Kind::Data, what, ROW_BYTES_MAX), slow: AtomicUsize::new(0) }
    }
}

impl Row {
    fn encode(&self, encoder: &Encoder, conversation: &Conversation) -> std::result::Result<Example, String> {
        if interrupt::requested() {
            return Err("not reached before a signal".into());
        }
        if self.slow.load(Ordering::Relaxed) >= SLOW_ROWS_MAX {
            return Err(format!("not tried, after {SLOW_ROWS_MAX} rows that took too long"));
        }
        let began = Instant::now();
        let done = self.bounds.hold(|| Ok(encoder.example(conversation)));
        let done = done.unwrap_or_else(|fault| Err(fault.message));
        if done.is_err() && began.elapsed() >= SLOW_ROW {
            self.slow.fetch_add(1, Ordering::Relaxed);
        }
        done
    }
}

struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    options: &'a TokenOptions,
    /// `None` where no record is a conversation.
    template: Option<Template>,
}

impl Encoder<'_> {
    /// The example, not cut to length; of a very long text its beginning. Error: what is wrong with the row.
    fn example(&self, conversation: &Conversation) -> std::result::Result<Example, String> {
        match conversation {
            Conversation::Messages(messages) => self.messages(messages, 0),
            Conversation::Prompt { prompt, completion } => {
                self.messages(&[prompt.as_slice(), completion].concat(), prompt.len())
            }
            Conversation::PromptText { prompt, completion } => self.prompt(prompt, completion),
            Conversation::Text(text) => {
                let ids = self.tokenizer.ids(&self.ended(text), self.options.tokens_max)?;
                Ok(Example { supervised: vec![true; ids.len()], ids })
            }
        }
    }

    /// Answers among `messages[from..]` are learned. The template writes every special token, so none is added.
    fn messages(&self, messages: &[Message], from: usize) -> std::result::Result<Example, String> {
        let template = self.template.as_ref().expect("`encode` makes one for conversations");
        match self.options.loss {
            LossOn::Everything => {
                let text = template.render(&Template::values(messages), false)?.text;
                let (ids, _) = self.tokenizer.spans(&text, self.options.tokens_max)?;
                Ok(Example { supervised: vec![true; ids.len()], ids })
            }
            LossOn::Answers => {
                let (text, answers) = mask::answers(template, messages, from)?;
                let (ids, offsets) = self.tokenizer.spans(&text, self.options.tokens_max)?;
                Ok(Example { supervised: mask::supervised(&answers, &offsets), ids })
            }
        }
    }

    /// What prompt and prompt + completion have in common is not learned; tokens may merge across their border.
    fn prompt(&self, prompt: &str, completion: &str) -> std::result::Result<Example, String> {
        let ids =
            self.tokenizer.ids(&(prompt.to_string() + &self.ended(completion)), self.options.tokens_max)?;
        let given = match self.options.loss {
            LossOn::Everything => 0,
            LossOn::Answers => {
                let prompt = self.tokenizer.ids(prompt, self.options.tokens_max)?;
                prompt.iter().zip(&ids).take_while(|(a, b)| a == b).count()
            }
        };
        Ok(Example { supervised: (0..ids.len()).map(|index| index >= given).collect(), ids })
    }

    fn ended(&self, text: &str) -> String {
        let eos = self.tokenizer.eos();
        if text.ends_with(eos) { text.to_string() } else { text.to_string() + eos }
    }
}

fn template(records: &[Record], tokenizer: &Tokenizer, options: &TokenOptions) -> Result<Option<Template>> {
    let is_conversation = |record: &Record| {
        matches!(record.conversation, Conversation::Messages(_) | Conversation::Prompt { .. })
    };
    if !records.iter().any(is_conversation) {
        return Ok(None);
    }
    let Some(source) = options.chat_template.as_deref().or(tokenizer.chat_template()) else {
        return Err(Fault::config("the dataset holds conversations but the model has no chat template")
            .help("set ModelConfig.chat_template, or use the instruction-tuned variant of the model"));
    };
    let (kind, place) = match options.chat_template {
        Some(_) => (Kind::Config, "ModelConfig.chat_template"),
        None => (Kind::Model, "the model's chat template"),
    };
    let stack = STACK_BYTES + source.len().min(SOURCE_BYTES_MAX) * STACK_BYTES_A_BYTE;
    let compiled = Bounds::new(kind, place, TEMPLATE_BYTES_MAX).hold_deep(stack, || {
        Template::new(source, tokenizer.specials(), tokenizer.now())
            .map_err(|problem| Fault::new(kind, problem).at(place))
    });
    compiled.map(Some).map_err(|fault| match kind {
        Kind::Model => fault.help("set ModelConfig.chat_template"),
        _ => fault,
    })
}

/// Cuts to `tokens_max`, drops what has no target left after the shift, and tells the counts.
fn keep_what_teaches(
    mut examples: Vec<Example>,
    options: &TokenOptions,
    report: &Report,
) -> Result<Vec<Example>> {
    let rows = examples.len();
    let longest = examples.iter().map(|example| example.ids.len()).max().unwrap_or(0);
    let mut cut = 0;
    for example in &mut examples {
        cut += usize::from(example.ids.len() > options.tokens_max);
        example.ids.truncate(options.tokens_max);
        example.supervised.truncate(options.tokens_max);
    }
    examples.retain(|example| example.supervised.iter().skip(1).any(|&learned| learned));
    let dropped = rows - examples.len();
    if rows > 0 && examples.is_empty() {
        return Err(Fault::data(format!(
            "nothing left to supervise: {rows} rows, {cut} of them cut to {} tokens (longest {longest}), none with an \
             answer left",
            options.tokens_max
        ))
        .help("raise max_length, or check that the conversations have assistant turns"));
    }
    let tokens: usize = examples.iter().map(|example| example.ids.len()).sum();
    let learned: usize =
        examples.iter().flat_map(|example| example.supervised.iter().skip(1)).filter(|&&l| l).count();
    report.note(
        Stage::Tokenize,
        format!(
            "{rows} rows: {tokens} tokens, {learned} of them learned; longest {longest}, {cut} cut to {}, {dropped} dropped",
            options.tokens_max
        ),
    );
    if dropped > 0 {
        report.warn(
            Stage::Tokenize,
            format!(
                "{dropped} of {rows} rows teach nothing within {} tokens and were dropped",
                options.tokens_max
            ),
        );
    }
    Ok(examples)
}
