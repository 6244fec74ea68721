//! The flag `--lengths` -> the lengths of one optimizer step's examples, which add up to exactly its tokens.

use std::path::Path;

use crate::fault::{Fault, Result};

/// Lengths at the middle of each twentieth of a log-normal distribution with median 150 and deviation ln 2.5. They
/// are many short examples and a few long ones, as in instruction data.
const MIXED: [usize; 20] =
    [25, 40, 52, 64, 76, 87, 99, 112, 126, 141, 159, 179, 202, 228, 259, 296, 354, 430, 561, 904];

/// Returns the lengths of one step of `tokens` tokens: `one` example, `mixed` lengths, examples of the same length, or
/// lengths from a file, in turn.
pub fn of_step(wanted: &str, tokens: usize) -> Result<Vec<usize>> {
    match wanted {
        "one" => Ok(vec![tokens]),
        "mixed" => Ok(fill(&spread(&MIXED), tokens)),
        _ => match wanted.parse::<usize>() {
            Ok(0) => Err(Fault::usage("--lengths 0: expected 1 or more")),
            Ok(length) => Ok(fill(&[length], tokens)),
            Err(_) => Ok(fill(&read(Path::new(wanted))?, tokens)),
        },
    }
}

/// Reads whole numbers, separated by anything else.
fn read(file: &Path) -> Result<Vec<usize>> {
    let expected = "expected one, mixed, a number of tokens, or a file of such numbers";
    let text = std::fs::read_to_string(file)
        .map_err(|error| Fault::usage(format!("--lengths {}: {error}; {expected}", file.display())))?;
    let words = text.split(|letter: char| !letter.is_ascii_digit()).filter(|word| !word.is_empty());
    let lengths: Vec<usize> =
        words.filter_map(|word| word.parse().ok()).filter(|length| *length > 0).collect();
    match lengths.is_empty() {
        true => Err(Fault::usage(format!("--lengths {}: no number in it; {expected}", file.display()))),
        false => Ok(lengths),
    }
}

/// Returns the same lengths in an order whose every beginning is about as mixed as the whole.
fn spread(lengths: &[usize]) -> Vec<usize> {
    // 7 and 20 have no common divisor, so every length comes once.
    (0..lengths.len()).map(|i| lengths[i * 7 % lengths.len()]).collect()
}

/// Takes lengths in turn until the tokens are used up. The last example takes the rest.
fn fill(lengths: &[usize], tokens: usize) -> Vec<usize> {
    let mut left = tokens;
    let mut step = Vec::new();
    for length in lengths.iter().cycle() {
        if left == 0 {
            break;
        }
        let length = (*length).min(left);
        left -= length;
        step.push(length);
    }
    step
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_has_exactly_its_tokens() {
        for (wanted, examples) in [("one", 1), ("200", 21), ("mixed", 19), ("5000", 1)] {
            let lengths = of_step(wanted, 4096).unwrap();
            assert_eq!(lengths.iter().sum::<usize>(), 4096, "{wanted}");
            assert_eq!(lengths.len(), examples, "{wanted}: {lengths:?}");
        }
        let mut all = spread(&MIXED);
        all.sort();
        assert_eq!(all, MIXED);
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("lengths");
        std::fs::write(&file, "30, 20\n").unwrap();
        assert_eq!(of_step(file.to_str().unwrap(), 60).unwrap(), [30, 20, 10]);
        std::fs::write(&file, "none").unwrap();
        assert!(of_step(file.to_str().unwrap(), 60).is_err());
        assert!(of_step("nowhere", 60).unwrap_err().message.contains("mixed"));
    }
}
