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

#: without attention, so that networks trained on small squares take images of any size
NETWORK = {"channels": [32, 64, 96], "blocks": 1, "attention": False}
#: a few minutes on two CPU cores at 32 x 32 pixels; checkpoints are so frequent that a kill costs only seconds
PRIOR_SETTINGS = LoopSettings(steps=600, batch_size=48, learning_rate=1.5e-3, ema=0.995, precision="no",
                              checkpoint_seconds=15.0)
DISTIL_SETTINGS = dataclasses.replace(PRIOR_SETTINGS, steps=300, learning_rate=5e-4, ema=0.99)
VFM_SETTINGS = dataclasses.replace(PRIOR_SETTINGS, steps=300)
#: range of noise levels, for pixels in [0, 1], unless :func:`image_problems` has another one for the operator
LEVELS = (0.0, 0.2)
#: as for photographs, the weight of the score dominates: maps of this size do not represent the law of images well
SPECTRAL = ObjectiveSettings(frozen=True, level_power=0.0, model_error=True, score=5000.0)
#: a map that starts from independent pixels is trained together with the adapter, as for the digits
JOINT = ObjectiveSettings(tau=0.7, alpha=0.8, level_power=0.0, model_error=True, tangent="semigroup")


def _images(run: Run, what: str, shape: tuple[int, ...] | None = None) -> tuple[Tensor, LoopSettings]:
    """Load the folder's images; limit the batch size to their number."""
    if run.data is None:
        raise ValueError(f"invflow train {what} needs images: pass --data FOLDER, or a name such as --data mnist")
    if run.size and shape and shape[1:] != (run.size, run.size):
        raise ValueError(f"the prior {run.prior} generates images of {shape[1]} x {shape[2]} pixels and no other size: "
                         "leave out --size")
    images = load_fitted(run.data, shape, size=run.size, say=run.say)
    settings = run.settings
    if len(images) < settings.batch_size:
        run.say(f"{len(images)} images are fewer than a batch of {settings.batch_size}: each batch contains "
                "all of them")
        settings = dataclasses.replace(settings, batch_size=len(images))
    return images, settings


def _train_prior(run: Run) -> NeuralFlowMap:
    start = load_trainable(run.prior) if run.prior else None
    images, settings = _images(run, "prior", start.image_shape if start else None)
    return train_prior(images, settings, run.folder, options=NETWORK, skip="spectral", tangent="semigroup", start=start,
                       progress=run.progress, stop_at=run.stop_at)


def _distil(run: Run) -> NeuralFlowMap | LatentFlowMap:
    if run.prior is None:
        raise ValueError("invflow train distil makes a one-step map from a prior: pass --prior with a name from "
                         "invflow list priors, a folder, or package.module:function; if you have none, train one on a "
                         "folder of images with invflow train prior")
    teacher = load_prior(run.prior)
    _check_teacher(teacher, run.prior)
    settings, data = run.settings, None
    if run.data is not None:
        data, settings = _images(run, "distil", tuple(teacher.image_shape))
    # a map of this library starts as its own student, which already knows the velocity
    start = teacher if isinstance(teacher, NeuralFlowMap) else None
    picture = len(teacher.state_shape) == 3
    made = distill(teacher, settings, run.folder, data=data, options=NETWORK if picture else None, start=start,
                   loss="semigroup", skip="spectral" if picture else None, progress=run.progress, stop_at=run.stop_at)
    if isinstance(made, LatentFlowMap):
        run.say(f"{run.folder} holds only the map of the codes: LatentFlowMap(load_prior('{run.folder}'), decoder) "
                f"combines it with the decoder of {run.prior}")
    return made


def _check_teacher(teacher: FlowMap, name: str) -> None:
    if not teacher.has_velocity:
        raise ValueError(f"the prior {name!r} has no velocity to distil, but already jumps to the data in one call: "
                         "use it directly with NoiseSMC or NoiseRTO")


def _train_vfm(run: Run) -> VFM:
    prior, adapter, known = None, None, None
    if run.prior and kind_of(run.prior) == "vfm":
        begun = VFM.load(run.prior)
        prior, known = begun.prior, begun.adapter
    elif run.prior:
        prior = load_trainable(run.prior)
    # check names before reading a folder of images
    problems = problems_named(run.operators, prior.image_shape) if prior else []
    images, settings = _images(run, "vfm", prior.image_shape if prior else None)
    if prior is None:  # the exact flow of a Gaussian, as for the shipped photographs: the adapter does all the work
        prior = gaussian_map(images, generator=seeded(settings.seed, 0, -2))
        problems = problems_named(run.operators, prior.image_shape)
    if known is not None:
        names = [str(p.operator.problem_class) for p in problems]
        adapter = known.grown(names, dict.fromkeys(names, known.classes[0]), known.deviations)
    if len(problems) > settings.batch_size:
        raise ValueError(f"a batch of {settings.batch_size} has no row for each of {len(problems)} operators: pass "
                         "fewer operators, more images or a larger --batch-size")
    return train_vfm(images, prior, problems, settings, run.folder, options=NETWORK, adapter=adapter,
                     objective=SPECTRAL if prior.spectrum is not None else JOINT, progress=run.progress,
                     stop_at=run.stop_at)


def problems_named(names: tuple[str, ...], image_shape: tuple[int, ...]) -> list[TrainingProblem]:
    """Build training problems from the names of their operators.

    Args:
        names: Names such as ``"box-inpainting"``, with settings as in ``"super-resolution:factor=2"``; none: seven.
        image_shape: ``(C, H, W)``.

    Raises:
        ValueError: For a name that is not an operator (the message gives the nearest name), or an operator that needs
            files, or has no problem class for the adapter.
    """
    if len(image_shape) != 3:
        raise ValueError(f"the prior generates {tuple(image_shape)}, not images (C, H, W): train its VFM in Python, "
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
            raise ValueError(f"the operator {name} has no setting {pair!r}: pass NAME=VALUE with one of "
                             f"{', '.join(k for k in parameters if k not in ('image_shape', 'generator'))}")
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:  # a plain word
            settings[key] = value
    try:
        operator: Operator = kind(image_shape, **settings)
    except TypeError as error:
        raise ValueError(f"the operator {name} cannot be built from the images' shape and settings ({error}): pass "
                         "one that can, such as box-inpainting, or train in Python, invflow.training.train_vfm"
                         ) from error
    if operator.problem_class is None:
        raise ValueError(f"the operator {name} has no problem_class for the adapter: train in Python, "
                         "invflow.training.train_vfm")
    return TrainingProblem(operator, known[0].sigma if known else LEVELS)


prior = Recipe("prior", "prior on your own images, from a folder (--data), of any size and kind", PRIOR_SETTINGS,
               _train_prior, takes=("data", "prior", "size"))
distil = Recipe("distil", "one-step map of any prior (--prior), with or without a folder of images (--data)",
                DISTIL_SETTINGS, _distil, takes=("data", "prior"))
vfm = Recipe("vfm", "VFM for --operators, from a folder of images (--data) and, optionally, a one-step map (--prior)",
             VFM_SETTINGS, _train_vfm, takes=("data", "prior", "size", "operators"))
