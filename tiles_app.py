# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Tiles: a board that everybody paints together. `python tiles_app.py`, and open it in two tabs.

Whoever opens the page gets a colour. A click paints a cell, a second click clears it, and everyone
sees it at once: the page opens a stream, and with each change the server sends it the whole view
again. The browser changes only what differs.
"""

import argparse
import asyncio
import random
import sys
import threading
import uuid
from collections import Counter
from dataclasses import dataclass
from zlib import crc32

from stario import (
    Context,
    HttpException,
    JsonTracer,
    Relay,
    RichTracer,
    SafeString,
    Stario,
    Writer,
    asset,
    at,
    data,
    datastar_script,
    h,
    same_origin,
)

# -- State. It lives in variables: all workers are threads of one process, so they share it. Each
# change is made under the lock, since a read and a write that depends on it are two steps.

SIZE = 5
CELLS = range(SIZE * SIZE)
CELL_IDS = {str(cell): cell for cell in CELLS}  # what a request may say

board: dict[int, str] = {}  # cell -> colour
players: Counter[str] = Counter()  # user id -> open streams: a reconnect may overlap the old one
lock = threading.Lock()
relay: Relay[str] = Relay()


def color_for_user(user_id: str) -> str:
    """A colour that is the same in every process, and after a restart (`hash()` would not be)."""
    return f"hsl({crc32(user_id.encode()) % 360} 70% 52%)"


def paint_at_random() -> None:
    """Begin with a few cells, so that the board does not look broken."""
    for cell in random.sample(CELLS, 4):
        board[cell] = color_for_user(str(random.random()))


def join(user_id: str) -> None:
    """One more stream of this player is open."""
    with lock:
        players[user_id] += 1


def leave(user_id: str) -> None:
    """One fewer. A player is there until the last one ends."""
    with lock:
        players[user_id] -= 1
        if not players[user_id]:
            del players[user_id]


# -- Views. An element is a string, so what never changes is built once, here.

CLICK = [data.on("click", at.post("/click", {"cellId": cell})) for cell in CELLS]

# "always": come back after the server has ended the stream, too, not only after a broken one.
SUBSCRIBE = data.init(at.get("/subscribe", retry="always", retry_max_count=1000))


def page(*content: SafeString) -> SafeString:
    """The document around the view."""
    return h.Html(
        {"lang": "en"},
        h.Head(
            h.Meta({"charset": "utf-8"}),
            h.Meta({"name": "viewport", "content": "width=device-width, initial-scale=1"}),
            h.Title("Tiles"),
            h.Link({"rel": "stylesheet", "href": "/static/" + asset("style.css")}),
            h.Link({"rel": "icon", "href": "/static/" + asset("icon.svg")}),
            datastar_script(),
        ),
        h.Body(*content),
    )


def home_view(user_id: str) -> SafeString:
    """All that changes, as one user sees it. `id` tells the browser which element to patch."""
    with lock:
        cells, present = dict(board), sorted(players)
    # The order of attributes matters: the stream's request sends the signals, so they come first.
    return h.Main(
        {"id": "home"},
        data.signals({"user_id": user_id}, ifmissing=True),
        SUBSCRIBE,
        h.H1("Tiles"),
        h.P("Click a cell to paint it, and again to clear it. Everyone sees the same board."),
        h.Div(
            {"class": "board", "role": "group", "aria-label": "Board"},
            [cell_view(cell, cells.get(cell)) for cell in CELLS],
        ),
        h.P(
            {"class": "note", "role": "status"},
            "The board is complete!" if len(cells) == len(CELLS) else None,
        ),
        h.H2("Players"),
        h.Ul({"class": "players"}, [player_view(player, player == user_id) for player in present]),
    )


def cell_view(cell: int, color: str | None) -> SafeString:
    """One cell: a button, so that it works by keyboard and says what it is to a screen reader."""
    row, column = divmod(cell, SIZE)
    label = f"Row {row + 1}, column {column + 1}: {'painted' if color else 'empty'}"
    style = {"background-color": color} if color else {}
    return h.Button(
        {"id": f"cell-{cell}", "class": "cell", "aria-label": label, "style": style}, CLICK[cell]
    )


def player_view(player: str, is_self: bool) -> SafeString:
    """A player's colour and name."""
    swatch = h.Span({"class": "swatch", "style": {"background-color": color_for_user(player)}})
    return h.Li({"id": f"player-{player}"}, swatch, player, " (you)" if is_self else None)


# -- Handlers. All have the same signature; what they do with `c` and `w` makes the difference.


@dataclass
class HomeSignals:
    """What the browser sends with each request."""

    user_id: str = ""


async def home(c: Context, w: Writer) -> None:
    """Serve the page."""
    user_id = str(uuid.uuid4())[:8]
    c["user_id"] = user_id
    w.html(page(home_view(user_id)))


async def subscribe(c: Context, w: Writer) -> None:
    """Keep a stream open, and send the view again whenever something has happened."""
    signals = await c.signals(HomeSignals)
    if not signals.user_id:
        c("No user id", {"hint": "user had to change something manually"})
        w.redirect("/")
        return
    if len(signals.user_id) > 40 or not signals.user_id.isprintable():
        raise HttpException(400, "a user id has at most 40 printable characters")

    # Subscribe first, and nothing is missed between the view and the first turn of the loop. Who
    # falls behind needs only the last event of each kind: the view is always whole.
    events = relay.subscribe("*", overflow="latest")
    join(signals.user_id)
    relay.publish("join", signals.user_id)
    c("on_join", {"user_id": signals.user_id})
    c["user_id"] = signals.user_id

    w.patch(home_view(signals.user_id))

    # Loop until the client disconnects
    async for event, user_id in w.alive(events):
        c("on_event", {"event": event, "user_id": user_id})
        w.patch(home_view(signals.user_id))

    # Cleanup: runs after the disconnect
    leave(signals.user_id)
    relay.publish("leave", signals.user_id)
    c("on_leave", {"user_id": signals.user_id})


async def click(c: Context, w: Writer) -> None:
    """Answer at once, then paint the cell and tell everyone."""
    signals = await c.signals(HomeSignals)
    if signals.user_id not in players:
        c("No user id or user not connected", {"user_id": signals.user_id})
        w.redirect("/", status=303)
        return
    cell = CELL_IDS.get(c.req.query.get("cellId"))
    if cell is None:
        raise HttpException(400, f"cellId must be a number from 0 to {CELLS[-1]}")
    c["user_id"] = signals.user_id
    c["cell_id"] = cell

    # Respond immediately: the client gets its 204 No Content now
    w.empty(204)

    # Everything below still runs after the response is sent
    color = color_for_user(signals.user_id)
    with lock:
        if board.get(cell) == color:
            board.pop(cell)
        else:
            board[cell] = color
    relay.publish("click", signals.user_id)


# -- Looks. The files of `app.assets` can stand in the code, too: one file is the whole app.

STYLE = """
:root {
  color-scheme: light dark; font: 100%/1.5 system-ui, sans-serif;
  --back: #f6f5f2; --text: #23242a; --cell: #fff; --line: #d5d2cb; --focus: #2457d6;
}
@media (prefers-color-scheme: dark) {
  :root { --back: #17181c; --text: #eceaf0; --cell: #24262d; --line: #3a3c45; --focus: #9db8ff; }
}
body { margin: 0; background: var(--back); color: var(--text); }
main { box-sizing: border-box; max-width: 34rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { margin: 0; font-size: 2.25rem; letter-spacing: -0.02em; }
h2 { margin: 1.5rem 0 0.5rem; font-size: 1.125rem; }
p { margin: 0.25rem 0 1.25rem; }
.board { display: grid; grid-template-columns: repeat(5, 1fr); gap: 0.5rem; }
.cell {
  aspect-ratio: 1; padding: 0; border: 1px solid var(--line);
  border-radius: 0.6rem; background: var(--cell); cursor: pointer;
  transition: background-color 150ms, transform 100ms;
}
.cell:hover { transform: scale(1.04); }
.cell:active { transform: scale(0.96); }
.cell:focus-visible { outline: 3px solid var(--focus); outline-offset: 2px; }
.note { min-height: 1.5em; margin: 1rem 0 0; font-weight: 600; text-align: center; }
.players { display: flex; flex-wrap: wrap; gap: 0.5rem; margin: 0; padding: 0; list-style: none; }
.players li {
  display: flex; align-items: center; gap: 0.5rem; padding: 0.25rem 0.75rem;
  border: 1px solid var(--line); border-radius: 2rem;
  overflow-wrap: anywhere; font-variant-numeric: tabular-nums;
}
.swatch { flex: none; width: 0.9rem; height: 0.9rem; border-radius: 50%; }
@media (prefers-reduced-motion: reduce) { .cell { transition: none; } }
"""

ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 4"><rect width="4" height="4"
rx=".8" fill="#e4572e"/><path d="M2 0h1.2a.8.8 0 0 1 .8.8V2H2z" fill="#17bebb"/><path d="M0 2h2v2H.8
a.8.8 0 0 1-.8-.8z" fill="#ffc914"/></svg>"""


# -- The app


def make_app(tracer: RichTracer | JsonTracer) -> Stario:
    """Routes, in one place, to be read top to bottom."""
    app = Stario(tracer)
    app.use(same_origin)  # no other site can click for our users
    app.assets("/static", {"style.css": STYLE, "icon.svg": ICON})
    app.get("/", home)
    app.get("/subscribe", subscribe)
    app.post("/click", click)
    return app


async def main() -> None:
    """At a terminal: a server for one person to develop with. Otherwise: one for production."""
    local = "--local" in sys.argv or sys.stdout.isatty()
    options = argparse.ArgumentParser(description="Tiles: paint a board together.")
    options.add_argument("--local", action="store_true", help="as at a terminal")
    options.add_argument("--host", default="127.0.0.1" if local else "0.0.0.0")
    options.add_argument("--port", type=int, default=8000)
    options.add_argument("--workers", type=int, default=1 if local else 4)
    chosen = options.parse_args()

    paint_at_random()
    with RichTracer() if local else JsonTracer() as tracer:
        app = make_app(tracer)
        await app.serve(host=chosen.host, port=chosen.port, workers=chosen.workers)


if __name__ == "__main__":
    asyncio.run(main())
