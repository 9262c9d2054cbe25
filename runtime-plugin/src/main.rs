//! runtime-plugin.

fn main() {}
