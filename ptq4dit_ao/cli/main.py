"""``ptq4dit-ao``: quantize, balance, sample, inspect, evaluate, table, export, bench.

Exit codes: 0 done, 1 it could not be done (the message says why), 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from ptq4dit_ao._paths import as_path, because
from ptq4dit_ao._version import __version__
from ptq4dit_ao.choices import FLOAT_DTYPES, LAYER_PRESETS, LPIPS_NETWORKS, MODULE_FORMATS, SAMPLERS
from ptq4dit_ao.cli.messages import with_flags
from ptq4dit_ao.cli.noise import silence, silence_loading_bars
from ptq4dit_ao.errors import ArgumentError, PTQ4DiTError

EXAMPLES = """\
examples:
  ptq4dit-ao quantize digits_w8a8 --output out/digits            the shipped model, end to end
  ptq4dit-ao quantize my.yaml --model ./DiT-XL-2-256 --output q  a diffusers pipeline on disk
  ptq4dit-ao quantize wan_w8a8 --pipeline ./Wan2.2 --output q    a whole pipeline, as diffusers loads it
  ptq4dit-ao balance --model ./DiT-XL-2-256 --output ./balanced  a better float model, for any quantizer
  ptq4dit-ao sample out/digits --backend fbgemm                  a grid of samples, integer kernels
  ptq4dit-ao inspect out/digits                                  layers, bits, sites, kernel proof
  ptq4dit-ao evaluate out/digits --backend reference fbgemm      errors against float, distances to real images
  ptq4dit-ao table --output out/table                            methods x bits x steps, as papers have it
  ptq4dit-ao export out/digits --backend openvino --output m.xml what another program runs
  ptq4dit-ao bench out/digits --peers                            speed against float and against other quantizers
  ptq4dit-ao bench --width dit-xl --blocks 4                     the same without weights
  ptq4dit-ao backends                                            what this machine can run, and why not the rest

Recipes are YAML files; `ptq4dit-ao recipes` lists the shipped ones and `ptq4dit-ao recipes NAME` prints one.
"""

BACKEND_HELP = "see 'ptq4dit-ao backends'; 'auto' is the fastest that can run here (default: %(default)s)"

LPIPS_HELP = "also LPIPS by this network, for images of 64 pixels and more; torchvision's weights must be on disk"


def build_parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    parser = argparse.ArgumentParser(
        prog="ptq4dit-ao",
        description="Post-training quantization of Diffusion Transformers: balanced, folded, integer.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "-v", "--verbose", action="count", default=0,
        help="say what is being done, and what other libraries say; twice, for every site",
    )  # fmt: skip
    tables = argparse.ArgumentParser(add_help=False)
    tables.add_argument("--wide", action="store_true", help="print whole tables, however wide the console is")
    float_dtype = argparse.ArgumentParser(add_help=False)
    float_dtype.add_argument(
        "--float-dtype", choices=FLOAT_DTYPES,
        help="what attention and other float matrix products compute in; default: as the model does",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    p = commands.add_parser(
        "quantize", parents=[common, tables], help="calibrate, balance, convert and save",
        description="Quantize a model as a recipe says. Writes the quantized model, report.json and report.html.",
    )  # fmt: skip
    p.add_argument("recipe", help="a recipe file, or the name of a shipped one (digits_w8a8, dit_w4a8, ...)")
    p.add_argument("--output", required=True, type=_path, metavar="DIR", help="folder to write")
    p.add_argument(
        "--model", metavar="MODEL",
        help="'reference', 'fashion' or 'flow' (the shipped models), a diffusers folder, or package.module:function; "
        "default: what the recipe names",
    )  # fmt: skip
    p.add_argument(
        "--pipeline", type=_path, metavar="DIR",
        help="quantize all transformers of a diffusers pipeline, and save the pipeline as diffusers loads it",
    )  # fmt: skip
    p.add_argument(
        "--component", action="append", default=[], metavar="NAME=RECIPE",
        help="with --pipeline: the recipe of one component; int8_weight_only or int8_dynamic for a text encoder",
    )  # fmt: skip
    p.add_argument(
        "--format", choices=MODULE_FORMATS,
        help="with --pipeline: 'torchao' (diffusers alone reads it) or 'ptq4dit' (4 bits packed; needs this package); "
        "default: torchao for 8 bits",
    )  # fmt: skip
    p.add_argument("--samples", type=_path, metavar="FILE", help="calibrate on recorded samples (safetensors)")
    p.add_argument(
        "--no-leave-one-out", dest="leave_one_out", action="store_false",
        help="do not measure what each layer costs (a quarter of the time that evaluation takes, at most)",
    )  # fmt: skip

    p = commands.add_parser(
        "balance", parents=[common, tables], help="balance a float checkpoint, for any quantizer",
        description="Balance a model in its own parameters and save it as the ordinary diffusers checkpoint it was.",
    )  # fmt: skip
    p.add_argument("recipe", nargs="?", default="dit_w8a8", help="how to balance (default: %(default)s)")
    p.add_argument("--model", required=True, metavar="MODEL", help="as for quantize")
    p.add_argument("--output", required=True, type=_path, metavar="DIR", help="folder to write")
    p.add_argument("--samples", type=_path, metavar="FILE", help="calibrate on recorded samples (safetensors)")

    p = commands.add_parser(
        "sample", parents=[common, float_dtype], help="draw a grid of images",
        description="Sample a quantized model on a backend and write a PNG, one row a class.",
    )  # fmt: skip
    p.add_argument("directory", type=_path, metavar="DIR", help="a quantized model")
    p.add_argument("--backend", default="auto", help=BACKEND_HELP)
    p.add_argument("--output", type=_path, default=Path("samples.png"), metavar="PNG", help="default: %(default)s")
    p.add_argument("--steps", type=_positive, default=50, help="sampling steps (default: %(default)s)")
    p.add_argument("--sampler", choices=SAMPLERS, help="default: what its recipe names, else the model's own")
    p.add_argument("--guidance", type=_scale, help="guidance scale; default: the recipe's")
    p.add_argument("--classes", type=_classes, metavar="N,...", help="what to draw, as 207,360; default: the first ten")
    p.add_argument(
        "--model", metavar="MODEL",
        help="whose VAE decodes the images, if it draws latents: as for quantize; default: what the recipe names",
    )  # fmt: skip
    p.add_argument("--per-class", type=_positive, default=10, metavar="N", help="images a class (default: %(default)s)")
    p.add_argument("--seed", type=_seed, default=0, help="seed of the noise (default: %(default)s)")

    p = commands.add_parser(
        "inspect", parents=[common, tables, float_dtype], help="show layers, bits, sites and kernel proof",
        description="Show what is in a quantized model, and prove which kernels run it.",
    )  # fmt: skip
    p.add_argument("directory", type=_path, metavar="DIR", help="a quantized model")
    p.add_argument("--backend", default="auto", help=f"{BACKEND_HELP}; 'none' for no proof")

    p = commands.add_parser(
        "evaluate", parents=[common, tables], help="measure errors against float, and distances to real images",
        description="Compare a quantized model with its float model at equal inputs and equal noise, and what both "
        "draw with a reference set.",
    )  # fmt: skip
    p.add_argument("directory", type=_path, metavar="DIR", help="a quantized model")
    p.add_argument("--model", metavar="MODEL", help="the float model, as for quantize; default: what the recipe names")
    p.add_argument(
        "--backend", nargs="+", default=["reference"], metavar="NAME",
        help="one or several, a row each; 'reference' simulates (default)",
    )  # fmt: skip
    p.add_argument("--samples", type=_positive, default=200, metavar="N", help="images to draw (default: %(default)s)")
    p.add_argument("--steps", type=_positive, default=50, help="sampling steps (default: %(default)s)")
    p.add_argument("--sampler", choices=SAMPLERS, help="default: what its recipe names, else the model's own")
    p.add_argument("--seed", type=_seed, default=3000, help="seed of noise and intervals (default: %(default)s)")
    p.add_argument(
        "--features", metavar="NETWORK",
        help="what distances are measured in: 'digits', 'fashion' or 'flow' (the shipped models' own, and default), or "
        "package.module:function",
    )  # fmt: skip
    p.add_argument(
        "--reference", type=_path, metavar="REAL",
        help="real images: a folder of PNG, an .npz like ADM's, or what --cache kept (.safetensors)",
    )  # fmt: skip
    p.add_argument("--lpips", choices=LPIPS_NETWORKS, help=LPIPS_HELP)
    p.add_argument("--cache", type=_path, metavar="FILE", help="keep the reference's statistics here (safetensors)")
    p.add_argument("--json", type=_path, metavar="FILE", help="also write the figures as JSON")
    p.add_argument("--markdown", type=_path, metavar="FILE", help="also write the tables as Markdown")

    p = commands.add_parser(
        "table", parents=[common, tables], help="compare methods at several widths and step counts",
        description="Quantize a class-conditional DiT with each method at each width, and measure each at each step "
        "count, simulated or by integer kernels. Writes table.md, table.json and table.png. The same command goes on "
        "where it was killed.",
    )  # fmt: skip
    p.add_argument("--model", default="reference", metavar="MODEL", help="as for quantize (default: %(default)s)")
    p.add_argument(
        "--methods", type=_words, default=("minmax", "smoothquant", "paper", "ptqd", "fast", "auto"), metavar="A,B",
        help="shipped recipes or recipe files (default: minmax,smoothquant,paper,ptqd,fast,auto)",
    )  # fmt: skip
    p.add_argument(
        "--bits", type=lambda text: _words(text.lower()), default=("w8a8", "w4a8", "w6a6", "w4a4"), metavar="A,B",
        help="of weights and activations (default: w8a8,w4a8,w6a6,w4a4)",
    )  # fmt: skip
    p.add_argument("--steps", type=_numbers, default=(100, 50), metavar="A,B", help="of the sampler (default: 100,50)")
    p.add_argument(
        "--sampler", choices=SAMPLERS,
        help="of calibration and of images (default: ddpm, the paper's; flow for a model that predicts velocity)",
    )  # fmt: skip
    p.add_argument("--samples", type=_positive, default=2000, metavar="N", help="images to draw (default: %(default)s)")
    p.add_argument(
        "--calibration-images", type=_positive, default=16, metavar="N", help="at each timestep (default: %(default)s)"
    )
    p.add_argument(
        "--adaround-steps", type=_positive, metavar="N",
        help="of learning in each block, for methods that learn (default: the recipe's, 20000 as in the papers)",
    )  # fmt: skip
    p.add_argument("--seed", type=_seed, default=0, help="of all draws (default: %(default)s)")
    p.add_argument("--guidance", type=_scale, default=1.5, help="guidance scale (default: %(default)s)")
    p.add_argument(
        "--layers", choices=LAYER_PRESETS, default="paper", help="what all methods quantize (default: %(default)s)"
    )
    p.add_argument(
        "--backend", default="reference", metavar="NAME",
        help="what executes the quantized models; an integer one is faster, and proved (default: %(default)s)",
    )  # fmt: skip
    p.add_argument("--features", metavar="NETWORK", help="as for evaluate")
    p.add_argument("--reference", type=_path, metavar="REAL", help="as for evaluate")
    p.add_argument("--lpips", choices=LPIPS_NETWORKS, help=LPIPS_HELP)
    p.add_argument("--ablation", action="store_true", help="also the paper's parts: base, +CSB, +SSC, +ours")
    p.add_argument("--output", required=True, type=_path, metavar="DIR", help="folder of the table and its cells")

    p = commands.add_parser(
        "export", parents=[common, float_dtype], help="write what another program runs",
        description="Write a quantized model as the file of a backend: an OpenVINO IR, an AOTInductor package, ONNX.",
    )  # fmt: skip
    p.add_argument("directory", type=_path, metavar="DIR", help="a quantized model")
    p.add_argument("--backend", required=True, help="one that writes a file; see 'ptq4dit-ao backends'")
    p.add_argument("--output", required=True, type=_path, metavar="FILE", help="file to write; gets the usual suffix")

    p = commands.add_parser(
        "bench", parents=[common, tables], help="measure speed, error, start-up and memory, interleaved",
        description="Time a quantized model on each backend beside the float model, in interleaved rounds.",
    )  # fmt: skip
    subject = p.add_mutually_exclusive_group(required=True)
    subject.add_argument("directory", nargs="?", type=_path, metavar="DIR", help="a quantized model")
    subject.add_argument("--width", help="a DiT with random weights instead: dit-s, dit-b, dit-l or dit-xl")
    p.add_argument("--blocks", type=_positive, metavar="N", help="depth of the random DiT; default: as published")
    p.add_argument("--recipe", help="how to quantize the random DiT; default: dit_w8a8")
    p.add_argument("--model", metavar="MODEL", help="the float model, as for quantize; default: what the recipe names")
    p.add_argument("--samples", type=_path, metavar="FILE", help="time recorded samples (safetensors)")
    p.add_argument("--batch", type=_positive, default=2, help="default: %(default)s")
    p.add_argument("--rounds", type=_positive, default=20, help="timed rounds (default: %(default)s)")
    p.add_argument("--seed", type=_seed, default=0, help="seed of the inputs (default: %(default)s)")
    p.add_argument("--backends", nargs="+", metavar="NAME", help="default: all with integer kernels that can run here")
    p.add_argument("--peers", action="store_true", help="also other quantizers of the float model that are installed")
    p.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction,
        help="also the compiled bfloat16 model; default: where the processor computes in it",
    )  # fmt: skip
    p.add_argument(
        "--float-dtype", choices=FLOAT_DTYPES,
        help="also backends with attention and other float matrix products in this, where they can",
    )  # fmt: skip
    p.add_argument("--json", type=_path, metavar="FILE", help="also write the figures as JSON")
    p.add_argument("--markdown", type=_path, metavar="FILE", help="also write the table as Markdown")

    commands.add_parser(
        "backends", parents=[common, tables], help="show what this machine can run, and why not the rest",
        description="Show every backend: can this machine run it, what it carries, which file it writes.",
    )  # fmt: skip

    p = commands.add_parser("recipes", parents=[common, tables], help="list shipped recipes, or print one")
    p.add_argument("name", nargs="?", help="recipe to print")
    p.add_argument("--schema", action="store_true", help="print the JSON Schema of recipe files, for editors")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    args = build_parser().parse_args(argv)
    console, errors = Console(), Console(stderr=True)
    _set_up_logging(args.verbose, errors)
    try:
        _command(args, errors)(args, console)
    except (PTQ4DiTError, OSError) as error:  # a path that cannot be read or written is the user's to mend
        text = because(error) if isinstance(error, OSError) and not isinstance(error, PTQ4DiTError) else str(error)
        errors.print(f"[bold red]error:[/] {escape(with_flags(text, args))}", soft_wrap=True, highlight=False)
        return 1
    except KeyboardInterrupt:
        errors.print("interrupted; nothing half-written was left behind")
        return 1
    return 0


def _set_up_logging(verbose: int, errors: Console) -> None:
    """Set up which log lines and warnings of this library and of others are shown."""
    # Time and place would take half of a console of 80 columns.
    handler = RichHandler(console=errors, show_time=verbose > 0, show_path=verbose > 0)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("ptq4dit_ao").setLevel([logging.WARNING, logging.INFO, logging.DEBUG][min(verbose, 2)])
    if not verbose:
        silence()


def _command(args: argparse.Namespace, errors: Console) -> Callable[[argparse.Namespace, Console], None]:
    """The function that carries out a command; errors that need no torch are raised before torch is loaded.

    Raises:
        PTQ4DiTError: a recipe that is asked for is not there, or has faults.
    """
    from ptq4dit_ao.cli import recipes  # not for --help, to which pydantic would add a tenth of a second

    if args.command == "recipes":
        return recipes.recipes
    recipes.check_recipes(args)
    with _loading(errors):
        from ptq4dit_ao.cli import commands

        if "model" in args and not args.verbose:  # a float model is loaded
            silence_loading_bars()
    run: Callable[[argparse.Namespace, Console], None] = getattr(commands, args.command)
    return run


def _loading(errors: Console) -> AbstractContextManager[object]:
    """Say what takes the seconds that follow, unless it has been loaded: in a line that goes, on a terminal."""
    if "torch" in sys.modules:
        return nullcontext()
    what = "loading torch and torchao, which takes some seconds"
    if errors.is_terminal:
        return errors.status(what)
    errors.print(what, soft_wrap=True, highlight=False)
    return nullcontext()


def _path(text: str) -> Path:
    try:
        return as_path(text)
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_positive(word) for word in _words(text))


def _classes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in _words(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of classes, such as 207,360") from None


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return value


def _seed(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^32 - 1")
    return value


def _scale(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return value


if __name__ == "__main__":
    sys.exit(main())
