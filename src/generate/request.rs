//! Requests to an engine and its answers: plain types, the channel between both, and the trait `Engine`.
//!
//! A caller submits a `Request` and reads `Event`s from its `Answer`. Dropping the answer cancels the request. An
//! engine keeps the `Sender` of each request; `Sender::cancelled` shows, between two steps, whether nobody reads any
//! more.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::mpsc;

use crate::fault::{Fault, Result};

/// One sequence to generate. Several choices of one prompt are several requests.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Token ids of the prompt; at least one.
    pub prompt: Vec<u32>,
    /// Most tokens to generate. 0 only scores the prompt.
    pub max_tokens: usize,
    /// No token of `stop_tokens` is drawn before so many tokens are generated.
    pub min_tokens: usize,
    /// Tokens that end the sequence: the model's ends and those of the caller. A caller who ignores the model's ends
    /// leaves them out here.
    pub stop_tokens: Vec<u32>,
    /// The choice of the next token.
    pub sampling: Sampling,
    /// The adapters that are added to the base: the sum of strength x scale x B A. Empty is the base alone.
    pub adapters: Vec<Strength>,
    /// Log-probabilities of generated tokens, with so many of the most probable alternatives.
    pub logprobs: Option<usize>,
    /// The same of the prompt's tokens.
    pub prompt_logprobs: Option<usize>,
}

impl Request {
    /// Returns a greedy request of the base, which every field may change.
    pub fn greedy(prompt: Vec<u32>, max_tokens: usize) -> Request {
        Request {
            prompt,
            max_tokens,
            min_tokens: 0,
            stop_tokens: Vec::new(),
            sampling: Sampling::greedy(),
            adapters: Vec::new(),
            logprobs: None,
            prompt_logprobs: None,
        }
    }
}

/// Parameters of the choice of a token. The order of the filters is that of transformers: `generate/sampling.rs`.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy: the most probable token, of equal ones the lowest id.
    pub temperature: f32,
    /// The number of most probable tokens that are kept; 0 is all.
    pub top_k: usize,
    /// The probability that the most probable tokens together must have; 1 keeps all.
    pub top_p: f32,
    /// The least share of the most probable token's probability that a token must have; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or answer; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Is subtracted once from the logit of every token that was generated.
    pub presence_penalty: f32,
    /// Is subtracted from a token's logit for each time it was generated.
    pub frequency_penalty: f32,
    /// Is added to the logits of these tokens.
    pub bias: Vec<(u32, f32)>,
    /// A sequence's draws depend on this and on the token's number only, not on what else runs.
    pub seed: u64,
}

impl Sampling {
    /// Returns the most probable token, nothing changed.
    pub fn greedy() -> Sampling {
        Sampling {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            bias: Vec::new(),
            seed: 0,
        }
    }
}

/// An adapter's part of a request.
#[derive(Clone, Debug, PartialEq)]
pub struct Strength {
    /// Name under which the adapter was loaded.
    pub name: String,
    /// 1 is as trained, 0 is nothing of it.
    pub strength: f32,
}

/// The events of a request, in this order: `Started`, `Prompt` (if asked for), `Token`s, then `Finished` or `Failed`.
#[derive(Clone, Debug)]
pub enum Event {
    /// The request left the queue and has a place in the batch.
    Started,
    /// The prompt's tokens from the second on, which have a probability. May come in several parts.
    Prompt(Vec<Scored>),
    /// The next token; the one that ends the sequence included.
    Token(Scored),
    /// Nothing follows.
    Finished(Finish, Usage),
    /// The request could not be finished. No event follows.
    Failed(Fault),
}

/// A token with its log-probability by the model's own logits, before penalties and temperature.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scored {
    /// The token's id.
    pub token: u32,
    /// 0 if the request asked for none.
    pub logprob: f32,
    /// The most probable tokens from the first on; of equal ones the lower id first.
    pub top: Vec<(u32, f32)>,
}

/// The reason why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Finish {
    /// The text ended by one of its stop tokens.
    Stop,
    /// `max_tokens`, or the end of the context.
    Length,
}

/// The time and tokens that a request took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// The prompt's tokens whose keys and values were there already.
    pub cached_tokens: usize,
    /// The token that ended it included.
    pub generated_tokens: usize,
}

/// The reason why a request is not taken.
#[derive(Clone, Debug)]
pub enum Refusal {
    /// The queue is full.
    Full {
        /// Requests that wait already.
        waiting: usize,
    },
    /// No adapter of this name is loaded.
    UnknownAdapter(String),
    /// The prompt and the requested tokens do not fit in the context.
    TooLong {
        /// Tokens of prompt and answer together.
        asked: usize,
        /// Tokens that the context holds.
        context: usize,
    },
    /// A token id that the model's embedding does not have.
    UnknownToken {
        /// The token's id.
        token: u32,
        /// Number of ids of the model.
        vocabulary: usize,
    },
    /// The engine cannot work any more.
    Failed(Fault),
}

/// The model and adapters that an engine serves.
#[derive(Clone, Debug, PartialEq)]
pub struct Facts {
    /// Most tokens of prompt and answer together.
    pub context: usize,
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// Most sequences that run at once.
    pub sequences: usize,
    /// Most requests that wait beside those that run.
    pub waiting: usize,
    /// Tokens whose keys and values fit, over all sequences.
    pub cache_tokens: usize,
    /// The base's storage and device: `NF4, scales quantised too, on NVIDIA H100`.
    pub description: String,
}

/// An adapter that is loaded.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// Name by which requests choose it.
    pub name: String,
    /// The place of its files.
    pub folder: PathBuf,
    /// The largest rank of its modules.
    pub rank: usize,
    /// Memory of its matrices.
    pub bytes: usize,
}

/// The values of an engine that `/metrics` shows.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counters {
    /// Sequences that generate now.
    pub running: usize,
    /// Requests in the queue.
    pub waiting: usize,
    /// Pages of the cache in use, from 0 to 1.
    pub cache_usage: f64,
    /// Sequences that had to give their pages back and start over.
    pub preemptions: u64,
    /// Prompt tokens that were looked up among those computed before, and found.
    pub prefix_queries: u64,
    /// Prompt tokens whose keys and values were found in the cache.
    pub prefix_hits: u64,
    /// Prompt tokens of all requests so far.
    pub prompt_tokens: u64,
    /// Tokens that were generated so far.
    pub generated_tokens: u64,
    /// Requests whose readers went away.
    pub cancelled: u64,
}

/// A loaded model that generates. Calls come from many threads and return soon; the work is done elsewhere.
pub trait Engine: Send + Sync {
    /// Returns the loaded model and its limits.
    fn facts(&self) -> &Facts;

    /// Takes a request into the queue.
    ///
    /// # Errors
    /// Why it cannot be answered; nothing of it stays.
    fn submit(&self, request: Request) -> std::result::Result<Answer, Refusal>;

    /// Returns the adapters in the order in which they were loaded.
    fn adapters(&self) -> Vec<Adapter>;

    /// Loads a PEFT folder under a name, while requests run. A name that is taken gets the new one for requests to
    /// come.
    ///
    /// # Errors
    /// Model: it does not fit the base, or would change nothing. Capacity: no memory for it.
    fn load_adapter(&self, name: &str, folder: &Path) -> Result<Adapter>;

    /// Unloads an adapter. Requests that use it are finished first; new ones are refused at once.
    ///
    /// # Errors
    /// Config: no adapter of this name.
    fn unload_adapter(&self, name: &str) -> Result<()>;

    /// Returns the current counts.
    fn counters(&self) -> Counters;

    /// Returns the failure after which it answers nothing any more, if there was one.
    fn failure(&self) -> Option<Fault> {
        None
    }
}

/// An engine that several threads share.
pub type Shared = Arc<dyn Engine>;

/// The engine's end of a request. Sending never waits: a request has at most `max_tokens` tokens and so many events.
#[derive(Clone, Debug)]
pub struct Sender {
    events: mpsc::UnboundedSender<Event>,
    cached: Arc<AtomicUsize>,
}

impl Sender {
    /// Says whether somebody still reads.
    pub fn send(&self, event: Event) -> bool {
        self.events.send(event).is_ok()
    }

    /// Returns whether the reader went away: the sequence may leave the batch.
    pub fn cancelled(&self) -> bool {
        self.events.is_closed()
    }

    /// Sends the number of the prompt's tokens that were in the cache already.
    pub fn set_cached(&self, tokens: usize) {
        self.cached.store(tokens, Ordering::Release);
    }
}

/// The caller's end of a request; dropping it cancels the request.
#[derive(Debug)]
pub struct Answer {
    events: mpsc::UnboundedReceiver<Event>,
    cached: Arc<AtomicUsize>,
}

impl Answer {
    /// Returns the next event; `None` behind the last, or if the engine is gone.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// Returns the same for code that is not asynchronous.
    pub fn wait(&mut self) -> Option<Event> {
        self.events.blocking_recv()
    }

    /// Returns the number of tokens of the prompt that were in the cache already; known once it started.
    pub fn cached(&self) -> usize {
        self.cached.load(Ordering::Acquire)
    }
}

/// Returns both ends of a request.
pub fn answer() -> (Sender, Answer) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let cached = Arc::new(AtomicUsize::new(0));
    (Sender { events: sender, cached: cached.clone() }, Answer { events: receiver, cached })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_that_goes_away_is_a_cancellation() {
        let (sender, mut answer) = answer();
        assert!(sender.send(Event::Started) && !sender.cancelled());
        assert!(matches!(answer.wait(), Some(Event::Started)));
        drop(answer);
        assert!(sender.cancelled() && !sender.send(Event::Started));
    }
}
