"""Python websockets with jsonrpcclient (caller) and jsonrpcserver (the strictest provider)."""

import asyncio
import json

import jsonrpcclient
import pytest
import websockets
from jsonrpcserver import Error, Success, async_dispatch

from weir import PATIENCE


async def ask(socket, method, params=None):
    request = jsonrpcclient.request(method, params=params)
    await socket.send(json.dumps(request))
    while True:
        message = json.loads(await asyncio.wait_for(socket.recv(), PATIENCE))
        if message.get("id") == request["id"] and "method" not in message:
            return jsonrpcclient.parse(message)


async def test_calls_and_subscribes(weir):
    async with websockets.connect(weir.ws) as socket:
        assert (await ask(socket, "weir/echo", [1])).result == [1]
        assert isinstance(await ask(socket, "nobody/home"), jsonrpcclient.Error)
        await ask(socket, "weir.subscribe", {"channels": ["bar"]})
        await asyncio.to_thread(weir.publish, "bar", "hello")
        event = json.loads(await asyncio.wait_for(socket.recv(), PATIENCE))
        assert event["method"] == "weir.event" and event["params"]["data"] == "hello"


async def test_the_largest_event_fits_its_default_frame(weir):
    """`websockets` closes at 1 MiB, envelope included: an event of 1,000,000 bytes must fit."""
    async with websockets.connect(weir.ws) as socket:
        await ask(socket, "weir.subscribe", {"channels": ["large"]})
        await asyncio.to_thread(weir.publish, "large", "x" * 999_000)
        event = json.loads(await asyncio.wait_for(socket.recv(), PATIENCE))
        assert len(event["params"]["data"]) == 999_000
        refused = await ask(socket, "weir.publish", {"channel": "large", "data": "x" * 1_000_000})
        assert isinstance(refused, jsonrpcclient.Error) and refused.data["code"] == "too_large"


async def test_binary_frames_are_read(weir):
    """`send(orjson.dumps(…))` sends a binary frame."""
    async with websockets.connect(weir.ws) as socket:
        await socket.send(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "weir/echo", "params": [1]}).encode())
        answer = await asyncio.wait_for(socket.recv(), PATIENCE)
        assert isinstance(answer, str) and json.loads(answer)["result"] == [1]


async def test_breaks_requests_have_no_extra_member(weir):
    async def add(a, b):
        return Success(a + b)

    async def refuse():
        return Error(42, "no such user", {"id": 7})

    methods = {"add": add, "refuse": refuse}

    async with websockets.connect(weir.ws) as provider, websockets.connect(weir.ws) as caller:
        assert (await ask(provider, "weir.provide", {"service": "strict"})).result["providers"] == 1

        async def serve():
            async for message in provider:
                await provider.send(await async_dispatch(message, methods=methods))

        serving = asyncio.create_task(serve())
        assert (await ask(caller, "strict/add", [1, 2])).result == 3
        assert (await ask(caller, "strict/add", {"a": 1, "b": 2})).result == 3
        refused = await ask(caller, "strict/refuse")
        assert (refused.code, refused.message, refused.data) == (42, "no such user", {"id": 7})
        # Params that are neither an array nor an object are not forwarded.
        await caller.send('{"jsonrpc":"2.0","id":"scalar","method":"strict/add","params":5}')
        answer = json.loads(await asyncio.wait_for(caller.recv(), PATIENCE))
        assert answer["id"] in ("scalar", None) and answer["error"]["code"] in (-32600, -32602)
        serving.cancel()


async def test_pings_are_answered_both_ways(weir):
    async with websockets.connect(weir.ws, ping_interval=None) as socket:
        latency = await asyncio.wait_for(await socket.ping(), PATIENCE)
        assert latency >= 0


async def test_a_peer_that_does_not_answer_pings_is_closed():
    from weir import Weir

    with Weir(WEIR__WS__PING="1s") as weir:
        # A peer that does not read never answers pings: the socket is open, but the program hangs.
        reader, writer = await asyncio.open_connection("127.0.0.1", weir.port)
        writer.write(
            b"GET /v1/ws HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)
        assert b" 101 " in head.splitlines()[0]
        rest = await asyncio.wait_for(reader.read(), PATIENCE)  # until weir closes
        assert b"\x89" in rest  # weir has sent a ping
        assert (4000).to_bytes(2, "big") + b"dead_peer" in rest
        writer.close()


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65_535, 65_536, 500_000])
async def test_frames_with_every_length_encoding(weir, size):
    async with websockets.connect(weir.ws) as socket:
        assert (await ask(socket, "weir/echo", ["x" * size])).result == ["x" * size]
        # The same, fragmented by the sender.
        text = json.dumps({"jsonrpc": "2.0", "id": "f", "method": "weir/echo", "params": ["y" * size]})
        third = max(1, len(text) // 3)
        await socket.send([text[:third], text[third : 2 * third], text[2 * third :]])
        assert json.loads(await asyncio.wait_for(socket.recv(), PATIENCE))["result"] == ["y" * size]
