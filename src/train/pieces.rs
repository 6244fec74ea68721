//! The gradient of a step -> pieces, each of which the ranks add up as soon as its layers have computed it.
//!
//! The backward pass goes from the last layer to the first, and the flat buffer holds one layer after the other. So
//! pieces are cut from its end, and the sum of a piece runs while lower layers compute. The rest, at the beginning, is
//! summed when all ranks have reported that their passes succeeded. All ranks cut the same pieces and sum them in the
//! same order: one with fewer passes, or one that fails, sums the gradients that it has.

use std::ops::Range;

use candle_core::Tensor;

use crate::facts::sites::Site;
use crate::fault::{Fault, Result};
use crate::memory::cost::GRADIENT_PIECES as PIECES;
use crate::model::lora::{LOSSES, Trainable};
use crate::ranks::Collective;

/// Fewer values are not worth a sum of their own.
const VALUES_MIN: usize = 256;
/// A piece begins at a multiple of 16 bytes.
const ALIGNMENT: usize = 4;

/// A part of the buffer of sums, and the lowest layer that it belongs to.
#[derive(Clone, Debug, PartialEq)]
struct Piece {
    layer: usize,
    values: Range<usize>,
}

/// The pieces of a gradient.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Cut {
    /// The pieces, from the end of the buffer down.
    pieces: Vec<Piece>,
    /// Values at the beginning of the buffer that no piece has: the losses, and the gradients of the lowest layers.
    rest: usize,
}

impl Cut {
    /// Cuts the gradient of these sites.
    pub fn of(sites: &[Site]) -> Cut {
        // Trained rows of tokens stand before the sites. Their gradients are known last.
        let values = end_of(sites);
        let least = (values / PIECES).max(VALUES_MIN);
        let (mut pieces, mut end) = (Vec::new(), LOSSES + values);
        // Every site but the first may be the lowest of a piece, if the one before it belongs to a lower layer.
        for pair in sites.windows(2).rev() {
            let begin = (LOSSES + pair[1].offset).next_multiple_of(ALIGNMENT);
            if pair[0].layer < pair[1].layer && begin + least <= end {
                pieces.push(Piece { layer: pair[1].layer, values: begin..end });
                end = begin;
            }
        }
        Cut { pieces, rest: end }
    }

    /// Returns a cut with one sum of everything, made when all passes are done.
    pub fn whole(sites: &[Site]) -> Cut {
        Cut { pieces: Vec::new(), rest: LOSSES + end_of(sites) }
    }

    /// Returns the rest, which is summed after all pieces.
    pub fn rest(&self, adapter: &Trainable) -> Result<Tensor> {
        Ok(adapter.sums.narrow(0, 0, self.rest)?)
    }
}

/// Returns the end of the last site's gradients in the flat buffer.
fn end_of(sites: &[Site]) -> usize {
    sites.last().map_or(0, |site| site.offset + site.parameters())
}

/// The sums of one step's pieces. Every rank makes all of them, even if its passes fail.
pub(super) struct Sums<'a> {
    ranks: &'a dyn Collective,
    adapter: &'a Trainable,
    pieces: std::slice::Iter<'a, Piece>,
    fault: Option<Fault>,
}

impl<'a> Sums<'a> {
    /// Returns the pieces of a step that begins.
    pub fn new(ranks: &'a dyn Collective, adapter: &'a Trainable, cut: &'a Cut) -> Sums<'a> {
        Sums { ranks, adapter, pieces: cut.pieces.iter(), fault: None }
    }

    /// Begins the sums of pieces whose gradients are complete, now that the last pass has added those of `layer` and of
    /// all layers above it.
    pub fn done(&mut self, layer: usize) -> candle_core::Result<()> {
        while self.pieces.as_slice().first().is_some_and(|piece| piece.layer >= layer) {
            if let Err(fault) = self.next() {
                let message = fault.message.clone();
                self.fault = Some(fault);
                return Err(candle_core::Error::Msg(message));
            }
        }
        Ok(())
    }

    /// Begins the remaining sums, and waits for all of them. The passes are over, or have failed.
    pub fn finish(mut self) -> Result<()> {
        while self.fault.is_none() && !self.pieces.as_slice().is_empty() {
            self.fault = self.next().err();
        }
        let ended = self.ranks.summed();
        self.fault.map_or(ended, Err)
    }

    fn next(&mut self) -> Result<()> {
        let Some(piece) = self.pieces.next() else { return Ok(()) };
        self.ranks.begin_sum(&self.adapter.sums.narrow(0, piece.values.start, piece.values.len())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::{LoraOptions, shapes, sites};

    fn cut(options: LoraOptions) -> (Vec<Site>, Cut) {
        let facts = shapes::facts("llama3.1-8b").unwrap();
        let sites = sites::sites(&facts, &options).unwrap().list;
        let cut = Cut::of(&sites);
        (sites, cut)
    }

    /// Each value is in one piece, a piece has whole layers, and none is much larger than the others.
    #[test]
    fn pieces_are_whole_layers_from_the_end() {
        for options in [
            LoraOptions { r: 16, ..LoraOptions::default() },
            LoraOptions { r: 3, layers: vec![3, 4, 9, 31], ..LoraOptions::default() },
        ] {
            let (sites, cut) = cut(options);
            let total = LOSSES + sites.iter().map(Site::parameters).sum::<usize>();
            let mut end = total;
            for Piece { layer, values } in &cut.pieces {
                assert_eq!(values.end, end);
                assert!(values.start % ALIGNMENT == 0 && values.len() >= total / PIECES - LOSSES);
                for site in &sites {
                    let inside = LOSSES + site.offset + ALIGNMENT > values.start;
                    assert_eq!(site.layer >= *layer, inside, "layer {} at {}", site.layer, site.offset);
                }
                end = values.start;
            }
            assert_eq!(end, cut.rest);
            assert!((3..=PIECES).contains(&cut.pieces.len()), "{} pieces", cut.pieces.len());
            assert!(cut.rest <= total / 2, "{} of {total} are summed at the end", cut.rest);
        }
    }

    #[test]
    fn one_layer_is_summed_at_the_end() {
        let (sites, cut) = cut(LoraOptions { layers: vec![5], ..LoraOptions::default() });
        assert_eq!(cut, Cut::whole(&sites));
    }
}
