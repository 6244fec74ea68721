//! Trained rows of a token table among its frozen ones: embeddings and logits of some tokens are replaced, or something
//! is added to them, and their gradients are collected. PEFT's `trainable_token_indices`.

use candle_core::{Result, Tensor};

use super::cpu::{self, Real};
use crate::with_real;

/// The places of tokens with trained rows: (row of the activations, number of the trained row), by trained row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Places(Vec<(u32, u32)>);

impl Places {
    /// Returns the places of the tokens `ids`, whose trained rows are in that order, among the tokens of a pass.
    pub fn of(tokens: &[u32], ids: &[u32]) -> Places {
        let number: std::collections::HashMap<u32, u32> = ids.iter().copied().zip(0..).collect();
        let found = tokens.iter().zip(0..).filter_map(|(token, row)| Some((row, *number.get(token)?)));
        let mut places: Vec<(u32, u32)> = found.collect();
        places.sort_by_key(|(row, number)| (*number, *row));
        Places(places)
    }

    /// Returns whether no token has a trained row.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the places in these rows, counted from the first of them.
    pub fn within(&self, rows: &std::ops::Range<usize>) -> Places {
        let inside = self.0.iter().filter(|(row, _)| rows.contains(&(*row as usize)));
        Places(inside.map(|(row, number)| (row - rows.start as u32, *number)).collect())
    }

    /// Returns the first place of each trained row, and the end.
    #[cfg(feature = "cuda")]
    fn starts(&self) -> Vec<u32> {
        let first = |at: &usize| *at == 0 || self.0[*at].1 != self.0[at - 1].1;
        (0..self.0.len()).filter(first).chain([self.0.len()]).map(|at| at as u32).collect()
    }

    #[cfg(feature = "cuda")]
    fn flat(&self) -> Vec<u32> {
        self.0.iter().flat_map(|(row, number)| [*row, *number]).collect()
    }
}

/// Writes `factor * rows` over the embeddings [T, C] at the places, or adds it.
pub fn place(to: &Tensor, rows: &Tensor, places: &Places, factor: f64, add: bool) -> Result<()> {
    let (width, (_, row_width)) = (to.dims2()?.1, rows.dims2()?);
    assert_eq!(width, row_width, "widths of embeddings");
    if places.is_empty() {
        return Ok(());
    }
    #[cfg(feature = "cuda")]
    if to.device().is_cuda() {
        return gpu::place(to, rows, places, factor, add);
    }
    with_real!(to, T => {
        let (rows, factor) = (&*cpu::read::<T>(rows)?, T::of(factor));
        cpu::edit(to, |to: &mut [T]| {
            for (row, number) in &places.0 {
                let to = &mut to[*row as usize * width..][..width];
                for (to, value) in to.iter_mut().zip(&rows[*number as usize * width..][..width]) {
                    *to = if add { *to + factor * *value } else { factor * *value };
                }
            }
        })
    })
}

/// Adds `factor` times the gradient `d` [T, C or wider] of the embeddings at the places to the rows' gradient.
pub fn collect(d: &Tensor, places: &Places, factor: f64, gradient: &Tensor) -> Result<()> {
    let (stride, (_, width)) = (d.dims2()?.1, gradient.dims2()?);
    assert!(width <= stride, "{width} columns of {stride}");
    if places.is_empty() {
        return Ok(());
    }
    #[cfg(feature = "cuda")]
    if d.device().is_cuda() {
        return gpu::collect(d, places, factor, gradient);
    }
    with_real!(d, T => {
        let (d, factor) = (&*cpu::read::<T>(d)?, T::of(factor));
        cpu::edit(gradient, |gradient: &mut [T]| {
            for (row, number) in &places.0 {
                let to = &mut gradient[*number as usize * width..][..width];
                to.iter_mut().zip(&d[*row as usize * stride..][..width]).for_each(|(to, d)| *to += factor * *d);
            }
        })
    })
}

/// Writes values [rows, ids] over the columns `ids` of logits, or adds them.
pub fn put(logits: &Tensor, values: &Tensor, ids: &[u32], add: bool) -> Result<()> {
    let ((rows, width), (value_rows, count)) = (logits.dims2()?, values.dims2()?);
    assert!(
        rows == value_rows && count == ids.len() && ids.iter().all(|&id| (id as usize) < width),
        "{count} of {value_rows} rows into {rows}x{width}"
    );
    #[cfg(feature = "cuda")]
    if logits.device().is_cuda() {
        return gpu::put(logits, values, ids, add);
    }
    with_real!(logits, T => {
        let values = &*cpu::read::<T>(values)?;
        cpu::edit(logits, |logits: &mut [T]| {
            for (logits, values) in logits.chunks_mut(width).zip(values.chunks(count)) {
                for (&id, &value) in ids.iter().zip(values) {
                    let logit = &mut logits[id as usize];
                    *logit = if add { *logit + value } else { value };
                }
            }
        })
    })
}

/// Returns the columns `ids` of the gradient of logits, [rows, ids], which become 0 there.
pub fn take(logits: &Tensor, ids: &[u32]) -> Result<Tensor> {
    let ((rows, width), count) = (logits.dims2()?, ids.len());
    assert!(ids.iter().all(|&id| (id as usize) < width), "ids below {width}");
    #[cfg(feature = "cuda")]
    if logits.device().is_cuda() {
        return gpu::take(logits, ids);
    }
    with_real!(logits, T => {
        let taken = cpu::edit(logits, |logits: &mut [T]| {
            let of_row = |logits: &mut [T]| {
                let zero = <T as Real>::ZERO;
                ids.iter().map(|&id| std::mem::replace(&mut logits[id as usize], zero)).collect::<Vec<T>>()
            };
            logits.chunks_mut(width).flat_map(of_row).collect::<Vec<T>>()
        })?;
        cpu::tensor(taken, (rows, count))
    })
}

/// The launches of `kernels/tokens.cu`.
#[cfg(feature = "cuda")]
mod gpu {
    use super::*;
    use crate::ops::cuda::{Launch, upload};
    use crate::ops::unwritten;
    use candle_core::DType;

    const THREADS: usize = 128;

    /// Adds or stores the rows at their places, with one block for each place.
    pub fn place(to: &Tensor, rows: &Tensor, places: &Places, factor: f64, add: bool) -> Result<()> {
        let at = upload(&places.flat(), to.device())?;
        let launch = Launch::new(to, "tokens", "place")?.anywhere(to.dtype(), rows).of(DType::U32, &at);
        let launch = launch.anywhere(to.dtype(), to).int(to.dims2()?.1).float(factor).int(usize::from(add));
        launch.launch((places.0.len(), 1, 1), THREADS, 0)
    }

    /// Adds up the gradients of the trained rows, with one block for each row that stands somewhere.
    pub fn collect(d: &Tensor, places: &Places, factor: f64, gradient: &Tensor) -> Result<()> {
        let starts = places.starts();
        let (at, begins) = (upload(&places.flat(), d.device())?, upload(&starts, d.device())?);
        let launch = Launch::new(d, "tokens", "collect")?.anywhere(d.dtype(), d).of(DType::U32, &at);
        let launch = launch.of(DType::U32, &begins).anywhere(DType::F32, gradient);
        let launch = launch.int(gradient.dims2()?.1).int(d.dims2()?.1).float(factor);
        launch.launch((starts.len() - 1, 1, 1), THREADS, 0)
    }

    /// Puts values into the columns `ids` of the logits, with one block for each row.
    pub fn put(logits: &Tensor, values: &Tensor, ids: &[u32], add: bool) -> Result<()> {
        let ((rows, width), ids) = (logits.dims2()?, upload(ids, logits.device())?);
        let launch = Launch::new(logits, "tokens", "put")?.tensor(values).of(DType::U32, &ids);
        let launch = launch.anywhere(logits.dtype(), logits).int(ids.elem_count()).int(width);
        launch.int(usize::from(add)).launch((rows, 1, 1), THREADS, 0)
    }

    /// Takes the columns `ids` of the logits, with one block for each row.
    pub fn take(logits: &Tensor, ids: &[u32]) -> Result<Tensor> {
        let (rows, width) = logits.dims2()?;
        let values = unwritten((rows, ids.len()), logits.dtype(), logits.device())?;
        let ids = upload(ids, logits.device())?;
        let launch =
            Launch::new(logits, "tokens", "take")?.anywhere(logits.dtype(), logits).of(DType::U32, &ids);
        launch.tensor(&values).int(ids.elem_count()).int(width).launch((rows, 1, 1), THREADS, 0)?;
        Ok(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::judge;
    use candle_core::{DType, Device};

    const TOKENS: [u32; 7] = [4, 9, 4, 0, 2, 9, 9];
    const IDS: [u32; 3] = [9, 1, 4];

    #[test]
    fn places_are_found_in_the_order_of_the_rows() {
        assert_eq!(Places::of(&TOKENS, &IDS), Places(vec![(1, 0), (5, 0), (6, 0), (0, 2), (2, 2)]));
        assert_eq!(Places::of(&TOKENS, &IDS).within(&(1..3)), Places(vec![(0, 0), (1, 2)]));
        assert!(Places::of(&TOKENS, &[7]).is_empty());
    }

    /// Placing is `x = select(x, rows)`, whose gradient `collect` is; put and take are one another's gradient.
    #[test]
    fn gradients_are_those_of_the_formula() -> Result<()> {
        let places = Places::of(&TOKENS, &IDS);
        let (rows, x) = (judge::random((3, 5), 1)?, judge::random((7, 5), 2)?);
        let mut parts = Vec::new();
        for (row, token) in TOKENS.iter().enumerate() {
            parts.push(match IDS.iter().position(|id| id == token) {
                Some(number) => (rows.narrow(0, number, 1)? * 1.5)?,
                None => x.narrow(0, row, 1)?,
            });
        }
        let expected = Tensor::cat(&parts, 0)?;
        let found = x.copy()?;
        place(&found, &rows, &places, 1.5, false)?;
        judge::same(&found, &expected, 1e-15)?;
        let (d, gradient) = (judge::random((7, 5), 3)?, Tensor::zeros((3, 5), DType::F64, &Device::Cpu)?);
        collect(&d, &places, 1.5, &gradient)?;
        judge::same(&gradient, &judge::gradient(&rows, &expected, &d)?, 1e-12)?;
        let (logits, values) = (judge::random((4, 11), 4)?, judge::random((4, 3), 5)?);
        let written = logits.copy()?;
        put(&written, &values, &IDS, false)?;
        judge::same(&take(&written, &IDS)?, &values, 0.0)?;
        put(&written, &values, &IDS, true)?;
        let (a, b) = (written.copy()?, logits.copy()?);
        judge::same(&take(&a, &IDS)?, &values, 0.0)?;
        take(&b, &IDS)?;
        judge::same(&a, &b, 0.0)
    }

    #[test]
    fn the_kernels_equal_the_host() -> Result<()> {
        judge::on_gpu(|gpu| {
            let places = Places::of(&TOKENS, &IDS);
            for width in [1, 7, 200] {
                let (rows, x) = (gpu.random((3, width), 1)?, gpu.random((7, width), 2)?);
                for add in [false, true] {
                    let (found, expected) = (gpu.put(&x)?, x.copy()?);
                    place(&found, &gpu.put(&rows)?, &places, 0.5, add)?;
                    place(&expected, &rows, &places, 0.5, add)?;
                    gpu.same(&found, &expected)?;
                }
                let gradient = Tensor::ones((3, width), DType::F64, &Device::Cpu)?;
                let found = gpu.put_as(DType::F32, &gradient)?;
                let wide = Tensor::cat(&[x.as_tensor(), &x.narrow(1, 0, 1)?], 1)?;
                collect(&gpu.put(&wide)?, &places, 0.5, &found)?;
                collect(&x, &places, 0.5, &gradient)?;
                gpu.same(&found, &gradient)?;
            }
            for (rows, width) in [(1, 10), (5, 300)] {
                let (logits, values) = (gpu.random((rows, width), 3)?, gpu.random((rows, 3), 4)?);
                for add in [false, true] {
                    let (found, expected) = (gpu.put(&logits)?, logits.copy()?);
                    put(&found, &gpu.put(&values)?, &IDS, add)?;
                    put(&expected, &values, &IDS, add)?;
                    gpu.same(&found, &expected)?;
                    gpu.same(&take(&found, &IDS)?, &take(&expected, &IDS)?)?;
                    gpu.same(&found, &expected)?;
                }
            }
            Ok(())
        })
    }
}
