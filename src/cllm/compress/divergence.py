"""How far one model's predictions are from another's: KL(full ‖ changed) of the next token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from cllm.model.transformer import Transformer

TOKENS = 1024
"""Tokens worked on at once, in whole windows."""


def batch_windows(context: int) -> int:
    """Windows worked on at once."""
    return max(1, TOKENS // context)


class Judge:
    """The divergence of ``model``, with other values of some weights, from ``full`` on windows (W, T)."""

    def __init__(self, full: Transformer, model: Transformer, ids: Tensor) -> None:
        self.full, self.model, self.ids = full.eval(), model.eval(), ids
        with torch.no_grad():
            self._hidden = torch.cat([self.full.hidden(part) for part in self._parts(ids)])

    def each(self, values: Mapping[str, Tensor], windows: int | None = None) -> Tensor:
        """(W,) float64 nats a token of each of the first ``windows`` (all if ``None``), with ``values`` by
        parameter name."""
        found = [
            _divergence(wanted, got).mean(dim=1) for wanted, got in self._pairs(values, windows)
        ]
        return torch.cat(found)

    def divergence(self, values: Mapping[str, Tensor]) -> float:
        """Mean over the windows."""
        return float(self.each(values).mean())

    def with_loss(self, values: Mapping[str, Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        """(W,) float64 each: the divergence, and the rise of the loss on ``targets`` (W, T), nats a token;
        targets below 0 do not count."""
        divergences, rises, begin = [], [], 0
        for wanted, got in self._pairs(values, None):
            wants = targets[begin : begin + len(wanted)]
            begin += len(wanted)
            counts = (wants >= 0).double()
            rise = (wanted - got).gather(2, wants.clamp_min(0)[..., None])[..., 0].double()
            total = counts.sum(dim=1).clamp_min(1)
            rises.append((rise * counts).sum(dim=1) / total)
            divergences.append((_divergence(wanted, got) * counts).sum(dim=1) / total)
        return torch.cat(divergences), torch.cat(rises)

    def _parts(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.split(batch_windows(self.ids.shape[1]))

    def _pairs(
        self, values: Mapping[str, Tensor], windows: int | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Logarithms of what the two predict (windows, T, V), part by part."""
        table = self.full.output
        with torch.no_grad():
            parts = self._parts(self.ids[:windows]), self._parts(self._hidden[:windows])
            for ids, hidden in zip(*parts, strict=True):
                flat = table.logits(hidden.flatten(0, 1)).view(*ids.shape, -1)
                got = functional_call(self.model, dict(values), (ids,))
                yield functional.log_softmax(flat, dim=-1), functional.log_softmax(got, dim=-1)


def _divergence(wanted: Tensor, got: Tensor) -> Tensor:
    """(windows, T) float64 KL of logarithms (windows, T, V)."""
    nats = functional.kl_div(got, wanted, reduction="none", log_target=True)
    return nats.sum(dim=-1).double()
