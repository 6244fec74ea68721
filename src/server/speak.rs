//! An engine's events -> pieces of text with their tokens, up to a stop string.

use std::sync::Arc;

use super::ask::Ask;
use super::error::Error;
use super::model::Model;
use super::tools::{self, Calls, Said};
use crate::generate::text::{Detokenizer, Shown, Stops, token_name};
use crate::generate::{Answer, Event, Finish, Request, Scored, Usage};

/// The next piece of a choice.
#[derive(Debug)]
pub enum Piece {
    /// The request left the queue.
    Started,
    /// Log-probabilities of the prompt's tokens.
    Prompt(Vec<Scored>),
    /// The certain text, and the tokens since the last piece.
    Said(Said, Vec<Scored>),
    /// The rest, and its tokens.
    End(Said, Vec<Scored>, End),
    /// The choice cannot be finished.
    Failed(Error),
}

/// The end of a choice.
#[derive(Clone, Debug, PartialEq)]
pub struct End {
    /// `stop`, `length` or `tool_calls`.
    pub reason: &'static str,
    /// The stop string or token of the caller that ended it.
    pub by: Option<serde_json::Value>,
    /// Numbers of tokens.
    pub usage: Usage,
}

/// Reads one choice.
pub struct Speaker {
    model: Arc<Model>,
    answer: Answer,
    detokenizer: Detokenizer,
    stops: Stops,
    /// Looks for tool calls, if tools are offered.
    calls: Option<Calls>,
    stop_strings: bool,
    /// Whether the text includes the string that ended it.
    include_stop: bool,
    stop_tokens: Vec<u32>,
    min_tokens: usize,
    waiting: Vec<Scored>,
    prompt_tokens: usize,
    generated: usize,
    ended_by: Option<u32>,
}

impl Speaker {
    /// Reads `answer` as the choice of `request`.
    pub fn new(model: Arc<Model>, answer: Answer, ask: &Ask, request: &Request) -> Speaker {
        let detokenizer = Detokenizer::new(ask.skip_special).after(&model.tokenizer, &request.prompt);
        Speaker {
            model,
            answer,
            detokenizer,
            stops: Stops::new(ask.stop.clone()),
            calls: ask.offer.clone().map(Calls::new),
            stop_strings: !ask.stop.is_empty(),
            include_stop: ask.include_stop,
            stop_tokens: request.stop_tokens.clone(),
            min_tokens: request.min_tokens,
            waiting: Vec::new(),
            prompt_tokens: request.prompt.len(),
            generated: 0,
            ended_by: None,
        }
    }

    /// Returns the next piece; nothing follows an end or a failure.
    pub async fn next(&mut self) -> Piece {
        loop {
            match self.answer.next().await {
                Some(Event::Started) => return Piece::Started,
                Some(Event::Prompt(scored)) => return Piece::Prompt(scored),
                Some(Event::Token(scored)) => {
                    if let Some(piece) = self.token(scored) {
                        return piece;
                    }
                }
                Some(Event::Finished(finish, usage)) => return self.finished(finish, usage),
                Some(Event::Failed(fault)) => return Piece::Failed(fault.into()),
                None => {
                    let message = "The engine ended before the answer did";
                    return Piece::Failed(Error::new(hyper::StatusCode::INTERNAL_SERVER_ERROR, message));
                }
            }
        }
    }

    fn token(&mut self, scored: Scored) -> Option<Piece> {
        self.generated += 1;
        let id = scored.token;
        self.waiting.push(scored);
        if self.stop_tokens.contains(&id) {
            self.ended_by = Some(id);
            if !self.include_stop {
                return None;
            }
        }
        let text = self.text(id);
        let mut shown = self.push(&text);
        if let Some(stop) = shown.stop.take() {
            return Some(self.stopped(shown.text, stop));
        }
        let said = match &mut self.calls {
            Some(calls) => calls.push(&shown.text),
            None => Said::text(shown.text),
        };
        (!said.is_empty()).then(|| Piece::Said(said, std::mem::take(&mut self.waiting)))
    }

    fn push(&mut self, text: &str) -> Shown {
        match self.generated <= self.min_tokens {
            true => self.stops.push_free(text),
            false => self.stops.push(text),
        }
    }

    /// Returns the text that is certain with this token. A control token that marks a call is text if tools are
    /// offered.
    fn text(&mut self, id: u32) -> String {
        let tokenizer = &self.model.tokenizer;
        if self.calls.is_some() && tokenizer.is_special(id) {
            let name = token_name(tokenizer, id);
            if tools::is_marker(&name) {
                return self.detokenizer.finish(tokenizer) + &self.detokenizer.whole(&name, id);
            }
        }
        self.detokenizer.push(tokenizer, id)
    }

    fn stopped(&mut self, mut text: String, stop: String) -> Piece {
        if self.include_stop {
            text += &stop;
        }
        let usage = Usage {
            prompt_tokens: self.prompt_tokens,
            generated_tokens: self.generated,
            cached_tokens: self.answer.cached(),
        };
        self.end(text, End { reason: "stop", by: Some(stop.into()), usage })
    }

    fn end(&mut self, text: String, mut end: End) -> Piece {
        let said = match &mut self.calls {
            Some(calls) => {
                let said = calls.push(&text).and(calls.finish());
                if calls.any() && end.reason == "stop" {
                    end.reason = "tool_calls";
                }
                said
            }
            None => Said::text(text),
        };
        Piece::End(said, std::mem::take(&mut self.waiting), end)
    }

    fn finished(&mut self, finish: Finish, usage: Usage) -> Piece {
        let rest = self.detokenizer.finish(&self.model.tokenizer);
        let mut shown = self.push(&rest);
        if let Some(stop) = shown.stop.take().filter(|_| self.stop_strings) {
            return self.stopped(shown.text, stop);
        }
        shown.text += &self.stops.finish();
        let reason = match finish {
            Finish::Stop => "stop",
            Finish::Length => "length",
        };
        let models_own = |id: &u32| self.model.defaults.stop_tokens.contains(id);
        let by = self.ended_by.filter(|id| !models_own(id)).map(serde_json::Value::from);
        self.end(shown.text, End { reason, by, usage })
    }
}
