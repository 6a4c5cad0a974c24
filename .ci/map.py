"""Bring the line numbers in the docstring of stario.py up to date: `python .ci/map.py`.

The map has a line for each act and part. The reading path names definitions (`Router.dispatch`) in
backticks; where each stands is filled in.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

FILE = Path(__file__).parent.parent / "stario.py"
TITLE = re.compile(r"^# ={90,}\n# ((?:ACT )?\d+\. .*)$", re.MULTILINE)


def fill_in(source: str) -> str:
    """The source with its map and its reading path as they have to be now."""
    entries = [
        f"    {source.count(chr(10), 0, found.start()) + 2:>5}  {found[1]}"
        for found in TITLE.finditer(source)
    ]
    entries = [entry if "ACT" in entry else entry.replace("  ", "    ", 1) for entry in entries]
    before, rest = source.split("\nMAP\n", 1)
    prose, rest = rest.split("\n\n    ", 1)
    _, rest = rest.split("\nREADING PATH\n", 1)
    source = f"{before}\nMAP\n{prose}\n\n" + "\n".join(entries) + f"\n\nREADING PATH\n{rest}"

    spans = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            spans[node.name] = node
            for inner in node.body:
                if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    spans[f"{node.name}.{inner.name}"] = inner
    head, path = source.split("\nREADING PATH\n", 1)
    path, rest = path.split('\n"""\n', 1)

    def line(found: re.Match[str]) -> str:
        node = spans[found[1]]
        first = min([node.lineno, *(mark.lineno for mark in node.decorator_list)])
        return f"    {first:>5}-{node.end_lineno:<5}  `{found[1]}`"

    path = re.sub(r"^ {4} *\d+-\d+ +`([\w.]+)`", line, path, flags=re.MULTILINE)
    return f'{head}\nREADING PATH\n{path}\n"""\n{rest}'


if __name__ == "__main__":
    text = FILE.read_text(encoding="utf-8")
    while (better := fill_in(text)) != text:
        text = better
    FILE.write_text(text, encoding="utf-8")
