//! YAML, TOML and JSON as people write them, and back. All three go through one value, so that a manifest looks natural
//! in each of them. A key that is there twice is refused: which of the two was meant is not ours to guess.

use std::fmt;
use std::path::Path;

use anyhow::{Context, Result};
use clap::ValueEnum;
use edged_model::cbor;
use edged_model::value::{Step, ValueError, ValueReader};
use serde::de::{DeserializeOwned, Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Number, Value};

/// More mistakes than this in one file help nobody.
const TOLD_MAX: usize = 50;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Notation {
    Yaml,
    Toml,
    Json,
}

impl Notation {
    /// By the ending of the name; YAML if it says nothing.
    pub fn of(file: &Path) -> Self {
        match file.extension().and_then(|ending| ending.to_str()) {
            Some("toml") => Self::Toml,
            Some("json") => Self::Json,
            _ => Self::Yaml,
        }
    }

    pub fn read(self, text: &str) -> Result<Value> {
        let once: Once = match self {
            Self::Yaml => serde_yaml_ng::from_str(text).context("not valid YAML")?,
            Self::Toml => toml::from_str(text).context("not valid TOML")?,
            Self::Json => serde_json::from_str(text).context("not valid JSON")?,
        };
        Ok(once.0)
    }

    pub fn write(self, value: &Value) -> Result<String> {
        Ok(match self {
            Self::Yaml => serde_yaml_ng::to_string(value)?,
            Self::Toml => toml::to_string_pretty(value)?,
            Self::Json => serde_json::to_string_pretty(value)? + "\n",
        })
    }
}

/// Reads a value as `T`, or tells every place where it is not one.
pub fn typed<T: DeserializeOwned>(mut value: Value) -> Result<T, Vec<String>> {
    let mut told = Vec::new();
    let mut removed: Vec<String> = Vec::new();
    loop {
        let read = serde_cbor::value::to_value(&value).map_err(|error| vec![error.to_string()])?;
        let error = match T::deserialize(ValueReader::from_people(read)) {
            Ok(typed) if told.is_empty() => return Ok(typed),
            Ok(_) => return Err(sorted(told)),
            Err(error) => error,
        };
        // A field that is missing because it was taken out as wrong has been told.
        let is_ours = missing(&error).is_some_and(|path| removed.contains(&path));
        if !is_ours {
            told.push(cbor::shape_text(&error));
        }
        if is_ours || told.len() == TOLD_MAX || !remove(&mut value, &error) {
            return Err(sorted(told));
        }
        removed.push(error.path());
    }
}

/// By place, as one goes through a file.
fn sorted(mut told: Vec<String>) -> Vec<String> {
    told.sort();
    told
}

/// The path of the field that serde misses, if that is what it says.
fn missing(error: &ValueError) -> Option<String> {
    let field = error.text().strip_prefix("missing field `")?.split('`').next()?;
    Some(match error.path().as_str() {
        "" => field.to_owned(),
        path => format!("{path}.{field}"),
    })
}

/// Takes the entry that is wrong out of its map, so that the rest can be looked at.
fn remove(value: &mut Value, error: &ValueError) -> bool {
    let steps: Vec<&Step> = error.steps().collect();
    let Some((Step::Key(key), way)) = steps.split_last() else { return false };
    let mut at = value;
    for step in way {
        let next = match step {
            Step::Key(key) => at.get_mut(key.as_str()),
            Step::Index(index) => at.get_mut(*index),
        };
        let Some(next) = next else { return false };
        at = next;
    }
    at.as_object_mut().is_some_and(|map| map.remove(key).is_some())
}

/// A value in which no map has a key twice.
struct Once(Value);

impl<'de> Deserialize<'de> for Once {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(OnceVisitor).map(Self)
    }
}

/// How the TOML reader hands over a bare date: a map with this one key.
const TOML_DATE: &str = "$__toml_private_datetime";

struct OnceVisitor;

impl<'de> Visitor<'de> for OnceVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom(format!("`{value}` is no number")))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E: Error>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(Once(value)) = seq.next_element()? {
            list.push(value);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            if key == TOML_DATE {
                return Ok(Value::String(entries.next_value()?));
            }
            let Once(value) = entries.next_value()?;
            if map.contains_key(&key) {
                return Err(A::Error::custom(format!("`{key}` is there twice")));
            }
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}
