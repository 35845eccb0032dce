"""Records on disk: tensors and JSON with a digest, written atomically. Pickles are never read."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from invflow._core.files import write_atomically
from invflow._core.source import code_digest
from invflow._core.version import VERSION

__all__ = ["as_json", "code_versions", "digest", "fingerprint", "finite", "parse_json", "read_posterior", "read_record",
           "versions", "write_atomically", "write_posterior", "write_record"]

_POSTERIOR = ("invflow.posterior/2", "invflow.posterior/1")
_DIAGNOSTIC = "diagnostics."  # prefix of the tensors among the diagnostics
_EMPTY = "empty"  # stands in a file without tensors, which safetensors does not write


# -- any record --------------------------------------------------------------------------------------------------------


def write_record(path: Path, kind: str, plain: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> str:
    """Write a record atomically: plain data and tensors under one digest.

    Args:
        path: Path of the file.
        kind: Kind and version of the record, such as ``"invflow.posterior/2"``.
        plain: Data that JSON can hold.
        tensors: Tensors by name, for a safetensors file. None writes a JSON file.

    Returns:
        The digest, by which other records can refer to this one.

    Raises:
        TypeError: For data that JSON cannot hold, with the name of the entry.
        OSError: If the file cannot be written.
    """
    # converted to what will be read, so that tuples and numeric keys have the same digest on both sides
    header = json.loads(json.dumps({"format": kind, **as_json(plain, "record")}))
    if tensors is None:
        whole = digest({}, header)
        text = json.dumps({**header, "digest": whole}, indent=1) + "\n"
        write_atomically(path, lambda name: Path(name).write_text(text, encoding="utf-8"))
        return whole
    # clones, because safetensors refuses tensors that share memory
    stored = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
    stored = stored or {_EMPTY: torch.zeros(1)}
    header["content"] = digest(stored, {})  # separate, so that the plain data can be read and checked alone
    whole = digest({}, header)
    metadata = {"invflow": json.dumps({**header, "digest": whole})}
    write_atomically(path, lambda name: save_file(stored, name, metadata))
    return whole


def read_record(path: Path, *kinds: str, tensors: bool | None = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what :func:`write_record` or its earlier versions wrote.

    Args:
        path: Path of the file.
        kinds: Accepted kinds. The first is the one written today, and must have its digest.
        tensors: Whether to read the tensors too. None for a JSON file.

    Returns:
        The plain data with its ``format`` and its ``digest`` (None in old files without one), and the tensors.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, was changed, or is of another kind.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    what = kinds[0].removeprefix("invflow.").partition("/")[0]
    text, held = _read_json(path) if tensors is None else _read_safetensors(path, tensors)
    try:
        header = parse_json(text)
        kind, known = header["format"], header.pop("digest", None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no {what} ({type(error).__name__}: {error})") from error
    if kind not in kinds:
        raise ValueError(f"{path}: its format is {kind!r}, but this version of invflow reads {' and '.join(kinds)}")
    content = header.get("content")
    if kind != kinds[0] and content is None:  # old files have one digest for everything, the oldest have none
        changed = known is not None and tensors and known != digest(held, header)
    else:
        changed = known != digest({}, header) or (tensors and content is not None and content != digest(held, {}))
    if changed:
        raise ValueError(f"{path} is not as it was saved: its numbers or its settings were changed")
    held.pop(_EMPTY, None)
    return {**header, "digest": known}, held


def _read_json(path: Path) -> tuple[str, dict[str, Tensor]]:
    try:
        return path.read_text(encoding="utf-8"), {}
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is truncated or not a JSON file: {error}") from error


def _read_safetensors(path: Path, tensors: bool) -> tuple[str, dict[str, Tensor]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            held = {key: file.get_tensor(key) for key in file.keys()} if tensors else {}  # noqa: SIM118 - not a dict
            return (file.metadata() or {}).get("invflow", "{}"), held
    except Exception as error:  # safetensors has its own errors, and raises KeyError for types that torch lacks
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error


# -- posteriors --------------------------------------------------------------------------------------------------------


def write_posterior(path: Path, tensors: Mapping[str, Tensor], diagnostics: Mapping[str, Any],
                    settings: Mapping[str, Any], nfe: Mapping[str, float], seconds: float) -> None:
    """Write the contents of a posterior; see :meth:`invflow.Posterior.save`."""
    tensors, plain = dict(tensors), {}
    for key, value in diagnostics.items():
        if isinstance(value, Tensor):
            tensors[_DIAGNOSTIC + key] = value
        else:
            plain[key] = value
    write_record(path, _POSTERIOR[0], {
        "nfe": dict(nfe),
        "seconds": seconds,
        "diagnostics": as_json(plain, "diagnostics"),
        "settings": as_json(settings, "settings"),
        "versions": versions(),
    }, tensors)


def read_posterior(path: Path) -> dict[str, Any]:
    """Read what :func:`write_posterior` wrote, as keyword arguments of Posterior, with ``nfe`` as a dictionary.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, not a safetensors file, or does not hold a posterior.
    """
    try:
        header, tensors = read_record(path, *_POSTERIOR)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {str(path)!r}: pass one that Posterior.save wrote") from error
    try:
        nfe = {"forward": float(header["nfe"]["forward"]), "backward": float(header["nfe"]["backward"])}
        diagnostics, settings = dict(header["diagnostics"]), dict(header["settings"])
        settings["versions"] = header["versions"]
        samples, seconds = tensors["samples"], float(header["seconds"])
    except (KeyError, TypeError, AttributeError, OverflowError, ValueError) as error:
        raise ValueError(f"{path} holds no readable posterior ({type(error).__name__}: {error}): pass a file that "
                         "Posterior.save wrote") from error
    for key, value in tensors.items():
        if key.startswith(_DIAGNOSTIC):
            diagnostics[key.removeprefix(_DIAGNOSTIC)] = value
    return {
        "samples": samples, "log_weights": tensors.get("log_weights"), "nfe": nfe, "seconds": seconds,
        "log_evidence": tensors.get("log_evidence"), "diagnostics": diagnostics, "settings": settings,
    }


# -- their parts -------------------------------------------------------------------------------------------------------


def as_json(value: Any, where: str) -> Any:
    """Convert settings and diagnostics to plain JSON data.

    Raises:
        TypeError: For data that JSON cannot hold, with the name of the entry.
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
        f"{where} is a {type(value).__name__}, which JSON cannot hold: use numbers, strings, lists and "
        "dictionaries there, and put tensors at the top level of diagnostics"
    )


def versions() -> dict[str, str]:
    """Versions of the software that computes a posterior."""
    return {"invflow": VERSION, "torch": torch.__version__, "python": platform.python_version()}


def code_versions() -> dict[str, str]:
    """Versions of the code that determines numbers, with a digest of the library's code. Python's version does not."""
    known = {key: value for key, value in versions().items() if key != "python"}
    return {**known, "code": code_digest()}


def parse_json(text: str) -> Any:
    """Parse JSON. Text that is nested a thousandfold also fails with a ValueError."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def digest(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> str:
    """Digest of tensors, bit for bit, and of plain JSON data. It detects damage that the file formats do not."""
    found = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(bytes_of(value))
    return found.hexdigest()[:32]


def fingerprint(module: nn.Module) -> str:
    """Digest of a module's weights, rounded to half precision so that saving in half precision does not change it."""
    digest = hashlib.sha256()
    tensors: dict[str, Tensor] = dict(module.state_dict())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu()
        value = value.half() if value.is_floating_point() else value
        digest.update(name.encode())
        digest.update(bytes_of(value))
    return digest.hexdigest()[:16]


def finite(value: Any) -> Any:
    """Plain data without the numbers that JSON lacks: NaN becomes null, and infinities become words."""
    if isinstance(value, Mapping):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "infinity" if value > 0 else "-infinity"
    return value


def bytes_of(value: Tensor) -> bytes:
    """Bytes of a tensor in its own type, in row-major order whatever its strides."""
    value = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    # along a dimension of size 1 a contiguous tensor may have any stride, which flattening would keep
    return value.as_strided((value.numel(),), (1,)).view(torch.uint8).numpy().tobytes()
