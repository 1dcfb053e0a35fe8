"""Python jsonrpc-websocket: caller, subscriber and provider on one socket."""

import asyncio

import jsonrpc_base
import pytest
from jsonrpc_websocket import Server

from weir import PATIENCE


@pytest.fixture
async def connect(weir):
    servers = []

    async def connect():
        server = Server(weir.ws, timeout=PATIENCE)
        server._task = await server.ws_connect()
        servers.append(server)
        return server

    yield connect
    for server in servers:
        await server.close()
        # The receive loop ends without an exception: nothing that weir sent has broken it.
        await asyncio.wait_for(server._task, PATIENCE)


def method(server, name):
    """A method by its name, which contains a slash."""
    return getattr(server, name)


async def test_calls(connect):
    server = await connect()
    assert await method(server, "weir/echo")(n=1) == {"n": 1}
    assert await method(server, "weir/echo")(1, 2) == [1, 2]
    placed = await method(server, "weir.publish")(channel="py", data={"id": 7})
    assert placed["channel"] == "py" and placed["offset"] == 1
    page = await method(server, "weir.read")(channels=["py"], consumer="py")
    assert page["events"][0]["data"] == {"id": 7}
    assert await method(server, "weir.commit")(consumer="py", after=page["next"]) is None


async def test_errors(connect):
    server = await connect()
    with pytest.raises(jsonrpc_base.ProtocolError) as caught:
        await method(server, "nobody/home")()
    assert caught.value.args[0] == -32020
    with pytest.raises(jsonrpc_base.ProtocolError) as caught:
        await method(server, "weir.nonsense")()
    assert caught.value.args[0] == -32601
    assert await method(server, "weir/echo")(1) == [1]


async def test_provides(connect, weir):
    provider = await connect()
    provider.add = lambda a, b: a + b

    async def slow(**params):
        return params

    setattr(provider, "slow", slow)
    assert await method(provider, "weir.provide")(service="math") == {"service": "math", "providers": 1}
    caller = await connect()
    assert await method(caller, "math/add")(1, 2) == 3
    assert await method(caller, "math/add")(a=20, b=22) == 42
    assert await method(caller, "math/slow")(x=1) == {"x": 1}
    assert await asyncio.to_thread(weir.json, "POST", "/v1/services/math/add", [3, 4]) == 7
    with pytest.raises(jsonrpc_base.ProtocolError) as caught:
        await method(caller, "math/absent")()
    assert caught.value.args[0] == -32601
    # Many concurrent calls on one socket, and calls of the provider to itself among them.
    answers = await asyncio.gather(*[method(caller, "math/add")(n, 1) for n in range(200)], *[method(provider, "math/add")(n, 2) for n in range(50)])
    assert answers == [n + 1 for n in range(200)] + [n + 2 for n in range(50)]


async def test_subscribes(connect, weir):
    server = await connect()
    events = asyncio.Queue()
    # The event itself is params, so its members are named arguments.
    setattr(server, "weir.event", lambda **event: events.put_nowait(event))
    await method(server, "weir.subscribe")(channels=["feed"])
    for n in range(100):
        await asyncio.to_thread(weir.publish, "feed", n) if n < 3 else await method(server, "weir.publish")(channel="feed", data=n)
    seen = [await asyncio.wait_for(events.get(), PATIENCE) for _ in range(100)]
    assert sorted(event["data"] for event in seen) == list(range(100))  # each handler is a separate task


async def test_breaks_events_are_not_sent_as_an_array(connect, weir):
    """Any array ends its receive loop with a TypeError: events must not be sent as an array."""
    server = await connect()
    seen = asyncio.Queue()
    setattr(server, "weir.event", lambda **event: seen.put_nowait(event))
    await method(server, "weir.subscribe")(channels=["burst"])
    await asyncio.to_thread(weir.json, "POST", "/v1/events", [{"channel": "burst", "data": n} for n in range(500)])
    for _ in range(500):
        await asyncio.wait_for(seen.get(), PATIENCE)
    assert not server._task.done()
    assert await method(server, "weir/echo")(1) == [1]


async def test_breaks_an_error_always_has_an_id(connect):
    """An error without `id` is a KeyError in its receive loop. Invalid JSON must be answered with `id: null`."""
    server = await connect()
    await server._client.send_str("{nonsense")
    assert await method(server, "weir/echo")(1) == [1]
    assert not server._task.done()
