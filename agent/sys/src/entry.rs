//! The beginning of a program that lives for milliseconds. What Rust's runtime does before `main`, it does for programs that
//! stay: it looks in /proc/self/maps where its stack ends, and makes another one on which to tell of an overflow. Here
//! is the rest of it: the standard streams are open, SIGPIPE is an error and no end, a panic is an exit code.

use std::ffi::{CStr, OsStr, OsString, c_char, c_int};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// What a program of Rust's leaves with after a panic.
const PANICKED: u8 = 101;

/// Makes `$run`, which takes the words behind the program's name and gives an exit code, the program's beginning. For a
/// program with `#![no_main]`.
#[macro_export]
macro_rules! entry {
    ($run:expr) => {
        /// The name is the C library's, which calls it once.
        ///
        /// # Safety
        /// With the words that execve(2) was given.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn main(
            count: ::core::ffi::c_int,
            words: *const *const ::core::ffi::c_char,
        ) -> ::core::ffi::c_int {
            // SAFETY: both come from the C library, as they are.
            unsafe { $crate::entry::run(count, words, $run) }
        }
    };
}

/// What [`entry!`] stands for.
///
/// # Safety
/// `words` are `count` strings of C that live as long as the process does: what `main` is called with.
pub unsafe fn run(count: c_int, words: *const *const c_char, run: impl FnOnce(Vec<OsString>) -> u8) -> c_int {
    if open_streams().is_err() {
        return PANICKED.into();
    }
    // SAFETY: SIG_IGN is no function of ours.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    let word = |place: usize| {
        // SAFETY: the caller says that there are so many.
        let word = unsafe { words.add(place) };
        // SAFETY: as above; the C library never changes them.
        let word = unsafe { *word };
        // SAFETY: the caller says that each is a string of C.
        let word = unsafe { CStr::from_ptr(word) };
        OsStr::from_bytes(word.to_bytes()).to_owned()
    };
    let words = (1..usize::try_from(count).unwrap_or(0)).map(word).collect();
    let code = catch_unwind(AssertUnwindSafe(|| run(words))).unwrap_or(PANICKED);
    // Whoever does not take it learns it by the code, or has gone.
    let _ = std::io::stdout().flush();
    code.into()
}

/// A closed stream would be the first file that is opened, and get what is said there.
fn open_streams() -> Result<(), Errno> {
    for number in 0..3 {
        // SAFETY: only asked about; one that is not open is what is looked for.
        let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
        if flags < 0 {
            // The lowest that is free is this one. It stays open for the life of the process.
            let null = rustix::fs::open("/dev/null", OFlags::RDWR, Mode::empty())?;
            std::mem::forget(null);
        }
    }
    Ok(())
}
