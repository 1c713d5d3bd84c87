//! The store on a thread of its own: the loop never waits for a disk. Work is done in the order in which it was given. What
//! comes close behind each other, a line of the story and the change that it tells of, is written as one.

use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};

use crate::store::{Store, inline_chain};

/// Writes that may wait: more than any burst of events; a disk that is this far behind is as good as gone.
const DEPTH: usize = 1024;

/// Works of one batch: what a power cut may take of a story that is being written.
const IN_ONE: usize = 64;

type Work = Box<dyn FnOnce(&Store) + Send>;

#[derive(Clone)]
pub struct StoreThread {
    queue: SyncSender<Work>,
}

/// The queue is full: nothing was done.
#[derive(Debug, thiserror::Error)]
#[error("the disk is {DEPTH} writes behind")]
pub struct Busy;

impl StoreThread {
    pub fn start(store: Store) -> std::io::Result<Self> {
        let (queue, work) = sync_channel::<Work>(DEPTH);
        std::thread::Builder::new().name("store".to_owned()).spawn(move || {
            while let Ok(first) = work.recv() {
                first(&store);
                for more in work.try_iter().take(IN_ONE) {
                    more(&store);
                }
                if let Err(error) = store.settle() {
                    tracing::error!("the last lines of the story: {}", inline_chain(&error));
                }
            }
        })?;
        Ok(Self { queue })
    }

    pub fn submit(&self, work: impl FnOnce(&Store) + Send + 'static) -> Result<(), Busy> {
        self.queue.try_send(Box::new(work)).map_err(|error| match error {
            TrySendError::Full(_) | TrySendError::Disconnected(_) => Busy,
        })
    }
}
