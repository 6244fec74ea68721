//! Compares every kernel of this machine with a triple loop in f64, over tails, strides, scales and stored forms.

use super::*;
use half::f16;

/// Numbers from a fixed seed in -1..1. They have 24 random bits each, so that f32 products need all of their bits.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> f32 {
        self.bits() as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// Returns the next 24 bits.
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.0 >> 40
    }

    fn vec(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.next()).collect()
    }
}

const NF4: [f32; 16] = [
    -1.0,
    -0.6961928,
    -0.52507305,
    -0.3949175,
    -0.28444138,
    -0.18477343,
    -0.091050036,
    0.0,
    0.0795803,
    0.1609302,
    0.2461123,
    0.33791524,
    0.44070983,
    0.562617,
    0.72295684,
    1.0,
];

/// A 4-bit weight that owns its data, and its values by the definition.
struct Weight {
    packed: Vec<u8>,
    absmax: Vec<f32>,
    rows: usize,
    cols: usize,
    rounding: Rounding,
}

impl Weight {
    fn new(rows: usize, cols: usize, rounding: Rounding, numbers: &mut Numbers) -> Self {
        let count = rows * cols;
        let packed = (0..count.div_ceil(2)).map(|_| numbers.bits() as u8).collect();
        let absmax = (0..count.div_ceil(64)).map(|_| numbers.next().abs() + 0.01).collect();
        Weight { packed, absmax, rows, cols, rounding }
    }

    fn view(&self) -> FourBitView<'_> {
        FourBitView {
            packed: &self.packed,
            absmax: &self.absmax,
            code: &NF4,
            rows: self.rows,
            cols: self.cols,
            block: 64,
            rounding: self.rounding,
        }
    }

    fn values(&self) -> Vec<f32> {
        let value = |at: usize| {
            let byte = self.packed[at / 2];
            let nibble = if at.is_multiple_of(2) { byte >> 4 } else { byte & 15 };
            let product = NF4[nibble as usize] * self.absmax[at / 64];
            match self.rounding {
                Rounding::None => product,
                Rounding::Bf16 => bf16::from_f32(product).to_f32(),
                Rounding::F16 => f16::from_f32(product).to_f32(),
            }
        };
        (0..self.rows * self.cols).map(value).collect()
    }
}

/// An operand [rows, cols] in one stored form, with its dense values.
enum Stored {
    F32 { data: Vec<f32>, row_stride: usize, col_stride: usize },
    Bf16 { data: Vec<bf16>, transposed: bool },
    FourBit { weight: Weight, transposed: bool },
}

#[derive(Clone, Copy, Debug)]
enum Form {
    Rows,
    Columns,
    Padded,
    Strided,
    Bf16(bool),
    FourBit(Rounding, bool),
}

const FORMS: [Form; 10] = [
    Form::Rows,
    Form::Columns,
    Form::Padded,
    Form::Strided,
    Form::Bf16(false),
    Form::Bf16(true),
    Form::FourBit(Rounding::Bf16, true),
    Form::FourBit(Rounding::Bf16, false),
    Form::FourBit(Rounding::F16, true),
    Form::FourBit(Rounding::None, false),
];

impl Stored {
    fn new(form: Form, rows: usize, cols: usize, numbers: &mut Numbers) -> Self {
        let mut floats = |row_stride: usize, col_stride: usize| Stored::F32 {
            data: numbers.vec((rows - 1) * row_stride + (cols - 1) * col_stride + 1),
            row_stride,
            col_stride,
        };
        match form {
            Form::Rows => floats(cols, 1),
            Form::Columns => floats(1, rows),
            Form::Padded => floats(cols + 3, 1),
            Form::Strided => floats(2 * cols + 1, 2),
            Form::Bf16(transposed) => Stored::Bf16 {
                data: numbers.vec(rows * cols).into_iter().map(bf16::from_f32).collect(),
                transposed,
            },
            Form::FourBit(rounding, transposed) => {
                let (rows, cols) = if transposed { (cols, rows) } else { (rows, cols) };
                Stored::FourBit { weight: Weight::new(rows, cols, rounding, numbers), transposed }
            }
        }
    }

    fn matrix(&self, rows: usize, cols: usize) -> Matrix<'_> {
        match self {
            Stored::F32 { data, row_stride, col_stride } => {
                Matrix::F32 { data, rows, cols, row_stride: *row_stride, col_stride: *col_stride }
            }
            Stored::Bf16 { data, transposed: false } => Matrix::bf16(data, rows, cols),
            Stored::Bf16 { data, transposed: true } => Matrix::bf16(data, cols, rows).t(),
            Stored::FourBit { weight, transposed } => {
                Matrix::FourBit { weight: weight.view(), transposed: *transposed }
            }
        }
    }

    /// Returns the values in row-major order.
    fn values(&self, rows: usize, cols: usize) -> Vec<f32> {
        let dense = match self {
            Stored::FourBit { weight, .. } => weight.values(),
            _ => Vec::new(),
        };
        let at = |row: usize, col: usize| match self {
            Stored::F32 { data, row_stride, col_stride } => data[row * row_stride + col * col_stride],
            Stored::Bf16 { data, transposed } => {
                data[if *transposed { col * rows + row } else { row * cols + col }].to_f32()
            }
            Stored::FourBit { transposed, .. } => {
                dense[if *transposed { col * rows + row } else { row * cols + col }]
            }
        };
        (0..rows * cols).map(|index| at(index / cols, index % cols)).collect()
    }
}

struct Case {
    shape: [usize; 3],
    forms: [Form; 2],
    alpha: f32,
    beta: f32,
}

/// Returns `c` by the definition, and the sum of the products' magnitudes, in f64.
fn judge(case: &Case, a: &[f32], b: &[f32], c: &[f32], precision: Precision) -> Vec<(f64, f64)> {
    let [m, n, k] = case.shape;
    let round = |x: f32| match precision {
        Precision::F32 => x as f64,
        Precision::Bf16 | Precision::Fp8 => bf16::from_f32(x).to_f64(),
    };
    let element = |row: usize, col: usize| {
        let (mut sum, mut size) = (0.0, 0.0);
        for depth in 0..k {
            let product = round(a[row * k + depth]) * round(b[depth * n + col]);
            sum += product;
            size += product.abs();
        }
        let old = if case.beta == 0.0 { 0.0 } else { case.beta as f64 * c[row * n + col] as f64 };
        (case.alpha as f64 * sum + old, case.alpha.abs() as f64 * size + old.abs())
    };
    (0..m * n).map(|index| element(index / n, index % n)).collect()
}

fn check(case: Case, seed: u64) {
    let [m, n, k] = case.shape;
    let mut numbers = Numbers(seed);
    let a = Stored::new(case.forms[0], m, k, &mut numbers);
    let b = Stored::new(case.forms[1], k, n, &mut numbers);
    let old = if case.beta == 0.0 { vec![f32::NAN; m * n] } else { numbers.vec(m * n) };
    for precision in [Precision::F32, Precision::Bf16] {
        let expected = judge(&case, &a.values(m, k), &b.values(k, n), &old, precision);
        for kernel in kernels(precision) {
            for threads in [1, 2] {
                // Three elements between rows of c, which must not change.
                let stride = n + 3;
                let mut c = vec![7.0; m * stride];
                for row in 0..m {
                    c[row * stride..][..n].copy_from_slice(&old[row * n..][..n]);
                }
                let (a, b) = (a.matrix(m, k), b.matrix(k, n));
                product(
                    kernel, threads, case.shape, case.alpha, &a, &b, case.beta, &mut c, stride, precision,
                );
                for (index, &(value, size)) in expected.iter().enumerate() {
                    let found = c[index / n * stride + index % n] as f64;
                    // TOLERANCE: k sums and one product each round by 2^-24 of the magnitudes, and errors of random
                    // signs grow like sqrt(k). A factor of about four is reserve, and two roundings are those of
                    // alpha and beta.
                    let bound = size * f32::EPSILON as f64 * (2.0 + 2.0 * (k as f64).sqrt()) + 1e-37;
                    assert!(
                        (found - value).abs() <= bound,
                        "{} {precision:?} {threads} threads {:?} {:?} alpha {} beta {}: [{}, {}] is {found}, \
                         expected {value} +- {bound:e}",
                        kernel.name,
                        case.shape,
                        case.forms,
                        case.alpha,
                        case.beta,
                        index / n,
                        index % n,
                    );
                }
                assert!((0..m).all(|row| c[row * stride + n..][..3] == [7.0; 3]), "wrote between rows");
            }
        }
    }
}

const SIZES: [usize; 12] = [1, 2, 15, 16, 17, 31, 33, 63, 65, 100, 127, 129];
const SCALES: [[f32; 2]; 5] = [[1.0, 0.0], [1.0, 1.0], [0.5, 0.0], [-2.0, 1.0], [0.25, -0.5]];

#[test]
fn every_kernel_form_and_tail_equals_the_triple_loop() {
    let mut numbers = Numbers(1);
    let mut pick = |count: usize| numbers.bits() as usize % count;
    for seed in 0..300 {
        let [alpha, beta] = SCALES[pick(SCALES.len())];
        // Every pair of forms occurs; sizes are drawn at random.
        let forms = [FORMS[seed % FORMS.len()], FORMS[seed / FORMS.len() % FORMS.len()]];
        let shape = [SIZES[pick(SIZES.len())], SIZES[pick(SIZES.len())], SIZES[pick(SIZES.len())]];
        check(Case { shape, forms, alpha, beta }, seed as u64);
    }
}

#[test]
fn long_products_are_added_up_over_slices_and_blocks() {
    let forms = [Form::Rows, Form::FourBit(Rounding::Bf16, true)];
    check(Case { shape: [40, 70, 5000], forms, alpha: 0.5, beta: 1.0 }, 1);
    check(Case { shape: [3, 600, 2049], forms: [Form::Columns, Form::Rows], alpha: 1.0, beta: 0.0 }, 2);
    check(Case { shape: [700, 5, 2100], forms: [Form::Rows, Form::Columns], alpha: 1.0, beta: 0.0 }, 3);
}

#[test]
fn an_empty_sum_scales_c() {
    for (beta, expected) in [(0.0, 0.0), (0.5, 1.0)] {
        let mut c = [2.0; 6];
        gemm(2, 3, 0, 1.0, &Matrix::f32(&[], 2, 0), &Matrix::f32(&[], 0, 3), beta, &mut c, 3, Precision::F32);
        assert_eq!(c, [expected; 6]);
    }
}

#[test]
fn bits_do_not_depend_on_threads_or_neighbours() {
    let [m, n, k] = [300, 200, 3000];
    let mut numbers = Numbers(5);
    let (a, b) = (numbers.vec(m * k), numbers.vec(k * n));
    let (a, b) = (Matrix::f32(&a, m, k), Matrix::f32(&b, k, n));
    for precision in [Precision::F32, Precision::Bf16] {
        let mut alone = vec![0.0; m * n];
        gemm_serial(m, n, k, 1.0, &a, &b, 0.0, &mut alone, n, precision);
        for threads in [1, 2, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut c = vec![0.0; m * n];
            pool.install(|| gemm(m, n, k, 1.0, &a, &b, 0.0, &mut c, n, precision));
            assert!(c == alone, "{threads} threads, {precision:?}");
        }
        // A row alone has the same bits as among 300.
        let Matrix::F32 { data, .. } = a else { unreachable!() };
        let mut row = vec![0.0; n];
        gemm(1, n, k, 1.0, &Matrix::f32(&data[17 * k..][..k], 1, k), &b, 0.0, &mut row, n, precision);
        assert_eq!(row, alone[17 * n..][..n]);
    }
}

#[test]
fn products_inside_parallel_tasks_share_buffers_safely() {
    let mut numbers = Numbers(6);
    let data = numbers.vec(64 * 300);
    let a = Matrix::f32(&data, 64, 300);
    let mut expected = vec![0.0; 64 * 64];
    gemm_serial(64, 64, 300, 1.0, &a, &a.t(), 0.0, &mut expected, 64, Precision::F32);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(4).build().unwrap();
    let results: Vec<Vec<f32>> = pool.install(|| {
        use rayon::prelude::*;
        let one = |_| {
            let mut c = vec![0.0; 64 * 64];
            gemm(64, 64, 300, 1.0, &a, &a.t(), 0.0, &mut c, 64, Precision::F32);
            c
        };
        (0..64).into_par_iter().map(one).collect()
    });
    assert!(results.iter().all(|c| *c == expected));
}

#[test]
fn numbers_that_are_not_finite_stay_visible() {
    for kernel in kernels(Precision::F32) {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut data = vec![1.0; 40 * 40];
            data[3 * 40 + 5] = bad;
            let (a, b) = (Matrix::f32(&data, 40, 40), vec![1.0; 1600]);
            let b = Matrix::f32(&b, 40, 40);
            let mut c = vec![0.0; 1600];
            product(kernel, 1, [40; 3], 1.0, &a, &b, 0.0, &mut c, 40, Precision::F32);
            assert!(c.iter().enumerate().all(|(at, c)| c.is_finite() == (at / 40 != 3)), "{}", kernel.name);
        }
    }
}

#[test]
fn dequantised_values_are_exact() {
    let mut numbers = Numbers(7);
    for rounding in [Rounding::None, Rounding::Bf16, Rounding::F16] {
        for (rows, cols) in [(1, 1), (3, 5), (7, 100), (33, 64), (1030, 129)] {
            let weight = Weight::new(rows, cols, rounding, &mut numbers);
            let mut values = vec![f32::NAN; rows * cols];
            dequantize(&weight.view(), &mut values);
            assert_eq!(values, weight.values(), "[{rows}, {cols}] {rounding:?}");
        }
    }
}

#[test]
#[should_panic(expected = "reaches outside its data")]
fn a_view_past_its_data_is_refused() {
    let data = [0.0; 11];
    gemm(
        3,
        4,
        4,
        1.0,
        &Matrix::f32(&data, 3, 4),
        &Matrix::f32(&[0.0; 16], 4, 4),
        0.0,
        &mut [0.0; 12],
        4,
        Precision::F32,
    );
}

/// Returns weights of every stored form, with depths that fill registers and that do not.
fn few_weights(depth: usize, numbers: &mut Numbers) -> Vec<(Stored, usize)> {
    let forms = [
        (Form::Rows, 40),
        (Form::Bf16(false), 35),
        (Form::FourBit(Rounding::None, false), 33),
        (Form::FourBit(Rounding::Bf16, false), 67),
        (Form::FourBit(Rounding::F16, false), 3),
    ];
    forms.map(|(form, rows)| (Stored::new(form, rows, depth, numbers), rows)).into()
}

/// `c[i, j]` in f64, activations and weights rounded as the precision has it.
fn few_expected(x: &[f32], rows: usize, depth: usize, weight: &[f32], precision: Precision) -> Vec<f64> {
    let round = |value: f32| match precision {
        Precision::F32 => f64::from(value),
        Precision::Bf16 | Precision::Fp8 => bf16::from_f32(value).to_f64(),
    };
    let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| round(*x) * round(*w)).sum::<f64>();
    let weight = weight.chunks(depth);
    (0..rows).flat_map(|i| weight.clone().map(move |w| dot(&x[i * depth..][..depth], w))).collect()
}

#[test]
fn few_rows_equal_a_triple_loop_and_depend_on_nothing_else() {
    use super::few::{Level, few_at, level};
    for at in
        [Level::Portable, Level::Avx2, Level::Avx512, Level::Pairs].into_iter().filter(|at| *at <= level())
    {
        let mut numbers = Numbers(11);
        for depth in [1, 7, 16, 64, 96, 128, 200, 576] {
            let stored = few_weights(depth, &mut numbers);
            let x = numbers.vec(6 * depth);
            for precision in [Precision::F32, Precision::Bf16] {
                for (stored, n) in &stored {
                    // 4-bit values become bf16 where products are made of bf16.
                    let matrix = stored.matrix(*n, depth);
                    if let (Matrix::FourBit { weight, .. }, Precision::Bf16) = (&matrix, precision)
                        && weight.rounding != Rounding::Bf16
                    {
                        continue;
                    }
                    let weight = [super::Weight { matrix, nested: None }];
                    let product = |rows: usize, from: usize| {
                        let mut c = vec![0.25; rows * (n + 3)];
                        let x = &x[from * depth..];
                        few_at(at, x, depth, rows, &weight, 0.5, 2.0, &mut c, n + 3, precision);
                        c
                    };
                    let (all, values) = (product(6, 0), stored.values(*n, depth));
                    let expected = few_expected(&x, 6, depth, &values, precision);
                    for i in 0..6 {
                        for j in 0..*n {
                            let found = f64::from(all[i * (n + 3) + j]);
                            let wanted = 0.5 * expected[i * n + j] + 0.5;
                            // TOLERANCE: rounding of sums of `depth` products of numbers below one.
                            let bound = 1e-6 * (depth as f64).sqrt().max(4.0);
                            assert!(
                                (found - wanted).abs() <= bound,
                                "{at:?} {depth} {precision:?}: {found} {wanted}"
                            );
                        }
                        // A row alone has the bits that it has among others.
                        assert_eq!(product(1, i)[..*n], all[i * (n + 3)..][..*n], "{at:?}, row {i}");
                    }
                    // Values beside the columns stay.
                    assert_eq!(all[*n..n + 3], [0.25; 3]);
                }
            }
        }
    }
}

#[test]
fn nested_scales_are_those_that_were_written_out() {
    let mut numbers = Numbers(5);
    let (rows, depth) = (50, 192);
    let weight = Weight::new(rows, depth, Rounding::Bf16, &mut numbers);
    let blocks = rows * depth / 64;
    let codes: Vec<u8> = (0..blocks).map(|_| numbers.bits() as u8).collect();
    let absmax = numbers.vec(blocks.div_ceil(256));
    let map: [f32; 256] = std::array::from_fn(|_| numbers.next());
    let nested = Nested { codes: &codes, absmax: &absmax, block: 256, map: &map, offset: 0.125 };
    let written = (0..blocks).map(|i| map[usize::from(codes[i])] * absmax[i / 256] + 0.125).collect();
    let plain = Weight { absmax: written, ..weight };
    let (x, shared) = (numbers.vec(2 * depth), FourBitView { absmax: &[], ..plain.view() });
    let of = |matrix, nested| {
        let (weights, mut c) = ([super::Weight { matrix, nested }; 2], vec![0f32; 4 * rows]);
        few(&x, depth, 2, &weights, 1.0, 0.0, &mut c, 2 * rows, Precision::Bf16);
        c
    };
    let found = of(Matrix::four_bit(shared), Some(nested));
    assert_eq!(found, of(Matrix::four_bit(plain.view()), None));
    assert_eq!(found[..rows], found[rows..2 * rows], "weights side by side");
}
