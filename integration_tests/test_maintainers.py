"""The maintainers' pages do what they say: their code runs as written, and their tables are complete.

What a page registers comes from outside the package, and is forgotten after each test.
"""

from __future__ import annotations

import ast
import configparser
import copy
import dataclasses
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from ptq4dit_ao import (
    Expansion,
    PTQ4DiTQuantizer,
    available_backends,
    export_transformer,
    find_sites,
    load_quantized,
    lower,
)
from ptq4dit_ao.capture.signature import flatten_call
from ptq4dit_ao.core import sqnr_db
from ptq4dit_ao.errors import LoweringError
from ptq4dit_ao.graph.rules import IGNORED, RULES
from ptq4dit_ao.lowering.backend import BACKENDS, PLUGINS, load_plugins
from ptq4dit_ao.passes import fold_balance, insert_balance
from ptq4dit_ao.recipe import Recipe, load_recipe, recipe_json_schema
from ptq4dit_ao.testing.zoo import FAMILIES, image
from ptq4dit_ao.workflow import apply_recipe

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ptq4dit_ao"
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "maintainers").glob("*.md")}
PAGES["CONTRIBUTING.md"] = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

aten = torch.ops.aten

Scope = dict[str, Any]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], flags=re.DOTALL | re.MULTILINE)


def run(code: str, page: str, scope: Scope) -> None:
    exec(compile(code, page, "exec"), scope)


def rows(text: str) -> list[list[str]]:
    """Cells of every table of a page, without the headings."""
    found = re.findall(r"^\|[-|]+\|\n((?:\|.*\n)+)", text, flags=re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for table in found for line in table.splitlines()]


def section(page: str, heading: str) -> str:
    return PAGES[page].split(f"## {heading}")[1].split("\n## ")[0]


def names_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def load_tests(path: str) -> ModuleType:
    """A test file of the package, as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"copy_of_{Path(path).stem}", PACKAGE / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Rules, backends and families that a test registers are gone afterwards."""
    registries: tuple[MutableMapping[Any, Any], ...] = (RULES, BACKENDS, FAMILIES)
    before = [dict(registry) for registry in registries]
    yield
    for registry, old in zip(registries, before, strict=True):
        registry.clear()
        registry.update(old)


# -- add_an_op_rule.md -------------------------------------------------------------------------------------------------

RULE_PAGE = "add_an_op_rule.md"


@pytest.fixture
def cases() -> ModuleType:
    """The tests of rules, with the page's cases among them."""
    module = load_tests("graph/tests/test_rules.py")
    run(blocks(RULE_PAGE, "python")[1], RULE_PAGE, vars(module))
    return module


def check(cases: ModuleType) -> None:
    """The page's cases: a float64 graph with random b folded computes what it did."""
    for body, free in cases.CASES[aten.cumsum.default]:
        cases.test_rule(aten.cumsum.default, body, free)


def test_an_op_without_a_rule_is_refused_with_the_words_of_the_page(cases):
    body, _ = cases.CASES[aten.cumsum.default][0]
    refusal = cases.site_of(find_sites(cases.exported(body), policy=cases.ANY), "out").refusal
    assert refusal == blocks(RULE_PAGE, "text")[0].strip()


def test_a_rule_from_outside_folds_exactly(cases):
    run(blocks(RULE_PAGE, "python")[0], RULE_PAGE, {})
    check(cases)
    cases.test_every_rule_has_a_case()


def test_the_check_of_the_page_sees_a_wrong_rule(cases):
    rule = blocks(RULE_PAGE, "python")[0]
    assert rule.count("p.uniform(ids, [axis])") == 1
    run(rule.replace("p.uniform(ids, [axis])", "ids"), RULE_PAGE, {})
    with pytest.raises(AssertionError):
        check(cases)
    body, _ = cases.CASES[aten.cumsum.default][1]
    model = cases.exported(body)
    with pytest.raises(AssertionError) as raised:
        cases.assert_fold_preserves(body, find_sites(model, policy=cases.ANY), model)
    assert "1e-12" in str(raised.traceback[-1].statement)  # the output, not only the number of scales


def test_the_methods_of_a_rule_exist():
    from ptq4dit_ao.graph.propagation import Propagation

    methods = re.findall(r"^\| `p\.(\w+)\(", PAGES[RULE_PAGE], flags=re.MULTILINE)
    assert len(methods) == 6 and all(callable(getattr(Propagation, name)) for name in methods)


# -- add_a_backend.md --------------------------------------------------------------------------------------------------

BACKEND_PAGE = "add_a_backend.md"
TOML = tomllib.loads(blocks(BACKEND_PAGE, "toml")[0])["project"]


@pytest.fixture
def registered() -> Scope:
    """The page's first two blocks have run."""
    scope: Scope = {"__name__": "int_mm_of_the_page"}
    for code in blocks(BACKEND_PAGE, "python")[:2]:
        run(code, BACKEND_PAGE, scope)
    return scope


@pytest.mark.parametrize("bits", [8, 4])
def test_a_backend_from_outside_runs_proven(registered, quantized, tiny_samples, capsys, bits):
    graph = quantized(weight_bits=bits)
    run(blocks(BACKEND_PAGE, "python")[2], BACKEND_PAGE, registered | {"quantized": graph})
    assert "14/14" in capsys.readouterr().out
    for name in ("int_mm", "int_mm_counted"):
        lowered = lower(graph, name)
        assert lowered.proof.integer_gemms == lowered.proof.promised == 14
        assert lowered.proof.difference is not None  # compared with the simulated graph
        x, t, y = (tensor[:3] for tensor in tiny_samples[1])  # a batch that nothing was built for
        assert sqnr_db(graph(x, t, y), lowered(x, t, y)) > 60


def test_a_backend_that_does_not_run_its_kernels_is_refused(registered, quantized):
    record = registered["INT_MM"]
    registered["register"](dataclasses.replace(record, name="none", kernels=("aten::_scaled_mm",)))
    registered["register"](dataclasses.replace(record, name="few", count=lambda run, inputs: {"int_mm": 13}))
    with pytest.raises(LoweringError, match=r"backend 'none' ran 0 of 14"):
        lower(quantized(), "none")
    with pytest.raises(LoweringError, match=r"backend 'few' ran 13 of 14"):
        lower(quantized(), "few")


def test_a_backend_that_computes_something_else_is_refused(registered, quantized):
    wrong = blocks(BACKEND_PAGE, "python")[0]
    assert wrong.count("128 - self.zero_point") == 1
    wrong = wrong.replace("128 - self.zero_point", "127 - self.zero_point").replace('"int_mm"', '"wrong"')
    run(wrong, BACKEND_PAGE, {"__name__": "wrong_of_the_page"})
    with pytest.raises(LoweringError, match="backend 'wrong'"):
        lower(quantized(), "wrong")


@pytest.fixture
def install(tmp_path, monkeypatch):
    """``install(distribution, entry point, module, code)``: what pip would leave on the path."""

    def make(distribution: str, name: str, module: str, code: str) -> None:
        site = tmp_path / distribution
        info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{PLUGINS}]\n{name} = {module}\n")
        (site / f"{module}.py").write_text(code)
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, module, raising=False)

    yield make
    for module in [name for name, m in sys.modules.items() if str(tmp_path) in str(getattr(m, "__file__", ""))]:
        del sys.modules[module]


def test_a_backend_of_another_package_is_found(install, quantized, tmp_path):
    (name, module), *others = TOML["entry-points"][PLUGINS].items()
    assert not others
    install(TOML["name"], name, module, blocks(BACKEND_PAGE, "python")[0])
    assert "int_mm" not in available_backends()
    load_plugins()
    assert "int_mm" in available_backends()
    assert lower(quantized(), "int_mm").proof.integer_gemms == 14
    code = f"""
import sys
from ptq4dit_ao import available_backends
assert {module!r} not in sys.modules
print(list(available_backends()))
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path / TOML["name"])}
    fresh = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "'int_mm'" in fresh.stdout, fresh.stderr


def test_a_plugin_that_fails_takes_no_other_along(install, caplog):
    code = blocks(BACKEND_PAGE, "python")[0]
    install("first", "a_broken_one", "ptq4dit_broken", "raise RuntimeError('no driver')\n")
    install(TOML["name"], "int_mm", "ptq4dit_int_mm", code)
    install("last", "z_taken", "ptq4dit_taken", code.replace('"int_mm"', '"fbgemm"'))
    with caplog.at_level(logging.WARNING, "ptq4dit_ao"):
        load_plugins()
    assert "int_mm" in BACKENDS and "eager int8 kernels for x86" in BACKENDS["fbgemm"].summary
    warned = sorted(record.getMessage() for record in caplog.records)
    assert warned[0] == "backend plugin a_broken_one (ptq4dit_broken) cannot be loaded: no driver"
    assert re.fullmatch(r"backend plugin z_taken .* there is a backend 'fbgemm' already; .*", warned[1])
    assert len(warned) == 2


def test_the_fields_of_a_backend_exist():
    from ptq4dit_ao.lowering import Backend, Capabilities

    fields = {field.name for kind in (Backend, Capabilities) for field in dataclasses.fields(kind)}
    table = re.search(r"^\| field \|.*?\n\n", PAGES[BACKEND_PAGE], flags=re.DOTALL | re.MULTILINE)
    assert table is not None
    named = {name for cells in rows(table[0]) for name in names_in(cells[0])}
    assert len(named) >= 9 and named <= fields


# -- add_a_family.md ---------------------------------------------------------------------------------------------------

FAMILY_PAGE = "add_a_family.md"


@pytest.fixture
def flux_schnell() -> None:
    run(blocks(FAMILY_PAGE, "python")[0], FAMILY_PAGE, dict(vars(image)))


def test_a_family_is_surveyed(flux_schnell, capsys):
    scope: Scope = {}
    run(blocks(FAMILY_PAGE, "python")[1], FAMILY_PAGE, scope)
    row = scope["row"]
    assert row["class"] == "FluxTransformer2DModel" and row["note"] == "no guidance embedding"
    assert row["sqnr_db"] > 18 and row["sites"]["offline"] > 3


def test_a_family_passes_the_checks_of_the_zoo(flux_schnell):
    zoo = load_tests("testing/tests/test_zoo.py")
    one = FAMILIES["flux_schnell"]
    zoo.test_a_family_has_a_name_and_a_group(one)
    zoo.test_inputs_are_equal_for_equal_seeds(one)
    assert sum(p.numel() for p in one.model().parameters()) < zoo.MOST_PARAMETERS


def test_the_recipes_of_a_family_pass_its_tests(flux_schnell, tmp_path, monkeypatch):
    for name, text in zip(re.findall(r"^`recipes/(\S+)`:", PAGES[FAMILY_PAGE], flags=re.M), _yaml(), strict=True):
        (tmp_path / name).write_text(text)
    tests = load_tests("recipe/tests/test_recipe_families.py")
    monkeypatch.setattr(tests, "load_recipe", lambda name: load_recipe(tmp_path / f"{name}.yaml"))
    tests.RECIPES.clear()
    run(blocks(FAMILY_PAGE, "python")[2], FAMILY_PAGE, vars(tests))
    tests.test_attention_feed_forward_and_modulation_are_quantized_and_nothing_else("flux_schnell", "flux_schnell", {})
    for check_one in (
        lambda: tests.test_every_pattern_matches("flux_schnell", "flux_schnell", {}),
        lambda: tests.test_every_pattern_is_needed("flux_schnell"),
        lambda: tests.test_four_bits_differ_in_bits_only("flux_schnell"),
        lambda: tests.test_as_many_steps_as_timesteps("flux_schnell"),
    ):
        check_one()
    assert load_recipe(tmp_path / "flux_schnell_w4a8.yaml").calibration.guidance == 0


def _yaml() -> list[str]:
    return blocks(FAMILY_PAGE, "yaml")


# -- add_a_recipe_key.md -----------------------------------------------------------------------------------------------

KEY_PAGE = "add_a_recipe_key.md"


def patched(diff: str, folder: Path) -> None:
    """Apply a diff of one hunk, wherever its lines are."""
    header, *lines = diff.rstrip("\n").split("\n")
    path = folder / header.removeprefix("--- a/")
    text = path.read_text(encoding="utf-8")
    before = "".join(f"{line[1:]}\n" for line in lines if line[:1] in " -")
    after = "".join(f"{line[1:]}\n" for line in lines if line[:1] in " +")
    assert text.count(before) == 1, f"{path.name} has these lines {text.count(before)} times:\n{before}"
    path.write_text(text.replace(before, after), encoding="utf-8")


def test_a_recipe_key_is_added_to_a_copy_of_the_package(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "ptq4dit_ao", ignore=shutil.ignore_patterns("tests", "__pycache__"))
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    for diff in blocks(KEY_PAGE, "diff"):
        patched(diff, tmp_path)
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    commands = "\n".join(re.findall(r"^\$ (.*)", blocks(KEY_PAGE, "console")[0], flags=re.MULTILINE))
    subprocess.run(["bash", "-ec", commands], cwd=tmp_path, env=environment, check=True)
    schema = json.loads((tmp_path / "recipes" / "recipe.schema.json").read_text())
    keys, known = (s["$defs"]["Calibration"]["properties"] for s in (schema, recipe_json_schema()))
    assert keys.keys() - known.keys() == {"timestep_input"}  # here, the package is as it was
    (tmp_path / "test_key.py").write_text(blocks(KEY_PAGE, "python")[0])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_key.py"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "4 passed" in ran.stdout, ran.stdout + ran.stderr


# -- state.md ----------------------------------------------------------------------------------------------------------

STATE_PAGE = "state.md"
SOURCES = [path for path in PACKAGE.rglob("*.py") if not {"tests", "testing"} & set(path.relative_to(PACKAGE).parts)]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
OBSERVERS = {path: tree for path, tree in TREES.items() if path.parent.name == "observers"}


def our_strings() -> set[str]:
    """Strings of the package that look like a key or a name of ours; of an f-string, its beginning."""
    found = {node.value for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    return {text for text in found if isinstance(text, str) and re.fullmatch(r"_?ptq4dit_(?!ao)\w+", text)}


def buffer_names() -> set[str]:
    """What ``add_constant(model, NAME, ...)`` is called with."""
    calls = (node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.Call))
    named = (c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "add_constant")
    return {f"_ptq4dit_{call.args[1].value}_0" for call in named if isinstance(call.args[1], ast.Constant)}


def observer_attributes() -> set[str]:
    """What observers, their clock and the plan are given."""
    plan = TREES[PACKAGE / "quantizer" / "plan.py"]
    classes = [
        node for tree in (*OBSERVERS.values(), plan) for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    ]
    kept = [c for c in classes if c.name.endswith(("Observer", "Clock", "Plan"))]
    assert len(kept) == 9
    attributes = {name for c in kept for node in ast.walk(c) if (name := _set_on_self(node)) is not None}
    fields = {node.target.id for c in kept for node in c.body if isinstance(node, ast.AnnAssign)}  # type: ignore[union-attr]
    return attributes | fields


def _set_on_self(node: ast.AST) -> str | None:
    stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    return node.attr if stored and getattr(node.value, "id", None) == "self" else None


def set_on_observers() -> set[str]:
    """What any module of the package sets on something called an observer."""
    found = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                owner = node.value
                name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
                found |= {node.attr} if name == "observer" else set()
    return found


def listed(page: str) -> set[str]:
    return {name for cells in rows(page) for cell in cells[:2] for name in names_in(cell)}


def test_every_key_and_name_of_ours_is_in_the_table():
    found = our_strings() | buffer_names()
    assert {"ptq4dit_pending", "ptq4dit_cut", "ptq4dit_inputs", "_ptq4dit_norm_0"} <= found
    known = {name for name in listed(PAGES[STATE_PAGE]) if "ptq4dit" in name}
    assert found == known


def constants_of(tree: ast.Module) -> dict[str, object]:
    """Names that a module gives to constants."""
    assigned = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)]
    return {ast.unparse(target): node.value.value for node in assigned for target in node.targets}  # type: ignore[attr-defined]


def test_no_other_key_of_meta_is_used():
    found = set()
    for tree in TREES.values():
        known = constants_of(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Subscript) and getattr(node.value, "attr", None) == "meta":
                key = ast.unparse(node.slice)
                found.add(known.get(key, key.strip("'")))
    pair = {"_SIGNATURE", "_MODULE"}  # of capture/export.py, assigned together
    shared = {"INPUT"}  # ptq4dit_input, of graph/shapes.py
    assert found - listed(PAGES[STATE_PAGE]) == {"val", "Q_ANNOTATION_KEY", *pair, *shared}


def test_every_attribute_of_an_observer_is_in_the_table():
    found = observer_attributes() | set_on_observers()
    assert {"chosen_range", "balance", "offset", "rounded", "moments", "example", "_done"} <= found
    text = section(STATE_PAGE, "Observers") + section(STATE_PAGE, "What observers share")
    named = {name for cells in rows(text) for name in names_in(cells[1])}
    assert found == named


def keys_of(graph: GraphModule) -> set[str]:
    of_nodes = {key for node in graph.graph.nodes for key in node.meta}
    return {key for key in {*graph.meta, *of_nodes} if key.startswith("ptq4dit_")}


@pytest.fixture(scope="module")
def marked() -> GraphModule:
    """PixArt's graph, folded by hand but for one site, with every key of ours somewhere."""
    family = FAMILIES["pixart_sigma"]
    graph = export_transformer(family.model(), family.inputs(2))
    first, second = [site for site in find_sites(graph) if site.cuts][:2]
    for site in (first, second):
        insert_balance(graph, site, torch.ones(site.num_variables, dtype=torch.float64))
    fold_balance(graph, first, torch.ones(first.num_variables, dtype=torch.float64))
    graph.recompile()
    graph.meta["ptq4dit_pending"] = {}  # as of a prepared graph that was balanced
    return graph


def survival(heading: str) -> dict[str, tuple[str, ...]]:
    """Key -> yes or no for deepcopy, convert_pt2e, save and load."""
    cells = rows(section(STATE_PAGE, heading))
    return {names_in(row[0])[0]: tuple(row[-3:]) for row in cells}


@torch.no_grad()
def test_what_survives_is_in_the_table(marked, tmp_path):
    table = survival("Graphs: keys") | survival("Nodes: keys")
    assert {"ptq4dit_signature", "ptq4dit_module", "ptq4dit_balance", "ptq4dit_cut"} <= keys_of(marked)
    family = FAMILIES["pixart_sigma"]
    model = family.model()
    graph = export_transformer(model, family.inputs(2))
    graph.meta["ptq4dit_folded_sources"] = frozenset()  # as of a model whose weights are computed
    inputs = tuple(flatten_call(model, family.inputs(2))[1].values())
    apply_recipe(graph, Recipe(), [inputs]).save(tmp_path / "model")
    loaded = keys_of(load_quantized(tmp_path / "model").graph)
    prepared = prepare_pt2e(graph, PTQ4DiTQuantizer(weight_bits=4, expansion=Expansion()))
    prepared(*inputs)
    converted = convert_pt2e(prepared)
    copied = keys_of(copy.deepcopy(marked)) | keys_of(copy.deepcopy(converted))
    for key, said in table.items():
        found = tuple("yes" if key in keys else "no" for keys in (copied, keys_of(converted), loaded))
        assert said == found, key


# -- where_an_inverse_may_live.md and glossary.md ----------------------------------------------------------------------

INVERSE_PAGE = "where_an_inverse_may_live.md"


def op_name(op: Any) -> str:
    return str(op).removeprefix("aten.").removesuffix(".default") if hasattr(op, "_schema") else op.__name__


def test_every_op_with_a_rule_is_listed_once():
    count = Counter(name for cells in rows(PAGES[INVERSE_PAGE]) for name in names_in(cells[0]))
    assert set(count) == {op_name(op) for op in RULES}
    assert max(count.values()) == 1
    assert all(f"`{op_name(op)}`" in PAGES[INVERSE_PAGE].rpartition("Everything else pins")[2] for op in IGNORED)


def test_the_first_table_lists_the_ops_with_parameters():
    named = {name for cells in rows(section(INVERSE_PAGE, "Ops with parameters")) for name in names_in(cells[0])}
    layers = {op_name(op) for op, rule in RULES.items() if rule.__module__.endswith(".layers")}
    assert named == layers
    moved = {name for cells in rows(section(INVERSE_PAGE, "Ops that move")) for name in names_in(cells[0])}
    assert moved == {op_name(op) for op, rule in RULES.items() if rule.__module__.endswith(".movement")}


def test_the_modules_of_the_glossary_exist():
    cells = rows(PAGES["glossary.md"])
    terms = [row[0] for row in cells]
    assert len(terms) >= 25 and len(set(terms)) == len(terms)
    assert all((ROOT / names_in(row[2])[0]).is_file() for row in cells)


@pytest.mark.parametrize("page", PAGES)
def test_paths_and_links_lead_somewhere(page):
    base = ROOT if page == "CONTRIBUTING.md" else ROOT / "docs" / "maintainers"
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGES[page]):
        assert (base / link).exists(), link
    for path in re.findall(r"`((?:ptq4dit_ao|integration_tests|docs|recipes)/[\w./]*\w\.\w+)`", PAGES[page]):
        made = path.startswith("recipes/flux_schnell") or "NAME" in path
        assert made or (ROOT / path).exists(), path


# -- tox, CI, hooks ----------------------------------------------------------------------------------------------------


def environments() -> set[str]:
    tox = configparser.ConfigParser()
    tox.read(ROOT / "tox.ini")
    return {name.removeprefix("testenv:") for name in tox.sections() if name.startswith("testenv:")}


@pytest.mark.parametrize("page", PAGES)
def test_the_environments_of_the_pages_exist(page):
    assert set(re.findall(r"tox run -e ([\w]+)", PAGES[page])) <= environments()


def test_contributing_lists_every_environment():
    table = re.search(r"^\| environment \|.*?\n\n", PAGES["CONTRIBUTING.md"], flags=re.DOTALL | re.MULTILINE)
    assert table is not None
    assert {names_in(cells[0])[0] for cells in rows(table[0])} == environments()


def test_the_workflow_runs_environments_that_exist():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    named: set[str] = set()
    for job in workflow["jobs"].values():
        matrix = job.get("strategy", {}).get("matrix", {})
        for step in job["steps"]:
            for name in re.findall(r"tox run -e ([\w,]+|\$\{\{ matrix\.environment \}\})", step.get("run", "")):
                named |= set(matrix["environment"] if name.startswith("$") else name.split(","))
    assert {"lint", "types", "tests", "backends"} <= named <= environments()
    ci = re.search(r"tox run -e (\S+)", (ROOT / ".ci" / "run").read_text())
    assert ci is not None and set(ci[1].split(",")) <= named


def test_the_workflow_covers_the_pythons_that_are_supported():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert workflow["jobs"]["tests"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options"]["python_requires"] == ">=3.11"


def test_the_hooks_run_the_ruff_of_the_tests():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    revisions = {hook["repo"].rpartition("/")[2]: hook["rev"] for hook in hooks}
    pinned = re.search(r"^ruff==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert pinned is not None and revisions["ruff-pre-commit"] == f"v{pinned[1]}"
    assert all(re.fullmatch(r"v\d+\.\d+\.\d+", revision) for revision in revisions.values())
