//! AdamW whose moments take 8 bits each, in blocks of 256, as bitsandbytes keeps them: gradients and 8-bit moments in
//! -> updated parameters and 8-bit moments out.
//!
//! A block stores its largest absolute value and, for each value, the number of the nearest entry of a dynamic map: the
//! signed one for the first moment, the unsigned one for the second. An update widens the moments to f32, changes them,
//! uses them for the parameters, and rounds them afterwards. Matrices with fewer than 4,096 values keep f32 moments.
//! Source: 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861), bitsandbytes 0.50.

use std::ops::Range;

use candle_core::{DType, Result, Tensor, bail};
use rayon::prelude::*;

use super::adamw::Update;
use super::cpu;
use super::four_bit::{dynamic_map, unsigned_dynamic_map};
use super::number::Number;

/// Values that share one scale.
pub const BLOCK: usize = 256;
/// Values of the smallest matrix with 8-bit moments (bitsandbytes' `min_8bit_size`).
pub const VALUES_MIN: usize = 4096;

/// One matrix of a flat buffer.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    /// The place of its values.
    pub values: Range<usize>,
    /// Whether the matrix learns at `Rates::faster` times the rate.
    pub faster: bool,
}

impl Matrix {
    fn is_narrow(&self) -> bool {
        self.values.len() >= VALUES_MIN
    }

    /// Returns the number of bytes of the two moments of a matrix of so many values.
    pub fn moment_bytes(values: usize) -> usize {
        match values >= VALUES_MIN {
            true => 2 * (values + values.div_ceil(BLOCK) * 4),
            false => 2 * values * 4,
        }
    }
}

/// The moments of all matrices of a flat buffer. The first half of each tensor belongs to the first moments.
#[derive(Clone, Debug)]
pub struct Moments {
    matrices: Vec<Matrix>,
    /// Numbers of map entries, u8 [2 * values of matrices in 8 bits].
    pub codes: Tensor,
    /// The scale of each block, f32 [2 * blocks].
    pub scales: Tensor,
    /// Moments of small matrices, f32 [2 * values of small matrices].
    pub wide: Tensor,
    /// The table that the kernel reads.
    #[cfg(feature = "cuda")]
    table: Option<gpu::Table>,
}

impl Moments {
    /// Returns moments of zero for the matrices of `params`, which follow one another without gaps.
    pub fn zeros(params: &Tensor, matrices: Vec<Matrix>) -> Result<Moments> {
        if params.dtype() != DType::F32 {
            bail!("8-bit moments are for parameters in f32, found {:?}", params.dtype());
        }
        let end = matrices
            .iter()
            .try_fold(0, |at, matrix| (matrix.values.start == at).then_some(matrix.values.end));
        if end != Some(params.elem_count()) {
            bail!("the matrices do not cover {} parameters one after the other", params.elem_count());
        }
        let values = |narrow: bool| -> usize {
            let of_kind = matrices.iter().filter(|matrix| matrix.is_narrow() == narrow);
            of_kind.map(|matrix| matrix.values.len()).sum()
        };
        let blocks: usize = matrices.iter().filter(|matrix| matrix.is_narrow()).map(blocks).sum();
        // A GPU has no memory of no bytes.
        let zeros = |count: usize, dtype| Tensor::zeros(2 * count.max(1), dtype, params.device());
        Ok(Moments {
            codes: zeros(values(true), DType::U8)?,
            scales: zeros(blocks, DType::F32)?,
            wide: zeros(values(false), DType::F32)?,
            #[cfg(feature = "cuda")]
            table: gpu::Table::of(&matrices, params.device())?,
            matrices,
        })
    }

    /// (values with 8-bit moments, all values).
    pub fn narrow_values(&self) -> (usize, usize) {
        let narrow = self.matrices.iter().filter(|matrix| matrix.is_narrow());
        let all = self.matrices.last().map_or(0, |matrix| matrix.values.end);
        (narrow.map(|matrix| matrix.values.len()).sum(), all)
    }
}

fn blocks(matrix: &Matrix) -> usize {
    matrix.values.len().div_ceil(BLOCK)
}

/// Updates `params` and `moments` in place, as `adamw::step` does. `faster`: the factor on the learning rate of the
/// matrices that learn faster.
pub fn step(
    params: &Tensor,
    grads: &Tensor,
    moments: &Moments,
    update: &Update,
    faster: f64,
    squares: &Number,
    copy: Option<&Tensor>,
) -> Result<()> {
    if grads.elem_count() != params.elem_count() || moments.narrow_values().1 != params.elem_count() {
        bail!("the optimizer's buffers differ in length");
    }
    #[cfg(feature = "cuda")]
    if params.device().is_cuda() {
        return gpu::step(params, grads, moments, update, faster, squares, copy);
    }
    if copy.is_some() {
        bail!("a copy of the parameters in bf16 is for GPUs");
    }
    let squares = squares.value()?;
    if !squares.is_finite() {
        return Ok(());
    }
    let numbers = |faster: f64| Numbers::of(update, faster, squares);
    let (usual, faster) = (numbers(1.0), numbers(faster));
    let g = &*cpu::read::<f32>(grads)?;
    cpu::edit(params, |p: &mut [f32]| {
        cpu::edit(&moments.codes, |codes: &mut [u8]| {
            cpu::edit(&moments.scales, |scales: &mut [f32]| {
                cpu::edit(&moments.wide, |wide: &mut [f32]| {
                    let jobs = jobs(&moments.matrices, p, g, codes, scales, wide);
                    jobs.into_par_iter().for_each(|job| job.run(&usual, &faster));
                })
            })
        })
    })???
}

/// The numbers of one update in f32.
#[derive(Clone, Copy)]
struct Numbers {
    clip: f32,
    beta1: f32,
    c1: f32,
    beta2: f32,
    c2: f32,
    decay: f32,
    rate: f32,
    root2: f32,
    epsilon: f32,
}

impl Numbers {
    fn of(update: &Update, faster: f64, squares: f64) -> Numbers {
        let Rates { decay, rate, root2 } = Rates::of(update, faster);
        let clip = update.norm_max.map_or(1.0, |max| (max / (squares.sqrt() + 1e-6)).min(1.0));
        Numbers {
            clip: clip as f32,
            beta1: update.beta1 as f32,
            c1: (1.0 - update.beta1) as f32,
            beta2: update.beta2 as f32,
            c2: (1.0 - update.beta2) as f32,
            decay: decay as f32,
            rate: rate as f32,
            root2: root2 as f32,
            epsilon: update.epsilon as f32,
        }
    }

    /// Updates one parameter and its moments.
    #[inline(always)]
    fn apply(&self, p: &mut f32, g: f32, m: &mut f32, v: &mut f32) {
        let g = g * self.clip;
        *m = *m * self.beta1 + g * self.c1;
        *v = *v * self.beta2 + g * g * self.c2;
        *p = *p * self.decay - self.rate * *m / (v.sqrt() / self.root2 + self.epsilon);
    }
}

/// The factors that depend on the learning rate.
struct Rates {
    /// Factor on the parameters.
    decay: f64,
    /// The learning rate over the first moment's correction.
    rate: f64,
    /// The root of the second moment's correction.
    root2: f64,
}

impl Rates {
    fn of(update: &Update, faster: f64) -> Rates {
        let learning_rate = update.learning_rate * faster;
        let corrected = |beta: f64| 1.0 - beta.powi(update.step as i32);
        Rates {
            decay: 1.0 - learning_rate * update.weight_decay,
            rate: learning_rate / corrected(update.beta1),
            root2: corrected(update.beta2).sqrt(),
        }
    }
}

/// One matrix's parts of all buffers.
struct Job<'a> {
    p: &'a mut [f32],
    g: &'a [f32],
    state: JobState<'a>,
    faster: bool,
}

enum JobState<'a> {
    Narrow { codes: [&'a mut [u8]; 2], scales: [&'a mut [f32]; 2] },
    Wide([&'a mut [f32]; 2]),
}

fn jobs<'a>(
    matrices: &[Matrix],
    mut p: &'a mut [f32],
    g: &'a [f32],
    codes: &'a mut [u8],
    scales: &'a mut [f32],
    wide: &'a mut [f32],
) -> Vec<Job<'a>> {
    let (mut codes, mut scales, mut wide) = (halves(codes), halves(scales), halves(wide));
    let job = |matrix: &Matrix| {
        let count = matrix.values.len();
        let state = match matrix.is_narrow() {
            true => JobState::Narrow {
                codes: codes.each_mut().map(|codes| take(codes, count)),
                scales: scales.each_mut().map(|scales| take(scales, blocks(matrix))),
            },
            false => JobState::Wide(wide.each_mut().map(|wide| take(wide, count))),
        };
        Job { p: take(&mut p, count), g: &g[matrix.values.clone()], state, faster: matrix.faster }
    };
    matrices.iter().map(job).collect()
}

fn halves<T>(all: &mut [T]) -> [&mut [T]; 2] {
    all.split_at_mut(all.len() / 2).into()
}

/// Returns the first `count` elements, which `from` loses.
fn take<'a, T>(from: &mut &'a mut [T], count: usize) -> &'a mut [T] {
    from.split_off_mut(..count).expect("as many as there are")
}

impl Job<'_> {
    fn run(self, usual: &Numbers, faster: &Numbers) {
        let Job { p, g, state, faster: learns_faster } = self;
        let numbers = if learns_faster { faster } else { usual };
        match state {
            JobState::Wide([first, second]) => {
                for (((p, &g), m), v) in p.iter_mut().zip(g).zip(first).zip(second) {
                    numbers.apply(p, g, m, v);
                }
            }
            JobState::Narrow { codes: [first, second], scales: [first_scales, second_scales] } => {
                let (signed, unsigned) = (Map::signed(), Map::unsigned());
                let first = first.par_chunks_mut(BLOCK).zip(first_scales);
                let second = second.par_chunks_mut(BLOCK).zip(second_scales);
                let values = p.par_chunks_mut(BLOCK).zip(g.par_chunks(BLOCK));
                values.zip(first.zip(second)).for_each(|((p, g), (first, second))| {
                    let (mut m, mut v) =
                        (signed.widen(first.0, *first.1), unsigned.widen(second.0, *second.1));
                    for (((p, &g), m), v) in p.iter_mut().zip(g).zip(&mut m).zip(&mut v) {
                        numbers.apply(p, g, m, v);
                    }
                    *first.1 = signed.round(&m[..p.len()], first.0);
                    *second.1 = unsigned.round(&v[..p.len()], second.0);
                });
            }
        }
    }
}

/// A dynamic map, and the midpoints between its entries.
struct Map {
    values: &'static [f32; 256],
    bounds: [f32; 255],
}

impl Map {
    fn new(values: &'static [f32; 256]) -> Map {
        Map { values, bounds: std::array::from_fn(|i| (values[i] + values[i + 1]) / 2.0) }
    }

    fn signed() -> &'static Map {
        static MAP: std::sync::LazyLock<Map> = std::sync::LazyLock::new(|| Map::new(dynamic_map()));
        &MAP
    }

    fn unsigned() -> &'static Map {
        static MAP: std::sync::LazyLock<Map> = std::sync::LazyLock::new(|| Map::new(unsigned_dynamic_map()));
        &MAP
    }

    /// Returns the values of a block's codes; zeros behind them.
    #[inline(always)]
    fn widen(&self, codes: &[u8], scale: f32) -> [f32; BLOCK] {
        let mut values = [0f32; BLOCK];
        for (value, &code) in values.iter_mut().zip(codes) {
            *value = self.values[code as usize] * scale;
        }
        values
    }

    /// Stores the numbers of the nearest entries, of two equally near ones the lower; returns the scale.
    fn round(&self, values: &[f32], codes: &mut [u8]) -> f32 {
        let largest = values.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        // A block of zeros has the entry of 0 and not of 0 / 0.
        let reciprocal = 1.0 / largest.max(1e-38);
        for (code, value) in codes.iter_mut().zip(values) {
            let scaled = (value * reciprocal).clamp(-1.0, 1.0);
            *code = self.bounds.partition_point(|&bound| bound < scaled) as u8;
        }
        largest
    }
}

/// The launch of `kernels/adamw_8bit.cu`: a thread for each value of a block.
#[cfg(feature = "cuda")]
mod gpu {
    use candle_core::Device;

    use super::*;
    use crate::ops::cuda::{self, Launch};

    /// Blocks that one thread block handles, one after the other; they share the maps.
    const TURNS: usize = 4;
    /// Words of a block in the table: the index of its values, their number, the index of their state, and the block's
    /// flags.
    const WORDS: usize = 4;
    const WIDE: u32 = 1;
    const FASTER: u32 = 2;

    /// The blocks of all matrices, and both maps, on the GPU.
    #[derive(Clone, Debug)]
    pub struct Table {
        blocks: Tensor,
        count: usize,
        maps: Tensor,
    }

    impl Table {
        /// Returns the table on a GPU; none on a CPU.
        pub fn of(matrices: &[Matrix], device: &Device) -> Result<Option<Table>> {
            if !device.is_cuda() {
                return Ok(None);
            }
            if matrices.last().is_some_and(|last| last.values.end > u32::MAX as usize) {
                bail!("8-bit moments are for at most {} parameters", u32::MAX);
            }
            let mut words = Vec::new();
            let (mut narrow, mut wide) = (0u32, 0u32);
            for matrix in matrices {
                let state = if matrix.is_narrow() { &mut narrow } else { &mut wide };
                let kind = if matrix.is_narrow() { 0 } else { WIDE } | if matrix.faster { FASTER } else { 0 };
                for from in matrix.values.clone().step_by(BLOCK) {
                    let count = BLOCK.min(matrix.values.end - from) as u32;
                    words.extend([from as u32, count, *state, kind]);
                    *state += count;
                }
            }
            // The scales of narrow blocks stand in the order of those blocks, so they come first.
            let mut rows: Vec<&[u32]> = words.chunks(WORDS).collect();
            rows.sort_by_key(|row| row[3] & WIDE);
            let count = rows.len();
            let blocks = cuda::upload(&rows.concat(), device)?;
            let maps = [*dynamic_map(), *unsigned_dynamic_map()].concat();
            Ok(Some(Table { blocks, count, maps: cuda::upload(&maps, device)? }))
        }
    }

    /// Makes one update on the GPU.
    pub fn step(
        params: &Tensor,
        grads: &Tensor,
        moments: &Moments,
        update: &Update,
        faster: f64,
        squares: &Number,
        copy: Option<&Tensor>,
    ) -> Result<()> {
        let (Number::There(squares), Some(table)) = (squares, &moments.table) else {
            bail!("the gradient's sum of squares and the moments must lie on the GPU")
        };
        let half = |tensor: &Tensor| tensor.elem_count() / 2;
        let launch = Launch::untyped(cuda::device(params)?, "adamw_8bit", "step");
        let launch = launch.tensor(params).tensor(grads).optional(DType::BF16, copy);
        let launch = launch.of(DType::U32, &table.blocks).int(table.count).of(DType::F32, &table.maps);
        let launch = launch.of(DType::U8, &moments.codes).long(half(&moments.codes) as u64);
        let launch = launch.of(DType::F32, &moments.scales).int(half(&moments.scales));
        let launch = launch.of(DType::F32, &moments.wide).long(half(&moments.wide) as u64);
        let launch = launch.of(DType::F64, squares).float(update.norm_max.unwrap_or(0.0));
        let launch = launch.float(update.beta1).float(1.0 - update.beta1);
        let launch = launch.float(update.beta2).float(1.0 - update.beta2).float(update.epsilon);
        let (usual, faster) = (Rates::of(update, 1.0), Rates::of(update, faster));
        let launch = launch.float(usual.root2).float(usual.decay).float(usual.rate);
        let launch = launch.float(faster.decay).float(faster.rate);
        launch.launch((table.count.div_ceil(TURNS), 1, 1), BLOCK, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::adamw;
    use crate::ops::judge;
    use candle_core::Device;

    fn update(step: u64) -> Update {
        Update {
            learning_rate: 1e-2,
            beta1: 0.9,
            beta2: 0.99,
            epsilon: 1e-6,
            weight_decay: 0.1,
            step,
            norm_max: None,
        }
    }

    /// Returns the gradient of tests/scripts/adamw_8bit.py.
    fn gradient(count: usize, step: u64) -> Result<Tensor> {
        let value = |i: usize| match i {
            2048..2304 => 0.0,
            _ => {
                let share = ((i as u64 * 7919 + step * 104_729) % 2003) as f64 - 1001.0;
                (share / 1001.0 * 10f64.powi(-((i % 7) as i32))) as f32
            }
        };
        cpu::tensor((0..count).map(value).collect::<Vec<f32>>(), count)
    }

    fn start(count: usize) -> Result<Tensor> {
        cpu::tensor((0..count).map(|i| (i as f64 / count as f64 - 0.5) as f32).collect::<Vec<f32>>(), count)
    }

    /// Returns matrices of these sizes, every second one faster.
    fn matrices(sizes: &[usize]) -> Vec<Matrix> {
        let mut at = 0;
        let matrix = |(i, size): (usize, &usize)| {
            at += size;
            Matrix { values: at - size..at, faster: i % 2 == 1 }
        };
        sizes.iter().enumerate().map(matrix).collect()
    }

    /// Recorded with bitsandbytes 0.50.2 (tests/scripts/adamw_8bit.py): maps, parameters, codes and scales after four
    /// updates.
    #[test]
    fn maps_and_updates_are_those_of_bitsandbytes() -> Result<()> {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/adamw_8bit.safetensors");
        let recorded = candle_core::safetensors::load(file, &Device::Cpu)?;
        assert_eq!(recorded["signed_map"].to_vec1::<f32>()?, dynamic_map());
        assert_eq!(recorded["unsigned_map"].to_vec1::<f32>()?, unsigned_dynamic_map());
        let count = recorded["params"].elem_count();
        let params = start(count)?;
        let moments = Moments::zeros(&params, matrices(&[count]))?;
        for at in 1..=4 {
            let grads = gradient(count, at)?;
            step(&params, &grads, &moments, &update(at), 1.0, &Number::squares(&grads)?, None)?;
        }
        let far = |found: &Tensor, name: &str| -> Result<f64> {
            let (found, expected) = (cpu::to_f64(found)?, cpu::to_f64(&recorded[name])?);
            assert_eq!(found.len(), expected.len());
            let apart = |(a, b): (&f64, &f64)| (a - b).abs() / b.abs().max(1e-6);
            Ok(found.iter().zip(&expected).map(apart).fold(0.0, f64::max))
        };
        assert!(far(&moments.scales, "scales")? < 1e-6);
        assert!(far(&params, "params")? < 1e-4);
        let (found, expected) = (moments.codes.to_vec1::<u8>()?, recorded["codes"].to_vec1::<u8>()?);
        let apart = found.iter().zip(&expected).map(|(a, b)| a.abs_diff(*b));
        // A moment on the midpoint of two entries may fall to either side.
        assert!(apart.clone().max() <= Some(1) && apart.filter(|by| *by > 0).count() <= 4);
        Ok(())
    }

    #[test]
    fn small_matrices_are_updated_as_with_moments_in_full() -> Result<()> {
        let count = 700;
        let (params, full) = (start(count)?, start(count)?);
        let (moments, of_full) =
            (Moments::zeros(&params, matrices(&[300, 400]))?, adamw::Moments::zeros_like(&full)?);
        assert_eq!(moments.narrow_values(), (0, count));
        for at in 1..=3 {
            let grads = gradient(count, at)?;
            let (squares, update) = (Number::squares(&grads)?, Update { norm_max: Some(0.5), ..update(at) });
            step(&params, &grads, &moments, &update, 1.0, &squares, None)?;
            adamw::step(&full, &grads, &of_full, &update, &squares, None)?;
        }
        judge::same(&params, &full, 1e-6)
    }

    #[test]
    fn moments_take_the_planned_bytes() -> Result<()> {
        let sizes = [4096, 300, 4400, 5000];
        let params = start(sizes.iter().sum())?;
        let Moments { codes, scales, wide, .. } = Moments::zeros(&params, matrices(&sizes))?;
        let taken = codes.elem_count() + 4 * (scales.elem_count() + wide.elem_count());
        assert_eq!(taken, sizes.iter().map(|size| Matrix::moment_bytes(*size)).sum::<usize>());
        assert!(Moments::zeros(&params, matrices(&sizes[1..])).is_err(), "a gap");
        Ok(())
    }

    /// Matrices of both kinds and rates in odd sizes: parameters, their copy and all moments.
    #[test]
    fn the_kernels_equal_the_host() -> Result<()> {
        judge::on_gpu(|gpu| {
            for only in [300, 5000] {
                let params = start(only)?.to_device(&gpu.device)?;
                let moments = Moments::zeros(&params, matrices(&[only]))?;
                let squares = Number::squares(&params)?;
                step(&params, &params.copy()?, &moments, &update(1), 1.0, &squares, None)?;
            }
            let sizes = [4100, 77, 300, 5000, 4096];
            let count = sizes.iter().sum();
            let (host, device) = (start(count)?, start(count)?.to_device(&gpu.device)?);
            let host_moments = Moments::zeros(&host, matrices(&sizes))?;
            let moments = Moments::zeros(&device, matrices(&sizes))?;
            let copy = Tensor::zeros(count, DType::BF16, &gpu.device)?;
            for at in 1..=3 {
                let grads = gradient(count, at)?;
                let there = grads.to_device(&gpu.device)?;
                let squares = (Number::squares(&grads)?, Number::squares(&there)?);
                let update = Update { norm_max: [None, Some(0.5), Some(1e9)][at as usize - 1], ..update(at) };
                step(&host, &grads, &host_moments, &update, 4.0, &squares.0, None)?;
                step(&device, &there, &moments, &update, 4.0, &squares.1, Some(&copy))?;
            }
            gpu.within(1e-4, &device, &host)?;
            gpu.within(1e-5, &moments.scales, &host_moments.scales)?;
            gpu.within(1e-5, &moments.wide, &host_moments.wide)?;
            let codes = |moments: &Moments| moments.codes.to_device(&Device::Cpu)?.to_vec1::<u8>();
            let (found, expected) = (codes(&moments)?, codes(&host_moments)?);
            let apart = found.iter().zip(&expected).filter(|(a, b)| a != b).count();
            assert!(apart <= 8, "{apart} codes differ");
            gpu.within(0.0, &copy, &device.to_device(&Device::Cpu)?.to_dtype(DType::BF16)?)?;
            let bad = Tensor::full(f32::NAN, count, &Device::Cpu)?.to_device(&gpu.device)?;
            let before = device.to_device(&Device::Cpu)?.to_vec1::<f32>()?;
            step(&device, &bad, &moments, &update(4), 4.0, &Number::squares(&bad)?, Some(&copy))?;
            assert_eq!(device.to_device(&Device::Cpu)?.to_vec1::<f32>()?, before);
            assert_eq!(codes(&moments)?, found);
            Ok(())
        })
    }
}
