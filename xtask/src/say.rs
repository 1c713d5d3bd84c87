//! What xtask tells people while it works.

pub fn step(text: &str) {
    println!("\x1b[1m==> {text}\x1b[0m");
}

pub fn done(text: &str) {
    println!("{text}");
}
