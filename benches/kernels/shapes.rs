//! The shapes of the cases: layers of real models, and small ones for the fake driver.

use crate::case::{Case, Gpu};
use crate::{attention, products, rows};

/// T, C, F, H, K, D, V.
#[derive(Clone, Copy)]
pub struct Shape {
    pub name: &'static str,
    pub tokens: usize,
    pub width: usize,
    pub feed_forward: usize,
    pub query: usize,
    pub key: usize,
    pub head: usize,
    pub vocab: usize,
    pub window: Option<usize>,
}

const REAL: [Shape; 3] = [
    Shape {
        name: "phi3-mini",
        tokens: 4096,
        width: 3072,
        feed_forward: 8192,
        query: 32,
        key: 32,
        head: 96,
        vocab: 32_064,
        window: Some(2047),
    },
    Shape {
        name: "llama3.1-8b",
        tokens: 4096,
        width: 4096,
        feed_forward: 14_336,
        query: 32,
        key: 8,
        head: 128,
        vocab: 128_256,
        window: None,
    },
    Shape {
        name: "qwen2.5-7b",
        tokens: 4096,
        width: 3584,
        feed_forward: 18_944,
        query: 28,
        key: 4,
        head: 128,
        vocab: 152_064,
        window: None,
    },
];

/// Odd lengths, so that no tile is full.
const SMALL: Shape = Shape {
    name: "small",
    tokens: 69,
    width: 128,
    feed_forward: 192,
    query: 4,
    key: 2,
    head: 32,
    vocab: 515,
    window: Some(37),
};

/// Returns the shapes of every operation. f32 is checked at one shape, because training uses bf16.
pub fn cases(gpu: &Gpu) -> Vec<Case> {
    let shapes: &[Shape] = match (gpu.small, gpu.dtype) {
        (true, _) => &[SMALL],
        (false, candle_core::DType::F32) => &REAL[..1],
        (false, _) => &REAL,
    };
    let of_each = |shape: &Shape| {
        let mut cases = attention::cases(gpu, shape);
        cases.extend(products::cases(gpu, shape));
        cases.extend(rows::cases(gpu, shape));
        cases
    };
    shapes.iter().flat_map(of_each).collect()
}
