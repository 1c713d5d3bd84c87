//! Bytes from the thread that makes them to the one that needs them, over one that takes their digest. A layer is decoded,
//! hashed and written at the same time; what is on the way is bounded, and its buffers go round.
//!
//! ```text
//! pump ──chunk──> hash ──chunk──> Chunks: BufRead
//!   ^                                │
//!   └───────────── empty ────────────┘
//! ```

use std::io::{self, BufRead, Read};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use edged_model::id::Digest;
use sha2::{Digest as _, Sha256};

/// Large enough that handing over costs little beside the work (a zstd block has 128 KiB). With twice as much a pull is 3 %
/// faster, and two layers with their windows would have no room left in its 24 MiB.
const CHUNK_BYTES: usize = 256 << 10;
/// One is filled, one is hashed, one is written, and one between each of these.
const CHUNKS: usize = 5;

type Chunk = io::Result<Vec<u8>>;

pub struct Relay {
    pub pump: Pump,
    pub hasher: Hasher,
    pub chunks: Chunks,
}

/// The three ends.
pub fn relay() -> Relay {
    let (full, to_hash) = sync_channel(CHUNKS);
    let (hashed, to_read) = sync_channel(CHUNKS);
    let (empty, free) = sync_channel(CHUNKS);
    Relay {
        pump: Pump { full, free, made: 0 },
        hasher: Hasher { to_hash, hashed },
        chunks: Chunks { to_read, empty, current: Vec::new(), at: 0 },
    }
}

pub struct Pump {
    full: SyncSender<Chunk>,
    free: Receiver<Vec<u8>>,
    made: usize,
}

impl Pump {
    /// Sends all that `reader` has, an error at last if it ends in one. Ends early when nobody reads any more.
    pub fn run(mut self, mut reader: impl Read) {
        while let Some(mut buffer) = self.buffer() {
            let (count, error) = fill(&mut reader, &mut buffer);
            buffer.truncate(count);
            let is_end = count == 0 || error.is_some();
            if count > 0 && self.full.send(Ok(buffer)).is_err() {
                return;
            }
            if let Some(error) = error {
                // Whoever reads no more has an error of his own.
                let _ = self.full.send(Err(error));
            }
            if is_end {
                return;
            }
        }
    }

    fn buffer(&mut self) -> Option<Vec<u8>> {
        let mut buffer = match self.free.try_recv() {
            Ok(buffer) => buffer,
            Err(_) if self.made < CHUNKS => {
                self.made += 1;
                Vec::new()
            }
            Err(_) => self.free.recv().ok()?,
        };
        buffer.resize(CHUNK_BYTES, 0);
        Some(buffer)
    }
}

/// As much as there is and fits, and the error that came behind it: a reader that failed is not read again.
fn fill(reader: &mut impl Read, buffer: &mut [u8]) -> (usize, Option<io::Error>) {
    let mut filled = 0;
    while filled < buffer.len() {
        match reader.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return (filled, Some(error)),
        }
    }
    (filled, None)
}

pub struct Hasher {
    to_hash: Receiver<Chunk>,
    hashed: SyncSender<Chunk>,
}

impl Hasher {
    /// Of everything that was sent.
    pub fn run(self) -> Digest {
        let mut hash = Sha256::new();
        for chunk in self.to_hash {
            if let Ok(bytes) = &chunk {
                hash.update(bytes);
            }
            if self.hashed.send(chunk).is_err() {
                break;
            }
        }
        Digest::from_bytes(hash.finalize().into())
    }
}

/// What was sent, as a stream.
pub struct Chunks {
    to_read: Receiver<Chunk>,
    empty: SyncSender<Vec<u8>>,
    current: Vec<u8>,
    at: usize,
}

impl BufRead for Chunks {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at == self.current.len()
            && let Ok(next) = self.to_read.recv()
        {
            let old = std::mem::replace(&mut self.current, next?);
            self.at = 0;
            if old.capacity() > 0 {
                // Nobody needs it when everything was sent.
                let _ = self.empty.send(old);
            }
        }
        Ok(&self.current[self.at..])
    }

    fn consume(&mut self, count: usize) {
        self.at = self.current.len().min(self.at + count);
    }
}

impl Read for Chunks {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.fill_buf()?.read(buffer)?;
        self.consume(count);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives `bytes`, then fails.
    struct Failing<'b>(&'b [u8]);

    impl Read for Failing<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let take = buffer.len().min(1000);
            match self.0.read(&mut buffer[..take])? {
                0 => Err(io::Error::other("broken")),
                count => Ok(count),
            }
        }
    }

    fn sent(reader: impl Read + Send, take: u64) -> (Vec<u8>, Option<String>, Digest) {
        let Relay { pump, hasher, mut chunks } = relay();
        std::thread::scope(|scope| {
            scope.spawn(move || pump.run(reader));
            let hasher = scope.spawn(move || hasher.run());
            let mut bytes = Vec::new();
            let error = chunks.by_ref().take(take).read_to_end(&mut bytes).err();
            drop(chunks);
            (bytes, error.map(|error| error.to_string()), hasher.join().unwrap())
        })
    }

    #[test]
    fn everything_comes_in_order_and_an_error_after_it() {
        for length in [0, 1, CHUNK_BYTES, 3_000_001] {
            let all: Vec<u8> = (0..length).map(|n| (n % 251) as u8).collect();
            assert!(sent(all.as_slice(), u64::MAX) == (all.clone(), None, Digest::of(&all)));
            let (bytes, error, _) = sent(Failing(&all), u64::MAX);
            assert!(bytes == all && error.as_deref() == Some("broken"), "{length}");
        }
    }

    #[test]
    fn when_nobody_reads_any_more_everybody_stops() {
        assert_eq!(sent(io::repeat(1), 10).0, [1; 10]);
    }
}
