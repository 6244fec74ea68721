//! The launches of `kernels/attention.cu`: one block for each tile of rows and each head.

use candle_core::{DType, Device, Result, Tensor, bail};

use super::packing::{Order, Packing};
use crate::facts::Heads;
use crate::ops::change::Change;
use crate::ops::cuda::{self, Launch};
use crate::ops::rope::Angles;
use crate::ops::unwritten;

/// The three tile sizes of a kernel, as listed at the end of `kernels/attention.cu`.
#[derive(Clone, Copy)]
struct Tiling {
    /// Warps per block; in the kernel for keys, pairs of warps.
    warps: usize,
    /// Bands of 16 rows that one warp owns.
    bands: usize,
    /// Rows of the other operand that pass through the block at a time.
    step: usize,
}

/// The kernels of one padded head width.
struct Tilings {
    width: usize,
    forward: Tiling,
    query: Tiling,
    key: Tiling,
    /// The kernel for keys on GPUs whose blocks may have the shared memory for it.
    key_wide: Option<Tiling>,
}

impl Tiling {
    const fn new(warps: usize, bands: usize, step: usize) -> Tiling {
        Tiling { warps, bands, step }
    }

    /// Returns the number of rows that one block owns.
    fn rows(&self) -> usize {
        16 * self.bands * self.warps
    }
}

/// Returns the narrowest kernels that hold a head of that width.
fn tilings(dtype: DType, head_width: usize) -> Result<Tilings> {
    let Some(width) = [32, 64, 96, 128, 256].into_iter().find(|&width| head_width <= width) else {
        bail!("attention heads of {head_width} columns: the kernels hold 256");
    };
    let of = Tiling::new;
    let (forward, query, key, key_wide) = match (dtype, width) {
        (DType::BF16, 64) => (of(4, 2, 64), of(4, 2, 32), of(4, 2, 64), None),
        (DType::BF16, 32) => (of(4, 2, 64), of(4, 2, 32), of(4, 2, 32), None),
        (DType::BF16, 96) => (of(4, 2, 64), of(4, 2, 32), of(4, 2, 32), Some(of(4, 2, 64))),
        (DType::BF16, 128) => (of(4, 2, 64), of(4, 2, 32), of(4, 1, 32), Some(of(4, 2, 32))),
        (DType::BF16, _) => (of(4, 1, 64), of(4, 1, 16), of(2, 1, 16), Some(of(4, 1, 32))),
        (_, 32 | 64 | 96) => (of(4, 1, 32), of(2, 1, 32), of(2, 1, 32), None),
        (_, 128) => (of(4, 1, 32), of(2, 1, 32), of(2, 1, 16), None),
        (_, _) => (of(2, 1, 16), of(2, 1, 8), of(1, 1, 8), None),
    };
    Ok(Tilings { width, forward, query, key, key_wide })
}

/// Returns the number of bytes of `rows` rows of tiles with 16 bytes between them. In f32, scratch space to turn one
/// product's result into the next one's operand is added.
fn shared_bytes(dtype: DType, width: usize, rows: usize, warps: usize, tiling: Tiling) -> usize {
    let size = dtype.size_in_bytes();
    let scratch = if dtype == DType::F32 { warps * 16 * tiling.bands * (tiling.step + 4) * 4 } else { 0 };
    rows * (width * size + 16) + scratch
}

/// Returns the number of bytes for keys and values, two stages of queries and their gradients, and the values that one
/// warp of a pair hands to the other.
fn key_shared_bytes(dtype: DType, width: usize, key: Tiling) -> usize {
    let handover = key.rows() * key.step * dtype.size_in_bytes();
    shared_bytes(dtype, width, 2 * key.rows() + 4 * key.step, 2 * key.warps, key) + handover
}

/// See `attention::forward`.
pub fn forward(qkv: &Tensor, heads: &Heads, packing: &Packing, spare: usize) -> Result<(Tensor, Tensor)> {
    let (rows, dtype) = (qkv.dim(0)?, qkv.dtype());
    let out = unwritten((rows, heads.query * heads.width + spare), dtype, qkv.device())?;
    let tiles = packing.tiles_on(qkv.device(), forward_rows(dtype, heads)?, Order::Queries)?;
    let lse = forward_tiles(qkv, heads, &tiles, 0, (&out, 0))?;
    Ok((out, lse))
}

/// Copies the lists of tiles that both passes may ask for to the device.
pub(super) fn send_tiles(packing: &Packing, heads: &Heads, dtype: DType, device: &Device) -> Result<()> {
    let Tilings { forward, query, key, key_wide, .. } = tilings(dtype, heads.width)?;
    for (rows, order) in [(forward.rows(), Order::Queries), (query.rows(), Order::Queries)]
        .into_iter()
        .chain([key.rows()].into_iter().chain(key_wide.map(|key| key.rows())).map(|rows| (rows, Order::Keys)))
    {
        packing.tiles_on(device, rows, order)?;
    }
    Ok(())
}

/// Returns the number of columns that the kernels make of a head's.
pub(super) fn padded_width(head_width: usize) -> Result<usize> {
    Ok(tilings(DType::F32, head_width)?.width)
}

/// Returns the number of rows of a tile of the forward pass.
pub(super) fn forward_rows(dtype: DType, heads: &Heads) -> Result<usize> {
    Ok(tilings(dtype, heads.width)?.forward.rows())
}

/// Returns the rows of some tiles, as in `Packing::tiles`. The first `skipped` rows of qkv are keys and values only:
/// results of the next one begin at an element of a matrix [any, H * D or wider]. Returns the logsumexp of all but the
/// skipped rows.
pub(super) fn forward_tiles(
    qkv: &Tensor,
    heads: &Heads,
    tiles: &Tensor,
    skipped: usize,
    (out, at): (&Tensor, usize),
) -> Result<Tensor> {
    let (rows, dtype) = (qkv.dim(0)?, qkv.dtype());
    let lse = unwritten((heads.query, rows - skipped), DType::F32, qkv.device())?;
    let Tilings { width, forward: tiling, .. } = tilings(dtype, heads.width)?;
    let shared = |stages: usize| {
        shared_bytes(dtype, width, tiling.rows() + 2 * stages * tiling.step, tiling.warps, tiling)
    };
    let (shared_max, _) = cuda::device::block_limits(cuda::device(qkv)?)?;
    let (suffix, shared) = match is_staged(dtype, width, shared(2), shared_max) {
        true => ("_staged", shared(2)),
        false => ("", shared(1)),
    };
    let name = format!("forward_{width}{suffix}");
    let launch = Launch::new(qkv, "attention", &name)?.tensor(qkv).tensor_at(out, at);
    let launch = launch.of(DType::F32, &lse).of(DType::U32, tiles).int(skipped).int(out.dim(1)?);
    let grid = (heads.query, tiles.elem_count() / 3, 1);
    shape(launch, heads, rows, aligned(heads, &[qkv, out])?).launch(grid, 32 * tiling.warps, shared)?;
    Ok(lse)
}

/// Returns whether the forward pass loads the next keys and values while it computes. Two blocks must still fit on a
/// processor, whose shared memory is the limit of one block plus a KiB of the driver's for each block. At 128 columns
/// its threads would spill registers.
fn is_staged(dtype: DType, width: usize, shared: usize, shared_max: usize) -> bool {
    const RESERVED: usize = 1 << 10;
    let fits = 2 * (shared + RESERVED) <= shared_max + RESERVED;
    fits && dtype == DType::BF16 && [64, 96].contains(&width) && Change::Staged.is_on()
}

/// See `attention::backward`. With angles, the gradients of queries and keys are turned back before they are stored.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    d_out: &Tensor,
    qkv: &Tensor,
    out: &Tensor,
    lse: &Tensor,
    heads: &Heads,
    packing: &Packing,
    angles: Option<&Angles>,
    spare: usize,
) -> Result<Tensor> {
    let ((rows, columns), dtype) = (qkv.dims2()?, qkv.dtype());
    let d_qkv = unwritten((rows, columns + spare), dtype, qkv.device())?;
    let (out_stride, d_stride) = (out.dim(1)?, columns + spare);
    let delta = unwritten((heads.query, rows), DType::F32, qkv.device())?;
    let aligned = aligned(heads, &[qkv, out, d_out, &d_qkv])?;
    let Tilings { width, query, key, key_wide, .. } = tilings(dtype, heads.width)?;

    let tiles = packing.tiles_on(qkv.device(), query.rows(), Order::Queries)?;
    let launch = Launch::new(qkv, "attention", &format!("backward_query_{width}"))?.tensor(qkv);
    let launch = launch.tensor(out).tensor(d_out).of(DType::F32, lse).of(DType::F32, &delta).tensor(&d_qkv);
    let shared = shared_bytes(dtype, width, 2 * query.rows() + 3 * query.step, query.warps, query);
    let grid = (heads.query, tiles.elem_count() / 3, 1);
    let launch = launch.of(DType::U32, &tiles).int(out_stride).int(d_stride);
    let launch = shape(launch, heads, rows, aligned);
    turn(launch, heads, angles)?.launch(grid, 32 * query.warps, shared)?;

    // Wide tiles make half as many blocks, so they are used only if there is still a block for each processor.
    let (shared_max, processors) = cuda::device::block_limits(cuda::device(qkv)?)?;
    let wide = key_wide.filter(|wide| {
        let blocks = packing.tiles_count(wide.rows());
        let switched = width != 96 || Change::Wide.is_on();
        switched && key_shared_bytes(dtype, width, *wide) <= shared_max && blocks * heads.key >= processors
    });
    let (key, suffix) = wide.map_or((key, ""), |wide| (wide, "_wide"));
    let tiles = packing.tiles_on(qkv.device(), key.rows(), Order::Keys)?;
    let launch = Launch::new(qkv, "attention", &format!("backward_key_{width}{suffix}"))?.tensor(qkv);
    let launch = launch.tensor(d_out).of(DType::F32, lse).of(DType::F32, &delta).tensor(&d_qkv);
    let shared = key_shared_bytes(dtype, width, key);
    let grid = (heads.key, tiles.elem_count() / 3, 1);
    let launch = shape(launch.of(DType::U32, &tiles).int(d_stride), heads, rows, aligned);
    turn(launch, heads, angles)?.launch(grid, 64 * key.warps, shared)?;
    Ok(d_qkv)
}

/// Returns the parameters that say how gradients are turned back. Each of a row's runs has a row of the same angles.
pub(super) fn turn<'a>(launch: Launch<'a>, heads: &Heads, angles: Option<&Angles>) -> Result<Launch<'a>> {
    let Some(Angles { cos, sin }) = angles else {
        return Ok(launch.optional(DType::F32, None).optional(DType::F32, None).int(0).int(0));
    };
    let ((runs, _), half) = (heads.turning(), cos.dim(1)?);
    assert!(2 * half <= heads.width, "{half} pairs of a head of {}", heads.width);
    Ok(launch.of(DType::F32, cos).of(DType::F32, sin).int(half).int(runs * half))
}

/// Returns the parameters that all kernels of attention end with.
pub(super) fn shape<'a>(launch: Launch<'a>, heads: &Heads, rows: usize, aligned: bool) -> Launch<'a> {
    assert!(heads.scale > 0.0, "a positive factor keeps the order of scores");
    assert!(heads.query * rows <= u32::MAX as usize, "rows of all heads are counted in 32 bits");
    let group = heads.group();
    let launch = launch.int(rows).int(heads.columns()).int(heads.query).int(group).int(heads.width);
    // The column of each kind's first head, and the distance to the next group's.
    let launch = launch.int(heads.query_at(0)).int(heads.query_at(group) - heads.query_at(0));
    let launch = launch.int(heads.key_at(0)).int(heads.value_at(0)).int(heads.key_at(1) - heads.key_at(0));
    let window = heads.window.unwrap_or(usize::MAX).min(i32::MAX as usize);
    let launch = launch.int(window).float(heads.scale).float(heads.softcap.unwrap_or(0.0));
    launch.int(aligned as usize)
}

/// Returns whether every head of every row begins and ends at a multiple of 16 bytes.
fn aligned(heads: &Heads, tensors: &[&Tensor]) -> Result<bool> {
    let mut aligned = true;
    for tensor in tensors {
        let piece = 16 / tensor.dtype().size_in_bytes();
        aligned &= heads.width.is_multiple_of(piece) && tensor.dim(1)?.is_multiple_of(piece);
        aligned &= cuda::address(tensor, 0)?.is_multiple_of(16);
    }
    Ok(aligned)
}
