//! A layer's attention with hand-written forward and backward passes: `x -> norm -> q k v -> (norm) -> rope ->
//! attention -> output (-> norm) + x`. `kept_values` says how much it keeps at each level.

use candle_core::{Result, Tensor};

use crate::facts::{Facts, Heads, Keep, Projection};
use crate::ops::attention;
use crate::ops::attention::cached::{self, Segments, Store};
use crate::ops::rope::{self, Direction};
use crate::ops::{rows, unwritten};

use super::inside::{rounded_in, spare_in};
use super::linear::{Linear, side_by_side, side_by_side_backward};
use super::lora::Low;
use super::norm::{self, Branch, HeadNorm, Norm, Normed};
use super::operand::Operand;
use super::pass::Pass;

/// One layer's attention with its norms.
#[derive(Clone, Debug)]
pub struct SelfAttention {
    /// Counts, widths and order of the heads.
    pub heads: Heads,
    /// Index of the pass's angles that rotate queries and keys. `None`: no positions.
    pub rope: Option<usize>,
    /// The norm before it.
    pub norm: Option<Norm>,
    /// One projection or three, whose outputs lie side by side in the columns of one matrix, in order.
    pub query_key_value: Vec<Linear>,
    /// Norms of queries and keys.
    pub head_norm: Option<HeadNorm>,
    /// The projection back to the residual stream.
    pub output: Linear,
    /// The norm after it.
    pub post_norm: Option<Norm>,
}

/// The tensors kept between forward and backward, as far as the level allows.
#[derive(Default)]
pub struct Kept {
    projected: Option<Projected>,
    attended: Option<Attended>,
}

/// `Kept` with nothing missing.
pub struct Whole {
    projected: Projected,
    attended: Attended,
}

/// Rotated queries, rotated keys, and values: the inputs of attention.
struct Projected {
    rotated: Tensor,
    /// Queries and keys before their norm, if they have one.
    raw: Option<Tensor>,
    /// The factors of the norm's rows, if `norm::forward_beside` gave them.
    scales: Option<Tensor>,
    lows: Vec<Low>,
}

/// Attention's output, and the residual stream after it.
struct Attended {
    output: Tensor,
    log_sum: Tensor,
    added: Branch,
}

impl Kept {
    /// Drops values that the level does not keep.
    pub fn reduce(&mut self, keep: Keep) {
        if keep >= Keep::AttentionOutput {
            self.projected = None;
        }
        if keep >= Keep::LayerInputs {
            self.attended = None;
        }
    }

    /// Returns the number of values held. It must equal the memory plan's count.
    #[cfg(test)]
    pub fn values(&self) -> usize {
        use super::norm::count;
        let projected = |kept: &Projected| {
            let lows = kept.lows.iter().map(count).sum::<usize>();
            kept.rotated.elem_count() + count(&kept.raw) + count(&kept.scales) + lows
        };
        let attended = |kept: &Attended| {
            kept.output.elem_count()
                + kept.log_sum.elem_count()
                + kept.added.sum.elem_count()
                + kept.added.values()
        };
        self.projected.as_ref().map_or(0, projected) + self.attended.as_ref().map_or(0, attended)
    }
}

impl From<Whole> for Kept {
    fn from(whole: Whole) -> Kept {
        Kept { projected: Some(whole.projected), attended: Some(whole.attended) }
    }
}

/// Returns the number of values per token that a layer's attention keeps at a level, including the residual stream
/// after it. `rank` gives the rank of a projection's pair, 0 if it has none.
pub fn kept_values(facts: &Facts, layer: usize, rank: impl Fn(&Projection) -> usize, keep: Keep) -> usize {
    let attention = &facts.layers[layer].attention;
    let (heads, fused) = (&attention.heads, &attention.query_key_value);
    let raw = if attention.head_norm.is_some() { (heads.query + heads.key) * heads.width } else { 0 };
    let projected = raw + fused.iter().map(|p| p.rows + rank(p)).sum::<usize>();
    // Attention's output, one logsumexp per head, and the residual stream after it.
    let attended = attention.output.cols + heads.query + facts.width + rank(&attention.output);
    let attended = attended + if facts.names.attention_post_norm.is_some() { facts.width } else { 0 };
    match keep {
        Keep::Everything | Keep::WithoutGateUp => projected + attended,
        Keep::AttentionOutput => attended,
        Keep::LayerInputs | Keep::HostInputs => 0,
    }
}

/// Returns the number of values per token of a step of running sequences in its widest moment: queries, keys, values,
/// and attention's output.
pub fn step_values(facts: &Facts, layer: usize) -> usize {
    let heads = &facts.layers[layer].attention.heads;
    heads.columns() + heads.query * heads.width
}

impl Whole {
    /// Returns the residual stream after attention.
    pub fn sum(&self) -> &Tensor {
        &self.attended.added.sum
    }
}

impl SelfAttention {
    /// Computes those tensors of the backward pass that were not kept. If nothing was kept, this is the forward
    /// pass.
    pub fn complete(&self, kept: Kept, x: &Tensor, pass: &Pass) -> Result<Whole> {
        let projected = match kept.projected {
            Some(projected) => projected,
            None => self.project(x, pass)?,
        };
        let attended = match kept.attended {
            Some(attended) => attended,
            None => self.attend(x, &projected.rotated, pass)?,
        };
        Ok(Whole { projected, attended })
    }

    fn project(&self, x: &Tensor, pass: &Pass) -> Result<Projected> {
        let projected = self.project_unturned(x, pass)?;
        self.rotate(&projected.rotated, pass, Direction::Forward)?;
        Ok(projected)
    }

    /// `project` before rope.
    fn project_unturned(&self, x: &Tensor, pass: &Pass) -> Result<Projected> {
        #[cfg(feature = "cuda")]
        if let Some(rotated) = super::made::side_by_side(&self.norm, x, &self.query_key_value, pass)? {
            let raw = self.head_norm.as_ref().map(|norm| norm.forward(&rotated, &self.heads)).transpose()?;
            return Ok(Projected { rotated, raw, scales: None, lows: Vec::new() });
        }
        let rounded = rounded_in(&self.query_key_value, x.dim(0)?, x.device(), pass);
        let (normed, scales) = norm::forward_beside(&self.norm, x, self.projected_spare(x, pass)?, rounded)?;
        let (rotated, lows) = side_by_side(&self.query_key_value, &normed, pass)?;
        let raw = match &self.head_norm {
            Some(norm) => Some(norm.forward(&rotated, &self.heads)?),
            None => None,
        };
        Ok(Projected { rotated, raw, scales, lows })
    }

    fn attend(&self, x: &Tensor, rotated: &Tensor, pass: &Pass) -> Result<Attended> {
        let spare = self.output.spare(x.dim(0)?, x.device(), pass);
        let (output, log_sum) =
            attention::forward_beside(rotated, &self.heads, pass.packing, pass.precision, spare)?;
        // A row's heads are computed by many blocks, so that a product in 8 bits rounds it in a pass of its own.
        let output = Operand::from(output);
        let added = norm::join(&self.output, &self.post_norm, &output, x, pass)?;
        Ok(Attended { output: output.values, log_sum, added })
    }

    /// Returns the residual stream after attention for new rows of running sequences. Their keys and values stay in
    /// `store`.
    pub fn step(&self, x: &Tensor, pass: &Pass, segments: &Segments, store: &mut Store) -> Result<Tensor> {
        let Projected { rotated, .. } = self.project_unturned(x, pass)?;
        match pass.growth.filter(|_| self.rope.is_some()) {
            None => {
                let angles = self.rope.map(|rope| &pass.angles[rope]);
                store.turn_and_write(&rotated, &self.heads, segments, angles)?;
            }
            Some(_) => {
                self.rotate(&rotated, pass, Direction::Forward)?;
                store.write(&rotated, &self.heads, segments)?;
            }
        }
        let output = cached::forward(&rotated, &self.heads, store, segments, pass.precision)?;
        Ok(norm::join(&self.output, &self.post_norm, &output.into(), x, pass)?.sum)
    }

    /// `d` is the gradient of the residual stream after attention. Returns the gradient of the input of the query,
    /// key and value projections, or `None` if nothing needs it (`lowest`).
    pub fn backward(
        &self,
        d: Operand,
        x: &Tensor,
        whole: Whole,
        lowest: bool,
        pass: &Pass,
    ) -> Result<Option<Tensor>> {
        let Whole { projected: Projected { rotated, raw, scales, lows }, attended } = whole;
        let (output, tokens) = (&attended.output, x.dim(0)?);
        let spare = self.output.spare(tokens, x.device(), pass);
        let rounded = rounded_in(std::slice::from_ref(&self.output), tokens, x.device(), pass);
        let d_branch = norm::through(&self.post_norm, &attended.added.branch, d, spare, rounded)?;
        let d_attended = unwritten((tokens, self.output.weight.dims().1), output.dtype(), output.device())?;
        let low = attended.added.low.as_ref();
        self.output.backward(&d_branch, output, low, Some(&d_attended), pass)?;
        // Rope turns several runs of heads as rows of their own, which leaves no room behind them.
        let (spare, in_runs) = (self.projected_spare(x, pass)?, self.heads.turning().0 > 1);
        let (beside, behind) = if in_runs { (0, spare) } else { (spare, 0) };
        let d_qkv = attention::backward_turned(
            &d_attended,
            &rotated,
            output,
            &attended.log_sum,
            &self.heads,
            pass.packing,
            self.rope.map(|rope| &pass.angles[rope]),
            pass.precision,
            beside,
        )?;
        drop((rotated, attended, d_attended, d_branch));
        self.grow(&d_qkv, pass, Direction::Backward)?;
        if let (Some(norm), Some(raw)) = (&self.head_norm, &raw) {
            norm.backward(&d_qkv, raw, &self.heads)?;
        }
        let d_qkv = rows::beside(&d_qkv, behind)?;
        let input = Normed { norm: &self.norm, x, scales: scales.as_ref() };
        // Their rows, too, are computed by many blocks.
        side_by_side_backward(&self.query_key_value, &d_qkv.into(), input, &lows, lowest, pass)
    }

    /// Returns the number of spare columns of the projections' input, and of the gradient of their outputs.
    fn projected_spare(&self, x: &Tensor, pass: &Pass) -> Result<usize> {
        Ok(spare_in(&self.query_key_value, x.dim(0)?, x.device(), pass))
    }

    /// Rotates queries and keys by their positions, in place.
    fn rotate(&self, qkv: &Tensor, pass: &Pass, direction: Direction) -> Result<()> {
        let Some(rope) = self.rope else { return Ok(()) };
        attention::turn(qkv, &self.heads, &pass.angles[rope], direction)?;
        self.grow(qkv, pass, direction)
    }

    /// Multiplies the queries by the factors of their rows, in place.
    fn grow(&self, qkv: &Tensor, pass: &Pass, direction: Direction) -> Result<()> {
        match pass.growth.filter(|_| self.rope.is_some()) {
            Some(growth) => rope::rotate(qkv, self.heads.query, self.heads.width, growth, direction),
            None => Ok(()),
        }
    }
}
