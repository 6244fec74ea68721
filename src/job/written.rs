//! A trained adapter -> its files in the output folder, and the annotations of its image.

use crate::adapter::{self, card::Card};
use crate::facts::{Facts, Quantization};
use crate::fault::Result;
use crate::fetch;
use crate::model;
use crate::model::lora::Trainable;
use crate::plan::Plan;
use crate::registry::ImageFacts;
use crate::run_folder::{self, RunFolder};
use crate::source;
use crate::train::Trained;

/// Writes the adapter and its card.
pub(super) fn write(
    plan: &Plan,
    options: &model::Options,
    facts: &Facts,
    adapter: &Trainable,
    data: &[source::File],
    trained: &Trained,
    folder: &RunFolder,
) -> Result<()> {
    let sites = &adapter.sites;
    let config = adapter::config(sites, &adapter.tokens, facts.layers.len(), &options.lora, &plan.model_name);
    let card = Card {
        base_model: &plan.model_name,
        facts,
        sites,
        parameters: adapter.params.elem_count(),
        plain: adapter.tokens.is_empty() && !adapter.has_magnitudes(),
        trained,
        base_format: base_format(options),
        data: data.iter().map(|file| (file.name.clone(), file.sha256.clone())).collect(),
        datasets: plan.data.iter().filter_map(fetch::Data::hub_dataset).collect(),
        settings: settings(plan, options),
    };
    folder.write(adapter::WEIGHTS_FILE, &adapter::weights(adapter)?)?;
    let config = serde_json::to_vec_pretty(&config).expect("texts and numbers");
    folder.write(adapter::CONFIG_FILE, &config)?;
    folder.write("README.md", adapter::card::markdown(&card).as_bytes())
}

/// Returns the image's statements about the adapter.
pub(super) fn image_facts(plan: &Plan, trained: &Trained) -> ImageFacts {
    let annotations = [("hone.report", run_folder::REPORT.to_owned()), ("hone.adapter", trained.adapter())];
    ImageFacts {
        model_name: plan.model_name.clone(),
        title: Some(format!("LoRA adapter for {}", plan.model_name)),
        annotations: annotations.map(|(name, value)| (name.to_owned(), value)).into(),
        ..ImageFacts::default()
    }
}

fn base_format(options: &model::Options) -> String {
    match options.quantization {
        Quantization::None => "an unquantised base".into(),
        Quantization::FourBit { code, double } => {
            let scales = if double { ", scales quantised too" } else { "" };
            format!("a 4-bit base ({}, blocks of 64{scales})", code.name())
        }
        Quantization::Stored { code, .. } => {
            format!("a 4-bit base ({}, as bitsandbytes stored it in the checkpoint)", code.name())
        }
    }
}

fn settings(plan: &Plan, options: &model::Options) -> Vec<(String, String)> {
    let (lora, train) = (&options.lora, &plan.train);
    let mut list = vec![
        ("rank", lora.r.to_string()),
        ("products with the base", options.precision.name().to_owned()),
        ("alpha", lora.alpha.to_string()),
        ("dropout", lora.dropout.to_string()),
        ("learning rate", train.learning_rate.to_string()),
        ("schedule", train.schedule.name().to_owned()),
        ("examples a step", train.batch_examples.saturating_mul(train.accumulation).to_string()),
        ("longest example", format!("{} tokens", plan.tokens.tokens_max)),
        ("seed", train.seed.to_string()),
    ];
    if lora.dora {
        list.push(("magnitudes (DoRA)", "trained".to_owned()));
    }
    let trained = |ids: &[u32]| ids.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
    for (what, ids) in
        [("trained tokens", &lora.tokens.embedding), ("trained tokens of the head", &lora.tokens.head)]
    {
        if !ids.is_empty() {
            list.push((what, trained(ids)));
        }
    }
    list.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}
