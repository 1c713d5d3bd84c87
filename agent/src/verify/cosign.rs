//! Image signatures as cosign writes them.
