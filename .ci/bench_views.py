"""The pages that the benchmark builds: one set of views, written once in each library.

Every maker below gives the same three views of the same data, each in the way that the library's
own documentation shows: `page(user)` is the whole Tiles page, `board(user, stamp)` the fragment
that a subscriber is sent, `table(rows)` a table of a thousand rows. `stamp` goes into the board
as an attribute, so that a load client can tell which publish an event belongs to.

    python bench_views.py LIBRARY VIEW SECONDS     prints the CPU microseconds of one build
    python bench_views.py LIBRARY VIEW 0           prints what is built
"""

# The peers' own decorators and templates are untyped.
# mypy: disable-error-code="no-untyped-def"

import os
import sys
import time
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

Node = Any  # an element, in whatever form the library at hand keeps it

COLORS = ("#e03131", "#2f9e44", "#1971c2", "#f08c00")
USERS = ("ada", "grace", "linus", "user_1")
BOARD = {cell: COLORS[cell % 4] for cell in range(0, 25, 2)}
DATASTAR = "/static/datastar.js"


class Row(NamedTuple):
    """One line of the table; the names hold characters that must be escaped."""

    id: int
    name: str
    email: str
    amount: float


ROWS = [Row(i, f"Smith & <Sons> {i}", f"smith{i}@example.com", i * 1.25) for i in range(1000)]


class Views(NamedTuple):
    """What each library offers: three builders, and how an element becomes text."""

    page: Callable[[str], Node]
    board: Callable[[str, str], Node]
    table: Callable[[list[Row]], Node]
    text: Callable[[Node], str]


def paint(stamp: str) -> None:
    """Paints some tile, so that no two publishes send the same board."""
    number = int(stamp or 0)
    BOARD[number % 25] = COLORS[number // 25 % 4]


def color_for(user: str) -> str:
    """A user's own color; a tile of that color is drawn as theirs."""
    return COLORS[len(user) % len(COLORS)]


def tile_class(user: str, color: str) -> str:
    return "tile mine" if color == color_for(user) else "tile"


def use_our_stario() -> None:
    """Puts the folder of our stario.py first, before the public package of the same name."""
    path = Path(os.environ.get("STARIO_PATH", Path(__file__).parents[1] / "stario.py"))
    sys.path.insert(0, str(path.resolve().parent))


def ours() -> Views:
    use_our_stario()
    from stario import at, data, h

    head = h.Head(
        h.Meta({"charset": "utf-8"}),
        h.Title("Tiles"),
        h.Link({"rel": "stylesheet", "href": "/static/style.css"}),
        h.Script({"type": "module", "src": DATASTAR}),
    )

    def tile(user: str, cell: int) -> Node:
        color = BOARD.get(cell, "white")
        return h.Div(
            {
                "id": f"tile-{cell}",
                "class": tile_class(user, color),
                "style": {"background-color": color},
            },
            data.on("click", at.post("/click", {"cellId": cell})),
        )

    def board(user: str, stamp: str) -> Node:
        return h.Div(
            {"id": "home", "data-stamp": stamp},
            h.H1("Tiles"),
            h.P(len(USERS), " online, you are ", h.B(user)),
            h.Div({"class": "board"}, [tile(user, cell) for cell in range(25)]),
        )

    def page(user: str) -> Node:
        signals = data.signals({"user_id": user}, ifmissing=True)
        body = h.Body(signals, data.init(at.get("/subscribe")), board(user, "0"))
        return h.Html({"lang": "en"}, head, body)

    def line(row: Row) -> Node:
        return h.Tr(
            {"id": f"row-{row.id}", "class": "odd" if row.id % 2 else "even"},
            h.Td(row.id),
            h.Td(row.name),
            h.Td(h.A({"href": f"mailto:{row.email}"}, row.email)),
            h.Td({"class": "amount"}, f"{row.amount:.2f}"),
        )

    def table(rows: list[Row]) -> Node:
        return h.Table({"class": "rows"}, h.Tbody(line(row) for row in rows))

    return Views(page, board, table, str)


def ours_baked() -> Views:
    plain = ours()
    from stario import SafeString, at, baked, data, h, s

    @baked
    def tile(cell: int, cls: str, color: str, click: str) -> SafeString:
        attributes = {"id": f"tile-{cell}", "class": cls, "style": {"background-color": color}}
        return h.Div(attributes, data.on("click", click))

    @baked
    def home(user: str, stamp: str, online: int, tiles: list[SafeString]) -> SafeString:
        return h.Div(
            {"id": "home", "data-stamp": stamp},
            h.H1("Tiles"),
            h.P(online, " online, you are ", h.B(user)),
            h.Div({"class": "board"}, tiles),
        )

    @baked
    def document(signals: str, board: SafeString) -> SafeString:
        head = h.Head(
            h.Meta({"charset": "utf-8"}),
            h.Title("Tiles"),
            h.Link({"rel": "stylesheet", "href": "/static/style.css"}),
            h.Script({"type": "module", "src": DATASTAR}),
        )
        body = h.Body({"data-signals__ifmissing": signals}, subscribe, board)
        return h.Html({"lang": "en"}, head, body)

    @baked
    def line(id: int, cls: str, name: str, email: str, amount: float) -> SafeString:
        return h.Tr(
            {"id": f"row-{id}", "class": cls},
            h.Td(id),
            h.Td(name),
            h.Td(h.A({"href": f"mailto:{email}"}, email)),
            h.Td({"class": "amount"}, f"{amount:.2f}"),
        )

    @baked
    def rows_table(lines: list[SafeString]) -> SafeString:
        return h.Table({"class": "rows"}, h.Tbody(lines))

    clicks = [at.post("/click", {"cellId": cell}) for cell in range(25)]
    subscribe = data.init(at.get("/subscribe"))

    def board(user: str, stamp: str) -> Node:
        colors = [BOARD.get(cell, "white") for cell in range(25)]
        tiles = [
            tile(cell, tile_class(user, color), color, clicks[cell])
            for cell, color in enumerate(colors)
        ]
        return home(user, stamp, len(USERS), tiles)

    def page(user: str) -> Node:
        return document(f'{{"user_id":{s(user)}}}', board(user, "0"))

    def table(rows: list[Row]) -> Node:
        return rows_table(
            [line(r.id, "odd" if r.id % 2 else "even", r.name, r.email, r.amount) for r in rows]
        )

    return Views(page, board, table, plain.text)


def stario5() -> Views:
    from stario.datastar import at, data
    from stario.markup import SafeString, render, styles

    from stario import h

    head = h.Head(
        h.Meta({"charset": "utf-8"}),
        h.Title("Tiles"),
        h.Link({"rel": "stylesheet", "href": "/static/style.css"}),
        h.Script({"type": "module", "src": DATASTAR}),
    )

    def tile(user: str, cell: int) -> Node:
        color = BOARD.get(cell, "white")
        return h.Div(
            {"id": f"tile-{cell}", "class": tile_class(user, color)},
            styles({"background-color": color}),
            data.on("click", at.post("/click", {"cellId": cell})),
        )

    def board(user: str, stamp: str) -> Node:
        return h.Div(
            {"id": "home", "data-stamp": stamp},
            h.H1("Tiles"),
            h.P(len(USERS), " online, you are ", h.B(user)),
            h.Div({"class": "board"}, [tile(user, cell) for cell in range(25)]),
        )

    def page(user: str) -> Node:
        signals = data.signals({"user_id": user}, if_missing=True)
        body = h.Body(signals, data.init(at.get("/subscribe")), board(user, "0"))
        return [SafeString("<!doctype html>"), h.Html({"lang": "en"}, head, body)]

    def line(row: Row) -> Node:
        return h.Tr(
            {"id": f"row-{row.id}", "class": "odd" if row.id % 2 else "even"},
            h.Td(row.id),
            h.Td(row.name),
            h.Td(h.A({"href": f"mailto:{row.email}"}, row.email)),
            h.Td({"class": "amount"}, f"{row.amount:.2f}"),
        )

    def table(rows: list[Row]) -> Node:
        return h.Table({"class": "rows"}, h.Tbody([line(row) for row in rows]))

    return Views(page, board, table, render)


def stario5_baked() -> Views:
    from stario.datastar import at, data
    from stario.markup import SafeString, baked, render

    from stario import h

    @baked
    def tile(id, cls, style, on_click):
        return h.Div({"id": id, "class": cls, "style": style, "data-on:click": on_click})

    @baked
    def home(user, stamp, online, tiles):
        return h.Div(
            {"id": "home", "data-stamp": stamp},
            h.H1("Tiles"),
            h.P(online, " online, you are ", h.B(user)),
            h.Div({"class": "board"}, tiles),
        )

    @baked
    def document(signals, init, body):
        return [
            SafeString("<!doctype html>"),
            h.Html(
                {"lang": "en"},
                h.Head(
                    h.Meta({"charset": "utf-8"}),
                    h.Title("Tiles"),
                    h.Link({"rel": "stylesheet", "href": "/static/style.css"}),
                    h.Script({"type": "module", "src": DATASTAR}),
                ),
                h.Body({"data-signals__ifmissing": signals, "data-init": init}, body),
            ),
        ]

    @baked
    def line(id, cls, number, name, mailto, email, amount):
        return h.Tr(
            {"id": id, "class": cls},
            h.Td(number),
            h.Td(name),
            h.Td(h.A({"href": mailto}, email)),
            h.Td({"class": "amount"}, amount),
        )

    @baked
    def rows_table(lines):
        return h.Table({"class": "rows"}, h.Tbody(lines))

    clicks = [at.post("/click", {"cellId": cell}) for cell in range(25)]
    subscribe = at.get("/subscribe")

    def board(user: str, stamp: str) -> Node:
        colors = [BOARD.get(cell, "white") for cell in range(25)]
        tiles = [
            tile(f"tile-{i}", tile_class(user, color), f"background-color:{color};", clicks[i])
            for i, color in enumerate(colors)
        ]
        return home(user, stamp, len(USERS), tiles)

    def page(user: str) -> Node:
        signals = '{"user_id":"' + user + '"}'
        return document(signals, subscribe, board(user, "0"))

    def table(rows: list[Row]) -> Node:
        return rows_table(
            [
                line(
                    f"row-{row.id}",
                    "odd" if row.id % 2 else "even",
                    row.id,
                    row.name,
                    f"mailto:{row.email}",
                    row.email,
                    f"{row.amount:.2f}",
                )
                for row in rows
            ]
        )

    assert data
    return Views(page, board, table, render)


BOARD_TEMPLATE = """\
<div id="home" data-stamp="{{ stamp }}"><h1>Tiles</h1>\
<p>{{ online }} online, you are <b>{{ user }}</b></p><div class="board">\
{% for tile in tiles %}<div id="tile-{{ tile.cell }}" class="{{ tile.cls }}" \
style="background-color:{{ tile.color }};" \
data-on:click="@post('/click?cellId={{ tile.cell }}')"></div>{% endfor %}</div></div>"""

PAGE_TEMPLATE = """\
<!doctype html><html lang="en"><head><meta charset="utf-8"/><title>Tiles</title>\
<link rel="stylesheet" href="/static/style.css"/>\
<script type="module" src="/static/datastar.js"></script></head>\
<body data-signals__ifmissing='{{ {"user_id": user}|tojson }}' data-init="@get('/subscribe')">\
{% include "board" %}</body></html>"""

TABLE_TEMPLATE = """\
<table class="rows"><tbody>{% for row in rows %}\
<tr id="row-{{ row.id }}" class="{{ 'odd' if row.id % 2 else 'even' }}"><td>{{ row.id }}</td>\
<td>{{ row.name }}</td><td><a href="mailto:{{ row.email }}">{{ row.email }}</a></td>\
<td class="amount">{{ '%.2f'|format(row.amount) }}</td></tr>{% endfor %}</tbody></table>"""


def jinja2() -> Views:
    from jinja2 import DictLoader, Environment

    templates = {"board": BOARD_TEMPLATE, "page": PAGE_TEMPLATE, "table": TABLE_TEMPLATE}
    environment = Environment(loader=DictLoader(templates), autoescape=True)
    board_template = environment.get_template("board")
    page_template = environment.get_template("page")
    table_template = environment.get_template("table")

    def values(user: str, stamp: str) -> dict[str, Any]:
        colors = [BOARD.get(cell, "white") for cell in range(25)]
        tiles = [
            {"cell": cell, "color": color, "cls": tile_class(user, color)}
            for cell, color in enumerate(colors)
        ]
        return {"user": user, "stamp": stamp, "online": len(USERS), "tiles": tiles}

    return Views(
        lambda user: page_template.render(values(user, "0")),
        lambda user, stamp: board_template.render(values(user, stamp)),
        lambda rows: table_template.render(rows=rows),
        str,
    )


def htpy() -> Views:
    import json

    import htpy as t

    head = t.head[
        t.meta(charset="utf-8"),
        t.title["Tiles"],
        t.link(rel="stylesheet", href="/static/style.css"),
        t.script(type="module", src=DATASTAR),
    ]

    def tile(user: str, cell: int) -> Node:
        color = BOARD.get(cell, "white")
        return t.div(
            {"data-on:click": f"@post('/click?cellId={cell}')"},
            id=f"tile-{cell}",
            class_=tile_class(user, color),
            style=f"background-color:{color};",
        )

    def board(user: str, stamp: str) -> Node:
        return t.div(id="home", data_stamp=stamp)[
            t.h1["Tiles"],
            t.p[len(USERS), " online, you are ", t.b[user]],
            t.div(".board")[(tile(user, cell) for cell in range(25))],
        ]

    def page(user: str) -> Node:
        signals = json.dumps({"user_id": user})
        attributes = {"data-signals__ifmissing": signals, "data-init": "@get('/subscribe')"}
        return t.html(lang="en")[head, t.body(attributes)[board(user, "0")]]

    def line(row: Row) -> Node:
        return t.tr(id=f"row-{row.id}", class_="odd" if row.id % 2 else "even")[
            t.td[row.id],
            t.td[row.name],
            t.td[t.a(href=f"mailto:{row.email}")[row.email]],
            t.td(".amount")[f"{row.amount:.2f}"],
        ]

    def table(rows: list[Row]) -> Node:
        return t.table(".rows")[t.tbody[(line(row) for row in rows)]]

    return Views(page, board, table, str)


def fasthtml() -> Views:
    import json

    from fasthtml import common as t

    def tile(user: str, cell: int) -> Node:
        color = BOARD.get(cell, "white")
        return t.Div(
            id=f"tile-{cell}",
            cls=tile_class(user, color),
            style=f"background-color:{color};",
            **{"data-on:click": f"@post('/click?cellId={cell}')"},
        )

    def board(user: str, stamp: str) -> Node:
        return t.Div(
            t.H1("Tiles"),
            t.P(len(USERS), " online, you are ", t.B(user)),
            t.Div(*[tile(user, cell) for cell in range(25)], cls="board"),
            id="home",
            data_stamp=stamp,
        )

    def page(user: str) -> Node:
        head = t.Head(
            t.Meta(charset="utf-8"),
            t.Title("Tiles"),
            t.Link(rel="stylesheet", href="/static/style.css"),
            t.Script(type="module", src=DATASTAR),
        )
        signals = json.dumps({"user_id": user})
        attributes = {"data-signals__ifmissing": signals, "data-init": "@get('/subscribe')"}
        return t.Html(head, t.Body(board(user, "0"), **attributes), lang="en")

    def line(row: Row) -> Node:
        return t.Tr(
            t.Td(row.id),
            t.Td(row.name),
            t.Td(t.A(row.email, href=f"mailto:{row.email}")),
            t.Td(f"{row.amount:.2f}", cls="amount"),
            id=f"row-{row.id}",
            cls="odd" if row.id % 2 else "even",
        )

    def table(rows: list[Row]) -> Node:
        return t.Table(t.Tbody(*[line(row) for row in rows]), cls="rows")

    return Views(page, board, table, t.to_xml)


def fstring() -> Views:
    """The limit: what a person would write by hand, with `html.escape` where text comes from."""
    import json

    def tile(user: str, cell: int) -> str:
        color = BOARD.get(cell, "white")
        return (
            f'<div id="tile-{cell}" class="{tile_class(user, color)}"'
            f' style="background-color:{escape(color)};"'
            f" data-on:click=\"@post('/click?cellId={cell}')\"></div>"
        )

    def board(user: str, stamp: str) -> str:
        tiles = "".join([tile(user, cell) for cell in range(25)])
        return (
            f'<div id="home" data-stamp="{escape(stamp)}"><h1>Tiles</h1>'
            f"<p>{len(USERS)} online, you are <b>{escape(user)}</b></p>"
            f'<div class="board">{tiles}</div></div>'
        )

    def page(user: str) -> str:
        signals = escape(json.dumps({"user_id": user}))
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8"/><title>Tiles</title>'
            '<link rel="stylesheet" href="/static/style.css"/>'
            f'<script type="module" src="{DATASTAR}"></script></head>'
            f'<body data-signals__ifmissing="{signals}" data-init="@get(\'/subscribe\')">'
            f"{board(user, '0')}</body></html>"
        )

    def line(row: Row) -> str:
        email = escape(row.email)
        return (
            f'<tr id="row-{row.id}" class="{"odd" if row.id % 2 else "even"}"><td>{row.id}</td>'
            f'<td>{escape(row.name)}</td><td><a href="mailto:{email}">{email}</a></td>'
            f'<td class="amount">{row.amount:.2f}</td></tr>'
        )

    def table(rows: list[Row]) -> str:
        return f'<table class="rows"><tbody>{"".join([line(row) for row in rows])}</tbody></table>'

    return Views(page, board, table, str)


LIBRARIES: dict[str, Callable[[], Views]] = {
    "ours": ours,
    "ours-baked": ours_baked,
    "stario5": stario5,
    "stario5-baked": stario5_baked,
    "jinja2": jinja2,
    "htpy": htpy,
    "fasthtml": fasthtml,
    "fstring": fstring,
}


def builder(library: str, view: str) -> Callable[[], str]:
    """A function that builds one view of one library, down to text."""
    views = LIBRARIES[library]()
    match view:
        case "page":
            return lambda: views.text(views.page("user_1"))
        case "board":
            return lambda: views.text(views.board("user_1", "0"))
        case _:
            return lambda: views.text(views.table(ROWS))


def time_builds(build: Callable[[], str], seconds: float) -> float:
    """The CPU microseconds of one build, over as many as fit into the time given."""
    for _ in range(3):
        build()
    count = 0
    started = now = time.process_time()
    while now - started < seconds:
        build()
        count += 1
        now = time.process_time()
    return (now - started) / count * 1e6


if __name__ == "__main__":
    build_view = builder(sys.argv[1], sys.argv[2])
    wanted = float(sys.argv[3])
    print(time_builds(build_view, wanted) if wanted else build_view())
