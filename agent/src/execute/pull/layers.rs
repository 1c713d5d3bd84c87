//! The layers of one image, several at once ([`Slots`](super::slots::Slots)). Each goes from its stream into its directory in one pass; a thread takes
//! the lowest that nobody has taken, so that waiting for the layers below never waits for oneself.

use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Condvar, Mutex, PoisonError};

use edged_model::id::Digest;
use edged_model::quantity::Bytes;
use edged_model::reason::{Code, Reason};

use super::resume::Resumed;
use super::room::Promise;
use super::slots::Slot;
use super::{OneImage, Order, Progress, PullContext, PullFailure};
use crate::content::ContentError;
use crate::content::layer::{Compression, Expected, LayerError, unpack_stream};
use crate::content::unpack::{Bounds, UnpackError};
use crate::registry::{BlobStream, Source};
use crate::store::inline_chain;

/// One layer of the image, as manifest and configuration describe it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    pub digest: Digest,
    pub diff_id: Digest,
    pub chain: Digest,
    pub size: u64,
    pub compression: Compression,
}

/// A report of progress is worth waking somebody for.
const PROGRESS_STEP_BYTES: u64 = 256 << 10;

/// Reports on their way: one for each thread that fetches is enough, more only smooths.
const PROGRESS_DEPTH: usize = 16;

/// Fetches what is missing of `layers` (lowest first); there is room for it by the `promise`.
pub fn fetch(
    image: &OneImage<'_>,
    layers: &[Layer],
    promise: &Promise,
    order: &Order,
    progress: &dyn Fn(Progress),
) -> Result<(), PullFailure> {
    let OneImage { ctx, source, image, .. } = *image;
    let missing: Vec<usize> = (0..layers.len()).filter(|index| !ctx.content.has_layer(layers[*index].chain)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let work = Work {
        ctx,
        image,
        source,
        layers,
        missing: &missing,
        next: AtomicUsize::new(0),
        promise,
        order,
        has_windows: missing.iter().any(|index| layers[*index].compression == Compression::Zstd),
        done: Mutex::new((0..layers.len()).map(|index| !missing.contains(&index)).collect()),
        changed: Condvar::new(),
        failed: AtomicBool::new(false),
    };
    let total = missing.iter().map(|index| layers[*index].size).fold(0, u64::saturating_add);
    let threads = usize::try_from(ctx.images.parallel).unwrap_or(1).clamp(1, missing.len());
    progress(Progress { done: Bytes(0), total: Bytes(total) });
    let (sender, receiver) = sync_channel(PROGRESS_DEPTH);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                let (work, sender) = (&work, sender.clone());
                scope.spawn(move || work.until_done(&sender))
            })
            .collect();
        drop(sender);
        let mut fetched = 0_u64;
        // Ends when the last worker has dropped its sender.
        for count in receiver {
            fetched = fetched.saturating_add(count);
            progress(Progress { done: Bytes(fetched.min(total)), total: Bytes(total) });
        }
        let mut given_up = order.is_withdrawn().then_some("nobody wants it any more");
        for worker in workers {
            match worker.join() {
                Ok(Ok(())) => {}
                // The cause; what the others say follows from it.
                Ok(Err(Stopped::Failed(failure))) => return Err(failure),
                Ok(Err(Stopped::GivenUp)) => given_up = Some("another layer failed"),
                Err(_) => given_up = Some("a thread of edged ended unexpectedly"),
            }
        }
        given_up.map_or(Ok(()), |why| Err(PullFailure::passing(Code::ImageUnusable, format!("{image}: {why}"))))
    })
}

#[derive(PartialEq, Eq)]
enum Unpacked {
    Whole,
    /// What an earlier try had kept was not what it should be.
    FromDamaged,
}

enum Stopped {
    Failed(PullFailure),
    GivenUp,
}

impl From<PullFailure> for Stopped {
    fn from(failure: PullFailure) -> Self {
        Self::Failed(failure)
    }
}

/// What the threads share.
struct Work<'w> {
    ctx: &'w PullContext,
    image: &'w str,
    source: &'w Source,
    layers: &'w [Layer],
    missing: &'w [usize],
    next: AtomicUsize,
    promise: &'w Promise,
    order: &'w Order,
    has_windows: bool,
    /// Which layers are on the disk.
    done: Mutex<Vec<bool>>,
    changed: Condvar,
    failed: AtomicBool,
}

impl Work<'_> {
    fn until_done(&self, progress: &SyncSender<u64>) -> Result<(), Stopped> {
        // Also when this thread panics: the others must not wait for a layer that never comes.
        let fence = FailOnDrop(self);
        // The slot first: then whoever waits for a layer below waits for somebody who has one.
        while let Some(_slot) = self.slot()
            && let Some(index) = self.missing.get(self.next.fetch_add(1, Ordering::Relaxed))
        {
            self.one(*index, progress)?;
            self.done.lock().unwrap_or_else(PoisonError::into_inner)[*index] = true;
            self.changed.notify_all();
        }
        std::mem::forget(fence);
        Ok(())
    }

    /// `None`: there is nothing left to do.
    fn slot(&self) -> Option<Slot<'_>> {
        let nothing_left = || self.next.load(Ordering::Relaxed) >= self.missing.len() || self.has_ended();
        self.ctx.slots.take(self.has_windows, self.order.is_urgent, &nothing_left)
    }

    /// Another layer has failed, or nobody wants the image any more.
    fn has_ended(&self) -> bool {
        self.failed.load(Ordering::Relaxed) || self.order.is_withdrawn()
    }

    fn one(&self, index: usize, progress: &SyncSender<u64>) -> Result<(), Stopped> {
        // Once more, and without what was kept of it: that is gone now.
        while self.try_one(index, progress)? == Unpacked::FromDamaged {}
        Ok(())
    }

    fn try_one(&self, index: usize, progress: &SyncSender<u64>) -> Result<Unpacked, Stopped> {
        let layer = &self.layers[index];
        let disk = |error| self.disk(&error);
        let Some(staged) = self.ctx.content.stage(layer.chain).map_err(disk)? else { return Ok(Unpacked::Whole) };
        let blob = (layer.digest, layer.size);
        let stream = Resumed::open(self.ctx, self.source, blob, self.promise).map_err(PullFailure::from)?;
        let mut reader = Watched { stream, size_left: layer.size, unreported: 0, progress, work: self };
        let expected = Expected { digest: layer.digest, diff_id: layer.diff_id, compression: layer.compression };
        let images = &self.ctx.images;
        let (bytes_max, entries_max) = (images.layer_max.0, images.layer_entries_max);
        let device_nodes = self.ctx.device_nodes(self.image);
        let is_protected = self.ctx.content.protects();
        let bounds = Bounds { bytes_max, entries_max, disk_left: self.promise.left(), device_nodes, is_protected };
        match unpack_stream(&mut reader, &expected, staged.path(), &|| self.below(index), bounds) {
            Ok(sums) => {
                staged.publish(&sums).map_err(disk)?;
                reader.stream.forget();
                Ok(Unpacked::Whole)
            }
            Err(_) if self.has_ended() => Err(Stopped::GivenUp),
            Err(error) => match reader.stream.take_error() {
                Some(error) => Err(PullFailure::from(error).into()),
                None => {
                    reader.stream.forget();
                    let is_wrong = matches!(error, LayerError::WrongDigest { .. });
                    if is_wrong && reader.stream.is_resumed() {
                        return Ok(Unpacked::FromDamaged);
                    }
                    Err(self.refused(layer, &error).into())
                }
            },
        }
    }

    /// The layers below, once they are there; after a failure, those that are.
    fn below(&self, index: usize) -> Vec<PathBuf> {
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        while !done[..index].iter().all(|done| *done) && !self.failed.load(Ordering::Relaxed) {
            done = self.changed.wait(done).unwrap_or_else(PoisonError::into_inner);
        }
        self.layers[..index].iter().map(|layer| self.ctx.content.layer(layer.chain)).collect()
    }

    fn disk(&self, error: &ContentError) -> PullFailure {
        if error.source.kind() == io::ErrorKind::Unsupported {
            let at = error.path.display();
            let text = format!(
                "{}: `images.fs-verity` is `required`, and the kernel cannot protect files in {at}",
                self.image
            );
            let next =
                "a kernel with CONFIG_FS_VERITY, and a file system with its feature `verity` (tune2fs -O verity)";
            return PullFailure::permanent(Reason::new(Code::NotAllowedHere, text).next(next));
        }
        PullFailure::passing(Code::DiskFull, format!("{}: {}", self.image, inline_chain(error)))
    }

    fn refused(&self, layer: &Layer, error: &LayerError) -> PullFailure {
        let text = format!("{}: layer {}: {}", self.image, layer.digest.short(), inline_chain(error));
        match error {
            LayerError::Unpack(UnpackError::Write { source, .. }) if is_of_this_device(source) => {
                PullFailure::passing(Code::DiskFull, text)
            }
            LayerError::Unpack(UnpackError::DiskFull { .. }) => {
                let mut failure = self.promise.was_too_small(self.image);
                failure.reason.text = format!("{}; {text}", failure.reason.text);
                failure
            }
            LayerError::WrongDigest { .. } | LayerError::WrongDiffId { .. } => {
                PullFailure::permanent(Reason::new(Code::DigestMismatch, text))
            }
            LayerError::Read(_) => PullFailure::passing(Code::RegistryUnavailable, text),
            LayerError::Unpack(_) | LayerError::Decompress(_) | LayerError::Padding { .. } => {
                PullFailure::permanent(Reason::new(Code::LayerRefused, text))
            }
        }
    }
}

/// Not what the layer wants to have written is the reason, but the disk, or what there is too little of just now.
fn is_of_this_device(error: &io::Error) -> bool {
    use nix::errno::Errno as E;
    let errno = error.raw_os_error().map(E::from_raw);
    let of_the_disk = [E::ENOSPC, E::EDQUOT, E::EIO, E::EROFS, E::EUCLEAN, E::EBADMSG, E::ENODEV, E::ENXIO, E::ESTALE];
    let too_little = [E::ENOMEM, E::EMFILE, E::ENFILE, E::EAGAIN, E::EINTR, E::ENOBUFS];
    errno.is_some_and(|errno| of_the_disk.contains(&errno) || too_little.contains(&errno))
}

/// Tells the other threads to give up.
struct FailOnDrop<'w, 'x>(&'w Work<'x>);

impl Drop for FailOnDrop<'_, '_> {
    fn drop(&mut self) {
        // Under the lock, so that nobody goes to sleep between looking and being woken.
        let _done = self.0.done.lock().unwrap_or_else(PoisonError::into_inner);
        self.0.failed.store(true, Ordering::Relaxed);
        self.0.changed.notify_all();
        self.0.ctx.slots.look_again();
    }
}

/// A stream that tells how far it is, ends with its announced size, and stops when another layer has failed.
struct Watched<'w> {
    stream: Resumed<'w>,
    size_left: u64,
    unreported: u64,
    progress: &'w SyncSender<u64>,
    work: &'w Work<'w>,
}

impl Read for Watched<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.work.has_ended() {
            return Err(io::Error::other("nobody wants it any more"));
        }
        // One byte more than announced is enough to see that the digest cannot be right.
        let take = buffer.len().min(usize::try_from(self.size_left.saturating_add(1)).unwrap_or(usize::MAX));
        let count = self.stream.read(&mut buffer[..take])?;
        self.size_left = self.size_left.saturating_sub(count as u64);
        self.unreported += count as u64;
        if self.unreported >= PROGRESS_STEP_BYTES || (count == 0 && self.unreported > 0) {
            // Nobody listens any more only if the pull itself is ending.
            let _ = self.progress.send(self.unreported);
            self.unreported = 0;
        }
        Ok(count)
    }
}
