//! Causal attention over packed examples, grouped-query heads, optional window; no score matrix outlives a block.
//!
//!
//! Row i of an example sees rows j of the same example with `i - window < j <= i`. `qkv` is one matrix
//! [T, (H + 2K) * D]: H query heads, then K key heads, then K value heads. The backward pass computes the
//! probabilities again from the kept logsumexp, block by block (Dao 2022).

use std::ops::Range;

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use super::cpu::{self, Real, View};
use super::matmul::Precision;
use crate::with_real;

/// Query rows of a block: scores of a block stay within the cache for lengths up to a few thousand.
const BLOCK: usize = 128;

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
}

impl Heads {
    /// Columns of qkv.
    pub fn columns(&self) -> usize {
        (self.query + 2 * self.key) * self.width
    }

    fn group(&self) -> usize {
        self.query / self.key
    }

    /// Keys that at least one row of `rows` sees.
    fn keys(&self, rows: &Range<usize>) -> Range<usize> {
        let from = self.window.map_or(0, |window| (rows.start + 1).saturating_sub(window));
        from..rows.end
    }

    /// Whether row i sees row j of the same example.
    fn sees(&self, i: usize, j: usize) -> bool {
        j <= i && self.window.is_none_or(|window| i - j < window)
    }
}

/// The definition for one example, qkv [T, (H + 2K) * D] -> [T, H * D], in differentiable primitives.
pub fn formula(qkv: &Tensor, heads: &Heads) -> Result<Tensor> {
    let rows = qkv.dim(0)?;
    let part = |from: usize, count: usize| {
        qkv.narrow(1, from * heads.width, count * heads.width)?
            .contiguous()?
            .reshape((rows, count, heads.width))?
            .transpose(0, 1)?
            .contiguous() // [count, T, D]
    };
    let repeat = |x: Tensor| {
        let x = x.unsqueeze(1)?.expand((heads.key, heads.group(), rows, heads.width))?;
        x.contiguous()?.reshape((heads.query, rows, heads.width))
    };
    let (q, k, v) = (
        part(0, heads.query)?,
        repeat(part(heads.query, heads.key)?)?,
        repeat(part(heads.query + heads.key, heads.key)?)?,
    );
    let hidden = |i: usize| (0..rows).map(move |j| if heads.sees(i, j) { 0.0 } else { f64::NEG_INFINITY });
    let mask: Vec<f64> = (0..rows).flat_map(hidden).collect();
    let mask = Tensor::from_vec(mask, (1, rows, rows), &Device::Cpu)?.to_dtype(qkv.dtype())?;
    let scores = (q.matmul(&k.transpose(1, 2)?.contiguous()?)? * heads.scale)?.broadcast_add(&mask)?;
    let e = scores.broadcast_sub(&scores.max_keepdim(2)?.detach())?.exp()?;
    let p = e.broadcast_div(&e.sum_keepdim(2)?)?;
    p.matmul(&v)?.transpose(0, 1)?.contiguous()?.reshape((rows, heads.query * heads.width))
}

/// qkv [T, (H + 2K) * D] after rope -> output [T, H * D] and logsumexp [H, T]. `examples` cover 0..T.
pub fn forward(
    qkv: &Tensor,
    heads: &Heads,
    examples: &[Range<usize>],
    precision: Precision,
) -> Result<(Tensor, Tensor)> {
    let (rows, columns) = qkv.dims2()?;
    assert_eq!(columns, heads.columns(), "columns of qkv");
    with_real!(qkv, T => {
        let qkv = &*cpu::read::<T>(qkv)?;
        let tasks = tasks(examples, heads.query);
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

/// The gradient of qkv, given the output and its gradient [T, H * D] and the forward pass's logsumexp.
pub fn backward(
    d_out: &Tensor,
    qkv: &Tensor,
    out: &Tensor,
    lse: &Tensor,
    heads: &Heads,
    examples: &[Range<usize>],
    precision: Precision,
) -> Result<Tensor> {
    let (rows, columns) = qkv.dims2()?;
    with_real!(qkv, T => {
        let (qkv, out) = (&*cpu::read::<T>(qkv)?, &*cpu::read::<T>(out)?);
        let (d_out, lse) = (&*cpu::read::<T>(d_out)?, &*cpu::read::<T>(lse)?);
        let (width, stride) = (heads.width, heads.query * heads.width);
        // One task takes all query heads of a key head, so that its gradient has one writer.
        let tasks = tasks(examples, heads.key);
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
            scatter(&mut d, columns, example, key_head * group * width, group * width, &block.query);
            scatter(&mut d, columns, example, (heads.query + key_head) * width, width, &block.key);
            scatter(&mut d, columns, example, (heads.query + heads.key + key_head) * width, width, &block.value);
        }
        cpu::tensor(d, (rows, columns))
    })
}

/// Every (example, head), longest examples first so that threads end together.
fn tasks(examples: &[Range<usize>], heads: usize) -> Vec<(Range<usize>, usize)> {
    let mut order: Vec<&Range<usize>> = examples.iter().collect();
    order.sort_by_key(|example| std::cmp::Reverse(example.len()));
    order.into_iter().flat_map(|example| (0..heads).map(move |head| (example.clone(), head))).collect()
}

/// Copies `block` [rows, width] into columns `at..at+width` of `matrix`'s rows.
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

/// One head of one example: output [t, D] and logsumexp `[t]`.
fn forward_head<T: Real>(qkv: &[T], heads: &Heads, head: usize, precision: Precision) -> (Vec<T>, Vec<T>) {
    let (columns, width) = (heads.columns(), heads.width);
    let rows = qkv.len() / columns;
    let column = |head: usize| &qkv[head * width..];
    let (q, k) = (column(head), column(heads.query + head / heads.group()));
    let v = column(heads.query + heads.key + head / heads.group());
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
                    lse[i] = softmax_row(row, seen(heads, i, &keys));
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

/// scores = scale * q k^T for a block of rows and its keys.
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

/// Columns of a score row that row i sees, counted from the block's first key.
fn seen(heads: &Heads, i: usize, keys: &Range<usize>) -> Range<usize> {
    let from = heads.window.map_or(0, |window| (i + 1).saturating_sub(window));
    from - keys.start..i + 1 - keys.start
}

/// Softmax over the seen columns, zero elsewhere; returns the logsumexp.
#[inline(always)]
fn softmax_row<T: Real>(row: &mut [T], seen: Range<usize>) -> T {
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

/// What the backward pass of one example reads.
struct Saved<'a, T> {
    qkv: &'a [T],
    out: &'a [T],
    d_out: &'a [T],
    lse: &'a dyn Fn(usize) -> &'a [T],
}

/// Gradients of a key head's group in one example: query [t, G * D], key and value [t, D].
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
    let column = |head: usize| &saved.qkv[head * width..];
    let (k, v) = (column(heads.query + key_head), column(heads.query + heads.key + key_head));
    let mut d = Gradients {
        query: vec![T::ZERO; rows * group * width],
        key: vec![T::ZERO; rows * width],
        value: vec![T::ZERO; rows * width],
    };
    let (mut p, mut dp) = (Vec::new(), Vec::new());
    for member in 0..group {
        let head = key_head * group + member;
        let (q, out, d_out) = (column(head), &saved.out[head * width..], &saved.d_out[head * width..]);
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
                        score_gradient_row(p, dp, lse[i], delta, T::of(heads.scale), seen(heads, i, &keys));
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

/// scores -> probabilities, and their gradient -> the scores' gradient: p * (dp - delta) * scale.
#[inline(always)]
fn score_gradient_row<T: Real>(p: &mut [T], dp: &mut [T], lse: T, delta: T, scale: T, seen: Range<usize>) {
    for side in [0..seen.start, seen.end..p.len()] {
        p[side.clone()].fill(T::ZERO);
        dp[side].fill(T::ZERO);
    }
    for (p, dp) in p[seen.clone()].iter_mut().zip(&mut dp[seen]) {
        *p = Real::exp(*p - lse);
        *dp = *p * (*dp - delta) * scale;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::judge;

    /// One example, packed examples of odd lengths around the block size, GQA 1, 2, 4, windows.
    fn cases() -> Vec<(Heads, Vec<usize>)> {
        let heads = |query, key, width, window| Heads { query, key, width, scale: 0.37, window };
        vec![
            (heads(1, 1, 1, None), vec![1]),
            (heads(4, 2, 6, None), vec![5, 1, 9]),
            (heads(4, 1, 8, Some(3)), vec![7, 2]),
            (heads(2, 2, 4, None), vec![63, 64, 65]),
            (heads(3, 3, 5, Some(40)), vec![129, 130]),
            (heads(8, 1, 3, Some(1)), vec![66]),
        ]
    }

    fn examples(lengths: &[usize]) -> Vec<Range<usize>> {
        let mut from = 0;
        lengths
            .iter()
            .map(|&length| {
                from += length;
                from - length..from
            })
            .collect()
    }

    #[test]
    fn value_and_gradient_equal_the_formula_for_each_packed_example() -> Result<()> {
        for (heads, lengths) in cases() {
            let examples = examples(&lengths);
            let rows = lengths.iter().sum::<usize>();
            let qkv = judge::random((rows, heads.columns()), 1)?;
            let d_out = judge::random((rows, heads.query * heads.width), 2)?;
            let parts: Vec<Tensor> = examples
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
        let heads = Heads { query: 2, key: 1, width: 2, scale: 0.7, window: Some(3) };
        let examples = examples(&[4, 2]);
        let (qkv, d_out) = (judge::random((6, 8), 1)?, judge::random((6, 4), 2)?);
        let (out, lse) = forward(&qkv, &heads, &examples, Precision::F32)?;
        let d = backward(&d_out, &qkv, &out, &lse, &heads, &examples, Precision::F32)?;
        judge::finite_differences(&qkv, &d_out, &d, 1e-7, |x| {
            Ok(forward(x, &heads, &examples, Precision::F32)?.0)
        })
    }
}
