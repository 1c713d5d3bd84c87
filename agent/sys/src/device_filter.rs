//! Which devices the members of a cgroup v2 may open: a BPF program of type `CGROUP_DEVICE`, made from a list of rules
//! (Documentation/admin-guide/cgroup-v2.rst, "Device controller"; bpf(2)). The last rule that matches decides; what no
//! rule matches is denied.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// One rule; `None` stands for all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceRule {
    pub allow: bool,
    /// `b` or `c`.
    pub kind: Option<char>,
    pub major: Option<u32>,
    pub minor: Option<u32>,
    pub read: bool,
    pub write: bool,
    pub mknod: bool,
}

/// `struct bpf_insn` (linux/bpf.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    code: u8,
    /// Destination in the low four bits, source in the high ones.
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn instruction(code: u8, registers: u8, offset: i16, immediate: i32) -> Instruction {
    let registers = if cfg!(target_endian = "big") { registers.rotate_left(4) } else { registers };
    Instruction { code, registers, offset, immediate }
}

/// BPF_LDX | BPF_MEM | BPF_W.
const LOAD_WORD: u8 = 0x61;
/// BPF_ALU | BPF_AND | BPF_K, BPF_ALU | BPF_RSH | BPF_K, BPF_ALU | BPF_MOV | BPF_X.
const AND: u8 = 0x54;
const SHIFT_RIGHT: u8 = 0x74;
const MOVE: u8 = 0xbc;
/// BPF_ALU64 | BPF_MOV | BPF_K, BPF_JMP | BPF_JNE | BPF_K, BPF_JMP | BPF_EXIT.
const MOVE_NUMBER: u8 = 0xb7;
const JUMP_IF_NOT: u8 = 0x55;
const EXIT: u8 = 0x95;

/// BPF_DEVCG_ACC_* and BPF_DEVCG_DEV_*.
const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;

/// The program: r2 = type, r3 = access, r4 = major, r5 = minor; then the rules from the last to the first.
pub fn compile(rules: &[DeviceRule]) -> Vec<Instruction> {
    let mut program = vec![
        // struct bpf_cgroup_dev_ctx { access_type: access << 16 | type, major, minor }
        instruction(LOAD_WORD, 0x12, 0, 0),
        instruction(AND, 0x02, 0, 0xffff),
        instruction(LOAD_WORD, 0x13, 0, 0),
        instruction(SHIFT_RIGHT, 0x03, 0, 16),
        instruction(LOAD_WORD, 0x14, 4, 0),
        instruction(LOAD_WORD, 0x15, 8, 0),
    ];
    for rule in rules.iter().rev() {
        program.extend(block(rule));
        if rule.kind.is_none() && rule.major.is_none() && rule.minor.is_none() && rule.read && rule.write && rule.mknod
        {
            // It matches everything: nothing before it counts.
            return program;
        }
    }
    program.extend(verdict(false));
    program
}

fn verdict(allow: bool) -> [Instruction; 2] {
    [instruction(MOVE_NUMBER, 0x00, 0, i32::from(allow)), instruction(EXIT, 0, 0, 0)]
}

/// The checks of one rule; each that fails jumps behind the verdict.
fn block(rule: &DeviceRule) -> Vec<Instruction> {
    let mut checks = Vec::new();
    let mut check = |register: u8, value: i32| checks.push(instruction(JUMP_IF_NOT, register, 0, value));
    if let Some(kind) = rule.kind {
        check(2, if kind == 'b' { BLOCK } else { CHARACTER });
    }
    if let Some(major) = rule.major {
        check(4, major as i32);
    }
    if let Some(minor) = rule.minor {
        check(5, minor as i32);
    }
    let granted = [(rule.read, READ), (rule.write, WRITE), (rule.mknod, MKNOD)];
    let access = granted.iter().filter(|(given, _)| *given).fold(0, |all, (_, bit)| all | bit);
    if access != READ | WRITE | MKNOD {
        // An allow holds if nothing but what it gives is asked; a deny if anything of it is.
        checks.push(instruction(MOVE, 0x31, 0, 0));
        let mask = if rule.allow { !access & (READ | WRITE | MKNOD) } else { access };
        checks.push(instruction(AND, 0x01, 0, mask));
        if rule.allow {
            checks.push(instruction(JUMP_IF_NOT, 1, 0, 0));
        } else {
            // BPF_JEQ: none of it is asked.
            checks.push(instruction(0x15, 1, 0, 0));
        }
    }
    let end = checks.len() + 2;
    for (place, check) in checks.iter_mut().enumerate() {
        if check.code == JUMP_IF_NOT || check.code == 0x15 {
            check.offset = i16::try_from(end - place - 1).unwrap_or(0);
        }
    }
    checks.extend(verdict(rule.allow));
    checks
}

/// `union bpf_attr` for BPF_PROG_LOAD, as far as it is needed.
#[repr(C, align(8))]
struct Load {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

/// `union bpf_attr` for BPF_PROG_ATTACH.
#[repr(C, align(8))]
struct Attach {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
    replaced: u32,
    _pad: u32,
}

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_OVERRIDE: u32 = 1;

/// Makes `rules` those of the cgroup v2 that `directory` is. Rules it had before are replaced; those of its parents
/// hold as well.
pub fn attach(directory: BorrowedFd<'_>, rules: &[DeviceRule]) -> io::Result<()> {
    let program = compile(rules);
    let license = c"Apache-2.0";
    let load = Load {
        program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: program.as_ptr().expose_provenance() as u64,
        license: license.as_ptr().expose_provenance() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
    };
    // SAFETY: `load` and the program and text it points at live across the call; the kernel only reads them, and checks
    // every instruction.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const load, size_of::<Load>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let number = i32::try_from(result).map_err(io::Error::other)?;
    // SAFETY: BPF_PROG_LOAD gave a new descriptor that nobody else has.
    let loaded = unsafe { OwnedFd::from_raw_fd(number) };
    let attach = Attach {
        target: directory.as_raw_fd().unsigned_abs(),
        program: loaded.as_raw_fd().unsigned_abs(),
        kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_OVERRIDE,
        replaced: 0,
        _pad: 0,
    };
    // SAFETY: `attach` lives across the call, which reads it and keeps no pointer.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attach, size_of::<Attach>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: DeviceRule =
        DeviceRule { allow: false, kind: None, major: None, minor: None, read: true, write: true, mknod: true };

    /// What the kernel would do with the program: few enough instructions to play them.
    fn decide(rules: &[DeviceRule], kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let program = compile(rules);
        let mut registers = [0_i32; 6];
        let mut place = 0;
        loop {
            let Instruction { code, registers: pair, offset, immediate } = program[place];
            let (to, from) = (usize::from(pair & 0xf), usize::from(pair >> 4));
            place += 1;
            let jump = |yes: bool| if yes { usize::try_from(offset).unwrap() } else { 0 };
            match code {
                LOAD_WORD => registers[to] = [access << 16 | kind, major, minor][usize::try_from(offset).unwrap() / 4],
                AND => registers[to] &= immediate,
                SHIFT_RIGHT => registers[to] >>= immediate,
                MOVE => registers[to] = registers[from],
                MOVE_NUMBER => registers[to] = immediate,
                JUMP_IF_NOT => place += jump(registers[to] != immediate),
                0x15 => place += jump(registers[to] == immediate),
                EXIT => return registers[0] != 0,
                other => panic!("{other:#x}"),
            }
        }
    }

    #[test]
    fn the_last_rule_that_matches_decides() {
        let null = DeviceRule { allow: true, kind: Some('c'), major: Some(1), minor: Some(3), ..ALL };
        let read_disk = DeviceRule { allow: true, kind: Some('b'), major: Some(8), write: false, mknod: false, ..ALL };
        let rules = [ALL, null, read_disk];
        assert!(decide(&rules, CHARACTER, READ | WRITE, 1, 3));
        assert!(!decide(&rules, CHARACTER, READ, 1, 5));
        assert!(!decide(&rules, BLOCK, READ, 1, 3));
        assert!(decide(&rules, BLOCK, READ, 8, 7));
        assert!(!decide(&rules, BLOCK, READ | WRITE, 8, 7));
        let no_writes = DeviceRule { read: false, mknod: false, ..ALL };
        let rules = [DeviceRule { allow: true, ..ALL }, no_writes];
        assert!(decide(&rules, BLOCK, READ, 8, 7));
        assert!(!decide(&rules, BLOCK, READ | WRITE, 8, 7));
        assert!(!decide(&[], BLOCK, READ, 8, 7), "what no rule matches is denied");
    }
}
