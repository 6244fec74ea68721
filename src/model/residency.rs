//! Layers whose 4-bit weights do not lie on the device: their bytes in host memory, or in pieces on the ranks -> two
//! buffers, one for the layer at work and one for the next.
//!
//! The weights of layer i are views of buffer i % 2, so that an operation sees a whole weight as always. A pass says
//! which layers it will compute, in order (`Tour`), and enters each before it computes. While a layer computes, the
//! other buffer is filled with the next one. A pass forward and backward turns at the last two layers, which are in
//! their buffers then. Only the second level of double-quantised scales stays on the device: 4 bytes for 16,384
//! values.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use candle_core::{DType, Device, Result, Tensor};

use crate::facts::Facts;
use crate::fault::{self, Fault};
use crate::ops::four_bit::{Absmax, FourBit};
use crate::ops::matmul::Weight;
use crate::ops::slab::{self, ALIGNMENT, Fills, Host};
use crate::ops::unwritten;
use crate::ranks::Collective;

use super::handover::{self, bytes, scales_of};
use super::layer::Layer;

/// The place of the layers' 4-bit weights.
#[derive(Clone, Default)]
pub enum Home {
    /// The weights lie on the device.
    #[default]
    Device,
    /// In host memory, page-locked for a GPU.
    Host,
    /// The weights lie in equal pieces on the devices of all ranks. All ranks must enter the same layers in the same
    /// order.
    Ranks(Arc<dyn Collective>),
}

impl Home {
    /// Returns whether every weight lies on the device all the time.
    pub fn is_device(&self) -> bool {
        match self {
            Home::Device => true,
            Home::Host => false,
            Home::Ranks(ranks) => ranks.place().world == 1,
        }
    }

    /// Returns whether several ranks hold pieces of each layer.
    pub fn is_shared(&self) -> bool {
        self.pieces() > 1
    }

    /// Returns the number of pieces of a layer, which is the number of ranks that share it.
    pub(super) fn pieces(&self) -> usize {
        match self {
            Home::Device | Home::Host => 1,
            Home::Ranks(ranks) => ranks.place().world,
        }
    }

    /// Returns whether this process reads a layer's 4-bit weights from the checkpoint. Ranks that share the base take
    /// turns.
    pub(super) fn reads(&self, layer: usize) -> bool {
        match self {
            Home::Device | Home::Host => true,
            Home::Ranks(ranks) => layer % ranks.place().world == ranks.place().rank,
        }
    }
}

/// Returns whether a GPU leaves the embedding in host memory if the layers' weights are not on the device: a pass needs
/// few of its rows. A tied head needs all of it on the device, and a factor is applied there.
pub fn embedding_stays_on_host(facts: &Facts) -> bool {
    !facts.tied_head && facts.embedding_scale.factor == 1.0
}

/// Returns the number of bytes of a buffer for the weights of a layer that have so many bytes (codes, scales), in so
/// many equal pieces.
pub fn buffer_bytes(weights: impl Iterator<Item = (usize, usize)>, pieces: usize) -> usize {
    let parts = weights.flat_map(|(codes, scales)| [codes, scales]);
    let bytes: usize = parts.map(|bytes| bytes.next_multiple_of(ALIGNMENT)).sum();
    bytes.next_multiple_of(ALIGNMENT * pieces)
}

/// Collects the weights of layers, one layer at a time.
pub(super) struct Builder {
    home: Home,
    device: Device,
    layers: Vec<Away>,
}

/// A layer's weights away from the device.
struct Away {
    /// Bytes that they fill in a buffer.
    bytes: usize,
    /// The ranges of each weight's codes and scales in the buffer.
    parts: Vec<[Range<usize>; 2]>,
    source: Source,
}

enum Source {
    /// The layer has no 4-bit weight.
    Nothing,
    Host(Host),
    /// This rank's piece.
    Piece(Tensor),
}

impl Builder {
    /// Returns `None` if all weights stay on the device.
    pub fn new(home: &Home, device: &Device) -> Option<Builder> {
        let builder = || Builder { home: home.clone(), device: device.clone(), layers: Vec::new() };
        (!home.is_device()).then(builder)
    }

    /// Moves the 4-bit weights of the next layers off the device and frees their memory. `layers` is one layer, or one
    /// for each of the ranks that share the base; the last call may have fewer.
    pub fn take(&mut self, layers: &mut [Layer]) -> fault::Result<()> {
        match self.home.clone() {
            Home::Device => unreachable!("nothing is taken then"),
            Home::Host => layers.iter_mut().try_for_each(|layer| Ok(self.take_to_host(layer)?)),
            Home::Ranks(ranks) => self.take_to_ranks(&*ranks, layers),
        }
    }

    fn take_to_host(&mut self, layer: &mut Layer) -> Result<()> {
        let weights = four_bit(layer);
        let (bytes, parts) = laid(&weights, 1);
        let source = match bytes {
            0 => Source::Nothing,
            bytes => {
                let host = Host::new(bytes, &self.device)?;
                contents(&weights, &parts).try_for_each(|(at, tensor)| host.write(at, tensor))?;
                Source::Host(host)
            }
        };
        self.put(layer, Away { bytes, parts, source })
    }

    /// Hands out these layers, each of which one rank has read. Every rank gets the forms of all of them, and its piece
    /// of each.
    fn take_to_ranks(&mut self, ranks: &dyn Collective, layers: &mut [Layer]) -> fault::Result<()> {
        let (place, world) = (ranks.place(), self.home.pieces());
        let own = layers.get_mut(place.rank).map(|layer| handover::told(&four_bit(layer))).transpose()?;
        let told = ranks.exchange(&own.unwrap_or_default())?;
        for (reader, layer) in layers.iter_mut().enumerate().filter(|(reader, _)| *reader != place.rank) {
            handover::take(reader, &told[reader], four_bit(layer), &self.device)?;
        }
        let laid: Vec<_> = layers.iter_mut().map(|layer| laid(&four_bit(layer), world)).collect();
        let pieces: Vec<usize> = laid.iter().map(|(bytes, _)| bytes / world).collect();
        let own = match layers.get_mut(place.rank) {
            Some(layer) => Some(self.whole(&four_bit(layer), &laid[place.rank])?),
            None => None,
        };
        let sources = self.deal(ranks, own, &pieces)?;
        for ((layer, (bytes, parts)), source) in layers.iter_mut().zip(laid).zip(sources) {
            self.put(layer, Away { bytes, parts, source })?;
        }
        Ok(())
    }

    /// Gives every rank its piece of each layer. `own` is the layer that this rank read. `pieces` are the bytes of a
    /// piece of each layer.
    fn deal(
        &self,
        ranks: &dyn Collective,
        own: Option<Tensor>,
        pieces: &[usize],
    ) -> fault::Result<Vec<Source>> {
        let (place, most) = (ranks.place(), pieces.iter().copied().max().unwrap_or(0));
        let mut sources: Vec<Source> = pieces.iter().map(|_| Source::Nothing).collect();
        if most == 0 {
            return Ok(sources);
        }
        let zeros = |bytes: usize| Tensor::zeros(bytes, DType::U8, &self.device);
        let (all, piece) = (zeros(most * place.world)?, zeros(most)?);
        // In each round one rank gets its pieces of all these layers.
        for taker in 0..place.world {
            if let Some(own) = &own {
                let bytes = pieces[place.rank];
                slab::write(&piece, 0, &own.narrow(0, taker * bytes, bytes)?)?;
            }
            ranks.gather_into(&all, &piece)?;
            ranks.arrived()?;
            for (reader, bytes) in
                pieces.iter().enumerate().filter(|(_, bytes)| taker == place.rank && **bytes > 0)
            {
                let taken = unwritten(*bytes, DType::U8, &self.device)?;
                slab::write(&taken, 0, &all.narrow(0, reader * most, *bytes)?)?;
                sources[reader] = Source::Piece(taken);
            }
        }
        Ok(sources)
    }

    /// Returns the bytes of a layer's weights in one tensor, as they will lie in a buffer.
    fn whole(&self, weights: &[&mut FourBit], (bytes, parts): &Laid) -> Result<Tensor> {
        let whole = Tensor::zeros(*bytes, DType::U8, &self.device)?;
        contents(weights, parts).try_for_each(|(at, tensor)| slab::write(&whole, at, tensor))?;
        Ok(whole)
    }

    /// Replaces the layer's own weights, which are not needed any more.
    fn put(&mut self, layer: &mut Layer, away: Away) -> Result<()> {
        for weight in four_bit(layer) {
            let nothing = Tensor::zeros(0, DType::U8, &Device::Cpu)?;
            *scales_mut(weight) = nothing.clone();
            weight.packed = nothing;
        }
        self.layers.push(away);
        Ok(())
    }

    /// Makes the two buffers, and views of them of all weights that were taken.
    pub fn finish(self, layers: &mut [Layer]) -> Result<Ring> {
        let most = self.layers.iter().map(|layer| layer.bytes).max().unwrap_or(0).max(ALIGNMENT);
        let buffer = || Tensor::zeros(most, DType::U8, &self.device);
        let buffers = [buffer()?, buffer()?];
        for (i, (layer, away)) in layers.iter_mut().zip(&self.layers).enumerate() {
            for (weight, [codes, scales]) in four_bit(layer).into_iter().zip(&away.parts) {
                let view = |range: &Range<usize>| buffers[i % 2].narrow(0, range.start, range.len());
                weight.packed = view(codes)?;
                *scales_mut(weight) = view(scales)?;
            }
        }
        let ranks = match self.home {
            Home::Ranks(ranks) => Some(ranks),
            Home::Device | Home::Host => None,
        };
        let (fills, layers) = (Fills::new(&self.device)?, self.layers);
        Ok(Ring { fills, buffers, layers, ranks, holds: Mutex::default(), fault: Mutex::default() })
    }
}

/// Returns the 4-bit weights of a layer, in the order of its linear layers.
fn four_bit(layer: &mut Layer) -> Vec<&mut FourBit> {
    let weights = layer.linears_mut().into_iter().filter_map(|linear| match &mut linear.weight {
        Weight::FourBit(weight) => Some(weight),
        Weight::Dense(_) => None,
    });
    weights.collect()
}

/// Bytes that a layer's weights fill in a buffer, and the ranges of each weight's codes and scales there.
type Laid = (usize, Vec<[Range<usize>; 2]>);

fn laid(weights: &[&mut FourBit], pieces: usize) -> Laid {
    let sizes = weights.iter().map(|weight| bytes(weight));
    let (bytes, mut at) = (buffer_bytes(sizes.clone(), pieces), 0);
    let mut next = |bytes: usize| {
        let range = at..at + bytes;
        at += bytes.next_multiple_of(ALIGNMENT);
        range
    };
    (bytes, sizes.map(|(codes, scales)| [next(codes), next(scales)]).collect())
}

/// Returns codes and scales of each weight, and their places in the layer's bytes.
fn contents<'a>(
    weights: &'a [&mut FourBit],
    parts: &'a [[Range<usize>; 2]],
) -> impl Iterator<Item = (usize, &'a Tensor)> {
    weights.iter().zip(parts).flat_map(|(weight, [codes, scales])| {
        [(codes.start, &weight.packed), (scales.start, scales_of(weight))]
    })
}

fn scales_mut(weight: &mut FourBit) -> &mut Tensor {
    match &mut weight.absmax {
        Absmax::Plain(scales) | Absmax::Nested { codes: scales, .. } => scales,
    }
}

/// Two buffers, and the function that fills them with a layer's weights.
pub struct Ring {
    // Dropped first: it waits for copies to the buffers from host memory.
    fills: Fills,
    buffers: [Tensor; 2],
    layers: Vec<Away>,
    ranks: Option<Arc<dyn Collective>>,
    /// The layer that each buffer holds, or is being filled with.
    holds: Mutex<[Option<usize>; 2]>,
    /// The reason why the ranks did not gather a layer. A pass's own error is candle's, which has no kind.
    fault: Mutex<Option<Fault>>,
}

impl Ring {
    /// Returns the number of bytes that lie on the device: both buffers, and this rank's pieces.
    pub fn device_bytes(&self) -> usize {
        let piece = |layer: &Away| match &layer.source {
            Source::Piece(piece) => piece.elem_count(),
            Source::Nothing | Source::Host(_) => 0,
        };
        2 * self.buffers[0].elem_count() + self.layers.iter().map(piece).sum::<usize>()
    }

    /// Returns whether ranks hold pieces of the layers, so that no rank computes by itself.
    pub fn is_shared(&self) -> bool {
        self.ranks.is_some()
    }

    /// Returns the number of bytes that lie in host memory.
    pub fn host_bytes(&self) -> usize {
        let host = |layer: &&Away| matches!(layer.source, Source::Host(_));
        self.layers.iter().filter(host).map(|layer| layer.bytes).sum()
    }

    /// Returns the reason why the ranks could not gather a layer, if that ended a pass.
    pub fn fault(&self) -> Option<Fault> {
        lock(&self.fault).take()
    }

    /// Makes the layer's weights available in their buffer for all work queued from here on. The buffer of `next`, the
    /// layer after it, begins to fill.
    fn enter(&self, layer: usize, next: usize) -> Result<()> {
        let mut holds = lock(&self.holds);
        self.fill(layer, &mut holds)?;
        match &self.ranks {
            Some(ranks) => self.told(ranks.arrived())?,
            None => self.fills.wait(layer % 2)?,
        }
        if next % 2 != layer % 2 {
            self.fill(next, &mut holds)?;
        }
        Ok(())
    }

    fn fill(&self, layer: usize, holds: &mut [Option<usize>; 2]) -> Result<()> {
        let (number, away) = (layer % 2, &self.layers[layer]);
        if holds[number] == Some(layer) {
            return Ok(());
        }
        holds[number] = None;
        match (&away.source, &self.ranks) {
            (Source::Host(host), _) => self.fills.fill(number, &self.buffers[number], host)?,
            (Source::Piece(piece), Some(ranks)) => {
                let whole = self.buffers[number].narrow(0, 0, away.bytes)?;
                self.told(ranks.gather_into(&whole, piece))?;
            }
            _ => {}
        }
        holds[number] = Some(layer);
        Ok(())
    }

    fn told(&self, result: fault::Result<()>) -> Result<()> {
        result.map_err(|fault| {
            let message = fault.message.clone();
            lock(&self.fault).get_or_insert(fault);
            candle_core::Error::Msg(message)
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// A pass's way through the layers. If the pass fails on one rank, the way is finished all the same, because the
/// other ranks gather the rest of it.
pub(super) struct Tour<'a> {
    ring: Option<&'a Ring>,
    order: Vec<usize>,
    at: usize,
}

impl<'a> Tour<'a> {
    /// Returns the way of a pass forward through `layers` layers and back down to layer `lowest`. A `lowest` of
    /// `layers` does not turn.
    pub fn new(ring: Option<&'a Ring>, layers: usize, lowest: usize) -> Tour<'a> {
        let order =
            if ring.is_some() { (0..layers).chain((lowest..layers).rev()).collect() } else { Vec::new() };
        Tour { ring, order, at: 0 }
    }

    /// Enters the next layer, which must be `layer`, before it computes.
    pub fn enter(&mut self, layer: usize) -> Result<()> {
        let Some(ring) = self.ring else { return Ok(()) };
        assert_eq!(self.order.get(self.at), Some(&layer), "the layers of a pass have one order");
        self.at += 1;
        // The pass after this one begins at the first layer.
        ring.enter(layer, self.order.get(self.at).copied().unwrap_or(0))
    }
}

impl Drop for Tour<'_> {
    fn drop(&mut self) {
        let shared = self.ring.is_some_and(Ring::is_shared);
        while shared && self.at < self.order.len() {
            let _ = self.enter(self.order[self.at]);
        }
    }
}

/// The passes of a rank until all ranks are done with theirs. When it is dropped, the rank gathers for the further
/// passes of the others, if it has fewer passes or has failed.
pub struct Together<'a> {
    ring: Option<&'a Ring>,
    layers: usize,
    lowest: usize,
    left: usize,
}

impl<'a> Together<'a> {
    pub(super) fn new(
        ring: Option<&'a Ring>,
        layers: usize,
        lowest: usize,
        passes: usize,
    ) -> fault::Result<Together<'a>> {
        let ring = ring.filter(|ring| ring.is_shared());
        let mut left = 0;
        if let Some(ranks) = ring.and_then(|ring| ring.ranks.as_ref()) {
            let counts = ranks.exchange(&(passes as u64).to_le_bytes())?;
            let count = |bytes: Vec<u8>| bytes.try_into().map(u64::from_le_bytes).unwrap_or(0);
            left = counts.into_iter().map(count).max().unwrap_or(0) as usize;
        }
        Ok(Together { ring, layers, lowest, left })
    }

    /// Announces that the next of the passes begins.
    pub fn pass(&mut self) {
        self.left = self.left.saturating_sub(1);
    }
}

impl Drop for Together<'_> {
    fn drop(&mut self) {
        for _ in 0..self.left {
            drop(Tour::new(self.ring, self.layers, self.lowest));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use serde_json::{Value, json};

    use super::*;
    use crate::facts::config::Config;
    use crate::facts::{FourBitCode, Keep, LoraOptions, Precision, Quantization, family};
    use crate::model::batch::Batch;
    use crate::model::cache::Cache;
    use crate::model::decoder::Decoder;
    use crate::model::lora::Lora;
    use crate::model::pass::Step;
    use crate::model::{Options, load, random};
    #[cfg(feature = "cuda")]
    use crate::ops::{cuda::side, judge};
    use crate::ranks::{Place, check_gather};
    use crate::report::Report;

    /// Ranks that are threads, as far as a shared base needs them: gathers on the CPU, counted.
    struct Threads {
        place: Place,
        pieces: Arc<Mutex<Vec<Tensor>>>,
        said: Arc<Mutex<Vec<Vec<u8>>>>,
        barrier: Arc<Barrier>,
        gathers: Mutex<usize>,
    }

    impl Threads {
        fn world(world: usize) -> Vec<Arc<Threads>> {
            let nothing = Tensor::zeros(0, DType::U8, &Device::Cpu).unwrap();
            let (pieces, barrier) =
                (Arc::new(Mutex::new(vec![nothing; world])), Arc::new(Barrier::new(world)));
            let said = Arc::new(Mutex::new(vec![Vec::new(); world]));
            let place = |rank| Place { rank, world, local_rank: rank, local_world: world };
            let one = |rank| Threads {
                place: place(rank),
                pieces: pieces.clone(),
                said: said.clone(),
                barrier: barrier.clone(),
                gathers: Mutex::default(),
            };
            (0..world).map(|rank| Arc::new(one(rank))).collect()
        }
    }

    impl Collective for Threads {
        fn place(&self) -> Place {
            self.place
        }

        fn sum(&self, _: &Tensor) -> fault::Result<()> {
            unreachable!("a base is gathered only")
        }

        fn gather_into(&self, whole: &Tensor, piece: &Tensor) -> fault::Result<()> {
            check_gather(whole, piece, self.place.world)?;
            *lock(&self.gathers) += 1;
            lock(&self.pieces)[self.place.rank] = piece.clone();
            self.barrier.wait();
            for (rank, piece) in lock(&self.pieces).iter().enumerate() {
                whole.slice_set(piece, 0, rank * piece.elem_count())?;
            }
            self.barrier.wait();
            Ok(())
        }

        fn exchange(&self, bytes: &[u8]) -> fault::Result<Vec<Vec<u8>>> {
            lock(&self.said)[self.place.rank] = bytes.to_vec();
            self.barrier.wait();
            let all = lock(&self.said).clone();
            self.barrier.wait();
            Ok(all)
        }

        fn broadcast(&self, _: &[u8]) -> fault::Result<Vec<u8>> {
            unreachable!("a base is gathered only")
        }
    }

    struct Case {
        facts: Facts,
        options: Options,
        _folder: tempfile::TempDir,
    }

    /// Returns a model of random weights. Its adapter begins at layer `lowest`.
    fn case(family: &str, layers: usize, lowest: usize, code: FourBitCode, double: bool) -> Case {
        let mut config = json!({
            "model_type": family, "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
            "rms_norm_eps": 1e-5, "rope_theta": 100.0,
        });
        if family == "gemma2" {
            config["hidden_activation"] = Value::from("gelu_pytorch_tanh");
        }
        let facts = family::describe(&Config::from_json(config.as_object().unwrap().clone())).unwrap();
        let folder = tempfile::tempdir().unwrap();
        random::write(folder.path(), &facts, 3).unwrap();
        let options = Options {
            folder: folder.path().into(),
            quantization: Quantization::FourBit { code, double },
            lora: LoraOptions { r: 3, layers: (lowest..layers).collect(), ..LoraOptions::default() },
            precision: Precision::F32,
        };
        Case { facts, options, _folder: folder }
    }

    impl Case {
        fn load(&self, home: &Home, device: &Device) -> Decoder {
            load::load_at(home, self.facts.clone(), &self.options, device, &Report::silent()).unwrap()
        }
    }

    fn batch(seed: u32) -> Batch {
        let mut batch = Batch::default();
        for (key, length) in [(0, 11), (1, 6)] {
            let ids: Vec<u32> = (0..length).map(|i| (i * 7 + seed + key) % 61).collect();
            batch.push(&ids, &vec![true; ids.len()], 11, u64::from(key));
        }
        batch
    }

    fn bits(tensor: &Tensor) -> Vec<u32> {
        let tensor = tensor.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
        tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
    }

    /// Returns the bits of losses and gradients of three passes, of an evaluation between them, and of a step of
    /// serving.
    fn results(decoder: &Decoder, options: &Options) -> Vec<Vec<u32>> {
        results_of(decoder, options, &[Keep::Everything, Keep::LayerInputs, Keep::HostInputs])
    }

    fn results_of(decoder: &Decoder, options: &Options, levels: &[Keep]) -> Vec<Vec<u32>> {
        let adapter = decoder.trainable(&options.lora).unwrap();
        let mut found = Vec::new();
        let loss = |number: crate::ops::number::Number| number.value().unwrap().to_bits();
        for (seed, keep) in (1..).zip(levels) {
            let levels = vec![*keep; decoder.layers.len()];
            let trained = decoder.forward_backward(&adapter, &levels, &batch(seed), 0.1).unwrap();
            let evaluated = decoder.loss(&batch(seed), adapter.evaluated()).unwrap();
            let losses = [loss(trained), loss(evaluated)];
            found.push(losses.iter().flat_map(|bits| [(bits >> 32) as u32, *bits as u32]).collect());
            found.push(bits(&adapter.grads));
        }
        let mut cache = Cache::new(&decoder.facts, 16, 16, decoder.dtype, &decoder.device).unwrap();
        let mut step = Step::default();
        step.push(&[3, 1, 4], 0, vec![0], 3);
        step.wanted = vec![2];
        found.push(bits(&decoder.step(&step, &mut cache, Lora::None).unwrap()));
        found
    }

    fn cases() -> Vec<Case> {
        use FourBitCode::{Fp4, Nf4};
        let mut cases = [
            case("llama", 3, 0, Nf4, true),
            case("llama", 4, 2, Nf4, false),
            case("phi3", 3, 1, Fp4, false),
            case("gemma2", 2, 0, Nf4, true),
            case("qwen3", 1, 0, Fp4, true),
        ];
        // Magnitudes need the lengths of rows of weights that are not there; trained tokens need the lowest layer.
        cases[1].options.lora.dora = true;
        cases[2].options.lora.dora = true;
        cases[2].options.lora.tokens.embedding = vec![8, 22];
        cases.into()
    }

    #[test]
    fn streamed_layers_give_the_bits_of_resident_ones() {
        for case in cases() {
            let resident = results(&case.load(&Home::Device, &Device::Cpu), &case.options);
            let streamed = case.load(&Home::Host, &Device::Cpu);
            assert!(results(&streamed, &case.options) == resident, "{}", case.facts.family);
            let ring = streamed.ring.as_ref().unwrap();
            assert_eq!(ring.host_bytes() * 2, ring.device_bytes() * case.facts.layers.len());
        }
    }

    #[test]
    fn layers_shared_by_ranks_give_the_bits_of_resident_ones() {
        for (case, world) in cases().iter().zip([2, 3, 4, 2, 3]) {
            let resident = results(&case.load(&Home::Device, &Device::Cpu), &case.options);
            std::thread::scope(|scope| {
                for rank in Threads::world(world) {
                    let (resident, case) = (&resident, &case);
                    scope.spawn(move || {
                        let decoder = case.load(&Home::Ranks(rank), &Device::Cpu);
                        assert!(results(&decoder, &case.options) == *resident, "{}", case.facts.family);
                    });
                }
            });
        }
    }

    /// One rank computes two passes and evaluates. The other fails in the middle of its only pass and evaluates
    /// nothing, and gathers what the first needs all the same.
    #[test]
    fn a_rank_without_a_pass_gathers_for_the_others() {
        let case = case("llama", 3, 1, FourBitCode::Nf4, true);
        let [first, other] = Threads::world(2).try_into().unwrap_or_else(|_| unreachable!());
        std::thread::scope(|scope| {
            let run = |rank: Arc<Threads>, computes: bool| {
                let case = &case;
                scope.spawn(move || {
                    let decoder = case.load(&Home::Ranks(rank.clone()), &Device::Cpu);
                    let adapter = decoder.trainable(&case.options.lora).unwrap();
                    let keep = [Keep::Everything; 3];
                    let batch = batch(1);
                    let mut passes = decoder.together(if computes { 2 } else { 1 }, Some(&adapter)).unwrap();
                    passes.pass();
                    crate::ops::starve::set((!computes).then_some((20, 1)));
                    let done = decoder.forward_backward(&adapter, &keep, &batch, 1.0);
                    assert_eq!(done.is_ok(), computes, "the other ran out of memory");
                    crate::ops::starve::set(None);
                    if computes {
                        passes.pass();
                        decoder.forward_backward(&adapter, &keep, &batch, 1.0).unwrap();
                    }
                    drop(passes);
                    let mut passes = decoder.together(usize::from(computes), None).unwrap();
                    if computes {
                        passes.pass();
                        decoder.loss(&batch, adapter.evaluated()).unwrap();
                    }
                    drop(passes);
                    *lock(&rank.gathers)
                })
            };
            let (first, other) = (run(first, true), run(other, false));
            assert_eq!(first.join().unwrap(), other.join().unwrap());
        });
    }

    /// A pass forward and backward copies each layer twice, except the two at which it turns. The next pass begins with
    /// two layers that are there.
    #[test]
    fn layers_that_are_there_are_not_gathered_again() {
        let case = case("llama", 4, 0, FourBitCode::Nf4, true);
        let ranks = Threads::world(2);
        std::thread::scope(|scope| {
            for rank in ranks {
                let case = &case;
                scope.spawn(move || {
                    let decoder = case.load(&Home::Ranks(rank.clone()), &Device::Cpu);
                    let adapter = decoder.trainable(&case.options.lora).unwrap();
                    // The ranks read two layers each, and hand out the pieces of two layers in two rounds.
                    let loaded = *lock(&rank.gathers);
                    assert_eq!(loaded, 4);
                    let mut gathers = Vec::new();
                    for _ in 0..3 {
                        let keep = [Keep::LayerInputs; 4];
                        decoder.forward_backward(&adapter, &keep, &batch(1), 1.0).unwrap();
                        gathers.push(*lock(&rank.gathers) - loaded);
                    }
                    assert_eq!(gathers, [6, 10, 14]);
                });
            }
        });
    }

    #[test]
    fn alone_and_without_quantisation_nothing_is_moved() {
        let case = case("llama", 2, 0, FourBitCode::Nf4, true);
        assert!(case.load(&Home::Ranks(Arc::new(crate::ranks::Alone)), &Device::Cpu).ring.is_none());
    }

    /// Copies arrive late on the fake driver. With both events the bits are those of a resident base, in f32 and in
    /// bf16; without either of them the results are wrong.
    #[cfg(feature = "cuda")]
    #[test]
    fn streamed_layers_give_the_same_bits_on_a_gpu_and_each_event_is_needed() {
        let Some(device) = judge::gpu() else { return };
        for mut case in cases() {
            for precision in [Precision::F32, Precision::Bf16, Precision::Fp8] {
                case.options.precision = precision;
                let resident = results(&case.load(&Home::Device, &device), &case.options);
                let streamed = case.load(&Home::Host, &device);
                assert!(results(&streamed, &case.options) == resident, "{}", case.facts.family);
            }
            if case.facts.layers.len() < 3 {
                continue;
            }
            // Inputs in host memory are copied by the same events; ops/stash.rs leaves these out.
            let levels = [Keep::Everything, Keep::LayerInputs];
            for event in [side::Omitted::Free, side::Omitted::Filled] {
                let resident = results_of(&case.load(&Home::Device, &device), &case.options, &levels);
                let streamed = case.load(&Home::Host, &device);
                side::OMITTED.set(Some(event));
                let wrong = results_of(&streamed, &case.options, &levels);
                side::OMITTED.set(None);
                assert!(wrong != resident, "{}: without {event:?}", case.facts.family);
            }
        }
    }

    /// A buffer has the bytes that the layer's weights have, each part rounded up.
    #[test]
    fn buffers_are_as_large_as_the_largest_layer() {
        let case = case("llama", 2, 0, FourBitCode::Nf4, true);
        let whole = case.load(&Home::Device, &Device::Cpu);
        let sizes = |decoder: &Decoder| -> Vec<(usize, usize)> {
            let weights = decoder.layers[0].linears().map(|linear| match &linear.weight {
                Weight::FourBit(weight) => bytes(weight),
                Weight::Dense(_) => unreachable!("all are quantised"),
            });
            weights.collect()
        };
        let streamed = case.load(&Home::Host, &Device::Cpu);
        assert_eq!(sizes(&whole), sizes(&streamed));
        let expected = buffer_bytes(sizes(&whole).into_iter(), 1);
        assert_eq!(streamed.ring.as_ref().unwrap().device_bytes(), 2 * expected);
        assert_eq!(buffer_bytes([(100, 3), (0, 257)].into_iter(), 3), 1536);
    }
}
