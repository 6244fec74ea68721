//! Files -> conversations -> token examples. Knows no model and no training.

/// How rows are read. Filled by `plan`.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// `None`: detected from the schema.
    pub layout: Option<Layout>,
    /// Column names that differ from the layout's own (KAITO: `messages_column`, `context_column`, `response_column`).
    pub messages_column: Option<String>,
    pub prompt_column: Option<String>,
    pub completion_column: Option<String>,
    pub text_column: Option<String>,
    /// Shuffle before the split.
    pub shuffle: bool,
    pub seed: u64,
    /// Share of rows that train, in (0, 1]; the rest is for evaluation.
    pub train_share: f64,
}

/// What a row holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    Messages,
    PromptCompletion,
    Text,
}

/// How conversations become tokens. Filled by `plan`.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenOptions {
    /// Longer examples are cut on the right; counted and reported.
    pub tokens_max: usize,
    pub loss: LossOn,
    /// Jinja text that replaces the model's own chat template.
    pub chat_template: Option<String>,
}

/// Which tokens carry loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LossOn {
    /// Assistant turns of conversations, completions of prompt/completion rows, all of plain text.
    Answers,
    Everything,
}

/// One training example: token ids and, for each, whether it is a target.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    pub ids: Vec<u32>,
    /// Same length as `ids`; the first token is never a target of a shifted loss, whatever stands here.
    pub supervised: Vec<bool>,
}
