//! Cases of attention, forward and backward: one long example, eight packed ones; and the head widths of other models.

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor};

use hone::facts::Precision;
use hone::facts::{Heads, Layout};
use hone::ops::attention::{self, Packing};

use crate::case::{Case, Gpu, Inputs};
use crate::shapes::Shape;

pub fn cases(gpu: &Gpu, shape: &Shape) -> Vec<Case> {
    let heads = Heads {
        query: shape.query,
        key: shape.key,
        width: shape.head,
        scale: (shape.head as f64).sqrt().recip(),
        window: shape.window,
        softcap: None,
        layout: Layout::Blocked,
    };
    let tokens = shape.tokens;
    let eighth = |i: usize| tokens * i / 8;
    let packed: Vec<Range<usize>> = (0..8).map(|i| eighth(i)..eighth(i + 1)).collect();
    let whole: Vec<Range<usize>> = std::iter::once(0..tokens).collect();
    let mut cases = Vec::new();
    for (name, examples) in [("one example", &whole), ("8 examples", &packed)] {
        for backward in [false, true] {
            cases.push(case(gpu, format!("{name}, {}", shape.name), heads, examples.clone(), backward));
        }
    }
    // Llama-3.2-1B's heads, and a window at a width that has none above.
    if shape.name == "llama3.1-8b" {
        for (name, heads) in [
            ("heads of 64", Heads { width: 64, scale: 0.125, ..heads }),
            ("window 2047", Heads { window: Some(2047), ..heads }),
        ] {
            for backward in [false, true] {
                cases.push(case(gpu, format!("{name}, {}", shape.name), heads, whole.clone(), backward));
            }
        }
    }
    cases
}

/// qkv, and the inputs that the backward pass needs before it: the gradient of the output, the output, the
/// logsumexp.
fn case(gpu: &Gpu, name: String, heads: Heads, examples: Vec<Range<usize>>, backward: bool) -> Case {
    let tokens = examples.last().map_or(0, |example| example.end);
    let (device, dtype) = (gpu.device.clone(), gpu.dtype);
    let pairs: f64 = examples.iter().map(|example| pairs(example.len(), heads.window)).sum();
    // Two products for every pair forward, five backward.
    let products = if backward { 5.0 } else { 2.0 };
    let out = heads.query * heads.width;
    let elements = tokens * if backward { 2 * heads.columns() + 2 * out } else { heads.columns() + out };
    let packing = std::sync::Arc::new(Packing::new(examples));
    let (for_make, for_judge) = (packing.clone(), packing.clone());
    Case {
        name: format!("attention{}, {name}", if backward { " gradient" } else { "" }),
        bytes: (elements * dtype.size_in_bytes()) as f64,
        flops: 2.0 * products * pairs * (heads.query * heads.width) as f64,
        exact: false,
        make: Box::new(move || {
            let gpu = Gpu { device: device.clone(), dtype, small: false };
            let qkv = gpu.random((tokens, heads.columns()), 1.0)?;
            if !backward {
                return Ok(vec![qkv].into());
            }
            let (out, lse) = attention::forward(&qkv, &heads, &for_make, Precision::Bf16)?;
            Ok(vec![qkv, gpu.random(out.shape(), 1.0)?, out, lse].into())
        }),
        run: Box::new(move |of| match of.tensors.as_slice() {
            [qkv] => {
                attention::forward(qkv, &heads, &packing, Precision::Bf16).map(|(out, lse)| vec![out, lse])
            }
            [qkv, d_out, out, lse] => {
                Ok(vec![attention::backward(d_out, qkv, out, lse, &heads, &packing, Precision::Bf16)?])
            }
            _ => unreachable!("as `make` made them"),
        }),
        judge: Box::new(move |inputs, outputs| judge(&heads, &for_judge, inputs, outputs)),
    }
}

/// Pairs of a row and a row that it attends to.
fn pairs(rows: usize, window: Option<usize>) -> f64 {
    let window = window.unwrap_or(rows).min(rows) as f64;
    window * (window + 1.0) / 2.0 + (rows as f64 - window) * window
}

/// The last key head with its query heads, in f64: the operation on a matrix of just their columns.
fn judge(
    heads: &Heads,
    packing: &Packing,
    inputs: &Inputs,
    outputs: &[Tensor],
) -> Result<Vec<(Tensor, Tensor)>> {
    let (group, width, last) = (heads.group(), heads.width, heads.key - 1);
    let one = Heads { query: group, key: 1, ..*heads };
    let wide = |tensor: &Tensor| tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64);
    let of_queries = |tensor: &Tensor| tensor.narrow(1, last * group * width, group * width)?.contiguous();
    let of_group = |tensor: &Tensor| {
        let key = tensor.narrow(1, (heads.query + last) * width, width)?;
        let value = tensor.narrow(1, (heads.query + heads.key + last) * width, width)?;
        Tensor::cat(&[of_queries(tensor)?, key, value], 1)
    };
    let qkv = of_group(&wide(&inputs[0])?)?;
    let (out, lse) = attention::forward(&qkv, &one, packing, Precision::F32)?;
    let Some(d_out) = inputs.tensors.get(1) else {
        let found = wide(&outputs[1])?.narrow(0, last * group, group)?;
        return Ok(vec![(of_queries(&wide(&outputs[0])?)?, out), (found.contiguous()?, lse)]);
    };
    let d_out = of_queries(&wide(d_out)?)?;
    let expected = attention::backward(&d_out, &qkv, &out, &lse, &one, packing, Precision::F32)?;
    Ok(vec![(of_group(&wide(&outputs[0])?)?, expected)])
}
