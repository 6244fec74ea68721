//! Embedding: rows of a table, widened to the type the layers compute in. The table is frozen.

use candle_core::{DType, Device, Result, Tensor};

/// table [V, C] in any float type, ids below V -> [ids, C] in `dtype`.
pub fn forward(table: &Tensor, ids: &[u32], dtype: DType) -> Result<Tensor> {
    let ids = Tensor::new(ids, &Device::Cpu)?.to_device(table.device())?;
    table.index_select(&ids, 0)?.to_dtype(dtype)
}
