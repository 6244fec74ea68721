//! A conversation that waits for its answer -> the text that the model continues.

use serde_json::{Map, Value, json};

use super::Tokenizer;
use super::template::Template;
use crate::fault::{Fault, Result};

/// A compiled chat template for inference.
pub struct Chat {
    template: Template,
    /// The model's own template for conversations with tools, if it has another one.
    with_tools: Option<Template>,
}

impl Chat {
    /// Compiles a chat template. `source` replaces the model's own: Jinja text, or the name of one of the model's templates.
    /// Returns `None` if there is neither.
    ///
    /// # Errors
    /// Config or Model: the template's syntax is wrong. Config: the model has no template of that name.
    pub fn of(tokenizer: &Tokenizer, source: Option<&str>) -> Result<Option<Chat>> {
        let text = match source {
            Some(name) if !name.contains('{') => Some(tokenizer.named_template(name)?),
            source => source.or(tokenizer.chat_template()),
        };
        let Some(text) = text else { return Ok(None) };
        let compile = |text: &str| {
            Template::new(text, tokenizer.specials(), tokenizer.now()).map_err(|problem| match source {
                Some(_) => Fault::config(problem).at("the chat template that was given"),
                None => Fault::model(problem).at("the model's chat template"),
            })
        };
        let with_tools = tokenizer.tool_template().filter(|_| source.is_none()).map(compile).transpose()?;
        Ok(Some(Chat { template: compile(text)?, with_tools }))
    }

    /// Renders a text as `apply_chat_template(**context, tokenize=False)` does. The context holds `messages`,
    /// `add_generation_prompt`, `tools` and any other variable of the template. The error says why there is no
    /// text.
    pub fn text(&self, mut context: Map<String, Value>) -> std::result::Result<String, String> {
        for name in ["tools", "documents"] {
            context.entry(name).or_insert(Value::Null);
        }
        let tools = context.get("tools").and_then(Value::as_array).is_some_and(|tools| !tools.is_empty());
        self.with_tools.as_ref().filter(|_| tools).unwrap_or(&self.template).render_context(&context)
    }

    /// The control token that the template writes after an answer.
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
