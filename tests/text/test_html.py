"""HTML becomes what a reader sees."""

from __future__ import annotations

import sys

import pytest

from cllm.core.errors import UserError
from cllm.text.html import html_text

PAGE = """<!doctype html><html><head><title>T</title><style>p {}</style></head><body>
<!-- hidden --><script>var x = "<p>no</p>";</script>
<h1>Head &amp; line</h1><p>One <b>bold</b>
   word.</p><p>Two<br>lines</p>
<ul><li>a</li><li>b <i>c</i></li></ul>
<pre>def f():
    return  1

</pre>after</body></html>"""


def test_page() -> None:
    assert html_text(PAGE, "page.html") == (
        "Head & line\n\nOne bold word.\n\nTwo\nlines\n\na\nb c\n\n"
        "def f():\n    return  1\n\nafter\n"
    )


def test_a_page_without_text() -> None:
    assert html_text("<p> <script>x</script></p>", "page.html") == ""


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bs4", None)
    with pytest.raises(UserError, match=r"page\.html needs .*pip install 'cllm\[html\]'"):
        html_text("<p>a</p>", "page.html")
