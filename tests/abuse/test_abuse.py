"""Slow, invalid, oversized and disconnecting clients. After each test weir has the state from before."""

import base64
import concurrent.futures
import json
import os
import random
import re
import socket
import struct
import threading

import httpx
import pytest

from weir import PATIENCE, Weir, http, until

# Gauges that do not depend on clients.
LASTING = re.compile(r"process_|weir_build_info|weir_start_time_seconds|weir_ready")


def gauges(weir):
    """Every gauge of /metrics that depends on clients."""
    text = http.get(f"{weir.url}/metrics").text
    names = set(re.findall(r"^# TYPE (\S+) gauge$", text, re.M))
    samples = {}
    for line in text.splitlines():
        match = re.match(r"([A-Za-z_:][^ {]*)(\{.*\})? (\S+)$", line)
        if match and match[1] in names and not LASTING.match(match[1]):
            samples[match[1] + (match[2] or "")] = float(match[3])
    return samples


class Unchanged:
    """Asserts that gauges and file descriptors are the same before and after the block, and that weir still answers."""

    def __init__(self, weir):
        self.weir = weir

    def __enter__(self):
        assert http.get(f"{self.weir.url}/health/ready").status_code == 200
        self.gauges, self.files = gauges(self.weir), self.weir.files()
        assert self.gauges, "no gauges in /metrics: nothing would be checked"

    def __exit__(self, kind, *_):
        if kind:
            return
        # Stored events are deleted; the names of their channels are remembered for a minute.
        # Events of weir itself ($services) stay, within their retention.
        stored = self.weir.json("GET", "/v1/channels?prefix=&limit=1000")["channels"]
        kept = sum(channel["bytes"] for channel in stored if channel["channel"].startswith("$"))
        for channel in stored:
            if not channel["channel"].startswith("$"):
                http.delete(f"{self.weir.url}/v1/events", params={"channel": channel["channel"]}).raise_for_status()
        allowed = {"weir_channels": len(stored), "weir_bus_memory_bytes": 400 * len(stored) + 2 * kept}
        left = {}

        def settled():
            left.clear()
            now = gauges(self.weir)
            left.update({name: value for name, value in now.items() if value > self.gauges.get(name, 0.0) + allowed.get(name, 0)})
            if self.weir.files() > self.files + 2:  # a request that is about to end
                left["file descriptors"] = (self.files, self.weir.files())
            return not left

        try:
            until("every gauge to have its earlier value", settled)
        except AssertionError:
            raise AssertionError(f"not released: {left}") from None
        assert self.weir.json("POST", "/v1/services/weir/echo", {"n": 1}) == {"n": 1}
        assert self.weir.process.poll() is None and "panicked" not in self.weir.log, self.weir.log


def reset(connection):
    """Ends a connection with RST, as after a crash of the machine."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def everything(connection):
    """Everything received until the other end closes."""
    data = b""
    try:
        while piece := connection.recv(65536):
            data += piece
    except ConnectionError:
        pass
    return data


def ending(connection):
    """Everything received on a WebSocket until it is closed. A close frame is answered by closing the write side."""
    data = b""
    try:
        while piece := connection.recv(65536):
            data += piece
            if b"\x88" in piece:
                connection.shutdown(socket.SHUT_WR)
    except OSError:
        pass
    return data


def head(line, *more):
    return "\r\n".join([f"{line} HTTP/1.1", "Host: 127.0.0.1", *more, "", ""]).encode()

UPGRADE = head(
    "GET /v1/ws", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
    f"Sec-WebSocket-Key: {base64.b64encode(b'0123456789abcdef').decode()}",
)  # fmt: skip


def frame(payload, opcode=1, fin=True, mask=True, length=None):
    """A WebSocket frame, valid or not."""
    payload = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    size = len(payload) if length is None else length
    first = (0x80 if fin else 0) | opcode
    bit = 0x80 if mask else 0
    if size < 126:
        start = struct.pack("!BB", first, bit | size)
    elif size < 65536:
        start = struct.pack("!BBH", first, bit | 126, size)
    else:
        start = struct.pack("!BBQ", first, bit | 127, size)
    return start + (b"\0\0\0\0" if mask else b"") + payload  # a mask of zeros leaves the payload as it is


def upgraded(weir):
    connection = weir.connect()
    connection.sendall(UPGRADE)
    answer = b""
    while b"\r\n\r\n" not in answer:
        piece = connection.recv(4096)
        assert piece, answer
        answer += piece
    assert b" 101 " in answer.splitlines()[0], answer
    return connection


def status(answer):
    match = re.match(rb"HTTP/1\.[01] (\d{3})", answer)
    return int(match[1]) if match else None


@pytest.fixture(scope="module")
def impatient():
    """A weir with short timeouts."""
    with Weir(WEIR__LIMITS__HEADER_TIME="700ms", WEIR__LIMITS__BODY_TIME="700ms", WEIR__LIMITS__IDLE="1s", WEIR__LIMITS__STALLED="1s", WEIR__SSE__HEARTBEAT="1s") as weir:
        yield weir


# --- slow clients ---


def test_incomplete_heads_time_out_slowloris(impatient):
    with Unchanged(impatient):
        slow = [impatient.connect() for _ in range(200)]
        for n, connection in enumerate(slow):
            connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: "[: n % 40])
        # Meanwhile other clients are served.
        assert impatient.publish("busy", 1)["offset"] == 1
        for connection in slow:
            answer = everything(connection)
            assert status(answer) in (None, 408), answer
            connection.close()


def test_a_head_sent_byte_by_byte_times_out(impatient):
    with Unchanged(impatient):
        connection = impatient.connect()
        stop = threading.Event()

        def drip():
            try:
                connection.sendall(b"GET / HTTP/1.1\r\nX: ")
                while not stop.wait(0.02):
                    connection.sendall(b"x")
            except OSError:
                pass

        thread = threading.Thread(target=drip)
        thread.start()
        assert status(everything(connection)) in (None, 408)
        stop.set()
        thread.join()
        connection.close()


def test_an_incomplete_body_times_out(impatient):
    with Unchanged(impatient):
        for more in ["Content-Length: 100", "Transfer-Encoding: chunked"]:
            connection = impatient.connect()
            connection.sendall(head("POST /v1/events?channel=slow", more) + (b"5\r\nhello\r\n" if "chunked" in more else b"hello"))
            answer = everything(connection)
            assert status(answer) in (None, 400, 408), answer
            connection.close()
        assert impatient.json("GET", "/v1/events?channel=slow")["events"] == []


def test_half_open_and_half_closed_connections_are_closed(impatient):
    with Unchanged(impatient):
        silent = [impatient.connect() for _ in range(50)]
        for connection in silent:
            everything(connection)
            connection.close()
        # A client that closes its write side after the request: weir may treat that as a disconnect, as most servers do.
        connection = impatient.connect()
        connection.sendall(head("GET /health/live"))
        connection.shutdown(socket.SHUT_WR)
        assert status(everything(connection)) in (None, 200)
        connection.close()
        # A half-closed stream ends.
        connection = impatient.connect()
        connection.sendall(head("GET /v1/sse?channel=half", "Accept: text/event-stream"))
        connection.recv(1)
        connection.shutdown(socket.SHUT_WR)
        everything(connection)
        connection.close()
        connection = upgraded(impatient)
        connection.shutdown(socket.SHUT_WR)
        everything(connection)
        connection.close()


def test_readers_that_do_not_read_are_closed(impatient):
    """They are closed, other readers receive everything, and memory does not grow with the unread events."""
    with Unchanged(impatient):
        stuck_sse = impatient.connect()
        stuck_sse.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck_sse.sendall(head("GET /v1/sse?channel=flood", "Accept: text/event-stream"))
        stuck_ws = upgraded(impatient)
        stuck_ws.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck_ws.sendall(frame({"jsonrpc": "2.0", "id": 1, "method": "weir.subscribe", "params": {"channels": ["flood"]}}))
        with httpx.Client(timeout=PATIENCE) as client, client.stream("GET", f"{impatient.url}/v1/sse?channel=flood") as attentive:
            lines = attentive.iter_lines()
            assert any("data:" in line for line in lines)  # of weir.open
            until("three readers", lambda: impatient.json("GET", "/v1/channels?channel=flood")["readers"] == 3)
            for n in range(60):
                impatient.publish("flood", f"{n} " + "x" * 400_000)
                wanted = next(line for line in lines if line.startswith("data:"))
                assert f'"data":"{n} xxx' in wanted, wanted[:200]
            until("both to be closed", lambda: impatient.json("GET", "/v1/channels?channel=flood")["readers"] == 1)
        assert impatient.resident() < 300 << 20
        stuck_sse.close()
        stuck_ws.close()


def test_callers_that_do_not_read_are_closed(impatient):
    with Unchanged(impatient):
        connection = upgraded(impatient)
        connection.settimeout(PATIENCE)
        call = frame({"jsonrpc": "2.0", "id": 1, "method": "weir/echo", "params": ["x" * 50_000]})
        try:
            for _ in range(2_000):  # 100 MB of unread responses
                connection.sendall(call)
        except OSError:
            pass  # closed, as expected
        assert impatient.resident() < 300 << 20
        connection.close()


# --- oversized input ---


def test_an_oversized_head_is_rejected(weir):
    with Unchanged(weir):
        for request in [
            head("GET /health/live", "X-Long: " + "x" * 20_000),
            head("GET /v1/events?channel=" + "x" * 20_000),
            head("GET /health/live", *[f"X-{n}: {n}" for n in range(5_000)]),
        ]:
            connection = weir.connect()
            try:
                connection.sendall(request)
            except ConnectionError:
                pass
            assert status(everything(connection)) in (None, 400, 414, 431)
            connection.close()


def test_an_oversized_body_is_rejected(weir):
    with Unchanged(weir):
        answer = http.post(f"{weir.url}/v1/events?channel=big", content=b'"' + b"x" * 9_000_000 + b'"')
        assert answer.status_code == 413 and answer.json()["code"] == "too_large"
        answer = http.post(f"{weir.url}/v1/events?channel=big", content=b'"' + b"x" * 1_000_001 + b'"')
        assert answer.status_code == 413 and answer.json()["code"] == "too_large"
        # Rejected with or without a Content-Length, before the whole body is sent.
        connection = weir.connect()
        connection.sendall(head("POST /v1/events?channel=big", "Content-Length: 999999999999"))
        assert status(everything(connection)) == 413
        connection.close()
        connection = weir.connect()
        try:
            connection.sendall(head("POST /v1/events?channel=big", "Transfer-Encoding: chunked"))
            for _ in range(200):
                connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        except ConnectionError:
            pass
        assert status(everything(connection)) in (None, 413)
        connection.close()
        assert weir.json("GET", "/v1/events?channel=big")["events"] == []


def test_oversized_frames_are_closed(weir):
    with Unchanged(weir):
        before = weir.resident()
        for length in [2 << 20, 1 << 31, 1 << 40, (1 << 63) - 1]:
            connection = upgraded(weir)
            connection.sendall(frame(b"x" * 1000, length=length))
            assert b"\x03\xf1" in ending(connection)  # 1009
            connection.close()
        # Fragments each of which is within the limit.
        connection = upgraded(weir)
        try:
            connection.sendall(frame(b"x" * 60_000, fin=False))
            for _ in range(40):
                connection.sendall(frame(b"x" * 60_000, opcode=0, fin=False))
        except ConnectionError:
            pass
        assert b"\x03\xf1" in ending(connection)
        connection.close()
        assert weir.resident() < before + (100 << 20)


def test_other_limits_are_enforced(weir):
    with Unchanged(weir):
        many = [{"channel": "many", "data": n} for n in range(1001)]
        answer = http.post(f"{weir.url}/v1/events", json=many)
        assert answer.status_code in (400, 413), answer.text
        answer = http.get(f"{weir.url}/v1/events", params=[("channel", f"c{n}") for n in range(101)])
        assert answer.status_code in (400, 429), answer.text
        answer = http.post(f"{weir.url}/v1/rpc", json=[{"jsonrpc": "2.0", "id": n, "method": "weir.ping"} for n in range(101)])
        assert answer.json()["error"]["code"] == -32600
        for query in ["limit=1001", "limit=-1", "limit=x", "wait=60s", "wait=5", "wait=-5s", "wait=99999999999999999999s", "last=99999999999999999999999", "after=" + "w" * 3000]:
            answer = http.get(f"{weir.url}/v1/events?channel=c&{query}")
            assert answer.status_code == 400, f"{query}: {answer.text}"
            assert answer.headers["content-type"] == "application/problem+json"
        assert http.get(f"{weir.url}/v1/events", params={"channel": "x" * 256}).status_code == 400


def test_deeply_nested_json_is_parsed_or_rejected(weir):
    """A megabyte of brackets would overflow the stack of a recursive parser."""
    with Unchanged(weir):
        for opening, closing in ["[]", ("{\"a\":", "}")]:
            deep = opening * 150_000 + "1" + closing * 150_000
            for body in [deep, opening * 150_000, f'{{"channel":"deep","data":{deep}}}']:
                answer = http.post(f"{weir.url}/v1/events?channel=deep", content=body, timeout=PATIENCE)
                assert answer.status_code in (201, 400, 413), answer.text[:300]
                http.post(f"{weir.url}/v1/events", content=body, timeout=PATIENCE)
                http.post(f"{weir.url}/v1/rpc", content=body, timeout=PATIENCE)
                http.post(f"{weir.url}/v1/services/weir/echo", content=body, timeout=PATIENCE)
            connection = upgraded(weir)
            connection.sendall(frame(f'{{"jsonrpc":"2.0","id":1,"method":"weir/echo","params":{deep}}}'.encode()))
            assert connection.recv(1)
            connection.close()
        assert http.get(f"{weir.url}/v1/events?channel=deep").status_code == 200


# --- invalid input ---


def test_malformed_json_and_text_is_rejected(weir):
    with Unchanged(weir):
        for body in [b"{", b"", b"\xff\xfe", b'{"channel":"\xff","data":1}', b'{"channel":"a","data":\xc3}', b"nul", b"[1", b'{"channel":"a"}{', b"\0" * 100]:
            answer = http.post(f"{weir.url}/v1/events", content=body)
            assert answer.status_code == 400, (body, answer.text)
            assert answer.json()["code"] in ("parse_error", "invalid_params", "invalid_request"), (body, answer.text)
        for channel in ["%FF", "%C3", "%00", "a%0Ab", "%", "%4", "%E2%80", ""]:
            answer = http.get(f"{weir.url}/v1/events?channel={channel}")
            assert answer.status_code == 400, (channel, answer.text)
        for member in [{"channel": 5}, {"channel": "a", "type": "weir.gap"}, {"channel": "a", "type": "x\ny"}, {"channel": "a", "from": "\0"}, {"channel": "$x"}, {"channel": "a", "nonsense": 1}, {"channel": "a", "key": "a\nb"}]:
            answer = http.post(f"{weir.url}/v1/events", json=member | {"data": 1})
            assert answer.status_code in (400, 403), (member, answer.text)
        assert weir.json("GET", "/v1/events?channel=a")["events"] == []


@pytest.mark.parametrize("seed", range(5))
def test_random_bytes_are_rejected(weir, seed):
    """Random bytes, and beginnings of several protocols."""
    dice = random.Random(seed)
    with Unchanged(weir):
        starts = [
            b"", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nXX", b"\0" * 64,
            b"GET / HTTP/9.9\r\n\r\n", b"GET http://[ HTTP/1.1\r\n\r\n", b"\r\n" * 100, b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n", b"SSH-2.0-x\r\n",
            head("POST /v1/events?channel=j", "Content-Length: -1"), head("POST /v1/events?channel=j", "Content-Length: 5", "Content-Length: 6"),
            head("POST /v1/events?channel=j", "Content-Length: 5", "Transfer-Encoding: chunked"), head("POST /v1/events?channel=j", "Transfer-Encoding: chunked") + b"zz\r\n",
            head("GET /v1/ws", "Connection: Upgrade", "Upgrade: websocket"), UPGRADE.replace(b"13", b"12"), UPGRADE,
        ]  # fmt: skip
        for start in starts:
            connection = weir.connect()
            try:
                connection.sendall(start + dice.randbytes(dice.randrange(5_000)))
                connection.shutdown(socket.SHUT_WR)
                everything(connection)
            except OSError:
                pass
            connection.close()
        # No smuggled event was published.
        assert weir.json("GET", "/v1/events?channel=j")["events"] == []


def test_invalid_frames_are_closed(weir):
    with Unchanged(weir):
        wrong = {
            "unmasked": frame(b"{}", mask=False),
            "a reserved opcode": frame(b"x", opcode=3),
            "a reserved bit": bytes([0xC1, 0x80, 0, 0, 0, 0]),
            "a ping of 200 bytes": frame(b"x" * 200, opcode=9),
            "a fragmented ping": frame(b"x", opcode=9, fin=False),
            "a continuation without a first frame": frame(b"x", opcode=0),
            "a text frame within a fragmented message": frame(b"x", fin=False) + frame(b"y"),
            "text that is not UTF-8": frame(b"\xff\xfe"),
            "a close of one byte": frame(b"x", opcode=8),
            "a reserved close code": frame(struct.pack("!H", 1005), opcode=8),
            "a close reason that is not UTF-8": frame(struct.pack("!H", 1000) + b"\xff", opcode=8),
        }
        for what, bytes_ in wrong.items():
            connection = upgraded(weir)
            try:
                connection.sendall(bytes_)
            except ConnectionError:
                pass
            answer = ending(connection)
            assert answer[:1] in (b"", b"\x88"), (what, answer[:100])  # closed, usually with a close frame
            connection.close()
        # A valid close is echoed.
        connection = upgraded(weir)
        connection.sendall(frame(struct.pack("!H", 1000), opcode=8))
        assert ending(connection).startswith(b"\x88")
        connection.close()


def test_invalid_json_rpc_is_answered_with_an_error(weir):
    with Unchanged(weir):
        connection = upgraded(weir)
        nonsense = [1, "x", None, True, [], {}, {"jsonrpc": "1.0", "id": 1, "method": "x"}, {"jsonrpc": "2.0", "id": {}, "method": "a/b"}, {"jsonrpc": "2.0", "id": 1, "method": 5},
                    {"jsonrpc": "2.0", "id": 1, "method": "weir.publish", "params": 5}, {"jsonrpc": "2.0", "id": 1, "method": "weir.subscribe", "params": {"channels": "x"}},
                    {"jsonrpc": "2.0", "id": 1, "method": "weir.provide", "params": {"service": "weir"}}, {"jsonrpc": "2.0", "id": 1, "method": "weir.provide", "params": {"service": "a\nb"}},
                    {"jsonrpc": "2.0", "id": 1, "method": "/"}, {"jsonrpc": "2.0", "id": 1, "method": ""}, {"jsonrpc": "2.0", "id": 1, "method": "rpc.discover"}]  # fmt: skip
        for value in nonsense:
            connection.sendall(frame(value))
            answer = connection.recv(65536)
            body = json.loads(answer[4 if answer[1] & 127 == 126 else 2 :])
            assert set(body) == {"jsonrpc", "id", "error"}, (value, body)
            assert set(body["error"]) <= {"code", "message", "data"}, (value, body)
        connection.close()


# --- disconnects ---

KINDS = {
    "sse": head("GET /v1/sse?channel=gone", "Accept: text/event-stream"),
    "sse of many channels": head("GET /v1/sse?" + "&".join(f"channel=gone-{n}" for n in range(20)), "Accept: text/event-stream"),
    "long poll": head("GET /v1/events?channel=gone&wait=50s"),
    "half a request": head("POST /v1/events?channel=never", "Content-Length: 100") + b'"half',
    "half a head": b"GET /v1/sse?channel=gone HTT",
    "kept alive": head("GET /health/live"),
    "socket": UPGRADE,
    "subscriber": UPGRADE + frame({"jsonrpc": "2.0", "id": 1, "method": "weir.subscribe", "params": {"channels": [f"gone-{n}" for n in range(20)]}}),
    "provider": UPGRADE + frame({"jsonrpc": "2.0", "id": 1, "method": "weir.provide", "params": {"service": "gone"}}),
    "caller": UPGRADE + frame({"jsonrpc": "2.0", "id": 1, "method": "silent/never", "params": []}),
    "caller by HTTP": head("POST /v1/services/silent/never", "Content-Length: 2") + b"{}",
    "half a frame": UPGRADE + frame(b"{" * 100, length=1000),
}
SILENT = {"half a request", "half a head", "long poll", "caller by HTTP"}  # these receive nothing before they disconnect


def test_ten_thousand_abrupt_disconnects_leave_nothing(weir):
    with Unchanged(weir):
        # A provider that never answers keeps calls in flight until the end of the test.
        provider = upgraded(weir)
        provider.sendall(frame({"jsonrpc": "2.0", "id": 1, "method": "weir.provide", "params": {"service": "silent", "concurrency": 10_000}}))
        assert provider.recv(65536)
        drain = threading.Thread(target=lambda: everything(provider))
        drain.start()

        dice = random.Random(1)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:

            def vanish(kind):
                connection = weir.connect()
                connection.sendall(KINDS[kind])
                # Half of them disconnect before they receive anything.
                if kind not in SILENT and dice.random() < 0.5:
                    connection.recv(1)
                return connection

            total = 0
            while total < 10_000:
                batch = list(pool.map(vanish, [dice.choice(list(KINDS)) for _ in range(500)]))
                if total % 1000 == 0:
                    weir.publish("gone", total)  # some are written to during the disconnect
                for connection in batch:
                    if dice.random() < 0.9:
                        reset(connection)
                    else:
                        connection.close()
                total += len(batch)
        provider.shutdown(socket.SHUT_RDWR)
        drain.join(PATIENCE)
        provider.close()
    assert weir.json("GET", "/v1/channels?channel=gone")["readers"] == 0
    assert weir.json("GET", "/v1/events?channel=never")["events"] == []
    assert weir.json("GET", "/v1/services?prefix=gone")["services"] == []


def test_a_burst_of_reset_http_2_streams_leaves_nothing(weir):
    """Rapid reset (CVE-2023-44487): opening and cancelling a stream costs the attacker little, and must cost weir little."""
    import h2.config
    import h2.connection
    import h2.events

    with Unchanged(weir):
        for _ in range(5):
            connection = weir.connect()
            peer = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
            peer.initiate_connection()
            connection.sendall(peer.data_to_send())
            headers = [(":method", "GET"), (":path", "/v1/sse?channel=rapid"), (":scheme", "http"), (":authority", "127.0.0.1"), ("accept", "text/event-stream")]
            try:
                for _ in range(2_000):
                    stream = peer.get_next_available_stream_id()
                    peer.send_headers(stream, headers, end_stream=True)
                    peer.reset_stream(stream)
                    connection.sendall(peer.data_to_send())
            except OSError:
                pass  # GOAWAY
            reset(connection)
        until("no reader left", lambda: weir.json("GET", "/v1/channels?channel=rapid")["readers"] == 0)


def test_connections_over_the_limit_are_rejected():
    with Weir(WEIR__LIMITS__CONNECTIONS="8") as weir:
        held = []
        for _ in range(8):
            connection = weir.connect()
            connection.sendall(head("GET /v1/sse?channel=cap", "Accept: text/event-stream"))
            held.append(connection)
            if b"overloaded" in connection.recv(4096):
                break
        # A stream over the limit is answered with 200 and a retry event: any other status would end an EventSource.
        connection = weir.connect()
        connection.sendall(head("GET /v1/sse?channel=cap", "Accept: text/event-stream"))
        answer = everything(connection)
        assert status(answer) == 200 and b"event: weir.retry" in answer and b'"code":"overloaded"' in answer and b"retry: " in answer, answer
        assert b"id:" not in answer
        connection.close()
        for request in [head("GET /v1/events?channel=cap"), UPGRADE]:
            connection = weir.connect()
            connection.sendall(request)
            answer = everything(connection)
            assert status(answer) == 503 and b"overloaded" in answer and b"retry-after" in answer.lower(), answer
            connection.close()
        for connection in held:
            connection.close()
        until("room again", lambda: http.get(f"{weir.url}/v1/events?channel=cap").status_code == 200)


def test_a_killed_weir_restarts_at_once(weir):
    """Without state on disk, a killed weir can restart on the same address at once."""
    first = Weir()
    connections = [upgraded(first) for _ in range(20)]
    os.kill(first.process.pid, 9)
    first.process.wait(PATIENCE)
    with Weir(port=first.port) as second:
        assert second.publish("again", 1)["offset"] == 1
    for connection in connections:
        connection.close()
