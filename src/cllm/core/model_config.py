"""The ``model.*`` settings: shape and parts of the network, and its token tables."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cllm.core.section import Fraction, PositiveInt, Section

LATTICE_STEP = 0.01
_NEEDS_PIECES = (
    "model.embedding.{} needs pieces: set model.embedding.kind = 'composed' or 'composed+reduced'"
)


class EmbeddingConfig(Section):
    """The token table."""

    kind: Literal["dense", "reduced", "composed", "composed+reduced"] = "dense"
    """A vector for each token; coordinates of ``rank``; sums of the vectors of a token's pieces; both."""
    rank: PositiveInt | None = None
    """``reduced``: coordinates of a token; none means half of ``model.d_model``."""
    pieces_from: Literal["merges", "codes"] = "merges"
    """``composed``: pieces are what a token was merged from, or those of its code (variants, stems)."""
    own_vectors: bool = True
    """``composed``: a token is one of its own pieces."""
    pieces: PositiveInt | None = None
    """``composed``: number of different pieces; none means what the tokenizer gives."""
    nonzeros: PositiveInt | None = None
    """``composed``: pieces of all tokens together; none means what the tokenizer gives."""
    lattice: Literal["none", "z", "e8", "reduced"] = "none"
    """Train with coordinates snapped to integers, to E8, or to the basis's lattice by nearest plane."""
    lattice_step: Annotated[float, Field(gt=0)] = LATTICE_STEP
    """What one step of that lattice is worth."""
    reduction: Literal["none", "lll", "bkz", "hkz"] = "none"
    """``reduced``: lattice reduction of the basis that training begins with; the table stays the same."""
    reduction_metric: Literal["identity", "hidden"] = "identity"
    """What reduction calls short: all directions alike, or by what errors cost the scores."""
    init: Literal["normal", "corpus", "crystal"] = "corpus"
    """Start: random, from the corpus's statistics, or by the tokens' codes (see ``docs/model.md``)."""
    init_std: Annotated[float, Field(gt=0)] | None = None
    """Standard deviation of the table's start; none means what was tuned for ``init``."""

    @property
    def start_std(self) -> float:
        """The standard deviation of the start, resolved."""
        return self.init_std or {"normal": 0.02, "corpus": 0.08, "crystal": 0.02}[self.init]

    @property
    def random_std(self) -> float:
        """The standard deviation of random rows, which the other starts then replace."""
        return self.start_std if self.init == "normal" else 0.02

    @property
    def is_reduced(self) -> bool:
        """Whether there is a basis."""
        return self.kind.endswith("reduced")

    @property
    def is_composed(self) -> bool:
        """Whether tokens are sums of pieces."""
        return self.kind.startswith("composed")

    def rank_of(self, width: int) -> int:
        """Coordinates of a token in a model of ``width``."""
        if not self.is_reduced:
            return width
        return self.rank if self.rank is not None else max(width // 2, 1)

    @model_validator(mode="after")
    def _fits_kind(self) -> Self:
        if not self.is_reduced:
            for name, given in (
                ("rank", self.rank is not None),
                ("reduction", self.reduction != "none"),
                ("lattice = 'reduced'", self.lattice == "reduced"),
            ):
                if given:
                    raise ValueError(
                        f"model.embedding.{name} needs a basis: set model.embedding.kind = 'reduced' or "
                        "'composed+reduced'"
                    )
        if self.reduction_metric != "identity" and self.reduction == "none":
            raise ValueError(
                "model.embedding.reduction_metric is that of a lattice reduction: set "
                "model.embedding.reduction = 'lll', 'bkz' or 'hkz', too"
            )
        if self.pieces_from != "merges" and not self.is_composed:
            raise ValueError(_NEEDS_PIECES.format("pieces_from"))
        return self

    def check_asked(self) -> None:
        """Raise ``ValueError`` for what would do nothing, or not what it says. Runs that were saved so
        still load: this is for who asks for a new one."""
        if not self.is_composed:
            asked = {
                "own_vectors": not self.own_vectors,
                "pieces": self.pieces is not None,
                "nonzeros": self.nonzeros is not None,
            }
            for name in (name for name, given in asked.items() if given):
                raise ValueError(_NEEDS_PIECES.format(name))
        if self.lattice == "none" and self.lattice_step != LATTICE_STEP:
            raise ValueError(
                "model.embedding.lattice_step is that of a lattice: set model.embedding.lattice = 'z', "
                "'e8' or 'reduced', too"
            )
        self.check_reduction()

    def check_reduction(self) -> None:
        """Raise ``ValueError`` where lattice reduction of the basis would change the table."""
        snapped = self.lattice != "none" and self.reduction != "none"
        if snapped and (self.lattice == "e8" or self.is_composed):
            what = "sums of pieces" if self.is_composed else "points of E8"
            raise ValueError(
                f"model.embedding.reduction = {self.reduction!r} would change a table whose coordinates "
                f"are {what} on a lattice: leave it out, or take lattice = 'z' or 'reduced' with "
                "kind = 'reduced'"
            )


class ModelConfig(Section):
    """Shape and parts of the network; the defaults are Llama's."""

    preset: str | None = None
    """A size by name (see ``cllm.core.presets``); fields given beside it win."""
    d_model: PositiveInt = 128
    """Width of the residual stream."""
    n_layers: PositiveInt = 4
    """Blocks of attention and feed-forward."""
    n_heads: PositiveInt = 4
    """Attention heads; they share ``d_model``."""
    n_kv_heads: PositiveInt | None = None
    """Key/value heads for grouped-query attention; none means ``n_heads``."""
    d_ff: PositiveInt = 384
    """Inner width of the feed-forward part."""
    context: PositiveInt = 128
    """Tokens of one window."""
    vocab_size: Annotated[int, Field(ge=2)] | None = None
    """Rows of the token table, two at least; none means the tokenizer's size."""
    norm: Literal["rmsnorm", "layernorm", "batchnorm"] = "rmsnorm"
    """Normalisation before each part (see ``docs/model.md``)."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """Added to the variance before its root."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    """Feed-forward part."""
    positions: Literal["rope", "learned"] = "rope"
    """Rotary positions, or a learned table of ``context`` rows."""
    rope_theta: Annotated[float, Field(gt=0)] = 10_000.0
    """Base of the rotary frequencies."""
    tie_embeddings: bool = True
    """One table for input and output."""
    embedding_dropout: Fraction = 0.0
    """Share of the embeddings' entries set to zero in training."""
    attention_dropout: Fraction = 0.0
    """The same for attention weights."""
    residual_dropout: Fraction = 0.0
    """The same for what each part adds to the residual stream."""
    embedding: EmbeddingConfig = EmbeddingConfig()

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads, resolved."""
        return self.n_kv_heads or self.n_heads

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.d_model % self.n_heads:
            raise ValueError(
                f"model.d_model = {self.d_model} is not a multiple of model.n_heads = {self.n_heads}; "
                "change one of them"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"model.n_heads = {self.n_heads} is not a multiple of model.n_kv_heads = "
                f"{self.kv_heads}; choose a divisor of n_heads"
            )
        rank = self.embedding.rank_of(self.d_model)
        if rank > self.d_model:
            raise ValueError(
                f"model.embedding.rank = {rank} is above model.d_model = {self.d_model}; lower it"
            )
        if self.embedding.lattice == "e8" and rank % 8:
            raise ValueError(
                f"model.embedding.lattice = 'e8' takes eight coordinates at a time, and a token has "
                f"{rank}; choose a multiple of 8"
            )
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(
                f"rotary positions need an even head width, not {self.head_dim}; change model.d_model "
                "or model.n_heads, or set model.positions = 'learned'"
            )
        return self
