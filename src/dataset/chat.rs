//! A conversation that waits for its answer -> the text that the model continues.

use serde_json::{Map, Value, json};

use super::Tokenizer;
use super::template::Template;
use crate::fault::{Fault, Result};

/// A compiled chat template for inference.
pub struct Chat {
    template: Template,
    source: String,
}

impl Chat {
    /// Compiles a chat template; `source` replaces the model's own: Jinja text, or the name of one of the model's templates.
    /// Returns `None` if there is neither.
    ///
    /// # Errors
    /// Config or Model: the template's syntax is wrong, or the model has none of that name.
    pub fn of(tokenizer: &Tokenizer, source: Option<&str>) -> Result<Option<Chat>> {
        // A name has no tags.
        let named = source.filter(|text| !text.contains('{')).map(|name| tokenizer.named_template(name));
        let Some(text) = named.transpose()?.or(source).or(tokenizer.chat_template()) else { return Ok(None) };
        let compiled = Template::new(text, tokenizer.specials(), tokenizer.now());
        compiled.map(|template| Some(Chat { template, source: text.to_owned() })).map_err(|problem| {
            match source {
                Some(_) => Fault::config(problem).at("the chat template that was given"),
                None => Fault::model(problem).at("the model's chat template"),
            }
        })
    }

    /// The template's own text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders a text as `apply_chat_template(**context, tokenize=False)` does. The context holds `messages`,
    /// `add_generation_prompt`, `tools` and any other variable of the template. The error says why there is no
    /// text.
    pub fn text(&self, mut context: Map<String, Value>) -> std::result::Result<String, String> {
        for name in ["tools", "documents"] {
            context.entry(name).or_insert(Value::Null);
        }
        self.template.render_context(&context)
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
