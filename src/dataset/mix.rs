//! Rows of several datasets -> how many of each are read, and how often each is trained on.
//!
//! A limit chooses rows before the split. A weight applies after it, to training rows only: evaluation sees each
//! row once, and no copy of a training row.

use super::{Layout, Options, Record};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// The settings of one entry of `data`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Share {
    /// The layout. `None`: the run's, or detected.
    pub layout: Option<Layout>,
    /// How often a row is trained on per epoch. The fractional part is the share of rows that are trained on once
    /// more. `None`: once.
    pub weight: Option<f64>,
    /// Most rows that are read. They are chosen by the seed if rows are shuffled; if not, the first ones are read.
    pub limit: Option<usize>,
}

/// Keeps `limit` of the records from `from` on, in their order.
pub(super) fn limit(records: &mut Vec<Record>, from: usize, limit: usize, options: &Options) {
    let count = records.len() - from;
    if count <= limit {
        return;
    }
    if options.shuffle {
        let mut order: Vec<usize> = (0..count).collect();
        super::split::shuffle(&mut order, options.seed ^ from as u64);
        order.truncate(limit);
        order.sort_unstable();
        let tail = records.split_off(from);
        let mut wanted = order.into_iter().peekable();
        let kept = tail.into_iter().enumerate().filter(|(place, _)| wanted.next_if_eq(place).is_some());
        records.extend(kept.map(|(_, record)| record));
    }
    records.truncate(from + limit);
}

/// Repeats or leaves out training records by their entries' weights. Without weights their order does not change.
pub(super) fn weigh(records: Vec<Record>, options: &Options) -> Vec<Record> {
    let weight = |record: &Record| options.shares.get(record.entry).and_then(|share| share.weight);
    if !options.shares.iter().any(|share| share.weight.is_some()) {
        return records;
    }
    let mut random = ChaCha8Rng::seed_from_u64(options.seed ^ 0x006d_6978);
    let mut all = Vec::with_capacity(records.len());
    for record in records {
        let weight = weight(&record).unwrap_or(1.0);
        // Every record takes a draw, so that one weight does not change what another leaves out.
        let draw = (random.next_u64() >> 11) as f64 / (1_u64 << 53) as f64;
        let copies = weight.floor() as usize + usize::from(draw < weight.fract());
        all.extend(std::iter::repeat_n(record, copies));
    }
    if options.shuffle {
        super::split::shuffle(&mut all, options.seed.wrapping_add(1));
    }
    all
}
