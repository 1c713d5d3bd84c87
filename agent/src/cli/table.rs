//! Answers as text for people: 80 columns, one look. Pure. Aligning a few columns takes the twenty lines at the end of
//! this file; a crate for tables would be the largest dependency of `edgectl`.

use std::fmt::Write;

/// What takes the disk.
pub(super) mod disk;
/// Images and volumes.
mod images;

use edged_model::api::{Answer, Event, GenerationStatus, Inspect, LogLine, Status, Throttled, WorkloadStatus};
use edged_model::generation::GenerationState;
use edged_model::quantity::{Span, Timestamp};
use edged_model::reason::{Code, Reason};
use edged_model::report::BootCause;
use edged_model::workload::{Health, Phase};
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// The manifests of a device.
mod generations;
/// Layers read slowly, again and again.
mod scrub;
/// What the device has been through.
mod survived;

const WIDTH: usize = 80;

#[derive(Debug, Clone, Copy)]
pub struct Style {
    pub color: bool,
    /// Log lines byte by byte as they were printed: for files and pipes, never for a terminal, which obeys them.
    pub raw_logs: bool,
}

#[derive(Clone, Copy)]
enum Tone {
    Good,
    Bad,
    Plain,
}

impl Style {
    fn paint(self, text: &str, tone: Tone) -> String {
        match (self.color, tone) {
            (true, Tone::Good) => format!("\x1b[32m{text}\x1b[0m"),
            (true, Tone::Bad) => format!("\x1b[31m{text}\x1b[0m"),
            (false, _) | (_, Tone::Plain) => text.to_owned(),
        }
    }
}

pub fn answer(answer: &Answer, style: Style) -> String {
    match answer {
        Answer::Version(version) => {
            format!("agent {}\nkeeper {}\narch {}\n", version.agent, version.keeper, version.arch)
        }
        Answer::Status(status) => self::status(status, style),
        Answer::Inspect(inspect) => self::inspect(inspect, style),
        Answer::Log(line) => log(line, style),
        Answer::Event(event) => self::event(event),
        Answer::Df(used) => disk::used(used, false),
        Answer::Pruned(pruned) => disk::pruned(pruned),
        Answer::Images(list) => images::images(list),
        Answer::Volumes(list) => images::volumes(list),
        Answer::Loaded(list) => images::loaded(list),
        Answer::Checked(list) => images::checked(list),
        Answer::Generations(list) => generations::generations(list),
        Answer::Diff(list) => generations::differences(list),
        Answer::Accepted { what } => format!("{}\n", clean(what)),
        Answer::Error(reason) => reason_text(reason) + "\n",
        // What `exec` does with them is no text.
        Answer::ExecStarted | Answer::ExecEnded { .. } | Answer::Progress { .. } | Answer::End => String::new(),
    }
}

/// Whether all is well; if not, what is not, in a few words.
pub fn verdict(status: &Status) -> Result<(), String> {
    if let Some(generation) = status.generation.as_ref().filter(|g| g.state == GenerationState::RolledBack) {
        return Err(format!("generation {} was rolled back", generation.sequence));
    }
    let unwell: Vec<_> = status.workloads.iter().filter(|workload| !is_well(workload)).collect();
    match unwell.as_slice() {
        [] if status.generation.is_none() => Err("it has no manifest yet".to_owned()),
        [] => believed(status),
        [one] => Err(format!("{} {}", one.name, state_word(one))),
        many => Err(format!("{} of {} workloads are not well", many.len(), status.workloads.len())),
    }
}

/// What runs may be well and what is believed not: nothing new can come, or something keeps it away.
fn believed(status: &Status) -> Result<(), String> {
    let mut concerns = status.trust.concerns.iter();
    match concerns.find(|why| why.code != Code::Expiring) {
        Some(why) => Err(why.text.split(", and ").next().unwrap_or(&why.text).to_owned()),
        None => Ok(()),
    }
}

fn is_well(workload: &WorkloadStatus) -> bool {
    match workload.phase {
        Phase::Running => workload.health != Health::Unhealthy,
        Phase::Completed | Phase::Stopped | Phase::Paused => true,
        Phase::Pending | Phase::Pulling | Phase::Waiting | Phase::Starting | Phase::Stopping | Phase::Failed => false,
    }
}

fn state_word(workload: &WorkloadStatus) -> &'static str {
    match (workload.phase, workload.health) {
        (Phase::Running, Health::Healthy) => "healthy",
        (Phase::Running, Health::Unhealthy) => "unhealthy",
        (Phase::Running, Health::Starting) => "running",
        (Phase::Running, Health::Unchecked) => "running",
        (Phase::Pending, _) => "pending",
        (Phase::Pulling, _) => "pulling",
        (Phase::Waiting, _) => "waiting",
        (Phase::Starting, _) => "starting",
        (Phase::Stopping, _) => "stopping",
        (Phase::Completed, _) => "completed",
        (Phase::Failed, _) => "failed",
        (Phase::Stopped, _) => "stopped",
        (Phase::Paused, _) => "paused",
    }
}

fn status(status: &Status, style: Style) -> String {
    let mut out = String::new();
    let verdict = match verdict(status) {
        Ok(()) => style.paint("well", Tone::Good),
        Err(why) => {
            let room = WIDTH.saturating_sub(status.device.as_str().len() + 2).max(8);
            style.paint(&cut(&format!("NOT WELL: {why}"), room), Tone::Bad)
        }
    };
    let up = Span::from_secs(status.uptime_secs).human();
    line_raw(&mut out, &format!("{}  {verdict}", status.device));
    line(
        &mut out,
        &format!("  up {up}, {} ({} clock), edged {}", status.now, status.clock_source, status.agent_version),
    );
    if let Some(cause @ (BootCause::Watchdog | BootCause::Panic)) = status.boot_cause {
        line(&mut out, &format!("  booted      {cause}"));
    }
    match &status.generation {
        Some(generation) => line(&mut out, &format!("  generation  {}", generation_text(generation))),
        None => line(&mut out, "  generation  none: push a signed manifest"),
    }
    if let Some(candidate) = &status.candidate {
        line(&mut out, &format!("  coming      {}", generation_text(candidate)));
        if let Some(why) = candidate.reason.as_ref().filter(|why| why.code == Code::WaitingForMoment) {
            wrapped(&mut out, "              ", &why.text);
            wrapped(&mut out, "           -> ", &why.next);
        }
    }
    for pull in &status.pulls {
        wrapped(&mut out, "  pulling     ", &pull.to_string());
    }
    let memory = status.memory_total.0.saturating_sub(status.memory_available.0);
    let memory = edged_model::quantity::Bytes(memory).human();
    let disk = edged_model::quantity::Bytes(status.disk.total.0.saturating_sub(status.disk.free.0)).human();
    line(
        &mut out,
        &format!(
            "  memory      {memory} of {}   disk {disk} of {}",
            status.memory_total.human(),
            status.disk.total.human()
        ),
    );
    line(&mut out, &format!("  fleet       {}", fleet_text(status)));
    for why in &status.trust.concerns {
        wrapped(&mut out, "  trust       ", &why.text);
        wrapped(&mut out, "           -> ", &why.next);
    }
    if let Some(why) = &status.upgrade {
        wrapped(&mut out, "  upgrade     ", &why.text);
        wrapped(&mut out, "           -> ", &why.next);
    }
    if let Some(text) = scrub::under_way(&status.scrub) {
        wrapped(&mut out, "  scrub       ", &text);
    }
    if let Some(text) = survived::text(&status.survived) {
        wrapped(&mut out, "  survived    ", &text);
    }
    if let Some(refused) = &status.refused {
        wrapped(&mut out, "  refused     ", &format!("{} at {}: {}", refused.what, refused.at, refused.why));
    }
    if !status.workloads.is_empty() {
        out.push('\n');
        out.push_str(&workloads(status, style));
    }
    out
}

fn generation_text(generation: &GenerationStatus) -> String {
    let state = state_text(generation.state);
    format!("{} {state} since {} ({})", generation.sequence, generation.since, generation.digest.short())
}

fn state_text(state: GenerationState) -> &'static str {
    match state {
        GenerationState::Received => "received",
        GenerationState::Verified => "verified",
        GenerationState::Staged => "staged",
        GenerationState::Activating => "activating",
        GenerationState::Probation => "on probation",
        GenerationState::Good => "good",
        GenerationState::Superseded => "superseded",
        GenerationState::Rejected => "rejected",
        GenerationState::RolledBack => "rolled back",
    }
}

fn fleet_text(status: &Status) -> String {
    let fleet = &status.fleet;
    let Some(url) = &fleet.url else { return "none configured".to_owned() };
    let waiting = match (fleet.waiting_reports, fleet.dropped_untold) {
        (0, 0) => String::new(),
        (n, 0) => format!("{n} reports wait; "),
        (n, dropped) => format!("{n} reports wait, {dropped} were dropped; "),
    };
    match (&fleet.problem, fleet.last_contact) {
        (Some(problem), _) => format!("{waiting}{}", problem.text),
        (None, Some(at)) => format!("{waiting}{url}, last heard {at}"),
        (None, None) => format!("{waiting}{url}, not heard yet"),
    }
}

/// The workloads as a table, and under each that is not well, why and what to do.
pub fn workloads(status: &Status, style: Style) -> String {
    let header = ["NAME", "STATE", "UP", "RESTARTS", "MEMORY", "CPU"].map(str::to_owned);
    let rows: Vec<[String; 6]> = status.workloads.iter().map(row).collect();
    let widths = widths(&header, &rows);
    let mut out = String::new();
    line(&mut out, &aligned(&header, &widths));
    for (workload, row) in status.workloads.iter().zip(&rows) {
        let tone = match (workload.phase, is_well(workload)) {
            (Phase::Running, true) => Tone::Plain,
            (_, true) => Tone::Plain,
            (_, false) => Tone::Bad,
        };
        let text = cut(&aligned(row, &widths), WIDTH);
        line_raw(&mut out, &style.paint(&text, tone));
        if let Some(why) = workload.why.as_ref().filter(|_| !is_well(workload) || workload.phase == Phase::Stopped) {
            reason(&mut out, why);
        }
        if workload.log_lines_dropped > 0 {
            let lines = workload.log_lines_dropped;
            wrapped(&mut out, "  ", &format!("{lines} lines of its log were dropped: the disk does not take them"));
        }
    }
    out
}

fn row(workload: &WorkloadStatus) -> [String; 6] {
    let restarts = match workload.oom_kills {
        0 => workload.restarts.to_string(),
        oom => format!("{} ({oom} oom)", workload.restarts),
    };
    let memory = match (workload.memory, workload.memory_max) {
        (Some(used), Some(max)) => format!("{}/{}", used.human(), max.human()),
        (None, Some(max)) => format!("-/{}", max.human()),
        _ => "-".to_owned(),
    };
    let cpu = match (workload.cpu_milli, workload.cpu_max_milli) {
        (Some(used), Some(max)) => format!("{used}m/{max}m"),
        (None, Some(max)) => format!("-/{max}m"),
        _ => "-".to_owned(),
    };
    let up = workload.up_secs.map_or("-".to_owned(), |secs| Span::from_secs(secs).human());
    [cut(workload.name.as_str(), 24), state_word(workload).to_owned(), up, restarts, memory, cpu]
}

fn reason(out: &mut String, why: &Reason) {
    wrapped(out, "  ", &why.text);
    if !why.next.is_empty() {
        wrapped(out, "  -> ", &why.next);
    }
}

fn inspect(inspect: &Inspect, style: Style) -> String {
    let workload = &inspect.status;
    let mut out = String::new();
    let pairs = [
        ("name", workload.name.to_string()),
        ("state", state_word(workload).to_owned()),
        ("image", workload.image.clone()),
        ("digest", inspect.image_digest.map_or("-".to_owned(), |digest| digest.to_string())),
        ("pid", workload.pid.map_or("-".to_owned(), |pid| pid.to_string())),
        ("restarts", format!("{} ({} out of memory)", workload.restarts, workload.oom_kills)),
        ("cgroup", inspect.cgroup.clone().unwrap_or_else(|| "-".to_owned())),
    ];
    for (key, value) in pairs {
        let _ = writeln!(out, "{key:<10}{value}");
    }
    if let Some(exit) = &inspect.history.last_exit {
        let peak = exit.peak_memory.map_or("-".to_owned(), |peak| peak.human());
        let ran = Span::from_ms(exit.ran_ms).human();
        let _ = writeln!(out, "{:<10}{} at {} after {ran}, peak memory {peak}", "last exit", exit.cause, exit.at);
    }
    if let Some(took) = &inspect.probe {
        let ms = |us: u64| us as f64 / 1000.0;
        let (median, p99) = (ms(took.median_us), ms(took.p99_us));
        let _ = writeln!(out, "{:<10}{median:.1} ms, 99 of 100 within {p99:.1} ms ({} in all)", "probe", took.times);
    }
    if let Some(Throttled { periods, throttled_periods: full @ 1.., throttled_ms }) = inspect.throttled {
        let waited = throttled_ms as f64 / 1000.0;
        let _ =
            writeln!(out, "{:<10}in {full} of {periods} periods of 100 ms, {waited:.1} s in all (`cpu`)", "throttled");
    }
    for (file, value) in &inspect.limits {
        let _ = writeln!(out, "{file:<28}{value}");
    }
    if let Some(why) = &workload.why {
        out.push_str(&style.paint("why\n", Tone::Bad));
        reason(&mut out, why);
    }
    out
}

/// A reason over two lines: what is the matter, what to do.
pub fn reason_text(reason: &Reason) -> String {
    match reason.next.as_str() {
        "" => clean(&reason.text),
        next => format!("{}\n  -> {}", clean(&reason.text), clean(next)),
    }
}

fn log(line: &LogLine, style: Style) -> String {
    let at = Timestamp(line.at_unix_ms.div_euclid(1000)).to_string();
    let at = at.strip_suffix('Z').unwrap_or(&at);
    let text = if style.raw_logs { line.text.clone() } else { clean(&line.text) };
    format!("{at}.{:03}Z {}\n", line.at_unix_ms.rem_euclid(1000), text)
}

fn event(event: &Event) -> String {
    let mut out = String::new();
    let generation = event.generation.map(|generation| format!(" [{generation}]")).unwrap_or_default();
    wrapped(&mut out, &format!("{}{generation} ", event.at), &format!("{} ({})", event.why, event.by));
    out
}

fn widths<const N: usize>(header: &[String; N], rows: &[[String; N]]) -> [usize; N] {
    std::array::from_fn(|column| rows.iter().chain([header]).map(|row| row[column].width()).max().unwrap_or(0))
}

fn aligned<const N: usize>(row: &[String; N], widths: &[usize; N]) -> String {
    // Not `{:<width$}`: that counts characters, and some are two columns wide.
    let padded = |(cell, width): (&String, &usize)| format!("{cell}{}", " ".repeat(width.saturating_sub(cell.width())));
    let cells: Vec<_> = row.iter().zip(widths).map(padded).collect();
    cells.join("  ").trim_end().to_owned()
}

/// `text` without what a terminal would obey instead of show: a workload's output and a registry's words end up here.
pub fn clean(text: &str) -> String {
    // The direction marks of Unicode are no control characters, and turn a line around all the same.
    let obeyed = |c: char| {
        c.is_control() || matches!(c, '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    text.chars()
        .map(|c| {
            if c == '\t' {
                ' '
            } else if obeyed(c) {
                '\u{fffd}'
            } else {
                c
            }
        })
        .collect()
}

/// At most `width` columns of it.
fn cut(text: &str, width: usize) -> String {
    if text.width() <= width {
        return text.to_owned();
    }
    let (start, _) = split_at_width(text, width - 1);
    format!("{start}…")
}

/// The longest start that fits `width` columns (at least one character), and the rest.
fn split_at_width(text: &str, width: usize) -> (&str, &str) {
    let mut used = 0;
    for (at, c) in text.char_indices() {
        used += c.width().unwrap_or(0);
        if used > width && at > 0 {
            return text.split_at(at);
        }
    }
    (text, "")
}

fn line(out: &mut String, text: &str) {
    line_raw(out, &cut(&clean(text), WIDTH));
}

fn line_raw(out: &mut String, text: &str) {
    out.push_str(text);
    out.push('\n');
}

/// `text` behind `head`, at most 80 columns wide, further lines under the first. A word too long for a line is broken.
fn wrapped(out: &mut String, head: &str, text: &str) {
    let indent = head.width();
    let mut current = head.to_owned();
    let mut used = indent;
    for word in text.split_whitespace() {
        let word = clean(word);
        let mut rest = word.as_str();
        while !rest.is_empty() {
            let space = usize::from(used > indent);
            let whole = used + space + rest.width() <= WIDTH;
            if !whole && used > indent {
                line_raw(out, current.trim_end());
                current = " ".repeat(indent);
                used = indent;
                continue;
            }
            let (part, left) = if whole { (rest, "") } else { split_at_width(rest, WIDTH - indent) };
            current.push_str(&" ".repeat(space));
            current.push_str(part);
            used += space + part.width();
            rest = left;
        }
    }
    line_raw(out, current.trim_end());
}

#[cfg(test)]
mod tests;
