"""What stario.py promises, part by part, in the order of the file.

    python test_stario.py              all tests; some are skipped where only Python is there
    python test_stario.py TestRelay    one class
    STARIO_TEST_ALL=1 python test_stario.py    a missing browser, Redis, ... is a failure

Most tests talk to a real server over a real socket.
"""

from __future__ import annotations

import ast
import asyncio
import enum
import gzip
import importlib
import io
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import unittest
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import date, datetime, timezone
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar, Literal, NotRequired, TypedDict

import stario
from stario import (
    CompressionConfig,
    Context,
    HttpException,
    JsonTracer,
    RichTracer,
    Router,
    SafeString,
    SignalsError,
    Span,
    SpanEvent,
    Stario,
    StarioError,
    TestClient,
    Tracer,
    Writer,
    at,
    data,
    datastar_script,
    h,
    js,
    read_signals,
    render,
    s,
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


async def ask(app: Stario, *pieces: bytes | str, **options: Any) -> bytes:
    """All that a server sends, up to its closing, to a client that sends this and then waits."""
    async with connected(app, **options) as peer:
        await peer.send(*pieces)
        return await asyncio.wait_for(peer.rest(), 10)


def within(awaitable: Any, seconds: float = 10) -> Any:
    """Await something that must happen, without hanging for ever if it does not."""
    return asyncio.wait_for(awaitable, seconds)


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

    def test_everything_public_is_exported_and_has_a_docstring(self) -> None:
        for name in stario.__all__:
            thing = getattr(stario, name)
            with self.subTest(name):
                self.assertTrue((getattr(thing, "__doc__", "") or "").strip())
        for name in ("h", "data", "at"):
            self.assertIn(name, stario.__all__)


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

    def test_attributes_of_every_kind(self) -> None:
        for attributes, text in [
            ({"title": 'a"b<c>&'}, ' title="a&quot;b&lt;c&gt;&amp;"'),
            ({"title": SafeString('<b>"')}, ' title="<b>&quot;"'),
            ({"hidden": True, "a": None, "b": False}, " hidden a"),
            ({"width": 3, "x": 0.5}, ' width="3" x="0.5"'),
            ({"class": ["a", None, "b"]}, ' class="a b"'),
            ({"style": {"color": "red", "top": 0}}, ' style="color:red;top:0;"'),
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

    def test_void_elements_refuse_content_and_script_keeps_its_text(self) -> None:
        with self.assertRaisesRegex(StarioError, "void"):
            h.Br("x")
        self.assertEqual(h.Script("a < b && c"), "<script>a < b && c</script>")
        self.assertEqual(h.Style(["a>b{}"]), "<style>a>b{}</style>")
        for text in ("</script>", "</SCRIPT >", "<!-- x"):
            with self.subTest(text), self.assertRaises(StarioError):
                h.Script(f"x = '{text}'")

    def test_a_first_line_feed_survives_in_pre_and_textarea(self) -> None:
        self.assertEqual(h.Textarea("\nx"), "<textarea>\n\nx</textarea>")
        self.assertEqual(h.Pre("x"), "<pre>x</pre>")

    def test_unknown_tags_and_bad_names_are_refused_with_a_hint(self) -> None:
        with self.assertRaisesRegex(AttributeError, "h.tag"):
            h.Dvi  # noqa: B018
        with self.assertRaises(StarioError):
            h.tag("a b")
        with self.assertRaises(StarioError):
            render({"class": "x"})

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


class TestDatastar(unittest.TestCase):
    """Part 4: attributes, actions, events."""

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
            (data.on_interval("x()", duration="250ms"), {"data-on-interval__duration.250ms": "x()"}),
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
        with self.assertRaises(TypeError):
            at.get("/x", retries=3)
        with self.assertRaises((TypeError, StarioError)):
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
            w.patch(SafeString("<p>\n\nevent: x\r\rdata: y\r\n</p>"), id="1", retry=50)
            w.sync('{"a":\n1}', only_if_missing=True)
            w.patch(h.P(), mode="append", selector="#x", namespace="svg", use_view_transition=True)
            w.remove("#gone")
            w.execute("x < 1", attributes={"async": True})
            w.event("plain", "a\nb")

        app.get("/", page)

        async def read() -> str:
            async with TestClient(app) as client:
                return (await client.get("/")).text

        self.assertEqual(
            asyncio.run(read()),
            "event: datastar-patch-elements\nid: 1\nretry: 50\n"
            "data: elements <p>\ndata: elements \ndata: elements event: x\ndata: elements \n"
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

    def test_impossible_patches_are_refused(self) -> None:
        writer = Writer(stario._Exchange(), a_request(), CompressionConfig())
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


class Typed(TypedDict):
    a: int
    b: NotRequired[str]


class TestSignals(unittest.TestCase):
    """Part 5: from JSON to your dataclass."""

    GOOD: ClassVar[dict[str, Any]] = {
        "text": "x", "whole": "42", "number": "1.5", "yes": "on", "when": "2024-01-31T12:00",
        "inner": {"n": 1, "unknown": 2}, "many": [1, "2"], "table": {"k": {"n": "3"}},
        "size": "1", "word": "2", "maybe": "", "unknown": [1],
    }  # fmt: skip

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
            (uuid.UUID, str(uuid.UUID(int=1)), uuid.UUID(int=1)), (date, "2024-02-29", date(2024, 2, 29)),
            (Typed, {"a": "1"}, {"a": 1}), (dict, {"a": [1]}, {"a": [1]}),
        ]:  # fmt: skip
            with self.subTest(f"{kind} {value!r}"):
                self.assertEqual(read_signals(kind, value), expected)
        for kind, value in [
            (str, 1), (str, True), (str, None), (int, True), (int, "1_0"), (int, "٣"), (int, 1e400),
            (float, "inf"), (float, "1,5"), (bool, 0), (int, "9" * 5000), (Literal[1], True),
            (date, "2023-02-29"), (list[int], "1"), (Typed, {"b": "x"}), (set[Any], [[1]]),
        ]:  # fmt: skip
            with self.subTest(f"{kind} {value!r}"), self.assertRaises(SignalsError):
                read_signals(kind, value)

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
        with self.assertRaisesRegex(StarioError, "complex"):
            read_signals(complex, {})

    def test_they_come_in_the_query_or_in_the_body_and_nothing_counts_as_empty(self) -> None:
        app = Stario()

        async def show(c: Context, w: Writer) -> None:
            w.json(await c.signals())

        for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
            app.handle(method, "/", show)

        async def check() -> None:
            async with TestClient(app) as client:
                for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
                    answer = await client.request(method, "/", signals={"a": "ü&"})
                    self.assertEqual(answer.json(), {"a": "ü&"})
                    self.assertEqual((await client.request(method, "/")).json(), {})
                for body, status in (
                    (b"{", 400),
                    (b"\xff", 400),
                    (b"[1]", 422),
                    (b"[" * 99999, 400),
                ):
                    answer = await client.post("/", body=body)
                    self.assertEqual(answer.status, status, answer.text)

        asyncio.run(check())


class TestTelemetry(unittest.TestCase):
    """Part 6: spans, and the tracers that show them."""

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

    def test_json_is_one_object_a_line(self) -> None:
        out = io.StringIO()
        with JsonTracer(out) as tracer, tracer("a", {"x": {1, 2}}) as span:
            span("e", {"k": "v\n"})
            span.step("b").end()
            span.link(span)
        child, parent = map(json.loads, out.getvalue().splitlines())
        self.assertEqual((child["name"], child["parent_id"]), ("b", parent["span_id"]))
        self.assertEqual(parent["events"][0]["attributes"], {"k": "v\n"})
        self.assertEqual(parent["links"], [{"span_id": span.id, "trace_id": span.trace_id}])
        self.assertRegex(parent["time"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$")
        self.assertGreaterEqual(parent["duration_ms"], 0)

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

    def test_a_tracer_whose_stream_is_broken_does_not_break_requests(self) -> None:
        class Broken(io.StringIO):
            def write(self, text: str) -> int:
                raise OSError("disk full")

        for tracer in (JsonTracer(Broken()), RichTracer(Broken())):
            tracer("a").end()

    def test_rich_shows_each_thing_as_it_happens_and_no_client_can_move_the_cursor(self) -> None:
        out = io.StringIO()
        with RichTracer(out) as tracer:
            with tracer("job") as span:
                span("half\x1b[2J", {"k": "v"})
                with span.step("part"):
                    pass
            tracer("quick", {"a": 1}).end()
        text = re.sub(r"\d\d:\d\d:\d\d\.\d{3} [0-9a-f]{4} ", "", out.getvalue())
        text = re.sub(r"\d+\.\d ms", "N ms", text)
        self.assertEqual(
            text.splitlines(),
            ["┌ job", "│ half\\x1b[2J  k=v", "  ─ part  N ms", "└ job  N ms", "─ quick  N ms  a=1"],
        )

    def test_a_handlers_context_writes_to_the_span_of_its_step(self) -> None:
        out = io.StringIO()
        app = Stario(JsonTracer(out))

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
        spans = {line["name"]: line for line in map(json.loads, out.getvalue().splitlines())}
        request = spans["GET /"]
        self.assertEqual(spans["part 1"]["attributes"], {"n": 1})
        self.assertEqual(spans["part 2"]["attributes"], {"n": 2})
        self.assertEqual(spans["db"]["attributes"], {"sql": "x", "rows": 10})
        self.assertEqual(spans["db"]["events"][0]["name"], "miss")
        self.assertEqual(spans["db"]["parent_id"], request["span_id"])
        self.assertEqual(request["attributes"]["user"], "u")
        self.assertEqual(request["attributes"]["status"], 204)
        self.assertEqual(request["events"][0]["attributes"]["exception.type"], "ValueError")
        self.assertNotIn("error", request)


def a_request(target: str = "/", method: str = "GET", **fields: str) -> stario.Request:
    headers = {name.replace("_", "-"): [value] for name, value in fields.items()}
    return stario.Request(method, target, stario.Headers(headers), None, lambda: "")


class TestRequest(AsyncTest):
    """Part 8: headers, query, cookies, body."""

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

    async def test_a_request_can_raise_its_own_limit(self) -> None:
        app = Stario(max_body=10)

        async def upload(c: Context, w: Writer) -> None:
            c.req.max_body = 100
            w.text(str(len(await c.req.body())))

        app.post("/", upload)
        async with TestClient(app) as client:
            self.assertEqual((await client.post("/", body=b"x" * 100)).text, "100")
            self.assertEqual((await client.post("/", body=b"x" * 101)).status, 413)


class TestWriter(AsyncTest):
    """Part 9: the answers in one shot, raw answers, cookies, compression."""

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
        writer = Writer(stario._Exchange(), a_request(), CompressionConfig())
        for url, status in (("/a\nb", 307), ("/a\r", 307), ("/", 200), ("/\0", 307)):
            with self.assertRaises(StarioError):
                writer.redirect(url, status)

    async def test_a_second_answer_is_an_error_and_work_after_the_first_goes_on(self) -> None:
        seen: list[str] = []

        async def handler(c: Context, w: Writer) -> None:
            w.empty(204)
            seen.append("after")
            for again in (lambda: w.text("x"), lambda: w.patch(h.P()), lambda: w.write(b"x")):
                try:
                    again()
                except StarioError:
                    seen.append("refused")
            w.end()

        self.assertEqual((await self.answer(handler)).status, 204)
        self.assertEqual(seen, ["after", "refused", "refused", "refused"])

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
        writer = Writer(stario._Exchange(), a_request(), CompressionConfig())
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

        async def off(c: Context, w: Writer) -> None:
            w.text("x" * 1000)

        turned_off = {"app": {"compression": CompressionConfig(gzip_level=-1)}}
        for handler, options in ((small, {}), (image, {}), (own, {}), (off, turned_off)):
            found = await self.answer(handler, headers={"accept-encoding": "gzip"}, **options)
            self.assertNotEqual(found.headers.get("content-encoding"), "gzip", handler)

    async def test_every_coding_that_is_there_gives_the_text_back(self) -> None:
        text = "".join(chr(97 + i * i % 26) for i in range(5000))

        async def whole(c: Context, w: Writer) -> None:
            w.text(text)

        async def stream(c: Context, w: Writer) -> None:
            for _ in range(3):
                w.event("x", text)

        for coding in stario._compressors():
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
    """Part 10: context and routing."""

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
        async with TestClient(app) as client:
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
            w.headers.set("content-type", "image/png").set("x-kept", "1")
            raise HttpException(int(c.req.params["status"]), c.req.query.get("detail", ""))

        app.get("/{status}", raising)
        async with TestClient(app) as client:
            found = await client.get("/404")
            self.assertEqual((found.status, found.text), (404, "Not Found"))
            self.assertEqual(found.headers.get("content-type"), "text/plain; charset=utf-8")
            self.assertEqual(found.headers.get("x-kept"), "1")
            found = await client.get("/302?detail=/login")
            self.assertEqual((found.status, found.headers.get("location")), (302, "/login"))

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
        app = Stario(JsonTracer(out))

        async def silent(c: Context, w: Writer) -> None:
            pass

        app.get("/", silent)
        async with TestClient(app) as client:
            self.assertEqual((await client.get("/")).status, 204)
        self.assertEqual(json.loads(out.getvalue())["events"][0]["name"], "no answer")

    async def test_an_unhandled_exception_shows_nothing_to_the_client_and_all_to_the_developer(
        self,
    ) -> None:
        out = io.StringIO()
        app = Stario(JsonTracer(out))

        async def fail(c: Context, w: Writer) -> None:
            raise RuntimeError("secret")

        app.get("/", fail)
        async with TestClient(app) as client:
            answer = await client.get("/")
        self.assertEqual((answer.status, answer.text), (500, "Internal Server Error"))
        span = json.loads(out.getvalue())
        self.assertEqual(span["error"], "RuntimeError: secret")
        self.assertIn("in fail", span["events"][0]["attributes"]["exception.stacktrace"])


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
