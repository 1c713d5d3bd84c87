//! What workloads print. The agent reads each pipe in turns, cuts what came into lines and hands those that are kept to one
//! writer thread, which appends them to two segments per workload (`current`, `previous`); when `current` has half the
//! allowed space it becomes `previous`. A workload that prints faster than `log.rate` allows, or than the disk takes, loses
//! lines, with a count: it never blocks, and neither does anyone else.
//!
//! One line on disk: `<unix ms> <o|e> <text>\n`. Bytes that are not UTF-8 and control characters are replaced when
//! read, so that a log cannot drive the reader's terminal.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use edged_model::api::{LogLine, Stream};
use edged_model::id::WorkloadName;
use edged_model::quantity::Bytes;
use tokio::net::unix::pipe;
use tokio::sync::broadcast;

use super::log_budget::LogBudget;
use crate::crash_point;

/// A line longer than this is cut into several.
const LINE_MAX_BYTES: usize = 8 * 1024;

/// What is read of a pipe in one turn.
const TURN_BYTES: usize = 16 * 1024;

/// What may wait for the writer, of whomever: an instant of a full disk.
const QUEUE_BYTES: usize = 256 * 1024;

/// What of one stream may wait beyond that: whoever prints the one line that says why it ends has room for it, however its
/// neighbours flood.
const OWN_BYTES: usize = TURN_BYTES;

/// Lines that wait take this beside their text, those of a turn together.
const BATCH_OVERHEAD_BYTES: usize = 128;

/// Of the writer.
const NICE: i32 = 19;

/// Lines a follower may lag behind before it is told that some are missing.
const FOLLOW_LINES: usize = 256;

/// Lines lost, by who printed them. Asked for and written only when a line is lost, or somebody looks.
#[derive(Clone, Default)]
struct Dropped(Arc<Mutex<BTreeMap<WorkloadName, u64>>>);

impl Dropped {
    fn more(&self, workload: &WorkloadName, lines: u64) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match counts.get_mut(workload) {
            Some(count) => *count += lines,
            None => drop(counts.insert(workload.clone(), lines)),
        }
    }
}

/// The time of a line, and the time that passes for its budget.
#[derive(Debug, Clone, Copy)]
pub struct Clocks {
    pub unix_ms: fn() -> i64,
    pub boot_ms: fn() -> u64,
}

/// One stream of one workload, as far as it was read.
struct Source {
    to: Destination,
    lines: LineCutter,
    budget: LogBudget,
    /// Lost since the last line that was kept.
    lost: u64,
}

/// Where its lines go.
struct Destination {
    workload: WorkloadName,
    stream: Stream,
    /// Bytes of it that wait for the writer.
    waiting: Arc<AtomicUsize>,
}

/// The lines of one turn that are kept, as they are written: one message and one write for all of them.
struct Batch {
    at_unix_ms: i64,
    head: String,
    text: String,
}

impl Batch {
    fn new(stream: Stream, at_unix_ms: i64) -> Self {
        let letter = match stream {
            Stream::Stdout => 'o',
            Stream::Stderr => 'e',
        };
        Self { at_unix_ms, head: format!("{at_unix_ms} {letter} "), text: String::new() }
    }

    fn bytes(&self) -> usize {
        BATCH_OVERHEAD_BYTES + self.text.len()
    }

    fn bytes_with(&self, line: &str) -> usize {
        self.bytes() + self.head.len() + line.len() + 1
    }

    fn add(&mut self, line: &str) {
        self.text.push_str(&self.head);
        self.text.push_str(line);
        self.text.push('\n');
    }
}

/// What lines take of the queue, until they are written.
struct Room {
    bytes: usize,
    all: Arc<AtomicUsize>,
    own: Arc<AtomicUsize>,
}

impl Drop for Room {
    fn drop(&mut self) {
        self.all.fetch_sub(self.bytes, Ordering::Relaxed);
        self.own.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// The door to all logs. Cheap to clone.
#[derive(Clone)]
pub struct Logs {
    /// Of each stream.
    bytes_per_second: u64,
    /// Without a bound of its own: [`Room`] is asked for first.
    queue: Sender<Work>,
    /// Bytes in the queue.
    waiting: Arc<AtomicUsize>,
    /// What was read in this turn. One for all: a stream that is silent holds none, and what comes is not zeroed before.
    turn: Arc<Mutex<Vec<u8>>>,
    /// Nothing is read any more: what is in the pipes is for the next agent.
    held: Arc<AtomicBool>,
    followers: broadcast::Sender<(WorkloadName, LogLine)>,
    dropped: Dropped,
    dir: PathBuf,
}

impl Logs {
    /// Starts the writer thread. `max` is the space of one workload, `rate` what a second of one of its streams may take.
    pub fn start(dir: PathBuf, max: Bytes, rate: Bytes) -> io::Result<Self> {
        std::fs::create_dir_all(&dir)?;
        let (logs, lines) = Self::unwritten(dir.clone(), rate);
        let lost = logs.dropped.clone();
        let writer = Writer { dir, lost, max_segment_bytes: (max.0 / 2).max(4096), open: HashMap::new() };
        std::thread::Builder::new().name("logs".to_owned()).spawn(move || writer.run(&lines))?;
        Ok(logs)
    }

    fn unwritten(dir: PathBuf, rate: Bytes) -> (Self, Receiver<Work>) {
        let (queue, lines) = channel();
        let (followers, _) = broadcast::channel(FOLLOW_LINES);
        let turn = Arc::new(Mutex::new(Vec::with_capacity(TURN_BYTES)));
        let (waiting, held, dropped) = (Arc::default(), Arc::default(), Dropped::default());
        (Self { bytes_per_second: rate.0, queue, waiting, turn, held, followers, dropped, dir }, lines)
    }

    fn source(&self, workload: &WorkloadName, stream: Stream, clocks: Clocks) -> Source {
        let to = Destination { workload: workload.clone(), stream, waiting: Arc::default() };
        let budget = LogBudget::new(self.bytes_per_second, (clocks.boot_ms)());
        Source { to, lines: LineCutter::default(), budget, lost: 0 }
    }

    /// Reads `fd` to its end on the current runtime.
    pub fn pump(&self, workload: &WorkloadName, stream: Stream, fd: OwnedFd, clocks: Clocks) -> io::Result<()> {
        let pipe = pipe::Receiver::from_owned_fd(fd)?;
        let logs = self.clone();
        let mut source = self.source(workload, stream, clocks);
        tokio::spawn(async move {
            // A read error on a pipe cannot be mended: it ends the stream like its end does.
            while pipe.readable().await.is_ok() {
                if logs.held.load(Ordering::Relaxed) {
                    return;
                }
                match logs.read(&pipe, &mut source, clocks) {
                    Ok(1..) => {
                        // A pipe that is never empty: an operator and every probe wait for one such turn, not for the flood.
                        tokio::task::yield_now().await;
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Ok(0) | Err(_) => break,
                }
            }
            logs.end_of(&mut source, clocks);
        });
        Ok(())
    }

    fn read(&self, pipe: &pipe::Receiver, source: &mut Source, clocks: Clocks) -> io::Result<usize> {
        let mut bytes = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        bytes.clear();
        let count = pipe.try_read_buf(&mut *bytes)?;
        self.take(source, &bytes, clocks);
        Ok(count)
    }

    fn take(&self, source: &mut Source, bytes: &[u8], clocks: Clocks) {
        let is_kept = self.has_room(&source.to, 0) && source.budget.spend(bytes.len(), (clocks.boot_ms)());
        if is_kept {
            self.say_what_is_lost(source, clocks);
        } else if self.followers.receiver_count() == 0 {
            // In a flood most lines are lost: that costs no more than to count their ends.
            return match source.lines.skip(bytes) {
                0 => {}
                lost => self.lose(source, lost),
            };
        }
        self.hand_on(source, clocks, is_kept, |lines, each| lines.feed(bytes, each));
    }

    fn end_of(&self, source: &mut Source, clocks: Clocks) {
        self.say_what_is_lost(source, clocks);
        self.hand_on(source, clocks, true, |lines, each| lines.finish(each));
    }

    /// What is cut off, together.
    fn hand_on(
        &self,
        source: &mut Source,
        clocks: Clocks,
        is_kept: bool,
        cut: impl FnOnce(&mut LineCutter, &mut dyn FnMut(&[u8])),
    ) {
        let Source { to, lines, .. } = source;
        let (mut batch, mut lost) = (Batch::new(to.stream, (clocks.unix_ms)()), 0);
        cut(lines, &mut |text| lost += u64::from(!self.line(to, text, is_kept, &mut batch)));
        self.keep(to, batch);
        if lost > 0 {
            self.lose(source, lost);
        }
    }

    fn lose(&self, source: &mut Source, lines: u64) {
        source.lost += lines;
        self.dropped.more(&source.to.workload, lines);
    }

    /// Among the lines that were kept, at the place where others were.
    fn say_what_is_lost(&self, source: &mut Source, clocks: Clocks) {
        let lost = std::mem::take(&mut source.lost);
        if lost > 0 {
            let text =
                format!("[edged: {lost} lines are not here: they came faster than log.rate, or than the disk takes]");
            let mut batch = Batch::new(source.to.stream, (clocks.unix_ms)());
            self.line(&source.to, text.as_bytes(), true, &mut batch);
            self.keep(&source.to, batch);
        }
    }

    /// Only the loop that reads the pipes adds to what waits: what has room now has it still when it is sent.
    fn has_room(&self, to: &Destination, bytes: usize) -> bool {
        self.waiting.load(Ordering::Relaxed) + bytes < QUEUE_BYTES
            || to.waiting.load(Ordering::Relaxed) + bytes < OWN_BYTES
    }

    /// Shows it to those who follow, and puts it to those that are kept, if it is to be and there is room. Whether it is.
    fn line(&self, to: &Destination, text: &[u8], is_kept: bool, batch: &mut Batch) -> bool {
        let is_followed = self.followers.receiver_count() > 0;
        if !is_followed && !is_kept {
            return false;
        }
        let text = printable(text);
        let is_kept = is_kept && self.has_room(to, batch.bytes_with(&text));
        if is_kept {
            batch.add(&text);
        }
        if is_followed {
            let line = LogLine { at_unix_ms: batch.at_unix_ms, stream: to.stream, text: text.into_owned() };
            // Nobody may be there any more.
            let _ = self.followers.send((to.workload.clone(), line));
        }
        is_kept
    }

    fn keep(&self, to: &Destination, batch: Batch) {
        if batch.text.is_empty() {
            return;
        }
        let bytes = batch.bytes();
        let (all, own) = (Arc::clone(&self.waiting), Arc::clone(&to.waiting));
        all.fetch_add(bytes, Ordering::Relaxed);
        own.fetch_add(bytes, Ordering::Relaxed);
        // Without a writer this agent ends.
        let _ = self.queue.send(Work::Lines(to.workload.clone(), batch.text, Room { bytes, all, own }));
    }

    /// Reads no more, and comes back when all that was read is written: this agent ends. Blocking.
    pub fn end(&self) {
        self.held.store(true, Ordering::Relaxed);
        let (done, written) = sync_channel(1);
        if self.queue.send(Work::Tell(done)).is_ok() {
            // It ends either way.
            let _ = written.recv();
        }
    }

    /// Lines lost because workloads printed faster than `log.rate`, or than the disk takes, or it took none.
    pub fn dropped(&self) -> u64 {
        self.dropped.0.lock().unwrap_or_else(PoisonError::into_inner).values().sum()
    }

    /// Those of one workload.
    pub fn dropped_of(&self, workload: &WorkloadName) -> u64 {
        self.dropped.0.lock().unwrap_or_else(PoisonError::into_inner).get(workload).copied().unwrap_or(0)
    }

    /// From now on, everything that any workload prints.
    pub fn follow(&self) -> broadcast::Receiver<(WorkloadName, LogLine)> {
        self.followers.subscribe()
    }

    /// The last `count` lines on disk, oldest first. Blocking.
    pub fn tail(&self, workload: &WorkloadName, count: usize) -> io::Result<Vec<LogLine>> {
        let dir = self.dir.join(workload.as_str());
        let mut lines = std::collections::VecDeque::with_capacity(count.min(4096));
        for segment in [PREVIOUS, CURRENT] {
            let file = match File::open(dir.join(segment)) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            for line in BufReader::new(file).split(b'\n') {
                if let Some(line) = parse(&line?) {
                    if lines.len() == count {
                        lines.pop_front();
                    }
                    lines.push_back(line);
                }
            }
        }
        Ok(lines.into())
    }
}

const CURRENT: &str = "current";
const PREVIOUS: &str = "previous";

fn ends(lines: &[u8]) -> u64 {
    memchr::memchr_iter(b'\n', lines).count() as u64
}

/// Cuts a byte stream into lines of bounded length.
#[derive(Default)]
struct LineCutter {
    rest: Vec<u8>,
    /// What comes up to the next end of a line belongs to one that was lost.
    is_lost: bool,
}

impl LineCutter {
    /// Cuts nothing: how many more lines are lost. What of them came before, or comes later, is lost with them.
    fn skip(&mut self, bytes: &[u8]) -> u64 {
        let Some(last) = bytes.last() else { return 0 };
        let has_open_end = *last != b'\n';
        let lost = ends(bytes) + u64::from(has_open_end) - u64::from(self.is_lost);
        (self.rest, self.is_lost) = (Vec::new(), has_open_end);
        lost
    }

    fn feed(&mut self, mut bytes: &[u8], mut each: impl FnMut(&[u8])) {
        if self.is_lost {
            let Some(end) = bytes.iter().position(|byte| *byte == b'\n') else { return };
            self.is_lost = false;
            bytes = &bytes[end + 1..];
        }
        for piece in bytes.split_inclusive(|b| *b == b'\n') {
            self.rest.extend_from_slice(piece);
            if self.rest.last() == Some(&b'\n') {
                self.rest.pop();
                self.rest.chunks(LINE_MAX_BYTES).for_each(&mut each);
                if self.rest.is_empty() {
                    each(b"");
                }
                self.rest.clear();
            } else {
                while self.rest.len() >= LINE_MAX_BYTES {
                    each(&self.rest[..LINE_MAX_BYTES]);
                    self.rest.drain(..LINE_MAX_BYTES);
                }
            }
        }
    }

    fn finish(&mut self, mut each: impl FnMut(&[u8])) {
        if !self.rest.is_empty() {
            each(&self.rest);
            self.rest.clear();
        }
    }
}

/// Text that cannot drive a terminal: tabs stay, other control characters become `\u{fffd}`.
fn printable(bytes: &[u8]) -> Cow<'_, str> {
    let is_bad = |c: char| c.is_control() && c != '\t';
    let end = bytes.iter().rposition(|byte| *byte != b'\r').map_or(0, |last| last + 1);
    match String::from_utf8_lossy(&bytes[..end]) {
        text if text.contains(is_bad) => text.replace(is_bad, "\u{fffd}").into(),
        text => text,
    }
}

fn parse(line: &[u8]) -> Option<LogLine> {
    let text = std::str::from_utf8(line).ok()?;
    let (at, rest) = text.split_once(' ')?;
    let (stream, text) = rest.split_once(' ')?;
    let stream = match stream {
        "o" => Stream::Stdout,
        "e" => Stream::Stderr,
        _ => return None,
    };
    Some(LogLine { at_unix_ms: at.parse().ok()?, stream, text: text.to_owned() })
}

enum Work {
    /// Whole lines.
    Lines(WorkloadName, String, Room),
    /// All before it is written.
    Tell(SyncSender<()>),
}

struct Segment {
    file: File,
    bytes: u64,
}

struct Writer {
    dir: PathBuf,
    lost: Dropped,
    max_segment_bytes: u64,
    open: HashMap<WorkloadName, Segment>,
}

impl Writer {
    fn run(mut self, work: &Receiver<Work>) {
        // Behind the loop and whoever starts and stops: of a flood the disk gets what is left over. That of a thread alone
        // (setpriority(2), "C library/kernel differences"). Refused, it is as quick as the others.
        let _ = rustix::process::setpriority_process(None, NICE);
        while let Ok(work) = work.recv() {
            let (workload, lines, _room) = match work {
                Work::Lines(workload, lines, room) => (workload, lines, room),
                Work::Tell(done) => {
                    // Who asked may have given up waiting.
                    let _ = done.try_send(());
                    continue;
                }
            };
            let mut left = lines.as_bytes();
            while !left.is_empty() {
                match self.append(&workload, left) {
                    Ok(written) => left = &left[written..],
                    // A disk that is full or broken costs lines, never the supervisor: the next ones try afresh.
                    Err(_) => {
                        self.open.remove(&workload);
                        self.lost.more(&workload, ends(left));
                        break;
                    }
                }
            }
        }
    }

    /// As many of them as fill the segment; how many bytes those are.
    fn append(&mut self, workload: &WorkloadName, lines: &[u8]) -> io::Result<usize> {
        let dir = self.dir.join(workload.as_str());
        let segment = match self.open.get_mut(workload) {
            Some(segment) => segment,
            None => {
                let segment = open_segment(&dir)?;
                self.open.entry(workload.clone()).or_insert(segment)
            }
        };
        let room = usize::try_from(self.max_segment_bytes.saturating_sub(segment.bytes)).unwrap_or(usize::MAX);
        // The line that fills it is its last.
        let from = room.saturating_sub(1).min(lines.len());
        let count = memchr::memchr(b'\n', &lines[from..]).map_or(lines.len(), |end| from + end + 1);
        segment.file.write_all(&lines[..count])?;
        segment.bytes += count as u64;
        if segment.bytes >= self.max_segment_bytes {
            self.open.remove(workload);
            crash_point::pass("log-full");
            std::fs::rename(dir.join(CURRENT), dir.join(PREVIOUS))?;
            crash_point::pass("log-rotated");
        }
        Ok(count)
    }
}

fn open_segment(dir: &Path) -> io::Result<Segment> {
    std::fs::create_dir_all(dir)?;
    let file = OpenOptions::new().append(true).create(true).open(dir.join(CURRENT))?;
    let bytes = file.metadata()?.len();
    Ok(Segment { file, bytes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    const CLOCKS: Clocks = Clocks { unix_ms: || 7, boot_ms: || 7 };

    fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !done() {
            assert!(Instant::now() < deadline, "{what} did not happen in 10 s");
            std::thread::yield_now();
        }
    }

    #[test]
    fn lines_are_cut_wherever_the_pipe_was_cut() {
        let mut cutter = LineCutter::default();
        let mut seen = Vec::new();
        for piece in [&b"one\ntw"[..], b"o\n\nthr", b"ee"] {
            cutter.feed(piece, |line| seen.push(String::from_utf8_lossy(line).into_owned()));
        }
        cutter.finish(|line| seen.push(String::from_utf8_lossy(line).into_owned()));
        assert_eq!(seen, ["one", "two", "", "three"]);
    }

    #[test]
    fn what_is_skipped_is_counted_once() {
        let mut cutter = LineCutter::default();
        cutter.feed(b"beg", |_| unreachable!());
        assert_eq!(cutter.skip(b"un\ntwo\nthr"), 3, "one begun before, one whole, one begun");
        assert_eq!(cutter.skip(b"ee, not"), 0);
        assert_eq!(cutter.skip(b" counted again\nfour\nfi"), 2);
        let mut seen = Vec::new();
        cutter.feed(b"ve\nsix\nsev", |line| seen.push(String::from_utf8_lossy(line).into_owned()));
        assert_eq!(seen, ["six"], "the end of a lost line is none of its own");
        assert_eq!(cutter.skip(b"en\n"), 1);
        cutter.feed(b"eight\n", |line| seen.push(String::from_utf8_lossy(line).into_owned()));
        assert_eq!(seen, ["six", "eight"]);
    }

    #[test]
    fn a_line_without_end_stays_bounded() {
        let mut cutter = LineCutter::default();
        let mut longest = 0;
        for _ in 0..100 {
            cutter.feed(&[b'x'; 1000], |line| longest = longest.max(line.len()));
            assert!(cutter.rest.len() < LINE_MAX_BYTES);
        }
        assert_eq!(longest, LINE_MAX_BYTES);
    }

    #[test]
    fn escape_sequences_do_not_reach_the_reader() {
        assert_eq!(printable(b"a\x1b[2Jb\tc\r"), "a\u{fffd}[2Jb\tc");
    }

    /// A flood and somebody who asks, on one thread as in the agent: he is answered between two turns of the flood.
    #[test]
    fn who_asks_waits_for_one_turn_of_a_flood() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let logs = Logs::start(dir.path().to_owned(), Bytes(64 * 1024), Bytes(1 << 40)).unwrap();
        let web = WorkloadName::parse("web").unwrap();
        let (read, write) = rustix::pipe::pipe().unwrap();
        rustix::io::ioctl_fionbio(&read, true).unwrap();
        std::thread::spawn(move || {
            let flood = "a line of a flood\n".repeat(3_000);
            let mut pipe = File::from(write);
            while pipe.write_all(flood.as_bytes()).is_ok() {}
        });
        let (mut asks, answers) = std::os::unix::net::UnixStream::pair().unwrap();
        answers.set_nonblocking(true).unwrap();
        let flooded = logs.clone();
        let asker = std::thread::spawn(move || {
            wait_until("a loss of lines", || flooded.dropped() > 0);
            let ask = |_| {
                let begin = Instant::now();
                asks.write_all(&[1]).unwrap();
                io::Read::read_exact(&mut asks, &mut [0]).unwrap();
                begin.elapsed()
            };
            (0..200).map(ask).collect::<Vec<Duration>>()
        });
        runtime.block_on(async {
            logs.pump(&web, Stream::Stdout, read, CLOCKS).unwrap();
            let mut answers = tokio::net::UnixStream::from_std(answers).unwrap();
            let mut byte = [0];
            while tokio::io::AsyncReadExt::read_exact(&mut answers, &mut byte).await.is_ok() {
                tokio::io::AsyncWriteExt::write_all(&mut answers, &byte).await.unwrap();
            }
        });
        let mut waits = asker.join().unwrap();
        waits.sort_unstable();
        println!("half of them within {:?}, all but two within {:?}", waits[100], waits[197]);
        assert!(waits[197] < Duration::from_millis(500), "{waits:?}");
    }

    /// A disk that takes nothing, and eight who flood.
    #[test]
    fn a_flood_takes_no_room_from_who_prints_little_and_what_waits_is_bounded() {
        let (logs, written) = Logs::unwritten(PathBuf::from("/nowhere"), Bytes(1 << 40));
        let name = |name: &str| WorkloadName::parse(name).unwrap();
        let flood = b"a line of a flood\n".repeat(100);
        let mut floods = (0..8).map(|_| logs.source(&name("flood"), Stream::Stdout, CLOCKS)).collect::<Vec<_>>();
        for _ in 0..1000 {
            floods.iter_mut().for_each(|source| logs.take(source, &flood, CLOCKS));
        }
        assert!(logs.dropped_of(&name("flood")) > 700_000);
        let mut quiet = logs.source(&name("quiet"), Stream::Stderr, CLOCKS);
        logs.take(&mut quiet, b"the one line that says why\n", CLOCKS);
        assert_eq!(logs.dropped_of(&name("quiet")), 0);
        // One that begins to flood has what is its own, and no more.
        logs.take(&mut quiet, &b"x\n".repeat(8000), CLOCKS);
        assert!(logs.dropped_of(&name("quiet")) > 5000);
        let waiting = logs.waiting.load(Ordering::Relaxed);
        assert!((QUEUE_BYTES..QUEUE_BYTES + 9 * OWN_BYTES).contains(&waiting), "{waiting} bytes");
        let lines: Vec<Work> = written.try_iter().collect();
        let kept = lines.iter().filter(|work| matches!(work, Work::Lines(workload, ..) if *workload == name("quiet")));
        assert_eq!(kept.count(), 2, "of {}", lines.len());
        drop(lines);
        assert_eq!(logs.waiting.load(Ordering::Relaxed), 0);
        logs.take(&mut floods[0], &flood, CLOCKS);
        let said = written.try_iter().find_map(|work| match work {
            Work::Lines(_, lines, _) => Some(lines),
            Work::Tell(_) => None,
        });
        assert!(said.as_ref().is_some_and(|text| text.contains("lines are not here")), "{said:?}");
    }

    #[test]
    fn a_flood_is_kept_up_to_its_rate_and_what_is_missing_is_said_where_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let logs = Logs::start(dir.path().to_owned(), Bytes::mebi(1), Bytes(100)).unwrap();
        let web = WorkloadName::parse("web").unwrap();
        let mut source = logs.source(&web, Stream::Stdout, CLOCKS);
        // 1,600 bytes are saved up.
        (0..20).for_each(|n| logs.take(&mut source, format!("{n:099}\n").as_bytes(), CLOCKS));
        let later = Clocks { boot_ms: || 1007, ..CLOCKS };
        let mut follower = logs.follow();
        logs.take(&mut source, b"a line in time\n", later);
        logs.take(&mut source, &[b"x".repeat(200), b"\n".to_vec()].concat(), later);
        wait_until("the last line", || logs.tail(&web, 1).unwrap().iter().any(|line| line.text == "a line in time"));
        let kept = logs.tail(&web, 100).unwrap();
        assert_eq!(kept.len(), 18, "{kept:?}");
        assert!(kept[16].text.contains("4 lines are not here") && kept[16].text.contains("log.rate"), "{kept:?}");
        assert_eq!((logs.dropped_of(&web), logs.dropped()), (5, 5));
        // Who follows sees what is not kept too.
        assert!((0..3).map(|_| follower.try_recv().unwrap().1.text).any(|text| text.starts_with("xxx")));
    }

    /// More lines at once than two segments hold.
    #[test]
    fn lines_that_come_together_are_cut_where_a_segment_is_full() {
        let dir = tempfile::tempdir().unwrap();
        let logs = Logs::start(dir.path().to_owned(), Bytes(16 * 1024), Bytes(1 << 40)).unwrap();
        let web = WorkloadName::parse("web").unwrap();
        let mut source = logs.source(&web, Stream::Stdout, CLOCKS);
        let together: String = (0..1000).map(|n| format!("line {n:03} {}\n", "x".repeat(40))).collect();
        logs.take(&mut source, together.as_bytes(), CLOCKS);
        let last = || logs.tail(&web, 1).unwrap().pop().map(|line| line.text);
        wait_until("line 999", || last().is_some_and(|text| text.starts_with("line 999")));
        let bytes = |segment| std::fs::metadata(dir.path().join("web").join(segment)).map_or(0, |found| found.len());
        assert!((8192..8192 + 60).contains(&bytes(PREVIOUS)) && bytes(CURRENT) < 8192, "{}", bytes(PREVIOUS));
        let kept = logs.tail(&web, 1000).unwrap();
        let numbers: Vec<_> = kept.iter().map(|line| line.text[5..8].parse::<usize>().unwrap()).collect();
        assert_eq!(numbers, (1000 - kept.len()..1000).collect::<Vec<_>>());
    }

    #[test]
    fn the_disk_holds_the_newest_lines_within_the_bound() {
        let dir = tempfile::tempdir().unwrap();
        let logs = Logs::start(dir.path().to_owned(), Bytes(16 * 1024), Bytes(1 << 40)).unwrap();
        let web = WorkloadName::parse("web").unwrap();
        let source = logs.source(&web, Stream::Stdout, CLOCKS);
        for n in 0..2000 {
            let text = format!("line {n:04} {}", "x".repeat(40));
            wait_until("room", || {
                let mut batch = Batch::new(Stream::Stdout, 7);
                let is_kept = logs.line(&source.to, text.as_bytes(), true, &mut batch);
                logs.keep(&source.to, batch);
                is_kept
            });
        }
        let newest = || logs.tail(&web, 1).unwrap().pop().map(|line| line.text);
        wait_until("line 1999", || newest().is_some_and(|text| text.starts_with("line 1999")));
        let on_disk: u64 = std::fs::read_dir(dir.path().join("web"))
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap().len())
            .sum();
        assert!(on_disk <= 17 * 1024, "{on_disk} bytes");
        let tail = logs.tail(&web, 100).unwrap();
        assert_eq!(tail.len(), 100);
        assert!(tail[0].text.starts_with("line 1900"));
    }
}
