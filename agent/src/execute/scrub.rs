//! Reads one layer for the scrub, with the copies that there are of it: slowly, past the page cache, on a thread that waits for
//! everybody else. It only reads and tells; what is damaged is looked at again by those who may take it away.
//!
//! Where it is in a layer is written to the disk after every 64 MiB: that much at most is read twice after a power cut, and
//! the flash pays a block or three for them.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use edged_model::id::Digest;
use edged_model::quantity::Bytes;
use edged_model::scrub::{ScrubPlace, ScrubRecord};
use edged_plan::scrub::{Pace, Piece};

use crate::content::reading::Reader;
use crate::content::table::{Asked, Found};
use crate::content::{Content, ContentError};
use crate::store::inline_chain;

/// Written down after so much was read.
pub const SAVED_EVERY_BYTES: u64 = 64 << 20;
/// What looking up a file costs a disk, about: a layer of small files is not walked at full speed.
const LOOKED_UP_BYTES: u64 = 4096;

/// Between the thread that reads and whoever lets it.
#[derive(Debug, Default)]
pub struct Meter {
    is_paused: AtomicBool,
    read_bytes: AtomicU64,
    protected_bytes: AtomicU64,
}

impl Meter {
    /// True if that is new; then the thread is to be woken.
    pub fn pause(&self, is_paused: bool) -> bool {
        self.is_paused.swap(is_paused, Ordering::Relaxed) != is_paused
    }

    pub fn read(&self) -> Bytes {
        Bytes(self.read_bytes.load(Ordering::Relaxed))
    }

    /// Of that, what the kernel checked.
    pub fn protected(&self) -> Bytes {
        Bytes(self.protected_bytes.load(Ordering::Relaxed))
    }
}

/// What is to be read.
pub struct Task {
    pub layer: Digest,
    /// As it is to be written down with the place that was reached.
    pub record: ScrubRecord,
    /// Read since that was done last, and how much that may be.
    pub unsaved_bytes: u64,
    pub saved_every_bytes: u64,
    pub bytes_per_sec: u64,
    /// The clock, as a function: this takes long.
    pub boot_ms: fn() -> u64,
}

/// What became of it.
#[derive(Debug)]
pub struct Scrubbed {
    pub layer: Digest,
    pub read: Bytes,
    pub protected: Bytes,
    pub is_damaged: bool,
    /// There is no table to hold it against.
    pub is_unchecked: bool,
    pub unsaved_bytes: u64,
}

/// What was reached before this start; from the beginning where that cannot be read.
pub fn load(content: &Content) -> ScrubRecord {
    let bytes = std::fs::read(content.directory().join(RECORD));
    bytes.ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

pub fn save(content: &Content, record: &ScrubRecord) -> Result<(), ContentError> {
    let path = content.directory().join(RECORD);
    let bytes = serde_json::to_vec(record)
        .map_err(|error| ContentError { path: path.clone(), source: std::io::Error::other(error) })?;
    crate::content::durable(&path, &bytes)
}

const RECORD: &str = "scrub";

/// Blocks for as long as it takes, pauses included.
pub fn read_layer(content: &Content, task: Task, meter: &Arc<Meter>) -> Scrubbed {
    let layer = task.layer;
    let mut reader = Slow::new(content, task, Arc::clone(meter));
    let (mut is_damaged, mut is_unchecked) = (false, false);
    match unless_replaced(&content.layer(layer), || content.check_layer(layer, &mut reader)) {
        Some(Ok(None)) => is_unchecked = true,
        Some(found) => is_damaged = damaged(found.map(Option::unwrap_or_default)),
        None => {}
    }
    for first in content.copy_ranges().into_iter().filter(|first| content.has_copy(layer, *first)) {
        let found = unless_replaced(&content.copy(layer, first), || content.check_copy(layer, first, &mut reader));
        is_damaged |= found.is_some_and(damaged);
    }
    let unsaved_bytes = reader.task.unsaved_bytes;
    Scrubbed { layer, read: meter.read(), protected: meter.protected(), is_damaged, is_unchecked, unsaved_bytes }
}

fn damaged(found: Result<Found, ContentError>) -> bool {
    found.map_or(true, |found| !found.damage.is_empty())
}

/// `None`: it was taken away or put in another's place meanwhile, and what was seen of it means nothing.
fn unless_replaced<T>(directory: &Path, look: impl FnOnce() -> T) -> Option<T> {
    let which = || std::fs::symlink_metadata(directory).ok().map(|meta| (meta.ino(), meta.ctime(), meta.ctime_nsec()));
    let before = which()?;
    let seen = look();
    (which() == Some(before)).then_some(seen)
}

struct Slow<'c> {
    content: &'c Content,
    task: Task,
    meter: Arc<Meter>,
    pace: Pace,
    /// Contents that were asked for, and how many of them an earlier run has read.
    contents: u64,
    read_before: u64,
    /// The first figures are those of the layers before.
    begun_with: (u64, u64),
}

impl<'c> Slow<'c> {
    fn new(content: &'c Content, task: Task, meter: Arc<Meter>) -> Self {
        let under_way = task.record.now.as_ref();
        let place = under_way.and_then(|now| now.at).filter(|at| at.layer == task.layer);
        let begun_with = under_way.map_or((0, 0), |now| (now.pass.read.0, now.pass.protected.0));
        let pace = Pace::new((task.boot_ms)());
        Self { content, task, meter, pace, contents: 0, read_before: place.map_or(0, |at| at.contents), begun_with }
    }

    fn wait_for_the_next(&mut self) {
        loop {
            let is_paused = self.meter.is_paused.load(Ordering::Relaxed);
            match self.pace.next_piece(is_paused, self.task.bytes_per_sec, (self.task.boot_ms)()) {
                Piece::Now => return,
                Piece::In { ms } => std::thread::park_timeout(Duration::from_millis(ms)),
                Piece::WhenLetGoOn => std::thread::park(),
            }
        }
    }

    fn save_place(&mut self) {
        let at = Some(ScrubPlace { layer: self.task.layer, contents: self.contents });
        let Some(now) = self.task.record.now.as_mut() else { return };
        now.at = at;
        now.pass.read = Bytes(self.begun_with.0 + self.meter.read().0);
        now.pass.protected = Bytes(self.begun_with.1 + self.meter.protected().0);
        if let Err(error) = save(self.content, &self.task.record) {
            // Tried again with the next.
            tracing::warn!("how far the scrub is: {}", inline_chain(&error));
        }
        self.task.unsaved_bytes = 0;
    }
}

impl Reader for Slow<'_> {
    fn may_read(&mut self, asked: Asked) -> bool {
        if self.task.unsaved_bytes >= self.task.saved_every_bytes {
            self.save_place();
        }
        self.contents += 1;
        if self.contents <= self.read_before {
            return false;
        }
        self.pace.has_read(LOOKED_UP_BYTES);
        self.wait_for_the_next();
        if asked.is_protected {
            self.meter.protected_bytes.fetch_add(asked.bytes, Ordering::Relaxed);
        }
        true
    }

    fn has_read(&mut self, bytes: usize) {
        let bytes = bytes as u64;
        self.meter.read_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.task.unsaved_bytes += bytes;
        self.pace.has_read(bytes);
        self.wait_for_the_next();
    }

    fn is_past_the_cache(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::table::Sums;
    use edged_model::scrub::{ScrubPass, ScrubUnderWay};
    use std::os::unix::fs::FileExt;

    const FILES: u64 = 10;
    const FILE_BYTES: u64 = 10_000;

    fn layer(content: &Content) -> Digest {
        let chain = Digest::of(b"layer");
        let staged = content.stage(chain).unwrap().unwrap();
        for number in 0..FILES {
            std::fs::write(staged.path().join(format!("file-{number}")), vec![7; FILE_BYTES as usize]).unwrap();
        }
        staged.publish(&Sums::default()).unwrap();
        chain
    }

    fn rot(content: &Content, chain: Digest, number: u64) {
        let path = content.layer(chain).join(format!("file-{number}"));
        let before = std::fs::metadata(&path).unwrap().modified().unwrap();
        let file = std::fs::File::options().write(true).open(path).unwrap();
        file.write_all_at(&[8], 5_000).unwrap();
        file.set_modified(before).unwrap();
    }

    fn task(chain: Digest, record: ScrubRecord) -> Task {
        Task {
            layer: chain,
            record,
            unsaved_bytes: 0,
            saved_every_bytes: 3 * FILE_BYTES,
            bytes_per_sec: u64::MAX,
            boot_ms: || 0,
        }
    }

    fn begun() -> ScrubRecord {
        ScrubRecord { now: Some(ScrubUnderWay::default()), last: Some(ScrubPass::default()) }
    }

    #[test]
    fn after_a_cut_it_goes_on_in_the_middle_of_a_layer() {
        let dir = tempfile::tempdir().unwrap();
        let content = Content::open(&crate::config::Places::new(Some(dir.path()), None)).unwrap();
        let chain = layer(&content);
        assert_eq!(load(&content), ScrubRecord::default());
        let whole = read_layer(&content, task(chain, begun()), &Arc::default());
        assert_eq!((whole.read, whole.is_damaged, whole.is_unchecked), (Bytes(FILES * FILE_BYTES), false, false));

        // As the disk has it when the power goes just before the end.
        let record = load(&content);
        let now = record.now.clone().unwrap();
        assert_eq!(now.at, Some(ScrubPlace { layer: chain, contents: 9 }));
        assert_eq!((now.pass.read, record.last.is_some()), (Bytes(9 * FILE_BYTES), true));
        rot(&content, chain, 0);
        let rest = read_layer(&content, task(chain, record.clone()), &Arc::default());
        assert_eq!((rest.read, rest.is_damaged), (Bytes(FILE_BYTES), false), "what was read is not read again");
        rot(&content, chain, 9);
        assert!(read_layer(&content, task(chain, record), &Arc::default()).is_damaged);

        // A record that is damaged itself is none.
        std::fs::write(content.directory().join(RECORD), "{").unwrap();
        assert_eq!(load(&content), ScrubRecord::default());
    }

    #[test]
    fn a_paused_reader_reads_nothing_and_what_was_taken_away_meanwhile_is_no_damage() {
        let dir = tempfile::tempdir().unwrap();
        let content = Content::open(&crate::config::Places::new(Some(dir.path()), None)).unwrap();
        let chain = layer(&content);
        let meter = Arc::new(Meter::default());
        assert!(meter.pause(true) && !meter.pause(true));
        let (of_thread, content_too) = (Arc::clone(&meter), content.clone());
        let (asked, at) = std::sync::mpsc::channel();
        static ASKED: std::sync::OnceLock<std::sync::Mutex<std::sync::mpsc::Sender<()>>> = std::sync::OnceLock::new();
        ASKED.set(std::sync::Mutex::new(asked)).unwrap();
        // Whoever asks what time it is is about to read, or to wait.
        let boot_ms = || {
            let _ = ASKED.get().unwrap().lock().unwrap().send(());
            0
        };
        let task = Task { boot_ms, ..task(chain, begun()) };
        let reading = std::thread::spawn(move || read_layer(&content_too, task, &of_thread));
        for _ in 0..2 {
            at.recv_timeout(Duration::from_secs(60)).unwrap();
        }
        assert_eq!(meter.read(), Bytes(0));
        content.remove_layer(chain).unwrap();
        meter.pause(false);
        reading.thread().unpark();
        let scrubbed = reading.join().unwrap();
        assert!(!scrubbed.is_damaged, "{scrubbed:?}");
    }
}
