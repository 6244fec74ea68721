//! The launches of `kernels/attention_hopper.cu`, and the check that decides whether this card's results of them are
//! used.
//!
//! A card of capability 9.0 computes a small example both ways before the first use of a head width: by these kernels
//! and by those of `kernels/attention.cu`. If the results differ, or a launch fails, the others go on with all the
//! work.

use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute_enum as Attribute;
use candle_core::{DType, Device, Result, Tensor};
use half::bf16;

use super::gpu;
use super::packing::{Order, Packing};
use crate::facts::{Heads, Layout};
use crate::ops::change::Change;
use crate::ops::cuda::launch::is_built;
use crate::ops::cuda::tensor_map::TensorMap;
use crate::ops::cuda::{self, Launch};
use crate::ops::rope::Angles;
use crate::ops::unwritten;

/// The kernels' file.
const STEM: &str = "attention_hopper";
/// Head widths that have kernels. The backward pass has none for the last.
const WIDTHS: [usize; 4] = [64, 96, 128, 256];
/// Rows that a block owns: 64 for each of its two warpgroups.
const ROWS: usize = 128;
/// Rows of a box, and of the other operand that pass through a block at a time in the backward pass.
const STEP: usize = 64;
/// Stages of the other operand.
const STAGES: usize = 2;
/// Threads of a block: two warpgroups that compute and one that copies.
const THREADS: usize = 384;
/// The number of times that a thread of the check asks a barrier before it gives up, so that a wrong count of bytes
/// ends as wrong results and not in a kernel that never ends.
const PATIENCE: usize = 100_000;
/// TOLERANCE of the check, in norm: the forward and the backward pass are within 6e-3 and 1e-2 of f64, each way.
const TOLERANCE: f64 = 2e-2;

/// A pass of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pass {
    Forward,
    Backward,
}

/// Returns whether these kernels compute a pass for such heads in such matrices.
fn serves(pass: Pass, heads: &Heads, matrices: &[&Tensor]) -> Result<bool> {
    let has = has_warpgroups(matrices[0].device(), heads, matrices[0].dtype(), pass == Pass::Backward);
    let mut fits = has;
    for matrix in matrices.iter().filter(|_| has) {
        fits &= matrix.dtype() == DType::BF16 && matrix.dim(1)?.is_multiple_of(8);
        fits &= cuda::address(matrix, 0)?.is_multiple_of(16);
    }
    Ok(fits)
}

/// The context whose card was checked last, for each of `WIDTHS`, and whether it passed. A process uses one card.
#[cfg(not(test))]
mod verdicts {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    static CHECKED: [(AtomicUsize, AtomicBool); 4] =
        [const { (AtomicUsize::new(0), AtomicBool::new(false)) }; 4];

    pub fn of(place: usize) -> (usize, bool) {
        let (context, passed) = &CHECKED[place];
        (context.load(Ordering::Acquire), passed.load(Ordering::Relaxed))
    }

    pub fn set(place: usize, context: usize, passed: bool) {
        CHECKED[place].1.store(passed, Ordering::Relaxed);
        CHECKED[place].0.store(context, Ordering::Release);
    }
}

/// The same for each thread, since every test has its own and decides which kernels it runs.
#[cfg(test)]
mod verdicts {
    use std::cell::Cell;

    thread_local! {
        static CHECKED: [Cell<(usize, bool)>; 4] = const { [const { Cell::new((0, false)) }; 4] };
    }

    pub fn of(place: usize) -> (usize, bool) {
        CHECKED.with(|checked| checked[place].get())
    }

    pub fn set(place: usize, context: usize, passed: bool) {
        CHECKED.with(|checked| checked[place].set((context, passed)));
    }
}

fn place(heads: &Heads) -> Option<usize> {
    WIDTHS.iter().position(|width| *width == heads.width && heads.softcap.is_none())
}

/// Checks the card, if it is one for these kernels and was not checked for this head width. Returns a warning, once,
/// if it fails. Waits for the device.
pub fn prepare(device: &Device, heads: &Heads, dtype: DType) -> Option<String> {
    let (place, cuda) = (place(heads)?, device.as_cuda_device().ok()?);
    // Any image will do for a driver of the tests, so that they need no code for this architecture.
    if dtype != DType::BF16 || !Change::Hopper.is_on() || !(is_built(STEM) || cfg!(test)) {
        return None;
    }
    let stream = cuda.cuda_stream();
    let capability = [
        Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
        Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
    ]
    .map(|which| stream.context().attribute(which).ok());
    let context = stream.context().cu_ctx() as usize;
    if capability != [Some(9), Some(0)] || verdicts::of(place).0 == context {
        return None;
    }
    let warning = judged(heads.width, check(device, heads.width, Variant::Right));
    verdicts::set(place, context, warning.is_none());
    warning
}

/// Returns whether this card computes a pass for such heads by these kernels, if the rows of its matrices are whole
/// pieces of 16 bytes. Only a card that `prepare` has checked does.
pub fn has_warpgroups(device: &Device, heads: &Heads, dtype: DType, backward: bool) -> bool {
    let Ok(cuda) = device.as_cuda_device() else { return false };
    let context = cuda.cuda_stream().context().cu_ctx() as usize;
    let has_pass = !backward || heads.width != 256;
    let passed = |place| has_pass && verdicts::of(place) == (context, true);
    dtype == DType::BF16 && Change::Hopper.is_on() && place(heads).is_some_and(passed)
}

/// Copies the lists of tiles that both passes may ask for to the device.
pub(super) fn send_tiles(packing: &Packing, heads: &Heads, dtype: DType, device: &Device) -> Result<()> {
    if has_warpgroups(device, heads, dtype, false) {
        packing.tiles_on(device, ROWS, Order::Queries)?;
        packing.tiles_on(device, ROWS, Order::Keys)?;
    }
    gpu::send_tiles(packing, heads, dtype, device)
}

/// Returns the warning for a check's result: `None` if the kernels may be used.
fn judged(width: usize, checked: Result<f64>) -> Option<String> {
    let found = match checked {
        Ok(distance) if distance <= TOLERANCE => return None,
        Ok(distance) => format!(
            "their results differ from the other kernels' by {distance:.1e}, at most {TOLERANCE:.0e} expected"
        ),
        // After some faults a card answers nothing more to this process.
        Err(error) => {
            format!(
                "they failed: {error}; if the run fails now too, set HONE_BENCH_WITHOUT=hopper for the next one"
            )
        }
    };
    Some(format!(
        "attention's kernels for Hopper are not used for heads of {width} columns: {found}. Training goes on with the kernels \
         for all cards, which are slower; please report this with the card's name and driver"
    ))
}

/// The fault that a test plants in a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Variant {
    Right,
    /// The scale of the scores.
    #[cfg(test)]
    Scale,
    /// The rows of a box, so that fewer bytes arrive than the kernel waits for.
    #[cfg(test)]
    Box,
    /// The shared memory, which the kernel cannot start with.
    #[cfg(test)]
    Memory,
}

impl Variant {
    fn scale(self, scale: f64) -> f64 {
        match self {
            #[cfg(test)]
            Variant::Scale => scale * 1.5,
            _ => scale,
        }
    }

    fn box_rows(self) -> usize {
        match self {
            #[cfg(test)]
            Variant::Box => STEP / 2,
            _ => STEP,
        }
    }

    fn shared_bytes(self, bytes: usize) -> usize {
        match self {
            #[cfg(test)]
            Variant::Memory => 1 << 20,
            _ => bytes,
        }
    }
}

/// Computes two small examples both ways. Returns the greatest distance of a result, relative to its norm; infinity
/// if some number is not finite or a second run has other bits.
fn check(device: &Device, width: usize, variant: Variant) -> Result<f64> {
    let heads = Heads {
        query: 2,
        key: 1,
        width,
        scale: 1.5 / (width as f64).sqrt(),
        window: Some(150),
        softcap: None,
        layout: Layout::Blocked,
    };
    let packing = Packing::new(vec![0..200, 200..270]);
    let qkv = pattern(270, heads.columns(), device)?;
    let d_out = pattern(270, heads.query * width, device)?;
    let tiles = packing.tiles_on(device, gpu::forward_rows(DType::BF16, &heads)?, Order::Queries)?;
    let out = unwritten((270, heads.query * width), DType::BF16, device)?;
    let lse = gpu::forward_tiles(&qkv, &heads, &tiles, 0, (&out, 0))?;
    let faulty = Heads { scale: variant.scale(heads.scale), ..heads };
    let run = || -> Result<Vec<Tensor>> {
        let (found, logs) = forward_in(&qkv, &faulty, &packing, 0, PATIENCE, variant)?;
        let mut results = vec![found, logs];
        if width != 256 {
            results
                .push(backward_in(&d_out, &qkv, &out, &lse, &faulty, &packing, None, 0, PATIENCE, variant)?);
        }
        Ok(results)
    };
    let (first, second) = (run()?, run()?);
    let mut expected = vec![out.clone(), lse.clone()];
    if width != 256 {
        expected.push(gpu::backward(&d_out, &qkv, &out, &lse, &heads, &packing, None, 0)?);
    }
    let mut greatest = 0f64;
    for ((expected, first), second) in expected.iter().zip(&first).zip(&second) {
        let [expected, first, second] = [numbers(expected)?, numbers(first)?, numbers(second)?];
        let is_same = first.iter().zip(&second).all(|(a, b)| a.to_bits() == b.to_bits());
        let squares =
            |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
        let difference = squares(&mut expected.iter().zip(&first).map(|(a, b)| f64::from(a - b)));
        let distance = difference / squares(&mut expected.iter().map(|value| f64::from(*value)));
        greatest = if is_same && distance.is_finite() { greatest.max(distance) } else { f64::INFINITY };
    }
    Ok(greatest)
}

/// Returns numbers between -1 and 1 that look random and are always the same.
fn pattern(rows: usize, columns: usize, device: &Device) -> Result<Tensor> {
    let value = |i: usize| {
        let hash = (i as u32).wrapping_add(columns as u32).wrapping_mul(0x9e37_79b9);
        let hash = (hash ^ hash >> 15).wrapping_mul(0x85eb_ca6b);
        bf16::from_f32(((hash ^ hash >> 13) & 0xffff) as f32 / 32_768.0 - 1.0)
    };
    let values: Vec<bf16> = (0..rows * columns).map(value).collect();
    cuda::upload(&values, device)?.reshape((rows, columns))
}

fn numbers(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}

/// Returns the number of bytes of a warpgroup's own tile, in which results have 16 bytes between their rows.
fn own_bytes(width: usize) -> usize {
    64 * (2 * width + 16)
}

/// Returns the number of bytes of a block: panels begin at a multiple of 1024, `own` tiles for each warpgroup, and
/// stages of two tiles.
fn shared_bytes(width: usize, own: usize, step: usize) -> usize {
    1024 + 2 * own * own_bytes(width) + STAGES * 2 * step * width * 2
}

/// Returns the number of columns of a panel.
fn panel(width: usize) -> usize {
    if width.is_multiple_of(64) { 64 } else { 32 }
}

/// See `attention::forward_beside`.
pub(super) fn forward(
    qkv: &Tensor,
    heads: &Heads,
    packing: &Packing,
    spare: usize,
) -> Result<(Tensor, Tensor)> {
    match spare.is_multiple_of(8) && serves(Pass::Forward, heads, &[qkv])? {
        true => forward_in(qkv, heads, packing, spare, 0, Variant::Right),
        false => gpu::forward(qkv, heads, packing, spare),
    }
}

fn forward_in(
    qkv: &Tensor,
    heads: &Heads,
    packing: &Packing,
    spare: usize,
    patience: usize,
    variant: Variant,
) -> Result<(Tensor, Tensor)> {
    let (rows, width, device) = (qkv.dim(0)?, heads.width, qkv.device());
    let out = unwritten((rows, heads.query * width + spare), DType::BF16, device)?;
    let lse = unwritten((heads.query, rows), DType::F32, device)?;
    let tiles = packing.tiles_on(device, ROWS, Order::Queries)?;
    let step = if width == 256 { STEP } else { 2 * STEP };
    let map = TensorMap::of(qkv, variant.box_rows(), panel(width))?;
    let launch =
        Launch::new(qkv, STEM, &format!("forward_{width}"))?.map(map).tensor(&out).of(DType::F32, &lse);
    let launch = launch.of(DType::U32, &tiles).int(out.dim(1)?).int(patience);
    let grid = (heads.query, tiles.elem_count() / 3, 1);
    gpu::shape(launch, heads, rows, true).launch(
        grid,
        THREADS,
        variant.shared_bytes(shared_bytes(width, 1, step)),
    )?;
    Ok((out, lse))
}

/// Does `gpu::backward`, by these kernels if they serve.
#[allow(clippy::too_many_arguments)]
pub(super) fn backward(
    d_out: &Tensor,
    qkv: &Tensor,
    out: &Tensor,
    lse: &Tensor,
    heads: &Heads,
    packing: &Packing,
    angles: Option<&Angles>,
    spare: usize,
) -> Result<Tensor> {
    match spare.is_multiple_of(8) && serves(Pass::Backward, heads, &[qkv, out, d_out])? {
        true => backward_in(d_out, qkv, out, lse, heads, packing, angles, spare, 0, Variant::Right),
        false => gpu::backward(d_out, qkv, out, lse, heads, packing, angles, spare),
    }
}

#[allow(clippy::too_many_arguments)]
fn backward_in(
    d_out: &Tensor,
    qkv: &Tensor,
    out: &Tensor,
    lse: &Tensor,
    heads: &Heads,
    packing: &Packing,
    angles: Option<&Angles>,
    spare: usize,
    patience: usize,
    variant: Variant,
) -> Result<Tensor> {
    let ((rows, columns), width, device) = (qkv.dims2()?, heads.width, qkv.device());
    let d_qkv = unwritten((rows, columns + spare), DType::BF16, device)?;
    let delta = unwritten((heads.query, rows), DType::F32, device)?;
    let map = TensorMap::of(qkv, variant.box_rows(), panel(width))?;
    let d_map = TensorMap::of(d_out, variant.box_rows(), panel(width))?;
    let shared = variant.shared_bytes(shared_bytes(width, 2, STEP));

    let tiles = packing.tiles_on(device, ROWS, Order::Queries)?;
    let launch = Launch::new(qkv, STEM, &format!("backward_query_{width}"))?.map(map).map(d_map);
    let launch = launch.tensor(out).tensor(d_out).of(DType::F32, lse).of(DType::F32, &delta).tensor(&d_qkv);
    let launch = launch.of(DType::U32, &tiles).int(out.dim(1)?).int(columns + spare).int(patience);
    let launch = gpu::turn(gpu::shape(launch, heads, rows, true), heads, angles)?;
    launch.launch((heads.query, tiles.elem_count() / 3, 1), THREADS, shared)?;

    let tiles = packing.tiles_on(device, ROWS, Order::Keys)?;
    let launch = Launch::new(qkv, STEM, &format!("backward_key_{width}"))?.map(map).map(d_map);
    let launch = launch.of(DType::F32, lse).of(DType::F32, &delta).tensor(&d_qkv).of(DType::U32, &tiles);
    let launch = gpu::shape(launch.int(columns + spare).int(patience), heads, rows, true);
    gpu::turn(launch, heads, angles)?.launch((heads.key, tiles.elem_count() / 3, 1), THREADS, shared)?;
    Ok(d_qkv)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::judge;

    fn device() -> Option<Device> {
        let device = judge::gpu()?;
        // A card of another kind has none of this.
        let major = Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR;
        let stream = device.as_cuda_device().unwrap().cuda_stream();
        (stream.context().attribute(major) == Ok(9)).then_some(device)
    }

    #[test]
    fn the_check_passes_for_right_kernels() -> Result<()> {
        let Some(device) = device() else { return Ok(()) };
        for width in WIDTHS {
            let distance = check(&device, width, Variant::Right)?;
            // Far inside the bound, and not by computing the same thing twice.
            assert!(distance > 0.0 && distance < TOLERANCE / 2.0, "{width}: {distance:.1e}");
            let heads = Heads::plain(2, 1, width);
            assert_eq!(prepare(&device, &heads, DType::BF16), None);
            let qkv = pattern(3, heads.columns(), &device)?;
            assert!(serves(Pass::Forward, &heads, &[&qkv])?);
            assert_eq!(serves(Pass::Backward, &heads, &[&qkv])?, width != 256);
            let capped = Heads { softcap: Some(1.0), ..heads };
            assert!(!serves(Pass::Forward, &capped, &[&qkv])?);
        }
        Ok(())
    }

    #[test]
    fn kernels_that_are_wrong_hang_or_fail_are_not_used_and_it_is_said() -> Result<()> {
        let Some(device) = device() else { return Ok(()) };
        for (variant, said) in [
            (Variant::Scale, "their results differ"),
            (Variant::Box, "their results differ"),
            (Variant::Memory, "they failed"),
        ] {
            let warning = judged(96, check(&device, 96, variant)).expect("a warning");
            assert!(warning.contains(said) && warning.contains("96 columns"), "{variant:?}: {warning}");
        }
        assert_eq!(judged(64, Ok(1e-3)), None);
        assert!(judged(64, Ok(f64::INFINITY)).is_some());
        Ok(())
    }
}
