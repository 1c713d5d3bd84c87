//! `Retry-After` (RFC 9110, 10.2.3), in seconds or as a date. A date is held against the `Date` of the same answer, so that
//! neither side's clock has to be right; an answer without one, against the clock of this device. Pure.

use std::time::{Duration, UNIX_EPOCH};

/// A date further away than this is a mistake of one of the two clocks, or no pause any more.
const DATE_MAX: Duration = Duration::from_secs(86_400);

/// How long to wait. `date`: the answer's own header. `now_unix_secs`: this device's clock, where one is believed.
pub fn pause(value: &str, date: Option<&str>, now_unix_secs: Option<i64>) -> Option<Duration> {
    let value = value.trim();
    if let Ok(secs) = value.parse() {
        return Some(Duration::from_secs(secs));
    }
    let until = httpdate::parse_http_date(value).ok()?;
    let said = date.and_then(|date| httpdate::parse_http_date(date.trim()).ok());
    let ours = || UNIX_EPOCH.checked_add(Duration::from_secs(u64::try_from(now_unix_secs?).ok()?));
    // What is past already asks for nothing.
    let pause = until.duration_since(said.or_else(ours)?).unwrap_or_default();
    Some(pause.min(DATE_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOON: &str = "Sun, 06 Nov 1994 12:00:00 GMT";
    /// The same moment.
    const NOON_SECS: i64 = 784_123_200;

    fn secs(value: &str, date: Option<&str>, now: Option<i64>) -> Option<u64> {
        pause(value, date, now).map(|pause| pause.as_secs())
    }

    #[test]
    fn seconds_need_no_clock() {
        assert_eq!(secs(" 7 ", None, None), Some(7));
        for bad in ["", "-1", "soon", "7.5", "Sun, 06 Nov"] {
            assert_eq!(secs(bad, Some(NOON), Some(NOON_SECS)), None, "{bad}");
        }
    }

    #[test]
    fn a_date_is_held_against_that_of_the_same_answer_and_else_against_our_clock() {
        for later in ["Sun, 06 Nov 1994 12:02:00 GMT", "Sunday, 06-Nov-94 12:02:00 GMT", "Sun Nov  6 12:02:00 1994"] {
            // Our clock is of no account where the answer has its own.
            assert_eq!(secs(later, Some(NOON), Some(0)), Some(120), "{later}");
            assert_eq!(secs(later, None, Some(NOON_SECS + 20)), Some(100), "{later}");
            assert_eq!(secs(later, Some("noon"), Some(NOON_SECS)), Some(120), "{later}");
            assert_eq!(secs(later, None, None), None, "{later}");
            assert_eq!(secs(later, None, Some(-1)), None, "{later}");
        }
        assert_eq!(secs("Sun, 06 Nov 1994 11:00:00 GMT", Some(NOON), None), Some(0), "it is past");
        assert_eq!(secs("Mon, 06 Nov 2023 12:00:00 GMT", Some(NOON), None), Some(86_400), "it is bounded");
        assert_eq!(secs(NOON, None, Some(i64::MAX)), Some(0), "no clock is too far ahead to be read");
    }
}
