//! The heads of one layer's attention: counts, widths, and their order in the columns of a row.

use std::ops::Range;

/// Facts of the heads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heads {
    /// Query heads (H).
    pub query: usize,
    /// Key and value heads (K); H is a multiple.
    pub key: usize,
    /// Width of a head (D).
    pub width: usize,
    /// Factor on the scores.
    pub scale: f64,
    /// Rows that a row sees, itself included.
    pub window: Option<usize>,
    /// Scores become `cap * tanh(score / cap)` (Gemma 2).
    pub softcap: Option<f64>,
    pub layout: Layout,
}

/// Order of the heads in the columns of qkv.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// All query heads, then all key heads, then all value heads.
    Blocked,
    /// For each key head its query heads, itself, its value head (Falcon).
    Grouped,
}

impl Heads {
    /// Columns of qkv.
    pub fn columns(&self) -> usize {
        (self.query + 2 * self.key) * self.width
    }

    /// Query heads of a key head (G).
    pub fn group(&self) -> usize {
        self.query / self.key
    }

    /// Rope turns the first `heads` heads of each of the `runs` equal parts of a row: (runs, heads).
    pub fn turning(&self) -> (usize, usize) {
        match self.layout {
            Layout::Blocked => (1, self.query + self.key),
            Layout::Grouped => (self.key, self.group() + 1),
        }
    }

    /// First column of a query head; a key head's group of them lies side by side.
    pub fn query_at(&self, head: usize) -> usize {
        let before = match self.layout {
            Layout::Blocked => 0,
            Layout::Grouped => 2 * (head / self.group()),
        };
        (before + head) * self.width
    }

    pub fn key_at(&self, key_head: usize) -> usize {
        match self.layout {
            Layout::Blocked => (self.query + key_head) * self.width,
            Layout::Grouped => (key_head * (self.group() + 2) + self.group()) * self.width,
        }
    }

    pub fn value_at(&self, key_head: usize) -> usize {
        match self.layout {
            Layout::Blocked => (self.query + self.key + key_head) * self.width,
            Layout::Grouped => self.key_at(key_head) + self.width,
        }
    }

    /// Keys that at least one row of `rows` sees.
    pub fn keys(&self, rows: &Range<usize>) -> Range<usize> {
        let from = self.window.map_or(0, |window| (rows.start + 1).saturating_sub(window));
        from..rows.end
    }

    /// Whether row i sees row j of the same example.
    pub fn sees(&self, i: usize, j: usize) -> bool {
        j <= i && self.window.is_none_or(|window| i - j < window)
    }
}
