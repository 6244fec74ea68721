//! Cases of 4-bit weights, products with them, LoRA's products, and the loss over the output head.

use candle_core::{DType, Device, Result, Tensor};

use hone::facts::Precision;
use hone::facts::quantization::Code;
use hone::ops::cross_entropy::{self, Head};
use hone::ops::four_bit::{Absmax, FourBit};
use hone::ops::matmul::{self, Weight};
use hone::ops::unwritten;

use crate::case::{Case, Gpu, Inputs};
use crate::rows::sample;
use crate::shapes::Shape;

/// LoRA's rank.
const RANK: usize = 16;

pub fn cases(gpu: &Gpu, shape: &Shape) -> Vec<Case> {
    let Shape { width, feed_forward, query, key, head, .. } = *shape;
    let gate_up = (2 * feed_forward, width);
    let weights = [
        ("qkv", ((query + 2 * key) * head, width)),
        ("output", (width, query * head)),
        ("gate_up", gate_up),
        ("down", (width, feed_forward)),
    ];
    let mut cases = vec![quantize(gpu, shape, gate_up), dequantize(gpu, shape, gate_up)];
    for (name, dims) in weights {
        cases.push(product(gpu, shape, &format!("4-bit product, {name}"), dims, Kind::Forward, true));
        cases.push(product(
            gpu,
            shape,
            &format!("4-bit product's gradient, {name}"),
            dims,
            Kind::Input,
            true,
        ));
    }
    for rows in [1, 8, 16, 32, 64, 128] {
        cases.push(few(gpu, shape, rows, gate_up, true));
        cases.push(few(gpu, shape, rows, gate_up, false));
    }
    // The rates of products whose operands have the spare columns in which LoRA lies.
    for (name, (n, k)) in weights {
        for more in [0, 8, 64] {
            let name = format!("bf16 product, {name}, K + {more}");
            cases.push(product(gpu, shape, &name, (n, k + more), Kind::Forward, false));
        }
        for more in [0, 64] {
            let name = format!("bf16 product's gradient, {name}, N + {more}");
            cases.push(product(gpu, shape, &name, (n + more, k), Kind::Input, false));
        }
    }
    cases.push(product(gpu, shape, "LoRA A, gate_up", (RANK, width), Kind::Forward, false));
    cases.push(product(gpu, shape, "LoRA A's gradient, gate_up", (RANK, width), Kind::Weight, false));
    cases.push(product(gpu, shape, "LoRA B, gate_up", (2 * feed_forward, RANK), Kind::Forward, false));
    cases.push(product(
        gpu,
        shape,
        "LoRA B's gradient, gate_up",
        (2 * feed_forward, RANK),
        Kind::Weight,
        false,
    ));
    cases.extend([loss(gpu, shape), loss_gradient(gpu, shape)]);
    cases
}

fn four_bit(values: &Tensor, dims: (usize, usize)) -> Result<FourBit> {
    let stored = FourBit::quantize_on_gpu(values, values.dtype(), dims, Code::Nf4, true)?;
    stored.map_err(|place| candle_core::Error::Msg(format!("values that are not finite: {place:?}")))
}

/// Returns the tensors of a weight; the offset of its scales is one of them.
fn parts(weight: &FourBit) -> Result<Vec<Tensor>> {
    let Absmax::Nested { codes, absmax, offset } = &weight.absmax else {
        candle_core::bail!("expected scales in two levels")
    };
    let offset = Tensor::new(&[*offset], absmax.device())?;
    Ok(vec![weight.packed.clone(), codes.clone(), absmax.clone(), offset])
}

/// Compares the codes with the CPU's, which are bitsandbytes' own, in every bit of the whole weight.
fn quantize(gpu: &Gpu, shape: &Shape, dims: (usize, usize)) -> Case {
    let (device, dtype) = (gpu.device.clone(), gpu.dtype);
    let values = (dims.0 * dims.1) as f64;
    Case {
        name: format!("4-bit quantise, {}", shape.name),
        bytes: values * (dtype.size_in_bytes() as f64 + 0.516),
        flops: 0.0,
        exact: true,
        make: Box::new(move || {
            let gpu = Gpu { device: device.clone(), dtype, small: false };
            Ok(vec![gpu.random(dims, 0.02)?].into())
        }),
        run: Box::new(move |of| parts(&four_bit(&of[0], dims)?)),
        judge: Box::new(move |inputs, outputs| {
            let values = inputs[0].to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?;
            let expected = FourBit::quantize(&values.to_vec1()?, dims.0, dims.1, Code::Nf4, true)?;
            let on_cpu = |tensor: &Tensor| tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64);
            let pairs = outputs.iter().zip(parts(&expected)?);
            pairs.map(|(found, expected)| Ok((on_cpu(found)?, on_cpu(&expected)?))).collect()
        }),
    }
}

/// Expects that the GPU's values equal the CPU's from the same codes, rounded once, bit for bit.
fn dequantize(gpu: &Gpu, shape: &Shape, dims: (usize, usize)) -> Case {
    let (device, dtype) = (gpu.device.clone(), gpu.dtype);
    let values = (dims.0 * dims.1) as f64;
    Case {
        name: format!("4-bit dequantise, {}", shape.name),
        bytes: values * (dtype.size_in_bytes() as f64 + 0.516),
        flops: 0.0,
        exact: true,
        make: Box::new(move || {
            let gpu = Gpu { device: device.clone(), dtype, small: false };
            let weight = Some(Weight::FourBit(four_bit(&gpu.random(dims, 0.02)?, dims)?));
            // The comparison and the poison ask a tensor for its device.
            Ok(Inputs { tensors: vec![gpu.random_f32(1, 1.0)?], weight })
        }),
        run: Box::new(move |of| match &of.weight {
            Some(Weight::FourBit(weight)) => Ok(vec![weight.dequantize_on_gpu(dtype)?]),
            _ => unreachable!("as `make` made it"),
        }),
        judge: Box::new(move |inputs, outputs| {
            let expected = on_cpu(inputs.weight.as_ref(), dtype)?;
            Ok(vec![(outputs[0].to_device(&Device::Cpu)?, expected)])
        }),
    }
}

/// Returns a weight's values as the GPU's products see them, in `dtype`.
fn on_cpu(weight: Option<&Weight>, dtype: DType) -> Result<Tensor> {
    match weight {
        Some(Weight::FourBit(weight)) => {
            let values = weight.to_device(&Device::Cpu)?.dequantize()?;
            Tensor::from_vec(values, (weight.rows, weight.cols), &Device::Cpu)?.to_dtype(dtype)
        }
        Some(Weight::Dense(weight)) => weight.to_device(&Device::Cpu),
        None => candle_core::bail!("a case without its weight"),
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// `y = x W^T`
    Forward,
    /// `dx = dy W`
    Input,
    /// `dW += dy^T x`, in f32
    Weight,
}

fn product(
    gpu: &Gpu,
    shape: &Shape,
    name: &str,
    (n, k): (usize, usize),
    kind: Kind,
    four_bits: bool,
) -> Case {
    let (device, dtype, tokens) = (gpu.device.clone(), gpu.dtype, shape.tokens);
    let element = dtype.size_in_bytes();
    let activations = (tokens * (n + k) * element) as f64;
    // A 4-bit weight is read, written in the activations' type and read again; a LoRA gradient is f32, read and
    // written.
    let weight_bytes = match (four_bits, kind) {
        (true, _) => (0.516 + 2.0 * element as f64) * (n * k) as f64,
        (false, Kind::Weight) => 8.0 * (n * k) as f64,
        (false, _) => (n * k * element) as f64,
    };
    let precision = if dtype == DType::F32 { Precision::F32 } else { Precision::Bf16 };
    let make = move || {
        let gpu = Gpu { device: device.clone(), dtype, small: false };
        let (x, dy) = (gpu.random((tokens, k), 1.0)?, gpu.random((tokens, n), 1.0)?);
        if kind == Kind::Weight {
            return Ok(vec![dy, x, gpu.random_f32((n, k), 1.0)?].into());
        }
        let values = gpu.random((n, k), 0.02)?;
        let weight =
            if four_bits { Weight::FourBit(four_bit(&values, (n, k))?) } else { Weight::Dense(values) };
        Ok(Inputs { tensors: vec![if kind == Kind::Forward { x } else { dy }], weight: Some(weight) })
    };
    let run = move |of: &Inputs| {
        let output = |columns| unwritten((tokens, columns), dtype, of[0].device());
        match (&of.weight, kind) {
            (Some(weight), Kind::Forward) => {
                let y = output(n)?;
                matmul::forward(&of[0], weight, 1.0, &y, 0, 0.0, precision)?;
                Ok(vec![y])
            }
            (Some(weight), _) => {
                let dx = output(k)?;
                matmul::input_gradient(&of[0], 0, weight, 1.0, &dx, 0.0, precision)?;
                Ok(vec![dx])
            }
            (None, _) => {
                matmul::weight_gradient(&of[0], 0, &of[1], 1.0, &of[2], precision)?;
                Ok(vec![of[2].clone()])
            }
        }
    };
    let judge = move |inputs: &Inputs, outputs: &[Tensor]| {
        let whole = |tensor: &Tensor| tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64);
        if kind == Kind::Weight {
            let gradient = whole(&inputs[0])?.t()?.matmul(&whole(&inputs[1])?)?;
            return Ok(vec![(whole(&outputs[0])?, (gradient + whole(&inputs[2])?)?)]);
        }
        let weight = on_cpu(inputs.weight.as_ref(), dtype)?.to_dtype(DType::F64)?;
        let weight = if kind == Kind::Forward { weight.t()? } else { weight };
        Ok(vec![(sample(&outputs[0], tokens)?, sample(&inputs[0], tokens)?.matmul(&weight)?)])
    };
    Case {
        name: format!("{name}, {}", shape.name),
        bytes: activations + weight_bytes,
        flops: 2.0 * (tokens * n) as f64 * k as f64,
        exact: false,
        make: Box::new(make),
        run: Box::new(run),
        judge: Box::new(judge),
    }
}

/// Times few rows by the weight as it is stored, or by expanding it. `matmul::FEW_ROWS` should be the number of rows at
/// which both take equally long.
fn few(gpu: &Gpu, shape: &Shape, rows: usize, (n, k): (usize, usize), stored: bool) -> Case {
    let (device, dtype) = (gpu.device.clone(), gpu.dtype);
    let how = if stored { "as stored" } else { "expanded" };
    Case {
        name: format!("4-bit product of {rows} rows, {how}, {}", shape.name),
        bytes: 0.516 * (n * k) as f64 + (rows * (n + k) * dtype.size_in_bytes()) as f64,
        flops: 2.0 * (rows * n) as f64 * k as f64,
        exact: false,
        make: Box::new(move || {
            let gpu = Gpu { device: device.clone(), dtype, small: false };
            let weight = Some(Weight::FourBit(four_bit(&gpu.random((n, k), 0.02)?, (n, k))?));
            Ok(Inputs { tensors: vec![gpu.random((rows, k), 1.0)?], weight })
        }),
        run: Box::new(move |of| {
            let y = unwritten((rows, n), dtype, of[0].device())?;
            let weight = of.weight.as_ref().expect("as `make` made it");
            let (x, precision) = (&of[0], product_precision(dtype));
            match stored {
                true => matmul::forward_apart(x, weight, 1.0, &y, 0, 0.0, precision, 0)?,
                false => matmul::forward(x, weight, 1.0, &y, 0, 0.0, precision)?,
            }
            Ok(vec![y])
        }),
        judge: Box::new(move |inputs, outputs| {
            let weight = on_cpu(inputs.weight.as_ref(), dtype)?.to_dtype(DType::F64)?;
            let x = inputs[0].to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
            let found = outputs[0].to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
            Ok(vec![(found, x.matmul(&weight.t()?)?)])
        }),
    }
}

/// Returns a head of random weights and hidden rows of unit size; targets anywhere in the vocabulary.
fn head_inputs(gpu: &Gpu, shape: &Shape, rows: usize) -> impl Fn() -> Result<Inputs> + 'static {
    let (device, dtype, Shape { width, vocab, .. }) = (gpu.device.clone(), gpu.dtype, *shape);
    move || {
        let gpu = Gpu { device: device.clone(), dtype, small: false };
        let weight = Some(Weight::Dense(gpu.random((vocab, width), (width as f64).sqrt().recip())?));
        Ok(Inputs { tensors: vec![gpu.random((rows, width), 1.0)?], weight })
    }
}

fn targets(rows: usize, vocab: usize) -> Vec<u32> {
    (0..rows).map(|row| (row * 104_729 % vocab) as u32).collect()
}

fn head_of(inputs: &Inputs) -> Head {
    Head::plain(inputs.weight.clone().expect("as `head_inputs` made it"))
}

fn product_precision(dtype: DType) -> Precision {
    if dtype == DType::F32 { Precision::F32 } else { Precision::Bf16 }
}

/// Returns the case of the loss. It has few rows, so that one number holds all of their losses.
fn loss(gpu: &Gpu, shape: &Shape) -> Case {
    let (rows, vocab, dtype) = (shape.tokens.min(48), shape.vocab, gpu.dtype);
    Case {
        name: format!("loss of {rows} rows, {}", shape.name),
        bytes: ((vocab * (shape.width + 2 * rows)) * dtype.size_in_bytes()) as f64,
        flops: 2.0 * (rows * shape.width) as f64 * vocab as f64,
        exact: false,
        make: Box::new(head_inputs(gpu, shape, rows)),
        run: Box::new(move |of| {
            let loss = cross_entropy::forward(
                &of[0],
                &head_of(of),
                &targets(rows, vocab),
                product_precision(dtype),
            )?;
            Ok(vec![Tensor::new(&[loss.value()? as f32], &Device::Cpu)?])
        }),
        judge: Box::new(move |inputs, outputs| {
            let (losses, _) = in_f64(inputs, &targets(rows, vocab), rows)?;
            Ok(vec![(outputs[0].to_dtype(DType::F64)?, losses.sum_all()?.reshape(1)?)])
        }),
    }
}

/// Returns the case of the loss and its gradient over all rows of a pass, in as many chunks as needed. The gradient of
/// some rows is compared.
fn loss_gradient(gpu: &Gpu, shape: &Shape) -> Case {
    let Shape { tokens, width, vocab, .. } = *shape;
    let dtype = gpu.dtype;
    Case {
        name: format!("loss and gradient of {tokens} rows, {}", shape.name),
        // Logits are written, turned into their gradient in place, and read.
        bytes: (4 * tokens * vocab * dtype.size_in_bytes()) as f64,
        flops: 4.0 * (tokens * width) as f64 * vocab as f64,
        exact: false,
        make: Box::new(head_inputs(gpu, shape, tokens)),
        run: Box::new(move |of| {
            let (targets, precision) = (targets(tokens, vocab), product_precision(dtype));
            Ok(vec![
                cross_entropy::forward_backward(
                    &of[0],
                    &head_of(of),
                    &targets,
                    cross_entropy::Goal::plain(1.0),
                    precision,
                )?
                .1,
            ])
        }),
        judge: Box::new(move |inputs, outputs| {
            let all: Vec<f64> = targets(tokens, vocab).into_iter().map(f64::from).collect();
            let chosen = sample(&Tensor::from_vec(all, (tokens, 1), &Device::Cpu)?, tokens)?;
            let chosen: Vec<u32> =
                chosen.flatten_all()?.to_vec1::<f64>()?.iter().map(|&id| id as u32).collect();
            let (_, gradient) = in_f64(inputs, &chosen, tokens)?;
            Ok(vec![(sample(&outputs[0], tokens)?, gradient)])
        }),
    }
}

/// Returns losses and gradients of the sampled rows, by the definition: softmax of all logits.
fn in_f64(inputs: &Inputs, targets: &[u32], tokens: usize) -> Result<(Tensor, Tensor)> {
    let weight = on_cpu(inputs.weight.as_ref(), DType::F64)?.to_dtype(DType::F64)?;
    let logits = sample(&inputs[0], tokens)?.matmul(&weight.t()?)?;
    let logits = logits.broadcast_sub(&logits.max_keepdim(1)?)?;
    let exponentials = logits.exp()?;
    let sums = exponentials.sum_keepdim(1)?;
    let index = Tensor::new(targets, &Device::Cpu)?.unsqueeze(1)?;
    let losses = (sums.log()? - logits.gather(&index, 1)?)?;
    let minus_one = Tensor::full(-1f64, index.shape(), &Device::Cpu)?;
    let gradient = exponentials.broadcast_div(&sums)?.scatter_add(&index, &minus_one, 1)?;
    Ok((losses, gradient.matmul(&weight)?))
}
