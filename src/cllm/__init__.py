"""Crystalline (`cllm`): train, compress and deploy small language models.

    import cllm
    run = cllm.train(data="notes/", time="5m")
    print(run.generate("Once upon a time"))

torch is imported when ``train`` or ``load`` is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Run", "UserError", "__version__", "load", "train"]

if TYPE_CHECKING:
    from cllm.api import Run, load, train
    from cllm.core.errors import UserError


def __getattr__(name: str) -> Any:
    if name == "UserError":
        from cllm.core.errors import UserError

        return UserError
    if name in __all__:
        from cllm.core.threads import spin_briefly

        spin_briefly()  # before torch is loaded
        from cllm import api

        return getattr(api, name)
    raise AttributeError(f"module 'cllm' has no attribute {name!r}")
