"""The mailbox between a replica and a front: what arrives, in how many messages, and what a broken connection does."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tide_ray.serve.errors import INTERNAL
from tide_ray.serve.mailbox import Courier, Label, Mailbox, Sent, unpacked

COUNT = 20


async def items(name: str, pause_s: float = 0.0) -> AsyncGenerator[Any]:
    for number in range(COUNT):
        await asyncio.sleep(pause_s)
        yield [name, number]


async def received(mailbox: Mailbox, courier: Courier, name: str, pause_s: float = 0.0) -> list[Any]:
    path = await mailbox.address()
    with mailbox.expecting() as (number, queue):
        stream = courier.send(items(name, pause_s), Label(str(path), number))
        return await taken(unpacked(stream, queue))


async def taken(stream: AsyncIterator[Any]) -> list[Any]:
    async with asyncio.timeout(10):
        return [item async for item in stream]


def expected(name: str) -> list[Any]:
    return [[name, number] for number in range(COUNT)]


def test_every_call_gets_its_items_in_order_and_calls_share_messages() -> None:
    names = [f"call {number}" for number in range(30)]

    async def run() -> tuple[list[list[Any]], int]:
        mailbox, courier, num_messages = Mailbox(), Courier(), 0
        path = await mailbox.address()
        assert os.stat(Path(str(path)).parent).st_mode & 0o077 == 0
        [line] = [await courier._line(str(path))]
        write = line._writer.write

        def count(data: bytes) -> None:
            nonlocal num_messages
            num_messages += 1
            write(data)

        line._writer.write = count  # type: ignore[method-assign]
        found = await asyncio.gather(*(received(mailbox, courier, name, 0.01) for name in names))
        assert mailbox._open == {}
        courier._leave(str(path), line)
        assert courier._lines == {}
        mailbox.close()
        return found, num_messages

    found, num_messages = asyncio.run(run())
    assert found == [expected(name) for name in names]
    assert num_messages < len(names) * COUNT / 5


def test_without_a_socket_the_stream_carries_the_items(tmp_path: Path) -> None:
    async def run() -> list[Any]:
        queue: asyncio.Queue[Any] = asyncio.Queue()
        stream = Courier().send(items("far"), Label(str(tmp_path / "none"), 0))
        return await taken(unpacked(stream, queue))

    assert asyncio.run(run()) == expected("far")


def test_what_fails_in_the_replica_is_raised_in_the_front() -> None:
    async def failing() -> AsyncIterator[Any]:
        yield INTERNAL
        raise RuntimeError("the replica died")

    async def run() -> None:
        mailbox, courier = Mailbox(), Courier()
        path = await mailbox.address()
        with mailbox.expecting() as (number, queue), pytest.raises(RuntimeError, match="died"):
            await taken(unpacked(courier.send(failing(), Label(str(path), number)), queue))
        assert courier._lines == {}

    asyncio.run(run())


def test_items_that_are_lost_on_the_way_are_an_error_and_not_a_wait() -> None:
    async def claiming() -> AsyncIterator[Any]:
        await asyncio.sleep(0.05)
        yield Sent(3)

    async def run() -> None:
        mailbox, courier = Mailbox(), Courier()
        path = await mailbox.address()
        with mailbox.expecting() as (number, queue):
            line = await courier._line(str(path))
            assert line is not None
            line.send(number, [])
            courier._leave(str(path), line)  # closes it after one item of three
            with pytest.raises(ConnectionError, match="too early"):
                await taken(unpacked(claiming(), queue))

    asyncio.run(run())


def test_a_front_that_is_gone_ends_the_call_in_the_replica() -> None:
    async def run() -> None:
        mailbox, courier = Mailbox(), Courier()
        path = await mailbox.address()
        is_closed = False

        async def endless() -> AsyncIterator[Any]:
            nonlocal is_closed
            try:
                while True:
                    await asyncio.sleep(0.005)
                    yield []
            finally:
                is_closed = True

        accepted: list[asyncio.StreamWriter] = []
        server = await asyncio.start_unix_server(lambda reader, writer: accepted.append(writer), f"{path}.2")
        source = endless()
        stream = courier.send(source, Label(f"{path}.2", 0))
        asyncio.get_running_loop().call_later(0.1, lambda: accepted[0].transport.abort())
        with pytest.raises(ConnectionError):
            await taken(stream)
        await source.aclose()  # as whoever made it does
        assert is_closed
        assert courier._lines == {}
        server.close()
        mailbox.close()

    asyncio.run(run())
