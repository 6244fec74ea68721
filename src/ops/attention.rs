//! Causal attention over packed examples, with grouped query heads, an optional window and an optional soft cap.
//! Score matrices exist for one block at a time.
//!
//! Row i of an example attends to rows j of the same example with `i - window < j <= i`. `qkv` is one matrix
//! [T, (H + 2K) * D] whose heads stand in the order of the checkpoint's rows (`Layout`). The backward pass computes the
//! probabilities again from the logsumexp that forward returned, block by block (Dao 2022).

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use super::change::Change;
use super::cpu::{self, Real};
use super::operand::View;
use super::rope::{self, Angles, Direction};
use crate::facts::{Heads, Precision};
use crate::with_real;

pub mod cached;
#[cfg(feature = "cuda")]
mod gpu;
#[cfg(feature = "cuda")]
mod hopper;
mod packing;

#[cfg(feature = "cuda")]
pub use hopper::{has_warpgroups, prepare};
pub use packing::Packing;

/// Checks which kernels this device may use for such heads. Returns a warning, once, if some are not used. Waits for
/// the device.
#[cfg(not(feature = "cuda"))]
pub fn prepare(_: &Device, _: &Heads, _: candle_core::DType) -> Option<String> {
    None
}

/// Query rows per block. The scores of a block stay within the CPU's cache for lengths up to a few thousand.
const BLOCK: usize = 128;

/// Computes the definition for one example in differentiable primitives: qkv [T, (H + 2K) * D] -> [T, H * D].
pub fn formula(qkv: &Tensor, heads: &Heads) -> Result<Tensor> {
    let rows = qkv.dim(0)?;
    let part = |at: &dyn Fn(usize) -> usize, count: usize| {
        let heads = (0..count).map(|head| qkv.narrow(1, at(head), heads.width)?.unsqueeze(0));
        Tensor::cat(&heads.collect::<Result<Vec<_>>>()?, 0) // [count, T, D]
    };
    let q = part(&|head| heads.query_at(head), heads.query)?;
    let k = part(&|head| heads.key_at(head / heads.group()), heads.query)?;
    let v = part(&|head| heads.value_at(head / heads.group()), heads.query)?;
    let hidden = |i: usize| (0..rows).map(move |j| if heads.sees(i, j) { 0.0 } else { f64::NEG_INFINITY });
    let mask: Vec<f64> = (0..rows).flat_map(hidden).collect();
    let mask = Tensor::from_vec(mask, (1, rows, rows), &Device::Cpu)?.to_dtype(qkv.dtype())?;
    let mut scores = (q.matmul(&k.transpose(1, 2)?.contiguous()?)? * heads.scale)?;
    if let Some(cap) = heads.softcap {
        scores = ((scores / cap)?.tanh()? * cap)?;
    }
    let scores = scores.broadcast_add(&mask)?;
    let e = scores.broadcast_sub(&scores.max_keepdim(2)?.detach())?.exp()?;
    let p = e.broadcast_div(&e.sum_keepdim(2)?)?;
    p.matmul(&v)?.transpose(0, 1)?.contiguous()?.reshape((rows, heads.query * heads.width))
}

/// qkv [T, (H + 2K) * D] after rope -> output [T, H * D] and logsumexp [H, T], which is f32 on a GPU. The examples
/// of `packing` cover rows 0..T.
pub fn forward(
    qkv: &Tensor,
    heads: &Heads,
    packing: &Packing,
    precision: Precision,
) -> Result<(Tensor, Tensor)> {
    forward_beside(qkv, heads, packing, precision, 0)
}

/// Does `forward` into the first columns of [T, H * D + spare]; the spare columns are not written. They need a GPU.
pub fn forward_beside(
    qkv: &Tensor,
    heads: &Heads,
    packing: &Packing,
    precision: Precision,
    spare: usize,
) -> Result<(Tensor, Tensor)> {
    let (rows, columns) = qkv.dims2()?;
    assert_eq!(columns, heads.columns(), "columns of qkv");
    #[cfg(feature = "cuda")]
    if qkv.device().is_cuda() {
        return hopper::forward(qkv, heads, packing, spare);
    }
    assert_eq!(spare, 0, "spare columns on a CPU");
    with_real!(qkv, T => {
        let qkv = &*cpu::read::<T>(qkv)?;
        let tasks = tasks(packing.examples(), heads.query);
        let blocks: Vec<(Vec<T>, Vec<T>)> = tasks
            .par_iter()
            .map(|(example, head)| forward_head(&qkv[example.start * columns..example.end * columns], heads, *head, precision))
            .collect();
        let width = heads.width;
        let mut out = vec![T::ZERO; rows * heads.query * width];
        let mut lse = vec![T::ZERO; heads.query * rows];
        for ((example, head), (block, block_lse)) in tasks.iter().zip(&blocks) {
            lse[head * rows + example.start..][..example.len()].copy_from_slice(block_lse);
            scatter(&mut out, heads.query * width, example, head * width, width, block);
        }
        Ok((cpu::tensor(out, (rows, heads.query * width))?, cpu::tensor(lse, (heads.query, rows))?))
    })
}

/// Returns the gradient of qkv from the output, its gradient (both [T, H * D]) and the logsumexp of `forward`.
pub fn backward(
    d_out: &Tensor,
    qkv: &Tensor,
    out: &Tensor,
    lse: &Tensor,
    heads: &Heads,
    packing: &Packing,
    precision: Precision,
) -> Result<Tensor> {
    backward_beside(d_out, qkv, out, lse, heads, packing, precision, 0)
}

/// Does `backward` into the first columns of a matrix with `spare` more, which are not written. The output may have
/// spare columns too. Both need a GPU.
#[allow(clippy::too_many_arguments)]
fn backward_beside(
    d_out: &Tensor,
    qkv: &Tensor,
    out: &Tensor,
    lse: &Tensor,
    heads: &Heads,
    packing: &Packing,
    precision: Precision,
    spare: usize,
) -> Result<Tensor> {
    let (rows, columns) = qkv.dims2()?;
    #[cfg(feature = "cuda")]
    if qkv.device().is_cuda() {
        return hopper::backward(d_out, qkv, out, lse, heads, packing, None, spare);
    }
    assert_eq!(spare, 0, "spare columns on a CPU");
    with_real!(qkv, T => {
        let (qkv, out) = (&*cpu::read::<T>(qkv)?, &*cpu::read::<T>(out)?);
        let (d_out, lse) = (&*cpu::read::<T>(d_out)?, &*cpu::read::<T>(lse)?);
        let (width, stride) = (heads.width, heads.query * heads.width);
        // One task takes all query heads of a key head, so that only one task writes the key head's gradient.
        let tasks = tasks(packing.examples(), heads.key);
        let blocks: Vec<Gradients<T>> = tasks
            .par_iter()
            .map(|(example, key_head)| {
                let saved = Saved {
                    qkv: &qkv[example.start * columns..example.end * columns],
                    out: &out[example.start * stride..example.end * stride],
                    d_out: &d_out[example.start * stride..example.end * stride],
                    lse: &|head| &lse[head * rows + example.start..head * rows + example.end],
                };
                backward_group(&saved, heads, *key_head, precision)
            })
            .collect();
        let mut d = vec![T::ZERO; rows * columns];
        for ((example, key_head), block) in tasks.iter().zip(&blocks) {
            let group = heads.group();
            scatter(&mut d, columns, example, heads.query_at(key_head * group), group * width, &block.query);
            scatter(&mut d, columns, example, heads.key_at(*key_head), width, &block.key);
            scatter(&mut d, columns, example, heads.value_at(*key_head), width, &block.value);
        }
        cpu::tensor(d, (rows, columns))
    })
}

/// Does `backward_beside`, with the gradients of queries and keys turned back by the angles that turned them, if there
/// are some (`Heads::turning`). Several runs of heads leave no room for spare columns.
#[allow(clippy::too_many_arguments)]
pub fn backward_turned(
    d_out: &Tensor,
    qkv: &Tensor,
    out: &Tensor,
    lse: &Tensor,
    heads: &Heads,
    packing: &Packing,
    angles: Option<&Angles>,
    precision: Precision,
    spare: usize,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if qkv.device().is_cuda() && Change::Turned.is_on() {
        return hopper::backward(d_out, qkv, out, lse, heads, packing, angles, spare);
    }
    let d = backward_beside(d_out, qkv, out, lse, heads, packing, precision, spare)?;
    angles.map_or(Ok(()), |angles| turn(&d, heads, angles, Direction::Backward))?;
    Ok(d)
}

/// Copies what `forward` and `backward` read of a packing to the device, for activations of this type. They do it
/// themselves if it was not done.
pub fn send(packing: &Packing, heads: &Heads, dtype: DType, device: &Device) -> Result<()> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return hopper::send_tiles(packing, heads, dtype, device);
    }
    let _ = (packing, heads, dtype, device);
    Ok(())
}

/// Turns queries and keys of qkv in place. Each row has one row of angles for each of the heads' runs.
pub fn turn(qkv: &Tensor, heads: &Heads, angles: &Angles, direction: Direction) -> Result<()> {
    let ((rows, columns), (runs, turning)) = (qkv.dims2()?, heads.turning());
    let runs = qkv.reshape((rows * runs, columns / runs))?;
    rope::rotate(&runs, turning, heads.width, angles, direction)
}

/// Returns every (example, head), longest examples first so that threads finish at about the same time.
fn tasks(examples: &[Range<usize>], heads: usize) -> Vec<(Range<usize>, usize)> {
    let mut order: Vec<&Range<usize>> = examples.iter().collect();
    order.sort_by_key(|example| std::cmp::Reverse(example.len()));
    order.into_iter().flat_map(|example| (0..heads).map(move |head| (example.clone(), head))).collect()
}

/// Copies `block` [rows, width] into columns `at..at+width` of the given rows of `matrix`.
fn scatter<T: Copy>(
    matrix: &mut [T],
    stride: usize,
    rows: &Range<usize>,
    at: usize,
    width: usize,
    block: &[T],
) {
    for (row, values) in rows.clone().zip(block.chunks(width)) {
        matrix[row * stride + at..][..width].copy_from_slice(values);
    }
}

fn blocks(rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(BLOCK).map(move |from| from..(from + BLOCK).min(rows))
}

/// Returns the attention of one head in one example: output [t, D] and logsumexp `[t]`.
fn forward_head<T: Real>(qkv: &[T], heads: &Heads, head: usize, precision: Precision) -> (Vec<T>, Vec<T>) {
    let (columns, width) = (heads.columns(), heads.width);
    let rows = qkv.len() / columns;
    let key_head = head / heads.group();
    let (q, k) = (&qkv[heads.query_at(head)..], &qkv[heads.key_at(key_head)..]);
    let v = &qkv[heads.value_at(key_head)..];
    let (mut out, mut lse) = (vec![T::ZERO; rows * width], vec![T::ZERO; rows]);
    let mut scores = Vec::new();
    for block in blocks(rows) {
        let keys = heads.keys(&block);
        scores.resize(block.len() * keys.len(), T::ZERO);
        score(&mut scores, q, k, columns, &block, &keys, heads, precision);
        cpu::vectorized(
            #[inline(always)]
            || {
                for (i, row) in block.clone().zip(scores.chunks_mut(keys.len())) {
                    lse[i] = softmax_row(row, heads.softcap.map(T::of), seen(heads, i, &keys));
                }
            },
        );
        let v = View::rows(&v[keys.start * columns..], columns);
        let out = &mut out[block.start * width..];
        let p = View::rows(scores.as_slice(), keys.len());
        T::gemm([block.len(), width, keys.len()], T::ONE, p, v, T::ZERO, out, width, precision);
    }
    (out, lse)
}

/// `scores = scale * q k^T` for a block of rows and its keys.
#[allow(clippy::too_many_arguments)]
fn score<T: Real>(
    scores: &mut [T],
    q: &[T],
    k: &[T],
    columns: usize,
    block: &Range<usize>,
    keys: &Range<usize>,
    heads: &Heads,
    precision: Precision,
) {
    let q = View::rows(&q[block.start * columns..], columns);
    let k = View::rows(&k[keys.start * columns..], columns).transposed();
    let mnk = [block.len(), keys.len(), heads.width];
    T::gemm(mnk, T::of(heads.scale), q, k, T::ZERO, scores, keys.len(), precision);
}

/// Returns columns of a score row that row i attends to, counted from the block's first key.
fn seen(heads: &Heads, i: usize, keys: &Range<usize>) -> Range<usize> {
    let from = heads.window.map_or(0, |window| (i + 1).saturating_sub(window));
    from - keys.start..i + 1 - keys.start
}

/// Computes the softmax over the columns `seen` and sets the others to zero. Returns the logsumexp.
#[inline(always)]
fn softmax_row<T: Real>(row: &mut [T], softcap: Option<T>, seen: Range<usize>) -> T {
    if let Some(cap) = softcap {
        row[seen.clone()].iter_mut().for_each(|score| *score = cap * Real::tanh(*score / cap));
    }
    let largest = cpu::largest(&row[seen.clone()]);
    row[..seen.start].fill(T::ZERO);
    row[seen.end..].fill(T::ZERO);
    let visible = &mut row[seen];
    for score in visible.iter_mut() {
        *score = Real::exp(*score - largest);
    }
    let sum = cpu::sum(visible);
    let scale = T::ONE / sum;
    visible.iter_mut().for_each(|p| *p *= scale);
    largest + T::of(sum.wide().ln())
}

/// The tensors of one example that the backward pass reads.
struct Saved<'a, T> {
    qkv: &'a [T],
    out: &'a [T],
    d_out: &'a [T],
    lse: &'a dyn Fn(usize) -> &'a [T],
}

/// Gradients of one key head's group in one example: query [t, G * D], key and value [t, D].
struct Gradients<T> {
    query: Vec<T>,
    key: Vec<T>,
    value: Vec<T>,
}

fn backward_group<T: Real>(
    saved: &Saved<T>,
    heads: &Heads,
    key_head: usize,
    precision: Precision,
) -> Gradients<T> {
    let (columns, width, group) = (heads.columns(), heads.width, heads.group());
    let stride = heads.query * width;
    let rows = saved.qkv.len() / columns;
    let (k, v) = (&saved.qkv[heads.key_at(key_head)..], &saved.qkv[heads.value_at(key_head)..]);
    let factors = Factors { scale: T::of(heads.scale), softcap: heads.softcap.map(T::of) };
    let mut d = Gradients {
        query: vec![T::ZERO; rows * group * width],
        key: vec![T::ZERO; rows * width],
        value: vec![T::ZERO; rows * width],
    };
    let (mut p, mut dp) = (Vec::new(), Vec::new());
    for member in 0..group {
        let head = key_head * group + member;
        let q = &saved.qkv[heads.query_at(head)..];
        let (out, d_out) = (&saved.out[head * width..], &saved.d_out[head * width..]);
        let lse = (saved.lse)(head);
        for block in blocks(rows) {
            let keys = heads.keys(&block);
            p.resize(block.len() * keys.len(), T::ZERO);
            dp.resize(block.len() * keys.len(), T::ZERO);
            score(&mut p, q, k, columns, &block, &keys, heads, precision);
            let d_rows = View::rows(&d_out[block.start * stride..], stride);
            let v_keys = View::rows(&v[keys.start * columns..], columns);
            let mnk = [block.len(), keys.len(), width];
            T::gemm(mnk, T::ONE, d_rows, v_keys.transposed(), T::ZERO, &mut dp, keys.len(), precision);
            cpu::vectorized(
                #[inline(always)]
                || {
                    let rows = p.chunks_mut(keys.len()).zip(dp.chunks_mut(keys.len()));
                    for (i, (p, dp)) in block.clone().zip(rows) {
                        let (out, d_out) = (&out[i * stride..][..width], &d_out[i * stride..][..width]);
                        let delta = cpu::dot(out, d_out);
                        score_gradient_row(p, dp, lse[i], delta, factors, seen(heads, i, &keys));
                    }
                },
            );
            let p = View::rows(p.as_slice(), keys.len());
            let ds = View::rows(dp.as_slice(), keys.len());
            let transposed = [keys.len(), width, block.len()];
            T::gemm(
                transposed,
                T::ONE,
                p.transposed(),
                d_rows,
                T::ONE,
                &mut d.value[keys.start * width..],
                width,
                precision,
            );
            let q_rows = View::rows(&q[block.start * columns..], columns);
            T::gemm(
                transposed,
                T::ONE,
                ds.transposed(),
                q_rows,
                T::ONE,
                &mut d.key[keys.start * width..],
                width,
                precision,
            );
            let k_keys = View::rows(&k[keys.start * columns..], columns);
            let d_query = &mut d.query[(block.start * group + member) * width..];
            T::gemm(
                [block.len(), width, keys.len()],
                T::ONE,
                ds,
                k_keys,
                T::ZERO,
                d_query,
                group * width,
                precision,
            );
        }
    }
    d
}

#[derive(Clone, Copy)]
struct Factors<T> {
    scale: T,
    softcap: Option<T>,
}

/// Turns scores into probabilities, and the gradient of the probabilities into that of the scores: `p * (dp -
/// delta) * scale`, times the slope of tanh if there is a soft cap.
#[inline(always)]
fn score_gradient_row<T: Real>(
    p: &mut [T],
    dp: &mut [T],
    lse: T,
    delta: T,
    factors: Factors<T>,
    seen: Range<usize>,
) {
    for side in [0..seen.start, seen.end..p.len()] {
        p[side.clone()].fill(T::ZERO);
        dp[side].fill(T::ZERO);
    }
    let Factors { scale, softcap } = factors;
    let visible = p[seen.clone()].iter_mut().zip(&mut dp[seen]);
    match softcap {
        None => visible.for_each(|(p, dp)| {
            *p = Real::exp(*p - lse);
            *dp = *p * (*dp - delta) * scale;
        }),
        Some(cap) => visible.for_each(|(p, dp)| {
            let t = Real::tanh(*p / cap);
            *p = Real::exp(cap * t - lse);
            *dp = *p * (*dp - delta) * scale * (T::ONE - t * t);
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::Layout;
    use crate::ops::judge;

    const PLAIN: Heads = Heads {
        query: 1,
        key: 1,
        width: 1,
        scale: 0.37,
        window: None,
        softcap: None,
        layout: Layout::Blocked,
    };

    /// Returns one example and packed examples of odd lengths around the block size; GQA 1, 2 and 4; windows, caps,
    /// both layouts.
    fn cases() -> Vec<(Heads, Vec<usize>)> {
        let heads = |query, key, width, window| Heads { query, key, width, window, ..PLAIN };
        let grouped = |heads: Heads| Heads { layout: Layout::Grouped, ..heads };
        let capped = |heads: Heads| Heads { softcap: Some(0.9), ..heads };
        vec![
            (heads(1, 1, 1, None), vec![1]),
            (heads(4, 2, 6, None), vec![5, 1, 9]),
            (heads(4, 1, 8, Some(3)), vec![7, 2]),
            (heads(2, 2, 4, None), vec![63, 64, 65]),
            (heads(3, 3, 5, Some(40)), vec![129, 130]),
            (heads(8, 1, 3, Some(1)), vec![66]),
            (grouped(heads(6, 2, 3, None)), vec![5, 130]),
            (grouped(heads(3, 3, 4, Some(6))), vec![9]),
            (capped(heads(4, 2, 5, Some(20))), vec![3, 131]),
            (capped(grouped(heads(4, 2, 5, None))), vec![17, 2]),
        ]
    }

    fn examples(lengths: &[usize]) -> Packing {
        let mut from = 0;
        let examples = lengths
            .iter()
            .map(|&length| {
                from += length;
                from - length..from
            })
            .collect();
        Packing::new(examples)
    }

    /// Lists head widths of every kernel and between them, aligned and not; lengths on both sides of a tile; packed
    /// examples.
    fn gpu_cases() -> Vec<(Heads, Vec<usize>)> {
        // Scores of about unit size, so that probabilities are neither all equal nor all on one key.
        let heads = |query, key, width: usize, window| {
            let scale = 1.5 / (width as f64).sqrt();
            Heads { query, key, width, window, scale, ..PLAIN }
        };
        let grouped = |heads: Heads| Heads { layout: Layout::Grouped, ..heads };
        let capped = |heads: Heads| Heads { softcap: Some(1.1), ..heads };
        vec![
            (heads(1, 1, 3, None), vec![1]),
            (heads(4, 2, 6, None), vec![5, 1, 9]),
            (heads(4, 1, 8, Some(3)), vec![63, 2]),
            (heads(2, 2, 16, None), vec![64, 65]),
            (heads(8, 1, 32, Some(1)), vec![66]),
            (capped(grouped(heads(4, 2, 24, None))), vec![70, 3]),
            (heads(2, 1, 64, None), vec![200]),
            (heads(2, 1, 64, Some(40)), vec![1, 127, 130]),
            (heads(2, 2, 80, None), vec![5, 129]),
            (heads(2, 2, 96, Some(100)), vec![130, 65]),
            (capped(grouped(heads(4, 1, 128, None))), vec![127, 9]),
            (capped(heads(2, 1, 128, Some(40))), vec![200]),
            (capped(heads(2, 1, 256, None)), vec![65, 1]),
            // Several tiles of the kernels for Hopper; windows that begin inside one.
            (heads(4, 1, 128, Some(70)), vec![200, 33]),
            (grouped(heads(4, 2, 64, None)), vec![1, 290]),
            (heads(2, 1, 256, Some(90)), vec![150]),
            // Enough blocks for wide tiles.
            (heads(2, 2, 128, None), [vec![130, 65], vec![1; 64]].concat()),
            (heads(2, 2, 200, Some(50)), [vec![65], vec![2; 65]].concat()),
            (heads(2, 2, 96, None), [vec![130, 65], vec![1; 64]].concat()),
        ]
    }

    fn formula_of_each(qkv: &Tensor, heads: &Heads, packing: &Packing) -> Result<Tensor> {
        let part = |example: &Range<usize>| formula(&qkv.narrow(0, example.start, example.len())?, heads);
        Tensor::cat(&packing.examples().iter().map(part).collect::<Result<Vec<_>>>()?, 0)
    }

    /// Returns the TOLERANCE for backward's results, in norm. There are three products in a row. The probabilities and
    /// their gradient are rounded between them, by 2^-9 each.
    fn tolerances(dtype: candle_core::DType) -> (f64, f64) {
        match dtype {
            candle_core::DType::BF16 => (6e-3, 1e-2),
            _ => (2e-6, 4e-6),
        }
    }

    /// Compares every third case with the formula. The cases are three tests, so that an emulated GPU computes them
    /// side by side.
    fn every_third_case_equals_the_formula(gpu: &judge::Gpu, first: usize) -> Result<()> {
        for (heads, lengths) in gpu_cases().into_iter().skip(first).step_by(3) {
            let (packing, rows) = (examples(&lengths), lengths.iter().sum::<usize>());
            let qkv = gpu.random((rows, heads.columns()), 1)?;
            let d_out = gpu.random((rows, heads.query * heads.width), 2)?;
            let expected = formula_of_each(&qkv, &heads, &packing)?;
            let gradient = judge::gradient(&qkv, &expected, &d_out)?;
            let (on_qkv, on_d) = (gpu.put(&qkv)?, gpu.put(&d_out)?);
            let run = |spare: usize| -> Result<[Tensor; 3]> {
                let (out, lse) = forward_beside(&on_qkv, &heads, &packing, Precision::F32, spare)?;
                let precision = Precision::F32;
                let d = backward_beside(&on_d, &on_qkv, &out, &lse, &heads, &packing, precision, spare)?;
                Ok([judge::first(&out, d_out.dim(1)?)?, lse, judge::first(&d, heads.columns())?])
            };
            let (within, within_gradient) = tolerances(gpu.dtype);
            let [out, lse, d] = run(0)?;
            gpu.within(within, &out, &expected)?;
            gpu.within(within_gradient, &d, &gradient)?;
            turned_back(gpu, &heads, &packing, &on_d, &on_qkv)?;
            let first = [out, lse, d];
            same_bits(&first, &run(64)?, "the same twice, with and without spare columns")?;
            // The number of tiles in flight changes no order of a sum.
            #[cfg(feature = "cuda")]
            if gpu.dtype == candle_core::DType::BF16 && (33..=128).contains(&heads.width) {
                for change in [Change::Staged, Change::Wide] {
                    change.set(false);
                    let without = run(0);
                    change.set(true);
                    same_bits(&first, &without?, change.name())?;
                }
            }
            assert_eq!(prepare(&gpu.device, &heads, gpu.dtype), None);
            // The kernels for Hopper compute the same from now on, if the card and the heads are for them.
            #[cfg(feature = "cuda")]
            if has_warpgroups(&gpu.device, &heads, gpu.dtype, false) {
                let [out, lse, d] = run(0)?;
                gpu.within(within, &out, &expected)?;
                gpu.within(within_gradient, &d, &gradient)?;
                turned_back(gpu, &heads, &packing, &on_d, &on_qkv)?;
                same_bits(&[out, lse, d], &run(64)?, "the same twice by warpgroups")?;
            }
        }
        Ok(())
    }

    #[test]
    fn the_kernels_on_gpu_equal_the_formula() -> Result<()> {
        judge::on_gpu(|gpu| every_third_case_equals_the_formula(gpu, 0))
    }

    #[test]
    fn the_kernels_on_gpu_equal_the_formula_in_more_cases() -> Result<()> {
        judge::on_gpu(|gpu| every_third_case_equals_the_formula(gpu, 1))
    }

    #[test]
    fn the_kernels_on_gpu_equal_the_formula_in_the_other_cases() -> Result<()> {
        judge::on_gpu(|gpu| every_third_case_equals_the_formula(gpu, 2))
    }

    fn same_bits(first: &[Tensor; 3], second: &[Tensor; 3], what: &str) -> Result<()> {
        for (first, second) in first.iter().zip(second) {
            let bits = |tensor: &Tensor| cpu::to_f64(&tensor.to_device(&Device::Cpu)?);
            assert_eq!(bits(first)?, bits(second)?, "{what}");
        }
        Ok(())
    }

    /// Checks that a gradient which is turned back while it is stored has the bits of one that is turned back in
    /// memory.
    fn turned_back(
        gpu: &judge::Gpu,
        heads: &Heads,
        packing: &Packing,
        d_out: &Tensor,
        qkv: &Tensor,
    ) -> Result<()> {
        let ((out, lse), (runs, _)) = (forward(qkv, heads, packing, Precision::F32)?, heads.turning());
        let (rows, out, lse) = (qkv.dim(0)?, &out, &lse);
        let plain = backward(d_out, qkv, out, lse, heads, packing, Precision::F32)?;
        // All of a head's pairs, or some of them: multiples of eight and others.
        let mut halves = vec![heads.width / 2, heads.width / 4, heads.width / 2 / 8 * 8];
        halves.sort_unstable();
        halves.dedup();
        for half in halves.into_iter().filter(|half| *half > 0) {
            let theta = judge::random((rows, 1, half), 3)?.broadcast_as((rows, runs, half))?.contiguous()?;
            let theta = theta.reshape((rows * runs, half))?;
            let on_gpu = |x: Tensor| gpu.put_as(candle_core::DType::F32, &x);
            let angles = Angles { cos: on_gpu(theta.cos()?)?, sin: on_gpu(theta.sin()?)? };
            let expected = plain.copy()?;
            turn(&expected, heads, &angles, Direction::Backward)?;
            for spare in [0, 64] {
                let (angles, precision) = (Some(&angles), Precision::F32);
                let found = backward_turned(d_out, qkv, out, lse, heads, packing, angles, precision, spare)?;
                let found = judge::first(&found, heads.columns())?;
                gpu.within(0.0, &found, &expected.to_device(&Device::Cpu)?)?;
            }
        }
        Ok(())
    }

    #[test]
    fn value_and_gradient_equal_the_formula_for_each_packed_example() -> Result<()> {
        for (heads, lengths) in cases() {
            let examples = examples(&lengths);
            let rows = lengths.iter().sum::<usize>();
            let qkv = judge::random((rows, heads.columns()), 1)?;
            let d_out = judge::random((rows, heads.query * heads.width), 2)?;
            let parts: Vec<Tensor> = examples
                .examples()
                .iter()
                .map(|example| formula(&qkv.narrow(0, example.start, example.len())?, &heads))
                .collect::<Result<_>>()?;
            let expected = Tensor::cat(&parts, 0)?;
            let (out, lse) = forward(&qkv, &heads, &examples, Precision::F32)?;
            judge::same(&out, &expected, 1e-12)?;
            let gradient = judge::gradient(&qkv, &expected, &d_out)?;
            judge::same(
                &backward(&d_out, &qkv, &out, &lse, &heads, &examples, Precision::F32)?,
                &gradient,
                1e-11,
            )?;
        }
        Ok(())
    }

    #[test]
    fn gradient_equals_finite_differences() -> Result<()> {
        let plain = Heads { query: 2, key: 1, width: 2, window: Some(3), ..PLAIN };
        for heads in [plain, Heads { softcap: Some(0.4), layout: Layout::Grouped, ..plain }] {
            check_finite_differences(&heads)?;
        }
        Ok(())
    }

    fn check_finite_differences(heads: &Heads) -> Result<()> {
        let examples = examples(&[4, 2]);
        let (qkv, d_out) = (judge::random((6, 8), 1)?, judge::random((6, 4), 2)?);
        let (out, lse) = forward(&qkv, heads, &examples, Precision::F32)?;
        let d = backward(&d_out, &qkv, &out, &lse, heads, &examples, Precision::F32)?;
        judge::finite_differences(&qkv, &d_out, &d, 1e-7, |x| {
            Ok(forward(x, heads, &examples, Precision::F32)?.0)
        })
    }
}
