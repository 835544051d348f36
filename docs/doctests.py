"""Shows the examples of docstrings as code (mkdocs.yml, `extensions`): Griffe takes them for quotations."""

from __future__ import annotations

import re
from typing import Any

import griffe


def fenced(text: str) -> str:
    """The text with a fence around each example that ends at an empty line.

    >>> fenced("One more.\\n\\n>>> 1 + 1\\n2")
    'One more.\\n\\n```pycon\\n>>> 1 + 1\\n2\\n```'
    """
    return re.sub(r"^( *)>>> .*(?:\n.*\S.*)*", r"\1```pycon\n\g<0>\n\1```", text, flags=re.MULTILINE)


class Doctests(griffe.Extension):
    """Fences the examples of every object."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)
