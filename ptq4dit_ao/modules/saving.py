"""Saving of quantized modules: as a whole or not at all, with a model card."""

from __future__ import annotations

import errno
import functools
import inspect
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ptq4dit_ao._files import is_unfinished, replacing_folder
from ptq4dit_ao._paths import as_path, because, error_number
from ptq4dit_ao.errors import ArgumentError, ArtifactError

CARD = "README.md"
"""File of a model card."""

BOUND = ("save_pretrained", "_upload_folder", "to")
"""Methods of a module of diffusers that a quantized one has of its own."""


def saved_whole(module: Any) -> None:
    """Let a module's ``save_pretrained`` and its upload write all files or none, and a model card.

    Its ``to`` takes the dtype that it has, which ``from_pipe`` of a pipeline gives to all components.
    """
    for name, function in zip(BOUND, (_save, _upload, _to), strict=True):
        bound = functools.partial(function, module)  # a deep copy of the module has one of its own
        functools.update_wrapper(bound, getattr(type(module), name))
        object.__setattr__(module, name, bound)


def unbind(module: Any) -> None:
    """Undo :func:`saved_whole`."""
    for name in BOUND:
        vars(module).pop(name, None)


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
        with replacing_folder(folder) as new:
            type(module).save_pretrained(module, new, **options)
            (new / CARD).write_text(module.hf_quantizer.card(module, new), encoding="utf-8")
            mode = (new / CARD).stat().st_mode
            for path in new.iterdir():
                path.chmod(mode)  # safetensors makes its files private
            _carry_over(folder, new, options.get("variant"))
    except (OSError, SafetensorError) as error:
        raise cannot_save(folder, error) from error
    if push:
        _push(module, folder, **repository)


def _carry_over(folder: Path, new: Path, variant: str | None) -> None:
    """Copy what else is in a folder: other files than an earlier save of the same variant."""
    kind = f"\\.{re.escape(variant)}" if variant else ""
    earlier = re.compile(
        rf"diffusion_pytorch_model({kind}(-\d+-of-\d+)?\.safetensors|\.safetensors\.index{kind}\.json)"
    )
    for path in folder.iterdir() if folder.is_dir() else ():
        if (new / path.name).exists() or earlier.fullmatch(path.name) or is_unfinished(path):
            continue
        if path.is_dir():
            shutil.copytree(path, new / path.name, symlinks=True)
        else:
            shutil.copy2(path, new / path.name, follow_symlinks=False)


def _push(
    module: Any,
    folder: Path,
    repo_id: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    **options: Any,
) -> None:
    """Upload a saved folder."""
    from diffusers.utils import hub_utils

    repository = hub_utils.create_repo(repo_id or folder.name, exist_ok=True, private=private, token=token)
    module._upload_folder(folder, repository.repo_id, token=token, **options)


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


def cannot_save(folder: Path, error: Exception, what: str = "module") -> ArtifactError:
    """An error that says why a folder cannot be written, and that nothing was changed."""
    number = error_number(error)
    reason = os.strerror(number) if number else str(error)
    if number in (errno.ENOSPC, errno.EDQUOT):
        way_out = "make room, or save to another disk"
    else:
        reason = because(error) if isinstance(error, OSError) else reason
        way_out = "choose a folder that you may write to"
    return ArtifactError(f"cannot save the {what} as {folder}: {reason}; {way_out}. What was there is unchanged")
