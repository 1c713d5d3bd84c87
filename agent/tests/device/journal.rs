//! Under systemd the agent writes to the journal: a real journald, in a mount namespace with a /run of its own.

use std::fs;
use std::process::Command;

use serde_json::Value;

const SCRIPT: &str = r#"
set -eu
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/journal /run/log/journal
/lib/systemd/systemd-journald >/dev/null 2>&1 &
journald=$!
until [ -S /run/systemd/journal/socket ]; do kill -0 $journald; done
JOURNAL_STREAM=1:1 "$1" --root "$2" --config "$2/agent.toml" >/dev/null 2>&1 &
edged=$!
until [ -S "$2/run/agent.sock" ]; do kill -0 $edged; done
kill -TERM $edged; wait $edged || true
journalctl --sync 2>/dev/null || true
journalctl --directory /run/log/journal --no-pager -o json SYSLOG_IDENTIFIER=edged
kill $journald
"#;

#[test]
fn the_journal_has_the_agents_words_as_fields() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("agent.toml"), "[device]\nid = \"j\"\n[network]\nmode = \"none\"\n").unwrap();
    let mut unshare = Command::new("unshare");
    unshare.args(["--mount", "--propagation", "private", "sh", "-c", SCRIPT, "sh", env!("CARGO_BIN_EXE_edged")]);
    let output = unshare.arg(dir.path()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let entries: Vec<Value> = said.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let start = entries.iter().find(|entry| entry["MESSAGE"].as_str().is_some_and(|text| text.contains("starts")));
    let start = start.unwrap_or_else(|| panic!("{said}\n{}", String::from_utf8_lossy(&output.stderr)));
    assert_eq!(start["PRIORITY"], "5", "{start:#}");
    assert_eq!(start["F_BY"], "agent", "{start:#}");
}
