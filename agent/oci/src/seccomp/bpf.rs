//! The assembler: decisions per system call become classic BPF over `struct seccomp_data` (linux/seccomp.h).

use std::collections::BTreeMap;

/// BPF_MAXINSNS (linux/bpf_common.h).
pub const MAX_INSTRUCTIONS: usize = 4096;

/// `struct sock_filter` (linux/filter.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    pub code: u16,
    pub yes: u8,
    pub no: u8,
    pub number: u32,
}

impl Instruction {
    pub fn to_bytes(self) -> [u8; 8] {
        let mut bytes = [0; 8];
        bytes[..2].copy_from_slice(&self.code.to_ne_bytes());
        bytes[2] = self.yes;
        bytes[3] = self.no;
        bytes[4..].copy_from_slice(&self.number.to_ne_bytes());
        bytes
    }
}

/// BPF_LD | BPF_W | BPF_ABS, BPF_ALU | BPF_AND, BPF_JMP | BPF_JA, BPF_JEQ, BPF_JGT, BPF_JGE, BPF_RET.
pub const LOAD: u16 = 0x20;
pub const AND: u16 = 0x54;
pub const JUMP: u16 = 0x05;
pub const IF_EQUAL: u16 = 0x15;
pub const IF_GREATER: u16 = 0x25;
pub const IF_GREATER_OR_EQUAL: u16 = 0x35;
pub const RETURN: u16 = 0x06;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

/// `SECCOMP_RET_KILL_PROCESS`.
const KILL: u32 = 0x8000_0000;
const AUDIT_X86_64: u32 = 0xc000_003e;
const X32_BIT: u32 = 0x4000_0000;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    Return(u32),
    /// The first of these whose conditions all hold; if none, the default.
    Rules(Vec<(Vec<Condition>, u32)>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Condition {
    pub argument: u8,
    pub test: Test,
}

/// On 64 bits, unsigned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Test {
    Equal(u64),
    NotEqual(u64),
    Less(u64),
    LessOrEqual(u64),
    Greater(u64),
    GreaterOrEqual(u64),
    Masked { mask: u64, value: u64 },
}

const fn plain(code: u16, number: u32) -> Instruction {
    Instruction { code, yes: 0, no: 0, number }
}

/// One program for all `parts`: AUDIT_ARCH_* and what holds there.
pub fn assemble(parts: &[(u32, BTreeMap<u32, Decision>)], default: u32) -> Vec<Instruction> {
    let mut program = vec![plain(LOAD, ARCHITECTURE)];
    for (audit, calls) in parts {
        let mut body = vec![plain(LOAD, NUMBER)];
        if *audit == AUDIT_X86_64 {
            body.push(Instruction { code: IF_GREATER_OR_EQUAL, yes: 0, no: 1, number: X32_BIT });
            body.push(plain(RETURN, default));
        }
        body.extend(search(&segments(calls, default), default));
        program.push(Instruction { code: IF_EQUAL, yes: 1, no: 0, number: *audit });
        program.push(plain(JUMP, length(&body)));
        program.extend(body);
    }
    program.push(plain(RETURN, KILL));
    program
}

fn length(code: &[Instruction]) -> u32 {
    u32::try_from(code.len()).unwrap_or(u32::MAX)
}

/// Ranges of numbers, by their first, that are decided alike; together they are all numbers.
fn segments(calls: &BTreeMap<u32, Decision>, default: u32) -> Vec<(u32, Decision)> {
    let mut segments = vec![(0, Decision::Return(default))];
    let mut put = |first: u32, decision: Decision| {
        if segments.last().is_some_and(|(start, _)| *start == first) {
            segments.pop();
        }
        if segments.last().is_none_or(|(_, last)| *last != decision) {
            segments.push((first, decision));
        }
    };
    for (number, decision) in calls {
        put(*number, decision.clone());
        if let Some(next) = number.checked_add(1) {
            put(next, Decision::Return(default));
        }
    }
    segments
}

fn search(segments: &[(u32, Decision)], default: u32) -> Vec<Instruction> {
    match segments {
        [] => vec![plain(RETURN, default)],
        [(_, Decision::Return(action))] => vec![plain(RETURN, *action)],
        [(_, Decision::Rules(rules))] => check_rules(rules, default),
        _ => {
            let (low, high) = segments.split_at(segments.len() / 2);
            let left = search(low, default);
            let first = high[0].0;
            let mut code = match u8::try_from(left.len()) {
                Ok(length) => vec![Instruction { code: IF_GREATER_OR_EQUAL, yes: length, no: 0, number: first }],
                Err(_) => vec![
                    Instruction { code: IF_GREATER_OR_EQUAL, yes: 0, no: 1, number: first },
                    plain(JUMP, length(&left)),
                ],
            };
            code.extend(left);
            code.extend(search(high, default));
            code
        }
    }
}

fn check_rules(rules: &[(Vec<Condition>, u32)], default: u32) -> Vec<Instruction> {
    let mut code = Vec::new();
    for (conditions, action) in rules {
        code.extend(check_rule(conditions, *action));
    }
    code.push(plain(RETURN, default));
    code
}

/// Where a comparison leads.
#[derive(Clone, Copy)]
enum Way {
    /// The next instruction.
    On,
    /// The condition holds.
    Holds,
    /// The rule does not hold.
    Fails,
}

fn check_rule(conditions: &[Condition], action: u32) -> Vec<Instruction> {
    let mut steps: Vec<(Instruction, Way, Way, usize)> = Vec::new();
    for condition in conditions {
        let part = steps_of(condition);
        let end = steps.len() + part.len();
        steps.extend(part.into_iter().map(|(instruction, yes, no)| (instruction, yes, no, end)));
    }
    // Behind the action.
    let fails = steps.len() + 1;
    let mut code: Vec<_> = steps
        .iter()
        .enumerate()
        .map(|(place, (instruction, yes, no, holds))| {
            let jump = |way: Way| match way {
                Way::On => 0,
                Way::Holds => holds - place - 1,
                Way::Fails => fails - place - 1,
            };
            // Six arguments, seven instructions each at most: it fits.
            let short = |way| u8::try_from(jump(way)).unwrap_or(u8::MAX);
            if instruction.code == LOAD || instruction.code == AND {
                *instruction
            } else {
                Instruction { yes: short(*yes), no: short(*no), ..*instruction }
            }
        })
        .collect();
    code.push(plain(RETURN, action));
    code
}

fn steps_of(condition: &Condition) -> Vec<(Instruction, Way, Way)> {
    let words = |value: u64| ((value >> 32) as u32, value as u32);
    let base = ARGUMENTS + 8 * u32::from(condition.argument);
    let (low_at, high_at) = if cfg!(target_endian = "little") { (base, base + 4) } else { (base + 4, base) };
    let load = |at| (plain(LOAD, at), Way::On, Way::On);
    let test = |code, number, yes, no| (plain(code, number), yes, no);
    // The high words differ: decided. They are equal: the low words decide.
    let compare = |value, code, if_yes, if_no| {
        let (high, low) = words(value);
        let (above, below) = match code {
            IF_EQUAL => (if_no, if_no),
            _ => (if_yes, if_no),
        };
        let mut steps = vec![load(high_at)];
        if code != IF_EQUAL {
            steps.push(test(IF_GREATER, high, above, Way::On));
        }
        steps.push(test(IF_EQUAL, high, Way::On, below));
        steps.push(load(low_at));
        steps.push(test(code, low, if_yes, if_no));
        steps
    };
    use Way::{Fails, Holds};
    match condition.test {
        Test::Equal(value) => compare(value, IF_EQUAL, Holds, Fails),
        Test::NotEqual(value) => compare(value, IF_EQUAL, Fails, Holds),
        Test::Greater(value) => compare(value, IF_GREATER, Holds, Fails),
        Test::GreaterOrEqual(value) => compare(value, IF_GREATER_OR_EQUAL, Holds, Fails),
        Test::Less(value) => compare(value, IF_GREATER_OR_EQUAL, Fails, Holds),
        Test::LessOrEqual(value) => compare(value, IF_GREATER, Fails, Holds),
        Test::Masked { mask, value } => {
            let ((mask_high, mask_low), (high, low)) = (words(mask), words(value));
            vec![
                load(high_at),
                (plain(AND, mask_high), Way::On, Way::On),
                test(IF_EQUAL, high, Way::On, Fails),
                load(low_at),
                (plain(AND, mask_low), Way::On, Way::On),
                test(IF_EQUAL, low, Holds, Fails),
            ]
        }
    }
}
