//! Examples -> how many are copies of others, exactly or nearly, and how many evaluation rows are also trained on.
//!
//! Two rows are nearly the same if their words are the same apart from case and punctuation, or if at least four in
//! five of their runs of three words agree. That share is estimated by the smallest hashes of the runs, for rows in
//! which a band of these hashes agrees.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use rayon::prelude::*;

use crate::dataset::{Set, Tokenizer};

/// Smallest hashes that stand for a row. They are compared in bands, of which one must agree.
const HASHES: usize = 32;
const BAND: usize = 4;
/// Share of equal hashes above which rows are nearly the same.
const ALIKE: f64 = 0.8;
/// Words in a run.
const RUN: usize = 3;
/// LIMIT: rows of one band that are compared with each other. A band of boilerplate may hold all rows.
const COMPARED_MAX: usize = 64;

/// LIMIT: rows of a set that are compared. The record of a row takes about a kilobyte.
const ROWS_MAX: usize = 500_000;

/// Counts of copies.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Twins {
    /// Training rows with the same tokens as an earlier one.
    pub exact: usize,
    /// Further training rows that are nearly the same as an earlier one.
    pub near: usize,
    /// Evaluation rows that are exactly or nearly the same as a training row.
    pub overlap: usize,
}

struct Print {
    tokens: u64,
    words: u64,
    hashes: [u64; HASHES],
}

/// Compares the rows of both sets, up to `ROWS_MAX`; the number of rows that were compared.
pub(super) fn find(train: &Set, evaluation: &Set, tokenizer: &Tokenizer) -> (Twins, usize) {
    let print = |set: &Set, index: usize| {
        let ids = set.example(index).ids;
        print(&ids, &tokenizer.text(&ids))
    };
    let count = train.len().min(ROWS_MAX);
    let others = evaluation.len().min(ROWS_MAX);
    let train: Vec<Print> = (0..count).into_par_iter().map(|index| print(train, index)).collect();
    let evaluation: Vec<Print> = (0..others).into_par_iter().map(|index| print(evaluation, index)).collect();
    let mut known = Known::default();
    let mut twins = Twins::default();
    for print in &train {
        match known.find(print) {
            Some(true) => twins.exact += 1,
            Some(false) => twins.near += 1,
            None => {}
        }
        known.add(print);
    }
    twins.overlap = evaluation.iter().filter(|print| known.find(print).is_some()).count();
    (twins, count + others)
}

#[derive(Default)]
struct Known<'a> {
    tokens: HashSet<u64>,
    words: HashSet<u64>,
    bands: HashMap<(usize, [u64; BAND]), Vec<&'a Print>>,
}

impl<'a> Known<'a> {
    /// Returns whether a row is known exactly (true), nearly (false) or not (`None`).
    fn find(&self, print: &Print) -> Option<bool> {
        if self.tokens.contains(&print.tokens) {
            return Some(true);
        }
        let alike = |other: &&Print| {
            let same = other.hashes.iter().zip(&print.hashes).filter(|(a, b)| a == b).count();
            same as f64 >= ALIKE * HASHES as f64
        };
        let near = self.words.contains(&print.words)
            || bands(print).any(|band| self.bands.get(&band).is_some_and(|list| list.iter().any(&alike)));
        near.then_some(false)
    }

    fn add(&mut self, print: &'a Print) {
        self.tokens.insert(print.tokens);
        self.words.insert(print.words);
        for band in bands(print) {
            let list = self.bands.entry(band).or_default();
            if list.len() < COMPARED_MAX {
                list.push(print);
            }
        }
    }
}

fn bands(print: &Print) -> impl Iterator<Item = (usize, [u64; BAND])> + '_ {
    print.hashes.as_chunks::<BAND>().0.iter().copied().enumerate()
}

fn print(ids: &[u32], text: &str) -> Print {
    let lower = text.to_lowercase();
    let words: Vec<&str> =
        lower.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).collect();
    let mut hashes = [u64::MAX; HASHES];
    let runs: Vec<u64> = match words.len() {
        0..RUN => vec![hash(&words)],
        _ => words.windows(RUN).map(|run| hash(&run)).collect(),
    };
    for run in runs {
        for (number, smallest) in hashes.iter_mut().enumerate() {
            *smallest = (*smallest).min(hash(&(run, number)));
        }
    }
    Print { tokens: hash(&ids), words: hash(&words), hashes }
}

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks the second text up after the first was added.
    fn known(first: &str, second: &str) -> Option<bool> {
        let ids = |text: &str| text.bytes().map(u32::from).collect::<Vec<_>>();
        let (first, second) = (print(&ids(first), first), print(&ids(second), second));
        let mut known = Known::default();
        known.add(&first);
        known.find(&second)
    }

    #[test]
    fn copies_are_exact_or_near() {
        let long = "A pod stays pending if no node has room for what it asks; look at its events, then at the nodes and \
                    their taints, and last at the quota of its namespace, which may be used up by other pods.";
        assert_eq!(known(long, long), Some(true));
        assert_eq!(known(long, &long.to_uppercase()), Some(false));
        assert_eq!(known(long, &long.replace(';', " --")), Some(false));
        assert_eq!(known(long, &format!("{long} Good luck.")), Some(false));
        assert_eq!(
            known(long, "What is a taint? A mark of a node that keeps pods away unless they tolerate it."),
            None
        );
        assert_eq!(known("4", "5"), None);
        assert_eq!(known("", ""), Some(true));
    }
}
