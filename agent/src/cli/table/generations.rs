//! `edgectl generations` and `edgectl diff`.

use edged_model::api::{GenerationInfo, GenerationRole};
use edged_model::difference::Difference;
use edged_model::generation::GenerationState;
use edged_model::reason::{Code, Reason};

use super::{WIDTH, aligned, clean, cut, line, reason, state_text, widths};

pub fn generations(list: &[GenerationInfo]) -> String {
    if list.is_empty() {
        return "none: push a signed manifest\n".to_owned();
    }
    let header = ["SEQUENCE", "", "STATE", "SINCE", "WORKLOADS", "DIGEST"].map(str::to_owned);
    let row = |generation: &GenerationInfo| {
        let role = match generation.role {
            Some(GenerationRole::Active) => "active",
            Some(GenerationRole::LastGood) => "fallback",
            Some(GenerationRole::Candidate) => "coming",
            None => "",
        };
        let status = &generation.status;
        [
            status.sequence.to_string(),
            role.to_owned(),
            state_text(status.state).to_owned(),
            status.since.to_string(),
            generation.workloads.to_string(),
            status.digest.short(),
        ]
    };
    let rows: Vec<_> = list.iter().map(row).collect();
    let widths = widths(&header, &rows);
    let mut out = String::new();
    line(&mut out, &aligned(&header, &widths));
    for (generation, row) in list.iter().zip(&rows) {
        line(&mut out, &aligned(row, &widths));
        let tells = matches!(generation.status.state, GenerationState::Rejected | GenerationState::RolledBack);
        let waits = |why: &&Reason| why.code == Code::WaitingForMoment;
        if let Some(why) = generation.status.reason.as_ref().filter(|why| tells || waits(why)) {
            reason(&mut out, why);
        }
        if generation.refused {
            line(&mut out, &format!("  not tried again until `edgectl retry {}`", generation.status.sequence));
        }
    }
    out
}

pub fn differences(list: &[Difference]) -> String {
    if list.is_empty() {
        return "no difference\n".to_owned();
    }
    let mut out = String::new();
    for difference in list {
        line(&mut out, &cut(&clean(&difference.field), WIDTH));
        for (sign, value) in [("-", &difference.from), ("+", &difference.to)] {
            if let Some(value) = value {
                line(&mut out, &cut(&format!("  {sign} {}", clean(value)), WIDTH));
            }
        }
    }
    out
}
