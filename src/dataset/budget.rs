//! The texts of a dataset as they are read -> whether all of them may be kept.
//!
//! All rows are kept in memory until they are tokenized. A few bytes of a file can stand for any amount of text (a
//! dictionary entry that a million rows name), and a large file can hold more than the machine's memory.

use crate::fault::{Fault, Result};
use crate::machine;
use crate::source;

/// LIMIT: size of all texts as a multiple of the files' size. Packed conversations with one system prompt in every
/// row unpack to about fifty times their size.
const GROWTH_MAX: u64 = 200;
/// LIMIT: bytes of text that a file of any size may unpack to. So much text becomes tokens within seconds.
const GROWTH_FREE_BYTES: u64 = 128 << 20;
/// Share of the memory that is free at the start. The rest is for tokens and for the run.
const FREE_SHARE: f64 = 0.8;

/// The amount of text that may still be read.
pub(super) struct Budget {
    spent: u64,
    by_size: u64,
    by_memory: u64,
    file_bytes: u64,
}

impl Budget {
    /// Returns the budget for a set of files on this machine.
    pub fn of(files: &[source::File]) -> Budget {
        let file_bytes = files.iter().map(|file| file.bytes).fold(0, u64::saturating_add);
        let free = machine::memory_available().map_or(u64::MAX, |bytes| (bytes as f64 * FREE_SHARE) as u64);
        Budget::new(file_bytes, free)
    }

    /// Returns a budget for texts that become tokens a part at a time, which the memory does not limit.
    pub fn streamed(files: &[source::File]) -> Budget {
        Budget { by_memory: u64::MAX, ..Budget::of(files) }
    }

    fn new(file_bytes: u64, by_memory: u64) -> Budget {
        let by_size = file_bytes.saturating_mul(GROWTH_MAX).saturating_add(GROWTH_FREE_BYTES);
        Budget { spent: 0, by_size, by_memory, file_bytes }
    }

    /// Counts further texts, before they are copied.
    ///
    /// # Errors
    /// Data: more text than such files can honestly hold. Capacity: more text than this machine's memory allows.
    pub fn spend(&mut self, bytes: u64) -> Result<()> {
        self.spent = self.spent.saturating_add(bytes);
        if self.spent > self.by_size {
            return Err(Fault::data(format!(
                "the texts take more than {} MB, from files of {} bytes: a file made to fill the memory",
                self.by_size >> 20,
                self.file_bytes
            ))
            .help("take the data from a source that you trust"));
        }
        if self.spent > self.by_memory {
            return Err(Fault::capacity(format!(
                "the texts take more than {} MB, {FREE_SHARE} of the memory that was free",
                self.by_memory >> 20
            ))
            .help("train on fewer rows, or take a machine with more memory"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::Kind;

    #[test]
    fn texts_may_grow_as_honest_ones_do_and_must_fit_the_memory() {
        let kind =
            |file_bytes, memory, text: u64| Budget::new(file_bytes, memory).spend(text).map_err(|f| f.kind);
        assert_eq!(kind(771, u64::MAX, GROWTH_FREE_BYTES), Ok(()));
        assert_eq!(kind(771, u64::MAX, GROWTH_FREE_BYTES + 771 * GROWTH_MAX + 1), Err(Kind::Data));
        assert_eq!(kind(1 << 30, u64::MAX, 100 << 30), Ok(()));
        assert_eq!(kind(1 << 30, 8 << 30, 9 << 30), Err(Kind::Capacity));
        let mut budget = Budget::new(0, u64::MAX);
        budget.spend(GROWTH_FREE_BYTES).unwrap();
        assert!(budget.spend(1).is_err(), "batches add up");
        assert!(budget.spend(u64::MAX).is_err());
    }
}
