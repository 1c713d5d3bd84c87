//! Names of system calls to their numbers, per architecture: tables sorted by the compiler, searched by halves. The
//! crate's own look-up compares with one name after the other, which for a filter of 300 names takes longer than
//! starting the container.

/// A sorted table of one architecture's `Sysno`.
macro_rules! table {
    ($name:ident, $arch:ident) => {
        static $name: [(&str, u32); syscalls::$arch::Sysno::count()] = {
            let mut table = [("", 0); syscalls::$arch::Sysno::count()];
            let mut one = Some(syscalls::$arch::Sysno::first());
            let mut length = 0;
            while let Some(call) = one {
                let entry = (call.name(), call.id() as u32);
                let mut place = length;
                while place > 0 && is_less(entry.0, table[place - 1].0) {
                    table[place] = table[place - 1];
                    place -= 1;
                }
                table[place] = entry;
                length += 1;
                one =
                    if length < table.len() { after(call.id() + 1, syscalls::$arch::Sysno::last().id()) } else { None };
                const fn after(mut id: i32, last: i32) -> Option<syscalls::$arch::Sysno> {
                    while id <= last {
                        if let Some(call) = syscalls::$arch::Sysno::new(id as usize) {
                            return Some(call);
                        }
                        id += 1;
                    }
                    None
                }
            }
            table
        };
    };
}

const fn is_less(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut place = 0;
    while place < a.len() && place < b.len() {
        if a[place] != b[place] {
            return a[place] < b[place];
        }
        place += 1;
    }
    a.len() < b.len()
}

table!(X86_64, x86_64);
table!(X86, x86);
table!(AARCH64, aarch64);
table!(ARM, arm);

pub type Table = &'static [(&'static str, u32)];

pub fn x86_64() -> Table {
    &X86_64
}

pub fn x86() -> Table {
    &X86
}

pub fn aarch64() -> Table {
    &AARCH64
}

pub fn arm() -> Table {
    &ARM
}

/// 32-bit ARM's own calls, which the table does not have (arch/arm/include/uapi/asm/unistd.h): without `set_tls` no
/// program of a C library gets as far as `main`.
const ARM_PRIVATE: [(&str, u32); 6] = [
    ("breakpoint", 0x0f_0001),
    ("cacheflush", 0x0f_0002),
    ("usr26", 0x0f_0003),
    ("usr32", 0x0f_0004),
    ("set_tls", 0x0f_0005),
    ("get_tls", 0x0f_0006),
];

pub fn number(table: Table, name: &str) -> Option<u32> {
    if std::ptr::eq(table, arm())
        && let Some((_, number)) = ARM_PRIVATE.iter().find(|(known, _)| *known == name)
    {
        return Some(*number);
    }
    let look_up = |name: &str| table.binary_search_by(|(known, _)| (*known).cmp(name)).ok();
    // The table calls the 64-bit ARM one `fstatat`, which the kernel and every profile call `newfstatat`
    // (asm-generic/unistd.h): without it no program of a C library runs there.
    let other_name = match name {
        "newfstatat" => "fstatat",
        "sync_file_range2" => "arm_sync_file_range",
        _ => name,
    };
    look_up(name).or_else(|| look_up(other_name)).map(|place| table[place].1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_every_program_of_a_64_bit_machine_calls_is_known_by_name() {
        for table in [x86_64(), aarch64()] {
            for name in ["newfstatat", "statx", "openat", "read", "mmap", "mprotect", "futex", "fcntl", "lseek"] {
                assert!(number(table, name).is_some(), "{name}");
            }
        }
        assert_eq!(number(aarch64(), "newfstatat"), Some(79));
    }

    #[test]
    fn what_every_program_of_32_bit_arm_calls_is_known_by_name() {
        let common = ["set_tls", "cacheflush", "rseq", "set_robust_list", "set_tid_address", "ugetrlimit", "mmap2"];
        for name in common.into_iter().chain(["fstat64", "statx", "clock_gettime64", "futex_time64", "_llseek"]) {
            assert!(number(arm(), name).is_some(), "{name}");
        }
        assert_eq!((number(arm(), "set_tls"), number(x86_64(), "set_tls")), (Some(0xf_0005), None));
    }

    #[test]
    fn tables_are_sorted_and_right() {
        for table in [x86_64(), x86(), aarch64(), arm()] {
            assert!(table.windows(2).all(|pair| pair[0].0 < pair[1].0), "{table:?}");
            assert!(table.len() > 250);
        }
        assert_eq!(number(x86_64(), "read"), Some(0));
        assert_eq!((number(x86(), "read"), number(aarch64(), "read")), (Some(3), Some(63)));
        assert_eq!((number(arm(), "openat"), number(x86_64(), "fly")), (Some(322), None));
        for call in syscalls::x86_64::Sysno::iter() {
            assert_eq!(number(x86_64(), call.name()), u32::try_from(call.id()).ok());
        }
    }
}
