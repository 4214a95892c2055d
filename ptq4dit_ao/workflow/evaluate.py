"""Evaluate a quantized model: paired with its float model first, then as a source of images.

Paired figures (equal inputs, or equal noise, through both models) show what quantization did, with little noise of
their own. Distances to a reference set show whether it matters; they need many images.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ptq4dit_ao.calibration import CalibrationSamples, Sampling, as_denoiser, sample
from ptq4dit_ao.calibration.sampling import Denoiser
from ptq4dit_ao.errors import ArgumentError, MissingDependencyError
from ptq4dit_ao.evaluation import FeatureNetwork, image_errors, paired_error
from ptq4dit_ao.evaluation.distribution import NEIGHBOURS
from ptq4dit_ao.lowering.backend import BACKENDS, choose_backend
from ptq4dit_ao.reference.train import load_digits
from ptq4dit_ao.workflow.environment import environment
from ptq4dit_ao.workflow.evaluation_result import EvaluationResult, EvaluationRow, SqnrEstimates
from ptq4dit_ao.workflow.features import DIGITS, load_features
from ptq4dit_ao.workflow.models import REFERENCE, LoadedModel, load_model
from ptq4dit_ao.workflow.quantized_model import QuantizedModel, load_quantized
from ptq4dit_ao.workflow.reference_set import ReferenceSet, Yardstick, read_reference, yardstick
from ptq4dit_ao.workflow.samples import OnProgress, recorded_samples

OnCount = Callable[[int, int], None]
"""``(done, in all)``."""

BATCH = 100
"""Images that are drawn at once."""


@torch.no_grad()
def evaluate(
    directory: str | Path,
    model: str | None = None,
    *,
    backends: Sequence[str] = ("reference",),
    samples: int = 200,
    steps: int = 50,
    seed: int = 0,
    features: str | None = None,
    reference: str | Path | None = None,
    cache: str | Path | None = None,
    on_progress: OnProgress = lambda *_: None,
) -> EvaluationResult:
    """Evaluate a saved quantized model that knows how it is sampled.

    Args:
        directory: as ``save_quantized`` wrote it.
        model: the float model, as for :func:`load_model`; what the recipe names if not given.
        backends: what executes it; each has a row of its own.
        samples: images that each model draws, of all classes in turn.
        steps: of the sampler.
        seed: of noise and intervals. The predicted noise is compared on the recipe's evaluation samples.
        features: as for :func:`load_features`. Without it, the shipped digits model has its classifier, and of other
            models no distances are measured.
        reference: as for :func:`read_reference`. Without it, the shipped digits model has scikit-learn's digits, where
            that is installed; otherwise what the float model draws is the reference.
        cache: a file that keeps the statistics of the reference; read if it exists.
        on_progress: called as stages advance.

    Raises:
        ArgumentError: the float model or its sampling is unknown, it draws latents, or an option is wrong.
        PTQ4DiTError: see :func:`load_quantized`, :func:`load_model` and :func:`~ptq4dit_ao.lower`.
    """
    for name in backends:
        choose_backend(name)  # before the long part, which a wrong name must not waste
    quantized = load_quantized(directory)
    loaded, sampling = _float_model(directory, quantized, model)
    network = _network(loaded, features, reference or cache, samples)
    recipe = quantized.recipe

    def told(stage: str) -> OnCount:
        return functools.partial(on_progress, stage)

    def draw(denoiser: Denoiser, name: str) -> Tensor:
        guidance = recipe.calibration.guidance
        return _draw(denoiser, sampling, samples, steps, guidance, seed, told(f"sample {name}"))

    measure = None if network is None else _given(loaded, network, reference, cache, told("reference set"))
    lowered = [quantized.lower(name) for name in dict.fromkeys(backends)]
    recorded = recorded_samples(loaded, recipe, evaluate=True, on_progress=on_progress)
    float_model = as_denoiser(loaded.transformer)
    float_images = draw(float_model, "float32")
    float_distances = None if measure is None else measure.distances(float_images, told("features float32"))
    rows, notes = [EvaluationRow(model="float32", execution="float", distances=float_distances)], []
    if network is None:
        notes.append("no distances: there is no feature network; give one (--features)")
    elif measure is None:
        own = ReferenceSet(name="what the float model draws", images=float_images)
        measure = yardstick(own, network, cache, told("reference set"))
        notes.append("no reference set: distances are to what the float model draws")
    for run in lowered:
        backend, integer = run.proof.backend, BACKENDS[run.proof.backend].integer
        images = draw(run, backend)
        batches = _counted(recorded, recipe.calibration.rows, told(f"eps {backend}"))
        row = EvaluationRow(
            model=f"W{recipe.weights.bits}A{recipe.activations.bits}",
            execution="integer" if integer else "simulated",
            backend=backend,
            proof=str(run.proof) if integer else None,
            eps=SqnrEstimates.of(paired_error(float_model, run, batches), seed),
            images=image_errors(float_images, images, seed=seed),
            distances=None if measure is None else measure.distances(images, told(f"features {backend}")),
        )
        rows.append(row)
    return EvaluationResult(
        model=loaded.name,
        rows=tuple(rows),
        network=None if network is None else network.name,
        is_inception=network is not None and network.is_inception,
        reference=None if measure is None else measure.name,
        reference_images=None if measure is None else len(measure.statistics.pooled),
        samples=samples,
        steps=steps,
        guidance=recipe.calibration.guidance,
        seed=seed,
        eps_seed=recipe.evaluation.seed,
        notes=tuple(notes),
        environment=environment(),
    )


def _float_model(directory: str | Path, quantized: QuantizedModel, spec: str | None) -> tuple[LoadedModel, Sampling]:
    if quantized.sampling is None:
        raise ArgumentError(f"{directory} was saved without the way to sample it, so no images can be compared")
    sampling = Sampling(**quantized.sampling)  # type: ignore[arg-type]  # written by to_dict
    if sampling.channels not in (1, 3):
        raise ArgumentError(
            f"{directory} denoises {sampling.channels}-channel latents; only what draws images is compared"
        )
    spec = spec or quantized.recipe.model
    if spec is None:
        raise ArgumentError(f"{directory} does not know its float model; say which with --model")
    return load_model(spec), sampling


def _network(model: LoadedModel, spec: str | None, reference: str | Path | None, samples: int) -> FeatureNetwork | None:
    spec = spec or (DIGITS if model.name == REFERENCE else None)
    if spec is None and reference is not None:
        raise ArgumentError(f"reference {reference} needs a feature network to be measured with; give one (--features)")
    if spec is not None and samples <= NEIGHBOURS:
        raise ArgumentError(f"{samples} images are too few for distances; draw at least {NEIGHBOURS + 1}")
    return None if spec is None else load_features(spec)


def _given(
    model: LoadedModel, network: FeatureNetwork, path: str | Path | None, cache: str | Path | None, on_batch: OnCount
) -> Yardstick | None:
    """The reference set that was named, or is known of the model."""
    if path is None:
        known = _known(model)
        return None if known is None else yardstick(known, network, cache, on_batch)
    found = read_reference(path)
    if isinstance(found, ReferenceSet):
        return yardstick(found, network, cache, on_batch)
    if cache is not None:
        raise ArgumentError(f"cache {cache}: the reference {path} is statistics already; leave one of them out")
    return Yardstick(name=Path(path).name, network=network, statistics=found.check(str(path), network.name))


def _known(model: LoadedModel) -> ReferenceSet | None:
    """What the shipped model was trained on, if it is that one and scikit-learn is installed."""
    if model.name != REFERENCE:
        return None
    try:
        return ReferenceSet(name="scikit-learn's digits", images=load_digits()[0])
    except MissingDependencyError:
        return None


def _draw(
    denoiser: Denoiser, sampling: Sampling, count: int, steps: int, guidance: float, seed: int, on_step: OnCount
) -> Tensor:
    """(count, C, H, W) of all classes in turn, from noise that depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    batches = (torch.arange(count) % sampling.null_label).split(BATCH)
    images = []
    for done, labels in enumerate(batches):
        report = functools.partial(_report, on_step, done * steps, len(batches) * steps)
        images.append(
            sample(denoiser, sampling, labels, steps=steps, guidance=guidance, generator=generator, on_step=report)
        )
    return torch.cat(images)


def _report(on_step: OnCount, before: int, total: int, done: int, _steps: int) -> None:
    on_step(before + done, total)


def _counted(samples: CalibrationSamples, rows: int, on_row: OnCount) -> Iterator[tuple[Tensor, ...]]:
    done = 0
    for batch in samples.batches(rows):
        yield batch
        done += len(batch[0])
        on_row(done, len(samples))
