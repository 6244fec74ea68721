//! Records -> shuffled records -> rows to train on and rows to evaluate on.

use super::Options;
use crate::fault::{Fault, Result};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use std::collections::HashMap;

/// Splits the records. `of` returns the entry of a record and its group.
///
/// Entries that are given for evaluation decide if there are any. Otherwise the first floor(share * n) records are
/// trained on and the others evaluate, as `train_test_split` of `datasets` rounds; with a group column, records of one
/// group stay together.
pub(super) fn split<T>(
    mut records: Vec<T>,
    of: impl Fn(&T) -> (usize, Option<u64>),
    options: &Options,
) -> Result<(Vec<T>, Vec<T>)> {
    if let Some(from) = options.evaluation_from {
        return given(records, |record| of(record).0 >= from, options);
    }
    let share = options.train_share;
    if !(share > 0.0 && share <= 1.0) {
        return Err(Fault::config(format!(
            "DatasetConfig.train_test_split: {share} is not a share to train on: expected above 0 and up to 1"
        )));
    }
    if options.shuffle {
        shuffle(&mut records, options.seed);
    }
    let rows = records.len();
    let wanted = train_rows(rows, share);
    let (train, evaluation) = match options.group_column.is_some() && share < 1.0 {
        true => grouped(records, |record| of(record).1, wanted),
        false => {
            let evaluation = records.split_off(wanted);
            (records, evaluation)
        }
    };
    if share < 1.0 && (train.is_empty() || evaluation.is_empty()) {
        return Err(empty_side(share, train.len(), evaluation.len(), options));
    }
    Ok((train, evaluation))
}

/// Returns rows of the entries that are given for evaluation, in their order, and all others, shuffled.
fn given<T>(records: Vec<T>, evaluates: impl Fn(&T) -> bool, options: &Options) -> Result<(Vec<T>, Vec<T>)> {
    let (evaluation, mut train): (Vec<T>, Vec<T>) = records.into_iter().partition(evaluates);
    let empty = |what| Err(Fault::data(format!("the files of `{what}` have 0 rows")));
    match () {
        () if train.is_empty() => return empty("data"),
        () if evaluation.is_empty() => return empty("evaluation_data"),
        () => {}
    }
    if options.shuffle {
        shuffle(&mut train, options.seed);
    }
    Ok((train, evaluation))
}

/// Takes whole groups, in the order of their first records, as long as they fit into `wanted` records to train on. A
/// record without a group is a group of its own. The records keep their order on both sides.
fn grouped<T>(records: Vec<T>, group: impl Fn(&T) -> Option<u64>, wanted: usize) -> (Vec<T>, Vec<T>) {
    let mut sizes: HashMap<u64, usize> = HashMap::new();
    records.iter().filter_map(&group).for_each(|group| *sizes.entry(group).or_default() += 1);
    let (mut sides, mut taken): (HashMap<u64, bool>, usize) = (HashMap::new(), 0);
    let mut fits = |size: usize| {
        let fits = taken + size <= wanted;
        taken += if fits { size } else { 0 };
        fits
    };
    records.into_iter().partition(|record| match group(record) {
        None => fits(1),
        Some(group) => *sides.entry(group).or_insert_with(|| fits(sizes[&group])),
    })
}

fn empty_side(share: f64, train: usize, evaluation: usize, options: &Options) -> Fault {
    let by = match &options.group_column {
        Some(column) => format!(", by whole groups of `{column}`,"),
        None => String::new(),
    };
    let rows = train + evaluation;
    let fault = Fault::config(format!(
        "DatasetConfig.train_test_split: {share} splits {rows} row(s){by} into {train} to train on and {evaluation} to \
         evaluate on"
    ));
    match options.group_column {
        Some(_) => fault.help("use a column with more, smaller groups, or another share, or evaluation_data"),
        None => fault.help("use a share that leaves rows on both sides, or 1 for no evaluation"),
    }
}

fn train_rows(rows: usize, share: f64) -> usize {
    // 0.7 * 10 is 7, but 0.29 * 100 is 28.999999999999996. The exact product is meant in both cases.
    let product = share * rows as f64;
    ((product * (1.0 + 4.0 * f64::EPSILON)).floor() as usize).min(rows)
}

/// Shuffles by Fisher-Yates over ChaCha8. A seed gives the same order on every machine and in every version.
pub(super) fn shuffle<T>(items: &mut [T], seed: u64) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    for last in (1..items.len()).rev() {
        let choice = (u128::from(random.next_u64()) * (last as u128 + 1)) >> 64; // in 0..=last
        items.swap(last, choice as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Context, Conversation, Record};
    use super::*;
    use crate::fault::Kind;

    fn run(rows: u64, shuffle: bool, seed: u64, train_share: f64) -> Result<(Vec<u64>, Vec<u64>)> {
        let options = options(shuffle, seed, train_share);
        let (train, evaluation) = split((0..rows).map(record).collect(), |_: &Record| (0, None), &options)?;
        let rows = |records: Vec<Record>| records.iter().map(|record| record.row).collect();
        Ok((rows(train), rows(evaluation)))
    }

    fn record(row: u64) -> Record {
        Record {
            conversation: Conversation::Text(String::new()),
            context: Context::default(),
            file: "f".into(),
            row,
            entry: 0,
            group: None,
        }
    }

    fn options(shuffle: bool, seed: u64, train_share: f64) -> Options {
        Options { shuffle, seed, train_share, ..Options::RECOGNISED }
    }

    /// Splits numbers. `group` returns the group of a number.
    fn groups(
        rows: u64,
        share: f64,
        seed: u64,
        group: impl Fn(u64) -> Option<u64>,
    ) -> Result<(Vec<u64>, Vec<u64>)> {
        let options = Options { group_column: Some("g".into()), ..options(true, seed, share) };
        split((0..rows).collect(), |&row| (0, group(row)), &options)
    }

    #[test]
    fn a_group_is_on_one_side() {
        for seed in 0..50 {
            let (train, evaluation) = groups(100, 0.8, seed, |row| Some(row % 13)).unwrap();
            assert!(train.iter().all(|a| evaluation.iter().all(|b| a % 13 != b % 13)), "seed {seed}");
            // A group has 7 or 8 rows; the side that trains lacks less than one group to the 80 asked for.
            assert!((73..=80).contains(&train.len()) && train.len() + evaluation.len() == 100);
            let (again, _) = groups(100, 0.8, seed, |row| Some(row % 13)).unwrap();
            assert_eq!(train, again);
        }
    }

    #[test]
    fn groups_of_one_row_split_as_rows_do() {
        for seed in 0..5 {
            let plain = run(41, true, seed, 0.7).unwrap();
            assert_eq!(groups(41, 0.7, seed, Some).unwrap(), plain);
            assert_eq!(groups(41, 0.7, seed, |_| None).unwrap(), plain, "a null is no group");
        }
    }

    #[test]
    fn one_group_cannot_be_split() {
        let fault = groups(10, 0.5, 1, |_| Some(7)).unwrap_err();
        assert_eq!(fault.kind, Kind::Config);
        assert!(fault.message.contains("10 row(s), by whole groups of `g`, into 0"), "{}", fault.message);
    }

    #[test]
    fn given_entries_evaluate_and_all_others_train() {
        let options = Options { evaluation_from: Some(1), ..options(true, 3, 0.1) };
        let of = |row: &u64| (usize::from(*row >= 6), None);
        let (mut train, evaluation) = split((0..9).collect(), of, &options).unwrap();
        assert_ne!(train, [0, 1, 2, 3, 4, 5], "rows that train are shuffled");
        train.sort();
        assert_eq!((train, evaluation), (vec![0, 1, 2, 3, 4, 5], vec![6, 7, 8]));
        let fault = split((0..5).collect(), of, &options).unwrap_err();
        assert_eq!((fault.kind, fault.message.contains("`evaluation_data`")), (Kind::Data, true));
    }

    #[test]
    fn without_shuffling_the_last_rows_evaluate() {
        assert_eq!(run(5, false, 0, 0.8).unwrap(), (vec![0, 1, 2, 3], vec![4]));
        assert_eq!(run(3, false, 0, 1.0).unwrap(), (vec![0, 1, 2], vec![]));
    }

    #[test]
    fn rounding_is_floor_for_training_and_ceiling_for_evaluation() {
        for (rows, share, train) in
            [(10, 0.7, 7), (10, 0.75, 7), (100, 0.29, 29), (5048, 0.8, 4038), (3, 0.9, 2)]
        {
            assert_eq!(train_rows(rows, share), train, "{rows} rows, share {share}");
        }
    }

    #[test]
    fn shuffling_is_a_permutation_fixed_by_the_seed() {
        expect_test::expect!["[9, 7, 2, 5, 0, 1, 4, 3, 8, 6]"]
            .assert_eq(&format!("{:?}", run(10, true, 42, 1.0).unwrap().0));
        let (train, evaluation) = run(1000, true, 7, 0.9).unwrap();
        assert_ne!(train, run(1000, true, 8, 0.9).unwrap().0);
        assert!(evaluation.iter().any(|&row| row < 500), "the split comes after the shuffle");
        let mut all = [train, evaluation].concat();
        all.sort_unstable();
        assert_eq!(all, (0..1000).collect::<Vec<u64>>());
    }

    #[test]
    fn every_row_can_land_anywhere() {
        // 3 rows have 6 orders, and 600 seeds give each about 100 times. 60 is four standard deviations below.
        let mut counts = std::collections::BTreeMap::new();
        for seed in 0..600 {
            *counts.entry(run(3, true, seed, 1.0).unwrap().0).or_insert(0) += 1;
        }
        assert!(counts.len() == 6 && counts.values().all(|&count| count > 60), "{counts:?}");
    }

    #[test]
    fn an_empty_side_or_an_impossible_share_is_a_config_fault() {
        for (rows, share) in [(1, 0.5), (3, 0.2), (10, 0.0), (10, 1.5), (10, f64::NAN), (10, -0.1)] {
            assert_eq!(
                run(rows, true, 0, share).unwrap_err().kind,
                Kind::Config,
                "{rows} rows, share {share}"
            );
        }
    }
}
