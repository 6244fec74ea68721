//! Shapes of training -> GFLOP/s of `ops::gemm` and of the `gemm` crate; the best of rounds taken in turn.
//!
//! `cargo bench --bench gemm [filter]`. Each line also shows the share of the fastest line of its precision.

use hone::facts::Precision;
use hone::ops::gemm::{self, FourBitView, Matrix, Rounding};
use std::time::{Duration, Instant};

/// Rounds taken in turn. The best is kept, so a disturbed round does not count.
const ROUNDS: usize = 7;
/// Time for one line of one round.
const ROUND_TIME: Duration = Duration::from_millis(60);

#[derive(Clone, Copy, PartialEq)]
enum What {
    /// y[T, N] = x[T, K] * w[N, K]^T
    Forward,
    /// The same with a 4-bit weight.
    ForwardFourBit,
    /// dx[T, K] = dy[T, N] * w[N, K], 4-bit
    BackwardFourBit,
    /// da[R, K] += v[T, R]^T * x[T, K]
    Gradient,
}

/// (what, m, n, k)
const CASES: [(What, usize, usize, usize); 16] = [
    (What::Forward, 512, 2048, 768),
    (What::Forward, 512, 768, 2048),
    (What::Forward, 2048, 2048, 2048),
    (What::Forward, 2048, 5632, 2048),
    (What::Forward, 4096, 256, 768),
    (What::Forward, 2048, 8, 768),
    (What::Forward, 2048, 768, 8),
    (What::Forward, 2048, 64, 2048),
    (What::ForwardFourBit, 512, 2048, 768),
    (What::ForwardFourBit, 2048, 2048, 2048),
    (What::BackwardFourBit, 2048, 2048, 2048),
    (What::BackwardFourBit, 2048, 2048, 5632),
    (What::Gradient, 8, 768, 2048),
    (What::Gradient, 64, 2048, 2048),
    (What::Forward, 128, 128, 128),
    (What::Forward, 32, 32, 32),
];

fn main() {
    let filter: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    println!(
        "{} threads; f32 by {}, bf16 by {}",
        rayon::current_num_threads(),
        gemm::kernel_name(Precision::F32),
        gemm::kernel_name(Precision::Bf16)
    );
    println!("GFLOP/s, best of {ROUNDS}");
    println!("{:>34} {:>14} {:>14} {:>14}", "m x n x k", "f32", "bf16", "gemm crate");
    let mut rows = Vec::new();
    for case in CASES {
        let name = name(case);
        if filter.iter().all(|part| name.contains(part.as_str())) {
            rows.push((name, measure(case)));
        }
    }
    let best = |column: usize| rows.iter().map(|(_, rates)| rates[column]).fold(0.0, f64::max);
    for (name, rates) in &rows {
        let cell =
            |column: usize| format!("{:.0} ({:.0} %)", rates[column], 100.0 * rates[column] / best(column));
        println!("{name:>34} {:>14} {:>14} {:>14}", cell(0), cell(1), cell(2));
    }
}

fn name((what, m, n, k): (What, usize, usize, usize)) -> String {
    let what = match what {
        What::Forward => "forward",
        What::ForwardFourBit => "forward 4-bit",
        What::BackwardFourBit => "backward 4-bit",
        What::Gradient => "gradient",
    };
    format!("{what} {m} x {n} x {k}")
}

/// Returns the GFLOP/s in f32, in bf16, and of the `gemm` crate in f32 (with the same values in a dense weight).
fn measure((what, m, n, k): (What, usize, usize, usize)) -> [f64; 3] {
    let numbers =
        |count: usize| (0..count).map(|i| (i * 7919 % 1021) as f32 / 1021.0 - 0.5).collect::<Vec<_>>();
    let (a, b, mut c) = (numbers(m * k), numbers(k * n), vec![0.0; m * n]);
    let packed: Vec<u8> = (0..(k * n).div_ceil(2)).map(|i| (i * 131) as u8).collect();
    let absmax = vec![0.5; (k * n).div_ceil(64)];
    let code: [f32; 16] = std::array::from_fn(|i| i as f32 / 8.0 - 1.0);
    let weight = |rows, cols| FourBitView {
        packed: &packed,
        absmax: &absmax,
        code: &code,
        rows,
        cols,
        block: 64,
        rounding: Rounding::Bf16,
    };
    let (a, b, beta) = match what {
        What::Forward => (Matrix::f32(&a, m, k), Matrix::f32(&b, n, k).t(), 0.0),
        What::ForwardFourBit => (Matrix::f32(&a, m, k), Matrix::four_bit(weight(n, k)).t(), 0.0),
        What::BackwardFourBit => (Matrix::f32(&a, m, k), Matrix::four_bit(weight(k, n)), 0.0),
        What::Gradient => (Matrix::f32(&a, k, m).t(), Matrix::f32(&b, k, n), 1.0),
    };
    let mut best = [f64::MAX; 3];
    for _ in 0..ROUNDS {
        for (column, best) in best.iter_mut().enumerate() {
            let mut once = || match column {
                0 => gemm::gemm(m, n, k, 1.0, &a, &b, beta, &mut c, n, Precision::F32),
                1 => gemm::gemm(m, n, k, 1.0, &a, &b, beta, &mut c, n, Precision::Bf16),
                _ => peer(what, m, n, k, &a, beta, &mut c),
            };
            let start = Instant::now();
            while start.elapsed() < ROUND_TIME {
                let start = Instant::now();
                once();
                *best = best.min(start.elapsed().as_secs_f64());
            }
        }
    }
    best.map(|seconds| 2e-9 * (m * n * k) as f64 / seconds)
}

/// The `gemm` crate on the same operands; 4-bit weights are compared with their dense form.
fn peer(what: What, m: usize, n: usize, k: usize, a: &Matrix, beta: f32, c: &mut [f32]) {
    thread_local!(static DENSE: std::cell::RefCell<Vec<f32>> = const { std::cell::RefCell::new(Vec::new()) });
    let Matrix::F32 { data, row_stride, col_stride, .. } = *a else { return };
    let (b_row, b_col) = match what {
        What::Forward | What::ForwardFourBit => (1, k as isize),
        What::BackwardFourBit | What::Gradient => (n as isize, 1),
    };
    DENSE.with_borrow_mut(|b| {
        b.resize(b.len().max(k * n), 0.25);
        // SAFETY: the strides describe [m, k], [k, n] and [m, n] inside the three slices.
        unsafe {
            ::gemm::gemm(
                m,
                n,
                k,
                c.as_mut_ptr(),
                1,
                n as isize,
                beta != 0.0,
                data.as_ptr(),
                col_stride as isize,
                row_stride as isize,
                b.as_ptr(),
                b_col,
                b_row,
                beta,
                1.0,
                false,
                false,
                false,
                ::gemm::Parallelism::Rayon(0),
            );
        }
    });
}
