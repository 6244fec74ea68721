//! 4-bit block quantisation, bit for bit as bitsandbytes stores it: NF4 and FP4, plain or double-quantised scales.
//!
//! A weight [N, K] is one flat row of N*K values in blocks of 64. Each block stores its largest absolute value
//! (`absmax`) and, for each value, the 4-bit index of the code nearest to value/absmax. Value 2i is in the *high*
//! nibble of byte i. Double quantisation stores `absmax - mean(absmax)` in 8 bits by the signed dynamic map, in
//! blocks of 256. Source: QLoRA (arXiv 2305.14314), bitsandbytes 0.50.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[cfg(feature = "cuda")]
use candle_core::bail;
use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use super::cpu;
use crate::facts::quantization::Code;

/// Values that share one scale.
pub const BLOCK: usize = 64;
/// Scales that share one second-level scale.
pub const NESTED_BLOCK: usize = 256;

const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

const FP4: [f32; 16] = [
    0.0,
    0.005_208_333_5,
    0.666_666_7,
    1.0,
    0.333_333_34,
    0.5,
    0.166_666_67,
    0.25,
    0.0,
    -0.005_208_333_5,
    -0.666_666_7,
    -1.0,
    -0.333_333_34,
    -0.5,
    -0.166_666_67,
    -0.25,
];

impl Code {
    /// Returns the value of each 4-bit index.
    pub fn values(self) -> &'static [f32; 16] {
        match self {
            Code::Nf4 => &NF4,
            Code::Fp4 => &FP4,
        }
    }

    /// Returns the indices in ascending order of their values; equal values are ordered by index.
    fn ascending(self) -> [u8; 16] {
        let values = self.values();
        let mut order: [u8; 16] = std::array::from_fn(|i| i as u8);
        order.sort_by(|&a, &b| values[a as usize].total_cmp(&values[b as usize]).then(a.cmp(&b)));
        order
    }
}

/// The scales of a weight's blocks.
#[derive(Clone, Debug)]
pub enum Absmax {
    /// f32 `[blocks]`, or their bytes as u8 `[4 * blocks]`, which is how they lie in a buffer of bytes.
    Plain(Tensor),
    /// Double-quantised scales.
    Nested {
        /// Index into the dynamic map, u8 `[blocks]`.
        codes: Tensor,
        /// Scale of each block of 256 scales, f32 [blocks / 256].
        absmax: Tensor,
        /// The mean that was subtracted from all scales.
        offset: f32,
    },
}

/// The expanded form of a weight, if it is kept on a GPU beside the codes, so that products need not expand it again.
/// Clones of a weight share it.
#[derive(Clone, Debug, Default)]
pub struct Expanded(Arc<Mutex<Held>>);

#[derive(Debug, Default)]
struct Held {
    is_wanted: bool,
    matrix: Option<Tensor>,
    /// The weight and its transpose in 8 bits (`ops/fp8.rs`).
    eight_bits: [Option<(Tensor, Tensor)>; 2],
}

impl Expanded {
    /// Keeps the expanded form from now on, or frees it.
    pub fn keep(&self, is_wanted: bool) {
        let mut held = self.lock();
        held.is_wanted = is_wanted;
        if !is_wanted {
            (held.matrix, held.eight_bits) = (None, [None, None]);
        }
    }

    /// Returns the matrix that is kept, if it has this shape and type; if not, the result of `make`, which is kept if
    /// it is the first. Nobody may write to the weight's own values in it.
    pub fn or(
        &self,
        shape: (usize, usize),
        dtype: DType,
        make: impl Fn() -> Result<Tensor>,
    ) -> Result<Tensor> {
        match self.kept(shape, dtype, &make)? {
            Some(matrix) => Ok(matrix),
            None => make(),
        }
    }

    /// Does `or`, but returns `None` if the matrix is not wanted or another one is kept.
    pub fn kept(
        &self,
        shape: (usize, usize),
        dtype: DType,
        make: impl FnOnce() -> Result<Tensor>,
    ) -> Result<Option<Tensor>> {
        let mut held = self.lock();
        if held.is_wanted && held.matrix.is_none() {
            held.matrix = Some(make()?);
        }
        let fits = |matrix: &&Tensor| matrix.dims() == [shape.0, shape.1] && matrix.dtype() == dtype;
        Ok(held.matrix.as_ref().filter(fits).cloned())
    }

    /// Returns the codes and scales of the weight in 8 bits, or of its transpose: those that are kept, or the result of
    /// `make`, which is kept if it is wanted.
    pub fn eight_bits(
        &self,
        transposed: bool,
        make: impl FnOnce() -> Result<(Tensor, Tensor)>,
    ) -> Result<(Tensor, Tensor)> {
        let mut held = self.lock();
        if !held.is_wanted {
            drop(held);
            return make();
        }
        let place = &mut held.eight_bits[usize::from(transposed)];
        if place.is_none() {
            *place = Some(make()?);
        }
        Ok(place.clone().expect("just made"))
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A quantised weight [rows, cols].
#[derive(Clone, Debug)]
pub struct FourBit {
    /// The 16 values.
    pub code: Code,
    /// Rows of the weight (N).
    pub rows: usize,
    /// Columns of the weight (K).
    pub cols: usize,
    /// Values that share one scale.
    pub block: usize,
    /// Two indices per byte, u8 [ceil(rows * cols / 2)].
    pub packed: Tensor,
    /// The scale of each block.
    pub absmax: Absmax,
    /// The expanded form, if it is kept.
    pub expanded: Expanded,
}

impl FourBit {
    /// Quantises row-major `values`, on the CPU.
    pub fn quantize(values: &[f32], rows: usize, cols: usize, code: Code, double: bool) -> Result<FourBit> {
        FourBit::quantize_blocks(values, rows, cols, code, double, BLOCK)
    }

    fn quantize_blocks(
        values: &[f32],
        rows: usize,
        cols: usize,
        code: Code,
        double: bool,
        block: usize,
    ) -> Result<FourBit> {
        assert_eq!(values.len(), rows * cols, "a weight [{rows}, {cols}]");
        assert!(block.is_multiple_of(2), "two values share a byte");
        let table = Nearest::new(code);
        let blocks = values.len().div_ceil(block);
        let mut packed = vec![0u8; values.len().div_ceil(2)];
        let mut scales = vec![0f32; blocks];
        // 64 blocks per task are enough work for a task.
        let group = 64;
        packed
            .par_chunks_mut(group * block / 2)
            .zip(scales.par_chunks_mut(group))
            .zip(values.par_chunks(group * block))
            .for_each(|((packed, scales), values)| {
                for ((packed, scale), values) in
                    packed.chunks_mut(block / 2).zip(scales).zip(values.chunks(block))
                {
                    *scale = table.quantize_block(values, packed, values.len() == block);
                }
            });
        let absmax = match double {
            false => Absmax::Plain(cpu::tensor(scales, blocks)?),
            true => nest(&scales)?,
        };
        let packed = Tensor::from_vec(packed, values.len().div_ceil(2), &Device::Cpu)?;
        Ok(FourBit { code, rows, cols, block, packed, absmax, expanded: Expanded::default() })
    }

    /// Quantises on the GPU where `source` lies, to the same bits. `source` holds row-major values of type `stored`
    /// (f32, f16 or bf16), or the bytes of such values. Waits for the scales, because the host computes their
    /// second level.
    #[cfg(feature = "cuda")]
    pub fn quantize_on_gpu(
        source: &Tensor,
        stored: DType,
        (rows, cols): (usize, usize),
        code: Code,
        double: bool,
    ) -> Result<std::result::Result<FourBit, NotFinite>> {
        gpu::quantize(source, stored, (rows, cols), code, double, BLOCK)
    }

    /// Returns the weight [rows, cols] on its GPU in f32 or bf16; each value is rounded once. Nobody may write to it,
    /// because it may be the form that is kept.
    #[cfg(feature = "cuda")]
    pub fn dequantize_on_gpu(&self, dtype: DType) -> Result<Tensor> {
        self.expanded.or((self.rows, self.cols), dtype, || {
            let out = super::unwritten((self.rows, self.cols), dtype, self.packed.device())?;
            gpu::dequantize(self, &out, 0)?;
            Ok(out)
        })
    }

    /// Does `dequantize_on_gpu` into rows of a wider matrix, from its element `at` on. Rows narrower than the matrix
    /// must be whole groups of eight values.
    #[cfg(feature = "cuda")]
    pub fn dequantize_into(&self, out: &Tensor, at: usize) -> Result<()> {
        gpu::dequantize(self, out, at)
    }

    /// Does `dequantize_into` from element 0 on by the kernel `inside`. `more` asks for that kernel's further blocks:
    /// it takes the launch, which has the number of this weight's blocks, and returns it with its own arguments.
    #[cfg(feature = "cuda")]
    pub(super) fn dequantize_inside<'a>(
        &self,
        out: &'a Tensor,
        more: impl FnOnce(super::cuda::Launch<'a>) -> (super::cuda::Launch<'a>, usize),
    ) -> Result<()> {
        gpu::dequantize_inside(self, out, more)
    }

    /// Returns the scale of each block with double quantisation undone: `map[code] * absmax + offset` in f32.
    pub fn scales(&self) -> Result<Vec<f32>> {
        match &self.absmax {
            Absmax::Plain(absmax) => floats(absmax),
            Absmax::Nested { codes, absmax, offset } => {
                let absmax = absmax.to_vec1::<f32>()?;
                let map = dynamic_map();
                let codes = cpu::read::<u8>(codes)?;
                let scale = |(i, &code): (usize, &u8)| map[code as usize] * absmax[i / NESTED_BLOCK] + offset;
                Ok(codes.iter().enumerate().map(scale).collect())
            }
        }
    }

    /// Returns all values in f32, before any rounding to the weight's own type.
    pub fn dequantize(&self) -> Result<Vec<f32>> {
        let (scales, values) = (self.scales()?, self.code.values());
        let mut out = vec![0f32; self.rows * self.cols];
        let packed = cpu::read::<u8>(&self.packed)?;
        for (i, out) in out.iter_mut().enumerate() {
            let byte = packed[i / 2];
            let index = if i % 2 == 0 { byte >> 4 } else { byte & 15 };
            *out = values[index as usize] * scales[i / self.block];
        }
        Ok(out)
    }

    /// Returns the same weight on another device.
    pub fn to_device(&self, device: &Device) -> Result<FourBit> {
        let absmax = match &self.absmax {
            Absmax::Plain(absmax) => Absmax::Plain(absmax.to_device(device)?),
            Absmax::Nested { codes, absmax, offset } => Absmax::Nested {
                codes: codes.to_device(device)?,
                absmax: absmax.to_device(device)?,
                offset: *offset,
            },
        };
        let (packed, expanded) = (self.packed.to_device(device)?, Expanded::default());
        Ok(FourBit { packed, absmax, expanded, ..self.clone() })
    }

    /// Returns the number of bytes that a weight [rows, cols] would take.
    pub fn bytes_of(rows: usize, cols: usize, double: bool) -> usize {
        let blocks = (rows * cols).div_ceil(BLOCK);
        let scales = if double { blocks + blocks.div_ceil(NESTED_BLOCK) * 4 + 4 } else { blocks * 4 };
        (rows * cols).div_ceil(2) + scales
    }

    /// Returns the number of bytes that this weight takes.
    pub fn bytes(&self) -> usize {
        let scales = match &self.absmax {
            Absmax::Plain(absmax) => absmax.elem_count() * absmax.dtype().size_in_bytes(),
            Absmax::Nested { codes, absmax, .. } => codes.elem_count() + absmax.elem_count() * 4 + 4,
        };
        self.packed.elem_count() + scales
    }
}

/// Returns the values of an f32 tensor, or of the bytes of one.
fn floats(tensor: &Tensor) -> Result<Vec<f32>> {
    if tensor.dtype() == DType::F32 {
        return tensor.to_vec1();
    }
    let bytes = cpu::read::<u8>(tensor)?;
    let (floats, rest) = bytes.as_chunks::<4>();
    assert!(rest.is_empty(), "whole values");
    Ok(floats.iter().map(|bytes| f32::from_ne_bytes(*bytes)).collect())
}

/// Values `from..to` of a weight contain a NaN or an infinity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotFinite {
    /// Flat index of the first value of the range.
    pub from: usize,
    /// Flat index behind the last value of the range.
    pub to: usize,
}

/// Finds the code nearest to a value in [-1, 1] by the 15 midpoints between the ascending codes.
struct Nearest {
    bounds: [f32; 15],
    order: [u8; 16],
}

impl Nearest {
    fn new(code: Code) -> Nearest {
        let (values, order) = (code.values(), code.ascending());
        let value = |i: usize| values[order[i] as usize];
        Nearest { bounds: std::array::from_fn(|i| (value(i) + value(i + 1)) / 2.0), order }
    }

    /// Returns the index of the nearest code. A value on a midpoint gets the lower code, as in `torch.bucketize`.
    #[inline(always)]
    fn index(&self, scaled: f32) -> u8 {
        let above: u8 = self.bounds.iter().map(|&bound| u8::from(scaled > bound)).sum();
        self.order[above as usize]
    }

    /// Fills `packed` and returns the block's absmax. Full blocks multiply by the reciprocal and a last, partial
    /// block divides: the reference does so, and codes at the midpoints depend on it.
    fn quantize_block(&self, values: &[f32], packed: &mut [u8], full: bool) -> f32 {
        let largest = values.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        let floor = largest.max(1e-38);
        let reciprocal = 1.0 / floor;
        let scale = |value: f32| if full { value * reciprocal } else { value / floor };
        let nibble = |value: f32| self.index(scale(value).clamp(-1.0, 1.0));
        for (byte, pair) in packed.iter_mut().zip(values.chunks(2)) {
            let low = pair.get(1).copied().map_or_else(|| self.index(0.0), nibble);
            *byte = nibble(pair[0]) << 4 | low;
        }
        if full { largest } else { floor }
    }
}

/// Quantises block scales a second time.
///
/// The reference (bitsandbytes' `quantize_cpu`) looks codes up in a table of 65,536 cells. A scale is therefore
/// first rounded to that grid and then to the nearest code, which decides the code of a scale near a midpoint (5 of
/// 15 recorded vectors have such a scale). On a GPU bitsandbytes compares exactly, so that one code in some
/// thousands differs by one.
fn nest(scales: &[f32]) -> Result<Absmax> {
    const CELLS: f32 = 65_535.0;
    let offset = mean(scales);
    let map = dynamic_map();
    let bounds: Vec<f32> = map.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0).collect();
    let nearest = |value: f32| {
        let cell = ((value + 1.0) * 0.5 * CELLS + 0.5).floor();
        let value = cell / CELLS * 2.0 - 1.0;
        bounds.partition_point(|&bound| bound < value) as u8
    };
    let mut codes = Vec::with_capacity(scales.len());
    let mut nested = Vec::with_capacity(scales.len().div_ceil(NESTED_BLOCK));
    for block in scales.chunks(NESTED_BLOCK) {
        let largest = block.iter().fold(0f32, |largest, scale| largest.max((scale - offset).abs()));
        // A block of equal scales divides 0 by 0. NaN gets code 0, as in the reference, and times 0 it is 0.
        codes.extend(block.iter().map(|scale| nearest((scale - offset) / largest)));
        nested.push(largest);
    }
    let absmax = cpu::tensor(nested, scales.len().div_ceil(NESTED_BLOCK))?;
    Ok(Absmax::Nested { codes: cpu::tensor(codes, scales.len())?, absmax, offset })
}

/// Returns the mean in torch's order of additions on one CPU thread: eight lanes, four vectors at a time, partial sums
/// that cascade through four levels. The order decides the last bit of the offset, and that bit moves scales between
/// codes: a plain f64 mean gave another offset in 1 of the 15 recorded vectors.
fn mean(values: &[f32]) -> f32 {
    const LANES: usize = 8;
    const ROWS: usize = 4;
    const LEVELS: usize = 4;
    let add = |sum: &mut [f32], more: &[f32]| sum.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
    let (vectors, tail) = values.as_chunks::<LANES>();
    let (groups, rest) = vectors.as_chunks::<ROWS>();
    let level_bits = (usize::BITS - groups.len().saturating_sub(1).leading_zeros()) as usize / LEVELS;
    let level_bits = level_bits.max(4);
    let mut levels = [[0f32; LANES * ROWS]; LEVELS];
    for (i, group) in groups.iter().enumerate() {
        add(&mut levels[0], group.as_flattened());
        let done = i + 1;
        let mut level = 1;
        while level < LEVELS && done.is_multiple_of(1 << (level * level_bits)) {
            let carried = std::mem::replace(&mut levels[level - 1], [0.0; LANES * ROWS]);
            add(&mut levels[level], &carried);
            level += 1;
        }
    }
    let (first, others) = levels.split_at_mut(1);
    others.iter().for_each(|level| add(&mut first[0], level));
    let (lanes, rows) = first[0].split_at_mut(LANES);
    rest.iter().for_each(|vector| add(lanes, vector));
    rows.chunks(LANES).for_each(|row| add(lanes, row));
    let sum = tail.iter().chain(lanes.iter()).fold(0f32, |sum, value| sum + value);
    sum / values.len() as f32
}

/// Returns the 8-bit signed dynamic map (bitsandbytes' `create_dynamic_map`): seven decades, each divided evenly, with
/// more values in the larger ones; 0 and 1 are included. Each step is in f32, because the midpoints decide codes.
pub fn dynamic_map() -> &'static [f32; 256] {
    static MAP: std::sync::OnceLock<[f32; 256]> = std::sync::OnceLock::new();
    MAP.get_or_init(|| make_dynamic_map(true))
}

/// Returns the 8-bit dynamic map of values that are never negative: twice as many in each decade.
pub fn unsigned_dynamic_map() -> &'static [f32; 256] {
    static MAP: std::sync::OnceLock<[f32; 256]> = std::sync::OnceLock::new();
    MAP.get_or_init(|| make_dynamic_map(false))
}

fn make_dynamic_map(signed: bool) -> [f32; 256] {
    const DECADES: i32 = 7;
    let mut map = vec![0f32, 1.0];
    for decade in 0..DECADES {
        let points = (1usize << (decade + i32::from(!signed))) + 1;
        // Evenly spaced from 0.1 to 1, counted from both ends with one rounding each, as torch.linspace does.
        let step = (1.0f32 - 0.1) / (points - 1) as f32;
        let at = |i: usize| match i < points / 2 {
            true => step.mul_add(i as f32, 0.1),
            false => step.mul_add(-((points - 1 - i) as f32), 1.0),
        };
        let power = 10f64.powi(decade - (DECADES - 1)) as f32;
        for i in 0..points - 1 {
            let mean = (at(i) + at(i + 1)) / 2.0 * power;
            map.extend(std::iter::once(mean).chain(signed.then_some(-mean)));
        }
    }
    map.sort_by(f32::total_cmp);
    map.try_into().expect("2 + 2 * (2^7 - 1) = 256 values")
}

/// The launches of `kernels/four_bit.cu`.
#[cfg(feature = "cuda")]
mod gpu {
    use super::*;
    use crate::ops::cuda::{self, Launch};

    const THREADS: usize = 256;
    /// Values per thread of `dequantize`, and those that move together.
    const VALUES: usize = 32;
    const EIGHT: usize = 8;
    /// Blocks per thread block of `quantize`, one per warp.
    const WARPS: usize = THREADS / 32;

    /// Quantises one tensor on the GPU: its codes and the scales of its blocks.
    pub fn quantize(
        source: &Tensor,
        stored: DType,
        (rows, cols): (usize, usize),
        code: Code,
        double: bool,
        block: usize,
    ) -> Result<std::result::Result<FourBit, NotFinite>> {
        let (values, device) = (rows * cols, source.device());
        let bytes = source.elem_count() * source.dtype().size_in_bytes();
        if bytes != values * stored.size_in_bytes() || ![stored, DType::U8].contains(&source.dtype()) {
            bail!("a weight [{rows}, {cols}] of {stored:?} from {bytes} bytes of {:?}", source.dtype());
        }
        let name = match stored {
            DType::F32 => "quantize_f32",
            DType::BF16 => "quantize_bf16",
            DType::F16 => "quantize_f16",
            other => bail!("no quantisation of {other:?}"),
        };
        let blocks = values.div_ceil(block);
        let packed = crate::ops::unwritten(values.div_ceil(2), DType::U8, device)?;
        let scales = crate::ops::unwritten(blocks, DType::F32, device)?;
        let launch = Launch::untyped(cuda::device(source)?, "four_bit", name).of(source.dtype(), source);
        let launch = launch.of(DType::U8, &packed).of(DType::F32, &scales);
        let launch = launch.long(values as u64).int(block).int(code as usize);
        launch.launch((blocks.div_ceil(WARPS), 1, 1), THREADS, 0)?;
        let host = cuda::download::<f32>(&scales)?;
        // The kernel stores NaN as the scale of a block with a value that is not finite.
        if let Some(at) = host.iter().position(|scale| !scale.is_finite()) {
            return Ok(Err(NotFinite { from: at * block, to: values.min((at + 1) * block) }));
        }
        let absmax = match double {
            false => Absmax::Plain(scales),
            true => nest(&host)?,
        };
        let weight = FourBit { code, rows, cols, block, packed, absmax, expanded: Expanded::default() };
        Ok(Ok(weight.to_device(device)?))
    }

    /// Writes the weight in full into rows of `out`, from its element `at` on.
    pub fn dequantize(weight: &FourBit, out: &Tensor, at: usize) -> Result<()> {
        let (launch, blocks) = launch(weight, "dequantize", out, at)?;
        launch.launch((blocks, 1, 1), THREADS, 0)
    }

    /// See `FourBit::dequantize_inside`.
    pub fn dequantize_inside<'a>(
        weight: &FourBit,
        out: &'a Tensor,
        more: impl FnOnce(Launch<'a>) -> (Launch<'a>, usize),
    ) -> Result<()> {
        if out.dim(1)? == weight.cols {
            bail!("a weight with nothing beside it");
        }
        let (launch, blocks) = launch(weight, "inside", out, 0)?;
        let (launch, more) = more(launch.int(blocks));
        launch.launch((blocks + more, 1, 1), THREADS, 0)
    }

    /// Returns the launch that writes a weight, and its blocks.
    fn launch<'a>(weight: &FourBit, name: &str, out: &'a Tensor, at: usize) -> Result<(Launch<'a>, usize)> {
        let FourBit { code, rows, cols, block, packed, absmax, .. } = weight;
        let stride = out.dim(1)?;
        if !block.is_power_of_two() || *block < 8 {
            bail!("blocks of {block}: a GPU takes powers of two from 8 on");
        }
        let apart = stride != *cols;
        let fits = at + rows.saturating_sub(1) * stride + cols <= out.elem_count();
        if !fits || apart && !(cols.is_multiple_of(EIGHT) && stride.is_multiple_of(EIGHT) && cols < &stride) {
            bail!("a weight [{rows}, {cols}] at {at} in rows of {stride}");
        }
        let launch = Launch::new(out, "four_bit", name)?.of(DType::U8, packed);
        let launch = match absmax {
            Absmax::Plain(absmax) => launch.optional(DType::U8, None).of(absmax.dtype(), absmax).float(0.0),
            Absmax::Nested { codes, absmax, offset } => {
                launch.of(DType::U8, codes).of(DType::F32, absmax).float(f64::from(*offset))
            }
        };
        let values = rows * cols;
        let launch = launch.tensor_at(out, at).long(values as u64);
        let launch = launch.int(block.ilog2() as usize).int(*code as usize);
        let groups = if apart { cols / EIGHT } else { 0 };
        let (factor, shift) = reciprocal(groups);
        let launch = launch.int(groups).int(stride).int(shift).long(factor);
        Ok((launch, values.div_ceil(THREADS * VALUES)))
    }

    /// Returns (factor, shift) such that `number / divisor = number * factor >> shift` for all numbers below 2^31
    /// (Granlund and Montgomery 1994).
    pub fn reciprocal(divisor: usize) -> (u64, usize) {
        let shift = 31 + divisor.max(1).next_power_of_two().ilog2() as usize;
        ((1u64 << shift).div_ceil(divisor.max(1) as u64), shift)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(feature = "cuda")]
    use crate::ops::judge;

    /// The first matrix is kept until it is not wanted any more; one of another shape or type is not.
    #[test]
    fn what_is_expanded_is_kept_if_it_is_wanted() -> Result<()> {
        let (kept, made) = (Expanded::default(), std::cell::Cell::new(0));
        let ask = |rows: usize, dtype: DType| {
            kept.or((rows, 3), dtype, || {
                made.set(made.get() + 1);
                Tensor::zeros((rows, 3), dtype, &Device::Cpu)
            })
        };
        let after = |rows, dtype| ask(rows, dtype).map(|_| made.get());
        assert_eq!((after(2, DType::F32)?, after(2, DType::F32)?), (1, 2), "it is not wanted");
        kept.keep(true);
        assert_eq!((after(2, DType::F32)?, after(2, DType::F32)?), (3, 3));
        assert_eq!((after(4, DType::F32)?, after(2, DType::BF16)?, after(2, DType::F32)?), (4, 5, 5));
        kept.clone().keep(false);
        assert_eq!(after(2, DType::F32)?, 6);
        Ok(())
    }

    /// Compares the recorded vectors, and random ones of all sizes around a block in the three types of
    /// checkpoints: the GPU's packed bytes, scales and values equal the CPU's.
    #[cfg(feature = "cuda")]
    #[test]
    fn the_kernels_bits_equal_the_cpus() -> Result<()> {
        let Some(device) = judge::gpu() else { return Ok(()) };
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/_nf4/nf4_vectors.safetensors");
        let mut weights: Vec<Tensor> = candle_core::safetensors::load(path, &Device::Cpu)?
            .into_iter()
            .filter_map(|(name, tensor)| name.ends_with(".weight").then_some(tensor))
            .collect();
        assert_eq!(weights.len(), 15);
        let stored = [DType::F32, DType::F16, DType::BF16];
        for (i, count) in [1, 7, 63, 64, 65, 513, 4097, 20_011].into_iter().enumerate() {
            weights.push(judge::random((1, count), i as u64)?.to_dtype(stored[i % 3])?.detach());
        }
        // f16's smallest and largest values, and zeros of both signs.
        let extremes = [5.96e-8f32, -6.1e-5, 65_504.0, -0.0, 0.0, 3.05e-5, 1.0, -1.0];
        weights.push(Tensor::from_slice(&extremes, (1, 8), &Device::Cpu)?.to_dtype(DType::F16)?);
        for weight in weights {
            for (code, block) in [(Code::Nf4, 64), (Code::Fp4, 64), (Code::Nf4, 128), (Code::Fp4, 4096)] {
                for double in [false, true] {
                    same_bits(&weight, &device, code, double, block)?;
                }
            }
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn same_bits(weight: &Tensor, gpu: &Device, code: Code, double: bool, block: usize) -> Result<()> {
        let (shape, stored) = (weight.dims2()?, weight.dtype());
        let values = weight.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let ours = FourBit::quantize_blocks(&values, shape.0, shape.1, code, double, block)?;
        let found = gpu::quantize(&weight.to_device(gpu)?, stored, shape, code, double, block)?
            .expect("the weights are finite");
        let host = found.to_device(&Device::Cpu)?;
        assert_eq!(
            host.packed.to_vec1::<u8>()?,
            ours.packed.to_vec1::<u8>()?,
            "{shape:?} {stored:?} {code:?}"
        );
        let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<u32>>();
        assert_eq!(bits(host.scales()?), bits(ours.scales()?), "{shape:?} {stored:?} {code:?}: scales");
        for dtype in [DType::F32, DType::BF16] {
            let expected = Tensor::from_vec(ours.dequantize()?, shape, &Device::Cpu)?;
            let rounded =
                |tensor: Tensor| tensor.to_dtype(dtype)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1();
            let found = found.dequantize_on_gpu(dtype)?.to_device(&Device::Cpu)?;
            assert_eq!(
                bits(rounded(found)?),
                bits(rounded(expected.clone())?),
                "{shape:?} {stored:?} {code:?}"
            );
        }
        Ok(())
    }

    /// Weights in rows of a wider matrix have the bits of those apart, and nothing else of it is written.
    #[cfg(feature = "cuda")]
    #[test]
    fn rows_of_a_wider_matrix_have_the_same_bits() -> Result<()> {
        let Some(device) = judge::gpu() else { return Ok(()) };
        for (rows, cols, above, left) in [(3, 8, 0, 8), (5, 40, 2, 64), (37, 192, 1, 64), (9, 520, 0, 72)] {
            let values =
                judge::random((rows, cols), 1)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            let weight = FourBit::quantize(&values, rows, cols, Code::Nf4, true)?.to_device(&device)?;
            for dtype in [DType::F32, DType::BF16] {
                let alone = weight.dequantize_on_gpu(dtype)?.to_device(&Device::Cpu)?;
                let around = judge::random((above + rows + 1, left + cols), 2)?.to_dtype(dtype)?.detach();
                let out = around.to_device(&device)?;
                weight.dequantize_into(&out, above * (left + cols) + left)?;
                let row = Tensor::cat(&[&around.narrow(0, above, rows)?.narrow(1, 0, left)?, &alone], 1)?;
                let (over, under) = (around.narrow(0, 0, above)?, around.narrow(0, above + rows, 1)?);
                let bits = |tensor: &Tensor| tensor.to_dtype(DType::F32)?.to_vec2::<f32>();
                let expected = Tensor::cat(&[&over, &row, &under], 0)?;
                assert_eq!(
                    bits(&out.to_device(&Device::Cpu)?)?,
                    bits(&expected)?,
                    "{rows} x {cols}, {dtype:?}"
                );
            }
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn a_product_and_a_shift_divide() {
        for divisor in [1, 2, 3, 7, 8, 384, 448, 512, 1024, 1792, 3584, 12_345, (1 << 20) - 1, 1 << 20] {
            let (factor, shift) = gpu::reciprocal(divisor);
            for near in [0, 1, 2, 1000, (1u64 << 29) / divisor as u64, ((1u64 << 31) - 1) / divisor as u64] {
                for number in [near * divisor as u64, (near * divisor as u64).saturating_sub(1), near] {
                    assert_eq!((number * factor) >> shift, number / divisor as u64, "{number} / {divisor}");
                }
            }
        }
    }

    /// The map that the kernel computes equals the table for all 256 codes of a scale.
    #[cfg(feature = "cuda")]
    #[test]
    fn the_kernels_map_is_the_table() -> Result<()> {
        let Some(device) = judge::gpu() else { return Ok(()) };
        let codes: Vec<u8> = (0..=255).collect();
        let absmax = Absmax::Nested {
            codes: Tensor::from_vec(codes, 256, &device)?,
            absmax: Tensor::ones(1, DType::F32, &Device::Cpu)?.to_device(&device)?,
            offset: 0.0,
        };
        // Index 15 is the value 1.
        let packed = Tensor::from_vec(vec![0xffu8; 256 * 32], 256 * 32, &device)?;
        let expanded = Expanded::default();
        let weight = FourBit { code: Code::Nf4, rows: 256, cols: 64, block: 64, packed, absmax, expanded };
        let found = weight.dequantize_on_gpu(DType::F32)?.to_device(&Device::Cpu)?.to_vec2::<f32>()?;
        for (row, &expected) in found.iter().zip(dynamic_map()) {
            assert!(row.iter().all(|value| value.to_bits() == expected.to_bits()), "{row:?}, {expected}");
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn a_value_that_is_not_finite_is_found() -> Result<()> {
        let Some(device) = judge::gpu() else { return Ok(()) };
        for (at, bad) in [(0, f32::NAN), (70, f32::INFINITY), (199, f32::NEG_INFINITY)] {
            let mut values = vec![0.5f32; 200];
            values[at] = bad;
            for stored in [DType::F32, DType::F16, DType::BF16] {
                let source =
                    Tensor::from_slice(&values, 200, &Device::Cpu)?.to_dtype(stored)?.to_device(&device)?;
                let found = FourBit::quantize_on_gpu(&source, stored, (2, 100), Code::Nf4, true)?;
                let (from, to) = (at / 64 * 64, (at / 64 * 64 + 64).min(200));
                assert_eq!(found.unwrap_err(), NotFinite { from, to }, "{stored:?}");
            }
        }
        Ok(())
    }

    /// Vectors made with bitsandbytes 0.50.2: partial blocks, odd counts, zero blocks, outliers, values on each
    /// decision boundary, more than 256 blocks, bf16 and f16 inputs, FP4, blocks of 128.
    #[test]
    fn bits_equal_bitsandbytes() -> Result<()> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/_nf4/nf4_vectors.safetensors");
        let vectors = candle_core::safetensors::load(path, &Device::Cpu)?;
        let floats = |name: &str| vectors[name].to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
        let bytes = |name: &str| vectors[name].flatten_all()?.to_vec1::<u8>();
        assert_eq!(dynamic_map().to_vec(), floats("nested_code")?);
        assert_eq!(NF4.to_vec(), floats("nf4_code")?);
        assert_eq!(FP4.to_vec(), floats("fp4_code")?);
        let cases: Vec<&str> = vectors.keys().filter_map(|name| name.strip_suffix(".weight")).collect();
        assert_eq!(cases.len(), 15);
        for case in cases {
            let weight = &vectors[&format!("{case}.weight")];
            let (rows, cols) = weight.dims2()?;
            let code = if case.starts_with("fp4") { Code::Fp4 } else { Code::Nf4 };
            let block = if case.starts_with("blocksize128") { 128 } else { 64 };
            let values = floats(&format!("{case}.weight"))?;
            let plain = FourBit::quantize_blocks(&values, rows, cols, code, false, block)?;
            let nested = FourBit::quantize_blocks(&values, rows, cols, code, true, block)?;
            assert_eq!(plain.packed.to_vec1::<u8>()?, bytes(&format!("{case}.packed"))?, "{case}: codes");
            assert_eq!(plain.scales()?, floats(&format!("{case}.absmax_f32"))?, "{case}: absmax");
            let Absmax::Nested { codes, absmax, offset } = &nested.absmax else { unreachable!() };
            assert_eq!(*offset, floats(&format!("{case}.offset"))?[0], "{case}: offset");
            assert_eq!(
                absmax.to_vec1::<f32>()?,
                floats(&format!("{case}.nested_absmax"))?,
                "{case}: nested absmax"
            );
            assert_eq!(codes.to_vec1::<u8>()?, bytes(&format!("{case}.absmax_u8"))?, "{case}: nested codes");
            for (quantized, name) in [(&plain, "dq_plain"), (&nested, "dq_nested")] {
                // The reference rounds once, to the weight's own type.
                let ours = Tensor::from_vec(quantized.dequantize()?, (rows, cols), &Device::Cpu)?;
                let ours =
                    ours.to_dtype(weight.dtype())?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
                assert_eq!(ours, floats(&format!("{case}.{name}"))?, "{case}: {name}");
            }
        }
        Ok(())
    }

    /// Bits of torch 2.11's `mean` on one thread, for counts that reach every level of the cascade. The last count
    /// is the number of blocks of a 128M-element weight.
    #[test]
    fn the_mean_adds_in_torchs_order() {
        let recorded: [(u64, u32); 6] = [
            (1_000, 1_057_138_351),
            (5_000, 1_057_136_932),
            (20_000, 1_057_131_618),
            (70_000, 1_057_131_758),
            (300_000, 1_057_131_557),
            (2_000_000, 1_057_131_551),
        ];
        for (count, bits) in recorded {
            let values: Vec<f32> =
                (0..count).map(|i| ((i * 7919) % 10_007) as f32 / 10_007.0 + 0.01).collect();
            assert_eq!(mean(&values).to_bits(), bits, "{count} values");
        }
    }
}
