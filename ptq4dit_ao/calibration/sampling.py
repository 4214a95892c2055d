"""Sampling with classifier-free guidance for class-conditional denoisers, in pixels or latents."""

from __future__ import annotations

import inspect
import json
import math
import numbers
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor, nn

from ptq4dit_ao._optional import require
from ptq4dit_ao._progress import OnProgress, ignore
from ptq4dit_ao.choices import BETA_SCHEDULES, SAMPLERS, BetaSchedule, Sampler
from ptq4dit_ao.errors import ArgumentError, ArtifactError, check_choice

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(x (N,C,H,W), t (N,), y (N,)) -> predicted noise (N,C or 2C,H,W)``; DDIM ignores a learned variance."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a sampler must know of a model; small enough to travel with a quantized one."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    channels: int
    size: int
    null_label: int
    """The label that means "no label" to classifier-free guidance."""
    clip: bool
    """Does the model denoise pixels in [-1, 1] (clip every prediction) or latents?"""
    train_timesteps: int = 1000
    beta_schedule: BetaSchedule = "linear"
    learned_variance: bool = False
    """Does the model predict how much noise DDPM adds, too, between its bounds?"""
    sampler: Sampler = "ddim"
    """DDIM as diffusers' pipelines have it, or DDPM as the DiT authors."""

    def __post_init__(self) -> None:
        """Raises ArgumentError for values that no model has."""
        for name in ("channels", "size", "null_label", "train_timesteps"):
            value = getattr(self, name)
            if not _is_whole(value) or value < 1:
                raise ArgumentError(f"{name} of a sampling is {value!r}; give a whole number of at least 1")
        check_choice("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        check_choice("sampler", self.sampler, SAMPLERS)

    @classmethod
    def of(cls, transformer: nn.Module, *, clip: bool = False) -> Sampling:
        """Read a diffusers ``DiTTransformer2DModel``'s config.

        Raises:
            ArgumentError: it is not drawn by class.
        """
        config: Any = getattr(transformer, "config", None)
        if getattr(config, "num_embeds_ada_norm", None) is None:
            raise ArgumentError(
                f"{type(transformer).__name__} is not drawn by class: its config has no num_embeds_ada_norm; draw with "
                "its own pipeline"
            )
        return cls(
            channels=config.in_channels,
            size=config.sample_size,
            null_label=config.num_embeds_ada_norm,
            clip=clip,
            learned_variance=config.out_channels == 2 * config.in_channels,
        )

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: object) -> Sampling:
        """Raises ArtifactError for anything but what :meth:`to_dict` gives."""
        try:
            return TypeAdapter(cls).validate_json(json.dumps(data))
        except ValidationError as error:
            raise ArtifactError(
                f"the way to sample is {data!r}, not one that this version reads; quantize again"
            ) from error

    @property
    def guided_channels(self) -> int:
        """Of the noise, from the first on: all, or three with DDPM (the authors' code leaves a latent's fourth out)."""
        return self.channels if self.sampler == "ddim" else min(3, self.channels)

    def by(self, sampler: str | None) -> Sampling:
        """The same model, drawn by another sampler; None is its own.

        Raises:
            ArgumentError: there is no such sampler.
        """
        if sampler is None:
            return self
        check_choice("sampler", sampler, SAMPLERS)
        return replace(self, sampler=sampler)  # type: ignore[arg-type]  # checked

    def check_steps(self, steps: int) -> None:
        """Raises ArgumentError unless a sampler can take so many steps."""
        if not _is_whole(steps) or not 1 <= steps <= self.train_timesteps:
            raise ArgumentError(
                f"steps is {steps}; it must lie between 1 and the model's {self.train_timesteps} timesteps"
            )

    def scheduler(self, steps: int) -> Any:
        """The sampler's scheduler of diffusers, set to ``steps`` steps.

        DDPM goes through timesteps from 0 to the last one, evenly spaced and rounded, and adds noise of the model's own
        variance, if it predicts one.

        Raises:
            ArgumentError: there are fewer timesteps than steps, or no steps.
        """
        self.check_steps(steps)
        diffusers = require("diffusers", extra="diffusers")
        options = {
            "num_train_timesteps": self.train_timesteps,
            "beta_schedule": self.beta_schedule,
            "clip_sample": self.clip,
        }
        if self.sampler == "ddim":
            scheduler = diffusers.DDIMScheduler(**options)
        else:
            variance = "learned_range" if self.learned_variance else "fixed_small"
            scheduler = diffusers.DDPMScheduler(**options, timestep_spacing="linspace", variance_type=variance)
        scheduler.set_timesteps(steps)
        return scheduler


class Step(NamedTuple):
    """One step of a sampler."""

    t: Tensor
    """() as the scheduler counts."""
    x: Tensor
    """(N, C, H, W) before the step."""
    eps: Tensor
    """(N, C, H, W) predicted there, after guidance."""
    result: Tensor
    """(N, C, H, W) after the step."""


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    sampling: Sampling,
    labels: Tensor,
    *,
    steps: int = 50,
    guidance: float = 1.5,
    generator: torch.Generator | None = None,
    scheduler: Any = None,
    on_progress: OnProgress = ignore,
) -> Tensor:
    """Draw one image per label: (N,) -> (N, C, H, W); equal generators start from equal noise.

    Args:
        denoiser: what predicts the noise.
        sampling: what a sampler must know of it.
        labels: classes, or ``sampling.null_label`` for none.
        steps: of the sampler.
        guidance: classifier-free guidance scale; 1 is none, and 0 leaves the label out.
        generator: of the noise, on the CPU.
        scheduler: one of diffusers' that is told the noise, or one that wraps it; as ``sampling`` says, if not given.
        on_progress: called with (steps done, steps in all).

    Raises:
        ArgumentError: no sampler takes so many steps, or an argument is not of this kind.
    """
    path = trajectory(
        denoiser, sampling, labels, steps=steps, guidance=guidance, generator=generator, scheduler=scheduler
    )
    for done, step in enumerate(path, start=1):
        x = step.result
        on_progress(done, steps)
    return x.clamp(-1, 1) if sampling.clip else x


@torch.no_grad()
def trajectory(
    denoiser: Denoiser,
    sampling: Sampling,
    labels: Tensor,
    *,
    steps: int,
    guidance: float,
    generator: torch.Generator | None = None,
    scheduler: Any = None,
) -> Iterator[Step]:
    """The steps by which :func:`sample` gets to its images."""
    _check_call(sampling, labels, guidance, generator, scheduler)
    scheduler = scheduler_for(sampling, steps, scheduler)
    x = torch.randn(len(labels), sampling.channels, sampling.size, sampling.size, generator=generator)
    learned = str(getattr(scheduler.config, "variance_type", "")).startswith("learned")
    for t in scheduler.timesteps:
        output = _guided(denoiser, sampling, x, t, labels, guidance)
        eps = output[:, : sampling.channels]
        result = scheduler.step(output if learned else eps, t, x, generator=generator).prev_sample
        yield Step(t, x, eps, result)
        x = result


def scheduler_for(sampling: Sampling, steps: int, scheduler: Any) -> Any:
    """A scheduler of diffusers set to so many steps; the sampler's own if it is None.

    Raises:
        ArgumentError: no sampler takes so many, or the scheduler is not for a model of noise that sees its samples as
            they are.
    """
    if scheduler is None:
        return sampling.scheduler(steps)
    sampling.check_steps(steps)
    name, config = type(scheduler).__name__, cast(Any, getattr(scheduler, "config", None))
    check_choice(f"prediction_type of {name}", getattr(config, "prediction_type", None), ("epsilon",))
    if config.num_train_timesteps != sampling.train_timesteps:
        raise ArgumentError(
            f"{name} counts {config.num_train_timesteps} timesteps, and the model {sampling.train_timesteps}; make it "
            f"with num_train_timesteps={sampling.train_timesteps}"
        )
    scheduler.set_timesteps(steps)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    if float(scheduler.init_noise_sigma) != 1 or not takes_generator:
        raise ArgumentError(
            f"{name} starts from scaled noise, or evaluates a step twice; use one that does not, as DDIMScheduler, "
            "DDPMScheduler or DPMSolverMultistepScheduler"
        )
    return scheduler


def _check_call(sampling: Sampling, labels: Tensor, guidance: float, generator: object, scheduler: object) -> None:
    """Raises ArgumentError for labels, a guidance scale or a generator that cannot be sampled with."""
    whole = isinstance(labels, Tensor) and labels.dtype in (torch.int64, torch.int32)
    if not whole or labels.ndim != 1 or len(labels) == 0:
        shown = f"{tuple(labels.shape)} {labels.dtype}" if isinstance(labels, Tensor) else repr(labels)
        raise ArgumentError(f"labels is {shown}; give a tensor (N,) of whole numbers, one for each image")
    odd = labels[(labels < 0) | (labels > sampling.null_label)]
    if len(odd):
        raise ArgumentError(f"labels holds {odd[0].item()}; the model knows 0 to {sampling.null_label}")
    if not isinstance(guidance, numbers.Real) or not math.isfinite(guidance):
        raise ArgumentError(f"guidance is {guidance!r}; give a finite number")
    fitted = getattr(scheduler, "fitted_guidance", guidance)
    if fitted != guidance:
        raise ArgumentError(
            f"guidance is {guidance:g}, and the correction of the scheduler was fitted at {fitted:g}; draw with that, "
            "or fit one for this"
        )
    if generator is not None and not (isinstance(generator, torch.Generator) and generator.device.type == "cpu"):
        raise ArgumentError(f"generator is {generator!r}; give a torch.Generator on the CPU, where noise is drawn")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@torch.no_grad()
def guided_noise(
    denoiser: Denoiser, sampling: Sampling, x: Tensor, t: Tensor, labels: Tensor, guidance: float
) -> Tensor:
    """Predicted noise after classifier-free guidance: x (N, C, H, W), t (), labels (N,) -> (N, C, H, W)."""
    return _guided(denoiser, sampling, x, t, labels, guidance)[:, : sampling.channels]


def _guided(denoiser: Denoiser, sampling: Sampling, x: Tensor, t: Tensor, labels: Tensor, guidance: float) -> Tensor:
    """The same with the learned variance, if there is one; what is not guided is that of the label's half."""
    y = torch.cat([labels, torch.full_like(labels, sampling.null_label)])
    conditional, unconditional = denoiser(torch.cat([x, x]), t.expand(len(y)), y).float().chunk(2)
    guided = sampling.guided_channels
    eps, other = conditional[:, :guided], unconditional[:, :guided]
    return torch.cat([other + guidance * (eps - other), conditional[:, guided:]], dim=1)


def as_denoiser(transformer: nn.Module) -> Denoiser:
    """A diffusers transformer as a function of positional tensors."""
    return lambda x, t, y: transformer(x, timestep=t, class_labels=y).sample


def _place(model: Any) -> tuple[torch.device, torch.dtype]:
    """Where a model is, and in which dtype; those of diffusers say it, also a quantized one, without parameters."""
    like = model if hasattr(model, "device") and hasattr(model, "dtype") else next(model.parameters())
    return like.device, like.dtype


class SamplingPipeline:
    """A bare transformer as a pipeline with the call of diffusers' ``DiTPipeline``, without a VAE."""

    def __init__(self, transformer: nn.Module, sampling: Sampling) -> None:
        self.transformer = transformer
        self.sampling = sampling
        self.scheduler = sampling.scheduler(50)

    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 1.5,
        generator: torch.Generator | None = None,
        num_inference_steps: int = 50,
    ) -> Tensor:
        classes = self.sampling.null_label
        if odd := [label for label in class_labels if not 0 <= label <= classes]:
            raise ArgumentError(f"class {odd[0]} is asked for; the model has classes 0 to {classes - 1}")
        device, dtype = _place(self.transformer)
        denoise = as_denoiser(self.transformer)

        def denoiser(x: Tensor, t: Tensor, y: Tensor) -> Tensor:  # where the transformer is, and in its precision
            return denoise(x.to(device, dtype), t.to(device), y.to(device)).to(x)

        return sample(
            denoiser,
            self.sampling,
            torch.tensor(class_labels),
            steps=num_inference_steps,
            guidance=guidance_scale,
            generator=generator,
        )
