//! Records -> shuffled records -> rows to train on and rows to evaluate on.

use super::Options;
use crate::fault::{Fault, Result};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// Splits the records: the first floor(share * n) are trained on, the others evaluate. `train_test_split` of
/// `datasets` rounds in the same way.
pub(super) fn split<T>(mut records: Vec<T>, options: &Options) -> Result<(Vec<T>, Vec<T>)> {
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
    let train_rows = train_rows(rows, share);
    if share < 1.0 && (train_rows == 0 || train_rows == rows) {
        return Err(Fault::config(format!(
            "DatasetConfig.train_test_split: {share} splits {rows} row(s) into {train_rows} to train on and {} to evaluate on",
            rows - train_rows
        ))
        .help("use a share that leaves rows on both sides, or 1 for no evaluation"));
    }
    let evaluation = records.split_off(train_rows);
    Ok((records, evaluation))
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
    use super::super::{BadRows, Context, Conversation, Names, Record};
    use super::*;
    use crate::fault::Kind;

    fn run(rows: u64, shuffle: bool, seed: u64, train_share: f64) -> Result<(Vec<u64>, Vec<u64>)> {
        let record = |row| Record {
            conversation: Conversation::Text(String::new()),
            context: Context::default(),
            file: "f".into(),
            row,
            entry: 0,
        };
        let options = Options {
            layout: None,
            messages_column: None,
            prompt_column: None,
            completion_column: None,
            text_column: None,
            question_column: None,
            shares: Vec::new(),
            container: None,
            names: Names::KNOWN,
            bad_rows: BadRows::Refuse,
            shuffle,
            seed,
            train_share,
        };
        let (train, evaluation) = split((0..rows).map(record).collect(), &options)?;
        let rows = |records: Vec<Record>| records.iter().map(|record| record.row).collect();
        Ok((rows(train), rows(evaluation)))
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
