//! Training passes -> the same passes, on a GPU by one launch of a graph for each.
//!
//! A pass is hundreds of launches, and a short one is bound by the host that asks for them. They depend on the sizes of
//! the pass alone: `shape` fills batches up to few sizes, and everything that differs between passes of one shape is
//! copied to fixed places (`ops::cuda::inputs`). A shape is recorded at its second use. A pass has the same bits by its
//! graph and launch by launch.
//!
//! A graph cannot hold exchanges with the host within the pass: streamed and shared weights, inputs of layers that wait
//! on the host, and sums that other ranks begin between layers. DoRA's lengths outlive the pass that computes them, and
//! trained tokens have lists of their own; those passes go launch by launch too.

use candle_core::Result;

use crate::facts::Keep;
use crate::ops::change::Change;
use crate::ops::number::Number;

use super::batch::Batch;
use super::decoder::Decoder;
use super::lora::Trainable;

/// Rows of a pass up to which a graph saves more than sums of ranks that begin between its layers.
const SHORT_ROWS: usize = 1024;

/// The graphs of a training run.
#[derive(Default)]
pub struct Recorder {
    /// Bytes of device memory that graphs may take; 0: there are none.
    bytes_max: u64,
    /// The reason why there are no graphs any more, until it is reported.
    refusal: Option<String>,
    #[cfg(feature = "cuda")]
    recorded: Option<gpu::Recorded>,
}

/// The callback for each layer whose gradients are complete.
pub type Done<'a> = &'a mut dyn FnMut(usize) -> Result<()>;

/// A pass: a batch forwards and backwards through the decoder with its adapter.
#[derive(Clone, Copy)]
pub struct TrainingPass<'a> {
    /// The frozen base.
    pub decoder: &'a Decoder,
    /// The adapter, whose gradients grow by the pass.
    pub adapter: &'a Trainable,
    /// The amount that each layer keeps for the backward pass.
    pub keep: &'a [Keep],
    /// The examples of the pass.
    pub batch: &'a Batch,
    /// The factor of the loss and the gradients.
    pub scale: f64,
}

impl Recorder {
    /// Returns a recorder without graphs. Its graphs will take at most `bytes_max` bytes.
    pub fn new(bytes_max: u64) -> Recorder {
        Recorder { bytes_max, ..Recorder::default() }
    }

    /// Does `Decoder::forward_backward_by_layer`. On a GPU the batch is filled up to its shape. `done` is needed
    /// between layers only if it is there; short passes call it at their end.
    pub fn pass(&mut self, pass: TrainingPass, done: Option<Done>) -> Result<Number> {
        if !pass.decoder.device.is_cuda() || !Change::Steps.is_on() {
            return pass.plain(done);
        }
        let pass = TrainingPass { batch: &pass.batch.filled_up(), ..pass };
        let late = done.is_none() || pass.batch.rows() <= SHORT_ROWS;
        if self.bytes_max == 0 || !late || !pass.has_graph() {
            return pass.plain(done);
        }
        let loss = self.replayed(pass)?;
        if let Some(done) = done {
            pass.decoder.gradients_from(pass.adapter).rev().try_for_each(done)?;
        }
        Ok(loss)
    }

    /// Returns the reason why passes go launch by launch from now on, once.
    pub fn refusal(&mut self) -> Option<String> {
        self.refusal.take()
    }

    /// Releases the graphs and their memory permanently. Returns false if there were none.
    pub fn give_up(&mut self) -> bool {
        self.bytes_max = 0;
        #[cfg(feature = "cuda")]
        if let Some(recorded) = self.recorded.take() {
            return recorded.has_graphs();
        }
        false
    }

    /// Returns the number of graphs, and bytes of device memory that they took.
    pub fn size(&self) -> (usize, u64) {
        #[cfg(feature = "cuda")]
        if let Some(recorded) = &self.recorded {
            return recorded.size();
        }
        (0, 0)
    }
}

impl TrainingPass<'_> {
    /// Computes the pass launch by launch.
    fn plain(self, done: Option<Done>) -> Result<Number> {
        let TrainingPass { decoder, adapter, keep, batch, scale } = self;
        match done {
            Some(done) => decoder.forward_backward_by_layer(adapter, keep, batch, scale, done),
            None => decoder.forward_backward(adapter, keep, batch, scale),
        }
    }

    /// Returns whether the launches depend on the batch's shape alone.
    fn has_graph(self) -> bool {
        self.decoder.ring.is_none()
            && !self.keep.contains(&Keep::HostInputs)
            && !self.adapter.has_magnitudes()
            && self.adapter.tokens.is_empty()
    }
}

#[cfg(not(feature = "cuda"))]
impl Recorder {
    fn replayed(&mut self, pass: TrainingPass) -> Result<Number> {
        pass.plain(None)
    }
}

#[cfg(feature = "cuda")]
mod gpu {
    use candle_core::{DType, Tensor, TensorId, bail};

    use super::*;
    use crate::ops::cuda::graph::Graphs;
    use crate::ops::cuda::inputs::{self, Inputs, Shape};
    use crate::ops::{attention, cuda, unwritten};

    /// Page-locked memories that take turns: a pass's values are written while those of the passes before are copied.
    const TURNS: usize = 4;
    /// Bytes of each type that inputs begin with. They grow to the size that a pass needs.
    const BYTES: usize = 16 << 10;

    /// Graphs, and the memory that all of them read and write.
    pub struct Recorded {
        of: Of,
        device: candle_core::Device,
        inputs: Inputs,
        graphs: Graphs<Shape>,
        /// The loss of the last pass.
        loss: Tensor,
    }

    /// Tensors whose addresses the graphs hold, and settings that decide about their launches besides shapes.
    #[derive(PartialEq)]
    struct Of {
        weights: TensorId,
        params: TensorId,
        keep: Vec<Keep>,
    }

    impl Recorded {
        fn new(of: Of, decoder: &Decoder, bytes_max: u64) -> Result<Recorded> {
            let device = decoder.device.clone();
            let types = [DType::U32, DType::F32, DType::I64, decoder.dtype];
            Ok(Recorded {
                of,
                inputs: Inputs::of(&device, &types.map(|dtype| (dtype, BYTES)), TURNS)?,
                graphs: Graphs::new(bytes_max),
                loss: unwritten(1, DType::F64, &device)?,
                device,
            })
        }

        /// Returns whether there is a graph.
        pub fn has_graphs(&self) -> bool {
            !self.graphs.is_empty()
        }

        /// Returns the number of graphs, and bytes of device memory that they took.
        pub fn size(&self) -> (usize, u64) {
            self.graphs.size()
        }

        fn pass(&mut self, pass: TrainingPass) -> Result<Number> {
            let TrainingPass { decoder, adapter, keep, batch, scale } = pass;
            let ((embedded, prepared), shape) = loop {
                let prepare = || {
                    for number in [batch.label_smoothing, batch.noise].map(f64::to_bits) {
                        inputs::depends_on(number as usize);
                    }
                    let (embedded, prepared) = decoder.prepare(batch, scale)?;
                    for layer in &decoder.facts.layers {
                        let heads = &layer.attention.heads;
                        attention::send(&prepared.packing, heads, decoder.dtype, &decoder.device)?;
                    }
                    Ok((embedded, prepared))
                };
                match self.inputs.fill(prepare)? {
                    Some(filled) => break filled,
                    None => self.grow()?,
                }
            };
            self.inputs.send_apart()?;
            let loss = &self.loss;
            let compute =
                || match decoder.forward_backward_prepared(adapter, keep, batch, (&embedded, &prepared))? {
                    Number::There(found) => cuda::copy(&found, loss),
                    Number::Here(_) => bail!("a loss on the host"),
                };
            self.graphs.run(&shape, self.device.as_cuda_device()?, compute)?;
            // The next pass has its loss in the same place.
            let own = unwritten(1, DType::F64, &self.device)?;
            cuda::copy(&self.loss, &own)?;
            Ok(Number::There(own))
        }

        /// Replaces the inputs by larger ones. The graphs are dropped, since they hold the addresses of the old ones.
        fn grow(&mut self) -> Result<()> {
            self.graphs.clear(self.device.as_cuda_device()?)?;
            self.inputs = Inputs::of(&self.device, &self.inputs.larger(), TURNS)?;
            Ok(())
        }
    }

    impl Drop for Recorded {
        /// Waits for the device, which may still work on the graphs that are dropped.
        fn drop(&mut self) {
            if let Ok(device) = self.device.as_cuda_device() {
                let _ = self.graphs.clear(device);
            }
        }
    }

    impl Recorder {
        pub(super) fn replayed(&mut self, pass: TrainingPass) -> Result<Number> {
            let TrainingPass { decoder, adapter, keep, .. } = pass;
            let of = Of { weights: decoder.embedding.id(), params: adapter.params.id(), keep: keep.to_vec() };
            if self.recorded.as_ref().is_none_or(|recorded| recorded.of != of) {
                self.recorded = None;
                self.recorded = Some(Recorded::new(of, decoder, self.bytes_max)?);
            }
            let recorded = self.recorded.as_mut().expect("just made");
            let loss = recorded.pass(pass);
            // Everything that was queued by it has its own memory.
            if let Some(refusal) = recorded.graphs.refusal().map(str::to_owned) {
                self.give_up();
                self.refusal = Some(refusal);
            }
            loss
        }
    }
}
