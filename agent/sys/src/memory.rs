//! What the allocator keeps of memory that nobody uses (malloc_trim(3)). It gives back by itself only what lies at the end of
//! its heap, and a burst of work leaves holes in the middle.

/// Gives whole free pages back to the kernel. Costs a walk over the free parts of the heap, a millisecond or so: for
/// moments after much was done, on a thread for which nobody waits.
pub fn give_back() {
    // SAFETY: takes the allocator's own locks, and touches nothing that is in use.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    /// Of this process, in pages (proc_pid_statm(5)).
    fn resident_pages() -> u64 {
        let text = std::fs::read_to_string("/proc/self/statm").unwrap();
        text.split(' ').nth(1).unwrap().parse().unwrap()
    }

    #[test]
    fn holes_in_the_heap_go_back() {
        // Small enough to lie in the heap, every hundredth kept so that its end cannot go down.
        let all: Vec<Vec<u8>> = (0..40_000_u32).map(|number| vec![number as u8; 1000]).collect();
        let full = resident_pages();
        let kept: Vec<Vec<u8>> =
            all.into_iter().enumerate().filter(|(number, _)| number % 100 == 0).map(|(_, one)| one).collect();
        super::give_back();
        let left = resident_pages();
        assert!(full - left > 5000, "{full} pages before, {left} after, {} kept", kept.len());
    }
}
