//! LoRA pairs on a few rows of a CPU tensor: `y[row] += factor * (x[row] A^T) B^T`, for layers that read the same x.
//!
//! Each pair is small (16 rows of A and 16 columns of B are usual), so that a product of its own for each matrix would
//! take longer to begin than to compute. Here all pairs of all layers share two rounds of tasks: one for A, beside the
//! product with the layers' weights (`lows_beside`), one for B. Sums are f32, and a row's bits depend on its own pairs
//! alone.

use std::ops::Range;

use candle_core::{DType, Result, Tensor};
use half::bf16;
use rayon::prelude::*;

use super::cpu::{self, Real};
use super::gemm::rounded;
use crate::facts::Precision;

/// Products of two numbers that one task computes at least; waking a thread costs as much.
const TASK_PRODUCTS_MIN: usize = 1 << 15;
/// The same of B: threads are awake behind a product.
const B_TASK_PRODUCTS_MIN: usize = 1 << 13;
/// Columns of y that a task takes at once.
const COLUMNS: usize = 256;

/// A pair on some rows.
pub struct Pair<'a> {
    /// A [R, K], in f32 or bf16.
    pub a: &'a Tensor,
    /// B as `across` lays it, in f32 or bf16.
    pub b: &'a Tensor,
    /// The rows of x and y.
    pub rows: Range<usize>,
    /// The factor on the pair's part.
    pub factor: f64,
}

/// A layer: the first of its columns in y, and its pairs in the order in which they are added.
pub struct Layer<'a> {
    /// The first column.
    pub at: usize,
    /// The number of the layer's columns.
    pub columns: usize,
    /// The pairs.
    pub pairs: Vec<Pair<'a>>,
}

/// x A^T of all pairs of all layers.
pub struct Lows(Vec<Vec<f32>>);

/// Returns B [N, R] as tasks read it: B^T of `COLUMNS` columns of y, then that of the next ones. Neighbours are
/// columns.
pub fn across(b: &Tensor) -> Result<Tensor> {
    let columns = b.dim(0)?;
    let block =
        |from: usize| b.narrow(0, from, COLUMNS.min(columns - from))?.t()?.contiguous()?.flatten_all();
    Tensor::cat(&(0..columns).step_by(COLUMNS).map(block).collect::<Result<Vec<_>>>()?, 0)
}

/// Adds the parts of all pairs of all layers, made of x [T, K], to y [T, any]. False if a matrix or an activation has
/// another type than said here; then nothing was done.
pub fn add(x: &Tensor, y: &Tensor, layers: &[Layer], precision: Precision) -> Result<bool> {
    match lows(x, layers, precision)? {
        Some(lows) => add_lows(y, layers, &lows, precision).map(|()| true),
        None => Ok(false),
    }
}

/// Runs a product and makes x A^T of all pairs beside it. `None`: a matrix or x has another type than said here.
pub fn lows_beside<R: Send>(
    x: &Tensor,
    layers: &[Layer],
    precision: Precision,
    product: impl FnOnce() -> R + Send,
) -> (R, Result<Option<Lows>>) {
    rayon::join(product, || lows(x, layers, precision))
}

fn lows(x: &Tensor, layers: &[Layer], precision: Precision) -> Result<Option<Lows>> {
    let (_, k) = x.dims2()?;
    let pairs: Vec<&Pair> = layers.iter().flat_map(|layer| &layer.pairs).collect();
    let is_held = |tensor: &Tensor| matches!(tensor.dtype(), DType::F32 | DType::BF16);
    if x.dtype() != DType::F32 || pairs.iter().any(|pair| !is_held(pair.a) || !is_held(pair.b)) {
        return Ok(None);
    }
    let mut x = cpu::read::<f32>(x)?.to_vec();
    round(&mut x, precision);
    let a = pairs.iter().map(|pair| Values::of(pair.a)).collect::<Result<Vec<Values>>>()?;
    Ok(Some(Lows(through_a(&x, k, &pairs, &a, precision))))
}

/// Adds what B makes of x A^T to y [T, any].
pub fn add_lows(y: &Tensor, layers: &[Layer], lows: &Lows, precision: Precision) -> Result<()> {
    let (_, width) = y.dims2()?;
    let pairs: Vec<&Pair> = layers.iter().flat_map(|layer| &layer.pairs).collect();
    let b = pairs.iter().map(|pair| Values::of(pair.b)).collect::<Result<Vec<Values>>>()?;
    cpu::edit(y, |y: &mut [f32]| through_b(y, width, layers, &pairs, &b, &lows.0, precision))
}

/// Converts the values to the form that products of this precision take.
fn round(values: &mut [f32], precision: Precision) {
    if precision == Precision::F32 {
        return;
    }
    cpu::vectorized(
        #[inline(always)]
        || {
            for value in values {
                *value = rounded(*value, precision);
            }
        },
    );
}

impl Pair<'_> {
    fn rank(&self) -> usize {
        self.a.dims()[0]
    }
}

/// A matrix, as it is stored.
enum Values<'a> {
    F32(cpu::Read<'a, f32>),
    Bf16(cpu::Read<'a, bf16>),
}

impl Values<'_> {
    fn of(tensor: &Tensor) -> Result<Values<'_>> {
        Ok(match tensor.dtype() {
            DType::BF16 => Values::Bf16(cpu::read(tensor)?),
            _ => Values::F32(cpu::read(tensor)?),
        })
    }
}

/// Runs the body with the values of `$range` and a function that widens one as products of this precision take it.
macro_rules! with_values {
    ($values:expr, $range:expr, $precision:expr, |$slice:ident, $wide:ident| $body:expr) => {
        match $values {
            Values::Bf16(values) => {
                let ($slice, $wide) = (&values[$range], <f32 as Real>::widen);
                $body
            }
            Values::F32(values) if $precision == Precision::F32 => {
                let ($slice, $wide) = (
                    &values[$range],
                    #[inline(always)]
                    |value: f32| value,
                );
                $body
            }
            Values::F32(values) => {
                let ($slice, $wide) = (
                    &values[$range],
                    #[inline(always)]
                    |value: f32| rounded(value, $precision),
                );
                $body
            }
        }
    };
}

/// Lanes of a sum over the columns of A.
const LANES: usize = 32;

/// Rows of x whose sums a task makes at once.
const ROWS: usize = 4;

/// Returns the sum of w * x for each x, whose order depends on the length alone.
#[inline(always)]
fn dots<W: Copy, const N: usize>(w: &[W], x: [&[f32]; N], wide: impl Fn(W) -> f32) -> [f32; N] {
    let (w_chunks, w_rest) = w.as_chunks::<LANES>();
    let mut lanes = [[0f32; LANES]; N];
    for (at, w) in w_chunks.iter().enumerate() {
        for (lanes, x) in lanes.iter_mut().zip(&x) {
            let x = &x[LANES * at..][..LANES];
            for i in 0..LANES {
                lanes[i] = wide(w[i]).mul_add(x[i], lanes[i]);
            }
        }
    }
    let mut sums = [0f32; N];
    for ((sum, mut lanes), x) in sums.iter_mut().zip(lanes).zip(&x) {
        for ((w, x), lane) in w_rest.iter().zip(&x[LANES * w_chunks.len()..]).zip(&mut lanes) {
            *lane = wide(*w).mul_add(*x, *lane);
        }
        *sum = folded(lanes);
    }
    sums
}

#[inline(always)]
fn folded(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// Columns whose sums stay in registers.
const TILE: usize = 32;

/// y += factor * low B^T for a block of `across`, as wide as y.
#[inline(always)]
fn add_block<W: Copy>(y: &mut [f32], w: &[W], low: &[f32], factor: f32, wide: impl Fn(W) -> f32) {
    let columns = y.len();
    let (tiles, rest) = y.as_chunks_mut::<TILE>();
    let from = TILE * tiles.len();
    for (number, y) in tiles.iter_mut().enumerate() {
        let mut sums = [0f32; TILE];
        for (w, low) in w.chunks_exact(columns).zip(low) {
            let w = &w[TILE * number..][..TILE];
            for i in 0..TILE {
                sums[i] = wide(w[i]).mul_add(*low, sums[i]);
            }
        }
        for i in 0..TILE {
            y[i] += factor * sums[i];
        }
    }
    for (i, y) in rest.iter_mut().enumerate() {
        let products = w.chunks_exact(columns).zip(low);
        let sum = products.fold(0f32, |sum, (w, low)| wide(w[from + i]).mul_add(*low, sum));
        *y += factor * sum;
    }
}

/// Returns x A^T of each pair: for each of its rows, R values, rounded as the next product takes them.
fn through_a(x: &[f32], k: usize, pairs: &[&Pair], a: &[Values], precision: Precision) -> Vec<Vec<f32>> {
    let products = pairs.iter().map(|pair| pair.rank() * pair.rows.len() * k).sum();
    // Some rows of a pair's A, which are read once for all rows of x.
    let units = |rows: usize| -> Vec<(usize, Range<usize>)> {
        let of = |(number, pair): (usize, &&Pair)| {
            let rank = pair.rank();
            (0..rank).step_by(rows).map(move |from| (number, from..rank.min(from + rows))).collect::<Vec<_>>()
        };
        pairs.iter().enumerate().flat_map(of).collect()
    };
    let unit = |(number, range): &(usize, Range<usize>)| -> Vec<f32> {
        let pair = pairs[*number];
        let mut found = vec![0f32; range.len() * pair.rows.len()];
        cpu::vectorized(
            #[inline(always)]
            || {
                for (at, found) in range.clone().zip(found.chunks_exact_mut(pair.rows.len())) {
                    with_values!(&a[*number], at * k..(at + 1) * k, precision, |w, wide| {
                        let row = |row: usize| &x[(pair.rows.start + row) * k..][..k];
                        let (several, rest) = found.as_chunks_mut::<ROWS>();
                        let behind = ROWS * several.len();
                        for (number, found) in several.iter_mut().enumerate() {
                            let first = ROWS * number;
                            let x: [&[f32]; ROWS] =
                                [row(first), row(first + 1), row(first + 2), row(first + 3)];
                            for (found, sum) in found.iter_mut().zip(dots(w, x, wide)) {
                                *found = rounded(sum, precision);
                            }
                        }
                        for (number, found) in rest.iter_mut().enumerate() {
                            let [sum] = dots(w, [row(behind + number)], wide);
                            *found = rounded(sum, precision);
                        }
                    });
                }
            },
        );
        found
    };
    let all: usize = pairs.iter().map(|pair| pair.rank()).sum();
    let found: Vec<Vec<f32>> = match at_once(products, TASK_PRODUCTS_MIN, all) {
        None => units(usize::MAX).iter().map(unit).collect(),
        Some(rows) => units(rows).par_iter().with_max_len(1).map(unit).collect(),
    };
    // [R, rows] of each pair, one behind the other -> [rows, R].
    let mut found = found.iter().flatten();
    let mut of_pair = |pair: &&Pair| {
        let (rank, rows) = (pair.rank(), pair.rows.len());
        let mut low = vec![0f32; rows * rank];
        for (at, value) in found.by_ref().take(rows * rank).enumerate() {
            low[at % rows * rank + at / rows] = *value;
        }
        low
    };
    pairs.iter().map(&mut of_pair).collect()
}

/// Some columns of y in one row.
struct Part<'y> {
    layer: usize,
    columns: Range<usize>,
    row: usize,
    y: &'y mut [f32],
}

/// y += factor * low B^T, for each pair that has the row, in their order.
fn through_b(
    y: &mut [f32],
    width: usize,
    layers: &[Layer],
    pairs: &[&Pair],
    b: &[Values],
    lows: &[Vec<f32>],
    precision: Precision,
) {
    let mut first = 0;
    let numbers = layers.iter().map(|layer| {
        first += layer.pairs.len();
        first - layer.pairs.len()..first
    });
    let numbers: Vec<Range<usize>> = numbers.collect();
    let products = |layer: &Layer| -> usize {
        layer.pairs.iter().map(|pair| pair.rows.len() * layer.columns * pair.rank()).sum()
    };
    let products = layers.iter().map(products).sum();
    let mut parts = parts(y, width, layers);
    let add = |part: &mut Part| {
        cpu::vectorized(
            #[inline(always)]
            || {
                for number in numbers[part.layer].clone() {
                    let pair = pairs[number];
                    if !pair.rows.contains(&part.row) {
                        continue;
                    }
                    let rank = pair.rank();
                    let low = &lows[number][(part.row - pair.rows.start) * rank..][..rank];
                    let (block, factor) = (&part.columns, pair.factor as f32);
                    with_values!(&b[number], block.start * rank..block.end * rank, precision, |w, wide| {
                        add_block(&mut *part.y, w, low, factor, wide)
                    });
                }
            },
        )
    };
    match at_once(products, B_TASK_PRODUCTS_MIN, parts.len()) {
        None => parts.iter_mut().for_each(add),
        Some(least) => parts.par_iter_mut().with_min_len(least).for_each(add),
    }
}

/// Returns the columns of all layers in all rows that have a pair. Parts that read the same columns of B^T are
/// neighbours.
fn parts<'y>(y: &'y mut [f32], width: usize, layers: &[Layer]) -> Vec<Part<'y>> {
    let mut order: Vec<usize> = (0..layers.len()).collect();
    order.sort_by_key(|layer| layers[*layer].at);
    let mut parts = Vec::new();
    for (row, mut rest) in y.chunks_mut(width).enumerate() {
        let mut at = 0;
        for &number in &order {
            let layer = &layers[number];
            let (own, behind) = rest.split_at_mut(layer.at - at).1.split_at_mut(layer.columns);
            (rest, at) = (behind, layer.at + layer.columns);
            if layer.pairs.iter().any(|pair| pair.rows.contains(&row)) {
                for (block, y) in own.chunks_mut(COLUMNS).enumerate() {
                    let columns = block * COLUMNS..block * COLUMNS + y.len();
                    parts.push(Part { layer: number, columns, row, y });
                }
            }
        }
    }
    parts.sort_by_key(|part| (part.layer, part.columns.start, part.row));
    parts
}

/// Returns the units that a task has at least if it computes `least` products; `None`: all of them are quicker on this
/// thread.
fn at_once(products: usize, least: usize, units: usize) -> Option<usize> {
    let tasks = (products / least).min(4 * rayon::current_num_threads()).min(units);
    (tasks > 1).then(|| units.div_ceil(tasks))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn random(shape: (usize, usize), seed: u64) -> Tensor {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        cpu::tensor((0..shape.0 * shape.1).map(|_| next()).collect(), shape).unwrap()
    }

    fn in_precision(tensor: &Tensor, precision: Precision) -> Tensor {
        match precision {
            Precision::F32 => tensor.clone(),
            _ => tensor.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap(),
        }
    }

    /// The pairs of a case: (layer, rows, factor).
    const PAIRS: [(usize, Range<usize>, f64); 6] =
        [(0, 0..1, 1.0), (0, 2..5, 0.5), (0, 3..4, -2.0), (1, 0..5, 0.25), (2, 4..5, 1.0), (2, 4..5, 3.0)];

    /// Returns one after the other, in f64, with the values rounded as the precision says.
    fn expected(
        x: &Tensor,
        y: &Tensor,
        weights: &[(Tensor, Tensor)],
        at: &[usize],
        precision: Precision,
    ) -> Tensor {
        let wide = |tensor: &Tensor| in_precision(tensor, precision).to_dtype(DType::F64).unwrap();
        let (x, mut sums) = (wide(x), y.to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap());
        for ((layer, rows, factor), (a, b)) in PAIRS.iter().zip(weights) {
            let low = x.narrow(0, rows.start, rows.len()).unwrap().matmul(&wide(a).t().unwrap()).unwrap();
            let low = wide(&low.to_dtype(DType::F32).unwrap());
            let added = low.matmul(&wide(b).t().unwrap()).unwrap().to_vec2::<f64>().unwrap();
            for (row, added) in rows.clone().zip(added) {
                added
                    .iter()
                    .enumerate()
                    .for_each(|(column, value)| sums[row][at[*layer] + column] += factor * value);
            }
        }
        Tensor::new(sums, &Device::Cpu).unwrap()
    }

    /// Ranks below, at and beyond the lanes of a sum, and depths that leave a rest; rows without, with one and with two
    /// pairs; columns that no layer has; layers in another order than their columns; one thread and several tasks.
    #[test]
    fn every_row_gets_the_sum_of_its_own_pairs() {
        for (k, columns, ranks) in
            [(7, [5, 3, 9], [3, 8, 1, 2, 16, 5]), (2100, [700, 260, 520], [16, 8, 40, 64, 16, 3])]
        {
            let at = [columns[1] + 1, 0, columns[0] + columns[1] + 3];
            let width = at[2] + columns[2] + 1;
            let (x, y) = (random((5, k), 1), random((5, width), 2));
            let weights: Vec<(Tensor, Tensor)> = PAIRS
                .iter()
                .zip(ranks)
                .enumerate()
                .map(|(seed, ((layer, ..), rank))| {
                    (random((rank, k), 10 + seed as u64), random((columns[*layer], rank), 20 + seed as u64))
                })
                .collect();
            for (precision, stored) in
                [(Precision::F32, DType::F32), (Precision::Bf16, DType::F32), (Precision::Bf16, DType::BF16)]
            {
                let dense = |tensor: &Tensor| tensor.to_dtype(stored).unwrap().contiguous().unwrap();
                let held: Vec<(Tensor, Tensor)> =
                    weights.iter().map(|(a, b)| (dense(a), across(&dense(b)).unwrap())).collect();
                let layer = |number: usize, rows: &Range<usize>| {
                    let own = PAIRS.iter().zip(&held).filter(|((layer, ..), _)| *layer == number);
                    let pairs = own.filter_map(|((_, of, factor), (a, b))| {
                        let within = of.start.max(rows.start)..of.end.min(rows.end);
                        let shifted =
                            within.start.saturating_sub(rows.start)..within.end.saturating_sub(rows.start);
                        (within.start < within.end).then_some(Pair { a, b, rows: shifted, factor: *factor })
                    });
                    Layer { at: at[number], columns: columns[number], pairs: pairs.collect() }
                };
                let added = |rows: Range<usize>| {
                    let take =
                        |tensor: &Tensor| tensor.narrow(0, rows.start, rows.len()).unwrap().copy().unwrap();
                    let (x, y) = (take(&x), take(&y));
                    let layers: Vec<Layer> = (0..3).map(|number| layer(number, &rows)).collect();
                    assert!(add(&x, &y, &layers, precision).unwrap());
                    y
                };
                let found = added(0..5);
                let expected = expected(&x, &y, &weights, &at, precision);
                let size = expected.abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
                let error = (found.to_dtype(DType::F64).unwrap() - expected).unwrap().abs().unwrap();
                let error = error.max_all().unwrap().to_scalar::<f64>().unwrap();
                // TOLERANCE: sums of 2,100 values in f32. In bf16 a sum near the middle of two values may round to the
                // other one.
                let most = if precision == Precision::F32 { 2e-6 } else { 4e-3 };
                assert!(error <= most * size, "{precision:?} {stored:?} {k}: {error} of {size}");
                // Alone on one thread, a row has the same bits.
                for row in 0..5 {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
                    let alone = pool.install(|| added(row..row + 1)).to_vec2::<f32>().unwrap();
                    assert_eq!(alone[0], found.get(row).unwrap().to_vec1::<f32>().unwrap());
                }
            }
        }
    }

    #[test]
    fn other_types_are_left_to_the_products() {
        let pair = |dtype| {
            let weight = Tensor::zeros((2, 2), dtype, &Device::Cpu).unwrap();
            let y = Tensor::zeros((1, 2), dtype, &Device::Cpu).unwrap();
            let layers = [Layer {
                at: 0,
                columns: 2,
                pairs: vec![Pair { a: &weight, b: &weight, rows: 0..1, factor: 1.0 }],
            }];
            add(&y.copy().unwrap(), &y, &layers, Precision::F32).unwrap()
        };
        assert_eq!([DType::F32, DType::F64].map(pair), [true, false]);
    }
}
