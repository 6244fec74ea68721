//! LoRA inside the product with a frozen weight, on a GPU: the weight with A below it and B beside it, and activations
//! and gradients with spare columns for the low-rank products.
//!
//! With `W~ = [[W, B~], [A~, .]]` [N + R, K + R], where A~ stacks the pairs' A and B~ has their `scale * B` in the
//! columns of their ranks: `U = x A~^T` in the spare columns of x makes `y = [x | U] [W | B~]^T`, and `V = dy B~` in
//! the spare columns of dy makes `dx = [dy | V] [W; A~]`. Layers that read the same x have one W~, one U and one V. R
//! is a multiple of 64 (`model/inside.rs` says why); unused columns of U and V are zeros, because A~ and B~ are zero
//! there.

use candle_core::{DType, Result, Tensor, bail};

use super::cuda::product::{Matrix, product, product_onto};
use super::cuda::{self, Launch};
use super::matmul::Weight;
use super::{rows, unwritten};

/// Most layers that share one W~.
pub const SIDE_BY_SIDE: usize = 3;
const THREADS: usize = 256;
/// Values that move together.
const EIGHT: usize = 8;

/// One of the layers that read the same x.
pub struct Part<'a> {
    /// The frozen weight [N, K].
    pub weight: &'a Weight,
    /// The layer's pair, if it has one.
    pub pair: Option<Pair<'a>>,
}

/// A pair of LoRA's matrices.
pub struct Pair<'a> {
    /// A [r, K] in the activations' type.
    pub a: &'a Tensor,
    /// B [N, r] in f32.
    pub b: &'a Tensor,
    /// Factor on `x A^T B^T`.
    pub scale: f64,
}

/// W~ of layers side by side.
pub struct Inside {
    matrix: Tensor,
    rows: usize,
    cols: usize,
    spare: usize,
}

/// A matrix [T, columns] inside a wider tensor.
#[derive(Clone, Copy)]
pub struct Columns<'a> {
    /// The tensor [T, any].
    pub tensor: &'a Tensor,
    /// The first column.
    pub at: usize,
}

/// Returns the weights of layers that read the same x, expanded one above the other [N + R, K + R]. The places beside
/// and below them are not written.
pub fn expand(weights: &[&Weight], spare: usize, dtype: DType) -> Result<Tensor> {
    let matrix = around(weights, spare, dtype)?;
    fill(&matrix, weights, 0)?;
    Ok(matrix)
}

/// Writes the weights but the first `skipped` ones.
fn fill(matrix: &Tensor, weights: &[&Weight], skipped: usize) -> Result<()> {
    let mut at = 0;
    for (number, weight) in weights.iter().enumerate() {
        match weight {
            _ if number < skipped => {}
            Weight::FourBit(weight) => weight.dequantize_into(matrix, at)?,
            Weight::Dense(weight) => rows::place(&rows::convert(weight, matrix.dtype())?, matrix, at)?,
        }
        at += weight.dims().0 * matrix.dim(1)?;
    }
    Ok(())
}

/// Returns memory for `expand`.
fn around(weights: &[&Weight], spare: usize, dtype: DType) -> Result<Tensor> {
    let rows: usize = weights.iter().map(|weight| weight.dims().0).sum();
    unwritten((rows + spare, weights[0].dims().1 + spare), dtype, weights[0].device())
}

impl Inside {
    /// Puts the pairs of the parts beside and below their weights. The weights are expanded if `weights` is set;
    /// without them only the low-rank products may be asked for.
    pub fn new(parts: &[Part], spare: usize, dtype: DType, weights: bool) -> Result<Inside> {
        let list: Vec<&Weight> = parts.iter().map(|part| part.weight).collect();
        let matrix = around(&list, spare, dtype)?;
        match list[0] {
            Weight::FourBit(first) if weights => {
                let inside = Inside::of(matrix, parts, spare)?;
                fill(&inside.matrix, &list, 1)?;
                first.dequantize_inside(&inside.matrix, |launch| inside.pairs(launch.int(spare), parts))?;
                Ok(inside)
            }
            _ => {
                fill(&matrix, &list, if weights { 0 } else { list.len() })?;
                Inside::on(matrix, parts, spare)
            }
        }
    }

    /// Puts the pairs of the parts beside and below their weights, which `expand` made.
    pub fn on(matrix: Tensor, parts: &[Part], spare: usize) -> Result<Inside> {
        let inside = Inside::of(matrix, parts, spare)?;
        let launch = Launch::new(&inside.matrix, "low_rank", "insert")?.tensor(&inside.matrix);
        let (launch, blocks) = inside.pairs(launch.int(inside.cols).int(spare), parts);
        launch.launch((blocks, 1, 1), THREADS, 0)?;
        Ok(inside)
    }

    fn of(matrix: Tensor, parts: &[Part], spare: usize) -> Result<Inside> {
        let (rows, cols) = (matrix.dim(0)? - spare, matrix.dim(1)? - spare);
        let ranks: usize = parts.iter().filter_map(|part| part.pair.as_ref()).map(Pair::rank).sum();
        let whole = [rows, cols, spare].iter().all(|number| number.is_multiple_of(EIGHT));
        if !whole || ranks > spare || parts.len() > SIDE_BY_SIDE {
            bail!(
                "{} layers [{rows}, {cols}] with ranks of {ranks} beside them in {spare} columns",
                parts.len()
            );
        }
        Ok(Inside { matrix, rows, cols, spare })
    }

    /// Adds the pairs to a launch that has the columns of the weight and the spare ones. Returns it with the blocks
    /// that it needs for them.
    fn pairs<'a>(&self, mut launch: Launch<'a>, parts: &[Part]) -> (Launch<'a>, usize) {
        for i in 0..SIDE_BY_SIDE {
            let part = parts.get(i);
            let pair = part.and_then(|part| part.pair.as_ref());
            launch = launch.optional(self.matrix.dtype(), pair.map(|pair| pair.a));
            launch = launch.optional(DType::F32, pair.map(|pair| pair.b));
            launch = launch.int(part.map_or(0, |part| part.weight.dims().0)).int(pair.map_or(0, Pair::rank));
            launch = launch.float(pair.map_or(0.0, |pair| pair.scale));
        }
        (launch, self.spare + (self.rows * self.spare / EIGHT).div_ceil(THREADS))
    }

    fn stride(&self) -> usize {
        self.cols + self.spare
    }

    /// Returns rows and columns of W~ from element (row, column) on.
    fn at(&self, row: usize, column: usize) -> Matrix<'_> {
        Matrix::rows(&self.matrix, row * self.stride() + column, self.stride())
    }

    /// Writes `U = x A~^T` to the spare columns of x [T, K + R or wider].
    pub fn low(&self, x: &Tensor) -> Result<()> {
        let (count, stride) = self.wide(x, self.cols)?;
        let below = self.at(self.rows, 0).transposed();
        let shape = [count, self.spare, self.cols];
        product(shape, 1.0, Matrix::rows(x, 0, stride), below, 0.0, Matrix::rows(x, self.cols, stride))
    }

    /// Writes columns `at..at+count` of `from A~^T` to the same spare columns of x, if the pairs' inputs differ: from
    /// [T, K or wider], x [T, K + R or wider].
    pub fn low_of(&self, from: &Tensor, x: &Tensor, at: usize, count: usize) -> Result<()> {
        let ((tokens, stride), (from_tokens, from_stride)) = (self.wide(x, self.cols)?, from.dims2()?);
        assert!(
            at + count <= self.spare && from_tokens == tokens && self.cols <= from_stride,
            "columns {at}..{} of {} from {from_tokens}x{from_stride}",
            at + count,
            self.spare
        );
        let (from, to) = (Matrix::rows(from, 0, from_stride), Matrix::rows(x, self.cols + at, stride));
        product([tokens, count, self.cols], 1.0, from, self.at(self.rows + at, 0).transposed(), 0.0, to)
    }

    /// `y = alpha * [x | U] [W | B~]^T + beta * y`, after `low`: x [T, K + R or wider], y [T, N].
    pub fn forward(&self, x: &Tensor, alpha: f64, y: &Tensor, beta: f64) -> Result<()> {
        let ((count, stride), (_, width)) = (self.wide(x, self.cols)?, y.dims2()?);
        assert_eq!(width, self.rows, "columns of all parts");
        let shape = [count, self.rows, self.cols + self.spare];
        let weight = self.at(0, 0).transposed();
        product(shape, alpha, Matrix::rows(x, 0, stride), weight, beta, Matrix::rows(y, 0, width))
    }

    /// `alpha * [x | U] [W | B~]^T + base` in memory of its own, after `low`: x [T, K + R or wider], base [T, N].
    pub fn onto(&self, x: &Tensor, alpha: f64, base: &Tensor) -> Result<Tensor> {
        let ((count, stride), (_, width)) = (self.wide(x, self.cols)?, base.dims2()?);
        assert_eq!(width, self.rows, "columns of all parts");
        let sum = unwritten(base.shape(), base.dtype(), base.device())?;
        let (shape, weight) = ([count, self.rows, self.cols + self.spare], self.at(0, 0).transposed());
        let (from, to) = (Matrix::rows(base, 0, width), Matrix::rows(&sum, 0, width));
        product_onto(shape, alpha, Matrix::rows(x, 0, stride), weight, from, to)?;
        Ok(sum)
    }

    /// `y = alpha * U B~^T + beta * y`, the part of the pairs, after `low`: x [T, K + R or wider], y [T, N].
    pub fn beside(&self, x: &Tensor, alpha: f64, y: &Tensor, beta: f64) -> Result<()> {
        let ((count, stride), (_, width)) = (self.wide(x, self.cols)?, y.dims2()?);
        assert_eq!(width, self.rows, "columns of all parts");
        let (low, weight) = (Matrix::rows(x, self.cols, stride), self.at(0, self.cols).transposed());
        product([count, self.rows, self.spare], alpha, low, weight, beta, Matrix::rows(y, 0, width))
    }

    /// `alpha * U B~^T + base` in memory of its own, after `low`: x [T, K + R or wider], base [T, N].
    pub fn beside_onto(&self, x: &Tensor, alpha: f64, base: &Tensor) -> Result<Tensor> {
        let ((count, stride), (_, width)) = (self.wide(x, self.cols)?, base.dims2()?);
        assert_eq!(width, self.rows, "columns of all parts");
        let sum = unwritten(base.shape(), base.dtype(), base.device())?;
        let (low, weight) = (Matrix::rows(x, self.cols, stride), self.at(0, self.cols).transposed());
        let (from, to) = (Matrix::rows(base, 0, width), Matrix::rows(&sum, 0, width));
        product_onto([count, self.rows, self.spare], alpha, low, weight, from, to)?;
        Ok(sum)
    }

    /// Writes `V = dy B~` to the spare columns of dy [T, N + R or wider].
    pub fn low_gradient(&self, dy: &Tensor) -> Result<()> {
        let (count, stride) = self.wide(dy, self.rows)?;
        let shape = [count, self.spare, self.rows];
        let beside = self.at(0, self.cols);
        product(shape, 1.0, Matrix::rows(dy, 0, stride), beside, 0.0, Matrix::rows(dy, self.rows, stride))
    }

    /// `dx = alpha * [dy | V] [W; A~] + beta * dx`, after `low_gradient`: dy [T, N + R or wider], dx [T, K].
    pub fn input_gradient(&self, dy: &Tensor, alpha: f64, dx: &Tensor, beta: f64) -> Result<()> {
        let ((count, stride), (_, width)) = (self.wide(dy, self.rows)?, dx.dims2()?);
        assert_eq!(width, self.cols, "columns of the gradient");
        let shape = [count, self.cols, self.rows + self.spare];
        product(shape, alpha, Matrix::rows(dy, 0, stride), self.at(0, 0), beta, Matrix::rows(dx, 0, width))
    }

    /// `dx = alpha * dy W`, without the pairs.
    pub fn input_gradient_apart(&self, dy: &Tensor, alpha: f64, dx: &Tensor) -> Result<()> {
        let ((count, stride), (_, width)) = (self.wide(dy, self.rows)?, dx.dims2()?);
        assert_eq!(width, self.cols, "columns of the gradient");
        let shape = [count, self.cols, self.rows];
        product(shape, alpha, Matrix::rows(dy, 0, stride), self.at(0, 0), 0.0, Matrix::rows(dx, 0, width))
    }

    /// `dx = alpha * V[:, at..at+rank] A`, the part of one pair, after `low_gradient`.
    pub fn through(&self, dy: &Tensor, at: usize, rank: usize, alpha: f64, dx: &Tensor) -> Result<()> {
        let ((count, stride), (_, width)) = (self.wide(dy, self.rows)?, dx.dims2()?);
        assert!(width == self.cols && at + rank <= self.spare, "ranks {at}..{} of {}", at + rank, self.spare);
        let low = Matrix::rows(dy, self.rows + at, stride);
        product(
            [count, self.cols, rank],
            alpha,
            low,
            self.at(self.rows + at, 0),
            0.0,
            Matrix::rows(dx, 0, width),
        )
    }

    /// (rows, columns) of a matrix that must have spare columns behind its own.
    fn wide(&self, matrix: &Tensor, own: usize) -> Result<(usize, usize)> {
        let (rows, stride) = matrix.dims2()?;
        assert!(own + self.spare <= stride, "{} spare columns behind {own} of {stride}", self.spare);
        Ok((rows, stride))
    }
}

/// One of the layers side by side, as far as a pass over their activations or gradients asks.
pub struct Learning<'a> {
    /// Rows of its weight (N).
    pub rows: usize,
    /// The layer's pair, if it has one.
    pub pair: Option<Slope<'a>>,
}

/// One of a pair's matrices in training.
pub struct Slope<'a> {
    /// Rank of the pair.
    pub rank: usize,
    /// The gradient, f32: A's [r, K] or B's [N, r].
    pub gradient: &'a Tensor,
    /// Factor on the values that are added to it.
    pub factor: f64,
}

/// Rows of a tile, and threads of a block, of the kernels that pass over a matrix once.
const TILE_ROWS: usize = 64;
/// Returns the ranks that a kernel computes with and the columns of a block, as listed at the end of
/// `kernels/low_rank.cu`.
fn tiles(ranks: usize) -> (usize, usize) {
    let ranks = ranks.next_power_of_two().max(8);
    (ranks, if ranks <= 16 { 256 } else { 128 })
}

/// Returns the number of rows of a block, so that there are two blocks for each processor.
fn chunk(rows: usize, strips: usize, on: &Tensor) -> Result<usize> {
    let (_, processors) = cuda::device::block_limits(cuda::device(on)?)?;
    let chunks = (2 * processors).div_ceil(strips.max(1)).min(rows.div_ceil(TILE_ROWS)).max(1);
    Ok(rows.div_ceil(chunks).next_multiple_of(TILE_ROWS))
}

/// Makes both low-rank products of dy in one pass over it: writes `V = dy B~` to its spare columns, as
/// `Inside::low_gradient` does, and adds `factor * dy^T U` to the gradients of B. `low` holds U. Pairs have at most 16
/// ranks, and layers whole groups of eight rows.
pub fn both(inside: &Inside, dy: &Tensor, low: Columns, parts: &[Learning]) -> Result<()> {
    let (rows, stride) = inside.wide(dy, inside.rows)?;
    let rank_max =
        parts.iter().filter_map(|part| part.pair.as_ref()).map(|pair| pair.rank).max().unwrap_or(0);
    let (ranks, columns) = tiles(rank_max);
    let strips = |part: &Learning| part.pair.as_ref().map_or(0, |_| part.rows.div_ceil(columns));
    let strips: usize = parts.iter().map(strips).sum();
    let chunk = chunk(rows, strips, dy)?;
    let chunks = rows.div_ceil(chunk);
    let through = unwritten((strips, rows, ranks), DType::F32, dy.device())?;
    let gradients = unwritten((chunks, inside.rows, ranks), DType::F32, dy.device())?;
    let launch = Launch::new(dy, "low_rank", &format!("both_{ranks}"))?.tensor(dy).int(stride);
    let launch = launch.tensor_at(low.tensor, low.at).int(low.tensor.dim(1)?);
    let launch = launch.tensor_at(&inside.matrix, inside.cols).int(inside.stride());
    let mut launch = launch.of(DType::F32, &gradients).of(DType::F32, &through).int(rows).int(chunk);
    for i in 0..SIDE_BY_SIDE {
        let pair = parts.get(i).and_then(|part| part.pair.as_ref());
        launch = launch.int(parts.get(i).map_or(0, |part| part.rows)).int(pair.map_or(0, |pair| pair.rank));
    }
    let shared = shared_bytes(ranks, columns) + columns * (ranks + EIGHT) * 2 + 4 * 16 * ranks * 4;
    launch.launch((strips, chunks, 1), THREADS, shared)?;

    let blocks = (rows * inside.spare / EIGHT).div_ceil(THREADS);
    let blocks = blocks + (inside.rows * ranks / EIGHT).div_ceil(THREADS);
    let launch = Launch::new(dy, "low_rank", "sum_over")?.of(DType::F32, &through).int(columns);
    let launch = launch.tensor_at(dy, inside.rows).int(stride).int(inside.spare).int(rows);
    let launch = launch.of(DType::F32, &gradients).int(chunks).int(ranks);
    slopes(launch, parts).launch((blocks, 1, 1), THREADS, 0)
}

/// Returns the number of bytes of two tiles of a matrix and of its low-rank product, with 16 bytes between rows.
fn shared_bytes(ranks: usize, columns: usize) -> usize {
    2 * TILE_ROWS * (columns + EIGHT + ranks + EIGHT) * 2
}

fn slopes<'a>(mut launch: Launch<'a>, parts: &[Learning]) -> Launch<'a> {
    for i in 0..SIDE_BY_SIDE {
        let pair = parts.get(i).and_then(|part| part.pair.as_ref());
        launch = launch.optional(DType::F32, pair.map(|pair| pair.gradient));
        launch = launch.int(parts.get(i).map_or(0, |part| part.rows)).int(pair.map_or(0, |pair| pair.rank));
        launch = launch.float(pair.map_or(0.0, |pair| pair.factor));
    }
    launch
}

/// Adds `factor * V^T xn` to the gradients of A, where `xn = x * scales * weight` is a norm of x [T, K] with one of
/// `scales` for each row and one of `weight` for each column; the norm is not computed again. `low` holds V, which has
/// at most 64 ranks.
pub fn normed_gradient(
    x: &Tensor,
    (scales, weight): (&Tensor, &Tensor),
    low: Columns,
    parts: &[Learning],
) -> Result<()> {
    let (rows, cols) = x.dims2()?;
    let all: usize = parts.iter().filter_map(|part| part.pair.as_ref()).map(|pair| pair.rank).sum();
    let (ranks, columns) = tiles(all);
    let strips = cols.div_ceil(columns);
    let chunk = chunk(rows, strips, x)?;
    let chunks = rows.div_ceil(chunk);
    let gradients = unwritten((chunks, cols, ranks), DType::F32, x.device())?;
    let launch = Launch::new(x, "low_rank", &format!("gradient_{ranks}"))?.tensor(x).int(cols).int(cols);
    let launch = launch.tensor_at(low.tensor, low.at).int(low.tensor.dim(1)?).int(all);
    let launch = launch.of(DType::F32, scales).of(DType::F32, &gradients).int(rows).int(chunk);
    launch.launch((strips, chunks, 1), THREADS, shared_bytes(ranks, columns))?;
    let launch = Launch::untyped(cuda::device(x)?, "low_rank", "sum_below").of(DType::F32, &gradients);
    let launch = launch.int(chunks).int(ranks).int(cols).of(DType::F32, weight);
    slopes(launch, parts).launch((cols.div_ceil(THREADS), all, 1), THREADS, 0)
}

impl Pair<'_> {
    fn rank(&self) -> usize {
        self.a.dims()[0]
    }
}

/// `gradient += alpha * left^T right`: left [T, N], right [T, K], gradient [N, K], which may be f32 if they are bf16.
pub fn gradient(left: Columns, right: Columns, alpha: f64, gradient: &Tensor) -> Result<()> {
    let ((n, k), (count, left_width)) = (gradient.dims2()?, left.tensor.dims2()?);
    let (right_count, right_width) = right.tensor.dims2()?;
    assert!(
        left.at + n <= left_width && right.at + k <= right_width && count == right_count,
        "a gradient [{n}, {k}] from columns {} of {left_width} and {} of {right_width}",
        left.at,
        right.at
    );
    let left = Matrix::rows(left.tensor, left.at, left_width).transposed();
    let right = Matrix::rows(right.tensor, right.at, right_width);
    product([n, k, count], alpha, left, right, 1.0, Matrix::rows(gradient, 0, k))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::facts::quantization::Code;
    use crate::ops::four_bit::FourBit;
    use crate::ops::judge::{self, Gpu};

    /// A part in the test: rows of its weight, and the rank and scale of its pair.
    type Shape = (usize, Option<(usize, f64)>);

    /// A weight, its pair on the GPU, and the values of both.
    type Made = (Weight, Option<(Tensor, Tensor)>, Values);

    /// Values of a part as they take part in the products, in f64.
    struct Values {
        weight: Tensor,
        pair: Option<(Tensor, Tensor, f64)>,
    }

    /// Each group as its formula has it: one to three parts, with and without pairs, of ranks 1 to 256, in every form
    /// of storage; the first rows and a last tile of few rows.
    #[test]
    fn layers_with_pairs_inside_equal_the_formula() -> Result<()> {
        let groups: [(&[Shape], usize, usize); 7] = [
            (&[(8, Some((1, 2.0)))], 8, 64),
            (&[(64, Some((8, 2.0)))], 40, 64),
            (&[(24, Some((20, 0.3))), (8, None), (16, Some((3, 1.5)))], 64, 64),
            (&[(16, None), (16, Some((64, 1.0)))], 96, 64),
            (&[(64, Some((64, 0.5))), (32, Some((64, 0.5))), (32, Some((64, 0.5)))], 72, 192),
            (&[(40, Some((256, 0.25)))], 64, 256),
            (&[(1032, Some((16, 2.0))), (8, None)], 520, 64),
        ];
        judge::on_gpu(|gpu| {
            for (number, (shapes, cols, spare)) in groups.into_iter().enumerate() {
                for kind in 0..4 {
                    let rows = [1, 7, 33, 127][(number + kind) % 4];
                    check(gpu, shapes, cols, spare, kind, rows)?;
                }
            }
            Ok(())
        })
    }

    fn check(gpu: &Gpu, shapes: &[Shape], cols: usize, spare: usize, kind: usize, rows: usize) -> Result<()> {
        let made = shapes.iter().enumerate().map(|(i, shape)| part(gpu, *shape, cols, kind, i as u64));
        let made: Vec<Made> = made.collect::<Result<_>>()?;
        let parts = made.iter().zip(shapes).map(|((weight, pair, _), (_, described))| {
            let pair = pair.as_ref().zip(*described);
            Part { weight, pair: pair.map(|((a, b), (_, scale))| Pair { a, b, scale }) }
        });
        let parts: Vec<Part> = parts.collect();
        let width: usize = shapes.iter().map(|(rows, _)| rows).sum();
        let (x, y) = (gpu.random((rows, cols), 1)?, gpu.random((rows, width), 2)?);
        let (x, y) = (x.as_tensor(), y.as_tensor());
        // Spare columns hold anything before they are written.
        let junk = gpu.random((rows, spare), 3)?;
        let wide = |x: &Tensor| gpu.put(&Tensor::cat(&[x, junk.as_tensor()], 1)?);
        for (alpha, beta) in [(1.0, 0.0), (0.3, 1.0)] {
            let inside = Inside::new(&parts, spare, gpu.dtype, true)?;
            let (on_x, on_y, found) = (wide(x)?, wide(y)?, gpu.put(y)?);
            inside.low(&on_x)?;
            inside.forward(&on_x, alpha, &found, beta)?;
            let mut of_parts = Vec::new();
            let mut dx = (x * beta)?;
            let mut at = 0;
            for (_, _, values) in &made {
                let n = values.weight.dims2()?.0;
                let dy = y.narrow(1, at, n)?.contiguous()?;
                let (mut out, mut through) = (x.matmul(&values.weight.t()?)?, dy.matmul(&values.weight)?);
                if let Some((a, b, scale)) = &values.pair {
                    out = (out + (x.matmul(&a.t()?)?.matmul(&b.t()?)? * *scale)?)?;
                    through = (through + (dy.matmul(b)?.matmul(a)? * *scale)?)?;
                }
                of_parts.push(((out * alpha)? + (dy * beta)?)?);
                dx = (dx + (through * alpha)?)?;
                at += n;
            }
            gpu.same(&found, &Tensor::cat(&of_parts, 1)?)?;
            let found = gpu.put(x)?;
            Inside::new(&parts, spare, gpu.dtype, false)?.low_gradient(&on_y)?;
            inside.input_gradient(&on_y, alpha, &found, beta)?;
            gpu.same(&found, &dx)?;
            gradients(gpu, &made, (x, &on_x), (y, &on_y), alpha)?;
        }
        Ok(())
    }

    /// One pass over dy, and one over the input of a norm, equal the products and the norm that they replace: ranks in
    /// both sizes of tiles, layers without a pair, rows and columns that fill no tile.
    #[test]
    fn one_pass_equals_two_products() -> Result<()> {
        let groups: [(&[Shape], usize, usize, usize); 6] = [
            (&[(8, Some((1, 2.0)))], 8, 64, 1),
            (&[(264, Some((8, 2.0)))], 40, 64, 63),
            (&[(24, Some((5, 0.3))), (8, None), (520, Some((16, 1.5)))], 264, 64, 130),
            (&[(16, None), (256, Some((16, 1.0)))], 512, 64, 200),
            (&[(64, Some((8, 0.5))), (32, Some((8, 0.5))), (32, Some((8, 0.5)))], 136, 64, 65),
            (&[(32, Some((16, 0.5))), (32, Some((16, 0.5))), (32, Some((16, 0.5)))], 72, 64, 1100),
        ];
        judge::on_gpu(|gpu| {
            for (shapes, cols, spare, rows) in groups.into_iter().filter(|_| gpu.dtype == DType::BF16) {
                pass(gpu, shapes, cols, spare, rows)?;
            }
            Ok(())
        })
    }

    /// Checks that columns of no rank are zeros.
    fn zeros(columns: &Tensor) -> Result<()> {
        assert!(columns.flatten_all()?.to_vec1::<f64>()?.iter().all(|value| *value == 0.0));
        Ok(())
    }

    fn learning<'a>(shapes: &[Shape], gradients: &'a [Option<Tensor>]) -> Vec<Learning<'a>> {
        let mut list = Vec::new();
        for ((rows, pair), gradient) in shapes.iter().zip(gradients) {
            let slope =
                |((rank, factor), gradient): ((usize, f64), &'a Tensor)| Slope { rank, gradient, factor };
            list.push(Learning { rows: *rows, pair: pair.zip(gradient.as_ref()).map(slope) });
        }
        list
    }

    fn pass(gpu: &Gpu, shapes: &[Shape], cols: usize, spare: usize, rows: usize) -> Result<()> {
        let made = shapes.iter().enumerate().map(|(i, shape)| part(gpu, *shape, cols, 2, i as u64));
        let made: Vec<Made> = made.collect::<Result<_>>()?;
        let parts = made.iter().zip(shapes).map(|((weight, pair, _), (_, described))| {
            let pair = pair.as_ref().zip(*described);
            Part { weight, pair: pair.map(|((a, b), (_, scale))| Pair { a, b, scale }) }
        });
        let inside = Inside::new(&parts.collect::<Vec<_>>(), spare, gpu.dtype, false)?;
        let width: usize = shapes.iter().map(|(rows, _)| rows).sum();
        let all: usize = shapes.iter().filter_map(|(_, pair)| *pair).map(|(rank, _)| rank).sum();
        let (x, dy) = (gpu.random((rows, cols), 1)?, gpu.random((rows, width), 2)?);
        let low = gpu.random((rows, all + 3), 3)?;
        let (scales, weight) = (gpu.random(rows, 4)?, gpu.random(cols, 5)?);
        let junk = Tensor::full(f64::NAN, (rows, spare), &Device::Cpu)?;
        let on_dy = gpu.put(&Tensor::cat(&[dy.as_tensor(), &junk], 1)?)?;
        let start = |shape: (usize, usize)| gpu.put_as(DType::F32, gpu.random(shape, 6)?.as_tensor());
        let gradients = |a: bool| -> Result<Vec<Option<Tensor>>> {
            let of = |(rows, pair): &Shape| {
                pair.map(|(rank, _)| start(if a { (rank, cols) } else { (*rows, rank) })).transpose()
            };
            shapes.iter().map(of).collect()
        };
        let (of_a, of_b) = (gradients(true)?, gradients(false)?);
        let on_low = gpu.put(&low)?;
        both(&inside, &on_dy, Columns { tensor: &on_low, at: 3 }, &learning(shapes, &of_b))?;
        let first = (on_dy.copy()?, of_b.iter().flatten().map(Tensor::copy).collect::<Result<Vec<_>>>()?);
        // V as the products make it, and as the gradient of A then reads it.
        let (mut at, mut rank_at) = (0, 0);
        let v = on_dy.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.narrow(1, width, spare)?.contiguous()?;
        let normed = x.broadcast_mul(&scales.reshape((rows, 1))?)?.broadcast_mul(&weight)?;
        let (on_x, on_scales) = (gpu.put(&x)?, gpu.put_as(DType::F32, &scales)?);
        let norm = (&on_scales, &gpu.put_as(DType::F32, &weight)?);
        normed_gradient(&on_x, norm, Columns { tensor: &on_dy, at: width }, &learning(shapes, &of_a))?;
        for (number, ((_, _, values), (n, _))) in made.iter().zip(shapes).enumerate() {
            if let Some((a, b, scale)) = &values.pair {
                let rank = a.dims2()?.0;
                let dy = dy.narrow(1, at, *n)?.contiguous()?;
                let expected = (dy.matmul(b)? * *scale)?;
                let found = v.narrow(1, rank_at, rank)?.contiguous()?;
                gpu.same(&found, &expected)?;
                let low = low.narrow(1, 3 + rank_at, rank)?.contiguous()?;
                let before = |shape: (usize, usize)| gpu.random(shape, 6);
                let expected = ((dy.t()?.matmul(&low)? * *scale)? + before((*n, rank))?.as_tensor())?;
                gpu.within(1e-5, of_b[number].as_ref().expect("a pair"), &expected)?;
                let expected = ((found.t()?.matmul(&normed)? * *scale)? + before((rank, cols))?.as_tensor())?;
                gpu.same(of_a[number].as_ref().expect("a pair"), &expected)?;
                rank_at += rank;
            }
            at += n;
        }
        zeros(&v.narrow(1, all, spare - all)?)?;
        let again = gradients(false)?;
        both(&inside, &on_dy, Columns { tensor: &on_low, at: 3 }, &learning(shapes, &again))?;
        let host = |tensor: &Tensor| tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.to_vec2::<f64>();
        assert_eq!(host(&on_dy)?, host(&first.0)?);
        for (again, first) in again.iter().flatten().zip(&first.1) {
            assert_eq!(host(again)?, host(first)?);
        }
        Ok(())
    }

    /// Checks the gradients of the pairs. They are made from the low-rank product in the spare columns, which end in
    /// zeros.
    fn gradients(
        gpu: &Gpu,
        made: &[Made],
        (x, on_x): (&Tensor, &Tensor),
        (y, on_y): (&Tensor, &Tensor),
        alpha: f64,
    ) -> Result<()> {
        let (cols, width) = (x.dim(1)?, y.dim(1)?);
        let (mut at, mut rank_at) = (0, 0);
        for (_, _, values) in made {
            let n = values.weight.dims2()?.0;
            if let Some((a, b, scale)) = &values.pair {
                let dy = y.narrow(1, at, n)?.contiguous()?;
                let rank = a.dims2()?.0;
                let start = gpu.random((rank, cols), 7)?;
                let found = gpu.put_as(DType::F32, &start)?;
                let low = Columns { tensor: on_y, at: width + rank_at };
                gradient(low, Columns { tensor: on_x, at: 0 }, alpha, &found)?;
                let expected = ((dy.matmul(b)?.t()?.matmul(x)? * (alpha * scale))? + start.as_tensor())?;
                gpu.same(&found, &expected)?;
                let start = gpu.random((n, rank), 8)?;
                let found = gpu.put_as(DType::F32, &start)?;
                let low = Columns { tensor: on_x, at: cols + rank_at };
                gradient(Columns { tensor: on_y, at }, low, alpha * scale, &found)?;
                let low = x.matmul(&a.t()?)?;
                let expected = ((dy.t()?.matmul(&low)? * (alpha * scale))? + start.as_tensor())?;
                gpu.same(&found, &expected)?;
                rank_at += rank;
            }
            at += n;
        }
        for (wide, own) in [(on_x, cols), (on_y, width)] {
            let host = wide.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
            let behind = host.narrow(1, own + rank_at, wide.dim(1)? - own - rank_at)?;
            assert!(behind.flatten_all()?.to_vec1::<f64>()?.iter().all(|value| *value == 0.0), "zeros");
        }
        Ok(())
    }

    /// Returns the weight and the pair on the GPU, and the values that they stand for.
    fn part(gpu: &Gpu, (rows, pair): Shape, cols: usize, kind: usize, seed: u64) -> Result<Made> {
        let values = gpu.random((rows, cols), 10 + seed)?;
        let floats = values.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let weight = match kind {
            0 => Weight::Dense(gpu.put_as(DType::F32, &values)?),
            1 => Weight::Dense(gpu.put_as(DType::BF16, &values)?),
            _ => {
                let (code, double) = if kind == 2 { (Code::Nf4, true) } else { (Code::Fp4, false) };
                let weight = FourBit::quantize(&floats, rows, cols, code, double)?;
                Weight::FourBit(weight.to_device(&gpu.device)?)
            }
        };
        let stood_for = match &weight {
            Weight::Dense(tensor) => tensor.to_device(&Device::Cpu)?,
            Weight::FourBit(stored) => {
                let values = stored.to_device(&Device::Cpu)?.dequantize()?;
                Tensor::from_vec(values, (rows, cols), &Device::Cpu)?
            }
        };
        let weight_values = stood_for.to_dtype(gpu.dtype)?.to_dtype(DType::F64)?;
        let Some((rank, scale)) = pair else {
            return Ok((weight, None, Values { weight: weight_values, pair: None }));
        };
        let (a, b) = (gpu.random((rank, cols), 20 + seed)?, gpu.random((rows, rank), 30 + seed)?);
        let on_gpu = (gpu.put(&a)?, gpu.put_as(DType::F32, &b)?);
        // scale * B is rounded once, to the activations' type.
        let rounded = (b.as_tensor() * scale)?.to_dtype(gpu.dtype)?.to_dtype(DType::F64)?;
        let pair = Some((a.as_detached_tensor(), (rounded * (1.0 / scale))?, scale));
        Ok((weight, Some(on_gpu), Values { weight: weight_values, pair }))
    }
}
