//! Changes of the GPU engine that a benchmark switches off one at a time -> whether each is on. A run has all of them;
//! only the benches of `benches/gpu` use the switches, to measure the gain of a change.
//!
//! `HONE_BENCH_WITHOUT=NAME,NAME` switches changes off when the program starts. A bench that measures both sides in
//! one process calls `set` between steps. No change alters a result beyond the order of a sum.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// The variable that names the changes to leave out.
const VARIABLE: &str = "HONE_BENCH_WITHOUT";

/// A change that can be switched off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// A product adds the residual stream from its own memory, instead of from a copy.
    Onto,
    /// cublasLt multiplies, with an algorithm that is chosen once for a shape.
    Algorithms,
    /// A launch finds its kernel without a lock and without making its name.
    Functions,
    /// The memory plan keeps 4-bit weights expanded if memory is left.
    Expanded,
    /// Inputs of layers go to page-locked host memory and back on a stream of their own.
    Beside,
    /// Attention stores gradients of queries and keys as rope's gradient leaves them.
    Turned,
    /// Attention loads the next keys and values while it computes with these.
    Staged,
    /// The gradient of keys takes 64 rows of queries at a time for heads of 96 columns.
    Wide,
    /// Attention multiplies by warpgroups on cards of capability 9.0.
    Hopper,
    /// The activation's gradient writes the activation too, in the same pass over memory.
    Activated,
    /// LoRA's matrices lie beside and below the frozen weight, in one product with it.
    Inside,
    /// One pass over a layer's gradient gives both of its low-rank products.
    Both,
    /// The gradient of A comes from a norm's input, so that the norm is not computed again.
    Normed,
    /// Kernels that make operands of products in 8 bits also write them in 8 bits.
    Rounded,
    /// Serving's steps of one shape are recorded once as a graph and launched as a whole.
    Graphs,
    /// The same for training's passes, which are filled up to few shapes.
    Steps,
    /// Kernels begin while the one before them ends, on cards of capability 9.0 and later.
    Early,
    /// A product of few rows asks for its weight before the kernel before it has ended.
    Ahead,
    /// A product of few rows adds the adapters' parts of its rows, which then need no launch of their own.
    Added,
}

impl Change {
    /// All changes.
    pub const ALL: [Change; 19] = [
        Change::Onto,
        Change::Algorithms,
        Change::Functions,
        Change::Expanded,
        Change::Beside,
        Change::Turned,
        Change::Staged,
        Change::Wide,
        Change::Hopper,
        Change::Activated,
        Change::Inside,
        Change::Both,
        Change::Normed,
        Change::Rounded,
        Change::Graphs,
        Change::Steps,
        Change::Early,
        Change::Ahead,
        Change::Added,
    ];

    /// Returns the name that the variable has for it.
    pub fn name(self) -> &'static str {
        match self {
            Change::Onto => "onto",
            Change::Algorithms => "algorithms",
            Change::Functions => "functions",
            Change::Expanded => "expanded",
            Change::Beside => "beside",
            Change::Turned => "turned",
            Change::Staged => "staged",
            Change::Wide => "wide",
            Change::Hopper => "hopper",
            Change::Activated => "activated",
            Change::Inside => "inside",
            Change::Both => "both",
            Change::Normed => "normed",
            Change::Rounded => "rounded",
            Change::Graphs => "graphs",
            Change::Steps => "steps",
            Change::Early => "early",
            Change::Ahead => "ahead",
            Change::Added => "added",
        }
    }

    /// Returns whether the change is on.
    pub fn is_on(self) -> bool {
        off().load(Ordering::Relaxed) & self.bit() == 0
    }

    /// Switches it for all work that is queued from here on.
    pub fn set(self, on: bool) {
        match on {
            true => off().fetch_and(!self.bit(), Ordering::Relaxed),
            false => off().fetch_or(self.bit(), Ordering::Relaxed),
        };
    }

    fn bit(self) -> u64 {
        1 << self as u64
    }
}

/// Returns a bit for each change that is off.
fn off() -> &'static AtomicU64 {
    static OFF: OnceLock<AtomicU64> = OnceLock::new();
    OFF.get_or_init(|| AtomicU64::new(named(&std::env::var(VARIABLE).unwrap_or_default())))
}

/// Returns the bits of the changes in a list. A name that is not known is a mistake in a bench.
fn named(list: &str) -> u64 {
    let bit = |name: &str| match Change::ALL.into_iter().find(|change| change.name() == name) {
        Some(change) => change.bit(),
        None => {
            panic!("{VARIABLE}: {name:?} is no change: expected some of {:?}", Change::ALL.map(Change::name))
        }
    };
    list.split(',').map(str::trim).filter(|name| !name.is_empty()).map(bit).fold(0, |all, bit| all | bit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_bits() {
        assert_eq!(named(""), 0);
        assert_eq!(named("functions, onto"), Change::Functions.bit() | Change::Onto.bit());
        let all = Change::ALL.iter().fold(0, |all, change| all | change.bit());
        assert_eq!(all.count_ones() as usize, Change::ALL.len(), "a bit for each");
    }
}
