"""Finding recipes and merging the files they extend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ptq4dit_ao.errors import RecipeError
from ptq4dit_ao.recipe import Balance, Override, Recipe, Weights, load_recipe, shipped_recipe_path

Write = Callable[[str, str], Path]
Refusal = Callable[[str], list[str]]

SHIPPED = "(`ptq4dit-ao recipes` lists the shipped ones)"


def test_an_empty_recipe_is_the_defaults(write: Write) -> None:
    assert load_recipe(write("x.yaml", "version: 1\n")) == Recipe()


def test_every_key_reaches_the_recipe(write: Write) -> None:
    path = write(
        "x.yaml",
        """\
        version: 1
        description: all keys
        model: package.module:function
        weights: {bits: auto, candidates: [3, 8, 5], average_bits: 4, levels: normal, group: 32}
        activations: {bits: 6}
        balance: {method: max, alpha: 1e-5, center: true, max_scale: 10, fold_form: bias, couple_blocks: true,
                  vector_multiply: false, min_variables: 2, verify: false}
        rounding: {method: gptq, ranges: output, cutting: 4, sequential: true}
        distillation: {steps: 11, minutes: 1.5}
        layers: paper
        overrides:
          - {pattern: "a.*", skip: true}
          - {pattern: b, weight_bits: 8, activation_bits: 7, balance: false}
        calibration: {timesteps: [0, 12.5], samples: 2, steps: 3, guidance: 0, sampler: ddpm, seed: 4, batch_size: 5,
                      prompts: [a cat], height: 256, sizes: [{width: 512, num_frames: 9}, {width: 256}]}
        evaluation: {timesteps: 5, samples: 6, seed: 7, leave_one_out: false}
        """,
    )
    recipe = load_recipe(str(path))
    assert (recipe.description, recipe.model, recipe.layers) == ("all keys", "package.module:function", "paper")
    assert recipe.weights.model_dump() == {
        "bits": "auto",
        "candidates": (3, 8, 5),
        "average_bits": 4.0,
        "group": 32,
        "levels": "normal",
    }
    assert recipe.weights.widths == (3, 5, 8) and recipe.activations.bits == 6
    assert recipe.balance == Balance(
        method="max",
        alpha=1e-5,
        center=True,
        max_scale=10.0,
        fold_form="bias",
        couple_blocks=True,
        vector_multiply=False,
        min_variables=2,
        verify=False,
    )
    assert recipe.overrides == (
        Override(pattern="a.*", skip=True),
        Override(pattern="b", weight_bits=8, activation_bits=7, balance=False),
    )
    assert recipe.calibration.model_dump() == {
        "timesteps": (0.0, 12.5),
        "samples": 2,
        "batch_size": 5,
        "steps": 3,
        "guidance": 0.0,
        "sampler": "ddpm",
        "prompts": ("a cat",),
        "height": 256,
        "width": None,
        "num_frames": None,
        "sizes": (
            {"height": None, "width": 512, "num_frames": 9},
            {"height": None, "width": 256, "num_frames": None},
        ),
        "seed": 4,
    }
    assert recipe.distillation.model_dump() == {"steps": 11, "minutes": 1.5}
    assert recipe.evaluation.model_dump() == {"timesteps": 5, "samples": 6, "seed": 7, "leave_one_out": False}


def test_extends_merges_mappings_and_replaces_the_rest(write: Write) -> None:
    write(
        "root.yaml",
        """\
        version: 1
        description: root
        balance: {alpha: 0.25, fold_form: bias}
        overrides: [{pattern: a, skip: true}, {pattern: b, skip: true}]
        calibration: {timesteps: [1, 2, 3], samples: 8}
        """,
    )
    write("middle.yaml", "version: 1\nextends: root.yaml\nweights: {bits: 4}\nbalance: {alpha: 0.75}\n")
    top = write(
        "top.yaml",
        """\
        version: 1
        extends: middle.yaml
        overrides: [{pattern: c, balance: false}]
        calibration: {timesteps: [4]}
        """,
    )
    recipe = load_recipe(top)
    assert recipe.description == "root"
    assert recipe.weights == Weights(bits=4)
    assert recipe.balance == Balance(alpha=0.75, fold_form="bias")
    assert recipe.overrides == (Override(pattern="c", balance=False),)
    assert (recipe.calibration.timesteps, recipe.calibration.samples) == ((4.0,), 8)


def test_extends_is_relative_to_the_file(write: Write, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write("base.yaml", "version: 1\nlayers: paper\n")
    assert load_recipe(write("sub/x.yaml", "version: 1\nextends: ../base.yaml\n")).layers == "paper"


@pytest.mark.parametrize("name", ["paper_w4a8", "paper_w4a8.yaml"])
def test_shipped_recipe_by_name(write: Write, name: str) -> None:
    by_path = load_recipe(shipped_recipe_path(name))
    assert load_recipe(name) == by_path
    assert load_recipe(write("x.yaml", f"version: 1\nextends: {name}\n")) == by_path


def test_a_file_wins_over_a_shipped_recipe(write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write("paper_w8a8.yaml", "version: 1\ndescription: mine\n")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("paper_w8a8.yaml").description == "mine"
    assert load_recipe(write("x.yaml", "version: 1\nextends: paper_w8a8.yaml\n")).description == "mine"
    assert load_recipe("paper_w8a8").description != "mine"


def test_an_error_names_the_file_in_which_it_stands(write: Write, refusal: Refusal) -> None:
    write("base.yaml", "version: 1\n\nbalance:\n  alpha: 2\n")
    top = "version: 1\nextends: base.yaml\nbalance:\n  max_scale: 0\n"
    assert refusal(top) == [
        "x.yaml:4: balance.max_scale: 0 is not allowed; it must be a number > 1",
        "base.yaml:4: balance.alpha: 2 is not allowed; it must be a number from 0 to 1 or auto",
    ]


def test_a_replaced_fault_of_the_base_is_still_told(write: Write, refusal: Refusal) -> None:
    write("base.yaml", "version: 1\nweights: {bits: 16}\n")
    (line,) = refusal("version: 1\nextends: base.yaml\nweights: {bits: 4}\n")
    assert line.startswith("base.yaml:2: weights.bits: 16 is not allowed")


def test_a_base_needs_its_version(write: Write, refusal: Refusal) -> None:
    write("base.yaml", "layers: paper\n")
    (line,) = refusal("version: 1\nextends: base.yaml\n")
    assert line.startswith("base.yaml: version: missing")


def test_a_base_that_is_not_yaml(write: Write, refusal: Refusal) -> None:
    write("base.yaml", "version: 1\nlayers: [\n")
    (line,) = refusal("version: 1\nextends: base.yaml\n")
    assert line.startswith("base.yaml:3: this is not YAML")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_cycle(write: Write, refusal: Refusal, size: int) -> None:
    names = ["x.yaml", *(f"{letter}.yaml" for letter in "ab"[: size - 1])]
    following = [*names[1:], names[0]]
    for name, base in zip(names[1:], following[1:], strict=True):
        write(name, f"version: 1\nextends: {base}\n")
    chain = " -> ".join([*names, "x.yaml"])
    assert refusal(f"version: 1\nextends: {following[0]}\n") == [
        f"{names[-1]}:2: extends: the files extend each other in a circle: {chain}; remove one 'extends'"
    ]


def test_missing_base_comes_with_the_other_problems(refusal: Refusal) -> None:
    assert refusal("version: 1\nextends: papr_w8a8.yaml\nlayers: 1\n") == [
        "x.yaml:3: layers: 1 is not allowed; it must be one of safe, paper",
        "x.yaml:2: extends: 'papr_w8a8.yaml': neither a file nor a shipped recipe; did you mean 'paper_w8a8'? "
        + SHIPPED,
    ]


@pytest.mark.parametrize(
    ("name", "near"),
    [("folder/papr_w8a8.yaml", "; did you mean 'paper_w8a8'?"), ("zzz", "")],
)
def test_missing_file(name: str, near: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    assert str(caught.value) == f"recipe {name!r}: neither a file nor a shipped recipe{near} {SHIPPED}"


def test_binary_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x80\xff\x00")
    with pytest.raises(RecipeError, match=r"model\.safetensors: cannot be read: .*; a recipe is a UTF-8 text file$"):
        load_recipe(path)


def test_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbfversion: 1\n")
    assert load_recipe(path) == Recipe()


def test_sizes_replace_those_of_the_base_and_meet_its_samples(write: Write) -> None:
    write("base.yaml", "version: 1\ncalibration: {samples: 40, sizes: [{height: 8}, {height: 16}]}\n")
    many = ", ".join(f"{{width: {n}}}" for n in range(1, 21))
    text = f"version: 1\nextends: base.yaml\ncalibration: {{sizes: [{many}]}}\n"  # more than the default samples
    recipe = load_recipe(write("more.yaml", text))
    assert [size.arguments for size in recipe.calibration.sizes or ()] == [{"width": n} for n in range(1, 21)]
    assert "sizes" not in Recipe().to_dict()["calibration"]
