"""The bench of training: its peer runs in this machine's faster precision, and its claims are judged
where they were set."""

from __future__ import annotations

import pytest

from cllm.bench import training


@pytest.mark.parametrize(
    ("busy", "low", "quick", "crew", "holds"),
    [
        (None, "bf16", False, 1.4, True),
        (None, "bf16", False, 1.2, False),
        (None, "fp32", False, 1.4, True),
        ("others work", "bf16", False, 1.4, None),
        (None, "bf16", True, 1.4, None),
    ],
)
def test_workers_are_judged_against_the_strongest_peer(
    busy: str | None, low: str, quick: bool, crew: float, holds: bool | None
) -> None:
    strongest, other = training.STRONGEST.format(low=low), "(a) Llama, eager fp32"
    rates = {strongest: [1.0], other: [0.5], training.OURS: [1.2], "crew": [crew]}
    why = training._why(busy, quick)
    claims = training._claims(rates, strongest, [other, strongest], "crew", why)
    found = {claim.name: claim for claim in claims}
    assert found[f"crew ÷ {strongest}"].holds is holds
    assert bool(found[f"crew ÷ {strongest}"].why) is (holds is None)
    assert found[f"{training.OURS} ÷ {other}"].value == 2.4
    assert found[f"{training.OURS} ÷ {other}"].holds is None


def test_without_workers_there_is_no_claim_of_them() -> None:
    strongest = training.STRONGEST.format(low="bf16")
    rates = {strongest: [1.0], training.OURS: [1.2]}
    why = training._why(None, False)
    claims = training._claims(rates, strongest, [strongest], "crew", why)
    assert [claim.name for claim in claims] == [f"{training.OURS} ÷ {strongest}"]


@pytest.mark.parametrize(("bf16", "wanted"), [(0.1, "fp32"), (3.0, "bf16")])
def test_the_faster_precision_is_the_peers(
    monkeypatch: pytest.MonkeyPatch, bf16: float, wanted: str
) -> None:
    rates = {"fp32": 1.0, "bf16": bf16}
    monkeypatch.setattr("cllm.training.choose.matmul_rates", lambda threads: rates)
    assert training.faster_precision() == wanted
