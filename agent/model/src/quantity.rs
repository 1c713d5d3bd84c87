//! Amounts as people write them, with checked arithmetic: `64Mi`, `250m`, `1m 30s`, `2026-11-20T08:00:00Z`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    #[error("`{text}` is not an amount of bytes such as `64Mi`, `500k` or `1048576`")]
    Bytes { text: String },
    #[error("`{text}` is not an amount of CPU such as `250m`, `0.5` or `2`")]
    Cpu { text: String },
    #[error("`{text}` is not a time span such as `500ms`, `10s` or `1m 30s`")]
    Span { text: String },
    #[error("`{text}` is not a time in RFC 3339 form such as `2026-11-20T08:00:00Z`")]
    Time { text: String },
}

/// Gives a type that is written as text its `serde` and `schemars` forms.
macro_rules! textual {
    ($name:ident) => {
        impl TryFrom<String> for $name {
            type Error = QuantityError;
            fn try_from(text: String) -> Result<Self, QuantityError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> String {
                value.to_string()
            }
        }
    };
}

/// In YAML, TOML and JSON an amount may be a bare number (`cpu: 0.5`, `memory: 1048576`). On the wire it is text, so that
/// what is signed has one spelling only.
#[derive(Deserialize, JsonSchema)]
#[serde(untagged)]
enum TextOrNumber {
    Text(String),
    Whole(u64),
    Fraction(f64),
}

fn amount<'de, D: Deserializer<'de>, T: FromStr<Err = QuantityError>>(deserializer: D) -> Result<T, D::Error> {
    use serde::de::{Error, Unexpected};
    if !deserializer.is_human_readable() {
        return String::deserialize(deserializer)?.parse().map_err(D::Error::custom);
    }
    let text = match TextOrNumber::deserialize(deserializer) {
        Ok(TextOrNumber::Text(text)) => text,
        Ok(TextOrNumber::Whole(number)) => number.to_string(),
        Ok(TextOrNumber::Fraction(number)) => number.to_string(),
        Err(_) => {
            return Err(D::Error::invalid_type(Unexpected::Other("something else"), &"an amount: text or a number"));
        }
    };
    text.parse().map_err(D::Error::custom)
}

/// Bytes, written with the suffixes Kubernetes has: `k M G T` (1000) and `Ki Mi Gi Ti` (1024).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, JsonSchema)]
#[serde(into = "String")]
#[schemars(with = "TextOrNumber")]
pub struct Bytes(pub u64);

const BYTE_UNITS: [(&str, u64); 9] = [
    ("Ti", 1 << 40),
    ("Gi", 1 << 30),
    ("Mi", 1 << 20),
    ("Ki", 1 << 10),
    ("T", 1_000_000_000_000),
    ("G", 1_000_000_000),
    ("M", 1_000_000),
    ("k", 1_000),
    ("", 1),
];

impl Bytes {
    pub const fn mebi(n: u64) -> Self {
        Self(n << 20)
    }

    /// One decimal and a binary unit, for tables: `12.5Mi`.
    pub fn human(self) -> String {
        for (unit, size) in [("Ti", 1_u64 << 40), ("Gi", 1 << 30), ("Mi", 1 << 20), ("Ki", 1 << 10)] {
            if self.0 >= size {
                let tenths = u128::from(self.0) * 10 / u128::from(size);
                return if tenths % 10 == 0 {
                    format!("{}{unit}", tenths / 10)
                } else {
                    format!("{}.{}{unit}", tenths / 10, tenths % 10)
                };
            }
        }
        format!("{}B", self.0)
    }
}

impl FromStr for Bytes {
    type Err = QuantityError;
    fn from_str(text: &str) -> Result<Self, QuantityError> {
        let bad = || QuantityError::Bytes { text: text.chars().take(40).collect() };
        let (unit, size) = BYTE_UNITS.iter().find(|(unit, _)| text.ends_with(unit)).ok_or_else(bad)?;
        let number = text.strip_suffix(unit).ok_or_else(bad)?;
        if number.is_empty() || !number.bytes().all(|b| b.is_ascii_digit()) {
            return Err(bad());
        }
        let number: u64 = number.parse().map_err(|_| bad())?;
        number.checked_mul(*size).map(Bytes).ok_or_else(bad)
    }
}

impl fmt::Display for Bytes {
    /// The shortest exact spelling, so that text and value round-trip.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, size) in [("Ti", 1_u64 << 40), ("Gi", 1 << 30), ("Mi", 1 << 20), ("Ki", 1 << 10)] {
            if self.0 > 0 && self.0.is_multiple_of(size) {
                return write!(f, "{}{unit}", self.0 / size);
            }
        }
        write!(f, "{}", self.0)
    }
}
textual!(Bytes);

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        amount(deserializer)
    }
}

/// CPU in thousandths of one core: `250m`, `0.25`, `2`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, JsonSchema)]
#[serde(into = "String")]
#[schemars(with = "TextOrNumber")]
pub struct MilliCpu(pub u64);

impl FromStr for MilliCpu {
    type Err = QuantityError;
    fn from_str(text: &str) -> Result<Self, QuantityError> {
        let bad = || QuantityError::Cpu { text: text.chars().take(40).collect() };
        let digits = |t: &str| !t.is_empty() && t.len() <= 9 && t.bytes().all(|b| b.is_ascii_digit());
        if let Some(milli) = text.strip_suffix('m') {
            return if digits(milli) { Ok(Self(milli.parse().map_err(|_| bad())?)) } else { Err(bad()) };
        }
        let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
        if !digits(whole) || !digits(part) || part.len() > 3 {
            return Err(bad());
        }
        let whole: u64 = whole.parse().map_err(|_| bad())?;
        let part: u64 = format!("{part:0<3}").parse().map_err(|_| bad())?;
        Ok(Self(whole * 1000 + part))
    }
}

impl fmt::Display for MilliCpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_multiple_of(1000) { write!(f, "{}", self.0 / 1000) } else { write!(f, "{}m", self.0) }
    }
}
textual!(MilliCpu);

impl<'de> Deserialize<'de> for MilliCpu {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        amount(deserializer)
    }
}

/// A span of time in whole milliseconds: `500ms`, `10s`, `1m 30s` (humantime's spelling).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Span {
    pub ms: u64,
}

impl Span {
    pub const fn from_secs(secs: u64) -> Self {
        Self { ms: secs * 1000 }
    }

    pub const fn from_ms(ms: u64) -> Self {
        Self { ms }
    }

    pub const fn duration(self) -> Duration {
        Duration::from_millis(self.ms)
    }

    /// The two largest units, for tables: `3d4h`, `12m5s`, `4s`.
    pub fn human(self) -> String {
        let secs = self.ms / 1000;
        match secs {
            0 => format!("{}ms", self.ms),
            1..60 => format!("{secs}s"),
            60..3600 => format!("{}m{}s", secs / 60, secs % 60),
            3600..86_400 => format!("{}h{}m", secs / 3600, secs % 3600 / 60),
            _ => format!("{}d{}h", secs / 86_400, secs % 86_400 / 3600),
        }
    }
}

impl FromStr for Span {
    type Err = QuantityError;
    fn from_str(text: &str) -> Result<Self, QuantityError> {
        let bad = || QuantityError::Span { text: text.chars().take(40).collect() };
        let duration = humantime::parse_duration(text).map_err(|_| bad())?;
        // A hundred years is more than any device's life and keeps all later sums far from overflow.
        let limit = Duration::from_secs(100 * 366 * 86_400);
        if duration > limit || duration.subsec_nanos() % 1_000_000 != 0 {
            return Err(bad());
        }
        Ok(Self { ms: u64::try_from(duration.as_millis()).map_err(|_| bad())? })
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", humantime::format_duration(self.duration()))
    }
}
textual!(Span);

/// A wall-clock time to the second, in RFC 3339 when written. Only for expiry and for people: never for waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Timestamp(pub i64);

impl FromStr for Timestamp {
    type Err = QuantityError;
    fn from_str(text: &str) -> Result<Self, QuantityError> {
        OffsetDateTime::parse(text, &Rfc3339)
            .map(|time| Self(time.unix_timestamp()))
            .map_err(|_| QuantityError::Time { text: text.chars().take(40).collect() })
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = OffsetDateTime::from_unix_timestamp(self.0).ok().and_then(|time| time.format(&Rfc3339).ok());
        f.write_str(text.as_deref().unwrap_or("9999-12-31T23:59:59Z"))
    }
}
textual!(Timestamp);

/// The two clocks a decision may look at, always passed in. `boot_ms` is CLOCK_BOOTTIME: it never jumps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Now {
    pub boot_ms: u64,
    pub wall: Timestamp,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn amounts_as_people_write_them() {
        assert_eq!("64Mi".parse(), Ok(Bytes::mebi(64)));
        assert_eq!("500k".parse(), Ok(Bytes(500_000)));
        assert_eq!("250m".parse(), Ok(MilliCpu(250)));
        assert_eq!("0.5".parse(), Ok(MilliCpu(500)));
        assert_eq!("2".parse(), Ok(MilliCpu(2000)));
        assert_eq!("1m 30s".parse(), Ok(Span::from_secs(90)));
        assert_eq!("1970-01-01T00:01:00Z".parse(), Ok(Timestamp(60)));
    }

    #[test]
    fn amounts_that_are_refused() {
        for bad in ["", "Mi", "-1", "1.5Mi", "99999999999Ti", "64 Mi", "0x10"] {
            assert!(bad.parse::<Bytes>().is_err(), "{bad}");
        }
        for bad in ["", "m", "-1", "1.2345", ".5", "1e3", "9999999999"] {
            assert!(bad.parse::<MilliCpu>().is_err(), "{bad}");
        }
        for bad in ["", "10", "1ns", "1000y"] {
            assert!(bad.parse::<Span>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_bare_number_is_an_amount_where_people_write_and_nowhere_else() {
        let json = |text: &str| serde_json::from_str::<(Bytes, MilliCpu)>(text);
        assert_eq!(json("[1048576, 0.5]").unwrap(), (Bytes::mebi(1), MilliCpu(500)));
        assert_eq!(json("[\"1Mi\", 2]").unwrap(), (Bytes::mebi(1), MilliCpu(2000)));
        let told = |text: &str| json(text).unwrap_err().to_string();
        assert!(told("[-1, 1]").contains("`-1` is not an amount of bytes"), "{}", told("[-1, 1]"));
        assert!(told("[1.5, 1]").contains("`1.5` is not an amount of bytes"), "{}", told("[1.5, 1]"));
        assert!(told("[1, true]").contains("expected an amount"), "{}", told("[1, true]"));
        assert!(serde_cbor::from_slice::<Bytes>(&[0x01]).is_err(), "on the wire it is text");
    }

    proptest! {
        #[test]
        fn text_and_value_round_trip(bytes in 0..u64::MAX, milli in 0..999_999_999_u64, ms in 0..3_000_000_000_000_u64, secs in -62_135_596_800_i64..253_402_300_799) {
            prop_assert_eq!(Bytes(bytes).to_string().parse(), Ok(Bytes(bytes)));
            prop_assert_eq!(MilliCpu(milli).to_string().parse(), Ok(MilliCpu(milli)));
            prop_assert_eq!(Span::from_ms(ms).to_string().parse(), Ok(Span::from_ms(ms)));
            prop_assert_eq!(Timestamp(secs).to_string().parse(), Ok(Timestamp(secs)));
        }
    }
}
