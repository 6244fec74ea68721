//! Logits -> the most probable token of each row, on a GPU: four bytes a row go to the host and not all logits.

use candle_core::{DType, Result, Tensor};

use super::cuda::{self, Launch};
use super::unwritten;

const THREADS: usize = 512;

/// Returns the token of each row's highest finite logit, of equal ones the lowest; `None` for a row without one. Logits
/// are f32 [rows, V]. Waits for the device.
pub fn tokens(logits: &Tensor) -> Result<Vec<Option<u32>>> {
    let (rows, _) = logits.dims2()?;
    if rows == 0 {
        return Ok(Vec::new());
    }
    let tokens = unwritten(rows, DType::U32, logits.device())?;
    write(logits, &tokens)?;
    Ok(found(&cuda::download::<u32>(&tokens)?))
}

/// Writes the token of each row of logits [rows, V] to `tokens` [rows] on the device, for `found`.
pub fn write(logits: &Tensor, tokens: &Tensor) -> Result<()> {
    let (rows, vocab) = logits.dims2()?;
    assert_eq!(tokens.dims(), [rows], "a token a row");
    let launch = Launch::untyped(cuda::device(logits)?, "largest", "tokens").of(DType::F32, logits);
    launch.of(DType::U32, tokens).int(vocab).launch((rows, 1, 1), THREADS, 0)
}

/// The numbers that `write` wrote -> the tokens, as `tokens` returns them.
pub fn found(written: &[u32]) -> Vec<Option<u32>> {
    written.iter().map(|token| (*token != u32::MAX).then_some(*token)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::judge;

    /// Equal logits, infinities and NaN among them, nothing finite, the last token.
    #[test]
    fn the_highest_finite_logit_wins_and_of_equal_ones_the_lowest_token() -> Result<()> {
        let Some(device) = judge::gpu() else { return Ok(()) };
        for vocab in [1, 31, 600, 5000] {
            let mut rows = vec![vec![-3f32; vocab]; 5];
            rows[0][vocab - 1] = 2.0;
            (rows[1][vocab / 2], rows[1][vocab - 1]) = (5.0, 5.0);
            (rows[2][0], rows[2][vocab / 3]) = (f32::NAN, f32::INFINITY);
            rows[3].fill(f32::NEG_INFINITY);
            let expected: Vec<Option<u32>> = rows
                .iter()
                .map(|row| {
                    let finite = (0u32..).zip(row).filter(|(_, logit)| logit.is_finite());
                    let best = finite.max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(&a.0)));
                    best.map(|(token, _)| token)
                })
                .collect();
            let logits = Tensor::new(rows, &device)?;
            assert_eq!(tokens(&logits)?, expected);
        }
        Ok(())
    }
}
