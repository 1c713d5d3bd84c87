//! Which failed starts may be the fault of the image's layers: then they are looked at (`reconcile::suspect`), which costs a
//! reading of all of them and holds up everybody who stands on one. A volume, a device or a group of the kernel's that answers
//! in the same words is not theirs.

use std::error::Error;
use std::path::Path;

use edged_model::id::WorkloadName;
use edged_model::manifest::Workload;
use edged_model::reason::{Code, Reason};
use edged_sys::child::Stage;
use rustix::io::Errno;

use crate::runtime::mapped::MappedError;
use crate::store::inline_chain;

/// Steps that look into the image and at nothing else.
const IN_THE_IMAGE: [Stage; 8] = [
    Stage::Root,
    Stage::Links,
    Stage::Pivot,
    Stage::MaskedPaths,
    Stage::ReadonlyPaths,
    Stage::WorkingDirectory,
    Stage::Init,
    Stage::Exec,
];

/// A start that failed while its layers were read.
pub(super) fn failed(name: &WorkloadName, error: &(dyn Error + 'static)) -> Reason {
    let code = if is_of_the_disk(error) { Code::LayerDamaged } else { Code::StartFailed };
    Reason::new(code, format!("{name} could not be started: {}", inline_chain(error)))
}

/// Of errno(3): what a disk, or fs-verity, answers instead of the bytes.
fn is_bad_block(errno: i32) -> bool {
    matches!(Errno::from_raw_os_error(errno), Errno::IO | Errno::BADMSG | Errno::UCLEAN)
}

/// A kernel without fs-verity does not open a file that another one has protected.
fn is_not_opened(errno: i32) -> bool {
    Errno::from_raw_os_error(errno) == Errno::OPNOTSUPP
}

/// Whether the disk did not give what it has, in any of the causes.
pub(super) fn is_of_the_disk(error: &(dyn Error + 'static)) -> bool {
    let mut causes = std::iter::successors(Some(error), |error: &&(dyn Error + 'static)| (*error).source());
    causes.any(|cause| {
        let of_io = cause.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error);
        let errno = of_io.or_else(|| cause.downcast_ref::<Errno>().map(|errno| errno.raw_os_error()));
        errno.is_some_and(|errno| is_bad_block(errno) || is_not_opened(errno))
    })
}

/// Whether a mount could not be made because of a layer. That one cannot be idmapped is another matter.
pub(super) fn is_of_a_layer(error: &MappedError, layers: &Path) -> bool {
    match error {
        MappedError::Path { path, source } => {
            Path::new(path).starts_with(layers) && is_bad_block(source.raw_os_error())
        }
        MappedError::Idmap { what, source, .. } => {
            Path::new(what).starts_with(layers) && is_bad_block(source.raw_os_error())
        }
        MappedError::Overlay { source, .. } => is_bad_block(source.raw_os_error()),
        MappedError::DeviceElsewhere { .. } | MappedError::Thread(_) => false,
    }
}

/// Whether the step at which a launch failed, as the keeper tells it, may have found a damaged layer.
pub fn is_of_the_image(step: &str, errno: i32, workload: &Workload) -> bool {
    let is = |stage: &Stage| {
        let rest = step.strip_prefix(stage.text());
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(" ("))
    };
    if is(&Stage::Exec) && is_not_opened(errno) {
        return true;
    }
    // Where something is mounted is a place in the image; what the manifest has mounted may be what is broken.
    let mounts_its_own = || workload.mounts.iter().any(|mount| step.ends_with(&format!(" at {})", mount.target)));
    is_bad_block(errno) && (IN_THE_IMAGE.iter().any(is) || is(&Stage::Mounts) && !mounts_its_own())
}

#[cfg(test)]
mod tests {
    use super::*;
    use edged_model::manifest::{Mount, MountSource};

    #[test]
    fn a_volume_a_device_or_a_group_that_fails_is_no_damaged_layer() {
        let mut workload = Workload::of_image("r.example/i:1");
        let mount = |target: &str| Mount {
            source: MountSource::Bind("/srv".to_owned()),
            target: target.to_owned(),
            read_only: false,
        };
        workload.mounts = vec![mount("/data"), mount("/srv/more")];
        let (io, not_opened) = (libc_number(Errno::IO), libc_number(Errno::OPNOTSUPP));
        let cases = [
            ("exec (/bin/app)", io, true),
            ("exec (/bin/app)", not_opened, true),
            ("exec (/bin/app)", libc_number(Errno::NOENT), false),
            ("root file system (/var/lib/edged/workloads/a/root)", libc_number(Errno::UCLEAN), true),
            ("root file system", not_opened, false),
            ("working directory (/srv)", libc_number(Errno::BADMSG), true),
            // The place for /proc is a directory of the image.
            ("mounts (proc at /proc)", io, true),
            ("mounts (proc at /proc)", not_opened, false),
            ("mounts (/var/lib/edged/volumes/data at /data)", io, false),
            ("mounts (/dev/sda1 at /srv/more)", io, false),
            ("device nodes (/dev/ttyUSB0)", io, false),
            ("entering the cgroup", not_opened, false),
            ("executor", io, false),
        ];
        for (step, errno, expected) in cases {
            assert_eq!(is_of_the_image(step, errno, &workload), expected, "{step}: {errno}");
        }
    }

    fn libc_number(errno: Errno) -> i32 {
        errno.raw_os_error()
    }

    #[test]
    fn of_mounts_only_those_of_layers_count() {
        let layers = Path::new("/var/lib/edged/layers");
        let of = |path: &str, source| MappedError::Path { path: path.to_owned(), source };
        assert!(is_of_a_layer(&of("/var/lib/edged/layers/abc", Errno::IO), layers));
        assert!(!is_of_a_layer(&of("/var/lib/edged/volumes/data", Errno::IO), layers));
        assert!(!is_of_a_layer(&of("/var/lib/edged/layers/abc", Errno::NOENT), layers));
        let idmap = |what: &str, source| MappedError::Idmap { what: what.to_owned(), needs: "", source };
        assert!(!is_of_a_layer(&idmap("/var/lib/edged/layers/abc", Errno::OPNOTSUPP), layers), "it cannot be idmapped");
        assert!(is_of_a_layer(&idmap("/var/lib/edged/layers/abc", Errno::IO), layers));
    }
}
