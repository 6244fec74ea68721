//! Cross-entropy of the next token over an output head, in chunks of rows, so that the logits of all rows never
//! exist at once.
//!
//! `loss = sum over rows of logsumexp(h W^T) - (h W^T)[target]`; the caller divides by the number of supervised
//! tokens in the whole optimizer step. The gradient of the logits, softmax minus one-hot, replaces them in place.
//! On a GPU the loss stays there until it is read.

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use super::bias;
use super::cpu::{self, Real};
use super::matmul::{self, Weight};
use super::number::Number;
use super::tokens;
use crate::facts::Precision;
use crate::with_real;

/// LIMIT: bytes of logits at a time. On a CPU they fit its caches. On a GPU they are enough rows (4,186 of 32,064
/// logits in bf16) that the head is read once per step and its products fill the device.
const CHUNK_BYTES_MAX: usize = 16 << 20;
const GPU_CHUNK_BYTES_MAX: usize = 256 << 20;

/// The sum that a training pass minimises.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Goal {
    /// Factor on the sum of losses.
    pub scale: f64,
    /// Share of each target that goes to all tokens alike, as transformers' LabelSmoother takes it.
    pub smoothing: f64,
}

impl Goal {
    /// Returns plain cross-entropy.
    pub fn plain(scale: f64) -> Goal {
        Goal { scale, smoothing: 0.0 }
    }
}

/// The output head: `logits = scale * h W^T + bias`, then `cap * tanh(logits / cap)` if there is a cap.
#[derive(Clone, Debug)]
pub struct Head {
    /// The weight [V, C].
    pub weight: Weight,
    /// The bias `[V]` (phi-2).
    pub bias: Option<Tensor>,
    /// Factor on the products; below 1 in Granite.
    pub scale: f64,
    /// Soft cap of the logits (Gemma 2).
    pub softcap: Option<f64>,
    /// The changes that adapters make to some tokens' rows of the weight.
    pub changes: Vec<Change>,
}

/// The change that an adapter makes to some tokens' rows of an output head.
#[derive(Clone, Debug)]
pub struct Change {
    /// The rows of `hidden` that it counts for.
    pub rows: Range<usize>,
    /// The tokens.
    pub ids: Vec<u32>,
    /// The rows of these ids, [ids, C].
    pub weight: Weight,
    /// The gradient of the rows, if they are in training.
    pub gradient: Option<Tensor>,
    /// The factor with which the rows are added to the head's own; `None`: they replace them. A head with a bias has
    /// none of the second kind.
    pub strength: Option<f64>,
}

impl Change {
    /// Returns the change's part of `rows` rows from `from` on, counted from there.
    fn part(&self, from: usize, rows: usize) -> Range<usize> {
        let inside = |row: usize| row.clamp(from, from + rows) - from;
        inside(self.rows.start)..inside(self.rows.end)
    }
}

impl Head {
    /// Returns a head without bias, factor or cap.
    pub fn plain(weight: Weight) -> Head {
        Head { weight, bias: None, scale: 1.0, softcap: None, changes: Vec::new() }
    }

    /// `scale * h W^T + bias` before the cap, in the first V of `columns` columns. The other columns are not
    /// written. `from`: the number of the first of these rows, for changes that count for some.
    fn product(&self, hidden: &Tensor, from: usize, columns: usize, precision: Precision) -> Result<Tensor> {
        let (logits, beta) = self.biased(hidden, columns)?;
        matmul::forward(hidden, &self.weight, self.scale, &logits, 0, beta, precision)?;
        self.change(hidden, from, &logits, |x, weight, alpha, y, _| {
            matmul::forward(x, weight, alpha, y, 0, 0.0, precision)
        })?;
        Ok(logits)
    }

    /// Puts the adapters' changes into logits before the cap. `product` gets the number of the first row too.
    fn change(
        &self,
        hidden: &Tensor,
        from: usize,
        logits: &Tensor,
        product: impl Fn(&Tensor, &Weight, f64, &Tensor, usize) -> Result<()>,
    ) -> Result<()> {
        for change in &self.changes {
            let part = change.part(from, hidden.dim(0)?);
            if part.is_empty() {
                continue;
            }
            let values = super::unwritten((part.len(), change.ids.len()), logits.dtype(), logits.device())?;
            let alpha = self.scale * change.strength.unwrap_or(1.0);
            let x = hidden.narrow(0, part.start, part.len())?;
            product(&x, &change.weight, alpha, &values, part.start)?;
            let to = logits.narrow(0, part.start, part.len())?;
            tokens::put(&to, &values, &change.ids, change.strength.is_some())?;
        }
        Ok(())
    }

    /// Adds the gradients of rows in training, and writes that of `hidden` to `dh`. `d_logits` are all used up.
    fn backward(&self, d_logits: &Tensor, hidden: &Tensor, dh: &Tensor, precision: Precision) -> Result<()> {
        let trained = |change: &&Change| change.gradient.is_some();
        let mut taken = Vec::new();
        for change in self.changes.iter().filter(trained) {
            let d = tokens::take(d_logits, &change.ids)?;
            let gradient = change.gradient.as_ref().expect("it is in training");
            matmul::weight_gradient(&d, 0, hidden, self.scale, gradient, precision)?;
            taken.push((d, &change.weight));
        }
        matmul::input_gradient(d_logits, 0, &self.weight, self.scale, dh, 0.0, precision)?;
        taken
            .iter()
            .try_for_each(|(d, weight)| matmul::input_gradient(d, 0, weight, self.scale, dh, 1.0, precision))
    }

    /// Returns the same head for rows from `from` on.
    pub fn from_row(&self, from: usize) -> Head {
        let mut head = self.clone();
        for change in &mut head.changes {
            change.rows = change.rows.start.saturating_sub(from)..change.rows.end.saturating_sub(from);
        }
        head
    }

    /// Returns logits that hold the bias, if there is one, and the factor (beta) for adding to them.
    fn biased(&self, hidden: &Tensor, columns: usize) -> Result<(Tensor, f64)> {
        let logits = super::unwritten((hidden.dim(0)?, columns), hidden.dtype(), hidden.device())?;
        if let Some(bias) = &self.bias {
            bias::apply(bias, &logits, 0, false)?;
        }
        Ok((logits, if self.bias.is_some() { 1.0 } else { 0.0 }))
    }
}

/// Returns the definition over all logits [rows, V], in differentiable primitives.
pub fn formula(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let largest = logits.max_keepdim(1)?.detach();
    let log_sum = (logits.broadcast_sub(&largest)?.exp()?.sum_keepdim(1)?.log()? + largest)?;
    (log_sum - logits.gather(&targets.unsqueeze(1)?, 1)?)?.sum_all()
}

/// hidden [rows, C] and one target per row -> the sum of the losses.
pub fn forward(hidden: &Tensor, head: &Head, targets: &[u32], precision: Precision) -> Result<Number> {
    Ok(forward_counting(hidden, head, targets, precision)?.0)
}

/// Does `forward`, and counts the targets with the largest logit of their row; of equal logits the first is the
/// largest.
pub fn forward_counting(
    hidden: &Tensor,
    head: &Head,
    targets: &[u32],
    precision: Precision,
) -> Result<(Number, Number)> {
    each_chunk(hidden, head, targets, None, precision, |_, _| Ok(()))
}

/// A target that fills a list up on a GPU: its row has no loss and no gradient.
pub const NO_TARGET: u32 = u32::MAX;

/// The targets of a training pass and its goal, on the device of the rows.
pub struct Aims<'a> {
    targets: &'a [u32],
    goal: Goal,
    #[cfg(feature = "cuda")]
    there: Option<gpu::Aims>,
}

impl Aims<'_> {
    /// Copies one target for each row, and the goal's scale, to the rows' device. On a GPU some targets may be
    /// `NO_TARGET`.
    pub fn send<'a>(targets: &'a [u32], goal: Goal, device: &Device) -> Result<Aims<'a>> {
        #[cfg(not(feature = "cuda"))]
        let _ = device;
        Ok(Aims {
            targets,
            goal,
            #[cfg(feature = "cuda")]
            there: match device.is_cuda() {
                true => Some(gpu::Aims::send(targets, Some(goal.scale), device)?),
                false => None,
            },
        })
    }
}

/// Returns the loss, smoothed as the goal says, and the gradient of `scale * loss` with respect to hidden, [rows, C].
pub fn forward_backward(
    hidden: &Tensor,
    head: &Head,
    targets: &[u32],
    goal: Goal,
    precision: Precision,
) -> Result<(Number, Tensor)> {
    forward_backward_to(hidden, head, &Aims::send(targets, goal, hidden.device())?, precision)
}

/// Does `forward_backward` with targets that lie on the device.
pub fn forward_backward_to(
    hidden: &Tensor,
    head: &Head,
    aims: &Aims,
    precision: Precision,
) -> Result<(Number, Tensor)> {
    let dh = super::unwritten(hidden.shape(), hidden.dtype(), hidden.device())?;
    let (loss, _) = each_chunk(hidden, head, aims.targets, Some(aims), precision, |d_logits, from| {
        let rows = d_logits.dim(0)?;
        head.backward(d_logits, &hidden.narrow(0, from, rows)?, &dh.narrow(0, from, rows)?, precision)
    })?;
    Ok((loss, dh))
}

/// Returns the number of rows whose logits exist at the same time.
pub fn chunk_rows(vocab: usize, element_bytes: usize, on_gpu: bool) -> usize {
    let row_bytes = vocab * element_bytes;
    match on_gpu {
        true => (GPU_CHUNK_BYTES_MAX / row_bytes).max(16),
        false => (CHUNK_BYTES_MAX / row_bytes).clamp(16, 4096),
    }
}

/// Returns the loss and, without a goal, the number of targets with the largest logit. With a goal, `body` receives
/// each chunk's gradient of `scale * loss` (it replaces the logits) and the chunk's first row.
fn each_chunk(
    hidden: &Tensor,
    head: &Head,
    targets: &[u32],
    aims: Option<&Aims>,
    precision: Precision,
    mut body: impl FnMut(&Tensor, usize) -> Result<()>,
) -> Result<(Number, Number)> {
    let ((rows, _), (vocab, _)) = (hidden.dims2()?, head.weight.dims());
    let (goal, on_gpu) = (aims.map(|aims| aims.goal), !matches!(hidden.device(), Device::Cpu));
    let fills = |target: u32| target == NO_TARGET && on_gpu && aims.is_some();
    assert!(
        rows == targets.len() && targets.iter().all(|&target| (target as usize) < vocab || fills(target)),
        "one target below {vocab} for each of {rows} rows"
    );
    let chunk = chunk_rows(vocab, hidden.dtype().size_in_bytes(), on_gpu);
    #[cfg(feature = "cuda")]
    if on_gpu {
        let sent = match aims.and_then(|aims| aims.there.clone()) {
            Some(sent) => sent,
            None => gpu::Aims::send(targets, goal.map(|goal| goal.scale), hidden.device())?,
        };
        let losses = gpu::Losses::new(sent, rows, goal.is_none(), hidden.device())?;
        for from in (0..rows).step_by(chunk) {
            let hidden = hidden.narrow(0, from, chunk.min(rows - from))?;
            let logits = head.product(&hidden, from, gpu::columns(vocab), precision)?;
            losses.rows(&logits, from, vocab, head.softcap, goal)?;
            if goal.is_some() {
                body(&logits, from)?;
            }
        }
        return Ok((losses.sum()?, losses.hits()?));
    }
    let (mut loss, mut hits) = (0.0, 0);
    for (i, targets) in targets.chunks(chunk).enumerate() {
        let from = i * chunk;
        let logits = head.product(&hidden.narrow(0, from, targets.len())?, from, vocab, precision)?;
        let (of_chunk, found) = rows_loss(&logits, targets, head.softcap, goal)?;
        (loss, hits) = (loss + of_chunk, hits + found);
        if goal.is_some() {
            body(&logits, i * chunk)?;
        }
    }
    Ok((Number::Here(loss), Number::Here(hits as f64)))
}

/// Returns the sum of the rows' losses, and how many targets have the largest logit. With a goal, the logits become the
/// gradient of scale * loss.
fn rows_loss(
    logits: &Tensor,
    targets: &[u32],
    softcap: Option<f64>,
    goal: Option<Goal>,
) -> Result<(f64, u64)> {
    let vocab = logits.dim(1)?;
    with_real!(logits, T => {
        let found: Vec<(f64, bool)> = cpu::edit(logits, |logits: &mut [T]| {
            logits
                .par_chunks_mut(vocab)
                .zip(targets)
                .map_init(Vec::new, |slopes, (row, &target)| {
                    cpu::vectorized(#[inline(always)] || match softcap {
                        None => row_loss(row, target as usize, goal),
                        Some(cap) => {
                            cap_row(row, T::of(cap), slopes);
                            let found = row_loss(row, target as usize, goal);
                            row.iter_mut().zip(slopes.iter()).for_each(|(d, &slope)| *d *= slope);
                            found
                        }
                    })
                })
                .collect()
        })?;
        let hits = found.iter().filter(|(_, hit)| *hit).count() as u64;
        Ok((found.into_iter().map(|(loss, _)| loss).sum(), hits))
    })
}

/// Caps the logits and stores the slope of the cap at each, 1 - tanh^2.
#[inline(always)]
fn cap_row<T: Real>(row: &mut [T], cap: T, slopes: &mut Vec<T>) {
    slopes.resize(row.len(), T::ZERO);
    for (logit, slope) in row.iter_mut().zip(slopes.iter_mut()) {
        let t = Real::tanh(*logit / cap);
        *logit = cap * t;
        *slope = T::ONE - t * t;
    }
}

/// Returns the loss of one row and, without a goal, whether its target has the largest logit. With a goal, the logits
/// become scale * (softmax - target); a smoothed target is `1 - smoothing` of the one-hot and `smoothing` of the even
/// distribution.
#[inline(always)]
fn row_loss<T: Real>(row: &mut [T], target: usize, goal: Option<Goal>) -> (f64, bool) {
    let largest = cpu::largest(row);
    let at_target = row[target];
    // Of equal logits the first is the most probable one, as torch's argmax has it.
    let hit = goal.is_none() && at_target >= largest && row[..target].iter().all(|logit| *logit < largest);
    let smoothing = goal.map_or(0.0, |goal| goal.smoothing);
    let mean = if smoothing > 0.0 { cpu::sum(row).wide() / row.len() as f64 } else { 0.0 };
    for logit in row.iter_mut() {
        *logit = Real::exp(*logit - largest);
    }
    let sum = cpu::sum(row);
    if let Some(Goal { scale, .. }) = goal {
        let factor = T::of(scale) / sum;
        row.iter_mut().for_each(|p| *p *= factor);
        row[target] -= T::of(scale * (1.0 - smoothing));
    }
    let log_sum = sum.wide().ln() + largest.wide();
    if smoothing == 0.0 {
        return (log_sum - at_target.wide(), hit);
    }
    let even = goal.map_or(T::ZERO, |goal| T::of(goal.scale * smoothing / row.len() as f64));
    row.iter_mut().for_each(|p| *p -= even);
    (log_sum - (1.0 - smoothing) * at_target.wide() - smoothing * mean, hit)
}

/// Returns the logits [rows, V], for tests and generation.
pub fn logits(hidden: &Tensor, head: &Head, precision: Precision) -> Result<Tensor> {
    capped(head.product(hidden, 0, head.weight.dims().0, precision)?, hidden, head)
}

/// Does `logits` in which a row's bits depend on that row alone, as `matmul::forward_apart` has it. On a GPU they are
/// f32 and never rounded to the activations' type. The first `short` rows belong to short segments.
pub fn logits_apart(hidden: &Tensor, head: &Head, precision: Precision, short: usize) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if hidden.device().is_cuda() {
        let shape = (hidden.dim(0)?, head.weight.dims().0);
        let logits = super::unwritten(shape, DType::F32, hidden.device())?;
        write_logits_apart(hidden, head, precision, &logits)?;
        return Ok(logits);
    }
    let (logits, beta) = head.biased(hidden, head.weight.dims().0)?;
    matmul::forward_apart(hidden, &head.weight, head.scale, &logits, 0, beta, precision, short)?;
    head.change(hidden, 0, &logits, |x, weight, alpha, y, from| {
        matmul::forward_apart(x, weight, alpha, y, 0, 0.0, precision, short.saturating_sub(from))
    })?;
    capped(logits, hidden, head)
}

/// Does the same on a GPU, and writes to `logits` [rows, V] in f32.
#[cfg(feature = "cuda")]
pub fn write_logits_apart(hidden: &Tensor, head: &Head, precision: Precision, logits: &Tensor) -> Result<()> {
    gpu::logits(hidden, head, precision, logits)
}

fn capped(logits: Tensor, hidden: &Tensor, head: &Head) -> Result<Tensor> {
    let logits = match head.softcap {
        Some(cap) => ((logits / cap)?.tanh()? * cap)?,
        None => logits,
    };
    let dtype = match hidden.dtype() {
        DType::F64 => DType::F64,
        _ => DType::F32,
    };
    super::rows::convert(&logits, dtype)
}

/// The launches of `kernels/cross_entropy.cu`: one block per row.
#[cfg(feature = "cuda")]
mod gpu {
    use super::*;
    use crate::ops::cuda::{self, Launch};

    const CAP_THREADS: usize = 256;

    /// Returns the distance between rows of logits, in elements, so that every row begins at a multiple of 16 bytes.
    pub fn columns(vocab: usize) -> usize {
        vocab.next_multiple_of(8)
    }

    /// Writes logits [rows, V] in f32.
    pub fn logits(hidden: &Tensor, head: &Head, precision: Precision, logits: &Tensor) -> Result<()> {
        if let Some(bias) = &head.bias {
            bias::apply(bias, logits, 0, false)?;
        }
        let beta = if head.bias.is_some() { 1.0 } else { 0.0 };
        matmul::forward_apart(hidden, &head.weight, head.scale, logits, 0, beta, precision, 0)?;
        head.change(hidden, 0, logits, |x, weight, alpha, y, _| {
            matmul::forward_apart(x, weight, alpha, y, 0, 0.0, precision, 0)
        })?;
        if let Some(cap) = head.softcap {
            let count = logits.elem_count();
            let launch =
                Launch::untyped(cuda::device(logits)?, "cross_entropy", "cap").of(DType::F32, logits);
            let launch = launch.long(count as u64).float(cap);
            launch.launch((count.div_ceil(CAP_THREADS), 1, 1), CAP_THREADS, 0)?;
        }
        Ok(())
    }

    /// The targets of all rows, and the factor on their losses.
    #[derive(Clone)]
    pub struct Aims {
        targets: Tensor,
        scale: Option<Tensor>,
    }

    impl Aims {
        /// Copies them to the device.
        pub fn send(targets: &[u32], scale: Option<f64>, device: &Device) -> Result<Aims> {
            // Without rows nothing can be copied, and the one loss stays 0.
            let targets = cuda::upload(if targets.is_empty() { &[0] } else { targets }, device)?;
            let scale = scale.map(|scale| cuda::upload(&[scale as f32], device)).transpose()?;
            Ok(Aims { targets, scale })
        }
    }

    /// The aims of all rows, and their results, which are computed chunk by chunk.
    pub struct Losses {
        aims: Aims,
        losses: Tensor,
        /// 1 for a target with the largest logit of its row, else 0; `None` if they are not counted.
        hits: Option<Tensor>,
    }

    impl Losses {
        /// Returns losses and hits of so many rows, which begin as zeros.
        pub fn new(aims: Aims, rows: usize, counted: bool, device: &Device) -> Result<Losses> {
            let zeros = || Tensor::zeros(rows.max(1), DType::F32, device);
            let (losses, hits) = (zeros()?, counted.then(zeros).transpose()?);
            Ok(Losses { aims, losses, hits })
        }

        /// Computes the losses of the rows from `from` on. With a goal their logits become the gradient; without one
        /// the hits are found too.
        pub fn rows(
            &self,
            logits: &Tensor,
            from: usize,
            vocab: usize,
            softcap: Option<f64>,
            goal: Option<Goal>,
        ) -> Result<()> {
            let (rows, columns) = logits.dims2()?;
            let (name, smoothing) = match goal {
                None => ("count", None),
                Some(Goal { smoothing: 0.0, .. }) => ("rows", None),
                Some(goal) => ("smooth", Some(goal.smoothing)),
            };
            let launch = Launch::new(logits, "cross_entropy", name)?.tensor(logits);
            let launch =
                launch.of_at(DType::U32, &self.aims.targets, from).of_at(DType::F32, &self.losses, from);
            let launch = self.hits.iter().fold(launch, |launch, hits| launch.of_at(DType::F32, hits, from));
            let launch = launch.int(vocab).int(columns).float(softcap.unwrap_or(0.0));
            let launch = self.aims.scale.iter().fold(launch, |launch, scale| launch.of(DType::F32, scale));
            let launch = smoothing.into_iter().fold(launch, Launch::float);
            launch.launch((rows, 1, 1), 512, 0)
        }

        /// Returns the sum of all rows' losses.
        pub fn sum(&self) -> Result<Number> {
            crate::ops::number::gpu::sum(&[&self.losses])
        }

        /// Returns the number of hits; 0 if they are not counted.
        pub fn hits(&self) -> Result<Number> {
            match &self.hits {
                Some(hits) => crate::ops::number::gpu::sum(&[hits]),
                None => Ok(Number::Here(0.0)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::judge;
    use candle_core::Device;

    #[test]
    fn value_and_gradient_equal_the_formula() -> Result<()> {
        for (rows, width, vocab) in [(1, 3, 5), (37, 20, 131), (5, 8, 16)] {
            for (scale, softcap, biased) in [(1.0, None, false), (0.3, Some(2.0), false), (1.0, None, true)] {
                let (hidden, weight) = (judge::random((rows, width), 1)?, judge::random((vocab, width), 2)?);
                let bias = match biased {
                    true => Some(judge::random(vocab, 3)?.as_tensor().clone()),
                    false => None,
                };
                let mut product = (hidden.matmul(&weight.t()?)? * scale)?;
                if let Some(bias) = &bias {
                    product = product.broadcast_add(bias)?;
                }
                if let Some(cap) = softcap {
                    product = ((product / cap)?.tanh()? * cap)?;
                }
                let head = Head {
                    weight: Weight::Dense(weight.as_tensor().clone()),
                    bias,
                    scale,
                    softcap,
                    changes: Vec::new(),
                };
                judge::same(&logits(&hidden, &head, Precision::F32)?, &product, 1e-12)?;
                check(&hidden, &head, &product)?;
            }
        }
        Ok(())
    }

    fn check(hidden: &Tensor, head: &Head, product: &Tensor) -> Result<()> {
        let (rows, vocab) = product.dims2()?;
        let targets: Vec<u32> = (0..rows).map(|i| (i * 7 % vocab) as u32).collect();
        let expected = formula(product, &Tensor::new(targets.as_slice(), &Device::Cpu)?)?;
        let goal = Goal::plain(0.25);
        let (loss, dh) = forward_backward(hidden, head, &targets, goal, Precision::F32)?;
        let loss = loss.value()?;
        assert!((loss - expected.to_scalar::<f64>()?).abs() < 1e-10);
        assert!((forward(hidden, head, &targets, Precision::F32)?.value()? - loss).abs() < 1e-12);
        let scale = Tensor::new(0.25f64, &Device::Cpu)?;
        judge::same(&dh, &judge::gradient(hidden, &expected, &scale)?, 1e-12)?;
        let smoothed = smoothed_formula(product, &Tensor::new(targets.as_slice(), &Device::Cpu)?, 0.2)?;
        let goal = Goal { scale: 0.25, smoothing: 0.2 };
        let (loss, dh) = forward_backward(hidden, head, &targets, goal, Precision::F32)?;
        assert!((loss.value()? - smoothed.to_scalar::<f64>()?).abs() < 1e-10);
        judge::same(&dh, &judge::gradient(hidden, &smoothed, &scale)?, 1e-12)?;
        let (_, hits) = forward_counting(hidden, head, &targets, Precision::F32)?;
        assert_eq!(hits.value()?, hits_of(product, &targets)?);
        Ok(())
    }

    fn hits_of(logits: &Tensor, targets: &[u32]) -> Result<f64> {
        let largest = logits.argmax(1)?.to_vec1::<u32>()?;
        Ok(largest.iter().zip(targets).filter(|(a, b)| a == b).count() as f64)
    }

    /// Computes transformers' LabelSmoother before it divides: the loss of a target of which a share is spread over all
    /// tokens.
    fn smoothed_formula(logits: &Tensor, targets: &Tensor, smoothing: f64) -> Result<Tensor> {
        let largest = logits.max_keepdim(1)?.detach();
        let log_sum = (logits.broadcast_sub(&largest)?.exp()?.sum_keepdim(1)?.log()? + largest)?;
        let even = (log_sum - logits.mean_keepdim(1)?)?.sum_all()?;
        (formula(logits, targets)? * (1.0 - smoothing))? + (even * smoothing)?
    }

    /// Odd widths, more columns than one round of a block's threads, caps, biases, and a case without rows.
    #[test]
    fn the_kernels_equal_the_formula() -> Result<()> {
        judge::on_gpu(|gpu| {
            for (rows, width, vocab) in [(1, 3, 5), (7, 16, 131), (3, 8, 4200)] {
                for (scale, softcap, biased) in
                    [(1.0, None, false), (0.5, Some(2.0), false), (1.0, None, true)]
                {
                    on_gpu(gpu, (rows, width, vocab), scale, softcap, biased)?;
                }
            }
            let head = Head::plain(Weight::Dense(gpu.put(judge::random((9, 4), 1)?.as_tensor())?));
            let none = Tensor::zeros((1, 4), gpu.dtype, &gpu.device)?.narrow(0, 0, 0)?;
            assert_eq!(forward(&none, &head, &[], Precision::F32)?.value()?, 0.0);
            let hidden = Tensor::full(f32::NAN, (1, 4), &Device::Cpu)?;
            assert!(forward(&gpu.put(&hidden)?, &head, &[3], Precision::F32)?.value()?.is_nan());
            Ok(())
        })
    }

    fn on_gpu(
        gpu: &judge::Gpu,
        (rows, width, vocab): (usize, usize, usize),
        scale: f64,
        softcap: Option<f64>,
        biased: bool,
    ) -> Result<()> {
        let (hidden, weight) = (gpu.random((rows, width), 1)?, gpu.random((vocab, width), 2)?);
        let bias = gpu.random(vocab, 3)?;
        let mut logits = (hidden.matmul(&weight.t()?)? * scale)?;
        if biased {
            logits = logits.broadcast_add(&bias)?;
        }
        if let Some(cap) = softcap {
            logits = ((logits / cap)?.tanh()? * cap)?;
        }
        let targets: Vec<u32> = (0..rows).map(|i| ((i + 1) * 37 % vocab) as u32).collect();
        let expected = formula(&logits, &Tensor::new(targets.as_slice(), &Device::Cpu)?)?;
        let bias = if biased { Some(gpu.put_as(DType::F32, &bias)?) } else { None };
        let head =
            Head { weight: Weight::Dense(gpu.put(&weight)?), bias, scale, softcap, changes: Vec::new() };
        let goal = Goal::plain(0.25);
        let (loss, dh) = forward_backward(&gpu.put(&hidden)?, &head, &targets, goal, Precision::F32)?;
        let (loss, expected_loss) = (loss.value()?, expected.to_scalar::<f64>()?);
        // TOLERANCE: bf16 logits of a few units are rounded to 2^-8 of themselves.
        let tolerance = if gpu.dtype == DType::F32 { 1e-5 } else { 1e-2 };
        assert!((loss - expected_loss).abs() <= tolerance * expected_loss.max(1.0), "{loss} {expected_loss}");
        let (same, hits) = forward_counting(&gpu.put(&hidden)?, &head, &targets, Precision::F32)?;
        assert_eq!(same.value()?, loss);
        // Among logits that are equal in bf16, another one may be the largest in f64.
        if gpu.dtype == DType::F32 {
            assert_eq!(hits.value()?, hits_of(&logits, &targets)?);
        }
        let scale = Tensor::new(0.25f64, &Device::Cpu)?;
        gpu.within(tolerance, &dh, &judge::gradient(&hidden, &expected, &scale)?)?;
        let expected = smoothed_formula(&logits, &Tensor::new(targets.as_slice(), &Device::Cpu)?, 0.2)?;
        let goal = Goal { scale: 0.25, smoothing: 0.2 };
        let (loss, dh) = forward_backward(&gpu.put(&hidden)?, &head, &targets, goal, Precision::F32)?;
        let (loss, expected_loss) = (loss.value()?, expected.to_scalar::<f64>()?);
        assert!((loss - expected_loss).abs() <= tolerance * expected_loss.max(1.0), "{loss} {expected_loss}");
        gpu.within(tolerance, &dh, &judge::gradient(&hidden, &expected, &scale)?)
    }

    #[test]
    fn of_equal_logits_the_first_is_the_most_probable_one() -> Result<()> {
        let hidden = Tensor::zeros((3, 2), DType::F32, &Device::Cpu)?;
        let head = Head::plain(Weight::Dense(Tensor::ones((5, 2), DType::F32, &Device::Cpu)?));
        assert_eq!(forward_counting(&hidden, &head, &[0, 3, 4], Precision::F32)?.1.value()?, 1.0);
        judge::on_gpu(|gpu| {
            for vocab in [5usize, 1500] {
                let hidden = gpu.put(&Tensor::zeros((4, 2), DType::F32, &Device::Cpu)?)?;
                let ones = gpu.put(&Tensor::ones((vocab, 2), DType::F32, &Device::Cpu)?)?;
                let targets = [0, 3, vocab as u32 - 1, 0];
                for softcap in [None, Some(2.0)] {
                    let head = Head { softcap, ..Head::plain(Weight::Dense(ones.clone())) };
                    assert_eq!(forward_counting(&hidden, &head, &targets, Precision::F32)?.1.value()?, 2.0);
                }
            }
            Ok(())
        })
    }

    #[test]
    fn a_bad_logit_is_never_hidden() -> Result<()> {
        let hidden = Tensor::new(&[[1f32, f32::NAN]], &Device::Cpu)?;
        let head = Head::plain(Weight::Dense(Tensor::ones((40, 2), DType::F32, &Device::Cpu)?));
        assert!(forward(&hidden, &head, &[3], Precision::F32)?.value()?.is_nan());
        Ok(())
    }
}
