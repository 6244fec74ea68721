//! Questions, a model, adapters -> the answers of the base and of the base with the adapters, side by side.
//!
//! Questions are prompts as token ids: of a row exactly the tokens before the answer that training learned. Rows of
//! plain text have no answer; their beginning is the prompt and their rest the reference.

use std::path::Path;

use serde_json::{Value as Json, json};

use crate::dataset::{Conversation, Message, Record, TokenOptions, Tokenizer};
use crate::dataset::{EncodedRow, LossOn};
use crate::fault::{Fault, Result};
use crate::generate::engine::{Engine, Options};
use crate::generate::{Engine as _, Event, Finish, Refusal, Request, Sampling, Strength};
use crate::interrupt;
use crate::memory::serving::CacheType;
use crate::model::decoder::Decoder;
use crate::report::{Report, Stage, Unit};

/// LIMIT: sequences that run at once.
const SEQUENCES: usize = 8;
/// LIMIT: tokens whose keys and values are kept, unless one sequence needs more.
const CACHE_TOKENS: usize = 16_384;
/// A row of plain text is continued from this share of it on.
const TEXT_SHARE: usize = 4;
/// Tokens beyond the reference's own, so that a longer answer is seen to differ.
const TOKENS_BEYOND: usize = 8;

/// Something to be asked.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// FILE:ROW, if it is of a row.
    pub place: Option<String>,
    /// The prompt as people read it.
    pub shown: String,
    /// Token ids of the prompt.
    pub prompt: Vec<u32>,
    /// The row's own answer, without control tokens.
    pub reference: Option<String>,
    /// Most tokens to generate.
    pub tokens_max: usize,
}

/// One answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Given {
    /// The text without the token that ended it.
    pub text: String,
    /// Tokens that were generated.
    pub tokens: usize,
    /// Whether it ended by itself, not by the limit of tokens.
    pub ended: bool,
}

/// A question with both answers.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    /// The question.
    pub question: Question,
    /// The answer of the base alone.
    pub base: Given,
    /// The answer of the base with the adapters.
    pub tuned: Given,
}

/// The choice of tokens, and the tokens that end an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct How {
    /// The choice of each token.
    pub sampling: Sampling,
    /// Tokens that end an answer.
    pub stop_tokens: Vec<u32>,
}

impl Given {
    /// Returns whether the answer is the reference, white space around both aside.
    pub fn is(&self, reference: &str) -> bool {
        self.text.trim() == reference.trim()
    }

    fn json(&self) -> Json {
        json!({"text": self.text, "tokens": self.tokens, "ended": self.ended})
    }
}

impl Pair {
    /// Returns JSON for machines.
    pub fn json(&self) -> Json {
        json!({
            "row": self.question.place,
            "prompt": self.question.shown,
            "reference": self.question.reference,
            "base": self.base.json(),
            "tuned": self.tuned.json(),
        })
    }
}

/// Returns options for rows that become questions: only answers are marked as learned, even if training learns more.
pub fn token_options(options: &TokenOptions) -> TokenOptions {
    TokenOptions { loss: LossOn::Answers, ..options.clone() }
}

/// Turns rows that were encoded with `token_options` into questions, with a limit of tokens each. Without one the limit
/// follows the reference. Rows that leave no prompt are left out.
pub fn of_rows(
    rows: &[EncodedRow],
    records: &[Record],
    tokenizer: &Tokenizer,
    tokens_max: Option<usize>,
) -> Vec<Question> {
    let question = |row: &EncodedRow| {
        let (ids, record) = (&row.example.ids, &records[row.record]);
        let answer = answer(row)?;
        let reference = &ids[answer.clone()];
        Some(Question {
            place: Some(format!("{}:{}", record.file, record.row)),
            shown: shown(record, &ids[..answer.start], tokenizer),
            prompt: ids[..answer.start].to_vec(),
            reference: Some(tokenizer.decode(reference, true)),
            tokens_max: tokens_max.unwrap_or(reference.len() + TOKENS_BEYOND),
        })
    };
    rows.iter().filter_map(question).collect()
}

/// Returns the tokens of the last learned answer.
fn answer(row: &EncodedRow) -> Option<std::ops::Range<usize>> {
    let learned = |index: usize| index > 0 && row.example.supervised[index];
    let end = (0..row.example.ids.len()).rev().find(|&index| learned(index))? + 1;
    let start = (0..end).rev().find(|&index| !learned(index)).map_or(0, |index| index + 1);
    // The whole text, from the first token on, is plain.
    let start = if start <= 1 { (end / TEXT_SHARE).max(1) } else { start };
    (start < end).then_some(start..end)
}

/// Returns the text of a prompt that people read: the question alone, or every turn with its role.
fn shown(record: &Record, prompt: &[u32], tokenizer: &Tokenizer) -> String {
    let turns = |messages: &[Message]| match messages {
        [only] => only.text().to_owned(),
        all => all.iter().map(|m| format!("{}: {}", m.role, m.text())).collect::<Vec<_>>().join("\n"),
    };
    match &record.conversation {
        Conversation::Messages(messages) => {
            let is_answer = |message: &Message| message.role == "assistant" && message.learned;
            turns(&messages[..messages.iter().rposition(is_answer).unwrap_or(messages.len())])
        }
        Conversation::Prompt { prompt, .. } => turns(prompt),
        Conversation::PromptText { prompt, .. } => prompt.clone(),
        Conversation::Tokens { .. } | Conversation::Text(_) => tokenizer.decode(prompt, true),
    }
}

/// Returns an engine with adapters under the names a, b, ... and room for these questions. The base is taken into it.
pub fn engine(
    decoder: Decoder,
    adapters: &[&Path],
    questions: &[Question],
    report: &Report,
) -> Result<Engine> {
    let longest = questions.iter().map(|q| q.prompt.len() + q.tokens_max).max().unwrap_or(1);
    let context = longest.min(decoder.facts.positions_max);
    let options = Options {
        sequences: SEQUENCES,
        waiting: usize::MAX,
        context: Some(context),
        cache_tokens: (SEQUENCES * context).min(CACHE_TOKENS.max(context)),
        cache: CacheType::Bf16,
    };
    let engine = Engine::start(decoder, &options, String::new(), report)?;
    for (number, folder) in adapters.iter().enumerate() {
        engine.load_adapter(&name(number), folder).map_err(|fault| fault.at(folder.display()))?;
    }
    Ok(engine)
}

/// Returns the name of an adapter in the engine.
pub fn name(number: usize) -> String {
    format!("adapter-{number}")
}

/// Asks the base and the base with the adapters, all questions at once.
///
/// # Errors
/// Data: a prompt is longer than the model's context. The fault of the engine.
pub fn ask(
    engine: &Engine,
    questions: Vec<Question>,
    strengths: &[f64],
    how: &How,
    tokenizer: &Tokenizer,
    report: &Report,
) -> Result<Vec<Pair>> {
    let named = strengths.iter().enumerate();
    let adapters: Vec<Strength> =
        named.map(|(number, &strength)| Strength { name: name(number), strength: strength as f32 }).collect();
    let progress = report.task(Stage::Evaluate, Unit::Rows, "answers", Some(2 * questions.len() as u64));
    let submit = |adapters: &[Strength]| {
        let each = questions.iter().map(|question| {
            let room = engine.facts().context.saturating_sub(question.prompt.len());
            let request = Request {
                stop_tokens: how.stop_tokens.clone(),
                sampling: how.sampling.clone(),
                adapters: adapters.to_vec(),
                ..Request::greedy(question.prompt.clone(), question.tokens_max.min(room))
            };
            engine.submit(request).map_err(|refusal| refused(refusal, question))
        });
        each.collect::<Result<Vec<_>>>()
    };
    let (base, tuned) = (submit(&[])?, submit(&adapters)?);
    let collect = |mut answer: crate::generate::Answer| -> Result<Given> {
        let mut ids = Vec::new();
        loop {
            interrupt::check()?;
            match answer.wait() {
                Some(Event::Token(scored)) => ids.push(scored.token),
                Some(Event::Finished(finish, _)) => {
                    progress.advance(1);
                    let ended = finish == Finish::Stop;
                    let text = &ids[..ids.len() - usize::from(ended)];
                    return Ok(Given { text: tokenizer.decode(text, true), tokens: ids.len(), ended });
                }
                Some(Event::Failed(fault)) => return Err(fault),
                Some(_) => {}
                None => return Err(Fault::internal("the engine ended before its answer")),
            }
        }
    };
    let base: Vec<Given> = base.into_iter().map(collect).collect::<Result<_>>()?;
    let tuned: Vec<Given> = tuned.into_iter().map(collect).collect::<Result<_>>()?;
    let pairs = questions.into_iter().zip(base).zip(tuned);
    Ok(pairs.map(|((question, base), tuned)| Pair { question, base, tuned }).collect())
}

fn refused(refusal: Refusal, question: &Question) -> Fault {
    let place = question.place.clone().unwrap_or_else(|| "the prompt".into());
    match refusal {
        Refusal::Failed(fault) => fault.at(place),
        Refusal::TooLong { asked, context } => Fault::data(format!(
            "{place}: {asked} tokens of prompt and answer, the model was made for {context}"
        ))
        .help("take a shorter prompt"),
        other => Fault::data(format!("{place}: {other:?}")),
    }
}

/// The pairs of a run's end, as its folder keeps them; `held_out`: no row of them was trained on.
pub fn json(pairs: &[Pair], held_out: bool) -> Json {
    json!({"held_out": held_out, "pairs": pairs.iter().map(Pair::json).collect::<Vec<_>>()})
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::Example;

    fn row(supervised: &[bool]) -> EncodedRow {
        let ids = (0..supervised.len() as u32).collect();
        let example = Example { ids, supervised: supervised.to_vec() };
        EncodedRow { record: 0, example, whole: supervised.len() }
    }

    #[test]
    fn the_last_learned_answer_is_the_reference() {
        let (t, f) = (true, false);
        assert_eq!(answer(&row(&[f, f, t, t])), Some(2..4));
        assert_eq!(answer(&row(&[f, t, t, f, f, t, t, f])), Some(5..7));
        assert_eq!(answer(&row(&[f, f, f])), None);
        assert_eq!(answer(&row(&[])), None);
    }

    #[test]
    fn plain_text_is_continued_from_its_first_quarter() {
        assert_eq!(answer(&row(&[true; 12])), Some(3..12));
        assert_eq!(answer(&row(&[true; 2])), Some(1..2));
        assert_eq!(answer(&row(&[true])), None);
    }

    #[test]
    fn white_space_around_an_answer_does_not_count() {
        let given = Given { text: " four\n".into(), tokens: 2, ended: true };
        assert!(given.is("four") && !given.is("Four"));
    }
}
