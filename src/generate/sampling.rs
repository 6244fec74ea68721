//! Logits of one position -> a token: penalties, bias, filters and the draw, in the order of transformers' `generate`.
//!
//! The order is: repetition penalty, presence and frequency penalties, bias, minimum length; then, unless it is greedy,
//! temperature, top_k, top_p, min_p. Every filter keeps at least one token, and equal logits are kept or dropped
//! together. So a filter is one number: the smallest logit that stays.

use std::collections::{BTreeMap, BTreeSet};

use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::request::{Sampling, Scored};

/// The input of penalties: which tokens the prompt has, and how often each was generated.
#[derive(Clone, Debug, Default)]
pub struct History {
    prompt: BTreeSet<u32>,
    generated: BTreeMap<u32, u32>,
    count: usize,
}

impl History {
    /// Returns the history at the end of a prompt: nothing is generated yet.
    pub fn new(prompt: &[u32]) -> History {
        History { prompt: prompt.iter().copied().collect(), ..History::default() }
    }

    /// Adds a generated token.
    pub fn push(&mut self, token: u32) {
        *self.generated.entry(token).or_default() += 1;
        self.count += 1;
    }

    /// Returns the number of tokens generated so far: the number of the next draw.
    pub fn generated(&self) -> usize {
        self.count
    }
}

/// Returns whether the logits stay as they are, so that the most probable token needs no look at the history.
pub fn is_plain(sampling: &Sampling) -> bool {
    sampling.repetition_penalty == 1.0
        && sampling.presence_penalty == 0.0
        && sampling.frequency_penalty == 0.0
        && sampling.bias.is_empty()
}

/// Applies penalties and bias; `forbidden` are tokens that must not come now, such as the ends before the minimum
/// length.
pub fn adjust(logits: &mut [f32], sampling: &Sampling, history: &History, forbidden: &[u32]) {
    let penalty = sampling.repetition_penalty;
    if penalty != 1.0 {
        let generated = history.generated.keys().filter(|token| !history.prompt.contains(token));
        for &token in history.prompt.iter().chain(generated) {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
            }
        }
    }
    if sampling.presence_penalty != 0.0 || sampling.frequency_penalty != 0.0 {
        for (&token, &times) in &history.generated {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit -= sampling.presence_penalty + sampling.frequency_penalty * times as f32;
            }
        }
    }
    for &(token, bias) in &sampling.bias {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit += bias;
        }
    }
    for &token in forbidden {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// Returns the token, drawn with number `number` of the sequence's seed. `None` if no logit is a number that could be
/// drawn.
pub fn choose(logits: &[f32], sampling: &Sampling, number: usize) -> Option<u32> {
    if sampling.temperature <= 0.0 {
        return greedy(logits);
    }
    let kept = Kept::new(logits, sampling)?;
    kept.draw(uniform(sampling.seed, number))
}

/// Returns the highest logit's token; of equal ones the lowest id.
pub fn greedy(logits: &[f32]) -> Option<u32> {
    let mut best: Option<(usize, f32)> = None;
    for (id, &logit) in logits.iter().enumerate() {
        if logit.is_finite() && best.is_none_or(|(_, highest)| logit > highest) {
            best = Some((id, logit));
        }
    }
    best.map(|(id, _)| id as u32)
}

/// Returns a number in [0, 1) that depends on seed and number alone.
pub fn uniform(seed: u64, number: usize) -> f64 {
    let mut random = ChaCha12Rng::seed_from_u64(seed);
    random.set_stream(number as u64);
    (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// The tokens that may be drawn, in the order of their ids, with weights relative to the most probable.
struct Kept {
    tokens: Vec<(u32, f64)>,
    sum: f64,
}

impl Kept {
    fn new(logits: &[f32], sampling: &Sampling) -> Option<Kept> {
        let highest = logits[greedy(logits)? as usize];
        let rate = 1.0 / f64::from(sampling.temperature);
        let weight = |logit: f32| ((f64::from(logit) - f64::from(highest)) * rate).exp();
        let mut smallest = f32::MIN;
        if sampling.top_k > 0 {
            smallest = smallest.max(nth_highest(logits, sampling.top_k));
        }
        if sampling.top_p < 1.0 {
            smallest = smallest.max(nucleus(logits, smallest, f64::from(sampling.top_p), weight));
        }
        let share = f64::from(sampling.min_p);
        let stays = |logit: f32| logit.is_finite() && logit >= smallest && weight(logit) >= share;
        let tokens: Vec<(u32, f64)> = (0..)
            .zip(logits)
            .filter(|(_, logit)| stays(**logit))
            .map(|(token, logit)| (token, weight(*logit)))
            .collect();
        let sum = tokens.iter().map(|(_, weight)| weight).sum();
        Some(Kept { tokens, sum })
    }

    fn draw(&self, uniform: f64) -> Option<u32> {
        let mut left = uniform * self.sum;
        for &(token, weight) in &self.tokens {
            if left < weight {
                return Some(token);
            }
            left -= weight;
        }
        // Rounding took the last bit.
        self.tokens.iter().rev().find(|(_, weight)| *weight > 0.0).map(|(token, _)| *token)
    }
}

fn nth_highest(logits: &[f32], n: usize) -> f32 {
    let mut finite: Vec<f32> = logits.iter().copied().filter(|logit| logit.is_finite()).collect();
    if n >= finite.len() {
        return f32::MIN;
    }
    *finite.select_nth_unstable_by(n - 1, |a, b| b.total_cmp(a)).1
}

/// Returns the logit of the token that crosses `share` when tokens are taken from the most probable on.
fn nucleus(logits: &[f32], smallest: f32, share: f64, weight: impl Fn(f32) -> f64) -> f32 {
    let in_reach = |logit: &f32| logit.is_finite() && *logit >= smallest;
    let total: f64 = logits.iter().filter(|logit| in_reach(logit)).map(|&logit| weight(logit)).sum();
    // Few tokens have most of the probability: sorting those is nearly always enough.
    let mut least = 1e-3;
    loop {
        let mut likely: Vec<f32> =
            logits.iter().copied().filter(|logit| in_reach(logit) && weight(*logit) >= least).collect();
        likely.sort_unstable_by(|a, b| b.total_cmp(a));
        let mut sum = 0.0;
        for logit in &likely {
            sum += weight(*logit);
            if sum >= share * total {
                return *logit;
            }
        }
        match least > 0.0 {
            true => least = if least > 1e-9 { least * 1e-3 } else { 0.0 },
            false => return likely.last().copied().unwrap_or(f32::MIN),
        }
    }
}

/// Returns a token with its log-probability by these logits, and the `alternatives` most probable ones.
pub fn scored(logits: &[f32], token: u32, alternatives: usize) -> Scored {
    let finite = |logit: &&f32| logit.is_finite();
    let highest = logits.iter().filter(finite).copied().fold(f32::MIN, f32::max);
    let sum: f64 = logits.iter().filter(finite).map(|&l| (f64::from(l) - f64::from(highest)).exp()).sum();
    let logprob = |token: u32| {
        let logit = logits.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
        // No JSON number is infinite, so a token that cannot come has the lowest finite number.
        (f64::from(logit) - f64::from(highest) - sum.ln()).max(f64::from(f32::MIN)) as f32
    };
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let higher = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let alternatives = alternatives.min(order.len());
    if alternatives > 0 && alternatives < order.len() {
        order.select_nth_unstable_by(alternatives - 1, higher);
    }
    order.truncate(alternatives);
    order.sort_unstable_by(higher);
    let top = order.into_iter().map(|token| (token, logprob(token))).collect();
    Scored { token, logprob: logprob(token), top }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 8] = [1.0, 3.0, -0.5, 2.0, 0.0, 1.5, -2.0, 0.5];

    /// Returns the value that a fair sample's chi-square exceeds once in a thousand samples (Wilson and Hilferty).
    fn limit(freedom: f64) -> f64 {
        let spread = 2.0 / (9.0 * freedom);
        freedom * (1.0 - spread + 3.09 * spread.sqrt()).powi(3)
    }

    /// Compares 100,000 draws with the probabilities.
    fn check(sampling: &Sampling, expected: [f64; 8]) {
        const DRAWS: usize = 100_000;
        let mut found = [0.0; 8];
        for number in 0..DRAWS {
            found[choose(&LOGITS, sampling, number).unwrap() as usize] += 1.0;
        }
        let sum: f64 = expected.iter().sum();
        let mut squares = 0.0;
        for (found, share) in found.iter().zip(expected) {
            let wanted = share / sum * DRAWS as f64;
            match share == 0.0 {
                true => assert_eq!(*found, 0.0, "{sampling:?} drew what is cut off"),
                false => squares += (found - wanted).powi(2) / wanted,
            }
        }
        let freedom = expected.iter().filter(|share| **share > 0.0).count() - 1;
        assert!(squares < limit(freedom.max(1) as f64), "{sampling:?}: {squares} of {found:?}");
    }

    fn exponentials(temperature: f64, kept: &[usize]) -> [f64; 8] {
        let mut shares = [0.0; 8];
        kept.iter().for_each(|&id| shares[id] = (f64::from(LOGITS[id]) / temperature).exp());
        shares
    }

    fn warm() -> Sampling {
        Sampling { temperature: 1.0, seed: 7, ..Sampling::greedy() }
    }

    #[test]
    fn draws_follow_the_formula_of_each_filter() {
        let all = [0, 1, 2, 3, 4, 5, 6, 7];
        check(&warm(), exponentials(1.0, &all));
        check(&Sampling { temperature: 0.7, ..warm() }, exponentials(0.7, &all));
        check(&Sampling { temperature: 2.0, top_k: 3, ..warm() }, exponentials(2.0, &[1, 3, 5]));
        // Probabilities: .50 .18 .11 .07 .04 ...; three of them reach 0.75, the third crosses it.
        check(&Sampling { top_p: 0.75, ..warm() }, exponentials(1.0, &[1, 3, 5]));
        check(&Sampling { top_p: 1e-9, ..warm() }, exponentials(1.0, &[1]));
        check(&Sampling { min_p: 0.2, ..warm() }, exponentials(1.0, &[1, 3, 5]));
        check(&Sampling { top_k: 4, min_p: 0.3, ..warm() }, exponentials(1.0, &[1, 3]));
        // Temperature comes first: at 3 the same share reaches further down.
        check(&Sampling { temperature: 3.0, min_p: 0.5, ..warm() }, exponentials(3.0, &[0, 1, 3, 5]));
    }

    #[test]
    fn a_nucleus_may_hold_nearly_everything() {
        let flat = vec![0.0f32; 5000];
        let sampling = Sampling { top_p: 0.999_999, ..warm() };
        assert_eq!(Kept::new(&flat, &sampling).unwrap().tokens.len(), 5000);
        let steep: Vec<f32> = (0..5000).map(|id| -0.01 * id as f32).collect();
        let kept = Kept::new(&steep, &sampling).unwrap().tokens.len();
        // A geometric series leaves exp(-0.01 n) behind n tokens.
        let left = 1.0 - f64::from(sampling.top_p);
        assert_eq!(kept, (left.ln() / -0.01).ceil() as usize, "the token that crosses it included");
    }

    #[test]
    fn draws_repeat_and_differ_by_seed_and_number() {
        let draws = |seed| -> Vec<u32> {
            let sampling = Sampling { seed, ..warm() };
            (0..64).map(|number| choose(&LOGITS, &sampling, number).unwrap()).collect()
        };
        assert_eq!(draws(1), draws(1));
        assert_ne!(draws(1), draws(2));
    }

    #[test]
    fn greedy_takes_the_lowest_id_of_equals_and_no_number_that_is_none() {
        assert_eq!(greedy(&[1.0, 2.0, 2.0]), Some(1));
        assert_eq!(greedy(&[f32::NAN, -1.0, f32::INFINITY]), Some(1));
        assert_eq!(choose(&[f32::NAN, f32::NEG_INFINITY], &warm(), 0), None);
        let cold = Sampling { temperature: 1e-9, ..warm() };
        assert_eq!(choose(&LOGITS, &cold, 3), Some(1));
    }

    #[test]
    fn penalties_and_bias_change_what_they_should() {
        let mut history = History::new(&[0, 2]);
        [2, 5, 5].into_iter().for_each(|token| history.push(token));
        let sampling = Sampling {
            repetition_penalty: 2.0,
            presence_penalty: 0.25,
            frequency_penalty: 0.5,
            bias: vec![(6, 10.0), (99, 1.0)],
            ..warm()
        };
        let mut logits = LOGITS;
        adjust(&mut logits, &sampling, &history, &[1]);
        // 0: halved. 2: doubled once though in both, less 0.75. 5: halved, less 1.25. 6: bias.
        assert_eq!(logits, [0.5, f32::NEG_INFINITY, -1.75, 2.0, 0.0, -0.5, 8.0, 0.5]);
        assert_eq!(history.generated(), 3);
        assert!(is_plain(&warm()) && !is_plain(&sampling));
    }

    #[test]
    fn log_probabilities_are_those_of_the_logits() {
        let scored = scored(&[0.0, 2f32.ln(), 0.0], 2, 2);
        let near = |a: f32, b: f64| (f64::from(a) - b).abs() < 1e-6;
        assert!(near(scored.logprob, 0.25f64.ln()), "{scored:?}");
        assert_eq!(scored.top.iter().map(|(token, _)| *token).collect::<Vec<_>>(), [1, 0]);
        assert!(near(scored.top[0].1, 0.5f64.ln()));
        let all = super::scored(&[0.0, 1.0], 0, 9).top.len();
        assert_eq!((all, super::scored(&[0.0, 1.0], 0, 0).top.len()), (2, 0));
    }

    /// Vocabularies of one warp and of several segments, logits that are no numbers, equal ones, and every filter.
    #[cfg(feature = "cuda")]
    #[test]
    fn a_gpu_draws_the_same_tokens() {
        use crate::ops::draw::{self, Draw};
        let Some(device) = crate::ops::judge::gpu() else { return };
        let with = |temperature, top_k, top_p, min_p| Sampling { temperature, top_k, top_p, min_p, ..warm() };
        let samplings = [
            Sampling::greedy(),
            warm(),
            with(0.3, 0, 1.0, 0.0),
            with(1.5, 40, 1.0, 0.0),
            with(1.0, 1, 1.0, 0.0),
            with(0.8, 0, 0.9, 0.0),
            with(1.0, 0, 1e-9, 0.0),
            with(1.0, 0, 0.999_999, 0.0),
            with(2.0, 0, 1.0, 0.05),
            with(1.0, 50, 0.95, 0.01),
            with(1e-9, 0, 1.0, 0.0),
            with(1.0, 1_000_000, 1.0, 1.0),
        ];
        for vocab in [1, 31, 1000, 5003] {
            let mut random = ChaCha12Rng::seed_from_u64(vocab as u64);
            let mut logit = || (random.next_u32() % 4096) as f32 / 256.0 - 8.0;
            let mut rows: Vec<Vec<f32>> =
                samplings.iter().map(|_| (0..vocab).map(|_| logit()).collect()).collect();
            for (at, row) in rows.iter_mut().enumerate() {
                (row[at % vocab], row[5 * at % vocab]) = (f32::NEG_INFINITY, f32::NAN);
                row[7 * at % vocab] = [f32::INFINITY, -0.0, 0.0, 7.9][at % 4];
            }
            rows[3].fill(0.5);
            rows[4].fill(f32::NAN);
            let logits = candle_core::Tensor::new(rows.clone(), &device).unwrap();
            for number in 0..24 {
                let draws = samplings.clone().map(|sampling| Draw {
                    temperature: f64::from(sampling.temperature),
                    top_k: sampling.top_k,
                    top_p: f64::from(sampling.top_p),
                    min_p: f64::from(sampling.min_p),
                    uniform: uniform(sampling.seed, number),
                });
                let host = rows.iter().zip(&samplings).map(|(row, sampling)| choose(row, sampling, number));
                let found = draw::tokens(&logits, &draws).unwrap();
                assert_eq!(found, host.collect::<Vec<_>>(), "{vocab} tokens, draw {number}");
            }
        }
    }
}
