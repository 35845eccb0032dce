"""Training recipes of the shipped weights and of the checkerboard."""

from __future__ import annotations

import dataclasses
import math
import os

import torch

from invflow.datasets.sets import load_images
from invflow.models.adapter import Adapter
from invflow.models.neural import NeuralFlowMap, load_trainable
from invflow.plugins import kind_of
from invflow.solvers.vfm import VFM
from invflow.training import LoopSettings, ObjectiveSettings, TrainingProblem, consolidate_vfm, train_prior, train_vfm
from invflow.training.loop import seeded
from invflow.training.prior import SAMPLE, gaussian_map
from invflow.training.recipe import Recipe, Run
from invflow_operators import blur, elementwise, inpainting, superresolution
from invflow_problems.checkerboard import NOISE, board_sample
from invflow_problems.checkerboard import checkerboard as board_problem
from invflow_problems.photos import PhotoCrops, find_photographs

__all__ = [
    "checkerboard", "fashion_mnist", "fashion_mnist_jumps", "fashion_mnist_velocity", "fashion_mnist_vfm",
    "fashion_mnist_vfm_consolidation", "fashion_mnist_vfm_deviations", "fashion_mnist_vfm_samples",
    "fashion_mnist_vfm_score", "mnist", "mnist_jumps", "mnist_velocity", "mnist_vfm", "mnist_vfm_consolidation",
    "mnist_vfm_deviations", "mnist_vfm_samples", "mnist_vfm_score", "photos", "photos_vfm",
]

#: a U-Net on grids of 14 x 14 and 7 x 7, small enough to train on two CPU cores in under an hour
MAP_NETWORK = {"channels": [32, 128], "blocks": 2}
ADAPTER_NETWORK = {"channels": [32, 96], "blocks": 2}

PRIOR_SETTINGS = LoopSettings(steps=2000, batch_size=128, learning_rate=1.5e-3)
#: flow matching alone costs a third less per row, and uses all rows for the velocity, on which every jump depends.
#: The jumps are then learned from the velocity, with semigroup targets, which are free of noise
VELOCITY_SETTINGS = LoopSettings(steps=10000, batch_size=128, learning_rate=1.5e-3)
JUMPS_SETTINGS = LoopSettings(steps=4000, batch_size=128, learning_rate=1e-3)
JUMPS_SHARE = 0.7
VFM_SETTINGS = LoopSettings(steps=4800, batch_size=96, learning_rate=1e-3)
#: tau is close to the scale of the data states (0.6); with this alpha, one path in five stays unconditional
TAU, ALPHA = 0.7, 0.8
#: consolidation: one jump learns from four jumps of the map
CONSOLIDATION_SETTINGS = LoopSettings(steps=800, batch_size=96, learning_rate=5e-4, warmup=50, ema=0.99)
IMAGE_JUMPS, TAUGHT_ALPHA = 4, 0.9
#: after that, only the adapter is trained, with a proper score against the truth. The previous objective leads to the
#: posterior of the map's own law, which differs from that of digits; the score leads to marginals that are correct for
#: the images
SCORE_SETTINGS = LoopSettings(steps=1500, batch_size=96, learning_rate=5e-4, ema=0.998)
IMAGE_SCORE = 100.0
#: the next stage trains map and adapter together, with a score of patches of the samples, corrected as in the solver.
#: The correction fits the data, so no other term has to. Relative to the divergence, the score has ten times its former
#: weight, at which the divergence widened the samples. With tau and alpha as in the first stage (0.22, 0.9), draws from
#: plain noise got worse with each step: half of the paths start from plain noise, and the MeanFlow term weighs more
SAMPLES_SETTINGS = LoopSettings(steps=1000, batch_size=63, learning_rate=2e-4, warmup=20, ema=0.99, log_every=10)
SAMPLES_OBJECTIVE = ObjectiveSettings(tau=TAU / 7, alpha=0.5, level_power=0.0, tangent="semigroup",
                                      misfit=0.0, score=10 * IMAGE_SCORE, patches=True, joint=True, consistency=True)


#: existing class whose parameters a new class starts from, in an adapter that was trained before the class existed
LIKE = {"free-form-inpainting": "random-inpainting"}


def image_problems(image_shape: tuple[int, ...]) -> list[TrainingProblem]:
    """The seven problem classes, with ranges of operators and of noise levels, which start at 0.

    Args:
        image_shape: ``(C, H, W)``.
    """
    levels = (0.0, 0.2)
    return [
        TrainingProblem(elementwise.Denoising(image_shape), (0.0, 0.5)),
        TrainingProblem(inpainting.RandomInpainting(image_shape), levels),
        TrainingProblem(inpainting.BoxInpainting(image_shape, sides=(0.25, 0.55)), levels),
        TrainingProblem(superresolution.SuperResolution(image_shape, factor=4), levels),
        TrainingProblem(blur.GaussianBlur(image_shape), levels),
        TrainingProblem(blur.MotionBlur(image_shape), levels),
        TrainingProblem(inpainting.FreeFormInpainting(image_shape), levels),
    ]


def grown(adapter: Adapter, problems: list[TrainingProblem], deviations: bool = False) -> Adapter:
    """Copy of an adapter to continue from, with the problem classes that it lacks."""
    return adapter.grown([str(p.operator.problem_class) for p in problems], LIKE, deviations)


def _train_image_prior(run: Run, name: str | None = None, distinct: float = 0.5,
                       tangent: str = "map") -> NeuralFlowMap:
    images = load_images(str(run.data), split="train", dtype=torch.uint8)
    begun = run.prior or name
    start = load_trainable(begun) if begun else None
    return train_prior(images, run.settings, run.folder, options=MAP_NETWORK, start=start, distinct=distinct,
                       tangent=tangent, progress=run.progress, stop_at=run.stop_at)


def _train_image_vfm(run: Run, name: str) -> VFM:
    images = load_images(str(run.data), split="train", dtype=torch.uint8)
    if run.prior and kind_of(run.prior) == "vfm":  # continue from its map and its adapter
        begun = VFM.load(run.prior)
        prior = begun.prior
        adapter = grown(begun.adapter, image_problems(prior.image_shape))
    else:
        prior, adapter = load_trainable(run.prior or name), None
    return train_vfm(images, prior, image_problems(prior.image_shape), run.settings, run.folder,
                     options=ADAPTER_NETWORK, adapter=adapter, progress=run.progress, stop_at=run.stop_at, tau=TAU,
                     alpha=ALPHA, level_power=0.0, model_error=True, tangent="semigroup")


#: alternatively, only the deviations of a fixed VFM are trained
DEVIATIONS_SETTINGS = LoopSettings(steps=150, batch_size=63, learning_rate=1e-2, warmup=10, weight_decay=0.0, ema=0.97,
                                   log_every=10)
DEVIATIONS_OBJECTIVE = ObjectiveSettings(level_power=0.0, frozen=True, score=IMAGE_SCORE, patches=True,
                                         consistency=True, deviations_alone=True)


def _sharpen_image_vfm(run: Run, name: str, objective: ObjectiveSettings = SAMPLES_OBJECTIVE) -> VFM:
    images = load_images(str(run.data), split="train", dtype=torch.uint8)
    vfm = VFM.load(run.prior or name)
    problems = image_problems(vfm.prior.image_shape)
    return train_vfm(images, vfm.prior, problems, run.settings, run.folder,
                     adapter=grown(vfm.adapter, problems, deviations=True), objective=objective,
                     progress=run.progress, stop_at=run.stop_at)


def _consolidate_image_vfm(run: Run, name: str) -> VFM:
    images = load_images(str(run.data), split="train", dtype=torch.uint8)
    vfm = VFM.load(run.prior or name)
    problems = image_problems(vfm.prior.image_shape)
    return consolidate_vfm(VFM(vfm.prior, grown(vfm.adapter, problems)), images, problems, run.settings, run.folder,
                           jumps=IMAGE_JUMPS, alpha=TAUGHT_ALPHA, progress=run.progress, stop_at=run.stop_at)


def _score_image_vfm(run: Run, name: str) -> VFM:
    images = load_images(str(run.data), split="train", dtype=torch.uint8)
    vfm = VFM.load(run.prior or name)
    problems = image_problems(vfm.prior.image_shape)
    return train_vfm(images, vfm.prior, problems, run.settings, run.folder, adapter=grown(vfm.adapter, problems),
                     frozen=True, level_power=0.0, model_error=True, score=IMAGE_SCORE, progress=run.progress,
                     stop_at=run.stop_at)


mnist = Recipe("mnist", "prior on MNIST, 28 x 28", PRIOR_SETTINGS, _train_image_prior, data="mnist")
fashion_mnist = Recipe("fashion-mnist", "prior on Fashion-MNIST, 28 x 28", PRIOR_SETTINGS, _train_image_prior,
                       data="fashion-mnist")
mnist_velocity = Recipe("mnist-velocity", "flow matching only, for a prior on MNIST (--prior)", VELOCITY_SETTINGS,
                        lambda run: _train_image_prior(run, "mnist", distinct=0.0), data="mnist")
mnist_jumps = Recipe("mnist-jumps", "jumps along its own velocity, for a prior on MNIST (--prior)", JUMPS_SETTINGS,
                     lambda run: _train_image_prior(run, "mnist", JUMPS_SHARE, "semigroup"), data="mnist")
fashion_mnist_velocity = Recipe(
    "fashion-mnist-velocity", "flow matching only, for a prior on Fashion-MNIST (--prior)", VELOCITY_SETTINGS,
    lambda run: _train_image_prior(run, "fashion-mnist", distinct=0.0), data="fashion-mnist")
fashion_mnist_jumps = Recipe(
    "fashion-mnist-jumps", "jumps along its own velocity, for a prior on Fashion-MNIST (--prior)", JUMPS_SETTINGS,
    lambda run: _train_image_prior(run, "fashion-mnist", JUMPS_SHARE, "semigroup"), data="fashion-mnist")
mnist_vfm = Recipe("mnist-vfm", "VFM on MNIST for seven problem classes, from the prior", VFM_SETTINGS,
                   lambda run: _train_image_vfm(run, "mnist"), data="mnist")
mnist_vfm_consolidation = Recipe(
    "mnist-vfm-consolidation", "one step in place of four, for a VFM on MNIST (--prior)",
    CONSOLIDATION_SETTINGS, lambda run: _consolidate_image_vfm(run, "mnist"), data="mnist")
mnist_vfm_score = Recipe("mnist-vfm-score",
                         "only the adapter, by a proper score of its samples, for a VFM on MNIST (--prior)",
                         SCORE_SETTINGS, lambda run: _score_image_vfm(run, "mnist"), data="mnist")
mnist_vfm_samples = Recipe(
    "mnist-vfm-samples", "map and adapter, by a score of patches of corrected samples, for a VFM on MNIST (--prior)",
    SAMPLES_SETTINGS, lambda run: _sharpen_image_vfm(run, "mnist"), data="mnist")
fashion_mnist_vfm = Recipe("fashion-mnist-vfm", "VFM on Fashion-MNIST for seven problem classes, from the prior",
                           dataclasses.replace(VFM_SETTINGS, steps=1800),
                           lambda run: _train_image_vfm(run, "fashion-mnist"), data="fashion-mnist")
fashion_mnist_vfm_consolidation = Recipe(
    "fashion-mnist-vfm-consolidation", "one step in place of four, for a VFM on Fashion-MNIST (--prior)",
    CONSOLIDATION_SETTINGS, lambda run: _consolidate_image_vfm(run, "fashion-mnist"), data="fashion-mnist")

mnist_vfm_deviations = Recipe(
    "mnist-vfm-deviations", "only the deviations of the adapter, for a VFM on MNIST (--prior)",
    DEVIATIONS_SETTINGS, lambda run: _sharpen_image_vfm(run, "mnist", DEVIATIONS_OBJECTIVE), data="mnist")
fashion_mnist_vfm_deviations = Recipe(
    "fashion-mnist-vfm-deviations",
    "only the deviations of the adapter, for a VFM on Fashion-MNIST (--prior)", DEVIATIONS_SETTINGS,
    lambda run: _sharpen_image_vfm(run, "fashion-mnist", DEVIATIONS_OBJECTIVE), data="fashion-mnist")
fashion_mnist_vfm_samples = Recipe(
    "fashion-mnist-vfm-samples",
    "map and adapter, by a score of patches of corrected samples, for a VFM on Fashion-MNIST (--prior)",
    SAMPLES_SETTINGS, lambda run: _sharpen_image_vfm(run, "fashion-mnist"), data="fashion-mnist")
fashion_mnist_vfm_score = Recipe(
    "fashion-mnist-vfm-score",
    "only the adapter, by a proper score of its samples, for a VFM on Fashion-MNIST (--prior)",
    SCORE_SETTINGS, lambda run: _score_image_vfm(run, "fashion-mnist"), data="fashion-mnist")

#: photographs: the VFM's map is the exact flow of a Gaussian with their spectrum, and the adapter does all the work,
#: once for each observation. The prior has a small network
PHOTO_SHAPE = (3, 64, 64)
PHOTO_MAP = {"channels": [32, 64, 96], "blocks": 1, "attention": False}
PHOTO_ADAPTER = {"channels": [48, 96, 128], "blocks": 2}
PHOTO_PRIOR_SETTINGS = LoopSettings(steps=900, batch_size=64, learning_rate=1.5e-3)
PHOTO_VFM_SETTINGS = LoopSettings(steps=4500, batch_size=32, learning_rate=1.5e-3, ema=0.998)
#: the weight of the score dominates, because under the map's Gaussian the other terms would treat every edge as
#: unlikely. When the map was trained too, from the first step, the result was worse than the linear estimate after 150
#: steps: the map's errors at low frequencies drift, and the adapter has to follow them
PHOTO_SCORE = 5000.0


def photo_problems(shape: tuple[int, int, int] = PHOTO_SHAPE) -> list[TrainingProblem]:
    """Seven problem classes for crops of photographs, with super-resolution by 2, 3 and 4; sizes are in pixels.

    Denoising and motion blur get more of the rows: with four of 32 rows each, they were the furthest behind block
    matching, because classical methods are best at removing noise.
    """
    levels = (0.0, 0.2)
    gaussian = blur.GaussianBlur(shape, std=2.0, kernel_size=25, std_range=(0.6, 3.0))
    return [
        TrainingProblem(elementwise.Denoising(shape), (0.0, 0.25), share=8.0),
        TrainingProblem(inpainting.RandomInpainting(shape), levels, share=3.0),
        TrainingProblem(inpainting.BoxInpainting(shape, sides=(0.15, 0.5)), levels, share=3.0),
        TrainingProblem(inpainting.FreeFormInpainting(shape), levels, share=4.0),
        *(TrainingProblem(superresolution.SuperResolution(shape, factor=factor), levels, share)
          for factor, share in ((2, 2.0), (3, 2.0), (4, 3.0))),
        TrainingProblem(gaussian, levels, share=3.0),
        TrainingProblem(blur.MotionBlur(shape, kernel_size=21), levels, share=6.0),
    ]


def _train_photo_prior(run: Run) -> NeuralFlowMap:
    crops = PhotoCrops(find_photographs(_folders(run)), PHOTO_SHAPE[-1])
    return train_prior(crops, run.settings, run.folder, options=PHOTO_MAP, skip="spectral", tangent="semigroup",
                       start=load_trainable(run.prior) if run.prior else None, progress=run.progress,
                       stop_at=run.stop_at)


def _train_photo_vfm(run: Run) -> VFM:
    crops = PhotoCrops(find_photographs(_folders(run)), PHOTO_SHAPE[-1])
    adapter = None
    if run.prior and kind_of(run.prior) == "vfm":
        begun = VFM.load(run.prior)
        prior, adapter = begun.prior, grown(begun.adapter, photo_problems())
    elif run.prior:
        prior = load_trainable(run.prior)
    else:
        crops_once = crops(SAMPLE // 4, seeded(run.settings.seed, 0, -3))
        prior = gaussian_map(crops_once, generator=seeded(run.settings.seed, 0, -2))
    return train_vfm(crops, prior, photo_problems(), run.settings, run.folder, options=PHOTO_ADAPTER, adapter=adapter,
                     frozen=True, level_power=0.0, model_error=True, score=PHOTO_SCORE, progress=run.progress,
                     stop_at=run.stop_at)


def _folders(run: Run) -> str:
    if run.data is None:
        raise ValueError("this training needs photographs: pass --data FOLDER, or several folders joined by "
                         f"{os.pathsep!r}")
    return run.data


photos = Recipe("photos", "prior on colour photographs of any size", PHOTO_PRIOR_SETTINGS, _train_photo_prior)
photos_vfm = Recipe("photos-vfm", "VFM on photographs of any size for seven problem classes",
                    PHOTO_VFM_SETTINGS, _train_photo_vfm)

#: sinusoids of the input with periods 4, 2, 4/3 and 1; the period of the board is 2. Joint training through such a
#: rough map diverged with targets from the Jacobian-vector product, and is stable with those of the semigroup
BOARD_MAP = {"width": 256, "depth": 5, "num_frequencies": 4, "max_frequency": 2 * math.pi}
BOARD_ADAPTER = {"width": 256, "depth": 4}
BOARD_SETTINGS = LoopSettings(steps=8000, batch_size=512, learning_rate=1e-3, weight_decay=0.0, ema=0.998,
                              precision="no", log_every=200)
#: numbers of steps before and after joint training, and the jumps of the map from which the last stage learns
BOARD_PRETRAINING, BOARD_CONSOLIDATION, BOARD_JUMPS = 3000, 1000, 8
#: one path in ten stays unconditional. If half of them did, the map would keep the prior's pairing of noise and data:
#: there, both coordinates of the noise affect the observed one, which no adapter with a diagonal covariance fits
BOARD_TAU, BOARD_ALPHA = 1.0, 0.9


def board_prior(settings: LoopSettings, run: Run) -> NeuralFlowMap:
    """Train the checkerboard's prior, from which joint training starts, in ``folder/pretraining``."""
    folder = run.folder / "pretraining"
    if (folder / "prior" / "config.json").exists():
        return load_trainable(folder / "prior")
    return train_prior(board_sample, settings, folder, network="mlp", options=BOARD_MAP, decode_affine=(1.0, 0.0),
                       tangent="semigroup", progress=run.progress, stop_at=run.stop_at)


def train_board(run: Run, *, tau: float = BOARD_TAU, alpha: float = BOARD_ALPHA, frozen: bool = False,
                consolidation: int = BOARD_CONSOLIDATION) -> VFM:
    """Pretrain, train jointly (or the adapter alone), and consolidate on the checkerboard.

    Args:
        run: The run. Its ``prior`` replaces the pretraining; ``settings.steps`` is the number of joint steps, and an
            upper limit for the other stages.
        tau: Scale of the MeanFlow term.
        alpha: Share of rows whose path starts from the adapter's noise.
        frozen: Whether to train only the adapter, with the pretrained map fixed.
        consolidation: Number of steps of the last stage; 0 skips it.

    Returns:
        The solver. Its state before the last stage is kept in ``folder/joint/vfm``.
    """
    settings, problems = run.settings, [TrainingProblem(board_problem.operator, NOISE)]
    pretraining = dataclasses.replace(settings, steps=min(BOARD_PRETRAINING, settings.steps))
    prior = load_trainable(run.prior) if run.prior else board_prior(pretraining, run)
    whole = frozen or consolidation < 1
    joint = train_vfm(board_sample, prior, problems, settings, run.folder if whole else run.folder / "joint",
                      options=BOARD_ADAPTER, tau=tau, alpha=alpha, frozen=frozen, tangent="semigroup",
                      progress=run.progress, stop_at=run.stop_at)
    if whole or (run.stop_at is not None and run.stop_at < settings.steps):
        return joint
    last = dataclasses.replace(settings, steps=min(consolidation, settings.steps), ema=0.99)
    return consolidate_vfm(joint, board_sample, problems, last, run.folder, jumps=BOARD_JUMPS, alpha=alpha,
                           progress=run.progress)


checkerboard = Recipe("checkerboard", "VFM and its prior on the checkerboard of the VFM paper", BOARD_SETTINGS,
                      train_board)
