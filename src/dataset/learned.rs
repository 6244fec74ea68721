//! The findings of encoding -> one line of counts, and one warning for each kind of finding that changes what a
//! model learns.

use super::{Example, TokenOptions, Tokenizer};
use crate::report::{Report, Stage};

/// Rows without a learned end token are reported if they are at least this share.
const UNENDED_SHARE: f64 = 0.25;

/// Counts over rows. The tallies of two sets can be added.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub(super) struct Tally {
    /// Rows.
    pub rows: u64,
    /// Tokens after cutting.
    pub tokens: u64,
    /// Tokens that are learned.
    pub learned: u64,
    /// Tokens of the longest row before cutting.
    pub longest: usize,
    /// Rows that were cut.
    pub cut: u64,
    /// Rows with nothing left to learn.
    pub dropped: u64,
    /// Kept rows whose last learned token is one at which generation stops.
    pub ended: u64,
    /// Kept rows whose last learned token is special, but is not one at which generation stops.
    pub ended_otherwise: u64,
    /// The last such token.
    pub other_end: Option<u32>,
    /// Rows that already held the tokens that the tokenizer puts around a text.
    pub doubled: u64,
    /// Rows with tools.
    pub tools: u64,
    /// Rows with tools that the template does not write.
    pub tools_hidden: u64,
    /// Rows with documents that the template does not write.
    pub documents_hidden: u64,
    /// Turns with thoughts.
    pub thoughts: u64,
    /// Turns with thoughts that the template shows.
    pub thoughts_shown: u64,
    /// Turns of the assistant that are shown but not learned.
    pub not_learned: u64,
    /// Turns whose null content the template writes as nothing.
    pub nulls: u64,
    /// Calls whose arguments are text that the template quotes once more.
    pub quoted_arguments: u64,
}

impl Tally {
    /// Adds the counts of another tally.
    pub fn add(&mut self, other: &Tally) {
        self.rows += other.rows;
        self.tokens += other.tokens;
        self.learned += other.learned;
        self.longest = self.longest.max(other.longest);
        self.cut += other.cut;
        self.dropped += other.dropped;
        self.ended += other.ended;
        self.ended_otherwise += other.ended_otherwise;
        self.other_end = other.other_end.or(self.other_end);
        self.doubled += other.doubled;
        self.tools += other.tools;
        self.tools_hidden += other.tools_hidden;
        self.documents_hidden += other.documents_hidden;
        self.thoughts += other.thoughts;
        self.thoughts_shown += other.thoughts_shown;
        self.not_learned += other.not_learned;
        self.nulls += other.nulls;
        self.quoted_arguments += other.quoted_arguments;
    }

    /// Counts an example as it will be trained; `whole` is its length before cutting. Returns whether anything is
    /// left to learn.
    pub fn count(&mut self, example: &Example, whole: usize, tokenizer: &Tokenizer) -> bool {
        self.longest = self.longest.max(whole);
        self.cut += u64::from(whole > example.ids.len());
        let learned = example.supervised.iter().skip(1).filter(|&&learned| learned).count();
        if learned == 0 {
            self.dropped += 1;
            return false;
        }
        self.tokens += example.ids.len() as u64;
        self.learned += learned as u64;
        match last_learned(example, tokenizer) {
            Some(id) if tokenizer.ends(id) => self.ended += 1,
            Some(id) if tokenizer.is_special(id) => {
                self.ended_otherwise += 1;
                self.other_end = Some(id);
            }
            _ => {}
        }
        true
    }

    /// Reports one line of counts, then the warnings.
    pub fn tell(&self, options: &TokenOptions, tokenizer: &Tokenizer, report: &Report) {
        let Tally { rows, tokens, learned, longest, cut, dropped, .. } = self;
        report.note(
            Stage::Tokenize,
            format!(
                "{rows} rows: {tokens} tokens, {learned} of them learned; longest {longest}, {cut} cut to {}, {dropped} dropped",
                options.tokens_max
            ),
        );
        for warning in self.warnings(options, tokenizer) {
            report.warn(Stage::Tokenize, warning);
        }
    }

    /// Returns findings that the user should know before training on these rows.
    pub fn warnings(&self, options: &TokenOptions, tokenizer: &Tokenizer) -> Vec<String> {
        let mut warnings = Vec::new();
        let Tally { rows, dropped, .. } = self;
        if *dropped > 0 {
            let tokens = options.tokens_max;
            warnings.push(format!(
                "{dropped} of {rows} rows have nothing to learn within {tokens} tokens and were dropped"
            ));
        }
        warnings.extend(self.cannot_stop(tokenizer));
        warnings.extend(self.around_the_text(tokenizer));
        warnings.extend(self.not_shown());
        warnings
    }

    /// Returns the warning if rows end without a learned end token. A model learns to stop only from end tokens that
    /// are learned.
    fn cannot_stop(&self, tokenizer: &Tokenizer) -> Option<String> {
        let kept = self.rows - self.dropped;
        let unended = kept - self.ended;
        if kept == 0 || (unended as f64) < UNENDED_SHARE * kept as f64 {
            return None;
        }
        let ends = tokenizer.end_tokens().join(", ");
        if let Some(id) = self.other_end.filter(|_| self.ended_otherwise * 2 > unended) {
            let other = tokenizer.id_to_text(id);
            return Some(format!(
                "{} of {kept} rows end in {other}, at which this model does not stop (it stops at {ends}): set eos_token in \
                 tokenizer_config.json or eos_token_id in generation_config.json, or serve the model with {other} as a stop token",
                self.ended_otherwise
            ));
        }
        Some(format!(
            "{unended} of {kept} rows end without a learned end token ({ends}), so that the model may not learn to stop \
             ({} rows were cut): the chat template must write the token inside what it marks as the answer, and max_length must leave room for it",
            self.cut
        ))
    }

    fn around_the_text(&self, tokenizer: &Tokenizer) -> Option<String> {
        let doubled = self.doubled;
        let token = tokenizer.bos().unwrap_or_else(|| tokenizer.eos());
        (doubled > 0).then(|| {
            format!(
                "{doubled} rows already have the tokens that the tokenizer puts around a text ({token}); hone does not add them again, \
                 transformers would"
            )
        })
    }

    fn not_shown(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        let mut tell = |count: u64, text: &dyn Fn(u64) -> String| {
            if count > 0 {
                warnings.push(text(count));
            }
        };
        tell(self.tools_hidden, &|n| {
            format!(
                "{n} rows have tools that the chat template does not write, so that the model never sees them"
            )
        });
        tell(self.documents_hidden, &|n| {
            format!(
                "{n} rows have documents that the chat template does not write, so that the model never sees them"
            )
        });
        if self.thoughts > 0 && self.thoughts_shown == 0 {
            tell(self.thoughts, &|n| {
                format!(
                    "{n} answers have thoughts (reasoning_content, reasoning, thinking) that the chat template never writes, so that they are not learned"
                )
            });
        }
        tell(self.quoted_arguments, &|n| {
            format!(
                "{n} tool calls have arguments as text, which the chat template writes as a quoted text: give them as an object to have them written as one"
            )
        });
        tell(self.nulls, &|n| {
            format!("{n} turns have a null content, which the chat template writes as nothing")
        });
        warnings
    }
}

/// Returns the last learned token that is not white space after the answer.
fn last_learned(example: &Example, tokenizer: &Tokenizer) -> Option<u32> {
    let learned = example.ids.iter().zip(&example.supervised).skip(1).filter(|(_, learned)| **learned);
    learned
        .map(|(&id, _)| id)
        .rev()
        .find(|&id| tokenizer.is_special(id) || !tokenizer.id_to_text(id).trim().is_empty())
}
