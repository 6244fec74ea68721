//! New rows of several sequences over the keys and values that their earlier rows left in pages.
//!
//! Row i of a sequence sees its rows j with `i - window < j <= i`, as in `attention::formula`; here their keys and
//! values come from a `Store`. A row's bits depend on its own sequence alone: pages are taken in the order of
//! positions, and no sum spans two sequences. Serving has no backward pass. On a GPU the pages lie in its memory.

use std::any::Any;
use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor, bail};
use half::bf16;
use half::vec::HalfBitsVecExt;
use rayon::prelude::*;

use super::{scatter, softmax_row};
use crate::facts::{Heads, Precision};
use crate::ops::cpu::{self, Real};
use crate::ops::eight_bits;
use crate::ops::operand::View;
use crate::ops::rope::{self, Angles, Direction};
use crate::with_real;

#[cfg(feature = "cuda")]
mod gpu;

/// Tokens of a page.
pub const PAGE: usize = 32;
/// Query rows of a block of a task.
const BLOCK: usize = 64;
/// The smallest number of rows (rows of the block times heads of the group) for which a page is a matrix product.
const PRODUCT_ROWS_MIN: usize = 8;

/// Products of queries with keys below which waking a second thread costs more than it saves.
const PARALLEL_PRODUCTS_MIN: usize = 1 << 16;

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

/// The segments of a step, which all layers share.
pub struct Segments<'a> {
    list: &'a [Segment],
    #[cfg(feature = "cuda")]
    tables: gpu::Tables,
}

impl<'a> Segments<'a> {
    /// Returns the segments of one step, in the order of their rows.
    pub fn new(list: &'a [Segment]) -> Segments<'a> {
        Segments {
            list,
            #[cfg(feature = "cuda")]
            tables: gpu::Tables::default(),
        }
    }

    /// Copies what layers of these windows read of short segments to a GPU. Lists are filled up to few different
    /// lengths, so that steps with other lengths of context need the same launches.
    #[cfg(feature = "cuda")]
    pub fn send(&self, windows: impl IntoIterator<Item = Option<usize>>, device: &Device) -> Result<()> {
        self.send_filled_up(windows, device)
    }
}

/// Keys and values of one layer: `[page][key head][token of the page][D]`.
pub struct Store {
    keys: Values,
    values: Values,
    key_heads: usize,
    width: usize,
}

enum Values {
    /// On a GPU: f32, bf16, or the bytes of numbers in 8 bits.
    #[cfg(feature = "cuda")]
    There(Tensor),
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bf16(Vec<bf16>),
    EightBits(Vec<u8>),
}

impl Values {
    fn new(length: usize, dtype: DType, device: &Device) -> Result<Values> {
        #[cfg(feature = "cuda")]
        if device.is_cuda() {
            let bytes = if dtype == DType::F8E4M3 { DType::U8 } else { dtype };
            return Ok(Values::There(crate::ops::unwritten(length, bytes, device)?));
        }
        assert!(device.is_cpu(), "a cache on a device without kernels");
        Ok(match dtype {
            DType::F32 => Values::F32(vec![0.0; length]),
            DType::F64 => Values::F64(vec![0.0; length]),
            DType::BF16 => Values::Bf16(vec![0u16; length].reinterpret_into()),
            DType::F8E4M3 => Values::EightBits(vec![0; length]),
            other => bail!("a cache of {other:?}; expected f32, bf16 or 8 bits"),
        })
    }

    /// Returns the values of a range; those in fewer bits are widened into `scratch`.
    fn read<'a, T: Real>(&'a self, range: Range<usize>, scratch: &'a mut Vec<T>) -> Result<&'a [T]> {
        let same: Option<&Vec<T>> = match self {
            Values::F32(data) => (data as &dyn Any).downcast_ref(),
            Values::F64(data) => (data as &dyn Any).downcast_ref(),
            Values::Bf16(data) => {
                scratch.clear();
                scratch.extend(data[range].iter().map(|value| T::widen(*value)));
                return Ok(scratch);
            }
            Values::EightBits(data) => {
                scratch.clear();
                scratch.extend(data[range].iter().map(|value| eight_bits::widen::<T>(*value)));
                return Ok(scratch);
            }
            #[cfg(feature = "cuda")]
            Values::There(_) => bail!("the cache lies on a GPU, the activations do not"),
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
                // By way of f32: `from_f64` drops the lower half of a number before it rounds.
                let round = |value: &T| bf16::from_f32(value.wide() as f32);
                target.zip(values).for_each(|(target, value)| *target = round(value));
                return Ok(());
            }
            Values::EightBits(data) => {
                let target = data[at..at + values.len()].iter_mut();
                let round = |value: &T| eight_bits::narrow(value.wide() as f32);
                target.zip(values).for_each(|(target, value)| *target = round(value));
                return Ok(());
            }
            #[cfg(feature = "cuda")]
            Values::There(_) => bail!("the cache lies on a GPU, the activations do not"),
        };
        match same {
            Some(data) => data[at..at + values.len()].copy_from_slice(values),
            None => bail!("the cache's type is not that of the activations"),
        }
        Ok(())
    }
}

impl Store {
    /// Returns empty pages on the device that computes the layer.
    pub fn new(pages: usize, heads: &Heads, dtype: DType, device: &Device) -> Result<Store> {
        let length = pages * PAGE * heads.key * heads.width;
        let (keys, values) = (Values::new(length, dtype, device)?, Values::new(length, dtype, device)?);
        Ok(Store { keys, values, key_heads: heads.key, width: heads.width })
    }

    /// Returns the number of bytes of keys and values of one token in one layer.
    pub fn token_bytes(heads: &Heads, dtype: DType) -> usize {
        2 * heads.key * heads.width * dtype.size_in_bytes()
    }

    /// Returns the first value of a token of a page.
    fn at(&self, page: u32, key_head: usize, token: usize) -> usize {
        ((page as usize * self.key_heads + key_head) * PAGE + token) * self.width
    }

    /// Turns queries and keys of qkv's rows by their angles, in place, and keeps keys and values.
    pub fn turn_and_write(
        &mut self,
        qkv: &Tensor,
        heads: &Heads,
        segments: &Segments,
        angles: Option<&Angles>,
    ) -> Result<()> {
        #[cfg(feature = "cuda")]
        if qkv.device().is_cuda() {
            return gpu::write(qkv, heads, self, segments, angles);
        }
        if let Some(angles) = angles {
            let ((rows, columns), (runs, turning)) = (qkv.dims2()?, heads.turning());
            let runs = qkv.reshape((rows * runs, columns / runs))?;
            rope::rotate(&runs, turning, heads.width, angles, Direction::Forward)?;
        }
        self.write(qkv, heads, segments)
    }

    /// Keeps keys and values of qkv's rows, after rope.
    pub fn write(&mut self, qkv: &Tensor, heads: &Heads, segments: &Segments) -> Result<()> {
        #[cfg(feature = "cuda")]
        if qkv.device().is_cuda() {
            return gpu::write(qkv, heads, self, segments, None);
        }
        with_real!(qkv, T => {
            let qkv = &*cpu::read::<T>(qkv)?;
            for segment in segments.list {
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
    segments: &Segments,
    precision: Precision,
) -> Result<Tensor> {
    let (rows, columns) = qkv.dims2()?;
    assert_eq!(columns, heads.columns(), "columns of qkv");
    #[cfg(feature = "cuda")]
    if qkv.device().is_cuda() {
        return gpu::forward(qkv, heads, store, segments);
    }
    with_real!(qkv, T => {
        let qkv = &*cpu::read::<T>(qkv)?;
        let blocks = segments.list.iter().flat_map(|segment| {
            let blocks = (0..segment.rows.len()).step_by(BLOCK);
            blocks.map(move |from| from..(from + BLOCK).min(segment.rows.len())).map(move |block| (segment, block))
        });
        let tasks: Vec<_> = blocks.flat_map(|(segment, block)| (0..heads.key).map(move |head| (segment, block.clone(), head))).collect();
        let attend = |(segment, block, key_head): &(&Segment, Range<usize>, usize)| {
            Block { qkv, heads, store, segment, block: block.clone(), key_head: *key_head, precision }.attend()
        };
        let products: usize = segments.list.iter().map(|segment| segment.rows.len() * (segment.start + segment.rows.len())).sum();
        let done: Vec<Result<Vec<T>>> = match products * heads.query * heads.width < PARALLEL_PRODUCTS_MIN {
            true => tasks.iter().map(attend).collect(),
            false => tasks.par_iter().map(attend).collect(),
        };
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

    /// Returns the first tokens of a page.
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
            let mut store = Store::new(10, &heads, DType::F64, &Device::Cpu)?;
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
                let shared = Segments::new(&segments);
                store.write(&qkv, &heads, &shared)?;
                let out = forward(&qkv, &heads, &store, &shared, Precision::F32)?;
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

    /// Narrow pages round keys and values once, and nothing else.
    #[test]
    fn a_store_of_fewer_bits_rounds_what_it_keeps() -> Result<()> {
        let heads = heads(2, 1, None, None, Layout::Blocked);
        let qkv = judge::random((40, heads.columns()), 3)?.to_dtype(DType::F32)?;
        let segments = [Segment { rows: 0..40, start: 0, pages: vec![1, 0] }];
        let attended = |qkv: &Tensor, dtype| {
            let mut store = Store::new(2, &heads, dtype, &Device::Cpu)?;
            let segments = Segments::new(&segments);
            store.write(qkv, &heads, &segments)?;
            forward(qkv, &heads, &store, &segments, Precision::F32)
        };
        let (query, rest) = (qkv.narrow(1, 0, 12)?, qkv.narrow(1, 12, 12)?);
        let eight = |value: f32| eight_bits::widen::<f32>(eight_bits::narrow(value));
        let eight = rest.contiguous()?.flatten_all()?.to_vec1::<f32>()?.into_iter().map(eight).collect();
        let eight = Tensor::from_vec(eight, rest.dims(), &Device::Cpu)?;
        for (dtype, rounded) in
            [(DType::BF16, rest.to_dtype(DType::BF16)?.to_dtype(DType::F32)?), (DType::F8E4M3, eight)]
        {
            let rounded = Tensor::cat(&[&query, &rounded], 1)?.contiguous()?;
            judge::same(&attended(&qkv, dtype)?, &attended(&rounded, DType::F32)?, 0.0)?;
        }
        Ok(())
    }

    /// Query heads, key heads, width, window, cap, layout.
    type Case = (usize, usize, usize, Option<usize>, Option<f64>, Layout);

    /// The cases that kernels distinguish: groups of 1, below, at and beyond four heads, every padded width, odd
    /// widths, windows shorter than a page and longer than a piece.
    const GPU_CASES: [Case; 8] = [
        (2, 2, 96, None, None, Layout::Blocked),
        (4, 1, 128, Some(70), None, Layout::Blocked),
        (6, 2, 64, None, Some(2.0), Layout::Blocked),
        (5, 1, 20, Some(5), None, Layout::Blocked),
        (9, 1, 64, None, None, Layout::Grouped),
        (2, 2, 6, Some(40), Some(0.7), Layout::Blocked),
        (2, 1, 256, Some(100), None, Layout::Blocked),
        (3, 3, 32, None, None, Layout::Blocked),
    ];

    /// Prompts in chunks beside rows that generate, over pages in disorder: all as the CPU has it, and a row's
    /// bits are the same alone and among others.
    #[test]
    fn rows_over_pages_on_a_gpu_equal_the_hosts() -> Result<()> {
        judge::on_gpu(|gpu| {
            for (query, key, width, window, softcap, layout) in GPU_CASES {
                let scale = (width as f64).powf(-0.5);
                let heads = Heads { query, key, width, scale, window, softcap, layout };
                let caches = match gpu.dtype {
                    DType::F32 => &[DType::F32, DType::BF16, DType::F8E4M3][..],
                    _ => &[DType::BF16, DType::F8E4M3],
                };
                for &cache in caches {
                    check(gpu, &heads, cache)?;
                }
            }
            Ok(())
        })
    }

    fn check(gpu: &judge::Gpu, heads: &Heads, cache: DType) -> Result<()> {
        let pages = [vec![6u32, 0, 3, 9, 1, 11], vec![2, 8, 4], vec![5], vec![12, 10, 7]];
        let host = if cache == DType::F32 { DType::F64 } else { cache };
        let mut stores = (
            Store::new(13, heads, cache, &gpu.device)?,
            Store::new(13, heads, cache, &gpu.device)?,
            Store::new(13, heads, host, &Device::Cpu)?,
        );
        let mut done = [0usize; 4];
        // The third sequence waits, then comes with so few rows that each is read by itself.
        for (step, pieces) in
            [[100, 17, 0, 40], [1, 1, 0, 1], [33, 1, 5, 20], [1, 30, 1, 1], [1, 1, 1, 15]].iter().enumerate()
        {
            let mut segments = Vec::new();
            let mut from = 0;
            for (sequence, &length) in pieces.iter().enumerate().filter(|(_, length)| **length > 0) {
                let (start, pages) = (done[sequence], pages[sequence].clone());
                segments.push(Segment { rows: from..from + length, start, pages });
                done[sequence] += length;
                from += length;
            }
            let qkv = gpu.random((from, heads.columns()), step as u64)?;
            let shared = Segments::new(&segments);
            stores.2.write(&qkv, heads, &shared)?;
            let expected = forward(&qkv, heads, &stores.2, &shared, Precision::F32)?;
            let there = gpu.put(&qkv)?;
            stores.0.write(&there, heads, &shared)?;
            let found = forward(&there, heads, &stores.0, &shared, Precision::F32)?;
            gpu.same(&found, &expected)?;
            for segment in &segments {
                let (from, rows) = (segment.rows.start, segment.rows.len());
                let alone = [Segment { rows: 0..rows, ..segment.clone() }];
                let (alone, qkv) = (Segments::new(&alone), there.narrow(0, from, rows)?.force_contiguous()?);
                stores.1.write(&qkv, heads, &alone)?;
                let alone = forward(&qkv, heads, &stores.1, &alone, Precision::F32)?;
                gpu.within(0.0, &alone, &found.narrow(0, from, rows)?.copy()?.to_device(&Device::Cpu)?)?;
            }
        }
        Ok(())
    }

    /// Contexts of more pieces than one, of every size of piece.
    #[test]
    fn long_contexts_on_a_gpu_are_combined_in_order() -> Result<()> {
        judge::on_gpu(|gpu| {
            for (tokens, window) in [(1000usize, None), (1100, Some(600)), (1100, None), (4200, None)] {
                let heads = Heads { window, ..heads(4, 1, None, None, Layout::Blocked) };
                let pages: Vec<u32> = (0..tokens.div_ceil(PAGE) as u32).rev().collect();
                let mut found = Vec::new();
                for device in [&gpu.device, &Device::Cpu] {
                    let on_host = device.is_cpu();
                    let kind = if on_host { DType::F64 } else { gpu.dtype };
                    let mut store = Store::new(pages.len(), &heads, kind, device)?;
                    for (start, rows) in [(0, tokens - 3), (tokens - 3, 3)] {
                        let segments = [Segment { rows: 0..rows, start, pages: pages.clone() }];
                        let segments = Segments::new(&segments);
                        let qkv = gpu.random((rows, heads.columns()), start as u64)?;
                        let qkv = if on_host { qkv.as_tensor().clone() } else { gpu.put(&qkv)? };
                        store.write(&qkv, &heads, &segments)?;
                        if start > 0 {
                            found.push(forward(&qkv, &heads, &store, &segments, Precision::F32)?);
                            // Lists that are filled up change nothing.
                            #[cfg(feature = "cuda")]
                            if !on_host {
                                let filled_up = Segments::new(segments.list);
                                filled_up.send([window], device)?;
                                let again = forward(&qkv, &heads, &store, &filled_up, Precision::F32)?;
                                let brought = |y: &Tensor| y.to_device(&Device::Cpu);
                                gpu.within(0.0, &brought(&again)?, &brought(&found[0])?)?;
                            }
                        }
                    }
                }
                gpu.same(&found[0], &found[1])?;
            }
            Ok(())
        })
    }

    /// Turning and keeping in one launch is turning, then keeping: whole and partial turns, both layouts, odd
    /// widths.
    #[cfg(feature = "cuda")]
    #[test]
    fn a_gpu_turns_what_it_keeps_as_rope_does() -> Result<()> {
        judge::on_gpu(|gpu| {
            for (query, key, width, half, layout) in [
                (4, 2, 96, 48, Layout::Blocked),
                (6, 2, 64, 16, Layout::Grouped),
                (3, 1, 20, 5, Layout::Blocked),
                (2, 2, 32, 8, Layout::Blocked),
            ] {
                let heads = Heads { width, ..heads(query, key, None, None, layout) };
                let (rows, (runs, _)) = (5, heads.turning());
                let segments = [Segment { rows: 0..rows, start: 30, pages: vec![1, 0] }];
                let segments = Segments::new(&segments);
                let theta = judge::random((rows, half), 2)?;
                let run = |part: Tensor| -> Result<Tensor> {
                    let rows =
                        (0..rows).map(|row| part.narrow(0, row, 1)?.broadcast_as((runs, half))?.contiguous());
                    Tensor::cat(&rows.collect::<Result<Vec<_>>>()?, 0)
                };
                let on = |device: &Device, dtype: DType| -> Result<Angles> {
                    let put = |part: Tensor| run(part)?.to_dtype(dtype)?.to_device(device);
                    Ok(Angles { cos: put(theta.cos()?)?, sin: put(theta.sin()?)? })
                };
                for cache in [gpu.dtype, DType::BF16] {
                    let qkv = gpu.random((rows, heads.columns()), 1)?;
                    let (there, here) = (gpu.put(&qkv)?, qkv.copy()?);
                    let mut stores = (
                        Store::new(2, &heads, cache, &gpu.device)?,
                        Store::new(2, &heads, DType::F64, &Device::Cpu)?,
                    );
                    stores.0.turn_and_write(
                        &there,
                        &heads,
                        &segments,
                        Some(&on(&gpu.device, DType::F32)?),
                    )?;
                    stores.1.turn_and_write(
                        &here,
                        &heads,
                        &segments,
                        Some(&on(&Device::Cpu, DType::F64)?),
                    )?;
                    gpu.same(&there, &here)?;
                    let Values::There(keys) = &stores.0.keys else { unreachable!() };
                    let Values::There(values) = &stores.0.values else { unreachable!() };
                    let (Values::F64(own_keys), Values::F64(own_values)) = (&stores.1.keys, &stores.1.values)
                    else {
                        unreachable!()
                    };
                    for (found, expected) in [(keys, own_keys), (values, own_values)] {
                        for key_head in 0..heads.key {
                            for position in 30..35 {
                                let at = stores.1.at([1, 0][position / PAGE], key_head, position % PAGE);
                                let expected = Tensor::new(&expected[at..at + width], &Device::Cpu)?;
                                let found = found.narrow(0, at, width)?.copy()?;
                                // TOLERANCE: rounded to bf16 by the activations, the cache or both.
                                let bound = if cache == DType::F32 { 2e-6 } else { 8e-3 };
                                gpu.within(bound, &found, &expected)?;
                            }
                        }
                    }
                }
            }
            Ok(())
        })
    }
}
