"""Stress for stario.py: many clients that come, paint, stall and vanish, and nothing left behind.

    python .ci/soak.py                     about two minutes
    python .ci/soak.py --quick             under a minute, smaller
    python .ci/soak.py --hour              an hour of all that users do, and of restarts
    python .ci/soak.py hour --seconds 60   the same, for a minute
    python .ci/soak.py --workers 4         the server with four event loops
    python .ci/soak.py idle relay          only these stages: tiles attack idle relay restart hour

Each stage starts a server of its own as another process, on 127.0.0.1 at a free port. It prints
what was seen, and the exit code is 1 if a target was missed.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import json
import os
import random
import re
import socket
import struct
import sys
import tempfile
import threading
import time
import tracemalloc
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = next(place for place in (HERE.parent, HERE, Path.cwd()) if (place / "stario.py").exists())
sys.path.insert(0, str(ROOT))

import tiles_app  # noqa: E402
from stario import Context, Relay, Span, Stario, Subscription, Tracer, Writer, h  # noqa: E402

IDLE_TARGET = 20 * 1024  # bytes of RSS for each idle stream
MALLOC_SLACK = 2_000_000  # bytes
GROWTH_TARGET = 0.05  # of the memory before
SERVED_TARGET = 1.0  # seconds for a normal client during an attack
GRACEFUL_TIMEOUT = 5.0
STANDSTILL = 1.0  # seconds of five that the machine lets a process wait, to be noted
START_TIMEOUT = 120.0  # seconds for a server's process to begin: the machine may have much to do
BROWSER_CODINGS = "Accept-Encoding: gzip, deflate, br, zstd\r\n"


# -- Both sides


Standstill = tuple[float, float, float]  # from, until, seconds of it that it was kept waiting


class Standstills:
    """When this process was ready to run and did not: the machine was suspended, or busy.

    A thread looks at it, so that a blocked event loop, which is a fault, is not taken for one.
    """

    PAUSE = 5.0

    def __init__(self) -> None:
        self.seen: list[Standstill] = []

    def watch(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            before, queued = time.monotonic(), self._queued()
            time.sleep(self.PAUSE)
            now = time.monotonic()
            waited = max(now - before - self.PAUSE, self._queued() - queued)
            if waited > STANDSTILL:
                self.seen.append((before, now, waited))

    def _queued(self) -> float:
        """Seconds that the main thread has waited for a processor (0 where Linux is not there)."""
        with suppress(OSError):
            return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
        return 0.0


def told(seen: list[Standstill]) -> str:
    longest = max((waited for _, _, waited in seen), default=0.0)
    total = sum(waited for _, _, waited in seen)
    return f"{total:.0f} s in all, the longest {longest:.1f} s"


def kept_waiting(started: float, ended: float, seen: list[Standstill]) -> float:
    """Seconds of a stretch of time that a process was kept waiting."""
    return sum(
        min(waited, min(until, ended) - max(since, started))
        for since, until, waited in seen
        if since < ended and until > started
    )


standstills = Standstills()


# -- The server's side: Tiles, with counters and a few routes of its own


class CountingRelay(Relay[str]):
    """A relay that adds up what its subscriptions dropped, and knows which still exist."""

    def __init__(self) -> None:
        super().__init__()
        self.dropped = 0
        self.subscriptions: weakref.WeakSet[Subscription[str]] = weakref.WeakSet()

    def subscribe(
        self, *patterns: str, maxsize: int = 1000, overflow: str = "oldest"
    ) -> Subscription[str]:
        subscription = super().subscribe(*patterns, maxsize=maxsize, overflow=overflow)
        self.subscriptions.add(subscription)
        weakref.finalize(subscription, self._note, subscription._mailbox)
        return subscription

    def _note(self, mailbox: Any) -> None:
        self.dropped += mailbox.dropped


class CountingTracer(Tracer):
    """A tracer that knows which spans are open, and counts those that failed."""

    def __init__(self) -> None:
        self.open: set[str] = set()
        self.failed: list[str] = []

    def on_start(self, span: Span) -> None:
        self.open.add(span.id)

    def on_end(self, span: Span) -> None:
        self.open.discard(span.id)
        if span.error:
            self.failed.append(f"{span.name}: {span.error}")


class Counts:
    """Streams opened and cleaned up, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.opened = 0
        self.cleaned = 0

    def note_opened(self) -> None:
        with self._lock:
            self.opened += 1

    def note_cleaned(self) -> None:
        with self._lock:
            self.cleaned += 1


counts = Counts()
relay = CountingRelay()
tracer = CountingTracer()
server: Any = None


async def idle(c: Context, w: Writer) -> None:
    """A stream with nothing to say."""
    counts.note_opened()
    w.patch(h.P({"id": "idle"}, "here"))
    async for _, text in w.alive(relay.subscribe("idle")):
        w.sync({"text": text})
    counts.note_cleaned()


async def flood(c: Context, w: Writer) -> None:
    """A stream that sends as much as the client takes."""
    counts.note_opened()
    async for _ in w.alive():
        w.patch(h.P({"id": "flood"}, "x" * 16_000))
    counts.note_cleaned()


async def page(c: Context, w: Writer) -> None:
    """An answer that does not fit into the buffers of a client that does not read."""
    w.text("x" * 128 * 1024)


async def upload(c: Context, w: Writer) -> None:
    """Take a body piece by piece."""
    size = 0
    async for piece in c.req.stream():
        size += len(piece)
    w.text(str(size))


async def stats(c: Context, w: Writer) -> None:
    """What there is in this process, after a tidying-up: what is free goes back to the system."""
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):  # glibc has this, others need not
        ctypes.CDLL(None).malloc_trim(0)
    w.json(figures())


def figures() -> dict[str, Any]:
    return {
        "rss": rss(),
        "in_use": in_use(),
        "traced": tracemalloc.get_traced_memory()[0],
        "objects": len(gc.get_objects()),
        "kinds": Counter(type(thing).__name__ for thing in gc.get_objects()),
        "tasks": sum(len(worker.tasks) for worker in server._workers),
        "all_tasks": len(asyncio.all_tasks()),
        "descriptors": descriptors(),
        "connections": sum(len(worker.connections) for worker in server._workers),
        "subscriptions": len(relay.subscriptions),
        "patterns": sum(map(len, relay._tables.values())),
        "players": len(tiles_app.state.players),
        "spans": len(tracer.open),
        "failed": tracer.failed,
        "opened": counts.opened,
        "cleaned": counts.cleaned,
        "dropped": relay.dropped,
        "stood_still": standstills.seen,
    }


def rss() -> int:
    """Bytes of this process that are in memory (0 where the system does not tell)."""
    with suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return 0


class Mallinfo(ctypes.Structure):
    """What glibc's mallinfo2 gives (from 2.33 on)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


def in_use() -> int:
    """Bytes that are given out to the program (0 where this cannot be told).

    RSS is this and what the allocators keep for a next time: Python's gives an arena of a megabyte
    back when nothing in it is in use, C's gives back whole pages.
    """
    try:
        ask = ctypes.CDLL(None).mallinfo2
        ask.restype = Mallinfo
        found = ask()
        python = re.search(r"allocated blocks\s*=\s*([\d,]+)", allocator_report())
    except (OSError, AttributeError, TypeError):  # another C library, another Python
        return 0
    if python is None:  # with tracemalloc, and where another allocator is built in
        return 0
    return int(found.uordblks + found.hblkhd) + int(python[1].replace(",", ""))


def allocator_report() -> str:
    """What CPython writes about its allocator, which it does to the descriptor of stderr only."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        stderr = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            sys._debugmallocstats()
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        file.seek(0)
        return file.read().decode()


def descriptors() -> int:
    """Open descriptors of this process (0 where the system does not tell)."""
    with suppress(OSError):
        return len(os.listdir("/proc/self/fd"))
    return 0


def count_players() -> None:
    """Let Tiles use our relay, and tell us of each stream that joins and leaves."""
    state = tiles_app.state
    join, leave = state.join, state.leave

    async def counted_join(user_id: str) -> None:
        counts.note_opened()
        await join(user_id)

    async def counted_leave(user_id: str) -> None:
        await leave(user_id)
        counts.note_cleaned()

    state.join, state.leave, state.relay = counted_join, counted_leave, relay


async def serve(workers: int, port: int) -> None:
    """The other process: say the port, serve until SIGTERM, say what is left.

    With a port it shares that with its predecessor.
    """
    global server
    count_players()
    app = Stario(tracer)
    app.get("/", tiles_app.home)
    app.assets("/static", {"style.css": "p {}", "icon.svg": "<svg/>"})
    app.get("/subscribe", tiles_app.subscribe)
    app.post("/click", tiles_app.click)
    app.get("/idle", idle)
    app.get("/flood", flood)
    app.get("/page", page)
    app.get("/stats", stats)
    app.post("/upload", upload)
    async with app.running(
        port=port,
        reuse_port=bool(port),
        workers=workers,
        backlog=4096,
        max_connections=50_000,
        graceful_timeout=GRACEFUL_TIMEOUT,
    ) as running:
        server = running
        standstills.watch()
        print(running.port, flush=True)
        await running.wait_for_signal()
        started = time.monotonic()
    print(json.dumps({**figures(), "stopped_in": time.monotonic() - started}), flush=True)


# -- The clients' side


@dataclass
class Target:
    """The server process, as the clients see it."""

    port: int
    process: asyncio.subprocess.Process
    last: dict[str, Any] = field(default_factory=dict)

    async def stats(self) -> dict[str, Any]:
        body = await get(self.port, "/stats")
        found: dict[str, Any] = json.loads(body)
        return found

    async def settled(self, until: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The figures, once they are so, or after ten seconds."""
        deadline = time.monotonic() + 10
        found = await self.stats()
        while not until(found) and time.monotonic() < deadline:
            await asyncio.sleep(0.2)
            found = await self.stats()
        return found

    async def stop(self) -> None:
        """SIGTERM, and its last words."""
        self.process.terminate()
        assert self.process.stdout is not None
        words = await asyncio.wait_for(self.process.stdout.read(), GRACEFUL_TIMEOUT + 10)
        await self.process.wait()
        self.last = json.loads(words) if words else {}


@asynccontextmanager
async def served(options: argparse.Namespace, port: int = 0) -> AsyncIterator[Target]:
    """A server process for one stage."""
    tracing = ["-X", "tracemalloc"] if options.tracemalloc else []
    process = await asyncio.create_subprocess_exec(
        sys.executable, *tracing, __file__, "--serve", "--workers", str(options.workers),
        "--port", str(port),
        stdout=asyncio.subprocess.PIPE, limit=2**20,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        port_line = await asyncio.wait_for(process.stdout.readline(), START_TIMEOUT)
        target = Target(int(port_line), process)
        yield target
        if not target.last:
            await target.stop()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def connect(
    port: int, receive_buffer: int = 0
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    client = socket.socket()
    client.setblocking(False)
    if receive_buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", port))
    return await asyncio.open_connection(sock=client, limit=2**16)


async def get(port: int, path: str) -> bytes:
    """The body of an answer."""
    reader, writer = await connect(port)
    writer.write(request(path, close=True))
    _, _, body = (await asyncio.wait_for(reader.read(-1), 30)).partition(b"\r\n\r\n")
    writer.close()
    return body


def request(
    path: str, method: str = "GET", body: bytes = b"", *, close: bool = False, fields: str = ""
) -> bytes:
    fields += f"Content-Length: {len(body)}\r\n" if body else ""
    fields += "Connection: close\r\n" if close else ""
    return f"{method} {path} HTTP/1.1\r\nHost: soak\r\n{fields}\r\n".encode() + body


async def read_answer(reader: asyncio.StreamReader) -> bytes:
    """The head of an answer that has a length, of a connection that goes on."""
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
    length = head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]
    await asyncio.wait_for(reader.readexactly(int(length)), 30)
    return head


def reset(writer: asyncio.StreamWriter) -> None:
    """Vanish with a TCP reset."""
    client = writer.get_extra_info("socket")
    with suppress(OSError):  # the server was first
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def subscription(user_id: str) -> bytes:
    signals = f"%7B%22user_id%22%3A%22{user_id}%22%7D"
    return request(f"/subscribe?datastar={signals}")


class CutShort:
    """Clients that did not get what they asked for: from when, until when, and why.

    The machine is to blame where it kept one of the sides waiting for more than half of the time:
    then it has used up the patience of 30 seconds that each side has. Else the server is.
    """

    def __init__(self) -> None:
        self.lives: list[tuple[float, float, str]] = []

    def note(self, exc: Exception, started: float) -> None:
        self.lives.append((started, time.monotonic(), f"{type(exc).__name__} {exc}".strip()))

    def by_server(self, *sides: list[Standstill]) -> int:
        """How many, with what each side knows of its own standstills."""
        return sum(
            all(kept_waiting(started, ended, side) * 2 <= ended - started for side in sides)
            for started, ended, _ in self.lives
        )

    def told(self, *sides: list[Standstill]) -> str:
        by_server = self.by_server(*sides)
        reasons = Counter(reason for *_, reason in self.lives).most_common(3)
        named = ", ".join(f"{count} {reason}" for reason, count in reasons)
        text = f"{by_server}, and {len(self.lives) - by_server} by standstills of the machine"
        return f"{text} ({named})" if named else text


class Crowd:
    """Clients of Tiles, each of which lives many short lives."""

    def __init__(self, port: int, seconds: float, uploading: bool = False) -> None:
        self.port = port
        self.uploading = uploading
        self.until = time.monotonic() + seconds
        self.held = 0
        self.most_held = 0
        self.streams = 0
        self.events = 0
        self.clicks = 0
        self.uploads = 0
        self.cut_short = CutShort()

    async def run(self, size: int) -> None:
        await asyncio.gather(*(self._browser(number) for number in range(size)))

    async def _browser(self, number: int) -> None:
        chance = random.Random(number)
        while (started := time.monotonic()) < self.until:
            try:
                await self._life(f"u{number}", chance)
            except (TimeoutError, ConnectionError, asyncio.IncompleteReadError) as exc:
                self.cut_short.note(exc, started)
            await asyncio.sleep(chance.random() * 0.2)

    async def _life(self, user_id: str, chance: random.Random) -> None:
        reader, writer = await connect(self.port, receive_buffer=chance.choice((0, 4096)))
        try:
            writer.write(subscription(user_id))
            self.streams += 1
            self.held += 1
            self.most_held = max(self.most_held, self.held)
            ending = chance.choice((self._close, self._reset, self._half_close, self._stop_reading))
            if chance.random() < 0.1:  # gone before the first event
                await ending(reader, writer, chance)
                return
            await self._read(reader, chance.random() * 2)
            if chance.random() < 0.7:
                await self._paint(user_id, chance)
                if self.uploading and chance.random() < 0.3:
                    await self._upload(chance)
                await self._read(reader, chance.random())
            await ending(reader, writer, chance)
        finally:
            self.held -= 1
            writer.close()

    async def _read(self, reader: asyncio.StreamReader, seconds: float) -> None:
        until = min(time.monotonic() + seconds, self.until)
        while (left := until - time.monotonic()) > 0:
            try:
                data = await asyncio.wait_for(reader.read(2**16), left)
            except TimeoutError:
                return
            if not data:
                raise ConnectionError("the server ended the stream")
            self.events += data.count(b"event: ")

    async def _paint(self, user_id: str, chance: random.Random) -> None:
        body = json.dumps({"user_id": user_id}).encode()
        reader, writer = await connect(self.port)
        writer.write(request(f"/click?cellId={chance.randrange(25)}", "POST", body, close=True))
        await asyncio.wait_for(reader.read(-1), 30)
        writer.close()
        self.clicks += 1

    async def _upload(self, chance: random.Random) -> None:
        """Send up to a megabyte; every fourth time, vanish in the middle."""
        size, sent = chance.randrange(2**20), 0
        reader, writer = await connect(self.port)
        try:
            head = f"POST /upload HTTP/1.1\r\nHost: soak\r\nContent-Length: {size}\r\n"
            writer.write(head.encode() + b"Connection: close\r\n\r\n")
            vanish = size // 2 if chance.random() < 0.25 else size + 1
            while sent < size:
                piece = b"x" * min(2**16, size - sent)
                writer.write(piece)
                sent += len(piece)
                if sent > vanish:
                    reset(writer)
                    return
                await asyncio.wait_for(writer.drain(), 30)
            answer = await asyncio.wait_for(reader.read(-1), 30)
            if not answer.endswith(b"\r\n\r\n%d" % size):
                raise ConnectionError("the upload was not answered")
            self.uploads += 1
        finally:
            writer.close()

    async def _close(self, reader: Any, writer: asyncio.StreamWriter, chance: Any) -> None:
        writer.close()

    async def _reset(self, reader: Any, writer: asyncio.StreamWriter, chance: Any) -> None:
        reset(writer)

    async def _half_close(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, chance: Any
    ) -> None:
        writer.write_eof()
        await asyncio.wait_for(reader.read(-1), 30)

    async def _stop_reading(
        self, reader: Any, writer: asyncio.StreamWriter, chance: random.Random
    ) -> None:
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(chance.random() * 2)
        reset(writer)


# -- Stages


class Report:
    """What a stage has found, and what it missed."""

    def __init__(self) -> None:
        self.missed: list[str] = []

    def say(self, **figures: object) -> None:
        for name, value in figures.items():
            print(f"  {name.replace('_', ' '):34} {value}", flush=True)

    def check(self, promise: str, kept: bool) -> None:
        if not kept:
            self.missed.append(promise)
            print(f"  MISSED: {promise}", flush=True)

    def say_cut_short(self, crowd: Crowd, after: dict[str, Any]) -> None:
        """What the machine was too busy for is no fault of the server."""
        sides = standstills.seen, after["stood_still"]
        self.say(
            lives_cut_short=crowd.cut_short.told(*sides),
            clients_stood_still=told(sides[0]),
            server_stood_still=told(sides[1]),
            load_of_the_machine=load(),
        )
        self.check("no life is cut short by the server", not crowd.cut_short.by_server(*sides))

    def check_nothing_left(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        """What both stages with vanishing clients promise."""
        self.say(
            cleanups_run_of_streams_opened=f"{after['cleaned']} of {after['opened']}",
            dropped_by_rule=after["dropped"],
            memory_in_the_process=change(before["rss"], after["rss"]),
            of_it_in_use=change(before["in_use"], after["in_use"]),
            of_it_traced=change(before["traced"], after["traced"]),
            objects_before=before["objects"],
            objects_after=after["objects"],
        )
        self.check("no cleanup is missed", after["cleaned"] == after["opened"])
        for what in ("connections", "tasks", "spans"):
            self.check(f"no {what} left: {after[what]}", after[what] <= 1)  # /stats itself
        for what in ("subscriptions", "patterns", "players"):
            self.check(f"no {what} left: {after[what]}", after[what] == 0)
        self.check(f"no handler failed: {after['failed'][:3]}", not after["failed"])
        for what in ("rss", "in_use", "traced"):
            # What malloc keeps for a next time depends on which requests met: that is not ours.
            slack = MALLOC_SLACK if what == "rss" else 0
            most = before[what] * (1 + GROWTH_TARGET) + slack
            self.check(f"memory ({what}) is within 5%", after[what] <= most)
        grown = after["objects"] - before["objects"]
        more = Counter(after["kinds"]) - Counter(before["kinds"])
        self.say(objects_more=", ".join(f"{n} {kind}" for kind, n in more.most_common(6)))
        # What bounded caches and the last requests hold varies by up to a thousand. A leak is an
        # object or more for each of the thousands of streams and requests that have come and gone.
        bound = max(1500, after["opened"] - before["opened"])
        self.check(f"objects: {grown} more, of {bound} that may be", grown < bound)


def load() -> str:
    """What the machine had to do in the last five minutes: above 1, everything waits."""
    if not hasattr(os, "getloadavg"):  # Windows
        return "(not told)"
    return f"{os.getloadavg()[1] / (os.cpu_count() or 1):.1f} runnable processes for each CPU"


def change(before: int, after: int) -> str:
    """Two sizes in bytes, and by how much the second is more."""
    if not before:
        return "(not told)"
    return f"{before / 2**20:.2f} MB, then {after / 2**20:.2f} MB ({after / before - 1:+.1%})"


async def warm_up(target: Target, clients: int, seconds: float, *, uploading: bool = False) -> None:
    """Let the server keep what it will keep: caches are full, and more was in use than will be.

    An allocator gives back only what is free as a whole, so its share of the memory follows the
    most that was ever in use at once. Half as many clients again make that certain.
    """
    reader, writer = await connect(target.port)
    for size in range(1, 300):  # fields that frame a body are recognised: 256 of them are kept
        writer.write(request("/upload", "POST", b"x" * size))
        await read_answer(reader)
    writer.close()
    await Crowd(target.port, seconds, uploading).run(clients * 3 // 2)


def is_quiet(found: dict[str, Any]) -> bool:
    return bool(found["connections"] <= 1 and found["tasks"] <= 1)


async def tiles(report: Report, options: argparse.Namespace) -> None:
    """Browsers that join, paint, vanish in every way there is, and come back."""
    async with served(options) as target:
        await warm_up(target, options.clients, 8 if options.quick else 30)
        before = await target.settled(is_quiet)
        crowd = Crowd(target.port, options.seconds)
        await crowd.run(options.clients)
        after = await target.settled(is_quiet)
    report.say(
        connections_held=crowd.most_held,
        streams=crowd.streams,
        clicks=crowd.clicks,
        events_delivered=crowd.events,
    )
    report.say_cut_short(crowd, after)
    report.check("events are delivered", crowd.events > crowd.streams)
    report.check_nothing_left(before, after)


async def attack(report: Report, options: argparse.Namespace) -> None:
    """Slow heads and slow readers, and a normal client among them."""
    size = at_most(500 if options.quick else 2000, times=2)
    async with served(options) as target:
        for _ in range(2):  # to warm up: what memory is kept for a next time is kept now
            await one_attack(target, size, 3.0)
        before = await target.settled(is_quiet)
        slowest = await one_attack(target, size, 5.0 if options.quick else 12.0)
        after = await target.settled(is_quiet)
    report.say(slow_heads=size, slow_readers=size, a_normal_request_took=f"{slowest * 1000:.0f} ms")
    report.check("a normal client is served within a second", slowest < SERVED_TARGET)
    report.check_nothing_left(before, after)


async def one_attack(target: Target, size: int, seconds: float) -> float:
    """The longest time that a normal request took."""
    writers = [(await connect(target.port))[1] for _ in range(size)]
    for writer in writers:
        writer.write(b"GET / HTTP/1.1\r\nHost: ")
    readers = [await connect(target.port, receive_buffer=4096) for _ in range(size)]
    for number, (_, writer) in enumerate(readers):
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(request("/page" if number % 4 else "/flood"))
    slowest = 0.0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        started = time.monotonic()
        await get(target.port, "/")
        slowest = max(slowest, time.monotonic() - started)
        for writer in writers:  # one byte a second
            writer.write(b"x")
        await asyncio.sleep(0.5)
    for writer in (*writers, *(writer for _, writer in readers)):
        reset(writer)
    return slowest


async def idle_streams(report: Report, options: argparse.Namespace) -> None:
    """Many open streams that have nothing to say: what one costs."""
    size = at_most(1000 if options.quick else 5000, times=2)
    async with served(options) as target:
        # The first hundred pay for what is made only once.
        first = await open_streams(target.port, 100)
        before = await target.stats()
        plain = await open_streams(target.port, size)
        held = await target.stats()
        compressed = await open_streams(target.port, size, BROWSER_CODINGS)
        both = await target.stats()
        hang_up(first + plain + compressed)
        after = await target.settled(is_quiet)
    each = (held["rss"] - before["rss"]) / size
    each_compressed = (both["rss"] - held["rss"]) / size
    report.say(
        idle_streams=f"{size} and {size} compressed",
        memory_of_each=f"{each / 1024:.1f} kB",
        memory_of_each_compressed=f"{each_compressed / 1024:.1f} kB",
        objects_of_each=(held["objects"] - before["objects"]) / size,
        cleanups_run_of_streams_opened=f"{after['cleaned']} of {after['opened']}",
    )
    target_size = f"less than {IDLE_TARGET // 1024} kB"
    report.check(f"an idle stream costs {target_size}", each < IDLE_TARGET)
    report.check(f"a compressed one costs {target_size}", each_compressed < IDLE_TARGET)
    report.check("no cleanup is missed", after["cleaned"] == after["opened"] == 2 * size + 100)


async def open_streams(port: int, size: int, codings: str = "") -> list[asyncio.StreamWriter]:
    """Streams whose first event has come."""
    opened = []
    for _ in range(size):
        reader, writer = await connect(port)
        writer.write(request("/idle", fields=codings))
        await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
        await asyncio.wait_for(reader.readuntil(b"\n"), 30)
        opened.append(writer)
    return opened


def hang_up(writers: Iterable[asyncio.StreamWriter]) -> None:
    for writer in writers:
        writer.close()


async def restart(report: Report, options: argparse.Namespace) -> None:
    """SIGTERM while streams are open."""
    size = at_most(200 if options.quick else 1000, times=1)
    async with served(options) as target:
        writers = await open_streams(target.port, size)
        await target.stop()
        hang_up(writers)
    last = target.last
    report.say(
        open_streams=size,
        stopped_in=f"{last['stopped_in'] * 1000:.0f} ms",
        cleanups_run_of_streams_opened=f"{last['cleaned']} of {last['opened']}",
    )
    report.check("no cleanup is missed", last["cleaned"] == last["opened"] == size)
    report.check("it ends within graceful_timeout", last["stopped_in"] < GRACEFUL_TIMEOUT)
    report.check("it ends with code 0", target.process.returncode == 0)


async def hour(report: Report, options: argparse.Namespace) -> None:
    """All that users do, on a server that stays; beside it, servers that follow one another."""
    async with served(options) as target:
        seconds = min(120.0, options.seconds / 2)
        await warm_up(target, options.clients, seconds, uploading=True)
        before = await target.settled(is_quiet)
        crowd = Crowd(target.port, options.seconds, uploading=True)
        await asyncio.gather(
            crowd.run(options.clients), successions(report, options, min(60.0, options.seconds / 4))
        )
        after = await target.settled(is_quiet)
    report.say(
        streams=crowd.streams,
        clicks=crowd.clicks,
        uploads=crowd.uploads,
        events_delivered=crowd.events,
        descriptors=f"{before['descriptors']}, then {after['descriptors']}",
        all_tasks=f"{before['all_tasks']}, then {after['all_tasks']}",
    )
    report.say_cut_short(crowd, after)
    for what in ("descriptors", "all_tasks"):
        report.check(f"as many {what} as at the start", after[what] <= before[what])
    report.check("memory is within 5% of its start", after["rss"] <= before["rss"] * 1.05)
    report.check_nothing_left(before, after)


async def successions(report: Report, options: argparse.Namespace, every: float) -> None:
    """Servers that take a port over, one after the other: the clients lose nothing."""
    until = time.monotonic() + options.seconds
    servers = []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    counted = KeptClients(port)
    async with AsyncExitStack() as stack:
        servers.append(await stack.enter_async_context(served(options, port)))
        clients = [asyncio.create_task(counted.run()) for _ in range(32)]
        while time.monotonic() + every < until:
            await asyncio.sleep(every)
            servers.append(await stack.enter_async_context(served(options, port)))
            stopped = servers[-2]
            await stopped.stop()
            left = {what: stopped.last[what] for what in ("tasks", "connections", "spans")}
            report.check(f"nothing is left at a stop: {left}", not any(left.values()))
        counted.over = True
        await asyncio.gather(*clients)
    sides = [standstills.seen, *(server.last["stood_still"] for server in servers)]
    report.say(
        restarts=len(servers) - 1,
        requests_meanwhile=counted.answered,
        failed=counted.failed.told(*sides),
    )
    report.check("no request fails in a restart", not counted.failed.by_server(*sides))


class KeptClients:
    """Clients that keep their connection until an answer says that it ends."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.over = False
        self.answered = 0
        self.failed = CutShort()

    async def run(self) -> None:
        while not self.over:
            started = time.monotonic()
            try:
                reader, writer = await connect(self.port)
                while await self._ask(reader, writer):
                    started = time.monotonic()
                writer.close()
            except (TimeoutError, ConnectionError, asyncio.IncompleteReadError) as exc:
                self.failed.note(exc, started)
                await asyncio.sleep(0.05)

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; whether the connection goes on."""
        writer.write(request("/static/style.css"))
        head = await read_answer(reader)
        self.answered += 1
        await asyncio.sleep(0.05)
        return not self.over and b"connection: close" not in head


async def publishing(report: Report, options: argparse.Namespace) -> None:
    """Publishers in threads, a hundred subscribers: nothing is lost but by the rule, in order."""
    total = options.publishes
    started = time.monotonic()
    published: Relay[tuple[int, int]] = Relay()
    publishers = 4
    subscriptions = [published.subscribe("numbers", maxsize=1000) for _ in range(100)]
    readers = [asyncio.create_task(read_in_order(one)) for one in subscriptions]

    def publish(publisher: int) -> None:
        for number in range(total // publishers):
            published.publish("numbers", (publisher, number))

    threads = [asyncio.to_thread(publish, publisher) for publisher in range(publishers)]
    await asyncio.gather(*threads)
    for one in subscriptions:
        one.close()
    results = await asyncio.gather(*readers)
    dropped = sum(one.dropped for one in subscriptions)
    received = sum(count for count, _ in results)
    seconds = time.monotonic() - started
    report.say(
        publishes=total,
        events_delivered=received,
        dropped_by_rule=dropped,
        publishes_a_second=int(total / seconds),
    )
    report.check("nothing is lost but by the rule", received + dropped == total * 100)
    report.check("in order for each publisher", all(in_order for _, in_order in results))


async def read_in_order(subscription: Subscription[tuple[int, int]]) -> tuple[int, bool]:
    """How many came, and whether each publisher's came in order."""
    last: dict[int, int] = {}
    count, in_order = 0, True
    async for _, (publisher, number) in subscription:
        count += 1
        in_order = in_order and last.get(publisher, -1) < number
        last[publisher] = number
    return count, in_order


# What runs when no stage is named; the hour only by its name.
STAGES: dict[str, Callable[[Report, argparse.Namespace], Awaitable[None]]] = {
    "attack": attack,
    "idle": idle_streams,
    "relay": publishing,
    "restart": restart,
    "tiles": tiles,
}
HOUR = {"hour": hour}


def raise_descriptor_limit() -> int:
    """Thousands of connections need as many file descriptors: how many there may be."""
    try:
        import resource
    except ImportError:  # Windows
        return 2**31
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else 2**31


def at_most(size: int, times: int) -> int:
    """A number of connections, as far as there are descriptors for `times` as many."""
    return min(size, (raise_descriptor_limit() - 300) // times)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("stages", nargs="*", help=" ".join(STAGES))
    parser.add_argument("--seconds", type=float, help="how long the Tiles stage takes")
    parser.add_argument("--clients", type=int, default=200, help="of the Tiles stage")
    parser.add_argument("--workers", type=int, default=1, help="event loops of the server")
    parser.add_argument("--publishes", type=int, help="of the relay stage, to 100 subscribers")
    parser.add_argument("--quick", action="store_true", help="smaller, under a minute")
    parser.add_argument("--hour", action="store_true", help="the hour stage, for an hour")
    parser.add_argument("--tracemalloc", action="store_true", help="count Python's memory, too")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.hour:
        options.stages, options.seconds = ["hour"], options.seconds or 3600
    options.seconds = options.seconds or (15 if options.quick else 60)
    options.publishes = options.publishes or (20_000 if options.quick else 100_000)
    unknown = set(options.stages) - set(STAGES | HOUR)
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}: {', '.join(STAGES | HOUR)}")
    return options


async def soak(options: argparse.Namespace) -> int:
    report = Report()
    standstills.watch()
    for name in options.stages or STAGES:
        started = time.monotonic()
        stage = (STAGES | HOUR)[name]
        print(f"{name}: {stage.__doc__}", flush=True)
        await stage(report, options)
        report.say(seconds=f"{time.monotonic() - started:.1f}")
    print(f"{len(report.missed)} targets missed", *report.missed, sep="\n  ")
    return 1 if report.missed else 0


def main() -> int:
    options = read_options()
    raise_descriptor_limit()
    if options.serve:
        asyncio.run(serve(options.workers, options.port))
        return 0
    return asyncio.run(soak(options))


if __name__ == "__main__":
    sys.exit(main())
