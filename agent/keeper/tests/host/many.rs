//! Many containers: at once, again at once, and one after the other until some exit would be lost if any could be.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use edged_model::keeper::{ReplyBody, RequestBody};
use nix::sys::signal::Signal;

use crate::Story;
use crate::rig::{Link, Rig};

pub const STORIES: &[Story] = &[
    ("launches_without_number_lose_no_exit", launches_without_number_lose_no_exit),
    ("two_hundred_start_at_once_and_again_at_once", two_hundred_start_at_once_and_again_at_once),
];

/// Starts in an ordinary run; `EDGED_STARTS` asks for others.
const STARTS: u32 = 2_000;
/// Under way at a time.
const WINDOW: usize = 8;
const AT_ONCE: u32 = 200;

/// Keeps a core busy until it is dropped.
struct BusyCore {
    goes_on: &'static AtomicBool,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl BusyCore {
    fn start() -> Self {
        static GOES_ON: AtomicBool = AtomicBool::new(true);
        GOES_ON.store(true, Ordering::Relaxed);
        let spin = || {
            while GOES_ON.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        };
        Self { goes_on: &GOES_ON, thread: Some(std::thread::spawn(spin)) }
    }
}

impl Drop for BusyCore {
    fn drop(&mut self) {
        self.goes_on.store(false, Ordering::Relaxed);
        self.thread.take().map(std::thread::JoinHandle::join);
    }
}

/// Every launch is answered, every end is told once with its own code, and nothing is left.
fn launches_without_number_lose_no_exit() {
    let starts = std::env::var("EDGED_STARTS").map_or(STARTS, |text| text.parse().expect("EDGED_STARTS is a number"));
    let _busy = BusyCore::start();
    let (rig, mut link) = Rig::start();
    let begin = Instant::now();
    let code = |number: u32| i32::try_from(number % 200).unwrap();
    let mut open = BTreeMap::new();
    let mut next = 0;
    let mut told = 0;
    while told < starts {
        while next < starts && open.len() < WINDOW {
            let key = format!("quick-{next}");
            let mut spec = rig.spec(&key, "");
            spec.argv = vec!["sh".into(), "-c".into(), format!("exit {}", code(next))];
            link.send(RequestBody::Launch(Box::new(spec)), &[]);
            open.insert(key, code(next));
            next += 1;
        }
        match link.next_of_any_kind() {
            ReplyBody::Launched { .. } | ReplyBody::Done => {}
            ReplyBody::Exited(exit) => {
                assert_eq!(open.remove(&exit.key), exit.code, "told twice, or another's: {exit:?}");
                told += 1;
                if told % 500 == 0 {
                    link.send(RequestBody::Heartbeat, &[]);
                }
                link.send(RequestBody::Forget { key: exit.key }, &[]);
            }
            other => panic!("{other:?}"),
        }
    }
    println!("  {starts} launches, {WINDOW} at a time, a busy core beside them: {:?} each", begin.elapsed() / starts);
    assert!(link.list_after_all_answers().is_empty());
}

fn two_hundred_start_at_once_and_again_at_once() {
    let (rig, mut link) = Rig::start();
    let keys: Vec<String> = (0..AT_ONCE).map(|number| format!("many-{number}")).collect();
    let start_all = |link: &mut Link| {
        let begin = Instant::now();
        for key in &keys {
            link.send(RequestBody::Launch(Box::new(rig.spec(key, "exec sleep 1000"))), &[]);
        }
        for _ in &keys {
            let answer = link.next_of_any_kind();
            assert!(matches!(answer, ReplyBody::Launched { .. }), "{answer:?}");
        }
        begin.elapsed()
    };
    let first = start_all(&mut link);
    for key in &keys {
        link.send(RequestBody::Signal { key: key.clone(), signal: Signal::SIGKILL as i32 }, &[]);
    }
    let (mut done, mut ended) = (0, 0);
    while done < keys.len() || ended < keys.len() {
        match link.next_of_any_kind() {
            ReplyBody::Done => done += 1,
            ReplyBody::Exited(exit) => {
                assert_eq!(exit.signal, Some(Signal::SIGKILL as i32));
                ended += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    for key in &keys {
        link.send(RequestBody::Forget { key: key.clone() }, &[]);
    }
    for _ in &keys {
        assert!(matches!(link.next_of_any_kind(), ReplyBody::Done));
    }
    let again = start_all(&mut link);
    println!("  {AT_ONCE} at once run after {first:?}, and again after {again:?}");
    let living = link.list();
    assert_eq!(living.len(), keys.len());
    assert!(living.iter().all(|(child, _)| child.exit.is_none()));
}
