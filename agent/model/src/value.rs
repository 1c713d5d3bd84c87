//! From a CBOR value to a type, by way of serde; an error says where in the document it is.
//!
//! One reader of bytes makes a value, and every type is read from that. Read straight from the bytes, each of our three
//! hundred types would have a whole CBOR parser of its own in the program: 2 MB of the 8 that both programs may have. For
//! the same reason each kind of type is offered only what it can be written as. A structure is a map and nothing else:
//! serde would also read it from an array, by the order of its fields, which changes when a field is added.

use std::collections::btree_map;
use std::fmt;
use std::vec;

use serde::de::{self, DeserializeSeed, Deserializer, IntoDeserializer, Unexpected, Visitor};
use serde::forward_to_deserialize_any;
use serde_cbor::Value;

/// What does not fit, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValueError(Box<Misfit>);

/// Behind a pointer: every type's reader gives back itself or an error, and is as long as the longer of them.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Misfit {
    text: String,
    /// From the inside out.
    path: Vec<Step>,
}

/// One step of the way into a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    Key(String),
    Index(usize),
}

impl ValueError {
    /// What is wrong, without the place.
    pub fn text(&self) -> &str {
        &self.0.text
    }

    /// The way to it, from the outside in.
    pub fn steps(&self) -> impl DoubleEndedIterator<Item = &Step> {
        self.0.path.iter().rev()
    }

    /// `workloads.web.ports[0].host`; empty for the document itself.
    pub fn path(&self) -> String {
        let mut path = String::new();
        for step in self.steps() {
            match step {
                Step::Key(key) if path.is_empty() => path.push_str(key),
                Step::Key(key) => path.extend([".", key.as_str()]),
                Step::Index(index) => path.push_str(&format!("[{index}]")),
            }
        }
        path
    }

    fn within(mut self, step: Step) -> Self {
        self.0.path.push(step);
        self
    }
}

impl fmt::Display for ValueError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.path().as_str() {
            "" => f.write_str(&self.0.text),
            path => write!(f, "{path}: {}", self.0.text),
        }
    }
}

impl std::error::Error for ValueError {}

impl de::Error for ValueError {
    fn custom<T: fmt::Display>(text: T) -> Self {
        Self(Box::new(Misfit { text: text.to_string(), path: Vec::new() }))
    }
}

/// A value that serde can read from.
pub struct ValueReader {
    value: Value,
    /// People write `0.5` where a document has `500m`: types may ask who wrote it.
    is_from_people: bool,
}

impl ValueReader {
    /// What travelled or was stored.
    pub fn new(value: Value) -> Self {
        Self { value, is_from_people: false }
    }

    /// What somebody wrote by hand.
    pub fn from_people(value: Value) -> Self {
        Self { value, is_from_people: true }
    }

    fn unexpected(&self) -> Unexpected<'_> {
        match &self.value {
            Value::Null => Unexpected::Unit,
            Value::Bool(value) => Unexpected::Bool(*value),
            Value::Integer(value) => {
                i64::try_from(*value).map_or(Unexpected::Other("a large number"), Unexpected::Signed)
            }
            Value::Float(value) => Unexpected::Float(*value),
            Value::Bytes(value) => Unexpected::Bytes(value),
            Value::Text(value) => Unexpected::Str(value),
            Value::Array(_) => Unexpected::Seq,
            Value::Map(_) => Unexpected::Map,
            _ => Unexpected::Other("a tag"),
        }
    }

    #[cold]
    fn misfit(&self, expected: &dyn de::Expected) -> ValueError {
        de::Error::invalid_type(self.unexpected(), expected)
    }

    fn visit_number<'de, V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        let Value::Integer(value) = self.value else { return Err(self.misfit(&visitor)) };
        match (u64::try_from(value), i64::try_from(value)) {
            (Ok(value), _) => visitor.visit_u64(value),
            (_, Ok(value)) => visitor.visit_i64(value),
            _ => visitor.visit_i128(value),
        }
    }

    fn visit_text<'de, V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        match self.value {
            Value::Text(value) => visitor.visit_string(value),
            _ => Err(self.misfit(&visitor)),
        }
    }

    fn visit_items<'de, V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        let is_from_people = self.is_from_people;
        match self.value {
            Value::Array(items) => visitor.visit_seq(Items { items: items.into_iter(), at: 0, is_from_people }),
            _ => Err(self.misfit(&visitor)),
        }
    }

    fn visit_entries<'de, V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        let is_from_people = self.is_from_people;
        match self.value {
            Value::Map(entries) => {
                visitor.visit_map(Entries { entries: entries.into_iter(), open: None, is_from_people })
            }
            _ => Err(self.misfit(&visitor)),
        }
    }
}

/// What a type of one kind asks for, and the only form that is read for it.
macro_rules! only {
    ($form:ident: $($ask:ident)*) => {
        $(fn $ask<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
            self.$form(visitor)
        })*
    };
}

impl<'de> Deserializer<'de> for ValueReader {
    type Error = ValueError;

    fn is_human_readable(&self) -> bool {
        self.is_from_people
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        match self.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(value),
            Value::Integer(_) => self.visit_number(visitor),
            Value::Float(value) => visitor.visit_f64(value),
            Value::Bytes(value) => visitor.visit_byte_buf(value),
            Value::Text(_) => self.visit_text(visitor),
            Value::Array(_) => self.visit_items(visitor),
            Value::Map(_) => self.visit_entries(visitor),
            // Whatever a tag stands for, none of our types has one.
            _ => Err(self.misfit(&visitor)),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        match self.value {
            Value::Bool(value) => visitor.visit_bool(value),
            _ => Err(self.misfit(&visitor)),
        }
    }

    only! { visit_number: deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64 deserialize_i128
    deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64 deserialize_u128 }

    only! { visit_text: deserialize_str deserialize_string deserialize_identifier }

    only! { visit_items: deserialize_seq }

    only! { visit_entries: deserialize_map }

    fn deserialize_tuple<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, ValueError> {
        self.visit_items(visitor)
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: usize,
        visitor: V,
    ) -> Result<V::Value, ValueError> {
        self.visit_items(visitor)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ValueError> {
        self.visit_entries(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        match self.value {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, ValueError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ValueError> {
        let is_from_people = self.is_from_people;
        match self.value {
            Value::Text(name) => visitor.visit_enum(Variant { name, content: None, is_from_people }),
            Value::Map(entries) if entries.len() == 1 => {
                let (name, content) = entries.into_iter().next().unwrap_or((Value::Null, Value::Null));
                match name {
                    Value::Text(name) => visitor.visit_enum(Variant { name, content: Some(content), is_from_people }),
                    name => Err(Self { value: name, is_from_people }.misfit(&"the name of a variant")),
                }
            }
            _ => Err(self.misfit(&visitor)),
        }
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        visitor.visit_unit()
    }

    // A whole number is a fraction too.
    forward_to_deserialize_any! { f32 f64 char bytes byte_buf unit unit_struct }
}

struct Items {
    items: vec::IntoIter<Value>,
    at: usize,
    is_from_people: bool,
}

impl<'de> de::SeqAccess<'de> for Items {
    type Error = ValueError;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, ValueError> {
        let Some(item) = self.items.next() else { return Ok(None) };
        let at = self.at;
        self.at += 1;
        seed.deserialize(ValueReader { value: item, is_from_people: self.is_from_people })
            .map(Some)
            .map_err(|error| error.within(Step::Index(at)))
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.items.len())
    }
}

struct Entries {
    entries: btree_map::IntoIter<Value, Value>,
    /// The key that was given, and its value that was not yet.
    open: Option<(Value, Value)>,
    is_from_people: bool,
}

impl Entries {
    /// A key is text in all of our documents; another is told by what it is.
    fn name(key: &Value) -> Step {
        match key {
            Value::Text(text) => Step::Key(text.clone()),
            other => Step::Key(format!("{other:?}")),
        }
    }
}

impl<'de> de::MapAccess<'de> for Entries {
    type Error = ValueError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, ValueError> {
        let Some((key, value)) = self.entries.next() else { return Ok(None) };
        let copy = key.clone();
        let named = seed
            .deserialize(ValueReader { value: key, is_from_people: self.is_from_people })
            .map_err(|error| error.within(Self::name(&copy)))?;
        self.open = Some((copy, value));
        Ok(Some(named))
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, ValueError> {
        let (key, value) = self.open.take().ok_or_else(|| de::Error::custom("a value without its key"))?;
        seed.deserialize(ValueReader { value, is_from_people: self.is_from_people })
            .map_err(|error| error.within(Self::name(&key)))
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.entries.len())
    }
}

struct Variant {
    name: String,
    content: Option<Value>,
    is_from_people: bool,
}

impl<'de> de::EnumAccess<'de> for Variant {
    type Error = ValueError;
    type Variant = Content;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Content), ValueError> {
        let reader: de::value::StrDeserializer<'_, ValueError> = self.name.as_str().into_deserializer();
        let variant = seed.deserialize(reader)?;
        Ok((variant, Content { name: self.name, content: self.content, is_from_people: self.is_from_people }))
    }
}

struct Content {
    name: String,
    content: Option<Value>,
    is_from_people: bool,
}

impl Content {
    fn needed(self) -> Result<(String, ValueReader), ValueError> {
        match self.content {
            Some(value) => Ok((self.name, ValueReader { value, is_from_people: self.is_from_people })),
            None => Err(de::Error::custom(format!("`{}` needs a content", self.name))),
        }
    }
}

impl<'de> de::VariantAccess<'de> for Content {
    type Error = ValueError;

    fn unit_variant(self) -> Result<(), ValueError> {
        match self.content {
            None | Some(Value::Null) => Ok(()),
            Some(_) => Err(de::Error::custom(format!("`{}` has no content", self.name))),
        }
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, ValueError> {
        let (name, reader) = self.needed()?;
        seed.deserialize(reader).map_err(|error| error.within(Step::Key(name)))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, ValueError> {
        let (name, reader) = self.needed()?;
        reader.visit_items(visitor).map_err(|error| error.within(Step::Key(name)))
    }

    fn struct_variant<V: Visitor<'de>>(self, _: &'static [&'static str], visitor: V) -> Result<V::Value, ValueError> {
        let (name, reader) = self.needed()?;
        reader.visit_entries(visitor).map_err(|error| error.within(Step::Key(name)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Serialize};

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    enum Shape {
        Point,
        Circle(u32),
        Box { wide: u8, high: i64 },
        Pair(u8, String),
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Drawing {
        name: String,
        shapes: Vec<Shape>,
        scale: Option<f64>,
        by: BTreeMap<String, Option<bool>>,
        span: (u64, i128),
        unit: (),
    }

    fn drawing() -> Drawing {
        Drawing {
            name: "plan".to_owned(),
            shapes: vec![
                Shape::Point,
                Shape::Circle(7),
                Shape::Box { wide: 1, high: -5 },
                Shape::Pair(2, "b".to_owned()),
            ],
            scale: Some(0.5),
            by: [("me".to_owned(), Some(true)), ("you".to_owned(), None)].into(),
            span: (u64::MAX, i128::from(i64::MIN)),
            unit: (),
        }
    }

    fn read(value: Value) -> Result<Drawing, ValueError> {
        Drawing::deserialize(ValueReader::new(value))
    }

    #[test]
    fn what_was_written_is_read_again() {
        let value = serde_cbor::value::to_value(drawing()).unwrap();
        assert_eq!(read(value).unwrap(), drawing());
    }

    #[test]
    fn an_error_names_the_place() {
        let Value::Map(mut map) = serde_cbor::value::to_value(drawing()).unwrap() else { panic!() };
        let shapes = Value::Array(vec![
            Value::Text("Point".to_owned()),
            Value::Map([(Value::Text("Circle".to_owned()), Value::Text("round".to_owned()))].into()),
        ]);
        map.insert(Value::Text("shapes".to_owned()), shapes);
        let error = read(Value::Map(map)).unwrap_err();
        assert_eq!(error.path(), "shapes[1].Circle");
        assert!(error.text().contains("round"), "{error}");
    }

    #[test]
    fn an_unknown_field_an_unknown_variant_and_a_missing_content_are_refused() {
        let Value::Map(good) = serde_cbor::value::to_value(drawing()).unwrap() else { panic!() };
        let with = |key: &str, value: Value| {
            let mut map = good.clone();
            map.insert(Value::Text(key.to_owned()), value);
            read(Value::Map(map)).unwrap_err().to_string()
        };
        let one = |name: &str| Value::Array(vec![Value::Text(name.to_owned())]);
        assert!(with("colour", Value::Null).contains("unknown field `colour`"));
        assert!(with("shapes", one("Star")).contains("shapes[0]: unknown variant `Star`"));
        assert!(with("shapes", one("Circle")).contains("needs a content"));
    }
}
