//! A workload as a manifest has it, with the digests by which the planner tells at every turn whether it is as it was.

use std::ops::{Deref, DerefMut};
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use crate::id::Digest;
use crate::manifest::{Resources, Workload};

/// Each digest is taken once: who changes the workload makes it forget them.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Spec {
    workload: Workload,
    #[serde(skip)]
    digest: OnceLock<Digest>,
    #[serde(skip)]
    without_limits: OnceLock<Digest>,
}

impl Spec {
    /// Tells whether two specifications are the same: a workload whose digest did not change is not touched.
    pub fn digest(&self) -> Digest {
        *self.digest.get_or_init(|| digest(&self.workload))
    }

    /// What is left when the walls are not looked at: two specifications that differ in nothing else are one to a process,
    /// whose walls can be moved while it runs.
    pub fn digest_without_limits(&self) -> Digest {
        *self.without_limits.get_or_init(|| {
            let resources = Resources { disk: self.workload.resources.disk, ..Resources::default() };
            digest(&Workload { resources, ..self.workload.clone() })
        })
    }
}

fn digest(workload: &Workload) -> Digest {
    let bytes = serde_cbor::to_vec(workload).unwrap_or_else(|_| unreachable!("a manifest type always serialises"));
    Digest::of(&bytes)
}

impl From<Workload> for Spec {
    fn from(workload: Workload) -> Self {
        Self { workload, digest: OnceLock::new(), without_limits: OnceLock::new() }
    }
}

impl Deref for Spec {
    type Target = Workload;

    fn deref(&self) -> &Workload {
        &self.workload
    }
}

impl DerefMut for Spec {
    fn deref_mut(&mut self) -> &mut Workload {
        (self.digest, self.without_limits) = (OnceLock::new(), OnceLock::new());
        &mut self.workload
    }
}

impl PartialEq for Spec {
    fn eq(&self, other: &Self) -> bool {
        self.workload == other.workload
    }
}

impl Eq for Spec {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_changed_has_other_digests() {
        let was = Spec::from(Workload::of_image("r.example/web:1"));
        let (digest, without_limits) = (was.digest(), was.digest_without_limits());
        let mut is = was.clone();
        is.resources.pids += 1;
        assert_ne!(is.digest(), digest);
        assert_eq!(is.digest_without_limits(), without_limits);
        is.args.push("-v".to_owned());
        assert_ne!(is.digest_without_limits(), without_limits);
        assert_eq!((was.digest(), was.digest_without_limits()), (digest, without_limits));
    }

    #[test]
    fn it_is_written_and_read_as_the_workload_alone() {
        let spec = Spec::from(Workload::of_image("r.example/web:1"));
        let text = serde_json::to_string(&spec).unwrap();
        assert_eq!(text, serde_json::to_string(&*spec).unwrap());
        assert_eq!(serde_json::from_str::<Spec>(&text).unwrap(), spec);
    }
}
