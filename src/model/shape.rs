//! The batch of a training pass on a GPU -> the batch that it is filled up to, so that few graphs serve all passes.
//!
//! Rows at the end are an example of their own. No target and no list of rows names them, so their gradient and their
//! part of every sum are zero. Targets that fill the list up have neither a row nor a loss.

use crate::ops::cross_entropy::NO_TARGET;
use crate::ops::rows::NO_ROW;

use super::batch::{Batch, Span};

/// Returns the number of rows that a pass of so many is filled up to: by 15 rows at most up to 128 rows, later by an
/// eighth, and by no more than 63.
pub fn rows(rows: usize) -> usize {
    rows.next_multiple_of((rows.next_power_of_two() / 16).clamp(16, 64))
}

/// Returns the number of targets that so many are filled up to. Few rows cost the output head no more than one, since
/// it is read once.
pub fn targets(targets: usize) -> usize {
    targets.next_multiple_of((targets.next_power_of_two() / 4).clamp(64, 128)).max(64)
}

/// Returns the number of examples that lists have room for.
pub fn examples(examples: usize) -> usize {
    examples.next_power_of_two()
}

impl Batch {
    /// Returns the batch with as many rows, targets and room for examples as its shape has.
    pub fn filled_up(&self) -> Batch {
        let (mut batch, from) = (self.clone(), self.rows());
        let Some((&last, span)) = self.ids.last().zip(self.examples.last()) else { return batch };
        let (rows, rope_length) = (rows(from), span.rope_length);
        if from < rows {
            batch.ids.resize(rows, last);
            batch.keys.resize(rows, 0);
            batch.examples.push(Span { rows: from..rows, rope_length });
        }
        let targets = targets(self.targets.len()).min(rows);
        batch.target_rows.resize(targets, NO_ROW);
        batch.targets.resize(targets, NO_TARGET);
        batch.room = examples(batch.examples.len());
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_have_few_shapes_and_are_little_longer() {
        let found: Vec<usize> = [1, 16, 17, 128, 129, 200, 257, 511, 513, 4000, 4096].map(rows).into();
        assert_eq!(found, [16, 16, 32, 128, 144, 208, 288, 512, 576, 4032, 4096]);
        let found: Vec<usize> = [0, 1, 64, 65, 200, 300, 513, 4000].map(targets).into();
        assert_eq!(found, [64, 64, 64, 128, 256, 384, 640, 4096]);
        assert_eq!([1, 2, 3, 9].map(examples), [1, 2, 4, 16]);
        assert!((128..100_000).all(|n| rows(n) - n <= n / 8 && rows(n) - n < 64));
    }

    #[test]
    fn what_is_added_has_no_target() {
        let mut batch = Batch::default();
        batch.push(&[7, 8, 9], &[false, true, true], 20, 5);
        let filled = batch.filled_up();
        assert_eq!((filled.rows(), filled.keys.len(), filled.room), (16, 16, 2));
        assert_eq!(filled.examples[1], Span { rows: 3..16, rope_length: 20 });
        assert_eq!(filled.target_rows[..3], [0, 1, NO_ROW]);
        assert_eq!(filled.targets[..3], [8, 9, NO_TARGET]);
        assert_eq!((filled.target_rows.len(), filled.targets.len()), (16, 16));
        // A batch of such a shape stays as it is.
        assert_eq!(filled.filled_up(), filled);
        assert_eq!(Batch::default().filled_up(), Batch::default());
    }
}
