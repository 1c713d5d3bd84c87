use super::bpf::{AND, IF_EQUAL, IF_GREATER, IF_GREATER_OR_EQUAL, JUMP, LOAD, RETURN};
use super::*;
use proptest::prelude::*;

/// What the kernel would do with the filter.
fn play(filter: &[u8], audit: u32, number: u32, arguments: [u64; 6]) -> u32 {
    let mut data = Vec::new();
    data.extend(number.to_ne_bytes());
    data.extend(audit.to_ne_bytes());
    data.extend(0_u64.to_ne_bytes());
    data.extend(arguments.iter().flat_map(|argument| argument.to_ne_bytes()));
    let (mut place, mut value) = (0, 0);
    loop {
        let at = &filter[place * 8..place * 8 + 8];
        let code = u16::from_ne_bytes([at[0], at[1]]);
        let k = u32::from_ne_bytes(at[4..8].try_into().unwrap());
        place += 1;
        let mut branch = |yes: bool| place += usize::from(if yes { at[2] } else { at[3] });
        match code {
            LOAD => value = u32::from_ne_bytes(data[k as usize..k as usize + 4].try_into().unwrap()),
            AND => value &= k,
            IF_EQUAL => branch(value == k),
            IF_GREATER => branch(value > k),
            IF_GREATER_OR_EQUAL => branch(value >= k),
            JUMP => place += k as usize,
            RETURN => return k,
            other => panic!("{other:#x}"),
        }
    }
}

const ALLOW: u32 = 0x7fff_0000;
const X86_64: u32 = 0xc000_003e;

fn profile(json: &str) -> LinuxSeccomp {
    serde_json::from_str(json).unwrap()
}

#[test]
fn the_default_profile_compiles_within_the_kernels_bound() {
    let filter = default_filter().unwrap();
    assert_eq!(filter.len() % 8, 0);
    assert!(!filter.is_empty() && filter.len() / 8 <= bpf::MAX_INSTRUCTIONS, "{} instructions", filter.len() / 8);
}

#[test]
fn what_leads_out_is_not_on_the_list() {
    let profile: LinuxSeccomp = serde_json::from_str(DEFAULT_PROFILE).unwrap();
    let allowed: Vec<_> =
        profile.syscalls().iter().flatten().flat_map(|group| group.names().iter().map(String::as_str)).collect();
    for name in [
        "mount",
        "umount2",
        "pivot_root",
        "unshare",
        "setns",
        "bpf",
        "ptrace",
        "kexec_load",
        "init_module",
        "finit_module",
        "keyctl",
        "add_key",
        "request_key",
        "open_by_handle_at",
        "reboot",
        "swapon",
        "clone3",
        "io_uring_setup",
        "userfaultfd",
        "perf_event_open",
        "move_mount",
        "fsopen",
        "open_tree",
        "mount_setattr",
    ] {
        assert!(!allowed.contains(&name), "{name}");
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn actions_architectures_and_conditions() {
    let profile = profile(
        r#"{
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            {"names": ["read", "write", "no_such_call"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 40, "op": "SCMP_CMP_NE"}]},
            {"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 0, "op": "SCMP_CMP_EQ"},
                {"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]},
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW",
                "args": [{"index": 0, "value": 2114060288, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]},
            {"names": ["kill"], "action": "SCMP_ACT_KILL_PROCESS"},
            {"names": ["ptrace"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}
        ]}"#,
    );
    let filter = compile(&profile).unwrap();
    let call = |number, first| play(&filter, X86_64, number, [first, 0, 0, 0, 0, 0]);
    let (enosys, eperm) = (0x0005_0026, 0x0005_0001);
    assert_eq!([call(0, 0), call(1, 0), call(2, 0), call(0xffff_ffff, 0)], [ALLOW, ALLOW, enosys, enosys]);
    assert_eq!([call(41, 2), call(41, 40), call(41, 40 | 1 << 32)], [ALLOW, enosys, ALLOW]);
    assert_eq!([call(135, 0), call(135, 8), call(135, 3)], [ALLOW, ALLOW, enosys]);
    assert_eq!([call(56, 0x11), call(56, 0x1000_0000)], [ALLOW, enosys]);
    assert_eq!([call(62, 0), call(101, 0)], [0x8000_0000, eperm]);
    // x86: read is 3. x32: the default. Another machine's: the end.
    assert_eq!(play(&filter, 0x4000_0003, 3, [0; 6]), ALLOW);
    assert_eq!(play(&filter, X86_64, 0x4000_0000, [0; 6]), enosys);
    assert_eq!(play(&filter, 0xc000_00b7, 0, [0; 6]), 0x8000_0000);
}

#[test]
fn a_listener_must_be_able_to_answer() {
    let notify = |default: &str, path: &str, call: &str| {
        profile(&format!(
            r#"{{"defaultAction": "{default}", {path} "syscalls": [{{"names": ["{call}"], "action": "SCMP_ACT_NOTIFY"}}]}}"#
        ))
    };
    let path = r#""listenerPath": "/run/listener","#;
    let refused = |profile: &LinuxSeccomp| compile(profile).unwrap_err().to_string();
    assert!(refused(&notify("SCMP_ACT_ALLOW", "", "mount")).contains("listenerPath"));
    assert!(refused(&notify("SCMP_ACT_ALLOW", path, "sendmsg")).contains("sendmsg"));
    assert!(refused(&notify("SCMP_ACT_NOTIFY", path, "mount")).contains("default"));
    let asks = notify("SCMP_ACT_ALLOW", path, "mkdir");
    assert!(asks_a_listener(&asks));
    #[cfg(target_arch = "x86_64")]
    assert_eq!(play(&compile(&asks).unwrap(), X86_64, 83, [0; 6]), 0x7fc0_0000);
}

fn holds(op: u8, argument: u64, value: u64, two: u64) -> bool {
    match op {
        0 => argument == value,
        1 => argument != value,
        2 => argument < value,
        3 => argument <= value,
        4 => argument > value,
        5 => argument >= value,
        _ => argument & value == two,
    }
}

#[cfg(target_arch = "x86_64")]
proptest! {
    #[test]
    fn comparisons_are_those_of_the_processor(
        op in 0..7_u8,
        argument in prop_oneof![any::<u64>(), 0..4_u64, (0..3_u64).prop_map(|n| n << 32)],
        value in prop_oneof![any::<u64>(), 0..4_u64, (0..3_u64).prop_map(|n| n << 32)],
        two in prop_oneof![any::<u64>(), 0..4_u64],
    ) {
        let name = ["EQ", "NE", "LT", "LE", "GT", "GE", "MASKED_EQ"][usize::from(op)];
        let profile = profile(&format!(
            r#"{{"defaultAction": "SCMP_ACT_KILL", "syscalls": [{{"names": ["read"], "action": "SCMP_ACT_ALLOW",
            "args": [{{"index": 3, "value": {value}, "valueTwo": {two}, "op": "SCMP_CMP_{name}"}}]}}]}}"#
        ));
        let filter = compile(&profile).unwrap();
        let got = play(&filter, X86_64, 0, [7, 7, 7, argument, 7, 7]);
        prop_assert_eq!(got == ALLOW, holds(op, argument, value, two));
    }
}
