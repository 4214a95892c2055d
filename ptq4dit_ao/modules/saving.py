"""Saving of quantized modules: as a whole or not at all, with a model card."""

from __future__ import annotations

import errno
import functools
import inspect
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ptq4dit_ao._files import temporary_folder
from ptq4dit_ao._paths import as_path, because
from ptq4dit_ao.errors import ArgumentError, ArtifactError

CARD = "README.md"
"""File of a model card."""

_SHARDS = re.compile(r"diffusion_pytorch_model.*\.safetensors(\.index\.json)?")


def saved_whole(module: Any) -> None:
    """Let a module's ``save_pretrained`` and its upload write all files or none, and a model card.

    Its ``to`` takes the dtype that it has, which ``from_pipe`` of a pipeline gives to all components.
    """
    for name, function in (("save_pretrained", _save), ("_upload_folder", _upload), ("to", _to)):
        bound = functools.partial(function, module)  # a deep copy of the module has one of its own
        functools.update_wrapper(bound, getattr(type(module), name))
        object.__setattr__(module, name, bound)


def _save(module: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    """Write the module, its configuration and its model card into a folder."""
    _check_no_adapters(module)
    folder = as_path(os.fspath(save_directory), "save_directory").resolve()
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"save_directory {folder} is a file; give a folder")
    given = inspect.signature(type(module).save_pretrained).bind(module, folder, *args, **kwargs).arguments
    options = {name: value for name, value in given.items() if name not in ("self", "save_directory", "kwargs")}
    push, repository = options.pop("push_to_hub", False), given.get("kwargs", {})
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder) as new:
            type(module).save_pretrained(module, new, **options)
            (new / CARD).write_text(module.hf_quantizer.card(module, new), encoding="utf-8")
            _replace(new, folder)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(folder, error) from error
    if push:
        module.push_to_hub(repository.pop("repo_id", folder.name), **repository)


def _replace(new: Path, folder: Path) -> None:
    """Move the files of a folder into another one, without weights of an earlier save there."""
    folder.mkdir(exist_ok=True)
    names = {path.name for path in new.iterdir()}
    mode = (new / CARD).stat().st_mode
    for path in sorted(new.iterdir()):
        path.chmod(mode)  # safetensors makes its files private
        os.replace(path, folder / path.name)
    for path in folder.iterdir():
        if _SHARDS.fullmatch(path.name) and path.name not in names:
            path.unlink()


def _upload(module: Any, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
    """Upload a folder with this package's model card in place of diffusers' own."""
    folder = Path(working_dir)
    (folder / CARD).write_text(module.hf_quantizer.card(module, folder), encoding="utf-8")
    return type(module)._upload_folder(module, working_dir, *args, **kwargs)


def _to(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Move the module. diffusers refuses a dtype for any quantized one, even its own."""
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    if dtype != module.dtype:
        return type(module).to(module, *args, **kwargs)
    return module if device is None else type(module).to(module, device, non_blocking=non_blocking)


def _check_no_adapters(module: Any) -> None:
    adapters = list(getattr(module, "peft_config", None) or ())
    if adapters:
        raise ArgumentError(
            f"the module has the adapter {adapters[0]!r}, which is no part of the quantized model; unload it "
            "(unload_lora_weights of its pipeline, or delete_adapters), save, and load it again"
        )


def _cannot_write(folder: Path, error: Exception) -> ArtifactError:
    code = re.search(r"\(os error (\d+)\)", str(error))  # safetensors reports a full disk only in the message
    number = int(code[1]) if code else getattr(error, "errno", None)
    reason = os.strerror(number) if number else str(error)
    if number in (errno.ENOSPC, errno.EDQUOT):
        way_out = "make room, or save to another disk"
    else:
        reason = because(error) if isinstance(error, OSError) else reason
        way_out = "choose a folder that you may write to"
    return ArtifactError(f"cannot save the module as {folder}: {reason}; {way_out}. What was there is unchanged")
