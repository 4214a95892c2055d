"""Free sizes of a captured graph: what may differ from call to call, and the conditions on it.

A size is a whole number, a name (``height``), or an expression of names (``height // 2 * (width // 2)``). Expressions
are read by a parser of their own, because they also come from files.
"""

from __future__ import annotations

import ast
import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ptq4dit_ao.errors import ArtifactError

Expression = int | str
"""A whole number, or an expression of names of sizes."""

_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS: dict[str, Callable[..., int]] = {"max": max, "min": min}
_UNARY: dict[type, Callable[[Any], Any]] = {ast.USub: operator.neg, ast.Not: operator.not_}


@dataclass(frozen=True, kw_only=True)
class FreeSize:
    """One size that may differ from call to call, and the values that it may have."""

    name: str
    """``batch``, ``height``, ``width``, ``frames``, ``text``, ``tokens``, or an input and its axis (``ids_axis_0``)."""
    example: int
    """Value at the exported example."""
    least: int = 1
    most: int | None = None
    """Largest value; None if there is no bound."""
    multiple: int = 1
    """Divisor of every value, such as the size of a patch."""

    def problem(self, value: int) -> str | None:
        """The reason why a value cannot be; None if it can."""
        if value % self.multiple:
            return f"{self.name} is {value}, which is no multiple of {self.multiple}"
        if value < self.least:
            return f"{self.name} is {value}, less than {self.least}"
        if self.most is not None and value > self.most:
            return f"{self.name} is {value}, more than {self.most}"
        return None

    def nearest(self, value: int) -> int:
        """The permitted value that is nearest to another one."""
        most = math.inf if self.most is None else self.most
        value = int(max(self.least, min(value, most)))
        down = value - value % self.multiple
        return down if down >= self.least else down + self.multiple

    def __str__(self) -> str:
        """The permitted values in words."""
        said = f"from {self.least}" + ("" if self.most is None else f" to {self.most}")
        return f"{self.name}: {said}" + (f", a multiple of {self.multiple}" if self.multiple > 1 else "")


@dataclass(frozen=True, kw_only=True)
class FreeSizes:
    """The free sizes of a graph, the conditions among them, and the axes with a meaning that are fixed."""

    sizes: tuple[FreeSize, ...] = ()
    conditions: tuple[str, ...] = ()
    """Comparisons that must hold, such as ``tokens == height // 2 * (width // 2)``."""
    fixed: Mapping[str, str] = field(default_factory=dict)
    """Reasons, by axis (``width of hidden_states``), why a size stays as it was in the example."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the free sizes."""
        return tuple(size.name for size in self.sizes)

    @property
    def example(self) -> dict[str, int]:
        """Values at the exported example."""
        return {size.name: size.example for size in self.sizes}

    def problem(self, values: Mapping[str, int]) -> str | None:
        """The first reason why the graph does not run at these sizes; None if it does."""
        for size in self.sizes:
            if size.name in values and (said := size.problem(values[size.name])):
                return said
        known = values.keys()
        for condition in self.conditions:
            if names_in(condition) <= known and not evaluate(condition, values):
                said = ", ".join(f"{name} {values[name]}" for name in sorted(names_in(condition)))
                return f"{condition} does not hold at {said}"
        return None

    def other(self, given: Mapping[str, int] | None = None) -> tuple[dict[str, int], list[str]]:
        """Permitted sizes that differ from given ones, and the names of those that no condition lets change.

        Each size is about half as large where it can be, else a little smaller, else larger.

        Args:
            given: values of all sizes; the example's by default.
        """
        values, still = dict(self.example if given is None else given), []
        for size in self.sizes:
            for change in (_halved, _smaller, _larger):
                changed = values | {size.name: change(size, values[size.name])}
                if changed[size.name] != values[size.name] and self.problem(changed) is None:
                    values = changed
                    break
            else:
                still.append(size.name)
        return values, still

    def to_dict(self) -> dict[str, object]:
        """The sizes as JSON values."""
        return {
            "sizes": [asdict(size) for size in self.sizes],
            "conditions": list(self.conditions),
            "fixed": dict(self.fixed),
        }

    @classmethod
    def from_dict(cls, data: object) -> FreeSizes:
        """Read what :meth:`to_dict` has written.

        Raises:
            ArtifactError: ``data`` has another form.
        """
        match data:
            case {"sizes": [*sizes], "conditions": [*conditions], "fixed": dict(fixed), **rest} if not rest:
                free = tuple(map(_size_from, sizes))
                names = {size.name for size in free}
                for condition in conditions:
                    check_expression(condition, names)
                if all(isinstance(text, str) for text in (*fixed, *fixed.values())):
                    return cls(sizes=free, conditions=tuple(conditions), fixed=fixed)
        raise ArtifactError(f"the free sizes are {data!r}, which this version does not read; quantize again")


def _size_from(data: object) -> FreeSize:
    match data:
        case {"name": str(name), "example": int(), "least": int(), "most": int() | None, "multiple": int(), **rest}:
            if not rest and name.isidentifier() and data["multiple"] > 0:  # type: ignore[index]
                return FreeSize(**data)  # type: ignore[arg-type]
    raise ArtifactError(f"the free size {data!r} is not one that this version reads; quantize again")


def _halved(size: FreeSize, value: int) -> int:
    return size.nearest(-(-value // 2))


def _smaller(size: FreeSize, value: int) -> int:
    return value - size.multiple


def _larger(size: FreeSize, value: int) -> int:
    return value + size.multiple


def evaluate(expression: Expression, values: Mapping[str, int]) -> Any:
    """The value of an expression.

    Raises:
        ArtifactError: it is none, or has a name without a value.
    """
    if isinstance(expression, int):
        return expression
    return _value(_parsed(expression), values)


def names_in(expression: Expression) -> frozenset[str]:
    """The names of sizes in an expression."""
    return frozenset() if isinstance(expression, int) else _names(expression)


def check_expression(expression: object, names: Iterable[str]) -> None:
    """Check that an expression can be evaluated if these names have values.

    Raises:
        ArtifactError: it cannot.
    """
    if type(expression) is int and expression >= 0:
        return
    if not isinstance(expression, str) or not names_in(expression) <= set(names):
        raise ArtifactError(f"the size {expression!r} is not one that this version reads; quantize again")
    _value(_parsed(expression), dict.fromkeys(names, 1))


@functools.lru_cache(maxsize=4096)
def _parsed(expression: str) -> ast.expr:
    try:
        return ast.parse(expression, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ArtifactError(f"the size {expression!r} cannot be read ({error}); quantize again") from error


@functools.lru_cache(maxsize=4096)
def _names(expression: str) -> frozenset[str]:
    called = {node.func for node in ast.walk(_parsed(expression)) if isinstance(node, ast.Call)}
    return frozenset(
        node.id for node in ast.walk(_parsed(expression)) if isinstance(node, ast.Name) and node not in called
    )


def _value(node: ast.expr, values: Mapping[str, int]) -> Any:
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name) if name in values:
            return values[name]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_value(operand, values))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _divided(_OPERATORS[type(op)], _value(left, values), _value(right, values))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, values), _value(right, values))
        case ast.BoolOp(op=ast.And(), values=parts):
            return all(_value(part, values) for part in parts)
        case ast.BoolOp(op=ast.Or(), values=parts):
            return any(_value(part, values) for part in parts)
        case ast.Call(func=ast.Name(id=name), args=[_, *_] as parts, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(_value(part, values) for part in parts))
    raise ArtifactError(f"the size {ast.unparse(node)!r} is not one that this version reads; quantize again")


def _divided(apply: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    """The result of an operator; -1, which no size is, where it would divide by 0."""
    return -1 if apply in (operator.floordiv, operator.mod) and right == 0 else apply(left, right)
