"""Grow signals, forms and header fields, and see that what they cost grows no faster than they do.

    python .ci/fuzz_growth.py                one minute
    python .ci/fuzz_growth.py --seconds 600
    python .ci/fuzz_growth.py --seed 7 --only 1234

Each input is made of a few random pieces, once with so many repetitions and once with eight times
as many, or as deep. It is a finding if the long one takes more than three times as long for each
byte (the minimum of several runs, and only where that is more than 20 ms), if it needs more than 60
times its size in memory, or if the answer to it is longer than 10 kB. Exit status 1 where there are
findings.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import json
import random
import sys
import time
import tracemalloc
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, TypedDict

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import stario
from stario import HttpException, read_signals


class Color(enum.Enum):
    RED = "red"
    TWO = 2


@dataclass
class One:
    n: int = 0
    next: One | Two | None = None
    many: list[One | Two] = field(default_factory=list)
    table: dict[str, One] = field(default_factory=dict)


@dataclass
class Two:
    n: str = ""
    next: Two | One | None = None
    many: list[Two] | list[One] = field(default_factory=list)


@dataclass
class Three:
    n: Literal["1", 0, "x"]
    next: Three | Four | None = None
    many: list[Three] | list[Four] | list[One] = field(default_factory=list)


@dataclass
class Four:
    n: Literal[1, "nan", True]
    next: Four | Three | None = None
    many: set[int] | list[Three | Four] | dict[str, Four] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.many:
            raise ValueError("too many")


class Loose(TypedDict, total=False):
    n: int | float | str
    next: Loose | list[Loose]
    many: list[Decimal | date | None]


SCHEMAS: list[Any] = [
    One, Two, Loose, list[One], dict[str, Two], list[int], list[float | None], list[Decimal],
    set[int], set[float], set[Any], frozenset[uuid.UUID], dict[int, int], dict[float, str],
    set[tuple[int, ...]], list[Literal["a", 1]], list[Color], list[datetime], list[bool],
    list[int] | list[str], dict[str, list[int]] | dict[str, list[str]], Any,
    list[int | float | Decimal | date], list[One | dict[str, int] | list[int]],
    dict[str, tuple[int, One | None] | Literal["a"]], list[Three | Four], Four,
    list[One] | list[Two] | list[Three], list[int] | list[float] | set[Decimal] | list[Four],
    dict[str, One] | dict[str, Two] | dict[str, Loose], list[Three | One | Loose],
]  # fmt: skip
SCALARS: list[Any] = [
    0, 1, -1, 1.5, True, None, "", "x", "1", "1_0", "nan", "1e5", ".5", "red", "2024-01-31",
    2**61 - 1, 10**300, "9" * 50, " " * 50, str(uuid.UUID(int=3)), "\ud800",
]  # fmt: skip


def make_value(r: random.Random, times: int, depth: int = 3) -> Any:
    """A value that is `times` as long, or as deep, somewhere."""
    kind = r.randrange(9 if depth else 3)
    if kind == 0:
        return r.choice(SCALARS)
    if kind == 1:
        return r.choice(["1", "x", " ", "-", "9.", "e1", "k\n"]) * times
    if kind == 2:
        return [n * (2**61 - 1) for n in range(times)]
    inner = make_value(r, times if kind < 5 else 1, depth - 1)
    if kind in (3, 5):
        return [inner] * (times if kind == 5 else 2)
    if kind in (4, 6):
        return {str(n) + r.choice(["", "k" * 20]): inner for n in range(times if kind == 6 else 2)}
    for _ in range(min(times // 8, 150)):
        inner = {"n": 1, "next": inner, "many": [inner]} if kind == 7 else {"next": [inner]}
        if len(json.dumps(inner)) > 200_000:
            break
    return inner


def make_form(r: random.Random, times: int) -> bytes:
    pieces = [
        b"--b\r\n", b"--b", b"\r\n", b'Content-Disposition: form-data; name="a"\r\n\r\n', b";x=1",
        b'"', b"\\", b"a=b&", b"%41", b"&", b"=", b"x" * 40,
    ]  # fmt: skip
    chosen = [r.choice(pieces) for _ in range(r.randrange(1, 5))]
    return (
        b"--b\r\n"
        + r.choice(pieces)
        + b"".join(chosen) * times
        + r.choice(pieces)
        + b"\r\n--b--\r\n"
    )


def read_form(body: bytes) -> None:
    reader = stario._MultipartReader("multipart/form-data; boundary=b")
    for start in range(0, len(body), 1000):
        reader.feed(body[start : start + 1000])
    reader.form()
    stario._parse_pairs(body.decode("latin-1"))


def make_field(r: random.Random, times: int) -> str:
    pieces = [
        ";", ",", "=", '"', "\\", " ", "a=b; ", "gzip;q=0.1, ", "for=10.0.0.1, ", '="', "%41", "[",
        "::1", "q=", ".", "10.0.0.1,", "x" * 40, "/", "é", "%",
    ]  # fmt: skip
    chosen = [r.choice(pieces) for _ in range(r.randrange(1, 5))]
    return r.choice(pieces) + "".join(chosen) * times + r.choice(pieces)


FIELDS = ["cookie", "accept-encoding", "forwarded", "x-forwarded-for", "x-forwarded-host", "host"]


def read_field(text: str) -> None:
    """All that is ever made of a header field's value, as each of those that are taken apart."""
    headers = stario.Headers({name: [text] for name in FIELDS})
    carrier: Any = Proxied()
    _ = stario.Request(stario.RequestLine("GET", "/"), headers, b"", carrier).cookies
    stario._choose_coding.__wrapped__(text, stario.CompressionConfig())
    stario._parameters(text)
    for read in (lambda: stario._decode_path(text), lambda: proxied(headers, carrier)):
        with contextlib.suppress(HttpException):
            read()


class Proxied:
    """As much of one as those who read header fields look at."""

    client, scheme = "10.0.0.1", "http"
    proxies = stario.TrustedProxies(["10.0.0.0/8"])


def proxied(headers: stario.Headers, carrier: Any) -> str:
    return stario.Request(stario.RequestLine("GET", "/"), headers, b"", carrier).url


def make_job(seed: int, index: int, times: int) -> tuple[int, str, Callable[[], object]]:
    """The length of an input, what it is, and what reads it."""
    r = random.Random(f"{seed}/{index}")
    if r.randrange(4) == 0:
        text = make_field(r, times)
        return len(text), f"field {text[:60]!r}", lambda: read_field(text)
    if r.randrange(3) == 0:
        form = make_form(r, times)
        return len(form), f"form {form[:60]!r}", lambda: read_form(form)
    schema, value = r.choice(SCHEMAS), make_value(r, times)
    text = json.dumps(value)
    parsed = json.loads(text)  # (so that no two places hold one list)
    return len(text), f"{schema} {text[:60]}", lambda: read_signals(schema, parsed)


def run(job: Callable[[], object]) -> tuple[float, int]:
    """Seconds of CPU, and the length of the answer."""
    begun, said = time.process_time(), 0
    try:
        job()
    except HttpException as exc:
        said = len(exc.detail)
    return time.process_time() - begun, said


def try_input(seed: int, index: int) -> str | None:
    short, _, job = make_job(seed, index, 200)
    before = min(run(job)[0] for _ in range(3))
    length, what, job = make_job(seed, index, 1600)
    if length > 3_000_000:
        return None
    after, said = min(run(job) for _ in range(3))
    tracemalloc.start()
    run(job)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    wrong = []
    if after > 0.02 and after / length > 3 * before / short:
        wrong.append(f"{before * 1e3:.1f} ms for {short}, {after * 1e3:.1f} ms for {length} bytes")
    if peak > 60 * length + 1_000_000:  # (a deep stack is a megabyte)
        wrong.append(f"{peak / 1e6:.1f} MB for {length} bytes")
    if said > 10_000:
        wrong.append(f"an answer of {said} bytes")
    return f"{index}: {'; '.join(wrong)}: {what}" if wrong else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int)
    options = parser.parse_args()
    if options.only is not None:
        print(try_input(options.seed, options.only) or "nothing found")
        return 0
    end, index, found = time.monotonic() + options.seconds, 0, 0
    while time.monotonic() < end:
        # Twice: a machine with other work finds what is not there.
        if try_input(options.seed, index) and (finding := try_input(options.seed, index)):
            found += 1
            print(finding, flush=True)
        index += 1
    print(f"{index} inputs, {found} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
