-- Format 1. 64-bit unsigned numbers are kept with the same bits as SQLite's signed ones and compared in the program.
CREATE TABLE devices (
    id TEXT PRIMARY KEY,
    key_id TEXT,
    key_pem TEXT,
    groups TEXT NOT NULL,
    enrolled_at INTEGER,
    last_seen INTEGER,
    last_poll INTEGER NOT NULL DEFAULT 0,
    last_number INTEGER NOT NULL DEFAULT 0
) STRICT;

CREATE TABLE tokens (
    hash TEXT PRIMARY KEY,
    device TEXT,
    groups TEXT,
    expires INTEGER NOT NULL,
    used_by TEXT
) STRICT;

CREATE TABLE manifests (
    kind TEXT NOT NULL CHECK (kind IN ('device', 'group')),
    name TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    digest TEXT NOT NULL,
    envelope BLOB NOT NULL,
    stored_at INTEGER NOT NULL,
    PRIMARY KEY (kind, name)
) STRICT;

CREATE TABLE reports (
    row INTEGER PRIMARY KEY AUTOINCREMENT,
    device TEXT NOT NULL,
    number INTEGER NOT NULL,
    received_at INTEGER NOT NULL,
    envelope BLOB NOT NULL,
    json TEXT NOT NULL
) STRICT;

CREATE INDEX reports_by_device ON reports (device, row);
