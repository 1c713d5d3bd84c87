//! Files whose content the kernel holds against a tree of hashes whenever it reads them from the disk, and that nobody can
//! write any more (Documentation/filesystems/fsverity.rst, linux/fsverity.h). This room knows the two calls and nothing of
//! who wants them.

use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;

/// `FS_VERITY_HASH_ALG_SHA256`.
const SHA256: u32 = 1;
const VERSION: u32 = 1;
pub const DIGEST_BYTES: usize = 32;

/// `struct fsverity_enable_arg`.
#[repr(C)]
pub struct EnableArgument {
    version: u32,
    hash_algorithm: u32,
    block_size: u32,
    salt_size: u32,
    salt_ptr: u64,
    sig_size: u32,
    reserved1: u32,
    sig_ptr: u64,
    reserved2: [u64; 11],
}

/// `struct fsverity_digest` with room for a SHA-256. Its number in the call is that of the head alone, which is 4 bytes.
#[repr(C)]
pub struct Measured {
    digest_algorithm: u16,
    digest_size: u16,
    digest: [u8; DIGEST_BYTES],
}

const MEASURED_HEAD_BYTES: usize = 4;

nix::ioctl_write_ptr!(fs_ioc_enable_verity, b'f', 133, EnableArgument);
nix::ioctl_readwrite_bad!(
    fs_ioc_measure_verity,
    nix::request_code_readwrite!(b'f', 134, MEASURED_HEAD_BYTES),
    Measured
);

/// Protects a file that is open for reading, here and nowhere else for writing. Hashes all of it and waits until it is
/// written back (not flushed). `EXIST`: it is protected already. `NOTTY`, `OPNOTSUPP`: this file system or this kernel cannot.
pub fn enable(file: impl AsFd, block_bytes: u32) -> Result<(), Errno> {
    let argument = EnableArgument {
        version: VERSION,
        hash_algorithm: SHA256,
        block_size: block_bytes,
        salt_size: 0,
        salt_ptr: 0,
        sig_size: 0,
        reserved1: 0,
        sig_ptr: 0,
        reserved2: [0; 11],
    };
    // SAFETY: the kernel reads one `fsverity_enable_arg`, which lives across the call; salt and signature have no bytes.
    let result = unsafe { fs_ioc_enable_verity(file.as_fd().as_raw_fd(), &raw const argument) };
    result.map(drop).map_err(|errno| Errno::from_raw_os_error(errno as i32))
}

/// What the kernel holds the file against; costs the same for a file of any size. `NODATA`: it is not protected, but could be.
pub fn measure(file: impl AsFd) -> Result<[u8; DIGEST_BYTES], Errno> {
    let mut measured = Measured { digest_algorithm: 0, digest_size: DIGEST_BYTES as u16, digest: [0; DIGEST_BYTES] };
    // SAFETY: the kernel writes the head and at most `digest_size` bytes behind it, which `measured` has and lives across
    // the call.
    let result = unsafe { fs_ioc_measure_verity(file.as_fd().as_raw_fd(), &raw mut measured) };
    result.map_err(|errno| Errno::from_raw_os_error(errno as i32))?;
    let is_sha256 = u32::from(measured.digest_algorithm) == SHA256 && usize::from(measured.digest_size) == DIGEST_BYTES;
    if is_sha256 { Ok(measured.digest) } else { Err(Errno::OVERFLOW) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structures_are_those_of_the_kernel() {
        assert_eq!(size_of::<EnableArgument>(), 128);
        assert_eq!(size_of::<Measured>(), MEASURED_HEAD_BYTES + DIGEST_BYTES);
    }

    /// On a kernel or a file system without it, the answer says so; on others, what is protected stays as it is.
    #[test]
    fn a_file_is_protected_or_the_kernel_says_that_it_cannot() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, vec![7; 100_000]).unwrap();
        let file = std::fs::File::open(&path).unwrap();
        match measure(&file) {
            Err(Errno::NODATA) => {
                enable(&file, 4096).unwrap();
                assert_eq!(enable(&file, 4096), Err(Errno::EXIST));
                assert_ne!(measure(&file).unwrap(), [0; DIGEST_BYTES]);
                std::fs::File::options().write(true).open(&path).unwrap_err();
            }
            Err(Errno::NOTTY | Errno::OPNOTSUPP) => {
                let refused = enable(&file, 4096).unwrap_err();
                assert!(matches!(refused, Errno::NOTTY | Errno::OPNOTSUPP), "{refused}");
            }
            other => panic!("{other:?}"),
        }
    }
}
