//! Records -> examples: token ids, cut to length, and the tokens that are learned.

use super::learned::Tally;
use super::problems::Problems;
use super::template::{SOURCE_BYTES_MAX, STACK_BYTES_A_BYTE, Template};
use super::{Context, Conversation, Example, LossOn, Message, Record, TokenOptions, Tokenizer, mask};
use crate::bounds::{Bounds, STACK_BYTES};
use crate::fault::{Fault, Kind, Result};
use crate::interrupt;
use crate::machine;
use crate::report::{Report, Stage, Unit};
use rayon::prelude::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

/// Rows between two progress reports.
const ROWS_AT_ONCE: usize = 64;
/// LIMIT: memory that one row may take while it is tokenized.
const ROW_BYTES_MAX: usize = 1 << 30;
/// LIMIT: stack of the threads. Values that a template nests are dropped by recursion.
pub(super) const ROW_STACK_BYTES: usize = 64 << 20;
/// Processor time of a failed row from which on the row has used up the template's fuel.
const SLOW_ROW: Duration = Duration::from_millis(250);
const SLOW_ROWS_MAX: usize = 8;
/// LIMIT: processor time of rows that fail while none succeeds, if each takes longer than any row of wrong data.
const VAIN_MAX: Duration = Duration::from_secs(2);
const VAIN_ROW: Duration = Duration::from_millis(2);
/// LIMIT: memory for compiling a chat template.
const TEMPLATE_BYTES_MAX: usize = 512 << 20;
/// Processor time of a row of few tokens from which on its template computes without need.
const SLOW_SMALL_ROW: Duration = Duration::from_secs(2);
const SMALL_ROW_TOKENS: usize = 100_000;

/// Tokenizes every record, in order. Rows that have nothing to learn after they are cut to `tokens_max` are dropped
/// and counted.
///
/// Errors: `Config` if conversations have no chat template. `Data` for rows that the template refuses or whose
/// answers it hides, and if nothing is left to learn.
pub fn encode(
    records: &[Record],
    tokenizer: &Tokenizer,
    options: &TokenOptions,
    report: &Report,
) -> Result<Vec<Example>> {
    Ok(encode_rows(records, tokenizer, options, report)?.into_iter().map(|row| row.example).collect())
}

/// An example, and the record that it was made from.
#[derive(Clone, Debug)]
pub struct EncodedRow {
    /// Index of the record.
    pub record: usize,
    /// The tokens, cut to length.
    pub example: Example,
    /// Number of tokens before cutting.
    pub whole: usize,
}

/// Does `encode`, and returns details of each row.
pub fn encode_rows(
    records: &[Record],
    tokenizer: &Tokenizer,
    options: &TokenOptions,
    report: &Report,
) -> Result<Vec<EncodedRow>> {
    let mut workers = Workers::new(tokenizer, options)?;
    let task = report.task(Stage::Tokenize, Unit::Rows, "rows", Some(records.len() as u64));
    let encoded = workers.encode(records, &|rows| task.advance(rows))?;
    drop(task);
    interrupt::check()?;
    let mut examples = Vec::with_capacity(records.len());
    let mut outcome = Outcome::default();
    for (index, (record, found)) in records.iter().zip(encoded).enumerate() {
        match found {
            Ok(found) => {
                outcome.add(&found.tally);
                let whole = found.tally.longest;
                examples.extend(found.example.map(|example| EncodedRow { record: index, example, whole }));
            }
            Err(problem) => outcome.refuse(&record.file, record.row, problem),
        }
    }
    outcome.settle(options, tokenizer, report)?;
    Ok(examples)
}

/// All cores, ready to make tokens of rows.
pub(super) struct Workers<'a> {
    encoder: Encoder<'a>,
    row: Row,
    pool: rayon::ThreadPool,
}

impl<'a> Workers<'a> {
    /// Returns one worker for each core.
    ///
    /// # Errors
    /// Capacity: threads cannot be started.
    pub fn new(tokenizer: &'a Tokenizer, options: &'a TokenOptions) -> Result<Workers<'a>> {
        let pool = rayon::ThreadPoolBuilder::new()
            .stack_size(ROW_STACK_BYTES)
            .thread_name(|index| format!("rows-{index}"))
            .build()
            .map_err(|error| Fault::machine("start threads to make tokens in", &error))?;
        let encoder = Encoder { tokenizer, options, templates: None };
        Ok(Workers { encoder, row: Row::default(), pool })
    }

    /// Encodes records and returns one outcome for each, in their order. The error of an outcome says what is wrong
    /// with the row. `done` receives the number of rows that are done since its last call.
    ///
    /// # Errors
    /// Config, Model: there are conversations, and the chat template is missing or cannot be read.
    pub fn encode(
        &mut self,
        records: &[Record],
        done: &(dyn Fn(u64) + Sync),
    ) -> Result<Vec<std::result::Result<Encoded, String>>> {
        self.encoder.compile_for(records)?;
        let (row, encoder) = (&self.row, &self.encoder);
        Ok(self.pool.install(|| {
            let chunks = records.par_chunks(ROWS_AT_ONCE);
            chunks
                .flat_map_iter(|chunk| {
                    let examples: Vec<_> = chunk.iter().map(|record| row.encode(encoder, record)).collect();
                    done(chunk.len() as u64);
                    examples
                })
                .collect()
        }))
    }
}

/// The outcome of a set's rows, for its counts, its warnings and its refusal.
#[derive(Default)]
pub(super) struct Outcome {
    tally: Tally,
    /// File, row, problem.
    refused: Vec<(Arc<str>, u64, String)>,
}

impl Outcome {
    /// Adds a row that became tokens, or has nothing to learn.
    pub fn add(&mut self, tally: &Tally) {
        self.tally.add(tally);
    }

    /// Adds a row that cannot be used.
    pub fn refuse(&mut self, file: &Arc<str>, row: u64, problem: String) {
        self.refused.push((file.clone(), row, problem));
    }

    /// Reports counts and warnings.
    ///
    /// # Errors
    /// Data: rows that cannot be used, or nothing is left to learn.
    pub fn settle(mut self, options: &TokenOptions, tokenizer: &Tokenizer, report: &Report) -> Result<()> {
        let rows = self.tally.rows + self.refused.len() as u64;
        self.refused.sort(); // Rows are shuffled; a reader looks from the top of a file.
        let mut problems = Problems::default();
        for (file, row, problem) in self.refused {
            problems.add(problem, &file, row);
        }
        let advice = "correct these rows, set ModelConfig.chat_template";
        problems.settle(rows, options.bad_rows, advice, Stage::Tokenize, report)?;
        if self.tally.rows == 0 {
            return Ok(());
        }
        if self.tally.rows == self.tally.dropped {
            return Err(nothing_to_learn(&self.tally, options));
        }
        self.tally.tell(options, tokenizer, report);
        Ok(())
    }
}

fn nothing_to_learn(tally: &Tally, options: &TokenOptions) -> Fault {
    let Tally { rows, cut, longest, not_learned, .. } = tally;
    let shown_only = match not_learned {
        0 => String::new(),
        turns => format!("; {turns} turns have weight 0 or train false"),
    };
    Fault::data(format!(
        "nothing left to supervise: {rows} rows, {cut} of them cut to {} tokens (longest {longest}), none with an answer \
         left{shown_only}",
        options.tokens_max
    ))
    .help("raise max_length, or check that the conversations have assistant turns that are learned")
}

/// Refuses a chat template in the configuration that cannot be read, or that the model does not have.
pub fn check_template(tokenizer: &Tokenizer, options: &TokenOptions) -> Result<()> {
    match options.chat_template {
        Some(_) => templates(tokenizer, options).map(|_| ()),
        None => Ok(()),
    }
}

/// The result of one row: its example after cutting, if it has anything to learn, and its counts.
pub(super) struct Encoded {
    /// The example; `None`: it has nothing to learn.
    pub example: Option<Example>,
    /// The counts of this row.
    pub tally: Tally,
}

/// Encodes rows within bounds. Rows that take too long for their size are counted; after a few of them, no others
/// are tried, because a dataset may have millions. Only the thread's own processor time counts, so that a machine that
/// stalls refuses no data.
struct Row {
    bounds: Bounds,
    slow: AtomicUsize,
    /// Whether any row was encoded.
    works: AtomicBool,
    /// Rows that failed before any was encoded, and their nanoseconds.
    vain: [AtomicU64; 2],
}

impl Default for Row {
    fn default() -> Row {
        let what = "a row of the dataset, with the chat template and the tokenizer";
        Row {
            bounds: Bounds::new(Kind::Data, what, ROW_BYTES_MAX),
            slow: AtomicUsize::new(0),
            works: AtomicBool::new(false),
            vain: Default::default(),
        }
    }
}

impl Row {
    fn encode(&self, encoder: &Encoder, record: &Record) -> std::result::Result<Encoded, String> {
        if interrupt::requested() {
            return Err("not reached before a signal".into());
        }
        if self.slow.load(Ordering::Relaxed) >= SLOW_ROWS_MAX {
            return Err(format!("not tried, after {SLOW_ROWS_MAX} rows that took too long"));
        }
        if self.is_vain() {
            return Err(format!(
                "not tried, after rows that failed for {} s, of which none succeeded",
                VAIN_MAX.as_secs()
            ));
        }
        let began = machine::thread_time();
        let done = self.bounds.hold(|| Ok(encoder.example(record)));
        let done = done.unwrap_or_else(|fault| Err(fault.message));
        self.note(&done, machine::thread_time().saturating_sub(began));
        done
    }

    /// Counts a row and the processor time that it took.
    fn note(&self, done: &std::result::Result<Encoded, String>, took: Duration) {
        // A normal row makes some thousand tokens per millisecond.
        let small = done.as_ref().is_ok_and(|done| done.tally.longest < SMALL_ROW_TOKENS);
        let limit = if done.is_err() { SLOW_ROW } else { SLOW_SMALL_ROW };
        if (done.is_err() || small) && took >= limit {
            self.slow.fetch_add(1, Ordering::Relaxed);
        }
        match done {
            Ok(_) => self.works.store(true, Ordering::Relaxed),
            Err(_) => {
                self.vain[0].fetch_add(1, Ordering::Relaxed);
                self.vain[1].fetch_add(took.as_nanos() as u64, Ordering::Relaxed);
            }
        }
    }

    /// Returns whether every row so far failed, after long work for each.
    fn is_vain(&self) -> bool {
        let [rows, nanoseconds] = self.vain.each_ref().map(|count| count.load(Ordering::Relaxed));
        !self.works.load(Ordering::Relaxed)
            && nanoseconds >= VAIN_MAX.as_nanos() as u64
            && nanoseconds / rows.max(1) >= VAIN_ROW.as_nanos() as u64
    }
}

/// Turns rows into examples. Any number of threads may share it.
pub(super) struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    options: &'a TokenOptions,
    /// `None` if no record is a conversation.
    templates: Option<Templates>,
}

/// The template of most rows, and the one for rows with tools if the model has one.
struct Templates {
    plain: Template,
    with_tools: Option<Template>,
}

impl Encoder<'_> {
    /// Compiles the chat template, once, if there are conversations among the records.
    fn compile_for(&mut self, records: &[Record]) -> Result<()> {
        let is_conversation = |record: &Record| {
            matches!(record.conversation, Conversation::Messages(_) | Conversation::Prompt { .. })
        };
        if self.templates.is_none() && records.iter().any(is_conversation) {
            self.templates = Some(templates(self.tokenizer, self.options)?);
        }
        Ok(())
    }

    /// Encodes one record. The error says what is wrong with the row.
    pub fn example(&self, record: &Record) -> std::result::Result<Encoded, String> {
        let mut tally = Tally { rows: 1, ..Tally::default() };
        let mut example = self.whole(record, &mut tally)?;
        let whole = example.ids.len();
        example.ids.truncate(self.options.tokens_max);
        example.supervised.truncate(self.options.tokens_max);
        let teaches = tally.count(&example, whole, self.tokenizer);
        Ok(Encoded { example: teaches.then_some(example), tally })
    }

    /// Encodes a record without cutting the example.
    pub fn whole(&self, record: &Record, tally: &mut Tally) -> std::result::Result<Example, String> {
        match &record.conversation {
            Conversation::Messages(messages) => self.messages(messages, 0, &record.context, tally),
            Conversation::Prompt { prompt, completion } => {
                let messages = [prompt.as_slice(), completion].concat();
                self.messages(&messages, prompt.len(), &record.context, tally)
            }
            Conversation::PromptText { prompt, completion } => self.prompt(prompt, completion, tally),
            Conversation::Tokens { ids, supervised } => {
                let size = self.tokenizer.vocab_size();
                match ids.iter().find(|&&id| id as usize >= size) {
                    Some(id) => Err(format!(
                        "input_ids holds {id}, the model's tokenizer has ids below {size}: another tokenizer made them"
                    )),
                    None => Ok(Example { ids: ids.clone(), supervised: supervised.clone() }),
                }
            }
            Conversation::Text(text) => {
                let (ids, doubled) = self.tokenizer.ids(&self.ended(text), self.options.tokens_max)?;
                tally.doubled += u64::from(doubled);
                Ok(Example { supervised: vec![true; ids.len()], ids })
            }
        }
    }

    /// Encodes a conversation; answers among `messages[from..]` are learned. The template writes every special
    /// token, so none is added.
    fn messages(
        &self,
        messages: &[Message],
        from: usize,
        context: &Context,
        tally: &mut Tally,
    ) -> std::result::Result<Example, String> {
        let templates = self.templates.as_ref().expect("compiled for conversations");
        let template = match (&templates.with_tools, &context.tools) {
            (Some(template), Some(_)) => template,
            _ => &templates.plain,
        };
        let shown_only = messages[from..].iter().filter(|m| m.role == "assistant" && !m.learned).count();
        tally.not_learned += shown_only as u64;
        let everything = self.options.loss == LossOn::Everything;
        if everything && shown_only == 0 {
            let text = template.render(&Template::values(messages), context, false)?.text;
            self.look(template, messages, context, &text, tally)?;
            let (ids, _) = self.tokenizer.spans(&text, self.options.tokens_max)?;
            return Ok(Example { supervised: vec![true; ids.len()], ids });
        }
        let found = mask::answers(template, messages, context, from)?;
        tally.thoughts += found.thoughts;
        tally.thoughts_shown += found.thoughts_shown;
        self.look(template, messages, context, &found.text, tally)?;
        let (ids, offsets) = self.tokenizer.spans(&found.text, self.options.tokens_max)?;
        let supervised = match everything {
            false => mask::supervised(&found.answers, &offsets),
            true => {
                let mut supervised = vec![true; ids.len()];
                mask::unlearn(&found.answers, &offsets, &mut supervised);
                supervised
            }
        };
        Ok(Example { supervised, ids })
    }

    /// Renders the row again without the things that a template may hide or write in another way, and counts those
    /// that make no difference.
    fn look(
        &self,
        template: &Template,
        messages: &[Message],
        context: &Context,
        text: &str,
        tally: &mut Tally,
    ) -> std::result::Result<(), String> {
        let same_without = |messages: &[Message], context: &Context| {
            template.render(&Template::values(messages), context, false).is_ok_and(|other| other.text == text)
        };
        if context.tools.is_some() {
            tally.tools += 1;
            let without = Context { tools: None, ..context.clone() };
            tally.tools_hidden += u64::from(same_without(messages, &without));
        }
        if context.documents.is_some() {
            let without = Context { documents: None, ..context.clone() };
            tally.documents_hidden += u64::from(same_without(messages, &without));
        }
        tally.quoted_arguments += quoted_arguments(messages, text);
        let nulls: Vec<usize> = (0..messages.len()).filter(|&index| is_null(&messages[index])).collect();
        if nulls.is_empty() {
            return Ok(());
        }
        let mut filled = messages.to_vec();
        nulls.iter().for_each(|&index| filled[index].content = Some(String::new()));
        tally.nulls += nulls.len() as u64;
        match same_without(&filled, context) {
            true => Ok(()),
            false => {
                let role = &messages[nulls[0]].role;
                Err(format!("the {role}'s content is null, which the chat template writes as a word"))
            }
        }
    }

    /// Encodes prompt and completion. The tokens that the prompt alone shares with both together are not learned;
    /// tokens may merge across the border.
    fn prompt(
        &self,
        prompt: &str,
        completion: &str,
        tally: &mut Tally,
    ) -> std::result::Result<Example, String> {
        let (ids, doubled) =
            self.tokenizer.ids(&(prompt.to_string() + &self.ended(completion)), self.options.tokens_max)?;
        tally.doubled += u64::from(doubled);
        let given = match self.options.loss {
            LossOn::Everything => 0,
            LossOn::Answers => {
                let (prompt, _) = self.tokenizer.ids(prompt, self.options.tokens_max)?;
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

/// Returns whether a turn has null content and nothing else to say.
fn is_null(message: &Message) -> bool {
    message.content.is_none()
        && message.extra.iter().all(|(name, _)| matches!(*name, "name" | "tool_call_id"))
}

/// Returns the number of calls whose arguments are JSON text that the rendered text holds as a quoted string.
fn quoted_arguments(messages: &[Message], text: &str) -> u64 {
    let calls = messages.iter().flat_map(|message| &message.extra).filter(|(name, _)| *name == "tool_calls");
    let arguments = calls.flat_map(|(_, calls)| calls.as_array().into_iter().flatten()).filter_map(|call| {
        call.get("function").unwrap_or(call).get("arguments")?.as_str().filter(|text| text.contains('"'))
    });
    arguments.filter(|arguments| text.contains(&serde_json::Value::from(*arguments).to_string())).count()
        as u64
}

/// Compiles a chat template within bounds. A fault is of `kind` and names `place`.
pub(super) fn compiled(source: &str, tokenizer: &Tokenizer, kind: Kind, place: &str) -> Result<Template> {
    let stack = STACK_BYTES + source.len().min(SOURCE_BYTES_MAX) * STACK_BYTES_A_BYTE;
    Bounds::new(kind, place, TEMPLATE_BYTES_MAX).hold_deep(stack, || {
        Template::new(source, tokenizer.specials(), tokenizer.now())
            .map_err(|problem| Fault::new(kind, problem).at(place))
    })
}

/// Returns the configuration's template, else the model's own.
fn templates(tokenizer: &Tokenizer, options: &TokenOptions) -> Result<Templates> {
    let (source, given) = match options.chat_template.as_deref() {
        // A name contains no template tags.
        Some(name) if !name.contains('{') => (tokenizer.named_template(name)?, true),
        Some(source) => (source, true),
        None => (tokenizer.default_template()?, false),
    };
    let compile = |source: &str| match given {
        true => compiled(source, tokenizer, Kind::Config, "ModelConfig.chat_template"),
        false => compiled(source, tokenizer, Kind::Model, "the model's chat template")
            .map_err(|fault| fault.help("set ModelConfig.chat_template")),
    };
    let plain = compile(source)?;
    let with_tools = match tokenizer.tool_template().filter(|_| !given) {
        Some(source) => Some(compile(source)?),
        None => None,
    };
    Ok(Templates { plain, with_tools })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_all_fail_after_long_work_are_not_tried_for_ever() {
        let failed = |row: &Row, count: u32, took: Duration| {
            (0..count).for_each(|_| row.note(&Err("no".into()), took));
            row.is_vain()
        };
        // Wrong data is reported row by row.
        assert!(!failed(&Row::default(), 9999, VAIN_ROW - Duration::from_micros(1)));
        let row = Row::default();
        assert!(!failed(&row, 999, VAIN_ROW));
        assert!(failed(&row, 1, VAIN_ROW));
        row.note(&Ok(Encoded { example: None, tally: Tally::default() }), Duration::ZERO);
        assert!(!row.is_vain(), "the template works");
        assert_eq!(row.slow.load(Ordering::Relaxed), 0);
        failed(&row, 1, SLOW_ROW);
        assert_eq!(row.slow.load(Ordering::Relaxed), 1);
    }
}
