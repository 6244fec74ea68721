//! Where each example of a batch lies among its rows; and, once a batch, the lists of tiles that GPU blocks take.

use std::ops::Range;

/// The examples of a batch, one behind the other, together all of its rows. Every layer shares one.
#[derive(Debug, Default)]
pub struct Packing {
    examples: Vec<Range<usize>>,
    #[cfg(feature = "cuda")]
    tiles: std::sync::Mutex<std::collections::HashMap<(usize, Order), candle_core::Tensor>>,
}

/// Which work is the longest, and so begins first: a late start of it would leave the other processors waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Order {
    /// Tiles are of query rows: the later in its example, the more keys a row sees.
    Queries,
    /// Tiles are of key rows: the earlier in its example, the more rows see a key.
    Keys,
}

impl Packing {
    pub fn new(examples: Vec<Range<usize>>) -> Packing {
        Packing {
            examples,
            #[cfg(feature = "cuda")]
            tiles: Default::default(),
        }
    }

    /// Rows of each example.
    pub fn examples(&self) -> &[Range<usize>] {
        &self.examples
    }

    /// Tiles of `rows` rows counted from their example's beginning: (beginning and end of the example, first row of the tile).
    pub fn tiles(&self, rows: usize, order: Order) -> Vec<[u32; 3]> {
        let tiles = |example: &Range<usize>| {
            let (from, to) = (example.start as u32, example.end as u32);
            example.clone().step_by(rows).map(move |first| [from, to, first as u32])
        };
        let mut tiles: Vec<_> = self.examples.iter().flat_map(tiles).collect();
        tiles.sort_by_key(|&[from, to, first]| {
            std::cmp::Reverse(match order {
                Order::Queries => first - from,
                Order::Keys => to - first,
            })
        });
        tiles
    }

    /// The same on a device, `[3 n]`, copied there when first asked for.
    #[cfg(feature = "cuda")]
    pub fn tiles_on(
        &self,
        device: &candle_core::Device,
        rows: usize,
        order: Order,
    ) -> candle_core::Result<candle_core::Tensor> {
        let mut kept = self.tiles.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(tiles) = kept.get(&(rows, order)) {
            return Ok(tiles.clone());
        }
        let tiles = crate::ops::cuda::upload(self.tiles(rows, order).as_flattened(), device)?;
        kept.insert((rows, order), tiles.clone());
        Ok(tiles)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_every_row_once_and_the_longest_work_comes_first() {
        let packing = Packing::new(vec![0..130, 130..131, 131..259]);
        let queries = packing.tiles(64, Order::Queries);
        assert_eq!(queries[..2], [[0, 130, 128], [0, 130, 64]]);
        assert_eq!(queries.len(), 6);
        let mut keys = packing.tiles(64, Order::Keys);
        assert_eq!(keys[..2], [[0, 130, 0], [131, 259, 131]]);
        keys.sort();
        let firsts: Vec<u32> = keys.iter().map(|tile| tile[2]).collect();
        assert_eq!(firsts, [0, 64, 128, 130, 131, 195]);
    }
}
