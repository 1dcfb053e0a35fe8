//! One binary for all integration tests: one link step.

mod arrows;
mod cli;
mod compat;
mod conformance;
mod connection;
mod doctor;
mod errors;
mod grip;
mod guarantees;
mod http;
mod http_read;
mod http_rules;
mod http_services;
mod jsonrpsee;
mod microstream;
mod presence;
mod process;
mod redis;
mod socket;
mod sse;
mod start;
mod support;
mod wire;
mod ws;
mod ws_bus;
mod ws_rpc;
