//! Changed copies of real documents: bits, numbers, lengths, pieces that go, come twice or come from another document.

/// What breaks programs that count.
const INTERESTING: [u64; 12] = [
    0,
    1,
    0x17,
    0x18,
    0x7f,
    0xff,
    0x100,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    0xffff_ffff_ffff_ffff,
];

/// Longer than this finds nothing more.
const LENGTH_MAX: usize = 64 << 10;

pub struct Mutator {
    random: fastrand::Rng,
}

impl Mutator {
    pub fn new(seed: u64) -> Self {
        Self { random: fastrand::Rng::with_seed(seed) }
    }

    /// One of `seeds`, changed at least once.
    pub fn changed(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = seeds[self.random.usize(..seeds.len())].clone();
        for _ in 0..=self.random.u32(..4) {
            self.change(&mut bytes, seeds);
        }
        bytes.truncate(LENGTH_MAX);
        bytes
    }

    fn change(&mut self, bytes: &mut Vec<u8>, seeds: &[Vec<u8>]) {
        if bytes.is_empty() {
            bytes.push(self.random.u8(..));
            return;
        }
        match self.random.u32(..9) {
            0 => {
                let at = self.at(bytes);
                bytes[at] ^= 1 << self.random.u32(..8);
            }
            1 => {
                let at = self.at(bytes);
                bytes[at] = self.random.u8(..);
            }
            2 => self.number(bytes),
            3 => self.text_number(bytes),
            4 => {
                let range = self.range(bytes);
                bytes.drain(range);
            }
            5 => {
                let range = self.range(bytes);
                let (copy, at) = (bytes[range].to_vec(), self.at(bytes));
                bytes.splice(at..at, copy);
            }
            6 => {
                let other = &seeds[self.random.usize(..seeds.len())];
                if !other.is_empty() {
                    let (range, at) = (self.range(other), self.at(bytes));
                    bytes.splice(at..at, other[range].iter().copied());
                }
            }
            7 => {
                let at = self.at(bytes);
                bytes.truncate(at);
            }
            _ => {
                let at = self.at(bytes);
                let more: Vec<u8> = (0..self.random.usize(1..9)).map(|_| self.random.u8(..)).collect();
                bytes.splice(at..at, more);
            }
        }
    }

    fn at(&mut self, bytes: &[u8]) -> usize {
        self.random.usize(..bytes.len())
    }

    fn range(&mut self, bytes: &[u8]) -> std::ops::Range<usize> {
        let at = self.at(bytes);
        // Mostly short: a whole half that goes is soon refused.
        let most = if self.random.bool() { 16 } else { bytes.len() };
        at..bytes.len().min(at + 1 + self.random.usize(..most))
    }

    /// Binary numbers, as lengths in CBOR are.
    fn number(&mut self, bytes: &mut [u8]) {
        let number = INTERESTING[self.random.usize(..INTERESTING.len())].to_be_bytes();
        let width = [1, 2, 4, 8][self.random.usize(..4)];
        let at = self.at(bytes);
        let end = bytes.len().min(at + width);
        bytes[at..end].copy_from_slice(&number[8 - width..][..end - at]);
    }

    /// Written numbers, as sizes in JSON (decimal) and in tar (octal) are.
    fn text_number(&mut self, bytes: &mut Vec<u8>) {
        let digits: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at].is_ascii_digit()).collect();
        if digits.is_empty() {
            return;
        }
        let at = digits[self.random.usize(..digits.len())];
        let end = at + bytes[at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        let number = INTERESTING[self.random.usize(..INTERESTING.len())];
        let text = if self.random.bool() { number.to_string() } else { format!("{number:0w$o}", w = end - at) };
        // In place where it fits, so that what follows stays where it is.
        if text.len() <= end - at {
            bytes[end - text.len()..end].copy_from_slice(text.as_bytes());
        } else {
            bytes.splice(at..end, text.into_bytes());
        }
    }
}
