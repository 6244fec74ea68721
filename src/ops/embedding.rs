//! Embedding: rows of a frozen table, widened to the type that the layers compute in.

use candle_core::{DType, Device, Result, Tensor};

/// table [V, C] in any float type, ids below V -> [ids, C] in `dtype` on `device`, times `factor`. The table may
/// stay on the host while the layers compute on a GPU, because a batch needs few of its rows.
pub fn forward(table: &Tensor, ids: &[u32], factor: f64, dtype: DType, device: &Device) -> Result<Tensor> {
    send(table, ids, factor, dtype, device)?.rows(table)
}

/// The copy that `forward` sends to the device.
#[derive(Clone)]
pub enum Sent {
    /// The rows: the table lies on the host, or the layers do.
    Rows(Tensor),
    /// Ids, the factor and the type of rows of a table on a GPU.
    #[cfg(feature = "cuda")]
    Ids(Tensor, f64, DType),
}

impl Sent {
    /// Returns the rows of the same table.
    pub fn rows(&self, table: &Tensor) -> Result<Tensor> {
        #[cfg(not(feature = "cuda"))]
        let _ = table;
        match self {
            Sent::Rows(rows) => Ok(rows.clone()),
            #[cfg(feature = "cuda")]
            Sent::Ids(ids, factor, dtype) => gpu::forward(table, ids, *factor, *dtype),
        }
    }
}

/// Does `forward` without the launch on a GPU, which `Sent::rows` asks for.
pub fn send(table: &Tensor, ids: &[u32], factor: f64, dtype: DType, device: &Device) -> Result<Sent> {
    let vocab = table.dim(0)?;
    assert!(ids.iter().all(|&id| (id as usize) < vocab), "token ids below {vocab}");
    #[cfg(feature = "cuda")]
    if table.device().is_cuda() {
        let ids = super::cuda::upload(ids, table.device())?;
        return Ok(Sent::Ids(ids, factor, dtype));
    }
    let found = table.index_select(&Tensor::new(ids, &Device::Cpu)?, 0)?;
    let found = found.to_dtype(dtype)?;
    let scaled = if factor == 1.0 { found } else { (found * factor)? };
    super::put(&scaled, device).map(Sent::Rows)
}

/// The launch of `kernels/embedding.cu`: one block per row.
#[cfg(feature = "cuda")]
mod gpu {
    use super::*;
    use crate::ops::cuda::{self, Launch};

    /// Returns rows of the table by ids, times `factor`, on the GPU.
    pub fn forward(table: &Tensor, ids: &Tensor, factor: f64, dtype: DType) -> Result<Tensor> {
        let (_, width) = table.dims2()?;
        let y = crate::ops::unwritten((ids.elem_count(), width), dtype, table.device())?;
        let name = format!("gather_{}", cuda::suffix(table.dtype())?);
        let launch = Launch::new(&y, "embedding", &name)?.of(table.dtype(), table).of(DType::U32, ids);
        launch.tensor(&y).int(width).float(factor).launch((ids.elem_count(), 1, 1), 128, 0)?;
        Ok(y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::judge;

    #[test]
    fn rows_of_a_table_on_either_side_are_the_same() -> Result<()> {
        judge::on_gpu(|gpu| {
            for (vocab, width) in [(1, 1), (9, 7), (40, 96)] {
                let ids: Vec<u32> = (0..65).map(|i| i * 7 % vocab as u32).collect();
                for stored in [DType::F32, DType::BF16] {
                    let table = judge::random((vocab, width), 1)?.to_dtype(stored)?.detach();
                    let expected = forward(&table, &ids, 0.75, DType::F64, &Device::Cpu)?;
                    for table in [table.clone(), table.to_device(&gpu.device)?] {
                        gpu.same(&forward(&table, &ids, 0.75, gpu.dtype, &gpu.device)?, &expected)?;
                    }
                }
            }
            Ok(())
        })
    }
}
