"""Training checkpoints: everything needed to resume, and digests of the inputs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invflow._core.identity import UnidentifiedError, identity
from invflow._core.records import digest, parse_json, write_atomically

__all__ = ["CHECKPOINT", "PREVIOUS", "known", "load", "save"]

CHECKPOINT = "checkpoint.safetensors"
#: the previous checkpoint
PREVIOUS = "checkpoint.previous.safetensors"


def known(value: object) -> str | None:
    """Digest of the inputs of a training; None if they cannot be read."""
    try:
        return identity(value)
    except UnidentifiedError:
        return None


def save(folder: Path, step: int, parameters: dict[str, Tensor], average: dict[str, Tensor],
         buffers: dict[str, Tensor], optimizer: torch.optim.Optimizer, settings: Mapping[str, Any],
         made_with: dict[str, str | None]) -> None:
    """Write a checkpoint atomically, and keep the previous one.

    Args:
        folder: Folder of the training.
        step: Number of steps done.
        parameters, average, buffers: Trained parameters, their moving average, and the objective's own buffers, by
            name.
        optimizer: Optimiser of the parameters.
        settings: Settings of the loop that affect the numbers.
        made_with: Digests of the training's inputs; None for inputs that cannot be identified.
    """
    from safetensors.torch import save_file

    tensors = {f"model.{k}": v.detach().cpu().contiguous() for k, v in parameters.items()}
    tensors |= {f"average.{k}": v.cpu().contiguous() for k, v in average.items()}
    tensors |= {f"objective.{k}": v.detach().cpu().contiguous() for k, v in buffers.items()}
    for key, p in parameters.items():
        for name, value in optimizer.state.get(p, {}).items():
            tensors[f"optimizer.{name}.{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    plain = {"step": str(step), "settings": json.dumps(settings), "made_with": json.dumps(made_with)}
    metadata = {**plain, "digest": digest(tensors, plain)}

    def write(path: str) -> None:
        save_file(tensors, path, metadata=metadata)
        if (folder / CHECKPOINT).exists():
            os.replace(folder / CHECKPOINT, folder / PREVIOUS)

    write_atomically(folder / CHECKPOINT, write)


def load(folder: Path, parameters: dict[str, Tensor], average: dict[str, Tensor], buffers: dict[str, Tensor],
         optimizer: torch.optim.Optimizer, settings: Mapping[str, Any], made_with: dict[str, str | None]) -> int:
    """Restore everything from the folder's checkpoint; return the step, 0 without a checkpoint."""
    from safetensors import safe_open

    path = folder / CHECKPOINT
    if not path.exists():  # killed between the two renames
        path = folder / PREVIOUS
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata())
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        known = metadata.pop("digest", None)
        if known is not None and known != digest(tensors, metadata):
            raise ValueError("its content differs from what was saved")
        theirs, ours, step = parse_json(metadata["settings"]), settings, int(metadata["step"])
        changed = [k for k in ours if theirs.get(k) != ours[k]]
        targets = {"model": parameters, "average": average, "objective": buffers}
        names = {f"{kind}.{key}": value for kind, held in targets.items() for key, value in held.items()}
        wrong = [k for k, v in names.items() if k not in tensors or tensors[k].shape != v.shape]
        wrong += [k for k in tensors if k not in names and (k.split(".")[0] != "optimizer"
                                                            or k.split(".", 2)[2] not in parameters)]
        changed += [] if theirs == ours else sorted(set(theirs) - set(ours))
        wrong += [k for k, v in tensors.items() if k.startswith("optimizer.") and k not in wrong
                  and not k.startswith("optimizer.step.") and v.shape != parameters[k.split(".", 2)[2]].shape]
        if not changed and (wrong or not 0 <= step <= settings["steps"]):
            raise ValueError(f"step {step}; tensors that are missing or do not fit: {wrong[:3]}")
    except Exception as error:  # safetensors and JSON raise many kinds of errors on damaged files
        older = f"; the previous one is {folder / PREVIOUS}" if path.name == CHECKPOINT and (
            folder / PREVIOUS).exists() else ""
        raise ValueError(f"{path} is damaged, or a checkpoint of something else ({error}): delete it to start again"
                         f"{older}") from error
    if changed:
        raise ValueError(
            f"{path} was made with other settings ({', '.join(f'{k}={theirs.get(k)}' for k in changed)}): train "
            "into another folder, or repeat those settings to resume"
        )
    _check_same(path, parse_json(metadata.get("made_with", "null")), made_with)
    states: dict[Tensor, dict[str, Tensor]] = {p: {} for p in parameters.values()}
    for name, value in tensors.items():
        if name in names:
            with torch.no_grad():
                names[name].copy_(value)
        else:
            _, field, key = name.split(".", 2)
            states[parameters[key]][field] = value if field == "step" else value.to(parameters[key].device)
    for p, state in states.items():
        if state:
            optimizer.state[p] = state
    return step


def _check_same(path: Path, theirs: dict[str, str | None] | None, ours: dict[str, str | None]) -> None:
    """Raise an error if a checkpoint has other data, modules or code, or if that cannot be determined.

    Checkpoints of earlier versions, without this information, are accepted.
    """
    words = {"objective": "another prior, network or objective", "data": "other data"}
    if theirs is None:
        return
    for key, word in words.items():
        if theirs.get(key) is None or ours[key] is None:
            raise ValueError(f"cannot determine whether {path} was made with {word}: it holds objects without content "
                             "to compare (such as a lock): train into another folder")
        if theirs[key] != ours[key]:
            raise ValueError(f"{path} was made with {word}: train into another folder, or pass the same as before")
    if theirs.get("code", ours.get("code")) != ours.get("code"):
        raise ValueError(f"{path} was made with other code of invflow, so results would differ: train "
                         "into another folder, or resume with the version that started it")
