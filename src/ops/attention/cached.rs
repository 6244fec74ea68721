//! New rows of several sequences over the keys and values that their earlier rows left in pages.
//!
//! Row i of a sequence sees its rows j with `i - window < j <= i`, as in `attention::formula`; here their keys and values
//! come from a `Store`. What a row gets depends on its own sequence alone, bit for bit: pages are taken in the order of
//! positions, and no sum spans two sequences. CPU only; serving has no backward pass.

use std::any::Any;
use std::ops::Range;

use candle_core::{DType, Result, Tensor, bail};
use half::bf16;
use half::vec::HalfBitsVecExt;
use rayon::prelude::*;

use super::{scatter, softmax_row};
use crate::facts::{Heads, Precision};
use crate::ops::cpu::{self, Real, View};
use crate::with_real;

/// Tokens of a page.
pub const PAGE: usize = 32;
/// Query rows of a block of a task.
const BLOCK: usize = 64;
/// From so many rows on (rows of the block times heads of the group) a page is a matrix product.
const PRODUCT_ROWS_MIN: usize = 8;

/// The new rows of one sequence in a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Segment {
    /// Rows of the step's matrices.
    pub rows: Range<usize>,
    /// Position of the first of them in the sequence.
    pub start: usize,
    /// The sequence's pages in the order of positions; enough for the last row.
    pub pages: Vec<u32>,
}

/// Keys and values of one layer: `[page][key head][token of the page][D]`.
pub struct Store {
    keys: Values,
    values: Values,
    key_heads: usize,
    width: usize,
}

enum Values {
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bf16(Vec<bf16>),
}

impl Values {
    fn new(length: usize, dtype: DType) -> Result<Values> {
        Ok(match dtype {
            DType::F32 => Values::F32(vec![0.0; length]),
            DType::F64 => Values::F64(vec![0.0; length]),
            DType::BF16 => Values::Bf16(vec![0u16; length].reinterpret_into()),
            other => bail!("a cache of {other:?}; expected f32 or bf16"),
        })
    }

    /// The values of a range; bf16 ones are widened into `scratch`.
    fn read<'a, T: Real>(&'a self, range: Range<usize>, scratch: &'a mut Vec<T>) -> Result<&'a [T]> {
        let same: Option<&Vec<T>> = match self {
            Values::F32(data) => (data as &dyn Any).downcast_ref(),
            Values::F64(data) => (data as &dyn Any).downcast_ref(),
            Values::Bf16(data) => {
                scratch.clear();
                scratch.extend(data[range].iter().map(|value| T::of(value.to_f64())));
                return Ok(scratch);
            }
        };
        match same {
            Some(data) => Ok(&data[range]),
            None => bail!("the cache's type is not that of the activations"),
        }
    }

    fn write<T: Real>(&mut self, at: usize, values: &[T]) -> Result<()> {
        let same: Option<&mut Vec<T>> = match self {
            Values::F32(data) => (data as &mut dyn Any).downcast_mut(),
            Values::F64(data) => (data as &mut dyn Any).downcast_mut(),
            Values::Bf16(data) => {
                let target = data[at..at + values.len()].iter_mut();
                target.zip(values).for_each(|(target, value)| *target = bf16::from_f64(value.wide()));
                return Ok(());
            }
        };
        match same {
            Some(data) => data[at..at + values.len()].copy_from_slice(values),
            None => bail!("the cache's type is not that of the activations"),
        }
        Ok(())
    }
}

impl Store {
    /// Empty pages.
    pub fn new(pages: usize, heads: &Heads, dtype: DType) -> Result<Store> {
        let length = pages * PAGE * heads.key * heads.width;
        let (keys, values) = (Values::new(length, dtype)?, Values::new(length, dtype)?);
        Ok(Store { keys, values, key_heads: heads.key, width: heads.width })
    }

    /// Bytes of keys and values of one token in one layer.
    pub fn token_bytes(heads: &Heads, dtype: DType) -> usize {
        2 * heads.key * heads.width * dtype.size_in_bytes()
    }

    /// First value of a token of a page.
    fn at(&self, page: u32, key_head: usize, token: usize) -> usize {
        ((page as usize * self.key_heads + key_head) * PAGE + token) * self.width
    }

    /// Keeps keys and values of qkv's rows, after rope.
    pub fn write(&mut self, qkv: &Tensor, heads: &Heads, segments: &[Segment]) -> Result<()> {
        with_real!(qkv, T => {
            let qkv = &*cpu::read::<T>(qkv)?;
            for segment in segments {
                for (i, row) in segment.rows.clone().enumerate() {
                    let position = segment.start + i;
                    let (page, token) = (segment.pages[position / PAGE], position % PAGE);
                    let row = &qkv[row * heads.columns()..][..heads.columns()];
                    for key_head in 0..heads.key {
                        let at = self.at(page, key_head, token);
                        self.keys.write::<T>(at, &row[heads.key_at(key_head)..][..heads.width])?;
                        self.values.write::<T>(at, &row[heads.value_at(key_head)..][..heads.width])?;
                    }
                }
            }
            Ok(())
        })
    }
}

/// Queries of qkv [T, (H + 2K) * D] over the store, which holds their own keys too -> output [T, H * D].
pub fn forward(
    qkv: &Tensor,
    heads: &Heads,
    store: &Store,
    segments: &[Segment],
    precision: Precision,
) -> Result<Tensor> {
    let (rows, columns) = qkv.dims2()?;
    assert_eq!(columns, heads.columns(), "columns of qkv");
    with_real!(qkv, T => {
        let qkv = &*cpu::read::<T>(qkv)?;
        let blocks = segments.iter().flat_map(|segment| {
            let blocks = (0..segment.rows.len()).step_by(BLOCK);
            blocks.map(move |from| from..(from + BLOCK).min(segment.rows.len())).map(move |block| (segment, block))
        });
        let tasks: Vec<_> = blocks.flat_map(|(segment, block)| (0..heads.key).map(move |head| (segment, block.clone(), head))).collect();
        let done: Vec<Result<Vec<T>>> = tasks
            .par_iter()
            .map(|(segment, block, key_head)| Block { qkv, heads, store, segment, block: block.clone(), key_head: *key_head, precision }.attend())
            .collect();
        let (group, stride) = (heads.group() * heads.width, heads.query * heads.width);
        let mut out = vec![T::ZERO; rows * stride];
        for ((segment, block, key_head), found) in tasks.iter().zip(done) {
            let rows = segment.rows.start + block.start..segment.rows.start + block.end;
            scatter(&mut out, stride, &rows, key_head * group, group, &found?);
        }
        cpu::tensor(out, (rows, stride))
    })
}

/// Some rows of a segment, and the query heads of one key head.
struct Block<'a, T> {
    qkv: &'a [T],
    heads: &'a Heads,
    store: &'a Store,
    segment: &'a Segment,
    /// Rows counted from the segment's first.
    block: Range<usize>,
    key_head: usize,
    precision: Precision,
}

impl<T: Real> Block<'_, T> {
    /// [rows, G * D]
    fn attend(&self) -> Result<Vec<T>> {
        let (width, group) = (self.heads.width, self.heads.group());
        let positions = self.segment.start + self.block.start..self.segment.start + self.block.end;
        let keys = self.heads.keys(&positions);
        let pages = keys.start / PAGE..(keys.end - 1) / PAGE + 1;
        let (base, span) = (pages.start * PAGE, pages.len() * PAGE);
        let (queries, rows) = (self.queries(), self.block.len() * group);
        let mut scores = vec![T::ZERO; rows * span];
        let mut scratch = Vec::new();
        let tokens = |page: usize| PAGE.min(keys.end - page * PAGE);
        for page in pages.clone() {
            let keys = self.page(&self.store.keys, page, tokens(page), &mut scratch)?;
            self.score(&mut scores[page * PAGE - base..], span, &queries, keys);
        }
        let softcap = self.heads.softcap.map(T::of);
        for (position, rows) in positions.zip(scores.chunks_mut(group * span)) {
            let from = self.heads.window.map_or(0, |window| (position + 1).saturating_sub(window));
            let seen = from - base..position + 1 - base;
            for row in rows.chunks_mut(span) {
                cpu::vectorized(
                    #[inline(always)]
                    || softmax_row(row, softcap, seen.clone()),
                );
            }
        }
        let mut out = vec![T::ZERO; rows * width];
        for page in pages {
            let values = self.page(&self.store.values, page, tokens(page), &mut scratch)?;
            self.add(&mut out, &scores[page * PAGE - base..], span, values);
        }
        Ok(out)
    }

    /// [rows * G, D]
    fn queries(&self) -> Vec<T> {
        let (columns, group) = (self.heads.columns(), self.heads.group());
        let first = self.heads.query_at(self.key_head * group);
        let rows = self.block.clone().map(|row| (self.segment.rows.start + row) * columns + first);
        rows.flat_map(|at| self.qkv[at..at + group * self.heads.width].iter().copied()).collect()
    }

    /// The first tokens of a page.
    fn page<'a>(
        &self,
        values: &'a Values,
        page: usize,
        tokens: usize,
        scratch: &'a mut Vec<T>,
    ) -> Result<&'a [T]> {
        let at = self.store.at(self.segment.pages[page], self.key_head, 0);
        values.read(at..at + tokens * self.heads.width, scratch)
    }

    /// scores[rows, ..tokens] = scale * queries keys^T
    fn score(&self, scores: &mut [T], span: usize, queries: &[T], keys: &[T]) {
        let (width, scale) = (self.heads.width, T::of(self.heads.scale));
        let (rows, tokens) = (queries.len() / width, keys.len() / width);
        if rows >= PRODUCT_ROWS_MIN {
            let (q, k) = (View::rows(queries, width), View::rows(keys, width).transposed());
            return T::gemm([rows, tokens, width], scale, q, k, T::ZERO, scores, span, self.precision);
        }
        cpu::vectorized(
            #[inline(always)]
            || {
                for (i, query) in queries.chunks_exact(width).enumerate() {
                    for (j, key) in keys.chunks_exact(width).enumerate() {
                        scores[i * span + j] = scale * cpu::dot(query, key);
                    }
                }
            },
        );
    }

    /// out += p[rows, ..tokens] values
    fn add(&self, out: &mut [T], p: &[T], span: usize, values: &[T]) {
        let width = self.heads.width;
        let (rows, tokens) = (out.len() / width, values.len() / width);
        if rows >= PRODUCT_ROWS_MIN {
            let (p, v) = (View::rows(p, span), View::rows(values, width));
            return T::gemm([rows, width, tokens], T::ONE, p, v, T::ONE, out, width, self.precision);
        }
        cpu::vectorized(
            #[inline(always)]
            || {
                for (i, out) in out.chunks_exact_mut(width).enumerate() {
                    for (j, value) in values.chunks_exact(width).enumerate() {
                        let p = p[i * span + j];
                        out.iter_mut().zip(value).for_each(|(out, value)| *out = p.fma(*value, *out));
                    }
                }
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::Layout;
    use crate::ops::judge;

    fn heads(query: usize, key: usize, window: Option<usize>, softcap: Option<f64>, layout: Layout) -> Heads {
        Heads { query, key, width: 6, scale: 0.4, window, softcap, layout }
    }

    /// Two sequences, their rows arriving in pieces of many sizes, side by side, over pages in disorder.
    #[test]
    fn rows_over_pages_equal_the_formula_over_the_whole_text() -> Result<()> {
        for heads in [
            heads(4, 2, None, None, Layout::Blocked),
            heads(6, 1, Some(5), None, Layout::Blocked),
            heads(8, 8, Some(40), Some(0.7), Layout::Blocked),
            heads(20, 2, Some(1), None, Layout::Grouped),
        ] {
            let lengths = [150usize, 71];
            let texts = [7, 8]
                .into_iter()
                .zip(lengths)
                .map(|(seed, rows)| judge::random((rows, heads.columns()), seed));
            let texts = texts.collect::<Result<Vec<_>>>()?;
            let expected =
                texts.iter().map(|text| super::super::formula(text, &heads)).collect::<Result<Vec<_>>>()?;
            let pages = [vec![6u32, 0, 3, 9, 1], vec![2, 8, 4]];
            let mut store = Store::new(10, &heads, DType::F64)?;
            let mut found = [Vec::new(), Vec::new()];
            let mut done = [0usize; 2];
            for pieces in [[100, 1], [1, 33], [33, 1], [15, 31], [1, 5]] {
                let mut segments = Vec::new();
                let mut rows = Vec::new();
                for (sequence, length) in pieces.into_iter().enumerate() {
                    let from = rows.iter().map(|rows: &Tensor| rows.dim(0).unwrap()).sum::<usize>();
                    rows.push(texts[sequence].narrow(0, done[sequence], length)?);
                    let (start, pages) = (done[sequence], pages[sequence].clone());
                    segments.push(Segment { rows: from..from + length, start, pages });
                    done[sequence] += length;
                }
                let qkv = Tensor::cat(&rows, 0)?;
                store.write(&qkv, &heads, &segments)?;
                let out = forward(&qkv, &heads, &store, &segments, Precision::F32)?;
                for (found, segment) in found.iter_mut().zip(&segments) {
                    found.push(out.narrow(0, segment.rows.start, segment.rows.len())?);
                }
            }
            assert_eq!(done, lengths);
            for (found, expected) in found.iter().zip(&expected) {
                judge::same(&Tensor::cat(found, 0)?, expected, 1e-12)?;
            }
        }
        Ok(())
    }

    /// bf16 pages round keys and values once, and nothing else.
    #[test]
    fn a_store_in_bf16_rounds_what_it_keeps() -> Result<()> {
        let heads = heads(2, 1, None, None, Layout::Blocked);
        let qkv = judge::random((40, heads.columns()), 3)?.to_dtype(DType::F32)?;
        let segments = [Segment { rows: 0..40, start: 0, pages: vec![1, 0] }];
        let attended = |qkv: &Tensor, dtype| {
            let mut store = Store::new(2, &heads, dtype)?;
            store.write(qkv, &heads, &segments)?;
            forward(qkv, &heads, &store, &segments, Precision::F32)
        };
        let (query, rest) = (qkv.narrow(1, 0, 12)?, qkv.narrow(1, 12, 12)?);
        let rounded = rest.to_dtype(DType::BF16)?.to_dtype(DType::F32)?;
        let rounded = Tensor::cat(&[query, rounded], 1)?.contiguous()?;
        judge::same(&attended(&qkv, DType::BF16)?, &attended(&rounded, DType::F32)?, 0.0)
    }
}
