//! The trust root in force, and how a newer one takes its place: by a threshold of the old root's keys and of its own, and
//! never back. It is on the disk, twice, before anything is judged by it.

use std::path::Path;
use std::sync::Arc;

use edged_model::quantity::Timestamp;
use edged_model::reason::{Code, Reason};
use edged_model::trust::{RoleName, TrustRoot};
use tokio::sync::oneshot;

use super::{Agent, Message};
use crate::crash_point;
use crate::execute::pull::PullContext;
use crate::report::Taken;
use crate::store::{Store, StoreError, inline_chain};
use crate::verify::{image_policy, trust};

type Reply = oneshot::Sender<Result<Taken, Reason>>;

impl Agent {
    /// Trust roots were offered, each as the successor of the one before: the newest that may be in force is taken, and
    /// those between are not kept.
    pub(super) fn offer_roots(&mut self, mut envelopes: Vec<Vec<u8>>, by: &str, reply: Reply) {
        let known = self.store.trust_root().ok().flatten();
        // A second push of the one in force changes nothing.
        let answer = if known.is_some() && envelopes.len() == 1 && envelopes.first() == known.as_ref() {
            Ok(Taken::TrustRoot(self.root.version))
        } else {
            let followed = trust::chain(&self.root, envelopes.iter().map(Vec::as_slice), self.now().wall);
            if let Some(why) = &followed.refused {
                self.refuse("trust root", why);
                self.tell(None, None, why, by);
            }
            match (followed.root, followed.refused) {
                (Some(root), _) => {
                    return self.write_root(root, envelopes.swap_remove(followed.at), by.to_owned(), reply);
                }
                (None, Some(why)) => Err(why),
                (None, None) => Ok(Taken::TrustRoot(self.root.version)),
            }
        };
        let _ = reply.send(answer);
    }

    fn write_root(&mut self, root: TrustRoot, envelope: Vec<u8>, by: String, reply: Reply) {
        let inbox = self.inbox.clone();
        let written = self.writes.submit(move |store| {
            crash_point::pass("root-verified");
            let failed = store.set_trust_root(root.version, &envelope).err().map(|error| inline_chain(&error));
            crash_point::pass("root-written");
            let _ = inbox.blocking_send(Message::RootWritten { root: Box::new(root), by, failed, reply });
        });
        self.warn_if_busy(written);
    }

    pub(super) fn root_written(&mut self, root: TrustRoot, by: &str, failed: Option<String>, reply: Reply) {
        let answer = match failed {
            Some(error) => Err(Reason::new(Code::DiskFull, format!("the trust root cannot be written: {error}"))),
            // Another one came in between.
            None if root.version < self.root.version => Ok(Taken::TrustRoot(self.root.version)),
            None => {
                let text = format!("trust root version {} takes the place of {}", root.version, self.root.version);
                self.pull_context = Arc::new(PullContext {
                    keys: trust::role_spki(&root, RoleName::Image),
                    threshold: image_threshold(&root),
                    rules: image_policy::rules(&root),
                    ..PullContext::clone(&self.pull_context)
                });
                self.root = root;
                self.concerns.factory = None;
                self.fleet.trusts(self.root.version);
                self.tell(None, None, &Reason::new(Code::Verified, text), by);
                crash_point::pass("root-in-force");
                Ok(Taken::TrustRoot(self.root.version))
            }
        };
        if let Err(why) = &answer {
            self.tell(None, None, why, by);
        }
        let _ = reply.send(answer);
    }
}

pub fn image_threshold(root: &TrustRoot) -> usize {
    root.roles.get(&RoleName::Image).map_or(1, |role| role.threshold as usize)
}

/// The root to begin with: the stored one, or the factory's when that follows from it (a newer firmware). A factory's that
/// does not follow is said and left: who can change a file must not be able to change whom the device trusts.
pub fn first(factory: &Path, store: &Store, now: Timestamp) -> anyhow::Result<(TrustRoot, Option<Reason>)> {
    let stored = store.trust_root()?.and_then(|bytes| trust::factory(&bytes).ok());
    let read = std::fs::read(factory);
    let (root, bytes) = match (stored, read) {
        (None, Ok(bytes)) => match trust::factory(&bytes) {
            Ok(root) => (root, bytes),
            Err(why) => return Ok((TrustRoot::none(), Some(unusable(factory, why)))),
        },
        (Some(stored), Ok(bytes)) => {
            let shipped = match trust::factory(&bytes) {
                Ok(shipped) => shipped,
                // The stored one is in force; but a newer firmware's was meant to take its place, or the file is broken.
                Err(why) => return Ok((stored, Some(unusable(factory, why)))),
            };
            if shipped.version <= stored.version {
                return Ok((stored, None));
            }
            match trust::rotate(&stored, &bytes, now) {
                Ok(root) => (root, bytes),
                Err(why) => return Ok((stored, Some(unusable(factory, why)))),
            }
        }
        (Some(stored), Err(_)) => return Ok((stored, None)),
        // Without a root nothing is believed; the device still runs and can be asked why.
        (None, Err(error)) => {
            let text = format!("no trust root: {}: {error}", factory.display());
            let why = Reason::new(Code::UnknownSigner, text).next("`edgectl trust init` makes one");
            return Ok((TrustRoot::none(), Some(why)));
        }
    };
    match store.set_trust_root(root.version, &bytes) {
        Ok(()) => Ok((root, None)),
        // The newer root is lost and the factory's may not come back: believe nobody, but do run.
        Err(error @ StoreError::TrustRollback { .. }) => {
            let text = format!("{}: {error}", factory.display());
            let why = Reason::new(Code::TrustRollback, text).next("give the device its newest trust root");
            Ok((TrustRoot::none(), Some(why)))
        }
        Err(error) => Err(error.into()),
    }
}

fn unusable(factory: &Path, why: Reason) -> Reason {
    Reason { text: format!("{}: {}", factory.display(), why.text), ..why }
}
