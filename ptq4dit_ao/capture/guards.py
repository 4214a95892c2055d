"""Conditions on sizes, from the guards that ``torch.export`` records while it traces a model.

Each decision that the model or torch took on a size is a guard. From them follows which sizes are free: some are fixed
by a comparison with a number, some equal others or are computed from them, and the rest has bounds and divisors. Guards
on the memory layout of tensors are left out, because the graph's ops do not depend on it.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.printers import PythonPrinter
from torch.utils._sympy.value_ranges import ValueRanges

from ptq4dit_ao.capture.sizes import FreeSize, check_expression
from ptq4dit_ao.errors import ArtifactError

LIMIT = 1 << 20
"""Largest size that is tried. A size that may be as large has no bound."""
DENSE = 128
"""Sizes up to this one are all tried; beyond it, the multiples of powers of two."""
TRIALS = 400
"""Number of random combinations of sizes on which a condition must hold to be left out."""

_DECISIONS = ("_compute_slice_index", "_tensor_min_max")
"""Functions of torch whose inequalities matter: the end of a slice, such as the part of a table that is read, and
Python's ``max`` and ``min`` of sizes, which torch replaces during an export.
"""


_NAMES: dict[str, Any] = {
    "math": math,
    "torch": torch,
    "max": max,
    "min": min,
    "abs": abs,
    "round": round,
    "__builtins__": {},
}
"""Names that the source of a guard may use."""


@dataclass(frozen=True)
class Guard:
    """A condition that held in the example."""

    expression: sympy.Basic
    place: str
    """Line of code that took the decision."""
    holds: Callable[[Mapping[str, int]], bool]

    @property
    def symbols(self) -> set[str]:
        """Names of the symbols in the condition."""
        return {str(symbol) for symbol in self.expression.free_symbols}


def guards_of(env: ShapeEnv) -> list[Guard]:
    """The conditions on sizes that an exported graph's results depend on, simplified by what is known to be equal."""
    found: dict[str, Guard] = {}
    for guard in env.guards:
        expression = env.replace(guard.expr)
        text, place = PythonPrinter().doprint(expression), str(guard.sloc.framework_loc or "")
        if expression.free_symbols and text not in found and not _of_layout(expression, place):
            found[text] = Guard(expression, _place(guard), _compiled(text))
    return list(found.values())


def _place(guard: Any) -> str:
    """The line of code that added a guard, such as ``ptq4dit_ao/capture/call.py:9 in forward``."""
    place = str(guard.sloc).strip("()")
    folders = place.split("/")
    return "/".join(folders[folders.index("ptq4dit_ao") :]) if "ptq4dit_ao" in folders else place


def _of_layout(expression: sympy.Basic, place: str) -> bool:
    """Whether a guard is about the memory layout: an inequality of torch, as its equations tell what divides what."""
    function = place.rstrip(">").rsplit(" ", 1)[-1]  # the place is the text of a FrameSummary, <... in function>
    inequality = isinstance(expression, (sympy.Ne, sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge))
    return inequality and function not in _DECISIONS and "diffusers/" not in place and _in_torch(place)


def _in_torch(place: str) -> bool:
    return place.lstrip("(").startswith("_") or "torch/" in place


def _compiled(text: str) -> Callable[[Mapping[str, int]], bool]:
    code = compile(text, "<guard>", "eval")

    def holds(values: Mapping[str, int]) -> bool:
        try:
            return bool(eval(code, _NAMES, dict(values)))
        except ZeroDivisionError:
            return False

    return holds


class GuardAnalysis:
    """The free sizes of one export.

    Args:
        env: the shape environment of the export. Sizes that equal others, or are computed from them, are replaced in
            it, so that the shapes of all tensors of the graph agree.
        symbols: example of each symbol that is the size of an axis, in the order of the inputs.
        alike: whether two symbols are of one kind, such as lengths of texts.
    """

    def __init__(self, env: ShapeEnv, symbols: Mapping[str, int], alike: Callable[[str, str], bool]) -> None:
        self.env, self.examples, self.alike = env, dict(symbols), alike
        while self._replace_one():
            pass
        self.guards = [*guards_of(env), *self._at_least_one()]
        self.pinned = self._pinned()
        """Reasons, by symbol, why a size has to stay as it was in the example."""
        self.free = [symbol for symbol in self._roots() if symbol not in self.pinned]
        """Symbols of the free sizes."""

    def _roots(self) -> list[str]:
        """Symbols that are not replaced by an expression."""
        return [name for name in self.examples if self._replaced(name) == self._symbol(name)]

    def _symbol(self, name: str) -> sympy.Symbol:
        return next(symbol for symbol in self.env.var_to_range if str(symbol) == name)

    def _replaced(self, name: str) -> sympy.Expr:
        return self.env.replace(self._symbol(name))

    def _at_least_one(self) -> Iterator[Guard]:
        """The conditions that no size is 0 or less, for the sizes that are others less a number."""
        for expression in map(self._replaced, self.examples):
            if (
                expression.free_symbols
                and not expression.is_Symbol
                and any(part.is_negative for part in expression.args)
            ):
                positive = sympy.Ge(expression, 1)
                yield Guard(positive, "the size", _compiled(PythonPrinter().doprint(positive)))

    def _replace_one(self) -> bool:
        """Replace one symbol that a guard makes equal to something else; return whether there was one."""
        guards, roots = guards_of(self.env), set(self._roots())
        for guard in guards:
            if isinstance(guard.expression, sympy.Eq):
                for one, other in itertools.permutations(guard.expression.args, 2):
                    if one.is_Symbol and str(one) in roots and one not in other.free_symbols and other.free_symbols:
                        self._replace(one, other)
                        return True
        for one, other in self._equal_pairs(guards, roots):
            self._replace(self._symbol(other), self._symbol(one))
            return True
        return False

    def _replace(self, symbol: sympy.Symbol, expression: sympy.Expr) -> None:
        # Bounds of the symbol, which leave out sizes of 1, would keep the environment from replacing it.
        self.env.var_to_range[symbol] = ValueRanges(0, int_oo)
        self.env._set_replacement(symbol, expression, "equal")

    def _equal_pairs(self, guards: Sequence[Guard], roots: set[str]) -> Iterator[tuple[str, str]]:
        """Pairs of symbols that can only change together; those of one kind first."""
        order = list(self.examples)
        fixed = [name for name in order if name in roots and self._alone(name, guards) is not None]
        pairs = [pair for pair in itertools.combinations(fixed, 2) if self.examples[pair[0]] == self.examples[pair[1]]]
        for one, other in sorted(pairs, key=lambda pair: not self.alike(*pair)):
            both = [guard for guard in guards if {one, other} <= guard.symbols]
            if both and any(True for _ in self._permitted((one, other), both, _few(self.examples[one]))):
                yield one, other

    def _alone(self, name: str, guards: Sequence[Guard]) -> Guard | None:
        """A guard that lets a symbol have no other value than the example's; None if it can have others."""
        concerned = [guard for guard in guards if name in guard.symbols]
        if not self._fixes(name, concerned):
            return None
        return next((guard for guard in concerned if self._fixes(name, [guard])), concerned[0])

    def _fixes(self, name: str, guards: Sequence[Guard]) -> bool:
        """Whether a symbol has no other value than the example's, or only those that give as many patches."""
        example = self.examples[name]
        permitted = self._permitted((name,), guards, _few(example))
        return not any(2 * value <= example or value >= 2 * example for value in permitted)

    def _permitted(self, names: Sequence[str], guards: Sequence[Guard], tried: Iterable[int]) -> Iterator[int]:
        """The values that some symbols may have together, if all others are as in the example."""
        for value in tried:
            values = self.examples | dict.fromkeys(names, value)
            if value != self.examples[names[0]] and all(guard.holds(values) for guard in guards):
                yield value

    def _pinned(self) -> dict[str, str]:
        reasons = {}
        for name, example in self.examples.items():
            expression = self._replaced(name)
            if not expression.free_symbols:
                reasons[name] = self._reason(name, self._decisive(name))
            elif expression.is_Symbol and str(expression) == name and (guard := self._alone(name, self.guards)):
                reasons[name] = self._reason(name, guard)
            elif any(term.could_extract_minus_sign() for term in _terms(expression)):
                reasons[name] = f"it is {example} in the example, and depends on another size"
        return reasons

    def _decisive(self, name: str) -> Guard | None:
        """The guard that made a symbol a number: an equation of it, best one of the model's own code."""
        found = [guard for guard in self.env.guards if name in map(str, guard.expr.free_symbols)]
        equations = [guard for guard in found if isinstance(guard.expr, sympy.Eq) and len(guard.expr.free_symbols) == 1]
        own = [guard for guard in equations or found if not _in_torch(str(guard.sloc))]
        decisive = next(iter(own or equations or found), None)
        return decisive and Guard(decisive.expr, _place(decisive), lambda values: True)

    def _reason(self, name: str, guard: Guard | None) -> str:
        if guard is None:
            return f"the model fixes it at {self.examples[name]}"
        return f"{guard.place} fixes it at {self.examples[name]}"

    def sizes(self, names: Mapping[str, str]) -> tuple[tuple[FreeSize, ...], tuple[str, ...], dict[str, str]]:
        """The free sizes, and the conditions among them that bounds and divisors do not imply.

        The third value has the symbols of conditions that a file cannot say, with reasons; these must be fixed.

        Args:
            names: name of each free symbol.
        """
        found = {symbol: self._size(symbol, names[symbol]) for symbol in self.free}
        conditions: dict[str, None] = {}
        unsayable: dict[str, str] = {}
        for guard in self.guards:
            if self._implied(guard, found):
                continue
            try:
                conditions[printed(guard.expression, names)] = None
            except ArtifactError:
                unsayable |= dict.fromkeys(guard.symbols, f"{guard.place} compares it with another")
        return tuple(found.values()), tuple(conditions), unsayable

    def _size(self, symbol: str, name: str) -> FreeSize:
        example = self.examples[symbol]
        concerned = [guard for guard in self.guards if guard.symbols == {symbol}]
        values = sorted({*self._permitted((symbol,), concerned, _many(example)), example})
        multiple = math.gcd(*values)
        upper = self.env.var_to_range[self._symbol(symbol)].upper
        most = int(upper) if upper.is_finite and upper < LIMIT else None
        if values[-1] < LIMIT // 2:
            most = self._largest(symbol, concerned, values[-1], multiple)
        if most is not None:
            most -= most % multiple
        return FreeSize(name=name, example=example, least=values[0], most=most, multiple=multiple)

    def _largest(self, symbol: str, guards: Sequence[Guard], low: int, step: int) -> int:
        """The largest permitted value, which lies between ``low`` and twice of it."""
        high = 2 * low + 2 * step
        while high - low > step:
            middle = low + (high - low) // (2 * step) * step
            if all(guard.holds(self.examples | {symbol: middle}) for guard in guards):
                low = middle
            else:
                high = middle
        return low

    def _implied(self, guard: Guard, sizes: Mapping[str, FreeSize]) -> bool:
        draw = random.Random(0)

        def value(size: FreeSize) -> int:
            most = 8 * max(size.example, size.multiple) if size.most is None else size.most
            return size.nearest(draw.randint(size.least, most))

        trials = ({name: value(size) for name, size in sizes.items()} for _ in range(TRIALS))
        return guard.symbols <= sizes.keys() and all(guard.holds(self.examples | values) for values in trials)


def _terms(expression: sympy.Expr) -> list[sympy.Expr]:
    """The summands of an expression that are no numbers."""
    return [term for term in sympy.Add.make_args(expression) if term.free_symbols]


def printed(expression: sympy.Basic, names: Mapping[str, str]) -> str:
    """An expression of symbols as Python source with the sizes' names.

    Raises:
        ArtifactError: a file could not say it.
    """
    renamed = expression.xreplace({s: sympy.Symbol(names[str(s)], integer=True) for s in expression.free_symbols})
    text = PythonPrinter().doprint(renamed)
    check_expression(text, names.values())
    return text


def _few(example: int) -> list[int]:
    """Sizes of half the example or less, and of twice or more, among which one that some patches divide."""
    sizes = [*(example // part for part in (8, 4, 2)), *(example * times for times in (2, 3, 4, 8))]
    return [size + more for size in sizes for more in (0, 1, -1, 2, -2, 3, -3) if size + more > 0]


def _many(example: int) -> Iterator[int]:
    yield from range(1, DENSE + 1)
    yield from (size for size in _few(example) if size > DENSE)
    size = 2 * DENSE
    while size <= LIMIT:
        yield size
        yield size + size // 2
        size *= 2
