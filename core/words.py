"""Texts of others where people read them: names of files and labels, what a record, a recipe or a page says.

`printable` is for terminals and messages; `markdown`, `markdown_code` and `markdown_link` are for model cards. HTML
pages escape by themselves (jinja's autoescape), and JSON does so too.
"""

from __future__ import annotations

import re

__all__ = ["ADDRESS", "markdown", "markdown_code", "markdown_link", "one_line", "printable"]

# Control characters but new line and tab; marks that turn the direction of writing; separators; halves of characters.
HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
ADDRESS = re.compile(r"https?://[^\s<>()\[\]\"'`\\|]+")


def printable(text: object) -> str:
    """`text` with what a terminal would obey, or nobody would see, written out as `\\x1b`, `\\u202e` and so on."""
    return HIDDEN.sub(_written_out, str(text))


def _written_out(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def one_line(text: object) -> str:
    """`printable` text with every run of white space as one space."""
    return " ".join(printable(text).split())


def markdown(text: object) -> str:
    """`text` as words of one Markdown line: no HTML, links, pictures, emphasis, cells of tables or headings."""
    plain = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # An underscore inside of a word is none of Markdown's signs.
    return re.sub(r"[\\`*\[\]|~!]|^[#+-]+(?=\s|$)|^[=-]+$|(?<!\w)_|_(?!\w)", r"\\\g<0>", plain)


def markdown_code(text: object) -> str:
    """`text` as a code span on one Markdown line."""
    return f"`{one_line(text).replace('`', chr(39)).replace('|', '/')}`"


def markdown_link(address: object, words: str) -> str:
    """A link of `words` to `address` where that is a page (http, https); else the address as words."""
    found = ADDRESS.fullmatch(str(address))
    return f"[{words}]({address})" if found else markdown(address)
