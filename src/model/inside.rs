//! Linear layers that read the same input, and their pairs in training -> one product in which LoRA lies inside the
//! frozen weight (`ops/low_rank.rs`), on a GPU; in 8 bits one product for the weights and a narrow one for the pairs,
//! onto the same sum. `spare` decides which layers do so; all others take the products of `lora.rs`, one after the
//! other.

use candle_core::Device;

use crate::facts::Precision;
use crate::ops::change::Change;
use crate::ops::fp8;

use super::linear::Linear;
use super::lora::Lora;
use super::pass::Pass;

/// Spare columns come in multiples of this. cuBLAS contracts in tiles of 64, so that fewer would cost as much, and rows
/// stay whole lines of 128 bytes.
pub const COLUMNS: usize = 64;
/// Most spare columns that pay: 2 R (N + K) FLOPs a token replace two passes over N + K values. Predicted from the
/// rates of an H100 (780 TFLOP/s, 2.6 TB/s), to be confirmed.
const COLUMNS_MAX: usize = 576;
/// Most layers side by side.
const PARTS_MAX: usize = 3;
/// Most ranks of a pair for one pass over a gradient: with more, its partial sums are as long as the gradient.
const BOTH_RANKS_MAX: usize = 16;
/// Most ranks of pairs side by side for one pass over a norm's input.
#[cfg(feature = "cuda")]
const NORMED_RANKS_MAX: usize = 64;

/// One of the linear layers that read the same input.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Member {
    /// Rows of its weight (N).
    pub rows: usize,
    /// Rank of its pair; 0 without one.
    pub rank: usize,
    /// Index of the pair's first element in the flat buffer.
    pub offset: usize,
    /// Whether its weight is not in 4 bits.
    pub dense: bool,
}

/// Returns the spare columns (R) that `tokens` rows of the layers' input and of their outputs' gradient have; 0 if LoRA
/// does not lie inside the product. `cols` is the width of the input (K).
///
/// Kernels move eight values at a time, which decides about odd widths. A weight in 4 bits is expanded for each product
/// anyway. A dense one is copied, which takes longer than the passes that it saves if there are few tokens.
pub fn spare(cols: usize, members: &[Member], tokens: usize) -> usize {
    let rows: usize = members.iter().map(|member| member.rows).sum();
    let ranks: usize = members.iter().map(|member| member.rank).sum();
    let columns = ranks.next_multiple_of(COLUMNS);
    let paired = || members.iter().filter(|member| member.rank > 0);
    let whole = cols.is_multiple_of(8) && rows.is_multiple_of(8);
    let whole = whole && paired().all(|member| member.offset.is_multiple_of(8));
    let copied: usize = members.iter().filter(|member| member.dense).map(|member| member.rows * cols).sum();
    let pays = columns <= COLUMNS_MAX && 2 * copied <= tokens * (rows + cols);
    match ranks > 0 && members.len() <= PARTS_MAX && whole && pays && Change::Inside.is_on() {
        true => columns,
        false => 0,
    }
}

/// Returns whether one pass over the gradient of layers gives both of its low-rank products. `shapes` has the rows of
/// each layer and the rank of its pair.
pub fn takes_both(bf16: bool, mut shapes: impl Iterator<Item = (usize, usize)>) -> bool {
    bf16 && Change::Both.is_on()
        && shapes.all(|(rows, rank)| rank <= BOTH_RANKS_MAX && rows.is_multiple_of(8))
}

/// Returns `spare` of layers in a pass over `tokens` rows on a device. On a CPU and without an adapter in training it
/// is 0.
pub fn spare_in(parts: &[Linear], tokens: usize, device: &Device, pass: &Pass) -> usize {
    let Lora::Training(training) = &pass.lora else { return 0 };
    let alike = parts.iter().all(|part| part.factor == parts[0].factor);
    // With products in 8 bits, the pairs have the same spare columns and products of their own beside the weight's.
    let takes = |part: &Linear| fp8::takes(part.weight.dims().0, part.weight.dims().1);
    let whole = pass.frozen != Precision::Fp8 || parts.iter().all(takes);
    // DoRA scales the product with the frozen weight, so that it needs it apart.
    if !device.is_cuda() || !whole || !alike || training.adapter.has_magnitudes() {
        return 0;
    }
    let members: Vec<Member> = parts.iter().map(|part| training.adapter.member(part)).collect();
    spare(parts[0].weight.dims().1, &members, tokens)
}

/// Returns whether kernels that make an operand of these layers write it in 8 bits too. They have whole rows, so that
/// only rows of whole groups of eight values count, which `fp8::takes` asks for.
pub fn rounded_in(parts: &[Linear], tokens: usize, device: &Device, pass: &Pass) -> bool {
    pass.frozen == Precision::Fp8 && Change::Rounded.is_on() && spare_in(parts, tokens, device, pass) > 0
}

#[cfg(feature = "cuda")]
pub(super) use gpu::Group;

/// The products.
#[cfg(feature = "cuda")]
mod gpu {
    use candle_core::{DType, Result, Tensor};

    use super::*;
    use crate::model::linear::columns;
    use crate::model::lora::Learner;
    use crate::model::norm::Normed;
    use crate::model::operand::Operand;
    use crate::ops::fp8::Scaled;
    use crate::ops::low_rank::{self, Columns, Inside, Learning, Slope};
    use crate::ops::matmul::{self, Weight};
    use crate::ops::{bias, dropout, rows, unwritten};

    /// Layers that read the same input and have LoRA inside their product.
    pub struct Group<'a> {
        parts: &'a [Linear],
        learners: Vec<Option<&'a Learner>>,
        /// Probability that an element of a pair's input is dropped, and the keys of the rows.
        dropout: Option<(f64, &'a Tensor)>,
        spare: usize,
        precision: Precision,
        /// Whether the products with the weights are in 8 bits. A pair would lose its updates in 8 bits, so it has
        /// products of its own.
        in_8_bits: bool,
    }

    impl<'a> Group<'a> {
        /// Returns the group, or `None` if the layers take the products of `lora.rs`. `x` has as many rows as their
        /// input.
        pub fn of(parts: &'a [Linear], x: &Tensor, pass: &Pass<'a>) -> Result<Option<Group<'a>>> {
            let (spare, Lora::Training(training)) =
                (spare_in(parts, x.dim(0)?, x.device(), pass), &pass.lora)
            else {
                return Ok(None);
            };
            let learners = parts.iter().map(|part| training.adapter.learner(part.site)).collect();
            let (adapter, precision) = (training.adapter, pass.precision);
            let dropout = training.dropout_keys.filter(|_| adapter.dropout > 0.0);
            let dropout = dropout.map(|keys| (adapter.dropout, keys));
            let in_8_bits = pass.frozen == Precision::Fp8;
            Ok((spare > 0).then_some(Group { parts, learners, dropout, spare, precision, in_8_bits }))
        }

        fn cols(&self) -> usize {
            self.parts[0].weight.dims().1
        }

        fn rows(&self) -> usize {
            self.parts.iter().map(|part| part.weight.dims().0).sum()
        }

        fn factor(&self) -> f64 {
            self.parts[0].factor
        }

        /// Returns the pairs, each with the first column of its layer and of its ranks.
        fn pairs(&self) -> impl Iterator<Item = (usize, usize, &'a Learner)> {
            let mut rank_at = 0;
            let with_ranks = columns(self.parts).zip(&self.learners).filter_map(move |((at, _), learner)| {
                let learner = (*learner)?;
                let from = rank_at;
                rank_at += learner.rank();
                Some((at, from, learner))
            });
            with_ranks.collect::<Vec<_>>().into_iter()
        }

        /// Returns rows of each layer and the rank of its pair.
        fn shapes(&self) -> impl Iterator<Item = (usize, usize)> {
            let rank = |learner: &Option<&Learner>| learner.map_or(0, Learner::rank);
            self.parts
                .iter()
                .zip(&self.learners)
                .map(move |(part, learner)| (part.weight.dims().0, rank(learner)))
        }

        /// Returns whether the gradients of A come from the input of a norm.
        fn takes_normed(&self, dy: &Tensor) -> bool {
            let fits = self.dropout.is_none() && self.ranks() <= NORMED_RANKS_MAX;
            fits && dy.dtype() == DType::BF16 && Change::Normed.is_on()
        }

        fn ranks(&self) -> usize {
            self.learners.iter().flatten().map(|learner| learner.rank()).sum()
        }

        fn inside(&self, dtype: DType, weights: bool) -> Result<Inside> {
            let part = |(part, learner): (&'a Linear, &Option<&'a Learner>)| low_rank::Part {
                weight: &part.weight,
                pair: learner.map(Learner::inside),
            };
            let parts: Vec<low_rank::Part> = self.parts.iter().zip(&self.learners).map(part).collect();
            match self.kept_expanded(dtype)? {
                Some(matrix) => Inside::on(matrix, &parts, self.spare),
                None => Inside::new(&parts, self.spare, dtype, weights),
            }
        }

        /// Returns the weights in full, if they are kept that way. The first one's place holds those of all parts.
        fn kept_expanded(&self, dtype: DType) -> Result<Option<Tensor>> {
            let Weight::FourBit(first) = &self.parts[0].weight else { return Ok(None) };
            if self.in_8_bits {
                return Ok(None);
            }
            let list: Vec<&Weight> = self.parts.iter().map(|part| &part.weight).collect();
            let shape = (self.rows() + self.spare, self.cols() + self.spare);
            first.expanded.kept(shape, dtype, || low_rank::expand(&list, self.spare, dtype))
        }

        /// Writes the outputs side by side to y [T, N], or adds to it. `x` [T, K + R] gets its low-rank product.
        pub fn forward(&self, operand: &Operand, y: &Tensor, add: bool) -> Result<()> {
            let x = &operand.values;
            let biased = self.parts.iter().filter(|part| part.bias.is_some()).count();
            let before = biased == self.parts.len();
            let biases = |add: bool| {
                columns(self.parts).try_for_each(|(at, part)| match &part.bias {
                    Some(bias) => bias::apply(bias, y, at, add),
                    None => Ok(()),
                })
            };
            if before {
                biases(add)?;
            }
            let rounded = self.rounded(operand)?;
            let inside = self.inside(x.dtype(), !self.in_8_bits)?;
            self.low_inside(&inside, x)?;
            let beta = if add || before { 1.0 } else { 0.0 };
            match rounded {
                None => inside.forward(x, self.factor(), y, beta)?,
                Some(rounded) => {
                    inside.beside(x, self.factor(), y, beta)?;
                    self.add_in_8_bits(&rounded, y)?;
                }
            }
            if before { Ok(()) } else { biases(true) }
        }

        /// Returns x in 8 bits, if the products are. If no kernel has rounded it, it is rounded while it may still be
        /// in the cache.
        fn rounded(&self, x: &Operand) -> Result<Option<Scaled>> {
            match x.rounded.first() {
                _ if !self.in_8_bits => Ok(None),
                Some(rounded) => Ok(Some(rounded.clone())),
                None => fp8::rows(&x.values, 0, self.cols()).map(Some),
            }
        }

        /// Adds the products of x with the weights alone to y [T, N].
        fn add_in_8_bits(&self, x: &Scaled, y: &Tensor) -> Result<()> {
            columns(self.parts)
                .try_for_each(|(at, part)| fp8::forward(x, &part.weight, part.factor, y, at, 1.0))
        }

        /// Writes the gradient of x through the weights alone to dx [T, K], or adds it.
        fn gradient_in_8_bits(&self, dy: &Operand, dx: &Tensor, add: bool) -> Result<()> {
            columns(self.parts).enumerate().try_for_each(|(number, (at, part))| {
                let dy = match dy.rounded.get(number) {
                    Some(rounded) => rounded.clone(),
                    None => fp8::rows(&dy.values, at, part.weight.dims().0)?,
                };
                let beta = if add || at > 0 { 1.0 } else { 0.0 };
                fp8::input_gradient(&dy, &part.weight, part.factor, dx, beta)
            })
        }

        /// Writes x A^T to the spare columns of x. With dropout each pair has an x of its own; the first one's product
        /// writes all columns, and those of the others follow.
        fn low_inside(&self, inside: &Inside, x: &Tensor) -> Result<()> {
            if self.dropout.is_none() {
                return inside.low(x);
            }
            for (number, (_, rank_at, learner)) in self.pairs().enumerate() {
                let columns = if number == 0 { self.spare } else { learner.rank() };
                inside.low_of(&self.seen(learner, x)?, x, rank_at, columns)?;
            }
            Ok(())
        }

        /// Returns the pair's input: x, or x after dropout.
        fn seen(&self, learner: &Learner, x: &Tensor) -> Result<Tensor> {
            match self.dropout {
                Some((p, keys)) => dropout::apply(x, p, keys, learner.mask),
                None => Ok(x.clone()),
            }
        }

        /// Returns the output of the only layer, added to `base` in memory of its own. `x` [T, K + R] gets its low-rank
        /// product.
        pub fn onto(&self, operand: &Operand, base: &Tensor) -> Result<Tensor> {
            let x = &operand.values;
            let rounded = self.rounded(operand)?;
            let inside = self.inside(x.dtype(), !self.in_8_bits)?;
            self.low_inside(&inside, x)?;
            if let Some(rounded) = rounded {
                let base = match &self.parts[0].bias {
                    None => base.clone(),
                    Some(bias) => bias::onto(bias, base)?,
                };
                let sum = inside.beside_onto(x, self.factor(), &base)?;
                self.add_in_8_bits(&rounded, &sum)?;
                return Ok(sum);
            }
            match &self.parts[0].bias {
                None => inside.onto(x, self.factor(), base),
                Some(bias) => {
                    let sum = bias::onto(bias, base)?;
                    inside.forward(x, self.factor(), &sum, 1.0)?;
                    Ok(sum)
                }
            }
        }

        /// Returns x A^T [T, sum of the ranks] in memory of its own, after `forward`.
        pub fn kept(&self, x: &Tensor) -> Result<Tensor> {
            rows::columns(x, self.cols(), self.ranks())
        }

        /// Adds the pairs' gradients to the flat buffer. If wanted, writes the gradient of x to `dx` [T, K]. dy [T, N +
        /// R] gets its low-rank product. `low` is the result of `kept`. Without it, x is the input of `forward`, or it
        /// is computed again.
        pub fn backward(
            &self,
            dy: &Operand,
            x: &Tensor,
            low: Option<&Tensor>,
            dx: Option<&Tensor>,
        ) -> Result<()> {
            let again;
            let low = match low {
                Some(low) => Columns { tensor: low, at: 0 },
                None if x.dim(1)? > self.cols() => Columns { tensor: x, at: self.cols() },
                None => {
                    again = self.low(x)?;
                    Columns { tensor: &again, at: 0 }
                }
            };
            self.over(dy, low, dx)?;
            self.below(&dy.values, x)
        }

        /// Does `backward` without the gradients of A, the only ones that need x.
        pub fn backward_input(&self, dy: &Operand, low: &Tensor, dx: &Tensor) -> Result<()> {
            self.over(dy, Columns { tensor: low, at: 0 }, Some(dx))
        }

        /// Adds the gradients of A, after `backward_input`.
        pub fn backward_pairs(&self, dy: &Tensor, x: &Tensor) -> Result<()> {
            self.below(dy, x)
        }

        /// Does `backward` for an input that a norm made. The input is computed again only if its factors are not
        /// enough.
        pub fn backward_normed(
            &self,
            dy: &Operand,
            input: Normed,
            low: Option<&Tensor>,
            dx: Option<&Tensor>,
        ) -> Result<()> {
            let learning = self.learning(|learner| (&learner.grad_a, self.factor()));
            let (Some(factors), Some(low), true) = (input.factors(), low, self.takes_normed(&dy.values))
            else {
                return self.backward(dy, &input.values()?, low, dx);
            };
            self.over(dy, Columns { tensor: low, at: 0 }, dx)?;
            let above = Columns { tensor: &dy.values, at: self.rows() };
            low_rank::normed_gradient(input.x, factors, above, &learning)
        }

        /// Makes the products that read dy: its low-rank product, the gradients of B, and the gradient of x.
        fn over(&self, operand: &Operand, low: Columns, dx: Option<&Tensor>) -> Result<()> {
            let dy = &operand.values;
            let inside = self.inside(dy.dtype(), dx.is_some() && !self.in_8_bits)?;
            let learning = self.learning(|learner| (&learner.grad_b, learner.pair.scale * self.factor()));
            if takes_both(dy.dtype() == DType::BF16, self.shapes()) {
                low_rank::both(&inside, dy, low, &learning)?;
            } else {
                inside.low_gradient(dy)?;
                for (at, rank_at, learner) in self.pairs() {
                    let (scale, beside) =
                        (learner.pair.scale * self.factor(), Columns { at: low.at + rank_at, ..low });
                    low_rank::gradient(Columns { tensor: dy, at }, beside, scale, &learner.grad_b)?;
                }
            }
            match (dx, self.dropout) {
                (None, _) => Ok(()),
                (Some(dx), None) if self.in_8_bits => {
                    inside.through(dy, 0, self.spare, self.factor(), dx)?;
                    self.gradient_in_8_bits(operand, dx, true)
                }
                (Some(dx), None) => inside.input_gradient(dy, self.factor(), dx, 0.0),
                (Some(dx), Some(_)) => {
                    match self.in_8_bits {
                        true => self.gradient_in_8_bits(operand, dx, false)?,
                        false => inside.input_gradient_apart(dy, self.factor(), dx)?,
                    }
                    self.pairs().try_for_each(|(_, rank_at, learner)| {
                        let through = unwritten(dx.shape(), dx.dtype(), dx.device())?;
                        inside.through(dy, rank_at, learner.rank(), self.factor(), &through)?;
                        rows::add(dx, &self.seen(learner, &through)?)
                    })
                }
            }
        }

        /// Adds the gradients of A from the low-rank product of dy.
        fn below(&self, dy: &Tensor, x: &Tensor) -> Result<()> {
            self.pairs().try_for_each(|(_, rank_at, learner)| {
                let above = Columns { tensor: dy, at: self.rows() + rank_at };
                let x = self.seen(learner, x)?;
                low_rank::gradient(above, Columns { tensor: &x, at: 0 }, self.factor(), &learner.grad_a)
            })
        }

        /// Returns the layers with one of their pairs' gradients and the factor on what is added to it.
        fn learning(&self, of: impl Fn(&'a Learner) -> (&'a Tensor, f64)) -> Vec<Learning<'a>> {
            let learning = |(part, learner): (&'a Linear, &Option<&'a Learner>)| Learning {
                rows: part.weight.dims().0,
                pair: learner.map(|learner| {
                    let (gradient, factor) = of(learner);
                    Slope { rank: learner.rank(), gradient, factor }
                }),
            };
            self.parts.iter().zip(&self.learners).map(learning).collect()
        }

        /// Returns `kept` from an x [T, K] without spare columns.
        fn low(&self, x: &Tensor) -> Result<Tensor> {
            let low = unwritten((x.dim(0)?, self.ranks()), x.dtype(), x.device())?;
            for (_, rank_at, learner) in self.pairs() {
                let x = self.seen(learner, x)?;
                matmul::forward(&x, &learner.pair.a, 1.0, &low, rank_at, 0.0, self.precision)?;
            }
            Ok(low)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spare_columns_are_where_they_pay() {
        let member = |rows, rank| Member { rows, rank, offset: 8, dense: false };
        assert_eq!(spare(3072, &[member(9216, 8)], 1), 64);
        assert_eq!(spare(4096, &[member(4096, 64), member(1024, 64), member(1024, 64)], 4096), 192);
        assert_eq!(spare(4096, &[member(4096, 0), member(1024, 16), member(1024, 0)], 4096), 64);
        assert_eq!(spare(3072, &[member(3072, 256)], 4096), 256);
        assert_eq!(spare(3072, &[member(3072, 0)], 4096), 0, "no pair");
        assert_eq!(spare(4096, &[member(4096, 256), member(1024, 256), member(1024, 256)], 4096), 0, "768");
        assert_eq!(spare(2050, &[member(64, 8)], 4096), 0, "columns that are no groups of eight");
        assert_eq!(spare(64, &[member(20, 8)], 4096), 0, "rows that are no groups of eight");
        assert_eq!(spare(64, &[Member { offset: 4, ..member(64, 8) }], 4096), 0, "A between two groups");
        let dense = Member { dense: true, ..member(4096, 8) };
        assert_eq!((spare(4096, &[dense], 4095), spare(4096, &[dense], 4096)), (0, 64), "a copy each time");
    }
}
