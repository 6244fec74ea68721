//! Requests -> events: a queue, and a thread that owns the cache and runs one step after another over all running
//! sequences.
//!
//! A step takes one new row of every sequence that generates, and prompts chunk by chunk. Sequences join and leave
//! between steps. A sequence reserves pages for its prompt and all it may generate before it starts, so that a sequence
//! that started never has to wait again. Chunks of a prompt end at multiples of `CHUNK`, independent of other
//! sequences. Together with the promise of `Decoder::step`, a sequence's bits do not depend on its neighbours.
//! Therefore a prompt may also take whole chunks at its beginning from the cache, if another prompt with the same
//! adapters has the same beginning.

use std::collections::VecDeque;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use candle_core::{DType, Tensor};
use sha2::{Digest, Sha256};

use super::request::{
    self, Adapter, Answer, Counters, Event, Finish, Refusal, Request, Scored, Sender, Usage, answer,
};
use super::sampling::{self, History};
use crate::adapter;
use crate::facts::rope::Scaling;
use crate::fault::{Fault, Result};
use crate::memory::serving::CacheType;
use crate::model::cache::Cache;
use crate::model::decoder::Decoder;
use crate::model::lora::{Lora, Mixture, Pairs, Part};
use crate::model::pages::{Held, Key};
use crate::model::pass::{SHORT_ROWS, Step};
#[cfg(feature = "cuda")]
use crate::model::replay::Replay;
#[cfg(feature = "cuda")]
use crate::ops::cuda::graph;
#[cfg(feature = "cuda")]
use crate::ops::draw::{self, Draw};
#[cfg(feature = "cuda")]
use crate::ops::{largest, rows};
use crate::report::Report;
#[cfg(feature = "cuda")]
use crate::report::Stage;

/// Rows of a prompt in one chunk, and of all prompts in one step, the last chunk of which may exceed it.
pub const CHUNK: usize = 256;

/// The most that an engine takes at once.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Most sequences that run at once.
    pub sequences: usize,
    /// Most requests that wait; further ones are refused.
    pub waiting: usize,
    /// Most tokens of prompt and answer together. `None`: the length that the model was made for.
    pub context: Option<usize>,
    /// Tokens whose keys and values fit, over all sequences.
    pub cache_tokens: usize,
    /// The type of keys and values in the cache; f32 stands for the type that the model computes in.
    pub cache: CacheType,
}

/// A loaded model that answers requests from a thread of its own.
pub struct Engine {
    facts: request::Facts,
    decoder: Arc<Decoder>,
    shared: Arc<Shared>,
    worker: Option<JoinHandle<()>>,
}

/// State that callers and the worker share.
struct Shared {
    state: Mutex<State>,
    /// Signalled when a request waits or the engine is to end.
    woken: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Waiting>,
    adapters: Vec<Loaded>,
    /// Adapters loaded so far: the number of the next one.
    loaded: usize,
    counters: Counters,
    failure: Option<Fault>,
    ending: bool,
}

/// An adapter that is loaded. Rows add adapters in the order of their numbers.
#[derive(Clone)]
struct Loaded {
    about: Adapter,
    number: usize,
    pairs: Arc<Pairs>,
}

/// An adapter's part of a running request.
#[derive(Clone)]
struct Added {
    number: usize,
    pairs: Arc<Pairs>,
    strength: f64,
}

struct Waiting {
    request: Request,
    mix: Vec<Added>,
    /// Of the prompt's whole chunks, if they may be shared.
    keys: Vec<Key>,
    sender: Sender,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers all waiting and all later requests with the failure.
    fn fail(&self, fault: Fault) {
        let mut state = self.lock();
        for waiting in state.waiting.drain(..) {
            waiting.sender.send(Event::Failed(fault.clone()));
        }
        (state.counters.running, state.counters.waiting) = (0, 0);
        state.failure = Some(fault);
    }
}

impl Engine {
    /// Starts the worker. `description` says how the base is held and where.
    ///
    /// # Errors
    /// Device: the cache finds no memory.
    pub fn start(
        decoder: Decoder,
        options: &Options,
        description: String,
        report: &Report,
    ) -> Result<Engine> {
        let dtype = match options.cache {
            CacheType::Bf16 => DType::BF16,
            CacheType::F32 => decoder.dtype,
            CacheType::Fp8 => DType::F8E4M3,
        };
        let cache = Cache::new(&decoder.facts, options.cache_tokens.max(1), CHUNK, dtype, &decoder.device)?;
        let context = options.context.unwrap_or(decoder.facts.positions_max);
        let facts = request::Facts {
            context: context.min(cache.tokens()),
            vocabulary: decoder.facts.vocab,
            sequences: options.sequences.max(1),
            waiting: options.waiting.max(1),
            cache_tokens: cache.tokens(),
            description,
        };
        let decoder = Arc::new(decoder);
        let shared = Arc::new(Shared { state: Mutex::default(), woken: Condvar::new() });
        let worker = Worker {
            switch: switch(&decoder),
            decoder: decoder.clone(),
            cache,
            shared: shared.clone(),
            sequences: facts.sequences,
            running: Vec::new(),
            #[cfg(feature = "cuda")]
            report: Some(report.clone()),
        };
        #[cfg(not(feature = "cuda"))]
        let _ = report;
        let thread = std::thread::Builder::new().name("generate".into()).spawn(move || worker.run());
        let thread = thread.map_err(|error| Fault::machine("start a thread", &error))?;
        Ok(Engine { facts, decoder, shared, worker: Some(thread) })
    }

    /// Returns the adapters that a request names, in the order in which they were loaded.
    fn mix(&self, state: &State, request: &Request) -> std::result::Result<Vec<Added>, Refusal> {
        let mut mix = Vec::new();
        for part in &request.adapters {
            let found = state.adapters.iter().find(|loaded| loaded.about.name == part.name);
            let loaded = found.ok_or_else(|| Refusal::UnknownAdapter(part.name.clone()))?;
            let (number, pairs) = (loaded.number, loaded.pairs.clone());
            mix.push(Added { number, pairs, strength: f64::from(part.strength) });
        }
        mix.sort_by_key(|added| added.number);
        Ok(mix)
    }
}

/// Returns whether the keys of a row depend on what stands before it alone, and not on the sequence's length.
fn shares(decoder: &Decoder) -> bool {
    let of_length = |scaling: &Scaling| matches!(scaling, Scaling::Long { .. } | Scaling::Dynamic { .. });
    !decoder.facts.ropes.iter().any(|rope| of_length(&rope.scaling))
}

/// Returns the keys of the prompt's whole chunks, except the chunk with its last token, whose row must be computed.
fn keys(prompt: &[u32], mix: &[Added]) -> Vec<Key> {
    let mut before = Sha256::new();
    for added in mix {
        before.update(added.number.to_le_bytes());
        before.update(added.strength.to_le_bytes());
    }
    let mut before: Key = before.finalize().into();
    let chunks = prompt[..prompt.len() - 1].chunks_exact(CHUNK);
    let next = |chunk: &[u32]| {
        let mut hash = Sha256::new_with_prefix(before);
        chunk.iter().for_each(|token| hash.update(token.to_le_bytes()));
        before = hash.finalize().into();
        before
    };
    chunks.map(next).collect()
}

/// Returns the length beyond which longrope uses its other factors: a sequence that grows past it computes its keys
/// again, as transformers does for Phi-3.
fn switch(decoder: &Decoder) -> Option<usize> {
    decoder.facts.ropes.iter().find_map(|rope| match &rope.scaling {
        Scaling::Long { positions, .. } => Some(*positions),
        _ => None,
    })
}

impl request::Engine for Engine {
    fn facts(&self) -> &request::Facts {
        &self.facts
    }

    fn submit(&self, request: Request) -> std::result::Result<Answer, Refusal> {
        let vocabulary = self.facts.vocabulary;
        if let Some(&token) = request.prompt.iter().find(|&&token| token as usize >= vocabulary) {
            return Err(Refusal::UnknownToken { token, vocabulary });
        }
        let asked = request.prompt.len().saturating_add(request.max_tokens);
        if asked > self.facts.context {
            return Err(Refusal::TooLong { asked, context: self.facts.context });
        }
        if request.prompt.is_empty() {
            return Err(Refusal::Failed(Fault::data("the prompt has no token; expected at least one")));
        }
        let mut state = self.shared.lock();
        if let Some(fault) = &state.failure {
            return Err(Refusal::Failed(fault.clone()));
        }
        let mix = self.mix(&state, &request)?;
        // A request that can start at once does not wait.
        let idle = self.facts.sequences.saturating_sub(state.counters.running);
        if state.waiting.len() >= self.facts.waiting.saturating_add(idle) {
            return Err(Refusal::Full { waiting: state.waiting.len() });
        }
        let (sender, answer) = answer();
        // Log-probabilities of the prompt need its rows.
        let shared = shares(&self.decoder) && request.prompt_logprobs.is_none();
        let keys = if shared { keys(&request.prompt, &mix) } else { Vec::new() };
        state.waiting.push_back(Waiting { request, mix, keys, sender });
        state.counters.waiting = state.waiting.len();
        self.shared.woken.notify_one();
        Ok(answer)
    }

    fn adapters(&self) -> Vec<Adapter> {
        self.shared.lock().adapters.iter().map(|loaded| loaded.about.clone()).collect()
    }

    fn load_adapter(&self, name: &str, folder: &Path) -> Result<Adapter> {
        let read = adapter::read(folder)?;
        #[cfg(feature = "cuda")]
        let _apart = graph::apart();
        let Decoder { facts, dtype, device, .. } = &*self.decoder;
        let pairs = read.pairs(facts, *dtype, self.decoder.pair_type(), device)?;
        let about = Adapter {
            name: name.to_owned(),
            folder: folder.to_owned(),
            rank: pairs.rank(),
            bytes: pairs.bytes(),
        };
        let mut state = self.shared.lock();
        let loaded = Loaded { about: about.clone(), number: state.loaded, pairs: Arc::new(pairs) };
        state.loaded += 1;
        state.adapters.retain(|other| other.about.name != name);
        state.adapters.push(loaded);
        Ok(about)
    }

    fn unload_adapter(&self, name: &str) -> Result<()> {
        // Its memory may be freed.
        #[cfg(feature = "cuda")]
        let _apart = graph::apart();
        let mut state = self.shared.lock();
        let before = state.adapters.len();
        state.adapters.retain(|loaded| loaded.about.name != name);
        match state.adapters.len() < before {
            true => Ok(()),
            false => Err(Fault::config(format!("no adapter is loaded under the name {name}"))),
        }
    }

    fn counters(&self) -> Counters {
        self.shared.lock().counters
    }

    fn failure(&self) -> Option<Fault> {
        self.shared.lock().failure.clone()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shared.lock().ending = true;
        self.shared.woken.notify_all();
        if let Some(worker) = self.worker.take() {
            // A worker that panicked has written its failure already.
            let _ = worker.join();
        }
    }
}

/// The thread's own.
struct Worker {
    decoder: Arc<Decoder>,
    cache: Cache,
    shared: Arc<Shared>,
    sequences: usize,
    running: Vec<Sequence>,
    switch: Option<usize>,
    /// `None`: the one warning was given.
    #[cfg(feature = "cuda")]
    report: Option<Report>,
}

/// A request that runs.
struct Sequence {
    request: Request,
    mix: Vec<Added>,
    sender: Sender,
    held: Held,
    /// Keys of the prompt's chunks, which are shared once they are computed.
    keys: Vec<Key>,
    /// The tokens of the prompt and of the answer so far.
    tokens: Vec<u32>,
    /// Tokens whose keys and values are in the cache.
    computed: usize,
    /// The length by which rope scales the rows of the prompt, or of the rows that are computed again.
    rope_length: usize,
    history: History,
    /// Tokens of the prompt whose log-probabilities were sent; the first has none.
    scored: usize,
}

/// The part of a step's logits that was copied to the host.
struct Logits {
    /// Rows that were, ascending, one behind the other in `values`.
    wanted: Vec<u32>,
    values: Vec<f32>,
    vocabulary: usize,
    /// The token that the device drew for each row, unless all rows were copied.
    tokens: Vec<Option<u32>>,
}

impl Logits {
    /// Returns the logits of some rows; none if only their tokens were copied to the host.
    fn rows(&self, rows: &Range<usize>) -> Vec<&[f32]> {
        let Ok(from) = self.wanted.binary_search(&(rows.start as u32)) else { return Vec::new() };
        self.values[from * self.vocabulary..].chunks(self.vocabulary).take(rows.len()).collect()
    }
}

/// Rows of a sequence in one step.
struct Turn {
    sequence: usize,
    /// Positions in the sequence.
    positions: Range<usize>,
    /// Rows of the step's logits.
    logits: Range<usize>,
    /// Whether the last of the logits draws the next token.
    draws: bool,
}

impl Sequence {
    fn new(waiting: Waiting, held: Held) -> Sequence {
        let Waiting { request, mix, keys, sender } = waiting;
        let tokens = request.prompt.clone();
        let (history, rope_length) = (History::new(&tokens), tokens.len());
        let computed = held.found * CHUNK;
        Sequence { request, mix, sender, held, keys, tokens, computed, rope_length, history, scored: 1 }
    }

    /// Returns the key of a chunk that was computed just now, if it may be shared.
    fn computed_chunk(&self, positions: &Range<usize>) -> Option<Key> {
        let whole = positions.len() == CHUNK && positions.end.is_multiple_of(CHUNK);
        self.keys.get(positions.start / CHUNK).filter(|_| whole).copied()
    }

    fn generated(&self) -> usize {
        self.tokens.len() - self.request.prompt.len()
    }

    /// Returns whether its next row is the one that draws the next token, after a row that drew the one before.
    fn decodes(&self) -> bool {
        self.generated() > 0 && self.tokens.len() - self.computed == 1
    }

    /// Returns the positions of the next chunk.
    fn chunk(&self) -> Range<usize> {
        self.computed..self.tokens.len().min((self.computed / CHUNK + 1) * CHUNK)
    }

    fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.request.prompt.len(),
            cached_tokens: self.held.found * CHUNK,
            generated_tokens: self.generated(),
        }
    }

    /// Tells the log-probabilities of the prompt's tokens that these rows predict.
    fn score_prompt(&mut self, positions: &Range<usize>, logits: &[&[f32]]) {
        let Some(alternatives) = self.request.prompt_logprobs else { return };
        let mut list = Vec::new();
        // The logits are those of the last rows: all of them while the prompt is scored.
        for (position, logits) in (positions.end - logits.len()..positions.end).zip(logits) {
            let next = position + 1;
            if next == self.scored && next < self.request.prompt.len() {
                list.push(sampling::scored(logits, self.tokens[next], alternatives));
                self.scored += 1;
            }
        }
        if !list.is_empty() {
            self.sender.send(Event::Prompt(list));
        }
    }

    /// Returns tokens that must not come now.
    fn forbidden(&self) -> &[u32] {
        if self.generated() < self.request.min_tokens { &self.request.stop_tokens } else { &[] }
    }

    /// Returns whether a turn needs only a token of its logits, and changes no logit.
    fn takes_token(&self) -> bool {
        let Request { sampling, logprobs, prompt_logprobs, .. } = &self.request;
        let scores = prompt_logprobs.is_some() && self.scored < self.request.prompt.len();
        sampling::is_plain(sampling) && logprobs.is_none() && !scores && self.forbidden().is_empty()
    }

    /// Returns the parameters by which a device draws the next token.
    #[cfg(feature = "cuda")]
    fn drawing(&self) -> Draw {
        let request::Sampling { temperature, top_k, top_p, min_p, seed, .. } = self.request.sampling;
        if temperature <= 0.0 {
            return Draw::GREEDY;
        }
        Draw {
            temperature: f64::from(temperature),
            top_k,
            top_p: f64::from(top_p),
            min_p: f64::from(min_p),
            uniform: sampling::uniform(seed, self.generated()),
        }
    }

    /// Draws the next token. The end, if this was the last.
    fn draw(&mut self, logits: &[f32]) -> std::result::Result<Option<Finish>, Fault> {
        let (sampling, generated, forbidden) = (&self.request.sampling, self.generated(), self.forbidden());
        let chosen = match sampling::is_plain(sampling) && forbidden.is_empty() {
            true => sampling::choose(logits, sampling, generated),
            false => {
                let mut changed = logits.to_vec();
                sampling::adjust(&mut changed, sampling, &self.history, forbidden);
                sampling::choose(&changed, sampling, generated)
            }
        };
        let scored = match (self.request.logprobs, chosen) {
            (Some(alternatives), Some(token)) => Some(sampling::scored(logits, token, alternatives)),
            (_, chosen) => chosen.map(|token| Scored { token, ..Scored::default() }),
        };
        self.push(scored)
    }

    /// Takes the token that the device has chosen, as `draw`.
    fn take(&mut self, token: Option<u32>) -> std::result::Result<Option<Finish>, Fault> {
        self.push(token.map(|token| Scored { token, ..Scored::default() }))
    }

    fn push(&mut self, scored: Option<Scored>) -> std::result::Result<Option<Finish>, Fault> {
        let scored = scored.ok_or_else(|| {
            Fault::model(
                "no token can be drawn: the model's logits are not numbers, or all tokens are forbidden",
            )
        })?;
        let token = scored.token;
        self.tokens.push(token);
        self.history.push(token);
        self.sender.send(Event::Token(scored));
        Ok(if self.request.stop_tokens.contains(&token) {
            Some(Finish::Stop)
        } else {
            (self.generated() >= self.request.max_tokens).then_some(Finish::Length)
        })
    }
}

impl Worker {
    fn run(mut self) {
        let ended = catch_unwind(AssertUnwindSafe(|| self.serve()));
        let fault = match ended {
            Ok(Ok(())) => Fault::internal("the engine was ended"),
            Ok(Err(fault)) => fault,
            Err(_) => Fault::internal("the engine's thread panicked"),
        };
        for sequence in self.running.drain(..) {
            sequence.sender.send(Event::Failed(fault.clone()));
        }
        self.shared.fail(fault);
    }

    /// Runs steps until the engine ends.
    fn serve(&mut self) -> Result<()> {
        while self.admit() {
            if !self.running.is_empty() {
                self.step()?;
            }
        }
        Ok(())
    }

    /// Lets sequences leave that nobody reads, and others join while there is room; waits if there is nothing to
    /// do. False at the end.
    fn admit(&mut self) -> bool {
        let shared = self.shared.clone();
        let mut state = shared.lock();
        loop {
            let gone =
                self.running.extract_if(.., |sequence| sequence.sender.cancelled()).collect::<Vec<_>>();
            let waiting = state.waiting.len();
            state.waiting.retain(|waiting| !waiting.sender.cancelled());
            state.counters.cancelled += (gone.len() + waiting - state.waiting.len()) as u64;
            gone.into_iter().for_each(|sequence| self.cache.release(sequence.held));
            while self.running.len() < self.sequences
                && let Some(next) = state.waiting.front()
                && let Some(held) =
                    self.cache.reserve(next.request.prompt.len() + next.request.max_tokens, &next.keys)
            {
                let waiting = state.waiting.pop_front().expect("it is in front");
                waiting.sender.set_cached(held.found * CHUNK);
                waiting.sender.send(Event::Started);
                state.counters.prefix_queries += waiting.request.prompt.len() as u64;
                state.counters.prefix_hits += (held.found * CHUNK) as u64;
                self.running.push(Sequence::new(waiting, held));
            }
            state.counters.running = self.running.len();
            state.counters.waiting = state.waiting.len();
            state.counters.cache_usage = self.cache.usage();
            if state.ending || !self.running.is_empty() {
                return !state.ending;
            }
            state = shared.woken.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn step(&mut self) -> Result<()> {
        let (step, turns) = self.plan();
        let parts = self.parts(&step, &turns);
        #[cfg(feature = "cuda")]
        let draws = if self.decoder.device.is_cuda() { self.draws(&turns, step.wanted.len()) } else { None };
        let (decoder, cache) = (&*self.decoder, &mut self.cache);
        let parts = parts.iter().map(|(added, rows)| Part {
            adapter: &added.pairs,
            rows: rows.clone(),
            strength: added.strength,
        });
        let mixture = Mixture::new(parts.collect());
        #[cfg(feature = "cuda")]
        if let Some(decoded) = decoder.decode(&step, cache, &mixture, draws.as_deref(), self.sequences)? {
            drop(mixture);
            self.warn_of_refusal();
            let logits = self.bring(&turns, &decoded.logits, Some(decoded.tokens))?;
            return self.answer(&turns, logits);
        }
        let mut compute = || decoder.step(&step, cache, Lora::Mixed(&mixture));
        // On a thread of the pool, small operations are plain calls. From outside, each of them would wait for a
        // thread of the pool to wake.
        let logits = match decoder.device.is_cpu() {
            true => rayon::scope(|_| compute()),
            false => compute(),
        }?;
        let logits = self.bring(&turns, &logits, None)?;
        self.answer(&turns, logits)
    }

    /// Warns once that steps are not recorded, with the reason.
    #[cfg(feature = "cuda")]
    fn warn_of_refusal(&mut self) {
        let refusal = self.cache.replay().and_then(Replay::refusal);
        if let (Some(refusal), Some(report)) = (refusal, self.report.take_if(|_| refusal.is_some())) {
            let told = "The driver refused to record a step as a CUDA graph, so hone launches its kernels one by one";
            report.warn(Stage::Load, format!("{told}, which is slower: {refusal}"));
        }
    }

    /// Returns the rows of the next step: one of every sequence that generates, and chunks of prompts.
    fn plan(&mut self) -> (Step, Vec<Turn>) {
        let (mut step, mut turns) = (Step::default(), Vec::new());
        let mut chosen = self.chosen();
        chosen.sort_by_key(|(_, positions)| positions.len() > SHORT_ROWS);
        for (number, positions) in chosen {
            let sequence = &self.running[number];
            let length = sequence.tokens.len();
            let ids = &sequence.tokens[positions.clone()];
            let from = step.push(ids, positions.start, sequence.held.pages.clone(), sequence.rope_length);
            let scores =
                sequence.request.prompt_logprobs.is_some() && sequence.scored < sequence.request.prompt.len();
            let draws = positions.end == length && sequence.generated() < sequence.request.max_tokens;
            let first = if scores { 0 } else { positions.len() - usize::from(draws) };
            let wanted = (from + first) as u32..(from + positions.len()) as u32;
            let logits = step.wanted.len()..step.wanted.len() + wanted.len();
            step.wanted.extend(wanted);
            turns.push(Turn { sequence: number, positions, logits, draws });
        }
        (step, turns)
    }

    /// Returns the sequences that have rows in the next step, with the positions of these.
    fn chosen(&mut self) -> Vec<(usize, Range<usize>)> {
        let (mut chosen, mut prompts) = (Vec::new(), 0);
        for (number, sequence) in self.running.iter_mut().enumerate() {
            let length = sequence.tokens.len();
            if sequence.computed > 0
                && self.switch.is_some_and(|at| sequence.rope_length <= at && at < length)
            {
                (sequence.computed, sequence.rope_length) = (0, length);
            }
            let decodes = sequence.decodes();
            if decodes {
                sequence.rope_length = length;
            } else if prompts >= CHUNK {
                continue;
            }
            let positions = sequence.chunk();
            prompts += if decodes { 0 } else { positions.len() };
            chosen.push((number, positions));
        }
        chosen
    }

    /// Returns adapters with the rows they are for, in the order of their numbers; neighbouring rows of one strength
    /// together.
    fn parts(&self, step: &Step, turns: &[Turn]) -> Vec<(Added, Range<usize>)> {
        let mut parts: Vec<(Added, Range<usize>)> = Vec::new();
        for (turn, segment) in turns.iter().zip(&step.segments) {
            let mix = self.running[turn.sequence].mix.iter();
            parts.extend(mix.map(|added| (added.clone(), segment.rows.clone())));
        }
        parts.sort_by_key(|(added, rows)| (added.number, rows.start));
        parts.dedup_by(|(next, rows), (added, before)| {
            let joins =
                next.number == added.number && next.strength == added.strength && before.end == rows.start;
            if joins {
                before.end = rows.end;
            }
            joins
        });
        parts
    }

    /// Returns the values of logits that the turns need, on the host. A GPU draws the token of a row if the token is
    /// all that is asked. `drawn`: the tokens that it has drawn already.
    fn bring(&self, turns: &[Turn], logits: &Tensor, drawn: Option<Vec<Option<u32>>>) -> Result<Logits> {
        let (rows, vocabulary) = logits.dims2()?;
        let whole = |turn: &&Turn| logits.device().is_cpu() || !self.running[turn.sequence].takes_token();
        let wanted = turns.iter().filter(whole).flat_map(|turn| turn.logits.clone());
        let wanted: Vec<u32> = wanted.map(|row| row as u32).collect();
        #[cfg(feature = "cuda")]
        if wanted.len() < rows {
            let tokens = match drawn {
                Some(drawn) => drawn,
                None => self.drawn(turns, logits)?,
            };
            let values = match wanted.is_empty() {
                true => Vec::new(),
                false => rows::gather(logits, &wanted)?.flatten_all()?.to_vec1::<f32>()?,
            };
            return Ok(Logits { wanted, values, vocabulary, tokens });
        }
        #[cfg(not(feature = "cuda"))]
        let _ = drawn;
        assert_eq!(wanted.len(), rows, "every row of logits is some turn's");
        let values = logits.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        Ok(Logits { wanted, values, vocabulary, tokens: Vec::new() })
    }

    /// Returns the tokens that a GPU draws, one for each row of logits. Those of other rows have no meaning.
    #[cfg(feature = "cuda")]
    fn drawn(&self, turns: &[Turn], logits: &Tensor) -> Result<Vec<Option<u32>>> {
        Ok(match self.draws(turns, logits.dim(0)?) {
            None => largest::tokens(logits)?,
            Some(draws) => draw::tokens(logits, &draws)?,
        })
    }

    /// Returns the parameters of the draw for each of `rows` rows of logits. `None`: every row's token is the most
    /// probable one.
    #[cfg(feature = "cuda")]
    fn draws(&self, turns: &[Turn], rows: usize) -> Option<Vec<Draw>> {
        let mut draws = vec![Draw::GREEDY; rows];
        for turn in turns.iter().filter(|turn| turn.draws) {
            let sequence = &self.running[turn.sequence];
            if sequence.takes_token() {
                draws[turn.logits.end - 1] = sequence.drawing();
            }
        }
        Some(draws).filter(|draws| draws.iter().any(|draw| *draw != Draw::GREEDY))
    }

    fn answer(&mut self, turns: &[Turn], logits: Logits) -> Result<()> {
        let mut ended = Vec::new();
        let mut counted = (0, 0);
        for turn in turns {
            let sequence = &mut self.running[turn.sequence];
            let rows = logits.rows(&turn.logits);
            sequence.computed = turn.positions.end;
            if let Some(key) = sequence.computed_chunk(&turn.positions) {
                self.cache.share(&mut sequence.held, key);
            }
            sequence.score_prompt(&turn.positions, &rows);
            if sequence.generated() == 0 {
                counted.0 += turn.positions.len() as u64;
            }
            let end = match turn.draws {
                true => {
                    counted.1 += 1;
                    match rows.last() {
                        Some(row) => sequence.draw(row),
                        None => sequence.take(logits.tokens[turn.logits.end - 1]),
                    }
                }
                _ if sequence.request.max_tokens == 0 && sequence.computed == sequence.tokens.len() => {
                    Ok(Some(Finish::Length))
                }
                _ => Ok(None),
            };
            match end {
                Ok(None) => {}
                Ok(Some(finish)) => ended.push((turn.sequence, Event::Finished(finish, sequence.usage()))),
                Err(fault) => ended.push((turn.sequence, Event::Failed(fault))),
            }
        }
        let mut events = Vec::new();
        ended.sort_by_key(|(number, _)| std::cmp::Reverse(*number));
        for (number, event) in ended {
            let sequence = self.running.remove(number);
            self.cache.release(sequence.held);
            events.push((sequence.sender, event));
        }
        // The counters are updated first, so that a caller who has read the end sees them.
        let mut state = self.shared.lock();
        state.counters.prompt_tokens += counted.0;
        state.counters.generated_tokens += counted.1;
        state.counters.running = self.running.len();
        state.counters.cache_usage = self.cache.usage();
        drop(state);
        for (sender, event) in events {
            sender.send(event);
        }
        Ok(())
    }
}
