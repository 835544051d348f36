"""How the commands explain themselves: their module's docstring, in lines as long as the terminal's."""

from __future__ import annotations

import argparse
import re
import textwrap


class Paragraphs(argparse.HelpFormatter):
    """Fills the paragraphs of a description; what is indented, such as commands to copy, stays as it is.

    >>> print(Paragraphs("x")._fill_text("So:\\n\\n    python x.py\\n\\nThat is the\\nwhole of it.", 20, ""))
    So:
    <BLANKLINE>
        python x.py
    <BLANKLINE>
    That is the whole of
    it.
    """

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(
            textwrap.indent(
                paragraph if re.search(r"^\s", paragraph, re.MULTILINE) else textwrap.fill(paragraph, width), indent
            )
            for paragraph in re.split(r"\n\s*\n", text.strip("\n"))
        )
