"""Break requests and see how stario.py reads them, beside a second opinion: h11 (from PyPI).

    python .ci/fuzz.py                       one minute
    python .ci/fuzz.py --count 200000        so many inputs
    python .ci/fuzz.py --seed 7 --only 1234  one input again, with what came of it

Valid requests, alone and in a row, are mutated. A finding is one of these:

- we read a request that h11 refuses, or that it reads otherwise (method, target, fields, body, or
  where the next one begins), and `EXPLAINED` has no reason for it;
- bytes that come in pieces are read in another way than at once;
- an exception that nobody handled, a connection that neither answers nor closes, an answer that is
  not well-formed, or more answers than there were requests.

The connection runs in this process over a transport that keeps what it is given. Exit status 1
where there are findings.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import h11

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import stario
from stario import (
    Connection,
    Context,
    HttpException,
    Limits,
    Stario,
    Worker,
    Writer,
)

# -- Valid requests, and what to break them with

SEEDS = [
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /a/b?c=d&e=%20 HTTP/1.1\r\nHost: example.com:80\r\nAccept: */*\r\nCookie: a=b\r\n\r\n",
    b"HEAD /x HTTP/1.1\r\nHost: [::1]:80\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET http://a.example/x?y HTTP/1.1\r\nHost: b\r\n\r\n",
    b"POST /p HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
    b"POST /p HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
    b"POST /p HTTP/1.1\r\nHost: a\r\nContent-Length: 28\r\n\r\nGET /smuggled HTTP/1.1\r\nA: b\r",
    b"POST /p HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    b"PUT /c HTTP/1.1\r\nTransfer-Encoding: chunked\r\nHost: a\r\n\r\n"
    b"3;a=b\r\nabc\r\nA\r\n0123456789\r\n00\r\nTrailer: x\r\nMore: y\r\n\r\n",
    b"POST /c HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"1\r\nG\r\n1d\r\nET /smuggled HTTP/1.1\r\nA: b\r\n\r\n0\r\n\r\n",
    b"POST /e HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc",
    b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    b"GET / HTTP/1.0\r\n\r\n",
    b"GET /ten HTTP/1.0\r\nConnection: keep-alive\r\nHost: a\r\n\r\n",
    b"POST /ten HTTP/1.0\r\nContent-Length: 2\r\nConnection: Keep-Alive\r\n\r\nok",
    b"\r\nDELETE /%C3%A4/%2F HTTP/1.1\r\nHost: a\r\nX: \xe9 \t b\r\nX: c\r\nEmpty:\r\n\r\n",
]
BITS = [
    b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\n\n", b"\r\r\n", b"\0", b" ", b"\t", b"\x0b", b"\x0c",
    b"\x7f", b"\x80", b"\x85", b"\xa0", b"\xff", b":", b";", b",", b"=", b'"', b"#", b"%", b"%zz",
    b"%ff", b"?", b"@", b"/", b"\\", b"*", b"+", b"-", b"_", b"0x", b"0", b"1", b"9" * 20,
    b"f" * 16, b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/1.10", b"http/1.1", b"CONNECT",
    b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding : chunked\r\n",
    b"Transfer-Encoding: identity\r\n", b"Transfer-Encoding: gzip, chunked\r\n",
    b"Transfer-Encoding:\x0bchunked\r\n", b"transfer-encoding: xchunked\r\n",
    b"Transfer-Encoding: chunked, chunked\r\n", b"Transfer-Encoding:\r\n chunked\r\n",
    b"Content-Length: 5\r\n", b"Content-Length: 6\r\n", b"Content-Length: 5, 5\r\n",
    b"Content-Length: +5\r\n", b"Content-Length: -1\r\n", b"Content-Length: 0x5\r\n",
    b"Content-Length: 5_0\r\n", b"Content-Length:\r\n", b"Content-Length\r\n",
    b"Content-Length: 05\r\n", b"Content-Length: 1844674407370955161\r\n",
    b"Host: b\r\n", b"Host:\r\n", b"Host: a b\r\n", b"Host: a/b\r\n", b"Host: a,b\r\n",
    b"Connection: close\r\n", b"Connection: keep-alive\r\n", b"Connection: x, close\r\n",
    b"Connection: upgrade\r\nUpgrade: h2c\r\n", b"Expect: 100-continue\r\n", b"Expect: x\r\n",
    b" folded\r\n", b"\tfolded\r\n", b"X: " + b"y" * 300 + b"\r\n", b"0\r\n\r\n", b"0\r\n",
    b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n", b"chunked", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
]  # fmt: skip


def _cut(r: random.Random, data: bytes) -> tuple[int, int]:
    start = r.randrange(len(data) + 1)
    return start, min(len(data), start + r.choice((1, 1, 1, 2, 4, 16, 64)))


def _insert(r: random.Random, data: bytes) -> bytes:
    start, _ = _cut(r, data)
    return data[:start] + r.choice(BITS) + data[start:]


def _replace(r: random.Random, data: bytes) -> bytes:
    start, stop = _cut(r, data)
    return data[:start] + r.choice(BITS) + data[stop:]


def _delete(r: random.Random, data: bytes) -> bytes:
    start, stop = _cut(r, data)
    return data[:start] + data[stop:]


def _repeat(r: random.Random, data: bytes) -> bytes:
    start, stop = _cut(r, data)
    return data[:stop] + data[start:stop] * r.choice((1, 1, 2, 50)) + data[stop:]


def _flip(r: random.Random, data: bytes) -> bytes:
    if not data:
        return data
    at = r.randrange(len(data))
    return data[:at] + bytes((data[at] ^ (1 << r.randrange(8)),)) + data[at + 1 :]


def _lines(r: random.Random, data: bytes) -> bytes:
    """Move a line, repeat it, or put one of ours among them."""
    lines = data.splitlines(keepends=True) or [b""]
    line = lines.pop(r.randrange(len(lines)))
    for new in r.choice(([line], [line, line], [line, r.choice(BITS)], [r.choice(BITS)])):
        lines.insert(r.randrange(len(lines) + 1), new)
    return b"".join(lines)


def _breaks(r: random.Random, data: bytes) -> bytes:
    """Write one line's end, or all of them, in another way."""
    other = r.choice((b"\n", b"\r", b"\r\r\n", b"\n\r", b" \r\n", b"\t\r\n", b"\0\r\n", b""))
    if r.random() < 0.3:
        return data.replace(b"\r\n", other)
    places = [found.start() for found in re.finditer(b"\r\n", data)]
    at = r.choice(places) if places else 0
    return data[:at] + other + data[at + 2 :]


def _number(r: random.Random, data: bytes) -> bytes:
    """Change a number."""
    found = list(re.finditer(rb"[0-9]+", data))
    if not found:
        return data
    one = r.choice(found)
    new = r.choice((b"%d" % (int(one[0]) + r.choice((-1, 1, 2))), b"0" + one[0], b"+" + one[0],
                    one[0] + b" ", b"0x" + one[0], one[0] + b"_0", b"-" + one[0]))  # fmt: skip
    return data[: one.start()] + new + data[one.end() :]


MUTATIONS: list[Callable[[random.Random, bytes], bytes]] = [
    _insert, _replace, _delete, _repeat, _flip, _lines, _lines, _breaks, _number,
]  # fmt: skip


def make_input(seed: int, index: int) -> tuple[bytes, random.Random]:
    """The bytes of one input, the same for the same numbers."""
    r = random.Random(f"{seed}:{index}")
    requests = [r.choice(SEEDS) for _ in range(r.choice((1, 1, 2, 2, 3)))]
    data = b"".join(requests)
    for _ in range(r.choice((1, 1, 1, 2, 2, 3, 5))):
        data = r.choice(MUTATIONS)(r, data)
    return data[:20000], r


# -- Two readings of the same bytes


@dataclass
class Read:
    """A request as it was read. `body` is None where its end was not found."""

    method: str
    target: str
    fields: dict[str, list[str]]
    body: bytes | None = None


class FakeTransport(asyncio.Transport):
    """Keeps what is written; loses the connection a turn after it is closed."""

    def __init__(self, connection: Connection) -> None:
        super().__init__({"peername": ("192.0.2.1", 1)})
        self.connection = connection
        self.out = bytearray()
        self.closing = self.lost = self.ended = self.paused = False

    def write(self, data: Any) -> None:
        assert not (self.closing or self.ended), "written after the close"
        self.out += data

    def write_eof(self) -> None:
        self.ended = True

    def can_write_eof(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            asyncio.get_running_loop().call_soon(self._lose)

    abort = close

    def _lose(self) -> None:
        self.lost = True
        self.connection.connection_lost(None)

    def is_closing(self) -> bool:
        return self.closing

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def pause_reading(self) -> None:
        assert not self.paused
        self.paused = True

    def resume_reading(self) -> None:
        assert self.paused
        self.paused = False


@dataclass
class Ours:
    """What a connection of ours made of an input."""

    requests: list[Read] = field(default_factory=list)
    refused: str = ""
    out: bytes = b""
    problems: list[str] = field(default_factory=list)


class Reader:
    """An app whose one handler notes every request, and a worker for its connections."""

    def __init__(self) -> None:
        self.app = Stario()
        self.app._fallback = self._handler
        self.worker = Worker(self.app, asyncio.get_running_loop(), Limits())
        self.worker.note_refusal = self._note_refusal  # type: ignore[method-assign]
        self.now = Ours()
        asyncio.get_running_loop().set_exception_handler(self._unhandled)

    def _note_refusal(self, client: str, exc: HttpException) -> None:
        self.now.refused = str(exc)

    def _unhandled(self, loop: object, what: dict[str, Any]) -> None:
        self.now.problems.append(f"unhandled: {what.get('exception')!r} {what['message']}")

    async def _handler(self, c: Context, w: Writer) -> None:
        query = f"?{c.req.query_string}" if c.req.query_string else ""
        fields = dict(c.req.headers._fields)
        if "transfer-encoding" in fields:
            fields["transfer-encoding"] = [fields["transfer-encoding"][0].lower()]
        read = Read(c.req.method, c.req.raw_path + query, fields)
        self.now.requests.append(read)
        # The same manner, however the bytes are cut. (How much of a body is there already when an
        # answer ends the connection, or comes instead of "100 Continue", does depend on the cuts.)
        early = not (cast(Connection, w._carrier)._close_after or "expect" in c.req.headers)
        manner = len(read.target + read.method) % 4 if early else 0
        if manner == 2:
            w.text("before the body")
            await c.req.body()
        elif manner != 3:  # 3 does not look at its body at all
            read.body = await c.req.body()
        if manner == 1:
            w.write(b"in ").write(b"chunks").end()
        elif manner != 2:
            w.text("ok")

    async def read(self, pieces: list[bytes], end: bool) -> Ours:
        """Feed the pieces, then (`end`) the end of the client's side. `out` is without dates."""
        ours = self.now = Ours()
        connection = Connection(self.worker)
        transport = FakeTransport(connection)
        connection.connection_made(transport)
        try:
            for piece in pieces:
                if transport.lost:
                    break
                connection.data_received(piece)
                await self._settle(connection)
            if connection._state is stario._ANSWER and not connection._closing:
                ours.problems.append("a whole request was not answered")
            if end and not transport.lost and not transport.closing:
                if not connection.eof_received():
                    transport.close()
                await self._settle(connection)
                if not transport.closing:
                    ours.problems.append("still open after the client's end")
        except Exception as exc:  # what a transport would have to log
            ours.problems.append(f"raised {exc!r}")
        transport.close()
        await self._settle(connection)
        if self.worker.connections or self.worker.tasks:
            ours.problems.append("a connection or a handler was left behind")
            self.worker.connections.clear()
        ours.out = re.sub(rb"date: [^\r]*\r\n", b"", bytes(transport.out))
        return ours

    async def _settle(self, connection: Connection) -> None:
        for _ in range(200):
            await asyncio.sleep(0)
            waits = connection._state is stario._BODY
            more = connection._reader.unread() > 0 and not connection._is_closing()
            if more and connection._state is stario._IDLE:
                continue  # the next request is read when the loop comes to it
            if not self.worker.tasks or (waits and not more):
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                return


def read_by_h11(data: bytes) -> tuple[list[Read], str]:
    """What h11 reads, and why it stopped."""
    found: list[Read] = []
    connection = _new_h11(data)
    body = bytearray()
    while True:
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError as exc:
            return found, str(exc)
        if isinstance(event, h11.Request):
            fields: dict[str, list[str]] = {}
            # (h11 writes "chunked" in lower case.)
            for name, value in event.headers:
                # Cookies and Last-Event-ID are UTF-8, as browsers send them; the rest is Latin-1.
                is_utf8 = name in (b"cookie", b"last-event-id")
                text = value.decode("utf-8", "replace") if is_utf8 else value.decode("latin-1")
                fields.setdefault(name.decode("latin-1"), []).append(text)
            target, fields = _origin_form(event.target.decode("latin-1"), fields)
            if target.find("?") == len(target) - 1:
                target = target[:-1]  # an empty query and none are one to our Request
            found.append(Read(event.method.decode(), target, fields))
            body.clear()
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            found[-1].body = bytes(body)
            connection.send(h11.Response(status_code=400, headers=[("content-length", "0")]))
            connection.send(h11.EndOfMessage())
            # h11 closes after every HTTP/1.0 request; we know its keep-alive.
            old = connection.their_http_version == b"1.0" and _keeps_alive(found[-1])
            if connection.our_state is not h11.DONE and not old:
                return found, "closed"
            connection = _new_h11(connection.trailing_data[0])
        else:
            return found, "it waits for more"


def _new_h11(data: bytes) -> h11.Connection:
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=2**17)
    while data.startswith(b"\r\n"):  # h11 knows none of the empty lines of RFC 9112, section 2.2
        data = data[2:]
    connection.receive_data(data)
    return connection


def _keeps_alive(read: Read) -> bool:
    options = ",".join(read.fields.get("connection", [])).lower().split(",")
    words = [option.strip() for option in options]
    return "keep-alive" in words and "close" not in words


def _origin_form(target: str, fields: dict[str, list[str]]) -> tuple[str, dict[str, list[str]]]:
    """The absolute form as RFC 9112, section 3.2.2, wants it understood."""
    found = re.fullmatch(r"(?i)https?://([^/?#]*)([^?#]*)(.*)", target)
    if not found:
        return target, fields
    return (found[2] or "/") + found[3], {**fields, "host": [found[1]]}


# -- Comparing


# Where we accept what h11 refuses, and why we do: a name, a reason, a test of what h11 says.
EXPLAINED: list[tuple[str, str, Callable[[bytes, str], bool]]] = [
    (
        "a blank before a chunk extension",
        "RFC 9112, section 7.1.1, has it as BWS, which must be parsed; h11 does not",
        lambda data, different: (
            re.search(r"illegal chunk header: bytearray\(b'[0-9A-Fa-f]+[ \\t]+;", different)
            is not None
        ),
    ),
]


def compare(data: bytes, ours: Ours, theirs: list[Read], why: str) -> str | None:
    """What is wrong with our reading, in the light of h11's; None where nothing is."""
    for number, mine in enumerate(ours.requests):
        if number >= len(theirs):
            return f"request {number + 1} ({mine.method} {mine.target}): h11 has none ({why})"
        other = theirs[number]
        for name in ("method", "target", "fields"):
            if getattr(mine, name) != getattr(other, name):
                return (
                    f"request {number + 1}, {name}: we read {getattr(mine, name)!r}, "
                    f"h11 {getattr(other, name)!r}"
                )
        if mine.body is not None and mine.body != other.body:
            return f"request {number + 1}, body: we read {mine.body!r}, h11 {other.body!r} ({why})"
    return None


_ANSWER = re.compile(rb"HTTP/1\.1 ([0-9]{3}) [^\r\n]*\r\n((?:[!-9;-~]+: [^\r\n]*\r\n)*)\r\n")


def check_answers(ours: Ours) -> str | None:
    """Each answer must be well-formed, and there must not be more than requests and a refusal."""
    out, answers = ours.out, 0
    methods = [read.method for read in ours.requests]
    while out:
        found = _ANSWER.match(out)
        if not found:
            return f"this is no answer: {out[:200]!r}"
        out = out[found.end() :]
        if found[1] == b"100":
            continue
        method = methods[answers] if answers < len(methods) else ""
        answers += 1
        length = re.search(rb"(?:^|\n)content-length: ([0-9]+)\r\n", found[2])
        if method == "HEAD":
            pass
        elif length:
            out = out[int(length[1]) :]
        elif b"transfer-encoding: chunked\r\n" in found[2]:
            body = re.match(rb"3\r\nin \r\n6\r\nchunks\r\n0\r\n\r\n", out)
            if not body:
                return f"no chunked body: {out[:200]!r}"
            out = out[body.end() :]
        else:
            out = out.removeprefix(b"in chunks")  # HTTP/1.0
        if out and b"connection: close\r\n" in found[2]:
            return "something was sent behind an answer that closes"
    if answers > len(methods) + bool(ours.refused):
        return f"{answers} answers to {len(methods)} requests"
    return None


def _are_alike(one: Ours, other: Ours) -> bool:
    """Whether it makes no difference how the bytes were cut.

    Which of two faults is seen first may depend on it; and a request whose body turns out to be
    malformed has been started if its head came alone.
    """
    a, b = sorted((one.requests, other.requests), key=len)
    if len(b) == len(a) + 1 and b[-1].body is None and one.refused:
        b = b[:-1]
    answers = [len(re.findall(rb"HTTP/1\.1 [2-5]", ours.out)) for ours in (one, other)]
    return a == b and bool(one.refused) == bool(other.refused) and answers[0] == answers[1]


async def try_input(
    reader: Reader, data: bytes, r: random.Random, tally: Counter[str]
) -> str | None:
    """One input through all checks: the first finding, or None."""
    whole = await reader.read([data], end=True)
    theirs, why = read_by_h11(data)
    tally["requests read"] += len(whole.requests)
    tally["refused by us"] += bool(whole.refused)
    tally["read alike to the end"] += len(whole.requests) == len(theirs) and not whole.refused
    different = compare(data, whole, theirs, why)
    if different:
        reasons = [name for name, _, holds in EXPLAINED if holds(data, different)]
        if not reasons:
            return different
        tally[f"explained: {reasons[0]}"] += 1
    cuts = sorted(r.randrange(len(data) + 1) for _ in range(r.choice((1, 2, 5, 20))))
    pieces = [data[i:j] for i, j in zip([0, *cuts], [*cuts, len(data)], strict=True) if i < j]
    if len(data) < 300 and r.random() < 0.1:
        pieces = [data[i : i + 1] for i in range(len(data))]
    cut = await reader.read(pieces, end=True)
    for ours in (whole, cut):
        if ours.problems:
            return "; ".join(ours.problems)
        wrong = check_answers(ours)
        if wrong:
            return wrong
    if not _are_alike(whole, cut):
        return f"in pieces {pieces!r} it is read otherwise: {cut} and not {whole}"
    return None


async def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--seconds", type=float, default=60.0, help="stop after so long")
    options.add_argument("--count", type=int, help="so many inputs, however long it takes")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--only", type=int, help="just the input of this number, in full")
    given = options.parse_args()
    reader = Reader()
    if given.only is not None:
        data, r = make_input(given.seed, given.only)
        print(f"{data!r}\nours: {await reader.read([data], end=True)}\nh11:  {read_by_h11(data)}")
        finding = await try_input(reader, data, r, Counter())
        print(f"finding: {finding}")
        return 1 if finding else 0
    tally: Counter[str] = Counter()
    began, index, findings = time.monotonic(), 0, 0
    while index < given.count if given.count else time.monotonic() - began < given.seconds:
        data, r = make_input(given.seed, index)
        finding = await try_input(reader, data, r, tally)
        if finding:
            findings += 1
            print(f"finding in {data!r}\n    {finding}")
            print(f"    again: {sys.argv[0]} --seed {given.seed} --only {index}", flush=True)
            if findings == 20:
                break
        index += 1
    took = time.monotonic() - began
    print(f"{index} inputs in {took:.0f} s ({index / took:.0f} a second), {findings} findings")
    for name, number in sorted(tally.items()):
        print(f"    {name}: {number}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
