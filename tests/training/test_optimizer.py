"""AdamW and SGD against torch's own, on the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cllm.core.config import TrainConfig
from cllm.training.arena import ALIGN, Arena, Layout
from cllm.training.optimizer import OPTIMIZERS, Optimizer


def model() -> nn.Module:
    """A matrix, a vector and a table."""
    torch.manual_seed(2)
    layers = nn.ModuleDict(
        {"table": nn.Embedding(7, 5), "linear": nn.Linear(5, 3), "norm": nn.LayerNorm(3)}
    )
    return layers.double()


def update(rule: Optimizer, arena: Arena, grad: torch.Tensor, lr: float, count: int) -> None:
    """One update of all parts, with a factor of a half of the gradient's double."""
    for part in arena.parts():
        rule.update(part, 2.0 * part.of(grad), 0.5, lr, count)


def follow(name: str, settings: dict[str, Any], reference: Any, steps: int = 30) -> None:
    """Take steps with ours and with ``reference(groups)``; the weights stay equal."""
    config = TrainConfig(optimizer=name, **settings)
    ours, theirs = model(), model()
    rule = OPTIMIZERS[name](config)
    arena = Arena.adopt(ours, torch.float64, rule.moments)
    matrices = [p for p in theirs.parameters() if p.dim() > 1]
    vectors = [p for p in theirs.parameters() if p.dim() <= 1]
    decay = settings.get("weight_decay", 0.0)
    groups = [
        {"params": matrices, "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = reference(groups)
    generator = torch.Generator().manual_seed(3)
    for step in range(steps):
        lr = 0.05 / (1 + step)
        grads = {
            key: torch.randn(p.shape, generator=generator, dtype=torch.float64)
            for key, p in theirs.named_parameters()
        }
        for key, parameter in theirs.named_parameters():
            parameter.grad = grads[key].clone()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        flat = arena.layout.flatten(grads, torch.float64)
        update(rule, arena, flat, lr, step + 1)
    for key, parameter in ours.named_parameters():
        expected = dict(theirs.named_parameters())[key]
        torch.testing.assert_close(parameter, expected, rtol=1e-11, atol=1e-13, msg=key)
        start = dict(model().named_parameters())[key]
        assert not torch.allclose(parameter, start)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.0, 0.999)])
def test_adamw_is_that_of_torch(betas: tuple[float, float], decay: float) -> None:
    settings = {"betas": betas, "weight_decay": decay, "eps": 1e-6}
    follow("adamw", settings, lambda groups: torch.optim.AdamW(groups, betas=betas, eps=1e-6))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_that_of_torch(momentum: float) -> None:
    settings = {"momentum": momentum, "weight_decay": 0.0}
    follow("sgd", settings, lambda groups: torch.optim.SGD(groups, lr=1.0, momentum=momentum))


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_decay_shrinks_matrices_and_leaves_vectors(name: str) -> None:
    ours = model()
    rule = OPTIMIZERS[name](TrainConfig(optimizer=name, weight_decay=0.5))
    arena = Arena.adopt(ours, torch.float64, rule.moments)
    before = {key: p.detach().clone() for key, p in ours.named_parameters()}
    update(rule, arena, torch.zeros_like(arena.weights), 0.1, 1)
    for key, parameter in ours.named_parameters():
        factor = 0.95 if parameter.dim() > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), before[key] * factor)
    assert set(before) == {
        "table.weight",
        "linear.weight",
        "linear.bias",
        "norm.weight",
        "norm.bias",
    }


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_the_bits_do_not_depend_on_the_number_of_threads(name: str) -> None:
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(4)
        large = nn.ParameterDict(
            {
                "matrix": nn.Parameter(torch.randn(300, 401, generator=generator)),
                "vector": nn.Parameter(torch.randn(70_001, generator=generator)),
            }
        )
        rule = OPTIMIZERS[name](TrainConfig(optimizer=name, weight_decay=0.1))
        arena = Arena.adopt(large, torch.bfloat16, rule.moments)
        grad = torch.randn(arena.layout.size, generator=generator)
        for count in (1, 2, 3):
            for part in arena.parts():
                rule.update(part, part.of(grad).clone(), 0.3, 1e-2, count)
        found.append([arena.weights, arena.compute, *arena.moments.values()])
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_an_arena_is_aligned_padded_with_zeros_and_shared_with_the_model() -> None:
    ours = model()
    values = {key: p.detach().clone() for key, p in ours.named_parameters()}
    arena = Arena.adopt(ours, torch.float32, ("mean",))
    for key, view in arena.layout.views(arena.weights).items():
        parameter = dict(ours.named_parameters())[key]
        assert torch.equal(view, values[key])
        assert parameter.data_ptr() == view.data_ptr()
        assert (view.data_ptr() - arena.weights.data_ptr()) % (ALIGN * view.element_size()) == 0
        assert torch.equal(arena.layout.views(arena.compute)[key], values[key].float())
    used = sum(p.numel() for p in ours.parameters())
    assert arena.layout.size > used
    assert int((arena.weights != 0).sum()) <= used
    ours.linear.weight.data.fill_(4.0)
    arena.refresh()
    assert (arena.layout.views(arena.compute)["linear.weight"] == 4).all()


def test_state_loads_by_name_into_another_arrangement() -> None:
    arena = Arena.adopt(model(), torch.float64, ("mean", "square"))
    for flat in (arena.weights, *arena.moments.values()):
        for view in arena.layout.views(flat).values():
            view.normal_()
    reversed_names = dict(reversed(list(model().named_parameters())))
    other = nn.ParameterDict({key.replace(".", "_"): p for key, p in reversed_names.items()})
    target = Arena.adopt(other, torch.float64, ("mean", "square"))
    assert target.layout.names != arena.layout.names

    def renamed(flat: torch.Tensor) -> dict[str, torch.Tensor]:
        return {key.replace(".", "_"): v for key, v in arena.layout.views(flat).items()}

    target.load(renamed(arena.weights), {k: renamed(v) for k, v in arena.moments.items()})
    for key, view in target.layout.views(target.weights).items():
        assert torch.equal(view, renamed(arena.weights)[key])
    for moment, views in target.named_moments().items():
        for key, view in views.items():
            assert torch.equal(view, renamed(arena.moments[moment])[key])


def test_a_layout_takes_apart_what_it_puts_together() -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(ALIGN), "c": torch.randn(1)}
    layout = Layout.of(tensors)
    flat = layout.flatten(tensors, torch.float32)
    assert flat.numel() == layout.size == 3 * ALIGN
    for name, view in layout.views(flat).items():
        assert torch.equal(view, tensors[name])
