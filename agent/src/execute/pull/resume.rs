//! A layer's bytes from its source, over restarts: what an earlier try has kept comes first, and what comes now is kept if it
//! would take long to fetch again. Keeping costs the flash the compressed size on top of the unpacked, so on a quick link
//! nothing is kept; on a slow one, or where bytes are counted by the day, fetching twice costs more. Where the disk has no
//! room for both, nothing is kept either.

use std::fs::File;
use std::io::{self, Read};

use edged_model::id::Digest;

use super::PullContext;
use super::room::Promise;
use crate::content::Content;
use crate::content::partial::Partial;
use crate::registry::traffic::Traffic;
use crate::registry::{BlobStream, RegistryError, Source};

/// How quick the link is shows after so much, or so long. Until then bytes are held in memory.
const HEAD_BYTES: usize = 1 << 20;
const HEAD_MS: u64 = 10_000;

/// A layer that is smaller is fetched again.
const KEEP_MIN_BYTES: u64 = 128 << 10;

enum Keeping {
    Undecided { head: Vec<u8>, since_ms: u64 },
    Yes(Partial),
    No,
}

pub struct Resumed<'w> {
    kept: Option<io::Take<File>>,
    stream: Box<dyn BlobStream + 'w>,
    keeping: Keeping,
    resumed: bool,
    layer: Digest,
    size: u64,
    content: &'w Content,
    traffic: &'w Traffic,
    keep_after_ms: u64,
    promise: &'w Promise,
    /// What was kept by this try takes of the promise.
    spared: u64,
}

impl<'w> Resumed<'w> {
    pub fn open(
        ctx: &'w PullContext,
        source: &'w Source,
        (layer, size): (Digest, u64),
        promise: &'w Promise,
    ) -> Result<Self, RegistryError> {
        let is_far = matches!(source, Source::Registry { .. });
        let partial = if is_far { ctx.content.partial(layer) } else { None };
        // More than all of it is something else.
        let partial = partial.filter(|partial| partial.bytes() <= size);
        let reader = partial.as_ref().and_then(|partial| Some(partial.reader().ok()?.take(partial.bytes())));
        let (keeping, from) = match partial {
            Some(partial) if reader.is_some() => {
                let from = partial.bytes();
                crate::crash_point::pass("partial-resumed");
                (Keeping::Yes(partial), from)
            }
            _ if is_far && size >= KEEP_MIN_BYTES => {
                (Keeping::Undecided { head: Vec::new(), since_ms: ctx.traffic.boot_ms() }, 0)
            }
            _ => (Keeping::No, 0),
        };
        Ok(Self {
            resumed: reader.is_some(),
            kept: reader,
            stream: source.blob(layer, size, from)?,
            keeping,
            layer,
            size,
            content: &ctx.content,
            traffic: &ctx.traffic,
            keep_after_ms: if ctx.traffic.has_budget() { 0 } else { ctx.images.keep_partial_after.ms },
            promise,
            spared: 0,
        })
    }

    /// Whether an earlier try has begun it.
    pub fn is_resumed(&self) -> bool {
        self.resumed
    }

    /// Nobody needs what was kept any more.
    pub fn forget(&mut self) {
        if let Keeping::Yes(partial) = std::mem::replace(&mut self.keeping, Keeping::No) {
            partial.remove();
            self.promise.give_back(std::mem::take(&mut self.spared));
        }
    }

    fn came(&mut self, bytes: &[u8]) {
        if let Keeping::Undecided { head, since_ms } = &mut self.keeping {
            head.extend_from_slice(bytes);
            let took_ms = self.traffic.boot_ms().saturating_sub(*since_ms);
            if head.len() < HEAD_BYTES && took_ms < HEAD_MS {
                return;
            }
            let whole_takes_ms = u128::from(took_ms) * u128::from(self.size) / (head.len().max(1) as u128);
            let head = std::mem::take(head);
            self.keeping = Keeping::No;
            if whole_takes_ms >= u128::from(self.keep_after_ms) {
                // Without room for it there is only nothing kept.
                self.keeping = self.content.new_partial(self.layer).map_or(Keeping::No, Keeping::Yes);
                self.keep(&head);
            }
        } else {
            self.keep(bytes);
        }
    }

    fn keep(&mut self, bytes: &[u8]) {
        let Keeping::Yes(partial) = &mut self.keeping else { return };
        let count = bytes.len() as u64;
        let has_room = self.promise.spare(count);
        self.spared += if has_room { count } else { 0 };
        if !has_room || partial.append(bytes).is_err() {
            self.forget();
        }
    }

    /// Called when the stream breaks before it was decided: what there is may be all there is for a while.
    fn keep_head(&mut self) {
        if let Keeping::Undecided { head, .. } = std::mem::replace(&mut self.keeping, Keeping::No)
            && head.len() as u64 >= KEEP_MIN_BYTES
        {
            self.keeping = self.content.new_partial(self.layer).map_or(Keeping::No, Keeping::Yes);
            self.keep(&head);
        }
    }
}

impl Read for Resumed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(kept) = &mut self.kept {
            match kept.read(buffer)? {
                0 => self.kept = None,
                count => return Ok(count),
            }
        }
        match self.stream.read(buffer) {
            Ok(count) => {
                self.came(&buffer[..count]);
                Ok(count)
            }
            Err(error) => {
                self.keep_head();
                Err(error)
            }
        }
    }
}

impl BlobStream for Resumed<'_> {
    fn take_error(&mut self) -> Option<RegistryError> {
        self.stream.take_error()
    }
}
