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
