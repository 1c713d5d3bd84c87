//! The keys that leave a command to itself: `ctrl-p,ctrl-q`, as in other programs of this kind.

/// They are held back while they may be the beginning, and go to the command when they are not.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DetachKeys {
    keys: Vec<u8>,
    /// How many of them were typed.
    held: usize,
}

impl DetachKeys {
    /// Apart by commas: one character, or `ctrl-` and one of `a-z @ [ \\ ] ^ _`. Nothing: there is no way out.
    pub fn parse(text: &str) -> Result<Self, String> {
        let key = |word: &str| match (word.strip_prefix("ctrl-").unwrap_or_default().as_bytes(), word.as_bytes()) {
            ([c @ (b'a'..=b'z' | b'@' | b'['..=b'_')], _) => Ok(c & 0x1f),
            ([], [c]) => Ok(*c),
            _ => Err(format!("`{word}` is no key: one character, or ctrl- and a letter")),
        };
        let keys = text.split(',').filter(|_| !text.is_empty()).map(key).collect::<Result<_, _>>()?;
        Ok(Self { keys, held: 0 })
    }

    /// What of `typed` goes on to the command, and whether all keys were typed.
    pub fn pass(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut through = Vec::with_capacity(typed.len());
        for byte in typed {
            if self.keys.get(self.held) != Some(byte) {
                through.extend_from_slice(&self.keys[..self.held]);
                self.held = 0;
            }
            if self.keys.get(self.held) == Some(byte) {
                self.held += 1;
            } else {
                through.push(*byte);
            }
            if self.held > 0 && self.held == self.keys.len() {
                return (through, true);
            }
        }
        (through, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_held_back_until_they_are_something_else() {
        let mut keys = DetachKeys::parse("ctrl-p,ctrl-q").unwrap();
        assert_eq!(keys.pass(b"ls\r"), (b"ls\r".to_vec(), false));
        assert_eq!(keys.pass(b"a\x10"), (b"a".to_vec(), false));
        assert_eq!(keys.pass(b"\x10"), (b"\x10".to_vec(), false), "the first one goes on, the second is held");
        assert_eq!(keys.pass(b"b"), (b"\x10b".to_vec(), false));
        assert_eq!(keys.pass(b"c\x10\x11d"), (b"c".to_vec(), true));
        let mut none = DetachKeys::parse("").unwrap();
        assert_eq!(none.pass(b"\x10\x11"), (b"\x10\x11".to_vec(), false));
        assert!(DetachKeys::parse("~,.").unwrap().pass(b"~.").1);
        assert!(DetachKeys::parse("ctrl-").is_err() && DetachKeys::parse("ctrl-p,,").is_err());
        assert!(DetachKeys::parse("escape").is_err());
    }
}
