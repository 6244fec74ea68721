//! Cases of operations with independent rows, and of the optimizer. They are bound by the card's memory.

use candle_core::{DType, Device, Result, Tensor};

use hone::facts::{Activation, Function};
use hone::ops::activation;
use hone::ops::adamw::{self, Moments, Update};
use hone::ops::head_norm::{self, Groups};
use hone::ops::rope::{self, Angles, Direction};
use hone::ops::{bias, dropout, embedding, layer_norm, rms_norm, rows};

use crate::case::{Case, Gpu, Inputs};
use crate::shapes::Shape;

const EPSILON: f64 = 1e-5;
const SILU: Activation = Activation { function: Function::Silu, gated: true };
const GELU: Activation = Activation { function: Function::GeluTanh, gated: true };

/// An operation on rows. The inputs are tensors; those of T rows are sampled for the comparison. `run` is the
/// operation itself, on the GPU and, in f64, on the CPU.
struct Rows<'a> {
    gpu: &'a Gpu,
    shape: &'a Shape,
}

impl Rows<'_> {
    /// `elements` counts what is read and written in the storage type. `inputs` are [T, columns] each, or
    /// `[columns]` in f32.
    fn case(
        &self,
        name: &str,
        elements: usize,
        inputs: Vec<Input>,
        run: impl Fn(&Inputs) -> Result<Vec<Tensor>> + Clone + 'static,
    ) -> Case {
        let (device, dtype, tokens) = (self.gpu.device.clone(), self.gpu.dtype, self.shape.tokens);
        let gpu = move || Gpu { device: device.clone(), dtype, small: false };
        let make = move || {
            let gpu = gpu();
            let tensor = |input: &Input| match *input {
                Input::Matrix(columns) => gpu.random((tokens, columns), 1.0),
                Input::Vector(columns) => gpu.random_f32(columns, 1.0),
                Input::Wide(columns) => gpu.random_f32((tokens, columns), 1.0),
            };
            Ok(inputs.iter().map(tensor).collect::<Result<Vec<_>>>()?.into())
        };
        let on_cpu = run.clone();
        let judge = move |inputs: &Inputs, outputs: &[Tensor]| {
            let sampled = |tensor: &Tensor| sample(tensor, tokens);
            let inputs = inputs.tensors.iter().map(sampled).collect::<Result<Vec<_>>>()?;
            let expected = on_cpu(&inputs.into())?;
            outputs.iter().zip(expected).map(|(found, expected)| Ok((sampled(found)?, expected))).collect()
        };
        Case {
            name: format!("{name}, {}", self.shape.name),
            bytes: (elements * dtype.size_in_bytes()) as f64,
            flops: 0.0,
            exact: false,
            make: Box::new(make),
            run: Box::new(run),
            judge: Box::new(judge),
        }
    }
}

enum Input {
    Matrix(usize),
    Vector(usize),
    /// [T, columns] in f32 for every storage type.
    Wide(usize),
}

/// Returns rows from the beginning, the middle and the end, in f64 on the CPU. An input without a row per token is
/// taken whole.
pub fn sample(tensor: &Tensor, tokens: usize) -> Result<Tensor> {
    const ROWS: usize = 16;
    let tensor = tensor.to_device(&Device::Cpu)?;
    if tensor.dims().first() != Some(&tokens) || tensor.rank() < 2 || tokens <= 3 * ROWS {
        return tensor.to_dtype(DType::F64);
    }
    let starts = [0, (tokens - ROWS) / 2, tokens - ROWS];
    let parts = starts.iter().map(|&from| tensor.narrow(0, from, ROWS)).collect::<Result<Vec<_>>>()?;
    Tensor::cat(&parts, 0)?.to_dtype(DType::F64)
}

pub fn cases(gpu: &Gpu, shape: &Shape) -> Vec<Case> {
    let Shape { tokens, width, feed_forward, query, key, head, .. } = *shape;
    let each = Rows { gpu, shape };
    let (residual, hidden, heads) = (tokens * width, tokens * feed_forward, query + key);
    let columns = (heads + key) * head;
    let (matrix, vector) = (Input::Matrix, Input::Vector);
    let mut cases = vec![
        each.case("rms_norm", 2 * residual, vec![matrix(width), vector(width)], |of| {
            Ok(vec![rms_norm::forward(&of[0], &of[1], EPSILON)?])
        }),
        each.case(
            "rms_norm gradient",
            4 * residual,
            vec![matrix(width), matrix(width), vector(width), matrix(width)],
            |of| {
                rms_norm::backward(&of[0], &of[1], &of[2], EPSILON, &of[3])?;
                Ok(vec![of[3].clone()])
            },
        ),
        each.case("silu", 3 * hidden, vec![matrix(2 * feed_forward)], |of| {
            Ok(vec![activation::forward(&of[0], SILU)?])
        }),
        each.case("silu gradient", 5 * hidden, vec![matrix(feed_forward), matrix(2 * feed_forward)], |of| {
            Ok(vec![activation::backward(&of[0], &of[1], SILU)?])
        }),
        each.case(
            "rope",
            2 * tokens * heads * head,
            vec![matrix(columns), Input::Wide(head / 2), Input::Wide(head / 2)],
            move |of| {
                let angles = Angles { cos: of[1].clone(), sin: of[2].clone() };
                rope::rotate(&of[0], heads, head, &angles, Direction::Forward)?;
                Ok(vec![of[0].clone()])
            },
        ),
        each.case("sum of matrices", 3 * residual, vec![matrix(width), matrix(width)], |of| {
            rows::add(&of[0], &of[1])?;
            Ok(vec![of[0].clone()])
        }),
        adamw_case(gpu, shape),
        gather_case(gpu, shape),
    ];
    if shape.name == "phi3-mini" || gpu.small {
        cases.extend(rare(&each));
    }
    cases
}

/// Returns the operations that only some families need, at one shape.
fn rare(each: &Rows) -> Vec<Case> {
    let Shape { tokens, width, feed_forward, query, head, .. } = *each.shape;
    let (residual, hidden) = (tokens * width, tokens * feed_forward);
    let (matrix, vector) = (Input::Matrix, Input::Vector);
    let groups = Groups { at: 0, count: query };
    vec![
        each.case("layer_norm", 2 * residual, vec![matrix(width), vector(width), vector(width)], |of| {
            Ok(vec![layer_norm::forward(&of[0], &of[1], &of[2], EPSILON)?])
        }),
        each.case(
            "layer_norm gradient",
            4 * residual,
            vec![matrix(width), matrix(width), vector(width), matrix(width)],
            |of| {
                layer_norm::backward(&of[0], &of[1], &of[2], EPSILON, &of[3])?;
                Ok(vec![of[3].clone()])
            },
        ),
        each.case(
            "head_norm",
            2 * tokens * query * head,
            vec![matrix(query * head), vector(head)],
            move |of| {
                head_norm::forward(&of[0], groups, &of[1], EPSILON)?;
                Ok(vec![of[0].clone()])
            },
        ),
        each.case(
            "head_norm gradient",
            3 * tokens * query * head,
            vec![matrix(query * head), matrix(query * head), vector(head)],
            move |of| {
                head_norm::backward(&of[0], &of[1], groups, &of[2], EPSILON)?;
                Ok(vec![of[0].clone()])
            },
        ),
        each.case("gelu", 3 * hidden, vec![matrix(2 * feed_forward)], |of| {
            Ok(vec![activation::forward(&of[0], GELU)?])
        }),
        each.case("gelu gradient", 5 * hidden, vec![matrix(feed_forward), matrix(2 * feed_forward)], |of| {
            Ok(vec![activation::backward(&of[0], &of[1], GELU)?])
        }),
        each.case("bias", 2 * residual, vec![vector(width), matrix(width)], |of| {
            bias::apply(&of[0], &of[1], 0, true)?;
            Ok(vec![of[1].clone()])
        }),
        dropout_case(each),
    ]
}

/// Compares all of the rows, since keys identify them.
fn dropout_case(each: &Rows) -> Case {
    let Shape { tokens, width, .. } = *each.shape;
    let keys: Vec<u64> = (0..tokens as u64).map(dropout::mix).collect();
    let run = move |of: &Inputs| {
        let keys = dropout::keys(&keys, of[0].device())?;
        Ok(vec![dropout::apply(&of[0], 0.1, &keys, 3)?])
    };
    let whole = |tensor: &Tensor| tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64);
    let on_cpu = run.clone();
    Case {
        judge: Box::new(move |inputs, outputs| {
            let expected = on_cpu(&vec![whole(&inputs[0])?].into())?;
            Ok(vec![(whole(&outputs[0])?, expected[0].clone())])
        }),
        ..each.case("dropout", 2 * tokens * width, vec![Input::Matrix(width)], run)
    }
}

/// Returns every row but each seventh, in reverse order; then back to their places. Also the embedding of as many
/// tokens.
fn gather_case(gpu: &Gpu, shape: &Shape) -> Case {
    let Shape { tokens, width, vocab, .. } = *shape;
    let index: Vec<u32> = (0..tokens as u32).rev().filter(|row| row % 7 != 0).collect();
    let ids: Vec<u32> = (0..tokens).map(|row| (row * 7919 % vocab) as u32).collect();
    let (device, dtype) = (gpu.device.clone(), gpu.dtype);
    let elements = 2 * (2 * index.len() + tokens) * width;
    let run = move |of: &Inputs| {
        let found = rows::gather(&of[0], &index)?;
        let back = rows::scatter(&found, &index, tokens)?;
        let embedded = embedding::forward(&of[1], &ids, 1.0, of[0].dtype(), of[0].device())?;
        Ok(vec![found, back, embedded])
    };
    let whole = |tensor: &Tensor| tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64);
    let on_cpu = run.clone();
    Case {
        name: format!("gather, scatter, embedding, {}", shape.name),
        bytes: (elements * dtype.size_in_bytes()) as f64,
        flops: 0.0,
        exact: true,
        make: Box::new(move || {
            let gpu = Gpu { device: device.clone(), dtype, small: false };
            Ok(vec![gpu.random((tokens, width), 1.0)?, gpu.random((vocab, width), 1.0)?].into())
        }),
        run: Box::new(run),
        judge: Box::new(move |inputs, outputs| {
            let expected = on_cpu(&inputs.tensors.iter().map(whole).collect::<Result<Vec<_>>>()?.into())?;
            outputs.iter().zip(expected).map(|(found, expected)| Ok((whole(found)?, expected))).collect()
        }),
    }
}

/// Returns the whole update: the gradient's norm, clipping, parameters and moments; as many as LoRA of rank 16 has on
/// all layers.
fn adamw_case(gpu: &Gpu, shape: &Shape) -> Case {
    let parameters = if gpu.small { 5000 } else { 30_000_000 };
    let update = Update {
        learning_rate: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.01,
        step: 7,
        norm_max: Some(1.0),
    };
    let run = move |of: &Inputs| {
        let moments = Moments { first: of[2].clone(), second: of[3].clone() };
        let squares = hone::ops::number::Number::squares(&of[1])?;
        adamw::step(&of[0], &of[1], &moments, &update, &squares, None)?;
        Ok(vec![of[0].clone(), of[2].clone(), of[3].clone()])
    };
    let device = gpu.device.clone();
    let whole = |tensor: &Tensor| tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64);
    let on_cpu = run;
    Case {
        name: format!("adamw, {}", shape.name),
        // The norm reads the gradient once more.
        bytes: (parameters * 4 * 8) as f64,
        flops: 0.0,
        exact: false,
        make: Box::new(move || {
            let gpu = Gpu { device: device.clone(), dtype: DType::F32, small: false };
            let random = |deviation| gpu.random_f32(parameters, deviation);
            // Second moments are positive.
            let second: Vec<f32> = (0..parameters).map(|i| (i * 7919 % 1021) as f32 * 1e-5).collect();
            let second = Tensor::from_vec(second, parameters, &gpu.device)?;
            // Parameters of LoRA's size. A change of larger ones would be lost in their own rounding.
            Ok(vec![random(0.01)?, random(1.0)?, random(0.1)?, second].into())
        }),
        run: Box::new(run),
        judge: Box::new(move |inputs, outputs| {
            let inputs: Inputs = inputs.tensors.iter().map(whole).collect::<Result<Vec<_>>>()?.into();
            // The test compares how the update changes the parameters, not their values.
            let before = [inputs[0].copy()?, inputs[2].zeros_like()?, inputs[3].zeros_like()?];
            let expected = on_cpu(&inputs)?;
            let pairs = outputs.iter().zip(expected).zip(before);
            pairs
                .map(|((found, expected), before)| Ok(((whole(found)? - &before)?, (expected - before)?)))
                .collect()
        }),
    }
}
