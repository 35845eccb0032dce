"""Models as folders with a ``config.json`` and safetensors, on disk or on the Hugging Face Hub. Pickles are never read.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from invflow._core import plugins
from invflow._core.records import digest, parse_json, write_atomically

__all__ = ["kind_of", "load_built", "read_config", "resolve_folder", "save_module", "shipped_names"]

M = TypeVar("M", bound=nn.Module)

CONFIG, WEIGHTS = "config.json", "model.safetensors"
SHIPPED = Path(__file__).parents[1] / "weights"


def shipped_names(kind: str | None = None) -> list[str]:
    """Names of the shipped models, all or those of one kind, as ``load`` takes them."""
    names = []
    for path in SHIPPED.glob(f"*/{CONFIG}"):
        found = json.loads(path.read_text(encoding="utf-8"))["kind"]
        if kind in (None, found):
            # "mnist-vfm" and "mnist-lmmse" are loaded as "mnist" by the class that reads them
            names.append(path.parent.name if kind in (None, "flow-map") else path.parent.name.rpartition("-")[0])
    return sorted(names)


def resolve_folder(name: str | os.PathLike[str], kind: str) -> Path:
    """Find the folder of a model.

    Args:
        name: A folder, the folder of a finished training, the name of a shipped model, or a Hub repository id
            ``owner/name``.
        kind: Kind of model, as configurations name it, such as ``"flow-map"``.

    Returns:
        The folder, downloaded if necessary.

    Raises:
        ValueError: If nothing is found, with the nearest shipped name.
    """
    path = Path(name)
    if (path / CONFIG).is_file():
        return path
    if (SHIPPED / str(name) / CONFIG).is_file():  # even if the current folder has a data set of that name
        return SHIPPED / str(name)
    for inner in (path / "prior", path / "vfm"):  # where a training saves its result
        if (inner / CONFIG).is_file():
            return inner
    if any(path.glob("checkpoint*.safetensors")):
        raise ValueError(f"the training in {str(name)!r} is not finished: the command that started it resumes from its "
                         "checkpoint")
    if path.is_dir():
        raise ValueError(f"the folder {str(name)!r} holds no {CONFIG}: pass a folder that save_pretrained wrote")
    if str(name).count("/") == 1 and not path.is_absolute() and not str(name).startswith("."):
        return _download(str(name), kind)
    near = difflib.get_close_matches(str(name), shipped_names(kind), n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(
        f"no {kind} named {str(name)!r}{hint} Known: {', '.join(shipped_names(kind)) or 'none'}; a folder that "
        "save_pretrained wrote; a Hub repository id 'owner/name'; or, for a prior, a function 'package.module:function'"
    )


def _download(repo_id: str, kind: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # huggingface_hub.errors has them from 0.25 on
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        # weights and their description only: nothing else in a repository is ever opened
        return Path(snapshot_download(repo_id, allow_patterns=["*.json", "*.safetensors", "*.md"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"no {kind} at {repo_id!r}: it is neither a folder nor an accessible Hub repository "
            f"({type(error).__name__}). Shipped: {', '.join(shipped_names(kind))}"
        ) from error


def kind_of(name: str | os.PathLike[str]) -> str:
    """Kind of a model, such as ``"flow-map"`` or ``"vfm"``, for callers that take more than one kind.

    Raises:
        ValueError: If the model is missing, or its ``config.json`` names no kind.
    """
    registered = {plugins.kebab(own) for own in plugins.names("invflow.priors")}
    if plugins.is_reference(name) or (str(name) in registered and not (SHIPPED / str(name)).is_dir()):
        return "flow-map"
    path = resolve_folder(name, "flow-map") / CONFIG
    try:
        return str(parse_json(path.read_text(encoding="utf-8"))["kind"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not name a kind of model: pass a folder that save_pretrained wrote") from error


def read_config(folder: Path, kind: str) -> dict[str, Any]:
    """Read and check ``config.json``.

    Raises:
        ValueError: If it is missing, not JSON, or describes another kind of model.
    """
    path = folder / CONFIG
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} holds no {CONFIG}: pass a folder that save_pretrained wrote") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or config.get("kind") != kind:
        found = config.get("kind") if isinstance(config, dict) else type(config).__name__
        name = folder.name.removesuffix("-vfm") if folder.parent == SHIPPED else str(folder)
        loads = {"vfm": f"load it with invflow.VFM.load({name!r}), whose prior is a map", "flow-map":
                 f"load it with invflow.load_prior({name!r})"}.get(str(found), "pass another folder")
        raise ValueError(f"{path} describes a model of kind {found!r}, but kind {kind!r} was expected: {loads}")
    return config


def save_module(module: nn.Module, folder: str | os.PathLike[str], config: dict[str, Any],
                dtype: torch.dtype | None = None) -> None:
    """Write a module's tensors and its configuration into a folder. Each file is written atomically.

    Args:
        module: Module to save.
        folder: Folder, created if it does not exist.
        config: JSON-serialisable configuration with a ``kind``. A ``digest`` of it and of the tensors is added.
        dtype: Type in which floating-point tensors are stored, such as ``torch.float16``. None keeps their type.
    """
    tensors = {
        k: v.detach().to("cpu", dtype if dtype and v.is_floating_point() else v.dtype).contiguous()
        for k, v in module.state_dict().items()
    }
    write_atomically(Path(folder) / WEIGHTS, lambda p: save_file(tensors, p))
    text = json.dumps({**config, "digest": digest(tensors, config)}, indent=2) + "\n"
    write_atomically(Path(folder) / CONFIG, lambda p: Path(p).write_text(text, encoding="utf-8"))


def load_built(build: Callable[[], M], folder: Path, config: Mapping[str, Any], what: str) -> M:
    """Build a module and load its tensors, in the module's types.

    The file is checked before anything large is allocated.

    Args:
        build: Function that builds the module from the configuration. It is first called on torch's meta device, where
            tensors only have shapes.
        folder: Folder of the tensors.
        config: Configuration from :func:`read_config`.
        what: Name of what is built, for errors.

    Raises:
        ValueError: If nothing can be built from the configuration; if the file is missing, truncated or not
            safetensors; or if its tensors do not fit or are not those that were saved.
    """
    try:
        with torch.device("meta"):
            frame = build()
    except Exception as error:  # a configuration may break a constructor in any way
        raise ValueError(f"no {what} can be built from {folder / CONFIG}: {error!r}") from error
    tensors = _read_tensors(folder, frame)
    known = config.get("digest")
    if known is not None and known != digest(tensors, {k: v for k, v in config.items() if k != "digest"}):
        raise ValueError(f"{folder}: {CONFIG} or {WEIGHTS} is not as it was saved: fetch both again. If you changed "
                         f'them on purpose, remove the "digest" from {CONFIG}')
    module = build()
    module.load_state_dict(tensors)
    return module


def _read_tensors(folder: Path, module: nn.Module) -> dict[str, Tensor]:
    """Read the tensors of a folder; check that they fit a module and are finite."""
    path = folder / WEIGHTS
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise ValueError(f"{folder} holds no {WEIGHTS}: pickled weights are never loaded") from error
    except Exception as error:  # safetensors has its own errors, and raises KeyError for types that torch lacks
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
    own = module.state_dict()
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [
        f"{k} {tuple(tensors[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape
    ]
    if missing or unknown or shapes:
        raise ValueError(
            f"{path} does not fit its {CONFIG}: missing {missing[:3]}, unknown {unknown[:3]}, shapes {shapes[:3]}"
        )
    kinds = [f"{k} {tensors[k].dtype}" for k in own if tensors[k].is_floating_point() != own[k].is_floating_point()]
    if kinds:
        raise ValueError(f"{path} holds numbers of a different kind than the model takes: {kinds[:3]}")
    broken = [k for k, v in tensors.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
    if broken:
        raise ValueError(f"{path} holds values that are not finite, in {broken[:3]}")
    return tensors
