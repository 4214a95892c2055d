"""Baseline of an evaluation: the float model's predictions and images, and a reference set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ptq4dit_ao._progress import OnProgress, OnStage, ignore, of_stage
from ptq4dit_ao.calibration import CalibrationSamples, as_denoiser, as_function
from ptq4dit_ao.choices import LpipsNetwork
from ptq4dit_ao.errors import ArgumentError, MissingDependencyError
from ptq4dit_ao.evaluation.feature_networks import load_features
from ptq4dit_ao.evaluation.reference_set import ReferenceFeatures, ReferenceSet, read_reference, reference_features
from ptq4dit_ao.evaluation.result import EvaluationRow, SqnrEstimates
from ptq4dit_ao.lowering import LoweredModel
from ptq4dit_ao.lowering.backend import BACKENDS
from ptq4dit_ao.metrics import Distances, FeatureNetwork, image_errors, paired_error
from ptq4dit_ao.metrics.distribution import NEIGHBOURS
from ptq4dit_ao.ptqd import NoiseCorrection
from ptq4dit_ao.recipe import Recipe
from ptq4dit_ao.reference import DIGITS
from ptq4dit_ao.reference.train import load_digits
from ptq4dit_ao.workflow.image_sampling import ImageSampling
from ptq4dit_ao.workflow.models import LoadedModel

OWN = "what the float model draws"
"""Name of the reference set if there is no other: the float model's own images."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Baseline:
    """A float model and its images, with which quantized models are compared."""

    model: LoadedModel
    image_sampling: ImageSampling
    images: Tensor
    """Images of the float model, (samples, C, H, W) in [-1, 1]."""
    distances: Distances | None
    """Distances of these images; None if they are the reference set themselves, or there is no feature network."""
    reference_features: ReferenceFeatures | None
    notes: tuple[str, ...]

    @property
    def float_row(self) -> EvaluationRow:
        """Result of the float model itself."""
        return EvaluationRow(model="float32", execution="float", distances=self.distances)

    @torch.no_grad()
    def row(
        self,
        run: LoweredModel,
        recipe: Recipe,
        recorded: CalibrationSamples,
        correction: NoiseCorrection | None,
        on_progress: OnStage,
        *,
        lpips: LpipsNetwork | None = None,
    ) -> EvaluationRow:
        """Compare a quantized model with the float model, by its predictions on recorded inputs and by its images.

        With a network for ``lpips``, images are compared by that, too.
        """
        backend, integer = run.proof.backend, BACKENDS[run.proof.backend].integer

        def told(stage: str) -> OnProgress:
            return of_stage(on_progress, f"{stage} {backend}")

        sampling = self.image_sampling.sampling
        images = self.image_sampling.draw(sampling.denoiser(run), told("sample"), correction)
        batches = _counted(recorded, recipe.calibration.rows, told("eps"))
        exact = as_function(self.model.transformer, sampling)
        eps = paired_error(exact, run, batches, timestep_index=sampling.timestep_index)
        seed = self.image_sampling.seed
        return EvaluationRow(
            model=recipe.widths,
            execution="integer" if integer else "simulated",
            backend=backend,
            proof=str(run.proof) if integer else None,
            eps=SqnrEstimates.of(eps, seed),
            images=image_errors(self.images, images, lpips=lpips, seed=seed),
            distances=None
            if self.reference_features is None
            else self.reference_features.distances(images, told("features")),
        )


def baseline_of(
    model: LoadedModel,
    image_sampling: ImageSampling,
    network: FeatureNetwork | None,
    given: ReferenceFeatures | None,
    cache: str | Path | None = None,
    images: Tensor | None = None,
    on_progress: OnStage = ignore,
) -> Baseline:
    """Sample images with the float model and measure them.

    Args:
        model: the float model.
        image_sampling: settings of the images.
        network: feature network for distances; None if no distances are measured.
        given: the reference set. Without it, the float model's images are the reference set.
        cache: file for the statistics of the float model's images, if they are the reference set.
        images: images that the float model sampled earlier.
        on_progress: called with ``(stage, done, total)`` as stages advance.
    """
    if images is None:
        denoiser = as_denoiser(model.transformer, image_sampling.sampling)
        images = image_sampling.draw(denoiser, of_stage(on_progress, "sample float32"))
    if given is not None:
        distances = given.distances(images, of_stage(on_progress, "features float32"))
        return Baseline(
            model=model,
            image_sampling=image_sampling,
            images=images,
            distances=distances,
            reference_features=given,
            notes=(),
        )
    if network is None:
        notes = ("no distances: there is no feature network; give one (features=...)",)
        return Baseline(
            model=model,
            image_sampling=image_sampling,
            images=images,
            distances=None,
            reference_features=None,
            notes=notes,
        )
    own = ReferenceSet(name=OWN, images=images)
    measure = reference_features(own, network, cache, of_stage(on_progress, "reference set"))
    notes = (f"no reference set: distances are to {OWN}",)
    return Baseline(
        model=model,
        image_sampling=image_sampling,
        images=images,
        distances=None,
        reference_features=measure,
        notes=notes,
    )


def network_for(
    model: LoadedModel, spec: str | None, reference: str | Path | None, samples: int
) -> FeatureNetwork | None:
    """The requested feature network, or that of a shipped model; None if there is neither.

    Raises:
        ArgumentError: a reference set is given without a network, the network cannot be loaded, or the images are too
            few.
    """
    spec = spec or (None if model.shipped is None else model.shipped.name)
    if spec is None and reference is not None:
        raise ArgumentError(f"{reference}: a reference set is measured with a feature network; give one (features=...)")
    if spec is not None and samples <= NEIGHBOURS:
        raise ArgumentError(f"{samples} images are too few for distances; sample at least {NEIGHBOURS + 1}")
    return None if spec is None else load_features(spec)


def given_reference_features(
    model: LoadedModel,
    network: FeatureNetwork | None,
    path: str | Path | None,
    cache: str | Path | None,
    on_progress: OnProgress = ignore,
) -> ReferenceFeatures | None:
    """Features of the requested reference set, or of a shipped model's training data; None if there is neither.

    Raises:
        ArgumentError: see :func:`read_reference` and :func:`reference_features`.
    """
    if network is None:
        return None
    if path is None:
        known = _known(model)
        return None if known is None else reference_features(known, network, cache, on_progress)
    found = read_reference(path)
    if isinstance(found, ReferenceSet):
        if len(found.images) <= NEIGHBOURS:
            raise ArgumentError(f"{path} has {len(found.images)} images; distances need at least {NEIGHBOURS + 1}")
        return reference_features(found, network, cache, on_progress)
    if cache is not None:
        raise ArgumentError(f"cache {cache}: the reference {path} is statistics already; leave one of them out")
    return ReferenceFeatures(name=Path(path).name, network=network, statistics=found.check(str(path), network.name))


def _known(model: LoadedModel) -> ReferenceSet | None:
    """Training data of the shipped digits model, if it is that model and scikit-learn is installed."""
    if model.shipped is not DIGITS:
        return None
    try:
        return ReferenceSet(name=DIGITS.data, images=load_digits()[0])
    except MissingDependencyError:
        return None


def _counted(samples: CalibrationSamples, rows: int, on_progress: OnProgress) -> Iterator[tuple[Tensor, ...]]:
    done = 0
    for batch in samples.batches(rows):
        yield batch
        done += len(batch[0])
        on_progress(done, len(samples))
