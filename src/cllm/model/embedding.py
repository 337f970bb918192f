"""The token table, in every kind: (V, D) = core (V, r) · basis (r, D).

The *core* holds a row of r coordinates for each token, the *basis* what they are coordinates of; without
a basis r is D and the core is the table.

- ``dense``: the core is learned, no basis.
- ``reduced``: core and basis are learned, so that gradients and optimizer state have V·r + r·D numbers.
- ``composed``: the core is incidence (V, P) · weight (P, D): a token's row is the sum of its pieces'.
- ``composed+reduced``: the same with a basis.

Scores are (h · basisᵀ) · coreᵀ, so that neither training nor inference ever needs the (V, D) product. A
core that is computed (from pieces, or by snapping to a lattice) is kept until the weights change.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from cllm.core.model_config import EmbeddingConfig
from cllm.model.factors import best_factors, check_finite, piece_vectors
from cllm.model.incidence import Incidence
from cllm.model.operator import fake, operator
from cllm.model.snap import Snap


@operator("add_rows(Tensor rows_nd, Tensor ids_n, SymInt size) -> Tensor")
def add_rows(rows_nd: Tensor, ids_n: Tensor, size: int) -> Tensor:
    """The transpose of a look-up: a (size, D) table of zeros with ``rows_nd`` added at ``ids_n``.

    An operator of its own, because Inductor lowers the sum to atomic additions, whose order changes
    from run to run, and a training step must give the same bits twice. ATen's kernel gives each
    thread a range of rows and adds in order.
    """
    return torch.ops.aten.embedding_dense_backward(rows_nd, ids_n, size, -1, False)


@fake("add_rows")
def _(rows_nd: Tensor, ids_n: Tensor, size: int) -> Tensor:
    return rows_nd.new_empty((size, rows_nd.shape[-1]))


class Embedding(nn.Module):
    """A token table of any kind, as input, as output, or as both."""

    def __init__(self, vocab_size: int, width: int, config: EmbeddingConfig) -> None:
        super().__init__()
        self.width = width
        self.init_std = config.random_std
        self.incidence: Incidence | None = None
        rows, rank = vocab_size, config.rank_of(width)
        if config.is_composed:
            assert config.pieces is not None, "pieces are resolved before the model"
            assert config.nonzeros is not None, "nonzeros are resolved before the model"
            self.incidence = Incidence(vocab_size, config.pieces, config.nonzeros)
            rows = config.pieces
        self.weight = nn.Parameter(torch.empty(rows, rank))
        self.basis: nn.Parameter | None = None
        if config.is_reduced:
            self.basis = nn.Parameter(torch.empty(rank, width))
        self.snap = Snap(config.lattice, config.lattice_step) if config.lattice != "none" else None
        self._kept: tuple[tuple[int, ...], Tensor] | None = None

    @property
    def computes_core(self) -> bool:
        """Whether the core is computed from the weights rather than being one of them."""
        return self.incidence is not None or self.snap is not None

    def start(self, generator: torch.Generator) -> None:
        """Fill the weights so that the table has random entries of standard deviation ``init_std``.

        A basis begins with orthogonal rows of length √(D/r), which leaves the coordinates the scale of a
        dense table's entries, and so the same share of a learning rate.
        """
        std = self.init_std
        if self.incidence is not None:
            std /= math.sqrt(self.incidence.mean_pieces())
        nn.init.normal_(self.weight, std=std, generator=generator)
        if self.basis is not None:
            nn.init.orthogonal_(self.basis, generator=generator)
            self.basis.data.mul_(math.sqrt(self.width / self.basis.shape[0]))
        self.after_step()

    def set_table(self, table_vd: Tensor) -> None:
        """Make the weights those whose product is nearest to a (V, D) table in least squares.

        Raises ``ValueError`` for another shape or for entries that are not finite.
        """
        core, basis = table_vd, None
        size = self.weight.shape[0] if self.incidence is None else self.incidence.tokens
        if tuple(table_vd.shape) != (size, self.width):
            raise ValueError(
                f"the table has shape {tuple(table_vd.shape)}, the embedding ({size}, {self.width})"
            )
        check_finite(table_vd)
        if self.basis is not None:
            core, basis = best_factors(table_vd, self.basis.shape[0])
        with torch.no_grad():
            if basis is not None and self.basis is not None:
                self.basis.copy_(basis)
            if self.incidence is not None:
                core = piece_vectors(self.incidence.matrix(), core)
            self.weight.copy_(core)
        self.after_step()

    def core_of(self, weight: Tensor, basis: Tensor | None) -> Tensor:
        """The core (V, r) of given weights; differentiable in ``weight``, straight through a snap."""
        core = weight if self.incidence is None else self.incidence(weight)
        return core if self.snap is None else self.snap(core, basis)

    def pull(self, core_grad_vr: Tensor) -> Tensor:
        """The weight's gradient from the core's."""
        return core_grad_vr if self.incidence is None else self.incidence.pull(core_grad_vr)

    def core(self) -> Tensor:
        """The core (V, r) of the module's own weights."""
        if not self.computes_core:
            return self.weight
        if torch.is_grad_enabled() and self.weight.requires_grad:
            return self.core_of(self.weight, self.basis)
        now = self._identity()
        if self._kept is None or self._kept[0] != now:
            self._kept = (now, self.core_of(self.weight, self.basis))
        return self._kept[1]

    def after_step(self) -> None:
        """Forget the kept core: the weights have changed, in a way that their views need not show."""
        self._kept = None

    def expand(self, coordinates: Tensor) -> Tensor:
        """Vectors (…, D) of coordinates (…, r)."""
        return coordinates if self.basis is None else coordinates @ self.basis

    def contract(self, h: Tensor) -> Tensor:
        """What the core is multiplied with for scores: (…, D) -> (…, r)."""
        return h if self.basis is None else h @ self.basis.T

    def embed(self, ids: Tensor) -> Tensor:
        """Vectors of ``ids``: (…,) -> (…, D)."""
        return self.expand(functional.embedding(ids, self.core()))

    def logits(self, h_nd: Tensor) -> Tensor:
        """Scores (N, V) of hidden vectors (N, D)."""
        return self.contract(h_nd) @ self.core().T

    def table(self) -> Tensor:
        """The whole (V, D) table, the exact fold of every kind."""
        return self.expand(self.core())

    def _identity(self) -> tuple[int, ...]:
        """What the kept core was computed from."""
        tensors = [t for t in (self.weight, self.basis) if t is not None]
        return tuple(n for t in tensors for n in (t.data_ptr(), t._version, t.element_size()))
