//! The scenarios' own checks: each passes where nothing happened and fails
//! where damage was done.

use anyhow::Result;
use dunlin_tests::{at_rest, for_each_scenario};

macro_rules! tests {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() -> Result<()> {
                at_rest(stringify!($name))
            }
        )*
    };
}

for_each_scenario!(tests);
