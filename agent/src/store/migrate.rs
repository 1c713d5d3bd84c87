//! Format versions of what is written. A newer one than this program knows is refused, never guessed at: the program was
//! rolled back, and the data is whole.

use super::StoreError;

/// The version that this program writes.
pub const FORMAT: u32 = 1;

/// What is to be done with a store of the format `found` (`None`: an empty one).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    Nothing,
    /// Write the current number.
    Stamp,
}

/// Each older format gets its own arm here, one step at a time, when there is one.
pub fn step(found: Option<u32>) -> Result<Step, StoreError> {
    match found {
        None => Ok(Step::Stamp),
        Some(FORMAT) => Ok(Step::Nothing),
        Some(found) => Err(StoreError::OtherFormat { found, known: FORMAT }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_format_is_refused_and_named() {
        assert_eq!(step(None).unwrap(), Step::Stamp);
        assert_eq!(step(Some(FORMAT)).unwrap(), Step::Nothing);
        let refused = step(Some(FORMAT + 1)).unwrap_err().to_string();
        assert!(refused.contains("format 2") && refused.contains("format 1"), "{refused}");
    }
}
