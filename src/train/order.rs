//! The examples of each optimizer step: epochs, order, micro-batches. Also how a step's examples are packed.

use std::cell::RefCell;
use std::rc::Rc;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::dataset::{Example, Examples};
use crate::model::batch::Batch;
use crate::ops::dropout::mix;
use crate::ranks::Place;

use super::deal::{self, Cost};
use super::options::{Every, Options};

/// The steps of a whole run, counted as transformers' Trainer counts them.
#[derive(Clone, Debug, PartialEq)]
pub struct Steps {
    examples: usize,
    batch: usize,
    accumulation: usize,
    order_seed: Option<u64>,
    /// Steps per epoch.
    pub per_epoch: u64,
    /// Steps of the run.
    pub total: u64,
    last_order: LastOrder,
}

/// The order of the last requested epoch: shuffling millions of examples takes longer than a step.
#[derive(Clone, Debug, Default)]
struct LastOrder(RefCell<Option<Epoch>>);

/// An epoch by its seed and number, and its order.
#[derive(Clone, Debug)]
struct Epoch {
    seed: Option<u64>,
    number: u64,
    order: Rc<[u32]>,
}

/// The memory of earlier orders changes no result.
impl PartialEq for LastOrder {
    fn eq(&self, _: &LastOrder) -> bool {
        true
    }
}

impl Steps {
    /// Counts the steps of a run over so many examples.
    pub fn new(examples: usize, options: &Options) -> Steps {
        let micro_batches = examples.div_ceil(options.batch_examples);
        let per_epoch = micro_batches.div_ceil(options.accumulation).max(1) as u64;
        let total = options.steps_max.unwrap_or_else(|| (options.epochs * per_epoch as f64).ceil() as u64);
        Steps {
            examples,
            batch: options.batch_examples,
            accumulation: options.accumulation,
            order_seed: options.order_seed,
            per_epoch,
            total,
            last_order: LastOrder::default(),
        }
    }

    /// Returns the epoch (from 0) of a step (from 0).
    pub fn epoch(&self, step: u64) -> u64 {
        step / self.per_epoch
    }

    /// Returns the epochs done after so many steps. The last step of an epoch may have fewer micro-batches; Trainer
    /// counts them.
    pub fn epochs_done(&self, steps: u64) -> f64 {
        let micro_batches = self.examples.div_ceil(self.batch).max(1) as u64;
        let within = (steps % self.per_epoch).saturating_mul(self.accumulation as u64).min(micro_batches);
        (steps / self.per_epoch) as f64 + within as f64 / micro_batches as f64
    }

    /// Returns the examples of a step by micro-batch. The last step of an epoch may have fewer.
    pub fn micro_batches(&self, step: u64) -> Vec<Vec<usize>> {
        let order = self.order(self.epoch(step));
        let size = self.batch.saturating_mul(self.accumulation);
        let from = ((step % self.per_epoch) as usize).saturating_mul(size).min(order.len());
        order[from..from.saturating_add(size).min(order.len())]
            .chunks(self.batch)
            .map(|chunk| chunk.iter().map(|&example| example as usize).collect())
            .collect()
    }

    /// Returns whether something that happens `every` so often happens after `done` steps. The clock is the trainer's.
    pub fn due(&self, every: Every, done: u64) -> bool {
        match every {
            Every::Never | Every::Best | Every::Minutes(_) => false,
            Every::Steps(every) => done.is_multiple_of(every.max(1)),
            Every::Share(share) => done.is_multiple_of(((self.total as f64 * share).ceil() as u64).max(1)),
            Every::Epoch => done.is_multiple_of(self.per_epoch) || done == self.total,
        }
    }

    fn order(&self, epoch: u64) -> Rc<[u32]> {
        let mut last = self.last_order.0.borrow_mut();
        if let Some(last) = last.as_ref().filter(|last| (last.seed, last.number) == (self.order_seed, epoch))
        {
            return last.order.clone();
        }
        let count = u32::try_from(self.examples).expect("a dataset has fewer rows");
        let mut order: Vec<u32> = (0..count).collect();
        if let Some(seed) = self.order_seed {
            shuffle(&mut order, mix(seed ^ mix(epoch)));
        }
        let order: Rc<[u32]> = order.into();
        *last = Some(Epoch { seed: self.order_seed, number: epoch, order: order.clone() });
        order
    }
}

/// Shuffles by Fisher and Yates with an unbiased draw.
fn shuffle(order: &mut [u32], seed: u64) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    for i in (1..order.len()).rev() {
        let bound = i as u64 + 1;
        let draw = std::iter::repeat_with(|| random.next_u64())
            .find(|draw| *draw < u64::MAX - u64::MAX % bound)
            .expect("an endless supply");
        order.swap(i, (draw % bound) as usize);
    }
}

/// Returns (example, rope length) of each example. All examples of a micro-batch have the length of the longest, as in
/// a padded batch.
fn grouped<'a>(
    examples: Examples<'a>,
    micro_batches: &'a [Vec<usize>],
) -> impl Iterator<Item = (usize, usize)> + 'a {
    micro_batches.iter().flat_map(move |group| {
        let longest = group.iter().map(|&i| examples.tokens(i)).max().unwrap_or(0);
        group.iter().map(move |&i| (i, longest))
    })
}

/// The number of tokens of a pass.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// Most tokens of a packed pass; `None`: a pass is a micro-batch.
    pub packing: Option<usize>,
    /// Most tokens that a pass has for its memory's sake, unless one example has more.
    pub max: usize,
}

/// One rank's part of a step.
pub struct Share {
    /// The passes of this rank; a rank may have none.
    pub batches: Vec<Batch>,
    /// Supervised tokens of the whole step.
    pub targets: usize,
    /// Tokens of the whole step.
    pub tokens: usize,
}

/// Deals a step's examples to the ranks, and lays those of one rank into passes. One rank alone gets `batches`. Without
/// packing, a pass has as many examples as a micro-batch at most.
pub fn share<'a>(
    examples: impl Into<Examples<'a>>,
    micro_batches: &[Vec<usize>],
    rows: Rows,
    place: Place,
    cost: &Cost,
    key: impl Fn(usize) -> u64,
) -> Share {
    let examples = examples.into();
    let entries: Vec<(usize, usize)> = grouped(examples, micro_batches).collect();
    let tokens = entries.iter().map(|&(i, _)| examples.tokens(i)).sum();
    let costs: Vec<u64> = entries.iter().map(|&(i, _)| cost.of_example(examples.tokens(i))).collect();
    let dealt = deal::deal(&costs, place.world);
    let own: Vec<(usize, usize)> = dealt[place.rank].iter().map(|&at| entries[at]).collect();
    let size = micro_batches.first().map_or(1, Vec::len).max(1);
    let groups = own.chunks(size).map(<[_]>::to_vec).collect();
    let batches = laid(examples, groups, rows.packing, rows.max, key);
    let others = dealt.iter().enumerate().filter(|(rank, _)| *rank != place.rank).flat_map(|(_, list)| list);
    let others: usize = others.map(|&at| targets(&examples.get(entries[at].0))).sum();
    let targets = others + batches.iter().map(|batch| batch.targets.len()).sum::<usize>();
    Share { batches, targets, tokens }
}

/// Returns the number of supervised tokens of an example; nothing predicts the first.
fn targets(example: &Example) -> usize {
    example.supervised.iter().skip(1).filter(|supervised| **supervised).count()
}

/// Lays a step's examples into batches. Without packing, a batch is a micro-batch. With packing, the examples of the
/// whole step fill batches of up to `packing` rows, the longest first, each in the batch with the least remaining
/// space. More than `rows_max` rows are divided, but never within an example. The step's examples, their rope lengths
/// and their dropout keys stay the same, and so does the result.
pub fn batches<'a>(
    examples: impl Into<Examples<'a>>,
    micro_batches: &[Vec<usize>],
    packing: Option<usize>,
    rows_max: usize,
    key: impl Fn(usize) -> u64,
) -> Vec<Batch> {
    let examples = examples.into();
    let groups = micro_batches.chunks(1).map(|group| grouped(examples, group).collect()).collect();
    laid(examples, groups, packing, rows_max, key)
}

/// Lays groups of (example, rope length) into batches.
fn laid(
    examples: Examples,
    groups: Vec<Vec<(usize, usize)>>,
    packing: Option<usize>,
    rows_max: usize,
    key: impl Fn(usize) -> u64,
) -> Vec<Batch> {
    let fill = |list: &Vec<(usize, usize)>| {
        let mut batch = Batch::default();
        for &(i, length) in list {
            let example = examples.get(i);
            batch.push(&example.ids, &example.supervised, length, key(i));
        }
        batch
    };
    let lists: Vec<Vec<(usize, usize)>> = match packing {
        None => groups.into_iter().flat_map(|group| divided(examples, group, rows_max)).collect(),
        Some(packing) => best_fit(examples, groups.concat(), packing.min(rows_max)),
    };
    lists.iter().map(fill).collect()
}

/// Divides the entries in order. A new list begins if the next example would exceed `rows_max`.
fn divided(examples: Examples, entries: Vec<(usize, usize)>, rows_max: usize) -> Vec<Vec<(usize, usize)>> {
    let mut lists: Vec<Vec<(usize, usize)>> = Vec::new();
    let mut rows = 0;
    for entry in entries {
        let tokens = examples.tokens(entry.0);
        match lists.last_mut().filter(|_| rows + tokens <= rows_max) {
            Some(list) => list.push(entry),
            None => {
                lists.push(vec![entry]);
                rows = 0;
            }
        }
        rows += tokens;
    }
    lists
}

/// Packs by best fit, decreasing: each example goes to the batch in which it leaves the least space.
fn best_fit(
    examples: Examples,
    mut entries: Vec<(usize, usize)>,
    tokens_max: usize,
) -> Vec<Vec<(usize, usize)>> {
    let length = |&(i, _): &(usize, usize)| examples.tokens(i);
    entries.sort_by_key(|entry| std::cmp::Reverse(length(entry)));
    let mut bins: Vec<(usize, Vec<(usize, usize)>)> = Vec::new();
    for entry in entries {
        let tokens = length(&entry);
        let fitting = bins.iter_mut().filter(|(used, _)| used + tokens <= tokens_max);
        match fitting.max_by_key(|(used, _)| *used) {
            Some((used, list)) => {
                *used += tokens;
                list.push(entry);
            }
            None => bins.push((tokens, vec![entry])),
        }
    }
    bins.into_iter().map(|(_, list)| list).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(batch: usize, accumulation: usize) -> Options {
        Options { batch_examples: batch, accumulation, order_seed: None, ..Options::default() }
    }

    fn example(tokens: usize) -> Example {
        Example { ids: vec![7; tokens], supervised: vec![true; tokens] }
    }

    #[test]
    fn an_epoch_takes_every_example_once_and_the_last_step_what_is_left() {
        let steps = Steps::new(10, &Options { epochs: 1.5, ..options(2, 2) });
        assert_eq!((steps.per_epoch, steps.total), (3, 5));
        assert_eq!(steps.micro_batches(0), [[0, 1], [2, 3]]);
        assert_eq!(steps.micro_batches(2), [[8, 9]]);
        assert_eq!(steps.micro_batches(3), steps.micro_batches(0));
        let epochs: Vec<f64> = (0..=3).map(|done| steps.epochs_done(done)).collect();
        assert_eq!(epochs, [0.0, 0.4, 0.8, 1.0], "by micro-batches, as Trainer counts");
        let shuffled = Steps { order_seed: Some(1), ..steps };
        let mut seen: Vec<usize> = (0..3).flat_map(|step| shuffled.micro_batches(step).concat()).collect();
        assert_ne!(seen, (0..10).collect::<Vec<_>>());
        assert_ne!(shuffled.micro_batches(0), shuffled.micro_batches(3), "each epoch has its own order");
        seen.sort();
        assert_eq!(seen, (0..10).collect::<Vec<_>>());
    }

    #[test]
    fn packing_keeps_a_steps_examples_and_their_rope_lengths() {
        let examples: Vec<Example> = [5, 3, 4, 2].map(example).to_vec();
        let micro = vec![vec![0, 1], vec![2, 3]];
        let limited = |packing, rows_max| -> Vec<Vec<(usize, usize)>> {
            let spans = |batch: &Batch| {
                batch.examples.iter().map(|span| (span.rows.len(), span.rope_length)).collect()
            };
            batches(&examples, &micro, packing, rows_max, |i| i as u64).iter().map(spans).collect()
        };
        let shape = |packing| limited(packing, usize::MAX);
        assert_eq!(shape(None), [[(5, 5), (3, 5)], [(4, 4), (2, 4)]]);
        assert_eq!(limited(None, 7), [vec![(5, 5)], vec![(3, 5)], vec![(4, 4), (2, 4)]]);
        assert_eq!(limited(None, 1).len(), 4, "an example is never divided");
        assert_eq!(limited(Some(100), 9), shape(Some(9)));
        assert_eq!(shape(Some(8)), [[(5, 5), (3, 5)], [(4, 4), (2, 4)]]);
        assert_eq!(shape(Some(9)), [vec![(5, 5), (4, 4)], vec![(3, 5), (2, 4)]]);
        assert_eq!(shape(Some(100)).len(), 1);
    }
}
