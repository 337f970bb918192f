"""Coordinates kept on a lattice while they are trained.

The optimizer moves real coordinates; the model sees the lattice points next to them, and the gradient
passes as if it had seen the coordinates themselves (the straight-through estimator; Bengio, Léonard &
Courville 2013). A checkpoint holds what the optimizer moves; ``cllm compress`` stores the points, as
integers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cllm.model.operator import fake, operator


@operator("snap(Tensor core_vr, Tensor? basis_rd, str lattice, float step) -> Tensor")
def snap(core_vr: Tensor, basis_rd: Tensor | None, lattice: str, step: float) -> Tensor:
    """The points of a lattice next to ``core_vr``.

    ``z``: multiples of ``step``. ``e8``: ``step`` times E8, in blocks of eight coordinates. ``reduced``:
    integer multiples of ``step`` again, but chosen by Babai's nearest plane (1986) so that
    (core − point) · basis is short, which rounding each by itself does not do where the basis's rows
    are not orthogonal.

    Of E8 and of a basis's lattice there is no point where coordinates are beyond what their floats resolve:
    all are NaN then, and the training that brought them there sees a loss that is not finite.
    """
    from cllm.lattice import E8, closest  # most models snap nothing, and start sooner without it

    wide = torch.float64 if core_vr.dtype == torch.float64 else torch.float32
    scaled = core_vr.detach().to("cpu", wide) / step
    try:
        if lattice == "z":
            points = scaled.round()
        elif lattice == "e8":
            points = E8().nearest(scaled.reshape(-1, 8)).reshape(scaled.shape)
        else:
            assert basis_rd is not None
            rows = basis_rd.detach().to("cpu", wide)
            points = closest(rows.numpy(), scaled @ rows, "nearest-plane").coefficients.to(wide)
    except ValueError:
        points = torch.full_like(scaled, torch.nan)
    return (points * step).to(core_vr.dtype).to(core_vr.device)


@fake("snap")
def _(core_vr: Tensor, basis_rd: Tensor | None, lattice: str, step: float) -> Tensor:
    return torch.empty_like(core_vr)


class Snap(nn.Module):
    """Snapping as a part of a model; see ``snap``."""

    def __init__(self, lattice: str, step: float) -> None:
        super().__init__()
        self.lattice, self.step = lattice, step

    def forward(self, core_vr: Tensor, basis_rd: Tensor | None) -> Tensor:
        """(V, r) -> (V, r); the gradient passes straight through."""
        point = snap(core_vr, basis_rd, self.lattice, self.step)
        return core_vr + (point - core_vr).detach() if core_vr.requires_grad else point

    @property
    def unit(self) -> float:
        """What all coordinates of points are whole multiples of: ``step``, half of it for ``e8``."""
        return self.step / 2 if self.lattice == "e8" else self.step

    def integers(self, point_vr: Tensor) -> Tensor:
        """Snapped coordinates as int32, in units of ``unit``."""
        return (point_vr / self.unit).round().to(torch.int32)
