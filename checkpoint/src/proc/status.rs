//! `/proc/PID/status` and `/proc/PID/stat`.

use std::io;

use nix::unistd::Pid;

/// The fields of `/proc/PID/status` that a dump needs. Of one thread when read
/// below `/proc/PID/task`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Status {
    /// `R`, `S`, `D`, `T`, `t`, `Z`, …
    pub(crate) state: char,
    pub(crate) umask: u32,
    pub(crate) tracer: i32,
    /// Real, effective, saved, file system.
    pub(crate) uids: [u32; 4],
    pub(crate) gids: [u32; 4],
    pub(crate) groups: Vec<u32>,
    /// Thread group and thread id in each pid namespace, outermost first.
    pub(crate) ns_tgid: Vec<i32>,
    pub(crate) ns_pid: Vec<i32>,
    pub(crate) ns_pgid: Vec<i32>,
    pub(crate) ns_sid: Vec<i32>,
    pub(crate) pending: u64,
    pub(crate) shared_pending: u64,
    pub(crate) blocked: u64,
    pub(crate) ignored: u64,
    pub(crate) caught: u64,
    pub(crate) cap_inheritable: u64,
    pub(crate) cap_permitted: u64,
    pub(crate) cap_effective: u64,
    pub(crate) cap_bounding: u64,
    pub(crate) cap_ambient: u64,
    pub(crate) no_new_privs: bool,
    /// 0 off, 1 strict, 2 filter.
    pub(crate) seccomp: u32,
    /// Uses a shadow stack (`x86_Thread_features`).
    pub(crate) shadow_stack: bool,
}

impl Status {
    /// Reads the status of thread `tid`, whatever process it belongs to.
    pub(crate) fn of(tid: Pid) -> io::Result<Self> {
        let text = super::text(&format!("{tid}/status"))?;
        let mut s = Self::default();
        for line in text.lines() {
            let Some((key, value)) = line.split_once(':') else { continue };
            let value = value.trim();
            let list = || value.split_whitespace();
            let hex = || u64::from_str_radix(value, 16).unwrap_or(0);
            let ids = || list().filter_map(|w| w.parse().ok()).collect::<Vec<i32>>();
            let four = || {
                let mut out = [0; 4];
                list().filter_map(|w| w.parse().ok()).zip(&mut out).for_each(|(v, o)| *o = v);
                out
            };
            match key {
                "State" => s.state = value.chars().next().unwrap_or('?'),
                "Umask" => s.umask = u32::from_str_radix(value, 8).unwrap_or(0),
                "TracerPid" => s.tracer = value.parse().unwrap_or(0),
                "Uid" => s.uids = four(),
                "Gid" => s.gids = four(),
                "Groups" => s.groups = list().filter_map(|w| w.parse().ok()).collect(),
                "NStgid" => s.ns_tgid = ids(),
                "NSpid" => s.ns_pid = ids(),
                "NSpgid" => s.ns_pgid = ids(),
                "NSsid" => s.ns_sid = ids(),
                "SigPnd" => s.pending = hex(),
                "ShdPnd" => s.shared_pending = hex(),
                "SigBlk" => s.blocked = hex(),
                "SigIgn" => s.ignored = hex(),
                "SigCgt" => s.caught = hex(),
                "CapInh" => s.cap_inheritable = hex(),
                "CapPrm" => s.cap_permitted = hex(),
                "CapEff" => s.cap_effective = hex(),
                "CapBnd" => s.cap_bounding = hex(),
                "CapAmb" => s.cap_ambient = hex(),
                "NoNewPrivs" => s.no_new_privs = value == "1",
                "Seccomp" => s.seccomp = value.parse().unwrap_or(0),
                "x86_Thread_features" => s.shadow_stack = list().any(|w| w == "shstk"),
                _ => {}
            }
        }
        Ok(s)
    }

    /// Thread group id in the task's own pid namespace.
    pub(crate) fn tgid(&self) -> i32 {
        self.ns_tgid.last().copied().unwrap_or(0)
    }

    /// Thread id in the task's own pid namespace.
    pub(crate) fn tid(&self) -> i32 {
        self.ns_pid.last().copied().unwrap_or(0)
    }

    /// Process group in the task's own pid namespace, 0 when it is of outside.
    pub(crate) fn pgid(&self) -> i32 {
        self.ns_pgid.last().copied().unwrap_or(0)
    }

    /// Session in the task's own pid namespace, 0 when it is of outside.
    pub(crate) fn sid(&self) -> i32 {
        self.ns_sid.last().copied().unwrap_or(0)
    }
}

/// The fields of `/proc/PID/stat` that a dump needs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Stat {
    pub(crate) comm: Vec<u8>,
    /// Parent, as the reader sees it.
    pub(crate) ppid: i32,
    /// Device of the controlling terminal, 0 without one.
    pub(crate) tty: i32,
    /// Its foreground process group, as the reader sees it.
    pub(crate) foreground: i32,
    /// What the parent is told of its end (`SIGCHLD`).
    pub(crate) exit_signal: i32,
    /// Status for `wait(2)` of a zombie.
    pub(crate) exit_code: i32,
    /// When the process was born, in clock ticks.
    pub(crate) start_time: u64,
    pub(crate) start_code: u64,
    pub(crate) end_code: u64,
    pub(crate) start_stack: u64,
    pub(crate) start_data: u64,
    pub(crate) end_data: u64,
    pub(crate) start_brk: u64,
    pub(crate) arg: (u64, u64),
    pub(crate) env: (u64, u64),
}

impl Stat {
    /// Tells this run of a program from another with the same pid, later or
    /// after an `exec`: both get addresses of their own.
    pub(crate) fn generation(&self) -> u64 {
        let mut hasher = std::hash::DefaultHasher::new();
        let addresses = (self.start_code, self.start_stack, self.start_brk, self.arg, self.env);
        std::hash::Hash::hash(&(self.start_time, addresses), &mut hasher);
        std::hash::Hasher::finish(&hasher)
    }

    pub(crate) fn of(pid: Pid) -> io::Result<Self> {
        let text = super::read(&format!("{pid}/stat"))?;
        Self::parse(&text).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// The name may hold anything, even `) `: it ends at the last parenthesis.
    fn parse(text: &[u8]) -> Option<Self> {
        let open = text.iter().position(|&b| b == b'(')?;
        let close = text.iter().rposition(|&b| b == b')')?;
        let rest = std::str::from_utf8(text.get(close + 2..)?).ok()?;
        // Field n of proc(5) is word n - 3 behind the name.
        let words: Vec<&str> = rest.split_whitespace().collect();
        let signed = |n: usize| words.get(n - 3)?.parse::<i64>().ok();
        let field = |n: usize| words.get(n - 3)?.parse::<u64>().ok();
        let small = |n: usize| i32::try_from(signed(n)?).ok();
        Some(Self {
            comm: text[open + 1..close].to_vec(),
            ppid: small(4)?,
            tty: small(7)?,
            foreground: small(8)?,
            exit_signal: small(38)?,
            exit_code: small(52)?,
            start_time: field(22)?,
            start_code: field(26)?,
            end_code: field(27)?,
            start_stack: field(28)?,
            start_data: field(45)?,
            end_data: field(46)?,
            start_brk: field(47)?,
            arg: (field(48)?, field(49)?),
            env: (field(50)?, field(51)?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_status_and_stat_agree_with_the_kernel() {
        let status = Status::of(Pid::this()).unwrap();
        assert_eq!(status.tgid(), Pid::this().as_raw());
        assert_eq!(status.uids[1], nix::unistd::geteuid().as_raw());
        let stat = Stat::of(Pid::this()).unwrap();
        assert_eq!(stat.ppid, Pid::parent().as_raw());
        assert!(stat.start_code < stat.end_code);
    }

    #[test]
    fn a_name_may_hold_parentheses() {
        let mut line = b"7 (a) b) S 1".to_vec();
        (5..=52).for_each(|n| line.extend_from_slice(format!(" {n}").as_bytes()));
        let stat = Stat::parse(&line).unwrap();
        assert_eq!((stat.comm.as_slice(), stat.ppid, stat.exit_code), (&b"a) b"[..], 1, 52));
    }
}
