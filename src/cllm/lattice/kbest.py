"""K-best decoding: nearest plane with a beam of K partial solutions."""

from __future__ import annotations

import torch

from cllm.lattice.babai import Frame

# Rows a block; with the beam's origin they fill one 64-byte line of float32, which moves as one.
BLOCK = 15
# Targets worked on together, so that K beams of a block stay in the second-level cache.
CHUNK = 1024


def k_best(fr: Frame, targets: torch.Tensor, K: int, children: int) -> torch.Tensor:
    """Beam search over the nearest-plane tree: coefficients (m, n).

    The M-algorithm of sequential decoding (Anderson & Mohan, IEEE Trans. Communications 32, 1984),
    known as K-best in sphere decoding (Guo & Nilsson, IEEE J. Sel. Areas Commun. 24, 2006): at each
    row every beam offers its ``children`` nearest integers in Schnorr–Euchner order, and the K
    partial distances that are smallest survive. Which of two nearly equal partial distances survives
    is decided at a precision reduced by log2(K·children) bits; the distances that are kept are whole.

    A beam can lose Babai's own path: ``closest`` compares the two and returns the better.
    """
    out = torch.empty(len(targets), len(fr.L), dtype=targets.dtype)
    for start in range(0, len(targets), CHUNK):
        part = targets[start : start + CHUNK]
        out[start : start + CHUNK] = _chunk(fr, part, K, children)
    return out


def _chunk(fr: Frame, targets: torch.Tensor, K: int, children: int) -> torch.Tensor:
    m, n = len(targets), len(fr.L)
    # Each row is one beam: coordinates still open, then (from the right) coefficients decided.
    beams = (targets @ fr.Q.T).repeat_interleave(K, dim=0)
    distance = torch.full((m, K), torch.inf, dtype=targets.dtype)
    distance[:, 0] = 0
    first = (torch.arange(m) * K)[:, None]
    slots = torch.arange(K, dtype=targets.dtype).repeat(m)
    for stop in range(n, 0, -BLOCK):
        begin = max(0, stop - BLOCK)
        block = torch.cat([beams[:, begin:stop], slots[:, None]], dim=1)
        weights = _weights(fr, begin, stop)
        for i in range(stop - 1, begin - 1, -1):
            y = (block @ weights[i - begin]).view(m, K)
            x, cost = _expand(fr, y, distance, i, children)
            chosen = _select(cost, K)
            distance = cost.gather(1, chosen)
            parent = (chosen.bitwise_and(K - 1) if K & (K - 1) == 0 else chosen % K).add_(first)
            block = block.index_select(0, parent.view(-1))
            block[:, i - begin] = x.gather(1, chosen).view(-1)
        origin = block[:, -1].long().view(m, K).add_(first)
        beams = beams.index_select(0, origin.view(-1))
        beams[:, begin:stop] = block[:, :-1]
        if begin:
            beams[:, :begin].addmm_(block[:, :-1], fr.L[begin:stop, :begin], alpha=-1)
    return beams[first[:, 0] + distance.argmin(dim=1)]


def _weights(fr: Frame, begin: int, stop: int) -> torch.Tensor:
    """Row j takes a beam's line (open coordinates, decided coefficients, origin) to coordinate j
    less what the decided coefficients of the block contribute to it."""
    width = stop - begin
    weights = fr.L.new_zeros(width, width + 1)
    weights[:, :width] = torch.eye(width, dtype=fr.L.dtype)
    weights[:, :width] -= torch.tril(fr.L[begin:stop, begin:stop], -1).T
    return weights


def _expand(
    fr: Frame, y: torch.Tensor, distance: torch.Tensor, i: int, children: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Children of every beam and their partial squared distances, both (m, children·K)."""
    m, K = y.shape
    r = float(fr.L[i, i])
    y.mul_(1 / r)
    x = y.new_empty(m, children, K)
    cost = y.new_empty(m, children, K)
    near = torch.round(y, out=x[:, 0])
    fr.clamp(near, i)
    off = y.sub_(near)
    side = torch.copysign(torch.ones((), dtype=y.dtype), off)
    if fr.low is not None and fr.high is not None:
        beyond = near + side
        side[(beyond < float(fr.low[i])) | (beyond > float(fr.high[i]))] *= -1
    for c in range(children):
        # Schnorr–Euchner order: to the side of the centre first, then to and fro.
        step = (c + 1) // 2 if c % 2 else -(c // 2)
        if step:
            torch.add(near, side, alpha=step, out=x[:, c])
        torch.sub(off, side, alpha=step, out=cost[:, c])
    cost.mul_(r).square_().add_(distance[:, None])
    if fr.low is not None and fr.high is not None:
        cost.masked_fill_((x < float(fr.low[i])) | (x > float(fr.high[i])), torch.inf)
    return x.view(m, -1), cost.view(m, -1)


def _select(cost: torch.Tensor, K: int) -> torch.Tensor:
    """Indices (m, K) of the K smallest of each row, unordered.

    Non-negative floats order as the integers of the same bits, so that the index can ride in the
    lowest bits of the key and a vectorised integer partition moves both at once.
    """
    count = cost.shape[1]
    mask = (1 << (count - 1).bit_length()) - 1
    integer = torch.int32 if cost.dtype == torch.float32 else torch.int64
    keys = cost.view(integer).bitwise_and(~mask)
    keys.bitwise_or_(torch.arange(count, dtype=integer))
    if count > K:
        keys.numpy().partition(K - 1, axis=1)
    return keys[:, :K].bitwise_and(mask).long()
