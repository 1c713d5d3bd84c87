//! Answers to `edgectl` and the console.

use edged_model::api::{Answer, Request, VersionInfo};
use edged_model::id::WorkloadName;
use edged_model::keeper::ShutdownHow;
use edged_model::observed::Hold;
use edged_model::reason::{Code, Reason};
use tokio::sync::{broadcast, mpsc, oneshot};

use super::{Agent, Message, clock};
use crate::api::Call;
use crate::execute::pull::load::Wish;
use crate::report::Offer;
use crate::store::{Reset, inline_chain};

/// Lines shown when nobody says how many.
const TAIL: u32 = 100;
const TAIL_MAX: u32 = 2000;

impl Agent {
    pub(super) async fn answer(&mut self, call: Call) {
        let Call { request, caller, answers, passing } = call;
        if !request.is_read() && !caller.may_write {
            return error(&answers, Reason::new(Code::NotAllowedHere, format!("{} may only read", caller.name)));
        }
        let takes_new = matches!(
            &request,
            Request::LoadImages { .. } | Request::Prune { dry_run: false } | Request::ResetWorkloads { .. }
        );
        if let Some(why) = self.refused_by_reset().filter(|_| takes_new) {
            return error(&answers, why);
        }
        match request {
            Request::Version => {
                let info = VersionInfo {
                    agent: crate::VERSION.to_owned(),
                    keeper: self.keeper_version.clone(),
                    arch: std::env::consts::ARCH.to_owned(),
                };
                one(&answers, Answer::Version(info));
            }
            Request::Status => one(&answers, Answer::Status(Box::new(self.status()))),
            Request::Inspect { workload } => match self.inspect(&workload) {
                Some(inspect) => one(&answers, Answer::Inspect(Box::new(inspect))),
                None => error(&answers, self.no_such(&workload)),
            },
            Request::Df => self.df(answers),
            Request::Images => self.list_images(answers),
            Request::Volumes => self.list_volumes(answers),
            Request::LoadImages { path, only, tag } => self.load_images(answers, path, Wish { only, tag }, caller.name),
            Request::CheckImages { image } => self.check_images(answers, image),
            Request::Prune { dry_run } => self.prune(answers, dry_run),
            Request::ResetWorkloads { volumes } => self.reset_workloads(answers, Reset { volumes }, caller.name),
            Request::Generations => self.list_generations(answers),
            Request::Diff { from, to } => self.diff(answers, from, to),
            Request::Rollback { to } => self.want_again(answers, Code::OperatorRollback, to, caller.name),
            Request::Retry { sequence } => self.want_again(answers, Code::OperatorRetry, sequence, caller.name),
            Request::Activate { sequence } => self.activate(answers, sequence, &caller.name),
            Request::Logs { workload, follow, tail } => self.logs(answers, workload, follow, tail),
            Request::Events { follow, workload, tail } => self.events(answers, workload, follow, tail),
            Request::Start { workload } => self.operate(&answers, &workload, None, &caller.name),
            Request::Stop { workload } => self.operate(&answers, &workload, Some(Hold::Stopped), &caller.name),
            Request::Restart { workload } => {
                let hold = Hold::Restart { asked_boot_ms: clock::boot_ms() };
                self.operate(&answers, &workload, Some(hold), &caller.name);
            }
            Request::Pause { workload } => self.pause(&answers, &workload, true, &caller.name),
            Request::Resume { workload } => self.pause(&answers, &workload, false, &caller.name),
            Request::Exec { workload, wish } => self.exec(answers, passing, workload, wish, &caller.name),
            Request::Apply { envelope } => {
                let (reply, result) = oneshot::channel();
                let offer = Offer { envelope, chain: Vec::new(), by: caller.name, reply };
                self.receive(Message::Offer(Box::new(offer))).await;
                // The verdict comes when the loop has turned on.
                tokio::spawn(async move {
                    match result.await {
                        Ok(Ok(taken)) => one(&answers, Answer::Accepted { what: taken.to_string() }),
                        Ok(Err(reason)) => error(&answers, reason),
                        Err(_) => error(&answers, Reason::new(Code::Busy, "the agent is ending")),
                    }
                });
            }
            Request::PowerOff => self.shutdown(&answers, ShutdownHow::PowerOff, &caller.name).await,
            Request::Upgrade => self.upgrade(answers, false, caller.name),
            Request::UpgradeAgain => self.upgrade(answers, true, caller.name),
            Request::Reboot => self.shutdown(&answers, ShutdownHow::Reboot, &caller.name).await,
        }
    }

    pub(super) fn no_such(&self, name: &WorkloadName) -> Reason {
        let known: Vec<_> = self
            .active()
            .map(|active| active.manifest.workloads.keys().map(WorkloadName::as_str).collect())
            .unwrap_or_default();
        let text = format!("there is no workload {name}");
        match edged_model::validate::nearest(name.as_str(), known.iter().copied()) {
            Some(near) => Reason::new(Code::NoSuchWorkload, text).next(format!("did you mean {near}?")),
            None => Reason::new(Code::NoSuchWorkload, text).next("`edgectl ps` lists them"),
        }
    }

    /// `start` takes a hold away and forgets the back-off; `stop` and `restart` set one.
    fn operate(&mut self, answers: &mpsc::Sender<Answer>, name: &WorkloadName, hold: Option<Hold>, by: &str) {
        if self.active().is_none_or(|active| !active.manifest.workloads.contains_key(name)) {
            return error(answers, self.no_such(name));
        }
        let instance = self.world.instance(name);
        let is_running = matches!(instance.state, edged_model::observed::InstanceState::Running { .. });
        if hold != Some(Hold::Stopped) {
            instance.history.in_a_row = 0;
        }
        // To start what its policy would leave ended is a restart.
        let anew = Hold::Restart { asked_boot_ms: clock::boot_ms() };
        let hold = if hold.is_none() && !is_running { Some(anew) } else { hold };
        let (code, text) = match hold {
            Some(Hold::Stopped) => (Code::OperatorStopped, format!("{name} shall stop and stay so")),
            Some(Hold::Restart { .. }) => (Code::OperatorRestarted, format!("{name} shall start anew")),
            None => (Code::OperatorRestarted, format!("{name} runs already")),
        };
        self.hold(name, hold);
        self.tell(Some(name), self.world.desired.pointers.active, &Reason::new(code, text.clone()), by);
        // The store's thread works in order: when it gets here, the word and its record are on the disk.
        let told = answers.clone();
        let written = self.writes.submit(move |_| one(&told, Answer::Accepted { what: text }));
        if let Err(busy) = written {
            error(answers, Reason::new(Code::Busy, busy.to_string()).next("say it again"));
        }
    }

    async fn shutdown(&mut self, answers: &mpsc::Sender<Answer>, how: ShutdownHow, by: &str) {
        let text = match how {
            ShutdownHow::PowerOff => "the device powers off",
            ShutdownHow::Reboot => "the device reboots",
            ShutdownHow::Exit => "edged ends",
        };
        self.tell(None, None, &Reason::new(Code::Boot, text), by);
        // The story and the reports reach the disk before the machine goes.
        let (done, written) = oneshot::channel();
        let submitted = self.writes.submit(move |store| {
            if let Err(error) = store.sync() {
                tracing::error!("sync: {}", inline_chain(&error));
            }
            let _ = done.send(());
        });
        if submitted.is_ok() {
            let _ = written.await;
        }
        one(answers, Answer::Accepted { what: text.to_owned() });
        if let Err(error) = self.link.shutdown(how).await {
            tracing::error!("shutdown: {}", inline_chain(&error));
        }
    }

    fn logs(&self, answers: mpsc::Sender<Answer>, name: WorkloadName, follow: bool, tail: Option<u32>) {
        let is_known = self.world.observed.workloads.contains_key(&name);
        if !is_known && self.active().is_none_or(|active| !active.manifest.workloads.contains_key(&name)) {
            return error(&answers, self.no_such(&name));
        }
        // Subscribed first: a line printed between the two is shown twice rather than not at all.
        let mut lines = follow.then(|| self.logs.follow());
        let logs = self.logs.clone();
        let count = tail.unwrap_or(TAIL).min(TAIL_MAX) as usize;
        tokio::spawn(async move {
            let read = name.clone();
            let old = tokio::task::spawn_blocking(move || logs.tail(&read, count)).await;
            for line in old.into_iter().flatten().flatten() {
                if answers.send(Answer::Log(line)).await.is_err() {
                    return;
                }
            }
            while let Some(lines) = &mut lines {
                let answer = match lines.recv().await {
                    Ok((workload, line)) if workload == name => Answer::Log(line),
                    Ok(_) => continue,
                    Err(broadcast::error::RecvError::Lagged(missed)) => {
                        let at_unix_ms = super::clock::unix_ms();
                        let text = format!("[{missed} lines are not shown: this connection is too slow]");
                        Answer::Log(edged_model::api::LogLine {
                            at_unix_ms,
                            stream: edged_model::api::Stream::Stderr,
                            text,
                        })
                    }
                    Err(broadcast::error::RecvError::Closed) => break,
                };
                if answers.send(answer).await.is_err() {
                    return;
                }
            }
            let _ = answers.send(Answer::End).await;
        });
    }

    fn events(&self, answers: mpsc::Sender<Answer>, name: Option<WorkloadName>, follow: bool, tail: Option<u32>) {
        let mut live = follow.then(|| self.story.subscribe());
        let store = self.store.clone();
        let count = tail.unwrap_or(TAIL).min(TAIL_MAX) as usize;
        tokio::spawn(async move {
            let wanted = name.clone();
            let old = tokio::task::spawn_blocking(move || {
                store.events(count, |event| wanted.is_none() || event.workload == wanted)
            });
            let mut last = 0;
            for event in old.await.into_iter().flatten().flatten() {
                last = event.number;
                if answers.send(Answer::Event(event)).await.is_err() {
                    return;
                }
            }
            while let Some(live) = &mut live {
                match live.recv().await {
                    Ok(event) if event.number > last && (name.is_none() || event.workload == name) => {
                        if answers.send(Answer::Event(event)).await.is_err() {
                            return;
                        }
                    }
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => break,
                }
            }
            let _ = answers.send(Answer::End).await;
        });
    }
}

/// One answer and the end. The channel of a new call is empty, so both fit.
pub(super) fn one(answers: &mpsc::Sender<Answer>, answer: Answer) {
    let _ = answers.try_send(answer);
    let _ = answers.try_send(Answer::End);
}

pub(super) fn error(answers: &mpsc::Sender<Answer>, why: Reason) {
    let _ = answers.try_send(Answer::Error(why));
}
