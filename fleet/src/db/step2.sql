-- Format 2: trust roots by version. Versions are small numbers: one above 2^63 is refused before it comes here.
CREATE TABLE trust_roots (
    version INTEGER PRIMARY KEY,
    digest TEXT NOT NULL,
    envelope BLOB NOT NULL,
    stored_at INTEGER NOT NULL
) STRICT;
