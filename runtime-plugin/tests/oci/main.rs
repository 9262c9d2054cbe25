//! Drives the built `dunlin` as container engines do, on a busybox bundle.
//!
//! Most of it needs root; without it those tests say so and pass.

#![allow(clippy::print_stdout, reason = "captured, and shown for a test that fails")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

mod bundle;
mod checkpoint;
mod lifecycle;
mod network;
mod podman;
