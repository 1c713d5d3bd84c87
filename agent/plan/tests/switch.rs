//! Single moments of a switch that a simulated history found to go wrong.

use std::collections::BTreeMap;

use edged_model::action::{Action, Plan};
use edged_model::generation::{Generation, GenerationState, Pointers};
use edged_model::id::{Digest, Sequence, WorkloadName};
use edged_model::manifest::{DependsOn, Manifest, RestartPolicy, Workload};
use edged_model::observed::{Capacity, Desired, ImageStatus, Instance, InstanceState, Observed};
use edged_model::quantity::{Bytes, MilliCpu, Now, Timestamp};
use edged_model::reason::{Code, Reason};
use edged_model::spec::Spec;
use edged_model::workload::{Exit, ExitCause};
use edged_plan::transition::step;

const IMAGE: &str = "r.example/image:1";
const NOW: Now = Now { boot_ms: 10_000, wall: Timestamp(0) };

fn name(text: &str) -> WorkloadName {
    WorkloadName::parse(text).unwrap()
}

fn workload(version: &str, memory: u64) -> Spec {
    let mut workload = Spec::from(Workload::of_image(IMAGE));
    workload.env.insert("VERSION".to_owned(), version.to_owned());
    workload.resources.memory = Some(Bytes(memory));
    workload.resources.cpu = Some(MilliCpu(1));
    workload
}

fn generation(n: u64, state: GenerationState, workloads: &[(&str, &Spec)]) -> Generation {
    let workloads = workloads.iter().map(|(text, workload)| (name(text), (*workload).clone())).collect();
    Generation {
        state,
        ..Generation::received(
            Manifest { sequence: Sequence(n), workloads, ..Manifest::empty() },
            Digest::of(&n.to_le_bytes()),
            Timestamp(0),
        )
    }
}

/// Generation 1 was good; generation 2 is being switched to.
fn switching(old: &[(&str, &Spec)], new: &[(&str, &Spec)]) -> Desired {
    let (old, new) = (generation(1, GenerationState::Good, old), generation(2, GenerationState::Activating, new));
    let pointers = Pointers { active: Some(Sequence(2)), last_good: Some(Sequence(1)), ..Pointers::default() };
    Desired { pointers, generations: BTreeMap::from([(Sequence(1), old), (Sequence(2), new)]), ..Desired::default() }
}

fn observed(workloads: &[(&str, InstanceState, &Spec)]) -> Observed {
    let instance = |state: &InstanceState, of: &Spec| Instance {
        state: state.clone(),
        spec: Some(of.digest()),
        ..Instance::default()
    };
    Observed {
        workloads: workloads.iter().map(|(text, state, of)| (name(text), instance(state, of))).collect(),
        images: BTreeMap::from([(IMAGE.to_owned(), ImageStatus::Ready { digest: Digest::of(b"image") })]),
        capacity: Capacity { memory_total: Bytes(100), cpu_total: MilliCpu(1000), ..Capacity::default() },
        active_since_boot_ms: Some(NOW.boot_ms),
        all_well_since_boot_ms: None,
        ..Observed::default()
    }
}

fn running() -> InstanceState {
    InstanceState::Running { pid: 7, since_boot_ms: 1 }
}

fn starts(plan: &Plan, text: &str) -> bool {
    plan.actions.iter().any(|action| matches!(action, Action::Start { workload, .. } if *workload == name(text)))
}

fn stops(plan: &Plan, text: &str) -> bool {
    plan.actions.iter().any(|action| matches!(action, Action::Stop { workload, .. } if *workload == name(text)))
}

#[test]
fn a_dependency_that_still_runs_as_it_was_does_not_count() {
    let (old, new) = (workload("1", 10), workload("2", 10));
    let mut user = workload("1", 10);
    user.depends_on.insert(name("db"), DependsOn::Started);
    let desired = switching(&[("db", &old)], &[("db", &new), ("user", &user)]);
    let plan = edged_plan::plan(&desired, &observed(&[("db", running(), &old)]), NOW);
    assert!(stops(&plan, "db") && !starts(&plan, "user"), "{plan:?}");
}

#[test]
fn one_that_crashed_and_waits_for_a_dependency_leaves_it_its_turn() {
    let (old, new) = (workload("1", 10), workload("2", 10));
    let (mut user_old, mut user_new) = (old.clone(), new.clone());
    for user in [&mut user_old, &mut user_new] {
        user.depends_on.insert(name("db"), DependsOn::Started);
    }
    let desired = switching(&[("db", &old), ("user", &user_old)], &[("db", &new), ("user", &user_new)]);
    let world = observed(&[("db", running(), &old), ("user", InstanceState::Ended, &user_old)]);
    assert!(stops(&edged_plan::plan(&desired, &world, NOW), "db"));
}

#[test]
fn a_job_that_is_done_holds_nobody_up() {
    let (old, new) = (workload("1", 10), workload("2", 10));
    let mut job = workload("1", 10);
    job.restart.policy = RestartPolicy::OnFailure;
    let desired = switching(&[("job", &job), ("web", &old)], &[("job", &job), ("web", &new)]);
    let mut world = observed(&[("job", InstanceState::Ended, &job), ("web", running(), &old)]);
    let history = &mut world.workloads.get_mut(&name("job")).unwrap().history;
    let cause = ExitCause::Code { code: 0 };
    history.last_exit = Some(Exit { cause, at: Timestamp(0), at_boot_ms: 5, ran_ms: 1, peak_memory: None });
    history.last_reason = Some(Reason::new(Code::Exited, "job ended"));
    assert!(stops(&edged_plan::plan(&desired, &world, NOW), "web"));
}

#[test]
fn what_grows_waits_until_what_shrinks_has_made_room() {
    let (small, large) = (workload("1", 20), workload("2", 70));
    let desired = switching(&[("a", &small), ("b", &large)], &[("a", &large), ("b", &small)]);
    let plan =
        edged_plan::plan(&desired, &observed(&[("a", InstanceState::Ended, &small), ("b", running(), &large)]), NOW);
    assert!(!starts(&plan, "a") && stops(&plan, "b"), "{plan:?}");
    let plan =
        edged_plan::plan(&desired, &observed(&[("a", InstanceState::Ended, &small), ("b", running(), &small)]), NOW);
    assert!(starts(&plan, "a"), "{plan:?}");
}

#[test]
fn a_record_that_cannot_be_written_does_not_delay_a_restart() {
    let web = workload("1", 10);
    let mut desired = switching(&[], &[("web", &web)]);
    let mut job = workload("1", 10);
    job.restart.policy = RestartPolicy::Always;
    desired.generations.get_mut(&Sequence(2)).unwrap().manifest.workloads.insert(name("job"), job.clone());
    // Both were started, so the generation goes into probation: that is to be written, and `job` is down.
    let plan =
        edged_plan::plan(&desired, &observed(&[("web", running(), &web), ("job", InstanceState::Ended, &job)]), NOW);
    let moves = plan.actions.iter().any(|action| matches!(action, Action::Transition { .. }));
    assert!(moves && starts(&plan, "job"), "{plan:?}");
}

/// Generation 2 is to take over; `web` runs as generation 1 has it, and crashes all the time.
fn taking_over(new: &[(&str, &Spec)], web: &Spec) -> (Desired, Observed) {
    let old = generation(1, GenerationState::Good, &[("web", web)]);
    let new = generation(2, GenerationState::Staged, new);
    let pointers = Pointers {
        active: Some(Sequence(1)),
        last_good: Some(Sequence(1)),
        candidate: Some(Sequence(2)),
        ..Pointers::default()
    };
    let generations = BTreeMap::from([(Sequence(1), old), (Sequence(2), new)]);
    let mut observed = observed(&[("web", InstanceState::Ended, web)]);
    observed.workloads.get_mut(&name("web")).unwrap().history.in_a_row = 40;
    (Desired { pointers, generations, ..Desired::default() }, observed)
}

fn take_over(desired: &mut Desired, observed: &Observed) {
    let why = Reason::new(Code::Activated, "test");
    let change = step(desired, observed, Sequence(2), GenerationState::Activating, &why, Timestamp(1)).unwrap();
    desired.pointers = change.pointers;
    let watched = |generation| Generation { state: GenerationState::Probation, ..generation };
    desired.generations.extend(change.generations.into_iter().map(|g| (g.sequence, watched(g))));
}

#[test]
fn a_generation_is_not_blamed_for_what_it_left_as_it_was() {
    let (web, other) = (workload("1", 10), workload("1", 10));
    let (mut desired, mut observed) = taking_over(&[("web", &web), ("other", &other)], &web);
    take_over(&mut desired, &observed);
    observed.workloads.get_mut(&name("web")).unwrap().history.in_a_row = 41;
    let rolls_back = |desired: &Desired, observed: &Observed| {
        let plan = edged_plan::plan(desired, observed, NOW);
        plan.actions.iter().any(|a| matches!(a, Action::Transition { to: GenerationState::RolledBack, .. }))
    };
    assert!(!rolls_back(&desired, &observed), "web crashed before, too");

    let changed = workload("2", 10);
    let (mut desired, mut observed) = taking_over(&[("web", &changed)], &web);
    take_over(&mut desired, &observed);
    observed.workloads.get_mut(&name("web")).unwrap().spec = Some(changed.digest());
    assert!(rolls_back(&desired, &observed), "this web is the new generation's");
}

fn resizes(plan: &Plan, workload: &str) -> bool {
    plan.actions.iter().any(|action| matches!(action, Action::Resize { workload: w, .. } if *w == name(workload)))
}

/// As [`observed`], and the runs are known without their limits too.
fn resizable(workloads: &[(&str, InstanceState, &Spec)]) -> Observed {
    let mut observed = observed(workloads);
    for (text, _, workload) in workloads {
        observed.workloads.get_mut(&name(text)).unwrap().frame = Some(workload.digest_without_limits());
    }
    observed
}

#[test]
fn what_changed_in_its_limits_alone_is_resized_and_not_stopped() {
    let (small, large, other) = (workload("1", 10), workload("1", 60), workload("2", 60));
    let desired = switching(&[("web", &small)], &[("web", &large)]);
    let plan = edged_plan::plan(&desired, &resizable(&[("web", running(), &small)]), NOW);
    assert!(resizes(&plan, "web") && !stops(&plan, "web"), "{plan:?}");
    // A run of which only the whole is known, and one that differs in more.
    let plan = edged_plan::plan(&desired, &observed(&[("web", running(), &small)]), NOW);
    assert!(!resizes(&plan, "web") && stops(&plan, "web"), "{plan:?}");
    let desired = switching(&[("web", &small)], &[("web", &other)]);
    let plan = edged_plan::plan(&desired, &resizable(&[("web", running(), &small)]), NOW);
    assert!(!resizes(&plan, "web") && stops(&plan, "web"), "{plan:?}");
}

#[test]
fn who_grows_waits_for_who_shrinks() {
    let (small, large) = (workload("1", 20), workload("1", 60));
    let desired = switching(&[("a", &small), ("b", &large)], &[("a", &large), ("b", &small)]);
    let plan = edged_plan::plan(&desired, &resizable(&[("a", running(), &small), ("b", running(), &large)]), NOW);
    assert!(!resizes(&plan, "a") && resizes(&plan, "b"), "{plan:?}");
    let plan = edged_plan::plan(&desired, &resizable(&[("a", running(), &small), ("b", running(), &small)]), NOW);
    assert!(resizes(&plan, "a"), "{plan:?}");
    // The order is given and not answered: nobody knows which of both limits it has.
    let mut under_way = resizable(&[("a", running(), &small), ("b", running(), &small)]);
    under_way.workloads.get_mut(&name("b")).unwrap().resizing = Some(large.digest());
    let plan = edged_plan::plan(&desired, &under_way, NOW);
    assert!(!resizes(&plan, "a"), "{plan:?}");
}

#[test]
fn two_that_would_wait_for_each_other_are_restarted() {
    let with = |memory, cpu| {
        let mut workload = workload("1", memory);
        workload.resources.cpu = Some(MilliCpu(cpu));
        workload
    };
    let (lean, fat) = (with(20, 60), with(60, 20));
    let desired = switching(&[("a", &lean), ("b", &fat)], &[("a", &fat), ("b", &lean)]);
    let mut observed = resizable(&[("a", running(), &lean), ("b", running(), &fat)]);
    observed.capacity.memory_total = Bytes(100);
    observed.capacity.cpu_total = MilliCpu(100);
    let plan = edged_plan::plan(&desired, &observed, NOW);
    assert!(!resizes(&plan, "a") && !resizes(&plan, "b") && (stops(&plan, "a") || stops(&plan, "b")), "{plan:?}");
}

/// A layer of it was damaged and taken away, and nobody starts anything from it now.
#[test]
fn what_one_returns_to_is_fetched_again_before_anybody_needs_it() {
    let (v1, v2) = (workload("1", 10), workload("2", 10));
    let mut other = v1.clone();
    other.image = "r.example/other:1".to_owned();
    let mut desired = switching(&[("a", &v1), ("gone", &other)], &[("a", &v2)]);
    let pulls = |desired: &Desired, observed: &Observed| -> Vec<String> {
        let plan = edged_plan::plan(desired, observed, NOW);
        let image = |action: Action| if let Action::Pull { image } = action { Some(image) } else { None };
        plan.actions.into_iter().filter_map(image).collect()
    };
    let mut seen = observed(&[("a", running(), &v2)]);
    assert_eq!(pulls(&desired, &seen), ["r.example/other:1"]);
    let failed = |permanent, retry_at_boot_ms| ImageStatus::Failed {
        reason: Reason::new(Code::RegistryUnavailable, "away"),
        attempts: 1,
        retry_at_boot_ms,
        permanent,
    };
    for (status, expected) in [
        (failed(false, NOW.boot_ms), 1),
        (failed(false, NOW.boot_ms + 1), 0),
        (failed(true, 0), 0),
        (ImageStatus::Pulling { done: Bytes(0), total: Bytes(0) }, 0),
        (ImageStatus::Ready { digest: Digest::of(b"other") }, 0),
    ] {
        seen.images.insert("r.example/other:1".to_owned(), status.clone());
        assert_eq!(pulls(&desired, &seen).len(), expected, "{status:?}");
    }
    seen.images.insert("r.example/other:1".to_owned(), failed(false, NOW.boot_ms + 77));
    assert_eq!(edged_plan::plan(&desired, &seen, NOW).wake_at_boot_ms(), Some(NOW.boot_ms + 77));
    // What nobody returns to stays away.
    desired.pointers.last_good = Some(Sequence(2));
    seen.images.remove("r.example/other:1");
    assert_eq!(pulls(&desired, &seen), [""; 0]);
}
