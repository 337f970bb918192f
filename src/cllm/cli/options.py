"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[
    Path | None, typer.Option(metavar="FILE.toml", help="Settings from a TOML file.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="One setting; may be repeated. See `cllm config show`.",
    ),
]
Preset = Annotated[
    str | None, typer.Option(help="Size of the model: nano, tiny, mini, small or base.")
]
