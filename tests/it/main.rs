//! All integration tests are one binary, which is linked once.

mod cli;
mod compat;
mod conformance;
mod connection;
mod connection_list;
mod doctor;
mod errors;
mod guarantees;
mod http;
mod http_read;
mod http_rules;
mod http_services;
mod import;
mod jsonrpsee;
mod presence;
mod redis;
mod sse;
mod structure;
mod support;
mod ws;
mod ws_bus;
mod ws_rpc;
