"""Kills of ``quantize``, ``save`` and ``table`` at random moments. Their results must be absent, right or refused.

Run it as ``python integration_tests/kill_anywhere.py --kills 30``. Jobs are forked from this process, which has
imported everything that they need, so that every kill hits the job's own work.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bad_arguments import MODELS, MODULE
from safetensors.torch import load_file

from ptq4dit_ao import load_quantized
from ptq4dit_ao.cli import commands  # noqa: F401  (heavy, and to be imported before the forks)
from ptq4dit_ao.cli.main import main as command
from ptq4dit_ao.errors import PTQ4DiTError
from ptq4dit_ao.evaluation.table.cells import read_cell
from ptq4dit_ao.rounding import distillation

FEW = """
calibration: {timesteps: 2, samples: 2, batch_size: 2, steps: 2}
evaluation: {timesteps: 2, samples: 2, leave_one_out: false}
"""
RECIPE = f"""
version: 1
model: {MODULE}:pixels
rounding: {{method: gptq, ranges: output, sequential: true}}
distillation: {{steps: 12}}
noise_correction: {{images: 4}}
{FEW}
"""
PLAIN = f"version: 1\n{FEW}"
REMAINDERS = (".tmp", ".old-", ".rounding")


@dataclass(frozen=True)
class Job:
    """What is killed, and how to tell what it left."""

    name: str
    run: Callable[[Path], object]
    """Work on a folder; called in a process of its own."""
    read: Callable[[Path], Any]
    """What the folder holds: None if there is nothing. Raises PTQ4DiTError if it is refused."""
    start: Callable[[Path], object] = lambda folder: None
    """What is there before."""


def artifact(folder: Path) -> Any:
    """A quantized model's files that a run decides, and the correction beside it."""
    if not (folder / "model").exists():
        return None
    model = load_quantized(folder / "model")
    files = {name: (folder / "model" / name).read_bytes() for name in ("graph.json", "weights.safetensors")}
    correction = load_file(folder / "model" / "ptqd.safetensors")
    return files, {name: tensor.tolist() for name, tensor in correction.items()}, model.recipe.to_dict()


def figures(folder: Path) -> Any:
    """A table's rows without their times; None until there is one."""
    if not (folder / "table" / "table.json").exists():
        return None
    rows = json.loads((folder / "table" / "table.json").read_text())["rows"]
    for path in sorted((folder / "table" / "cells").glob("*.json")):
        read_cell(path, json.loads(path.read_text())["depends"])
    return [{name: row[name] for name in ("steps", "bits", "method", "figures")} for row in rows]


def versions(folder: Path) -> Any:
    """The title of a model that is saved again and again, if it is whole."""
    model = load_quantized(folder / "model")
    title = model.report["title"]
    assert model.report["notes"] == [title], "a model is a mixture of two"
    return "complete" if title.startswith("version ") else title


def save_again(folder: Path) -> None:
    model = load_quantized(folder / "model")
    for number in range(1, 40):
        title = f"version {number}"
        replace(model, report={**model.report, "title": title, "notes": [title]}).save(folder / "model")


def first_version(folder: Path) -> None:
    model = load_quantized(folder.parent / "model")
    replace(model, report={**model.report, "title": "version 0", "notes": ["version 0"]}).save(folder / "model")


def jobs(shop: Path) -> Iterator[Job]:
    def quantize(folder: Path) -> int:
        return command(["quantize", str(shop / "recipe.yaml"), "--output", str(folder / "model")])

    def table(folder: Path) -> int:
        line = f"table --model {MODULE}:pixels --methods {shop / 'plain.yaml'} --bits w4a8 --steps 2,1"
        return command(
            [*line.split(), "--samples", "8", "--calibration-images", "2", "--output", str(folder / "table")]
        )

    yield Job("quantize", quantize, artifact)
    yield Job("save", save_again, versions, first_version)
    yield Job("table", table, figures)


def fork(job: Job, folder: Path, seconds: float | None = None) -> int:
    """Run a job, and kill it after so long; its exit status, minus the signal's number."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            code = job.run(folder) or 0  # type: ignore[assignment]
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def remainders(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if any(part in path.name for part in REMAINDERS)]


def try_job(job: Job, shop: Path, kills: int, draw: random.Random) -> dict[str, object]:
    """Kill a job so often, each time anew, and let it go on."""
    whole = shop / f"{job.name}-whole"
    whole.mkdir()
    job.start(whole)
    begin = time.monotonic()
    assert fork(job, whole) == 0, f"{job.name} fails undisturbed"
    lasts = time.monotonic() - begin
    expected = job.read(whole)
    states: Counter[str] = Counter()
    wrong: list[str] = []
    for number in range(kills):
        folder = shop / f"{job.name}-{number}"
        folder.mkdir()
        job.start(folder)
        moment = draw.uniform(0, lasts)
        killed = fork(job, folder, moment) == -signal.SIGKILL
        state = _state(job, folder, expected)
        states[f"{state}{'' if killed else ' (had ended)'}"] += 1
        if state == "wrong":
            wrong.append(f"after {moment:.3f} s {folder.name} holds something else")
        if fork(job, folder) != 0:
            wrong.append(f"killed after {moment:.3f} s, {folder.name} does not go on")
        elif job.read(folder) != expected:
            wrong.append(f"killed after {moment:.3f} s, {folder.name} goes on to something else")
        if left := remainders(folder):
            wrong.append(f"killed after {moment:.3f} s, {folder.name} keeps {left}")
        if not wrong:
            shutil.rmtree(folder)
    return {"job": job.name, "seconds": round(lasts, 2), "kills": kills, "left": dict(states), "wrong": wrong}


def _state(job: Job, folder: Path, expected: Any) -> str:
    try:
        found = job.read(folder)
    except PTQ4DiTError:
        return "refused"
    return "absent" if found is None else "complete" if found == expected else "wrong"


def run(kills: int, seed: int, names: Collection[str]) -> Iterator[dict[str, object]]:
    """The figures of each job."""
    torch.set_num_threads(1)
    distillation.PAUSE, distillation.SHARE = 0.0, 1e9  # notes after every step
    with tempfile.TemporaryDirectory() as name:
        shop = Path(name)
        (shop / f"{MODULE}.py").write_text(MODELS)
        (shop / "recipe.yaml").write_text(RECIPE)
        (shop / "plain.yaml").write_text(PLAIN)
        sys.path.insert(0, str(shop))
        quantize, *_ = every = list(jobs(shop))
        if "save" in names:
            assert fork(quantize, shop) == 0, "the model to save cannot be made"
        draw = random.Random(seed)
        for job in every:
            if job.name in names:
                yield try_job(job, shop, kills, draw)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", nargs="+", default=["quantize", "save", "table"])
    args = parser.parse_args()
    wrong = False
    for result in run(args.kills, args.seed, args.jobs):
        print(json.dumps(result), flush=True)
        wrong |= bool(result["wrong"])
    sys.exit(wrong)
