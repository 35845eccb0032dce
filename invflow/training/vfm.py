"""Training of a Variational Flow Map: adapter and map jointly, the adapter alone, or both towards a reward."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invflow.models.adapter import Adapter
from invflow.models.neural import NeuralFlowMap
from invflow.models.spectral_adapter import SpectralAdapter
from invflow.reward import Reward
from invflow.solvers.vfm import VFM
from invflow.training.loop import LoopSettings, Sampler, batches_of, fit, seeded, speaks_for_all
from invflow.training.objective import VFMObjective
from invflow.training.settings import ObjectiveSettings, TrainingProblem

__all__ = ["ObjectiveSettings", "TrainingProblem", "VFMObjective", "train_alignment", "train_vfm"]


def train_vfm(data: Tensor | Sampler, prior: NeuralFlowMap, problems: Sequence[TrainingProblem], settings: LoopSettings,
              folder: str | os.PathLike[str], *, options: dict[str, Any] | None = None,
              adapter: Adapter | None = None, progress: bool = True, stop_at: int | None = None,
              objective: ObjectiveSettings | None = None, **changes: Any) -> VFM:
    """Train a Variational Flow Map from a prior; resumes if the folder holds a checkpoint.

    Args:
        data: Images ``(n, *image_shape)``, floats in [0, 1] or bytes; or a function ``(n, generator)`` that makes them.
        prior: A trained prior, which is not changed: a copy is trained (or used, if ``frozen``).
        problems: Problem classes; each needs its own ``problem_class``.
        settings: Settings of the loop.
        folder: Folder for the checkpoint, the metrics and, when done, the VFM (``folder/vfm``).
        options: Options of the adapter's network; default: those of the map.
        adapter: Adapter to start from, with the map that it was trained with as ``prior``; None starts a new one.
        progress: Whether to show a progress bar.
        stop_at: Step at which to stop, with a checkpoint.
        objective: Weights of the terms of :class:`VFMObjective`.
        **changes: Fields of :class:`ObjectiveSettings`, such as ``tau`` or ``frozen``.

    Returns:
        The solver, with averaged weights.

    Raises:
        ValueError: If two problems share a class or one has none, or if the adapter to start from belongs to another
            map or has other classes.
    """
    own = dataclasses.replace(objective or ObjectiveSettings(), **changes)
    classes = [problem.operator.problem_class for problem in problems]
    if None in classes or len(set(classes)) < len(classes):
        raise ValueError(f"each training problem needs its own problem_class, not {classes}")
    image_map = copy.deepcopy(prior).train()
    if adapter is not None:
        adapter.check_map(prior)
        if list(adapter.classes) != classes:
            raise ValueError(f"the adapter knows {list(adapter.classes)}, but the problems are {classes}")
        adapter = copy.deepcopy(adapter).train()
    else:
        adapter = fresh_adapter(prior, [str(c) for c in classes], options, seeded(settings.seed, 0, -4),
                                own.consistency)
    if not own.deviations_alone:  # otherwise keep the ranges of the original training
        adapter.levels = {str(problem.operator.problem_class): problem.levels for problem in problems}
        adapter.traits = {str(problem.operator.problem_class): problem.traits(seeded(settings.seed, k, -5))
                          for k, problem in enumerate(problems)}
    done = fit(VFMObjective(image_map, adapter, problems, settings=own), batches_of(data, settings), settings, folder,
               progress=progress, stop_at=stop_at)
    return finish(image_map, adapter, own.frozen, done, folder)


def fresh_adapter(prior: NeuralFlowMap, classes: list[str], options: dict[str, Any] | None,
                  generator: torch.Generator, deviations: bool = False) -> Adapter:
    """Build an untrained adapter of the right kind for a map; ``options`` of its network default to the map's."""
    if prior.spectrum is not None:
        return SpectralAdapter.for_map(prior, classes, options, generator)
    return _plain_adapter(prior, classes, options, generator, deviations)


def _plain_adapter(prior: NeuralFlowMap, classes: list[str], options: dict[str, Any] | None,
                   generator: torch.Generator, deviations: bool = False) -> Adapter:
    return Adapter(prior.state_shape, classes=classes, network=prior.network_name, image_shape=prior.image_shape,
                   options=prior.options if options is None else options, generator=generator, deviations=deviations)


def train_alignment(data: Tensor | Sampler, prior: NeuralFlowMap, reward: Reward, name: str, settings: LoopSettings,
                    folder: str | os.PathLike[str], *, options: dict[str, Any] | None = None, progress: bool = True,
                    stop_at: int | None = None, objective: ObjectiveSettings | None = None, **changes: Any) -> VFM:
    """One-step reward alignment: the joint objective with a reward instead of the log likelihood.

    Args:
        data: Same as in :func:`train_vfm`.
        prior: A trained prior, which is not changed.
        reward: Differentiable reward for any number of observations; its scale sets the strength of the tilt.
        name: Problem class under which the adapter recognises the reward: set ``reward.problem_class`` to it.
        settings, folder, options, progress, stop_at, objective, **changes: Same as in :func:`train_vfm`.

    Returns:
        The solver: ``sample(reward, n)`` draws from about p(x) e^{r(x)} in one step.
    """
    if not reward.differentiable:
        raise ValueError("reward alignment needs a gradient, but the reward has differentiable=False: use NoiseSMC")
    own = dataclasses.replace(objective or ObjectiveSettings(), **changes)
    image_map = copy.deepcopy(prior).train()
    adapter = _plain_adapter(prior, [name], options, seeded(settings.seed, 0, -4))
    done = fit(VFMObjective(image_map, adapter, reward=reward, settings=own), batches_of(data, settings), settings,
               folder, progress=progress, stop_at=stop_at)
    return finish(image_map, adapter, own.frozen, done, folder)


def finish(image_map: NeuralFlowMap, adapter: Adapter, frozen: bool, done: bool,
           folder: str | os.PathLike[str]) -> VFM:
    """Combine a trained map and adapter, on the CPU and in evaluation mode; save the pair if training is complete."""
    image_map.cpu().eval().requires_grad_(False)
    adapter.cpu().eval().requires_grad_(False)
    adapter.consistency = {}  # the factors were fitted to other samples
    if not frozen:
        image_map.independent_noise = False
    adapter.trained_for = image_map.fingerprint()
    vfm = VFM(image_map, adapter)
    if done and speaks_for_all():
        vfm.save_pretrained(Path(folder) / "vfm")
    return vfm
