"""Every way a recipe's content can be wrong, by its message."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ptq4dit_ao.errors import RecipeError
from ptq4dit_ao.recipe import Recipe

Refusal = Callable[[str], list[str]]

COUNT_OR_LIST = "a whole number >= 1 or a non-empty list of different numbers >= 0"
COUNT_LIST_OR_DRAW = f"{COUNT_OR_LIST} or a mapping (keys: draw, mean, std, count)"
BITS = "a whole number from 2 to 8"
WIDTH = f"{BITS} or auto"
SEED = "a whole number from 0 to 4294967295"

# What stands on line 2 of the file, and all that is said about it after "x.yaml:2: ".
WRONG = {
    "unknown section": ("layres: safe", "layres: unknown key; did you mean 'layers'?"),
    "unknown key": ("balance: {alfa: 0.5}", "balance.alfa: unknown key; did you mean 'alpha'?"),
    "unknown key near nothing": (
        "balance: {q: 0.5}",
        "balance.q: unknown key; the keys here are method, alpha, max_scale, fold_form, sites, couple_blocks, "
        "vector_multiply, min_variables, verify",
    ),
    "former name": ("balance: {aggregation: ssc}", "balance: the key 'aggregation' is called 'method' now; rename it"),
    "text for a number": ("weights: {bits: '8'}", f"weights.bits: '8' (text) is not allowed; it must be {WIDTH}"),
    "boolean for a number": (
        "activations: {bits: true}",
        f"activations.bits: true is not allowed; it must be {BITS} or 16",
    ),
    "fraction for a count": ("weights: {bits: 8.0}", f"weights.bits: 8.0 is not allowed; it must be {WIDTH}"),
    "on for a boolean": (
        "overrides: [{pattern: a, skip: on}]",
        "overrides[0].skip: 'on' (text) is not allowed; it must be true, or left out",
    ),
    "number for true": (
        "overrides: [{pattern: a, skip: 1}]",
        "overrides[0].skip: 1 is not allowed; it must be true, or left out",
    ),
    "number for false": (
        "overrides: [{pattern: a, balance: 0}]",
        "overrides[0].balance: 0 is not allowed; it must be false, or left out",
    ),
    "number for text": ("description: 8", "description: 8 is not allowed; it must be text, in quotes where needed"),
    "number for a section": (
        "weights: 8",
        "weights: 8 is not allowed; it must be a mapping (keys: bits, candidates, average_bits)",
    ),
    "mapping for a list": (
        "overrides: {pattern: a}",
        'overrides: {"pattern": "a"} is not allowed; it must be a list of mappings',
    ),
    "empty model": ("model: ''", "model: '' (text) is not allowed; it must be non-empty text"),
    "number for extends": ("extends: 3", "extends: 3 is not allowed; it must be non-empty text"),
    "method": (
        "balance: {method: scc}",
        "balance.method: 'scc' (text) is not allowed; it must be one of ssc, max, mean, none, auto, repq; "
        "did you mean 'ssc'?",
    ),
    "fold form": (
        "balance: {fold_form: 1}",
        "balance.fold_form: 1 is not allowed; it must be one of constant, bias",
    ),
    "layers": (
        "layers: papers",
        "layers: 'papers' (text) is not allowed; it must be one of safe, paper; did you mean 'paper'?",
    ),
    "bits without a budget": (
        "weights: {bits: auto}",
        "weights: bits: auto needs average_bits; add how many bits a weight may take on average",
    ),
    "a budget without auto": (
        "weights: {bits: 4, average_bits: 5}",
        "weights: average_bits is for bits: auto, and bits is 4; remove one of them",
    ),
    "candidates without auto": (
        "weights: {candidates: [4, 8]}",
        "weights: candidates is for bits: auto, and bits is 8; remove one of them",
    ),
    "a budget below the candidates": (
        "weights: {bits: auto, average_bits: 3.5}",
        "weights: average_bits is 3.5, and the candidates go from 4 to 8; choose it between them, or other candidates",
    ),
    "a budget above the candidates": (
        "weights: {bits: auto, average_bits: 8, candidates: [6, 4]}",
        "weights: average_bits is 8, and the candidates go from 4 to 6; choose it between them, or other candidates",
    ),
    "one candidate": (
        "weights: {bits: auto, average_bits: 5, candidates: [4]}",
        "weights.candidates: [4] is not allowed; it must be a list of at least 2 different whole numbers from 2 to 8",
    ),
    "a candidate twice": (
        "weights: {bits: auto, average_bits: 5, candidates: [4, 8, 4]}",
        "weights.candidates: 4 stands more than once in the list; keep one of them",
    ),
    "misspelt auto": (
        "weights: {bits: atuo}",
        f"weights.bits: 'atuo' (text) is not allowed; it must be {WIDTH}",
    ),
    "bits too few": ("weights: {bits: 1}", f"weights.bits: 1 is not allowed; it must be {WIDTH}"),
    "bits too many": ("activations: {bits: 9}", f"activations.bits: 9 is not allowed; it must be {BITS} or 16"),
    "dynamic": (
        "activations: {dynamic: row}",
        "activations.dynamic: 'row' (text) is not allowed; it must be false or one of token, auto",
    ),
    "dynamic true": (
        "activations: {dynamic: true}",
        "activations.dynamic: true is not allowed; it must be false or one of token, auto",
    ),
    "dynamic auto without a share": (
        "activations: {dynamic: auto}",
        "activations: dynamic: auto needs share; add the part of the linears that may be dynamic, such as 0.4",
    ),
    "share without auto": (
        "activations: {share: 0.4}",
        "activations: share is for dynamic: auto, and dynamic is false; remove one of them",
    ),
    "share of nothing": (
        "activations: {dynamic: auto, share: 0}",
        "activations.share: 0 is not allowed; it must be a number > 0 and <= 1",
    ),
    "dynamic and float": (
        "activations: {bits: 16, dynamic: token}",
        "activations: bits: 16 keeps activations float, and dynamic quantizes them; remove one of them",
    ),
    "override dynamic auto": (
        "overrides: [{pattern: a, dynamic: auto}]",
        "overrides[0].dynamic: 'auto' (text) is not allowed; it must be false or token",
    ),
    "override dynamic and float": (
        "overrides: [{pattern: a, activation_bits: 16, dynamic: token}]",
        "overrides[0]: pattern 'a' keeps activations float (activation_bits: 16) and makes them dynamic; keep one of "
        "them",
    ),
    "alpha": ("balance: {alpha: 1.5}", "balance.alpha: 1.5 is not allowed; it must be a number from 0 to 1 or auto"),
    "negative alpha": (
        "balance: {alpha: -1e-5}",
        "balance.alpha: -1e-05 is not allowed; it must be a number from 0 to 1 or auto",
    ),
    "max_scale": ("balance: {max_scale: 1}", "balance.max_scale: 1 is not allowed; it must be a number > 1"),
    "infinite": ("balance: {max_scale: .inf}", "balance.max_scale: Infinity is not allowed; it must be a number > 1"),
    "not a number": (
        "balance: {alpha: .nan}",
        "balance.alpha: NaN is not allowed; it must be a number from 0 to 1 or auto",
    ),
    "guidance": ("calibration: {guidance: -1}", "calibration.guidance: -1 is not allowed; it must be a number >= 0"),
    "samples": ("evaluation: {samples: 0}", "evaluation.samples: 0 is not allowed; it must be a whole number >= 1"),
    "steps": ("calibration: {steps: 0}", "calibration.steps: 0 is not allowed; it must be a whole number >= 1"),
    "seed": ("calibration: {seed: -1}", f"calibration.seed: -1 is not allowed; it must be {SEED}"),
    "wide seed": ("evaluation: {seed: 4294967296}", f"evaluation.seed: 4294967296 is not allowed; it must be {SEED}"),
    "no sizes": (
        "calibration: {sizes: []}",
        "calibration.sizes: [] is not allowed; it must be a non-empty list of mappings",
    ),
    "number for a size": (
        "calibration: {sizes: [512]}",
        "calibration.sizes[0]: 512 is not allowed; it must be a mapping (keys: height, width, num_frames)",
    ),
    "key of a size": (
        "calibration: {sizes: [{heigth: 512}]}",
        "calibration.sizes[0].heigth: unknown key; did you mean 'height'?",
    ),
    "height of a size": (
        "calibration: {sizes: [{height: 512}, {height: 0}]}",
        "calibration.sizes[1].height: 0 is not allowed; it must be a whole number >= 1",
    ),
    "empty size": (
        "calibration: {sizes: [{}]}",
        "calibration.sizes[0]: a size is empty; give it a height, a width or num_frames",
    ),
    "a size twice": (
        "calibration: {sizes: [{height: 512}, {width: 9}, {height: 512}]}",
        'calibration: size {"height": 512} stands more than once in sizes; keep one of them',
    ),
    "height in sizes and beside them": (
        "calibration: {height: 64, sizes: [{width: 9}, {height: 512}]}",
        "calibration: height stands in sizes and beside them; remove one of them",
    ),
    "no timesteps": (
        "calibration: {timesteps: 0}",
        f"calibration.timesteps: 0 is not allowed; it must be {COUNT_LIST_OR_DRAW}",
    ),
    "text for timesteps": (
        "evaluation: {timesteps: all}",
        f"evaluation.timesteps: 'all' (text) is not allowed; it must be {COUNT_OR_LIST}",
    ),
    "empty timesteps": (
        "calibration: {timesteps: []}",
        f"calibration.timesteps: [] is not allowed; it must be {COUNT_LIST_OR_DRAW}",
    ),
    "negative timestep": (
        "calibration: {timesteps: [3, -1]}",
        "calibration.timesteps[1]: -1 is not allowed; it must be a number >= 0",
    ),
    "no valid timestep": (
        "calibration: {timesteps: [true]}",
        "calibration.timesteps[0]: true is not allowed; it must be a number >= 0",
    ),
    "duplicate timesteps": (
        "evaluation: {timesteps: [1, 2.5, 3, 2.5]}",
        "evaluation.timesteps: 2.5 stands more than once in the list; keep one of them",
    ),
    "a draw for evaluation": (
        "evaluation: {timesteps: {draw: normal}}",
        f'evaluation.timesteps: {{"draw": "normal"}} is not allowed; it must be {COUNT_OR_LIST}',
    ),
    "another draw": (
        "calibration: {timesteps: {draw: uniform}}",
        "calibration.timesteps.draw: 'uniform' (text) is not allowed; it must be normal",
    ),
    "a draw without its name": (
        "calibration: {timesteps: {mean: 0.4}}",
        "calibration.timesteps.draw: missing; it must be normal",
    ),
    "unknown key of a draw": (
        "calibration: {timesteps: {draw: normal, men: 0.4}}",
        "calibration.timesteps.men: unknown key; did you mean 'mean'?",
    ),
    "std": (
        "calibration: {timesteps: {draw: normal, std: -1}}",
        "calibration.timesteps.std: -1 is not allowed; it must be a number >= 0",
    ),
    "draws": (
        "calibration: {timesteps: {draw: normal, count: 0}}",
        "calibration.timesteps.count: 0 is not allowed; it must be a whole number >= 1",
    ),
    "override without pattern": (
        "overrides: [{skip: true}]",
        "overrides[0].pattern: missing; it must be non-empty text",
    ),
    "learning out of sequence": (
        "rounding: {method: adaround}",
        "rounding: method 'adaround' learns block by block; add sequential: true",
    ),
    "override with nothing": (
        "overrides: [{pattern: a.*}]",
        "overrides[0]: pattern 'a.*' asks for nothing; add one of skip, weight_bits, activation_bits, dynamic, balance",
    ),
    "override with both": (
        "overrides: [{pattern: a, skip: true, weight_bits: 4, balance: false}]",
        "overrides[0]: pattern 'a' asks for skip and for weight_bits, balance; "
        + "a skipped module stays float, keep one of them",
    ),
    "override of a wrong type": (
        "overrides: [skip]",
        "overrides[0]: 'skip' (text) is not allowed; it must be a mapping "
        + "(keys: pattern, skip, weight_bits, activation_bits, dynamic, balance)",
    ),
    "override skip false": (
        "overrides: [{pattern: a, skip: false}]",
        "overrides[0].skip: false is not allowed; it must be true, or left out",
    ),
}


@pytest.mark.parametrize(("line", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_value(refusal: Refusal, line: str, message: str) -> None:
    assert refusal(f"version: 1\n{line}\n") == [f"x.yaml:2: {message}"]


def test_every_problem_is_listed_in_the_order_of_lines(refusal: Refusal) -> None:
    lines = refusal("""\
        version: 1
        wieghts: {}
        balance:
          alpha: 2
        overrides:
          - pattern: "a"
            skip: true
          - pattern: "b"
        layers: sage
        """)
    assert [line.split(": ")[:2] for line in lines] == [
        ["x.yaml:2", "wieghts"],
        ["x.yaml:4", "balance.alpha"],
        ["x.yaml:8", "overrides[1]"],
        ["x.yaml:9", "layers"],
    ]


def test_long_value_is_cut(refusal: Refusal) -> None:
    (line,) = refusal(f"version: 1\nlayers: {'x' * 500}\n")
    assert f"'{'x' * 56}... (text) is not allowed" in line


@pytest.mark.parametrize("version", ["2", "'1'", "1.0", "true"])
def test_unknown_version_is_the_only_complaint(refusal: Refusal, version: str) -> None:
    (line,) = refusal(f"version: {version}\nnew_key: 1\nextends: nowhere.yaml\n")
    assert line.startswith(f"x.yaml:1: version: {version}")
    assert line.endswith("is no recipe version that this release reads; it reads version 1")


def test_missing_version(refusal: Refusal) -> None:
    assert refusal("layers: safe\n") == ["x.yaml: version: missing; add 'version: 1' on a line of its own"]


FROM_DICT = {
    "repq and dynamic": (
        {"version": 1, "balance": {"method": "repq"}, "activations": {"dynamic": "token"}},
        "recipe: balance.method 'repq' gives all channels one static range, and activations are dynamic; balance with "
        "another method, or leave dynamic out",
    ),
    "version": ({}, "recipe: version: missing; add 'version: 1' on a line of its own"),
    "range": ({"version": 1, "weights": {"bits": 9}}, f"recipe: weights.bits: 9 is not allowed; it must be {WIDTH}"),
    "key type": ({"version": 1, "weights": {8: 1}}, "recipe: weights[8]: a key must be text"),
    "list": ([1, 2], "recipe: [1, 2] is not a mapping; give what Recipe.to_dict returned"),
}


@pytest.mark.parametrize(("data", "message"), FROM_DICT.values(), ids=FROM_DICT.keys())
def test_from_dict_refuses(data: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(data)
    assert str(caught.value) == message


def test_each_size_needs_an_image(refusal: Refusal) -> None:
    sizes = "sizes: [{height: 8}, {height: 16}, {height: 24}]"
    after = "and calibration.sizes holds 3 sizes; sample at least one image of each, or leave sizes out"
    assert refusal(f"version: 1\ncalibration: {{samples: 2, {sizes}}}\n") == [
        f"x.yaml: calibration.samples is 2, {after}"
    ]
    assert refusal(f"version: 1\ncalibration: {{{sizes}}}\nevaluation: {{samples: 1}}\n") == [
        f"x.yaml: evaluation.samples is 1, {after}"
    ]
