//! Bad rows -> one fault that counts each kind and names its first places.

use crate::fault::{Fault, Result};
use std::fmt::Write;

/// Enough to find the cause; the counts say the rest.
const PLACES_SHOWN_MAX: usize = 3;
const KINDS_SHOWN_MAX: usize = 10;

#[derive(Default)]
pub(super) struct Problems {
    kinds: Vec<Kind>,
    /// Rows whose kind came after `KINDS_SHOWN_MAX` others.
    others: u64,
}

struct Kind {
    text: String,
    rows: u64,
    places: Vec<String>,
}

impl Problems {
    /// `text` says what is wrong without naming the row, so that equal problems meet.
    pub fn add(&mut self, text: String, file: &str, row: u64) {
        let index = match self.kinds.iter().position(|kind| kind.text == text) {
            Some(index) => index,
            None if self.kinds.len() == KINDS_SHOWN_MAX => {
                self.others += 1;
                return;
            }
            None => {
                self.kinds.push(Kind { text, rows: 0, places: Vec::new() });
                self.kinds.len() - 1
            }
        };
        let kind = &mut self.kinds[index];
        kind.rows += 1;
        if kind.places.len() < PLACES_SHOWN_MAX {
            kind.places.push(format!("{file}:{row}"));
        }
    }

    pub fn rows(&self) -> u64 {
        self.kinds.iter().map(|kind| kind.rows).sum::<u64>() + self.others
    }

    /// A `Data` fault if any row was bad. `rows_total` counts good rows too; `help` says what to do about bad ones.
    pub fn into_result(self, rows_total: u64, help: &str) -> Result<()> {
        if self.rows() == 0 {
            return Ok(());
        }
        let mut text = format!("{} of {rows_total} rows cannot be used:", self.rows());
        for Kind { text: kind, rows, places } in &self.kinds {
            let more = if *rows > places.len() as u64 { ", ..." } else { "" };
            let _ = write!(text, "\n  {rows} x {kind} ({}{more})", places.join(", "));
        }
        if self.others > 0 {
            let _ = write!(text, "\n  {} x something else", self.others);
        }
        Err(Fault::data(text).help(format!("{help} (places are file:row, counted from 0)")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_problems_are_counted_and_the_first_places_named() {
        let mut problems = Problems::default();
        for row in 0..5 {
            problems.add("content is null".into(), "a.parquet", row);
        }
        problems.add("no messages".into(), "b.parquet", 7);
        expect_test::expect![[r#"
            6 of 100 rows cannot be used:
              5 x content is null (a.parquet:0, a.parquet:1, a.parquet:2, ...)
              1 x no messages (b.parquet:7)
              help: correct or remove these rows (places are file:row, counted from 0)"#]]
        .assert_eq(&problems.into_result(100, "correct or remove these rows").unwrap_err().to_string());
    }

    #[test]
    fn a_message_stays_short_however_many_kinds_there_are() {
        let mut problems = Problems::default();
        for row in 0..1000 {
            problems.add(format!("role {row}"), "a", row);
        }
        let text = problems.into_result(1000, "").unwrap_err().message;
        assert!(
            text.lines().count() == KINDS_SHOWN_MAX + 2 && text.ends_with("990 x something else"),
            "{text}"
        );
    }
}
