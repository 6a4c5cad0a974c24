"""Stario in one file: real-time web apps with nothing but Python's standard library.

Copy this file into your project, under any name. The smallest app (RichTracer prints each request):

    import asyncio
    from stario import Context, RichTracer, Stario, Writer, h

    async def home(c: Context, w: Writer) -> None:
        w.html(h.H1("Hello, ", c.req.query.get("name", "world")))

    async def main() -> None:
        app = Stario(RichTracer())
        app.get("/", home)
        await app.serve()

    asyncio.run(main())


ACT 0. The life of a request

A browser opens a connection to this app. The server (part 10) accepts it. The browser sends lines
of text, each ending in "\r\n". (Numbers in brackets are parts; this text is part 1.)

    GET /?name=Ada HTTP/1.1
    host: localhost:8000

The first line is the request line: method, target, version. Header fields follow, one per line,
each a name and a value. All this is the head; an empty line ends it, and a body may follow. The
connection (9) finds where the request ends, and makes a `Request` (5) from it. `dispatch` (8) takes
that through the app: the router (7) finds the handler for `/`, the function that you wrote for it,
and `dispatch` calls it with a `Context`, which holds the request, and a `Writer` for the answer.
The handler builds an HTML element (3) and gives it to the writer (6), which answers:

    HTTP/1.1 200 OK
    content-type: text/html; charset=utf-8
    content-length: 19

    <h1>Hello, Ada</h1>

A page that changes while you look at it sends a second request. The answer does not end: it is a
stream of events (13). The handler does not return; it writes an event whenever something changes.
It usually learns of the change from another handler, through the relay (14). An event is a few
lines of text followed by an empty line:

    event: datastar-patch-elements
    data: elements <h1 id="title">Hello, Grace</h1>

Datastar (12) is the JavaScript in the page. It requests the stream, and puts each element that
arrives in place of the one with the same id. Part 31 of this file is a small substitute for it.

MAP

After each act something runs, and you may stop there. Acts 1 to 3 are all you need to understand a
live page; each part of act 4 can be read alone, when it is needed. A part with a name in square
brackets can be left out of your copy: `python stario.py --without assets,client >mine.py`.

      222  ACT 1. A framework
        230  2. Errors
        321  3. HTML: elements are strings
        666  4. JSON
        788  5. The request: headers, query, cookies, body
       1259  6. The answer: status, fields, body
       1686  7. Context and routing
       2148  8. The app
     2335  ACT 2. On the network
       2343  9. HTTP/1.1: bytes to requests and back (RFC 9110 and 9112)
       3333  10. The server
       4156  11. Trying it without a network: the test client [testclient]
     4620  ACT 3. Live
       4670  12. Datastar: attributes and actions
       5256  13. Streams: events, and staying with a client
       5771  14. Relay: publish and subscribe
     6069  ACT 4. For real
       6076  15. Signals: from JSON to your dataclass
       6826  16. Forms [forms]
       7032  17. Behind a proxy
       7145  18. Compression [compression]
       7354  19. Static files [assets]
       7933  20. Telemetry: spans, and who hears of them
       8424  21. JsonTracer: for log collectors [json]
       8497  22. RichTracer: for people [rich]
       8930  23. Sessions [sessions]
       9044  24. What lives as long as the server
       9145  25. @baked
       9431  26. ASGI: the same app under another server [asgi]
       9658  27. RedisRelay: the same between processes and machines [redis]
       9931  28. Reload: a saved file restarts the app [reload]
      10080  29. Development: what went wrong, shown where one looks [development]
      10198  30. What is refused; hosts, cookies, other sites
    10616  ACT 5. The pocket client, and this file itself
      10657  31. The pocket client (JavaScript) [client]
      12045  32. This file as a page [read]
      12215  33. An app to begin with

READING PATH

Two hours, for a reader who wants to know how it works, not everything it does. In this order:

      332-349    `SafeString`  an element is a string
      630-659    `Tags`  `h.P` makes one
     1064-1241   `Request`  what a client asks for
     1270-1337   `Carrier`  what brings the answer back
     1418-1614   `_RawWriter`  the answer
     1704-1809   `Context`  what a handler gets beside it
     1900-1915   `_Tree.find`  from a path to a handler
     2254-2287   `_App.dispatch`  one request from end to end
     2700-2813   `_RequestReader`  bytes to requests
     3087-3329   `Connection`  one connection, many requests
     3756-3777   `Server.start`  listening
     3892-3914   `Server.stop`  ending without losing a request
     5380-5502   `_EventWriter`  events
     5591-5653   `_Scope`  how a disconnect reaches a handler
     5681-5767   `Alive`  staying with a client
     5922-6014   `Relay`  from one handler to another

The parts know little about each other. HTML, JSON, Datastar's attributes, events and the relay work
in any framework. A `Carrier` (6) brings a request and takes its answer, and the app knows only what
that class declares. A connection (9) is a carrier; so is another server's request (26).
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - the user of an older one sees this message
    raise ImportError(f"stario needs Python 3.11 or newer, and this is {sys.version.split()[0]}")

import ast
import asyncio
import atexit
import base64
import contextvars
import dataclasses
import enum
import errno
import functools
import inspect
import ipaddress
import json
import keyword
import linecache
import logging
import math
import os
import queue
import re
import select
import signal
import socket
import stat
import struct
import subprocess
import textwrap
import threading
import time
import traceback
import types
import typing
import weakref
import zlib
from collections import Counter, OrderedDict, deque
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from datetime import date, datetime, timezone
from datetime import time as time_of_day
from decimal import Decimal
from functools import cached_property, lru_cache, wraps
from http import HTTPStatus
from itertools import chain, count, cycle, islice, repeat
from typing import (
    IO,
    Any,
    Generic,
    Literal,
    NamedTuple,
    NoReturn,
    ParamSpec,
    Self,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
)
from urllib.parse import (
    parse_qsl,
    quote,
    unquote,
    urlencode,
    urljoin,
    urlsplit,
)
from uuid import UUID

if typing.TYPE_CHECKING:
    import ssl as ssl_module

T = TypeVar("T")
P = ParamSpec("P")


# ==================================================================================================
# ACT 1. A framework
#
# Without a network, a framework is a function from a request to an answer. Whatever brings the
# request and takes the answer is a *carrier*. In act 2 that is a connection; at the end of this act
# it is a class of a few lines that prints what it is given.
# ==================================================================================================

# ==================================================================================================
# 2. Errors
#
# There are three kinds. A StarioError tells the developer that the framework was used wrongly, and
# what to write instead. An HttpException is for the client: raise one anywhere in a handler, and it
# becomes the answer. ClientDisconnected says that nobody is left to answer.
# ==================================================================================================


class StarioError(Exception):
    """The framework was used in a way that cannot work; the message says what to do instead.

    Most frames of its traceback are in this file. So a note below it names the line of your own
    code that made the call: `at /home/ada/app.py:12`.
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        for frame, line in traceback.walk_stack(inspect.currentframe()):
            filename = frame.f_code.co_filename
            if frame.f_globals.get("__name__") == "asyncio.runners":
                break  # the call of asyncio.run() is not to blame
            if _is_own(filename) and filename != "<string>":  # (a dataclass's `__init__`, say)
                self.add_note(f"at {filename}:{line}")
                break


def _is_own(filename: str) -> bool:
    """Whether a file is the program's own: not this one, Python's, or an installed package's."""
    return not (filename.startswith(_OTHER_CODE) or "-packages" in filename)


# (A program frozen into one file has no __file__, but its functions know the file's name.)
_OTHER_CODE = (os.path.dirname(os.__file__), _is_own.__code__.co_filename, "<frozen")


class ClientDisconnected(Exception):
    """The client has gone. Raised where a handler waits to read from it, or to send to it.

    A handler need not catch it: `dispatch` (part 8) does.
    """


class HttpException(Exception):
    """An answer, raised. `HttpException(404, "no such room")` answers that text with that status.

    With a redirect's status the detail is the address to go to: `HttpException(302, "/login")`.
    Without a detail the text is the status's phrase from Python's `http.HTTPStatus`.
    """

    def __init__(self, status_code: int, detail: str = "") -> None:
        """Raises StarioError: a status below 300, a detail not of text, a 3xx without address."""
        _check_status(status_code)
        if status_code < 300:
            raise StarioError(f"{status_code} is no error: answer with w.html, w.json or w.empty")
        if detail and not isinstance(detail, str):
            kind = type(detail).__name__
            raise StarioError(f"an HttpException's detail is text, not {kind}: answer with w.json")
        if status_code in _REDIRECTS and not detail:
            raise StarioError(f'{status_code} needs an address: HttpException(303, "/login")')
        self.status_code = status_code
        self.detail = detail or _PHRASES.get(status_code, "Unknown")
        super().__init__(self.status_code, self.detail)

    def __str__(self) -> str:
        return f"{self.status_code}: {self.detail}"


_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_PHRASES = {status.value: status.phrase for status in HTTPStatus}


def _check_status(status: object) -> None:
    """Refuse what cannot be an answer's status. 600 to 999 pass: a program may use its own."""
    if not isinstance(status, int) or not 200 <= status <= 999:
        raise StarioError(f"{status!r} is no status of an answer: 200 to 599 are")


def _ungrouped(exc: BaseException) -> BaseException:
    """The exception inside an ExceptionGroup, as if the handler itself had raised it.

    asyncio's TaskGroup raises such a group even if only one task has failed. A group of several is
    kept, unless each is an HttpException or a ClientDisconnected: then the first one is used.
    """
    if isinstance(exc, BaseExceptionGroup):
        inside = [_ungrouped(inner) for inner in exc.exceptions]
        is_foreseen = all(isinstance(e, (HttpException, ClientDisconnected)) for e in inside)
        return inside[0] if is_foreseen or len(inside) == 1 else exc
    return exc


# ==================================================================================================
# 3. HTML: elements are strings
#
# `h.P("a < b")` is the string `<p>a &lt; b</p>`, marked as safe by its type. So there is no tree to
# build and then walk. An element is text: it can be kept, compared, cached and joined, and HTML
# that does not change can be built once, as a module constant. The rule that must hold: a plain str
# is text and gets escaped; a SafeString is HTML and does not. Text becomes HTML only in this part,
# or where somebody writes `SafeString(text)`. To the browser an attribute's value is text, which it
# decodes once. So everything in an attribute is escaped, even a SafeString.
# ==================================================================================================


class SafeString(str):
    """HTML that is never escaped again. `SafeString(text)` says: I trust this text as it is."""

    __slots__ = ()  # no attributes of its own: it is hardly larger than a str

    def __html__(self) -> str:
        """The text itself: the protocol by which template libraries recognise trusted HTML."""
        return self

    def __add__(self, other: object) -> SafeString:
        return render(self, other)

    def __radd__(self, other: object) -> SafeString:
        return render(other, self)

    def __format__(self, spec: str) -> str:
        """A plain str: an f-string is not trusted. (str's own may return `self`, a SafeString.)"""
        return format(str.__str__(self), spec)


def _escape(text: str) -> str:
    """`a < b & c` as `a &lt; b &amp; c`."""
    # Most text has none of these, and looking for them takes half as long as replacing. A carriage
    # return is written as a reference, because browsers turn a bare one into a line feed.
    if "&" in text or "<" in text or ">" in text or "\r" in text:
        text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        return text.replace("\r", "&#13;") if "\r" in text else text
    return text


def _quote(text: str) -> str:
    """Escape text that goes between the quotes of an attribute."""
    if '"' in text or "&" in text or "<" in text or ">" in text or "\r" in text:
        return _escape(text).replace('"', "&quot;")
    return text


def render(*parts: object) -> SafeString:
    """Join parts into one piece of HTML: elements, text, numbers, and iterables of them."""
    return SafeString(_html(parts))


Attributes = dict[str, object]


def _html(
    part: Any, attributes: Attributes | None = None, escape: Callable[[str], str] = _escape
) -> str:
    """A part as HTML, its text by `escape`. A dict goes into `attributes` (None: no element)."""
    kind = type(part)
    if kind is str:
        return escape(part)
    if kind is list or kind is tuple or kind is types.GeneratorType:
        return "".join([v if type(v) is SafeString else _html(v, attributes, escape) for v in part])
    if part is None or part is True or part is False:
        return ""
    if hasattr(part, "__html__"):  # elements, template libraries' strings, `h.Br` without a call
        return cast(str, part.__html__())
    if isinstance(part, (str, int, float, Decimal)):
        return escape(_as_text(part))
    if isinstance(part, Mapping):
        if attributes is None:
            raise StarioError(
                f"a {type(part).__name__} is the attributes of an element, as in "
                'h.P({"id": "x"}, "text"): there is no element here to put them on '
                "(for JSON: w.json)"
            )
        attributes.update(_merged(attributes, part))
        return ""
    if isinstance(part, Iterable) and not isinstance(part, (bytes, bytearray, memoryview)):
        items = list(part)
        # A member of enum.Flag, or a UserString of one letter, yields itself: it would never end.
        if not (len(items) == 1 and type(items[0]) is kind and items[0] == part):
            return _html(items, attributes, escape)
    raise StarioError(
        f"{type(part).__name__} cannot stand in HTML: give text, a number, an element, "
        f"a dict of attributes, or an iterable of those{_hint(part)}"
    )


def _as_text(value: object) -> str:
    """A value as text. A member of an enum is written as its value."""
    if isinstance(value, str):
        return str.__str__(value)
    return _as_text(value.value) if isinstance(value, enum.Enum) else str(value)


def _hint(value: object) -> str:
    """For an error message: what the caller probably forgot."""
    if isinstance(value, Awaitable):
        return " (await it first)"
    return " (call it)" if inspect.isfunction(value) or inspect.ismethod(value) else ""


# -- Attributes

# The names of attributes that Datastar (part 12) acts on: `data-on:click`, `data-signals`.
_DATASTAR_NAME = re.compile(
    "data-((attr|bind|class|computed|effect|indicator|init|on|ref|show|signals|style|text)(:|__|$)"
    "|on-(intersect|interval|signal-patch)|preserve-attr)"
)


def _merged(first: Mapping[str, object], more: Mapping[str, object]) -> dict[str, object]:
    """Merge the attributes of two dicts: the later value of a name wins.

    StarioError for a Datastar attribute with two values, such as two click handlers: one of them
    would be lost, and nobody would notice.
    """
    merged = {**first, **more}
    if len(merged) < len(first) + len(more):  # a name is in both
        for name in first.keys() & more.keys():
            if first[name] != more[name] and _DATASTAR_NAME.match(name):
                raise StarioError(
                    f"{name!r} is there twice, but an element has one of each name: write both "
                    "into one, as in data.on('click', 'one(); two()') or data.signals({**a, **b})"
                )
    return merged


_BAD_NAME = re.compile(r"""[\s"'<>/=\x00-\x1f\x7f-\x9f]""")
_known_names: set[object] = set()  # names that have passed: at most 512, of up to 64 characters


def _check_name(name: object) -> None:
    """Refuse what cannot be the name of an attribute (HTML standard, 13.1.2.3)."""
    if not isinstance(name, str) or not name or _BAD_NAME.search(name):
        raise StarioError(
            f"{name!r} cannot be the name of an HTML attribute: a dict among the parts of an "
            "element is its attributes, by name"
        )
    if len(name) <= 64:
        if len(_known_names) >= 512:
            _known_names.clear()
        _known_names.add(name)


def _attributes(attributes: Mapping[str, object]) -> str:
    """Write a dict as ` name="value" bare`: True and None give a bare name, False gives nothing."""
    text = ""
    for name in attributes:  # (a fifth faster than items(), with Python 3.13)
        if name not in _known_names:
            _check_name(name)
        value = attributes[name]
        if type(value) is str:
            text += f' {name}="{_quote(value)}"'
        else:
            text += _other_attribute(name, value)
    return text


def _other_attribute(name: str, value: object) -> str:
    """An attribute whose value is not a plain str. `{"data": {"id": 1}}` gives ` data-id="1"`."""
    if value is True or value is None:
        return f" {name}"
    if value is False:
        return ""
    if type(value) is dict or isinstance(value, Mapping):
        if name == "style":
            style = ""
            for key in value:
                item = value[key]
                style += f"{key}:{item};" if type(item) is str else _declaration(key, item)
            return f' style="{_quote(style)}"'
        if name != "class":
            return _attributes({f"{name}-{key}": item for key, item in value.items()})
    # Only for `@baked` (part 25): skip it for now. `@baked` calls a view once with placeholders
    # (*blanks*); otherwise `_baking` is empty. If `value` is a blank, `_mark_for` returns a *mark*,
    # which later calls replace by `_other_attribute(name, argument)`. If not, it returns "".
    if _baking.get() and (mark := _mark_for(_other_attribute, name, value, is_html=True)):
        return mark
    return f' {name}="{_quote(_value_text(name, value))}"'


def _declaration(name: str, value: object) -> str:
    """A style declaration, such as `top:0;`, or nothing for None and False."""
    if value is None or value is False:
        return ""
    if _baking.get() and (mark := _mark_for(_declaration, name, value)):
        return mark
    return f"{name}:{_value_text(name, value)};"


def _value_text(name: str, value: object) -> str:
    """The value of an attribute as text, before it is escaped."""
    if hasattr(value, "__html__"):
        return str(value.__html__())
    if isinstance(value, (str, int, float, Decimal)):
        return _as_text(value)
    if isinstance(value, Mapping) and name == "class":
        value = [word for word, is_on in value.items() if is_on]
    if isinstance(value, (list, tuple)):
        words = [word for word in value if not (word is None or word is True or word is False)]
        return " ".join([_value_text(name, word) for word in words])
    raise StarioError(
        f"{type(value).__name__} cannot be the value of {name!r}: "
        f"give text, a number, or a list of those{_hint(value)}"
    )


# -- Factories. `h.P` is a function that makes an element from its arguments: dicts are attributes,
# all else is content. `h.P({"id": "x"}, "Hello, ", h.B("Ada"))` is the string
# `<p id="x">Hello, <b>Ada</b></p>`. Without a call, as in `h.Div(h.Br)`, it is the empty element.

Tag = Callable[..., SafeString]  # what `h.P` is: a factory


def _factory(name: str) -> Tag:
    """The factory for the elements of this name."""
    # Without a doctype a browser lays a page out as in the 1990s ("quirks mode").
    start = "<!doctype html><html" if name == "html" else f"<{name}"
    is_void = name in _VOID_TAGS.split()
    close, end = ("/>", "") if is_void else (">", f"</{name}>")
    bare = start + close
    escape = str if name in ("script", "style") else _escape  # (see `_check_raw`)
    rule = _refuse_content if is_void else _CONTENT_RULES.get(name)

    def _element(*parts: Any) -> SafeString:
        # A page calls this function for each element. So the most common types are handled here:
        # leaving them to `_html` would take a third longer.
        attributes: Attributes | None = None
        pieces: list[str] = [bare]
        for part in parts:
            kind = type(part)
            if kind is SafeString:
                pieces.append(part)
            elif kind is str:
                pieces.append(escape(part))
            elif kind is dict:
                attributes = _merged(attributes, part) if attributes else part
            elif kind is int:
                pieces.append(f"{part}")
            elif part is not None:
                attributes = dict(attributes or {})  # a copy: it may be the caller's own dict
                pieces.append(_html(part, attributes, escape))
        if rule is not None:
            pieces[1:] = [rule(name, "".join(pieces[1:]))]
        if attributes:
            pieces[0] = f"{start}{_attributes(attributes)}{close}"
        pieces.append(end)
        return SafeString("".join(pieces))

    return _element


def _refuse_content(name: str, content: str) -> str:
    """For a void element, such as `<br/>`, which has no end tag."""
    if content:
        raise StarioError(f"<{name}> is void: it cannot have content ({content!r})")
    return ""


def _check_raw(name: str, content: str) -> str:
    """For a script or style. Browsers do not decode its text: what would end it is refused."""
    if (bakes := _baking.get()) and (mark := bakes[0].marks.search(content)):  # (part 25)
        raise StarioError(f"{mark[0]} cannot stand in a <{name}>")
    if "<!--" in content or f"</{name}" in content.lower():
        raise StarioError(
            f"text in <{name}> cannot hold '</{name}' (its end) or '<!--' (which hides it): "
            "write '<' as \\u003c in a JavaScript string, as \\3c in CSS"
        )
    return content


def _keep_line_feed(name: str, content: str) -> str:
    """Browsers drop a line feed at the start of <pre> and <textarea>: add one for them to drop."""
    if _baking.get() and (mark := _mark_for(_keep_line_feed, name, content, is_html=True)):
        return mark
    return "\n" + content if content.startswith("\n") else content


_CONTENT_RULES = {
    "script": _check_raw, "style": _check_raw, "pre": _keep_line_feed, "textarea": _keep_line_feed,
}  # fmt: skip
_HTML_TAGS = """
a abbr address article aside audio b bdi bdo blockquote body button canvas caption cite code
colgroup data datalist dd del details dfn dialog div dl dt em fieldset figcaption figure footer form
h1 h2 h3 h4 h5 h6 head header hgroup html i iframe ins kbd label legend li main map mark math menu
meter nav noscript object ol optgroup option output p picture portal pre progress q rp rt ruby s
samp script search section select slot small span strong style sub summary sup svg table tbody td
template textarea tfoot th thead time title tr u ul var video
"""
_SVG_TAGS = """
animate animateMotion animateTransform circle clipPath defs desc ellipse feBlend feColorMatrix
feComponentTransfer feComposite feConvolveMatrix feDiffuseLighting feDisplacementMap feDistantLight
feDropShadow feFlood feFuncA feFuncB feFuncG feFuncR feGaussianBlur feImage feMerge feMergeNode
feMorphology feOffset fePointLight feSpecularLighting feSpotLight feTile feTurbulence filter
foreignObject g image line linearGradient marker mask metadata mpath path pattern polygon polyline
radialGradient rect set stop switch symbol text textPath tspan use view
"""
_VOID_TAGS = "area base br col embed hr img input link meta param source track wbr"
_TAG_NAMES = {name.lower(): name for name in (_HTML_TAGS + _SVG_TAGS + _VOID_TAGS).split()}


def _cap_words(name: str) -> str:
    return name[0].upper() + name[1:]


class Tags:
    """All elements of HTML and SVG by their names in CapWords: `h.Div`, `h.ForeignObject`."""

    def __getattr__(self, name: str) -> Tag:
        known = _TAG_NAMES.get(name.lower())
        if known is None:
            raise AttributeError(f"there is no <{name}>; for your own elements: h.tag('my-card')")
        if not name[0].isupper():
            raise AttributeError(f"names of elements begin with a capital: h.{_cap_words(known)}")
        tag = self.tag(known)
        setattr(self, name, tag)  # the next look-up finds it without coming here
        return tag

    def __dir__(self) -> Iterable[str]:
        return [*super().__dir__(), *map(_cap_words, _TAG_NAMES.values())]

    def tag(self, name: str) -> Tag:
        """A factory for any other element, such as a web component: `card = h.tag("my-card")`."""
        if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z][^\s/<>=\"'\x00]*", name)):
            raise StarioError(f"{name!r} cannot be the name of an HTML element")
        name = _TAG_NAMES.get(name.lower(), name)  # `<SCRIPT>` is a script to browsers
        factory = _factory(name)
        setattr(factory, "__html__", factory)  # noqa: B010 - `h.Div(h.Br)`: `_html` calls it
        factory.__name__ = name
        # For `h.Div(id="x")` Python raises a TypeError that begins with this name, so the name says
        # what to write. (A parameter `**wrong`, for a better message, makes each call 5% slower.)
        call = f"h.{_cap_words(name)}"
        factory.__qualname__ = f'attributes are a dict, {call}({{"id": "x"}}): {call}'
        factory.__doc__ = f"A <{name}> element with these parts: see part 3 of the file."
        return factory


h = Tags()


# ==================================================================================================
# 4. JSON
#
# Answers, signals (part 15) and events (part 13) carry JSON. A type that JSON lacks is written as
# the nearest one that it has: a dataclass as an object, a date as text, a set as an array. NaN and
# Infinity are not JSON: they are neither written nor read.
# ==================================================================================================


def _json_default(value: object) -> object:
    """Convert a value of a type that JSON lacks to the nearest one: the `default` of json.dumps."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if hasattr(value, "model_dump"):  # a Pydantic model
        return value.model_dump(mode="json")
    if isinstance(value, (date, time_of_day)):
        return value.isoformat()
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (UUID, Decimal, os.PathLike)):
        return str(value)
    if isinstance(value, (set, frozenset)):
        return list(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"there is a {type(value).__name__} in it")


def _json_writer(default: Callable[[Any], object], ascii_only: bool = True) -> Callable[[Any], str]:
    """Make a function like json.dumps. It writes no spaces, and refuses NaN and Infinity.

    json.dumps makes an encoder on each call, and takes 4 times as long for a dict of two items.
    Here the encoder is made once. It does not look for circular references: that needs a dict,
    which threads cannot share. So a value that contains itself ends in a RecursionError.
    """
    encoder = json.encoder
    escape = encoder.encode_basestring_ascii if ascii_only else encoder.encode_basestring
    # The arguments after `escape`: indent, two separators, sort_keys, skipkeys, allow_nan.
    encode = encoder.c_make_encoder(  # type: ignore[attr-defined]
        None, default, escape, None, ":", ",", False, False, False
    )
    return lambda value: "".join(encode(value, 0))  # (0: the level of indentation)


_encode_json = _json_writer(_json_default, ascii_only=False)
_encode_script = _json_writer(_json_default)  # in ASCII only, for JavaScript within HTML (part 12)


def _json(value: object, encode: Callable[[object], str] = _encode_json) -> str:
    """A value as JSON. StarioError if it cannot be written as JSON."""
    try:
        try:
            return encode(value)
        except TypeError:  # perhaps a key is a date: `default` is called only for values
            return encode(_with_plain_keys(value))
    except RecursionError as exc:
        raise StarioError("JSON cannot hold what holds itself, or is nested so deeply") from exc
    except (TypeError, ValueError) as exc:
        raise StarioError(f"this cannot be written as JSON: {exc}") from exc


def _with_plain_keys(value: object) -> object:  # `{date(2026, 1, 2): 3}`: a key as text
    if isinstance(value, Mapping):
        names = [name if isinstance(name, _JSON_TYPES) else _json_default(name) for name in value]
        items = map(_with_plain_keys, value.values())
        return dict(zip(names, items, strict=True))
    if isinstance(value, (list, tuple)):
        return [_with_plain_keys(item) for item in value]
    return value if isinstance(value, _JSON_TYPES) else _with_plain_keys(_json_default(value))


_JSON_TYPES = (str, int, float, types.NoneType)


def _finite(text: str) -> float:
    """Parse a JSON number; ValueError for NaN and Infinity (RFC 8259, section 6), or 1e999."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text!s:.20} is no finite number")
    return number


_json_decoder = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)


def _parse_json(text: str | bytes) -> Any:
    """Parse JSON in UTF-8 (RFC 8259); HttpException(400) if it is not JSON.

    JSON may escape an emoji as two halves (*surrogates*), `\\ud83d\\ude00`. One half alone is not
    text. So the value is written as UTF-8 and read again, which turns each lone half into a `?`.
    """
    try:
        plain = (text if isinstance(text, str) else text.decode()).strip("\ufeff \t\r\n")
        if len(plain) > _MANY_CONTAINERS and _is_dense(plain):
            raise ValueError("too many of its lists and objects are almost empty")
        value, end = _json_decoder.raw_decode(plain)  # for two items `decode` takes 3 times as long
        if end < len(plain):
            raise ValueError(f"{plain[end:][:20]!r} follows its end")
        if "\\u" in plain and _ESCAPED_SURROGATE.search(plain):
            value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
        return value
    except (ValueError, RecursionError) as exc:  # UnicodeDecodeError is a ValueError
        raise HttpException(400, f"this is not JSON: {exc}") from None


_MANY_CONTAINERS = 10_000


def _is_dense(text: str) -> bool:
    """Whether JSON is little more than `[],[],[]`, which takes 40 times its length in memory."""
    most = max(_MANY_CONTAINERS, len(text) // 5)
    if text.count("[") + text.count("{") <= most:
        return False
    rest = _JSON_STRING.sub("", text)  # a bracket within a string opens nothing
    return rest.count("[") + rest.count("{") > most


# (`*+` and `++` never backtrack, so the time of a match grows only linearly with the length.)
_JSON_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


# ==================================================================================================
# 5. The request: headers, query, cookies, body
#
# A request is made from what a carrier has read: method, target, header fields, and a body that may
# still be on its way. Everything else is computed when it is first needed. The rules: text is
# always decoded `str`, and malformed input ends in an HttpException, never in a guess.
# ==================================================================================================


_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # a field's name (RFC 9110, section 5.6.2)
_BAD_VALUE = re.compile(r"[^\t\x20-\x7e\x80-\xff]")  # no field value has these (section 5.5)
_SURROGATE = re.compile("[\ud800-\udfff]")  # half of an emoji (see `_parse_json`)


class _Missing(HttpException, KeyError):
    """The client has left out a value that the handler requires with `[name]`."""


class _Fields:
    """Values by name. A name may occur several times, as `tag` does in `?tag=a&tag=b`."""

    _fold: Callable[[str], str] = str  # how a name is stored: header fields use lower case

    def __init__(self, fields: dict[str, list[str]] | None = None) -> None:
        self._fields = fields if fields is not None else {}  # name -> its values, in order

    def _values(self, name: str) -> Sequence[str]:
        """All values of a name, in order. (The folded name is tried last: folding takes time.)"""
        return self._fields.get(name) or self._fields.get(self._fold(name)) or ()

    def items(self) -> list[tuple[str, str]]:
        """All fields as pairs of name and value; a name with two values is in two pairs."""
        return [(name, value) for name, values in self._fields.items() for value in values]

    def getlist(self, name: str) -> list[str]:
        """All values of a name, in order; an empty list if there are none."""
        return list(self._values(name))

    def keys(self) -> list[str]:
        """The names, each once."""
        return list(self._fields)

    @typing.overload  # (for type checkers only: what `get` returns for which arguments)
    def get(self, name: str) -> str | None: ...

    @typing.overload
    def get(self, name: str, default: T) -> str | T: ...

    @typing.overload
    def get(self, name: str, default: T, type: Callable[[str], T]) -> T: ...

    @typing.overload
    def get(self, name: str, *, type: Callable[[str], T]) -> T | None: ...

    def get(self, name: str, default: Any = None, type: Callable[[str], Any] | None = None) -> Any:
        """The first value of a name; `default` if there is none, or if `type` refuses it.

        `c.req.query.get("start", 0, type=int)`; a bool is true for "true", "on", "yes" and "1".
        A type refuses with a ValueError, LookupError, ArithmeticError or RecursionError.
        """
        values = self._values(name)
        if not values or type is None:
            return values[0] if values else default
        if type is bool:
            return values[0].lower() in ("true", "on", "yes", "1")
        try:
            return _finite(values[0]) if type is float else type(values[0])
        except (ValueError, LookupError, ArithmeticError, RecursionError):
            return default

    def __getitem__(self, name: str) -> str:
        """The first value of a name. If none: an HttpException(400) that is also a KeyError."""
        values = self.getlist(name)
        if not values:
            raise _Missing(400, f"{name!r} is missing")
        return values[0]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(self._values(name))

    def __len__(self) -> int:
        return sum(map(len, self._fields.values()))  # as many as items()

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.items()!r})"


class QueryParams(_Fields):
    """The parameters of a query or a form: decoded text. A key may occur several times."""

    def __init__(self, pairs: Iterable[tuple[str, str]] = ()) -> None:
        fields: dict[str, list[str]] = {}
        for key, value in pairs:
            fields.setdefault(key, []).append(value)
        super().__init__(fields)


class Headers(_Fields):
    """Header fields: names are case-insensitive, values are text (RFC 9110, section 5)."""

    _fold = staticmethod(str.lower)

    def _list(self, name: str) -> list[str]:
        """The items of a list field, `a, b`, from all its lines (RFC 9110, section 5.3)."""
        items = ",".join(self._values(name)).split(",")
        return [item for text in items if (item := text.strip(" \t"))]


class ResponseHeaders(Headers):
    """The header fields of an answer. Methods that change them can be chained.

    A name is `str` or `bytes`; a value may also be `int`. A character that a field cannot have
    (line break, control character, text outside Latin-1) raises StarioError, and so does a change
    after the headers have been sent.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent = False
        self.before_sending: Callable[[], None] | None = None  # sessions (part 23) add some

    def set(self, name: str | bytes, value: str | bytes | int) -> ResponseHeaders:
        """Make this the only value of the field."""
        key, text = _field(name, value)
        self._unsent[key] = [text]
        return self

    __setitem__ = set  # `w.headers["cache-control"] = "no-store"`

    def add(self, name: str | bytes, value: str | bytes | int) -> ResponseHeaders:
        """Add one more field of this name."""
        key, text = _field(name, value)
        self._unsent.setdefault(key, []).append(text)
        return self

    def setdefault(self, name: str | bytes, value: str | bytes | int) -> ResponseHeaders:
        """Set the field unless it is already there."""
        key, text = _field(name, value)
        self._unsent.setdefault(key, [text])
        return self

    def update(self, fields: Mapping[str, str | bytes | int]) -> ResponseHeaders:
        """Set several fields."""
        for name, value in dict(fields).items():
            self.set(name, value)
        return self

    def remove(self, name: str | bytes) -> ResponseHeaders:
        """Remove all fields of this name, if there are any."""
        self._unsent.pop(_text(name).lower(), None)
        return self

    def clear(self) -> ResponseHeaders:
        """Remove all fields."""
        self._unsent.clear()
        return self

    @property
    def _unsent(self) -> dict[str, list[str]]:
        """The fields, while they may change. StarioError once they have been sent."""
        if self.sent:
            raise StarioError("the headers have been sent: set them before the first write")
        return self._fields


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value


def _field(name: str | bytes, value: str | bytes | int) -> tuple[str, str]:
    """Check a header field; return its name in lower case, and its value as text."""
    if not isinstance(value, (str, bytes, int)):
        raise StarioError(f"the value of {name!r} is text, not {type(value).__name__}")
    key = _text(name).lower()
    text = str(value) if isinstance(value, int) else _text(value).strip(" \t")
    if not text.isascii():  # half an emoji is replaced, as in all text
        text = _SURROGATE.sub("?", text)
    if not _TOKEN.fullmatch(key):
        raise StarioError(f"{name!r} cannot be the name of a header field")
    if _BAD_VALUE.search(text):
        raise StarioError(
            f"the value of {key!r} has a character that cannot stand in a header: {text[:60]!r} "
            "(percent-encode what is not Latin-1)"
        )
    return key, text


_MAX_FORM_FIELDS = 1000


def _parse_pairs(text: str) -> list[tuple[str, str]]:
    """`a=1&b=x+y` as `[("a", "1"), ("b", "x y")]`."""
    if text.count("&") >= _MAX_FORM_FIELDS:
        raise HttpException(400, f"more than {_MAX_FORM_FIELDS} parameters")
    pairs = [pair.partition("=") for pair in text.replace("+", " ").split("&") if pair]
    return [(_unquote(name), _unquote(value)) for name, _, value in pairs]


_ESCAPE = re.compile("%([0-9A-Fa-f]{2})")


def _unescaped(text: str) -> bytes:
    """`a%20b` as `b"a b"` (RFC 3986, section 2.1). A percent sign that escapes nothing stays.

    (The pieces are Latin-1 text, a character per byte: joining text takes less memory than bytes.)
    """
    pieces = _ESCAPE.split(text.encode("utf-8", "replace").decode("latin-1"))  # a, 20, b
    pieces[1::2] = bytes.fromhex("".join(pieces[1::2])).decode("latin-1")  # 20 -> " ", and so on
    return "".join(pieces).encode("latin-1")


def _unquote(text: str) -> str:
    """Percent-decode; bytes that are not UTF-8 are replaced."""
    return _unescaped(text).decode("utf-8", "replace") if "%" in text else text


_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_SLASH = "\udcff"  # stands for `%2F` until a path is split: the byte FF, never part of UTF-8


def _decode_path(raw: str) -> str:
    """Percent-decode a path. An escaped slash belongs to its segment: it becomes `_SLASH`.

    HttpException(400) for a path that can be read in two ways (RFC 3986, sections 2.1 and 2.2).
    """
    if _BAD_ESCAPE.search(raw):
        raise HttpException(400, "the path has a percent sign that escapes nothing")
    marked, slashes = re.subn("%2[Ff]", "%FF", raw)  # which decodes to `_SLASH`
    # "surrogateescape" turns each byte that is not UTF-8 into a surrogate: only ours may be there.
    path = _unescaped(marked).decode("utf-8", "surrogateescape")
    if len(_SURROGATE.findall(path)) != slashes:
        raise HttpException(400, "the path is not UTF-8")
    return path


# -- asyncio in short. A body arrives in pieces, so its reader has to wait. Calling an `async def`
# function runs nothing: it makes a *coroutine*. That runs when it is awaited, or when it is made
# into a *task*, which runs beside the others. The *event loop* runs one task at a time, until that
# task reaches an `await` that has to wait; then it runs another task that is ready.
#
#     async def visitor(name):
#         await asyncio.sleep(1)   # others run meanwhile
#         print(name)
#
#     async def main():            # both names are printed after one second
#         await asyncio.gather(visitor("Ada"), visitor("Grace"))
#     asyncio.run(main())          # makes an event loop, and runs it until main() is done
#
# `async for` awaits each item of its iterator, `async with` the beginning and the end of its block.
# A *future* is a result to come: `await future` waits for it, `future.set_result()` ends the wait.
# *Cancelling* a task raises CancelledError where it waits, and adds one to `task.cancelling()`.
# Other tasks run only at such waits, so no locks are needed. A *context variable* is like a global,
# but each task has a value of its own, which at first is that of the task that made it.


class RequestLine:
    """The first line of a request, split into its parts (RFC 9112, section 3).

    Raises HttpException(400) for a path that cannot be decoded.
    """

    def __init__(self, method: str, target: str, http_1_0: bool = False) -> None:
        self.method = method
        self.target = target
        self.http_1_0 = http_1_0
        self.raw_path, _, self.query_string = target.partition("?")
        self.path = self.split_path = self.raw_path
        if "%" in self.raw_path:
            self.split_path = _decode_path(self.raw_path)  # for the router, with `_SLASH` for `%2F`
            self.path = self.split_path.replace(_SLASH, "/")
        # The usual case: a path, no fragment, HTTP/1.1. All else goes to `_normalised` (part 9).
        self.is_plain = target.startswith("/") and "#" not in target and not http_1_0


class Request:
    """What a client asks for: `c.req`.

    The router (part 7) sets four: `route` is the route as written (`/users/{id}`), `params` are the
    path's parameters, `tail` is what `*` matched in `/files/*`, `subhost` what it matched in the
    host `*.example.com`. `max_body` (bytes) can be raised for one request before its body is read.
    `root_path` is the path at which another app has mounted this one ("/live"), or empty.
    """

    root_path = ""

    def __init__(
        self, line: RequestLine, headers: Headers, body: Body | bytes, carrier: Carrier
    ) -> None:
        """From what a carrier has read; `body` is a Body (part 9) if more of it is to come."""
        self.method = line.method
        self.raw_path = line.raw_path
        self.path = line.path
        self._split_path = line.split_path
        self.query_string = line.query_string
        self.headers = headers
        self.route = ""
        self.tail = ""
        self.subhost = ""
        self.max_body = 0  # `dispatch` (part 8) sets it
        self._body = body  # what is left to read: the bytes, or a Body that waits for them
        self._begun = False  # `_body` is being read, or was: a second reader is refused
        self._received = 0  # bytes taken from `_body` so far
        self._whole: bytes | None = None  # all of it, once `body()` has it: can be read again
        self._carrier = carrier
        self._query: QueryParams | None = None

    @cached_property
    def params(self) -> dict[str, Any]:
        """The parameters of the path: `{"id": 7}` for `/users/{id:int}`."""
        return {}  # the router replaces this if the route has parameters

    @property
    def query(self) -> QueryParams:
        """The parameters of the query string. HttpException(400) for more than 1,000."""
        if self._query is None:
            self._query = QueryParams(_parse_pairs(self.query_string))
        return self._query

    @cached_property
    def cookies(self) -> dict[str, str]:
        """The cookies by name (RFC 6265, section 4.2), percent-decoded; of two, the first counts.

        Those after the first 1,000 are left out: no browser keeps that many for one host.
        Only spaces and tabs around a name are dropped. `str.strip()` would drop more, and mistake
        `\\xa0__Host-id`, which any subdomain may set, for `__Host-id`, which only this host may.
        """
        cookies: dict[str, str] = {}
        for pair in ";".join(self.headers.getlist("cookie")).split(";", 1000)[:1000]:
            name, equals, value = pair.partition("=")
            if equals:
                value = value.strip(" \t")
                if len(value) > 1 and value[0] == value[-1] == '"':
                    value = value[1:-1]
                cookies.setdefault(name.strip(" \t"), _unquote(value))
        return cookies

    @cached_property
    def _hop(self) -> _Hop:
        """Client's address, scheme and host: as proxies report them, if any (see `client`)."""
        carrier = self._carrier
        last = _Hop(carrier.client, carrier.scheme, self.headers.get("host") or "")
        return last if carrier.proxies is None else carrier.proxies.first_hop(self.headers, last)

    @property
    def client(self) -> str:
        """The client's address ("127.0.0.1"); empty if it has none (a Unix socket).

        A proxy is a server that passes requests on. If one of `serve(trusted_proxies=…)` has sent
        this request, then `client`, `scheme`, `host` and `url` are those of the proxy's own client,
        as the proxy reports them. HttpException(400) if its report can be read in two ways.
        """
        carrier = self._carrier
        return carrier.client if carrier.proxies is None else self._hop.client

    @property
    def scheme(self) -> str:
        """How the client talks to us: "https" or "http"."""
        return self._hop.scheme

    @property
    def host(self) -> str:
        """The requested host: lower case, without port and final dot; IPv6 in brackets."""
        return _split_host(self._hop.host)[0]

    @property
    def url(self) -> str:
        """The whole address that was requested, as the client sees it."""
        query = f"?{self.query_string}" if self.query_string else ""
        return f"{self.scheme}://{self._hop.host}{self.root_path}{self.raw_path}{query}"

    @property
    def is_datastar(self) -> bool:
        """Whether Datastar (part 12) sent this request, from a page that is already open."""
        return self.headers.get("datastar-request") == "true"

    _form: Form | None = None  # once it has been read (part 16)
    _form_reader: _MultipartReader | None = None  # left by a cancelled `form()`, for the next

    async def stream(self) -> AsyncIterator[bytes]:
        """The body in chunks as they arrive. A client that sends them too fast has to wait.

        Raises HttpException: 413 beyond `max_body` bytes, 408 if the client stalls, 400 if what it
        sends is malformed; ClientDisconnected if it goes; StarioError after another `stream()`.
        """
        self._begin()
        try:
            while chunk := await self._read():
                yield chunk
        finally:
            if isinstance(self._body, Body):
                self._body.discard()  # the loop was left: nobody reads the rest

    def _begin(self) -> None:
        """Begin to read: from `_whole`, if `body()` has kept it; else from `_body`, only once."""
        if self._whole is not None:
            self._body = self._whole
        elif self._begun:
            raise StarioError(
                "the body comes only once: it was streamed, or another task reads it, or it failed"
            )
        self._begun, self._received = True, 0

    async def _read(self) -> bytes:
        """The next bytes of the body; b"" at its end. HttpException(413) beyond `max_body`."""
        if isinstance(self._body, bytes):
            chunk, self._body = self._body, b""
        else:
            self._check_size(int(self.headers.get("content-length") or 0))  # as announced
            chunk = await self._body.read()
        self._received += len(chunk)
        self._check_size(self._received)
        return chunk

    def _check_size(self, size: int) -> None:
        if size > self.max_body:
            if isinstance(self._body, Body):
                self._body.discard()
            raise HttpException(413, f"the body is larger than {self.max_body} bytes")

    async def body(self) -> bytes:
        """The whole body; a second call returns it again. Raises what `stream()` raises.

        If a timeout, say, cancels `body`, `json`, `form` or `c.signals`, a new call loses nothing.
        """
        if isinstance(self._body, bytes) and not self._begun:  # the usual case: all of it is here
            self._check_size(len(self._body))
            self._whole = self._body
        if self._whole is None:
            self._begin()
            chunks = []
            try:
                while chunk := await self._read():
                    chunks.append(chunk)
            except asyncio.CancelledError:  # the next reader gets these bytes again
                cast(Body, self._body).put_back(b"".join(chunks))
                self._begun = False
                raise
            self._whole = b"".join(chunks)
        return self._whole

    async def json(self) -> Any:
        """The body parsed as JSON. Raises HttpException(400) if it is not JSON."""
        return _parse_json(await self.body())

    async def form(self) -> Form:
        """The body as a form, urlencoded or multipart; a second call returns it again.

        HttpException: 400 if malformed, 415 if it is not a form, and what `stream()` raises.
        """
        if self._form is None:
            self._form = await _read_form(self)
        return self._form


# A name or an IPv6 address, and a port (RFC 3986, section 3.2).
_HOST = re.compile(
    r"(?:\[[0-9A-Fa-f:.]++\]|(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*+)(?::[0-9]*+)?"
)


def _split_host(host: str) -> tuple[str, str]:
    """Host and port of a Host field. `example.com.` is the same host, in its absolute form."""
    # The colon before the port comes after the brackets of an IPv6 address: `[::1]:8000`.
    end = host.rfind(":", host.find("]") + 1)
    name, port = (host[:end], host[end + 1 :]) if end >= 0 else (host, "")
    return name.lower().removesuffix("."), port


# ==================================================================================================
# 6. The answer: status, fields, body
#
# A handler answers through a Writer: in one shot, with one call (`html`, `json`, `redirect`), or
# with a stream of events (part 13). It may go on working after either. The Writer knows the rules
# of HTTP (status, fields, which answers have a body); a `Carrier` sends the bytes.
# ==================================================================================================


_FILE_PIECE = 256 * 1024  # bytes of a file that are read at a time


class Carrier:
    """Carries the bytes of one answer to its client. `fields` are lines, `name: value\\r\\n`.

    A carrier must have `scopes` and the five methods that raise NotImplementedError here; it may
    replace the others. (For answers in one shot it needs only `scopes`, and its own `answer`.)
    Only the two `async` methods wait: what cannot be sent yet is kept in a buffer. Once the client
    has gone, bytes are dropped without an error.
    """

    # A scope is a stretch of a handler that ends when the client goes or the server stops (13).
    scopes: list[_Scope]
    disconnected = False  # the client has gone, or has closed its sending side: streams end
    client = ""  # the address of the other end, or empty if it has none
    scheme = "http"  # or "https": how the other end talks to us
    proxies: TrustedProxies | None = None  # the proxies whose reports are believed (part 17)

    @property
    def shutting_down(self) -> bool:
        """Whether the server wants its streams to end."""
        return False

    def begin(self, status: int, fields: bytes, unsized: bool) -> None:
        """Send the head of an answer. `unsized`: a body of unknown length follows."""
        raise NotImplementedError

    def send(self, data: bytes) -> None:
        """Send more of the body."""
        raise NotImplementedError

    def finish(self) -> None:
        """End the answer: it is complete."""
        raise NotImplementedError

    def abort(self) -> None:
        """The answer cannot be completed: let the client see that it is cut off."""
        raise NotImplementedError

    async def drained(self) -> None:
        """Wait until the buffer has room, because the client has taken enough of what was sent.

        Raises ClientDisconnected if it goes.
        """
        raise NotImplementedError

    def answer(self, status: int, fields: bytes, body: bytes) -> None:
        """Send a whole answer. Its fields say how long the body is, if there is one."""
        self.begin(status, fields, unsized=False)
        self.send(body)
        self.finish()

    async def send_file(self, file: IO[bytes], offset: int, count: int) -> None:
        """Send more of the body, from a file. Raises ClientDisconnected if the client goes."""
        file.seek(offset)
        while count:
            await self.drained()
            await asyncio.sleep(0)  # a fast client must not keep the loop from the others
            data = file.read(min(count, _FILE_PIECE))
            if not data:
                raise StarioError(f"{file.name} has become shorter while it was sent")
            self.send(data)
            count -= len(data)

    def check_peer(self, seconds: float) -> None:
        """Abort if the client has acknowledged no bytes for `seconds`. (Some carriers cannot.)"""

    def _end_scopes(self) -> None:
        for scope in self.scopes:
            scope.end()


# Content types that compression (part 18) makes smaller: most images and videos are compressed
# already. (Compiled on first use. An app that answers only with HTML never uses it.)
_COMPRESSIBLE = (
    r"(?i)text/|application/(json|[\w.-]+\+(json|xml|yaml)\b|(x-)?(javascript|ndjson|yaml|toml|sh|tar)"
    r"|json-seq|jsonl(ines)?|xml|xml-dtd|wasm|graphql|sql|rtf|postscript|x-www-form-urlencoded"
    r"|vnd\.ms-fontobject|x-font-(ttf|otf)|geo\+json)"
    r"|image/(svg\+xml|bmp|x-ms-bmp|vnd\.microsoft\.icon|x-icon)|font/(ttf|otf|collection|sfnt)"
    r"|model/(gltf\+json|obj|stl)|message/|audio/(wav|x-wav|midi)"
)


_WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def _http_date(timestamp: float) -> str:
    """Seconds since 1970 as `Sun, 06 Nov 1994 08:49:37 GMT` (RFC 9110, section 5.6.7)."""
    t = time.gmtime(timestamp)
    day, month = _WEEKDAYS[t.tm_wday], _MONTHS[t.tm_mon - 1]
    clock = f"{t.tm_hour:02}:{t.tm_min:02}:{t.tm_sec:02}"
    return f"{day}, {t.tm_mday:02} {month} {t.tm_year:04} {clock} GMT"


Content = tuple[bytes, bool]  # header fields, and whether what they describe may be compressed


@lru_cache(maxsize=512)
def _content(content_type: str) -> Content:
    """`image/png` as `(b"content-type: image/png\\r\\n", False)`."""
    _, text = _field("content-type", content_type)
    can_be_smaller = re.match(_COMPRESSIBLE, content_type) is not None
    return f"content-type: {text}\r\n".encode("latin-1"), can_be_smaller


@lru_cache(maxsize=1024)  # (formatting the line takes 3 times as long as finding it here)
def _length_line(length: int) -> bytes:
    return b"content-length: %d\r\n" % length


_HTML_CONTENT: Content = b"content-type: text/html; charset=utf-8\r\n", True
_TEXT_CONTENT: Content = b"content-type: text/plain; charset=utf-8\r\n", True
_JSON_CONTENT: Content = b"content-type: application/json\r\n", True


# Fields that say how the answer is transferred. Only the Writer and its carrier know that, so the
# ones that a handler sets are left out.
_CARRIER_FIELDS = (
    "content-length", "transfer-encoding", "connection", "keep-alive", "upgrade", "trailer", "date",
)  # fmt: skip
_BODILESS = frozenset((204, 304))
# Fields that describe one answer. If an error's answer takes its place, they are removed.
_DESCRIBING_FIELDS = (
    "content-type", "content-length", "content-encoding", "content-disposition", "content-language",
    "content-location", "content-range", "content-digest", "repr-digest", "etag", "last-modified",
    "accept-ranges", "age", "cache-control", "cdn-cache-control", "expires", "pragma", "location",
    "refresh", "link", "surrogate-control", "x-accel-redirect", "x-accel-expires", "x-sendfile",
    "datastar-selector", "datastar-mode", "content-md5", "digest",
)  # fmt: skip
_KEPT_TEXT = 256  # longest text, in characters, that is cached: this keeps the caches small
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_REDIRECT_SAFE = "!#$%&'()*+,-./:;=?@[]_~"  # characters that are not percent-encoded in an address


def _bytes(data: bytes) -> bytes:
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise StarioError(f"bytes are needed, not {type(data).__name__}: encode it, or w.text()")
    return bytes(data)  # a buffer that can still change is copied


def _check_target(url: object, status: int = 303) -> None:
    if not (url and isinstance(url, str)):
        raise StarioError(f"the address to go to is text, not {url!r}")
    if status not in _REDIRECTS:
        raise StarioError(f"{status} is no redirect: 301, 302, 303, 307 or 308")
    if _CONTROL.search(url):
        raise StarioError(f"{url[:60]!r} is no address to go to: it holds control characters")


class _RawWriter:
    """An answer in HTTP's own terms: a status, header fields, and a body in pieces.

    `started`: the head has been sent. `completed`: the answer has ended. Each subclass adds a layer
    to the one before: answers in one shot, then events (part 13), then, in Writer, `alive`.
    """

    _rest: _Rest | None = None  # of a large file, still to be sent (19): `write` is then refused

    def __init__(
        self, carrier: Carrier, request: Request, compression: CompressionConfig | None
    ) -> None:
        self._status = 0
        self.started = False
        self.completed = False
        self._carrier = carrier
        self._request = request
        self._compression = compression
        self._headers: ResponseHeaders | None = None
        self._compressor: Compressor | None = None  # [0] compresses, [1] ends (part 18)
        self._remaining: int | None = None  # bytes still due, if a Content-Length was given
        self._is_stream = False  # this is a stream of events (part 13)
        self._writes = 0  # pieces of the body so far: if no more come, a heartbeat (13) is sent

    @property
    def headers(self) -> ResponseHeaders:
        """The header fields of the answer, to be set before it starts."""
        if self._headers is None:
            self._headers = ResponseHeaders()
            self._headers.sent = self.started
        return self._headers

    @property
    def status_code(self) -> int:
        """The status that was sent; 0 before."""
        return self._status

    @status_code.setter
    def status_code(self, status: int) -> None:
        raise StarioError(f"the status is given with the answer: w.html(page, status={status})")

    @property
    def disconnected(self) -> bool:
        """Whether the client has gone, or has closed its side of the connection."""
        return self._carrier.disconnected

    @property
    def shutting_down(self) -> bool:
        """Whether the server is stopping and wants streams to end."""
        return self._carrier.shutting_down

    def write_headers(self, status: int) -> Self:
        """Send the status and `headers`; `write` and `end` send the body."""
        lengths = self.headers.getlist("content-length")
        if lengths and (len(lengths) > 1 or not re.fullmatch("[0-9]{1,18}", lengths[0])):
            raise StarioError(f"{', '.join(lengths)!r} cannot be a Content-Length")
        self._begin(status, b"", int(lengths[0]) if lengths else None)
        return self

    def write(self, data: bytes) -> Self:
        """Send some of the body. After a disconnect the bytes are dropped without an error."""
        data = _bytes(data)
        if not self.started:
            self.write_headers(200)
        if self.completed or self._rest is not None:
            raise StarioError("the answer is complete: nothing can be written after it")
        if self._compressor and data:
            data = self._compressor[0](data)
        self._send(data)
        return self

    def end(self, data: bytes | None = None) -> None:
        """Complete the answer, with some last bytes if given. A second `end()` does nothing."""
        if data is not None:
            data = _bytes(data)
            if not self.started and "content-length" not in self.headers:
                self.headers.set("content-length", len(data))
            self.write(data)
        elif not self.started:
            self.write_headers(200)
        if self.completed or self._rest is not None:
            return
        if self._compressor:
            self._send(self._compressor[1]())
            self._compressor = None
        self.completed = True
        if not self._remaining:
            self._carrier.finish()
            return
        has_gone = self._carrier.disconnected  # then the handler need not send all
        self._carrier.abort()
        if not has_gone:
            raise StarioError(f"the answer is {self._remaining} bytes short of its Content-Length")

    async def send_file(self, file: IO[bytes], offset: int, count: int) -> None:
        """Write `count` bytes of an open binary file, without reading it into memory.

        `content-length` must have been declared. Raises ClientDisconnected if the client goes.
        """
        if self._request.method == "HEAD" or self._status in _BODILESS:
            return
        if count > (self._remaining or 0):
            raise StarioError(f"{count} bytes do not fit into a Content-Length: declare it first")
        await self._carrier.send_file(file, offset, count)
        self._remaining = (self._remaining or 0) - count

    async def drain(self) -> None:
        """Wait until the client has taken most of what was sent. ClientDisconnected if it goes."""
        await self._carrier.drained()

    # -- Internals. `_answer` sends a whole answer; `_begin` a head, and `_send` each later piece.

    def _start(self, status: int) -> None:
        if self.started:
            raise StarioError("this request has been answered already: a Writer answers once")
        _check_status(status)
        if self._headers is not None:
            if last_chance := self._headers.before_sending:
                self._headers.before_sending = None  # if it fails, the error's answer skips it
                last_chance()
            self._headers.sent = True
        self.started = True
        self._status = status

    def _answer(self, status: int, content: Content, body: bytes) -> None:
        """Send a whole answer. A field that the handler has set replaces the one in `content`."""
        self._start(status)
        fields, compressible = content
        if self._headers is not None:
            fields = self._own_fields(fields)
        if status in (204, 205, 304):  # a 205 says that it has no body (RFC 9110, section 15.3.6)
            body = b""
        config = self._compression
        if compressible and config is not None and len(body) >= config.min_size:
            fields, body = _compress(config, self._request.headers, fields, body)
        if status not in _BODILESS:
            fields += _length_line(len(body))
        if self._request.method == "HEAD":
            body = b""
        self._carrier.answer(status, fields, body)
        self.completed = True

    def _begin(self, status: int, fields: bytes, length: int | None) -> None:
        """Send the head. A body of `length` bytes follows; None: its length is not known yet."""
        self._start(status)
        fields = self._own_fields(fields)
        length = 0 if status == 205 else length
        has_body = status not in _BODILESS and self._request.method != "HEAD"
        compressor = None
        if length is not None:
            if status != 204:  # a 204 has no Content-Length (RFC 9110, section 8.6)
                fields += _length_line(length)
        elif self._compression is not None:
            headers = self._request.headers
            fields, compressor = _compress_stream(self._compression, headers, fields)
        if has_body:
            self._remaining, self._compressor = length, compressor
        self._carrier.begin(status, fields, unsized=length is None and has_body)

    def _own_fields(self, fields: bytes) -> bytes:
        """The handler's own header fields, and those of `fields` that the handler has not set."""
        headers = self._headers
        if headers is None:
            return fields
        own = [f"{name}: {v}" for name, v in headers.items() if name not in _CARRIER_FIELDS]
        defaults = [
            line
            for line in fields.decode("latin-1").split("\r\n")
            if line and line.partition(":")[0] not in headers
        ]
        return "\r\n".join([*defaults, *own, ""]).encode("latin-1")

    def _send(self, data: bytes) -> None:
        """Send a piece of the body; never more than its Content-Length. For HEAD, drop it."""
        self._writes += 1
        if self._request.method == "HEAD" or not data:
            return
        if self._remaining is not None:
            if len(data) > self._remaining:
                excess = len(data) - self._remaining
                self._break_off()
                raise StarioError(f"the answer is {excess} bytes longer than its Content-Length")
            self._remaining -= len(data)
        if self._status in _BODILESS:
            raise StarioError(f"an answer with status {self._status} has no body")
        self._carrier.send(data)

    def _break_off(self) -> None:
        """Let the client see that the answer is not complete."""
        self.completed, self._rest = True, None  # (nothing refers to its file now: it is closed)
        self._carrier.abort()

    def _forget_answer(self) -> None:
        """Remove the fields that describe an answer that failed before it began. Cookies stay."""
        if self._headers is not None and not self.started:
            for name in _DESCRIBING_FIELDS:
                self._headers.remove(name)


class _OneShotWriter(_RawWriter):
    """Answers in one shot, and the cookies that go with any answer."""

    def respond(self, body: bytes, content_type: str, status: int = 200) -> None:
        """Answer with these bytes. A second answer raises StarioError."""
        _check_order('w.respond(b"...", "image/png")', content_type, status)  # not swapped (30)
        # (`__wrapped__` is the function without its cache.)
        content = _content if len(content_type) <= _KEPT_TEXT else _content.__wrapped__
        self._answer(status, content(content_type), _bytes(body))

    def html(self, node: object, status: int = 200) -> None:
        """Answer with a page: an element, or anything that an element can contain."""
        text = node if type(node) is SafeString else render(node)
        self._answer(status, _HTML_CONTENT, text.encode("utf-8", "replace"))

    def text(self, text: str, status: int = 200) -> None:
        """Answer with plain text."""
        if not isinstance(text, str):
            raise StarioError(f"w.text takes a str, not {type(text).__name__}")
        self._answer(status, _TEXT_CONTENT, text.encode("utf-8", "replace"))

    def json(self, obj: object, status: int = 200) -> None:
        """Answer with JSON. Dataclasses, dates, enums, UUIDs and Pydantic models work, too."""
        self._answer(status, _JSON_CONTENT, _json(obj).encode("utf-8", "replace"))

    def empty(self, status: int = 204) -> None:
        """Answer without a body: "done", and nothing to show."""
        self._answer(status, (b"", False), b"")

    def file(
        self,
        source: str | os.PathLike[str] | bytes,
        *,
        filename: str | None = None,
        status: int = 200,
    ) -> Awaitable[None]:
        """Answer with a file, or with bytes as if from a file. Sets its type and `etag`.

        The client may ask for a part of it (RFC 9110, section 14). With `filename` it saves the
        file under that name, whose extension gives the type. A path without a file gives a 404. A
        large file is sent after the handler has ended, or by `await w.file(...)`.
        """
        _answer_download(self, source, filename, status)  # part 19
        return self._rest or _Rest()  # if all is sent: an empty one, whose await ends at once

    def _redirect(self, url: str, status: int) -> None:
        """Redirect as HTTP does, by status and `location`. (`redirect`, part 13, calls it.)"""
        _check_target(url, status)
        # A backslash is a slash to browsers: "/\evil.com" would leave the site.
        location = quote(url.replace("\\", "%5C"), safe=_REDIRECT_SAFE, errors="replace")
        self._answer(status, (f"location: {location}\r\n".encode("ascii"), False), b"")

    def cookie(self, name: str, value: str, **options: Unpack[CookieOptions]) -> None:
        """Set a cookie (RFC 6265, section 4.1). `max_age` is in seconds, `samesite` by default lax.

        Characters that a value cannot have are percent-encoded; `c.req.cookies` decodes them. A
        cookie that a browser would not accept raises StarioError.
        """
        for option in options:
            _check_word("option of a cookie", option, CookieOptions.__annotations__)  # part 30
        self.headers.add("set-cookie", _cookie_line(name, value, **options))

    def delete_cookie(self, name: str, **options: Unpack[CookieOptions]) -> None:
        """Ask the client to forget a cookie. Pass its own options, or it will not match."""
        options["max_age"], options["expires"] = 0, datetime.fromtimestamp(0, timezone.utc)
        self.cookie(name, "", **options)


# ==================================================================================================
# 7. Context and routing
#
# A handler is `async def handler(c, w)`. A middleware is a function from a handler to a handler:
#
#     def logged(handler):
#         async def inner(c, w):
#             print(c.req.path)
#             await handler(c, w)
#         return inner
#
# A router keeps its routes in a tree of path segments, the text between two slashes. If several
# routes match a path, the order in which they were added does not matter: `/users/me` wins over
# `/users/{id:int}`, which wins over `/users/{name}`, which wins over the catch-all `/users/*`. Only
# routes with the request's method count; if only others match, the answer is 405. An escaped `/`
# stays inside its segment. Checks of arguments, middleware and the choice by host are in part 30.
# ==================================================================================================


class Context:
    """Everything about one request: `c`. `app` is the Stario that serves it, `req` the request.

    A request is recorded in a *span* (part 20): a name, a beginning, an end, attributes, events.
    `c["user"] = 7` sets an attribute, `c("mail sent", {"to": 7})` records an event. Spans go to the
    app's *tracer*. An app without one is *silent*: it makes no spans, and logs only faults.
    """

    def __init__(self, app: Stario, req: Request) -> None:
        self.app = app
        self.req = req
        self._span: Span | None = None

    @cached_property
    def state(self) -> dict[str, Any]:
        """Where middleware leaves things for handlers."""
        return {}

    @property
    def session(self) -> dict[str, Any]:
        """What the browser keeps for you in a signed cookie: see `Session` (part 23)."""
        if "session" not in self.state:
            raise StarioError("there is no c.session: add app.use(Session(key)) before the routes")
        return cast("dict[str, Any]", self.state["session"])

    @property
    def span(self) -> Span:
        """The request's span; its parent may be the caller's (20). Silent apps make one on use."""
        if self._span is None:
            req = self.req
            attributes = {"http.request.method": req.method, "url.path": req.path}
            if self.app._silent:
                attributes |= self._untraced
            try:
                client = req.client
            except HttpException:  # proxies contradict each other
                client = ""
            if client:
                attributes["client.address"] = client
            if req.route:
                attributes["http.route"] = req.route
            name = f"{req.method} {req.route}".rstrip()
            self._span = Span(self.app.tracer, name, attributes, _caller_of(req.headers))
        return self._span

    def __call__(
        self, event: str | BaseException, attributes: Mapping[str, Any] | None = None
    ) -> None:
        """Record an event or exception in the span of the current step, else the request's."""
        if not self.app._silent:
            self._current()(event, attributes)

    def __setitem__(self, key: str, value: Any) -> None:
        self._store()[key] = value

    def __getitem__(self, key: str) -> Any:
        return self._store()[key]

    def _store(self) -> Span | dict[str, Any]:
        """Where attributes are kept: in the current span; in a dict while there is none."""
        is_traced = self._span is not None or not self.app._silent
        return self._current() if is_traced else self._untraced

    @cached_property
    def _untraced(self) -> dict[str, Any]:
        """The attributes, while a silent app has no span."""
        return {}

    @contextmanager
    def step(self, name: str, attributes: Mapping[str, Any] | None = None) -> Iterator[Span]:
        """Record a part of the work in a child span. Tasks started inside belong to it."""
        if self.app._silent:
            yield _UNSEEN_SPAN  # a span that ignores all it is told (part 20)
            return
        before = _current_step.get()
        with self._current().step(name, attributes) as span:
            _current_step.set((self, span))
            try:
                yield span
            finally:
                _current_step.set(before)

    def _current(self) -> Span:
        """The span of this request's step that the task is in, else the request's own span."""
        owner, span = _current_step.get()  # (20) a task has it from the request that made the task
        return span if owner is self and span is not None else self.span

    @typing.overload
    async def signals(self) -> dict[str, Any]: ...

    @typing.overload
    async def signals(self, schema: type[T]) -> T: ...

    async def signals(self, schema: type[Any] | None = None) -> Any:
        """The signals that Datastar sent: checked against `schema`, or as a dict.

        Signals are the values that a page keeps (part 15). GET and DELETE carry them in the query,
        others in a JSON body. SignalsError: 422 with all that does not fit, 400 if it is not JSON.
        https://data-star.dev/reference/actions
        """
        found = await _sent_signals(self.req)
        if schema is None:
            return found
        if len(self.req._whole or b"") > 25_000:  # 10 ms and more: so in a thread
            return await asyncio.to_thread(read_signals, schema, found)
        return read_signals(schema, found)


Handler = Callable[[Context, "Writer"], Awaitable[None]]  # (Writer is complete in part 13)
_NO_HANDLER: Any = None  # for `@app.get("/")`, which `_check_handler` refuses with a clear error
Middleware = Callable[[Handler], Handler]
ErrorHandler = Callable[[Context, "Writer", Any], Awaitable[None] | None]


class _Node:
    """A place in the tree of paths."""

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}  # by the segment's text
        self.parameters: dict[str, _Node] = {}  # by type, in the order in which they are tried
        self.catch_all: _Node | None = None  # for all segments that follow, even none
        self.routes: dict[str, Handler] = {}  # by method
        self.names: list[str] = []  # of the parameters on the way here
        self.path = ""  # as it was written

    def parameter(self, kind: str) -> _Node:
        """The place after a parameter of this type, made if it is new."""
        self.parameters.setdefault(kind, _Node())
        ordered = [known for known in (*_PATH_TYPES, _ANY) if known in self.parameters]
        self.parameters = {known: self.parameters[known] for known in ordered}
        return self.parameters[kind]


# What a path matches: a node, the values of its parameters, the text that a catch-all matched.
_Match = tuple[_Node, list[Any], str]
_PARAMETER_SEGMENT = re.compile(r"\{([A-Za-z_]\w*)(?::(\w+))?\}")
_NO_SEGMENT = re.compile(r"[{}*<>?#\\]|^:\w")  # `<id>`, `:id`, `\d`: as other routers write it


# Types of parameters, in the order in which they are tried: what matches, and what converts it.
_PATH_TYPES: dict[str, tuple[re.Pattern[str], Callable[[str], Any]]] = {
    "int": (re.compile(r"-?[0-9]{1,1000}"), int),
    "float": (re.compile(r"-?[0-9]{1,1000}(\.[0-9]{1,1000})?"), _finite),
    "date": (re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}"), date.fromisoformat),
    "uuid": (re.compile(r"(?i)[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"), UUID),
}
_ANY = "str"  # a parameter without a type; it is tried last


def _converted(kind: str, segment: str) -> Any:
    """A segment converted to a type, or None if it does not fit."""
    if kind == _ANY:
        return segment or None
    pattern, convert = _PATH_TYPES[kind]
    with suppress(ValueError):
        return convert(segment) if pattern.fullmatch(segment) else None


class _Tree:
    """The routes of one host, or those for any host."""

    def __init__(self) -> None:
        self._root = _Node()
        self._exact: dict[str, dict[str, Handler]] = {}  # routes without parameters, by path

    def add(self, method: str, path: str, handler: Handler) -> None:
        """Add a route. StarioError if it cannot be told apart from an existing one."""
        node, names = self._root, []
        segments = path.split("/")[1:]
        for i, segment in enumerate(segments):
            named = _PARAMETER_SEGMENT.fullmatch(segment)
            kind = (named[2] or _ANY) if named else ""
            if segment == "*" and i == len(segments) - 1:
                node.catch_all = node.catch_all or _Node()
                node = node.catch_all
            elif named and kind in (*_PATH_TYPES, _ANY):
                names.append(named[1])
                node = node.parameter(kind)
            elif _NO_SEGMENT.search(segment):
                raise StarioError(
                    f"{path!r}: a parameter is a whole segment, '{{user_id}}' or '{{id:int}}' (or "
                    "float, date, uuid), and '*' comes last"
                )
            else:
                node = node.children.setdefault(_unquote(segment), _Node())
        if len(set(names)) < len(names):
            raise StarioError(f"{path!r} has two parameters of one name")
        if method in node.routes:
            raise StarioError(f"{method} {path} cannot be told apart from {method} {node.path}")
        if node.routes and node.names != names:
            raise StarioError(f"{path} and {node.path} name the same parameters differently")
        node.routes[method] = handler
        node.names, node.path = names, path
        if not names and "*" not in path and "%" not in path:
            self._exact[path] = node.routes

    def find(self, request: Request) -> Handler | None:
        """The handler for a request, or None. Sets the request's route and parameters."""
        routes = self._exact.get(request._split_path)  # first those without parameters
        if routes is not None and request.method in routes:
            request.route = request._split_path
            return routes[request.method]
        for node, values, tail in self._matches(request._split_path):
            handler = node.routes.get(request.method)
            if handler is None and request.method == "HEAD":
                handler = node.routes.get("GET")
            if handler is not None:
                request.params = dict(zip(node.names, values, strict=True))
                request.tail = tail
                request.route = node.path
                return handler
        return None

    def _matches(self, path: str) -> Iterator[_Match]:
        """All nodes with routes that match a path, the most specific first."""
        segments = path.split("/")[1:]
        if _SLASH in path:
            segments = [segment.replace(_SLASH, "/") for segment in segments]
        return _walk(self._root, segments, 0, []) if segments else iter(())  # (`*` has none)

    def methods(self, path: str) -> set[str]:
        """The methods that a path has routes for."""
        methods = {method for node, _, _ in self._matches(path) for method in node.routes}
        return methods | {"HEAD"} if "GET" in methods else methods


def _walk(node: _Node, segments: list[str], at_segment: int, values: list[Any]) -> Iterator[_Match]:
    """The nodes from this one down that match `segments[at_segment:]`, the most specific first."""
    if at_segment == len(segments):
        if node.routes:
            yield node, values, ""
    else:
        segment = segments[at_segment]
        child = node.children.get(segment)
        if child is not None:
            yield from _walk(child, segments, at_segment + 1, values)
        for kind, behind in node.parameters.items():
            value = _converted(kind, segment)
            if value is not None:
                yield from _walk(behind, segments, at_segment + 1, [*values, value])
    if node.catch_all is not None:
        yield node.catch_all, values, "/".join(segments[at_segment:])


_collections: dict[str, Assets] = {}  # what `assets` serves, by name (19)


class Router:
    """Routes that belong together. `app.mount("/shop", router)` puts them into an app, or a router.

    `use()` wraps all routes that follow, and `on_error` handles what they raise.
    """

    def __init__(self) -> None:
        self._routes: list[tuple[str, str, Handler, str, str]] = []  # the arguments of `_add`
        self._tree = _Tree()  # of routes for any host
        self._hosts: dict[str, _Tree] = {}  # of the others, by host (part 30)
        self._middleware: list[Middleware] = []
        self._errors: dict[type[Exception], ErrorHandler] = {}
        self._mounted = False  # its routes have been copied: no more can be added

    def get(self, path: str, handler: Handler = _NO_HANDLER, *middleware: Middleware) -> None:
        """Answer GET (and HEAD) at a path: `/users`, `/users/{id}` or `/files/*`."""
        self.handle("GET", path, handler, *middleware)

    def post(self, path: str, handler: Handler = _NO_HANDLER, *middleware: Middleware) -> None:
        """Answer POST at a path."""
        self.handle("POST", path, handler, *middleware)

    def put(self, path: str, handler: Handler = _NO_HANDLER, *middleware: Middleware) -> None:
        """Answer PUT at a path."""
        self.handle("PUT", path, handler, *middleware)

    def patch(self, path: str, handler: Handler = _NO_HANDLER, *middleware: Middleware) -> None:
        """Answer PATCH at a path."""
        self.handle("PATCH", path, handler, *middleware)

    def delete(self, path: str, handler: Handler = _NO_HANDLER, *middleware: Middleware) -> None:
        """Answer DELETE at a path."""
        self.handle("DELETE", path, handler, *middleware)

    def query(self, path: str, handler: Handler = _NO_HANDLER, *middleware: Middleware) -> None:
        """Answer QUERY at a path: a GET with a body (draft-ietf-httpbis-safe-method-w-body)."""
        self.handle("QUERY", path, handler, *middleware)

    def head(self, path: str, handler: Handler = _NO_HANDLER, *middleware: Middleware) -> None:
        """Answer HEAD at a path, if the GET handler should not."""
        self.handle("HEAD", path, handler, *middleware)

    def options(self, path: str, handler: Handler = _NO_HANDLER, *middleware: Middleware) -> None:
        """Answer OPTIONS at a path, if a list of its methods is not enough."""
        self.handle("OPTIONS", path, handler, *middleware)

    def handle(self, method: str, path: str, handler: Handler, *middleware: Middleware) -> None:
        """Answer a method at a path: `app.handle("PROPFIND", "/files/*", list_files)`.

        A path is `/users`, `/users/{name}`, `/users/{id:int}` (or float, date, uuid: the value is
        in `c.req.params`; what does not fit is a 404), or `/files/*` (the rest is `c.req.tail`).
        The first middleware is the outermost.
        """
        if not (isinstance(path, str) and isinstance(method, str) and _TOKEN.fullmatch(method)):
            raise StarioError(f"one method and one path are needed, not {method!r} and {path!r}")
        if re.match("[A-Za-z]+(:/| )/", path):  # "http://x.org/users", "GET /users"
            raise StarioError(f"a path has no method, no scheme and no host, as {path!r} has")
        _check_handler(f"{method} {path}", handler)
        name, path = getattr(handler, "__name__", ""), "/" + path.lstrip("/")
        self._add(method.upper(), path, _wrapped(handler, middleware), name)

    def url(self, name: str, /, **params: object) -> str:
        """The path of the route whose handler has this name: `app.url("user", id=3)`.

        `tail` fills a `*`. StarioError if no route, or more than one, has a handler of that name,
        or if the parameters are not the route's. Routes of a host count only if there is no other.
        """
        named = [(path, host) for _, path, _, known, host in self._routes if known == name]
        paths = {path for path, host in named if not host} or {path for path, _ in named}
        if len(paths) != 1:
            names = ", ".join(sorted({known for _, _, _, known, _ in self._routes}))
            found = ", ".join(sorted(paths)) or f"none of {names}"
            raise StarioError(f"one route needs a handler named {name!r}; found: {found}")
        return _filled_in(paths.pop(), params)  # part 30

    def _add(self, method: str, path: str, handler: Handler, name: str, host: str = "") -> None:
        """Add a route for a host, or for any host, wrapped in this router's middleware."""
        self._check_open()
        handler = _wrapped(handler, self._middleware)
        (_tree_of(self, host) if host else self._tree).add(method, path, handler)
        self._routes.append((method, path, handler, name, host))

    def assets(
        self,
        prefix: str,
        source: str | os.PathLike[str] | Mapping[str, str | bytes],
        *middleware: Middleware,
        collection: str | None = None,
    ) -> None:
        """Serve the files of a directory, or of a dict from names to contents (see part 19).

        `asset(name, collection=…)` gives a file's fingerprinted name; the collection is named after
        the prefix unless you name it. StarioError if the directory does not exist.
        """
        _check_order('assets("/static", "directory")', prefix, source)
        name = prefix.strip("/") if collection is None else collection
        self.get(f"{prefix.strip('/')}/*", Assets(source, name), *middleware)

    def use(self, *middleware: Middleware) -> None:
        """Wrap every route of this router. Call it before you add the first route."""
        self._check_open()
        if self._routes:
            raise StarioError("use() comes before the routes: it would not wrap those that exist")
        for each in middleware:
            _check_middleware(each)
        self._middleware.extend(middleware)

    def on_error(self, exception_type: type[Exception], handler: ErrorHandler) -> None:
        """Let `handler(c, w, exc)`, sync or async, answer for exceptions of this type.

        Of several handlers, the one for the exception's own class wins, else the one for its
        nearest base class. A handler for `Exception` is for faults: it gets neither HttpException
        nor ClientDisconnected. A redirect is not an error. The exception has already been recorded.
        Answer only if not `w.started`. An answer that had begun breaks off, unless `handler` writes
        more of it, or ends it.
        """
        if not (isinstance(exception_type, type) and issubclass(exception_type, Exception)):
            raise StarioError(
                f"on_error takes a type of exception, not {exception_type!r}; for a status take "
                "HttpException, and look at exc.status_code"
            )
        _check_arguments(handler, "c, w, exc")
        self._check_open()
        self._errors[exception_type] = handler

    def mount(self, prefix: str, router: Router) -> None:
        """Take over a router's routes, each under the prefix. Add routes to the router first."""
        _check_order('mount("/shop", router)', prefix, router, Router)
        self._take_over(router, ("/" + prefix.strip("/")).rstrip("/"))

    def host(self, pattern: str, router: Router) -> None:
        """Serve a router on one host, `api.example.com`, or on all subdomains, `*.example.com`.

        `c.req.subhost` is what `*` matched. If the router has no route, the app's own are tried.
        """
        _check_order('host("api.example.com", router)', pattern, router, Router)
        star = "*." if pattern.startswith("*.") else ""
        self._take_over(router, "", star + _host_name(pattern.removeprefix(star)))

    def _take_over(self, router: Router, prefix: str, host: str = "") -> None:
        self._check_open()
        if router is self:
            raise StarioError("a router cannot be mounted in itself")
        life = vars(router).get("_life")  # lifespans and tasks (24): `router._life` would make one
        if life and (life.lifespans or life.waiting):
            raise StarioError("lifespans and background tasks are given to the app that is served")
        router._mounted = True
        for method, path, handler, name, own_host in router._routes:
            if host and own_host:
                raise StarioError(f"routes for {own_host} cannot be for {host}, too")
            full = prefix if prefix and path == "/" else prefix + path
            self._add(method, full, router._with_errors(handler), name, own_host or host)

    def _check_open(self) -> None:
        if self._mounted:
            raise StarioError("this router is mounted already: add to it before you mount it")

    def _with_errors(self, handler: Handler) -> Handler:
        """The handler, with this router's own `on_error` around it."""
        if not self._errors:
            return handler

        async def _guarded(c: Context, w: Writer) -> None:
            try:
                await handler(c, w)
            except Exception as exc:
                if not await _handle_error(self._errors, c, w, _ungrouped(exc)):
                    raise

        return _guarded


async def _handle_error(
    handlers: Mapping[type[Exception], ErrorHandler], c: Context, w: Writer, exc: BaseException
) -> bool:
    """Give an exception to the `on_error` handler for it; False if there is none."""
    if isinstance(exc, HttpException) and exc.status_code < 400:
        return False
    foreseen = isinstance(exc, (HttpException, ClientDisconnected))
    for kind in type(exc).__mro__:  # its class, then the base classes, the nearest first
        if kind in handlers and not (foreseen and kind is Exception):
            # A silent app records only faults: what goes to the handler for `Exception`.
            if kind is Exception or not c.app._silent:
                _record(c, exc, is_handled=True)  # part 30
            w._forget_answer()
            had_begun, writes = w.started, w._writes
            answer = handlers[kind](c, w, exc)
            if inspect.isawaitable(answer):
                await answer
            has_all = w.completed or w._rest is not None  # (the rest of a file will be sent)
            if had_begun and w._writes == writes and not has_all:
                w._break_off()  # it would look complete, and what failed is missing
            return True
    return False


# ==================================================================================================
# 8. The app
#
# A Stario is a router with a tracer (part 20), to which it gives its spans. `dispatch` takes one
# request through the app: context, handler, errors, the end of the answer. A carrier calls nothing
# else.
# ==================================================================================================


def _is_stopped(carrier: Carrier, exc: BaseException) -> bool:
    """Whether a stopping server has ended the handler: by a cancellation or a KeyboardInterrupt."""
    task = asyncio.current_task()
    cancelled = isinstance(exc, asyncio.CancelledError) and task is not None and task.cancelling()
    return carrier.shutting_down and bool(cancelled or isinstance(exc, KeyboardInterrupt))


async def _fail(c: Context, w: Writer, exc: BaseException) -> None:
    """A handler has raised: answer for it, if there is still an answer to give.

    Every exception ends this request and nothing else: even `SystemExit`, or a cancellation that
    does not come from the server.
    """
    try:
        exc = _ungrouped(exc)
        if await _handle_error(c.app._errors, c, w, exc):
            await _complete(c, w)
            return
        _record(c, exc)
    except BaseException as another:  # the error handler itself has failed
        if _is_stopped(w._carrier, another):
            raise
        exc = another
        _record(c, exc)
    if c.app.debug and not (isinstance(exc, (HttpException, ClientDisconnected)) or w.completed):
        _show_error(c, w, exc)  # part 29
    if not (w.started or isinstance(exc, ClientDisconnected)):
        _answer_error(c, w, exc)
    if not w.completed:
        w._break_off()


def _answer_error(c: Context, w: Writer, exc: BaseException) -> None:
    if not (isinstance(exc, HttpException) and exc.status_code == 304):  # it needs its `etag`
        w._forget_answer()
    try:
        if not isinstance(exc, HttpException):
            w.text(_PHRASES[500], 500)
        elif exc.status_code in _REDIRECTS:
            w.redirect(exc.detail, exc.status_code)
        else:
            w.text(exc.detail, exc.status_code)
    except Exception as wrong:  # a status, or an address, that no answer can have
        _record(c, wrong)
        w.text(_PHRASES[500], 500)


async def _complete(c: Context, w: Writer) -> None:
    """The handler has ended: complete its answer, or answer 204 if it gave none.

    StarioError if that is impossible: the answer is shorter than its Content-Length, say.
    """
    if w._rest is not None:  # the rest of a large file
        await w._rest
    if w.started:
        w.end()
    else:
        c("no answer", {"hint": "the handler sent nothing, so the client got 204 No Content"})
        w.empty(204)


class _App(Router):
    """A router that answers requests. Its subclass Stario (part 10) adds the server."""

    def __init__(
        self,
        tracer: Tracer | None = None,
        *,
        compression: CompressionConfig | None = None,
        max_body: int = 10 * 1024 * 1024,
    ) -> None:
        super().__init__()
        if tracer is not None and not isinstance(tracer, Tracer):
            raise StarioError(f"a tracer is needed, not {tracer!r}: `with RichTracer() as tracer:`")
        if not isinstance(max_body, int) or max_body < 0:
            raise StarioError(f"max_body is a number of bytes, not {max_body!r}")
        self.tracer = tracer or Tracer()
        if compression is not None and not isinstance(compression, CompressionConfig):
            raise StarioError(f"compression is a CompressionConfig(...), not {compression!r}")
        self.compression = compression or self._compression
        self.max_body = max_body
        self._silent = type(self.tracer) is Tracer  # the base class, which does nothing
        self._fallback: Handler = self._no_route  # if no route matches; `use` wraps it
        if self._pocket is not None:
            self._tree.add("GET", "/_stario/*", self._pocket)

    # Set by later parts, each of which can be left out of a copy of this file.
    _compression: CompressionConfig | None = None  # the default (part 18)
    _pocket: Assets | None = None  # the pocket client's file (part 31)
    _develops = False  # `debug` is possible (part 29)
    debug = False  # for development: show what goes wrong (part 29)
    _writer: type[Writer]  # Writer (part 13), or one that development (part 29) makes

    def use(self, *middleware: Middleware) -> None:
        """Wrap every route that follows, and the answer if no route matches."""
        super().use(*middleware)
        self._fallback = _wrapped(self._no_route, self._middleware)

    async def dispatch(self, request: Request, carrier: Carrier) -> None:
        """Take one request from its carrier to its handler, and its answer back.

        Raises nothing, unless a stopping server cancels it.
        """
        request.max_body = self.max_body
        c = Context(self, request)  # type: ignore[arg-type]  # every app is a Stario
        w = self._writer(carrier, request, self.compression)
        try:
            try:
                handler = _find_by_host(self, request) if self._hosts else self._tree.find(request)
                handler = handler or self._fallback
                if not self._silent:
                    _current_step.set((c, c.span))  # events go to this span (part 20)
                got = await handler(c, w)  # type: ignore[func-returns-value]
                if got is not None:
                    c("ignored", {"returned": got, "hint": "a handler answers by w, not by return"})
                if not w.completed:
                    await _complete(c, w)
            except BaseException as exc:
                if _is_stopped(carrier, exc):
                    raise
                await _fail(c, w, exc)
        finally:
            if not w.completed:
                carrier.abort()  # cancelled: the server could not wait any longer
            if w._timer is not None:
                w._stop_heartbeat()  # (part 13)
            if isinstance(request._body, Body):
                request._body.discard()  # what the handler has not read
            if c._span is not None:
                if w.started:
                    c._span.attributes["http.response.status_code"] = w.status_code
                c._span.end()

    async def _no_route(self, c: Context, w: Writer) -> None:
        """Answer if no route matches: OPTIONS, 405, 404, and 308 from `/x/` to a route `/x`."""
        request = c.req
        methods = self._methods_for(request, request._split_path)
        if methods:
            w.headers.set("allow", ", ".join(sorted(methods | {"OPTIONS"})))
            if request.method != "OPTIONS":
                raise HttpException(405)
            w.empty(204)
            return
        bare = request._split_path.rstrip("/")
        is_own = bare[1:2] not in ("/", "\\")  # "//evil.com" is the address of another host
        if bare != request._split_path and is_own and self._methods_for(request, bare):
            query = f"?{request.query_string}" if request.query_string else ""
            w._redirect(request.root_path + request.raw_path.rstrip("/") + query, 308)
            return
        raise HttpException(404)

    def _methods_for(self, request: Request, path: str) -> set[str]:
        if path == "*":  # `OPTIONS *` asks what the server as a whole can do
            return {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "QUERY"}
        return {name for tree, _ in _trees_for(self, request) for name in tree.methods(path)}


# -- Act 1 runs: an app, a request, and a carrier (part 6) that prints what it is given. `dispatch`
# asks the router for the handler of `/`, and calls it. `w.html` makes a status, fields and a body,
# and gives them to the carrier's `answer`.
#
#     class Printing(Carrier):
#         scopes = []
#
#         def answer(self, status: int, fields: bytes, body: bytes) -> None:
#             print(status, body.decode())
#
#     async def hello(c: Context, w: Writer) -> None:
#         w.html(h.P("Hello, ", c.req.query.get("name", "world")))
#
#     app = Stario()
#     app.get("/", hello)
#     carrier = Printing()
#     request = Request(RequestLine("GET", "/?name=you"), Headers({}), b"", carrier)
#     asyncio.run(app.dispatch(request, carrier))
#     # prints 200 <p>Hello, you</p>


# ==================================================================================================
# ACT 2. On the network
#
# The same app behind a *socket*, the operating system's end of a connection: bytes become requests,
# answers become bytes. One event loop serves many connections, and a stopping server answers every
# request that it has received. At the end of the act the app runs in a browser, and in a test.
# ==================================================================================================

# ==================================================================================================
# 9. HTTP/1.1: bytes to requests and back (RFC 9110 and 9112)
#
# Terms. A *head* is the first line, the header fields and the empty line. *Framing* says where a
# message ends. Either the head has the body's length (`content-length: 5`), or the body comes in
# *chunks*, each preceded by its length in hexadecimal; the last one has length 0:
#
#     transfer-encoding: chunked\r\n\r\n5\r\nHello\r\n6\r\n, Ada!\r\n0\r\n\r\n
#
# A connection stays open for the next request (*keep-alive*), unless a head says
# `connection: close`. A client may send its next request before it has the answer (*pipelining*).
# With `expect: 100-continue` it sends a body only when it is told to: `HTTP/1.1 100 Continue`.
#
# Theory of operation. A connection works on one request at a time. Its state (see `_State`) says
# what the next bytes are: a request's head, some of its body, or, while a handler works, bytes to
# keep for later. `_advance` reads one head, or the part of a body that has arrived. It is called
# when bytes arrive, when an answer is complete, and when the client has taken earlier answers. A
# connection belongs to a `Worker` (part 10): an event loop, the app, and that loop's connections.
#
# The rule for all input: what could be read in two ways is refused with 400, and the connection is
# closed. If a proxy and a server disagree on where a request ends, its last bytes pass the proxy as
# part of a body and reach the server as a request of their own (*smuggling*).
#
# Time. A connection has one `_deadline`, the time until which it waits. About once a second the
# worker checks all deadlines: the *sweep*. So a time limit is an attribute, not a timer.
#
# A header block that comes twice is parsed once: browsers repeat theirs byte for byte, so the last
# one is kept. A header field is looked up only when it is needed.
# ==================================================================================================


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What a client may cost: each field is a keyword of `serve()` and `running()`.

    Times are in seconds, sizes in bytes.
    """

    header_timeout: float = 10.0  # for a whole head; then 408 (Request Timeout)
    body_timeout: float = 30.0  # for the next bytes of a body; then 408 (see `_read_body`)
    keep_alive_timeout: float = 75.0  # for the next request on an idle connection; then closed
    write_timeout: float = 30.0  # while a client takes none of its answer; then cut off
    max_header_bytes: int = 32 * 1024  # of a head, and of the trailers of a body; beyond: 431
    max_headers: int = 100  # fields in a head; beyond: 431
    max_target: int = 32 * 1024  # of the target (a GET has its signals there, part 15); beyond: 414
    max_buffer: int = 16 * 1024 * 1024  # bytes of an answer that wait for the client; then cut off
    max_connections: int = 10_000  # at once; beyond: 503
    max_handlers: int = 1000  # above one per connection: a handler may outlast its answer


_HIGH_WATER = 64 * 1024  # bytes that are buffered in each direction; beyond: the sender waits
_DISCARD_LIMIT = 256 * 1024  # bytes of an unwanted body that are read and dropped; beyond: closed
_MAX_EXCESS = 100  # connections above `max_connections` that get a 503; more are closed
_ACCEPT_BATCH = 64  # connections that are accepted before the loop runs other tasks
_KEPT_HEAD = 4096  # bytes: a larger header section is not kept for the next request
_IDLE_GRACE = 0.5  # seconds in which an idle client may still send: at a stop, and in `_linger`
_LINGER = 2.0  # seconds in which a client may read an answer that ends its connection (`_linger`)
_NEVER = float("inf")
# A value for the socket option SO_LINGER. A close then sends a *reset*: the client sees an error.
_RESET = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)

_REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) HTTP/([0-9])\.([0-9])")
_WHOLE_URL = re.compile(r"https?://(?!:)([^/?#@]+)(/[^?#]*)?(\?[^#]*)?", re.IGNORECASE)

# A *header section* (RFC 9110, section 6.3), with the line breaks before and after it, is a block:
#
#     b"\r\nhost: a.example\r\naccept: */*\r\n\r\n"
#
# A field is one line, with no space before its colon and no control characters.
_FIELD_LINE = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]++:[\t\x20-\x7e\x80-\xff]*+\r\n"
_FRAMING_FIELDS = re.compile(
    rb"\n(?=[hcte])((?:host|connection|content-length|transfer-encoding|expect):[^\r]*)",
    re.IGNORECASE,  # (the lookahead lets most lines fail at their first letter)
)
_LONE_LF = re.compile(rb"[^\r]\n")
_LINE_SO_FAR = re.compile(rb"[ -~]*+\r?")  # a request line that is not complete yet


@lru_cache
def _block_pattern(max_headers: int) -> re.Pattern[bytes]:
    return re.compile(rb"\r\n(?:%b){0,%d}+\r\n" % (_FIELD_LINE, max_headers))


@lru_cache(maxsize=256)
def _status_line(status: int) -> bytes:
    # (`int`: a status may be an `HTTPStatus`.)
    return f"HTTP/1.1 {int(status)} {_PHRASES.get(status, 'Unknown')}\r\n".encode("latin-1")


@lru_cache(maxsize=256)
def _parse_request_line(line: bytes) -> RequestLine:
    found = _REQUEST_LINE.fullmatch(line)
    if not found:
        raise HttpException(400, "the request line is malformed")
    method, target, major, minor = found.groups()
    if major != b"1":
        raise HttpException(505, "only HTTP/1.1 and HTTP/1.0 are spoken here")
    return RequestLine(method.decode("ascii"), target.decode("ascii"), minor == b"0")


# Fields that say where a request ends and whom it is for: at most one of each, in this form.
_SINGLE_FIELDS = {
    "content-length": (re.compile("[0-9]{1,18}"), "Content-Length is not one decimal number"),
    "transfer-encoding": (re.compile("(?i:chunked)"), "Transfer-Encoding is not exactly 'chunked'"),
    "host": (_HOST, "Host is not one valid host"),
}


class _Framing:
    """What a header block says about a request's end, and about the connection after it."""

    def __init__(self, lines: bytes) -> None:
        """From the fields that matter here, one per line (RFC 9112, section 6)."""
        fields = _split_fields(lines)
        for name, (pattern, wrong) in _SINGLE_FIELDS.items():
            values = fields.get(name, [])
            if len(values) > 1 or (values and not pattern.fullmatch(values[0])):
                raise HttpException(400, wrong)
        self.length = int(fields["content-length"][0]) if "content-length" in fields else 0
        self.chunked = "transfer-encoding" in fields
        if self.chunked and "content-length" in fields:
            raise HttpException(400, "both Content-Length and Transfer-Encoding")
        options = [option.lower() for option in Headers(fields)._list("connection")]
        self.close = "close" in options
        self.keep_alive = "keep-alive" in options
        self.expects = ",".join(fields.get("expect", ())).lower()
        self.has_host = "host" in fields
        # The usual case, which needs no more checks: a host, no body, nothing expected.
        self.is_plain = self.has_host and not (self.length or self.chunked or self.expects)


# A cache: these few fields are the same in most requests, whatever else their heads contain.
_kept_framing = lru_cache(maxsize=256)(_Framing)


class _ReceivedHeaders(Headers):
    """Headers as they came. The first three names that are asked for are searched for in the block.
    For a fourth the whole block is split, which takes as long as five searches.
    """

    def __init__(self, block: bytes) -> None:
        self._block = block  # (no `super().__init__`: `_fields` is made when it is needed)
        self._known: dict[str, Sequence[str]] = {}  # what has been looked up

    @cached_property
    def _fields(self) -> dict[str, list[str]]:  # type: ignore[override]
        return _split_fields(self._block)

    def _values(self, name: str) -> Sequence[str]:
        values = self._known.get(name)
        if values is None:
            if len(self._known) == 3:
                return super()._values(name)
            values = self._known[name] = self._look_up(name.lower())
        return values

    def _look_up(self, name: str) -> Sequence[str]:
        if ":" in name:  # no name has one; and the "name" `host: a` would match `host: a:8000`
            return ()
        wanted, end = f"\n{name}:".encode("ascii", "replace"), 0
        lowered, values = self._block.lower(), []
        while (at := lowered.find(wanted, end)) >= 0:
            end = lowered.find(b"\r", at)
            value = self._block[at + len(wanted) : end].strip(b" \t")
            values.append(value.decode("utf-8" if name in _UTF_8_FIELDS else "latin-1", "replace"))
        return values


# Fields are Latin-1, but browsers send these in UTF-8 (HTML standard, 9.2.4; a script's cookies).
_UTF_8_FIELDS = {"cookie", "last-event-id"}


def _split_fields(block: bytes) -> dict[str, list[str]]:
    """Well-formed field lines as a dict."""
    fields: dict[str, list[str]] = {}
    for line in filter(None, block.decode("latin-1").split("\r\n")):
        name, _, value = line.partition(":")
        fields.setdefault(name.lower(), []).append(value.strip(" \t"))
    if not block.isascii():
        for name in _UTF_8_FIELDS & fields.keys():
            fields[name] = [v.encode("latin-1").decode("utf-8", "replace") for v in fields[name]]
    return fields


def _normalised(
    line: RequestLine, headers: Headers, framing: _Framing
) -> tuple[RequestLine, Headers]:
    """The rare cases: check line and head against each other; take the host from the target.

    `GET http://a.example/x` becomes a request for `/x` with `host: a.example`.
    """
    if line.http_1_0 and framing.chunked:
        raise HttpException(400, "Transfer-Encoding in HTTP/1.0")
    if not (line.http_1_0 or framing.has_host):
        raise HttpException(400, "Host is missing")
    if framing.expects and framing.expects != "100-continue":
        raise HttpException(417, "only '100-continue' can be expected")
    if "#" in line.target:
        raise HttpException(400, "a target has no fragment")
    if line.target.startswith("/") or (line.target == "*" and line.method == "OPTIONS"):
        return line, headers
    # CONNECT's target is `host:port`; any other is a whole URL (RFC 9112, section 3.2).
    if line.method == "CONNECT":
        raise HttpException(501, "this is no proxy: CONNECT is not supported")
    found = _WHOLE_URL.fullmatch(line.target)
    if not found or not _HOST.fullmatch(found[1]):
        raise HttpException(400, "the target is malformed")
    # The target's host counts, not the Host field (section 3.2.2).
    headers = Headers({**headers._fields, "host": [found[1]]})
    target = (found[2] or "/") + (found[3] or "")
    return RequestLine(line.method, target, line.http_1_0), headers


class Body:
    """The body of one request, on its way from the carrier that receives it to the handler.

    The carrier calls `feed` and `end`, or `fail`; the handler's side calls `read`, and `discard`
    when it is done. The carrier stops reading from the network while `buffered` is large, and
    resumes when the body calls `want_more`. So a client that sends faster than the handler reads
    has to wait, and cannot fill the memory: this is called *backpressure*.
    """

    def __init__(self, want_more: Callable[[], None] = lambda: None) -> None:
        self.want_more = want_more
        self.buffered = 0  # bytes that nobody has read yet
        self.discarding = False  # nobody will read any more
        self.dropped = 0  # bytes that have come since then
        self.ended = False
        self._chunks: list[bytes] = []
        self._error: Exception | None = None
        self._news = asyncio.Event()  # `set()` wakes `read`: bytes, the end or an error are here

    def feed(self, chunk: bytes) -> None:
        """The next bytes have come."""
        if self.discarding:
            self.dropped += len(chunk)
        else:
            self._chunks.append(chunk)
            self.buffered += len(chunk)
            self._news.set()

    def end(self) -> None:
        """The whole body has come."""
        self.ended = True
        self._news.set()

    def fail(self, error: Exception) -> None:
        """The rest will not come: `read` raises this error after what has come."""
        self._error = self._error or error
        self._news.set()

    async def read(self) -> bytes:
        """Wait for bytes, and return all that have come since the last call; b"" at the end."""
        while not self._chunks:
            if self._error:
                raise self._error
            if self.ended:
                return b""
            self._news.clear()
            self.want_more()
            await self._news.wait()
        data = b"".join(self._chunks)
        self._chunks.clear()
        self.buffered = 0
        return data

    def put_back(self, data: bytes) -> None:
        """Let the next `read` return these bytes again, before any later ones."""
        self._chunks[:0] = [data] if data else []  # (an empty chunk would mean the end)
        self.buffered += len(data)

    def discard(self) -> None:
        """Drop the rest as it comes: nobody will read it. A task that still reads gets an error."""
        self.discarding = True
        if self._chunks or not self.ended:
            self.fail(StarioError("the body was read after its handler: await it before it ends"))
        self._chunks.clear()
        self.buffered = 0
        if not self.ended:
            self.want_more()


class _BodyDecoder:
    """Extracts one body from a connection's bytes: a known number of them, or chunks.

    Before each chunk is a line with its size, and perhaps an extension (`5;name=value`). After the
    last one, of size 0, come *trailers*, which are fields like those of a head, and an empty line
    (RFC 9112, section 7.1).
    """

    _SIZE = rb"([0-9A-Fa-f]{1,15})([ \t]*+;[\t\x20-\x7e\x80-\xff]*+)?\r\n"
    _FIRST_SIZE = re.compile(_SIZE)
    _NEXT_SIZE = re.compile(rb"\r\n" + _SIZE)  # with the line break that ends the chunk before
    _TRAILER = re.compile(_FIELD_LINE + rb"|\r\n")

    def __init__(self, framing: _Framing, limits: Limits) -> None:
        self._max_ignored = limits.max_header_bytes
        self._ignored = 0  # bytes of extensions and trailers so far
        self.left = framing.length  # bytes of the body, or of this chunk, that are still to come
        # The pattern of the line that follows these bytes; None: the body ends there.
        self._expected = self._FIRST_SIZE if framing.chunked else None

    @property
    def ended(self) -> bool:
        """Whether the whole body has been read."""
        return self.left == 0 and self._expected is None

    def decode(self, buffer: bytes, at: int) -> tuple[bytes, int]:
        """The body's bytes in the buffer from `at` on, and the position after what was read."""
        out: list[bytes] = []
        while at < len(buffer):
            if self.left:
                data = buffer[at : at + self.left]
                out.append(data)
                at += len(data)
                self.left -= len(data)
            elif self._expected is None:
                break
            elif not (line := self._expected.match(buffer, at)):
                self._check_line(buffer[at:])
                break
            elif self._expected is self._TRAILER:
                at = line.end()
                self._read_trailer(line[0])
            else:
                at, self.left = line.end(), int(line[1], 16)
                self._expected = self._NEXT_SIZE if self.left else self._TRAILER
                if line[2]:
                    self._ignored = self._check_ignored(line[2])
        return b"".join(out), at

    def _read_trailer(self, line: bytes) -> None:
        # A trailer must not change the framing (RFC 9110, section 6.5.1): a proxy may obey it.
        if _FRAMING_FIELDS.match(b"\n" + line):
            raise HttpException(400, "a trailer of the body is malformed")
        self._ignored = self._check_ignored(line)
        if line == b"\r\n":
            self._expected = None

    def _check_line(self, start: bytes) -> None:
        """Refuse a malformed line. A line whose end has not come may still be well-formed."""
        if self._expected is self._NEXT_SIZE:
            if not b"\r\n".startswith(start[:2]):
                raise HttpException(400, "a chunk is longer than its size says")
            start = start[2:]
        if b"\n" in start:
            what = "trailer of the body" if self._expected is self._TRAILER else "chunk's size"
            raise HttpException(400, f"a {what} is malformed")
        self._check_ignored(start)

    def _check_ignored(self, more: bytes) -> int:
        """The new `_ignored`, with these bytes. 431 if too many: they could go on for ever."""
        total = self._ignored + len(more)
        if total > self._max_ignored:
            raise HttpException(431, "the chunk extensions or trailers of the body are too large")
        return total


class _RequestReader:
    """Reads heads and bodies from a client's bytes, in whatever pieces they come.

    It knows nothing of sockets or time. Malformed input raises HttpException, and stays unread.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._block_pattern = _block_pattern(limits.max_headers)
        self.buffer = b""  # the bytes that have come; emptied when all have been read
        self._at = 0  # the position up to which the buffer has been read
        self._searched = 0  # bytes searched for a head's end so far (it may begin in the last 3)
        # The last header block, and what was read from it. At first it is one without fields.
        self._block, self._headers, self._framing = b"\r\n\r\n", Headers(), _kept_framing(b"")
        self.decoder: _BodyDecoder | None = None  # while a body is coming in

    def feed(self, data: bytes) -> None:
        """Add bytes from the client."""
        self.buffer, self._at = self.buffer[self._at :] + data, 0

    def unread(self) -> int:
        """How many bytes are unread."""
        return len(self.buffer) - self._at

    def _use(self, upto: int) -> None:
        """Note that the buffer has been read up to this position."""
        self._at = upto
        if upto >= len(self.buffer):
            self.buffer, self._at = b"", 0

    def head(self) -> tuple[RequestLine, Headers, _Framing] | None:
        """The next request's head, or None if it is not complete yet."""
        buffer, at, limits = self.buffer, self._at, self._limits
        while (line_end := buffer.find(b"\r\n", at)) == at:  # skip empty lines (RFC 9112, 2.2)
            at += 2
        is_known = buffer.startswith(self._block, line_end)  # (-1, no line yet, gives False)
        if is_known:
            end = line_end + len(self._block)
        else:
            end = buffer.find(b"\r\n\r\n", at + max(0, self._searched - 3)) + 4
            if end < 4:  # not found
                self._use(at)
                self._check_start()
                return None
        raw_line = buffer[at:line_end]
        if end - at > limits.max_header_bytes:
            raise self._too_large(raw_line)
        if is_known:
            headers, framing = self._headers, self._framing
        else:
            headers, framing = self._read_block(buffer[line_end:end])
        keep = len(raw_line) <= _KEPT_TEXT
        read = _parse_request_line if keep else _parse_request_line.__wrapped__
        line = read(raw_line)
        if len(line.target) > limits.max_target:
            raise HttpException(414, f"the target is longer than {limits.max_target} bytes")
        if not (line.is_plain and framing.is_plain):
            line, headers = _normalised(line, headers, framing)
        self._use(end)
        self._searched = 0
        return line, headers, framing

    def _check_start(self) -> None:
        """Refuse an incomplete head at once if it is malformed or too large already."""
        start = self.buffer[self._at :]
        new = max(0, self._searched - 1)  # check from here: an old "\r" may get its "\n" now
        line, line_end, _ = start.partition(b"\r\n")
        if _LONE_LF.search(start, new):
            raise HttpException(400, "a line of the head ends in a bare line feed")
        if not (line_end or _LINE_SO_FAR.fullmatch(line, new)):
            raise HttpException(400, "the request line is malformed")
        if len(start) > self._limits.max_header_bytes:
            raise self._too_large(line)
        if line_end and len(line) >= new:  # its end has just come: refuse a bad one now
            _parse_request_line.__wrapped__(line)
        self._searched = len(start)

    def _too_large(self, line: bytes) -> HttpException:
        if len(line) > self._limits.max_target + 32:  # with method and version
            return HttpException(414, f"the target is longer than {self._limits.max_target} bytes")
        return HttpException(431, f"the head is larger than {self._limits.max_header_bytes} bytes")

    def _read_block(self, block: bytes) -> tuple[Headers, _Framing]:
        """Read a header block, and keep it for the next request unless it is large."""
        if not self._block_pattern.fullmatch(block):
            if block.count(b"\n") - 2 > self._limits.max_headers:
                raise HttpException(431, f"more than {self._limits.max_headers} header fields")
            raise HttpException(400, "a header line is malformed")
        headers = _ReceivedHeaders(block)
        found = b"\r\n".join(_FRAMING_FIELDS.findall(block))
        if len(block) > _KEPT_HEAD:
            return headers, _Framing(found)
        framing = (_kept_framing if len(found) <= _KEPT_TEXT else _Framing)(found)
        self._block, self._headers, self._framing = block, headers, framing
        return headers, framing

    def whole_body(self, framing: _Framing) -> bytes | None:
        """The body if all of it is here. If not, None, and a `decoder` is made for `body`."""
        at, upto = self._at, self._at + framing.length
        if upto <= len(self.buffer) and not framing.chunked:
            whole = self.buffer[at:upto]
            self._use(upto)
            return whole
        self.decoder = _BodyDecoder(framing, self._limits)
        return None

    def body(self) -> bytes:
        """The part of the body that has come. At the body's end `decoder` becomes None."""
        assert self.decoder is not None
        data, upto = self.decoder.decode(self.buffer, self._at)
        self._use(upto)
        if self.decoder.ended:
            self.decoder = None
        return data


# -- From here on there is a socket. In asyncio a *transport* owns it, and calls the methods of a
# *protocol*, which here is the connection:
#
#     connection_made(transport)      # once, at the start
#     data_received(b"GET / HTT")     # for each piece that arrives, of any size
#     eof_received()                  # the client sends no more
#     connection_lost(exc)            # once, at the end
#
# `transport.write(data)` returns at once: the transport keeps what the kernel does not take. When
# it keeps more than `_HIGH_WATER` bytes it calls `pause_writing`, and when few are left,
# `resume_writing`. Between these two calls `drained` waits, so a client that reads slowly slows
# down a handler that awaits `drained`. In the other direction, `transport.pause_reading()` slows
# down a client that sends too much. For HTTPS the transport encrypts and decrypts (TLS); the
# protocol sees no difference. The loop works in *rounds*: `loop.call_soon(f)` calls f in the next.


class _SocketCarrier(Carrier, asyncio.Protocol):
    """A connection's socket: sends bytes, notices a client that goes, closes in bounded time.

    It knows nothing of requests. Once it is `_closing`, nothing more is written, and incoming bytes
    are dropped. What was written before is still sent, except after `_drop`.
    """

    # Two methods that the subclass Connection adds:
    _timed_out: Callable[[], None]  # the deadline has passed
    go_on: Callable[[], None]  # the client has taken what was written

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._transport: asyncio.Transport = None  # type: ignore[assignment]  # connection_made
        self._closing = False
        self._deadline = worker.now + worker.limits.header_timeout  # for the first head
        self._eof = False  # the client has closed its side (it may still read)
        self._paused_reading = False
        # Between pause_writing and resume_writing: an event that the latter sets. Else None.
        self._paused_writing: asyncio.Event | None = None
        self._sent = 0  # bytes given to the transport
        self._taken = 0  # how many of them had left it when the sweep last saw progress
        self._stalled_since = 0.0  # when that was; 0.0 while nothing is unsent
        self.proxies = worker.proxies
        self.scopes: list[_Scope] = []

    @property
    def shutting_down(self) -> bool:
        """See Carrier."""
        return self._worker.stopping

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(_HIGH_WATER)
        peer = transport.get_extra_info("peername")
        self.client = str(peer[0]) if isinstance(peer, tuple) else ""
        if transport.get_extra_info("sslcontext") is not None:
            self.scheme = "https"
        self._worker.connections.add(cast(Connection, self))
        if self._worker.stopping:
            self._deadline = self._worker.idle_deadline  # the limit of keep-alive (part 10)

    def _is_closing(self) -> bool:
        """Whether the socket is closed or closing: nothing more can be written."""
        return self._closing or self._transport.is_closing()

    # -- Sending

    def _write(self, data: bytes) -> None:
        if not self._is_closing():
            self._sent += len(data)
            self._transport.write(data)

    def pause_writing(self) -> None:
        """The transport holds more than `_HIGH_WATER` bytes of our answer."""
        self._paused_writing = asyncio.Event()

    def resume_writing(self) -> None:
        """The client has taken most of what the transport held."""
        paused, self._paused_writing = self._paused_writing, None
        if paused:
            paused.set()
        self._worker.loop.call_soon(self.go_on)  # the next request may wait for this

    async def drained(self) -> None:
        """See Carrier. If the transport closes and we did not close it, the client has gone."""
        has_gone = self._transport.is_closing() and not self._closing
        if self._paused_writing and not has_gone:
            await self._paused_writing.wait()
        elif self.scheme == "https":  # asyncio's TLS reports a lost connection only from the loop
            await asyncio.sleep(0)
        if self._transport.is_closing() and (self.disconnected or not self._closing):
            self.disconnected = True  # (`connection_lost` is called only in the loop's next round)
            raise ClientDisconnected("the client has gone")

    # -- Time: about once a second the sweep calls `check`

    def check(self, now: float) -> None:
        """Act if the client has taken too long, or has gone."""
        if now >= self._deadline:
            self._deadline = _NEVER
            if not self._closing:
                self._timed_out()
            elif self._transport.get_write_buffer_size():  # the client still reads our answer
                self._deadline = now + _LINGER
            else:
                self._drop()
        if self._paused_reading and not self._closing:
            self._poll_peer()
        self._check_taken(now)

    def extend_deadlines(self, seconds: float) -> None:
        """Give the client `seconds` more, because the server itself stood still for that long."""
        self._deadline += seconds
        if self._stalled_since:
            self._stalled_since += seconds

    def _check_taken(self, now: float) -> None:
        """Cut the client off if it has taken none of its answer for `write_timeout`."""
        unsent = self._transport.get_write_buffer_size()
        if unsent == 0 and not self._paused_writing:
            self._stalled_since = 0.0
        elif self._sent - unsent != self._taken or not self._stalled_since:
            self._taken = self._sent - unsent
            self._stalled_since = now
        elif now - self._stalled_since >= self._worker.limits.write_timeout:
            self._cut_off()

    def _cut_off(self) -> None:
        self._worker.note_refusal(self.client, HttpException(408, "the answer was not taken"))
        self._drop()

    def check_peer(self, seconds: float) -> None:
        """See Carrier. Linux has TCP_INFO for it. (TCP_USER_TIMEOUT would end slow readers too.)"""
        connection = self._transport.get_extra_info("socket")
        with suppress(AttributeError, OSError):  # another system, or a Unix socket
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 60)
            # linux/tcp.h: tcpi_retransmits (sent again without an answer), tcpi_last_ack_recv.
            repeats, silent_ms = info[2], int.from_bytes(info[56:60], sys.byteorder)
            if repeats and silent_ms >= seconds * 1000:
                self._drop()

    def _poll_peer(self) -> None:
        """While reading is paused, no callback reports that the client has gone: ask the system."""
        connection = self._transport.get_extra_info("socket")
        if connection is None or not hasattr(select, "poll"):  # Windows
            return
        poll, half = select.poll(), getattr(select, "POLLRDHUP", 0)  # closed its side (Linux)
        poll.register(connection.fileno(), half)
        found = poll.poll(0)
        if found and found[0][1] & ~half:  # it has reset the connection
            self._drop()
        elif found and not self.disconnected:
            self.disconnected = True
            self._end_scopes()

    # -- Ending

    def _drop(self) -> None:
        """Close at once: unsent bytes are dropped."""
        self._closing = self.disconnected = True
        self._transport.abort()

    def _close(self) -> None:
        """Close, in bounded time. (With TLS, closing waits for the client's reply.)"""
        was_closing, self._closing = self._is_closing(), True
        if not was_closing:
            self._deadline = self._worker.loop.time() + _LINGER
            self._transport.close()

    def _linger(self, sending: bool) -> None:
        """After an answer, close only our side, and go on reading a while (RFC 9112, section 9.6).

        A client that sends to a closed socket gets a reset, and its kernel may then drop an answer
        that it has not read. `sending`: more of the client's bytes are on their way, or here.
        """
        # asyncio's TLS cannot close one side: there we linger only while the client is sending.
        can_close_half = self._transport.can_write_eof()
        if self._is_closing() or self._eof or not (can_close_half or sending):
            self._close()
            return
        self._closing = True
        self._deadline = self._worker.loop.time() + (_LINGER if sending else _IDLE_GRACE)
        if can_close_half:
            with suppress(OSError):  # it has gone already
                self._transport.write_eof()
        if self._paused_reading:
            self._transport.resume_reading()


class _AnswerCarrier(_SocketCarrier):
    """Sends answers in the form of HTTP/1.1. Which request they answer is Connection's business."""

    _gives_up_rest: Callable[[], bool]  # decides whether the rest of a body is left unread
    _after_answer: Callable[[], None]  # the answer is complete
    _end: Callable[[], None]  # the connection ends with what has been sent

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self._http_1_0 = False  # whether the request is HTTP/1.0
        self._close_after = False  # the connection ends with this answer
        self._is_usual = False  # HTTP/1.1, the connection stays open, the whole request is here
        self._chunked = False  # the answer is sent in chunks

    def answer(self, status: int, fields: bytes, body: bytes) -> None:
        """See Carrier. Usually no `connection` field is needed. (`end_of_head`: the date, 10.)"""
        if not self._is_usual or self._worker.stopping:
            fields = self._with_connection(fields)
        self._write(b"".join((_status_line(status), fields, self._worker.end_of_head, body)))
        self._after_answer()

    def begin(self, status: int, fields: bytes, unsized: bool) -> None:
        """See Carrier."""
        self._chunked = unsized and not self._http_1_0
        if self._chunked:
            fields += b"transfer-encoding: chunked\r\n"
        elif unsized:
            self._close_after = True  # HTTP/1.0: the end of the connection is the end of the body
        fields = self._with_connection(fields)
        self._write(b"".join((_status_line(status), fields, self._worker.end_of_head)))

    def _with_connection(self, fields: bytes) -> bytes:
        """Decide whether the connection stays open, and say so (RFC 9112, section 9.3)."""
        self._close_after = self._gives_up_rest() or self._close_after or self._worker.stopping
        if self._close_after:
            fields += b"connection: close\r\n"
        elif self._http_1_0:
            fields += b"connection: keep-alive\r\n"
        return fields

    def send(self, data: bytes) -> None:
        """See Carrier. A client that leaves more than `max_buffer` bytes waiting is cut off."""
        limit = self._worker.limits.max_buffer
        if self._paused_writing and self._transport.get_write_buffer_size() > limit:
            self._cut_off()
        self._write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def finish(self) -> None:
        """See Carrier."""
        if self._chunked:
            self._write(b"0\r\n\r\n")
            self._chunked = False
        self._after_answer()

    def abort(self) -> None:
        """See Carrier. In HTTP/1.0 the end of the connection ends a body; a reset marks a fault."""
        if self._http_1_0 and not self._is_closing():
            connection = self._transport.get_extra_info("socket")
            with suppress(AttributeError, OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self._drop()
        self._end()  # (1.1: the framing shows the cut; a reset could take earlier answers, too)
        self.disconnected = True  # in any case, the client gets no more


# The state of a connection decides what the next bytes are, and what it waits for:
#
# | state     | the handler  | the next bytes are    | it waits, at most            | and then |
# | --------- | ------------ | --------------------- | ---------------------------- | -------- |
# | EXCESS    | -            | refused with 503      | `header_timeout`             | closes   |
# | IDLE      | -            | a request             | `keep_alive_timeout`         | closes   |
# | HEAD      | -            | the rest of a head    | `header_timeout`             | 408      |
# | BODY      | answers      | of its request's body | `body_timeout`               | 408      |
# | ANSWER    | answers      | kept for later        | as long as the handler takes |          |
# | LATE_BODY | has answered | of its request's body | `body_timeout`               | closes   |
#
# A request may pass through IDLE, HEAD, BODY, ANSWER and IDLE again. A head that comes whole skips
# HEAD; a body that comes with it skips BODY. In LATE_BODY the request has been answered, and the
# rest of its body is still coming in. A new connection is IDLE, for `header_timeout`; one above
# `max_connections` is EXCESS. While it is not the client's turn to act, `_deadline` is `_NEVER`.
_State = enum.Enum("_State", "EXCESS IDLE HEAD BODY ANSWER LATE_BODY")
_EXCESS, _IDLE, _HEAD, _BODY, _ANSWER, _LATE_BODY = _State


class Connection(_AnswerCarrier):
    """A client's connection: it reads requests, one at a time, and starts their handlers.

    Its code has three layers: the socket, the answers, and this class. Each knows only those below.
    """

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self._state = _IDLE
        self._reader = _RequestReader(worker.limits)
        self._body: Body  # in BODY and LATE_BODY: the body that is coming in
        self._expects = False  # the client sends the body only after "100 Continue"

    # -- Called by the transport and the worker

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        super().connection_made(transport)
        if len(self._worker.connections) > self._worker.limits.max_connections:
            self._state = _EXCESS

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        if not self._closing:
            self._reader.feed(data)
            self._advance()

    def eof_received(self) -> bool:
        """The client will send no more. It may still be reading: its requests are answered."""
        if self._closing:
            return False  # it has read our answer, or never will: the transport closes
        self._eof = self.disconnected = True
        self._end_scopes()
        self.go_on()
        return self.scheme == "http"  # True keeps our side open; asyncio's TLS cannot

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed: wake every task that waits for it."""
        self._worker.connections.discard(self)
        self._worker.waiting.discard(self)
        self._closing = self.disconnected = True
        self._fail_body(ClientDisconnected("the client left before its request was complete"))
        self._end_scopes()
        if self._paused_writing:
            self._paused_writing.set()

    def shut_down(self) -> None:
        """The server stops: streams end, requests finish, an idle client may send one more."""
        self._end_scopes()
        # (A connection with unread bytes is not idle: its request waits until fewer handlers run.)
        if self._state is _EXCESS or (self._state is _IDLE and not self._reader.buffer):
            self._deadline = self._worker.idle_deadline

    def _timed_out(self) -> None:
        if self._state is _IDLE or self._state is _EXCESS:
            self._close()
        else:
            what = "head" if self._state is _HEAD else "body"
            self._refuse(HttpException(408, f"the {what} did not come in time"))

    # -- Requests

    def go_on(self) -> None:
        """Advance again, now that what the connection waited for has happened."""
        if not self._is_closing():
            self._advance()

    def _advance(self) -> None:
        """Read the next request's head, or more of a body, depending on the state."""
        state, reader = self._state, self._reader
        try:
            if state is _IDLE or state is _HEAD:
                self._read_head()
            elif state is _BODY or state is _LATE_BODY:
                self._read_body()
            elif state is _EXCESS:
                raise HttpException(503, "too many connections")
        except HttpException as exc:
            self._refuse(exc)
        # Usually exactly one whole request has come, and there is nothing to do here.
        if reader.buffer or reader.decoder or self._paused_reading:
            self._pause_or_resume_reading()

    def _read_head(self) -> None:
        """Read a head, and start the handler of its request."""
        worker = self._worker
        if self._paused_writing:
            self._deadline = _NEVER  # the last answer is not taken yet: `write_timeout` counts
            return
        # Handlers may go on after their answers, so there can be more of them than connections.
        if len(worker.tasks) >= len(worker.connections) + worker.limits.max_handlers:
            self._deadline = _NEVER
            worker.waiting.add(self)
            return
        head = self._reader.head()
        if head is None:
            self._wait_for_head()
            return
        line, headers, framing = head
        self._state, self._deadline = _ANSWER, _NEVER
        self._http_1_0 = line.http_1_0
        self._close_after = framing.close or (line.http_1_0 and not framing.keep_alive)
        body: Body | bytes = b"" if framing.is_plain else self._begin_body(framing)
        self._is_usual = not (self._close_after or line.http_1_0 or self._state is _BODY)
        handling = worker.app.dispatch(Request(line, headers, body, self), self)
        # A handler gets a copy of the context variables: what it sets there ends with its request.
        # From Python 3.12 on it runs at once, up to its first wait (`_spawn`, part 10).
        task = _spawn(handling, worker.loop, worker.context.copy())
        if not task.done():
            worker.track(task)
        if (self._reader.buffer or self._eof) and self._is_reading_body():
            self._read_body()  # what has come after the head

    def _wait_for_head(self) -> None:
        if self._eof:
            self._close()  # what is left is part of a request whose rest will not come
            return
        has_begun = self._state is _IDLE and self._reader.buffer  # the head's first bytes are here
        had_paused = self._deadline == _NEVER  # we did not read: the client's time begins now
        if has_begun or had_paused:
            self._state = _HEAD if self._reader.buffer else _IDLE
            self._deadline = self._worker.loop.time() + self._worker.limits.header_timeout

    def _begin_body(self, framing: _Framing) -> Body | bytes:
        if (whole := self._reader.whole_body(framing)) is not None:
            return whole
        self._state = _BODY
        self._body = body = Body(self._wants_body)
        self._expects = bool(framing.expects) and not (self._http_1_0 or self._reader.buffer)
        if not self._expects:
            self._deadline = self._worker.now + self._worker.limits.body_timeout
        return body

    def _is_reading_body(self) -> bool:
        return self._state is _BODY or self._state is _LATE_BODY

    def _read_body(self) -> None:
        """Pass on the part of a body that has come."""
        body, data = self._body, self._reader.body()
        self._expects = False  # the client sends without waiting
        if data:
            body.feed(data)
            # Each kilobyte moves the deadline by a second, to at most `body_timeout` from now. So
            # a client cannot hold a handler for ever by sending a byte now and then.
            if self._deadline != _NEVER:
                limit = self._worker.loop.time() + self._worker.limits.body_timeout
                self._deadline = min(limit, self._deadline + len(data) / 1024)
        if self._reader.decoder is None:  # this was all
            is_answered = self._state is _LATE_BODY
            self._state, self._deadline = _ANSWER, _NEVER
            if is_answered:
                self._after_answer()
            body.end()
        elif self._eof:
            self._fail_body(ClientDisconnected("the client closed in the middle of its request"))
        else:
            self._close_if_rest_is_unwanted()

    def _wants_body(self) -> None:
        """Called by the body when its reader waits for more, or has given up."""
        if not self._is_reading_body() or self._is_closing():
            return
        if self._expects and not self._body.discarding:
            self._expects = False
            self._write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self._deadline == _NEVER:
            self._deadline = self._worker.loop.time() + self._worker.limits.body_timeout
        self._close_if_rest_is_unwanted()
        self._pause_or_resume_reading()

    def _close_if_rest_is_unwanted(self) -> None:
        """Close after the answer, if the rest of the body would only be read to be dropped."""
        is_large = self._body.dropped + self._still_to_come() > _DISCARD_LIMIT
        closes = is_large or self._close_after or self._worker.stopping
        if self._state is _LATE_BODY and self._body.discarding and closes:
            self._end()

    def _fail_body(self, error: Exception) -> None:
        """The rest of a body will not come: if one is being received, its reader gets the error."""
        if self._state is _BODY:
            self._state, self._deadline = _ANSWER, _NEVER
            self._close_after = True
            self._body.fail(error)
        elif self._state is _LATE_BODY:
            self._body.fail(error)
            self._end()

    def _pause_or_resume_reading(self) -> None:
        """Stop reading while enough unread bytes are in memory (backpressure)."""
        if self._is_closing():
            return
        if self._is_reading_body():
            full = self._body.buffered >= _HIGH_WATER or self._body.dropped > _DISCARD_LIMIT
        else:
            full = self._reader.unread() > max(_HIGH_WATER, self._worker.limits.max_header_bytes)
        if full:
            self._deadline = _NEVER  # the client waits for us
        if full and not self._paused_reading:
            self._transport.pause_reading()
        elif self._paused_reading and not full:
            self._transport.resume_reading()
        self._paused_reading = full

    def _refuse(self, exc: HttpException) -> None:
        """Refuse malformed, late or excessive input, and close. A body's reader gets the error."""
        self._worker.note_refusal(self.client, exc)
        self._close_after = True
        if self._is_reading_body():
            self._fail_body(exc)
        else:
            self._state, self._is_usual = _ANSWER, False
            text = f"{exc.detail}\n".encode("latin-1", "replace")
            fields = _TEXT_CONTENT[0] + _length_line(len(text))
            if exc.status_code == 503:
                fields += b"retry-after: 5\r\n"
            unread = self._reader.buffer[self._reader._at :].lstrip(b"\r\n")
            self.answer(exc.status_code, fields, b"" if unread.startswith(b"HEAD ") else text)

    def _gives_up_rest(self) -> bool:
        # A client that waits for "100 Continue" does not get it now. It may send its body or not.
        expects, self._expects = self._expects, False
        return expects or self._still_to_come() > _DISCARD_LIMIT

    def _still_to_come(self) -> int:
        """How many more bytes of a body are known to come."""
        return self._reader.decoder.left if self._reader.decoder else 0

    def _after_answer(self) -> None:
        if self._state is _BODY:
            self._state = _LATE_BODY  # the handler may still read it
            self._close_if_rest_is_unwanted()
        elif self._close_after:
            self._end()
        elif not self._closing:
            self._state, self._deadline = _IDLE, self._worker.idle_deadline
            if self._reader.buffer or self._eof:
                # Not at once: other clients, and the handler that has just answered, come first.
                self._worker.loop.call_soon(self.go_on)

    def _end(self) -> None:
        sending = bool(self._reader.buffer or self._reader.decoder)
        self._reader.buffer = b""
        self._linger(sending)


# ==================================================================================================
# 10. The server
#
# A server *listens* on a socket: the kernel completes connections there, and keeps them in a queue
# (the *backlog*) until they are *accepted*, each as a socket of its own. The server accepts on the
# caller's event loop, and hands each connection to one of its workers in turn: one on that same
# loop, and `workers - 1` in threads with a loop of their own. They share memory, so what handlers
# keep in variables is visible to all of them.
#
# A server that stops must not lose a request. While it stops, each answer says that its connection
# closes; the connections in the backlog are accepted before the sockets close; an idle connection
# is read for `_IDLE_GRACE` seconds more; streams are told to end. After `graceful_timeout` seconds
# whatever is left is cut off.
# ==================================================================================================


_EAGER = sys.version_info >= (3, 12)


def _spawn(
    coroutine: Coroutine[Any, Any, T],
    loop: asyncio.AbstractEventLoop,
    context: contextvars.Context | None = None,
) -> asyncio.Task[T]:
    """Make a coroutine into a task.

    From Python 3.12 on it runs at once, up to its first wait, not in the loop's next round: so a
    handler that never waits is done when this returns. (A given `name` saves making one up.)
    """
    if _EAGER:
        return asyncio.Task(coroutine, loop=loop, name="stario", context=context, eager_start=True)  # type: ignore[call-arg]
    return loop.create_task(coroutine, name="stario", context=context)


def _keep(task: asyncio.Task[Any], tasks: set[asyncio.Task[Any]]) -> None:
    """Keep a task until it ends: the loop does not, and Python could collect it half done."""
    tasks.add(task)
    task.add_done_callback(tasks.discard)


class Worker:
    """An event loop, its share of the connections, and the handlers that run for them.

    Only that loop's thread uses it, with one exception: the server, from its own thread, sets
    `stopping` and `deadline`, and reads `room`.
    """

    def __init__(
        self,
        app: Stario,
        loop: asyncio.AbstractEventLoop,
        limits: Limits,
        proxies: TrustedProxies | None = None,
    ) -> None:
        """`limits` are for this worker alone: its share of the server's."""
        self.app = app
        self.proxies = proxies
        self.loop = loop
        self.limits = limits
        self.connections: set[Connection] = set()
        self.arriving: set[asyncio.Task[None]] = set()  # accepted, in their TLS handshake
        self.tasks: set[asyncio.Task[None]] = set()  # handlers under way
        self.waiting: set[Connection] = set()  # their requests wait until fewer handlers run
        self.stopping = False  # every answer says "connection: close", streams end
        self.deadline = _NEVER  # when a stop cuts off what is left (loop's clock)
        self.ended = False  # its loop is to end
        self.context = contextvars.copy_context()  # each handler gets a copy of it
        times = [value for name, value in dataclasses.asdict(limits).items() if "timeout" in name]
        self._interval = max(0.01, min(1.0, min(times) / 4))  # of sweeps: 4 in the shortest timeout
        self.now = loop.time()  # the time of the last sweep
        self._sweep()

    @property
    def room(self) -> int:
        """How many more connections it may have."""
        return self.limits.max_connections - len(self.connections) - len(self.arriving)

    def adopt(self, accepted: socket.socket, tls: ssl_module.SSLContext | None) -> None:
        """Make a Connection for an accepted socket, unless there are far too many already."""
        if self.room <= -_MAX_EXCESS:
            accepted.close()
        else:
            _keep(self.loop.create_task(self._connect(accepted, tls)), self.arriving)

    async def _connect(self, accepted: socket.socket, tls: ssl_module.SSLContext | None) -> None:
        try:
            await self.loop.connect_accepted_socket(
                lambda: Connection(self),
                accepted,
                ssl=tls,
                ssl_handshake_timeout=self.limits.header_timeout if tls else None,
            )
        except (OSError, asyncio.CancelledError):  # TLS failed, the client has gone, or `stop`
            with suppress(OSError):
                accepted.shutdown(socket.SHUT_RDWR)  # asyncio sees that, and closes it

    def track(self, task: asyncio.Task[None]) -> None:
        """Keep a handler's task until it ends."""
        self.tasks.add(task)
        task.add_done_callback(self._handler_ended)

    def _handler_ended(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        # This wakes all that wait. So it is done when a tenth of the places is free, not for one.
        wake_below = len(self.connections) + 0.9 * self.limits.max_handlers
        if self.waiting and len(self.tasks) < wake_below:
            waiting, self.waiting = self.waiting, set()
            for connection in waiting:
                self.loop.call_soon(connection.go_on)

    def note_refusal(self, client: str, exc: HttpException) -> None:
        """Trace a request that was refused before a handler saw it."""
        if not self.app._silent:
            told = {"http.response.status_code": exc.status_code, "detail": exc.detail}
            self.app.tracer("http.refused", {**told, "client.address": client}).end()

    def _sweep(self) -> None:
        """About once a second: note the time, and let each connection check its deadline."""
        self._timer = self.loop.call_later(self._interval, self._sweep)
        now = self.loop.time()
        late = now - self.now - self._interval  # seconds that this sweep is late
        self.now = now
        idle = _IDLE_GRACE if self.stopping else self.limits.keep_alive_timeout
        self.idle_deadline = self.now + idle  # of a connection that becomes idle now
        # What every answer's head ends with: its last field, and the empty line.
        self.end_of_head = f"date: {_http_date(time.time())}\r\n\r\n".encode()
        for connection in list(self.connections):
            if late > self._interval:  # the machine was suspended, or a handler blocked the loop
                connection.extend_deadlines(late)
            connection.check(self.now)

    async def stop(self, graceful_timeout: float) -> None:
        """End the streams, let requests finish, and cut off what takes too long."""
        self.stopping = True
        start = self.now = self.loop.time()
        self.deadline = min(self.deadline, start + graceful_timeout)
        self._timer.cancel()
        self._interval = min(self._interval, 0.05)
        self._sweep()
        for connection in list(self.connections):
            connection.shut_down()
        left = self.tasks, self.connections, self.arriving
        while any(left) and self.loop.time() < self.deadline:
            await asyncio.sleep(0.01)
            if self.loop.time() >= start + _LINGER:  # a TLS handshake gets no more time
                _cancel(self.arriving)
        self._timer.cancel()
        _cancel(self.arriving)
        await asyncio.gather(*self.arriving, return_exceptions=True)  # first: may start handlers
        _cancel(self.tasks)
        for connection in list(self.connections):
            connection._transport.abort()
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=_CLEANUP)  # (part 13) they run `finally`
        await asyncio.sleep(0)  # let the loop call connection_lost

    def run(self) -> None:
        """The main function of a worker's thread: run its loop until `end` is called."""
        while not self.ended:
            try:
                self.loop.run_forever()
            except BaseException as exc:
                report = {"message": "a callback has ended the event loop", "exception": exc}
                self.loop.call_exception_handler(report)

    def end(self) -> None:
        """Stop its loop, and so its thread."""
        self.ended = True
        self.loop.stop()


def _cancel(tasks: Iterable[asyncio.Task[None]]) -> None:
    for task in list(tasks):
        task.cancel()


class _Threads(ThreadPoolExecutor):
    """Threads for `asyncio.to_thread(f)`, with which a handler calls a blocking function `f`.

    (At exit Python waits for a plain pool's threads, not for these. asyncio requires a subclass.)
    """

    def __init__(self) -> None:
        super().__init__()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._started = 0

    def submit(self, call: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """See concurrent.futures.Executor."""
        future: Future[T] = Future()

        def job() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call(*args, **kwargs))
                except StopIteration as exc:  # asyncio, before 3.12, cannot pass it on
                    future.set_exception(RuntimeError(f"a thread raised {exc!r}"))
                except BaseException as exc:
                    future.set_exception(exc)

        if self._started < self._max_workers:
            threading.Thread(target=self._work, name="stario-thread", daemon=True).start()
            self._started += 1  # (only now: the system may have refused the thread)
        self._jobs.put(job)
        return future

    def _work(self) -> None:
        while job := self._jobs.get():
            job()
            del job  # else its objects would live until the next job

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let each thread end after the jobs that are queued."""
        for _ in range(self._started):
            self._jobs.put(None)


_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # for "all addresses", one that can be opened


@dataclasses.dataclass
class _Listener:
    """The sockets that a server listens on: its own, given ones, or inherited from systemd."""

    host: str
    port: int
    unix_socket: str | os.PathLike[str] | None = None
    unix_mode: int = 0o660
    sock: socket.socket | None = None
    reuse_port: bool = False
    backlog: int = 1024

    def __post_init__(self) -> None:
        self.bound = ""  # the address of the last socket
        self._unix_file: os.stat_result | None = None  # the Unix socket's file, once it is ours
        self._unix_path = ""  # of that file
        self.sockets = [self.sock] if self.sock is not None else []
        if not isinstance(self.host, str):
            raise StarioError(f'host is {self.host!r}: text is needed, "" for all addresses')
        if self.sock is not None and not isinstance(self.sock, socket.socket):
            raise StarioError(f"sock is {self.sock!r}: a socket.socket is needed")
        if self.unix_socket and not hasattr(socket, "AF_UNIX"):
            raise StarioError("this system's Python has no Unix sockets")
        if self.reuse_port and not (self.unix_socket or hasattr(socket, "SO_REUSEPORT")):
            raise StarioError("reuse_port is not supported on this system")

    def open(self) -> None:
        """Listen. Raises StarioError with the reason if that fails."""
        try:
            self.sockets = self.sockets or _systemd_sockets()
            if self.sockets:
                self._take_address()
            elif self.unix_socket:
                self._bind_unix(os.fspath(self.unix_socket))
            else:
                self._bind_tcp()
            for listening in self.sockets:
                listening.listen(self.backlog)
                listening.setblocking(False)
        except (OSError, OverflowError, TypeError, ValueError, StarioError) as exc:
            self.close()
            reason = getattr(exc, "strerror", None) or exc
            if getattr(exc, "errno", 0) == errno.EADDRINUSE:
                reason = "the port is taken. Stop what runs there, or set port="
            place = self.unix_socket or f"{self.host}:{self.port}"
            raise StarioError(f"cannot listen on {place}: {reason}") from None

    def close(self) -> None:
        """Close the sockets."""
        self.unlink()
        for opened in self.sockets:
            opened.close()
        self.sockets.clear()

    def unlink(self) -> None:
        """Remove the file of a Unix socket, unless another server has replaced it."""
        ours, self._unix_file = self._unix_file, None  # (once: a later file may look the same)
        with suppress(OSError):
            if ours and os.path.samestat(ours, os.stat(self._unix_path)):
                os.unlink(self._unix_path)

    def _take_address(self) -> None:
        """Take host and port, or the path, from a socket that was given or inherited."""
        for given in self.sockets:
            if given.type != socket.SOCK_STREAM:
                raise StarioError(f"{given!r} is no stream socket")
            _set_options(given)
        address = self.sockets[0].getsockname()
        if isinstance(address, tuple) and not address[1]:
            raise StarioError(f"{self.sockets[0]!r} is not bound to a port")
        if isinstance(address, tuple):
            self.host, self.port = address[:2]
            self.bound = self.host
        else:
            self.unix_socket = os.fsdecode(address)

    def _addresses(self) -> Iterable[tuple[int, Any]]:
        """The addresses of the host, each with its family (IPv4, IPv6)."""
        # As bytes: for text, Python imports its codec for international names (1 ms at the start).
        host = self.host.encode() if self.host.isascii() else self.host
        found = socket.getaddrinfo(
            host or None, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        pairs = [(family, address) for family, _, _, _, address in dict.fromkeys(found)]
        return [pair for pair in pairs if _is_local(*pair)] or pairs

    def _bind_tcp(self) -> None:
        for family, address in self._addresses():
            listening = socket.socket(family, socket.SOCK_STREAM)
            self.sockets.append(listening)
            if os.name == "posix":  # allow a bind while old connections are still ending
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if self.reuse_port:
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            _set_options(listening)
            if family == socket.AF_INET6:  # IPv4 has a socket of its own
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listening.bind((address[0], self.port, *address[2:]))
            self.bound, self.port = listening.getsockname()[:2]  # port 0: the next use this one too

    def _bind_unix(self, path: str) -> None:
        """Listen under a temporary name, then rename: the path always leads to a live socket."""
        _refuse_taken(path, self.reuse_port)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sockets.append(listening)
        folder, name = os.path.split(path)
        # It is no longer than the path itself: systems allow about 100 bytes.
        own = os.path.join(folder, f".{os.getpid()}".ljust(len(os.fsencode(name)), "_"))
        with suppress(FileNotFoundError):
            os.unlink(own)
        listening.bind(own)
        os.chmod(own, self.unix_mode)
        listening.listen(self.backlog)
        self._unix_path, self._unix_file = os.path.abspath(path), os.stat(own)
        os.replace(own, path)


class ServerOptions(TypedDict, total=False):
    """The options of `serve` and `running`; see Server and Limits."""

    unix_socket: str | os.PathLike[str] | None
    unix_mode: int
    sock: socket.socket | None
    ssl: ssl_module.SSLContext | None
    reuse_port: bool
    backlog: int
    graceful_timeout: float
    trusted_proxies: Sequence[str]
    header_timeout: float
    body_timeout: float
    keep_alive_timeout: float
    write_timeout: float
    max_header_bytes: int
    max_headers: int
    max_target: int
    max_buffer: int
    max_connections: int
    max_handlers: int


class Server:
    """A server for an app: `await start()`, `await stop()`; `url` and `port` say where it is.

    - `host`, `port`: where to listen; port 0 takes a free one
    - `workers`: how many event loops; each but the first runs in a thread of its own
    - `unix_socket`: a path to listen on instead, with `unix_mode` as its permissions
    - `sock`: a socket to listen on instead. Sockets from systemd (LISTEN_FDS) need no option
    - `ssl`: an `ssl.SSLContext`, for HTTPS
    - `reuse_port`: listen where another process listens, too. A port is shared by SO_REUSEPORT; a
      Unix socket's path is taken over, and the other server keeps the connections that it has
    - `backlog`: how many connections may wait to be accepted
    - `graceful_timeout`: seconds that running requests get when the server stops
    - `trusted_proxies`: proxies whose report on the client is trusted; see TrustedProxies (part 17)
    - the fields of `Limits`
    """

    def __init__(
        self,
        app: Stario,
        host: str = "127.0.0.1",
        port: int = 8000,
        workers: int = 1,
        *,
        ssl: ssl_module.SSLContext | None = None,
        graceful_timeout: float = 5.0,
        trusted_proxies: Sequence[str] = (),
        **options: Any,
    ) -> None:
        self.app = app
        self.port = port  # of the last socket, once it listens
        self._count = workers
        self._ssl = ssl
        self._graceful_timeout = graceful_timeout
        self._proxies = TrustedProxies(trusted_proxies) if trusted_proxies else None
        ints = ("workers", workers, 1), ("port", port, 0), ("backlog", options.get("backlog", 0), 0)
        for name, value, least in ints:
            if not isinstance(value, int) or value < least:
                raise StarioError(f"{name} is {value!r}: a whole number from {least} up is needed")
        if not isinstance(graceful_timeout, (int, float)) or not graceful_timeout >= 0:
            raise StarioError(f"graceful_timeout is {graceful_timeout!r}: seconds are needed")
        if ssl is not None and getattr(ssl, "check_hostname", True):  # a client's
            raise StarioError(f"ssl is {ssl!r}: an ssl.SSLContext is needed, of a server")
        where = {field.name for field in dataclasses.fields(_Listener)} & options.keys()
        self._listener = _Listener(host, port, **{name: options.pop(name) for name in where})
        self._limits = _checked_limits(options)
        self._workers: list[Worker] = []
        self._threads: list[threading.Thread] = []
        self._accepting: list[asyncio.Task[None]] = []  # on Windows, see `_watch`
        self._ending = AsyncExitStack()  # what `start` has begun, and `stop` ends
        self._asked = asyncio.Event()  # set once a signal has asked to stop
        self._asked_at = 0.0  # when a signal last asked to stop
        self._starting: asyncio.Task[Any] | None = None  # the task in `start`: a signal cancels it

    @property
    def url(self) -> str:
        """The address to open, without a trailing slash."""
        if self._listener.unix_socket:
            return f"unix:{self._listener.unix_socket}"
        host = _LOOPBACK.get(self._listener.bound, self._listener.host)
        host = f"[{host}]" if ":" in host else host
        return f"{'https' if self._ssl else 'http'}://{host}:{self.port}"

    # -- Starting

    async def start(self, *, heed_signals: bool = False) -> None:
        """Listen, and start the workers, or raise StarioError. `heed_signals`: Ctrl-C stops it."""
        if self._workers:
            raise StarioError("this server runs already")
        self._loop, self._starting = asyncio.get_running_loop(), asyncio.current_task()
        async with AsyncExitStack() as stack:  # a list of calls; if a step fails, it runs them
            stack.callback(_forget_signals, self)
            if heed_signals:
                _heed_signals(self)
            self._listener.open()
            self.port = self._listener.port
            stack.callback(self._listener.close)
            await stack.enter_async_context(self.app._life.while_served())  # part 24
            stack.push_async_callback(self._end_workers)
            self._workers = [self._worker_on(self._loop)]
            for number in range(1, self._count):
                self._workers.append(self._start_thread(f"stario-{number}"))
            self._turns = cycle(self._workers)
            self._ending = stack.pop_all()  # from here on `stop` undoes it
            self._starting = None
        for listening in self._listener.sockets:
            self._watch(listening)

    def _worker_on(self, loop: asyncio.AbstractEventLoop) -> Worker:
        """A worker for a loop, with its share, rounded up, of the limits for all workers."""
        shared = ("max_connections", "max_handlers")
        share = {name: -(-getattr(self._limits, name) // self._count) for name in shared}
        limits = dataclasses.replace(self._limits, **share)
        return Worker(self.app, loop, limits, self._proxies)

    def _start_thread(self, name: str) -> Worker:
        """Start a thread with a worker. This takes milliseconds, and cannot be cancelled."""
        started: Future[Worker] = Future()

        def run() -> None:
            try:
                # (The loop is not made in the main thread: on Windows, signals would wake it.)
                with asyncio.Runner(loop_factory=type(self._loop)) as runner:  # the same kind
                    runner.get_loop().set_default_executor(_Threads())
                    worker = self._worker_on(runner.get_loop())
                    started.set_result(worker)
                    worker.run()
            except BaseException as exc:
                if started.done():
                    raise
                started.set_exception(exc)

        thread = threading.Thread(target=run, name=name, daemon=True)
        try:
            thread.start()
            self._threads.append(thread)
            return started.result()
        except (OSError, RuntimeError) as exc:  # too few file descriptors, or threads
            raise StarioError(f"cannot start {self._count} workers: {exc}") from None

    # -- Running

    def _watch(self, listening: socket.socket) -> None:
        """Have the loop call `_accept` whenever connections wait in the backlog."""
        if listening not in self._listener.sockets:  # closed by `stop`
            return
        try:
            self._loop.add_reader(listening, self._accept, listening)
        except NotImplementedError:  # Windows' loop has no add_reader
            self._accepting.append(self._loop.create_task(self._accept_singly(listening)))

    def _accept(self, listening: socket.socket) -> None:
        if not self._accept_waiting(listening, _ACCEPT_BATCH):
            # No file descriptors or memory left: leave them in the backlog for a moment.
            self._loop.remove_reader(listening)
            self._loop.call_later(0.1, self._watch, listening)

    def _accept_waiting(self, listening: socket.socket, most: int) -> bool:
        """Accept waiting connections, and hand them to the workers; False if that fails."""
        for _ in range(most):
            try:
                self._deal(listening.accept()[0])
            except BlockingIOError:
                break
            except ConnectionError:  # the client has already gone
                continue
            except OSError:
                return False
        return True

    async def _accept_singly(self, listening: socket.socket) -> None:
        while True:
            try:
                accepted, _ = await self._loop.sock_accept(listening)
            except OSError:
                await asyncio.sleep(0.1)
            else:
                self._deal(accepted)

    def _deal(self, accepted: socket.socket) -> None:
        """Give a connection to the next worker that is not full."""
        accepted.setblocking(False)
        turns = islice(self._turns, len(self._workers))
        worker = next((w for w in turns if w.room > 0), None) or next(self._turns)  # (all full)
        if worker.loop is self._loop:
            worker.adopt(accepted, self._ssl)
        else:
            worker.loop.call_soon_threadsafe(worker.adopt, accepted, self._ssl)

    # -- Stopping

    async def wait_for_signal(self) -> None:
        """Wait for Ctrl-C, SIGTERM, a closed terminal (SIGHUP), or Ctrl-Break (SIGBREAK).

        A second signal while the server stops sets `graceful_timeout` to 0: requests are cancelled.
        A third ends the process; so does the second, if that was 0 or the event loop is blocked.
        """
        _heed_signals(self)
        await self._asked.wait()

    def _signalled(self, number: int) -> None:
        """A signal has come. (Another within 0.1 s is ignored: terminals may send it twice.)"""
        now = time.monotonic()
        if not self._asked_at:
            self._asked_at = now
            self._loop.call_soon_threadsafe(self._begin_stop)
        elif now - self._asked_at > 0.1:
            if not self._asked.is_set() or not self._graceful_timeout:  # blocked, or 0 by now
                if isinstance(self.app.tracer, _StreamTracer):  # (20): it may have a footer
                    self.app.tracer._close()
                os._exit(128 + number)  # (in a container, process 1 cannot end itself by a signal)
            self._asked_at, self._graceful_timeout = now, 0.0
            for worker in self._workers:
                worker.deadline = 0.0

    def _begin_stop(self) -> None:
        """Stop. If the server is still starting (migrating a database, say), cancel that."""
        self._asked.set()
        if self._starting is not None:
            self._starting.cancel()

    async def stop(self) -> None:
        """Accept no more, end the streams, let requests finish within `graceful_timeout`."""
        for worker in self._workers:
            worker.stopping = True  # every answer says `connection: close` from now on
        self._stop_accepting()
        grace = self._graceful_timeout
        waiting = {
            asyncio.wrap_future(asyncio.run_coroutine_threadsafe(worker.stop(grace), worker.loop))
            for worker in self._workers
        }  # each runs on its worker's loop
        deadline = time.monotonic() + grace + 2 * _CLEANUP
        try:
            while waiting and time.monotonic() < deadline:
                if not self._graceful_timeout:  # a second signal has come
                    deadline = min(deadline, time.monotonic() + _CLEANUP)
                _, waiting = await asyncio.wait(waiting, timeout=0.1)
        except asyncio.CancelledError:  # the caller waits no longer: cut off what is left
            for worker in self._workers:
                worker.deadline = 0.0
            await asyncio.wait(waiting, timeout=2 * _CLEANUP)
            raise
        finally:
            await self._ending.aclose()

    def _stop_accepting(self) -> None:
        """Accept what is in the backlog, then close the listening sockets.

        To their clients those connections are already open, and a close would reset them. (On Linux
        a TCP handshake under way is lost, except with `reuse_port` and net.ipv4.tcp_migrate_req.)
        """
        self._listener.unlink()  # first, so that no more clients come
        _cancel(self._accepting)
        for listening in self._listener.sockets:
            with suppress(NotImplementedError):
                self._loop.remove_reader(listening)
            self._accept_waiting(listening, self._listener.backlog + 1)
        self._listener.close()
        self._accepting = []

    async def _end_workers(self) -> None:
        """End the workers' threads. (A blocked thread ends with the process.)"""
        for worker in self._workers:
            if worker.loop is self._loop:
                worker._timer.cancel()
            else:
                worker.loop.call_soon_threadsafe(worker.end)
        deadline = time.monotonic() + _CLEANUP
        while any(thread.is_alive() for thread in self._threads) and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
        self._workers, self._threads = [], []


def _checked_limits(options: dict[str, Any]) -> Limits:
    for name, value in options.items():
        _check_word("option", name, ServerOptions.__annotations__)  # (part 30)
        if not isinstance(value, (int, float)) or not value > 0:
            raise StarioError(f"{name} is {value!r}: a number above 0 is needed")
    return Limits(**options)


# -- A signal (Ctrl-C sends one) goes to the whole process: it stops all servers that wait for one.
# When the last of these servers has stopped, the program's earlier signal handlers are restored.

_awaiting_signal: list[Server] = []  # used by the main thread only
_earlier_handlers: dict[int, Any] = {}  # by signal number


def _heed_signals(server: Server) -> None:
    if threading.current_thread() is not threading.main_thread() or server in _awaiting_signal:
        return  # Python allows signal handlers only in the main thread
    _awaiting_signal.append(server)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        number = getattr(signal, name, None)
        before = number and signal.getsignal(number)
        ignored = name == "SIGHUP" and before == signal.SIG_IGN  # by nohup
        if number and number not in _earlier_handlers and before is not None and not ignored:
            _earlier_handlers[number] = before
            signal.signal(number, _on_signal)


def _on_signal(number: int, frame: object) -> None:
    for server in list(_awaiting_signal):
        server._signalled(number)


def _forget_signals(server: Server) -> None:
    if server in _awaiting_signal:
        _awaiting_signal.remove(server)
        while _earlier_handlers and not _awaiting_signal:
            signal.signal(*_earlier_handlers.popitem())


_SOCKET_OPTIONS = {
    # The kernel probes a silent client after 15 s, then every 5 s; without an answer it gives up
    # after 30 s. So a client that has vanished is noticed, even if nothing is sent to it.
    "TCP_KEEPIDLE": 15,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 3,
    # If a client does not read, the kernel keeps this many bytes for it, rather than megabytes.
    "TCP_NOTSENT_LOWAT": _HIGH_WATER,
}


def _set_options(listening: socket.socket) -> None:
    """Set the options of a listening socket; the sockets that it accepts inherit them."""
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _SOCKET_OPTIONS.items():
        with suppress(AttributeError, OSError):  # not on this system
            listening.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _is_local(family: int, address: tuple[Any, ...]) -> bool:
    """Whether this machine has the address. (In containers `localhost` often lacks ::1.)"""
    with suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((address[0], 0, *address[2:]))
        return True
    return False


def _refuse_taken(path: str, take_over: bool) -> None:
    """Refuse a path where another server answers, or where the file is not a socket."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise StarioError("there is a file of that name, and it is no socket")
    except FileNotFoundError:
        return
    if not take_over:
        with suppress(ConnectionRefusedError), socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)  # the other server may hang
            probe.connect(path)
            raise StarioError("another server is listening there")


def _systemd_sockets() -> list[socket.socket]:
    """Sockets from systemd, or whatever uses its protocol (sd_listen_fds): descriptors from 3."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []  # none, or they are meant for another process
    count = int(os.environ.pop("LISTEN_FDS", "0"))
    del os.environ["LISTEN_PID"]  # programs that we start must not take them for theirs
    sockets = [socket.socket(fileno=descriptor) for descriptor in range(3, 3 + count)]
    for inherited in sockets:
        inherited.set_inheritable(False)
    return sockets


class Stario(_App):
    """An app: routes, a tracer, and the settings for all requests.

    Without a tracer it is silent (see `Context`). `max_body` is the largest request body in bytes.
    """

    @cached_property
    def _life(self) -> _Life:
        """Lifespans and background tasks (part 24)."""
        return _Life(self)

    def lifespan(self, manager: Lifespan) -> Lifespan:
        """Add what opens before the first request and closes after the last, such as a database.

        `manager(app)` returns an async context manager. Several are entered in the order in which
        they were added. An exception while one is entered keeps the server from starting.
        """
        _check_arguments(manager, "app")
        if hasattr(manager, "__aenter__"):
            raise StarioError("the lifespan was called: give it without its parentheses")
        is_sync = inspect.isgeneratorfunction(inspect.unwrap(manager))  # (a @contextmanager)
        if is_sync or inspect.isasyncgenfunction(manager) or inspect.iscoroutinefunction(manager):
            raise StarioError(
                f"write @contextlib.asynccontextmanager above {manager.__name__}, and let it be an "
                "`async def` with a yield"
            )
        self._life.lifespans.append(manager)
        return manager

    def background(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a task that lives as long as the server: `app.background(tick())`.

        If the server is not running yet, the task starts with it. It has its own span, and is
        cancelled when the server stops, or by the returned future's `cancel()`, from any thread.
        """
        if not asyncio.iscoroutine(work):
            got = type(work).__name__
            raise StarioError(
                f"background() takes a coroutine, app.background(tick()), not a {got}"
            )
        return self._life.begin(work)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve under another server through ASGI 3 (part 26): `uvicorn myapp:app`."""
        if scope["type"] == "http":
            await _serve_asgi(self, scope, receive, send)
        elif scope["type"] == "lifespan":
            await _asgi_lifespan(self, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        else:
            raise StarioError(f"an app serves HTTP; ASGI's {scope['type']!r} is not supported")

    async def serve(
        self,
        host: str = "127.0.0.1",
        port: int = 8000,
        workers: int = 1,
        *,
        reload: bool = False,
        debug: bool | None = None,
        **options: Unpack[ServerOptions],
    ) -> None:
        """Serve until a signal (`wait_for_signal`). Options: see `Server` (part 10), `Limits` (9).

        With `reload`, saving a file restarts the program (part 28). With `debug`, by default on at
        a terminal and off elsewhere, errors are shown in the browser (part 29). If it cannot start
        (a port is taken, an option does not exist), the program ends with one sentence: SystemExit.
        Threads of `asyncio.to_thread` do not delay the program's end.
        """
        try:
            server = Server(self, host, port, workers, **options)
            if reload:
                _reload(self, server)
            asyncio.get_running_loop().set_default_executor(_Threads())
            if debug is None:
                debug = self._develops and sys.stdout is not None and sys.stdout.isatty()
            self.debug = debug
            await server.start(heed_signals=True)
            if self.debug:
                for worker in server._workers:
                    worker.loop.call_soon_threadsafe(_Watchdog)  # part 29: finds what blocks a loop
        except asyncio.CancelledError:
            starting = server._starting
            # `uncancel` takes one cancellation back, the signal's: how many others are left?
            if starting is None or not server._asked.is_set() or starting.uncancel():
                raise
            return  # none: it was only the signal
        except StarioError as exc:
            for work in self._life.waiting:  # or Python warns that it was never awaited
                work.close()
            raise SystemExit(f"stario: {exc}") from None
        self.tracer("listening", {"url": server.url}).end()
        try:
            await server.wait_for_signal()
        finally:
            await server.stop()

    @asynccontextmanager
    async def running(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        workers: int = 1,
        **options: Unpack[ServerOptions],
    ) -> AsyncIterator[Server]:
        """Serve inside a program of your own: `async with app.running(port=0) as server:`

        `server.url` is its address. Raises StarioError if it cannot start.
        """
        server = Server(self, host, port, workers, **options)
        await server.start()
        try:
            yield server
        finally:
            await server.stop()


# ==================================================================================================
# 11. Trying it without a network: the test client [testclient]
#
# Each request of a TestClient gets a pair of connected sockets: at one end the server's own
# connection (9) with a worker of its own (10), at the other this client. So a test sees the bytes
# that a browser would. All of it runs in the test's event loop, without a port or a thread.
# ==================================================================================================


class TestResponse(NamedTuple):
    """An answer: `status`, `headers`, `cookies` (those it sets), `body`, `text`, `json()`."""

    status: int
    headers: Headers
    body: bytes
    cookies: dict[str, str]

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode("utf-8")

    def json(self) -> Any:
        """The body parsed as JSON."""
        return json.loads(self.body)


class ServerEvent(NamedTuple):
    """A parsed event of a stream: its name, data and id; for a Datastar event, what it patches.

    `fields` has the lines of a Datastar event by their first word: `event.fields["selector"]`.
    """

    event: str
    data: str
    id: str | None = None
    retry: int | None = None

    @property
    def fields(self) -> dict[str, str]:
        """A Datastar event's data: `elements`, `selector`, `mode`, `signals`, ..."""
        return {name: "\n".join(lines) for name, lines in _named_lines(self.data, " ").items()}

    @property
    def elements(self) -> str:
        """The HTML that it patches in."""
        return self.fields.get("elements", "")

    @property
    def signals(self) -> Any:
        """The signals that it patches, parsed."""
        return json.loads(self.fields.get("signals", "{}"))


def _named_lines(text: str, pattern: str) -> dict[str, list[str]]:
    """Lines such as `data: hello` by their names: `{"data": ["hello"]}`."""
    found: dict[str, list[str]] = {}
    for line in text.split("\n"):
        name, *value = re.split(pattern, line, maxsplit=1)
        found.setdefault(name, []).append("".join(value))
    return found


def _parse_event(block: bytes) -> ServerEvent | None:
    """One event's lines (HTML standard, 9.2.6); None for a comment, `: hello`."""
    found = _named_lines(block.decode("utf-8"), ": ?")
    if "event" not in found and "data" not in found:
        return None
    last = {name: values[-1] for name, values in found.items()}
    retry = int(last["retry"]) if last.get("retry", "").isdecimal() else None
    data = "\n".join(found.get("data", []))
    return ServerEvent(last.get("event", "message"), data, last.get("id"), retry)


class _Jar:
    """The client's cookies: until when, and for which paths, each is sent (RFC 6265, section 5)."""

    def __init__(self, cookies: dict[str, str]) -> None:
        self._cookies = cookies  # the test may change them
        self._rules: dict[str, tuple[str, float, str]] = {}  # value, end and path, by name

    def header(self, path: str) -> str:
        """The Cookie field of a request."""
        path = path.partition("?")[0].rstrip("/") + "/"
        sent = []
        for name, value in list(self._cookies.items()):
            known, end, allowed = self._rules.get(name, ("", _NEVER, "/"))
            if value != known:  # the test has set it, not an answer
                end, allowed = _NEVER, "/"
            if end <= time.time():
                del self._cookies[name]
            elif path.startswith(allowed.rstrip("/") + "/"):
                sent.append(f"{name}={quote(value, errors='replace')}")
        return "; ".join(sent)

    def take(self, headers: Headers) -> dict[str, str]:
        """Keep the cookies that an answer sets, and return them."""
        from email.utils import parsedate_to_datetime

        found: dict[str, str] = {}
        for line in headers.getlist("set-cookie"):
            (name, _, value), *rest = (part.partition("=") for part in line.split(";"))
            attributes = {key.strip().lower(): text.strip() for key, _, text in rest}
            name, value, end = name.strip(), unquote(value.strip()), _NEVER
            with suppress(KeyError, ValueError, OverflowError):  # what is malformed is ignored
                end = parsedate_to_datetime(attributes["expires"]).timestamp()
            with suppress(KeyError, ValueError, OverflowError):  # it wins over `expires`
                end = time.time() + int(attributes["max-age"])
            found[name] = self._cookies[name] = value
            self._rules[name] = value, end, attributes.get("path", "/")
            if end <= time.time():
                del self._cookies[name]
        return found


def _quoted(name: str) -> str:
    """Quote the name of a field or file as browsers do (HTML standard, 4.10.21.8)."""
    return '"' + name.translate({10: "%0A", 13: "%0D", 34: "%22"}) + '"'


def _sent_body(
    json: object, form: Mapping[str, object] | None,
    files: Mapping[str, tuple[str, bytes]] | None, body: bytes,
) -> tuple[bytes, str]:  # fmt: skip
    """A request's body and its type, made from a test's arguments."""
    if json is not None:
        return _json(json, _encode_sent).encode("utf-8", "replace"), "application/json"
    if files is not None:
        return _multipart(form or {}, files)
    if form is not None:
        encoded = urlencode(form, doseq=True, errors="replace").encode()
        return encoded, "application/x-www-form-urlencoded"
    return body, ""


def _multipart(
    form: Mapping[str, object], files: Mapping[str, tuple[str, bytes]]
) -> tuple[bytes, str]:
    """A form with files as a body, and its content type (RFC 7578)."""
    boundary, body = os.urandom(16).hex(), b""
    # A list becomes several fields of one name, as in an urlencoded form.
    fields = parse_qsl(urlencode(form, doseq=True, errors="replace"), keep_blank_values=True)
    parts = [(_quoted(name), value.encode()) for name, value in fields]
    for name, file in files.items():
        if not (isinstance(file, tuple) and len(file) == 2 and isinstance(file[1], bytes)):
            raise StarioError(f'write files={{"{name}": ("a.txt", b"its bytes")}}, not {file!r}')
        parts.append((f"{_quoted(name)}; filename={_quoted(file[0])}", file[1]))
    for name, content in parts:
        head = f"--{boundary}\r\ncontent-disposition: form-data; name={name}\r\n\r\n"
        body += head.encode("utf-8", "replace") + content + b"\r\n"
    return body + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


def _plain_sent(value: object) -> object:
    """Signals as Datastar sends them: bytes, the contents of a file, become base64."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else _json_default(value)


_encode_sent = _json_writer(_plain_sent, ascii_only=False)


class TestStream:
    """An answer in progress: `status`, `headers`, and, with `async for`, its events."""

    __test__ = False  # pytest: this is not a test case

    status = 0  # 0 until the answer begins
    headers = Headers()

    def __init__(self, client: TestClient, name: str, timeout: float) -> None:
        self._name = name  # of the request, for messages
        self._timeout = timeout
        self._raised: list[BaseException] = []  # by its handler; `_record` (30) adds it
        self._unread = b""  # bytes that the body's decoder cannot read until more have come
        self._unparsed = b""  # the beginning of an event
        self._events: deque[ServerEvent] = deque()  # that have come, but are not asked for yet
        self._last: ServerEvent | None = None
        self._worker = Worker(client.app, asyncio.get_running_loop(), client.limits)
        if client.raise_errors:
            self._worker.context.run(_failures.set, self._raised)  # for its handlers only

    def __aiter__(self) -> TestStream:
        return self

    async def __anext__(self) -> ServerEvent:
        # A test may stop waiting and ask again: what has come by then is kept.
        async with self._awaiting(f"the next event{f' after {self._last}' if self._last else ''}"):
            while not self._events and (piece := await self._read_piece()):
                text = (self._unparsed + piece).replace(b"\r\n", b"\n")
                *blocks, self._unparsed = text.split(b"\n\n")
                self._events.extend(filter(None, map(_parse_event, blocks)))
        if not self._events:
            self._raise_failure()
            raise StopAsyncIteration
        self._last = self._events.popleft()
        return self._last

    async def _send(self, head: str, body: bytes) -> None:
        """Connect, and send the request."""
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._worker.adopt(theirs, None)
        self._reader, self._writer = await asyncio.open_connection(sock=ours, limit=_HIGH_WATER)
        self._writer.write(head.encode("latin-1") + body)
        no_body = head.startswith("HEAD ")
        self._head = asyncio.get_running_loop().create_task(self._read_head(no_body))

    async def _read_head(self, no_body: bool) -> None:
        status = 100
        while status < 200:  # "100 Continue" may come before the answer
            block = await self._reader.readuntil(b"\r\n\r\n")
            line, _, fields = block.partition(b"\r\n")
            status = int(line.split()[1])
        self.headers = Headers(_split_fields(fields))
        framing = _Framing(b"" if no_body or status in _BODILESS else fields)
        self._decoder = _BodyDecoder(framing, self._worker.limits)
        self.status = status

    async def _read_piece(self) -> bytes:
        """More of the body; b"" at its end."""
        await asyncio.shield(self._head)
        while not self._decoder.ended:
            if not (data := await self._reader.read(_HIGH_WATER)):
                self._raise_failure()
                raise EOFError
            self._unread += data
            piece, upto = self._decoder.decode(self._unread, 0)
            self._unread = self._unread[upto:]
            if piece:
                return piece
        return b""

    @asynccontextmanager
    async def _awaiting(self, what: str) -> AsyncIterator[None]:
        """Apply the time limit to the block; the error says what was awaited."""
        try:
            async with asyncio.timeout(self._timeout):
                yield
        except TimeoutError:
            message = f"{self._name}: {what} did not come within {self._timeout:g} s"
            raise TimeoutError(message) from None
        except (EOFError, ConnectionError):
            self._raise_failure()
            raise ClientDisconnected(f"{self._name}: the answer broke off") from None

    async def _settle(self) -> None:
        """Let the handler run until it sends its first bytes, or waits."""
        async with self._awaiting("the start of its handler"):
            while not (self._worker.tasks or self._head.done()):
                await asyncio.sleep(0)
        for _ in range(20):  # (a guess) rounds: by then a handler that never waits has sent a head
            if not self._head.done():
                await asyncio.sleep(0)

    async def _hang_up(self) -> None:
        """Close our end, and wait until the handler has ended."""
        self._writer.close()
        try:
            await self._wait_for_handler()
        finally:
            self._head.cancel()
            await self._worker.stop(0.0)

    async def _wait_for_handler(self) -> None:
        """Wait until the handler has ended."""
        async with self._awaiting("the end of its handler"):
            while self._worker.tasks:
                await asyncio.wait(self._worker.tasks)

    def _raise_failure(self) -> None:
        """Raise in the test what the handler has raised."""
        failure = self._raised[0] if self._raised else None
        if isinstance(failure, Exception):
            raise failure
        if failure is not None:  # SystemExit or a cancellation would end the test, not fail it
            raise RuntimeError(f"{self._name}: its handler raised {failure!r}") from failure


class TestClient:
    """A client for tests: `async with TestClient(app) as client: r = await client.get("/")`.

    `cookies` is its jar: answers change it, requests send it. A request returns when its handler
    has ended, with all that it does after its answer; with `wait=False`, when the answer is there.
    An exception in a handler is raised in the test; with `raise_errors=False` the answer is a 500,
    as for a browser. A wait of more than `timeout` seconds raises a TimeoutError that says what was
    awaited. Other options are those of `Limits`.
    """

    __test__ = False  # pytest: this is not a test case

    def __init__(
        self,
        app: Stario,
        *,
        host: str = "testserver",
        timeout: float = 10.0,
        raise_errors: bool = True,
        **limits: Any,
    ) -> None:
        if not isinstance(app, Stario):
            raise StarioError(f"TestClient(app) takes a Stario, not {app!r}")
        self.app = app
        self.host = host
        self.timeout = timeout
        self.raise_errors = raise_errors
        self.limits = _checked_limits(limits)
        self.cookies: dict[str, str] = {}
        self._jar = _Jar(self.cookies)
        self._ending = AsyncExitStack()
        self._unfinished: list[TestStream] = []  # answered with wait=False

    async def __aenter__(self) -> TestClient:
        life = self.app._life
        if life.loop is None:  # else a server runs the app: its lifespans (part 24) have begun
            await self._ending.enter_async_context(life.while_served())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        for stream in self._unfinished:
            stream._worker.stopping = True
            self._ending.push_async_callback(stream._hang_up)
        await self._ending.aclose()
        for stream in self._unfinished:
            if kind is None:
                stream._raise_failure()

    async def request(
        self, method: str, path: str, *, wait: bool = True, follow: bool = False, **options: Any
    ) -> TestResponse:
        """Send a request, return its answer. `client.get(path)` is `client.request("GET", path)`.

        Options: `signals` (as Datastar sends them; a dict, a dataclass, a model), `json`, `form` (a
        dict), `files` (`{"field": ("name.txt", b"...")}`), `body` (bytes), `headers` and `timeout`;
        `follow=True` follows redirects on the same host. Raises ClientDisconnected if the answer
        breaks off.
        """
        for _ in range(20):
            answer = await self._request(method, path, wait, **options)
            location = answer.headers.get("location") if answer.status in _REDIRECTS else None
            if not (follow and location):
                return answer
            target = urlsplit(urljoin(f"http://{self.host}{path}", location))
            if target.netloc != self.host:
                return answer
            path = (target.path or "/") + (f"?{target.query}" if target.query else "")
            verb, status = method.upper(), answer.status
            if (status == 303 and verb != "HEAD") or (status in (301, 302) and verb == "POST"):
                method = "GET"
                options = {name: options[name] for name in options.keys() & {"headers", "timeout"}}
        raise StarioError(f"{method} {path}: more than 20 redirects")

    get = functools.partialmethod(request, "GET")
    post = functools.partialmethod(request, "POST")
    put = functools.partialmethod(request, "PUT")
    patch = functools.partialmethod(request, "PATCH")
    delete = functools.partialmethod(request, "DELETE")

    async def _request(self, method: str, path: str, wait: bool, **options: Any) -> TestResponse:
        pieces: list[bytes] = []
        stream = await self._send(method, path, **options)
        try:
            async with stream._awaiting("its answer"):
                while piece := await stream._read_piece():
                    pieces.append(piece)
            if wait:
                await stream._wait_for_handler()
                stream._raise_failure()
        finally:
            if wait:
                await stream._hang_up()
            else:
                self._unfinished.append(stream)
        set_cookies = self._jar.take(stream.headers)
        return TestResponse(stream.status, stream.headers, b"".join(pieces), set_cookies)

    @asynccontextmanager
    async def stream(self, method: str, path: str, **options: Any) -> AsyncIterator[TestStream]:
        """Send a request and read the events of its answer.

            async with client.stream("GET", "/live") as stream:
                assert "Ada" in (await anext(stream)).elements

        At the end of the block the client hangs up, and waits until the handler has ended.
        Options: see `request`.
        """
        stream = await self._send(method, path, **options)
        try:
            await stream._settle()
            self._jar.take(stream.headers)
            yield stream
        finally:
            await stream._hang_up()
        stream._raise_failure()

    async def _send(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        signals: object = None,
        json: object = None,
        form: Mapping[str, object] | None = None,
        files: Mapping[str, tuple[str, bytes]] | None = None,
        body: bytes = b"",
        timeout: float | None = None,
        **unknown: object,
    ) -> TestStream:
        for option in unknown:
            _check_word("option", option, self._send.__kwdefaults__ or ())  # (30)
        if self.app._life.loop is None:  # (24)
            raise StarioError("write `async with TestClient(app) as client:` around it")
        for option, given in (("headers", headers), ("form", form), ("files", files)):
            if not isinstance(given, Mapping | None):
                raise StarioError(f"{option} is a dict, not {given!r}")
        method, path, body = method.upper(), path.partition("#")[0], _bytes(body)
        fields: dict[str, object] = {"host": self.host}
        if cookies := self._jar.header(path):
            fields["cookie"] = cookies
        if signals is not None:
            fields["datastar-request"] = "true"
            if method in ("GET", "HEAD", "DELETE"):
                path += ("&" if "?" in path else "?") + urlencode(
                    {"datastar": _json(signals, _encode_sent)}, errors="replace"
                )
            else:
                json = signals
        body, kind = _sent_body(json, form, files, body)
        if kind:
            fields["content-type"] = kind
        if body:
            fields["content-length"] = str(len(body))
        fields.update({name.lower(): value for name, value in (headers or {}).items()})
        stream = TestStream(self, f"{method} {path}", timeout or self.timeout)
        await stream._send(_sent_head(method, path, fields), body)
        return stream


def _sent_head(method: str, path: str, fields: Mapping[str, object]) -> str:
    """The head of a request, with the empty line at its end."""
    target = quote(path, safe="/?&=%:@!$'()*+,;~[]-._{}|\\", errors="replace")
    lines = [f"{method} {target} HTTP/1.1"]
    for name, value in fields.items():
        sent = str(value).encode("utf-8" if name in _UTF_8_FIELDS else "latin-1", "replace")
        lines.append(": ".join(_field(name, sent)))
    return "\r\n".join([*lines, "", ""])


# -- Act 2 runs: the same app, in a browser with `asyncio.run(app.serve())`, and in a test.
#
#     async def hello(c: Context, w: Writer) -> None:
#         w.html(h.P("Hello, ", c.req.query.get("name", "world")))
#
#     app = Stario()
#     app.get("/", hello)
#
#     async def test_hello() -> None:
#         async with TestClient(app) as client:
#             answer = await client.get("/?name=you")
#             assert answer.text == "<p>Hello, you</p>"
#
#     # GET /?name=you -> <p>Hello, you</p>


# ==================================================================================================
# ACT 3. Live
#
# One click, followed from a button to another tab. Two tabs show this page. `data-init` runs when
# the page has loaded, so each tab has asked for `/live`, and the answer to that is still open:
#
#     <main data-init="@get('/live')">
#       <button data-on:click="@post('/click')">+1</button> <b id="count">0</b>
#     </main>
#
# The app behind it, without the handler that serves this page:
#
#     clicks, relay = 0, Relay()
#
#     async def live(c: Context, w: Writer) -> None:
#         messages = relay.subscribe("clicks")  # before the first patch, so none is missed
#         w.patch(h.B({"id": "count"}, clicks))
#         async for _ in w.alive(messages):
#             w.patch(h.B({"id": "count"}, clicks))
#
#     async def click(c: Context, w: Writer) -> None:
#         global clicks
#         clicks += 1
#         relay.publish("clicks", None)
#         w.empty()
#
# 1. Python has written the attributes (12), and Datastar in the browser acts on them: a click on
#    the button runs `@post('/click')`, which sends an ordinary request. Its body holds the page's
#    *signals*, the values that the page keeps under names. This page has none:
#
#     POST /click HTTP/1.1
#     datastar-request: true
#     content-type: application/json
#
#     {}
#
# 2. The handler `click` counts, publishes a message, and answers 204: it has nothing to show.
# 3. The relay (14) puts the message into the queue of each subscription. Each tab has a call of
#    `live` that waits for a message inside `alive` (13). It wakes, and the body of its loop runs.
# 4. The handler writes an event into its answer, which has been open since the page was loaded:
#
#     event: datastar-patch-elements
#     data: elements <b id="count">1</b>
#
# 5. Datastar in both tabs finds the element with the id `count`, and *morphs* it into the new one:
#    it changes only what differs, so focus and half-typed text are kept.
#
# When a tab is closed, `alive` ends the handler's loop, and the code after the loop runs.
# ==================================================================================================

# ==================================================================================================
# 12. Datastar: attributes and actions
#
# Datastar (https://data-star.dev, client 1.0) is the JavaScript in the page: the *client*. It reads
# `data-*` attributes, which hold JavaScript expressions. In them `$name` is a signal, a value that
# the page keeps; when a signal changes, everything that shows it is updated. `@get('/x')` is an
# action: it sends a request to the server, which answers with events that patch the page (part 13).
#
# `data.*` gives attributes as dicts, to put into an element; `at.*` gives actions as strings:
#
#     h.Button(data.on("click", at.post("/click")), "+1")
#     # <button data-on:click="@post('/click')">+1</button>
#
# The rule that must hold: text from users never becomes code. A str given as an *expression* is the
# developer's own code. All other values are written as JSON, ASCII only, with the six characters
# `@ $ ; < > &` escaped: `s("$5")` is `"\u00245"`. `@`, `$` and `;` are escaped because the client
# rewrites `$name` and `@name(` and splits at `;` before it runs an expression, even inside strings.
# `<`, `>` and `&` are escaped because the text may be inside a `<script>`, where `<!--`, `-->` and
# `</script` mean something; and a `<script>` inside SVG decodes `&quot;` to a quote.
# ==================================================================================================


def _script_json(value: object) -> str:
    """JSON that may be part of an expression, with the escapes of the rule above."""
    text = _json(value, _encode_script)
    for letter, escape in _ESCAPES:
        if letter in text:
            text = text.replace(letter, escape)
    if "__proto__" in text:  # `{"__proto__": x}` sets the prototype; `["__proto__"]` is a name
        text = re.sub(r'([{,])"__proto__":', r'\1["__proto__"]:', text)
    return text


_ESCAPES = [(letter, f"\\u{ord(letter):04x}") for letter in "@$;<>&"]


def _signals_json(signals: object, write: Callable[[object], str]) -> str:
    """Signals as a JSON object, by `_json` or `_script_json`."""
    text = write(signals)
    if not text.startswith("{"):
        raise StarioError(
            f"{type(signals).__name__} is no set of signals: give a dict from names to values, a "
            "dataclass, or anything with model_dump"
        )
    return text


def s(text: object) -> str:
    """A JavaScript string literal, safe in an expression: `f"$name = {s(user.name)}"`."""
    return _script_json(_as_text(text))


def js(mapping: Mapping[str, object] | None = None, /, **expressions: object) -> str:
    """A JavaScript object whose values are expressions: `js(total="$a + $b")`."""
    is_dict = isinstance(mapping, (Mapping, types.NoneType))
    if not is_dict or not all(isinstance(name, str) for name in mapping or ()):
        raise StarioError(f"give a dict from names to expressions in place of {mapping!r}")
    pairs = [
        ('["__proto__"]' if name == "__proto__" else s(name)) + f": {_code(code)}"
        for name, code in {**(mapping or {}), **expressions}.items()
    ]
    return "{" + ", ".join(pairs) + "}"


def _code(value: object) -> str:
    """A value where an expression is expected: a str is code, and True is `true`."""
    if type(value) is str:
        return value
    if _baking.get() and (mark := _mark_for(_code, value)):  # a blank of @baked (part 25)
        return mark
    if isinstance(value, SafeString) or callable(value):
        raise StarioError(f"an expression is JavaScript, as text: not {value!r}")
    return str.__str__(value) if isinstance(value, str) else _script_json(value)


def _signal_name(name: str) -> str:
    """The name of a signal, where the client wants a name and not an expression."""
    if not isinstance(name, str) or not re.fullmatch(r"[^\s$@;'\"(){}\[\]]+", name):
        raise StarioError(f"give the name of a signal, as in 'user.name', without $: not {name!r}")
    return str.__str__(name)


Duration = int | float | str  # seconds, whole or with a fraction; or text such as "250ms"
Timing = Duration | tuple[Any, ...]  # (0.5, "leading") adds flags: see `_TIME_FLAGS`
Pattern = str | re.Pattern[str] | None  # a regular expression, run by the browser; None: no filter
Expression = str | bool | int | float  # JavaScript code; a value other than text is written as JSON


class Modifiers(TypedDict, total=False):
    """When and how an event runs its expression: `once=True` makes `data-on:click__once`."""

    once: bool  # only the first event
    passive: bool  # it never prevents the browser's default action, so scrolling need not wait
    capture: bool  # before the elements inside it get the event
    window: bool  # events anywhere in the window,
    document: bool  # in the document,
    outside: bool  # or outside this element
    prevent: bool  # no default action: a form is not submitted, a link not followed
    stop: bool  # the elements around it do not get the event
    exit: bool  # for on_intersect: when it leaves the view
    half: bool  # for on_intersect: when half of it is visible,
    full: bool  # all of it,
    threshold: int  # or this many percent of it
    duration: Timing  # for on_interval
    delay: Duration  # wait this long
    debounce: Timing  # wait until no event has come for this long
    throttle: Timing  # let at most one event through per this time
    viewtransition: bool  # animate the change (the browser's View Transition API)


def _duration(name: str, value: Duration) -> str:
    """`2s` for 2, `500ms` for 0.5; not `0.5s`, because a dot would begin the next flag."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}(ms|s)", value):
        return value
    if isinstance(value, str) or not _is_amount(value):
        raise StarioError(f"{name}={value!r} is no duration: write seconds (0.5), or '500ms'")
    if value >= (1000 if name == "duration" else 100):  # probably meant as milliseconds
        raise StarioError(
            f"{name}={value!r} is {value} seconds. Milliseconds meant? Write {value / 1000:g}, or "
            f"'{value}s' if it is right"
        )
    return f"{round(value * 1000)}ms" if isinstance(value, float) else f"{value}s"


def _is_amount(value: object) -> bool:
    return type(value) in (int, float) and 0 <= cast(float, value) < 1e12


def _kebab(name: str) -> str:
    """HTML lower-cases attribute names: `valueAsNumber` is written `value-as-number`."""
    return re.sub(r"(?<!^)([A-Z])", r"-\1", name).lower()


def _modifier(name: str, value: object) -> str:
    """`__once` for True, nothing for False, `__debounce.500ms.leading` for (0.5, "leading")."""
    if value is None or value is False:
        return ""
    if name == "threshold":
        if type(value) is int and 0 <= value <= 100:
            return f"__threshold.{value}"
        raise StarioError(f"threshold={value!r}: a whole number of percent, 0 to 100")
    if value is True and name not in ("delay", "duration"):  # (`__debounce` alone: a time of 0)
        return f"__{name}"
    if name not in _TIME_FLAGS:
        raise StarioError(f"{name}={value!r}: write {name}=True")
    has_flags = isinstance(value, tuple) and value and _TIME_FLAGS[name]
    given: Any = value if has_flags else (value,)  # a time, and flags
    for flag in given[1:]:
        _check_word(f"flag of {name}", flag, _TIME_FLAGS[name])  # (part 30)
    return ".".join((f"__{name}", _duration(name, given[0]), *given[1:]))


# The modifiers that are times, each with the client's flags for it. A flag says whether the event
# at the start (leading) or at the end (trailing) of the time counts, where that is not the default.
_DELAYS: dict[str, tuple[str, ...]] = {
    "delay": (), "debounce": ("leading", "notrailing"), "throttle": ("noleading", "trailing"),
}  # fmt: skip
_TIME_FLAGS = {**_DELAYS, "duration": ("leading",)}
_MODIFIERS: dict[str, Collection[str]] = {  # by attribute: the client ignores all others
    "data-on": ("once", "passive", "capture", "window", "document", "outside", "prevent", "stop",
                *_DELAYS, "viewtransition"),
    "data-on-intersect": ("once", "exit", "half", "full", "threshold", *_DELAYS, "viewtransition"),
    "data-on-interval": ("duration", "viewtransition"),
    "data-on-signal-patch": _DELAYS,
    "data-init": ("delay", "viewtransition"),
}  # fmt: skip


def _attribute_name(start: str, modifiers: Mapping[str, object]) -> str:
    """`data-on:click__once` for `data-on:click` and `{"once": True}`."""
    if not modifiers:
        return start
    kind = start.partition(":")[0]
    known = _MODIFIERS[kind]
    for name in modifiers:
        if name not in known:
            _check_word(f"modifier of {kind}", name, known)
    return start + "".join(_modifier(name, modifiers[name]) for name in known if name in modifiers)


@lru_cache(maxsize=256)
def _event_name(event: str) -> str:
    """`data-on:user-saved__case.camel`: the client turns `user-saved` back into `userSaved`."""
    if not 0 < len(event) <= 100:  # (names are cached, so they must be short)
        raise StarioError(f"{event[:60]!r} is no event's name: one of at most 100 characters")
    if event.lower() in ("onclick", "onsubmit", "oninput", "onchange", "onkeydown"):
        raise StarioError(f"no event {event!r}: without 'on', {event[2:].lower()!r}")
    kebab = _kebab(event)
    back = re.sub("-[a-z]", lambda found: found[0][1].upper(), kebab)
    if "__" in event or event[0] == "@" or (kebab != event and back[1:] != event[1:]):
        raise StarioError(f"the event {event!r} cannot be named in an attribute: rename it")
    case = "" if kebab == event else "__case.pascal" if event[0].isupper() else "__case.camel"
    return f"data-on:{kebab}{case}"


def _regex(pattern: str | re.Pattern[str]) -> str:
    """A JavaScript literal, `/^user\\./i`. What would end it or be rewritten is escaped."""
    text, flags = pattern, ""
    if isinstance(pattern, re.Pattern) and isinstance(pattern.pattern, str):
        text = re.sub(r"^\(\?[aimsux]+\)", "", pattern.pattern)  # `(?i)` is in the flags, too
        flags = "".join(letter for flag, letter in _REGEX_FLAGS.items() if pattern.flags & flag)
        if pattern.flags & re.VERBOSE:
            raise StarioError("a browser knows no re.VERBOSE: write the pattern without it")
    if not isinstance(text, str):
        raise StarioError(f"{pattern!r} is no pattern: give a regular expression as text")
    return f"/{_REGEX_SPECIAL.sub(_regex_escape, str.__str__(text)) or '(?:)'}/{flags}"


_REGEX_FLAGS = {re.IGNORECASE: "i", re.MULTILINE: "m", re.DOTALL: "s"}
# What may need an escape: a backslash with the character after it, a `$` before what could be the
# name of a signal, and the characters that would end the literal or be rewritten.
_REGEX_SPECIAL = re.compile(r"\\[\s\S]?|\$(?=[\w-])|[/@;\n\r\u2028\u2029]")


def _regex_escape(found: re.Match[str]) -> str:
    text = found[0]
    if text in ("/", "\\"):
        return "\\" + text
    return f"\\u{ord(text[-1]):04x}" if text[-1] in "$@;\n\r\u2028\u2029" else text


def _filter(include: Pattern, exclude: Pattern) -> str | None:
    """`{include: /^user/, exclude: /id$/}`, or None for all signals."""
    given = {"include": include, "exclude": exclude}
    parts = [f"{name}: {_regex(value)}" for name, value in given.items() if value is not None]
    return "{" + ", ".join(parts) + "}" if parts else None


class DataAttributes:
    """Datastar's attributes, each as a dict to put into an element: `h.Div(data.text("$name"))`.

    Expressions are JavaScript. Durations are seconds (`1`, `0.5`) or text (`"250ms"`).
    See https://data-star.dev/reference/attributes.
    """

    def signals(self, signals: object, ifmissing: bool = False) -> Attributes:
        """Set signals from a dict, a dataclass, or anything with `model_dump`.

        With `ifmissing`, only those that the page does not have yet.
        """
        name = "data-signals__ifmissing" if ifmissing else "data-signals"
        return {name: _signals_json(signals, _script_json)}

    def bind(
        self, signal: str, *, prop: str | None = None, event: str | Sequence[str] | None = None
    ) -> Attributes:
        """Keep a form field and a signal equal, in both directions.

        `prop` is the element's property to bind (`"checked"` of a component of your own). `event`
        names one event or several, after which the property is read.
        """
        one_event = isinstance(event, str) or not isinstance(event, Iterable)
        props = [] if prop is None else [_kebab(prop) if isinstance(prop, str) else prop]
        events = [] if event is None else [event] if one_event else list(event)
        for word in (*props, *events):
            if not (isinstance(word, str) and re.fullmatch(r"[^A-Z\s._]+", word)):
                raise StarioError(f"{word!r} cannot be named in an attribute: small letters only")
        name = "data-bind" + "".join([f"__prop.{word}" for word in props])
        if events:
            name += ".".join(["__event", *events])  # `data-bind__prop.checked__event.input.change`
        return {name: _signal_name(signal)}

    def text(self, expression: Expression) -> Attributes:
        """Show the expression's value as the element's text."""
        return {"data-text": _code(expression)}

    def show(self, expression: Expression) -> Attributes:
        """Show the element only while the expression is true."""
        return {"data-show": _code(expression)}

    def class_(self, classes: Mapping[str, Expression]) -> Attributes:
        """Give the element each class whose expression is true: `{"is-open": "$open"}`."""
        return {"data-class": js(classes)}

    def attr(self, attributes: Mapping[str, Expression]) -> Attributes:
        """Set attributes to the values of expressions: `{"disabled": "$busy"}`."""
        return {"data-attr": js(attributes)}

    def style(self, styles: Mapping[str, Expression]) -> Attributes:
        """Set CSS properties to the values of expressions."""
        return {"data-style": js(styles)}

    def computed(self, signals: Mapping[str, Expression]) -> Attributes:
        """Define signals that are computed from others: `{"total": "$price * $count"}`."""
        js(signals)  # (refuses anything but a dict)
        getters = {_signal_name(n): f"() => ({_code(code)})" for n, code in signals.items()}
        return {"data-computed": js(getters)}

    def effect(self, expression: Expression) -> Attributes:
        """Run the expression now, and again whenever a signal in it changes."""
        return {"data-effect": _code(expression)}

    def init(self, expression: Expression, **modifiers: Unpack[Modifiers]) -> Attributes:
        """Run the expression when the element enters the page (`delay`, `viewtransition`)."""
        return {_attribute_name("data-init", modifiers): _code(expression)}

    def on(self, event: str, expression: Expression, **modifiers: Unpack[Modifiers]) -> Attributes:
        """Run the expression at an event: `data.on("click", at.post("/click"), debounce=0.5)`."""
        if not isinstance(event, str):
            raise StarioError(f"{event!r} is no event's name: give one, as text")
        return {_attribute_name(_event_name(event), modifiers): _code(expression)}

    def on_intersect(self, expression: Expression, **modifiers: Unpack[Modifiers]) -> Attributes:
        """Run the expression when the element scrolls into view (or out, with `exit`)."""
        return {_attribute_name("data-on-intersect", modifiers): _code(expression)}

    def on_interval(self, expression: Expression, **modifiers: Unpack[Modifiers]) -> Attributes:
        """Run the expression every `duration` (one second without it)."""
        return {_attribute_name("data-on-interval", modifiers): _code(expression)}

    def on_signal_patch(
        self,
        expression: Expression,
        *,
        include: Pattern = None,
        exclude: Pattern = None,
        **modifiers: Unpack[Modifiers],
    ) -> Attributes:
        """Run the expression when signals change; with a filter, only if their names match."""
        name = _attribute_name("data-on-signal-patch", modifiers)
        attributes: Attributes = {name: _code(expression)}
        if names := _filter(include, exclude):
            attributes["data-on-signal-patch-filter"] = names
        return attributes

    def indicator(self, signal: str) -> Attributes:
        """Set the signal to true while a request sent by this element is unanswered."""
        return {"data-indicator": _signal_name(signal)}

    def ref(self, signal: str) -> Attributes:
        """Put the element itself into a signal."""
        return {"data-ref": _signal_name(signal)}

    def ignore(self, *, self_only: bool = False) -> Attributes:
        """Make Datastar ignore the element and its content (or only the element itself)."""
        return {"data-ignore__self" if self_only else "data-ignore": True}

    def ignore_morph(self) -> Attributes:
        """Leave the element as it is when a patch arrives."""
        return {"data-ignore-morph": True}

    def json_signals(
        self, *, include: Pattern = None, exclude: Pattern = None, terse: bool = False
    ) -> Attributes:
        """Show all signals (or those whose names match) as JSON, to debug; `terse` on one line."""
        name = "data-json-signals__terse" if terse else "data-json-signals"
        return {name: _filter(include, exclude) or True}

    def preserve_attr(self, *names: str) -> Attributes:
        """Keep these attributes of the element as they are when a patch arrives."""
        if not names or not all(isinstance(name, str) for name in names):
            raise StarioError(f"give names of attributes, preserve_attr('open'), not {names!r}")
        return {"data-preserve-attr": " ".join(names)}


data = DataAttributes()


PatchMode = Literal["outer", "inner", "replace", "prepend", "append", "before", "after", "remove"]
_PATCH_WORDS = {"mode": typing.get_args(PatchMode), "namespace": ("html", "svg", "mathml")}


class ResponseOverrides(TypedDict, total=False):
    """Where to patch an answer that is not an event stream; overrides its `datastar-*` fields."""

    selector: str
    mode: PatchMode  # see `w.patch` (part 13)
    namespace: Literal["html", "svg", "mathml"]
    use_view_transition: bool
    only_if_missing: bool  # of signals


class RequestOptions(TypedDict, total=False):
    """The options of a request: see https://data-star.dev/reference/actions."""

    content_type: Literal["json", "form"]  # the signals, or the form around the element
    include: Pattern  # the signals to send: those whose names match,
    exclude: Pattern  # and those whose names do not
    selector: str  # a CSS selector for the form to send
    headers: Mapping[str, str]  # more request headers
    open_when_hidden: bool  # keep the stream while the tab is hidden (False for GET)
    payload: object  # what to send in place of the signals; a str is an expression
    # When to ask again. "auto": if the connection broke. "error": also if the status was 4xx or
    # 5xx. "always": also if the stream ended normally. "never": not at all.
    retry: Literal["auto", "error", "always", "never"]
    retry_interval_ms: int  # the wait before the first retry (1000)
    retry_scaler: float  # each wait is the one before times this (2),
    retry_max_wait_ms: int  # and at most this long (30000)
    retry_max_count: int  # retries before it gives up (10)
    # What cancels the request. "auto": the next request with its method and URL. "cleanup": also
    # when its element leaves the page. "disabled": nothing. Anything else is an expression whose
    # value is an AbortController: `$controller`, `window.controller`.
    request_cancellation: str
    response_overrides: ResponseOverrides


# What an option may be: one of these words (the client's default first), or a value of this type.
_OPTION_KINDS: dict[str, Any] = {
    "content_type": ("json", "form"),
    "retry": ("auto", "error", "always", "never"),
    "request_cancellation": ("auto", "cleanup", "disabled"),
    "selector": str, "headers": Mapping, "response_overrides": Mapping, "open_when_hidden": bool,
}  # fmt: skip
_KIND_NAMES: dict[Any, str] = {str: "text", bool: "True or False", Mapping: "a dict"}
_RETRY_DEFAULTS = {
    "retry_interval_ms": 1000, "retry_scaler": 2, "retry_max_wait_ms": 30_000,
    "retry_max_count": 10,
}  # fmt: skip
# Parameters for a URL. A list as a value gives one parameter for each item; None is left out.
Queries = Mapping[str, object] | None
_PLAIN_URL = re.compile(r"[A-Za-z0-9/_.~?&=%:+,#-]*")


class Actions:
    """Datastar's actions, as text for expressions: `at.post("/click", {"cellId": 3})`.

    `queries` are added to the URL. For the options see `RequestOptions`.
    """

    def get(self, url: str, queries: Queries = None, **options: Unpack[RequestOptions]) -> str:
        """Send a GET request, with the signals in the query: `@get('/subscribe')`."""
        return _write_action("get", url, queries, options)

    def post(self, url: str, queries: Queries = None, **options: Unpack[RequestOptions]) -> str:
        """Send a POST request, with the signals as JSON."""
        return _write_action("post", url, queries, options)

    def put(self, url: str, queries: Queries = None, **options: Unpack[RequestOptions]) -> str:
        """Send a PUT request, with the signals as JSON."""
        return _write_action("put", url, queries, options)

    def patch(self, url: str, queries: Queries = None, **options: Unpack[RequestOptions]) -> str:
        """Send a PATCH request, with the signals as JSON."""
        return _write_action("patch", url, queries, options)

    def delete(self, url: str, queries: Queries = None, **options: Unpack[RequestOptions]) -> str:
        """Send a DELETE request, with the signals in the query."""
        return _write_action("delete", url, queries, options)

    def query(self, url: str, queries: Queries = None, **options: Unpack[RequestOptions]) -> str:
        """Send QUERY: a GET with a JSON body. It needs client 1.0.4; `DATASTAR_URL` is older."""
        return _write_action("query", url, queries, options)

    def peek(self, expression: Expression) -> str:
        """The expression's value, without running the code around it when its signals change."""
        return f"@peek(() => {_code(expression)})"

    def set_all(self, value: object, *, include: Pattern = None, exclude: Pattern = None) -> str:
        """Set all signals (or those whose names match) to a value; a str is an expression."""
        return f"@setAll({', '.join(filter(None, (_code(value), _filter(include, exclude))))})"

    def toggle_all(self, *, include: Pattern = None, exclude: Pattern = None) -> str:
        """Toggle all signals (or those whose names match) between true and false."""
        return f"@toggleAll({_filter(include, exclude) or ''})"


at = Actions()


def _write_action(method: str, url: str, queries: Queries, options: RequestOptions) -> str:
    if _baking.get() and (mark := _mark_for(_write_action, method, url, queries, options)):
        return mark
    written = _request_options(method, options) if options else ""
    pairs: list[tuple[str, str]] = []  # names and values; a list in `queries` is several pairs
    try:
        url = url if type(url) is str else str.__str__(url)
        size = len(url) + len(written)
        for name, value in queries.items() if queries else ():
            name = name if type(name) is str else _as_text(name)
            for text in _texts(name, value):
                pairs.append((name, text))
                size += len(name) + len(text) + 2
        # A view writes the same actions at each call, so short ones are cached.
        write = _cached_action if size < _KEPT_TEXT else _action
        return write(method, url, written, tuple(pairs))
    except (TypeError, AttributeError) as exc:
        if isinstance(url, str) and (queries is None or hasattr(queries, "items")):
            raise  # url and queries are fine: the `__str__` of a value failed
        wrong = f"not with {url!r} and {queries!r}"
        raise StarioError(f"write at.{method}('/x', {{'id': 3}}), {wrong}") from exc


def _texts(name: str, value: object) -> list[str]:
    """The texts of one query parameter: several for a list, none for None."""
    if type(value) is str or type(value) is int:  # the usual case
        return [str(value)]
    if isinstance(value, (Mapping, bytes, bytearray)):
        raise StarioError(f"{type(value).__name__} cannot be in a query (as {name!r}): give text")
    if isinstance(value, Iterable) and not isinstance(value, (str, enum.Enum)):
        return [text for item in value for text in _texts(name, item)]
    return [] if value is None else [_as_text(value)]


def _action(method: str, url: str, options: str, queries: tuple[tuple[str, str], ...]) -> str:
    """`@post('/click?cellId=3', {retry: "never"})`"""
    if queries:
        url, number_sign, fragment = url.partition("#")
        url += ("&" if "?" in url else "?") + urlencode(queries, errors="replace")
        url += number_sign + fragment
    address = f"'{url}'" if _PLAIN_URL.fullmatch(url) else s(url)
    return f"@{method}({address}{options})"


_cached_action = lru_cache(maxsize=2048)(_action)


def _request_options(method: str, options: RequestOptions) -> str:
    """`, {retry: "never"}`: only what differs from the client's defaults; empty if nothing does."""
    given = cast("dict[str, Any]", dict(options))
    names = _filter(given.pop("include", None), given.pop("exclude", None))
    written = [f"filterSignals: {names}"] if names else []
    defaults = {**_RETRY_DEFAULTS, "open_when_hidden": method != "get"}
    for name, value in given.items():
        _check_word("option", name, RequestOptions.__annotations__)
        kind = _OPTION_KINDS.get(name)
        default = kind[0] if isinstance(kind, tuple) else defaults.get(name)
        if value is None or value == default:
            continue
        written.append(f"{_camel(name.removesuffix('_ms'))}: {_option_text(name, value)}")
    return f", {{{', '.join(written)}}}" if written else ""


@lru_cache(maxsize=64)
def _camel(name: str) -> str:
    return re.sub("_([a-z])", lambda found: found[1].upper(), name)


def _option_text(name: str, value: Any) -> str:
    """An option's value: a word that the client knows, an expression, a number, an object."""
    # ("$controller" is an expression; "clean", a lone word, is a mistake)
    is_expression = isinstance(value, str) and re.search(r"[^\w-]", value) is not None
    if name == "payload" or (name == "request_cancellation" and is_expression):
        return _code(value)
    kind = _OPTION_KINDS.get(name, object)
    if isinstance(kind, tuple):
        _check_word(name, value, kind)
    elif not isinstance(value, kind):
        raise StarioError(f"{name} is {_KIND_NAMES[kind]}, not {value!r}")
    elif name in _RETRY_DEFAULTS and not _is_amount(value):
        raise StarioError(f"{name}={value!r}: a number, 0 or more")
    elif name == "response_overrides":
        for key in value:
            _check_word("override", key, ResponseOverrides.__annotations__)
            if key in _PATCH_WORDS:
                _check_word(key, value[key], _PATCH_WORDS[key])
        value = {_camel(key): item for key, item in value.items()}
    return _script_json(value)


DATASTAR_URL = "https://cdn.jsdelivr.net/gh/starfederation/datastar@1.0.2/bundles/datastar.js"
DATASTAR_INTEGRITY = "sha384-SnyFlWTdFL3c8+9/1WsPuMFBq6AQOGC1LmS9upY4YkM3En3wZr5q2UvydHaMgOVG"


def datastar_script(src: str | None = None, *, nonce: str | None = None) -> SafeString:
    """The `<script>` that loads Datastar: put it into `<head>`.

    Without `src` it loads the official bundle from its CDN. If that fails or takes longer than 1.5
    seconds, it loads the pocket client (part 31) from this server instead. They never both run: the
    bundle is fetched as text, and run only when it is complete and has the right hash. With `src`
    only that copy is loaded. `nonce` is that of the page's Content-Security-Policy.
    """
    attributes = {"type": "module", "nonce": nonce or False}
    if src is not None:
        return h.Script(attributes, {"src": src})
    if Stario._pocket is None:  # this copy of the file has no pocket client
        attributes |= {"integrity": DATASTAR_INTEGRITY, "crossorigin": "anonymous"}
        return h.Script(attributes, {"src": DATASTAR_URL})
    pocket = "/_stario/" + asset("pocket.js", collection="_stario")  # part 19
    return h.Script(
        attributes,
        f"""
const official = "{DATASTAR_URL}";
const integrity = "{DATASTAR_INTEGRITY}";
let client = "{pocket}";
try {{
  const answer = await fetch(official, {{ integrity, signal: AbortSignal.timeout(1500) }});
  if (!answer.ok) throw new Error(`status ${{answer.status}}`);
  client = URL.createObjectURL(new Blob([await answer.text()], {{ type: "text/javascript" }}));
}} catch (reason) {{
  console.info(`Datastar's CDN is out of reach (${{reason.message}}): using the pocket client.`);
}}
await import(client);
""",
    )


# ==================================================================================================
# 13. Streams: events, and staying with a client
#
# A stream is an answer that stays open. Its body is *events* (HTML standard, section 9.2.5), each
# a few lines of text. The handler writes them, and waits inside `alive` for the next item:
#
#     async for subject, message in w.alive(relay.subscribe("chat")):  # waits here
#         w.patch(h.P({"id": "last"}, message))
#     print("the tab is closed, or the server stops")
#
# How a disconnect travels:
# 1. The carrier learns that the client has gone: its socket is closed, or it has not acknowledged a
#    heartbeat (the line `:`, sent when there is no news). Or it learns that the server stops.
# 2. It ends its *scopes*. A scope is a stretch of a handler that may be interrupted: here, one wait
#    of the loop. The scope cancels its task: asyncio raises CancelledError where the task waits.
# 3. The scope catches this error, as its own, and the loop ends as if its source had ended.
#
# The loop's body is not interrupted, even while it waits: the loop ends when it asks for the next
# item. The block of `async with w.alive()` is one scope, and may be interrupted at any await.
# ==================================================================================================


# -- Events. The format is that of Datastar's SDK specification (sdk/ADR.md in its repository): the
# fields in the order event, id, retry, data, and only what differs from a default. A line break of
# any kind in a value starts a new `data:` line, so no text can forge an event.

_LINE_BREAK = re.compile(r"\r\n|\r|\n")


def _data_lines(text: str, key: str = "") -> str:
    """Text as the data lines of an event, each with `key` in it: `data: elements <p>Hello</p>`."""
    # Most HTML is a single line, and these two searches are quicker than the regex.
    if "\n" in text or "\r" in text:
        text = _LINE_BREAK.sub(f"\ndata: {key}", text)
    return "".join(("data: ", key, text, "\n"))  # (an f-string would copy the text once more)


def _one_line(value: object) -> str:
    text = _as_text(value)
    if isinstance(value, (bytes, types.NoneType)) or "\0" in text or _LINE_BREAK.search(text):
        raise StarioError(f"event, id and selector are text without line breaks: not {text[:60]!r}")
    return text


# HTML whose first element needs no selector: the client finds it by its id, or it is <html>, <head>
# or <body>. (`<!` is a doctype or a comment.) An element that is not found has no effect.
_HAS_PLACE = re.compile(r"\s*<(!|(html|head|body)(?![^\s>/])|[a-z][^>]*\sid\s*=)", re.IGNORECASE)

_CACHED_CALLS, _CACHED_SIZE = 4, 256 * 1024  # the last 4 calls, each with at most 256 KiB of text


def _cache_last(make: Callable[P, T]) -> Callable[P, T]:
    """A decorator that keeps the last results: what goes to a thousand streams is made once.

    The first argument is text or bytes. `lru_cache` would read all of it to hash it. This compares
    it with the last ones; their lengths mostly differ, and then nothing is read.
    """
    calls: tuple[tuple[object, T], ...] = ()  # replaced as a whole, so threads can share it

    @wraps(make)
    def give(*arguments: P.args, **options: P.kwargs) -> T:
        nonlocal calls
        asked = arguments, options
        for known, result in calls:
            if known == asked:
                return result
        result = make(*arguments, **options)
        if len(cast("str | bytes", arguments[0])) <= _CACHED_SIZE:
            calls = ((asked, result), *calls[: _CACHED_CALLS - 1])
        return result

    return give


@_cache_last
def _patch_data(
    html: str,
    mode: PatchMode = "outer",
    selector: str | None = None,
    namespace: str | None = None,
    use_view_transition: bool = False,
    view_transition_selector: str | None = None,
) -> bytes:
    """The data lines of `datastar-patch-elements`."""
    _check_word("patch mode", mode, _PATCH_WORDS["mode"])
    _check_word("namespace", namespace or "html", _PATCH_WORDS["namespace"])
    if selector is not None and (not isinstance(selector, str) or selector.startswith("<")):
        raise StarioError(f"a selector is text, as '#cart', not {selector!r}")
    if not selector and mode not in ("outer", "replace"):
        raise StarioError(f"mode {mode!r} needs a selector: only outer and replace do without")
    has_id = html.find(" id=", 0, html.find(">") + 1) > 0  # the usual case: no regex needed
    if html and not selector and not has_id and not _HAS_PLACE.match(html):
        raise StarioError(
            f"no place for {html[:60]!r}: give the element an id that the page has, or say "
            "where with selector= and mode="
        )
    lines = f"data: selector {_one_line(selector)}\n" if selector else ""
    if mode != "outer":
        lines += f"data: mode {_as_text(mode)}\n"
    if namespace and namespace != "html":
        lines += f"data: namespace {_as_text(namespace)}\n"
    if use_view_transition:
        lines += "data: useViewTransition true\n"
    if view_transition_selector:
        lines += f"data: viewTransitionSelector {_one_line(view_transition_selector)}\n"
    if html:
        lines += _data_lines(html, "elements ")
    return lines.encode("utf-8", "replace")


_STREAM_FIELDS = (  # no proxy may answer from a cache or hold events back (nginx: the last field)
    b"content-type: text/event-stream\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"
)


class EventOptions(TypedDict, total=False):
    """Options of every event, for when the connection breaks and the client asks again.

    That request carries `id` as `last-event-id`; before it, the client waits `retry` milliseconds.
    """

    id: str | None
    retry: int | None


class _EventWriter(_OneShotWriter):
    """Streams of events. The first event also sends the head of the answer."""

    def patch(
        self,
        node: object,
        *,
        mode: PatchMode = "outer",
        selector: str | None = None,
        namespace: str | None = None,
        use_view_transition: bool = False,
        view_transition_selector: str | None = None,
        **options: Unpack[EventOptions],
    ) -> None:
        """Patch elements into the page: by their ids, or into what `selector` finds.

        Modes: `outer` morphs the element that is found, `inner` its content, `replace` puts a new
        one there; `prepend` and `append` add inside of it, `before` and `after` beside it; `remove`
        removes it. Without a selector only outer and replace. `use_view_transition` animates the
        change, within `view_transition_selector`.
        https://data-star.dev/reference/sse_events
        """
        html = node if type(node) is SafeString else render(node)
        data = _patch_data(
            html, mode, selector, namespace, use_view_transition, view_transition_selector
        )
        self._send_event("datastar-patch-elements", data, **options)

    def remove(
        self, selector: str, *, use_view_transition: bool = False, **options: Unpack[EventOptions]
    ) -> None:
        """Remove the elements that `selector` finds."""
        data = _patch_data("", "remove", selector, None, use_view_transition)
        self._send_event("datastar-patch-elements", data, **options)

    def sync(
        self, signals: object, *, only_if_missing: bool = False, **options: Unpack[EventOptions]
    ) -> None:
        """Set the page's signals: a dict, a dataclass, anything with `model_dump`, or JSON text.

        Other signals stay as they are. A value of None removes its signal.
        """
        if isinstance(signals, str):
            text, decoded = _as_text(signals), None
            with suppress(ValueError, RecursionError):
                decoded = _json_decoder.decode(text)
            if not isinstance(decoded, dict):
                raise StarioError(f"no JSON object: {text[:60]!r}; give a dict of names and values")
        else:
            text = _signals_json(signals, _json)
        lines = "data: onlyIfMissing true\n" if only_if_missing else ""
        lines += _data_lines(text, "signals ")
        self._send_event("datastar-patch-signals", lines.encode("utf-8", "replace"), **options)

    def execute(
        self,
        js: str,
        *,
        auto_remove: bool = True,
        attributes: Mapping[str, object] | None = None,
        nonce: str | None = None,
        **options: Unpack[EventOptions],
    ) -> None:
        """Run JavaScript in the page: a `<script>` whose `data-effect` removes it afterwards.

        `nonce` is that of the page's Content-Security-Policy.
        """
        own = {"data-effect": auto_remove and "el.remove()", "nonce": nonce or False}
        data = _patch_data(h.Script({**own, **(attributes or {})}, js), "append", "body")
        self._send_event("datastar-patch-elements", data, **options)

    def navigate(
        self, url: str, *, nonce: str | None = None, **options: Unpack[EventOptions]
    ) -> None:
        """Send the browser to another page. (`nonce` as in `execute`.)"""
        _check_target(url)
        scheme = url.strip().partition(":")[0].lower()  # (as a browser does: URL standard, 4.4)
        if scheme in ("javascript", "data", "vbscript"):
            raise StarioError(f"{url[:60]!r} is a program, no page: navigate goes to pages only")
        # In a timer, so that the client first finishes its work for this event.
        address = _script_json(url.replace("\\", "%5C"))  # (as `_redirect` writes it)
        script = f"setTimeout(() => {{ window.location = {address} }})"
        self.execute(script, nonce=nonce, **options)

    def redirect(self, url: str, status: int = 307) -> None:
        """Send the client to another address (303 if it should GET that after a POST).

        A request that Datastar sends comes from inside a page, and is answered with `navigate`: the
        client would follow a redirect itself, and patch the other page into the open one.
        """
        if self._request.is_datastar and not self.started:
            _check_target(url, status)
            self.navigate(url)
            self.end()
        else:
            self._redirect(url, status)

    def event(self, name: str, data: str = "", **options: Unpack[EventOptions]) -> None:
        """Send a plain server-sent event (HTML standard, 9.2), for clients other than Datastar."""
        if not isinstance(data, str):
            raise StarioError(f"an event's data is text, not {type(data).__name__}: json.dumps it")
        self._send_event(_one_line(name), _data_lines(data).encode("utf-8", "replace"), **options)

    def _send_event(
        self, name: str, data: bytes, id: str | None = None, retry: int | None = None
    ) -> None:
        """Send one event. `data` holds whole lines, as `_data_lines` writes them."""
        head = f"event: {name}\n"
        if id is not None:
            head += f"id: {_one_line(id)}\n"
        if retry is not None:
            if not isinstance(retry, int) or isinstance(retry, bool) or retry < 0:
                raise StarioError(f"retry={retry!r}: give whole milliseconds")
            head += f"retry: {int(retry)}\n"
        if not self.started:
            self._begin_events()
        elif not self._is_stream:
            raise StarioError("this answer was started as something else than a stream of events")
        self.write(b"%b%b\n" % (head.encode("utf-8", "replace"), data))

    def _begin_events(self) -> None:
        self._begin(200, _STREAM_FIELDS, None)
        self._is_stream = True


class Writer(_EventWriter):
    """The answer to one request: `w`. Each handler gets one, and answers through it.

    `status_code` is 0 until the head is sent. Then `started` is True, and at the end `completed`.
    """

    _timer: asyncio.TimerHandle | None = None  # the next heartbeat

    @typing.overload
    def alive(
        self, source: AsyncIterable[T], *, every: None = None, heartbeat: float | None = 15.0
    ) -> Alive[T]: ...

    @typing.overload
    def alive(
        self, source: None = None, *, every: float | None = None, heartbeat: float | None = 15.0
    ) -> Alive[None]: ...

    def alive(
        self,
        source: AsyncIterable[Any] | None = None,
        *,
        every: float | None = None,
        heartbeat: float | None = 15.0,
    ) -> Alive[Any]:
        """Stay with the client until it goes, the server stops, or the source ends.

        `async for item in w.alive(source)` yields the items of the source; `w.alive(every=0.5)`
        yields None, at once and then every half second. `async for _ in w.alive()` is for a body
        that does its own waiting: the body runs again at once, or after a quarter of a second if it
        neither wrote nor waited. A loop ends only between two rounds; an `async with w.alive()`
        block is interrupted where it waits. The code after either runs unless the body raises.
        `alive` yields no item while more than 64 KiB are waiting to be sent to the client. While
        an event stream is silent, a comment (`:`) is sent every `heartbeat` seconds.
        """
        if not (heartbeat is None or _is_amount(heartbeat)):
            raise StarioError(f"heartbeat={heartbeat!r} is neither a number of seconds nor None")
        if every is not None:
            if source is not None or not _is_amount(every) or not every:
                raise StarioError("alive takes a source, or every= with seconds above 0")
            source = _ticks(every)
        elif source is not None and not hasattr(source, "__aiter__"):
            raise StarioError(
                "alive takes what `async for` can loop over, as relay.subscribe(...) gives it, not "
                f"{type(source).__name__}; for ticks write w.alive(every=0.5)"
            )
        return Alive(self, source, heartbeat)

    def _is_over(self) -> bool:
        """Whether a stream has lost its reader, or never had one: HEAD asks for no body."""
        carrier = self._carrier
        return carrier.disconnected or carrier.shutting_down or self._request.method == "HEAD"

    def _start_heartbeat(self, seconds: float | None) -> None:
        self._stop_heartbeat()
        if seconds:
            # asyncio keeps a cancelled timer until it would have been due, and a timer keeps its
            # context variables. An empty context lets the request of an ended stream be freed.
            self._timer = asyncio.get_running_loop().call_later(
                seconds, self._beat, seconds, self._writes, context=contextvars.Context()
            )

    def _stop_heartbeat(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _beat(self, seconds: float, writes: int) -> None:
        """Send a comment if nothing was written since `_start_heartbeat`, and check the peer."""
        if self.completed or self._carrier.disconnected:
            return
        self._carrier.check_peer(seconds)
        accepted = ",".join(self._request.headers.getlist("accept"))
        if not self.started and "text/event-stream" in accepted:
            self._begin_events()  # else the client, or a proxy in between, may give up
        if self._is_stream and self._writes == writes:
            self.write(b":\n\n")
        self._start_heartbeat(seconds)


Stario._writer = Writer


_CLEANUP = 1.0  # seconds for a handler's last code: a `finally`, or the code after an `alive`


class _Scope:
    """A stretch of a handler that ends when the client goes or the server stops.

    A task counts how often it was cancelled. `task.cancel()` raises CancelledError at its await and
    adds one to `task.cancelling()`; `task.uncancel()` subtracts one. A scope cancels its task, and
    uncancels it at `__exit__`. If the count is then what it was at `__enter__`, nobody else has
    cancelled the task, and the scope swallows the error. (`asyncio.timeout` counts this way, too.)

    Scopes of one task may be nested. One of them cancels; the innermost swallows the error, and its
    `__exit__` interrupts those around it: an `async with` block at its next await, a loop after
    `_CLEANUP` seconds. (Loops nest if `source` in `w.alive(source())` is a generator with a loop
    over `w.alive()` of its own. It then has these seconds for its code after that inner loop.)
    """

    __slots__ = (
        "_cancels_before", "_interrupting", "_is_block", "_is_ending", "_scopes", "_task",
    )  # fmt: skip

    def __init__(self, scopes: list[_Scope], is_block: bool = False) -> None:
        self._scopes = scopes  # the carrier's list: all scopes entered and not left
        self._is_block = is_block  # whether it is that of an `async with`
        self._is_ending = False  # `end` has been called
        self._interrupting = False  # it has cancelled the task, and the error is still under way

    def __enter__(self) -> None:
        self._task = task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._cancels_before = task.cancelling()
        self._scopes.append(self)

    def end(self) -> None:
        """End the scope soon. Called by the carrier; a second call does nothing."""
        # Not at once: the task itself may be the caller. By the time the event loop calls
        # `_interrupt`, the task waits inside the scope, or has left it and nothing is cancelled.
        if not self._is_ending:
            self._is_ending = True
            self._task.get_loop().call_soon(self._interrupt)

    def _interrupt(self) -> None:
        """Cancel the task, unless this scope was left, or another one has just done so."""
        if self in self._scopes and not any(scope._interrupting for scope in self._of_task()):
            self._interrupting = True
            self._task.cancel()

    def _of_task(self) -> list[_Scope]:
        return [scope for scope in self._scopes if scope._task is self._task]

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> bool:
        """True swallows the error: the cancellation came from a scope, and from nothing else."""
        self._scopes.remove(self)
        if self._task.cancelling() <= self._cancels_before:
            return False  # this stretch was not interrupted
        around = self._of_task()
        canceller = next((scope for scope in (self, *around) if scope._interrupting), None)
        if canceller is None:
            return False  # it was, but not by a scope
        canceller._interrupting = False
        loop = self._task.get_loop()
        for scope in around:  # they end, too, one after another, even if the error is swallowed
            if scope._is_block:
                loop.call_soon(scope._interrupt)
            else:
                loop.call_later(_CLEANUP, scope._interrupt)
        return self._task.uncancel() <= self._cancels_before and kind is asyncio.CancelledError


async def _ticks(seconds: float) -> AsyncIterator[None]:
    """Yield now, and then every `seconds`. Ticks due while the loop's body runs are skipped."""
    loop = asyncio.get_running_loop()
    due = loop.time()
    while True:
        yield
        due = max(due + seconds, loop.time())
        await asyncio.sleep(due - loop.time())


async def _paced_rounds(writer: Writer) -> AsyncIterator[None]:
    """The source of `w.alive()`. A body that does nothing runs only four times a second."""
    loop = asyncio.get_running_loop()
    while True:
        writes, waited = writer._writes, asyncio.Event()
        loop.call_soon(waited.set)  # the event loop runs it only if the body waits
        yield
        busy = waited.is_set() or writer._writes != writes
        await asyncio.sleep(0 if busy else 0.25)


_LONGEST_RUN = 0.005  # seconds; then `alive` lets other tasks run, as its source may never wait
_closing_sources: set[asyncio.Task[Any]] = set()  # tasks that close the source of an `alive`


class Alive(Generic[T]):
    """What `w.alive()` returns: loop over it with `async for`, or enter it with `async with`."""

    _open = False  # for `__del__`, if `__init__` raises

    def __init__(
        self, writer: Writer, source: AsyncIterable[T] | None, heartbeat: float | None
    ) -> None:
        if writer.completed:
            raise StarioError("the answer is complete: there is nothing to keep alive")
        self._writer = writer
        self._block: _Scope | None = None  # that of `async with`; a loop in it needs no other
        self._iterator = aiter(
            cast(AsyncIterable[T], _paced_rounds(writer)) if source is None else source
        )
        self._open = True  # the source has not been closed yet
        self._loop = asyncio.get_running_loop()
        self._runs_since = time.monotonic()  # when it last let other tasks run
        writer._start_heartbeat(heartbeat)

    def __bool__(self) -> NoReturn:
        raise TypeError("an Alive is neither true nor false")  # `while w.alive():` would never end

    def __aiter__(self) -> Alive[T]:
        return self

    async def __anext__(self) -> T:
        if self._open and not self._writer._is_over():
            try:
                if self._block:
                    return await self._next()
                with _Scope(self._writer._carrier.scopes):
                    return await self._next()
            except (StopAsyncIteration, ClientDisconnected):
                pass
        # Here the source has ended, the scope above was interrupted, or the stream is over.
        await self.aclose()
        raise StopAsyncIteration

    async def _next(self) -> T:
        # Backpressure: a slow client slows its handler down, so bytes do not pile up in memory.
        await self._writer._carrier.drained()
        if time.monotonic() - self._runs_since > _LONGEST_RUN:
            await asyncio.sleep(0)
            self._runs_since = time.monotonic()
        return await anext(self._iterator)

    async def __aenter__(self) -> Alive[T]:
        self._block = _Scope(self._writer._carrier.scopes, is_block=True)
        self._block.__enter__()
        if self._writer._is_over():
            self._block.end()
        return self

    async def __aexit__(self, kind: Any, exc: BaseException | None, where: object) -> bool:
        assert self._block is not None
        ended = self._block.__exit__(kind)
        await self.aclose()
        return ended or (exc is not None and isinstance(_ungrouped(exc), ClientDisconnected))

    async def aclose(self) -> None:
        """Close the source. A second call does nothing."""
        if aclose := self._close_source():
            await aclose()

    def _close_source(self) -> Callable[[], Coroutine[Any, Any, None]] | None:
        """Close a subscription at once. For others return `aclose`, which must be awaited."""
        # The heartbeat goes on: the handler may send more, or wait in an `alive` around this one.
        was_open, self._open = self._open, False
        if was_open and isinstance(self._iterator, _Messages):  # of a subscription (part 14)
            self._iterator.close()
        return getattr(self._iterator, "aclose", None) if was_open else None

    def __del__(self) -> None:
        # A `break` or an exception in the loop's body closes no async iterator. Python calls this
        # when nothing refers to the Alive any more: at once, or (in a cycle) later, in any thread.
        if aclose := self._close_source():
            loop = self._loop

            def close() -> None:
                _keep(loop.create_task(aclose()), _closing_sources)

            if asyncio._get_running_loop() is loop:
                close()
            else:
                with suppress(RuntimeError):  # that loop has been closed
                    loop.call_soon_threadsafe(close)


# ==================================================================================================
# 14. Relay: publish and subscribe
#
# `relay.publish("room.1", message)` reaches every subscription whose pattern fits. A subscription
# exists from the moment `subscribe()` returns, and has a bounded queue of its own: a reader that
# falls behind loses messages by a rule that it chose, and uses no more memory than its queue.
#
#     messages = relay.subscribe("room.*")
#     relay.publish("room.1", "hello")
#     print(await anext(messages))  # ('room.1', 'hello')
#
# Publishers and readers may be in different threads, with different event loops. One lock guards
# the tables and queues of a relay. It is held for a few dict operations, and never while readers
# are woken. It is an RLock: the thread that holds it can take it again. That happens because Python
# may, between any two lines, run a SIGINT handler that publishes, or collect a subscription, which
# then closes. Such a change is queued, and runs after the one under way (`Relay._change`).
# ==================================================================================================


# The futures to resolve after a change, by event loop: each belongs to a reader that waits.
ToWake = dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]]
# A pattern, as the length of its prefix and the text: (5, "room.") for `room.*`, (0, "") for `*`.
# A whole subject has None as its length: (None, "room.1").
_PatternKey = tuple[int | None, str]
Overflow = Literal["oldest", "latest", "close"]  # the rule for a full queue: see `subscribe`


@dataclasses.dataclass(slots=True, eq=False)  # (each equals only itself: a dict's key)
class _Mailbox:
    """The relay's side of a subscription. Its fields change only under the relay's lock.

    It does not refer to the Subscription, so a Subscription that nobody uses can be collected.
    """

    patterns: Sequence[_PatternKey]
    maxsize: int
    overflow: Overflow
    queue: deque[Any] | OrderedDict[str, Any]  # the second, by subject, for "latest"
    gaps_before: int  # `relay._gaps` at its creation: see `Subscription.gaps`
    dropped: int = 0
    closed: bool = False
    waiter: asyncio.Future[None] | None = None  # what the reader awaits, if it waits

    def put(self, subject: str, data: Any) -> None:
        """Queue a message, by the overflow rule."""
        queue = self.queue
        if isinstance(queue, OrderedDict):
            if queue.pop(subject, None):
                self.dropped += 1
            queue[subject] = (subject, data)
        else:
            queue.append((subject, data))
        if len(queue) <= self.maxsize:
            return
        self.dropped += 1
        if isinstance(queue, OrderedDict):
            queue.popitem(last=False)
        elif self.overflow == "oldest":
            queue.popleft()
        else:  # "close": the message that does not fit is lost, and `_deliver` sees `closed`
            queue.pop()
            self.closed = True

    def take(self) -> Any:
        """The oldest message. The queue must not be empty."""
        queue = self.queue
        return queue.popitem(last=False)[1] if isinstance(queue, OrderedDict) else queue.popleft()

    def move_waiter(self, to_wake: ToWake) -> None:
        """Add the reader's future, if it waits, to those that are to be resolved."""
        waiter, self.waiter = self.waiter, None
        if waiter is not None:
            to_wake.setdefault(waiter.get_loop(), []).append(waiter)


class Subscription(Generic[T]):
    """An async iterator of `(subject, data)`; `relay.subscribe()` makes them.

    It closes when the loop over it is left, when its `with` block ends, by `close()`, or when
    nothing refers to it any more. `dropped` counts the messages lost because it was too slow.
    """

    __slots__ = ("__weakref__", "_mailbox", "_relay")

    def __init__(self, relay: Relay[T], mailbox: _Mailbox) -> None:
        self._relay = relay
        self._mailbox = mailbox

    @property
    def dropped(self) -> int:
        """How many messages the overflow rule has dropped."""
        return self._mailbox.dropped

    @property
    def gaps(self) -> int:
        """How often a `RedisRelay` (part 27) lost its connection, and messages with it."""
        return self._relay._gaps - self._mailbox.gaps_before

    @property
    def closed(self) -> bool:
        """Whether it has ended. What was queued before can still be read."""
        return self._mailbox.closed

    def close(self) -> None:
        """Take no more messages, from any thread. A waiting reader gets the queued ones first."""
        if self._mailbox.patterns:  # else `_remove` has already run
            self._relay._change(self._relay._remove, self._mailbox)

    async def __anext__(self) -> tuple[str, T]:
        mailbox, lock = self._mailbox, self._relay._lock
        while True:
            with lock:
                closed = mailbox.closed  # (before the queue: a SIGINT may publish, then close)
                if mailbox.queue:
                    return cast("tuple[str, T]", mailbox.take())
                if closed:
                    raise StopAsyncIteration
                if mailbox.waiter is not None:
                    raise StarioError("a subscription has one reader; subscribe once for each")
                waiter = mailbox.waiter = asyncio.get_running_loop().create_future()
                if mailbox.queue or mailbox.closed:  # by a SIGINT, before it could see a waiter
                    mailbox.waiter = None
                    continue
            try:
                await waiter
            finally:
                with lock:
                    if mailbox.waiter is waiter:  # else another reader has put its own there
                        mailbox.waiter = None

    def __aiter__(self) -> AsyncIterator[tuple[str, T]]:
        return _Messages(self)

    def __enter__(self) -> Subscription[T]:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    __del__ = close


class _Messages(Subscription[T]):
    """One loop's iterator. Only the loop refers to it, so `__del__` closes it at the loop's end."""

    __slots__ = ("_subscription",)

    def __init__(self, subscription: Subscription[T]) -> None:
        super().__init__(subscription._relay, subscription._mailbox)
        self._subscription = subscription  # (if it were collected, it would close this, too)


class Relay(Generic[T]):
    """Publish and subscribe within one process, from any thread. `Relay[str]()` carries text.

    Patterns: `room.1` is that subject, `room.*` all that begin with `room.`, `*` everything.
    The time to publish grows only with the number of subscriptions that fit the subject.
    """

    _gaps = 0  # how often a RedisRelay (part 27) has lost its connection

    def __init__(self) -> None:
        self._lock = threading.RLock()
        # {5: {"room.": mailboxes}, None: {"room.1": mailboxes}}: by length of prefix, or None for
        # whole subjects (subject[:None] is all of it). The dict of mailboxes is an ordered set.
        self._tables: dict[int | None, dict[str, dict[_Mailbox, None]]] = {}
        self._is_changing = False  # a step is running
        self._steps: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()  # still to run

    def subscribe(
        self, *patterns: str, maxsize: int = 1000, overflow: Overflow = "oldest"
    ) -> Subscription[T]:
        """Listen to the subjects that fit one of the patterns, from now on.

        At most `maxsize` messages wait. When one more comes, `overflow` decides: "oldest" drops the
        oldest one, "latest" keeps only the last message of each subject, and "close" ends the
        subscription after the messages in its queue.
        """
        if not patterns:
            raise StarioError("subscribe() needs a pattern; '*' is everything")
        _check_word("overflow rule", overflow, typing.get_args(Overflow))
        if not isinstance(maxsize, int) or maxsize < 1:
            raise StarioError(f"maxsize={maxsize!r}: a whole number of messages, at least 1")
        queue: Any = OrderedDict() if overflow == "latest" else deque()
        mailbox = _Mailbox(list(map(_read_pattern, patterns)), maxsize, overflow, queue, self._gaps)
        self._change(self._add, mailbox)
        return Subscription(self, mailbox)

    def publish(self, subject: str, data: T = None) -> None:  # type: ignore[assignment]
        """Send a message to all subscriptions to its subject. From any thread; never waits."""
        _check_subject(subject)
        self._change(self._deliver, subject, data)

    def _change(self, step: Callable[..., None], *arguments: Any) -> None:
        """Change tables and queues with `step(to_wake, *arguments)`, then wake the readers.

        If this thread is in the middle of another step, this one is only queued, and the call that
        runs the other step runs it next. So no step sees the half-done work of another.
        """
        to_wake: ToWake = {}
        with self._lock:
            self._steps.append((step, arguments))
            while self._steps and not self._is_changing:  # (again for a late SIGINT: see below)
                self._is_changing = True
                try:
                    while self._steps:
                        step, arguments = self._steps.popleft()
                        step(to_wake, *arguments)
                finally:
                    self._is_changing = False  # (a SIGINT may queue a step just before this)
        _wake(to_wake)

    def _deliver(self, to_wake: ToWake, subject: str, data: T) -> None:
        """A step (of `_change`): put a message into the mailbox of each subscription that fits."""
        for mailbox in self._listeners(subject):
            mailbox.put(subject, data)
            if mailbox.closed:  # the rule was "close"
                self._remove(to_wake, mailbox)
            mailbox.move_waiter(to_wake)

    def _listeners(self, subject: str) -> list[_Mailbox]:
        """The mailboxes that a subject goes to, each once, as a new list."""
        found = [table.get(subject[:length]) for length, table in self._tables.items()]
        groups = [mailboxes for mailboxes in found if mailboxes]
        if len(groups) < 2:
            return list(groups[0]) if groups else []
        return list(dict.fromkeys(mailbox for mailboxes in groups for mailbox in mailboxes))

    def _add(self, to_wake: ToWake, mailbox: _Mailbox) -> None:
        """A step: put a mailbox into the tables."""
        for length, key in mailbox.patterns:
            self._tables.setdefault(length, {}).setdefault(key, {})[mailbox] = None

    def _remove(self, to_wake: ToWake, mailbox: _Mailbox) -> None:
        """A step: close a mailbox, and take it out of the tables."""
        mailbox.closed = True
        mailbox.move_waiter(to_wake)
        patterns, mailbox.patterns = mailbox.patterns, ()
        for length, key in patterns:
            table = self._tables.get(length, {})
            table.get(key, {}).pop(mailbox, None)
            if not table.get(key):
                table.pop(key, None)
            if not table:
                self._tables.pop(length, None)


def _read_pattern(pattern: str) -> _PatternKey:
    if not isinstance(pattern, str):
        raise StarioError(f"a pattern is text, not {pattern!r}: subscribe('a', 'b.*')")
    if "*" not in pattern:
        return None, pattern
    if not (pattern == "*" or pattern.endswith(".*")) or "*" in pattern[:-1]:
        raise StarioError(f"no pattern {pattern!r}: write 'name', 'name.*' or '*'")
    return len(pattern) - 1, pattern[:-1]


def _check_subject(subject: str) -> None:
    """Refuse a `*`: it may come from a user's text, and would turn the subject into a pattern."""
    if not isinstance(subject, str) or "*" in subject:
        raise StarioError(
            f"write publish('room.1', data), not with {subject!r} first: it is text, and only "
            "patterns have a '*'"
        )


def _wake(to_wake: ToWake) -> None:
    """Resolve futures: those of the loop in this thread at once, others in their own loops."""
    here = asyncio._get_running_loop()  # None if none runs in this thread
    for loop, waiters in to_wake.items():
        if loop is here:
            _resolve(waiters)
        else:
            with suppress(RuntimeError):  # that loop has been closed, and its readers with it
                loop.call_soon_threadsafe(_resolve, waiters)


def _resolve(waiters: list[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)


# -- Act 3 runs: a message becomes an event. Without `break` the loop goes on until the client goes.
#
#     app, relay = Stario(), Relay()
#
#     async def live(c: Context, w: Writer) -> None:
#         messages = relay.subscribe("clicks")
#         relay.publish("clicks", 1)  # as a handler of another tab does
#         async for _, count in w.alive(messages):
#             w.patch(h.B({"id": "count"}, count))
#             break
#
#     app.get("/live", live)
#     # GET /live -> event: datastar-patch-elements


# ==================================================================================================
# ACT 4. For real
#
# What an app needs beyond its first day. Each part can be read alone, except that 16 uses
# `_parameters` of 17, 19 needs 18, and 21, 22 and 29 need 20. Parts with a [name] can be left out.
# ==================================================================================================

# ==================================================================================================
# 15. Signals: from JSON to your dataclass
#
# With the request of every action (12), Datastar sends all signals except those whose names begin
# with `_`. In a handler, `await c.signals(Order)` gives them. `Order` is a *schema*, a class whose
# annotated fields say which of the signals it wants:
#
#     @dataclass
#     class Order:
#         name: str
#         weeks: int
#         paid: bool = False
#
#     read_signals(Order, {"name": "Ada", "weeks": "3", "theme": "dark"})
#     # Order(name='Ada', weeks=3, paid=False)
#     read_signals(Order, {"name": 7, "paid": "maybe"})
#     # SignalsError, whose `detail` is:
#     # name: expected text, got 7
#     # weeks: is missing
#     # paid: expected true or false, got "maybe"
#
# HTML inputs give only text, so "3" becomes a number where the schema has one (never the reverse).
#
# Two rules must hold. Either a handler gets values of the types that it asked for, or the client
# gets one list of everything that is wrong. And the time to read signals grows only in proportion
# to their size, whatever the schema: otherwise a small request could keep the server busy.
#
# A schema is compiled once into *readers*, one for each type in it. A reader is a function that
# takes a value and returns it converted to its type, or a `_Wrong` if the value does not fit. The
# `_Wrong` of a list or an object holds one for each item that is wrong, so they form a tree. At the
# end `_problems_of` makes a sentence of each leaf.
# ==================================================================================================


class Problem(str):
    """What is wrong with one field of the signals: a str, `"weeks: is missing"`, with its parts.

    `field` is the path to the field (`"pets[0].age"`); `expected` and `got` are in words.
    """

    field: str
    expected: str
    got: str

    def __new__(cls, sentence: str, field: str = "", expected: str = "", got: str = "") -> Problem:
        problem = super().__new__(cls, sentence)
        problem.field, problem.expected, problem.got = field, expected, got
        return problem


class SignalsError(HttpException):
    """The signals of a request do not fit their schema (422), or are not JSON (400).

    `problems` has one `Problem` for each field that is wrong, at most twenty; `more` counts the
    rest. If `stopped`, reading was given up after thousands of problems, and there may be more.
    `detail` has all of this as lines of text.
    """

    def __init__(
        self, problems: Sequence[str], status_code: int = 422, more: int = 0, stopped: bool = False
    ) -> None:
        self.problems = [p if isinstance(p, Problem) else Problem(p) for p in problems]
        self.more, self.stopped = more, stopped
        rest = [f"and {'at least ' if stopped else ''}{more} more"] if more else []
        super().__init__(status_code, "\n".join([*self.problems, *rest]))
        self.args = self.problems, status_code, more, stopped  # pickle recreates it from these


_MOST_LISTED = 20  # problems in an answer
_MOST_WORK = 10_000  # reading stops at this sum of `_Wrong.work`; one wrong number counts as 1
_LONGEST_SHOWN = 60  # characters of a path or a value in a problem
_NOT_SENT = object()  # stands for a value that was not sent
# What a dataclass (in `__post_init__`) or a model raises when it refuses values: ValueError on
# purpose, the others by accident (`self.stop < self.start` where one of them is None).
_REJECTIONS = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, AssertionError)


class _Wrong:
    """What a reader returns for a value that does not fit."""

    # (there may be many: a union keeps one for each of its types)
    __slots__ = "cause", "count", "expected", "message", "parts", "work"

    def __init__(self, expected: str = "", message: str = "") -> None:
        self.expected = expected  # in words
        self.message = message  # shown instead of what was expected and what was sent
        self.cause: Exception | None = None  # what a dataclass or a model raised
        self.count = 1  # how many problems: those of its parts, if it has parts
        self.work = 1  # what finding them cost: 1 for a plain value, 10 where a model refused it
        # The first parts that are wrong: for each its name, its value and what is wrong with it.
        self.parts: list[tuple[Any, Any, _Wrong]] = []

    def add(self, name: str | int | tuple[Any, ...], value: object, wrong: _Wrong) -> None:
        """Add a part that is wrong. (The name of a part of a part is a tuple.)"""
        if not self.parts:
            self.count = self.work = 0
        self.count += wrong.count
        self.work += wrong.work
        self.cause = self.cause or wrong.cause
        if len(self.parts) < _MOST_LISTED:
            self.parts.append((name, value, wrong))


@lru_cache(maxsize=256)
def _expected(what: str) -> _Wrong:
    """The `_Wrong` of a value without parts. All values that fail this expectation share it."""
    return _Wrong(what)


def _problems_of(wrong: _Wrong, value: object, *path: str | int) -> Iterator[Problem]:
    """The leaves of the tree, in words: `pets[0].age: expected a whole number, got "x"`."""
    for name, part, wrong_part in wrong.parts:
        names = name if isinstance(name, tuple) else (name,)
        yield from _problems_of(wrong_part, part, *path, *names)
    if not wrong.parts:
        if isinstance(value, _FormValue) and wrong.expected.startswith("a list"):
            value = value.values  # (a `_FormValue`: all that a form sent under one name, see below)
        steps = [
            f".{n}" if isinstance(n, str) and _WORD.fullmatch(n) else f"[{_shown(n)}]" for n in path
        ]
        field, got = _cut("".join(steps).removeprefix(".")), _shown(value)
        where = field if path or wrong.message else "the signals"  # ("" for a refused whole)
        told = _cut(" ".join(wrong.message.split()), 200) or f"expected {wrong.expected}, got {got}"
        yield Problem(f"{where}: {told}" if where else told, field, wrong.expected, got)


_WORD = re.compile(r"[\w-]{1,60}")  # a name shown as it is; others are shown as JSON


def _shown(value: object) -> str:
    """The beginning of a value as JSON. (61 pieces are enough: each has at least 1 character.)"""
    if value is _NOT_SENT:
        return "nothing"
    return _cut("".join(islice(_ANY_JSON.iterencode(value), _LONGEST_SHOWN + 1)))


_ANY_JSON = json.JSONEncoder(default=str, skipkeys=True)


def _cut(text: str, length: int = _LONGEST_SHOWN) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


# -- Plain values

# `tried` is a memo: (reader, id of a value) -> what it gave. Only unions use it (`_read_first`), so
# that none of their types reads a value twice. Outside of unions it is None, and only passed on.
_Tried = dict[tuple[object, int], Any] | None
Reader = Callable[[Any, _Tried], Any]

_PLAIN = (str, int, float, bool, types.NoneType)
_BOOLS = dict.fromkeys(("true", "on", "yes", "1"), True)
_BOOLS |= dict.fromkeys(("false", "off", "no", "0", ""), False)
_HUGE = 10**400  # printing an int takes quadratic time: twice the digits, four times as long
# int() and float() would also accept "1_000", "nan" and Arabic digits.
_WHOLE = re.compile(r"[+-]?\d{1,400}", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d{1,400}(\.\d{0,400})?|\.\d{1,400})([eE][+-]?\d{1,5})?", re.ASCII)


def _read_any(value: Any, tried: _Tried) -> Any:  # (a `_FormValue` comes from a form: see below)
    return value.values[0] if type(value) is _FormValue else value


def _read_str(value: Any, tried: _Tried) -> Any:
    return str(value) if isinstance(value, str) else _expected("text")  # (of a form: the first)


def _read_none(value: Any, tried: _Tried) -> Any:
    return None if value is None else _expected("null")


def _read_bool(value: Any, tried: _Tried) -> Any:
    if isinstance(value, str):
        value = _BOOLS.get(value.strip().lower())
    return value if isinstance(value, bool) else _expected("true or false")


def _read_int(value: Any, tried: _Tried) -> Any:
    if type(value) is int and -_HUGE < value < _HUGE:
        return value
    if isinstance(value, str) and _WHOLE.fullmatch(text := value.strip()):
        return int(text)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return _expected("a whole number")


def _read_float(value: Any, tried: _Tried) -> Any:
    if isinstance(value, str) and _NUMBER.fullmatch(text := value.strip()):
        value = text
    elif type(value) not in (float, int):
        return _expected("a number")
    try:
        return _finite(value)
    except (ValueError, OverflowError):  # (a whole number may be beyond the largest float)
        return _expected("a finite number")


def _read_decimal(value: Any, tried: _Tried) -> Any:
    if type(value) is int and -_HUGE < value < _HUGE:
        return Decimal(value)
    if type(value) is float and math.isfinite(value):
        return Decimal(str(value))
    if isinstance(value, str) and _NUMBER.fullmatch(text := value.strip()):
        number = Decimal(text)
        if abs(number.adjusted()) <= 400:  # 1e9999 is short, until it is printed
            return number
    return _expected("a number")


def _text_reader(name: str, pattern: str, make: Callable[[str], Any]) -> Reader:
    """A type that JSON has as text. The pattern is checked first: `make` alone accepts more."""
    wrong, fits = _Wrong(f"a {name} as text"), re.compile(pattern).fullmatch

    def _read(value: Any, tried: _Tried) -> Any:
        if isinstance(value, str) and fits(value):
            with suppress(ValueError):
                return make(value)
        return wrong

    return _read


def _read_bytes(value: Any, tried: _Tried) -> Any:
    """The contents of a file input: the client sends them as base64."""
    if isinstance(value, str) and len(value) % 4 == 0:
        with suppress(ValueError):
            return base64.b64decode(value, validate=True)
    return _expected("base64")


_READERS: dict[Any, Reader] = {
    Any: _read_any,
    object: _read_any,
    str: _read_str,
    types.NoneType: _read_none,
    bool: _read_bool,
    int: _read_int,
    float: _read_float,
    Decimal: _read_decimal,
    datetime: _text_reader("datetime", "[!-~ ]{7,100}", datetime.fromisoformat),
    date: _text_reader("date", "[!-~]{7,100}", date.fromisoformat),
    time_of_day: _text_reader("time", "[!-~]{2,100}", time_of_day.fromisoformat),
    UUID: _text_reader("UUID", "[0-9A-Fa-f-]{32,36}", UUID),
    bytes: _read_bytes,
}


def _choice_reader(choices: Iterable[Any]) -> Reader:
    """`Literal` and enums: one of the choices, or a choice as text: "1", "true"."""
    found = _choices_by_key(choices)
    values = (item.value if isinstance(item, enum.Enum) else item for item in choices)
    wrong = _Wrong(_cut("one of " + ", ".join(map(_shown, values)), 200))
    return lambda value, tried: found.get(_key_of(value), wrong)


def _choices_by_key(choices: Iterable[Any]) -> dict[Any, Any]:
    pairs = [(item.value if isinstance(item, enum.Enum) else item, item) for item in choices]
    texts = [
        (text, item)
        for value, item in pairs
        if not isinstance(value, str)
        for text in (str(value), _shown(value))  # "True" and "true"
    ]
    # A browser writes 1.0 as 1. (If two have the same key, the last wins: choices before texts.)
    whole = [(int(v), item) for v, item in pairs if type(v) is float and v.is_integer()]
    return {_key_of(value): item for value, item in texts + whole + pairs if _key_of(value)}


def _key_of(value: Any) -> Any:
    """A key that tells choices apart, with the type, since 1 == True. None if not a plain value."""
    kind = str if isinstance(value, str) else type(value)
    return (kind, value) if kind in _PLAIN else None


# -- Values that hold others


class _FormValue(str):
    """The values of one name in a form or a query: the first as a str, all of them in `values`."""

    def __new__(cls, *values: str) -> _FormValue:  # (`copy` gives the first, then sets `values`)
        field = super().__new__(cls, values[0])
        field.values = list(values)
        return field

    values: list[str]


# What a list is converted into, by the type in the schema.
_SHAPES: dict[Any, Any] = {
    list: list, Sequence: list, Iterable: list, set: set, frozenset: frozenset, tuple: tuple,
}  # fmt: skip


def _read_each(parts: Iterable[tuple[str | int, Any, Reader]], tried: _Tried) -> Any:
    """Read parts, each with its name and its reader. Returns the values, or what is wrong."""
    found, wrong = [], None
    for name, value, read in parts:
        item = read(value, tried)
        if type(item) is not _Wrong:
            found.append(item)
            continue
        wrong = wrong or _Wrong()
        wrong.add(name, value, item)
        if wrong.work > (_MOST_WORK if tried is None else _MOST_LISTED):
            wrong.work += _MOST_WORK  # so readers around it stop, too (in a union, after 20)
            break
    return wrong or found


def _list_reader(make: Any, readers: Sequence[Reader], is_fixed: bool) -> Reader:
    """A list, converted by `make` to a list, set or tuple. If `is_fixed`, one reader per item."""
    wrong = _Wrong(f"a list of {len(readers)}" if is_fixed else "a list")

    def _read(value: Any, tried: _Tried) -> Any:
        if isinstance(value, _FormValue):
            value = value.values
        if not isinstance(value, list) or (is_fixed and len(value) != len(readers)):
            return wrong
        each = readers if is_fixed else repeat(readers[0])
        items = _read_each(zip(count(), value, each), tried)
        if make is list or type(items) is _Wrong:
            return items
        if make is not tuple and not _is_safe_to_hash(items):
            return _expected("a list of values that a set can hold")
        return make(items)

    return _read


def _dict_reader(read_key: Reader = _read_str, read: Reader = _read_any) -> Reader:
    """An object with any names: a dict. First all names are read by their type, then all values."""

    def _read(value: Any, tried: _Tried) -> Any:
        if not isinstance(value, dict):
            return _expected("an object")
        parts: Iterable[Any] = zip(value, value.values(), repeat(read))
        if read_key is _read_str:  # names are text already
            found = _read_each(parts, tried)
            return found if type(found) is _Wrong else dict(zip(value, found, strict=True))
        found = _read_each(chain(zip(value, value, repeat(read_key)), parts), tried)
        if type(found) is _Wrong:
            return found
        keys, values = found[: len(value)], found[len(value) :]
        if not _is_safe_to_hash(keys):
            return _expected("an object with names that a dict can hold")
        return dict(zip(keys, values, strict=True))

    return _read


def _is_safe_to_hash(items: Sequence[Any]) -> bool:
    """Whether these may go into a set: they can be hashed, and few share a hash.

    A client could send 40,000 different numbers with the same hash, and the set would compare each
    with all before it. So at most 20 different ones may share a hash.
    """
    by_hash: dict[int, list[Any]] = {}
    try:
        for item in items:
            sharing = by_hash.setdefault(hash(item), [])
            if item not in sharing:
                sharing.append(item)
            if len(sharing) > 20:
                return False
    except TypeError:  # a list, say
        return False
    return True


def _record_reader(schema: Any) -> Reader:
    """A dataclass or a TypedDict. Its fields are compiled at the first call: it may hold itself."""
    make = typing.get_origin(schema) or schema
    fields: list[tuple[str, Reader, bool]] | None = None

    def _read(value: Any, tried: _Tried) -> Any:
        nonlocal fields
        if fields is None:
            fields = [(name, _reader_of(kind), must) for name, kind, must in _fields_of(schema)]
        if not isinstance(value, dict):
            return _expected("an object")
        found: dict[str, Any] = {}
        wrong = None
        for name, read, must in fields:
            sent = value.get(name, _NOT_SENT)
            if sent is _NOT_SENT and not must:
                continue  # the class has a default
            found[name] = item = read(sent, tried) if sent is not _NOT_SENT else _IS_NOT_SENT
            if type(item) is _Wrong:
                wrong = wrong or _Wrong()
                wrong.add(name, sent, item)
        if wrong:
            return wrong
        try:
            return make(**found)
        except _REJECTIONS as exc:
            return _rejection(exc)

    return _read


_IS_NOT_SENT = _Wrong("a value", "is missing")


def _model_reader(model: Any) -> Reader:
    """A class that checks values itself, with `model_validate`, as those of pydantic do."""

    def _read(value: Any, tried: _Tried) -> Any:
        try:
            return model.model_validate(value)
        except _REJECTIONS as exc:  # pydantic's is a ValueError
            return _rejection(exc)

    return _read


def _rejection(exc: Exception) -> _Wrong:
    """Why a dataclass or a model refused its values. (pydantic's errors have these two methods.)"""
    errors, error_count = getattr(exc, "errors", None), getattr(exc, "error_count", None)
    number = error_count() if callable(error_count) else 0
    if number > 1000:  # listing them takes 200 times the values' memory
        whole = _Wrong("", f"{number} values do not fit")
    else:
        message = str(exc) if isinstance(exc, (ValueError, AssertionError)) else ""
        whole = _Wrong("", message or "the values do not fit together")
        for error in errors() if callable(errors) else ():  # one for each field
            value = _NOT_SENT if error.get("type") == "missing" else error.get("input", _NOT_SENT)
            message = error.get("msg") or str(exc)
            whole.add(error.get("loc", ()), value, _Wrong(message, message))
    whole.cause, whole.work = exc, 10 * whole.count  # (exceptions are slow)
    return whole


# -- Unions


def _optional_reader(read: Reader) -> Reader:
    """`T | None`. An input that was left empty gives None, not False or an error."""

    def _read(value: Any, tried: _Tried) -> Any:
        if value is None:
            return None
        found = read(value, tried)
        return None if value == "" and (found is False or type(found) is _Wrong) else found

    return _read


class _Option(NamedTuple):
    """A type of a union."""

    kind: Any
    read: Reader
    fields: list[tuple[str, Any, bool]]  # of a dataclass or a TypedDict: see `_fields_of`
    needed: frozenset[str]  # the names without which an object cannot be of this type
    is_uniform: bool  # a list or an object with any number of items, all of one type


def _union_reader(kinds: Sequence[Any]) -> Reader:
    """`A | B`: the first type that fits. A value that has one of the types is not converted."""
    options = []
    for kind in kinds:
        fields = _fields_of(kind) if _is_record(typing.get_origin(kind) or kind) else []
        needed = frozenset(name for name, _, must in fields if must)
        options.append(_Option(kind, _reader_of(kind), fields, needed, _is_uniform(kind)))
    options_for = {kind: _options_for(kind, options) for kind in (*_PLAIN, list, dict)}
    tag, by_tag = _tag_of(options_for[dict])
    nothing_fits = _Wrong(" or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds))
    nothing_fits.work = len(options)

    def _read(value: Any, tried: _Tried) -> Any:
        fitting = options_for.get(type(value), options)
        if isinstance(value, dict) and len(fitting) > 1:
            if tag in value:  # the field that names the type, such as `kind`: see `_tag_of`
                fitting = by_tag.get(_key_of(value[tag]), [])
            fitting = [option for option in fitting if value.keys() >= option.needed]
        if len(fitting) == 1:
            return fitting[0].read(value, tried)
        return _read_first(value, fitting, tried, nothing_fits)

    return _read


def _options_for(json_type: type, options: Sequence[_Option]) -> Sequence[_Option]:
    """The options for a value of the type `json_type`: that type alone, or all that fit."""
    same = [option for option in options if option.kind is json_type and json_type in _PLAIN]
    able = [(_fitness(option.kind, json_type), option) for option in options]
    able.sort(key=lambda pair: -pair[0])
    return same or [option for fitness, option in able if fitness]


def _fitness(kind: Any, json_type: type) -> int:
    """How well a `json_type` fits: 2 unchanged, 1 (True) converted, 0 (False) never.

    The best is tried first: `int | Literal["1"]` tries the `Literal` first for "1".
    """
    origin = typing.get_origin(kind) or kind
    if origin in _SHAPES:
        return json_type is list
    if origin in (dict, Mapping) or _is_record(origin):
        return json_type is dict
    if origin is typing.Literal:
        is_same = json_type in map(type, typing.get_args(kind))
        return (1 + is_same) if json_type in _PLAIN else 0
    if origin in (Any, object):
        return 2 if json_type in _PLAIN else 1
    is_enum = isinstance(origin, type) and issubclass(origin, enum.Enum)
    return json_type in _PLAIN if is_enum or origin in _READERS else 1


def _tag_of(options: Sequence[_Option]) -> tuple[str | None, dict[Any, list[_Option]]]:
    """The `Literal` field that tells these types apart (with most values); the types by value."""
    tables: dict[str, dict[Any, list[_Option]]] = {}
    times: Counter[str] = Counter()
    for option in options:
        for name, kind, _ in option.fields:
            if typing.get_origin(kind := _bare(kind)) is typing.Literal:
                times[name] += 1
                for key in _choices_by_key(typing.get_args(kind)):
                    tables.setdefault(name, {}).setdefault(key, []).append(option)
    in_all = [(name, table) for name, table in tables.items() if times[name] == len(options)]
    return max(in_all, key=lambda tag: len(tag[1]), default=(None, {}))


def _read_first(value: Any, options: Sequence[_Option], tried: _Tried, nothing_fits: _Wrong) -> Any:
    """Read a value by the first type that fits."""
    nearest, fewest, sample = nothing_fits, sys.maxsize, None
    # If A and B both hold `A | B`, a value that is nested 20 times would be read 2**20 times. (The
    # outermost union reads its value once, and what is not nested is quick to read again.)
    is_repeated = tried is not None and _is_nested(value)
    tried = {} if tried is None else tried
    for option in options:
        # `sample`: an item of a long list that an earlier type refused: tried before the list.
        if sample and option.is_uniform and type(option.read(sample, tried)) is _Wrong:
            continue
        key = option.read, id(value)
        found = tried[key] if key in tried else option.read(value, tried)
        if is_repeated:
            tried[key] = found
        if type(found) is not _Wrong:
            return found
        # If only parts are wrong, the type with the fewest problems was meant; a tie names all.
        if (found.parts or found.message) and found.count <= fewest:
            nearest = found if found.count < fewest else nothing_fits
            fewest = found.count
        if option.is_uniform and found.parts and found.count * 100 < len(value):
            name, item, _ = found.parts[0]
            sample = {name: item} if isinstance(value, dict) else [item]
    return nearest


def _is_nested(value: Any) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return not _HOLDERS.isdisjoint(map(type, items))


_HOLDERS = frozenset((list, dict))


def _is_uniform(kind: Any) -> bool:
    """Whether it is a list or dict of any length: `tuple[int, ...]`, but not `tuple[int, str]`."""
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is tuple:
        return kind is tuple or arguments[-1:] == (Ellipsis,)
    return origin in _SHAPES or origin in (dict, Mapping)


def _is_record(origin: Any) -> bool:
    return dataclasses.is_dataclass(origin) or hasattr(origin, "__required_keys__")


# -- From types to readers

_QUALIFIERS: set[Any] = {
    typing.Annotated, typing.Required, typing.NotRequired, typing.ClassVar, typing.Final,
    getattr(typing, "ReadOnly", typing.Final),
}  # fmt: skip


def _reader_of(kind: Any) -> Reader:
    """The reader of a type, which is compiled only once.

    `Page[int | bool] == Page[bool | int]`, so the text of a generic type is part of the cache key.
    """
    kind = _bare(kind)
    if dataclasses.is_dataclass(type(kind)):
        raise StarioError(f"signals are read as a class: give {type(kind).__name__}, not one of it")
    if isinstance(kind, (dict, list, set)):
        raise _no_schema(kind)
    return _READERS.get(kind) or _schema_reader(kind, "" if isinstance(kind, type) else repr(kind))


@lru_cache(maxsize=1024)
def _schema_reader(kind: Any, text: str) -> Reader:
    """Compile a type. (A type that may hold itself is compiled at its first call.)"""
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        kinds = [bare for bare in map(_bare, arguments) if bare is not types.NoneType]
        read = _union_reader(kinds) if len(kinds) > 1 else _reader_of(kinds[0])
        return read if len(kinds) == len(arguments) else _optional_reader(read)
    if origin is typing.Literal:
        return _choice_reader(arguments)
    if origin in _SHAPES:
        is_fixed = not _is_uniform(kind)
        items = arguments if is_fixed else arguments[:1] or (Any,)
        return _list_reader(_SHAPES[origin], list(map(_reader_of, items)), is_fixed)
    if origin in (dict, Mapping):
        return _dict_reader(*map(_reader_of, arguments))
    if _is_record(origin):
        return _record_reader(kind)
    if hasattr(origin, "__value__"):  # type Name = ...
        aliased = lru_cache(lambda: _reader_of(_bind(origin.__value__, kind)))
        return lambda value, tried: aliased()(value, tried)
    if isinstance(kind, TypeVar):  # not filled in: its bound, one of its constraints, or Any
        among = typing.Union[kind.__constraints__] if kind.__constraints__ else Any  # noqa: UP007
        return _reader_of(kind.__bound__ or among)
    if isinstance(origin, type) and issubclass(origin, enum.Enum):
        return _choice_reader(origin)
    if isinstance(origin, type) and hasattr(origin, "model_validate"):
        return _model_reader(kind)
    raise _no_schema(kind)


def _no_schema(kind: Any) -> StarioError:
    return StarioError(
        f"signals cannot be read as {getattr(kind, '__name__', repr(kind))}: a schema is a "
        "dataclass, a TypedDict or a class with model_validate"
    )


def _bare(kind: Any) -> Any:
    """The type inside `Annotated[...]`, `Required[...]`, `NewType` and the like."""
    while not isinstance(kind, type):
        if typing.get_origin(kind) in _QUALIFIERS:
            kind = typing.get_args(kind)[0]
        elif hasattr(kind, "__supertype__"):  # NewType
            kind = kind.__supertype__
        elif getattr(kind, "__value__", None) in _READERS:  # type Word = str
            kind = kind.__value__
        else:
            return types.NoneType if kind is None else kind
    return kind


def _bind(kind: Any, generic: Any) -> Any:
    """A type with its type variables filled in: `list[T]` in `Page[int]` is `list[int]`."""
    if isinstance(kind, dataclasses.InitVar):
        kind = kind.type
    origin, given = typing.get_origin(generic), typing.get_args(generic)
    names = getattr(origin, "__type_params__", ()) or getattr(origin, "__parameters__", ())
    bound = dict(zip(names, given, strict=False))
    if isinstance(kind, TypeVar):
        return bound.get(kind, kind)
    inner = () if isinstance(kind, type) else getattr(kind, "__parameters__", ())
    return kind[tuple(bound.get(name, name) for name in inner)] if bound and inner else kind


def _type_hints(schema: Any, **options: Any) -> dict[str, Any]:
    """`typing.get_type_hints`, but Python 3.12 needs to be told what T is in `next: "Page[T]"`."""
    classes = reversed(schema.__mro__) if sys.version_info[:2] == (3, 12) else ()
    names = {p.__name__: p for kind in classes for p in getattr(kind, "__type_params__", ())}
    return typing.get_type_hints(schema, localns=names or None, **options)


def _hints_of(schema: Any) -> dict[str, Any]:
    """The types of the fields of a schema, by name, with type variables filled in."""
    origin = typing.get_origin(schema) or schema
    plain = _type_hints(origin)
    found = {name: _bind(kind, schema) for name, kind in plain.items()}
    # `class Ints(Page[int])` inherits a field `list[T]`: only its base says that T is int.
    for base in reversed(origin.__dict__.get("__orig_bases__", origin.__bases__)):
        if _is_record(of := typing.get_origin(base) or base):
            theirs = _type_hints(of)
            for name, kind in _hints_of(_bind(base, schema)).items():
                if plain[name] == theirs[name]:  # (else the class itself redeclares it)
                    found[name] = kind
    return found


def _fields_of(schema: Any) -> list[tuple[str, Any, bool]]:
    """The name and the type of each field, and whether it is required."""
    origin = typing.get_origin(schema) or schema
    try:
        hints = _hints_of(schema)
    except NameError as exc:
        raise StarioError(
            f"the types of {origin.__name__} cannot be looked up ({exc}): define the schema and "
            "what it names at the top of a module"
        ) from exc
    if hasattr(origin, "__required_keys__"):  # a TypedDict
        declared = _type_hints(origin, include_extras=True).items()
        needed = {name: _is_required(origin, name, kind) for name, kind in declared}
    else:  # the arguments of a dataclass, including `InitVar`s
        init = functools.partial(origin.__init__, None)  # so the signature is without `self`
        make = origin if hasattr(origin, "__signature__") else init  # pydantic's says it there
        parameters = inspect.signature(make).parameters.values()
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        needed = {parameter.name: parameter.default is parameter.empty for parameter in named}
    return [(name, hints.get(name, Any), must) for name, must in needed.items()]


def _is_required(schema: Any, name: str, kind: Any) -> bool:
    """Whether a TypedDict requires a key. `from __future__ import annotations` hides `NotRequired`
    from `__required_keys__`, so the annotation is checked first.
    """
    while (origin := typing.get_origin(kind)) in _QUALIFIERS:
        if origin in (typing.Required, typing.NotRequired):
            return origin is typing.Required
        kind = typing.get_args(kind)[0]
    return name in schema.__required_keys__


async def _sent_signals(request: Request) -> dict[str, Any]:
    """The signals sent with a request. SignalsError if they are not a JSON object."""
    in_query = request.method in ("GET", "HEAD", "DELETE")
    text = request.query.get("datastar", "") if in_query else await request.body()
    try:
        found = _parse_json(text) if text.strip() else {}
    except HttpException as exc:
        is_form = "form" in request.headers.get("content-type", "")
        hint = "read_signals(schema, await c.req.form()) reads a form" if is_form else exc.detail
        raise SignalsError([f"the signals are not JSON: {hint}"], 400) from None
    if not isinstance(found, dict):
        return read_signals(dict[str, Any], found)  # it raises SignalsError
    return found


def read_signals(schema: type[T], signals: object) -> T:
    """Check signals (a parsed JSON object), a form or a query against a schema, and return one.

    `schema` is a dataclass, a TypedDict, or a class with `model_validate` (as in pydantic). Fields
    that it does not know are ignored. Raises SignalsError with the fields that do not fit.
    """
    if inspect.iscoroutine(signals):
        raise StarioError("`await` is missing: read_signals(schema, await c.req.form())")
    find_all = getattr(signals, "getlist", None)
    if find_all:  # a Form or QueryParams: a name may occur several times
        signals = {name: _FormValue(*find_all(name)) for name in cast("Iterable[str]", signals)}
    try:
        found = _reader_of(schema)(signals, None)
        if type(found) is not _Wrong:
            return cast(T, found)
        problems = list(islice(_problems_of(found, signals), _MOST_LISTED))
    except RecursionError:
        raise SignalsError(["the signals are nested too deeply"]) from None
    stopped = found.work > _MOST_WORK
    raise SignalsError(problems, more=found.count - len(problems), stopped=stopped) from found.cause


# ==================================================================================================
# 16. Forms [forms]
#
# A form has one of two types. `application/x-www-form-urlencoded` is read like a query string
# (part 5). In `multipart/form-data` (RFC 7578) each field is a *part* with a head of its own, and
# may be a file. A boundary separates the parts; `multipart/form-data; boundary=X` says which:
#
#     --X
#     content-disposition: form-data; name="photo"; filename="cat.png"
#     content-type: image/png
#
#     ...the bytes of the file
#     --X--
#
# The bytes are added to their part as they arrive; a part larger than 1 MiB goes to disk.
# ==================================================================================================


class FormFile(NamedTuple):
    """A file of a form: its name as the browser sent it (do not trust it), its type, its contents.

    `file` is open for reading. Above 1 MiB it is on disk, until nothing refers to it any more.
    """

    filename: str
    content_type: str
    file: IO[bytes]

    @property
    def data(self) -> bytes:
        """All of its bytes."""
        self.file.seek(0)
        return self.file.read()


class Form(QueryParams):
    """The fields of a form, as QueryParams; `files` has its files, by field name."""

    def __init__(self, pairs: Iterable[tuple[str, str]] = ()) -> None:
        super().__init__(pairs)
        self.files: dict[str, list[FormFile]] = {}

    def __getitem__(self, name: str) -> str:
        """The first value of a field. As in QueryParams, HttpException(400) if there is none."""
        if name in self.files and name not in self:
            raise HttpException(
                400, f"{name!r} came as a file, form.file({name!r}), and not as text"
            )
        return super().__getitem__(name)

    def file(self, key: str) -> FormFile | None:
        """The first file of a field, or None."""
        return self.files.get(key, [None])[0]


async def _read_form(request: Request) -> Form:
    """The body of a request as a form: urlencoded, or multipart. HttpException: 400, 415."""
    content_type = request.headers.get("content-type") or ""
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "application/x-www-form-urlencoded":
        return Form(_parse_pairs((await request.body()).decode("utf-8", "replace")))
    if kind != "multipart/form-data":
        raise HttpException(415, "expected a form (urlencoded or multipart)")
    reader, request._form_reader = request._form_reader, None
    if reader is None:
        reader = _MultipartReader(content_type)
        request._begin()
    try:
        while chunk := await request._read():
            reader.feed(chunk)
    except asyncio.CancelledError:  # by a timeout, say: the next `form()` continues from here
        request._form_reader = reader
        raise
    return reader.form()


_FORM_FILE_IN_MEMORY = 1024 * 1024  # bytes of a part; a larger one goes to disk
_MAX_PART_HEAD, _MAX_PART_FIELDS = 8 * 1024, 20  # bytes and header fields of a part of a form
_CHARSET = re.compile(  # what browsers know (Encoding standard); other codecs are not charsets
    r"utf-?8|(us-)?ascii|iso-?8859-(1[0-13-6]?|[2-9])|latin-?1|(windows-|cp)125[0-8]|koi8-[ru]"
    r"|macintosh|ibm866|big5|gbk|gb2312|gb18030|euc-(jp|kr)|shift[_-]jis|iso-2022-jp|utf-16(le|be)?",
    re.IGNORECASE | re.ASCII,
)


class _Part(NamedTuple):
    """A part of a multipart form; without a file name it is a text field."""

    name: str
    filename: str | None
    content_type: str
    file: IO[bytes]


class _MultipartReader:
    """Splits multipart/form-data (RFC 7578) into its parts, as the bytes arrive.

    A delimiter is a line of its own: `--boundary`, or `--boundary--` after the last part (RFC 2046,
    section 5.1.1). A line that only begins like one is content. The last bytes received may be the
    beginning of a delimiter, so they are kept until more arrive; all bytes before them are written
    to the part's file.
    """

    def __init__(self, content_type: str) -> None:
        boundary = _parameters(content_type).get("boundary", "").encode("latin-1", "replace")
        if not 1 <= len(boundary) <= 70:
            raise HttpException(400, "a multipart form needs a boundary of 1 to 70 characters")
        self._delimiter = re.compile(b"\r\n--%b(--)?[ \t]{0,99}(?=\r\n)" % re.escape(boundary))
        self._longest = len(boundary) + 107  # bytes of a delimiter: 4 dashes, 99 blanks, 2 CRLF
        self._buffer = b"\r\n"  # bytes still to do (a delimiter may be the first line)
        self._parts: list[_Part] = []
        self._complete = False

    def feed(self, data: bytes) -> None:
        """Take these bytes. HttpException(400) if they are not part of a form."""
        if self._complete:  # anything after the last delimiter is not content
            return
        buffer, at = self._buffer + data, 0
        while found := self._delimiter.search(buffer, at):
            self._write(buffer[at : found.start()])
            at = found.start()
            self._complete = found[1] is not None
            head = b"" if self._complete else self._head_at(buffer, found.end())
            if not head:
                self._buffer = buffer[at:]
                return
            self._parts.append(_read_part_head(head))
            at = found.end() + len(head) + 2  # 2: the empty line after the head
        end = max(at, len(buffer) - self._longest)
        self._write(buffer[at:end])
        self._buffer = buffer[end:]

    def _write(self, content: bytes) -> None:
        if self._parts:  # anything before the first delimiter is not content
            self._parts[-1].file.write(content)

    def _head_at(self, buffer: bytes, start: int) -> bytes:
        """A part's head, with its first and last line ends; empty if it has not arrived in full."""
        end = buffer.find(b"\r\n\r\n", start, start + _MAX_PART_HEAD)
        if end < 0 and len(buffer) - start < _MAX_PART_HEAD:
            return b""
        head = buffer[start : end + 2]
        if end < 0 or head.count(b"\r\n") > _MAX_PART_FIELDS or self._delimiter.search(head):
            raise HttpException(400, "the head of a part of the form has no end, or too much in it")
        if len(self._parts) >= _MAX_FORM_FIELDS:
            raise HttpException(400, f"more than {_MAX_FORM_FIELDS} parts")
        return head

    def form(self) -> Form:
        """All parts received, as a form. HttpException(400) if the end is missing."""
        self.feed(b"\r\n")  # (a delimiter is between line ends, even the last one)
        if not self._complete:
            raise HttpException(400, "the multipart form is cut off: its last boundary is missing")
        form, texts = Form(), []
        for name, filename, content_type, file in self._parts:
            size = file.tell()
            file.seek(0)
            if filename is None:
                texts.append((name, content_type, file.read()))
            elif filename or size:  # a file field left empty also has a part
                form.files.setdefault(name, []).append(FormFile(filename, content_type, file))
        # A field `_charset_` names the charset of the parts that name none (RFC 7578, section 4.6).
        usual = next((text.decode("latin-1") for name, _, text in texts if name == "_charset_"), "")
        for name, content_type, content in texts:
            charset = _parameters(content_type).get("charset") or usual or "utf-8"
            form._fields.setdefault(name, []).append(_decode_text(content, charset))
        return form


@lru_cache(maxsize=1)
def _form_contents() -> Callable[[int], IO[bytes]]:
    """The class of a part's file. Call it with a size in bytes; above that, it is on disk."""
    from tempfile import SpooledTemporaryFile  # imported here, because it imports a lot

    class _FormContents(SpooledTemporaryFile[bytes]):
        def __del__(self) -> None:  # when nothing refers to it any more
            self.close()

    return cast("Callable[[int], IO[bytes]]", _FormContents)


def _read_part_head(head: bytes) -> _Part:
    """A part that has no contents yet."""
    lines = (line.partition(":") for line in head.decode("utf-8", "replace").split("\r\n"))
    fields = {name.strip(" \t").lower(): value.strip(" \t") for name, _, value in lines}
    disposition = _parameters(fields.get("content-disposition", ""))
    if "name" not in disposition:
        raise HttpException(400, "a part of the multipart form has no name")
    # `filename*` is not allowed here (RFC 7578, section 4.2), but sent by some, as is `filename*0`.
    # In alphabetical order these come after `filename`, so `max` prefers them.
    key = max((key for key in disposition if key.startswith("filename")), default="")
    filename = disposition.get(key)
    if key == "filename*":
        charset, _, escaped = disposition["filename*"].partition("'")
        filename = _decode_text(_unescaped(escaped.partition("'")[2]), charset or "utf-8")
    kind = fields.get("content-type") or ("text/plain" if filename is None else "")
    file = _form_contents()(_FORM_FILE_IN_MEMORY)
    return _Part(disposition["name"], filename, kind or "application/octet-stream", file)


def _decode_text(content: bytes, charset: str) -> str:
    if not _CHARSET.fullmatch(charset):  # (Python caches every name that it looks up)
        raise HttpException(400, f"the form has an unknown charset: {charset[:40]!r}")
    return content.decode(charset, "replace")


# ==================================================================================================
# 17. Behind a proxy
#
# A proxy (nginx, a load balancer) takes requests and passes them on to us. It is the *peer* of our
# connection, and says in a header field who the client is. Each proxy adds its own peer on the
# right. Here 203.0.113.9 asks a proxy at 10.0.0.1, which asks nginx at 10.0.0.2, which asks us:
#
#     x-forwarded-for: 198.51.100.7, 203.0.113.9, 10.0.0.1
#
# Anybody can send this field. So it is read only if the peer is trusted, and from the right, past
# trusted proxies. If both proxies are trusted, 203.0.113.9 is the client: one of them has seen it.
# The client may have made up anything to the left of it.
# ==================================================================================================


class _Hop(NamedTuple):
    """One hop on a request's way: from which client, by which scheme, to which host."""

    client: str
    scheme: str
    host: str


class TrustedProxies:
    """The proxies that are trusted: addresses, networks, "unix" for any peer on a Unix socket.

    It reads `Forwarded` (RFC 7239), and `X-Forwarded-For`, `-Proto` and `-Host`.
    """

    def __init__(self, proxies: Sequence[str]) -> None:
        """StarioError for anything that is neither an address nor a network."""
        try:
            self._networks = [ipaddress.ip_network(str(p), False) for p in proxies if p != "unix"]
        except (ValueError, TypeError) as exc:
            wanted = 'a list of addresses, networks ("10.0.0.0/8") and "unix"'
            raise StarioError(f"trusted_proxies is {wanted}, not {proxies!r}: {exc}") from None
        self._unix = "unix" in proxies

    def trust(self, peer: str) -> bool:
        """Whether this peer is a trusted proxy."""
        if peer in ("", "unix"):  # our own peer has no address; nginx calls its own `unix:`
            return self._unix
        try:
            address = ipaddress.ip_address(peer)
        except ValueError:
            return False
        address = getattr(address, "ipv4_mapped", None) or address  # of `::ffff:10.0.0.1`
        return any(address in network for network in self._networks)

    def first_hop(self, headers: Headers, last: _Hop) -> _Hop:
        """The client's hop: by the fields if `last`, our peer's, is a trusted proxy's; else `last`.

        A proxy passes on unchanged those of these fields that it does not write. Configure it to
        remove them. HttpException(400) if the two families of fields contradict each other.
        """
        if not self.trust(last.client):
            return last
        names = ("for", "proto", "host")
        # Only the last 32 items of a long list: proxies add theirs at the end.
        usual = self._hop_by(*(headers._list(f"x-forwarded-{name}")[-32:] for name in names))
        elements = [_parameters(";" + element) for element in headers._list("forwarded")[-32:]]
        standard = self._hop_by(*([e.get(name, "") for e in elements] for name in names))
        if any(a and b and a.lower() != b.lower() for a, b in zip(usual, standard, strict=True)):
            raise HttpException(400, "Forwarded and X-Forwarded-For, -Proto, -Host disagree")
        return _Hop(*(a or b or c for a, b, c in zip(usual, standard, last, strict=True)))

    def _hop_by(self, clients: list[str], schemes: list[str], hosts: list[str]) -> _Hop:
        """The first hop according to these lists; "" for what they do not say.

        The client is the first address from the right that is not a trusted proxy.
        """
        client, place = "", 0
        for place, text in enumerate(reversed(clients)):  # noqa: B007
            client = _address(text)
            if not client or not self.trust(client):
                break
        # Scheme and host are at the client's place in their lists; in a shorter list, the first.
        scheme, host = (
            values[-1 - place] if len(values) > place else next(iter(values), "")
            for values in (schemes, hosts)
        )
        if not _HOST.fullmatch(host):
            raise HttpException(400, "the host that was forwarded is malformed")
        return _Hop(client, scheme.lower() if scheme.lower() in ("http", "https") else "", host)


_PARAMETER = re.compile(
    r';\s*+([^\s=;"]++)\s*+=\s*+(?:"((?:[^"\\]++|\\.)*+(?="\s*+(?:;|$))|[^"]*+)"|([^;]*+))'
)


def _parameters(value: str) -> dict[str, str]:
    """The parameters of a field, by name: `form-data; name="a"` has one (part 16 uses it, too).

    Within quotes `\\"` is a quote, by the standard. A browser instead writes a quote as `%22`, a
    line break as `%0D%0A`, and a backslash as it is: the name in `filename="C:\\"; x="y"` has one.
    """
    found = {}
    for name, text, plain in _PARAMETER.findall(value):
        if "\\" in text or "%" in text:
            text = re.sub(r'\\(["\\])', r"\1", text).replace("%22", '"')
            text = text.replace("%0D", "\r").replace("%0A", "\n")
        found[name.lower()] = text or plain.strip()
    return found


def _address(text: str) -> str:
    """An address without its port: `192.0.2.1:80`, `[2001:db8::1]:80`, `2001:db8::1`."""
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0] if text.count(":") == 1 else text


# ==================================================================================================
# 18. Compression [compression]
#
# A client says which codings it can decode, and which it prefers; the answer says which was used.
# These are names of *content codings*; `br` is Brotli:
#
#     accept-encoding: gzip, br;q=0.8, zstd        in the request; `q` is a preference, 0 to 1
#     content-encoding: zstd                       in the answer
#     vary: accept-encoding                        for caches: other clients may get other bytes
#
# `_compress` is called for a whole answer, `_compress_stream` for one that is sent in pieces. A
# `Compressor` is a pair of functions. The first compresses a piece so that the client can decode it
# at once: an event does not wait for the next one. The second returns the end of the stream.
#
# A compressor refers back to bytes that were sent before. How far back is the *window*, which both
# sides keep in memory. Streams get a small one, because thousands of them may be open.
# ==================================================================================================


Compressor = tuple[Callable[[bytes], bytes], Callable[[], bytes]]


_HIGHEST = {"min_size": sys.maxsize, "zstd_level": 22, "brotli_level": 11, "gzip_level": 9}


@dataclasses.dataclass(frozen=True, slots=True)
class CompressionConfig:
    """Which answers are compressed, and how hard. A negative level turns a method off.

    `min_size` is in bytes and does not apply to streams. `zstd` needs Python 3.14 or the
    `zstandard` package, `br` the `brotli` package; `gzip` is always there.
    """

    min_size: int = 256
    zstd_level: int = 3
    brotli_level: int = 4
    gzip_level: int = 6

    def __post_init__(self) -> None:
        """StarioError for a level that a method does not have."""
        for name, most in _HIGHEST.items():
            given = getattr(self, name)
            if not isinstance(given, int) or given > most:
                raise StarioError(f"{name} is a whole number up to {most}, not {given!r}")


def _compress(
    config: CompressionConfig, headers: Headers, fields: bytes, body: bytes
) -> tuple[bytes, bytes]:
    """An answer's `fields` and body, compressed if the request's `headers` accept that."""
    coding = _coding_for(config, headers, fields)
    if coding is not None:
        compress, finish = _compressor(coding, config)
        smaller = compress(body) + finish()
        if len(smaller) < len(body):
            return _varied(fields, coding), smaller
    return _varied(fields), body


def _compress_stream(
    config: CompressionConfig, headers: Headers, fields: bytes
) -> tuple[bytes, Compressor | None]:
    """The same for an answer whose body follows: its fields, and what compresses the body."""
    kind = _CONTENT_TYPE.search(fields)
    if kind is None or not re.match(_COMPRESSIBLE, kind[1].decode("latin-1")):
        return fields, None
    coding = _coding_for(config, headers, fields, streaming=True)
    if coding is None:
        return _varied(fields), None
    return _varied(fields, coding), _compressor(coding, config, streaming=True)


_CONTENT_TYPE = re.compile(rb"^content-type: ([^\r]*)", re.MULTILINE)


# An answer with any of these fields is not compressed.
_UNCOMPRESSED = re.compile(
    rb"(?im)^(?:content-(?:encoding|range|digest): |repr-digest:|cache-control:[^\r]*no-transform)"
)


def _coding_for(
    config: CompressionConfig, headers: Headers, fields: bytes, streaming: bool = False
) -> str | None:
    """The coding for an answer with these fields, or None."""
    if _UNCOMPRESSED.search(fields):
        return None
    accepted = ",".join(headers._values("accept-encoding"))  # (a long one is not cached)
    choose = _choose_coding if len(accepted) <= _KEPT_TEXT else _choose_coding.__wrapped__
    return choose(accepted, config, streaming)


def _varied(fields: bytes, coding: str | None = None) -> bytes:
    """An answer's fields plus its coding, and a note that the answer depends on the client."""
    if coding:
        # A strong ETag promises the same bytes (RFC 9110, section 8.8.1); these are others.
        fields = re.sub(rb'(?m)^etag: "', b'etag: W/"', fields)
        fields += b"content-encoding: %b\r\n" % coding.encode()
    line = b"vary: accept-encoding\r\n"
    return fields if line in fields else fields + line


def _gzip(level: int, streaming: bool) -> Compressor:
    """gzip (RFC 1952). Between two pieces a stream keeps only the window, not a compressor.

    Each piece gets a compressor of its own, which may refer back to the last 16 kB that were sent
    (zlib calls them a dictionary). An open stream keeps no more than these, where a zlib compressor
    would take 50 kB (zstd 120, brotli 500). And a piece that many streams send after the same bytes
    is compressed once (`_cache_last`, part 13).
    """
    if not streaming:
        coder = zlib.compressobj(level, zlib.DEFLATED, 31)  # 31 is gzip with a window of 32 kB
        return coder.compress, coder.flush
    window, checksum, size = b"", 0, 0
    header = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"  # deflate; no name, no time, no system

    def compress(data: bytes) -> bytes:
        """Compress one piece. The client can decode it without the next one."""
        nonlocal window, checksum, size, header
        checksum, size = zlib.crc32(data, checksum), size + len(data)
        block, window = _deflated(data, window, level)
        start, header = header, b""
        return start + block

    def finish() -> bytes:
        """The end of the stream: an empty last block, checksum and size."""
        return header + b"\x03\0" + struct.pack("<II", checksum, size & 0xFFFFFFFF)

    return compress, finish


@_cache_last
def _deflated(data: bytes, window: bytes, level: int) -> tuple[bytes, bytes]:
    """A compressed piece of a stream, and the stream's window after it."""
    coder = zlib.compressobj(level, zlib.DEFLATED, -15, zdict=window)  # -15: no header
    block = coder.compress(data) + coder.flush(zlib.Z_SYNC_FLUSH)
    return block, (window + data)[-16 * 1024 :]


def _brotli(level: int, streaming: bool) -> Compressor:
    import brotli

    coder = brotli.Compressor(quality=level, lgwin=16 if streaming else 22)  # 2**16 bytes
    return lambda data: coder.process(data) + coder.flush(), coder.finish


def _zstd_library(level: int, streaming: bool) -> Compressor:
    from compression import zstd

    names = zstd.CompressionParameter
    small = {names.window_log: 16, names.hash_log: 13, names.chain_log: 13} if streaming else {}
    coder = zstd.ZstdCompressor(options={names.compression_level: level, **small})
    return lambda data: coder.compress(data, coder.FLUSH_BLOCK), coder.flush


def _zstd_package(level: int, streaming: bool) -> Compressor:
    import zstandard

    small = {"window_log": 16, "hash_log": 13, "chain_log": 13} if streaming else {}
    parameters = zstandard.ZstdCompressionParameters.from_level(level, **small)
    coder = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    block = zstandard.COMPRESSOBJ_FLUSH_BLOCK
    return lambda data: coder.compress(data) + coder.flush(block), coder.flush


@lru_cache(maxsize=1)
def _codings() -> dict[str, Callable[[int, bool], Compressor]]:
    """The codings that this Python has. Each is tried once: an installed package may be broken."""
    found: dict[str, Callable[[int, bool], Compressor]] = {"gzip": _gzip}
    for coding, make in (("zstd", _zstd_library), ("zstd", _zstd_package), ("br", _brotli)):
        if coding not in found:
            with suppress(ImportError):
                make(1, False)
                found[coding] = make
    return found


def _compressor(coding: str, config: CompressionConfig, streaming: bool = False) -> Compressor:
    return _codings()[coding](_level(config, coding), streaming)


def _level(config: CompressionConfig, coding: str) -> int:
    return {"zstd": config.zstd_level, "br": config.brotli_level, "gzip": config.gzip_level}[coding]


@lru_cache(maxsize=512)
def _choose_coding(accepted: str, config: CompressionConfig, streaming: bool = False) -> str | None:
    """The content coding to use for an Accept-Encoding (RFC 9110, section 12.5.3), or None."""
    # If the client weighs two the same: the smaller answer, or for a stream less memory.
    preference = ("gzip", "zstd", "br") if streaming else ("zstd", "br", "gzip")
    weights: dict[str, float] = {}
    for item in accepted.lower().split(",", 32)[:32]:  # (only a dozen exist)
        coding, _, parameter = item.partition(";")
        given = _WEIGHT.fullmatch(parameter)
        weights[coding.strip()] = float(given[1] or 1) if given else 0.0
    best, best_weight = None, 0.0
    for coding in preference:
        weight = weights.get(coding, weights.get("*", 0.0))
        if weight > best_weight and coding in _codings() and _level(config, coding) >= 0:
            best, best_weight = coding, weight
    return best if best_weight >= weights.get("identity", 0.0) else None  # identity: uncompressed


_WEIGHT = re.compile(r"\s*(?:q=\s*(0(?:\.\d{0,3})?|1(?:\.0{0,3})?)\s*)?")


Stario._compression = CompressionConfig()  # an app's default


# ==================================================================================================
# 19. Static files [assets]
#
# Each file has a second name, with a *fingerprint*: 16 hex digits of its contents' SHA-256. A
# browser may keep what it gets by that name forever, because other contents have another name. The
# plain name redirects to it, and in a page you write it with `asset("style.css")`:
#
#     GET /static/style.css                  307 location: ./style.3f2a91c04be7d658.css
#     GET /static/style.3f2a91c04be7d658.css 200 cache-control: public, max-age=31536000, immutable
#
# Files up to 256 KiB are kept in memory, compressed once for each content coding (part 18). Larger
# ones are read when they are sent, and not compressed.
#
# Files may change while they are served. Two rules hold even then. An answer that may be kept
# forever has exactly the contents that its name stands for, or is cut off. And nothing is served
# from outside the directory, or from a file or folder whose name begins with a dot, whatever a name
# or a symbolic link says. A request with an old fingerprint gets the current file, with `no-cache`.
# Redirecting it might never end: by the next request, a growing log has yet another name.
#
# Not supported: directory listings, and several ranges in one request.
# ==================================================================================================


_IN_MEMORY = 256 * 1024  # bytes: files up to this size are kept in memory
_IN_MEMORY_TOTAL = 64 * 1024 * 1024  # bytes of a collection, not counting compressed copies
_HELD_BACK = 64 * 1024  # bytes at the end of a large file: see `_send_rest`
_TICK = 50_000_000  # nanoseconds; two changes to a file within this time may show the same time
_IDENTITY = ""  # no content coding
_FOREVER = b"cache-control: public, max-age=31536000, immutable\r\n"
_COMPRESSED_ONCE = CompressionConfig(zstd_level=12, brotli_level=9, gzip_level=9)
_SUFFIX_OF_CODING = {"zstd": ".zst", "br": ".br", "gzip": ".gz"}
_FINGERPRINT = re.compile(r"\.[0-9a-f]{16}(?=\.[^./]*\Z|\Z)")
# On Windows a file has more than one name (`a.txt::$DATA`, `A~1.TXT`, `a.txt.`), and some names are
# devices in every directory.
_OTHER_NAME = (
    r'(?i)[<>:"|?*]|[. ]\Z|~\d|\A(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[\d¹²³]) *(\.|\Z)'
)
# The operating system's errors that mean: no such file, or none that we may read.
_ABSENT = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP,
    errno.ENAMETOOLONG, errno.EINVAL, errno.ENXIO,
}  # fmt: skip
# Types that Python's own table lacks, at least in 3.11. `x.tar.gz` has the type gzip: with the type
# of its contents, and `content-encoding: gzip`, a browser would unpack the download.
_SUFFIXES = """
    text/javascript js mjs cjs | text/plain log | text/markdown md | text/calendar ics |
    application/xml xml | application/json map | application/ld+json jsonld |
    application/geo+json geojson | application/xhtml+xml xhtml | application/atom+xml atom |
    application/rss+xml rss | application/gzip gz tgz | application/zstd zst |
    application/x-bzip2 bz2 tbz2 | application/x-xz xz txz | application/octet-stream br |
    application/x-compress z | image/svg+xml svgz | image/apng apng | image/webp webp |
    image/x-icon ico | image/jxl jxl | font/woff woff | font/woff2 woff2 | font/ttf ttf |
    application/yaml yaml yml | application/toml toml | application/x-ndjson ndjson jsonl |
    application/vnd.ms-fontobject eot | application/epub+zip epub | image/jpeg jfif |
    font/otf otf | audio/mp4 m4a | audio/ogg ogg oga opus | audio/wav wav | audio/flac flac |
    audio/webm weba | video/mp4 m4v | video/ogg ogv | model/gltf-binary glb | model/gltf+json gltf
"""
_TYPES = {"." + end: kind for kind, *ends in map(str.split, _SUFFIXES.split("|")) for end in ends}


@lru_cache(maxsize=256)
def _content_type(suffix: str) -> str:
    """From `_TYPES`, then Python's table, then this machine's, which other programs may change."""
    kind = _TYPES.get(suffix)
    if kind is None:
        import mimetypes

        name = "x" + suffix
        kind = mimetypes.MimeTypes().guess_type(name)[0] or mimetypes.guess_type(name)[0]
    kind = kind or "application/octet-stream"
    return kind + "; charset=utf-8" if kind.startswith("text/") else kind


def _version(found: os.stat_result) -> tuple[int, ...]:
    """Tells versions of a file apart, without reading it.

    Size and modification time are not enough: reproducible builds give all files the same time, and
    often the same size. But a file that replaces another has its own inode, and every write to a
    file changes its `ctime`.
    """
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class _Representation(NamedTuple):
    """A file in one content coding (RFC 9110, section 3.2)."""

    etag: str  # names this version; a client sends it to ask whether its copy is still current
    fields: bytes  # of the answer
    body: bytes | None  # None: the file is large, and is read when it is sent


class _File:
    """One version of a file: its fingerprint, and its contents unless it is large.

    `start` is its first two bytes, which show whether it is gzip.
    """

    version: tuple[int, ...] = ()  # for a file on disk
    consistent = True  # it was not written to while it was read

    def __init__(self, name: str, digest: str, data: bytes | None, start: bytes) -> None:
        stem, suffix = os.path.splitext(name)
        self.name = name
        self.digest = digest
        self.data = data
        self.size = len(data or b"")
        self.memory = self.size + 1024  # about the size of this object, in bytes
        self.fingerprinted = f"{stem}.{digest}{suffix}"
        self.content_type = _content_type(suffix[:32].lower())  # (cut, because it is cached)
        # A `.svgz` is the one compressed file that browsers want unpacked.
        self.is_svgz = suffix.lower() == ".svgz" and start == b"\x1f\x8b"
        can_be_smaller = data is not None and re.match(_COMPRESSIBLE, self.content_type)
        self.compressible = bool(can_be_smaller and not self.is_svgz)
        self.representations: dict[str, _Representation] = {}  # by coding
        self.encode(_IDENTITY, data)

    def encode(self, coding: str, body: bytes | None) -> _Representation:
        """Keep the contents in a coding, or as they are if that makes them no smaller."""
        etag = f'"{self.digest}-{coding}"' if coding else f'"{self.digest}"'
        shown = "gzip" if self.is_svgz else coding
        fields = (
            f"etag: {etag}\r\nx-content-type-options: nosniff\r\naccept-ranges: bytes\r\n"
            f"content-type: {self.content_type}\r\n"
        )
        fields += f"content-encoding: {shown}\r\n" if shown else ""
        fields += "vary: accept-encoding\r\n" if self.compressible else ""
        representation = _Representation(etag, fields.encode("latin-1", "replace"), body)
        if coding and len(body or b"") >= self.size:
            representation = self.representations[_IDENTITY]
        self.representations[coding] = representation
        return representation


def _digest(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()[:16]


def _file_of(name: str, data: bytes) -> _File:
    return _File(name, _digest(data), data, data[:2])


def _read_file(
    name: str, opened: IO[bytes], large_digest: Callable[[IO[bytes], tuple[int, ...]], str]
) -> _File:
    """Read an open file. A small one that changes meanwhile is read again, up to 3 times in all.

    The contents of a large one are not kept; `large_digest(opened, version)` is its fingerprint.
    """
    for _ in range(3):
        before = os.fstat(opened.fileno())
        large = before.st_size > _IN_MEMORY
        opened.seek(0)
        data = opened.read(2 if large else -1)
        if large:
            found = _File(name, large_digest(opened, _version(before)), None, data)
            found.size = before.st_size
        else:
            found = _file_of(name, data)
        found.version = _version(os.fstat(opened.fileno()))
        found.consistent = found.version == _version(before)
        if large or found.consistent:
            break
    return found


def _open_regular(path: str) -> IO[bytes]:
    """Open a regular file. A pipe or a device counts as missing, and is not waited for."""
    nonblocking = getattr(os, "O_NONBLOCK", 0)
    # Unbuffered, so that each `read` sees the file's current contents.
    opened = open(  # noqa: SIM115
        path, "rb", buffering=0, opener=lambda path, flags: os.open(path, flags | nonblocking)
    )
    if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
        opened.close()
        raise FileNotFoundError(errno.ENOENT, "no regular file", path)
    return opened


def _is_absent(exc: OSError | ValueError) -> bool:
    """Whether the file does not exist for us. ValueError: no file can have that name."""
    return getattr(exc, "errno", errno.EINVAL) in _ABSENT


def _file_error(exc: OSError | ValueError, w: _RawWriter) -> Exception:
    """What to raise for a file that cannot be opened. A disk error is returned unchanged."""
    if not w.started and _is_absent(exc):
        return HttpException(404)
    if not w.started and getattr(exc, "errno", 0) in (errno.EMFILE, errno.ENFILE):
        return HttpException(503, "too many files are open")
    return exc


def asset(name: str, collection: str = "static") -> str:
    """A file's fingerprinted name: `"/static/" + asset("style.css")` is its address.

    Characters that a URL cannot hold are escaped. The file is read when it is first asked for, and
    again after it has changed. Raises StarioError if `app.assets` was given no such collection, or
    the collection has no such file.
    """
    if collection not in _collections:
        raise StarioError(f"no collection {collection!r}: call app.assets(...) for it first")
    can_be_asked_for = isinstance(name, str) and not _SURROGATE.search(name)  # in a URL
    file = _collections[collection].file(name) if can_be_asked_for else None
    if file is None:
        raise StarioError(f"{collection!r} has no file {name!r}")
    return quote(file.fingerprinted)


class Assets:
    """A handler for the files of one collection, on a route that ends in `/*`."""

    def __init__(
        self, source: str | os.PathLike[str] | Mapping[str, str | bytes], collection: str
    ) -> None:
        # By name, the oldest first. Threads read a directory's files, so `_keep` takes the lock.
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._held = 0  # about how many bytes the files take
        self._lock = threading.RLock()
        # Version and fingerprint of each large file, by device and inode: links may give one file
        # many names, and it should be read only once.
        self._large: dict[tuple[int, ...], tuple[tuple[int, ...], str]] = {}
        self._under_way: dict[object, asyncio.Task[Any]] = {}  # work in threads: see `_once`
        self._root: str | None = None  # the directory; or:
        self._given: dict[str, bytes] = {}  # contents by name
        if isinstance(source, Mapping):
            for name, text in source.items():
                data = text.encode("utf-8", "replace") if isinstance(text, str) else text
                if not (isinstance(name, str) and isinstance(data, bytes)) or name[:1] in ("", "/"):
                    example = '{"css/style.css": "..."} is needed, with text or bytes'
                    raise StarioError(f"assets: {example}, not {{{name!r}: {text!r:.40}}}")
                self._given[name] = data
        else:
            try:
                self._root = os.path.abspath(os.fsdecode(source))
            except TypeError:
                raise StarioError(f"assets takes a directory or a dict, not {source!r}") from None
            if not os.path.isdir(self._root):
                raise StarioError(f"assets: there is no directory {self._root!r}")
        _collections[collection] = self

    # -- Finding a file

    def file(self, name: str) -> _File | None:
        """The current file of this plain name; None if there is none that may be served."""
        return self._current(name) or self._load(name)

    async def _find(self, name: str) -> _File | None:
        """Like `file`, but a large one is read in a thread, so other requests need not wait."""
        if known := self._current(name):
            return known
        large = False
        if self._root is not None:
            with suppress(OSError, ValueError):  # `_load` deals with these
                large = os.stat(f"{self._root}/{name}").st_size > _IN_MEMORY
        return await self._once(name, lambda: self.file(name)) if large else self._load(name)

    async def _once(self, key: object, work: Callable[[], T]) -> T:
        """Do work in a thread. A second call with the same key, on this loop, shares its result."""
        mark = key, asyncio.get_running_loop()
        task = self._under_way.get(mark)
        if task is None:
            task = self._under_way[mark] = asyncio.create_task(asyncio.to_thread(work))
            task.add_done_callback(lambda _: self._under_way.pop(mark))
        return cast(T, await asyncio.shield(task))  # a client that goes does not cancel it

    def _current(self, name: str) -> _File | None:
        """The file as it was read before, unless it has changed since."""
        known = self._files.get(name)
        if known is None or self._root is None:
            return known
        try:
            return known if _version(os.stat(f"{self._root}/{name}")) == known.version else None
        except OSError:
            return None

    def _load(self, name: str) -> _File | None:
        """Read the file, and keep it if later changes to it will show in its version."""
        if name in self._given:
            return self._files.setdefault(name, _file_of(name, self._given[name]))
        now = time.time_ns()
        try:
            with self.open(name) as opened:
                found = _read_file(name, opened, self._large_digest)
        except (OSError, ValueError) as exc:
            if not _is_absent(exc):
                raise
            self._keep(name, None)
            return None
        # Two changes within `_TICK` may leave the same version. So a file just changed is not kept.
        # (A program can set `modified`, even to the future; the next change sets it to now.)
        if found.consistent:
            modified, changed = found.version[-2:]
            if now - changed > _TICK and (now - modified > _TICK or modified > now):
                self._keep(name, found)
        return found

    def _large_digest(self, opened: IO[bytes], version: tuple[int, ...]) -> str:
        import hashlib

        known, digest = self._large.get(version[:2], ((), ""))
        if known != version:
            opened.seek(0)
            digest = hashlib.file_digest(opened, "sha256").hexdigest()[:16]  # type: ignore[arg-type]
        return digest

    def open(self, name: str) -> IO[bytes]:
        """Open a file of the directory. FileNotFoundError also for one that must not be served."""
        for _ in range(3):
            path = self._resolve(name)
            opened = _open_regular(path)
            # The file, or a folder above it, may meanwhile have been replaced by a link.
            with suppress(OSError):
                same = os.path.samestat(os.lstat(path), os.fstat(opened.fileno()))
                if same and self._resolve(name) == path:
                    return opened
            opened.close()
        raise FileNotFoundError(errno.ENOENT, "the file does not stay in its place", name)

    def _resolve(self, name: str) -> str:
        """The real path that a name leads to: inside the directory, and not hidden."""
        if self._root is None:  # the files were given as a dict without this one
            raise FileNotFoundError(errno.ENOENT, "not in the collection", name)
        for part in name.split("/"):
            odd = "\\" in part or (os.name == "nt" and re.search(_OTHER_NAME, part))
            if not part or part[0] == "." or odd:
                raise FileNotFoundError(errno.ENOENT, "hidden, or no plain name", name)
        root = os.path.realpath(self._root)
        path = os.path.realpath(os.path.join(root, name), strict=True)
        # Kubernetes mounts a ConfigMap with links to folders whose names begin with two dots.
        for part in os.path.relpath(path, root).split(os.sep):
            if part == ".." or (part[0] == "." and part[:2] != ".."):
                raise FileNotFoundError(errno.ENOENT, "a link to outside or to a hidden file", name)
        return path

    def _keep(self, name: str, found: _File | None) -> None:
        """Keep this under the name, in place of what was there; None only removes that."""
        with self._lock:
            if known := self._files.pop(name, None):
                self._held -= known.memory
            if found is None:
                return
            self._files[name] = found
            self._held += found.memory
            if found.data is None:
                self._large[found.version[:2]] = found.version, found.digest
            while self._held > _IN_MEMORY_TOTAL and self._files:
                # (no `for`: a `__del__` that runs now may call this again, in this thread)
                _, oldest = self._files.popitem(last=False)
                self._held -= oldest.memory

    # -- Answering

    async def __call__(self, c: Context, w: Writer) -> None:
        """Serve the file that `c.req.tail` names."""
        if "%2f" in c.req.raw_path.lower():  # a slash inside a name, which no file has
            raise HttpException(404)
        try:
            await self._answer(c.req.tail, w)
        except OSError as exc:
            raise _file_error(exc, w) from None

    async def _answer(self, asked: str, w: Writer) -> None:
        """Serve with `_FOREVER`, redirect to the fingerprinted name, or serve with `no-cache`."""
        plain = _FINGERPRINT.sub("", asked, count=1)
        file = await self._find(plain)
        if file is not None and asked == file.fingerprinted and file.consistent:
            return await self._serve(file, w, _FOREVER)
        # `asked` has no fingerprint, or an old one, or something that looks like one: a file may
        # really be named `a.0123456789abcdef.css`. `literal` is the file named exactly `asked`.
        literal = await self._find(asked) if asked != plain else file
        if literal is not None and literal.consistent:
            w.headers.set("cache-control", "no-cache")
            return w._redirect("./" + quote(literal.fingerprinted.rpartition("/")[2]), 307)
        file = literal or file
        if file is None:
            raise HttpException(404)
        await self._serve(file, w, b"cache-control: no-cache\r\n")

    async def _serve(self, file: _File, w: Writer, caching: bytes) -> None:
        coding = _coding_of(file, w)
        representation = file.representations.get(coding)
        if representation is None:
            key = (file.name, file.digest, coding)
            representation = await self._once(key, lambda: self._encode(file, coding))
        opened = self.open(file.name) if representation.body is None else None
        _answer_with(w, file, representation, caching, opened)

    def _encode(self, file: _File, coding: str) -> _Representation:
        """Compress a file, or use the copy beside it (`style.css.br`) if it decodes to the file."""
        with suppress(Exception):  # if anything is wrong with the copy, compress
            with self.open(file.name + _SUFFIX_OF_CODING[coding]) as opened:
                body = opened.read(2 * _IN_MEMORY)
            if _decoded(coding, body, file.size + 1) == file.data:
                return file.encode(coding, body)
        compress, finish = _compressor(coding, _COMPRESSED_ONCE)
        return file.encode(coding, compress(file.data or b"") + finish())


def _decoded(coding: str, body: bytes, most: int) -> bytes:
    """Decompress; empty if the data is cut off. Stops once there are more than `most` bytes."""
    decoder: Any = zlib.decompressobj(31)  # 31 is gzip
    if coding == "br":
        import brotli

        decoder = brotli.Decompressor()
    elif coding == "zstd" and _codings()[coding] is _zstd_package:
        import zstandard

        decoder = zstandard.ZstdDecompressor().decompressobj()
    elif coding == "zstd":
        from compression import zstd

        decoder = zstd.ZstdDecompressor()
    decode = decoder.process if coding == "br" else decoder.decompress
    found = b""
    for start in range(0, len(body), 256):  # in small steps: it may grow a thousandfold
        found += decode(body[start : start + 256])
        if len(found) > most:
            break
    is_whole = decoder.is_finished() if coding == "br" else decoder.eof and not decoder.unused_data
    return found if is_whole else b""


def _coding_of(file: _File, w: _RawWriter) -> str:
    """The coding to send a file in. A range counts the bytes of the file itself: no coding."""
    request, config = w._request, w._compression
    is_part = request.method == "GET" and "range" in request.headers
    if config and file.compressible and file.size >= config.min_size and not is_part:
        return _coding_for(config, request.headers, b"") or _IDENTITY
    return _IDENTITY


class _Rest:
    """What is left to send of a large file: the value of `w.file(...)`.

    A handler may await it. Otherwise `dispatch` (part 8) does so after the handler has returned.
    """

    def __init__(self, work: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        self._work = work

    def __await__(self) -> Generator[Any, Any, None]:
        work, self._work = self._work, None
        if work is not None:
            yield from work().__await__()


def _answer_with(
    w: _OneShotWriter,
    file: _File,
    representation: _Representation,
    more: bytes,
    opened: IO[bytes] | None = None,
    *,
    status: int = 200,
    compress: bool = False,
) -> None:
    """Answer with a file (200), a part of it (206), or no contents: 304, 412, 416.

    `more` are fields; with `_FOREVER` the file must not change while it is sent. For a large file
    only the head is sent here; a `_Rest` sends the contents, from the file that is `opened`.
    """
    try:
        request = w._request
        fields = representation.fields + more
        part = None
        if status == 200 and request.method in ("GET", "HEAD"):
            if _has_copy(request, representation.etag):
                if compress and _coding_of(file, w):  # the 200 is compressed, so its ETag is weak
                    fields = fields.replace(b'etag: "', b'etag: W/"')
                return w._answer(304, (fields, False), b"")
            part = _range(request, file.size, representation.etag)
        start, stop = part or (0, file.size)
        if part and start >= stop:
            outside = b"content-range: bytes */%d\r\ncache-control: no-store\r\n" % file.size
            return w._answer(416, (outside, False), b"")
        if part:
            status, compress = 206, False
            fields += b"content-range: bytes %d-%d/%d\r\n" % (start, stop - 1, file.size)
        if representation.body is not None or opened is None:
            return w._answer(status, (fields, compress), (representation.body or b"")[start:stop])
        w._begin(status, fields, stop - start)
        w._rest = _Rest(lambda: _send_rest(w, file, opened, start, stop, more is _FOREVER))
    finally:  # close it, unless a `_Rest` will read it
        if opened is not None and w._rest is None:
            opened.close()


async def _send_rest(
    w: _RawWriter, file: _File, opened: IO[bytes], start: int, stop: int, immutable: bool
) -> None:
    """Send a part of a large file. If it shrinks, or an `immutable` one changes, it is cut off.

    The last bytes are read, then the version is compared, and only then are those bytes sent.
    """
    w._rest = None  # it is being sent
    with opened:
        if w._request.method != "HEAD":
            last = max(start, stop - _HELD_BACK)
            await w.send_file(opened, start, last - start)
            await w.drain()
            opened.seek(last)
            rest = opened.read(stop - last)
            now = os.fstat(opened.fileno())
            if now.st_size < file.size or (immutable and _version(now) != file.version):
                raise StarioError(f"{file.name} has changed, or is shorter, while it is sent")
            w.write(rest)
        w.end()


def _answer_download(
    w: _OneShotWriter, source: str | os.PathLike[str] | bytes, filename: str | None, status: int
) -> None:
    """Answer `w.file(...)`: a file of no collection. A large one's etag hashes only its version."""
    fields = b"cache-control: no-cache\r\n" + _disposition(filename)
    opened = None
    if isinstance(source, bytes):
        file = _file_of(filename or "", source)
    elif not isinstance(source, str | os.PathLike):
        raise StarioError(f"w.file takes a path or bytes, not {source!r}")
    else:
        try:
            opened = _open_regular(os.fspath(source))
            name = filename or os.path.basename(opened.name)
            file = _read_file(name, opened, lambda _, version: _digest(repr(version).encode()))
        except (OSError, ValueError) as exc:
            raise _file_error(exc, w) from None
    whole = file.representations[_IDENTITY]
    _answer_with(w, file, whole, fields, opened, status=status, compress=file.compressible)


def _disposition(filename: str | None) -> bytes:
    """The header field that makes a browser save the answer under this name (RFC 6266, 8187)."""
    if filename is None:
        return b""
    if _CONTROL.search(filename):
        raise StarioError(f"{filename!r} cannot be a file's name: it holds control characters")
    plain = re.sub(r'[^ -~]|["\\%/]', "_", filename)
    line = f'content-disposition: attachment; filename="{plain}"'
    if plain != filename:
        line += "; filename*=UTF-8''" + quote(filename, safe="!#$&+^`|", errors="replace")
    return line.encode("ascii") + b"\r\n"


def _has_copy(request: Request, etag: str) -> bool:
    """Whether the client already has this version (`If-None-Match`, RFC 9110, section 13.1.2).

    HttpException(412) if it wants only other versions (`If-Match`, section 13.1.1).
    """
    wanted, known = request.headers._list("if-match"), request.headers._list("if-none-match")
    if wanted and etag not in wanted and "*" not in wanted:
        raise HttpException(412)
    return "*" in known or etag in [tag.removeprefix("W/") for tag in known]


_RANGE = re.compile("bytes=([0-9]{0,18})-([0-9]{0,18})", re.IGNORECASE)


def _range(request: Request, size: int, etag: str) -> tuple[int, int] | None:
    """Start and stop of the bytes asked for by `range: bytes=0-99` (RFC 9110, section 14.2).

    If the file has no such bytes, they are the same. None, for the whole file, if the range is for
    another version (`If-Range`) or malformed, or if there are several.
    """
    of_another = request.headers.get("if-range") not in (None, etag)
    asked = _RANGE.fullmatch(request.headers.get("range") or "")
    if request.method != "GET" or of_another or not size or asked is None:
        return None
    first, last = asked.groups()
    if not first:  # "bytes=-500": the last 500. ("bytes=-" is malformed.)
        return (max(0, size - int(last)), size) if last else None
    if last and int(last) < int(first):  # it ends before it starts
        return None
    stop = min(int(last) + 1, size) if last else size
    return min(int(first), size), stop


# ==================================================================================================
# 20. Telemetry: spans, and who hears of them
#
# A *span* is a piece of work with a beginning and an end: a request, a database query, a job. It
# has attributes (what it is about), events (what happened in it) and a parent. Spans with a common
# ancestor form a *trace*, and share its id. In a handler:
#
#     c["user"] = 7                                # an attribute of the request's span
#     c("stock.checked", {"left": 3})              # an event in it
#     with c.step("query", {"table": "orders"}):   # a child span
#         ...
#
# A *tracer* is told when a span starts, when an event happens in it, and when it ends, and shows
# this in its own way. To write your own, override `on_start`, `on_event` and `on_end`.
#
# Two rules hold. A tracer gets every event at once, and a span keeps only the newest hundred, so a
# stream that is open for a week does not fill the memory. And attributes are converted to plain
# data when they are noted, so no tracer meets an object that changes or fails later.
#
# With the current step you have met all that a tracer of your own needs. The rest of this part is
# for the two that follow: values as plain data, a thread that writes, log records.
# ==================================================================================================

_EVENTS_KEPT = 100


class SpanEvent(NamedTuple):
    """Something that happened in a span. `time_ns` is nanoseconds since 1970."""

    name: str
    attributes: Mapping[str, Any]
    time_ns: int


class Span:
    """A piece of work, from `start_ns` to `end_ns` (nanoseconds since 1970; 0 while it runs).

    Call it to note an event, index it to set an attribute, use it in `with` to end it. Ids are in
    hex, as in W3C Trace Context: 16 digits for a span, 32 for a trace. If a trace is not `sampled`,
    tracers are told only of the spans that fail.
    """

    def __init__(
        self, tracer: Tracer, name: str, attributes: dict[str, Any], parent: Span | _Caller | None
    ) -> None:
        """Made by `tracer(name)`, `span.step(name)` or `span.root(name)`, and started at once."""
        self.tracer = tracer
        self.name = name
        self.id = _new_id()
        self.parent_id = parent.id if parent else None
        self.trace_id: str = parent.trace_id if parent else self.id + _new_id()
        self.sampled: bool = parent.sampled if parent else True
        self.attributes = attributes
        self.events: list[SpanEvent] = []
        self.links: list[Span] = []
        self.error: str | None = None
        self.end_ns = 0
        self.start_ns = time.time_ns()
        self._tell(tracer.on_start, self)

    def _tell(self, method: Callable[..., None], *arguments: object) -> None:
        if self.sampled:
            try:
                method(*arguments)
            except (Exception, SystemExit):  # shown on standard error; the request goes on
                sys.excepthook(*sys.exc_info())

    def __call__(
        self, event: str | BaseException, attributes: Mapping[str, Any] | None = None
    ) -> None:
        """Note an event by its name, or an exception. Neither makes the span an error."""
        if isinstance(event, BaseException):
            event.__dict__["_traced_in"] = self.trace_id  # so `fail` does not note it again
            attributes = {  # with OpenTelemetry's names
                "exception.type": type(event).__name__,
                "exception.message": _safe_text(event),
                "exception.stacktrace": _stack_of(event),
                **_noted(attributes),
            }
            event = "exception"
        noted = SpanEvent(_safe_text(event), _noted(attributes), time.time_ns())
        self.events.append(noted)
        del self.events[:-_EVENTS_KEPT]  # one operation: two threads may do it at once
        self._tell(self.tracer.on_event, self, noted)

    def __setitem__(self, key: str, value: Any) -> None:
        self.attributes[key] = _plain_data(value)

    def __getitem__(self, key: str) -> Any:
        return self.attributes[key]

    @property
    def traceparent(self) -> str:
        """This span as the parent of another program's: a header field of a request to it.

        https://www.w3.org/TR/trace-context/#traceparent-header
        """
        return f"00-{self.trace_id}-{self.id}-{'01' if self.sampled else '00'}"

    def step(self, name: str, attributes: Mapping[str, Any] | None = None) -> Span:
        """A child: work that is part of this span. `with span.step("query"): ...`"""
        return Span(self.tracer, _safe_text(name), _noted(attributes), self)

    def root(self, name: str, attributes: Mapping[str, Any] | None = None) -> Span:
        """A new trace, for work started here that stands on its own. `link` can relate the two."""
        return Span(self.tracer, _safe_text(name), _noted(attributes), None)

    def link(self, other: Span) -> None:
        """Note that this work is related to another span's. (Anything but a span is ignored.)"""
        if isinstance(other, Span):
            self.links.append(other)

    def fail(self, exc: BaseException) -> None:
        """Mark the span as failed by an exception. A trace shows its traceback only once."""
        if not self.sampled:  # failures are always reported
            self.sampled = True
            self._tell(self.tracer.on_start, self)
        if exc.__dict__.get("_traced_in") != self.trace_id:
            self(exc)
        self.error = f"{type(exc).__name__}: {_safe_text(exc)}"

    def end(self) -> None:
        """End the span. A second call does nothing."""
        if not self.end_ns:
            self.end_ns = max(time.time_ns(), self.start_ns)
            self._tell(self.tracer.on_end, self)

    def __enter__(self) -> Span:
        return self

    def __exit__(self, kind: object, exc: BaseException | None, where: object) -> None:
        if isinstance(exc, Exception):  # a cancellation is not a failure
            self.fail(exc)
        self.end()


class Tracer:
    """A tracer that shows nothing, and the base of those that do.

    `tracer("job")` starts a span of a new trace. Spans end on any thread, several at a time.
    """

    def __call__(self, name: str, attributes: Mapping[str, Any] | None = None) -> Span:
        """Start a span outside of any request: `with tracer("job") as span:`"""
        return Span(self, _safe_text(name), _noted(attributes), None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def on_start(self, span: Span) -> None:
        """A span has started."""

    def on_event(self, span: Span, event: SpanEvent) -> None:
        """Something happened in a span, or after its end, if `span.end_ns` is not 0."""

    def on_end(self, span: Span) -> None:
        """A span has ended: its attributes, error and end time are final."""


# Random ids that no span has yet, of 16 hex digits: the system is asked for many at once.
_unused_ids: list[str] = []


def _new_id() -> str:
    if len(_unused_ids) < 100:  # not 0, since other threads take some at the same time
        _unused_ids.extend(os.urandom(8 * 1000).hex("-", 8).split("-"))
    return _unused_ids.pop()


# -- A trace goes on in other programs (W3C Trace Context). A request to one of them has the field
# `traceparent: 00-<trace id>-<span id>-01`, and its span there becomes a child of ours. Programs
# with many requests record only some traces, the *sampled* ones. The field of others ends in 00.


class _Caller(NamedTuple):
    """The span of another program that sent us this request."""

    trace_id: str
    id: str
    sampled: bool


# Version ff is not allowed, 00 has 55 characters, later ones may have more. No id is all zeros.
_TRACEPARENT = re.compile(
    r"(?!ff|00.{54})[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?"
)


def _caller_of(headers: Headers) -> _Caller | None:
    """Who `traceparent` names: None if the field is missing, malformed, or there twice."""
    fields = headers._values("traceparent")
    found = _TRACEPARENT.fullmatch(fields[0]) if len(fields) == 1 else None
    return _Caller(found[1], found[2], bool(int(found[3], 16) & 1)) if found else None


# -- The current step: the Context that this task works for, and the span that it writes to. Tasks
# that it starts inherit both, and so do the threads of `asyncio.to_thread`.

_current_step: contextvars.ContextVar[tuple[object, Span | None]] = contextvars.ContextVar(
    "stario_step", default=(None, None)
)


class _UnseenSpan(Span):
    """What `c.step` gives in an app without a tracer: one shared span, which keeps nothing."""

    def step(self, *what: object) -> Span:
        return self

    __call__ = __setitem__ = root = link = fail = end = step  # type: ignore[assignment]


# (Its `traceparent` says "not sampled": a program that is called need not trace either.)
_UNSEEN_SPAN = _UnseenSpan(Tracer(), "unseen", {}, _Caller("f" * 32, "f" * 16, False))


# -- Plain data: text, numbers, True, False, None, and lists and dicts of them. Whatever is noted is
# converted to it here: `_noted` takes attributes, `_plain_data` one value, `_safe_text` a name.

_LONGEST_TEXT = 16_000  # characters of one value, or of one traceback


def _noted(attributes: Mapping[Any, Any] | None) -> dict[str, Any]:
    """A copy of the attributes, as plain data."""
    if attributes is None:
        return {}
    try:
        pairs = dict(attributes)  # copied in one step: another thread may write to it
    except Exception:  # not a mapping, or a broken one
        pairs = {"attributes": attributes}
    return {
        key if type(key) is str else _safe_text(key): _plain_data(value)
        for key, value in pairs.items()
    }


def _plain_data(value: Any) -> Any:
    kind = type(value)
    if kind is bool or value is None or (kind is str and len(value) <= _LONGEST_TEXT):
        return value
    if kind is int:  # OpenTelemetry's have 64 bits; Python will not print very long ones
        return value if -(2**63) <= value < 2**63 else _safe_text(hex(value))
    if kind is float:
        return value if math.isfinite(value) else json.dumps(value)  # NaN, Infinity as text
    if kind in (dict, list, tuple):
        with suppress(Exception):  # it holds itself, NaN, or keys that JSON does not have
            text = json.dumps(value, default=_safe_text, allow_nan=False)
            return json.loads(text) if len(text) <= _LONGEST_TEXT else _safe_text(text)
    return _plain_data(value.value) if issubclass(kind, enum.Enum) else _safe_text(value)


def _safe_text(value: object) -> str:
    """A value as text, cut if it is long; its `__str__` may fail."""
    try:
        text = str(value.args if isinstance(value, BaseExceptionGroup) else value)  # its members
    except Exception as exc:
        return f"<{type(value).__name__}: its text raises {type(exc).__name__}>"
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}... ({len(text)})"


def _stack_of(exc: BaseException) -> str:
    """The traceback; of a very long one only the end, where the exception was raised."""
    try:
        text = "".join(traceback.format_exception(exc, limit=-_EVENTS_KEPT))
    except Exception:  # its own methods fail
        text = "".join(traceback.format_tb(exc.__traceback__, -_EVENTS_KEPT)) + type(exc).__name__
    return text[-_LONGEST_TEXT:]


def _printable(text: str) -> str:
    # Clients choose paths and signals, and control characters in them would move the cursor.
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


# -- A thread that writes to a stream (a file, a terminal), so that no request waits for it.
# Requests append *entries* to a list, the queue; in Python that is a single step, and needs no
# lock. Ten times a second the thread empties the list, and writes all of it at once. An entry is a
# text, or a function and its arguments, which the thread calls for the text. So what these
# functions touch (which spans are open, say) belongs to the thread alone.
#
# Entries are lost if the list is full, because the stream stalls, or if a write fails. The next
# write that succeeds tells how many, in a span `telemetry.lost`; otherwise standard error does.

_LONGEST_QUEUE = 20_000  # entries; more are dropped, and counted
_EARLY = 5_000  # entries; when this many wait, the next write starts at once
_PATIENCE = 3.0  # seconds for the last write; the stream may have stalled
_Entry = str | tuple[Any, ...]


class _StreamTracer(Tracer):
    """What JsonTracer (part 21) and RichTracer (22) share: the queue and the thread."""

    _pause = 0.1  # seconds between two writes, and the most that a killed program loses

    def __init__(
        self, stream: IO[str] | None = None, *, logging_level: int | str | None = None
    ) -> None:
        """`stream` is standard output by default. With a `logging_level`, what the program logs
        during a request, at that level or above, becomes an event of it within the tracer's `with`.
        """
        is_text = hasattr(stream, "write") and hasattr(stream, "flush")
        if stream is not None and (not is_text or hasattr(stream, "readinto")):  # (of bytes)
            raise StarioError(f"a tracer needs a stream of text, like sys.stdout, not {stream!r}")
        self._stream: Any = sys.stdout if stream is None else stream  # (None: there is no output)
        self._log_level = None if logging_level is None else logging.Handler(logging_level).level
        self._logging: _LogToSpan | None = None
        self._renew()
        _renewed_at_fork.add(self)

    def _renew(self) -> None:
        """Start with nothing: at first, and in a forked process."""
        self._queue: list[_Entry] = []
        self._running = threading.Lock()  # held while there is a thread, so that there is only one
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()  # True: write what is left, end
        self._lost = 0  # not written, and not reported yet (below 0: reported, but then written)

    def __enter__(self) -> Self:
        if self._log_level is not None and self._logging is None:
            self._logging = _LogToSpan(self._log_level)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._logging:
            self._logging.remove()
            self._logging = None
        self._close()

    def on_end(self, span: Span) -> None:
        """Put the span into the queue."""
        self._put(self._entry_of(span))

    def _entry_of(self, span: Span) -> _Entry:
        """What a tracer puts into the queue for a span that has ended."""
        raise NotImplementedError

    def _put(self, entry: _Entry) -> None:
        waiting = len(self._queue)
        if self._stream is None or waiting >= _LONGEST_QUEUE:
            self._lost += 1
            return
        self._queue.append(entry)
        if waiting == _EARLY:
            self._wake.put(False)
        if not self._running.locked() and self._running.acquire(False):
            try:
                threading.Thread(target=self._run, name="tracer", daemon=True).start()
            except RuntimeError:  # the program is ending, and can start no threads: write here
                self._wake.put(True)
                self._run()

    def _run(self) -> None:
        ending = False
        while not ending:
            with suppress(queue.Empty):
                ending = self._wake.get(timeout=self._pause)
            self._write_all(ending)
        if self._queue:  # other threads added some during the last write
            self._write_all(ending)
        self._running.release()

    def _write_all(self, ending: bool) -> None:
        entries, lost = self._queue[:], self._lost
        count = len(entries)
        del self._queue[:count]
        self._lost += count  # until they are written, since `_close` may give up before
        if lost > 0:
            note = Tracer()("telemetry.lost", {"count": lost})
            note.end()
            entries.append(self._entry_of(note))
        texts = [each if isinstance(each, str) else self._called(*each) for each in entries]
        with suppress(BaseException):  # whatever the stream's methods raise
            text = self._completed("".join(texts), ending)
            if not text.isascii():  # the stream's encoding may lack some of it
                encoding = getattr(self._stream, "encoding", None) or "utf-8"
                text = text.encode(encoding, "backslashreplace").decode(encoding)
            if text:
                self._stream.write(text)
                self._stream.flush()
            self._lost -= count + lost  # these are written, and those are told

    def _called(self, function: Callable[..., str], *arguments: object) -> str:
        try:
            return function(*arguments)
        except Exception:  # this one cannot be shown, but the others can
            self._lost += 1
            return ""

    def _completed(self, text: str, ending: bool) -> str:
        """What to write, given the entries' text."""
        return text

    def _close(self) -> None:
        """Write what is left, unless the stream stalls. Later entries start a new thread."""
        if not self._running.locked():
            return
        self._wake.put(True)
        if self._running.acquire(timeout=_PATIENCE):
            self._running.release()
        else:  # it hangs in a write
            self._lost += len(self._queue)
            if sys.stdout is self._stream:  # Python's flush at exit would hang as well
                sys.stdout = None
        if self._lost > 0:  # told in a thread, since standard error may stall as well
            text = f"stario: {self._lost} spans and events could not be written\n".encode()
            self._lost = 0
            telling = threading.Thread(target=os.write, args=(2, text), daemon=True)
            telling.start()
            telling.join(0.2)


# Tracers and relays. Each has a thread, and a forked process has none of its parent's threads.
_renewed_at_fork: weakref.WeakSet[Any] = weakref.WeakSet()


@atexit.register
def _write_what_is_left() -> None:
    for tracer in list(_renewed_at_fork):
        if isinstance(tracer, _StreamTracer):
            tracer._close()
            # No thread begins from here on: 3.11 would wait for it forever.
            if tracer._running.acquire(False) and tracer._queue:
                tracer._write_all(True)  # came after the thread's last write


def _begin_anew() -> None:
    _unused_ids.clear()
    for has_thread in _renewed_at_fork:
        has_thread._renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


# -- Log records, while a tracer with a `logging_level` is in use: what is logged within a span goes
# to the span, and is not printed as well.


class _LogToSpan(logging.Handler):
    """Replaces the root logger's handlers, and gives them what is not logged within a span."""

    def __init__(self, level: int) -> None:
        super().__init__()
        root = logging.getLogger()
        self._least, self._root_level, self._others = level, root.level, root.handlers[:]
        root.handlers[:] = [self]
        root.setLevel(min(level, root.level))

    def remove(self) -> None:
        """Put everything back, unless the handlers have been changed meanwhile."""
        root = logging.getLogger()
        if self in root.handlers:
            root.handlers[:] = [*self._others, *(h for h in root.handlers if h is not self)]
            root.setLevel(self._root_level)

    def handle(self, record: logging.LogRecord) -> bool:
        """Note a record in the span, or pass it on. (The base's `handle` would take a lock.)"""
        span = _current_step.get()[1]
        if span and span.sampled and record.levelno >= self._least:
            said = {"severity_text": record.levelname, "logger.name": record.name}
            try:
                text = record.getMessage()
            except Exception:  # its arguments do not fit its text
                text = record.msg
            exc = record.exc_info and record.exc_info[1]
            span(exc or "log", {**said, "body": text})
        else:
            for handler in self._others_for(record):
                if record.levelno >= handler.level:
                    handler.handle(record)
        return True

    def _others_for(self, record: logging.LogRecord) -> list[logging.Handler]:
        """The handlers that the root logger would have given the record to, at its own level."""
        below, logger = [], logging.getLogger(record.name)
        while logger.parent:  # from the record's logger up to the root, without it
            below.append(logger)
            logger = logger.parent
        level = next((each.level for each in below if each.level), self._root_level)
        if record.levelno < level:
            return []
        if self._others or any(each.handlers for each in below) or not logging.lastResort:
            return self._others
        return [logging.lastResort]


# ==================================================================================================
# 21. JsonTracer: for log collectors [json]
#
# A log collector reads what programs print, one JSON object per line, and finds spans by trace id:
#
#     {"name":"POST /buy","trace_id":"0c10…","span_id":"5b1e…","start_time_unix_nano":17955…,
#      "end_time_unix_nano":17955…,"attributes":{"http.request.method":"POST", …},"events":[…]}
# ==================================================================================================


class JsonTracer(_StreamTracer):
    """One JSON object per line, for log collectors; the names are OpenTelemetry's.

    A span is one line, written within a tenth of a second after its end. The events of a span still
    open do not wait for its end: they get a line with the same ids and `"partial": true`. So do
    events after its end. Thus each event is written once, and nothing is kept for longer.
    """

    def _renew(self) -> None:
        super()._renew()
        self._events: dict[Span, list[str]] = {}  # those not yet written, as JSON

    def on_event(self, span: Span, event: SpanEvent) -> None:
        """Put the event into the queue."""
        noted = {"name": event.name, "time_unix_nano": event.time_ns}
        self._put((self._keep, span, _log_json({**noted, "attributes": event.attributes})))

    def _entry_of(self, span: Span) -> _Entry:
        line = self._line(span, f'"end_time_unix_nano":{span.end_ns}')
        return (self._with_events, span, line) if span.events else line + "}\n"

    def _line(self, span: Span, more: str) -> str:
        """The line of a span, without its events and the last brace."""
        try:
            name, attributes = _json_text(span.name), _log_json(span.attributes)
        except Exception:  # something was put there directly
            name, attributes = _json_text(_safe_text(span.name)), _log_json(_noted(span.attributes))
        line = (
            f'{{"name":{name},"trace_id":"{span.trace_id}","span_id":"{span.id}",'
            f'"start_time_unix_nano":{span.start_ns},{more},"attributes":{attributes}'
        )
        if span.parent_id:
            line += f',"parent_span_id":"{span.parent_id}"'
        if span.links:
            links = [{"trace_id": other.trace_id, "span_id": other.id} for other in span.links[:]]
            line += f',"links":{_log_json(links)}'
        if span.error:
            line += f',"status":{{"code":"ERROR","message":{_json_text(span.error)}}}'
        return line

    # These run in the tracer's thread:

    def _keep(self, span: Span, event: str) -> str:
        events = self._events.setdefault(span, [])
        events.append(event)
        return self._partial(span) if len(events) == _EVENTS_KEPT else ""

    def _partial(self, span: Span) -> str:
        return self._with_events(span, self._line(span, '"partial":true'))

    def _with_events(self, span: Span, line: str) -> str:
        if span in self._events:
            line += f',"events":[{",".join(self._events.pop(span))}]'
        return line + "}\n"

    def _completed(self, text: str, ending: bool) -> str:
        return text + "".join(map(self._partial, list(self._events)))


_log_json = _json_writer(_safe_text)
_json_text = json.encoder.encode_basestring_ascii  # the same for text, in a fifth of the time


# ==================================================================================================
# 22. RichTracer: for people [rich]
#
# It prints each request as a small tree once it has ended: its line, then its events and its steps
# (child spans) with the time since its start. A step has a bar that shows when it ran within the
# request. A *footer* at the bottom of the terminal shows what is still open.
#
#     09:48:02  POST /buy                          200   5.1 ms
#                0.51 ms  stock.checked                 left=3
#                0.56 ms  query                          4.3 ms  ─━━━━━━━━━━━  table=orders
#     ── 1 open ────────────────────────────────────────────────────────────────────────────────
#       12.4 s  GET /subscribe                        31 events  tile.painted
#
# `RichTracer` keeps what is open as trees of `_Branch`, and the footer on the screen; `_Burst` says
# which trees are shown; `_Look` turns them into lines.
# ==================================================================================================

_LONG = 10**9  # nanoseconds after which an open span is shown in the footer
_MOST_SHOWN = 20  # trees per second, and events per line in a pipe
_MOST_ROWS = 40  # rows of a tree


class _Branch:
    """A span that is open, or part of a tree that is. Its rows are its events and steps."""

    def __init__(self, span: Span, parent: _Branch | None) -> None:
        self.span = span
        self.root: _Branch = parent.root if parent else self
        self.rows: list[SpanEvent | _Branch] = []
        self.events = self.steps = 0  # (these and `last` are used in a root, for its tree)
        self.last: SpanEvent | None = None

    def add(self, row: SpanEvent | _Branch) -> None:
        """Count an event or a step, and keep it unless the tree is full."""
        root = self.root
        if isinstance(row, SpanEvent):
            root.events, root.last = root.events + 1, row
        else:
            root.steps += 1
        if not root.left_out():
            self.rows.append(row)

    def left_out(self) -> int:
        """How many more events and steps the tree of this root has had than it keeps."""
        return max(0, self.events + self.steps - _MOST_ROWS)


class _Burst:
    """Says which trees are shown: twenty a second, and the first failure of each kind. Others are
    counted, and summed up in a line for each kind; in the next second as many fewer are shown.
    """

    def __init__(self) -> None:
        self.began = 0.0  # the second, on the monotonic clock
        self.shown = 0  # trees in it
        self.kinds: dict[tuple[str, _Piece], list[int]] = {}  # (name, outcome): counted durations

    def is_shown(self, span: Span) -> bool:
        """Whether to show a span that has ended; otherwise it is counted."""
        kind = (_safe_text(span.name), _outcome(span))
        is_new_error = span.error and kind not in self.kinds
        durations = self.kinds.setdefault(kind, [])
        if self.shown < _MOST_SHOWN or is_new_error:
            self.shown += 1
            return True
        durations.append(span.end_ns - span.start_ns)
        return False

    def summary(self, look: _Look) -> Iterator[_Line]:
        """The lines for what was counted, the most frequent kind first. A new second begins."""
        kinds, self.kinds = self.kinds, {}
        counted = sum(map(len, kinds.values()))
        self.began, self.shown = time.monotonic(), min(_MOST_SHOWN, counted)
        for (name, outcome), took in sorted(kinds.items(), key=lambda kind: -len(kind[1])):
            if took:
                took.sort()
                now, count = f"{_clock(time.time_ns())}  ", f"{len(took):,} x"
                times = f"  p50 {_time_text(took[len(took) // 2])}  max {_time_text(took[-1])}"
                yield [*look.columns(now, name, count, outcome), (times, "dim")]


class RichTracer(_StreamTracer):
    """For a person at a terminal: each request is a small tree, shown when it has ended.

    What is open for over a second, such as a stream, has a line in a footer at the bottom; what the
    program prints goes above it. When more than twenty requests end in a second, the rest are one
    line per kind: how many, median and longest duration. If there is no terminal (a pipe,
    TERM=dumb), each span is one line of plain text. NO_COLOR and FORCE_COLOR are respected.
    """

    _pause = 0.05  # (after a resize the footer scrolls with the text until the next write)

    def _renew(self) -> None:
        super()._renew()
        size = None if os.environ.get("TERM") == "dumb" else _terminal_size(self._stream)
        self._live = size is not None
        coloured = self._live or bool(os.environ.get("FORCE_COLOR"))
        self._look = _Look(coloured and not os.environ.get("NO_COLOR"), size or (10**6, 0))
        self._open: dict[str, _Branch] = {}  # by the span's id
        self._burst = _Burst()
        self._footer = "unknown"  # what the screen shows; a killed program may have left one

    def on_start(self, span: Span) -> None:
        """Put the span's start into the queue."""
        if self._live:
            self._put((self._started, span))

    def on_event(self, span: Span, event: SpanEvent) -> None:
        """Put the event into the queue."""
        if self._live:
            self._put((self._happened, span, event))
        elif span.end_ns:
            self._put(self._look.plain(span, [event]))

    def _entry_of(self, span: Span) -> _Entry:
        if self._live:
            return (self._ended, span)
        return self._look.plain(span, span.events[-_MOST_SHOWN:])

    # These run in the tracer's thread. Each returns the text to show now.

    def _started(self, span: Span) -> str:
        parent = self._open.get(span.parent_id or "")
        branch = self._open[span.id] = _Branch(span, parent)
        if parent:
            parent.add(branch)
        return ""

    def _happened(self, span: Span, event: SpanEvent) -> str:
        """Keep an event for its tree. If that is gone, or an exception would wait long, show it."""
        branch = self._open.get(span.id)
        if branch:
            branch.add(event)
            span = branch.root.span
            is_soon = event.time_ns - span.start_ns < _LONG and not branch.root.left_out()
            if event.name != "exception" or is_soon:
                return ""
        return self._look.text([self._look.heading(span), *self._look.event(span, event)])

    def _ended(self, span: Span) -> str:
        """A root is shown as a tree, and a step with its root; alone if that has ended before."""
        branch = self._open.pop(span.id, None) or _Branch(span, None)
        if branch.root.span.id in self._open or not self._burst.is_shown(span):
            return ""
        return self._look.text(self._look.tree(branch))

    def _completed(self, text: str, ending: bool) -> str:
        """Add the summary of a burst and, at the end, what is still open; paint the footer."""
        if not self._live:
            return text
        look = self._look
        look.width, look.height = _terminal_size(self._stream) or (80, 24)
        if ending or time.monotonic() - self._burst.began >= 1:
            text += look.text(self._burst.summary(look))
        roots = [branch for branch in self._open.values() if branch.root is branch]
        if ending:
            text += look.text([look.heading(root.span) for root in roots])
            self._open.clear()
        return self._on_screen(text, [] if ending else look.footer(roots))

    # The screen. A terminal obeys codes that begin with the ESC character (`\x1b`):
    #
    #     ESC 7, ESC 8        save the position of the cursor; go back there
    #     ESC [J, ESC [K      erase from the cursor to the end of the screen; of the line
    #     ESC D, ESC [3A      go down a line, scrolling at the last; go up three lines
    #     ESC [20H            go to the beginning of line 20
    #     ESC [1;20r, ESC [r  scroll only lines 1 to 20; all lines (both move the cursor)
    #     ESC [?7l, ESC [?7h  cut lines that are too long; wrap them again
    #
    # The lines above the footer scroll, and the footer does not. The cursor stays above it, and so
    # does all that is written there: prints, what a person types, other programs' output.

    def _on_screen(self, text: str, footer: list[_Line]) -> str:
        """The codes that erase the footer, the text, and those that paint the footer anew."""
        old, self._footer = self._footer, self._painted(footer)
        if not text and self._footer == old:
            return ""
        # A print may have left the cursor in mid-line. Then a row of spaces as wide as the screen
        # ends on the next line; otherwise on this one. The text begins on that line, after `\r`.
        if text:
            text = f"{'':{self._look.width}}\r\x1b[K{text}"
        erase = "\x1b7\x1b[r\x1b8\x1b[J" if old else ""
        return erase + text + self._footer

    def _painted(self, footer: list[_Line]) -> str:
        """The footer's codes: scroll until there is room below the cursor, then paint it there."""
        if not footer:
            return ""
        rows, above = len(footer), self._look.height - len(footer)
        painted = ""
        for row, line in enumerate(footer, above + 1):
            painted += f"\x1b[{row}H{self._look.text([line])}"
        room = "\x1bD" * rows + f"\x1b[{rows}A\x1b7\x1b[1;{above}r"
        return f"{room}\x1b[?7l{painted}\x1b[?7h\x1b8"


# -- What it looks like. A *line* is a list of pieces, each a text and its style. The first ones are
# four columns: time, name, outcome, and a figure (an event has the first two). Attributes follow.

_Piece = tuple[str, str]
_Line = list[_Piece]
_STYLES = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33, "cyan": 36}
_STATUS_STYLES = {"2": "green", "3": "cyan", "4": "yellow", "5": "red"}
_BAR = 12  # columns of a bar


class _Look:
    """Turns spans into lines, and lines into text for a terminal of this size."""

    def __init__(self, coloured: bool, size: tuple[int, int]) -> None:
        self.coloured = coloured
        self.width, self.height = size  # columns, rows

    def text(self, lines: Iterable[_Line]) -> str:
        """Lines as they are written: with colours, and cut to the width."""
        written = []
        for line in lines:
            room = self.width - 1
            for piece, style in line:
                text = _fit(piece, room)
                room -= _cells(text)
                colour = f"\x1b[{_STYLES[style]}m" if style and self.coloured else ""
                written.append(f"{colour}{text}\x1b[0m" if colour else text)
            written.append("\n")
        return "".join(written)

    def columns(
        self, when: str, name: str, figure: str, outcome: _Piece = ("", ""), style: str = "bold"
    ) -> _Line:
        """Four columns. The name gets the room that the others leave; a longer one pushes them."""
        shown, figure = f"{outcome[0]:>7}".rstrip(), f"{figure:>9}"
        others = len(when) + len(shown) + len(figure)
        room = max(46, min(70, self.width - 34)) - others  # (all figures end at the same place)
        name = _fit(name, max(8, room, self.width - 4 - others), room)
        return [(when, "dim"), (name, style), (shown, outcome[1]), (figure, "")]

    def heading(self, span: Span) -> _Line:
        """The first line of a tree."""
        took = _time_text((span.end_ns or time.time_ns()) - span.start_ns)
        return self.columns(f"{_clock(span.start_ns)}  ", _title(span), took, _outcome(span))

    def tree(self, branch: _Branch) -> list[_Line]:
        """A root with its events and steps. A stream (long, without steps or error) is one line."""
        span, line = branch.span, self.heading(branch.span)
        if span.end_ns - span.start_ns >= _LONG and not branch.steps and not span.error:
            line.append((f"  {branch.events:,} events", "dim"))
            return self.with_pairs(line, " " * 8, span.attributes)
        lines = [*self.with_pairs(line, " " * 8, span.attributes), *self.rows(branch, " " * 20)]
        if branch.left_out():
            lines.append([(f"{'':20}and {branch.left_out()} more", "dim")])
        return lines

    def rows(self, branch: _Branch, margin: str) -> Iterator[_Line]:
        """Lines for the events and steps of a branch, and below each step its own."""
        for row in branch.rows:
            if isinstance(row, SpanEvent):
                yield from self.event(branch.root.span, row, margin)
            else:
                yield from self.step(branch.root.span, row.span, margin)
                yield from self.rows(row, margin + "│ ")

    def step(self, root: Span, span: Span, margin: str) -> list[_Line]:
        """A step: when it began after the root, how long it took, and its bar."""
        when = f"{_time_text(span.start_ns - root.start_ns):>18}{margin[18:]}"
        took = _time_text(span.end_ns - span.start_ns) if span.end_ns else "open"
        columns = self.columns(when, _safe_text(span.name), took, style="")
        return self.with_pairs([*columns, ("  ", ""), *_bar(root, span)], margin, span.attributes)

    def event(self, root: Span, event: SpanEvent, margin: str = " " * 20) -> list[_Line]:
        """An event: when it happened after the root's start, and what it was."""
        when = f"{_time_text(event.time_ns - root.start_ns):>18}{margin[18:]}"
        line, below = self.columns(when, event.name, "", style="cyan")[:2], list[_Piece]()
        if event.name == "exception":
            line[1], *below = self.failure(event, self.width - len(margin) - 3)
        *lines, last = line, *([(f"{margin}  ", "dim"), piece] for piece in below)
        return [*lines, *self.with_pairs(last, margin, event.attributes)]

    def failure(self, event: SpanEvent, width: int) -> list[_Piece]:
        """An exception's message, wrapped; below it the frames that it has passed through."""
        message: list[_Piece] = []
        for text in _failure(event).split("\n"):
            is_wide = _cells(text) > len(text)  # some of its characters take two columns
            parts = textwrap.wrap(text, max(20, width // 2 if is_wide else width))
            message += [(part, "red") for part in parts]
        return [*message[:12], *((frame, "") for frame in _frames(event))]

    def with_pairs(self, line: _Line, margin: str, attributes: Mapping[str, Any]) -> list[_Line]:
        """A line with its attributes after it or, if there is no room for them, below it."""
        pairs = _pairs(attributes)
        behind = [piece for key, value in pairs for piece in ((f"  {key}=", "dim"), (value, ""))]
        if not pairs or _cells("".join(piece for piece, _ in [*line, *behind])) < self.width:
            return [[*line, *behind]]
        widest = min(24, max(len(key) for key, _ in pairs))
        below = [[(f"{margin}  {key:<{widest}}  ", "dim"), (value, "")] for key, value in pairs]
        return [line, *below]

    def footer(self, roots: list[_Branch]) -> list[_Line]:
        """A line per root open for over a second, oldest first; at most a third of the screen."""
        now, most = time.time_ns(), self.height // 3
        long = [root for root in roots if now - root.span.start_ns >= _LONG]
        if not long or most < 2:
            return []
        shown = long if len(long) < most else long[: most - 2]
        lines: list[_Line] = [[(f"── {len(long)} open ".ljust(self.width - 1, "─"), "dim")]]
        for root in shown:
            open_for = f"{_time_text(now - root.span.start_ns):>8}  "
            title = _fit(_title(root.span), self.width // 2)
            count = f"{root.events:,} event{'s' * (root.events != 1)}"
            last = f"  {_event_text(root.last)}" if root.last else ""
            lines.append([*self.columns(open_for, title, count), (last, "cyan")])
        if len(shown) < len(long):
            lines.append([(f"{'':10}and {len(long) - len(shown)} more", "dim")])
        return lines

    def plain(self, span: Span, events: list[SpanEvent]) -> str:
        """A span and events of it as one line, for output that is not a terminal."""
        outcome, style = _outcome(span)
        rest = [_time_text(span.end_ns - span.start_ns)]
        rest += [f"{key}={value}" for key, value in _pairs(span.attributes)]
        for event in events:
            rest.append(f"| {_time_text(event.time_ns - span.start_ns)} {_event_text(event)}")
        line = [(f"{_clock(span.start_ns)} {span.trace_id[:4]} ", "dim"), (_title(span), "bold")]
        line += [(f" {outcome}".rstrip(), style), (f" {' '.join(rest)}", "")]
        return self.text([line])


def _terminal_size(stream: Any) -> tuple[int, int] | None:
    """Columns and lines of a terminal; None if there is none."""
    with suppress(AttributeError, OSError, ValueError):  # it is closed, or only looks like one
        if stream.isatty():
            size = os.get_terminal_size(stream.fileno())
            return size.columns or 80, size.lines or 24
    return None


def _cells(text: str) -> int:
    """How many columns of a terminal a text takes."""
    text = _printable(text)
    return len(text) if text.isascii() else sum(map(_char_cells, text))


def _char_cells(char: str) -> int:
    """0 for an accent on the letter before it, 2 for Chinese characters and the like, else 1."""
    if char < "\u0300" or char in "│─━✗…":
        return 1
    import unicodedata  # few programs need it

    if unicodedata.category(char) in ("Mn", "Me"):
        return 0
    return 1 + (unicodedata.east_asian_width(char) in "WF")


def _fit(text: str, most: int, least: int = 0) -> str:
    """A text without control characters, cut and padded to a width in columns."""
    text = _printable(text)
    if _cells(text) > most:
        text = text[: max(0, most - 1)]
        while _cells(text) >= max(1, most):
            text = text[:-1]
        text += "…" * (most > 0)
    return text + " " * (least - _cells(text))


def _clock(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns / 1e9).strftime("%H:%M:%S")


def _time_text(nanoseconds: int) -> str:
    seconds = nanoseconds / 1e9
    if seconds < 60:
        digits = 2 if seconds < 0.001 else 1
        return f"{seconds * 1000:.{digits}f} ms" if seconds < 1 else f"{seconds:.1f} s"
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    return f"{hours}h {minutes % 60:02}m" if hours else f"{minutes}m {int(seconds) % 60:02}s"


def _bar(root: Span, step: Span) -> _Line:
    """A bar for the root's whole time, bold where the step ran: `──━━━───────`."""
    start, end = root.start_ns, root.end_ns or time.time_ns()
    times = step.start_ns, step.end_ns or end
    a, b = (max(0, min(_BAR - 1, (at - start) * _BAR // max(1, end - start))) for at in times)
    return [("─" * a, "dim"), ("━" * (b - a + 1), "cyan"), ("─" * (_BAR - 1 - b), "dim")]


def _title(span: Span) -> str:
    """The method and path of a request, or the name of any other span."""
    method = span.attributes.get("http.request.method")
    return f"{method} {span.attributes.get('url.path')}" if method else _safe_text(span.name)


def _outcome(span: Span) -> _Piece:
    """The status of the answer, or "failed", and its style."""
    status = str(span.attributes.get("http.response.status_code") or "")
    style = "red" if span.error else _STATUS_STYLES.get(status[:1], "")
    return status or "failed" * bool(span.error), style


def _pairs(attributes: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Attributes as text, without those that other columns show."""
    return [
        (key, value if type(value) is str else json.dumps(value))
        for key, value in _noted(attributes).items()  # also what was put there directly
        if not key.startswith(("http.", "url.", "client.", "exception."))
    ]


def _event_text(event: SpanEvent) -> str:
    """An event on one line; for an exception, also where it was raised."""
    if event.name == "exception":
        return " < ".join([_failure(event), *_frames(event)])
    return " ".join([event.name, *(f"{key}={value}" for key, value in _pairs(event.attributes))])


def _failure(event: SpanEvent) -> str:
    found = event.attributes.get
    return f"✗ {found('exception.type')}: {found('exception.message')}"


def _frames(event: SpanEvent) -> list[str]:
    """The frames of an exception in the program's own code, the innermost first."""
    found = _FRAME.findall(str(event.attributes.get("exception.stacktrace", "")))
    own = [frame for frame in found if _is_own(frame[0])]
    shown = [
        f"{os.path.basename(path)}:{line}  {function}  {code}".rstrip()
        for path, line, function, code in reversed((own or found)[-8:])
    ]
    more = len(found) - len(shown)
    return [*shown, f"and {more} frames of other code"] if more else shown


_FRAME = re.compile(r'File "([^"\n]+)", line (\d+)(?:, in (.+))?(?:\n[ |]*+(?!File ")(.+))?')


# ==================================================================================================
# 23. Sessions [sessions]
#
# A session is a dict that stays with one browser: `c.session["user"] = 7`. It is kept in a cookie,
# as JSON with a signature (HMAC-SHA256, RFC 2104): a checksum that only the key's owner can make.
# So the server stores nothing, and every process that has the key can read the session:
#
#     session=eyJ1c2VyIjo3fQ==.1764180000.kq0h…    JSON in base64 . seconds since 1970 . signature
#
# The rule that must hold: the browser can read the session, but cannot change it. Two limits: the
# server cannot end a session early (a copy of the cookie stays valid), and a cookie holds at most
# 4,096 bytes. Keep larger data on the server, and its key in the session.
# ==================================================================================================


class Session:
    """Middleware: `app.use(Session(key))` gives each request its `c.session`, a dict of JSON.

    - `key`: a secret of 16 bytes or more that stays the same across restarts. Make one with
      `python -c "import secrets; print(secrets.token_hex())"`, and keep it out of the code.
      To change it, pass the new key before the old one: the first signs, and all are accepted.
    - `max_age`: seconds after which an unused session is empty again
    - `name`: the cookie's; over HTTPS it gets the prefix `__Host-`, so no other host can set it

    A cookie whose signature is wrong gives an empty session, and the event `session.refused`.
    """

    def __init__(
        self,
        key: str | bytes,
        *older_keys: str | bytes,
        name: str = "session",
        max_age: int = 14 * 24 * 3600,
        samesite: Literal["lax", "strict", "none"] = "lax",
    ) -> None:
        self._keys = [k.encode() if isinstance(k, str) else k for k in (key, *older_keys)]
        if any(not isinstance(k, bytes) or len(k) < 16 for k in self._keys):
            raise StarioError(
                "a session's key needs 16 bytes or more that nobody can guess: make one with "
                'python -c "import secrets; print(secrets.token_hex())"'
            )
        _cookie_line(name, "", max_age, samesite=samesite)  # (only to check the arguments)
        if name.startswith("__") or not max_age or max_age < 0:
            raise StarioError("a session has a max_age above 0; its name gets __Host- by itself")
        self._name = name
        self._max_age = max_age
        self._samesite = samesite

    def __call__(self, handler: Handler) -> Handler:
        """Wrap a handler: read the session before it, write changes with its answer."""

        async def _with_session(c: Context, w: Writer) -> None:
            name = f"__Host-{self._name}" if c.req.scheme == "https" else self._name
            kept, age = self._read(c, c.req.cookies.get(name))
            if "session" in c.state:
                raise StarioError("there are two Sessions around this handler: take one out")
            session = c.state["session"] = json.loads(kept)

            def save() -> None:
                nonlocal kept
                text = _session_json(session)
                w.headers.add("vary", "cookie")  # no cache may show one user's page to another
                if text != kept or age > self._max_age / 2:  # half its time has passed: renew it
                    self._write(w, name, text if session else "")
                kept = text

            w.headers.before_sending = save
            await handler(c, w)
            if w.started and _session_json(session) != kept:
                raise StarioError(
                    "c.session was changed after the answer had begun, so the browser does not "
                    "hear of it: change it before the first w.html(), w.patch(), ..."
                )

        return _with_session

    def _read(self, c: Context, cookie: str | None) -> tuple[str, float]:
        """The session's JSON and its age in seconds; `{}` if the cookie is missing, bad or old."""
        if not cookie:
            return "{}", 0
        import hmac

        payload, _, signature = cookie.rpartition(".")
        given = signature.encode("utf-8", "replace")
        if not any(hmac.compare_digest(self._sign(key, payload), given) for key in self._keys):
            c("session.refused", {"reason": "the signature is not ours"})
            return "{}", 0
        text, _, written = payload.rpartition(".")
        age = time.time() - int(written)
        return (base64.urlsafe_b64decode(text).decode(), age) if age <= self._max_age else ("{}", 0)

    def _write(self, w: Writer, name: str, text: str) -> None:
        """Set the cookie; without a text, delete it."""
        payload = f"{base64.urlsafe_b64encode(text.encode()).decode()}.{int(time.time())}"
        value = f"{payload}.{self._sign(self._keys[0], payload).decode()}" if text else ""
        w.cookie(
            name, value, max_age=self._max_age if text else 0, httponly=True,
            secure=name.startswith("__Host-"), samesite=self._samesite,
        )  # fmt: skip

    def _sign(self, key: bytes, payload: str) -> bytes:
        import hmac

        digest = hmac.digest(key, f"{self._name}={payload}".encode(), "sha256")
        return base64.urlsafe_b64encode(digest).rstrip(b"=")


def _session_json(session: dict[str, Any]) -> str:
    try:
        return json.dumps(session, separators=(",", ":"), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as exc:
        raise StarioError(f"c.session holds what JSON cannot: {exc}") from None


# ==================================================================================================
# 24. What lives as long as the server
#
# A *lifespan* provides something for all requests, such as a database connection. It is an async
# context manager, entered before the first request and left after the last. *Background* work is
# work that no request waits for: a clock that ticks, a long job. Both start and end with the
# server, on the event loop that called `serve`.
#
#     @asynccontextmanager
#     async def database(app: Stario) -> AsyncIterator[None]:
#         db.open("notes.db")
#         yield
#         db.close()
#
#     app.lifespan(database)
#     app.background(tick())
# ==================================================================================================


Lifespan = Callable[["Stario"], AbstractAsyncContextManager[object]]


class _Life:
    """An app's lifespans and background tasks. `tasks` is touched only on `loop`."""

    def __init__(self, app: Stario) -> None:
        self.app = app
        self.lifespans: list[Lifespan] = []
        self.loop: asyncio.AbstractEventLoop | None = None  # the server's, while it runs
        self.tasks: set[asyncio.Task[None]] = set()
        # The work to start with the server, and how. (If no server starts, `serve` closes it.)
        self.waiting: dict[Coroutine[Any, Any, Any], Callable[[], None]] = {}

    @asynccontextmanager
    async def while_served(self) -> AsyncIterator[None]:
        """Enter the lifespans in order, and start the waiting work. At the end, end all of it."""
        if self.loop is not None:
            raise StarioError("this app is served already: make another Stario for this server")
        self.loop = asyncio.get_running_loop()
        try:
            async with AsyncExitStack() as stack:
                for lifespan in self.lifespans:
                    await stack.enter_async_context(lifespan(self.app))
                    # Called just before this lifespan is left: tasks may use what it has opened.
                    stack.push_async_callback(self._end_tasks)
                for work in list(self.waiting):
                    if start := self.waiting.pop(work, None):
                        start()
                yield
        finally:
            self.loop = None
            await self._end_tasks()  # those that a lifespan started while it was left

    async def _end_tasks(self) -> None:
        _cancel(self.tasks)
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=_CLEANUP)

    def begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start the work now, or when the server starts. Any thread may call this, and may wait for
        or cancel the `concurrent.futures.Future` that it returns. (A Task belongs to one loop.)
        """
        handle: Future[T] = Future()

        def end(_: object = None) -> None:  # (no effect if the work has ended)
            handle.cancel()
            work.close()

        def start() -> None:
            loop = self.loop
            if loop is None or handle.cancelled():
                return end()  # the server has stopped, or the work was cancelled
            task = loop.create_task(self._watch(work, handle))
            _keep(task, self.tasks)
            task.add_done_callback(end)  # a cancelled task cancels the handle, and the reverse:
            handle.add_done_callback(lambda _: loop.call_soon_threadsafe(task.cancel))

        self.waiting[work] = start
        # Whichever removes it from `waiting` starts it: `while_served`, or this line.
        if (loop := self.loop) and self.waiting.pop(work, None):
            loop.call_soon_threadsafe(start)
        return handle

    async def _watch(self, work: Coroutine[Any, Any, T], handle: Future[T]) -> None:
        """Do the work in its own span, which records a failure; without a tracer, log that."""
        name = getattr(work, "__qualname__", "background")
        with self.app.tracer(name) as span, suppress(InvalidStateError):  # the handle was cancelled
            try:
                result = await work
            except asyncio.CancelledError:
                raise
            except BaseException as exc:
                span.fail(exc)
                if self.app._silent:
                    report = {"message": f"{name} has failed", "exception": exc}
                    asyncio.get_running_loop().call_exception_handler(report)
                handle.set_exception(exc)
            else:
                handle.set_result(result)


# ==================================================================================================
# 25. @baked
#
# Each row of a table is built by the same steps, and rows differ only in a few values. So `@baked`
# calls the view once, with *blanks* in place of its arguments, and looks in the resulting text for
# the places where they ended up: its *holes*. Then it writes a function that fills these. Of
#
#     @baked
#     def line(name: str, number: int) -> SafeString:
#         return h.Li({"id": f"line-{number}"}, name)
#
# it makes this function, which first tests for the most common types:
#
#     lambda name, number: SafeString("".join((
#         '<li id="line-', f"{number}" if number.__class__ is int else _quote(f"{number}"),
#         '">', _escape(name) if name.__class__ is str else _html(name), "</li>")))
#
# A hole is found by the *mark* that a blank gives as its text, `"<b41f9….0>"`. Escaping changes the
# mark, which shows its place: in content it begins with `"&lt;`, in an attribute with `&quot;&lt;`.
#
# The rule that must hold: the function returns what the view returns, to the byte, or the first
# call raises a StarioError. So a blank can only be put into the page, and refuses anything else
# (`if name:`); and the first call compares the two functions with values of many types.
# ==================================================================================================


def baked(view: Callable[P, SafeString]) -> Callable[P, SafeString]:
    """Build this view's element once; after that, only fill the arguments into its text.

        @baked
        def row(name: str, price: float) -> SafeString:
            return h.Tr(h.Td(name), h.Td({"class": "price"}, f"{price:.2f}"))

    An argument may be content, an attribute's value (also within its list or dict), part of a value
    (`f"row-{id}"`, `"mailto:" + email`), or in the URL and the queries of an action. Any other use
    of it (`if name:` above all) raises a StarioError at the first call, which names the argument.
    Globals and the like keep the values that they have at the first call.
    """
    if not inspect.isfunction(view):
        raise StarioError(f"@baked stands over a function (def), not over {view!r}")

    # Python lets a function's `__code__` be replaced. At first the code of `call` only calls
    # `first`, which replaces it with the code of `filling`. So later calls take no detour. `names`
    # holds the globals of both.
    def first(*args: object, **kwargs: object) -> object:
        filling, own = _Bake(view, names).filling(args, kwargs), view.__code__
        if filling is None:  # the view fails: let the caller see its error
            return view(*args, **kwargs)
        call.__defaults__, call.__kwdefaults__ = view.__defaults__, view.__kwdefaults__
        call.__code__ = filling.__code__.replace(  # a traceback shows the view's place
            co_name=own.co_name, co_filename=own.co_filename, co_firstlineno=own.co_firstlineno
        )
        return call(*args, **kwargs)

    names = {"first": first, "SafeString": SafeString, "_escape": _escape, "_quote": _quote}
    call = eval("lambda *args, **kwargs: first(*args, **kwargs)", names)
    return cast("Callable[P, SafeString]", wraps(view)(call))


class _Hole(NamedTuple):
    argument: str  # its name
    code: str  # an expression for the text that is filled in, not yet escaped
    is_html: bool = False  # as content it needs no escaping
    number_test: str = ""  # code that tests whether the value is a number: no escaping


# How a mark begins in the text, and the function that escapes at such a place.
_ESCAPE_OF = {'"<': "", '"&lt;': "_escape", "&quot;&lt;": "_quote"}
_PROBES = (None, True, False, 7, 0.5, "", ' aA <Be> & "c"\r\n', (), SafeString("<i>"))
# Shortcuts for `mark_for`. By function: code that does the same if the value, in `_v`, is a text,
# and if it is a number. (NAME is an attribute's name.) For other types the function is called.
_SHORT: dict[Callable[..., str], tuple[str, str]] = {
    _html: ("_escape(_v)", "f'{_v}'"),
    _other_attribute: ("f' NAME=\"{_quote(_v)}\"'", "f' NAME=\"{_v}\"'"),
    _declaration: ("f'NAME:{_v};'", "f'NAME:{_v};'"),
    _code: ("_v", "f'{_v}'"),
}
# The views that this task is calling with blanks, innermost first.
_baking: contextvars.ContextVar[tuple[_Bake, ...]] = contextvars.ContextVar("baking", default=())


class _Bake:
    """One view, from its call with blanks to the function that fills its holes."""

    def __init__(self, view: types.FunctionType, names: dict[str, Any]) -> None:
        self.view = view
        self.names = names
        self.token = "b" + os.urandom(12).hex()  # in each mark, so no text can forge one
        mark = rf'("<|"&lt;|&quot;&lt;){self.token}\.([0-9]+)(?:>|&gt;)(?:"|&quot;)'
        self.marks = re.compile(mark)
        self.holes: list[_Hole] = []  # indexed by the number in their marks
        self.found: set[int] = set()  # the holes that were found in the page
        self.met = ""  # the argument of the last blank or mark that `code` and `text` came across
        self.refusal: StarioError | None = None  # raised again if the view catches it

    def filling(self, args: Any, kwargs: Any) -> types.FunctionType | None:
        """A function that fills the holes. Before it is returned, it is compared with the view.

        None if the view fails with these values, so that there is nothing to compare.
        """
        signature = inspect.signature(self.view, follow_wrapped=False)
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        values = given.arguments.copy()
        given.arguments.update({name: self.blank(name, name) for name in values})
        filling = self.compiled(self.page(given), signature)
        for name, value in values.items():
            reusable = isinstance(value, str) or not isinstance(value, (_Blank, Iterable))
            values[name] = value if reusable else ""  # (others are read only once, or are blanks)
        given.arguments.update(values)
        if _result_or_none(self.view, given) is None:
            return None
        for name, usual in values.items():  # each argument in turn
            for value in (usual, *_PROBES):
                given.arguments.update(values, **{name: value})
                if _result_or_none(self.view, given) != _result_or_none(filling, given):
                    raise self.error(
                        f"with {name}={value!r} it gives another page than with a blank for "
                        f"{name!r}, so it decides by it, or changes it, or differs each time"
                    )
        return filling

    def page(self, blanks: inspect.BoundArguments) -> str:
        """The view's text, with marks where the blanks are."""
        if any(bake.view is self.view for bake in _baking.get()):
            raise self.error("it calls itself, which would never end")
        outer = _baking.set((self, *_baking.get()))
        try:
            page = self.view(*blanks.args, **blanks.kwargs)
        except Exception as exc:
            said = self.marks.sub(lambda mark: self.holes[int(mark[2])].argument, f"{exc}")
            raise self.refusal or self.error(f"{type(exc).__name__}: {said}") from exc
        finally:
            _baking.reset(outer)
        if self.refusal or not isinstance(page, SafeString):
            raise self.refusal or self.error(f"it gives no element, but a {type(page).__name__}")
        return page

    def error(self, reason: str) -> StarioError:
        return StarioError(
            f"{self.view.__qualname__} cannot be baked: {reason}. It is called with blanks, which "
            "can be content, or an attribute's value or a part of it, also in an f-string: do the "
            "rest outside, and pass in what comes of it"
        )

    def compiled(self, page: str, signature: inspect.Signature) -> types.FunctionType:
        """A function that gives this page, with its holes filled."""
        code = self.text(page, is_page=True)
        for number, hole in enumerate(self.holes):
            if number not in self.found:
                raise self.error(
                    f"what was made of {hole.argument!r} has not come into the page as it was: it "
                    "is changed, or something is decided by it, or nothing escapes it there"
                )
        given = signature.parameters.values()
        plain = [p.replace(default=p.empty, annotation=p.empty) for p in given]
        parameters = str(inspect.Signature(plain))[1:-1]
        source = f"lambda {parameters}: SafeString({code})"  # text is in it only as literals
        return cast(types.FunctionType, eval(source, self.names))

    def text(self, text: str, is_page: bool = False) -> str:
        """Code for a text: `"".join((…))` of the texts between the marks, and of the holes."""
        before, *rest = self.marks.split(text)  # a text; then start, number and text of each mark
        pieces = [repr(before)]
        for start, number, after in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
            hole, escape = self.holes[int(number)], _ESCAPE_OF[start]
            if is_page and not hole.is_html and not escape:
                continue  # this HTML is written by hand, unescaped: `compiled` will refuse it
            self.found.add(int(number))
            self.met = hole.argument
            code = f"{escape}({hole.code})"
            if hole.number_test:
                code = f"{hole.code} if {hole.number_test} else {code}"
            pieces += [code, repr(after)]
        return f"''.join(({', '.join(pieces)},))"

    def code(self, value: object) -> str:
        """Code for a value."""
        if isinstance(value, _Blank):
            self.met = value._argument
            return value._code
        if isinstance(value, str) and self.token in value:
            return self.text(value)
        if type(value) is str:
            return repr(value)
        if isinstance(value, Mapping):
            items = [f"{self.code(name)}: {self.code(value[name])}" for name in value]
            return "{" + ", ".join(items) + "}"
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(map(self.code, value)) + "]"
        return self.name_of(value)

    def name_of(self, value: object) -> str:
        name = f"_{id(value)}"
        self.names[name] = value
        return name

    def blank(self, argument: str, code: str) -> _Blank:
        """A blank whose type is named after its argument, since Python's own errors name types."""
        kind = type(f"argument {argument}", (_Blank,), {"__slots__": ()})
        return cast(_Blank, kind(self, argument, code))

    def mark(self, *hole: Any) -> str:
        """The text that stands for a new hole. `hole` has the fields of a `_Hole`."""
        self.holes.append(_Hole(*hole))
        if self not in _baking.get():
            raise self.error(f"{hole[0]!r} has been kept, and is used elsewhere")
        return f'"<{self.token}.{len(self.holes) - 1}>"'

    def mark_for(self, function: Callable[..., str], *values: Any, is_html: bool = False) -> str:
        """A mark for the result of a function called with blanks; empty if no value holds one.

        `(_escape(_v) if (_v := name).__class__ is str else ... else _17(_v))`: the code for `_html`
        """
        self.met = ""
        codes = [self.code(value) for value in values]
        if not self.met:
            return ""
        *names, value = values
        name, short = (names[0] if names else ""), ""  # (the name of an attribute, see `_SHORT`)
        if function in _SHORT and isinstance(value, _Blank) and re.fullmatch(r"[\w:.-]*", name):
            text, number = [code.replace("NAME", name) for code in _SHORT[function]]
            text_test, number_test = f"(_v := {codes[-1]}).__class__ is str", "_v.__class__ is int"
            short = f"{text} if {text_test} else {number} if {number_test} else "
            codes[-1] = "_v"
        code = f"({short}{self.name_of(function)}({', '.join(codes)}))"
        return self.mark(self.met, code, is_html)


class _Blank:
    """What a view gets in place of an argument. `_code` gives its value: `name`, `('#' + name)`."""

    __slots__ = ("_argument", "_bake", "_code")

    def __init__(self, bake: _Bake, argument: str, code: str) -> None:
        self._bake, self._argument, self._code = bake, argument, code

    def __html__(self) -> str:
        return self._bake.mark_for(_html, self, is_html=True)

    def __str__(self) -> str:
        return self._text("!s") or self._bake.mark_for(str, self)

    def __format__(self, spec: str) -> str:
        return self._text(spec and ":" + spec) or self._bake.mark_for(format, self, spec)

    def _text(self, form: str) -> str:
        """A mark for `f"{name}"` or `f"{name:.2f}"`; empty for other forms."""
        if not (self._code.isidentifier() and re.fullmatch(r"(!s|:[0-9.]*[defgx]?)?", form)):
            return ""
        kind = "float" if form.endswith(("e", "f", "g")) else "int"
        test = f"{self._code}.__class__ is {kind}"
        return self._bake.mark(self._argument, f"f'{{{self._code}{form}}}'", False, test)

    def __add__(self, other: object) -> _Blank:
        return self._sum(other, "({0} + {1})")

    def __radd__(self, other: object) -> _Blank:
        return self._sum(other, "({1} + {0})")

    def _sum(self, other: object, code: str) -> _Blank:
        if isinstance(other, SafeString) or not isinstance(other, (str, _Blank)):
            return cast(_Blank, NotImplemented)
        code = code.format(self._code, self._bake.code(other))
        return self._bake.blank(self._argument, code)

    def _refuse(self, *args: object) -> typing.NoReturn:
        error = self._bake.error(f"it decides by {self._argument!r}, or looks into it")
        self._bake.refusal = error
        raise error

    __bool__ = __eq__ = __hash__ = __repr__ = __getattr__ = _refuse


def _result_or_none(view: Callable[..., object], given: inspect.BoundArguments) -> object:
    try:
        return view(*given.args, **given.kwargs)
    except Exception:
        return None


def _mark_for(function: Callable[..., str], *values: object, is_html: bool = False) -> str:
    """`mark_for` of the innermost view that is being baked, for functions of other parts."""
    return _baking.get()[0].mark_for(function, *values, is_html=is_html)


# ==================================================================================================
# 26. ASGI: the same app under another server [asgi]
#
# ASGI (https://asgi.readthedocs.io) is how Python's servers call an app: one `await app(scope,
# receive, send)` for each request, and one for the server's lifetime. `scope` is a request's head.
# Each `await receive()` returns some of its body, or says that the client has gone. Each `await
# send(message)` takes some of the answer, and waits until the client can take it. So
# `uvicorn myapp:app` serves a Stario, and `Mount("/live", app)` puts one into a FastAPI app.
#
#     scope        {"type": "http", "method": "GET", "path": "/", "headers": [...], ...}
#     receive()    {"type": "http.request", "body": b"...", "more_body": False}
#                  {"type": "http.disconnect"}
#     send(...)    {"type": "http.response.start", "status": 200, "headers": [...]}
#                  {"type": "http.response.body", "body": b"...", "more_body": False}
#
# Up to three tasks work on a request. One runs the handler. The server's own task sends the answer
# (`pass_on`). If the handler has to wait, a third one receives (`listen`). Between two tasks, a
# `Body` (part 9) holds the bytes until they are read; `_answer` is one, too:
#
#     receive()  ->  listen   ->  body     ->  the handler: `await c.req.body()`
#     send(...)  <-  pass_on  <-  _answer  <-  the handler: `w.html(page)`
# ==================================================================================================


_ASGI_GRACE = 5.0  # seconds for a handler whose server has stopped, and for a body nobody wants
_ASGI_UNREAD = 60.0  # seconds that a handler may let a large body wait
_ASGI_BUFFER = 16 * 1024 * 1024  # bytes that may wait for the client; with more it is cut off

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class _AsgiExchange(Carrier):
    """The Carrier of one request that comes through ASGI. It belongs to one event loop.

    `_answer.ended`: the handler has completed its answer. `disconnected`: nobody will read the
    answer. `shutting_down`: the server is stopping, or has cancelled this request.
    """

    shutting_down = False

    def __init__(self, app: Stario, scope: Message) -> None:
        self.app = app
        self.scopes = []
        self.client = str((scope.get("client") or ("",))[0] or "")
        self.scheme = str(scope.get("scheme") or "http")
        is_http_1 = scope.get("http_version", "1.1") < "2"
        # Whether the answer's end waits for the body's (`pass_on`): for a GET only in HTTP/2, where
        # a body that comes too late costs all streams of its connection.
        self.waits_for_body = not is_http_1 or scope["method"] not in ("GET", "HEAD")
        self._news = asyncio.Event()  # one of the two bodies has been read, or has ended
        self.body = Body(self._news.set)
        self._answer = Body(self._news.set)
        self._head: Message | None = None  # of the answer, until it is sent

    async def _until(self, is_so: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait until it is so, for `seconds` at most; give whether it is."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not is_so():
                    self._news.clear()
                    await self._news.wait()
        return is_so()

    # -- The handler's side

    def begin(self, status: int, fields: bytes, unsized: bool) -> None:
        """See Carrier. `unsized` has no meaning here: the server decides how a body ends."""
        lines = [tuple(line.split(b": ", 1)) for line in fields.split(b"\r\n") if line]
        self._head = {"type": "http.response.start", "status": status, "headers": lines}
        self._answer.feed(b"")  # wakes `pass_on`, though there is no body yet

    def send(self, data: bytes) -> None:
        """See Carrier. A client with more than `_ASGI_BUFFER` bytes waiting for it is cut off."""
        if self._answer.buffered > _ASGI_BUFFER:
            self.abort()
            self.disconnect()
        self._answer.feed(data)

    def finish(self) -> None:
        """See Carrier."""
        self._answer.end()

    def abort(self) -> None:
        """See Carrier."""
        self._answer.fail(ClientDisconnected("the answer is not complete: close the connection"))

    async def drained(self) -> None:
        """See Carrier."""
        if self._answer.buffered >= _HIGH_WATER:
            await self._until(lambda: self._answer.buffered < _HIGH_WATER)
        if self.disconnected:
            raise ClientDisconnected("the client has gone")

    # -- The server's side

    async def pass_on(self, send: Send) -> None:
        """Send the answer while the handler writes it. Raises to make the server cut it off."""
        more = True
        try:
            while more:
                data = await self._answer.read()
                more = not self._answer.ended
                if self._head:
                    head, self._head = self._head, None
                    await send(head)
                if self.waits_for_body and not (more or self.body.ended):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                    data = b""
                    # Let the rest of an unread body arrive before the answer ends. If it arrives
                    # later, hypercorn closes the connection, with all its HTTP/2 streams.
                    await self._until(lambda: self.body.ended, _ASGI_GRACE)
                await send({"type": "http.response.body", "body": data, "more_body": more})
        except OSError:  # the client has gone, according to `disconnect` or to `send`
            self.disconnect()
        finally:
            self._news.set()

    async def listen(self, receive: Receive) -> None:
        """Receive the body, no faster than the handler reads it, and then the disconnect."""
        try:
            while (message := await receive())["type"] != "http.disconnect":
                if self.body.ended:
                    return  # some servers repeat the last message, and send no disconnect
                if chunk := message.get("body"):
                    self.body.feed(chunk)
                if not message.get("more_body"):
                    self.body.end()
                    self._news.set()
                elif not await self._until(lambda: self.body.buffered < _HIGH_WATER, _ASGI_UNREAD):
                    # Drop the rest: a disconnect, which ends streams, is received only after it.
                    self.body.fail(HttpException(408, "nobody has read the body"))
                    self.body.discard()
        except Exception as exc:
            if not self._answer.ended:
                self._answer.fail(exc)
        self.disconnect()

    def disconnect(self) -> None:
        """Nobody will read the answer. If it is complete, the handler is not told."""
        if not self.body.ended:
            self.body.fail(ClientDisconnected("the client left before its request was complete"))
            self.body.end()
            self._news.set()
        if not self._answer.ended or self.shutting_down:
            self.disconnected = True
            self._answer.fail(ConnectionResetError())  # ends `pass_on`
            self._answer.discard()
            self._end_scopes()


_asgi_handlers: dict[asyncio.Task[None], _AsgiExchange] = {}  # those running


async def _serve_asgi(app: Stario, scope: Message, receive: Receive, send: Send) -> None:
    """Handle one request, from its scope to the end of its handler."""
    loop, exchange = asyncio.get_running_loop(), _AsgiExchange(app, scope)
    try:
        request = _asgi_request(scope, exchange)
    except HttpException as exc:
        text = exc.detail.encode()
        exchange.waits_for_body = False  # nobody reads it
        exchange.answer(exc.status_code, _TEXT_CONTENT[0] + _length_line(len(text)), text)
        return await exchange.pass_on(send)
    handling = _spawn(app.dispatch(request, exchange), loop)
    if handling.done() and not exchange.waits_for_body:  # then no third task is needed
        return await exchange.pass_on(send)
    _asgi_handlers[handling] = exchange
    handling.add_done_callback(_asgi_handlers.pop)
    listening = _spawn(exchange.listen(receive), loop)
    try:
        await exchange.pass_on(send)
        if not handling.done():  # it continues after its answer
            await asyncio.wait([handling])
    except asyncio.CancelledError:  # the server stops; the handler, in its own task, may clean up
        exchange.shutting_down = True
        loop.call_later(_ASGI_GRACE, handling.cancel)
        raise
    finally:
        listening.cancel()
        exchange.disconnect()


def _asgi_request(scope: Message, exchange: _AsgiExchange) -> Request:
    """The request of a scope. HttpException(400) for a malformed path or host, as in part 9."""
    path = (scope.get("raw_path") or b"").decode("latin-1")
    if unquote(path) != scope["path"]:  # some frameworks cut the root off only one of the two
        path = quote(scope["path"], errors="replace")
    root = scope.get("root_path", "").rstrip("/")
    if root and f"{scope['path']}/".startswith(f"{root}/"):  # this app is mounted there
        # Cut off as many bytes as the root and a slash have; %xx is one: "/%6cive/x" gives "/x".
        path = "/" + re.sub(f"(%..|.){{,{len(root.encode()) + 1}}}", "", path, count=1)
    query = scope.get("query_string", b"").decode("latin-1")
    fields: dict[str, list[str]] = {}
    for name, value in scope.get("headers", ()):
        key = name.decode("latin-1").lower()
        charset = "utf-8" if key in _UTF_8_FIELDS else "latin-1"
        fields.setdefault(key, []).append(value.decode(charset, "replace"))
    if not _HOST.fullmatch(" ".join(fields.get("host", ()))):
        raise HttpException(400, "Host is not one valid host")
    line = RequestLine(scope["method"], f"{path}?{query}" if query else path)
    request = Request(line, Headers(fields), exchange.body, exchange)
    request.root_path = root
    return request


async def _asgi_lifespan(app: Stario, receive: Receive, send: Send) -> None:
    """The time from the server's start to its end (ASGI's lifespan protocol)."""
    message = await receive()  # lifespan.startup
    try:
        async with app._life.while_served():
            await send({"type": "lifespan.startup.complete"})
            message = await receive()  # lifespan.shutdown
            running = {task: own for task, own in [*_asgi_handlers.items()] if own.app is app}
            for exchange in running.values():
                exchange.shutting_down = True
                exchange._end_scopes()
            if running:
                await asyncio.wait(running, timeout=_ASGI_GRACE)
    except (Exception, SystemExit) as exc:
        reason = f"{type(exc).__name__}: {exc}"
        await send({"type": f"{message['type']}.failed", "message": reason})
        raise
    await send({"type": "lifespan.shutdown.complete"})


# ==================================================================================================
# 27. RedisRelay: the same between processes and machines [redis]
#
# Redis is a server that, among other things, passes messages on: PUBLISH sends one to a channel,
# SUBSCRIBE asks for those of a channel, PSUBSCRIBE for those of all channels that fit a pattern. A
# RedisRelay is a Relay (part 14) whose messages go through Redis, or Valkey, to all processes. It
# subscribes to a pattern in Redis once, however many subscriptions in this process use it.
#
#     publish("room.1", x)  ->  _outgoing  ->  PUBLISH stario:room.1 "x"  ->  Redis
#     subscriptions  <-  Relay._deliver  <-  one message for each pattern that fits  <-  Redis
#
# A thread with its own event loop talks to Redis, over one connection, for all event loops of the
# process. So `publish` and `subscribe` work in any thread, and never wait. Redis reads commands in
# the order they are sent, so if you subscribe and then publish, you get that message.
#
# Redis stores no messages. Those published while the connection is broken are missed. Every
# subscription then adds one to its `gaps`, and a handler that shows state should read it again.
# ==================================================================================================


_MAX_UNSENT = 16 * 1024 * 1024  # bytes of data that may wait to be sent while Redis is up
_BATCH = 500  # messages sent at once, at most
_RedisCommand = tuple[str | bytes, ...]


class RedisRelay(Relay[T]):
    """A `Relay` for many processes and machines: `RedisRelay("redis://localhost")`.

    It needs the package `redis`, and Redis 6 or newer. Data is what JSON can hold. In Redis, each
    subject has `prefix` in front, so several apps can share one Redis.

    While Redis cannot be reached, `publish` raises StarioError; with `queue=1000`, a thousand
    messages wait until it is back. If Redis sends nothing for `timeout` seconds, it counts as down.
    `tracer` is told with the spans `relay.lost` and `relay.back`.
    """

    def __init__(
        self,
        url: str,
        *,
        queue: int = 0,
        timeout: float = 5.0,
        prefix: str = "stario:",
        tracer: Tracer | None = None,
    ) -> None:
        super().__init__()
        self._tracer = tracer or Tracer()
        if not isinstance(timeout, (int, float)) or timeout <= 0:
            raise StarioError(f"RedisRelay: timeout is in seconds and above 0, not {timeout!r}")
        if not isinstance(queue, int):
            raise StarioError(f"RedisRelay: queue is a number of messages, not {queue!r}")
        if not isinstance(self._tracer, Tracer):
            raise StarioError(f"RedisRelay: a tracer is needed, not {tracer!r}")
        try:
            from redis.asyncio import ConnectionPool

            pool: Any = ConnectionPool.from_url(f"{url}")
            pool.connection_kwargs.update(  # whatever the URL says
                protocol=3,  # with it, answers and messages share one connection
                decode_responses=False,
                socket_timeout=timeout,  # for connecting, too
                health_check_interval=0,
            )
            self._new_connection = pool.make_connection
            self._new_connection()  # (does not connect yet)
        except ImportError:
            raise StarioError("RedisRelay needs the package redis: pip install redis") from None
        except (ValueError, TypeError) as exc:
            raise StarioError(f"RedisRelay: {exc}") from None
        self._queue = queue
        self._timeout = timeout
        self._prefix = prefix
        self._closed = False
        self._renew()
        _renewed_at_fork.add(self)

    def _renew(self) -> None:
        """Set what a forked process needs anew: the parent's thread, and its work, stay there."""
        self._lock = threading.RLock()
        self._is_changing = False
        self._steps.clear()
        # Under the lock:
        self._outgoing: deque[tuple[str, bytes, bytes]] = deque()  # PUBLISH, channel, data
        self._unsent = 0  # bytes of data in it
        self._changed: set[_PatternKey] = set()  # patterns to (un)subscribe in Redis
        self._thread: threading.Thread | None = None  # started when needed
        # Set by the thread, and read by all threads:
        self._down = ""  # why Redis could not be reached; empty once it has answered again
        self._loop: asyncio.AbstractEventLoop | None = None
        self._work = asyncio.Event()  # there is something to send, or this is closed

    # -- In any thread

    def publish(self, subject: str, data: T = None) -> None:  # type: ignore[assignment]
        """Hand a message to Redis, for all subscriptions to its subject. Never waits.

        Raises StarioError for data that JSON cannot hold, or if Redis is down.
        """
        _check_subject(subject)
        message = "PUBLISH", self._channel(subject), _relay_json(data)
        with self._lock:
            waiting = len(self._outgoing)
            full = waiting >= self._queue if self._down else self._unsent > _MAX_UNSENT
            if self._closed or full:
                why = f"Redis cannot be reached: {self._down}" if self._down else "it is overrun"
                if self._closed:
                    why = "it is closed"
                raise StarioError(f"{subject!r} is not published: {why}, {waiting} messages wait")
            self._outgoing.append(message)
            self._unsent += len(message[2])
            self._nudge()

    def close(self) -> None:
        """Send what waits, for at most a second; end all subscriptions; disconnect from Redis."""
        atexit.unregister(self.close)
        self._change(self._end)
        if self._thread is not None and not self._down:
            self._nudge()
            self._thread.join(1.0)

    def _end(self, to_wake: ToWake) -> None:
        self._closed = True
        tables = self._tables.values()
        for mailbox in {box for table in tables for boxes in table.values() for box in boxes}:
            super()._remove(to_wake, mailbox)

    def _add(self, to_wake: ToWake, mailbox: _Mailbox) -> None:
        if self._closed:
            return super()._remove(to_wake, mailbox)
        self._note_change(mailbox.patterns)
        super()._add(to_wake, mailbox)

    def _remove(self, to_wake: ToWake, mailbox: _Mailbox) -> None:
        patterns = mailbox.patterns
        super()._remove(to_wake, mailbox)
        if self._thread is not None:
            self._note_change(patterns)

    def _note_change(self, patterns: Sequence[_PatternKey]) -> None:
        """Tell Redis before the first subscription to a pattern, and after the end of its last."""
        self._changed.update(pattern for pattern in patterns if not self._is_heard(pattern))
        self._nudge()

    def _is_heard(self, pattern: _PatternKey) -> bool:
        length, text = pattern
        return text in self._tables.get(length, ())

    def _nudge(self) -> None:
        """Tell the thread that there is something to do; the first time, start it."""
        if self._thread is None:
            work = (self._stay_connected(),)
            self._thread = threading.Thread(None, asyncio.run, "stario-redis", work, daemon=True)
            self._thread.start()
            atexit.register(self.close)
        elif self._loop is not None and not self._work.is_set():
            with suppress(RuntimeError):  # the loop is closed: the thread has ended
                self._loop.call_soon_threadsafe(self._work.set)

    def _channel(self, subject: str) -> bytes:
        return (self._prefix + subject).encode("utf-8", "surrogatepass")

    # -- In the thread

    async def _stay_connected(self) -> None:
        """Keep connecting, with pauses of up to two seconds, until closed and all is sent."""
        import random

        self._loop, pause = asyncio.get_running_loop(), 0.05
        while not self._closed or (self._outgoing and not self._down):
            try:
                await self._talk(self._new_connection())
            except Exception as exc:  # whatever happens, the thread goes on
                self._changed = set()  # (a new connection subscribes to all patterns)
                if not self._down:
                    reason = exc.exceptions[0] if isinstance(exc, ExceptionGroup) else exc
                    self._down, pause = f"{type(reason).__name__}: {reason}", 0.05
                    self._tracer("relay.lost", {"reason": self._down}).end()
                await asyncio.sleep(pause * random.uniform(0.5, 1))
                pause = min(2.0, pause * 2)

    async def _talk(self, connection: Any) -> None:
        """Use one connection, from its beginning to its end."""
        await connection.connect()
        writer = connection._writer  # (redis-py has no public name for it)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._send(connection.pack_commands, writer))
                await self._receive(connection)
        finally:
            writer.transport.abort()  # else its unsent bytes might arrive after the next one's
            await connection.disconnect(nowait=True)

    async def _send(self, pack: Callable[..., list[bytes]], writer: asyncio.StreamWriter) -> None:
        """Send all subscriptions, and then what there is; a PING after half of the time-out."""
        with self._lock:
            tables = self._tables.items()
            self._changed = {(length, text) for length, table in tables for text in table}
        while self._outgoing or self._changed or not self._closed:
            # (redis-py would use `writelines`, after which `drain` never waits in Python 3.13.0.)
            writer.write(b"".join(pack(self._next_commands())))
            await writer.drain()
            if not (self._outgoing or self._changed or self._closed):
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._work.wait(), self._timeout / 2)
        writer.write(b"".join(pack([("PING", "last")])))  # (Redis answers it with "last")

    def _next_commands(self) -> list[_RedisCommand]:
        """Take what waits to be sent: first the subscriptions. If nothing waits, a PING."""
        self._work.clear()
        with self._lock:
            changed, self._changed = self._changed, set()
            commands = [self._command(pattern) for pattern in changed]
            messages = [self._outgoing.popleft() for _ in range(min(_BATCH, len(self._outgoing)))]
            self._unsent -= sum(len(data) for _, _, data in messages)
        if commands or not messages:
            commands.append(("PING",))  # its answer says that the subscriptions are made
        return commands + messages

    def _command(self, pattern: _PatternKey) -> _RedisCommand:
        """(UN)SUBSCRIBE to a pattern. `?` and `[a]` also have a meaning in Redis: escape them."""
        length, text = pattern
        verb = "SUBSCRIBE" if self._is_heard(pattern) else "UNSUBSCRIBE"
        if length is None:
            return verb, self._channel(text)
        return "P" + verb, re.sub(rb"([\\*?\[\]^-])", rb"\\\1", self._channel(text)) + b"*"

    async def _receive(self, connection: Any) -> None:
        """Take what Redis sends: answers to PING and PUBLISH, and messages (redis-py: "pushes").

        A message comes once for each of our patterns that fits, with nothing else in between:
        `[b"message", b"room.1", b"7"]`, `[b"pmessage", b"room.*", b"room.1", b"7"]`. The first is
        delivered. If the same content comes with another pattern it is a copy, else a new message.
        The answer to the last PING ends this: Redis has then done all that was sent before it.
        """
        pattern, content = None, None  # of the last message delivered
        answer = None
        while answer != b"last":
            answer = await connection.read_response(
                timeout=self._timeout, push_request=True, disconnect_on_error=False
            )
            if answer is None:
                raise TimeoutError(f"no word from Redis for {self._timeout} seconds")
            if self._down and not isinstance(answer, list):
                self._down = ""
                self._gaps += 1
                self._tracer("relay.back").end()
            is_message = isinstance(answer, list) and answer[0] in (b"message", b"pmessage")
            if self._down or not is_message:  # (messages before the PONG belong to the gap)
                content = None
            elif answer[-2:] != content or answer[1] == pattern:
                pattern, content = answer[1], answer[-2:]
                self._deliver_payload(*content)

    def _deliver_payload(self, channel: bytes, payload: bytes) -> None:
        try:
            subject = channel.decode("utf-8", "surrogatepass")[len(self._prefix) :]
            self._change(self._deliver, subject, json.loads(payload))
        except (ValueError, RecursionError) as exc:  # another program published it
            self._tracer("relay.unreadable", {"reason": f"{exc}"}).end()


def _relay_json(data: object) -> bytes:
    """Data as JSON. StarioError if parsing it again would not give an equal value."""
    with suppress(TypeError, ValueError, RecursionError):
        text = json.dumps(data, allow_nan=False, separators=(",", ":"))
        if json.loads(text) == data and not isinstance(data, SafeString):
            return text.encode("ascii")
    raise StarioError(
        "a RedisRelay carries what JSON can hold and gives back unchanged: no tuples, no keys but"
        f" text, no NaN, no objects. Here it is a {type(data).__name__}"
    )


# ==================================================================================================
# 28. Reload: a saved file restarts the app [reload]
#
# `serve(reload=True)` starts the program a second time, as a child process, and watches the files.
# When one is saved, the child is ended and another is started. The parent opens the listening
# sockets and keeps them, so between two children a browser waits, and is not refused. A script in
# each page holds an event stream open; when it breaks, the browser reopens it. There the child
# sends its process id; when that is a new one, the page reloads itself. Windows cannot hand sockets
# over: there each child opens its own.
# ==================================================================================================


_RELOADED = "STARIO_RELOADED"  # environment variable for a child: the sockets' descriptors, "3,4"
_LOOK_EVERY = 0.2  # seconds between two checks of the files


def _watched_folders() -> set[str]:
    """The folders of the program's modules (not Python's, not installed), and of its assets."""
    paths = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    own = {os.path.dirname(os.path.abspath(path)) for path in paths if path and _is_own(path)}
    for top in list(own):  # including what is imported later
        for folder, inside, files in os.walk(top):
            if any(name.endswith(".py") for name in files):
                own.add(folder)
            else:
                inside.clear()  # so `walk` does not enter these
    for assets in _collections.values():
        own |= {folder for folder, _, _ in os.walk(assets._root or "")}
    return own


def _times(folders: set[str]) -> dict[str, int]:
    """When each file in these folders was last changed, by path."""
    times = {}
    for folder in folders:
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith((".py", ".html", ".css", ".js", ".svg")):
                    with suppress(OSError):
                        times[entry.path] = entry.stat().st_mtime_ns
    return times


def _compiles(paths: Iterable[str]) -> bool:
    """Whether these files are valid Python; prints the error if not."""
    for path in paths:
        try:
            with suppress(OSError), open(path, "rb") as file:  # (it may have been removed)
                if path.endswith(".py"):
                    compile(file.read(), path, "exec")
        except Exception as exc:
            print(*traceback.format_exception_only(exc), "waiting for a change", file=sys.stderr)
            return False
    return True


def _keep_restarting(sockets: list[socket.socket]) -> int:
    """Run the program as a child, restarted when a file is saved. Returns its exit status.

    It returns after a signal, or when the newest child ends by itself without an error.
    """
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.put(number))
    children: list[subprocess.Popen[bytes]] = []  # the newest, and others still ending
    descriptors = [opened.fileno() for opened in sockets]
    environment = {**os.environ, _RELOADED: ",".join(map(str, descriptors))}
    command = [sys.executable, *sys.orig_argv[1:]]
    restart = True
    while restart and signals.empty():
        folders = _watched_folders()
        now = _times(folders)
        started = subprocess.Popen(command, env=environment, pass_fds=descriptors)
        children = [*(child for child in children if child.poll() is None), started]
        restart = False
        while not (restart or started.poll() == 0):  # while it runs (None), or after it has failed
            # (Ctrl-C reaches the children, too. They ignore `terminate` just after it: part 10.)
            with suppress(queue.Empty):
                signals.get(timeout=_LOOK_EVERY)
                break
            before, now = now, _times(folders)
            changed = {path for path, _ in now.items() ^ before.items()}  # new, gone, or saved
            restart = bool(changed) and _compiles(changed)
        if restart:
            print("reloading:", *map(os.path.basename, sorted(changed)), file=sys.stderr)
        for child in children:
            child.terminate()
    return max((child.wait() for child in children), default=0)


class _ReloadingWriter(Writer):
    """The writer of a child: it adds to each page the script that reloads it."""

    def html(self, node: object, status: int = 200) -> None:
        """Answer with a page."""
        text = render(node)
        if text.startswith("<!doctype html>"):
            script = h.Script({"type": "module", "src": f"/_stario/reload.js?{os.getpid()}"})
            text = SafeString(text + script)
        super().html(text, status)


_RELOAD_SCRIPT = """
let version = new URL(import.meta.url).search.slice(1), source;
const listen = () => {
  source?.close();
  if (document.hidden) return;  // a browser has six connections to a host
  source = new EventSource("/_stario/reload");
  source.onmessage = (event) => event.data == version || location.reload();
};
document.addEventListener("visibilitychange", listen);
listen();
"""


def _reload(app: Stario, server: Server) -> None:
    """What `serve(reload=True)` calls. The parent stays in here until the program ends.

    In a child: use the parent's sockets, and tell the pages which version this is.
    """
    global _IDLE_GRACE
    if _RELOADED not in os.environ:
        if os.name != "nt":
            server._listener.open()
        raise SystemExit(_keep_restarting(server._listener.sockets))
    _IDLE_GRACE = 0.0  # a stopping child closes idle connections at once, to serve no old page
    descriptors = os.environ[_RELOADED].split(",")
    server._listener.sockets += [socket.socket(fileno=int(each)) for each in descriptors if each]

    async def script(c: Context, w: Writer) -> None:
        w.respond(_RELOAD_SCRIPT.encode(), "text/javascript")

    async def version(c: Context, w: Writer) -> None:
        w.event("message", str(os.getpid()), retry=200)
        async for _ in w.alive():
            pass

    def end_with_parent() -> None:  # which may have been killed
        while os.getppid() == parent or server._asked_at:
            time.sleep(_LOOK_EVERY)
        os.kill(os.getpid(), signal.SIGTERM)

    parent = os.getppid()
    threading.Thread(target=end_with_parent, daemon=True).start()
    app._tree.add("GET", "/_stario/reload.js", script)
    app._tree.add("GET", "/_stario/reload", version)
    app._writer = _ReloadingWriter


# ==================================================================================================
# 29. Development: what went wrong, shown where one looks [development]
#
# With `serve(debug=True)`, the default at a terminal, a handler's exception is answered with a page
# that shows it: the frames of the program's own code first, with their lines and values, then the
# request. If Datastar made the request, this page is patched over the open one. A handler that
# blocks the event loop for more than 100 ms (`time.sleep`, a long computation) is reported on
# standard error, with its line. The rule: without `debug`, none of this leaves the server.
# ==================================================================================================


_SECRET = re.compile(r"(?i)pass|secret|token|key|cookie|auth|session")
_FRAMES_SHOWN = 40  # how many are shown, with lines and values
_DEBUG_STYLE = """
#stario-error { position: fixed; inset: 0; z-index: 9999; overflow: auto; padding: 1.5rem;
  font: 14px/1.5 ui-monospace, monospace; text-align: left; color: #eee; background: #1c1417; }
#stario-error h1 { font-size: 1.5em; white-space: pre-wrap; overflow-wrap: anywhere; }
#stario-error pre { overflow: auto; font: inherit; margin: .5rem 0 1.5rem; }
#stario-error mark { display: block; min-width: max-content; color: #fff; background: #6b2333; }
#stario-error button { float: right; } #stario-error:first-child button { display: none; }
"""


def _shown_value(name: object, value: object) -> str:
    """A value in a line: short, and hidden if it, or a name in it, sounds like a secret."""
    try:
        text = repr(value)
    except Exception as exc:
        text = f"(its repr raises {type(exc).__name__})"
    if _SECRET.search(f"{name} {text}"):
        return "(hidden)"
    return text if len(text) <= 120 else text[:119] + "…"


def _frame_view(frame: types.FrameType, at: int) -> SafeString:
    """A frame of the traceback: the lines around line `at`, and the local variables."""
    filename, lines = frame.f_code.co_filename, []
    for number in range(max(1, at - 3), at + 3):
        if line := linecache.getline(filename, number, frame.f_globals):
            text = f"{number:5} {line.rstrip()}\n"
            lines.append(h.Mark(text) if number == at else text)
    values = [f"{name} = {_shown_value(name, value)}\n" for name, value in frame.f_locals.items()]
    head = f"{filename}, line {at}, in {frame.f_code.co_name}"
    return h.Details({"open": _is_own(filename)}, h.Summary(head), h.Pre(lines, "\n", values))


def _error_view(c: Context, exc: BaseException) -> SafeString:
    """An exception as an element that covers the page."""
    frames = list(traceback.walk_tb(exc.__traceback__))[::-1]
    frames.sort(key=lambda entry: not _is_own(entry[0].f_code.co_filename))
    request = [f"{c.req.method} {c.req.raw_path} {c.req.query_string}"]
    request += [f"{name}: {_shown_value(name, value)}" for name, value in c.req.headers.items()]
    events = [f"{event.name} {_shown_value('', event.attributes)}" for event in c.span.events]
    stack = _stack_of(exc)  # open if it has causes, or the exceptions of a group
    return h.Div(
        {"id": "stario-error"},
        h.Style(_DEBUG_STYLE),
        h.Button({"onclick": "this.parentNode.remove()"}, "×"),
        h.H1("".join(traceback.format_exception_only(exc)).strip()),
        [_frame_view(frame, at) for frame, at in frames[:_FRAMES_SHOWN]],
        h.Details({"open": stack.count("Traceback (") > 1}, h.Summary("Traceback"), h.Pre(stack)),
        h.Details(h.Summary("Request"), h.Pre("\n".join(request))),
        h.Details(h.Summary("Trace"), h.Pre("\n".join(events))),
    )


def _show_error(c: Context, w: Writer, exc: BaseException) -> None:
    """Patch the exception over the open page, or answer with it if no answer has begun."""
    w._forget_answer()
    if w._is_stream or (c.req.is_datastar and not w.started):
        w.patch(_error_view(c, exc), selector="body", mode="append")
        w.end()
    elif not w.started:
        phone = h.Meta({"name": "viewport", "content": "width=device-width"})
        head = h.Head(phone, h.Title(type(exc).__name__))
        w.html(h.Html(head, h.Body(_error_view(c, exc))), 500)


class _Watchdog:
    """Reports where an event loop is blocked.

    The loop notes the time every 20 ms. A thread checks it. When it is older than 100 ms, the
    thread prints the line of the program where the loop's thread is.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._seen = time.monotonic()
        self._outside = [frame for frame, _ in traceback.walk_stack(None)]  # what runs the loop
        self._note()
        threading.Thread(target=self._look, name="stario-watchdog", daemon=True).start()

    def _note(self) -> None:
        self._seen = time.monotonic()
        self._loop.call_later(0.02, self._note)

    def _look(self) -> None:
        told = 0.0
        while not self._loop.is_closed():
            time.sleep(0.02)
            seen = self._seen
            if time.monotonic() - seen > 0.1 and seen != told:
                told = seen
                self._tell(sys._current_frames().get(self._thread))

    def _tell(self, frame: types.FrameType | None) -> None:
        while frame is not None and not _is_own(frame.f_code.co_filename):
            frame = frame.f_back
        # (If only the line that runs the loop is left, nothing blocks: the machine is slow.)
        if frame is not None and frame not in self._outside:
            where = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
            print(f"stario: the event loop is blocked for over 100 ms at {where}", file=sys.stderr)


Stario._develops = True  # `serve` turns `debug` on at a terminal


# ==================================================================================================
# 30. What is refused; hosts, cookies, other sites
#
# What cannot work is refused where it is written, and the error says what to write instead: an
# object that is no handler, an address that leads elsewhere, a host that nobody can ask for, a
# cookie that browsers would silently drop. The routes of hosts, and `same_origin`, are here, too.
# ==================================================================================================


def _check_word(what: str, word: object, known: Collection[str]) -> None:
    """Refuse an unknown word, and say which one was probably meant."""
    if word not in known:
        import difflib  # (here, because it takes 1 ms, and only errors need it)

        near = difflib.get_close_matches(str(word), known, 1)
        meant = f" ({near[0]!r}?)" if near else ""
        raise StarioError(f"no {what} {word!r}: one of {', '.join(known)}{meant}")


def _check_handler(route: str, handler: Any) -> None:
    """Raise StarioError for anything that is not a handler."""
    if handler is None:
        raise StarioError(f"{route}: no handler. Not a decorator: app.get('/', handler)")
    if isinstance(handler, type):
        raise StarioError(f"{route}: a handler is no class: give {handler.__name__}()")
    _check_arguments(handler, "c, w")
    plain = inspect.unwrap(handler)  # the function behind decorators, partials and objects
    while isinstance(plain, functools.partial):
        plain = inspect.unwrap(plain.func)
    if not inspect.isroutine(plain):
        plain = plain.__call__
    if not isinstance(plain, types.FunctionType | types.MethodType):
        return  # it is written in C
    if not inspect.iscoroutinefunction(plain) and plain.__name__ != "<lambda>":
        raise StarioError(f"{route}: write `async def {plain.__name__}(c, w)`, without a yield")


def _check_arguments(function: Any, wanted: str) -> None:
    """Raise StarioError if a function cannot be called with these arguments."""
    if inspect.iscoroutine(function):
        function.close()
        raise StarioError(f"{function.__name__} was called: give it without its parentheses")
    if not callable(function):
        raise StarioError(f"a function is needed, called with ({wanted}): not {function!r}")
    name = getattr(function, "__name__", repr(function))
    try:
        signature = inspect.signature(function)
        signature.bind(*wanted.split(", "))
    except ValueError:
        return  # a builtin without a known signature
    except TypeError as exc:
        raise StarioError(f"{name} is called as {name}({wanted}): {exc}") from None
    if [*signature.parameters][:2] == ["w", "c"]:
        raise StarioError(f"{name}(w, c) gets them in the other order: write ({wanted})")


def _check_middleware(middleware: Any) -> None:
    """Raise StarioError for anything that is not middleware."""
    if middleware is Session:
        raise StarioError("a Session needs its key: app.use(Session(key))")
    _check_arguments(middleware, "handler")
    if inspect.iscoroutinefunction(middleware):
        name = middleware.__name__
        raise StarioError(f"the middleware {name} is a plain function: `def`, without async")


def _wrapped(handler: Handler, middleware: Sequence[Middleware]) -> Handler:
    """The handler inside its middleware, the first outermost. StarioError if one is not valid."""
    for wrap in reversed(middleware):
        _check_middleware(wrap)
        handler = wrap(handler)
        if not callable(handler):
            name = getattr(wrap, "__name__", repr(wrap))
            raise StarioError(f"middleware {name} gives {handler!r}: it has to return a handler")
        _check_arguments(handler, "c, w")
    return handler


def _check_order(wanted: str, first: object, second: object, kind: type = object) -> None:
    """Raise StarioError, which shows `wanted`, unless `first` is text and `second` of that kind."""
    if not (isinstance(first, str) and isinstance(second, kind)):
        raise StarioError(f"write {wanted}, not with {first!r} and {second!r}")


# -- What handlers raise. The test client (part 11) sets a list, and raises what is in it.

_failures: contextvars.ContextVar[Any] = contextvars.ContextVar("stario_failures", default=None)

_HINTS = (  # what Python says if an `await` is missing or wrong, and what to write instead
    (r"NoneType.* can't be (used in 'await'|awaited)",
     "the methods of a Writer are not awaited: w.html(...); nor are c(...) and publish(...). "
     "And a handler is an `async def`"),
    (r"'(?:method|function)' object (?:is not subscriptable|has no attribute)",
     "call it, and await what is async: `(await c.signals())['name']`, `await c.req.form()`"),
    (r"\bFuture\b.* can't be", "a loop's own futures are awaited: await asyncio.wrap_future(...)"),
    (r"\bcoroutine\b", "`await` is missing: await c.signals(), await c.req.form()"),
    (r"\b(Alive|Subscription|async_generator)\b",
     "loop over it, `async for item in w.alive(source):`, or write `async with w.alive():`"),
    (r"_GeneratorContextManager.* asynchronous", "a step is no async one: `with c.step(...):`"),
)  # fmt: skip


def _record(c: Context, exc: BaseException, is_handled: bool = False) -> None:
    """Record an exception: as an event, or, if it is a fault of the program's, as the span's error.

    A silent app logs faults, as asyncio does. In a test they are raised there instead, unless an
    `on_error` handler answers for them.
    """
    if isinstance(exc, ClientDisconnected):
        c("client.disconnected")
        return
    if isinstance(exc, HttpException):
        c("http.exception", {"http.response.status_code": exc.status_code, "detail": exc.detail})
        return
    in_test = _failures.get()
    if in_test is not None and not is_handled:
        in_test.append(exc)
    for sign, hint in _HINTS:
        if isinstance(exc, (TypeError, AttributeError)) and re.search(sign, _safe_text(exc)):
            exc.add_note(f"stario: {hint}")
    if not c.app._silent:
        c.span.fail(exc)
    elif in_test is None:
        _log_fault(f"unhandled exception in {c.req.method} {c.req.path}", exc)


def _log_fault(text: str, exc: BaseException) -> None:
    """Log as asyncio does. The further lines are indented, so no client can forge an entry."""
    loop, text = asyncio.get_running_loop(), _printable(text)
    if loop.get_exception_handler():
        loop.call_exception_handler({"message": text, "exception": exc})
        return
    logger = logging.getLogger("asyncio")
    info = (type(exc), exc, exc.__traceback__)
    record = logger.makeRecord(logger.name, logging.ERROR, "", 0, text, (), info)
    record.exc_text = "\n    ".join(map(_printable, _stack_of(exc).split("\n")))
    if logger.isEnabledFor(logging.ERROR):
        logger.handle(record)


# -- Addresses


def _filled_in(path: str, params: dict[str, object]) -> str:
    """`/u/{id:int}/*` with {"id": 7, "tail": "a/b"} is `/u/7/a/b`: a route's path with its values.

    StarioError for a value that does not fit the route, or would lead elsewhere: browsers remove
    `.` and `..` from a path, and a path that begins with `//` is another host.
    """
    filled, left = [], dict(params)
    for segment in path.split("/"):
        named = _PARAMETER_SEGMENT.fullmatch(segment)
        if not named and segment != "*":
            filled.append(quote(_unquote(segment), safe=""))
            continue
        if named and named[1] not in left:
            raise StarioError(f"{path} needs a value for {segment}: write {named[1]}=...")
        value = left.pop(named[1] if named else "tail", "")
        text = _as_text(value)
        is_single = isinstance(value, str) or not (value is None or isinstance(value, Iterable))
        fits = not named or _converted(named[2] or _ANY, text) is not None
        if not (is_single and fits) or {".", ".."} & {*([text] if named else text.split("/"))}:
            raise StarioError(f"{value!r} does not fit {segment} in {path}")
        filled.append(quote(text, safe="" if named else "/", errors="replace"))
    address = "/".join(filled)
    if left:
        raise StarioError(f"{path} has no parameter {', '.join(left)}")
    if address.startswith("//"):
        raise StarioError(f"{address} would be another host")
    return address


# -- Hosts: which names they can have, and the routes (part 7) that belong to one

_HOST_NAME = re.compile(r"\[[0-9a-f:.]+\]|[a-z0-9_-]+(\.[a-z0-9_-]+)*")


def _host_name(name: str) -> str:
    """A host as browsers write it: lower case, and in ASCII (IDNA), `xn--bcher-kva.de`."""
    with suppress(UnicodeError):
        found = name.removesuffix(".").encode("idna").decode().lower()
        if _HOST_NAME.fullmatch(found):
            return found
    raise StarioError(f"{name!r} is no host: write 'example.com', without scheme, port and path")


def _tree_of(router: Router, host: str) -> _Tree:
    """The router's tree for a host, made if needed. First exact names, then the longer patterns."""
    hosts = {host: _Tree(), **router._hosts}
    order = sorted(hosts, key=lambda name: (name.startswith("*"), -len(name)))
    router._hosts = {name: hosts[name] for name in order}
    return hosts[host]


def _trees_for(app: Router, request: Request) -> Iterator[tuple[_Tree, str]]:
    """The trees for a request's host, with what `*` takes of it: `*.a.org` takes eu of eu.a.org."""
    host = request.host if app._hosts else ""
    for pattern, tree in app._hosts.items():
        taken = host.removesuffix(pattern[1:])
        if pattern == host:
            yield tree, ""
        elif pattern.startswith("*") and taken != host and all(taken.split(".")):
            yield tree, taken
    yield app._tree, ""  # for all hosts


def _find_by_host(app: Router, request: Request) -> Handler | None:
    for tree, taken in _trees_for(app, request):
        if handler := tree.find(request):
            request.subhost = taken
            return handler
    return None


# -- Cookies


class CookieOptions(TypedDict, total=False):
    """The options of `w.cookie` after name and value."""

    max_age: int | None
    expires: datetime | None
    path: str
    domain: str | None
    secure: bool
    httponly: bool
    samesite: Literal["lax", "strict", "none"] | None
    partitioned: bool


_COOKIE_SAFE = "!#$&'()*+-./:<=>?@[]^_`{|}~"  # not percent-encoded in a value (RFC 6265, 4.1.1)


def _cookie_line(
    name: str, value: str, max_age: int | None = None, expires: datetime | None = None,
    path: str = "/", domain: str | None = None, secure: bool = False, httponly: bool = False,
    samesite: str | None = "lax", partitioned: bool = False,
) -> str:  # fmt: skip
    """A cookie as the value of `set-cookie` (RFC 6265). StarioError if browsers would drop it."""
    if not (isinstance(name, str) and _TOKEN.fullmatch(name)):
        raise StarioError(f"{name!r} cannot be the name of a cookie")
    if not isinstance(value, str) or _CONTROL.search(value):
        raise StarioError(f"the cookie {name!r} needs a text without control characters")
    is_time = isinstance(max_age, int | float) and abs(max_age) < math.inf
    if not (max_age is None or is_time) or not isinstance(expires, datetime | None):
        raise StarioError(f"the cookie {name!r}: max_age is seconds, expires a datetime")
    if samesite is not None and str(samesite).lower() not in ("lax", "strict", "none"):
        raise StarioError(f"samesite is lax, strict or none, not {samesite!r}")
    if not isinstance(path, str) or not re.fullmatch(r"(/[^;\x00-\x1f\x7f]*)?", path):
        raise StarioError(f"the path of a cookie begins with '/' and has no ';', not {path!r:.60}")
    prefix = name.lower().partition("-")[0]
    if prefix == "__host" and (path != "/" or domain):
        raise StarioError(f"{name!r} says: this host and all of it. Leave path and domain out")
    # Browsers refuse all of these without Secure (drafts RFC 6265bis, section 5.7, and CHIPS).
    is_for_others = partitioned or (samesite is not None and samesite.lower() == "none")
    pieces = [
        f"{name}={quote(value, safe=_COOKIE_SAFE, errors='replace')}",
        f"Max-Age={int(max_age)}" if max_age is not None else "",
        f"Expires={_http_date(expires.replace(microsecond=0).timestamp())}" if expires else "",
        f"Domain={_host_name(domain.removeprefix('.'))}" if domain else "",
        f"Path={quote(path, safe=_REDIRECT_SAFE, errors='replace')}" if path else "",
        "Secure" if secure or is_for_others or prefix in ("__host", "__secure") else "",
        "HttpOnly" if httponly else "",
        f"SameSite={samesite.capitalize()}" if samesite else "",
        "Partitioned" if partitioned else "",
    ]
    if len(pieces[0]) > 4096:  # (draft RFC 6265bis, section 5.6)
        raise StarioError(f"the cookie {name!r} is too large: browsers keep 4,096 bytes")
    return "; ".join(filter(None, pieces))


# -- Names from other frameworks. Here they are attributes that say what to write instead.

_ELSEWHERE: dict[type, dict[str, str]] = {
    Router: {
        "await app.serve()": "run listen start",
        'app.get("/users", handler)': "route add add_route add_api_route add_url_rule",
        "app.use(middleware)": "middleware add_middleware before_request after_request",
        "app.on_error(KeyError, handler)": "errorhandler exception_handler add_exception_handler",
        'app.mount("/shop", router)': "include_router register_blueprint",
        'app.assets("/static", "folder")': "static",
        'app.url("handler", id=3)': "url_for url_path_for",
        "app.lifespan(manager)": "on_event on_startup on_shutdown add_event_handler",
        "app.background(work())": "create_task add_task",
        "TestClient(app)": "test_client",
        "a stream, `async for item in w.alive(source):`": "websocket",
    },
    Context: {
        "c.req": "request",
        "c.req.query": "query args",
        "c.req.params": "params match",
        "c.req.headers": "headers",
        "c.req.cookies": "cookies",
        "await c.req.json()": "json",
        "await c.req.form()": "form",
        'c.state["user"]': "user g",
        "w.alive(source)": "alive",
    },
    Request: {
        "c.req.query": "args query_params",
        "c.req.params": "path_params view_args match_info",
        "await c.req.json()": "get_json",
        'await c.req.form(), and .file("photo") of it': "files",
        "await c.req.body()": "text data",
        "c.req.client": "remote_addr ip",
        "c.session": "session",
        "c.state": "state user",
    },
    Writer: {
        "w.text(text)": "send send_text",
        "w.html(page)": "render render_template",
        "w.html(page, 404)": "status set_status",
        "w.headers.set(name, value)": "header set_header add_header",
        "w.cookie(name, value)": "set_cookie",
        "w.end()": "close finish",
        "w.patch(element)": "patch_elements merge_fragments",
        "w.sync(signals)": "patch_signals merge_signals",
        "w.execute(code)": "execute_script",
    },
    FormFile: {
        "file.filename": "name",
        "file.data, or read what file.file has": "read content save stream",
    },
    TestResponse: {"answer.status": "status_code", "answer.body": "content data"},
    Span: {"span[name] = value": "attr set_attribute", "span(name, {...})": "event add_event"},
    DataAttributes: {
        'data.on("click", expression)': "click on_click onclick on_submit",
        "data.init(expression)": "on_load load",
        "data.class_({name: expression})": "classes class_name",
        "data.attr, style or computed, with a dict": "attrs styles computeds",
    },
}


class _NoSuchName(StarioError, AttributeError):
    """An AttributeError, too, so that `hasattr` is False."""


class _Elsewhere:
    """An attribute that does not exist: reading it raises an error with what to write instead."""

    def __init__(self, name: str, instead: str) -> None:
        self._told = f"there is no {name}: write {instead}"

    def __get__(self, owner: object, kind: object = None) -> NoReturn:
        raise _NoSuchName(self._told)


class _NotOfWriter(_Elsewhere):
    """For a Writer. Setting it raises, too: `w.status = 404` would have no effect."""

    def __set__(self, owner: object, value: object) -> NoReturn:
        raise _NoSuchName(self._told)


for _kind, _names in _ELSEWHERE.items():
    for _instead, _words in _names.items():
        for _word in _words.split():
            _made = _NotOfWriter if _kind is Writer else _Elsewhere
            setattr(_kind, _word, _made(_word, _instead))


# -- Requests from other sites

_SAFE_METHODS = frozenset(("GET", "HEAD", "OPTIONS", "TRACE", "QUERY"))
_PORTS = {"http": "80", "https": "443"}


def same_origin(handler: Handler) -> Handler:
    """Middleware: refuse with 403 what other sites make a browser send.

    A form on another site can be sent to yours, and the browser adds your cookies: that is CSRF,
    cross-site request forgery. Safe methods (GET) pass. For others the browser says where the
    request comes from: over HTTPS in `Sec-Fetch-Site` (Fetch Metadata); over HTTP, and in old
    browsers, in `Origin`. A request with neither is not a browser's, and carries nobody's cookies.
    """

    async def _guarded(c: Context, w: Writer) -> None:
        sent = c.req.headers.get
        site, origin = sent("sec-fetch-site"), sent("origin")
        if site is None and origin is not None:
            same = _is_own_origin(origin, c.req)
        else:
            same = site in (None, "same-origin", "none")
        if c.req.method not in _SAFE_METHODS and not same:
            raise HttpException(403, "this request comes from another site")
        await handler(c, w)

    return _guarded


def _is_own_origin(origin: str, request: Request) -> bool:
    """Whether an origin, `https://a.org` or `null` (RFC 6454), is that of the request's address."""
    scheme, _, place = origin.lower().partition("://")
    if scheme not in _PORTS or not place:
        return False
    if request.scheme == "https" and scheme == "http":  # (the reverse may be due to a proxy)
        return False
    (host, port), (own, own_port) = _split_host(place), _split_host(request._hop.host)
    return host == own and (port or _PORTS[scheme]) == (own_port or _PORTS[scheme])


# -- Act 4 runs: what a browser sends, checked against a dataclass. The query has the text "21";
# `read_signals` compiles `Order` to readers (part 15), and the one for `count` makes it an int.
#
#     @dataclasses.dataclass
#     class Order:
#         count: int
#
#     async def order(c: Context, w: Writer) -> None:
#         wanted = read_signals(Order, c.req.query)
#         w.text(f"{wanted.count * 2} in all")
#
#     app = Stario()
#     app.get("/order", order)
#     # GET /order?count=21 -> 42 in all


# ==================================================================================================
# ACT 5. The pocket client, and this file itself
#
# The other half of a live page runs in the browser. Part 31 is JavaScript, used where Datastar's
# own client cannot be reached. It combines three ideas that most page libraries have in common.
#
# Signals. A signal is a named value in the page that knows which code has read it.
#
#     <div data-signals="{price: 2, count: 3}"></div>
#     <input type="number" data-bind="count">
#     <b data-text="$price * $count"></b>
#
# `$price * $count` is JavaScript in which `$name` is a signal. The client compiles it to a function
# and runs that for the <b>. Each signal that is read records its reader:
#
#     price  2  read by: the text of <b>
#     count  3  read by: the text of <b>, the field
#
# Effects. Such a function is an effect: it runs again when a signal that it has read has changed.
# Dependencies are not declared; each run discovers them: `$open && $count` depends on `count` only
# while `open` is true. When somebody types 4, the field writes `count`. Its readers become due, and
# run when the event has been handled, once each, however many signals were written. A computed
# signal (`data-computed:sum="$price * $count"`) reads and is read. A write marks it as stale, and
# it is computed when it is next read. If its value is the same, its readers need not run.
#
# Morphing. The server sends a view as HTML, the whole of it. If it simply replaced the old one, the
# field would lose its focus and its text, and the list would scroll to its top. So the old elements
# stay, and only what differs is changed:
#
#     old  <ul> <li id="a">milk</li> <li id="b">bread</li> </ul>
#     new  <ul> <li id="c">eggs</li> <li id="a">oat milk</li> <li id="b">bread</li> </ul>
#
# Everything depends on knowing which old element is which new one. Elements with the same id are
# the same; one without an id takes the next one of its kind. Here `a` gets another text, `b` is not
# touched, and `c` is put in front. Without ids, `a` would have become the eggs, and somebody
# editing `a` would go on in the wrong row. So give ids to the rows of a list that changes.
#
# Three parties write into a page, and each owns a part of it: a field that is being edited belongs
# to the person, what an attribute shows (`data-text`) to its signal, and all else to the server.
# ==================================================================================================

# ==================================================================================================
# 31. The pocket client (JavaScript) [client]
#
# How its sections meet. `startPage` calls `follow` for each element. That makes an `Attribute` of
# each `data-*` attribute and calls the plugin of its name, which listens or starts an effect. A
# click runs an expression, and in it an action, `@post`. `request` sends it, and `readEvents` reads
# the answer. Each event waits for its turn (`inTurn`), and `patchElements` morphs it into the page.
# Then the MutationObserver calls `update`, which follows what was added or removed, and `runDue`
# runs the effects whose signals were written.
# ==================================================================================================


POCKET_CLIENT = r"""
// The pocket client: the everyday part of Datastar's protocol. One rule holds everywhere: whatever
// fails is reported in the console, once, under its attribute's name, and everything else goes on.
// It must be allowed to compile expressions (CSP: 'unsafe-eval').
//
// Left out: Datastar Pro, plugins, shadow roots, form resets, the attributes of a script answer.

const report = (what, error, el = '') => console.error(`pocket client: ${what}: ${error}`, el);
const unknown = (what, el) => console.warn(`pocket client: ${what} is not known here`, el);

// A form's fields, and a page's images, hide properties of the same name: if a field is called
// "id", `form.id` is that field (HTML standard, 4.10.3). So the properties of the prototypes are
// turned into functions: parentNode(el) is el.parentNode, contains(el, node) is el.contains(node).
// Fields hide nothing, so `el.value` is safe.
function functionsOf(...kinds) {
  const all = kinds.map((kind) => Object.getOwnPropertyDescriptors(kind.prototype));
  const jobs = Object.entries(Object.assign({}, ...all))
    .map(([name, { get, value }]) => [name, get ?? value])
    .filter(([, job]) => typeof job === 'function');
  return Object.fromEntries(jobs.map(([name, job]) => [name, Function.prototype.call.bind(job)]));
}

const {
  baseURI, nodeName, parentNode, childNodes, firstChild, nextSibling, isConnected, insertBefore,
  removeChild, contains, isEqualNode, compareDocumentPosition, textContent, cloneNode,
  localName, classList, closest, querySelectorAll, moveBefore, replaceChildren, getAttribute,
  setAttribute, hasAttribute, removeAttribute, getAttributeNames, getAttributeNode,
  setAttributeNode, addEventListener, removeEventListener, dispatchEvent,
} = functionsOf(Node, Element, EventTarget);
const doc = functionsOf(Document);
const ofElement = functionsOf(Element);
const { style: styleOfHtml } = functionsOf(HTMLElement);
const styleOf = (el) => el instanceof HTMLElement ? styleOfHtml(el) : el.style;
const page = doc.documentElement(document);
const isElement = (node) => node instanceof Element;
const family = (node) => isElement(node) ? [node, ...querySelectorAll(node, '*')] : [];
const tell = (name, detail) => dispatchEvent(document, new CustomEvent(name, { detail }));

// ---- Effects: functions that run again when what they read has changed ----
// What can be read is a cell, with a version. A reader keeps the versions of the cells it has read,
// and runs again when one of them has changed. A write makes its readers stale. Computed signals
// are computed when they are read. Effects are `due`: they run when the outermost batch ends, in
// the order of their elements and attributes, whichever signal was written first.

let active = null;           // the reader that is running
let depth = 0;               // how many batches are open
const due = new Set();       // effects to check when the last of them ends

class Cell {
  version = 0;
  readers = new Set();
}

// A reader with an attribute is an effect. One without is a computed signal, and is itself a cell.
class Reader extends Cell {
  cells = new Map();         // each cell it has read -> the version it read
  stale = true;
  value = undefined;
  constructor(job, attribute) {
    super();
    Object.assign(this, { job, attribute });
  }
}

// note: the active reader reads a cell. wake: a cell has changed, which makes its readers stale.
function note(cell) {
  active?.cells.set(cell, cell.version);
  if (active) cell.readers.add(active);
}

function wake(cell) {
  cell.version++;
  makeStale(cell);
}

function makeStale(cell) {
  for (const reader of cell.readers) {
    if (reader.stale) continue;
    reader.stale = true;
    if (reader.attribute) due.add(reader);
    else makeStale(reader);
  }
}

function versionOf(cell) {
  if (cell instanceof Reader) refresh(cell);       // a computed signal
  return cell.version;
}

function isOutdated(reader) {
  for (const [cell, version] of reader.cells) if (versionOf(cell) !== version) return true;
  return !reader.cells.size;         // before its first run it has read nothing
}

// What the run itself changes does not make it stale: the versions are read again at its end.
function refresh(reader) {
  if (!reader.stale) return;
  reader.stale = false;
  if (!isOutdated(reader)) return;
  forget(reader);
  const value = within(reader, reader.job);
  for (const cell of reader.cells.keys()) reader.cells.set(cell, versionOf(cell));
  reader.stale = false;
  if (Object.is(value, reader.value)) return;
  reader.value = value;
  reader.version++;
}

function forget(reader) {
  for (const cell of reader.cells.keys()) cell.readers.delete(reader);
  reader.cells.clear();
  due.delete(reader);
}

// Runs a job. What it reads is noted for this reader, or for none (null).
function within(reader, job) {
  const outer = active;
  active = reader;
  try {
    return job();
  } finally {
    active = outer;
  }
}

// All that a job writes is one change. At its end the effects run, with depth still 1, so what they
// write belongs to it. Then `announce` (below) tells the page which signals have changed.
function batch(job) {
  depth++;
  try {
    return within(null, job);
  } finally {
    if (depth === 1) runDue();
    if (--depth === 0) announce();
  }
}

function runDue() {
  for (let round = 1; due.size; round++) {
    const now = [...due].sort((a, b) => a.attribute.order - b.attribute.order);
    if (round > 100) {
      due.clear();
      report('effects', 'they wake each other without end: stopped', now[0].attribute.el);
    }
    for (const effect of now) if (due.delete(effect)) refresh(effect);
  }
}

// ---- Signals: a tree of values, and a proxy for each branch ----
// A branch is an object without a prototype, so a signal called "constructor" is like any other.
// Values from outside are copied. A list, with all its contents, is one signal: it is read and
// announced as a whole, and its entries may be null. Elsewhere null means that the signal is gone
// (JSON Merge Patch, RFC 7386).

const branches = new WeakMap();  // -> { keys: its path, cells: one for each key that was read }
const proxies = new WeakMap();   // of branches, of lists, and of objects in lists
const everything = new Cell();   // read by data-json-signals, changed by every write
const ALL_KEYS = Symbol('all keys');   // the cell of a branch's keys
let changes = [];                // [keys, value] of this batch, for datastar-signal-patch

const has = Object.hasOwn;
const isPlain = (value) => Object(value) === value
  && [Object.prototype, null].includes(Object.getPrototypeOf(value));
const REFUSED = '__proto__';                       // assigning to it would set a prototype

// A copy without proxies. Anything but a plain object or list (an element, say) is not copied.
function plain(value, change = (each) => each) {
  if (Array.isArray(value)) return Array.from(value, (each) => plain(each, change));
  if (!isPlain(value)) return change(value);
  const copy = Object.create(null);
  for (const key of Object.keys(value)) if (key !== REFUSED) copy[key] = plain(value[key], change);
  return copy;
}

function newBranch(keys) {
  const branch = Object.create(null);
  branches.set(branch, { keys, cells: new Map() });
  proxies.set(branch, new Proxy(branch, handler));
  return branch;
}

function noteKey(branch, key) {
  const { cells } = branches.get(branch);
  if (!cells.has(key)) cells.set(key, new Cell());
  note(cells.get(key));
}

function current(value) {
  if (!(value instanceof Reader)) return value;
  refresh(value);
  note(value);
  return value.value;
}

// JavaScript itself reads `then`, `toJSON` and the like.
const BY_LANGUAGE = /^(?:then|toJSON|toString|valueOf)$/;

const handler = {
  get(branch, key) {
    if (typeof key === 'symbol') return undefined;
    if (!(key in branch) && !branches.get(branch).cells.has(key)) {
      if (BY_LANGUAGE.test(key)) return Object.prototype[key];
      batch(() => write(branch, key, ''));         // an undeclared signal is empty text
    }
    noteKey(branch, key);
    return key in branch ? inside(current(branch[key]), branch, key) : '';    // it was erased
  },
  set(branch, key, value) {
    const copy = plain(value);                     // outside the batch, so its reads are noted
    batch(() => write(branch, key, copy));
    return true;
  },
  deleteProperty: (branch, key) => (batch(() => erase(branch, key)), true),
  has: (branch, key) => (noteKey(branch, key in branch ? key : ALL_KEYS), key in branch),
  ownKeys: (branch) => (noteKey(branch, ALL_KEYS), Reflect.ownKeys(branch)),
};

// The contents of a list have proxies, too (for a branch `newBranch` has made one): a write to them
// changes the list's own signal.
function inside(value, branch, key) {
  if (!Array.isArray(value) && !isPlain(value)) return value;
  if (!proxies.has(value)) {
    proxies.set(value, new Proxy(value, {
      get: (list, at) => inside(list[at], branch, key),
      set(list, at, each) {
        if (has(list, at) && Object.is(list[at], each)) return true;
        list[at] = plain(each);
        batch(() => changed(branch, key));
        return true;
      },
      deleteProperty: (list, at) => delete list[at] && (batch(() => changed(branch, key)), true),
    }));
  }
  return proxies.get(value);
}

const data = newBranch([]);
const root = proxies.get(data);

// [keys, value] of each signal in an object, or in a branch.
function leaves(value, keys = [], found = []) {
  value = current(value);
  if (!isPlain(value)) found.push([keys, value]);
  else for (const key of Object.keys(value)) leaves(value[key], [...keys, key], found);
  return found;
}

// Objects are merged into the old value, so only what differs wakes its readers.
function write(branch, key, value) {
  const old = branch[key];
  if (key === REFUSED || Object.is(old, value)) return;
  if ((value ?? null) === null) erase(branch, key);
  else if (old instanceof Reader && !(value instanceof Reader)) return;   // it stays computed
  else if (!isPlain(value)) assign(branch, key, plain(value));
  else {
    if (!isPlain(old)) assign(branch, key, newBranch([...branches.get(branch).keys, key]));
    else for (const gone of Object.keys(old)) if (!has(value, gone)) erase(old, gone);
    merge(value, false, branch[key]);
  }
}

function assign(branch, key, value) {
  if (!(key in branch)) wakeKey(branch, ALL_KEYS);
  branch[key] = value;
  changed(branch, key);
}

function changed(branch, key) {
  const value = branch[key] instanceof Reader ? '' : branch[key];
  changes.push([[...branches.get(branch).keys, key], value]);
  wakeKey(branch, key);
}

function wakeKey(branch, key) {
  const cell = branches.get(branch).cells.get(key);
  if (cell) wake(cell);
  wake(everything);
}

// An erased signal keeps its cell while it has readers. Otherwise their next read would find
// neither signal nor cell, and `get` would declare the signal again.
function erase(branch, key) {
  if (!(key in branch)) return;
  const { cells } = branches.get(branch);
  delete branch[key];
  for (const each of [key, ALL_KEYS]) wakeKey(branch, each);
  if (!cells.get(key)?.readers.size) cells.delete(key);
}

// An object replaces a single value (no list) even with `onlyIfMissing`: a reader of `$user.name`
// that came first has made `user` a text.
function merge(patch, onlyIfMissing, branch = data) {
  for (const key of Object.keys(patch)) {
    const [old, fresh] = [branch[key], patch[key]];
    if (isPlain(old) && isPlain(fresh)) merge(fresh, onlyIfMissing, old);
    else if (!onlyIfMissing || !(key in branch) || (isPlain(fresh) && !Array.isArray(old))) {
      write(branch, key, fresh);
    }
  }
}

// A path names a signal outside expressions: "user.name", "items.0".
const find = (path) => path.split('.').reduce((at, key) =>
  Object(at) === at && key in at ? at[key] : undefined, root);

function put(path, value) {
  const [, inner, last] = path.match(/^(?:(.*)\.)?([^.]*)$/s);
  batch(() => {
    const at = inner && find(inner);
    if (Array.isArray(at)) for (let n = at.length; n < last; n++) at[n] = '';     // no holes
    if (Array.isArray(at) || isPlain(at)) at[last] = value;
    else merge(nested([[path.split('.'), value]]));
  });
}

// Build one object from the [keys, value] of its leaves.
function nested(found) {
  const whole = Object.create(null);
  for (const [keys, value] of found) {
    const inner = keys.slice(0, -1).reduce((at, key) =>
      isPlain(at[key]) ? at[key] : (at[key] = Object.create(null)), whole);
    inner[keys.at(-1)] = plain(value);
  }
  return whole;
}

// Filters choose by path: {include, exclude}, regular expressions or their text. (?!) fits none.
function chooser({ include = '', exclude = '(?!)' } = {}) {
  const [yes, no] = [include, exclude].map((rule) => new RegExp(
    rule.source ?? rule.replace(/^\/|\/$/g, ''), rule.flags?.replace(/[gy]/g, '')));
  return ([keys]) => yes.test(keys.join('.')) && !no.test(keys.join('.'));
}

function pick(filter) {
  note(everything);
  return nested(batch(() => leaves(data)).filter(chooser(filter)));
}

// An element is {}, as with the official client.
const toJson = (value, indent) =>
  JSON.stringify(value, (_, each) => each instanceof Node ? {} : each, indent);

function announce() {
  const some = changes;
  changes = [];
  if (some.length) tell('datastar-signal-patch', nested(some));
}

// ---- Expressions: from an attribute's text to a function ----
// A scanner goes over the text token by token. Outside strings, comments and regular expressions,
// ; ends a statement, and $name and @name() are rewritten: `@get('/' + $a.b)` becomes
// `__act('get',()=>['/' + $['a']['b']])`, so a retry can compute the arguments again. The value of
// the last statement is the value of the whole.

// In this order: blanks and comments; strings; $a.b-c, but not $a -b; @name(; words; one character.
const TOKEN = new RegExp([/(\s+|\/\/.*|\/\*[^]*?\*\/)/, /('(?:\\[^]|[^\\'])*'|"(?:\\[^]|[^\\"])*")/,
  /\$([\p{L}\d_]+(?:[.-][\p{L}\d_]+)*)/, /@([a-zA-Z_]\w*)\s*\(/, /([\p{L}\d_$]+)/, /[^]/,
].map((rule) => rule.source).join('|'), 'uy');
const TEMPLATE = /[`}](?:\\[^]|\$(?!\{)|[^\\`$])*(?:`|\$\{|$)/y;   // from ` or } up to ` or ${
const REGEX = /\/(?![/*])(?:\\.|\[(?:\\.|[^\]\\\n])*\]|[^/\\[\n])+\/[a-z]*/y;
const NO_VALUE = /^(?:return|typeof|case|in|of|new|delete|void|throw|else|do)$/;

// Returns the code before the last statement, and the last statement.
function translate(text) {
  const open = [];                   // the open brackets; ` for the ${ of a template
  let [code, at, last] = ['', 0, 0]; // last: where in `code` the last statement begins
  let value = false;                 // did a value come just before? Then / divides
  let ended = false;                 // was the last token the ; after a statement?
  const next = (kind) => Object.assign(kind, { lastIndex: at }).exec(text);
  while (at < text.length) {
    const char = text[at];
    const special = char === '`' || (char === '}' && open.at(-1) === '`') ? next(TEMPLATE)
      : char === '/' && !value ? next(REGEX) : null;
    const [all, blank, string, signal, action, word] = special ?? next(TOKEN);
    at += all.length;
    if (blank) {
      code += /\S/.test(blank) ? ' ' : blank;      // no comments
      continue;
    }
    if (action && !(action in actions)) unknown(`data-…="${text}": @${action}`);
    const closes = ')]}'.includes(char) && open.pop();     // of a template's }: its `
    const opens = special ? all.endsWith('${') && '`' : action ? '@' : '([{'.includes(char) && char;
    if (opens) open.push(opens);
    value = word ? !NO_VALUE.test(word) : !opens && Boolean(special || string || signal || closes);
    if (ended && char !== ';') last = code.length;
    ended = char === ';' && !open.length;
    if (signal) code += '$' + signal.split('.').map((key) => `['${key}']`).join('');
    else code += action ? `__act('${action}',()=>[` : closes === '@' ? '])' : all;
  }
  return [code.slice(0, last), code.slice(last).replace(/[\s;]*$/, '')];
}

// Functions are cached: the rows of a table share expressions. Long texts are data, seen once.
const compiled = new Map();          // text -> function

function compile(text) {
  if (compiled.has(text)) return compiled.get(text);
  const [first, last] = translate(text);
  const build = (code) => new Function('$', '__act', 'el', 'evt', 'patch', first + code);
  let job;
  try {
    job = build(`return (${last}\n)`);
  } catch {                                      // it ends in `if`, or has its own `return`
    job = build(last);
  }
  if (compiled.size >= 2000) compiled.clear();
  if (text.length <= 2000) compiled.set(text, job);
  return job;
}

// ---- Attributes: data-<plugin>:<key>__<modifier>.<tag>.<tag>="<expression>" ----
// Each element with such attributes is an owner. Each attribute knows what it started (effects,
// listeners, timers, observers, requests), and `end` ends all of that.

const LEFT_OUT = new RegExp('^(?:on-.*|animate|custom-validity|match-media|persist|query-string|'
  + 'replace-url|rocket|scroll-into-view|view-transition)$');
const NAMES = /^(?:bind|ref|indicator)$/;        // their value is a name, not an expression
const SIGNAL_KEYS = /^(?:signals|computed|bind|ref|indicator)$/;

// HTML lower-cases names. Signal names become camelCase again; all others stay kebab-case.
const CASES = {
  camel: (key) => key.replace(/-([a-z])/g, (_, char) => char.toUpperCase()),
  pascal: (key) => CASES.camel('-' + key),
  snake: (key) => key.replace(/-/g, '_'),
  kebab: (key) => key,
};

const owners = new WeakMap();        // element -> a cell with { el, order, attributes, wrote, ... }
let ownersSoFar = 0;

class Attribute {
  ends = new Set();                  // jobs that undo what it started
  ended = false;
  constructor(owner, name, value) {
    const [head, ...mods] = name.slice(5).split('__');
    const [plugin, ...keys] = head.split(':');
    Object.assign(this, { owner, el: owner.el, name, value, plugin });
    this.mods = new Map(mods.map((mod) => mod.split('.')).map(([mod, ...tags]) => [mod, tags]));
    const style = this.mods.get('case')?.[0] ?? (SIGNAL_KEYS.test(plugin) ? 'camel' : 'kebab');
    this.key = CASES[style]?.(keys.join(':'));
    this.path = this.key || value.trim();
  }

  start() {
    const { plugin, name, mods, el } = this;
    const isMissing = !(plugin in plugins) && (name.includes(':') || LEFT_OUT.test(plugin));
    if (isMissing) unknown(name, el);
    if (!(plugin in plugins)) return;
    for (const mod of mods.keys()) if (!MODIFIERS.has(mod)) unknown(`${name}: __${mod}`, el);
    this.act(() => {
      if (!NAMES.test(plugin)) this.compiled = compile(this.value);
      plugins[plugin](this);
    });
  }

  // The value of its expression. It may throw: `guard` reports that, once. `act` is for calls that
  // come from outside, such as events and timers.
  run(evt, patch) {
    const callAction = (action, args) => actions[action](this, evt, args);
    return this.compiled(root, callAction, this.el, evt, patch);
  }

  guard(job) {
    try {
      return job();
    } catch (error) {
      if (this.lastError !== String(error)) report(`${this.name}="${this.value}"`, error, this.el);
      this.lastError = String(error);
    }
  }

  act(job) {
    return this.ended ? undefined : this.guard(() => batch(job));
  }

  effect(job) {
    const effect = new Reader(() => this.guard(job), this);
    this.ends.add(() => forget(effect));
    refresh(effect);
  }

  // An effect that writes to its element; `job` gives the parts. It has the last word: if a script
  // or a morph writes there, `update` wakes the owner, a cell that each such effect reads.
  keep(job) {
    this.effect(() => {
      note(this.owner);
      for (const part of job()) this.owner.wrote.set(part, partOf(this.el, part));
    });
  }

  listen(target, name, handler, options) {
    const heard = (evt) => this.act(() => handler(evt));
    addEventListener(target, name, heard, options);
    this.ends.add(() => removeEventListener(target, name, heard, options));
  }

  end() {
    for (const job of this.ends) this.guard(job);
    this.ends.clear();
    this.ended = true;
  }
}

// A part of an element is an attribute, or its text: null if it contains more than text.
function partOf(el, part) {
  if (part !== '#text') return getAttribute(el, part);
  return isElement(firstChild(el)) ? null : textContent(el);
}

function showText({ el }, text) {
  const only = firstChild(el);
  if (!(only instanceof Text) || nextSibling(only)) replaceChildren(el, text);
  else if (only.data !== text) only.data = text;
  return ['#text'];
}

// Key by key or all at once: data-class:done="$x" and data-class="{done: $x}". Names no longer
// given are undone. `writeOne` returns the name of the attribute that it wrote.
function keepEach(attribute, writeOne) {
  let last = {};
  attribute.keep(() => {
    const gone = Object.fromEntries(Object.keys(last).map((name) => [name, null]));
    last = attribute.key ? { [attribute.key]: attribute.run() } : attribute.run() ?? {};
    return Object.entries({ ...gone, ...last }).map(([name, value]) => writeOne(name, value));
  });
  attribute.ends.add(() => isConnected(attribute.el)
    && Object.keys(last).forEach((name) => writeOne(name, null)));
}

const plugins = {
  __proto__: null,
  signals(attribute) {
    const { key, value, mods } = attribute;
    const given = value ? attribute.run() : '';
    merge(key ? nested([[key.split('.'), given]]) : given || {}, mods.has('ifmissing'));
  },
  computed(attribute) {
    const jobs = attribute.key ? { [attribute.key]: () => attribute.run() } : attribute.run() ?? {};
    for (const [keys, job] of leaves(jobs)) {
      put(keys.join('.'), new Reader(() => attribute.guard(job)));
    }
  },
  effect: (attribute) => { attribute.effect(() => { attribute.run(); }); },
  init: (attribute) => { timed(attribute)(); },
  text: (attribute) => attribute.keep(() => showText(attribute, String(attribute.run() ?? ''))),
  show: (attribute) => attribute.keep(() => {
    const style = styleOf(attribute.el);
    if (!attribute.run()) style.display = 'none';
    else if (style.display === 'none') style.display = '';
    return ['style'];
  }),
  class(attribute) {
    const classes = classList(attribute.el);
    keepEach(attribute, (names, on) => {
      for (const each of names.split(/\s+/).filter(Boolean)) classes.toggle(each, Boolean(on));
      return 'class';
    });
  },
  attr: (attribute) => keepEach(attribute, (name, value) => {
    const json = Object(value) === value && JSON.stringify(value);   // a function has none
    const text = value === true ? '' : json || String(value);
    if (value === false || (value ?? null) === null) removeAttribute(attribute.el, name);
    else if (getAttribute(attribute.el, name) !== text) setAttribute(attribute.el, name, text);
    return name;
  }),
  style(attribute) {
    const style = styleOf(attribute.el);
    const before = new Map();        // the values that were not ours
    const wrote = {};
    keepEach(attribute, (name, value) => {
      if (!name.startsWith('--')) name = name.replace(/[A-Z]/g, '-$&').toLowerCase();
      const now = style.getPropertyValue(name);
      if (now !== wrote[name]) before.set(name, now);
      style.setProperty(name, value || value === 0 ? value : before.get(name));
      wrote[name] = style.getPropertyValue(name);
      return 'style';
    });
  },
  ref({ el, path, ends }) {
    put(path, el);
    ends.add(() => find(path) === el && put(path, null));
  },
  indicator(attribute) {
    const { owner, path, ends } = attribute;
    const show = () => put(path, owner.requests > 0);
    attribute.listen(document, 'datastar-fetch', ({ detail }) => detail.el === owner.el && show());
    ends.add(() => isConnected(owner.el) || put(path, false));
    show();
  },
  'json-signals'(attribute) {
    const indent = attribute.mods.has('terse') ? 0 : 2;
    attribute.keep(() => showText(attribute, toJson(pick(attribute.run()), indent)));
  },
  bind,
  on(attribute) {
    const { el, key, mods } = attribute;
    const later = timed(attribute);
    const ofDocument = /^datastar-(?:fetch|signal-patch|ready)$/.test(key);
    const target = mods.has('document') || mods.has('outside') || ofDocument ? document
      : mods.has('window') ? window : el;
    attribute.listen(target, key, (evt) => {
      if (mods.has('outside') && evt.target instanceof Node && contains(el, evt.target)) return;
      // A form that is handled here must not also load a page.
      if (mods.has('prevent') || (key === 'submit' && el instanceof HTMLFormElement)) {
        evt.preventDefault();
      }
      if (mods.has('stop')) evt.stopPropagation();
      later(evt);
    }, { once: mods.has('once'), passive: mods.has('passive'), capture: mods.has('capture') });
  },
  'on-intersect'(attribute) {
    const { mods } = attribute;
    const later = timed(attribute);
    const percent = mods.get('threshold')?.[0]
      ?? (mods.has('full') ? 100 : mods.has('half') ? 50 : 0);
    const observer = new IntersectionObserver((entries) => {
      const { isIntersecting, intersectionRatio } = entries.at(-1);
      if ((isIntersecting && intersectionRatio >= percent / 100) === mods.has('exit')) return;
      later();
      if (mods.has('once')) observer.disconnect();
    }, { threshold: percent / 100 });
    observer.observe(attribute.el);
    attribute.ends.add(() => observer.disconnect());
  },
  'on-interval'(attribute) {
    const tags = attribute.mods.get('duration') ?? [];
    const job = timed(attribute);
    if (tags.includes('leading')) job();
    const timer = setInterval(job, milliseconds(tags, 1000));
    attribute.ends.add(() => clearInterval(timer));
  },
  'on-signal-patch-filter'() {},     // the next plugin reads it
  // The page's first signals do not count as a change, nor does what its own expression writes.
  'on-signal-patch'(attribute) {
    const filter = getAttribute(attribute.el, 'data-on-signal-patch-filter') ?? '';
    const chosen = chooser(compile(filter)(root));
    let busy = false;
    const later = timed(attribute, (evt, some) => attribute.act(() => {
      busy = true;
      attribute.guard(() => attribute.run(evt, some));
      announce();                                  // now, while this one ignores changes
      busy = false;
    }));
    announce();                                    // earlier changes are not for this one
    attribute.listen(document, 'datastar-signal-patch', (evt) => {
      const some = busy || starting ? [] : leaves(evt.detail).filter(chosen);
      if (some.length) later(evt, nested(some));
    });
  },
};

// When a job runs: in a view transition, after a delay, once it is quiet, at a limited rate.
const TIMING = {
  viewtransition: (job) => (...args) => transition(() => job(...args)),
  delay: (job, tags) => (...args) => { setTimeout(job, milliseconds(tags), ...args); },
  debounce: (job, tags) =>
    paced(job, tags, tags.includes('leading'), !tags.includes('notrailing'), true),
  throttle: (job, tags) =>
    paced(job, tags, !tags.includes('noleading'), tags.includes('trailing'), false),
};

function timed(attribute, job = (evt) => attribute.act(() => attribute.run(evt))) {
  const { mods } = attribute;
  return Object.keys(TIMING).filter((mod) => mods.has(mod))
    .reduce((inner, mod) => TIMING[mod](inner, mods.get(mod)), job);
}

// "500ms" and "500" are milliseconds, "2s" is seconds.
function milliseconds(tags, otherwise = 0) {
  const tag = tags.find((each) => /^\d+(ms|s)?$/.test(each));
  return tag ? parseInt(tag) * (/\ds$/.test(tag) ? 1000 : 1) : otherwise;
}

// Debounce restarts the timer at each call; throttle lets it run out.
function paced(job, tags, leading, trailing, anew) {
  let timer = null;
  let waiting = null;                // the arguments of the last call that was held back
  const over = () => {
    const args = waiting;
    timer = waiting = null;
    if (trailing && args) job(...args);
  };
  return (...args) => {
    const first = timer === null;
    if (anew) clearTimeout(timer);
    if (first || anew) timer = setTimeout(over, milliseconds(tags));
    if (first && leading) job(...args);
    else waiting = args;
  };
}

// ---- data-bind: a field and a signal follow each other ----
// `save` puts the field's value into the signal, `show` the signal's into the field. At first an
// existing signal wins. It keeps its type: a number stays a number. The field that is being edited
// belongs to the person: its own value is never written back ("1." stays "1.", and "" stays "").

const isBox = (el) => /^(?:checkbox|radio)$/.test(el.type);
const isNumeric = (el) => /^(?:number|range)$/.test(el.type);

// An <option> -> the entry of the signal's list that selected it: the number 1, for the value "1".
const entries = new WeakMap();

// `prop` is for elements that are not fields: it names the bound property, or else attribute.
function take(el, prop, old) {
  if (prop) return prop in el ? el[prop] : getAttribute(el, prop);
  if (el.type === 'checkbox') {      // its value is "on" unless the page sets one
    const isFlag = typeof old === 'boolean' || (el.value === 'on' && typeof old !== 'string');
    return isFlag ? el.checked : el.checked ? el.value : '';
  }
  if (el.type === 'select-multiple') {
    return Array.from(el.selectedOptions, (option) =>
      String(entries.get(option)) === option.value ? entries.get(option) : option.value);
  }
  if (typeof old === 'boolean') return el.value === 'true';
  const isNumber = typeof old === 'number' || (isNumeric(el) && typeof old !== 'string');
  return isNumber ? Number(el.value) : el.value;
}

function give(el, prop, value) {
  const text = String(value ?? '');
  if (prop && prop in el) el[prop] = value;
  else if (prop) setAttribute(el, prop, text);
  else if (el.type === 'checkbox' && typeof value !== 'string') el.checked = Boolean(value);
  else if (isBox(el)) el.checked = el.value === text;
  else if (el.type === 'select-multiple') {
    const chosen = new Map([value ?? []].flat().map((entry) => [String(entry), entry]));
    for (const option of el.options) {
      option.selected = chosen.has(option.value);
      if (option.selected) entries.set(option, chosen.get(option.value));
    }
  } else if (el.value !== text) el.value = text;
}

// The official client's name for the event that tells a field that a patch has written to it.
const REFILLED = 'datastar-prop-change';

let composing = null;                            // the field where an input method (IME) is at work
addEventListener(document, 'compositionstart', (evt) => { composing = evt.target; }, true);
addEventListener(document, 'compositionend', () => { composing = null; }, true);

// Half a number, half a date, half a word: neither read such a value nor write over it.
const isHalf = (el) => composing === el || Boolean(el.validity?.badInput);
const isFocused = (el) => doc.activeElement(document) === el;

// Several fields may share one list. A field's index in the list is the place it first had among
// them in the page. Fields that are added or removed around it later do not change that.
const groups = new Map();                        // path -> the fields bound to it
const precedes = (a, b) => compareDocumentPosition(b, a) & Node.DOCUMENT_POSITION_PRECEDING;

function bind(attribute) {
  const { el, path, mods, ends } = attribute;
  if (el.type === 'file' && localName(el) === 'input') return bindFiles(attribute);
  const isField = /^(?:input|select|textarea)$/.test(localName(el)) && !mods.has('prop');
  const prop = isField ? null : CASES.camel(mods.get('prop')?.[0] ?? 'value');
  const group = groups.get(path) ?? new Set();
  let index = null;
  let taken = {};                    // what was last saved; a new {} equals no value
  let seen = null;                   // the field's state at that time
  const state = () => String([take(el, prop, ''), el.checked]);
  const isUnchosen = () => el.type === 'radio' && !el.checked;
  const onLeave = () => attribute.act(show);
  function place() {
    if (!Array.isArray(find(path)) || el.type === 'select-multiple') return path;
    index ??= [...group].filter((other) => precedes(other, el)).length;
    return `${path}.${index}`;
  }
  function save() {
    if (isUnchosen() || el.validity?.badInput) return;
    const where = place();
    taken = take(el, prop, find(where));
    seen = state();
    put(where, taken);
  }
  function show() {
    const value = find(place());
    if (Object.is(value, taken)) return;
    taken = {};
    if (isFocused(el) && isHalf(el)) return addEventListener(el, 'blur', onLeave, { once: true });
    give(el, prop, value);
    seen = state();
  }
  groups.set(path, group.add(el));
  ends.add(() => group.delete(el) && !group.size && groups.delete(path));
  if (el.type === 'radio' && !el.name) setAttribute(el, 'name', path);
  if (find(place()) === undefined && !isUnchosen()) save();
  const isSelect = localName(el) === 'select';
  const events = mods.get('event') ?? (isSelect ? ['change'] : ['input', 'change']);
  for (const name of [...events, REFILLED]) attribute.listen(el, name, save);
  attribute.effect(show);
  // A browser that returns to a page fills its fields in again, without an event.
  attribute.listen(window, 'pageshow', () => setTimeout(() => state() !== seen && save()));
  if (!isSelect) return;
  const watching = new MutationObserver(() => {  // the options may have changed
    taken = {};
    show();
  });
  watching.observe(el, ALL_CHANGES);
  ends.add(() => watching.disconnect());
}

// A file field's signal is a list of { name, contents in base64, mime }.
function bindFiles(attribute) {
  let latest = 0;
  attribute.listen(attribute.el, 'change', async () => {
    const mine = ++latest;
    const files = await Promise.all(Array.from(attribute.el.files, readFile));
    if (mine === latest && !attribute.ended) put(attribute.path, files);
  });
}

async function readFile(file) {
  const reading = new FileReader();
  reading.readAsDataURL(file);
  await new Promise((done) => { reading.onloadend = done; });
  const [, contents = ''] = reading.result.split(',');     // data:text/plain;base64,SGVsbG8=
  return { name: file.name, contents, mime: file.type || 'application/octet-stream' };
}

// ---- Which attributes are alive ----
// A MutationObserver reports all elements and attributes that are added or removed, by any code.
// An element that only moved is back in the page by then: it is neither ended nor started again.

const MODIFIERS = new Set(['case', 'ifmissing', 'terse', 'prop', 'event', 'once', 'passive',
  'capture', 'window', 'document', 'outside', 'prevent', 'stop', 'exit', 'half', 'full',
  'threshold', 'duration', ...Object.keys(TIMING)]);

// Ends and starts the attributes of an element that changed; ends all if it is gone or ignored.
function follow(el) {
  const names = getAttributeNames(el).filter((name) => name.startsWith('data-'));
  if (!owners.has(el) && !names.length) return;
  const owner = owners.get(el) ?? Object.assign(new Cell(),
    { el, order: ++ownersSoFar, attributes: new Map(), wrote: new Map(), requests: 0 });
  owners.set(el, owner);
  const { attributes, order } = owner;
  const isSilent = !isConnected(el) || closest(el, '[data-ignore]')
    || hasAttribute(el, 'data-ignore__self');
  for (const [name, { value }] of attributes) {
    if (isSilent || getAttribute(el, name) !== value) quit(owner, name);
  }
  for (const [n, name] of isSilent ? [] : names.entries()) {
    const old = attributes.get(name);
    const attribute = old ?? new Attribute(owner, name, getAttribute(el, name));
    attribute.order = order + n / 1000;
    attributes.set(name, attribute);
    if (!old) attribute.start();
  }
}

function quit(owner, name) {
  owner.attributes.get(name)?.end();
  owner.attributes.delete(name);
}

function update(records) {
  // Found first: an attribute that starts below may write to the same part, such as the style.
  const overwritten = new Set(records.map(overwrittenOwner).filter(Boolean));
  const gone = records.flatMap(({ removedNodes }) => [...removedNodes]);
  for (const node of gone) if (!isConnected(node)) family(node).forEach(follow);
  for (const { target, addedNodes, attributeName: name } of records) {
    for (const node of addedNodes) family(node).forEach(follow);
    if (name?.startsWith('data-')) follow(target);
  }
  overwritten.forEach(wake);
}

// The owner of an element, if a part now differs from what the owner's attributes wrote.
function overwrittenOwner({ type, target, attributeName: name }) {
  const el = type === 'characterData' ? parentNode(target) : target;
  const owner = owners.get(el);
  const part = name ?? '#text';
  return owner?.wrote.has(part) && owner.wrote.get(part) !== partOf(el, part) ? owner : null;
}

const ALL_CHANGES = { subtree: true, childList: true, attributes: true, characterData: true };
const observer = new MutationObserver((records) => batch(() => update(records)));

// ---- Actions, above all requests ----
// `args` returns an action's current arguments. A request calls it again for each attempt.

const setEach = (filter, change) => batch(() => {
  for (const [keys, value] of leaves(data).filter(chooser(filter))) {
    put(keys.join('.'), plain(value, change));
  }
});

const actions = {
  __proto__: null,
  peek: (attribute, evt, args) => batch(args()[0]),
  setAll(attribute, evt, args) {
    const [value, filter] = args();
    setEach(filter, () => value);
  },
  toggleAll: (attribute, evt, args) => setEach(args()[0], (old) => !old),
};

// A call is a request with all its attempts, and holds their state. `given` are the arguments of
// the first attempt; later ones call `args` again. An error here is reported as the expression's.
for (const method of ['GET', 'POST', 'PUT', 'PATCH', 'DELETE', 'QUERY']) {
  actions[method.toLowerCase()] = (attribute, evt, args) => {
    const given = args();
    const [url, { contentType, selector } = {}] = given;
    if (!url) throw new Error('there is no URL');
    const form = contentType === 'form' && formOf(attribute.el, evt, selector);
    if (form === null) return Promise.resolve();           // a field is not valid
    return request({ method, attribute, args, given, form, tries: 0, lastId: '' });
  };
}

const underWay = new Map();          // "GET /url" -> the AbortController of the request

// The same request again cancels the one under way. With "cleanup", so does its element's removal.
async function request(call) {
  const { attribute, method, given: [url, options = {}] } = call;
  const { requestCancellation: cancel = 'auto' } = options;
  const own = cancel instanceof AbortController ? cancel : new AbortController();
  const slot = `${method} ${url}`;
  const abort = () => own.abort();
  if (cancel === 'auto' || cancel === 'cleanup') {
    underWay.get(slot)?.abort();
    underWay.set(slot, own);
  }
  if (cancel === 'cleanup') attribute.ends.add(abort);
  call.cancelled = own.signal;
  call.emit = (type, argsRaw = {}) => tell('datastar-fetch', { type, el: attribute.el, argsRaw });
  call.receive = (type, came) => inTurn(type, () => {
    if (cancel === 'cleanup' && own.signal.aborted) return;    // 'auto' applies what has come
    if (type !== 'text/javascript') call.emit(type, came);
    apply[type]?.(came);
  }, came);
  attribute.owner.requests++;
  call.emit('started');
  try {
    await attempts(call, options);
  } catch (error) {
    if (!own.signal.aborted) report(`${attribute.name}: ${slot}`, error, attribute.el);
  }
  attribute.ends.delete(abort);
  if (underWay.get(slot) === own) underWay.delete(slot);
  await inTurn('finished', () => {   // after its patches
    attribute.owner.requests--;
    call.emit('finished');
  });
}

// Tries until there is an answer. A hidden tab closes its @get streams until it is visible again.
async function attempts(call, { openWhenHidden = call.method !== 'GET', retry = 'auto',
  retryInterval = 1000, retryScaler = 2, retryMaxWait = 30000, retryMaxCount = 10 }) {
  const { cancelled } = call;
  const aborted = new Promise((done) => addEventListener(cancelled, 'abort', done));
  const until = (start) => Promise.race([aborted, new Promise(start)]);
  const shown = (done) => addEventListener(document, 'visibilitychange', done, { once: true });
  const isHidden = () => document.hidden && !openWhenHidden;
  do {
    const hidden = new AbortController();
    const hide = () => isHidden() && hidden.abort();
    addEventListener(document, 'visibilitychange', hide);
    try {
      const signal = AbortSignal.any([cancelled, hidden.signal]);
      if (!await attempt(call, signal, retry)) return;
    } catch (error) {
      if (cancelled.aborted || (retry === 'never' && !hidden.signal.aborted)) throw error;
    } finally {
      removeEventListener(document, 'visibilitychange', hide);
    }
    if (!hidden.signal.aborted) {
      if (++call.tries > retryMaxCount) {
        call.emit('retries-failed');
        throw new Error(`given up after ${call.tries} tries`);
      }
      // The random part keeps all clients from coming at the same moment after a restart.
      const longest = (call.interval ?? retryInterval) * retryScaler ** (call.tries - 1);
      const wait = Math.min(longest, retryMaxWait) * (1 - Math.random() / 4);
      call.emit('retrying');
      await until((done) => setTimeout(done, wait));
    }
    while (isHidden() && !cancelled.aborted) await until(shown);
  } while (!cancelled.aborted);
}

// One attempt; true: try again. A broken connection throws, and `attempts` decides. With `retry`
// 'error' or 'always', status 400 and above is tried again; with 'always' also an ended stream, and
// other 2xx. Status 200 resets the count of tries; 204 and 3xx are final. Nothing is stored: Chrome
// may keep an aborted stream open if it stores it.
async function attempt(call, signal, retry) {
  const { url, ...sent } = batch(() => sentWith(call));
  const answer = await fetch(url, { ...sent, signal, cache: 'no-store' });
  const { status } = answer;
  if (status >= 400) call.emit('error', { status: String(status) });
  if (status === 200) {
    call.tries = 0;
    return await readAnswer(answer, call) && retry === 'always';
  }
  answer.body?.cancel();
  if (status >= 400) return retry === 'always' || retry === 'error';
  return retry === 'always' && status !== 204 && status < 300;
}

// The request to send, made from the current arguments, signals and fields.
function sentWith(call) {
  const { method, form } = call;
  const [url, options = {}] = call.given ?? call.args();
  call.given = null;
  call.overrides = options.responseOverrides ?? {};
  const inUrl = method === 'GET' || method === 'DELETE';
  const target = new URL(url, baseURI(document));
  const headers = new Headers({
    Accept: 'text/event-stream, text/html, application/json', 'Datastar-Request': 'true',
    ...inUrl || form ? {} : { 'Content-Type': 'application/json' }, ...options.headers,
  });
  // A header holds bytes, so an id is sent as UTF-8, with one character for each byte.
  const id = String.fromCharCode(...new TextEncoder().encode(call.lastId));
  if (id) headers.set('Last-Event-ID', id);
  const { payload, filterSignals } = options;
  const body = form ? form() : toJson(payload === undefined
    ? pick({ exclude: /(^|\.)_/, ...filterSignals }) : payload);
  if (inUrl && form) for (const [key, value] of body) target.searchParams.append(key, value);
  else if (inUrl) target.searchParams.set('datastar', body);
  return { url: target, method, headers, body: inUrl ? null : body };
}

const BUTTONS = 'button,input[type=submit],input[type=image]';

// Returns a function that collects the fields of the form, with the button that was pressed, if it
// belongs to the form. Null: a field is not valid.
function formOf(el, evt, selector) {
  const own = localName(el) !== 'form' && el.form;           // as in form="edit"
  const form = selector ? doc.querySelector(document, selector) : own || closest(el, 'form');
  if (!(form instanceof HTMLFormElement)) throw new Error('there is no form to send');
  const button = [evt?.submitter, el].find((each) =>
    each?.form === form && closest(each, BUTTONS) === each);
  const pressed = isElement(evt?.target) && closest(evt.target, BUTTONS);
  if (pressed || evt?.type === 'submit') evt.preventDefault();     // or a page would load, too
  const { reportValidity, noValidate, enctype } = functionsOf(HTMLFormElement);
  if (!noValidate(form) && !button?.formNoValidate && !reportValidity(form)) return null;
  return () => {
    const fields = new FormData(form);
    if (button?.name) fields.append(button.name, button.value);
    if (enctype(form) === 'multipart/form-data') return fields;
    return new URLSearchParams([...fields].map(([name, value]) => [name, value.name ?? value]));
  };
}

const ANSWERS = [
  ['text/html', 'datastar-patch-elements', 'elements'],
  ['application/json', 'datastar-patch-signals', 'signals'],
  ['text/javascript', 'text/javascript', 'script'],
];

// Reads an answer, according to its type. True if it was a stream of events.
async function readAnswer(answer, call) {
  const kind = answer.headers.get('content-type') ?? '';
  if (kind.includes('text/event-stream')) {
    await readEvents(answer.body, call);
    return true;
  }
  const given = {};
  for (const [name, value] of answer.headers) {
    if (name.startsWith('datastar-')) given[CASES.camel(name.slice(9))] = value;
  }
  const [, type, key] = ANSWERS.find(([each]) => kind.includes(each)) ?? [];
  const text = await answer.text();
  if (type) call.receive(type, { ...given, ...call.overrides, [key]: text });
  return false;
}

// Server-Sent Events (HTML standard). Datastar's data lines are "key value"; keys may repeat.
async function readEvents(body, call) {
  const reading = body.pipeThrough(new TextDecoderStream()).getReader();
  let [rest, type, data, id] = ['', '', {}, null];
  for (;;) {
    const { done, value } = await reading.read();
    if (done) return;                            // an event without its blank line is dropped
    const whole = /[\r\n]/.test(value) || rest.endsWith('\r');      // else no line is complete
    const lines = whole ? (rest + value).split(/\r\n|\n|\r(?!$)/) : [rest + value];
    rest = lines.pop();                          // perhaps only the first half of a line
    for (const line of lines) {
      const [, field, content] = line.match(/^([^:]*):? ?(.*)$/s);
      const [, key, text] = content.match(/^(\S*) ?(.*)$/s);
      if (line === '') {
        if (id !== null) call.lastId = id;
        if (type.startsWith('datastar-')) call.receive(type, data);
        [type, data, id] = ['', {}, null];
      } else if (field === 'event') type = content;
      else if (field === 'id' && !content.includes('\0')) id = content;
      else if (field === 'retry' && /^\d+$/.test(content)) call.interval = Number(content);
      else if (field === 'data') data[key] = has(data, key) ? `${data[key]}\n${text}` : text;
    }
  }
}

// ---- What answers bring, applied one at a time ----
// A view transition applies its patch a frame later. Whatever arrives meanwhile waits for it.

let applied = Promise.resolve();     // fulfilled when all received so far is in the page

function inTurn(what, job, { useViewTransition, viewTransitionSelector: part } = {}) {
  const asked = String(useViewTransition) === 'true';
  applied = applied
    .then(() => asked ? transition(() => batch(job), part) : batch(job))
    .catch((error) => report(what, error));
  return applied;
}

// In the whole page, or in a part of it if the browser supports that.
function transition(job, selector) {
  const part = selector && doc.querySelector(document, selector);
  const scope = part?.startViewTransition ? part : document;
  if (!scope.startViewTransition) return job();
  const { ready, updateCallbackDone } = scope.startViewTransition(job);
  ready.catch(() => {});                         // another one replaced it
  return updateCallbackDone;
}

const apply = {
  'datastar-patch-signals': ({ signals, onlyIfMissing = false }) =>
    merge(JSON.parse(signals), `${onlyIfMissing}` === 'true'),
  'datastar-patch-elements': patchElements,
  'text/javascript': ({ script }) => (0, eval)(script),    // in the global scope, like a script
};

// ---- Elements: patches, and the morph ----

function patchElements({ elements = '', selector, mode = 'outer', namespace }) {
  const fresh = parse(elements, namespace);
  if (!MODES.test(mode)) throw new Error(`there is no mode ${mode}`);
  if (selector) {
    const targets = [...doc.querySelectorAll(document, selector)];
    if (!targets.length) throw new Error(`no element matches ${selector}`);
    const copies = targets.map((_, n) => n ? fresh.map((node) => cloneNode(node, true)) : fresh);
    targets.forEach((target, n) => patchOne(mode, target, copies[n]));
  } else if (mode === 'outer' || mode === 'replace') {
    for (const node of fresh.filter(isElement)) patchOne(mode, targetOf(node), [node]);
  } else throw new Error(`the mode ${mode} needs a selector`);
}

// The element that a new one replaces, if there is no selector.
function targetOf(node) {
  const whole = { html: page, head: doc.head(document), body: doc.body(document) };
  const id = getAttribute(node, 'id') ?? '';
  const target = whole[localName(node)] ?? doc.getElementById(document, id);
  if (!target) report('datastar-patch-elements', `no element has the id "${id}"`);
  return target;
}

function parse(html, namespace) {
  const opening = /^(?:\s|<!--[^]*?-->|<!doctype[^>]*>)*<(html|head|body)[\s>]/i;
  const first = html.match(opening)?.[1].toLowerCase();
  if (first) {
    const { documentElement, head, body } = new DOMParser().parseFromString(html, 'text/html');
    if (first === 'html') return [documentElement];
    return first === 'body' ? [body] : /<body[\s>]/i.test(html) ? [head, body] : [head];
  }
  const wrapper = { svg: 'svg', mathml: 'math' }[namespace];
  const template = doc.createElement(document, 'template');
  template.innerHTML = wrapper ? `<${wrapper}>${html}</${wrapper}>` : html;
  return [...childNodes(wrapper ? template.content.firstChild : template.content)];
}

const refilled = new Set();          // fields whose content the morph has changed
const MODES = /^(?:outer|inner|replace|prepend|append|before|after|remove)$/;

function patchOne(mode, target, nodes) {
  if (!target || !isConnected(target)) return;   // one inside another may be gone by now
  const parent = parentNode(target);
  const isIgnored = isElement(parent) && closest(parent, '[data-ignore-morph]');
  if (isIgnored && /^(?:outer|inner)$/.test(mode)) return;
  const scripts = nodes.flatMap(family).filter((el) => localName(el) === 'script');
  if (mode === 'outer') morph(parent, [target], nodes);
  else if (mode === 'inner') morph(target, [...childNodes(target)], nodes);
  else ofElement[mode === 'replace' ? 'replaceWith' : mode](target, ...nodes);
  for (const script of scripts) if (isConnected(script)) enliven(script);
  // Bindings are told by a separate event: `input` and `change` mean a person. Bindings that the
  // patch itself brings are not told: an existing signal wins at first.
  for (const el of refilled) dispatchEvent(el, new Event(REFILLED));
  refilled.clear();
  batch(() => update(observer.takeRecords()));
}

// A parsed script never runs; one that is created by code runs when it enters the page.
function enliven(dead) {
  const script = doc.createElementNS(document, dead.namespaceURI, 'script');
  for (const name of getAttributeNames(dead)) copyAttribute(dead, script, name);
  if (dead.nonce) script.nonce = dead.nonce;
  if ('async' in script) script.async = hasAttribute(dead, 'async');
  replaceChildren(script, textContent(dead));
  ofElement.replaceWith(dead, script);
}

const copyAttribute = (from, to, name) =>
  setAttributeNode(to, cloneNode(getAttributeNode(from, name)));

// The morph turns old nodes into new ones and keeps what is the same. First it pairs elements whose
// id is on both sides (once, with the same tag), wherever they are, and with them the elements that
// contain them. Each other new node takes, among the children of one parent, the next old node of
// its kind. Then all children are put into place, and only after that does the morph descend into
// each. Old nodes without use are removed at the very end: until then they may be needed elsewhere.
function morph(parent, old, nodes) {
  const focused = doc.activeElement(document);
  const { selectionStart, selectionEnd, selectionDirection } = focused ?? {};
  const plan = planOf(parent, old, nodes);
  morphNodes(parent, old, nodes, plan);
  for (const node of plan.doomed) removeChild(parentNode(node), node);
  // Without moveBefore, an element loses the focus when it moves.
  if (!focused || !isConnected(focused) || isFocused(focused)) return;
  focused.focus({ preventScroll: true });
  if (typeof selectionStart === 'number') {      // not every field has a selection
    focused.setSelectionRange(selectionStart, selectionEnd, selectionDirection);
  }
}

// partners: new element -> its old one. promised: those old ones, numbered. around: new elements
// that contain one with a partner. doomed: old nodes without use.
function planOf(parent, old, nodes) {
  const [partners, promised, around] = [new Map(), new Map(), new Set()];
  const pair = (fresh, el) => promised.set(el, promised.size + 1) && partners.set(fresh, el);
  const [before, after] = [old, nodes].map(elementsById);
  for (const [id, [el, twin]] of before) {
    const [fresh, second] = after.get(id) ?? [];
    const isUnique = fresh && !twin && !second;            // else the id occurs twice on a side
    if (isUnique && nodeName(el) === nodeName(fresh)) pair(fresh, el);
  }
  for (const [inner, partner] of [...partners]) {  // from each pair outwards
    let el = partner;
    let fresh = parentNode(inner);
    for (; isElement(fresh) && !partners.has(fresh); fresh = parentNode(fresh)) {
      around.add(fresh);
      el = el && parentNode(el);
      const fits = el && el !== parent && !promised.has(el) && nodeName(el) === nodeName(fresh);
      if (fits) pair(fresh, el);
      else el = null;                            // nor do those around it
    }
  }
  return { partners, promised, around, doomed: [] };
}

// The elements by id, except those that must not be morphed.
function elementsById(roots) {
  const isMorphed = (el) => !closest(parentNode(el), '[data-ignore-morph]');
  const found = roots.filter(isElement).flatMap((top) => [...hasAttribute(top, 'id') ? [top] : [],
    ...Array.from(querySelectorAll(top, '[id]')).filter(isMorphed)]);
  return Map.groupBy(found, (el) => getAttribute(el, 'id'));
}

// Inputs of text types, which have a selection, match each other: a password may become a text.
// Scripts match only if they are equal: a script already in the page does not run again.
function kindOf(node, id = isElement(node) && getAttribute(node, 'id') || '') {
  const name = isElement(node) ? localName(node) : '';
  const type = name === 'input' && node.selectionStart === null ? node.type : '';
  return `${nodeName(node)}${name === 'script' ? node.outerHTML : type}#${id}`;
}

// Of these a clone goes into the page. A select that loses its chosen option chooses another one:
// if the new HTML's options were taken out of it one by one, its last would end up chosen.
const OPTIONS = /^OPT(?:ION|GROUP)$/;

function morphNodes(parent, old, nodes, plan) {
  const matches = matchAll(old, nodes, plan);
  const staying = new Set(matches);
  const leaving = new Set(old.filter((node) => !staying.has(node)));
  for (const node of leaving) if (!plan.promised.has(node)) plan.doomed.push(node);
  let at = old[0] ?? null;                       // the node now in the place of the next one
  nodes.forEach((node, n) => {
    while (leaving.has(at)) at = nextSibling(at);
    const match = matches[n];
    if (match && at && nextSibling(at) === match) at = match;   // the node at `at` moves later
    if (match && match === at) at = nextSibling(at);
    else if (match) move(parent, match, at);
    else {                                       // a new node, which may contain old elements
      const made = plan.around.has(node) || OPTIONS.test(nodeName(node))
        ? cloneNode(node, false) : node;
      insertBefore(parent, made, at);
      if (made !== node) morphNodes(made, [], [...childNodes(node)], plan);
    }
  });
  nodes.forEach((node, n) => matches[n] && morphNode(matches[n], node, plan));
}

// For each new node, the old one that becomes it, if any: its partner; the next one of its kind
// behind the same pair; the next one of its kind anywhere; the next one that has no id.
function matchAll(old, nodes, { partners, promised }) {
  const matches = nodes.map((node) => partners.get(node));
  const placed = (list, last = 0) => list.map((node) => {
    last = promised.get(partners.get(node) ?? node) ?? last;     // the number of the last pair
    return [node, last];
  });
  const behind = new Map(matches.some(Boolean) ? [...placed(old), ...placed(nodes)] : []);
  const inPlace = (node) => `${isElement(node) && behind.get(node)} ${kindOf(node)}`;
  const withoutId = (node) => kindOf(node, '');
  const rules = [[inPlace, inPlace], [kindOf, kindOf], [kindOf, withoutId]];
  for (const [keyOfOld, keyOfNew] of rules) {
    if (!old.length || !matches.includes(undefined)) break;
    const taken = new Set(matches);
    const free = old.filter((node) => !promised.has(node) && !taken.has(node));
    const left = Map.groupBy(free.reverse(), (node) => keyOfOld(node));      // the first one last
    nodes.forEach((node, n) => { matches[n] ??= left.get(keyOfNew(node))?.pop(); });
  }
  return matches;
}

// moveBefore keeps focus, frames and animations. Both nodes must be in the page.
function move(parent, node, before) {
  if (moveBefore && isConnected(node) && isConnected(parent)) moveBefore(parent, node, before);
  else insertBefore(parent, node, before);
}

function morphNode(old, fresh, plan) {
  if (!isElement(old)) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  if (hasAttribute(old, 'data-ignore-morph') || hasAttribute(fresh, 'data-ignore-morph')) return;
  // A template's contents are a document of their own, and are not part of the comparison.
  if (isEqualNode(old, fresh) && !family(old).some((el) => localName(el) === 'template')) return;
  const name = localName(old);
  const [before, after] = name === 'textarea' ? [old.defaultValue, fresh.defaultValue] : [];
  morphAttributes(old, fresh);
  if (name === 'template') old.innerHTML = fresh.innerHTML;
  else morphNodes(old, [...childNodes(old)], [...childNodes(fresh)], plan);
  if (before !== after) writeField(old, 'value', after);
}

function morphAttributes(old, fresh) {
  const preserved = (getAttribute(fresh, 'data-preserve-attr') ?? '').split(/\s+/);
  const namesOf = (el) => getAttributeNames(el).filter((name) => !preserved.includes(name));
  const oursOf = (el) => namesOf(el).filter((name) => name.startsWith('data-'));
  const differs = (name) => getAttribute(old, name) !== getAttribute(fresh, name);
  const fields = { input: ['value', 'checked'], option: ['selected'] }[localName(old)] ?? [];
  const changed = fields.filter((name) => differs(name) && !preserved.includes(name));
  // Undo what an attribute has shown here before the new view is put in place.
  if (owners.has(old)) for (const name of oursOf(old).filter(differs)) quit(owners.get(old), name);
  // Our attributes run in the order they have in the element. If it differs, all are set anew.
  if (oursOf(fresh).join() !== oursOf(old).join()) {
    for (const name of oursOf(old)) removeAttribute(old, name);
  }
  for (const name of namesOf(old)) if (!hasAttribute(fresh, name)) removeAttribute(old, name);
  for (const name of namesOf(fresh)) if (differs(name)) copyAttribute(fresh, old, name);
  // Attributes hold a field's initial state; properties hold its current one.
  for (const name of changed) {
    const isThere = hasAttribute(fresh, name);
    if (name !== 'value') writeField(old, name, isThere);
    // A box has no value apart from its attribute, and a file field's cannot be set.
    else if (old.type !== 'file' && (isThere || !isBox(old))) {
      writeField(old, name, getAttribute(fresh, name) ?? '');
    }
  }
}

function writeField(el, name, value) {
  const field = name === 'selected' ? closest(el, 'select') ?? el : el;
  // What is being typed may already mean the same: "1." means 1, an empty number field 0.
  const isSame = isNumeric(el) ? Number(el.value) === Number(value) : el.value === value;
  if (name === 'value' && isFocused(el) && (isHalf(el) || isSame)) return;
  el[name] = value;
  refilled.add(field);
}

// ---- Start ----
// The start waits until the browser, on a return to the page, has filled its fields in again: it
// does that when the document is ready, without an event.

let starting = true;

function startPage() {
  batch(() => family(page).forEach(follow));
  starting = false;
  observer.observe(document, ALL_CHANGES);
  tell('datastar-ready');
}

if (doc.readyState(document) !== 'loading') setTimeout(startPage);
else addEventListener(document, 'DOMContentLoaded', () => setTimeout(startPage), { once: true });
"""

Stario._pocket = Assets({"pocket.js": POCKET_CLIENT}, "_stario")


# ==================================================================================================
# 32. This file as a page [read]
#
# `python stario.py --read` serves it: comments beside their code, names that link to where they are
# defined, examples with a button that runs them. An example is code in a comment that makes an
# `app`; its last line is a request to the app, and how the answer begins:
#
#     async def hello(c: Context, w: Writer) -> None:
#         w.html(h.P("Hello, ", c.req.query.get("name", "world")))
#
#     app = Stario()
#     app.get("/", hello)
#     # GET /?name=you -> <p>Hello, you</p>
# ==================================================================================================


class _Row(NamedTuple):
    """Some lines of this file: a comment or a docstring, and the code that it describes."""

    line: int  # where it begins
    prose: list[str]
    code: list[str]

    @property
    def title(self) -> str:
        """The title of the act or part that begins here; empty if none does."""
        return self.prose[1] if self.prose and self.prose[0].startswith("====") else ""

    @property
    def example(self) -> list[str]:
        """The example in the comment: code, target, answer; empty if there is none."""
        example = r"((?:^(?: {4}.*)?\n)+)^ {4}# GET (/\S*) -> (.*)$"
        found = re.search(example, "\n".join(self.prose), re.MULTILINE)
        return list(found.groups()) if found else []


def _rows(source: str) -> list[_Row]:
    """Split a file into rows. After code, a comment, function or class begins a new row."""
    begins, docstrings = set[int](), dict[int, int]()  # lines; docstrings' lines, with their indent
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            begins.add(min(part.lineno for part in (node, *node.decorator_list)))
        elif isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", 0), str):
            numbers = range(node.lineno, (node.end_lineno or 0) + 1)
            docstrings |= dict.fromkeys(numbers, node.col_offset)
    rows = [_Row(1, [], [])]
    for number, line in enumerate(source.split("\n"), 1):
        stripped, indent = line.strip(), docstrings.get(number)
        is_comment = indent is None and f"{stripped} ".startswith(("# ", "// "))
        if rows[-1].code and (is_comment or number in begins):
            rows.append(_Row(number, [], []))
        if is_comment:
            rows[-1].prose.append(stripped.lstrip("#/").removeprefix(" "))
        elif indent is not None:
            rows[-1].prose.append(line[indent:].replace('"""', ""))
        else:
            rows[-1].code.append(line)
    return rows


@functools.cache
def _code_pattern() -> re.Pattern[str]:
    """For Python and JavaScript: a comment, string, keyword, the definition of a name, a name."""
    keywords = "|".join((*keyword.kwlist, "const|export|function|let|new|null|of|this|typeof"))
    before = "def", "async def", "class", "const", "let", "function", "export function"
    defining = "|".join(f"(?<=^{words} )" for words in before)
    return re.compile(
        r"(?P<c>(?:#|// ).*)|(?P<s>(['\"])(?:\\.|(?!\3)[^\\\n])*\3|`[^`]*`)|"
        rf"\b(?P<k>{keywords})\b|(?P<d>(?:{defining})\w+|^\w+(?=(?:: .+)? = ))|(?P<n>\w+)",
        re.MULTILINE,
    )


def _colored(code: str, defined: set[str]) -> SafeString:
    """Code as HTML: coloured, with its names as links to where they are defined."""

    def mark(found: re.Match[str]) -> str:
        kind, text = found.lastgroup, SafeString(found[0])
        if kind == "d":
            return h.B({"id": text}, text)
        if kind != "n":
            return h.Span({"class": kind}, text)
        return h.A({"href": f"#{text}"}, text) if text in defined else text

    return SafeString(_code_pattern().sub(mark, render(code)))


def _prose(lines: list[str]) -> Iterator[SafeString]:
    """A comment's text as HTML: paragraphs, and indented lines unchanged."""
    for block in "\n".join(lines).split("\n\n"):
        if block.strip("\n").startswith("    "):
            yield h.Pre(textwrap.dedent(block.strip("\n")))
        else:
            yield h.P(h.Code(text) if i % 2 else text for i, text in enumerate(block.split("`")))


_STYLE = """
:root { color-scheme: light dark; font: 100%/1.55 Georgia, serif; scroll-padding: 4rem; }
body { margin: 0; } [hidden] { display: none !important; } h2 { margin: 3rem 0 1rem; }
header { position: sticky; top: 0; z-index: 1; display: flex; gap: 1rem; padding: .5rem 1.5rem;
  border-bottom: 1px solid #8884; background: Canvas; }
nav { padding: 1rem 1.5rem; columns: 20rem; } nav a { display: block; }
nav a[href^="#ACT"] { font-weight: bold; margin-top: .5rem; break-after: avoid; }
section { display: grid; grid-template-columns: clamp(24rem, 100vw - 52rem, 34rem) minmax(0, 1fr); }
section > * { padding: .25rem 1.5rem; margin: 0; min-width: 0; }
section > pre { background: #8881; } a { color: inherit; text-decoration: underline dotted #8888; }
p { margin: .4rem 0; overflow-wrap: break-word; } output { display: block; white-space: pre-wrap; }
pre, code, output { font: .8rem/1.5 ui-monospace, Menlo, Consolas, monospace; overflow-x: auto; }
.c { opacity: .6; } .s { color: light-dark(#0a6b3d, #8fd19e); }
.k { color: light-dark(#8b2f8f, #d6a0dc); } :target { outline: 2px solid #8888; }
@media (max-width: 60rem) { section { grid-template-columns: minmax(0, 1fr); } }
"""
_SCRIPT = """
const rows = document.querySelectorAll("section, nav a"), find = document.querySelector("input");
find.oninput = () => rows.forEach((row) =>
  row.hidden = !row.textContent.toLowerCase().includes(find.value.toLowerCase()));
for (const run of document.querySelectorAll("button")) run.onclick = async () =>
  run.nextSibling.value = await (await fetch(run.value)).text();
if (!location.hash) scrollTo(0, localStorage.place ?? 0);
addEventListener("scrollend", () => find.value || (localStorage.place = scrollY));
"""


def _book_page(rows: list[_Row]) -> SafeString:
    """The file as an HTML page."""
    codes = ["\n".join(row.code).strip("\n") for row in rows]
    part, are_scripts = "", list[bool]()
    defined = {False: set[str](), True: set[str]()}  # names of Python, and of JavaScript
    for row, code in zip(rows, codes, strict=True):
        part = row.title or part
        are_scripts.append("JavaScript" in part)
        defined[are_scripts[-1]] |= {found["d"] for found in _code_pattern().finditer(code)}

    def view(row: _Row, code: str, is_script: bool) -> SafeString:
        title = row.title and h.H2({"id": row.title}, row.title)
        prose = _prose(row.prose[3:-1] if title else row.prose)
        target = row.example and f"/{row.line}{row.example[1]}"
        run = target and [h.Button({"value": target}, "Run"), h.Output()]
        return h.Section(h.Div(title, prose, run), h.Pre(_colored(code, defined[is_script])))

    phone = h.Meta({"name": "viewport", "content": "width=device-width"})
    head = h.Head(phone, h.Title("stario.py, to read"), h.Style(_STYLE))
    header = h.Header(h.A({"href": "#"}, "stario.py"), h.Input({"placeholder": "Search"}))
    contents = h.Nav(h.A({"href": f"#{row.title}"}, row.title) for row in rows if row.title)
    main = h.Main(map(view, rows, codes, are_scripts))
    return h.Html({"lang": "en"}, head, h.Body(header, contents, main, h.Script(_SCRIPT)))


def _book_app() -> Stario:
    """The app that `python stario.py --read` runs: the page, and the app of each example."""
    rows = _rows(inspect.getsource(sys.modules[__name__]))
    book = _book_page(rows)

    async def page(c: Context, w: Writer) -> None:
        w.html(book)

    app = Stario()
    app.get("/", page)
    for row in rows:
        if row.example:
            app.mount(f"/{row.line}", _example_app(row))
    return app


def _example_app(row: _Row) -> Stario:
    names = dict(globals())
    exec(textwrap.dedent(row.example[0]), names)
    return cast("Stario", names["app"])


# ==================================================================================================
# 33. An app to begin with
#
# `python stario.py` runs this app: a counter and a clock that all tabs share. `--read` serves this
# file as a page (part 32). `--without assets,client` prints a copy without these parts.
# ==================================================================================================


def _first_app() -> Stario:
    """The app that `python stario.py` runs."""
    relay, clicks = Relay[None](), 0

    def view() -> SafeString:
        button = h.Button(data.on("click", at.post("/click")), f"{clicks} clicks")
        stay = data.init(at.get("/live", retry="always"))
        return h.Main({"id": "main"}, stay, h.H1(time.strftime("%H:%M:%S")), button)

    async def page(c: Context, w: Writer) -> None:
        phone = h.Meta({"name": "viewport", "content": "width=device-width"})
        style = h.Style("* { color-scheme: light dark; font: 28px system-ui; text-align: center; }")
        w.html(h.Html(h.Head(h.Title("Stario"), phone, style, datastar_script()), h.Body(view())))

    async def live(c: Context, w: Writer) -> None:
        async for _ in w.alive(relay.subscribe("*", overflow="latest")):
            w.patch(view())

    async def click(c: Context, w: Writer) -> None:
        nonlocal clicks
        clicks += 1
        w.empty()
        relay.publish("click", None)

    async def tick() -> None:
        while True:
            relay.publish("tick", None)
            await asyncio.sleep(1 - time.time() % 1)

    app = Stario()
    app.get("/", page)
    app.get("/live", live)
    app.post("/click", click)
    app.background(tick())
    return app


# -- Act 5 runs: a page whose text follows its input, without a request. Typing writes the signal
# `name`. That makes the effect of `data-text` due, which writes the text of the <p>. (The page
# loads Datastar's own client, or this file's if that cannot be reached.)
#
#     async def page(c: Context, w: Writer) -> None:
#         field = h.Input(data.bind("name"), {"placeholder": "Your name"})
#         w.html(h.Html(h.Head(datastar_script()), h.Body(field, h.P(data.text("$name")))))
#
#     app = Stario()
#     app.get("/", page)
#     # GET / -> <!doctype html><html><head><script type="module">


_LEFT_OUT = '''
class _LeftOut:
    """Stands for a name that was left out of this copy."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, *arguments: object, **options: object) -> Any:
        raise StarioError(f"{self._name} was left out of this copy")

    __call__ = __getattr__

    def __instancecheck__(self, value: object) -> bool:
        return False


'''


def _without(leaving: set[str]) -> str:
    """The text of this file without these parts. Only parts with a [name] in the title can go.

    SystemExit if another such part, or importing the copy, needs one of them. In the other parts, a
    name that is gone raises StarioError when it is called.
    """
    from symtable import symtable

    text = inspect.getsource(sys.modules[__name__])
    parts = re.split(r"^(?=# ={90,}\n# (?:ACT )?\d+\. )", text, flags=re.MULTILINE)
    titles = [re.match(r".*\n# .*\[(\w+)\]\n", part) for part in parts]
    named = {title[1]: part for title, part in zip(titles, parts, strict=True) if title}
    if unknown := leaving - named.keys():
        wrong = ",".join(sorted(unknown))
        raise SystemExit(f"--without {wrong}: what can go is {', '.join(named)}")
    left = {name: named.pop(name) for name in sorted(leaving)}
    gone: dict[str, str] = {}  # names, and the parts that define them
    for name, part in left.items():
        symbols = symtable(part, "", "exec").get_symbols()
        assigned = {symbol.get_name() for symbol in symbols if symbol.is_assigned()}
        gone |= dict.fromkeys(assigned & globals().keys(), name)  # (not a comprehension's names)
    for name, part in named.items():  # those that stay
        for node in ast.walk(ast.parse(part)):
            if isinstance(node, ast.Name) and node.id in gone:
                raise SystemExit(f"--without {gone[node.id]}: {name} needs {node.id}")
    kept = [part for part in parts if part not in left.values()]
    stubs = [f'{name} = _LeftOut("{name}")\n' for name in gone]
    copy = "".join([*kept[:3], _LEFT_OUT.lstrip(), *stubs, "\n\n", *kept[3:]])  # after part 2
    copy = re.sub(r"\nMAP\n.*?\nREADING PATH\n.*?\n\n(?=\S)", "", copy, count=1, flags=re.DOTALL)
    module = sys.modules["stario_copy"] = types.ModuleType("stario_copy")
    try:
        exec(compile(copy, "stario_copy", "exec"), module.__dict__)
    except StarioError as exc:
        raise SystemExit(f"--without: {exc}, but importing the rest needs it") from None
    return copy


__all__ = [
    "DATASTAR_URL", "POCKET_CLIENT", "Carrier", "ClientDisconnected", "CompressionConfig",
    "Context", "CookieOptions", "Form", "FormFile", "Handler", "Headers", "HttpException",
    "JsonTracer", "Lifespan", "Limits", "Middleware", "Problem", "QueryParams", "RedisRelay",
    "Relay", "Request", "RichTracer", "Router", "SafeString", "Server", "ServerEvent",
    "ServerOptions", "Session", "SignalsError", "Span", "SpanEvent", "Stario", "StarioError",
    "Subscription", "TestClient", "TestResponse", "TestStream", "Tracer", "TrustedProxies",
    "Writer", "asset", "at", "baked", "data", "datastar_script", "h", "js", "read_signals",
    "render", "s", "same_origin",
]  # fmt: skip


async def _main() -> None:
    options = argparse.ArgumentParser(description="Stario in one file: an app to begin with.")
    options.add_argument("--read", action="store_true", help="show this file as a page instead")
    options.add_argument("--without", metavar="PARTS", help="write this file without these parts")
    options.add_argument("--port", type=int, default=8000)
    chosen = options.parse_args()
    if chosen.without is not None:
        print(_without(set(chosen.without.split(","))), end="")
        return
    app = _book_app() if chosen.read else _first_app()
    print(f"Open http://127.0.0.1:{chosen.port}. Ctrl-C ends it.")
    await app.serve(port=chosen.port)


if __name__ == "__main__":
    import argparse

    asyncio.run(_main())
