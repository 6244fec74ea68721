//! YAML text -> a tree of nodes with line and column. Scalars stay text, and the key that they belong to gives them a
//! type (`value`). KAITO reads them in this way too, since it passes every value through a command line. Only this
//! module uses the parser.

use serde_saphyr::granit_parser::{Event, Options, Parser, ScalarStyle, Span};

/// LIMIT: size of a file. KAITO's templates have 1 KiB; a ConfigMap cannot exceed 1 MiB.
pub const FILE_BYTES_MAX: usize = 1 << 20;
/// LIMIT: nesting depth; the format itself needs 4.
const DEPTH_MAX: usize = 16;
/// LIMIT: number of values; the table has about 250 keys.
const NODES_MAX: usize = 20_000;

/// A position in a text, counted from 1, as editors do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Line, from 1.
    pub line: usize,
    /// Column, from 1.
    pub column: usize,
}

/// A value with its position.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// The place where the value begins.
    pub place: Place,
    /// The value.
    pub content: Content,
}

/// A value without a type.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// A text, number or word.
    Scalar {
        /// The text, without quotes.
        text: String,
        /// The style in which it is written.
        style: Style,
    },
    /// A list.
    List(Vec<Node>),
    /// A map, in the order of its entries.
    Map(Vec<Entry>),
}

/// The style of a scalar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// A scalar without quotes.
    Plain,
    /// In quotes, or as a folded block.
    Quoted,
    /// As a `|` block, whose text has lines of its own, which start below the marker.
    Literal,
}

/// A key of a map, with its value.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// The place where the key begins.
    pub key_place: Place,
    /// The value.
    pub node: Node,
}

/// The reason why a text cannot be used, and where.
#[derive(Clone, Debug, PartialEq)]
pub struct Refusal {
    /// The place of the error.
    pub place: Place,
    /// The error.
    pub message: String,
}

impl Node {
    /// Returns whether the value is empty, `null`, `~`, or Python's `None`.
    pub fn is_null(&self) -> bool {
        match &self.content {
            Content::Scalar { text, style: Style::Plain } => {
                matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL" | "None")
            }
            _ => false,
        }
    }

    /// Returns the value of a map's key.
    pub fn get(&self, key: &str) -> Option<&Node> {
        match &self.content {
            Content::Map(entries) => entries.iter().find(|entry| entry.key == key).map(|entry| &entry.node),
            _ => None,
        }
    }

    /// Returns the value for a message: `"fast"`, `a list`, `nothing (null)`.
    pub fn describe(&self) -> String {
        match &self.content {
            _ if self.is_null() => "nothing (null)".into(),
            Content::Scalar { text, .. } => quote(text),
            Content::List(_) => "a list".into(),
            Content::Map(_) => "a map".into(),
        }
    }
}

/// Returns a value in quotes, cut to a length that fits in a message.
pub fn quote(text: &str) -> String {
    const SHOWN_CHARACTERS_MAX: usize = 60;
    match text.char_indices().nth(SHOWN_CHARACTERS_MAX) {
        Some((end, _)) => format!("{:?}...", &text[..end]),
        None => format!("{text:?}"),
    }
}

/// Reads one document; `None` if it is empty.
pub fn parse(text: &str) -> Result<Option<Node>, Refusal> {
    if text.len() > FILE_BYTES_MAX {
        let message = format!("{} bytes of YAML; at most {FILE_BYTES_MAX} are read", text.len());
        return Err(Refusal { place: Place { line: 1, column: 1 }, message });
    }
    let mut options = Options::default();
    options.flow_nesting_limit = DEPTH_MAX;
    options.block_nesting_limit = DEPTH_MAX;
    let parser = Parser::new_from_str_with_options(text.trim_start_matches('\u{feff}'), options);
    Reader { parser, nodes: 0 }.document()
}

struct Reader<'a, I: serde_saphyr::granit_parser::BorrowedInput<'a>> {
    parser: Parser<'a, I>,
    nodes: usize,
}

impl<'a, I: serde_saphyr::granit_parser::BorrowedInput<'a>> Reader<'a, I> {
    fn document(&mut self) -> Result<Option<Node>, Refusal> {
        let mut root = None;
        loop {
            let (event, place) = self.next()?;
            match event {
                Event::StreamStart | Event::DocumentStart(..) | Event::DocumentEnd => {}
                Event::StreamEnd => return Ok(root.filter(|node: &Node| !node.is_null())),
                _ if root.is_some() => return refuse(place, "a second YAML document; one is expected"),
                event => root = Some(self.node(event, place)?),
            }
        }
    }

    fn next(&mut self) -> Result<(Event<'a>, Place), Refusal> {
        loop {
            match self.parser.next_event() {
                // Another crate may turn on the parser's `comments` feature; its events mean nothing here.
                Some(Ok((event, span))) if is_content(&event) => return Ok((event, place_of(&span))),
                Some(Ok(_)) => {}
                Some(Err(error)) => {
                    let place = Place { line: error.marker().line(), column: error.marker().col() + 1 };
                    return refuse(place, format!("not valid YAML: {}", error.info()));
                }
                None => return Ok((Event::StreamEnd, Place { line: 1, column: 1 })),
            }
        }
    }

    fn node(&mut self, event: Event<'a>, place: Place) -> Result<Node, Refusal> {
        self.nodes += 1;
        if self.nodes > NODES_MAX {
            return refuse(place, format!("more than {NODES_MAX} values"));
        }
        let tag = match &event {
            Event::Scalar(_, _, _, tag)
            | Event::SequenceStart(_, _, tag)
            | Event::MappingStart(_, _, tag) => tag,
            _ => &None,
        };
        if let Some(tag) = tag
            && !tag.is_yaml_core_schema()
        {
            return refuse(place, format!("the tag {} has no meaning here", tag.original()));
        }
        let content = match event {
            Event::Scalar(text, style, ..) => Content::Scalar {
                text: text.into_owned(),
                style: match style {
                    ScalarStyle::Plain => Style::Plain,
                    ScalarStyle::Literal => Style::Literal,
                    _ => Style::Quoted,
                },
            },
            Event::SequenceStart(..) => Content::List(self.list()?),
            Event::MappingStart(..) => Content::Map(self.map()?),
            Event::Alias(_) => {
                return refuse(place, "aliases (*name) are not supported; write the value out");
            }
            _ => return refuse(place, "a value is missing"),
        };
        Ok(Node { place, content })
    }

    fn list(&mut self) -> Result<Vec<Node>, Refusal> {
        let mut items = Vec::new();
        loop {
            match self.next()? {
                (Event::SequenceEnd, _) => return Ok(items),
                (event, place) => items.push(self.node(event, place)?),
            }
        }
    }

    fn map(&mut self) -> Result<Vec<Entry>, Refusal> {
        let mut entries: Vec<Entry> = Vec::new();
        let mut places = std::collections::HashMap::new();
        loop {
            let (key, key_place) = match self.next()? {
                (Event::MappingEnd, _) => return Ok(entries),
                (Event::Scalar(text, ..), place) => (text.into_owned(), place),
                (_, place) => return refuse(place, "a key must be a plain word"),
            };
            if key == "<<" {
                return refuse(key_place, "merge keys (<<) are not supported; write the values out");
            }
            if let Some(first) = places.insert(key.clone(), key_place.line) {
                return refuse(key_place, format!("{key} appears twice; the first is on line {first}"));
            }
            let (event, place) = self.next()?;
            entries.push(Entry { key, key_place, node: self.node(event, place)? });
        }
    }
}

fn is_content(event: &Event<'_>) -> bool {
    matches!(
        event,
        Event::StreamStart
            | Event::StreamEnd
            | Event::DocumentStart(..)
            | Event::DocumentEnd
            | Event::Alias(_)
            | Event::Scalar(..)
            | Event::SequenceStart(..)
            | Event::SequenceEnd
            | Event::MappingStart(..)
            | Event::MappingEnd
    )
}

fn place_of(span: &Span) -> Place {
    Place { line: span.start.line(), column: span.start.col() + 1 }
}

fn refuse<T>(place: Place, message: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal { place, message: message.into() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::{Expect, expect};

    fn check(text: &str, expected: Expect) {
        let shown = match parse(text) {
            Ok(None) => "empty".to_string(),
            Ok(Some(node)) => show(&node),
            Err(refusal) => format!("{}:{}: {}", refusal.place.line, refusal.place.column, refusal.message),
        };
        expected.assert_eq(&shown);
    }

    fn show(node: &Node) -> String {
        let place = format!("@{}:{}", node.place.line, node.place.column);
        match &node.content {
            Content::Scalar { .. } => format!("{}{place}", node.describe()),
            Content::List(items) => format!("[{}]", items.iter().map(show).collect::<Vec<_>>().join(", ")),
            Content::Map(entries) => {
                let shown: Vec<String> =
                    entries.iter().map(|entry| format!("{}: {}", entry.key, show(&entry.node))).collect();
                format!("{{{}}}", shown.join(", "))
            }
        }
    }

    #[test]
    fn scalars_stay_text_with_their_place() {
        check(
            "a: 2e-4\nb:\n  - yes # why\n  - 'no'\nc: ~\nd:",
            expect![[
                r#"{a: "2e-4"@1:4, b: ["yes"@3:5, "no"@4:5], c: nothing (null)@5:4, d: nothing (null)@6:2}"#
            ]],
        );
        check("# nothing\n", expect!["empty"]);
        check("", expect!["empty"]);
    }

    #[test]
    fn what_is_refused() {
        check("a: 1\nb: 2\na: 3\n", expect!["3:1: a appears twice; the first is on line 1"]);
        check("a: &x [1]\nb: *x\n", expect!["2:4: aliases (*name) are not supported; write the value out"]);
        check(
            "a: !!python/object:os.system x\n",
            expect!["1:30: the tag !!python/object:os.system has no meaning here"],
        );
        check("? [a]\n: b\n", expect!["1:3: a key must be a plain word"]);
        check("a: 1\n---\nb: 2\n", expect!["3:1: a second YAML document; one is expected"]);
        check("a: [1\nb: 2\n", expect!["2:2: not valid YAML: illegal placement of ':' indicator"]);
        check(
            "a:\n\tb: 1\n",
            expect!["2:2: not valid YAML: tabs disallowed within this context (block indentation)"],
        );
    }

    #[test]
    fn bombs_end_early() {
        let bomb = (1..30).fold("a0: &a0 [x, x]\n".to_string(), |text, level| {
            format!("{text}a{level}: &a{level} [*a{0}, *a{0}, *a{0}]\n", level - 1)
        });
        check(&bomb, expect!["2:10: aliases (*name) are not supported; write the value out"]);
        check(&"[".repeat(100_000), expect!["1:17: not valid YAML: recursion limit exceeded"]);
        check(
            &(0..500).map(|depth| format!("{}a:\n", " ".repeat(depth))).collect::<String>(),
            expect!["17:17: not valid YAML: recursion limit exceeded"],
        );
        check(&"- x\n".repeat(30_000), expect!["20000:3: more than 20000 values"]);
        check(
            &"x".repeat(FILE_BYTES_MAX + 1),
            expect!["1:1: 1048577 bytes of YAML; at most 1048576 are read"],
        );
    }
}
