//! The time of each operation at the shape of an 88M Llama with 4 examples of 512 tokens: best and median in
//! milliseconds, with GFLOP/s or GB/s if they mean something.
//!
//! `cargo bench --bench ops [-- NAME]`

use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor};
use hone::facts::Precision;
use hone::facts::quantization::Code;
use hone::facts::{Activation, Function};
use hone::facts::{Heads, Layout};
use hone::ops::attention::{self, Packing};
use hone::ops::cross_entropy::{Goal, Head};
use hone::ops::four_bit::FourBit;
use hone::ops::matmul::{self, Weight};
use hone::ops::rope::{self, Angles, Direction};
use hone::ops::{activation, adamw, cross_entropy, rms_norm};

const ROWS: usize = 2048;
const WIDTH: usize = 768;
const INNER: usize = 2048;
const VOCAB: usize = 8192;
const ROUNDS: usize = 7;

fn random(rows: usize, cols: usize) -> Result<Tensor> {
    Tensor::randn(0f32, 1.0, (rows, cols), &Device::Cpu)
}

fn main() -> Result<()> {
    hone::machine::keep_freed_memory();
    let wanted: Vec<String> =
        std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let heads = Heads {
        query: 12,
        key: 4,
        width: 64,
        scale: 0.125,
        window: None,
        softcap: None,
        layout: Layout::Blocked,
    };
    let swiglu = Activation { function: Function::Silu, gated: true };
    let examples = Packing::new((0..4).map(|i| i * 512..(i + 1) * 512).collect());
    let (x, norm, d) = (random(ROWS, WIDTH)?, random(1, WIDTH)?.flatten_all()?, random(ROWS, WIDTH)?);
    let dy = random(ROWS, WIDTH)?;
    let (gate_up, d_inner) = (random(ROWS, 2 * INNER)?, random(ROWS, INNER)?);
    let qkv = random(ROWS, heads.columns())?;
    let angles = Angles { cos: random(ROWS, 32)?, sin: random(ROWS, 32)? };
    let (out, lse) = attention::forward(&qkv, &heads, &examples, Precision::F32)?;
    let values = random(INNER, WIDTH)?.flatten_all()?.to_vec1::<f32>()?;
    let four_bit = Weight::FourBit(FourBit::quantize(&values, INNER, WIDTH, Code::Nf4, true)?);
    let (a, b) = (Weight::Dense(random(8, WIDTH)?), Weight::Dense(random(INNER, 8)?));
    let head = Head::plain(Weight::Dense(random(VOCAB, WIDTH)?.to_dtype(DType::BF16)?));
    let targets: Vec<u32> = (0..ROWS as u32).map(|i| i * 3 % VOCAB as u32).collect();
    let y = Tensor::zeros((ROWS, INNER), DType::F32, &Device::Cpu)?;
    let down = Tensor::zeros((ROWS, 8), DType::F32, &Device::Cpu)?;
    let (grad_a, grad_b) = (random(8, WIDTH)?, random(INNER, 8)?);
    let megabytes = |elements: usize| elements as f64 * 4.0 / 1e6;
    let linear = 2.0 * (ROWS * WIDTH * INNER) as f64 / 1e6;
    let skinny = 2.0 * (ROWS * 8) as f64 / 1e6;
    // 2 products forward, 5 backward, over the lower triangle.
    let triangle = 2.0 * (4 * 512 * 512 / 2 * 12 * 64) as f64 / 1e6;
    println!("{:>26} {:>9} {:>9} {:>12}", "operation", "best ms", "median ms", "rate");
    let run = |name: &str, unit: &str, amount: f64, body: &dyn Fn() -> Result<()>| -> Result<()> {
        if !wanted.is_empty() && !wanted.iter().any(|part| name.contains(part.as_str())) {
            return Ok(());
        }
        body()?;
        let mut times = Vec::new();
        for _ in 0..ROUNDS {
            let began = Instant::now();
            body()?;
            times.push(began.elapsed().as_secs_f64() * 1e3);
        }
        times.sort_by(f64::total_cmp);
        // Megabytes or millions of operations per millisecond are GB/s or GFLOP/s.
        println!("{name:>26} {:>9.2} {:>9.2} {:>7.0} {unit}", times[0], times[ROUNDS / 2], amount / times[0]);
        Ok(())
    };
    run("rms_norm", "GB/s", megabytes(2 * ROWS * WIDTH), &|| rms_norm::forward(&x, &norm, 1e-5).map(drop))?;
    run("rms_norm backward", "GB/s", megabytes(4 * ROWS * WIDTH), &|| {
        rms_norm::backward(&dy, &x, &norm, 1e-5, &d)
    })?;
    run("swiglu", "GB/s", megabytes(3 * ROWS * INNER), &|| activation::forward(&gate_up, swiglu).map(drop))?;
    run("swiglu backward", "GB/s", megabytes(5 * ROWS * INNER), &|| {
        activation::backward(&d_inner, &gate_up, swiglu).map(drop)
    })?;
    run("rope", "GB/s", megabytes(2 * ROWS * 16 * 64), &|| {
        rope::rotate(&qkv, 16, 64, &angles, Direction::Forward)
    })?;
    run("adamw 1M", "GB/s", megabytes(7 << 20), &|| {
        let p = Tensor::zeros(1 << 20, DType::F32, &Device::Cpu)?;
        adamw::sum_of_squares(&p).map(drop)
    })?;
    run("copy", "GB/s", megabytes(2 * ROWS * WIDTH), &|| x.copy().map(drop))?;
    run("zeros", "GB/s", megabytes(ROWS * INNER), &|| hone::ops::flat::zero(&y))?;
    run("fresh zeros", "GB/s", megabytes(ROWS * INNER), &|| {
        hone::ops::flat::zero(&Tensor::zeros((ROWS, INNER), DType::F32, &Device::Cpu)?)
    })?;
    for precision in [Precision::F32, Precision::Bf16] {
        let name =
            |part: &str| format!("{part} {}", if precision == Precision::F32 { "f32" } else { "bf16" });
        run(&name("attention"), "GFLOP/s", 2.0 * triangle, &|| {
            attention::forward(&qkv, &heads, &examples, precision).map(drop)
        })?;
        run(&name("attention backward"), "GFLOP/s", 5.0 * triangle, &|| {
            attention::backward(&x, &qkv, &out, &lse, &heads, &examples, precision).map(drop)
        })?;
        run(&name("4-bit forward"), "GFLOP/s", linear, &|| {
            matmul::forward(&x, &four_bit, 1.0, &y, 0, 0.0, precision)
        })?;
        run(&name("4-bit backward"), "GFLOP/s", linear, &|| {
            matmul::input_gradient(&y, 0, &four_bit, 1.0, &d, 0.0, precision)
        })?;
        run(&name("lora x A^T"), "GFLOP/s", skinny * WIDTH as f64, &|| {
            matmul::forward(&x, &a, 1.0, &down, 0, 0.0, precision)
        })?;
        run(&name("lora += U B^T"), "GFLOP/s", skinny * INNER as f64, &|| {
            matmul::forward(&down, &b, 1.0, &y, 0, 1.0, precision)
        })?;
        run(&name("lora dy B"), "GFLOP/s", skinny * INNER as f64, &|| {
            matmul::input_gradient(&y, 0, &b, 1.0, &down, 0.0, precision)
        })?;
        run(&name("lora dB"), "GFLOP/s", skinny * INNER as f64, &|| {
            matmul::weight_gradient(&y, 0, &down, 1.0, &grad_b, precision)
        })?;
        run(&name("lora dA"), "GFLOP/s", skinny * WIDTH as f64, &|| {
            matmul::weight_gradient(&down, 0, &x, 1.0, &grad_a, precision)
        })?;
        run(&name("lora dx += V A"), "GFLOP/s", skinny * WIDTH as f64, &|| {
            matmul::input_gradient(&down, 0, &a, 1.0, &d, 1.0, precision)
        })?;
        run(&name("cross-entropy both"), "GFLOP/s", 4.0 * (ROWS * VOCAB * WIDTH) as f64 / 1e6, &|| {
            cross_entropy::forward_backward(&x, &head, &targets, Goal::plain(1.0), precision).map(drop)
        })?;
    }
    Ok(())
}
