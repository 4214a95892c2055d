"""Tests of every backend: a saved model runs on its integer kernels and computes the same as the simulation.

Run those of one backend with ``tox run -e NAME``. Backends that this machine cannot run are skipped, with the reason.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ptq4dit_ao import apply_recipe, collect_from_pipeline, export_transformer, load_quantized, load_reference_dit
from ptq4dit_ao.calibration import SamplingPipeline
from ptq4dit_ao.core import sqnr_db
from ptq4dit_ao.errors import LoweringError
from ptq4dit_ao.evaluation.environment import has_native_bfloat16
from ptq4dit_ao.lowering import LoweredModel, export_to
from ptq4dit_ao.lowering.backend import BACKENDS
from ptq4dit_ao.recipe import Activations, Recipe, Weights
from ptq4dit_ao.reference import SAMPLING

MARKS = {"reference": (), "x86_inductor": ("x86",), "aoti": ("x86", "aoti")}
"""Where the mark is not the backend's name; what compiles C++ is marked x86, too."""

CASES = {"tiny W8A8": 14, "tiny W4A8": 14, "tiny W8A8-per-token": 14, "digits W8A8": 42}
"""Model and bits -> quantized linears."""

PARITY_DB = 45
"""A value that falls between two steps may be rounded the other way; a wrong scale somewhere gives single digits."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=[getattr(pytest.mark, mark) for mark in MARKS.get(n, (n,))]) for n in BACKENDS],
)
def backend(request) -> str:
    why = BACKENDS[request.param].unavailable()
    if why is not None:
        pytest.skip(f"{request.param}: {why}")
    return request.param


@pytest.fixture(scope="module", params=CASES)
def case(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def saved(tiny_dit, tiny_samples, tmp_path_factory) -> Callable[[str], Path]:
    """``saved(case)``: the folder of a quantized model."""

    @functools.cache
    def make(case: str) -> Path:
        model, bits = case.split()
        dynamic = "token" if bits.endswith("per-token") else False
        recipe = Recipe(weights=Weights(bits=int(bits[1])), activations=Activations(dynamic=dynamic))
        if model == "tiny":
            quantized = apply_recipe(tiny_dit, recipe, tiny_samples)
        else:
            pipeline = SamplingPipeline(load_reference_dit(), SAMPLING)
            samples = collect_from_pipeline(pipeline, list(range(8)), timesteps=4, steps=4, guidance=1.5)
            exported = export_transformer(pipeline.transformer, samples.example(2))
            quantized = apply_recipe(exported, recipe, samples)
        folder = tmp_path_factory.mktemp("saved") / "model"
        quantized.save(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def lowered(backend, saved, case) -> LoweredModel:
    return load_quantized(saved(case)).lower(backend)


def batch_of(rows: int, case: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 1 if case.startswith("digits") else 4, 8, 8, generator=generator)
    return x, torch.arange(rows) * 70, torch.arange(rows) % 10


def test_every_quantized_linear_runs_as_integers(backend, case, lowered):
    expected = CASES[case] if BACKENDS[backend].integer else 0
    assert (lowered.proof.backend, lowered.proof.float_layers) == (backend, ())
    assert lowered.proof.integer_gemms == lowered.proof.promised == expected


@pytest.mark.parametrize("rows", [4, 1, 7])
def test_it_computes_what_the_simulation_does(case, saved, lowered, rows):
    inputs = batch_of(rows, case)
    expected, actual = load_quantized(saved(case)).lower("reference")(*inputs), lowered(*inputs)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert sqnr_db(expected, actual) > PARITY_DB


@pytest.mark.parametrize("surroundings", [lambda: torch.autocast("cpu", torch.bfloat16), torch.inference_mode])
def test_it_has_its_own_dtypes_wherever_it_is_called(case, lowered, surroundings):
    inputs = batch_of(4, case)
    expected = lowered(*inputs)
    with surroundings():
        assert torch.equal(lowered(*inputs), expected)


def test_its_float_part_computes_in_16_bits_or_is_refused(backend, saved):
    model, inputs, carries = load_quantized(saved("tiny W8A8")), batch_of(4, "tiny"), BACKENDS[backend].carries
    imitated = backend == "openvino" and not has_native_bfloat16()
    if carries is None or torch.bfloat16 not in carries.float_dtypes or imitated:
        with pytest.raises(LoweringError, match="leave float_dtype out"):
            model.lower(backend, float_dtype=torch.bfloat16)
        return
    lowered = model.lower(backend, float_dtype=torch.bfloat16)
    assert lowered.proof.integer_gemms == lowered.proof.promised
    # Attention is small here; a silent float32 would give more than 100 dB.
    assert 25 < sqnr_db(model.lower("reference")(*inputs), lowered(*inputs)) < 80


def test_its_file_appears_whole_or_is_refused(backend, saved, tmp_path):
    model = load_quantized(saved("tiny W8A8"))
    if BACKENDS[backend].write is None:
        with pytest.raises(LoweringError, match=f"'{backend}' runs in this process and writes no file"):
            export_to(model.graph, backend, tmp_path / "file", example_inputs=batch_of(4, "tiny"))
        assert not list(tmp_path.iterdir())
    else:
        path = export_to(model.graph, backend, tmp_path / "file", example_inputs=batch_of(4, "tiny"))
        assert path.name == f"file{BACKENDS[backend].suffix}" and path.stat().st_size > 10_000


THREADS, CALLS = 4, 12


@pytest.mark.parametrize("rows", [(4, 4, 4, 4), (1, 2, 3, 5)], ids=["equal batches", "different batches"])
@pytest.mark.parametrize("case", ["tiny W8A8"], indirect=True)
def test_threads_get_their_own_results(case, lowered, rows):
    """The first calls at a batch size, too, which compile where the backend compiles."""
    inputs = [tuple(x.roll(i, 0) + i for x in batch_of(count, case)[:2]) for i, count in enumerate(rows)]
    inputs = [(x, t, torch.arange(len(x)) % 10) for x, t in inputs]

    def call(thread: int) -> list[Tensor]:
        return [lowered(*inputs[thread]) for _ in range(CALLS)]

    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(call, range(THREADS)))
    for batch, found in zip(inputs, results, strict=True):
        expected = lowered(*batch)
        assert all(torch.allclose(y, expected, atol=1e-5) for y in found)
    assert not torch.allclose(results[0][0][:1], results[1][0][:1], atol=1e-2)  # else a mix-up would not show
