//! The heads of one layer's attention: counts, widths, and their order in the columns of a row.

use std::ops::Range;

/// The heads of one layer's attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heads {
    /// Query heads (H).
    pub query: usize,
    /// Key heads and value heads (K); H is a multiple of it.
    pub key: usize,
    /// Width of a head (D).
    pub width: usize,
    /// Factor on the attention scores.
    pub scale: f64,
    /// Rows that a row attends to, itself included. `None`: all rows before it.
    pub window: Option<usize>,
    /// Scores become `cap * tanh(score / cap)` (Gemma 2).
    pub softcap: Option<f64>,
    /// Order of the heads in the columns of qkv.
    pub layout: Layout,
}

/// Order of the heads in the columns of qkv.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// All query heads, then all key heads, then all value heads.
    Blocked,
    /// For each key head: its query heads, the key head, its value head (Falcon).
    Grouped,
}

impl Heads {
    /// Returns heads with the usual scale, 1 / sqrt(width), that see all rows before them.
    pub fn plain(query: usize, key: usize, width: usize) -> Heads {
        let scale = (width as f64).sqrt().recip();
        Heads { query, key, width, scale, window: None, softcap: None, layout: Layout::Blocked }
    }

    /// Returns the number of columns of qkv: (H + 2K) * D.
    pub fn columns(&self) -> usize {
        (self.query + 2 * self.key) * self.width
    }

    /// Returns the number of query heads per key head (G).
    pub fn group(&self) -> usize {
        self.query / self.key
    }

    /// (runs, heads): rope rotates the first `heads` heads of each of the `runs` equal parts of a row.
    pub fn turning(&self) -> (usize, usize) {
        match self.layout {
            Layout::Blocked => (1, self.query + self.key),
            Layout::Grouped => (self.key, self.group() + 1),
        }
    }

    /// Returns the first column of a query head. The query heads of one key head lie side by side.
    pub fn query_at(&self, head: usize) -> usize {
        let before = match self.layout {
            Layout::Blocked => 0,
            Layout::Grouped => 2 * (head / self.group()),
        };
        (before + head) * self.width
    }

    /// Returns the first column of a key head.
    pub fn key_at(&self, key_head: usize) -> usize {
        match self.layout {
            Layout::Blocked => (self.query + key_head) * self.width,
            Layout::Grouped => (key_head * (self.group() + 2) + self.group()) * self.width,
        }
    }

    /// Returns the first column of a value head.
    pub fn value_at(&self, key_head: usize) -> usize {
        match self.layout {
            Layout::Blocked => (self.query + self.key + key_head) * self.width,
            Layout::Grouped => self.key_at(key_head) + self.width,
        }
    }

    /// Returns the keys that at least one of `rows` attends to.
    pub fn keys(&self, rows: &Range<usize>) -> Range<usize> {
        let from = self.window.map_or(0, |window| (rows.start + 1).saturating_sub(window));
        from..rows.end
    }

    /// Returns whether row i attends to row j of the same example.
    pub fn sees(&self, i: usize, j: usize) -> bool {
        j <= i && self.window.is_none_or(|window| i - j < window)
    }
}
