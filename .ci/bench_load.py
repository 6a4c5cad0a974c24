"""Starting a server, loading it, and reading what that cost: the tools of `bench.py`.

Three rules hold here. A server is pinned to one core and everything that loads it to another. What
decides is the server's own CPU time, threads and child processes included, since it is steadier
than requests a second on a machine that others use. And only processes that were started here are
ended, each by its id.
"""

import contextlib
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urljoin

HERE = Path(__file__).parent
CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, LOAD_CORE = CORES[0], CORES[-1]
START_TIMEOUT = 20.0
EVENT_TIMEOUT = 60.0
BATCH = 100

# What a browser sends, with a session cookie of 32 characters where `{session}` stands.
BROWSER = (
    "{method} {path} HTTP/1.1\r\n"
    "Host: 127.0.0.1:{port}\r\n"
    "Connection: keep-alive\r\n"
    'sec-ch-ua: "Chromium";v="142", "Not_A Brand";v="99"\r\n'
    "sec-ch-ua-mobile: ?0\r\n"
    'sec-ch-ua-platform: "Linux"\r\n'
    "Upgrade-Insecure-Requests: 1\r\n"
    "User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) "
    "Chrome/142.0.0.0 Safari/537.36\r\n"
    "Accept: text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8\r\n"
    "Sec-Fetch-Site: same-origin\r\n"
    "Sec-Fetch-Mode: navigate\r\n"
    "Sec-Fetch-User: ?1\r\n"
    "Sec-Fetch-Dest: document\r\n"
    "Referer: http://127.0.0.1:{port}/\r\n"
    "Accept-Encoding: {encoding}\r\n"
    "Accept-Language: en-GB,en;q=0.9\r\n"
    "Cookie: theme=dark; consent=all; seen=1763812800; session={session}\r\n"
    "\r\n"
)


class BenchError(Exception):
    """A measurement that cannot be trusted, and why."""


def raise_file_limit() -> None:
    """Thousands of connections need as many files; the servers inherit the limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pinned(core: int) -> Callable[[], None]:
    return lambda: os.sched_setaffinity(0, {core})


# --- Servers ------------------------------------------------------------------------------------

NGINX = """\
daemon off; worker_processes 1; pid {directory}/nginx.pid; error_log stderr crit; {user}
events {{ worker_connections 4096; }}
http {{
    access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000000;
    types {{ text/css css; }}
    server {{
        listen 127.0.0.1:{port};
        location = / {{ return 200 "Hello, World!"; }}
        location /static/ {{ alias {files}/; }}
    }}
}}
"""


class Server:
    """One server process, from its start to its end.

    What it prints goes to a file: the structured logs of workload 4 are written there, and the
    last lines of it say what went wrong where a server does not come up.
    """

    def __init__(self, app: str, role: str, loop: str, settings: Mapping[str, str]) -> None:
        self.port = free_port()
        self._folder = tempfile.TemporaryDirectory(prefix="stario-bench-")
        self._log = Path(self._folder.name, "log")
        if app == "nginx":
            command = self._nginx(settings)
        else:
            pairs = [f"{name}={value}" for name, value in settings.items()]
            command = [sys.executable, "-m", "bench_apps"]  # as a module it is compiled once
            command += [app, role, loop, str(self.port), *pairs]
        self._command = command
        self.start_seconds = 0.0

    def _nginx(self, settings: Mapping[str, str]) -> list[str]:
        folder = self._folder.name
        text = NGINX.format(
            directory=folder,
            port=self.port,
            files=settings["directory"],
            user="user root;" if os.geteuid() == 0 else "",
        )
        Path(folder, "nginx.conf").write_text(text)
        return ["nginx", "-p", folder, "-c", f"{folder}/nginx.conf", "-e", "stderr"]

    def __enter__(self) -> Self:
        started = time.perf_counter()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=HERE,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=pinned(SERVER_CORE),
            )
        try:
            self._wait_until_up(started + START_TIMEOUT)
        except BaseException:
            self._stop()
            raise
        self.start_seconds = time.perf_counter() - started
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def _wait_until_up(self, deadline: float) -> None:
        while time.perf_counter() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError):
                if b" 200 " in ask(self.port, "/").split(b"\r\n", 1)[0]:
                    return
            time.sleep(0.0005)
        last_lines = self._log.read_text(errors="replace").strip().splitlines()[-3:]
        raise BenchError("the server did not come up: " + " / ".join(last_lines))

    def _stop(self) -> None:
        """SIGTERM to the session that this server leads, and SIGKILL where that is not heard."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=3)
                break
        self._folder.cleanup()

    def pids(self) -> list[int]:
        """The server's process and those that it started: all of its session."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                session = path.read_text().rpartition(")")[2].split()[3]
                if int(session) == self._process.pid:
                    found.append(int(path.parent.name))
        return found

    def cpu(self) -> float:
        """CPU seconds, user and system, of all threads, those that have ended included.

        This is the clock behind the utime and stime of `/proc/PID/stat`, read in nanoseconds
        instead of ticks of ten milliseconds (`clock_getcpuclockid(3)` makes its number so).
        """
        return sum(time.clock_gettime_ns(~pid << 3 | 2) for pid in self.pids()) / 1e9

    def rss(self) -> int:
        """Resident bytes."""
        pages = [Path(f"/proc/{pid}/statm").read_text().split()[1] for pid in self.pids()]
        return sum(map(int, pages)) * resource.getpagesize()


def ask(port: int, path: str, method: str = "GET") -> bytes:
    """One plain request, the whole answer as bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n"
        sock.sendall(head.encode())
        sock.settimeout(0.5)
        answer = b""
        with contextlib.suppress(TimeoutError):  # the bare protocol does not close
            while packet := sock.recv(65536):
                answer += packet
                if answer.endswith(b"Hello, World!"):
                    break
    return answer


def final_path(port: int, path: str) -> str:
    """Where a file is in the end: fingerprinted names are a redirect away."""
    head = ask(port, path, "HEAD").split(b"\r\n\r\n")[0].decode("latin-1")
    for line in head.split("\r\n")[1:]:
        name, _, value = line.partition(":")
        if name.lower() == "location":
            return urljoin(path, value.strip())
    return path


# --- wrk: requests in a closed loop ---------------------------------------------------------------

REPORT = """
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format("REPORT %d %d %d %d\\n", summary.requests, summary.bytes,
    summary.duration, e.connect + e.read + e.write + e.status + e.timeout))
end
"""

# Each of wrk's threads runs its own copy of the script. With as many threads as connections, a
# block per thread is a block per connection.
NUMBERED = """
local threads = 0
function setup(thread)
  threads = threads + 1
  thread:set("id", threads)
end
"""
PER_CONNECTION = """
local text
function init(args) text = BEFORE .. string.format("%032d", id) .. AFTER end
function request() return text end
"""
PER_REQUEST = """
local count = 0
function request()
  count = count + 1
  return BEFORE .. string.format("%032d", id * 10000000 + count) .. AFTER
end
"""


def lua(text: str) -> str:
    """A Lua string literal."""
    return '"' + text.replace('"', '\\"').replace("\r", "\\r").replace("\n", "\\n") + '"'


def browser_script(port: int, path: str, varying: str) -> str:
    """A wrk script that sends a browser's header block, another for each connection or request."""
    block = BROWSER.format(
        method="GET", path=path, port=port, encoding="gzip, deflate, br, zstd", session="\0"
    )
    before, after = (lua(part) for part in block.split("\0"))
    body = PER_CONNECTION if varying == "connection" else PER_REQUEST
    return f"{NUMBERED}local BEFORE = {before}\nlocal AFTER = {after}\n{body}"


@dataclass(frozen=True)
class Load:
    """What `wrk` did."""

    requests: int
    bytes: int
    seconds: float


def wrk(
    url: str,
    seconds: float,
    *,
    connections: int = 64,
    threads: int = 1,
    script: str = "",
    headers: Iterable[str] = (),
) -> Load:
    """Runs `wrk` on the load core; more than one answer in a thousand gone wrong is an error."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(script + REPORT)
        file.flush()
        command = ["wrk", f"-t{threads}", f"-c{connections}", f"-d{max(1, round(seconds))}s"]
        command += ["-s", file.name, *(part for text in headers for part in ("-H", text)), url]
        limit = seconds + 30
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
            preexec_fn=pinned(LOAD_CORE),
        )
    for line in done.stdout.splitlines():
        if line.startswith("REPORT "):
            requests, received, micros, errors = map(int, line.split()[1:])
            if not requests or errors * 1000 > requests:
                raise BenchError(f"{errors} of {requests} requests failed")
            return Load(requests, received, micros / 1e6)
    raise BenchError(f"wrk failed: {done.stderr.strip() or done.stdout.strip()}")


# --- Idle connections and event streams -----------------------------------------------------------


class IdleConnections:
    """Keep-alive connections that have had one answer and then say nothing."""

    def __init__(self, port: int, count: int) -> None:
        self._sockets = [self._open(port) for _ in range(count)]

    @staticmethod
    def _open(port: int) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", port), timeout=10)
        block = BROWSER.format(
            method="GET", path="/", port=port, encoding="gzip", session=f"{sock.fileno():032d}"
        )
        sock.sendall(block.encode())
        if not sock.recv(4096):
            raise BenchError("the server closed an idle connection")
        return sock

    def check(self) -> None:
        """All of them are still there: the last measurement was of what it says."""
        closed = 0
        for sock in self._sockets:
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                closed += not sock.recv(4096)
        if closed:
            raise BenchError(f"the server closed {closed} of {len(self._sockets)} connections")

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()


def decoder(encoding: str) -> Callable[[bytes], bytes]:
    """An incremental decompressor for one stream."""
    match encoding:
        case "zstd":
            import zstandard

            expand: Callable[[bytes], bytes] = (
                zstandard.ZstdDecompressor().decompressobj().decompress
            )
            return expand
        case "br":
            import brotli

            process: Callable[[bytes], bytes] = brotli.Decompressor().process
            return process
        case "gzip":
            return zlib.decompressobj(31).decompress
        case _:
            return lambda data: data


class Stream:
    """One event stream, read as a client reads it: head, chunks, content coding, text."""

    def __init__(self, port: int, number: int, encoding: str, decode: bool) -> None:
        path = f"/subscribe?datastar=%7B%22user_id%22%3A%22user_{number}%22%7D"
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=10)
        block = BROWSER.format(
            method="GET", path=path, port=port, encoding=encoding, session=f"{number:032d}"
        )
        datastar = "Datastar-Request: true\r\n\r\n"
        self.sock.sendall(block.removesuffix("\r\n").encode() + datastar.encode())
        self.sock.setblocking(False)
        self._encoding = encoding
        self._decode = decoder(encoding if decode else "identity")
        self._raw = b""
        self._tail = b""
        self._in_body = False

    def shows(self, token: bytes, packet: bytes) -> bool:
        """Whether the token is in the text that the stream has come to with this packet."""
        self._raw += packet
        if not self._in_body and not self._skip_head():
            return False
        text = self._tail + self._decode(self._chunks())
        self._tail = text[-len(token) :]
        return token in text

    def _skip_head(self) -> bool:
        head, end, rest = self._raw.partition(b"\r\n\r\n")
        if not end:
            return False
        fields = head.lower()
        if not fields.startswith(b"http/1.1 200") or b"transfer-encoding: chunked" not in fields:
            raise BenchError(f"not a stream: {head[:200]!r}")
        coded = f"content-encoding: {self._encoding}".encode() in fields
        if not coded and self._encoding != "identity":
            raise BenchError(f"the server does not compress streams with {self._encoding}")
        self._raw = rest
        self._in_body = True
        return True

    def _chunks(self) -> bytes:
        """The data of all chunks that have arrived whole (RFC 9112, section 7.1)."""
        data = b""
        while (end := self._raw.find(b"\r\n")) >= 0:
            size = int(self._raw[:end], 16)
            if len(self._raw) < end + size + 4:
                break
            data += self._raw[end + 2 : end + 2 + size]
            self._raw = self._raw[end + size + 4 :]
        return data


class Streams:
    """Many event streams at once, and one connection that publishes to them.

    Publishing is a closed loop: the next event is sent when all streams have the last. The token
    of an event is the time of its publishing, so what a stream shows is the event that was meant.
    Where nothing will be published (`decode=False`), any first bytes will do for a greeting.
    """

    def __init__(
        self, port: int, count: int, encoding: str = "identity", *, decode: bool = True
    ) -> None:
        self._port = port
        self._poll = select.epoll()
        self._streams: dict[int, Stream] = {}
        self._publisher = socket.create_connection(("127.0.0.1", port), timeout=10)
        self._greeting = b'data-stamp="hello"' if decode else b""
        self.received = 0
        for first in range(0, count, BATCH):
            self._open(range(first, min(first + BATCH, count)), encoding, decode)

    def _open(self, numbers: Iterable[int], encoding: str, decode: bool) -> None:
        batch = []
        for number in numbers:
            stream = Stream(self._port, number, encoding, decode)
            self._streams[stream.sock.fileno()] = stream
            self._poll.register(stream.sock, select.EPOLLIN)
            batch.append(stream.sock.fileno())
        self._wait(self._greeting, set(batch))

    def _wait(self, token: bytes, waiting: set[int]) -> None:
        """Reads until each of the streams that are waited for has shown the token."""
        deadline = time.monotonic() + EVENT_TIMEOUT
        while waiting:
            if time.monotonic() > deadline:
                raise BenchError(f"{len(waiting)} streams did not get an event")
            for descriptor, _ in self._poll.poll(1.0):
                stream = self._streams[descriptor]
                packet = stream.sock.recv(65536)
                if not packet:
                    raise BenchError("the server ended a stream")
                self.received += len(packet)
                if stream.shows(token, packet):
                    waiting.discard(descriptor)

    def publish(self) -> float:
        """Publishes one event; the seconds until the last stream has it."""
        started = time.monotonic_ns()
        head = f"POST /publish?stamp={started} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\n"
        self._publisher.sendall(head.encode() + b"Content-Length: 0\r\n\r\n")
        self._wait(f'data-stamp="{started}"'.encode(), set(self._streams))
        seconds = (time.monotonic_ns() - started) / 1e9
        answer = self._publisher.recv(4096)
        if not answer.startswith(b"HTTP/1.1 204"):
            raise BenchError(f"publishing failed: {answer[:200]!r}")
        return seconds

    def close(self) -> None:
        self._poll.close()
        self._publisher.close()
        for stream in self._streams.values():
            stream.sock.close()
