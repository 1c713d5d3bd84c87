//! What a device has survived, in one line for people: only what happened, and not what happens every day.

use edged_model::survived::Survived;

pub(super) fn text(survived: &Survived) -> Option<String> {
    let list = [
        (survived.power_losses, "loss of power", "losses of power"),
        (survived.watchdog_resets, "reset by the watchdog", "resets by the watchdog"),
        (survived.kernel_panics, "kernel panic", "kernel panics"),
        (survived.agent_restarts, "restart of the agent", "restarts of the agent"),
        (survived.store_rebuilt, "rebuilt store", "rebuilt stores"),
        (survived.store_records_lost, "lost record of the store", "lost records of the store"),
        (survived.layers_damaged, "damaged layer", "damaged layers"),
        (survived.upgrades_returned, "edged that fell after an upgrade", "edgeds that fell after an upgrade"),
        (survived.generations_rolled_back, "failed generation", "failed generations"),
        (survived.reports_dropped, "dropped report", "dropped reports"),
        (survived.writes_dropped, "dropped write", "dropped writes"),
    ];
    let words = list.iter().filter(|(count, ..)| *count > 0).map(|(count, one, many)| {
        let word = if *count == 1 { one } else { many };
        format!("{count} {word}")
    });
    let words: Vec<String> = words.collect();
    (!words.is_empty()).then(|| words.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_happened_is_said() {
        assert_eq!(text(&Survived::default()), None);
        let survived = Survived { power_losses: 1, agent_restarts: 3, fleet_failures: 99, ..Survived::default() };
        assert_eq!(text(&survived).unwrap(), "1 loss of power, 3 restarts of the agent");
    }
}
