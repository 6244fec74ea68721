//! Logits -> a token drawn for each row, on a GPU: four bytes a row go to the host and not all logits.

use candle_core::{DType, Device, Result, Tensor};

use super::cuda::{self, Launch};
use super::{largest, unwritten};

const THREADS: usize = 512;

/// Parameters for drawing a row's token. `generate/sampling.rs` has the meaning of the filters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// 0: the most probable token is taken.
    pub temperature: f64,
    /// 0: all tokens.
    pub top_k: usize,
    /// 1: all tokens.
    pub top_p: f64,
    /// 0: all tokens.
    pub min_p: f64,
    /// The number from [0, 1) that decides.
    pub uniform: f64,
}

impl Draw {
    /// The most probable token.
    pub const GREEDY: Draw = Draw { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, uniform: 0.0 };
}

/// Returns the token drawn for each row; `None` for a row without a finite logit. Logits are f32 [rows, V]. Sums are
/// taken in f64, in another order than on the host, so that a number within their rounding may decide otherwise. Waits
/// for the device.
pub fn tokens(logits: &Tensor, draws: &[Draw]) -> Result<Vec<Option<u32>>> {
    let (rows, _) = logits.dims2()?;
    assert_eq!(draws.len(), rows, "a draw for each row");
    if rows == 0 {
        return Ok(Vec::new());
    }
    let tokens = unwritten(rows, DType::U32, logits.device())?;
    write(logits, &send(draws, logits.device())?, &tokens)?;
    Ok(largest::found(&cuda::download::<u32>(&tokens)?))
}

/// Copies the parameters that `write` reads of the rows to the device.
pub fn send(draws: &[Draw], device: &Device) -> Result<Tensor> {
    let numbers = |draw: &Draw| [draw.temperature, draw.top_k as f64, draw.top_p, draw.min_p, draw.uniform];
    let draws: Vec<f64> = draws.iter().flat_map(numbers).collect();
    cuda::upload(&draws, device)
}

/// Writes the token drawn for each row of logits [rows, V] to `tokens` [rows] on the device, for `largest::found`.
pub fn write(logits: &Tensor, draws: &Tensor, tokens: &Tensor) -> Result<()> {
    let (rows, vocab) = logits.dims2()?;
    assert_eq!(tokens.dims(), [rows], "a token a row");
    let launch = Launch::untyped(cuda::device(logits)?, "draw", "tokens").of(DType::F32, logits);
    let launch = launch.of(DType::F64, draws).of(DType::U32, tokens);
    launch.int(vocab).launch((rows, 1, 1), THREADS, 0)
}
