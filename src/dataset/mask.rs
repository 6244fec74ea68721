//! A rendered conversation -> the tokens that are answers.
//!
//! If a template marks its answers (`{% generation %}`), these marks count. For other templates an answer begins where
//! `messages[..i]` with a generation prompt ends, and ends where `messages[..=i]` ends, end-of-turn token included.
//! Some templates are not stable under prefixes: Phi-3 closes a conversation with an extra token, and Qwen3 drops
//! thoughts from all turns but the last. For those, invisible marks (`marks.rs`) give the place of the content. The
//! text after the content ends at the first difference between the full text and the prefix. A template that inspects
//! the content cannot be marked. Then the text is searched from the beginning of the turn.
//!
//! Everything is computed in bytes of one text and mapped to its tokens once, so merges across a border do not
//! matter.

use super::marks::{self, Ends, Part, Place};
use super::template::{Rendered, Template};
use super::{Context, Example, Message, Tokenizer};
use minijinja::value::Value;
use std::ops::Range;

/// One answer in the text. `content` lies inside `whole`, which also covers the text that the template puts around it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Answer {
    /// Bytes of the answer, with the text that the template puts around it.
    pub whole: Range<usize>,
    /// Bytes of the content.
    pub content: Range<usize>,
    /// Whether it is learned; false for a turn that is only shown.
    pub learned: bool,
}

/// The text of a conversation, and the places of its answers.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Answers {
    /// The text.
    pub text: String,
    /// The answers in order.
    pub answers: Vec<Answer>,
    /// Turns of the assistant with thoughts.
    pub thoughts: u64,
    /// Turns with thoughts that the template shows.
    pub thoughts_shown: u64,
}

/// Returns the conversation's text and its answers among `messages[from..]`. The error says why they cannot be
/// found.
pub(super) fn answers(
    template: &Template,
    messages: &[Message],
    context: &Context,
    from: usize,
) -> Result<Answers, String> {
    let values = Template::values(messages);
    let full = template.render(&values, context, false)?;
    let talk = Talk { template, messages, values: &values, context, from };
    let places = talk.places(&full.text, messages.len());
    if let Some(places) = &places {
        shows_calls(messages, places)?;
    }
    let found = match template.marks_answers {
        true => talk.by_blocks(&full, places.as_deref())?,
        false => talk.by_places(&full.text, places.as_deref())?,
    };
    let wanted = |message: &Message| message.role == "assistant";
    if found.is_empty() && messages[from..].iter().any(wanted) {
        return Err("the chat template marks no part of it as the assistant's".into());
    }
    let with_thoughts = |index: &usize| {
        let extra = &messages[*index].extra;
        wanted(&messages[*index]) && extra.iter().any(|(name, _)| marks::THOUGHTS.contains(name))
    };
    let thoughts: Vec<usize> = (0..messages.len()).filter(with_thoughts).collect();
    let shown = |index: &&usize| {
        let places = places.as_ref().map(|places| places.iter());
        places.is_none_or(|mut places| places.any(|p| p.message == **index && p.part == Part::Thoughts))
    };
    let thoughts_shown = thoughts.iter().filter(shown).count() as u64;
    Ok(Answers { text: full.text, answers: found, thoughts: thoughts.len() as u64, thoughts_shown })
}

/// Refuses a template that hides calls, because the model would learn answers to tool results without the calls.
fn shows_calls(messages: &[Message], places: &[Place]) -> Result<(), String> {
    let hidden = messages.iter().enumerate().any(|(index, message)| {
        message.role == "assistant"
            && message.extra.iter().any(|(name, _)| *name == "tool_calls")
            && !places.iter().any(|place| place.message == index && place.part == Part::Calls)
    });
    match hidden {
        true => Err("the chat template does not show the assistant's tool_calls".into()),
        false => Ok(()),
    }
}

/// Returns one flag per token; `offsets` are the tokens' byte ranges in the text.
pub(super) fn supervised(answers: &[Answer], offsets: &[(usize, usize)]) -> Vec<bool> {
    let mut flags = vec![false; offsets.len()];
    for Answer { whole, content, .. } in answers.iter().filter(|answer| answer.learned) {
        for (flag, &(start, end)) in flags.iter_mut().zip(offsets) {
            *flag |= belongs(whole, content, start, end);
        }
    }
    flags
}

/// Clears the flags of tokens in turns that are only shown.
pub(super) fn unlearn(answers: &[Answer], offsets: &[(usize, usize)], flags: &mut [bool]) {
    for Answer { whole, content, .. } in answers.iter().filter(|answer| !answer.learned) {
        for (flag, &(start, end)) in flags.iter_mut().zip(offsets) {
            *flag &= !belongs(whole, content, start, end);
        }
    }
}

/// Returns whether a token belongs to an answer. A token across the border belongs to it if it holds some of its
/// content.
fn belongs(whole: &Range<usize>, content: &Range<usize>, start: usize, end: usize) -> bool {
    let inside = start >= whole.start && end <= whole.end && start < whole.end;
    inside || (start < content.end && end > content.start)
}

/// Returns the example as text, with brackets around text that is not learned: `[user: 2+2?] 4<end>`.
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

/// A conversation and its template.
struct Talk<'a> {
    template: &'a Template,
    messages: &'a [Message],
    values: &'a [Value],
    context: &'a Context,
    from: usize,
}

impl Talk<'_> {
    /// Returns the places of the first `count` messages in `text`, which the template made of them without a generation
    /// prompt; `None` if the template inspects the content.
    fn places(&self, text: &str, count: usize) -> Option<Vec<Place>> {
        let with = |ends| {
            let marked = marks::marked(&self.messages[..count], ends)?;
            let rendered = self.template.render(&Template::values(&marked), self.context, false).ok()?;
            let (plain, places) = marks::cut(&rendered.text)?;
            (plain == text).then_some(places)
        };
        // Some templates look at how a text begins or ends. With one mark at a time, that end stays as it was.
        with(Ends::Both).or_else(|| marks::joined(with(Ends::First)?, with(Ends::Last)?))
    }

    /// Returns the answers that the template marks. Blocks of earlier turns belong to the prompt and are not learned.
    fn by_blocks(&self, full: &Rendered, places: Option<&[Place]>) -> Result<Vec<Answer>, String> {
        let begin = match &self.values[..self.from] {
            [] => 0,
            before => common_bytes(&self.template.render(before, self.context, true)?.text, &full.text),
        };
        let blocks: Vec<&Range<usize>> =
            full.answers.iter().filter(|range| !range.is_empty() && range.start >= begin).collect();
        let answer = |(number, range): (usize, &Range<usize>)| Answer {
            whole: range.clone(),
            content: range.clone(),
            learned: self.is_learned(number, range, blocks.len(), places),
        };
        Ok(blocks.iter().copied().enumerate().map(answer).collect())
    }

    /// Returns whether a block belongs to a learned turn: by the places inside it, else by its number among the
    /// answers.
    fn is_learned(
        &self,
        number: usize,
        block: &Range<usize>,
        blocks: usize,
        places: Option<&[Place]>,
    ) -> bool {
        let inside = |place: &&Place| block.start <= place.range.start && place.range.end <= block.end;
        if let Some(place) = places.and_then(|places| places.iter().find(inside)) {
            return self.messages[place.message].learned;
        }
        let mut turns = self.messages[self.from..].iter().filter(|message| message.role == "assistant");
        let as_many = turns.clone().count() == blocks;
        !as_many || turns.nth(number).is_none_or(|message| message.learned)
    }

    fn by_places(&self, text: &str, places: Option<&[Place]>) -> Result<Vec<Answer>, String> {
        let mut answers: Vec<Answer> = Vec::new();
        let mut cursor = 0; // no later message lies before it
        for (index, message) in self.messages.iter().enumerate() {
            if message.role != "assistant" {
                if places.is_none() {
                    cursor = find(text, cursor, message.text()).map_or(cursor, |range| range.end);
                }
                continue;
            }
            let prompt = self.prompt_before(text, index);
            let content = match places {
                Some(places) => span(places, index),
                // The search starts after the generation prompt, so that the answer "a" is not found in
                // `<|assistant|>`.
                None => find(text, prompt.behind(cursor), message.text())
                    .or_else(|| find(text, cursor, message.text())),
            };
            let content = match content {
                Some(content) => content,
                None if !message.learned => continue,
                None => return Err("the chat template does not show what the assistant says".into()),
            };
            let start = prompt.end_before(text, cursor, &content);
            let end = self.end_of(text, index, &content, places.is_some())?;
            cursor = end;
            if index >= self.from {
                answers.push(Answer { whole: start..end, content, learned: message.learned });
            }
        }
        Ok(answers)
    }

    fn prompt_before(&self, text: &str, index: usize) -> Prompt {
        // Some templates refuse an empty conversation, or one that ends with an answer.
        let Ok(prompt) = self.template.render(&self.values[..index], self.context, true) else {
            return Prompt { agreed: 0, whole: false };
        };
        let agreed = common_bytes(&prompt.text, text);
        Prompt { agreed, whole: agreed == prompt.text.len() }
    }

    /// Returns the end of a turn: after the content, as far as the text is the same whether or not the conversation
    /// goes on.
    fn end_of(
        &self,
        text: &str,
        index: usize,
        content: &Range<usize>,
        by_marks: bool,
    ) -> Result<usize, String> {
        let prefix = self.template.render(&self.values[..=index], self.context, false)?.text;
        let same = common_bytes(&prefix, text);
        if same == prefix.len() && same >= content.end {
            return Ok(same);
        }
        let end = match by_marks.then(|| self.places(&prefix, index + 1)).flatten() {
            Some(places) => span(&places, index).map(|range| range.end),
            None if same >= content.end => Some(content.end),
            None => self.searched_end(&prefix, index, &text[content.clone()]),
        };
        let tail = end.and_then(|end| prefix.get(end..));
        let tail = tail.ok_or("the chat template shows an answer in two ways")?;
        Ok(content.end + common_bytes(tail, &text[content.end..]))
    }

    /// Returns the end of the last answer of a prefix, searched for from the beginning of its turn.
    fn searched_end(&self, prefix: &str, index: usize, shown: &str) -> Option<usize> {
        let begin = self.prompt_before(prefix, index);
        let from = begin.behind(0);
        let found = prefix.get(from..)?.find(shown).map(|at| from + at + shown.len());
        found.or_else(|| find(prefix, from, self.messages[index].text()).map(|range| range.end))
    }
}

/// Returns the range from the first to the last piece of a message; `None` if nothing of it is shown.
fn span(places: &[Place], message: usize) -> Option<Range<usize>> {
    let ranges = || places.iter().filter(|place| place.message == message).map(|place| &place.range);
    Some(ranges().map(|range| range.start).min()?..ranges().map(|range| range.end).max()?)
}

/// The length up to which a conversation up to some turn, with a generation prompt, agrees with the full text.
struct Prompt {
    agreed: usize,
    /// Whether all of it agrees.
    whole: bool,
}

impl Prompt {
    /// Returns the earliest place where an answer may begin.
    fn behind(&self, floor: usize) -> usize {
        if self.whole { self.agreed } else { floor.max(self.agreed) }
    }

    /// Returns the place where the prompt ends in the full text; the content's start if that is not known.
    fn end_before(&self, text: &str, floor: usize, content: &Range<usize>) -> usize {
        let between = floor..=content.start;
        let reaches = between.contains(&self.agreed)
            && (self.whole || text[self.agreed..content.start].trim().is_empty());
        if reaches { self.agreed } else { content.start }
    }
}

/// Finds the content as templates show it: whole, trimmed, or without the thoughts before it.
fn find(text: &str, from: usize, content: &str) -> Option<Range<usize>> {
    let trimmed = content.trim();
    let answer = trimmed.rsplit_once("</think>").map(|(_, answer)| answer.trim());
    [Some(trimmed), answer].into_iter().flatten().filter(|wanted| !wanted.is_empty()).find_map(|wanted| {
        let start = from + text.get(from..)?.find(wanted)?;
        Some(start..start + wanted.len())
    })
}

/// Returns the length of the common prefix, cut to whole characters.
fn common_bytes(a: &str, b: &str) -> usize {
    let same = a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    (0..=same).rev().find(|&at| a.is_char_boundary(at) && b.is_char_boundary(at)).unwrap_or(0)
}

#[cfg(test)]
mod tests;
