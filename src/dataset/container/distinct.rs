//! JSON text -> a value whose objects name no key twice. Of a key that is there twice, serde_json keeps the last value
//! without a word, and the first would be lost; `datasets` refuses such rows too.

use serde::Deserializer;
use serde::de::{DeserializeSeed, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use std::fmt;

/// Reads one value.
pub(super) fn read(bytes: &[u8]) -> serde_json::Result<Value> {
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let value = Distinct.deserialize(&mut reader)?;
    reader.end()?;
    Ok(value)
}

struct Distinct;

impl<'de> DeserializeSeed<'de> for Distinct {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> Result<Value, D::Error> {
        reader.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Distinct {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(text.into())
    }

    fn visit_string<E>(self, text: String) -> Result<Value, E> {
        Ok(text.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(Distinct)? {
            list.push(item);
        }
        Ok(list.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            if map.contains_key(&key) {
                return Err(A::Error::custom(format!("the key {key:?} is there twice")));
            }
            map.insert(key, entries.next_value_seed(Distinct)?);
        }
        Ok(map.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_those_of_serde_json() {
        let text = br#" {"b": [1, -2, 18446744073709551615, 0.1, 1e400, "x\u00e9\n", true, null, {}], "a": {"b": 1}} "#;
        assert!(read(text).is_err(), "a number beyond f64");
        let text = String::from_utf8_lossy(text).replace("1e400", "1e300");
        assert_eq!(read(text.as_bytes()).unwrap(), serde_json::from_str::<Value>(&text).unwrap());
        assert_eq!(
            read(text.as_bytes()).unwrap().as_object().unwrap().keys().collect::<Vec<_>>(),
            ["b", "a"]
        );
        assert!(read(b"{} {}").is_err());
        assert!(read("[".repeat(1000).as_bytes()).is_err());
    }

    #[test]
    fn a_key_is_there_once() {
        let told = |text: &str| read(text.as_bytes()).unwrap_err().to_string();
        assert_eq!(told(r#"{"a": 1, "a": 1}"#), r#"the key "a" is there twice at line 1 column 12"#);
        assert!(told(r#"[{"b": {"a": 1, "c": 2, "a": 3}}]"#).contains(r#"the key "a" is there twice"#));
    }
}
