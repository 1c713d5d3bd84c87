//! The scrub in a line or two, for `df` and `status`.

use edged_model::scrub::{ScrubPass, ScrubStatus};

/// The pass under way; nothing between two of them.
pub(super) fn under_way(scrub: &ScrubStatus) -> Option<String> {
    let now = scrub.now.as_ref()?;
    let paused = scrub.paused.map(|pause| format!("; it stands still: {pause}")).unwrap_or_default();
    let ScrubPass { began, layers, .. } = now;
    let (all, read) = (scrub.of_layers, now.read.human());
    Some(format!("{layers} of {all} layers since {began}, {read} read{}{paused}", damaged(now)))
}

/// What is known, in sentences.
pub(super) fn all(scrub: &ScrubStatus) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(now) = under_way(scrub) {
        lines.push(format!("scrub: {now}"));
    }
    if let Some((last, ended)) = scrub.last.as_ref().and_then(|last| Some((last, last.ended?))) {
        let (layers, read) = (last.layers, last.read.human());
        lines.push(format!("last scrub: {layers} layers by {ended}, {read} read{}", damaged(last)));
    }
    match (scrub.every, scrub.next) {
        (None, _) => lines.push("no scrub: it is switched off".to_owned()),
        (Some(_), Some(next)) => lines.push(format!("next scrub: from {next} on")),
        (Some(_), None) => {}
    }
    lines
}

fn damaged(pass: &ScrubPass) -> String {
    match pass.damaged {
        0 => ", none damaged".to_owned(),
        n => format!(", {n} DAMAGED"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use edged_model::quantity::{Bytes, Span, Timestamp};
    use edged_model::scrub::ScrubPause;

    #[test]
    fn what_was_done_what_is_done_and_what_is_to_come() {
        assert_eq!(all(&ScrubStatus::default()), ["no scrub: it is switched off"]);
        let began = Timestamp(1_700_000_000);
        let pass = ScrubPass { began, layers: 3, read: Bytes(12 << 20), damaged: 1, ..ScrubPass::default() };
        let last = ScrubPass { ended: Some(Timestamp(1_700_000_600)), damaged: 0, ..pass.clone() };
        let every = Some(Span::from_secs(86_400));
        let between = ScrubStatus { every, last: Some(last), next: Some(began), ..ScrubStatus::default() };
        assert_eq!(
            all(&between),
            [
                "last scrub: 3 layers by 2023-11-14T22:23:20Z, 12Mi read, none damaged",
                "next scrub: from 2023-11-14T22:13:20Z on"
            ]
        );
        assert_eq!(under_way(&between), None);
        let paused = Some(ScrubPause::Pull);
        let now = ScrubStatus { every, now: Some(pass), of_layers: 12, paused, ..ScrubStatus::default() };
        assert_eq!(
            all(&now),
            [
                "scrub: 3 of 12 layers since 2023-11-14T22:13:20Z, 12Mi read, 1 DAMAGED; it stands still: an image is fetched"
            ]
        );
    }
}
