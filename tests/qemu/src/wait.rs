//! Conditions with a deadline. The only pauses of the rig are in here.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Long enough for anything on a loaded machine that emulates another one; a story that gets here has failed.
pub const LONG: Duration = Duration::from_secs(120);

const POLL: Duration = Duration::from_millis(25);

/// Between one asking and the next of somebody who is not in a hurry: paces a load, waits for nothing.
#[expect(clippy::disallowed_methods, reason = "no condition is waited for")]
pub fn pause(between: Duration) {
    std::thread::sleep(between);
}

/// Asks until there is an answer. An error of `ask` counts as "not yet" and is shown when the time is over.
pub fn until<T>(what: &str, within: Duration, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + within;
    loop {
        let last = match ask() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if Instant::now() >= deadline {
            match last {
                Some(error) => return Err(error.context(format!("no {what} within {within:?}"))),
                None => bail!("no {what} within {within:?}"),
            }
        }
        #[expect(clippy::disallowed_methods, reason = "the one poll loop of the rig, under a deadline")]
        std::thread::sleep(POLL);
    }
}
