#!/usr/bin/env python3
"""What the pocket client costs beside the official one, in one Chromium.

    STARIO_OFFICIAL_CLIENT=/path/to/datastar.js python .ci/bench_client.py [--rounds 5]

Each row is one piece of work: the arrival of an answer, until the page has leisure again (without
layout and paint). The clients take turns, in pages of their own; the fewest milliseconds of all
rounds count. It needs playwright and a Chromium.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from playwright.sync_api import sync_playwright

from stario import POCKET_CLIENT

HOST = "http://bench.test"
CLOCK = """<script>
document.addEventListener('datastar-fetch', ({ detail }) => {
  if (!detail.type.startsWith('datastar-')) return;
  const start = performance.now();
  setTimeout(() => { window.took = performance.now() - start });
}, { capture: true });
document.addEventListener('datastar-ready', () => { window.isReady = true });
</script>"""


def table(numbers: Iterable[int], word: str = "row") -> str:
    """Rows without ids, and fields with ids in them."""
    rows = (
        f'<tr><td class="name">{word} {n}</td><td><input id="f{n}" value="{n}"></td></tr>'
        for n in numbers
    )
    return f'<table id="it"><tbody>{"".join(rows)}</tbody></table>'


def keyed(numbers: Iterable[int]) -> str:
    """Rows with ids of their own."""
    rows = (f'<tr id="r{n}"><td>{n}</td><td><b>{n * 7}</b></td></tr>' for n in numbers)
    return f'<table id="it"><tbody>{"".join(rows)}</tbody></table>'


def dashboard(turn: int) -> str:
    """A hundred rows in which everything that can change does."""
    rows = (
        f'<tr id="d{n}" class="{"up" if (n + turn) % 2 else "down"}"><td>{n}</td>'
        f'<td>{n * turn % 97}</td><td style="width: {n * turn % 100}px"></td></tr>'
        for n in range(100)
    )
    return f'<table id="it"><tbody>{"".join(rows)}</tbody></table>'


def shown(count: int) -> str:
    """Elements that show a signal each."""
    return "".join(f'<i data-text="$s{n}"></i>' for n in range(count))


def elements(markup: str) -> str:
    return f"event: datastar-patch-elements\ndata: elements {markup}\n\n"


def signals(value: object) -> str:
    return f"event: datastar-patch-signals\ndata: signals {json.dumps(value)}\n\n"


ROWS = range(2000)
MANY = {f"s{n}": n for n in range(8000)}
SHOWN = shown(8000)
HELD = f"<div data-signals='{json.dumps(MANY)}'></div>"

# name -> what the page holds at first, and the answers that are applied to it one after the other
WORK: dict[str, tuple[str, list[str]]] = {
    "2,000 rows reordered": (table(ROWS), [elements(table(reversed(ROWS)))]),
    "2,000 rows shuffled": (
        table(ROWS),
        [elements(table(sorted(ROWS, key=lambda n: n * 7919 % 2003)))],
    ),
    "2,000 rows changed in place": (table(ROWS), [elements(table(ROWS, "new"))]),
    "2,000 rows, one changed": (table(ROWS), [elements(table(ROWS).replace("row 1999", "x"))]),
    "1,000 rows in front of 2,000": (table(ROWS), [elements(table([*range(5000, 6000), *ROWS]))]),
    "2,000 rows with ids reordered": (keyed(ROWS), [elements(keyed(reversed(ROWS)))]),
    "1,000 rows with ids in front": (keyed(ROWS), [elements(keyed([*range(5000, 6000), *ROWS]))]),
    "a dashboard of 100 rows, 20 times": (
        dashboard(0),
        [elements(dashboard(n)) for n in range(1, 21)],
    ),
    "8,000 signals come": ('<p id="it"></p>', [signals(MANY)]),
    "8,000 signals change": (HELD, [signals({name: n + 1 for name, n in MANY.items()})]),
    # Of 8,000 at once the official client shows about 2,900: then its stack is full.
    "2,000 signals change in 2,000 elements": (
        HELD + shown(2000),
        [signals({f"s{n}": n + 1 for n in range(2000)})],
    ),
    "one of 8,000 signals changes, 20 times": (
        HELD + SHOWN,
        [signals({"s4000": -n}) for n in range(1, 21)],
    ),
    "8,000 elements with signals come": (
        HELD + '<p id="it"></p>',
        [elements(f'<p id="it">{SHOWN}</p>')],
    ),
}


def measure(browser: Any, client: str, body: str, answers: list[str]) -> float:
    """Milliseconds for all answers, in a new page."""
    page = browser.new_page()
    script = "<script type='module' src='/client.js'></script>"
    button = "<button id='go' data-on:click=\"@get('/answer')\"></button>"
    document = f"<!doctype html><head>{CLOCK}{script}</head><body>{body}{button}</body>"
    left = iter(answers)
    answer: dict[str, Callable[[], tuple[str, str]]] = {
        "/": lambda: (document, "text/html"),
        "/client.js": lambda: (client, "text/javascript"),
        "/answer": lambda: (next(left), "text/event-stream"),
    }

    def fulfill(route: Any) -> None:
        path = route.request.url.removeprefix(HOST).partition("?")[0]
        text, kind = answer[path]() if path in answer else ("", "text/plain")
        route.fulfill(body=text, content_type=kind)

    page.route("**/*", fulfill)
    page.goto(f"{HOST}/")
    page.wait_for_function("window.isReady")
    total = 0.0
    for _ in answers:
        page.evaluate("window.took = null, document.getElementById('go').click()")
        page.wait_for_function("window.took")
        total += page.evaluate("window.took")
    page.close()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="only rows that hold one of these words")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    own = os.environ.get("STARIO_POCKET_CLIENT")
    clients = {
        "official": Path(os.environ["STARIO_OFFICIAL_CLIENT"]).read_text(),
        "pocket": Path(own).read_text() if own else POCKET_CLIENT,
    }
    chromium = shutil.which("chromium") or "/usr/bin/chromium"
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        print("| work | official | pocket | ratio |\n| --- | --- | --- | --- |")
        for name, (body, answers) in WORK.items():
            if options.names and not any(word in name for word in options.names):
                continue
            best = dict.fromkeys(clients, float("inf"))
            for _ in range(options.rounds):
                for client, source in clients.items():
                    best[client] = min(best[client], measure(browser, source, body, answers))
            official, pocket = best.values()
            ratio = pocket / official
            print(f"| {name} | {official:.1f} ms | {pocket:.1f} ms | {ratio:.2f} |", flush=True)
        browser.close()


if __name__ == "__main__":
    main()
