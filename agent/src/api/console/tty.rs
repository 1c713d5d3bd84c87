//! A terminal as the agent uses it: raw, never its controlling one, never waited for without a bound. termios(3).

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::fcntl::OFlag;
use rustix::termios::{ControlModes, OptionalActions, tcgetattr, tcsetattr};
use tokio::io::unix::AsyncFd;
use tokio::time::{Duration, timeout};

/// A line that takes nothing for so long (flow control, a dead virtual port) is given up and opened again.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub struct Tty {
    file: AsyncFd<File>,
}

impl Tty {
    pub fn open(path: &Path) -> io::Result<Self> {
        // O_NONBLOCK: open(2) of a serial line would wait for its carrier. O_NOCTTY: its signals are not for us.
        let flags = OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags.bits()).open(path)?;
        let mut settings = tcgetattr(&file)?;
        settings.make_raw();
        settings.control_modes |= ControlModes::CLOCAL | ControlModes::CREAD;
        tcsetattr(&file, OptionalActions::Now, &settings)?;
        #[expect(deprecated, reason = "its successor is unsafe to call; a File owns its descriptor as that one asks")]
        let file = AsyncFd::new(file)?;
        Ok(Self { file })
    }

    /// Some bytes; none when the line was hung up. May be cancelled without loss.
    pub async fn read(&self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; 512];
        loop {
            let mut ready = self.file.readable().await?;
            match ready.try_io(|file| file.get_ref().read(&mut bytes)) {
                Ok(count) => {
                    bytes.truncate(count?);
                    return Ok(bytes);
                }
                Err(_would_block) => {}
            }
        }
    }

    pub async fn write(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut ready = timeout(WRITE_TIMEOUT, self.file.writable()).await??;
            match ready.try_io(|file| file.get_ref().write(bytes)) {
                Ok(count) => bytes = &bytes[count?..],
                Err(_would_block) => {}
            }
        }
        Ok(())
    }

    /// Text with the line ends of a raw terminal.
    pub async fn print(&self, text: &str) -> io::Result<()> {
        self.write(text.replace('\n', "\r\n").as_bytes()).await
    }
}
