//! AdamW on one flat buffer (decoupled weight decay, Loshchilov and Hutter 2019), and the gradient's norm.
//!

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::cpu::{self, Real};
use crate::with_real;

/// Elements a task takes; sums are per chunk, then over chunks, so the result does not depend on threads.
const CHUNK: usize = 16_384;

/// One update's numbers.
#[derive(Clone, Copy, Debug)]
pub struct Update {
    pub learning_rate: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub weight_decay: f64,
    /// 1 for the first update.
    pub step: u64,
    /// Factor on the gradient: at most 1, from clipping.
    pub gradient_scale: f64,
}

/// The optimizer's memory: first and second moments, as long as the parameters.
#[derive(Clone, Debug)]
pub struct Moments {
    pub first: Tensor,
    pub second: Tensor,
}

impl Moments {
    pub fn zeros_like(params: &Tensor) -> Result<Moments> {
        Ok(Moments { first: params.zeros_like()?, second: params.zeros_like()? })
    }
}

/// Updates `params` and `moments` in place; the order of operations is torch's.
pub fn step(params: &Tensor, grads: &Tensor, moments: &Moments, update: &Update) -> Result<()> {
    with_real!(params, T => {
        let bias1 = 1.0 - update.beta1.powi(update.step as i32);
        let bias2 = 1.0 - update.beta2.powi(update.step as i32);
        let b2 = T::of(update.beta2);
        let (c1, c2) = (T::of(1.0 - update.beta1), T::of(1.0 - update.beta2));
        let decay = T::of(1.0 - update.learning_rate * update.weight_decay);
        let (rate, root2) = (T::of(update.learning_rate / bias1), T::of(bias2.sqrt()));
        let (eps, scale) = (T::of(update.epsilon), T::of(update.gradient_scale));
        let g = &*cpu::read::<T>(grads)?;
        cpu::edit(params, |p: &mut [T]| {
            cpu::edit(&moments.first, |m: &mut [T]| {
                cpu::edit(&moments.second, |v: &mut [T]| {
                    let moments = m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK)).zip(g.par_chunks(CHUNK));
                    p.par_chunks_mut(CHUNK).zip(moments).for_each(|(p, ((m, v), g))| {
                        cpu::vectorized(#[inline(always)] || {
                            for (((p, m), v), &g) in p.iter_mut().zip(m).zip(v).zip(g) {
                                let g = g * scale;
                                *m += (g - *m) * c1;
                                *v = *v * b2 + g * g * c2;
                                *p = *p * decay - rate * *m / (Real::sqrt(*v) / root2 + eps);
                            }
                        })
                    })
                })
            })
        })??
    })
}

/// Sum of squares, in f64.
pub fn sum_of_squares(grads: &Tensor) -> Result<f64> {
    with_real!(grads, T => {
        let grads = &*cpu::read::<T>(grads)?;
        let sum = |chunk: &[T]| chunk.iter().map(|g| g.wide() * g.wide()).sum::<f64>();
        Ok(grads.par_chunks(CHUNK).map(sum).collect::<Vec<f64>>().into_iter().sum())
    })
}
