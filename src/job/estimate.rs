//! A plan and its data's footers -> optimizer steps, tokens, and for each named GPU the expected time and cost.
//!
//! Only the footers of the data are read, so tokens are estimated from bytes of text. Speed is the memory plan's
//! prediction (`memory/cost.rs`). Prices are those of the large clouds for one GPU an hour in the United States when
//! the table was written; `--price` replaces them.

use serde_json::{Value as Json, json};

use crate::dataset::{self, Footers};
use crate::fault::{Fault, Result};
use crate::fetch;
use crate::memory::{Running, card};
use crate::plan::Plan;
use crate::report::Report;
use crate::source::{self, Source};
use crate::train::order::Steps;

use super::described::Described;
use super::room::{self, Lengths};

/// Bytes of text in a token, for the usual languages and code.
const BYTES_A_TOKEN: f64 = 3.8;
/// Tokens that a chat template adds to a row.
const TEMPLATE_TOKENS: u64 = 24;

/// The basis of the prices, for every output that has one.
const PRICE_SOURCE: &str =
    "list prices of one GPU on demand at large clouds in the United States, November 2026";

/// Dollars an hour for one GPU on demand, rounded: the price of a machine with the card at AWS, Azure or Google Cloud,
/// divided by its number of cards.
const PRICES: [(&str, f64); 11] = [
    ("t4", 0.53),
    ("v100-16", 3.06),
    ("l4", 0.80),
    ("a10g", 1.01),
    ("a10", 3.20),
    ("l40s", 1.86),
    ("a100-40", 3.40),
    ("a100-80", 3.67),
    ("h100-nvl", 6.98),
    ("h100", 6.88),
    ("h200", 7.91),
];

/// The expected work, time and cost of a run.
pub struct Estimate {
    /// Work of the run; `None` if the data is not on this machine, or is not parquet.
    pub size: Option<Size>,
    /// The run on each of the named GPUs.
    pub gpus: Vec<OnGpu>,
    /// The changes that help if the run fits none of the GPUs.
    pub advice: Option<String>,
}

/// Work of a whole run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Size {
    /// Rows to train on.
    pub rows: u64,
    /// Optimizer steps.
    pub steps: u64,
    /// Tokens that pass through the model, over all epochs.
    pub tokens: u64,
}

/// A run on one named GPU.
pub struct OnGpu {
    /// The GPU, as the user named it.
    pub name: String,
    /// Tokens a second, or why the run does not fit.
    pub speed: Result<f64>,
    /// Dollars an hour.
    pub price: Option<Price>,
}

/// Dollars an hour for one GPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Price {
    /// Dollars.
    pub dollars: f64,
    /// Whether the user gave it with `--price`; otherwise it is a list price.
    pub given: bool,
}

/// Estimates the run on each of the GPUs, which have the names of `--gpu`. `prices` are texts `NAME=DOLLARS` and
/// override the listed prices.
///
/// Usage: an unknown GPU, or a price that is not a number. Data: files do not exist, or columns fit no layout.
pub fn estimate(plan: &Plan, described: &Described, gpus: &[String], prices: &[String]) -> Result<Estimate> {
    let footers = footers(plan)?;
    let prices = parsed(prices)?;
    let tokens_max = plan.tokens.tokens_max.min(described.facts.positions_max);
    let mean = footers.map_or(tokens_max as u64, |footers| mean_tokens(footers, tokens_max as u64));
    let lengths = Lengths { longest: tokens_max, mean: mean.max(1) as usize };
    let size = footers.map(|footers| size(plan, footers, mean));
    let on = |name: &String| {
        let (card, count) = card::find(name)?;
        let start =
            || Running::start(room::task(plan, described, lengths), card::machine(name, plan.memory.limit)?);
        let cards = count as f64;
        let whole = prices.iter().find(|(other, _)| other.eq_ignore_ascii_case(name)).map(|price| price.1);
        let of_card = prices.iter().find(|(other, _)| *other == card.name).map(|price| price.1 * cards);
        let own = whole.or(of_card).map(|dollars| Price { dollars, given: true });
        let listed = PRICES.iter().find(|(other, _)| *other == card.name);
        let listed = listed.map(|(_, dollars)| Price { dollars: dollars * cards, given: false });
        let speed = start().map(|running| running.plan.tokens_per_second_in_all());
        Ok(OnGpu { name: name.clone(), speed, price: own.or(listed) })
    };
    let gpus: Vec<OnGpu> = gpus.iter().map(on).collect::<Result<_>>()?;
    let advice = (!gpus.is_empty() && gpus.iter().all(|gpu| gpu.speed.is_err()))
        .then(|| advice(plan, described, lengths));
    Ok(Estimate { size, gpus, advice })
}

fn parsed(prices: &[String]) -> Result<Vec<(String, f64)>> {
    let price = |text: &String| {
        let (name, price) = text.split_once('=')?;
        Some((name.trim().to_owned(), price.trim().parse().ok().filter(|price: &f64| *price >= 0.0)?))
    };
    let wrong = |text: &String| {
        Fault::usage(format!("--price {text}: expected NAME=DOLLARS_AN_HOUR, such as l4=0.70"))
    };
    prices.iter().map(|text| price(text).ok_or_else(|| wrong(text))).collect()
}

/// Returns the footers of files on this machine; `None` if data must be downloaded first.
fn footers(plan: &Plan) -> Result<Option<Footers>> {
    let mut entries = Vec::new();
    let to_train_on = plan.dataset.evaluation_from.unwrap_or(plan.data.len());
    for data in &plan.data[..to_train_on] {
        match data {
            fetch::Data::Source(source @ Source::Path { .. }) => {
                // The run itself warns about entries of a folder that are not read.
                entries.push(source::find(source, dataset::ENDINGS, &Report::silent())?);
            }
            _ => return Ok(None),
        }
    }
    dataset::footers(&entries, &plan.dataset)
}

fn mean_tokens(footers: Footers, tokens_max: u64) -> u64 {
    let bytes = footers.text_bytes as f64 / footers.rows.max(1) as f64;
    ((bytes / BYTES_A_TOKEN) as u64 + TEMPLATE_TOKENS).min(tokens_max)
}

fn size(plan: &Plan, footers: Footers, mean: u64) -> Size {
    let rows = (footers.rows as f64 * plan.dataset.train_share) as u64;
    let steps = Steps::new(rows as usize, &plan.train);
    let epochs = steps.total as f64 / steps.per_epoch.max(1) as f64;
    Size { rows, steps: steps.total, tokens: (epochs * (rows * mean) as f64) as u64 }
}

/// Returns the smallest card that the run fits, and settings that make the run smaller.
fn advice(plan: &Plan, described: &Described, lengths: Lengths) -> String {
    let fits = |card: &&card::Card| {
        let machine = card.machine(plan.memory.limit);
        machine.is_ok_and(|machine| Running::start(room::task(plan, described, lengths), machine).is_ok())
    };
    let larger = card::CARDS.iter().find(fits).map(|card| format!("take {}", card.name));
    let four_bit = match described.options.quantization {
        crate::facts::Quantization::None => Some("set QuantizationConfig.load_in_4bit: true".to_owned()),
        _ => None,
    };
    let shorter = Some(format!("lower TrainingArguments.max_length below {}", lengths.longest));
    let ways: Vec<String> = [larger, four_bit, shorter].into_iter().flatten().collect();
    format!("the run fits none of these GPUs: {}", ways.join(", or "))
}

impl Estimate {
    /// Returns the estimate as lines for people.
    pub fn table(&self) -> String {
        let mut text = match self.size {
            None => "work: unknown, because the data is not on this machine as parquet yet\n".to_owned(),
            Some(Size { rows, steps, tokens }) => {
                format!(
                    "work: {steps} optimizer steps over {rows} rows, about {tokens} tokens (estimated from footers)\n"
                )
            }
        };
        let wide = self.gpus.iter().map(|gpu| gpu.name.len()).max().unwrap_or(0);
        for gpu in &self.gpus {
            let told = match &gpu.speed {
                Err(fault) => format!("does not fit: {}", fault.clone().in_a_line()),
                Ok(speed) => self.told(*speed, gpu.price),
            };
            text += &format!("{:wide$}  {told}\n", gpu.name);
        }
        if self.shows_list_prices() {
            text += &format!(
                "Costs follow {PRICE_SOURCE}; yours may differ: give it with --price NAME=DOLLARS.\n"
            );
        }
        text + &self.advice.as_ref().map(|advice| format!("{advice}\n")).unwrap_or_default()
    }

    fn shows_list_prices(&self) -> bool {
        let listed = |gpu: &OnGpu| gpu.speed.is_ok() && gpu.price.is_some_and(|price| !price.given);
        self.size.is_some() && self.gpus.iter().any(listed)
    }

    fn told(&self, speed: f64, price: Option<Price>) -> String {
        let mut told = format!("about {speed:.0} tokens/s");
        let Some(seconds) = self.seconds(speed) else { return told };
        told += &format!(", {}", duration(seconds));
        match price {
            Some(Price { dollars, .. }) => {
                told + &format!(", ${:.2} at ${dollars:.2} an hour", seconds / 3600.0 * dollars)
            }
            None => told + ", no price known: give one with --price",
        }
    }

    fn seconds(&self, speed: f64) -> Option<f64> {
        self.size.map(|size| size.tokens as f64 / speed.max(1e-9))
    }

    /// Returns the estimate as JSON.
    pub fn json(&self) -> Json {
        let gpu = |gpu: &OnGpu| match &gpu.speed {
            Err(fault) => json!({"gpu": gpu.name, "fits": false, "why": fault.clone().in_a_line()}),
            Ok(speed) => {
                let seconds = self.seconds(*speed);
                json!({"gpu": gpu.name, "fits": true, "tokens_per_second": speed.round(), "seconds": seconds.map(f64::round),
                    "dollars_an_hour": gpu.price.map(|price| price.dollars),
                    "price": gpu.price.map(|price| if price.given { "given" } else { PRICE_SOURCE }),
                    "dollars": seconds.zip(gpu.price).map(|(seconds, price)| (seconds / 36.0 * price.dollars).round() / 100.0)})
            }
        };
        json!({
            "rows": self.size.map(|size| size.rows),
            "steps": self.size.map(|size| size.steps),
            "tokens": self.size.map(|size| size.tokens),
            "gpus": self.gpus.iter().map(gpu).collect::<Vec<_>>(),
            "advice": self.advice,
        })
    }
}

/// Returns a duration such as `2 h 5 min`, `12 min` or `40 s`.
fn duration(seconds: f64) -> String {
    let whole = seconds.ceil() as u64;
    match whole {
        0..120 => format!("{whole} s"),
        120..7200 => format!("{} min", whole.div_ceil(60)),
        _ => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_price_is_of_a_card_that_is_known() {
        for (name, price) in PRICES {
            assert!(card::find(name).is_ok() && price > 0.0, "{name}");
        }
    }

    #[test]
    fn prices_are_names_and_dollars() {
        assert_eq!(parsed(&["l4=0.7".into()]).unwrap(), [("l4".to_owned(), 0.7)]);
        for wrong in ["l4", "l4=much", "l4=-1"] {
            assert_eq!(parsed(&[wrong.to_owned()]).unwrap_err().kind, crate::fault::Kind::Usage);
        }
    }

    #[test]
    fn times_and_costs_follow_from_tokens_and_speed() {
        let size = Some(Size { rows: 10, steps: 30, tokens: 3_600_000 });
        let on = |given| {
            let price = Some(Price { dollars: 0.5, given });
            vec![OnGpu { name: "l4".into(), speed: Ok(1000.0), price }]
        };
        let listed = Estimate { size, gpus: on(false), advice: None };
        assert!(listed.table().ends_with(
            "Costs follow list prices of one GPU on demand at large clouds in the United States, November 2026; yours may \
             differ: give it with --price NAME=DOLLARS.\n"
        ));
        assert_eq!(listed.json()["gpus"][0]["price"], PRICE_SOURCE);
        let estimate = Estimate { size, gpus: on(true), advice: None };
        assert_eq!(estimate.json()["gpus"][0]["price"], "given");
        assert_eq!(
            estimate.table(),
            "work: 30 optimizer steps over 10 rows, about 3600000 tokens (estimated from footers)\n\
             l4  about 1000 tokens/s, 60 min, $0.50 at $0.50 an hour\n"
        );
        assert_eq!(estimate.json()["gpus"][0]["dollars"], 0.5);
        assert_eq!((duration(7.2), duration(7500.0)), ("8 s".into(), "2 h 5 min".into()));
    }

    #[test]
    fn the_mean_row_is_never_longer_than_it_may_be() {
        assert_eq!(mean_tokens(Footers { rows: 10, text_bytes: 3800 }, 1024), 124);
        assert_eq!(mean_tokens(Footers { rows: 1, text_bytes: 1 << 30 }, 1024), 1024);
    }
}
