"""The benchmark: our `stario.py` beside its peers, in thirteen workloads.

    python .ci/bench.py                          all of it; about an hour
    python .ci/bench.py --only 1,3,6             these workloads
    python .ci/bench.py --peers stario5,starlette --loops uvloop
    python .ci/bench.py --rounds 1 --seconds 1 --scale 0.05     a quick look
    python .ci/bench.py --markdown               tables for the README

The first run makes a virtual environment of its own and installs the peers into it. Servers run
one at a time, interleaved: a round measures each of them once, and the ratios are taken within a
round, so that what else the machine does meets all of them alike. What is printed is the median
of the rounds, and for the ratios their smallest and largest, too.

The workloads are the table `CASES`, the peers the table `PEERS`; the servers are in
`bench_apps.py`, the pages in `bench_views.py`, the load and its measuring in `bench_load.py`.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench_load import (
    HERE,
    LOAD_CORE,
    SERVER_CORE,
    BenchError,
    IdleConnections,
    Load,
    Server,
    Streams,
    browser_script,
    final_path,
    pinned,
    raise_file_limit,
    wrk,
)

STARIO_PATH = Path(os.environ.get("STARIO_PATH", HERE.parent / "stario.py")).resolve()
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "stario-bench"
SMALL_FILE, LARGE_FILE = 64_000, 20_000_000
STARVED = 90  # percent: a server that is less busy than this was not given enough to do
BOTH = ("asyncio", "uvloop")

Sample = dict[str, float]  # figure -> value; the first figure is the one that decides


# --- Who takes part -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """A server or a library that takes part: its name, what it needs, the loops it is run on."""

    label: str
    packages: tuple[str, ...] = ()
    loops: tuple[str, ...] = BOTH
    imports: str = ""

    def title(self) -> str:
        if not self.packages:
            return self.label
        name = self.packages[0].partition("[")[0]
        return self.label.format(version=importlib.metadata.version(name))


UVICORN = "uvicorn[standard]"
DATASTAR = ("datastar-py", "Jinja2")
PEERS = {
    "bare": Peer("bare asyncio.Protocol", imports="import asyncio"),
    "ours": Peer("stario.py", imports="import stario"),
    "ours-baked": Peer("stario.py, baked", loops=BOTH),
    "stario5": Peer("Stario {version}", ("stario",), imports="import stario"),
    "stario5-baked": Peer("Stario {version}, baked", ("stario",)),
    "starlette": Peer(
        "Starlette {version} on uvicorn",
        ("starlette", UVICORN, *DATASTAR),
        imports="import starlette.applications, starlette.responses, uvicorn",
    ),
    "fastapi": Peer(
        "FastAPI {version} on uvicorn",
        ("fastapi", UVICORN),
        ("uvloop",),
        imports="import fastapi, uvicorn",
    ),
    "fasthtml": Peer("FastHTML {version}", ("python-fasthtml", UVICORN), ("uvloop",)),
    "blacksheep": Peer("BlackSheep {version} on uvicorn", ("blacksheep", UVICORN), ("uvloop",)),
    "granian": Peer(
        "BlackSheep on Granian {version}", ("granian", "blacksheep", "uvloop"), ("uvloop",)
    ),
    "sanic": Peer("Sanic {version}", ("sanic", "datastar-py"), ("uvloop",), imports="import sanic"),
    "aiohttp": Peer("aiohttp {version}", ("aiohttp",), imports="import aiohttp.web"),
    "microdot": Peer("microdot {version}", ("microdot",), ("asyncio",), imports="import microdot"),
    "jinja2": Peer("Jinja2 {version}, compiled", ("Jinja2",)),
    "htpy": Peer("htpy {version}", ("htpy",)),
    "fstring": Peer("f-string by hand"),
    "nginx": Peer("nginx"),
}
SHARED_PACKAGES = ("uvloop", "brotli", "zstandard")


@dataclass(frozen=True)
class Row:
    """One line of a table: a peer, and the setting that it is measured with."""

    peer: str
    variant: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.peer} {self.variant}".strip()

    def title(self) -> str:
        name = PEERS[self.peer].title()
        return f"{name}, {self.variant}" if self.variant else name


def rows(*peers: str) -> tuple[Row, ...]:
    return tuple(map(Row, peers))


def steps(unit: str, setting: str, *values: int) -> tuple[Row, ...]:
    """The same server with ever more of something beside."""
    return tuple(Row("ours", f"{value:,} {unit}", {setting: str(value)}) for value in values)


def tracers(*names: str) -> tuple[Row, ...]:
    """The same server, silent at first, then with each of these tracers."""
    return tuple(Row("ours", name, {"tracer": name}) for name in ("silent", *names))


# --- What is measured ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One table: what is served and measured, who takes part, and what we have to reach.

    A target is a bound on the median ratio ours/theirs of the deciding figure: at most that much
    of a cost, at least that much of a rate. Its key is a row's, or a row's and a loop's.
    """

    number: int
    title: str
    measure: Callable[["Run"], Sample]
    rows: tuple[Row, ...]
    role: str = ""
    path: str = "/"
    targets: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    loops: tuple[str, ...] = BOTH
    more_is_better: bool = False
    grows: bool = False  # rows are compared with the first one, not ours with the others
    note: str = ""


@dataclass(frozen=True)
class Run:
    """One measurement about to be made."""

    case: Case
    row: Row
    loop: str
    seconds: float
    scale: float
    files: Path

    @property
    def settings(self) -> dict[str, str]:
        return {**self.case.settings, **self.row.settings, "directory": str(self.files)}

    def count(self, name: str) -> int:
        """A number from the settings, scaled down for a quick look."""
        number = int(self.settings.get(name, 0))
        return max(1, round(number * self.scale)) if number else 0

    def server(self) -> Server:
        settings = self.settings
        for name in ("routes", "subscribers"):
            if name in settings:
                settings[name] = str(self.count(name))
        return Server(self.row.peer, self.case.role, self.loop, settings)


def cost(server: Server, load: Callable[[float], Load], seconds: float) -> tuple[Load, float]:
    """What a load did, and the CPU seconds that it cost the server, after a short warm-up."""
    load(seconds / 4)
    before = server.cpu()
    done = load(seconds)
    return done, server.cpu() - before


def per_request(done: Load, cpu: float) -> Sample:
    """A server that is not busy all the time waits more often, and pays for each time it wakes:
    figures of servers that were not equally busy (a slow load core) do not compare."""
    return {
        "CPU µs": cpu / done.requests * 1e6,
        "requests/s": done.requests / done.seconds,
        "busy %": cpu / done.seconds * 100,
    }


def requests(run: Run) -> Sample:
    """GET requests with wrk's own two header fields, or as many as the setting says."""
    extra = max(0, int(run.settings.get("fields", 0)) - 1)
    headers = [f"X-Field-{number}: value of field {number}" for number in range(extra)]
    path = run.case.path.replace("LAST", str(run.count("routes") - 1))
    with run.server() as server:
        url = f"http://127.0.0.1:{server.port}{path}"
        return per_request(*cost(server, lambda s: wrk(url, s, headers=headers), run.seconds))


def browser_requests(run: Run) -> Sample:
    """GET requests with a browser's header block, another per connection or per request."""
    varying = run.settings["varying"]
    with run.server() as server:
        url = f"http://127.0.0.1:{server.port}/"
        script = browser_script(server.port, "/", varying)
        threads = 64 if varying == "connection" else 1
        return per_request(
            *cost(server, lambda s: wrk(url, s, script=script, threads=threads), run.seconds)
        )


def at_a_thousand(run: Run) -> Sample:
    """1,000 requests a second: a hundred connections, each of which asks ten times."""
    with run.server() as server:
        url = f"http://127.0.0.1:{server.port}/"
        script = "function delay() return 100 end"
        done, cpu = cost(server, lambda s: wrk(url, s, connections=100, script=script), run.seconds)
        return {
            "% of a core": cpu / done.seconds * 100,
            "requests/s": done.requests / done.seconds,
        }


CLICK = """
wrk.method = "POST"
wrk.body = '{"user_id":"user_1","cell":7,"tool":"brush","open":true}'
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Datastar-Request"] = "true"
"""


def clicks(run: Run) -> Sample:
    """POST requests with JSON signals, answered by 204."""
    with run.server() as server:
        url = f"http://127.0.0.1:{server.port}/click?cellId=7"
        return per_request(*cost(server, lambda s: wrk(url, s, script=CLICK), run.seconds))


def beside_idle(run: Run) -> Sample:
    """GET requests while many connections beside say nothing."""
    with run.server() as server:
        idle = IdleConnections(server.port, run.count("idle"))
        url = f"http://127.0.0.1:{server.port}/"
        sample = per_request(*cost(server, lambda s: wrk(url, s), run.seconds))
        idle.check()
        idle.close()
        return sample


def html_builds(run: Run) -> Sample:
    """HTML alone, in a process without a server."""
    command = [sys.executable, str(HERE / "bench_views.py"), run.row.peer]
    command += [run.settings["view"], str(run.seconds / 2)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, preexec_fn=pinned(SERVER_CORE)
    )
    if done.returncode:
        raise BenchError(done.stderr.strip().splitlines()[-1])
    return {"CPU µs": float(done.stdout)}


def fan_out(run: Run) -> Sample:
    """Publishes to many streams, each of which renders its own view."""
    with run.server() as server:
        count = run.count("streams")
        streams = Streams(server.port, count)
        streams.publish()
        before, started, times = server.cpu(), time.monotonic(), list[float]()
        while len(times) < 5 or time.monotonic() - started < run.seconds:
            times.append(streams.publish())
        cpu = server.cpu() - before
        streams.close()
        events = count * len(times)
        return {
            "events/s": events / sum(times),
            "CPU µs": cpu / events * 1e6,
            "p50 ms": statistics.median(times) * 1e3,
            "p99 ms": statistics.quantiles(times, n=100, method="inclusive")[98] * 1e3,
        }


def on_the_wire(run: Run) -> Sample:
    """What one delivery costs in CPU and in bytes, with a content coding."""
    with run.server() as server:
        count = run.count("streams")
        streams = Streams(server.port, count, run.settings["encoding"])
        streams.publish()
        before, received = server.cpu(), streams.received
        publishes = 10
        for _ in range(publishes):
            streams.publish()
        cpu, events = server.cpu() - before, count * publishes
        sample = {
            "CPU ms / 1,000": cpu / events * 1e6,
            "bytes / delivery": (streams.received - received) / events,
        }
        streams.close()
        return sample


def stream_memory(run: Run) -> Sample:
    """Resident memory for each stream that is open and silent."""
    with run.server() as server:
        count = run.count("streams")
        encoding = run.settings.get("encoding", "identity")
        Streams(server.port, min(count, 50), encoding).close()  # what is allocated once
        before = server.rss()
        streams = Streams(server.port, count, encoding, decode=False)
        sample = {"kB / stream": (server.rss() - before) / count / 1e3}
        streams.close()
        return sample


def idle_memory(run: Run) -> Sample:
    """Resident memory for each keep-alive connection between two requests."""
    with run.server() as server:
        count = run.count("idle")
        IdleConnections(server.port, min(count, 50)).close()
        before = server.rss()
        idle = IdleConnections(server.port, count)
        sample = {"kB / connection": (server.rss() - before) / count / 1e3}
        idle.check()
        idle.close()
        return sample


def starts(run: Run) -> Sample:
    """From the start of a process to its first answer, and the import alone."""
    with run.server():
        pass  # compiles what has not been compiled yet
    with run.server() as server:
        cpu, wall = server.cpu(), server.start_seconds
    ours = run.row.peer == "ours"
    environment = {**os.environ, **({"PYTHONPATH": str(STARIO_PATH.parent)} if ours else {})}
    before = child_cpu()
    subprocess.run(
        [sys.executable, "-c", PEERS[run.row.peer].imports],
        env=environment,
        check=True,
        preexec_fn=pinned(SERVER_CORE),
    )
    imported = child_cpu() - before
    return {"CPU ms": cpu * 1e3, "first answer ms": wall * 1e3, "import CPU ms": imported * 1e3}


def child_cpu() -> float:
    """CPU seconds of all the child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def small_files(run: Run) -> Sample:
    """A style sheet of 64 kB, over 64 connections."""
    done, cpu = fetch(run, "style.css", connections=64)
    return {"requests/s": done.requests / done.seconds, "CPU µs": cpu / done.requests * 1e6}


def large_files(run: Run) -> Sample:
    """A file of 20 MB, over 8 connections."""
    done, cpu = fetch(run, "film.bin", connections=8)
    return {"CPU ms / GB": cpu / done.bytes * 1e12, "GB/s": done.bytes / done.seconds / 1e9}


def fetch(run: Run, name: str, connections: int) -> tuple[Load, float]:
    with run.server() as server:
        path = final_path(server.port, f"/static/{name}")
        url = f"http://127.0.0.1:{server.port}{path}"
        return cost(server, lambda s: wrk(url, s, connections=connections), run.seconds)


def coded(peer: str, *codings: str) -> tuple[Row, ...]:
    """A peer once for each content coding, at its default level."""
    return tuple(Row(peer, coding, {"encoding": coding}) for coding in codings)


def levels(coding: str, setting: str, *numbers: int) -> tuple[Row, ...]:
    """Ours at several levels of one content coding."""
    return tuple(
        Row("ours", f"{coding} {number}", {"encoding": coding, setting: str(number)})
        for number in numbers
    )


CODINGS = ("identity", "zstd", "br", "gzip")
LIKE = (
    "Stario's own compiled views are compared with our baked ones, all others with our plain ones."
)
CASES = (
    Case(
        1,
        "Plain text, silent",
        requests,
        rows(
            *("bare", "ours", "stario5", "granian", "blacksheep", "starlette"),
            *("sanic", "aiohttp", "fastapi", "microdot"),
        ),
        role="plain",
        targets={
            "bare asyncio": 1.35,
            "bare uvloop": 1.6,
            "stario5 asyncio": 0.6,
            "stario5 uvloop": 1.0,
            "starlette": 0.35,
        },
    ),
    Case(
        2,
        "Plain text, a browser's header block, another for each connection",
        browser_requests,
        rows("bare", "ours", "stario5", "starlette"),
        role="plain",
        settings={"varying": "connection"},
        targets={"stario5": 0.7},
    ),
    Case(
        2,
        "Plain text, a browser's header block, another in each request",
        browser_requests,
        rows("bare", "ours", "stario5", "starlette"),
        role="plain",
        settings={"varying": "request"},
        targets={"stario5": 1.0, "starlette": 0.5},
    ),
    Case(
        3,
        "A click: POST with JSON signals, dataclass, 204, work after it",
        clicks,
        rows("ours", "stario5", "starlette", "sanic"),
        role="click",
        targets={"stario5": 0.9, "starlette": 0.45, "sanic": 0.45},
    ),
    Case(
        4,
        "JSON with structured logging to a file",
        requests,
        rows("ours", "stario5", "starlette", "fastapi"),
        role="json",
        targets={"stario5": 0.4, "starlette": 0.3},
        note="Starlette and FastAPI write uvicorn's access log, a plain line for each request.",
    ),
    Case(
        5,
        "The Tiles page, built for each request",
        requests,
        rows("ours", "ours-baked", "stario5", "stario5-baked", "starlette", "fasthtml"),
        role="tiles",
        path="/tiles",
        targets={"stario5": 0.4, "stario5-baked": 0.75, "starlette": 0.7, "fasthtml": 0.1},
        note="Starlette renders a compiled Jinja2 template; FastHTML is on uvicorn. " + LIKE,
    ),
    Case(
        6,
        "Building HTML alone: the Tiles view",
        html_builds,
        rows(
            "fstring",
            "ours",
            "ours-baked",
            "stario5",
            "stario5-baked",
            "jinja2",
            "htpy",
            "fasthtml",
        ),
        settings={"view": "board"},
        targets={"stario5": 0.4, "stario5-baked": 0.75, "jinja2": 1.0},
        loops=("asyncio",),
        note=LIKE,
    ),
    Case(
        6,
        "Building HTML alone: a table of 1,000 rows",
        html_builds,
        rows(
            "fstring",
            "ours",
            "ours-baked",
            "stario5",
            "stario5-baked",
            "jinja2",
            "htpy",
            "fasthtml",
        ),
        settings={"view": "table"},
        targets={"stario5": 0.4, "stario5-baked": 0.75, "jinja2": 1.0},
        loops=("asyncio",),
        note=LIKE,
    ),
    Case(
        7,
        "Fan-out: 1,000 streams, each renders its own view",
        fan_out,
        rows("ours", "ours-baked", "stario5", "stario5-baked", "starlette"),
        role="streams",
        settings={"streams": "1000"},
        targets={"stario5": 2.5, "stario5-baked": 1.18, "starlette": 1.5},
        more_is_better=True,
        note="p50 and p99: milliseconds from publish to the last receipt, over the publishes. "
        + LIKE,
    ),
    Case(
        8,
        "Fan-out, compressed: CPU and bytes on the wire",
        on_the_wire,
        (*coded("ours", *CODINGS), *coded("stario5", *CODINGS)),
        role="streams",
        settings={"streams": "200"},
        loops=("asyncio",),
        grows=True,
        note="Starlette's own middleware does not compress event streams.",
    ),
    Case(
        8,
        "Compression levels",
        on_the_wire,
        (
            *coded("ours", "identity"),
            *levels("zstd", "zstd_level", 1, 3, 6, 9),
            *levels("br", "brotli_level", 1, 3, 4, 5, 6),
            *levels("gzip", "gzip_level", 1, 4, 6, 9),
        ),
        role="streams",
        settings={"streams": "200"},
        loops=("asyncio",),
        grows=True,
    ),
    Case(
        8,
        "Memory of 5,000 compressed streams",
        stream_memory,
        (*coded("ours", *CODINGS), *coded("stario5", *CODINGS)),
        role="streams",
        settings={"streams": "5000"},
        loops=("asyncio",),
        grows=True,
    ),
    Case(
        9,
        "Memory per idle stream, 5,000 streams",
        stream_memory,
        rows("ours", "stario5", "starlette"),
        role="streams",
        settings={"streams": "5000"},
        note="The target is 20 kB.",
    ),
    Case(
        9,
        "Memory per idle keep-alive connection, 5,000 connections",
        idle_memory,
        rows("bare", "ours", "stario5", "starlette", "sanic", "aiohttp"),
        role="plain",
        settings={"idle": "5000"},
    ),
    Case(
        10,
        "Start: process to first answer",
        starts,
        rows("bare", "ours", "stario5", "starlette", "sanic", "aiohttp", "fastapi", "microdot"),
        role="plain",
        loops=("asyncio",),
        targets={"bare": 1.35},
    ),
    Case(
        11,
        "Files: 64 kB of CSS",
        small_files,
        rows("nginx", "ours", "stario5", "aiohttp", "starlette"),
        role="files",
        targets={"stario5": 1.0, "aiohttp": 1.0, "starlette": 1.0},
        more_is_better=True,
    ),
    Case(
        11,
        "Files: 20 MB",
        large_files,
        rows("nginx", "ours", "stario5", "aiohttp", "starlette"),
        role="files",
        targets={"aiohttp": 1.0, "starlette": 1.0},
    ),
    Case(
        12,
        "Growth: idle connections beside",
        beside_idle,
        steps("idle", "idle", 10, 1_000, 10_000),
        role="plain",
        grows=True,
    ),
    Case(
        12,
        "Growth: routes, the last one asked for",
        requests,
        steps("routes", "routes", 10, 10_000),
        role="plain",
        path="/routeLAST/7",
        grows=True,
    ),
    Case(
        12,
        "Growth: header fields",
        requests,
        steps("fields", "fields", 5, 50),
        role="plain",
        grows=True,
    ),
    Case(
        12,
        "Growth: subscribers of other subjects, a click publishes",
        clicks,
        steps("others", "subscribers", 0, 100_000),
        role="click",
        grows=True,
    ),
    Case(
        13,
        "Telemetry: plain text, traced to a file",
        requests,
        tracers("JsonTracer"),
        role="plain",
        targets={"ours JsonTracer": 1.25},
        grows=True,
    ),
    Case(
        13,
        "Telemetry: 1,000 requests a second",
        at_a_thousand,
        tracers("JsonTracer", "RichTracer"),
        role="plain",
        grows=True,
        note="RichTracer, at a terminal, may take 10 percent points more than silence.",
    ),
)


# --- The virtual environment ---------------------------------------------------------------------


def inside_environment(folder: Path, upgrade: bool) -> None:
    """Makes the environment where it is missing, and goes on inside it as the same process."""
    python = folder / "bin" / "python"
    if Path(sys.prefix).resolve() == folder.resolve():
        return
    if not python.exists():
        print(f"making {folder}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
    installed = folder / "installed.json"
    if upgrade or not installed.exists():
        failed = install(python)
        installed.write_text(json.dumps(failed))
    os.execv(python, [str(python), *sys.argv])


def install(python: Path) -> dict[str, str]:
    """Installs the peers' packages; what does not install is named with pip's own words."""
    names = sorted({name for peer in PEERS.values() for name in peer.packages} | {*SHARED_PACKAGES})
    print("installing", ", ".join(names), flush=True)
    if not pip(python, *names):
        return {}
    return {name: reason for name in names if (reason := pip(python, name))}


def pip(python: Path, *names: str) -> str:
    """Installs packages; gives pip's first complaint where that fails."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--upgrade", *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return (errors or ["pip failed"])[0][:200] if done.returncode else ""


def missing_peers(folder: Path) -> dict[str, str]:
    """The peers that cannot take part, and why."""
    failed: dict[str, str] = json.loads((folder / "installed.json").read_text())
    missing = {
        key: f"{name}: {failed[name]}"
        for key, peer in PEERS.items()
        for name in peer.packages
        if name in failed
    }
    if not shutil.which("nginx"):
        missing["nginx"] = "not installed (apt-get install nginx)"
    if not STARIO_PATH.exists():
        missing["ours"] = f"{STARIO_PATH} does not exist"
    return missing


# --- Running and printing -------------------------------------------------------------------------

Results = dict[tuple[str, str], list[Sample | None]]  # (row's key, loop) -> one sample a round


def contestants(case: Case, options: argparse.Namespace) -> Iterator[tuple[Row, str]]:
    """The rows of a case, loop by loop; a case that is on one loop only takes every peer there."""
    for loop in case.loops:
        for row in case.rows:
            asked = loop in options.loops and loop in PEERS[row.peer].loops
            fits = asked or len(case.loops) == 1
            if fits and row.peer not in options.missing and chosen(row.peer, options):
                yield row, loop


def chosen(peer: str, options: argparse.Namespace) -> bool:
    """Ourselves and the limits are in every table."""
    always = peer in ("ours", "bare", "fstring", "nginx")
    return always or not options.peers or peer in options.peers


def run_case(case: Case, options: argparse.Namespace, files: Path) -> Results:
    results: Results = {}
    for number in range(options.rounds):
        for row, loop in contestants(case, options):
            progress(f"{case.title}: round {number + 1}, {row.key} on {loop}")
            run = Run(case, row, loop, options.seconds, options.scale, files)
            samples = results.setdefault((row.key, loop), [])
            try:
                samples.append(case.measure(run))
            except Exception as error:  # one peer that fails does not end an hour of measuring
                samples.append(None)
                progress("")
                print(f"! {case.title}: {row.key} on {loop}: {error}", file=sys.stderr)
    progress("")
    return results


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def ratios(ours: list[Sample | None], theirs: list[Sample | None]) -> list[float]:
    """The ratios of the deciding figure, round by round."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a and b]
    return [a[next(iter(a))] / b[next(iter(b))] for a, b in pairs]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}..{max(values):.2f})"


def verdict(case: Case, row: Row, loop: str, values: list[float]) -> str:
    bound = case.targets.get(f"{row.key} {loop}", case.targets.get(row.key))
    if bound is None:
        return ""
    middle = statistics.median(values)
    sign, reached = ("≥", middle >= bound) if case.more_is_better else ("≤", middle <= bound)
    return f"{sign} {bound:g} {'reached' if reached else 'MISSED'}"


def table(case: Case, loop: str, results: Results) -> list[list[str]]:
    """The lines of one table: a head, then a line for each row that has figures."""
    present = [row for row in case.rows if any(results.get((row.key, loop), []))]
    if not present:
        return []
    reference = results[present[0].key, loop] if case.grows else results.get(("ours", loop))
    figures = next(list(s) for s in results[present[0].key, loop] if s)
    lines = [["", *figures, "row / first" if case.grows else "ours / theirs", "target"]]
    for row in present:
        samples = results[row.key, loop]
        line = [row.title(), *(shown(name, samples) for name in figures)]
        if row.peer == "stario5-baked":  # like with like
            line += compared(case, row, loop, samples, results.get(("ours-baked", loop)))
        else:
            line += compared(case, row, loop, samples, reference)
        lines.append(line)
    return lines


def shown(name: str, samples: list[Sample | None]) -> str:
    """The median of one figure, with about three digits."""
    value = statistics.median(sample[name] for sample in samples if sample)
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def compared(
    case: Case,
    row: Row,
    loop: str,
    samples: list[Sample | None],
    reference: list[Sample | None] | None,
) -> list[str]:
    if reference is None or reference is samples:
        return ["", ""]
    values = ratios(samples, reference) if case.grows else ratios(reference, samples)
    if not values:
        return ["", ""]
    return [spread(values), verdict(case, row, loop, values)]


def print_table(lines: list[list[str]], markdown: bool) -> None:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for number, line in enumerate(lines):
        cells = [
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        print(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip())
        if number == 0:
            rule = ["-" * width for width in widths]
            print(f"| {' | '.join(rule)} |" if markdown else "  ".join(rule))


def print_case(case: Case, results: Results, markdown: bool) -> None:
    for loop in BOTH:
        lines = table(case, loop, results)
        if lines:
            name = f"{case.number}. {case.title}" + (f" ({loop})" if case.loops == BOTH else "")
            print(f"\n### {name}\n" if markdown else f"\n{name}")
            print_table(lines, markdown)
            if starved(results):
                print("! servers were idle for part of the time: others used this machine")
    if case.note:
        print(f"\n{case.note}" if markdown else case.note)
    sys.stdout.flush()


def starved(results: Results) -> bool:
    """Whether the load could not keep our server busy, so that the figures do not compare."""
    busy = [
        sample["busy %"]
        for (key, _), samples in results.items()
        for sample in samples
        if key.startswith("ours") and sample and "busy %" in sample
    ]
    return bool(busy) and statistics.median(busy) < STARVED


def print_head(options: argparse.Namespace) -> None:
    print(
        f"Python {platform.python_version()}, {platform.system()} {platform.release()}, "
        f"{processor()}, server on core {SERVER_CORE}, load on core {LOAD_CORE}; "
        f"{options.rounds} rounds of {options.seconds:g} s, medians. "
        f"Command: `python {' '.join(['.ci/bench.py', *sys.argv[1:]])}`"
    )
    if SERVER_CORE == LOAD_CORE:
        print("! One core only: server and load share it, so the figures are of little worth.")
    for peer, reason in options.missing.items():
        print(f"! left out: {peer}: {reason}")
    sys.stdout.flush()


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def make_files(folder: Path) -> None:
    """The two files of workload 11: text that looks like CSS, and bytes that do not compress."""
    rule = ".tile-{} {{ color: #123456; margin: {}px; }}\n"
    text = "".join(rule.format(number, number % 40) for number in range(2_000))
    (folder / "style.css").write_text(text[:SMALL_FILE])
    (folder / "film.bin").write_bytes(os.urandom(LARGE_FILE))
    folder.chmod(0o755)


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measures stario.py beside its peers. Without options: everything."
    )
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each workload (5)")
    parser.add_argument("--seconds", type=float, default=2, help="of one measurement (2)")
    parser.add_argument("--only", type=names, default=[], help="workloads, as in 1,3,6")
    parser.add_argument("--peers", type=names, default=[], help=", ".join(PEERS))
    parser.add_argument("--loops", type=names, default=list(BOTH), help="asyncio,uvloop")
    parser.add_argument("--scale", type=float, default=1.0, help="share of streams, idle, routes")
    parser.add_argument("--markdown", action="store_true", help="tables for the README")
    parser.add_argument("--venv", type=Path, default=CACHE / version, help="where the peers are")
    parser.add_argument("--upgrade", action="store_true", help="install the newest peers again")
    options = parser.parse_args()
    unknown = {*options.peers} - {*PEERS} | {*options.loops} - {*BOTH}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    return options


def main() -> None:
    options = parse_options()
    if not shutil.which("wrk"):
        sys.exit("wrk, the load generator, is missing: apt-get install wrk")
    inside_environment(options.venv, options.upgrade)
    options.missing = missing_peers(options.venv)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # a module is compiled once, as in real life
    os.sched_setaffinity(0, {LOAD_CORE})
    raise_file_limit()
    print_head(options)
    with tempfile.TemporaryDirectory(prefix="stario-bench-") as folder:
        make_files(Path(folder))
        for case in CASES:
            if not options.only or str(case.number) in options.only:
                print_case(case, run_case(case, options, Path(folder)), options.markdown)


if __name__ == "__main__":
    main()
