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
from ptq4dit_ao.calibration.flow import TEXT_CLASSES, TIMESTEP, flow_inputs, to_images
from ptq4dit_ao.choices import BETA_SCHEDULES, SAMPLERS, BetaSchedule, Sampler
from ptq4dit_ao.errors import ArgumentError, ArtifactError, check_choice

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A function ``(x (N,C,H,W), t (N,), y (N,)) -> predicted noise or velocity (N,C or 2C,H,W)``.

DDIM ignores a learned variance.
"""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Properties of a model that a sampler needs. They are stored with a quantized model."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    channels: int
    """Number of channels of the images or latents."""
    size: int
    """Height and width of the images or latents."""
    null_label: int
    """Label of the unconditional prediction in classifier-free guidance."""
    clip: bool
    """Whether the model denoises pixels in [-1, 1], so that every prediction is clipped.

    Otherwise it denoises latents.
    """
    train_timesteps: int = 1000
    """Number of timesteps of the noise schedule that the model was trained with."""
    beta_schedule: BetaSchedule = "linear"
    """Name of that noise schedule."""
    learned_variance: bool = False
    """Whether the model also predicts the variance of DDPM's noise, as a value between its bounds."""
    sampler: Sampler = "ddim"
    """Name of the sampler: DDIM as in diffusers' pipelines, DDPM as in the DiT authors' code, or ``flow``.

    Flow matching's Euler steps are for models that predict velocity, and no other sampler is.
    """
    patch: int | None = None
    """Side of the patches that a Flux transformer receives as tokens; None if the model receives images."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ArgumentError: no model has such values.
        """
        for name in ("channels", "size", "null_label", "train_timesteps"):
            value = getattr(self, name)
            if not _is_whole(value) or value < 1:
                raise ArgumentError(f"{name} of a sampling is {value!r}; give a whole number of at least 1")
        check_choice("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        check_choice("sampler", self.sampler, SAMPLERS)
        if (self.patch is None) == (self.sampler == "flow"):
            raise ArgumentError(
                f"sampler is {self.sampler!r} and patch is {self.patch!r}; a model that predicts velocity has 'flow' "
                "and the side of its patches, and no other has either"
            )
        if self.patch is not None:
            if not _is_whole(self.patch) or self.patch < 1 or self.size % self.patch:
                raise ArgumentError(f"patch is {self.patch!r}; give a whole number that divides the size {self.size}")
            if self.null_label >= TEXT_CLASSES:
                raise ArgumentError(
                    f"null_label is {self.null_label}; models that read classes as text have one below {TEXT_CLASSES}"
                )

    @classmethod
    def of(cls, transformer: nn.Module, *, clip: bool = False) -> Sampling:
        """Properties of a diffusers ``DiTTransformer2DModel``, read from its config.

        Raises:
            ArgumentError: it is not class-conditional.
        """
        config: Any = getattr(transformer, "config", None)
        if getattr(config, "num_embeds_ada_norm", None) is None:
            raise ArgumentError(
                f"{type(transformer).__name__} is not class-conditional: its config has no num_embeds_ada_norm; sample "
                "with its own pipeline"
            )
        return cls(
            channels=config.in_channels,
            size=config.sample_size,
            null_label=config.num_embeds_ada_norm,
            clip=clip,
            learned_variance=config.out_channels == 2 * config.in_channels,
        )

    def to_dict(self) -> dict[str, object]:
        """JSON-safe form, for :meth:`from_dict`. Models without patches have the form of earlier versions."""
        return {name: value for name, value in asdict(self).items() if name != "patch" or value is not None}

    @classmethod
    def from_dict(cls, data: object) -> Sampling:
        """Read a dict that :meth:`to_dict` made.

        Raises:
            ArtifactError: it is something else.
        """
        try:
            return TypeAdapter(cls).validate_json(json.dumps(data))
        except ValidationError as error:
            raise ArtifactError(
                f"the way to sample is {data!r}, not one that this version reads; quantize again"
            ) from error

    @property
    def guided_channels(self) -> int:
        """Number of guided channels of the noise, from the first on: all with DDIM, and the first three with DDPM.

        The DiT authors' code does not guide the fourth channel of a latent.
        """
        return min(3, self.channels) if self.sampler == "ddpm" else self.channels

    def by(self, sampler: str | None) -> Sampling:
        """The same model with another sampler; None keeps its own.

        Raises:
            ArgumentError: there is no such sampler, or it is for models that predict something else.
        """
        if sampler is None:
            return self
        check_choice("sampler", sampler, SAMPLERS)
        fitting = [repr(name) for name in SAMPLERS if (name == "flow") == (self.sampler == "flow")]
        if repr(sampler) not in fitting:
            raise ArgumentError(
                f"sampler {sampler!r} does not fit a model that predicts {self.predicts}; choose {' or '.join(fitting)}"
            )
        return replace(self, sampler=sampler)  # type: ignore[arg-type]  # checked

    @property
    def predicts(self) -> str:
        """Name of what the model predicts: ``noise``, or flow matching's ``velocity``."""
        return "velocity" if self.sampler == "flow" else "noise"

    @property
    def timestep_index(self) -> int:
        """Position of the timestep among the tensors that the model takes."""
        return 1 if self.patch is None else TIMESTEP

    def denoiser(self, run: Callable[..., Any]) -> Denoiser:
        """A denoiser from a function of the tensors that the model takes, such as a graph or a lowered model."""
        patch = self.patch
        if patch is None:
            return run
        return lambda x, t, y: to_images(run(*flow_inputs(x, t, y, patch)), patch, x.shape)

    def check_steps(self, steps: int) -> None:
        """Check that a sampler can take this number of steps.

        Raises:
            ArgumentError: it cannot.
        """
        if not _is_whole(steps) or not 1 <= steps <= self.train_timesteps:
            raise ArgumentError(
                f"steps is {steps}; it must lie between 1 and the model's {self.train_timesteps} timesteps"
            )

    def scheduler(self, steps: int) -> Any:
        """diffusers' scheduler of the sampler, set to ``steps`` steps.

        DDPM goes through timesteps from 0 to the last one, evenly spaced and rounded. It adds noise of the model's own
        variance, if the model predicts one.

        Raises:
            ArgumentError: there are fewer timesteps than steps, or no steps.
        """
        self.check_steps(steps)
        diffusers = require("diffusers", extra="diffusers")
        if self.sampler == "flow":
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=self.train_timesteps)
            scheduler.set_timesteps(steps)
            return scheduler
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
    """The scheduler's timestep, ()."""
    x: Tensor
    """The sample before the step, (N, C, H, W)."""
    eps: Tensor
    """The noise or velocity predicted for ``x``, after guidance, (N, C, H, W)."""
    result: Tensor
    """The sample after the step, (N, C, H, W)."""


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
    """Sample one image per label: (N,) -> (N, C, H, W). Equal generators start from equal noise.

    Args:
        denoiser: the model that predicts the noise or velocity.
        sampling: its properties.
        labels: class labels, or ``sampling.null_label`` for unconditional images.
        steps: number of sampling steps.
        guidance: classifier-free guidance scale; 1 is no guidance, and 0 ignores the label.
        generator: generator of the noise, on the CPU.
        scheduler: a scheduler of diffusers with ``prediction_type`` epsilon, or a wrapper of one; for velocity, that
            of flow matching. The default is that of ``sampling``.
        on_progress: called with (steps done, total steps).

    Raises:
        ArgumentError: the sampler cannot take this number of steps, or an argument is invalid.
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
    """The steps in which :func:`sample` generates its images."""
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
    """A scheduler of diffusers set to ``steps`` steps; the sampler's own if ``scheduler`` is None.

    Raises:
        ArgumentError: it cannot take this number of steps, or does not fit a model that predicts noise from unscaled
            samples, or velocity.
    """
    if scheduler is None:
        return sampling.scheduler(steps)
    sampling.check_steps(steps)
    name, config = type(scheduler).__name__, cast(Any, getattr(scheduler, "config", None))
    if sampling.sampler == "flow":
        check_choice("a scheduler for velocity", name, ("FlowMatchEulerDiscreteScheduler",))
        scheduler.set_timesteps(steps)
        return scheduler
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
    """Check the labels, the guidance scale and the generator.

    Raises:
        ArgumentError: it is not possible to sample with them.
    """
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
            f"guidance is {guidance:g}, and the correction of the scheduler was fitted at {fitted:g}; sample with "
            "that, or fit one for this"
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
    """The guided noise with the learned variance, if there is one.

    Channels without guidance are the conditional half's.
    """
    y = torch.cat([labels, torch.full_like(labels, sampling.null_label)])
    conditional, unconditional = denoiser(torch.cat([x, x]), t.expand(len(y)), y).float().chunk(2)
    guided = sampling.guided_channels
    eps, other = conditional[:, :guided], unconditional[:, :guided]
    return torch.cat([other + guidance * (eps - other), conditional[:, guided:]], dim=1)


def as_function(transformer: nn.Module, sampling: Sampling | None = None) -> Callable[..., Tensor]:
    """A diffusers transformer as a function of the tensors that its graph takes, by position. The default is a DiT."""
    if sampling is None or sampling.patch is None:
        return lambda x, t, y: transformer(x, timestep=t, class_labels=y).sample
    return lambda *inputs: transformer(*inputs).sample


def as_denoiser(transformer: nn.Module, sampling: Sampling | None = None) -> Denoiser:
    """A diffusers transformer as a function of images, timesteps and labels. The default is a DiT."""
    called = as_function(transformer, sampling)
    return called if sampling is None else sampling.denoiser(called)


def _place(model: Any) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a model. Models of diffusers have these attributes, and quantized ones have no parameters."""
    like = model if hasattr(model, "device") and hasattr(model, "dtype") else next(model.parameters())
    return like.device, like.dtype


class SamplingPipeline:
    """A bare transformer as a pipeline with the call of diffusers' ``DiTPipeline``, but without a VAE."""

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
        """Sample one image per class label; see :func:`sample`."""
        classes = self.sampling.null_label
        if odd := [label for label in class_labels if not 0 <= label <= classes]:
            raise ArgumentError(f"class {odd[0]} is asked for; the model has classes 0 to {classes - 1}")
        device, dtype = _place(self.transformer)
        denoise = as_denoiser(self.transformer, self.sampling)

        def denoiser(x: Tensor, t: Tensor, y: Tensor) -> Tensor:  # on the transformer's device and in its dtype
            return denoise(x.to(device, dtype), t.to(device), y.to(device)).to(x)

        return sample(
            denoiser,
            self.sampling,
            torch.tensor(class_labels),
            steps=num_inference_steps,
            guidance=guidance_scale,
            generator=generator,
        )
