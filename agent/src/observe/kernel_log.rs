//! What the kernel says of files that fs-verity guards (/dev/kmsg, Documentation/ABI/testing/dev-kmsg): whoever reads a
//! damaged block gets an error, and may keep it to himself.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The longest record that there is.
const RECORD_MAX_BYTES: usize = 8 << 10;

/// Calls `tell` for each such record from now on. Ends only when the log cannot be read, as where others may not read it.
pub async fn follow(mut tell: impl FnMut(String)) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = rustix::fs::OFlags::NONBLOCK.bits();
    let mut log = File::options().read(true).custom_flags(i32::try_from(flags).unwrap_or(0)).open("/dev/kmsg")?;
    log.seek(SeekFrom::End(0))?;
    #[expect(deprecated, reason = "its successor is unsafe to call; a File owns its descriptor as that one asks")]
    let mut log = AsyncFd::with_interest(log, Interest::READABLE)?;
    let mut record = vec![0; RECORD_MAX_BYTES];
    loop {
        let mut ready = log.readable_mut().await?;
        match ready.try_io(|log| log.get_mut().read(&mut record)) {
            Ok(Ok(count)) => {
                if let Some(text) = damage(&record[..count]) {
                    tell(text);
                }
            }
            // It was overwritten before it was read; the next is there.
            Ok(Err(error)) if error.kind() == io::ErrorKind::BrokenPipe => {}
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
}

/// `3,1234,5678,-;fs-verity (vda, inode 42): FILE CORRUPTED! pos=0, level=-1, …` (fs/verity/verify.c).
fn damage(record: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(record);
    let text = text.split_once(';')?.1.lines().next()?;
    let file = text.strip_prefix("fs-verity (")?;
    file.contains("CORRUPTED").then(|| file.split_once(')').map(|(file, _)| file.to_owned()))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_damaged_file_is_told() {
        let record = b"3,742,9182736,-;fs-verity (vda, inode 131): FILE CORRUPTED! pos=8192, level=-1, want_hash=x\n";
        assert_eq!(damage(record).as_deref(), Some("vda, inode 131"));
        for other in ["3,1,2,-;fs-verity: something else", "6,1,2,-;EXT4-fs (vda): mounted, CORRUPTED", "", "x"] {
            assert_eq!(damage(other.as_bytes()), None, "{other}");
        }
    }
}
