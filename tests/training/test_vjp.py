"""The tape gives what torch.func.vjp gives, and nothing that is not compiled imports Dynamo."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from cllm.training.vjp import vjp


def function(parameters: dict[str, Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    hidden = torch.tanh(x @ parameters["a"]) * parameters["b"]
    return hidden, {"mean": hidden.mean(0)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_torchs_bit_for_bit(dtype: torch.dtype) -> None:
    drawn = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=drawn).to(dtype)

    parameters = {"a": normal(6, 5), "b": normal(5), "unused": normal(3)}
    x, gradient = normal(7, 6), normal(7, 5)
    output, pull, rest = vjp(function, parameters, x)
    wanted, theirs, aux = torch.func.vjp(function, parameters, x, has_aux=True)
    assert torch.equal(output, wanted)
    assert torch.equal(rest["mean"], aux["mean"])
    assert not output.requires_grad
    assert not rest["mean"].requires_grad
    with torch.no_grad():
        grads, x_grad = pull(gradient)
        expected, expected_x = theirs(gradient)
    assert torch.equal(x_grad, expected_x)
    assert grads.keys() == expected.keys()
    assert all(torch.equal(grads[name], expected[name]) for name in grads)
    assert not grads["unused"].any()


def test_compiled_code_traces_it() -> None:
    def step(weight: Tensor, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        parameters = {"a": weight, "b": torch.ones(5)}
        output, pull, _ = vjp(function, parameters, x)
        grads, _ = pull(gradient)
        return output, grads["a"]

    inputs = torch.randn(6, 5), torch.randn(7, 6), torch.randn(7, 5)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for mine, plain in zip(compiled(*inputs), step(*inputs), strict=True):
        assert torch.allclose(mine, plain, atol=1e-6)


def test_a_step_that_is_not_compiled_imports_no_compiler() -> None:
    code = """
import sys, torch
from cllm.core.config import Config
from cllm.core.settings import merge
from cllm.training.build import build
from cllm.training.choose import choose
small = {"model.preset": "nano", "model.vocab_size": 64, "train.compile": "off", "train.threads": 1}
exact = {"train.dtype": "fp32", "train.attention": "matmul", "train.steps": 10, "train.device": "cpu"}
config = choose(merge(Config(), small | exact)).config
_, step = build(config)
ids = torch.zeros(2, 8, dtype=torch.int64)
step([(ids, ids)], 1e-3)
print(*sorted({"torch._dynamo", "torch._inductor", "sympy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
