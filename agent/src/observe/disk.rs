//! How much room the data disk has (statvfs(3)).

use std::path::Path;

use edged_model::quantity::Bytes;
use edged_model::report::DiskReport;
use nix::sys::statvfs::statvfs;

#[allow(clippy::useless_conversion, reason = "these have 32 bits on armv7")]
/// Total and free bytes of the file system that holds `path`. Free is what an ordinary writer may take.
pub fn space(path: &Path) -> Result<DiskReport, nix::Error> {
    let stat = statvfs(path)?;
    let fragment = u64::from(stat.fragment_size());
    Ok(DiskReport {
        total: Bytes(fragment.saturating_mul(u64::from(stat.blocks()))),
        free: Bytes(fragment.saturating_mul(u64::from(stat.blocks_available()))),
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn free_is_part_of_total() {
        let space = super::space(std::path::Path::new("/")).unwrap();
        assert!(space.total.0 > 0 && space.free <= space.total);
    }
}
