# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Tiles: a board that everybody paints together. `python tiles_app.py`, and open it in two tabs.

Everyone who opens the page gets a colour. A click paints a cell, a second click clears it, and
everyone sees it at once: the page opens a stream, and on each change the server sends the whole
view again. The browser changes only what differs.
"""

import argparse
import asyncio
import os
import random
import sys
import threading
import time
import uuid
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from zlib import crc32

from stario import (
    Context,
    HttpException,
    JsonTracer,
    RedisRelay,
    Relay,
    RichTracer,
    SafeString,
    Stario,
    StarioError,
    Tracer,
    Writer,
    asset,
    at,
    baked,
    data,
    datastar_script,
    h,
    same_origin,
)

SIZE = 5
CELLS = range(SIZE * SIZE)
CELL_IDS = {str(cell): cell for cell in CELLS}  # what a request may say


def color_for_user(user_id: str) -> str:
    """A colour that is the same in every process, and after a restart (`hash()` would not be)."""
    return f"hsl({crc32(user_id.encode()) % 360} 70% 52%)"


# -- State. One object holds it, and its relay announces each change. All workers are threads of one
# process, so they share it. A change is made under the lock, because a read and a write that
# depends on it are two steps.


class State:
    """Board and players, in this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.relay: Relay[str] = Relay()
        self.players: Counter[str] = Counter()  # user id -> open streams: they may overlap
        # Begin with a few cells, so that the board does not look broken.
        colors = (color_for_user(str(random.random())) for _ in CELLS)
        self.board = dict(zip(random.sample(CELLS, 4), colors, strict=False))  # cell -> colour

    async def join(self, user_id: str) -> None:
        """One more stream of this player is open."""
        with self.lock:
            self.players[user_id] += 1

    async def leave(self, user_id: str) -> None:
        """One fewer. A player is there until the last one ends."""
        with self.lock:
            self.players[user_id] -= 1
            if not self.players[user_id]:
                del self.players[user_id]

    async def paint(self, cell: int, user_id: str) -> None:
        """Paint a cell, or clear it if it has this player's colour."""
        color = color_for_user(user_id)
        with self.lock:
            if self.board.get(cell) == color:
                self.board.pop(cell)
            else:
                self.board[cell] = color

    def tell(self, event: str, user_id: str) -> None:
        """Let everyone see what has changed."""
        self.relay.publish(event, user_id)


class SharedState(State):
    """The same for many processes: Redis holds the state, and this object a copy to show.

    A player is a member of a sorted set; its score is the time at which it expires. Each process
    extends that time for its own players, so the players of a dead process expire.
    """

    PAINT = """
        if redis.call('hget', KEYS[1], ARGV[1]) == ARGV[2] then
            return redis.call('hdel', KEYS[1], ARGV[1])
        end
        return redis.call('hset', KEYS[1], ARGV[1], ARGV[2])
    """  # Redis runs it as one step

    def __init__(self, url: str, tracer: Tracer, expiry: float) -> None:
        super().__init__()
        self.others = RedisRelay[str](url, tracer=tracer)
        from redis import RedisError
        from redis.asyncio import BlockingConnectionPool, Redis

        # It has 50 connections. A caller waits while all of them are in use.
        pool = BlockingConnectionPool.from_url(url, decode_responses=True, socket_timeout=5)
        self.redis = Redis.from_pool(pool)
        self.refreshing = asyncio.Lock()  # one at a time: the newest reply wins
        self.away = (RedisError, OSError)  # the errors while Redis cannot be reached
        self.expiry = expiry
        self.process = uuid.uuid4().hex
        self.own: Counter[str] = Counter()  # the players whose streams are open here

    async def join(self, user_id: str) -> None:
        self.own[user_id] += 1
        await self.refresh()

    async def leave(self, user_id: str) -> None:
        self.own[user_id] -= 1
        await self.refresh()

    async def paint(self, cell: int, user_id: str) -> None:
        await self.redis.eval(self.PAINT, 1, "tiles:board", cell, color_for_user(user_id))

    def tell(self, event: str, user_id: str) -> None:
        with suppress(StarioError):  # Redis is away; the others refresh when it is back
            self.others.publish(event, user_id)

    async def follow(self) -> None:
        """Keep the copy up to date: refresh when another process publishes, and now and then."""
        events = self.others.subscribe("*", overflow="latest")
        self.tell("start", "")  # it comes back once the subscription is made: then refresh
        while True:
            await self.refresh()
            with suppress(TimeoutError):
                await asyncio.wait_for(anext(events), self.expiry / 4)

    async def refresh(self) -> None:
        """Tell Redis about our players, read everything, and tell our tabs if anything changed."""
        async with self.refreshing:
            with suppress(*self.away):  # keep the copy as it is; try again the next time
                board, players = await self.exchange()
                if (board, players) != (self.board, self.players):
                    self.board, self.players = board, players
                    self.relay.publish("change", "")

    async def exchange(self) -> tuple[dict[int, str], Counter[str]]:
        """Extend our players' time, remove those who left, and read board and players."""
        now = time.time()
        members = {user_id: f"{self.process} {user_id}" for user_id in self.own}
        left = [user_id for user_id in members if not self.own[user_id]]
        async with self.redis.pipeline() as all_at_once:
            if members:
                until = now + self.expiry
                all_at_once.zadd("tiles:players", dict.fromkeys(members.values(), until))
            if left:
                all_at_once.zrem("tiles:players", *[members[user_id] for user_id in left])
            all_at_once.zremrangebyscore("tiles:players", 0, now)
            all_at_once.zrange("tiles:players", 0, -1)
            all_at_once.hgetall("tiles:board")
            *_, present, cells = await all_at_once.execute()
        for user_id in left:
            if not self.own[user_id]:  # unless it has come back meanwhile
                del self.own[user_id]
        players = Counter(member.partition(" ")[2] for member in present)
        return {int(cell): color for cell, color in cells.items()}, players


state = State()  # `make_app` may put a SharedState in its place


# -- Views. An element is a string, so parts that never change are built once, here.

CLICK = [at.post("/click", {"cellId": cell}) for cell in CELLS]

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
    """Everything that changes, as one user sees it. `id` says which element to patch."""
    with state.lock:
        cells, present = dict(state.board), sorted(state.players)
    # The order of attributes matters: the stream's request sends the signals, so set them first.
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
        h.Ul(
            {"class": "players"},
            [
                player_view(player, color_for_user(player), " (you)" if player == user_id else None)
                for player in present
            ],
        ),
    )


def cell_view(cell: int, color: str | None) -> SafeString:
    """One cell: a button, so that it works by keyboard and says what it is to a screen reader."""
    row, column = divmod(cell, SIZE)
    label = f"Row {row + 1}, column {column + 1}: {'painted' if color else 'empty'}"
    return cell_button(cell, label, color, CLICK[cell])


# A baked view decides nothing: it only puts its arguments in their places, which is much faster.
@baked
def cell_button(cell: int, label: str, color: str | None, click: str) -> SafeString:
    """A button that sends a click on this cell."""
    attributes = {"id": f"cell-{cell}", "class": "cell", "aria-label": label}
    return h.Button(attributes, {"style": {"background-color": color}}, data.on("click", click))


@baked
def player_view(player: str, color: str, note: str | None) -> SafeString:
    """A player's colour and name."""
    swatch = h.Span({"class": "swatch", "style": {"background-color": color}})
    return h.Li({"id": f"player-{player}"}, swatch, player, note)


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

    # Subscribe first, so that nothing is missed between the view and the first round of the loop.
    # A slow client needs only the last event of each kind, because it gets the whole view.
    events = state.relay.subscribe("*", overflow="latest")
    await state.join(signals.user_id)
    state.tell("join", signals.user_id)
    c("on_join", {"user_id": signals.user_id})
    c["user_id"] = signals.user_id

    w.patch(home_view(signals.user_id))

    # Loop until the client disconnects
    async for event, user_id in w.alive(events):
        c("on_event", {"event": event, "user_id": user_id})
        w.patch(home_view(signals.user_id))

    # Cleanup: runs after the disconnect
    await state.leave(signals.user_id)
    state.tell("leave", signals.user_id)
    c("on_leave", {"user_id": signals.user_id})


async def click(c: Context, w: Writer) -> None:
    """Paint a cell, answer, and then tell everyone."""
    signals = await c.signals(HomeSignals)
    if signals.user_id not in state.players:
        c("No user id or user not connected", {"user_id": signals.user_id})
        w.redirect("/", status=303)
        return
    cell = CELL_IDS.get(c.req.query.get("cellId", ""))
    if cell is None:
        raise HttpException(400, f"cellId must be a number from 0 to {CELLS[-1]}")
    c["user_id"] = signals.user_id
    c["cell_id"] = cell

    # Do what the answer promises before sending it
    await state.paint(cell, signals.user_id)

    # Respond immediately: the client gets its 204 No Content now
    w.empty(204)

    # Everything below still runs after the response is sent
    state.tell("click", signals.user_id)


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


def make_app(tracer: Tracer, redis: str = "", expiry: float = 20.0) -> Stario:
    """Routes, in one place, to be read top to bottom."""
    global state
    app = Stario(tracer)
    app.use(same_origin)  # no other site can click for our users
    app.assets("/static", {"style.css": STYLE, "icon.svg": ICON})
    app.get("/", home)
    app.get("/subscribe", subscribe)
    app.post("/click", click)
    if redis:
        state = shared = SharedState(redis, tracer, expiry)
        app.background(shared.follow())
    return app


async def main() -> None:
    """At a terminal: a server for one person to develop with. Otherwise: one for production."""
    local = "--local" in sys.argv or sys.stdout.isatty()
    options = argparse.ArgumentParser(description="Tiles: paint a board together.")
    options.add_argument("--local", action="store_true", help="as at a terminal")
    options.add_argument("--host", default="127.0.0.1" if local else "0.0.0.0")
    options.add_argument("--port", type=int, default=8000)
    options.add_argument("--reload", action="store_true", help="restart when a file is saved")
    options.add_argument("--workers", type=int, default=1)
    options.add_argument("--redis", default="", help="share the board with other processes")
    options.add_argument("--expiry", type=float, default=20.0, help="seconds a dead process lasts")
    chosen = options.parse_args()
    if chosen.redis and chosen.workers > 1:
        options.error("with --redis, start more processes instead of workers")

    with RichTracer() if local else JsonTracer() as tracer:
        app = make_app(tracer, chosen.redis, chosen.expiry)
        await app.serve(chosen.host, chosen.port, chosen.workers, reload=chosen.reload)


if __name__ == "__main__":
    asyncio.run(main())
else:  # `uvicorn tiles_app:app`, or another ASGI server
    app = make_app(JsonTracer(), os.environ.get("REDIS_URL", ""))
