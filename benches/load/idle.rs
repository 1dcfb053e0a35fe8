//! Idle connections: the memory of the server for each, and what remains after they are closed.

use std::{
    io::{Read, Write},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use crate::{
    fan::{Layout, Rig},
    link,
    report::Measure,
    stamp::Faults,
    sys::{self, Process, Server},
};

/// Opens `layout.readers` streams on a new server, leaves them idle, uses them and closes them.
pub fn idle(server: &Process, layout: Layout, units: usize) -> Result<Measure> {
    let pid = server.pid();
    let per = |bytes: u64| bytes as f64 / units as f64;
    settle(pid);
    let base = sys::memory(pid)?;
    let descriptors = sys::descriptors(pid);
    let cpu = sys::cpu(pid);
    let mut rig = Rig::weir(server, layout, false)?;
    settle(pid);
    let connected = sys::cpu(pid) - cpu;
    let idle = sys::memory(pid)?;

    // They stay idle for a while, and then each reads one event of each of its channels.
    let mut events = mio::Events::with_capacity(1024);
    let mut tally = link::Tally::default();
    let quiet = Instant::now();
    let cpu = sys::cpu(pid);
    while quiet.elapsed() < Duration::from_secs(5) {
        rig.turn(&mut events, &mut tally, Some(Duration::from_millis(100)))?;
    }
    let quiet_cpu = (sys::cpu(pid) - cpu) as f64 / 5e7;
    let messages = layout.channels.max(10);
    let rate = (messages as f64 / 3.0).max(5.0);
    let (used, _) = rig.run(crate::fan::Pace::Rate(rate), Duration::from_secs_f64(messages as f64 / rate))?;
    settle(pid);
    let after = sys::memory(pid)?;

    drop(rig);
    let left = Instant::now();
    while sys::descriptors(pid) > descriptors && left.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(50));
    }
    let mut faults = used.faults;
    faults.add(tally.faults);
    faults.failed += sys::descriptors(pid).saturating_sub(descriptors) as u64;
    let gone = sys::memory(pid)?;
    std::thread::sleep(Duration::from_secs(5));
    let later = sys::memory(pid)?;
    // An allocator may return memory only during later allocations, so some requests are made.
    some_requests(server, 2000)?;
    std::thread::sleep(Duration::from_secs(2));
    some_requests(server, 2000)?;
    let stirred = sys::memory(pid)?;

    let mega = |bytes: u64| bytes as f64 / 1e6;
    let figures = vec![
        ("bytes_each", per(idle.saturating_sub(base))),
        ("bytes_each_after_use", per(after.saturating_sub(base))),
        ("connect_cpu_us", connected as f64 / 1e3 / units as f64),
        ("idle_cpu_%", quiet_cpu),
        ("base_MB", mega(base)),
        ("idle_MB", mega(idle)),
        ("gone_MB", mega(gone)),
        ("gone_5s_MB", mega(later)),
        ("gone_stirred_MB", mega(stirred)),
    ];
    Ok(Measure { server_name: "weir", figures, done: 0, faults })
}

/// Publishes `count` events to one channel, one after the other.
fn some_requests(server: &Process, count: usize) -> Result<()> {
    let mut stream = std::net::TcpStream::connect(server.addr())?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let host = server.addr();
    let request =
        format!("POST /v1/events?channel=bench-stir HTTP/1.1\r\nHost: {host}\r\nContent-Length: 2\r\n\r\n{{}}");
    let mut answer = [0; 2048];
    for _ in 0..count {
        stream.write_all(request.as_bytes())?;
        ensure!(stream.read(&mut answer)? > 0, "the connection ended");
    }
    Ok(())
}

/// Waits until the server is idle.
fn settle(pid: u32) {
    for _ in 0..50 {
        let before = sys::cpu(pid);
        std::thread::sleep(Duration::from_millis(200));
        if sys::cpu(pid) - before < 2_000_000 {
            return;
        }
    }
}

/// Opens a stream and resets its connection `connections` times, with `at_once` open at a time.
pub fn churn(server: &Process, connections: usize, at_once: usize) -> Result<Measure> {
    let pid = server.pid();
    settle(pid);
    let (base, descriptors) = (sys::memory(pid)?, sys::descriptors(pid));
    let (cpu, begin) = (sys::cpu(pid), sys::now());
    let mut open = std::collections::VecDeque::new();
    let mut latency = crate::stamp::Histogram::default();
    let request = |number: usize| {
        format!(
            "GET /v1/sse?channel={} HTTP/1.1\r\nHost: {}\r\nAccept: text/event-stream\r\n\r\n",
            link::channel(number as u32 % 1000),
            server.addr()
        )
    };
    let finish = |open: &mut std::collections::VecDeque<(std::net::TcpStream, u64)>,
                  latency: &mut crate::stamp::Histogram|
     -> Result<()> {
        let (mut stream, started) = open.pop_front().context("none open")?;
        let mut input = Vec::new();
        while memchr::memmem::find(&input, b"weir.open").is_none() {
            let mut piece = [0; 2048];
            let length = stream.read(&mut piece)?;
            ensure!(length > 0, "refused: {}", String::from_utf8_lossy(&input));
            input.extend_from_slice(&piece[..length]);
        }
        latency.add(sys::now() - started);
        // A reset, as after a crash of the machine. It leaves no port in TIME_WAIT.
        rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO))?;
        Ok(())
    };
    for number in 0..connections {
        let started = sys::now();
        let mut stream = std::net::TcpStream::connect(server.addr())?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(request(number).as_bytes())?;
        open.push_back((stream, started));
        if open.len() >= at_once {
            finish(&mut open, &mut latency)?;
        }
    }
    while !open.is_empty() {
        finish(&mut open, &mut latency)?;
    }
    let wall = sys::now() - begin;
    settle(pid);
    let spent = sys::cpu(pid) - cpu;
    let waited = Instant::now();
    while sys::descriptors(pid) > descriptors && waited.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(50));
    }
    let faults = Faults { failed: sys::descriptors(pid).saturating_sub(descriptors) as u64, ..Faults::default() };
    let mut measure = Measure::of("weir", connections as u64, wall, spent, 0, &latency, faults);
    measure.figures.retain(|(name, _)| *name != "load_busy_%");
    measure.figures.push(("base_MB", base as f64 / 1e6));
    measure.figures.push(("after_MB", sys::memory(pid)? as f64 / 1e6));
    Ok(measure)
}
