#![cfg_attr(not(test), forbid(unsafe_code))]
