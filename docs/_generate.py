"""The pages that are made from the code: ``python docs/_generate.py`` writes them anew.

``recipe_reference.md`` is the schema of recipes, ``cli_reference.md`` the grammar of the command line.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ptq4dit_ao.cli.main import build_parser
from ptq4dit_ao.recipe import recipe_json_schema
from ptq4dit_ao.recipe.allowed import allowed, node_at

DOCS = Path(__file__).parent
COMMAND = "python docs/_generate.py"

RECIPE_HEAD = """\
# Recipe keys

Made by `{command}` from the schema, not by hand.

A recipe is a YAML file. Unknown keys, values of the wrong type and duplicate keys are errors that name the file, the
line and the nearest valid key. Every key but `version` may be left out. `ptq4dit-ao recipes` lists the shipped recipes,
and `ptq4dit-ao recipes --schema` prints the JSON Schema of recipe files, for editors.
[Writing a recipe](tutorials/recipe.md) builds one step by step.
"""

CLI_HEAD = """\
# Commands

Made by `{command}` from the grammar of the command line, not by hand.

`ptq4dit-ao` is installed with the package; `python -m ptq4dit_ao` is the same. Exit codes: 0, it is done; 1, it could
not be done, and the message says why; 2, the command line is wrong.
"""


def recipe_page(schema: Mapping[str, Any]) -> str:
    """Keys of the file itself first, then a chapter for each section."""
    sections = {key: node for key in schema["properties"] if "properties" in (node := node_at(schema, [key]))}
    whole = [_key(schema, schema, key) for key in schema["properties"] if key not in sections]
    parts = [RECIPE_HEAD.format(command=COMMAND), "## The file itself\n", *whole]
    for name, node in sections.items():
        parts += [f"## `{name}`\n", _paragraph(node.get("description", ""))]
        parts += [_key(schema, node, name, key) for key in node["properties"]]
    return "\n".join(parts)


def cli_page(parser: argparse.ArgumentParser) -> str:
    """A chapter for each command."""
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    briefs = {choice.dest: choice.help for choice in commands._choices_actions}
    parts = [CLI_HEAD.format(command=COMMAND), *(f"* [`{n}`](#{n}): {_text(b)}" for n, b in briefs.items()), ""]
    parts += ["```text", (parser.epilog or "").split("\n\n")[0], "```\n"]
    for name, command in commands.choices.items():
        parts += [f"## `{name}`\n", _paragraph(command.description or f"{_first_upper(briefs[name] or '')}.")]
        parts += ["```console", f"$ {parser.prog} {name} {_usage(command)}".rstrip(), "```\n"]
        ordered = sorted(command._actions, key=lambda a: (bool(a.option_strings), "-v" in a.option_strings))
        parts += [*(line for action in ordered if (line := _argument(action))), ""]
    return "\n".join(parts).rstrip() + "\n"


def _key(schema: Mapping[str, Any], section: Mapping[str, Any], *path: str) -> str:
    """A key's own chapter; the keys of a mapping inside it, as in ``overrides``, follow as a list."""
    key = path[-1]
    own = section["properties"][key]
    node = node_at(schema, path)
    needed = key in section.get("required", ())
    default = (
        "required" if needed else f"default: {_default(own['default'])}" if "default" in own else "may be left out"
    )
    lines = [f"### `{'.'.join(path)}`\n", f"*{_text(_first_upper(_allowed(node)))}; {default}.*\n"]
    lines += [_paragraph(own.get("description", ""))]
    for inner in _mappings(schema, node):
        if inner.get("description"):
            lines.append(_paragraph(inner["description"]))
        for name, value in inner["properties"].items():
            what = _allowed(node_at({**value, "$defs": schema["$defs"]}, []))
            needed = name in inner.get("required", ())
            default = "required" if needed else f"default {_default(value['default'])}" if "default" in value else ""
            note = f"{_text(what)}; {default}" if default else _text(what)
            lines.append(f"* `{name}` ({note}): {_text(value.get('description', ''))}")
        lines.append("")
    return "\n".join(lines)


def _mappings(schema: Mapping[str, Any], node: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Mappings that a value may be, or may be a list of."""
    if "properties" in node:
        yield node
    for inner in (*node.get("oneOf", ()), *node.get("anyOf", ()), *([node["items"]] if "items" in node else [])):
        if "properties" in inner or "items" in inner or "$ref" in inner:
            yield from _mappings(schema, node_at({**inner, "$defs": schema["$defs"]}, []))


def _argument(action: argparse.Action) -> str:
    """One line: how it is written, what it says, and its default if the help leaves that out."""
    if isinstance(action, argparse._HelpAction):
        return ""
    value = _value(action)
    shown = ", ".join(f"`{option} {value}`" if value else f"`{option}`" for option in action.option_strings)
    text = (action.help or "") % {**vars(action), "default": _shown(action.default)}
    notes = ["required" if action.option_strings and action.required else ""]
    notes.append(f"one of {', '.join(map(str, action.choices))}" if action.choices else "")
    silent = not action.option_strings or action.nargs == 0 or action.default in (None, argparse.SUPPRESS)
    notes.append("" if silent or "default" in text else f"default: {_shown(action.default)}")
    note = "; ".join(note for note in notes if note)
    return f"* {shown or f'`{value}`'}{f' ({note})' if note else ''}: {_text(text)}"


def _usage(parser: argparse.ArgumentParser) -> str:
    """What must be given; the rest is ``[options]``."""
    either = {id(a): g for g in parser._mutually_exclusive_groups if g.required for a in g._group_actions}
    words: dict[str, None] = {}
    for action in parser._actions:
        if id(action) in either:
            words[f"({' | '.join(_word(a) for a in either[id(action)]._group_actions)})"] = None
        elif not action.option_strings:
            words[f"[{_value(action)}]" if action.nargs == "?" else _value(action)] = None
        elif action.required:
            words[_word(action)] = None
    return " ".join([*words, "[options]"])


def _word(action: argparse.Action) -> str:
    return " ".join([*action.option_strings[-1:], _value(action)])


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    name = str(action.metavar or action.dest.upper())
    return f"{name} ..." if action.nargs == "+" else name


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _allowed(node: Mapping[str, Any]) -> str:
    """What a key may be, in the words of the error messages."""
    return _plain(node["const"]) if "const" in node else allowed(node)


def _default(value: object) -> str:
    return f"`{_plain(value)}`"


def _plain(value: object) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _paragraph(text: str) -> str:
    return _text(" ".join(text.split())) + "\n"


def _text(text: str | None) -> str:
    """Help as Markdown: quoted names and options become code, and nothing else means anything."""
    pieces = re.split(r"``([^`]+)``|(?<!\w)'([^']+)'(?!\w)|(?<!\S)(--[a-z][a-z-]*)", text or "")
    words = [re.sub(r"([*<\[\]`])", r"\\\1", piece) for piece in pieces[::4]]
    codes = ["".join(f"`{code}`" for code in pieces[i : i + 3] if code) for i in range(1, len(pieces), 4)]
    return "".join(word + code for word, code in zip(words, [*codes, ""], strict=True))


def pages() -> dict[str, str]:
    """Name -> text of every page that is made."""
    return {"recipe_reference.md": recipe_page(recipe_json_schema()), "cli_reference.md": cli_page(build_parser())}


if __name__ == "__main__":
    for name, text in pages().items():
        (DOCS / name).write_text(text)
