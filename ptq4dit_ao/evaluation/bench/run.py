"""``bench``: measure a quantized model on its backends, beside the float model and other tools' quantized models.

All models live in one process and are timed in interleaved rounds, so that disturbances affect all alike.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq4dit_ao._progress import OnStage, ignore, of_stage
from ptq4dit_ao._version import installed_version
from ptq4dit_ao.errors import first_line
from ptq4dit_ao.evaluation.bench.peers import (
    PEERS,
    Contender,
    FloatModel,
    Started,
    bfloat16_compiled,
    float_compiled,
    float_eager,
)
from ptq4dit_ao.evaluation.bench.subjects import Subject
from ptq4dit_ao.evaluation.environment import environment, has_native_bfloat16, resident_mb
from ptq4dit_ao.lowering import available_backends, lower, missing_backends
from ptq4dit_ao.lowering.backend import BACKENDS, Runnable, choose_backend
from ptq4dit_ao.metrics import LatencyResult, measure_latency, paired_error
from ptq4dit_ao.modules.form import prove_kernels
from ptq4dit_ao.workflow.module_form import to_module
from ptq4dit_ao.workflow.quantized_model import QuantizedModel

logger = logging.getLogger(__name__)

EAGER, COMPILED = "float32 eager", "float32 compiled"
"""Names of the float models."""
WARMUP = 2
"""Number of untimed rounds."""
BUILD = "compile and build"
"""Name of the longest stage. Compiling a model takes a minute or more."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Measurements of one contender; None for those that it does not have."""

    name: str
    problem: str | None = None
    """Reason why it did not run."""
    latency: LatencyResult | None = None
    """Latency of one call."""
    sqnr_db: float | None = None
    """SQNR of its output on the timed inputs, against the eager float32 model, in dB."""
    integer_gemms: int | None = None
    """Number of integer matrix products in one call."""
    promised: int | None = None
    """Number of linears that should run on integer kernels."""
    ready_s: float | None = None
    """Seconds until the end of the first calls, from the float model or, for a backend, from the quantized model."""
    rss_growth_mb: float | None = None
    """Growth of the process's memory in that time, in MB."""


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """Results of one benchmark, with its settings."""

    model: str
    note: str
    environment: dict[str, object]
    batch: int
    rounds: int
    seed: int
    rows: tuple[Row, ...]
    missing: dict[str, str]
    """Backend or peer that cannot run here -> reason."""

    def speed_up(self, row: Row, over: str) -> float | None:
        """Ratio of another contender's median latency to that of ``row``; None if one of them has none."""
        other = next((r.latency for r in self.rows if r.name == over), None)
        return None if other is None or row.latency is None else other.median_ms / row.latency.median_ms

    def to_dict(self) -> dict[str, object]:
        """The result as JSON, with None for infinite decibels."""
        rows = [
            {
                **dataclasses.asdict(row),
                "sqnr_db": row.sqnr_db if row.sqnr_db is not None and math.isfinite(row.sqnr_db) else None,
                "vs_eager": self.speed_up(row, EAGER),
                "vs_compiled": self.speed_up(row, COMPILED),
            }
            for row in self.rows
        ]
        return {**dataclasses.asdict(self), "rows": rows}


@torch.no_grad()
def bench(
    subject: Subject,
    *,
    backends: Sequence[str] | None = None,
    peers: bool = False,
    bfloat16: bool | None = None,
    float_dtype: torch.dtype | None = None,
    rounds: int = 20,
    on_progress: OnStage = ignore,
) -> BenchResult:
    """Time all contenders in interleaved rounds.

    A contender that fails has a row with the reason.

    Args:
        subject: the models and inputs to measure.
        backends: backends of this package. The default is all with integer kernels that this machine can run, and the
            quantized module (:func:`~ptq4dit_ao.to_module`), eager and compiled.
        peers: also measure other tools' quantized models, if the tools are installed.
        bfloat16: also measure the compiled float model in bfloat16. None measures it if the processor supports
            bfloat16.
        float_dtype: also measure the backends that support it with their float part in this dtype.
        rounds: number of timed calls of each contender.
        on_progress: called with ``(stage, done, total)`` as contenders get ready, and after each round.

    Raises:
        LoweringError: a requested backend is unknown, or cannot run here.
    """
    chosen = _integer_backends() if backends is None else [choose_backend(name).name for name in backends]
    inputs = subject.float_model.batches[0]
    contenders = _contenders(
        subject, list(dict.fromkeys(chosen)), peers, bfloat16, float_dtype, modules=backends is None
    )
    rows: list[Row] = []
    runs: dict[str, Runnable] = {}
    expected = subject.float_model.call(subject.float_model.module)(*inputs)
    for done, contender in enumerate(contenders):
        on_progress(BUILD, done, len(contenders))
        row, run = _start(contender, subject.float_model, expected)
        rows.append(row)
        if run is not None:
            runs[row.name] = run
    on_progress(BUILD, len(contenders), len(contenders))
    latency = measure_latency(runs, inputs, rounds=rounds, warmup=WARMUP, on_progress=of_stage(on_progress, "rounds"))
    recipe = subject.quantized.recipe
    missing = missing_backends() if backends is None else {}
    if peers:
        missing |= {peer.name: _why_missing(peer) for peer in PEERS if not _is_installed(peer)}
    return BenchResult(
        model=f"{subject.name}, W{recipe.weights.bits}A{recipe.activations.bits}",
        note=subject.note,
        environment=environment(),
        batch=len(inputs[0]),
        rounds=rounds,
        seed=subject.seed,
        rows=tuple(dataclasses.replace(row, latency=latency.get(row.name)) for row in rows),
        missing=missing,
    )


def _integer_backends() -> list[str]:
    return [name for name in available_backends() if BACKENDS[name].integer]


def _contenders(
    subject: Subject,
    backends: Sequence[str],
    peers: bool,
    bfloat16: bool | None,
    float_dtype: torch.dtype | None,
    *,
    modules: bool,
) -> list[Contender]:
    found = [Contender(name=EAGER, start=float_eager), Contender(name=COMPILED, start=float_compiled)]
    if has_native_bfloat16() if bfloat16 is None else bfloat16:
        found.append(Contender(name="bfloat16 compiled", start=bfloat16_compiled))
    for name in backends:
        found.append(Contender(name=name, start=functools.partial(_lowered, subject.quantized, name, None)))
        carries = BACKENDS[name].carries
        if float_dtype is not None and carries is not None and float_dtype in carries.float_dtypes:
            title = f"{name}, {str(float_dtype).removeprefix('torch.')} rest"
            found.append(Contender(name=title, start=functools.partial(_lowered, subject.quantized, name, float_dtype)))
    if modules:
        for how in ("eager", "compiled"):
            start = functools.partial(_as_module, subject.quantized, how == "compiled")
            found.append(Contender(name=f"module {how}", start=start))
    return [*found, *(peer for peer in PEERS if peers and _is_installed(peer))]


def _as_module(quantized: QuantizedModel, compiled: bool, model: FloatModel) -> Started:
    module = to_module(quantized, model.module, example_inputs=model.batches[0])
    if compiled:
        module.forward = torch.compile(module.forward)  # type: ignore[method-assign]
    run = model.call(module)
    proof = prove_kernels(module, lambda: run(*model.batches[0]), compiled=compiled)
    return Started(run=run, integer_gemms=proof.integer_gemms, promised=proof.promised)


def _lowered(quantized: QuantizedModel, backend: str, float_dtype: torch.dtype | None, model: FloatModel) -> Started:
    lowered = lower(quantized.graph, backend, example_inputs=model.batches[0], float_dtype=float_dtype)
    if not BACKENDS[backend].integer:
        return Started(run=lowered)
    return Started(run=lowered, integer_gemms=lowered.proof.integer_gemms, promised=lowered.proof.promised)


def _start(
    contender: Contender, model: FloatModel, expected: Tensor | tuple[Tensor, ...]
) -> tuple[Row, Runnable | None]:
    gc.collect()
    before, start = resident_mb(), time.perf_counter()
    name = contender.name
    if contender.packages:
        name += f" ({', '.join(f'{package} {installed_version(package)}' for package in contender.packages)})"
    try:
        started = contender.start(model)
        output = started.run(*model.batches[0])
        ready_s, after = time.perf_counter() - start, resident_mb()
        paired = paired_error(lambda *_: expected, lambda *_: output, [model.batches[0]], timestep_index=None)
    except Exception as error:  # any error of any package, because one failure must not end the others
        logger.info("%s failed", name, exc_info=True)
        return Row(name=name, problem=first_line(error)), None
    growth = None if before is None or after is None else after - before
    row = Row(
        name=name,
        sqnr_db=None if contender.name == EAGER else paired.sqnr_db,
        integer_gemms=started.integer_gemms,
        promised=started.promised,
        ready_s=ready_s,
        rss_growth_mb=growth,
    )
    return row, started.run


def _is_installed(peer: Contender) -> bool:
    return all(installed_version(package) is not None for package in peer.packages)


def _why_missing(peer: Contender) -> str:
    absent = [package for package in peer.packages if installed_version(package) is None]
    return f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed"
