//! The launches of `kernels/cached.cu`: rows that generate piece by piece of their keys, longer ones by training's
//! attention.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

use candle_core::{DType, Device, Result, Tensor, bail};

use super::super::gpu as training;
use super::super::packing::{Order, Packing};
use super::{PAGE, Segment, Segments, Store, Values};
use crate::facts::Heads;
use crate::ops::cuda::{self, Launch};
use crate::ops::rope::Angles;
use crate::ops::unwritten;

/// The smallest number of new rows for which a sequence's keys are read by tiles of rows instead of by each row.
const LONG_ROWS: usize = 16;
/// Threads of a block of `decode`, and most query heads of a block.
const THREADS: usize = 128;
const GROUP: usize = 4;
/// Pieces of one launch.
const PIECES_MAX: usize = 65_535;
/// A piece that is its row's only one.
const ALONE: u32 = u32::MAX;

/// The parts of a step's segments that the launches of all layers read, copied to the device when first asked for.
#[derive(Default)]
pub struct Tables {
    /// Whether lists are filled up to few different lengths.
    filled_up: Cell<bool>,
    pages: OnceCell<Tensor>,
    slots: OnceCell<Tensor>,
    whole: OnceCell<Packing>,
    /// The pieces, by the layer's window.
    pieces: RefCell<HashMap<Option<usize>, Rc<Pieces>>>,
    /// Lists of tiles, by the segment's number and the rows of a tile.
    tiles: RefCell<HashMap<(usize, usize), Tensor>>,
}

/// The pieces of all rows that generate.
struct Pieces {
    /// `[6 n]`: row, position, first of its pages, keys from and to, number among the partial results.
    list: Vec<[u32; 6]>,
    on_device: Tensor,
    /// `[3 m]`: row, its first partial result, how many.
    combined: Option<Tensor>,
    partials: usize,
}

/// Returns the number of keys of a piece of a row that sees so many. Small pieces give few sequences to many
/// processors; more than 256 keys a piece keeps no block's scores.
fn piece_keys(keys: usize) -> usize {
    match keys {
        0..=1024 => 64,
        1025..=4096 => 128,
        _ => 256,
    }
}

impl Segment {
    /// Returns the number of tokens of the sequence with this step's.
    fn end(&self) -> usize {
        self.start + self.rows.len()
    }

    fn is_long(&self) -> bool {
        self.rows.len() >= LONG_ROWS
    }

    /// Returns the pages that hold its tokens.
    fn used(&self) -> &[u32] {
        &self.pages[..self.end().div_ceil(PAGE)]
    }
}

/// Returns the number of pages that a list is filled up to: 256, 1024, 4096, and so on.
fn pages_filled_up(pages: usize) -> usize {
    std::iter::successors(Some(256), |length| Some(4 * length))
        .find(|length| *length >= pages)
        .unwrap_or(pages)
}

impl Segments<'_> {
    /// See `Segments::send`.
    pub(super) fn send_filled_up(
        &self,
        windows: impl IntoIterator<Item = Option<usize>>,
        device: &Device,
    ) -> Result<()> {
        assert!(!self.list.iter().any(Segment::is_long), "short segments");
        self.tables.filled_up.set(true);
        self.slots(device)?;
        self.pages(device)?;
        windows.into_iter().try_for_each(|window| self.pieces(window, device).map(|_| ()))
    }

    /// Returns the index of each segment's first page among those of all.
    fn pages_at(&self) -> impl Iterator<Item = (usize, &Segment)> {
        self.list.iter().scan(0, |at, segment| {
            let from = *at;
            *at += segment.used().len();
            Some((from, segment))
        })
    }

    fn pages(&self, device: &Device) -> Result<&Tensor> {
        once(&self.tables.pages, || {
            let mut pages: Vec<u32> = self.list.iter().flat_map(|segment| segment.used()).copied().collect();
            if self.tables.filled_up.get() {
                pages.resize(pages_filled_up(pages.len()), 0);
            }
            cuda::upload(&pages, device)
        })
    }

    /// Returns the place of each row's keys and values: page * PAGE + token.
    fn slots(&self, device: &Device) -> Result<&Tensor> {
        once(&self.tables.slots, || {
            let slot =
                |segment: &Segment, at: usize| segment.pages[at / PAGE] * PAGE as u32 + (at % PAGE) as u32;
            let positions = |segment: &Segment| segment.start..segment.end();
            let slots = self.list.iter().flat_map(|s| positions(s).map(move |at| slot(s, at)));
            cuda::upload(&slots.collect::<Vec<_>>(), device)
        })
    }

    fn pieces(&self, window: Option<usize>, device: &Device) -> Result<Rc<Pieces>> {
        if let Some(pieces) = self.tables.pieces.borrow().get(&window) {
            return Ok(pieces.clone());
        }
        let pieces = Rc::new(self.cut(window, device)?);
        self.tables.pieces.borrow_mut().insert(window, pieces.clone());
        Ok(pieces)
    }

    fn cut(&self, window: Option<usize>, device: &Device) -> Result<Pieces> {
        let (mut list, mut combined, mut partials) = (Vec::new(), Vec::new(), 0);
        for (pages_at, segment) in self.pages_at().filter(|(_, segment)| !segment.is_long()) {
            for (position, row) in (segment.start..).zip(segment.rows.clone()) {
                let seen = window.map_or(0, |window| (position + 1).saturating_sub(window));
                let (from, to) = (seen / PAGE * PAGE, position + 1);
                let keys = piece_keys(to - from);
                let alone = to - from <= keys;
                if !alone {
                    let count = (to - from).div_ceil(keys);
                    combined.push([row as u32, partials as u32, count as u32]);
                }
                for first in (from..to).step_by(keys) {
                    let number = if alone { ALONE } else { partials as u32 };
                    partials += usize::from(!alone);
                    let [row, position, at] = [row, position, pages_at].map(|number| number as u32);
                    list.push([row, position, at, first as u32, (first + keys).min(to) as u32, number]);
                }
            }
        }
        if self.tables.filled_up.get() {
            list.resize(list.len().next_power_of_two(), [0; 6]);
            partials = if combined.is_empty() { 0 } else { list.len() };
            let rows = self.list.last().map_or(0, |segment| segment.rows.end);
            combined.resize(if combined.is_empty() { 0 } else { rows }, [0; 3]);
        }
        let on_device = cuda::upload(list.as_flattened(), device)?;
        let combined = match combined.is_empty() {
            true => None,
            false => Some(cuda::upload(combined.as_flattened(), device)?),
        };
        Ok(Pieces { list, on_device, combined, partials })
    }
}

/// Does `OnceCell::get_or_try_init`, which is not stable yet.
fn once<T>(cell: &OnceCell<T>, make: impl FnOnce() -> Result<T>) -> Result<&T> {
    if cell.get().is_none() {
        let made = make()?;
        // Nobody else fills it: it is not shared between threads.
        let _ = cell.set(made);
    }
    Ok(cell.get().expect("just filled"))
}

/// Returns the store's tensors.
fn tensors(store: &Store) -> Result<(&Tensor, &Tensor)> {
    match (&store.keys, &store.values) {
        (Values::There(keys), Values::There(values)) => Ok((keys, values)),
        _ => bail!("the activations lie on a GPU, the cache does not"),
    }
}

/// Starts a launch of `cached_{name}_{type of the cache}_{type of the activations}`. A cache in 8 bits lies there as
/// bytes.
fn launch<'a>(qkv: &'a Tensor, store: &Store, name: &str) -> Result<Launch<'a>> {
    let (keys, _) = tensors(store)?;
    let cache = if keys.dtype() == DType::U8 { "fp8" } else { cuda::suffix(keys.dtype())? };
    Launch::new(qkv, "cached", &format!("{name}_{cache}"))
}

/// Returns whether every head of every row begins and ends at a multiple of eight values.
fn aligned(heads: &Heads) -> bool {
    heads.width.is_multiple_of(8)
}

/// Writes keys and values of all rows to their pages, rotated by `angles` if there are any.
pub fn write(
    qkv: &Tensor,
    heads: &Heads,
    store: &Store,
    segments: &Segments,
    angles: Option<&Angles>,
) -> Result<()> {
    let (rows, (keys, values)) = (qkv.dim(0)?, tensors(store)?);
    let launch = launch(qkv, store, "write")?.tensor(qkv).of(keys.dtype(), keys).of(keys.dtype(), values);
    let launch = launch.of(DType::U32, segments.slots(qkv.device())?);
    let (cos, sin) = (angles.map(|angles| &angles.cos), angles.map(|angles| &angles.sin));
    let (runs, _) = heads.turning();
    let half = cos.map_or(Ok(0), |cos| cos.dim(1))?;
    assert!(
        cos.is_none_or(|cos| cos.dims() == [rows * runs, half]) && 2 * half <= heads.width,
        "a row of angles a run"
    );
    let launch = launch.optional(DType::F32, cos).optional(DType::F32, sin).int(runs).int(half);
    training::shape(launch, heads, rows, aligned(heads)).launch((rows, 1, 1), THREADS, 0)
}

/// Returns the attention of all rows over the pages of their sequences: [rows, query heads x width].
pub fn forward(qkv: &Tensor, heads: &Heads, store: &Store, segments: &Segments) -> Result<Tensor> {
    let rows = qkv.dim(0)?;
    let out = unwritten((rows, heads.query * heads.width), qkv.dtype(), qkv.device())?;
    decode(qkv, heads, store, segments, &out)?;
    // Rows that begin their sequence find all that they see in qkv itself, if the cache rounds nothing.
    let itself =
        |segment: &Segment| segment.start == 0 && tensors(store).is_ok_and(|(k, _)| k.dtype() == qkv.dtype());
    let whole = once(&segments.tables.whole, || {
        let whole = segments.list.iter().filter(|segment| segment.is_long() && itself(segment));
        Ok(Packing::new(whole.map(|segment| segment.rows.clone()).collect()))
    })?;
    if !whole.examples().is_empty() {
        let tiles =
            whole.tiles_on(qkv.device(), training::forward_rows(qkv.dtype(), heads)?, Order::Queries)?;
        training::forward_tiles(qkv, heads, &tiles, 0, (&out, 0))?;
    }
    let long =
        segments.pages_at().enumerate().filter(|(_, (_, segment))| segment.is_long() && !itself(segment));
    for (number, (pages_at, segment)) in long {
        let wide = gather(qkv, heads, store, segments, pages_at, segment)?;
        let tiles = tiles(segments, number, training::forward_rows(qkv.dtype(), heads)?, qkv.device())?;
        let at = segment.rows.start * heads.query * heads.width;
        training::forward_tiles(&wide, heads, &tiles, segment.start, (&out, at))?;
    }
    Ok(out)
}

/// Returns the tiles of a segment's new rows among all rows of its sequence; the longest work first.
fn tiles(segments: &Segments, number: usize, rows: usize, device: &Device) -> Result<Tensor> {
    let mut kept = segments.tables.tiles.borrow_mut();
    if let Some(tiles) = kept.get(&(number, rows)) {
        return Ok(tiles.clone());
    }
    let segment = &segments.list[number];
    let firsts = (segment.start..segment.end()).step_by(rows);
    let list: Vec<[u32; 3]> = firsts.rev().map(|first| [0, segment.end() as u32, first as u32]).collect();
    let tiles = cuda::upload(list.as_flattened(), device)?;
    kept.insert((number, rows), tiles.clone());
    Ok(tiles)
}

/// Returns all rows of a sequence in the columns of qkv: keys and values of each, queries of the new ones.
fn gather(
    qkv: &Tensor,
    heads: &Heads,
    store: &Store,
    segments: &Segments,
    pages_at: usize,
    segment: &Segment,
) -> Result<Tensor> {
    let (rows, (keys, values)) = (segment.end(), tensors(store)?);
    let wide = unwritten((rows, heads.columns()), qkv.dtype(), qkv.device())?;
    let launch = launch(qkv, store, "gather")?.tensor_at(qkv, segment.rows.start * heads.columns());
    let launch = launch.of(keys.dtype(), keys).of(keys.dtype(), values).tensor(&wide);
    let launch = launch.of_at(DType::U32, segments.pages(qkv.device())?, pages_at).int(segment.start);
    training::shape(launch, heads, rows, aligned(heads)).launch((rows, 1, 1), THREADS, 0)?;
    Ok(wide)
}

/// Computes the rows of short segments.
fn decode(qkv: &Tensor, heads: &Heads, store: &Store, segments: &Segments, out: &Tensor) -> Result<()> {
    // Without such a row there is nothing to copy to the device, which takes no empty tensor.
    if segments.list.iter().all(Segment::is_long) {
        return Ok(());
    }
    let (rows, device, (keys, values)) = (qkv.dim(0)?, qkv.device(), tensors(store)?);
    let pieces = segments.pieces(heads.window, device)?;
    let partials = pieces.partials.max(1) * heads.query * (heads.width + 2);
    let partials = unwritten(partials, DType::F32, device)?;
    let group = if heads.group() == 1 { 1 } else { GROUP };
    let name = format!("decode_{}_{group}", training::padded_width(heads.width)?);
    for from in (0..pieces.list.len()).step_by(PIECES_MAX) {
        let count = PIECES_MAX.min(pieces.list.len() - from);
        let launch = launch(qkv, store, &name)?.tensor(qkv).of(keys.dtype(), keys).of(keys.dtype(), values);
        let launch =
            launch.tensor(out).of(DType::F32, &partials).of_at(DType::U32, &pieces.on_device, 6 * from);
        let launch = launch.of(DType::U32, segments.pages(device)?);
        let grid = (heads.key * heads.group().div_ceil(group), count, 1);
        training::shape(launch, heads, rows, aligned(heads)).launch(grid, THREADS, 0)?;
    }
    let Some(combined) = &pieces.combined else { return Ok(()) };
    let launch = Launch::new(out, "cached", "combine")?.of(DType::F32, &partials).tensor(out);
    let launch = launch.of(DType::U32, combined).int(heads.query).int(heads.width);
    launch.launch((heads.query, combined.elem_count() / 3, 1), heads.width.next_multiple_of(32), 0)
}
