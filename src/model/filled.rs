//! Rows of a serving step on a GPU -> the rows that it is filled up to, so that few graphs serve all steps, and the
//! device memory that these graphs take.

use crate::facts::Facts;
use crate::ops::attention::cached::PAGE;
use crate::ops::matmul::FEW_ROWS;

/// The most device memory that a server's graphs take, except for the newest one.
pub const GRAPHS_BYTES: u64 = 256 << 20;
/// The largest size of the tensors of a step that are left to its graph, each in its own place. They count to
/// `GRAPHS_BYTES`.
pub const KEPT_BYTES: u64 = 32 << 20;
/// Bytes of a step's lists of numbers.
const LISTS_BYTES: usize = 4 << 20;
/// Pages that no sequence has: rows that fill a step up write theirs there.
pub const SPARE_PAGES: usize = 1;

/// Returns the number of rows that a step is filled up to. The products of few rows take eight at a time.
pub fn rows(rows: usize) -> usize {
    let filled = if rows <= 8 { rows.next_power_of_two() } else { rows.next_multiple_of(8) };
    assert!(filled - rows < SPARE_PAGES * PAGE, "the rows that fill a step up have a place each");
    filled
}

/// Returns the largest number of rows that a step with a graph is filled up to, for at most `sequences` sequences.
pub fn rows_max(sequences: usize) -> usize {
    rows(sequences.clamp(1, FEW_ROWS))
}

/// Returns bytes of a step's inputs: lists of numbers; angles' frequencies, factors of queries and embeddings in f32;
/// embeddings in bf16; parameters of drawing tokens in f64.
pub fn input_bytes(facts: &Facts, rows: usize) -> [usize; 4] {
    let widest = facts.layers.iter().map(|layer| layer.attention.heads.width).max().unwrap_or(0);
    let angles = (facts.ropes.len() + 2) * (rows + 1) * 4 * widest;
    [LISTS_BYTES, angles + 4 * rows * facts.width, 2 * rows * facts.width, 40 * rows]
}

/// Returns the device memory of graphs, and of the values that they read and write beside the cache, for at most
/// `sequences` sequences.
pub fn bytes(facts: &Facts, sequences: usize) -> u64 {
    let rows = rows_max(sequences);
    let fixed = input_bytes(facts, rows).iter().sum::<usize>() + rows * (4 * facts.vocab + 4);
    GRAPHS_BYTES + fixed as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_filled_up_to_few_numbers_of_rows() {
        let found: Vec<usize> = [1, 2, 3, 4, 5, 8, 9, 16, 17, 57, 64].map(rows).into();
        assert_eq!(found, [1, 2, 4, 4, 8, 8, 16, 16, 24, 64, 64]);
        assert_eq!([0, 1, 60, 1000].map(rows_max), [1, 1, 64, 64]);
        let numbers: std::collections::BTreeSet<usize> = (1..=FEW_ROWS).map(rows).collect();
        assert_eq!(numbers.len(), 11);
    }
}
