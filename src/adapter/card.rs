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
    /// Number of trained parameters.
    pub parameters: usize,
    /// Whether the adapter has A and B alone, without magnitudes and trained rows of tokens.
    pub plain: bool,
    /// Result of training.
    pub trained: &'a Trained,
    /// Quantisation and number formats of the base, in words.
    pub base_format: String,
    /// (name without secrets, SHA-256) of each dataset file.
    pub data: Vec<(String, String)>,
    /// Datasets of the hub: OWNER/NAME.
    pub datasets: Vec<String>,
    /// The main settings: (name, value).
    pub settings: Vec<(String, String)>,
}

/// Returns the text of `README.md` in the form that model hubs read: a header, then text.
pub fn markdown(card: &Card) -> String {
    let parameters = card.parameters;
    let mut lines = vec![
        "---".to_owned(),
        format!("base_model: {}", serde_json::Value::from(card.base_model)),
        "library_name: peft".to_owned(),
        "pipeline_tag: text-generation".to_owned(),
        "tags: [lora, qlora, hone]".to_owned(),
    ];
    if !card.datasets.is_empty() {
        lines.push(format!("datasets: {}", serde_json::Value::from(card.datasets.clone())));
    }
    lines.extend(results(card));
    lines.extend([
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
    ]);
    lines.extend(card.trained.eval_loss.map(|loss| format!("| evaluation loss | {loss:.4} |")));
    lines.push(format!("| the adapter is of | {} |", card.trained.adapter()));
    lines.extend(["".into(), "| setting | |".into(), "|---|---|".into()]);
    lines.extend(card.settings.iter().map(|(name, value)| format!("| {} | {} |", plain(name), plain(value))));
    lines.extend(["".into(), "| data | SHA-256 |".into(), "|---|---|".into()]);
    lines.extend(card.data.iter().map(|(name, sha256)| format!("| {} | `{sha256}` |", plain(name))));
    lines.extend([
        String::new(),
        load_with(card).to_owned(),
        "Every logged step is in `metrics.jsonl`.".to_owned(),
    ]);
    lines.join("\n") + "\n"
}

/// Returns the programs that load the adapter. vLLM takes neither magnitudes nor trained rows of tokens.
fn load_with(card: &Card) -> &'static str {
    match card.plain {
        true => "Load it with `peft.PeftModel.from_pretrained(base, FOLDER)` or as a vLLM LoRA module.",
        false => {
            "Load it with `peft.PeftModel.from_pretrained(base, FOLDER)`, serve it with `hone serve`, or merge it into its \
             base with `hone merge`. vLLM does not load this kind of adapter."
        }
    }
}

/// Returns the hub's `model-index`: the results of the evaluation of the adapter in the folder, which is the best or
/// the last one.
fn results(card: &Card) -> Vec<String> {
    let trained = card.trained;
    let best = trained.best.as_ref().filter(|_| trained.restored_step.is_some());
    let (name, value) = match (best, trained.eval_loss) {
        (Some(best), _) => (best.metric.clone(), best.value),
        (None, Some(loss)) => ("eval_loss".to_owned(), loss),
        (None, None) => return Vec::new(),
    };
    let text = |text: &str| serde_json::Value::from(text).to_string();
    let dataset = card.datasets.first().map_or("held-out rows", String::as_str);
    vec![
        "model-index:".into(),
        format!("- name: {}", text(&format!("LoRA adapter for {}", card.base_model))),
        "  results:".into(),
        "  - task: {type: text-generation, name: Text Generation}".into(),
        format!("    dataset: {{name: {}, type: {}}}", text(dataset), text(dataset)),
        "    metrics:".into(),
        format!("    - {{type: {name}, name: {name}, value: {value}}}"),
    ]
}

/// Returns the text from outside, made safe for Markdown: without line breaks, bars, brackets and backticks.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() || "|<>[]`".contains(c) { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// tests/scripts/model_card.py gives this header to huggingface_hub's own reader and validator.
    #[test]
    fn results_of_the_folders_adapter_are_in_the_header() {
        let text = include_str!("../../tests/fixtures/model_card.md");
        let facts = crate::facts::shapes::facts("phi3-mini").unwrap();
        let best = crate::train::BestEvaluation { step: 40, metric: "eval_loss".into(), value: 0.625 };
        let trained = Trained {
            steps: 60,
            first_loss: 2.0,
            loss: 1.0,
            train_loss: 1.5,
            eval_loss: Some(0.75),
            tokens: 10,
            seconds: 1.0,
            tokens_per_second: 10.0,
            resumed_at: None,
            best: Some(best),
            restored_step: Some(40),
            stopped_early: false,
            skipped_steps: 0,
        };
        let card = Card {
            base_model: "owner/base: \"7b\"",
            facts: &facts,
            sites: &[],
            parameters: 0,
            plain: true,
            trained: &trained,
            base_format: "an unquantised base".into(),
            data: vec![("rows.parquet".into(), "ab".into())],
            datasets: vec!["owner/rows".into()],
            settings: vec![("rank".into(), "8".into())],
        };
        let found = markdown(&card);
        if std::env::var_os("UPDATE_EXPECT").is_some() {
            std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/model_card.md"), &found)
                .unwrap();
            return;
        }
        assert_eq!(found, text);
        let other = markdown(&Card { plain: false, ..card });
        assert!(other.contains("vLLM does not load this kind of adapter"), "{other}");
    }
}
