"""What several packages' tests share: a tiny DiT, its exported graph, and quantized forms of it, each made once.

Imports are inside the fixtures, so that tests of the maths start without torchao and diffusers.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.fx import GraphModule

TINY_DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
    "norm_type": "ada_norm_zero",
    "attention_bias": True,
}


@pytest.fixture(scope="session")
def tiny_dit() -> nn.Module:
    """Two adaLN-Zero blocks of width 32: (N, 4, 8, 8), (N,), (N,) -> (N, 4, 8, 8). Not to be changed."""
    from diffusers import DiTTransformer2DModel

    from ptq4dit_ao.evaluation.bench.random_dit import randomize_

    return randomize_(DiTTransformer2DModel(**TINY_DIT), seed=0).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_samples() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Six batches of four (x, t, y), every batch of mixed timesteps; three timesteps occur more than once."""
    import torch

    generator = torch.Generator().manual_seed(1)
    timesteps = torch.tensor([0, 100, 999] * 3 + [50 * i + 1 for i in range(15)])
    timesteps = timesteps[torch.randperm(24, generator=generator)]
    return [
        (torch.randn(4, 4, 8, 8, generator=generator), t, torch.randint(0, 11, (4,), generator=generator))
        for t in timesteps.split(4)
    ]


@pytest.fixture(scope="session")
def tiny_exported(tiny_dit, tiny_samples) -> GraphModule:
    """The float graph, exported at batch 4. Not to be changed: give ``prepare_pt2e`` a ``duplicate``."""
    from ptq4dit_ao.capture import export_transformer

    return export_transformer(tiny_dit, tiny_samples[0])


@pytest.fixture(scope="session")
def duplicate() -> Callable[[GraphModule], GraphModule]:
    """A copy of a graph, for ``prepare_pt2e``, which changes the graph it is given; tensors are shared."""
    from torch.fx import GraphModule

    return lambda graph: GraphModule(graph, copy.deepcopy(graph.graph))


@pytest.fixture(scope="session")
def convert(duplicate) -> Callable[..., GraphModule]:
    """``(exported, quantizer, samples) -> converted`` by torchao's two functions and a loop, as a user writes it."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    def run(exported: GraphModule, quantizer: Any, samples: Iterable[tuple[Tensor, ...]]) -> GraphModule:
        prepared = prepare_pt2e(duplicate(exported), quantizer)
        for sample in samples:
            prepared(*sample)
        return convert_pt2e(prepared)

    return run


@pytest.fixture(scope="session")
def quantized(tiny_exported, tiny_samples, convert) -> Callable[..., GraphModule]:
    """``quantized(**options of PTQ4DiTQuantizer)``: the tiny DiT converted, once per set of options.

    Options must be hashable, so ``overrides`` a tuple. Not to be changed.
    """
    from ptq4dit_ao.quantizer import PTQ4DiTQuantizer

    @functools.cache
    def make(**options: Any) -> GraphModule:
        return convert(tiny_exported, PTQ4DiTQuantizer(**options), tiny_samples)

    return make


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Functions by name: their default id holds an address, which differs between parallel workers."""
    return getattr(val, "__qualname__", None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-run", action="store_true", help="fail if no test passed, as when all were skipped")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A green environment must have shown something: pytest itself is content with skips alone."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.getoption("--require-run") and reporter is not None and not reporter.stats.get("passed"):
        reporter.write_line("no test has passed: this machine cannot run what was asked for (see the reasons: -rs)")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
