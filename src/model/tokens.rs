//! Trained rows of the embedding and of the output head in a pass: PEFT's `trainable_token_indices`.
//!
//! In training, a trained row stands in the place of the frozen one, so that it also gets the gradient of every token
//! that is not the target. A finished adapter has the differences to the frozen rows, which are added with a strength.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use candle_core::{DType, Device, Result, Tensor};

use crate::facts::sites::{Table, TokenRows};
use crate::ops::cross_entropy::{Change, Head};
use crate::ops::flat;
use crate::ops::matmul::Weight;
use crate::ops::tokens::{self, Places};

use super::decoder::Decoder;
use super::lora::{Lora, Mixture, Trainable};

/// Trained rows of one table: views into the flat buffers.
#[derive(Clone, Debug)]
pub(super) struct Learner {
    /// The rows that passes compute with, [ids, C].
    pub rows: Tensor,
    /// The gradient of the rows.
    pub gradient: Tensor,
}

/// Trained rows of a finished adapter.
#[derive(Clone, Debug)]
pub struct FinishedRows {
    /// The table.
    pub table: Table,
    /// The tokens, in the order of their rows.
    pub ids: Vec<u32>,
    /// The rows [ids, C] on the host.
    pub trained: Tensor,
    /// The differences to the frozen rows, in the type and on the device of activations.
    difference: Arc<OnceLock<Tensor>>,
}

impl FinishedRows {
    /// Returns rows whose differences to the frozen ones are computed at their first use.
    pub fn new(table: Table, ids: Vec<u32>, trained: Tensor) -> FinishedRows {
        FinishedRows { table, ids, trained, difference: Arc::default() }
    }

    /// Returns the number of bytes of the rows and of their differences.
    pub fn bytes(&self) -> usize {
        2 * self.trained.elem_count() * self.trained.dtype().size_in_bytes()
    }
}

impl Decoder {
    /// Returns the frozen rows of a table, in f32 (f64 in tests), on the host.
    pub fn token_rows(&self, table: Table, ids: &[u32]) -> Result<Tensor> {
        let from = match (table, &self.head.weight) {
            (Table::Embedding, _) => &self.embedding,
            (Table::Head, Weight::Dense(weight)) => weight,
            (Table::Head, Weight::FourBit(_)) => candle_core::bail!("an output head in 4 bits"),
        };
        let dtype = if self.dtype == DType::F64 { DType::F64 } else { DType::F32 };
        crate::ops::embedding::forward(from, ids, 1.0, dtype, from.device())?.to_device(&Device::Cpu)
    }

    /// Sets the trained rows to the frozen ones.
    pub(super) fn begin_token_rows(&self, adapter: &Trainable) -> Result<()> {
        for of in &adapter.tokens {
            let values = self.token_rows(of.table, &of.ids)?.flatten_all()?;
            let target = adapter.params.narrow(0, of.offset, values.elem_count())?;
            flat::write(&target, &values.to_dtype(target.dtype())?)?;
        }
        adapter.refresh()
    }

    /// `trained - frozen`, in the type and on the device of activations.
    fn difference<'a>(&self, of: &'a FinishedRows) -> Result<&'a Tensor> {
        if of.difference.get().is_none() {
            let frozen = self.token_rows(of.table, &of.ids)?;
            let difference = (of.trained.to_dtype(frozen.dtype())? - frozen)?;
            // Two threads may compute it at once: either is right.
            let _ = of.difference.set(difference.to_dtype(self.dtype)?.to_device(&self.device)?);
        }
        Ok(of.difference.get().expect("just computed"))
    }

    /// Puts the adapters' rows into embeddings x [T, C] of tokens.
    pub(super) fn embed_trained(&self, x: &Tensor, ids: &[u32], lora: &Lora) -> Result<()> {
        let factor = self.embedding_factor();
        match lora {
            Lora::None => Ok(()),
            Lora::Training(training) => match training.adapter.rows_of(Table::Embedding) {
                None => Ok(()),
                Some((of, learner)) => {
                    tokens::place(x, &learner.rows, &Places::of(ids, &of.ids), factor, false)
                }
            },
            Lora::Mixed(mixture) => mixture.token_parts(|rows, strength, of| match of.table {
                Table::Head => Ok(()),
                Table::Embedding => {
                    let places = Places::of(&ids[rows.clone()], &of.ids);
                    let x = x.narrow(0, rows.start, rows.len())?;
                    tokens::place(&x, self.difference(of)?, &places, factor * strength, true)
                }
            }),
        }
    }

    /// Adds the gradient `d` of the embeddings to that of the trained rows.
    pub(super) fn collect_embedding(&self, d: &Tensor, ids: &[u32], adapter: &Trainable) -> Result<()> {
        match adapter.rows_of(Table::Embedding) {
            None => Ok(()),
            Some((of, learner)) => {
                let places = Places::of(ids, &of.ids);
                tokens::collect(d, &places, self.embedding_factor(), &learner.gradient)
            }
        }
    }

    /// Returns the output head with the rows of these adapters. `wanted`: the rows of the pass that reach it,
    /// ascending.
    pub(super) fn head_with(&self, lora: &Lora, wanted: Wanted) -> Result<Head> {
        let mut head = self.head.clone();
        match lora {
            Lora::None => {}
            Lora::Training(training) => {
                let table = if self.facts.tied_head { Table::Embedding } else { Table::Head };
                if let Some((of, learner)) = training.adapter.rows_of(table) {
                    head.changes.push(Change {
                        rows: 0..wanted.count(),
                        ids: of.ids.clone(),
                        weight: Weight::Dense(learner.rows.clone()),
                        gradient: Some(learner.gradient.clone()),
                        strength: None,
                    });
                }
            }
            Lora::Mixed(mixture) => mixture.token_parts(|rows, strength, of| {
                let rows = wanted.within(&rows);
                if (of.table == Table::Head || self.facts.tied_head) && !rows.is_empty() {
                    head.changes.push(Change {
                        rows,
                        ids: of.ids.clone(),
                        weight: Weight::Dense(self.difference(of)?.clone()),
                        gradient: None,
                        strength: Some(strength),
                    });
                }
                Ok(())
            })?,
        }
        Ok(head)
    }
}

/// The rows of a pass that reach the output head.
#[derive(Clone, Copy)]
pub(super) enum Wanted<'a> {
    /// All rows, of this number.
    All(usize),
    /// These, ascending.
    Some(&'a [u32]),
}

impl Wanted<'_> {
    fn count(self) -> usize {
        match self {
            Wanted::All(count) => count,
            Wanted::Some(rows) => rows.len(),
        }
    }

    /// Returns the rows that reach the head and lie in a range of the pass.
    fn within(self, range: &Range<usize>) -> Range<usize> {
        match self {
            Wanted::All(_) => range.clone(),
            Wanted::Some(rows) => {
                let at = |end: usize| rows.partition_point(|row| (*row as usize) < end);
                at(range.start)..at(range.end)
            }
        }
    }
}

impl Trainable {
    /// Returns the trained rows of a table, if there are any.
    pub(super) fn rows_of(&self, table: Table) -> Option<(&TokenRows, &Learner)> {
        self.tokens.iter().zip(&self.token_learners).find(|(rows, _)| rows.table == table)
    }

    /// Returns the rows of a table as a view [ids, C] of one of the flat buffers.
    pub fn token_view(&self, flat: &Tensor, of: &TokenRows) -> Result<Tensor> {
        view(flat, of)
    }
}

/// Returns the rows of a table as a view [ids, C] of a flat buffer.
pub(super) fn view(flat: &Tensor, of: &TokenRows) -> Result<Tensor> {
    flat.narrow(0, of.offset, of.values().len())?.reshape((of.ids.len(), of.width))
}

impl Mixture<'_> {
    /// Calls `body` with the rows, the strength and the differences of each part that has some.
    fn token_parts(
        &self,
        mut body: impl FnMut(Range<usize>, f64, &FinishedRows) -> Result<()>,
    ) -> Result<()> {
        for part in self.parts().iter().filter(|part| part.strength != 0.0 && !part.rows.is_empty()) {
            for of in part.adapter.tokens() {
                body(part.rows.clone(), part.strength, of)?;
            }
        }
        Ok(())
    }
}
