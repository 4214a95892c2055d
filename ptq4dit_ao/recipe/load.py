"""Reader of a recipe file and the files that it extends.

Every file of a chain is checked on its own, since each is a whole recipe once the defaults are added. Errors are thus
reported where they are, and a base cannot hide one behind a key that the extending file replaces.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from ptq4dit_ao._paths import as_path, because
from ptq4dit_ao.errors import RecipeError
from ptq4dit_ao.recipe.problems import Problem, describe, did_you_mean, version_problem
from ptq4dit_ao.recipe.schema import Recipe, RecipeFile
from ptq4dit_ao.recipe.shipped import listed_recipes, shipped_recipe_path, shipped_recipes
from ptq4dit_ao.recipe.yaml_text import YamlText, read_yaml


def load_recipe(path_or_name: str | Path) -> Recipe:
    """Load the recipe in a file, or the shipped recipe of that name, with its bases merged in.

    A file at the path takes precedence over a shipped recipe of the same name. In a chain of ``extends``, mappings are
    merged key by key, and scalars and lists replace those of the base. A ``RecipeError`` lists every problem of every
    file, each with its file, line, key path, value and allowed values.
    """
    path = _find(as_path(path_or_name, "recipe"))
    if path is None:
        raise RecipeError(f"recipe {str(path_or_name)!r}: {_not_found(str(path_or_name))}")
    texts, problems = _chain(path)
    problems = [line for text in texts for line in _problems(text)] + problems
    if problems:
        raise RecipeError("\n".join(problems))
    merged: dict[str, object] = {}
    for text in reversed(texts):
        merged = merge(merged, text.value)
    merged.pop("extends", None)
    return Recipe.from_dict(merged, name=str(path))


def load_method(name: str) -> Recipe:
    """Load a recipe as a method that is compared with others at several widths.

    A shipped recipe whose name ends in bits, like ``paper_w8a8``, is also found without them.
    """
    at_8_bits = f"{name}_w8a8"
    return load_recipe(at_8_bits if name not in shipped_recipes() and at_8_bits in shipped_recipes() else name)


def merge(base: dict[str, object], top: dict[str, object]) -> dict[str, object]:
    """Merge ``top`` over ``base``: mappings key by key, everything else replaced."""
    merged = dict(base)
    for key, value in top.items():
        below = base.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _chain(path: Path) -> tuple[list[YamlText], list[str]]:
    """The file and its bases, the file itself first, and the problems that ended the chain early."""
    paths, texts = [path], [_read(path)]
    while extends := _extends(texts[-1]):
        where = f"{texts[-1].where(('extends',))}: extends"
        base = _find(paths[-1].parent / as_path(extends, "extends"), name=extends)
        if base is None:
            return texts, [f"{where}: {extends!r}: {_not_found(extends)}"]
        paths.append(base)
        if base.resolve() in [earlier.resolve() for earlier in paths[:-1]]:
            chain = " -> ".join(map(str, paths))
            return texts, [f"{where}: the files extend each other in a circle: {chain}; remove one 'extends'"]
        texts.append(_read(base))
    return texts, []


def _extends(text: YamlText) -> str | None:
    """The base that ``text`` names.

    None if ``text`` is of another version, in which the key may have another meaning.
    """
    extends = text.value.get("extends")
    return extends if isinstance(extends, str) and not version_problem(text.value) else None


def _find(path: Path, name: str | None = None) -> Path | None:
    """The file at ``path``, else the shipped recipe called ``name``, else None."""
    name = str(path) if name is None else name
    try:
        if path.is_file():
            return path
    except OSError as error:  # for example a name that is too long
        raise RecipeError(f"{path}: cannot be read: {because(error)}") from None
    return shipped_recipe_path(name) if name.removesuffix(".yaml") in shipped_recipes() else None


def _not_found(name: str) -> str:
    near = did_you_mean(Path(name).stem, shipped_recipes())
    return f"neither a file nor a shipped recipe{near}{listed_recipes()}"


def _read(path: Path) -> YamlText:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = because(error) if isinstance(error, OSError) else str(error)
        raise RecipeError(f"{path}: cannot be read: {reason}; a recipe is a UTF-8 text file") from None
    return read_yaml(text, source=str(path))


def _problems(text: YamlText) -> list[str]:
    """Every error of one file, in the order of its lines."""
    version = version_problem(text.value)
    problems = [version] if version else _faults(text)
    problems.sort(key=lambda problem: text.line(problem.path))
    return [f"{text.where(problem.path)}: {problem.text}" for problem in problems]


def _faults(text: YamlText) -> list[Problem]:
    try:
        RecipeFile.model_validate(text.value)
    except ValidationError as error:
        return describe(error, RecipeFile, text.value)
    return []
