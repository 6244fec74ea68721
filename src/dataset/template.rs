//! Chat template + messages -> the text that transformers would render, and the places of its answers.
//!
//! transformers renders with Jinja2 in a fixed setting: trimmed blocks, loop controls, its own `tojson`,
//! `raise_exception`, `strftime_now`, and a `{% generation %}` block that marks the assistant's text. minijinja has
//! no such tag, but its `{% filter %}` has the same whitespace and scope. The tag is therefore rewritten to a
//! filter that wraps its body in two sentinels, which are then cut out of the rendered text.

mod python;

use super::{Context, Message};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::time::SystemTime;

use jiff::Timestamp;
use python::{method, strftime, to_json};

/// LIMIT: instructions and 64-byte pieces of memory that a rendering may use: about 640 MB or one second.
const FUEL: u64 = 10_000_000;
/// LIMIT: the same for a short conversation. The longest templates in use need some ten thousand.
const FUEL_SHORT: u64 = 1_000_000;
/// A short conversation has at most so many messages of plain text, with so many bytes in all.
const SHORT_MESSAGES: usize = 64;
const SHORT_BYTES: usize = 32 << 10;
/// LIMIT: rows that run out of fuel before any row was rendered. A template that ends for none of them ends for no row.
const HOPELESS: u32 = 8;
const RECURSION_MAX: usize = 200;
/// LIMIT: bytes of a template; the largest in use have about 30 kB. A parser nests at most once per byte.
pub(super) const SOURCE_BYTES_MAX: usize = 256 << 10;
/// Most stack that the parser needs per byte of a template.
pub(super) const STACK_BYTES_A_BYTE: usize = 4 << 10;
/// LIMIT: bytes of a rendered text. No conversation is longer.
const TEXT_BYTES_MAX: usize = 256 << 20;
/// Sequences of private-use characters that no text contains.
const BEGIN: &str = "\u{10fffd}\u{f0f0a}\u{10fff1}";
const END: &str = "\u{10fffd}\u{f0f0b}\u{10fff1}";
const NAME: &str = "chat_template";
/// Prefix that distinguishes the template's own refusals from failures in it.
const REFUSED: &str = "\u{1}";

/// A compiled template.
pub(super) struct Template {
    environment: Environment<'static>,
    /// The same template with less fuel.
    short: Environment<'static>,
    /// Whether it marks answers with `{% generation %}`.
    pub marks_answers: bool,
    /// Rows that ran out of fuel.
    hopeless: AtomicU32,
    /// Whether any row was rendered.
    works: AtomicBool,
}

/// A rendered conversation.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Rendered {
    /// The text.
    pub text: String,
    /// Byte ranges of `text` inside `{% generation %}`, in order.
    pub answers: Vec<Range<usize>>,
}

impl Template {
    /// Compiles a template. `specials` are the tokenizer's named tokens (`bos_token` and the like); `now` is the
    /// time that `strftime_now` formats, in UTC. The error says what is wrong with the template's syntax.
    pub fn new(source: &str, specials: &[(String, String)], now: SystemTime) -> Result<Template, String> {
        if source.len() > SOURCE_BYTES_MAX {
            return Err(format!("the chat template has {} bytes, limit {SOURCE_BYTES_MAX}", source.len()));
        }
        let (source, marks_answers) = rewrite_generation(&source.replace("\r\n", "\n"));
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.expect("the default delimiters are valid"));
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(RECURSION_MAX);
        environment.set_unknown_method_callback(method);
        environment.add_filter("tojson", to_json);
        // In minijinja none is iterable. In Python a string is iterable and none is not, which Nemotron's `tools is
        // iterable` relies on.
        environment.add_test("iterable", |value: &Value| {
            value.kind() == ValueKind::String || (!value.is_none() && value.try_iter().is_ok())
        });
        environment.add_filter("__answer", |body: &str| format!("{BEGIN}{body}{END}"));
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, format!("{REFUSED}{message}")))
        });
        let now = Timestamp::try_from(now).unwrap_or(Timestamp::UNIX_EPOCH);
        environment.add_function("strftime_now", move |format: &str| strftime(format, now));
        for (name, token) in specials {
            environment.add_global(name.clone(), Value::from(token.as_str()));
        }
        environment.add_template_owned(NAME, source).map_err(|error| explain(&error))?;
        let mut short = environment.clone();
        short.set_fuel(Some(FUEL_SHORT));
        Ok(Template {
            environment,
            short,
            marks_answers,
            hopeless: AtomicU32::new(0),
            works: AtomicBool::new(false),
        })
    }

    /// Returns the messages as the template sees them, made once and rendered in parts.
    pub fn values(messages: &[Message]) -> Vec<Value> {
        messages.iter().map(value).collect()
    }

    /// Renders as `apply_chat_template(messages, tokenize=False, add_generation_prompt=...)` does, with the
    /// context's tools, documents and variables. The error says why there is no text.
    pub fn render(
        &self,
        messages: &[Value],
        context: &Context,
        add_generation_prompt: bool,
    ) -> Result<Rendered, String> {
        let environment = if is_short(messages, context) { &self.short } else { &self.environment };
        let template = environment.get_template(NAME).expect("added in `new`");
        let seen = |value: &Option<Arc<serde_json::Value>>| {
            value.as_deref().map_or(Value::from(()), |value| Value::from(Serde(value)))
        };
        let fixed = [
            ("messages", Value::from(messages.to_vec())),
            ("tools", seen(&context.tools)),
            ("documents", seen(&context.documents)),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
        ];
        let variables = context.variables.iter().flat_map(|variables| variables.iter());
        let variables = variables.map(|(name, value)| (name.as_str(), Value::from(Serde(value))));
        let context: BTreeMap<&str, Value> = fixed.into_iter().chain(variables).collect();
        if self.hopeless.load(Relaxed) >= HOPELESS && !self.works.load(Relaxed) {
            return Err(format!(
                "the chat template ran out of fuel for each of the first {HOPELESS} rows; no other is tried"
            ));
        }
        let text = template.render(context).map_err(|error| {
            self.hopeless.fetch_add(u32::from(error.kind() == ErrorKind::OutOfFuel), Relaxed);
            explain(&error)
        })?;
        self.works.store(true, Relaxed);
        if text.len() > TEXT_BYTES_MAX {
            return Err(format!(
                "the chat template makes {} bytes of a row, limit {TEXT_BYTES_MAX}",
                text.len()
            ));
        }
        if self.marks_answers { cut_sentinels(&text) } else { Ok(Rendered { text, answers: Vec::new() }) }
    }

    /// Renders a context that holds everything the template sees. The error says why there is no text.
    pub fn render_context(
        &self,
        context: &serde_json::Map<String, serde_json::Value>,
    ) -> Result<String, String> {
        let template = self.environment.get_template(NAME).expect("added in `new`");
        let text = template.render(Value::from(Serde(context))).map_err(|error| explain(&error))?;
        if self.marks_answers { cut_sentinels(&text).map(|rendered| rendered.text) } else { Ok(text) }
    }
}

/// Returns the part of the time that a template may write, so that texts made at other times are distinguished: the
/// dates that it asks for, or, if the format is no plain text, the second.
pub(super) fn dates(source: &str, now: SystemTime) -> Vec<String> {
    let time = Timestamp::try_from(now).unwrap_or(Timestamp::UNIX_EPOCH);
    let seconds = time.as_second();
    let mut dates = Vec::new();
    for rest in source.split("strftime_now").skip(1) {
        let Some(rest) = rest.trim_start().strip_prefix('(') else {
            // The template only checks whether it is defined, or gives it another name.
            let asked = rest.trim_start().starts_with("is ");
            dates.extend((!asked).then(|| seconds.to_string()));
            continue;
        };
        let rest = rest.trim_start();
        let quote = rest.chars().next().filter(|c| matches!(c, '"' | '\''));
        let format = quote.and_then(|quote| rest[1..].split_once(quote));
        let plain =
            format.filter(|(format, behind)| !format.contains('\\') && behind.trim_start().starts_with(')'));
        dates.push(match plain.map(|(format, _)| strftime(format, time)) {
            Some(Ok(date)) => date,
            _ => seconds.to_string(),
        });
    }
    dates
}

/// Returns whether a conversation is so short that its template has little to compute.
fn is_short(messages: &[Value], context: &Context) -> bool {
    let plain = |message: &Value| {
        let content = message.get_attr("content").ok()?;
        (message.len() == Some(2)).then(|| content.as_str().map_or(0, str::len))
    };
    let bytes = || messages.iter().map(plain).try_fold(0, |sum, bytes| Some(sum + bytes?));
    context.tools.is_none()
        && context.documents.is_none()
        && context.variables.is_none()
        && messages.len() <= SHORT_MESSAGES
        && bytes().is_some_and(|bytes| bytes <= SHORT_BYTES)
}

/// Returns a message as the template sees it: role, content (none if it is null), then the further fields.
fn value(message: &Message) -> Value {
    let content = message.content.as_deref().map_or(Value::from(()), Value::from);
    let mut fields = vec![("role", Value::from(message.role.as_str())), ("content", content)];
    for (name, extra) in &message.extra {
        let extra = Value::from(Serde(extra));
        match fields.iter_mut().find(|(other, _)| other == name) {
            Some((_, field)) => *field = extra, // an object from a tool replaces the content
            None => fields.push((name, extra)),
        }
    }
    Value::from_pairs(fields)
}

/// Rewrites `{%- generation +%}` to `{%- filter __answer +%}`, and its end likewise. Returns whether there was any.
fn rewrite_generation(source: &str) -> (String, bool) {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    let mut found = false;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        rest = tag;
        let Some(end) = tag.find("%}") else { break };
        let inside = &tag[..end];
        let open = inside.len() - inside.trim_start_matches(['-', '+']).len();
        let close = inside.trim_end_matches(['-', '+']).len();
        if open > close {
            continue;
        }
        let replacement = match inside[open..close].trim() {
            "generation" => " filter __answer ",
            "endgeneration" => " endfilter ",
            _ => continue,
        };
        found = true;
        out.extend([&inside[..open], replacement, &inside[close..]]);
        rest = &tag[end..];
    }
    out.push_str(rest);
    (out, found)
}

fn cut_sentinels(marked: &str) -> Result<Rendered, String> {
    let unbalanced = || "the chat template nests or cuts its generation blocks".to_string();
    let mut rendered = Rendered::default();
    let mut rest = marked;
    while let Some((before, after)) = rest.split_once(BEGIN) {
        let (answer, after) = after.split_once(END).ok_or_else(unbalanced)?;
        rendered.text.push_str(before);
        let start = rendered.text.len();
        rendered.text.push_str(answer);
        rendered.answers.push(start..rendered.text.len());
        rest = after;
    }
    rendered.text.push_str(rest);
    if rendered.text.contains(BEGIN) || rendered.text.contains(END) {
        Err(unbalanced())
    } else {
        Ok(rendered)
    }
}

fn explain(error: &Error) -> String {
    if let Some(message) = error.detail().and_then(|detail| detail.strip_prefix(REFUSED)) {
        return format!("the chat template refuses it: {message}");
    }
    let line = error.line().map(|line| format!(" at line {line}")).unwrap_or_default();
    let detail = error.detail().map(|detail| format!(": {detail}")).unwrap_or_default();
    format!("the chat template fails{line}: {}{detail}", error.kind())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    fn render(source: &str) -> Result<Rendered, String> {
        let messages = [Message::new("user", "é?"), Message::new("assistant", "4")];
        let now = UNIX_EPOCH + Duration::from_secs(1_721_998_984); // Fri 26 Jul 2024 13:03:04
        let specials = [("bos_token".to_string(), "<s>".to_string())];
        Template::new(source, &specials, now)?.render(
            &Template::values(&messages),
            &Context::default(),
            false,
        )
    }

    fn check(source: &str, expected: &str) {
        let text = render(source).map_or_else(|error| format!("! {error}"), |rendered| rendered.text);
        assert_eq!(text, expected, "{source}");
    }

    #[test]
    fn only_the_dates_that_a_template_asks_for_tell_times_apart() {
        let at = |seconds: u64| UNIX_EPOCH + Duration::from_secs(1_721_998_984 + seconds);
        let same = |source: &str, seconds: u64| dates(source, at(0)) == dates(source, at(seconds));
        let day = "{% if strftime_now is defined %}{{ strftime_now( \"%d %b %Y\" ) }}{% endif %}";
        assert_eq!(dates(day, at(0)), ["26 Jul 2024"]);
        assert!(same(day, 60) && !same(day, 86_400));
        assert!(!same("{{ strftime_now('%H:%M:%S') }}", 1));
        for computed in
            ["{{ strftime_now(f) }}", "{{ strftime_now('%d' ~ f) }}", "{% set g = strftime_now %}"]
        {
            assert!(!same(computed, 1), "{computed}");
        }
        assert!(same("{{ messages }}", 1_000_000));
    }

    #[test]
    fn methods_make_no_mountain_of_a_little() {
        for (source, refused) in [
            ("{{ {'a': [1]} | tojson(indent=65) }}", "indent is more than 64"),
            ("{{ {'a': [1]} | tojson(indent=18446744073709551615) }}", "indent is more than 64"),
            ("{% set a = 'a' * 100000 %}{{ a.replace('a', a) }}", "replace would make more"),
            ("{% set a = 'a' * 100000 %}{{ a.replace('', a) }}", "replace would make more"),
            ("{{ '{:>2000000000}'.format('x') }}", "format would make more"),
            ("{% set a = 'a' * 10000000 %}{{ a.split('b') | length }}", "split would make more"),
            ("{{ strftime_now('%Y' * 100000) }}", "strftime_now is given"),
        ] {
            let error = render(source).expect_err(source);
            assert!(error.contains(refused), "{source}: {error}");
        }
        assert!(render(&"-".repeat(SOURCE_BYTES_MAX + 1)).unwrap_err().contains("limit"));
        check("{{ 'a b'.replace(' ', ', ') }}{{ 'x,y'.split(',')[1] }}{{ '{:>3}'.format('x') }}", "a, by  x");
        check("{{ [1] | tojson(indent=2) }}", "[\n  1\n]");
    }

    #[test]
    fn special_tokens_and_the_clock_are_there() {
        check("{{ bos_token }}{{ pad_token }}{{ messages[0].content }}", "<s>é?");
        check("{{ strftime_now('%d %b %Y, %A %-I:%M %p %%') }}", "26 Jul 2024, Friday 1:03 PM %");
        check("{{ strftime_now('%F %T %y %B %a %H%S %-m') }}", "2024-07-26 13:03:04 24 July Fri 1304 7");
        check("{{ tools is none }} {{ x is defined }}", "True False");
        check("{{ tools is iterable }} {{ 'a' is iterable }} {{ messages is iterable }}", "False True True");
    }

    #[test]
    fn dates_hold_at_the_ends_of_months_and_years() {
        let date = |days: i64| strftime("%F %a", Timestamp::from_second(days * 86_400).unwrap()).unwrap();
        assert_eq!(date(0), "1970-01-01 Thu");
        assert_eq!(date(59), "1970-03-01 Sun");
        assert_eq!(date(11_016), "2000-02-29 Tue");
        assert_eq!(date(11_017), "2000-03-01 Wed");
        assert_eq!(date(19_722), "2023-12-31 Sun");
        assert_eq!(date(47_541), "2100-03-01 Mon");
    }

    #[test]
    fn generation_blocks_become_byte_ranges() {
        let source = "{% for m in messages %}\r\n{%- if m.role == 'assistant' %}\n  {%- generation -%}\n {{ m.content }}! {%+ endgeneration %}\n{% else %}{{ m.content }}{% endif %}{% endfor %}";
        let rendered = render(source).unwrap();
        assert_eq!(rendered.text, "é?4! ");
        assert_eq!(rendered.answers, vec![3..6]);
        assert_eq!(
            rewrite_generation("{% if generation %}{%-%}{% x"),
            ("{% if generation %}{%-%}{% x".into(), false)
        );
    }

    #[test]
    fn what_a_template_refuses_is_told_in_its_words() {
        check("{{ raise_exception('no system role') }}", "! the chat template refuses it: no system role");
        check(
            "\n{{ messages[0].nope() }}",
            "! the chat template fails at line 2: unknown method: map has no method named nope",
        );
        assert!(Template::new("{% if %}", &[], UNIX_EPOCH).is_err_and(|error| error.contains("line 1")));
    }

    /// The expected texts were rendered by transformers (`tests/scripts/templates.py`).
    #[test]
    fn renders_what_transformers_renders() {
        let fixture: serde_json::Value =
            serde_json::from_str(include_str!("../../tests/fixtures/templates.json")).unwrap();
        let text = |value: &serde_json::Value| value.as_str().unwrap().to_string();
        let specials: Vec<_> = fixture["specials"]
            .as_object()
            .unwrap()
            .iter()
            .map(|(name, token)| (name.clone(), text(token)))
            .collect();
        for case in fixture["cases"].as_array().unwrap() {
            let name = text(&case["name"]);
            let messages: Vec<Message> = fixture["conversations"]
                [case["messages"].as_u64().unwrap() as usize]
                .as_array()
                .unwrap()
                .iter()
                .map(|m| Message::new(text(&m["role"]), text(&m["content"])))
                .collect();
            let source = fixture["templates"][text(&case["template"])].as_str().unwrap();
            let template = Template::new(source, &specials, UNIX_EPOCH).unwrap();
            let prompt = case["add_generation_prompt"].as_bool().unwrap();
            match (
                template.render(&Template::values(&messages), &Context::default(), prompt),
                case["refused"].as_str(),
            ) {
                (Err(problem), Some(words)) => assert!(problem.ends_with(words), "{name}: {problem}"),
                (Ok(rendered), None) => {
                    assert_eq!(rendered.text, case["text"], "{name}");
                    let answers: Vec<&str> =
                        rendered.answers.iter().map(|range| &rendered.text[range.clone()]).collect();
                    assert_eq!(
                        serde_json::json!(answers),
                        *case.get("answers").unwrap_or(&serde_json::json!([])),
                        "{name}"
                    );
                }
                (outcome, words) => panic!("{name}: {outcome:?}, expected refusal {words:?}"),
            }
        }
    }

    /// Templates as publishers ship them, with tools, calls, system turns and thoughts. The expected texts were
    /// rendered by transformers (`tests/scripts/chat_templates.py`).
    #[test]
    fn renders_real_templates_as_transformers_does() {
        let fixture: serde_json::Value =
            serde_json::from_str(include_str!("../../tests/fixtures/chat_templates.json")).unwrap();
        let specials: Vec<(String, String)> =
            serde_json::from_value::<BTreeMap<String, String>>(fixture["specials"].clone())
                .unwrap()
                .into_iter()
                .collect();
        let now = UNIX_EPOCH + Duration::from_secs(fixture["seconds"].as_u64().unwrap());
        let mut wrong = Vec::new();
        for case in fixture["cases"].as_array().unwrap() {
            let name = case["template"].as_str().unwrap();
            let talk = &fixture["talks"][case["talk"].as_u64().unwrap() as usize];
            let values: Vec<Value> = talk["messages"]
                .as_array()
                .unwrap()
                .iter()
                .map(|message| Value::from(Serde(message)))
                .collect();
            let context = Context {
                tools: talk.get("tools").cloned().map(Arc::new),
                documents: None,
                variables: talk.get("variables").and_then(|v| v.as_object()).cloned().map(Arc::new),
            };
            let template =
                Template::new(fixture["templates"][name].as_str().unwrap(), &specials, now).unwrap();
            let rendered =
                template.render(&values, &context, case["add_generation_prompt"].as_bool().unwrap());
            let answers = |rendered: &Rendered| {
                rendered
                    .answers
                    .iter()
                    .map(|range| &rendered.text[range.clone()])
                    .collect::<serde_json::Value>()
            };
            let fits = match (&rendered, case.get("text")) {
                (Ok(rendered), Some(text)) => {
                    rendered.text == *text
                        && answers(rendered) == *case.get("answers").unwrap_or(&serde_json::json!([]))
                }
                (Err(_), None) => true,
                _ => false,
            };
            if !fits {
                wrong.push(format!("{name}, talk {}: {rendered:?}\nexpected {case}", case["talk"]));
            }
        }
        assert!(wrong.is_empty(), "{} cases\n{}", wrong.len(), wrong[..wrong.len().min(12)].join("\n\n"));
    }

    #[test]
    fn hostile_templates_end() {
        let sources = [
            "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{% set ns = namespace(x='xxxxxxxxxxxxxxxx') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
            "{{ 'x' * 1000000000 }}",
        ];
        for source in sources {
            assert!(render(source).is_err(), "{source}");
        }
    }

    /// The fuel of a template follows from the size of the conversation that it is given.
    #[test]
    fn a_short_conversation_gets_less_fuel() {
        let source = "{% for a in range(1000) %}{% for b in range(1000) %}{% endfor %}{% endfor %}x";
        let template = Template::new(source, &[], UNIX_EPOCH).unwrap();
        let ends = |messages: &[Message]| {
            template.render(&Template::values(messages), &Context::default(), false).is_ok()
        };
        let message = |bytes: usize| Message::new("user", "a".repeat(bytes));
        assert!(!ends(&[message(SHORT_BYTES)]));
        assert!(ends(&[message(SHORT_BYTES + 1)]));
        assert!(ends(&vec![message(1); SHORT_MESSAGES + 1]));
        let mut extra = message(1);
        extra.extra.push(("name", "n".into()));
        assert!(ends(&[extra]));
    }

    #[test]
    fn floats_are_written_as_python_does() {
        let cases = [
            (1.0, "1.0"),
            (-2.5, "-2.5"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (0.1, "0.1"),
        ];
        for (value, text) in cases {
            assert_eq!(python::float(value), text);
        }
        check("{{ [1.0, 1e20] | tojson }}", "[1.0, 1e+20]");
    }

    #[test]
    fn json_is_written_as_python_does() {
        check(
            r#"{{ {"b": [1, 2.5, none, true], "a": "é\n<'\""} | tojson }}"#,
            r#"{"b": [1, 2.5, null, true], "a": "é\n<'\""}"#,
        );
        check(
            r#"{{ {"b": [1], "a": {}} | tojson(indent=2, sort_keys=true) }}"#,
            "{\n  \"a\": {},\n  \"b\": [\n    1\n  ]\n}",
        );
        check(
            r#"{{ ["é😀", 1] | tojson(ensure_ascii=true, separators=[",", ":"]) }}"#,
            r#"["\u00e9\ud83d\ude00",1]"#,
        );
    }
}
