//! A rendered conversation -> which of its tokens are answers.
//!
//! A template that marks its answers (`{% generation %}`) is believed. For the others an answer is what the
//! prefixes of the conversation differ by: it begins where `messages[..i]` with a generation prompt ends, and
//! ends, end-of-turn token included, where `messages[..=i]` ends. Some templates are not stable under prefixes:
//! Phi-3 closes a conversation with an extra token, Qwen3 drops thoughts from all but the last turn. There the
//! answer's text is searched, and what follows it ends where the full text and the prefix stop to agree.
//! Everything is done in bytes of one text and mapped to its tokens once, so merges across a border do not matter.

use super::template::{Rendered, Template};
use super::{Example, Message, Tokenizer};
use minijinja::value::Value;
use std::ops::Range;

/// One answer in the text: `content` lies inside `whole`, which also holds what the template puts around it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Answer {
    pub whole: Range<usize>,
    pub content: Range<usize>,
}

/// The conversation's text and its answers among `messages[from..]`. Error: why they cannot be told.
pub(super) fn answers(
    template: &Template,
    messages: &[Message],
    from: usize,
) -> Result<(String, Vec<Answer>), String> {
    let values = Template::values(messages);
    let full = template.render(&values, false)?;
    let found = if template.marks_answers {
        marked(template, &full, &values[..from])?
    } else {
        searched(template, &full.text, messages, &values, from)?
    };
    if found.is_empty() && messages[from..].iter().any(|message| message.role == "assistant") {
        return Err("the chat template marks no part of it as the assistant's".into());
    }
    Ok((full.text, found))
}

/// One flag a token; `offsets` are the tokens' byte ranges of the text.
pub(super) fn supervised(answers: &[Answer], offsets: &[(usize, usize)]) -> Vec<bool> {
    let mut flags = vec![false; offsets.len()];
    for Answer { whole, content } in answers {
        for (flag, &(start, end)) in flags.iter_mut().zip(offsets) {
            let inside = start >= whole.start && end <= whole.end && start < whole.end;
            // A token across the border belongs to the answer if it holds some of its content.
            let holds_content = start < content.end && end > content.start;
            *flag |= inside || holds_content;
        }
    }
    flags
}

/// The example as text, brackets around what is not learned: `[user: 2+2?] 4<end>`.
pub fn show(example: &Example, tokenizer: &Tokenizer) -> String {
    let learned = |index: usize| index > 0 && example.supervised[index];
    let mut text = String::new();
    let mut start = 0;
    for index in 1..=example.ids.len() {
        if index == example.ids.len() || learned(index) != learned(start) {
            let part = tokenizer.text(&example.ids[start..index]);
            text += &if learned(start) { part } else { format!("[{part}]") };
            start = index;
        }
    }
    text
}

fn marked(template: &Template, full: &Rendered, before: &[Value]) -> Result<Vec<Answer>, String> {
    // What earlier turns answered is given, not learned.
    let begin = match before {
        [] => 0,
        before => common_bytes(&template.render(before, true)?.text, &full.text),
    };
    let answers = full.answers.iter().filter(|range| !range.is_empty() && range.start >= begin);
    Ok(answers.map(|range| Answer { whole: range.clone(), content: range.clone() }).collect())
}

fn searched(
    template: &Template,
    text: &str,
    messages: &[Message],
    values: &[Value],
    from: usize,
) -> Result<Vec<Answer>, String> {
    let mut answers: Vec<Answer> = Vec::new();
    let mut cursor = 0; // no later message stands before it
    for (index, message) in messages.iter().enumerate() {
        if message.role != "assistant" {
            cursor = find(text, cursor, &message.content).map_or(cursor, |range| range.end);
            continue;
        }
        let prompt = prompt_before(template, text, &values[..index]);
        // Behind the generation prompt, lest the answer "a" be found in `<|assistant|>`.
        let begin = if prompt.whole { prompt.agreed } else { cursor.max(prompt.agreed) };
        let content = find(text, begin, &message.content)
            .or_else(|| find(text, cursor, &message.content))
            .ok_or("the chat template does not show what the assistant says")?;
        let start = prompt.end_before(text, cursor, &content);
        let end = end_of(template, text, &values[..=index], &message.content, &content)?;
        cursor = end;
        if index >= from {
            answers.push(Answer { whole: start..end, content });
        }
    }
    Ok(answers)
}

/// How far a conversation up to some turn, with a generation prompt, agrees with the full text.
struct Prompt {
    agreed: usize,
    /// All of it agrees.
    whole: bool,
}

fn prompt_before(template: &Template, text: &str, values: &[Value]) -> Prompt {
    // Some templates refuse to render no messages, or to end with an answer.
    let Ok(prompt) = template.render(values, true) else { return Prompt { agreed: 0, whole: false } };
    let agreed = common_bytes(&prompt.text, text);
    Prompt { agreed, whole: agreed == prompt.text.len() }
}

impl Prompt {
    /// Where it ends in the full text; the content's start where that cannot be told.
    fn end_before(&self, text: &str, floor: usize, content: &Range<usize>) -> usize {
        let between = floor..=content.start;
        let reaches = between.contains(&self.agreed)
            && (self.whole || text[self.agreed..content.start].trim().is_empty());
        if reaches { self.agreed } else { content.start }
    }
}

/// Where the turn ends: what follows the content, as far as it is the same whether or not the conversation goes on.
fn end_of(
    template: &Template,
    text: &str,
    values: &[Value],
    written: &str,
    content: &Range<usize>,
) -> Result<usize, String> {
    let prefix = template.render(values, false)?.text;
    if text.starts_with(&prefix) && prefix.len() >= content.end {
        return Ok(prefix.len());
    }
    let shown = &text[content.clone()];
    let last = prefix.rfind(shown).or_else(|| prefix.rfind(written.trim())).map(|at| at + shown.len());
    let tail = last.and_then(|at| prefix.get(at..)).ok_or("the chat template shows an answer in two ways")?;
    Ok(content.end + common_bytes(tail, &text[content.end..]))
}

/// The content as templates show it: whole, trimmed, or without the thoughts in front.
fn find(text: &str, from: usize, content: &str) -> Option<Range<usize>> {
    let trimmed = content.trim();
    let answer = trimmed.rsplit_once("</think>").map(|(_, answer)| answer.trim());
    [Some(trimmed), answer].into_iter().flatten().filter(|wanted| !wanted.is_empty()).find_map(|wanted| {
        let start = from + text[from..].find(wanted)?;
        Some(start..start + wanted.len())
    })
}

/// Length of the common prefix, cut to whole characters.
fn common_bytes(a: &str, b: &str) -> usize {
    let same = a.chars().zip(b.chars()).take_while(|(a, b)| a == b);
    same.map(|(character, _)| character.len_utf8()).sum()
}
