"""What stario.py promises, part by part, in the order of the file.

    python test_stario.py              all tests; what needs more than Python is skipped with a reason
    python test_stario.py TestRelay    one class
    STARIO_TEST_ALL=1 python test_stario.py    a missing browser, Redis, ... is a failure

Most tests talk to a real server over a real socket.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import re
import shutil
import socket
import struct
import sys
import unittest
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from stario import (
    Context,
    Stario,
    StarioError,
    Writer,
)

AsyncTest = unittest.IsolatedAsyncioTestCase


# -- What the tests share


def needs(*names: str) -> Callable[[Any], Any]:
    """Skip a test where a module or a program is missing; fail it if STARIO_TEST_ALL is set."""

    def is_there(name: str) -> bool:
        if shutil.which(name):
            return True
        try:
            importlib.import_module(name)
        except ImportError:
            return False
        return True

    missing = [name for name in names if not is_there(name)]
    if not missing or os.environ.get("STARIO_TEST_ALL"):
        return lambda test: test
    return unittest.skip(f"needs {', '.join(missing)}")


@dataclass
class Answer:
    """An answer as it came over the wire."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()


class Peer:
    """A client that sends just the bytes it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, port: int, host: str = "127.0.0.1", **options: Any) -> Peer:
        return cls(*await asyncio.open_connection(host, port, limit=2**26, **options))

    async def send(self, *pieces: bytes | str) -> None:
        for piece in pieces:
            self.writer.write(piece.encode("latin-1") if isinstance(piece, str) else piece)
        await self.writer.drain()

    async def get(self, path: str = "/", method: str = "GET", **fields: str) -> Answer:
        """Send a request without a body and read its answer."""
        lines = "".join(f"{name.replace('_', '-')}: {text}\r\n" for name, text in fields.items())
        await self.send(f"{method} {path} HTTP/1.1\r\nHost: test\r\n{lines}\r\n")
        return await self.answer(head_only=method == "HEAD")

    async def head(self) -> Answer:
        """Read the head of an answer."""
        block = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = block.split("\r\n")[:-2]
        headers: dict[str, str] = {}
        for line in lines:
            name, _, value = line.partition(": ")
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        return Answer(int(first.split()[1]), headers, b"")

    async def answer(self, *, head_only: bool = False) -> Answer:
        """Read a whole answer."""
        answer = await self.head()
        if head_only or answer.status in (204, 304) or answer.status < 200:
            return answer
        if "content-length" in answer.headers:
            answer.body = await self.reader.readexactly(int(answer.headers["content-length"]))
        elif "transfer-encoding" in answer.headers:
            while chunk := await self.chunk():
                answer.body += chunk
        else:
            answer.body = await self.rest()
        return answer

    async def chunk(self) -> bytes:
        """Read one chunk of a chunked body; the last one is empty."""
        size = int(await self.reader.readuntil(b"\r\n"), 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def rest(self) -> bytes:
        """Read up to the end of the connection."""
        return await self.reader.read(-1)

    def reset(self) -> None:
        """Vanish with a TCP reset."""
        connection = self.writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def close(self) -> None:
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except (ConnectionError, BrokenPipeError):
            pass


@asynccontextmanager
async def connected(app: Stario, **options: Any) -> AsyncIterator[Peer]:
    """A server for the app, and a client that is connected to it."""
    async with app.running(**options) as server:
        peer = await Peer.connect(server.port)
        try:
            yield peer
        finally:
            await peer.close()


async def ask(app: Stario, *pieces: bytes | str, **options: Any) -> bytes:
    """All that a server sends, up to its closing, to a client that sends this and then waits."""
    async with connected(app, **options) as peer:
        await peer.send(*pieces)
        return await asyncio.wait_for(peer.rest(), 10)


def within(awaitable: Any, seconds: float = 10) -> Any:
    """Await something that must happen, without hanging for ever if it does not."""
    return asyncio.wait_for(awaitable, seconds)


# -- The runner


class _Result(unittest.TextTestResult):
    """Counts what passed: unittest itself counts only what ran."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.passed = 0

    def addSuccess(self, test: unittest.TestCase) -> None:
        super().addSuccess(test)
        self.passed += 1


def main() -> int:
    names = [name for name in sys.argv[1:] if not name.startswith("-")]
    loader = unittest.TestLoader()
    here = sys.modules["__main__"]
    suite = (
        loader.loadTestsFromNames(names, here) if names else loader.loadTestsFromModule(here)
    )
    verbosity = 2 if "-v" in sys.argv else 1
    result = unittest.TextTestRunner(verbosity=verbosity, resultclass=_Result).run(suite)
    assert isinstance(result, _Result)
    failed = len(result.failures) + len(result.errors) + len(result.unexpectedSuccesses)
    for test, reason in result.skipped:
        print(f"skipped {test}: {reason}")
    print(f"{result.passed} passed, {failed} failed, {len(result.skipped)} skipped", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
