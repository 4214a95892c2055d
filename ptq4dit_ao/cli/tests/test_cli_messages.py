"""Messages of the library, as the command line shows them."""

from __future__ import annotations

from argparse import Namespace

import pytest

from ptq4dit_ao.cli.messages import with_flags


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("give one (features=...)", "give one (--features)"),
        ("the folder (model=..., float_dtype=...)", "the folder (--model, --float-dtype)"),
        ("name it with timestep_input=...", "name it with timestep_input=..."),  # no option of the command
        ("use balance='none'", "use balance='none'"),
    ],
)
def test_a_parameter_is_shown_as_the_option_of_the_command(text, shown):
    assert with_flags(text, Namespace(features=None, model=None, float_dtype=None)) == shown
