//! The model card: facts of a run, for whoever finds the adapter later.

use crate::facts::Facts;
use crate::facts::sites::Site;
use crate::train::Trained;

/// What the card tells.
pub struct Card<'a> {
    pub base_model: &'a str,
    pub facts: &'a Facts,
    pub sites: &'a [Site],
    pub trained: &'a Trained,
    /// Quantisation and number formats in words.
    pub base_format: String,
    /// (name without secrets, SHA-256) of each dataset file.
    pub data: Vec<(String, String)>,
    /// Settings worth a line: (name, value).
    pub settings: Vec<(String, String)>,
}

/// `README.md` in the form that hubs read: a header, then text.
pub fn markdown(card: &Card) -> String {
    let parameters: usize = card.sites.iter().map(Site::parameters).sum();
    let mut lines = vec![
        "---".to_owned(),
        format!("base_model: {}", serde_json::Value::from(card.base_model)),
        "library_name: peft".to_owned(),
        "pipeline_tag: text-generation".to_owned(),
        "tags: [lora, qlora, hone]".to_owned(),
        "---".to_owned(),
        String::new(),
        format!("# LoRA adapter for {}", plain(card.base_model)),
        String::new(),
        format!(
            "{parameters} parameters on {} linear layers of a {} model with {} parameters, trained over {}.",
            card.sites.len(),
            card.facts.family,
            card.facts.parameters(),
            card.base_format
        ),
        String::new(),
        "| result | |".to_owned(),
        "|---|---|".to_owned(),
        format!("| optimizer steps | {} |", card.trained.steps),
        format!("| tokens | {} |", card.trained.tokens),
        format!("| loss, first step | {:.4} |", card.trained.first_loss),
        format!("| loss, last step | {:.4} |", card.trained.loss),
    ];
    lines.extend(card.trained.eval_loss.map(|loss| format!("| evaluation loss | {loss:.4} |")));
    lines.push(format!("| the adapter is of | {} |", card.trained.adapter()));
    lines.extend(["".into(), "| setting | |".into(), "|---|---|".into()]);
    lines.extend(card.settings.iter().map(|(name, value)| format!("| {} | {} |", plain(name), plain(value))));
    lines.extend(["".into(), "| data | SHA-256 |".into(), "|---|---|".into()]);
    lines.extend(card.data.iter().map(|(name, sha256)| format!("| {} | `{sha256}` |", plain(name))));
    lines.extend([
        String::new(),
        "Load it with `peft.PeftModel.from_pretrained(base, FOLDER)` or as a vLLM LoRA module.".to_owned(),
        "Every logged step is in `metrics.jsonl`.".to_owned(),
    ]);
    lines.join("\n") + "\n"
}

/// Text from outside, kept from being markup: no line breaks, bars, brackets or backticks.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() || "|<>[]`".contains(c) { ' ' } else { c }).collect()
}
