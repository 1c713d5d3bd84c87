//! Whether a staged generation may take over now. Only a switch waits: a rollback, a restart and a first generation
//! disturb nobody who would not be disturbed anyway.
//!
//! ```text
//!   operator's word, or nothing active ──> now
//!   a workload's lock ──> until it is let go or runs out
//!   apply: now | next-boot | manual | window ──> now | another boot | operator | the window opens
//! ```

use edged_model::action::Wait;
use edged_model::generation::Generation;
use edged_model::moment::{Apply, Moment};
use edged_model::observed::Desired;
use edged_model::quantity::{Now, Span};
use edged_model::reason::{Code, Reason};

/// Why it has to wait; `None` when it may go on.
pub fn waits(staged: &Generation, desired: &Desired, moment: &Moment, now: Now) -> Option<Wait> {
    if staged.wanted_now || desired.pointers.active.is_none() {
        return None;
    }
    let (text, until_boot_ms) = locked(moment, now).or_else(|| not_yet(staged, moment, now))?;
    let sequence = staged.sequence;
    let why = Reason::new(Code::WaitingForMoment, format!("generation {sequence} is staged and waits {text}"))
        .next(format!("`edgectl activate {sequence}` does not wait"));
    Some(Wait { workload: None, why, until_boot_ms })
}

/// The lock that holds longest.
fn locked(moment: &Moment, now: Now) -> Option<(String, Option<u64>)> {
    if moment.locks_unseen {
        return Some(("for a look at the locks".to_owned(), None));
    }
    let held = moment.locks.iter().filter(|lock| lock.until_boot_ms > now.boot_ms);
    let last = held.max_by_key(|lock| lock.until_boot_ms)?;
    let left = Span::from_ms(last.until_boot_ms - now.boot_ms).human();
    Some((format!("for the lock `{}`, for {left} at most", last.name), Some(last.until_boot_ms)))
}

fn not_yet(staged: &Generation, moment: &Moment, now: Now) -> Option<(String, Option<u64>)> {
    let update = &staged.manifest.update;
    match (update.apply, &update.window) {
        (Apply::Now, _) | (Apply::Window, None) => None,
        (Apply::Manual, _) => Some(("for an operator's word".to_owned(), None)),
        (Apply::NextBoot, _) => {
            (staged.received_boot == moment.boot_id).then(|| ("for the next boot".to_owned(), None))
        }
        (Apply::Window, Some(window)) => match window.opens_in_secs(now.wall, moment.timezone) {
            0 => None,
            secs => {
                let left = Span::from_secs(secs);
                let text = format!("for its window {window}, in {}", left.human());
                Some((text, Some(now.boot_ms.saturating_add(left.ms))))
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use edged_model::generation::{GenerationState, Pointers};
    use edged_model::id::{Digest, Sequence};
    use edged_model::manifest::Manifest;
    use edged_model::moment::{UpdateLock, Window};
    use edged_model::quantity::Timestamp;

    const NOW: Now = Now { boot_ms: 50_000, wall: Timestamp(0) };

    fn staged(apply: Apply) -> Generation {
        let mut manifest = Manifest::empty();
        manifest.update.apply = apply;
        let window =
            Window { days: Vec::new(), from: "01:00".parse().unwrap(), to: "02:00".parse().unwrap(), timezone: None };
        manifest.update.window = (apply == Apply::Window).then_some(window);
        Generation {
            sequence: Sequence(2),
            state: GenerationState::Staged,
            received_boot: "this".to_owned(),
            ..Generation::received(manifest, Digest::of(b"2"), Timestamp(0))
        }
    }

    fn device() -> Desired {
        Desired { pointers: Pointers { active: Some(Sequence(1)), ..Pointers::default() }, ..Desired::default() }
    }

    fn boot(id: &str) -> Moment {
        Moment { boot_id: id.to_owned(), ..Moment::default() }
    }

    #[test]
    fn what_each_way_waits_for() {
        let later = Now { boot_ms: 60_000, wall: Timestamp(3_600) };
        let until_window = Some(Some(NOW.boot_ms + 3_600_000));
        let cases = [
            (Apply::Now, boot("this"), NOW, None),
            (Apply::NextBoot, boot("this"), NOW, Some(None)),
            (Apply::NextBoot, boot("next"), NOW, None),
            (Apply::Manual, boot("next"), later, Some(None)),
            (Apply::Window, boot("this"), NOW, until_window),
            (Apply::Window, boot("this"), later, None),
        ];
        for (apply, moment, now, expected) in cases {
            let wait = waits(&staged(apply), &device(), &moment, now);
            assert_eq!(wait.map(|wait| wait.until_boot_ms), expected, "{apply:?} {moment:?}");
        }
    }

    #[test]
    fn neither_an_operators_word_nor_a_first_generation_waits() {
        for apply in [Apply::NextBoot, Apply::Manual, Apply::Window] {
            let mut wanted = staged(apply);
            assert!(waits(&wanted, &Desired::default(), &boot("this"), NOW).is_none(), "{apply:?}");
            wanted.wanted_now = true;
            assert!(waits(&wanted, &device(), &boot("this"), NOW).is_none(), "{apply:?}");
        }
    }

    #[test]
    fn a_lock_holds_until_it_runs_out_and_no_longer() {
        let lock = |name: &str, until_boot_ms| UpdateLock { name: name.to_owned(), until_boot_ms };
        let moment = Moment { locks: vec![lock("camera", 70_000), lock("old", 10), lock("pump", 60_000)], ..boot("a") };
        let wait = waits(&staged(Apply::Now), &device(), &moment, NOW).unwrap();
        assert_eq!(wait.until_boot_ms, Some(70_000));
        assert!(wait.why.text.contains("`camera`") && wait.why.text.contains("20s"), "{}", wait.why);
        assert!(wait.why.next.contains("edgectl activate 2"), "{}", wait.why);
        let after = Now { boot_ms: 70_000, ..NOW };
        assert_eq!(waits(&staged(Apply::Now), &device(), &moment, after), None);
        let unseen = Moment { locks_unseen: true, ..moment };
        assert!(waits(&staged(Apply::Now), &device(), &unseen, after).is_some(), "nobody has looked yet");
    }
}
