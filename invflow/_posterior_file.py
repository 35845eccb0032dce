"""The file that holds a posterior: one safetensors file, tensors beside a JSON header. No pickles."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import invflow
from invflow.pretrained import digest, parse_json, write_atomically

if TYPE_CHECKING:
    from invflow.posterior import Posterior

__all__ = ["as_json", "read_posterior", "versions", "write_posterior"]

_FORMAT = "invflow.posterior/1"
_DIAGNOSTIC = "diagnostics."  # prefix of the tensors among the diagnostics


def write_posterior(posterior: Posterior, path: Path) -> None:
    """Write a posterior; see :meth:`invflow.Posterior.save`."""
    tensors: dict[str, Tensor] = {"samples": posterior.samples}
    if posterior.weighted:
        tensors["log_weights"] = posterior.log_weights
    if posterior.log_evidence is not None:
        tensors["log_evidence"] = posterior.log_evidence
    plain: dict[str, Any] = {}
    for key, value in posterior.diagnostics.items():
        if isinstance(value, Tensor):
            tensors[_DIAGNOSTIC + key] = value
        else:
            plain[key] = value
    header = {
        "format": _FORMAT,
        "nfe": asdict(posterior.nfe),
        "seconds": posterior.seconds,
        "diagnostics": as_json(plain, "diagnostics"),
        "settings": as_json(posterior.settings, "settings"),
        "versions": versions(),
    }
    # clones, because safetensors refuses tensors that share memory
    stored = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
    header["digest"] = digest(stored, header)
    write_atomically(path, lambda name: save_file(stored, name, {"invflow": json.dumps(header)}))


def read_posterior(path: Path) -> dict[str, Any]:
    """Read what :func:`write_posterior` wrote, as keyword arguments of Posterior, with ``nfe`` a dictionary.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, no safetensors file, or holds something else than a posterior.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}: pass one that Posterior.save wrote")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except Exception as error:  # safetensors has errors of its own, and KeyErrors for types that torch lacks
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error
    try:
        header = parse_json(metadata["invflow"])
        if header["format"] != _FORMAT:
            raise ValueError(f"its format is {header['format']!r}, this version of invflow reads {_FORMAT!r}")
        known = header.pop("digest", None)
        if known is not None and known != digest(tensors, header):
            raise ValueError("it is not as it was saved: its numbers or its settings were changed")
        nfe = {"forward": float(header["nfe"]["forward"]), "backward": float(header["nfe"]["backward"])}
        diagnostics, settings = dict(header["diagnostics"]), dict(header["settings"])
        settings["versions"] = header["versions"]
        samples, seconds = tensors["samples"], float(header["seconds"])
    except (KeyError, TypeError, AttributeError, OverflowError, ValueError) as error:
        raise ValueError(
            f"{path} is a safetensors file but holds no posterior that can be read ({type(error).__name__}: "
            f"{error}): pass one that Posterior.save wrote"
        ) from error
    for key, value in tensors.items():
        if key.startswith(_DIAGNOSTIC):
            diagnostics[key.removeprefix(_DIAGNOSTIC)] = value
    return {
        "samples": samples, "log_weights": tensors.get("log_weights"), "nfe": nfe, "seconds": seconds,
        "log_evidence": tensors.get("log_evidence"), "diagnostics": diagnostics, "settings": settings,
    }


def as_json(value: Any, where: str) -> Any:
    """Plain JSON data for settings and diagnostics.

    Raises:
        TypeError: for what JSON cannot hold, naming the entry.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(k): as_json(v, f"{where}[{k!r}]") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, Tensor) and value.numel() <= 1000:
        return value.tolist()
    if isinstance(value, (torch.dtype, torch.device, os.PathLike)):
        return str(value)
    raise TypeError(
        f"{where} is a {type(value).__name__}, which JSON cannot hold: keep numbers, strings, lists and "
        "dictionaries there, and tensors at the top of diagnostics"
    )


def versions() -> dict[str, str]:
    """Versions of what makes a posterior."""
    return {"invflow": invflow.__version__, "torch": torch.__version__, "python": platform.python_version()}
