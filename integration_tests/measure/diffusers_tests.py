"""Survey of free sizes on the configurations of diffusers' own tests, which nobody here wrote.

    git clone https://github.com/huggingface/diffusers
    python integration_tests/measure/diffusers_tests.py diffusers --output out/diffusers_tests.md

Every test class of tests/models/transformers that gives a model and inputs is measured as in free_sizes.py: captured
with a batch of 3, and compared with its module at smaller and at larger sizes. The page is written one class at a time;
classes in the JSON file beside it are not measured again, unless they are named. The checkout may be of another version
than the installed diffusers: a class that this version does not have is listed as such.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from families import write_pages
from free_sizes import measure, table
from torch import Tensor
from torch.utils._pytree import tree_map

BATCH = 3


@dataclass(frozen=True)
class TestClass:
    """A test class of diffusers, or a module of tests that cannot be imported."""

    name: str
    found: Any

    group = "diffusers"


def test_classes(checkout: Path) -> Iterator[TestClass]:
    """The test classes that give a model and its inputs."""
    sys.path.insert(0, str(checkout))
    for path in sorted((checkout / "tests/models/transformers").glob("test_models*.py")):
        short = path.stem.removeprefix("test_models_").removeprefix("transformer_")
        try:
            module = importlib.import_module(f"tests.models.transformers.{path.stem}")
        except Exception as error:  # a class that the installed version does not have
            yield TestClass(short, error)
            continue
        for name, found in vars(module).items():
            own = inspect.isclass(found) and found.__module__ == module.__name__
            if own and (name.endswith("TesterConfig") or hasattr(found, "prepare_init_args_and_inputs_for_common")):
                yield TestClass(f"{short}: {name.removesuffix('TesterConfig')}", found)


def given(found: Any) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model of a test class, with random parameters, and its arguments with a batch of 3."""
    tests = found()
    torch.manual_seed(0)
    if hasattr(tests, "get_init_dict"):
        config = tests.get_init_dict()
        sized = "batch_size" in inspect.signature(tests.get_dummy_inputs).parameters
        arguments = tests.get_dummy_inputs(**({"batch_size": BATCH} if sized else {}))
    else:
        config, arguments = tests.prepare_init_args_and_inputs_for_common()
    model = tests.model_class(**config).eval().requires_grad_(False)
    rows = next(x for x in arguments.values() if isinstance(x, Tensor)).shape[0]

    def with_batch(x: Any) -> Any:
        batched = isinstance(x, Tensor) and x.ndim and x.shape[0] == rows
        return torch.cat([x] * BATCH)[:BATCH].clone() if batched else x

    def samples(x: Any) -> bool:
        """Whether the samples of a batch come in a list."""
        tensors = isinstance(x, list) and len(x) == rows and all(isinstance(one, Tensor) for one in x)
        return tensors and all(one.shape[0] != rows for one in x)

    return model, {
        name: [one.clone() for one in (x * BATCH)[:BATCH]] if samples(x) else tree_map(with_batch, x)
        for name, x in arguments.items()
    }


def survey(test: TestClass) -> dict[str, Any]:
    """The row of one test class."""
    if isinstance(test.found, Exception):
        return {"name": test.name, "group": test.group, "error": f"not imported: {str(test.found).splitlines()[0]}"}
    try:
        model, arguments = given(test.found)
    except Exception as error:  # whatever a test does
        return {"name": test.name, "group": test.group, "error": f"the test gives no model: {error!r}"[:200]}
    torch.manual_seed(1)

    def renewed(x: Any) -> Any:
        return torch.randn_like(x) if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 2 else x

    return {"name": test.name, "group": test.group, **measure(model, arguments, tree_map(renewed, arguments))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a checkout of diffusers, with its tests")
    parser.add_argument("--output", type=Path, default=Path("diffusers_tests.md"))
    parser.add_argument("classes", nargs="*", help="default: all")
    args = parser.parse_args()
    about: dict[str, object] = {name: version(name) for name in ("torch", "diffusers")}
    write_pages(args.output, args.classes, survey, table, about, among=list(test_classes(args.checkout)))


if __name__ == "__main__":
    main()
