//! Adds several adapters to the rows of a step, on a GPU: `y[row] += sum of strength * scale * (x[row] A^T)
//! B^T`.
//!
//! Each row has adapters and strengths of its own. One launch makes `x A^T` for all of them and up to three layers that
//! read the same x (`Low`). The product of few rows with the layers' weights adds the rest where it writes y, for every
//! rank (`matmul::few_rows`); behind another product, a second launch does. If x is a norm or an activation, the launch
//! that makes `x A^T` can make x, too (`Items::make`). Sums are f32 and in the order of a row's items; they do not
//! depend on other rows.

use candle_core::{DType, Device, Result, Tensor};

use super::change::Change;
use super::cuda::{self, Launch};
use super::unwritten;
use crate::facts::{Activation, Function};

/// Layers of one launch.
const PARTS: usize = 3;
const THREADS: usize = 256;
/// Items or rows of one launch.
const GRID_MAX: usize = 65_535;
/// Ranks of a block that makes `x A^T`, of an x that is there, of a norm and of an activation.
const READ_RANKS: usize = 2;
const NORM_RANKS: usize = 4;
const ACTIVATED_RANKS: usize = 2;
/// Items of a block whose x is there: those of one adapter share the values that are read of A.
const ITEMS: usize = 4;
/// Most items times ranks whose blocks make x for themselves. Computed, to be confirmed: beyond 8 rows of rank 16 they
/// read more for it, and of A, than a launch costs.
const MADE_MAX: usize = 128;
/// Values that a kernel which makes x moves at once.
const UNIT: usize = 8;
/// The largest rank is counted as a multiple of this, so that a kernel reads eight values of `x A^T` at once.
const RANK_UNIT: usize = 8;

/// One layer's matrices: A [rank, K], B [N, rank], contiguous and in the activations' type.
pub struct Matrices<'a> {
    /// A [rank, K].
    pub a: &'a Tensor,
    /// B [N, rank].
    pub b: &'a Tensor,
    /// LoRA's scale, alpha / rank in the usual case.
    pub scale: f64,
}

/// A layer that reads x: its number in the adapters' tables, the first of its columns in y, and their number.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// Number of the layer in the adapters' tables.
    pub site: usize,
    /// The part's first column in y.
    pub at: usize,
    /// Number of its columns.
    pub columns: usize,
}

/// An adapter on a row.
pub struct Item<'a> {
    /// Row of x.
    pub row: usize,
    /// The adapter's table of addresses.
    pub table: &'a Tensor,
    /// Factor on the adapter's part of the sum.
    pub strength: f64,
}

/// The extent of a step's adapters.
#[derive(Clone, Debug)]
pub struct Extent {
    /// Rows of the step.
    pub rows: usize,
    /// The largest rank.
    pub rank: usize,
    /// The layers for which one of them has a pair, by their numbers in the tables.
    pub sites: Vec<bool>,
}

/// The items of a step, on the device.
#[derive(Debug)]
pub struct Items {
    /// `[4 n]`: address of the table (two numbers), row, strength.
    items: Tensor,
    /// `[3 m]`: row, its first item, how many.
    rows: Tensor,
    /// Whether `rows` has an entry for each row of the step, in order.
    all: bool,
    extent: Extent,
    /// The adapters' tables, which must live until the launches are queued.
    _tables: Vec<Tensor>,
}

/// Returns the addresses of an adapter's matrices, eight numbers a layer behind the layers' number. The matrices must
/// live as long as the table is used.
///
/// # Errors
/// A matrix does not lie on `device`.
pub fn table<'a>(layers: impl IntoIterator<Item = Option<Matrices<'a>>>, device: &Device) -> Result<Tensor> {
    let mut numbers = vec![0; 8];
    for layer in layers {
        numbers[0] += 1;
        let Some(Matrices { a, b, scale }) = layer else {
            numbers.extend([0; 8]);
            continue;
        };
        for matrix in [a, b] {
            let address = cuda::address(matrix, 0)?;
            assert!(address.is_multiple_of(16), "matrices begin at multiples of 16 bytes");
            numbers.extend([address as u32, (address >> 32) as u32]);
        }
        numbers.extend([a.dim(0)? as u32, (scale as f32).to_bits(), 0, 0]);
    }
    cuda::upload_apart(&numbers, device)
}

/// The input of layers, as a function of an existing tensor.
pub enum Source<'a> {
    /// The root-mean-square norm of x [T, K].
    Norm {
        /// x.
        x: &'a Tensor,
        /// The norm's factor, `[K]` in f32.
        weight: &'a Tensor,
        /// Added to the mean square.
        eps: f64,
    },
    /// The activation of x.
    Activation {
        /// x, as `ops/activation.rs` has it.
        x: &'a Tensor,
        /// The function.
        activation: Activation,
    },
}

impl Source<'_> {
    fn x(&self) -> &Tensor {
        match self {
            Source::Norm { x, .. } | Source::Activation { x, .. } => x,
        }
    }

    /// Returns the number of columns of the layers' input.
    fn width(&self) -> Result<usize> {
        Ok(match self {
            Source::Norm { x, .. } => x.dim(1)?,
            Source::Activation { x, activation } => activation.width(x.dim(1)?),
        })
    }

    /// Returns the kernel and its own parameters.
    fn launch(&self) -> Result<Launch<'_>> {
        match self {
            Source::Norm { x, weight, eps } => {
                Ok(Launch::new(x, "adapters", "norm")?.tensor(x).of(DType::F32, weight).float(*eps))
            }
            Source::Activation { x, activation } => {
                let curve = match activation.function {
                    Function::Silu => "activated_silu",
                    Function::GeluTanh => "activated_gelu_tanh",
                    Function::GeluErf => "activated_gelu_erf",
                };
                Ok(Launch::new(x, "adapters", curve)?.tensor(x).int(usize::from(activation.gated)))
            }
        }
    }
}

/// `x A^T` of all items and of layers that read the same x, before it goes through B.
pub struct Low<'a> {
    items: &'a Items,
    /// [layers, items, rank_max].
    values: Tensor,
    sites: Vec<usize>,
    factor: f64,
}

impl Items {
    /// Returns the items of a step. Items of one row lie together, in the order in which they are added. Rows with the
    /// same adapter should be neighbours. `all`: the step's rows are few, so that a product of few rows may ask for the
    /// items by the row.
    pub fn new(list: &[Item], extent: Extent, all: bool, device: &Device) -> Result<Items> {
        Items::of(list, extent, all, list.len(), device)
    }

    /// Returns the same with lists that are filled up to few different lengths: steps with other adapters ask for the
    /// same launches.
    pub fn filled_up(list: &[Item], extent: Extent, device: &Device) -> Result<Items> {
        let items = Items::of(list, extent, true, list.len().next_power_of_two(), device)?;
        cuda::inputs::depends_on(items.extent.rank);
        cuda::inputs::depends_on(usize::from(Change::Added.is_on()));
        for sites in items.extent.sites.chunks(usize::BITS as usize) {
            let bits = sites.iter().enumerate().map(|(at, has)| usize::from(*has) << at);
            cuda::inputs::depends_on(bits.sum());
        }
        Ok(items)
    }

    /// `all`: the rows without items have entries, too. `count`: the items' number, filled up.
    fn of(list: &[Item], extent: Extent, all: bool, count: usize, device: &Device) -> Result<Items> {
        let mut rows: Vec<[u32; 3]> = Vec::new();
        let mut items = Vec::with_capacity(4 * count);
        for (number, Item { row, table, strength }) in list.iter().enumerate() {
            let address = cuda::address(table, 0)?;
            items.extend([address as u32, (address >> 32) as u32, *row as u32, (*strength as f32).to_bits()]);
            match rows.last_mut().filter(|last| last[0] == *row as u32) {
                Some(last) => last[2] += 1,
                None => rows.push([*row as u32, number as u32, 1]),
            }
        }
        if all {
            let mut every: Vec<[u32; 3]> = (0..extent.rows as u32).map(|row| [row, 0, 0]).collect();
            rows.iter().for_each(|row| every[row[0] as usize] = *row);
            rows = every;
        }
        items.resize(4 * count, 0);
        Ok(Items {
            items: cuda::upload(&items, device)?,
            rows: cuda::upload(rows.as_flattened(), device)?,
            all,
            extent: Extent { rank: extent.rank.next_multiple_of(RANK_UNIT), ..extent },
            _tables: list.iter().map(|item| item.table.clone()).collect(),
        })
    }

    /// Adds the items' parts of x [T, K], times `factor`, to the columns of each part in y [T, any].
    pub fn add(&self, x: &Tensor, y: &Tensor, parts: &[Part], factor: f64) -> Result<()> {
        parts.chunks(PARTS).try_for_each(|parts| {
            let sites: Vec<usize> = parts.iter().map(|part| part.site).collect();
            self.low(x, &sites, factor)?.map_or(Ok(()), |low| low.expand(y, parts))
        })
    }

    /// Returns `x A^T` for layers that read x, at most three. The part that is added to y is multiplied by `factor`.
    /// `None`: no adapter has a pair for any of them.
    pub fn low(&self, x: &Tensor, sites: &[usize], factor: f64) -> Result<Option<Low<'_>>> {
        let ((rows, k), count, rank) = (x.dims2()?, self.count(), self.extent.rank);
        assert_eq!(rows, self.extent.rows, "the items are those of x");
        assert!(count <= GRID_MAX, "{count} adapters on rows: a launch takes {GRID_MAX}");
        if !self.reach(sites) {
            return Ok(None);
        }
        let values = unwritten((sites.len(), count, rank), DType::F32, x.device())?;
        let launch = Launch::new(x, "adapters", "shrink")?.tensor(x).of(DType::U32, &self.items);
        let launch = numbers(launch.of(DType::F32, &values).int(k).int(rank).int(count), sites);
        let grid = (rank.div_ceil(READ_RANKS), count.div_ceil(ITEMS), sites.len());
        launch.launch(grid, THREADS, 0)?;
        Ok(Some(Low { items: self, values, sites: sites.to_vec(), factor }))
    }

    /// Returns the layers' input in memory of its own, with the bits of its operation, and `low` of it, in one launch.
    /// `None`: two launches are better, no kernel does both, or there is nothing to add.
    pub fn make(&self, source: &Source, sites: &[usize], factor: f64) -> Result<Option<(Tensor, Low<'_>)>> {
        let (x, k, count, rank) = (source.x(), source.width()?, self.count(), self.extent.rank);
        let rows = x.dim(0)?;
        assert_eq!(rows, self.extent.rows, "the items are those of x");
        let fits = x.dtype() == DType::BF16 && k.is_multiple_of(UNIT) && count * rank <= MADE_MAX;
        if !fits || sites.len() > PARTS || !self.reach(sites) {
            return Ok(None);
        }
        let made = unwritten((rows, k), x.dtype(), x.device())?;
        let values = unwritten((sites.len(), count, rank), DType::F32, x.device())?;
        let launch = source.launch()?.tensor(&made).of(DType::U32, &self.items).of(DType::F32, &values);
        let launch = numbers(launch.int(rows).int(k).int(rank).int(count), sites);
        // Blocks behind those of the items write a row each.
        let blocks = rank.div_ceil(match source {
            Source::Norm { .. } => NORM_RANKS,
            Source::Activation { .. } => ACTIVATED_RANKS,
        });
        let behind = rows.div_ceil(blocks * sites.len());
        launch.launch((blocks, count + behind, sites.len()), THREADS, 0)?;
        Ok(Some((made, Low { items: self, values, sites: sites.to_vec(), factor })))
    }

    /// Returns whether an adapter has a pair for one of these layers.
    fn reach(&self, sites: &[usize]) -> bool {
        sites.iter().any(|site| self.extent.sites.get(*site).copied().unwrap_or(false))
    }

    fn count(&self) -> usize {
        self.items.elem_count() / 4
    }
}

impl Low<'_> {
    /// Adds B's part to y by a launch of its own.
    fn expand(&self, y: &Tensor, parts: &[Part]) -> Result<()> {
        let Items { items, rows, extent, .. } = self.items;
        let launch = Launch::new(y, "adapters", "expand")?.of(DType::F32, &self.values).of(DType::U32, items);
        let launch = launch.of(DType::U32, rows).tensor(y).int(y.dim(1)?);
        let launch = launch.int(self.items.count()).int(extent.rank).float(self.factor);
        let of = |value: fn(&Part) -> usize| parts.iter().map(value).collect::<Vec<_>>();
        let launch = numbers(numbers(launch, &self.sites), &of(|part| part.at));
        let launch = numbers(launch, &of(|part| part.columns));
        let widest = parts.iter().map(|part| part.columns).max().unwrap_or(0);
        launch.launch((widest.div_ceil(THREADS), rows.elem_count() / 3, parts.len()), THREADS, 0)
    }

    /// Returns the parameters of a product that adds B's part where it writes y (`ADAPTERS_PARAMETERS` of
    /// kernels/matmul.cu).
    pub fn parameters<'a>(&self, launch: Launch<'a>) -> Launch<'a> {
        let Items { items, rows, extent, all, .. } = self.items;
        assert!(*all, "a product of few rows knows the items by the row");
        let launch = launch.of(DType::F32, &self.values).of(DType::U32, items).of(DType::U32, rows);
        numbers(launch.int(self.items.count()).int(extent.rank).float(self.factor), &self.sites)
    }
}

/// Adds a number for each layer to the launch, and zeros up to a launch's number of layers.
fn numbers<'a>(launch: Launch<'a>, numbers: &[usize]) -> Launch<'a> {
    (0..PARTS).fold(launch, |launch, i| launch.int(numbers.get(i).copied().unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::quantization::Code;
    use crate::ops::four_bit::FourBit;
    use crate::ops::matmul::few_rows;
    use crate::ops::weight::Weight;
    use crate::ops::{activation, judge, rms_norm};

    /// Rows without, with one and with three adapters, ranks that are and are no multiple of eight, layers that an
    /// adapter does not have; a row's bits do not depend on the others.
    #[test]
    fn every_row_gets_the_sum_of_its_own_adapters() -> Result<()> {
        judge::on_gpu(|gpu| {
            for (k, columns) in [(7, [5, 3, 9]), (96, [16, 300, 8])] {
                let ranks = [8, 3, 16];
                let pair = |adapter: usize, site: usize| -> Result<(Tensor, Tensor)> {
                    let (rank, seed) = (ranks[adapter], (10 * adapter + site) as u64);
                    let (a, b) =
                        (gpu.random((rank, k), seed)?, gpu.random((columns[site], rank), seed + 100)?);
                    Ok((a.as_tensor().clone(), b.as_tensor().clone()))
                };
                let has = |adapter: usize, site: usize| adapter != 1 || site != 2;
                let mut there = Vec::new();
                for adapter in 0..3 {
                    let sites = (0..3)
                        .map(|site| pair(adapter, site).and_then(|(a, b)| Ok((gpu.put(&a)?, gpu.put(&b)?))));
                    there.push(sites.collect::<Result<Vec<_>>>()?);
                }
                let tables = there.iter().enumerate().map(|(adapter, sites)| {
                    let sites = sites.iter().enumerate();
                    let sites = sites
                        .map(|(site, (a, b))| has(adapter, site).then_some(Matrices { a, b, scale: 0.5 }));
                    table(sites, &gpu.device)
                });
                let tables = tables.collect::<Result<Vec<_>>>()?;
                // (row, adapter, strength)
                let mix = [(0, 0, 1.0), (2, 0, 0.3), (2, 1, -1.0), (2, 2, 0.25), (3, 2, 1.0), (5, 1, 0.5)];
                let item = |&(row, adapter, strength): &(usize, usize, f64)| Item {
                    row,
                    table: &tables[adapter],
                    strength,
                };
                let (width, mut at) = (columns.iter().sum::<usize>() + 2, 1);
                let parts: Vec<Part> = (0..3)
                    .map(|site| {
                        let part = Part { site, at, columns: columns[site] };
                        at += columns[site];
                        part
                    })
                    .collect();
                let (x, y) = (gpu.random((6, k), 1)?, gpu.random((6, width), 2)?);
                let mut rows = (0..6).map(|row| y.narrow(0, row, 1)).collect::<Result<Vec<_>>>()?;
                for &(row, adapter, strength) in &mix {
                    for part in parts.iter().filter(|part| has(adapter, part.site)) {
                        let (a, b) = pair(adapter, part.site)?;
                        let added = (x.narrow(0, row, 1)?.matmul(&a.t()?)?.matmul(&b.t()?)?
                            * (strength * 0.5 * 2.0))?;
                        let behind = width - part.at - part.columns;
                        let zeros = |columns| Tensor::zeros((1, columns), DType::F64, &Device::Cpu);
                        rows[row] =
                            (&rows[row] + Tensor::cat(&[zeros(part.at)?, added, zeros(behind)?], 1)?)?;
                    }
                }
                let items: Vec<Item> = mix.iter().map(item).collect();
                let extent = |rank| Extent { rows: 6, rank, sites: vec![true; 3] };
                let found = gpu.put(&y)?;
                let there = gpu.put(&x)?;
                Items::new(&items, extent(16), false, &gpu.device)?.add(&there, &found, &parts, 2.0)?;
                gpu.same(&found, &Tensor::cat(&rows, 0)?)?;
                let alone = gpu.put(&y)?;
                Items::new(&items[1..4], extent(16), false, &gpu.device)?.add(&there, &alone, &parts, 2.0)?;
                let row = |y: &Tensor| y.narrow(0, 2, 1)?.copy()?.to_device(&Device::Cpu);
                gpu.within(0.0, &row(&alone)?, &row(&found)?)?;
                // Items that fill lists up add nothing.
                let filled_up = gpu.put(&y)?;
                let of_step = Items::filled_up(&items, extent(13), &gpu.device)?;
                of_step.add(&there, &filled_up, &parts, 2.0)?;
                gpu.within(0.0, &filled_up.to_device(&Device::Cpu)?, &found.to_device(&Device::Cpu)?)?;
            }
            Ok(())
        })
    }

    fn drawn(gpu: &judge::Gpu, shape: (usize, usize), seed: u64) -> Result<Tensor> {
        gpu.put(gpu.random(shape, seed)?.as_tensor())
    }

    /// A case of `a_product_of_few_rows_adds_adapters`: the product's shape, and the ranks of three adapters.
    struct Case {
        rows: usize,
        columns: [usize; 3],
        k: usize,
        ranks: [usize; 3],
    }

    /// 4-bit and bf16 weights, tiles of each number of rows, ranks from 1 to 256; rows without an adapter, with one and
    /// with three; an adapter without a pair for one layer.
    #[test]
    fn a_product_of_few_rows_adds_adapters() -> Result<()> {
        judge::on_gpu(|gpu| {
            for (rows, columns, k, ranks) in [
                (1, [40, 16, 7], 96, [16, 16, 16]),
                (6, [33, 8, 48], 64, [8, 3, 16]),
                (12, [20, 40, 1], 160, [1, 64, 24]),
                (20, [16, 70, 32], 32, [256, 5, 16]),
                (40, [48, 3, 9], 288, [16, 8, 129]),
            ] {
                for kind in 0..2 {
                    product_with_adapters(gpu, &Case { rows, columns, k, ranks }, kind)?;
                }
            }
            Ok(())
        })
    }

    fn product_with_adapters(gpu: &judge::Gpu, case: &Case, kind: usize) -> Result<()> {
        let &Case { rows, columns, k, ranks } = case;
        let mut weights = Vec::new();
        for (site, n) in columns.into_iter().enumerate() {
            let values = gpu.random((n, k), 50 + site as u64)?.as_tensor().clone();
            let floats = values.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            weights.push(match kind {
                0 => Weight::FourBit(
                    FourBit::quantize(&floats, n, k, Code::Nf4, true)?.to_device(&gpu.device)?,
                ),
                _ => Weight::Dense(gpu.put_as(DType::BF16, &values)?),
            });
        }
        let mut pairs = Vec::new();
        for (adapter, rank) in ranks.into_iter().enumerate() {
            for (site, n) in columns.into_iter().enumerate() {
                let seed = (10 * adapter + site) as u64;
                pairs.push((drawn(gpu, (rank, k), seed)?, drawn(gpu, (n, rank), seed + 100)?));
            }
        }
        let has = |adapter: usize, site: usize| adapter != 1 || site != 2;
        let table_of = |adapter: usize| {
            let matrices = |site: usize| {
                let (a, b) = &pairs[3 * adapter + site];
                has(adapter, site).then_some(Matrices { a, b, scale: 0.5 })
            };
            table((0..3).map(matrices), &gpu.device)
        };
        let tables = (0..3).map(table_of).collect::<Result<Vec<_>>>()?;
        // Every third row has no adapter, every third one has one, the others have three.
        let of_row = |row: usize| -> Vec<(usize, f64)> {
            match row % 3 {
                0 if row > 0 => Vec::new(),
                2 => vec![(2, 0.3), (0, -1.0), (1, 0.25)],
                _ => vec![(row % 2, 1.0)],
            }
        };
        let items = |of: std::ops::Range<usize>| {
            let item = |row: usize, &(adapter, strength): &(usize, f64)| Item {
                row,
                table: &tables[adapter],
                strength,
            };
            let list: Vec<Item> = of
                .clone()
                .flat_map(|row| of_row(row).iter().map(|own| item(row - of.start, own)).collect::<Vec<_>>())
                .collect();
            let rank = ranks.into_iter().max().expect("three");
            let extent = Extent { rows: of.len(), rank, sites: vec![true; 3] };
            // A row without adapters has a list that is only filled up.
            Items::of(&list, extent, true, list.len().max(1), &gpu.device)
        };
        let width = columns.iter().sum::<usize>() + 3;
        let (x, y) = (drawn(gpu, (rows, k), 1)?, drawn(gpu, (rows, width), 2)?);
        let weights: Vec<&Weight> = weights.iter().collect();
        let product = |of: std::ops::Range<usize>, adapted: bool| -> Result<Option<Tensor>> {
            // Tensors of their own, which begin at multiples of 16 bytes.
            let own = |all: &Tensor| all.narrow(0, of.start, of.len())?.force_contiguous();
            let (x, y) = (own(&x)?, own(&y)?);
            let items = items(of)?;
            let low = || if adapted { items.low(&x, &[0, 1, 2], 2.0) } else { Ok(None) };
            let done = few_rows(&x, &weights, 2.0, &y, 1, Some(&y), low)?;
            done.then(|| y.to_device(&Device::Cpu)).transpose()
        };
        let (Some(found), Some(bare)) = (product(0..rows, true)?, product(0..rows, false)?) else {
            assert_eq!(gpu.dtype, DType::F32, "a kernel for bf16");
            return Ok(());
        };
        // The product by itself, then the adapters' part.
        let apart = gpu.put(&bare)?;
        let mut at = 1;
        let parts = [0, 1, 2].map(|site| {
            let part = Part { site, at, columns: columns[site] };
            at += columns[site];
            part
        });
        items(0..rows)?.add(&x, &apart, &parts, 2.0)?;
        gpu.same(&found, &apart.to_device(&Device::Cpu)?.to_dtype(DType::F64)?)?;
        for row in 0..rows {
            let own = found.narrow(0, row, 1)?.copy()?;
            gpu.within(0.0, &product(row..row + 1, true)?.expect("a kernel"), &own)?;
            if of_row(row).is_empty() {
                gpu.within(0.0, &bare.narrow(0, row, 1)?.copy()?, &own)?;
            }
        }
        Ok(())
    }

    /// Rows of one adapter that share the values that are read of A, in groups that end within a block of items; wide
    /// layers.
    #[test]
    fn rows_that_share_an_adapter_have_the_bits_of_one_alone() -> Result<()> {
        judge::on_gpu(|gpu| {
            for (k, rank) in [(9, 3), (4104, 16), (16_392, 5)] {
                let pair = |seed: u64| -> Result<(Tensor, Tensor)> {
                    Ok((drawn(gpu, (rank, k), seed)?, drawn(gpu, (8, rank), seed + 1)?))
                };
                let pairs: Vec<(Tensor, Tensor)> = [3, 5].into_iter().map(pair).collect::<Result<_>>()?;
                let of =
                    |(a, b): &(Tensor, Tensor)| table([Some(Matrices { a, b, scale: 1.0 })], &gpu.device);
                let tables = pairs.iter().map(of).collect::<Result<Vec<_>>>()?;
                let (x, y) = (drawn(gpu, (11, k), 1)?, drawn(gpu, (11, 8), 2)?);
                let item = |row: usize, of: usize| Item { row, table: &tables[of], strength: 1.0 };
                // Rows that do not ascend: 4 and 6 of one adapter, then one that has both.
                let rows = [
                    (0, 0),
                    (2, 0),
                    (4, 0),
                    (6, 0),
                    (8, 0),
                    (10, 0),
                    (1, 1),
                    (3, 1),
                    (5, 1),
                    (7, 1),
                    (9, 0),
                    (9, 1),
                ];
                let added = |rows: &[(usize, usize)]| -> Result<Tensor> {
                    let y = y.copy()?;
                    let list: Vec<Item> = rows.iter().map(|&(row, of)| item(row, of)).collect();
                    let extent = Extent { rows: 11, rank, sites: vec![true] };
                    let part = [Part { site: 0, at: 0, columns: 8 }];
                    Items::filled_up(&list, extent, &gpu.device)?.add(&x, &y, &part, 1.0)?;
                    y.to_device(&Device::Cpu)
                };
                let found = added(&rows)?;
                for row in 0..11 {
                    let own: Vec<(usize, usize)> = rows.into_iter().filter(|(at, _)| *at == row).collect();
                    gpu.within(
                        0.0,
                        &added(&own)?.narrow(0, row, 1)?.copy()?,
                        &found.narrow(0, row, 1)?.copy()?,
                    )?;
                }
            }
            Ok(())
        })
    }

    /// Norms and activations by the launch that makes `x A^T`, too: the bits of one after the other.
    #[test]
    fn a_launch_makes_the_layers_input_and_its_low_ranks() -> Result<()> {
        judge::on_gpu(|gpu| {
            for (rows, k, rank) in [(1, 64, 16), (5, 584, 8), (7, 4104, 24), (3, 8200, 16)] {
                let (a, b) = (drawn(gpu, (rank, k), 3)?, drawn(gpu, (40, rank), 4)?);
                let pair = |scale| Some(Matrices { a: &a, b: &b, scale });
                let table = table([pair(0.5), None, pair(2.0)], &gpu.device)?;
                let list: Vec<Item> =
                    (0..rows).step_by(2).map(|row| Item { row, table: &table, strength: 0.5 }).collect();
                let extent = Extent { rows, rank, sites: vec![true, false, true] };
                let items = Items::filled_up(&list, extent, &gpu.device)?;
                let check = |source: &Source, expected: &Tensor| -> Result<()> {
                    assert!(items.make(source, &[1], 1.0)?.is_none(), "no adapter reaches the layer");
                    let found = items.make(source, &[0, 1, 2], 1.5)?;
                    assert_eq!(found.is_some(), gpu.dtype == DType::BF16);
                    let Some((x, low)) = found else { return Ok(()) };
                    gpu.within(0.0, &x, &expected.to_device(&Device::Cpu)?)?;
                    let parts = [0, 1, 2].map(|site| Part { site, at: 40 * site, columns: 40 });
                    let y = drawn(gpu, (rows, 120), 5)?;
                    let apart = y.copy()?;
                    low.expand(&y, &parts)?;
                    items.add(expected, &apart, &parts, 1.5)?;
                    gpu.within(0.0, &y, &apart.to_device(&Device::Cpu)?)
                };
                let x = drawn(gpu, (rows, k), 1)?;
                let weight = gpu.put_as(DType::F32, gpu.random(k, 2)?.as_tensor())?;
                let source = Source::Norm { x: &x, weight: &weight, eps: 1e-5 };
                check(&source, &rms_norm::forward(&x, &weight, 1e-5)?)?;
                for function in [Function::Silu, Function::GeluTanh, Function::GeluErf] {
                    for gated in [true, false] {
                        let activation = Activation { function, gated };
                        let x = drawn(gpu, (rows, if gated { 2 * k } else { k }), 6)?;
                        let expected = activation::forward(&x, activation)?;
                        check(&Source::Activation { x: &x, activation }, &expected)?;
                    }
                }
            }
            Ok(())
        })
    }
}
