"""The servers that the benchmark measures, one process each.

    python -m bench_apps APP ROLE LOOP PORT [NAME=VALUE ...]

APP is a key of `APPS` below, ROLE what it has to serve ("plain", "click", "json", "tiles",
"streams", "files"), LOOP the event loop, "asyncio" or "uvloop". Every app serves `/` so that the
benchmark sees when it is up. Each is written and run as its documentation recommends for
production; what a role does not need is not imported, since one workload measures the start.

Idle time-outs are long (`IDLE` seconds) but on, so that workloads with thousands of idle
connections measure the same connections throughout.
"""

# The peers' own decorators and templates are untyped.
# mypy: disable-error-code="untyped-decorator, arg-type"

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HELLO = "Hello, World!"
IDLE = 600
ANSWER = {"message": HELLO, "count": 3, "tags": ["a", "b", "c"]}
BOARD: dict[int, str] = {}


@dataclass
class HomeSignals:
    """What the Tiles page sends along with each request."""

    user_id: str


@dataclass(frozen=True)
class Job:
    """What this process has to serve, and how."""

    role: str
    loop: str
    port: int
    settings: dict[str, str]

    def number(self, name: str) -> int:
        return int(self.settings.get(name, 0))

    @property
    def directory(self) -> Path:
        return Path(self.settings["directory"])

    def run(self, main: Coroutine[Any, Any, None]) -> None:
        """Runs a main coroutine on the loop that was asked for."""
        if self.loop == "uvloop":
            import uvloop

            uvloop.run(main)
        else:
            asyncio.run(main)


def paint(cell: int, user: str) -> None:
    """What a click does after its answer: the tile changes color, or loses it."""
    if BOARD.get(cell) == user:
        del BOARD[cell]
    else:
        BOARD[cell] = user


# --- The ceiling: a protocol that writes a constant answer --------------------------------------


class Constant(asyncio.Protocol):
    """Answers each packet with the same bytes: no parsing, no routing, no limits."""

    answer = (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/plain; charset=utf-8\r\n"
        b"content-length: 13\r\ndate: Thu, 01 Jan 1970 00:00:00 GMT\r\n\r\nHello, World!"
    )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(self.answer)


def bare(job: Job) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Constant, "127.0.0.1", job.port, backlog=2048)
        await server.serve_forever()

    job.run(main())


# --- Ours ---------------------------------------------------------------------------------------


def ours_baked(job: Job) -> None:
    job.settings["views"] = "ours-baked"
    ours(job)


def ours(job: Job) -> None:
    from bench_views import use_our_stario

    use_our_stario()
    import stario

    kind = job.settings.get("tracer", "JsonTracer" if job.role == "json" else "silent")
    tracer: Any = None
    if kind != "silent":
        tracer = getattr(stario, kind)(terminal() if kind == "RichTracer" else None)
    app = stario.Stario(tracer, **our_compression(job))
    {
        "plain": our_plain,
        "click": our_click,
        "json": our_json,
        "tiles": our_tiles,
        "streams": our_streams,
        "files": our_files,
    }[job.role](app, job)

    async def serve() -> None:
        options = {"keep_alive_timeout": IDLE, "max_connections": 20_000}
        await app.serve(host="127.0.0.1", port=job.port, **options)

    if tracer is None:
        job.run(serve())
    else:
        with tracer:
            job.run(serve())


def terminal() -> Any:
    """A terminal whose other end reads all that is written."""
    master, slave = os.openpty()

    def read() -> None:
        while os.read(master, 65536):
            pass

    threading.Thread(target=read, daemon=True).start()
    return os.fdopen(slave, "w")


def our_compression(job: Job) -> dict[str, Any]:
    """`{"zstd_level": 3}` and the like, where the job asks for another level than the default."""
    from stario import CompressionConfig

    levels = {name: int(v) for name, v in job.settings.items() if name.endswith("_level")}
    return {"compression": CompressionConfig(**levels)} if levels else {}


def our_plain(app: Any, job: Job) -> None:
    async def home(c: Any, w: Any) -> None:
        w.text(HELLO)

    app.get("/", home)
    for number in range(job.number("routes")):
        app.get(f"/route{number}/{{id}}", home)


def our_click(app: Any, job: Job) -> None:
    from stario import Relay

    relay: Any = Relay()
    others = [relay.subscribe(other_subject(n)) for n in range(job.number("subscribers"))]

    async def click(c: Any, w: Any) -> None:
        signals = await c.signals(HomeSignals)
        cell = int(c.req.query.get("cellId"))
        w.empty(204)
        paint(cell, signals.user_id)
        relay.publish("click", signals.user_id)

    our_plain(app, job)
    app.post("/click", click)
    app.others = others


def other_subject(number: int) -> str:
    """Subjects that a click does not concern, half of them patterns."""
    return f"room.{number}.*" if number % 2 else f"room.{number}"


def our_json(app: Any, job: Job) -> None:
    async def home(c: Any, w: Any) -> None:
        c["user_id"] = "user_1"
        w.json(ANSWER)

    app.get("/", home)


def our_views(job: Job) -> Any:
    from bench_views import LIBRARIES

    return LIBRARIES[job.settings.get("views", "ours")]()


def our_tiles(app: Any, job: Job) -> None:
    views = our_views(job)

    async def tiles(c: Any, w: Any) -> None:
        w.html(views.page("user_1"))

    our_plain(app, job)
    app.get("/tiles", tiles)


def our_streams(app: Any, job: Job) -> None:
    import bench_views

    from stario import Relay

    views = our_views(job)
    relay: Any = Relay()

    async def subscribe(c: Any, w: Any) -> None:
        signals = await c.signals(HomeSignals)
        w.patch(views.board(signals.user_id, "hello"))
        async for _, stamp in w.alive(relay.subscribe("*")):
            w.patch(views.board(signals.user_id, stamp))

    async def publish(c: Any, w: Any) -> None:
        stamp = c.req.query.get("stamp")
        bench_views.paint(stamp)
        relay.publish("paint", stamp)
        w.empty(204)

    our_plain(app, job)
    app.get("/subscribe", subscribe)
    app.post("/publish", publish)


def our_files(app: Any, job: Job) -> None:
    our_plain(app, job)
    app.assets("/static", job.directory)


# --- The public stario package ------------------------------------------------------------------


def stario5(job: Job) -> None:
    stario5_serve(job, "stario5")


def stario5_baked(job: Job) -> None:
    stario5_serve(job, "stario5-baked")


def stario5_serve(job: Job, views: str) -> None:
    from stario.http.config import RequestPolicy
    from stario.telemetry.json import JsonTracer
    from stario.telemetry.noop import NoOpTracer

    from stario import Context, Route, ServerConfig, Writer, serve

    async def home(c: Context, w: Writer) -> None:
        w.text(HELLO)

    async def home_json(c: Context, w: Writer) -> None:
        c.span.attr("user_id", "user_1")
        w.json(ANSWER)

    async def bootstrap(app: Any, span: Any) -> AsyncIterator[None]:
        app.add(Route("GET", "/"), home_json if job.role == "json" else home)
        for number in range(job.number("routes")):
            app.add(Route("GET", f"/route{number}/{{id}}"), home)
        match job.role:
            case "click":
                stario5_click(app, job)
            case "tiles":
                stario5_tiles(app, views)
            case "streams":
                stario5_streams(app, views)
            case "files":
                await stario5_files(app, job)
        yield

    policy = RequestPolicy(keep_alive_timeout=IDLE)
    config = ServerConfig(port=job.port, requests=policy)
    with JsonTracer() if job.role == "json" else NoOpTracer() as tracer:
        job.run(serve(bootstrap, config=config, tracer=tracer))


def stario5_click(app: Any, job: Job) -> None:
    from stario.datastar import read_signals

    from stario import Relay, Route

    relay: Any = Relay()

    async def click(c: Any, w: Any) -> None:
        signals = HomeSignals(**known_fields(await read_signals(c.req)))
        cell = int(c.req.query.get("cellId"))
        w.empty(204)
        paint(cell, signals.user_id)
        relay.publish("click", signals.user_id)

    app.add(Route("POST", "/click"), click)


def known_fields(signals: Any) -> dict[str, str]:
    """What a hand-written check of one signal comes to: its type, and no other field."""
    user_id = signals["user_id"]
    if not isinstance(user_id, str):
        raise ValueError("user_id must be a string")
    return {"user_id": user_id}


def stario5_tiles(app: Any, library: str) -> None:
    from bench_views import LIBRARIES

    from stario import Route

    views = LIBRARIES[library]()

    async def tiles(c: Any, w: Any) -> None:
        w.html(views.page("user_1"))

    app.add(Route("GET", "/tiles"), tiles)


def stario5_streams(app: Any, library: str) -> None:
    import bench_views
    from stario.datastar import SSE, read_signals

    from stario import Relay, Route

    views = bench_views.LIBRARIES[library]()
    relay: Any = Relay()

    async def subscribe(c: Any, w: Any) -> None:
        signals = HomeSignals(**known_fields(await read_signals(c.req)))
        sse = SSE(w)
        async with relay.subscribe("*") as subscription:
            sse.patch_elements(views.text(views.board(signals.user_id, "hello")))
            async for _, stamp in c.alive(subscription):
                sse.patch_elements(views.text(views.board(signals.user_id, stamp)))

    async def publish(c: Any, w: Any) -> None:
        stamp = c.req.query.get("stamp")
        bench_views.paint(stamp)
        relay.publish("paint", stamp)
        w.empty(204)

    app.add(Route("GET", "/subscribe"), subscribe)
    app.add(Route("POST", "/publish"), publish)


async def stario5_files(app: Any, job: Job) -> None:
    from stario import Assets

    await Assets(str(job.directory), "/static").attach(app)


# --- Starlette, FastAPI, FastHTML and BlackSheep on uvicorn --------------------------------------


def uvicorn_serve(app: Any, job: Job) -> None:
    """One worker, httptools, the access log only where ours writes its structured log."""
    import uvicorn

    uvicorn.run(
        app,
        host="127.0.0.1",
        port=job.port,
        loop="uvloop" if job.loop == "uvloop" else "asyncio",
        http="httptools",
        log_level="info" if job.role == "json" else "warning",
        access_log=job.role == "json",
        timeout_keep_alive=IDLE,
    )


def starlette(job: Job) -> None:
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, PlainTextResponse
    from starlette.routing import Route

    async def home(request: Any) -> Any:
        return PlainTextResponse(HELLO)

    async def home_json(request: Any) -> Any:
        return JSONResponse(ANSWER)

    routes: list[Any] = [Route("/", home_json if job.role == "json" else home)]
    routes += [Route(f"/route{n}/{{id}}", home) for n in range(job.number("routes"))]
    match job.role:
        case "click":
            routes.append(starlette_click())
        case "tiles":
            routes.append(starlette_tiles())
        case "streams":
            routes += starlette_streams()
        case "files":
            from starlette.routing import Mount
            from starlette.staticfiles import StaticFiles

            routes.append(Mount("/static", StaticFiles(directory=job.directory)))
    uvicorn_serve(Starlette(routes=routes), job)


def starlette_click() -> Any:
    from datastar_py.starlette import read_signals
    from starlette.background import BackgroundTask
    from starlette.responses import Response
    from starlette.routing import Route

    async def work(cell: int, user: str) -> None:
        paint(cell, user)

    async def click(request: Any) -> Any:
        signals = HomeSignals(**known_fields(await read_signals(request)))
        cell = int(request.query_params["cellId"])
        task = BackgroundTask(work, cell, signals.user_id)
        return Response(status_code=204, background=task)

    return Route("/click", click, methods=["POST"])


def starlette_tiles() -> Any:
    from bench_views import jinja2
    from starlette.responses import HTMLResponse
    from starlette.routing import Route

    views = jinja2()

    async def tiles(request: Any) -> Any:
        return HTMLResponse(views.page("user_1"))

    return Route("/tiles", tiles)


def starlette_streams() -> list[Any]:
    import bench_views
    from datastar_py import ServerSentEventGenerator
    from datastar_py.starlette import DatastarResponse, read_signals
    from starlette.responses import Response
    from starlette.routing import Route

    views = bench_views.jinja2()
    queues: set[asyncio.Queue[str]] = set()

    async def events(user: str) -> AsyncIterator[Any]:
        queue: asyncio.Queue[str] = asyncio.Queue()
        queues.add(queue)
        try:
            yield ServerSentEventGenerator.patch_elements(views.board(user, "hello"))
            while True:
                stamp = await queue.get()
                yield ServerSentEventGenerator.patch_elements(views.board(user, stamp))
        finally:
            queues.discard(queue)

    async def subscribe(request: Any) -> Any:
        signals = HomeSignals(**known_fields(await read_signals(request)))
        return DatastarResponse(events(signals.user_id))

    async def publish(request: Any) -> Any:
        stamp = request.query_params["stamp"]
        bench_views.paint(stamp)
        for queue in queues:
            queue.put_nowait(stamp)
        return Response(status_code=204)

    return [Route("/subscribe", subscribe), Route("/publish", publish, methods=["POST"])]


def fastapi(job: Job) -> None:
    from fastapi import FastAPI
    from fastapi.responses import PlainTextResponse

    app = FastAPI()

    @app.get("/", response_class=PlainTextResponse)
    async def home() -> str:
        return HELLO

    if job.role == "json":
        app.router.routes.pop()

        @app.get("/")
        async def home_json() -> dict[str, Any]:
            return ANSWER

    uvicorn_serve(app, job)


def fasthtml(job: Job) -> None:
    from bench_views import fasthtml as fasthtml_views
    from fasthtml.common import FastHTML
    from starlette.responses import PlainTextResponse

    views = fasthtml_views()
    app = FastHTML(default_hdrs=False)

    @app.get("/")
    async def home() -> Any:
        return PlainTextResponse(HELLO)

    @app.get("/tiles")
    async def tiles() -> Any:
        return views.page("user_1")

    uvicorn_serve(app, job)


def blacksheep_app() -> Any:
    from blacksheep import Application, get, text

    app = Application()

    @get("/")
    async def home() -> Any:
        return text(HELLO)

    return app


def blacksheep(job: Job) -> None:
    uvicorn_serve(blacksheep_app(), job)


def granian(job: Job) -> None:
    """BlackSheep on Granian, a server that is written in Rust."""
    from granian import Granian
    from granian.constants import Interfaces, Loops

    loop = Loops.uvloop if job.loop == "uvloop" else Loops.asyncio
    server = Granian(
        "bench_apps:blacksheep_app",
        address="127.0.0.1",
        port=job.port,
        interface=Interfaces.ASGI,
        loop=loop,
        workers=1,
        factory=True,
        log_enabled=False,
    )
    server.serve()


# --- Sanic, aiohttp, microdot -------------------------------------------------------------------


def sanic(job: Job) -> None:
    from sanic import Sanic
    from sanic.response import empty, text

    app: Any = Sanic("bench")
    app.config.USE_UVLOOP = job.loop == "uvloop"
    app.config.KEEP_ALIVE_TIMEOUT = IDLE

    @app.get("/")
    async def home(request: Any) -> Any:
        return text(HELLO)

    if job.role == "click":
        from datastar_py.sanic import read_signals

        async def work(cell: int, user: str) -> None:
            paint(cell, user)

        @app.post("/click")
        async def click(request: Any) -> Any:
            signals = HomeSignals(**known_fields(await read_signals(request)))
            request.app.add_task(work(int(request.args.get("cellId")), signals.user_id))
            return empty()

    app.run("127.0.0.1", job.port, single_process=True, access_log=False, motd=False)


def aiohttp(job: Job) -> None:
    from aiohttp import web

    async def home(request: Any) -> Any:
        return web.Response(text=HELLO)

    app = web.Application()
    app.router.add_get("/", home)
    if job.role == "files":
        app.router.add_static("/static", job.directory)

    loop = None
    if job.loop == "uvloop":
        import uvloop

        loop = uvloop.new_event_loop()
    web.run_app(
        app,
        host="127.0.0.1",
        port=job.port,
        access_log=None,
        print=None,
        keepalive_timeout=IDLE,
        loop=loop,
    )


def microdot(job: Job) -> None:
    from microdot import Microdot

    app = Microdot()

    @app.get("/")
    async def home(request: Any) -> Any:
        return HELLO

    job.run(app.start_server("127.0.0.1", job.port))


APPS: dict[str, Callable[[Job], None]] = {
    "bare": bare,
    "ours": ours,
    "ours-baked": ours_baked,
    "stario5": stario5,
    "stario5-baked": stario5_baked,
    "starlette": starlette,
    "fastapi": fastapi,
    "fasthtml": fasthtml,
    "blacksheep": blacksheep,
    "granian": granian,
    "sanic": sanic,
    "aiohttp": aiohttp,
    "microdot": microdot,
}

if __name__ == "__main__":
    name, role, loop_name, port = sys.argv[1:5]
    pairs = dict(argument.split("=", 1) for argument in sys.argv[5:])
    APPS[name](Job(role, loop_name, int(port), pairs))
