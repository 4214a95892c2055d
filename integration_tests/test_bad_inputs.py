"""Invalid inputs: each raises an error of this package, leaves nothing behind, and is never loaded silently."""

from __future__ import annotations

import copy
import json
import logging
import os
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from bad_arguments import BAD, MODULE, Bad, Workshop
from safetensors.torch import load_file, save_file

import ptq4dit_ao
from ptq4dit_ao import CalibrationSamples, SalienceStatistics, load_quantized, load_recipe, round_sequentially
from ptq4dit_ao._formats import json_digest
from ptq4dit_ao.cli.main import main
from ptq4dit_ao.errors import ArgumentError, PTQ4DiTError, RecipeError
from ptq4dit_ao.evaluation.reference_set import read_reference
from ptq4dit_ao.evaluation.table.cells import read_cell, write_cell
from ptq4dit_ao.metrics import Features
from ptq4dit_ao.metrics.statistics import ReferenceStatistics
from ptq4dit_ao.ptqd import NoiseCorrection

FLIPS = 200
SEED = 0
WITHOUT_ARGUMENTS = {"PTQ4DiTError", "available_backends", "recipe_json_schema"}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Iterator[Workshop]:
    made = Workshop(tmp_path_factory.mktemp("workshop"))
    yield made
    sys.path.remove(str(made.folder))


@pytest.fixture(scope="module")
def saved(workshop) -> Path:
    """An artifact of the command line, with a correction of noise beside it."""
    recipe = workshop.folder / "tiny.yaml"
    recipe.write_text(TINY)
    assert main(["quantize", str(recipe), "--output", str(workshop.folder / "tiny")]) == 0
    return workshop.folder / "tiny"


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch) -> Iterator[Path]:
    """An empty current folder."""
    root = logging.getLogger()
    handlers = root.handlers[:]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("COLUMNS", "300")
    yield tmp_path / "here"
    root.handlers[:] = handlers


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


# -- Python ----------------------------------------------------------------------------------------------------------

CALLS = [(name, number, bad) for name, calls in BAD.items() for number, bad in enumerate(calls)]


@pytest.mark.parametrize(("name", "number", "bad"), CALLS, ids=[f"{name}-{number}" for name, number, _ in CALLS])
def test_a_bad_call(workshop: Workshop, somewhere: Path, name: str, number: int, bad: Bad) -> None:
    call, error, message = bad
    before = listing(workshop.folder)
    with pytest.raises(error, match=message):
        call(workshop)
    after = listing(workshop.folder)
    assert not list(somewhere.iterdir())
    assert {path: data for path, data in after.items() if not path.startswith(("artifact", "__pycache__"))} == {
        path: data for path, data in before.items() if not path.startswith(("artifact", "__pycache__"))
    }


def test_every_public_name_is_called_badly_twice() -> None:
    assert {name for name in ptq4dit_ao.__all__ if len(BAD.get(name, ())) < 2} == WITHOUT_ARGUMENTS


# -- recipes ---------------------------------------------------------------------------------------------------------

TINY = f"""
version: 1
extends: digits_w8a8
description: A tiny model
model: {MODULE}:pixels
calibration: {{timesteps: 2, samples: 2, steps: 2}}
evaluation: {{timesteps: 2, samples: 2, leave_one_out: false}}
noise_correction: {{images: 4}}
"""
NO_PATH = "which is no path; give a name"
RECIPES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "this file is empty; begin it with 'version: 1'"),
    "list": ("- 1", "this file is a sequence; begin it with"),
    "text": ("hello", "this file is a scalar; begin it with"),
    "no YAML": ("version: [1", "this is not YAML"),
    "tab": ("version: 1\n\tweights: {bits: 8}", "this is not YAML"),
    "binary": (b"\xff\xfe\x00\x01", "cannot be read: .*a recipe is a UTF-8 text file"),
    "latin": ("version: 1\ndescription: größe".encode("latin-1"), "a recipe is a UTF-8 text file"),
    "control": (b"version: 1\ndescription: \x00", "this is not YAML"),
    "twice": ("version: 1\nversion: 1", "version: already set on line 1; keep one of them"),
    "two documents": ("version: 1\n---\nversion: 1", "a second document begins"),
    "tag": ("version: !!python/object:os.system 1", "is not read; write a plain value"),
    "merge key": ("version: 1\n<<: {a: 1}", "merge keys .* are not read"),
    "circle": ("version: 1\nweights: &a {bits: *a}", "alias inside its own anchor has no end|this is not YAML"),
    "deep": ("version: 1\nweights: " + "[" * 1500, "nested too deeply|this is not YAML"),
    "deep, closed": ("version: 1\nweights: " + "[" * 1500 + "]" * 1500, "nested too deeply"),
    "no version": ("weights: {bits: 8}", "version: missing; add 'version: 1'"),
    "version 2": ("version: 2", "version: 2 is no recipe version that this release reads"),
    "version text": ("version: '1'", r"version: '1' \(text\) is no recipe version"),
    "no value": ("version: 1\nweights:", "there is no value; write one or remove the key"),
    "key": ("version: 1\nwieghts: {bits: 8}", "unknown key; did you mean 'weights'"),
    "number key": ("version: 1\n3: 4", "a key must be text, but '3' is not"),
    "bits 9": ("version: 1\nweights: {bits: 9}", "weights.bits: 9 is not allowed; it must be a whole number from 2"),
    "bits text": ("version: 1\nweights: {bits: '8'}", r"weights.bits: '8' \(text\) is not allowed"),
    "bits true": ("version: 1\nactivations: {bits: true}", "activations.bits: true is not allowed"),
    "bits huge": ("version: 1\nweights: {bits: 1" + "0" * 400 + "}", "weights.bits: .* is not allowed"),
    "digits": ("version: 1\nweights: {bits: " + "1" * 5000 + "}", "a number of 5000 digits is too long; write a"),
    "nan": ("version: 1\nbalance: {alpha: .nan}", "balance.alpha: NaN is not allowed"),
    "infinite": ("version: 1\nbalance: {max_scale: .inf}", "balance.max_scale: Infinity is not allowed"),
    "overflow": ("version: 1\nbalance: {max_scale: 1e999}", "balance.max_scale: Infinity is not allowed"),
    "alpha": ("version: 1\nbalance: {alpha: 1.5}", "balance.alpha: 1.5 is not allowed"),
    "method": ("version: 1\nbalance: {method: scc}", "did you mean 'ssc'"),
    "auto": ("version: 1\nweights: {bits: auto}", "bits: auto needs average_bits"),
    "budget": ("version: 1\nweights: {bits: auto, average_bits: 2}", "average_bits is 2, and the candidates go from 4"),
    "no override": ("version: 1\noverrides: [{pattern: a}]", "asks for nothing; add one of skip"),
    "two overrides": ("version: 1\noverrides: [{pattern: a, skip: true, weight_bits: 4}]", "asks for skip and for wei"),
    "pattern": ("version: 1\noverrides: [{pattern: '', skip: true}]", r"overrides\[0\].pattern: '' .* is not allowed"),
    "layers": ("version: 1\nlayers: all", "layers: 'all' .* is not allowed"),
    "learned": ("version: 1\nrounding: {method: adaround}", "learns block by block; add sequential: true"),
    "timesteps": ("version: 1\ncalibration: {timesteps: []}", "calibration.timesteps: .* is not allowed"),
    "timestep twice": ("version: 1\ncalibration: {timesteps: [1, 1]}", "1 stands more than once in the list"),
    "seed": ("version: 1\ncalibration: {seed: -1}", "calibration.seed: -1 is not allowed"),
    "seed huge": ("version: 1\ncalibration: {seed: 4294967296}", "calibration.seed: 4294967296 is not allowed"),
    "samples": ("version: 1\nevaluation: {samples: 0}", "evaluation.samples: 0 is not allowed"),
    "guidance": ("version: 1\ncalibration: {guidance: -1}", "calibration.guidance: -1 is not allowed"),
    "base": ("version: 1\nextends: no", "extends: 'no': neither a file nor a shipped recipe"),
    "no base": ("version: 1\nextends: ''", f"extends is '', {NO_PATH}|extends: '' .* is not allowed"),
    "own base": ("version: 1\nextends: recipe.yaml", "the files extend each other in a circle"),
    "base is a list": ("version: 1\nextends: [a]", "extends: .* is not allowed"),
}


@pytest.mark.parametrize("kind", RECIPES)
def test_a_bad_recipe(somewhere: Path, kind: str) -> None:
    text, message = RECIPES[kind]
    path = somewhere / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path)
    assert "recipe.yaml" in str(caught.value)


# -- the command line ------------------------------------------------------------------------------------------------

USAGE = 2
FAILED = 1
COMMANDS: dict[str, tuple[str, int, str]] = {
    "no folder": ("quantize tiny.yaml --output /proc/no/x", FAILED, "cannot write /proc/no/x: No such file .*; choose"),
    "parent a file": ("quantize tiny.yaml --output tiny.yaml/x", FAILED, "cannot write .*tiny.yaml/x: Not a directory"),
    "a file": ("quantize tiny.yaml --output tiny.yaml", FAILED, "tiny.yaml exists and is not a saved ptq4dit-ao model"),
    "not empty": ("quantize tiny.yaml --output full", FAILED, "full exists and is not a saved .*; save to another"),
    "no output": ("quantize tiny.yaml --output=", USAGE, f"path is '', {NO_PATH}"),
    "long": (f"quantize tiny.yaml --output {'a' * 250}", FAILED, "File name too long"),
    "home": ("quantize tiny.yaml --output ~nobody_here/x", USAGE, "no such user's home folder; write it out"),
    "rounding": ("quantize sequential.yaml --output taken", FAILED, "taken.rounding is a file, and rounded layers are"),
    "no recipe": ("quantize no.yaml --output x", FAILED, "'no.yaml': neither a file nor a shipped recipe"),
    "empty recipe": ("quantize= --output x", USAGE, "invalid choice: 'quantize='"),
    "folder recipe": ("quantize full --output x", FAILED, "'full': neither a file nor a shipped recipe"),
    "model": ("quantize tiny.yaml --model no --output x", FAILED, "model 'no' is none of 'reference', 'fashion'"),
    "model function": ("quantize tiny.yaml --model os:no --output x", FAILED, "model 'os:no' cannot be loaded: "),
    "model kind": ("quantize tiny.yaml --model os:getcwd --output x", FAILED, "is a str; expected a diffusers trans"),
    "model raises": (f"quantize tiny.yaml --model {MODULE}_raising:f --output x", FAILED, "cannot be loaded: .*inside"),
    "model folder": ("quantize tiny.yaml --model full --output x", FAILED, "neither model_index.json nor config.json"),
    "quantized model": (
        "quantize tiny.yaml --model tiny --output x",
        FAILED,
        "holds a quantized model; give the float",
    ),
    "evaluation": (
        "quantize default.yaml --output x",
        FAILED,
        "20 evaluation timesteps asked for, the sampler has 3 steps",
    ),
    "calibration": ("quantize many.yaml --output x", FAILED, "5 calibration timesteps asked for, the sampler has 3"),
    "list": ("quantize list.yaml --output x", FAILED, r"never visits timestep 3 \(evaluation.timesteps\); the near"),
    "schedule": ("quantize long.yaml --output x", FAILED, "steps is 1001; it must lie between 1 and the model's 1000"),
    "draws": ("quantize draws.yaml --output x", FAILED, "1 timesteps are drawn for 2 samples; give count=2"),
    "override": ("quantize override.yaml --output x", FAILED, r"override 'blocks\.\*' matches no layer of the model"),
    "samples": ("quantize tiny.yaml --samples no --output x", FAILED, "calibration samples from no: No such file"),
    "samples folder": ("quantize tiny.yaml --samples full --output x", FAILED, "it is a folder; give the name of a"),
    "other samples": (
        "quantize tiny.yaml --samples other --output x",
        FAILED,
        "takes no argument|cannot run on the exa",
    ),
    "short samples": ("quantize tiny.yaml --samples short --output x", FAILED, "short: .*; check the path, or record"),
    "balance nowhere": (
        "balance --model reference --output /proc/no/x",
        FAILED,
        "cannot write /proc/no/x: No such fil",
    ),
    "balance full": ("balance --model reference --output full", FAILED, "full exists and is not an empty folder; choo"),
    "balance none": ("balance minmax --model reference --output x", FAILED, "method is 'none'; choose one of"),
    "balance steps": (
        "balance many.yaml --model reference --output x",
        FAILED,
        "5 calibration timesteps asked for, the",
    ),
    "balance override": ("balance override.yaml --model reference --output x", FAILED, "matches no layer of the model"),
    "table nowhere": ("table --output /proc/no/x", FAILED, "cannot write /proc/no/x/table.md: No such file"),
    "table file": ("table --output tiny.yaml", FAILED, "tiny.yaml is a file; give the table a folder of its own"),
    "table backend": ("table --backend no --output x", FAILED, "backend is 'no'; choose one of"),
    "table cuda": ("table --backend cuda --output x", FAILED, "backend 'cuda' cannot run here"),
    "table bits": ("table --bits w9a9 --output x", FAILED, "bits 'w9a9' are not like 'w4a8'"),
    "table steps": ("table --steps 2000 --output x", FAILED, "steps is 2000; it must lie between 1 and"),
    "table calibration": (
        "table --methods many.yaml --output x",
        FAILED,
        "method 'many.yaml': 5 calibration timesteps asked",
    ),
    "table reference": ("table --reference no.npz --output x", FAILED, "cannot read reference images from no.npz"),
    "table features": ("table --features no --output x", FAILED, "feature network 'no' is none of"),
    "table seed": ("table --seed -1 --output x", USAGE, "'-1' is not a whole number from 0"),
    "table guidance": ("table --guidance nan --output x", USAGE, "'nan' is not a number of 0 or more"),
    "sample nowhere": ("sample tiny --output /proc/no/x.png", FAILED, "cannot write /proc/no/x.png: No such file"),
    "sample folder": (
        "sample tiny --output full",
        FAILED,
        "cannot write full: it is a folder; give the name of a file",
    ),
    "sample seed": (f"sample tiny --seed {2**40} --output x", USAGE, "is not a whole number from 0 to 2"),
    "sample guidance": ("sample tiny --guidance inf --output x", USAGE, "'inf' is not a number of 0 or more"),
    "sample steps": (
        "sample tiny --steps 2000 --output x",
        FAILED,
        "steps is 2000; it must lie between 1 and the model's",
    ),
    "sample backend": ("sample tiny --backend no --steps 2 --output x", FAILED, "backend 'no' is unknown"),
    "sample correction": (
        "sample tiny --steps 3 --output x",
        FAILED,
        "noise correction of tiny is for 2 steps of",
    ),
    "sample float": (
        "sample float",
        FAILED,
        "float is a float diffusers model, not a quantized one; quantize it first",
    ),
    "inspect float": ("inspect float", FAILED, "quantize it first: ptq4dit-ao quantize RECIPE --model float --output"),
    "inspect file": ("inspect tiny.yaml", FAILED, "there is no folder tiny.yaml"),
    "inspect full": ("inspect full", FAILED, "full has no manifest.json; the folder is not a complete"),
    "inspect backend": ("inspect tiny --backend no", FAILED, "backend 'no' is unknown"),
    "export nowhere": (
        "export tiny --backend onnx --output /proc/no/x",
        FAILED,
        "cannot write /proc/no/x: No such file",
    ),
    "export none": (
        "export tiny --backend fbgemm --output x",
        FAILED,
        "runs in this process and writes no file; these",
    ),
    "export dtype": ("export tiny --backend onnx --float-dtype float16 --output x", FAILED, "leave float_dtype out"),
    "evaluate backend": ("evaluate tiny --backend no", FAILED, "backend 'no' is unknown"),
    "evaluate steps": ("evaluate tiny --steps 2000", FAILED, "steps is 2000; it must lie between 1"),
    "evaluate json": ("evaluate tiny --json no/x", FAILED, "there is no folder no to write x to; make it"),
    "evaluate json folder": ("evaluate tiny --json full", FAILED, "cannot write full: it is a folder"),
    "evaluate cache": (
        "evaluate tiny --features digits --cache /proc/no/x",
        FAILED,
        "cannot write /proc/no/x: No such",
    ),
    "evaluate damaged cache": (
        "evaluate tiny --features digits --cache short",
        FAILED,
        "cannot read reference statist",
    ),
    "evaluate reference": ("evaluate tiny --features digits --reference full", FAILED, "folder full holds 0 PNG"),
    "evaluate other": (
        "evaluate tiny --model fashion",
        FAILED,
        "quantized from a model of 1 x 8 x 8 .*; fashion is one",
    ),
    "bench backend": ("bench tiny --backends no", FAILED, "backend 'no' is unknown"),
    "bench samples": ("bench tiny --samples no", FAILED, "cannot read calibration samples from no"),
    "bench markdown": ("bench tiny --markdown /proc/x", FAILED, "cannot write /proc/x: No such file"),
    "bench seed": ("bench tiny --seed x", USAGE, "'x' is not a whole number from 0"),
    "bench width": ("bench --width no", FAILED, "width is 'no'; choose one of dit-s"),
    "recipes": ("recipes no", FAILED, "no shipped recipe is called 'no'"),
}
OTHER_RECIPES = {
    "sequential": {"rounding": "{sequential: true}"},
    "many": {"calibration": "{timesteps: 5, samples: 2, steps: 3}"},
    "list": {"evaluation": "{timesteps: [3], samples: 2}"},
    "long": {"calibration": "{timesteps: 2, samples: 2, steps: 1001}"},
    "draws": {"calibration": "{timesteps: {draw: normal, count: 1}, samples: 2, steps: 2}"},
    "override": {"overrides": "[{pattern: 'blocks.*', skip: true}]"},
}


@pytest.fixture(scope="module")
def bench_of(workshop: Workshop, saved: Path) -> Path:
    """A folder with all that the commands are given."""
    folder = workshop.folder / "given"
    folder.mkdir()
    shutil.copytree(saved, folder / "tiny")
    shutil.copy(workshop.folder / "tiny.yaml", folder)
    (workshop.folder / f"{MODULE}_raising.py").write_text("def f():\n    raise RuntimeError('inside')\n")
    for name, changed in OTHER_RECIPES.items():
        lines = "".join(f"{key}: {value}\n" for key, value in changed.items())
        (folder / f"{name}.yaml").write_text(f"version: 1\nextends: tiny.yaml\n{lines}")
    default = "version: 1\ncalibration: {timesteps: 3, samples: 2, steps: 3}\n"
    (folder / "default.yaml").write_text(f"{default}model: {MODULE}:pixels\n")
    (folder / "full").mkdir()
    (folder / "full" / "mine").write_text("mine")
    (folder / "taken.rounding").write_text("mine")
    workshop.float_model.save_pretrained(folder / "float")  # type: ignore[operator]
    CalibrationSamples({"x": torch.zeros(4, 3), "t": torch.zeros(4)}).save(folder / "other")
    CalibrationSamples({"x": torch.zeros(4, 3)}).save(folder / "short")
    os.truncate(folder / "short", 40)
    return folder


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_bad_command(bench_of: Path, somewhere: Path, kind: str, monkeypatch, capsys, no_sampling) -> None:
    line, code, message = COMMANDS[kind]
    monkeypatch.chdir(bench_of)
    before = listing(bench_of)
    try:
        found = main(line.split())
    except SystemExit as leave:
        found = leave.code
    error = capsys.readouterr().err
    assert found == code and "Traceback" not in error and "[Errno" not in error, error
    assert re.search(message, error), error
    if code == FAILED:
        assert error.startswith("error: ") and len(error.splitlines()) == 1
    assert listing(bench_of) == before and not no_sampling


@pytest.fixture
def no_sampling(monkeypatch) -> list[str]:
    """Calls of what takes long: there are to be none before a refusal."""
    called: list[str] = []
    for where in ("workflow.samples.collect_from_pipeline", "workflow.image_sampling.sample", "cli.commands.draw"):
        monkeypatch.setattr(f"ptq4dit_ao.{where}", lambda *_, where=where, **__: called.append(where))
    return called


# -- a full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["quantize tiny.yaml", "balance --model reference", "table"])
def test_a_full_disk(bench_of: Path, command: str, monkeypatch, capsys, no_sampling) -> None:
    monkeypatch.chdir(bench_of)
    usage = shutil.disk_usage(bench_of)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    before = listing(bench_of)
    assert main([*command.split(), "--output", "new"]) == 1
    error = capsys.readouterr().err
    assert re.search(r"no room for .*: it takes [\d.]+ MB at least, and 0.0 MB are free", error)
    assert listing(bench_of) == before and not no_sampling


# -- paths -----------------------------------------------------------------------------------------------------------


def test_a_path_begins_at_home_wherever_one_is_taken(workshop, saved, expected, somewhere, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HOME", str(somewhere))
    workshop.quantized.save("~/model")
    assert load_quantized("~/model").report == load_quantized(somewhere / "model").report
    workshop.statistics.save("~/statistics")
    assert set(SalienceStatistics.load("~/statistics")) == set(workshop.statistics)
    CalibrationSamples({"x": torch.ones(2)}).save("~/samples")
    assert len(CalibrationSamples.load("~/samples")) == 2
    shutil.copy(workshop.folder / "tiny.yaml", somewhere)
    (somewhere / "top.yaml").write_text("version: 1\nextends: ~/tiny.yaml\n")
    assert load_recipe("~/top.yaml") == load_recipe("~/tiny.yaml")
    assert read_reference_folder("~/model")
    assert main(["inspect", "~/model", "--backend", "none"]) == 0
    names = {"model", "statistics", "samples", "tiny.yaml", "top.yaml"}
    assert {path.name for path in somewhere.iterdir()} == names


def read_reference_folder(path: str) -> bool:
    try:
        read_reference(path)
    except ArgumentError as error:
        return "holds 0 PNG" in str(error)
    return False


# -- altered artifacts -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(saved: Path) -> list[tuple[str, int, int]]:
    """File, offset and what the byte there is changed by; a third each in the files, headers and data alike."""
    draw = random.Random(SEED)
    names = ("manifest.json", "graph.json", "weights.safetensors")
    return [
        (name, draw.randrange((saved / name).stat().st_size), draw.randrange(1, 256))
        for name in (names[i % 3] for i in range(FLIPS))
    ]


@pytest.fixture(scope="module")
def expected(workshop: Workshop, saved: Path) -> torch.Tensor:
    return load_quantized(saved).graph(*workshop.batches[0])


def is_right(folder: Path, workshop: Workshop, expected: torch.Tensor) -> bool:
    """Loads as it was, or is refused; anything else raises or is False."""
    try:
        model = load_quantized(folder)
    except PTQ4DiTError as error:
        return str(folder) in str(error)
    return torch.equal(model.graph(*workshop.batches[0]), expected) and model.recipe.noise_correction.images == 4


def test_a_changed_byte_of_an_artifact(workshop, saved, places, expected, tmp_path) -> None:
    folder = tmp_path / "altered"
    shutil.copytree(saved, folder)
    refused = 0
    for name, offset, change in places:
        original = (saved / name).read_bytes()
        altered = bytearray(original)
        altered[offset] ^= change
        (folder / name).write_bytes(altered)
        assert is_right(folder, workshop, expected), (name, offset, change)
        try:
            load_quantized(folder)
        except PTQ4DiTError:
            refused += 1
        (folder / name).write_bytes(original)
    # White space between the keys of the manifest may be other white space.
    assert refused >= FLIPS - 2


def sign(folder: Path, name: str, change: Callable[[dict], object]) -> None:
    """Change a JSON file as an author would, who puts the digests right."""
    from ptq4dit_ao.artifact.manifest import file_digest

    doc = json.loads((folder / name).read_text())
    change(doc)
    (folder / name).write_text(json.dumps(doc))
    manifest = json.loads((folder / "manifest.json").read_text())
    if name != "manifest.json":
        manifest["files"][name] = file_digest(folder / name)
    manifest.pop("sha256", None)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": json_digest(manifest)}))


def swap(folder: Path) -> None:
    (folder / "graph.json").rename(folder / "x")
    (folder / "weights.safetensors").rename(folder / "graph.json")
    (folder / "x").rename(folder / "weights.safetensors")


def of_another(folder: Path) -> None:
    tensors = {name: tensor + 1 for name, tensor in load_file(folder / "weights.safetensors").items()}
    save_file(tensors, folder / "weights.safetensors")


def as_link(folder: Path) -> None:
    (folder / "graph.json").unlink()
    (folder / "graph.json").symlink_to("/proc/no")


def as_folder(folder: Path) -> None:
    (folder / "graph.json").unlink()
    (folder / "graph.json").mkdir()


FILES = ("manifest.json", "graph.json", "weights.safetensors")
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    **{f"{n} cut": (lambda f, n=n: os.truncate(f / n, 100), f"{n}.*(copy or save the model again)") for n in FILES},
    **{f"{n} empty": (lambda f, n=n: os.truncate(f / n, 0), f"{n}.*copy or save the model again") for n in FILES},
    **{f"{n} gone": (lambda f, n=n: (f / n).unlink(), f"has no {n}; the folder is not a complete") for n in FILES},
    **{
        f"{n} longer": (lambda f, n=n: (f / n).write_bytes((f / n).read_bytes() + b"x"), f"{n}.*copy or save")
        for n in FILES
    },
    "swapped": (swap, "graph.json has .* bytes, the manifest says .*copy or save"),
    "weights of another": (of_another, "weights.safetensors .*copy or save the model again"),
    "link to nothing": (as_link, "has no graph.json; the folder is not a complete"),
    "folder for a file": (as_folder, "has no graph.json; the folder is not a complete"),
    "NaN": (lambda f: (f / "manifest.json").write_text('{"a": NaN}'), "NaN is not JSON.*copy or save"),
    "twice": (lambda f: (f / "manifest.json").write_text('{"a": 1, "a": 1}'), "key 'a' occurs twice.*copy or save"),
    "deep": (lambda f: (f / "manifest.json").write_text("[" * 100_000), "not readable JSON .*copy or save"),
    "deep object": (
        lambda f: (f / "manifest.json").write_text('{"a":' * 900 + "1" + "}" * 900),
        "is of format None, not 'ptq4dit-ao'; point to",
    ),
    "not UTF-8": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe{"), "not readable JSON .*copy or save"),
    "huge number": (
        lambda f: (f / "manifest.json").write_text('{"format": ' + "9" * 10_000 + "}"),
        "not readable JSON .*copy or save|is of format",
    ),
    "list": (lambda f: (f / "manifest.json").write_text("[]"), "holds a JSON list, not an object; copy or save"),
    "newer": (
        lambda f: sign(f, "manifest.json", lambda d: d.update(format_version=9)),
        "has format_version 9, this ver",
    ),
    "other": (
        lambda f: sign(f, "manifest.json", lambda d: d.update(format="onnx")),
        "of format 'onnx', not 'ptq4dit-ao'",
    ),
    "unsigned": (
        lambda f: (f / "manifest.json").write_text(
            (f / "manifest.json").read_text().replace('"sha256"', '"sha265"', 1)
        ),
        "manifest.json|digest of",
    ),
    "recipe": (lambda f: sign(f, "manifest.json", lambda d: d["metadata"].update(recipe={})), "version: missing"),
    "no recipe": (lambda f: sign(f, "manifest.json", lambda d: d["metadata"].pop("recipe")), "not saved with save_qu"),
    "sampling": (
        lambda f: sign(f, "manifest.json", lambda d: d["metadata"].update(sampling=3)),
        "the way to sample is 3",
    ),
    "captured": (
        lambda f: sign(f, "manifest.json", lambda d: d["metadata"].update(captured=[])),
        r"transformer is \[\]",
    ),
    "input": (lambda f: sign(f, "manifest.json", lambda d: d.update(input_signature=[3])), "input signature 3 is not"),
    "report": (lambda f: sign(f, "manifest.json", lambda d: d["metadata"].update(report=3)), "report of .* holds 3"),
    "shape": (
        lambda f: sign(f, "manifest.json", lambda d: next(iter(d["tensors"].values())).update(shape=[10**12])),
        "the manifest says|which is not readable",
    ),
    "call": (
        lambda f: sign(f, "graph.json", lambda d: d["nodes"][-2].update(op="call_function", target="os.system")),
        "a stored graph may not call 'os.system'",
    ),
    "no nodes": (lambda f: sign(f, "graph.json", lambda d: d.update(nodes=[])), "graph.json: "),
    "nodes": (
        lambda f: sign(f, "graph.json", lambda d: d.update(nodes=3)),
        "nodes is a int, not a list; save the model",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_artifact(workshop: Workshop, saved: Path, tmp_path: Path, damage: str, capsys) -> None:
    change, message = DAMAGE[damage]
    folder = tmp_path / "damaged"
    shutil.copytree(saved, folder)
    change(folder)
    before = listing(folder)
    with pytest.raises(PTQ4DiTError, match=message):
        load_quantized(folder)
    assert main(["inspect", str(folder), "--backend", "none"]) == 1
    assert "Traceback" not in capsys.readouterr().err and listing(folder) == before


def test_files_beside_an_artifact_do_not_matter(workshop, saved, expected, tmp_path) -> None:
    folder = tmp_path / "more"
    shutil.copytree(saved, folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "report.json").unlink()
    (tmp_path / "link").symlink_to(folder)
    assert torch.equal(load_quantized(tmp_path / "link").graph(*workshop.batches[0]), expected)


# -- altered files of other kinds ------------------------------------------------------------------------------------


def samples_file(workshop: Workshop, path: Path) -> Callable[[], object]:
    x, t, y = workshop.batches[0]
    CalibrationSamples({"hidden_states": x, "timestep": t, "class_labels": y}).save(path)
    return lambda: CalibrationSamples.load(path)


def statistics_file(workshop: Workshop, path: Path) -> Callable[[], object]:
    workshop.statistics.save(path)
    return lambda: SalienceStatistics.load(path)


def correction_file(workshop: Workshop, path: Path) -> Callable[[], object]:
    zeros = torch.zeros(2, dtype=torch.float64)
    table = NoiseCorrection(timesteps=torch.tensor([0, 500]), k=zeros, mu=zeros[:, None], sigma_q=zeros, guidance=1.5)
    table.save(path)
    return lambda: NoiseCorrection.load(path)


def reference_file(workshop: Workshop, path: Path) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    features = Features(
        pooled=torch.randn(8, 4, generator=generator),
        spatial=torch.randn(8, 6, generator=generator),
        probabilities=torch.full((8, 2), 0.5),
    )
    ReferenceStatistics.of("network", torch.zeros(8, 1, 4, 4), features).save(path)
    return lambda: ReferenceStatistics.load(path)


def cell_file(workshop: Workshop, path: Path) -> Callable[[], object]:
    write_cell(path, {"seed": 3}, {"row": {"value": 1.25}, "seconds": {}, "notes": []})
    return lambda: read_cell(path, {"seed": 3})


def rounded_file(workshop: Workshop, path: Path) -> Callable[[], object]:
    """One of the layers that a sequential rounding keeps."""
    folder = path.with_name("rounding")
    prepared = workshop.prepared(sequential=True, rounding="gptq")
    round_sequentially(copy.deepcopy(prepared), workshop.batches, resume=folder)
    shutil.copy(folder / "0001.safetensors", path)

    def read() -> object:
        shutil.copy(path, folder / "0001.safetensors")
        return round_sequentially(copy.deepcopy(prepared), workshop.batches, resume=folder)

    return read


KINDS = [samples_file, statistics_file, correction_file, reference_file, cell_file, rounded_file]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_changed_byte_of_another_file(workshop: Workshop, tmp_path: Path, kind: Callable[..., object]) -> None:
    path = tmp_path / "file"
    read = kind(workshop, path)
    assert callable(read)
    read()
    original, draw = path.read_bytes(), random.Random(SEED)
    times = 6 if kind is rounded_file else 40
    harmless = named = 0
    for _ in range(times):
        altered = bytearray(original)
        altered[draw.randrange(len(altered))] ^= draw.randrange(1, 256)
        path.write_bytes(altered)
        try:
            read()
            harmless += 1
        except PTQ4DiTError as error:
            named += "file" in str(error) or "0001" in str(error)
    assert named + harmless == times and harmless <= (2 if kind is cell_file else 0)  # white space between keys
    for size in (0, 7, 100, len(original) - 2):
        path.write_bytes(original[:size])
        with pytest.raises(PTQ4DiTError):
            read()
