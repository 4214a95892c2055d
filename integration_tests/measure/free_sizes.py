"""Survey of the sizes that each transformer family leaves free, and of its graph at sizes that it was not exported at.

    python integration_tests/measure/free_sizes.py --output docs/sizes.md

It writes the table and sizes.json beside it, one family at a time; families in sizes.json are not measured again,
unless they are named. Each family is tiny, with random parameters. Its graph is compared with its module at the sizes
of the example, at smaller ones and at larger ones, all free sizes changed together.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from families import flat, write_pages
from torch import nn

from ptq4dit_ao import PTQ4DiTError, export_transformer, free_sizes
from ptq4dit_ao.capture.export import call_like
from ptq4dit_ao.capture.interface import input_specs, resized
from ptq4dit_ao.capture.signature import flatten_call
from ptq4dit_ao.capture.sizes import FreeSizes
from ptq4dit_ao.testing.zoo import Family

PADDED = ("encoder_attention_mask", "encoder_attention_mask_2", "encoder_mask", "text_embedding_mask")
"""Masks of the words of a text."""

HEAD = """\
# Sizes that are free

Made by `python integration_tests/measure/free_sizes.py`, not by hand: tiny configurations with random parameters
({versions}).

{free} of {rows} families are captured with free sizes besides the batch. Largest error of a graph against its module
at sizes that it was not exported at, relative to the largest value of the output: {error:.1e}; {equal} graphs are equal
to the last bit.

* **free**: sizes that may differ from call to call, with their bounds and divisors. A graph's own are printed by
  `ptq4dit-ao inspect`, and `free_sizes(graph)` has them.
* **error**: at smaller and at larger sizes, all free sizes changed together; float32. A dash: the module itself fails
  on the example's values repeated to that size.

| family | free | error, smaller / larger |
|---|---|---|
"""


def larger(sizes: FreeSizes) -> dict[str, int]:
    """Permitted sizes above the example's, where each can be larger."""
    values = sizes.example
    for size in sizes.sizes:
        for more in (3, 2, 1):
            changed = values | {size.name: size.example + more * size.multiple}
            if sizes.problem(changed) is None:
                values = changed
                break
    return values


@torch.no_grad()
def measure(model: nn.Module, example: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The free sizes of one model, and the errors of its graph; ``error`` instead where it cannot be captured.

    Args:
        model: the model.
        example: arguments to capture it with.
        other: arguments of the same sizes, whose values the graph is compared on.
    """
    try:
        graph = export_transformer(model, example)
    except PTQ4DiTError as error:
        return {"error": str(error).splitlines()[0]}
    sizes, specs = free_sizes(graph), input_specs(graph)
    assert specs is not None

    def error(values: Mapping[str, int]) -> float | None:
        tensors = flatten_call(model, other)[1]
        inputs = [resized(tensors[spec.name], spec, values) for spec in specs]
        inputs = [with_padding_last(x) if spec.name in PADDED else x for x, spec in zip(inputs, specs, strict=True)]
        try:
            expected = flat(call_like(graph, model, inputs))
        except Exception:  # repeated values, such as a mask of places, that the module does not take together
            return None
        got = flat(graph(*inputs))
        return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30))

    return {
        "free": list(map(str, sizes.sizes)),
        "conditions": list(sizes.conditions),
        "fixed": dict(sizes.fixed),
        "names": list(sizes.names),
        "errors": [error(sizes.other()[0]), error(larger(sizes))],
    }


def survey(family: Family) -> dict[str, Any]:
    """The row of one family."""
    found = measure(family.model(), family.inputs(3), family.inputs(3, seed=5))
    return {"name": family.name, "group": family.group, **found}


def with_padding_last(mask: torch.Tensor) -> torch.Tensor:
    """A mask of words with its padding at the end, where tokenizers put it; repeating a mask has put some inside."""
    return mask.sort(dim=-1, descending=True).values


def shown(error: float | None) -> str:
    """An error, or a dash where the module itself fails."""
    return "-" if error is None else f"{error:.0e}"


def table(rows: list[dict[str, Any]], about: dict[str, object]) -> str:
    """The page, as Markdown."""
    good = [row for row in rows if "error" not in row]
    free = [row for row in good if set(row["names"]) - {"batch"}]
    errors = [max(error for error in row["errors"] if error is not None) for row in good]
    lines = [
        HEAD.format(
            versions=", ".join(f"{key} {value}" for key, value in about.items()),
            free=len(free),
            rows=len(rows),
            error=max(errors),
            equal=errors.count(0.0),
        ).rstrip()
    ]
    for row in good:
        said = "; ".join([*row["free"], *(f"where `{condition}`" for condition in row["conditions"])]) or "none"
        lines.append(f"| {row['name']} | {said} | {' / '.join(map(shown, row['errors']))} |")
    lines += ["", "## Fixed, and why", ""]
    for row in good:
        lines += [f"* {row['name']}: {axis}: {reason}" for axis, reason in row["fixed"].items()]
    failed = [f"* {row['name']}: {row['error']}" for row in rows if "error" in row]
    return "\n".join([*lines, *(["", "## Not captured", "", *failed] if failed else []), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("sizes.md"))
    parser.add_argument("families", nargs="*", help="default: all")
    args = parser.parse_args()
    about: dict[str, object] = {name: version(name) for name in ("torch", "diffusers")}
    write_pages(args.output, args.families, survey, table, about)


if __name__ == "__main__":
    main()
