//! An engine's events -> pieces of text with their tokens, up to a stop string.

use std::sync::Arc;

use super::ask::Ask;
use super::error::Error;
use super::model::Model;
use crate::generate::text::{Detokenizer, Stops};
use crate::generate::{Answer, Event, Finish, Request, Scored, Usage};

/// What a choice says next.
#[derive(Debug)]
pub enum Piece {
    Prompt(Vec<Scored>),
    /// Text that is certain, and the tokens since the last piece.
    Text(String, Vec<Scored>),
    /// The rest of the text and its tokens.
    End(String, Vec<Scored>, End),
    Failed(Error),
}

/// How a choice ended.
#[derive(Clone, Debug, PartialEq)]
pub struct End {
    pub reason: &'static str,
    /// The stop string or token of the caller that ended it.
    pub by: Option<serde_json::Value>,
    pub usage: Usage,
}

/// Reads one choice.
pub struct Speaker {
    model: Arc<Model>,
    answer: Answer,
    detokenizer: Detokenizer,
    stops: Stops,
    stop_strings: bool,
    stop_tokens: Vec<u32>,
    waiting: Vec<Scored>,
    prompt_tokens: usize,
    generated: usize,
    ended_by: Option<u32>,
}

impl Speaker {
    pub fn new(model: Arc<Model>, answer: Answer, ask: &Ask, request: &Request) -> Speaker {
        let detokenizer = Detokenizer::new(ask.skip_special).after(&model.tokenizer, &request.prompt);
        Speaker {
            model,
            answer,
            detokenizer,
            stops: Stops::new(ask.stop.clone()),
            stop_strings: !ask.stop.is_empty(),
            stop_tokens: request.stop_tokens.clone(),
            waiting: Vec::new(),
            prompt_tokens: request.prompt.len(),
            generated: 0,
            ended_by: None,
        }
    }

    /// The next piece; nothing follows an end or a failure.
    pub async fn next(&mut self) -> Piece {
        loop {
            match self.answer.next().await {
                Some(Event::Started) => {}
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
            return None;
        }
        let text = self.detokenizer.push(&self.model.tokenizer, id);
        let shown = self.stops.push(&text);
        if shown.stopped {
            return Some(self.stopped(shown.text));
        }
        let nothing = shown.text.is_empty();
        (!nothing).then(|| Piece::Text(shown.text, std::mem::take(&mut self.waiting)))
    }

    fn stopped(&mut self, text: String) -> Piece {
        let usage =
            Usage { prompt_tokens: self.prompt_tokens, generated_tokens: self.generated, cached_tokens: 0 };
        Piece::End(text, std::mem::take(&mut self.waiting), End { reason: "stop", by: None, usage })
    }

    fn finished(&mut self, finish: Finish, usage: Usage) -> Piece {
        let rest = self.detokenizer.finish(&self.model.tokenizer);
        let mut shown = self.stops.push(&rest);
        if shown.stopped && self.stop_strings {
            return self.stopped(shown.text);
        }
        shown.text += &self.stops.finish();
        let reason = match finish {
            Finish::Stop => "stop",
            Finish::Length => "length",
        };
        let models_own = |id: &u32| self.model.defaults.stop_tokens.contains(id);
        let by = self.ended_by.filter(|id| !models_own(id)).map(serde_json::Value::from);
        Piece::End(shown.text, std::mem::take(&mut self.waiting), End { reason, by, usage })
    }
}
