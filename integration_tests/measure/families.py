"""Survey of every transformer family, tiny and with random parameters: export, exact folding and integer execution.

    python integration_tests/measure/families.py --output docs/models.md

It writes the tables of docs/models.md and models.json beside it, one family at a time. Families in models.json are not
measured again, unless they are named. Each family is:

* captured, with a batch size that differs from call to call where possible, and compared with the model;
* folded at every site at once with b = exp(N(0, 1)), in float64 throughout, and compared on another batch;
* quantized to W8A8 (every linear; balanced with CSB and SSC, calibrated on 4 batches of random inputs), lowered, and
  run: integer matrix products are counted by the profiler, and SQNR is that of the integer model's output against the
  float model's;
* saved, loaded and lowered to other backends, each compared with the simulated graph on a batch that was not compiled
  for;
* quantized by a recipe that learns for two steps.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from ptq4dit_ao import (
    PTQ4DiTError,
    QuantizedModel,
    apply_recipe,
    export_transformer,
    find_sites,
    load_quantized,
    load_recipe,
)
from ptq4dit_ao._files import replace_text
from ptq4dit_ao.capture.signature import flatten_call
from ptq4dit_ao.core import sqnr_db
from ptq4dit_ao.graph import Site
from ptq4dit_ao.graph.names import linears, timestep_placeholder
from ptq4dit_ao.passes import fold_balance, insert_balance
from ptq4dit_ao.recipe import Balance, Recipe
from ptq4dit_ao.testing.float64 import in_float64, wide
from ptq4dit_ao.testing.zoo import Family, iter_families

CALIBRATION = range(10, 14)
"""Seeds of the calibration batches."""

OTHERS = ("onnx", "openvino", "aoti")
"""Backends that every family is tried on, beside the first."""

LEARNED = "learned"
"""The recipe that learns."""

PLAIN = {
    "gelu": "GELU before it",
    "silu": "SiLU before it",
    "a norm undoes": "raw residual stream",
    "a model input": "a model input",
    "sin": "timestep embedding",
    "cos": "timestep embedding",
    "would share": "shared by blocks (`couple_blocks`)",
    "only ": "few free channels",
    "pow": "raw residual stream",
}
"""What a refusal means, by a part of its text."""


HEAD = """\
# Models

Made by `python integration_tests/measure/families.py`, not by hand: tiny configurations with random parameters
({versions}).

{good} of {rows} families are captured and run as integers; {sites} sites, of which {counts}.
Largest fold error: {error:.1e}.

* **sites**: *offline* costs nothing at run time; *vector* costs one multiply of an (N, C) vector; *part* folds some of
  the channels, offline; *refused* stays unbalanced, and is quantized all the same.
* **fold error**: every site folded with b = exp(N(0, 1)), in float64, on another batch than the exported one.
* **integer**: integer GEMMs counted in one call of the model on `{backend}` / quantized linears of the graph.
* **SQNR**: integer model against float model. The parameters are random, so it says that the lowering is sound, not
  how good images are.

## Other backends

SQNR of what a backend computes against the simulated graph, in dB, on a batch that is not the one compiled for; some
values are rounded the other way. Where there is none, the reason. *learned*: quantized by the recipe `learned`, in two
steps, against the float model.

{backends}
"""


def inputs_of(model: nn.Module, family: Family, batch: int, seed: int) -> tuple[Tensor, ...]:
    """The family's inputs as the model's graph takes them."""
    return tuple(flatten_call(model, family.inputs(batch, seed=seed))[1].values())


def fold_error(graph: GraphModule, sites: list[Site], inputs: tuple[Tensor, ...], seed: int = 0) -> float:
    """Largest error of the outputs, relative to their largest value, with random b folded everywhere; in float64."""
    model = in_float64(graph)
    generator = torch.Generator().manual_seed(seed)
    inputs = tuple(wide(x) for x in inputs)
    expected = model(*inputs)
    for site in sites:
        if site.refusal is None:
            b = torch.randn(site.num_variables, generator=generator, dtype=torch.float64).exp()
            insert_balance(model, site, b)
            fold_balance(model, site, b)
    model.recompile()
    pairs = zip(tree_leaves(expected), tree_leaves(model(*inputs)), strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs if a.is_floating_point())


def flat(outputs: object) -> Tensor:
    """All floating outputs as one vector."""
    return torch.cat([y.double().flatten() for y in tree_leaves(outputs) if y.is_floating_point()])


def on_backends(model: nn.Module, family: Family, quantized: QuantizedModel, backends: Sequence[str]) -> dict[str, Any]:
    """For each backend the SQNR to the simulated graph, or why there is none; of the model as it was saved."""
    with tempfile.TemporaryDirectory() as folder:
        quantized.save(folder)
        loaded = load_quantized(folder)
    inputs = inputs_of(model, family, 3 if family.dynamic_batch else 2, 6)
    expected = flat(quantized.graph(*inputs))
    assert torch.equal(flat(loaded.graph(*inputs)), expected)
    found: dict[str, Any] = {}
    for backend in backends:
        try:
            run = loaded.lower(backend, example_inputs=inputs_of(model, family, 2, 7))
            found[backend] = round(min(sqnr_db(expected, flat(run(*inputs))), 200.0), 1)
        except PTQ4DiTError as error:
            found[backend] = str(error).splitlines()[0]
    return found


def learned(model: nn.Module, family: Family, graph: GraphModule) -> float:
    """SQNR of the family quantized by a recipe that learns, against the float model."""
    recipe = load_recipe(LEARNED).to_dict()
    recipe["rounding"]["steps"] = 2
    if timestep_placeholder(graph) is None:
        recipe["balance"]["method"] = "max"  # nothing else is known of a model that is not told the time
    batches = [inputs_of(model, family, 2, seed) for seed in CALIBRATION]
    quantized = apply_recipe(graph, Recipe.from_dict(recipe), batches)
    return round(sqnr_db(flat(graph(*batches[0])), flat(quantized.graph(*batches[0]))), 1)


@torch.no_grad()
def survey(family: Family, backend: str, others: Sequence[str] = ()) -> dict[str, Any]:
    """All figures of one family; ``error`` instead where it cannot be captured.

    Args:
        family: which.
        backend: where its integer GEMMs are counted.
        others: backends that it is also lowered to, after it was saved; and it learns. None: neither.
    """
    row: dict[str, Any] = {"name": family.name, "group": family.group, "note": family.note}
    model, example = family.model(), family.inputs(2)
    row["class"] = type(model).__name__
    start = time.perf_counter()
    try:
        graph = export_transformer(model, example)
    except PTQ4DiTError as error:
        return {**row, "error": str(error).splitlines()[0]}
    sites = find_sites(graph)
    batch = 3 if family.dynamic_batch else 2
    row |= {
        "batch": "dynamic" if family.dynamic_batch else "static",
        "linears": len(linears(graph)),
        "sites": dict(Counter(site.kind for site in sites)),
        "reasons": dict(Counter(reason(site) for site in sites if site.refusal is not None)),
        "fold_error": fold_error(graph, sites, inputs_of(model, family, batch, 5)),
    }
    inputs = inputs_of(model, family, batch, 6)
    method = "ssc" if timestep_placeholder(graph) is not None else "max"
    recipe = Recipe(layers="paper", balance=Balance(method=method))
    quantized = apply_recipe(graph, recipe, [inputs_of(model, family, batch, seed) for seed in CALIBRATION])
    lowered = quantized.lower(backend, example_inputs=inputs)
    row |= {
        "quantized": lowered.proof.promised,
        "integer_gemms": lowered.proof.integer_gemms,
        "sqnr_db": round(sqnr_db(flat(graph(*inputs)), flat(lowered(*inputs))), 1),
        "seconds": round(time.perf_counter() - start, 1),
    }
    if others:
        row["backends"] = on_backends(model, family, quantized, others)
        row["learned_db"] = learned(model, family, graph)
    return row


def reason(site: Site) -> str:
    """A refusal in a few words."""
    text = str(site.refusal).partition(": ")[2]
    return next((plain for part, plain in PLAIN.items() if part in text), text)


def untried(rows: list[dict[str, Any]]) -> list[str]:
    """Transformers of the installed diffusers that no family covers."""
    classes = {name for name in dir(diffusers) if "Transformer" in name and name.endswith("Model")}
    return sorted(classes - {row["class"] for row in rows})


def table(rows: list[dict[str, Any]], about: dict[str, object]) -> str:
    """The page, as Markdown."""
    good = [row for row in rows if "error" not in row]
    sites = sum((Counter(row["sites"]) for row in good), Counter())
    versions = ", ".join(f"{key} {value}" for key, value in about.items())
    counts = ", ".join(f"{count} {kind}" for kind, count in sites.most_common())
    lines = [
        HEAD.format(
            backends=backend_table(good),
            versions=versions,
            good=len(good),
            rows=len(rows),
            sites=sum(sites.values()),
            counts=counts,
            error=max(row["fold_error"] for row in good),
            backend=about["backend"],
        )
    ]
    for group in dict.fromkeys(row["group"] for row in rows):
        lines += [
            f"## {group.capitalize()}",
            "",
            "| family | class | batch | linears | offline / vector / part / refused | refused because | fold error "
            "| integer | SQNR dB |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [line(row) for row in rows if row["group"] == group]
        lines.append("")
    failed = [row for row in rows if "error" in row]
    if failed:
        lines += ["## Not captured", ""] + [f"* `{row['class']}`: {row['error']}" for row in failed] + [""]
    if others := untried(rows):
        lines += [
            "## Not tried",
            "",
            "Of the installed diffusers: " + ", ".join(f"`{name}`" for name in others) + ".",
            "",
        ]
    return "\n".join(lines)


def backend_table(rows: list[dict[str, Any]]) -> str:
    """A row for each family that was tried on other backends, and the reasons below."""
    tried = [row for row in rows if row.get("backends")]
    if not tried:
        return "Not measured."
    names = list(tried[0]["backends"])
    lines = [f"| family | {' | '.join(names)} | learned |", "|---" * (len(names) + 2) + "|"]
    reasons: dict[str, int] = {}
    for row in tried:
        cells = [
            str(cell) if isinstance(cell, float) else f"see {reasons.setdefault(cell, len(reasons) + 1)}"
            for cell in (row["backends"][name] for name in names)
        ]
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {row['learned_db']} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for reason, number in reasons.items())])


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    name = f"{row['name']}" + (f": {row['note']}" if row["note"] else "")
    if "error" in row:
        return f"| {name} | `{row['class']}` | not captured, see below | | | | | | |"
    kinds = " / ".join(str(row["sites"].get(kind, 0)) for kind in ("offline", "vector multiply", "partial", "refused"))
    reasons = ", ".join(f"{text} {count}" for text, count in sorted(row["reasons"].items(), key=lambda r: -r[1]))
    return (
        f"| {name} | `{row['class']}` | {row['batch']} | {row['linears']} | {kinds} | {reasons} "
        f"| {row['fold_error']:.0e} | {row['integer_gemms']}/{row['quantized']} | {row['sqnr_db']} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("models.md"))
    parser.add_argument("--backend", default="fbgemm")
    parser.add_argument("--others", nargs="*", default=list(OTHERS), help="default: %(default)s")
    parser.add_argument("families", nargs="*", help="default: all")
    args = parser.parse_args()
    about: dict[str, object] = {name: version(name) for name in ("torch", "torchao", "diffusers")}
    about |= {"machine": platform.machine(), "backend": args.backend}
    write_pages(
        args.output,
        args.families,
        lambda family: survey(family, args.backend, args.others),
        table,
        about,
        lambda row: done(row, args.others),
    )


def write_pages(
    output: Path,
    named: Sequence[str],
    survey: Callable[[Any], dict[str, Any]],
    table: Callable[[list[dict[str, Any]], dict[str, object]], str],
    about: dict[str, object],
    done: Callable[[dict[str, Any]], bool] = lambda row: True,
    among: Sequence[Any] | None = None,
) -> None:
    """Survey families one at a time, and write the page and the JSON file beside it after each.

    Args:
        output: the page; what its JSON file holds is not measured again.
        named: names of families that are measured in any case; all families that are not done, if empty.
        survey: measures one family.
        table: makes the page of all rows.
        about: versions and settings, for the page and the file.
        done: whether a row of the file is complete.
        among: what is surveyed, each with a name; the families of the zoo by default.
    """
    warnings.filterwarnings("ignore")
    among = list(iter_families()) if among is None else among
    by_name = {family.name: family for family in among}
    chosen = [by_name[name] for name in named] or among
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    output.parent.mkdir(parents=True, exist_ok=True)
    stored = output.with_suffix(".json")
    known = {row["name"]: row for row in json.loads(stored.read_text())["families"]} if stored.exists() else {}
    with Progress(*columns, TextColumn("eta"), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=len(chosen))
        for family in chosen:
            progress.update(task, description=family.name)
            if family.name in named or family.name not in known or not done(known[family.name]):
                known[family.name] = survey(family)
                rows = [known[name] for name in by_name if name in known]
                replace_text(output, table(rows, about))
                replace_text(stored, json.dumps({"families": rows, **about}, indent=1) + "\n")
            progress.advance(task)
    console.print(f"{len(known)} families in {output}")


def done(row: dict[str, Any], others: Sequence[str]) -> bool:
    """Was this family measured on these backends, or found not to be captured?"""
    return "error" in row or set(others) <= set(row.get("backends", ()))


if __name__ == "__main__":
    main()
