"""The command line: every command runs, every user error is one line and exit code 1, and a bad line is 2."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

import ptq4dit_ao
from ptq4dit_ao.artifact.manifest import GRAPH, MANIFEST, VECTORS, WEIGHTS
from ptq4dit_ao.cli import commands
from ptq4dit_ao.cli.main import main
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.evaluation.bench.random_dit import randomize_
from ptq4dit_ao.lowering import KernelProof, LoweredModel
from ptq4dit_ao.recipe import shipped_recipe_path, shipped_recipes
from ptq4dit_ao.workflow import QuantizedModel, load_quantized

COMMANDS = ["quantize", "sample", "inspect", "evaluate", "export", "bench", "backends", "recipes"]
PNG = b"\x89PNG\r\n\x1a\n"

MODELS = """
from diffusers import DiTTransformer2DModel

from ptq4dit_ao.evaluation.bench.random_dit import randomize_


def pixels(channels=1):
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=channels, out_channels=channels, num_layers=1,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10,
    )
    return randomize_(model, seed=0)


def latents():
    return pixels(channels=4)
"""

RECIPE = """
version: 1
extends: digits_w8a8
description: A tiny model
model: models_for_the_command_line:pixels
calibration: {timesteps: 2, samples: 2, steps: 2}
evaluation: {timesteps: 2, samples: 2}
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with a recipe, and the models it names importable."""
    folder = tmp_path_factory.mktemp("workshop")
    (folder / "models_for_the_command_line.py").write_text(MODELS)
    (folder / "tiny.yaml").write_text(RECIPE)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def quantized(workshop) -> Path:
    """The tiny model, quantized by the command line."""
    assert main(["quantize", str(workshop / "tiny.yaml"), "--output", str(workshop / "tiny")]) == 0
    return workshop / "tiny"


# -- the grammar -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help(run, command):
    code, out, err = run(*command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: {' '.join(['ptq4dit-ao', *command])}")
    if not command:
        assert all(name in out for name in COMMANDS) and "examples:" in out


def test_version(run):
    assert run("--version") == (0, f"{ptq4dit_ao.__version__}\n", "")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("quantise digits_w8a8", "invalid choice: 'quantise'"),
        ("quantize digits_w8a8", "the following arguments are required: --output"),
        ("quantize --output x", "the following arguments are required: recipe"),
        ("sample x --steps 0", "argument --steps: '0' is not a positive whole number"),
        ("sample x --steps few", "argument --steps: 'few' is not a positive whole number"),
        ("bench x --rounds -3", "argument --rounds: '-3' is not a positive whole number"),
        ("inspect x --fast", "unrecognized arguments: --fast"),
        ("inspect x --float-dtype int8", "argument --float-dtype: invalid choice: 'int8'"),
        ("export x --output y", "the following arguments are required: --backend"),
        ("bench", "one of the arguments DIR --width is required"),
        ("bench x --width dit-s", "argument --width: not allowed with argument DIR"),
    ],
)
def test_a_wrong_command_line(run, line, message):
    code, out, err = run(*line.split())
    assert (code, out) == (2, "") and "usage: ptq4dit-ao" in err
    assert message in err


# -- user errors -----------------------------------------------------------------------------------------------------


def assert_fails(result: tuple[int, str, str], message: str) -> None:
    code, _, err = result
    lines = err.splitlines()
    assert code == 1 and len(lines) == 1, err
    assert lines[0].startswith("error: ") and message in lines[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("quantize digits_w8a9 --output x", "neither a file nor a shipped recipe; did you mean 'digits_w8a8'?"),
        ("quantize missing.yaml --output x", "'missing.yaml': neither a file nor a shipped recipe"),
        ("quantize dit_w8a8 --output x", "recipe 'dit_w8a8' names no model; say which with --model"),
        ("quantize dit_w8a8 --output x --model referense", "model 'referense' is none of 'reference', 'fashion'"),
        ("quantize dit_w8a8 --output x --model no_such:model", "cannot be loaded: No module named 'no_such'"),
        ("inspect missing", "there is no folder missing"),
        ("sample missing", "there is no folder missing"),
        ("bench missing", "there is no folder missing"),
        ("bench missing --blocks 2", "--blocks 2: it is for a random model (--width)"),
        ("bench missing --recipe dit_w4a8", "--recipe dit_w4a8: it is for a random model (--width)"),
        ("bench --width dit-s --model m", "--model m: it is for a saved model; one of --width has random weights"),
        ("bench --width dit-s --samples s", "--samples s: it is for a saved model"),
        ("bench --width dit-m", "width is 'dit-m'; choose one of dit-s, dit-b, dit-l, dit-xl"),
        ("bench --width dit-s --backends fbgem", "backend 'fbgem' is unknown"),
        ("export missing --backend fbgemm --output x", "there is no folder missing"),
        ("recipes digits", "no shipped recipe is called 'digits'; did you mean 'digits_w8a8'?"),
    ],
)  # fmt: skip
def test_user_errors(run, line, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_fails(run(*line.split()), message)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_no_model(run, tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    assert_fails(run("inspect", tmp_path), "has no graph.json")
    (tmp_path / "config.json").write_text("{")
    assert_fails(
        run("quantize", "dit_w8a8", "--model", tmp_path, "--output", tmp_path / "out"),
        "config.json is not the configuration of a diffusers model",
    )


def test_an_altered_model(run, quantized, tmp_path):
    for path in quantized.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with (tmp_path / "graph.json").open("r+b") as file:
        file.write(b"[")
    assert_fails(run("inspect", tmp_path), "graph.json was altered")


@pytest.mark.parametrize("command", ["sample", "inspect", "bench"])
def test_an_unknown_backend(run, quantized, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    option = "--backends" if command == "bench" else "--backend"
    assert_fails(run(command, quantized, option, "fbgem"), "backend 'fbgem' is unknown")
    assert_fails(run(command, quantized, option, "fbgem"), "did you mean 'fbgemm'?")


def test_recipe_problems_are_all_listed(run, tmp_path):
    (tmp_path / "bad.yaml").write_text("version: 1\nweights: {bits: 9}\nlayers: all\n")
    code, out, err = run("quantize", tmp_path / "bad.yaml", "--output", tmp_path / "out")
    assert (code, out) == (1, "") and "Traceback" not in err
    assert "bad.yaml:2" in err and "bad.yaml:3" in err


def test_the_output_folder_is_looked_at_before_the_work(run, workshop):
    code, out, err = run("quantize", workshop / "tiny.yaml", "--output", workshop)
    assert code == 1 and "calibration samples" not in out
    assert "exists and is not a saved ptq4dit-ao model" in err and len(err.splitlines()) == 1


def test_a_picture_that_cannot_be_written(run, quantized, tmp_path):
    result = run("sample", quantized, "--steps", 1, "--per-class", 1, "--backend", "reference", "--output", tmp_path)
    assert_fails(result, "it is a folder; give the name of a file in it")


def test_a_model_saved_without_its_way_of_sampling(run, quantized, tmp_path):
    model = load_quantized(quantized)
    object.__setattr__(model, "sampling", None)
    model.save(tmp_path / "bare")
    assert_fails(run("sample", tmp_path / "bare"), "saved without the way to sample it")


def test_latents_need_a_vae(run, quantized, tmp_path):
    model = load_quantized(quantized)
    sampling = dataclasses.replace(model.sampling, channels=4)
    dataclasses.replace(model, sampling=sampling).save(tmp_path / "latent")
    assert_fails(
        run("sample", tmp_path / "latent"), "denoises 4-channel latents and has no VAE to decode them; give the"
    )
    object.__setattr__(model, "recipe", model.recipe.model_copy(update={"model": None}))
    dataclasses.replace(model, sampling=sampling).save(tmp_path / "orphan")
    assert_fails(run("sample", tmp_path / "orphan"), "draws latents and does not know the pipeline whose VAE decodes")


def test_a_model_that_does_not_know_its_float_form(run, quantized, tmp_path):
    model = load_quantized(quantized)
    object.__setattr__(model, "recipe", model.recipe.model_copy(update={"model": None}))
    model.save(tmp_path / "orphan")
    assert_fails(run("bench", tmp_path / "orphan"), "does not know its float model; say which (--model)")


def test_an_interrupt_is_no_traceback(run, quantized, monkeypatch):
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "inspect", interrupt)
    code, _, err = run("inspect", quantized)
    assert code == 1 and err.startswith("interrupted")


# -- the commands ----------------------------------------------------------------------------------------------------


def test_quantize_leaves_a_model_and_two_reports(quantized):
    names = {path.name for path in quantized.iterdir()}
    assert names == {MANIFEST, GRAPH, WEIGHTS, VECTORS, "report.json", "report.html"}
    report = json.loads((quantized / "report.json").read_text())
    assert report["title"] == "A tiny model on models_for_the_command_line:pixels"
    assert report["evaluation"]["sqnr_db"] > 30 and len(report["evaluation"]["per_timestep"]) == 2
    assert report["size"]["artifact_bytes"] > 0
    assert all(layer["sqnr_db"] is None or layer["sqnr_db"] > 25 for layer in report["layers"])
    assert load_quantized(quantized).sampling.channels == 1
    assert report["leave_one_out"] == {"skipped": "8 samples are too few for 5 quantized inputs; 10 would do"}
    assert all(len(layer["sqnr_db_t"]) == 2 for layer in report["layers"])


def test_quantize_leaves_nothing_out_if_told_so(run, workshop, tmp_path, monkeypatch):
    asked = []

    def stop(model, recipe, *_, **__):
        asked.append((recipe.evaluation.leave_one_out, recipe.model))
        raise ArgumentError("far enough")

    monkeypatch.setattr("ptq4dit_ao.cli.commands.run_quantize", stop)
    for options in ([], ["--no-leave-one-out", "--model", "fashion"]):
        run("quantize", workshop / "tiny.yaml", "--output", tmp_path / "out", *options)
    assert asked == [(True, "models_for_the_command_line:pixels"), (False, "fashion")]


def test_inspect_shows_layers_sites_and_the_proof(run, quantized):
    code, out, err = run("inspect", quantized, "--backend", "fbgemm")
    assert (code, err) == (0, "")
    assert "A tiny model on models_for_the_command_line:pixels: 0.01 M parameters" in out
    for name in ("transformer_blocks.0.attn1.{to_q,to_k,to_v}", "transformer_blocks.0.ff.net.2", "proj_out_2"):
        assert name in out
    assert "linears: 7 integer, 6 float; sites: 3 folded, 2 not" in out
    sites = json.loads((quantized / "report.json").read_text())["sites"]
    spreads = [f"{min(site['b']):.3g} .. {max(site['b']):.3g}" for site in sites if site["status"] == "folded"]
    assert len(spreads) == 3 and all(spread in out for spread in spreads)  # as "quantize" prints them
    assert "gelu does not commute with a scale per channel" in out
    assert "fbgemm: 7/7 quantized linears on integer GEMMs" in out and "ready in" in out


def test_inspect_fits_a_console_of_80_columns(run, quantized, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    report = json.loads((quantized / "report.json").read_text())
    names = [entry["name"] for entry in (*report["sites"], *report["layers"]) if entry["status"] != "refused"]
    code, out, _ = run("inspect", quantized, "--backend", "none")
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    assert all(name in out for name in names) and "W8A8" in out
    assert "not shown: folded into (--wide shows it)" in out
    code, out, _ = run("inspect", quantized, "--backend", "none", "--wide")
    assert code == 0 and all(name in out for name in names) and "not shown" not in out
    assert all(path.rpartition(".")[0] in out for site in report["sites"] for path in site["folded_into"])


def test_inspect_without_a_proof(run, quantized):
    code, out, _ = run("inspect", quantized, "--backend", "none")
    assert code == 0 and "quantized linears on" not in out and "linears: 7 integer" in out


@pytest.mark.parametrize("command", ["sample", "inspect"])
def test_the_backend_defaults_to_the_best_that_runs_here(run, quantized, command, tmp_path, monkeypatch):
    seen = []

    def lower(model: QuantizedModel, backend: str, **options: object) -> LoweredModel:
        seen.append((backend, options))
        return LoweredModel(model.graph, KernelProof(backend=backend, promised=0))

    monkeypatch.setattr(QuantizedModel, "lower", lower)
    monkeypatch.chdir(tmp_path)
    options = ("--steps", 1, "--per-class", 1) if command == "sample" else ()
    assert (
        run(command, quantized, *options)[0] == run(command, quantized, "--float-dtype", "bfloat16", *options)[0] == 0
    )
    assert seen == [("auto", {"float_dtype": None}), ("auto", {"float_dtype": torch.bfloat16})]


def test_sample_draws_a_grid(run, quantized, tmp_path):
    pictures = []
    for seed, sampler in ((0, "ddim"), (0, "ddim"), (1, "ddim"), (0, "ddpm")):
        path = tmp_path / "samples.png"
        code, out, err = run(
            "sample", quantized, "--backend", "fbgemm", "--steps", 2, "--sampler", sampler, "--per-class", 1,
            "--seed", seed, "--output", path,
        )  # fmt: skip
        assert (code, err) == (0, "")
        assert "10 images in" in out and "fbgemm: 7/7 quantized linears" in out
        pictures.append(path.read_bytes())
    assert pictures[0].startswith(PNG)
    assert pictures[0] == pictures[1] and len(set(pictures)) == 3


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    """``pipeline``, whose VAE decodes 4 x 8 x 8 latents into 3 x 16 x 16, and ``model``, its quantized form."""
    folder = tmp_path_factory.mktemp("latent")
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    DiTPipeline(randomize_(transformer, seed=0), vae, DDIMScheduler()).save_pretrained(folder / "pipeline")
    (folder / "recipe.yaml").write_text(RECIPE.replace("model: models_for_the_command_line:pixels\n", ""))
    arguments = ["quantize", folder / "recipe.yaml", "--model", folder / "pipeline", "--output", folder / "model"]
    assert main([str(argument) for argument in arguments]) == 0
    return folder


@pytest.mark.parametrize(("options", "count"), [(("--classes", "207,360"), 2), ((), 10)])
def test_sample_draws_latents_with_the_vae_of_their_pipeline(run, latent, tmp_path, options, count):
    pictures = []
    for model in ((), ("--model", latent / "pipeline")):  # what the recipe remembers, and what is said
        path = tmp_path / "samples.png"
        code, out, err = run(
            "sample", latent / "model", "--backend", "reference", "--steps", 2, "--per-class", 1, "--output", path,
            *options, *model,
        )  # fmt: skip
        assert code == 0 and f"{count} images in" in out and err == "", err
        pictures.append(path.read_bytes())
    assert pictures[0].startswith(PNG) and pictures[0] == pictures[1]
    width, height = struct.unpack(">II", pictures[0][16:24])
    assert (width, height) == (16 * 4, (17 * count - 1) * 4)


def test_classes_that_do_not_exist(run, latent):
    assert_fails(
        run("sample", latent / "model", "--classes", "1,1000"), "class 1000 does not exist; the model has 0 to 999"
    )
    assert_fails(
        run("sample", latent / "model", "--model", latent / "pipeline" / "transformer"), "has no VAE to decode"
    )
    code, _, err = run("sample", latent / "model", "--classes", "cat")
    assert code == 2 and "'cat' is no list of classes, such as 207,360" in err


def test_sample_takes_the_sampler_that_the_model_remembers(run, quantized, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        commands, "draw", lambda _, sampling, labels, **__: seen.append(sampling.sampler) or torch.zeros(100, 1, 8, 8)
    )
    model = load_quantized(quantized)
    for sampler in ("ddim", "ddpm"):
        sampling = model.sampling.by(sampler)
        monkeypatch.setattr(commands, "load_quantized", lambda _, s=sampling: dataclasses.replace(model, sampling=s))
        for options in ((), ("--sampler", "ddim")):
            output = tmp_path / "samples.png"
            assert run("sample", quantized, "--backend", "fbgemm", *options, "--output", output)[0] == 0
    assert seen == ["ddim", "ddim", "ddpm", "ddim"]


def test_guidance_of_the_command_line_wins(run, quantized, tmp_path, monkeypatch):
    seen = []
    draw = commands.draw
    monkeypatch.setattr(
        commands, "draw", lambda *args, **kwargs: seen.append(kwargs["guidance"]) or draw(*args, **kwargs)
    )
    for options in ((), ("--guidance", "0")):
        run(
            "sample",
            quantized,
            "--backend",
            "fbgemm",
            "--steps",
            1,
            "--per-class",
            1,
            "--output",
            tmp_path / "x",
            *options,
        )
    assert seen == [1.5, 0.0]


def test_recipes_are_listed_and_printed(run):
    code, out, err = run("recipes")
    assert (code, err) == (0, "") and all(name in out for name in shipped_recipes())
    assert "The shipped digits model, 4-bit weights and 8-bit activations" in out
    methods, families = out.split("Families of models")
    assert methods.strip().startswith("Methods, for any model")
    for name in shipped_recipes():
        is_family = name[-5:] in ("_w4a8", "_w8a8") and not name.startswith("paper")
        assert f"│ {name} " in (families if is_family else methods), name
    code, out, _ = run("recipes", "paper_w4a8")
    assert code == 0 and out == shipped_recipe_path("paper_w4a8").read_text()
    code, out, _ = run("recipes", "--schema")
    assert code == 0 and json.loads(out)["title"] == "PTQ4DiT recipe"


def test_verbosity(run, quantized):
    assert "on integer GEMMs" not in run("inspect", quantized, "--backend", "fbgemm")[2]
    assert logging.getLogger("ptq4dit_ao").level == logging.WARNING
    run("inspect", quantized, "--backend", "none", "-v")
    assert logging.getLogger("ptq4dit_ao").level == logging.INFO
    run("inspect", quantized, "--backend", "none", "-vvv")
    assert logging.getLogger("ptq4dit_ao").level == logging.DEBUG


# -- the package -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["ptq4dit_ao", "ptq4dit_ao.cli.main"])
def test_importing_is_quick(module):
    script = f"import sys, {module}; print(sorted({{'torch', 'diffusers', 'nncf', 'torchao'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_what_needs_no_torch_loads_none(tmp_path):
    lines = [
        *(f"{command} --help" for command in ("", *COMMANDS)), "--version", "recipes", "recipes auto",
        "recipes --schema", "recipes digits", "quantize digits_w8a9 --output x", "quantize missing.yaml --output x",
        "quantize dit_w8a8 --output x", "balance dit_w8a9 --model m --output x",
        "bench --width dit-s --recipe dit_w8a9", "table --methods minmax,papre --output x",
        "inspect", "sample x --sampler dpm", "export x --float-dtype int8",
    ]  # fmt: skip
    script = f"""
import sys
from ptq4dit_ao.cli.main import main
for line in {lines!r}:
    try:
        main(line.split())
    except SystemExit:
        pass
    assert not {{"torch", "torchao", "diffusers", "numpy"}} & sys.modules.keys(), line
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == 10 and "loading" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_other_commands_say_at_once_what_they_load(tmp_path):
    script = """
import builtins, sys
from ptq4dit_ao.cli.main import main
find = builtins.__import__
def stop(name, *rest):
    if name.partition(".")[0] == "torch":
        sys.exit(7)
    return find(name, *rest)
builtins.__import__ = stop
main(["inspect", "missing"])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 7 and done.stderr == "loading torch and torchao, which takes some seconds\n"


def test_python_dash_m():
    command = [sys.executable, "-m", "ptq4dit_ao", "recipes", "--help"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.startswith("usage: ptq4dit-ao recipes")


@pytest.mark.parametrize("name", ptq4dit_ao.__all__)
def test_public_names_resolve(name):
    value = getattr(ptq4dit_ao, name)
    assert callable(value) and value.__doc__ and name in dir(ptq4dit_ao)
    assert getattr(importlib.import_module(value.__module__), name) is value


def test_other_names_do_not():
    with pytest.raises(AttributeError, match="module 'ptq4dit_ao' has no attribute 'quantise'"):
        _ = ptq4dit_ao.quantise
    assert sorted(ptq4dit_ao.__all__) == ptq4dit_ao.__all__
