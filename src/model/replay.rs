//! The graphs of steps over one cache, and the memory that all of them read and write.

use candle_core::{DType, Device, Result, Tensor, TensorId};

use crate::facts::Facts;
use crate::ops::cuda::graph::Graphs;
use crate::ops::cuda::inputs::{Inputs, Shape};
use crate::ops::cuda::late::Words;
use crate::ops::unwritten;

use super::filled;

/// The graphs of a decoder and a cache, and the memory that all of them read and write.
pub struct Replay {
    /// The decoder's embedding: graphs hold the addresses of its weights.
    pub(super) of: TensorId,
    pub(super) inputs: Inputs,
    pub(super) graphs: Graphs<Shape>,
    pub(super) logits: Tensor,
    pub(super) tokens: Tensor,
    /// The tokens on the host.
    pub(super) brought: Words,
}

impl Replay {
    /// Returns an empty list of graphs for the decoder with this embedding, whose activations have type `dtype`, and
    /// for at most `sequences` sequences.
    pub(super) fn new(
        facts: &Facts,
        embedding: TensorId,
        dtype: DType,
        device: &Device,
        sequences: usize,
    ) -> Result<Replay> {
        let rows = filled::rows_max(sequences);
        Ok(Replay {
            of: embedding,
            inputs: Inputs::new(device, dtype, filled::input_bytes(facts, rows))?,
            // A step is done once more with its own tensors before its graph is there.
            graphs: Graphs::new(filled::GRAPHS_BYTES - filled::KEPT_BYTES).of_kernels(filled::KEPT_BYTES),
            logits: unwritten((rows, facts.vocab), DType::F32, device)?,
            tokens: unwritten(rows, DType::U32, device)?,
            brought: Words::new(device.as_cuda_device()?, rows)?,
        })
    }

    /// Returns the number of graphs, and bytes of device memory that they took.
    pub fn size(&self) -> (usize, u64) {
        self.graphs.size()
    }

    /// Returns the reason why the driver refused a graph, if it did.
    pub fn refusal(&self) -> Option<&str> {
        self.graphs.refusal()
    }
}
