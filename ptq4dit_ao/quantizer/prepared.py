"""Functions on models that ``prepare_pt2e`` has prepared with :class:`~ptq4dit_ao.PTQ4DiTQuantizer`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor, nn
from torch.fx import GraphModule

from ptq4dit_ao._modes import own_modes
from ptq4dit_ao._paths import as_path
from ptq4dit_ao._progress import OnProgress, ignore
from ptq4dit_ao.capture.interface import check_batch
from ptq4dit_ao.errors import CalibrationError, check_type
from ptq4dit_ao.observers import (
    ActivationObserver,
    SalienceStatistics,
)
from ptq4dit_ao.quantizer.plan import BalancePlan
from ptq4dit_ao.rounding import DistillationSettings


def _plan_of(prepared: GraphModule) -> BalancePlan:
    check_type("prepared", prepared, nn.Module, "what prepare_pt2e returned")
    for module in prepared.modules():
        plan = getattr(module, "hook", None)
        if isinstance(plan, BalancePlan):
            return plan
    raise CalibrationError(
        "this model was not prepared with PTQ4DiTQuantizer; call prepare_pt2e(exported, PTQ4DiTQuantizer())"
    )


def _checked(prepared: GraphModule, batches: Iterable[Sequence[Tensor]]) -> list[tuple[Tensor, ...]]:
    return [check_batch(prepared, batch, f"batch {number}") for number, batch in enumerate(batches, start=1)]


def salience_statistics(prepared: GraphModule) -> SalienceStatistics:
    """The statistics a prepared model has gathered so far, to save or merge.

    Raises:
        CalibrationError: the model was not prepared with :class:`PTQ4DiTQuantizer`.
    """
    return _plan_of(prepared).statistics()


def tokens_seen(prepared: GraphModule) -> int:
    """Number of calibration tokens that the most used layer of a prepared model has seen.

    Raises:
        CalibrationError: the model was not prepared with :class:`PTQ4DiTQuantizer`.
    """
    _plan_of(prepared)
    return max(module.tokens for module in prepared.modules() if isinstance(module, ActivationObserver))


@own_modes()
def round_sequentially(
    prepared: GraphModule,
    batches: Iterable[Sequence[Tensor]],
    *,
    on_progress: OnProgress = ignore,
    resume: str | Path | None = None,
) -> None:
    """Balance a calibrated model and round it layer by layer; then call ``convert_pt2e``.

    Each layer is rounded for the inputs that it receives from the quantized layers before it, and fitted to the output
    of the same layer in the float network.

    Args:
        prepared: from ``prepare_pt2e`` with ``PTQ4DiTQuantizer(sequential=True, ...)``, run on calibration samples.
        batches: input tuples, such as those samples. Memory holds every activation of all batches that a later layer
            still reads, for both the float and the quantized network.
        on_progress: called with the number of parts done and the total.
        resume: a checkpoint folder. A later call with the same model and batches, such as after the process was
            killed, resumes from it.

    Raises:
        CalibrationError: the model was not prepared with :class:`PTQ4DiTQuantizer`, or was not run; there are no
            batches; the folder holds something else, or cannot be written.
    """
    plan, batches = _plan_of(prepared), _checked(prepared, batches)
    plan.round_sequentially(prepared, batches, on_progress, None if resume is None else as_path(resume, "resume"))


@own_modes()
def distill(
    prepared: GraphModule,
    batches: Iterable[Sequence[Tensor]],
    *,
    steps: int = 1000,
    minutes: float | None = None,
    on_progress: OnProgress = ignore,
    resume: str | Path | None = None,
) -> None:
    """Distill a model that was rounded layer by layer from the float network's output; then call ``convert_pt2e``.

    Integers, scales and biases of all weights, and the quantization ranges of their inputs, follow the gradient of the
    output's mean square error. Memory holds about six 32-bit numbers for each weight, and all activations of one batch.
    A checkpoint (``resume``) holds three 32-bit numbers for each weight.

    Args:
        prepared: a model that :func:`round_sequentially` has rounded.
        batches: input tuples, such as calibration samples. More of them generalize better.
        steps: number of updates, each with one batch.
        minutes: a time limit. Learning ends after ``steps`` or ``minutes``, whichever comes first, so results depend on
            the machine's speed if there is a limit.
        on_progress: called with the number of steps done and the total.
        resume: a checkpoint folder. A later call with the same model, batches and settings resumes from it.

    Raises:
        ArgumentError: ``steps`` or ``minutes`` is not positive.
        CalibrationError: the model was not rounded layer by layer; there are no batches; the folder has the checkpoint
            of another run, or cannot be written.
    """
    settings = DistillationSettings(steps=steps, minutes=minutes)
    _plan_of(prepared).distill(
        prepared, list(batches), settings, on_progress, None if resume is None else as_path(resume, "resume")
    )
