//! One binary for all integration tests: one link step.

mod arrows;
mod conformance;
mod connection;
mod sse;
mod start;
mod wire;
