"""From a model's replica to a front on the same node: what is new of all streams of an engine step in one message.

A stream of Ray Serve's takes a message, and its share of threads and event loops on both sides, for every chunk. So a
front keeps a mailbox, a Unix socket in a folder that only its user may enter, and names it in each call; the replica
sends there what is new, and through Serve only how much that was. Where it cannot reach the socket, as on another node,
Serve's stream carries everything.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import pickle
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tide_ray.serve.backend import Delta
from tide_ray.serve.errors import Failure

logger = logging.getLogger("tide_ray.serve")

Item = list[Delta] | Failure
_SIZE_BYTES = 8


class Label(NamedTuple):
    """Where to send what is new of one call, and under which number."""

    path: str
    number: int


class Sent(NamedTuple):
    """The end of a stream whose items went to the mailbox: how many there were."""

    num_items: int


class _End:
    """The stream of Ray Serve has ended."""


class _Cut:
    """The connection that items came through has closed."""


class Mailbox:
    """A front's. ``close`` removes its folder."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._server: asyncio.Server | None = None
        self._opening = asyncio.Lock()
        self._numbers = itertools.count()
        self._open: dict[int, asyncio.Queue[Any]] = {}

    async def address(self) -> str | None:
        """The path of the socket, which is opened when it is first asked for; None where it cannot be."""
        async with self._opening:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="tide-front-")
                try:
                    self._server = await asyncio.start_unix_server(self._receive, Path(self._folder.name, "mail"))
                except OSError as error:
                    logger.warning("no mailbox, so chunks take longer: %s", error)
            return None if self._server is None else str(Path(self._folder.name, "mail"))

    @contextlib.contextmanager
    def expecting(self) -> Iterator[tuple[int, asyncio.Queue[Any]]]:
        """A number, and the queue that gets what comes under it during the block."""
        number = next(self._numbers)
        self._open[number] = asyncio.Queue()
        try:
            yield number, self._open[number]
        finally:
            del self._open[number]

    def close(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen: set[int] = set()
        try:
            while True:
                size = int.from_bytes(await reader.readexactly(_SIZE_BYTES))
                for number, item in pickle.loads(await reader.readexactly(size)):
                    if number in self._open:
                        seen.add(number)
                        self._open[number].put_nowait(item)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the replica has nothing under way for this front, or died
        finally:
            writer.close()
            for number in seen & self._open.keys():
                self._open[number].put_nowait(_Cut())


async def unpacked(stream: AsyncIterator[Any], queue: asyncio.Queue[Any]) -> AsyncGenerator[Item]:
    """The items of one call, whichever way they come.

    Args:
        stream: Ray Serve's.
        queue: of the mailbox.

    Raises:
        ConnectionError: items were lost on the way.
        Exception: what ``stream`` raised.
    """
    pump = asyncio.create_task(_pump(stream, queue))
    num_taken, count, is_cut, has_ended = 0, None, False, False
    try:
        while not has_ended or count not in (None, num_taken):
            if has_ended and is_cut:
                raise ConnectionError("a replica's connection to the mailbox closed too early")
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if isinstance(item, Sent):
                count = item.num_items
            elif isinstance(item, _Cut):
                is_cut = True
            elif isinstance(item, _End):
                has_ended = True
            else:
                num_taken += 1
                yield item
    finally:
        pump.cancel()


async def _pump(stream: AsyncIterator[Any], queue: asyncio.Queue[Any]) -> None:
    try:
        async for item in stream:
            queue.put_nowait(item)
        queue.put_nowait(_End())
    except Exception as error:  # of any kind: it is raised where the queue is read
        queue.put_nowait(error)


class Courier:
    """A replica's connections to mailboxes, each as long as a call is under way for it."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}
        self._opening = asyncio.Lock()

    async def send(self, items: AsyncIterator[Item], label: Label | None) -> AsyncGenerator[Item | Sent]:
        """Send items to a mailbox and give their number, or give them where that cannot be reached."""
        line = None if label is None else await self._line(label.path)
        if line is None or label is None:
            async for item in items:
                yield item
            return
        count = 0
        try:
            async for item in items:
                line.send(label.number, item)
                count += 1
            yield Sent(count)
        finally:
            self._leave(label.path, line)

    async def _line(self, path: str) -> _Line | None:
        async with self._opening:
            line = self._lines.get(path)
            if line is None or line.is_closed:
                try:
                    _, writer = await asyncio.open_unix_connection(path)
                except OSError:
                    return None
                line = self._lines[path] = _Line(writer)
            line.num_calls += 1
            return line

    def _leave(self, path: str, line: _Line) -> None:
        line.num_calls -= 1
        if not line.num_calls:
            line.close()
            if self._lines.get(path) is line:
                del self._lines[path]


class _Line:
    """Sends what it is given during one round of the event loop as one message."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.num_calls = 0
        self._writer = writer
        self._pending: list[tuple[int, Item]] = []

    @property
    def is_closed(self) -> bool:
        return self._writer.is_closing()

    def send(self, number: int, item: Item) -> None:
        """Raises ConnectionError where the front has gone."""
        if self.is_closed:
            raise ConnectionError("the mailbox is gone")
        if not self._pending:
            asyncio.get_running_loop().call_soon(self._flush)
        self._pending.append((number, item))

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._pending:
            data = pickle.dumps(self._pending, pickle.HIGHEST_PROTOCOL)
            self._pending = []
            self._writer.write(len(data).to_bytes(_SIZE_BYTES) + data)
