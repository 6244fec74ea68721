//! A spec -> typed values, each recorded with its origin. Defaults come from the table of keys only. Reading a key
//! that the table does not have, or has with another type, is a defect.

use super::{Plan, Value};
use crate::fault::Result;
use crate::spec::keys::{self, Effect, Key, Section};
use crate::spec::{self, Given, Mistakes, Origin, Spec, value::Value as Written};

/// Reads keys and collects values, warnings and mistakes.
pub(super) struct Reader<'a> {
    spec: &'a Spec,
    read: Vec<(&'static Key, Value)>,
    derived: Vec<Value>,
    mistakes: Mistakes,
    warnings: Vec<String>,
}

impl<'a> Reader<'a> {
    /// Returns a reader that has read nothing yet.
    pub fn new(spec: &'a Spec) -> Reader<'a> {
        let (read, derived, warnings) = Default::default();
        Reader { spec, read, derived, mistakes: Mistakes::default(), warnings }
    }

    /// Returns a boolean that has a default.
    pub fn boolean(&mut self, section: Section, name: &str) -> bool {
        self.maybe_boolean(section, name).expect("the table gives a default")
    }

    /// Returns an integer that has a default.
    pub fn integer(&mut self, section: Section, name: &str) -> i64 {
        self.maybe_integer(section, name).expect("the table gives a default")
    }

    /// Returns a number that has a default.
    pub fn number(&mut self, section: Section, name: &str) -> f64 {
        self.maybe_number(section, name).expect("the table gives a default")
    }

    /// Returns a boolean; `None` if it is not given and has no default.
    pub fn maybe_boolean(&mut self, section: Section, name: &str) -> Option<bool> {
        match self.value(section, name)? {
            Written::Boolean(value) => Some(value),
            other => unreachable!("{name} is {other:?}, not a boolean"),
        }
    }

    /// Returns an integer; `None` if it is not given and has no default.
    pub fn maybe_integer(&mut self, section: Section, name: &str) -> Option<i64> {
        match self.value(section, name)? {
            Written::Integer(value) => Some(value),
            other => unreachable!("{name} is {other:?}, not an integer"),
        }
    }

    /// Returns a number; `None` if it is not given and has no default.
    pub fn maybe_number(&mut self, section: Section, name: &str) -> Option<f64> {
        match self.value(section, name)? {
            Written::Number(value) => Some(value),
            other => unreachable!("{name} is {other:?}, not a number"),
        }
    }

    /// Returns a text; `None` if it is not given and has no default.
    pub fn text(&mut self, section: Section, name: &str) -> Option<String> {
        match self.value(section, name)? {
            Written::Text(value) => Some(value),
            other => unreachable!("{name} is {other:?}, not text"),
        }
    }

    /// Returns a list of texts; a single text counts as a list of one.
    pub fn texts(&mut self, section: Section, name: &str) -> Vec<String> {
        self.list(section, name, |item| match item {
            Written::Text(text) => Some(text),
            _ => None,
        })
    }

    /// Returns a list of integers; empty if it is not given.
    pub fn integers(&mut self, section: Section, name: &str) -> Vec<i64> {
        self.list(section, name, |item| match item {
            Written::Integer(value) => Some(value),
            _ => None,
        })
    }

    /// Returns a map from texts to numbers; empty if it is not given.
    pub fn map(&mut self, section: Section, name: &str) -> Vec<(String, f64)> {
        let Some(Written::Map(entries)) = self.value(section, name) else { return Vec::new() };
        let number = |value| match value {
            Written::Number(value) => value,
            other => unreachable!("{name} holds {other:?}, not a number"),
        };
        entries.into_iter().map(|(key, value)| (key, number(value))).collect()
    }

    /// Returns the value as it was written, of any shape.
    pub fn any(&mut self, section: Section, name: &str) -> Option<Written> {
        self.value(section, name)
    }

    /// Returns the place where the value in force was written.
    pub fn origin(&self, section: Section, name: &str) -> Origin {
        self.given(section, name).map_or(Origin::Default, |given| given.origin.clone())
    }

    /// Returns the value that the spec gives for a key.
    pub fn given(&self, section: Section, name: &str) -> Option<&'a Given> {
        self.spec.get(section, name)
    }

    /// Returns whether the spec gives a key another value than null.
    pub fn is_given(&self, section: Section, name: &str) -> bool {
        self.given(section, name).is_some_and(|given| given.value != Written::Null)
    }

    /// Shows a key that was read as null, because null has a meaning of its own for it.
    pub fn show_null(&mut self, section: Section, name: &str) {
        let key = keys::find(section, name).expect("only keys of the table are read");
        let origin = self.origin(section, name);
        for (_, value) in self.read.iter_mut().filter(|(read, _)| *read == key) {
            (value.value, value.origin) = (serde_json::Value::Null, origin.clone());
        }
    }

    /// Records a value that was derived from several keys.
    pub fn derive(&mut self, name: &str, value: impl Into<serde_json::Value>, origin: Origin) {
        self.derived.push(Value { name: name.into(), value: value.into(), origin });
    }

    /// Adds a mistake in the value that was written at `origin`.
    pub fn wrong(&mut self, origin: &Origin, message: impl Into<String>) {
        self.mistakes.add(origin, message.into());
    }

    /// Adds a warning.
    pub fn warn(&mut self, message: String) {
        self.warnings.push(message);
    }

    /// Returns the plan with all recorded values, or all mistakes.
    pub fn finish(self, mut plan: Plan) -> Result<Plan> {
        self.mistakes.into_result()?;
        let mut read = self.read;
        read.sort_by_key(|(key, _)| keys::all().iter().position(|other| other == *key));
        plan.values = self.derived.into_iter().chain(read.into_iter().map(|(_, value)| value)).collect();
        plan.warnings = self.warnings;
        Ok(plan)
    }

    /// Fails with all mistakes. It serves callers that make no plan of the values.
    pub fn check(self) -> Result<()> {
        self.mistakes.into_result()
    }

    fn list<T>(&mut self, section: Section, name: &str, item: impl Fn(Written) -> Option<T>) -> Vec<T> {
        let items = match self.value(section, name) {
            None => Vec::new(),
            Some(Written::List(items)) => items,
            Some(one) => vec![one],
        };
        items.into_iter().map(|value| item(value).expect("items have the type of the key")).collect()
    }

    /// Returns the value in force: the given one if it is not null, or else the table's default.
    fn value(&mut self, section: Section, name: &str) -> Option<Written> {
        let key = keys::find(section, name).expect("only keys of the table are read");
        debug_assert_eq!(key.effect, Effect::Used, "{key} is read, so it has a use");
        let given = self.given(section, name);
        let value = match given.map(|given| &given.value) {
            None | Some(Written::Null) => spec::default(key),
            Some(value) => Some(value.clone()),
        };
        // A null stands for the default, which is then shown as such. A key without a default stays null.
        let origin = match (given, &value) {
            (Some(Given { value: Written::Null, .. }), Some(_)) => Origin::Default,
            _ => self.origin(section, name),
        };
        let shown = value.as_ref().or(given.map(|given| &given.value)).map(Written::to_json);
        if let Some(shown) = shown
            && !self.read.iter().any(|(other, _)| *other == key)
        {
            self.read.push((key, Value { name: key.to_string(), value: shown, origin }));
        }
        value
    }
}
