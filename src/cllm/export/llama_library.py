"""What all callers of the package ``llama-cpp-python`` need. Nothing here needs torch."""

from __future__ import annotations

from functools import cache
from typing import Any

F32 = 0
"""``GGML_TYPE_F32``: the cache holds float16 if nothing is said."""


@cache
def hush(llama_cpp: Any) -> Any:
    """Have llama.cpp log nothing: it rounds the context up to 256 and then warns that it is too long.

    Cached, so that the callback lives as long as llama.cpp may call it.
    """

    def ignore(level: int, text: bytes, data: Any) -> None:
        pass

    callback = llama_cpp.llama_log_callback(ignore)
    llama_cpp.llama_log_set(callback, None)
    return callback
