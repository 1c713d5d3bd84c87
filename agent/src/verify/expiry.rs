//! What a device believes does not hold for ever. An endpoint that keeps serving an old manifest (a freeze attack), and an
//! operator who forgot, look the same from here: the dates run out. That is said, early and then plainly; what runs goes on.
//!
//! Pure. The sentences hold dates and no present time, so that the same concern is the same sentence each time.

use edged_model::generation::Generation;
use edged_model::quantity::Timestamp;
use edged_model::reason::{Code, Reason};
use edged_model::trust::TrustRoot;

/// This long before the end it is said. A manifest that lives for less than four times that is spoken of in its last
/// quarter, since a short life is somebody's wish and no news.
const EARLY_SECS: i64 = 30 * 86_400;

/// What has run out or will soon. `now`: the later of clock and time floor.
pub fn concerns(root: &TrustRoot, wanted: Option<&Generation>, now: Timestamp) -> Vec<Reason> {
    [of_root(root, now), wanted.and_then(|wanted| of_manifest(wanted, now))].into_iter().flatten().collect()
}

fn of_root(root: &TrustRoot, now: Timestamp) -> Option<Reason> {
    let TrustRoot { version, expires, .. } = root;
    // A device without a root has another trouble, and says that.
    if *version == 0 {
        return None;
    }
    let (code, text) = if *expires <= now {
        (
            Code::Expired,
            format!(
                "trust root version {version} expired at {expires}: until a newer one comes no manifest is believed"
            ),
        )
    } else if expires.0.saturating_sub(now.0) <= EARLY_SECS {
        (Code::Expiring, format!("trust root version {version} expires at {expires}, and no newer one is here"))
    } else {
        return None;
    };
    Some(Reason::new(code, text).next("make and push a newer one (`edgectl trust rotate`); what runs goes on"))
}

fn of_manifest(wanted: &Generation, now: Timestamp) -> Option<Reason> {
    let (sequence, expires) = (wanted.sequence, wanted.manifest.expires);
    if expires <= now {
        let text = format!("manifest {sequence} expired at {expires}, and no newer one has come");
        return Some(Reason::new(Code::Expired, text).next(
            "sign and push a newer one; if that was done, look at what serves this device: it may be held back. \
             What runs goes on",
        ));
    }
    let lifetime = expires.0.saturating_sub(wanted.manifest.issued.0);
    if expires.0.saturating_sub(now.0) > EARLY_SECS.min(lifetime / 4) {
        return None;
    }
    let text = format!("manifest {sequence} expires at {expires}, and no newer one has come");
    Some(Reason::new(Code::Expiring, text).next("sign and push a newer one; what runs goes on"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use edged_model::generation::GenerationState;
    use edged_model::id::{Digest, Sequence};
    use edged_model::manifest::Manifest;

    const DAY: i64 = 86_400;

    fn root(expires: i64) -> TrustRoot {
        TrustRoot { version: 3, expires: Timestamp(expires), ..TrustRoot::none() }
    }

    fn generation(issued: i64, expires: i64) -> Generation {
        let manifest = Manifest { issued: Timestamp(issued), expires: Timestamp(expires), ..Manifest::empty() };
        Generation {
            sequence: Sequence(7),
            state: GenerationState::Good,
            ..Generation::received(manifest, Digest::of(b"m"), Timestamp(issued))
        }
    }

    fn codes(root: &TrustRoot, wanted: Option<&Generation>, now: i64) -> Vec<Code> {
        concerns(root, wanted, Timestamp(now)).into_iter().map(|why| why.code).collect()
    }

    #[test]
    fn a_year_long_manifest_is_spoken_of_a_month_before_and_from_its_end_on() {
        let (far, year) = (root(9_999 * DAY), generation(0, 365 * DAY));
        assert_eq!(codes(&far, Some(&year), 334 * DAY), []);
        assert_eq!(codes(&far, Some(&year), 335 * DAY), [Code::Expiring]);
        assert_eq!(codes(&far, Some(&year), 365 * DAY - 1), [Code::Expiring]);
        assert_eq!(codes(&far, Some(&year), 365 * DAY), [Code::Expired]);
    }

    #[test]
    fn a_short_life_is_no_news_before_its_last_quarter() {
        let (far, day) = (root(9_999 * DAY), generation(0, DAY));
        assert_eq!(codes(&far, Some(&day), DAY / 2), []);
        assert_eq!(codes(&far, Some(&day), DAY * 3 / 4), [Code::Expiring]);
    }

    #[test]
    fn a_root_runs_out_too_and_a_missing_one_is_not_called_expired() {
        assert_eq!(codes(&root(31 * DAY), None, 0), []);
        assert_eq!(codes(&root(30 * DAY), None, 0), [Code::Expiring]);
        assert_eq!(codes(&root(DAY), None, DAY), [Code::Expired]);
        assert_eq!(codes(&TrustRoot::none(), None, DAY), []);
    }

    #[test]
    fn the_same_concern_is_the_same_sentence() {
        let (old, year) = (root(DAY), generation(0, 2 * DAY));
        let said = concerns(&old, Some(&year), Timestamp(3 * DAY));
        assert_eq!(said, concerns(&old, Some(&year), Timestamp(300 * DAY)));
        assert!(said.iter().all(|why| !why.next.is_empty()));
    }

    #[test]
    fn no_date_is_too_strange() {
        for strange in [i64::MIN, -1, 0, i64::MAX] {
            for now in [i64::MIN, 0, i64::MAX] {
                let _ = concerns(&root(strange), Some(&generation(strange, now)), Timestamp(now));
                let _ = concerns(&root(now), Some(&generation(now, strange)), Timestamp(strange));
            }
        }
    }
}
