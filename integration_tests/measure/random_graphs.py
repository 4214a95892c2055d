"""Stress test with thousands of random graphs: folded exactly, and some of them quantized, lowered and compared.

    python integration_tests/measure/random_graphs.py --graphs 10000 --output out/random_graphs.jsonl

Each piece of a hundred programs uses its number as hypothesis' seed, and writes a line to the output when it is done.
The same command resumes after the last line. Every fold is compared in float64, as in
ptq4dit_ao/graph/tests/test_random_graphs.py. Every tenth program is also made a float32 graph, quantized to W8A8, and
lowered to each backend, which runs it and compares it with the simulated graph at two sizes. Errors are printed with
their program, and make the command fail. With ``--any-size`` the batch, the number of tokens and the length of the text
are free in every graph, unless a layer fixes them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ptq4dit_ao import PTQ4DiTError, QuantizedModel, apply_recipe, export_transformer
from ptq4dit_ao.graph.tests.random_graphs import RandomNet, Step, inputs, programs
from ptq4dit_ao.graph.tests.test_random_graphs import DYNAMIC, Dynamic, run
from ptq4dit_ao.recipe import Balance, Recipe

PIECE, LOWERED = 100, 10
"""Programs of a piece; of so many, one is lowered."""

RECIPE = Recipe(balance=Balance(method="max"))


def quantized(program: list[Step], dynamic: Dynamic) -> QuantizedModel:
    """A program in float32, W8A8."""
    samples = [tuple(x.float() for x in inputs(2, seed=i)) for i in range(2)]
    graph = export_transformer(RandomNet(program).float(), samples[0], check=False, dynamic=dynamic)
    return apply_recipe(graph, RECIPE, samples)


def lower_all(program: list[Step], dynamic: Dynamic, backends: list[str], counts: Counter[str]) -> list[str]:
    """What is wrong with a program on the backends; ``lower`` itself compares what they compute."""
    try:
        model = quantized(program, dynamic)
    except PTQ4DiTError:  # a program that casts to float64, for one
        counts["not quantized"] += 1
        return []
    wrong = []
    for backend in backends:
        try:
            difference = model.lower(backend).proof.difference
            counts[f"{backend}: compared" if difference is not None else f"{backend}: not finite"] += 1
        except PTQ4DiTError as error:
            said = str(error)
            if "differs from the quantized graph" in said or "fails at " in said:
                wrong.append(f"{backend}: {said}")
            else:
                counts[f"{backend} refused: {said.partition('; use another')[0][:150]}"] += 1
        except Exception as error:  # to be reported with its program, like a wrong result
            wrong.append(f"{backend}: {type(error).__name__}: {error}")
    return wrong


def piece(number: int, size: int, backends: list[str], tried: Sequence[Dynamic]) -> dict[str, Any]:
    """The counts of one piece, and what is wrong in it."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []

    @seed(number)
    @settings(
        max_examples=size,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(programs(), st.sampled_from(tried))
    def every_program(program: list[Step], dynamic: Dynamic) -> None:
        found = []
        try:
            run(program, dynamic, counts)
        except Exception as error:
            found.append(f"fold: {type(error).__name__}: {error}")
        if counts["programs"] % LOWERED == 0:
            found += lower_all(program, dynamic, backends, counts)
        wrong.extend(f"{program!r}, dynamic={dynamic}: {line}" for line in found)

    every_program()
    return {"piece": number, "counts": dict(counts), "wrong": wrong}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first piece, which is its seed")
    parser.add_argument("--backends", nargs="*", default=["fbgemm", "onnx"])
    parser.add_argument("--any-size", action="store_true", help="free every size that no layer fixes")
    parser.add_argument("--minutes", type=float, help="time limit in minutes, after which no further piece begins")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    done = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
    todo = [n for n in range(args.first, args.first + args.graphs // PIECE) if n not in {row["piece"] for row in done}]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    start, console = time.monotonic(), Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("eta"), TimeRemainingColumn(), console=console) as progress:
        for number in progress.track(todo, description="pieces"):
            done.append(piece(number, PIECE, args.backends, (None,) if args.any_size else DYNAMIC))
            with args.output.open("a") as file:
                file.write(json.dumps(done[-1]) + "\n")
            if args.minutes is not None and time.monotonic() - start > 60 * args.minutes:
                break
    total = sum((Counter(row["counts"]) for row in done), Counter[str]())
    wrong = [line for row in done for line in row["wrong"]]
    for line in wrong:
        console.print(line, markup=False)
    console.print_json(json.dumps({"pieces": len(done), **total, "wrong": len(wrong)}, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
