//! Rows that each generate one token -> logits and the tokens drawn from them on a GPU, by one launch of a graph.
//!
//! A decoder's step is hundreds of launches of a few microseconds each. Its launches depend on few numbers: how many
//! rows there are, and how long the lists of pages, of pieces of keys and of adapters are. These are filled up to few
//! different lengths, rows with a page that no sequence has. So few graphs serve all steps. Everything else (tokens,
//! positions, pages, adapters and strengths) is copied to fixed places. A row's bits are those of `Decoder::step`,
//! since they depend on its own sequence alone.

use candle_core::{DType, Result, Tensor};

use crate::ops::attention::cached::Segments;
use crate::ops::change::Change;
use crate::ops::cuda;
use crate::ops::draw::{self, Draw};
use crate::ops::matmul::FEW_ROWS;
use crate::ops::{cross_entropy, largest};

use super::cache::Cache;
use super::decoder::Decoder;
use super::filled;
use super::lora::{Lora, Mixture};
use super::pass::Step;
use super::replay::Replay;
use super::tokens::Wanted;

/// The result of a step whose rows each generate a token.
pub struct Decoded {
    /// [rows, V] in f32, until the next step.
    pub logits: Tensor,
    /// The token that was drawn for each row; `None` for a row without a finite logit.
    pub tokens: Vec<Option<u32>>,
}

impl Decoder {
    /// Does `step` for rows that each generate a token. `None` if a graph cannot hold this step; then nothing was done.
    /// `draws` says how each row's token is drawn; with `None`, all are the most probable ones. `sequences` is the
    /// largest number of rows that any step has.
    pub fn decode(
        &self,
        step: &Step,
        cache: &mut Cache,
        mixture: &Mixture,
        draws: Option<&[Draw]>,
        sequences: usize,
    ) -> Result<Option<Decoded>> {
        let device = &self.device;
        if !self.has_graph(step, mixture) {
            return Ok(None);
        }
        let Some(spare) = cache.spare else { return Ok(None) };
        let rows = step.ids.len();
        // In f32 the library of products chooses its order of sums by the number of rows.
        let filled_rows = if self.dtype == DType::BF16 { filled::rows(rows) } else { rows };
        self.make_replay(cache, sequences)?;
        let (layers, replay) = (&mut cache.layers, cache.replay.as_mut().expect("just made"));
        if filled_rows > replay.tokens.elem_count() {
            return Ok(None);
        }
        // The given mixture may hold tables of other lengths, so the graph's tables belong to a mixture of their own.
        let mixture = &mixture.again();
        mixture.make_tables(device)?;
        let step = step.filled_up(filled_rows, spare);
        let prepare = || {
            let segments = Segments::new(&step.segments);
            let windows = self.facts.layers.iter().map(|layer| layer.attention.heads.window);
            segments.send(windows, device)?;
            mixture.send(filled_rows, device)?;
            let draws = draws.map(|draws| {
                let fill_up = std::iter::repeat_n(Draw::GREEDY, filled_rows - rows);
                draw::send(&draws.iter().copied().chain(fill_up).collect::<Vec<_>>(), device)
            });
            Ok((self.send(&step)?, segments, draws.transpose()?))
        };
        let Replay { inputs, graphs, logits, tokens, brought, .. } = replay;
        let Some(((sent, segments, draws), shape)) = inputs.fill(prepare)? else { return Ok(None) };
        let (logits, tokens) = (logits.narrow(0, 0, filled_rows)?, tokens.narrow(0, 0, filled_rows)?);
        let head = self.head_with(&Lora::None, Wanted::All(filled_rows))?;
        let stores = std::cell::RefCell::new(layers);
        let compute = || {
            inputs.send()?;
            let lora = Lora::Mixed(mixture);
            let hidden = self.step_hidden(&step, &sent, &segments, &mut stores.borrow_mut(), lora)?;
            cross_entropy::write_logits_apart(&hidden, &head, self.precision, &logits)?;
            match &draws {
                None => largest::write(&logits, &tokens)?,
                Some(draws) => draw::write(&logits, draws, &tokens)?,
            }
            brought.send(&tokens)
        };
        graphs.run(&shape, device.as_cuda_device()?, compute)?;
        cuda::synchronize(device.as_cuda_device()?)?;
        let tokens = largest::found(&brought.read(rows));
        Ok(Some(Decoded { logits: logits.narrow(0, 0, rows)?, tokens }))
    }

    /// Makes room for graphs of this decoder over this cache, unless there is.
    fn make_replay(&self, cache: &mut Cache, sequences: usize) -> Result<()> {
        if cache.replay.as_ref().is_none_or(|replay| replay.of != self.embedding.id()) {
            cache.replay = None;
            let id = self.embedding.id();
            cache.replay = Some(Replay::new(&self.facts, id, self.dtype, &self.device, sequences)?);
        }
        Ok(())
    }

    /// Returns whether a step's launches depend on lengths of lists alone.
    fn has_graph(&self, step: &Step, mixture: &Mixture) -> bool {
        self.device.is_cuda()
            && Change::Graphs.is_on()
            && self.ring.is_none()
            && (1..=FEW_ROWS).contains(&step.ids.len())
            && step.is_decoding()
            && mixture.is_row_by_row()
    }
}
