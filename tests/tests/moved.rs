//! Every scenario moves, sleeping and computing, five times in a row, among
//! the host's processes and as the init of namespaces of its own.

use anyhow::Result;
use dunlin_tests::{Mood, check, for_each_scenario};

mod idle {
    use super::*;

    macro_rules! tests {
        ($($name:ident)*) => {
            $(
                #[test]
                fn $name() -> Result<()> {
                    check(stringify!($name), Mood::Idle)
                }
            )*
        };
    }

    for_each_scenario!(tests);
}

mod busy {
    use super::*;

    macro_rules! tests {
        ($($name:ident)*) => {
            $(
                #[test]
                fn $name() -> Result<()> {
                    check(stringify!($name), Mood::Busy)
                }
            )*
        };
    }

    for_each_scenario!(tests);
}
