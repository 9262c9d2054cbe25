//! REST types, client and wire protocol of Dunlin.
//!
//! Nothing here knows a kernel interface: an image travels as
//! `(kind, version, bytes)`, a container as its id.

pub mod client;
pub mod error;
pub mod fault;
pub mod rest;
pub mod wire;
pub mod worker;

pub use error::{ErrorCode, Problem};
