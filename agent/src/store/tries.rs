//! How often an agent died while it opened the store: a database may be damaged such that sled takes all memory, overflows
//! the stack or aborts, and whoever opens it is gone. The count lies beside the database, in a file of its own, and goes
//! with every opening that comes to an end, good or bad. Each program has a count of its own: a newer edged that dies there
//! costs nobody the store, because the former one comes back and opens it (docs/reliability.md).

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// After so many deaths in a row the database is not opened again but set aside. A few, because an agent may be killed for
/// other reasons at that moment.
pub const DEATHS_MAX: u32 = 3;

#[derive(Debug)]
pub struct Tries {
    file: PathBuf,
    program: String,
    pub deaths: u32,
    is_given_up: bool,
}

impl Tries {
    /// Not synced: it is against programs that die, and the kernel outlives them. One that cannot be written (a full disk)
    /// is missing, no more.
    pub fn begin(state: &Path) -> Self {
        let file = state.with_extension("opening");
        let (text, program) = (fs::read_to_string(&file).unwrap_or_default(), own_program());
        let counted = text.trim().split_once(' ').filter(|(_, by)| *by == program);
        let deaths = counted.and_then(|(deaths, _)| deaths.parse().ok()).unwrap_or(0);
        let tries = Self { file, program, deaths, is_given_up: false };
        tries.write(deaths.saturating_add(1));
        tries
    }

    /// The next one that opens it shall not try at all.
    pub fn give_up(&mut self) {
        self.is_given_up = true;
        self.write(DEATHS_MAX);
    }

    fn write(&self, deaths: u32) {
        // Beside a directory that is made by the opening itself.
        let _ = self.file.parent().map(fs::create_dir_all);
        let _ = fs::write(&self.file, format!("{deaths} {}", self.program));
    }
}

/// The file that runs: another file is another program.
fn own_program() -> String {
    fs::metadata("/proc/self/exe")
        .map_or_else(|_| "unknown".to_owned(), |file| format!("{}:{}", file.dev(), file.ino()))
}

impl Drop for Tries {
    fn drop(&mut self) {
        if !self.is_given_up {
            let _ = fs::remove_file(&self.file);
        }
    }
}
