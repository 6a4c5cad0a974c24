"""What stario.py promises, part by part, in the order of the file.

    python test_stario.py              all tests; some are skipped where only Python is there
    python test_stario.py TestRelay    one class
    STARIO_TEST_ALL=1 python test_stario.py    a missing browser, Redis, ... is a failure

Most tests talk to a real server over a real socket.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import codecs
import concurrent.futures
import contextlib
import contextvars
import copy
import dataclasses
import email.utils
import enum
import errno
import functools
import gc
import gzip
import hashlib
import html
import importlib
import inspect
import io
import itertools
import json
import logging
import math
import os
import pickle
import random
import re
import select
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import tracemalloc
import types
import unittest
import unittest.mock
import uuid
import weakref
import zipfile
import zlib
from collections import ChainMap, Counter, UserString, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import InitVar, dataclass, field
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from html.parser import HTMLParser
from http import HTTPStatus
from pathlib import Path
from types import MappingProxyType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Generic,
    Literal,
    NamedTuple,
    NewType,
    NotRequired,
    Required,
    TypedDict,
    TypeVar,
    cast,
)
from unittest import mock
from urllib.parse import parse_qs, parse_qsl, quote, unquote, urlencode, urljoin, urlsplit

import stario
from stario import (
    POCKET_CLIENT,
    Carrier,
    ClientDisconnected,
    CompressionConfig,
    Connection,
    Context,
    HttpException,
    JsonTracer,
    Relay,
    RichTracer,
    Router,
    SafeString,
    Server,
    Session,
    SignalsError,
    Span,
    SpanEvent,
    Stario,
    StarioError,
    Subscription,
    TestClient,
    Tracer,
    Writer,
    asset,
    at,
    baked,
    data,
    datastar_script,
    h,
    js,
    read_signals,
    render,
    s,
    same_origin,
)

try:
    from playwright.sync_api import (
        Browser,
        Page,
        Playwright,
        sync_playwright,
    )
    from playwright.sync_api import (
        Error as PlaywrightError,
    )
except ImportError:  # the tests in a browser are skipped
    sync_playwright = None  # type: ignore[assignment]

AsyncTest = unittest.IsolatedAsyncioTestCase


# -- What the tests share


PROGRAMS = (
    "haproxy",
    "nginx",
    "openssl",
    "redis-server",
    "unshare",
    "ip",
    os.environ.get("STARIO_CHROMIUM", "/usr/bin/chromium"),
)


def needs(*names: str) -> Callable[[Any], Any]:
    """Skip a test where a module or a program is missing.

    With STARIO_TEST_ALL set it fails instead, unless STARIO_TEST_WITHOUT names what is missing.
    """

    def is_there(name: str) -> bool:
        if name in PROGRAMS:
            return shutil.which(name) is not None
        try:
            importlib.import_module(name)
        except ImportError:
            return False
        return True

    missing = [name for name in names if not is_there(name)]
    known = os.environ.get("STARIO_TEST_WITHOUT", "").split()
    if not missing or (os.environ.get("STARIO_TEST_ALL") and not set(missing) & set(known)):
        return lambda test: test
    return unittest.skip(f"needs {', '.join(missing)}")


class Kept(Carrier):
    """A carrier that keeps the bytes of its answer."""

    def __init__(self) -> None:
        self.scopes = []
        self.kept = b""

    def begin(self, status: int, fields: bytes, unsized: bool) -> None:
        self.kept += fields

    def send(self, data: bytes) -> None:
        self.kept += data

    def finish(self) -> None: ...

    def abort(self) -> None: ...

    async def drained(self) -> None: ...


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
            name = name.lower()  # proxies write it with capitals
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
        with suppress(ConnectionError):
            await self.writer.wait_closed()


@asynccontextmanager
async def connected(app: Stario, **options: Any) -> AsyncIterator[Peer]:
    """A server for the app, and a client that is connected to it."""
    async with app.running(**options) as server:
        peer = await Peer.connect(server.port)
        try:
            yield peer
        finally:
            await peer.close()


def multipart(body: bytes, content_type: str, size: int = 2**16) -> stario.Form:
    """A multipart form that has come in pieces of this size."""
    reader = stario._MultipartReader(content_type)
    for start in range(0, len(body), size):
        reader.feed(body[start : start + size])
    return reader.form()


async def ask(app: Stario, *pieces: bytes | str, **options: Any) -> bytes:
    """All that a server sends, up to its closing, to a client that sends this and then waits."""
    async with connected(app, **options) as peer:
        await peer.send(*pieces)
        return await asyncio.wait_for(peer.rest(), 10)


def within(awaitable: Any, seconds: float = 10) -> Any:
    """Await something that must happen, without hanging for ever if it does not."""
    return asyncio.wait_for(awaitable, seconds)


GET = "GET / HTTP/1.1\r\nHost: test\r\n\r\n"


async def open_stream(port: int, path: str = "/", **options: Any) -> Peer:
    """A client whose stream has begun: its head and first event have come."""
    peer = await Peer.connect(port, **options)
    await peer.send(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n")
    await peer.head()
    await peer.chunk()
    return peer


class StreamTest(AsyncTest):
    """What the tests of streams share: a relay, and a log of what happens to a handler."""

    def setUp(self) -> None:
        self.relay = Relay[str]()
        self.log: list[str] = []
        self.ready = asyncio.Event()  # the handler is where the test wants it
        self.ended = asyncio.Event()  # the handler has ended
        self.task: asyncio.Task[Any] | None = None  # the handler's

    def app(self, handler: Callable[[Context, Writer], Awaitable[None]]) -> Stario:
        async def noted(c: Context, w: Writer) -> None:
            self.task = asyncio.current_task()
            try:
                await handler(c, w)
            finally:
                self.ended.set()

        app = Stario(Tracer())
        app.get("/", noted)
        return app

    async def source(self) -> AsyncIterator[str]:
        """A generator that listens to the relay, and writes down that it was closed."""
        try:
            async for _, data in self.relay.subscribe("*"):
                yield data
        finally:
            self.log.append("source closed")

    def start(self, w: Writer) -> None:
        """Send the first event of a stream."""
        w.patch(h.P({"id": "p"}, "first"))
        self.ready.set()

    async def run_stream(
        self,
        handler: Callable[[Context, Writer], Awaitable[None]],
        leave: Callable[[Peer], Awaitable[None]],
        **options: Any,
    ) -> list[str]:
        """What the handler writes down when its client does this."""
        async with connected(self.app(handler), **options) as peer:
            await peer.send(GET)
            await within(self.ready.wait())
            await leave(peer)
            await within(self.ended.wait())
        return self.log


class Spans(Tracer):
    """Keeps the spans that have ended."""

    def __init__(self) -> None:
        self.ended: list[Span] = []

    def on_end(self, span: Span) -> None:
        self.ended.append(span)

    def named(self, name: str) -> list[Span]:
        return [span for span in self.ended if name in (span.name, stario._title(span))]

    def refusals(self) -> list[int]:
        """The status of what no handler got to see."""
        return [span["http.response.status_code"] for span in self.named("http.refused")]


async def until(condition: Callable[[], object]) -> None:
    """Wait for what nobody announces."""

    async def poll() -> None:
        while not condition():
            await asyncio.sleep(0.005)

    await within(poll())


def connections_of(server: Server) -> list[Connection]:
    return [connection for worker in server._workers for connection in worker.connections]


async def echo(c: Context, w: Writer) -> None:
    """What a request was understood as."""
    body = await c.req.body()
    w.json([c.req.method, c.req.path, c.req.host, body.decode("latin-1")])


def echo_app(**options: Any) -> Stario:
    app = Stario(**options)
    for method in ("GET", "POST", "PUT", "DELETE"):
        app.handle(method, "/*", echo)
    return app


def understood(answer: Answer) -> list[str]:
    found: list[str] = json.loads(answer.body)
    return found


HOST = "Host: test\r\n"
NEXT = "GET /smuggled HTTP/1.1\r\nHost: test\r\n\r\n"


class HttpTest(AsyncTest):
    """A base: what goes wrong in a loop's callbacks fails the test."""

    async def asyncSetUp(self) -> None:
        self.unhandled: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda _, what: self.unhandled.append(what)
        )

    async def asyncTearDown(self) -> None:
        self.assertEqual(self.unhandled, [])

    async def check_refused(self, port: int, data: str | bytes, status: int = 400) -> None:
        """One answer with that status that closes, and nothing behind it is read."""
        peer = await Peer.connect(port)
        await peer.send(data, NEXT)
        answer = await within(peer.answer())
        self.assertEqual((answer.status, answer.headers["connection"]), (status, "close"))
        self.assertEqual(await within(peer.rest()), b"")
        await peer.close()

    async def check_all_refused(self, requests: Mapping[str, int]) -> None:
        """The same for each of these, with the status behind it."""
        async with echo_app().running() as server:
            for request, status in requests.items():
                with self.subTest(request):
                    await self.check_refused(server.port, request, status)


# -- 1. The file


def last_code(row: Any) -> str:
    """The last code in a comment of the file: lines that are indented."""
    lines = "\n".join(row.prose).rstrip().split("\n")
    prose = [i for i, line in enumerate(lines) if line and not line.startswith("    ")]
    return textwrap.dedent("\n".join(lines[prose[-1] + 1 :]))


class TestFile(unittest.TestCase):
    """Part 1: one file, to be copied anywhere."""

    def test_it_imports_only_the_standard_library(self) -> None:
        tree = ast.parse(Path(stario.__file__).read_text(encoding="utf-8"))
        names = set()
        for node in tree.body:
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(str(node.module).partition(".")[0])
        self.assertEqual(names - set(sys.stdlib_module_names), set())

    def test_it_works_under_another_name_and_importing_it_prints_and_starts_nothing(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            package = Path(folder, "vendored")
            package.mkdir()
            (package / "__init__.py").touch()
            shutil.copy(stario.__file__, package / "_stario.py")
            script = (
                "import threading, vendored._stario as s\n"
                "assert threading.active_count() == 1\n"
                "assert s.h.P('x') == '<p>x</p>'\n"
            )
            done = subprocess.run(
                [sys.executable, "-W", "error", "-c", script],
                cwd=folder, capture_output=True, text=True, check=False,
            )  # fmt: skip
            self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))

    def python(self, folder: str, code: str, *options: str) -> None:
        """Run a program in a folder: it has to say nothing, and to end well."""
        done = subprocess.run(
            [sys.executable, "-W", "error", *options, "-c", textwrap.dedent(code)],
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        self.assertEqual((done.stdout, done.stderr, done.returncode), ("", "", 0))

    def test_a_plain_app_starts_without_the_modules_that_only_others_need(self) -> None:
        code = """
            import asyncio, sys
            from stario import Stario

            async def home(c, w): w.text("hello")

            async def main():
                app = Stario()
                app.get("/", home)
                async with app.running() as server:
                    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
                    writer.write(b"GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
                    assert b"200" in await reader.readline()
                    writer.close()

            asyncio.run(main())
            others = "hashlib hmac random tempfile mimetypes difflib email.utils encodings.idna"
            print(*(name for name in others.split() if name in sys.modules), end="")
            """
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(stario.__file__, Path(folder, "stario.py"))
            self.python(folder, code)

    SERVES = """
        import asyncio, urllib.request
        def check(s):
            async def page(c, w): w.html(s.h.P("Hello"))
            async def wrong(c, w): w.html(s.h.P(b"bytes"))
            async def main():
                app = s.Stario(s.RichTracer())
                app.get("/", page)
                app.get("/wrong", wrong)
                async with app.running() as server:
                    answer = await asyncio.to_thread(urllib.request.urlopen, server.url)
                    with answer:
                        text = answer.read()
                    try: await asyncio.to_thread(urllib.request.urlopen, server.url + "/wrong")
                    except urllib.error.HTTPError as exc:
                        with exc: status = exc.code
                    if (text, status) != (b"<p>Hello</p>", 500):  # (-O knows no assert)
                        raise SystemExit(f"{text} {status}")
            asyncio.run(main())
        """

    def test_it_runs_zipped_frozen_optimised_and_without_a_standard_output(self) -> None:
        serves = textwrap.dedent(self.SERVES)
        quiet = "import sys; sys.stdout = None\n"
        with tempfile.TemporaryDirectory() as folder:
            with zipfile.ZipFile(Path(folder, "app.zip"), "w") as archive:
                archive.writestr("vendor/__init__.py", "")
                archive.write(stario.__file__, "vendor/stario.py")
            imports = "import sys; sys.path.insert(0, 'app.zip'); import vendor.stario as s\n"
            self.python(folder, quiet + imports + serves + "check(s)")
            shutil.copy(stario.__file__, folder)
            self.python(folder, quiet + "import stario\n" + serves + "check(stario)", "-O")
            # As a program that was frozen has it: no file, and no source to be read.
            frozen = """
                import importlib.machinery, importlib.util
                spec = importlib.machinery.ModuleSpec("frozen", importlib.machinery.FrozenImporter)
                s = sys.modules["frozen"] = importlib.util.module_from_spec(spec)
                with open("stario.py", encoding="utf-8") as file:
                    exec(compile(file.read(), "frozen/stario.py", "exec"), s.__dict__)
                """
            self.python(folder, quiet + textwrap.dedent(frozen) + serves + "check(s)")

    def test_two_copies_in_one_process_do_not_disturb_each_other(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            text = Path(stario.__file__).read_text(encoding="utf-8")
            for name in ("one", "_other"):
                Path(folder, f"{name}.py").write_text(
                    text + f"\nNAME = {name!r}\n", encoding="utf-8"
                )
            code = """
                import sys; sys.stdout = None
                import one, _other
                check(one); check(_other)
                assert one.h.Div(_other.h.P("<")) == "<div><p>&lt;</p></div>"
                assert one.asset("pocket.js", "_stario") == _other.asset("pocket.js", "_stario")
                """
            self.python(folder, textwrap.dedent(self.SERVES) + textwrap.dedent(code))

    def test_no_name_at_the_top_is_given_twice(self) -> None:
        """The second one would be what the functions between the two get."""
        names: list[str] = []
        for node in ast.parse(Path(stario.__file__).read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.append(node.name)
            elif isinstance(node, ast.Assign):
                names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        self.assertEqual([name for name in set(names) if names.count(name) > 1], [])

    def test_the_map_says_at_which_line_each_act_and_part_begins(self) -> None:
        """Where this fails, `python .ci/map.py` brings the numbers up to date."""
        source = Path(stario.__file__).read_text(encoding="utf-8")
        assert stario.__doc__
        told = re.findall(r"^ +(\d+) +((?:ACT )?\d+\. .*)$", stario.__doc__, re.MULTILINE)
        found = [
            (str(number), line.removeprefix("# "))
            for number, line in enumerate(source.split("\n"), 1)
            if re.match(r"# (ACT )?\d+\. ", line) and source.split("\n")[number - 2][:6] == "# ===="
        ]
        self.assertEqual(told, found)

    def test_prose_names_nothing_of_a_later_part_without_saying_which(self) -> None:
        source = Path(stario.__file__).read_text(encoding="utf-8")
        banners = re.finditer(r"^# ={90,}\n# (\d+)\. ", source, re.MULTILINE)
        begins = [(source.count("\n", 0, found.start()) + 1, int(found[1])) for found in banners]

        def part(line: int) -> int:
            return max([number for begin, number in begins if begin <= line], default=0)

        defined: dict[str, int] = {}
        for node in ast.parse(source).body:
            targets = (
                node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
            )
            for target in targets:
                name = getattr(target, "name", getattr(target, "id", ""))
                defined.setdefault(str(name), part(node.lineno))
        for row in stario._rows(source):
            text = "\n".join(row.prose)
            said = {int(number) for number in re.findall(r"[( ](?:parts? )?(\d+)\b", text)}
            for name in re.findall(r"`(\w+)", text) if row.line > begins[0][0] else ():
                if name not in ("h", "s", "js", "at", "data", "asset"):
                    with self.subTest(name, line=row.line):
                        self.assertIn(defined.get(name, 0), {*range(part(row.line) + 1), *said})

    def test_the_reading_path_leads_to_what_it_names_in_two_hours(self) -> None:
        spans: dict[str, tuple[int, int]] = {}

        def note(nodes: list[ast.stmt], within: str = "") -> None:
            for node in nodes:
                if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    first = min([node.lineno, *(mark.lineno for mark in node.decorator_list)])
                    spans[within + node.name] = first, node.end_lineno or 0
                    note(node.body, f"{within}{node.name}.")

        note(ast.parse(Path(stario.__file__).read_text(encoding="utf-8")).body)
        assert stario.__doc__
        path = re.findall(r"^ +(\d+)-(\d+) +`([\w.]+)`", stario.__doc__, re.MULTILINE)
        self.assertGreater(len(path), 9)
        for first, last, name in path:
            with self.subTest(name):
                self.assertEqual((int(first), int(last)), spans[name])
        lines = sum(int(last) - int(first) + 1 for first, last, _ in path)
        self.assertLessEqual(lines, 1450)

    def test_what_act_1_prints_is_what_it_says(self) -> None:
        rows = stario._rows(Path(stario.__file__).read_text(encoding="utf-8"))
        printing = [row for row in rows if "# prints" in "\n".join(row.prose)]
        self.assertEqual(len(printing), 1)
        code = last_code(printing[0])
        done = subprocess.run(
            [sys.executable, "-c", f"import stario\nexec({code!r}, vars(stario))"],
            cwd=Path(stario.__file__).parent, capture_output=True, text=True, check=False,
        )  # fmt: skip
        self.assertEqual(done.stderr, "")
        self.assertEqual(done.stdout.strip(), code.rpartition("# prints ")[2].strip())

    def test_the_test_in_act_2_passes(self) -> None:
        rows = stario._rows(Path(stario.__file__).read_text(encoding="utf-8"))
        code = [last_code(row) for row in rows if "def test_hello" in str(row.prose)]
        names = dict(vars(stario))
        exec(code[0], names)
        asyncio.run(names["test_hello"]())

    def test_the_bytes_of_act_0_are_what_goes_over_the_wire(self) -> None:
        async def home(c: Context, w: Writer) -> None:
            w.html(h.H1("Hello, ", c.req.query.get("name", "world")))

        async def live(c: Context, w: Writer) -> None:
            w.patch(h.H1({"id": "title"}, "Hello, Grace"))

        async def conversation(target: str) -> str:
            app = Stario()
            app.get("/", home)
            app.get("/live", live)
            async with app.running() as server:
                reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
                head = f"GET {target} HTTP/1.1", "host: localhost:8000", "connection: close", "", ""
                writer.write("\r\n".join(head).encode())
                text = (await within(reader.read())).decode().replace("\r\n", "\n")
                writer.close()
                return text  # type: ignore[no-any-return]

        assert stario.__doc__
        act = stario.__doc__.partition("ACT 0.")[2].partition("\nMAP\n")[0]
        blocks = [
            textwrap.dedent(block)
            for block in re.findall(r"(?:^(?: {4}.*)?\n)+", act, re.MULTILINE)
            if block.strip()
        ]
        told = [block.strip("\n") for block in blocks]
        got = asyncio.run(conversation("/?name=Ada"))
        for line in told[1].split("\n"):
            self.assertIn(line, got.split("\n"))
        self.assertIn("GET /?name=Ada HTTP/1.1", told[0])
        self.assertIn(told[2] + "\n\n", asyncio.run(conversation("/live")))

    def test_the_click_of_act_3_reaches_both_tabs_as_it_says(self) -> None:
        source = Path(stario.__file__).read_text(encoding="utf-8")
        act = source.partition("\n# ACT 3. Live\n")[2].partition("\n# ====")[0]
        page, code, request, event = (
            textwrap.dedent(block.replace("\n#", "\n"))
            for block in re.findall(r"(?:\n#(?: {5}.*)?)+(?=\n#\s)", act)
            if block.strip("\n#")
        )
        names = dict(vars(stario))
        exec(code, names)
        app = Stario()
        app.get("/live", names["live"])
        app.post("/click", names["click"])

        async def click() -> None:
            async with (
                TestClient(app) as client,
                client.stream("GET", "/live") as one,
                client.stream("GET", "/live") as other,
            ):
                for tab in (one, other):
                    self.assertEqual((await within(anext(tab))).elements, '<b id="count">0</b>')
                self.assertEqual((await client.post("/click", signals={})).status, 204)
                for tab in (one, other):
                    got = await within(anext(tab))
                    self.assertEqual(event.strip(), f"event: {got.event}\ndata: {got.data}")

        asyncio.run(click())
        self.assertIn(f'data-on:click="{at.post("/click")}"', page)
        self.assertIn("POST /click HTTP/1.1\n", request)

    def test_everything_public_is_exported_and_has_a_docstring(self) -> None:
        for name in stario.__all__:
            thing = getattr(stario, name)
            if name in ("Handler", "Lifespan", "Middleware"):
                continue  # types cannot have one
            with self.subTest(name):
                self.assertTrue((getattr(thing, "__doc__", "") or "").strip())
        for name in ("h", "data", "at"):
            self.assertIn(name, stario.__all__)


# -- 2. Errors


class TestExceptions(AsyncTest):
    """Every exception has an owner: an answer for the client, a traceback for the developer."""

    async def failing(
        self, exc: Any, *kinds: type[Exception], headers: Any = None
    ) -> tuple[Any, list[str], Span]:
        """The answer to a handler that raises; what the pages for these types got; the span."""
        tracer, seen = Spans(), []

        async def fail(c: Context, w: Writer) -> None:
            raise exc

        def page(c: Context, w: Writer, exc: Exception) -> None:
            seen.append(type(exc).__name__)
            self.assertTrue(c.span.events)  # it was told before
            w.text("a page", 500)

        app = Stario(tracer)
        app.get("/", fail)
        for kind in kinds:
            app.on_error(kind, page)
        async with TestClient(app, raise_errors=False) as client:
            answer = await client.get("/", headers=headers or {})
        return answer, seen, tracer.ended[-1]

    async def test_whatever_a_handler_raises_it_is_an_answer(self) -> None:
        class Odd(HttpException):
            def __init__(self) -> None:
                self.status_code = 404

        changed = HttpException(404)
        changed.status_code = "x"  # type: ignore[assignment]
        for exc in (
            SystemExit(1), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError(),
            BaseException("x"), BaseExceptionGroup("two", [SystemExit(), KeyError()]),
            StopAsyncIteration(), Odd(), changed, TimeoutError(),
        ):  # fmt: skip
            with self.subTest(repr(exc)):
                answer, _, span = await self.failing(exc)
                self.assertEqual((answer.status, answer.text), (500, "Internal Server Error"))
                self.assertIsNotNone(span.error)

    async def test_a_worker_outlives_what_its_handlers_raise(self) -> None:
        async def fail(c: Context, w: Writer) -> None:
            task = asyncio.create_task(asyncio.sleep(60))
            await asyncio.sleep(0)
            task.cancel()
            if c.req.query["how"] == "cancelled":
                await task
            if c.req.query["how"] == "started":
                w.write(b"some")
            sys.exit("no more")

        app = Stario(Tracer())
        app._silent = False
        app.get("/", fail)
        async with app.running(workers=2) as server:
            for how in ("exit", "cancelled", "started") * 2:
                peer = await Peer.connect(server.port)
                await peer.send(f"GET /?how={how} HTTP/1.1\r\nHost: x\r\n\r\n")
                if how == "started":
                    self.assertTrue((await within(peer.rest())).endswith(b"4\r\nsome\r\n"))
                else:
                    self.assertEqual((await within(peer.answer())).status, 500)
                await peer.close()

    async def test_a_group_around_one_exception_is_that_exception(self) -> None:
        gone, missing = HttpException(410, "gone"), HttpException(404, "missing")
        table: list[tuple[Any, int, list[str]]] = [
            (ExceptionGroup("", [gone]), 410, ["HttpException"]),
            (ExceptionGroup("", [ExceptionGroup("", [gone]), missing]), 410, ["HttpException"]),
            (ExceptionGroup("", [gone, ClientDisconnected()]), 410, ["HttpException"]),
            (ExceptionGroup("", [KeyError("x")]), 500, ["KeyError"]),
            (ExceptionGroup("", [gone, KeyError("x")]), 500, []),
        ]
        for exc, status, seen in table:
            with self.subTest(repr(exc)):
                self.assertEqual((await self.failing(exc))[0].status, status)
                self.assertEqual((await self.failing(exc, KeyError, HttpException))[1], seen)

    async def test_pages_get_what_they_were_asked_for(self) -> None:
        class Full(HttpException, LookupError): ...

        table: list[tuple[Exception, list[type[Exception]], list[str], int]] = [
            (HttpException(404), [Exception], [], 404),
            (HttpException(404), [Exception, HttpException], ["HttpException"], 500),
            (SignalsError(["x: is missing"]), [HttpException], ["SignalsError"], 500),
            (Full(409), [LookupError], ["Full"], 500),
            (HttpException(308, "/x"), [Exception, HttpException], [], 308),
            (KeyError("x"), [Exception], ["KeyError"], 500),
            (KeyError("x"), [HttpException], [], 500),
        ]
        for exc, kinds, seen, status in table:
            with self.subTest(repr(exc), kinds=kinds):
                answer, found, span = await self.failing(exc, *kinds)
                self.assertEqual((found, answer.status), (seen, status))
                self.assertEqual(span.error is not None, not isinstance(exc, HttpException))
                self.assertTrue(span.events)

    async def test_an_answer_that_cannot_be_made_for_a_handler_without_one_is_a_500(self) -> None:
        """What middleware adds at the last moment may fail, in the handler's stead."""

        def late(handler: Any) -> Any:
            async def guarded(c: Context, w: Writer) -> None:
                def add_field() -> None:
                    w.headers.set("x-a", "a\nb")

                w.headers.before_sending = add_field
                await handler(c, w)

            return guarded

        async def silent(c: Context, w: Writer) -> None:
            if c.req.method == "POST":
                raise KeyError("x")

        tracer = Spans()
        app = Stario(tracer)
        app.use(late)
        app.get("/", silent)
        app.post("/", silent)
        app.on_error(KeyError, lambda c, w, exc: None)
        async with TestClient(app, raise_errors=False) as client:
            for method in ("GET", "POST"):
                self.assertEqual((await client.request(method, "/")).status, 500)
                self.assertIn("StarioError", tracer.ended[-1].error or "")

    async def test_an_answer_whose_handler_has_failed_does_not_look_complete(self) -> None:
        """Nor if an `on_error` handler notes it; if it adds what failed, the client has that."""
        noted = []

        async def failing(c: Context, w: Writer) -> None:
            w.write(b"row 1\n")
            await asyncio.sleep(0)
            raise {"key": KeyError, "index": IndexError}[c.req.params["how"]]

        async def note(c: Context, w: Writer, exc: Exception) -> None:
            noted.append(w.started)
            if not w.started:
                w.text("sorry", 500)

        def add(c: Context, w: Writer, exc: Exception) -> None:
            w.write(b"the rest is missing\n")

        app, inner = Stario(), Router()
        for router in (app, inner):
            router.get("/{how}", failing)
            router.on_error(KeyError, note)
            router.on_error(IndexError, add)
        app.mount("/inner", inner)
        for path, is_complete in {
            "/key": False, "/inner/key": False, "/index": True, "/inner/index": True
        }.items():  # fmt: skip
            with self.subTest(path):
                out = await ask(app, f"GET {path} HTTP/1.1\r\n{HOST}Connection: close\r\n\r\n")
                self.assertEqual(out.endswith(b"\r\n0\r\n\r\n"), is_complete)
        self.assertEqual(noted, [True, True])

    async def test_a_logger_that_takes_no_errors_is_told_of_none(self) -> None:
        async def fail(c: Context, w: Writer) -> None:
            raise KeyError("x")

        app, logger, heard = Stario(), logging.getLogger("asyncio"), logging.Handler()
        app.get("/", fail)
        self.addCleanup(logger.setLevel, logger.level)
        self.addCleanup(logger.removeHandler, heard)
        logger.addHandler(heard)
        async with app.running() as server:
            for level, calls in ((logging.CRITICAL, 0), (logging.ERROR, 1)):
                logger.setLevel(level)
                with mock.patch.object(heard, "emit") as emit:
                    peer = await Peer.connect(server.port)
                    self.assertEqual((await within(peer.get("/"))).status, 500)
                    await peer.close()
                self.assertEqual(emit.call_count, calls)

    async def test_a_group_that_nobody_can_look_into_is_a_500(self) -> None:
        exc: Exception = HttpException(410)
        for _ in range(sys.getrecursionlimit()):
            exc = ExceptionGroup("", [exc])
        self.assertEqual((await self.failing(exc))[0].status, 500)

    async def test_a_page_for_an_exception_is_an_answer_in_a_test_too(self) -> None:
        async def fail(c: Context, w: Writer) -> None:
            raise KeyError("x")

        app = Stario(Tracer())
        app.get("/", fail)
        app.on_error(KeyError, lambda c, w, exc: w.text("a page", 500))
        async with TestClient(app) as client:
            self.assertEqual((await client.get("/")).text, "a page")

    async def test_an_http_exception_that_cannot_answer_is_refused_where_it_is_made(self) -> None:
        wrong: list[tuple[Any, ...]] = [
            ("404",), (None,), (404, {"a": 1}), (400, ValueError("x")), (302,), (303, ""), (99,),
        ]  # fmt: skip
        for arguments in wrong:
            with self.subTest(arguments), self.assertRaises(StarioError):
                HttpException(*arguments)

    async def test_the_answer_of_an_error_describes_itself(self) -> None:
        described = {
            "content-type": "image/png", "content-length": "7", "content-encoding": "br",
            "content-disposition": "attachment", "content-range": "bytes 0-6/9", "etag": '"1"',
            "last-modified": "yesterday", "cache-control": "max-age=9", "expires": "never",
            "content-language": "eo", "accept-ranges": "bytes", "location": "/x",
            "x-accel-redirect": "/files/report.pdf", "datastar-selector": "#list", "digest": "a=b",
        }  # fmt: skip
        kept = {"content-security-policy": "self", "access-control-allow-origin": "*", "x-a": "b"}

        def fielded(handler: Any) -> Any:
            async def guarded(c: Context, w: Writer) -> None:
                w.headers.update(kept)
                w.cookie("seen", "1")
                await handler(c, w)

            return guarded

        async def fail(c: Context, w: Writer) -> None:
            w.headers.update(described)
            raise {"http": HttpException(404), "key": KeyError(), "zero": ZeroDivisionError()}[
                c.req.params["how"]
            ]

        app = Stario(Spans())
        app.use(fielded)
        app.get("/{how}", fail)
        app.on_error(ZeroDivisionError, lambda c, w, exc: w.text("a page", 500))
        app.on_error(KeyError, lambda c, w, exc: w.text("another", 500) or "shown")  # type: ignore[arg-type,func-returns-value,return-value]
        async with TestClient(app, raise_errors=False) as client:
            for how in ("http", "key", "zero"):
                with self.subTest(how):
                    answer = await client.get(f"/{how}")
                    self.assertEqual(answer.cookies, {"seen": "1"})
                    found = {name: answer.headers.get(name) for name in (*kept, *described)}
                    self.assertEqual(
                        {name: value for name, value in found.items() if value},
                        {**kept, "content-type": "text/plain; charset=utf-8",
                         "content-length": str(len(answer.body))},
                    )  # fmt: skip

    async def test_an_await_too_much_or_too_little_is_explained(self) -> None:
        async def too_much(c: Context, w: Writer) -> None:
            await w.text("x")  # type: ignore[func-returns-value,misc]

        async def too_little(c: Context, w: Writer) -> None:
            signals: Any = c.signals()
            try:
                w.text(signals.user)
            finally:
                signals.close()

        app = Stario(tracer := Spans())
        app.get("/much", too_much)
        app.get("/little", too_little)
        async with TestClient(app, raise_errors=False) as client:
            await client.get("/much")
            await client.get("/little")
        told = [str(span.events[-1]) for span in tracer.ended]
        self.assertIn("are not awaited", told[0])
        self.assertIn("`await` is missing", told[1])

    async def test_redirects_lead_the_browser_and_not_the_script_in_it(self) -> None:
        """A redirect that Datastar's fetch follows would patch the other page into this one."""

        async def save(c: Context, w: Writer) -> None:
            w.cookie("seen", "1")
            w.redirect("/list?a=1", 303)

        async def private(c: Context, w: Writer) -> None:
            raise HttpException(302, "/login")

        app = Stario()
        app.post("/", save)
        app.get("/private", private)
        app.post("/slash", save)
        async with TestClient(app) as client:
            for answer, there in (
                (await client.post("/", signals={}), "/list?a=1"),
                (await client.get("/private", signals={}), "/login"),
            ):
                self.assertEqual((answer.status, answer.headers.get("location")), (200, None))
                self.assertIn("window.location", answer.text)
                self.assertIn(there, answer.text)
            self.assertEqual(client.cookies, {"seen": "1"})
            self.assertEqual((await client.get("/private")).status, 302)
            # The way to the path without its slash is HTTP's own: the body goes along.
            self.assertEqual((await client.post("/slash/", signals={})).status, 308)


class CountingTracer(Tracer):
    """A tracer that counts."""

    def __init__(self) -> None:
        self.started = self.noted = self.ended = 0

    def on_start(self, span: Span) -> None:
        self.started += 1

    def on_event(self, span: Span, event: SpanEvent) -> None:
        self.noted += 1

    def on_end(self, span: Span) -> None:
        self.ended += 1


async def _fine(c: Context, w: Writer) -> None:
    w.empty()


class TestMistakes(unittest.TestCase):
    """A mistake is answered where it is made: what was given, what to write, in which line."""

    @staticmethod
    def _app(*routes: str) -> Stario:
        app = Stario()
        for path in routes:
            app.get(path, _fine)
        return app

    def _at_registration(self) -> dict[str, Callable[[], Any]]:
        """What a program does wrong with handlers and middleware, by a part of the sentence."""
        app = Stario

        def sync(c: Any, w: Any) -> None: ...
        async def short(c: Any) -> None: ...
        async def swapped(w: Any, c: Any) -> None: ...
        async def slow(handler: Any) -> Any: ...

        def express(handler: Any) -> Any:
            async def inner(c: Any, w: Any, next: Any) -> None: ...

            return inner

        def backwards(handler: Any) -> Any:
            async def inner(w: Any, c: Any) -> None: ...

            return inner

        any_: Any = object()
        wrong: Any = _fine
        return {
            "write `async def sync(c, w)`": lambda: app().get("/", sync),  # type: ignore[arg-type]
            "short is called as short(c, w)": lambda: app().get("/", short),  # type: ignore[arg-type]
            "swapped(w, c) gets them in the other order": lambda: app().get("/", swapped),
            "was called: give it without its parentheses": lambda: app().get("/", wrong(1, any_)),
            "GET /: a handler is no class: give dict()": lambda: app().get("/", dict),
            "Not a decorator: app.get('/', handler)": lambda: app().get("/x"),
            "it has to return a handler": lambda: app().get("/", _fine, lambda handler: any_),
            "_guarded(handler): missing": lambda: app().get("/", _fine, stario.same_origin(wrong)),  # type: ignore[arg-type]
            "slow is a plain function: `def`": lambda: app().get("/", _fine, slow),  # type: ignore[arg-type]
            "called with (handler): not None": lambda: app().get("/", _fine, None),  # type: ignore[arg-type]
            "called with (handler): not '/api'": lambda: app().use(cast("Any", "/api")),
            "called as inner(c, w): missing": lambda: app().get("/", _fine, express),
            "inner(w, c) gets them in the other order": lambda: app().get("/", _fine, backwards),
            "called as <lambda>(handler): missing": lambda: app().use(lambda c, w: any_),  # type: ignore[arg-type,misc]
            "a Session needs its key: app.use(Session(key))": lambda: app().use(stario.Session),  # type: ignore[arg-type]
            "needs 16 bytes or more": lambda: stario.Session(None),  # type: ignore[arg-type]
            "called with (c, w, exc): not None": lambda: app().on_error(KeyError, None),  # type: ignore[arg-type]
            "_fine was called: give": lambda: app().on_error(KeyError, wrong(1, any_)),
            "in the other order: write (c, w, exc)": lambda: app().on_error(
                KeyError, cast("Any", lambda w, c, exc: None)
            ),
        }  # fmt: skip

    def _of_routes(self) -> dict[str, Callable[[], Any]]:
        """Of paths, routers and lifespans."""
        app, any_ = Stario, cast("Any", object())

        async def lived(app: Any) -> AsyncIterator[None]:
            yield

        @contextmanager
        def opened(app: Any) -> Iterator[None]:
            yield

        async def waits(app: Any) -> None: ...

        def url(**params: object) -> str:
            return self._app("/{id:int}").url("_fine", **params)

        def mount_twice() -> None:
            router, parent = stario.Router(), app()
            router.get("/", _fine)
            parent.mount("/x", router)
            parent.mount("/x", router)

        def mount_itself() -> None:
            one = self._app("/")
            one.mount("/x", one)

        entered = asynccontextmanager(lived)(any_)
        return {
            "'/<id>': a parameter is a whole": lambda: self._app("/<id>"),
            "'/:id': a parameter is a whole": lambda: self._app("/:id"),
            "'/{id': a parameter is a whole": lambda: self._app("/{id"),
            r"'/x/(\\d+)': a parameter is a whole segment": lambda: self._app(r"/x/(\d+)"),
            "no scheme and no host, as 'http://a/x' has": lambda: self._app("http://a/x"),
            "a path has no method": lambda: self._app("POST /a b"),
            "/a/{y} cannot be told apart from GET /a/{x}": lambda: self._app("/a/{x}", "/a/{y}"),
            "GET /x cannot be told apart from GET /x": mount_twice,
            "a router cannot be mounted in itself": mount_itself,
            'write mount("/shop", router)': lambda: app().mount(any_, "/x"),
            'write host("api.example.com", router)': lambda: app().host("x.y", any_),
            'write assets("/static", "directory")': lambda: app().assets(any_, "/static"),
            "needs a handler named 'nope'; found: none": lambda: app().url("nope"),
            "'fine'; found: none of _fine": lambda: self._app("/a", "/b").url("fine"),
            "needs a value for {id:int}: write id=...": url,
            "'x' does not fit {id:int} in /{id:int}": lambda: url(id="x"),
            "asynccontextmanager above lived": lambda: app().lifespan(lived),  # type: ignore[arg-type]
            "asynccontextmanager above opened": lambda: app().lifespan(opened),  # type: ignore[arg-type]
            "above waits, and let it be an `async def`": lambda: app().lifespan(waits),  # type: ignore[arg-type]
            "the lifespan was called": lambda: app().lifespan(cast("Any", entered)),
        }  # fmt: skip

    def _of_options(self) -> dict[str, Callable[[], Any]]:
        """Of options, schemas and relays."""
        app, any_ = Stario, cast("Any", object())
        binary: Any = io.BytesIO()
        return {
            "compression is a CompressionConfig(...), not": lambda: app(compression=any_),
            "gzip_level is a whole number": lambda: stario.CompressionConfig(gzip_level=10),
            "max_body is a number of bytes, not '1'": lambda: app(max_body="1"),  # type: ignore[arg-type]
            "max_body is a number of bytes, not -1": lambda: app(max_body=-1),
            "no option 'max_header': one of": lambda: TestClient(app(), max_header=9),
            "TestClient(app) takes a Stario, not": lambda: TestClient(any_),
            "stream of text, like sys.stdout, not <_io.B": lambda: JsonTracer(binary),
            "bytes are needed, not str: encode it": lambda: stario._bytes(cast("Any", "text")),
            "200 is no error: answer with w.html": lambda: HttpException(200),
            "a schema is a dataclass, a TypedDict": lambda: read_signals(Stario, {}),
            "{'a': 1}: a schema is a dataclass": lambda: read_signals(cast("Any", {"a": 1}), {}),
            "write publish('room.1', data)": lambda: Relay[Any]().publish(cast("Any", {"a": 1})),
            "a pattern is text, not ['a']": lambda: Relay[str]().subscribe(["a"]),  # type: ignore[arg-type]
            "no overflow rule 'newest'": lambda: Relay[str]().subscribe("a", overflow="newest"),  # type: ignore[arg-type]
        }  # fmt: skip

    def _of_builders(self) -> dict[str, Callable[[], Any]]:
        """Of HTML, `data` and `at`."""
        h, data, at = stario.h, stario.data, stario.at
        handler: Any = _fine
        text: Any = "a: b"
        return {
            "begin with a capital: h.Div": lambda: h.div("x"),
            'attributes are a dict, h.Div({"id": "x"})': lambda: h.Div(id="x"),
            "there is no element here to put them on": lambda: stario.render({"id": "x"}),
            "function cannot stand in HTML: give text": lambda: h.P(handler),
            "Write 0.5, or '500s'": lambda: data.on("input", "$x", debounce=500),
            "is JavaScript, as text: not <function": lambda: data.on("x", handler),
            "cannot be named in an attribute: rename it": lambda: data.on(at.get("/x"), "click"),
            "as text: not '<p>x</p>'": lambda: data.text(h.P("x")),
            "give a dict from names to expressions": lambda: data.class_(handler),
            "without $: not '$x'": lambda: data.bind("$x"),
            "write data.init(expression)": lambda: data.on_load("x()"),  # type: ignore[attr-defined]
            "not with None and None": lambda: at.get(cast("Any", None)),
            "write at.post('/x', {'id': 3})": lambda: at.post("/y", cast("Any", "id=3")),
            "one of auto, error, always, never ('never'?)": lambda: at.get("/", retry="neverr"),  # type: ignore[arg-type]
            "one of json, form": lambda: at.get("/", content_type="text"),  # type: ignore[arg-type]
            "cleanup, disabled ('disabled'?)": lambda: at.get("/", request_cancellation="disable"),
            "headers is a dict, not 'a: b'": lambda: at.get("/", headers=text),
            "response_overrides is a dict, not": lambda: at.get("/", response_overrides=text),
            "open_when_hidden is True or False": lambda: at.get("/", open_when_hidden=text),
        }  # fmt: skip

    def _awaited(self) -> dict[str, Callable[[Context, Writer], Any]]:
        """An `await` too much or too little in a request, by a part of the sentence for it."""
        p = stario.h.P("x")

        async def unawaited(c: Any, w: Any) -> None:
            signals = c.signals(Right)
            try:
                signals.name  # noqa: B018
            finally:
                signals.close()

        async def awaited(c: Any, w: Any) -> None:
            await w.html(p)

        async def alive(c: Any, w: Any) -> None:
            await w.alive()

        def stepped(c: Any, w: Any) -> None:
            with w.alive():
                pass

        def whiled(c: Any, w: Any) -> None:
            while w.alive():
                pass

        async def step(c: Any, w: Any) -> None:
            async with c.step("x"):
                pass

        async def futures(c: Any, w: Any) -> None:
            await c.app.background(asyncio.sleep(0))

        def measured(c: Any, w: Any) -> None:
            body = c.req.body()
            try:
                len(body)
            finally:
                body.close()

        def unread(c: Any, w: Any) -> None:
            form = c.req.form()
            try:
                read_signals(Right, form)
            finally:
                form.close()

        return {
            "`await` is missing: read_signals(schema, await": unread,
            "the methods of a Writer are not awaited": awaited,
            "`await` is missing: await c.signals()": unawaited,
            "`await` is missing: await": measured,
            "or write `async with w.alive():`": alive,
            "`async for item in w.alive(source):`": stepped,
            "neither true nor false\nstario: loop over it": whiled,
            "a step is no async one": step,
            "And a handler is an `async def`": awaited,
            "await asyncio.wrap_future(...)": futures,
        }

    def _in_a_handler(self) -> dict[str, Callable[[Context, Writer], Any]]:
        """What else goes wrong in a request."""
        any_: Any = object()
        p = stario.h.P("x")
        return {
            "the address to go to is text, not None": lambda c, w: w.redirect(None),
            "the address to go to is text, not 303": lambda c, w: w.redirect(303, "/"),
            "to go to is text, not 3": lambda c, w: w.navigate(3),
            "one of outer, inner, replace": lambda c, w: w.patch(p, mode="iner", selector="#x"),
            "give the element an id that the page has": lambda c, w: w.patch(p),
            "a selector is text, as '#cart', not '<p>": lambda c, w: w.remove(p),
            "a selector is text, as '#cart', not 3": lambda c, w: w.patch(p, selector=3),
            "give a dict from names to values, a dataclass": lambda c, w: w.sync(3),
            "set them before the first write": lambda c, w: [w.empty(), w.headers.set("a", "b")],
            "the status is given with the answer": lambda c, w: setattr(w, "status_code", 404),
            "samesite is lax, strict or none": lambda c, w: w.cookie("a", "b", samesite="no"),
            "('samesite'?)": lambda c, w: w.cookie("a", "b", same_site="lax"),
            "w.file takes a path or bytes, not None": lambda c, w: w.file(None),
            "for ticks write w.alive(every=0.5)": lambda c, w: w.alive(any_),
            "add app.use(Session(key))": lambda c, w: c.session,
            "as JSON: there is a object in it": lambda c, w: w.json([any_]),
            "call it, and await what is async": lambda c, w: c.req.form["x"],
            'write w.respond(b"...", "image/png"), not with 404': lambda c, w: w.respond(
                b"<h1>", 404
            ),
            "'trial': max_age is seconds": lambda c, w: w.cookie("trial", "", max_age=math.inf),
        }

    def _check_sentence(self, told: str, exc: BaseException) -> None:
        notes = getattr(exc, "__notes__", [])
        text = "\n".join([str(exc), *notes])
        self.assertIn(told, text)
        self.assertLess(len(text), 400)
        if isinstance(exc, StarioError):
            self.assertRegex(notes[0], rf"^at {re.escape(__file__)}:\d+$")

    def test_a_note_names_no_line_of_an_installed_package(self) -> None:
        code = compile("render(object())", "/home/ada/.venv/lib/site-packages/forms.py", "eval")
        with self.assertRaises(StarioError) as e:
            eval(code, {"render": render})
        self._check_sentence("cannot stand in HTML", e.exception)

    def test_what_no_line_of_the_handler_has_done_is_said_without_a_line(self) -> None:
        async def late(c: Context, w: Writer) -> None:
            w.empty()
            c.session["user"] = "ada"

        async def ask() -> None:
            app = Stario()
            app.use(Session("k" * 16))
            app.get("/", late)
            async with TestClient(app) as client:
                await client.get("/")

        with self.assertRaisesRegex(StarioError, "was changed after the answer") as e:
            asyncio.run(ask())  # this line has started the loop, and is not to blame
        self.assertFalse([n for n in getattr(e.exception, "__notes__", []) if n.startswith("at ")])

    def test_at_registration_and_in_views(self) -> None:
        mistakes = self._at_registration() | self._of_routes() | self._of_options()
        for told, make in (mistakes | self._of_builders()).items():
            with (
                self.subTest(told),
                self.assertRaises((StarioError, TypeError, AttributeError)) as e,
            ):
                make()
            with self.subTest(told):
                self._check_sentence(told, e.exception)

    def test_in_the_test_client(self) -> None:
        async def ask(**options: Any) -> None:
            async with TestClient(self._app("/")) as client:
                await client.get("/", **options)

        wrong: dict[str, dict[str, Any]] = {
            "no option 'data': one of headers, signals, json, form,": {"data": {"a": 1}},
            "headers is a dict, not [('a', 'b')]": {"headers": [("a", "b")]},
            "form is a dict, not 'a=1'": {"form": "a=1"},
            'write files={"x": ("a.txt", b"its bytes")}, not b\'abc\'': {"files": {"x": b"abc"}},
        }
        for told, options in wrong.items():
            with self.subTest(told), self.assertRaises(StarioError) as e:
                asyncio.run(ask(**options))
            self._check_sentence(told, e.exception)

        async def ask_without_a_block() -> None:
            await TestClient(self._app("/")).get("/")  # its lifespans have not begun

        with self.assertRaises(StarioError) as e:
            asyncio.run(ask_without_a_block())
        self._check_sentence("write `async with TestClient(app) as client:`", e.exception)

    def test_a_form_that_is_read_as_something_else_is_a_400_that_says_so(self) -> None:
        async def signals(c: Context, w: Writer) -> None:
            await c.signals(Right)

        async def text(c: Context, w: Writer) -> None:
            w.text((await c.req.form())["photo"])

        async def ask(handler: Any) -> str:
            app = Stario()
            app.post("/", handler)
            async with TestClient(app) as client:
                answer = await client.post("/", files={"photo": ("a.png", b"PNG")})
                self.assertEqual(answer.status, 400)
                return answer.text

        self.assertIn("await c.req.form()) reads a form", asyncio.run(ask(signals)))
        self.assertIn("'photo' came as a file, form.file('photo')", asyncio.run(ask(text)))

    def test_names_of_other_frameworks_say_what_to_write(self) -> None:
        for kind, names in stario._ELSEWHERE.items():
            for instead, words in names.items():
                for word in words.split():
                    with self.subTest(f"{kind.__name__}.{word}"):
                        self.assertFalse(hasattr(kind, word))
                        hidden = [base for base in kind.__mro__[1:] if word in vars(base)]
                        self.assertEqual(hidden, [], "a name of ours")
                        self.assertNotRegex(inspect.getsource(kind), rf"def {word}\(")
                        with self.assertRaises(AttributeError) as e:
                            getattr(kind, word)
                        self._check_sentence(f"there is no {word}: write {instead}", e.exception)
        with self.assertRaisesRegex(StarioError, "no status: write w.html"):
            Writer.__new__(Writer).status = 404  # type: ignore[attr-defined]
        context = Context(Stario(), cast("Any", None))
        context.user = "ada"  # type: ignore[attr-defined]
        self.assertEqual(context.user, "ada")  # type: ignore[attr-defined]

    def test_in_a_handler(self) -> None:
        async def ask(make: Callable[[Context, Writer], Any]) -> None:
            async def handler(c: Context, w: Writer) -> None:
                found = make(c, w)
                if inspect.isawaitable(found):
                    await found

            app = Stario()
            app.get("/", handler)
            async with TestClient(app) as client:
                await client.get("/")

        for told, make in (self._awaited() | self._in_a_handler()).items():
            with (
                self.subTest(told),
                self.assertRaises((StarioError, TypeError, AttributeError)) as e,
            ):
                asyncio.run(ask(make))
            with self.subTest(told):
                self._check_sentence(told, e.exception)


# -- 3. HTML


class TestHtml(unittest.TestCase):
    """Part 3: elements are strings."""

    def test_an_element_is_the_text_it_stands_for(self) -> None:
        for element, text in [
            (h.Div(), "<div></div>"),
            (h.Div("a", h.P("b")), "<div>a<p>b</p></div>"),
            (h.H1("x", {"class": "big"}), '<h1 class="big">x</h1>'),
            (h.Br(), "<br/>"),
            (h.Div(h.Br), "<div><br/></div>"),
            (h.Input({"type": "text"}), '<input type="text"/>'),
            (h.ForeignObject(), "<foreignObject></foreignObject>"),
            (h.LinearGradient(), "<linearGradient></linearGradient>"),
            (h.tag("my-card")("x"), "<my-card>x</my-card>"),
            (h.tag("BR")(), "<br/>"),
            (h.tag("SCRIPT")("a < b"), "<script>a < b</script>"),
            (h.tag("foreignobject")(), "<foreignObject></foreignObject>"),
            (h.Html(h.Body()), "<!doctype html><html><body></body></html>"),
            (render("a<", h.B("c")), "a&lt;<b>c</b>"),
        ]:
            with self.subTest(text):
                self.assertEqual(element, text)
                self.assertIsInstance(element, SafeString)

    def test_parts_of_every_kind(self) -> None:
        class Trusted:
            def __html__(self) -> str:
                return "<i>"

        class Colour(enum.StrEnum):
            RED = "red<"

        for part, text in [
            ("<&>", "&lt;&amp;&gt;"),
            (SafeString("<b>"), "<b>"),
            (Trusted(), "<i>"),
            (None, ""), (True, ""), (False, ""),
            (7, "7"), (1.5, "1.5"), (Decimal("2.50"), "2.50"),
            ([1, ["a", None], ("b",)], "1ab"),
            ((str(i) for i in range(3)), "012"),
            (Colour.RED, "red&lt;"),
            ("a\rb", "a&#13;b"),
        ]:  # fmt: skip
            with self.subTest(repr(part)):
                self.assertEqual(h.P(part), f"<p>{text}</p>")
        for wrong in (b"bytes", object(), datetime(2024, 1, 1)):
            with (
                self.subTest(repr(wrong)),
                self.assertRaisesRegex(StarioError, type(wrong).__name__),
            ):
                h.P(wrong)

    def test_content_that_holds_itself_is_refused(self) -> None:
        class Rights(enum.Flag):  # to iterate over a flag gives the flag
            READ = 1

        for part in (Rights.READ, UserString("text")):
            with self.subTest(type(part)), self.assertRaisesRegex(StarioError, "cannot stand"):
                h.P(part)
        self.assertEqual(h.P(deque([deque(["a"]), frozenset([frozenset("b")])])), "<p>ab</p>")

    def test_in_an_f_string_an_element_is_text(self) -> None:
        element = h.B("x")
        for text in (f"{element}", f"{element:s}", f"{element:>3}", f"{element!s}"):
            with self.subTest(text):
                self.assertEqual(h.P(text), "<p>&lt;b&gt;x&lt;/b&gt;</p>")

    def test_attributes_of_every_kind(self) -> None:
        for attributes, text in [
            ({"title": 'a"b<c>&'}, ' title="a&quot;b&lt;c&gt;&amp;"'),
            ({"title": SafeString('<b>"')}, ' title="&lt;b&gt;&quot;"'),
            ({"title": h.B("a & b")}, ' title="&lt;b&gt;a &amp;amp; b&lt;/b&gt;"'),
            ({"title": h.Br}, ' title="&lt;br/&gt;"'),
            ({"hidden": True, "a": None, "b": False}, " hidden a"),
            ({"width": 3, "x": 0.5}, ' width="3" x="0.5"'),
            ({"class": ["a", None, "b"]}, ' class="a b"'),
            ({"class": ["a", False, True, {"b": 1, "c": 0}, ("d",)]}, ' class="a b d"'),
            (
                {"class": types.MappingProxyType({"a": True, "b": None, "c<": "x"})},
                ' class="a c&lt;"',
            ),
            ({"rel": [1, True, 0, 1.5]}, ' rel="1 0 1.5"'),
            ({"style": {"color": "red", "top": 0}}, ' style="color:red;top:0;"'),
            ({"style": ChainMap({"top": 0}, {"color": "red"})}, ' style="color:red;top:0;"'),  # type: ignore[misc]
            ({"data": {"id": 1, "x": {"y": "z"}}}, ' data-id="1" data-x-y="z"'),
            ({"data-on:click__debounce.500ms": "x"}, ' data-on:click__debounce.500ms="x"'),
        ]:
            with self.subTest(str(attributes)):
                self.assertEqual(h.P(attributes), f"<p{text}></p>")
        self.assertEqual(h.P({"a": "1", "b": "2"}, "x", {"a": "3"}), '<p a="3" b="2">x</p>')

    def test_what_cannot_be_an_attribute_is_refused(self) -> None:
        for name in ("", "a b", 'a"', "a'", "a>", "a<", "a/", "a=", "a\x00", "a\n", "a\x7f", 3):
            with self.subTest(repr(name)), self.assertRaises(StarioError):
                h.P({name: "x"})
        with self.assertRaisesRegex(StarioError, "object.*title"):
            h.P({"title": object()})

    def test_a_style_is_escaped_whatever_it_is_made_of(self) -> None:
        class Colour(enum.StrEnum):
            RED = 'red"'

        for style, text in [
            ({"color": 'red"><b>'}, "color:red&quot;&gt;&lt;b&gt;;"),
            ({'a"<': "b&"}, "a&quot;&lt;:b&amp;;"),
            ({'a"<': 1, "b": None, "c": False, "d": "&"}, "a&quot;&lt;:1;d:&amp;;"),
            ({"a": SafeString('&amp;"'), "b": '"'}, "a:&amp;amp;&quot;;b:&quot;;"),
            ({"a": Colour.RED, "b": [1, "<"]}, "a:red&quot;;b:1 &lt;;"),
            ({"a": None}, ""),
            ({}, ""),
        ]:
            with self.subTest(str(style)):
                for _ in range(2):
                    self.assertEqual(h.P({"style": style}), f'<p style="{text}"></p>')

    def test_one_and_true_are_not_the_same_value(self) -> None:
        for value, text in [
            (1, ' a="1"'),
            (True, " a"),
            (1.0, ' a="1.0"'),
            (0, ' a="0"'),
            (False, ""),
        ]:
            with self.subTest(repr(value)):
                self.assertEqual(h.P({"a": value}), f"<p{text}></p>")

    def test_what_is_kept_of_attributes_has_bounds(self) -> None:
        known = stario._known_names
        for number in range(1000):
            h.P({f"data-{number}": f"{number}"})
        h.P({"x" * 65: "y"})
        self.assertLessEqual(len(known), 512)
        self.assertLessEqual(max(map(len, known)), 64)  # type: ignore[arg-type]

    def test_void_elements_refuse_content_and_script_keeps_its_text(self) -> None:
        with self.assertRaisesRegex(StarioError, "void"):
            h.Br("x")
        self.assertEqual(h.Script("a < b && c"), "<script>a < b && c</script>")
        self.assertEqual(h.Style(["a>b{}"]), "<style>a>b{}</style>")

        class Rule(enum.StrEnum):
            WIDE = "a > b & c {}"

        for text in (Rule.WIDE, iter([Rule.WIDE]), [[Rule.WIDE], None], {Rule.WIDE: 1}.keys()):
            self.assertEqual(h.Style(text), f"<style>{Rule.WIDE.value}</style>")
        with self.assertRaises(StarioError):
            h.Script(b"bytes")
        for text in ("</script>", "</SCRIPT >", "<!-- x"):  # type: ignore[assignment]
            with self.subTest(text), self.assertRaises(StarioError):
                h.Script(f"x = '{text}'")

    def test_a_first_line_feed_survives_in_pre_and_textarea(self) -> None:
        self.assertEqual(h.Textarea("\nx"), "<textarea>\n\nx</textarea>")
        self.assertEqual(h.Pre("x"), "<pre>x</pre>")

    def test_unknown_tags_and_bad_names_are_refused_with_a_hint(self) -> None:
        with self.assertRaisesRegex(AttributeError, "h.tag"):
            h.Dvi  # noqa: B018
        for name in ("a b", "", None, 3):
            with self.subTest(name), self.assertRaises(StarioError):
                h.tag(name)  # type: ignore[arg-type]
        for wrong in ({"class": "x"}, {}, types.MappingProxyType({})):  # type: ignore[var-annotated]
            with self.assertRaisesRegex(StarioError, "attributes"):
                render(wrong)
        with self.assertRaisesRegex(AttributeError, r"h\.FeBlend"):
            h.feblend  # noqa: B018
        with self.assertRaisesRegex(TypeError, r"dict, h\.Div\({"):
            h.Div(id="x")

    def test_who_forgot_to_await_is_told(self) -> None:
        async def name() -> str:
            return "x"

        for write in (h.P, lambda value: h.P({"title": value})):
            coroutine = name()
            with self.assertRaisesRegex(StarioError, "coroutine.*await"):
                write(coroutine)  # type: ignore[no-untyped-call]
            coroutine.close()

    def test_adding_to_an_element_escapes_text(self) -> None:
        self.assertEqual(h.B("x") + "<", "<b>x</b>&lt;")
        self.assertEqual("<" + h.B("x"), "&lt;<b>x</b>")
        self.assertEqual(h.Div(h.B("x") + h.I("y")), "<div><b>x</b><i>y</i></div>")

    @needs("hypothesis")
    def test_any_text_comes_back_from_an_html_parser(self) -> None:
        from hypothesis import given, settings
        from hypothesis import strategies as st

        class Reader(HTMLParser):
            text, title = "", ""

            def handle_starttag(self, tag: str, attrs: Any) -> None:
                self.title = dict(attrs)["title"]

            def handle_data(self, data: str) -> None:
                self.text += data

        @settings(max_examples=300, deadline=None)
        @given(st.text(), st.text())
        def check(text: str, title: str) -> None:
            reader = Reader()
            reader.feed(h.P(text, {"title": title}))
            reader.close()
            self.assertEqual((reader.text, reader.title), (text, title))

        check()


# -- 4. JSON


class TestJson(unittest.TestCase):
    """What `w.json`, `w.sync` and `data.signals` write with."""

    def test_a_circle_is_an_error_and_the_next_value_is_not_affected(self) -> None:
        inner: list[object] = []
        outer = {"a": inner}
        inner.append(outer)
        for _ in range(2):
            with self.assertRaisesRegex(StarioError, "holds itself"):
                data.signals(outer)
        inner.clear()
        self.assertEqual(data.signals(outer), {"data-signals": '{"a":[]}'})

    def test_keys_are_written_like_values(self) -> None:
        @dataclass
        class Day:
            rooms: dict[Any, Any]

        day = date(2024, 5, 1)
        for keys, expected in [
            ({day: {uuid.UUID(int=1): [{Size.LARGE: 1}]}},
             '{"2024-05-01":{"00000000-0000-0000-0000-000000000001":[{"l":1}]}}'),
            ([Day({day: 1.5, None: True, 2: Size.SMALL})],
             '[{"rooms":{"2024-05-01":1.5,"null":true,"2":1}}]'),
        ]:  # fmt: skip
            self.assertEqual(stario._json(keys), expected)
        circle: dict[Any, Any] = {day: 1}
        circle["self"] = circle
        for wrong in ({(1, 2): 3}, {day: object()}, circle, {day: float("nan")}, {b"x": 1}):
            with self.assertRaises(StarioError):
                stario._json(wrong)

    def test_json_of_almost_empty_lists_and_objects_is_refused_where_it_is_long(self) -> None:
        for piece in ("[]", "{}", "[1]", "[[]]", '[{}, ""]', '{"":[[]]}'):
            few = "[" + ",".join([piece] * 3000) + "]"
            self.assertEqual(stario._parse_json(few), json.loads(few))
            many = "[" + ",".join([piece] * 30_000) + "]"
            with self.subTest(piece), self.assertRaisesRegex(HttpException, "almost empty"):
                stario._parse_json(many)
        rows = [{"id": n, "tags": []} for n in range(12_000)]
        self.assertEqual(stario._parse_json(json.dumps(rows)), rows)
        for text in ("[{" * 30_000, '"[\\' * 20_000, "{[\n" * 20_000):
            self.assertEqual(stario._parse_json(json.dumps([text, text])), [text, text])
        with self.assertRaises(HttpException):
            stario._parse_json('["' + '\\"[' * 30_000)

    def test_a_value_may_fail_to_be_written_while_another_is(self) -> None:
        class Model:
            def model_dump(self, mode: str) -> object:
                with suppress(StarioError):
                    data.signals({"x": object()})
                return "written"

        signals = data.signals({"a": [Model(), Model()]})
        self.assertEqual(signals, {"data-signals": '{"a":["written","written"]}'})


# -- 5. The request


def a_request(target: str = "/", method: str = "GET", **fields: str) -> stario.Request:
    headers = {name.replace("_", "-"): [value] for name, value in fields.items()}
    line = stario.RequestLine(method, target)
    return stario.Request(line, stario.Headers(headers), b"", Kept())


class TestRequest(AsyncTest):
    """Part 5: headers, query, cookies, body."""

    def test_everything_is_decoded_when_it_is_asked_for(self) -> None:
        request = a_request(
            "/caf%C3%A9/a%2Fb?q=1&q=2&empty=&plus=a+b%21",
            host="Example.COM:8000", cookie='a=1; b="x%20y"; a=2; junk', accept="x",
        )  # fmt: skip
        self.assertEqual(request.path, "/café/a/b")
        self.assertEqual(request.raw_path, "/caf%C3%A9/a%2Fb")
        self.assertEqual(request.query.get("q"), "1")
        self.assertEqual(request.query.getlist("q"), ["1", "2"])
        self.assertEqual(request.query.get("empty"), "")
        self.assertEqual(request.query.get("plus"), "a b!")
        self.assertIsNone(request.query.get("nope"))
        self.assertEqual(request.query.get("nope", "d"), "d")
        self.assertIn("q", request.query)
        self.assertEqual(len(request.query), 4)
        self.assertEqual(request.host, "example.com")
        self.assertEqual(request.cookies, {"a": "1", "b": "x y"})
        self.assertEqual(request.headers.get("ACCEPT"), "x")
        self.assertIn("Accept", request.headers)
        self.assertEqual(a_request(host="[::1]:80").host, "[::1]")
        many = ";".join(f"c{i}={i}" for i in range(1002))
        self.assertEqual(list(a_request(cookie=many).cookies)[-1], "c999")

    def test_response_headers_give_themselves_back_and_refuse_what_cannot_be_sent(self) -> None:
        headers = stario.ResponseHeaders()
        headers.set("A", "1").add(b"a", b"2").setdefault("a", "x").setdefault("b", "3")
        headers.update({"C": "4"}).remove("B")
        self.assertEqual(headers.items(), [("a", "1"), ("a", "2"), ("c", "4")])
        self.assertEqual(headers.getlist("A"), ["1", "2"])
        self.assertEqual(len(headers.clear()), 0)
        for name, value in (("a b", "x"), ("a", "x\r\ny"), ("a", "\0"), ("a", "€"), ("", "x")):
            with self.subTest(repr((name, value))), self.assertRaises(StarioError):
                headers.set(name, value)
        headers.sent = True
        with self.assertRaisesRegex(StarioError, "sent"):
            headers.set("a", "1")

    async def test_bodies_come_whole_as_json_as_forms_and_in_chunks(self) -> None:
        app = Stario(max_body=1000)

        async def show(c: Context, w: Writer) -> None:
            what = c.req.query.get("as")
            if what == "json":
                w.json(await c.req.json())
            elif what == "form":
                form = await c.req.form()
                files = {k: [(f.filename, f.content_type, len(f.data)) for f in v]
                         for k, v in form.files.items()}  # fmt: skip
                w.json([form.items(), files])
            elif what == "stream":
                w.json([len(chunk) async for chunk in c.req.stream()])
            else:
                w.respond(await c.req.body() + await c.req.body(), "application/octet-stream")

        app.post("/", show)
        multipart = (
            '--B\r\nContent-Disposition: form-data; name="a"\r\n\r\nä\r\n--B\r\n'
            'Content-Disposition: form-data; name="f"; filename="x \\"y\\".txt"\r\n'
            "Content-Type: text/plain\r\n\r\nline\r\n--no\r\n\r\n--B--\r\n"
        ).encode()
        kind = {"content-type": 'multipart/form-data; boundary="B"'}
        async with TestClient(app) as client:
            self.assertEqual((await client.post("/", body=b"ab")).body, b"abab")
            self.assertEqual((await client.post("/?as=json", json=[1])).json(), [1])
            self.assertEqual((await client.post("/?as=json", body=b"{")).status, 400)
            self.assertEqual((await client.post("/?as=stream", body=b"abc")).json(), [3])
            answer = await client.post("/?as=form", form={"a": ["1", "2"], "b": "ü"})
            self.assertEqual(answer.json(), [[["a", "1"], ["a", "2"], ["b", "ü"]], {}])
            answer = await client.post("/?as=form", body=multipart, headers=kind)
            self.assertEqual(
                answer.json(), [[["a", "ä"]], {"f": [['x "y".txt', "text/plain", 12]]}]
            )
            for body in (b"", b"--B\r\n\r\nx", multipart[:-6], b"--B\r\n\r\nx\r\n--B--"):
                answer = await client.post("/?as=form", body=body or b"x", headers=kind)
                self.assertEqual(answer.status, 400, body)
            self.assertEqual((await client.post("/?as=form", body=b"x")).status, 415)
            self.assertEqual((await client.post("/", body=b"x" * 1001)).status, 413)
            self.assertEqual((await client.post("/", body=b"x" * 1000)).status, 200)

    def test_look_ups_have_keys_types_and_defaults(self) -> None:
        query = stario.QueryParams([("n", "7"), ("n", "8"), ("x", "y"), ("f", "nan"), ("b", "On")])
        self.assertEqual((query["n"], query.keys(), list(query)), ("7", [*"nxfb"], [*"nxfb"]))
        self.assertEqual(query.get("n", 0, type=int), 7)
        self.assertEqual(query.get("x", 0, type=int), 0)
        self.assertEqual(query.get("none", 0, type=int), 0)
        self.assertIsNone(query.get("f", type=float))
        self.assertIsNone(query.get("x", type=Decimal))
        refusing: list[Callable[[str], Any]] = [
            uuid.UUID, Size.__getitem__, {"n": 1}.__getitem__, lambda text: [1][len(text)],
            lambda text: json.loads("[" * 100_000),
        ]  # fmt: skip
        for refuses in refusing:
            self.assertEqual(query.get("x", 5, type=refuses), 5)
        self.assertIs(query.get("b", False, type=bool), True)
        self.assertIs(query.get("n", False, type=bool), False)
        headers = stario.Headers({"x-a": ["1", "2"]})
        self.assertEqual((headers["X-A"], headers.keys()), ("1", ["x-a"]))
        self.assertEqual((headers.get("X-A", 0, type=int), headers.get("x-b", 5, int)), (1, 5))
        self.assertEqual(
            (headers.getlist("X-A"), "X-a" in headers, "N" in query), ([*"12"], True, False)
        )
        for missing in (query, headers):
            with self.assertRaises(KeyError):
                missing["none"]
            with self.assertRaises(HttpException) as caught:
                missing["none"]
            self.assertEqual(caught.exception.status_code, 400)

    async def test_cookies_and_ids_come_as_browsers_send_them(self) -> None:
        async def show(c: Context, w: Writer) -> None:
            w.json([c.req.cookies, c.req.headers.get("last-event-id"), c.req.headers.get("x")])

        app = Stario()
        app.get("/", show)
        table: list[tuple[bytes, dict[str, str]]] = [
            (b'a="x"; b="; c="y; d=z"; e=""', {"a": "x", "b": '"', "c": '"y', "d": 'z"', "e": ""}),
            ("n=żółw; n=2".encode(), {"n": "żółw"}),
            (b" \t a\t=\t1\t; \xc2\xa0b=2", {"a": "1", "\xa0b": "2"}),
            (b"a=\xff%C3%A9", {"a": "\ufffdé"}),
            (b"a", {}),
        ]  # fmt: skip
        async with connected(app) as peer:
            for line, cookies in table:
                with self.subTest(line):
                    await peer.send(
                        b"GET / HTTP/1.1\r\nHost: x\r\nLast-Event-ID: \xe2\x82\xac1\r\nX: \xe9\r\n"
                        b"Cookie: " + line + b"\r\n\r\n"
                    )
                    answer = json.loads((await within(peer.answer())).body)
                    self.assertEqual(answer, [cookies, "€1", "é"])
        async with TestClient(app) as client:
            client.cookies["half"] = "a\ud83d"
            answer = await client.get("/", headers={"last-event-id": "€", "x": "\ud83d"})
            self.assertEqual(answer.json(), [{"half": "a?"}, "€", "?"])
            self.assertEqual((await client.get("/?q=\udc00", signals={"a": "\ud83d"})).status, 200)

    def test_escapes_are_decoded_as_the_standard_library_does(self) -> None:
        for text in (
            "a%20b", "%C3%A9é%c3", "%", "%%41%4", "100%25%", "%zz%E2%82%AC", "+%2B", "%0",
        ):  # fmt: skip
            with self.subTest(text):
                self.assertEqual(stario._unquote(text), unquote(text))
                self.assertEqual(
                    stario._parse_pairs(f"{text}=x&&y={text}&z"),
                    parse_qsl(f"{text}=x&&y={text}&z", keep_blank_values=True),
                )
        with self.assertRaises(HttpException):
            stario._parse_pairs("&" * 1000)

    async def test_a_request_can_raise_its_own_limit(self) -> None:
        app = Stario(max_body=10)

        async def upload(c: Context, w: Writer) -> None:
            c.req.max_body = 100
            w.text(str(len(await c.req.body())))

        app.post("/", upload)
        async with TestClient(app) as client:
            self.assertEqual((await client.post("/", body=b"x" * 100)).text, "100")
            self.assertEqual((await client.post("/", body=b"x" * 101)).status, 413)

    def test_what_is_taken_apart_takes_memory_in_proportion(self) -> None:
        """Text between escapes, and lists of things that nobody knows."""
        many = ",".join(f"{n:x}" for n in range(20_000))
        for name, length, read in (
            ("form", 150_000, lambda: stario._parse_pairs("x=" + "%41" * 50_000)),
            ("cookie", 350_000, lambda: stario._unquote("a%c3%a4" * 50_000)),
            ("path", 200_000, lambda: stario._decode_path("/" + "a%41" * 50_000)),
            ("codings", len(many), lambda: stario._choose_coding(many, CompressionConfig())),
            ("options", len(many), lambda: stario._Framing(f"connection: {many}\r\n".encode())),
        ):
            with self.subTest(name):
                tracemalloc.start()
                self.addCleanup(tracemalloc.stop)
                read()
                self.assertLess(tracemalloc.get_traced_memory()[1], 40 * length)
                tracemalloc.stop()


class TestPathsAndText(HttpTest):
    async def test_an_escaped_slash_does_not_split_a_segment(self) -> None:
        """RFC 3986, section 2.2: split first, decode after."""

        async def show(c: Context, w: Writer) -> None:
            w.json([c.req.params.get("name"), c.req.tail, c.req.raw_path])

        app = Stario()
        app.get("/one/{name}", show)
        app.get("/one/{name}/two", show)
        app.get("/tail/*", show)
        async with connected(app) as peer:
            answers = {
                "/one/a%2Fb": ["a/b", "", "/one/a%2Fb"],
                "/one/a%2Ftwo": ["a/two", "", "/one/a%2Ftwo"],
                "/one/%7Bx%7D": ["{x}", "", "/one/%7Bx%7D"],
                "/one/%C3%A4%2B+": ["ä++", "", "/one/%C3%A4%2B+"],
                "/tail/a%2Fb/../c": [None, "a/b/../c", "/tail/a%2Fb/../c"],
            }
            for path, wanted in answers.items():
                with self.subTest(path):
                    self.assertEqual(json.loads((await within(peer.get(path))).body), wanted)
            self.assertEqual((await within(peer.get("/one/a/b"))).status, 404)

    async def test_a_route_is_found_however_it_and_the_path_are_escaped(self) -> None:
        async def show(c: Context, w: Writer) -> None:
            w.json([c.req.route, c.req.params, c.req.path])

        app = Stario()
        for route in ("/a%20b", "/c d/{x}", "/caf%C3%A9", "/ü", "/e%2Ff", "/100%25", "/50%"):
            app.get(route, show)
        asked = {
            "/a%20b": ["/a%20b", {}, "/a b"], "/c%20d/%2f": ["/c d/{x}", {"x": "/"}, "/c d//"],
            "/caf%c3%a9": ["/caf%C3%A9", {}, "/café"], "/%C3%BC": ["/ü", {}, "/ü"],
            "/%65%2ff": ["/e%2Ff", {}, "/e/f"], "/100%25": ["/100%25", {}, "/100%"],
            "/50%25": ["/50%", {}, "/50%"], "/e/f": None, "/a%2520b": None, "/e%FFf": None,
            "/%C3/%A9": None, "/c%20d/%C3%2F": None, "/%FF": None,
        }  # fmt: skip
        async with TestClient(app) as client:
            for path, wanted in asked.items():
                with self.subTest(path):
                    answer = await client.get(path)
                    self.assertEqual(answer.json() if answer.status == 200 else None, wanted)
                    head = await client.request("HEAD", path)
                    self.assertEqual(head.status, answer.status)
                    if wanted:
                        self.assertEqual((await client.post(path)).status, 405)
                        moved = await client.get(path + "/?q")
                        self.assertEqual(moved.headers.get("location"), path + "?q")

    async def test_no_path_makes_a_redirect_to_another_host(self) -> None:
        """RFC 3986, section 4.2: '//evil.com' is a host, and to browsers so is '/\\evil.com'."""

        async def show(c: Context, w: Writer) -> None:
            w.text("here")

        app = Stario()
        app.get("/{name}", show)
        app.get("/{name}/evil.com", show)
        app.get("/{name}/{other}/evil.com", show)
        paths = ["//evil.com/", "/\\evil.com/", "///evil.com/", "//\\evil.com//", "/a//evil.com/"]
        paths += ["//evil.com%2f..", "/%5Cevil.com/", "/%2f/evil.com/", "http:evil.com/"]
        async with app.running() as server:
            for path in paths:
                with self.subTest(path):
                    peer = await Peer.connect(server.port)
                    answer = await within(peer.get(path))
                    self.assertIn(answer.status, (308, 404, 400))
                    location = answer.headers.get("location", "/")
                    self.assertRegex(location, r"^/(?![/\\])")
                    await peer.close()

    async def test_redirects_stay_what_they_are(self) -> None:
        """RFC 9110, section 10.2.2."""

        async def go(c: Context, w: Writer) -> None:
            w.redirect(c.req.query.get("to"))  # type: ignore[arg-type]

        app = Stario()
        app.get("/", go)
        targets = {
            "/a?b=%26c#d": "/a?b=%26c#d",
            "/ä b": "/%C3%A4%20b",
            "/\\evil.com": "/%5Cevil.com",
            "\\\\evil.com": "%5C%5Cevil.com",
            "https://other.example/x": "https://other.example/x",
            '/"<>': "/%22%3C%3E",
        }
        async with connected(app) as peer:
            for target, location in targets.items():
                with self.subTest(target):
                    answer = await within(peer.get(f"/?to={quote(target, safe='')}"))
                    self.assertEqual(answer.headers["location"], location)

    async def test_control_characters_are_refused_where_they_are_set(self) -> None:
        """RFC 9110, section 5.5; RFC 6265, section 4.1.1; else a text could end a header."""
        problems: list[str] = []

        def check(name: str, call: Callable[[], object]) -> None:
            try:
                call()
            except StarioError:
                return
            problems.append(name)

        def try_fields(w: Writer, bad: str) -> None:
            check(f"value {bad!r}", lambda: w.headers.set("x", bad))
            check(f"bytes value {bad!r}", lambda: w.headers.add("x", bad.encode()))
            check(f"name {bad!r}", lambda: w.headers.setdefault(bad, "x"))
            check(f"update {bad!r}", lambda: w.headers.update({"x": bad}))
            check(f"cookie value {bad!r}", lambda: w.cookie("a", bad))
            check(f"cookie name {bad!r}", lambda: w.cookie(bad, "a"))
            check(f"cookie path {bad!r}", lambda: w.cookie("a", "b", path=bad))
            check(f"cookie domain {bad!r}", lambda: w.cookie("a", "b", domain=bad))
            check(f"redirect {bad!r}", lambda: w.redirect(bad))
            check(f"content type {bad!r}", lambda: w.respond(b"", bad))

        def try_events(w: Writer, bad: str) -> None:
            check(f"event name {bad!r}", lambda: w.event(bad, "x"))
            check(f"event id {bad!r}", lambda: w.event("x", "y", id=bad))

        async def try_all(c: Context, w: Writer) -> None:
            for bad in ("a\rb", "a\nb", "a\r\nX: y", "a\0b", "\r\n", "a\x7fb", "a\x0bb"):
                try_fields(w, bad)
            for bad in ("a\rb", "a\nb", "\r\n", "a\0b"):
                try_events(w, bad)
            for bad in ("", "a b", "a:b", "a(b", "ä"):
                check(f"name {bad!r}", lambda name=bad: w.headers.set(name, "x"))  # type: ignore[misc]
            check("value outside of Latin-1", lambda: w.headers.set("x", "€"))
            check("cookie path with ;", lambda: w.cookie("a", "b", path="/;domain=x"))
            check("samesite", lambda: w.cookie("a", "b", samesite="lax; domain=x"))  # type: ignore[arg-type]
            w.text("answered")

        app = Stario(Spans())
        app.get("/", try_all)
        async with connected(app) as peer:
            answer = await within(peer.get("/"))
        self.assertEqual(problems, [])
        self.assertEqual(answer.text, "answered")
        self.assertFalse({"x", "set-cookie", "location"} & set(answer.headers))

    async def test_text_cannot_forge_events(self) -> None:
        """HTML standard, 9.2.6: each kind of line break starts a new data line."""

        async def send(c: Context, w: Writer) -> None:
            w.event("x", "a\nb\rc\r\nevent: forged\n\ndata: d")

        app = Stario()
        app.get("/", send)
        async with connected(app) as peer:
            lines = (await within(peer.get("/"))).text.split("\n")
        self.assertEqual(
            [line for line in lines if not line.startswith("data: ")], ["event: x", "", ""]
        )


# -- 6. The answer


class TestWriter(AsyncTest):
    """Part 6: the answers in one shot, raw answers, cookies, compression."""

    async def answer(self, handler: Any, method: str = "GET", **options: Any) -> Any:
        app = Stario(**options.pop("app", {}))
        app.handle(method, "/", handler)
        if method == "HEAD":
            app.get("/", handler)
        async with TestClient(app) as client:
            return await client.request(method, "/", **options)

    async def test_each_answer_has_its_type_and_status(self) -> None:
        @dataclass
        class Point:
            x: int

        for name, arguments, status, kind, body in [
            ("html", (h.P("<"),), 200, "text/html; charset=utf-8", b"<p>&lt;</p>"),
            ("html", ("<",), 200, "text/html; charset=utf-8", b"&lt;"),
            ("html", (h.P("\ud800"),), 200, "text/html; charset=utf-8", b"<p>?</p>"),
            ("text", ("ü", 201), 201, "text/plain; charset=utf-8", "ü".encode()),
            ("json", ({"a": Point(1)},), 200, "application/json", b'{"a":{"x":1}}'),
            ("respond", (b"x", "image/png", 418), 418, "image/png", b"x"),
            ("empty", (), 204, None, b""),
            ("empty", (404,), 404, None, b""),
        ]:

            async def handler(c: Context, w: Writer) -> None:
                getattr(w, name)(*arguments)  # noqa: B023

            with self.subTest(f"{name} {arguments}"):
                found = await self.answer(handler)
                self.assertEqual(
                    (found.status, found.headers.get("content-type"), found.body),
                    (status, kind, body),
                )

    async def test_redirects_go_where_they_say(self) -> None:
        for url, status, location in [
            ("/ü?a=b c", 307, "/%C3%BC?a=b%20c"),
            ("https://example.com/x%20y#z", 303, "https://example.com/x%20y#z"),
            ("/\\evil.com", 302, "/%5Cevil.com"),
        ]:

            async def handler(c: Context, w: Writer) -> None:
                w.redirect(url, status)  # noqa: B023

            found = await self.answer(handler)
            self.assertEqual((found.status, found.headers.get("location")), (status, location))
        writer = Writer(Kept(), a_request(), CompressionConfig())
        for url, status in (("/a\nb", 307), ("/a\r", 307), ("/", 200), ("/\0", 307), ("", 303)):
            with self.assertRaises(StarioError):
                writer.redirect(url, status)

    async def test_a_second_answer_is_an_error_and_work_after_the_first_goes_on(self) -> None:
        seen: list[str] = []

        async def handler(c: Context, w: Writer) -> None:
            w.empty(204)
            seen.append("after")
            for again in (
                lambda: w.text("x"),
                lambda: w.patch(h.P({"id": "p"})),
                lambda: w.write(b"x"),
            ):
                try:
                    again()
                except StarioError:
                    seen.append("refused")
            w.end()

        self.assertEqual((await self.answer(handler)).status, 204)
        self.assertEqual(seen, ["after", "refused", "refused", "refused"])

    def test_half_an_emoji_in_a_header_is_replaced(self) -> None:
        for text, kept in (("a\ud83d b", "a? b"), ("\udc00\udc00é", "??é")):
            self.assertEqual(stario.ResponseHeaders().set("x", text).get("x"), kept)

    async def test_cookies_that_browsers_guard_are_set_as_they_ask(self) -> None:
        """RFC 6265bis, sections 4.1.3 and 5.6: otherwise they would be ignored, without a word."""

        async def handler(c: Context, w: Writer) -> None:
            w.cookie("__Host-a", "\ud83d")
            w.cookie("__SECURE-b", "1", path="/x")
            w.cookie("c", "1", samesite="None", path="/żó%20", domain=".bücher.example")  # type: ignore[arg-type]
            w.delete_cookie("d", partitioned=True, samesite=None, path="/x", httponly=True)
            w.cookie("e", "1" * 4094, path="", expires=datetime.max.replace(tzinfo=timezone.utc))
            wrong: list[tuple[str, Any, dict[str, Any]]] = [
                ("__Host-a", "1", {"path": "/x"}), ("__host-a", "1", {"domain": "a.example"}),
                ("a", None, {}), ("a", "1", {"domain": "a..example"}), ("a", "1", {"path": "/;"}),
                ("a", "1", {"domain": "a.example:80"}), ("a", "1", {"domain": "https://a.example"}),
                ("a", "1", {"domain": "a example"}), ("a", "1", {"path": "x"}),
                ("a", "1", {"path": None}), ("a", "1", {"samesite": True}), (5, "1", {}),  # type: ignore[list-item]
                ("a", "1", {"expires": 60}), ("a", "1", {"expires": date(2030, 1, 1)}),
                ("a", "1", {"max_age": "1d"}), ("a", "1", {"max_age": timedelta(1)}),
                ("a", "é" * 700, {}), ("a", "1" * 4096, {}),
            ]  # fmt: skip
            for name, value, options in wrong:
                with self.subTest(name, **options), self.assertRaises(StarioError):
                    w.cookie(name, value, **options)
            w.empty()

        answer = await self.answer(handler)
        self.assertEqual(answer.headers.getlist("set-cookie"), [
            "__Host-a=?; Path=/; Secure; SameSite=Lax",
            "__SECURE-b=1; Path=/x; Secure; SameSite=Lax",
            "c=1; Domain=xn--bcher-kva.example; Path=/%C5%BC%C3%B3%20; Secure; SameSite=None",
            "d=; Max-Age=0; Expires=Thu, 01 Jan 1970 00:00:00 GMT; Path=/x; Secure; HttpOnly; "
            "Partitioned",
            f"e={'1' * 4094}; Expires=Fri, 31 Dec 9999 23:59:59 GMT; SameSite=Lax",
        ])  # fmt: skip

    async def test_what_has_no_body_gets_none_whatever_would_be_in_it(self) -> None:
        async def handler(c: Context, w: Writer) -> None:
            status = int(c.req.headers["x-status"])
            if c.req.headers["x-how"] == "raw":
                w.headers.set("content-type", "text/plain")
                w.write_headers(status).end()
            else:
                w.text("x" * 1000, status)

        for status, how in ((204, "raw"), (304, "raw"), (204, "text"), (304, "text")):
            with self.subTest(status, how=how):
                sent = {"accept-encoding": "gzip", "x-how": how, "x-status": str(status)}
                answer = await self.answer(handler, headers=sent)
                self.assertEqual((answer.status, answer.body), (status, b""))
        sent = {"accept-encoding": "gzip", "x-how": "raw", "x-status": "200"}
        answer = await self.answer(handler, "HEAD", headers=sent)
        self.assertEqual((answer.headers.get("content-encoding"), answer.body), ("gzip", b""))

    async def test_caches_keep_nothing_that_is_long(self) -> None:
        async def handler(c: Context, w: Writer) -> None:
            w.respond(b"x" * 1000, c.req.headers["x-type"])

        caches = [stario._choose_coding, stario._content, stario._kept_framing]
        for long in (False, True):
            sizes = [cache.cache_info().currsize for cache in caches]
            more = f"{uuid.uuid4()}" + "x" * 1000 * long
            fields = {"accept-encoding": f"gzip, {more}", "x-type": f"text/{more}", "host": more}
            await self.answer(handler, headers=fields)
            for cache, size in zip(caches, sizes, strict=True):
                found = cache.cache_info()
                if size < (found.maxsize or 0):
                    self.assertEqual(found.currsize - size, not long, cache)

    async def test_lists_may_come_in_several_lines(self) -> None:
        async def handler(c: Context, w: Writer) -> None:
            w.respond(b"word " * 1000, "application/x-ndjson")

        app = Stario()
        app.get("/", handler)
        lines = "Accept-Encoding: br;q=0, zstd;q=0\r\nAccept-Encoding: gzip;q=0.5\r\n"
        async with connected(app) as peer:
            await peer.send(f"GET / HTTP/1.1\r\nHost: x\r\n{lines}\r\n")
            answer = await within(peer.answer())
        self.assertEqual(gzip.decompress(answer.body), b"word " * 1000)

    async def test_raw_answers_chain(self) -> None:
        async def handler(c: Context, w: Writer) -> None:
            w.headers.set("content-type", "text/x").set("x-a", "1")
            w.write_headers(200).write(b"a").end(b"b")
            self.assertTrue(w.started and w.completed)
            self.assertEqual(w.status_code, 200)
            with self.assertRaises(StarioError):
                w.headers.set("late", "1")

        found = await self.answer(handler)
        self.assertEqual((found.body, found.headers.get("x-a")), (b"ab", "1"))

    async def test_cookies_are_set_read_and_deleted(self) -> None:
        app = Stario()

        async def login(c: Context, w: Writer) -> None:
            w.cookie("id", "a b;ü", max_age=60, secure=True, httponly=True, samesite="strict",
                     domain="example.com", partitioned=True,
                     expires=datetime(2030, 1, 2, 3, 4, 5, tzinfo=timezone.utc))  # fmt: skip
            w.cookie("plain", "1")
            w.empty()

        async def who(c: Context, w: Writer) -> None:
            w.json(c.req.cookies)

        async def logout(c: Context, w: Writer) -> None:
            w.delete_cookie("id")
            w.empty()

        app.get("/login", login)
        app.get("/who", who)
        app.get("/logout", logout)
        async with TestClient(app) as client:
            answer = await client.get("/login")
            self.assertEqual(
                answer.headers.getlist("set-cookie"),
                ["id=a%20b%3B%C3%BC; Max-Age=60; Expires=Wed, 02 Jan 2030 03:04:05 GMT; "
                 "Domain=example.com; Path=/; Secure; HttpOnly; SameSite=Strict; Partitioned",
                 "plain=1; Path=/; SameSite=Lax"],
            )  # fmt: skip
            self.assertEqual(answer.cookies, {"id": "a b;ü", "plain": "1"})
            self.assertEqual((await client.get("/who")).json(), {"id": "a b;ü", "plain": "1"})
            await client.get("/logout")
            self.assertEqual((await client.get("/who")).json(), {"plain": "1"})
        writer = Writer(Kept(), a_request(), CompressionConfig())
        for name, value, options in [
            ("a b", "", {}), ("a", "x\ny", {}), ("a", "", {"path": "/;x"}),
            ("a", "", {"domain": "x\r"}), ("a", "", {"samesite": "maybe"}),
        ]:  # fmt: skip
            with self.subTest(f"{name!r} {value!r} {options}"), self.assertRaises(StarioError):
                writer.cookie(name, value, **options)  # type: ignore[arg-type]

    async def test_compression_follows_what_the_client_accepts(self) -> None:
        async def handler(c: Context, w: Writer) -> None:
            w.text("x" * 1000)

        for accepted, coding in [
            ("gzip", "gzip"), ("gzip;q=0", None), ("*", "any"), ("identity", None), ("", None),
            ("gzip;q=0.5, identity;q=1", None), ("deflate", None), ("GZIP;q=1.0", "gzip"),
            ("gzip;q=2", None),
        ]:  # fmt: skip
            with self.subTest(accepted):
                found = await self.answer(handler, headers={"accept-encoding": accepted})
                used = found.headers.get("content-encoding")
                self.assertEqual("any" if coding == "any" and used else used, coding)
                self.assertEqual(found.headers.get("vary"), "accept-encoding")
                if used == "gzip":
                    self.assertEqual(gzip.decompress(found.body), b"x" * 1000)

    async def test_what_is_small_or_compressed_already_is_left_alone(self) -> None:
        async def small(c: Context, w: Writer) -> None:
            w.text("x" * 255)

        async def image(c: Context, w: Writer) -> None:
            w.respond(b"x" * 1000, "image/png")

        async def own(c: Context, w: Writer) -> None:
            w.headers.set("content-encoding", "x-own")
            w.text("x" * 1000)

        async def forbidden(c: Context, w: Writer) -> None:
            w.headers.set("cache-control", "public, No-Transform")
            w.text("x" * 1000)

        async def signed(c: Context, w: Writer) -> None:  # (RFC 9530: of the bytes that are sent)
            w.headers.update([("content-digest", "sha-256=:4ed8:")])  # type: ignore[arg-type]
            w.text("x" * 1000)

        async def plain(c: Context, w: Writer) -> None:
            w.headers.set("x-note", "content-encoding: none; no-transform")
            w.text("x" * 1000)

        off: dict[str, Any] = {"app": {"compression": CompressionConfig(gzip_level=-1)}}
        for handler, options, coding in (
            (small, {}, None), (image, {}, None), (own, {}, "x-own"), (forbidden, {}, None),
            (signed, {}, None), (plain, off, None), (plain, {}, "gzip"),
        ):  # fmt: skip
            found = await self.answer(handler, headers={"accept-encoding": "gzip"}, **options)
            self.assertEqual(found.headers.get("content-encoding"), coding, handler)

    def test_a_level_that_does_not_exist_is_refused(self) -> None:
        wrong: list[dict[str, Any]] = [
            {"gzip_level": 10}, {"brotli_level": 12}, {"zstd_level": 23}, {"gzip_level": "6"},
            {"min_size": None}, {"brotli_level": 4.5},
        ]  # fmt: skip
        for options in wrong:
            with self.subTest(options), self.assertRaisesRegex(StarioError, next(iter(options))):
                CompressionConfig(**options)

    async def test_every_coding_that_is_there_gives_the_text_back(self) -> None:
        text = "".join(chr(97 + i * i % 26) for i in range(5000))

        async def whole(c: Context, w: Writer) -> None:
            w.text(text)

        async def stream(c: Context, w: Writer) -> None:
            for _ in range(3):
                w.event("x", text)

        for coding in stario._codings():
            for handler in (whole, stream):
                found = await self.answer(handler, headers={"accept-encoding": coding})
                self.assertEqual(found.headers.get("content-encoding"), coding)
                self.assertLess(len(found.body), 5000)
                self.assertIn(text.encode(), decompress(coding, found.body))

    @needs("brotli", "zstandard")
    async def test_zstd_comes_before_brotli_and_that_before_gzip(self) -> None:
        async def handler(c: Context, w: Writer) -> None:
            w.text("x" * 1000)

        for accepted, coding in [
            ("gzip, deflate, br, zstd", "zstd"), ("gzip, br", "br"), ("gzip, br;q=0.9", "gzip"),
        ]:  # fmt: skip
            found = await self.answer(handler, headers={"accept-encoding": accepted})
            self.assertEqual(found.headers.get("content-encoding"), coding)
            self.assertEqual(decompress(coding, found.body), b"x" * 1000)


class TestOneAnswerOnly(AsyncTest):
    """A body that fails while its handler answers already must not be answered a second time."""

    async def test_a_body_that_fails_in_the_middle_of_an_answer(self) -> None:
        begun, go_on = asyncio.Event(), asyncio.Event()
        app = Stario()

        async def slow(c: Context, w: Writer) -> None:
            w.write_headers(200).write(b"begin ")
            begun.set()
            await go_on.wait()
            w.end(b"end")

        async def read(c: Context, w: Writer) -> None:
            await c.req.body()

        app.post("/slow", slow)
        app.post("/read", read)
        for framing, rest in (
            ("transfer-encoding: chunked", b"zz\r\n"),
            ("content-length: 9", b""),
        ):
            begun.clear()
            go_on.clear()
            async with app.running(body_timeout=0.1) as server:
                peer = await Peer.connect(server.port)
                await peer.send(f"POST /slow HTTP/1.1\r\nHost: x\r\n{framing}\r\n\r\n")
                await within(begun.wait())
                await peer.send(rest) if rest else peer.writer.write_eof()
                # Another client's body times out after this one's time would have been up.
                clock = await Peer.connect(server.port)
                await clock.send("POST /read HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n")
                self.assertEqual((await within(clock.answer())).status, 408)
                go_on.set()
                text = await within(peer.rest())
                self.assertEqual(text.count(b"HTTP/1.1"), 1, framing)
                self.assertIn(b"end", text)
                await peer.close()
                await clock.close()

    async def test_a_large_text_among_the_assets_is_served_whole_and_in_parts(self) -> None:
        app = Stario()
        app.assets("/big", {"a.js": "x" * 300_000})
        url = "/big/" + asset("a.js", collection="big")
        async with TestClient(app) as client:
            self.assertEqual(len((await client.get(url)).body), 300_000)
            part = await client.get(url, headers={"range": "bytes=5-9"})
            self.assertEqual((part.status, part.body), (206, b"xxxxx"))
            small = await client.get(url, headers={"accept-encoding": "gzip"})
            self.assertEqual(gzip.decompress(small.body), b"x" * 300_000)


# -- 7. Context and routing


def decompress(coding: str, data: bytes) -> bytes:
    if coding == "gzip":
        return gzip.decompress(data)
    if coding == "br":
        return bytes(importlib.import_module("brotli").decompress(data))
    try:
        return bytes(importlib.import_module("compression.zstd").decompress(data))
    except ImportError:
        stream = importlib.import_module("zstandard").ZstdDecompressor().decompressobj()
        return bytes(stream.decompress(data))


class TestRouting(AsyncTest):
    """Part 7: context and routing."""

    def app(self, *paths: str) -> Stario:
        app = Stario()

        def named(name: str) -> Any:
            async def handler(c: Context, w: Writer) -> None:
                w.json([name, c.req.params, c.req.tail, c.req.subhost])

            return handler

        for path in paths:
            method, _, rest = path.partition(" ")
            app.handle(method, rest, named(path))
        return app

    async def test_the_more_specific_route_wins_whatever_the_order(self) -> None:
        paths = [
            "GET /*", "GET /users/*", "GET /users/{id}", "GET /users/me", "GET /users/{id}/edit",
            "GET /files/*", "POST /users/{id}", "GET no-slash", "GET /", "GET /café",
        ]  # fmt: skip
        for order in (paths, paths[::-1]):
            async with TestClient(self.app(*order)) as client:
                for asked, expected in [
                    ("/users/me", ["GET /users/me", {}, ""]),
                    ("/users/7", ["GET /users/{id}", {"id": "7"}, ""]),
                    ("/users/a%2Fb", ["GET /users/{id}", {"id": "a/b"}, ""]),
                    ("/users/me/edit", ["GET /users/{id}/edit", {"id": "me"}, ""]),
                    ("/users/7/8", ["GET /users/*", {}, "7/8"]),
                    ("/users", ["GET /users/*", {}, ""]),
                    ("/files", ["GET /files/*", {}, ""]),
                    ("/filesystem", ["GET /*", {}, "filesystem"]),
                    ("/no-slash", ["GET no-slash", {}, ""]),
                    ("/caf%C3%A9", ["GET /café", {}, ""]),
                    ("/", ["GET /", {}, ""]),
                ]:
                    with self.subTest(asked):
                        self.assertEqual((await client.get(asked)).json()[:3], expected)
                self.assertEqual((await client.post("/users/me")).json()[0], "POST /users/{id}")

    async def test_routes_that_cannot_be_told_apart_are_refused(self) -> None:
        for first, second in [
            ("/a", "/a"), ("/{x}", "/{y}"), ("/a/*", "/a/*"), ("a", "/a"),
        ]:  # fmt: skip
            with self.subTest(second), self.assertRaises(StarioError):
                self.app(f"GET {first}", f"GET {second}")
        for wrong in ("/a*", "/*/b", "/{a", "/{a}b", "/{a}/{a}", "/{1}"):
            with self.subTest(wrong), self.assertRaises(StarioError):
                self.app(f"GET {wrong}")

    async def test_head_options_wrong_methods_and_slashes_are_answered(self) -> None:
        async with TestClient(self.app("GET /a", "POST /a", "GET /b/*", "GET /own/")) as client:
            head = await client.request("HEAD", "/a")
            self.assertEqual((head.status, head.body), (200, b""))
            self.assertGreater(int(head.headers.get("content-length") or 0), 0)
            options = await client.request("OPTIONS", "/a")
            self.assertEqual(options.status, 204)
            self.assertEqual(options.headers.get("allow"), "GET, HEAD, OPTIONS, POST")
            wrong = await client.delete("/a")
            self.assertEqual(
                (wrong.status, wrong.headers.get("allow")), (405, "GET, HEAD, OPTIONS, POST")
            )
            moved = await client.get("/a/?q=1")
            self.assertEqual((moved.status, moved.headers.get("location")), (308, "/a?q=1"))
            self.assertEqual((await client.get("/own")).status, 404)
            self.assertEqual((await client.get("/own/")).status, 200)
            self.assertEqual((await client.get("/nope/")).status, 404)
            evil = await client.get("//a/")
            self.assertIn(evil.headers.get("location"), (None, "/a"))

    async def test_middleware_wraps_from_the_outside_in_and_also_where_there_is_no_route(
        self,
    ) -> None:
        seen: list[str] = []

        def noting(name: str) -> Any:
            def middleware(handler: Any) -> Any:
                async def wrapped(c: Context, w: Writer) -> None:
                    seen.append(name)
                    c.state[name] = True
                    await handler(c, w)

                return wrapped

            return middleware

        async def show(c: Context, w: Writer) -> None:
            w.json(list(c.state))

        inner = Router()
        inner.use(noting("inner"))
        inner.get("/x", show, noting("own"))
        app = Stario()
        app.use(noting("first"), noting("second"))
        app.mount("/m", inner)
        app.get("/y", show, noting("a"), noting("b"))
        with self.assertRaisesRegex(StarioError, "before the routes"):
            app.use(noting("late"))
        with self.assertRaisesRegex(StarioError, "mounted"):
            inner.get("/late", show)
        async with TestClient(app) as client:
            self.assertEqual((await client.get("/m/x")).json(), ["first", "second", "inner", "own"])
            self.assertEqual((await client.get("/y")).json(), ["first", "second", "a", "b"])
            seen.clear()
            self.assertEqual((await client.get("/nope")).status, 404)
            self.assertEqual(seen, ["first", "second"])

    async def test_errors_go_to_the_handler_of_the_nearest_type(self) -> None:
        app, inner = Stario(), Router()

        async def fail(c: Context, w: Writer) -> None:
            raise {"key": KeyError, "value": ValueError, "zero": ZeroDivisionError}[
                c.req.params["k"]
            ]("x")

        async def lookup(c: Context, w: Writer, exc: LookupError) -> None:
            w.text(f"lookup {type(exc).__name__}", 410)

        def plain(c: Context, w: Writer, exc: Exception) -> None:
            w.text("plain", 411)

        def broken(c: Context, w: Writer, exc: Exception) -> None:
            raise RuntimeError("the handler itself")

        inner.on_error(ValueError, plain)
        inner.get("/{k}", fail)
        app.on_error(LookupError, lookup)
        app.on_error(ZeroDivisionError, broken)
        app.get("/{k}", fail)
        app.mount("/in", inner)
        async with TestClient(app, raise_errors=False) as client:
            self.assertEqual((await client.get("/key")).text, "lookup KeyError")
            self.assertEqual((await client.get("/in/key")).text, "lookup KeyError")
            self.assertEqual((await client.get("/in/value")).status, 411)
            with self.assertLogs("asyncio", "ERROR"):
                self.assertEqual((await client.get("/value")).status, 500)
            with self.assertLogs("asyncio", "ERROR"):
                self.assertEqual((await client.get("/zero")).text, "Internal Server Error")

    async def test_http_exceptions_answer_and_redirect(self) -> None:
        app = Stario()

        async def raising(c: Context, w: Writer) -> None:
            w.headers.set("content-type", "image/png").set("x-kept", "1").set("etag", '"a"')
            raise HttpException(int(c.req.params["status"]), c.req.query.get("detail", ""))

        app.get("/{status}", raising)
        async with TestClient(app) as client:
            found = await client.get("/404")
            self.assertEqual((found.status, found.text), (404, "Not Found"))
            self.assertEqual(found.headers.get("content-type"), "text/plain; charset=utf-8")
            self.assertEqual(found.headers.get("x-kept"), "1")
            self.assertIsNone(found.headers.get("etag"))
            found = await client.get("/304")
            self.assertEqual(
                (found.status, found.headers.get("etag"), found.body), (304, '"a"', b"")
            )
            found = await client.get("/302?detail=/login")
            self.assertEqual((found.status, found.headers.get("location")), (302, "/login"))

    async def test_path_parameters_have_types_and_go_both_ways(self) -> None:
        app = self.app(
            "GET /i/{x:int}", "GET /i/{x}", "GET /i/all", "GET /f/{x:float}/end", "GET /f/{x:date}",
            "GET /u/{x:uuid}", "GET /s/{a:str}/{b}/*", "POST /u/{x:uuid}",
        )  # fmt: skip
        number = "12345678-90ab-cdef-1234-567890abcdef"
        table: dict[str, Any] = {
            "/i/7": 7, "/i/-07": -7, "/i/7x": "7x", "/i/٣": "٣", "/i/1_0": "1_0",
            f"/i/{'9' * 2000}": "9" * 2000, "/f/2.50/end": 2.5, "/f/3/end": 3.0, "/f/1e9/end": None,
            f"/f/{'9' * 400}/end": None, "/f/2024-02-29": "2024-02-29", "/f/2023-02-29": None,
            "/f/20240229": None, f"/u/{number.upper()}": number, f"/u/{{{number}}}": None,
        }  # fmt: skip
        async with TestClient(app) as client:
            for path, value in table.items():
                with self.subTest(path):
                    found = await client.get(path)
                    self.assertEqual(found.status, 404 if value is None else 200)
                    if value is not None:
                        self.assertEqual(found.json()[1], {"x": value})
            self.assertEqual((await client.put(f"/u/{number}")).status, 405)
            self.assertEqual((await client.put("/u/1")).status, 404)

        async def user(c: Context, w: Writer) -> None:
            w.json([c.req.params, c.req.tail])

        async def files(c: Context, w: Writer) -> None:
            w.json([c.req.params, c.req.tail])

        shop, app = Router(), Stario()
        shop.get("/{id:int}/café/{name}", user, lambda inner: inner)
        shop.post("/{id:int}/café/{name}", user)
        app.mount("/shop", shop)
        app.get("/files/*", files)
        where = app.url("user", id=3, name="a/b é?")
        self.assertEqual(where, "/shop/3/caf%C3%A9/a%2Fb%20%C3%A9%3F")
        async with TestClient(app) as client:
            found = (await client.get(where)).json()
            self.assertEqual(found, [{"id": 3, "name": "a/b é?"}, ""])
            found = (await client.get(app.url("files", tail="a/b c"))).json()
            self.assertEqual(found, [{}, "a/b c"])
        wrong: list[dict[str, Any]] = [
            {"id": 3}, {"id": "x", "name": "y"}, {"id": 3, "name": ""},
            {"id": 1, "name": "n", "b": 2},
        ]  # fmt: skip
        for params in wrong:
            with self.subTest(params), self.assertRaises(StarioError):
                app.url("user", **params)
        app.get("/other", user)
        for name in ("user", "nobody"):
            with self.subTest(name), self.assertRaisesRegex(StarioError, name):
                app.url(name)

    async def test_what_cannot_work_is_refused_where_it_is_added(self) -> None:
        class Page:
            async def __call__(self, c: Context, w: Writer) -> None: ...

            async def shown(self, c: Context, w: Writer, *, big: bool = False) -> None: ...

            def plain(self, c: Context, w: Writer) -> None: ...

        async def page(c: Context, w: Writer) -> None: ...

        async def rows(c: Context, w: Writer) -> Any:
            yield 1

        async def one(c: Context) -> None: ...

        async def three(c: Context, w: Writer, more: int) -> None: ...

        @functools.wraps(page)
        def wrapped(c: Context, w: Writer) -> Any:
            return page(c, w)

        fine = [page, Page(), Page().shown, functools.partial(three, more=1), wrapped]
        for handler in [*fine, lambda c, w: page(c, w)]:
            Stario().get("/", handler)  # type: ignore[arg-type]
        called = page(None, None)  # type: ignore[arg-type]
        handlers: list[Any] = [Page().plain, rows, one, three, Page, called, None, "page"]
        for handler in handlers:
            with self.subTest(handler), self.assertRaises(StarioError):
                Stario().get("/", handler)
        paths: list[Any] = [
            "/<id>", "/a/:id", "/x<y", "/{id:path}", "/a?b=1", "/a#b", "/{id", None, page,
        ]  # fmt: skip
        for path in paths:
            with self.subTest(path), self.assertRaises(StarioError):
                Stario().get(path, page)

        def forgets(handler: Any) -> Any:
            """No `return`."""

        with self.assertRaisesRegex(StarioError, "forgets"):
            Stario().get("/", page, forgets)
        with self.assertRaisesRegex(StarioError, "forgets"):
            Stario().use(forgets)
        kinds: list[Any] = [500, "KeyError", KeyError("x"), SystemExit, int]
        for kind in kinds:
            with self.subTest(kind), self.assertRaises(StarioError):
                Stario().on_error(kind, lambda c, w, exc: None)
        with self.assertRaises(StarioError):
            Stario().on_error(KeyError, lambda c, w: None)  # type: ignore[misc,arg-type]

    async def test_hosts_choose_routers_and_the_app_answers_for_the_rest(self) -> None:
        app = self.app("GET /main")

        def router(name: str) -> Router:
            made = Router()

            async def handler(c: Context, w: Writer) -> None:
                w.json([name, c.req.subhost])

            made.get("/", handler)
            return made

        app.host("*.example.com", router("any"))
        app.host("api.example.com", router("api"))
        app.host("*.deep.example.com", router("deep"))
        async with TestClient(app) as client:
            for host, expected in [
                ("API.example.com:80", ["api", ""]),
                ("x.example.com", ["any", "x"]),
                ("a.b.deep.example.com", ["deep", "a.b"]),
            ]:
                answer = await client.get("/", headers={"host": host})
                self.assertEqual(answer.json(), expected)
            self.assertEqual((await client.get("/", headers={"host": "example.com"})).status, 404)
            answer = await client.get("/main", headers={"host": "x.example.com"})
            self.assertEqual(answer.json(), ["GET /main", {}, "", ""])

    async def test_an_answer_that_was_forgotten_is_204_and_says_so_in_the_span(self) -> None:
        out = io.StringIO()
        tracer = JsonTracer(out)
        app = Stario(tracer)

        async def silent(c: Context, w: Writer) -> None:
            pass

        app.get("/", silent)
        async with TestClient(app) as client:
            self.assertEqual((await client.get("/")).status, 204)
        tracer._close()
        self.assertEqual(json.loads(out.getvalue())["events"][0]["name"], "no answer")

    async def test_an_unhandled_exception_shows_nothing_to_the_client_and_all_to_the_developer(
        self,
    ) -> None:
        out = io.StringIO()
        tracer = JsonTracer(out)
        app = Stario(tracer)

        async def fail(c: Context, w: Writer) -> None:
            raise RuntimeError("secret")

        app.get("/", fail)
        async with TestClient(app, raise_errors=False) as client:
            answer = await client.get("/")
        self.assertEqual((answer.status, answer.text), (500, "Internal Server Error"))
        tracer._close()
        span = json.loads(out.getvalue())
        self.assertEqual(span["status"]["message"], "RuntimeError: secret")
        self.assertIn("in fail", span["events"][0]["attributes"]["exception.stacktrace"])


# -- 9. HTTP/1.1


class TestRequestLine(HttpTest):
    async def test_what_can_be_read_in_two_ways_is_refused(self) -> None:
        """RFC 9112, section 3."""
        lines = {
            "GET  / HTTP/1.1": 400,
            " GET / HTTP/1.1": 400,
            "GET / HTTP/1.1 ": 400,
            "GET\t/\tHTTP/1.1": 400,
            "GET /a b HTTP/1.1": 400,
            "GET /\x7f HTTP/1.1": 400,
            "GET /\xe4 HTTP/1.1": 400,
            "GET /a\rb HTTP/1.1": 400,
            "GET /a\0b HTTP/1.1": 400,
            "GET /#fragment HTTP/1.1": 400,
            "GET /": 400,
            "GET HTTP/1.1": 400,
            "G(T / HTTP/1.1": 400,
            "GET / http/1.1": 400,
            "GET / HTTP/1.10": 400,
            "GET / HTTP/11": 400,
            "GET / HTTP/ 1.1": 400,
            "GET / HTTP/2.0": 505,
            "GET / HTTP/0.9": 505,
            "GET /a%2 HTTP/1.1": 400,
            "GET /%gg HTTP/1.1": 400,
            "GET /%ff HTTP/1.1": 400,
        }
        await self.check_all_refused(
            {f"{line}\r\n{HOST}\r\n": status for line, status in lines.items()}
        )

    async def test_a_path_that_cannot_be_decoded_is_refused_whatever_its_body(self) -> None:
        """RFC 3986, section 2.1: a body that is still on its way does not keep the answer back."""
        async with echo_app().running() as server:
            for path in ("/%zz", "/%ff"):
                for body in ("", "ab", "abcde"):
                    with self.subTest(path, body=body):
                        peer = await Peer.connect(server.port)
                        await peer.send(
                            f"POST {path} HTTP/1.1\r\n{HOST}Content-Length: 5\r\n\r\n{body}"
                        )
                        self.assertEqual((await within(peer.answer())).status, 400)
                        self.assertEqual(await within(peer.rest()), b"")
                        await peer.close()

    async def test_line_breaks_other_than_CRLF_are_refused(self) -> None:
        """RFC 9112, section 2.2: what one server takes for a line's end, the next one may not."""
        heads = [
            f"GET / HTTP/1.1\n{HOST}\r\n",
            "GET / HTTP/1.1\r\nHost: test\n\r\n",
            "GET / HTTP/1.1\r\nHost: test\r\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: test\r\n\n",
            "GET / HTTP/1.1\nHost: test\n\n",
            "GET / HTTP/1.1\rHost: test\r\r",
            "GET / HTTP/1.1\r\nHost: test\r\nX: a\rY: b\r\n\r\n",
        ]
        await self.check_all_refused(dict.fromkeys(heads, 400))

    async def test_empty_lines_before_a_request_are_tolerated(self) -> None:
        """RFC 9112, section 2.2."""
        async with connected(echo_app()) as peer:
            await peer.send("\r\n\r\nGET /1 HTTP/1.1\r\nHost: a\r\n\r\n\r", "\nGET /2 HTTP/1.1\r\n")
            await peer.send("Host: a\r\n\r\n")
            for path in ("/1", "/2"):
                self.assertEqual(understood(await within(peer.answer()))[1], path)

    async def test_each_target_form_is_understood(self) -> None:
        """RFC 9112, section 3.2; what an absolute target says goes before Host (3.2.2)."""
        forms = {
            "GET /a%20b?c#".rstrip("#"): ["GET", "/a b", "test"],
            "GET http://Other:81/x?y": ["GET", "/x", "other"],
            "GET HTTPS://other": ["GET", "/", "other"],
            "GET http://other?q=/x": ["GET", "/", "other"],
            "GET http://[::1]:80/x": ["GET", "/x", "[::1]"],
        }
        async with connected(echo_app()) as peer:
            for form, wanted in forms.items():
                with self.subTest(form):
                    await peer.send(f"{form} HTTP/1.1\r\n{HOST}\r\n")
                    self.assertEqual(understood(await within(peer.answer()))[:3], wanted)
            await peer.send(f"OPTIONS * HTTP/1.1\r\n{HOST}\r\n")
            answer = await within(peer.answer())
            self.assertEqual(answer.status, 204)
            self.assertLessEqual({"GET", "QUERY"}, set(answer.headers["allow"].split(", ")))

    async def test_other_targets_are_refused(self) -> None:
        """RFC 9112, section 3.2: no relative path, user, other scheme, empty host; no proxy."""
        forms = {
            "GET *": 400,
            "GET x": 400,
            "GET ftp://other/": 400,
            "GET http://": 400,
            "GET http:///x": 400,
            "GET http://:80/x": 400,
            "GET http://user@other/": 400,
            "GET http://a,b c/": 400,
            "GET http://other/#x": 400,
            "GET http://a|b/": 400,
            "CONNECT other:443": 501,
        }
        await self.check_all_refused(
            {f"{form} HTTP/1.1\r\n{HOST}\r\n": status for form, status in forms.items()}
        )


class TestFields(HttpTest):
    async def test_malformed_fields_are_refused(self) -> None:
        """RFC 9112, section 5."""
        fields = [
            "X : 1",  # a blank before the colon (5.1)
            "X\t: 1",
            " X: 1",
            "X: 1\r\n folded",  # obs-fold (5.2)
            "X: 1\r\n\tfolded",
            "X",
            ": 1",
            "X(: 1",
            "X\xe4: 1",
            "X: a\0b",
            "X: a\x0bb",
            "X: a\x7fb",
        ]
        lines = [f"{HOST}{given}\r\n" for given in fields]
        lines += [f"{given}\r\n{HOST}" for given in fields]  # as the first one, too
        await self.check_all_refused({f"GET / HTTP/1.1\r\n{line}\r\n": 400 for line in lines})

    async def test_exactly_one_valid_host_is_required(self) -> None:
        """RFC 9112, section 3.2."""
        hosts = [
            "",
            "Host: a\r\nHost: a\r\n",
            "Host: a\r\nhost: b\r\n",
            "Host: a b\r\n",
            "Host: a/b\r\n",
            "Host: a@b\r\n",
            "Host: a\\b\r\n",
            "Host: a:b\r\n",
            "Host: [a\r\n",
            "Host: ::1\r\n",
        ]
        await self.check_all_refused({f"GET / HTTP/1.1\r\n{host}\r\n": 400 for host in hosts})
        async with connected(echo_app()) as peer:
            for given, host in {"A.Example:80": "a.example", "[::1]:8000": "[::1]", "": ""}.items():
                with self.subTest(given):
                    await peer.send(f"GET / HTTP/1.1\r\nHost: {given}\r\n\r\n")
                    self.assertEqual(understood(await within(peer.answer()))[2], host)

    async def test_a_field_that_is_looked_up_is_what_all_of_them_say(self) -> None:
        """Whatever is asked for first, and whether the block has come before."""
        block = (
            f"{HOST}X-A: 1\r\nX: x-b: y\r\nx-a:\t2 \r\nX-AB: 3\r\nX-Empty:\r\n"
            "Cookie: a=\u20ac\r\nX-L: \xe4\r\nLast-Event-ID: \xff\r\n"
        )
        names = ["X-A", "cookie", "x-b", "X", "x: x-b", "\u20ac", "X-L", "last-event-id"]
        names += ["x-empty", "a\r\nx", "", "x-", "host"]
        heads: list[stario.Headers] = []

        async def keep(c: Context, w: Writer) -> None:
            heads.append(c.req.headers)
            w.empty()

        app = Stario()
        app.get("/", keep)
        line = block.replace("\u20ac", "\xe2\x82\xac").encode("latin-1")
        for name in names:
            async with connected(app) as peer:
                for _ in range(2):
                    await peer.send(b"GET / HTTP/1.1\r\n" + line + b"\r\n")
                    self.assertEqual((await within(peer.answer())).status, 204)
            for headers in heads:
                with self.subTest(name):
                    order = [name, *names]
                    found = {key: (headers.getlist(key), key in headers) for key in order}
                    split: dict[str, list[str]] = {}
                    for key, value in headers.items():
                        split.setdefault(key, []).append(value)
                    self.assertEqual(split["x-a"], ["1", "2"])
                    self.assertEqual(split["cookie"], ["a=\u20ac"])
                    for key in order:
                        values = split.get(key.lower(), [])
                        self.assertEqual(found[key], (values, key.lower() in split))
            heads.clear()

    async def test_names_are_caseless_and_values_are_stripped_latin_1(self) -> None:
        """RFC 9110, sections 5.1 and 5.5; RFC 9112, section 5."""

        async def show(c: Context, w: Writer) -> None:
            w.json([c.req.headers.get("X-A"), c.req.headers.getlist("x-b"), "x-c" in c.req.headers])

        app = Stario()
        app.get("/", show)
        async with connected(app) as peer:
            await peer.send(
                "GET / HTTP/1.1\r\nhOST: a\r\nx-a: \t\xe4 b \t\r\nX-B:1\r\nx-b: 2\r\n\r\n"
            )
            self.assertEqual((await within(peer.answer())).body, '["ä b",["1","2"],false]'.encode())

    async def test_fields_do_not_reach_the_next_request(self) -> None:
        """A header block that comes again is parsed once; what is not the same must not be."""

        async def show(c: Context, w: Writer) -> None:
            w.text(c.req.headers.get("x") or "none")

        app = Stario()
        app.get("/", show)
        async with connected(app) as peer:
            for fields, text in (
                ({"X": "1"}, "1"),
                ({"X": "1"}, "1"),
                ({"X": "2"}, "2"),
                ({}, "none"),
            ):
                self.assertEqual((await within(peer.get("/", **fields))).text, text)


class TestFraming(HttpTest):
    async def test_an_ambiguous_length_is_refused(self) -> None:
        """RFC 9112, sections 6.1 to 6.3: this is how requests are smuggled."""
        fields = [
            "Content-Length: 5\r\nContent-Length: 5",
            "Content-Length: 5\r\nContent-Length: 6",
            "Content-Length: 5, 5",
            "Content-Length: +5",
            "Content-Length: -5",
            "Content-Length: 5 5",
            "Content-Length: 0x5",
            "Content-Length: 5_0",
            "Content-Length: 5.0",
            "Content-Length: 5e0",
            "Content-Length:",
            "Content-Length: \xb2",
            f"Content-Length: {'9' * 19}",
            f"Content-Length: {'0' * 5000}5",
            "Content-Length: 5\r\nTransfer-Encoding: chunked",
            "Transfer-Encoding: chunked\r\nContent-Length: 5",
            "Transfer-Encoding: identity",
            "Transfer-Encoding: gzip, chunked",
            "Transfer-Encoding: chunked, chunked",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
            "Transfer-Encoding: chunked;a=b",
            "Transfer-Encoding: xchunked",
            "Transfer-Encoding: \x0bchunked",
            'Transfer-Encoding: "chunked"',
            "Transfer-Encoding:",
            "Transfer-Encoding : chunked",
            "Transfer-Encoding:\r\n chunked",
        ]
        requests = [f"POST / HTTP/1.1\r\n{HOST}{given}\r\n\r\nhello" for given in fields]
        # HTTP/1.0 has no Transfer-Encoding.
        requests.append(f"POST / HTTP/1.0\r\n{HOST}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
        await self.check_all_refused(dict.fromkeys(requests, 400))

    async def test_a_body_ends_where_its_length_says(self) -> None:
        """RFC 9112, section 6.3: what follows is the next request, what looks like one is not."""
        async with connected(echo_app()) as peer:
            inner = "GET /inner HTTP/1.1\r\nHost: x\r\n\r\n"
            await peer.send(
                f"POST /1 HTTP/1.1\r\n{HOST}Content-Length: {len(inner)}\r\n\r\n{inner}"
                f"GET /2 HTTP/1.1\r\n{HOST}Content-Length: 0\r\n\r\n"
                f"POST /3 HTTP/1.1\r\n{HOST}Transfer-Encoding: Chunked\r\n\r\n"
                f"{len(inner):X}\r\n{inner}\r\n0\r\n\r\n"
                f"GET /4 HTTP/1.1\r\n{HOST}\r\n"
            )
            for path, body in (("/1", inner), ("/2", ""), ("/3", inner), ("/4", "")):
                found = understood(await within(peer.answer()))
                self.assertEqual((found[1], found[3]), (path, body))

    async def test_malformed_chunks_are_refused(self) -> None:
        """RFC 9112, section 7.1."""
        bodies = [
            "+5\r\nhello\r\n0\r\n\r\n",
            "-5\r\nhello\r\n0\r\n\r\n",
            "0x5\r\nhello\r\n0\r\n\r\n",
            "0_5\r\nhello\r\n0\r\n\r\n",
            " 5\r\nhello\r\n0\r\n\r\n",
            "5 \r\nhello\r\n0\r\n\r\n",
            "g\r\nhello\r\n0\r\n\r\n",
            "\r\nhello\r\n0\r\n\r\n",
            ";a\r\nhello\r\n0\r\n\r\n",
            "5\nhello\r\n0\r\n\r\n",
            "5\rhello\r\n0\r\n\r\n",
            "5;a\nb\r\nhello\r\n0\r\n\r\n",
            "5;a\0b\r\nhello\r\n0\r\n\r\n",
            "5;a\rb\r\nhello\r\n0\r\n\r\n",
            "5\r\nhello!\r\n0\r\n\r\n",
            "5\r\nhello0\r\n\r\n",
            "5\r\nhello3\r\nabc\r\n\r\n0\r\n\r\n",
            "5\r\nhello\n0\r\n\r\n",
            "5\r\nhello\r0\r\n\r\n",
            "5\r\nhello\r\r\n0\r\n\r\n",
            "10000000000000000\r\nhello\r\n0\r\n\r\n",
            "5\r\nhello\r\n0\r\nbad trailer\r\n\r\n",
            "5\r\nhello\r\n0\r\nX : y\r\n\r\n",
            "5\r\nhello\r\n0\r\ncontent-length: 5\r\n\r\n",
            "5\r\nhello\r\n0\r\nX: y\r\nTransfer-Encoding: chunked\r\n\r\n",
            "5\r\nhello\r\n0\r\nX: a\nY: b\r\n\r\n",
            "5\r\nhello\r\n0\r\nX: a\r\n folded\r\n\r\n",
        ]
        async with echo_app().running() as server:
            for body in bodies:
                for sent in ([body], list(body)):
                    with self.subTest(body, pieces=len(sent)):
                        peer = await Peer.connect(server.port)
                        await peer.send(
                            f"POST / HTTP/1.1\r\n{HOST}Transfer-Encoding: chunked\r\n\r\n"
                        )
                        for piece in sent:
                            await peer.send(piece)
                        await peer.send(NEXT)
                        self.assertEqual((await within(peer.answer())).status, 400)
                        self.assertEqual(await within(peer.rest()), b"")
                        await peer.close()

    async def test_chunks_may_be_cut_anywhere(self) -> None:
        """RFC 9112, section 7.1; extensions (7.1.1) and trailers (7.1.2) are read and forgotten."""
        body = '3;a="b"\r\nabc\r\n0A ; x\r\n0123456789\r\n1\r\n\r\r\n'
        body += "000\r\nTrailer: x\r\nMore:\r\n\r\n"
        async with connected(echo_app()) as peer:
            for size in (1, 2, 3, 7, len(body)):
                with self.subTest(size=size):
                    await peer.send(f"POST / HTTP/1.1\r\n{HOST}Transfer-Encoding: chunked\r\n\r\n")
                    for start in range(0, len(body), size):
                        await peer.send(body[start : start + size])
                        await asyncio.sleep(0)
                    self.assertEqual(understood(await within(peer.answer()))[3], "abc0123456789\r")

    async def test_many_tiny_chunks_make_one_body(self) -> None:
        """RFC 9112, section 7.1."""
        decoder = stario._BodyDecoder
        steps = mock.patch.object(
            decoder, "_check_line", autospec=True, side_effect=decoder._check_line
        )
        async with connected(echo_app()) as peer:
            await peer.send(f"POST / HTTP/1.1\r\n{HOST}Transfer-Encoding: chunked\r\n\r\n")
            with steps as counted:
                await peer.send("1\r\nx\r\n" * 50_000, "0\r\n\r\n")
                self.assertEqual(understood(await within(peer.answer()))[3], "x" * 50_000)
            self.assertLess(counted.call_count, 1000)  # none for a chunk that is here whole

    async def test_a_read_that_was_cancelled_goes_on(self) -> None:
        """On a socket, in the test client and under ASGI, whoever reads."""
        interrupted = asyncio.Event()

        async def read(c: Context, w: Writer) -> None:
            async def form() -> str | None:
                found = await c.req.form()
                file = found.file("a")
                return file.data.decode() if file else found.get("a")

            async def signals() -> Any:
                return (await c.signals())["a"]

            kind = c.req.headers.get("content-type") or ""
            work = form if "form" in kind else signals
            while True:
                try:
                    async with asyncio.timeout(0):
                        text = await work()
                    break
                except TimeoutError:
                    interrupted.set()
            gone = self.assertRaisesRegex(StarioError, "comes only once")
            with gone if "multi" in kind else contextlib.nullcontext():
                await c.req.body()
            w.text(str(text))

        app = Stario()
        app.post("/", read)
        text = "0123456789" * 30_000
        file = 'Content-Disposition: form-data; name="a"; filename="f"\r\n\r\n'
        async with app.running() as server:
            for kind, body in [
                ("application/json", f'{{"a": "{text}"}}'),
                ("application/x-www-form-urlencoded", f"a={text}"),
                ("multipart/form-data; boundary=b", f"--b\r\n{file}{text}\r\n--b--\r\n"),
            ]:
                with self.subTest(kind):
                    head = f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
                    pieces = [body[:100_000], body[100_000:]]
                    peer = await Peer.connect(server.port)
                    await peer.send(f"POST / HTTP/1.1\r\n{HOST}{head}")
                    for piece in pieces:
                        await within(interrupted.wait())  # at first, nothing has come
                        interrupted.clear()
                        await peer.send(piece)
                    self.assertEqual((await within(peer.answer())).body.decode(), text)
                    await peer.close()
                    fields = {"content-type": kind}
                    interrupted.clear()
                    async with TestClient(app) as client:
                        answer = await client.post("/", body=body.encode(), headers=fields)
                    self.assertEqual((answer.text, interrupted.is_set()), (text, True))
                    interrupted.clear()
                    asked = AsgiServer(
                        app, "/", *(piece.encode() for piece in pieces),
                        method="POST", headers=[(b"content-type", kind.encode())],
                    )  # fmt: skip
                    await within(asked.task)
                    self.assertEqual((asked.body.decode(), interrupted.is_set()), (text, True))

    async def test_extension_and_trailer_floods_are_refused(self) -> None:
        """RFC 9112, section 7.1.1: a limit on the total, in one chunk or in many; 431."""
        floods = [
            "1;" + "x" * 5000,
            "1;" + "x" * 5000 + "\r\na\r\n",
            f"1;{'x' * 50}\r\na\r\n" * 100,
            "0\r\n" + "X: y\r\n" * 2000,
            "0\r\nX: " + "y" * 5000,
        ]
        async with echo_app().running(max_header_bytes=4096) as server:
            for flood in floods:
                with self.subTest(flood[:10]):
                    peer = await Peer.connect(server.port)
                    await peer.send(f"POST / HTTP/1.1\r\n{HOST}Transfer-Encoding: chunked\r\n\r\n")
                    await peer.send(flood)
                    self.assertEqual((await within(peer.answer())).status, 431)
                    self.assertEqual(await within(peer.rest()), b"")
                    await peer.close()

    async def test_the_same_bytes_read_the_same_however_they_are_cut(self) -> None:
        """Findings of the fuzzer: faults that were seen early or late, by where the cuts were."""
        requests = [
            f"POST /1 HTTP/1.1\r\n{HOST}Content-Length: 3\r\n\r\nab\r\n",
            f"PUT / HTTP/1.1\r\n{HOST}Transfer-Encoding: chunked\r\n\r\n0\r\nMore: y\n\r\r\n",
        ]
        for request in requests:
            found = []
            for pieces in ([request], list(request)):
                async with connected(echo_app()) as peer:
                    for piece in pieces:
                        await peer.send(piece)
                    peer.writer.write_eof()
                    out = await within(peer.rest())
                    found.append(re.findall(rb"HTTP/1.1 \d+", out))
            with self.subTest(request):
                self.assertEqual(found[0], found[1])


class TestConnections(HttpTest):
    async def test_a_connection_stays_open_unless_somebody_says_close(self) -> None:
        """RFC 9112, section 9.3; options are a list, without regard to case (RFC 9110, 7.6.1)."""
        kept = {
            ("HTTP/1.1", ""): True,
            ("HTTP/1.1", "Connection: keep-alive\r\n"): True,
            ("HTTP/1.1", "Connection: close\r\n"): False,
            ("HTTP/1.1", "Connection: Keep-Alive,\tClose\r\n"): False,
            ("HTTP/1.1", "Connection: x\r\nConnection: close\r\n"): False,
            ("HTTP/1.1", "Connection: xclose, closed\r\n"): True,
            ("HTTP/1.0", ""): False,
            ("HTTP/1.0", "Connection: keep-alive\r\n"): True,
            ("HTTP/1.0", "Connection: close, keep-alive\r\n"): False,
        }
        async with echo_app().running() as server:
            for (version, fields), stays in kept.items():
                with self.subTest(version, fields=fields):
                    peer = await Peer.connect(server.port)
                    request = f"GET / {version}\r\n{HOST}{fields}\r\n"
                    await peer.send(request)
                    answer = await within(peer.answer())
                    said = answer.headers.get("connection")
                    wanted = ("keep-alive" if version == "HTTP/1.0" else None) if stays else "close"
                    self.assertEqual(said, wanted)
                    if stays:
                        await peer.send(request)
                        self.assertEqual((await within(peer.answer())).status, 200)
                    else:
                        self.assertEqual(await within(peer.rest()), b"")
                    await peer.close()

    async def test_nothing_is_read_behind_a_request_that_closes(self) -> None:
        """RFC 9112, section 9.6; also when the client has closed its side meanwhile."""
        seen: list[str] = []
        go_on = asyncio.Event()

        async def note(c: Context, w: Writer) -> None:
            seen.append(c.req.path)
            if c.req.path == "/1":
                await go_on.wait()
            w.text("ok")

        app = Stario()
        app.get("/*", note)
        async with connected(app) as peer:
            await peer.send(
                f"GET /1 HTTP/1.1\r\n{HOST}\r\n"
                f"GET /2 HTTP/1.1\r\n{HOST}Connection: close\r\n\r\n"
                f"GET /3 HTTP/1.1\r\n{HOST}\r\n"
            )
            peer.writer.write_eof()
            await until(lambda: seen)
            go_on.set()
            self.assertEqual((await within(peer.rest())).count(b"HTTP/1.1 200"), 2)
        self.assertEqual(seen, ["/1", "/2"])

    async def test_pipelined_requests_are_answered_in_order(self) -> None:
        """RFC 9112, section 9.3.2; one at a time, however long the first one takes."""
        under_way = most = 0

        async def slow_first(c: Context, w: Writer) -> None:
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            for _ in range(20 if c.req.path == "/0" else 0):
                await asyncio.sleep(0)
            under_way -= 1
            w.text(c.req.path)

        app = Stario()
        app.get("/*", slow_first)
        async with connected(app) as peer:
            await peer.send("".join(f"GET /{i} HTTP/1.1\r\n{HOST}\r\n" for i in range(2000)))
            for i in range(2000):
                self.assertEqual((await within(peer.answer())).text, f"/{i}")
        self.assertEqual(most, 1)

    async def test_a_thousand_requests_at_once_leave_others_their_turn(self) -> None:
        """However many come in one piece: others are answered before the last of them."""
        order: list[str] = []

        async def note(c: Context, w: Writer) -> None:
            order.append(c.req.path)
            w.empty()

        app = Stario()
        app.get("/*", note)
        async with app.running() as server:
            other = await Peer.connect(server.port)
            await within(other.get("/warm"))
            (connection,) = connections_of(server)
            many = await Peer.connect(server.port)
            await within(many.get("/warm"))
            (busy,) = set(connections_of(server)) - {connection}
            # Both in one turn of the loop, as when the sockets become readable together.
            busy.data_received(f"GET /many HTTP/1.1\r\n{HOST}\r\n".encode() * 1000)
            connection.data_received(f"GET /other HTTP/1.1\r\n{HOST}\r\n".encode())
            await within(other.answer())
            for _ in range(1000):
                self.assertEqual((await within(many.answer())).status, 204)
            self.assertLess(order.index("/other"), 200)
            self.assertEqual(order.count("/many"), 1000)
            await other.close()
            await many.close()

    async def test_pipelined_requests_before_the_end_of_a_client_are_all_answered(self) -> None:
        """RFC 9112, section 9.6: also when they are more than one turn's worth."""
        async with connected(echo_app()) as peer:
            await peer.send(f"GET / HTTP/1.1\r\n{HOST}\r\n" * 300)
            peer.writer.write_eof()
            self.assertEqual((await within(peer.rest())).count(b"HTTP/1.1 200"), 300)

    async def test_what_is_queued_behind_a_request_is_bounded(self) -> None:
        """RFC 9112, section 9.3.2: the client has to wait, and loses nothing."""
        go_on = asyncio.Event()

        async def wait(c: Context, w: Writer) -> None:
            await go_on.wait()
            w.text(c.req.path)

        app = Stario()
        app.get("/*", wait)
        async with app.running() as server:
            peer = await Peer.connect(server.port)
            padding = "x" * 8000
            requests = [f"GET /{i} HTTP/1.1\r\n{HOST}X: {padding}\r\n\r\n" for i in range(500)]
            sending = asyncio.ensure_future(peer.send(*requests))
            await until(lambda: [c for c in connections_of(server) if c._paused_reading])
            (connection,) = connections_of(server)
            self.assertLess(len(connection._reader.buffer), 512 * 1024)
            go_on.set()
            for i in range(500):
                self.assertEqual((await within(peer.answer())).text, f"/{i}")
            await within(sending)
            await peer.close()

    async def test_answers_that_nobody_takes_hold_up_later_requests(self) -> None:
        """A client that only sends gets no more than a bounded number of answers made for it."""
        made = 0

        async def big(c: Context, w: Writer) -> None:
            nonlocal made
            made += 1
            w.respond(bytes(100_000), "application/octet-stream")

        app = Stario()
        app.get("/", big)
        async with app.running() as server:
            peer = await Peer.connect(server.port)
            stop_reading(peer)
            await peer.send(f"GET / HTTP/1.1\r\n{HOST}\r\n" * 1000)
            await until(lambda: [c for c in connections_of(server) if c._paused_writing])
            self.assertLess(made, 500)
            read_again(peer)
            for _ in range(1000):
                await within(peer.answer())
            self.assertEqual(made, 1000)
            await peer.close()

    async def test_context_variables_do_not_leak_into_the_next_request(self) -> None:
        variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="clean")

        async def leave(c: Context, w: Writer) -> None:
            w.text(variable.get())
            variable.set("left behind")

        app = Stario()
        app.get("/", leave)
        async with connected(app) as peer:
            await peer.send(f"GET / HTTP/1.1\r\n{HOST}\r\n" * 3)
            for _ in range(3):
                self.assertEqual((await within(peer.answer())).text, "clean")

    async def test_an_unread_body_is_drained_if_it_is_small(self) -> None:
        """RFC 9112, section 9.3: else the connection closes; never is it taken for a request."""

        async def ignore(c: Context, w: Writer) -> None:
            w.text("ignored")

        app = Stario()
        app.post("/", ignore)
        async with app.running() as server:
            for size, stays in ((10, True), (200_000, True), (2_000_000, False)):
                for chunked in (False, True):
                    with self.subTest(size=size, chunked=chunked):
                        peer = await Peer.connect(server.port)
                        framing = (
                            "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
                        )
                        head = f"POST / HTTP/1.1\r\n{HOST}{framing}\r\n\r\n"
                        unit = NEXT.encode()
                        data = (unit * (size // len(unit) + 1))[:size]
                        if chunked:
                            data = b"%x\r\n%b\r\n0\r\n\r\n" % (size, data)
                        await peer.send(head, data)
                        answer = await within(peer.answer())
                        self.assertEqual(answer.text, "ignored")
                        if stays:
                            await peer.send(head, data)
                            self.assertEqual((await within(peer.answer())).text, "ignored")
                        else:
                            self.assertEqual(await within(peer.rest()), b"")
                        if not chunked:
                            self.assertEqual("connection" in answer.headers, not stays)
                        await peer.close()

    async def test_a_body_that_nobody_wants_is_not_read_for_ever(self) -> None:
        """While a handler that has read a part of it is still answering, the client must wait."""
        go_on = asyncio.Event()

        async def read_some(c: Context, w: Writer) -> None:
            async for _ in c.req.stream():
                break
            await go_on.wait()
            w.text("enough")

        app = Stario()
        app.post("/", read_some)
        async with app.running() as server:
            peer = await Peer.connect(server.port)
            await peer.send(
                f"POST / HTTP/1.1\r\n{HOST}Content-Length: 10000000\r\n\r\n", bytes(65536)
            )
            sending = asyncio.ensure_future(peer.send(bytes(9_000_000)))
            await until(lambda: connections_of(server))
            (connection,) = connections_of(server)
            await until(lambda: connection._paused_reading and connection._body.dropped)
            self.assertLess(connection._body.dropped, 2_000_000)
            go_on.set()
            self.assertEqual((await within(peer.answer())).text, "enough")
            await within(sending)
            await peer.close()

    async def test_a_task_that_reads_on_after_the_handler_gets_no_half_body(self) -> None:
        reading: list[asyncio.Task[bytes]] = []

        async def leave(c: Context, w: Writer) -> None:
            reading.append(asyncio.create_task(c.req.body()))
            await asyncio.sleep(0)
            w.empty()

        app = Stario()
        app.post("/", leave)
        async with connected(app) as peer:
            await peer.send(f"POST / HTTP/1.1\r\n{HOST}Content-Length: 5\r\n\r\nab")
            self.assertEqual((await within(peer.answer())).status, 204)
            await peer.send("cde")
            with self.assertRaisesRegex(StarioError, "before it ends"):
                await within(reading[0])

    async def test_a_body_behind_a_slow_request_is_not_late(self) -> None:
        """While reading is paused the client cannot send: its time does not pass."""
        answer_first, read_second = asyncio.Event(), asyncio.Event()

        async def slow(c: Context, w: Writer) -> None:
            await answer_first.wait()
            w.empty()

        async def read(c: Context, w: Writer) -> None:
            await read_second.wait()
            w.text(str(len(await c.req.body())))

        app = Stario()
        app.get("/", slow)
        app.post("/", read)
        async with app.running(body_timeout=0.2) as server:
            peer = await Peer.connect(server.port)
            await peer.send(GET, f"POST / HTTP/1.1\r\n{HOST}Content-Length: 1000000\r\n\r\n")
            sending = asyncio.ensure_future(peer.send(bytes(1_000_000)))
            await until(lambda: [c for c in connections_of(server) if c._paused_reading])
            answer_first.set()
            self.assertEqual((await within(peer.answer())).status, 204)
            (worker,) = server._workers
            start = worker.now
            await until(lambda: worker.now > start + 0.5)
            read_second.set()
            self.assertEqual((await within(peer.answer())).text, "1000000")
            await within(sending)
            await peer.close()

    async def test_continue_is_sent_when_the_body_is_asked_for(self) -> None:
        """RFC 9110, section 10.1.1."""
        head = f"POST / HTTP/1.1\r\n{HOST}Content-Length: 3\r\nExpect: 100-Continue\r\n\r\n"
        async with connected(echo_app()) as peer:
            for _ in range(2):
                await peer.send(head)
                self.assertEqual((await within(peer.head())).status, 100)
                await peer.send("abc")
                self.assertEqual(understood(await within(peer.answer()))[3], "abc")

    async def test_continue_is_not_sent_to_who_does_not_wait(self) -> None:
        """RFC 9110, section 10.1.1: without a body, or to HTTP/1.0."""
        async with connected(echo_app()) as peer:
            await peer.send(f"GET / HTTP/1.1\r\n{HOST}Expect: 100-continue\r\n\r\n")
            self.assertEqual((await within(peer.answer())).status, 200)
            await peer.send(
                f"POST / HTTP/1.0\r\n{HOST}Expect: 100-continue\r\nContent-Length: 3\r\n\r\n"
            )
            await peer.send("abc")
            self.assertEqual(understood(await within(peer.answer()))[3], "abc")

    async def test_an_answer_may_come_instead_of_continue(self) -> None:
        """RFC 9110, section 10.1.1: who has been told so may send no body, so this closes."""

        async def refuse(c: Context, w: Writer) -> None:
            raise HttpException(403)

        async def answer_first(c: Context, w: Writer) -> None:
            w.write(b"early")
            with contextlib.suppress(ClientDisconnected):
                await c.req.body()

        app = Stario(max_body=100)
        app.post("/403", refuse)
        app.post("/413", echo)
        app.post("/200", answer_first)
        async with app.running() as server:
            for status, length in ((403, 5), (413, 101), (200, 5)):
                with self.subTest(status):
                    peer = await Peer.connect(server.port)
                    await peer.send(
                        f"POST /{status} HTTP/1.1\r\n{HOST}Content-Length: {length}\r\n"
                    )
                    await peer.send("Expect: 100-continue\r\n\r\n")
                    head = await within(peer.head())
                    self.assertEqual((head.status, head.headers["connection"]), (status, "close"))
                    if status == 200:
                        peer.writer.write_eof()
                    self.assertNotIn(b"100 Continue", await within(peer.rest()))
                    await peer.close()

    async def test_other_expectations_are_refused(self) -> None:
        """RFC 9110, section 10.1.1: 417."""
        head = f"GET / HTTP/1.1\r\n{HOST}Expect: "
        others = ("x", "100-continue, x", "100-continue;x")
        await self.check_all_refused({f"{head}{other}\r\n\r\n": 417 for other in others})

    async def test_http_1_0_gets_an_answer_that_it_can_read(self) -> None:
        """RFC 9112, section 6.3: without chunks, the end of the connection ends the body."""

        async def stream(c: Context, w: Writer) -> None:
            w.write(b"a").write(b"b")

        app = Stario()
        app.get("/", stream)
        async with connected(app) as peer:
            await peer.send("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            answer = await within(peer.answer())
            self.assertEqual((answer.headers["connection"], answer.body), ("close", b"ab"))
            self.assertNotIn("transfer-encoding", answer.headers)

    async def test_a_client_that_has_closed_its_side_gets_its_answers(self) -> None:
        """RFC 9112, section 9.6, and TCP: half-closed is not gone."""

        async def later(c: Context, w: Writer) -> None:
            await asyncio.sleep(0.01)
            w.text(c.req.path)

        app = Stario()
        app.get("/*", later)
        async with connected(app) as peer:
            await peer.send(f"GET /1 HTTP/1.1\r\n{HOST}\r\nGET /2 HTTP/1.1\r\n{HOST}\r\nGET /3")
            peer.writer.write_eof()
            self.assertEqual([(await within(peer.answer())).text for _ in "12"], ["/1", "/2"])
            self.assertEqual(await within(peer.rest()), b"")

    async def test_a_request_that_is_cut_off_is_no_request(self) -> None:
        """RFC 9112, section 8: neither its handler's answer nor a 204 is sent for it."""
        spans = Spans()
        app = echo_app(tracer=spans)
        for framing, part in (
            ("Content-Length: 5", "abc"),
            ("Transfer-Encoding: chunked", "5\r\na"),
        ):
            with self.subTest(framing):
                async with connected(app) as peer:
                    await peer.send(f"POST / HTTP/1.1\r\n{HOST}{framing}\r\n\r\n{part}")
                    peer.writer.write_eof()
                    self.assertEqual(await within(peer.rest()), b"")
        events = [event.name for span in spans.ended for event in span.events]
        self.assertEqual(events, ["client.disconnected"] * 2)
        for span in spans.ended:
            self.assertNotIn("http.response.status_code", span.attributes)

    async def test_a_request_that_is_cut_off_behind_a_slow_one_keeps_no_handler(self) -> None:
        """RFC 9112, section 8: also where the client had gone before its handler began."""
        go_on = asyncio.Event()
        ended: list[str] = []

        async def slow(c: Context, w: Writer) -> None:
            await go_on.wait()
            w.text("slow")

        async def read(c: Context, w: Writer) -> None:
            try:
                await c.req.body()
            except ClientDisconnected:
                ended.append(c.req.path)
                raise

        app = Stario()
        app.get("/", slow)
        app.post("/*", read)
        parts = ["Content-Length: 5\r\n\r\nabc", "Content-Length: 5\r\n\r\n"]
        parts += [
            "Transfer-Encoding: chunked\r\n\r\n5\r\nabc",
            "Transfer-Encoding: chunked\r\n\r\n",
        ]
        async with app.running() as server:
            for number, part in enumerate(parts):
                peer = await Peer.connect(server.port)
                await peer.send(GET, f"POST /{number} HTTP/1.1\r\n{HOST}{part}")
                peer.writer.write_eof()
                await until(lambda: [c for c in connections_of(server) if c._eof])
                go_on.set()
                self.assertEqual((await within(peer.rest())).count(b"HTTP/1.1 "), 1)
                go_on.clear()
                await peer.close()
                await until(lambda: not connections_of(server))
        self.assertEqual(ended, ["/0", "/1", "/2", "/3"])

    async def test_a_cut_off_rest_of_an_unwanted_body_closes(self) -> None:
        """RFC 9112, section 8."""

        async def ignore(c: Context, w: Writer) -> None:
            w.empty()

        app = Stario()
        app.post("/", ignore)
        async with app.running() as server:
            peer = await Peer.connect(server.port)
            await peer.send(f"POST / HTTP/1.1\r\n{HOST}Content-Length: 5\r\n\r\nabc")
            self.assertEqual((await within(peer.answer())).status, 204)
            peer.writer.write_eof()
            self.assertEqual(await within(peer.rest()), b"")
            await until(lambda: not connections_of(server))
            await peer.close()

    async def test_a_handler_may_answer_before_it_reads_the_body(self) -> None:
        """Whether or not the answer ends the connection, as it does before a large body."""
        read: list[int] = []

        async def early(c: Context, w: Writer) -> None:
            w.text("accepted")
            read.append(len(await c.req.body()))

        app = Stario()
        app.post("/", early)
        async with app.running() as server:
            for option, size in (("keep-alive", 10), ("close", 10), ("keep-alive", 1_000_000)):
                with self.subTest(option, size=size):
                    peer = await Peer.connect(server.port)
                    head = f"POST / HTTP/1.1\r\n{HOST}Connection: {option}\r\n"
                    await peer.send(f"{head}Content-Length: {size}\r\n\r\n")
                    closes = (await within(peer.answer())).headers.get("connection") == "close"
                    self.assertEqual(closes, (option, size) != ("keep-alive", 10))
                    await peer.send(bytes(size))
                    if closes:
                        self.assertEqual(await within(peer.rest()), b"")
                    else:
                        await peer.send(f"POST / HTTP/1.1\r\n{HOST}Content-Length: 1\r\n\r\nx")
                        self.assertEqual((await within(peer.answer())).text, "accepted")
                    await peer.close()
        self.assertEqual(sorted(read), [1, 10, 10, 1_000_000])

    async def test_a_body_whose_answer_is_cut_off_keeps_no_handler(self) -> None:
        """What a handler wrote beyond its Content-Length ends the connection, and so the body."""
        ended = asyncio.Event()

        async def too_long(c: Context, w: Writer) -> None:
            w.headers.set("content-length", 1)
            try:
                w.write(b"too long")
            except StarioError:
                try:
                    await c.req.body()
                except ClientDisconnected:
                    ended.set()

        app = Stario()
        app.post("/", too_long)
        for version in ("1.0", "1.1"):
            async with connected(app) as peer:
                await peer.send(f"POST / HTTP/{version}\r\n{HOST}Content-Length: 9\r\n\r\nsome")
                await within(ended.wait())
                ended.clear()

    async def test_a_long_answer_that_closes_is_not_cut_off(self) -> None:
        """RFC 9112, section 9.6: as long as the client takes it, whatever else it has sent."""

        async def long(c: Context, w: Writer) -> None:
            w.respond(bytes(20_000_000), "application/octet-stream")

        app = Stario()
        app.get("/", long)
        with mock.patch("stario._LINGER", 0.05):
            async with app.running(write_timeout=5.0) as server:
                peer = await Peer.connect(server.port)
                stop_reading(peer)
                await peer.send(f"GET / HTTP/1.1\r\n{HOST}Connection: close\r\n\r\n{NEXT}")
                await until(lambda: [c for c in connections_of(server) if c._closing])
                (connection,) = connections_of(server)
                deadline = connection._deadline
                await until(lambda: connection._deadline != deadline)  # it would have been closed
                read_again(peer)
                self.assertEqual(len((await within(peer.answer())).body), 20_000_000)
                self.assertEqual(await within(peer.rest()), b"")
                await peer.close()

    async def test_what_comes_behind_an_answer_that_closes_does_not_destroy_it(self) -> None:
        """RFC 9112, section 9.6: not even when the server has closed its side already."""
        requests = {
            f"GET / HTTP/1.1\r\n{HOST}Connection: close\r\n\r\n": 200,
            "GET / HTTP/1.0\r\n\r\n": 200,
            "GET / HTTP/1.1\r\n\r\n": 400,
        }
        async with echo_app().running() as server:
            for request, status in requests.items():
                with self.subTest(request):
                    peer = await Peer.connect(server.port)
                    await until(lambda: connections_of(server))
                    (connection,) = connections_of(server)
                    stop_reading(peer)
                    await peer.send(request)
                    await until(lambda connection=connection: connection._is_closing())  # type: ignore[misc]
                    for _ in range(3):
                        await peer.send(NEXT)
                    read_again(peer)
                    self.assertEqual((await within(peer.answer())).status, status)
                    self.assertEqual(await within(peer.rest()), b"")
                    await peer.close()
                    await until(lambda: not connections_of(server))

    async def test_a_request_behind_a_slow_download_is_answered(self) -> None:
        """However long the client takes what is before it: the connection is not idle."""

        async def large(c: Context, w: Writer) -> None:
            w.respond(bytes(20_000_000), "application/octet-stream")

        app = Stario()
        app.get("/", large)
        async with app.running(keep_alive_timeout=0.2, write_timeout=60.0) as server:
            peer = await Peer.connect(server.port)
            stop_reading(peer)
            await peer.send(GET)
            await until(lambda: [c for c in connections_of(server) if c._paused_writing])
            (connection,) = connections_of(server)
            await peer.send(GET)
            await until(lambda: connection._reader.buffer)
            (worker,) = server._workers
            start = worker.now
            await until(lambda: worker.now > start + 0.5)
            read_again(peer)
            for _ in range(2):
                self.assertEqual(len((await within(peer.answer())).body), 20_000_000)
            await peer.close()

    async def test_a_fault_behind_an_early_answer_does_not_destroy_it(self) -> None:
        """RFC 9112, section 9.6: a malformed rest of a body ends the connection, but gently."""

        async def early(c: Context, w: Writer) -> None:
            w.text("early")

        app = Stario()
        app.post("/", early)
        async with app.running() as server:
            peer = await Peer.connect(server.port)
            stop_reading(peer)
            await peer.send(f"POST / HTTP/1.1\r\n{HOST}Transfer-Encoding: chunked\r\n\r\n5\r\nhel")
            await until(lambda: connections_of(server))
            (connection,) = connections_of(server)
            await until(lambda: connection._state is stario._LATE_BODY)
            await peer.send("lo, malformed")
            await until(connection._is_closing)
            for _ in range(3):
                await peer.send(NEXT)
            read_again(peer)
            self.assertEqual((await within(peer.answer())).text, "early")
            self.assertEqual(await within(peer.rest()), b"")
            await peer.close()

    async def test_an_answer_that_breaks_off_does_not_destroy_the_one_before(self) -> None:
        """RFC 9112, section 9.6: a client that still sends its second request gets no reset."""

        async def broken(c: Context, w: Writer) -> None:
            w.write(b"begin")
            raise HttpException(500)

        app = echo_app()
        app.post("/broken", broken)
        async with app.running() as server:
            peer = await Peer.connect(server.port)
            await until(lambda: connections_of(server))
            (connection,) = connections_of(server)
            stop_reading(peer)
            upload = f"POST /broken HTTP/1.1\r\n{HOST}Content-Length: 500000\r\n\r\n"
            await peer.send(GET, upload)
            await until(connection._is_closing)
            for _ in range(3):
                await peer.send(bytes(10_000))
            read_again(peer)
            self.assertEqual((await within(peer.answer())).status, 200)
            self.assertTrue((await within(peer.rest())).endswith(b"begin\r\n"))
            await peer.close()

    async def test_a_refused_client_may_go_on_sending(self) -> None:
        """RFC 9112, section 9.6: closing at once would be a reset, which destroys the answer."""
        async with echo_app(max_body=1000).running() as server:
            requests = {
                f"POST / HTTP/1.1\r\n{HOST}Content-Length: 9000000\r\n\r\n": 413,
                f"POST / HTTP/1.1\r\n{HOST}Content-Length: 9000000, 1\r\n\r\n": 400,
                f"POST / HTTP/1.1\r\n{HOST}Transfer-Encoding: chunked\r\n\r\n895440\r\n": 413,
            }
            for head, status in requests.items():
                with self.subTest(head):
                    peer = await Peer.connect(server.port)
                    await peer.send(head)
                    await within(peer.send(*[bytes(100_000)] * 90))
                    self.assertEqual((await within(peer.answer())).status, status)
                    await peer.close()

    async def test_a_refused_head_gets_no_body(self) -> None:
        """RFC 9110, section 9.3.2: the client would wait for none, or take it for an answer."""
        head, bad = f"HEAD / HTTP/1.1\r\n{HOST}", "HEAD / HTTP/1.1\r\nHost\r\n\r\n"
        for requests, statuses in {
            bad: [400],
            "\r\n" + bad: [400],
            f"{head}\r\n{bad}": [200, 400],
            f"{head}X: {'y' * 40_000}": [431],
        }.items():
            with self.subTest(requests[:60]):
                heads = (await ask(echo_app(), requests)).split(b"\r\n\r\n")
                self.assertEqual([int(found[9:12]) for found in heads[:-1]], statuses)
                self.assertEqual(heads[-1], b"")


class TestStatusLine(HttpTest):
    async def test_a_status_of_another_type_is_written_as_its_number(self) -> None:
        class Status(int, enum.Enum):
            OK = 200

        async def home(c: Context, w: Writer) -> None:
            w.text("", Status.OK if c.req.query.get("odd") else 200)

        app = Stario()
        app.get("/", home)
        async with connected(app) as peer:
            for path in ("/?odd=1", "/"):
                await peer.send(f"GET {path} HTTP/1.1\r\n{HOST}\r\n")
                head = await within(peer.reader.readuntil(b"\r\n\r\n"))
                self.assertTrue(head.startswith(b"HTTP/1.1 200 OK\r\n"), head)


class TestRepeatedHeads(HttpTest):
    """A header block that comes again is known; whatever else differs must still be seen."""

    async def asyncSetUp(self) -> None:
        await super().asyncSetUp()
        self.serving = echo_app().running(max_target=200, max_header_bytes=400)
        self.server = await self.serving.__aenter__()
        self.peer = await Peer.connect(self.server.port)
        # From here on the block is known.
        self.assertEqual(understood(await self.peer.get("/first")), ["GET", "/first", "test", ""])

    async def asyncTearDown(self) -> None:
        await self.peer.close()
        await self.serving.__aexit__(None, None, None)
        await super().asyncTearDown()

    async def paths(self, count: int) -> list[str]:
        return [understood(await within(self.peer.answer()))[1] for _ in range(count)]

    async def send_in_two(self, request: str, first: int) -> None:
        """The rest goes out when the first bytes have come."""
        connection = connections_of(self.server)[0]
        await self.peer.send(request[:first])
        await until(
            lambda: len(connection._reader.buffer) == first or connection._state is stario._BODY
        )
        await self.peer.send(request[first:])

    async def test_another_line_another_method_and_another_block(self) -> None:
        for method in ("GET", "DELETE"):
            answer = understood(await self.peer.get("/a?b=c", method))
            self.assertEqual(answer, [method, "/a", "test", ""])
        self.assertEqual(understood(await self.peer.get("/b", accept="x"))[1], "/b")
        self.assertEqual(understood(await self.peer.get("/c"))[1], "/c")

    async def test_several_in_one_packet_are_several(self) -> None:
        """RFC 9112, section 9.3.2."""
        request = f"GET /%d HTTP/1.1\r\n{HOST}\r\n"
        await self.peer.send(request % 1 + request % 2 + request % 3)
        self.assertEqual(await self.paths(3), ["/1", "/2", "/3"])

    async def test_empty_lines_in_front_are_tolerated(self) -> None:
        """RFC 9112, section 2.2."""
        await self.peer.send(f"\r\n\r\nGET /1 HTTP/1.1\r\n{HOST}\r\n")
        self.assertEqual(await self.paths(1), ["/1"])

    async def test_one_that_came_in_two_packets_leaves_nothing_behind(self) -> None:
        """The place where a search stopped belongs to one head: the next one may be shorter."""
        await self.send_in_two(f"GET /{'long' * 20} HTTP/1.1\r\n{HOST}\r\n", 90)
        await self.paths(1)
        await self.peer.send("GET /1 HTTP/1.1\r\nHost:a\r\n\r\n")
        self.assertEqual(await self.paths(1), ["/1"])

    async def test_a_body_may_end_like_the_block(self) -> None:
        body = f"GET /x HTTP/1.1\r\n{HOST}\r\n"
        await self.peer.send(
            f"POST /1 HTTP/1.1\r\n{HOST}Content-Length: {len(body)}\r\n\r\n{body}",
            f"GET /2 HTTP/1.1\r\n{HOST}\r\n",
        )
        self.assertEqual(understood(await self.peer.answer()), ["POST", "/1", "test", body])
        self.assertEqual(await self.paths(1), ["/2"])

    async def test_a_body_comes_once_however_it_was_cut(self) -> None:
        said: list[str] = []

        async def twice(c: Context, w: Writer) -> None:
            async for _ in c.req.stream():
                pass
            for again in (c.req.stream().__anext__, c.req.body):
                try:
                    await again()
                except StarioError as exc:
                    said.append(str(exc)[:4])
            w.empty()

        app = Stario()
        app.post("/", twice)
        head = f"POST / HTTP/1.1\r\n{HOST}Content-Length: 3\r\n\r\n"
        async with app.running() as server:
            for pieces in ((head + "one",), (head, "one")):
                peer = await Peer.connect(server.port)
                await peer.send(pieces[0])
                for piece in pieces[1:]:
                    await until(
                        lambda: any(c._state is stario._BODY for c in connections_of(server))
                    )
                    await peer.send(piece)
                self.assertEqual((await within(peer.answer())).status, 204)
                await peer.close()
        self.assertEqual(said, ["the "] * 4)

    async def test_a_huge_block_is_not_kept(self) -> None:
        known = stario._kept_framing.cache_info().currsize
        async with echo_app().running() as server:
            peer = await Peer.connect(server.port)
            self.assertEqual((await peer.get("/", accept="x" * 5000, expect="x")).status, 417)
            self.assertEqual(stario._kept_framing.cache_info().currsize, known)
            await peer.close()

    async def test_the_same_head_brings_another_body(self) -> None:
        for body in ("one", "two", "six"):
            head = f"POST /1 HTTP/1.1\r\n{HOST}Content-Length: 3\r\n\r\n"
            await self.send_in_two(head + body, len(head))
            self.assertEqual(understood(await self.peer.answer()), ["POST", "/1", "test", body])

    async def test_limits_and_errors_of_the_line_hold(self) -> None:
        for line, status in (
            (f"GET /{'x' * 200} HTTP/1.1", 414),
            (f"{'X' * 380} / HTTP/1.1", 414),
            ("GET  / HTTP/1.1", 400),
            ("GET /%zz HTTP/1.1", 400),
            ("GET /#a HTTP/1.1", 400),
            ("GET / HTTP/2.0", 505),
            ("GET /\rx HTTP/1.1", 400),
        ):
            with self.subTest(line):
                peer = await Peer.connect(self.server.port)
                await peer.get("/")
                await peer.send(f"{line}\r\n{HOST}\r\n")
                self.assertEqual((await within(peer.answer())).status, status)
                self.assertEqual(await within(peer.rest()), b"")
                await peer.close()

    async def test_a_head_without_fields_has_none(self) -> None:
        seen: list[list[tuple[str, str]]] = []

        async def note(c: Context, w: Writer) -> None:
            seen.append(c.req.headers.items())

        app = Stario()
        app.get("/", note)
        self.assertIn(b" 204 ", await ask(app, "GET / HTTP/1.0\r\n\r\n"))
        self.assertEqual(seen, [[]])

    async def test_http_1_0_is_seen_in_the_line(self) -> None:
        """RFC 9112, section 9.3: without keep-alive the connection ends."""
        await self.peer.send(f"GET /1 HTTP/1.0\r\n{HOST}\r\n")
        self.assertEqual((await self.peer.answer()).headers["connection"], "close")
        self.assertEqual(await within(self.peer.rest()), b"")

    async def test_blocks_that_are_framed_alike_keep_their_own_fields(self) -> None:
        seen: list[str | None] = []

        async def note(c: Context, w: Writer) -> None:
            seen.append(c.req.headers.get("cookie"))
            w.empty()

        app = Stario()
        app.get("/", note)
        async with connected(app) as peer:
            for cookie in ("a=1", "a=2", "a=1"):
                await peer.get("/", cookie=cookie)
        self.assertEqual(seen, ["a=1", "a=2", "a=1"])


class TestAnswers(HttpTest):
    async def test_some_answers_have_no_body(self) -> None:
        """RFC 9110, sections 9.3.2 (HEAD), 15.3.5 (204) and 15.4.5 (304)."""

        async def one_shot(c: Context, w: Writer) -> None:
            w.respond(b"content", "text/plain", int(c.req.query.get("status", "200")))

        async def stream(c: Context, w: Writer) -> None:
            w.write(b"content").write(b"more").end(b"and more")

        async def sized(c: Context, w: Writer) -> None:
            w.headers.set("content-length", 7)
            w.write_headers(int(c.req.query.get("status", "200")))
            if c.req.method == "GET" and not c.req.query:
                w.write(b"content")

        async def events(c: Context, w: Writer) -> None:
            w.event("x", "y")

        app = Stario()
        for path, handler in {"one": one_shot, "str": stream, "len": sized, "sse": events}.items():
            app.get(f"/{path}", handler)
        lengths = {
            ("HEAD", "/one"): "7",
            ("HEAD", "/str"): None,
            ("HEAD", "/len"): "7",
            ("HEAD", "/sse"): None,
            ("GET", "/one?status=204"): None,
            ("GET", "/one?status=304"): None,
            ("GET", "/one?status=205"): "0",  # RFC 9110, section 15.3.6
            ("GET", "/len?status=205"): "0",
            ("GET", "/len?status=204"): None,
            ("GET", "/len?status=304"): "7",
        }
        async with connected(app) as peer:
            for (method, path), length in lengths.items():
                with self.subTest(method, path=path):
                    answer = await within(peer.get(path, method))
                    self.assertEqual(answer.headers.get("content-length"), length)
                    self.assertNotIn("transfer-encoding", answer.headers)
                    # A body would stand in front of the next answer.
                    self.assertEqual((await within(peer.get("/one"))).text, "content")

    async def test_an_answer_without_content_has_no_coding(self) -> None:
        """RFC 9110, section 15.3.6: a client would try to decode the nothing of a 205."""

        async def reset(c: Context, w: Writer) -> None:
            w.html(h.P("x" * 5000), c.req.params["status"])

        app = Stario(compression=CompressionConfig(min_size=0))
        app.get("/{status:int}", reset)
        async with connected(app) as peer:
            for status, length in ((205, "0"), (204, None), (304, None)):
                answer = await within(peer.get(f"/{status}", accept_encoding="gzip"))
                self.assertEqual(
                    (answer.status, answer.headers.get("content-length")), (status, length)
                )
                self.assertNotIn("content-encoding", answer.headers)

    async def test_a_body_has_a_length_or_comes_in_chunks_but_not_both(self) -> None:
        """RFC 9112, section 6.2; what a handler says of the connection's own fields is left out."""

        async def sized(c: Context, w: Writer) -> None:
            w.headers.set("transfer-encoding", "chunked").set("content-length", 2)
            w.headers.set("connection", "close").set("keep-alive", "timeout=1")
            w.write(b"ab")

        async def unsized(c: Context, w: Writer) -> None:
            w.headers.set("transfer-encoding", "gzip")
            w.write(b"ab")

        app = Stario()
        app.get("/sized", sized)
        app.get("/unsized", unsized)
        async with connected(app) as peer:
            answer = await within(peer.get("/sized"))
            self.assertEqual((answer.headers["content-length"], answer.body), ("2", b"ab"))
            self.assertFalse(
                {"transfer-encoding", "connection", "keep-alive"} & set(answer.headers)
            )
            answer = await within(peer.get("/unsized"))
            self.assertEqual((answer.headers["transfer-encoding"], answer.body), ("chunked", b"ab"))
            self.assertNotIn("content-length", answer.headers)

    def test_dates_are_written_in_every_month_as_the_standard_library_writes_them(self) -> None:
        for timestamp in range(0, 10**11, 10**8 // 3):
            self.assertEqual(
                stario._http_date(timestamp), email.utils.formatdate(timestamp, usegmt=True)
            )

    async def test_every_answer_has_one_date_and_no_server(self) -> None:
        """RFC 9110, sections 6.6.1 and 5.6.7."""

        async def dated(c: Context, w: Writer) -> None:
            w.headers.set("date", "Thu, 01 Jan 1970 00:00:00 GMT")
            w.text("old")

        app = echo_app()
        app.get("/dated", dated)
        async with connected(app) as peer:
            for path in ("/", "/dated"):  # a handler's own is left out
                answer = await within(peer.get(path))
                date = datetime.strptime(answer.headers["date"], "%a, %d %b %Y %H:%M:%S GMT")
                age = datetime.now(timezone.utc) - date.replace(tzinfo=timezone.utc)
                self.assertLess(abs(age), timedelta(minutes=1))
                self.assertNotIn("server", answer.headers)

    async def test_an_answer_that_ends_its_connection_can_be_drained(self) -> None:
        drained: list[int] = []

        async def page(c: Context, w: Writer) -> None:
            size = int(c.req.query["size"])
            w.respond(bytes(size), "text/plain")
            await w.drain()
            drained.append(size)

        app = Stario()
        app.get("/", page)
        async with app.running() as server:
            for size in (1, 20_000_000):
                with self.subTest(size):
                    peer = await Peer.connect(server.port)
                    await peer.send(f"GET /?size={size} HTTP/1.0\r\n\r\n")
                    self.assertGreater(len(await within(peer.rest())), size)
                    await asyncio.sleep(0.01)
                    await peer.close()
        self.assertEqual(drained, [1, 20_000_000])

    async def test_a_stream_that_dies_is_cut_off_visibly(self) -> None:
        """RFC 9112, section 8: no last chunk, too few bytes, or a reset."""

        async def die(c: Context, w: Writer) -> None:
            if c.req.query.get("sized"):
                w.headers.set("content-length", 100)
            w.write(b"start")
            await w.drain()
            raise HttpException(400, "too late")

        app = Stario()
        app.get("/", die)
        async with app.running() as server:
            for target in ("/", "/?sized=1"):
                with self.subTest(target):
                    peer = await Peer.connect(server.port)
                    await peer.send(f"GET {target} HTTP/1.1\r\n{HOST}\r\n")
                    await within(peer.head())
                    rest = await within(peer.rest())
                    self.assertIn(rest, (b"start", b"5\r\nstart\r\n"))
                    await peer.close()
            peer = await Peer.connect(server.port)
            await peer.send("GET / HTTP/1.0\r\n\r\n")
            with self.assertRaises(ConnectionResetError):
                await within(peer.rest())
            await peer.close()

    async def test_a_handler_without_an_answer_gives_204_and_says_so(self) -> None:
        spans = Spans()
        app = Stario(spans)

        async def silent(c: Context, w: Writer) -> None:
            pass

        app.get("/", silent)
        async with connected(app) as peer:
            self.assertEqual((await within(peer.get("/"))).status, 204)
            self.assertEqual((await within(peer.get("/"))).status, 204)
        self.assertEqual([e.name for e in spans.named("GET /")[0].events], ["no answer"])

    async def test_another_length_than_the_declared_one_is_an_error_that_is_seen(self) -> None:
        """RFC 9110, section 8.6: by the developer, and by the client."""
        spans = Spans()
        app = Stario(spans)

        async def declare(c: Context, w: Writer) -> None:
            w.headers.set("content-length", 5)
            w.write(b"1234" if c.req.path == "/less" else b"12345678")

        async def file(c: Context, w: Writer) -> None:
            w.headers.set("content-length", 5)
            with open(__file__, "rb") as opened:
                w.write_headers(200)
                await w.send_file(opened, 0, 6)

        app.get("/less", declare)
        app.get("/more", declare)
        app.get("/file", file)
        for path, wanted in {"/less": b"1234", "/more": b"", "/file": b""}.items():
            with self.subTest(path):
                out = await ask(app, f"GET {path} HTTP/1.1\r\n{HOST}\r\n{NEXT}")
                self.assertEqual(out.partition(b"\r\n\r\n")[2], wanted)
                (span,) = spans.named(f"GET {path}")
                self.assertIn("Content-Length", span.error or "")

    async def test_a_short_answer_after_a_half_close_ends_the_connection(self) -> None:
        """It may still read, and would take the next answer for the rest of this one."""
        spans = Spans()

        async def stop_early(c: Context, w: Writer) -> None:
            w.headers.set("content-length", 90)
            async for _ in w.alive(every=0.01):
                w.write(b"1")

        app = Stario(spans)
        app.get("/early", stop_early)
        async with connected(app) as peer:
            await peer.send(f"GET /early HTTP/1.1\r\n{HOST}\r\n{NEXT}")
            await peer.head()
            peer.writer.write_eof()
            self.assertEqual((await within(peer.rest())).strip(b"1"), b"")
        (span,) = spans.named("GET /early")
        self.assertIsNone(span.error)

    async def test_a_file_that_was_sent_in_part_is_no_complete_answer(self) -> None:
        """What is answered next would be read as the rest of its body (RFC 9112, section 6.3)."""
        spans = Spans()
        app = Stario(spans)
        with tempfile.NamedTemporaryFile() as short:
            short.write(b"1234")
            short.flush()

            async def send(c: Context, w: Writer) -> None:
                w.headers.set("content-length", 9)
                with open(short.name, "rb") as opened, suppress(StarioError):
                    await w.write_headers(200).send_file(opened, 0, 9)

            app.get("/", send)
            out = await ask(app, GET + NEXT)
        self.assertEqual(out.partition(b"\r\n\r\n")[2], b"1234")
        self.assertIn("short of its Content-Length", spans.ended[0].error or "")

    async def test_an_answer_that_cannot_be_sent_is_a_500_and_not_silence(self) -> None:
        """Whatever goes wrong between the handler and the wire, the client hears of it."""

        async def bad_type(c: Context, w: Writer) -> None:
            w.respond(b"x", "text/plain\r\nX: y")

        async def bad_status(c: Context, w: Writer) -> None:
            raise HttpException(42)

        async def bad_address(c: Context, w: Writer) -> None:
            raise HttpException(302, "/a\r\nSet-Cookie: b")

        async def bad_length(c: Context, w: Writer) -> None:
            w.headers.set("content-length", "many")
            w.write(b"x")

        async def bad_json(c: Context, w: Writer) -> None:
            w.json(object())

        app = Stario(Spans())
        handlers = [bad_type, bad_status, bad_address, bad_length, bad_json]
        for handler in handlers:
            app.get(f"/{handler.__name__}", handler)
        async with connected(app) as peer:
            for handler in handlers:
                with self.subTest(handler.__name__):
                    answer = await within(peer.get(f"/{handler.__name__}"))
                    self.assertEqual((answer.status, answer.text), (500, "Internal Server Error"))

    async def test_bytes_are_bytes(self) -> None:
        """What is no bytes is refused before the answer begins, so that there can be another."""
        wrong: list[Callable[[Any], Any]] = [
            lambda w: w.respond("text", "text/plain"), lambda w: w.write("text"),
            lambda w: w.end("text"), lambda w: w.text(b"bytes"), lambda w: w.html({"a": 1}),
            lambda w: w.headers.add("content-length", 1).add("content-length", 1) and w.write(b"x"),
            lambda w: w.headers.set("x", None), lambda w: w.text("x", "200"),
        ]  # fmt: skip

        async def handler(c: Context, w: Writer) -> None:
            wrong[int(c.req.params["n"])](w)

        async def changed(c: Context, w: Writer) -> None:
            data = bytearray(b"abc")
            w.respond(data, "text/plain")  # type: ignore[arg-type]
            data[:] = b"xyz"

        app = Stario(Spans())
        app.get("/changed", changed)
        app.get("/{n:int}", handler)
        async with connected(app) as peer:
            for n in range(len(wrong)):
                with self.subTest(n):
                    answer = await within(peer.get(f"/{n}"))
                    self.assertEqual((answer.status, answer.text), (500, "Internal Server Error"))
            self.assertEqual((await within(peer.get("/changed"))).text, "abc")

    async def test_errors_tell_the_client_no_details(self) -> None:
        async def fail(c: Context, w: Writer) -> None:
            raise RuntimeError("the password is 1234")

        app = Stario(Spans())
        app.get("/", fail)
        async with connected(app) as peer:
            answer = await within(peer.get("/"))
            self.assertEqual((answer.status, answer.text), (500, "Internal Server Error"))
            self.assertNotIn("stario", str(answer.headers).lower())


class TestLimits(HttpTest):
    def setUp(self) -> None:
        self.spans = Spans()
        self.app = echo_app(tracer=self.spans)

    async def trickle(self, peer: Peer, piece: str) -> None:
        """Send a little, again and again, until the server has said something."""
        while not peer.reader._buffer and not peer.reader.at_eof():  # type: ignore[attr-defined]
            try:
                await peer.send(piece)
            except ConnectionError:
                return
            await asyncio.sleep(0.01)

    async def test_a_head_has_to_come_in_time_as_a_whole(self) -> None:
        """RFC 9110, section 15.5.9: 408, however steadily it trickles."""
        async with connected(self.app, header_timeout=0.5) as peer:
            await peer.send(f"GET / HTTP/1.1\r\n{HOST}X: ")
            await within(self.trickle(peer, "y"))
            self.assertEqual((await within(peer.answer())).status, 408)
            self.assertEqual(await within(peer.rest()), b"")
        self.assertEqual(self.spans.refusals(), [408])

    async def test_a_second_head_has_to_come_in_time_too(self) -> None:
        async with connected(self.app, header_timeout=0.2) as peer:
            await within(peer.get("/"))
            await peer.send("GET / HT")
            self.assertEqual((await within(peer.answer())).status, 408)
        self.assertEqual(self.spans.refusals(), [408])

    async def test_idle_connections_are_closed_without_a_word(self) -> None:
        """RFC 9112, section 9.5."""
        with self.subTest("never said anything"):
            async with connected(self.app, header_timeout=0.1) as peer:
                self.assertEqual(await within(peer.rest()), b"")
        with self.subTest("only empty lines"):
            async with connected(self.app, header_timeout=0.2) as peer:
                await within(self.trickle(peer, "\r\n"))
                with contextlib.suppress(ConnectionResetError):  # it was just sending one more
                    self.assertEqual(await within(peer.rest()), b"")
        with self.subTest("after an answer"):
            async with connected(self.app, keep_alive_timeout=0.1) as peer:
                self.assertEqual((await within(peer.get("/"))).status, 200)
                self.assertEqual(await within(peer.rest()), b"")
        with self.subTest("an empty line behind a request whose answer had to wait"):
            size = 6_000_000

            async def big(c: Context, w: Writer) -> None:
                w.text("x" * size)

            self.app.get("/big", big)
            async with connected(self.app, header_timeout=0.2, keep_alive_timeout=0.4) as peer:
                await peer.send(f"GET /big HTTP/1.1\r\n{HOST}\r\n")
                await within(peer.reader.read(1))
                await peer.send("\r\n")
                body = (await within(peer.rest())).partition(b"\r\n\r\n")[2]
                self.assertEqual((len(body), body[-3:]), (size, b"xxx"))
        self.assertEqual(self.spans.refusals(), [])

    async def test_a_body_that_stalls_or_trickles_gets_408(self) -> None:
        """RFC 9110, section 15.5.9."""
        for framing, piece in (
            ("Content-Length: 9999", "x"),
            ("Transfer-Encoding: chunked", "1\r\nx\r\n"),
        ):
            for trickles in (False, True):
                with self.subTest(framing, trickles=trickles):
                    async with connected(self.app, body_timeout=0.2) as peer:
                        await peer.send(f"POST / HTTP/1.1\r\n{HOST}{framing}\r\n\r\n")
                        if trickles:
                            await within(self.trickle(peer, piece))
                        self.assertEqual((await within(peer.answer())).status, 408)
                        self.assertEqual(await within(peer.rest()), b"")
        self.assertEqual(self.spans.refusals(), [408] * 4)

    async def test_a_body_that_nobody_reads_has_its_time_too(self) -> None:
        async def ignore(c: Context, w: Writer) -> None:
            w.text("ignored")

        app = Stario()
        app.post("/", ignore)
        async with connected(app, body_timeout=0.1) as peer:
            await peer.send(f"POST / HTTP/1.1\r\n{HOST}Content-Length: 5\r\n\r\n")
            self.assertEqual((await within(peer.answer())).text, "ignored")
            self.assertEqual(await within(peer.rest()), b"")

    async def test_a_slow_handler_is_no_slow_client(self) -> None:
        """Time-outs are for what the client owes, not for what the handler does."""

        async def slow(c: Context, w: Writer) -> None:
            await asyncio.sleep(0.6)
            w.text(str(len(await c.req.body())))

        app = Stario()
        app.post("/", slow)
        times = {"header_timeout": 0.4, "body_timeout": 0.2, "keep_alive_timeout": 0.2}
        async with connected(app, write_timeout=0.2, **times) as peer:
            sending = peer.send(
                f"POST / HTTP/1.1\r\n{HOST}Content-Length: 900000\r\n\r\n", bytes(900_000)
            )
            _, answer = await asyncio.gather(within(sending), within(peer.answer()))
            self.assertEqual(answer.text, "900000")

    async def test_a_client_that_does_not_take_its_answer_is_cut_off(self) -> None:
        ended = asyncio.Event()

        async def flood(c: Context, w: Writer) -> None:
            try:
                while True:
                    w.write(bytes(65536))
                    await w.drain()
            except ClientDisconnected:
                ended.set()

        self.app.get("/flood", flood)
        async with self.app.running(write_timeout=0.2) as server:
            peer = await Peer.connect(server.port)
            stop_reading(peer)
            await peer.send(f"GET /flood HTTP/1.1\r\n{HOST}\r\n")
            await within(ended.wait())
            await until(lambda: not connections_of(server))
            await peer.close()
        self.assertEqual(self.spans.refusals(), [408])

    async def test_what_is_kept_for_a_client_is_bounded(self) -> None:
        """A handler that never drains costs `max_buffer`, not all memory."""

        async def flood(c: Context, w: Writer) -> None:
            while not w.disconnected:
                w.write(bytes(65536))
                await asyncio.sleep(0)

        self.app.get("/flood", flood)
        async with self.app.running(max_buffer=1_000_000) as server:
            peer = await Peer.connect(server.port)
            stop_reading(peer)
            await peer.send(f"GET /flood HTTP/1.1\r\n{HOST}\r\n")
            await until(lambda: self.spans.named("GET /flood"))
            await peer.close()
        self.assertEqual(self.spans.refusals(), [408])

    async def test_heads_have_limits(self) -> None:
        """RFC 9110, section 15.5.15 (414), and RFC 6585, section 5 (431)."""
        options: dict[str, Any] = {"max_header_bytes": 2000, "max_headers": 10, "max_target": 500}
        target, fields = "x" * 600, "X: y\r\n" * 11
        heads = {
            f"GET /{target} HTTP/1.1\r\n{HOST}\r\n": 414,
            f"GET /{'x' * 5000} HTTP/1.1\r\n{HOST}\r\n": 414,
            f"GET /{'x' * 5000}": 414,
            f"GET / HTTP/1.1\r\n{HOST}{fields}\r\n": 431,
            f"GET / HTTP/1.1\r\n{HOST}X: {'y' * 2000}\r\n\r\n": 431,
            f"GET / HTTP/1.1\r\n{HOST}X: {'y' * 2000}": 431,
        }
        async with self.app.running(**options) as server:
            for head, status in heads.items():
                with self.subTest(head[:30], status=status):
                    await self.check_refused(server.port, head, status)
            peer = await Peer.connect(server.port)
            wide = {f"X{i}": "y" * 100 for i in range(9)}
            self.assertEqual((await within(peer.get("/" + "x" * 499, **wide))).status, 200)
            await peer.close()
        self.assertEqual(self.spans.refusals(), list(heads.values()))

    async def test_bodies_have_a_limit_that_a_request_can_raise(self) -> None:
        """RFC 9110, section 15.5.14: 413, for a length that is declared, and one that shows."""

        async def generous(c: Context, w: Writer) -> None:
            c.req.max_body = 2000
            w.text(str(len(await c.req.body())))

        app = echo_app(max_body=1000)
        app.post("/generous", generous)
        async with app.running() as server:
            for path, size, status in (
                ("/", 1000, 200),
                ("/", 1001, 413),
                ("/generous", 2000, 200),
                ("/generous", 2001, 413),
            ):
                for chunked in (False, True):
                    with self.subTest(path, size=size, chunked=chunked):
                        peer = await Peer.connect(server.port)
                        framing = (
                            "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
                        )
                        data = f"{size:x}\r\n{'x' * size}\r\n0\r\n\r\n" if chunked else "x" * size
                        await peer.send(f"POST {path} HTTP/1.1\r\n{HOST}{framing}\r\n\r\n{data}")
                        self.assertEqual((await within(peer.answer())).status, status)
                        # What is small enough has been drained: the connection goes on.
                        self.assertEqual((await within(peer.get("/"))).status, 200)
                        await peer.close()

    async def test_too_many_connections_get_503_and_when_to_come_again(self) -> None:
        """RFC 9110, sections 15.6.4 and 10.2.3."""
        async with self.app.running(max_connections=2) as server:
            peers = [await Peer.connect(server.port) for _ in range(2)]
            for peer in peers:
                self.assertEqual((await within(peer.get("/"))).status, 200)
            for _ in range(2):
                late = await Peer.connect(server.port)
                answer = await within(late.get("/"))
                self.assertEqual((answer.status, answer.headers["connection"]), (503, "close"))
                self.assertRegex(answer.headers["retry-after"], r"^\d+$")
                self.assertEqual(await within(late.rest()), b"")
                await late.close()
            self.assertEqual((await within(peers[0].get("/"))).status, 200)
            await peers.pop().close()
            await until(lambda: len(connections_of(server)) == 1)
            again = await Peer.connect(server.port)
            self.assertEqual((await within(again.get("/"))).status, 200)
            for peer in (*peers, again):
                await peer.close()
        self.assertEqual(self.spans.refusals(), [503, 503])

    async def test_a_worker_that_is_full_leaves_a_connection_to_one_that_is_not(self) -> None:
        async with echo_app().running(workers=2, max_connections=4) as server:
            peers = []
            for number in range(4):
                peers.append(await Peer.connect(server.port))
                await until(lambda count=number + 1: len(connections_of(server)) == count)  # type: ignore[misc]
            for peer in (peers[1], peers[3]):  # both of one worker
                await peer.close()
            await until(lambda: len(connections_of(server)) == 2)
            self.assertEqual([len(worker.connections) for worker in server._workers], [2, 0])
            for status in (200, 200, 503):
                peers.append(await Peer.connect(server.port))
                self.assertEqual((await within(peers[-1].get())).status, status)
            for peer in peers:
                await peer.close()

    async def test_far_too_many_connections_are_closed_unheard(self) -> None:
        with mock.patch("stario._MAX_EXCESS", 1):
            async with self.app.running(max_connections=1) as server:
                first = await Peer.connect(server.port)
                self.assertEqual((await within(first.get("/"))).status, 200)
                second = await Peer.connect(server.port)
                await until(lambda: len(connections_of(server)) == 2)
                third = await Peer.connect(server.port)
                with contextlib.suppress(ConnectionResetError):
                    self.assertEqual(await within(third.rest()), b"")
                self.assertEqual((await within(second.get("/"))).status, 503)
                for peer in (first, second, third):
                    await peer.close()

    async def test_time_in_which_the_server_stands_still_counts_for_no_client(self) -> None:
        """A suspended machine, a blocked loop: nobody could go on meanwhile."""

        async def large(c: Context, w: Writer) -> None:
            for _ in range(100):
                w.write(bytes(65536))
                await w.drain()

        self.app.get("/large", large)
        loop = asyncio.get_running_loop()
        real, ahead = loop.time, 0.0
        with mock.patch.object(loop, "time", lambda: real() + ahead):
            async with self.app.running() as server:
                idle, head, body, slow = [await Peer.connect(server.port) for _ in range(4)]
                self.assertEqual((await within(idle.get("/"))).status, 200)
                await head.send("GET / HTTP/1.1\r\n")
                await body.send(f"POST / HTTP/1.1\r\n{HOST}Content-Length: 2\r\n\r\nx")
                stop_reading(slow)
                await slow.send(f"GET /large HTTP/1.1\r\n{HOST}\r\n")
                (worker,) = server._workers
                states = {stario._IDLE, stario._HEAD, stario._BODY, stario._ANSWER}
                await until(lambda: {one._state for one in worker.connections} == states)
                await until(lambda: any(one._stalled_since for one in worker.connections))

                last, ahead = worker.now, 100.0
                while worker.now < last + ahead:
                    await asyncio.sleep(0)

                read_again(slow)
                self.assertEqual(len((await within(slow.answer())).body), 6_553_600)
                await head.send(f"{HOST}\r\n")
                await body.send("y")
                for peer in (head, body):
                    self.assertEqual((await within(peer.answer())).status, 200)
                self.assertEqual((await within(idle.get("/"))).status, 200)
                for peer in (idle, head, body, slow):
                    await peer.close()
        self.assertEqual(self.spans.refusals(), [])

    async def test_the_sweep_goes_on_whatever_happens_in_it(self) -> None:
        async with self.app.running(header_timeout=0.4) as server:
            with mock.patch.object(Connection, "check", side_effect=RuntimeError("a fault")):
                peer = await Peer.connect(server.port)
                await peer.send("GET /")
                await until(lambda: self.unhandled)
            self.unhandled.clear()
            self.assertEqual((await within(peer.answer())).status, 408)
            await peer.close()
            self.unhandled.clear()


async def forever() -> AsyncIterator[None]:
    """A source that has nothing to say."""
    await asyncio.Event().wait()
    yield None


class TestFaults(HttpTest):
    async def test_a_client_may_vanish_at_every_byte_of_its_request(self) -> None:
        """RFC 9112, section 9.5: resets, and plain ends; nothing is left behind."""
        request = (
            f"POST / HTTP/1.1\r\n{HOST}Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
        )
        async with echo_app().running() as server:
            for length in range(len(request) + 1):
                for vanish in (Peer.reset, lambda peer: peer.writer.close()):
                    peer = await Peer.connect(server.port)
                    await peer.send(request[:length])
                    vanish(peer)
            await until(lambda: not connections_of(server) and not server._workers[0].tasks)
            peer = await Peer.connect(server.port)
            self.assertEqual((await within(peer.get("/"))).status, 200)
            await peer.close()

    async def test_a_client_may_vanish_at_every_byte_of_its_answer(self) -> None:
        async def slow(c: Context, w: Writer) -> None:
            for byte in b"some bytes":
                w.write(bytes((byte,)))
                await asyncio.sleep(0)

        app = Stario()
        app.get("/", slow)
        whole = await within(ask(app, f"GET / HTTP/1.1\r\n{HOST}Connection: close\r\n\r\n"))
        async with app.running() as server:
            for length in range(len(whole) + 1):
                peer = await Peer.connect(server.port)
                await peer.send(f"GET / HTTP/1.1\r\n{HOST}Connection: close\r\n\r\n")
                await within(peer.reader.readexactly(length))
                peer.reset()
            await until(lambda: not connections_of(server) and not server._workers[0].tasks)

    async def test_a_refused_client_that_goes_is_forgotten_at_once(self) -> None:
        """RFC 9112, section 9.6: reading on is for who still sends."""
        with mock.patch("stario._LINGER", 1000.0):
            async with echo_app().running() as server:
                await self.check_refused(server.port, "GET / HTTP/1.1\r\n\r\n")
                await until(lambda: not connections_of(server))

    async def test_who_does_not_go_is_cut_off(self) -> None:
        """RFC 9112, section 9.6: and no more than a moment is given for it."""
        with mock.patch("stario._LINGER", 0.05):
            async with echo_app().running(keep_alive_timeout=0.2) as server:
                peer = await Peer.connect(server.port)
                await peer.send("GET / HTTP/1.1\r\n\r\n")
                self.assertEqual((await within(peer.answer())).status, 400)
                await until(lambda: not connections_of(server))
                await peer.close()

    async def test_a_file_for_a_client_that_has_gone_is_not_begun(self) -> None:
        gone = asyncio.Event()

        async def late(c: Context, w: Writer) -> None:
            w.headers.set("content-length", 100)
            w.write_headers(200)
            await until(lambda: w.disconnected)
            with open(__file__, "rb") as file:
                try:
                    await w.send_file(file, 0, 100)
                except ClientDisconnected:
                    gone.set()

        app = Stario()
        app.get("/", late)
        async with connected(app) as peer:
            await peer.send(f"GET / HTTP/1.1\r\n{HOST}\r\n")
            await within(peer.head())
            peer.reset()
            await within(gone.wait())

    async def test_a_stream_hears_of_a_client_that_has_gone_even_if_too_much_is_queued(
        self,
    ) -> None:
        """Reading pauses, and with it the news; the heartbeat finds out."""
        ended = asyncio.Event()

        async def events(c: Context, w: Writer) -> None:
            w.event("hello")
            async for _ in w.alive(forever(), heartbeat=0.05):
                pass
            ended.set()

        app = Stario()
        app.get("/", events)
        async with app.running() as server:
            peer = await Peer.connect(server.port)
            await peer.send(f"GET / HTTP/1.1\r\n{HOST}\r\n", NEXT * 10_000)
            await until(lambda: [c for c in connections_of(server) if c._paused_reading])
            peer.reset()
            await within(ended.wait())

    async def test_a_handler_hears_of_a_reset_while_it_reads(self) -> None:
        """Also while the connection does not read on, because enough is in memory."""
        started, heard = asyncio.Event(), asyncio.Event()

        async def read_later(c: Context, w: Writer) -> None:
            started.set()
            with contextlib.suppress(ClientDisconnected):
                async for _ in c.req.stream():
                    pass
            heard.set()
            raise ClientDisconnected

        app = Stario()
        app.post("/", read_later)
        async with connected(app) as peer:
            await peer.send(
                f"POST / HTTP/1.1\r\n{HOST}Content-Length: 9000000\r\n\r\n", bytes(500_000)
            )
            await within(started.wait())
            peer.reset()
            await within(heard.wait())

    @unittest.skipUnless(hasattr(os, "fork"), "needs a system with resource limits")
    async def test_no_descriptors_left_is_no_end(self) -> None:
        """Accepting goes on when there are some again."""
        import resource

        again = asyncio.Event()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        held: list[int] = []
        async with echo_app().running() as server:
            waiting = socket.socket()
            source = os.open(os.devnull, os.O_RDONLY)
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(200, hard), hard))
            try:
                with contextlib.suppress(OSError):
                    while True:
                        held.append(os.dup(source))
                with patched(server, "_watch", lambda listening: again.set()):
                    waiting.connect(("127.0.0.1", server.port))
                    await within(again.wait())
            finally:
                for descriptor in (*held, source):
                    os.close(descriptor)
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            server._watch(*server._listener.sockets)
            peer = Peer(*await asyncio.open_connection(sock=waiting))
            self.assertEqual((await within(peer.get("/"))).status, 200)
            await peer.close()


@contextlib.contextmanager
def patched(thing: Any, name: str, value: Any) -> Any:
    """mock.patch.object; where the attribute is read-only (uvloop) the test is skipped."""
    before = getattr(thing, name)
    try:
        setattr(thing, name, value)
    except AttributeError:
        raise unittest.SkipTest(f"{name} cannot be watched on this event loop") from None
    try:
        yield
    finally:
        setattr(thing, name, before)


class TestUnreadBytes(HttpTest):
    """A client that goes is noticed, also behind bytes that nobody reads."""

    async def waiting(self, leave: Callable[[Peer], None], **options: Any) -> None:
        ended = asyncio.Event()

        async def wait(c: Context, w: Writer) -> None:
            async with w.alive(**options):
                await asyncio.sleep(3600)
            ended.set()
            w.text("for nobody")

        app = Stario()
        app.get("/", wait)
        async with app.running(header_timeout=0.2) as server:
            peer = await Peer.connect(server.port)
            await peer.send(f"GET / HTTP/1.1\r\n{HOST}\r\n")
            await until(lambda: connections_of(server))
            peer.writer.write(b"x" * 150_000)
            [connection] = connections_of(server)
            await until(lambda: connection._paused_reading)
            leave(peer)
            await within(ended.wait())
            await until(lambda: not connections_of(server))

    @unittest.skipUnless(hasattr(select, "poll"), "needs poll()")
    async def test_a_reset(self) -> None:
        for options in ({}, {"heartbeat": None}, {"heartbeat": 0.05}):
            with self.subTest(options):
                await self.waiting(Peer.reset, **options)

    @unittest.skipUnless(hasattr(select, "POLLRDHUP"), "needs POLLRDHUP")
    async def test_a_side_that_is_closed(self) -> None:
        def close(peer: Peer) -> None:
            # Before the bytes that wait in the transport; uvloop's own socket cannot do that.
            descriptor = os.dup(peer.writer.get_extra_info("socket").fileno())
            with socket.socket(fileno=descriptor) as own:
                own.shutdown(socket.SHUT_WR)

        await self.waiting(close)

    async def test_an_answer_to_a_client_that_has_gone_is_no_error(self) -> None:
        reached = []

        async def answer(c: Context, w: Writer) -> None:
            w.text("x" * int(c.req.query["size"]))
            reached.append(await c.req.body() if c.req.query.get("read") else b"")

        app = Stario(tracer := Spans())
        app.post("/", answer)
        async with app.running() as server:
            for size in (1, 1_000_000):
                peer = await Peer.connect(server.port)
                head = f"POST /?size={size} HTTP/1.1\r\n{HOST}Content-Length: 900000\r\n\r\n"
                peer.writer.write(head.encode() + b"x" * 1000)
                peer.reset()
            await until(lambda: len(reached) == 2 or not connections_of(server))
        self.assertEqual(
            [span.error for span in tracer.ended if span.name == "POST /"], [None] * len(reached)
        )

    async def test_handlers_that_go_on_have_a_bound(self) -> None:
        """Early answers let a connection go on: without a bound, so would all its handlers."""
        go, running, most = asyncio.Event(), 0, 0

        async def early(c: Context, w: Writer) -> None:
            nonlocal running, most
            w.empty()
            running += 1
            most = max(most, running)
            await go.wait()
            running -= 1

        app = Stario()
        app.get("/", early)
        async with app.running(max_handlers=10) as server:
            peer = await Peer.connect(server.port)
            await peer.send(f"GET / HTTP/1.1\r\n{HOST}\r\n" * 100)
            for _ in range(11):
                self.assertEqual((await within(peer.answer())).status, 204)
            other = await Peer.connect(server.port)
            await other.send(f"GET / HTTP/1.1\r\n{HOST}\r\n" * 2)
            # A connection that has come since may start one, and no more.
            self.assertEqual((await within(other.answer())).status, 204)
            await until(lambda: len(server._workers[0].waiting) == 2)
            self.assertEqual(most, 12)
            go.set()
            for _ in range(89):
                self.assertEqual((await within(peer.answer())).status, 204)
            self.assertEqual((await within(other.answer())).status, 204)
            await peer.close()
            await other.close()

    async def crowded(self, leave: Callable[[Server, Peer, Connection], Any]) -> None:
        """A request that waits, since too many handlers run, is answered whatever comes first."""
        go = asyncio.Event()

        async def early(c: Context, w: Writer) -> None:
            w.empty()
            await go.wait()

        app = Stario()
        app.get("/", early)
        server = Server(app, port=0, max_handlers=1)
        await server.start()
        (worker,) = server._workers
        first, second = [await Peer.connect(server.port) for _ in range(2)]
        await until(lambda: len(worker.connections) == 2)
        await first.send(GET * 10)
        await until(lambda: worker.waiting)
        earlier = set(worker.waiting)
        await second.send(GET)
        await until(lambda: worker.waiting - earlier)
        (connection,) = worker.waiting - earlier
        ending = await leave(server, second, connection)
        go.set()
        self.assertEqual((await within(second.answer())).status, 204)
        await within(ending or server.stop())
        await first.close()
        await second.close()

    async def test_a_request_that_waits_is_answered_though_its_client_has_closed_its_side(
        self,
    ) -> None:
        async def leave(server: Server, peer: Peer, connection: Connection) -> None:
            peer.writer.write_eof()
            await until(lambda: connection._eof)

        await self.crowded(leave)

    async def test_a_request_that_waits_is_answered_though_the_server_stops(self) -> None:
        async def leave(server: Server, peer: Peer, connection: Connection) -> Any:
            worker = connection._worker
            ending = asyncio.create_task(server.stop())
            await until(lambda: worker.stopping and worker.deadline != stario._NEVER)
            start = worker.now
            await until(lambda: worker.now > start + 0.2)
            return ending

        with mock.patch.object(stario, "_IDLE_GRACE", 0.05):
            await self.crowded(leave)


# -- 10. The server


class TestListening(HttpTest):
    async def test_options_that_cannot_work_are_one_sentence(self) -> None:
        options: list[dict[str, Any]] = [
            {"port": "8000"}, {"port": 8000.0}, {"host": None}, {"host": 8000}, {"ssl": "cert.pem"},
            {"graceful_timeout": None}, {"graceful_timeout": "5"}, {"max_handlers": 0},
            {"backlog": None}, {"workers": 0}, {"ssl": ssl.create_default_context()},
        ]  # fmt: skip
        for given in options:
            with self.subTest(given), self.assertRaisesRegex(StarioError, f"^{next(iter(given))} "):
                Server(Stario(), **given)
        tracers: list[Any] = [JsonTracer, "json", print]
        for tracer in tracers:
            with self.subTest(tracer), self.assertRaisesRegex(StarioError, "a tracer is needed"):
                Stario(tracer)

    async def test_the_url_can_be_opened_whatever_the_host_was(self) -> None:
        for host in ("", "0.0.0.0", "0", "localhost", "127.0.0.1"):
            async with echo_app().running(host=host) as server:
                where = urlsplit(server.url)
                self.assertNotIn(where.hostname, (None, "", "0", "0.0.0.0", "::"))
                peer = await Peer.connect(where.port or 0, str(where.hostname))
                self.assertEqual((await within(peer.get("/x"))).status, 200)
                await peer.close()

    async def test_port_0_is_a_free_port_and_servers_do_not_disturb_each_other(self) -> None:
        async with echo_app().running() as one, echo_app().running(port=0) as two:
            self.assertNotEqual(one.port, two.port)
            for server in (one, two):
                self.assertEqual(server.url, f"http://127.0.0.1:{server.port}")
                peer = await Peer.connect(server.port)
                self.assertEqual((await within(peer.get("/"))).status, 200)
                await peer.close()
        with self.assertRaises(ConnectionRefusedError):
            await Peer.connect(one.port)

    async def test_a_taken_port_is_one_clear_sentence(self) -> None:
        async with echo_app().running() as server:
            with self.assertRaisesRegex(StarioError, f"127.0.0.1:{server.port}: the port is taken"):
                async with echo_app().running(port=server.port):
                    pass

    async def test_a_bad_option_is_one_clear_sentence(self) -> None:
        for options, words in (
            ({"max_conections": 1}, "no option 'max_conections'"),
            ({"header_timeout": 0}, "header_timeout is 0"),
            ({"max_headers": "10"}, "max_headers is '10'"),
            ({"body_timeout": None}, "body_timeout is None"),
            ({"write_timeout": float("nan")}, "write_timeout is nan"),
            ({"workers": 0}, "workers is 0: a whole number from 1 up"),
        ):
            with self.subTest(words), self.assertRaisesRegex(StarioError, words):
                Server(Stario(), **options)

    async def test_workers_that_cannot_start_leave_nothing_behind(self) -> None:
        """Too many for the system's limits: one sentence, and those that have started end."""

        def second_fails(real: Any, problem: Exception) -> Callable[..., Any]:
            calls: list[object] = []

            def call(*given: Any, **named: Any) -> Any:
                calls.append(given)
                if len(calls) == 2:
                    raise problem
                return real(*given, **named)

            return call

        problems: list[tuple[Any, str, Exception]] = [
            (asyncio, "Runner", OSError(errno.EMFILE, "Too many open files")),
            (stario, "_Threads", OSError(errno.ENOMEM, "Cannot allocate memory")),
            (threading.Thread, "start", RuntimeError("can't start new thread")),
        ]
        for owner, name, problem in problems:
            server = Server(echo_app(), port=0, workers=9)
            with (
                mock.patch.object(owner, name, second_fails(getattr(owner, name), problem)),
                self.assertRaisesRegex(StarioError, f"cannot start 9.*{problem.args[-1]}"),
            ):
                await server.start()
            self.assertNotIn("stario-1", [thread.name for thread in threading.enumerate()])
            await server.start()
            with self.assertRaisesRegex(StarioError, "runs already"):
                await server.start()
            peer = await Peer.connect(server.port)
            self.assertEqual((await within(peer.get())).status, 200)
            await peer.close()
            await server.stop()
            await server.stop()

    async def test_a_stop_that_is_cancelled_ends_the_threads_too(self) -> None:
        server = Server(echo_app(), port=0, workers=2)
        await server.start()
        peer = await Peer.connect(server.port)
        await until(lambda: connections_of(server))
        stopping = asyncio.create_task(server.stop())
        await until(lambda: not server._listener.sockets)
        stopping.cancel()
        with self.assertRaises(asyncio.CancelledError):
            await within(stopping)
        self.assertNotIn("stario-1", [thread.name for thread in threading.enumerate()])
        await peer.close()

    async def test_ipv6(self) -> None:
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:
            self.skipTest("this machine has no IPv6")

        async def show(c: Context, w: Writer) -> None:
            w.text(f"{c.req.client} {c.req.host}")

        app = Stario()
        app.get("/", show)
        async with app.running(host="::1") as server:
            self.assertEqual(server.url, f"http://[::1]:{server.port}")
            peer = await Peer.connect(server.port, "::1")
            await peer.send("GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n")
            self.assertEqual((await within(peer.answer())).text, "::1 [::1]")
            await peer.close()

    async def test_an_address_family_that_is_missing_does_not_hinder_the_other(self) -> None:
        """`localhost` has two addresses, in containers often without IPv6."""
        both = [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("2001:db8::1", 0, 0, 0)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
        ]
        with mock.patch("socket.getaddrinfo", return_value=both):
            server = Server(echo_app(), "localhost", 0)
            await server.start()
        peer = await Peer.connect(server.port)
        self.assertEqual((await within(peer.get("/"))).status, 200)
        await peer.close()
        await server.stop()
        with (
            mock.patch("socket.getaddrinfo", return_value=both[:1]),
            self.assertRaisesRegex(StarioError, "cannot listen on localhost"),
        ):
            await Server(echo_app(), "localhost", 0).start()


@unittest.skipUnless(hasattr(socket, "AF_UNIX"), "needs Unix sockets")
class TestUnixSockets(HttpTest):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = Path(folder.name, "socket")

    async def test_a_unix_socket_has_its_permissions_and_is_removed_in_the_end(self) -> None:
        async def show(c: Context, w: Writer) -> None:
            w.text(f"<{c.req.client}>")

        app = Stario()
        app.get("/", show)
        options: dict[str, Any] = {}
        for mode in (0o660, 0o600):
            async with app.running(unix_socket=self.path, **options) as server:
                self.assertEqual(server.url, f"unix:{self.path}")
                self.assertEqual(stat.S_IMODE(self.path.stat().st_mode), mode)
                peer = Peer(*await asyncio.open_unix_connection(str(self.path)))
                self.assertEqual((await within(peer.get("/"))).text, "<>")
                await peer.close()
            self.assertFalse(self.path.exists())
            options["unix_mode"] = 0o600

    async def test_a_program_may_change_its_folder_meanwhile(self) -> None:
        with contextlib.chdir(self.path.parent):
            server = Server(echo_app(), unix_socket="socket")
            await server.start()
        self.assertTrue(self.path.exists())
        await server.stop()
        self.assertFalse(self.path.exists())

    async def test_a_stale_socket_file_is_replaced(self) -> None:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(self.path))
        async with echo_app().running(unix_socket=self.path):
            peer = Peer(*await asyncio.open_unix_connection(str(self.path)))
            self.assertEqual((await within(peer.get("/"))).status, 200)
            await peer.close()

    async def test_what_is_not_ours_is_left_alone(self) -> None:
        async with echo_app().running(unix_socket=self.path):
            with self.assertRaisesRegex(StarioError, "another server is listening there"):
                await Server(echo_app(), unix_socket=self.path).start()
            self.assertTrue(self.path.exists())
        with socket.socket(socket.AF_UNIX) as hung, contextlib.ExitStack() as waiting:
            hung.bind(str(self.path.with_name("hung")))
            hung.listen(0)
            with contextlib.suppress(BlockingIOError):
                while True:  # until no more wait in its backlog
                    client = waiting.enter_context(socket.socket(socket.AF_UNIX))
                    client.setblocking(False)
                    client.connect(hung.getsockname())
            with self.assertRaisesRegex(StarioError, "cannot listen on"):
                await Server(echo_app(), unix_socket=hung.getsockname()).start()
        self.path.write_text("precious")
        with self.assertRaisesRegex(StarioError, "it is no socket"):
            await Server(echo_app(), unix_socket=self.path).start()
        self.assertEqual(self.path.read_text(), "precious")
        with self.assertRaisesRegex(StarioError, "path too long"):
            await Server(echo_app(), unix_socket=self.path.with_name("x" * 200)).start()

    async def test_a_server_that_is_stopping_leaves_the_file_of_its_successor_alone(self) -> None:
        """File systems give the number of an inode that was freed to the next file."""
        app, closed = echo_app(), asyncio.Event()

        @app.lifespan
        @asynccontextmanager
        async def slow(app: Stario) -> AsyncIterator[None]:
            yield
            await closed.wait()

        old, new = Server(app, unix_socket=self.path), Server(echo_app(), unix_socket=self.path)
        await old.start()
        stopping = asyncio.create_task(old.stop())
        while self.path.exists():
            await asyncio.sleep(0.001)
        await new.start()
        with mock.patch("os.path.samestat", return_value=True):
            closed.set()
            await within(stopping)
        self.assertTrue(self.path.exists())
        await new.stop()
        self.assertFalse(self.path.exists())


@needs("openssl")
class TestTls(HttpTest):
    server_side: ClassVar[ssl.SSLContext]
    client_side: ClassVar[ssl.SSLContext]

    @classmethod
    def setUpClass(cls) -> None:
        with tempfile.TemporaryDirectory() as folder:
            key, certificate = f"{folder}/key.pem", f"{folder}/certificate.pem"
            make = (
                "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
            )
            make += " -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
            command = [*make.split(), "-keyout", key, "-out", certificate]
            subprocess.run(command, check=True, capture_output=True)
            cls.server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            cls.server_side.load_cert_chain(certificate, key)
            cls.client_side = ssl.create_default_context(cafile=certificate)

    async def connect(self, server: Server) -> Peer:
        return await within(Peer.connect(server.port, ssl=self.client_side))  # type: ignore[no-any-return]

    async def test_https(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "large.bin").write_bytes(os.urandom(3_000_000))
            app = echo_app()
            app.assets("/static", folder)
            async with app.running(ssl=self.server_side) as server:
                self.assertEqual(server.url, f"https://127.0.0.1:{server.port}")
                peer = await self.connect(server)
                for _ in range(2):
                    self.assertEqual(understood(await within(peer.get("/x")))[1], "/x")
                (connection,) = connections_of(server)
                limits = connection._transport.get_write_buffer_limits()
                self.assertEqual(limits[1], 64 * 1024)  # as README says, with TLS, too
                answer = await within(peer.get(f"/static/{asset('large.bin')}"))
                self.assertEqual(answer.body, Path(folder, "large.bin").read_bytes())
                await peer.close()
                await until(lambda: not connections_of(server))

    async def test_a_restart_loses_no_request(self) -> None:
        test = TestRestarts()
        test.setUp()
        await test.restarts(2, {"port": 0}, ssl=self.server_side)

    async def test_clients_that_idle_hold_up_no_stop(self) -> None:
        with (
            mock.patch.object(stario, "_IDLE_GRACE", 0.05),
            mock.patch.object(stario, "_LINGER", 0.1),
        ):
            server = Server(echo_app(), port=0, ssl=self.server_side, graceful_timeout=600)
            await server.start()
            idle = await self.connect(server)
            await within(idle.get("/"))
            idle.writer.transport.pause_reading()  # type: ignore[attr-defined]
            silent = socket.create_connection(("127.0.0.1", server.port))  # no greeting
            await until(lambda: len(server._workers[0].arriving) == 1)
            await within(server.stop())
            silent.close()
            idle.writer.transport.abort()

    async def test_a_stop_in_the_middle_of_greetings_loses_no_finally(self) -> None:
        """A connection that is just made is not forgotten, and no descriptor is closed under it."""
        begun, ended = [], []

        async def wait(c: Context, w: Writer) -> None:
            begun.append(c)
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(c)

        app = Stario(Tracer())
        app.get("/", wait)

        async def visit(port: int) -> None:
            with suppress(OSError):
                peer = await Peer.connect(port, ssl=self.client_side)
                await peer.send(GET)
                await within(peer.rest())

        for turns in range(2, 60, 3):  # of the event loop
            async with app.running(ssl=self.server_side, graceful_timeout=0) as server:
                visits = [asyncio.create_task(visit(server.port)) for _ in range(10)]
                for _ in range(turns):
                    await asyncio.sleep(0)
            await within(asyncio.gather(*visits))
            self.assertEqual(len(begun), len(ended))
        self.assertTrue(begun)

    async def test_an_answer_that_is_cut_off_holds_up_no_stop(self) -> None:
        """Also where the client does not say that it has seen the end (TLS's close_notify)."""
        go_on = asyncio.Event()

        async def fail(c: Context, w: Writer) -> None:
            w.write(b"some")
            await go_on.wait()
            raise HttpException(400)

        app = Stario(Spans())
        app.get("/", fail)
        with mock.patch.object(stario, "_LINGER", 0.1):
            server = Server(app, port=0, ssl=self.server_side, graceful_timeout=600)
            await server.start()
            peer = await self.connect(server)
            await peer.send(GET)
            await within(peer.head())
            peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
            go_on.set()
            await within(server.stop())
            peer.writer.transport.abort()

    async def test_a_client_that_has_gone_is_noticed_between_two_writes(self) -> None:
        """Else a file of gigabytes is read to its end for nobody, and holds up the event loop."""
        written: list[int] = []
        gone = asyncio.Event()

        async def write_on(c: Context, w: Writer) -> None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
            try:
                for size in [10_000] * 50:
                    w.write(bytes(size))
                    await w.drain()
                    written.append(size)
            finally:
                gone.set()

        app = Stario(Tracer())
        app.get("/", write_on)
        async with app.running(ssl=self.server_side) as server:

            def connect() -> ssl.SSLSocket:
                plain = socket.create_connection(("127.0.0.1", server.port))
                return self.client_side.wrap_socket(plain, server_hostname="127.0.0.1")

            client = await asyncio.to_thread(connect)
            client.sendall(GET.encode())
            await within(gone.wait())
        self.assertLess(len(written), 10)

    async def test_an_answer_that_ends_its_connection_can_be_drained(self) -> None:
        """asyncio closes both sides at once; what was written still goes out."""
        drained: list[int] = []

        async def page(c: Context, w: Writer) -> None:
            size = int(c.req.query["size"])
            w.respond(bytes(size), "text/plain")
            await w.drain()
            drained.append(size)

        app = Stario()
        app.get("/", page)
        async with app.running(ssl=self.server_side) as server:
            for size in (1, 5_000_000):
                peer = await self.connect(server)
                await peer.send(f"GET /?size={size} HTTP/1.1\r\n{HOST}Connection: close\r\n\r\n")
                self.assertEqual(len((await within(peer.answer())).body), size)
                await until(lambda: not server._workers[0].tasks)
                await peer.close()
        self.assertEqual(drained, [1, 5_000_000])

    async def test_a_client_that_speaks_no_tls_is_let_go(self) -> None:
        async with echo_app().running(ssl=self.server_side) as server:
            peer = await Peer.connect(server.port)
            await peer.send(NEXT)
            with contextlib.suppress(ConnectionResetError):
                self.assertNotIn(b"HTTP", await within(peer.rest()))
            await peer.close()
            peer = await self.connect(server)
            self.assertEqual((await within(peer.get("/"))).status, 200)
            await peer.close()

    async def test_handshakes_that_do_not_come_are_counted(self) -> None:
        options: dict[str, Any] = {
            "ssl": self.server_side,
            "header_timeout": 1000.0,
            "max_connections": 2,
        }
        with mock.patch("stario._MAX_EXCESS", 0):
            async with echo_app().running(**options) as server:
                silent = [await Peer.connect(server.port) for _ in range(2)]
                await until(lambda: len(server._workers[0].arriving) == 2)
                third = await Peer.connect(server.port)
                with contextlib.suppress(ConnectionResetError):
                    self.assertEqual(await within(third.rest()), b"")
                for peer in (*silent, third):
                    await peer.close()
                await until(lambda: len(server._workers[0].arriving) == 0)
                peer = await self.connect(server)
                self.assertEqual((await within(peer.get("/"))).status, 200)
                await peer.close()

    async def test_a_handshake_has_to_come_in_time(self) -> None:
        async with echo_app().running(ssl=self.server_side, header_timeout=0.2) as server:
            peer = await Peer.connect(server.port)
            with contextlib.suppress(ConnectionResetError):
                self.assertEqual(await within(peer.rest()), b"")
            await peer.close()

    async def test_a_client_that_does_not_take_its_answer_is_cut_off(self) -> None:
        ended = asyncio.Event()

        async def flood(c: Context, w: Writer) -> None:
            with contextlib.suppress(ClientDisconnected):
                while True:
                    w.write(bytes(65536))
                    await w.drain()
            ended.set()

        app = Stario()
        app.get("/", flood)
        async with app.running(ssl=self.server_side, write_timeout=0.2) as server:
            peer = await self.connect(server)
            await peer.send(f"GET / HTTP/1.1\r\n{HOST}\r\n")
            await within(peer.head())
            stop_reading(peer)
            await within(ended.wait())
            await until(lambda: not connections_of(server))
            peer.writer.transport.abort()

    async def test_a_refused_client_can_read_why(self) -> None:
        """RFC 9112, section 9.6: TLS cannot close one side only, so the client has to."""
        async with echo_app(max_body=1000).running(ssl=self.server_side) as server:
            peer = await self.connect(server)
            await peer.send(f"POST / HTTP/1.1\r\n{HOST}Content-Length: 5000000\r\n\r\n")
            await within(peer.send(*[bytes(100_000)] * 50))
            self.assertEqual((await within(peer.answer())).status, 413)
            await peer.close()

    async def test_nothing_is_read_behind_a_request_that_closes(self) -> None:
        """RFC 9112, section 9.6."""
        seen: list[str] = []

        async def note(c: Context, w: Writer) -> None:
            seen.append(c.req.path)
            w.text("ok")

        app = Stario()
        app.get("/*", note)
        with mock.patch("stario._LINGER", 0.1):
            async with app.running(ssl=self.server_side, keep_alive_timeout=0.2) as server:
                peer = await self.connect(server)
                await peer.send(f"GET /1 HTTP/1.1\r\n{HOST}Connection: close\r\n\r\n{NEXT}{NEXT}")
                self.assertEqual((await within(peer.rest())).count(b"HTTP/1.1"), 1)
                await peer.close()
        self.assertEqual(seen, ["/1"])


async def connect_to(place: dict[str, Any], tls: Any = None) -> Peer:
    if "unix_socket" in place:
        return Peer(*await asyncio.open_unix_connection(place["unix_socket"]))
    return await Peer.connect(place["port"], ssl=tls and TestTls.client_side)


class TestThreads(StreamTest):
    async def test_workers_hear_each_other_and_clean_up(self) -> None:
        lock = threading.Lock()
        cleaned = 0
        threads: set[str] = set()

        async def stream(c: Context, w: Writer) -> None:
            nonlocal cleaned
            events = self.relay.subscribe("*")
            w.event("thread", threading.current_thread().name)
            async for _, data in w.alive(events):
                w.event("said", data)
            with lock:
                cleaned += 1

        async def say(c: Context, w: Writer) -> None:
            w.empty()
            with lock:
                threads.add(threading.current_thread().name)
            self.relay.publish("said", c.req.query.get("text", ""))

        app = Stario(Tracer())
        app.get("/", stream)
        app.get("/say", say)
        async with app.running(workers=4) as server:
            peers = [await open_stream(server.port) for _ in range(40)]
            for number in range(8):  # one connection each, so that each worker gets its turn
                speaker = await Peer.connect(server.port)
                self.assertEqual((await speaker.get(f"/say?text={number}")).status, 204)
                await speaker.close()
                for peer in peers:
                    chunk = await within(peer.chunk())
                    self.assertEqual(chunk, b"event: said\ndata: %d\n\n" % number)
            for peer in peers[:20]:
                peer.reset()
        self.assertEqual(len(threads), 4)
        self.assertEqual(cleaned, 40)
        self.assertTrue(is_empty(self.relay))
        for peer in peers:
            await peer.close()

    async def test_no_thread_is_left_after_the_server(self) -> None:
        before = set(threading.enumerate())

        async def hello(c: Context, w: Writer) -> None:
            w.text("hello")

        async with connected(self.app(hello), workers=3) as peer:
            self.assertEqual((await peer.get()).text, "hello")
            names = {thread.name for thread in set(threading.enumerate()) - before}
            self.assertEqual({name for name in names if "stario" in name}, {"stario-1", "stario-2"})
        left = [t.name for t in threading.enumerate() if t.name.startswith("stario")]
        self.assertEqual(left, [])


@dataclass
class PageSignals:
    page: int


class TestUvloop(unittest.TestCase):
    """The event loop is the caller's; workers get one of the same kind."""

    @needs("uvloop")
    def test_everything_goes_on_another_event_loop(self) -> None:
        uvloop = importlib.import_module("uvloop")
        app = Stario()
        relay: Relay[str] = Relay()
        loops: set[str] = set()

        async def page(c: Context, w: Writer) -> None:
            loops.add(type(asyncio.get_running_loop()).__module__)
            w.text("page")

        async def stream(c: Context, w: Writer) -> None:
            w.event("hello")
            async for _, text in w.alive(relay.subscribe("*")):
                w.event("news", text)

        async def visit(large: bytes) -> None:
            async with app.running(workers=3) as server:
                for _ in range(6):
                    peer = await Peer.connect(server.port)
                    self.assertEqual((await peer.get()).text, "page")
                    answer = await peer.get("/files/" + asset("large", collection="uv"))
                    self.assertEqual(answer.body, large)
                    await peer.close()
                peers = [await Peer.connect(server.port) for _ in range(6)]
                for peer in peers:
                    await peer.send("GET /stream HTTP/1.1\r\nHost: x\r\n\r\n")
                    await peer.head()
                    await peer.chunk()
                relay.publish("x", "later")
                for peer in peers:
                    self.assertIn(b"later", await within(peer.chunk()))
            for peer in peers:
                self.assertEqual(await within(peer.rest()), b"0\r\n\r\n")
                await peer.close()

        with tempfile.TemporaryDirectory() as folder:
            large = os.urandom(2_000_000)
            Path(folder, "large").write_bytes(large)
            app.assets("/files", folder, collection="uv")
            app.get("/", page)
            app.get("/stream", stream)
            loop = uvloop.new_event_loop()
            try:
                loop.run_until_complete(visit(large))
            finally:
                loop.close()
        self.assertEqual(loops, {"uvloop"})


SHUTDOWN = """
    import asyncio, sys
    from stario import Relay, Stario, h

    relay, ended = Relay(), []

    async def stream(c, w):
        w.patch(h.P({"id": "p"}))
        async for _ in w.alive(relay.subscribe("*")):
            pass
        await asyncio.sleep(0.01)
        ended.append(1)

    async def stubborn(c, w):
        w.patch(h.P({"id": "p"}))
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)
            ended.append(1)

    async def main():
        app = Stario()
        app.get("/", stream)
        app.get("/stubborn", stubborn)
        async with app.running(workers=2, graceful_timeout=GRACE) as server:
            print(server.port, flush=True)
            await server.wait_for_signal()
        print(len(ended), len(relay._tables), flush=True)

    asyncio.run(main())
"""


class TestShutdown(StreamTest):
    async def stopped_by(self, number: int, grace: float, *paths: str) -> tuple[list[str], int]:
        """What a server with these streams says after a signal, and its exit code."""
        process = await run_python(SHUTDOWN.replace("GRACE", str(grace)))
        assert process.stdout
        try:
            port = int(await within(process.stdout.readline()))
            peers = [await open_stream(port, path) for path in paths]
            process.send_signal(number)
            said = (await within(process.stdout.read(), 20)).decode().split()
            for peer in peers:
                await within(peer.rest())
                await peer.close()
            return said, await within(process.wait())
        finally:
            if process.returncode is None:
                process.kill()

    @unittest.skipIf(sys.platform == "win32", "Windows has no SIGTERM to send")
    async def test_a_signal_ends_a_hundred_streams_with_their_cleanup(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(number):
                # A grace without end: so it is the streams that end, and not the grace.
                said = await self.stopped_by(number, 600, *["/"] * 100)
                self.assertEqual(said, (["100", "0"], 0))

    @unittest.skipIf(sys.platform == "win32", "Windows has no SIGTERM to send")
    async def test_what_does_not_end_is_cancelled_after_the_grace(self) -> None:
        said = await self.stopped_by(signal.SIGTERM, 0.2, "/", "/stubborn", "/")
        self.assertEqual(said, (["3", "0"], 0))

    async def test_a_request_under_way_is_answered(self) -> None:
        async def handler(c: Context, w: Writer) -> None:
            self.ready.set()
            while not w.shutting_down:
                await asyncio.sleep(0)
            await asyncio.sleep(0.01)
            w.text("finished")

        async with self.app(handler).running() as server:
            peer = await Peer.connect(server.port)
            await peer.send(GET)
            await within(self.ready.wait())
        answer = await within(peer.answer())
        self.assertEqual(answer.text, "finished")
        self.assertEqual(await within(peer.rest()), b"")
        await peer.close()

    async def test_idle_connections_close_and_new_ones_are_refused(self) -> None:
        async def handler(c: Context, w: Writer) -> None:
            w.text("hello")

        async with self.app(handler).running() as server:
            peer = await Peer.connect(server.port)
            await peer.get()
        self.assertEqual(await within(peer.rest()), b"")
        await peer.close()
        with self.assertRaises(OSError):
            await Peer.connect(server.port)

    async def test_a_stream_that_a_slow_reader_does_not_take_does_not_hang_it(self) -> None:
        async def handler(c: Context, w: Writer) -> None:
            async for _ in w.alive():
                w.event("large", "x" * 2**16)
                self.ready.set()
            self.log.append("cleanup")

        app = self.app(handler)
        async with app.running(graceful_timeout=0.2) as server:
            peer = await Peer.connect(server.port)
            stop_reading(peer)
            await peer.send(GET)
            await within(self.ready.wait())
            (worker,) = server._workers
        self.assertEqual(self.log, ["cleanup"])
        self.assertEqual(worker.connections, set())
        await peer.close()


class TestStopping(StreamTest):
    """A stop loses nothing that a client has asked for, and takes a bounded time."""

    async def hello(self, c: Context, w: Writer) -> None:
        w.text("hello")

    @asynccontextmanager
    async def stopping(self, server: Server) -> AsyncIterator[asyncio.Task[None]]:
        """From the first moment of a stop to its end."""
        task = asyncio.create_task(server.stop())
        await until(lambda: not server._listener.sockets)
        yield task
        await within(task)

    async def test_every_answer_from_then_on_says_that_its_connection_ends(self) -> None:
        begun = asyncio.Event()
        go_on = asyncio.Event()

        async def two_parts(c: Context, w: Writer) -> None:
            w.write(b"first")
            begun.set()
            await go_on.wait()
            w.end(b"second")

        async def late(c: Context, w: Writer) -> None:
            await go_on.wait()
            w.text("late")

        app = self.app(self.hello)
        app.get("/two", two_parts)
        app.get("/late", late)
        server = Server(app, port=0)
        await server.start()
        idle, fresh, two, waiting = [await Peer.connect(server.port) for _ in range(4)]
        await idle.get()
        await two.send("GET /two HTTP/1.1\r\nHost: x\r\n\r\n")
        await waiting.send("GET /late HTTP/1.1\r\nHost: x\r\n\r\n")
        await within(begun.wait())
        async with self.stopping(server):
            for peer in (idle, fresh):
                answer = await within(peer.get())
                self.assertEqual((answer.text, answer.headers["connection"]), ("hello", "close"))
            go_on.set()
            answer = await within(waiting.answer())
            self.assertEqual((answer.text, answer.headers["connection"]), ("late", "close"))
            # Its head was out before the stop: so the next request is still answered.
            self.assertEqual((await within(two.answer())).text, "firstsecond")
            self.assertEqual((await within(two.get())).headers["connection"], "close")
            for peer in (idle, fresh, two, waiting):
                self.assertEqual(await within(peer.rest()), b"")
                await peer.close()

    async def test_a_stop_that_is_cancelled_still_leaves_the_lifespans_last(self) -> None:
        async def slow(c: Context, w: Writer) -> None:
            self.ready.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.log.append("handler")

        @asynccontextmanager
        async def database(app: Stario) -> AsyncIterator[None]:
            yield
            self.log.append("closed")

        app = self.app(slow)
        app.lifespan(database)
        server = Server(app, port=0, graceful_timeout=60)
        await server.start()
        peer = await Peer.connect(server.port)
        await peer.send(GET)
        await within(self.ready.wait())
        with self.assertRaises(asyncio.CancelledError):
            async with self.stopping(server) as task:
                task.cancel()
        self.assertEqual(self.log, ["handler", "closed"])
        await peer.close()

    async def test_what_waits_to_be_accepted_is_answered(self) -> None:
        for workers in (1, 2):
            server = Server(self.app(self.hello), port=0, workers=workers)
            await server.start()
            waiting = []
            for _ in range(20):  # without a moment for the event loop
                client = socket.create_connection(("127.0.0.1", server.port))
                client.sendall(GET.encode())
                waiting.append(client)
            await within(server.stop())
            for client in waiting:
                with client:
                    client.settimeout(5)
                    self.assertTrue(client.recv(1000).startswith(b"HTTP/1.1 200 "))

    async def test_a_client_that_says_nothing_holds_nothing_up(self) -> None:
        with mock.patch.object(stario, "_IDLE_GRACE", 0.05):
            server = Server(self.app(self.hello), port=0, graceful_timeout=600)
            await server.start()
            peer = await Peer.connect(server.port)
            await until(lambda: server._workers[0].connections)
            await within(server.stop())
            self.assertEqual(await within(peer.rest()), b"")
            await peer.close()

    async def test_a_stream_whose_request_does_not_end_holds_nothing_up(self) -> None:
        async def stay(c: Context, w: Writer) -> None:
            self.start(w)
            async with w.alive():
                await asyncio.Event().wait()

        server = Server(self.app(stay), port=0, graceful_timeout=600)
        await server.start()
        peer = await Peer.connect(server.port)
        with mock.patch.object(stario, "_LINGER", 0.05):
            await peer.send(f"GET / HTTP/1.1\r\n{HOST}Content-Length: 9\r\n\r\nnot all")
            await within(self.ready.wait())
            await within(server.stop())
        self.assertIn(b"\r\n0\r\n\r\n", await within(peer.rest()))
        await peer.close()

    async def test_a_start_that_is_cancelled_leaves_no_thread(self) -> None:
        """By a signal, say, while the workers start."""
        server = Server(echo_app(), port=0, workers=3)
        starting = asyncio.create_task(server.start())
        while not server._threads:
            await asyncio.sleep(0)
        starting.cancel()
        with suppress(asyncio.CancelledError):
            await starting
            await server.stop()
        names = [thread.name for thread in threading.enumerate()]
        self.assertEqual([name for name in names if re.fullmatch("stario-[0-9]+", name)], [])

    async def test_a_worker_that_is_blocked_is_left_behind(self) -> None:
        release = threading.Event()

        async def block(c: Context, w: Writer) -> None:
            if threading.current_thread() is not threading.main_thread():
                release.wait(30)
            w.empty()

        with mock.patch.object(stario, "_CLEANUP", 0.05):
            server = Server(self.app(block), port=0, workers=2, graceful_timeout=0.1)
            await server.start()
            peers = [await Peer.connect(server.port) for _ in range(2)]
            for peer in peers:
                await peer.send(GET)
            await within(server.stop())
            release.set()
            for peer in peers:
                await peer.close()

    async def test_a_worker_outlives_what_ends_its_loop(self) -> None:
        async def stop_loop(c: Context, w: Writer) -> None:
            if threading.current_thread() is not threading.main_thread():
                loop = asyncio.get_running_loop()
                loop.set_exception_handler(lambda loop, context: None)
                loop.call_soon(sys.exit, 3)
                loop.call_soon(loop.stop)
            w.text(threading.current_thread().name)

        async with self.app(stop_loop).running(workers=2) as server:
            answered = []
            for _ in range(6):
                peer = await Peer.connect(server.port)
                answered.append((await within(peer.get())).text)
                await peer.close()
        self.assertEqual(answered.count("stario-1"), 3)

    async def test_threads_of_to_thread_do_not_hold_up_the_end(self) -> None:
        script = """
            import asyncio, time
            from stario import Stario

            async def blocked(c, w):
                w.empty()
                await asyncio.to_thread(time.sleep, 600)

            async def main():
                app = Stario()
                app.get("/", blocked)
                async with app.running(graceful_timeout=0.1) as server:
                    print(server.port, flush=True)
                    await server.wait_for_signal()

            async def serve():
                asyncio.get_running_loop().set_default_executor(__import__("stario")._Threads())
                await main()

            asyncio.run(serve())
        """
        process = await run_python(script)
        assert process.stdout
        peer = await Peer.connect(int(await within(process.stdout.readline())))
        self.assertEqual((await within(peer.get())).status, 204)
        process.terminate()
        self.assertEqual(await within(process.wait()), 0)
        await peer.close()

    async def test_threads_of_our_own_do_what_threads_of_a_pool_do(self) -> None:
        threads = stario._Threads()
        asyncio.get_running_loop().set_default_executor(threads)
        names = await asyncio.gather(*(asyncio.to_thread(str, number) for number in range(200)))
        self.assertEqual(names, [str(number) for number in range(200)])
        self.assertLessEqual(threads._started, threads._max_workers)
        with self.assertRaises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 / 0)
        with self.assertRaisesRegex(RuntimeError, "StopIteration"):
            await within(asyncio.to_thread(next, iter(())))

    async def test_threads_that_could_not_start_do_not_count(self) -> None:
        threads = stario._Threads()
        with mock.patch("threading.Thread.start", side_effect=RuntimeError("can't start")):
            for _ in range(threads._max_workers):
                with self.assertRaisesRegex(RuntimeError, "can't start"):
                    threads.submit(str)
        self.assertEqual(await within(asyncio.wrap_future(threads.submit(str, 7))), "7")
        threads.shutdown()


@unittest.skipIf(sys.platform == "win32", "Windows sends no signals")
class TestSignalHandlers(StreamTest):
    async def serving(self, *servers: Stario) -> list[asyncio.Task[None]]:
        tasks = [asyncio.create_task(app.serve(port=0)) for app in servers]
        await until(lambda: len(stario._awaiting_signal) == len(servers))
        return tasks

    async def test_a_signal_stops_all_servers_and_handlers_are_put_back(self) -> None:
        mine: list[int] = []
        for name in ("SIGTERM", "SIGINT", "SIGHUP"):
            number = getattr(signal, name)
            before = signal.signal(number, lambda number, _: mine.append(number))
            try:
                tasks = await self.serving(Stario(), Stario())
                os.kill(os.getpid(), number)
                await within(asyncio.gather(*tasks))
                self.assertEqual(mine, [])
                os.kill(os.getpid(), number)
                self.assertEqual(mine, [number])
            finally:
                signal.signal(number, before)
                mine.clear()

    async def test_a_signal_while_it_starts_leaves_what_has_been_entered(self) -> None:
        steps: list[str] = []
        slow = asyncio.Event()

        @asynccontextmanager
        async def database(app: Stario) -> AsyncIterator[None]:
            steps.append("open")
            try:
                yield
            finally:
                steps.append("closed")

        @asynccontextmanager
        async def migration(app: Stario) -> AsyncIterator[None]:
            slow.set()
            await asyncio.Event().wait()
            yield

        for name in ("SIGTERM", "SIGINT", "SIGHUP"):
            number = getattr(signal, name)
            before = signal.signal(number, signal.SIG_DFL)
            try:
                app = Stario()
                app.lifespan(database)
                app.lifespan(migration)
                task = asyncio.create_task(app.serve(port=0))
                await within(slow.wait())
                os.kill(os.getpid(), number)
                await within(task)
                self.assertEqual((steps, task.cancelling()), (["open", "closed"], 0))
                self.assertEqual(signal.getsignal(number), signal.SIG_DFL)
            finally:
                signal.signal(number, before)
                steps.clear()
                slow.clear()

    async def test_who_cancels_a_server_that_starts_is_told(self) -> None:
        begun = asyncio.Event()

        @asynccontextmanager
        async def slow(app: Stario) -> AsyncIterator[None]:
            begun.set()
            await asyncio.Event().wait()
            yield

        app = Stario()
        app.lifespan(slow)
        task = asyncio.create_task(app.serve(port=0))
        await within(begun.wait())
        task.cancel()
        with self.assertRaises(asyncio.CancelledError):
            await within(task)
        self.assertEqual(stario._earlier_handlers, {})

    async def test_one_of_two_that_ends_leaves_the_signals_to_the_other(self) -> None:
        first, second = await self.serving(Stario(), Stario())
        first.cancel()
        with suppress(asyncio.CancelledError):
            await within(first)
        os.kill(os.getpid(), signal.SIGTERM)
        await within(second)
        self.assertEqual(stario._earlier_handlers, {})

    async def test_nohup_is_heeded(self) -> None:
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            (task,) = await self.serving(Stario())
            self.assertEqual(signal.getsignal(signal.SIGHUP), signal.SIG_IGN)
            os.kill(os.getpid(), signal.SIGTERM)
            await within(task)
        finally:
            signal.signal(signal.SIGHUP, before)

    async def test_a_second_signal_cancels_and_a_third_ends_the_process(self) -> None:
        async def stubborn(c: Context, w: Writer) -> None:
            self.ready.set()
            await asyncio.Event().wait()

        exits: list[int] = []
        server = Server(self.app(stubborn), port=0, graceful_timeout=600)
        await server.start()
        peer = await Peer.connect(server.port)
        await peer.send(GET)
        await within(self.ready.wait())
        with mock.patch.object(os, "_exit", exits.append):
            server._signalled(15)
            server._signalled(15)  # in the same moment: the same one
            await within(server._asked.wait())
            task = asyncio.create_task(server.stop())
            await until(lambda: server._workers[0].deadline < math.inf)
            self.assertFalse(task.done())
            server._asked_at -= 1  # a second later
            server._signalled(15)
            await within(task)
            self.assertEqual(exits, [])
            server._asked_at -= 1
            server._signalled(15)
            self.assertEqual(exits, [143])
        await peer.close()

    async def test_a_second_signal_ends_what_is_too_busy_to_see_the_first(self) -> None:
        exits: list[int] = []
        server = Server(Stario(), port=0)
        await server.start()
        with mock.patch.object(os, "_exit", exits.append):
            server._signalled(2)
            server._asked_at -= 1
            server._signalled(2)
        self.assertEqual(exits, [130])
        await server.stop()


class TestRestarts(StreamTest):
    """A second server takes the place of the first one, and no client loses a request."""

    async def restarts(self, times: int, place: dict[str, Any], **options: Any) -> None:
        names = [f"server {number}" for number in range(times + 1)]
        seen: list[set[str]] = [set() for _ in range(8)]
        over = asyncio.Event()

        async def client(seen: set[str]) -> None:
            while not over.is_set():
                peer = await connect_to(place, options.get("ssl"))
                ends = False
                while not (ends or over.is_set()):
                    answer = await within(peer.get())
                    seen.add(answer.text)
                    ends = answer.headers.get("connection") == "close"
                    await asyncio.sleep(0.005)
                await peer.close()

        current = await self.begin(names[0], place, options)
        clients = [asyncio.create_task(client(names)) for names in seen]
        for number, name in enumerate(names):
            await until(lambda name=name: all(name in names for names in seen))  # type: ignore[misc]
            if number < times:
                following = await self.begin(names[number + 1], place, options)
                await within(current.stop())
                current = following
        over.set()
        await asyncio.gather(*clients)  # one that lost a request has raised
        await current.stop()

    async def begin(self, name: str, place: dict[str, Any], options: dict[str, Any]) -> Server:
        async def hello(c: Context, w: Writer) -> None:
            w.text(name)

        server = Server(self.app(hello), **place, **options, reuse_port=True)
        await server.start()
        if "port" in place:
            place["port"] = server.port
        return server

    @unittest.skipUnless(hasattr(socket, "SO_REUSEPORT"), "needs SO_REUSEPORT")
    async def test_on_a_port(self) -> None:
        await self.restarts(3, {"port": 0})

    @unittest.skipUnless(hasattr(socket, "SO_REUSEPORT"), "needs SO_REUSEPORT")
    async def test_with_workers(self) -> None:
        await self.restarts(2, {"port": 0}, workers=3)

    @unittest.skipUnless(hasattr(socket, "AF_UNIX"), "needs Unix sockets")
    async def test_on_a_unix_socket(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            await self.restarts(3, {"unix_socket": f"{folder}/app.sock"})
            self.assertEqual(os.listdir(folder), [])

    @unittest.skipUnless(hasattr(socket, "AF_UNIX"), "needs Unix sockets")
    async def test_a_socket_file_of_another_stays(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            place = {"unix_socket": f"{folder}/app.sock"}
            first = await self.begin("first", place, {})
            os.unlink(place["unix_socket"])
            second = await self.begin("second", place, {})
            await first.stop()
            peer = await connect_to(place)
            self.assertEqual((await within(peer.get())).text, "second")
            await peer.close()
            await second.stop()

    @unittest.skipIf(sys.platform == "win32", "systemd is for Linux")
    async def test_a_socket_that_is_inherited_outlives_each_server(self) -> None:
        script = """
            import asyncio, os, sys
            os.dup2(int(sys.argv[1]), 3)  # as systemd does it
            os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
            from stario import Stario

            async def who(c, w):
                w.text(sys.argv[2] + str("LISTEN_FDS" in os.environ))

            app = Stario()
            app.get("/", who)
            asyncio.run(app.serve(port=1))
        """
        path = str(Path(stario.__file__).parent)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port, number = listening.getsockname()[1], listening.fileno()
            for name in ("first", "second"):
                # It waits in the backlog while no server runs.
                peer = await Peer.connect(port)
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-c", textwrap.dedent(script), str(number), name,
                    env={**os.environ, "PYTHONPATH": path}, pass_fds=[number],
                )  # fmt: skip
                self.assertEqual((await within(peer.get())).text, name + "False")
                process.terminate()
                self.assertEqual(await within(process.wait()), 0)
                await peer.close()

    async def test_a_socket_can_be_given(self) -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        async with self.app(self.hello).running(sock=listening) as server:
            self.assertEqual(server.port, listening.getsockname()[1])
            peer = await Peer.connect(server.port)
            self.assertEqual((await within(peer.get())).text, "hello")
            await peer.close()
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with socket.socket() as unbound, self.assertRaisesRegex(StarioError, "not bound"):
            await Server(Stario(), sock=unbound).start()
        with self.assertRaisesRegex(StarioError, "no stream socket"):
            async with Stario().running(sock=datagrams):
                pass
        with self.assertRaisesRegex(StarioError, "sock is 3: a socket.socket is needed"):
            Server(Stario(), sock=3)

    async def hello(self, c: Context, w: Writer) -> None:
        w.text("hello")

    async def test_what_windows_lacks_is_not_needed(self) -> None:
        """The functions that Python has on Unix only are taken away, and the loop's readers."""
        script = """
            import asyncio, functools, os, signal, socket, sys
            socket.socketpair = functools.partial(socket.socketpair, socket.AF_UNIX)  # for asyncio
            for module, names in (
                (os, "sendfile fork forkpty geteuid getuid fchmod chown mkfifo openpty pread"),
                (socket, "AF_UNIX SO_REUSEPORT TCP_KEEPIDLE TCP_KEEPINTVL TCP_KEEPCNT TCP_INFO"),
                (socket, "TCP_NOTSENT_LOWAT TCP_USER_TIMEOUT SCM_RIGHTS"),
                (signal, "SIGHUP SIGUSR1 SIGUSR2 SIGQUIT SIGCHLD SIGALRM"),
            ):
                for name in names.split():
                    if hasattr(module, name):
                        delattr(module, name)
            from stario import Stario, StarioError, asset

            class Loop(asyncio.SelectorEventLoop):
                def add_reader(self, *args): raise NotImplementedError
                add_writer = add_signal_handler = add_reader

            async def ask(port, path):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(f"GET {path} HTTP/1.0\\r\\n\\r\\n".encode())
                body = (await reader.read(-1)).partition(b"\\r\\n\\r\\n")[2]
                writer.close()
                return body

            async def hello(c, w): w.text("hello")

            async def main():
                app = Stario()
                app.get("/", hello)
                app.assets("/static", {"a.txt": "x" * 100_000})
                for options in ({"unix_socket": "x"}, {"reuse_port": True}):
                    try:
                        await app.serve(port=0, **options)
                    except SystemExit as exc:
                        print(exc)
                async with app.running(workers=3) as server:
                    print({(await ask(server.port, "/")).decode() for _ in range(6)})
                    print(len(await ask(server.port, "/static/" + asset("a.txt"))))
                    waiting = asyncio.ensure_future(server.wait_for_signal())
                    await asyncio.sleep(0)
                    signal.raise_signal(signal.SIGINT)
                    await waiting
                print("stopped")

            with asyncio.Runner(loop_factory=Loop) as runner:
                runner.run(main())
        """
        process = await run_python(script)
        assert process.stdout
        said = (await within(process.stdout.read())).decode().splitlines()
        await within(process.wait())
        self.assertEqual(
            said,
            ["stario: this system's Python has no Unix sockets",
             "stario: reuse_port is not supported on this system",
             "{'hello'}", "100000", "stopped"],
        )  # fmt: skip


class TestLongLife(AsyncTest):
    def test_a_million_events_reach_the_tracer_and_a_hundred_stay_in_memory(self) -> None:
        tracer = CountingTracer()
        with tracer("stream") as span:
            for number in range(1_000_000):
                span("tick", {"number": number})
        self.assertEqual(tracer.noted, 1_000_000)
        self.assertEqual([e.attributes["number"] for e in span.events], [*range(999_900, 10**6)])

    def test_json_lines_have_every_event_once_and_in_order(self) -> None:
        stream = io.StringIO()
        with JsonTracer(stream) as tracer, tracer("stream") as span:
            for number in range(1050):
                span("tick", {"number": number})
                self.assertLess(len(span.events), 101)
        lines = [json.loads(line) for line in stream.getvalue().splitlines()]
        numbers = [e["attributes"]["number"] for line in lines for e in line.get("events", ())]
        self.assertEqual(numbers, list(range(1050)))
        self.assertEqual({line["span_id"] for line in lines}, {span.id})
        self.assertLessEqual(max(len(line.get("events", ())) for line in lines), 100)
        self.assertEqual({line.get("partial") for line in lines[:-1]}, {True})
        self.assertEqual(lines[-1]["end_time_unix_nano"], span.end_ns)

    async def test_a_span_starts_and_ends_once_for_each_stream(self) -> None:
        tracer, relay, opened = CountingTracer(), Relay[str](), 20

        async def stream(c: Context, w: Writer) -> None:
            w.patch(h.P({"id": "here"}))
            async for subject, _ in w.alive(relay.subscribe("*")):
                c(subject)

        app = Stario(tracer)
        app.get("/", stream)
        async with app.running() as server:
            peers = [await open_stream(server.port) for _ in range(opened)]
            self.assertEqual((tracer.started, tracer.ended), (opened, 0))
            for number, peer in enumerate(peers):
                peer.reset() if number % 2 else await peer.close()
        self.assertEqual((tracer.started, tracer.ended), (opened, opened))

    async def test_a_stream_that_has_ended_is_let_go_at_once(self) -> None:
        """And not with its next heartbeat: asyncio keeps a cancelled timer until it is due."""
        requests, relay = [], Relay[str]()

        async def stream(c: Context, w: Writer) -> None:
            requests.append(weakref.ref(c.req))
            w.patch(h.P({"id": "here"}))
            async for _ in w.alive(relay.subscribe("*")):
                pass

        app = Stario(CountingTracer())
        app.get("/", stream)
        async with app.running() as server:
            peers = [await open_stream(server.port) for _ in range(20)]
            for peer in peers:
                await peer.close()
            await until(lambda: not any(worker.tasks for worker in server._workers))
            await until(lambda: not connections_of(server))
            gc.collect()
            self.assertEqual([request() for request in requests], [None] * 20)


# -- 11. The test client


class TestTheTestClient(AsyncTest):
    """It shows what the server does: the same code answers."""

    async def test_what_it_shows_is_what_the_server_answers(self) -> None:
        async def size(c: Context, w: Writer) -> None:
            w.text(str(len(await c.req.body())))

        app = Stario(max_body=100)
        app.get("/", size)
        app.post("/", size)
        for method, target, fields, body, limits in (
            ("GET", "/%zz", {}, b"", {}),
            ("GET", "/?" + "x" * 200, {}, b"", {"max_target": 100}),
            ("GET", "/", {f"x-{number}": "1" for number in range(12)}, b"", {"max_headers": 10}),
            ("GET", "/", {"x": "y" * 500}, b"", {"max_header_bytes": 400}),
            ("POST", "/", {}, b"x" * 101, {}),
            ("POST", "/", {"expect": "100-continue"}, b"x" * 99, {}),
            ("POST", "/", {"content-length": "x"}, b"", {}),
            ("DELETE", "/", {}, b"", {}),
            ("OPTIONS", "*", {}, b"", {}),
            ("GET", "/", {"host": "a/b"}, b"", {}),
        ):
            with self.subTest(f"{method} {target[:9]} {list(fields)[:1]}"):
                async with TestClient(app, **limits) as client:  # type: ignore[arg-type]
                    tried = await client.request(method, target, headers=fields, body=body)
                lines = {"host": "x", "content-length": str(len(body)), **fields}
                head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
                async with connected(app, **limits) as peer:
                    await peer.send(f"{method} {target} HTTP/1.1\r\n{head}\r\n", body)
                    real = await within(peer.head())
                    while real.status == 100:
                        real = await within(peer.head())
                self.assertEqual(tried.status, real.status)
                self.assertEqual(tried.headers.get("connection"), real.headers.get("connection"))

    async def test_bodies_of_any_size_pass_both_ways(self) -> None:
        async def echo(c: Context, w: Writer) -> None:
            w.write_headers(200)
            async for piece in c.req.stream():
                w.write(piece)
                await w.drain()

        app = Stario(max_body=2**24)
        app.post("/", echo)
        body = os.urandom(3_000_000)
        async with TestClient(app) as client:
            self.assertEqual((await within(client.post("/", body=body))).body, body)

    async def test_what_a_handler_raises_is_raised_in_the_test(self) -> None:
        async def fail(c: Context, w: Writer) -> None:
            if c.req.path == "/late":
                w.text("an answer")
            elif c.req.path == "/stream":
                w.event("first")
            elif c.req.path == "/exit":
                sys.exit(3)
            raise LookupError(c.req.path)

        app = Stario()
        app.get("/*", fail)
        async with TestClient(app) as client:
            for path in ("/", "/late"):
                try:
                    await client.get(path)
                except LookupError as exc:
                    self.assertEqual(str(exc), path)
                    frames = traceback.extract_tb(exc.__traceback__)
                self.assertEqual(frames[-1].name, "fail")
            with self.assertRaisesRegex(RuntimeError, r"GET /exit: its handler raised SystemExit"):
                await client.get("/exit")
            with self.assertRaisesRegex(LookupError, "/stream") as raised:
                async with client.stream("GET", "/stream") as events:
                    async for _ in events:
                        pass
            self.assertIsNone(raised.exception.__context__)  # nothing of the client's own
        with self.assertRaisesRegex(LookupError, "/late"):
            async with TestClient(app) as client:
                self.assertEqual((await client.get("/late", wait=False)).text, "an answer")

    async def test_a_time_limit_says_what_was_awaited(self) -> None:
        async def silent(c: Context, w: Writer) -> None:
            if c.req.path == "/stream":
                w.event("first", "1")
            async with w.alive():
                await asyncio.Event().wait()

        app = Stario()
        app.get("/*", silent)
        async with TestClient(app, timeout=0.05) as client:
            with self.assertRaisesRegex(
                TimeoutError, "GET /x: its answer did not come within 0.05"
            ):
                await client.get("/x")
            async with client.stream("GET", "/stream") as events:
                self.assertEqual((await anext(events)).data, "1")
                with self.assertRaisesRegex(
                    TimeoutError, r"GET /stream: the next event after ServerEvent\(event='first'"
                ):
                    await anext(events)

    async def test_who_gives_up_waiting_for_an_event_may_ask_again(self) -> None:
        relay = Relay[str]()

        async def live(c: Context, w: Writer) -> None:
            async for _, data in w.alive(relay.subscribe("*")):
                w.event("said", data)

        app = Stario()
        app.get("/", live)
        async with TestClient(app, timeout=0.1) as client, client.stream("GET", "/") as events:
            for number in "12":
                with self.assertRaises(TimeoutError):
                    await anext(events)  # by the client's own limit
                with self.assertRaises(TimeoutError):
                    await asyncio.wait_for(anext(events), 0.01)  # by the test's
                relay.publish("room", number)
                self.assertEqual((await anext(events)).data, number)

    async def test_an_answer_that_does_not_end_keeps_no_other_from_ending(self) -> None:
        ended = []

        async def stay(c: Context, w: Writer) -> None:
            w.text("answered")
            try:
                await asyncio.sleep(3600)
            finally:
                ended.append(c.req.path)

        app = Stario()
        app.get("/*", stay)
        with self.assertRaisesRegex(TimeoutError, "the end of its handler"):
            async with TestClient(app, timeout=0.05) as client:
                for path in ("/1", "/2", "/3"):
                    await client.get(path, wait=False)
        self.assertEqual(sorted(ended), ["/1", "/2", "/3"])

    async def test_it_sends_what_a_browser_would(self) -> None:
        app = echo_app()
        async with TestClient(app) as client:
            self.assertEqual((await client.request("put", "/a#top")).json()[:2], ["PUT", "/a"])
            tasks = asyncio.all_tasks()
            mistakes: list[dict[str, Any]] = [
                {"body": "text"},
                {"headers": {"x": "1\r\ny: 2"}},
                {"headers": {"": "1"}},
            ]
            for wrong in mistakes:
                with self.assertRaises(StarioError):
                    await client.post("/", **wrong)
            self.assertEqual(asyncio.all_tasks(), tasks)

    async def test_lines_of_a_stream_may_end_as_on_windows(self) -> None:
        async def raw(c: Context, w: Writer) -> None:
            w.headers.set("content-type", "text/event-stream")
            for piece in (b"data: 1\r", b"\n\r", b"\nretry: soon\nevent: x\r\ndata: 2\n\n"):
                w.write(piece)
                await w.drain()

        app = Stario()
        app.get("/", raw)
        async with TestClient(app) as client, client.stream("GET", "/") as events:
            found = [(event.event, event.data, event.retry) async for event in events]
        self.assertEqual(found, [("message", "1", None), ("x", "2", None)])

    async def test_cookies_that_an_answer_and_the_test_set(self) -> None:
        async def sets(c: Context, w: Writer) -> None:
            w.headers.add("set-cookie", c.req.query["line"])
            w.empty()

        async def shows(c: Context, w: Writer) -> None:
            w.json(c.req.cookies)

        app = Stario()
        app.get("/set", sets)
        app.get("/", shows)
        for line, kept in (
            ("a=1; Max-Age=soon; Expires=later", {"a": "1"}),
            ("a=1; Expires=Mon, 01 Jan 0001 00:00:00 GMT; Max-Age=99", {"a": "1"}),
            (" a = 1 ; path = / ", {"a": "1"}),
            ("a=1; Max-Age=" + "9" * 400, {"a": "1"}),
        ):
            async with TestClient(app) as client:
                await client.get(f"/set?line={quote(line)}")
                self.assertEqual((await client.get("/")).json(), kept, line)
        for line in ("a=1; Max-Age=0", "a=1; Path=/elsewhere", "a=1; Expires=Mon, 01 Jan 2001"):
            async with TestClient(app) as client:
                client.cookies["a"] = "old"
                await client.get(f"/set?line={quote(line)}")
                client.cookies["a"] = "mine"
                self.assertEqual((await client.get("/")).json(), {"a": "mine"}, line)

    async def test_cookies_are_kept_until_they_end_and_for_their_path(self) -> None:
        async def sets(c: Context, w: Writer) -> None:
            w.cookie("kept", "a b;ü")
            w.cookie("gone", "1", max_age=0)
            w.cookie("past", "1", expires=datetime(2001, 1, 1, tzinfo=timezone.utc))
            w.cookie("soon", "1", max_age=100)
            w.cookie("admin", "1", path="/admin")
            w.empty()

        async def shows(c: Context, w: Writer) -> None:
            w.json(c.req.cookies)

        app = Stario()
        app.get("/set", sets)
        app.get("/admin", shows)
        app.get("/administrator", shows)
        async with TestClient(app) as client:
            self.assertEqual(len((await client.get("/set")).cookies), 5)
            kept = {"kept": "a b;ü", "soon": "1"}
            self.assertEqual((await client.get("/administrator?x=/admin")).json(), kept)
            self.assertEqual((await client.get("/admin")).json(), {**kept, "admin": "1"})
            later = time.time() + 101
            with mock.patch.object(time, "time", lambda: later):
                self.assertEqual((await client.get("/administrator")).json(), {"kept": "a b;ü"})
            client.cookies["mine"] = "2"
            self.assertIn("mine", (await client.get("/admin")).json())

    async def test_redirects_are_followed_on_request(self) -> None:
        async def show(c: Context, w: Writer) -> None:
            body = (await c.req.body()).decode()
            w.text(f"{c.req.method} {c.req.path} {c.req.query.get('q', '')} {body}".strip())

        async def away(c: Context, w: Writer) -> None:
            w.redirect(c.req.query.get("to", ""), int(c.req.query.get("status", "0")))

        async def loop(c: Context, w: Writer) -> None:
            w.redirect("/loop")

        app = Stario()
        app.get("/loop", loop)
        for add in (app.get, app.post):
            add("/show", show)
            add("/away", away)
        async with TestClient(app) as client:
            for status, to, said in (
                (303, "/show?q=1", "GET /show 1"),
                (302, "show", "GET /show"),
                (307, "//testserver/show", "POST /show  body"),
                (308, "http://testserver/show", "POST /show  body"),
            ):
                path = f"/away?status={status}&to={quote(to)}"
                answer = await client.post(path, body=b"body", follow=True)
                self.assertEqual(answer.text, said)
                self.assertEqual((await client.post(path)).status, status)
            asked = await client.request("HEAD", "/away?status=303&to=/show", follow=True)
            self.assertEqual((asked.status, asked.body), (200, b""))
            elsewhere = "/away?status=303&to=https%3A//example.com/"
            self.assertEqual((await client.get(elsewhere, follow=True)).status, 303)
            with self.assertRaisesRegex(StarioError, "GET /loop: more than 20 redirects"):
                await client.get("/loop", follow=True)

    async def test_an_event_is_taken_apart_and_its_blanks_are_kept(self) -> None:
        async def show(c: Context, w: Writer) -> None:
            w.patch(SafeString("<pre id='x'>\n  two: blanks\n</pre>"), id="7", retry=900)
            w.event("plain", "a: b\n c")

        app = Stario()
        app.get("/", show)
        async with TestClient(app) as client, client.stream("GET", "/") as events:
            first, second = [event async for event in events]
        self.assertEqual(first.elements, "<pre id='x'>\n  two: blanks\n</pre>")
        self.assertEqual((first.id, first.retry), ("7", 900))
        self.assertEqual((second.event, second.data, second.id), ("plain", "a: b\n c", None))

    async def test_files_and_signals_of_a_dataclass_are_sent(self) -> None:
        async def upload(c: Context, w: Writer) -> None:
            form = await c.req.form()
            (file,) = form.files["photo"]
            w.json([form.get("title"), file.filename, len(file.data)])

        async def signals(c: Context, w: Writer) -> None:
            w.json(await c.signals())

        app = Stario()
        app.post("/upload", upload)
        app.post("/signals", signals)
        app.get("/signals", signals)
        photo = os.urandom(3000)
        async with TestClient(app) as client:
            answer = await client.post(
                "/upload", form={"title": "A cat"}, files={"photo": ("cat.png", photo)}
            )
            self.assertEqual(answer.json(), ["A cat", "cat.png", 3000])
            for ask in (client.get, client.post):
                answer = await ask("/signals", signals=PageSignals(3))
                self.assertEqual(answer.json(), {"page": 3})
                answer = await ask("/signals", signals={"files": [{"contents": b"\xff"}]})
                self.assertEqual(answer.json(), {"files": [{"contents": "/w=="}]})

    async def test_a_form_is_the_same_with_files_and_without(self) -> None:
        async def show(c: Context, w: Writer) -> None:
            form = await c.req.form()
            names = [file.filename for files in form.files.values() for file in files]
            w.json([{name: form.getlist(name) for name in form}, names])

        app = Stario()
        app.post("/", show)
        form = {"tags": ["a", "b c"], "empty": "", "n": 7, "half \ud83d": "\ud83d"}
        async with TestClient(app) as client:
            plain, _ = (await client.post("/", form=form)).json()
            odd = 'a"b\r\ncontent-type: text/html'
            answer = await client.post("/", form=form, files={"f": (odd, b"x")})
            self.assertEqual(answer.json()[0], plain)
            self.assertEqual(plain["tags"], ["a", "b c"])
            self.assertEqual(answer.json()[1], [odd])  # it has not ended its line

    async def test_an_app_that_is_being_served_can_be_tested_too(self) -> None:
        async def hello(c: Context, w: Writer) -> None:
            w.text("hello")

        app = Stario()
        app.get("/", hello)
        async with app.running(), TestClient(app) as client:
            self.assertEqual((await client.get("/")).text, "hello")


# -- 12. Datastar: attributes and actions


class TestDatastar(unittest.TestCase):
    """Part 12: attributes, actions, events."""

    def test_attributes_are_written_in_the_clients_grammar(self) -> None:
        for given, expected in [
            (data.signals({"a": 1}), {"data-signals": '{"a":1}'}),
            (data.signals({"a": 1}, ifmissing=True), {"data-signals__ifmissing": '{"a":1}'}),
            (data.bind("name"), {"data-bind": "name"}),
            (data.text("$x"), {"data-text": "$x"}),
            (data.show("$x"), {"data-show": "$x"}),
            (data.class_({"is-on": "$on"}), {"data-class": '{"is-on": $on}'}),
            (data.attr({"disabled": "$x"}), {"data-attr": '{"disabled": $x}'}),
            (data.style({"top": "$y"}), {"data-style": '{"top": $y}'}),
            (data.computed({"n": "$a + 1"}), {"data-computed": '{"n": () => ($a + 1)}'}),
            (data.effect("x()"), {"data-effect": "x()"}),
            (data.init("x()", delay=0.5), {"data-init__delay.500ms": "x()"}),
            (data.init("x()", viewtransition=True), {"data-init__viewtransition": "x()"}),
            (data.on("click", "x()"), {"data-on:click": "x()"}),
            (data.on("click", "x()", once=True, debounce=0.5),
             {"data-on:click__once__debounce.500ms": "x()"}),
            (data.on("input", "x()", throttle=(2, "noleading"), prevent=True, window=True),
             {"data-on:input__window__prevent__throttle.2s.noleading": "x()"}),
            (data.on("userSaved", "x()"), {"data-on:user-saved__case.camel": "x()"}),
            (data.on_intersect("x()", half=True, once=True),
             {"data-on-intersect__once__half": "x()"}),
            (data.on_intersect("x()", threshold=25), {"data-on-intersect__threshold.25": "x()"}),
            (data.on_interval("x()", duration="9ms"), {"data-on-interval__duration.9ms": "x()"}),
            (data.on_signal_patch("x()", include="^user/", delay=1),
             {"data-on-signal-patch__delay.1s": "x()",
              "data-on-signal-patch-filter": "{include: /^user\\//}"}),
            (data.indicator("busy"), {"data-indicator": "busy"}),
            (data.ref("el"), {"data-ref": "el"}),
            (data.ignore(), {"data-ignore": True}),
            (data.ignore(self_only=True), {"data-ignore__self": True}),
            (data.ignore_morph(), {"data-ignore-morph": True}),
            (data.json_signals(), {"data-json-signals": True}),
            (data.json_signals(include="a", terse=True),
             {"data-json-signals__terse": "{include: /a/}"}),
            (data.preserve_attr("open", "class"), {"data-preserve-attr": "open class"}),
        ]:  # fmt: skip
            with self.subTest(str(expected)):
                self.assertEqual(given, expected)

    def test_actions_write_only_what_differs_from_the_defaults(self) -> None:
        for given, expected in [
            (at.get("/x"), "@get('/x')"),
            (at.post("/click", {"cellId": 3}), "@post('/click?cellId=3')"),
            (at.put("/x?a=1", {"b": "c d"}), "@put('/x?a=1&b=c+d')"),
            (at.patch("/x", retry="auto", content_type="json"), "@patch('/x')"),
            (at.delete("/x", content_type="form"), '@delete(\'/x\', {contentType: "form"})'),
            (at.get("/x", open_when_hidden=True), "@get('/x', {openWhenHidden: true})"),
            (at.get("/x", open_when_hidden=False), "@get('/x')"),
            (at.post("/x", open_when_hidden=False), "@post('/x', {openWhenHidden: false})"),
            (at.get("/x", include="^a$", exclude="b"),
             "@get('/x', {filterSignals: {include: /^a$/, exclude: /b/}})"),
            (at.get("/x", headers={"X-A": "1"}), '@get(\'/x\', {headers: {"X-A":"1"}})'),
            (at.get("/x", retry="always", retry_interval_ms=50, retry_max_count=3),
             '@get(\'/x\', {retry: "always", retryInterval: 50, retryMaxCount: 3})'),
            (at.post("/x", payload={"a": 1}), '@post(\'/x\', {payload: {"a":1}})'),
            (at.get("/x", request_cancellation="disabled"),
             '@get(\'/x\', {requestCancellation: "disabled"})'),
            (at.get("/x", request_cancellation="$stop"),
             "@get('/x', {requestCancellation: $stop})"),
            (at.get("/it's"), '@get("/it\'s")'),
            (at.peek("$x"), "@peek(() => $x)"),
            (at.set_all(True, include="^is"), "@setAll(true, {include: /^is/})"),
            (at.toggle_all(), "@toggleAll()"),
            (js({"a-b": "$x"}, c="1"), '{"a-b": $x, "c": 1}'),
        ]:  # fmt: skip
            with self.subTest(expected):
                self.assertEqual(given, expected)
        with self.assertRaisesRegex(StarioError, "retries"):
            at.get("/x", retries=3)  # type: ignore[call-arg]
        with self.assertRaisesRegex(StarioError, "dbounce"):
            data.on("click", "x", dbounce=3)  # type: ignore[call-arg]

    def test_user_text_is_ascii_json_without_what_the_client_rewrites(self) -> None:
        for text in ("me@home(now)", "$user", "a;b", "</script>", "'\"\\", "\u2028é😀", "x\\"):
            with self.subTest(text):
                written = s(text)
                self.assertEqual(json.loads(written), text)
                self.assertTrue(written.isascii())
                self.assertFalse(set(written) & set("@$;"))
                signals = str(data.signals({text: text})["data-signals"])
                self.assertEqual(json.loads(signals), {text: text})
                self.assertFalse(set(signals) & set("@$;"))

    def test_signals_come_from_dicts_dataclasses_and_models(self) -> None:
        @dataclass
        class Point:
            x: int
            at: datetime

        class Model:
            def model_dump(self, mode: str) -> dict[str, int]:
                return {"m": 1}

        point = Point(1, datetime(2024, 1, 2))
        expected = '{"x":1,"at":"2024-01-02T00:00:00"}'
        self.assertEqual(data.signals(point)["data-signals"], expected)
        self.assertEqual(data.signals(Model())["data-signals"], '{"m":1}')
        for wrong in ({"a": object()}, {"a": float("nan")}):
            with self.assertRaises(StarioError):
                data.signals(wrong)

    def test_no_text_can_forge_an_event(self) -> None:
        app = Stario()

        async def page(c: Context, w: Writer) -> None:
            w.patch(SafeString("<p id=p>\n\nevent: x\r\rdata: y\r\n</p>"), id="1", retry=50)
            w.sync('{"a":\n1}', only_if_missing=True)
            w.patch(h.P(), mode="append", selector="#x", namespace="svg", use_view_transition=True)
            w.remove("#gone")
            w.execute("x < 1", attributes={"async": True})
            w.event("plain", "a\nb")

        app.get("/", page)

        async def read() -> str:
            async with TestClient(app) as client:
                return (await client.get("/")).text  # type: ignore[no-any-return]

        self.assertEqual(
            asyncio.run(read()),
            "event: datastar-patch-elements\nid: 1\nretry: 50\n"
            "data: elements <p id=p>\ndata: elements \ndata: elements event: x\ndata: elements \n"
            "data: elements data: y\ndata: elements </p>\n\n"
            'event: datastar-patch-signals\ndata: onlyIfMissing true\ndata: signals {"a":\n'
            "data: signals 1}\n\n"
            "event: datastar-patch-elements\ndata: selector #x\ndata: mode append\n"
            "data: namespace svg\ndata: useViewTransition true\ndata: elements <p></p>\n\n"
            "event: datastar-patch-elements\ndata: selector #gone\ndata: mode remove\n\n"
            "event: datastar-patch-elements\ndata: selector body\ndata: mode append\n"
            'data: elements <script data-effect="el.remove()" async>x < 1</script>\n\n'
            "event: plain\ndata: a\ndata: b\n\n",
        )

    def test_an_id_is_text_or_a_number_and_never_the_name_of_bytes(self) -> None:
        carrier = Kept()
        writer = Writer(carrier, a_request(), None)
        writer.event("tick", id=7)  # type: ignore[arg-type]
        self.assertIn(b"id: 7\n", carrier.kept)
        wrong: list[tuple[Any, Any]] = [("tick", b"17-0"), (b"tick", None), (None, None)]
        for name, number in wrong:
            with self.subTest((name, number)), self.assertRaisesRegex(StarioError, "are text"):
                writer.event(name, id=number)

    def test_the_words_of_a_patch_may_be_members_of_an_enum(self) -> None:
        class Words(str, enum.Enum):  # noqa: UP042 - in an f-string it is `Words.INNER`
            INNER = "inner"
            SVG = "svg"
            CART = "#cart"

        carrier = Kept()
        writer = Writer(carrier, a_request(), None)
        words: Any = {"mode": Words.INNER, "namespace": Words.SVG, "selector": Words.CART}
        writer.patch(h.P("enums"), **words)
        wanted = b"data: selector #cart\ndata: mode inner\ndata: namespace svg\n"
        self.assertIn(wanted, carrier.kept)

    def test_impossible_patches_are_refused(self) -> None:
        writer = Writer(Kept(), a_request(), CompressionConfig())
        for options in (
            {"mode": "inner"}, {"mode": "no"}, {"mode": "remove"}, {"namespace": "x"},
            {"selector": "a\nb"}, {"id": "a\rb"},
        ):  # fmt: skip
            with self.subTest(str(options)), self.assertRaises(StarioError):
                writer.patch(h.P(), **options)  # type: ignore[arg-type]
        self.assertFalse(writer.started)

    def test_the_script_names_the_official_bundle_or_the_copy_it_is_given(self) -> None:
        Stario()
        script = datastar_script()
        self.assertIn("datastar@1.0.2/bundles/datastar.js", script)
        self.assertIn(
            "sha384-SnyFlWTdFL3c8+9/1WsPuMFBq6AQOGC1LmS9upY4YkM3En3wZr5q2UvydHaMgOVG", script
        )
        self.assertRegex(script, r"/_stario/pocket\.[0-9a-f]{16}\.js")
        own = datastar_script("/static/x.js")
        self.assertEqual(own, '<script type="module" src="/static/x.js"></script>')


class Word(enum.StrEnum):
    """Text of a type of its own, as settings often are."""

    OPEN = "$open"
    PATH = "/over there"


class TestBuildersWriteWhatWasMeant(unittest.TestCase):
    """Part 12: other values than text, any text, and mistakes that are named at the call."""

    def test_what_is_no_text_is_written_in_javascript(self) -> None:
        for given, expected in [
            (data.show(False), {"data-show": "false"}),
            (data.text(3), {"data-text": "3"}),
            (data.show(Word.OPEN), {"data-show": "$open"}),
            (data.style({"opacity": 0.5}), {"data-style": '{"opacity": 0.5}'}),
            (data.attr({"disabled": True}), {"data-attr": '{"disabled": true}'}),
            (data.computed({"a": False}), {"data-computed": '{"a": () => (false)}'}),
            (data.on("click", True), {"data-on:click": "true"}),
            (at.peek(False), "@peek(() => false)"),
            (s(Word.OPEN), '"\\u0024open"'),
            (s(Size.LARGE), '"l"'),
            (js({"a": None, "b": [1]}), '{"a": null, "b": [1]}'),
        ]:
            with self.subTest(str(expected)):
                self.assertEqual(given, expected)

    def test_a_query_has_what_there_is_before_the_fragment(self) -> None:
        for given, expected in [
            (at.get("/x#top", {"a": "b"}), "@get('/x?a=b#top')"),
            (at.get("/x?y=1#a?b", {"a": 2}), "@get('/x?y=1&a=2#a?b')"),
            (at.get("/x", {"a": None, "b": [None, 2, Size.LARGE]}), "@get('/x?b=2&b=l')"),
            (at.get("/x", {"a": None}), "@get('/x')"),
            (at.post("/x", {"a": "half \udc00"}), "@post('/x?a=half+%3F')"),
            (at.get(Word.PATH), '@get("/over there")'),
            (at.query("/x", {"a": 1}), "@query('/x?a=1')"),
        ]:
            with self.subTest(expected):
                self.assertEqual(given, expected)
        for wrong in ({"a": {"b": 1}}, {"a": b"x"}, {"a": [{}]}):  # type: ignore[var-annotated]
            with self.subTest(str(wrong)), self.assertRaisesRegex(StarioError, "'a'"):
                at.get("/x", wrong)

    def test_text_can_stand_in_scripts_of_html_and_svg(self) -> None:
        for text in ("<!-- ", "</script >", "&lt;&#39", "]]>", "a && b"):
            for written in (
                s(text),
                js({text: "1"}),
                str(data.signals({"x": text})["data-signals"]),
            ):
                self.assertFalse(set(written) & set("<>&"), written)
            script = h.Script(f"go({s(text)})")
            self.assertEqual(html.unescape(script), script)
        self.assertEqual(json.loads(s("\ud83d<")), "\ud83d<")

    def test_no_name_of_a_signal_is_a_prototype(self) -> None:
        written = data.signals({"__proto__": {"a": '{"__proto__":1}'}, "b": {"__proto__": 2}})
        self.assertEqual(
            written["data-signals"],
            '{["__proto__"]:{"a":"{\\"__proto__\\":1}"},"b":{["__proto__"]:2}}',
        )
        self.assertEqual(js({"__proto__": "$x"}), '{["__proto__"]: $x}')

    def test_values_that_are_equal_but_not_the_same_stay_apart(self) -> None:
        for values in ((1, True, 1.0), (True, 1.0, 1), (1.0, 1, True)):
            for value in values:
                expected = {int: ".1s", float: ".1000ms", bool: ""}[type(value)]
                name = f"data-on:scroll__throttle{expected}"
                self.assertEqual(data.on("scroll", "x()", throttle=value), {name: "x()"})
        for pair in ((1, "trailing"), (1.0, "trailing")):
            expected = "1s" if type(pair[0]) is int else "1000ms"
            name = f"data-on:scroll__throttle.{expected}.trailing"
            self.assertEqual(data.on("scroll", "x()", throttle=pair), {name: "x()"})
        with self.assertRaises(StarioError):
            data.on("scroll", "x()", throttle=(True, "trailing"))

    def test_nothing_long_is_kept(self) -> None:
        def kept() -> int:
            caches = [value for value in vars(stario).values() if hasattr(value, "cache_info")]
            return sum(cache.cache_info().currsize for cache in caches)

        at.get("/x", selector="")  # the names of options are kept
        known = kept()
        for give in (
            lambda text: at.get("/x", {"q": text}),
            lambda text: at.get("/x", {"q": ["a", text]}),
            lambda text: at.get("/" + text),
            lambda text: at.get("/x", selector=text),
            lambda text: at.get("/x", {"n": int(text.replace("w", "7"))}),
        ):
            for number in range(3):
                give(f"{number}" + "w" * 2000)  # type: ignore[no-untyped-call]
        self.assertEqual(kept(), known)

    def test_what_an_element_is_told_twice_is_refused_unless_it_is_the_same(self) -> None:
        for first, second in (
            (data.on("keyup", "a()"), data.on("keyup", "b()")),
            (data.signals({"a": 1}, ifmissing=True), data.signals({"b": 1}, ifmissing=True)),
            (data.class_({"a": "$a"}), data.class_({"b": "$b"})),
            (data.effect("a()"), data.effect("b()")),
            (data.init("a()"), [data.init("b()")]),
            (data.on_interval("a()"), data.on_interval("b()")),
            (data.preserve_attr("open"), data.preserve_attr("class")),
            (MappingProxyType(data.computed({"a": "1"})), data.computed({"b": "2"})),
        ):
            for element in (h.Div, h.Input, h.Textarea):
                with self.subTest(str(first)), self.assertRaisesRegex(StarioError, "twice"):
                    element(first, second)
        self.assertIn('"a()"', h.Div(data.on("click", "a()"), data.on("click", "a()")))
        self.assertIn('"2"', h.Div({"data-id": "1", "id": "a"}, {"data-id": "2", "id": "b"}))
        self.assertIn('"2"', h.Div({"data-on-sale": "1"}, {"data-on-sale": "2"}))
        both = h.Div(data.on("click", "a()"), data.on("click", "b()", once=True))
        self.assertTrue("a()" in both and "b()" in both)

    def test_flags_of_patterns_and_what_would_end_them(self) -> None:
        for pattern, expected in [
            (re.compile("^x", re.I), "/^x/i"),
            (re.compile("(?is)a.b"), "/a.b/is"),
            (re.compile("^a$", re.M | re.A), "/^a$/m"),
            ("", "/(?:)/"),
            (r"^a/b\/c$", r"/^a\/b\/c$/"),
            ("a\nb", "/a\\u000ab/"),
            (r"\$user|x@y;", r"/\u0024user|x\u0040y\u003b/"),
            ("[$a]", r"/[\u0024a]/"),
            ("(?<!a)b", "/(?<!a)b/"),
            ("a\\", r"/a\\/"),
        ]:
            with self.subTest(str(pattern)):
                self.assertEqual(stario._regex(pattern), expected)  # type: ignore[arg-type]
        with self.assertRaisesRegex(StarioError, "VERBOSE"):
            at.get("/x", include=re.compile("a b", re.X))

    def test_options_are_words_of_the_client_or_expressions(self) -> None:
        for given, expected in [
            (at.get("/x", request_cancellation="cleanup"), '{requestCancellation: "cleanup"}'),
            (at.get("/x", request_cancellation="$a"), "{requestCancellation: $a}"),
            (at.get("/x", request_cancellation="window.a"), "{requestCancellation: window.a}"),
            (at.get("/x", retry="never"), '{retry: "never"}'),
            (at.get("/x", response_overrides={"mode": "inner", "use_view_transition": True}),
             '{responseOverrides: {"mode":"inner","useViewTransition":true}}'),
        ]:  # fmt: skip
            with self.subTest(expected):
                self.assertEqual(given, f"@get('/x', {expected})")

    def test_mistakes_are_named_at_the_call(self) -> None:
        wrong: list[tuple[str, Callable[..., object]]] = [
            ("cleanup", lambda: at.get("/x", request_cancellation="cleanups")),
            ("always", lambda: at.get("/x", retry="alway")),  # type: ignore[arg-type]
            ("json", lambda: at.post("/x", content_type="application/json")),  # type: ignore[arg-type]
            ("retry_max_wait_ms", lambda: at.get("/x", retry_max_wait=1)),  # type: ignore[call-arg]
            ("retry_scaler", lambda: at.get("/x", retry_scaler="2")),  # type: ignore[arg-type]
            ("selector", lambda: at.get("/x", response_overrides={"select": ""})),  # type: ignore[typeddict-unknown-key]
            ("without", lambda: data.bind("$name")),
            ("without", lambda: data.indicator("$busy")),
            ("without", lambda: data.computed({"$a": "1"})),
            ("dict", lambda: data.class_("active")),  # type: ignore[arg-type]
            ("dict", lambda: data.signals([1])),
            ("dict", lambda: data.signals("a")),
            ("Milliseconds", lambda: data.on("input", "x()", debounce=500)),
            ("0.25", lambda: data.init("x()", delay=250)),
            ("500ms", lambda: data.on("input", "x()", throttle="1.5s")),
            ("0.5", lambda: data.on("input", "x()", throttle="half a second")),
            ("duration", lambda: data.on_interval("x()", duration=-1)),
            ("once=True", lambda: data.on("click", "x()", once=1)),  # type: ignore[arg-type]
            ("percent", lambda: data.on_intersect("x()", threshold=0.5)),  # type: ignore[arg-type]
            ("notrailing", lambda: data.on("click", "x()", debounce=(1, "notrail"))),
            ("'prevent'", lambda: data.on("click", "x()", prevnt=True)),  # type: ignore[call-arg]
            ("'click'", lambda: data.on("onclick", "x()")),
            ("name", lambda: data.on("", "x()")),
            ("name", lambda: data.on(["keyup", "blur"], "x()")),  # type: ignore[arg-type]
            ("rename", lambda: data.on("my__event", "x()")),
            ("rename", lambda: data.on("my-ownEvent", "x()")),
            ("delay=True", lambda: data.init("x()", delay=True)),
            ("seconds", lambda: data.on_interval("x()", duration=True)),
            ("seconds", lambda: data.on("input", "x()", throttle=())),
            ("seconds", lambda: data.on("input", "x()", delay=(1, "leading"))),  # type: ignore[arg-type]
            ("500ms", lambda: data.on("input", "x()", delay="٥s")),
            ("percent", lambda: data.on_intersect("x()", threshold=True)),
            ("'leading'", lambda: data.on("input", "x()", throttle=(1, "leading"))),
            ("of data-init", lambda: data.init("x()", once=True)),
            ("of data-on-interval", lambda: data.on_interval("x()", debounce=1)),
            ("of data-on 'half'", lambda: data.on("scroll", "x()", half=True)),
            ("small letters", lambda: data.bind("a", event=["input", "valueChanged"])),
            ("small letters", lambda: data.bind("a", prop="x.y")),
            ("dict", lambda: data.computed(["a"])),  # type: ignore[arg-type]
            ("pattern", lambda: at.get("/x", include=["a", "b"])),  # type: ignore[arg-type]
            ("pattern", lambda: at.toggle_all(exclude=re.compile(b"a"))),  # type: ignore[arg-type]
            ("'inner'", lambda: at.get("/x", response_overrides={"mode": "iner"})),  # type: ignore[typeddict-item]
            ("retry_max_wait_ms", lambda: at.get("/x", retry_max_wait_ms=[1])),  # type: ignore[arg-type]
            ("cleanup", lambda: at.get("/x", request_cancellation=True)),  # type: ignore[arg-type]
            ("not with None", lambda: at.get(None)),  # type: ignore[arg-type]
            ("'id': 3", lambda: at.get("/x", [("a", 1)])),  # type: ignore[arg-type]
        ]
        for word, make in wrong:
            with self.subTest(word), self.assertRaisesRegex(StarioError, word):
                make()

    def test_what_is_of_another_type_is_named_at_the_call(self) -> None:
        wrong: list[tuple[str, Callable[[Any], object], tuple[object, ...]]] = [
            ("small letters", lambda prop: data.bind("a", prop=prop), (3, "", b"x", ["x"])),
            ("small letters", lambda event: data.bind("a", event=event), (3, "", b"x", [3])),
            ("preserve_attr", lambda name: data.preserve_attr(name), (3, None, ["open"])),
            ("preserve_attr", lambda names: data.preserve_attr(*names), ((), [1])),
            ("dict", lambda name: js({name: "$x"}), (None, 3)),
            ("duration", lambda time: data.on("x", "y()", delay=time), (10**400, float("nan"))),
            ("selector", lambda value: at.get("/x", selector=value), (3, ["#form"])),
            ("headers", lambda value: at.get("/x", headers=value), ("x-a: b", ["x-a"])),
            ("hidden", lambda value: at.get("/x", open_when_hidden=value), ("yes", 2)),
            ("overrides", lambda value: at.get("/x", response_overrides=value), ("inner", 3)),
        ]
        for word, call, values in wrong:
            for value in values:
                with self.subTest(word, value=value), self.assertRaisesRegex(StarioError, word):
                    call(value)

    def test_writers_refuse_what_is_no_data_and_patches_without_a_place(self) -> None:
        writer = Writer(Kept(), a_request(), CompressionConfig())
        wrong: list[tuple[str, Callable[..., object]]] = [
            ("dict", lambda: writer.sync([1])),
            ("dict", lambda: writer.sync(None)),
            ("JSON", lambda: writer.sync(Place)),
            ("dict", lambda: writer.sync("hello")),
            ("dict", lambda: writer.sync('{"a": Infinity}')),
            ("dict", lambda: writer.sync('[{"a": 1}]')),
            ("JSON", lambda: writer.sync({"a": float("inf")})),
            ("dict", lambda: writer.event("x", {"a": 1})),  # type: ignore[arg-type]
            ("milliseconds", lambda: writer.event("x", "y", retry=0.5)),  # type: ignore[arg-type]
            ("id", lambda: writer.patch("hello")),
            ("id", lambda: writer.patch("the one with id=5")),
            ("id", lambda: writer.patch(h.P({"class": "id"}, "an id=5"))),
            ("'prepend'", lambda: writer.patch(h.P(), mode="prepnd", selector="p")),  # type: ignore[arg-type]
        ]
        for word, make in wrong:
            with self.subTest(word), self.assertRaisesRegex((StarioError, TypeError), word):
                make()
        self.assertFalse(writer.started)
        for fits in (
            h.Html(),
            h.Body(),
            SafeString("<P\tID='a'>"),
            h.P(data.text("$x"), {"id": 1}),
        ):
            stario._patch_data(fits)

    def test_navigate_goes_to_pages_only(self) -> None:
        writer = Writer(Kept(), a_request(), CompressionConfig())
        for url in ("javascript:x()", " JAVASCRIPT:x()", "java\nscript:x()", "\x01javascript:x()",
                    "data:text/html,x", "vbscript:x"):  # fmt: skip
            with self.subTest(url), self.assertRaises(StarioError):
                writer.navigate(url)
        self.assertFalse(writer.started)
        writer.navigate("/a?next=javascript:x", nonce="n")
        writer.navigate("https://example.com/?a=<b>&c")

    def test_no_backslash_leads_to_another_host(self) -> None:
        for url, told in (("/\\evil.com", "/%5Cevil.com"), ("\\/evil.com/x", "%5C/evil.com/x")):
            for go in (Writer.redirect, Writer.navigate):
                kept, asked = Kept(), a_request(datastar_request="true")
                go(Writer(kept, asked, CompressionConfig()), url)
                self.assertIn(f'window.location = "{told}"'.encode(), kept.kept)

    def test_a_nonce_and_the_clients_newer_attributes(self) -> None:
        self.assertIn(' nonce="a1"', datastar_script("/x.js", nonce="a1"))
        self.assertIn(' nonce="a1"', datastar_script(nonce="a1"))
        self.assertEqual(
            data.bind("a", prop="valueAsNumber", event=["input", "blur"]),
            {"data-bind__prop.value-as-number__event.input.blur": "a"},
        )
        self.assertEqual(data.bind("a", event="change"), {"data-bind__event.change": "a"})
        lines = stario._patch_data("<p id=a>", view_transition_selector="#a")
        self.assertEqual(lines, b"data: viewTransitionSelector #a\ndata: elements <p id=a>\n")

    def test_an_event_for_many_streams_is_made_and_compressed_once(self) -> None:
        def events(id: int | None) -> bytes:
            line = "" if id is None else f"id: {id}\n"
            return "".join(
                f"event: datastar-patch-elements\n{line}"
                f'data: elements <p id="many">{number}</p>\n\n'
                "event: datastar-patch-elements\ndata: selector #b\ndata: mode inner\n"
                f'data: elements <p id="both">{number}</p>\n\n'
                for number in range(3)
            ).encode()

        def stream(**fields: str) -> tuple[Kept, Writer]:
            return (carrier := Kept()), Writer(carrier, a_request(**fields), CompressionConfig())

        plain = [stream() for _ in range(50)]
        gzip = [stream(accept_encoding="gzip") for _ in range(50)]
        with (
            mock.patch.object(stario, "_data_lines", wraps=stario._data_lines) as made,
            mock.patch.object(stario.zlib, "compressobj", wraps=zlib.compressobj) as compressed,  # type: ignore[attr-defined]
        ):
            for number in range(3):
                for id, (_, w) in [*enumerate(plain), *((None, stream) for stream in gzip)]:
                    w.patch(h.P({"id": "many"}, number), id=None if id is None else str(id))
                    w.patch(h.P({"id": "both"}, number), mode="inner", selector="#b")
        self.assertEqual((made.call_count, compressed.call_count), (6, 6))
        for id, (carrier, _) in enumerate(plain):
            self.assertEqual(carrier.kept.partition(b"vary: accept-encoding\r\n")[2], events(id))
        for carrier, w in gzip:
            w.end()
            body = carrier.kept[carrier.kept.index(b"\x1f\x8b") :]
            self.assertEqual(zlib.decompress(body, wbits=31), events(None))

    def test_threads_that_patch_at_the_same_time_get_what_is_theirs(self) -> None:
        def patches(thread: int) -> None:
            for number in range(300):
                html = f"<p id=a>{thread if number % 3 else 'all'} {number}</p>"
                self.assertEqual(stario._patch_data(html), f"data: elements {html}\n".encode())

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(patches, range(4)))


class Place(NamedTuple):
    x: int
    y: int


class TestActionQueries(unittest.TestCase):
    def test_a_value_that_is_a_sequence_comes_once_for_each_item(self) -> None:
        for value in ([1, 2], (1, 2), Place(1, 2), range(1, 3), iter("12"), {1: 0, 2: 0}.keys()):
            self.assertEqual(at.get("/x", {"p": value}), "@get('/x?p=1&p=2')")

    def test_the_parameters_of_a_request_can_be_passed_on(self) -> None:
        query = a_request("/?a=1&a=2&b=%26").query
        self.assertEqual(at.get("/x", query), "@get('/x?a=1&a=2&b=%26')")  # type: ignore[arg-type]

    def test_values_that_are_equal_but_written_differently_stay_apart(self) -> None:
        values = (1, True, 1.0, Decimal("1.0"), "1")
        written = [at.get("/x", {"p": value}) for value in values]
        self.assertEqual(written, [f"@get('/x?p={value}')" for value in values])
        self.assertEqual(
            at.get("/x", {"p": re.RegexFlag.I}), "@get('/x?p=2')"
        )  # (it can be iterated)
        written = [at.get("/x", {name: 1}) for name in values]  # type: ignore[dict-item]
        self.assertEqual(written, [f"@get('/x?{name}=1')" for name in values])

    def test_only_short_actions_are_kept(self) -> None:
        kept = stario._cached_action.cache_info
        many = {f"{n}": "" for n in range(2000)}  # short names, and long together
        for queries in ({"q": 1}, {"n" * 5000: ""}, {"q": "v" * 5000}, {"q": ["v"] * 5000}, many):
            stario._cached_action.cache_clear()
            at.get("/x", queries)
            self.assertEqual(kept().currsize, queries == {"q": 1})

    def test_a_member_of_an_enum_is_its_value(self) -> None:
        class Place(str, enum.Enum):  # noqa: UP042 - a StrEnum is written as its value anyway
            HOME = "/home"

        self.assertEqual(at.get(Place.HOME), "@get('/home')")
        self.assertEqual(at.get("/x", {Place.HOME: Place.HOME}), "@get('/x?%2Fhome=%2Fhome')")


# -- 13. Streams


async def close(peer: Peer) -> None:
    await peer.close()


async def half_close(peer: Peer) -> None:
    peer.writer.write_eof()


async def reset(peer: Peer) -> None:
    peer.reset()


async def stay(peer: Peer) -> None:
    """The client does nothing; somebody else acts."""


LEAVING = (close, half_close, reset)


class TestAlive(StreamTest):
    async def loop(self, c: Context, w: Writer) -> None:
        """The plain form."""
        self.start(w)
        async for data in w.alive(self.source()):
            self.log.append(data)
            w.patch(h.P({"id": "p"}, data))
        self.log.append("cleanup")

    async def block(self, c: Context, w: Writer) -> None:
        """The other form: it interrupts what its block awaits."""
        async with w.alive(self.source()) as items:
            self.start(w)
            async for data in items:
                self.log.append(data)
            self.log.append("not reached")
        self.log.append("cleanup")

    async def test_whoever_learns_by_a_write_that_the_client_has_gone_sees_it_at_once(self) -> None:
        async def stream(c: Context, w: Writer) -> None:
            self.start(w)
            async for _ in w.alive(every=0.01):  # (the body, which nobody reads, hides the reset)
                w.event("tick", "x")
            self.log.append(f"disconnected {w.disconnected}")

        head = "GET / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n"
        async with connected(self.app(stream)) as peer:
            await peer.send(head, bytes(300_000))
            await within(self.ready.wait())
            peer.reset()
            await within(self.ended.wait())
        self.assertEqual(self.log, ["disconnected True"])

    async def test_the_code_after_it_runs_once_however_the_client_leaves(self) -> None:
        for handler in (self.loop, self.block):
            for leave in LEAVING:
                with self.subTest(handler.__name__, leave=leave.__name__):
                    self.setUp()
                    log = await self.run_stream(handler, leave)
                    self.assertEqual(log, ["source closed", "cleanup"])
                    self.assertTrue(is_empty(self.relay))

    async def test_the_code_after_it_runs_where_tasks_have_lost_the_client(self) -> None:
        async def send(w: Writer) -> None:
            while True:
                w.event("piece", "x" * 100_000)
                await w.drain()

        async def handler(c: Context, w: Writer) -> None:
            async with w.alive(), asyncio.TaskGroup() as tasks:
                tasks.create_task(send(w))
                tasks.create_task(send(w))
                await until(lambda: w._carrier._paused_writing)  # type: ignore[attr-defined]
                self.start(w)
            self.log.append("cleanup")

        for leave in LEAVING:
            with self.subTest(leave=leave.__name__):
                self.setUp()
                self.assertEqual(await self.run_stream(handler, leave), ["cleanup"])

    async def test_the_code_after_it_runs_once_when_the_server_stops(self) -> None:
        for handler in (self.loop, self.block):
            with self.subTest(handler.__name__):
                self.setUp()
                async with connected(self.app(handler)) as peer:
                    await peer.send(GET)
                    await within(self.ready.wait())
                self.assertEqual(self.log, ["source closed", "cleanup"])
                self.assertTrue(is_empty(self.relay))

    async def test_the_stream_is_complete_when_the_server_stops(self) -> None:
        app = self.app(self.loop)
        async with app.running() as server:
            peer = await Peer.connect(server.port)
            await peer.send(GET)
            await within(self.ready.wait())
        self.assertTrue((await within(peer.rest())).endswith(b"\r\n0\r\n\r\n"))
        await peer.close()

    async def test_items_come_in_order_until_the_source_ends(self) -> None:
        async def numbers() -> AsyncIterator[int]:
            for number in range(100):
                yield number

        async def handler(c: Context, w: Writer) -> None:
            async for number in w.alive(numbers()):
                w.event("n", str(number))
            w.event("end", "100")

        async with connected(self.app(handler)) as peer:
            text = (await within(peer.get())).text
        found = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
        self.assertEqual(found, [str(number) for number in range(101)])

    async def test_a_client_that_left_before_the_first_event_gets_no_turn(self) -> None:
        proceed = asyncio.Event()

        async def looping(c: Context, w: Writer) -> None:
            events = self.relay.subscribe("*")
            self.relay.publish("a", "waiting")
            self.ready.set()
            await proceed.wait()
            w.patch(h.P({"id": "p"}))
            async for _, data in w.alive(events):
                self.log.append(data)
            self.log.append("cleanup")

        async def blocking(c: Context, w: Writer) -> None:
            self.ready.set()
            await proceed.wait()
            async with w.alive(self.relay.subscribe("*")):
                self.log.append("in the block")
                await asyncio.Event().wait()
            self.log.append("cleanup")

        async def leave_early(peer: Peer) -> None:
            peer.reset()
            (worker,) = self.workers
            connection = next(iter(worker.connections))
            while not connection.disconnected:
                await asyncio.sleep(0)
            proceed.set()

        for handler, expected in (
            (looping, ["cleanup"]),
            (blocking, ["in the block", "cleanup"]),
        ):
            with self.subTest(handler.__name__):
                self.setUp()
                proceed.clear()
                async with self.app(handler).running() as server:
                    self.workers = server._workers
                    peer = await Peer.connect(server.port)
                    await peer.send(GET)
                    await within(self.ready.wait())
                    await within(leave_early(peer))
                    await within(self.ended.wait())
                self.assertEqual(self.log, expected)
                self.assertTrue(is_empty(self.relay))

    async def test_a_client_that_leaves_in_the_middle_of_a_patch_ends_the_loop(self) -> None:
        large = "x" * 2**20

        async def handler(c: Context, w: Writer) -> None:
            events = self.relay.subscribe("*")
            self.relay.publish("a", "one")
            self.relay.publish("a", "two")
            async for _, data in w.alive(events):
                self.log.append(data)
                w.patch(h.P({"id": "p"}, large))
                self.ready.set()
            self.log.append("cleanup")

        for leave in LEAVING[::2]:
            with self.subTest(leave.__name__):
                self.setUp()
                app = self.app(handler)
                async with app.running() as server:
                    peer = await Peer.connect(server.port)
                    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
                    await peer.send(GET)
                    await within(self.ready.wait())
                    await leave(peer)
                    await within(self.ended.wait())
                self.assertEqual(self.log, ["one", "cleanup"])
                self.assertTrue(is_empty(self.relay))

    async def test_a_loop_is_not_interrupted_while_its_body_awaits(self) -> None:
        gone = asyncio.Event()

        async def handler(c: Context, w: Writer) -> None:
            self.relay.publish("a", "unheard")
            async for data in w.alive(self.source_of("one", "two")):
                self.log.append(data)
                self.ready.set()
                while not w.disconnected:
                    await asyncio.sleep(0)
                gone.set()
                await asyncio.sleep(0)
                self.log.append("body is through")
            self.log.append("cleanup")

        log = await self.run_stream(handler, reset)
        self.assertTrue(gone.is_set())
        self.assertEqual(log, ["one", "body is through", "source closed", "cleanup"])

    async def source_of(self, *items: str) -> AsyncIterator[str]:
        try:
            for item in items:
                yield item
            await asyncio.Event().wait()
        finally:
            self.log.append("source closed")

    async def test_a_block_is_interrupted_wherever_it_awaits(self) -> None:
        async def handler(c: Context, w: Writer) -> None:
            async with w.alive():
                self.start(w)
                try:
                    await asyncio.Event().wait()
                finally:
                    self.log.append("finally")
            self.log.append("cleanup")

        self.assertEqual(await self.run_stream(handler, reset), ["finally", "cleanup"])

    async def test_the_code_after_it_may_await_as_long_as_it_likes(self) -> None:
        async def handler(c: Context, w: Writer) -> None:
            async with w.alive():
                self.start(w)
                await asyncio.Event().wait()
            async with asyncio.timeout(10):
                await asyncio.sleep(0.01)
            await asyncio.gather(asyncio.sleep(0), asyncio.sleep(0))
            self.log.append(f"cancelling: {asyncio.current_task().cancelling()}")  # type: ignore[union-attr]

        self.assertEqual(await self.run_stream(handler, reset), ["cancelling: 0"])

    async def test_a_block_that_never_awaits_is_not_interrupted_behind_it(self) -> None:
        async def handler(c: Context, w: Writer) -> None:
            carrier: Any = w._carrier
            async with w.alive():
                self.ready.set()
                carrier.shut_down()
            async with w.alive():  # the second one begins when the end is known
                self.log.append("in the block")
            await asyncio.sleep(0)
            self.log.append("cleanup")

        self.assertEqual(await self.run_stream(handler, stay), ["in the block", "cleanup"])

    async def test_the_source_is_closed_even_where_the_handler_keeps_it(self) -> None:
        async def handler(c: Context, w: Writer) -> None:
            self.start(w)
            alive = w.alive(self.relay.subscribe("*"))
            async for _ in alive:
                pass
            self.log.append(f"listeners: {listeners(self.relay)}")
            del alive

        self.assertEqual(await self.run_stream(handler, reset), ["listeners: 0"])

    async def test_break_closes_a_subscription_at_once(self) -> None:
        async def handler(c: Context, w: Writer) -> None:
            self.start(w)
            async for _ in w.alive(self.relay.subscribe("*")):
                break
            self.log.append(f"listeners: {listeners(self.relay)}")

        async def publish(peer: Peer) -> None:
            self.relay.publish("a", "one")

        self.assertEqual(await self.run_stream(handler, publish), ["listeners: 0"])

    async def test_break_closes_a_generator_at_the_next_await(self) -> None:
        async def handler(c: Context, w: Writer) -> None:
            async for _ in w.alive(self.source_of("one")):
                break
            await asyncio.sleep(0)
            self.log.append("cleanup")
            self.ready.set()

        log = await self.run_stream(handler, stay)
        self.assertEqual(log, ["source closed", "cleanup"])

    async def test_an_exception_of_the_body_goes_on_its_way_and_closes_the_source(self) -> None:
        async def looping(c: Context, w: Writer) -> None:
            try:
                async for _ in w.alive(self.source_of("one")):
                    raise KeyError
            finally:
                await asyncio.sleep(0)
                self.log.append("finally")
                self.ready.set()

        async def blocking(c: Context, w: Writer) -> None:
            try:
                async with w.alive(self.source_of("one")) as items:
                    await anext(items)
                    raise KeyError
            finally:
                self.log.append("finally")
                self.ready.set()

        for handler in (looping, blocking):
            with self.subTest(handler.__name__):
                self.setUp()

                async def caught(c: Context, w: Writer, handler: Any = handler) -> None:
                    try:
                        await handler(c, w)
                    except KeyError:
                        self.log.append("passed on")

                log = await self.run_stream(caught, stay)
                self.assertEqual(log, ["source closed", "finally", "passed on"])

    async def test_an_exception_cuts_the_stream_so_that_the_client_can_tell(self) -> None:
        async def handler(c: Context, w: Writer) -> None:
            self.start(w)
            async for _ in w.alive(self.relay.subscribe("*")):
                raise HttpGone

        class HttpGone(Exception):
            pass

        loop = asyncio.get_running_loop()
        seen: list[Any] = []
        loop.set_exception_handler(lambda _, context: seen.append(context["exception"]))
        async with connected(self.app(handler)) as peer:
            await peer.send(GET)
            await within(self.ready.wait())
            self.relay.publish("a", "one")
            everything = await within(peer.rest())
        self.assertFalse(everything.endswith(b"0\r\n\r\n"))
        self.assertEqual([type(exc) for exc in seen], [HttpGone])
        self.assertTrue(is_empty(self.relay))

    async def test_a_cancellation_from_outside_is_passed_on(self) -> None:
        async def cancel(peer: Peer) -> None:
            assert self.task
            self.task.cancel("from outside")

        for handler in (self.loop, self.block):
            with self.subTest(handler.__name__):
                self.setUp()

                async def caught(c: Context, w: Writer, handler: Any = handler) -> None:
                    try:
                        await handler(c, w)
                    except asyncio.CancelledError as exc:
                        await asyncio.sleep(0)
                        self.log.append(str(exc))
                        raise

                log = await self.run_stream(caught, cancel)
                self.assertEqual(log, ["source closed", "from outside"])
                self.assertTrue(is_empty(self.relay))

    async def test_a_cancellation_at_the_same_moment_as_a_disconnect_is_passed_on(self) -> None:
        async def handler(c: Context, w: Writer) -> None:
            carrier: Any = w._carrier
            assert self.task
            try:
                async with w.alive():
                    self.ready.set()
                    carrier.shut_down()
                    asyncio.get_running_loop().call_soon(self.task.cancel)
                    await asyncio.Event().wait()
                self.log.append("swallowed")
            except asyncio.CancelledError:
                self.log.append("passed on")

        self.assertEqual(await self.run_stream(handler, stay), ["passed on"])

    async def test_a_timeout_around_it_is_a_timeout(self) -> None:
        async def looping(c: Context, w: Writer) -> None:
            async for _ in w.alive(self.source()):
                pass

        async def blocking(c: Context, w: Writer) -> None:
            async with w.alive(self.source()) as items:
                await anext(items)

        for handler in (looping, blocking):
            with self.subTest(handler.__name__):
                self.setUp()

                async def timed(c: Context, w: Writer, handler: Any = handler) -> None:
                    self.start(w)
                    try:
                        async with asyncio.timeout(0.01):
                            await handler(c, w)
                    except TimeoutError:
                        await asyncio.sleep(0)
                        self.log.append("timed out")
                    w.event("still here")

                log = await self.run_stream(timed, stay)
                self.assertEqual(log, ["source closed", "timed out"])
                self.assertTrue(is_empty(self.relay))

    async def test_a_timeout_inside_it_is_its_own_affair(self) -> None:
        async def handler(c: Context, w: Writer) -> None:
            async with w.alive():
                try:
                    async with asyncio.timeout(0.01):
                        await asyncio.Event().wait()
                except TimeoutError:
                    self.log.append("timed out")
                self.start(w)
                async with asyncio.timeout(60):
                    await asyncio.Event().wait()
                self.log.append("not reached")
            self.log.append("cleanup")

        self.assertEqual(await self.run_stream(handler, reset), ["timed out", "cleanup"])

    async def test_a_task_group_inside_it_is_cancelled_and_awaited(self) -> None:
        async def child(number: int) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                self.log.append(f"child {number}")

        async def handler(c: Context, w: Writer) -> None:
            async with w.alive(), asyncio.TaskGroup() as group:
                group.create_task(child(1))
                group.create_task(child(2))
                self.start(w)
            self.log.append("cleanup")

        log = await self.run_stream(handler, reset)
        self.assertEqual(sorted(log[:2]), ["child 1", "child 2"])
        self.assertEqual(log[2:], ["cleanup"])

    async def test_a_task_group_around_it_cancels_it(self) -> None:
        async def fail() -> None:
            await self.ready.wait()
            raise KeyError

        for form in (self.loop, self.block):
            with self.subTest(form.__name__):
                self.setUp()

                async def handler(c: Context, w: Writer, form: Any = form) -> None:
                    try:
                        async with asyncio.TaskGroup() as group:
                            group.create_task(fail())
                            await form(c, w)
                    except* KeyError:
                        self.log.append("failed")

                log = await self.run_stream(handler, stay)
                self.assertEqual(log, ["source closed", "failed"])

    async def test_it_may_run_in_a_child_task_with_the_others_going_on(self) -> None:
        async def handler(c: Context, w: Writer) -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.loop(c, w))
                group.create_task(self.loop(c, w))
            self.log.append("group is through")

        log = await self.run_stream(handler, reset)
        self.assertEqual(sorted(log[:4]), ["cleanup"] * 2 + ["source closed"] * 2)
        self.assertEqual(log[4:], ["group is through"])
        self.assertTrue(is_empty(self.relay))

    async def test_one_inside_another_ends_both(self) -> None:
        async def handler(c: Context, w: Writer) -> None:
            async with w.alive():
                async for _ in w.alive(self.source()):
                    pass
                await asyncio.sleep(0)
                self.log.append("not reached")
            self.log.append("cleanup")

        async def begin(c: Context, w: Writer) -> None:
            self.start(w)
            await handler(c, w)

        self.assertEqual(await self.run_stream(begin, reset), ["source closed", "cleanup"])

    async def test_without_a_source_it_comes_back_until_the_client_is_gone(self) -> None:
        async def handler(c: Context, w: Writer) -> None:
            turns = 0
            async for _ in w.alive():
                turns += 1
                await asyncio.sleep(0)
                if turns == 10:
                    self.start(w)
            self.log.append("cleanup" if turns >= 10 else "too early")

        self.assertEqual(await self.run_stream(handler, reset), ["cleanup"])

    async def test_without_a_source_it_waits_where_its_body_does_nothing(self) -> None:
        turns = 0

        async def handler(c: Context, w: Writer) -> None:
            nonlocal turns
            self.start(w)
            async for _ in w.alive():
                turns += 1
            self.log.append("cleanup")

        async def linger_and_leave(peer: Peer) -> None:
            for _ in range(100):
                await asyncio.sleep(0)
            peer.reset()

        self.assertEqual(await self.run_stream(handler, linger_and_leave), ["cleanup"])
        self.assertLessEqual(turns, 3)

    async def test_ticks_come_at_once_and_leave_out_what_the_body_missed(self) -> None:
        async def handler(c: Context, w: Writer) -> None:
            ticks = 0
            async for _ in w.alive(every=0.01):
                ticks += 1
                w.event("tick", str(ticks))
                if ticks == 2:
                    await asyncio.sleep(0.1)
                if ticks == 4:
                    break

        before = time.monotonic()
        async with TestClient(self.app(handler)) as client, client.stream("GET", "/") as events:
            self.assertEqual([event.data async for event in events], ["1", "2", "3", "4"])
        self.assertGreaterEqual(time.monotonic() - before, 0.12)
        for wrong in (
            {"every": 0}, {"every": 1, "source": self.source()}, {"every": "0.5"},
            {"every": math.nan}, {"heartbeat": -1}, {"heartbeat": "15"}, {"heartbeat": math.inf},
        ):  # fmt: skip
            with self.subTest(str(wrong)), self.assertRaisesRegex(StarioError, "seconds"):
                Writer(Kept(), a_request(), CompressionConfig()).alive(**wrong)

    async def test_one_in_the_source_of_another_ends_first_and_both_clean_up(self) -> None:
        async def messages(w: Writer) -> AsyncIterator[str]:
            async for text in w.alive(self.source()):
                yield text
            await asyncio.sleep(0.001)  # cleanup may wait
            self.log.append("inner")

        async def louder(w: Writer) -> AsyncIterator[str]:
            async for text in w.alive(messages(w)):
                yield text.upper()
            self.log.append("middle")

        async def handler(c: Context, w: Writer) -> None:
            self.start(w)
            async for text in w.alive(louder(w)):
                w.event("text", text)
            self.log.append("outer")

        for leave in LEAVING:
            with self.subTest(leave.__name__):
                self.setUp()
                log = await self.run_stream(handler, leave)
                self.assertEqual(log, ["source closed", "inner", "middle", "outer"])
        self.setUp()
        async with connected(self.app(handler)) as peer:
            await peer.send(GET)
            await within(self.ready.wait())
        self.assertEqual(self.log, ["source closed", "inner", "middle", "outer"])

    async def test_a_block_ends_though_something_in_it_has_swallowed_its_interruption(self) -> None:
        async def patient() -> AsyncIterator[str]:
            with suppress(asyncio.CancelledError):
                async for text in self.source():
                    yield text

        async def failing() -> AsyncIterator[str]:
            try:
                async for text in self.source():
                    yield text
            except asyncio.CancelledError:
                raise KeyError from None

        async def looping(w: Writer, source: AsyncIterator[str]) -> None:
            async for _ in w.alive(source):
                pass

        async def waiting(w: Writer, source: AsyncIterator[str]) -> None:
            async with w.alive():
                with suppress(asyncio.CancelledError):
                    await anext(source)

        for within_block, source in (
            (looping, patient), (looping, failing), (waiting, self.source),
        ):  # fmt: skip

            async def handler(
                c: Context, w: Writer, do: Any = within_block, s: Any = source
            ) -> None:
                async with w.alive():
                    self.start(w)
                    with suppress(KeyError):
                        await do(w, s())
                    self.log.append("in the block")
                    await asyncio.Event().wait()
                self.log.append("cleanup")

            with self.subTest(f"{within_block} {source}"):
                self.setUp()
                log = await self.run_stream(handler, reset)
                self.assertEqual(log, ["source closed", "in the block", "cleanup"])

    async def test_a_source_that_is_collected_in_another_thread_is_closed_on_its_own_loop(
        self,
    ) -> None:
        closed: asyncio.Queue[int] = asyncio.Queue()

        class Source:
            def __aiter__(self) -> Source:
                return self

            async def __anext__(self) -> int:
                return 1

            async def aclose(self) -> None:
                closed.put_nowait(threading.get_ident())

        async def collect() -> None:
            gc.collect()

        source = Source()  # (it is not collected: only the loop over it)
        for work in (gc.collect, lambda: asyncio.run(collect())):
            cycle: list[Any] = [Writer(Kept(), a_request(), CompressionConfig()).alive(source)]
            cycle.append(cycle)
            del cycle
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            self.assertEqual(await within(closed.get()), threading.get_ident())

    async def test_cleanup_in_a_source_that_never_ends_is_ended(self) -> None:
        async def messages(w: Writer) -> AsyncIterator[str]:
            async for text in w.alive(self.source()):
                yield text
            await asyncio.Event().wait()

        async def handler(c: Context, w: Writer) -> None:
            self.start(w)
            async for _ in w.alive(messages(w)):
                pass
            self.log.append("outer")

        with mock.patch.object(stario, "_CLEANUP", 0.01):
            self.assertEqual(await self.run_stream(handler, reset), ["source closed", "outer"])

    async def test_a_request_leaves_nothing_to_the_next_on_its_connection(self) -> None:
        go_on = asyncio.Event()

        async def early(c: Context, w: Writer) -> None:
            async for _ in w.alive(every=0.001):
                if not w.completed:
                    w.text("early")
            self.log.append("early ended")

        async def late(c: Context, w: Writer) -> None:
            async with w.alive():
                w.event("late")
                await go_on.wait()
            self.log.append("late ended")
            self.ended.set()

        async def reader(c: Context, w: Writer) -> None:
            with suppress(TimeoutError):
                async with asyncio.timeout(0.01):
                    await c.req.body()
            w.text("gave up")

        app = Stario()
        app.get("/early", early)
        app.get("/late", late)
        app.post("/reader", reader)
        async with connected(app) as peer:
            await peer.send("POST /reader HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n")
            self.assertEqual((await within(peer.answer())).text, "gave up")
            await peer.send("abc")  # comes after all
            for _ in range(3):
                self.assertEqual((await within(peer.get("/early"))).text, "early")
            await peer.send("GET /late HTTP/1.1\r\nHost: x\r\n\r\n")
            await within(peer.head())
            await within(peer.chunk())
            self.assertEqual(self.log, [])
            peer.reset()
            await within(self.ended.wait())
            await until(lambda: len(self.log) == 4)
        self.assertEqual(sorted(self.log), ["early ended"] * 3 + ["late ended"])

    async def test_a_long_poll_answers_once_and_ends_if_nobody_waits(self) -> None:
        async def handler(c: Context, w: Writer) -> None:
            events = self.relay.subscribe("*")
            self.ready.set()
            async for _, data in w.alive(events, heartbeat=0.001):
                w.text(data)
                break
            self.log.append("cleanup")

        app = self.app(handler)
        async with connected(app) as peer:
            await peer.send(GET)
            await within(self.ready.wait())
            await asyncio.sleep(0.02)  # many heartbeats, none of which belongs into the answer
            self.relay.publish("a", "news")
            self.assertEqual((await within(peer.answer())).text, "news")
            self.ended.clear()
            self.ready.clear()
            await peer.send(GET)
            await within(self.ready.wait())
            peer.reset()
            await within(self.ended.wait())
        self.assertEqual(self.log, ["cleanup", "cleanup"])
        self.assertTrue(is_empty(self.relay))

    async def test_a_silent_stream_sends_a_comment_each_heartbeat(self) -> None:
        async def handler(c: Context, w: Writer) -> None:
            self.start(w)
            async for _ in w.alive(self.relay.subscribe("*"), heartbeat=0.02):
                pass

        async with connected(self.app(handler)) as peer:
            await peer.send(GET)
            await peer.head()
            await within(peer.chunk())
            for _ in range(3):
                self.assertEqual(await within(peer.chunk()), b":\n\n")

    async def test_a_heartbeat_outlives_the_end_of_a_loop_inside(self) -> None:
        async def handler(c: Context, w: Writer) -> None:
            async with w.alive(heartbeat=0.02):
                async for _ in w.alive(self.source_of("one"), heartbeat=0.02):
                    break
                self.start(w)
                await asyncio.Event().wait()

        async with connected(self.app(handler)) as peer:
            await peer.send(GET)
            await peer.head()
            await within(peer.chunk())
            self.assertEqual(await within(peer.chunk()), b":\n\n")

    async def test_nothing_can_be_kept_alive_after_a_complete_answer(self) -> None:
        async def handler(c: Context, w: Writer) -> None:
            w.text("done")
            with self.assertRaises(StarioError):
                w.alive(self.relay.subscribe("*"))
            self.log.append("refused")

        async with connected(self.app(handler)) as peer:
            self.assertEqual((await peer.get()).text, "done")
            await within(self.ended.wait())
        self.assertEqual(self.log, ["refused"])
        self.assertTrue(is_empty(self.relay))

    async def test_the_fields_of_a_stream_tell_proxies_not_to_keep_it(self) -> None:
        async with connected(self.app(self.loop)) as peer:
            await peer.send(GET)
            headers = (await within(peer.head())).headers
        self.assertEqual(headers["content-type"], "text/event-stream")
        self.assertEqual(headers["cache-control"], "no-cache")
        self.assertEqual(headers["x-accel-buffering"], "no")
        self.assertNotIn("connection", headers)
        self.assertNotIn("content-length", headers)

    async def test_a_compressed_stream_is_flushed_at_each_event(self) -> None:
        def inflate() -> Callable[[bytes], bytes]:
            return zlib.decompressobj(wbits=31).decompress

        await self.check_flushed("gzip", inflate())

    @needs("brotli")
    async def test_a_stream_in_brotli_is_flushed_at_each_event(self) -> None:
        import brotli

        await self.check_flushed("br", brotli.Decompressor().process)

    @needs("zstandard")
    async def test_a_stream_in_zstd_is_flushed_at_each_event(self) -> None:
        import zstandard

        await self.check_flushed("zstd", zstandard.ZstdDecompressor().decompressobj().decompress)

    async def check_flushed(self, coding: str, decompress: Callable[[bytes], bytes]) -> None:
        async with connected(self.app(self.loop)) as peer:
            await peer.send(f"GET / HTTP/1.1\r\nHost: t\r\nAccept-Encoding: {coding}\r\n\r\n")
            answer = await within(peer.head())
            self.assertEqual(answer.headers["content-encoding"], coding)
            self.assertIn(b"first", decompress(await within(peer.chunk())))
            for text in ("second", "third"):
                self.relay.publish("a", text)
                self.assertIn(text.encode(), decompress(await within(peer.chunk())))

    async def test_no_task_and_no_connection_is_left_behind(self) -> None:
        before = asyncio.all_tasks()
        async with self.app(self.loop).running() as server:
            (worker,) = server._workers
            accepting = asyncio.all_tasks()
            for leave in LEAVING * 5:
                self.ready.clear()
                self.ended.clear()
                peer = await Peer.connect(server.port)
                await peer.send(GET)
                await within(self.ready.wait())
                await leave(peer)
                await within(self.ended.wait())
                await peer.close()
            while worker.connections or worker.tasks:  # they go a turn after the handler
                await asyncio.sleep(0)
            self.assertEqual(asyncio.all_tasks(), accepting)
        self.assertEqual(asyncio.all_tasks(), before)
        self.assertEqual(self.log.count("cleanup"), len(LEAVING * 5))

    # -- Slow readers

    async def test_a_stream_is_gzip_for_whoever_takes_it(self) -> None:
        for accepted in ("gzip, deflate, br, zstd", "gzip"):
            with self.subTest(accepted):
                async with connected(self.app(self.loop)) as peer:
                    await peer.send(GET[:-2], f"Accept-Encoding: {accepted}\r\n\r\n")
                    headers = (await within(peer.head())).headers
                self.assertEqual(headers["content-encoding"], "gzip")
                self.assertEqual(headers["vary"], "accept-encoding")

    async def test_what_was_sent_before_helps_to_compress_what_follows(self) -> None:
        compress, finish = stario._gzip(6, True)
        noise = os.urandom(4000).hex().encode()
        first, second, last = compress(noise), compress(noise), finish()
        self.assertLess(len(second), len(first) // 20)
        self.assertEqual(zlib.decompress(first + second + last, wbits=31), noise * 2)

    async def test_a_source_that_always_has_something_lets_others_in(self) -> None:
        relay = Relay[int]()
        turns: list[int] = []

        async def stream(c: Context, w: Writer) -> None:
            endless = relay.subscribe("a")
            relay.publish("a", 0)
            async for _, number in w.alive(endless):
                relay.publish("a", number + 1)  # there is always another one
                turns.append(number)
                if number == 0:
                    asyncio.get_running_loop().call_soon(endless.close)
                if number == 10**6:
                    break

        app = Stario()
        app.get("/", stream)
        async with connected(app) as peer:
            self.assertEqual((await within(peer.get("/"))).status, 204)
        self.assertLess(len(turns), 10**6)


class TestBeginnings(StreamTest):
    """Streams that have nothing to say yet."""

    def waiting_app(self) -> Stario:
        app = Stario()

        async def wait(c: Context, w: Writer) -> None:
            async for _, text in w.alive(self.relay.subscribe("*"), heartbeat=0.05):
                w.event("news", text)

        app.get("/", wait)
        return app

    async def test_a_client_of_events_gets_its_headers_at_the_first_heartbeat(self) -> None:
        self.relay: Relay[str] = Relay()
        async with connected(self.waiting_app()) as peer:
            await peer.send(GET[:-2], "Accept: text/event-stream, text/html\r\n\r\n")
            answer = await within(peer.head())
            self.assertEqual(answer.headers["content-type"], "text/event-stream")
            self.relay.publish("x", "later")
            while (chunk := await within(peer.chunk())) == b":\n\n":
                pass
            self.assertEqual(chunk, b"event: news\ndata: later\n\n")

    async def test_head_of_a_stream_ends_at_once(self) -> None:
        self.relay = Relay()
        async with connected(self.waiting_app()) as peer:
            answer = await within(peer.get("/", "HEAD"))
            self.assertEqual(answer.status, 204)
            self.assertEqual((await within(peer.get("/nope"))).status, 404)

    async def test_the_test_client_does_not_wait_for_the_first_event(self) -> None:
        self.relay = Relay()
        async with (
            TestClient(self.waiting_app()) as client,
            client.stream("GET", "/") as events,
        ):
            self.relay.publish("x", "now")
            self.assertEqual((await within(anext(events))).data, "now")


def stop_reading(peer: Peer) -> None:
    """From now on the client takes nothing that the server sends."""
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]


def read_again(peer: Peer) -> None:
    peer.writer.transport.resume_reading()  # type: ignore[attr-defined]


class TestSlowReaders(StreamTest):
    LARGE = "x" * 16_000

    async def numbered(self, c: Context, w: Writer) -> None:
        """Send each number that is published, with much around it, until 'end' comes."""
        events = self.relay.subscribe("*", maxsize=10)
        self.start(w)
        async for _, data in w.alive(events):
            w.event("number", f"{data} {self.LARGE}")
            if data == "end":
                break
        w.event("dropped", str(events.dropped))

    async def publish(self, numbers: range) -> None:
        for number in numbers:
            self.relay.publish("a", str(number))
            await asyncio.sleep(0)

    async def test_one_that_reads_again_gets_the_newest_and_dropped_says_how_many_it_missed(
        self,
    ) -> None:
        async with connected(self.app(self.numbered)) as peer:
            stop_reading(peer)
            await peer.send(GET)
            await within(self.ready.wait())
            await self.publish(range(2000))
            self.relay.publish("a", "end")
            read_again(peer)
            text = (await within(peer.answer())).text
        lines = [line.split()[1:] for line in text.splitlines() if line.startswith("data: ")]
        *numbers, end = [words[0] for words in lines[1:-1]]
        dropped = int(lines[-1][0])
        self.assertEqual(end, "end")
        self.assertEqual(numbers[-1], "1999")
        self.assertEqual(numbers, sorted(set(numbers), key=int))
        self.assertGreater(dropped, 0)
        self.assertEqual(len(numbers) + dropped, 2000)

    async def test_one_that_stops_reading_costs_a_bounded_buffer(self) -> None:
        async with self.app(self.numbered).running() as server:
            peer = await Peer.connect(server.port)
            stop_reading(peer)
            await peer.send(GET)
            await within(self.ready.wait())
            (connection,) = server._workers[0].connections
            most = 0
            for number in range(2000):
                self.relay.publish("a", str(number))
                await asyncio.sleep(0)
                most = max(most, connection._transport.get_write_buffer_size())
            self.assertGreater(most, 0)
            self.assertLess(most, 64 * 1024 + 2 * len(self.LARGE))
            peer.reset()
            await within(self.ended.wait())

    async def test_the_others_are_served_meanwhile(self) -> None:
        app = self.app(self.numbered)

        async def hello(c: Context, w: Writer) -> None:
            w.text("hello")

        app.get("/hello", hello)
        async with app.running() as server:
            slow = await Peer.connect(server.port)
            stop_reading(slow)
            await slow.send(GET)
            await within(self.ready.wait())
            quick = await open_stream(server.port)
            for number in range(500):
                self.relay.publish("a", str(number))
                self.assertTrue((await within(quick.chunk())).startswith(b"event: number"))
            another = await Peer.connect(server.port)
            self.assertEqual((await within(another.get("/hello"))).text, "hello")
            for peer in (slow, quick, another):
                await peer.close()

    async def test_one_that_takes_nothing_for_write_timeout_is_cut_off(self) -> None:
        async def handler(c: Context, w: Writer) -> None:
            async for _ in w.alive():
                w.patch(h.P({"id": "p"}, self.LARGE))
                self.ready.set()
            self.log.append("cleanup")

        async def never_read(peer: Peer) -> None:
            stop_reading(peer)

        log = await self.run_stream(handler, never_read, write_timeout=0.2)
        self.assertEqual(log, ["cleanup"])

    async def test_one_that_reads_slowly_is_not_cut_off(self) -> None:
        async def handler(c: Context, w: Writer) -> None:
            for _ in range(20):
                w.event("large", self.LARGE * 10)
                await w.drain()

        async with self.app(handler).running(write_timeout=0.3) as server:
            loop = asyncio.get_running_loop()
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.setblocking(False)
                await loop.sock_sendall(client, GET.encode())
                got = b""
                while not got.endswith(b"0\r\n\r\n"):
                    await asyncio.sleep(0.02)  # slowly, and in all for longer than the time-out
                    piece = await within(loop.sock_recv(client, 100_000))
                    self.assertTrue(piece, "it was cut off")
                    got += piece
        self.assertEqual(got.count(b"event: large"), 20)

    async def test_a_handler_that_waits_gets_client_disconnected(self) -> None:
        async def handler(c: Context, w: Writer) -> None:
            self.start(w)
            try:
                while True:
                    w.patch(h.P({"id": "p"}, self.LARGE))
                    await w.drain()
                    await asyncio.sleep(0)
            except ClientDisconnected:
                self.log.append("disconnected")
                raise

        self.assertEqual(await self.run_stream(handler, reset), ["disconnected"])

    async def test_what_is_written_to_a_client_that_has_gone_is_dropped(self) -> None:
        async def handler(c: Context, w: Writer) -> None:
            self.start(w)
            while not w.disconnected:
                await asyncio.sleep(0)
            carrier: Any = w._carrier
            with self.assertNoLogs("asyncio"):  # it would warn of each write after the end
                for _ in range(100):
                    w.patch(h.P({"id": "p"}, self.LARGE))
            self.log.append(f"kept: {carrier._transport.get_write_buffer_size()}")

        self.assertEqual(await self.run_stream(handler, reset), ["kept: 0"])

    async def test_a_handler_that_never_waits_fills_max_buffer_and_no_more(self) -> None:
        async def handler(c: Context, w: Writer) -> None:
            carrier: Any = w._carrier
            most = 0
            for _ in range(1000):
                w.write(b"x" * 2**16)
                most = max(most, carrier._transport.get_write_buffer_size())
            self.log.append("bounded" if 2**19 < most < 2**20 + 2**17 else f"most: {most}")
            self.ready.set()
            with self.assertRaises(ClientDisconnected):
                await w.drain()
            self.log.append("disconnected")

        async with connected(self.app(handler), max_buffer=2**20) as peer:
            stop_reading(peer)
            await peer.send(GET)
            await within(self.ended.wait())
        self.assertEqual(self.log, ["bounded", "disconnected"])

    async def test_a_client_that_reads_slowly_outlives_its_heartbeats(self) -> None:
        beats = 0
        enough = asyncio.Event()
        check_peer = stario.Connection.check_peer

        def counted(connection: stario.Connection, seconds: float) -> None:
            nonlocal beats
            beats += 1
            check_peer(connection, seconds)
            if beats == 30:
                enough.set()

        async def handler(c: Context, w: Writer) -> None:
            self.start(w)
            async for _ in w.alive(heartbeat=0.05):
                w.event("large", self.LARGE)
                if enough.is_set():
                    break
            w.event("last")

        with unittest.mock.patch.object(stario.Connection, "check_peer", counted):
            async with connected(self.app(handler)) as peer:
                stop_reading(peer)
                await peer.send(GET)
                await within(enough.wait())
                read_again(peer)
                self.assertIn("event: last", (await within(peer.answer())).text)


VANISHING = """
    import asyncio, subprocess, sys
    import stario
    from stario import Relay, Stario, h

    def lo(state):
        subprocess.run(["ip", "link", "set", "lo", state], check=True)

    async def stream(c, w):
        w.patch(h.P({"id": "p"}))
        async for _ in w.alive(relay.subscribe("*"), heartbeat=0.3):
            pass
        print("stream ended", flush=True)

    async def long_poll(c, w):
        async for _ in w.alive(relay.subscribe("*"), heartbeat=0.3):
            pass
        print("long poll ended", flush=True)

    async def main():
        lo("up")
        stario._SOCKET_OPTIONS.update(TCP_KEEPIDLE=1, TCP_KEEPINTVL=1, TCP_KEEPCNT=2)
        app = Stario()
        app.get("/stream", stream)
        app.get("/long-poll", long_poll)
        async with app.running() as server:
            for path in ("/stream", "/long-poll"):
                reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
                writer.write(f"GET {path} HTTP/1.1\\r\\nHost: t\\r\\n\\r\\n".encode())
                keep.append(writer)
                if path == "/stream":
                    await reader.readuntil(b"</p>")
            while len(relay._listeners("any")) < 2:
                await asyncio.sleep(0.01)
            lo("down")
            while relay._tables:
                await asyncio.sleep(0.01)

    relay, keep = Relay(), []
    asyncio.run(asyncio.wait_for(main(), 25))
"""


def can_unshare() -> bool:
    """Whether we may have a network of our own."""
    if not (shutil.which("unshare") and shutil.which("ip")):
        return False
    command = ["unshare", "--net", "ip", "link", "set", "lo", "up"]
    return subprocess.run(command, capture_output=True).returncode == 0


async def run_python(code: str, *prefix: str) -> asyncio.subprocess.Process:
    """Another Python, which can import stario."""
    path = str(Path(stario.__file__).parent)
    return await asyncio.create_subprocess_exec(
        *prefix,
        sys.executable,
        "-c",
        textwrap.dedent(code),
        env={**os.environ, "PYTHONPATH": path},
        stdout=asyncio.subprocess.PIPE,
    )


class TestVanishing(AsyncTest):
    @unittest.skipUnless(sys.platform == "linux" and can_unshare(), "needs unshare --net, as root")
    async def test_a_client_that_vanishes_without_a_word_is_noticed(self) -> None:
        process = await run_python(VANISHING, "unshare", "--net")
        output, _ = await within(process.communicate(), 30)
        self.assertEqual(sorted(output.decode().splitlines()), ["long poll ended", "stream ended"])
        self.assertEqual(process.returncode, 0)


# -- 14. The relay


def listeners(relay: Relay[Any], subject: str = "anything") -> int:
    """How many subscriptions a message of this subject would go to."""
    return len(relay._listeners(subject))


def is_empty(relay: Relay[Any]) -> bool:
    """Whether nothing is left in the relay's tables."""
    return not relay._tables


async def received(subscription: Subscription[Any]) -> list[Any]:
    """The data of all that is queued."""
    subscription.close()
    return [data async for _, data in subscription]


class RelayPromises(AsyncTest):
    """What holds for every relay, whatever way its messages take."""

    each = 5000  # messages of each of several publishers

    def relay(self) -> Relay[Any]:
        raise AssertionError("each class below says this")

    async def settle(self, relay: Relay[Any]) -> None:
        """Wait until all that was published has come."""

    async def test_a_pattern_fits_a_subject_a_prefix_or_everything(self) -> None:
        relay = self.relay()
        patterns = ("room.1", "room.*", "room.1.*", "*", "lobby")
        subscriptions = {pattern: relay.subscribe(pattern) for pattern in patterns}
        for subject in ("room.1", "room.2", "room.1.door", "room", "roomy", "lobby"):
            relay.publish(subject, subject)
        await self.settle(relay)
        got = {pattern: await received(one) for pattern, one in subscriptions.items()}
        self.assertEqual(got["room.1"], ["room.1"])
        self.assertEqual(got["room.*"], ["room.1", "room.2", "room.1.door"])
        self.assertEqual(got["room.1.*"], ["room.1.door"])
        self.assertEqual(got["*"], ["room.1", "room.2", "room.1.door", "room", "roomy", "lobby"])
        self.assertEqual(got["lobby"], ["lobby"])

    async def test_a_message_comes_once_however_many_patterns_fit(self) -> None:
        relay = self.relay()
        subscription = relay.subscribe("a.b", "a.*", "*", "a.b")
        relay.publish("a.b", 1)
        await self.settle(relay)
        self.assertEqual(await received(subscription), [1])
        self.assertTrue(is_empty(relay))

    async def test_a_pattern_or_rule_that_cannot_be_is_refused(self) -> None:
        relay = self.relay()
        for wrong in ("*.a", "a*", "a.*.b", "**"):
            with self.subTest(wrong), self.assertRaises(StarioError):
                relay.subscribe(wrong)
        with self.assertRaises(StarioError):
            relay.subscribe()
        with self.assertRaisesRegex(StarioError, "'latest'"):
            relay.subscribe("a", overflow="lates")
        for maxsize in (0, "5", None, 2.5):
            with self.subTest(maxsize), self.assertRaisesRegex(StarioError, "maxsize"):
                relay.subscribe("a", maxsize=cast("Any", maxsize))
        for subject in (7, b"a", ["a"], None):
            with self.subTest(subject), self.assertRaisesRegex(StarioError, "it is text"):
                relay.publish(cast("Any", subject), "data")
        self.assertTrue(is_empty(relay))

    async def test_a_refused_pattern_leaves_nothing_behind(self) -> None:
        relay = self.relay()
        with self.assertRaises(StarioError):
            relay.subscribe("good", "b*d")
        self.assertTrue(is_empty(relay))

    async def test_nothing_is_missed_between_subscribing_and_reading(self) -> None:
        relay = self.relay()
        subscription = relay.subscribe("a")
        relay.publish("a", 1)
        await self.settle(relay)
        self.assertEqual(await within(anext(subscription)), ("a", 1))

    async def test_oldest_drops_the_oldest_and_counts(self) -> None:
        relay = self.relay()
        subscription = relay.subscribe("a", maxsize=3)
        for number in range(10):
            relay.publish("a", number)
        await self.settle(relay)
        self.assertEqual(subscription.dropped, 7)
        self.assertEqual(await received(subscription), [7, 8, 9])

    async def test_latest_keeps_the_last_of_each_subject(self) -> None:
        relay = self.relay()
        subscription = relay.subscribe("*", overflow="latest")
        for number, subject in enumerate("abacab"):
            relay.publish(subject, number)
        await self.settle(relay)
        self.assertEqual(subscription.dropped, 3)
        self.assertEqual(await received(subscription), [3, 4, 5])

    async def test_latest_is_bounded_by_maxsize_too(self) -> None:
        relay = self.relay()
        subscription = relay.subscribe("*", overflow="latest", maxsize=2)
        for number, subject in enumerate("abcd"):
            relay.publish(subject, number)
        await self.settle(relay)
        self.assertEqual(subscription.dropped, 2)
        self.assertEqual(await received(subscription), [2, 3])

    async def test_close_ends_after_what_is_queued(self) -> None:
        relay = self.relay()
        subscription = relay.subscribe("a", maxsize=2, overflow="close")
        for number in range(5):
            relay.publish("a", number)
        await self.settle(relay)
        self.assertTrue(subscription.closed)
        self.assertTrue(is_empty(relay))
        self.assertEqual([data async for _, data in subscription], [0, 1])

    async def test_closing_wakes_the_reader(self) -> None:
        relay = self.relay()
        subscription = relay.subscribe("a")
        reader = asyncio.create_task(received_until_closed(subscription))
        await asyncio.sleep(0)
        relay.publish("a", 1)
        await self.settle(relay)
        subscription.close()
        self.assertEqual(await within(reader), [1])

    async def test_a_second_reader_at_the_same_time_is_an_error(self) -> None:
        relay = self.relay()
        subscription = relay.subscribe("a")
        first = asyncio.ensure_future(anext(subscription))
        await asyncio.sleep(0)
        with self.assertRaisesRegex(StarioError, "one reader"):
            await within(anext(subscription))
        relay.publish("a", 1)
        await self.settle(relay)
        self.assertEqual(await within(first), ("a", 1))

    async def test_a_second_reader_that_comes_before_the_first_has_woken_gets_the_messages(
        self,
    ) -> None:
        relay = self.relay()
        subscription = relay.subscribe("a")
        first = asyncio.ensure_future(anext(subscription))
        await asyncio.sleep(0)

        async def read_two() -> list[Any]:
            return [await anext(subscription), await anext(subscription)]

        second = asyncio.ensure_future(read_two())
        relay._change(relay._deliver, "a", 1)  # the first is woken; the second runs before it
        with self.assertRaisesRegex(StarioError, "one reader"):
            await within(first)
        relay._change(relay._deliver, "a", 2)
        self.assertEqual(await within(second), [("a", 1), ("a", 2)])

    async def test_leaving_its_loop_or_block_closes_a_subscription(self) -> None:
        relay = self.relay()
        with relay.subscribe("a") as subscription:
            self.assertEqual(listeners(relay, "a"), 1)
        self.assertEqual(listeners(relay, "a"), 0)
        subscription = relay.subscribe("a")
        relay.publish("a", 1)
        await self.settle(relay)
        async for _ in subscription:
            break
        self.assertTrue(subscription.closed)
        self.assertTrue(is_empty(relay))

    async def test_a_subscription_that_nobody_holds_is_gone(self) -> None:
        relay = self.relay()
        relay.subscribe("a")
        gc.collect()
        self.assertTrue(is_empty(relay))
        cycle: list[Any] = [relay.subscribe("a")]
        cycle.append(cycle)
        del cycle
        gc.collect()
        self.assertTrue(is_empty(relay))

    async def test_a_reader_hears_publishers_of_other_threads_in_their_order(self) -> None:
        relay = self.relay()
        subscription = relay.subscribe("*", maxsize=10**6)

        def publish(publisher: int) -> None:
            for number in range(self.each):
                relay.publish(f"p.{publisher}", [publisher, number])

        reader = asyncio.create_task(received_until_closed(subscription))
        await asyncio.gather(*(asyncio.to_thread(publish, number) for number in range(4)))
        await self.settle(relay)
        subscription.close()
        got = await within(reader)
        for publisher in range(4):
            own = [number for who, number in got if who == publisher]
            self.assertEqual(own, list(range(self.each)))

    async def test_a_subject_with_a_star_is_refused(self) -> None:
        relay = self.relay()
        subscription = relay.subscribe("room.*")
        for name in ("*", "a*", "*.b"):  # a user's
            with self.subTest(name), self.assertRaisesRegex(StarioError, "only patterns"):
                relay.publish(f"room.{name}", 1)
        await self.settle(relay)
        self.assertEqual(await received(subscription), [])


class TestRelay(RelayPromises):
    """Within one process."""

    def relay(self) -> Relay[Any]:
        return Relay()

    async def test_a_cancelled_reader_loses_no_message(self) -> None:
        relay = Relay[int]()
        subscription = relay.subscribe("a")
        reader = asyncio.ensure_future(anext(subscription))
        await asyncio.sleep(0)
        relay.publish("a", 1)  # it is woken,
        reader.cancel()  # and cancelled before it runs
        with self.assertRaises(asyncio.CancelledError):
            await reader
        self.assertEqual(await within(anext(subscription)), ("a", 1))

    async def test_publishing_looks_at_those_who_listen_and_not_at_the_others(self) -> None:
        relay = Relay[int]()
        others = [relay.subscribe(f"room.{number}", f"hall.{number}.*") for number in range(1000)]
        listener = relay.subscribe("room.1000")
        self.assertEqual(listeners(relay, "room.1000"), 1)
        relay.publish("room.1000", 1)
        self.assertEqual(await received(listener), [1])
        self.assertEqual(sum(len(one._mailbox.queue) for one in others), 0)

    async def test_a_subscriber_may_leave_or_come_in_the_middle_of_a_publish(self) -> None:
        relay = Relay[int]()
        kept: list[Subscription[int]] = []
        subscriptions = [relay.subscribe("a") for _ in range(10)]

        async def read(one: Subscription[int]) -> None:
            async for _ in one:
                subscriptions.pop().close()
                kept.append(relay.subscribe("a"))

        readers = [asyncio.create_task(read(one)) for one in list(subscriptions)]
        for _ in range(11):
            relay.publish("a", 1)
            await asyncio.sleep(0)
            if not subscriptions:
                break
        await within(asyncio.gather(*readers, return_exceptions=True))
        self.assertEqual(listeners(relay, "a"), len(kept))

    async def test_threads_may_come_and_go_while_others_publish(self) -> None:
        relay = Relay[int]()
        stop = threading.Event()

        def publish() -> None:
            while not stop.is_set():
                relay.publish("room.1", 1)

        def come_and_go() -> None:
            for number in range(1000):
                with relay.subscribe("room.1", "room.*", "*"):
                    relay.publish("room.2", number)

        publishers = [asyncio.to_thread(publish) for _ in range(2)]
        noise = asyncio.gather(*publishers)
        await asyncio.gather(*(asyncio.to_thread(come_and_go) for _ in range(2)))
        stop.set()
        await noise
        self.assertTrue(is_empty(relay))

    async def test_a_queue_is_touched_under_the_lock_only(self) -> None:
        relay = Relay[int]()
        subscription = relay.subscribe("a")
        held: list[bool] = []
        put, take = stario._Mailbox.put, stario._Mailbox.take

        def is_held() -> bool:
            return relay._lock._is_owned()  # type: ignore[attr-defined,no-any-return]

        def noted_put(mailbox: Any, subject: str, data: Any) -> None:
            held.append(is_held())
            put(mailbox, subject, data)

        def noted_take(mailbox: Any) -> Any:
            held.append(is_held())
            return take(mailbox)

        with (
            unittest.mock.patch.object(stario._Mailbox, "put", noted_put),
            unittest.mock.patch.object(stario._Mailbox, "take", noted_take),
        ):
            relay.publish("a", 1)
            await within(anext(subscription))
        self.assertEqual(held, [True, True])

    async def test_a_hundred_subscribers_lose_only_what_the_rule_says(self) -> None:
        relay = Relay[int]()
        total = 10_000  # a million are in .ci/soak.py
        subscriptions = [relay.subscribe("a", maxsize=100) for _ in range(100)]
        readers = [asyncio.create_task(received_until_closed(one)) for one in subscriptions]

        def publish() -> None:
            for number in range(total):
                relay.publish("a", number)

        await asyncio.to_thread(publish)
        for one in subscriptions:
            one.close()
        for one, got in zip(subscriptions, await within(asyncio.gather(*readers)), strict=True):
            self.assertEqual(len(got) + one.dropped, total)
            self.assertEqual(got, sorted(set(got)))
            self.assertEqual(got[-1], total - 1)

    async def test_a_loop_that_has_closed_does_not_disturb_publishing(self) -> None:
        relay = Relay[int]()
        subscription = relay.subscribe("a")

        def read_in_a_loop_that_is_closed() -> None:
            loop = asyncio.new_event_loop()
            reading = loop.create_task(anext(subscription))
            reading._log_destroy_pending = False  # type: ignore[attr-defined]
            loop.run_until_complete(asyncio.sleep(0))
            loop.close()

        await asyncio.to_thread(read_in_a_loop_that_is_closed)
        relay.publish("a", 1)
        self.assertEqual(await received(subscription), [1])

    def test_nothing_that_comes_between_two_bytecodes_is_lost(self) -> None:
        """The collector and signal handlers run code there: at each place in turn, it does this."""
        for pattern in ("room.1", "room.*", "*"):
            for place in range(1, 10**6):
                relay = Relay[int]()
                old = relay.subscribe(pattern, "room.*")
                other = relay.subscribe("room.1", maxsize=1)
                extra: list[Subscription[int]] = []

                def between(relay: Any = relay, old: Any = old, extra: Any = extra) -> None:
                    extra.append(relay.subscribe("room.*"))
                    relay.publish("room.1", 1)
                    old.close()

                reached = interrupted(place, between, lambda r=relay, p=pattern: r.subscribe(p))  # type: ignore[misc]
                if reached is None:
                    break
                relay.publish("room.1", 2)
                for one in (reached, *extra):
                    self.assertEqual([*one._mailbox.queue][-1], ("room.1", 2), (pattern, place))
                    one.close()
                self.assertEqual(other.dropped, 1)
                other.close()
                self.assertTrue(is_empty(relay), (pattern, place))
            self.assertGreater(place, 50)

    async def test_no_wake_up_is_lost_between_two_bytecodes(self) -> None:
        """Neither of a reader that begins to wait, nor of one whose message is being published."""
        for place in range(1, 10**6):
            relay = Relay[int]()
            subscription = relay.subscribe("room.1")
            reading = subscription.__anext__()
            step = functools.partial(reading.send, None)
            with suppress(StopIteration):
                waiting = interrupted(place, lambda r=relay: r.publish("room.1", 1), step)  # type: ignore[misc]
                if waiting is None:
                    break
                self.assertTrue(waiting.done(), place)
                with self.assertRaises(StopIteration):
                    step()
            reading.close()
        self.assertGreater(place, 20)
        reading.close()
        for place in range(1, 10**6):
            relay = Relay[int]()
            readers = [asyncio.ensure_future(anext(relay.subscribe("a", "*"))) for _ in range(2)]
            await asyncio.sleep(0)
            inner = functools.partial(relay.publish, "b", 2)
            done = interrupted(place, inner, lambda r=relay: r.publish("a", 1) or True)  # type: ignore[misc]
            if done is None:
                break
            got = await within(asyncio.gather(*readers))
            self.assertIn(got[0], [("a", 1), ("b", 2)])
        self.assertGreater(place, 20)
        for reader in readers:
            reader.cancel()

    def test_threads_and_the_collector_lose_nothing(self) -> None:
        relay = Relay[int]()
        each, counted = 200, relay.subscribe("*", maxsize=10**6)

        class Leaves:
            def __init__(self) -> None:
                self.me, self.subscription = self, relay.subscribe("room.1", "room.*")

            def __del__(self) -> None:
                relay.publish("left", 1)

        def come_and_go() -> None:
            for number in range(each):
                Leaves()
                with relay.subscribe("room.1") as mine:
                    relay.publish("room.1", number)
                    assert mine._mailbox.queue, "a new subscription is deaf"

        with restless():
            in_threads(*[come_and_go] * 4)
        got = [subject for subject, _ in counted._mailbox.queue]  # type: ignore[str-unpack]
        self.assertEqual((got.count("left"), got.count("room.1")), (4 * each, 4 * each))
        counted.close()
        self.assertTrue(is_empty(relay))

    def test_a_subject_costs_what_it_is_long_and_not_its_dots(self) -> None:
        relay = Relay[int]()
        patterns = ["*", "a.*", "a.a.*", "b.*"]
        kept = [relay.subscribe(pattern) for pattern in patterns]
        looked: list[int] = []

        class Counted(dict[str, Any]):
            def get(self, key: str, default: Any = None) -> Any:
                looked.append(len(key))
                return super().get(key, default)

        relay._tables = {length: Counted(table) for length, table in relay._tables.items()}
        relay.publish("a." * 100_000, 1)
        self.assertLessEqual(sum(looked), 4 * len(patterns))
        heard = [len(one._mailbox.queue) for one in kept]
        self.assertEqual(heard, [1, 1, 1, 0])

    def test_a_pattern_is_no_subject(self) -> None:
        for wrong in ("*", "room.*", "a*b"):
            with self.assertRaisesRegex(StarioError, "only patterns have"):
                Relay[int]().publish(wrong, 1)


# -- 15. Signals


Kind = TypeVar("Kind")
UserId = NewType("UserId", int)


class Size(enum.Enum):
    SMALL = 1
    LARGE = "l"


@dataclass
class Inner:
    n: int


@dataclass
class Everything:
    text: str
    whole: int
    number: float
    yes: bool
    when: datetime
    inner: Inner
    many: list[int]
    table: dict[str, Inner]
    size: Size
    word: Literal["a", 2]
    maybe: int | None = None
    kind: ClassVar[int] = 3


@dataclass
class Shelf:
    rows: list[Inner]


@dataclass(frozen=True)
class Unshown:
    pin: int = field(repr=False)


@dataclass
class Left:
    name: str
    right: int
    next: Left | Right | None = None
    also: list[Right | Left] = field(default_factory=list)


@dataclass
class Right:
    name: str
    left: int
    next: Left | Right | None = None
    also: list[Left | Right] = field(default_factory=list)


class Endless(TypedDict, total=False):
    on: Endless


@dataclass
class Nest:
    nest: Nest | None = None


@dataclass
class Box(Generic[Kind]):
    item: Kind


@dataclass
class Crate(Box[int]):
    label: str


@dataclass
class Carton(Crate):
    """Its item is a whole number, since that is what Crate makes of Box."""


@dataclass
class First:
    first: str
    second: str


@dataclass
class Second:
    first: int
    second: int


@dataclass
class Pair(First, Second):  # type: ignore[misc]
    """Of two bases the first one decides, unless it is told otherwise here."""

    second: int  # type: ignore[assignment]


Number = TypeVar("Number", int, float, str)


@dataclass
class Noted:
    notes: list[Annotated[int, {"metadata": "need no hash"}]]


class Cat(TypedDict):
    kind: Literal["cat"]
    age: int
    name: str


@dataclass
class Dog:
    kind: Literal["dog"]
    age: int


@dataclass
class Waits:
    seconds: int
    minutes: InitVar[int]

    def __post_init__(self, minutes: int) -> None:
        self.seconds += 60 * minutes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Waits) and self.seconds == other.seconds


@dataclass
class Counted:
    n: int
    limit: ClassVar = 3


def takes_anything(kind: Any) -> Any:
    """A dataclass as pydantic makes one: only the signature of the class says what it takes."""
    kind.__signature__, plain = inspect.signature(kind), kind.__init__
    kind.__init__ = lambda self, *values, **named: plain(self, *values, **named)
    return kind


@takes_anything
@dataclass
class Wrapped:
    n: int


@dataclass
class Shared:
    """One that does not tell by its signature what it takes."""

    n: int

    def __new__(cls, *values: Any, **named: Any) -> Shared:
        return super().__new__(cls)


class Extended(dict[str, Any]):
    """What is known of a TypedDict that is not `typing`'s."""

    n: int
    other: str
    __required_keys__ = frozenset(("n",))


class Tagged(TypedDict, Generic[Kind]):
    tags: list[Kind]


class Labelled(Tagged[int]):
    label: int


class Search(TypedDict, total=False):
    text: Required[str]
    page: Annotated[NotRequired[int], "from 1"]


class Typed(TypedDict):
    a: int
    b: NotRequired[str]


class Watched(list[Any]):
    """A list that notes which of its items were looked at."""

    def __init__(self, items: list[Any], seen: list[int]) -> None:
        super().__init__(items)
        self.seen = seen

    def __iter__(self) -> Iterator[Any]:
        for n, item in enumerate(super().__iter__()):
            self.seen.append(n)
            yield item


class TestSignals(unittest.TestCase):
    """Part 15: from JSON to your dataclass."""

    GOOD: ClassVar[dict[str, Any]] = {
        "text": "x", "whole": "42", "number": "1.5", "yes": "on", "when": "2024-01-31T12:00",
        "inner": {"n": 1, "unknown": 2}, "many": [1, "2"], "table": {"k": {"n": "3"}},
        "size": "1", "word": "2", "maybe": "", "unknown": [1],
    }  # fmt: skip

    def test_the_sample_in_the_banner_is_true(self) -> None:
        source = Path(stario.__file__).read_text(encoding="utf-8")
        banner = source.partition("\n# 15. Signals")[2].partition("\n# =====")[0]
        sample = re.findall(r"^#     (.*\n)", banner + "\n", re.MULTILINE)
        code = [line for line in sample if line[0] != "#"]
        told = [line.removeprefix("# ") for line in sample if line[0] == "#"]
        names: dict[str, Any] = {**vars(stario), "dataclass": dataclass}
        exec("".join(code[:-2]), names)
        self.assertEqual(repr(eval(code[-2], names)) + "\n", told[0])
        with self.assertRaises(SignalsError) as caught:
            eval(code[-1], names)
        self.assertEqual(caught.exception.detail + "\n", "".join(told[2:]))

    def test_values_get_the_types_of_the_schema(self) -> None:
        found = read_signals(Everything, self.GOOD)
        self.assertEqual(
            found,
            Everything(
                "x", 42, 1.5, True, datetime(2024, 1, 31, 12), Inner(1), [1, 2], {"k": Inner(3)},
                Size.SMALL, 2, None,
            ),
        )  # fmt: skip

    def test_every_wrong_field_is_told_with_its_path(self) -> None:
        wrong = {
            "whole": "4.2", "number": "nan", "yes": 1, "when": "soon", "inner": {"n": True},
            "many": [1, "x"], "table": {"k": {}}, "size": 2, "word": "b", "maybe": [],
        }  # fmt: skip
        with self.assertRaises(SignalsError) as caught:
            read_signals(Everything, wrong)
        self.assertEqual(caught.exception.status_code, 422)
        self.assertEqual(
            caught.exception.detail.split("\n"),
            [
                "text: is missing",
                'whole: expected a whole number, got "4.2"',
                'number: expected a number, got "nan"',
                "yes: expected true or false, got 1",
                'when: expected a datetime as text, got "soon"',
                "inner.n: expected a whole number, got true",
                'many[1]: expected a whole number, got "x"',
                "table.k.n: is missing",
                'size: expected one of 1, "l", got 2',
                'word: expected one of "a", 2, got "b"',
                "maybe: expected a whole number, got []",
            ],
        )

    def test_text_becomes_numbers_and_truth_but_never_the_other_way_round(self) -> None:
        for kind, value, expected in [
            (int, " 7 ", 7), (int, 7.0, 7), (float, 3, 3.0), (float, "-.5e1", -5.0),
            (bool, "off", False), (bool, "", False), (bool, "YES", True), (int | str, "1", "1"),
            (list[Any], [1, "a"], [1, "a"]), (tuple[int, str], ["1", "a"], (1, "a")),
            (set[int], ["1", 1], {1}), (Decimal, "1.10", Decimal("1.10")), (Decimal, 2, Decimal(2)),
            (uuid.UUID, str(uuid.UUID(int=1)), uuid.UUID(int=1)),
            (date, "2024-02-29", date(2024, 2, 29)),
            (Typed, {"a": "1"}, {"a": 1}), (dict, {"a": [1]}, {"a": [1]}),
        ]:  # fmt: skip
            with self.subTest(f"{kind} {value!r}"):
                self.assertEqual(read_signals(kind, value), expected)  # type: ignore[arg-type]
        for kind, value in [  # type: ignore[assignment]
            (str, 1), (str, True), (str, None), (int, True), (int, "1_0"), (int, "٣"), (int, 1e400),
            (float, "inf"), (float, "1,5"), (bool, 0), (int, "9" * 5000), (Literal[1], True),
            (date, "2023-02-29"), (list[int], "1"), (Typed, {"b": "x"}), (set[Any], [[1]]),
        ]:  # fmt: skip
            with self.subTest(f"{kind} {value!r}"), self.assertRaises(SignalsError):
                read_signals(kind, value)  # type: ignore[arg-type]

    def problems(self, schema: Any, signals: object) -> list[Any]:
        with self.assertRaises(SignalsError) as caught:
            read_signals(schema, signals)
        return list(caught.exception.problems)

    def test_a_problem_is_a_sentence_that_has_its_parts(self) -> None:
        [first, second] = self.problems(Shelf, {"rows": [{"n": 1}, {"n": []}, {}]})
        self.assertEqual(first, "rows[1].n: expected a whole number, got []")
        self.assertEqual(
            (first.field, first.expected, first.got), ("rows[1].n", "a whole number", "[]")
        )
        self.assertEqual((second, second.field), ("rows[2].n: is missing", "rows[2].n"))
        self.assertEqual(copy.copy(first).field, "rows[1].n")
        error = SignalsError(["taken"])
        self.assertEqual((error.problems[0].field, error.detail), ("", "taken"))

    def test_exceptions_can_be_sent_from_one_process_to_another(self) -> None:
        with self.assertRaises(SignalsError) as caught:
            read_signals(list[int], ["x"] * 30_000)
        own, login = SignalsError(["taken"], 409), HttpException(302, "/login")
        for error in (caught.exception, own, login, HttpException(404), StarioError("so not")):
            again = pickle.loads(pickle.dumps(error))
            self.assertEqual((type(again), str(again)), (type(error), str(error)))
            self.assertEqual(again.__dict__.keys(), error.__dict__.keys())
            if isinstance(error, SignalsError):
                self.assertEqual(again.problems, error.problems)
                self.assertEqual(again.problems[0].field, error.problems[0].field)
                self.assertEqual((again.more, again.stopped), (error.more, error.stopped))

    def test_answers_to_bad_signals_are_short(self) -> None:
        with self.assertRaises(SignalsError) as caught:
            read_signals(dict[str, int], {f"{n}" + "k" * 1000: "v" * 1000 for n in range(500)})
        error = caught.exception
        self.assertEqual((len(error.problems), error.more), (20, 480))
        self.assertTrue(error.detail.endswith("\nand 480 more"))
        for problem in error.problems:
            self.assertLessEqual(max(len(problem.field), len(problem.got)), 60)
        self.assertLess(len(error.detail), 4000)
        [odd] = self.problems(dict[str, int], {"a\nb: forged": {"x": ["y" * 99999]}})
        self.assertEqual(odd.field, '["a\\nb: forged"]')
        self.assertEqual(odd.count("\n"), 0)

    def test_types_that_hold_each_other_cost_what_the_signals_are_long(self) -> None:
        readings: list[object] = []

        def counted(value: object, tried: object) -> object:
            readings.append(value)
            return value

        stario._schema_reader.cache_clear()
        with mock.patch.dict(stario._READERS, {str: counted}):
            for depth in (50, 100):
                fields = {"name": "x", "left": "wrong", "right": "wrong"}
                signals: dict[str, Any] = fields
                for _ in range(depth):
                    signals = {**fields, "next": signals, "also": [signals]}
                readings.clear()
                with self.assertRaises(SignalsError):
                    read_signals(list[Left | Right], [signals])
                self.assertLessEqual(len(readings), 9 * depth + 9)
        stario._schema_reader.cache_clear()

    def test_reading_stops_where_more_is_wrong_than_anybody_reads(self) -> None:
        for schema, item in [
            (list[int], "x"), (list[int | float | Decimal | date], "x"), (list[int | date], []),
            (list[Left | Right], {"next": 1}), (list[Left], {}),
            (list[list[int] | list[bool]], [[]]),
            (list[Literal["a", 1] | Size | None], "x"), (list[tuple[int, str] | Inner], [1]),
            (list[int] | list[float] | list[date], "x"),
        ]:  # fmt: skip
            with self.subTest(f"{schema} {item}"), self.assertRaises(SignalsError) as caught:
                seen: list[int] = []
                items = Watched([item] * 50_000, seen)
                read_signals(schema, items)  # type: ignore[arg-type]
            with self.subTest(f"{schema} {item}"):
                self.assertLessEqual(len(seen), 31_000)  # for three types
                self.assertLessEqual(caught.exception.more, 10_000)
        with self.assertRaises(SignalsError) as caught:
            read_signals(dict[str, int], {f"{n}": "x" for n in range(10_000)})
        self.assertTrue(caught.exception.detail.endswith("\nand 9980 more"))
        with self.assertRaises(SignalsError) as caught:
            read_signals(list[int], ["x"] * 10_002)
        self.assertTrue(caught.exception.detail.endswith("\nand at least 9981 more"))

    def test_only_types_that_may_take_a_value_are_tried(self) -> None:
        tried: list[object] = []

        def counted(value: Any, tried_before: Any) -> Any:
            tried.append(value)
            return stario._expected("something")

        with mock.patch.dict(stario._READERS, dict.fromkeys((date, uuid.UUID, int), counted)):
            for value, times in [([], 0), ({}, 0), ("x", 3), (True, 3), (1, 1), ({"n": 1}, 0)]:
                tried.clear()
                self.problems(list[date | uuid.UUID | int], [value])
                self.assertEqual(len(tried), times, value)
        self.assertEqual(read_signals(list[date | list[int] | Inner], [["1"]]), [[1]])

    def test_an_object_that_lacks_a_name_is_no_such_dataclass(self) -> None:
        tried: list[object] = []

        def counted(value: Any, tried_before: Any) -> Any:
            tried.append(value)
            return value

        stario._schema_reader.cache_clear()
        with mock.patch.dict(stario._READERS, {str: counted}):
            left = {"name": "x", "right": "1"}
            lacking: list[Any] = [{}, {"name": "x"}, {"name": "x", "next": left}, {"right": 1}]
            for signals in lacking:
                [wrong] = self.problems(list[Left | Right], [signals])
                self.assertTrue(wrong.startswith("[0]: expected Left or Right, got "), wrong)
            self.assertEqual(tried, [])
            self.assertEqual(read_signals(cast("Any", Right | Left), left), Left("x", 1))
            self.assertEqual(tried, ["x"])
        stario._schema_reader.cache_clear()

    def test_the_type_with_the_fewest_problems_is_the_one_that_was_meant(self) -> None:
        for schema, signals, problem in [
            (list[Cat | Dog], [{"kind": "dog", "age": "x"}],
             '[0].age: expected a whole number, got "x"'),
            (list[int] | list[Dog], [{"kind": "dog", "age": "x"}] + [{"kind": "dog", "age": 1}] * 2,
             '[0].age: expected a whole number, got "x"'),
            (Dog | Cat, {"kind": "cat", "age": 1},
             'the signals: expected Dog or Cat, got {"kind": "cat", "age": 1}'),
            (Cat | Dog, {"kind": "cow", "age": 1, "name": "x"},
             'the signals: expected Cat or Dog, got '
             '{"kind": "cow", "age": 1, "name": "x"}'),
        ]:  # fmt: skip
            with self.subTest(str(signals)):
                self.assertEqual(self.problems(schema, signals), [problem])
        cat: Cat = {"kind": "cat", "age": 1, "name": "x"}
        self.assertEqual(read_signals(cast("Any", Dog | Cat), dict(cat)), cat)

    def counting(self, *kinds: Any) -> list[object]:
        """The values that plain types are asked to read; none of them is wrong but a list."""
        seen: list[object] = []

        def counted(value: Any, tried: Any) -> Any:
            seen.append(value)
            return stario._expected("no list") if isinstance(value, list) else value

        stario._schema_reader.cache_clear()
        self.addCleanup(stario._schema_reader.cache_clear)
        patch = mock.patch.dict(stario._READERS, dict.fromkeys(kinds, counted))
        patch.start()
        self.addCleanup(patch.stop)
        return seen

    def test_of_a_long_list_only_the_item_that_fits_no_type_is_read_by_each(self) -> None:
        seen = self.counting(int, float, Decimal)
        for last, is_right in (([], False), ("x", True)):
            schema = list[int] | list[float] | list[Decimal]
            with self.subTest(str(schema)), contextlib.suppress(SignalsError):
                seen.clear()
                read_signals(schema, [*range(2000), last])  # type: ignore[arg-type]
                self.assertTrue(is_right)
            self.assertLessEqual(len(seen), 2003)
        seen.clear()
        schema = dict[str, int] | dict[str, float]  # type: ignore[assignment]
        signals = {f"{n}": n for n in range(2000)} | {"z": []}
        self.assertEqual(self.problems(schema, signals), ["z: expected no list, got []"])
        self.assertLessEqual(len(seen), 2002)
        found = read_signals(list[bool] | list[str], ["yes"] * 999 + ["x"])  # type: ignore[arg-type,var-annotated]
        self.assertEqual(found[998:], ["yes", "x"])

    def test_a_tag_says_which_type_of_a_union_an_object_is(self) -> None:
        seen = self.counting(int)
        kinds = [
            dataclasses.make_dataclass(
                f"Kind{n}", [("kind", Literal[n, f"k{n}"]), ("value", int, 0)]
            )
            for n in range(20)
        ]
        schema: Any = list[functools.reduce(lambda one, other: one | other, kinds)]  # type: ignore[misc]
        found = read_signals(schema, [{"kind": "k19", "value": 1}, {"kind": 3, "value": 2}])
        self.assertEqual(found, [kinds[19]("k19", 1), kinds[3](3, 2)])
        self.assertEqual(seen, [1, 2])
        for wrong in ({"kind": "k20"}, {"kind": []}, {"kind": True}, {"value": 1}, {}):
            self.assertIn("[0]: expected Kind0 or Kind1", self.problems(schema, [wrong])[0])
        [problem] = self.problems(schema, [{"kind": "k7", "value": []}])
        self.assertEqual(problem, "[0].value: expected no list, got []")

    def test_what_is_long_to_refuse_ends_the_reading_sooner(self) -> None:
        made: list[int] = []

        @dataclass
        class Refused:
            n: int

            def __post_init__(self) -> None:
                made.append(self.n)
                raise ValueError("no")

        class Errors(ValueError):
            def error_count(self) -> int:
                return 30_000

            def errors(self) -> list[Any]:
                raise AssertionError("a list of all of them is too long")

        class Model:
            @classmethod
            def model_validate(cls, value: object) -> Model:
                raise Errors

        with self.assertRaises(SignalsError) as caught:
            read_signals(list[Refused], [{"n": 1}] * 10_000)
        self.assertLessEqual(len(made), 1_001)
        self.assertTrue(caught.exception.stopped)
        self.assertRegex(caught.exception.detail, r"\nand at least \d+ more$")
        self.assertEqual(self.problems(Model, {}), ["30000 values do not fit"])
        tried = {list[int] | list[Left]: [{}] * 300, list[list[int] | list[Left]]: [[{}] * 300] * 9}
        for union, sent in tried.items():
            with self.assertRaises(SignalsError) as caught:
                read_signals(union, sent)
            self.assertEqual(len(caught.exception.problems), 20)
            self.assertTrue(caught.exception.stopped)
            self.assertRegex(caught.exception.detail, r"\nand at least \d+ more$")
        for schema in (list[int | date | uuid.UUID], list[Left | Right]):
            seen: list[int] = []
            self.problems(schema, Watched([{"left": 1, "right": 2, "name": 3}] * 20_000, seen))
            self.assertLessEqual(len(seen), 10_001)

    def test_a_value_of_one_of_the_types_stays_as_it_is(self) -> None:
        for schema, text, expected in [
            (int | Literal["100"], '"100"', "100"), (int | Any, '"1"', "1"),
            (float | int | Literal["x"], "3", 3), (Decimal | Literal[7], "7", 7),
            (date | bool | str, '"2024-02-29"', "2024-02-29"),
            (list[int] | Any, '["1"]', [1]), (int | Size, '"1"', 1),
        ]:  # fmt: skip
            with self.subTest(f"{schema} {text}"):
                found: Any = read_signals(schema, json.loads(text))
                self.assertEqual((type(found), found), (type(expected), expected))

    def test_what_a_rejection_has_beside_its_message_may_be_anything(self) -> None:
        @dataclass
        class Refused:
            errors: Any = None

            def __post_init__(self) -> None:
                exc: Any = ValueError("not like that")
                exc.errors = exc.error_count = self.errors
                raise exc

        for errors in ({"n": ["too small"]}, [1], "errors", 5, None):
            self.assertEqual(self.problems(Refused, {"errors": errors}), ["not like that"])

    def test_what_a_union_is_told_by_a_model_is_no_place_in_the_value(self) -> None:
        class Errors(ValueError):
            def errors(self) -> list[dict[str, Any]]:
                return [{"type": "x", "loc": (), "msg": "not like that", "input": 1}]

        class Model:
            @classmethod
            def model_validate(cls, value: object) -> Model:
                raise Errors

        for value in (5, None, True, "x" * 500, [1] * 500, {f"{n}": n for n in range(500)}):
            self.assertEqual(
                self.problems(list[Model | date], [value]), ["[0]: not like that"], value
            )
            self.problems(list[dict[str, Model] | Model | date], [value])

    def test_a_list_or_an_object_is_none_of_the_choices(self) -> None:
        class Odd(enum.Enum):
            PAIR = (1, 2)
            ONE = 1

        for wrong in ([], [1, 2], {}, {"a": 1}, None, True, 1.0):
            self.problems(list[Odd], [wrong])
            self.problems(list[Literal[b"x", "y"]], [wrong])
        self.assertEqual(read_signals(list[Odd], ["(1, 2)", "1", 1]), [Odd.PAIR, Odd.ONE, Odd.ONE])

    def test_a_choice_of_1_0_comes_from_a_browser_as_1(self) -> None:
        class Rate(enum.Enum):
            HALF, NORMAL, LONGEST = 0.5, 1.0, math.inf

        for sent in (1, 1.0, "1.0"):
            self.assertEqual(read_signals(Rate, sent), Rate.NORMAL)
        self.assertEqual(read_signals(dict[str, Rate | None], {"a": 1}), {"a": Rate.NORMAL})
        self.assertEqual(read_signals(Rate, 0.5), Rate.HALF)
        self.problems(list[Rate], [True, 2, 0])

    def test_numbers_that_hash_alike_are_refused_where_hashes_count(self) -> None:
        prime = 2**61 - 1
        alike = [n * prime for n in range(1, 100)]
        for schema, signals in [
            (set[int], alike), (set[Any], alike), (frozenset[int | str], alike),
            (dict[int, str], {str(n): "" for n in alike}),
            (set[tuple[int, int]], [[n, 1] for n in alike]),
            (set[uuid.UUID], [str(uuid.UUID(int=n)) for n in alike]),
        ]:  # fmt: skip
            with self.subTest(str(schema)):
                self.problems(schema, signals)
        self.assertEqual(read_signals(set[int], [-1, -2] * 100), {-1, -2})
        self.assertEqual(read_signals(set[int], [7] * 5000 + [*range(5000)]), set(range(5000)))
        self.problems(set[int], [7] * 5000 + alike)
        self.assertEqual(len(read_signals(set[int], list(range(5000)))), 5000)
        grid = [[x, y] for x in range(-9, 9) for y in range(-9, 9)]  # hash(-1) is that of -2
        self.assertEqual(len(read_signals(set[tuple[int, int]], grid)), 18 * 18)
        self.assertEqual(len(read_signals(set[str], [f"{n}" for n in alike])), 99)
        pins = [{"pin": n} for n in alike]  # of which `repr` shows nothing
        self.problems(set[Unshown], pins)
        self.assertEqual(read_signals(set[Unshown], pins[:1] * 5000), {Unshown(alike[0])})

    def test_schemas_mean_what_python_means_by_them(self) -> None:
        for schema, signals, expected in [
            (Box[int], {"item": "1"}, Box(1)),
            (Box[Box[bool]], {"item": {"item": "on"}}, Box(Box(True))),
            (Crate, {"item": "2", "label": "x"}, Crate(2, "x")),
            (Tagged[int], {"tags": ["1"]}, {"tags": [1]}),
            (Search, {"text": "x", "page": "2"}, {"text": "x", "page": 2}),
            (Search, {"text": "x"}, {"text": "x"}),
            (list[Literal[1, True]], [1, True, "True", "true"], [1, True, True, True]),
            (Pair, {"first": "1", "second": "2"}, Pair("1", 2)),
            (Carton, {"item": "3", "label": "x"}, Carton(3, "x")),
            (Labelled, {"tags": ["1"], "label": 5}, {"tags": [1], "label": 5}),
            (list[Number], ["1", 2.5, 1], ["1", 2.5, 1]),  # type: ignore[valid-type]
            (Counted, {"n": 2}, Counted(2)),
            (Annotated[int, "?"], "3", 3), (Noted, {"notes": ["1"]}, Noted([1])),
            (list[Annotated[UserId, "?"] | None], ["7", "", None], [7, None, None]),
            (float | int, 3, 3), (int | bool, "1", 1), (bool | int, "1", True),
            (int | Literal["1"], "1", "1"), (Literal[Size.LARGE, 3], "l", Size.LARGE),
            (Word | None, "", None), (Literal[""] | None, "", ""), (bool | None, "", None),
            (tuple[()], [], ()), (tuple, [1, "a"], (1, "a")), (None, None, None),
            (Decimal, "-1.50", Decimal("-1.50")), (Decimal, 2.5, Decimal("2.5")),
            (Waits, {"seconds": 1, "minutes": "2"}, Waits(1, 2)),
            (Search | Inner, {"": 1, "n": "2"}, Inner(2)),
            (Wrapped, {"n": "2", "extra": 1}, Wrapped(2)), (Shared, {"n": "2"}, Shared(2)),
            (Extended, {"n": "2"}, Extended(n=2)),
        ]:  # fmt: skip
            with self.subTest(f"{schema} {signals}"):
                found = read_signals(schema, signals)  # type: ignore[arg-type,var-annotated]
                self.assertEqual((type(found), found), (type(expected), expected))
        for schema, signals, expected in [
            (Box[int], {"item": "x"}, 'item: expected a whole number, got "x"'),
            (Box[str], {"item": 1}, "item: expected text, got 1"),
            (Crate, {"item": "x", "label": ""}, 'item: expected a whole number, got "x"'),
            (Search, {"page": 1}, "text: is missing"),
            (Waits, {"seconds": 1}, "minutes: is missing"),
            (Inner | list[int] | None, {"n": "x"}, 'n: expected a whole number, got "x"'),
            (int | date, "x", 'the signals: expected int or date, got "x"'),
            (Number, [], "the signals: expected int or float or str, got []"),
            (Carton, {"item": "", "label": ""}, 'item: expected a whole number, got ""'),
            (Extended, {"other": "2"}, "n: is missing"),
            (Wrapped, {"n": "x"}, 'n: expected a whole number, got "x"'),
            (
                set[Any],
                [[1]],
                "the signals: expected a list of values that a set can hold, got [[1]]",
            ),
        ]:
            with self.subTest(f"{schema} {signals}"):
                self.assertEqual(self.problems(schema, signals), [expected])

    @unittest.skipIf(sys.version_info < (3, 12), "the syntax is of Python 3.12")
    def test_a_generic_class_of_the_newer_syntax_may_hold_itself(self) -> None:
        module = types.ModuleType("newer_syntax")
        self.addCleanup(sys.modules.pop, module.__name__)
        sys.modules[module.__name__] = module
        source = """
            from __future__ import annotations
            from dataclasses import dataclass, field
            from typing import Literal, NotRequired, TypedDict

            @dataclass
            class Tree[T]:
                leaf: T | None = None
                twigs: list[Tree[T]] = field(default_factory=list)

            @dataclass
            class Named[K: Literal["oak", "elm"], L](Tree[list[L]]):
                kind: K = "elm"

            class Page[T](TypedDict):
                items: list[T]
                next: NotRequired[Page[T]]
        """
        exec(textwrap.dedent(source), vars(module))
        tree, named, page = module.Tree, module.Named, module.Page
        for schema, signals, expected in [
            (tree[int], {"leaf": "1", "twigs": [{"leaf": "2"}]}, tree(1, [tree(2)])),
            (tree[tree[bool]], {"leaf": {"leaf": "on"}}, tree(tree(True))),
            (named[Literal["oak"], int], {"leaf": ["3"], "kind": "oak"}, named([3], [], "oak")),
            (page[date], {"items": ["2024-02-29"]}, {"items": [date(2024, 2, 29)]}),
            (
                page[int],
                {"items": [], "next": {"items": ["4"]}},
                {"items": [], "next": {"items": [4]}},
            ),
        ]:
            with self.subTest(str(schema)):
                self.assertEqual(read_signals(schema, signals), expected)
        self.assertEqual(
            self.problems(page[int], {"next": {}}), ["items: is missing", "next.items: is missing"]
        )

    def test_decimals_and_whole_numbers_stay_printable(self) -> None:
        for text in (
            "nan",
            "sNaN",
            "1_0",
            "1e401",
            "1e-9999",
            "0e999999",
            "1e9999999999",
            "٣",
            "0x1",
        ):
            with self.subTest(text):
                self.problems(Decimal, text)
        for kind in (int, float, Decimal):
            self.problems(kind, 10**4000)
            self.problems(kind, "9" * 100_000)
            self.problems(kind, "1" * 100_000 + "x")
        for form in ("{%s}", "urn:uuid:%s", "0x%s", "1_%s", "%s\0"):
            self.problems(uuid.UUID, form % ("1" * 32))
            self.problems(uuid.UUID, form % ("1" * 30))
        self.problems(date, "2" * 100_000)
        self.problems(datetime, "2024-01-02T03:04:05\0")

    def test_what_a_schema_rejects_by_chance_is_a_problem_without_pythons_words(self) -> None:
        @dataclass
        class Range:
            start: int | None = None
            stop: int | None = None
            unit: str | None = None

            def __post_init__(self) -> None:
                if self.unit == "code":
                    raise NotImplementedError
                assert self.unit != "yard", "no yards"
                if self.unit:
                    {"m": 1}[self.unit] / (self.stop - self.start)  # type: ignore[operator]

        for signals, sentence in (
            ({"unit": "m"}, "the values do not fit together"),
            ({"unit": "m", "start": 1, "stop": 1}, "the values do not fit together"),
            ({"unit": "x"}, "the values do not fit together"),
            ({"unit": "yard"}, "no yards"),
        ):
            self.assertEqual(self.problems(list[Range], [signals]), [f"[0]: {sentence}"])
            self.assertEqual(self.problems(Range, signals), [sentence])
        with self.assertRaises(SignalsError) as caught:
            read_signals(Range, {"unit": "m"})
        self.assertIsInstance(caught.exception.__cause__, TypeError)  # for the developer
        with self.assertRaises(NotImplementedError):
            read_signals(Range, {"unit": "code"})

    def test_each_error_of_a_model_is_a_problem_where_it_is(self) -> None:
        class Errors(ValueError):
            def errors(self) -> list[dict[str, Any]]:
                return [
                    {"type": "missing", "loc": ("name",), "msg": "Field\nrequired", "input": {}},
                    {"type": "x", "loc": ("pets", 0, "a b"), "msg": "No age", "input": "x" * 999},
                ]

        class Model:
            @classmethod
            def model_validate(cls, value: object) -> Model:
                raise Errors("all of it")

        first, second = self.problems(dict[str, Model], {"m": {}})
        self.assertEqual(
            (first, first.field, first.got), ("m.name: Field required", "m.name", "nothing")
        )
        self.assertEqual(second, 'm.pets[0]["a b"]: No age')
        self.assertEqual(len(second.got), 60)

    def test_deep_signals_are_refused_and_not_an_error_of_the_server(self) -> None:
        signals: Any = []
        for _ in range(5000):
            signals = [signals]
        self.assertEqual(
            self.problems(Nest, {"nest": signals}),
            ["nest: expected an object, got " + "[" * 57 + "..."],
        )
        signals = {}
        for _ in range(5000):
            signals = {"nest": signals}
        self.assertEqual(self.problems(Nest, signals), ["the signals are nested too deeply"])
        deep = [[[["x" * 99, 1], 2], 3], 4]  # is shown, at a place as deep as can be read
        for depth in range(850, 1000):
            signals = {"on": deep}
            for _ in range(depth):
                signals = {"on": signals}
            [problem] = self.problems(Endless, signals)
            self.assertRegex(problem, "expected an object|nested too deeply")

    def test_models_and_post_init_tell_their_own_problems(self) -> None:
        class Model:
            @classmethod
            def model_validate(cls, value: Any) -> int:
                raise ValueError("not like that")

        @dataclass
        class Even:
            n: int

            def __post_init__(self) -> None:
                if self.n % 2:
                    raise ValueError("n must be even")

        for schema, text in ((Model, "not like that"), (Even, "n must be even")):
            with self.assertRaisesRegex(SignalsError, text):
                read_signals(schema, {"n": "1"})
        for schema, word in (  # type: ignore[assignment]
            (complex, "complex"),
            (Inner(1), "class: give Inner"),
            ("Inner", "Inner"),
        ):
            with self.assertRaisesRegex(StarioError, word):
                read_signals(cast("Any", schema), {})

    def test_half_a_surrogate_pair_is_no_text(self) -> None:
        app = Stario()
        found: list[Any] = []

        async def keep(c: Context, w: Writer) -> None:
            found.append(await c.signals())

        app.get("/", keep)
        app.post("/", keep)
        text = r'{"a":"x\uDC00\ud83d\ude00","b\ud800":1e3}'

        async def check() -> None:
            async with TestClient(app) as client:
                await client.post("/", body=text.encode())
                await client.get("/?datastar=" + quote(text))

        asyncio.run(check())
        self.assertEqual(found, [{"a": "x?\U0001f600", "b?": 1000.0}] * 2)

    def test_they_come_in_the_query_or_in_the_body_and_nothing_counts_as_empty(self) -> None:
        app = Stario()

        async def show(c: Context, w: Writer) -> None:
            w.json(await c.signals())

        app.query("/", show)
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
            app.handle(method, "/", show)

        async def check() -> None:
            async with TestClient(app) as client:
                for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "QUERY"):
                    answer = await client.request(method, "/", signals={"a": "ü&"})
                    self.assertEqual(answer.json(), {"a": "ü&"})
                    self.assertEqual((await client.request(method, "/")).json(), {})
                for body, status in (
                    (b"{", 400),
                    (b"\xff", 400),
                    (b"[1]", 422),
                    (b"[" * 99999, 400),
                    (b'{"a": [-Infinity]}', 400),
                    (b' {"a": 2e308}', 400),
                    (b'{"a": 1e308, "b": -0.0}', 200),
                    (b"\xef\xbb\xbf{}", 200),
                ):
                    answer = await client.post("/", body=body)
                    self.assertEqual(answer.status, status, answer.text)

        asyncio.run(check())

    def test_what_is_no_object_is_told_like_any_other_problem(self) -> None:
        app = Stario()

        async def show(c: Context, w: Writer) -> None:
            with self.assertRaises(SignalsError) as caught:
                await c.signals()
            [problem] = caught.exception.problems
            w.json([problem, problem.field, problem.expected, problem.got])

        app.post("/", show)

        async def check() -> None:
            async with TestClient(app) as client:
                for body in ("null", '"x"', "[1, true]", "5"):
                    answer = (await client.post("/", body=body.encode())).json()
                    sentence = f"the signals: expected an object, got {body}"
                    self.assertEqual(answer, [sentence, "", "an object", body])

        asyncio.run(check())

    def test_others_are_answered_while_many_signals_are_checked(self) -> None:
        begun, other_is_answered = threading.Event(), threading.Event()

        @dataclass
        class Note:
            text: str

            def __post_init__(self) -> None:
                begun.set()
                if not other_is_answered.wait(10):
                    other_is_answered.set()  # (so that the next ones do not wait, too)
                    raise ValueError("nobody else was answered")

        board = dataclasses.make_dataclass("Board", [("notes", list[Note])])

        async def notes(c: Context, w: Writer) -> None:
            w.json(len((await c.signals(board)).notes))

        async def other(c: Context, w: Writer) -> None:
            other_is_answered.set()

        app = Stario()
        app.post("/notes", notes)
        app.get("/other", other)

        async def check() -> None:
            async with TestClient(app) as client:
                for last, status in (({"text": "x"}, 200), ({"text": 1}, 422)):
                    begun.clear()
                    other_is_answered.clear()
                    sent = {"notes": [{"text": "x"}] * 9_999 + [last]}
                    checked = asyncio.ensure_future(client.post("/notes", signals=sent))
                    self.assertTrue(await asyncio.to_thread(begun.wait, 10))
                    await client.get("/other")
                    self.assertEqual((await checked).status, status)

        asyncio.run(check())


# -- 16. Forms


@dataclass
class Upload:
    """What a page sends whose file field is bound to the signal `photo`."""

    @dataclass
    class File:
        name: str
        contents: bytes

    photo: list[Upload.File]


class TestForms(AsyncTest):
    """Forms as browsers send them (RFC 7578), whatever is in them."""

    def form(self, *parts: tuple[str, bytes], boundary: str = "Xy") -> stario.Form:
        body = b"".join(
            f"--{boundary}\r\n{head}\r\n\r\n".encode() + content + b"\r\n"
            for head, content in parts
        )
        body += f"--{boundary}--\r\n".encode()
        return multipart(body, f"multipart/form-data; boundary={boundary}")

    def named(self, name: str, more: str = "") -> str:
        return f'Content-Disposition: form-data; name="{name}"{more}'

    def test_a_form_and_a_query_are_read_by_a_schema_as_signals_are(self) -> None:
        @dataclass
        class Order:
            item: str
            count: int
            extras: list[str] = field(default_factory=list)
            gift: bool = False
            note: str | None = None

        globals()["Order"] = Order
        self.addCleanup(globals().pop, "Order")
        form = stario.Form([("item", "tea"), ("count", "2"), ("extras", "a"), ("gift", "on")])
        self.assertEqual(read_signals(Order, form), Order("tea", 2, ["a"], True))
        form = stario.QueryParams([("item", "x"), ("count", "1"), ("extras", "a"), ("extras", "b")])  # type: ignore[assignment]
        self.assertEqual(read_signals(Order, form).extras, ["a", "b"])
        self.assertIs(type(read_signals(Order, form).item), str)
        with self.assertRaises(SignalsError) as caught:
            read_signals(Order, stario.Form([("count", "two"), ("item", "")]))
        self.assertEqual(caught.exception.problems, ['count: expected a whole number, got "two"'])
        with self.assertRaises(SignalsError) as caught:
            read_signals(dict[str, tuple[int, int]], stario.Form([("at", "1")]))
        self.assertEqual(caught.exception.problems, ['at: expected a list of 2, got ["1"]'])

    def test_what_has_any_type_is_the_first_text_also_in_a_copy(self) -> None:
        @dataclass
        class Note:
            title: Any
            tags: list[Any]
            more: object = None

        form = stario.Form([("title", "Tea"), ("tags", "hot"), ("tags", "green"), ("more", "No 5")])
        note = read_signals(Note, form)
        self.assertEqual([type(value) for value in (note.title, note.more)], [str, str])
        expected = {"title": "Tea", "tags": ["hot", "green"], "more": "No 5"}
        self.assertEqual(dataclasses.asdict(note), expected)

        class Model:
            @classmethod
            def model_validate(cls, value: Any) -> Any:
                return copy.deepcopy(value)

        first = {"title": "Tea", "tags": "hot", "more": "No 5"}
        for schema in (Model, dict, dict[str, Any]):
            self.assertEqual(read_signals(schema, form), first)  # type: ignore[arg-type]

    def test_a_file_that_comes_as_a_signal_is_bytes(self) -> None:
        sent = [{"name": "a.txt", "contents": "aGVsbG8=", "mime": "text/plain"}]
        found = read_signals(Upload, {"photo": sent})
        self.assertEqual(found, Upload([Upload.File("a.txt", b"hello")]))
        sent[0]["contents"] = "aGVsbG8"
        with self.assertRaisesRegex(SignalsError, r"photo\[0\]\.contents: expected base64"):
            read_signals(Upload, {"photo": sent})

    def test_charsets_are_those_that_browsers_know(self) -> None:
        text = "text/plain; charset="
        for charset in ("iso-8859-1", "WINDOWS-1252", '"utf-8"', "utf-16le", "gb18030"):
            head = self.named("a", f"\r\nContent-Type: {text}{charset}")
            encoded = "é€" if "8859" not in charset else "é"
            form = self.form((head, encoded.encode(charset.strip('"'))))
            self.assertEqual(form["a"], encoded)
        latin = self.form((self.named("a", f"\r\nContent-Type: {text}Latin1"), b"\xe9"))
        self.assertEqual(latin["a"], "é")
        usual = self.form(
            (self.named("a"), "ж".encode("koi8-r")), (self.named("_charset_"), b"koi8-r"),
            (self.named("b", "\r\nContent-Type: text/plain;charset=utf-8"), "ж".encode()),
        )  # fmt: skip
        self.assertEqual((usual["a"], usual["b"]), ("ж", "ж"))
        for codec in ("zip", "rot13", "punycode", "idna", "unicode_escape", "utf-7", "x" * 5000):
            with self.subTest(codec[:9]), self.assertRaises(HttpException) as caught:
                self.form((self.named("a", f"\r\nContent-Type: {text}{codec}"), b"+AGE-"))
            self.assertEqual(caught.exception.status_code, 400)
            self.assertLess(len(caught.exception.detail), 120)

    def test_no_name_that_a_client_makes_up_is_kept(self) -> None:
        import encodings

        known = dict(vars(encodings)["_cache"])
        for charset in ("windows-12500", "iso-8859-123", "windows-99999", "utf-16x", "iso-8859-٣"):
            with self.subTest(charset), self.assertRaises(HttpException):
                self.form((self.named("a", f"\r\nContent-Type: text/plain;charset={charset}"), b""))
            with self.subTest(charset), self.assertRaises(HttpException):
                self.form((self.named("a", f"; filename*={charset}''b"), b""))
        self.assertEqual(vars(encodings)["_cache"], known)

    def test_files_are_what_has_a_name_or_bytes(self) -> None:
        form = self.form(
            (self.named("none", '; filename=""'), b""),
            (self.named("some", '; filename=""'), b"x"),
            (self.named("empty", '; filename="e.txt"'), b""),
            (self.named("star", "; filename*=utf-8'en'%e2%82%ac%20rates"), b"\xff"),
            (self.named("cut", "; filename*0=a.; filename*1=gz"), b"\x1f\x8b"),
        )
        self.assertIsNone(form.file("none"))
        names = [file.filename for files in form.files.values() for file in files]
        self.assertEqual(names[:3], ["", "e.txt", "€ rates"])
        self.assertEqual((len(names), form.items()), (4, []))

    def test_what_browsers_escape_in_a_name_is_undone(self) -> None:
        """The HTML standard's encoding of multipart/form-data: a quote and line breaks, no `%`."""
        form = self.form(
            (self.named("6%22 %0D%0Awide", '; filename="50%25 of %22all%22%2e.txt"'), b"x"),
            (self.named("size[%22]"), b"5%22"),
        )
        self.assertEqual([*form.files], ['6" \r\nwide'])
        self.assertEqual(form.files['6" \r\nwide'][0].filename, '50%25 of "all"%2e.txt')
        self.assertEqual(form.items(), [('size["]', "5%22")])

    def test_a_backslash_at_the_end_of_a_name_is_a_part_of_it(self) -> None:
        for text, name, filename in [
            (r'name="C:\"', "C:\\", None),
            (r'name="C:\"; filename="a.txt"', "C:\\", "a.txt"),
            (r'name="a"; filename="b\"', "a", "b\\"),
            (r'filename="b\" ; name="\"', "\\", "b\\"),
            (r'name="a"; filename="say \"b\"; c.txt"', "a", 'say "b"; c.txt'),
            (r'name="a"; filename="b.txt".exe', "a", "b.txt"),
        ]:
            with self.subTest(text):
                form = self.form((f"Content-Disposition: form-data; {text}", b"x"))
                found = [file.filename for file in form.files.get(name, [])]
                self.assertEqual(found, [filename] if filename else [])
                self.assertEqual(form.keys(), [] if filename else [name])

    def test_only_a_line_of_its_own_is_a_delimiter(self) -> None:
        text = b"\r\n--Xyz\r\n--Xy-\r\n --Xy\r\n--Xy x\r\n--X\r\n--Xy--x\r\n"
        form = self.form((self.named("a"), text), (self.named("b"), b"\n--Xy\n"))
        self.assertEqual(form.items(), [("a", text.decode()), ("b", "\n--Xy\n")])
        body = (
            b"before\r\n--Xy \t\r\n" + self.named("a").encode() + b"\r\n\r\n1\r\n--Xy-- \r\nafter"
        )
        found = multipart(body, "multipart/form-data; boundary=Xy")
        self.assertEqual(found.items(), [("a", "1")])

    def test_it_may_come_in_pieces_of_any_size(self) -> None:
        text = b"\r\n--Xyz\r\n\r\n--Xy \t-\r\n\r"
        parts = ((self.named("a"), text), (self.named("b", '; filename="b"'), text * 9))
        body = b"".join(
            f"--Xy \t\r\n{head}\r\n\r\n".encode() + content + b"\r\n" for head, content in parts
        )
        for end in (b"--Xy--", b"--Xy--\r\n", b"--Xy--\r\n\r\n--Xy\r\n"):
            for size in (1, 2, 3, 5, 7, 50, 1000):
                with self.subTest(end=end, size=size):
                    form = multipart(body + end, "multipart/form-data; boundary=Xy", size)
                    self.assertEqual(form["a"].encode(), text)
                    (file,) = form.files["b"]
                    self.assertEqual((file.data, file.data), (text * 9, text * 9))

    def test_what_stands_around_the_parts_is_dropped_however_long_it_is(self) -> None:
        part = b"\r\n--Xy\r\n" + self.named("a").encode() + b"\r\n\r\n1\r\n--Xy--\r\n"
        for around in (
            b"x" * 9000,
            b"\r\n" * 9000,
            b"\r\n--X" * 9000,
            b"\r\n\r\n" + b"--Xy" * 9000,
        ):
            reader = stario._MultipartReader("multipart/form-data; boundary=Xy")
            for piece in (around, part, around, part, *[around] * 9):
                reader.feed(piece)
                self.assertLess(len(reader._buffer), 40_000)
            self.assertEqual(reader.form().items(), [("a", "1")])

    async def test_a_large_file_goes_to_disk_and_a_form_is_given_again(self) -> None:
        async def upload(c: Context, w: Writer) -> None:
            form = await c.req.form()
            large, small = form.file("large"), form.file("small")
            assert large and small and (await c.req.form()) is form
            rolled = [file.file._rolled for file in (large, small)]  # type: ignore[attr-defined]
            w.json([rolled, len(large.data), hashlib.sha256(large.data).hexdigest(), form["t"]])

        content = random.Random(1).randbytes(3_000_000)
        app = Stario()
        app.post("/", upload)
        async with TestClient(app) as client:
            files = {"large": ("l.bin", content), "small": ("s.bin", b"few")}
            answer = await client.post("/", form={"t": "text"}, files=files)
        digest = hashlib.sha256(content).hexdigest()
        self.assertEqual(answer.json(), [[True, False], len(content), digest, "text"])

    def test_what_a_part_may_cost(self) -> None:
        heads = [
            self.named("a" * 9000), self.named("a", ";x=1" * 3000),
            self.named("a") + "\r\nX: y" * 30,
            self.named("a", '; filename="' + '\\"' * 5000), "X: y", "",
        ]  # fmt: skip
        for head in heads:
            with self.subTest(head[:70]), self.assertRaises(HttpException) as caught:
                self.form((head, b"x"))
            self.assertEqual(caught.exception.status_code, 400)
        with self.assertRaises(HttpException):
            self.form(*[(self.named("a"), b"x")] * 1001)
        for body in (b"", b"--Xy", b"--Xy\r\n", b"--Xy\r\n--Xy\r\n--Xy--"):
            with self.subTest(body), self.assertRaises(HttpException):
                multipart(body, "multipart/form-data; boundary=Xy")


# -- 17. Behind a proxy


class TestTrustedProxies(HttpTest):
    tracer: Tracer | None = None

    async def asked(self, trusted: list[str], *lines: str, **options: Any) -> Any:
        """What `c.req` says of who asks for http://own.example:8000/a%20b?c=d, with these lines."""

        async def show(c: Context, w: Writer) -> None:
            w.json([c.req.client, c.req.scheme, c.req.host, c.req.url])

        app = Stario(self.tracer)
        app.get("/{name}", show)
        head = "".join(f"{line}\r\n" for line in ("Host: own.example:8000", *lines))
        request = f"GET /a%20b?c=d HTTP/1.1\r\n{head}Connection: close\r\n\r\n"
        answer = await within(ask(app, request, trusted_proxies=trusted, **options))
        status, body = answer[9:12], answer.partition(b"\r\n\r\n")[2]
        return json.loads(body) if status == b"200" else int(status)

    async def test_nobody_is_believed_who_is_not_trusted(self) -> None:
        own = ["127.0.0.1", "http", "own.example", "http://own.example:8000/a%20b?c=d"]
        says = ("X-Forwarded-For: 6.6.6.6", "X-Forwarded-Proto: https", "X-Forwarded-Host: e.vil")
        self.assertEqual(await self.asked([], *says), own)
        self.assertEqual(await self.asked(["10.0.0.0/8", "::1", "unix"], *says), own)
        self.assertEqual(await self.asked(["10.0.0.1"], "Forwarded: for=6.6.6.6;proto=https"), own)
        self.assertEqual(await self.asked(["127.0.0.1"]), own)

    async def test_lists_are_read_from_the_right(self) -> None:
        """RFC 7239, section 7.4, and what X-Forwarded-For has always meant."""
        trusted = ["127.0.0.0/8", "10.1.0.0/16", "2001:db8::/32", "unix"]
        table = {
            "X-Forwarded-For: 6.6.6.6, 192.0.2.7": "192.0.2.7",
            "X-Forwarded-For: 6.6.6.6, 192.0.2.7, 10.1.2.3,127.0.0.9": "192.0.2.7",
            "X-Forwarded-For: 10.1.0.1, 10.1.0.2": "10.1.0.1",
            "X-Forwarded-For: 6.6.6.6, 192.0.2.7:4711": "192.0.2.7",
            "X-Forwarded-For: 6.6.6.6, 10.2.0.1": "10.2.0.1",
            "X-Forwarded-For: 192.0.2.7, unix:": "192.0.2.7",
            "X-Forwarded-For: 192.0.2.7, ::ffff:10.1.0.1": "192.0.2.7",
            "X-Forwarded-For: 6.6.6.6, somebody": "somebody",
            "X-Forwarded-For: ,": "127.0.0.1",
            'Forwarded: for=6.6.6.6, For="[2001:db9::5]:80";by=x': "2001:db9::5",
            'Forwarded: for="x, for=192.0.2.9, for="[2001:db8::5]"': "192.0.2.9",
            "Forwarded: for=6.6.6.6, proto=https": "127.0.0.1",
            "Forwarded: for=192.0.2.1\r\nX-Forwarded-For: 192.0.2.1": "192.0.2.1",
            "X-Forwarded-For: 6.6.6.6\r\nX-Forwarded-For: 192.0.2.4": "192.0.2.4",
        }
        for line, client in table.items():
            with self.subTest(line):
                self.assertEqual((await self.asked(trusted, line))[0], client)

    async def test_fields_that_contradict_each_other_are_refused(self) -> None:
        """A client can send the family of fields that its proxy does not know."""
        known = ("X-Forwarded-For: 192.0.2.1", "X-Forwarded-Proto: http", "X-Forwarded-Host: a.b")
        for more, status in (
            ("for=6.6.6.6", 400),
            ("for=192.0.2.1;proto=https", 400),
            ("for=192.0.2.1;host=e.vil", 400),
            ("host=e.vil", 400),
            ("for=192.0.2.1;proto=HTTP;host=A.b", 0),
            ("by=10.0.0.1", 0),
        ):
            with self.subTest(more):
                found = await self.asked(["127.0.0.1"], *known, f"Forwarded: {more}")
                self.assertEqual(
                    found if status else found[:3], status or ["192.0.2.1", "http", "a.b"]
                )

    async def test_scheme_and_host_are_those_of_the_same_hop(self) -> None:
        trusted = ["127.0.0.1", "10.0.0.1"]
        for lines in (
            ("X-Forwarded-For: 192.0.2.1", "X-Forwarded-Proto: https", "X-Forwarded-Host: A.b.:44"),
            ("X-Forwarded-For: 192.0.2.1, 10.0.0.1", "X-Forwarded-Proto: https, http",
             "X-Forwarded-Host: A.b.:44, inner"),
            ("X-Forwarded-For: 192.0.2.1, 10.0.0.1", "X-Forwarded-Proto: https",
             "X-Forwarded-Host: e.vil, A.b.:44, inner"),
            ('Forwarded: for=6.6.6.6;host=e.vil, for=192.0.2.1;host="A.b.:44";proto=HTTPS',),
        ):  # fmt: skip
            with self.subTest(lines):
                wanted = ["192.0.2.1", "https", "a.b", "https://A.b.:44/a%20b?c=d"]
                self.assertEqual(await self.asked(trusted, *lines), wanted)
        found = await self.asked(trusted, "X-Forwarded-Proto: gopher")
        self.assertEqual(found[1], "http")
        self.assertEqual(await self.asked(trusted, "X-Forwarded-Host: a b"), 400)
        many = "X-Forwarded-For: " + "10.0.0.1," * 3000
        self.assertEqual((await self.asked(trusted, many))[0], "10.0.0.1")

    async def test_a_traced_app_answers_the_same(self) -> None:
        self.tracer = spans = Spans()
        for line in ("X-Forwarded-Host: a b", "Forwarded: for=6.6.6.6\r\nX-Forwarded-For: 6.6.6.7"):
            self.assertEqual(await self.asked(["127.0.0.1"], line), 400)
            self.assertNotIn("client.address", spans.ended.pop().attributes)
        await self.asked(["127.0.0.1"], "X-Forwarded-For: 6.6.6.6")
        self.assertEqual(spans.ended.pop().attributes["client.address"], "6.6.6.6")

    async def test_what_is_no_proxy_is_refused(self) -> None:
        for wrong in ("127.0.0.1", ["localhost"], ["*"], ["10.0.0.0/99"], [None], [7], True):
            with self.subTest(wrong), self.assertRaisesRegex(StarioError, "^trusted_proxies"):
                Server(Stario(), trusted_proxies=wrong)  # type: ignore[arg-type]

    async def test_the_own_origin_is_the_one_that_the_proxy_was_asked_for(self) -> None:
        async def done(c: Context, w: Writer) -> None:
            w.text("done")

        app = Stario()
        app.use(same_origin)
        app.post("/", done)
        table = [
            ("https://shop.example", "shop.example", 200),
            ("https://shop.example", "shop.example:443", 200),
            ("https://shop.example:443", "shop.example", 200),
            ("https://shop.example:8443", "shop.example", 403),
            ("https://shop.example", "shop.example:8443", 403),
            ("http://shop.example", "shop.example", 403),  # and we know that it is https
            ("https://", "", 403),
            ("null", "", 403),
            ("shop.example", "shop.example", 403),
        ]
        async with connected(app, trusted_proxies=["127.0.0.1"]) as peer:
            for origin, host, status in table:
                fields = {"X_Forwarded_Proto": "https", "X_Forwarded_Host": host, "Origin": origin}
                with self.subTest(fields):
                    answer = await within(peer.get("/", "POST", Content_Length="0", **fields))
                    self.assertEqual(answer.status, status)


@asynccontextmanager
async def nginx(upstream: int) -> AsyncIterator[int]:
    """nginx with its default settings in front of a server: its port."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "nginx.conf")
        config.write_text(
            f"pid {folder}/pid; error_log {folder}/error.log; events {{}}\n"
            f"http {{ access_log off; server {{ listen 127.0.0.1:{port};\n"
            f"location / {{ proxy_pass http://127.0.0.1:{upstream}; }} }} }}\n"
        )
        process = await asyncio.create_subprocess_exec(
            "nginx", "-p", folder, "-c", str(config), "-g", "daemon off;",
            stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            await within(until_listening(port))
            yield port
        finally:
            process.terminate()
            await process.wait()


@asynccontextmanager
async def proxy(name: str, upstream: int) -> AsyncIterator[int]:
    """nginx or HAProxy, with the lines that the README has for them: its port."""
    port = free_port()
    configs = {
        "nginx": f"""
            events {{}}
            http {{ access_log off; server {{ listen 127.0.0.1:{port}; location / {{
                proxy_pass http://127.0.0.1:{upstream};
                proxy_http_version 1.1;
                proxy_set_header Connection "";
                proxy_set_header Host $http_host;
                proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
                proxy_set_header X-Forwarded-Proto https;
            }} }} }}
        """,
        "haproxy": f"""
            defaults
                mode http
                timeout connect 5s
                timeout client 60s
                timeout server 60s
                option forwardfor
            listen web
                bind 127.0.0.1:{port}
                http-request set-header X-Forwarded-Proto https
                server app 127.0.0.1:{upstream}
        """,
    }
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config")
        own = f"pid {folder}/pid; error_log {folder}/log;\n" if name == "nginx" else ""
        config.write_text(own + textwrap.dedent(configs[name]))
        options = ["-p", folder, "-c", str(config), "-g", "daemon off;"]
        process = await asyncio.create_subprocess_exec(
            name, *(options if name == "nginx" else ["-db", "-f", str(config)]),
            stderr=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            await within(until_listening(port))
            yield port
        finally:
            process.terminate()
            await process.wait()


class BehindAProxy(StreamTest):
    """What holds behind every proxy that is set up as the README says."""

    proxy = ""

    def proxied(self) -> Stario:
        async def stream(c: Context, w: Writer) -> None:
            w.event("who", f"{c.req.client} {c.req.scheme}")
            async for _, data in w.alive(self.relay.subscribe("*"), heartbeat=0.2):
                w.event("news", data)

        app = self.app(stream)

        async def plain(c: Context, w: Writer) -> None:
            w.text("ok")

        app.get("/plain", plain)
        return app

    async def test_a_stream_comes_at_once_with_the_address_and_a_disconnect_is_noticed(
        self,
    ) -> None:
        options: dict[str, Any] = {"trusted_proxies": ["127.0.0.1"]}
        async with (
            self.proxied().running(**options) as server,
            proxy(self.proxy, server.port) as port,
        ):
            peer = await Peer.connect(port)
            await peer.send("GET / HTTP/1.1\r\nHost: t\r\nX-Forwarded-For: 203.0.113.5\r\n\r\n")
            await within(peer.reader.readuntil(b"data: 203.0.113.5 https\n\n"))
            for text in ("one", "two"):
                self.relay.publish("a", text)
                await within(peer.reader.readuntil(f"data: {text}\n\n".encode()))
            await peer.close()
            await within(self.ended.wait())

    async def test_a_rolling_restart_loses_no_request(self) -> None:
        if not hasattr(socket, "SO_REUSEPORT"):
            self.skipTest("needs SO_REUSEPORT")
        statuses: list[int] = []
        done = False

        async def ask_on(port: int) -> None:
            peer = await Peer.connect(port)
            while not done:  # (on Python 3.11 `wait_for` may lose a cancellation)
                statuses.append((await within(peer.get("/plain"))).status)

        async with contextlib.AsyncExitStack() as new:
            async with self.proxied().running(reuse_port=True) as old:
                way = proxy(self.proxy, old.port)
                port = await new.enter_async_context(way)
                asking = [asyncio.create_task(ask_on(port)) for _ in range(4)]
                await until(lambda: len(statuses) > 50)
                running = self.proxied().running(port=old.port, reuse_port=True)
                await new.enter_async_context(running)
            before = len(statuses)
            await until(lambda: len(statuses) > before + 50)
            done = True
            await asyncio.gather(*asking)
        self.assertEqual(set(statuses), {200})


@needs("nginx")
class TestBehindNginx(BehindAProxy):
    proxy = "nginx"


@needs("haproxy")
class TestBehindHaproxy(BehindAProxy):
    proxy = "haproxy"


async def until_listening(port: int) -> None:
    while True:
        with suppress(OSError):
            await (await Peer.connect(port)).close()
            return
        await asyncio.sleep(0.01)


@needs("nginx")
class TestProxy(StreamTest):
    """nginx speaks HTTP/1.0 to us by default, and would keep what it gets in buffers."""

    async def stream(self, c: Context, w: Writer) -> None:
        self.start(w)
        async for _, data in w.alive(self.relay.subscribe("*"), heartbeat=0.2):
            w.event("news", data)
        self.log.append("cleanup")

    @asynccontextmanager
    async def behind_nginx(self) -> AsyncIterator[Peer]:
        async with self.app(self.stream).running() as server, nginx(server.port) as port:
            peer = await Peer.connect(port)
            await peer.send(GET)
            yield peer
            await peer.close()

    async def until(self, peer: Peer, text: bytes) -> bytes:
        return bytes(await within(peer.reader.readuntil(text)))

    async def test_each_event_comes_through_at_once(self) -> None:
        async with self.behind_nginx() as peer:
            head = (await self.until(peer, b"\r\n\r\n")).lower()
            self.assertIn(b"\r\ncontent-type: text/event-stream\r\n", head)
            self.assertIn(b"\r\ncache-control: no-cache\r\n", head)
            await self.until(peer, b"first</p>\n\n")
            for text in ("one", "two", "three"):
                self.relay.publish("a", text)
                await self.until(peer, f"data: {text}\n\n".encode())

    async def test_heartbeats_come_through(self) -> None:
        async with self.behind_nginx() as peer:
            await self.until(peer, b"first</p>\n\n")
            await self.until(peer, b":\n\n")
            await self.until(peer, b":\n\n")

    async def test_the_handler_hears_of_a_client_that_leaves(self) -> None:
        for leave in (close, reset):
            with self.subTest(leave.__name__):
                self.setUp()
                async with self.behind_nginx() as peer:
                    await self.until(peer, b"first</p>\n\n")
                    await leave(peer)
                    await within(self.ended.wait())
                self.assertEqual(self.log, ["cleanup"])
                self.assertTrue(is_empty(self.relay))

    async def test_the_client_hears_of_a_server_that_stops(self) -> None:
        async with self.app(self.stream).running() as server, nginx(server.port) as port:
            peer = await Peer.connect(port)
            await peer.send(GET)
            await self.until(peer, b"first</p>\n\n")
            await within(server.stop())
            self.assertTrue((await self.until(peer, b"0\r\n\r\n")).endswith(b"0\r\n\r\n"))
            await peer.close()
        self.assertEqual(self.log, ["cleanup"])

    async def test_a_page_comes_through_compressed(self) -> None:
        async def page(c: Context, w: Writer) -> None:
            w.html(h.P("hello " * 1000))

        async with self.app(page).running() as server, nginx(server.port) as port:
            peer = await Peer.connect(port)
            for _ in range(2):  # the connection to nginx stays
                await peer.send("GET / HTTP/1.1\r\nHost: t\r\nAccept-Encoding: gzip\r\n\r\n")
                head = (await self.until(peer, b"\r\n\r\n")).lower()
                self.assertIn(b"\r\ncontent-encoding: gzip\r\n", head)
                length = int(head.partition(b"content-length: ")[2].split()[0])
                body = await within(peer.reader.readexactly(length))
                self.assertIn(b"hello hello", zlib.decompress(body, wbits=31))
            await peer.close()


# -- 19. Static files


class TestAssets(HttpTest):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.outside = Path(folder.name).resolve()
        self.root = self.outside / "root"
        (self.root / "sub").mkdir(parents=True)
        (self.outside / "secret.txt").write_text("secret")
        (self.root / "style.css").write_text("body { color: red }\n" * 100)
        (self.root / "sub" / "a.txt").write_text("small")
        (self.root / ".env").write_text("secret")
        self.large = os.urandom(1_000_000)
        (self.root / "large.bin").write_bytes(self.large)
        self.spans = Spans()
        self.app = Stario(self.spans)
        self.app.assets("/static", self.root)

    async def get(self, peer: Peer, name: str, **fields: str) -> Answer:
        return await within(peer.get(f"/static/{asset(name)}", **fields))  # type: ignore[no-any-return]

    async def test_a_fingerprinted_file_is_cached_for_ever(self) -> None:
        """RFC 9111, section 5.2.2, and RFC 8246."""
        async with connected(self.app) as peer:
            self.assertRegex(asset("style.css"), r"^style\.[0-9a-f]{16}\.css$")
            answer = await self.get(peer, "style.css")
            self.assertEqual(answer.body, (self.root / "style.css").read_bytes())
            self.assertEqual(answer.headers["content-type"], "text/css; charset=utf-8")
            self.assertIn("immutable", answer.headers["cache-control"])
            self.assertEqual(answer.headers["x-content-type-options"], "nosniff")
            self.assertEqual((await self.get(peer, "sub/a.txt")).text, "small")

    async def test_a_plain_name_leads_to_the_fingerprinted_one(self) -> None:
        async with connected(self.app) as peer:
            for name in ("style.css", "sub/a.txt"):
                answer = await within(peer.get(f"/static/{name}"))
                wanted = "./" + asset(name).rpartition("/")[2]
                self.assertEqual((answer.status, answer.headers["location"]), (307, wanted))
                self.assertEqual(answer.headers["cache-control"], "no-cache")

    async def test_the_address_of_an_older_version_gives_the_present_one(self) -> None:
        """Not by a redirect: between two machines with different versions that has no end."""
        async with connected(self.app) as peer:
            for name in ("style.css", "large.bin"):
                old = f"/static/{name.replace('.', '.0123456789abcdef.')}"
                answer = await within(peer.get(old))
                self.assertEqual(answer.status, 200)
                self.assertEqual(answer.body, (self.root / name).read_bytes())
                self.assertEqual(answer.headers["cache-control"], "no-cache")

    async def test_names_that_look_like_fingerprinted_ones_are_found(self) -> None:
        names = ["x.0123456789abcdef.css", "x.0123456789abcdef", "x", "x.css", "plain", "ä b.txt"]
        names += ["a#b.js", "what?.txt", "%", "%2e.txt", "50%25.txt", "a+b;c=d&e.css", "a:b", "a."]
        for name in names:
            (self.root / name).write_text(name)
        async with connected(self.app) as peer:
            for name in names:
                with self.subTest(name):
                    path = f"/static/{quote(name)}"
                    answer = await within(peer.get(path))
                    self.assertEqual(answer.status, 307)
                    path = urljoin(path, answer.headers["location"])
                    self.assertEqual(path, f"/static/{asset(name)}")
                    answer = await within(peer.get(path))
                    self.assertEqual((answer.status, answer.text), (200, name))
                    self.assertIn("immutable", answer.headers["cache-control"])

    async def test_nothing_outside_and_nothing_hidden_is_served(self) -> None:
        """RFC 3986, section 5.2.4: escaped or not, `..` leaves nothing."""
        links: list[tuple[str, str | Path]] = [
            ("leave", self.outside / "secret.txt"),
            ("up", self.outside),
            ("self", "self"),
        ]
        if hasattr(os, "symlink"):
            for name, target in links:
                os.symlink(target, self.root / name)
        names = [
            "../secret.txt",
            "..%2fsecret.txt",
            "%2e%2e/secret.txt",
            "sub/../../secret.txt",
            "sub/..%5c..%5csecret.txt",
            "..\\secret.txt",
            f"/{self.outside}/secret.txt",
            f"%2f{self.outside}/secret.txt",
            ".env",
            "%2eenv",
            "sub/../.env",
            "leave",
            "up/secret.txt",
            "self",
            "sub",
            "sub/",
            "",
            "style.css/",
            "style.css/x",
            "style.css%00",
            "x" * 5000,
            "nothing.css",
        ]
        async with connected(self.app) as peer:
            for name in names:
                with self.subTest(name):
                    answer = await within(peer.get(f"/static/{name}"))
                    self.assertEqual((answer.status, answer.text), (404, "Not Found"))

    @unittest.skipUnless(hasattr(os, "symlink"), "needs symbolic links")
    async def test_links_inside_of_the_directory_are_followed(self) -> None:
        """As in a mounted ConfigMap, where each file is a link."""
        (self.root / "..data").mkdir()
        (self.root / "..data" / "real.txt").write_text("linked")
        os.symlink("..data/real.txt", self.root / "link.txt")
        async with connected(self.app) as peer:
            self.assertEqual((await self.get(peer, "link.txt")).text, "linked")

    async def test_who_has_it_gets_304(self) -> None:
        """RFC 9110, sections 13.1.2 and 15.4.5."""
        async with connected(self.app) as peer:
            for name in ("style.css", "large.bin"):
                for coding in ("identity", "gzip"):
                    first = await self.get(peer, name, Accept_Encoding=coding)
                    tag = first.headers["etag"]
                    for known in (tag, f"W/{tag}", f'"x", {tag}', "*"):
                        with self.subTest(name, coding=coding, known=known):
                            again = await self.get(
                                peer, name, Accept_Encoding=coding, If_None_Match=known
                            )
                            self.assertEqual((again.status, again.body), (304, b""))
                            self.assertEqual(again.headers["etag"], tag)
                    for other in ('"other"', tag.replace('"', ""), tag.replace('"', '"x', 1)):
                        answer = await self.get(
                            peer, name, Accept_Encoding=coding, If_None_Match=other
                        )
                        self.assertEqual(answer.status, 200)

    async def test_who_goes_on_with_another_version_gets_412(self) -> None:
        """RFC 9110, sections 13.1.1 and 13.2.2: by strong comparison, and before all else."""
        async with connected(self.app) as peer:
            tag = (await self.get(peer, "large.bin")).headers["etag"]
            conditions = {tag: 206, f'"x", {tag}': 206, "*": 206, f"W/{tag}": 412, '"x"': 412}
            for condition, status in conditions.items():
                with self.subTest(condition):
                    answer = await self.get(
                        peer, "large.bin", If_Match=condition, Range="bytes=0-9"
                    )
                    self.assertEqual(answer.status, status)
            answer = await self.get(peer, "large.bin", If_Match='"x"', If_None_Match=tag)
            self.assertEqual((answer.status, "etag" in answer.headers), (412, False))

    async def test_head_ignores_what_is_defined_for_get_only(self) -> None:
        """RFC 9110, section 14.2."""
        async with connected(self.app) as peer:
            for name in ("style.css", "large.bin"):
                for asked in ("bytes=1-2", "bytes=99999999-"):
                    answer = await within(peer.get(f"/static/{asset(name)}", "HEAD", Range=asked))
                    size = str((self.root / name).stat().st_size)
                    self.assertEqual((answer.status, answer.headers["content-length"]), (200, size))
            (self.root / "empty.txt").touch()
            self.assertEqual((await self.get(peer, "empty.txt", Range="bytes=-9")).status, 200)
            path = f"/static/{asset('style.css')}"
            plain = await within(peer.get(path, "HEAD", Accept_Encoding="gzip"))
            ranged = await within(peer.get(path, "HEAD", Accept_Encoding="gzip", Range="bytes=3-4"))
            self.assertEqual({**ranged.headers, "date": ""}, {**plain.headers, "date": ""})

    async def test_a_part_can_be_asked_for(self) -> None:
        """RFC 9110, sections 14.2 and 15.3.7; what is not understood gives the whole file."""
        whole, last = len(self.large), len(self.large) - 1
        ranges: dict[str, tuple[int, int, int]] = {
            "bytes=0-9": (206, 0, 10),
            "Bytes=5-9": (206, 5, 10),
            "bytes=10-": (206, 10, whole),
            "bytes=-10": (206, whole - 10, whole),
            f"bytes={last}-": (206, last, whole),
            "bytes=10-99999999": (206, 10, whole),
            "bytes=-99999999": (206, 0, whole),
            "bytes=0-": (206, 0, whole),  # Safari plays no video that comes with a 200
            "bytes=9-0": (200, 0, whole),
            "bytes=0-1,5-6": (200, 0, whole),
            "bytes=x-y": (200, 0, whole),
            "bytes=-": (200, 0, whole),
            "lines=0-1": (200, 0, whole),
        }
        async with connected(self.app) as peer:
            (self.root / "part.css").write_bytes(self.large[:1000])
            for asked, (status, start, stop) in ranges.items():
                with self.subTest(asked):
                    answer = await self.get(peer, "large.bin", Range=asked)
                    self.assertEqual((answer.status, answer.body), (status, self.large[start:stop]))
                    if status == 206:
                        wanted = f"bytes {start}-{stop - 1}/{whole}"
                        self.assertEqual(answer.headers["content-range"], wanted)
            small = await self.get(peer, "part.css", Range="bytes=5-9", Accept_Encoding="gzip")
            self.assertEqual((small.status, small.body), (206, self.large[5:10]))
            self.assertNotIn("content-encoding", small.headers)
            for asked in (f"bytes={whole}-", "bytes=-0"):
                answer = await self.get(peer, "large.bin", Range=asked)
                self.assertEqual(
                    (answer.status, answer.headers["content-range"]), (416, f"bytes */{whole}")
                )
                self.assertNotIn("immutable", answer.headers["cache-control"])

    async def test_a_part_of_another_version_is_not_given(self) -> None:
        """RFC 9110, section 13.1.5."""
        async with connected(self.app) as peer:
            tag = (await self.get(peer, "large.bin")).headers["etag"]
            for condition, status in ((tag, 206), ('"other"', 200), (f"W/{tag}", 200)):
                with self.subTest(condition):
                    answer = await self.get(
                        peer, "large.bin", Range="bytes=0-9", If_Range=condition
                    )
                    self.assertEqual(answer.status, status)

    async def test_text_is_compressed_once_or_beforehand(self) -> None:
        """RFC 9110, sections 8.4 and 12.5.3."""
        plain = (self.root / "style.css").read_bytes()
        async with connected(self.app) as peer:
            answer = await self.get(peer, "style.css", Accept_Encoding="gzip")
            self.assertEqual(answer.headers["content-encoding"], "gzip")
            self.assertIn("accept-encoding", answer.headers["vary"])
            self.assertEqual(gzip.decompress(answer.body), plain)
            identity = await self.get(peer, "style.css")
            self.assertIn("accept-encoding", identity.headers["vary"])
            self.assertNotEqual(identity.headers["etag"], answer.headers["etag"])
            (self.root / "page.css").write_bytes(plain)
            (self.root / "page.css.gz").write_bytes(gzip.compress(plain, 1) + b"")
            answer = await self.get(peer, "page.css", Accept_Encoding="gzip")
            self.assertEqual(answer.body, (self.root / "page.css.gz").read_bytes())
            answer = await self.get(peer, "large.bin", Accept_Encoding="gzip")
            self.assertNotIn("content-encoding", answer.headers)

    async def test_a_file_that_changes_has_another_name(self) -> None:
        async with connected(self.app) as peer:
            before = asset("style.css")
            await self.get(peer, "style.css")
            (self.root / "style.css").write_text("changed")
            self.assertNotEqual(asset("style.css"), before)
            answer = await within(peer.get(f"/static/{before}"))
            self.assertEqual(
                (answer.text, answer.headers["cache-control"]), ("changed", "no-cache")
            )
            self.assertEqual((await self.get(peer, "style.css")).text, "changed")
            path = f"/static/{asset('style.css')}"
            (self.root / "style.css").unlink()
            self.assertEqual((await within(peer.get(path))).status, 404)
            with self.assertRaisesRegex(StarioError, "no file 'style.css'"):
                asset("style.css")

    async def test_contents_from_a_dict(self) -> None:
        app = Stario()
        app.assets("/built", {"app.js": "let a = 1", "deep/x.bin": b"\0"}, collection="built")
        async with connected(app) as peer:
            answer = await within(peer.get(f"/built/{asset('app.js', collection='built')}"))
            self.assertEqual((answer.status, answer.text), (200, "let a = 1"))
            answer = await within(peer.get(f"/built/{asset('deep/x.bin', 'built')}"))
            self.assertEqual(answer.body, b"\0")
            self.assertEqual((await within(peer.get("/built/../app.py"))).status, 404)
        looked_for = re.escape(repr(os.path.abspath("missing")))  # so where it looked is said
        with self.assertRaisesRegex(StarioError, f"no directory {looked_for}"):
            app.assets("/more", "missing")

    async def test_a_large_file_comes_whole_and_the_connection_goes_on(self) -> None:
        """Also to many at once, and to HEAD without its contents."""
        async with self.app.running() as server:
            path = f"/static/{asset('large.bin')}"

            async def fetch() -> None:
                peer = await Peer.connect(server.port)
                for _ in range(3):
                    self.assertEqual((await within(peer.get(path))).body, self.large)
                head = await within(peer.get(path, "HEAD"))
                self.assertEqual(head.headers["content-length"], str(len(self.large)))
                self.assertEqual(
                    (await within(peer.get(path, Range="bytes=1-2"))).body, self.large[1:3]
                )
                await peer.close()

            await asyncio.gather(*(fetch() for _ in range(5)))

    async def test_clients_that_vanish_or_stop_reading_keep_no_file_open(self) -> None:
        """A reset, an end, and one that just does not read: the handler ends each time."""
        huge = self.root / "huge.bin"
        huge.touch()
        os.truncate(huge, 50_000_000)
        path = f"/static/{asset('huge.bin')}"
        for ending in ("reset", "close", "stop reading"):
            with self.subTest(ending):
                self.spans.ended.clear()
                async with self.app.running(write_timeout=0.3) as server:
                    warm = await Peer.connect(server.port)  # what the loop opens for itself
                    await within(warm.get("/"))
                    await warm.close()
                    await until(lambda: not connections_of(server))
                    files = _open_files()
                    peer = await Peer.connect(server.port)
                    await peer.send(f"GET {path} HTTP/1.1\r\n{HOST}\r\n")
                    await within(peer.head())
                    stop_reading(peer)
                    await until(lambda: [c for c in connections_of(server) if c._paused_writing])
                    if ending == "reset":
                        peer.reset()
                    elif ending == "close":
                        peer.writer.transport.abort()
                    await until(lambda: self.spans.named(f"GET {path}"))
                    await until(lambda: not connections_of(server))
                    if ending == "stop reading":
                        await peer.close()
                    await until(lambda most=files: _open_files() <= most)  # type: ignore[misc]
                    (span,) = self.spans.named(f"GET {path}")
                    self.assertIsNone(span.error)

    async def test_a_file_that_gets_shorter_while_it_is_sent_is_cut_off(self) -> None:
        """RFC 9112, section 8: the client gets less than it was told, and can tell."""
        huge = self.root / "huge.bin"
        huge.touch()
        os.truncate(huge, 50_000_000)
        path = f"/static/{asset('huge.bin')}"
        async with self.app.running() as server:
            peer = await Peer.connect(server.port)
            stop_reading(peer)
            await peer.send(f"GET {path} HTTP/1.1\r\n{HOST}\r\n")
            await until(lambda: [c for c in connections_of(server) if c._paused_writing])
            os.truncate(huge, 1000)
            read_again(peer)
            await within(peer.head())
            self.assertLess(len(await within(peer.rest())), 50_000_000)
            await peer.close()
        (span,) = self.spans.named(f"GET {path}")
        self.assertIn("shorter", span.error or "")

    @unittest.skipUnless(hasattr(os, "symlink"), "needs symbolic links")
    async def test_every_way_to_change_a_file_is_noticed(self) -> None:
        """Though its size and its time stay: a link set anew, a folder's, a write in place."""
        file, (first, second) = self.root / "sub" / "a.txt", (self.root / "v1", self.root / "v2")
        for folder, text in ((first, "one__"), (second, "two__")):
            folder.mkdir()
            (folder / "x.txt").write_text(text)
            os.utime(folder / "x.txt", (10**9, 10**9))
        os.symlink("v1", self.root / "now")
        file.write_text("one__")
        os.utime(file, (10**9, 10**9))

        def swap_folder() -> None:
            os.symlink("v2", self.root / "next")
            os.replace(self.root / "next", self.root / "now")

        def write_in_place() -> None:
            with file.open("r+") as opened:
                opened.write("two__")
            os.utime(file, (10**9, 10**9))

        async with connected(self.app) as peer:
            for name, change in (("now/x.txt", swap_folder), ("sub/a.txt", write_in_place)):
                with self.subTest(name):
                    before = asset(name)
                    self.assertEqual((await self.get(peer, name)).text, "one__")
                    await asyncio.to_thread(change)
                    self.assertNotEqual(asset(name), before)
                    self.assertEqual((await self.get(peer, name)).text, "two__")

    def test_two_changes_within_one_tick_of_the_clock_are_noticed(self) -> None:
        """The second leaves the same version, so a version that is as young is looked at again."""
        now = os.stat(self.root / "style.css")
        version = mock.patch.object(
            stario, "_version", lambda found: (now.st_mtime_ns, now.st_ctime_ns)
        )
        # (a slow machine has its clock tick on between the lines below)
        with version, mock.patch.object(stario, "_TICK", 10**12):
            before = asset("style.css")
            (self.root / "style.css").write_text("changed")
            self.assertNotEqual(asset("style.css"), before)

    @unittest.skipUnless(hasattr(os, "symlink"), "needs symbolic links")
    async def test_a_link_to_something_hidden_is_not_followed(self) -> None:
        (self.root / ".git").mkdir()
        (self.root / ".git" / "config").write_text("secret")
        (self.root / "..data").mkdir()
        (self.root / "..data" / ".env").write_text("secret")
        for name, target in (
            ("config", ".git/config"), ("git", ".git"), ("env", "..data/.env"), ("twice", "config"),
        ):  # fmt: skip
            os.symlink(target, self.root / name)
        async with connected(self.app) as peer:
            for name in ("config", "git/config", "env", "twice"):
                with self.subTest(name):
                    self.assertEqual((await within(peer.get(f"/static/{name}"))).status, 404)

    @unittest.skipUnless(hasattr(os, "symlink"), "needs symbolic links")
    def test_a_link_that_takes_the_place_of_a_file_meanwhile_is_not_followed(self) -> None:
        """Between looking where a name leads and opening it: of the file, and of its folder."""
        real_open, outside = stario._open_regular, self.outside / "elsewhere"
        outside.mkdir()
        (outside / "a.txt").write_text("secret")

        def swapped(name: Path, target: Path) -> Any:
            def open_swapped(path: str) -> Any:
                if not name.is_symlink():
                    name.rename(self.outside / "away")
                    os.symlink(target, name)
                return real_open(path)

            return mock.patch.object(stario, "_open_regular", open_swapped)

        for name, target in (
            (self.root / "style.css", outside / "a.txt"), (self.root / "sub", outside),
        ):  # fmt: skip
            with self.subTest(name.name), swapped(name, target):
                with self.assertRaisesRegex(StarioError, "no file"):
                    asset("style.css" if name.name == "style.css" else "sub/a.txt")
                shutil.rmtree(self.outside / "away", ignore_errors=True)

    def test_the_other_names_that_windows_has_for_a_file_are_refused(self) -> None:
        names = [
            "a.txt::$DATA",
            "a.txt.",
            "a.txt ",
            "A~1.TXT",
            "con",
            "Nul.txt",
            "com1",
            "sub/aux.c",
        ]
        for name in names:
            (self.root / name).write_text("x")
            self.assertTrue(asset(name))  # elsewhere these are names as others
        files = stario._collections["static"]
        with mock.patch.object(os, "name", "nt"):
            for name in names:
                with self.subTest(name), self.assertRaises(FileNotFoundError):
                    files._resolve(name)
            self.assertTrue(files._resolve("style.css"))

    async def test_a_compressed_copy_counts_only_if_it_holds_the_same(self) -> None:
        plain = (self.root / "style.css").read_bytes()
        right = gzip.compress(plain, 1)
        (self.outside / "right.gz").write_bytes(right)
        copies: dict[str, bytes | Path] = {
            "old": gzip.compress(b"old" + plain),
            "shorter": gzip.compress(plain[:-1]),
            "cut": right[:-4],
            "more": right + b"x",
            "none": b"no gzip",
            "bomb": gzip.compress(bytes(10_000_000)),
            "outside": self.outside / "right.gz",
        }
        async with connected(self.app) as peer:
            for name, copy in copies.items():
                with self.subTest(name):
                    (self.root / f"{name}.css").write_bytes(plain)
                    if isinstance(copy, bytes):
                        (self.root / f"{name}.css.gz").write_bytes(copy)
                    else:
                        os.symlink(copy, self.root / f"{name}.css.gz")
                    answer = await self.get(peer, f"{name}.css", Accept_Encoding="gzip")
                    self.assertNotEqual(answer.body, right)
                    self.assertEqual(gzip.decompress(answer.body), plain)

    async def test_what_compression_makes_no_smaller_is_sent_whole_as_it_is(self) -> None:
        """An icon with a PNG in it, say, or a text of random characters."""
        noise = os.urandom(5000)
        async with connected(self.app) as peer:
            for name in ("site.ico", "noise.txt", "copied.wav"):
                (self.root / name).write_bytes(noise)
                (self.root / "copied.wav.gz").write_bytes(gzip.compress(noise))
                for coding in ("gzip", "br", "zstd", "*"):
                    with self.subTest(name, coding=coding):
                        answer = await self.get(peer, name, Accept_Encoding=coding)
                        self.assertEqual(answer.body, noise)
                        self.assertNotIn("content-encoding", answer.headers)
                        self.assertEqual(answer.headers["vary"], "accept-encoding")

    @needs("brotli", "zstandard")
    def test_the_copies_of_other_codings_are_looked_at_too(self) -> None:
        import brotli
        import zstandard

        plain = b"some text " * 100
        makers: dict[str, Callable[[bytes], bytes]] = {
            "br": brotli.compress, "zstd": zstandard.compress, "gzip": gzip.compress
        }  # fmt: skip
        for coding, make in makers.items():
            with self.subTest(coding):
                size = len(plain) + 1
                self.assertEqual(stario._decoded(coding, make(plain), size), plain)
                for wrong in (make(bytes(10**7)), make(plain)[:-1], b"", b"x" * 99):
                    found: object = None
                    with suppress(Exception):
                        found = stario._decoded(coding, wrong, size)
                    self.assertNotEqual(found, plain)

    async def test_a_file_that_is_always_written_is_answered(self) -> None:
        """A log: each look finds another version. No answer may be kept for ever, none is torn."""
        for name, size in (("small.log", 10), ("large.log", 300_000)):
            file = self.root / name
            file.write_bytes(b"x" * size)
            real = stario._read_file

            def grow(*arguments: Any, file: Path = file, real: Any = real, **options: Any) -> Any:
                with file.open("ab") as opened:
                    opened.write(b"more")
                return real(*arguments, **options)

            async with connected(self.app) as peer:
                path = f"/static/{name}"
                with mock.patch.object(stario, "_read_file", grow):
                    for _ in range(3):
                        answer = await within(peer.get(path))
                        if answer.status == 307:
                            path = urljoin(path, answer.headers["location"])
                self.assertEqual(answer.status, 200)
                self.assertIn(answer.body, file.read_bytes())
                self.assertEqual(answer.headers["cache-control"], "no-cache")

    async def test_what_is_torn_while_it_is_read_is_not_kept_for_ever(self) -> None:
        count = iter(range(10**6))
        with mock.patch.object(stario, "_version", lambda found: (next(count),)):
            async with connected(self.app) as peer:
                for name in ("style.css", asset("style.css")):
                    answer = await within(peer.get(f"/static/{name}"))
                    self.assertEqual(answer.body, (self.root / "style.css").read_bytes())
                    self.assertEqual(answer.headers["cache-control"], "no-cache")

    async def test_a_file_of_any_size_that_is_overwritten_does_not_come_as_complete(self) -> None:
        """The client reads only afterwards: what waits in the kernel must not change either."""
        for size in (300_000, 3_000_000, 30_000_000):
            with self.subTest(size):
                file = self.root / f"{size}.bin"
                file.write_bytes(b"a" * size)
                self.spans.ended.clear()
                async with self.app.running() as server:
                    peer = await Peer.connect(server.port)
                    stop_reading(peer)
                    path = f"/static/{asset(file.name)}"
                    await peer.send(f"GET {path} HTTP/1.1\r\n{HOST}Connection: close\r\n\r\n")
                    await until(
                        lambda server=server: (  # type: ignore[misc]
                            self.spans.ended
                            or [c for c in connections_of(server) if c._paused_writing]  # type: ignore[misc]
                        )
                    )
                    with file.open("r+b") as opened:
                        opened.write(b"b" * size)
                    read_again(peer)
                    self.assertIn("immutable", (await within(peer.head())).headers["cache-control"])
                    body = await within(peer.rest())
                    self.assertTrue(len(body) < size or body == b"a" * size)
                    await peer.close()

    async def test_the_disk_fails_and_not_the_client(self) -> None:
        class Failing(io.FileIO):
            def read(self, size: int | None = -1, /) -> Any:
                if size and size > 2:  # what `_read_file` looks at
                    raise OSError(errno.EIO, "the disk")
                return super().read(size)

        async with connected(self.app) as peer:
            path = f"/static/{asset('large.bin')}"
            with mock.patch.object(stario, "_open_regular", Failing):
                await peer.send(f"GET {path} HTTP/1.1\r\n{HOST}\r\n")
                await within(peer.head())
                self.assertLess(len(await within(peer.rest())), len(self.large))
        (span,) = self.spans.named(f"GET {path}")
        self.assertIn("the disk", span.error or "")

    async def test_without_descriptors_a_file_is_not_missing_but_late(self) -> None:
        async with connected(self.app) as peer:
            paths = {name: f"/static/{asset(name)}" for name in ("style.css", "large.bin")}
            await asyncio.sleep(0.06)  # then what is on disk has settled
            asset("style.css")
            for number in (errno.EMFILE, errno.ENFILE):
                with mock.patch.object(stario, "_open_regular", side_effect=OSError(number, "")):
                    self.assertEqual((await within(peer.get("/static/sub/a.txt"))).status, 503)
                    self.assertEqual((await within(peer.get(paths["large.bin"]))).status, 503)
                    self.assertEqual((await within(peer.get(paths["style.css"]))).status, 200)
            self.assertEqual((await self.get(peer, "sub/a.txt")).status, 200)

    def test_a_file_from_the_future_is_read_once(self) -> None:
        future = time.time() + 10**8
        os.utime(self.root / "style.css", (future, future))
        with (
            mock.patch.object(stario, "_TICK", 0),  # what is new is kept, too
            mock.patch.object(stario, "_read_file", wraps=stario._read_file) as read,
        ):
            self.assertEqual(asset("style.css"), asset("style.css"))
        self.assertEqual(read.call_count, 1)

    async def test_a_large_file_that_is_not_sent_is_closed(self) -> None:
        name, opened = f"/static/{asset('large.bin')}", list[Any]()
        real = stario._open_regular

        def noted(path: str) -> Any:
            opened.append(real(path))
            return opened[-1]

        with mock.patch.object(stario, "_open_regular", noted):
            async with connected(self.app) as peer:
                known = (await within(peer.get(name))).headers["etag"]
                known += "".join(f', "{n}"' for n in range(40))
                for status, fields in (
                    (304, {"if-none-match": "*"}),
                    (304, {"if-none-match": known}),
                    (412, {"if-match": '"other"'}),
                    (416, {"range": "bytes=1000000-"}),
                    (200, {"if-match": known}),
                ):
                    answer = await within(peer.get(name, **fields))
                    self.assertEqual(answer.status, status)
        self.assertGreaterEqual(len(opened), 6)
        self.assertTrue(all(file.closed for file in opened))

    async def test_a_large_file_is_hashed_once(self) -> None:
        """By however many it is asked for at first, and however many small ones come after."""
        old = time.time() - 100
        os.utime(self.root / "large.bin", (old, old))
        await asyncio.sleep(0.06)
        real, hashed = hashlib.file_digest, []

        def noted(*arguments: Any) -> Any:
            hashed.append(threading.current_thread())
            return real(*arguments)

        with (
            mock.patch.object(hashlib, "file_digest", noted),
            mock.patch.object(stario, "_IN_MEMORY_TOTAL", 50_000),
            mock.patch.object(stario, "_TICK", -(10**18)),  # what is new is kept, too
        ):
            async with self.app.running() as server:
                peers = [await Peer.connect(server.port) for _ in range(10)]
                await asyncio.gather(*(within(one.get("/static/large.bin")) for one in peers))
                for number in range(100):
                    (self.root / f"{number}.txt").write_bytes(b"x" * number * 10)
                    asset(f"{number}.txt")
                for one in peers:
                    self.assertEqual((await within(self.get(one, "large.bin"))).status, 200)
                    await one.close()
            files = stario._collections["static"]
            self.assertLessEqual(files._held, 50_000)
            self.assertEqual(files._held, sum(file.memory for file in files._files.values()))
        self.assertEqual(len(hashed), 1)
        self.assertIsNot(hashed[0], threading.main_thread())

    def test_a_file_with_many_names_is_hashed_once_and_takes_bounded_memory(self) -> None:
        (self.root / "self").symlink_to(self.root)
        (self.root / "again").symlink_to(self.root)
        old = time.time() - 100
        os.utime(self.root / "large.bin", (old, old))
        with (
            mock.patch.object(hashlib, "file_digest", wraps=hashlib.file_digest) as hashed,
            mock.patch.object(stario, "_IN_MEMORY_TOTAL", 50_000),
            mock.patch.object(stario, "_TICK", -(10**18)),  # what is new is kept, too
        ):
            for number in range(100):
                way = "".join(("self/", "again/")[number >> bit & 1] for bit in range(7))
                for name in ("large.bin", "style.css"):
                    self.assertEqual(asset(way + name), way + asset(name))
            files = stario._collections["static"]
            self.assertLess(len(files._files), 50)
            self.assertEqual(files._held, sum(file.memory for file in files._files.values()))
            self.assertEqual(hashed.call_count, 1)
            (self.root / "large.bin").write_bytes(os.urandom(300_001))
            asset("self/large.bin")
            self.assertEqual(hashed.call_count, 2)

    async def test_an_escaped_slash_leads_to_no_file_of_another_folder(self) -> None:
        (self.root / "a.txt").write_text("of the root")
        async with connected(self.app) as peer:
            for name in ("sub%2fa.txt", "sub%2Fa.txt", "sub%2F..%2Fa.txt", asset("a.txt") + "%2f"):
                self.assertEqual((await within(peer.get(f"/static/{name}"))).status, 404)

    def test_what_is_no_source_and_no_name_is_refused(self) -> None:
        wrong: tuple[Any, ...] = (
            None, 7, ["a"], "no such directory",
            {"a.css": Path("x")}, {"a.css": 7}, {7: "x"}, {"/a.css": "x"}, {"": "x"},
        )  # fmt: skip
        for source in wrong:
            with self.subTest(source), self.assertRaisesRegex(StarioError, "^assets"):
                Stario().assets("/static", source)
        with suppress(OSError):  # where names are text, there can be no such file
            (self.root / os.fsdecode(b"\xff.css")).write_bytes(b"no address leads here")
        for name in (
            None,
            Path("style.css"),
            "/style.css",
            "./style.css",
            os.fsdecode(b"\xff.css"),
        ):
            with self.subTest(repr(name)), self.assertRaisesRegex(StarioError, "has no file"):
                asset(name)  # type: ignore[arg-type]

    async def test_types_agree_with_what_is_sent(self) -> None:
        """RFC 9110, section 8.3: the type is that of the bytes once their coding is undone."""
        wanted = {
            "a.tar.gz": ("application/gzip", None),
            "A.TGZ": ("application/gzip", None),
            "page.html.gz": ("application/gzip", None),
            "a.css.br": ("application/octet-stream", None),
            "a.js.zst": ("application/zstd", None),
            "a.txt.bz2": ("application/x-bzip2", None),
            "packed.svgz": ("image/svg+xml", "gzip"),
            "plain.svgz": ("image/svg+xml", None),
            "data:,x.html": ("text/html; charset=utf-8", None),
            "a.unknown-kind": ("application/octet-stream", None),
            "compose.yml": ("application/yaml", None),
            "icons.eot": ("application/vnd.ms-fontobject", None),
        }
        async with connected(self.app) as peer:
            for name, (kind, coding) in wanted.items():
                with self.subTest(name):
                    packed = name.startswith("packed")
                    (self.root / name).write_bytes(
                        gzip.compress(b"<svg/>") if packed else b"<svg/>"
                    )
                    answer = await self.get(peer, name)
                    self.assertEqual(answer.headers["content-type"], kind)
                    self.assertEqual(answer.headers.get("content-encoding"), coding)

    def test_threads_may_ask_while_the_collector_asks_too(self) -> None:
        """`asset` in a `__del__` may come between any two steps of another `asset`."""
        for number in range(300):
            (self.root / f"{number}.txt").write_text("x" * number)
        failed: list[BaseException] = []

        class Asks:
            def __del__(self) -> None:
                asset("7.txt")

        def work(first: int) -> None:
            try:
                for step in range(300):
                    knot = Asks()
                    knot.me = knot  # type: ignore[attr-defined]
                    del knot
                    asset(f"{(first + step) % 300}.txt")
            except BaseException as exc:
                failed.append(exc)

        with (
            mock.patch.object(stario, "_IN_MEMORY_TOTAL", 20_000),
            mock.patch.object(stario, "_TICK", -(10**18)),
            restless(),
        ):
            in_threads(*(functools.partial(work, 50 * number) for number in range(4)))
        self.assertEqual(failed, [])


@contextmanager
def restless() -> Iterator[None]:
    """Threads change places after every few bytecodes, and the collector runs all the time."""
    usual, interval = gc.get_threshold(), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(3)
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        sys.setswitchinterval(interval)
        gc.collect()


def in_threads(*work: Callable[[], object]) -> None:
    """Call these at the same time; one that hangs is an error."""
    threads = [threading.Thread(target=one, daemon=True) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a thread hangs"


class TestDownloads(HttpTest):
    """`w.file`."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name)
        self.large = os.urandom(1_000_000)
        (self.root / "large.bin").write_bytes(self.large)
        (self.root / "small.csv").write_text("a;b\n" * 100)
        self.spans = Spans()
        self.app = Stario(self.spans)
        self.after: list[str] = []

    def download(self, source: Any, *, wait: bool = False, **options: Any) -> None:
        async def handler(c: Context, w: Writer) -> None:
            sending = w.file(source, **options)
            if wait:
                await sending
            self.after.append("goes on")

        self.app.handle("GET", "/x", handler)
        self.app.handle("POST", "/x", handler)

    def test_no_long_suffix_is_kept(self) -> None:
        suffix = ".pdf" + "x" * 20_000
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        for number in range(200):
            file = stario._file_of(f"a{suffix}{number}", b"")
            self.assertEqual(file.content_type, "application/octet-stream")
        self.assertLess(tracemalloc.get_traced_memory()[0], 1_000_000)

    async def test_the_file_is_whole_if_the_handler_ends_the_answer_or_its_failure_is_handled(
        self,
    ) -> None:
        async def ends(c: Context, w: Writer) -> None:
            w.file(self.root / c.req.params["name"])
            w.end()

        async def fails(c: Context, w: Writer) -> None:
            w.file(self.root / c.req.params["name"])
            raise ValueError("after the answer")

        async def oops(c: Context, w: Writer, exc: Exception) -> None:
            self.after.append(str(exc))

        self.app.on_error(ValueError, oops)
        self.app.get("/ends/{name}", ends)
        self.app.get("/fails/{name}", fails)
        async with connected(self.app) as peer:
            for path in ("/ends/large.bin", "/fails/large.bin", "/fails/small.csv"):
                with self.subTest(path):
                    answer = await within(peer.get(path))
                    self.assertEqual(answer.body, (self.root / path.split("/")[2]).read_bytes())
        self.assertEqual(self.after, ["after the answer"] * 2)

    async def test_nothing_is_written_into_a_file(self) -> None:
        async def writes(c: Context, w: Writer) -> None:
            w.file(self.root / "large.bin")
            w.write(b"x")

        self.app.get("/writes", writes)
        async with connected(self.app) as peer:
            await peer.send(f"GET /writes HTTP/1.1\r\n{HOST}\r\n")
            await within(peer.head())
            self.assertEqual(await within(peer.rest()), b"")
        self.assertIn("is complete", self.spans.named("GET /writes")[0].error or "")

    async def test_a_path_or_bytes_with_or_without_waiting(self) -> None:
        cases = {
            "small": (self.root / "small.csv", (self.root / "small.csv").read_bytes()),
            "large": (str(self.root / "large.bin"), self.large),
            "bytes": (b"12345", b"12345"),
            "empty": (b"", b""),
        }
        for name, (source, wanted) in cases.items():
            for wait in (False, True):
                with self.subTest(name, wait=wait):
                    self.fresh_app()
                    self.download(source, wait=wait)
                    async with connected(self.app) as peer:
                        for method in ("GET", "POST", "GET"):
                            answer = await within(peer.get("/x", method))
                            self.assertEqual((answer.status, answer.body), (200, wanted))
                        head = await within(peer.get("/x", "HEAD"))
                        self.assertEqual(head.headers["content-length"], str(len(wanted)))
                        self.assertEqual((await within(peer.get("/x"))).body, wanted)
                    self.assertEqual(self.after, ["goes on"] * 5)

    def fresh_app(self) -> None:
        self.app, self.after = Stario(self.spans), []

    async def test_parts_and_validators(self) -> None:
        for source in (self.root / "large.bin", self.large):
            self.fresh_app()
            self.download(source)
            async with connected(self.app) as peer:
                tag = (await within(peer.get("/x"))).headers["etag"]
                part = await within(peer.get("/x", Range="bytes=5-9", If_Range=tag))
                self.assertEqual((part.status, part.body), (206, self.large[5:10]))
                self.assertEqual((await within(peer.get("/x", If_None_Match=tag))).status, 304)
                self.assertEqual((await within(peer.get("/x", If_Match='"y"'))).status, 412)
                self.assertEqual((await within(peer.get("/x", Range="bytes=9999999-"))).status, 416)
                posted = await within(peer.get("/x", "POST", Range="bytes=5-9", If_None_Match=tag))
                self.assertEqual((posted.status, posted.body), (200, self.large))

    async def test_it_is_saved_under_the_name_that_is_given(self) -> None:
        """RFC 6266 and RFC 8187: in ASCII for all, in UTF-8 for those that know it."""
        names = {
            "a b.csv": 'attachment; filename="a b.csv"',
            "Übersicht €.csv": 'attachment; filename="_bersicht _.csv"; '
            "filename*=UTF-8''%C3%9Cbersicht%20%E2%82%AC.csv",
            'a"; x="\\.csv': 'attachment; filename="a_; x=__.csv"; '
            "filename*=UTF-8''a%22%3B%20x%3D%22%5C.csv",
        }
        for name, wanted in names.items():
            with self.subTest(name):
                self.fresh_app()
                self.download(b"x", filename=name, status=201)
                async with connected(self.app) as peer:
                    answer = await within(peer.get("/x"))
                    self.assertEqual(answer.headers["content-disposition"], wanted)
                    self.assertEqual(answer.headers["content-type"], "text/csv; charset=utf-8")
                    self.assertEqual(answer.status, 201)

    async def test_what_cannot_be_sent(self) -> None:
        for source, options, status in (
            (self.root / "missing", {}, 404),
            (self.root, {}, 404),
            (b"x", {"filename": "a\r\nb"}, 500),
        ):
            with self.subTest(source):
                self.fresh_app()
                self.download(source, **options)  # type: ignore[arg-type]
                async with connected(self.app) as peer:
                    self.assertEqual((await within(peer.get("/x"))).status, status)

    async def test_it_is_one_answer_and_cut_off_if_the_handler_fails(self) -> None:
        async def twice(c: Context, w: Writer) -> None:
            w.file(self.root / "large.bin")
            w.text("again")

        self.app.get("/twice", twice)
        self.addCleanup(gc.enable)
        async with connected(self.app) as peer:
            await within(peer.get("/"))
            without_connection = max(0, _open_files() - 1)
            gc.disable()
            await peer.send(f"GET /twice HTTP/1.1\r\n{HOST}\r\n")
            await within(peer.head())
            self.assertEqual(await within(peer.rest()), b"")
            await until(lambda: _open_files() <= without_connection)
        self.assertIn("answered already", self.spans.named("GET /twice")[0].error or "")

    async def test_it_is_compressed_as_other_answers_are(self) -> None:
        self.download(self.root / "small.csv")
        async with connected(self.app) as peer:
            answer = await within(peer.get("/x", Accept_Encoding="gzip"))
            self.assertEqual(answer.headers["content-encoding"], "gzip")
            self.assertEqual(gzip.decompress(answer.body), b"a;b\n" * 100)
            tag = answer.headers["etag"]
            again = await within(peer.get("/x", Accept_Encoding="gzip", If_None_Match=tag))
            self.assertEqual(again.status, 304)

    async def test_a_304_has_the_etag_that_the_200_would_have(self) -> None:
        """RFC 9110, section 15.4.5. A compressed answer's ETag is weak, another's is not."""
        self.download(self.root / "small.csv")
        async with connected(self.app) as peer:
            for coding in ("gzip", "identity"):
                tag = (await within(peer.get("/x", Accept_Encoding=coding))).headers["etag"]
                self.assertEqual(tag.startswith("W/"), coding == "gzip")
                for known in (tag, "*"):
                    again = await within(
                        peer.get("/x", Accept_Encoding=coding, If_None_Match=known)
                    )
                    self.assertEqual((again.status, again.headers["etag"]), (304, tag))
                    self.assertNotIn("content-encoding", again.headers)


# -- 20. Telemetry


with suppress(ImportError):  # Windows has neither
    import fcntl
    import termios


class Terminal:
    """A program with a RichTracer in a pseudo-terminal, and the screen that it makes."""

    def __init__(self, test: unittest.TestCase, work: str, **environment: str) -> None:
        import pyte

        program = "import os, sys, time, stario\nwith stario.RichTracer() as tracer:\n" + work
        usual = {"TERM": "xterm", "NO_COLOR": "", "FORCE_COLOR": ""}
        self.test, self.raw = test, ""
        self.screen = pyte.HistoryScreen(80, 24, history=10_000)
        self._stream = pyte.Stream(self.screen)
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._master, slave = os.openpty()
        test.addCleanup(os.close, self._master)
        self.resize(80)
        self._child = subprocess.Popen(
            [sys.executable, "-c", program], cwd=HERE, stdin=slave, stdout=slave, stderr=slave,
            env={**os.environ, **usual, **environment}, preexec_fn=self._take_terminal,
        )  # fmt: skip
        os.close(slave)

    def _take_terminal(self) -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C comes as a signal

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.screen.resize(24, columns)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def lines(self) -> list[str]:
        rows = [*self.screen.history.top, *(self.screen.buffer[y] for y in range(24))]
        found = ("".join(row[x].data for x in range(self.screen.columns)).rstrip() for row in rows)
        return [line for line in found if line]

    def text(self) -> str:
        return "\n".join(self.lines()) + "\n"

    def read_until(self, found: Callable[[], object]) -> None:
        while not found():
            self.test.assertTrue(select.select([self._master], [], [], 20)[0], self.text())
            got = self._decode(os.read(self._master, 65536))
            self.raw += got
            self._stream.feed(got)

    def wait(self) -> int:
        """Read all that the program still writes; its exit status."""
        with suppress(OSError):  # Linux says so where the other end is closed
            self.read_until(lambda: False)
        return self._child.wait(20)


class TestTelemetry(unittest.TestCase):
    """Part 20: spans, and the tracers that show them."""

    def test_a_span_has_its_ids_attributes_events_links_and_error(self) -> None:
        class Recording(Tracer):
            def __init__(self) -> None:
                self.seen: list[tuple[str, str]] = []

            def on_start(self, span: Span) -> None:
                self.seen.append(("start", span.name))

            def on_event(self, span: Span, event: SpanEvent) -> None:
                self.seen.append((event.name, span.name))

            def on_end(self, span: Span) -> None:
                self.seen.append(("end", span.name))

        with Recording() as tracer, tracer("job", {"a": 1}) as span:
            span("half", {"b": 2})
            with self.assertRaises(KeyError), span.step("part") as part:
                raise KeyError("x")
            other = span.root("other")
            other.link(span)
            span["c"] = 3
        self.assertEqual(
            tracer.seen,
            [("start", "job"), ("half", "job"), ("start", "part"), ("exception", "part"),
             ("end", "part"), ("start", "other"), ("end", "job")],
        )  # fmt: skip
        self.assertEqual(span.attributes, {"a": 1, "c": 3})
        self.assertEqual((part.parent_id, part.trace_id), (span.id, span.trace_id))
        self.assertNotEqual(other.trace_id, span.trace_id)
        self.assertIsNone(other.parent_id)
        self.assertEqual(other.links, [span])
        self.assertEqual(part.error, "KeyError: 'x'")
        self.assertIn("Traceback", part.events[0].attributes["exception.stacktrace"])
        self.assertIsNone(span.error)
        self.assertRegex(span.id, "^[0-9a-f]{16}$")
        self.assertRegex(span.trace_id, "^[0-9a-f]{32}$")
        self.assertGreaterEqual(span.end_ns, span.start_ns)

    def test_json_is_one_object_a_line_with_names_of_open_telemetry(self) -> None:
        out = io.StringIO()
        with JsonTracer(out) as tracer, tracer("a", {"x": {1, 2}}) as span:
            span("e", {"k": "v\n"})
            span.step("b").end()
            span.link(span)
            span.fail(ValueError("w"))
        child, parent = map(json.loads, out.getvalue().splitlines())
        self.assertEqual((child["name"], child["parent_span_id"]), ("b", parent["span_id"]))
        self.assertEqual(parent["events"][0]["attributes"], {"k": "v\n"})
        self.assertEqual(parent["links"], [{"span_id": span.id, "trace_id": span.trace_id}])
        self.assertEqual(parent["start_time_unix_nano"], span.start_ns)
        self.assertEqual(parent["end_time_unix_nano"], span.end_ns)
        self.assertEqual(parent["status"], {"code": "ERROR", "message": "ValueError: w"})
        failure = parent["events"][1]
        self.assertEqual(
            (failure["name"], failure["time_unix_nano"]), ("exception", span.events[1].time_ns)
        )
        self.assertEqual(failure["attributes"]["exception.type"], "ValueError")

    def test_json_survives_what_json_cannot_say(self) -> None:
        out = io.StringIO()
        loop: dict[str, Any] = {}
        loop["self"] = loop
        with JsonTracer(out) as tracer:
            tracer("a", {"loop": loop}).end()
            tracer("b", {"n": float("nan"), "o": object()}).end()
        self.assertEqual(
            [json.loads(line)["name"] for line in out.getvalue().splitlines()], ["a", "b"]
        )

    def test_values_are_plain_data_from_the_moment_they_are_noted(self) -> None:
        class Odd(str):
            def __str__(self) -> str:
                raise LookupError("no text")

        class Size(enum.Enum):
            SMALL = "small"

        shared = {"n": [1]}
        span = Tracer()("job", {"shared": shared, "big": 10**5000, "odd": Odd(), ("a", 1): None})  # type: ignore[dict-item]
        shared["n"].append(2)
        span["ratio"] = float("-inf")
        span["status"], span["size"] = HTTPStatus.NOT_FOUND, Size.SMALL
        self.assertEqual(span["shared"], {"n": [1]})
        self.assertTrue(span["big"].startswith("0x"))
        self.assertIn("LookupError", span["odd"])
        self.assertEqual((span["ratio"], span["('a', 1)"]), ("-Infinity", None))
        self.assertEqual(json.dumps([span["status"], span["size"]]), '[404, "small"]')

    def test_an_exception_is_traced_once_however_many_steps_it_passes(self) -> None:
        out = io.StringIO()
        with JsonTracer(out) as tracer, suppress(KeyError), ExitStack() as stack:
            span = stack.enter_context(tracer("job"))
            for _ in range(300):
                span = stack.enter_context(span.step("deeper"))
            raise KeyError("here")
        lines = [json.loads(line) for line in out.getvalue().splitlines()]
        self.assertEqual(len([e for line in lines for e in line.get("events", ())]), 1)
        ended = [line for line in lines if not line.get("partial")]  # the machine may be slow
        self.assertEqual({line["status"]["message"] for line in ended}, {"KeyError: 'here'"})
        self.assertEqual(ended[0]["span_id"], span.id)

    def test_a_group_of_exceptions_tells_what_is_in_it(self) -> None:
        deeper = ExceptionGroup("deeper", [KeyError(2)])
        with suppress(ExceptionGroup), Tracer()("job") as span:
            raise ExceptionGroup("several", [ValueError("one"), deeper])
        for text in (span.error or "", span.events[0].attributes["exception.message"]):
            self.assertRegex(text, r"several.*ValueError\('one'\).*deeper.*KeyError\(2\)")

    def test_a_tracer_that_fails_costs_no_request(self) -> None:
        class Broken(Tracer):
            def on_event(self, span: Span, event: SpanEvent) -> None:
                sys.exit("a library does this")

            def on_end(self, span: Span) -> None:
                raise ZeroDivisionError

        told: list[Any] = []
        hook = mock.patch.object(sys, "excepthook", lambda kind, *_: told.append(kind))
        with hook, Broken()("job") as span:
            span("noted")
        self.assertEqual(told, [SystemExit, ZeroDivisionError])

    def test_a_value_that_hides_its_class_is_noted(self) -> None:
        """An object that is loaded when it is first used takes its `__class__` from there."""

        class Lazy:
            @property  # type: ignore[misc]
            def __class__(self) -> Any:
                raise LookupError("the database is away")

        with Tracer()("job") as span:
            span["user"] = Lazy()
            span("loaded", {"user": Lazy()})
        for noted in (span.attributes, span.events[0].attributes):
            self.assertIn("Lazy", noted["user"])

    def test_a_stalled_stream_holds_up_nobody_and_what_was_lost_is_told(self) -> None:
        stalled, let_go = threading.Event(), threading.Event()

        class Stalling(io.StringIO):
            def write(self, text: str) -> int:
                stalled.set()
                let_go.wait(20)
                return super().write(text)

        out = Stalling()
        with JsonTracer(out) as tracer:
            tracer("first").end()
            self.assertTrue(stalled.wait(10))
            for _ in range(stario._LONGEST_QUEUE + 7):
                tracer("more").end()
            let_go.set()
        lines = [json.loads(line) for line in out.getvalue().splitlines()]
        (lost,) = [line for line in lines if line["name"] == "telemetry.lost"]
        self.assertEqual(lost["attributes"]["count"], 7)
        self.assertEqual(len(lines), stario._LONGEST_QUEUE + 2)

    def test_what_could_not_be_written_is_told_on_standard_error_at_the_end(self) -> None:
        program = (
            "import stario\n"
            "stario._PATIENCE = 0.1\n"
            "with stario.JsonTracer() as tracer:\n"
            "    for _ in range(5000): tracer('job').end()\n"
        )
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        self.addCleanup(os.close, writer)
        done = subprocess.run(  # nobody reads what it prints
            [sys.executable, "-c", program],
            cwd=HERE,
            stdout=writer,
            stderr=subprocess.PIPE,
            timeout=60,
        )
        told = rb"^stario: \d+ spans and events could not be written\n$"
        self.assertRegex(done.stderr, told)
        self.assertEqual(done.returncode, 0)

    def test_what_was_told_as_lost_and_is_written_after_all_is_not_told_again(self) -> None:
        stalled, let_go, told = threading.Event(), threading.Event(), list[bytes]()

        class Stalling(io.StringIO):
            def write(self, text: str) -> int:
                stalled.set()
                let_go.wait(20)
                return super().write(text)

        tell = mock.patch.object(os, "write", lambda _, text: told.append(text))
        with tell, mock.patch.object(stario, "_PATIENCE", 0.01), JsonTracer(Stalling()) as tracer:
            tracer("first").end()
            self.assertTrue(stalled.wait(20))
        self.assertIn(b" 1 spans and events ", told[0])
        let_go.set()
        self.assertTrue(tracer._running.acquire(timeout=20))  # its thread has ended
        tracer._running.release()
        with tracer:
            tracer("second").end()
        names = [json.loads(line)["name"] for line in tracer._stream.getvalue().splitlines()]
        self.assertEqual(names, ["first", "second"])

    def test_whatever_a_stream_raises_the_next_spans_are_written(self) -> None:
        class Failing(io.StringIO):
            def __init__(self, error: BaseException) -> None:
                super().__init__()
                self.error, self.failed = error, threading.Event()

            def write(self, text: str) -> int:
                if self.failed.is_set():
                    return super().write(text)
                self.failed.set()
                raise self.error

        for error in (OSError(28, "full"), SystemExit(3), KeyboardInterrupt(), GeneratorExit()):
            for make in (JsonTracer, RichTracer):
                with make(out := Failing(error)) as tracer:
                    tracer("first").end()
                    self.assertTrue(out.failed.wait(20))
                    tracer("second").end()
                self.assertRegex(out.getvalue(), "(?s)telemetry.lost.*count\\W+1\\b")
                self.assertIn("second", out.getvalue())

    def test_a_span_that_ends_during_the_last_write_is_written_too(self) -> None:
        writing, let_go = threading.Event(), threading.Event()

        class Slow(io.StringIO):
            def write(self, text: str) -> int:
                writing.set()
                let_go.wait(20)
                return super().write(text)

        for make in (JsonTracer, RichTracer):
            out = Slow()
            with mock.patch.object(stario, "_PATIENCE", 60), make(out) as tracer:
                tracer._pause = 60  # so that there is no write before the last
                tracer("first").end()
                closing = threading.Thread(target=tracer.__exit__)
                closing.start()
                self.assertTrue(writing.wait(20))
                tracer("during").end()
                let_go.set()
                closing.join()
                self.assertRegex(out.getvalue(), "first.*\n.*during.*\n$")
            writing.clear()
            let_go.clear()

    def test_a_span_that_ends_after_the_last_write_is_written_at_exit(self) -> None:
        out = io.StringIO()
        tracer = JsonTracer(out)
        lock = tracer._running

        class Late:
            acquire, locked = lock.acquire, lock.locked

            def release(self) -> None:
                if threading.current_thread() is not threading.main_thread():
                    tracer("late").end()  # the thread has looked for the last time
                lock.release()

        tracer._running = cast("Any", Late())
        with tracer:
            tracer("early").end()
        self.assertNotIn('"late"', out.getvalue())
        with mock.patch.object(stario, "_renewed_at_fork", {tracer}):
            stario._write_what_is_left()
        self.assertEqual(out.getvalue().count('"late"'), 1)

    def test_lines_are_written_at_exit_at_a_crash_and_soon(self) -> None:
        begin = "import os, sys, time, stario\nstario.JsonTracer()('job').end()\n"
        for end in ("", "raise SystemExit(3)", "1 / 0", "time.sleep(0.4); os.kill(os.getpid(), 9)"):
            done = subprocess.run(
                [sys.executable, "-c", begin + end], cwd=HERE, capture_output=True, timeout=60
            )
            self.assertEqual(json.loads(done.stdout)["name"], "job", end)

    def test_what_ends_while_python_ends_is_written_or_given_up_but_holds_up_nothing(self) -> None:
        program = (
            "import atexit, stario\n"
            "tracer = stario.JsonTracer()\n"
            "def work(name):\n"
            "    with tracer(name): yield\n"
            "left = work('collected')\n"  # after all functions of atexit
            "next(left)\n"
            "atexit.register(lambda: [*work('first'), *work('second')])\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=HERE, capture_output=True, timeout=60
        )
        names = [json.loads(line)["name"] for line in done.stdout.splitlines()]
        self.assertEqual((names[:2], done.returncode), (["first", "second"], 0), done.stderr)

    def test_a_fork_writes_its_own_lines(self) -> None:
        if not hasattr(os, "fork"):
            self.skipTest("no fork here")
        program = (
            "import os, stario\n"
            "with stario.JsonTracer() as tracer:\n"
            "    tracer('parent').end()\n"
            "    if not os.fork():\n"
            "        with tracer: tracer('child').end()\n"
            "        os._exit(0)\n"
            "    os.wait()\n"
        )
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program],
            cwd=HERE,
            capture_output=True,
            timeout=60,
        )
        names = sorted(json.loads(line)["name"] for line in done.stdout.splitlines())
        self.assertEqual(names, ["child", "parent"])

    def test_no_two_spans_have_one_id_in_threads_and_forks_neither(self) -> None:
        if not hasattr(os, "fork"):
            self.skipTest("no fork here")
        tracer, made = Tracer(), list[Span]()

        def work() -> None:
            made.extend([tracer("job") for _ in range(1000)])

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ids = [part for span in made for part in (span.id, span.trace_id)]
        self.assertEqual(len(set(ids)), 8000)
        program = (
            "import os, stario\n"
            "tracer = stario.Tracer()\n"
            "tracer('job').end()\n"
            "child = not os.fork()\n"
            "child or os.wait()\n"
            "print(*(tracer('job').traceparent for _ in range(2000)), sep='\\n', flush=True)\n"
        )
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program],
            cwd=HERE,
            capture_output=True,
            timeout=60,
        )
        self.assertEqual(len(set(done.stdout.split())), 4000, done.stderr)

    def test_attributes_of_any_kind_are_shown(self) -> None:
        """Even what was put into `attributes` directly, or under a name that is no text."""
        for make in (JsonTracer, RichTracer):
            out, loop = io.StringIO(), list[Any]()
            loop.append(loop)
            with make(out) as tracer, tracer("job") as span:
                cast(Any, span)[5] = 1
                span.attributes.update({"set": {7}, "loop": loop, "nan": math.nan})
            self.assertEqual(out.getvalue().count("\n"), 1)
            self.assertRegex(out.getvalue(), r"job.*5\W+1\W.*set\W+7\W.*loop.*NaN")

    def test_what_is_no_name_and_no_mapping_costs_no_span(self) -> None:
        class Broken(dict[str, int]):
            def keys(self) -> Any:
                raise RuntimeError

        class Array:
            def __bool__(self) -> bool:  # as of several values
                raise ValueError

        wrong: tuple[Any, ...] = (
            None, 7, b"x", "a\n\x1b", ["x"], {"x"}, Broken(a=1), 1.5, Array(),
        )  # fmt: skip
        for make in (JsonTracer, RichTracer):
            out = io.StringIO()
            with make(out) as tracer:
                for value in wrong:
                    with tracer(value, value) as span, span.step(value, value):
                        span(value, value)
                        span(KeyError(), value)
                        span.name = value
            self.assertEqual(out.getvalue().count("\n"), 2 * len(wrong), out.getvalue())
            self.assertNotIn("telemetry.lost", out.getvalue())

    def test_where_no_thread_starts_each_span_is_written_at_once(self) -> None:
        """As at the end of a program, from Python 3.12 on."""
        for make in (JsonTracer, RichTracer):
            out = io.StringIO()
            tracer = make(out)
            with mock.patch("threading.Thread.start", side_effect=RuntimeError("can't start")):
                for n in range(3):
                    tracer(f"job{n}").end()
                    self.assertEqual(out.getvalue().count("job"), n + 1)

    def test_what_is_no_stream_and_no_level_is_refused(self) -> None:
        for make in (JsonTracer, RichTracer):
            for wrong in ("spans.log", Path("spans.log"), 1, object()):
                with self.assertRaisesRegex(StarioError, "stream"):
                    make(cast(Any, wrong))
            with self.assertRaises(ValueError):
                make(io.StringIO(), logging_level="LOUD")

    def test_a_stream_may_lack_characters_and_all_but_two_methods(self) -> None:
        class Tee:
            encoding = "latin-1"

            def __init__(self) -> None:
                self.written = b""

            def write(self, text: str) -> None:
                self.written += text.encode(self.encoding)

            def flush(self) -> None:
                pass

        for make in (JsonTracer, RichTracer):
            tee = Tee()
            with make(cast(Any, tee)) as tracer:
                tracer("job", {"a": "é漢"}).end()
            self.assertRegex(tee.written.decode("latin-1"), r"job.*a.*(é|u00e9)\\u6f22")

    def test_a_pipe_gets_one_plain_line_a_span(self) -> None:
        out = io.StringIO()
        with RichTracer(out) as tracer, suppress(KeyError), tracer("job", {"a": 1}) as span:
            span("half\x1b[2J\n", {"k": "v"})
            with span.step("part"):
                raise KeyError("x")
        part, job = out.getvalue().splitlines()
        self.assertRegex(
            part, r"^\d\d:\d\d:\d\d \w{4} part failed [\d.]+ ms \| .*KeyError: 'x' < test_"
        )
        self.assertRegex(job, r" job failed [\d.]+ ms a=1 \| [\d.]+ ms half\\x1b\[2J\\n k=v$")

    def test_an_event_after_the_end_is_a_line_of_its_own(self) -> None:
        for make, pattern in (
            (JsonTracer, r'job.*end_time.*\n.*job.*"partial":true.*"name":"late".*"n":1.*\n'),
            (RichTracer, r" job [\d.]+ ms\n.* job [\d.]+ ms \| [\d.]+ ms late n=1\n"),
        ):
            with make(out := io.StringIO()) as tracer:
                (span := tracer("job")).end()
                span("late", {"n": 1})
            self.assertRegex(out.getvalue(), pattern)

    def test_trace_context_of_the_caller_is_taken_over(self) -> None:
        """W3C Trace Context, section 3.2: what is not well-formed is ignored."""
        tracer, parents = CountingTracer(), []
        app = Stario(tracer)

        async def show(c: Context, w: Writer) -> None:
            parents.append(c.span.parent_id)
            w.text(c.span.traceparent)

        app.get("/", show)
        trace, span = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
        bad = ["", f"00-{trace}-{span}", f"ff-{trace}-{span}-01", f"00-{'0' * 32}-{span}-01"]
        bad += [f"00-{trace}-{'0' * 16}-01", f"00-{trace}-{span}-01-x"]
        bad += [f"00-{trace.upper()}-{span}-01"]

        async def run() -> None:
            async with TestClient(app) as client:
                for flags, version in (("01", "00"), ("00", "00"), ("01", "cc")):
                    sent = f"{version}-{trace}-{span}-{flags}"
                    got = (await client.get("/", headers={"traceparent": sent})).text
                    self.assertRegex(got, f"^00-{trace}-[0-9a-f]{{16}}-{flags}$")
                for sent in bad:
                    got = (await client.get("/", headers={"traceparent": sent})).text
                    self.assertNotIn(trace, got.lower())

        asyncio.run(run())
        self.assertEqual(parents, [span] * 3 + [None] * len(bad))
        self.assertEqual(tracer.ended, 2 + len(bad))  # the caller did not want one of them

    def test_what_is_logged_in_a_request_is_an_event_and_is_not_printed_too(self) -> None:
        out, printed = io.StringIO(), io.StringIO()
        handler, root = logging.StreamHandler(printed), logging.getLogger()
        root.addHandler(handler)
        self.addCleanup(root.removeHandler, handler)
        level, log = root.level, logging.getLogger("shop")
        chatty = logging.getLogger("shop.cart")
        self.addCleanup(log.setLevel, logging.NOTSET)

        async def buy(c: Context, w: Writer) -> None:
            log.info("bought %d", 3)
            log.warning("%d", "no number")
            log.debug("not asked for")
            w.empty()

        async def run(app: Stario) -> None:
            app.get("/", buy)
            async with TestClient(app) as client:
                await client.get("/")

        with JsonTracer(out, logging_level="INFO") as tracer:
            asyncio.run(run(Stario(tracer)))
            log.warning("outside")
            log.setLevel("DEBUG")
            chatty.debug("asked for by the logger above it")
            logging.getLogger("other").info("not asked for")
        events = json.loads(out.getvalue())["events"]
        said = [(e["attributes"]["severity_text"], e["attributes"]["body"]) for e in events]
        self.assertEqual(said, [("INFO", "bought 3"), ("WARNING", "%d")])
        self.assertEqual(printed.getvalue(), "outside\nasked for by the logger above it\n")
        self.assertEqual((root.level, handler in root.handlers), (level, True))

    def test_where_the_root_logger_has_no_handlers_a_warning_is_printed_once(self) -> None:
        printed, log = io.StringIO(), logging.getLogger("shop")
        handler = logging.StreamHandler(printed)
        log.addHandler(handler)
        self.addCleanup(log.removeHandler, handler)
        last_resort = mock.patch.object(logging, "lastResort", logging.StreamHandler(printed))
        no_handlers = mock.patch.object(logging.getLogger(), "handlers", [])
        with last_resort, no_handlers, JsonTracer(io.StringIO(), logging_level="INFO"):
            log.warning("by its own handler")
            logging.getLogger("shop.cart").warning("by that above it")
            logging.getLogger("other").warning("by the last resort")
        said = ["by its own handler", "by that above it", "by the last resort"]
        self.assertEqual(printed.getvalue().splitlines(), said)

    def test_a_silent_app_makes_no_spans(self) -> None:
        async def work(c: Context, w: Writer) -> None:
            c("event")
            c["user"] = "ada"
            with c.step("part") as span:
                span("event")
                span["rows"] = 1
            w.text(c["user"])

        async def run() -> None:
            app = Stario()
            app.get("/", work)
            async with TestClient(app) as client:
                self.assertEqual((await client.get("/")).text, "ada")

        unseen = stario._UNSEEN_SPAN  # one for all
        with mock.patch.object(Span, "__init__", side_effect=AssertionError):
            asyncio.run(run())
        self.assertEqual(unseen.attributes, {})

    def test_the_attributes_of_a_context_are_those_of_its_span(self) -> None:
        async def work(c: Context, w: Writer) -> None:
            c["user"] = "ada"
            self.assertEqual(c.span["user"], "ada")
            c.span["role"] = "admin"
            self.assertEqual((c["role"], c["user"], c.span["url.path"]), ("admin", "ada", "/"))
            w.empty()

        async def run(app: Stario) -> None:
            app.get("/", work)
            async with TestClient(app) as client:
                await client.get("/")

        for tracer in (None, Spans()):
            with self.subTest(type(tracer).__name__):
                asyncio.run(run(Stario(tracer)))

    def test_a_step_of_another_request_leaves_the_own_one_as_it_was(self) -> None:
        others: list[Context] = []

        async def first(c: Context, w: Writer) -> None:
            others.append(c)
            w.empty()

        async def second(c: Context, w: Writer) -> None:
            with c.step("mine") as mine:
                with others[0].step("theirs"):
                    pass
                c("noted")
                self.assertEqual([event.name for event in mine.events], ["noted"])
            w.empty()

        async def run() -> None:
            app = Stario(Spans())
            app.get("/first", first)
            app.get("/second", second)
            async with TestClient(app) as client:
                await client.get("/first")
                await client.get("/second")

        asyncio.run(run())

    def test_steps_nest_under_what_started_their_task_or_thread(self) -> None:
        spans = Spans()

        async def work(c: Context, w: Writer) -> None:
            def in_thread() -> None:
                with c.step("thread"):
                    pass

            async def part(name: str) -> None:
                with c.step(name):
                    await asyncio.sleep(0)
                    with c.step(f"{name}.inner"):
                        await asyncio.sleep(0)

            with c.step("all"):
                async with asyncio.TaskGroup() as group:
                    group.create_task(part("a"))
                    group.create_task(part("b"))
                    group.create_task(asyncio.to_thread(in_thread))
            w.empty()

        async def run() -> None:
            app = Stario(spans)
            app.get("/", work)
            async with TestClient(app) as client:
                await client.get("/")

        asyncio.run(run())
        names = {span.id: span.name for span in spans.ended}
        above = {span.name: names.get(span.parent_id or "") for span in spans.ended}
        self.assertEqual(
            above,
            {"GET /": None, "all": "GET /", "a": "all", "b": "all", "thread": "all",
             "a.inner": "a", "b.inner": "b"},
        )  # fmt: skip

    @needs("pyte")
    def test_at_a_terminal_a_fork_shows_no_spans_of_its_parent(self) -> None:
        terminal = Terminal(
            self,
            "    import os\n"
            "    span = tracer('stream')\n"
            "    while not tracer._open: time.sleep(0.01)\n"
            "    if not os.fork():\n"
            "        with tracer: print('printed by the child')\n"
            "        os._exit(0)\n"
            "    os.wait()\n"
            "    span.end()\n",
        )
        self.assertEqual(terminal.wait(), 0, terminal.text())
        self.assertEqual(terminal.raw.count("printed by the child"), 1)
        self.assertEqual(terminal.raw.count("stream"), 1, terminal.raw)

    @needs("pyte")
    def test_at_a_terminal_streams_stay_at_the_foot_and_prints_go_above_unbroken(self) -> None:
        terminal = Terminal(
            self,
            "    streams = [tracer(f'stream {n}') for n in range(9)]\n"
            "    with tracer('job', {'user': 'ada'}) as span:\n"
            "        with span.step('query'): span('hit\\x1b[2J')\n"
            "    time.sleep(1.2)\n"
            "    print('printed', 1); print('to stderr', file=sys.stderr)\n"
            "    for _ in range(500): tracer('burst').end()\n"
            "    sys.stdin.readline()\n",
        )
        terminal.read_until(lambda: re.search("burst .* x (?s:.*) more$", terminal.text()[:-1]))
        shown = terminal.lines()
        rule = next(i for i, line in enumerate(shown) if line.startswith("── 9 open ───"))
        self.assertEqual(len(shown) - rule, 8)  # a third of the screen
        self.assertRegex(shown[rule + 1], r"^ +[\d.]+ s  stream 0 +0 events$")
        self.assertRegex(shown[-1], "and 3 more$")
        above = shown[:rule]
        self.assertIn("printed 1", above)
        self.assertIn("to stderr", above)
        self.assertRegex("\n".join(above), r"\d  job +[\d.]+ ms  user=ada\n +[\d.]+ ms  query +.*━")
        self.assertLessEqual(sum("burst" in line for line in above), 22)
        terminal.resize(60)
        terminal.read_until(lambda: re.search("── 9 open ─{49}\x1b", terminal.raw))
        terminal.type("\n")
        self.assertEqual(terminal.wait(), 0)
        self.assertNotIn("── 9 open", terminal.text())
        cursor = terminal.screen.cursor
        self.assertEqual((cursor.x, cursor.attrs.fg), (0, "default"))

    @needs("pyte")
    def test_at_a_terminal_much_is_summed_up_and_a_failure_is_shown_all_the_same(self) -> None:
        terminal = Terminal(
            self,
            "    import contextlib, json\n"
            "    with tracer('long') as span:\n"
            "        for n in range(60): span('tick', {'n': n})\n"
            "    for _ in range(70): tracer('burst').end()\n"
            "    with contextlib.suppress(ValueError), tracer('odd'):\n"
            "        json.loads('no JSON')\n",
        )
        self.assertEqual(terminal.wait(), 0)
        text = terminal.text()
        self.assertRegex(text, r"tick +n=39\n +and 20 more\n")
        bursts = re.findall(r"burst +(?:(\d+) x  p50 [\d.]+ ms  max)?", text)
        self.assertEqual(sum(int(times or 1) for times in bursts), 70, text)
        self.assertLess(len(bursts), 50)
        own = r"odd +failed .*\n.* ✗ JSONDecodeError: (?s:.*?)\n +<string>:\d+  <module>.*"
        self.assertRegex(text, own + r"\n +and 3 frames of other code\n")

    @needs("pyte")
    def test_at_a_terminal_an_exception_in_a_stream_is_shown_while_it_is_open(self) -> None:
        terminal = Terminal(
            self,
            "    stario._LONG = 0\n"
            "    stream = tracer('stream')\n"
            "    stream(KeyError('now'))\n"
            "    stream('tick')\n"
            "    sys.stdin.readline()\n",
        )
        wanted = r" stream .*\n.* ✗ KeyError: 'now'\n── 1 open ─+\n.* stream +2 events  tick\n"
        terminal.read_until(lambda: re.search(wanted, terminal.text()))
        terminal.type("\n")
        self.assertEqual(terminal.wait(), 0)
        self.assertRegex(terminal.lines()[-1], r" stream +[\d.]+ m?s$")

    @needs("pyte")
    def test_at_a_terminal_a_long_message_is_wrapped_and_what_comes_late_is_shown(self) -> None:
        words = "wrapped at words as wide as the terminal makes it and not at half of that"
        terminal = Terminal(
            self,
            "    with tracer('job') as span:\n"
            f"        span(ValueError('{words}\\nsecond line'), {{'n': 1}})\n"
            "    span('late', {'n': 2})\n",
        )
        self.assertEqual(terminal.wait(), 0)
        job, first, rest, second, heading, late = (line.strip() for line in terminal.lines())
        self.assertRegex(job, r"  job +[\d.]+ ms$")
        self.assertGreater(len(first), 60)
        shown = first.partition("✗ ValueError: ")[2] + " " + rest
        self.assertEqual((shown, second), (words, "second line  n=1"))
        self.assertEqual(heading, job)
        self.assertRegex(late, r"^[\d.]+ ms  late +n=2$")

    @needs("pyte")
    def test_what_a_program_prints_is_never_dropped_at_a_terminal_that_takes_it(self) -> None:
        terminal = Terminal(
            self,
            "    stario._LONGEST_QUEUE, stario._PATIENCE = 200, 60\n"  # the screen may be slow
            "    stream = tracer('stream')\n"
            "    print(*range(3000), sep='\\n')\n"
            "    sys.stdout.writelines(f'{n}\\n' for n in range(3000, 4000))\n",
        )
        self.assertEqual(terminal.wait(), 0)
        self.assertEqual(terminal.lines()[:-1], [*map(str, range(4000))])

    @needs("pyte")
    def test_lines_of_any_script_are_as_wide_as_the_terminal_makes_them(self) -> None:
        import pyte

        letters = ("e\u0301", "漢", "ａ", "\u231a", "\u23e9", "😀", "…│", "한")
        for width in (1, 2, 7, 20):
            for text in (letter * 30 for letter in letters):
                screen = pyte.Screen(40, 1)
                screen.draw(stario._fit(text, width, width) + "|")
                self.assertEqual(screen.cursor.x, width + 1, (text, width))

    @needs("pyte")
    def test_what_is_typed_and_what_others_write_stays_above_the_footer(self) -> None:
        terminal = Terminal(
            self,
            "    stream = tracer('stream')\n"
            "    print(*range(30), sep='\\n')\n"  # so that the footer is at the end of the screen
            "    while (typed := input()) != 'end':\n"
            "        os.system('echo another program')\n"
            "        stream('read', {'typed': typed})\n"
            "    print('begun', end='', flush=True)\n",
        )
        numbers = [*map(str, range(30))]
        terminal.read_until(lambda: "── 1 open" in terminal.text())
        for typed in ("one", "two"):
            terminal.type("\n" * 40 + typed + "\n")
            terminal.read_until(lambda t=typed: f"read typed={t}" in terminal.text())  # type: ignore[misc]
            self.assertEqual(terminal.text().count("── 1 open"), 1, terminal.text())
            self.assertEqual([line for line in terminal.lines() if line in numbers], numbers)
        terminal.type("end\n")
        self.assertEqual(terminal.wait(), 0)
        self.assertNotIn("── 1 open", terminal.text())
        self.assertEqual(terminal.lines().count("another program"), 82)  # each on its own
        self.assertEqual(terminal.lines()[-3:-1], ["end", "begun"])
        self.assertRegex(terminal.lines()[-1], r"\d  stream +[\d.]+ s$")
        self.assertEqual(terminal.screen.cursor.x, 0)

    @needs("pyte")
    def test_ctrl_c_and_a_crash_leave_a_clean_prompt_and_the_traceback_last(self) -> None:
        begin = "    stream = tracer('stream')\n    time.sleep(1.1)\n    print('ready')\n"
        for last, typed, reason in (
            ("    sys.stdin.readline()\n", "\x03", "KeyboardInterrupt"),
            ("    sys.stdin.readline()\n    1 / 0\n", "\n", "ZeroDivisionError: "),
        ):
            with self.subTest(reason):
                terminal = Terminal(self, begin + last)
                terminal.read_until(lambda t=terminal: "── 1 open" in t.text())  # type: ignore[misc]
                terminal.type(typed)
                self.assertNotEqual(terminal.wait(), 0)
                shown = terminal.lines()
                self.assertTrue(shown[-1].startswith(reason), shown)
                self.assertNotIn("── 1 open", terminal.text())
                self.assertRegex(terminal.text(), r"\d  stream +[\d.]+ s\n")  # it was not lost
                self.assertEqual(terminal.screen.cursor.x, 0)

    @needs("pyte")
    def test_who_ends_a_blocked_server_by_ctrl_c_gets_the_whole_screen_back(self) -> None:
        terminal = Terminal(
            self,
            "    import asyncio, signal\n"
            "    async def block():\n"
            "        sys.stdin.readline()\n"
            "        signal.raise_signal(2)\n"
            "        time.sleep(0.2)\n"  # what comes sooner is the same
            "        signal.raise_signal(2)\n"
            "    app = stario.Stario(tracer)\n"
            "    app.background(block())\n"
            "    asyncio.run(app.serve(port=0))\n",
        )
        terminal.read_until(lambda: "── 1 open" in terminal.text())
        self.assertEqual(terminal.screen.margins.bottom, 21)
        terminal.type("\n")
        self.assertEqual(terminal.wait(), 130)
        self.assertNotIn("── 1 open", terminal.text())
        self.assertIsNone(terminal.screen.margins)

    @needs("pyte")
    def test_colours_and_the_footer_depend_on_the_environment(self) -> None:
        work = "    stream = tracer('stream')\n    tracer('job').end()\n    time.sleep(1.2)\n"
        for environment, coloured, moves in (
            ({}, True, True),
            ({"NO_COLOR": "1"}, False, True),
            ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, False, True),
            ({"TERM": "dumb"}, False, False),
            ({"TERM": "dumb", "FORCE_COLOR": "1"}, True, False),
        ):
            with self.subTest(environment):
                terminal = Terminal(self, work, **environment)
                self.assertEqual(terminal.wait(), 0)
                self.assertEqual("\x1b[1m" in terminal.raw, coloured)
                self.assertEqual("\x1b[J" in terminal.raw, moves)

    def test_a_signal_handler_and_the_collector_may_trace_in_the_middle_of_tracing(self) -> None:
        """Nothing hangs, and no event is lost, wherever they come."""
        out, stopped = io.StringIO(), threading.Event()
        usual, interval = gc.get_threshold(), sys.getswitchinterval()
        self.addCleanup(gc.set_threshold, *usual)
        self.addCleanup(sys.setswitchinterval, interval)
        with JsonTracer(out) as tracer:

            def left() -> Iterator[None]:
                with tracer("left"):
                    yield

            came: list[int] = []

            def handle(number: int, frame: object) -> None:
                tracer("signal").end()
                came.append(number)

            previous = signal.signal(signal.SIGUSR1, handle)
            self.addCleanup(signal.signal, signal.SIGUSR1, previous)

            def disturb() -> None:
                while not stopped.wait(0.001):
                    os.kill(os.getpid(), signal.SIGUSR1)

            thread = threading.Thread(target=disturb)
            thread.start()
            sys.setswitchinterval(1e-6)
            gc.set_threshold(1)
            total = 0
            while total < 300 or not came:
                knot: list[Any] = [left()]
                next(knot[0])
                knot.append(knot)
                del knot
                with tracer("job") as span:
                    span("tick", {"n": total})
                total += 1
            stopped.set()
            thread.join()
            gc.set_threshold(*usual)
            gc.collect()
        lines = [json.loads(line) for line in out.getvalue().splitlines()]
        ended = Counter(line["name"] for line in lines if "end_time_unix_nano" in line)
        self.assertEqual(ended, {"job": total, "left": total, "signal": len(came)})
        ticks = [e["attributes"]["n"] for line in lines for e in line.get("events", ())]
        self.assertEqual(ticks, [*range(total)])

    @needs("opentelemetry.sdk")
    def test_the_recipe_for_otlp_sends_spans_to_a_collector_that_refuses_at_first(self) -> None:
        asked, names, url = self.collector(lambda number: 503 if number < 2 else 200)
        here = mock.patch.dict(
            os.environ, OTEL_EXPORTER_OTLP_ENDPOINT=url, OTEL_SERVICE_NAME="shop"
        )
        with here, names["OtlpTracer"]() as tracer, tracer("job", {"n": 1}) as span:
            span("half", {"deep": {"a": None}})
            with suppress(KeyError), span.step("part") as part:
                part.link(span)
                raise KeyError("x")
        sent = asked[-1].resource_spans[0]
        self.assertIn("shop", [a.value.string_value for a in sent.resource.attributes])
        child, parent = sent.scope_spans[0].spans
        self.assertEqual(child.parent_span_id.hex(), parent.span_id.hex())
        self.assertEqual((parent.span_id.hex(), parent.trace_id.hex()), (span.id, span.trace_id))
        self.assertEqual((child.status.code, child.events[0].name), (2, "exception"))
        self.assertEqual(child.links[0].span_id.hex(), span.id)
        self.assertEqual(
            (parent.start_time_unix_nano, parent.attributes[0].value.int_value), (span.start_ns, 1)
        )

    @needs("opentelemetry.sdk")
    def test_a_collector_that_is_slow_or_gone_holds_up_no_span(self) -> None:
        go_on = threading.Event()
        asked, names, url = self.collector(lambda number: 200 if go_on.wait(20) else 503)
        here = mock.patch.dict(os.environ, OTEL_EXPORTER_OTLP_ENDPOINT=url)
        with here, names["OtlpTracer"]() as tracer:
            for _ in range(600):  # more than a batch
                tracer("job").end()
            self.assertFalse(go_on.is_set())
            go_on.set()
        sent = [s for a in asked for r in a.resource_spans for c in r.scope_spans for s in c.spans]
        self.assertEqual(len(sent), 600)
        gone = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
            "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
        }
        with mock.patch.dict(os.environ, gone), names["OtlpTracer"]() as tracer:
            tracer("job").end()

    def collector(self, answer: Callable[[int], int]) -> tuple[list[Any], dict[str, Any], str]:
        """What a receiver of OTLP has been sent, the names of the recipe, and its address."""
        from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

        asked: list[Any] = []

        class Collector(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                asked.append(trace_service_pb2.ExportTraceServiceRequest.FromString(body))
                self.send_response(answer(len(asked)))
                self.end_headers()

            def log_message(self, *words: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        (recipe,) = [code for _, code in blocks("py") if "OtlpTracer" in code]
        names: dict[str, Any] = {}
        exec(recipe, names)  # as a reader would run it
        return asked, names, f"http://127.0.0.1:{server.server_port}"

    def test_the_recipe_for_prometheus_counts_by_route(self) -> None:
        (recipe,) = [code for _, code in blocks("python") if "class Metrics" in code]
        names: dict[str, Any] = {}
        exec(recipe, names)

        async def run() -> str:
            async with TestClient(names["app"]) as client:
                await client.get("/metrics")
                await client.get("/metrics")
                return (await client.get("/metrics")).text  # type: ignore[no-any-return]

        self.assertIn('requests_total{route="/metrics",status="200"} 2\n', asyncio.run(run()))

    def test_a_handlers_context_writes_to_the_span_of_its_step(self) -> None:
        out = io.StringIO()
        tracer = JsonTracer(out)
        app = Stario(tracer)

        async def work(c: Context, w: Writer) -> None:
            async def part(n: int) -> None:
                with c.step(f"part {n}"):
                    await asyncio.sleep(0)
                    c["n"] = n
                    c("event")

            c["user"] = "u"
            await asyncio.gather(part(1), part(2))
            with c.step("db", {"sql": "x"}) as span:
                c("miss")
                c["rows"] = 10
                self.assertEqual(span.attributes["rows"], 10)
            c(ValueError("noted"))
            self.assertEqual(c["user"], "u")
            w.empty()

        app.get("/", work)

        async def run() -> None:
            async with TestClient(app) as client:
                self.assertEqual((await client.get("/")).status, 204)

        asyncio.run(run())
        tracer._close()
        spans = {line["name"]: line for line in map(json.loads, out.getvalue().splitlines())}
        request = spans["GET /"]
        self.assertEqual(spans["part 1"]["attributes"], {"n": 1})
        self.assertEqual(spans["part 2"]["attributes"], {"n": 2})
        self.assertEqual(spans["db"]["attributes"], {"sql": "x", "rows": 10})
        self.assertEqual(spans["db"]["events"][0]["name"], "miss")
        self.assertEqual(spans["db"]["parent_span_id"], request["span_id"])
        self.assertEqual(request["attributes"]["user"], "u")
        self.assertEqual(request["attributes"]["http.response.status_code"], 204)
        self.assertEqual(request["attributes"]["http.route"], "/")
        self.assertEqual(request["events"][0]["attributes"]["exception.type"], "ValueError")
        self.assertNotIn("status", request)


# -- 23. Sessions


class TestSession(AsyncTest):
    """Part 23: a dict that stays with one browser."""

    KEY = "k" * 16

    def app(self, *keys: str, **options: Any) -> Stario:
        app = Stario()
        app.use(Session(*(keys or (self.KEY,)), **options))
        app.get("/", self.show)
        app.post("/add", self.add)
        app.post("/clear", self.clear)
        app.get("/late", self.late)
        return app

    @staticmethod
    async def show(c: Context, w: Writer) -> None:
        w.json(c.session)

    @staticmethod
    async def add(c: Context, w: Writer) -> None:
        c.session.setdefault("seen", []).append(c.req.query.get("what"))
        w.empty()

    @staticmethod
    async def clear(c: Context, w: Writer) -> None:
        c.session.clear()
        w.empty()

    @staticmethod
    async def late(c: Context, w: Writer) -> None:
        w.text("begun")
        c.session["user"] = 7

    async def test_it_comes_back_with_the_next_request_also_what_changed_inside(self) -> None:
        async with TestClient(self.app()) as client:
            await client.post("/add?what=%C3%BC")
            await client.post("/add?what=;=")
            self.assertEqual((await client.get("/")).json(), {"seen": ["ü", ";="]})
            self.assertEqual((await client.get("/")).headers.get("vary"), "cookie")

    async def test_a_session_that_was_not_touched_sets_no_cookie(self) -> None:
        async with TestClient(self.app()) as client:
            answer = await client.get("/")
        self.assertIsNone(answer.headers.get("set-cookie"))
        # (it may have looked at it, and so a cache must not give this to who has signed in)
        self.assertEqual(answer.headers.get("vary"), "cookie")

    async def test_an_emptied_session_deletes_the_cookie(self) -> None:
        async with TestClient(self.app()) as client:
            await client.post("/add?what=x")
            answer = await client.post("/clear")
            self.assertIn("Max-Age=0", answer.headers.get("set-cookie") or "")
            self.assertEqual((await client.get("/")).json(), {})

    async def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites(self) -> None:
        async with TestClient(self.app()) as client:
            cookie = (await client.post("/add?what=x")).headers.get("set-cookie") or ""
        self.assertIn("; HttpOnly; SameSite=Lax", cookie)
        self.assertNotIn("Secure", cookie)  # over plain HTTP a browser would drop it

    async def test_whatever_was_not_signed_is_an_empty_session_and_an_event(self) -> None:
        async with TestClient(self.app()) as client:
            cookie = (await client.post("/add?what=x")).headers.get("set-cookie") or ""
        good = cookie.partition(";")[0].partition("=")[2]
        payload, _, signature = good.rpartition(".")
        text, _, written = payload.rpartition(".")
        forged = [
            "x", ".", "..", "ü.1.x", good[:-1], good + "x", payload + ".", "." + good,
            f"{text}.{int(written) + 9}.{signature}", f"{text[:-2]}.{written}.{signature}",
        ]  # fmt: skip
        for value in forged:
            spans = Spans()
            app = self.app()
            app.tracer, app._silent = spans, False
            async with TestClient(app) as client:
                answer = await client.get("/", headers={"cookie": f"session={quote(value)}"})
            with self.subTest(value):
                self.assertEqual(answer.json(), {})
                self.assertIn("session.refused", [e.name for s in spans.ended for e in s.events])

    async def test_a_signature_for_another_cookie_is_none_for_this(self) -> None:
        async with TestClient(self.app(name="basket")) as client:
            cookie = (await client.post("/add?what=x")).headers.get("set-cookie") or ""
        value = cookie.partition(";")[0].partition("=")[2]
        async with TestClient(self.app()) as client:
            answer = await client.get("/", headers={"cookie": f"session={value}"})
        self.assertEqual(answer.json(), {})

    async def test_keys_rotate_the_first_signs_and_all_are_accepted(self) -> None:
        new = "n" * 16
        async with TestClient(self.app()) as client:
            old = (await client.post("/add?what=x")).headers.get("set-cookie") or ""
        header = {"cookie": old.partition(";")[0]}
        async with TestClient(self.app(new, self.KEY)) as client:
            self.assertEqual((await client.get("/", headers=header)).json(), {"seen": ["x"]})
            changed = (await client.post("/add?what=y", headers=header)).headers.get("set-cookie")
        async with TestClient(self.app(new)) as client:
            kept = {"cookie": (changed or "").partition(";")[0]}
            self.assertEqual((await client.get("/", headers=kept)).json(), {"seen": ["x", "y"]})
            self.assertEqual((await client.get("/", headers=header)).json(), {})

    async def test_it_ends_by_itself_and_is_renewed_halfway(self) -> None:
        async with TestClient(self.app(max_age=1000)) as client:
            cookie = (await client.post("/add?what=x")).headers.get("set-cookie") or ""
        header = {"cookie": cookie.partition(";")[0]}
        now = stario.time.time()  # type: ignore[attr-defined]
        for later, session, is_renewed in (
            (10, {"seen": ["x"]}, False),
            (600, {"seen": ["x"]}, True),
            (1010, {}, False),
        ):
            with self.subTest(later), mock.patch("stario.time.time", lambda: now + later):  # noqa: B023
                async with TestClient(self.app(max_age=1000)) as client:
                    answer = await client.get("/", headers=header)
            self.assertEqual(answer.json(), session)
            self.assertEqual("set-cookie" in answer.headers, is_renewed)

    async def test_a_change_after_the_answer_began_is_said(self) -> None:
        async with connected(self.app()) as peer:
            with self.assertLogs("asyncio", "ERROR") as logs:
                await peer.get("/late")
                await peer.get("/")
        self.assertIn("changed after the answer had begun", "".join(logs.output))

    async def test_what_cannot_be_kept_is_said_and_the_answer_is_a_500(self) -> None:
        async def large(c: Context, w: Writer) -> None:
            c.session["text"] = "x" * 4096
            w.text("never sent")

        async def odd(c: Context, w: Writer) -> None:
            c.session["when"] = datetime.now(timezone.utc)
            w.text("never sent")

        async def no_number(c: Context, w: Writer) -> None:
            c.session["rate"] = math.nan
            w.text("never sent")

        for handler, message in (
            (large, "too large"), (odd, "what JSON cannot"), (no_number, "what JSON cannot")
        ):  # fmt: skip
            app = self.app()
            app.get("/bad", handler)
            async with connected(app) as peer:
                with self.subTest(message), self.assertLogs("asyncio", "ERROR") as logs:
                    answer = await peer.get("/bad")
            self.assertEqual(answer.status, 500)
            self.assertIn(message, "".join(logs.output))

    async def test_a_handler_has_one_session(self) -> None:
        app = Stario()
        app.use(Session(self.KEY), Session(self.KEY, name="basket"))
        app.get("/", self.show)
        async with TestClient(app) as client:
            with self.assertRaisesRegex(StarioError, "two Sessions around this handler"):
                await client.get("/")

    def test_a_short_key_is_refused(self) -> None:
        with self.assertRaisesRegex(StarioError, "16 bytes"):
            Session("secret")
        with self.assertRaisesRegex(StarioError, "16 bytes"):
            Session("k" * 16, b"old")

    def test_what_no_cookie_can_be_is_refused_when_the_session_is_made(self) -> None:
        wrong: list[dict[str, Any]] = [
            {"name": "a b"}, {"name": ""}, {"name": 3}, {"name": "__Host-session"},
            {"samesite": "some"}, {"max_age": "1h"}, {"max_age": None},
            {"max_age": 0}, {"max_age": -1},
        ]  # fmt: skip
        for options in wrong:
            with self.subTest(options), self.assertRaises(StarioError):
                Session("k" * 16, **options)

    async def test_without_the_middleware_it_says_what_is_missing(self) -> None:
        app = Stario()
        app.get("/", self.show)
        async with connected(app) as peer:
            with self.assertLogs("asyncio", "ERROR") as logs:
                self.assertEqual((await peer.get("/")).status, 500)
        self.assertIn("app.use(Session(key))", "".join(logs.output))


# -- 24. What lives as long as the server


class TestLife(AsyncTest):
    """Part 24: what lives as long as the server."""

    async def test_lifespans_are_entered_in_order_before_requests_and_left_after_them(self) -> None:
        log: list[str] = []

        def named(name: str) -> Callable[[Stario], Any]:
            @asynccontextmanager
            async def manager(app: Stario) -> AsyncIterator[None]:
                log.append(f"{name} opens")
                yield
                log.append(f"{name} closes")

            return manager

        async def work_on(c: Context, w: Writer) -> None:
            w.empty()
            await asyncio.sleep(0.01)  # goes on while the server stops
            log.append("handled")

        app = Stario()
        app.lifespan(named("first"))
        app.lifespan(named("second"))
        app.get("/", work_on)
        async with connected(app) as peer:
            self.assertEqual(log, ["first opens", "second opens"])
            await peer.get("/")
        self.assertEqual(
            log, ["first opens", "second opens", "handled", "second closes", "first closes"]
        )
        log.clear()
        async with TestClient(app) as client:
            await client.get("/")
        self.assertEqual(log[0], "first opens")
        self.assertEqual(log[-1], "first closes")

    async def test_work_is_started_that_another_thread_gives_as_the_server_starts(self) -> None:
        app = Stario()

        class Starting(dict[Any, Any]):
            """The server starts after it was looked for, and before the work is put here."""

            def __setitem__(self, work: object, start: object) -> None:
                app._life.loop = asyncio.get_running_loop()
                super().__setitem__(work, start)

        app._life.waiting = Starting()
        self.assertEqual(await within(asyncio.wrap_future(app.background(asyncio.sleep(0, 7)))), 7)
        self.assertFalse(app._life.waiting)

    async def test_work_is_cancelled_that_another_thread_gives_as_the_server_ends(self) -> None:
        app = Stario()

        class Ending(dict[Any, Any]):
            """The server ends after it was looked for, and before the work is started there."""

            def pop(self, *work: Any) -> Any:
                app._life.loop = None
                return super().pop(*work)

        app._life.waiting, app._life.loop = Ending(), asyncio.get_running_loop()
        handle = app.background(asyncio.sleep(0))
        await until(handle.cancelled)

    async def test_a_lifespan_that_fails_keeps_the_server_from_starting(self) -> None:
        closed = []

        @asynccontextmanager
        async def good(app: Stario) -> AsyncIterator[None]:
            try:
                yield
            finally:
                closed.append("good")

        @asynccontextmanager
        async def bad(app: Stario) -> AsyncIterator[None]:
            raise ValueError("no database")
            yield

        app = Stario()
        app.lifespan(good)
        app.lifespan(bad)
        for _ in range(2):  # and the next start finds everything as it was
            server = Server(app, port=0)
            with self.assertRaisesRegex(ValueError, "no database"):
                await server.start()
            self.assertEqual(server._listener.sockets, [])
        self.assertEqual(closed, ["good"] * 2)

    async def test_background_work_waits_for_the_server_and_ends_with_it(self) -> None:
        log: list[str] = []
        begun = asyncio.Event()

        async def tick() -> None:
            try:
                log.append("begun")
                begun.set()
                await asyncio.Event().wait()
            finally:
                log.append("ended")

        app = Stario()
        handle = app.background(tick())
        await asyncio.sleep(0)
        self.assertEqual(log, [])
        async with app.running():
            await within(begun.wait())
            self.assertFalse(handle.done())
        self.assertEqual(log, ["begun", "ended"])
        self.assertTrue(handle.cancelled())

    async def test_a_handler_in_any_thread_starts_work_on_the_servers_loop(self) -> None:
        loops: list[object] = []

        async def job(number: int) -> int:
            loops.append(asyncio.get_running_loop())
            return number * 2

        async def start(c: Context, w: Writer) -> None:
            handle = c.app.background(job(21))
            w.json(await asyncio.wrap_future(handle))  # type: ignore[arg-type]

        app = Stario()
        app.get("/", start)
        async with app.running(workers=3) as server:
            for _ in range(3):
                peer = await Peer.connect(server.port)
                self.assertEqual((await within(peer.get("/"))).text, "42")
                await peer.close()
        self.assertEqual(loops, [asyncio.get_running_loop()] * 3)

    async def test_work_is_cancelled_from_any_thread(self) -> None:
        begun, ended = asyncio.Event(), asyncio.Event()

        async def job() -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        app = Stario()
        async with app.running():
            handle = app.background(job())
            await within(begun.wait())
            self.assertTrue(await asyncio.to_thread(handle.cancel))
            await within(ended.wait())
            never = app.background(job())
            never.cancel()  # before it could begin

    async def test_a_failure_is_seen(self) -> None:
        async def job() -> None:
            raise ValueError("lost")

        spans = Spans()
        app = Stario(spans)
        async with app.running():
            handle = app.background(job())
            with self.assertRaisesRegex(ValueError, "lost"):
                await within(asyncio.wrap_future(handle))
        (span,) = [span for span in spans.ended if span.name.endswith("job")]
        self.assertEqual(span.error, "ValueError: lost")

        silent = Stario()
        with self.assertLogs("asyncio", "ERROR") as logs:
            async with silent.running():
                with self.assertRaisesRegex(ValueError, "lost"):
                    await within(asyncio.wrap_future(silent.background(job())))
        self.assertIn("job has failed", "".join(logs.output))

    async def test_whatever_it_raises_is_a_failure_and_a_cancellation_is_none(self) -> None:
        async def leave(exc: BaseException) -> None:
            raise exc

        async def done() -> int:
            handle.cancel()
            return 1

        async def never() -> None:
            self.fail("it was cancelled before it began")

        spans = Spans()
        app = Stario(spans)
        async with app.running():
            for exc in (SystemExit(3), KeyboardInterrupt(), GeneratorExit()):
                with self.assertRaises(type(exc)):
                    await within(asyncio.wrap_future(app.background(leave(exc))))
                self.assertEqual(spans.ended[-1].error, f"{type(exc).__name__}: {exc}")
            handle = app.background(done())
            app.background(never()).cancel()
            await until(lambda: spans.ended[-1].name.endswith("done"))
            self.assertIsNone(spans.ended[-1].error)
        self.assertFalse([span for span in spans.ended if span.name.endswith("never")])

    async def test_work_that_a_lifespan_starts_ends_before_what_it_uses(self) -> None:
        seen, begun, broken = list[str](), asyncio.Event(), [ValueError("broken")]

        async def job(name: str) -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                seen.append(name)

        @asynccontextmanager
        async def first(app: Stario) -> AsyncIterator[None]:
            app.background(job("early"))
            await begun.wait()
            begun.clear()
            try:
                yield
            finally:
                seen.append("left")
                app.background(job("late"))
                await begun.wait()
                not_begun.append(app.background(job("never")))
                await asyncio.sleep(0)

        @asynccontextmanager
        async def second(app: Stario) -> AsyncIterator[None]:
            if broken:
                raise broken.pop()
            yield

        for _ in range(2):
            seen.clear()
            begun.clear()
            not_begun = list[Any]()
            app = Stario()
            app.lifespan(first)
            app.lifespan(second)
            with suppress(ValueError):
                async with app.running():
                    pass
            self.assertEqual(seen, ["early", "left", "late"])
            self.assertTrue(not_begun[0].cancelled())

    async def test_mistakes_are_told(self) -> None:
        async def job() -> None: ...

        app = Stario()
        with self.assertRaisesRegex(StarioError, r"takes a coroutine, .* not a function"):
            app.background(job)  # type: ignore[arg-type]
        async with app.running():
            with self.assertRaisesRegex(StarioError, "served already"):
                async with app.running():
                    pass
        async with app.running():  # one after the other is fine
            pass


# -- 25. @baked


class TestBaked(unittest.TestCase):
    """Part 25: views that are called once."""

    VALUES: ClassVar[tuple[object, ...]] = (
        "text", "", "\n\nx", '<a b="&amp;">\r', None, True, False, 0, 1, 1.0, Decimal("1.50"), [],
        SafeString("<i>&</i>"), ["a<", [h.B("c"), None], 3], h.Br, {"a": 1, "b<": None},
    )  # fmt: skip

    def same(self, view: Callable[..., SafeString], *values: object, **named: object) -> None:
        """Both give the same, or both refuse the values."""

        def outcome(function: Callable[..., object]) -> object:
            try:
                return function(*values, **named)
            except (StarioError, TypeError, ValueError):
                return "refused"

        expected = outcome(view.__wrapped__)  # type: ignore[attr-defined]
        if any(isinstance(value, dict) for value in values) and outcome(view) == "refused":
            return  # a dict would be attributes there: it is refused when it comes
        self.assertEqual(outcome(view), expected)

    def test_a_baked_view_gives_what_the_view_gives(self) -> None:
        @baked
        def content(a: Any, b: Any = "b<") -> SafeString:
            return h.P(a, "<", [b, a], h.Pre(a, b), h.Textarea({"id": "t"}, b), f"{a} - {b!s}")

        @baked
        def attributes(a: Any, b: Any) -> SafeString:
            return h.Input(
                {"title": a, "id": f"x-{a}", "class": ["c", {"d": b}, b], "data": {"n": a}},
                {"style": {"color": a, "top": 0}, "alt": h.B(b), "rel": b},
            )

        @baked
        def actions(a: Any, b: Any) -> SafeString:
            return h.A(data.on("click", at.post(f"/x?y={a}", {"z": b})), data.text(a))

        @baked
        def sums(a: Any, b: Any) -> SafeString:
            return h.P({"href": "mailto:" + a, "src": a + b}, a + "<", h.B("x") + a, a + h.I("y"))

        @baked
        def formats(a: Any, b: Any) -> SafeString:
            return h.P({"title": f"{a:.1f}"}, f"{b:>8}", str(b) + ";")

        for view in (content, attributes, actions, sums, formats):
            for a in self.VALUES:
                for b in ("<&", None, a):
                    with self.subTest(view=view.__name__, a=a, b=b):
                        self.same(view, a, b)

    @needs("hypothesis")
    def test_any_text_gives_what_the_view_gives(self) -> None:
        from hypothesis import given, settings
        from hypothesis import strategies as st

        @baked
        def view(a: Any, b: Any, *, c: Any = "c") -> SafeString:
            title = h.H2({"title": a, "class": [b, {"x": c}]}, b, h.Pre(c, a))
            return h.Div({"id": f"x-{a}", "style": {"color": b}, "alt": title}, title, f"{b}{c}", a)

        leaves = st.text() | st.none() | st.booleans() | st.integers() | st.builds(h.P, st.text())
        values = leaves | st.lists(leaves, max_size=3)

        @settings(max_examples=300, deadline=None)
        @given(values, values, values)
        def check(a: object, b: object, c: object) -> None:
            self.same(view, a, b, c=c)

        check()

    def test_what_a_blank_cannot_do_is_refused_by_its_name(self) -> None:
        def quiet(user: Any) -> object:
            try:
                return user.name
            except Exception:
                return "nobody"

        views: list[Callable[[Any], Any]] = [
            lambda user: h.P("on" if user else "off"),
            lambda user: h.P("none" if user is None else user),
            lambda user: h.P(user == "ada"),
            lambda user: h.P({"ada": 1}.get(user)),
            lambda user: h.P(h.B(part) for part in user),
            lambda user: h.P(len(user), user[0], user.name),
            lambda user: h.P(user.name, quiet(user)),
            lambda user: h.P(quiet(user)),
            lambda user: h.P(user + 1),
            lambda user: h.P(-user),
            lambda user: h.P(int(user)),
            lambda user: h.P("text" if isinstance(user, str) else "other", user),
            lambda user: h.P(type(user).__name__),
            lambda user: h.P(f"{user!r}"),
            lambda user: h.P(f"{user}".upper()),
            lambda user: h.P(f"{user}", f" {user}".strip()),
            lambda user: h.P(f"{user}"[:1]),
            lambda user: h.P(str(user) or "nobody"),
            lambda user: h.P("you" if f"{user}" == "ada" else "they"),
            lambda user: h.P(html.escape(f"{user}")),
            lambda user: h.P({"href": "/" + quote(f"{user}")}),
            lambda user: h.P(json.dumps({"user": user})),
            lambda user: h.P(json.dumps({"user": f"{user}"})),
            lambda user: h.P(data.signals({"user": user})),
            lambda user: h.Script(user),
            lambda user: h.Script(f"go({user})"),
            lambda user: h.Style("a { color: ", user, "}"),
            lambda user: SafeString(f"<b>{user}</b>"),
            lambda user: h.tag(user)("x"),
            lambda user: h.tag(f"my-{user}")("x"),
            lambda user: h.P({user: "x"}),
            lambda user: h.P({f"data-{user}": "x"}),
            lambda user: h.Br(user),
            lambda user: user,
        ]
        for number, view in enumerate(views):
            with self.subTest(number), self.assertRaisesRegex(StarioError, "user.*outside"):
                baked(view)("ada")

    def test_what_is_no_view_is_refused(self) -> None:
        views: list[Callable[[Any], Any]] = [
            lambda x: None,
            lambda x: "text",
            lambda x: {"id": x},
            lambda x: h.P(uuid.uuid4().hex, x),
        ]
        for number, view in enumerate(views):
            with self.subTest(number), self.assertRaises(StarioError):
                baked(view)("x")
        with self.assertRaisesRegex(StarioError, "parts.*outside"):
            baked(lambda *parts: h.P(*parts))("x")

        @baked
        def endless(text: str) -> SafeString:
            return h.P(endless(text))

        with self.assertRaisesRegex(StarioError, "calls itself"):
            endless("x")

    def test_no_text_looks_like_a_blank(self) -> None:
        seen: list[str] = []

        @baked
        def view(a: Any) -> SafeString:
            seen.append(f"{a}")
            return h.P(seen[-1], {"title": a})

        view("x")
        for text in list(seen):
            self.same(view, text)

    def test_types_that_write_themselves_otherwise_are_escaped(self) -> None:
        class Number(int):
            def __format__(self, spec: str) -> str:
                return "<b>&"

            __str__ = __repr__ = lambda self: "<i>&"

        class Word(str):
            __slots__ = ()
            __format__ = Number.__format__  # type: ignore[assignment]
            __str__ = Number.__str__

        @baked
        def view(a: Any) -> SafeString:
            return h.P({"id": f"x-{a}", "alt": a, "style": {"top": a}}, a, f"{a}{a!s}", [a])

        @baked
        def formats(a: Any) -> SafeString:
            return h.P(f"{a:.2f}", {"alt": f"{a:d}", "title": f"{a:c}"})

        for value in (1, Number(60), Word("w<"), h.B("x"), "<"):
            self.same(view, value)
        for value in (60, 34, Number(60), Word("w"), True, 1.5):
            self.same(formats, value)

    def test_names_of_every_kind(self) -> None:
        @baked
        def view(a: Any) -> SafeString:
            names = {"x{y}": a, "x\\y": a, "{_v}": a, "NAME": a}
            return h.P(names, {"style": {"a'b": a, 'c"d': a, "{e}": a, "--f\n": a}}, data.text(a))

        for value in self.VALUES:
            self.same(view, value)

    def test_a_first_call_that_fails_shows_nothing_and_is_not_kept(self) -> None:
        @baked
        def view(price: Any, code: Any) -> SafeString:
            return h.Div(f"{price:.2f}", h.P(code if code != "" else "none"))

        @baked
        def script(price: Any, code: Any) -> SafeString:
            return h.Div(f"{price:.2f}", h.Script(code))

        with self.assertRaisesRegex(StarioError, "code.*outside"):
            view("no number", "x")
        with self.assertRaisesRegex(StarioError, "code.*outside"):
            script("no number", "x")

        @baked
        def price_of(price: Any) -> SafeString:
            return h.P(f"{price:.2f}")

        with self.assertRaises(ValueError):
            price_of("no number")
        self.assertEqual([price_of(1), price_of(1.5)], ["<p>1.00</p>", "<p>1.50</p>"])

    def test_a_blank_that_is_kept_is_refused(self) -> None:
        kept: list[Any] = []

        @baked
        def view(name: Any) -> SafeString:
            kept.append(name)
            return h.P(name)

        view("x")
        with self.assertRaisesRegex(StarioError, "name.*kept"):
            h.P(kept[0])

    def test_an_error_names_the_line_of_the_view(self) -> None:
        @baked
        def view(name: Any) -> SafeString:
            return h.P(name)

        view("x")
        with self.assertRaises(StarioError) as caught:
            view(b"bytes")
        line = view.__wrapped__.__code__.co_firstlineno  # type: ignore[attr-defined]
        self.assertEqual(caught.exception.__notes__, [f"at {__file__}:{line}"])

    def test_what_is_no_function_is_refused(self) -> None:
        with self.assertRaisesRegex(StarioError, "function"):
            baked(functools.partial(h.P, "x"))

    def test_a_baked_view_is_called_like_the_view(self) -> None:
        def view(a: str, /, b: str = "B", *, c: str = "C") -> SafeString:
            """Doc."""
            return h.P(a, b, c)

        filled = baked(view)
        self.assertEqual((filled.__name__, filled.__doc__), ("view", "Doc."))
        self.assertEqual(inspect.signature(filled), inspect.signature(view))
        self.assertEqual(filled("1"), "<p>1BC</p>")
        self.assertEqual(filled("1", c="3", b="2"), "<p>123</p>")
        for wrong in ((), ("1", "2", "3")):
            with self.assertRaises(TypeError):
                filled(*wrong)
        with self.assertRaises(TypeError):
            filled("1", d="4")  # type: ignore[call-arg]

    def test_baked_views_stand_in_baked_views(self) -> None:
        @baked
        def inner(a: Any, b: Any = 2) -> SafeString:
            return h.B({"title": a}, b, h.Pre(a))

        @baked
        def outer(x: Any) -> SafeString:
            return h.P(inner(x, "<"), inner(f"{x}-"), [inner("k", b=x)])

        for value in self.VALUES:
            self.same(outer, value)

    def test_the_code_of_a_deep_view_is_not_longer_than_the_view(self) -> None:
        @baked
        def view(a: Any) -> SafeString:
            page = h.P({"title": a + "!"}, a)
            for _ in range(30):  # (each asks whether a line feed comes first)
                page = h.Pre(page)
            return page

        for value in ("\n<", "x"):
            self.same(view, value)

    def test_an_error_of_the_first_call_is_not_kept(self) -> None:
        broken = True

        @baked
        def view(a: str) -> SafeString:
            return h.P(a, 1 / 0 if broken else 2)

        with self.assertRaisesRegex(StarioError, "ZeroDivisionError"):
            view("x")
        broken = False
        self.assertEqual(view("x"), "<p>x2</p>")

    def test_the_first_call_may_come_from_several_threads(self) -> None:
        @baked
        def view(a: int) -> SafeString:
            return h.P(a)

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            pages = list(pool.map(view, range(64)))
        self.assertEqual(pages, [f"<p>{number}</p>" for number in range(64)])


# -- 26. ASGI


class AsgiServer:
    """What an ASGI server does for one request: it gives pieces of a body, and takes an answer."""

    def __init__(self, app: Any, path: str = "/", *pieces: bytes, **scope: Any) -> None:
        self.scope = {
            "type": "http", "method": "GET", "path": path, "query_string": b"", "headers": [],
            "client": ("10.0.0.9", 1), "scheme": "https", **scope,
        }  # fmt: skip
        self.pieces, self.count = list(pieces), len(pieces)
        self.received = 0
        self.then: Exception | None = None  # in place of a disconnect
        self.sent: list[dict[str, Any]] = []
        self.room = asyncio.Event()  # the client takes what is sent
        self.room.set()
        self.gone = asyncio.Event()
        self.task = asyncio.create_task(app(self.scope, self.receive, self.send))

    async def receive(self) -> dict[str, Any]:
        if self.received < max(1, len(self.pieces)):
            self.received += 1
            body = self.pieces[self.received - 1] if self.pieces else b""
            return {
                "type": "http.request",
                "body": body,
                "more_body": self.received < self.count,
            }
        await self.gone.wait()
        if self.then:
            raise self.then
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await self.room.wait()
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


class TestAsgi(StreamTest):
    """Part 26: what a server does, and what it sees of the app."""

    async def asked(self, app: Stario, path: str = "/", *pieces: bytes, **scope: Any) -> AsgiServer:
        server = AsgiServer(app, path, *pieces, **scope)
        await within(server.task)
        return server

    async def test_a_request_comes_as_it_was_sent(self) -> None:
        async def show(c: Context, w: Writer) -> None:
            req = c.req
            w.json([req.path, req.raw_path, req.query.get("q"), req.client, req.url, req.cookies])

        app = Stario()
        app.get("/*", show)
        cookies = [(b"cookie", b"a=1"), (b"Cookie", "b=ü".encode())]  # as HTTP/2 splits them
        fields = [(b"host", b"h"), *cookies]
        server = await self.asked(
            app, "/é/x/y", raw_path=b"/%C3%A9/x%2Fy", query_string=b"q=%20", headers=fields
        )
        url = "https://h/%C3%A9/x%2Fy?q=%20"
        wanted = ["/é/x/y", "/%C3%A9/x%2Fy", " ", "10.0.0.9", url, {"a": "1", "b": "ü"}]
        self.assertEqual(json.loads(server.body), wanted)
        self.assertEqual([m.get("more_body") for m in server.sent], [None, False])
        refused = await self.asked(app, "/%zz", raw_path=b"/%zz")
        self.assertEqual(refused.sent[0]["status"], 400)
        for hosts in ([b"evil.example/x"], [b"me@evil.example"], [b"a", b"b"], [b"a b"]):
            refused = await self.asked(app, "/", headers=[(b"Host", host) for host in hosts])
            self.assertEqual(refused.body, b"Host is not one valid host")

    async def test_what_is_refused_is_answered_at_once_whatever_its_body(self) -> None:
        for path, fields in (("/%zz", []), ("/", [(b"host", b"a b")])):
            raw, pieces = path.encode(), [b"x"] * 100
            server = await self.asked(
                Stario(), path, *pieces, method="POST", raw_path=raw, headers=fields
            )
            self.assertEqual([m.get("more_body") for m in server.sent], [None, False])

    async def test_a_mounted_app_begins_at_its_root(self) -> None:
        async def show(c: Context, w: Writer) -> None:
            w.text(f"{c.req.path} at {c.req.root_path}")

        app = Stario()
        app.get("/*", show)
        for path, raw, text in (
            ("/live/x", b"/live/x", "/x at /live"),
            ("/live", b"/live", "/ at /live"),
            ("/live/é", b"/%6cive/%C3%A9", "/é at /live"),
            ("/livery", b"/livery", "/livery at /live"),
            ("/live/a/b", b"/live%2Fa/b", "/a/b at /live"),
            ("/live/é", None, "/é at /live"),
            ("/é/y", b"/live/%C3%A9/y", "/é/y at /live"),  # as Starlette before 0.33 mounts
            ("/live/z", b"/z", "/z at /live"),
            ("/live/\udcff", b"/live/%FF", "/? at /live"),
        ):
            server = await self.asked(app, path, raw_path=raw, root_path="/live")
            self.assertEqual(server.body.decode(), text)
        path, raw = "/ü/b/x/y", b"/%C3%BC%2Fb/x%2Fy"
        server = await self.asked(app, path, raw_path=raw, root_path="/ü/b/")
        self.assertEqual(server.body.decode(), "/x/y at /ü/b")

    async def test_what_a_scope_may_leave_out_is_not_needed(self) -> None:
        async def show(c: Context, w: Writer) -> None:
            w.text(f"{c.req.method} {c.req.client!r} {c.req.scheme} {len(c.req.query)}")

        app, server = Stario(), AsgiServer(Stario())
        app.get("/", show)
        await within(server.task)
        server.sent.clear()
        for scope in ({}, {"client": None, "scheme": "", "root_path": ""}, {"client": (None, 0)}):
            least = {"type": "http", "method": "GET", "path": "/", **scope}
            await within(app(least, server.receive, server.send))
            self.assertEqual(server.sent.pop()["body"], b"GET '' http 0")

    async def test_a_body_is_received_as_it_is_wanted_and_never_beyond_its_limit(self) -> None:
        async def slow(c: Context, w: Writer) -> None:
            self.ready.set()
            await self.ended_waiting.wait()
            w.text(str(len(await c.req.body())))

        self.ended_waiting = asyncio.Event()
        app = Stario(max_body=10_000_000)
        app.post("/", slow)
        pieces = [bytes(50_000)] * 100
        server = AsgiServer(app, "/", *pieces, method="POST")
        await within(self.ready.wait())
        for _ in range(20):
            await asyncio.sleep(0)
        self.assertLess(server.received, 5)
        self.ended_waiting.set()
        await within(server.task)
        self.assertEqual(server.body, b"5000000")
        app.max_body = 60_000
        self.assertEqual(
            (await self.asked(app, "/", *pieces, method="POST")).sent[0]["status"], 413
        )

    async def test_a_client_that_does_not_take_holds_the_stream_up(self) -> None:
        written: list[int] = []

        async def flood(c: Context, w: Writer) -> None:
            async for _ in w.alive():
                w.event("x", "y" * 10_000)
                written.append(1)

        server = AsgiServer(self.app(flood))
        await until(lambda: len(written) > 20)
        server.room.clear()
        for _ in range(100):
            await asyncio.sleep(0)
        before = len(written)
        for _ in range(100):
            await asyncio.sleep(0)
        self.assertEqual(len(written), before)
        server.gone.set()
        server.room.set()
        await within(server.task)

    async def test_a_client_that_leaves_too_much_unsent_is_cut_off(self) -> None:
        async def careless(c: Context, w: Writer) -> None:
            while not w.disconnected:
                w.event("x", "y" * 10_000)
                self.log.append("written")
                await asyncio.sleep(0)
            w.event("x", "dropped")

        with mock.patch.object(stario, "_ASGI_BUFFER", 200_000):
            server = AsgiServer(self.app(careless))
            server.room.clear()
            await until(lambda: self.log and not stario._asgi_handlers)
            server.room.set()
            with self.assertRaises(ClientDisconnected):
                await within(server.task)
        self.assertLess(len(self.log), 40)
        self.assertNotIn(b"dropped", server.body)

    async def test_a_disconnect_or_a_server_that_stops_ends_the_stream_and_its_cleanup_runs(
        self,
    ) -> None:
        async def stream(c: Context, w: Writer) -> None:
            self.start(w)
            async for _ in w.alive(self.relay.subscribe("*")):
                pass
            await asyncio.sleep(0)
            self.log.append(f"{w.disconnected} {w.shutting_down}")

        server = AsgiServer(self.app(stream))
        await within(self.ready.wait())
        server.gone.set()
        await within(self.ended.wait())
        await within(server.task)
        self.setUp_again()
        server = AsgiServer(self.app(stream))
        await within(self.ready.wait())
        server.task.cancel()
        await within(self.ended.wait())
        self.assertEqual(self.log, ["True False", "True True"])
        self.assertTrue(is_empty(self.relay))

    async def test_a_disconnect_is_heard_behind_a_large_body(self) -> None:
        async def stream(c: Context, w: Writer) -> None:
            if c.req.query:
                await c.req.body()
            self.start(w)
            async for _ in w.alive(self.relay.subscribe("*")):
                pass

        for query in (b"", b"read=1"):
            with self.subTest(query):
                self.setUp_again()
                app = Stario()
                app.post("/", stream)
                server = AsgiServer(app, "/", bytes(200_000), method="POST", query_string=query)
                await within(self.ready.wait())
                server.gone.set()
                await within(server.task)

    async def test_a_disconnect_is_heard_behind_a_large_body_that_is_never_read(self) -> None:
        async def stream(c: Context, w: Writer) -> None:
            self.start(w)
            async for _ in w.alive(self.relay.subscribe("*")):
                pass
            with self.assertRaises(HttpException) as caught:
                await c.req.body()
            self.log.append(f"{w.disconnected} {caught.exception.status_code}")

        pieces = [bytes(40_000)] * 5
        with mock.patch.object(stario, "_ASGI_UNREAD", 0.01):
            server = AsgiServer(self.app(stream), "/", *pieces)
            await within(self.ready.wait())
            await until(lambda: server.received == len(pieces))
            server.gone.set()
            await within(server.task)
        self.assertEqual(self.log, ["True 408"])

    async def test_whoever_waits_for_a_body_is_told_that_it_does_not_come(self) -> None:
        async def read(c: Context, w: Writer) -> None:
            if c.req.query:
                w.empty()
            try:
                await c.req.body()
            except ClientDisconnected:
                self.log.append(f"told {w.disconnected}")
                raise

        app = Stario()
        app.post("/", read)
        for query, then, wanted, raised in (
            (b"", RuntimeError("no loop"), "told True", RuntimeError),
            (b"", ConnectionResetError(), "told True", None),
            (b"early=1", RuntimeError("answered already"), "told False", None),
            (b"early=1", None, "told False", None),  # it is gone after the answer
        ):
            with self.subTest(query=query, then=then):
                self.log.clear()
                server = AsgiServer(app, "/", b"a", b"b", method="POST", query_string=query)
                server.pieces.pop()
                server.then = then
                server.gone.set()
                with self.assertRaises(raised) if raised else contextlib.nullcontext():
                    await within(server.task)
                self.assertEqual(self.log, [wanted])

    async def test_a_receive_that_repeats_the_end_of_the_body_does_not_stop_the_loop(self) -> None:
        async def waits(c: Context, w: Writer) -> None:
            await asyncio.sleep(0)
            w.text("done")

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        server = AsgiServer(Stario())
        await within(server.task)
        await within(self.app(waits)(server.scope, receive, server.send))
        self.assertEqual(server.sent[-1]["body"], b"done")

    def setUp_again(self) -> None:
        self.ready, self.ended = asyncio.Event(), asyncio.Event()

    async def test_work_after_an_early_answer_is_done(self) -> None:
        async def early(c: Context, w: Writer) -> None:
            w.empty()
            await go_on.wait()
            self.log.append(f"worked {w.disconnected}")

        go_on = asyncio.Event()
        server = AsgiServer(self.app(early))
        await until(lambda: len(server.sent) == 2)
        self.assertEqual(self.log, [])
        server.gone.set()  # servers say so once the answer is through
        for _ in range(5):
            await asyncio.sleep(0)
        go_on.set()
        await within(server.task)
        self.assertEqual(self.log, ["worked False"])

    async def test_an_answer_that_breaks_off_is_seen(self) -> None:
        async def broken(c: Context, w: Writer) -> None:
            w.write(b"some")
            await asyncio.sleep(0)
            raise HttpException(400)

        server = AsgiServer(self.app(broken))
        with self.assertRaises(ClientDisconnected):
            await within(server.task)
        self.assertTrue(all(message.get("more_body", True) for message in server.sent))

    async def test_who_answers_too_much_or_too_little_is_cut_off_at_once(self) -> None:
        async def wrong(c: Context, w: Writer) -> None:
            w.headers.set("content-length", 5)
            w.write_headers(200)
            await asyncio.sleep(0)
            with self.assertRaises(StarioError):
                w.end(b"more than five" if c.req.query else b"four")
            self.log.append(f"goes on {w.disconnected}")
            await go_on.wait()
            self.log.append(f"ends {w.disconnected}")

        for query in (b"", b"much=1"):
            go_on = asyncio.Event()
            server = AsgiServer(self.app(wrong), query_string=query)
            with self.assertRaises(ClientDisconnected):
                await within(server.task)
            go_on.set()
            await until(lambda: len(self.log) == 2)
            self.assertEqual(self.log, ["goes on False", "ends True"])
            self.log.clear()

    async def test_the_head_goes_out_when_it_is_written_and_drain_waits_for_the_rest(self) -> None:
        async def late(c: Context, w: Writer) -> None:
            w.write_headers(200)
            await go_on.wait()
            w.end(bytes(1_000_000))
            await w.drain()
            self.log.append("drained")

        go_on = asyncio.Event()
        server = AsgiServer(self.app(late))
        await until(lambda: server.sent)
        self.assertEqual(server.sent[0]["type"], "http.response.start")
        server.room.clear()
        go_on.set()
        for _ in range(20):
            await asyncio.sleep(0)
        self.assertEqual(self.log, [])
        server.room.set()
        await within(server.task)
        self.assertEqual((self.log, len(server.body)), (["drained"], 1_000_000))

    async def test_an_answer_ends_when_its_request_has(self) -> None:
        async def answers(c: Context, w: Writer) -> None:
            w.text("unread")

        async def receive() -> dict[str, Any]:
            if not begun.is_set():
                begun.set()
                return {"type": "http.request", "body": b"a", "more_body": True}
            await rest.wait()
            return {"type": "http.request", "body": b"b", "more_body": False}

        app = Stario()
        app.post("/", answers)
        app.get("/", answers)
        for comes, method, version in (
            (True, "POST", "1.1"), (False, "POST", "1.1"), (True, "GET", "2"), (False, "GET", "3")
        ):  # fmt: skip
            begun, rest = asyncio.Event(), asyncio.Event()
            server = AsgiServer(Stario(), method=method, http_version=version)
            await within(server.task)
            server.sent.clear()
            with mock.patch.object(stario, "_ASGI_GRACE", 30 if comes else 0.01):
                serving = asyncio.create_task(app(server.scope, receive, server.send))
                await within(begun.wait())
                await until(lambda server=server: server.body == b"unread")  # type: ignore[misc]
                if comes:
                    self.assertTrue(server.sent[-1]["more_body"])
                    rest.set()
                await within(serving)
            self.assertEqual((server.body, server.sent[-1]["more_body"]), (b"unread", False))

    async def test_a_server_that_fails_to_send_ends_the_handler(self) -> None:
        async def floods(c: Context, w: Writer) -> None:
            async for _ in w.alive():
                w.event("x", "y" * 100_000)
            self.log.append(f"{w.disconnected}")
            self.ended.set()

        async def fails(message: Any) -> None:
            raise failure

        for failure in (RuntimeError("closed"), ConnectionResetError()):
            self.setUp_again()
            server = AsgiServer(Stario())
            await within(server.task)
            serving = self.app(floods)(server.scope, server.receive, fails)
            raised = isinstance(failure, RuntimeError)
            with self.assertRaises(RuntimeError) if raised else contextlib.nullcontext():
                await within(serving)
            await within(self.ended.wait())
        self.assertEqual(self.log, ["True", "True"])

    async def test_its_life_is_that_of_the_server(self) -> None:
        @asynccontextmanager
        async def life(app: Stario) -> AsyncIterator[None]:
            self.log.append("opened")
            yield
            self.log.append("closed")

        app = Stario()
        app.lifespan(life)
        told: asyncio.Queue[dict[str, str]] = asyncio.Queue()
        said: list[str] = []

        async def send(message: Any) -> None:
            said.append(message["type"])

        living = asyncio.create_task(app({"type": "lifespan"}, told.get, send))
        told.put_nowait({"type": "lifespan.startup"})
        await until(lambda: said)
        self.assertEqual((said, self.log), (["lifespan.startup.complete"], ["opened"]))
        told.put_nowait({"type": "lifespan.shutdown"})
        await within(living)
        self.assertEqual((said[1:], self.log[1:]), (["lifespan.shutdown.complete"], ["closed"]))

    async def test_a_life_that_fails_is_told_for_what_it_was(self) -> None:
        for stage, error in (
            ("startup", LookupError("no database")),
            ("shutdown", LookupError("no database")),
            ("startup", SystemExit("DATABASE is not set")),  # or uvicorn would serve all the same
        ):

            @asynccontextmanager
            async def life(
                app: Stario, stage: str = stage, error: BaseException = error
            ) -> AsyncIterator[None]:
                if stage == "startup":
                    raise error
                yield
                raise error

            app, said = Stario(), list[dict[str, str]]()
            app.lifespan(life)
            told = iter(("startup", "shutdown"))

            async def receive(told: Any = told) -> dict[str, str]:
                return {"type": f"lifespan.{next(told)}"}

            async def send(message: Any, said: Any = said) -> None:
                said.append(message)

            with self.assertRaises(type(error)):
                await app({"type": "lifespan"}, receive, send)
            reason = f"{type(error).__name__}: {error}"
            self.assertEqual(said[-1], {"type": f"lifespan.{stage}.failed", "message": reason})


@needs("starlette")
class TestUnderStarlette(AsyncTest):
    async def test_it_can_be_mounted(self) -> None:
        from starlette.applications import Starlette
        from starlette.routing import Mount

        async def here(c: Context, w: Writer) -> None:
            w.text(f"{c.req.path} at {c.req.root_path}")

        app = Stario()
        app.get("/x", here)
        outer = Starlette(routes=[Mount("/live", app)])
        for path, status in (("/live/x", 200), ("/live/x/", 308), ("/live/none", 404), ("/x", 404)):
            server = AsgiServer(outer, path, raw_path=path.encode(), root_path="")
            await within(server.task)
            self.assertEqual(server.sent[0]["status"], status, path)
            if status == 200:
                self.assertEqual(server.body, b"/x at /live")
            if status == 308:
                self.assertIn((b"location", b"/live/x"), server.sent[0]["headers"])
        pocket = "/live/_stario/" + asset("pocket.js", "_stario")
        server = AsgiServer(outer, pocket, raw_path=pocket.encode(), root_path="")
        await within(server.task)
        self.assertEqual(server.sent[0]["status"], 200)


@needs("fastapi")
class TestUnderFastapi(AsyncTest):
    async def test_it_can_be_mounted_beside_the_routes_of_the_other(self) -> None:
        from fastapi import FastAPI

        async def number(c: Context, w: Writer) -> None:
            w.json({"root": c.req.root_path, "id": c.req.params["id"]})

        app, outer = Stario(), FastAPI()
        app.get("/rooms/{id}", number)
        outer.get("/own")(lambda: {"own": True})
        outer.mount("/a/b", app)
        for path, wanted in (
            ("/own", {"own": True}),
            ("/a/b/rooms/7", {"root": "/a/b", "id": "7"}),
        ):
            server = AsgiServer(outer, path, raw_path=path.encode(), root_path="")
            await within(server.task)
            self.assertEqual(json.loads(server.body), wanted)


# -- 27. RedisRelay


def interrupted(place: int, between: Callable[[], object], work: Callable[[], Any]) -> Any:
    """What `work` gives; before the so many-th bytecode of the relay in it, `between` is called.

    None if it has fewer.
    """
    count = 0

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename != stario.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "call" and sys.version_info[:2] == (3, 12):
            sys.settrace(trace)  # it does not hear of the line above by itself
        if event == "opcode":
            count += 1
            if count == place:
                sys.settrace(None)
                between()
                sys.settrace(trace)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        found = work()
    finally:
        sys.settrace(before)
    return found if count >= place else None


async def received_until_closed(subscription: Subscription[Any]) -> list[Any]:
    return [data async for _, data in subscription]


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Redis:
    """A redis-server of its own, without a file, to be killed, started again, and stopped."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while not self.is_there():
            time.sleep(0.01)

    def is_there(self) -> bool:
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port)).close()
            return True
        return False

    def signal(self, number: int) -> None:
        assert self.process
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def tell(self, *command: str) -> str:
        """Send a command on a connection of its own."""
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(" ".join(command).encode() + b"\r\n")
            return connection.recv(65536).decode()


# (a copy without RedisRelay is tested, too)
AnyRedisRelay: Any = stario.RedisRelay[Any] if isinstance(stario.RedisRelay, type) else object


class NotedRelay(AnyRedisRelay):  # type: ignore[misc]
    """It says when all that was published has come back from Redis."""

    def __init__(self, url: str, **options: Any) -> None:
        self.marks = 0
        super().__init__(url, **options)

    def _deliver_payload(self, channel: bytes, payload: bytes) -> None:
        if channel.endswith(b"a mark of the test"):
            self.marks += 1
        else:
            super()._deliver_payload(channel, payload)

    async def settle(self) -> None:
        mark, before = self.subscribe("a mark of the test"), self.marks
        self.publish("a mark of the test")
        await until(lambda: self.marks > before)
        mark.close()


class RedisTest(AsyncTest):
    """What the tests with Redis share: a server for each class, and relays that are closed."""

    redis: ClassVar[Redis]

    @classmethod
    def setUpClass(cls) -> None:
        cls.redis = Redis()
        cls.redis.start()
        cls.addClassCleanup(cls.redis.kill)

    def relay(self, **options: Any) -> NotedRelay:
        relay = NotedRelay(self.redis.url, prefix=f"{self.id()}:", **options)
        self.addCleanup(relay.close)
        return relay


@needs("redis", "redis-server")
class TestRedisRelayIsARelay(RedisTest, RelayPromises):
    """What holds for a relay holds by way of Redis, too."""

    each = 300

    async def settle(self, relay: Relay[Any]) -> None:
        assert isinstance(relay, NotedRelay)
        await relay.settle()


@needs("redis", "redis-server")
class TestRedisRelay(RedisTest):
    """Part 27: between processes, and when Redis goes away."""

    def setUp(self) -> None:
        self.spans = Spans()
        if not self.redis.process:
            self.redis.start()

    def heard(self, name: str) -> int:
        return sum(span.name == name for span in self.spans.ended)

    async def get(self, subscription: Subscription[Any]) -> Any:
        return (await within(anext(subscription)))[1]

    async def test_what_one_publishes_all_hear_once(self) -> None:
        a, b = self.relay(), self.relay()
        own, others = a.subscribe("room.1", "*"), b.subscribe("room.*", "room.1")
        await b.settle()
        for number in range(3):
            a.publish("room.1", {"number": number})
        for subscription in (own, others):
            got = [await self.get(subscription) for _ in range(3)]
            self.assertEqual(got, [{"number": 0}, {"number": 1}, {"number": 2}])
        await a.settle()
        await b.settle()
        self.assertEqual((await received(own), await received(others)), ([], []))

    async def test_the_same_message_again_is_no_copy_whoever_comes_and_goes_meanwhile(self) -> None:
        relay, other = self.relay(), self.relay()
        stays = relay.subscribe("a.*")
        comes: list[Subscription[Any]] = []
        for patterns in (["a.b"], ["*"], ["a.b", "a.*", "*"], []):
            await relay.settle()
            for _ in range(3):
                other.publish("a.b", "the same")
            await other.settle()
            if comes:
                comes.pop().close()
            if patterns:
                comes.append(relay.subscribe(*patterns))
        await relay.settle()
        self.assertEqual(await received(stays), ["the same"] * 12)

    async def test_a_pattern_is_subscribed_once_and_only_while_somebody_listens(self) -> None:
        relay = self.relay()
        many = [relay.subscribe("room.1", f"hall.{number % 2}.*") for number in range(100)]
        await relay.settle()

        def subscribed(kind: str, *arguments: str) -> str:
            return self.redis.tell("PUBSUB", kind, *arguments)

        self.assertTrue(subscribed("NUMPAT").startswith(":2"))
        self.assertIn("room.1", subscribed("CHANNELS"))
        for subscription in many:
            subscription.close()
        await relay.settle()
        self.assertTrue(subscribed("NUMPAT").startswith(":0"))
        self.assertNotIn("room.1", subscribed("CHANNELS"))

    async def test_a_pattern_that_comes_and_goes_and_comes_again_is_heard(self) -> None:
        relay = self.relay()
        for number in range(30):
            with relay.subscribe("a.*") as subscription:
                if number % 3 == 0:
                    await relay.settle()
                relay.publish("a.b", number)
                self.assertEqual(await self.get(subscription), number)

    async def test_subjects_may_hold_what_is_a_pattern_at_redis(self) -> None:
        relay = self.relay()
        for odd in ("a[bc]", "a?", "a\\", "^-", "é\n", " ", ""):
            with self.subTest(odd):
                exact, prefix = relay.subscribe(odd), relay.subscribe(f"{odd}.*")
                relay.publish("ab.x", "no")
                relay.publish(odd, 1)
                relay.publish(f"{odd}.x", 2)
                await relay.settle()
                self.assertEqual((await received(exact), await received(prefix)), ([1], [2]))

    async def test_data_that_json_cannot_hold_is_refused(self) -> None:
        relay = self.relay()
        loop: list[Any] = []
        loop.append(loop)
        text = h.P("comes back as text")
        for wrong in ((1,), [{"a": (1,)}], {1: 2}, float("nan"), {1}, b"x", object(), loop, text):
            with self.assertRaisesRegex(StarioError, "what JSON can hold"):
                relay.publish("a", wrong)
        subscription = relay.subscribe("a")
        for right in (None, True, -1, 1.5, "é\ud800", [1, {"a": None}]):
            relay.publish("a", right)
            self.assertEqual(await self.get(subscription), right)

    async def test_what_others_put_into_our_channels_does_no_harm(self) -> None:
        relay = self.relay(tracer=self.spans)
        subscription = relay.subscribe("*")
        await relay.settle()
        for text in ("{", "no", "[" * 60_000):
            self.redis.tell("PUBLISH", f"{self.id()}:a", f'"{text}"')
        relay.publish("a", "fine")
        self.assertEqual(await self.get(subscription), "fine")
        self.assertEqual(self.heard("relay.unreadable"), 3)
        self.assertEqual(subscription.gaps, 0)

    async def test_it_comes_back_after_redis_was_killed_and_counts_the_gap(self) -> None:
        relay = self.relay(tracer=self.spans)
        early, unused = relay.subscribe("a"), Relay[int]().subscribe("a")
        await relay.settle()
        for gaps in (1, 2):
            self.redis.kill()
            await until(lambda: relay._down)
            late = relay.subscribe("b")
            with self.assertRaisesRegex(
                StarioError, r"'a' is not published: .* be reached: \w+Error: "
            ):
                relay.publish("a", "nobody hears this")
            self.redis.start()
            await until(lambda gaps=gaps: early.gaps == gaps)  # type: ignore[misc]
            self.assertEqual(late.gaps, 1)  # of the outage in which it was made
            relay.publish("a", gaps)
            relay.publish("b", gaps)
            self.assertEqual((await self.get(early), await self.get(late)), (gaps, gaps))
            self.assertEqual(self.heard("relay.lost"), gaps)
            self.assertEqual(self.heard("relay.back"), gaps)
        self.assertEqual(unused.gaps, 0)

    async def test_messages_wait_for_redis_up_to_a_bound_and_in_order(self) -> None:
        self.redis.kill()
        relay = self.relay(queue=3, tracer=self.spans)
        subscription = relay.subscribe("a")
        await until(lambda: relay._down)
        for number in range(3):
            relay.publish("a", number)
        with self.assertRaisesRegex(StarioError, "3 messages wait"):
            relay.publish("a", 3)
        self.redis.start()
        self.assertEqual([await self.get(subscription) for _ in range(3)], [0, 1, 2])
        relay.publish("a", 4)
        self.assertEqual(await self.get(subscription), 4)

    async def test_the_gap_is_counted_before_the_next_message_comes(self) -> None:
        relay = self.relay(queue=3)
        subscription = relay.subscribe("a")
        await relay.settle()
        self.redis.kill()
        await until(lambda: relay._down)
        relay.publish("a", 1)
        seen: list[int] = []
        with mock.patch.object(relay, "_deliver_payload", lambda *_: seen.append(relay._gaps)):
            self.redis.start()
            await until(lambda: seen)
        self.assertEqual((seen, subscription.gaps), ([1], 1))

    async def test_a_connection_that_is_cut_is_made_again(self) -> None:
        relay = self.relay()
        subscription = relay.subscribe("a.*")
        await relay.settle()
        for gaps in (1, 2):
            self.redis.tell("CLIENT", "KILL", "TYPE", "pubsub")
            await until(lambda gaps=gaps: subscription.gaps == gaps)  # type: ignore[misc]
            relay.publish("a.b", gaps)
            self.assertEqual(await self.get(subscription), gaps)

    async def test_a_redis_that_hangs_counts_as_gone_and_a_short_pause_loses_nothing(self) -> None:
        relay, patient = self.relay(timeout=0.2), self.relay()
        subscription, other = relay.subscribe("a"), patient.subscribe("a")
        await relay.settle()
        await patient.settle()
        self.redis.signal(signal.SIGSTOP)
        patient.publish("a", 1)
        await until(lambda: relay._down)
        with self.assertRaises(StarioError):
            relay.publish("a", 2)
        self.redis.signal(signal.SIGCONT)
        self.assertEqual(await self.get(other), 1)
        await until(lambda: subscription.gaps == 1)
        relay.publish("a", 3)
        self.assertEqual((await self.get(subscription), await self.get(other)), (3, 3))
        self.assertEqual(other.gaps, 0)

    async def test_what_a_lost_connection_had_to_send_does_not_come_after_newer_messages(
        self,
    ) -> None:
        relay, patient = self.relay(timeout=0.3, queue=1000), self.relay(timeout=30)
        subscription = patient.subscribe("*", maxsize=10**6)
        await patient.settle()
        await relay.settle()
        self.redis.signal(signal.SIGSTOP)
        self.addCleanup(self.redis.signal, signal.SIGCONT)
        for number in range(300):  # more than the sockets hold
            relay.publish("a", [number, "x" * 50_000])
        await until(lambda: relay._down)
        self.redis.signal(signal.SIGCONT)

        async def publish_newer() -> None:  # (on a busy machine it may be lost again)
            for number in itertools.count(300):
                with suppress(StarioError):
                    relay.publish("a", [number, ""])
                await asyncio.sleep(0.005)

        publishing = asyncio.create_task(publish_newer())
        heard: list[int] = []
        while sum(number > 300 for number in heard) < 20:
            heard.append((await self.get(subscription))[0])
        publishing.cancel()
        self.assertEqual(heard, sorted(heard))

    async def test_closing_sends_all_of_a_large_message(self) -> None:
        relay, other = self.relay(), self.relay()
        subscription = other.subscribe("a")
        await other.settle()
        relay.publish("a", "x" * 8_000_000)
        relay.close()
        self.assertEqual(len(await self.get(subscription)), 8_000_000)

    async def test_closing_waits_until_redis_has_read_all(self) -> None:
        other = self.relay()
        subscription = other.subscribe("a", maxsize=10**6)
        await other.settle()
        for _ in range(5):
            relay = self.relay()
            own = relay.subscribe("a", maxsize=10**6)  # its answers are unread as it closes
            await relay.settle()
            for number in range(400):
                relay.publish("a", [number, "x" * 30_000])
            relay.close()
            heard = [(await self.get(subscription))[0] for _ in range(400)]
            self.assertEqual(heard, list(range(400)))
            self.assertTrue(own.closed)

    async def test_what_waits_for_a_redis_that_hangs_is_bounded_by_its_bytes(self) -> None:
        relay, small = self.relay(timeout=60), self.relay(timeout=60)
        subscription = small.subscribe("a", maxsize=10**6)
        await relay.settle()
        await small.settle()
        self.redis.signal(signal.SIGSTOP)
        self.addCleanup(self.redis.signal, signal.SIGCONT)
        for number in range(12_000):
            small.publish("a", number)
        sent = 0
        with self.assertRaisesRegex(StarioError, "'b' is not published: it is overrun, "):
            while sent < 200:  # of a million bytes each
                relay.publish("b", "x" * 1_000_000)
                sent += 1
                await asyncio.sleep(0.001)  # (the thread takes some)
        self.redis.signal(signal.SIGCONT)
        self.assertEqual([await self.get(subscription) for _ in range(12_000)], [*range(12_000)])

    async def test_a_silent_redis_that_answers_is_not_given_up(self) -> None:
        relay = self.relay(timeout=0.4)
        subscription = relay.subscribe("a")
        await relay.settle()
        asked = self.redis.tell("INFO", "commandstats").count("cmdstat_ping:calls")
        await asyncio.sleep(1)
        self.assertIn("cmdstat_ping:calls", self.redis.tell("INFO", "commandstats"), asked)
        self.assertEqual(subscription.gaps, 0)

    async def test_several_loops_share_it(self) -> None:
        relay = self.relay()
        ready = threading.Barrier(3)

        async def listen() -> Any:
            subscription = relay.subscribe("a")
            ready.wait()
            return await self.get(subscription)

        threads = [asyncio.to_thread(asyncio.run, listen()) for _ in range(2)]
        heard = asyncio.gather(*threads)
        await asyncio.to_thread(ready.wait)
        relay.publish("a", 7)
        self.assertEqual(await within(heard), [7, 7])

    async def test_closing_sends_what_waits_and_ends_its_subscriptions(self) -> None:
        relay, other = self.relay(), self.relay()
        there, here = other.subscribe("a"), relay.subscribe("b")
        await other.settle()
        reader = asyncio.create_task(received_until_closed(here))
        await relay.settle()
        for number in range(100):
            relay.publish("a", number)
        relay.close()
        self.assertEqual([await self.get(there) for _ in range(100)], list(range(100)))
        self.assertEqual(await within(reader), [])
        with self.assertRaisesRegex(StarioError, "closed"):
            relay.publish("a", 1)
        self.assertEqual(await within(received_until_closed(relay.subscribe("a", "b.*"))), [])
        self.assertTrue(is_empty(relay))

    async def test_a_program_ends_at_once_whether_redis_is_there_or_not(self) -> None:
        code = f"""
            from stario import RedisRelay, StarioError
            relay = RedisRelay("{self.redis.url}", prefix="{self.id()}:")
            kept = relay.subscribe("a")
            try:
                relay.publish("last words", 1)
            except StarioError:  # it knows already that Redis is not there
                pass
        """
        listener = self.relay()
        subscription = listener.subscribe("last words")
        await listener.settle()
        process = await run_python(code)
        self.assertEqual(await within(process.wait()), 0)
        self.assertEqual(await self.get(subscription), 1)
        self.redis.kill()
        process = await run_python(code)
        self.assertEqual(await within(process.wait()), 0)

    @unittest.skipUnless(hasattr(os, "fork"), "needs fork")
    async def test_a_forked_process_has_a_connection_of_its_own(self) -> None:
        code = f"""
            import asyncio, os, threading
            from stario import RedisRelay
            relay = RedisRelay("{self.redis.url}", prefix="{self.id()}:")
            inherited = relay.subscribe("both")

            async def hear(subscription):
                return (await anext(subscription))[1]

            relay.publish("both", "first")
            assert asyncio.run(hear(inherited)) == "first"

            def change():  # what another thread may be in the middle of
                with relay._lock:
                    relay._is_changing = True
                    changing.set()
                    forked.wait()
                    relay._is_changing = False

            changing, forked = threading.Event(), threading.Event()
            threading.Thread(target=change).start()
            changing.wait()
            child = os.fork()
            forked.set()
            own = relay.subscribe("own")
            relay.publish("own", bool(child))
            assert asyncio.run(hear(own)) is bool(child)
            if not child:
                relay.publish("both", "of the child")
                assert asyncio.run(hear(inherited)) == "of the child"
                relay.close()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            assert asyncio.run(hear(inherited)) == "of the child"
            relay.publish("both", "of the parent")
        """
        listener = self.relay()
        subscription = listener.subscribe("both")
        await listener.settle()
        process = await run_python(code)
        self.assertEqual(await within(process.wait(), 20), 0)
        wanted = ["first", "of the child", "of the parent"]
        self.assertEqual([await self.get(subscription) for _ in wanted], wanted)

    async def test_who_comes_and_goes_while_redis_is_away_leaves_nothing(self) -> None:
        self.redis.kill()
        relay = self.relay(timeout=0.3)
        stays = relay.subscribe("stays.*")
        await until(lambda: relay._down)
        for number in range(1000):
            relay.subscribe(f"room.{number}").close()
        await until(lambda: not relay._changed)
        self.redis.start()
        await until(lambda: not relay._down)
        relay.publish("stays.1", 1)
        self.assertEqual(await self.get(stays), 1)
        self.assertNotIn("room", self.redis.tell("PUBSUB", "CHANNELS"))

    async def test_what_the_relay_needs_goes_before_the_options_of_a_url(self) -> None:
        options = ("decode_responses=True", "protocol=2", "socket_timeout=0.001")
        for option in (*options, "health_check_interval=1", "db=3", "retry_on_timeout=True"):
            with self.subTest(option):
                relay = stario.RedisRelay[Any](f"{self.redis.url}?{option}", prefix=self.id())
                subscription = relay.subscribe("é.*")
                relay.publish("é.1", "ü")
                self.assertEqual(await self.get(subscription), "ü")
                relay.close()

    def test_an_option_that_cannot_be_is_one_sentence(self) -> None:
        unset: Any = os.environ.get("NO_SUCH_VARIABLE")
        for url in ("localhost:6379", unset, ""):
            with self.assertRaisesRegex(StarioError, "RedisRelay: Redis URL must specify"):
                stario.RedisRelay(url)
        with self.assertRaisesRegex(StarioError, "RedisRelay: .*'colour'"):
            stario.RedisRelay("redis://localhost?colour=red")
        with self.assertRaisesRegex(StarioError, "timeout is in seconds and above 0, not 0"):
            stario.RedisRelay("redis://localhost", timeout=0)
        wrong: dict[str, Any]
        for wrong, wanted in (
            ({"timeout": None}, "timeout is in seconds and above 0, not None"),
            ({"queue": None}, "queue is a number of messages, not None"),
            ({"tracer": RichTracer}, "a tracer is needed, not <class"),
        ):
            with self.assertRaisesRegex(StarioError, f"^RedisRelay: {wanted}"):
                stario.RedisRelay("redis://localhost", **wrong)


class TestWithoutRedis(unittest.TestCase):
    def test_it_says_what_to_install(self) -> None:
        missing = mock.patch.dict(sys.modules, {"redis": None, "redis.asyncio": None})
        with missing, self.assertRaisesRegex(StarioError, "pip install redis$"):
            stario.RedisRelay("redis://localhost")


# -- 28. Reload


class TestReload(AsyncTest):
    """Part 28: a saved file restarts the app."""

    PROGRAM = """
        import asyncio
        from stario import Stario, h
        import words

        async def home(c, w):
            w.html(h.Html(h.Body(words.WORD)))

        async def main():
            app = Stario()
            app.get("/", home)
            await app.serve(port=PORT, reload=True)

        asyncio.run(main())
    """

    async def asyncSetUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        program = textwrap.dedent(self.PROGRAM).replace("PORT", str(self.port))
        (self.folder / "program.py").write_text(program)
        self.save("one")
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "program.py", cwd=self.folder,
            env={**os.environ, "PYTHONPATH": os.path.dirname(stario.__file__)},
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        self.addAsyncCleanup(self.end)

    async def end(self) -> None:
        if self.process.returncode is None:
            self.process.terminate()
        await within(self.process.communicate())

    def save(self, word: str, code: str = "") -> None:
        (self.folder / "words.py").write_text(f"WORD = {word!r}\n{code}")

    async def page(self) -> str:
        """The page; a connection is never refused once the program listens."""
        peer = await Peer.connect(self.port)
        try:
            return (await within(peer.get("/"), 20)).text  # type: ignore[no-any-return]
        finally:
            await peer.close()

    async def listening(self) -> None:
        await until_listening(self.port)

    async def shows(self, word: str) -> None:
        async def ask() -> None:
            while f"<body>{word}</body>" not in await self.page():
                await asyncio.sleep(0.02)

        await within(ask(), 20)

    async def stderr(self, part: str) -> None:
        async def read() -> None:
            assert self.process.stderr
            while part not in (await self.process.stderr.readline()).decode():
                pass

        await within(read(), 20)

    async def test_a_saved_file_restarts_the_app_and_no_connection_is_refused(self) -> None:
        await self.listening()
        await self.shows("one")
        for word in ("two", "three"):
            self.save(word)
            await self.shows(word)
        (self.folder / "later").mkdir()  # a folder that was not there
        (self.folder / "later" / "more.py").write_text("WORD = 'four'")
        (self.folder / "words.py").write_text("from later.more import WORD")
        await self.shows("four")
        (self.folder / "later" / "more.py").write_text("WORD = 'five'")
        await self.shows("five")

    async def test_what_the_app_itself_may_write_is_not_watched(self) -> None:
        for name in ("notes.json", "notes.db", "app.log"):
            (self.folder / name).write_text("{}")
        watched = {Path(path).name for path in stario._times({str(self.folder)})}
        self.assertEqual(watched, {"program.py", "words.py"})

    def test_a_child_that_ends_as_soon_as_it_is_told_to_is_started_anew(self) -> None:
        started: list[Child] = []

        class Child(mock.Mock):
            """The second one ends by itself."""

            status: int | None = None

            def poll(self) -> int | None:
                return 0 if self is not started[0] else self.status

            def terminate(self) -> None:
                self.status = 0

            wait = poll

        def start(*arguments: object, **options: object) -> Child:
            started.append(Child())
            return started[-1]

        with (
            mock.patch.object(subprocess, "Popen", start),
            mock.patch.object(signal, "signal"),
            mock.patch.object(stario, "_LOOK_EVERY", 0),
            mock.patch.object(stario, "_times", side_effect=[{}, {"a.css": 1}, {}]),
            mock.patch("sys.stderr", io.StringIO()) as told,
        ):
            self.assertEqual(stario._keep_restarting([]), 0)
        self.assertEqual((len(started), told.getvalue()), (2, "reloading: a.css\n"))

    def test_a_signal_is_passed_on_before_the_next_look_at_the_files(self) -> None:
        """A terminal gives it to the children, too, and what they get later is a second one."""
        child = mock.Mock()
        child.poll = lambda: signal.raise_signal(signal.SIGTERM)
        child.wait.return_value = 3
        for number in (signal.SIGINT, signal.SIGTERM):
            self.addCleanup(signal.signal, number, signal.getsignal(number))
        with (
            mock.patch.object(subprocess, "Popen", return_value=child),
            mock.patch.object(stario, "_LOOK_EVERY", 60),
            mock.patch.object(stario, "_times", side_effect=[{}]),
            mock.patch.object(time, "sleep", side_effect=AssertionError("a signal waits for it")),
        ):
            self.assertEqual(stario._keep_restarting([]), 3)
        child.terminate.assert_called_once_with()

    async def test_what_cannot_start_is_shown_and_waited_out_and_nobody_is_refused(self) -> None:
        await self.listening()
        await self.shows("one")
        self.save("two", "def broken(:")
        await self.stderr("SyntaxError")
        self.assertIn("one", await self.page())
        self.save("two", "1 / 0")
        await self.stderr("ZeroDivisionError")
        waiting = asyncio.create_task(self.page())
        self.save("three")
        self.assertIn("three", await within(waiting, 20))

    async def test_a_page_hears_of_the_next_version_and_a_signal_ends_parent_and_child(
        self,
    ) -> None:
        await self.listening()
        page = await self.page()
        script = re.search(r'<script type="module" src="(/_stario/reload.js\?(\d+))">', page)
        assert script
        peer = await Peer.connect(self.port)
        self.assertIn("EventSource", (await within(peer.get(script[1]))).text)

        async def version() -> str:
            stream = await Peer.connect(self.port)
            await stream.send("GET /_stario/reload HTTP/1.1\r\nHost: test\r\n\r\n")
            await within(stream.head(), 20)
            event = (await within(stream.chunk(), 20)).decode()
            self.assertIn("retry: 200\n", event)
            await stream.close()
            return event.partition("data: ")[2].strip()  # type: ignore[no-any-return]

        self.assertEqual(await version(), script[2])
        self.save("two")
        await self.shows("two")
        self.assertNotEqual(await version(), script[2])
        await peer.close()
        await self.check_that_a_second_one_is_refused_and_a_signal_ends_the_first()

    async def test_a_child_ends_with_its_parent_even_if_that_is_killed(self) -> None:
        await self.listening()
        peer = await Peer.connect(self.port)
        page = (await within(peer.get("/"), 20)).text
        version = re.search(r"reload.js\?(\d+)", page)
        assert version

        def kill_child() -> None:
            with suppress(ProcessLookupError):
                os.kill(int(version[1]), signal.SIGKILL)

        self.addCleanup(kill_child)
        self.process.kill()
        self.assertEqual(await within(peer.rest(), 20), b"")
        await peer.close()

    async def check_that_a_second_one_is_refused_and_a_signal_ends_the_first(self) -> None:
        second = await asyncio.create_subprocess_exec(
            sys.executable, "program.py", cwd=self.folder,
            env={**os.environ, "PYTHONPATH": os.path.dirname(stario.__file__)},
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        _, said = await within(second.communicate())
        self.assertRegex(said.decode(), r"^stario: cannot listen on .*the port is taken")
        self.process.send_signal(signal.SIGINT)
        await within(self.process.wait())
        with self.assertRaises(ConnectionRefusedError):
            await Peer.connect(self.port)


# -- 29. Development


def _open_files() -> int:
    """How many descriptors this process has open; on a system without /proc always 0."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0


HERE = Path(__file__).parent
README = Path(__file__).with_name("README.md")
EXCERPT = "# tiles_app.py\n"

# Runs a program with `app.serve()` for one request to "/", on a port of its own.
SERVE_ONCE = """
import asyncio, stario

async def once(app, *arguments, **options):
    async with app.running(port=0) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET / HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        assert answer.startswith(b"HTTP/1.1 200 "), answer

stario.Stario.serve = once
"""


class TestDevelopment(AsyncTest):
    """Part 29: what went wrong, shown where one looks; and nowhere else."""

    def app(self, *, debug: bool) -> Stario:
        async def broken(c: Context, w: Writer) -> None:
            rows, password = ["<b>one</b>"], "".join(["ge", "heim"])
            c("looked up", {"rows": len(rows)})
            w.text(rows[len(password)])

        async def stream(c: Context, w: Writer) -> None:
            w.patch(h.P({"id": "p"}))
            raise ValueError("in the middle")

        async def gone(c: Context, w: Writer) -> None:
            raise HttpException(404, "no such room")

        async def deep(c: Context, w: Writer) -> None:
            try:
                self.descend()
            except RecursionError as exc:
                raise ValueError("at the bottom") from exc

        app = Stario(Spans())
        app.debug = debug
        app.get("/deep", deep)
        app.get("/", broken)
        app.get("/stream", stream)
        app.get("/gone", gone)
        return app

    async def test_an_error_is_a_page_with_the_own_frames_first_and_their_values(self) -> None:
        async with connected(self.app(debug=True)) as peer:
            answer = await peer.get("/?a=1", Authorization="Basic Zm9v")
        self.assertEqual(answer.status, 500)
        text = html.unescape(answer.text)
        self.assertIn("IndexError: list index out of range", text)
        self.assertRegex(text, r"<mark> *\d+ +w\.text\(rows\[len\(password\)\]\)\n</mark>")
        self.assertIn("<title>IndexError</title>", text)
        self.assertIn('<meta name="viewport"', text)
        self.assertIn("rows = ['<b>one</b>']", text)
        self.assertNotIn("<b>one</b>", answer.text)  # values are text
        self.assertIn("<details><summary>Traceback</summary>", text)  # it has nothing more to say
        self.assertLess(text.index("in broken"), text.index("/stario.py, line"))
        self.assertIn("GET / a=1", text)
        self.assertIn("looked up {'rows': 1}", text)
        self.assertNotIn("geheim", text)
        self.assertNotIn("Zm9v", text)

    def descend(self) -> None:
        self.descend()

    async def test_what_an_error_came_from_is_shown_and_a_thousand_frames_are_not(self) -> None:
        async with connected(self.app(debug=True)) as peer:
            text = html.unescape((await peer.get("/deep")).text)
        self.assertIn("ValueError: at the bottom</h1>", text)
        self.assertIn("<details open><summary>Traceback</summary>", text)
        self.assertIn("RecursionError: maximum recursion depth exceeded", text)
        self.assertIn("[Previous line repeated", text)
        self.assertLess(text.count("<summary>"), 50)

    async def test_a_request_that_cannot_be_read_does_not_hide_the_error(self) -> None:
        fields = {"Forwarded": "for=1.1.1.1", "X_Forwarded_For": "2.2.2.2"}  # who is it?
        for debug, shown in ((True, "IndexError"), (False, "Internal Server Error")):
            app = self.app(debug=debug)
            async with connected(app, trusted_proxies=["127.0.0.1"]) as peer:
                answer = await peer.get("/", **fields)
                self.assertEqual((answer.status, shown in answer.text), (500, True))

    async def test_to_datastar_it_is_a_patch_over_the_page_in_a_stream_too(self) -> None:
        async with connected(self.app(debug=True)) as peer:
            for path in ("/", "/stream"):
                answer = await peer.get(path, Datastar_Request="true")
                with self.subTest(path):
                    self.assertEqual(answer.status, 200)
                    self.assertIn("data: selector body\ndata: mode append\n", answer.text)
                    self.assertIn('id="stario-error"', answer.text)

    async def test_a_secret_inside_of_a_value_is_not_shown(self) -> None:
        @dataclasses.dataclass
        class User:
            api_key: str

        async def broken(c: Context, w: Writer) -> None:
            secret = "ge" + "heim"
            row, user = {"name": "Ada", "password": secret}, [User(secret)]
            c("found", {"row": row})
            raise KeyError(len(row) + len(user))

        app = self.app(debug=True)
        app.get("/secret", broken)
        async with connected(app) as peer:
            text = html.unescape((await peer.get("/secret")).text)
        self.assertIn("row = (hidden)", text)
        self.assertIn("user = (hidden)", text)
        self.assertNotIn("geheim", text)

    async def test_an_answer_that_is_raised_is_no_error(self) -> None:
        async with connected(self.app(debug=True)) as peer:
            self.assertEqual((await peer.get("/gone")).text, "no such room")

    async def test_without_debug_nothing_of_it_leaves_the_server(self) -> None:
        async with connected(self.app(debug=False)) as peer:
            answer = await peer.get("/")
            self.assertEqual((answer.status, answer.text), (500, "Internal Server Error"))

    async def test_a_handler_that_blocks_the_loop_is_named_with_its_line(self) -> None:
        program = """if True:
            import asyncio, os, sys, time
            from stario import Stario
            sys.stderr = sys.stdout
            async def slow(c, w):
                time.sleep(0.4)  # line 6
                w.text("done")

            async def main():
                app = Stario()
                app.get("/", slow)
                app.lifespan(client)
                await app.serve(port=0, sock=listening, debug=True)

            import socket, contextlib
            listening = socket.create_server(("127.0.0.1", 0))

            @contextlib.asynccontextmanager
            async def client(app):
                async def ask():
                    reader, writer = await asyncio.open_connection(*listening.getsockname())
                    writer.write(b"GET / HTTP/1.1\\r\\nHost: a\\r\\nConnection: close\\r\\n\\r\\n")
                    await reader.read()
                    os.kill(os.getpid(), 15)
                app.background(ask())
                yield

            asyncio.run(main())
        """
        process = await run_python(program)
        stdout, _ = await within(process.communicate(), 20)
        self.assertRegex(stdout.decode(), r"blocked for over 100 ms at <string>:6 in slow")

    async def test_the_line_that_runs_the_loop_is_not_blamed_for_a_slow_machine(self) -> None:
        started: list[Any] = []
        asyncio.get_running_loop().call_soon(lambda: started.append(stario._Watchdog()))
        await asyncio.sleep(0)
        here = outermost = sys._getframe()
        while outermost.f_back:
            outermost = outermost.f_back
        for frame, told in ((here, "blocked for over 100 ms"), (outermost, "")):
            with contextlib.redirect_stderr(io.StringIO()) as stderr:
                started[0]._tell(frame)
            self.assertIn(told, stderr.getvalue())
            self.assertEqual(bool(told), bool(stderr.getvalue()))

    async def test_what_a_handler_returns_is_noted(self) -> None:
        async def returns(c: Context, w: Writer) -> Any:
            w.empty()
            return {"like": "FastAPI"}

        spans = Spans()
        app = Stario(spans)
        app.get("/", returns)
        async with connected(app) as peer:
            await peer.get("/")
        self.assertIn("ignored", [event.name for span in spans.ended for event in span.events])


# -- 30. What is refused


class TestAddresses(AsyncTest):
    """Part 30: an address leads to the route that it was made of, or it is refused."""

    def app(self) -> Stario:
        async def page(c: Context, w: Writer) -> None:
            w.json([c.req.params, c.req.tail])

        async def file(c: Context, w: Writer) -> None: ...

        async def tree(c: Context, w: Writer) -> None:
            w.json(c.req.tail)

        async def plain(c: Context, w: Writer) -> None: ...

        app = Stario()
        app.get("/u/{x}/{n:int}", page)
        app.get("/f/*", file)
        app.get("/*", tree)
        app.get("/a%2Fb c/ü%3F", plain)
        return app

    async def test_they_lead_back(self) -> None:
        app = self.app()
        self.assertEqual(app.url("plain"), "/a%2Fb%20c/%C3%BC%3F")
        self.assertEqual(app.url("page", x=Size.LARGE, n=-7), "/u/l/-7")
        self.assertEqual(app.url("file", tail="a/...//b%"), "/f/a/...//b%25")
        self.assertEqual(app.url("file"), "/f/")
        async with TestClient(app) as client:
            for text in ("a/../b", "..a", "%2F", "/", "\\", "?#;=&", "ü", " ", "a\0"):
                with self.subTest(text):
                    answer = await client.get(app.url("page", x=text, n=1))
                    self.assertEqual(answer.json(), [{"x": text, "n": 1}, ""])
            for text in ("a//b", "\\evil.example", "a/%2e%2e/b", "ü?", ""):
                with self.subTest(text):
                    answer = await client.get(app.url("tree", tail=text))
                    self.assertEqual(answer.json(), text)

    def test_what_would_lead_elsewhere_is_refused(self) -> None:
        wrong: list[tuple[str, dict[str, object]]] = [
            ("page", {"x": None, "n": 1}), ("page", {"x": b"x", "n": 1}),
            ("page", {"x": "..", "n": 1}), ("page", {"x": ".", "n": 1}),
            ("page", {"x": ["a"], "n": 1}), ("page", {"x": {"a": 1}, "n": 1}),
            ("page", {"x": "a", "n": True}), ("page", {"x": "a", "n": 1.5}),
            ("file", {"tail": None}), ("file", {"tail": "../x"}), ("file", {"tail": "a/./b"}),
            ("tree", {"tail": "/evil.example"}), ("plain", {"tail": ""}),
        ]  # fmt: skip
        for name, params in wrong:
            with self.subTest(name, **params), self.assertRaises(StarioError):
                self.app().url(name, **params)


class TestHosts(AsyncTest):
    """Part 30: routers for one host."""

    async def test_a_pattern_means_the_host_that_browsers_send(self) -> None:
        async def show(c: Context, w: Writer) -> None:
            w.json(c.req.subhost)

        for pattern, host, taken in (
            ("bücher.example", "xn--bcher-kva.example", ""),
            ("*.BÜCHER.example.", "a.xn--bcher-kva.example.:80", "a"),
            ("my_app", "MY_APP", ""), ("[::1]", "[::1]:8000", ""), ("127.0.0.1", "127.0.0.1", ""),
            ("*.example", "a..example", None), ("*.example", ".example", None),
        ):  # fmt: skip
            router, app = Router(), Stario()
            router.get("/", show)
            app.host(pattern, router)
            async with TestClient(app) as client:
                with self.subTest(pattern, host=host):
                    answer = await client.get("/", headers={"host": host})
                    self.assertEqual(answer.json() if answer.status == 200 else None, taken)

    def test_what_no_browser_sends_is_refused(self) -> None:
        for pattern in (
            "localhost:8000", "https://a.example", "a.example/x", "", "*", "*.", "a b", "a..b",
            "*.*.b", "x" * 64,
        ):  # fmt: skip
            with self.subTest(pattern), self.assertRaisesRegex(StarioError, "without scheme, port"):
                Stario().host(pattern, Router())

    async def test_two_routers_for_one_host_are_one(self) -> None:
        app, one, two, three = Stario(), Router(), Router(), Router()
        one.get("/1", _fine)
        two.get("/2", _fine)
        three.get("/2", _fine)
        app.host("a.example", one)
        app.host("A.example.", two)
        self.assertRaises(StarioError, app.url, "_fine")  # it has two paths there
        app.get("/own", _fine)
        self.assertEqual(app.url("_fine"), "/own")
        with self.assertRaisesRegex(StarioError, "cannot be told apart"):
            app.host("a.example", three)
        async with TestClient(app) as client:
            for path in ("/1", "/2"):
                answer = await client.get(path, headers={"host": "a.example"})
                self.assertEqual(answer.status, 204)

    def test_what_would_have_no_effect_is_refused(self) -> None:
        router, app = Router(), Stario()
        app.mount("/x", router)
        self.assertRaises(StarioError, app.mount, "/itself", app)
        app.get("/later", _fine)  # nothing has come of that attempt
        with self.assertRaisesRegex(StarioError, "mounted already"):
            router.on_error(KeyError, lambda c, w, exc: None)
        with self.assertRaisesRegex(StarioError, "mounted already"):
            router.use(lambda handler: handler)
        lived, worker = Stario(), Stario()
        lived.lifespan(lambda app: contextlib.nullcontext())
        work = asyncio.sleep(0)
        worker.background(work)
        for other in (lived, worker):
            with self.assertRaisesRegex(StarioError, "the app that is served"):
                app.mount("/other", other)
        work.close()
        app.mount("/routes", Stario())
        hosted = Router()
        hosted.get("/", _fine)
        app.host("a.example", hosted)
        with self.assertRaisesRegex(StarioError, "before the routes"):
            app.use(lambda handler: handler)
        outer = Router()
        outer.mount("/in", app)  # its routes for hosts, too
        with self.assertRaisesRegex(StarioError, "a.example cannot be for b.example, too"):
            Stario().host("b.example", outer)
        app = Stario()
        for method in ("", "GET POST", "GET,POST", "G\tT", "/"):
            with self.subTest(method), self.assertRaisesRegex(StarioError, "one method"):
                app.handle(method, "/", _fine)


class TestSameOrigin(HttpTest):
    async def test_what_other_sites_send_is_refused(self) -> None:
        """Fetch Metadata, and RFC 6454, section 7, for older browsers."""

        async def done(c: Context, w: Writer) -> None:
            w.text("done")

        app = Stario()
        app.use(same_origin)
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
            app.handle(method, "/", done)
        table: list[tuple[str, dict[str, str], int]] = [
            ("GET", {"Sec_Fetch_Site": "cross-site"}, 200),
            ("HEAD", {"Origin": "https://evil.example"}, 200),
            ("POST", {}, 200),
            ("POST", {"Sec_Fetch_Site": "same-origin"}, 200),
            ("POST", {"Sec_Fetch_Site": "none"}, 200),
            ("POST", {"Sec_Fetch_Site": "same-site"}, 403),
            ("POST", {"Sec_Fetch_Site": "cross-site"}, 403),
            ("POST", {"Sec_Fetch_Site": "cross-site", "Origin": "http://test"}, 403),
            ("POST", {"Sec_Fetch_Site": ""}, 403),
            ("PUT", {"Origin": "https://evil.example"}, 403),
            ("PATCH", {"Origin": "https://test.evil.example"}, 403),
            ("DELETE", {"Origin": "null"}, 403),
            ("POST", {"Origin": "http://test:81"}, 403),
            ("POST", {"Origin": "http://TEST"}, 200),
        ]
        async with connected(app) as peer:
            for method, fields, status in table:
                with self.subTest(method, **fields):
                    self.assertEqual((await within(peer.get("/", method, **fields))).status, status)


# -- 31. The pocket client, and the official one


CHROMIUM = os.environ.get("STARIO_CHROMIUM", "/usr/bin/chromium")
WAIT = 3000  # milliseconds until an expression must have its value
OFFICIAL_CLIENT = os.environ.get("STARIO_OFFICIAL_CLIENT", "")


# ---- A stage: pages, answers in the order they are given out, and a record of what was asked ----


@dataclass
class Reply:
    """What the server gives for one request: then it ends, breaks off, or holds the line."""

    body: str | bytes = ""
    type: str = "text/event-stream"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    then: Literal["end", "break", "hold"] = "end"


@dataclass
class Asked:
    """A request as the server saw it."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: str

    @property
    def signals(self) -> Any:
        """The signals it brought, from wherever its method puts them."""
        return json.loads(self.query["datastar"] if self.method in ("GET", "DELETE") else self.body)


class Stage:
    """The server side of a browser test. Its methods may be called from any thread."""

    def __init__(self, client: bytes) -> None:
        self.client = client
        self.pages: dict[str, str] = {}
        self.answers: dict[str, list[Reply]] = {}
        self.asked: list[Asked] = []
        self.gone: list[str] = []
        self.news = threading.Condition()

    def answer(
        self, method: str, path: str, query: dict[str, str], headers: dict[str, str], body: bytes
    ) -> Reply:
        """Chooses the answer, and keeps a record. The last answer for a path is repeated."""
        if path == "/client.js":
            return Reply(self.client, "text/javascript")
        if path in self.pages:
            return Reply(self.pages[path], "text/html; charset=utf-8")
        if path == "/favicon.ico":
            return Reply(status=204)
        with self.news:
            self.asked.append(Asked(method, path, query, headers, body.decode("utf-8", "replace")))
            self.news.notify_all()
            answers = self.answers.get(path) or [Reply(status=204)]
            return answers.pop(0) if len(answers) > 1 else answers[0]

    def left(self, path: str) -> None:
        """The client has gone from an answer that holds the line."""
        with self.news:
            self.gone.append(path)
            self.news.notify_all()

    def requests(self, path: str, count: int = 1) -> list[Asked]:
        """Waits for so many requests of a path, and gives all that came."""

        def found() -> list[Asked]:
            return [asked for asked in self.asked if asked.path == path]

        self.wait_for(lambda: len(found()) >= count, f"{count} requests of {path}")
        return found()

    def wait_for(self, true: Callable[[], bool], what: str, within: float = 5.0) -> None:
        """Waits until something is true of what was asked or who has gone."""
        with self.news:
            if not self.news.wait_for(true, within):
                asked = [f"{each.method} {each.path}" for each in self.asked]
                raise AssertionError(
                    f"waited in vain for {what}; asked: {asked}; gone: {self.gone}"
                )


class StageServer:
    """Serves a stage with a stario app, in a thread that has a loop of its own."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.url = ""
        self._is_up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        self._is_up.wait(10)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        app = Stario()
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "QUERY"):
            app.handle(method, "/*", self._answer)
        async with app.running(port=0, graceful_timeout=0.5) as server:
            self.url = server.url
            self._is_up.set()
            await self._end.wait()

    async def _answer(self, c: Context, w: Writer) -> None:
        request = c.req
        reply = self.stage.answer(
            request.method,
            request.path,
            dict(request.query.items()),
            dict(request.headers.items()),
            await request.body(),
        )
        w.headers.update({"content-type": reply.type, **reply.headers})
        if reply.status == 204:
            w.empty()
            return
        body = reply.body.encode() if isinstance(reply.body, str) else reply.body
        if reply.then == "end":
            w.write_headers(reply.status).end(body)
            return
        w.write_headers(reply.status).write(body)
        if reply.then == "break":
            await w.drain()
            w._carrier.abort()
            return
        async for _ in w.alive():
            pass
        self.stage.left(request.path)


def patch_event(name: str, *data: str, **fields: str | int) -> str:
    """One server-sent event of Datastar's."""
    lines = [f"event: datastar-{name}", *(f"{key}: {value}" for key, value in fields.items())]
    return "\n".join([*lines, *(f"data: {line}" for line in data)]) + "\n\n"


def patch_elements(markup: str, *options: str) -> str:
    """A patch-elements event; every line of the markup becomes a line of its own."""
    lines = [f"elements {line}" for line in markup.split("\n")] if markup else []
    return patch_event("patch-elements", *options, *lines)


def patch_signals(patch: object, *options: str) -> str:
    """A patch-signals event."""
    return patch_event("patch-signals", *options, f"signals {json.dumps(patch)}")


# A mixin: by itself it is no test case, whatever a type checker is told.
if TYPE_CHECKING:
    _Case = unittest.TestCase
else:
    _Case = object

# ---- The promises -------------------------------------------------------------------------------

# What a page keeps for its test: the events on the document, in order.
NOTES = """<script>
window.fetches = []; window.patches = []; window.count = {}; window.made = [];
const note = (name) => (window.count[name] = (window.count[name] ?? 0) + 1);
const own = () => JSON.parse(document.getElementById('own').textContent);
document.addEventListener('datastar-fetch', (e) => fetches.push(e.detail.type));
document.addEventListener('datastar-ready', () => { window.isReady = true });
document.addEventListener('datastar-signal-patch', (e) => patches.push(structuredClone(
  JSON.parse(JSON.stringify(e.detail)))));
const byId = (id) => document.getElementById(id);
const type = (id, value, name = 'input') => {
  byId(id).value = value;
  byId(id).dispatchEvent(new Event(name, { bubbles: true }));
};
</script>"""

SAME = """([expression, wanted]) => {
  const sorted = (value) => Array.isArray(value) ? value.map(sorted)
    : value && typeof value === 'object'
    ? Object.fromEntries(Object.entries(value).sort().map(([k, v]) => [k, sorted(v)])) : value;
  try {
    const found = (0, eval)('(' + expression + ')');
    return JSON.stringify(sorted(found)) === JSON.stringify(sorted(wanted));
  } catch { return false }
}"""


POLICY = "default-src 'self'; script-src 'nonce-{nonce}'{more}; object-src 'none'; base-uri 'none'"


class ClientPromises(_Case):
    """Each test holds for both clients."""

    retries_send_todays_signals: ClassVar[bool]
    source: ClassVar[bytes]
    stage: ClassVar[Stage]
    server: ClassVar[StageServer]
    playwright: ClassVar[Playwright]
    browser: ClassVar[Browser]
    tab: ClassVar[Page]  # one for all tests that do not need their own: opening one takes long
    page: Page
    problems: list[str]
    expected_problems: list[str]

    @classmethod
    def setUpClass(cls) -> None:
        if sync_playwright is None or not Path(CHROMIUM).exists():
            raise unittest.SkipTest("Playwright or Chromium is not here")
        cls.source = cls.client_source()
        cls.stage = Stage(cls.source)
        cls.server = StageServer(cls.stage)
        cls.playwright = sync_playwright().start()
        cls.browser = cls.playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        cls.tab = cls.browser.new_page()

    @classmethod
    def tearDownClass(cls) -> None:
        cls.browser.close()
        cls.playwright.stop()
        cls.server.stop()

    @classmethod
    def client_source(cls) -> bytes:
        """The JavaScript that a page loads."""
        raise AssertionError("each class below says this")

    def setUp(self) -> None:
        self.problems = []
        self.expected_problems = []
        self.stage.pages.clear()
        self.stage.answers.clear()
        self.stage.asked.clear()
        self.stage.gone.clear()
        self.watch(self.tab)

    def watch(self, page: Page) -> None:
        self.page = page
        page.set_default_timeout(WAIT)
        page.on("pageerror", self.note_error)
        page.on("console", self.note_message)

    def tearDown(self) -> None:
        self.page.remove_listener("pageerror", self.note_error)
        self.page.remove_listener("console", self.note_message)
        if self.page is not self.tab:
            self.page.close()
        unexpected = [
            problem
            for problem in self.problems
            if not any(part in problem for part in self.expected_problems)
        ]
        assert not unexpected, unexpected

    def note_error(self, error: Any) -> None:
        self.problems.append(str(error))

    def note_message(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(message.text)

    def show(self, body: str, head: str = "", clock: bool = False) -> None:
        """Opens a page with the client. When it returns, the client has read the page.

        With `clock` the page's time stands still at 1000 ms, until the test moves it.
        """
        path = f"/page{len(self.stage.pages)}"
        self.stage.pages[path] = (
            f"<!doctype html><html><head><meta charset='utf-8'>{NOTES}{head}"
            f"<script type='module' src='/client.js'></script></head><body>{body}"
            "<pre id='own' data-json-signals></pre></body></html>"
        )
        if clock:
            self.watch(self.browser.new_page())
            self.page.clock.install(time=0)
            self.page.clock.pause_at(1)  # in seconds
        self.page.goto(self.server.url + path)
        if clock:
            self.page.clock.run_for(1)  # the client starts with a timer
        self.see("window.isReady", True)

    def do(self, script: str) -> Any:
        """Runs a script in the page."""
        return self.page.evaluate(script)

    def see(self, expression: str, wanted: Any) -> None:
        """Waits until an expression has the wanted value."""
        try:
            self.page.wait_for_function(SAME, arg=[expression, wanted], timeout=WAIT)
            return
        except PlaywrightError:
            pass  # the comparison below tells the difference
        self.now(expression, wanted)

    def now(self, expression: str, wanted: Any) -> None:
        """An expression has the wanted value at once."""
        found = self.page.evaluate(f"() => ({expression})")
        assert found == wanted, f"{expression}: {found!r} instead of {wanted!r}; {self.problems}"

    def answers(self, path: str, *answers: Reply | str) -> None:
        """Prepares what the server gives for a path, in order; the last one again and again."""
        self.stage.answers[path] = [
            Reply(answer) if isinstance(answer, str) else answer for answer in answers
        ]

    # -- signals and expressions

    def test_signals_come_from_objects_and_from_keys(self) -> None:
        self.show(
            """<div data-signals="{plain: 1, 'kebab-name': 2, deep: {er: {x: 3}}}"></div>
            <div data-signals="{list: [1, {a: 2}]}"></div>
            <div data-signals:foo-bar="'camel'" data-signals:a.b="4"></div>
            <div data-signals:foo-bar__case.kebab="5"></div>
            <i data-signals="{plain: 'not me', fresh: 6}" data-signals__ifmissing="{plain: 7}"></i>
            <div data-signals:late__ifmissing="8" data-signals:deep.er.y="9"></div>
            <div data-signals:line-1-of="10" data-signals:b2-c="11"></div>
            <div data-signals="{gone: 1}"></div><div data-signals="{gone: null}"></div>"""
        )
        self.see(
            "own()",
            {
                "plain": "not me",
                "kebab-name": 2,
                "deep": {"er": {"x": 3, "y": 9}},
                "list": [1, {"a": 2}],
                "fooBar": "camel",
                "a": {"b": 4},
                "foo-bar": 5,
                "fresh": 6,
                "line-1Of": 10,
                "b2C": 11,
                "late": 8,
            },
        )

    def test_ifmissing_keeps_what_is_there(self) -> None:
        self.show(
            """<div data-signals="{a: 1, b: {c: 2}}"></div>
            <div data-signals__ifmissing="{a: 5, b: {c: 6, d: 7}, e: 8}"></div>"""
        )
        self.see("own()", {"a": 1, "b": {"c": 2, "d": 7}, "e": 8})

    def test_an_unknown_signal_is_empty_text(self) -> None:
        self.show("""<p id="p" data-text="'<' + $nobody + '>'"></p><p data-init="$made = 1"></p>""")
        self.see("byId('p').textContent", "<>")
        self.see("own()", {"nobody": "", "made": 1})

    def test_expressions_know_names_paths_kebab_and_the_last_value(self) -> None:
        self.show(
            """<i data-signals="{a: 5, 'a-1': 7, n: {x: {y: 2}}, list: ['p', 'q'], t: 'Hi'}"></i>
            <p id="p1" data-text="$a-1"></p><p id="p2" data-text="$a -1"></p>
            <p id="p3" data-text="$n.x.y * 2"></p><p id="p4" data-text="const z = 3; z + $a"></p>
            <p id="p5" data-text="`${$t} ${`<${$a}>`} $a`"></p>
            <p id="p6" data-text="$t.toUpperCase() + $list.length + $list[1]"></p>
            <p id="p7" data-text="el.id"></p>
            <p id="p8" data-text="$t === 'Hi' ? 'yes; indeed' : 'no'"></p>
            <p id="p9" data-text="$a &gt; 4 &amp;&amp; 'more'"></p>
            <p id="p10" data-text="
              const f = (x) => { const y = x * 2; return y };
              f($a)
            "></p>"""
        )
        wanted = ["7", "4", "4", "8", "Hi <5> $a", "HI2q", "p7", "yes; indeed", "more", "10"]
        # The official client rewrites $a inside a template's text as well.
        self.see(
            "[1, 2, 3, 4, 6, 7, 8, 9, 10].map((n) => byId('p' + n).textContent)",
            wanted[:4] + wanted[5:],
        )
        self.see("byId('p5').textContent.startsWith('Hi <5>')", True)

    # -- a strict Content-Security-Policy (README, Recipes)

    def show_under(self, more: str, script_nonce: str | None = None) -> None:
        """Opens a page with a policy; a click on #go brings a script."""
        page = h.Html(
            {"data-nonce": "r4nd0m"},
            h.Head(datastar_script("/client.js", nonce="r4nd0m")),
            h.Body(
                data.signals({"n": 1}),
                h.P({"id": "sum"}, data.text("$n + 1"), data.style({"color": "'red'"})),
                h.Button({"id": "go"}, data.on("click", at.get("/go")), "go"),
                h.Img({"src": "data:,", "onerror": "document.body.dataset.evil = 1"}),
            ),
        )
        run = h.Script({"nonce": script_nonce or False}, "document.body.dataset.ran = 1")
        event = b"event: datastar-patch-elements\n%b\n" % stario._patch_data(run, "append", "body")
        policy = {"content-security-policy": POLICY.format(nonce="r4nd0m", more=more)}
        self.answers("/strict", Reply(page, "text/html; charset=utf-8", headers=policy))
        self.answers("/go", event.decode())
        self.expected_problems = [
            "Content Security Policy",
            "Content-Security-Policy",
            "unsafe-eval",
            "favicon",
        ]
        self.watch(self.browser.new_page())
        self.page.goto(self.server.url + "/strict")

    def test_a_strict_policy_with_unsafe_eval_is_enough(self) -> None:
        readme = Path(__file__).with_name("README.md").read_text("utf-8")
        self.assertIn(
            POLICY.format(nonce="{nonce}", more=" 'strict-dynamic' 'unsafe-eval'"),
            readme.replace('"\n        "', ""),  # it stands there in two strings
        )
        for more, nonce in (
            (" 'strict-dynamic' 'unsafe-eval'", None),
            (" 'unsafe-eval'", "r4nd0m"),
        ):
            self.show_under(more, nonce)
            self.page.locator("#sum", has_text="2").wait_for()
            self.now("document.getElementById('sum').style.color", "red")
            self.page.click("#go")
            self.page.wait_for_selector("body[data-ran]")
            self.now("document.body.dataset.evil ?? 'none'", "none")

    def test_a_policy_forbids_scripts_without_the_nonce_and_eval(self) -> None:
        self.show_under(" 'unsafe-eval'")
        self.page.locator("#sum", has_text="2").wait_for()
        with self.page.expect_console_message(lambda m: "Content Security Policy" in m.text):
            self.page.click("#go")
        self.now("document.body.dataset.ran ?? 'none'", "none")
        self.show_under(" 'strict-dynamic'")
        self.page.wait_for_load_state("networkidle")
        self.now("document.getElementById('sum').textContent", "")

    def test_hostile_text_comes_back_unchanged(self) -> None:
        texts = [
            "me@home(now)", "$user", "@get('/x')", "</script><script>count.hacked=1</script>",
            "it's \"quoted\" `so`", "back\\slash\\", "ends in \\", "a; b; c", "${$x}", "// no",
            "/* no",
            "line\nbreak\r\n", "\u2028\u2029", "\u00e4\u00f6\u20ac", "\U0001f600", "<b>&amp;</b>",
            "\x00\x01",
            "'); alert(1); ('", "__proto__", "constructor", "", " ", "$", "@", "\\u0024",
        ]  # fmt: skip
        self.answers("/echo")
        literal = html.escape(hostile(texts))
        self.show(
            f"""<div data-signals="{{texts: {literal}}}"></div>
            <p id="p" data-text="{html.escape(hostile("; $a @b() " + texts[0]))}"></p>
            <button id="b" data-on:click="@post('/echo', {{payload: {literal}}})"></button>
            <button id="c" data-on:click="@get('/echo')"></button>"""
        )
        self.see("own().texts", texts)
        self.now("byId('p').textContent", "; $a @b() " + texts[0])
        self.do("byId('b').click()")
        self.assertEqual(json.loads(self.stage.requests("/echo")[0].body), texts)
        self.do("byId('c').click()")
        self.assertEqual(self.stage.requests("/echo", 2)[1].signals, {"texts": texts})
        self.now("count", {})

    def test_writes_in_one_handler_are_one_change(self) -> None:
        self.show(
            """<div data-signals="{a: 0, b: 0}"></div>
            <div data-effect="made.push([$a, $b])"></div>
            <button id="b" data-on:click="$a = 1; $b = 2; $a = 3"></button>"""
        )
        self.do("patches.length = 0, byId('b').click()")
        self.see("made", [[0, 0], [3, 2]])
        self.see("patches", [{"a": 3, "b": 2}])
        self.do("byId('b').click()")
        self.do("byId('b').click()")
        self.see("made.at(-1)", [3, 2])

    def test_lists_are_watched_inside(self) -> None:
        self.show(
            """<div data-signals="{list: [{n: 1}, {n: 2}]}"></div>
            <p id="p" data-text="$list.map((each) => each.n).join()"></p>
            <b id="b" data-on:click="$list.push({n: 3})"></b>
            <b id="c" data-on:click="$list[0].n = 9"></b>
            <b id="d" data-on:click="$list = $list.filter((each) => each.n !== 2)"></b>
            <input id="i" data-bind="list.0.n">"""
        )
        self.see("byId('i').value", "1")
        for button, wanted in {"b": "1,2,3", "c": "9,2,3", "d": "9,3"}.items():
            self.do(f"byId('{button}').click()")
            self.see("byId('p').textContent", wanted)
        self.see("byId('i').value", "9")

    def test_a_copy_follows_what_it_was_made_of(self) -> None:
        self.show(
            """<i data-signals="{deep: {x: 1}}"></i><i data-effect="$copy = $deep"></i>
            <b id="b" data-on:click="$deep.x = 5"></b>"""
        )
        self.do("byId('b').click()")
        self.see("own()", {"deep": {"x": 5}, "copy": {"x": 5}})

    # -- attributes that show signals

    def test_text_shows_what_an_expression_gives(self) -> None:
        self.show(
            """<div data-signals="{t: '<b>1</b>', n: 0, f: false}"></div>
            <p id="t" data-text="$t">old</p><p id="n" data-text="$n"></p>
            <p id="f" data-text="$f"></p>"""
        )
        self.see("['t', 'n', 'f'].map((id) => byId(id).textContent)", ["<b>1</b>", "0", "false"])

    def test_show_hides_and_shows(self) -> None:
        self.show(
            """<div data-signals="{on: false}"></div><p id="p" data-show="$on">x</p>
            <p id="q" data-show="!$on" style="display: none">x</p>
            <button id="b" data-on:click="$on = !$on"></button>"""
        )
        self.see("[byId('p').style.display, byId('q').style.display]", ["none", ""])
        self.do("byId('b').click()")
        self.see("[byId('p').style.display, byId('q').style.display]", ["", "none"])

    def test_class_adds_and_removes(self) -> None:
        self.show(
            """<div data-signals="{on: true}"></div>
            <p id="p" class="own" data-class="{red: $on, 'big bold': $on, blue: !$on}"></p>
            <p id="q" class="old" data-class:is-on="$on" data-class:old="!$on"></p>
            <button id="b" data-on:click="$on = !$on"></button>"""
        )
        both = "['p', 'q'].map((id) => [...byId(id).classList].sort().join(' '))"
        self.see(both, ["big bold own red", "is-on"])
        self.do("byId('b').click()")
        self.see(both, ["blue own", "old"])

    def test_attr_sets_and_removes(self) -> None:
        self.show(
            """<div data-signals="{on: true, t: 'a &quot;b&quot;'}"></div>
            <p id="p" title="old" data-attr="{title: $on &amp;&amp; $t, 'aria-busy': String($on),
              hidden: $on, 'data-n': 0, 'data-f': () => 1}"></p>
            <button id="b" data-attr:disabled="!$on" data-attr:aria-label="$t"
              data-on:click="$on = false"></button>"""
        )
        both = "['title', 'aria-busy', 'hidden', 'data-n'].map((n) => byId('p').getAttribute(n))"
        self.see(both, ['a "b"', "true", "", "0"])
        self.now("[byId('b').disabled, byId('b').ariaLabel]", [False, 'a "b"'])
        self.now("byId('p').getAttribute('data-f')", "() => 1")
        self.do("byId('b').click()")
        self.see(both, [None, "false", None, "0"])
        self.now("byId('b').disabled", True)

    def test_style_sets_and_gives_back(self) -> None:
        self.show(
            """<div data-signals="{on: true}"></div>
            <p id="p" style="color: red" data-style="{color: $on ? 'blue' : false,
              'background-color': $on &amp;&amp; 'lime', '--own': $on ? '3' : null}"></p>
            <p id="q" data-style:margin-left="$on ? '5px' : ''"></p>
            <button id="b" data-on:click="$on = !$on"></button>"""
        )
        now = """[byId('p').style.color, byId('p').style.backgroundColor,
          byId('p').style.getPropertyValue('--own'), byId('q').style.marginLeft]"""
        self.see(now, ["blue", "lime", "3", "5px"])
        self.do("byId('b').click()")
        self.see(now, ["red", "", "", ""])

    def test_computed_is_never_behind(self) -> None:
        self.answers("/sum")
        self.show(
            """<div data-signals="{a: 1, b: 2}" data-computed:the-sum="$a + $b"
              data-computed="{twice: () => ($a + $b) * 2}"></div>
            <p id="p" data-text="$theSum"></p><p data-effect="made.push([$theSum, $twice])"></p>
            <button id="b" data-on:click="$a = 10; @post('/sum'); $b = 20"></button>"""
        )
        self.see("byId('p').textContent", "3")
        self.do("byId('b').click()")
        self.see("byId('p').textContent", "30")
        wanted = {"a": 10, "b": 2, "theSum": 12, "twice": 24}
        self.assertEqual(self.stage.requests("/sum")[0].signals, wanted)
        self.now("made", [[3, 6], [30, 60]])

    def test_computed_signals_are_nested_and_removed_as_others_are(self) -> None:
        self.answers("/s", patch_signals({"gone": None, "f": {"kept": 9}, "a": 3}))
        self.show(
            """<i data-signals="{a: 1, f: {x: 1}}" data-computed:gone="$a"
              data-computed="{f: {kept: () => $a * 2}}"></i>
            <b id="b" data-on:click="@get('/s')"></b>"""
        )
        self.see("own()", {"a": 1, "f": {"x": 1, "kept": 2}, "gone": 1})
        self.do("byId('b').click()")
        self.see("own()", {"a": 3, "f": {"x": 1, "kept": 6}})

    def test_computed_goes_on_when_its_element_has_left(self) -> None:
        self.show(
            """<i data-signals="{a: 1}"></i><i id="c" data-computed:twice="$a * 2"></i>
            <p id="p" data-text="$twice"></p><b id="b" data-on:click="$a = 5"></b>"""
        )
        self.do("byId('c').remove()")
        self.do("byId('b').click()")
        self.see("byId('p').textContent", "10")

    def test_effect_runs_first_and_again_when_what_it_read_changes(self) -> None:
        self.show(
            """<div data-signals="{a: 1, b: 1, deep: {x: 1, y: 1}, list: [1]}"></div>
            <p data-effect="made.push(['a', $a])"></p><p data-effect="$copy = $a * 2"></p>
            <p data-effect="made.push(['x', $deep.x])"></p>
            <p data-effect="made.push(['list', $list.join()])"></p>
            <button id="b" data-on:click="$b = 5"></button>
            <button id="c" data-on:click="$a = 5"></button>
            <button id="d" data-on:click="$deep.y = 5; $deep.x = 6"></button>
            <button id="e" data-on:click="$list = [...$list, 2]; $deep.y = 9"></button>"""
        )
        self.see("made", [["a", 1], ["x", 1], ["list", "1"]])
        for button in "bcde":
            self.do(f"byId('{button}').click()")
        self.see("made.slice(3)", [["a", 5], ["x", 6], ["list", "1,2"]])
        self.see("own().copy", 10)

    def test_json_signals_shows_what_a_filter_lets_through(self) -> None:
        self.show(
            """<div data-signals="{a: 1, ab: {c: 2, d: 3}, _own: 4}"></div>
            <pre id="all" data-json-signals></pre>
            <pre id="some" data-json-signals="{include: /^a/, exclude: /d$/}"></pre>
            <pre id="terse" data-json-signals__terse="{include: /^ab/}"></pre>"""
        )
        self.see("JSON.parse(byId('all').textContent)", {"a": 1, "ab": {"c": 2, "d": 3}, "_own": 4})
        self.see("JSON.parse(byId('some').textContent)", {"a": 1, "ab": {"c": 2}})
        self.now("byId('terse').textContent", '{"ab":{"c":2,"d":3}}')
        self.now("byId('some').textContent.includes('\\n  ')", True)

    def test_ref_names_an_element(self) -> None:
        self.answers("/refs")
        self.show(
            """<input id="i" data-ref="field" value="abc"><input data-ref:other-one value="d">
            <p id="p" data-text="$field.value + $otherOne.value"></p>
            <button id="b" data-on:click="$field.focus(); @post('/refs')"></button>"""
        )
        self.see("byId('p').textContent", "abcd")
        self.do("byId('b').click()")
        self.see("document.activeElement.id", "i")
        self.assertEqual(self.stage.requests("/refs")[0].signals, {"field": {}, "otherOne": {}})

    # -- data-bind

    def test_bind_text_follows_both_ways_and_keeps_the_type(self) -> None:
        self.show(
            """<div data-signals="{had: 'given', n: 5}"></div>
            <input id="i" data-bind="name" value="first"><input id="j" data-bind:name>
            <input id="h" data-bind="had" value="lost"><input id="n" data-bind="n">
            <textarea id="t" data-bind:long-text>typed</textarea>
            <input id="d" data-bind="deep.er" value="x">
            <p data-on:click="$name = 'set'; $longText = 'two\\nlines'" id="b"></p>"""
        )
        self.see(
            "own()",
            {"had": "given", "n": 5, "name": "first", "longText": "typed", "deep": {"er": "x"}},
        )
        self.now(
            "['i', 'j', 'h', 'n'].map((id) => byId(id).value)", ["first", "first", "given", "5"]
        )
        self.do("type('i', 'new'), type('n', '42'), type('t', 'more'), type('d', 'y')")
        self.see(
            "own()",
            {"had": "given", "n": 42, "name": "new", "longText": "more", "deep": {"er": "y"}},
        )
        self.now("byId('j').value", "new")
        self.do("byId('b').click()")
        self.see("['i', 'j', 't'].map((id) => byId(id).value)", ["set", "set", "two\nlines"])

    def test_bind_numbers_are_numbers(self) -> None:
        self.show(
            """<div data-signals="{text: '3'}"></div>
            <input id="n" type="number" data-bind="n" value="3">
            <input id="r" type="range" data-bind="r" min="0" max="10" value="4">
            <input id="e" type="number" data-bind="e">
            <input id="s" type="number" data-bind="text">"""
        )
        self.see("own()", {"n": 3, "r": 4, "e": 0, "text": "3"})
        self.do("type('n', '8.5'), type('r', '9'), type('s', '7')")
        self.see("own()", {"n": 8.5, "r": 9, "e": 0, "text": "7"})
        self.do("type('n', '')")
        self.see("own().n", 0)

    def test_bind_checkboxes(self) -> None:
        self.show(
            """<div data-signals="{on: true, word: '', flag: false}"></div>
            <input id="a" type="checkbox" data-bind="plain">
            <input id="b" type="checkbox" data-bind="checked" checked>
            <input id="c" type="checkbox" data-bind="on">
            <input id="d" type="checkbox" data-bind="word" value="yes">
            <input id="e" type="checkbox" data-bind="flag" value="yes">
            <input id="f" type="checkbox" data-bind="valued" value="v" checked>
            <input id="g" type="checkbox" data-bind="given.on" value="on">
            <i data-signals="{many: 2}"></i>
            <input id="h" type="checkbox" data-bind="many" value="5">"""
        )
        self.see(
            "own()",
            {
                "plain": False, "checked": True, "on": True, "word": "", "flag": False,
                "valued": "v", "given": {"on": False}, "many": 2,
            },
        )  # fmt: skip
        self.now(
            "[...'abcdefgh'].map((id) => byId(id).checked)",
            [False, True, True, False, False, True, False, True],
        )
        self.do("[...'abcdefgh'].forEach((id) => byId(id).click())")
        self.see(
            "own()",
            {
                "plain": True,
                "checked": False,
                "on": False,
                "word": "yes",
                "flag": True,
                "valued": "",
                "given": {"on": True},
                "many": "",
            },
        )

    def test_bind_several_controls_to_one_list(self) -> None:
        self.show(
            """<div data-signals="{c: ['', 'y'], t: []}"></div>
            <input id="x" type="checkbox" data-bind="c" value="x">
            <input id="y" type="checkbox" data-bind="c" value="y">
            <input id="t0" data-bind="t" value="p"><input id="t1" data-bind="t" value="q">
            <button id="b" data-on:click="$c = ['x', '']"></button>"""
        )
        self.see("own()", {"c": ["", "y"], "t": ["p", "q"]})
        self.now("[byId('x').checked, byId('y').checked]", [False, True])
        self.do("byId('x').click(), type('t1', 'new')")
        self.see("own()", {"c": ["x", "y"], "t": ["p", "new"]})
        self.do("byId('b').click()")
        self.see("[byId('x').checked, byId('y').checked]", [True, False])

    def test_bind_radio_buttons(self) -> None:
        self.show(
            """<div data-signals="{n: 2}"></div>
            <input id="a" type="radio" data-bind="pick" value="a">
            <input id="b" type="radio" data-bind="pick" value="b" checked>
            <input id="n1" type="radio" data-bind="n" value="1">
            <input id="n2" type="radio" data-bind="n" value="2">"""
        )
        self.see("own()", {"n": 2, "pick": "b"})
        self.now("['a', 'b', 'n1', 'n2'].map((id) => byId(id).checked)", [False, True, False, True])
        self.do("byId('a').click(), byId('n1').click()")
        self.see("own()", {"n": 1, "pick": "a"})
        self.now("['a', 'b', 'n1', 'n2'].map((id) => byId(id).checked)", [True, False, True, False])

    def test_bind_select_one_and_many(self) -> None:
        self.show(
            """<div data-signals="{n: 1, given: ['x']}"></div>
            <select id="one" data-bind="one"><option>1<option selected>2</select>
            <select id="n" data-bind="n"><option value="1">1<option value="2" selected>2</select>
            <select id="many" data-bind="many" multiple><option>x<option selected>y</select>
            <select id="given" data-bind="given" multiple><option>x<option selected>y</select>"""
        )
        self.see("own()", {"n": 1, "one": "2", "many": ["y"], "given": ["x"]})
        self.do("type('one', '1', 'change'), type('n', '2', 'change')")
        self.do("byId('many').options[0].selected = true")
        self.do("byId('many').dispatchEvent(new Event('change'))")
        self.see("own()", {"n": 2, "one": "1", "many": ["x", "y"], "given": ["x"]})
        self.now("[...byId('given').selectedOptions].map((o) => o.value)", ["x"])

    def test_a_choice_is_one_change_and_numbers_stay_numbers(self) -> None:
        self.show(
            """<i data-signals="{n: [1, 3]}"></i><select id="s" data-bind="n" multiple>
            <option value="1">one<option value="3">three</select>
            <b id="b" data-on:click="$n = [1]"></b>"""
        )
        self.do("byId('b').click(), patches.length = 0")
        self.page.select_option("#s", ["1", "3"])
        self.see("own()", {"n": [1, 3]})
        self.now("patches", [{"n": [1, 3]}])

    # -- attributes that do something

    def test_init_runs_once_at_its_time(self) -> None:
        self.show(
            """<p data-init="note('init')"></p><p data-init__delay.1500ms="note('later')"></p>
            <p data-init__delay.3s="note('seconds')"></p>
            <p data-init__viewtransition="note('transition')"></p>""",
            clock=True,
        )
        self.see("[count.init, count.transition, count.later ?? 0]", [1, 1, 0])
        self.page.clock.run_for(1500)
        self.now("[count.init, count.later, count.seconds ?? 0]", [1, 1, 0])
        self.page.clock.run_for(1500)
        self.now("count.seconds", 1)

    def test_on_hears_events_with_el_and_evt(self) -> None:
        self.show(
            """<button id="b" data-on:click="made.push([el.id, evt.type, evt.target.id])"></button>
            <p id="p" data-on:my-event="made.push(evt.detail)"></p>
            <p id="q" data-on:my-event__case.camel="made.push('camel')"></p>"""
        )
        self.do("byId('b').click()")
        self.do("byId('p').dispatchEvent(new CustomEvent('my-event', { detail: 7 }))")
        self.do("byId('q').dispatchEvent(new CustomEvent('myEvent'))")
        self.see("made", [["b", "click", "b"], 7, "camel"])

    def test_on_modifiers_say_where_and_how_often(self) -> None:
        self.show(
            """<div id="outer" data-on:click="note('outer')"
              data-on:click__capture="made.push('capture')">
              <button id="once" data-on:click__once="note('once')"></button>
              <button id="stop" data-on:click__stop="note('stop'); made.push('stop')"></button>
              <a id="prevent" href="#gone" data-on:click__prevent="note('prevent')">x</a>
              <p id="passive"
                data-on:touchstart__passive="evt.preventDefault(); note('passive')"></p>
              <p id="in" data-on:click__outside="note('outside')"><b id="inner"></b></p>
            </div>
            <i data-on:ping__window="note('window')"></i>
            <i data-on:pong__document="note('document')"></i>"""
        )
        self.do("byId('once').click(), byId('once').click()")
        self.see("[count.once, count.outer, count.outside]", [1, 2, 2])
        self.do("byId('inner').click()")
        self.see("[count.outer, count.outside]", [3, 2])
        self.do("made.length = 0, byId('stop').click()")
        self.see("[count.stop, count.outer, made]", [1, 3, ["capture", "stop"]])
        self.do("byId('prevent').click()")
        self.see("[count.prevent, location.hash]", [1, ""])
        self.do(
            "window.dispatchEvent(new Event('ping')), document.dispatchEvent(new Event('pong'))"
        )
        self.see("[count.window, count.document]", [1, 1])
        self.expected_problems.append("passive")
        self.do(
            "byId('passive').dispatchEvent(window.e = new Event('touchstart', {cancelable: true}))"
        )
        self.see("[count.passive, e.defaultPrevented]", [1, False])

    def test_on_delay_debounce_and_throttle(self) -> None:
        marks = {
            "delay.500ms": "delay",
            "debounce.500ms": "quiet",
            "debounce.500ms.leading": "quiet_leading",
            "debounce.500ms.leading.notrailing": "quiet_first",
            "throttle.500ms": "pace",
            "throttle.500ms.trailing": "pace_trailing",
            "throttle.500ms.noleading.trailing": "pace_last",
            "viewtransition": "transition",
        }
        self.expected_problems.append("Transition was skipped")
        attributes = " ".join(f"data-on:ping__{m}=\"note('{name}')\"" for m, name in marks.items())
        self.show(f"<p id='p' {attributes}></p>", clock=True)
        table = [
            (3, 0, [0, 0, 1, 1, 1, 1, 0]),
            (0, 499, [0, 0, 1, 1, 1, 1, 0]),
            (0, 2, [3, 1, 2, 1, 1, 2, 1]),
            (0, 2000, [3, 1, 2, 1, 1, 2, 1]),
            (1, 0, [3, 1, 3, 2, 2, 3, 1]),
            (0, 300, [3, 1, 3, 2, 2, 3, 1]),
            (1, 0, [3, 1, 3, 2, 2, 3, 1]),
            (0, 300, [4, 1, 3, 2, 2, 4, 2]),
            (0, 300, [5, 2, 4, 2, 2, 4, 2]),
        ]
        for row, (pings, run, wanted) in enumerate(table):
            for _ in range(pings):
                self.do("byId('p').dispatchEvent(new Event('ping'))")
            if run:
                self.page.clock.run_for(run)
            found = self.do(f"{list(marks.values())[:7]}.map((name) => count[name] ?? 0)")
            self.assertEqual(found, wanted, f"row {row}")
        self.see("count.transition", 5)

    def test_submit_does_not_load_a_page(self) -> None:
        self.show("<form data-on:submit=\"note('sent')\"><button id='b'></button></form>")
        self.do("byId('b').click()")
        self.see("count.sent", 1)
        self.now("location.search", "")

    def test_on_intersect_tells_what_comes_into_view_and_leaves(self) -> None:
        self.show(
            """<div style="height: 3000px"></div><div id="box" style="height: 100px"
              data-on-intersect="note('any')"
              data-on-intersect__half="note('half')" data-on-intersect__full="note('full')"
              data-on-intersect__threshold.25="note('quarter')"
              data-on-intersect__exit="note('exit')">
              <p data-on-intersect__once="note('once')">x</p>
            </div>
            <div style="height: 3000px"></div><script>
            const reveal = (part) => scrollTo(0, byId('box').offsetTop - innerHeight + part);
            </script>"""
        )
        # What is out of view at first has left it, too.
        self.see("count", {"exit": 1})
        self.do("reveal(10)")
        self.see("count", {"any": 1, "once": 1, "exit": 1})
        self.do("reveal(30)")
        self.see("count.quarter", 1)
        self.do("reveal(60)")
        self.see("count.half", 1)
        self.do("reveal(100)")
        self.see("count.full", 1)
        self.do("scrollTo(0, 0)")
        self.see("count.exit", 2)
        self.do("reveal(100)")
        self.see("count.any", 2)
        self.see("[count.once, count.half]", [1, 2])

    def test_on_interval_ticks(self) -> None:
        self.show(
            """<p data-on-interval="note('second')"></p>
            <p id="p" data-on-interval__duration.200ms="note('fast')"></p>
            <p data-on-interval__duration.2s.leading="note('leading')"></p>""",
            clock=True,
        )
        self.now("count.leading", 1)
        self.do("count = {}")
        self.page.clock.run_for(2000)
        self.now("count", {"leading": 1, "second": 2, "fast": 10})
        self.do("byId('p').remove()")
        self.page.clock.run_for(1000)
        self.now("[count.second, count.fast]", [3, 10])

    def test_what_goes_is_no_news_to_on_signal_patch(self) -> None:
        self.answers(
            "/s", patch_signals({"user": {"mail": None}, "n": None}) + patch_signals({"a": 2})
        )
        self.show(
            """<div data-signals="{a: 1, n: 1, user: {name: 'Ann', mail: 'x'}, l: [1, 2]}"></div>
            <p data-on-signal-patch="made.push(patch)"></p>
            <b id="b" data-on:click="@get('/s')"></b>
            <b id="c" data-on:click="delete $user.name; $l = [1]"></b>"""
        )
        self.do("byId('b').click()")
        self.see("made", [{"a": 2}])
        self.do("byId('c').click()")
        self.see("made", [{"a": 2}, {"l": [1]}])
        self.now("own()", {"a": 2, "l": [1]})

    def test_an_empty_object_is_told_to_the_document_only(self) -> None:
        self.answers("/s", patch_signals({"o": {}, "a": {"b": {}}}))
        self.show(
            """<b id="b" data-signals="{a: {b: 1}}" data-on:click="@get('/s')"></b>
            <p data-on-signal-patch="made.push(patch)"></p>"""
        )
        self.do("patches.length = 0, byId('b').click()")
        self.see("patches", [{"o": {}, "a": {"b": {}}}])
        self.now("made", [])

    def test_on_signal_patch_hears_the_changes_it_wants(self) -> None:
        self.show(
            """<div data-signals="{a: 0, ab: 0, c: {d: 0}}"></div>
            <p data-on-signal-patch="made.push(['all', patch])"></p>
            <p data-on-signal-patch="made.push(['ab', patch])"
              data-on-signal-patch-filter="{include: /^a/, exclude: /b$/}"></p>
            <button id="b" data-on:click="$c.d = 1"></button>
            <button id="c" data-on:click="$a = 1; $ab = 2"></button>"""
        )
        self.do("made.length = 0, byId('b').click()")
        self.see("made", [["all", {"c": {"d": 1}}]])
        self.do("made.length = 0, byId('c').click()")
        self.see("made.map(([name]) => name).sort()", ["ab", "all"])
        self.see("made.find(([name]) => name === 'all')[1]", {"a": 1, "ab": 2})
        self.see("made.find(([name]) => name === 'ab')[1].a", 1)

    def test_ignore_leaves_elements_alone(self) -> None:
        self.show(
            """<div data-ignore><p id="p" data-text="'changed'">kept</p></div>
            <div data-ignore__self id="q" data-text="'changed'">
              <b id="r" data-text="'inner'">x</b>
            </div>
            <p id="s" data-text="'changed'">x</p>"""
        )
        self.see("byId('s').textContent", "changed")
        self.now("[byId('p').textContent, byId('r').textContent]", ["kept", "inner"])

    def test_indicator_is_true_while_a_request_runs(self) -> None:
        self.answers("/slow", Reply(patch_signals({"came": 1}), then="hold"))
        self.show(
            """<button id="b" data-indicator="busy" data-on:click="@get('/slow')"></button>
            <button id="c" data-indicator:also-busy data-on:click="@get('/quick')"></button>
            <button id="x" data-on:click="@get('/quick')"></button>"""
        )
        self.see("own()", {"busy": False, "alsoBusy": False})
        self.do("byId('b').click()")
        self.see("own()", {"busy": True, "alsoBusy": False, "came": 1})
        self.do("byId('c').click(), byId('x').click()")
        self.see("fetches.filter((type) => type === 'finished').length", 2)
        self.see("own()", {"busy": True, "alsoBusy": False, "came": 1})

    # -- actions

    def test_signals_travel_where_the_method_puts_them(self) -> None:
        for method in ("get", "post", "put", "patch", "delete"):
            self.answers(f"/{method}")
        self.show(
            """<div data-signals="{a: 1, _own: 2, deep: {_own: 3, b: 'x y&z'}}"></div>
            <div data-signals="{none: null, empty: {}}"></div>
            <p id="get" data-on:click="@get('/get?keep=me')"></p>
            <p id="post" data-on:click="@post('/post?keep=me')"></p>
            <p id="put" data-on:click="@put('/put?keep=me')"></p>
            <p id="patch" data-on:click="@patch('/patch?keep=me')"></p>
            <p id="delete" data-on:click="@delete('/delete?keep=me')"></p>"""
        )
        for method in ("get", "post", "put", "patch", "delete"):
            self.do(f"byId('{method}').click()")
            asked = self.stage.requests(f"/{method}")[0]
            in_url = method in ("get", "delete")
            self.assertEqual(asked.method, method.upper())
            self.assertEqual(asked.signals, {"a": 1, "deep": {"b": "x y&z"}})
            self.assertEqual(asked.query.pop("keep"), "me")
            self.assertEqual(set(asked.query), {"datastar"} if in_url else set())
            self.assertEqual(asked.headers["datastar-request"], "true")
            self.assertIn("text/event-stream", asked.headers["accept"])
            if not in_url:
                self.assertEqual(asked.headers["content-type"], "application/json")
        self.see("fetches.filter((type) => type === 'finished').length", 5)

    def test_options_filter_replace_and_add(self) -> None:
        self.show(
            """<div data-signals="{a: 1, ab: {c: 2, d: 3}, _own: 4}"></div>
            <p id="f" data-on:click="@post('/f',
              {filterSignals: {include: /^ab/, exclude: /d$/}})"></p>
            <p id="i" data-on:click="@post('/i', {filterSignals: {include: /^a$/}})"></p>
            <p id="e" data-on:click="@post('/e', {filterSignals: {exclude: /^a$/}})"></p>
            <p id="p" data-on:click="@post('/p',
              {payload: {mine: $a}, headers: {'X-Own': 'yes'}})"></p>"""
        )
        self.do("[...'fiep'].forEach((id) => byId(id).click())")
        self.assertEqual(self.stage.requests("/f")[0].signals, {"ab": {"c": 2}})
        self.assertEqual(self.stage.requests("/i")[0].signals, {"a": 1})
        self.assertEqual(self.stage.requests("/e")[0].signals, {"ab": {"c": 2, "d": 3}, "_own": 4})
        self.assertEqual(self.stage.requests("/p")[0].signals, {"mine": 1})
        self.assertEqual(self.stage.requests("/p")[0].headers["x-own"], "yes")

    def test_forms_are_sent_as_browsers_send_them(self) -> None:
        self.show(
            """<form id="form" data-on:submit="@post('/submit', {contentType: 'form'})">
              <input name="a" value="1"><input name="a" value="2 &amp; 3">
              <button id="send" name="go" value="now"></button>
              <button id="b" type="button" name="own" value="x"
                data-on:click="@put('/inside', {contentType: 'form'})"></button>
            </form>
            <p id="out" data-on:click="@get('/out?x=1',
              {contentType: 'form', selector: '#form'})"></p>
            <form enctype="multipart/form-data"
              data-on:submit="@post('/parts', {contentType: 'form'})">
              <input name="a" value="1"><button id="parts"></button></form>
            <form data-on:submit="@post('/not', {contentType: 'form'})" id="wrong">
              <input name="a" required></form>"""
        )
        self.do("byId('send').click()")
        asked = self.stage.requests("/submit")[0]
        self.assertEqual(parse_qs(asked.body), {"a": ["1", "2 & 3"], "go": ["now"]})
        self.assertTrue(
            asked.headers["content-type"].startswith("application/x-www-form-urlencoded")
        )
        self.do("byId('b').click()")
        asked = self.stage.requests("/inside")[0]
        self.assertEqual(parse_qs(asked.body), {"a": ["1", "2 & 3"], "own": ["x"]})
        self.do("byId('out').click()")
        self.assertEqual(self.stage.requests("/out")[0].query["x"], "1")
        self.do("byId('parts').click()")
        asked = self.stage.requests("/parts")[0]
        self.assertTrue(asked.headers["content-type"].startswith("multipart/form-data; boundary="))
        self.assertIn('name="a"\r\n\r\n1\r\n', asked.body)
        self.do("byId('wrong').dispatchEvent(new Event('submit', { cancelable: true }))")
        self.do("byId('out').click()")
        self.stage.requests("/out", 2)
        self.assertNotIn("/not", [asked.path for asked in self.stage.asked])
        self.now("location.pathname", "/page0")

    def test_an_action_gives_a_promise_of_its_end(self) -> None:
        self.answers("/s", patch_elements("<p id='p'>new</p>"))
        self.show(
            """<p id="p">old</p><b id="b"
              data-on:click="@get('/s').then(() => made.push(byId('p').textContent))"></b>"""
        )
        self.do("byId('b').click()")
        self.see("made", ["new"])

    def test_a_deleted_signal_is_not_made_again_by_who_shows_it(self) -> None:
        self.answers("/s", patch_signals({"user": {"mail": None}, "cart": None}))
        self.show(
            """<i data-signals="{user: {name: 'Ann', mail: 'a@x'}, cart: 2}"></i>
            <p data-text="$user.mail + $cart"></p><p data-show="$cart > 1"></p>
            <input data-bind="cart"><b id="b" data-on:click="@get('/s')"></b>
            <b id="c" data-on:click="@post('/ask')"></b>"""
        )
        self.do("byId('b').click()")
        self.see("own()", {"user": {"name": "Ann"}})
        self.do("byId('c').click()")
        self.assertEqual(self.stage.requests("/ask")[0].signals, {"user": {"name": "Ann"}})

    def test_peek_set_all_and_toggle_all(self) -> None:
        self.show(
            """<div data-signals="{a: 1, b: {x: true, y: false}, c: {x: 1, y: 2}}"></div>
            <p data-effect="made.push([$a, @peek(() => $b.x)])"></p>
            <p id="set" data-on:click="@setAll(7, {include: /^c\\./})"></p>
            <p id="toggle" data-on:click="@toggleAll({include: /^b/, exclude: /y$/})"></p>
            <p id="a" data-on:click="$a = 2"></p>"""
        )
        self.do("byId('toggle').click(), byId('set').click()")
        self.see("own()", {"a": 1, "b": {"x": False, "y": False}, "c": {"x": 7, "y": 7}})
        self.do("byId('a').click()")
        self.see("made", [[1, True], [2, False]])

    def test_set_all_and_toggle_all_go_into_lists(self) -> None:
        self.show(
            """<div data-signals="{l: [1, [0]], m: [{x: 1}], n: [1, [2]]}"></div>
            <p id="t" data-on:click="@toggleAll({exclude: /^n/})"></p>
            <p id="s" data-on:click="@setAll(7, {include: /^n/})"></p>"""
        )
        self.do("byId('t').click(), byId('s').click()")
        self.see("own()", {"l": [False, [True]], "m": [{"x": False}], "n": [7, [7]]})

    # -- answers

    def test_an_html_answer_is_one_patch(self) -> None:
        self.answers("/plain", Reply("<p id='p'>new</p>", "text/html"))
        headers = {"datastar-selector": "#list", "datastar-mode": "append"}
        self.answers(
            "/into", Reply("<li>2</li><li>3</li>", "text/html; charset=utf-8", 200, headers)
        )
        self.show(
            """<p id="p">old</p><ul id="list"><li>1</li></ul>
            <b id="b" data-on:click="@get('/plain')"></b>
            <b id="c" data-on:click="@get('/into')"></b>"""
        )
        self.do("byId('b').click(), byId('c').click()")
        self.see("byId('p').textContent", "new")
        self.see("byId('list').textContent", "123")

    def test_a_json_answer_is_a_signal_patch(self) -> None:
        headers = {"datastar-only-if-missing": "true"}
        self.answers(
            "/json",
            Reply('{"a": 2, "b": {"c": 3}}', "application/json"),
            Reply('{"a": 4, "d": 5}', "application/json", 200, headers),
        )
        self.show("<b id='b' data-signals='{a: 1}' data-on:click=\"@get('/json')\"></b>")
        self.do("byId('b').click()")
        self.see("own()", {"a": 2, "b": {"c": 3}})
        self.do("byId('b').click()")
        self.see("own()", {"a": 2, "b": {"c": 3}, "d": 5})

    def test_a_javascript_answer_runs_once(self) -> None:
        self.answers("/js", Reply("note('ran'); document.title = 'ran'", "text/javascript"))
        self.show("<b id='b' data-on:click=\"@get('/js')\"></b>")
        self.do("byId('b').click()")
        self.see("[document.title, count.ran]", ["ran", 1])

    def test_an_error_is_told_and_its_body_ignored(self) -> None:
        self.expected_problems.append("Failed to load resource")
        self.answers("/bad", Reply("<p id='p'>bad</p>", "text/html", 404))
        self.answers("/made", Reply("<p id='p'>bad</p>", "text/html", 201))
        self.show(
            """<p id="p">old</p><b id="b" data-on:click="@get('/bad')"></b>
            <b id="c" data-on:click="@get('/made')"></b>"""
        )
        self.do("byId('b').click()")
        self.see("fetches", ["started", "error", "finished"])
        self.do("byId('c').click()")
        self.see("fetches.length", 5)
        self.now("byId('p').textContent", "old")

    def test_a_stream_is_read_by_the_rules(self) -> None:
        stream = (
            ": a comment\r\n\r\n"
            'event: datastar-patch-signals\r\ndata: signals {"crlf": 1}\r\n\r\n'
            'event: datastar-patch-signals\ndata: signals {\ndata: signals "lines": "\u20ac"}\n\n'
            'data: signals {"no": "name"}\n\n'
            'event: other\ndata: signals {"no": "other"}\n\n'
            "event: datastar-patch-elements\ndata: elements <pre id='p'>a\ndata: elements \n"
            "data: elements  b</pre>\n\n"
            'event: datastar-patch-signals\ndata: signals {"never": "finished"}\n'
        )
        self.answers("/s", Reply(stream.encode()))
        self.show("<pre id='p'></pre><b id='b' data-on:click=\"@get('/s')\"></b>")
        self.do("byId('b').click()")
        self.see("fetches.at(-1)", "finished")
        self.see("own()", {"crlf": 1, "lines": "\u20ac"})
        self.now("byId('p').textContent", "a\n\n b")
        self.now(
            "fetches.filter((type) => type.startsWith('datastar'))",
            ["datastar-patch-signals", "datastar-patch-signals", "datastar-patch-elements"],
        )

    def test_signal_patches_merge(self) -> None:
        self.answers(
            "/s",
            patch_signals({"a": {"b": 2, "gone": None}, "list": [9], "n": {"e": {"w": 1}}})
            + patch_signals({"a": {"b": 3, "c": 4}, "fresh": 5, "flat": 6}, "onlyIfMissing true")
            + patch_signals({"flat": {"now": "deep"}, "lost": None}),
        )
        self.show(
            """<b id="b" data-on:click="@get('/s')"
              data-signals="{a: {b: 1, gone: 1, kept: 1}, list: [1, 2], flat: 0, lost: 1}"></b>
            <p data-effect="made.push($a.kept)"></p>"""
        )
        self.do("patches.length = 0, byId('b').click()")
        self.see(
            "own()",
            {
                "a": {"b": 2, "kept": 1, "c": 4}, "list": [9], "n": {"e": {"w": 1}},
                "fresh": 5, "flat": {"now": "deep"},
            },
        )  # fmt: skip
        self.now("[made, patches.length]", [[1], 3])

    # -- patching elements

    def test_every_mode_with_a_selector(self) -> None:
        new = "<i>1</i><i>2</i>"
        wanted = {
            "outer": "<i>1</i><i>2</i>",
            "replace": "<i>1</i><i>2</i>",
            "inner": '<p class="t"><i>1</i><i>2</i></p>',
            "prepend": '<p class="t"><i>1</i><i>2</i><b>x</b></p>',
            "append": '<p class="t"><b>x</b><i>1</i><i>2</i></p>',
            "before": '<i>1</i><i>2</i><p class="t"><b>x</b></p>',
            "after": '<p class="t"><b>x</b></p><i>1</i><i>2</i>',
            "remove": "",
        }
        boxes = "".join(
            f'<div id="{mode}1"><p class="t"><b>x</b></p></div>'
            f'<div id="{mode}2"><p class="t"><b>x</b></p></div>'
            f"<button id='{mode}' data-on:click=\"@get('/{mode}')\"></button>"
            for mode in wanted
        )
        self.show(boxes)
        for mode, result in wanted.items():
            with self.subTest(mode):
                options = [f"selector #{mode}1 .t, #{mode}2 .t", f"mode {mode}"]
                self.answers(f"/{mode}", patch_elements("" if mode == "remove" else new, *options))
                self.do(f"byId('{mode}').click()")
                self.see(f"[1, 2].map((n) => byId('{mode}' + n).innerHTML)", [result, result])

    def test_a_target_inside_another_target_goes_with_it(self) -> None:
        self.answers("/s", patch_elements("<p class='t'>new</p>", "selector .t"))
        self.show(
            """<div id="d"><div class="t">a<div class="t">b</div></div></div>
            <b id="b" data-on:click="@get('/s')"></b>"""
        )
        self.do("byId('b').click()")
        self.see("fetches.at(-1)", "finished")
        self.now("byId('d').textContent", "new")

    def test_outer_and_replace_find_their_elements_by_id(self) -> None:
        self.answers("/outer", patch_elements('<p id="a" class="n">A</p>\n<p id="b">B</p>'))
        self.answers("/replace", patch_elements('<p id="a">C</p>', "mode replace"))
        self.show(
            """<p id="a">1</p><p id="b" title="x">2</p>
            <button id="o" data-on:click="@get('/outer')"></button>
            <button id="r" data-on:click="@get('/replace')"></button>"""
        )
        self.do("window.a0 = byId('a'), byId('o').click()")
        self.see(
            "['a', 'b'].map((id) => byId(id).outerHTML)",
            ['<p id="a" class="n">A</p>', '<p id="b">B</p>'],
        )
        self.now("byId('a') === a0", True)
        self.do("byId('r').click()")
        self.see("byId('a').outerHTML", '<p id="a">C</p>')
        self.now("byId('a') === a0", False)

    def test_a_patch_that_finds_nothing_stops_nothing(self) -> None:
        self.expected_problems += ["PatchElements", "nope", "selector", "GenerateExpression"]
        self.answers(
            "/s",
            patch_elements("<p id='nope'></p>") + patch_elements("<p>x</p>", "mode inner")
            + patch_elements("<p>x</p>", "selector #nope", "mode append")
            + patch_signals({"after": 1}),
        )  # fmt: skip
        self.show("<b id='b' data-on:click=\"@get('/s')\"></b>")
        self.do("byId('b').click()")
        self.see("own()", {"after": 1})
        self.see("fetches.at(-1)", "finished")

    def test_svg_and_mathml_have_their_namespaces(self) -> None:
        self.answers(
            "/s",
            patch_elements('<circle id="c" r="9"></circle>', "namespace svg")
            + patch_elements(
                '<rect width="1"></rect>', "selector #g", "mode append", "namespace svg"
            )
            + patch_elements("<mi>x</mi>", "selector #m", "mode append", "namespace mathml")
            + patch_elements('<svg id="s2"><path d="M0 0"></path></svg>'),
        )
        self.show(
            """<svg id="s"><g id="g"><circle id="c" r="1"></circle></g></svg><math id="m"></math>
            <svg id="s2"></svg><b id="b" data-on:click="@get('/s')"></b>"""
        )
        self.do("byId('b').click()")
        self.see(
            "[byId('c').getAttribute('r'), byId('c').namespaceURI]",
            ["9", "http://www.w3.org/2000/svg"],
        )
        self.see("byId('g').lastElementChild.namespaceURI", "http://www.w3.org/2000/svg")
        self.see("byId('m').lastElementChild.namespaceURI", "http://www.w3.org/1998/Math/MathML")
        self.see("byId('s2').firstElementChild.namespaceURI", "http://www.w3.org/2000/svg")

    def test_a_view_transition_wraps_the_patch(self) -> None:
        self.answers("/s", patch_elements("<p id='p'>new</p>", "useViewTransition true"))
        self.show(
            """<p id="p">old</p><b id="b" data-on:click="@get('/s')"></b><script>
            for (const scope of [document, document.documentElement]) {
              const start = scope.startViewTransition?.bind(scope);
              scope.startViewTransition = (...all) => (note('transition'), start(...all));
            }</script>"""
        )
        self.do("byId('b').click()")
        self.see("[byId('p').textContent, count.transition]", ["new", 1])

    def test_patched_scripts_run_once(self) -> None:
        script = "<script>note('ran')</script>"
        self.answers("/s", patch_elements(script, "selector body", "mode append"))
        self.answers("/t", patch_elements(f"<div>{script}</div>", "selector #p", "mode after"))
        self.show(
            f"""<div id="p">old</div><b id="b" data-on:click="@get('/s')"></b>
            <b id="c" data-on:click="@get('/t')"></b>
            <div id="q">{script.replace("ran", "had")}</div>"""
        )
        self.do("byId('b').click()")
        self.see("count", {"had": 1, "ran": 1})
        self.do("byId('c').click()")
        self.see("count", {"had": 1, "ran": 2})

    def test_a_script_that_is_there_does_not_run_again(self) -> None:
        body = "<div id='q'><script>note('ran')</script><p>{}</p></div>"
        self.answers("/s", patch_elements(body.format("new")))
        self.show(body.format("old") + "<b id='b' data-on:click=\"@get('/s')\"></b>")
        self.do("byId('b').click()")
        self.see("byId('q').textContent.endsWith('new')", True)
        self.now("count", {"ran": 1})

    def test_a_whole_page_is_morphed(self) -> None:
        self.show(
            """<input id="i"><p id="p">old</p><b id="b" data-on:click="@get('/s')"></b>""",
            head="<title>old</title><style>p { color: red }</style>",
        )
        page = (
            self.stage.pages["/page0"].replace(">old<", ">new<").replace("<body", '<body class="n"')
        )
        self.answers("/s", patch_elements(page))
        self.do(
            "window.i0 = byId('i'), byId('i').focus(), byId('i').value = 'typed', byId('b').click()"
        )
        self.see(
            "[document.title, byId('p').textContent, document.body.className]", ["new", "new", "n"]
        )
        self.now("[byId('i') === i0, i0.value, document.activeElement.id]", [True, "typed", "i"])
        self.see("fetches", ["started", "datastar-patch-elements", "finished"])

    def test_head_and_body_are_found_without_an_id(self) -> None:
        self.answers("/body", patch_elements("<body class='n'><p id='p'>new</p></body>"))
        self.show("<p id='p'>old</p><b id='b' data-on:click=\"@get('/body')\"></b>")
        self.do("byId('b').click()")
        self.see("[byId('p').textContent, document.body.className]", ["new", "n"])
        self.now("[document.body.children.length, document.title]", [1, ""])

    # -- the morph

    def test_what_stands_behind_an_id_stays_there(self) -> None:
        view = '<div id="w">{}<p id="p">x</p><div><textarea></textarea></div></div>'
        self.answers("/s", patch_elements(view.format("<div>news</div>")))
        self.show(view.format("") + "<b id='b' data-on:click=\"@get('/s')\"></b>")
        self.do("window.t = byId('w').lastChild.firstChild, t.focus(), t.value = 'a draft'")
        self.do("byId('b').click()")
        self.see("byId('w').firstChild.textContent", "news")
        self.now("[t.value, t === document.activeElement, t.isConnected]", ["a draft", True, True])

    def test_a_password_that_is_shown_stays_while_its_form_is_patched(self) -> None:
        form = """<form id="f"><p>{}</p><input type="password" data-attr:type="$shown ? 'text'
            : 'password'"></form>"""
        self.answers("/s", patch_elements(form.format("too short").replace("\n", "")))
        self.show(
            form.format("").replace("\n", "")
            + "<b id='b' data-signals='{shown: true}' data-on:click=\"@get('/s')\"></b>"
        )
        self.do("byId('f').lastChild.focus(), document.activeElement.value = 'secret'")
        self.do("byId('b').click()")
        self.see("byId('f').textContent", "too short")
        self.now("[document.activeElement.value, document.activeElement.type]", ["secret", "text"])

    def test_the_morph_keeps_focus_selection_and_typed_text(self) -> None:
        form = """<form id="f">{0}<label>x</label><input id="i" name="i" value="start">
          <input class="{1}" name="anonymous"><textarea id="t">start</textarea>{0}
          <input type="checkbox" id="c"><select id="s"><option>a<option>b</select></form>"""
        self.answers("/s", patch_elements(form.format("<p>more</p>", "new").replace("\n", " ")))
        self.show(form.format("", "old") + "<b id='b' data-on:click=\"@get('/s')\"></b>")
        self.do(
            """window.i0 = byId('i'), i0.value = 'typed text', i0.focus(),
            i0.setSelectionRange(2, 5),
            document.querySelector('[name=anonymous]').value = 'also typed',
            byId('t').value = 'long', byId('c').checked = true, byId('s').value = 'b'"""
        )
        self.do("byId('b').click()")
        self.see("document.querySelectorAll('#f > p').length", 2)
        self.now("byId('i') === i0 && document.activeElement === i0", True)
        self.now("[i0.value, i0.selectionStart, i0.selectionEnd]", ["typed text", 2, 5])
        self.now("document.querySelector('.new').value", "also typed")
        self.now("[byId('t').value, byId('c').checked, byId('s').value]", ["long", True, "b"])

    def test_elements_move_by_id(self) -> None:
        self.answers(
            "/s",
            patch_elements(
                '<div id="d"><section class="n"><p id="three">3</p><input id="i"></section>'
                '<ul id="u"><li id="c">C</li><li id="a">a</li><li id="new">n</li></ul></div>'
            ),
        )
        self.show(
            """<div id="d"><ul id="u"><li id="a">a</li><li id="b">b</li><li id="c">c</li></ul>
            <p id="three">3</p><div><input id="i"></div></div>
            <b id="b0" data-on:click="@get('/s')"></b>"""
        )
        self.do(
            """window.old = ['d', 'u', 'a', 'c', 'three', 'i'].map(byId),
            byId('i').value = 'typed', byId('i').focus(), byId('b0').click()"""
        )
        self.see(
            "byId('d').innerHTML",
            '<section class="n"><p id="three">3</p><input id="i"></section>'
            '<ul id="u"><li id="c">C</li><li id="a">a</li><li id="new">n</li></ul>',
        )
        self.now("old.map((el) => el === byId(el.id))", [True] * 6)
        self.now("[document.activeElement.id, byId('i').value]", ["i", "typed"])

    def test_what_is_there_is_wrapped_by_what_comes(self) -> None:
        wrapped = '<div><p id="p">2<b id="i">x</b></p></div>'
        self.answers("/s", patch_elements(wrapped, "selector #d", "mode inner"))
        self.show(
            """<div id="d"><p id="p">1<b id="i"></b></p></div>
            <b id="b" data-on:click="@get('/s')"></b>"""
        )
        self.do("window.old = [byId('p'), byId('i')], byId('b').click()")
        self.see("byId('d').innerHTML", wrapped)
        self.now("[byId('p') === old[0], byId('i') === old[1]]", [True, True])

    def test_ignore_morph_and_preserve_attr_protect(self) -> None:
        self.answers(
            "/s",
            patch_elements(
                '<div id="d"><p id="p" data-ignore-morph class="n">new</p>'
                '<details id="kept" data-preserve-attr="open class"><b>n</b></details>'
                '<details id="lost"><b>n</b></details></div>'
            ),
        )
        self.show(
            """<div id="d"><p id="p" data-ignore-morph>old</p>
            <details id="kept" data-preserve-attr="open class"><b>o</b></details>
            <details id="lost"><b>o</b></details></div><b id="b" data-on:click="@get('/s')"></b>"""
        )
        self.do("byId('kept').open = byId('lost').open = true, byId('kept').className = 'own'")
        self.do("byId('b').click()")
        self.see("byId('lost').textContent", "n")
        self.now("[byId('p').textContent, byId('p').className]", ["old", ""])
        self.now(
            "[byId('kept').open, byId('kept').className, byId('kept').textContent]",
            [True, "own", "n"],
        )
        self.now("byId('lost').open", False)
        # A patch that names the element itself, and goes into it, is meant.
        self.answers("/s", patch_elements("<i>in</i>", "selector #p", "mode inner"))
        self.do("byId('b').click()")
        self.see("byId('p').innerHTML", "<i>in</i>")

    def test_what_attributes_had_set_stands_after_a_morph(self) -> None:
        markup = """<div id="d" title="{0}"><p id="t" data-text="$t">{0}</p>
          <p id="h" data-show="$no">{0}</p><p id="c" class="{0}" data-class:on="$t">{0}</p>
          <p id="a" lang="{0}" data-attr:title="$t">{0}</p>
          <p id="y" data-style:color="'red'">{0}</p></div>""".replace("\n", " ")
        self.answers("/s", patch_elements(markup.format("new")))
        self.show(
            f"""<i data-signals="{{t: 'text', no: false}}"></i>{markup.format("old")}
            <b id="b" data-on:click="@get('/s')"></b>
            <b id="e" data-on:click="$t = ''; $no = true"></b>"""
        )
        self.do("byId('b').click()")
        self.see("byId('d').title", "new")
        now = """[byId('t').textContent, byId('h').style.display, byId('c').className,
          byId('a').title, byId('y').style.color]"""
        self.see(now, ["text", "none", "new on", "text", "red"])
        self.do("byId('e').click()")
        self.see(now, ["", "", "new", "", "red"])

    def test_only_new_and_changed_attributes_run(self) -> None:
        self.answers(
            "/s",
            patch_elements(
                "<div id='d'><p id='same' class='n' data-init=\"note('same')\"></p>"
                "<p id='other' data-init=\"note('new')\"></p><p data-init=\"note('fresh')\"></p>"
                "<p id='click' data-on:click=\"note('second')\"></p></div>"
            ),
        )
        self.show(
            """<div id='d'><p id='same' data-init="note('same')"></p>
            <p id='other' data-init="note('old')"></p>
            <p id='click' data-on:click="note('first')"></p></div>
            <b id="b" data-on:click="@get('/s')"></b>"""
        )
        self.see("count", {"same": 1, "old": 1})
        self.do("byId('b').click()")
        self.see("count", {"same": 1, "old": 1, "new": 1, "fresh": 1})
        self.do("byId('click').click()")
        self.see("count.second", 1)
        self.now("count.first", None)

    def test_what_is_removed_is_silent_and_what_is_added_works(self) -> None:
        self.answers(
            "/s", patch_elements("<div id='d'><p id='n' data-text=\"'hi ' + $a\"></p></div>")
        )
        self.show(
            """<div data-signals="{a: 1}"></div><div id="d">
              <i data-on:ping__window="note('ping')"></i>
            <i data-effect="made.push($a)"></i></div><b id="b" data-on:click="@get('/s')"></b>
            <b id="c" data-on:click="$a++"></b>"""
        )
        self.do("window.dispatchEvent(new Event('ping')), byId('b').click()")
        self.see("byId('n')?.textContent", "hi 1")
        self.do("window.dispatchEvent(new Event('ping')), byId('c').click()")
        self.see("byId('n').textContent", "hi 2")
        self.now("[count.ping, made]", [1, [1]])
        self.do(
            "document.body.insertAdjacentHTML('beforeend', '<u id=\"u\" data-text=\"$a\"></u>')"
        )
        self.see("byId('u').textContent", "2")
        self.do("byId('u').setAttribute('data-text', '$a * 10')")
        self.see("byId('u').textContent", "20")

    def test_boxes_keep_their_place_in_a_list_when_others_come_and_go(self) -> None:
        def boxes(*numbers: int) -> str:
            box = "<input type='checkbox' id='c{0}' value='v{0}' data-bind='c'>"
            return f"<div id='d'>{''.join(box.format(n) for n in numbers)}</div>"

        self.answers("/fewer", patch_elements(boxes(2, 3)))
        self.answers("/more", patch_elements(boxes(9, 2, 3)))
        self.show(
            f"""<i data-signals='{{"c": ["v1", "", "v3"]}}'></i>{boxes(1, 2, 3)}
            <b id="b" data-on:click="@get('/fewer')"></b>
            <b id="e" data-on:click="@get('/more')"></b>"""
        )
        self.do("byId('b').click()")
        self.see("byId('c1')", None)
        self.do("byId('c2').click()")
        self.see("own()", {"c": ["v1", "v2", "v3"]})
        self.now("byId('c3').checked", True)
        self.do("byId('e').click()")
        self.see("Boolean(byId('c9'))", True)
        self.do("byId('c2').click()")
        self.see("own().c.slice(1)", ["", "v3"])
        self.now("[byId('c2').checked, byId('c3').checked]", [False, True])

    def test_a_box_without_a_value_is_on(self) -> None:
        old = """<div id="d"><input type="checkbox" id="c" value="x">
          <input type="radio" id="r" value="x"><input id="t" value="x"></div>"""
        fresh = """<div id="d"><input type="checkbox" id="c">
          <input type="radio" id="r"><input type="checkbox" id="t"></div>"""
        self.answers("/s", patch_elements(fresh.replace("\n", " ")))
        self.show(old + "<b id='b' data-on:click=\"@get('/s')\"></b>")
        self.do("byId('b').click()")
        self.see("byId('t').type", "checkbox")
        self.now("['c', 'r', 't'].map((id) => byId(id).value)", ["on", "on", "on"])

    def test_a_changed_value_reaches_its_signal(self) -> None:
        form = """<form id="f"><input id="i" value="{0}" data-bind="i">
          <input id="c" type="checkbox" {1} data-bind="c">
          <textarea id="t" data-bind="t">{0}</textarea>
          <select id="s" data-bind="s"><option>old<option {2}>new</select></form>""".replace(
            "\n", " "
        )
        self.answers("/s", patch_elements(form.format("new", "checked", "selected")))
        self.show(form.format("old", "", "") + "<b id='b' data-on:click=\"@get('/s')\"></b>")
        self.see("own()", {"i": "old", "c": False, "t": "old", "s": "old"})
        self.do("byId('b').click()")
        self.see("own()", {"i": "new", "c": True, "t": "new", "s": "new"})
        self.now(
            "[byId('i').value, byId('c').checked, byId('t').value, byId('s').value]",
            ["new", True, "new", "new"],
        )

    def test_what_is_missing_inside_of_a_signal_is_set_behind_its_first_reader(self) -> None:
        self.show(
            """<p id="p" data-text="$user.name + $n"></p>
            <b data-signals__ifmissing="{user: {name: 'Ada'}, n: 1}"></b>
            <b data-signals__ifmissing="{user: {name: 'Eve', age: 36}, list: [1]}"></b>
            <b data-signals__ifmissing="{list: {x: 1}}"></b>"""
        )
        self.see("own()", {"user": {"name": "Ada", "age": 36}, "n": "", "list": [1]})
        self.now("byId('p').textContent", "Ada")

    def test_a_text_area_that_is_emptied_by_the_server_is_empty(self) -> None:
        form = "<form id='f'><textarea id='t'>{0}</textarea><textarea id='u'>{1}</textarea></form>"
        self.answers("/s", patch_elements(form.format("", "left alone")))
        self.show(
            form.format("draft", "left alone") + "<b id='b' data-on:click=\"@get('/s')\"></b>"
        )
        self.do("type('t', 'sent'), type('u', 'mine'), byId('b').click()")
        self.see("byId('t').value", "")
        self.now("byId('u').value", "mine")

    def test_a_field_that_a_patch_binds_takes_nothing_from_the_signal_that_is_there(self) -> None:
        step = "<div id='d'><select id='s' {0}><option {1}>a<option>b</select></div>"
        self.answers("/s", patch_elements(step.format("data-bind='second'", "")))
        self.show(
            step.format("", "selected")
            + "<b id='b' data-signals=\"{second: 'c'}\" data-on:click=\"@get('/s')\"></b>"
        )
        self.do("byId('b').click()")
        self.see("fetches.at(-1)", "finished")
        self.now("[byId('s').value, own().second]", ["", "c"])

    def test_options_that_come_leave_the_choice_as_it_is_written(self) -> None:
        lists = {
            "first": "<option>a<option>b<option>c",
            "said": "<option>a<option selected>b<option>c",
            "grouped": "<optgroup><option>a</optgroup><optgroup><option selected>b<option>c",
            "many": "<option>a<option selected>b<option selected>c<option>d",
        }

        def page(of: Callable[[str], str]) -> str:
            selects = [
                f"<select id='{name}'{' multiple' * (name == 'many')}>{of(name)}</select>"
                for name in lists
            ]
            return f"<p id='p'>{''.join(selects)}</p>"

        self.answers("/s", patch_elements(page(lambda name: lists[name])))
        self.show(page(lambda name: "") + "<b id='b' data-on:click=\"@get('/s')\"></b>")
        self.do("byId('b').click()")
        chosen = "Array.from(document.querySelectorAll('select'), (s) =>"
        self.see(
            f"{chosen} Array.from(s.selectedOptions, (o) => o.label).join(''))",
            ["a", "b", "b", "bc"],
        )

    def test_what_one_attribute_writes_stays_when_another_begins(self) -> None:
        style = 'data-style="{color: `rgb(1, 2, 3)`}"'
        self.answers("/s", patch_elements(f"<p id='p' {style} data-show='$on'></p>"))
        self.show(f"<p id='p' {style}></p><b id='b' data-on:click=\"@get('/s')\"></b>")
        self.see("byId('p').style.color", "rgb(1, 2, 3)")
        self.do("byId('b').click()")
        self.see("[byId('p').style.display, byId('p').style.color]", ["none", "rgb(1, 2, 3)"])

    # -- streams that end, break, are cancelled or hidden

    def test_a_stream_that_ends_is_opened_again_only_with_always(self) -> None:
        self.answers("/end", patch_signals({"ended": 1}))
        self.answers(
            "/again",
            patch_event("patch-signals", 'signals {"n": 1}', id="41", retry=20),
            patch_event("patch-signals", 'signals {"n": 2}', id="42", retry=20),
            Reply(status=204),
        )
        self.show(
            """<b id="b" data-signals="{a: 1}" data-on:click="@get('/end')"></b>
            <b id="c" data-on:click="@get('/again', {retry: 'always'}); $a = 2"></b>"""
        )
        self.do("byId('b').click()")
        self.see("fetches.at(-1)", "finished")
        self.do("fetches.length = 0, byId('c').click()")
        three = self.stage.requests("/again", 3)
        self.see("fetches.at(-1)", "finished")
        self.assertEqual(
            [asked.headers.get("last-event-id") for asked in three], [None, "41", "42"]
        )
        first = {"a": 1, "ended": 1}
        wanted = [first, {"a": 2, "ended": 1, "n": 1}, {"a": 2, "ended": 1, "n": 2}]
        wanted = wanted if self.retries_send_todays_signals else [first] * 3
        self.assertEqual([asked.signals for asked in three], wanted)
        self.assertEqual(len(self.stage.requests("/end")), 1)

    def test_a_broken_connection_is_retried(self) -> None:
        self.expected_problems += ["Failed to load resource", "network error", "failed to reach"]
        broken = Reply(patch_signals({"n": 1}), then="break")
        self.answers("/auto", broken, broken, patch_signals({"n": 2}))
        self.show("<b id='b' data-on:click=\"@get('/auto', {retryInterval: 20})\"></b>")
        self.do("byId('b').click()")
        self.see("own().n", 2)
        self.see("fetches.at(-1)", "finished")
        self.now("fetches.filter((type) => type === 'retrying').length", 2)

    def test_errors_are_retried_when_asked_for(self) -> None:
        self.expected_problems.append("Failed to load resource")
        bad = Reply("bad", "text/plain", 503)
        self.answers("/error", bad, bad, patch_signals({"n": 1}))
        self.answers("/auto", bad)
        self.show(
            """<b id="b" data-on:click="@get('/auto')"></b>
            <b id="c" data-on:click="@get('/error', {retry: 'error', retryInterval: 20})"></b>"""
        )
        self.do("byId('b').click()")
        self.see("fetches", ["started", "error", "finished"])
        self.do("byId('c').click()")
        self.see("own()", {"n": 1})
        self.assertEqual(len(self.stage.requests("/error")), 3)
        self.assertEqual(len(self.stage.requests("/auto")), 1)

    def test_waits_double_up_to_thirty_seconds_and_end_after_ten_tries(self) -> None:
        self.expected_problems += ["ailed to", "FetchFailed", "pocket client"]
        self.show(
            "<b id='b' data-indicator='busy' data-on:click=\"@get('/refused')\"></b>", clock=True
        )
        self.page.route("**/refused*", lambda route: route.abort())
        self.do("byId('b').click()")
        for tries, seconds in enumerate((1, 2, 4, 8, 16, 30, 30, 30, 30, 30), 1):
            self.see("fetches.filter((type) => type === 'retrying').length", tries)
            # Not before half of the time is over, and not after all of it.
            self.page.clock.run_for(seconds * 500)
            self.now("fetches.filter((type) => type === 'retrying').length", tries)
            self.page.clock.run_for(seconds * 500)
        self.see("fetches.includes('retries-failed')", True)
        self.see("own().busy", False)

    def test_the_same_request_again_cancels_the_one_under_way(self) -> None:
        for path in ("/a", "/b", "/c", "/d"):
            self.answers(path, Reply(patch_signals({path[1]: 1}), then="hold"))
        self.show(
            """<b id="a" data-on:click="@get('/a')"></b><b id="b" data-on:click="@get('/b')"></b>
            <b id="c" data-on:click="@get('/c', {requestCancellation: 'disabled'})"></b>
            <b id="d" data-on:click="window.own0 = new AbortController();
              @get('/d', {requestCancellation: own0})"></b>"""
        )
        self.do("[...'abcd'].forEach((id) => byId(id).click())")
        self.see("own()", {"a": 1, "b": 1, "c": 1, "d": 1})
        self.do("byId('c').click(), byId('a').click()")
        self.stage.requests("/a", 2)
        self.stage.requests("/c", 2)
        self.stage.wait_for(lambda: bool(self.stage.gone), "the first of two to be cancelled")
        self.assertEqual(self.stage.gone, ["/a"])
        self.do("own0.abort()")
        self.stage.wait_for(lambda: len(self.stage.gone) > 1, "the end of /d")
        self.assertEqual(self.stage.gone, ["/a", "/d"])

    def test_a_hidden_tab_closes_its_get_streams_until_it_is_shown(self) -> None:
        for path in ("/get", "/open", "/post"):
            self.answers(path, Reply(patch_signals({path[1:]: 1}), then="hold"))
        self.show(
            """<b id="b" data-on:click="@get('/get')"></b>
            <b id="c" data-on:click="@post('/post')"></b>
            <b id="d" data-on:click="@get('/open', {openWhenHidden: true})"></b>
            <script>const look = (hidden) => {
              Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });
              Object.defineProperty(document, 'visibilityState',
                { value: hidden ? 'hidden' : 'visible', configurable: true });
              document.dispatchEvent(new Event('visibilitychange'));
            }</script>"""
        )
        self.do("[...'bcd'].forEach((id) => byId(id).click())")
        self.see("own()", {"get": 1, "open": 1, "post": 1})
        self.do("look(true)")
        self.stage.wait_for(lambda: "/get" in self.stage.gone, "the stream to be closed")
        self.do("look(false)")
        self.stage.requests("/get", 2)
        self.assertEqual(self.stage.gone, ["/get"])
        self.assertEqual(len(self.stage.requests("/open")), 1)
        self.assertEqual(len(self.stage.requests("/post")), 1)


def hostile(value: object) -> str:
    """JSON as stario's data.signals writes it: nothing in it means anything to a client."""
    text = json.dumps(value)
    return text.replace("@", "\\u0040").replace("$", "\\u0024").replace(";", "\\u003b")


class TestOfficialClient(ClientPromises, unittest.TestCase):
    """The promises, held by Datastar's own bundle."""

    retries_send_todays_signals = False

    @classmethod
    def client_source(cls) -> bytes:
        if not OFFICIAL_CLIENT or not Path(OFFICIAL_CLIENT).is_file():
            raise unittest.SkipTest("STARIO_OFFICIAL_CLIENT does not name Datastar's bundle")
        return Path(OFFICIAL_CLIENT).read_bytes()


class TestPocketClient(ClientPromises, unittest.TestCase):
    """The promises, held by the pocket client; and what it does better."""

    retries_send_todays_signals = True

    @classmethod
    def client_source(cls) -> bytes:
        path = os.environ.get("STARIO_POCKET_CLIENT")  # a copy that is being worked on
        return Path(path).read_bytes() if path else POCKET_CLIENT.encode()

    def test_a_throwing_handler_stops_nothing(self) -> None:
        self.expected_problems += ["pocket client: data-"]
        self.show(
            """<div data-signals="{a: 1}" data-init="nobody.home()"></div><p data-text="$a +"></p>
            <p data-effect="nobody.home($a)"></p><p id="p" data-text="$a"></p>
            <b id="b" data-on:click="$a = 2; nobody.home(); $a = 3"></b>
            <b id="c" data-on:click="$a = 4; @nobody('x')"></b>
            <b id="d" data-on:click="$a++"></b>"""
        )
        self.do("byId('b').click()")
        self.see("byId('p').textContent", "2")
        self.do("byId('c').click(), byId('d').click()")
        self.see("byId('p').textContent", "5")
        self.assertTrue(any("data-text" in problem for problem in self.problems))

    def test_a_request_without_an_address_is_an_error(self) -> None:
        self.expected_problems += ["pocket client: data-on:click=\"@post('')\": Error"]
        self.show("<b id='b' data-on:click=\"@post('')\"></b>")
        self.do("byId('b').click()")
        self.see("fetches", [])
        self.assertEqual(len(self.problems), 1)

    def test_the_name_of_a_signal_may_have_letters_beyond_ascii(self) -> None:
        self.show("""<p id="p" data-signals="{größe: {maß: 1}}" data-text="$größe.maß + 1"></p>""")
        self.see("byId('p').textContent", "2")

    def test_a_tab_that_is_hidden_and_shown_in_quick_succession_has_one_stream(self) -> None:
        fields = {"cache-control": "no-cache"}  # like any stream: Chrome may store it
        self.answers("/get", Reply(patch_signals({"get": 1}), headers=fields, then="hold"))
        self.show(
            """<b id="b" data-on:click="@get('/get')"></b>
            <b id="c" data-on:click="@post('/done')"></b>
            <script>const look = (hidden) => {
              Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });
              document.dispatchEvent(new Event('visibilitychange'));
            }</script>"""
        )
        self.do("byId('b').click()")
        self.see("own()", {"get": 1})
        self.do(
            """const again = (left) => {
              look(true), look(false);
              if (left) setTimeout(again, 8, left - 1);
              else byId('c').click();
            };
            again(9)"""
        )
        self.stage.requests("/done")
        # Like an EventSource, it bypasses the cache, which would keep a stream to share it.
        asked = self.stage.requests("/get")[0]
        self.assertEqual(asked.headers.get("cache-control"), "no-cache")
        opened = self.stage.requests
        self.stage.wait_for(lambda: len(opened("/get")) - len(self.stage.gone) == 1, "one stream")

    def test_a_file_in_an_urlencoded_form_is_sent_as_its_name(self) -> None:
        self.show(
            """<form><input id="f" type="file" name="f"><input type="file" name="none">
            <button id="b" data-on:click="@post('/s', {contentType: 'form'})"></button></form>"""
        )
        self.do(
            "const files = new DataTransfer(); files.items.add(new File(['x'], 'ä.txt')); "
            "byId('f').files = files.files; byId('b').click()"
        )
        fields = parse_qs(self.stage.requests("/s")[0].body, keep_blank_values=True)
        self.assertEqual(fields, {"f": ["ä.txt"], "none": [""]})

    def test_a_click_inside_a_button_loads_no_page(self) -> None:
        self.show(
            """<form action="/gone"><input name="a" value="1"><button><b id="b"
              data-on:click="@post('/s', {contentType: 'form'})">x</b></button></form>"""
        )
        self.do("document.onsubmit = () => note('submit'); null")
        self.do("byId('b').click()")
        self.now("count", {})
        self.assertEqual(self.stage.requests("/s")[0].body, "a=1")

    def test_what_an_attribute_showed_gives_way_to_the_server(self) -> None:
        fixed = "<p id='p' style='color: blue' class='on {0}' title='{0}'>{0}</p>"
        self.answers("/s", patch_elements(fixed.format("own")), patch_elements(fixed.format("two")))
        self.show(
            """<p id="p" data-attr:title="$on" data-class:on="$on" data-style:color="'red'"></p>
            <i data-signals="{on: true}"></i><b id="b" data-on:click="@get('/s')"></b>"""
        )
        for wanted in ("own", "two"):
            self.do("byId('b').click()")
            self.see("byId('p').textContent", wanted)
            self.now("byId('p').outerHTML.replaceAll('\"', \"'\")", fixed.format(wanted))

    def test_what_is_not_morphed_keeps_its_elements(self) -> None:
        taken = '<p><i id="x">new</i></p><div data-ignore-morph></div>'
        self.answers(
            "/s",
            patch_elements(f'<div id="d">{taken}</div>')
            + patch_elements("in", "selector #d > div > i", "mode inner")
            + patch_elements("<b>1</b>", "selector #d > div > i", "mode append"),
        )
        self.show(
            """<div id="d"><div data-ignore-morph><i id="x">mine</i></div></div>
            <b id="b" data-on:click="@get('/s')"></b>"""
        )
        self.do("byId('b').click()")
        self.see(
            "[...document.querySelectorAll('#x')].map((el) => el.innerHTML)",
            ["new", "mine<b>1</b>"],
        )

    def test_arguments_that_throw_are_named(self) -> None:
        self.expected_problems += ['pocket client: data-on:click="@get($a.x.y)": TypeError']
        self.show("<b id='b' data-signals='{a: 1}' data-on:click='@get($a.x.y)'></b>")
        self.do("byId('b').click()")
        self.see("fetches", [])
        self.assertEqual(len(self.problems), 1)

    def test_what_is_in_a_template_is_morphed(self) -> None:
        view = "<div id='d'><template id='t'><p>{}</p></template></div>"
        self.answers("/s", patch_elements(view.format("new")))
        self.show(view.format("old") + "<b id='b' data-on:click=\"@get('/s')\"></b>")
        self.do("byId('b').click()")
        self.see("byId('t').innerHTML", "<p>new</p>")

    def test_what_it_does_not_know_is_said(self) -> None:
        self.expected_problems += ["pocket client: "]
        self.show(
            """<p data-on-raf="1"></p><p data-on:click__sometimes="1"></p><p data-foo:bar="1"></p>
            <p data-persist></p><p data-on:click="@clipboard('x')"></p><p data-own="mine"></p>"""
        )
        for name in ("data-on-raf", "__sometimes", "data-foo:bar", "data-persist", "@clipboard"):
            self.assertTrue(any(name in problem for problem in self.problems), name)
        self.assertEqual(len(self.problems), 5)

    def test_string_literals_are_left_alone(self) -> None:
        texts = [
            "me@home(now)",
            "$user",
            "a; b",
            "ends in \\",
            "it's",
            'say "hi"',
            "// no",
            "/* no",
        ]
        self.answers("/echo")
        literal = html.escape(json.dumps(texts, ensure_ascii=False))
        self.show(
            f"""<div data-signals="{{texts: {literal}}}"></div>
            <p id="p" data-text="[`$a ${{'$b' + `@c(${{1 + 1}})`}}; ;`, /[/$a;]+/.test('$a/;'),
              8 / 2 / 1] // ; $x"></p>
            <p id="q" data-text="if ($texts.length) return 'an if; ' + $texts[0]"></p>"""
        )
        self.see("own()", {"texts": texts})
        self.now("byId('p').textContent", "$a $b@c(2); ;,true,4")
        self.now("byId('q').textContent", "an if; me@home(now)")

    def test_computed_of_computed_is_current(self) -> None:
        self.show(
            """<div data-signals="{a: 1}" data-computed:twice="$a * 2"
              data-computed:more="$twice + 1" data-computed:is-odd="$more % 2"></div>
            <p id="p" data-text="$more"></p><p data-effect="made.push($isOdd)"></p>
            <b id="b" data-on:click="$a++; note($more)"></b>"""
        )
        self.do("byId('b').click()")
        self.see("byId('p').textContent", "5")
        self.now("[made, count]", [[1], {"5": 1}])

    def test_moved_elements_are_not_started_again(self) -> None:
        self.answers(
            "/s",
            patch_elements(
                "<div id='d'><p><b id='m' data-init=\"note('init')\"></b></p>"
                "<script>note('ran')</script></div>"
            ),
        )
        self.show(
            """<div id="d"><b id="m" data-init="note('init')"></b></div>
            <b id="b" data-on:click="@get('/s')"></b>"""
        )
        self.do("byId('b').click()")
        self.see("byId('m').parentNode.localName", "p")
        self.do("document.body.append(byId('m'))")
        self.see("fetches.at(-1)", "finished")
        self.now("count", {"init": 1, "ran": 1})

    def test_moved_elements_keep_the_focus_in_older_browsers(self) -> None:
        self.answers("/s", patch_elements("<div id='d'><p></p><p><input id='i'></p></div>"))
        self.show(
            """<div id="d"><input id="i"></div><b id="b" data-on:click="@get('/s')"></b>
            <script>delete Element.prototype.moveBefore</script>"""
        )
        self.do("byId('i').value = 'typed', byId('i').focus(), byId('i').setSelectionRange(1, 3)")
        self.do("byId('b').click()")
        self.see("byId('i').parentNode.localName", "p")
        self.now("[document.activeElement.id, byId('i').value]", ["i", "typed"])
        self.now("[byId('i').selectionStart, byId('i').selectionEnd]", [1, 3])
        # A number's field has no selection that could be put back.
        self.do("byId('i').setAttribute('type', 'number'), byId('d').prepend(byId('i'))")
        self.do("byId('i').focus(), byId('b').click()")
        self.see("byId('i').parentNode.localName", "p")
        self.now("document.activeElement.id", "i")

    def test_what_the_style_attribute_says_comes_back_after_a_morph(self) -> None:
        markup = "<p id='p' title='{}' style='color: red' data-style:color=\"$on && 'blue'\"></p>"
        self.answers("/s", patch_elements(markup.format("new")))
        self.show(
            f"""<i data-signals="{{on: true}}"></i>{markup.format("old")}
            <b id="b" data-on:click="@get('/s')"></b><b id="c" data-on:click="$on = false"></b>"""
        )
        self.do("byId('b').click()")
        self.see("[byId('p').title, byId('p').style.color]", ["new", "blue"])
        self.do("byId('c').click()")
        self.see("byId('p').style.color", "red")

    def test_effects_without_end_are_stopped(self) -> None:
        self.expected_problems += ["pocket client: "]
        self.show(
            """<i data-signals="{a: 0, b: 0}"></i><p data-effect="$a = $b + 1"></p>
            <p data-effect="$b = $a + 1"></p><p data-class="{'': $a, 'a b': 1}"></p>
            <p data-attr="{'1 2': $a}"></p><p id="p" data-text="$c"></p>
            <b id="b" data-on:click="$c = 'alive'"></b>"""
        )
        self.assertTrue(any("without end" in problem for problem in self.problems))
        self.do("byId('b').click()")
        self.see("byId('p').textContent", "alive")

    def test_null_removes_a_signal(self) -> None:
        self.show(
            """<i data-signals="{a: 1, b: {c: 2}, d: 3, e: [1, null]}"></i>
            <i data-signals="{a: null}"></i><b id="b" data-on:click="$d = null"></b>"""
        )
        self.do("byId('b').click()")
        self.see("own()", {"b": {"c": 2}, "e": [1, None]})

    def test_no_signal_reaches_the_prototype_of_all_objects(self) -> None:
        self.answers(
            "/s", patch_event("patch-signals", 'signals {"__proto__": {"bad": 1}, "b": 2}')
        )
        self.show("<b id='b' data-signals=\"{a: 1}\" data-on:click=\"@get('/s')\"></b>")
        self.do("byId('b').click()")
        self.see("own()", {"a": 1, "b": 2})
        self.now("({}).bad === undefined", True)

    def test_svg_patches_take_several_elements(self) -> None:
        self.answers(
            "/s",
            patch_elements(
                "<rect/><circle/><path/>", "selector #g", "mode append", "namespace svg"
            ),
        )
        self.show("<svg><g id='g'></g></svg><b id='b' data-on:click=\"@get('/s')\"></b>")
        self.do("byId('b').click()")
        self.see("[...byId('g').children].map((el) => el.localName)", ["rect", "circle", "path"])

    def test_retries_end(self) -> None:
        self.expected_problems += ["Failed to load resource", "pocket client: data-on:click"]
        self.answers("/error", Reply("bad", "text/plain", 503))
        self.answers("/never", Reply(patch_signals({"n": 1}), then="break"))
        self.show(
            """<b id="b" data-indicator="busy" data-on:click="@get('/error',
              {retry: 'error', retryInterval: 5, retryMaxCount: 2})"></b>
            <b id="c" data-on:click="@get('/never', {retry: 'never'})"></b>
            <b id="d" data-on:click="@get('/js')"></b>"""
        )
        self.do("byId('b').click()")
        self.see("own()", {"busy": False})
        self.see("fetches.slice(-3)", ["error", "retries-failed", "finished"])
        self.assertEqual(len(self.stage.requests("/error")), 3)
        self.do("byId('c').click()")
        self.see("fetches.at(-1)", "finished")
        self.assertEqual(len(self.stage.requests("/never")), 1)
        self.answers("/js", Reply("note('ran')", "text/javascript"))
        self.do("byId('d').click()")
        self.see("[fetches.slice(-2), count.ran]", [["started", "finished"], 1])

    def test_requests_are_cancelled_by_method_and_url(self) -> None:
        for path in ("/a", "/b"):
            self.answers(path, Reply(patch_signals({path[1]: 1}), then="hold"))
        self.show(
            """<b id="one" data-on:click="@get('/a'); @get('/b')" data-indicator="busy"></b>
            <b id="two" data-on:click="@get('/a')"></b>"""
        )
        self.do("byId('one').click()")
        self.see("own()", {"busy": True, "a": 1, "b": 1})
        self.do("byId('two').click()")
        self.stage.wait_for(lambda: bool(self.stage.gone), "the first of two to be cancelled")
        self.assertEqual(self.stage.gone, ["/a"])
        self.see("own().busy", True)

    def test_each_attempt_is_built_when_it_is_sent(self) -> None:
        self.expected_problems.append("Failed to load resource")
        bad = Reply("bad", "text/plain", 503)
        self.answers("/n0", bad)
        self.answers("/n1", bad)
        self.answers("/n2", patch_signals({"done": True}))
        options = "{retry: 'error', retryInterval: 20, headers: {try: $n}, payload: {n: $n}}"
        self.show(
            f"""<b id="b" data-signals="{{n: 0}}" data-on:click="@post(`/n${{$n}}`, {options}); 5"
            data-on:datastar-fetch="evt.detail.type === 'error' && $n++"></b>"""
        )
        self.do("byId('b').click()")
        self.see("own().done", True)
        for n in range(3):
            (sent,) = self.stage.requests(f"/n{n}")
            self.assertEqual((sent.headers["try"], json.loads(sent.body)), (str(n), {"n": n}))

    def test_a_key_with_a_dot_is_a_name_of_its_own(self) -> None:
        self.show("""<p id="p" data-signals="{'a.b': 1, c: {'d.e': 2}}"></p>""")
        self.see("own()", {"a.b": 1, "c": {"d.e": 2}})

    def test_radios_of_which_none_is_checked_are_empty(self) -> None:
        radios = "".join(f'<input type="radio" data-bind="r" value="{value}">' for value in "xy")
        self.show(f"""{radios}<p id="p" data-text="$r ? 'some' : 'none'"></p>""")
        self.see("byId('p').textContent", "none")
        self.now("own()", {"r": ""})

    def test_fields_of_one_list_that_change_places_keep_their_entries(self) -> None:
        one, two = (f'<input id="{name}" data-bind="names" value="{name}">' for name in "ab")
        self.answers("/s", patch_elements(f'<div id="d">{two}{one}</div>'))
        go = """<b id="go" data-on:click="@get('/s')"></b>"""
        self.show(f"""<p data-signals="{{names: []}}"></p><div id="d">{one}{two}</div>{go}""")
        self.do("type('a', 'Ada'), byId('go').click()")
        self.see("byId('d').firstElementChild.id", "b")
        self.do("type('b', 'Bob')")
        self.see("own()", {"names": ["Ada", "Bob"]})
        self.now("[byId('a').value, byId('b').value]", ["Ada", "Bob"])

    def test_a_style_that_a_script_writes_while_its_entry_is_false_stays(self) -> None:
        self.show(
            """<p id="p" style="color: red" data-signals="{on: true, n: 0}"
              data-style="{color: $on &amp;&amp; 'blue', width: $n + 'px'}"></p>
            <b id="b" data-on:click="$on = false"></b><i id="i" data-on:click="$n = 3"></i>"""
        )
        self.do("byId('b').click()")
        self.see("byId('p').style.color", "red")
        self.do("byId('p').style.color = 'green', byId('i').click()")
        self.see("byId('p').style.width", "3px")
        self.now("byId('p').style.color", "green")

    def test_what_a_morph_takes_out_of_data_ignore_does_not_start(self) -> None:
        shown = """<div id="d"><p id="p" data-text="'changed'">kept</p></div><i id="i">new</i>"""
        self.answers("/s", patch_elements(shown))
        self.show(
            """<div id="d" data-ignore><p id="p" data-text="'changed'">kept</p></div>
            <i id="i">old</i><b id="b" data-on:click="@get('/s')"></b>"""
        )
        self.do("byId('b').click()")
        self.see("byId('i').textContent", "new")
        self.now("byId('p').textContent", "kept")

    def test_each_new_attempt_is_told_to_the_document(self) -> None:
        retry = "{retry: 'always', retryInterval: 5}"
        self.answers("/again", patch_signals({"n": 1}), Reply(status=204))
        self.show(f'<b id="b" data-on:click="@get(`/again`, {retry})"></b>')
        self.do("byId('b').click()")
        self.see("fetches.at(-1)", "finished")
        wanted = ["started", "datastar-patch-signals", "retrying", "finished"]
        self.now("fetches", wanted)

    def test_a_field_is_taken_before_the_page_hears_of_its_input(self) -> None:
        fields = """<input id="c" type="checkbox" data-bind="c">
            <input id="r" type="radio" data-bind="r" value="x">"""
        self.show(f'<p data-on:input="note(`${{$c}} ${{$r}}`)">{fields}</p>')
        self.do("byId('c').click(), byId('r').click()")
        self.see("count", {"true ": 1, "true x": 1})

    def test_the_clients_own_events_are_heard_wherever_they_are_listened_for(self) -> None:
        self.answers("/s", patch_signals({"a": 1}))
        listeners = [
            f"""<i data-on:datastar-{event}{mods}="$_heard['{event}{mods}'] = true"></i>"""
            for event in ("fetch", "signal-patch")
            for mods in ("", "__document", "__window", "__window__once", "__outside")
        ]
        self.show(
            f"""<b id="b" data-signals="{{_heard: {{}}}}" data-on:click="@get('/s')"></b>
            {"".join(listeners)}"""
        )
        self.do("byId('b').click()")
        self.see("Object.keys(own()._heard).length", len(listeners))

    def test_another_form_is_sent_by_its_selector(self) -> None:
        self.answers("/s", patch_signals({"done": True}))
        self.show(
            """<form><input name="a" value="1">
            <button id="b" type="button" data-on:click="@post('/s',
              {contentType: 'form', selector: '#other'})"></button></form>
            <form id="other"><input name="b" value="2"></form>"""
        )
        self.do("byId('b').click()")
        self.see("own().done", True)
        self.assertEqual(self.stage.requests("/s")[0].body, "b=2")

    def test_a_select_shows_its_signal_when_a_group_of_options_comes(self) -> None:
        self.answers("/s", patch_elements("<optgroup id='g'><option>a<option>b</optgroup>"))
        self.show(
            """<i data-signals="{s: 'b'}"></i><b id="b" data-on:click="@get('/s')"></b>
            <select id="s" data-bind="s"><optgroup id="g"><option>a</optgroup></select>"""
        )
        self.do("byId('b').click()")
        self.see("byId('s').options.length", 2)
        self.see("[byId('s').value, own().s]", ["b", "b"])

    def test_a_button_outside_of_its_form_sends_it(self) -> None:
        self.answers("/s", patch_signals({"done": True}))
        self.show(
            """<form id="f"><input name="form" value="1"></form><form><button id="b" form="f"
              name="go" value="now" data-on:click="@post('/s', {contentType: 'form'})">
            </button></form>"""
        )
        self.do("byId('b').click()")
        self.see("own().done", True)
        self.assertEqual(self.stage.requests("/s")[0].body, "form=1&go=now")

    def test_what_the_browser_restores_is_taken_when_a_page_is_shown_again(self) -> None:
        self.show("<input id='i' data-bind='a' value='1'><input data-bind='b' value='2'>")
        self.see("own()", {"a": "1", "b": "2"})
        self.do("byId('i').value = 'restored'")
        self.now("own().a", "1")
        self.do("dispatchEvent(new PageTransitionEvent('pageshow', {persisted: true}))")
        self.see("own()", {"a": "restored", "b": "2"})

    def test_what_a_patch_does_is_no_click(self) -> None:
        form = "<form id='f' data-on:change=\"note('heard')\" data-on:input=\"note('heard')\">"
        form += "<select id='s' data-bind='s'><option {0}>a<option {1}>b</select>"
        form += (
            "<textarea id='t' data-bind='t'>{2}</textarea><input type='radio' {1} id='r'></form>"
        )
        self.answers("/s", patch_elements(form.format("", "checked selected", "new")))
        self.show(
            form.format("selected", "", "old") + "<b id='b' data-on:click=\"@get('/s')\"></b>"
        )
        self.do("byId('b').click()")
        self.see("own()", {"s": "b", "t": "new"})
        self.see("fetches.at(-1)", "finished")
        self.now("[count.heard ?? 0, byId('r').checked]", [0, True])

    def test_a_forms_fields_hide_nothing(self) -> None:
        names = "id attributes closest getAttribute children childNodes parentNode nodeType remove"
        names += " hasAttribute querySelectorAll isConnected localName style append contains"
        names += " classList firstChild nextSibling insertBefore textContent type addEventListener"
        fields = "".join(f"<input name='{name}'>" for name in names.split())
        form = "<form id='f' class='{0}' data-show='$on' data-class:big='$on' "
        form += f"data-on:ping__outside=\"note('ping')\">{fields}<i>{{0}}</i></form>"
        self.answers(
            "/s",
            patch_elements(f"<div id='d'>{form.format('new')}</div>")
            + patch_elements("<u id='u'></u>", "selector #f", "mode before")
            + patch_elements("<u></u>", "selector #f", "mode append")
            + patch_elements(form.format("last"))
            + patch_elements("", "selector #f", "mode remove"),
        )
        self.show(
            f"""<i data-signals="{{on: true}}"></i><div id="d">{form.format("old")}</div>
            <b id="b" data-on:click="@get('/s')"></b>"""
        )
        self.do("window.f0 = byId('f'), null")
        self.do("document.body.dispatchEvent(new Event('ping', { bubbles: true }))")
        self.see("count.ping", 1)
        self.do("byId('b').click()")
        self.see("byId('d').innerHTML", '<u id="u"></u>')
        self.do("document.body.dispatchEvent(new Event('ping', { bubbles: true }))")
        self.now(
            "[count.ping, HTMLElement.prototype.getAttribute.call(f0, 'class')]", [1, "last big"]
        )

    def test_a_pages_images_hide_nothing(self) -> None:
        names = "querySelector querySelectorAll body head activeElement createElement"
        names += " addEventListener baseURI documentElement dispatchEvent readyState"
        images = "".join(f"<img name='{name}'>" for name in names.split())
        self.answers("/s", patch_elements("<p id='p'>new</p>", "useViewTransition true"))
        self.show(f"{images}<p id='p'>old</p><b id='b' data-on:click=\"@get('/s')\"></b>")
        self.do("byId('b').click()")
        self.see("byId('p').textContent", "new")

    def test_thousands_of_effects_run_after_one_patch(self) -> None:
        self.answers("/s", patch_signals({f"s{n}": 1 for n in range(5000)}))
        shown = "".join(f"<i data-text='$s{n}'></i>" for n in range(5000))
        self.show(f"{shown}<b id='b' data-on:click=\"@get('/s', {{payload: 0}})\"></b>")
        self.do("byId('b').click()")
        self.see("[...document.querySelectorAll('i')].every((i) => i.textContent === '1')", True)

    def test_a_list_that_was_cut_short_grows_without_holes(self) -> None:
        box = "<input type='checkbox' id='c{0}' value='v{0}' data-bind='c'>"
        self.show(
            f"""<i data-signals='{{"c": ["v1", "", "v3"]}}'></i>
            {"".join(box.format(n) for n in (1, 2, 3))}
            <b id="b" data-on:click="$c = ['v1']"></b>"""
        )
        self.do("byId('b').click(), byId('c3').click()")
        self.see("own()", {"c": ["v1", "", "v3"]})

    def test_what_is_half_typed_stays(self) -> None:
        field = "<input id='n' type='number' value='{0}' data-bind='n' title='{1}'>"
        word = "<input id='w' data-bind='w' value='{0}'>"
        self.answers(
            "/s",
            patch_elements(field.format("0", "new"))
            + patch_elements(word.format("theirs"))
            + patch_signals({"w": "ours", "n": 9}),
        )
        self.show(
            f"""{field.format("7", "old")}{word.format("w")}
            <b id="b" data-on:click="@get('/s')"></b><input id="e" type="number" data-bind="e">"""
        )
        self.see("[own().e, byId('e').value]", [0, ""])
        for keys, wanted in {"-": "", "": "9"}.items():
            self.page.focus("#n")
            self.page.keyboard.press("Control+A")
            self.page.keyboard.press("Backspace")
            self.page.keyboard.type(keys)
            self.do("byId('n').title = 'old', fetches.length = 0, byId('b').click()")
            self.see("fetches.at(-1)", "finished")
            self.now("[byId('n').value, byId('n').validity.badInput]", [wanted, bool(keys)])
        self.do("byId('n').value = ''")
        self.page.focus("#w")
        self.do(
            "byId('w').dispatchEvent(new CompositionEvent('compositionstart', {bubbles: true}))"
        )
        self.do("type('w', 'nih'), fetches.length = 0, byId('b').click()")
        self.see("fetches.at(-1)", "finished")
        self.now("byId('w').value", "nih")
        self.do("byId('w').dispatchEvent(new CompositionEvent('compositionend', {bubbles: true}))")
        self.do("byId('w').blur()")
        self.see("byId('w').value", "ours")

    def test_signals_named_like_what_objects_inherit(self) -> None:
        names = {"constructor": 1, "toString": 2, "hasOwnProperty": 3, "a.b": 4}
        self.answers("/s", patch_signals({"votes": names, "constructor": {"prototype": 5}}))
        self.show(
            """<p id="p" data-text="$votes.constructor + $votes.toString"></p>
            <input data-bind="constructor.name" value="x"><i data-signals="{votes: {}}"></i>
            <b id="b" data-on:click="@get('/s')"></b>"""
        )
        self.do("byId('b').click()")
        self.see("own().votes", names)
        self.see("byId('p').textContent", "3")
        self.now("own().constructor", {"name": "x", "prototype": 5})
        self.now("[typeof {}.constructor, Object.name, {}.prototype]", ["function", "Object", None])

    def test_lists_cut_short_and_keys_deleted_react(self) -> None:
        self.show(
            """<i data-signals="{list: [1, 2, 3], map: {a: 1, b: 2}}"></i>
            <p id="p" data-text="$list.join() + Object.keys($map).join('')"></p>
            <b id="b" data-on:click="$list.length = 1"></b>
            <b id="c" data-on:click="delete $map.a"></b>
            <b id="d" data-on:click="$list.pop()"></b>"""
        )
        for button, wanted in {"b": "1ab", "c": "1b", "d": "b"}.items():
            self.do(f"byId('{button}').click()")
            self.see("byId('p').textContent", wanted)

    def test_keepers_have_the_last_word(self) -> None:
        self.show(
            """<i data-signals="{on: true}"></i><p id="p" data-text="'mine'" data-class:c="$on"
              data-attr:title="'mine'" data-style:color="'#ff0000'" data-show="!$on"></p>"""
        )
        now = "[byId('p').textContent, byId('p').className, byId('p').title, "
        now += "byId('p').style.color, byId('p').style.display]"
        self.see(now, ["mine", "c", "mine", "rgb(255, 0, 0)", "none"])
        self.do("byId('p').innerHTML = '<b>x</b>', byId('p').className = 'other'")
        self.do("byId('p').title = 'other', byId('p').setAttribute('style', 'margin: 0px')")
        self.see(now, ["mine", "other c", "mine", "rgb(255, 0, 0)", "none"])
        self.now("byId('p').style.margin", "0px")
        self.do("byId('p').innerHTML = '<b>mine</b>'")  # the same text, and yet another content
        self.see("byId('p').innerHTML", "mine")

    def test_overrides_and_query(self) -> None:
        self.answers("/q", Reply("<li>1</li>", "text/html", headers={"datastar-mode": "inner"}))
        self.show(
            """<ul id="u" data-signals="{a: 1}"><li>0</li></ul><b id="b" data-on:click="@query('/q',
              {responseOverrides: {selector: '#u', mode: 'append'}})"></b>"""
        )
        self.do("byId('b').click()")
        self.see("byId('u').textContent", "01")
        asked = self.stage.requests("/q")[0]
        self.assertEqual((asked.method, asked.signals), ("QUERY", {"a": 1}))

    def test_bind_to_a_property_and_by_an_event(self) -> None:
        self.show(
            """<i data-signals="{open: true, t: 'a'}"></i>
            <details id="d" data-bind="open__" data-bind:open__prop.open__event.toggle></details>
            <x-field id="x" data-bind="t"></x-field>""".replace('data-bind="open__" ', "")
        )
        self.see("byId('d').open", True)
        self.do("byId('d').open = false")
        self.see("own().open", False)
        self.now("byId('x').getAttribute('value')", "a")
        self.do("byId('x').setAttribute('value', 'b')")
        self.do("byId('x').dispatchEvent(new Event('change'))")
        self.see("own().t", "b")

    def test_after_an_hour_of_patches_there_is_as_much_as_before(self) -> None:
        row = "<li id='r{0}' data-class:on='$n > {0}' data-on:click__window=\"$x = {0}\""
        row += " data-ref='e{0}'>"
        row += "<input data-bind='rows.f{0}'><b data-text='$n + {0}'></b>"
        row += "<i data-on-interval__duration.9s='$n' data-indicator='busy{0}'></i></li>"
        stream = "".join(
            patch_elements(f"<ul id='u'>{''.join(row.format(n + turn) for n in range(5))}</ul>")
            + patch_signals({"n": turn, "rows": {f"f{turn - 1}": None}, f"busy{turn - 1}": None})
            for turn in range(1, 200)
        )
        self.answers("/s", stream)
        self.watch(self.browser.new_page())
        self.show(
            """<i data-signals="{n: 0, x: 0}"></i><ul id="u"></ul>
            <b id="b" data-on:click="@get('/s')"></b>"""
        )
        session = self.page.context.new_cdp_session(self.page)
        session.send("Performance.enable")

        def counted() -> dict[str, float]:
            self.do("fetches.length = patches.length = 0, byId('b').click()")
            self.see("fetches.at(-1)", "finished")
            self.do("fetches.length = patches.length = 0")
            for _ in range(3):
                session.send("HeapProfiler.collectGarbage")
            metrics = session.send("Performance.getMetrics")["metrics"]
            return {each["name"]: each["value"] for each in metrics}

        counted()
        before = counted()
        for _ in range(4):
            after = counted()
        self.assertEqual(after["JSEventListeners"], before["JSEventListeners"])
        self.assertLess(after["Nodes"], before["Nodes"] + 100)
        self.assertLess(after["JSHeapUsedSize"], before["JSHeapUsedSize"] * 1.15)


# -- 32 and 33. The file as a page, an app to begin with


class TestReadingPage(AsyncTest):
    """Part 33: what `python stario.py` runs."""

    async def run_file(self, *arguments: str) -> int:
        """Run the file itself; gives the port that it listens at."""
        port = free_port()
        command = [sys.executable, "-u", stario.__file__, "--port", f"{port}", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.wait, 10)
        self.addCleanup(process.terminate)
        self.assertIn(f"http://127.0.0.1:{port}", process.stdout.readline())
        await within(until_listening(port))
        return port

    async def test_a_port_that_is_taken_is_one_sentence(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            done = subprocess.run(
                [sys.executable, stario.__file__, "--port", f"{port}"],
                capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
        self.assertRegex(done.stderr, r"\Astario: cannot listen on .* the port is taken\..*\n\Z")
        self.assertEqual(done.returncode, 1)

    async def test_alone_it_shows_a_counter_and_a_clock_that_all_tabs_share(self) -> None:
        port = await self.run_file()
        one, other, clicker = [await Peer.connect(port) for _ in range(3)]
        page = await within(one.get("/"))
        self.assertIn("0 clicks", page.text)
        await other.send("GET /live HTTP/1.1\r\nHost: test\r\n\r\n")
        await within(other.head())
        self.assertEqual((await within(clicker.get("/click", method="POST"))).status, 204)
        text = b""
        while b"1 clicks" not in text:
            text += await within(other.chunk())
        self.assertRegex(text.decode(), r"<h1>\d\d:\d\d:\d\d</h1>")

    def test_every_line_of_the_file_stands_in_one_row(self) -> None:
        source = Path(stario.__file__).read_text(encoding="utf-8")
        rows = stario._rows(source)
        numbers = [row.line for row in rows]
        self.assertEqual(numbers, sorted(set(numbers)))
        for row, after in itertools.pairwise(rows):
            self.assertEqual(len(row.prose) + len(row.code), after.line - row.line)
        lines = [text for row in rows for text in (*row.prose, *row.code)]
        words = re.findall(r"\w+", "\n".join(lines))
        self.assertEqual(sorted(words), sorted(re.findall(r"\w+", source)))

    def test_each_act_and_part_has_its_title(self) -> None:
        source = Path(stario.__file__).read_text(encoding="utf-8")
        titles = [row.title for row in stario._rows(source) if row.title]
        self.assertEqual(titles, re.findall(r"^# ={90,}\n# (\S.*)\n(?=#)", source, re.MULTILINE))
        self.assertGreater(len(titles), 30)

    def test_a_docstring_stands_beside_its_function_and_a_comment_beside_its_lines(self) -> None:
        source = textwrap.dedent(
            '''
            @decorated
            def one():
                """What it does.

                More of it.
                """
                return 1
            # About two.
            def two(): return "# no comment"
            '''
        )
        rows = [(row.prose, row.code) for row in stario._rows(source)]
        one = ["@decorated", "def one():", "    return 1"]
        self.assertEqual(
            rows[1:],
            [
                (["What it does.", "", "More of it.", ""], one),
                (["About two."], ['def two(): return "# no comment"', ""]),
            ],
        )

    def test_a_name_leads_to_its_definition_in_its_own_language(self) -> None:
        python = stario._Row(1, ["====", "1. One", "===="], ["size = 1", "print(size, bind)"])
        client = stario._Row(9, ["====", "2. Two (JavaScript)", "===="], ["const bind = size;"])
        page = stario._book_page([python, client])
        self.assertIn('(<a href="#size">size</a>, bind)', page)
        self.assertIn('<b id="bind">bind</b> = size;', page)

    async def test_the_examples_of_the_file_give_what_they_say(self) -> None:
        rows = stario._rows(Path(stario.__file__).read_text(encoding="utf-8"))
        examples = [row for row in rows if row.example]
        self.assertTrue(examples)
        for row in examples:
            _, target, begins = row.example
            async with TestClient(stario._example_app(row)) as client:
                with self.subTest(line=row.line):
                    answer = await client.get(target)
                    self.assertTrue(answer.text.startswith(begins), answer.text)

    async def test_as_a_page_its_names_are_links_and_its_examples_run(self) -> None:
        port = await self.run_file("--read")
        peer = await Peer.connect(port)
        page = (await within(peer.get("/"))).text
        ids = set(re.findall(r' id="([^"]*)"', page))
        links = set(re.findall(r' href="#([^"]+)"', page))
        self.assertEqual(
            {html.unescape(link) for link in links} - {html.unescape(i) for i in ids}, set()
        )
        self.assertIn("Router", links)
        run = re.search(r'<button value="(/\d+)/\?name=you">Run</button><output></output>', page)
        assert run
        answer = await within(peer.get(f"{run[1]}?name=you"))
        self.assertEqual((answer.status, answer.text), (200, "<p>Hello, you</p>"))
        self.assertEqual((await within(peer.get("/1"))).status, 404)

    @needs("playwright", CHROMIUM)
    def test_a_search_leaves_the_rows_and_titles_that_hold_the_words(self) -> None:
        parts = (("1. One", "size = 1"), ("2. Two", "print(size)"), ("3. Size", "x = 2"))
        rows = [
            stario._Row(n, ["====", *part[:1], "===="], [part[1]]) for n, part in enumerate(parts)
        ]
        book = stario._book_page(rows)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page()
            page.route(
                "http://book/", lambda route: route.fulfill(body=book, content_type="text/html")
            )
            page.goto("http://book/")
            for words, shown in (
                ("", [3, 3]),
                ("SIZE", [3, 1]),
                ("print(", [1, 0]),
                ("no", [0, 0]),
            ):
                page.fill("input", words)
                found = [page.locator(f"{kind}:visible").count() for kind in ("section", "nav a")]
                self.assertEqual(found, shown, words)
            browser.close()


class TestWithout(unittest.TestCase):
    """Part 33: a copy of the file without some of its parts."""

    # What can go, and what has to go with it.
    ROOMS = (
        "testclient", "forms", "assets,client", "compression,assets,client", "json", "rich",
        "sessions", "asgi", "redis", "reload", "development", "client", "read",
    )  # fmt: skip

    def copy(self, rooms: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, stario.__file__, "--without", rooms],
            capture_output=True, text=True, encoding="utf-8", check=False,
        )  # fmt: skip

    def check(self, rooms: str, *classes: str) -> None:
        """Run these tests against a copy, with Tiles beside it."""
        with tempfile.TemporaryDirectory() as folder:
            done = self.copy(rooms)
            self.assertEqual((done.stderr, done.returncode), ("", 0))
            Path(folder, "stario.py").write_text(done.stdout, encoding="utf-8")
            for name in ("test_stario.py", "tiles_app.py"):
                shutil.copy(Path(__file__).parent / name, folder)
            ran = subprocess.run(
                [sys.executable, "test_stario.py", *classes],
                cwd=folder, capture_output=True, text=True, check=False, timeout=300,
            )  # fmt: skip
            self.assertRegex(ran.stdout, r"[1-9]\d* passed, 0 failed", ran.stderr[-2000:])

    def module(self, rooms: str) -> Any:
        """The copy, as it was imported to see that it can be."""
        stario._without(set(rooms.split(",")))
        return sys.modules.pop("stario_copy")

    def test_each_room_can_go_and_the_rest_still_works(self) -> None:
        async def page_and_event(s: Any) -> tuple[str, bytes]:
            async def page(c: Any, w: Any) -> None:
                w.html(s.h.Html(s.h.Head(s.datastar_script()), s.h.Body(s.h.P("Hello"))))

            async def live(c: Any, w: Any) -> None:
                async for _ in w.alive(every=0.01):
                    w.patch(s.h.P({"id": "p"}, "Hello"))

            app = s.Stario()
            app.get("/", page)
            app.get("/live", live)
            async with connected(app) as peer:
                text = (await within(peer.get("/"))).text
                await peer.send(GET.replace("GET / ", "GET /live "))
                await within(peer.head())
                return text, await within(peer.chunk())

        for rooms in self.ROOMS:
            with self.subTest(rooms):
                text, event = asyncio.run(page_and_event(self.module(rooms)))
                self.assertIn("<p>Hello</p>", text)
                self.assertIn(b'data: elements <p id="p">Hello</p>', event)

    def test_tiles_runs_without_all_that_it_does_not_use(self) -> None:
        used = {"assets", "client", "compression", "json", "rich"}
        rooms = {room for rooms in self.ROOMS for room in rooms.split(",")} - used
        self.check(",".join(sorted(rooms)), "TestTiles.test_a_click_shows_in_all_tabs")

    def test_all_of_them_can_go(self) -> None:
        """What remains is tested by all tests of these classes that need no part that has gone."""
        rooms = {room for rooms in self.ROOMS for room in rooms.split(",")}
        self.check(
            ",".join(sorted(rooms)), "TestHtml", "TestRelay", "TestRequestLine", "TestBeginnings",
        )  # fmt: skip

    def test_the_readme_names_what_can_go_and_what_goes_with_it(self) -> None:
        table = README.read_text(encoding="utf-8").partition("| what goes with it |")[2]
        told: dict[str, set[str]] = {}
        for line in table.partition("\n\n")[0].split("\n")[2:]:
            names, _, others = line.strip("|").split("|")
            for name in re.findall(r"`(\w+)`", names):
                told[name] = {name, *re.findall(r"`(\w+)`", others)}
        self.assertEqual(told, {rooms.split(",")[0]: set(rooms.split(",")) for rooms in self.ROOMS})

    def test_what_another_part_needs_is_refused_by_name(self) -> None:
        for rooms, reason in (
            ("assets", "client needs Assets"),
            ("compression", "assets needs CompressionConfig"),
            ("router", "--without router: what can go is testclient, forms,"),
            ("", "what can go is"),
        ):
            with self.subTest(rooms):
                done = self.copy(rooms)
                self.assertEqual((done.stdout, done.returncode), ("", 1))
                self.assertIn(reason, done.stderr)
                self.assertNotIn("Traceback", done.stderr)

    def test_what_has_gone_says_so_when_it_is_asked_for(self) -> None:
        module = self.module("rich,sessions,redis,compression,assets,client")
        for name in ("RichTracer", "Session", "RedisRelay"):
            with self.subTest(name), self.assertRaises(module.StarioError) as raised:
                getattr(module, name)("")
            self.assertIn(f"{name} was left out of this copy", str(raised.exception))
        with self.assertRaisesRegex(module.StarioError, "CompressionConfig"):
            module.Stario(compression=9)


# -- The README, and type checkers


# What type checkers accept, and what they must not: each line with `# wrong` is to be refused.
TYPED = """
import dataclasses
from typing import assert_type
from stario import Context, Relay, Stario, Writer, at, data

@dataclasses.dataclass
class Form:
    name: str

async def handler(c: Context, w: Writer) -> None:
    assert_type(await c.signals(Form), Form)
    (await c.signals(Form)).nmae  # wrong
    w.patch("x", mode="inner", selector="#x")
    w.patch("x", mode="innner", selector="#x")  # wrong
    w.cookie("a", "b", samesite="strict")
    w.cookie("a", "b", samesite="strikt")  # wrong
    async for tick in w.alive(every=0.5):
        tick.anything  # wrong
    relay: Relay[str] = Relay()
    async for subject, text in w.alive(relay.subscribe("x", overflow="latest")):
        text.upper()
    relay.subscribe("x", overflow="newest")  # wrong
    at.post("/x", retry="never")
    at.post("/x", retry="neverr")  # wrong
    at.post("/x", retries=3)  # wrong
    data.on("click", "$x", once=True, debounce=0.5)
    data.on("click", "$x", debuonce=0.5)  # wrong
    assert_type(c.req.query.get("n", 0, type=int), int)

async def main(app: Stario) -> None:
    app.get("/", handler)
    app.get("/", main)  # wrong
    await app.serve(port=80, keep_alive_timeout=5, reload=True)
    await app.serve(prot=80)  # wrong
    async with app.running(max_buffer="1") as server:  # wrong
        server.url.upper()
"""


class TestTypes(unittest.TestCase):
    """Editors and type checkers say it first."""

    def _check(self, *command: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "typed.py")
            path.write_text(TYPED, encoding="utf-8")
            shutil.copy(stario.__file__, Path(folder, "stario.py"))
            done = subprocess.run(
                [sys.executable, "-m", *command, str(path)],
                capture_output=True, text=True, cwd=folder, timeout=110, check=False,
            )  # fmt: skip
        found = {int(n) for n in re.findall(r"typed\.py:(\d+):(?:\d+ -)? error", done.stdout)}
        wrong = {n for n, line in enumerate(TYPED.splitlines(), 1) if line.endswith("# wrong")}
        self.assertEqual(found, wrong, done.stdout + done.stderr)

    @needs("mypy")
    def test_mypy(self) -> None:
        self._check("mypy", "--strict", "--cache-dir=.cache")

    @needs("pyright")
    def test_pyright(self) -> None:
        self._check("pyright")


def blocks(language: str) -> Iterator[tuple[int, str]]:
    """The fenced blocks of a language, each with the line it begins at."""
    text = README.read_text(encoding="utf-8")
    for found in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, found.start()) + 2, found[1]


@unittest.skipUnless(README.is_file(), "README.md is not here")
class TestReadme(unittest.TestCase):
    """The README's snippets run, its excerpts are real, its tables name what is there."""

    text = README.read_text(encoding="utf-8") if README.is_file() else ""
    code = "\n".join(re.findall(r"`([^`]+)`", re.sub(r"(?ms)^```.*?^```$", "", text)))
    reference = re.sub(r"(?ms)^```.*?^```$", "", text).partition("\n## Reference\n")[2]
    reference = reference.partition("\n## ")[0]

    def test_every_program_runs(self) -> None:
        programs = [(n, code) for n, code in blocks("python") if not code.startswith("# ")]
        self.assertGreater(len(programs), 4)
        for line, code in programs:
            with self.subTest(line=line):
                compile(code, f"README.md:{line}", "exec")
                if "app.serve(" in code:
                    code = SERVE_ONCE + code
                result = subprocess.run(
                    [sys.executable, "-X", "utf8", "-W", "error", "-c", code],
                    cwd=HERE,
                    env={**os.environ, "PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1"},
                    capture_output=True,
                    text=True,
                    timeout=60,
                )
                self.assertEqual((result.returncode, result.stderr), (0, ""))

    def test_every_block_says_what_it_is(self) -> None:
        for line, code in blocks("python"):
            if code.startswith("# "):
                with self.subTest(line=line):
                    self.assertRegex(code, rf"\A(?:{EXCERPT}|# [a-z_]+\.py\n|# in a handler\n)")

    def test_excerpts_are_from_tiles(self) -> None:
        tiles = (HERE / "tiles_app.py").read_text(encoding="utf-8")
        excerpts = [(n, code) for n, code in blocks("python") if code.startswith(EXCERPT)]
        self.assertGreater(len(excerpts), 3)
        for line, code in excerpts:
            for piece in re.split(r"^ *\.\.\.\n", code.removeprefix(EXCERPT), flags=re.MULTILINE):
                with self.subTest(line=line, piece=piece):
                    self.assertIn("\n" + piece, "\n" + tiles)

    def test_every_public_name_is_told(self) -> None:
        for name in set(stario.__all__) - {"Carrier"}:  # for those who change the file
            with self.subTest(name=name):
                self.assertRegex(self.reference, rf"`[^`]*\b{name}\b[^`]*`")

    def test_every_method_is_told(self) -> None:
        objects = [
            stario.Context, stario.Writer, stario.Request, stario.Form, stario.Headers,
            stario.Relay, stario.Router, stario.Subscription, stario.Span, stario.Tracer,
            stario.TestClient, stario.ServerEvent, type(stario.data), type(stario.at),
        ]  # fmt: skip
        for kind in objects:
            for name, found in vars(kind).items():
                if not (name.startswith("_") or isinstance(found, stario._Elsewhere)):
                    with self.subTest(name=f"{kind.__name__}.{name}"):
                        self.assertTrue(re.search(rf"\b{name}\b", self.code), name)

    def test_every_attribute_that_is_written_exists(self) -> None:
        """`w.html`, `c.req.query`, `app.url` and so on, in the text, in tables and in programs."""
        whole = Path(stario.__file__).read_text(encoding="utf-8")
        # Of a table its last column: the first one may speak of other frameworks.
        lines = self.text.splitlines()
        ours = "\n".join(line.split("|")[-2] if line.startswith("|") else line for line in lines)
        owners = {
            "w": Writer, "c": Context, "c.req": stario.Request, "app": Stario, "relay": Relay,
            "data": type(stario.data), "at": type(stario.at), "client": TestClient,
        }  # fmt: skip
        for owner, kind in owners.items():
            written = set(
                re.findall(rf"(?<![\w.'/]){re.escape(owner)}\.([a-z]\w*)(?!\w*[/'])", ours)
            )
            written -= {"py", "lost", "back", "address"}  # app.py; names in a trace
            names = "|".join(base.__name__ for base in kind.__mro__[:-1])
            source = "".join(re.findall(rf"(?ms)^class (?:{names})\b.*?^(?=[^\s)])", whole))
            known = set(dir(kind)) | set(re.findall(r"self\.(\w+)", source))
            with self.subTest(owner=owner):
                self.assertGreater(len(written), 1)
                self.assertEqual(written - known, set())

    def test_methods_of_other_frameworks_are_answered(self) -> None:
        tables = self.text.partition("\n## Coming from elsewhere\n")[2].partition("\n## ")[0]
        theirs = "\n".join(re.findall(r"(?m)^\| (.*?) \|", tables))
        app = Stario()
        c = Context(app, cast("Any", None))
        owners = {"app": app, "c.span": app.tracer("x"), "c": c, "data": stario.data}
        names = re.findall(r"(?<![\w.])(app|c\.span|c|data)\.([a-z]\w*)", theirs)
        self.assertGreater(len(names), 9)
        for owner, name in names:
            with self.subTest(f"{owner}.{name}"):
                self.assertIn(name, dir(owners[owner]))  # so that it says what to write, or works

    @staticmethod
    def options() -> Iterator[tuple[str, set[str]]]:
        """Each public function, method and class that users call, with its optional parameters."""
        made_by_the_framework = {
            "Carrier",
            "Form",
            "Headers",
            "QueryParams",
            "SignalsError",
            "Span",
        }
        for name in stario.__all__:
            public = getattr(stario, name)
            kind = public if inspect.isclass(public) else type(public)
            if kind.__module__ == "stario":
                methods = inspect.getmembers(kind, inspect.isfunction)
                found = [(n, m) for n, m in methods if not n.startswith("_")]
            else:
                found = []
            if dataclasses.is_dataclass(public) or inspect.isfunction(public):
                found.append((name, public))  # type: ignore[arg-type]
            elif name not in made_by_the_framework:
                inits = [
                    vars(base)["__init__"] for base in kind.__mro__ if "__init__" in vars(base)
                ]
                found += [(name, init) for init in inits[:1] if inspect.isfunction(init)]
            for each, function in found:
                names: set[str] = set()
                for parameter in inspect.signature(function).parameters.values():
                    typed = re.match(r"Unpack\[(\w+)\]", str(parameter.annotation))
                    if typed:
                        kind = getattr(stario, typed[1])
                        names |= kind.__required_keys__ | kind.__optional_keys__
                    elif parameter.default is not parameter.empty:
                        names |= {parameter.name} - {"mapping"}  # of `js`, by its place only
                yield each, names

    def test_every_option_is_told_where_its_function_is(self) -> None:
        sections = [re.findall(r"`([^`]+)`", text) for text in self.reference.split("\n### ")]
        words = [set(re.findall(r"\w+", " ".join(pieces))) for pieces in sections]
        everything: set[str] = set()
        for name, options in self.options():
            told = set[str]().union(*(section for section in words if name in section))
            everything |= options
            with self.subTest(name=name):
                self.assertEqual(options - told, set())
        # And what is written there as an option is one, or of `TestClient.request`, or an example.
        others = {"body", "files", "form", "json", "signals", "TERM", "cellId", "show", "tail"}
        written = re.findall(r"(?<!\w)([a-zA-Z_]+)=", " ".join(" ".join(s) for s in sections))
        self.assertEqual(set(written) - everything - others, set())

    def test_the_limits_are_those_of_the_code(self) -> None:
        rows = dict(
            re.findall(r"^\| `(\w+)` \| ([\d,]+(?: KiB| MiB)?) \|", self.text, re.MULTILINE)
        )
        units = {"KiB": 1024, "MiB": 1024 * 1024}
        for field in dataclasses.fields(stario.Limits):
            number, _, unit = rows[field.name].partition(" ")
            told = int(number.replace(",", "")) * units.get(unit, 1)
            self.assertEqual(told, field.default, field.name)

    def test_every_option_of_the_server_is_told(self) -> None:
        names = set(inspect.signature(stario.Server).parameters) - {"app", "options"}
        names |= stario.ServerOptions.__annotations__.keys()
        for name in names:
            with self.subTest(name=name):
                self.assertTrue(re.search(rf"\b{name}\b", self.code), name)

    def test_signatures_are_those_of_the_code(self) -> None:
        signatures: dict[str, Callable[..., Any]] = {
            "max_age=None, expires=None, path=\"/\", domain=None, secure=False, httponly=False, "
            "samesite=\"lax\", partitioned=False": stario._cookie_line,
            "mode=\"outer\", selector=None, namespace=None, use_view_transition=False":
                stario.Writer.patch,
            "auto_remove=True, attributes=None": stario.Writer.execute,
            "host=\"127.0.0.1\", port=8000, workers=1": stario.Stario.serve,
            "maxsize=1000, overflow=\"oldest\"": stario.Relay.subscribe,
        }  # fmt: skip
        for told, function in signatures.items():
            with self.subTest(told=told):
                self.assertIn(told, " ".join(self.text.split()))
                parameters = inspect.signature(function).parameters
                for name, _, default in (pair.partition("=") for pair in told.split(", ")):
                    self.assertEqual(repr(parameters[name].default).replace("'", '"'), default)
        self.assertEqual(
            repr(stario.CompressionConfig()),
            "CompressionConfig(min_size=256, zstd_level=3, brotli_level=4, gzip_level=6)",
        )
        self.assertIn(repr(stario.CompressionConfig()), self.text)

    def test_what_tests_need_is_told(self) -> None:
        told = self.text.partition("\n## Tests\n")[2].replace("opentelemetry-", "opentelemetry.")
        for needed in re.findall(r"@needs\((.*)\)", Path(__file__).read_text(encoding="utf-8")):
            for name in re.findall(r'"([^"]+)"', needed):
                with self.subTest(name=name):
                    self.assertIn(f"`{name}`", told)

    def test_links_inside_lead_somewhere(self) -> None:
        titles = re.findall(r"^#+ (.+)$", self.text, re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}
        for target in re.findall(r"\]\(#([^)]+)\)", self.text):
            self.assertIn(target, anchors)

    def test_no_path_of_a_machine(self) -> None:
        self.assertNotRegex(self.text, r"/root/|/work/|/tmp/|/home/|\bpypi\.org|\.internal\b")


@unittest.skipUnless(README.is_file(), "README.md is not here")
class TestRecipes(AsyncTest):
    """The README's programs `# name.py`, each as a module, by what its users do."""

    @contextmanager
    def recipe(self, name: str) -> Iterator[Any]:
        """The program of that name, imported; what others import comes before it."""
        found = {code[2:].partition(".py\n")[0]: (n, code) for n, code in blocks("python")}
        with ExitStack() as stack:
            for each in dict.fromkeys(("chat", "rooms", name)):
                line, code = found[each]
                sys.modules[each] = module = types.ModuleType(each)
                stack.callback(sys.modules.pop, each, None)
                exec(compile("\n" * (line - 1) + code, str(README), "exec"), vars(module))
            yield module

    async def test_every_recipe_is_driven(self) -> None:
        programs = re.findall(
            r"(?m)^```python\n# (?!tiles_app)([a-z_]+)\.py$", README.read_text(encoding="utf-8")
        )
        self.assertGreater(len(programs), 8)
        tests = Path(__file__).read_text(encoding="utf-8")
        for name in programs:
            if name != "chat":  # which its own test drives
                self.assertIn(f'self.recipe("{name}")', tests)

    async def test_a_chat_whose_tests_pass(self) -> None:
        with self.recipe("test_chat") as tests:
            async with TestClient(tests.make_app()) as client:
                page = (await client.get("/")).text
                self.assertIn('<ul id="lines"></ul>', page)
                self.assertIn("@post('/say')", html.unescape(page))
            result = unittest.TestResult()
            suite = unittest.defaultTestLoader.loadTestsFromModule(tests)
            await asyncio.to_thread(suite.run, result)
        self.assertEqual((result.testsRun, result.failures, result.errors), (1, [], []))

    async def test_a_form_with_errors_beside_its_fields(self) -> None:
        with self.recipe("order") as order:
            async with TestClient(order.app) as client:
                self.assertIn('data-bind="email"', (await client.get("/")).text)
                wrong = await client.post("/order", signals={"email": "ada", "count": "x"})
                self.assertEqual(wrong.status, 200)
                self.assertIn('role="alert">expected a whole number</small>', wrong.text)
                wrong = await client.post("/order", signals={"email": "ada", "count": 12})
                self.assertIn('id="email-error" role="alert">an address has an @', wrong.text)
                self.assertIn('id="count-error" role="alert">from 1 to 9', wrong.text)
                right = await client.post("/order", signals={"email": "a@b", "count": 3})
                self.assertEqual(right.text, '<p id="order">3 on the way to a@b</p>')

    async def test_sign_in_with_a_session(self) -> None:
        with self.recipe("members") as members:
            async with TestClient(members.app) as client:
                self.assertEqual((await client.get("/")).headers.get("location"), "/sign-in")
                answer = await client.get("/", headers={"datastar-request": "true"})
                self.assertIn("/sign-in", answer.text)
                for name, password in (("ada", "x"), ("eve", "correct horse")):
                    form = {"name": name, "password": password}
                    answer = await client.post("/sign-in", form=form)
                    self.assertEqual(answer.status, 422)
                    self.assertIn("Name or password is wrong.", answer.text)
                form = {"name": "ada", "password": "correct horse"}
                answer = await client.post("/sign-in", form=form, follow=True)
                self.assertIn("Hello, ada", answer.text)
                answer = await client.post("/sign-out", follow=True)
                self.assertIn('action="/sign-in"', answer.text)

    async def test_an_error_page(self) -> None:
        with self.recipe("errors") as errors:
            async with TestClient(errors.app, raise_errors=False) as client:
                for method, path, status, text in (
                    ("GET", "/?n=4", 200, "0.25"),
                    ("GET", "/none", 404, "<h1>404 Not Found</h1>"),
                    ("POST", "/", 405, "<h1>405 Method Not Allowed</h1>"),
                    ("GET", "/?n=0", 500, "<h1>500 Something went wrong</h1>"),
                ):
                    # An app without a tracer logs the traceback.
                    quiet = mock.patch.object(logging.getLogger("asyncio"), "disabled", True)
                    with self.subTest(path), quiet:
                        answer = await client.request(method, path)
                        self.assertEqual(answer.status, status)
                        self.assertIn(text, answer.text)

    async def test_an_upload_with_its_progress(self) -> None:
        id = uuid.uuid4()
        with self.recipe("upload") as upload:
            async with TestClient(upload.app) as client:
                self.assertIn("@get('/progress/", (await client.get("/")).text)
                async with client.stream("GET", f"/progress/{id}") as events:
                    body = os.urandom(300_000)
                    self.assertEqual((await client.post(f"/upload/{id}", body=body)).status, 204)
                    shown = ""
                    while 'value="1.0"' not in shown:
                        shown = (await anext(events)).elements
                (kept,) = Path(upload.FOLDER).iterdir()
                self.assertEqual(kept.read_bytes(), body)
                self.assertEqual((await client.get("/progress/*")).status, 404)
            async with TestClient(upload.app, body_timeout=0.02) as client:
                half = {"content-length": "300000"}
                answer = await client.post(f"/upload/{id}", body=b"x", headers=half)
                self.assertEqual(answer.status, 408)
                self.assertEqual(list(Path(upload.FOLDER).iterdir()), [kept])
            shutil.rmtree(upload.FOLDER)

    async def test_a_long_job(self) -> None:
        with self.recipe("job") as job:
            async with TestClient(job.app) as client:
                self.assertIn('<progress value="0" max="20">', (await client.get("/")).text)
                with mock.patch.object(job, "asyncio", mock.Mock(sleep=lambda _: asyncio.sleep(0))):
                    async with client.stream("GET", "/live") as events:
                        self.assertNotIn("disabled", (await anext(events)).elements)
                        self.assertEqual((await client.post("/start")).status, 204)
                        self.assertIn("disabled", (await anext(events)).elements)
                        while "disabled" in (await anext(events)).elements:
                            pass
                self.assertIsNone(job.done)

    async def test_a_database(self) -> None:
        with self.recipe("notes") as notes, tempfile.TemporaryDirectory() as folder:
            notes.PATH = str(Path(folder, "notes.db"))
            for count in (1, 2):  # what the first server was told is there for the second
                async with TestClient(notes.app) as client:
                    form = {"text": f"note {count}'"}
                    answer = await client.post("/notes", form=form, follow=True)
                self.assertEqual(answer.json(), ["note 1'", "note 2'"][:count])

    async def test_several_modules(self) -> None:
        with self.recipe("main") as main:
            async with TestClient(main.app) as client:
                answer = await client.get("/rooms/7")
                self.assertEqual(answer.text, "room 7, also at /rooms/7")
        with self.recipe("rooms") as rooms:
            self.assertIsInstance(rooms.router, Router)

    async def test_cors(self) -> None:
        with self.recipe("cors") as cors:
            async with TestClient(cors.app) as client:
                ours = {"origin": "https://app.example.com"}
                answer = await client.get("/answer", headers=ours)
                self.assertEqual(answer.json(), {"answer": 42})
                allowed = "access-control-allow-origin"
                self.assertEqual(answer.headers.get(allowed), ours["origin"])
                self.assertEqual((await client.get("/x", headers=ours)).headers.get(allowed),
                                 ours["origin"])  # fmt: skip
                before = {**ours, "access-control-request-method": "PUT"}
                answer = await client.request("OPTIONS", "/answer", headers=before)
                self.assertEqual(answer.status, 204)
                self.assertIn("PUT", answer.headers["access-control-allow-methods"])
                theirs = {"origin": "https://evil.example"}
                self.assertNotIn(allowed, (await client.get("/answer", headers=theirs)).headers)

    async def test_a_strict_policy_for_content(self) -> None:
        with self.recipe("csp") as csp:
            async with TestClient(csp.app) as client:
                pages = [await client.get("/") for _ in range(2)]
        nonces = []
        for page in pages:
            (nonce,) = re.findall(r"'nonce-([^']+)'", page.headers["content-security-policy"])
            self.assertEqual(page.text.count(f'nonce="{nonce}"'), 2)  # of the page, of the script
            nonces.append(nonce)
        self.assertNotEqual(*nonces)

    async def test_fragments_run_in_a_handler(self) -> None:
        fragments = [(n, code) for n, code in blocks("python") if code.startswith("# in a handler")]
        self.assertGreater(len(fragments), 0)
        for line, code in fragments:
            with self.subTest(line=line):
                relay: Relay[str] = Relay()
                names = {**vars(stario), "relay": relay, "online": (online := set[str]())}
                exec("async def handler(c, w):\n" + textwrap.indent(code, "    "), names)
                app = Stario()
                app.get("/", names["handler"])
                async with TestClient(app) as client, client.stream("GET", "/") as events:
                    self.assertIn("1</p>", (await anext(events)).elements)
                    relay.publish("news", "a < b")
                    self.assertIn("a &lt; b", (await anext(events)).elements)
                self.assertEqual(online, set())


# -- Tiles


@dataclass
class HomeSignals:
    user_id: str


class TestWalkthrough(AsyncTest):
    """The walkthrough's snippets, by its sections, on one app."""

    def setUp(self) -> None:
        self.users: set[str] = set()
        self.board: dict[int, str] = {}
        self.relay: Relay[str] = Relay()
        self.out = io.StringIO()

    def home_view(self, user_id: str) -> SafeString:
        return h.Div(
            {"id": "home"},
            data.signals({"user_id": user_id}, ifmissing=True),
            data.init(at.get("/subscribe")),
            [h.Div({"id": f"c{cell}"}, self.board.get(cell)) for cell in range(25)],
        )

    async def home(self, c: Context, w: Writer) -> None:
        user_id = str(uuid.uuid4())[:8]
        c["user_id"] = user_id
        w.html(self.home_view(user_id))

    async def subscribe(self, c: Context, w: Writer) -> None:
        signals = await c.signals(HomeSignals)
        if not signals.user_id:
            c("No user id", {"hint": "user had to change something manually"})
            w.redirect("/")
            return

        # Register user and notify everyone
        self.users.add(signals.user_id)
        self.relay.publish("join", signals.user_id)
        c("on_join", {"user_id": signals.user_id})
        c["user_id"] = signals.user_id

        # Send initial state
        w.patch(self.home_view(signals.user_id))
        c("onload patch")

        # Loop until client disconnects
        async for event, user_id in w.alive(self.relay.subscribe("*")):
            c("on_event", {"event": event, "user_id": user_id})
            w.patch(self.home_view(signals.user_id))

        # Cleanup - runs after disconnect
        self.users.discard(signals.user_id)
        self.relay.publish("leave", signals.user_id)
        c("on_leave", {"user_id": signals.user_id})

    async def click(self, c: Context, w: Writer) -> None:
        # Validate input
        signals = await c.signals(HomeSignals)
        if not signals.user_id or signals.user_id not in self.users:
            c("No user id or user not connected", {"user_id": signals.user_id})
            w.redirect("/")
            return

        cell_id_param = c.req.query.get("cellId")
        if cell_id_param is None:
            c("No cell id", {"hint": "pass cellId as query parameter"})
            w.redirect("/")
            return

        cell_id = int(cell_id_param)
        c["user_id"] = signals.user_id
        c["cell_id"] = cell_id

        # Respond immediately - client gets 204 No Content right now
        w.empty(204)

        # Everything below still runs after the response is sent
        user_color = signals.user_id
        if self.board.get(cell_id) == user_color:
            self.board.pop(cell_id, None)
        else:
            self.board[cell_id] = user_color

        self.relay.publish("click", signals.user_id)

    def app(self) -> Stario:
        self.tracer = tracer = JsonTracer(self.out)
        with tracer:
            app = Stario(tracer)
            app.assets("/static", {"css/style.css": "body{}"})
            app.get("/", self.home)
            app.get("/subscribe", self.subscribe)
            app.post("/click", self.click)
        return app

    def spans(self, name: str) -> list[dict[str, Any]]:
        self.tracer._close()
        lines = map(json.loads, self.out.getvalue().splitlines())
        return [line for line in lines if line["name"] == name]

    async def test_serving_a_page(self) -> None:
        async with TestClient(self.app()) as client:
            answer = await client.get("/")
        self.assertEqual(answer.status, 200)
        self.assertIn("data-signals__ifmissing", answer.text)
        self.assertIn("@get('/subscribe')", answer.text)
        self.assertRegex(self.spans("GET /")[0]["attributes"]["user_id"], "^[0-9a-f]{8}$")

    async def test_keeping_a_connection_alive(self) -> None:
        async with TestClient(self.app()) as client:
            async with client.stream("GET", "/subscribe", signals={"user_id": "u"}) as events:
                self.assertIn('id="home"', (await anext(events)).elements)
                self.assertEqual(self.users, {"u"})
                self.relay.publish("hello", "v")
                self.assertEqual((await anext(events)).event, "datastar-patch-elements")
            self.assertEqual(self.users, set())
        lines = self.spans("GET /subscribe")  # several, if it has taken more than a second
        names = [event["name"] for line in lines for event in line.get("events", ())]
        self.assertEqual(names, ["on_join", "onload patch", "on_event", "on_leave"])

    async def test_a_stream_without_a_user_is_redirected(self) -> None:
        async with TestClient(self.app()) as client:
            answer = await client.get("/subscribe", signals={"user_id": ""})
            self.assertIn('window.location = "/"', answer.text)
            answer = await client.get("/subscribe")
            self.assertEqual((answer.status, answer.text), (422, "user_id: is missing"))

    async def test_responding_early_working_after(self) -> None:
        async with TestClient(self.app()) as client:
            async with client.stream("GET", "/subscribe", signals={"user_id": "u"}) as events:
                await anext(events)
                answer = await client.post("/click?cellId=3", signals={"user_id": "u"})
                self.assertEqual((answer.status, answer.body), (204, b""))
                self.assertEqual(self.board, {3: "u"})
                self.assertIn('<div id="c3">u</div>', (await anext(events)).elements)
                await client.post("/click?cellId=3", signals={"user_id": "u"})
                self.assertEqual(self.board, {})
            for path, who in (("/click?cellId=3", "u"), ("/click", "v")):
                answer = await client.post(path, signals={"user_id": who})
                self.assertIn('window.location = "/"', answer.text)

    async def test_child_spans(self) -> None:
        app = self.app()

        async def work(c: Context, w: Writer) -> None:
            with c.step("db.query", {"sql": "SELECT ..."}) as step:
                c("cache.miss")
                c["rows"] = 10
            self.assertEqual(step.attributes, {"sql": "SELECT ...", "rows": 10})
            c("cache.hit", {"key": "users:123"})
            c(ValueError("invalid input"))
            w.json({"ok": True})

        app.get("/work", work)
        async with TestClient(app) as client:
            self.assertEqual((await client.get("/work")).json(), {"ok": True})
        request = self.spans("GET /work")[0]
        self.assertEqual(self.spans("db.query")[0]["parent_span_id"], request["span_id"])
        self.assertEqual([e["name"] for e in request["events"]], ["cache.hit", "exception"])
        self.assertNotIn("status", request)

    async def test_accessing_the_request(self) -> None:
        app = self.app()

        async def show(c: Context, w: Writer) -> None:
            query = c.req.query
            w.json([
                c.req.method, c.req.path, query.get("cellId"), query.get("page", "1"),
                query.getlist("tags"), "cellId" in query, c.req.headers.get("Authorization"),
                c.req.headers.getlist("Set-Cookie"), c.req.cookies, c.req.host,
                (await c.req.body()).decode(), await c.req.json(),
            ])  # fmt: skip

        app.put("/show", show)
        async with TestClient(app, host="localhost") as client:
            client.cookies["session"] = "abc123"
            answer = await client.put("/show?cellId=5&tags=a&tags=b", json=[1])
        self.assertEqual(
            answer.json(),
            ["PUT", "/show", "5", "1", ["a", "b"], True, None, [], {"session": "abc123"},
             "localhost", "[1]", [1]],
        )  # fmt: skip

    async def test_the_full_picture(self) -> None:
        app = self.app()
        async with connected(app, workers=4) as peer:
            found = await peer.get("/static/css/style.css")
            self.assertEqual(found.status, 307)
            name = asset("css/style.css", collection="static")
            self.assertEqual((await peer.get(f"/static/{name}")).text, "body{}")


TILES = ("tiles_app.py", "--host", "127.0.0.1", "--port", "{port}")
UVICORN = ("-m", "uvicorn", "tiles_app:app", "--port", "{port}", "--timeout-graceful-shutdown", "1")
HYPERCORN = ("-m", "hypercorn", "tiles_app:app", "--bind", "127.0.0.1:{port}")
GRANIAN = ("-m", "granian", "--interface", "asgi", "--port", "{port}", "tiles_app:app")


class Tiles:
    """Tiles as a process of its own: as a program, or under another server."""

    def __init__(self, *options: str, port: int = 0, command: tuple[str, ...] = TILES) -> None:
        port = port or (0 if command is TILES else free_port())
        self.process = subprocess.Popen(
            [sys.executable, "-u", *(word.format(port=port) for word in command), *options],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=HERE,
            start_new_session=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.first_line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", self.first_line)
        if not (port or found):
            raise AssertionError(f"it did not start: {self.first_line}{self.process.stdout.read()}")
        self.port = port or (int(found[1]) if found else 0)
        # Its log is read on, or the pipe would fill up and stop it.
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self.lines.extend, args=(self.process.stdout,))
        self._reader.start()

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        try:
            return self.process.wait(15)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # some servers have children
            self.process.wait()
            self._reader.join()


class TilesClient(AsyncTest):
    """Who talks to Tiles from outside."""

    command = TILES

    def start(self, *options: str, port: int = 0) -> Tiles:
        own = options if self.command is TILES else ()
        tiles = Tiles(*own, port=port, command=self.command)
        self.addCleanup(tiles.stop, signal.SIGKILL)
        return tiles

    async def join(self, tiles: Tiles, user: str) -> Peer:
        """Open a stream; its first event is on the way."""
        peer = await Peer.connect(tiles.port)
        query = urlencode({"datastar": json.dumps({"user_id": user})})
        await peer.send(f"GET /subscribe?{query} HTTP/1.1\r\nHost: x\r\n\r\n")
        self.assertEqual((await peer.head()).status, 200)
        return peer

    async def next_view(self, peer: Peer) -> str:
        """What the next chunk shows: of several events in it, the last."""
        chunk = (await within(peer.chunk())).decode()
        return chunk.removesuffix("\n\n").rpartition("\n\n")[2]

    async def look(self, peer: Peer, wanted: Callable[[str], object]) -> str:
        """Read on until a view is as wanted."""
        text = ""
        while not text or not wanted(text):
            text = await self.next_view(peer)
        return text

    async def view(self, peer: Peer, wanted: str) -> str:
        """Read on until a view has this in it."""
        return await self.look(peer, lambda text: wanted in text)

    async def click(self, tiles: Tiles, user: str, cell: object) -> Answer:
        peer = await Peer.connect(tiles.port)
        body = json.dumps({"user_id": user})
        await peer.send(
            f"POST /click?cellId={cell} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}"
        )
        answer = await peer.answer()
        await peer.close()
        return answer


class TilesTest(TilesClient):
    """The app, whatever serves it."""

    async def test_a_click_shows_in_all_tabs(self) -> None:
        tiles = self.start("--local")
        await until_listening(tiles.port)
        a, b = await self.join(tiles, "ada"), await self.join(tiles, "bob")
        await self.view(a, "player-bob")
        before = await self.view(b, "player-ada")
        self.assertEqual((await self.click(tiles, "ada", 7)).status, 204)
        painted = re.search(r'id="cell-7"[^>]*', before)
        for tab in (a, b):
            text = before
            while (
                (now := re.search(r'id="cell-7"[^>]*', text)) and painted and now[0] == painted[0]
            ):
                text = await self.next_view(tab)

    async def test_a_player_is_there_until_the_last_stream_ends(self) -> None:
        tiles = self.start("--local")
        await until_listening(tiles.port)
        watcher = await self.join(tiles, "watcher")
        first = await self.join(tiles, "ada")
        second = await self.join(tiles, "ada")
        await self.view(second, "player-ada")
        await first.close()
        await self.click(tiles, "watcher", 1)
        await self.view(watcher, "player-ada")
        text = await self.view(second, "player-ada")
        self.assertEqual(text.count("player-ada"), 1)
        await second.close()
        while "player-ada" in text:
            text = await self.next_view(watcher)

    async def test_a_cell_that_is_none_is_a_400_and_changes_nothing(self) -> None:
        tiles = self.start("--local")
        await until_listening(tiles.port)
        peer = await self.join(tiles, "ada")
        before = await self.view(peer, "player-ada")
        for cell in ("x", "-1", "25", "1e1", "", "٣", "9" * 5000, "0x1", "1.0"):
            with self.subTest(cell[:9]):
                answer = await self.click(tiles, "ada", quote(cell))
                self.assertEqual(answer.status, 400)
                self.assertEqual(answer.text, "cellId must be a number from 0 to 24")
        await self.click(tiles, "ada", 3)
        after = await self.view(peer, "cell-3")
        self.assertEqual(before.count(": painted"), 4)
        self.assertIn(after.count(": painted"), (4, 5))  # 4 if cell 3 was painted at the start

    async def test_what_is_answered_before_it_was_read_is_not_reset(self) -> None:
        tiles = self.start("--local")
        await until_listening(tiles.port)
        peer = await Peer.connect(tiles.port)
        head = (
            "POST /none HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 3000000\r\n\r\n"
        )
        await peer.send(head + "x" * 3_000_000)
        self.assertEqual((await peer.answer()).status, 404)
        self.assertEqual(await within(peer.rest()), b"")

    async def test_who_is_not_connected_cannot_paint(self) -> None:
        tiles = self.start("--local")
        await until_listening(tiles.port)
        self.assertEqual((await self.click(tiles, "nobody", 3)).status, 303)

    async def test_other_sites_cannot_click(self) -> None:
        tiles = self.start("--local")
        await until_listening(tiles.port)
        peer = await Peer.connect(tiles.port)
        answer = await peer.get("/click?cellId=1", "POST", Sec_Fetch_Site="cross-site")
        self.assertEqual(answer.status, 403)


class TestTiles(TilesTest):
    """As a program."""

    async def test_colours_are_the_same_in_every_process(self) -> None:
        colours = set()
        for _ in range(2):
            tiles = self.start("--local")
            text = await self.view(await self.join(tiles, "ada"), "player-ada")
            found = re.search(r'player-ada"><span [^>]*background-color:([^;]+)', text)
            assert found
            colours.add(found[1])
        self.assertEqual(len(colours), 1)

    async def test_four_workers_share_one_board_and_never_lose_a_click(self) -> None:
        tiles = self.start("--workers", "4", "--local")
        players = [f"player{i}" for i in range(8)]
        streams = [await self.join(tiles, player) for player in players]
        await self.view(streams[0], "player-player7")
        # Each player paints a cell of its own, and clears it again but for the last time.
        clicks = [(player, cell + 10) for cell, player in enumerate(players)] * 5
        answers = await asyncio.gather(*(self.click(tiles, *click) for click in clicks))
        self.assertEqual({answer.status for answer in answers}, {204})
        for stream in streams:
            self.assertTrue(await self.view(stream, "player-player7"))
        newcomer = await self.join(tiles, "newcomer")
        text = await self.view(newcomer, "player-newcomer")
        for cell, player in enumerate(players):
            colour = re.search(rf'player-{player}"><span [^>]*background-color:([^;]+)', text)
            assert colour
            self.assertRegex(text, rf'id="cell-{cell + 10}"[^>]*{re.escape(colour[1])}')

    async def test_a_taken_port_is_one_sentence_and_status_1(self) -> None:
        tiles = self.start("--local")
        second = self.start("--local", port=tiles.port)
        self.assertIn(f"127.0.0.1:{tiles.port}: the port is taken", second.first_line)
        self.assertEqual(second.process.wait(10), 1)
        self.assertEqual(second.lines, [])

    async def test_ctrl_c_ends_it_cleanly_with_tabs_open(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            tiles = self.start("--local")
            peer = await self.join(tiles, "ada")
            self.assertEqual(await asyncio.to_thread(tiles.stop, number), 0)
            self.assertTrue((await within(peer.rest())).endswith(b"0\r\n\r\n"))
            self.assertNotIn("Traceback", "".join(tiles.lines))
            self.assertIn("on_leave", "".join(tiles.lines))

    async def test_without_a_terminal_it_logs_json(self) -> None:
        tiles = self.start()
        await (await Peer.connect(tiles.port)).get("/")
        await asyncio.to_thread(tiles.stop)
        names = [json.loads(line)["name"] for line in [tiles.first_line, *tiles.lines]]
        self.assertEqual(names, ["listening", "GET /"])

    def test_two_files_in_an_empty_folder_are_enough(self) -> None:
        here = Path(__file__).parent
        with tempfile.TemporaryDirectory() as folder:
            for name in ("stario.py", "tiles_app.py"):
                shutil.copy(here / name, folder)
            done = subprocess.run(
                [sys.executable, "-I", "-c",
                 f"import sys; sys.path.insert(0, {folder!r}); import tiles_app as t; "
                 "t.make_app(t.JsonTracer()); print(t.page(t.home_view('ada')))"],
                cwd=folder, capture_output=True, text=True, check=True,
            )  # fmt: skip
            self.assertIn('<main id="home"', done.stdout)


class TilesBehindAProxy(TilesClient):
    """See also BehindAProxy."""

    proxy = ""

    async def test_a_click_shows_in_all_tabs_and_who_has_gone_is_no_player(self) -> None:
        tiles = self.start("--local")
        await until_listening(tiles.port)
        async with proxy(self.proxy, tiles.port) as port:
            tiles.port = port
            a, b = await self.join(tiles, "ada"), await self.join(tiles, "bob")
            for tab, other in ((a, "bob"), (b, "ada")):
                await self.view(tab, f"player-{other}")
            await b.close()
            text = ""
            while not ('<main id="home"' in text and "</main>" in text) or "player-bob" in text:
                self.assertEqual((await self.click(tiles, "ada", 7)).status, 204)
                text = await self.next_view(a)


@needs("nginx")
class TestTilesBehindNginx(TilesBehindAProxy):
    proxy = "nginx"


@needs("haproxy")
class TestTilesBehindHaproxy(TilesBehindAProxy):
    proxy = "haproxy"


@needs("uvicorn")
class TestTilesUnderUvicorn(TilesTest):
    command = UVICORN  # type: ignore[assignment]

    async def test_when_it_stops_the_streams_clean_up(self) -> None:
        tiles = self.start()
        await until_listening(tiles.port)
        await self.view(await self.join(tiles, "ada"), "player-ada")
        await asyncio.to_thread(tiles.stop)
        self.assertIn("on_leave", "".join(tiles.lines))


@needs("hypercorn")
class TestTilesUnderHypercorn(TilesTest):
    command = HYPERCORN

    @needs("h2")
    async def test_ten_streams_and_a_click_share_one_connection_of_http_2(self) -> None:
        """RFC 9113, with prior knowledge (3.3): HTTP/1.1 would need eleven connections."""
        from h2.connection import H2Connection
        from h2.events import DataReceived, ResponseReceived

        tiles = self.start()
        await until_listening(tiles.port)
        reader, writer = await asyncio.open_connection("127.0.0.1", tiles.port)
        self.addCleanup(writer.close)
        client, bodies, status = H2Connection(), Counter[int](), dict[int, bytes]()

        def ask(method: str, path: str, body: bytes = b"", kind: str = "text/plain") -> int:
            stream = client.get_next_available_stream_id()
            fields = {":method": method, ":path": path, ":scheme": "http", ":authority": "x"}
            client.send_headers(stream, [*fields.items(), ("content-type", kind)], not body)
            if body:
                client.send_data(stream, body, end_stream=True)
            return stream

        async def read_until(wanted: Callable[[], bool]) -> None:
            while not wanted():
                writer.write(client.data_to_send())
                data = await within(reader.read(65536))
                self.assertTrue(data, "the connection is closed")
                for event in client.receive_data(data):
                    if isinstance(event, ResponseReceived):
                        status[event.stream_id] = dict(event.headers)[b":status"]
                    elif isinstance(event, DataReceived):
                        bodies[event.stream_id] += event.data.count(b"event: ")
                        client.acknowledge_received_data(
                            event.flow_controlled_length, event.stream_id
                        )

        client.initiate_connection()
        signals = [json.dumps({"user_id": f"user-{number}"}) for number in range(10)]
        streams = [ask("GET", f"/subscribe?{urlencode({'datastar': one})}") for one in signals]
        await read_until(lambda: all(bodies[stream] for stream in streams))
        for method in ("POST", "GET"):  # answered before its body comes
            unread = client.get_next_available_stream_id()
            fields = {":method": method, ":path": "/none", ":scheme": "http", ":authority": "x"}
            client.send_headers(unread, fields.items())
            await read_until(lambda unread=unread: unread in status)  # type: ignore[misc]
            client.send_data(unread, b"{}", end_stream=True)
        before = bodies.copy()
        click = ask("POST", "/click?cellId=3", signals[0].encode(), "application/json")
        await read_until(lambda: click in status)
        await read_until(lambda: all(bodies[stream] > before[stream] for stream in streams))
        self.assertEqual([status[stream] for stream in (*streams, click)], [b"200"] * 10 + [b"204"])


@needs("granian")
class TestTilesUnderGranian(TilesTest):
    command = GRANIAN  # type: ignore[assignment]


@needs("redis", "redis-server")
class TestTilesInManyProcesses(TilesClient):
    """One board in Redis, and a process for each tab."""

    def setUp(self) -> None:
        self.redis = Redis()
        self.redis.start()
        self.addCleanup(self.redis.kill)
        options = ("--local", "--redis", self.redis.url, "--expiry", "1")
        self.processes = [self.start(*options) for _ in range(3)]

    async def test_no_answered_click_is_lost_and_the_players_of_the_dead_go(self) -> None:
        names = ["ada", "bob", "eve"]
        tabs = [
            await self.join(tiles, name) for tiles, name in zip(self.processes, names, strict=True)
        ]
        for tab in tabs:
            await self.look(tab, lambda text: all(f"player-{name}" in text for name in names))
        for cell, tiles in enumerate(self.processes):
            self.assertEqual((await self.click(tiles, names[cell], cell)).status, 204)
        self.processes[2].stop(signal.SIGKILL)
        text = await self.look(
            tabs[0], lambda text: "player-eve" not in text and text.count(": painted") == 3
        )
        self.assertIn("player-bob", text)

    async def test_more_clicks_at_once_than_connections_to_redis_wait(self) -> None:
        tiles = self.processes[0]
        tab = await self.join(tiles, "ada")
        await self.view(tab, "player-ada")
        self.redis.tell("CLIENT", "PAUSE", "500", "ALL")
        clicks = [self.click(tiles, "ada", cell % 25) for cell in range(150)]
        answers = await asyncio.gather(*clicks)
        self.assertEqual({answer.status for answer in answers}, {204})

    async def test_who_leaves_while_redis_is_away_is_gone_when_it_is_back(self) -> None:
        code = f"""
            import asyncio, tiles_app
            from unittest import mock
            from redis import RedisError

            async def main():
                state = tiles_app.SharedState("{self.redis.url}", tiles_app.Tracer(), 60.0)
                for user_id in ("ada", "bob"):
                    await state.join(user_id)
                with mock.patch.object(state, "exchange", side_effect=RedisError):
                    await state.leave("ada")
                print(sorted(state.players))
                await state.refresh()
                print(sorted(state.players), sorted(state.own))
                await state.redis.aclose()

            asyncio.run(main())
        """
        process = await run_python(code)
        output, _ = await within(process.communicate())
        self.assertEqual(output.decode().split("\n"), ["['ada', 'bob']", "['bob'] ['bob']", ""])

    async def test_what_changes_before_its_subscription_is_made_is_not_missed(self) -> None:
        code = f"""
            import asyncio, tiles_app

            async def main():
                looks = asyncio.Semaphore(0)

                class Counted(tiles_app.SharedState):
                    async def refresh(self):
                        looks.release()

                state = Counted("{self.redis.url}", tiles_app.Tracer(), 600.0)
                following = asyncio.create_task(state.follow())
                for _ in range(2):  # the second time long before 150 seconds have passed
                    await asyncio.wait_for(looks.acquire(), 10)
                print("looked twice")

            asyncio.run(main())
        """
        for tiles in self.processes:
            tiles.stop(signal.SIGKILL)  # so that nobody else says anything
        process = await run_python(code)
        output, _ = await within(process.communicate(), 20)
        self.assertEqual(output, b"looked twice\n")

    async def test_whoever_comes_while_redis_is_away_is_served(self) -> None:
        self.redis.kill()
        tiles = self.processes[0]
        tabs = [await self.join(tiles, f"ada-{number}") for number in range(3)]
        self.redis.start()
        for tab in tabs:
            await self.view(tab, "player-ada-2")

    async def test_the_board_catches_up_after_redis_has_been_restarted(self) -> None:
        tiles = self.processes[0]
        tab, other = await self.join(tiles, "ada"), await self.join(self.processes[1], "bob")
        await self.view(tab, "player-bob")
        self.assertEqual((await self.click(tiles, "ada", 3)).status, 204)
        await self.view(other, ": painted")
        self.redis.kill()
        self.assertEqual((await self.click(tiles, "ada", 4)).status, 500)
        self.redis.start()  # it has kept nothing
        for stream in (tab, other):
            await self.look(
                stream,
                lambda text: ": painted" not in text and "-ada" in text and "player-bob" in text,
            )
        self.assertEqual((await self.click(tiles, "ada", 5)).status, 204)
        await self.view(other, ": painted")


# -- Apps in a browser


OFFICIAL_HASH = "sha384-SnyFlWTdFL3c8+9/1WsPuMFBq6AQOGC1LmS9upY4YkM3En3wZr5q2UvydHaMgOVG"


class InABrowser(_Case):
    """One browser for the tests of a class."""

    playwright: ClassVar[Any]
    browser: ClassVar[Any]

    @classmethod
    def setUpClass(cls) -> None:
        cls.playwright = sync_playwright().start()
        cls.browser = cls.playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )

    @classmethod
    def tearDownClass(cls) -> None:
        cls.browser.close()
        cls.playwright.stop()


class TilesInABrowser(InABrowser, unittest.TestCase):
    """Tiles, and browsers to open it in; the classes below differ in what the CDN does."""

    command = TILES
    endings: tuple[int, ...] = (signal.SIGKILL, signal.SIGTERM)

    def start(self, port: int = 0) -> Tiles:
        own = ("--local",) if self.command is TILES else ()
        return Tiles(*own, port=port, command=self.command)

    def setUp(self) -> None:
        self.tiles = self.start()
        self.addCleanup(lambda: self.tiles.stop(signal.SIGKILL))
        self.errors: list[str] = []

    def cdn(self, route: Any) -> None:
        """What becomes of a request for the official client."""
        raise AssertionError("each class below says this")

    def open(self) -> Any:
        """The page in a browser of its own, with its stream open."""
        context = self.browser.new_context()
        self.addCleanup(context.close)
        context.route("https://cdn.jsdelivr.net/**", self.cdn)
        context.route(f"http://127.0.0.1:{self.tiles.port}/", self.page)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self.console)
        page.goto(f"http://127.0.0.1:{self.tiles.port}/")
        page.wait_for_selector(".players li:has-text('(you)')")
        return page

    def page(self, route: Any) -> None:
        route.continue_()

    def console(self, message: Any) -> None:
        blocked = "cdn.jsdelivr.net" in message.location.get("url", "")
        if message.type == "error" and not blocked:
            self.errors.append(message.text)

    @staticmethod
    def color(page: Any, selector: str) -> str:
        script = "selector => document.querySelector(selector).style.backgroundColor"
        return str(page.evaluate(script, selector))

    def wait_for_color(self, page: Any, selector: str, color: str) -> None:
        page.wait_for_function(
            "([where, color]) => document.querySelector(where).style.backgroundColor == color",
            arg=[selector, color],
        )

    @staticmethod
    def own_color(page: Any) -> str:
        own = page.locator(".players li:has-text('(you)') .swatch")
        return str(own.evaluate("element => element.style.backgroundColor"))


class TilesPromises(TilesInABrowser):
    """What holds whichever client has been loaded."""

    def test_a_click_shows_in_both_tabs_in_its_painters_color_and_a_second_clears_it(self) -> None:
        a, b = self.open(), self.open()
        color = self.own_color(a)
        a.click("#cell-12")
        if self.color(a, "#cell-12") == "":  # it was painted by chance, in another color
            self.wait_for_color(a, "#cell-12", color)
        for page in (a, b):
            self.wait_for_color(page, "#cell-12", color)
        a.click("#cell-12")
        for page in (a, b):
            self.wait_for_color(page, "#cell-12", "")
            self.assertRegex(page.get_attribute("#cell-12", "aria-label"), "empty$")
        self.assertEqual(self.errors, [])

    def test_a_third_tab_appears_and_disappears_among_the_players(self) -> None:
        a, b = self.open(), self.open()
        c = self.open()
        for page in (a, b):
            page.wait_for_function("document.querySelectorAll('.players li').length == 3")
        c.close()
        for page in (a, b):
            page.wait_for_function("document.querySelectorAll('.players li').length == 2")
        self.assertEqual(self.errors, [])

    def test_keyboard_and_completion(self) -> None:
        a = self.open()
        for cell in range(25):
            if not self.color(a, f"#cell-{cell}"):
                a.focus(f"#cell-{cell}")
                a.keyboard.press("Enter")
                a.wait_for_selector(f"#cell-{cell}[aria-label$=painted]")
                self.assertEqual(a.evaluate("document.activeElement.id"), f"cell-{cell}")
        a.wait_for_selector("[role=status]:has-text('complete')")
        self.assertEqual(self.errors, [])

    def test_after_a_restart_both_tabs_come_back_by_themselves_and_paint_on(self) -> None:
        a, b = self.open(), self.open()
        color = self.own_color(a)
        for number in self.endings:
            port = self.tiles.port
            self.tiles.stop(number)
            for page in (a, b):
                page.evaluate("document.querySelector('.players').replaceChildren()")
            self.tiles = self.start(port)
            for page in (a, b):
                page.wait_for_function(
                    "document.querySelectorAll('.players li').length == 2", timeout=20_000
                )
            self.assertEqual(self.own_color(a), color)
            if self.color(a, "#cell-12") != color:  # (it may be painted by chance, in any color)
                a.click("#cell-12")
            for page in (a, b):
                self.wait_for_color(page, "#cell-12", color)
            a.click("#cell-12")
            self.wait_for_color(b, "#cell-12", "")

    def test_it_fits_a_phone_and_a_desktop_in_light_and_dark(self) -> None:
        page = self.open()
        for width in (375, 1280):
            page.set_viewport_size({"width": width, "height": 800})
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                inside = "document.documentElement.scrollWidth <= window.innerWidth"
                self.assertTrue(page.evaluate(inside), (width, scheme))
                back, text = page.evaluate(
                    "[getComputedStyle(document.body).backgroundColor, "
                    "getComputedStyle(document.body).color]"
                )
                self.assertNotEqual(back, text)
                self.assertEqual(
                    sum(map(int, re.findall(r"\d+", back)[:3])) < 300, scheme == "dark"
                )


@needs("playwright", CHROMIUM)
class TestTilesWithTheOfficialClient(TilesPromises):
    """The CDN answers. (Where the copy at hand is of another version, the page gets its hash.)"""

    @classmethod
    def setUpClass(cls) -> None:
        if not Path(OFFICIAL_CLIENT).is_file():
            if os.environ.get("STARIO_TEST_ALL"):
                raise AssertionError("STARIO_OFFICIAL_CLIENT names no file")
            raise unittest.SkipTest("needs STARIO_OFFICIAL_CLIENT: the path of datastar.js")
        super().setUpClass()

    def cdn(self, route: Any) -> None:
        route.fulfill(
            path=OFFICIAL_CLIENT,
            content_type="text/javascript",
            headers={"access-control-allow-origin": "*"},
        )

    def page(self, route: Any) -> None:
        digest = hashlib.sha384(Path(OFFICIAL_CLIENT).read_bytes()).digest()
        answer = route.fetch()
        text = answer.text()
        assert OFFICIAL_HASH in text
        own = text.replace(OFFICIAL_HASH, "sha384-" + base64.b64encode(digest).decode())
        route.fulfill(response=answer, body=own)


@needs("playwright", CHROMIUM)
class TestTilesWhereTheCdnRefuses(TilesPromises):
    """No internet: the pocket client takes over."""

    def cdn(self, route: Any) -> None:
        route.abort()


@needs("playwright", CHROMIUM, "uvicorn")
class TestTilesInABrowserUnderUvicorn(TestTilesWhereTheCdnRefuses):
    command = UVICORN  # type: ignore[assignment]


@needs("playwright", CHROMIUM, "hypercorn")
class TestTilesInABrowserUnderHypercorn(TestTilesWhereTheCdnRefuses):
    command = HYPERCORN
    endings = (signal.SIGKILL,)  # asked to end, it waits for the streams (see the README)


@needs("playwright", CHROMIUM)
class TestTilesWhereTheCdnNeverAnswers(TilesPromises):
    """A firewall that drops packets: the pocket client takes over."""

    def cdn(self, route: Any) -> None:
        self.addCleanup(route.abort)  # in the end


@needs("playwright", CHROMIUM)
class TestTilesWhereTheCdnGivesSomethingElse(TilesInABrowser):
    """What the CDN gives has another hash: it is not run, and the pocket client takes over."""

    def cdn(self, route: Any) -> None:
        route.fulfill(body="document.title = 'evil'", content_type="text/javascript")

    def test_it_is_not_run(self) -> None:
        self.assertEqual(self.open().title(), "Tiles")

    def console(self, message: Any) -> None:
        if "integrity" not in message.text:
            super().console(message)


class AppServer(StageServer):
    """Serves an app of its own instead, beside the client that is to be tried."""

    def __init__(self, app: Stario, client: bytes) -> None:
        self.app = app
        app.get("/client.js", self._client)
        super().__init__(Stage(client))

    async def _client(self, c: Context, w: Writer) -> None:
        w.respond(self.stage.client, "text/javascript")

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        async with self.app.running(port=0, graceful_timeout=0.5) as server:
            self.url = server.url
            self._is_up.set()
            await self._end.wait()


def app_page(*body: Any) -> Any:
    return h.Html(h.Head(h.Title("app"), datastar_script("/client.js")), h.Body(*body))


def todo_app() -> Stario:
    """A todo list that several people edit. Each change sends the whole list to everybody."""
    todos = {1: ["milk", False], 2: ["bread", False], 3: ["tea", False]}
    relay: Relay[None] = Relay()
    asked: list[str] = []

    def row(n: int, title: str, done: bool) -> Any:
        return h.Li(
            {"id": f"todo-{n}"},
            h.Input(
                {"type": "checkbox", "class": "done", "checked": done},
                data.on("change", at.post(f"/toggle/{n}")),
            ),
            h.Form(
                data.on("submit", at.post("/rename", content_type="form")),
                h.Input({"type": "hidden", "name": "id", "value": n}),
                h.Input({"class": "title", "name": "title", "value": title}),
            ),
        )

    def view() -> Any:
        rows = [row(n, str(title), bool(done)) for n, (title, done) in todos.items()]
        return h.Main(
            {"id": "view"},
            h.Ul(rows),
            h.P({"id": "open"}, sum(not done for _, done in todos.values())),
            h.P({"id": "asked"}, len(asked)),
        )

    async def home(c: Context, w: Writer) -> None:
        w.html(app_page(h.Div(data.init(at.get("/live"))), view()))

    async def live(c: Context, w: Writer) -> None:
        w.patch(view())
        async for _ in w.alive(relay.subscribe("todos")):
            w.patch(view())

    async def toggle(c: Context, w: Writer) -> None:
        asked.append(c.req.path)
        todo = todos[int(c.req.params["n"])]
        todo[1] = not todo[1]
        w.empty()
        relay.publish("todos", None)

    async def rename(c: Context, w: Writer) -> None:
        form = await c.req.form()
        todos[int(str(form["id"]))][0] = str(form["title"])
        todos[max(todos) + 1] = ["new", False]
        w.empty()
        relay.publish("todos", None)

    app = Stario()
    app.get("/", home)
    app.get("/live", live)
    app.post("/toggle/{n}", toggle)
    app.post("/rename", rename)
    return app


def form_app() -> Stario:
    """A form with its errors beside the fields, and an upload."""

    def view(errors: dict[str, str], saved: str = "") -> Any:
        def field(name: str, kind: str = "text") -> Any:
            return h.P(
                h.Input({"id": name, "name": name, "type": kind}),
                h.Em({"id": f"{name}-error"}, errors.get(name, "")),
            )

        return h.Form(
            {"id": "form", "enctype": "multipart/form-data", "novalidate": True},
            data.on("submit", at.post("/save", content_type="form")),
            data.indicator("saving"),
            field("name"),
            field("age", "number"),
            field("photo", "file"),
            h.Button({"id": "save"}, data.attr({"disabled": "$saving"}), "Save"),
            h.Output({"id": "saved"}, saved),
        )

    async def home(c: Context, w: Writer) -> None:
        w.html(app_page(view({})))

    async def save(c: Context, w: Writer) -> None:
        form = await c.req.form()
        errors = {}
        if not str(form.get("name", "")):
            errors["name"] = "say your name"
        if not str(form.get("age", "")).isdigit():
            errors["age"] = "a whole number"
        photo = form.file("photo")
        size = len(photo.data) if photo else 0
        w.patch(view(errors, "" if errors else f"{form['name']}, {form['age']}, {size} bytes"))

    app = Stario()
    app.get("/", home)
    app.post("/save", save)
    return app


def table_app() -> Stario:
    """A live table: its order and its numbers change all the time; rows are chosen, and sorted."""

    def view(turn: int) -> Any:
        rows = [
            h.Tr(
                {"id": f"row-{n}"},
                data.class_({"chosen": f"$chosen == {n}"}),
                h.Td(n),
                h.Td({"class": "value"}, n * turn % 17),
                h.Td(h.Input({"class": "note"})),
                h.Td(h.Button({"class": "choose"}, data.on("click", f"$chosen = {n}"), "choose")),
            )
            for n in sorted(range(20), key=lambda n: n * turn % 17)
        ]
        return h.Table({"id": "table", "data-turn": turn}, h.Tbody(rows))

    async def home(c: Context, w: Writer) -> None:
        start = h.Div(data.signals({"chosen": -1, "ticks": 0}), data.init(at.get("/live")))
        w.html(app_page(start, view(1), h.Output({"id": "ticks"}, data.text("$ticks"))))

    async def live(c: Context, w: Writer) -> None:
        for turn in range(2, 40):
            w.patch(view(turn))
            w.sync({"ticks": turn})
            await asyncio.sleep(0.01)
        async for _ in w.alive():
            pass

    app = Stario()
    app.get("/", home)
    app.get("/live", live)
    return app


class EverydayApps(InABrowser):
    """Three apps as people write them, with either client."""

    def source(self) -> bytes:
        raise AssertionError("each class below says this")

    def open(self, app: Stario, tabs: int = 1) -> list[Any]:
        server = AppServer(app, self.source())
        self.addCleanup(server.stop)
        self.errors: list[str] = []
        pages = []
        for _ in range(tabs):
            page = self.browser.new_page()
            self.addCleanup(page.close)
            page.set_default_timeout(5_000)
            page.on("pageerror", lambda error: self.errors.append(str(error)))
            page.goto(server.url)
            pages.append(page)
        return pages

    def text(self, page: Any, selector: str, wanted: str) -> None:
        page.wait_for_function(
            "([where, text]) => document.querySelector(where)?.textContent === text",
            arg=[selector, wanted],
        )

    def test_a_todo_list_that_several_people_edit(self) -> None:
        a, b = self.open(todo_app(), 2)
        a.click("#todo-2 .title")
        a.keyboard.press("Home")
        a.keyboard.type("good ")
        b.click("#todo-1 .done")
        for page in (a, b):
            self.text(page, "#open", "2")
            self.assertTrue(page.is_checked("#todo-1 .done"))
        # One click was one request: what the patch ticked in the other tab was nobody's click.
        self.text(b, "#asked", "1")
        self.assertEqual(a.evaluate("document.activeElement.value"), "good bread")
        a.keyboard.type("white ")
        a.keyboard.press("Enter")
        for page in (a, b):
            page.wait_for_selector("#todo-4")
            self.assertEqual(page.input_value("#todo-2 .title"), "good white bread")
        self.text(a, "#asked", "1")
        self.assertEqual(self.errors, [])

    def test_a_form_with_errors_beside_its_fields_and_an_upload(self) -> None:
        (page,) = self.open(form_app())
        page.fill("#name", "")
        page.fill("#age", "7.5")
        page.set_input_files(
            "#photo", {"name": "a.bin", "mimeType": "image/png", "buffer": bytes(70_000)}
        )
        page.click("#save")
        self.text(page, "#name-error", "say your name")
        self.text(page, "#age-error", "a whole number")
        self.assertEqual(page.input_value("#age"), "7.5")
        page.fill("#name", "Ann")
        page.fill("#age", "7")
        page.press("#age", "Enter")
        self.text(page, "#saved", "Ann, 7, 70000 bytes")
        self.text(page, "#name-error", "")
        self.assertFalse(page.is_disabled("#save"))
        self.assertEqual(self.errors, [])

    def test_a_live_table(self) -> None:
        (page,) = self.open(table_app())
        page.wait_for_selector("#row-3 .note")
        page.evaluate("window.row = document.getElementById('row-3')")
        page.focus("#row-3 .note")
        page.keyboard.type("mine")
        page.evaluate("document.querySelector('#row-5 .choose').click()")
        self.text(page, "#ticks", "39")
        self.assertEqual(page.evaluate("document.activeElement.value"), "mine")
        self.assertTrue(page.evaluate("row === document.getElementById('row-3')"))
        self.assertEqual(page.locator(".chosen").get_attribute("id"), "row-5")
        order = page.evaluate("[...document.querySelectorAll('.value')].map((el) => el.innerText)")
        self.assertEqual(order, [str(n) for n in sorted(n * 39 % 17 for n in range(20))])
        self.assertEqual(self.errors, [])


@needs("playwright", CHROMIUM)
class TestEverydayAppsWithThePocketClient(EverydayApps, unittest.TestCase):
    """The pocket client."""

    def source(self) -> bytes:
        return TestPocketClient.client_source()


@needs("playwright", CHROMIUM)
class TestEverydayAppsWithTheOfficialClient(EverydayApps, unittest.TestCase):
    """Datastar's own bundle."""

    @classmethod
    def setUpClass(cls) -> None:
        TestOfficialClient.client_source()  # skips where there is none
        super().setUpClass()

    def source(self) -> bytes:
        return TestOfficialClient.client_source()


class _Result(unittest.TextTestResult):
    """Counts what passed: unittest itself counts only what ran."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.passed = 0

    def addSuccess(self, test: unittest.TestCase) -> None:
        super().addSuccess(test)
        self.passed += 1

    def addError(self, test: unittest.TestCase, err: Any) -> None:
        """In a copy of the file without some of its parts, their tests are skipped."""
        reason = re.fullmatch(r"(\w+ was left out of this copy)(?s:.*)", str(err[1]))
        if reason and isinstance(err[1], StarioError):
            self.addSkip(test, reason[1])
        else:
            super().addError(test, err)

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is None or issubclass(err[0], test.failureException):
            super().addSubTest(test, subtest, err)
        else:
            self.addError(subtest, err)


def load_tests(loader: unittest.TestLoader, tests: Any, pattern: object) -> unittest.TestSuite:
    """Only classes called Test…: the others are what several of them share."""
    suite = unittest.TestSuite()
    for group in tests:
        suite.addTests(test for test in group if type(test).__name__.startswith("Test"))
    return suite


def main() -> int:
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # no word about slow tests
    names = [name for name in sys.argv[1:] if not name.startswith("-")]
    loader = unittest.TestLoader()
    here = sys.modules["__main__"]
    suite = loader.loadTestsFromNames(names, here) if names else loader.loadTestsFromModule(here)
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
