//! When a generation may take over: `update.apply` and `update.window` of the manifest, and the locks of workloads.
//! Words only; the decision is the planner's.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::quantity::Timestamp;

/// The volume in whose files workloads say that no update may come now.
pub const LOCKS_VOLUME: &str = "update-locks";

const DAY_MINUTES: i64 = 24 * 60;

/// What a new generation waits for once it is staged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Apply {
    /// Nothing.
    #[default]
    Now,
    /// The next start of the machine.
    NextBoot,
    /// An operator: `edgectl activate`.
    Manual,
    /// `update.window`.
    Window,
}

/// A span of the day in the device's local time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Window {
    /// Days on which it begins; none named: every day.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub days: Vec<Weekday>,
    /// Local time, `02:00`.
    pub from: TimeOfDay,
    /// Local time; one that is not after `from` is meant for the next day.
    pub to: TimeOfDay,
    /// Local time against UTC, `+01:00`. Default: `timezone` in the device's `agent.toml`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timezone: Option<UtcOffset>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Weekday {
    Mon,
    Tue,
    Wed,
    Thu,
    Fri,
    Sat,
    Sun,
}

impl Weekday {
    /// 1970-01-01 was a Thursday.
    fn of_day(days_since_1970: i64) -> Self {
        use Weekday::{Fri, Mon, Sat, Sun, Thu, Tue, Wed};
        let from_thursday = usize::try_from(days_since_1970.rem_euclid(7)).unwrap_or(0);
        [Thu, Fri, Sat, Sun, Mon, Tue, Wed][from_thursday]
    }
}

/// A text that is no time of day, or no offset.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MomentError {
    #[error("`{text}` is not a time of day (want 00:00 to 23:59)")]
    Time { text: String },
    #[error("`{text}` is not an offset to UTC (want `Z`, or -14:00 to +14:00)")]
    Offset { text: String },
}

fn two_digits(text: &str, most: i64) -> Option<i64> {
    let is_number = text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|number| is_number && *number <= most)
}

fn minutes(text: &str, most_hours: i64) -> Option<i64> {
    let (hours, minutes) = text.split_once(':')?;
    Some(two_digits(hours, most_hours)? * 60 + two_digits(minutes, 59)?)
}

/// `HH:MM`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct TimeOfDay {
    minutes: i64,
}

impl FromStr for TimeOfDay {
    type Err = MomentError;
    fn from_str(text: &str) -> Result<Self, MomentError> {
        let bad = || MomentError::Time { text: text.chars().take(40).collect() };
        Ok(Self { minutes: minutes(text, 23).ok_or_else(bad)? })
    }
}

impl fmt::Display for TimeOfDay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02}:{:02}", self.minutes / 60, self.minutes % 60)
    }
}

/// `Z`, `+02:00`, `-05:30`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct UtcOffset {
    minutes: i64,
}

impl FromStr for UtcOffset {
    type Err = MomentError;
    fn from_str(text: &str) -> Result<Self, MomentError> {
        let bad = || MomentError::Offset { text: text.chars().take(40).collect() };
        let (sign, rest) = match text.split_at_checked(1) {
            Some(("Z", "")) => return Ok(Self::default()),
            Some(("+", rest)) => (1, rest),
            Some(("-", rest)) => (-1, rest),
            _ => return Err(bad()),
        };
        let minutes = minutes(rest, 14).filter(|minutes| *minutes <= 14 * 60).ok_or_else(bad)?;
        Ok(Self { minutes: sign * minutes })
    }
}

impl fmt::Display for UtcOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = if self.minutes < 0 { '-' } else { '+' };
        write!(f, "{sign}{:02}:{:02}", self.minutes.abs() / 60, self.minutes.abs() % 60)
    }
}

macro_rules! textual {
    ($name:ident) => {
        impl TryFrom<String> for $name {
            type Error = MomentError;
            fn try_from(text: String) -> Result<Self, MomentError> {
                text.parse()
            }
        }
        impl From<$name> for String {
            fn from(value: $name) -> Self {
                value.to_string()
            }
        }
    };
}
textual!(TimeOfDay);
textual!(UtcOffset);

impl Window {
    /// How long until it opens, in seconds; 0 while it is open.
    pub fn opens_in_secs(&self, now: Timestamp, device: UtcOffset) -> u64 {
        let local = now.0.saturating_add(self.timezone.unwrap_or(device).minutes * 60);
        let (day, second) = (local.div_euclid(DAY_MINUTES * 60), local.rem_euclid(DAY_MINUTES * 60));
        let length = match self.to.minutes - self.from.minutes {
            length @ 1.. => length,
            through_midnight => through_midnight + DAY_MINUTES,
        };
        // From yesterday's, which may still be open, to the same day of next week.
        let waits = (-1..=7).filter(|ahead| {
            let begins_on = Weekday::of_day(day + ahead);
            self.days.is_empty() || self.days.contains(&begins_on)
        });
        let mut waits = waits.filter_map(|ahead| {
            let begins = (ahead * DAY_MINUTES + self.from.minutes) * 60 - second;
            (begins + length * 60 > 0).then_some(begins.max(0))
        });
        waits.next().and_then(|secs| u64::try_from(secs).ok()).unwrap_or(0)
    }
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for day in &self.days {
            write!(f, "{} ", format!("{day:?}").to_lowercase())?;
        }
        write!(f, "{}-{}", self.from, self.to)?;
        self.timezone.map_or(Ok(()), |offset| write!(f, " {offset}"))
    }
}

/// A workload asks for peace: a file in the lock volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpdateLock {
    /// The file's name, made fit to be shown.
    pub name: String,
    pub until_boot_ms: u64,
}

/// What the planner knows of the moment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Moment {
    pub boot_id: String,
    /// The device's local time.
    pub timezone: UtcOffset,
    pub locks: Vec<UpdateLock>,
    /// Nobody has looked at the locks yet.
    pub locks_unseen: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(days: &[Weekday], from: &str, to: &str, timezone: Option<&str>) -> Window {
        Window {
            days: days.to_vec(),
            from: from.parse().unwrap(),
            to: to.parse().unwrap(),
            timezone: timezone.map(|text| text.parse().unwrap()),
        }
    }

    /// 2026-01-01 was a Thursday.
    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn when_a_window_opens() {
        use Weekday::{Fri, Mon, Sun, Thu, Wed};
        const HOUR: u64 = 3600;
        let utc = UtcOffset::default();
        let every = window(&[], "02:00", "04:30", None);
        let night = window(&[], "22:00", "02:00", None);
        let thursday_night = window(&[Thu], "22:00", "02:00", None);
        let mondays = window(&[Mon], "02:00", "03:00", None);
        let cases = [
            (&every, "2026-01-01T01:00:00Z", HOUR),
            (&every, "2026-01-01T01:59:59Z", 1),
            (&every, "2026-01-01T02:00:00Z", 0),
            (&every, "2026-01-01T04:29:59Z", 0),
            (&every, "2026-01-01T04:30:00Z", 21 * HOUR + HOUR / 2),
            (&night, "2026-01-01T23:00:00Z", 0),
            (&night, "2026-01-02T01:59:59Z", 0),
            (&night, "2026-01-02T02:00:00Z", 20 * HOUR),
            (&thursday_night, "2026-01-01T23:00:00Z", 0),
            (&thursday_night, "2026-01-02T01:00:00Z", 0),
            (&thursday_night, "2026-01-01T01:00:00Z", 21 * HOUR),
            (&thursday_night, "2026-01-02T23:00:00Z", (6 * 24 - 1) * HOUR),
            (&mondays, "2026-01-05T02:30:00Z", 0),
            (&mondays, "2026-01-05T03:00:00Z", (7 * 24 - 1) * HOUR),
            (&window(&[Wed, Fri, Sun], "12:00", "12:01", None), "2026-01-01T12:00:00Z", 24 * HOUR),
            (&window(&[], "00:00", "00:00", None), "2026-01-01T12:00:00Z", 0),
            (&every, "1970-01-01T00:00:00Z", 2 * HOUR),
        ];
        for (window, now, wait) in cases {
            assert_eq!(window.opens_in_secs(at(now), utc), wait, "{window} at {now}");
        }
    }

    #[test]
    fn local_time_is_the_manifests_or_else_the_devices() {
        let device: UtcOffset = "-05:30".parse().unwrap();
        let now = at("2026-01-01T01:00:00Z");
        assert_eq!(window(&[], "19:30", "20:00", None).opens_in_secs(now, device), 0);
        assert_eq!(window(&[Weekday::Wed], "19:30", "20:00", None).opens_in_secs(now, device), 0, "still Wednesday");
        assert_eq!(window(&[], "03:00", "03:30", Some("+02:00")).opens_in_secs(now, device), 0);
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for bad in ["", "2:00", "24:00", "12:60", "12", "12:00:00", "+1:00"] {
            assert!(bad.parse::<TimeOfDay>().is_err(), "{bad}");
        }
        for bad in ["", "UTC", "02:00", "+2", "+15:00", "+14:30", "+02:60", "é1:00"] {
            assert!(bad.parse::<UtcOffset>().is_err(), "{bad}");
        }
        for good in ["+00:00", "-05:30", "+14:00"] {
            assert_eq!(good.parse::<UtcOffset>().unwrap().to_string(), good);
        }
    }
}
