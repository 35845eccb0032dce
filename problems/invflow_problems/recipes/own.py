"""From a folder of images to one-step posterior samples: ``invflow train prior``, ``distil`` and ``vfm``."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any

from torch import Tensor

from invflow import operators
from invflow.datasets.fitted import load_fitted
from invflow.flowmap import FlowMap
from invflow.models.latent import LatentFlowMap
from invflow.models.neural import NeuralFlowMap, load_prior, load_trainable
from invflow.operator import Operator
from invflow.plugins import kind_of
from invflow.solvers.vfm import VFM
from invflow.training import LoopSettings, ObjectiveSettings, TrainingProblem, distill, train_prior, train_vfm
from invflow.training.loop import seeded
from invflow.training.prior import gaussian_map
from invflow.training.recipe import Recipe, Run
from invflow_problems.recipes.digits import image_problems

__all__ = ["distil", "prior", "vfm"]

#: without attention, so that what is trained on small squares takes pictures of any size
NETWORK = {"channels": [32, 64, 96], "blocks": 1, "attention": False}
#: minutes on two CPU cores at 32 x 32 pixels; checkpoints so often that a kill costs seconds
PRIOR_SETTINGS = LoopSettings(steps=600, batch_size=48, learning_rate=1.5e-3, ema=0.995, precision="no",
                              checkpoint_seconds=15.0)
DISTIL_SETTINGS = dataclasses.replace(PRIOR_SETTINGS, steps=300, learning_rate=5e-4, ema=0.99)
VFM_SETTINGS = dataclasses.replace(PRIOR_SETTINGS, steps=300)
#: noise, on pixels in [0, 1], where :func:`image_problems` says no other
LEVELS = (0.0, 0.2)
#: as for photographs the score decides: maps of this size hold no law that is quite that of images
SPECTRAL = ObjectiveSettings(frozen=True, level_power=0.0, model_error=True, score=5000.0)
#: a map that begins at independent pixels is moved together with the adapter, as for the digits
JOINT = ObjectiveSettings(tau=0.7, alpha=0.8, level_power=0.0, model_error=True, tangent="semigroup")


def _images(run: Run, what: str, shape: tuple[int, ...] | None = None) -> tuple[Tensor, LoopSettings]:
    """The folder's images, and settings whose batches are no larger than it."""
    if run.data is None:
        raise ValueError(f"invflow train {what} learns from images: pass --data FOLDER, or a name such as --data mnist")
    if run.size and shape and shape[1:] != (run.size, run.size):
        raise ValueError(f"the prior {run.prior} makes images of {shape[1]} x {shape[2]}, and no other size is taken: "
                         "leave out --size")
    images = load_fitted(run.data, shape, size=run.size, say=run.say)
    settings = run.settings
    if len(images) < settings.batch_size:
        run.say(f"{len(images)} images are less than a batch of {settings.batch_size}: batches hold all of them")
        settings = dataclasses.replace(settings, batch_size=len(images))
    return images, settings


def _train_prior(run: Run) -> NeuralFlowMap:
    start = load_trainable(run.prior) if run.prior else None
    images, settings = _images(run, "prior", start.image_shape if start else None)
    return train_prior(images, settings, run.folder, options=NETWORK, skip="spectral", tangent="semigroup", start=start,
                       progress=run.progress, stop_at=run.stop_at)


def _distil(run: Run) -> NeuralFlowMap | LatentFlowMap:
    if run.prior is None:
        raise ValueError("invflow train distil makes a one-step map of a prior: pass --prior NAME, one of invflow list "
                         "priors, a folder, or package.module:function; without any prior, invflow train prior is "
                         "what makes one of a folder of images")
    teacher = load_prior(run.prior)
    _check_teacher(teacher, run.prior)
    settings, data = run.settings, None
    if run.data is not None:
        data, settings = _images(run, "distil", tuple(teacher.image_shape))
    # a map of this library begins as its own student, which knows the velocity already
    start = teacher if isinstance(teacher, NeuralFlowMap) else None
    picture = len(teacher.state_shape) == 3
    made = distill(teacher, settings, run.folder, data=data, options=NETWORK if picture else None, start=start,
                   loss="semigroup", skip="spectral" if picture else None, progress=run.progress, stop_at=run.stop_at)
    if isinstance(made, LatentFlowMap):
        run.say(f"{run.folder} holds the map of the codes alone: LatentFlowMap(load_prior('{run.folder}'), decoder) "
                f"joins it with the decoder of {run.prior}")
    return made


def _check_teacher(teacher: FlowMap, name: str) -> None:
    if not teacher.has_velocity:
        raise ValueError(f"the prior {name!r} jumps to data in one call as it is and has no velocity to distil: "
                         "NoiseSMC and NoiseRTO take it so")


def _train_vfm(run: Run) -> VFM:
    prior, adapter, known = None, None, None
    if run.prior and kind_of(run.prior) == "vfm":
        begun = VFM.load(run.prior)
        prior, known = begun.prior, begun.adapter
    elif run.prior:
        prior = load_trainable(run.prior)
    # names are checked before a folder of images is read
    problems = problems_named(run.operators, prior.image_shape) if prior else []
    images, settings = _images(run, "vfm", prior.image_shape if prior else None)
    if prior is None:  # the exact flow of a Gaussian, as for the shipped photographs: the adapter does the work
        prior = gaussian_map(images, generator=seeded(settings.seed, 0, -2))
        problems = problems_named(run.operators, prior.image_shape)
    if known is not None:
        names = [str(p.operator.problem_class) for p in problems]
        adapter = known.grown(names, dict.fromkeys(names, known.classes[0]), known.deviations)
    if len(problems) > settings.batch_size:
        raise ValueError(f"a batch of {settings.batch_size} has no row for each of {len(problems)} operators: name "
                         "fewer, or pass more images or a larger --batch-size")
    return train_vfm(images, prior, problems, settings, run.folder, options=NETWORK, adapter=adapter,
                     objective=SPECTRAL if prior.spectrum is not None else JOINT, progress=run.progress,
                     stop_at=run.stop_at)


def problems_named(names: tuple[str, ...], image_shape: tuple[int, ...]) -> list[TrainingProblem]:
    """Training problems by the names of their operators.

    Args:
        names: such as ``"box-inpainting"``, with settings as in ``"super-resolution:factor=2"``; none for seven.
        image_shape: ``(C, H, W)``.

    Raises:
        ValueError: for what is no operator (with the nearest name), cannot be built without files, or has no problem
            class for the adapter to know it by.
    """
    if len(image_shape) != 3:
        raise ValueError(f"the prior makes {tuple(image_shape)}, no images (C, H, W): train its VFM in Python, "
                         "invflow.training.train_vfm")
    usual = image_problems(image_shape)
    if not names:
        return usual
    return [_problem(name, image_shape, usual) for name in names]


def _problem(name: str, image_shape: tuple[int, ...], usual: list[TrainingProblem]) -> TrainingProblem:
    name, *pairs = name.split(":")
    kind: Any = operators.find(name)
    known = [p for p in usual if type(p.operator) is kind]
    if known and not pairs:
        return known[0]
    parameters = inspect.signature(kind).parameters
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in parameters or not value:
            raise ValueError(f"the operator {name} has no setting {pair!r}: pass NAME=VALUE of "
                             f"{', '.join(k for k in parameters if k not in ('image_shape', 'generator'))}")
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:  # a word
            settings[key] = value
    try:
        operator: Operator = kind(image_shape, **settings)
    except TypeError as error:
        raise ValueError(f"the operator {name} is not built from the images' shape and settings alone ({error}): name "
                         "one that is, such as box-inpainting, or train in Python, invflow.training.train_vfm"
                         ) from error
    if operator.problem_class is None:
        raise ValueError(f"the operator {name} has no problem_class, by which an adapter knows it: train in Python, "
                         "invflow.training.train_vfm")
    return TrainingProblem(operator, known[0].sigma if known else LEVELS)


prior = Recipe("prior", "prior on a folder of your own images (--data), of any size and kind", PRIOR_SETTINGS,
               _train_prior, takes=("data", "prior", "size"))
distil = Recipe("distil", "one-step map of any prior (--prior), from a folder of images (--data) or from itself",
                DISTIL_SETTINGS, _distil, takes=("data", "prior"))
vfm = Recipe("vfm", "VFM of a folder of images (--data), or of a one-step map (--prior) too, for --operators",
             VFM_SETTINGS, _train_vfm, takes=("data", "prior", "size", "operators"))
