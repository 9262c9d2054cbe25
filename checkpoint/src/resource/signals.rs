//! Signal actions and queued signals (`signal(7)`).
//!
//! Queues are read last, after the stub has run for the last time, or a signal
//! that arrives meanwhile is lost.

use std::io;

use serde::{Deserialize, Serialize};

use crate::{
    stub::{Batch, Buf, Results, Tracee, args},
    sys::ptrace::{self, SIGINFO_LEN},
};

/// Bytes of the kernel's `struct sigaction`: handler, flags, restorer, mask.
const ACTION_LEN: usize = 32;

/// The action of one signal that is not at its default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Action {
    number: u8,
    raw: [u8; ACTION_LEN],
}

/// Signals whose action can be set.
fn settable() -> impl Iterator<Item = u8> {
    (1..=64).filter(|&n| i32::from(n) != libc::SIGKILL && i32::from(n) != libc::SIGSTOP)
}

/// Questions asked by [`ask`].
pub(crate) struct Asked(Buf);

/// Asks for every action.
pub(crate) fn ask(batch: &mut Batch) -> Asked {
    let all = batch.space(64 * ACTION_LEN);
    for number in settable() {
        let old = all.skip(usize::from(number - 1) * ACTION_LEN);
        let null = 0_u64;
        batch.call(libc::SYS_rt_sigaction, args![u64::from(number), null, old, 8_u64]);
    }
    Asked(all)
}

/// The actions that are not at their default.
pub(crate) fn answer(asked: &Asked, results: &Results<'_>) -> Vec<Action> {
    let all = results.bytes(asked.0);
    settable()
        .map(|number| {
            let at = usize::from(number - 1) * ACTION_LEN;
            Action { number, raw: all[at..at + ACTION_LEN].try_into().expect("an action") }
        })
        .filter(|action| action.raw != [0; ACTION_LEN])
        .collect()
}

/// Sets the actions of a process in which all are at their default.
///
/// Zombies and stand-ins among its children have left a SIGCHLD behind, which
/// the program had long ago: ignoring it for a moment throws it away.
pub(crate) fn restore(actions: &[Action], batch: &mut Batch) {
    let child = u64::from(libc::SIGCHLD.cast_unsigned());
    let ignore: Vec<u8> = [1_u64, 0, 0, 0].iter().flat_map(|w| w.to_le_bytes()).collect();
    for raw in [ignore.as_slice(), &[0; ACTION_LEN]] {
        let new = batch.bytes(raw);
        batch.call(libc::SYS_rt_sigaction, args![child, new, 0_u64, 8_u64]);
    }
    for action in actions {
        let new = batch.bytes(&action.raw);
        let null = 0_u64;
        batch.call(libc::SYS_rt_sigaction, args![u64::from(action.number), new, null, 8_u64]);
    }
}

/// Queued signals in order, each a raw `siginfo_t`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Queue(Vec<Vec<u8>>);

impl Queue {
    /// Reads the queue of the process (`shared`) or of the thread alone.
    pub(crate) fn dump(task: &Tracee, shared: bool) -> io::Result<Self> {
        let raw = ptrace::queued_signals(task.tid, shared)?;
        Ok(Self(raw.into_iter().map(|info| info.to_vec()).collect()))
    }

    /// Queues the signals again, from inside: the kernel accepts any `si_code`
    /// only from the receiver itself. All signals are blocked meanwhile.
    pub(crate) fn restore(&self, tgid: i32, tid: Option<i32>, batch: &mut Batch) {
        for raw in &self.0 {
            let info = batch.bytes(raw);
            let signal = self.number(raw);
            match tid {
                Some(tid) => batch
                    .call(libc::SYS_rt_tgsigqueueinfo, args![tgid, tid, u64::from(signal), info]),
                None => batch.call(libc::SYS_rt_sigqueueinfo, args![tgid, u64::from(signal), info]),
            };
        }
    }

    /// Bit mask of the signals in the queue.
    pub(crate) fn mask(&self) -> u64 {
        self.0.iter().fold(0, |mask, raw| mask | 1 << ((self.number(raw) - 1) & 63))
    }

    /// Whether every entry is a well-formed siginfo.
    pub(crate) fn is_valid(&self) -> bool {
        self.0.iter().all(|raw| raw.len() == SIGINFO_LEN && (1..=64).contains(&self.number(raw)))
    }

    #[expect(clippy::unused_self, reason = "reads an entry of this queue")]
    fn number(&self, raw: &[u8]) -> u32 {
        raw.first_chunk().map_or(0, |word| u32::from_le_bytes(*word))
    }
}
