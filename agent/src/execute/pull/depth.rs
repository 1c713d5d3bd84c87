//! How many layers an image may have here. An image that cannot be mounted is never fetched.
//!
//! mount(2) takes one page of options, which has room for about forty names. Where overlayfs takes `lowerdir+` (fsconfig(2),
//! Documentation/filesystems/overlayfs.rst) every layer is an option of its own. The kernel is asked, not its version.

use std::path::Path;

/// The names of the lower directories in one page of options, some of it for the other options.
const LOWER_DIRS_MAX_BYTES: usize = 4096 - 512;
/// What Docker makes at most; overlayfs itself ends at 500.
const LAYERS_MAX: usize = 128;
/// fsconfig(2) takes strings of 256 bytes, the end included.
const OPTION_MAX_BYTES: usize = 255;

/// `name_bytes`: of the name of one layer, all have the same length.
pub fn layers_max(name_bytes: usize, takes_one_by_one: bool) -> usize {
    let in_one_page = LOWER_DIRS_MAX_BYTES / (name_bytes + 1);
    if takes_one_by_one && name_bytes <= OPTION_MAX_BYTES { LAYERS_MAX.max(in_one_page) } else { in_one_page }
}

/// Tries it with two directories that are there, on a mount that nobody sees and that ends here.
pub fn takes_one_by_one(first: &Path, second: &Path) -> bool {
    let (Some(first), Some(second)) = (first.to_str(), second.to_str()) else { return false };
    let options = [("lowerdir+", Some(first)), ("lowerdir+", Some(second))];
    edged_sys::mount::new_filesystem_of("overlay", "overlay", options, 0).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_page_is_the_end_where_the_kernel_takes_no_more() {
        assert_eq!(layers_max(88, false), 40);
        assert_eq!(layers_max(88, true), 128);
        assert_eq!(layers_max(300, true), 11, "a name too long for an option of its own");
        assert_eq!(layers_max(10, true), 325);
    }

    #[test]
    fn what_is_not_there_is_not_taken() {
        assert!(!takes_one_by_one(Path::new("/nowhere/a"), Path::new("/nowhere/b")));
    }
}
