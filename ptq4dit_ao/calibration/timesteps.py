"""Which of a sampler's timesteps to calibrate on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ptq4dit_ao.errors import CalibrationError


def choose_timesteps(available: Sequence[float], wanted: int | Sequence[float]) -> list[float]:
    """A count takes evenly spaced ones from first to last; a list is checked.

    Raises:
        CalibrationError: more are wanted than there are, or one does not occur.
    """
    if isinstance(wanted, int):
        if not 1 <= wanted <= len(available):
            raise CalibrationError(f"{wanted} calibration timesteps asked for, the sampler has {len(available)} steps")
        positions = np.linspace(0, len(available) - 1, wanted).round().astype(int)
        return [available[i] for i in positions]
    if not wanted:
        raise CalibrationError("the list of calibration timesteps is empty; name at least one, or give a count")
    for t in wanted:
        if t not in available:
            nearest = min(available, key=lambda a: abs(a - t))
            raise CalibrationError(f"the sampler never visits timestep {t:g}; the nearest it visits is {nearest:g}")
    return [t for t in available if t in set(wanted)]
