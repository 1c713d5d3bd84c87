//! Conditions with a deadline. The only pause of the rig is in here.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Long enough for anything on a loaded machine that emulates another one; a story that gets here has failed.
pub const LONG: Duration = Duration::from_secs(120);

const POLL: Duration = Duration::from_millis(25);

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
