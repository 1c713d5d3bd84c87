//! Whether and when an ended workload starts again: by its policy, its last exit and the failures in a row.

use edged_model::id::WorkloadName;
use edged_model::manifest::{Restart, RestartPolicy};
use edged_model::observed::RestartHistory;
use edged_model::quantity::Span;
use edged_model::reason::Code;
use edged_model::workload::ExitCause;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Now,
    /// Not before this time.
    At {
        boot_ms: u64,
    },
    /// Its policy says that this was its end.
    Never,
}

/// Whether the last run was ended for a reason of ours that says nothing about the program: a change, an operator.
pub fn ended_by_us(history: &RestartHistory) -> bool {
    use Code::{NotInManifest, OperatorRestarted, OperatorStopped, SpecChanged};
    let code = history.last_reason.as_ref().map(|why| why.code);
    matches!(code, Some(SpecChanged | NotInManifest | OperatorStopped | OperatorRestarted))
}

/// What follows the last end of `name`.
pub fn verdict(name: &WorkloadName, policy: &Restart, history: &RestartHistory) -> Verdict {
    let Some(exit) = &history.last_exit else { return Verdict::Now };
    if ended_by_us(history) {
        return Verdict::Now;
    }
    // A program that exits with 0 because we stopped it for its bad health has failed all the same.
    let unhealthy = history.last_reason.as_ref().is_some_and(|why| why.code == Code::Unhealthy);
    let final_code = match exit.cause {
        ExitCause::Code { code } if !unhealthy => policy.no_restart_exit_codes.contains(&code),
        _ => false,
    };
    let again = match policy.policy {
        RestartPolicy::Always => true,
        RestartPolicy::OnFailure => unhealthy || !exit.cause.is_success(),
        RestartPolicy::Never => false,
    };
    if !again || final_code {
        return Verdict::Never;
    }
    match delay(name, policy, history.in_a_row) {
        Span { ms: 0 } => Verdict::Now,
        wait => Verdict::At { boot_ms: exit.at_boot_ms.saturating_add(wait.ms) },
    }
}

/// The wait before the n-th restart in a row: none before the first, then `backoff` doubling up to `backoffMax`, with
/// up to a tenth taken off so that a thousand devices do not come back in step. The tenth follows from name and number:
/// the same question has the same answer.
pub fn delay(name: &WorkloadName, policy: &Restart, in_a_row: u32) -> Span {
    if in_a_row <= 1 {
        return Span::default();
    }
    let doublings = (in_a_row - 2).min(40);
    let wait = policy.backoff.ms.saturating_mul(1 << doublings).min(policy.backoff_max.ms);
    let tenth = wait / 10;
    let jitter = if tenth == 0 { 0 } else { fnv(name.as_str().as_bytes(), in_a_row) % (tenth + 1) };
    Span::from_ms(wait - jitter)
}

/// FNV-1a: spreads, and is the same everywhere.
fn fnv(bytes: &[u8], number: u32) -> u64 {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    number.to_le_bytes().iter().fold(bytes.iter().fold(0xcbf2_9ce4_8422_2325, step), step)
}

#[cfg(test)]
mod tests {
    use super::*;
    use edged_model::quantity::Timestamp;
    use edged_model::workload::Exit;
    use proptest::prelude::*;

    fn name() -> WorkloadName {
        WorkloadName::parse("web").unwrap()
    }

    fn history(cause: ExitCause, in_a_row: u32) -> RestartHistory {
        let exit = Exit { cause, at: Timestamp(0), at_boot_ms: 1000, ran_ms: 1, peak_memory: None };
        RestartHistory { last_exit: Some(exit), in_a_row, ..RestartHistory::default() }
    }

    #[test]
    fn policies() {
        let (ok, bad) = (ExitCause::Code { code: 0 }, ExitCause::Code { code: 1 });
        let of = |policy| Restart { policy, ..Restart::default() };
        let cases = [
            (of(RestartPolicy::Always), &ok, Verdict::Now),
            (of(RestartPolicy::Always), &bad, Verdict::Now),
            (of(RestartPolicy::OnFailure), &ok, Verdict::Never),
            (of(RestartPolicy::OnFailure), &bad, Verdict::Now),
            (of(RestartPolicy::OnFailure), &ExitCause::OutOfMemory, Verdict::Now),
            (of(RestartPolicy::Never), &bad, Verdict::Never),
            (Restart { no_restart_exit_codes: vec![1], ..Restart::default() }, &bad, Verdict::Never),
        ];
        for (policy, cause, expected) in cases {
            assert_eq!(verdict(&name(), &policy, &history(cause.clone(), 1)), expected, "{policy:?} {cause:?}");
        }
    }

    #[test]
    fn what_we_ended_ourselves_starts_again_whatever_its_policy_says() {
        use edged_model::reason::Reason;
        let ended = |code| RestartHistory {
            last_reason: Some(Reason::new(code, "ended")),
            ..history(ExitCause::Code { code: 0 }, 1)
        };
        let of = |policy| Restart { policy, ..Restart::default() };
        for code in [Code::SpecChanged, Code::NotInManifest, Code::OperatorStopped, Code::OperatorRestarted] {
            for policy in [RestartPolicy::Never, RestartPolicy::OnFailure, RestartPolicy::Always] {
                assert_eq!(verdict(&name(), &of(policy), &ended(code)), Verdict::Now, "{policy:?} {code:?}");
            }
        }
        assert_eq!(verdict(&name(), &of(RestartPolicy::OnFailure), &ended(Code::Unhealthy)), Verdict::Now);
        assert_eq!(verdict(&name(), &of(RestartPolicy::OnFailure), &ended(Code::Exited)), Verdict::Never);
    }

    proptest! {
        #[test]
        fn a_wait_is_bounded_and_a_budget_is_never_dead_for_ever(n in 0..u32::MAX, backoff in 0..10_000_u64, max in 0..100_000_u64) {
            let policy = Restart { backoff: Span::from_ms(backoff), backoff_max: Span::from_ms(max), ..Restart::default() };
            prop_assert!(delay(&name(), &policy, n).ms <= max);
            prop_assert!(verdict(&name(), &policy, &history(ExitCause::OutOfMemory, n)) != Verdict::Never);
        }
    }

    #[test]
    fn the_first_is_at_once_then_it_doubles() {
        let policy = Restart::default();
        assert_eq!(delay(&name(), &policy, 1).ms, 0);
        let near = |n, ms: u64| {
            let wait = delay(&name(), &policy, n).ms;
            assert!(wait <= ms && wait >= ms - ms / 10, "{n}: {wait} for {ms}");
        };
        near(2, 1_000);
        near(3, 2_000);
        near(6, 16_000);
        near(60, 300_000);
    }
}
