//! Integration tests and the programs they move.
