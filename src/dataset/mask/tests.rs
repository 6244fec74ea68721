//! Compares masks of random conversations with a slow oracle. The oracle replaces every answer by a word that
//! occurs nowhere else, so that a plain search finds it, and carries the places over to the true text.
//!
//! Contents are pieces of text that the templates themselves write. A search would find such texts in the wrong place.

use super::super::template::Template;
use super::*;
use std::time::{Duration, UNIX_EPOCH};

const TALKS_EACH: usize = 150;

/// Random numbers that repeat from run to run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % bound
    }
}

/// A piece of an answer, and the unique word that stands for it.
struct Piece {
    text: String,
    word: String,
}

/// A turn of the assistant in parts: `before + text`, one after the other.
struct Turn {
    parts: Vec<(&'static str, Piece)>,
}

impl Turn {
    fn content(&self, words: bool) -> String {
        let part = |(before, piece): &(&str, Piece)| {
            format!("{before}{}", if words { &piece.word } else { &piece.text })
        };
        self.parts.iter().map(part).collect()
    }
}

/// A turn: role and content, or an answer in parts.
enum Said {
    Other(&'static str, String),
    Answer(Turn),
}

fn messages(talk: &[Said], words: bool) -> Vec<Message> {
    let message = |said: &Said| match said {
        Said::Other(role, text) => Message::new(*role, text.as_str()),
        Said::Answer(turn) => Message::new("assistant", turn.content(words)),
    };
    talk.iter().map(message).collect()
}

/// Returns a piece of the text that a template writes around and inside a small conversation, or a fixed word.
fn piece(random: &mut Random, source: &[char]) -> String {
    const WORDS: [&str; 8] = ["end", "B", "d", "a", "user", "assistant", "<|end|>", "yes"];
    loop {
        let text: String = if random.below(4) == 0 {
            WORDS[random.below(WORDS.len())].into()
        } else {
            let (from, length) = (random.below(source.len()), 1 + random.below(9));
            source[from..(from + length).min(source.len())].iter().collect()
        };
        let text = text.trim();
        if !text.is_empty() {
            return text.to_owned();
        }
    }
}

fn talk(random: &mut Random, source: &[char]) -> Vec<Said> {
    let mut said = Vec::new();
    let mut words = 0;
    let mut answer = |random: &mut Random| {
        words += 1;
        Piece { text: piece(random, source), word: format!("Zq{words:03}qZ") }
    };
    if random.below(4) == 0 {
        said.push(Said::Other("system", piece(random, source)));
    }
    for _ in 0..1 + random.below(4) {
        said.push(Said::Other("user", piece(random, source)));
        let mut parts = Vec::new();
        if random.below(5) == 0 {
            parts.push(("<think>\n", answer(random)));
            parts.push(("\n</think>\n\n", answer(random)));
        } else {
            parts.push(("", answer(random)));
        }
        said.push(Said::Answer(Turn { parts }));
    }
    said
}

/// Maps a place in the text with words to the true text.
struct Carry(Vec<(usize, usize, usize)>);

impl Carry {
    /// Makes the true text from the text with words.
    fn over(text: &str, pieces: &[&Piece]) -> (String, Carry) {
        let found = |piece: &&Piece| {
            Some((text.find(&piece.word)?, piece.word.len(), piece.text.len(), piece.text.clone()))
        };
        let mut found: Vec<_> = pieces.iter().filter_map(found).collect();
        found.sort();
        let (mut out, mut at) = (String::new(), 0);
        for (start, word, _, true_text) in &found {
            out += &text[at..*start];
            out += true_text;
            at = start + word;
        }
        out += &text[at..];
        (out, Carry(found.into_iter().map(|(start, word, length, _)| (start, word, length)).collect()))
    }

    fn place(&self, at: usize) -> usize {
        let before = self.0.iter().filter(|(start, word, _)| start + word <= at);
        before.fold(at, |place, (_, word, length)| place + length - word)
    }
}

/// Applies the mask's rule in cases in which a plain search is right.
fn oracle(template: &Template, talk: &[Said], text: &str) -> Option<Vec<Range<usize>>> {
    let values = Template::values(&messages(talk, true));
    let context = Context::default();
    let mut ranges = Vec::new();
    for (index, said) in talk.iter().enumerate() {
        let Said::Answer(turn) = said else { continue };
        let words = || turn.parts.iter().map(|(_, piece)| piece.word.as_str());
        let start = words().find_map(|word| text.find(word))?;
        let last = words().rev().find(|word| text.contains(*word))?;
        let end = text.find(last)? + last.len();
        let prompt =
            template.render(&values[..index], &context, true).map_or(String::new(), |prompt| prompt.text);
        let agreed = common_bytes(&prompt, text);
        let begins = match agreed <= start && text[agreed..start].trim().is_empty() {
            true => agreed,
            false if agreed == prompt.len() && agreed <= start => agreed,
            false => start,
        };
        let prefix = template.render(&values[..=index], &context, false).ok()?.text;
        let ends = match text.starts_with(&prefix) {
            true => prefix.len(),
            false => {
                let tail = &prefix[prefix.find(last)? + last.len()..];
                end + common_bytes(tail, &text[end..])
            }
        };
        ranges.push(begins..ends);
    }
    Some(ranges)
}

fn all_templates() -> Vec<(String, Template)> {
    let fixtures = [
        include_str!("../../../tests/fixtures/chat_templates.json"),
        include_str!("../../../tests/fixtures/templates.json"),
    ];
    let mut templates = Vec::new();
    for fixture in fixtures {
        let fixture: serde_json::Value = serde_json::from_str(fixture).unwrap();
        for (name, source) in fixture["templates"].as_object().unwrap() {
            let specials =
                [("bos_token".to_owned(), "<s>".to_owned()), ("eos_token".to_owned(), "</s>".to_owned())];
            let now = UNIX_EPOCH + Duration::from_secs(1_721_998_984);
            templates.push((name.clone(), Template::new(source.as_str().unwrap(), &specials, now).unwrap()));
        }
    }
    templates
}

#[test]
fn answers_of_random_conversations_are_those_of_the_oracle() {
    let (mut compared, mut skipped) = (0, 0);
    for (name, template) in all_templates() {
        if name == "macro_json" {
            continue; // shows only the start of a conversation, and quotes the content
        }
        let sample = [Message::new("user", "q"), Message::new("assistant", "r"), Message::new("user", "s")];
        let source = template.render(&Template::values(&sample), &Context::default(), true);
        let source: Vec<char> =
            source.map_or_else(|_| "user\nmodel\n".into(), |source| source.text).chars().collect();
        let mut random = Random(name.len() as u64 * 7919 + source.len() as u64);
        let mut here = 0;
        for _ in 0..TALKS_EACH {
            let talk = talk(&mut random, &source);
            let context = Context::default();
            let Ok(marked) = template.render(&Template::values(&messages(&talk, true)), &context, false)
            else {
                continue;
            };
            let truth = messages(&talk, false);
            let plain = template.render(&Template::values(&truth), &context, false).unwrap();
            let pieces: Vec<&Piece> = talk
                .iter()
                .filter_map(|said| if let Said::Answer(turn) = said { Some(turn) } else { None })
                .flat_map(|turn| turn.parts.iter().map(|(_, piece)| piece))
                .collect();
            let (carried, carry) = Carry::over(&marked.text, &pieces);
            let expected = match template.marks_answers {
                true => Some(marked.answers.clone()),
                false => oracle(&template, &talk, &marked.text),
            };
            let Some(expected) = expected.filter(|_| carried == plain.text) else {
                skipped += 1; // the template inspects the content
                continue;
            };
            let expected: Vec<Range<usize>> =
                expected.into_iter().map(|range| carry.place(range.start)..carry.place(range.end)).collect();
            let found = answers(&template, &truth, &context, 0)
                .unwrap_or_else(|problem| panic!("{name}: {problem}: {:?} of {truth:?}", plain.text));
            let found: Vec<Range<usize>> = found.answers.into_iter().map(|answer| answer.whole).collect();
            let show = |ranges: &[Range<usize>]| -> Vec<&str> {
                ranges.iter().map(|range| &plain.text[range.clone()]).collect()
            };
            assert_eq!(
                found,
                expected,
                "{name}: {:?}\nfound {:?}\nexpected {:?}",
                plain.text,
                show(&found),
                show(&expected)
            );
            here += 1;
        }
        assert!(here > TALKS_EACH / 10, "{name}: {here} conversations compared");
        compared += here;
    }
    assert!(compared > 4000 && skipped * 5 < compared, "{compared} compared, {skipped} skipped");
}

/// A template that inspects the beginning of an answer gets no marks there. The mask is the same.
#[test]
fn a_template_that_looks_into_answers_is_searched_from_where_the_turn_begins() {
    let source = "{% for m in messages %}{% if m.role == 'assistant' %}A:{% if m.content|length > 3 %}!{% endif %}{{ m.content }}<end>{% if loop.last %}<stop>{% endif %}{% else %}U:{{ m.content }}<end>{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}";
    let template = Template::new(source, &[], UNIX_EPOCH).unwrap();
    let turns = [
        ("user", "end"),
        ("assistant", "end"),
        ("user", "A:"),
        ("assistant", "A"),
        ("user", "x"),
        ("assistant", "<end>"),
    ];
    let talk: Vec<Message> = turns.iter().map(|(role, text)| Message::new(*role, *text)).collect();
    let found = answers(&template, &talk, &Context::default(), 0).unwrap();
    let shown: Vec<&str> = found.answers.iter().map(|answer| &found.text[answer.whole.clone()]).collect();
    assert_eq!(shown, ["end<end>", "A<end>", "!<end><end><stop>"]);
}

#[test]
fn turns_of_weight_zero_are_shown_and_not_learned() {
    let source = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}";
    let template = Template::new(source, &[], UNIX_EPOCH).unwrap();
    let mut talk: Vec<Message> = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
        .iter()
        .map(|(role, text)| Message::new(*role, *text))
        .collect();
    talk[1].learned = false;
    let found = answers(&template, &talk, &Context::default(), 0).unwrap();
    let offsets: Vec<(usize, usize)> = (0..found.text.len()).map(|at| (at, at + 1)).collect();
    let learned = supervised(&found.answers, &offsets);
    let shown: String =
        found.text.chars().zip(learned).filter(|(_, learned)| *learned).map(|(c, _)| c).collect();
    assert_eq!(shown, "d;");
    let mut all = vec![true; offsets.len()];
    unlearn(&found.answers, &offsets, &mut all);
    let shown: String = found.text.chars().zip(all).filter(|(_, learned)| *learned).map(|(c, _)| c).collect();
    assert_eq!(shown, "user:a;assistant:user:c;assistant:d;");
}
