"""Cells of a table: read from the folder, or computed from what cells share."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ptq4dit_ao._formats import TensorFormat
from ptq4dit_ao._paths import check_room
from ptq4dit_ao._progress import OnStage, of_stage
from ptq4dit_ao._version import __version__, installed_version
from ptq4dit_ao.calibration import Sampling
from ptq4dit_ao.choices import Sampler
from ptq4dit_ao.errors import ArgumentError, PTQ4DiTError
from ptq4dit_ao.evaluation.baseline import OWN, Baseline, baseline_of, given_reference_features, network_for
from ptq4dit_ao.evaluation.environment import environment
from ptq4dit_ao.evaluation.result import EvaluationRow, finite
from ptq4dit_ao.evaluation.run import CORRECTED
from ptq4dit_ao.evaluation.table.cells import MODELS, Json, as_key, model_digest, models_of, read_cell, write_cell
from ptq4dit_ao.evaluation.table.settings import FLOAT, TableSettings, method_recipes
from ptq4dit_ao.metrics.perceptual import check_lpips
from ptq4dit_ao.recipe import Recipe
from ptq4dit_ao.workflow.checks import check_dtype, check_overrides, least_bytes
from ptq4dit_ao.workflow.correction import fit_correction
from ptq4dit_ao.workflow.image_sampling import NOISE_SEED, ImageSampling, decoder
from ptq4dit_ao.workflow.main_job import quantize
from ptq4dit_ao.workflow.models import load_model
from ptq4dit_ao.workflow.quantized_model import load_quantized
from ptq4dit_ao.workflow.samples import check_recording, recorded_samples

ALL = "all cells"
"""Name of the stage that counts over the whole table."""
_PACKAGES = ("torch", "torchao", "diffusers")
IMAGES = TensorFormat(name="float images", version=2, error=ArgumentError, remedy="remove it to sample them again")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row of a table before it is measured."""

    steps: int
    method: str = FLOAT
    bits: str | None = None
    recipe: Recipe | None = None
    """Recipe of the method; None for the float model, as for the bits."""
    model: str = ""
    """Name of the quantized model. Methods that differ only in their noise correction share one."""

    @property
    def name(self) -> str:
        """Name of the cell, such as ``paper-w4a8-50``, or ``float32-50`` for the float model."""
        return "-".join([self.method, *filter(None, [self.bits]), str(self.steps)])

    @property
    def model_recipe(self) -> Recipe | None:
        """Recipe of the quantized model, without the noise correction, which takes place in the scheduler."""
        if self.recipe is None:
            return None
        off = self.recipe.noise_correction.model_copy(update={"images": 0})
        return self.recipe.model_copy(update={"noise_correction": off})


class TableRunner:
    """Shared parts of a table's cells: the float model, its images, reference statistics and quantized models.

    Args:
        settings: settings of the table.
        folder: folder of the table.
        on_progress: called with ``(stage, done, total)`` as stages advance, and with the stage :data:`ALL` over all
            cells.

    Raises:
        PTQ4DiTError: see :func:`make_table`.
    """

    def __init__(self, settings: TableSettings, folder: Path, on_progress: OnStage) -> None:
        self._recipes = method_recipes(settings)
        model = load_model(settings.model)
        if model.sampling is None:
            raise ArgumentError(f"{model.name} is not class-conditional; a table compares class-conditional DiTs")
        own: Sampler = "ddpm" if model.sampling.predicts == "noise" else model.sampling.sampler
        self.settings = settings = dataclasses.replace(settings, sampler=settings.sampler or own)
        self.folder = folder
        self.model = model.drawn_by(settings.sampler)
        assert self.model.sampling is not None
        self._sampling: Sampling = self.model.sampling
        for steps in settings.steps:
            self._sampling.check_steps(steps)  # before the long part, which too many steps would waste
        self._check_recipes()
        self._decode = decoder(self.model, self._sampling)
        vae = getattr(self.model.pipeline, "vae", None)
        self._digest = model_digest(self.model.transformer, None if self._decode is None else vae)
        if settings.lpips is not None:
            check_lpips(settings.lpips, self._image_sampling(settings.steps[0]).pixels)
        check_room(folder, self._least_bytes())
        self.network = network_for(self.model, settings.features, settings.reference, settings.samples)
        kept = None
        if settings.reference is None or settings.reference.suffix != ".safetensors":
            kept = folder / "reference.safetensors"
        reading = of_stage(on_progress, "reference set")
        try:
            self.given = given_reference_features(self.model, self.network, settings.reference, kept, reading)
        except ArgumentError as error:
            if kept is None or not kept.exists():
                raise
            raise ArgumentError(f"{error}: give the table another folder (output=...)") from error
        self._baseline: Baseline | None = None
        self._failed: dict[str, PTQ4DiTError] = {}
        self._on_progress = on_progress
        self._before = 0
        self._all = sum(self._image_sampling(cell.steps).units for cell in self.cells() if self.found(cell) is None)

    def _check_recipes(self) -> None:
        """Check before the long part that the recipes fit the model and the backend."""
        check_dtype(self.model.transformer, self.settings.backend)
        for bits in self.settings.bits:
            for method, base in self._recipes.items():
                recipe = self.settings.recipe(base, bits)
                try:
                    check_recording(self.model, recipe, ("calibration", "evaluation"))
                    check_overrides(self.model.transformer, recipe)
                except PTQ4DiTError as error:
                    raise type(error)(f"method {method!r}: {error}") from error

    def _least_bytes(self) -> int:
        """Lower bound of the bytes on disk for missing quantized models and images of the float model."""
        missing = [cell for cell in self.cells() if not self._path(cell).exists()]
        models = {cell.model: cell.model_recipe for cell in missing if not self._saved(cell).exists()}
        images = 4 * self.settings.samples * self._sampling.channels * self._sampling.size**2
        quantized = (least_bytes(self.model.transformer, recipe) for recipe in models.values() if recipe is not None)
        return sum(quantized) + images * sum(cell.recipe is None for cell in missing)

    @property
    def reference(self) -> str | None:
        """Name of the reference set for distances; None without a feature network."""
        return self.given.name if self.given is not None else None if self.network is None else OWN

    def cells(self) -> Iterator[Cell]:
        """Cells in the order of the rows: by steps, the float model first, then by bits and methods."""
        models = models_of(self.folder)
        for steps in self.settings.steps:
            yield Cell(steps=steps)
            for bits in self.settings.bits:
                for method, base in self._recipes.items():
                    cell = Cell(steps=steps, method=method, bits=bits, recipe=self.settings.recipe(base, bits))
                    made_of = as_key(self._made_of(cell.model_recipe))
                    yield dataclasses.replace(cell, model=models.setdefault(made_of, f"{method}-{bits}"))

    def found(self, cell: Cell) -> Json | None:
        """The stored result of a cell; None if there is none.

        Raises:
            ArgumentError: the cell, or its quantized model, was made with other settings.
        """
        if cell.recipe is not None:
            read_cell(self._about(cell), self._made_of(cell.model_recipe))
        return read_cell(self._path(cell), self._depends(cell))

    @torch.no_grad()
    def fill(self, cell: Cell) -> Json:
        """Compute a cell and store it.

        Raises:
            PTQ4DiTError: it cannot be computed.
        """
        about, notes = {}, []
        if cell.recipe is None:
            start = time.perf_counter()
            baseline = self._baseline_at(cell.steps)
            row, notes = baseline.float_row, list(baseline.notes)
        else:
            about = self._quantize(cell)
            baseline = self._baseline_at(cell.steps)
            start = time.perf_counter()
            row, corrected = self._measure(cell, cell.recipe, baseline)
            notes = [f"{cell.method}: {CORRECTED}"] if corrected else []
            if cell.recipe.attention.quantize:
                notes.append(f"{cell.method}: attention is quantized, too, to {cell.recipe.attention.bits} bits")
        seconds = {**about, "measure": round(time.perf_counter() - start, 2)}
        content = {"row": finite(dataclasses.asdict(row)), "seconds": seconds, "notes": notes}
        content["environment"] = environment()
        return write_cell(self._path(cell), self._depends(cell), content)

    def done(self, cell: Cell) -> None:
        """Count a newly computed cell, whether it succeeded or failed."""
        self._before += self._image_sampling(cell.steps).units
        self._on_progress(ALL, self._before, self._all)

    def _report_progress(self, stage: str, done: int, total: int) -> None:
        self._on_progress(stage, done, total)
        if stage.startswith("sample "):
            self._on_progress(ALL, self._before + done, self._all)

    def _quantize(self, cell: Cell) -> dict[str, float]:
        """Make sure that the quantized model is in the folder, and return the seconds that quantization took."""
        if cell.model in self._failed:
            raise self._failed[cell.model]
        recipe = cell.model_recipe
        assert recipe is not None
        about, depends = self._about(cell), self._made_of(recipe)
        found = read_cell(about, depends)
        if found is None or not self._saved(cell).is_dir():
            start = time.perf_counter()
            try:
                quantize(self.model, recipe, self._saved(cell), grids=False, on_progress=self._report_progress)
            except PTQ4DiTError as error:
                self._failed[cell.model] = error
                raise
            seconds = {"quantize": round(time.perf_counter() - start, 2)}
            found = write_cell(about, depends, {"seconds": seconds, "environment": environment()})
        taken: dict[str, float] = found["seconds"]
        return taken

    def _measure(self, cell: Cell, recipe: Recipe, baseline: Baseline) -> tuple[EvaluationRow, bool]:
        """The result of a cell, and whether noise was corrected in the scheduler."""
        quantized = dataclasses.replace(load_quantized(self._saved(cell)), recipe=recipe)
        fitting = of_stage(self._report_progress, "fit correction")
        correction = fit_correction(self.model, quantized.graph, recipe, cell.steps, fitting)
        recorded = recorded_samples(self.model, recipe, evaluate=True, on_progress=self._report_progress)
        lowered, lpips = quantized.lower(self.settings.backend), self.settings.lpips
        row = baseline.row(lowered, recipe, recorded, correction, self._report_progress, lpips=lpips)
        return row, correction is not None

    def _baseline_at(self, steps: int) -> Baseline:
        """Baseline at one step count.

        Only one is in memory at a time, and images sampled earlier are read from disk.
        """
        if self._baseline is not None and self._baseline.image_sampling.steps == steps:
            return self._baseline
        path, own = (self.folder / "float32" / f"{name}-{steps}.safetensors" for name in ("images", "statistics"))
        images = None
        if self.found(Cell(steps=steps)) is not None and path.exists():
            images = IMAGES.read(path)[1]["images"]
        else:  # the statistics are of images that are about to be sampled again
            own.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        cache = own if self.given is None else None
        self._baseline = baseline_of(
            self.model, self._image_sampling(steps), self.network, self.given, cache, images, self._report_progress
        )
        if images is None:
            IMAGES.write(path, {"images": self._baseline.images})
        return self._baseline

    def _image_sampling(self, steps: int) -> ImageSampling:
        settings = self.settings
        seed = NOISE_SEED + settings.seed
        return ImageSampling(
            sampling=self._sampling, samples=settings.samples, steps=steps, guidance=settings.guidance, seed=seed,
            decode=self._decode,
        )  # fmt: skip

    def _depends(self, cell: Cell) -> Json:
        image_sampling = self._image_sampling(cell.steps)
        return {
            **self._made_of(cell.recipe),
            "backend": None if cell.recipe is None else self.settings.backend,
            "sampling": self._sampling.to_dict(),
            **{name: getattr(image_sampling, name) for name in ("samples", "steps", "guidance", "seed")},
            "network": None if self.network is None else self.network.name,
            "reference": self.reference if self.given is None else self.given.statistics.checksum,
            **({} if self.settings.lpips is None else {"lpips": self.settings.lpips}),
        }

    def _made_of(self, recipe: Recipe | None) -> Json:
        """Settings that a quantized model depends on, without its float model's folder and its recipe's description."""
        versions = {"ptq4dit-ao": __version__, **{name: installed_version(name) for name in _PACKAGES}}
        asked = None if recipe is None else recipe.model_dump(mode="json", exclude={"model", "description"})
        return {"recipe": asked, "model": self._digest, "versions": versions}

    def _path(self, cell: Cell) -> Path:
        return self.folder / "cells" / f"{cell.name}.json"

    def _saved(self, cell: Cell) -> Path:
        return self.folder / MODELS / cell.model

    def _about(self, cell: Cell) -> Path:
        return self.folder / MODELS / f"{cell.model}.json"
