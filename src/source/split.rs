//! The name of a data file -> the split that it shows, by the words of the hub and `datasets`.

use std::collections::BTreeMap;

use crate::report::{Report, Stage};

/// The split that trains.
pub const TRAIN: &str = "train";
/// Words in names by the split that they stand for.
const WORDS: [(&str, &[&str]); 3] = [
    (TRAIN, &["train", "training"]),
    ("validation", &["validation", "valid", "val", "dev", "eval", "evaluation"]),
    ("test", &["test", "testing"]),
];

/// Returns the split that a path shows with one of its words, in any letter case: `data/test-00000-of-00001.parquet`.
pub fn of(path: &str) -> Option<&'static str> {
    let path = path.to_lowercase();
    let words: Vec<&str> = path.split(|c: char| !c.is_ascii_alphanumeric()).collect();
    let shown = |(_, names): &&(&str, &[&str])| words.iter().any(|word| names.contains(word));
    WORDS.iter().find(shown).map(|(split, _)| *split)
}

/// Warns if a folder has files of the split `train` beside those of other splits: all of them are read, while
/// `datasets` would read those of `train`. `names` are paths below the folder.
pub(super) fn tell_of_others<'a>(folder: &str, names: impl Iterator<Item = &'a str>, report: &Report) {
    let (mut files, mut counts) = (0, BTreeMap::<&str, usize>::new());
    for split in names.map(of) {
        files += 1;
        if let Some(split) = split {
            *counts.entry(split).or_default() += 1;
        }
    }
    if counts.remove(TRAIN).is_none() || counts.is_empty() {
        return;
    }
    let others: Vec<String> = counts.iter().map(|(split, count)| format!("{count} of {split}")).collect();
    report.warn(
        Stage::Read,
        format!(
            "{folder}: {files} files are read, and by their names some are no files to train on: {}; if so, name the \
             files or folders of one split",
            others.join(", ")
        ),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_in_a_path_shows_the_split() {
        for (path, split) in [
            ("data/train-00000-of-00001.parquet", Some(TRAIN)),
            ("Test.jsonl", Some("test")),
            ("validation/0.parquet", Some("validation")),
            ("my_dev_rows.csv", Some("validation")),
            ("latest.jsonl", None),
            ("trainer.jsonl", None),
            ("rows.jsonl", None),
        ] {
            assert_eq!(of(path), split, "{path}");
        }
    }
}
