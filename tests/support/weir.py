"""A real weir for a test: started on a free port and stopped with the test."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import threading
import time

import httpx

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = os.environ.get("WEIR_BIN") or str(pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target") / "debug/weir")

# How long a test waits for a condition, in seconds. CI has two busy cores.
PATIENCE = 20.0

# One client for all simple requests, because creating one is slow. It keeps no connection open.
http = httpx.Client(timeout=PATIENCE, limits=httpx.Limits(max_keepalive_connections=0))


def until(what, probe, patience=PATIENCE):
    """The first truthy value of `probe`. Fails with `what` if there is none in time."""
    deadline = time.monotonic() + patience
    while True:
        value = probe()
        if value:
            return value
        assert time.monotonic() < deadline, f"waited {patience} s for {what}"
        time.sleep(0.01)


class Weir:
    def __init__(self, port=0, **env):
        """Starts `weir serve` and waits until it is ready. `env` are `WEIR__…` settings."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("WEIR_")}
        self.lines = []
        self.process = subprocess.Popen(
            [BIN, "serve", "--listen", f"127.0.0.1:{port}"],
            cwd=ROOT / "tests",  # there is no config.toml
            env=inherited | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        threading.Thread(target=self._keep_log, daemon=True).start()
        try:
            self.port = until("weir's address in its log", self._address)
            self.url = f"http://127.0.0.1:{self.port}"
            self.ws = f"ws://127.0.0.1:{self.port}/v1/ws"
            until("weir to be ready", self._ready)
        except AssertionError as error:
            self.kill()
            raise AssertionError(f"{error}\n{self.log}") from None

    def _keep_log(self):
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def log(self):
        return "".join(self.lines)

    def _address(self):
        assert self.process.poll() is None, f"weir ended at start:\n{self.log}"
        found = re.search(r"http://127\.0\.0\.1:([1-9]\d*)", self.log)
        return int(found[1]) if found else None

    def _ready(self):
        with contextlib.suppress(httpx.HTTPError):
            return http.get(f"{self.url}/health/ready").status_code == 200

    def kill(self, how=signal.SIGKILL):
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(PATIENCE)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def json(self, method, path, body=None):
        answer = http.request(method, self.url + path, **({} if body is None else {"json": body}))
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def publish(self, channel, data, **query):
        answer = http.post(f"{self.url}/v1/events", params={"channel": channel} | query, json=data)
        answer.raise_for_status()
        return answer.json()

    def metrics(self):
        """All samples of /metrics: `name{labels}` → number."""
        samples = {}
        for line in http.get(f"{self.url}/metrics").text.splitlines():
            if line and not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                samples[name] = float(value)
        return samples

    def connect(self, timeout=PATIENCE):
        """A TCP connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=timeout)

    def files(self):
        """The number of open file descriptors of the process."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def resident(self):
        """Resident memory, in bytes."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024
