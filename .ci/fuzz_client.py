#!/usr/bin/env python3
"""Patch random pages in both clients, and compare what the pages show.

    STARIO_OFFICIAL_CLIENT=/path/to/datastar.js python .ci/fuzz_client.py [--count 300] [--seed 1]

A page gets some random elements. Then come steps: a patch with the same elements a little changed,
a patch of signals, or somebody types, clicks and chooses. After each step both clients must have
the same elements, contents of fields, signals and focus. What the README's table of differences
tells is not generated, but not all of it can be avoided: a finding is a place to look at. It is
made smaller before it is printed. It needs playwright and a Chromium.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from playwright.sync_api import Browser, Page, Route, sync_playwright

from stario import POCKET_CLIENT, SafeString, at, data, h, render

HOST = "http://fuzz.test/"
IDS = [f"id{n}" for n in range(6)]
# The signals of the fields that are bound: texts, numbers, flags, and a choice.
BOUND = {"text": ("s0", "s1"), "number": ("n0", "n1"), "checkbox": ("b0", "b1"), "radio": ("r0",)}
SIGNALS = {
    "v0": 1, "v1": "x", "v2": 0, "s0": "x", "s1": "", "n0": 1, "n1": 0, "b0": True, "b1": False,
    "r0": "x",
}  # fmt: skip
CHANGES: dict[str, list[object]] = {
    "v0": [0, 1, "x"],
    "v1": ["", "y"],
    "s0": ["x", "z"],
    "b0": [True, False],
    "n0": [1, 2],
}

# The page answers its own requests with `window.answer`, so no server is needed.
HEAD = """<script>
window.fetch = async () =>
  new Response(window.answer, { headers: { 'content-type': 'text/event-stream' } });
const shown = (node) => node.nodeType === 3 ? node.data : node.nodeType !== 1 ? '' : [
  node.localName,
  [...node.attributes].map(({ name, value }) => `${name}=${value}`).sort()
    .filter((each) => each !== 'style=' && each !== 'class='),
  ['value', 'checked', 'selected', 'selectedIndex', 'open'].filter((name) => name in node
    && !/^(li|button)$/.test(node.localName)).map((name) => `${name}: ${node[name]}`),
  [...node.childNodes].map(shown).filter((each) => each !== '')];
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const acts = {
  type(el, text) {
    el.focus();
    el.value = text;
    for (const name of ['input', 'change']) el.dispatchEvent(new Event(name, { bubbles: true }));
  },
  pick(el) {
    el.selectedIndex = el.options.length - 1;
    el.dispatchEvent(new Event('change', { bubbles: true }));
  },
  click: (el) => el.click(),
  open: (el) => { el.open = !el.open },
  leave: () => document.activeElement.blur(),
};
async function take(steps) {
  const seen = [];
  for (const [kind, content] of steps) {
    if (kind === 'patch') {
      window.count = (window.count ?? 0) + 1;
      window.answer = content + 'event: datastar-patch-elements\\n'
        + `data: elements <i id="done">${window.count}</i>\\n\\n`;
      document.getElementById('go').click();
      while (document.getElementById('done').textContent !== `${window.count}`) await wait(1);
    } else {
      for (const [id, act, text] of content) {
        const el = document.getElementById(id);
        if (el) acts[act](el, text);
      }
    }
    await wait(5);
    await new Promise(requestAnimationFrame);
    await wait(2);
    seen.push({
      elements: shown(document.getElementById('root')),
      signals: JSON.parse(document.getElementById('signals').textContent || '{}'),
      focus: document.activeElement?.id,
    });
  }
  return seen;
}
</script><script type="module" src="/client.js"></script>"""
PAGE = str(
    h.Html(
        h.Head(h.Title("Fuzz"), SafeString(HEAD)),
        h.Body(
            h.Button({"id": "go"}, data.on("click", at.get("/"))),
            h.Div({"id": "root"}),
            h.I({"id": "done"}),
            h.Pre({"id": "signals"}, data.json_signals()),
        ),
    )
)

# -- Random elements


@dataclass
class Node:
    """An element. `fixed`: its content and attributes are left as they are."""

    name: str
    attributes: dict[str, object] = field(default_factory=dict)
    children: list[Node | str] = field(default_factory=list)
    fixed: bool = False

    def html(self) -> SafeString:
        """The element as HTML."""
        parts = [part if isinstance(part, str) else part.html() for part in self.children]
        return h.tag(self.name)(self.attributes, *parts)

    def all(self) -> Iterator[Node]:
        """This element, and all that are in it."""
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.all()


def datastar(r: random.Random, name: str) -> dict[str, object]:
    """An attribute that shows a signal, or sets one."""
    signal = r.choice(("v0", "v1", "v2"))
    choices: list[dict[str, object]] = [
        data.show(f"${signal} == 1"),
        data.class_({"on": f"${signal} == 1", "off": f"!${signal}"}),
        data.attr({"lang": f"${signal}"}),
        data.style({"color": f"${signal} == 1 ? 'red' : 'blue'"}),
        data.signals({signal: r.choice((0, 1, "x"))}, ifmissing=True),
        data.preserve_attr(r.choice(("class", "title", "open"))),
    ]
    if name == "button":
        choices = [data.on("click", f"${signal} = {r.choice((0, 1))}")]
    return r.choice(choices)


def attributes(r: random.Random, name: str, ids: list[str]) -> dict[str, object]:
    """Some attributes; an id is taken out of `ids`."""
    found: dict[str, object] = {}
    if ids and r.random() < 0.5:
        found["id"] = ids.pop()
    if r.random() < 0.2:
        found["class"] = r.choice(("a", "b", "a b"))
    if r.random() < 0.15:
        found["title"] = r.choice(("t", "u"))
    if r.random() < 0.35:
        found |= datastar(r, name)
    return found


def form_field(r: random.Random, found: dict[str, object]) -> Node:
    """An input, with a binding or without."""
    kind = r.choice(tuple(BOUND))
    found["type"] = kind
    if kind in ("checkbox", "radio"):
        found["checked"] = r.random() < 0.3
    elif r.random() < 0.4:
        found["value"] = r.choice(("0", "1"))
    if r.random() < 0.4:
        found |= data.bind(r.choice(BOUND[kind]))
    if kind == "radio":  # each has a name, or the binding gives it one
        found |= {"name": found.get("data-bind", "own"), "value": r.choice("xyz")}
    return Node("input", found)


def element(r: random.Random, ids: list[str], depth: int = 0) -> Node:
    """A random element with what is in it."""
    inner = ("div", "ul", "details", "table", "select", "textarea", "input", "span", "button")
    name = r.choice(inner if depth < 3 else inner[-3:])
    found = attributes(r, name, ids)
    if name in ("div", "details"):
        return Node(name, found, [element(r, ids, depth + 1) for _ in range(r.randint(0, 3))])
    if name == "input":
        return form_field(r, found)
    if name == "select":
        is_bound = r.random() < 0.4  # what options a bound one has: see the README's table
        found |= data.bind(r.choice(BOUND["text"])) if is_bound else {}
        values = r.sample(["", "x", "z"], 3)
        options = [Node("option", {"value": value}, [value]) for value in values]
        return Node(name, found, [*options], fixed=is_bound)
    if name == "ul":
        rows = [Node("li", attributes(r, "li", ids), [text]) for text in r.sample("123", 3)]
        return Node(name, found, [*rows])
    if name == "table":
        cell = Node("td", attributes(r, "td", ids), [r.choice("cd")])
        return Node(
            name, found, [Node("tbody", {}, [Node("tr", attributes(r, "tr", ids), [cell])])]
        )
    text = r.choice(("x", "y", "z"))
    if name == "span" and r.random() < 0.3:
        return Node(name, found | data.text("$v1"), fixed=True)
    return Node(name, found, [text])


def changed(r: random.Random, nodes: list[Node]) -> list[Node]:
    """The same elements with a few changes."""
    nodes = copy.deepcopy(nodes)
    for _ in range(r.randint(1, 4)):
        choices = [node for top in nodes for node in top.all() if not node.fixed]
        if choices:
            change(r, r.choice(choices), nodes)
    if r.random() < 0.2:
        r.shuffle(nodes)
    return nodes


def change(r: random.Random, node: Node, nodes: list[Node]) -> None:
    """Change one element."""
    used = {each.attributes.get("id") for top in nodes for each in top.all()}
    ids = [name for name in IDS if name not in used]
    what = r.choice(("drop", "shuffle", "insert", "text", "attributes", "attributes"))
    if what == "drop" and node.children and node.name != "select":
        node.children.pop(r.randrange(len(node.children)))
    elif what == "shuffle":
        r.shuffle(node.children)
    elif what == "insert" and node.name in ("div", "details"):
        node.children.insert(r.randint(0, len(node.children)), element(r, ids, 2))
    elif what == "text" and node.children and isinstance(node.children[0], str):
        node.children[0] = r.choice("pqr")
    elif what == "attributes" and node.name not in ("option", "input"):
        kept = {name: node.attributes[name] for name in ("id",) if name in node.attributes}
        node.attributes = attributes(r, node.name, [] if kept else ids) | kept


# -- Steps. Each is a pair: "patch" and elements, "signals" and signals, "user" and what is done.

Step = tuple[str, Any]


def handled(r: random.Random, nodes: list[Node]) -> list[list[str]]:
    """What somebody does with the elements that have ids."""
    acts: list[list[str]] = []
    for node in (each for top in nodes for each in top.all()):
        name, kind = node.attributes.get("id"), node.attributes.get("type")
        if not name or r.random() < 0.5:
            continue
        if kind in ("checkbox", "radio") or node.name == "button":
            acts.append([str(name), "click", ""])
        elif node.name in ("input", "textarea"):
            acts.append([str(name), "type", "5"])
        elif node.name in ("select", "details"):
            acts.append([str(name), "pick" if node.name == "select" else "open", ""])
    if acts and r.random() < 0.5:
        acts.append([acts[-1][0], "leave", ""])
    return acts


def case(r: random.Random) -> list[Step]:
    """A page, and what happens to it."""
    ids = r.sample(IDS, len(IDS))
    nodes = [element(r, ids) for _ in range(r.randint(1, 3))]
    steps: list[Step] = [("patch", nodes)]
    for _ in range(r.randint(1, 4)):
        kind = r.choice(("patch", "patch", "user", "user", "signals"))
        if kind == "patch":
            nodes = changed(r, nodes)
            steps.append((kind, nodes))
        elif kind == "user":
            steps.append((kind, handled(r, nodes)))
        else:
            names = r.sample(list(CHANGES), 2)
            steps.append((kind, {name: r.choice(CHANGES[name]) for name in names}))
    return steps


def event(kind: str, *lines: str) -> str:
    """A server-sent event."""
    return "\n".join([f"event: datastar-patch-{kind}", *(f"data: {line}" for line in lines), "\n"])


def sent(number: int, kind: str, content: Any) -> list[Any]:
    """A step as the page takes it. The first patch begins with nothing but the signals."""
    if kind == "user":
        return ["user", content]
    if kind == "signals":
        return ["patch", event("signals", "signals " + json.dumps(content))]
    root = h.Div({"id": "root"}, [node.html() for node in content])
    if number:
        return ["patch", event("elements", f"elements {root}")]
    empty = event("elements", 'elements <div id="root"></div>')
    start = event("signals", "signals " + json.dumps(SIGNALS))
    return ["patch", empty + start + event("elements", f"elements {root}")]


# -- Both clients


class Clients:
    """The official client and ours, each with a page of its own."""

    def __init__(self, browser: Browser, official: str) -> None:
        self.pages = [self._page(browser, source) for source in (official, POCKET_CLIENT)]

    def _page(self, browser: Browser, source: str) -> Page:
        def answer(route: Route) -> None:
            if route.request.url.endswith("/client.js"):
                route.fulfill(body=source, content_type="text/javascript")
            else:
                route.fulfill(body=PAGE, content_type="text/html")

        page = browser.new_page()
        page.route("**/*", answer)
        return page

    def difference(self, steps: list[Step]) -> tuple[int, str, list[Any]] | None:
        """The first step after which they differ, in what, and what each has."""
        taken = [sent(number, *step) for number, step in enumerate(steps)]
        seen = []
        for page in self.pages:
            page.goto(HOST)
            page.wait_for_function("document.getElementById('signals').textContent === '{}'")
            seen.append(page.evaluate("take", taken))
        for number, (official, ours) in enumerate(zip(*seen, strict=True)):
            for what in ("elements", "signals", "focus"):
                if official[what] != ours[what]:
                    return number, what, [official[what], ours[what]]
        return None

    def smaller(self, steps: list[Step], what: str) -> list[Step]:
        """As little as possible of a case that still differs in this."""
        for fewer in shorter(steps):
            found = self.difference(fewer)
            if found and found[1] == what:
                return self.smaller(fewer[: found[0] + 1], what)
        return steps


def shorter(steps: list[Step]) -> Iterator[list[Step]]:
    """The same steps without one, or with one element, one attribute or one act less."""
    for number in range(1, len(steps)):
        yield steps[:number] + steps[number + 1 :]
    for number, (kind, content) in enumerate(steps):
        before, after = steps[:number], steps[number + 1 :]
        if kind == "user":
            for act in content:
                yield [*before, (kind, [each for each in content if each is not act]), *after]
        elif kind == "patch":
            for fewer in reduced(content):
                yield [*before, (kind, fewer), *after]


def reduced(nodes: list[Node]) -> Iterator[list[Node]]:
    """The elements without one of them, or without one attribute."""
    top = Node("div", {}, [*nodes])
    for number, node in enumerate(top.all()):
        for child in range(len(node.children)):
            fewer = copy.deepcopy(top)
            list(fewer.all())[number].children.pop(child)
            yield [each for each in fewer.children if isinstance(each, Node)]
        for name in node.attributes:
            if name != "type":
                fewer = copy.deepcopy(top)
                del list(fewer.all())[number].attributes[name]
                yield [each for each in fewer.children if isinstance(each, Node)]


def main() -> int:
    """Try cases; how many differ."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--count", type=int, default=300)
    options.add_argument("--seed", type=int, default=1)
    given = options.parse_args()
    official = Path(os.environ["STARIO_OFFICIAL_CLIENT"]).read_text(encoding="utf-8")
    findings = 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        clients = Clients(browser, official)
        for number in range(given.count):
            steps = case(random.Random(f"{given.seed}/{number}"))
            found = clients.difference(steps)
            if found is None:
                continue
            findings += 1
            print(f"case {number} differs in {found[1]}:")
            steps = clients.smaller(steps[: found[0] + 1], found[1])
            for kind, content in steps:
                is_patch = kind == "patch"
                print(f"    {kind} {render([n.html() for n in content]) if is_patch else content}")
            _, _, (theirs, ours) = clients.difference(steps) or found
            print(f"  official: {json.dumps(theirs)}\n  pocket:   {json.dumps(ours)}", flush=True)
    print(f"{given.count} cases, {findings} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
