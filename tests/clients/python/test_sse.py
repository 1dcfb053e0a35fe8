"""Python httpx-sse and sseclient-py: streams in programs."""

import contextlib
import json
import threading

import httpx
import pytest
import requests
import sseclient
from httpx_sse import connect_sse

from weir import PATIENCE, http, until


@contextlib.contextmanager
def stream(weir, query, headers=None, **options):
    with httpx.Client(timeout=PATIENCE, **options) as client, connect_sse(client, "GET", f"{weir.url}/v1/sse?{query}", headers=dict(headers or {})) as source:
        yield source.iter_sse()


def test_httpx_sse(weir):
    with stream(weir, "channel=h") as events:
        opening = next(events)
        assert opening.event == "weir.open" and opening.id and opening.retry
        assert json.loads(opening.data)["channels"] == [{"channel": "h", "position": opening.id}]
        for n in range(3):
            weir.publish("h", n, type="t")
        for n in range(3):
            event = next(events)
            assert event.event == "message"
            envelope = json.loads(event.data)
            assert envelope["data"] == n and envelope["type"] == "t"
            assert event.id == f"{envelope['epoch']}-{envelope['offset']}"


def test_resumes_by_header_and_by_query(weir):
    placed = [weir.publish("resume", n) for n in range(5)]
    position = f"{placed[1]['epoch']}-{placed[1]['offset']}"
    for query, headers in [("", {"Last-Event-ID": position}), (f"&last_event_id={position}", {}), (f"&lastEventId={position}", {}), (f"&after={position}", {}), ("&last=3", {}), ("&after=2", {})]:
        # The position of the client takes precedence over `after` of the URL.
        extra = "&after=earliest" if "Event-ID" in str(headers) or "vent" in query else ""
        with stream(weir, "channel=resume" + query + extra, headers) as events:
            assert next(events).event == "weir.open"
            assert [json.loads(next(events).data)["data"] for _ in range(3)] == [2, 3, 4], (query, headers)


def test_breaks_heartbeats_make_no_empty_events(weir):
    """After an id httpx-sse dispatches an event for every blank line. The heartbeat is sent every second."""
    with httpx.Client(timeout=PATIENCE) as client, client.stream("GET", f"{weir.url}/v1/sse?channel=beat") as raw, stream(weir, "channel=beat") as events:
        assert next(events).event == "weir.open"
        lines = raw.iter_lines()
        beats = 0
        while beats < 3:
            beats += next(lines) == ":"
        weir.publish("beat", 1)
        event = next(events)
        assert json.loads(event.data)["data"] == 1


def test_sseclient_py(weir):
    with requests.get(f"{weir.url}/v1/sse?channel=s", stream=True, timeout=PATIENCE) as answer:
        events = sseclient.SSEClient(answer).events()
        assert next(events).event == "weir.open"
        weir.publish("s", {"id": 7})
        event = next(events)
        assert event.event == "message" and json.loads(event.data)["data"] == {"id": 7}


def test_headers(weir):
    with http.stream("GET", f"{weir.url}/v1/sse?channel=x", headers={"Accept-Encoding": "gzip, br"}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert "no-store" in answer.headers["cache-control"] and "no-transform" in answer.headers["cache-control"]
        assert answer.headers["x-accel-buffering"] == "no"
        assert "content-encoding" not in answer.headers
    for path in ["/v1/sse?channel=x", "/v1/events?channel=x&wait=50s"]:
        head = http.head(weir.url + path, timeout=5)  # answered at once, starts no stream
        assert head.status_code == 200 and not head.content


def test_accept(weir):
    assert http.get(f"{weir.url}/v1/sse?channel=x", headers={"Accept": "application/json"}).status_code == 406
    with http.stream("GET", f"{weir.url}/v1/events?channel=x", headers={"Accept": "text/event-stream"}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert "accept" in answer.headers["vary"].lower()


def test_http2(weir):
    """h2c by prior knowledge: many streams on one connection."""
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(httpx.Client(http1=False, http2=True, timeout=PATIENCE))
        streams = [stack.enter_context(connect_sse(client, "GET", f"{weir.url}/v1/sse?channel=h2-{n}")).iter_sse() for n in range(20)]
        for events in streams:
            assert next(events).event == "weir.open"
        for n in range(20):
            assert client.post(f"{weir.url}/v1/events?channel=h2-{n}", json=n).status_code == 201
        for n, events in enumerate(streams):
            assert json.loads(next(events).data)["data"] == n


def test_long_poll_wakes_every_waiter(weir):
    top = weir.publish("wake", 0)
    after = f"{top['epoch']}-{top['offset']}"
    answers = []

    def poll():
        answers.append(http.get(f"{weir.url}/v1/events", params={"channel": "wake", "after": after, "wait": "30s"}, timeout=60).json())

    waiters = [threading.Thread(target=poll) for _ in range(30)]
    for waiter in waiters:
        waiter.start()
    until("thirty waiting readers", lambda: weir.json("GET", "/v1/channels?channel=wake")["readers"] == 30)
    weir.publish("wake", 1)
    for waiter in waiters:
        waiter.join(PATIENCE)
    assert [[event["data"] for event in answer["events"]] for answer in answers] == [[1]] * 30


def test_no_event_is_lost_between_read_and_wait(weir):
    """A poller that always continues `after` its last position receives each of 500 events once."""
    publisher = threading.Thread(target=lambda: [weir.publish("race", n) for n in range(500)])
    publisher.start()
    seen, after = [], "earliest"
    with httpx.Client(timeout=PATIENCE) as client:
        while len(seen) < 500:
            page = client.get(f"{weir.url}/v1/events", params={"channel": "race", "after": after, "wait": "10s"}).json()
            assert page["gaps"] == []
            seen += [event["data"] for event in page["events"]]
            after = page["next"]
    publisher.join()
    assert seen == list(range(500))


@pytest.mark.parametrize("transport", ["sse", "poll", "ws"])
def test_one_position_on_every_transport(weir, transport):
    """A client changes the transport and misses nothing."""
    import websockets.sync.client

    channel = f"switch-{transport}"
    for n in range(4):
        weir.publish(channel, n)
    page = weir.json("GET", f"/v1/events?channel={channel}&limit=2")
    assert [event["data"] for event in page["events"]] == [0, 1] and page["more"]
    position = page["next"]
    if transport == "sse":
        with stream(weir, f"channel={channel}", {"Last-Event-ID": position}) as events:
            assert next(events).event == "weir.open"
            rest = [json.loads(next(events).data)["data"] for _ in range(2)]
    elif transport == "poll":
        rest = [event["data"] for event in weir.json("GET", f"/v1/events?channel={channel}&after={position}")["events"]]
    else:
        with websockets.sync.client.connect(weir.ws) as socket:
            socket.send(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "weir.subscribe", "params": {"channels": [{"channel": channel, "after": position}]}}))
            assert "gap" not in json.loads(socket.recv(PATIENCE))["result"]["channels"][0]
            rest = [json.loads(socket.recv(PATIENCE))["params"]["data"] for _ in range(2)]
    assert rest == [2, 3]
