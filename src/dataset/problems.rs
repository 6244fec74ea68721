//! Bad rows -> one fault, or one warning, that counts each kind of problem and names its first places.

use super::BadRows;
use crate::fault::{Fault, Result};
use crate::report::{Report, Stage};
use std::fmt::Write;

/// The number of places that a message shows, which is enough to find the cause.
const PLACES_SHOWN_MAX: usize = 3;
const KINDS_SHOWN_MAX: usize = 10;

/// Bad rows, by kind of problem.
#[derive(Default)]
pub(super) struct Problems {
    kinds: Vec<Kind>,
    /// Rows of further kinds after the first `KINDS_SHOWN_MAX`.
    others: u64,
}

struct Kind {
    text: String,
    rows: u64,
    places: Vec<String>,
}

impl Problems {
    /// Adds a bad row. `text` describes the problem without the row's place, so that equal problems are counted
    /// together.
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

    /// Returns the number of bad rows.
    pub fn rows(&self) -> u64 {
        self.kinds.iter().map(|kind| kind.rows).sum::<u64>() + self.others
    }

    /// Fails with a `Data` fault if there are bad rows that may not be dropped, and warns if they may. `rows_total`
    /// includes good rows. `advice` is another remedy for bad ones.
    pub fn settle(
        self,
        rows_total: u64,
        wanted: BadRows,
        advice: &str,
        stage: Stage,
        report: &Report,
    ) -> Result<()> {
        let bad = self.rows();
        if bad == 0 {
            return Ok(());
        }
        const PLACES: &str = "(places are file:row, counted from 0)";
        let list = self.list();
        let head = format!("{bad} of {rows_total} rows cannot be used");
        match wanted {
            BadRows::Drop { share_max }
                if bad as f64 <= share_max * rows_total as f64 && bad < rows_total =>
            {
                report.warn(stage, format!("{head} and are left out:{list}\n  {PLACES}"));
                Ok(())
            }
            BadRows::Drop { .. } if bad == rows_total => {
                Err(Fault::data(format!("{head}, so that none would be left:{list}"))
                    .help(format!("{advice} {PLACES}")))
            }
            BadRows::Drop { share_max } => Err(Fault::data(format!(
                "{head}, which is more than may be dropped (bad_rows_max: {share_max}):{list}"
            ))
            .help(format!("{advice}, or raise bad_rows_max {PLACES}"))),
            BadRows::Refuse => Err(Fault::data(format!("{head}:{list}"))
                .help(format!("{advice}, or leave them out with `bad_rows: drop` {PLACES}"))),
        }
    }

    /// Returns one line for each kind, with its count and its first places.
    fn list(&self) -> String {
        let mut text = String::new();
        for Kind { text: kind, rows, places } in &self.kinds {
            let more = if *rows > places.len() as u64 { ", ..." } else { "" };
            let _ = write!(text, "\n  {rows} x {kind} ({}{more})", places.join(", "));
        }
        if self.others > 0 {
            let _ = write!(text, "\n  {} x something else", self.others);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DROP: BadRows = BadRows::Drop { share_max: 0.5 };

    fn settle(problems: Problems, rows: u64, wanted: BadRows) -> Result<()> {
        problems.settle(rows, wanted, "correct these rows", Stage::Read, &Report::silent())
    }

    fn some() -> Problems {
        let mut problems = Problems::default();
        for row in 0..5 {
            problems.add("content is null".into(), "a.parquet", row);
        }
        problems.add("no messages".into(), "b.parquet", 7);
        problems
    }

    #[test]
    fn equal_problems_are_counted_and_the_first_places_named() {
        expect_test::expect![[r#"
            6 of 100 rows cannot be used:
              5 x content is null (a.parquet:0, a.parquet:1, a.parquet:2, ...)
              1 x no messages (b.parquet:7)
              help: correct these rows, or leave them out with `bad_rows: drop` (places are file:row, counted from 0)"#]]
        .assert_eq(&settle(some(), 100, BadRows::Refuse).unwrap_err().to_string());
    }

    #[test]
    fn bad_rows_are_dropped_up_to_a_share_and_never_all_of_them() {
        settle(Problems::default(), 0, BadRows::Refuse).unwrap();
        settle(some(), 12, DROP).unwrap();
        expect_test::expect![[r#"
            6 of 11 rows cannot be used, which is more than may be dropped (bad_rows_max: 0.5):
              5 x content is null (a.parquet:0, a.parquet:1, a.parquet:2, ...)
              1 x no messages (b.parquet:7)
              help: correct these rows, or raise bad_rows_max (places are file:row, counted from 0)"#]]
        .assert_eq(&settle(some(), 11, DROP).unwrap_err().to_string());
        let fault = settle(some(), 6, BadRows::Drop { share_max: 1.0 }).unwrap_err();
        assert!(
            fault.message.starts_with("6 of 6 rows cannot be used, so that none would be left"),
            "{fault}"
        );
    }

    #[test]
    fn a_message_stays_short_however_many_kinds_there_are() {
        let mut problems = Problems::default();
        for row in 0..1000 {
            problems.add(format!("role {row}"), "a", row);
        }
        let text = settle(problems, 1000, BadRows::Refuse).unwrap_err().message;
        assert!(
            text.lines().count() == KINDS_SHOWN_MAX + 2 && text.ends_with("990 x something else"),
            "{text}"
        );
    }
}
