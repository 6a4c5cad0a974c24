"""How far it goes: four processes, one Redis, as many streams as this machine holds.

    python .ci/scale.py                    about a minute; needs the package redis and redis-server
    python .ci/scale.py --streams 2000     fewer streams

All of it runs on 127.0.0.1 and shares the machine's cores, so nothing is read off a clock: what a
server's core could do is its streams, or deliveries, by the CPU time that its process has spent.
Prints what was measured, and then what follows from it for more viewers by arithmetic.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from stario import Context, RedisRelay, SafeString, Stario, Writer, h

PROCESSES = 4
MESSAGES = 40
HERE = "127.0.0.1"
# A view of about a kilobyte: a list of twenty lines, as a chat or a scoreboard has it.
VIEW = h.Ul({"id": "view"}, [h.Li(f"Line {number} says something new") for number in range(20)])


async def serve(redis: str, port: int) -> None:
    """One of the processes: each stream hears all that is published, and sends the view."""
    relay = RedisRelay[int](redis)
    app = Stario()

    async def stream(c: Context, w: Writer) -> None:
        w.patch(SafeString(VIEW))
        async for _ in w.alive(relay.subscribe("all")):
            w.patch(SafeString(VIEW))

    app.get("/", stream)
    await app.serve(host=HERE, port=port, backlog=4096)


class Viewer(asyncio.Protocol):
    """A browser's side of a stream: it counts events and bytes."""

    events = bytes = open = 0  # of all viewers

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(b"GET / HTTP/1.1\r\nHost: scale\r\n\r\n")
        Viewer.open += 1

    def data_received(self, data: bytes) -> None:
        Viewer.bytes += len(data)
        Viewer.events += data.count(b"event: ")

    def connection_lost(self, exc: Exception | None) -> None:
        Viewer.open -= 1


def free_port() -> int:
    with socket.create_server((HERE, 0)) as taken:
        return int(taken.getsockname()[1])


def cpu(process: subprocess.Popen[bytes]) -> float:
    """Seconds of CPU that a process has spent."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(process: subprocess.Popen[bytes]) -> int:
    """Bytes of memory that a process holds."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def until_listening(ports: list[int]) -> None:
    for port in ports:
        while True:
            with suppress(OSError):
                _, writer = await asyncio.open_connection(HERE, port)
                writer.close()
                break
            await asyncio.sleep(0.05)


async def wait_for_events(wanted: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while Viewer.events < wanted and time.monotonic() < end:
        await asyncio.sleep(0.01)
    return Viewer.events >= wanted


async def redis_fan_out(redis: subprocess.Popen[bytes], port: int) -> float:
    """Messages that Redis hands to its subscribers for each second of its CPU."""
    subscribers = []
    for _ in range(200):
        reader, writer = await asyncio.open_connection(HERE, port, limit=1 << 24)
        writer.write(b"SUBSCRIBE fan\r\n")
        await reader.readuntil(b":1\r\n")
        subscribers.append((reader, writer))
    _, publisher = await asyncio.open_connection(HERE, port)
    before, times, body = cpu(redis), 10_000, b"x" * 100
    command = b"*3\r\n$7\r\nPUBLISH\r\n$3\r\nfan\r\n$100\r\n%s\r\n" % body
    size = len(b"*3\r\n$7\r\nmessage\r\n$3\r\nfan\r\n$100\r\n%s\r\n" % body)
    publisher.write(command * times)
    await asyncio.gather(*(reader.readexactly(size * times) for reader, _ in subscribers))
    spent = cpu(redis) - before
    for writer in (publisher, *(writer for _, writer in subscribers)):
        writer.close()
    return len(subscribers) * times / spent


async def measure(streams: int, redis: subprocess.Popen[bytes], redis_port: int) -> None:
    fan_out = await redis_fan_out(redis, redis_port)
    url, ports = f"redis://{HERE}:{redis_port}", [free_port() for _ in range(PROCESSES)]
    servers = [
        subprocess.Popen([sys.executable, __file__, "--serve", url, str(port)]) for port in ports
    ]
    try:
        await until_listening(ports)
        spent, held = sum(map(cpu, servers)), sum(map(memory, servers))
        loop = asyncio.get_running_loop()
        transports = []
        for start in range(0, streams, 200):
            opened = (
                loop.create_connection(Viewer, HERE, ports[number % PROCESSES])
                for number in range(start, min(start + 200, streams))
            )
            transports += [transport for transport, _ in await asyncio.gather(*opened)]
        assert await wait_for_events(streams, 30), f"{Viewer.events} of {streams} streams began"
        connections = streams / (sum(map(cpu, servers)) - spent)
        per_stream = (sum(map(memory, servers)) - held) / streams

        spent, events, received = sum(map(cpu, servers)), Viewer.events, Viewer.bytes
        relay, redis_before = RedisRelay[int](url), cpu(redis)
        for number in range(MESSAGES):
            relay.publish("all", number)
            wanted = events + (number + 1) * streams
            assert await wait_for_events(wanted, 20), f"{Viewer.events} of {wanted} events came"
        relay.close()
        deliveries = MESSAGES * streams / (sum(map(cpu, servers)) - spent)
        size = (Viewer.bytes - received) / (MESSAGES * streams)
        print(f"streams open at once: {Viewer.open} of {streams}, in {PROCESSES} processes")
        print(f"connections for a core and second: {connections:,.0f}")
        print(f"deliveries for a core and second: {deliveries:,.0f}")
        print(f"bytes for a delivery: {size:,.0f}")
        print(f"memory for a stream: {per_stream / 1024:,.1f} kB")
        print(f"messages that Redis hands out for a core and second: {fan_out:,.0f}")
        print(f"CPU of Redis during the deliveries: {cpu(redis) - redis_before:.2f} s\n")
        table(connections, deliveries, size, per_stream, fan_out)
        for transport in transports:
            transport.abort()
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait(10)


def table(
    connections: float, deliveries: float, size: float, per_stream: float, fan_out: float
) -> None:
    """One event for each viewer and second, cores half busy: the rest is arithmetic."""
    print("viewers | cores | memory | bandwidth | all come back at once | Redis")
    for viewers in (1_000, 100_000, 10_000_000):
        cores = max(1, round(viewers / (deliveries / 2) + 0.5))
        print(
            f"{viewers:>10,} | {cores:,} | {viewers * per_stream / 1e9:,.2f} GB"
            f" | {viewers * size * 8 / 1e9:,.3f} Gbit/s | {viewers / connections / cores:.1f} s"
            f" | {100 * cores / fan_out:.2f}% of a core"
        )


def main() -> None:
    options = argparse.ArgumentParser(description="How many viewers a machine holds.")
    options.add_argument("--streams", type=int, default=16_000)
    options.add_argument("--serve", nargs=2, metavar=("REDIS", "PORT"), help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.serve:
        asyncio.run(serve(chosen.serve[0], int(chosen.serve[1])))
        return
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    streams, port = min(chosen.streams, most - 1000), free_port()
    with tempfile.TemporaryDirectory() as folder:
        extra = ["--bind", HERE, "--save", "", "--dir", folder, "--logfile", os.devnull]
        redis = subprocess.Popen(["redis-server", "--port", str(port), *extra])
        try:
            asyncio.run(asyncio.wait_for(start(streams, redis, port), 90))
        finally:
            redis.terminate()
            redis.wait(10)


async def start(streams: int, redis: subprocess.Popen[bytes], port: int) -> None:
    await until_listening([port])
    await measure(streams, redis, port)


if __name__ == "__main__":
    main()
