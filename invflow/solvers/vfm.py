"""Variational Flow Maps: posterior samples in one network call each."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invflow._core.chunks import ChunkSize, check_chunk_size
from invflow._core.explained import explained
from invflow._core.folders import read_config, resolve_folder
from invflow._core.random import draw_noise
from invflow._core.records import fingerprint, write_atomically
from invflow._core.remembered import remembered
from invflow._core.shapes import column
from invflow._core.watch import without_gradients
from invflow.flowmap import rows_at_a_time
from invflow.likelihood import GaussianLikelihood
from invflow.linear.correction import correct, measurement_noise
from invflow.linear.slow import slow_cosines, with_slow_cosines
from invflow.models.adapter import Adapter, Proposal
from invflow.models.neural import NeuralFlowMap
from invflow.nets.unet import can_tile, tiles
from invflow.posterior import EXACT_MEAN, Posterior
from invflow.reward import Reward, score_rows
from invflow.smc import log_mean_weight, pareto_k_hat, precise
from invflow.solver import Solver
from invflow.solvers.finite import check_finite
from invflow.solvers.noise.target import log_prior_over_proposal
from invflow.solvers.verdict import sentence

__all__ = ["VFM"]

# larger images are processed in tiles unless the caller chooses; larger tiles have less overlap
WHOLE, TILE, SMALLEST_TILE = 2**20, 512, 64


class VFM(Solver):
    r"""Variational Flow Map: an adapter proposes noise, and the flow map turns it into a posterior sample.

    x = decode(X_{0,1}(z)) with z ~ q(z | y, c) (arXiv 2603.07276). It takes one call of the adapter per observation and
    ``steps`` calls of the map per sample. The quality of the samples depends on the training. They have no
    weights unless ``importance`` is set.

    If map and adapter are fully convolutional (``prior.resizable``), the image may have any size: that of the
    likelihood's operator. The noise has the size of the image, and one call restores the whole image.

    Args:
        prior: The map that was trained together with the adapter.
        adapter: The noise adapter.
        steps: Number of jumps from noise to data; several jumps follow the same flow map over equal sub-intervals.
        chunk_size: Number of rows through the map at a time, for images of the training size. For larger images it is
            reduced in proportion to their pixels (256 rows of 64 x 64 are one row of 1024 x 768). None for 256 on a
            CPU, and as many as fit on a GPU. Samples do not depend on it beyond rounding.
        tile: Side in pixels of the overlapping tiles in which the networks process images larger than those of the
            training; samples are the same up to rounding. None uses whole images up to about one
            megapixel and tiles of 512 beyond; if a single row does not fit in memory, it uses tiles that fit.
        importance: Whether to compute the log weights r(f(z)) + log N(z; 0, I) - log q(z) of the samples, with the log
            evidence and, in the diagnostics, their tail index ``k_hat``, which shows whether the samples can be
            trusted for this observation (:func:`invflow.smc.reliable_k_hat`). With several steps, f is the map in
            that many steps, also a function of z. The target is then the posterior under that prior, the law of
            :meth:`prior_samples`. It costs one evaluation of the reward per sample and no network call.
        consistency: Whether to move each sample towards its measurement by one linear step without a network
            (:func:`invflow.linear.correction.correct`). The adapter's standard deviations determine how far each pixel
            may move. None does this for the problem classes for which the adapter has factors of the deviations
            (``adapter.consistency``); False never; True always, with a factor of 1 for the other classes; a number is
            the factor for all. This uses y twice: the samples spread less, and are calibrated only to the extent that
            their error is independent of the measurement noise. It costs a few applications of the operator, counted
            in ``diagnostics["consistency_steps"]``. It cannot be combined with importance weights, which belong to
            f(z).

    Raises:
        ValueError: If the adapter belongs to another map, a setting is below 1, tiles are requested for networks that
            cannot be tiled (a perceptron, or a U-Net with attention), or a correction is requested for an adapter
            without deviations or for weighted samples.

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import SuperResolution
        >>> vfm = invflow.VFM.load("mnist")
        >>> g = torch.Generator().manual_seed(0)
        >>> operator = SuperResolution((1, 28, 28), factor=4)
        >>> y = operator.measure(vfm.prior_samples(2, generator=g), sigma=0.025, generator=g)
        >>> vfm.sample(invflow.GaussianLikelihood(operator, y, sigma=0.025), 16, generator=g).samples.shape
        torch.Size([2, 16, 1, 28, 28])
    """

    prior: NeuralFlowMap
    takes_no_noise = True

    @explained(like="invflow.VFM.load('mnist')")
    def __init__(self, prior: NeuralFlowMap, adapter: Adapter, *, steps: int = 1, chunk_size: int | None = None,
                 importance: bool = False, tile: int | None = None,
                 consistency: bool | float | None = None) -> None:
        check_chunk_size(chunk_size)
        if steps < 1 or (tile is not None and tile < 1):
            asked = "" if tile is None else f", tile={tile}"
            raise ValueError(f"steps={steps}{asked} must be at least 1")
        if not isinstance(adapter, Adapter):
            raise TypeError(f"VFM takes a map and then its adapter, not a {type(prior).__name__} and a "
                            f"{type(adapter).__name__}: pass VFM(prior, adapter), or invflow.VFM.load('mnist')")
        adapter.check_map(prior)
        self.consistency = _checked_consistency(consistency, adapter, importance)
        if tile is not None and not _cuttable(prior, adapter):
            raise ValueError(f"tile={tile}, but the networks of this VFM process the whole image at once, so tiles "
                             "would change the samples: leave tile=None")
        self.prior, self.adapter, self.tile = prior, adapter, tile
        self._trained_shape = tuple(prior.image_shape)  # the same for resized copies
        self.steps, self.chunk_size, self.importance = steps, chunk_size, importance

    @torch.no_grad()
    def _sample(self, reward: Reward, n: int, generator: torch.Generator, progress: bool) -> Posterior:
        """Draw posterior samples; see :meth:`Solver.sample`.

        Raises:
            ValueError: If the adapter was not trained for the likelihood or reward; the message names its problem
                classes and the solvers that need no training. Also if the images have another size than in training,
                unless map and adapter accept any size.
        """
        self.adapter.class_index(reward, quiet=True)  # before allocating anything of the size of the images
        operator = reward.operator
        prior, adapter = self._for_images(self.prior.image_shape if operator is None else operator.image_shape)
        with self._sized(prior, adapter) as size:
            mean, std, deviation = self._propose(adapter, reward, size)
            rows = len(mean) * n
            correction = self._correction(adapter, reward, deviation, n, generator)
            noise = draw_noise((rows, *prior.state_shape), generator, mean.device).to(mean)
            # overwrite the noise, since sixteen samples of a large photograph take most of the memory
            same = noise.shape[1:] == prior.image_shape
            images = noise if same else noise.new_empty((rows, *prior.image_shape))
            # on both devices: rewards select observations on the host, where copying the indices would wait for the GPU
            alone = len(mean) == 1
            on_host = torch.zeros(rows, dtype=torch.long) if alone else torch.arange(len(mean)).repeat_interleave(n)
            owner = on_host if alone else on_host.to(mean.device)
            log_weights = precise(noise.new_empty(rows)) if self.importance else None
            plain = log_weights is None and correction is None and prior.network is None
            exact, slow = self._of_affine(prior, adapter, reward, mean, n, size, generator) if plain else (None, None)
            misfit = noise.new_empty(rows)
            moved, applied = (None, None) if correction is None else noise.new_zeros(2, rows)

            def run(part: slice) -> None:
                # moments of a single observation need not be copied for each of its samples
                centre, spread = (mean, std) if alone else (mean[owner[part]], std[owner[part]])
                z = torch.addcmul(centre, spread, noise[part])
                made = self._made(prior, adapter, z)
                made = made if slow is None else with_slow_cosines(made, slow[part])
                if log_weights is not None:
                    ratio = log_prior_over_proposal(z, centre, spread)
                    log_weights[part] = ratio + score_rows(reward, made, on_host[part])
                if correction is not None and moved is not None and applied is not None:
                    was, (made, applied[part]) = made, correction(part, made)
                    moved[part] = (made - was).square().flatten(1).mean(1)
                if isinstance(reward, GaussianLikelihood):
                    misfit[part] = _misfit(reward, made, None if alone else on_host[part])
                images[part] = made  # last: if memory runs out, the same noise is processed again

            parts: Iterable[object] = size.over(rows, run)
            if progress:
                from tqdm import tqdm

                parts = tqdm(parts, total=-(-rows // size.rows), desc="VFM", unit="chunk", delay=2)
            for _ in parts:
                pass
            check_finite("VFM", f"after {self.steps} of {self.steps} steps", n, images, log_weights)
        diagnostics: dict[str, Any]
        diagnostics, log_evidence = {"noise_std": std.flatten(1).mean(dim=1)}, None
        if moved is not None and applied is not None:
            diagnostics["consistency_steps"] = applied.view(len(mean), -1).mean(1)
            diagnostics["correction"] = moved.view(len(mean), -1).mean(1).sqrt()
        if isinstance(reward, GaussianLikelihood):
            diagnostics |= self._verdict(adapter, reward, images.unflatten(0, (len(mean), n)), misfit,
                                         diagnostics.get("correction"))
        if exact is not None:
            diagnostics[EXACT_MEAN] = exact
        if log_weights is not None:
            log_weights = log_weights.unflatten(0, (len(mean), n))
            log_evidence = log_mean_weight(torch.zeros_like(log_weights), log_weights)
            diagnostics["k_hat"] = pareto_k_hat(log_weights)
        return Posterior(images.unflatten(0, (len(mean), n)), log_weights, log_evidence, diagnostics=diagnostics)

    def _made(self, prior: NeuralFlowMap, adapter: Adapter, z: Tensor) -> Tensor:
        """Map noise to images; a copy, so that rewards may compute gradients."""
        with without_gradients():
            made = prior.decode(prior.flow(adapter.to_state(z), self.steps))
        return made.clone()

    def _of_affine(self, prior: NeuralFlowMap, adapter: Adapter, reward: Reward, mean: Tensor, n: int, size: ChunkSize,
                   generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Exact mean of an affine map, which takes means to means, and slow cosines for the samples.

        Only for uncorrected samples without weights: weighted samples must be draws from the adapter's own Gaussian,
        and corrected samples have another mean.
        """
        exact = size.map(lambda z: self._made(prior, adapter, z), mean)
        slow = adapter.slow_cosines(reward, n, generator)
        return exact, None if slow is None else slow + slow_cosines(exact).repeat_interleave(n, 0)

    @torch.no_grad()
    def prior_samples(self, n: int, image_shape: Sequence[int] | None = None, *,
                      generator: torch.Generator | int | None = None) -> Tensor:
        """Draw from the map's own law, ``(n, *image_shape)``, in the same number of steps as :meth:`sample`.

        Args:
            n: Number of samples.
            image_shape: Image shape ``(C, H, W)``; None for the training shape of the map.
            generator: Random generator, or a seed.

        Raises:
            ValueError: If the map does not accept the shape.
        """
        if n < 1:
            raise ValueError(f"prior_samples takes n >= 1, not n={n}")
        prior, adapter = self._for_images(image_shape or self.prior.image_shape)
        with self._sized(prior, adapter) as size:
            return size.map(lambda z: prior.decode(prior.flow(z, self.steps)), prior.noise(n, generator=generator))

    def _for_images(self, image_shape: Sequence[int]) -> tuple[NeuralFlowMap, Adapter]:
        """Map and adapter for images ``(C, H, W)`` of another size; they share their weights with the VFM's own."""
        shape = tuple(image_shape)
        if shape == tuple(self.prior.image_shape):
            return self.prior, self.adapter
        return self.prior.resized(shape), self.adapter.resized(shape)

    @contextmanager
    def _sized(self, prior: NeuralFlowMap, adapter: Adapter) -> Iterator[ChunkSize]:
        """Yield the number of rows at a time for images of this size; the networks work in tiles if needed."""
        trained, pixels = _pixels(self._trained_shape), _pixels(prior.image_shape)

        # check for tiles last: it walks through all modules, which small images do not need
        now = self.tile if self.tile is not None else TILE if pixels > WHOLE and _cuttable(prior, adapter) else None
        with ExitStack() as stack:

            def cut(tile: int | None) -> None:
                stack.enter_context(tiles(prior, tile))
                stack.enter_context(tiles(adapter, tile))

            def shrink(said: str) -> bool:
                nonlocal now
                smaller = min(TILE if now is None else now // 2, max(prior.image_shape[1:], default=0) // 2)
                if smaller < SMALLEST_TILE or not _cuttable(prior, adapter):
                    return False
                warnings.warn(f"VFM: a single image of {prior.image_shape} does not fit in memory ({said}): continuing "
                              f"in tiles, with the same random numbers; tile={smaller} avoids the attempt",
                              stacklevel=2)
                now = smaller
                cut(now)
                return True

            if now is not None:
                cut(now)
            rows = rows_at_a_time(self.chunk_size, self.prior)
            rows = rows if pixels <= trained else max(1, rows * trained // pixels)
            yield ChunkSize(rows, "VFM", shrink)

    def _propose(self, adapter: Adapter, reward: Reward, size: ChunkSize) -> Proposal:
        adapter.warn_of(reward)
        total = reward.num_observations or 1
        parts = [out for _, out in size.over(total, lambda part: adapter.proposal(
            reward if part == slice(0, total) else reward.select(part), quiet=True))]
        if len(parts) == 1:
            return parts[0]
        said = [part.deviation for part in parts if part.deviation is not None]
        return Proposal(torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts]),
                        torch.cat(said) if said else None)

    def _correction(self, adapter: Adapter, reward: Reward, deviation: Tensor | None, num_samples: int,
                    generator: torch.Generator) -> Callable[[slice, Tensor], tuple[Tensor, Tensor]] | None:
        """Correction of some rows of B x N samples, which also counts applications of the operator; None: none."""
        if deviation is None or self.importance or not isinstance(reward, GaussianLikelihood):
            return None
        factors: Tensor | None = reward.sigma.new_full((len(deviation),), float(self.consistency or 0))
        if self.consistency is None or self.consistency is True:
            known = adapter.correction(adapter.classes[adapter.class_index(reward, quiet=True)], reward.sigma)
            factors = factors if known is None and self.consistency else known
        if factors is None or not bool(factors.any()):
            return None
        likelihood, noise = reward, measurement_noise(len(deviation) * num_samples, reward.y.shape[1:], generator)
        variance = (deviation * column(factors, deviation)).square()

        def corrected(part: slice, made: Tensor) -> tuple[Tensor, Tensor]:
            pick = torch.arange(part.start, part.stop) // num_samples
            operator, y, sigma = likelihood.operator.select(pick), likelihood.y[pick], likelihood.sigma[pick]
            return correct(operator, y.to(made), sigma.to(made), made, variance[pick].to(made), noise[part].to(made))

        return corrected

    def _verdict(self, adapter: Adapter, likelihood: GaussianLikelihood, images: Tensor, misfit: Tensor,
                 moved: Tensor | None) -> dict[str, Any]:
        """Diagnostics of the samples that need no further calls."""
        name = adapter.classes[adapter.class_index(likelihood, quiet=True)]
        stand_in = name if name != likelihood.operator.problem_class else None
        level = adapter.inside_levels(name, likelihood.sigma)
        like = None if stand_in else adapter.inside_traits(name, likelihood.operator)
        like = None if like is None else like.expand(len(images))
        residual = misfit.view(len(images), -1).mean(1).sqrt()
        # a single sample is its mean
        of_mean = residual if images.shape[1] == 1 else likelihood.chi_square(images.mean(1, keepdim=True))[:, 0].sqrt()
        found = {"residual": residual, "residual_of_mean": of_mean,
                 "verdict": sentence(residual, level, like, stand_in, moved)}
        known = [rows.to(residual.device) for rows in (level, like) if rows is not None]
        if known or stand_in:
            found["trained_for"] = torch.stack([*known, torch.full_like(residual, stand_in is None).bool()]).all(0)
        return found

    def settings(self) -> dict[str, Any]:
        """Settings as JSON values, with digests of the weights that identify map and adapter."""
        return {**super().settings(), "map": remembered(self.prior, fingerprint), **self.adapter.settings()}

    def save_pretrained(self, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write map and adapter into ``folder/map`` and ``folder/adapter``, and a ``config.json`` into ``folder``."""
        self.prior.save_pretrained(Path(folder) / "map", dtype)
        self.adapter.save_pretrained(Path(folder) / "adapter", dtype)
        text = json.dumps({"kind": "vfm", "steps": self.steps}, indent=2) + "\n"
        write_atomically(Path(folder) / "config.json", lambda p: Path(p).write_text(text, encoding="utf-8"))

    @classmethod
    @explained(like="invflow.VFM.load('mnist')")
    def load(cls, name: str | os.PathLike[str], *, steps: int | None = None, chunk_size: int | None = None,
             importance: bool = False, tile: int | None = None, consistency: bool | float | None = None) -> VFM:
        """Load a trained VFM.

        Args:
            name: Name of a shipped VFM, such as ``"mnist"``; a folder that :meth:`save_pretrained` wrote; or a Hub
                repository id ``owner/name``.
            steps: Number of jumps from noise to data; None uses the value in the folder.
            chunk_size: Number of rows through the map at a time; None for 256 on a CPU, and as many as fit on a GPU.
            importance: Whether to compute importance weights.
            tile: Side of the tiles for large images.
            consistency: Whether to correct the samples by the data; None uses the adapter's setting for each class.

        Raises:
            ValueError: If it does not exist, is not a VFM, or its files are damaged or do not fit each other.
        """
        shipped = Path(__file__).parents[1] / "weights" / f"{name}-vfm"
        folder = shipped if shipped.is_dir() else resolve_folder(name, "vfm")
        own = read_config(folder, "vfm").get("steps", 1)
        if type(own) is not int or not 1 <= own <= 1000:
            raise ValueError(f"the config.json of {folder} has steps={own!r}: expected a whole number from 1 to 1000")
        return cls(NeuralFlowMap.from_pretrained(folder / "map"), Adapter.from_pretrained(folder / "adapter"),
                   steps=own if steps is None else steps, chunk_size=chunk_size, importance=importance, tile=tile,
                   consistency=consistency)


def _checked_consistency(consistency: bool | float | None, adapter: Adapter, importance: bool) -> bool | float | None:
    """Check that the adapter supports the setting, and return it."""
    if consistency is None or consistency is False:
        return consistency
    if not 0 <= consistency < math.inf:
        raise ValueError(f"consistency={consistency}: pass True, False, None, or a factor of at least 0")
    if not adapter.deviations:
        raise ValueError(f"consistency={consistency}, but this adapter gives no standard deviations of pixels: "
                         "train one with consistency=True (invflow.training.train_vfm), or leave consistency=None")
    if importance:
        raise ValueError("consistency moves the samples, but importance weights belong to the unmoved samples: pass "
                         "one of the two")
    return consistency


def _cuttable(prior: NeuralFlowMap, adapter: Adapter) -> bool:
    """Whether tiles leave the samples unchanged; a map without a network cannot be tiled."""
    return (prior.network is None or can_tile(prior)) and can_tile(adapter)


def _misfit(likelihood: GaussianLikelihood, images: Tensor, owner: Tensor | None) -> Tensor:
    """Mean squared residual of each image, ``(n,)``, to its own observation; None: to the only one."""
    if owner is None:
        return likelihood.residual(images[None])[0]
    return likelihood.select(owner).residual(images[:, None])[:, 0]


def _pixels(shape: Sequence[int]) -> int:
    return math.prod(shape[1:]) if len(shape) > 1 else 1
