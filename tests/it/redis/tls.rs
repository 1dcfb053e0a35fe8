//! Redis over TLS, with certificates that the tests create.

use std::{
    fs,
    path::PathBuf,
    process::Command,
    sync::atomic::{AtomicU32, Ordering::SeqCst},
};

use serde_json::json;

use crate::support::{
    MINUTE, Process, RedisServer, Request, eventually_blocking, eventually_within, get_json, redis::free_port,
};

/// Certificates in a directory that is removed on drop.
struct Certificates(PathBuf);

impl Drop for Certificates {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Certificates {
    /// Two authorities, `ca` and `other`, and two certificates of `ca`: `server` for 127.0.0.1 and `elsewhere` for
    /// another name.
    fn create() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, SeqCst);
        let certificates = Certificates(std::env::temp_dir().join(format!("weir-tls-{}-{number}", std::process::id())));
        fs::create_dir_all(&certificates.0).unwrap();
        for authority in ["ca", "other"] {
            let (key, pem) =
                (certificates.path(&format!("{authority}.key")), certificates.path(&format!("{authority}.pem")));
            let subject = format!("/CN={authority}");
            certificates.openssl(&[
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
                "-days",
                "2",
                "-subj",
                &subject,
                "-keyout",
                &key,
                "-out",
                &pem,
            ]);
        }
        for (name, place) in [("server", "IP:127.0.0.1"), ("elsewhere", "DNS:elsewhere.test")] {
            let (key, csr, pem) = (format!("{name}.key"), format!("{name}.csr"), format!("{name}.pem"));
            let (key, csr, pem) = (certificates.path(&key), certificates.path(&csr), certificates.path(&pem));
            let names = certificates.path("names");
            fs::write(&names, format!("subjectAltName={place}\n")).unwrap();
            certificates.openssl(&[
                "req",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
                "-subj",
                "/CN=redis",
                "-keyout",
                &key,
                "-out",
                &csr,
            ]);
            certificates.openssl(&[
                "x509",
                "-req",
                "-days",
                "2",
                "-in",
                &csr,
                "-CA",
                &certificates.path("ca.pem"),
                "-CAkey",
                &certificates.path("ca.key"),
                "-CAcreateserial",
                "-extfile",
                &names,
                "-out",
                &pem,
            ]);
        }
        certificates
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    fn openssl(&self, args: &[&str]) {
        let done = Command::new("openssl").args(args).output().expect("openssl");
        assert!(done.status.success(), "openssl {args:?}: {}", String::from_utf8_lossy(&done.stderr));
    }

    /// A server with a second port for TLS, and its URL.
    async fn server(&self, name: &str) -> (RedisServer, String) {
        let port = free_port();
        let (key, pem) = (self.path(&format!("{name}.key")), self.path(&format!("{name}.pem")));
        let number = port.to_string();
        let ca = self.path("ca.pem");
        let server = RedisServer::start(&[
            "--tls-port",
            &number,
            "--tls-cert-file",
            &pem,
            "--tls-key-file",
            &key,
            "--tls-ca-cert-file",
            &ca,
            "--tls-auth-clients",
            "no",
        ])
        .await;
        (server, format!("rediss://127.0.0.1:{port}"))
    }

    /// The log of a node that trusts `authority`, up to its report that Redis does not answer.
    fn log(&self, url: &str, authority: &str) -> String {
        let node = Process::start(&[
            ("WEIR__BUS__BACKEND", "redis"),
            ("WEIR__BUS__REDIS__URL", url),
            ("SSL_CERT_FILE", &self.path(&format!("{authority}.pem"))),
        ]);
        eventually_blocking("the node reports Redis", || node.log().contains("Redis cannot be reached yet"));
        node.log()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_connects_to_redis_over_tls() {
    let certificates = Certificates::create();
    let (redis, url) = certificates.server("server").await;
    let nodes: Vec<Process> = [url.clone(), redis.url()]
        .iter()
        .map(|url| {
            Process::start(&[
                ("WEIR__BUS__BACKEND", "redis"),
                ("WEIR__BUS__REDIS__URL", url),
                ("SSL_CERT_FILE", &certificates.path("ca.pem")),
            ])
        })
        .collect();
    let [over_tls, beside] = [0, 1].map(|n: usize| nodes[n].address);
    eventually_within(MINUTE, "the node is ready", async || {
        Request::new(over_tls, "GET", "/health/ready").await.status == 200
    })
    .await;
    Request::new(over_tls, "POST", "/v1/events?channel=a").body("1").await.expect(201);
    // The subscription works as well, also on a new connection.
    redis.cli(&["CLIENT", "KILL", "TYPE", "pubsub"]).await;
    redis.cli(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]).await;
    let poll = tokio::spawn(async move { get_json(over_tls, "/v1/events?channel=a&after=1&wait=50s").await });
    eventually_within(MINUTE, "the publish succeeds", async || {
        Request::new(beside, "POST", "/v1/events?channel=a").body("2").await.status == 201
    })
    .await;
    assert_eq!(poll.await.unwrap()["events"][0]["data"], json!(2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_untrusted_certificate_is_rejected_with_the_reason() {
    let certificates = Certificates::create();
    let ((_right, url), (_wrong, elsewhere)) =
        (certificates.server("server").await, certificates.server("elsewhere").await);
    for (url, authority, reason) in [
        (url.as_str(), "other", "SSL_CERT_FILE names a file of those to trust"),
        (&elsewhere, "ca", "its certificate is for another name"),
    ] {
        let log = certificates.log(url, authority);
        assert!(log.contains(reason), "{url} {authority}: {log}");
    }
}
