"""Types of single values in a recipe. The models that use them are strict: ``"8"`` is not 8, and ``true`` is not 1."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError


def as_tuple(value: object) -> object:
    """Accept a list where strict models require a tuple. Tuples keep the models immutable and hashable."""
    return tuple(value) if isinstance(value, list) else value


def exactly(kind: type) -> BeforeValidator:
    """A validator that accepts values of exactly this type.

    Literals compare with ``==``, which would accept 1 for True.
    """

    def check(value: object) -> object:
        if type(value) is not kind:
            raise PydanticCustomError("exact_type", "Input should be of type {kind}", {"kind": kind.__name__})
        return value

    return BeforeValidator(check)


def _all_different(values: tuple[float, ...]) -> tuple[float, ...]:
    twice = next((value for index, value in enumerate(values) if value in values[:index]), None)
    if twice is not None:
        # problems.py reports the message of the error type "recipe_rule" unchanged.
        raise PydanticCustomError(
            "recipe_rule", "{value} stands more than once in the list; keep one of them", {"value": f"{twice:g}"}
        )
    return values


def count_or_list(value: object) -> str:
    """Tag of the union's branch: ``list`` or ``count``."""
    return "list" if isinstance(value, list | tuple) else "count"


Version = Annotated[Literal[1], exactly(int)]
Bits = Annotated[int, Field(ge=2, le=8)]


def _quantized_or_float(value: object) -> str:
    return "float" if value == 16 and type(value) is int else "quantized"


ActivationBits = Annotated[
    Annotated[Bits, Tag("quantized")] | Annotated[Literal[16], Tag("float")], Discriminator(_quantized_or_float)
]
Count = Annotated[int, Field(ge=1)]
# The widest seed that both torch and numpy take has 32 bits.
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
TimestepList = Annotated[
    tuple[Annotated[float, Field(ge=0)], ...],
    Field(min_length=1, json_schema_extra={"uniqueItems": True}),
    BeforeValidator(as_tuple),
    AfterValidator(_all_different),
]
# The discriminator decides count or list first, so that a wrong item is reported once and not once per branch.
Timesteps = Annotated[
    Annotated[Count, Tag("count")] | Annotated[TimestepList, Tag("list")], Discriminator(count_or_list)
]
# A budget needs at least two widths to choose from.
BitsCandidates = Annotated[
    tuple[Bits, ...],
    Field(min_length=2, json_schema_extra={"uniqueItems": True}),
    BeforeValidator(as_tuple),
    AfterValidator(_all_different),
]


def _number_or_auto(value: object) -> str:
    return "auto" if isinstance(value, str) else "number"


Alpha = Annotated[
    Annotated[float, Field(ge=0, le=1), Tag("number")] | Annotated[Literal["auto"], Tag("auto")],
    Discriminator(_number_or_auto),
]
Cutting = Annotated[
    Annotated[float, Field(ge=1), Tag("number")] | Annotated[Literal["auto"], Tag("auto")],
    Discriminator(_number_or_auto),
]
BitsOrAuto = Annotated[
    Annotated[Bits, Tag("number")] | Annotated[Literal["auto"], Tag("auto")],
    Discriminator(_number_or_auto),
]
OnlyTrue = Annotated[Literal[True], exactly(bool)]
OnlyFalse = Annotated[Literal[False], exactly(bool)]


def _flag_or_word(value: object) -> str:
    return "word" if isinstance(value, str) else "flag"


DynamicOrAuto = Annotated[
    Annotated[OnlyFalse, Tag("flag")] | Annotated[Literal["token", "auto"], Tag("word")],
    Discriminator(_flag_or_word),
]
DynamicOrNot = Annotated[
    Annotated[OnlyFalse, Tag("flag")] | Annotated[Literal["token"], Tag("word")],
    Discriminator(_flag_or_word),
]
