//! The commands that weir sends to Redis. A test compares the list with the source of the backend.

use redis::{Cmd, cmd};

/// A script with the writes of an append, without its checks.
const APPEND: &str = "local top = tonumber(redis.call('HGET', KEYS[1], 'top') or 0) + 1
redis.call('XADD', KEYS[2], 'MAXLEN', 100, top .. '-0', 'e', ARGV[1])
redis.call('HSET', KEYS[1], 'top', top)
redis.call('PUBLISH', KEYS[1], ARGV[1])
redis.call('PEXPIRE', KEYS[1], 60000)
redis.call('PEXPIRE', KEYS[2], 60000)
return top";

/// Keys in one slot; all of them expire within a minute.
pub(super) fn keys(scratch: &str) -> [String; 4] {
    ["m", "s", "k", "z"].map(|kind| format!("{scratch}:{kind}"))
}

/// The command that runs [`APPEND`].
pub(super) fn append(scratch: &str) -> Cmd {
    let [m, s, ..] = keys(scratch);
    let mut command = cmd("EVAL");
    command.arg(APPEND).arg(2).arg(m).arg(s).arg("0123456789".repeat(10));
    command
}

/// All commands with their names. `sharded`: with the pub/sub of a cluster.
pub(super) fn all(scratch: &str, sharded: bool) -> Vec<(&'static str, Cmd)> {
    let [m, s, k, z] = keys(scratch);
    let (m, s, k, z) = (m.as_str(), s.as_str(), k.as_str(), z.as_str());
    let minute = "60000";
    let mut all: Vec<(&'static str, Vec<&str>)> = vec![
        ("HSET", vec![m, "top", "1"]),
        ("HGET", vec![m, "top"]),
        ("HMGET", vec![m, "top", "epoch"]),
        ("HGETALL", vec![m]),
        ("HKEYS", vec![m]),
        ("HLEN", vec![m]),
        ("HDEL", vec![m, "none"]),
        ("HSCAN", vec![m, "0"]),
        ("PEXPIRE", vec![m, minute]),
        ("PTTL", vec![m]),
        ("XADD", vec![s, "1-0", "e", "."]),
        ("PEXPIRE", vec![s, minute]),
        ("XLEN", vec![s]),
        ("XRANGE", vec![s, "-", "+", "COUNT", "1"]),
        ("XREVRANGE", vec![s, "+", "-", "COUNT", "1"]),
        ("XTRIM", vec![s, "MAXLEN", "1"]),
        ("XINFO", vec!["STREAM", s]),
        ("SET", vec![k, "1", "PX", minute]),
        ("GET", vec![k]),
        ("EXISTS", vec![k]),
        ("ZADD", vec![z, "1", "a"]),
        ("PEXPIRE", vec![z, minute]),
        ("ZRANGE", vec![z, "0", "0"]),
        ("ZRANGEBYLEX", vec![z, "-", "+"]),
        ("ZSCORE", vec![z, "a"]),
        ("ZCARD", vec![z]),
        ("ZREM", vec![z, "a"]),
        ("DEL", vec![k]),
        ("UNLINK", vec![k]),
        ("SCAN", vec!["0", "COUNT", "1"]),
        ("TIME", vec![]),
        ("ROLE", vec![]),
        ("WAIT", vec!["0", "1"]),
        ("SCRIPT", vec!["LOAD", "return 1"]),
        ("EVALSHA", vec!["e0e1f9fabfc9d4800c877a703b823ac0578ff8db", "1", m]),
        ("PUBSUB", vec!["NUMSUB", m]),
        ("PUBLISH", vec![m, "."]),
        ("SUBSCRIBE", vec![m]),
        ("UNSUBSCRIBE", vec![m]),
        ("CLIENT", vec!["ID"]),
    ];
    if sharded {
        all.extend([("SPUBLISH", vec![m, "."]), ("SSUBSCRIBE", vec![m]), ("SUNSUBSCRIBE", vec![m])]);
        all.extend([("CLUSTER", vec!["MYID"]), ("CLUSTER", vec!["SLOTS"])]);
    }
    let mut all: Vec<(&str, Cmd)> = all
        .into_iter()
        .map(|(name, args)| {
            let mut command = cmd(name);
            command.arg(args);
            (name, command)
        })
        .collect();
    all.push(("EVAL", append(scratch)));
    all
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    /// Sent with every connection, or only to a cluster or a sentinel.
    const ELSEWHERE: &[&str] =
        &["HELLO", "AUTH", "SELECT", "PING", "INFO", "ASKING", "CLUSTER", "SENTINEL", "READONLY"];

    /// The commands in the source of the backend, in scripts and outside.
    fn used(folder: &Path, found: &mut Vec<(String, String)>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                used(&path, found);
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            for opening in ["redis.call('", "redis.pcall('", "redis.call(\"", "redis.pcall(\"", "cmd(\""] {
                for part in text.split(opening).skip(1) {
                    let name: String = part.chars().take_while(char::is_ascii_alphabetic).collect();
                    found.push((name.to_uppercase(), path.display().to_string()));
                }
            }
        }
    }

    #[test]
    fn every_command_of_the_backend_is_tried() {
        let mut found = Vec::new();
        used(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/backend/redis"), &mut found);
        assert!(!found.is_empty());
        let tried = all("x", true);
        for (name, file) in found {
            let known = tried.iter().any(|(tried, _)| *tried == name) || ELSEWHERE.contains(&name.as_str());
            assert!(known, "{file} uses {name}: weir doctor should try it, in src/cli/doctor/redis/commands.rs");
        }
    }
}
