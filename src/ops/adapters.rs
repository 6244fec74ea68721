//! Adds several adapters to the rows of a step, on a GPU: `y[row] += sum of strength * scale * (x[row] A^T)
//! B^T`.
//!
//! Each row has adapters and strengths of its own; two launches serve all of them and up to three layers that read
//! the same x. Sums are f32 and in the order of a row's items, whatever other rows have.

use candle_core::{DType, Device, Result, Tensor};

use super::cuda::{self, Launch};
use super::unwritten;

/// Layers of one launch.
const PARTS: usize = 3;
const THREADS: usize = 256;
/// Items or rows of one launch.
const GRID_MAX: usize = 65_535;

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
    /// Its first column in y.
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
    /// Factor on what the adapter adds.
    pub strength: f64,
}

/// The items of a step, on the device.
#[derive(Debug)]
pub struct Items {
    /// `[4 n]`: address of the table (two numbers), row, strength.
    items: Tensor,
    /// `[3 m]`: row, its first item, how many.
    rows: Tensor,
    rank_max: usize,
    /// The tables are not freed before the launches are asked for.
    _tables: Vec<Tensor>,
}

/// The addresses of an adapter's matrices, eight numbers a layer behind the layers' number. The matrices must live as
/// long as the table is used.
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

impl Items {
    /// Items of one row lie together, in the order in which they are added. `rank_max` is the largest rank of any
    /// of their adapters.
    pub fn new(list: &[Item], rank_max: usize, device: &Device) -> Result<Items> {
        Items::filled_up(list, rank_max, None, device)
    }

    /// The same for a step of so many rows, with lists that are filled up to few different lengths: steps with other
    /// adapters ask for the same launches.
    pub fn filled_up(
        list: &[Item],
        rank_max: usize,
        step_rows: Option<usize>,
        device: &Device,
    ) -> Result<Items> {
        let (mut items, mut rows) = (Vec::new(), Vec::<[u32; 3]>::new());
        for (number, Item { row, table, strength }) in list.iter().enumerate() {
            let address = cuda::address(table, 0)?;
            items.extend([address as u32, (address >> 32) as u32, *row as u32, (*strength as f32).to_bits()]);
            match rows.last_mut().filter(|last| last[0] == *row as u32) {
                Some(last) => last[2] += 1,
                None => rows.push([*row as u32, number as u32, 1]),
            }
        }
        let mut rank_max = rank_max;
        if let Some(step_rows) = step_rows {
            rank_max = rank_max.next_multiple_of(8);
            items.resize(4 * list.len().next_power_of_two(), 0);
            rows.resize(step_rows, [0; 3]);
            cuda::inputs::depends_on(rank_max);
        }
        let tables = list.iter().map(|item| item.table.clone()).collect();
        let (items, rows) = (cuda::upload(&items, device)?, cuda::upload(rows.as_flattened(), device)?);
        Ok(Items { items, rows, rank_max, _tables: tables })
    }

    /// Adds what the items make of x [T, K] to the columns of each part in y [T, any], times `factor`.
    pub fn add(&self, x: &Tensor, y: &Tensor, parts: &[Part], factor: f64) -> Result<()> {
        let ((_, k), (_, stride), count) = (x.dims2()?, y.dims2()?, self.items.elem_count() / 4);
        assert!(count <= GRID_MAX, "{count} adapters on rows: a launch takes {GRID_MAX}");
        for parts in parts.chunks(PARTS) {
            let low = unwritten((parts.len(), count, self.rank_max), DType::F32, x.device())?;
            let launch = Launch::new(x, "adapters", "shrink")?.tensor(x).of(DType::U32, &self.items);
            let launch =
                numbers(launch.of(DType::F32, &low).int(k).int(self.rank_max), parts, |part| part.site);
            launch.launch((self.rank_max.div_ceil(THREADS / 32), count, parts.len()), THREADS, 0)?;
            let launch =
                Launch::new(x, "adapters", "expand")?.of(DType::F32, &low).of(DType::U32, &self.items);
            let launch =
                launch.of(DType::U32, &self.rows).tensor(y).int(stride).int(count).int(self.rank_max);
            let widest = parts.iter().map(|part| part.columns).max().unwrap_or(0);
            let grid = (widest.div_ceil(THREADS), self.rows.elem_count() / 3, parts.len());
            let launch = numbers(launch.float(factor), parts, |part| part.site);
            let launch = numbers(numbers(launch, parts, |part| part.at), parts, |part| part.columns);
            launch.launch(grid, THREADS, 0)?;
        }
        Ok(())
    }
}

/// A number of each part, and zeros for what is missing to a launch's parts.
fn numbers<'a>(launch: Launch<'a>, parts: &[Part], of: fn(&Part) -> usize) -> Launch<'a> {
    (0..PARTS).fold(launch, |launch, i| launch.int(parts.get(i).map_or(0, of)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::judge;

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
                let found = gpu.put(&y)?;
                let there = gpu.put(&x)?;
                Items::new(&items, 16, &gpu.device)?.add(&there, &found, &parts, 2.0)?;
                gpu.same(&found, &Tensor::cat(&rows, 0)?)?;
                let alone = gpu.put(&y)?;
                Items::new(&items[1..4], 16, &gpu.device)?.add(&there, &alone, &parts, 2.0)?;
                let row = |y: &Tensor| y.narrow(0, 2, 1)?.copy()?.to_device(&Device::Cpu);
                gpu.within(0.0, &row(&alone)?, &row(&found)?)?;
                // Items that fill lists up add nothing.
                let filled_up = gpu.put(&y)?;
                let of_step = Items::filled_up(&items, 13, Some(6), &gpu.device)?;
                of_step.add(&there, &filled_up, &parts, 2.0)?;
                gpu.within(0.0, &filled_up.to_device(&Device::Cpu)?, &found.to_device(&Device::Cpu)?)?;
            }
            Ok(())
        })
    }
}
