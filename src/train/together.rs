//! Each rank's message at a point of the run -> the next step of all of them.
//!
//! Ranks exchange messages at few points: at the start, after the passes of a step, after an evaluation, and at the
//! end. A rank that fails in its passes reports it there, so that every rank ends with the same message. One that fails
//! elsewhere informs the others by `Collective::fails`.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::fault::{Fault, Kind, Result};
use crate::ranks::Collective;

/// The end of a rank's work since the last point.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum Said {
    /// The work is done.
    Done,
    /// A signal asked this process to end.
    Stopped,
    /// Memory ran out, with the error's text.
    OutOfMemory(String),
    /// The work failed.
    Failed {
        /// Exit code of the fault's kind.
        code: u8,
        /// The fault's message.
        message: String,
        /// The remedy that the fault names.
        help: Option<String>,
    },
}

/// The end of all ranks' work since the last point.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Outcome {
    /// Every rank is done.
    Done,
    /// A signal came to some rank.
    Stopped,
    /// Memory ran out on some ranks: the error's text of those, by rank.
    OutOfMemory(Vec<Option<String>>),
}

/// The messages of all ranks.
#[derive(Debug)]
pub(super) struct Heard<T> {
    /// The end of the work.
    pub outcome: Outcome,
    /// Each rank's further values, by rank.
    pub told: Vec<T>,
}

/// The message as it travels.
#[derive(Serialize, Deserialize)]
struct Word {
    said: Said,
    told: serde_json::Value,
}

impl From<&Fault> for Said {
    fn from(fault: &Fault) -> Said {
        Said::Failed {
            code: fault.kind.exit_code(),
            message: fault.message.clone(),
            help: fault.help.clone(),
        }
    }
}

impl Said {
    /// Returns a rank's message about a result: it is there, or the reason why it is not.
    pub fn of<T>(result: &Result<T>) -> Said {
        result.as_ref().map_or_else(Said::from, |_| Said::Done)
    }

    fn fault(&self) -> Option<Fault> {
        let Said::Failed { code, message, help } = self else { return None };
        let kind = Kind::ALL.into_iter().find(|kind| kind.exit_code() == *code).unwrap_or(Kind::Internal);
        Some(Fault { kind, message: message.clone(), help: help.clone() })
    }
}

/// Sends the end of this rank's work and `told` to all ranks, and returns the messages of all. If a rank failed, its
/// fault is every rank's. A failure counts more than a signal, and a signal more than memory that ran out.
pub(super) fn agree<T: Serialize + DeserializeOwned>(
    ranks: &dyn Collective,
    said: Said,
    told: T,
) -> Result<Heard<T>> {
    if ranks.place().world == 1 {
        return match said.fault() {
            Some(fault) => Err(fault),
            None => Ok(Heard { outcome: outcome(vec![said]), told: vec![told] }),
        };
    }
    let unsaid = |error: serde_json::Error| {
        Fault::internal(format!("a message to the other ranks cannot be encoded: {error}"))
    };
    let told = serde_json::to_value(told).map_err(unsaid)?;
    let words = ranks.exchange(&serde_json::to_vec(&Word { said, told }).map_err(unsaid)?)?;
    let words = words
        .iter()
        .enumerate()
        .map(|(rank, bytes)| serde_json::from_slice::<Word>(bytes).map_err(|error| unread(rank, &error)));
    let words = words.collect::<Result<Vec<Word>>>()?;
    for (rank, word) in words.iter().enumerate() {
        if let Some(fault) = word.said.fault() {
            return Err(fault.at(format!("rank {rank}")));
        }
    }
    let (said, told): (Vec<Said>, Vec<_>) = words.into_iter().map(|word| (word.said, word.told)).unzip();
    let told = told
        .into_iter()
        .enumerate()
        .map(|(rank, value)| serde_json::from_value(value).map_err(|error| unread(rank, &error)));
    Ok(Heard { outcome: outcome(said), told: told.collect::<Result<_>>()? })
}

/// Returns the end of the work, if no rank failed.
fn outcome(said: Vec<Said>) -> Outcome {
    if said.contains(&Said::Stopped) {
        return Outcome::Stopped;
    }
    let out = |said: Said| match said {
        Said::OutOfMemory(text) => Some(text),
        _ => None,
    };
    let out: Vec<Option<String>> = said.into_iter().map(out).collect();
    if out.iter().any(Option::is_some) { Outcome::OutOfMemory(out) } else { Outcome::Done }
}

fn unread(rank: usize, error: &serde_json::Error) -> Fault {
    Fault::new(
        Kind::Device,
        format!("rank {rank} is at another point of the run than this rank, or is another version: {error}"),
    )
    .help("start all ranks with the same version of hone and the same options")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ranks::Alone;
    use crate::ranks::threads::{self, Threads};

    /// Returns the outcome for each of the ranks if they send this and their number.
    fn heard(said: &[Said]) -> Vec<std::result::Result<(Outcome, Vec<usize>), String>> {
        threads::all(Threads::of(said.len()), |ranks| {
            let rank = ranks.place().rank;
            let heard = agree(&ranks, said[rank].clone(), rank).map_err(|fault| fault.in_a_line())?;
            Ok((heard.outcome, heard.told))
        })
    }

    #[test]
    fn all_ranks_hear_the_same() {
        let out = |text: &str| Said::OutOfMemory(text.into());
        let failed = || Said::from(&Fault::data("a row").help("mend it"));
        let cases = [
            (vec![Said::Done, Said::Done], Ok((Outcome::Done, vec![0, 1]))),
            (vec![Said::Done, out("a"), Said::Stopped], Ok((Outcome::Stopped, vec![0, 1, 2]))),
            (
                vec![out("a"), Said::Done, out("b")],
                Ok((Outcome::OutOfMemory(vec![Some("a".into()), None, Some("b".into())]), vec![0, 1, 2])),
            ),
            (vec![Said::Stopped, out("a"), failed()], Err("rank 2: a row; mend it".to_owned())),
        ];
        for (said, expected) in cases {
            let found = heard(&said);
            assert!(found.iter().all(|found| *found == expected), "{said:?}: {found:?}");
        }
    }

    #[test]
    fn a_fault_keeps_its_kind_and_one_process_its_words() {
        let fault = Fault::new(Kind::Storage, "disk full");
        let found = agree(&Alone, Said::from(&fault), ()).unwrap_err();
        assert_eq!((found.kind, found.message.as_str()), (Kind::Storage, "disk full"));
        let heard = agree(&Alone, Said::Done, f64::NAN).unwrap();
        assert!(heard.outcome == Outcome::Done && heard.told[0].is_nan());
        let kinds =
            threads::all(Threads::of(2), |ranks| agree(&ranks, Said::from(&fault), ()).unwrap_err().kind);
        assert_eq!(kinds, [Kind::Storage; 2]);
    }

    #[test]
    fn ranks_at_different_points_are_told_so() {
        let found = threads::all(Threads::of(2), |ranks| match ranks.place().rank {
            0 => agree(&ranks, Said::Done, 1u64).map(|_| ()),
            _ => agree(&ranks, Said::Done, "text".to_owned()).map(|_| ()),
        });
        let message = found[0].as_ref().unwrap_err().message.as_str();
        assert!(message.starts_with("rank 1 is at another point of the run"), "{message}");
    }
}
