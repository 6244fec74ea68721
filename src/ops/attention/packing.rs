//! The rows of each example of a batch. For GPUs also the lists of tiles that blocks work on, made
//! once per batch.

use std::ops::Range;

/// The examples of a batch, one after the other; together they cover all of its rows. All layers share one
/// `Packing`.
#[derive(Debug, Default)]
pub struct Packing {
    examples: Vec<Range<usize>>,
    /// Examples that the lists of tiles have room for; 0: they have the tiles of these examples alone.
    #[cfg(feature = "cuda")]
    room: usize,
    #[cfg(feature = "cuda")]
    tiles: std::sync::Mutex<std::collections::HashMap<(usize, Order), candle_core::Tensor>>,
}

/// The order of tiles. Tiles with the most work start first, because a late start would leave the other processors
/// waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Order {
    /// Tiles of query rows. A later row of an example attends to more keys.
    Queries,
    /// Tiles of key rows. More rows attend to an earlier key of an example.
    Keys,
}

impl Packing {
    /// Makes a packing; the examples must follow each other without a gap.
    pub fn new(examples: Vec<Range<usize>>) -> Packing {
        Packing {
            examples,
            #[cfg(feature = "cuda")]
            room: 0,
            #[cfg(feature = "cuda")]
            tiles: Default::default(),
        }
    }

    /// Returns the same, with lists of tiles on a GPU as long as any packing of as many rows and of up to `examples`
    /// examples needs.
    pub fn with_room_for(self, examples: usize) -> Packing {
        assert!(examples >= self.examples.len(), "room for {examples} of {}", self.examples.len());
        Packing {
            #[cfg(feature = "cuda")]
            room: examples,
            ..self
        }
    }

    /// Returns the rows of each example.
    pub fn examples(&self) -> &[Range<usize>] {
        &self.examples
    }

    /// Returns the tiles of `rows` rows counted from the start of their example, those with the most work first: (start
    /// of the example, end of the example, first row of the tile).
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

    /// Returns the number of tiles of a list on a device.
    #[cfg(feature = "cuda")]
    pub fn tiles_count(&self, rows: usize) -> usize {
        match self.room {
            0 => self.examples.iter().map(|example| example.len().div_ceil(rows)).sum(),
            room => self.examples.last().map_or(0, |last| last.end) / rows + room,
        }
    }

    /// Returns the same tiles on a device, [3 n]; they are copied there on the first call. Tiles that fill the list up
    /// are zeros.
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
        let mut tiles = self.tiles(rows, order);
        tiles.resize(self.tiles_count(rows), [0; 3]);
        let tiles = crate::ops::cuda::upload(tiles.as_flattened(), device)?;
        kept.insert((rows, order), tiles.clone());
        Ok(tiles)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(feature = "cuda")]
    #[test]
    fn lists_with_room_hold_the_tiles_of_every_packing() {
        for lengths in [&[256][..], &[1, 1, 1, 253], &[65, 65, 65, 61], &[129, 127]] {
            let mut from = 0;
            let examples = lengths.iter().map(|length| {
                from += length;
                from - length..from
            });
            let packing = Packing::new(examples.collect()).with_room_for(4);
            assert_eq!(packing.tiles_count(64), 8);
            assert!(packing.tiles(64, Order::Keys).len() <= 8, "{lengths:?}");
        }
    }

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
