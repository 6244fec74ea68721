//! A conversation that waits for its answer -> the text that the model continues.

use serde_json::{Map, Value, json};

use super::Tokenizer;
use super::encode::{ROW_STACK_BYTES, compiled};
use super::template::Template;
use crate::bounds::Bounds;
use crate::fault::{Kind, Result};

/// LIMIT: memory of a rendering, beside the conversation. A template runs out of fuel before.
const RENDERING_BYTES_MAX: usize = 4 << 30;

/// Compiled chat templates for inference.
pub struct Chat {
    template: Template,
    source: String,
    /// Text of the template for conversations with tools.
    tools_source: String,
    /// The model's own template for conversations with tools, if it has another one.
    with_tools: Option<Template>,
}

impl Chat {
    /// Compiles a chat template. `source` replaces the model's own: Jinja text, or the name of one of the model's
    /// templates. Returns `None` if there is neither.
    ///
    /// # Errors
    /// Config or Model: the template's syntax is wrong. Config: the model has no template of that name.
    pub fn of(tokenizer: &Tokenizer, source: Option<&str>) -> Result<Option<Chat>> {
        let text = match source {
            Some(name) if !name.contains('{') => Some(tokenizer.named_template(name)?),
            source => source.or(tokenizer.chat_template()),
        };
        let Some(text) = text else { return Ok(None) };
        let compile = |text: &str| match source {
            Some(_) => compiled(text, tokenizer, Kind::Config, "the chat template that was given"),
            None => compiled(text, tokenizer, Kind::Model, "the model's chat template"),
        };
        let tools_source = tokenizer.tool_template().filter(|_| source.is_none());
        let with_tools = tools_source.map(compile).transpose()?;
        let tools_source = tools_source.unwrap_or_default().to_owned();
        Ok(Some(Chat { template: compile(text)?, source: text.to_owned(), tools_source, with_tools }))
    }

    /// Returns the template's Jinja text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Returns whether a template may use the variable: its text has the name.
    pub fn reads(&self, variable: &str) -> bool {
        [&self.source, &self.tools_source].into_iter().any(|text| text.contains(variable))
    }

    /// Renders a text as `apply_chat_template(**context, tokenize=False)` does. The context holds `messages`,
    /// `add_generation_prompt`, `tools` and any other variable of the template. The error says why there is no
    /// text.
    pub fn text(&self, mut context: Map<String, Value>) -> std::result::Result<String, String> {
        for name in ["tools", "documents"] {
            context.entry(name).or_insert(Value::Null);
        }
        let tools = context.get("tools").and_then(Value::as_array).is_some_and(|tools| !tools.is_empty());
        let template = self.with_tools.as_ref().filter(|_| tools).unwrap_or(&self.template);
        // Values that a template nests are dropped by recursion.
        let bounds = Bounds::new(Kind::Model, "a conversation with the chat template", RENDERING_BYTES_MAX);
        let rendered = bounds.hold_deep(ROW_STACK_BYTES, || Ok(template.render_context(&context)));
        rendered.unwrap_or_else(|fault| Err(fault.message))
    }

    /// Returns the control token that the template writes after an answer.
    pub fn end_of_turn(&self, tokenizer: &Tokenizer) -> Option<u32> {
        const ANSWER: &str = "Qzx7";
        let messages = json!([{"role": "user", "content": "Q"}, {"role": "assistant", "content": ANSWER}]);
        let context = json!({"messages": messages, "add_generation_prompt": false}).as_object().cloned()?;
        let text = self.text(context).ok()?;
        let (_, behind) = text.rsplit_once(ANSWER)?;
        let first = *tokenizer.encode(behind.trim_start(), false).ok()?.first()?;
        tokenizer.is_special(first).then_some(first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// A name chooses one of the model's templates; without one, conversations with tools get the template for tools.
    #[test]
    fn a_template_is_chosen_by_name_and_by_tools() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llama3/model");
        let folder = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(&golden).unwrap().flatten() {
            let name = entry.file_name().into_string().unwrap();
            if name.ends_with(".json") && !name.starts_with("chat_template") {
                std::fs::copy(entry.path(), folder.path().join(name)).unwrap();
            }
        }
        let config = std::fs::read(golden.join("tokenizer_config.json")).unwrap();
        let mut config: Value = serde_json::from_slice(&config).unwrap();
        config["chat_template"] = json!([
            {"name": "default", "template": "D{{ messages[0].content }}"},
            {"name": "tool_use", "template": "T{{ tools[0] }}"},
            {"name": "rag", "template": "R{{ messages[0].content }}"},
        ]);
        std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        let text = |source: Option<&str>, tools: Value| {
            let context = json!({"messages": [{"role": "user", "content": "x"}], "tools": tools});
            let chat = Chat::of(&tokenizer, source).unwrap().expect("there is a template");
            chat.text(context.as_object().cloned().unwrap()).unwrap()
        };
        assert_eq!(text(None, Value::Null), "Dx");
        assert_eq!(text(None, json!(["t"])), "Tt");
        assert_eq!(text(None, json!([])), "Dx");
        assert_eq!(text(Some("rag"), json!(["t"])), "Rx");
        assert_eq!(text(Some("{{ messages[0].role }}"), Value::Null), "user");
        let fault = Chat::of(&tokenizer, Some("none")).err().expect("refused");
        assert!(fault.to_string().contains("rag"), "{fault}");
    }
}
