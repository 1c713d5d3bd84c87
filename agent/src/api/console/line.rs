//! The line a person types: bytes in, echo out, and now and then a whole line. Pure. Whatever bytes come, the line is
//! bounded, printable, and nothing but plain text is echoed.

/// A typed line is never longer; what comes after is answered with the bell.
pub const LINE_MAX_BYTES: usize = 1024;

const BELL: &[u8] = b"\x07";
const INTERRUPT: u8 = 0x03;
const END: u8 = 0x04;
const ERASE_LINE: u8 = 0x15;
const ESCAPE: u8 = 0x1b;

/// What one byte meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Typed {
    /// Nothing yet: what to echo.
    Echo(Vec<u8>),
    /// Return was pressed.
    Line(String),
    /// Ctrl-C, or Ctrl-D on an empty line: begin anew.
    Again,
}

/// Where in an escape sequence (an arrow key) the typist is: it is swallowed whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Escape {
    #[default]
    None,
    /// After ESC.
    Begun,
    /// After `ESC [` or `ESC O`: until a letter or `~`.
    Inside,
}

#[derive(Debug, Default)]
pub struct Line {
    text: String,
    escape: Escape,
    /// The last byte was a carriage return: a line feed behind it belongs to it.
    after_return: bool,
}

impl Line {
    pub fn feed(&mut self, byte: u8) -> Typed {
        let after_return = std::mem::take(&mut self.after_return);
        match (self.escape, byte) {
            (_, INTERRUPT) => return self.again(),
            (Escape::None, ESCAPE) => {
                self.escape = Escape::Begun;
                return Typed::Echo(Vec::new());
            }
            (Escape::None, _) => {}
            // A line end always ends: half a sequence must not eat it.
            (_, b'\r' | b'\n') => self.escape = Escape::None,
            (Escape::Begun, b'[' | b'O') => {
                self.escape = Escape::Inside;
                return Typed::Echo(Vec::new());
            }
            (Escape::Inside, b'0'..=b'?' | b' '..=b'/') => return Typed::Echo(Vec::new()),
            (Escape::Begun | Escape::Inside, _) => {
                self.escape = Escape::None;
                return Typed::Echo(Vec::new());
            }
        }
        match byte {
            b'\n' if after_return => Typed::Echo(Vec::new()),
            b'\r' | b'\n' => {
                self.after_return = byte == b'\r';
                Typed::Line(std::mem::take(&mut self.text))
            }
            END if self.text.is_empty() => self.again(),
            ERASE_LINE => {
                let width = self.text.len();
                self.text.clear();
                Typed::Echo(b"\x08 \x08".repeat(width))
            }
            0x08 | 0x7f => Typed::Echo(self.text.pop().map_or(Vec::new(), |_| b"\x08 \x08".to_vec())),
            b' '..=b'~' if self.text.len() < LINE_MAX_BYTES => {
                self.text.push(char::from(byte));
                Typed::Echo(vec![byte])
            }
            // Names and verbs are ASCII: other bytes are line noise.
            _ => Typed::Echo(BELL.to_vec()),
        }
    }

    fn again(&mut self) -> Typed {
        *self = Self::default();
        Typed::Again
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lines(bytes: &[u8]) -> Vec<String> {
        let mut line = Line::default();
        let typed = bytes.iter().map(|byte| line.feed(*byte));
        typed.filter_map(|typed| if let Typed::Line(text) = typed { Some(text) } else { None }).collect()
    }

    #[test]
    fn a_person_types() {
        assert_eq!(lines(b"status\r"), ["status"]);
        assert_eq!(lines(b"stattus\x7f\x7f\x7fus\r\nps\n"), ["status", "ps"]);
        assert_eq!(lines(b"wrong\x15ps\r"), ["ps"]);
        assert_eq!(lines(b"wrong\x03ps\r"), ["ps"]);
        assert_eq!(lines(b"\x1b[A\x1b[1;5Cps\x1bOP\r"), ["ps"]);
        assert_eq!(lines(b"\x1b\rps\r"), ["", "ps"]);
        assert_eq!(lines(b"\r\r"), ["", ""]);
    }

    #[test]
    fn a_line_that_never_ends_is_bounded() {
        let mut long = vec![b'x'; 1 << 20];
        long.push(b'\r');
        assert_eq!(lines(&long)[0].len(), LINE_MAX_BYTES);
    }

    proptest! {
        #[test]
        fn no_bytes_break_it_and_none_but_plain_ones_come_back(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let mut line = Line::default();
            for byte in bytes {
                match line.feed(byte) {
                    Typed::Echo(echo) => {
                        prop_assert!(echo.iter().all(|b| matches!(b, b' '..=b'~' | 0x07 | 0x08)));
                    }
                    Typed::Line(text) => prop_assert!(text.bytes().all(|b| matches!(b, b' '..=b'~'))),
                    Typed::Again => {}
                }
            }
        }
    }
}
