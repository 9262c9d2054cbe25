//! The programs that can be moved, by name.

/// Calls `$with!` with the name of every scenario: whoever runs, tests or
/// documents them takes them from this one list.
#[macro_export]
macro_rules! for_each_scenario {
    ($with:ident) => {
        $with! {
            counter heap clocks
            memory_private memory_file memory_shared memory_advice memory_sparse memory_stack
            memory_cow
            threads_one threads_16 threads_1000 threads_robust
            tree_sessions tree_orphans tree_leaderless tree_zombies tree_stopped tree_deep tree_wide
            registers_general registers_avx registers_avx512 registers_float registers_segments
            signals_pending signals_actions signals_altstack
            timers_interval timers_alarm timers_posix timers_overrun
            call_nanosleep call_clock_nanosleep call_clock_nanosleep_until
            call_poll call_poll_timeout call_ppoll_timeout call_select_timeout
            call_epoll_wait call_epoll_wait_timeout call_futex call_futex_timeout
            call_recv call_recv_timeout call_accept call_read_pipe call_write_pipe
            call_wait4 call_sigtimedwait call_sigtimedwait_timeout call_flock
            creds_ids creds_capabilities creds_switches creds_seccomp creds_limits creds_scheduling
            place_directory place_root place_names
            fds_files fds_devices fds_shared fds_pipes
            events_eventfd events_epoll events_signalfd events_timerfd
            sysv_memory sysv_semaphores sysv_queues sysv_waiting
            sockets_pairs sockets_family sockets_listening
            futex_pingpong
        }
    };
}

/// The same for worlds that cannot move, each with words of its refusal.
#[macro_export]
macro_rules! for_each_refusal {
    ($with:ident) => {
        $with! {
            refused_io_uring: "io_uring"
            refused_userfaultfd: "userfaultfd"
            refused_fanotify: "fanotify"
            refused_bpf: "BPF map"
            refused_block_device: "block device"
            refused_aio: "AIO"
            refused_traced: "traced"
            refused_namespace: "uts namespace"
            refused_tcp: "TCP"
            refused_shared_ipc: "not in the tree"
            refused_undo: "SEM_UNDO"
            refused_outside_socket: "unix socket"
            refused_mptcp: "MPTCP"
            refused_sctp: "SCTP"
        }
    };
}

macro_rules! names {
    ($($name:ident)*) => {
        /// Every scenario's name.
        pub const ALL: &[&str] = &[$(stringify!($name)),*];
    };
}

for_each_scenario!(names);
