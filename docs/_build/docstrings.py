"""For mkdocstrings: docstrings as they are written in the source, as Markdown.

In the source a name and what is said of it is a line, continued by further ones; here that becomes an item of a list.
A colon that announces a block of code is doubled there, and single here.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe

NAMED = re.compile(r"^( *)([A-Za-z_][\w, ]*): (\S.*)$")
HEADING = re.compile(r"^[A-Z][\w ]*:$")  # Args:, Raises:, Example:, Common to all:


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is rendered."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(inspect.cleandoc(obj.docstring.value))


def as_markdown(text: str) -> str:
    """The docstring's lines as Markdown."""
    return "\n\n".join(_paragraph(paragraph) for paragraph in text.split("\n\n"))


def _paragraph(paragraph: str) -> str:
    lines = paragraph.split("\n")
    if lines[0].startswith("    ") or ">>>" in paragraph:  # a block of code, or an example
        code = inspect.cleandoc(paragraph.removeprefix("Example:\n"))
        head = "Example:\n\n" if lines[0] == "Example:" else ""
        return f"{head}```python\n{code}\n```"
    head = []
    if HEADING.match(lines[0]):
        head = [f"**{lines[0]}**", ""]
        lines = inspect.cleandoc("\n".join(lines[1:])).split("\n")
    if NAMED.match(lines[0]) and not lines[0].startswith((" ", "Source:")) and len(lines) + len(head) > 1:
        lines = [_item(line) for line in lines]
    return "\n".join([*head, *lines]).replace("``", "`").replace("::", ":")


def _item(line: str) -> str:
    if found := NAMED.match(line):
        indent, name, rest = found.groups()
        if not indent:
            names = ", ".join(f"`{part.strip()}`" for part in name.split(",")) if name[0].islower() else f"*{name}*"
            return f"- {names}: {rest}"
    return f"  {line.strip()}"
