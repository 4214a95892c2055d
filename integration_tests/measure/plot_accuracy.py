"""Plot of results of ``accuracy.py``: ``python integration_tests/measure/plot_accuracy.py OUTPUT.png RUN.json ...``.

It has a panel for each bit width, in the order of the files, with eps SQNR over timesteps as the mean over calibration
seeds. If several files have the same row, the last one is plotted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D


def main(output: str, *runs: str) -> None:
    curves: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for run in runs:
        data = json.loads(Path(run).read_text())
        for row in data["rows"]:
            curves.setdefault(row["bits"], {})[row["method"]] = data["timesteps"], row["per_timestep"]
    names = list(dict.fromkeys(name for methods in curves.values() for name in methods))
    figure = Figure(figsize=(3.2 * len(curves), 3), layout="constrained")
    axes = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for panel, (bits, methods) in zip(axes, curves.items(), strict=True):
        for method, (timesteps, values) in methods.items():
            panel.plot(timesteps, values, color=f"C{names.index(method)}", linewidth=1.5)
        panel.set(title=bits, xlabel="timestep")
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("eps SQNR, dB")
    lines = [Line2D([], [], color=f"C{i}") for i in range(len(names))]
    figure.legend(lines, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(output, dpi=120)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
