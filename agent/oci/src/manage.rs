//! `kill`, `delete`, `pause`, `resume`.

use std::os::fd::AsFd;

use edged_sys::pidfd;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::arguments::{Global, Parsed};
use crate::error::{OciError, warn};
use crate::state::{self, Home, Record, Status};
use crate::{bundle, life};

/// SIGTERM, term, 15, or a real-time one: RTMIN+3.
pub fn signal_number(text: &str) -> Option<i32> {
    const LAST: i32 = 64;
    if let Ok(number) = text.parse::<i32>() {
        return (1..=LAST).contains(&number).then_some(number);
    }
    let upper = text.to_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(rest) = name.strip_prefix("RTMIN") {
        let above: i32 = if rest.is_empty() { 0 } else { rest.strip_prefix('+')?.parse().ok()? };
        return Some(34 + above).filter(|number| (34..=LAST).contains(number));
    }
    if let Some(rest) = name.strip_prefix("RTMAX") {
        let below: i32 = if rest.is_empty() { 0 } else { rest.strip_prefix('-')?.parse().ok()? };
        return Some(LAST - below).filter(|number| (34..=LAST).contains(number));
    }
    format!("SIG{name}").parse::<nix::sys::signal::Signal>().ok().map(|signal| signal as i32)
}

pub fn kill(parsed: &Parsed) -> Result<(), OciError> {
    let (home, record) = state::find(&parsed.global.root, parsed.id()?)?;
    let text = parsed.words.get(1).map_or("TERM", String::as_str);
    let signal = signal_number(text).ok_or_else(|| OciError::Usage { text: format!("there is no signal `{text}`") })?;
    if parsed.has("all") {
        if signal == 9 {
            return Ok(record.groups.kill_all()?);
        }
        for pid in record.groups.pids() {
            // Gone by now is what was wanted.
            let _ = pidfd::open_child(pid).and_then(|process| pidfd::send_signal(process.as_fd(), signal));
        }
        return Ok(());
    }
    let stopped = || OciError::WrongState {
        id: home.id.clone(),
        is: Status::Stopped.text(),
        verb: "kill",
        wanted: "running or created",
    };
    let process = record.process().ok_or_else(stopped)?;
    match pidfd::send_signal(process.as_fd(), signal) {
        Err(Errno::SRCH) => Err(stopped()),
        sent => sent.map_err(|errno| OciError::system("kill", errno)),
    }?;
    // On v1 a frozen process takes no signal, not even this one.
    if signal == 9 && home.status(&record) == Status::Paused {
        record.groups.freeze(false)?;
    }
    Ok(())
}

pub fn delete(parsed: &Parsed) -> Result<(), OciError> {
    let force = parsed.has("force");
    let home = Home::new(&parsed.global.root, parsed.id()?)?;
    let record = match home.load() {
        // A crash between making the directory and writing the state leaves nothing else.
        Err(OciError::NoSuchContainer { .. }) if force => return home.remove(),
        loaded => loaded?,
    };
    match home.status(&record) {
        Status::Stopped => {}
        // Its program never ran: nothing is lost.
        Status::Created => {}
        _ if force => {}
        is => {
            let id = home.id.clone();
            let wanted = "stopped (or --force)";
            return Err(OciError::WrongState { id, is: is.text(), verb: "delete", wanted });
        }
    }
    if let Some(process) = record.process() {
        pidfd::send_signal(process.as_fd(), 9).map_err(|errno| OciError::system("kill", errno))?;
        record.groups.kill_all()?;
        wait_for_end(process.as_fd());
    }
    take_away(&parsed.global, &home, &record, None)
}

/// A pidfd is readable when its process has ended.
fn wait_for_end(process: std::os::fd::BorrowedFd<'_>) {
    let timeout = Timespec { tv_sec: 10, tv_nsec: 0 };
    let mut watched = [PollFd::from_borrowed_fd(process, PollFlags::IN)];
    let _ = poll(&mut watched, Some(&timeout));
}

/// Groups, `poststop` hooks, state: in this order, so that a crash leaves what a second `delete` finishes. `hooks`: who
/// has them at hand need not have the configuration read once more.
pub fn take_away(
    global: &Global,
    home: &Home,
    record: &Record,
    hooks: Option<&[edged_model::keeper::Hook]>,
) -> Result<(), OciError> {
    if !record.groups.remove_if_empty() {
        record.groups.kill_all()?;
        record.groups.remove()?;
    }
    let kept = if hooks.is_none() { kept_hooks(home)? } else { Vec::new() };
    let hooks = hooks.unwrap_or(&kept);
    if !hooks.is_empty() {
        let state = record.as_state(Status::Stopped).to_string();
        for one in hooks {
            if let Err(error) = edged_sys::hook::run(one, state.as_bytes()) {
                warn(global, &error.to_string());
            }
        }
    }
    home.remove()
}

/// `poststop` of the configuration that was kept.
fn kept_hooks(home: &Home) -> Result<Vec<edged_model::keeper::Hook>, OciError> {
    let config = bundle::read(&home.config()).ok();
    // Without the word in it there is none, and nothing to parse.
    let config = config.filter(|bytes| String::from_utf8_lossy(bytes).contains("\"poststop\""));
    match config.and_then(|bytes| bundle::parse(&bytes).ok()) {
        Some((spec, _)) => Ok(life::hooks(&spec, |hooks| hooks.poststop())?),
        None => Ok(Vec::new()),
    }
}

pub fn freeze(parsed: &Parsed, frozen: bool) -> Result<(), OciError> {
    let (home, record) = state::find(&parsed.global.root, parsed.id()?)?;
    let status = home.status(&record);
    let (verb, wanted, fine) = if frozen {
        ("pause", "running or created", matches!(status, Status::Running | Status::Created))
    } else {
        ("resume", "paused", status == Status::Paused || (status == Status::Created && record.groups.is_frozen()))
    };
    if !fine {
        return Err(OciError::WrongState { id: home.id, is: status.text(), verb, wanted });
    }
    Ok(record.groups.freeze(frozen)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_by_name_and_number() {
        for (text, number) in
            [("9", 9), ("KILL", 9), ("SIGTERM", 15), ("hup", 1), ("RTMIN+3", 37), ("SIGRTMAX", 64), ("RTMAX-1", 63)]
        {
            assert_eq!(signal_number(text), Some(number), "{text}");
        }
        for text in ["", "0", "65", "-9", "SIGNOTHING", "RTMIN+99", "RTMIN-1"] {
            assert_eq!(signal_number(text), None, "{text}");
        }
    }
}
