//! One process on its way from the skeleton to the program it is to become.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{BorrowedFd, RawFd},
};

use nix::unistd::Pid;
use tracing::warn;

use crate::{
    RestoreError,
    image::Process,
    proc::{self, Vma},
    resource::{
        creds,
        files::{
            Opened,
            locks::{self, PosixLock},
            tty::{self, Control},
        },
        fs,
        memory::{self, Backing, Change, KernelPages, Layout},
        mm,
        shared::ObjectId,
        signals, sysv, threads, timers,
        tree::Zombie,
    },
    skeleton,
    stub::{Batch, Place, Remote, TRAMPOLINE, Tracee, args, code, find_hole, find_slack},
    sys::{
        memory::{ForcedMemory, PAGE},
        ptrace::{self, Seize},
    },
    transfer::{self, Gift},
};

/// End of the addresses a program may use.
const TASK_SIZE: u64 = 0x7fff_ffff_f000;

/// A process being built.
pub(super) struct Task {
    /// Its pid in the image.
    pub(super) pid: i32,
    pub(super) tracee: Tracee,
    pub(super) remote: Remote,
    pub(super) forced: ForcedMemory,
    /// What is mapped, once the skeleton has been left.
    pub(super) layout: Option<Layout>,
    /// Threads other than the leader.
    threads: Vec<Tracee>,
    /// Capabilities it starts with.
    capabilities: u64,
}

impl Task {
    /// Seizes the process that runs the skeleton.
    pub(super) fn seize(host: Pid) -> io::Result<Self> {
        Tracee::request_stop(host, Seize::Destination)?;
        Self::born(host, skeleton::PLACE)
    }

    /// Takes over a process that was born seized, its stub at `place`.
    fn born(host: Pid, place: Place) -> io::Result<Self> {
        let tracee = Tracee::settle(host)?.ok_or(io::ErrorKind::NotFound)?;
        let status = proc::Status::of(host)?;
        let pid = status.tgid();
        Ok(Self {
            pid,
            remote: Remote::at(place, (pid, pid)),
            layout: None,
            forced: ForcedMemory::open(host)?,
            tracee,
            threads: Vec::new(),
            capabilities: status.cap_permitted & status.cap_bounding,
        })
    }

    pub(super) fn host(&self) -> Pid {
        self.tracee.tid
    }

    /// Its threads in our pid namespace, leader first.
    pub(super) fn hosts(&self) -> impl Iterator<Item = Pid> {
        std::iter::once(&self.tracee).chain(&self.threads).map(|thread| thread.tid)
    }

    pub(super) fn thread_count(&self) -> u64 {
        1 + self.threads.len() as u64
    }

    /// Executes calls in the process; `what` names them in an error.
    pub(super) fn run(&self, what: &str, batch: &Batch) -> Result<(), RestoreError> {
        self.run_in(what, &self.remote, &self.tracee, batch)
    }

    fn run_in(
        &self,
        what: &str,
        remote: &Remote,
        thread: &Tracee,
        batch: &Batch,
    ) -> Result<(), RestoreError> {
        if batch.is_empty() {
            return Ok(());
        }
        remote.run(thread, batch).map(drop).map_err(|source| self.failed(what, source))
    }

    pub(super) fn failed(&self, what: &str, source: io::Error) -> RestoreError {
        RestoreError::Process { what: what.to_owned(), pid: self.pid, source }
    }

    /// Forks a child with a chosen pid; it is born seized and stopped.
    pub(super) fn fork(&self, pid: i32, exit_signal: i32) -> io::Result<Self> {
        let host = self.clone(0, pid, exit_signal)?;
        Self::born(host, self.remote.place())
    }

    fn clone(&self, flags: u64, tid: i32, exit_signal: i32) -> io::Result<Pid> {
        let mut batch = Batch::new();
        let set_tid = batch.bytes(&tid.to_le_bytes());
        // struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal,
        // stack, stack_size, tls, set_tid, set_tid_size, cgroup.
        let clone = batch.space(88);
        batch.number(clone, flags);
        batch.number(clone.skip(32), u64::from(exit_signal.cast_unsigned()));
        batch.address(clone.skip(64), set_tid);
        batch.number(clone.skip(72), 1);
        batch.call(libc::SYS_clone3, args![clone, 88_u64]);
        let results = self.remote.run(&self.tracee, &batch).map_err(|err| match err.kind() {
            io::ErrorKind::AlreadyExists => {
                io::Error::new(err.kind(), format!("pid {tid} is already taken"))
            }
            _ => err,
        })?;
        results.born.first().copied().ok_or_else(|| io::Error::other("the child is missing"))
    }

    /// Ends the process with `exit(2)` and sees it out.
    pub(super) fn exit(self, status: i32) -> io::Result<()> {
        let mut batch = Batch::new();
        batch.call(libc::SYS_exit_group, args![status]);
        match self.remote.run(&self.tracee, &batch) {
            Err(err) if err.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            Err(err) => Err(err),
            Ok(_) => Err(io::Error::other("it did not exit")),
        }
    }

    /// Ends the process the way `zombie` did.
    pub(super) fn die(self, zombie: &Zombie) -> io::Result<()> {
        let mut batch = Batch::new();
        let name = batch.string(&zombie.name);
        batch.call(libc::SYS_prctl, args![libc::PR_SET_NAME, name]);
        self.remote.run(&self.tracee, &batch)?;
        let signal = zombie.status & 0x7f;
        if signal == 0 {
            return self.exit(zombie.status >> 8 & 0xff);
        }
        ptrace::set_signal_mask(self.host(), 0)?;
        nix::sys::signal::kill(self.host(), nix::sys::signal::Signal::try_from(signal)?)?;
        // SIGKILL needs no help to take effect.
        if signal != libc::SIGKILL {
            ptrace::cont(self.host())?;
        }
        loop {
            match ptrace::wait(self.host())? {
                ptrace::Stop::Gone => return Ok(()),
                ptrace::Stop::Signal(n) => ptrace::cont_with(self.host(), n)?,
                ptrace::Stop::Event { .. } => ptrace::cont(self.host())?,
            }
        }
    }

    /// Gives the process the mappings of `layout`, those that are new empty.
    pub(super) fn map(
        &mut self,
        layout: Layout,
        objects: &[(ObjectId, BorrowedFd<'_>)],
    ) -> Result<(), RestoreError> {
        let wanted = layout
            .kernel_pages
            .as_ref()
            .ok_or_else(|| RestoreError::Image(format!("pid {} has no vDSO", self.pid)))?;
        if layout.mappings.iter().any(|m| m.start < skeleton::END || m.end <= m.start) {
            let reason = format!("it maps memory below {:#x}", skeleton::END);
            return Err(RestoreError::Missing { object: format!("pid {}", self.pid), reason });
        }
        let is_first = self.layout.is_none();
        if let Some(old) = self.layout.take_if(|old| !old.is_same_space(&layout)) {
            let mut batch = Batch::new();
            for mapping in &old.mappings {
                batch.call(libc::SYS_munmap, args![mapping.start, mapping.end - mapping.start]);
            }
            self.run("leave the former program", &batch)?;
        }
        if self.layout.is_none() {
            self.move_kernel_pages(wanted).map_err(|err| self.failed("move the vDSO", err))?;
        }
        if is_first {
            self.leave_skeleton(wanted)?;
        }
        let gifts = transfer::consecutive(objects.iter().map(|(_, fd)| *fd));
        transfer::give(&self.remote, &self.tracee, &gifts, Batch::new(), |_| {})
            .map_err(|err| self.failed("hand over memory objects", err))?;
        let numbers: BTreeMap<ObjectId, u64> = objects.iter().map(|(id, _)| *id).zip(0..).collect();
        let old = self.layout.as_ref().map_or(&[][..], |old| &old.mappings);
        let mut batch = Batch::new();
        for change in memory::changes(old, &layout.mappings) {
            if let Change::Map(mapping) = &change
                && let Backing::Segment { .. } = mapping.backing
            {
                // What is in its place goes first.
                self.run("map memory", &batch)?;
                batch = Batch::new();
                sysv::attach(mapping, &self.remote, &self.tracee)
                    .map_err(|err| self.failed("attach System V memory", err))?;
            }
            change.restore(&numbers, &mut batch);
            if batch.size() > Remote::capacity() / 2 {
                self.run("map memory", &batch)?;
                batch = Batch::new();
            }
        }
        close_all(&mut batch);
        self.run("map memory", &batch)?;
        self.layout = Some(layout);
        Ok(())
    }

    /// Lets go of pages, which are then as if never written.
    pub(super) fn drop_pages(&self, ranges: &[(u64, u64)]) -> Result<(), RestoreError> {
        for ranges in ranges.chunks(1024) {
            let mut batch = Batch::new();
            for &(start, end) in ranges {
                batch.call(libc::SYS_madvise, args![start, end - start, libc::MADV_DONTNEED]);
            }
            self.run("drop pages", &batch)?;
        }
        Ok(())
    }

    /// Moves `[vvar]`, `[vvar_vclock]` and `[vdso]` to where the program knows
    /// them, and the stub's code with them into the end of the vDSO.
    fn move_kernel_pages(&mut self, wanted: &KernelPages) -> io::Result<()> {
        let mut vmas = proc::vmas(self.host())?;
        let here = KernelPages::of(&vmas).ok_or(io::ErrorKind::NotFound)?;
        if here.lens != wanted.lens {
            return Err(io::Error::other("this kernel's vDSO has another size"));
        }
        let len = wanted.end() - wanted.start;
        if here.start != wanted.start {
            if self.remote.code() != skeleton::PLACE.code {
                self.run_elsewhere(&vmas)?;
            }
            let mut from = here.start;
            let overlap = wanted.start < here.end() && here.start < wanted.end();
            if overlap {
                let aside = find_hole(&vmas, len + (wanted.end() - wanted.start))
                    .filter(|at| wanted.end() <= *at || at + len <= wanted.start)
                    .ok_or_else(|| io::Error::other("no room to move it aside"))?;
                self.remap(from, aside, &wanted.lens)?;
                from = aside;
            }
            self.remap(from, wanted.start, &wanted.lens)?;
            vmas = proc::vmas(self.host())?;
        }
        let slack = find_slack(self.host(), &vmas)?;
        let at = slack + TRAMPOLINE;
        ptrace::poke(self.host(), at, code())?;
        self.remote.move_code(at);
        Ok(())
    }

    /// Runs the stub from a page of its own: the process was born of one whose
    /// stub had moved into the vDSO already, and that is to move again.
    fn run_elsewhere(&mut self, vmas: &[Vma]) -> io::Result<()> {
        let page = find_hole(vmas, PAGE).ok_or_else(|| io::Error::other("no room for the stub"))?;
        let mut batch = Batch::new();
        let prot = libc::PROT_READ | libc::PROT_EXEC;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        batch.call(libc::SYS_mmap, args![page, PAGE, prot, flags, -1, 0_u64]);
        self.remote.run(&self.tracee, &batch)?;
        ptrace::poke(self.host(), page, code())?;
        self.remote.move_code(page);
        Ok(())
    }

    fn remap(&self, from: u64, to: u64, lens: &[u64]) -> io::Result<()> {
        let mut batch = Batch::new();
        let mut offset = 0;
        for &len in lens {
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            batch.call(libc::SYS_mremap, args![from + offset, len, len, flags, to + offset]);
            offset += len;
        }
        self.remote.run(&self.tracee, &batch).map(drop)
    }

    /// Unmaps all but the stub's data and the kernel's pages.
    fn leave_skeleton(&self, kept: &KernelPages) -> Result<(), RestoreError> {
        let mut batch = Batch::new();
        let data = skeleton::PLACE.data;
        let gaps = [(4096, data), (skeleton::END, kept.start), (kept.end(), TASK_SIZE)];
        for (start, end) in gaps {
            if start < end {
                batch.call(libc::SYS_munmap, args![start, end - start]);
            }
        }
        self.run("leave the skeleton", &batch)
    }

    /// Gives the process everything but memory content and armed timers.
    pub(super) fn become_process(
        &mut self,
        image: &Process,
        files: &Opened,
    ) -> Result<(), RestoreError> {
        let (leader, others) =
            image.threads.split_first().ok_or_else(|| RestoreError::Image("no thread".into()))?;
        let scored = image.limits.restore_scores(self.host());
        scored.map_err(|err| self.failed("set its OOM score", err))?;
        let mut first = Batch::new();
        for mapping in self.layout.iter().flat_map(|layout| &layout.mappings) {
            mapping.lock(&mut first);
        }
        mm::restore(&image.mm, &mut first);
        fs::restore(&image.fs, &mut first);
        signals::restore(&image.actions, &mut first);
        // What makes threads comes before what forbids it.
        let is_alone = others.is_empty();
        if is_alone {
            avoid(&mut self.remote, leader.queue.mask() | image.queue.mask());
        }
        self.take_files(files, first, |batch| {
            if is_alone {
                timers::create(&image.timers, batch);
                image.limits.restore(batch);
                self.identify(image, leader, batch);
            }
        })?;
        if !is_alone {
            self.create_threads(image)?;
            for (thread, tracee) in others.iter().zip(&self.threads) {
                self.identify_thread(image, thread, tracee)?;
            }
            avoid(&mut self.remote, leader.queue.mask() | image.queue.mask());
            let mut batch = Batch::new();
            timers::create(&image.timers, &mut batch);
            image.limits.restore(&mut batch);
            self.identify(image, leader, &mut batch);
            self.run("restore the leading thread", &batch)?;
        }
        leader.limits.restore(self.host()).map_err(|err| self.failed("schedule a thread", err))
    }

    fn take_files(
        &self,
        files: &Opened,
        first: Batch,
        last: impl FnOnce(&mut Batch),
    ) -> Result<(), RestoreError> {
        let number = |fd: RawFd| u64::from(fd.cast_unsigned());
        let table = files.table(self.pid).into_iter();
        let gifts: Vec<Gift<'_>> = table
            .map(|(fd, file, cloexec)| Gift { number: number(fd), fd: file, cloexec })
            .collect();
        transfer::give(&self.remote, &self.tracee, &gifts, first, |batch| {
            for item in files.epoll_items(self.pid) {
                // struct epoll_event is packed: events, then the program's word.
                let mut raw = item.events.to_le_bytes().to_vec();
                raw.extend_from_slice(&item.data.to_le_bytes());
                let event = batch.bytes(&raw);
                let add = libc::EPOLL_CTL_ADD;
                batch.call(libc::SYS_epoll_ctl, args![item.epfd, add, item.tfd, event]);
            }
            last(batch);
        })
        .map_err(|err| self.failed("restore the process", err))
    }

    fn create_threads(&mut self, image: &Process) -> Result<(), RestoreError> {
        const FLAGS: i32 = libc::CLONE_VM
            | libc::CLONE_FS
            | libc::CLONE_FILES
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD
            | libc::CLONE_SYSVSEM;
        for thread in image.threads.iter().skip(1) {
            let tracee = self
                .clone(u64::from(FLAGS.cast_unsigned()), thread.tid, 0)
                .and_then(Tracee::settle)
                .and_then(|tracee| tracee.ok_or_else(|| io::ErrorKind::NotFound.into()))
                .map_err(|err| self.failed(&format!("create thread {}", thread.tid), err))?;
            self.threads.push(tracee);
        }
        Ok(())
    }

    /// Gives a thread other than the leader what is its own, privileges last.
    fn identify_thread(
        &self,
        image: &Process,
        thread: &threads::Image,
        tracee: &Tracee,
    ) -> Result<(), RestoreError> {
        let mut remote = self.remote.of((self.pid, thread.tid));
        avoid(&mut remote, thread.queue.mask() | image.queue.mask());
        let mut batch = Batch::new();
        self.personal(thread, &mut batch);
        creds::restrict(&thread.creds, &mut batch);
        self.run_in("restore a thread", &remote, tracee, &batch)?;
        thread.limits.restore(tracee.tid).map_err(|err| self.failed("schedule a thread", err))
    }

    /// Gives the leader what is its own and the process's, privileges last.
    fn identify(&self, image: &Process, leader: &threads::Image, batch: &mut Batch) {
        self.personal(leader, batch);
        image.queue.restore(self.pid, None, batch);
        mm::seal(&image.mm, batch);
        creds::restrict(&leader.creds, batch);
    }

    fn personal(&self, thread: &threads::Image, batch: &mut Batch) {
        threads::restore(thread, batch);
        creds::restore(&thread.creds, self.capabilities, batch);
        thread.queue.restore(self.pid, Some(thread.tid), batch);
    }

    /// Takes its session's terminal. The one that was given may be another's
    /// already; the process then runs without.
    pub(super) fn control(&self, control: Control) {
        if let Err(err) = tty::take_control(control, &self.remote, &self.tracee) {
            warn!(pid = self.pid, %err, "no controlling terminal");
        }
    }

    /// Takes the locks that belong to the process.
    pub(super) fn lock(&self, locks: &[PosixLock]) -> Result<(), RestoreError> {
        locks::take_posix(locks, &self.remote, &self.tracee)
            .map_err(|err| self.failed("lock files", err))
    }

    /// Arms the timers: the stub's last batch.
    pub(super) fn arm(&self, image: &Process) -> Result<(), RestoreError> {
        let mut batch = Batch::new();
        timers::arm(&image.timers, &mut batch);
        self.run("arm timers", &batch)
    }

    /// Stops a process that job control had stopped. It stays a tracee: the stub
    /// still runs in it, and let go it remains stopped.
    pub(super) fn stop(&self) -> io::Result<()> {
        let host = self.host();
        nix::sys::signal::kill(host, nix::sys::signal::SIGSTOP)?;
        ptrace::cont(host)?;
        loop {
            match ptrace::wait(host)? {
                ptrace::Stop::Signal(signal) => ptrace::cont_with(host, signal)?,
                ptrace::Stop::Event { signal: libc::SIGSTOP, .. } => return Ok(()),
                ptrace::Stop::Event { .. } => ptrace::cont(host)?,
                ptrace::Stop::Gone => return Err(io::Error::from_raw_os_error(libc::ESRCH)),
            }
        }
    }

    /// Ends the process and all its threads at once, whatever they are doing.
    pub(super) fn kill(&self) {
        // Gone already is as good.
        let _gone = nix::sys::signal::kill(self.host(), nix::sys::signal::SIGKILL);
    }

    /// Takes the stub out; the threads then stand before their next instruction.
    pub(super) fn strip(&mut self, image: &Process) -> Result<(), RestoreError> {
        let failed = |task: &Self, err| task.failed("set the registers", err);
        self.remote.clone().remove(&self.tracee).map_err(|err| failed(self, err))?;
        let enter = |tracee: &mut Tracee, thread: &threads::Image| {
            thread.enter(tracee)?;
            ptrace::set_signal_mask(tracee.tid, tracee.mask)?;
            ptrace::set_registers(tracee.tid, &tracee.regs)
        };
        let mut images = image.threads.iter();
        let leader = images.next().map_or(Ok(()), |thread| enter(&mut self.tracee, thread));
        let others = leader.and_then(|()| {
            self.threads.iter_mut().zip(images).try_for_each(|(tracee, t)| enter(tracee, t))
        });
        others.map_err(|err| failed(self, err))
    }

    /// Lets every thread run.
    pub(super) fn release(&self) -> io::Result<()> {
        self.threads.iter().try_for_each(|t| ptrace::detach(t.tid))?;
        ptrace::detach(self.host())
    }
}

/// Lets the stub tell with a signal that is not among those queued.
fn avoid(remote: &mut Remote, queued: u64) {
    const CANDIDATES: [i32; 3] = [libc::SIGURG, libc::SIGWINCH, libc::SIGCHLD];
    let free = CANDIDATES.into_iter().chain(34..=64).find(|n| queued & 1 << (n - 1) == 0);
    remote.tell_with(free.unwrap_or(libc::SIGURG));
}

/// Closes every fd.
pub(super) fn close_all(batch: &mut Batch) {
    batch.call(libc::SYS_close_range, args![0_u64, u64::from(u32::MAX), 0_u64]);
}
