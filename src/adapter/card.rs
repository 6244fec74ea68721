//! Facts of a run -> the model card, for people who find the adapter later.

use crate::facts::Facts;
use crate::facts::sites::Site;
use crate::train::Trained;

/// The content of the card.
pub struct Card<'a> {
    /// Name of the base model.
    pub base_model: &'a str,
    /// Facts of the base model.
    pub facts: &'a Facts,
    /// The adapted linear layers.
    pub sites: &'a [Site],
    /// Result of training.
    pub trained: &'a Trained,
    /// Quantisation and number formats of the base, in words.
    pub base_format: String,
    /// (name without secrets, SHA-256) of each dataset file.
    pub data: Vec<(String, String)>,
    /// The main settings: (name, value).
    pub settings: Vec<(String, String)>,
}

/// The text of `README.md` in the form that model hubs read: a header, then text.
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

/// Text from outside, made safe for Markdown: without line breaks, bars, brackets and backticks.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() || "|<>[]`".contains(c) { ' ' } else { c }).collect()
}
