//! Rows of several datasets -> the rows of each that are read, and the number of times that each row is trained on.
//!
//! A limit chooses rows before the split. A weight applies after it, to training rows only: evaluation sees each
//! row once, and no copy of a training row.

use super::{Layout, Options};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// The settings of one entry of `data`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Share {
    /// The layout. `None`: the run's, or detected.
    pub layout: Option<Layout>,
    /// The number of times that a row is trained on per epoch. The fractional part is the share of rows that are
    /// trained on once more. `None`: once.
    pub weight: Option<f64>,
    /// Most rows that are read, chosen by the seed if rows are shuffled, else the first.
    pub limit: Option<usize>,
    /// The name of the entry in metrics. `None`: made from its address.
    pub name: Option<String>,
}

/// Keeps as many of each entry's items as its limit says, in their order. `entry` returns the entry of an item; the
/// items of one entry follow each other.
pub(super) fn limit<T>(items: Vec<T>, entry: impl Fn(&T) -> usize, options: &Options) -> Vec<T> {
    if options.shares.iter().all(|share| share.limit.is_none()) {
        return items;
    }
    let mut kept: Vec<T> = Vec::new();
    let mut rest = items.into_iter().peekable();
    while let Some(first) = rest.next() {
        let (number, from) = (entry(&first), kept.len());
        kept.push(first);
        while let Some(next) = rest.next_if(|item| entry(item) == number) {
            kept.push(next);
        }
        if let Some(limit) = options.shares.get(number).and_then(|share| share.limit) {
            limit_tail(&mut kept, from, limit, options);
        }
    }
    kept
}

/// Keeps `limit` items from `from` on, in their order.
fn limit_tail<T>(items: &mut Vec<T>, from: usize, limit: usize, options: &Options) {
    let count = items.len() - from;
    if count <= limit {
        return;
    }
    if options.shuffle {
        let mut order: Vec<usize> = (0..count).collect();
        super::split::shuffle(&mut order, options.seed ^ from as u64);
        order.truncate(limit);
        order.sort_unstable();
        let tail = items.split_off(from);
        let mut wanted = order.into_iter().peekable();
        let kept = tail.into_iter().enumerate().filter(|(place, _)| wanted.next_if_eq(place).is_some());
        items.extend(kept.map(|(_, item)| item));
    }
    items.truncate(from + limit);
}

/// Repeats or leaves out items that train, by the weights of their entries. Without weights the items stay as they are.
pub(super) fn weigh<T: Clone>(items: Vec<T>, entry: impl Fn(&T) -> usize, options: &Options) -> Vec<T> {
    let weight = |item: &T| options.shares.get(entry(item)).and_then(|share| share.weight);
    if !options.shares.iter().any(|share| share.weight.is_some()) {
        return items;
    }
    let mut random = ChaCha8Rng::seed_from_u64(options.seed ^ 0x006d_6978);
    let mut all = Vec::with_capacity(items.len());
    for item in items {
        let weight = weight(&item).unwrap_or(1.0);
        // One draw for every item: the weight of one entry does not change what another leaves out.
        let draw = (random.next_u64() >> 11) as f64 / (1_u64 << 53) as f64;
        let copies = weight.floor() as usize + usize::from(draw < weight.fract());
        all.extend(std::iter::repeat_n(item, copies));
    }
    if options.shuffle {
        super::split::shuffle(&mut all, options.seed.wrapping_add(1));
    }
    all
}
