"""Record what a pipeline's transformer receives at chosen timesteps, classifier-free guidance included."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ptq4dit_ao.calibration.samples import CalibrationSamples
from ptq4dit_ao.calibration.timesteps import choose_timesteps
from ptq4dit_ao.errors import CalibrationError


class ClassConditionalPipeline(Protocol):
    """What is used of a pipeline such as diffusers' ``DiTPipeline``."""

    transformer: nn.Module
    scheduler: Any

    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float,
        generator: torch.Generator,
        num_inference_steps: int,
    ) -> object: ...


@torch.no_grad()
def collect_from_pipeline(
    pipeline: ClassConditionalPipeline,
    labels: Sequence[int],
    *,
    timesteps: int | Sequence[float],
    steps: int = 50,
    guidance: float = 4.0,
    seed: int = 0,
    batch_size: int = 16,
    on_step: Callable[[int, int], None] | None = None,
) -> CalibrationSamples:
    """Generate one image per label and keep the transformer's inputs at the chosen timesteps.

    With guidance each image gives two rows per timestep, conditional and unconditional. Memory is bounded by
    ``2 * len(labels) * number of timesteps`` rows; an image is given up after the last chosen timestep.

    Args:
        pipeline: anything that calls ``pipeline.transformer`` while denoising.
        labels: classes to draw.
        timesteps: how many, evenly spaced over the sampler's, or which.
        steps: sampling steps.
        guidance: classifier-free guidance scale.
        seed: of the initial noise; equal seeds record equal samples.
        batch_size: images per pipeline call.
        on_step: called with (steps done, steps in all).

    Raises:
        CalibrationError: the timesteps do not occur, or the transformer was not called.
    """
    pipeline.scheduler.set_timesteps(steps)
    available = [float(t) for t in pipeline.scheduler.timesteps]
    chosen = set(choose_timesteps(available, timesteps))
    last = max(i for i, t in enumerate(available) if t in chosen)
    batches = [list(labels[i : i + batch_size]) for i in range(0, len(labels), batch_size)]
    generator = torch.Generator().manual_seed(seed)
    recorder = _Recorder(pipeline.transformer, available, chosen, last)
    if on_step is not None:
        recorder.on_call = lambda done: on_step(done, len(batches) * (last + 1))
    with recorder:
        for batch in batches:
            try:
                pipeline(
                    class_labels=batch,
                    guidance_scale=guidance,
                    generator=generator,
                    num_inference_steps=steps,
                )
            except _Enough:
                recorder.step = 0
    return recorder.samples()


class _Enough(Exception):  # noqa: N818  (a signal, not an error)
    """Nothing more to record from this image."""


class _Recorder:
    """A forward hook that keeps the tensors among a module's arguments, by name."""

    def __init__(self, module: nn.Module, available: list[float], chosen: set[float], last: int) -> None:
        self.module, self.available, self.chosen, self.last = module, available, chosen, last
        self.names = list(inspect.signature(module.forward).parameters)
        self.rows: dict[str, list[Tensor]] = {}
        self.step = self.calls = 0
        self.on_call: Callable[[int], None] = lambda done: None

    def __enter__(self) -> _Recorder:
        self._before = self.module.register_forward_pre_hook(self._record, with_kwargs=True)
        self._after = self.module.register_forward_hook(self._count)
        return self

    def __exit__(self, *exc: object) -> None:
        self._before.remove()
        self._after.remove()

    def samples(self) -> CalibrationSamples:
        if not self.rows:
            raise CalibrationError("the pipeline never called its transformer; nothing was recorded")
        return CalibrationSamples({name: torch.cat(tensors) for name, tensors in self.rows.items()})

    def _record(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if self.available[self.step] not in self.chosen:
            return
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        for name in self.names:
            value = given.get(name)
            if isinstance(value, Tensor):
                self.rows.setdefault(name, []).append(value.detach().cpu().clone())

    def _count(self, module: nn.Module, args: object, output: object) -> None:
        self.step, self.calls = self.step + 1, self.calls + 1
        self.on_call(self.calls)
        if self.step > self.last:
            raise _Enough
