"""What a table may be asked for, and when the paper's figures stand beside ours."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from ptq4dit_ao.cli.main import build_parser
from ptq4dit_ao.errors import ArgumentError, RecipeError
from ptq4dit_ao.evaluation.table import TableResult, TableSettings
from ptq4dit_ao.evaluation.table.paper import paper_figures
from ptq4dit_ao.evaluation.table.result import Row
from ptq4dit_ao.evaluation.table.settings import method_recipes
from ptq4dit_ao.evaluation.table.write import markdown
from ptq4dit_ao.metrics import FeatureNetwork
from ptq4dit_ao.recipe import Recipe, Weights, load_recipe
from ptq4dit_ao.workflow.models import LoadedModel

ASKED = TableSettings(model="m", methods=("paper",), bits=("w4a8",), steps=(50,), samples=10_000, sampler="ddpm")
INCEPTION = FeatureNetwork(name="inception-2015-12-05", read=lambda images: None)
XL = {
    "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "patch_size": 2, "sample_size": 32,
    "num_embeds_ada_norm": 1000,
}  # fmt: skip


class DiTTransformer2DModel(nn.Module):
    """What the paper's model is called."""

    def __init__(self, **config: int) -> None:
        super().__init__()
        self.config = {**XL, **config}


def loaded(vae: bool = True, folder: Path | None = Path("DiT-XL-2-256"), **config: int) -> LoadedModel:
    pipeline = SimpleNamespace(vae=object()) if vae else SimpleNamespace()
    return LoadedModel(name="m", transformer=DiTTransformer2DModel(**config), pipeline=pipeline, folder=folder)


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ()}, r"there are no methods; give at least one \(methods=...\)"),
        ({"bits": ("w8a8", "w8a8")}, "bits has 'w8a8' twice; leave one out"),
        ({"bits": ("w9a8",)}, "bits 'w9a8' are not like 'w4a8'"),
        ({"bits": ("8/8",)}, "bits '8/8' are not like 'w4a8'"),
        ({"samples": 0}, "samples is 0; it must lie between 1 and 2147483648"),
        ({"seed": -1}, "seed is -1; it must lie between 0 and 2147483648"),
        ({"seed": 2**32 - 1}, "seed is 4294967295; it must lie between 0 and 2147483648"),
        ({"guidance": -1.0}, "guidance is -1.0; it must lie between 0 and 2147483648"),
        ({"adaround_steps": 0}, "adaround_steps is 0; it must be at least 1"),
        ({"backend": "auto"}, "backend is 'auto'; choose one of "),
        ({"layers": "all"}, "layers is 'all'; choose one of safe, paper"),
        ({"sampler": "dpm"}, "sampler is 'dpm'; choose one of ddim, ddpm"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ArgumentError, match=message):
        dataclasses.replace(ASKED, **changes)


@pytest.mark.parametrize("methods", [("auto", "my recipe.yaml"), ()])
def test_the_command_asks_for_the_same(methods):
    asked = dataclasses.replace(
        ASKED, methods=methods, steps=(100, 50), seed=2, adaround_steps=500, guidance=4.0, features="a:b",
        reference=Path("real.npz"), ablation=True, layers="safe", backend="fbgemm",
    )  # fmt: skip
    words = shlex.split(asked.command)
    args = vars(build_parser().parse_args([*words[1:], "--output", "out"]))
    assert TableSettings(**{field.name: args[field.name] for field in dataclasses.fields(asked)}) == asked


def test_all_draws_move_with_the_seed_and_bits_are_the_tables(tmp_path):
    (tmp_path / "mine.yaml").write_text("version: 1\nextends: ptqd\nweights: {bits: auto, average_bits: 5}\n")
    found = dataclasses.replace(ASKED, seed=1000).recipe(load_recipe(tmp_path / "mine.yaml"), "w4a8")
    assert (found.calibration.seed, found.evaluation.seed, found.noise_correction.seed) == (1000, 2000, 3000)
    assert Recipe.from_dict(found.to_dict()).weights == Weights(bits=4)


def test_methods_are_recipes_by_name_or_path(tmp_path):
    (tmp_path / "mine.yaml").write_text("version: 1\nextends: fast\n")
    asked = dataclasses.replace(ASKED, methods=("auto", "paper", "ptqd", str(tmp_path / "mine.yaml")))
    recipes = method_recipes(asked)
    assert list(recipes) == ["auto", "paper", "ptqd", "mine.yaml"] and recipes["auto"] == load_recipe("auto")
    assert recipes["paper"].balance.method == "ssc" and recipes["ptqd"].noise_correction.images
    assert recipes["mine.yaml"].rounding == load_recipe("fast").rounding
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.yaml").write_text("version: 1\n")
    twice = dataclasses.replace(ASKED, methods=tuple(str(p) for p in tmp_path.rglob("mine.yaml")))
    with pytest.raises(ArgumentError, match=r"two methods are called 'mine.yaml'; rename one of the files"):
        method_recipes(twice)
    with pytest.raises(RecipeError, match="recipe 'papre'"):
        method_recipes(dataclasses.replace(ASKED, methods=("papre",)))


def test_a_cells_recipe_differs_in_method_and_bits_alone():
    recipe = dataclasses.replace(ASKED, seed=7, guidance=4.0).recipe(load_recipe("fast"), "w4a6")
    assert (recipe.weights.bits, recipe.activations.bits, recipe.layers, recipe.model) == (4, 6, "paper", "m")
    calibration = recipe.calibration
    assert (calibration.samples, calibration.guidance, calibration.seed) == (16, 4.0, 7)
    assert recipe.balance == load_recipe("fast").balance and recipe.rounding == load_recipe("fast").rounding


def test_only_methods_that_learn_have_steps_of_learning():
    asked = dataclasses.replace(ASKED, adaround_steps=500)
    assert asked.recipe(load_recipe("paper_w8a8"), "w4a8").rounding.steps == 500
    assert asked.recipe(load_recipe("fast"), "w4a8").rounding == load_recipe("fast").rounding


def test_the_ablation_adds_one_part_after_another():
    recipes = method_recipes(dataclasses.replace(ASKED, methods=(), ablation=True))
    assert list(recipes) == ["base", "+CSB", "+SSC", "+ours"]
    assert [recipe.balance.method for recipe in recipes.values()] == ["none", "mean", "ssc", "auto"]
    assert recipes["+ours"].rounding == load_recipe("auto").rounding
    assert recipes["+ours"].weights == load_recipe("auto").weights.with_bits(recipes["base"].weights.bits)
    rest = [recipe.model_dump(exclude={"weights", "balance", "rounding"}) for recipe in recipes.values()]
    assert rest[1:] == rest[:-1] and recipes["base"].rounding == recipes["+SSC"].rounding


# -- the paper's figures ---------------------------------------------------------------------------------------------


def test_the_papers_figures_in_the_papers_setting():
    figures = paper_figures(loaded(), INCEPTION, True, ASKED)
    assert figures.of(50, "w4a8", "paper") == (9.17, 24.29, 179.95, 0.7052)
    assert figures.of(250, None, "float32") == (4.53, 17.93, 278.5, 0.8231)
    assert figures.of(100, "w8a8", "repq") == (5.2, 19.87, 254.7, 0.7929)
    assert [figures.of(250, "w4a8", name)[0] for name in ("base", "+CSB", "+SSC")] == [22.54, 8.17, 7.09]
    for other in ((50, "w4a4", "paper"), (20, "w4a8", "paper"), (50, "w4a8", "auto"), (100, "w4a8", "+CSB")):
        assert figures.of(*other) is None
    large = paper_figures(loaded(sample_size=64), INCEPTION, True, dataclasses.replace(ASKED, samples=5000))
    assert large.of(50, "w4a8", "ptqd") == (73.45, None, None, None) and large.of(50, "w8a8", "paper") is None


@pytest.mark.parametrize(
    ("model", "network", "has_reference", "changes"),
    [
        (loaded(num_layers=12), INCEPTION, True, {}),
        (loaded(num_embeds_ada_norm=10), INCEPTION, True, {}),
        (loaded(sample_size=8), INCEPTION, True, {}),
        (loaded(folder=None), INCEPTION, True, {}),
        (loaded(vae=False), INCEPTION, True, {}),
        (dataclasses.replace(loaded(), transformer=nn.Linear(1, 1)), INCEPTION, True, {}),
        (loaded(), None, True, {}),
        (loaded(), FeatureNetwork(name="digits classifier", read=INCEPTION.read), True, {}),
        (loaded(), INCEPTION, False, {}),
        (loaded(), INCEPTION, True, {"samples": 5000}),
        (loaded(), INCEPTION, True, {"guidance": 4.0}),
        (loaded(), INCEPTION, True, {"sampler": "ddim"}),
        (loaded(), INCEPTION, True, {"layers": "safe"}),
        (loaded(), INCEPTION, True, {"adaround_steps": 500}),
    ],
)
def test_the_papers_figures_nowhere_else(model, network, has_reference, changes):
    assert paper_figures(model, network, has_reference, dataclasses.replace(ASKED, **changes)) is None


@pytest.mark.parametrize("same_setting", [True, False])
def test_the_page_has_them_only_then(same_setting):
    paper = paper_figures(loaded(), INCEPTION, same_setting, ASKED)
    distances = {"frechet": 9.0, "spatial_frechet": 8.0, "inception_score": 7.0, "precision": 0.5, "recall": 0.4}
    row = Row(
        steps=50, bits="w4a8", method="paper", model="paper-w4a8",
        figures={"eps": None, "proof": None, "images": None, "distances": distances},
        paper=paper and paper.of(50, "w4a8", "paper"), seconds={"measure": 1.0}, notes=(), environment={"versions": {}},
    )  # fmt: skip
    result = TableResult(
        settings=ASKED, model="m", network=INCEPTION.name, is_inception=True, reference="imagenet.npz", rows=(row,),
        failed={}, paper=paper, environment={},
    )  # fmt: skip
    head, _, line = (text.strip("| ").split(" | ") for text in markdown(result).splitlines() if text.startswith("|"))
    assert head[9] == "FID (inception-2015-12-05)" and line[9:11] == ["9.000", "8.000"]
    if same_setting:
        assert head[14:] == [f"{name}, the paper (DDPM)" for name in ("FID", "sFID", "IS", "precision")]
        assert line[14:] == ["9.170", "24.29", "179.9", "0.7052"] and "* DDPM, guidance" in markdown(result)
    else:
        assert len(head) == len(line) == 14 and "the paper (DDPM)" not in markdown(result)
