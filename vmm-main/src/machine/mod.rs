//! Boards: what is where, and the parts put together.
//!
//! Job: the address map, the buses that route guest accesses, the events a machine reports, and the boards.
//! Who is not trusted: the guest. A bus hands each access to the one device whose range holds it, or answers like an
//! empty bus.
//! Why this way: a board owns the order in which things must be made, stopped and reset, so that the code that
//! orchestrates processes only says when.

pub mod bus;
pub mod events;
pub mod layout;
pub mod microvm;
