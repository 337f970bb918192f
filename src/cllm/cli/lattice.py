"""``cllm lattice``: reduction, closest and shortest vectors and pictures from files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import numpy as np

app = typer.Typer(
    help="Reduce lattices, find closest and shortest vectors, draw them.", no_args_is_help=True
)

Basis = Annotated[Path, typer.Argument(help="Basis as a .npy matrix; rows are vectors.")]
Out = Annotated[
    Path | None,
    typer.Option(help="Write the vectors here: .npy for an array, .json for everything."),
]

Limit = Annotated[
    float | None,
    typer.Option(
        help='Time limit of deep, bkz and hkz; "finished" in the JSON is false where it was met.'
    ),
]


@app.command("reduce")
def reduce_command(
    file: Basis,
    method: Annotated[str, typer.Option(help="lll, deep, seysen, bkz or hkz.")] = "lll",
    delta: Annotated[float, typer.Option(help="Lovász factor.")] = 0.99,
    block_size: Annotated[int, typer.Option(help="Block size of bkz.")] = 20,
    max_seconds: Limit = None,
    out: Out = None,
) -> None:
    """Reduce a basis and print the basis, the transform and its figures of merit."""
    with _user_errors():
        from dataclasses import asdict

        from cllm import lattice

        _check_out(out)
        B = _load(file)
        result = lattice.reduce(B, method, delta, block_size, max_seconds=max_seconds)
        measures = {
            name: {"before": function(B), "after": function(result.basis)}
            for name, function in (
                ("root_hermite_factor", lattice.root_hermite_factor),
                ("mean_ratio_db", lattice.mean_ratio_db),
                ("profile", lattice.profile),
            )
        }
        _emit({**asdict(result), "measures": measures}, out, result.basis)
        _say_if_stopped(result.finished)


@app.command()
def cvp(
    file: Basis,
    targets: Annotated[Path, typer.Argument(help="Targets as a .npy matrix, one a row.")],
    method: Annotated[
        str, typer.Option(help="rounding, nearest-plane, k-best or exact.")
    ] = "nearest-plane",
    beams: Annotated[int, typer.Option(help="Beams of k-best.")] = 16,
    out: Out = None,
) -> None:
    """Find lattice points close to targets."""
    with _user_errors():
        from dataclasses import asdict

        from cllm import lattice

        _check_out(out)
        result = lattice.closest(_load(file), _load(targets), method, K=beams)
        _emit({"method": method, **asdict(result)}, out, result.points)


@app.command()
def svp(
    file: Basis,
    method: Annotated[str, typer.Option(help="exact or bkz.")] = "exact",
    block_size: Annotated[int, typer.Option(help="Block size of bkz.")] = 30,
    max_seconds: Limit = None,
    out: Out = None,
) -> None:
    """Find a shortest vector, proved (exact) or approximate (bkz)."""
    with _user_errors():
        from dataclasses import asdict

        from cllm import lattice

        _check_out(out)
        result = lattice.shortest(_load(file), method, block_size, max_seconds=max_seconds)
        _emit({"method": method, **asdict(result)}, out, result.vector)
        _say_if_stopped(result.finished)


@app.command()
def plot(
    kind: Annotated[str, typer.Argument(help="profile, plane, ulam or divisors.")],
    source: Annotated[
        str | None,
        typer.Argument(
            help="Basis .npy for profile and plane; 2,3,6 or un=2,do=3,undo=6 for divisors."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Name of the pictures, PNG and SVG.")] = Path("lattice"),
    count: Annotated[int, typer.Option(help="Numbers on the Ulam spiral.")] = 40_000,
) -> None:
    """Draw a profile, a plane lattice, the Ulam spiral or a divisor lattice."""
    with _user_errors():
        from cllm.core.atomic import clear_errors
        from cllm.lattice import FactorCache, plots

        if count < 1:
            raise ValueError(f"--count must be at least 1, got {count}")
        if kind not in ("profile", "plane", "ulam", "divisors"):
            raise ValueError(f"kind must be profile, plane, ulam or divisors, got {kind!r}")
        if kind != "ulam" and source is None:
            raise ValueError(f"a picture of kind {kind} needs a source")
        if kind == "ulam":
            figure = plots.plot_ulam(count)
        elif kind == "divisors":
            pieces = [part.rpartition("=") for part in str(source).split(",")]
            codes = FactorCache(1 << 16).codes([int(number) for _, _, number in pieces])
            figure = plots.plot_divisors(codes, [name or number for name, _, number in pieces])
        else:
            B = _load(Path(str(source)))
            figure = plots.plot_profile(B) if kind == "profile" else plots.plot_plane(B)
        with clear_errors(out):
            written = plots.save(figure, out)
        for path in written:
            typer.echo(path)


@contextmanager
def _user_errors() -> Iterator[None]:
    """What the library refuses is the user's to mend: one line, no traceback."""
    from cllm.core.errors import UserError

    try:
        yield
    except (ValueError, ArithmeticError) as error:
        raise UserError(str(error)) from error


def _say_if_stopped(finished: bool) -> None:
    """A .npy file has no room for it, and who reads JSON may not look."""
    if not finished:
        typer.echo("stopped by --max-seconds before it was done", err=True)


def _check_out(out: Path | None) -> None:
    """Before anything is computed: a slip in the name should not cost the result."""
    if out is not None and out.suffix not in (".npy", ".json"):
        raise ValueError(f"{out}: --out takes a name that ends in .npy or .json")


def _load(path: Path) -> np.ndarray:
    import zipfile

    import numpy as np

    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a .npy file of numbers ({error})") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path}: an archive; expected one array in a .npy file")
    return array


def _emit(result: dict[str, Any], out: Path | None, array: np.ndarray) -> None:
    """JSON to the terminal, or to ``out``; a .npy ``out`` takes the array and leaves the rest."""
    import json

    import numpy as np

    from cllm.core.atomic import clear_errors

    if out is not None and out.suffix == ".npy":
        if array.dtype == object:
            raise ValueError(f"{out}: integers beyond int64 do not fit a .npy file; use .json")
        with clear_errors(out):
            np.save(out, array)
        return
    text = json.dumps(result, default=_plain)
    if out is None:
        typer.echo(text)
    else:
        with clear_errors(out):
            out.write_text(text + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    import numpy as np

    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"{type(value)} has no JSON form")
