"""``cllm bench compress``: what compressed models cost in bits per byte, at real bytes, over several runs.

A measured case is kept in the user's cache by the run's weights and the settings, so that a bench that was
cut short (``--minutes``) goes on where it was.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from cllm.bench import compress_cases as known
from cllm.bench.compress_cases import Case, cases
from cllm.bench.compress_kept import Figures, Kept
from cllm.bench.compress_peers import PEERS
from cllm.bench.compress_plots import certificate_claim, draw, errors_claim, points_of
from cllm.bench.compress_times import NOTE, reading_claims, reading_rates, time_claims
from cllm.bench.harness import Claim, Options, Result, load_now
from cllm.bench.reference import QUICK, reference_run
from cllm.core.cpu import is_busy
from cllm.core.errors import UserError
from cllm.core.settings import build
from cllm.store.run import RunDirectory, is_run

TAKES = frozenset({"data", "minutes"})
SEEDS = (1, 2, 3)
QUICK_RECOVERY = 4
"""Steps of recovery in a quick bench."""
PEER_BITS = (2, 3, 4, 8)


def run(options: Options) -> Result:
    """Compress every run in every way. ``--data``: runs, or text that three reference runs are trained on
    (the built-in corpus if left out)."""
    load, busy = load_now(), is_busy()
    until = float("inf") if options.minutes is None else time.monotonic() + 60 * options.minutes
    rates = reading_rates(quick=options.quick) if time.monotonic() < until else {}
    runs = _runs(options)
    wanted = cases(options.quick)
    measured: list[dict[Case, Figures]] = [{} for _ in runs]
    changes = {"tokens": 512, "recover": QUICK_RECOVERY} if options.quick else {}
    peers: list[dict[Case, Figures]] = [{} for _ in runs]
    said: set[str] = set()
    keeps = [Kept(place.path, changes, until) for place in runs]
    # Case after case over all runs, so that claims are judged as early as can be.
    for case in wanted:
        for kept, found in zip(keeps, measured, strict=True):
            _measure(kept, case, found)
    if not options.quick:
        for kept, others in zip(keeps, peers, strict=True):
            said |= _measure_peers(kept, others)
    times = time_claims(keeps, options.quick)
    rivals = list(dict.fromkeys(case for found in peers for case in found))
    by_size = {
        size: [
            row
            for listed, found in ((wanted, measured), (rivals, peers))
            for case in listed
            if (row := _row(size, case, _of_size(size, keeps, found))) is not None
        ]
        for size in dict.fromkeys(kept.parameters for kept in keeps)
    }
    rows = [row for some in by_size.values() for row in some]
    points = [point for found in measured for point in points_of(found)]
    missing = [case for case in wanted if all(case not in found for found in measured)]
    notes = [
        f"{len(runs)} runs; means over those of a size that a method was measured on, and the standard "
        "error of the rise. Rises are of the bits per byte of validation text over the run as trained. "
        "Claims are over all runs, and the picture of bits is of the first run's size. Bits a weight are "
        "those of the linear layers, scales, offsets and all else of theirs counted; entropy-coded layers "
        "get the bytes that GPTQ's grid takes, and tables are fp16 throughout.",
        "GPTQ: act-order, scales of least error under H of those searched, damping by held-out error, "
        "sequential calibration; all methods share these. Errors cost what they do to a layer's outputs; "
        "with k-best, what they do to the model's predictions (--metric auto). GPTQ under that metric "
        "and k-best without it have rows of their own.",
    ]
    notes.append(NOTE if rates else "How fast weights are read was not measured for want of time.")
    notes += sorted(said)
    if missing:
        names = ", ".join(f"{case.method} at {case.bits:g}" for case in missing)
        notes.append(f"Not measured for want of time: {names}.")
    return Result(
        bench="compress",
        rows=rows,
        claims=[
            *_claims(measured, options.quick),
            certificate_claim(points, options.quick),
            errors_claim(measured, options.quick),
            *reading_claims(rates, "quick: too small to judge" if options.quick else busy or ""),
            *times,
        ],
        notes=notes,
        packages=("torch", "numpy", "constriction", "hqq", "torchao", "llama_cpp_python"),
        load_before=load,
        busy=busy or "",
        plots={} if options.quick else draw(by_size[keeps[0].parameters], points),
    )


def _runs(options: Options) -> list[RunDirectory]:
    given = [Path(path) for path in options.data]
    if given and all(is_run(path) for path in given):
        return [RunDirectory.open(path) for path in given]
    found = []
    for seed in SEEDS[:1] if options.quick else SEEDS:
        changes: dict[str, Any] = {
            "data.paths": options.data,
            "log.tensorboard": False,
            "train.seed": seed,
        }
        if options.quick:
            changes |= QUICK
        found.append(reference_run(build(changes)))
    return found


def _measure(kept: Kept, case: Case, found: dict[Case, Figures]) -> None:
    """Fill in what is kept, or what there is time to measure."""
    grid = found.get(Case(method=known.GPTQ, bits=case.bits))
    if case.coded and case.bits == int(case.bits) and grid is None and case.bits < 4:
        return
    figures = kept.figures(case.settings(None if grid is None else grid["bits"]))
    if figures is not None:
        found[case] = figures


def _measure_peers(kept: Kept, found: dict[Case, Figures]) -> set[str]:
    """Fill in what others make of the layers; returns what to say about them."""
    notes = set()
    for name, one in PEERS.items():
        for bits in PEER_BITS:
            try:
                figures = kept.peer(name, bits, one)
            except ImportError as error:
                notes.add(f"{name} was not measured: {error}.")
                break
            except (UserError, RuntimeError) as error:
                notes.add(f"{name} was not measured at {bits} bits: {error}.")
                continue
            if figures is not None:
                found[Case(method=name, bits=float(bits))] = figures
                if figures["note"]:
                    notes.add(f"{figures['note']}.")
    return notes


def _of_size(
    size: int, keeps: list[Kept], measured: list[dict[Case, Figures]]
) -> list[dict[Case, Figures]]:
    """What was measured of the runs of ``size`` parameters."""
    pairs = zip(keeps, measured, strict=True)
    return [found for kept, found in pairs if kept.parameters == size]


def _row(size: int, case: Case, measured: list[dict[Case, Figures]]) -> dict[str, Any] | None:
    found = [figures[case] for figures in measured if case in figures]
    if not found:
        return None
    rises = [f["bpb"] - f["base"] for f in found]
    sizes = [f["bytes"] for f in found]
    return {
        "parameters": size,
        "method": case.method,
        "nominal bits": case.bits,
        "bits a weight": round(mean(f["bits"] for f in found), 3),
        "file, bytes": None if sizes[0] is None else round(mean(sizes)),
        "layer error": round(mean(f["error"] for f in found), 5),
        "bits per byte": round(mean(f["bpb"] for f in found), 4),
        "rise": round(mean(rises), 5),
        "± error": round(_error(rises), 5) if len(rises) > 1 else None,
        "runs": len(found),
    }


def _error(values: list[float]) -> float:
    return float(stdev(values) / len(values) ** 0.5)


def _claims(measured: list[dict[Case, Figures]], quick: bool) -> list[Claim]:
    def claim(
        name: str, ours: str, theirs: str, bits: float, required: float, aim: float | None
    ) -> Claim:
        return _ratio(measured, quick, name, (ours, theirs), bits, (required, aim))

    whole = "rise of k-best over GPTQ's in the same grid"
    return [
        claim(f"{whole}, 2 bits", known.OURS, known.GPTQ, 2.0, 0.85, 0.7),
        claim(f"{whole}, 3 bits", known.OURS, known.GPTQ, 3.0, 0.9, 0.8),
        claim(
            "rise of entropy-coded k-best over fixed-grid GPTQ's at the same bytes, 2 bits",
            known.CODED_OURS,
            known.GPTQ,
            2.0,
            0.4,
            0.3,
        ),
        claim(
            "rise of entropy-coded k-best over entropy-coded GPTQ's at the same bytes, 2 bits",
            known.CODED_OURS,
            known.CODED_GPTQ,
            2.0,
            0.88,
            0.7,
        ),
        claim(
            "rise of entropy-coded k-best over entropy-coded GPTQ's at the same bytes, 3 bits",
            known.CODED_OURS,
            known.CODED_GPTQ,
            3.0,
            0.88,
            0.7,
        ),
        *(
            claim(
                f"rise of {name} over recovered GPTQ's, the same {known.RECOVERY} steps, 2 bits",
                name,
                known.RECOVERED_GPTQ,
                2.0,
                0.7,
                None,
            )
            for name in (known.RECOVERED_CODED, known.RECOVERED_OURS)
        ),
        *(_small(measured, quick, method) for method in (known.OURS, known.CODED_OURS)),
    ]


def _ratio(
    measured: list[dict[Case, Figures]],
    quick: bool,
    name: str,
    methods: tuple[str, str],
    bits: float,
    bounds: tuple[float, float | None],
) -> Claim:
    """The mean rise of one method over that of another, of the runs that have both."""
    ours, theirs = (Case(method=method, bits=bits) for method in methods)
    both = [(f[ours], f[theirs]) for f in measured if ours in f and theirs in f]
    why, value = "", None
    if both:
        rises = [[f["bpb"] - f["base"] for f in pair] for pair in both]
        below = mean(rise[1] for rise in rises)
        value = mean(rise[0] for rise in rises) / below if below > 0 else None
        each = [rise[0] / rise[1] for rise in rises if rise[1] > 0]
        spread = f" ± {_error(each):.3f}" if len(each) > 1 else ""
        name += f" ({len(both)} runs{spread})"
    if quick:
        why = "quick: too small to judge"
    elif len(both) < len(SEEDS):
        why = f"{len(both)} runs of at least {len(SEEDS)}"
    return Claim(
        name=name,
        value=value,
        required=bounds[0],
        aim=bounds[1],
        higher_is_better=False,
        why=why,
        judged=not why,
    )


def _small(measured: list[dict[Case, Figures]], quick: bool, method: str) -> Claim:
    case = Case(method=method, bits=4.0)
    rises = [f[case]["bpb"] / f[case]["base"] - 1 for f in measured if case in f]
    why = "quick: too small to judge" if quick else "" if rises else "not measured"
    return Claim(
        name=f"rise of {method} at 4 bits, share of full precision's, the worst run",
        value=max(rises) if rises else None,
        required=0.005,
        higher_is_better=False,
        why=why,
        judged=not why,
    )
