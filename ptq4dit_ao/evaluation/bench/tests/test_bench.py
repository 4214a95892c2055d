"""``bench``: everybody on the same inputs, failures shown, and nothing claimed that was not measured."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ptq4dit_ao.calibration import CalibrationSamples
from ptq4dit_ao.errors import ArgumentError, LoweringError
from ptq4dit_ao.evaluation.bench import run as bench_module
from ptq4dit_ao.evaluation.bench.peers import Contender, FloatModel, Started
from ptq4dit_ao.evaluation.bench.run import BenchResult, Row, bench
from ptq4dit_ao.evaluation.bench.subjects import Subject, random_subject, saved_subject
from ptq4dit_ao.lowering import Capabilities
from ptq4dit_ao.lowering.backend import BACKENDS
from ptq4dit_ao.recipe import Recipe
from ptq4dit_ao.workflow import apply_recipe

LINEARS = 14


@pytest.fixture(scope="module")
def subject(tiny_dit, tiny_exported, tiny_samples) -> Subject:
    float_model = FloatModel(module=tiny_dit, exported=tiny_exported, batches=tiny_samples)
    quantized = apply_recipe(tiny_exported, Recipe(), tiny_samples)
    return Subject(name="tiny", float_model=float_model, quantized=quantized, seed=3, note="a note")


@pytest.fixture
def run(subject, monkeypatch) -> Callable[..., BenchResult]:
    """``bench`` without compiling, two rounds, on ``fbgemm`` alone if nothing is said."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    return lambda **options: bench(subject, **{"backends": ["fbgemm"], "bfloat16": False, "rounds": 2, **options})


def row(result: BenchResult, name: str) -> Row:
    return next(row for row in result.rows if row.name == name)


def half_again(model: FloatModel) -> Started:
    return Started(run=lambda *tensors: 1.5 * model.exported(*tensors), integer_gemms=3)


def broken(model: FloatModel) -> Started:
    raise RuntimeError("this graph is odd\nand a long story follows")


def fragile(model: FloatModel) -> Started:
    def run(*tensors: object) -> None:
        raise NotImplementedError

    return Started(run=run)


def peers(monkeypatch: pytest.MonkeyPatch, **starts: Any) -> None:
    contenders = [Contender(name=name, start=start, packages=("torch",)) for name, start in starts.items()]
    monkeypatch.setattr(
        bench_module, "PEERS", (*contenders, Contender(name="absent", start=broken, packages=("no-x",)))
    )


def test_every_row_says_what_was_measured(run):
    result = run()
    assert [row.name for row in result.rows] == ["float32 eager", "float32 compiled", "fbgemm"]
    for r in result.rows:
        assert r.problem is None and r.latency.rounds == 2 and r.ready_s > 0
        assert 0 < r.latency.low_ms <= r.latency.median_ms <= r.latency.high_ms
    eager, compiled, fbgemm = result.rows
    assert (eager.sqnr_db, eager.integer_gemms, eager.promised) == (None, None, None)
    assert compiled.sqnr_db == math.inf and 25 < fbgemm.sqnr_db < 70
    assert (fbgemm.integer_gemms, fbgemm.promised) == (LINEARS, LINEARS)
    assert result.speed_up(fbgemm, "float32 eager") == eager.latency.median_ms / fbgemm.latency.median_ms
    assert (result.model, result.note, result.batch, result.rounds, result.seed) == ("tiny, W8A8", "a note", 4, 2, 3)
    assert result.missing == {}


def test_the_figures_are_json(run, monkeypatch):
    peers(monkeypatch, broken=broken)
    result = run(peers=True)
    figures = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert figures["rows"][0]["vs_eager"] == 1 and figures["rows"][1]["sqnr_db"] is None  # infinite
    assert figures["rows"][2]["vs_compiled"] == result.speed_up(result.rows[2], "float32 compiled")
    assert figures["rows"][3]["latency"] is figures["rows"][3]["vs_eager"] is None
    assert figures["environment"]["versions"]["torch"] == torch.__version__


def test_peers_that_fail_or_are_missing_are_named(run, monkeypatch):
    peers(monkeypatch, good=half_again, broken=broken, fragile=fragile)
    result, version = run(peers=True), f"(torch {torch.__version__})"
    good = row(result, f"good {version}")
    assert good.integer_gemms == 3 and good.promised is None and good.latency is not None
    assert good.sqnr_db == pytest.approx(20 * math.log10(2), abs=1e-3)  # half of it is error
    for name, problem in {"broken": "RuntimeError: this graph is odd", "fragile": "NotImplementedError: "}.items():
        failed = row(result, f"{name} {version}")
        assert (failed.problem, failed.latency, failed.sqnr_db) == (problem, None, None)
    assert result.missing == {"absent": "no-x is not installed"}
    assert len(run().rows) == 3  # peers only if asked for


def test_a_backend_of_ours_that_fails_is_a_row_too(run, monkeypatch):
    refusing = dataclasses.replace(BACKENDS["fbgemm"], name="picky", refuse=lambda linear: "it is Monday")
    monkeypatch.setitem(BACKENDS, "picky", refusing)
    problem = row(run(backends=["picky"]), "picky").problem
    assert problem.startswith("LoweringError: backend 'picky' cannot carry 14 of 14") and "Monday" in problem


def test_backends_default_to_the_integer_ones_that_run_here(run, monkeypatch):
    absent = dataclasses.replace(BACKENDS["fbgemm"], name="absent", lacks=lambda: "no such device")
    for name in list(BACKENDS):
        if name not in ("reference", "fbgemm"):
            monkeypatch.delitem(BACKENDS, name)
    monkeypatch.setitem(BACKENDS, "absent", absent)
    result = run(backends=None)
    assert [row.name for row in result.rows[2:]] == ["fbgemm", "module eager", "module compiled"]
    eager = row(result, "module eager")
    assert eager.problem is None and eager.integer_gemms == eager.promised > 0
    assert result.missing == {"absent": "no such device"}
    simulated = row(run(backends=["reference"]), "reference")
    assert (simulated.integer_gemms, simulated.promised) == (None, None)
    with pytest.raises(LoweringError, match="'absent' cannot run here: no such device"):
        run(backends=["absent"])


@pytest.mark.slow
def test_bfloat16_is_timed_where_the_processor_has_it_or_on_request(run, monkeypatch):
    for native, asked, expected in [(True, None, True), (False, None, False), (True, False, False)]:
        monkeypatch.setattr(bench_module, "has_native_bfloat16", lambda native=native: native)
        names = [row.name for row in run(bfloat16=asked, backends=[]).rows]
        assert ("bfloat16 compiled" in names) is expected
    assert 20 < row(run(bfloat16=True, backends=[]), "bfloat16 compiled").sqnr_db < 70


@pytest.mark.slow
def test_another_float_part_is_a_row_of_its_own(run, monkeypatch):
    seen = []

    def build(request):
        seen.append(request.float_dtype)
        return BACKENDS["fbgemm"].build(request)

    able = Capabilities(float_dtypes=(torch.bfloat16,))
    mixed = dataclasses.replace(BACKENDS["fbgemm"], name="mixed", carries=able, build=build)
    monkeypatch.setitem(BACKENDS, "mixed", mixed)
    result = run(backends=["mixed", "fbgemm", "mixed"], float_dtype=torch.bfloat16)
    assert [row.name for row in result.rows[2:]] == ["mixed", "mixed, bfloat16 rest", "fbgemm"]
    assert seen == [None, torch.bfloat16]


def test_progress_is_told_of_both_stages(run):
    steps = []
    run(on_progress=lambda *step: steps.append(step))
    assert steps == [("compile and build", i, 3) for i in range(4)] + [("rounds", i, 4) for i in range(1, 5)]


def test_start_up_counts_building_and_the_first_call(run, monkeypatch):
    naps = iter([0.05])

    def slow(model: FloatModel) -> Started:
        time.sleep(0.05)
        return Started(run=lambda *tensors: (time.sleep(next(naps, 0)), model.exported(*tensors))[1])

    peers(monkeypatch, slow=slow)
    slow_row = run(peers=True).rows[-1]
    assert 0.1 <= slow_row.ready_s < 1


# -- subjects --------------------------------------------------------------------------------------------------------


def test_a_random_model_says_that_it_is_one():
    steps = []
    subject = random_subject("dit-s", 1, Recipe(), batch=1, seed=5, on_progress=lambda *step: steps.append(step))
    assert steps == [("calibrate", i, 4) for i in range(5)]
    assert (subject.name, subject.note, subject.seed) == ("dit-s, depth 1", "random weights: speed only", 5)
    assert [tuple(x.shape) for x in subject.float_model.batches[0]] == [(1, 4, 32, 32), (1,), (1,)]
    assert len(subject.float_model.module.transformer_blocks) == 1
    assert subject.quantized.report["model"]["name"] == "dit-s, depth 1"


@pytest.fixture(scope="module")
def saved(subject, tiny_dit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    tiny_dit.save_pretrained(folder / "float")
    subject.quantized.save(folder / "model")
    return folder


def test_a_saved_model_draws_its_inputs(saved):
    one, same, other = (saved_subject(saved / "model", str(saved / "float"), batch=3, seed=seed) for seed in (0, 0, 1))
    x, t, _ = one.float_model.batches[0]
    assert x.shape == (3, 4, 8, 8) and len(t.unique()) > 1 and len(one.float_model.batches) >= 4
    assert {len(batch[0]) for batch in one.float_model.batches} == {3}
    assert torch.equal(x, same.float_model.batches[0][0]) and not torch.equal(x, other.float_model.batches[0][0])
    assert one.name == "float" and one.note == ""


def test_a_saved_model_takes_recorded_samples(saved, tiny_samples, tmp_path):
    x, t, y = (torch.cat(parts) for parts in zip(*tiny_samples, strict=True))
    names = ("hidden_states", "timestep", "class_labels")
    CalibrationSamples(dict(zip(names, (x, t, y), strict=True))).save(tmp_path / "samples")
    subject = saved_subject(saved / "model", str(saved / "float"), samples=tmp_path / "samples", batch=5)
    assert [len(batch[0]) for batch in subject.float_model.batches] == [5] * 4  # of 24 rows
    with pytest.raises(ArgumentError, match=r"samples holds 24 rows, fewer than a batch of 25; use a smaller batch"):
        saved_subject(saved / "model", str(saved / "float"), samples=tmp_path / "samples", batch=25)
