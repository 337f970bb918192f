"""The next token by the index in place of the whole output head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cllm.core.errors import UsageError, UserError
from cllm.infer.lookup.index import PLAIN_BELOW, TokenIndex
from cllm.infer.sampling import Sampling, choose_token
from cllm.model.transformer import Transformer


@dataclass(frozen=True)
class IndexHead:
    """Chooses among the tokens of highest logit that ``index``, of the model's output table, finds.

    Greedy decoding asks for one token, top-k for k of them. With ``exact`` these are the tokens that the
    whole head would leave, so greedy text is the same (but for ties and rounding) and drawn text has the
    same distribution; a seed draws other text than the whole head's. Without it a token may be missed.
    """

    index: TokenIndex
    exact: bool = False

    def choose(self, hidden_d: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
        """A token for one hidden vector (D,).

        Raises ``UsageError`` for sampling that needs the logits of all tokens (temperature above 0 without
        top-k) and ``UserError`` for a vector that is not finite or does not fit the index.
        """
        if sampling.temperature > 0 and sampling.top_k == 0:
            raise UsageError("an index as output head needs top_k of at least 1, or temperature 0")
        k = 1 if sampling.temperature == 0 else min(sampling.top_k, self.index.shape[0])
        try:
            found = self.index.query(hidden_d[None], k, "ip", exact=self.exact)
        except ValueError as error:
            raise UserError(f"the output head's index cannot be asked: {error}") from error
        chosen = choose_token(torch.from_numpy(found.scores[0]), sampling, generator)
        return int(found.ids[0, chosen])


def index_head(
    model: Transformer,
    say: Callable[[str], None] = lambda line: None,
    known: int | None = None,
) -> IndexHead:
    """An exact head over the model's output table, of which the tokenizer has the first ``known`` rows
    (none: all); ``say`` is told in a line what its queries do. Raises ``UserError`` for a table that is not
    finite."""
    try:
        index = TokenIndex.build(model.output.table().detach()[:known].float())
    except ValueError as error:
        raise UserError(f"no index of the output table: {error}") from error
    tokens = f"{index.shape[0]:,} tokens"
    if index.cells:
        say(f"output head: an exact index of {tokens} in {index.cells:,} cells")
    else:
        say(f"output head: a plain scan of {tokens}; cells from {PLAIN_BELOW:,} on")
    return IndexHead(index, exact=True)
