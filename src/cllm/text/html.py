"""HTML to text, by Beautiful Soup: what a reader sees, with paragraphs on lines of their own."""

from __future__ import annotations

import re

from cllm.core.errors import require

_UNSEEN = ["script", "style", "noscript", "template", "head", "svg"]
_BLOCKS = re.compile(
    "address|article|aside|blockquote|details|div|dl|figcaption|figure|footer|form|h[1-6]|header|hr|"
    "main|nav|ol|p|pre|section|table|ul"
)
_LINES = ["br", "dd", "dt", "li", "tr"]


def html_text(html: str, name: str) -> str:
    """The text of a page. Scripts and styles are dropped, spaces run together as in a browser except
    in ``<pre>``. Raises ``UserError`` if beautifulsoup4 is not installed."""
    bs4 = require("bs4", "html", f"reading {name}")
    soup = bs4.BeautifulSoup(html, "html.parser")
    for tag in soup(_UNSEEN):
        tag.decompose()
    kept = list[str]()
    for pre in soup("pre"):
        kept.append(pre.get_text())
        # A private-use character, which the collapsing of spaces below leaves alone, holds the place.
        pre.replace_with(f"\n\n\ue000{len(kept) - 1}\ue000\n\n")
    for string in soup.find_all(string=True):
        if "\ue000" not in string:
            if type(string) is bs4.NavigableString:
                string.replace_with(re.sub(r"\s+", " ", string))
            else:  # comments, doctypes
                string.extract()
    for tag in soup(lambda tag: _BLOCKS.fullmatch(tag.name) is not None):
        tag.insert_before("\n\n")
        tag.insert_after("\n\n")
    for tag in soup(_LINES):
        tag.insert_after("\n")
    text = re.sub(r" *\n *", "\n", soup.get_text())
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r" {2,}", " ", text)).strip()
    text = re.sub("\ue000(\\d+)\ue000", lambda m: kept[int(m[1])].strip("\n"), text)
    return f"{text}\n" if text else ""
