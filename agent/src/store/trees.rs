//! The trees, each with one kind of record, and the single records of `meta`.

pub const META: &str = "meta";
/// By sequence: [`edged_model::generation::Generation`].
pub const GENERATIONS: &str = "generations";
/// By sequence: the signed envelope as it came.
pub const ENVELOPES: &str = "envelopes";
/// By workload: an operator's word.
pub const HELD: &str = "held";
/// By workload: its restarts.
pub const HISTORY: &str = "history";
/// By the image text of the manifest.
pub const IMAGES: &str = "images";
/// By number.
pub const EVENTS: &str = "events";
/// By number.
pub const OUTBOX: &str = "outbox";
/// By digest of the envelope.
pub const FAILED: &str = "failed";

pub const ALL: [&str; 9] = [META, GENERATIONS, ENVELOPES, HELD, HISTORY, IMAGES, EVENTS, OUTBOX, FAILED];

/// Keys of [`META`].
pub mod meta {
    pub const FORMAT: &str = "format";
    /// How often what lies in `keep/` too was changed: tells which of the two copies is newer.
    pub const REVISION: &str = "revision";
    pub const POINTERS: &str = "pointers";
    pub const TIME_FLOOR: &str = "time-floor";
    pub const TRUST: &str = "trust";
    pub const LAST_BOOT: &str = "last-boot";
    pub const DROPPED: &str = "dropped-reports";
    /// How many of them the fleet has been told of.
    pub const DROPPED_TOLD: &str = "dropped-reports-told";
    /// A reset of the workloads that is not over.
    pub const RESET: &str = "reset";
    pub const SURVIVED: &str = "survived";
    /// Report numbers up to it may be given out before this is written again.
    pub const REPORT_CEILING: &str = "report-ceiling";
}
