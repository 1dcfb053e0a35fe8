//! One binary for all integration tests: one link step.

mod conformance;
