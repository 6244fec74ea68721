//! A checkpoint and adapters -> the values of the merged model's tensors, a block of rows at a time.
//!
//! A merged weight is `W + sum of strength * scale * B A`, in f32. With DoRA's magnitudes, an adapter alone would make
//! each row `magnitude / |row| * row` of `row = W + scale * B A`, and strength times the difference to W is added. W is
//! the checkpoint's own weight, or the one that the training computed with: quantised to 4 bits and dequantised again.

use rayon::prelude::*;

use crate::facts::sites::Table;
use crate::facts::{Facts, FourBitCode, Role};
use crate::fault::{Fault, Result};
use crate::model::lora::Pairs;
use crate::model::stored;
use crate::model::weights::{Checkpoint, beside_language};
use crate::ops::cpu;
use crate::ops::four_bit::FourBit;
use crate::ops::matmul::Weight;

/// LIMIT: values of a block.
const BLOCK_VALUES: usize = 4 << 20;

/// The model with the adapters in it.
pub struct Merged<'a> {
    /// The model.
    pub facts: &'a Facts,
    /// The model's weights.
    pub checkpoint: &'a Checkpoint,
    /// The type in which the training held the base, if the merged weights are to start from that.
    pub four_bit: Option<(FourBitCode, bool)>,
    pairs: Vec<(&'a Pairs, f64)>,
}

/// A tensor of the merged model.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    /// The name in the causal language model.
    pub name: String,
    /// [rows, cols], or one length.
    pub shape: Vec<usize>,
    /// The tensor's purpose.
    pub role: Role,
    /// The number of the linear layer, of a weight that adapters may change.
    pub linear: Option<usize>,
    /// The table of tokens, of which adapters may change rows.
    pub table: Option<Table>,
}

impl Item {
    /// Returns the number of values.
    pub fn values(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A and B of one adapter, B with its factor.
struct LowRank {
    rank: usize,
    a: Vec<f32>,
    b: Vec<f32>,
    /// DoRA's magnitudes, and the strength, which is no part of B's factor then.
    magnitudes: Option<(Vec<f32>, f64)>,
}

impl<'a> Merged<'a> {
    /// Returns the sum of a checkpoint and adapters with their strengths.
    pub fn new(
        facts: &'a Facts,
        checkpoint: &'a Checkpoint,
        four_bit: Option<(FourBitCode, bool)>,
        pairs: Vec<(&'a Pairs, f64)>,
    ) -> Merged<'a> {
        Merged { facts, checkpoint, four_bit, pairs }
    }

    /// Returns the language model's tensors in the order of computation.
    pub fn items(&self) -> Vec<Item> {
        let linears: std::collections::HashMap<String, usize> = self
            .facts
            .projections()
            .enumerate()
            .map(|(number, (layer, projection))| {
                (format!("{}.weight", self.facts.path(layer, projection)), number)
            })
            .collect();
        let table = |name: &str| match name {
            name if name == self.facts.names.embedding => Some(Table::Embedding),
            name if name.strip_suffix(".weight") == Some(self.facts.names.head) => Some(Table::Head),
            _ => None,
        };
        let item = |tensor: crate::facts::Stored| Item {
            linear: linears.get(&tensor.name).copied(),
            table: table(&tensor.name),
            name: tensor.name,
            shape: tensor.shape,
            role: tensor.role,
        };
        self.facts.tensors().into_iter().map(item).collect()
    }

    /// Returns tensors of other parts of a multimodal model, which stay as they are.
    pub fn beside(&self) -> Vec<String> {
        let names = self.checkpoint.names().filter(|name| beside_language(name));
        names.map(str::to_owned).collect()
    }

    /// Returns whether an adapter changes the item.
    pub fn is_changed(&self, item: &Item) -> bool {
        let used = || self.pairs.iter().filter(|(_, strength)| *strength != 0.0);
        item.linear.is_some_and(|linear| used().any(|(pairs, _)| pairs.get(linear).is_some()))
            || used().any(|(pairs, _)| pairs.tokens().iter().any(|rows| Some(rows.table) == item.table))
    }

    /// Gives the item's values to `take`, one block of whole rows after another.
    ///
    /// # Errors
    /// Model: the checkpoint is damaged, or its values are not finite. The fault of `take`.
    pub fn each_block(&self, item: &Item, mut take: impl FnMut(&[f32]) -> Result<()>) -> Result<()> {
        let cols = item.shape.last().copied().unwrap_or(1);
        let rows = item.values() / cols.max(1);
        let (low, rows_of_tokens) = (self.low_rank(item)?, self.rows_of_tokens(item)?);
        let block = (BLOCK_VALUES / cols.max(1)).max(1);
        let whole = self.dequantised(item)?;
        let stored = match &whole {
            Some(_) => None,
            None => Some(self.checkpoint.get(&item.name, &item.shape)?),
        };
        for from in (0..rows).step_by(block) {
            let to = rows.min(from + block);
            let mut values = match (&whole, &stored) {
                (Some(values), _) => values[from * cols..to * cols].to_vec(),
                (None, Some(stored)) => stored.part(from * cols..to * cols).to_f32(),
                (None, None) => unreachable!("one of them is there"),
            };
            match low.as_slice() {
                [] => {}
                [only] => only.add(&mut values, None, from, cols),
                several => {
                    let base = values.clone();
                    several.iter().for_each(|low| low.add(&mut values, Some(&base), from, cols));
                }
            }
            add_rows(&rows_of_tokens, &mut values, from, cols);
            if let Some(at) = values.par_iter().position_any(|value| !value.is_finite()) {
                let (name, value) = (&item.name, values[at]);
                return Err(Fault::model(format!("{name}: value {} is {value}", from * cols + at))
                    .help("the checkpoint or the adapter is damaged: download it again"));
            }
            take(&values)?;
        }
        Ok(())
    }

    /// Returns a weight that is or was held in 4 bits.
    fn dequantised(&self, item: &Item) -> Result<Option<Vec<f32>>> {
        let (Some(_), [rows, cols]) = (item.linear, item.shape.as_slice()) else { return Ok(None) };
        if stored::has(self.checkpoint, &item.name) {
            return Ok(Some(stored::weight(self.checkpoint, &item.name, *rows, *cols)?.dequantize()?));
        }
        let Some((code, double)) = self.four_bit else { return Ok(None) };
        let values = self.checkpoint.get(&item.name, &item.shape)?.to_f32();
        Ok(Some(FourBit::quantize(&values, *rows, *cols, code, double)?.dequantize()?))
    }

    /// Returns the trained rows of a table of tokens: (token, strength, row).
    fn rows_of_tokens(&self, item: &Item) -> Result<Vec<(usize, f64, Vec<f32>)>> {
        let mut list = Vec::new();
        for (pairs, strength) in self.pairs.iter().filter(|(_, strength)| *strength != 0.0) {
            for rows in pairs.tokens().iter().filter(|rows| Some(rows.table) == item.table) {
                let values: Vec<f32> =
                    cpu::to_f64(&rows.trained)?.into_iter().map(|value| value as f32).collect();
                let of_rows = rows.ids.iter().zip(values.chunks(values.len() / rows.ids.len()));
                list.extend(of_rows.map(|(id, row)| (*id as usize, *strength, row.to_vec())));
            }
        }
        Ok(list)
    }

    fn low_rank(&self, item: &Item) -> Result<Vec<LowRank>> {
        let Some(linear) = item.linear else { return Ok(Vec::new()) };
        let used = self.pairs.iter().filter(|(_, strength)| *strength != 0.0);
        let found = used.filter_map(|(pairs, strength)| Some((pairs.get(linear)?, strength)));
        let read = |weight: &Weight| match weight {
            Weight::Dense(tensor) => Ok(cpu::to_f64(tensor)?),
            Weight::FourBit(_) => Err(Fault::internal("an adapter's matrix in 4 bits")),
        };
        let low = found.map(|(pair, strength)| {
            let (factor, magnitudes) = match &pair.dora {
                None => (pair.scale * strength, None),
                Some(dora) => {
                    let values = cpu::to_f64(&dora.magnitude)?.into_iter().map(|value| value as f32);
                    (pair.scale, Some((values.collect(), *strength)))
                }
            };
            Ok(LowRank {
                magnitudes,
                rank: pair.a.dims().0,
                a: read(&pair.a)?.into_iter().map(|value| value as f32).collect(),
                b: read(&pair.b)?.into_iter().map(|value| (value * factor) as f32).collect(),
            })
        });
        low.collect()
    }
}

impl LowRank {
    /// Adds rows `from..` of the adapter's difference. `base` are the rows without any adapter, if they are no longer
    /// `values`.
    fn add(&self, values: &mut [f32], base: Option<&[f32]>, from: usize, cols: usize) {
        values.par_chunks_mut(cols).enumerate().for_each(|(row, values)| {
            let b = &self.b[(from + row) * self.rank..][..self.rank];
            let mut sum = vec![0f32; cols];
            for (b, a) in b.iter().zip(self.a.chunks(cols)) {
                sum.iter_mut().zip(a).for_each(|(sum, a)| *sum += b * a);
            }
            if let Some((magnitudes, strength)) = &self.magnitudes {
                let base = base.map_or(&*values, |base| &base[row * cols..][..cols]);
                with_magnitude(&mut sum, base, magnitudes[from + row], *strength);
            }
            values.iter_mut().zip(&sum).for_each(|(value, sum)| *value += sum);
        });
    }
}

/// Adds strength times the difference of each trained row to the checkpoint's, in rows `from..` of a table.
fn add_rows(trained: &[(usize, f64, Vec<f32>)], values: &mut [f32], from: usize, cols: usize) {
    let rows = from..from + values.len() / cols.max(1);
    let inside = || trained.iter().filter(|(token, ..)| rows.contains(token));
    let first: Vec<Vec<f32>> =
        inside().map(|(token, ..)| values[(token - from) * cols..][..cols].to_vec()).collect();
    for ((token, strength, row), frozen) in inside().zip(&first) {
        let to = &mut values[(token - from) * cols..][..cols];
        for ((to, trained), frozen) in to.iter_mut().zip(row).zip(frozen) {
            *to += (strength * f64::from(trained - frozen)) as f32;
        }
    }
}

/// Turns a row of `scale * B A` into what DoRA adds to the row of W. A row of zeros stays one.
fn with_magnitude(sum: &mut [f32], base: &[f32], magnitude: f32, strength: f64) {
    sum.iter_mut().zip(base).for_each(|(sum, base)| *sum += base);
    let length = sum.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
    let factor = if length > 0.0 { f64::from(magnitude) / length } else { 0.0 };
    for (sum, base) in sum.iter_mut().zip(base) {
        *sum = (strength * (factor * f64::from(*sum) - f64::from(*base))) as f32;
    }
}
