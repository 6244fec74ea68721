//! Cases of attention, forward and backward: one long example, eight packed ones; and the head widths of other
//! models. Of serving: rows that generate, over pages.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Result, Tensor};

use hone::facts::Precision;
use hone::facts::{Heads, Layout};
use hone::ops::attention::cached::{self, PAGE, Segment, Segments, Store};
use hone::ops::attention::{self, Packing};
use hone::ops::change::Change;
use hone::ops::rows;

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
        cases.extend(both(gpu, format!("{name}, {}", shape.name), heads, examples));
    }
    let contexts: &[(usize, usize)] =
        if gpu.small { &[(2, 69)] } else { &[(1, 256), (1, 4096), (32, 256), (32, 1024)] };
    cases.extend(
        contexts.iter().map(|&(sequences, context)| generating(gpu, shape, heads, sequences, context)),
    );
    if gpu.small {
        // A width that the kernels for Hopper serve.
        let heads = Heads { width: 64, scale: 0.125, ..heads };
        cases.extend(both(gpu, format!("heads of 64, {}", shape.name), heads, &whole));
    }
    // Llama-3.2-1B's heads, and a window at a width that has none above.
    if shape.name == "llama3.1-8b" {
        for (name, heads) in [
            ("heads of 64", Heads { width: 64, scale: 0.125, ..heads }),
            ("window 2047", Heads { window: Some(2047), ..heads }),
            ("heads of 256", Heads { query: 8, key: 2, width: 256, scale: 0.0625, ..heads }),
        ] {
            cases.extend(both(gpu, format!("{name}, {}", shape.name), heads, &whole));
        }
    }
    cases
}

/// Returns the forward and the backward pass; each also by the kernels for Hopper, if the card has passed their check.
fn both(gpu: &Gpu, name: String, heads: Heads, examples: &[Range<usize>]) -> Vec<Case> {
    if let Some(warning) = attention::prepare(&gpu.device, &heads, gpu.dtype) {
        println!("{warning}");
    }
    let mut cases = Vec::new();
    for backward in [false, true] {
        let case = || case(gpu, name.clone(), heads, examples.to_vec(), backward);
        if !attention::has_warpgroups(&gpu.device, &heads, gpu.dtype, backward) {
            cases.push(case());
            continue;
        }
        for (by, on) in [(", by warpgroups", true), (", for all cards", false)] {
            let Case { name, bytes, flops, exact, make, run, judge } = case();
            let run: crate::case::Run = Box::new(move |of| {
                Change::Hopper.set(on);
                let found = run(of);
                Change::Hopper.set(true);
                found
            });
            cases.push(Case { name: name + by, bytes, flops, exact, make, run, judge });
        }
    }
    cases
}

/// Makes qkv, and the inputs that the backward pass needs before it: the gradient of the output, the output, the
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

/// Returns one new row of each of several sequences over a context whose keys and values lie in pages: the same text in
/// all, each on pages of its own.
fn generating(gpu: &Gpu, shape: &Shape, heads: Heads, sequences: usize, context: usize) -> Case {
    let (device, dtype) = (gpu.device.clone(), gpu.dtype);
    let pages = context.div_ceil(PAGE);
    let segment = move |sequence: usize, rows: Range<usize>, start: usize| {
        let first = (sequence * pages) as u32;
        Segment { rows, start, pages: (first..first + pages as u32).collect() }
    };
    let store: Arc<Mutex<Option<Store>>> = Arc::default();
    let filled = store.clone();
    let seen = heads.window.unwrap_or(context).min(context);
    Case {
        name: format!("generating attention, {sequences} of {context}, {}", shape.name),
        bytes: (sequences * seen * Store::token_bytes(&heads, dtype)) as f64,
        flops: 0.0,
        exact: false,
        make: Box::new(move || {
            let gpu = Gpu { device: device.clone(), dtype, small: false };
            let text = gpu.random((context, heads.columns()), 1.0)?;
            let mut store = Store::new(sequences * pages, &heads, dtype, &device)?;
            for sequence in 0..sequences {
                store.write(&text, &heads, &Segments::new(&[segment(sequence, 0..context, 0)]))?;
            }
            *filled.lock().expect("one thread") = Some(store);
            let last = vec![(context - 1) as u32; sequences];
            Ok(vec![rows::gather(&text, &last)?, text].into())
        }),
        run: Box::new(move |of| {
            let store = store.lock().expect("one thread");
            let segments: Vec<Segment> = (0..sequences).map(|i| segment(i, i..i + 1, context - 1)).collect();
            let store = store.as_ref().expect("`make` came before");
            Ok(vec![cached::forward(&of[0], &heads, store, &Segments::new(&segments), Precision::Bf16)?])
        }),
        judge: Box::new(move |inputs, outputs| {
            let whole: Vec<Range<usize>> = std::iter::once(0..context).collect();
            let (group, width, last) = (heads.group(), heads.width, heads.key - 1);
            let one = Heads { query: group, key: 1, ..heads };
            let text = of_group(&heads, &wide(&inputs[1])?)?;
            let (expected, _) = attention::forward(&text, &one, &Packing::new(whole), Precision::F32)?;
            let expected = expected.narrow(0, context - 1, 1)?.broadcast_as((sequences, group * width))?;
            let found = wide(&outputs[0])?.narrow(1, last * group * width, group * width)?;
            Ok(vec![(found.contiguous()?, expected.contiguous()?)])
        }),
    }
}

fn wide(tensor: &Tensor) -> Result<Tensor> {
    tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64)
}

/// Returns the columns of the last key head, its query heads and its values.
fn of_group(heads: &Heads, tensor: &Tensor) -> Result<Tensor> {
    let (group, width, last) = (heads.group(), heads.width, heads.key - 1);
    let query = tensor.narrow(1, last * group * width, group * width)?;
    let key = tensor.narrow(1, (heads.query + last) * width, width)?;
    let value = tensor.narrow(1, (heads.query + heads.key + last) * width, width)?;
    Tensor::cat(&[query, key, value], 1)?.contiguous()
}

/// Returns the pairs of a row and a row that it attends to.
fn pairs(rows: usize, window: Option<usize>) -> f64 {
    let window = window.unwrap_or(rows).min(rows) as f64;
    window * (window + 1.0) / 2.0 + (rows as f64 - window) * window
}

/// Returns the last key head with its query heads, in f64: the operation on a matrix of just their columns.
fn judge(
    heads: &Heads,
    packing: &Packing,
    inputs: &Inputs,
    outputs: &[Tensor],
) -> Result<Vec<(Tensor, Tensor)>> {
    let (group, width, last) = (heads.group(), heads.width, heads.key - 1);
    let one = Heads { query: group, key: 1, ..*heads };
    let of_queries = |tensor: &Tensor| tensor.narrow(1, last * group * width, group * width)?.contiguous();
    let qkv = of_group(heads, &wide(&inputs[0])?)?;
    let (out, lse) = attention::forward(&qkv, &one, packing, Precision::F32)?;
    let Some(d_out) = inputs.tensors.get(1) else {
        let found = wide(&outputs[1])?.narrow(0, last * group, group)?;
        return Ok(vec![(of_queries(&wide(&outputs[0])?)?, out), (found.contiguous()?, lse)]);
    };
    let d_out = of_queries(&wide(d_out)?)?;
    let expected = attention::backward(&d_out, &qkv, &out, &lse, &one, packing, Precision::F32)?;
    Ok(vec![(of_group(heads, &wide(&outputs[0])?)?, expected)])
}
