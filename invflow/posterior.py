"""Posterior: samples of p(x | y) with their weights, their cost and their diagnostics."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invflow._core.checks import as_index, checked_evidence, checked_samples, normalised, precise
from invflow._core.explained import explained
from invflow._core.random import as_generator
from invflow._core.weighted import effective_size, least_samples, pair_mass, pieces, quantiles, variance_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXACT_MEAN", "NFE", "FewSamplesWarning", "Posterior"]

#: name of the diagnostic ``(B, *image_shape)`` in which a solver stores a mean that it knows in closed form
EXACT_MEAN = "exact_mean"

_VALUES_AT_A_TIME = 2**21  # processing this many at a time takes under 100 MB


class FewSamplesWarning(UserWarning):
    """Warning that a posterior has too few samples for an interval of the requested level."""


@dataclass(frozen=True)
class NFE:
    """Network calls per returned sample: rows through any network, divided by the number of samples.

    Attributes:
        forward: Evaluations per sample.
        backward: Derivatives per sample; a Jacobian-vector product counts one here and one in ``forward``.
    """

    forward: float = 0.0
    backward: float = 0.0

    def __str__(self) -> str:
        return f"{self.forward:.4g} forward, {self.backward:.4g} backward"


class Posterior:
    r"""Samples of p(x | y) for B observations with N particles each, with weights, cost and diagnostics.

    Expectations are the self-normalised sums :math:`\sum_n w_n f(x_n)`, with weights that sum to one for each
    observation. A solver without importance weights passes none. Its samples are then weighted equally, and
    :meth:`ess` is None, because an effective sample size can only be computed from weights.

    Args:
        samples: Samples ``(B, N, *image_shape)``, floating point, finite, B and N at least 1; images are nominally in
            [0, 1].
        log_weights: Log weights ``(B, N)``, not necessarily normalised; -inf is a weight of zero. None if the solver
            has no weights.
        log_evidence: Estimates ``(B,)`` of log p(y), or None. If they are means of weights, e^{log_evidence} may be
            unbiased, but log_evidence is too low: by half its variance if the weights are even, and typically by far
            more if their k-hat is high, since most runs then miss the few weights that dominate the mean.
        nfe: Network calls per sample.
        seconds: Wall time of the call that drew the samples.
        diagnostics: Numbers, strings, lists or tensors by name. A tensor whose first dimension is B has one entry
            for each observation, and :meth:`select` selects from it too.
        settings: How the samples were drawn (solver, its settings, seed), as JSON values.

    Attributes:
        samples: ``(B, N, *image_shape)``.
        log_weights: ``(B, N)``, normalised over N: their exponentials sum to one.
        weighted: Whether the solver computed weights.
        log_evidence: ``(B,)`` or None.
        nfe, seconds, diagnostics, settings: As passed.

    Raises:
        TypeError: If the samples are not a floating-point tensor.
        ValueError: If the batch is empty, the shapes do not fit, or values are not finite (the message
            names the observation and the particle).

    Example:
        >>> import torch, invflow
        >>> samples = torch.randn(2, 64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> posterior = invflow.Posterior(samples)
        >>> posterior.mean().shape
        torch.Size([2, 1, 8, 8])
    """

    @explained(arrays=True)
    def __init__(self, samples: Tensor, log_weights: Tensor | None = None, log_evidence: Tensor | None = None,
                 nfe: NFE | None = None, seconds: float = 0.0, diagnostics: Mapping[str, Any] | None = None,
                 settings: Mapping[str, Any] | None = None) -> None:
        self.samples = checked_samples(samples)
        self.weighted = log_weights is not None
        self.log_weights = normalised(log_weights, self.samples)
        self.log_evidence = checked_evidence(log_evidence, self.samples)
        self.nfe = NFE() if nfe is None else nfe
        self.seconds = float(seconds)
        self.diagnostics: dict[str, Any] = dict(diagnostics or {})
        self.settings: dict[str, Any] = dict(settings or {})

    # -- summaries -------------------------------------------------------------------------------------------

    @property
    def num_observations(self) -> int:
        """B, the number of observations."""
        return self.samples.shape[0]

    @property
    def num_samples(self) -> int:
        """N, the number of particles for each observation."""
        return self.samples.shape[1]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return tuple(self.samples.shape[2:])

    @property
    def weights(self) -> Tensor:
        """``(B, N)``, summing to one over N."""
        return self.log_weights.exp()

    def mean(self) -> Tensor:
        """Weighted mean, ``(B, *image_shape)``; the exact mean if the solver stored it (:data:`EXACT_MEAN`)."""
        exact = self.diagnostics.get(EXACT_MEAN)
        if exact is not None and not self.weighted:
            result: Tensor = exact.to(self.samples)
            return result
        return self._sample_mean()

    def _sample_mean(self) -> Tensor:
        flat = self.samples.flatten(2)
        mean = torch.bmm(self.weights.to(flat.dtype).unsqueeze(1), flat.reshape(*self.samples.shape[:2], -1))
        return mean.reshape(-1, *self.image_shape)

    def std(self) -> Tensor:
        r"""Weighted standard deviation, ``(B, *image_shape)``.

        The variance is :math:`\sum_n w_n (x_n - \bar x)^2` plus the variance of the weighted mean, :math:`\sum_n w_n^2
        (x_n - \bar x)^2 / (1 - \sum_n w_n^2)`. With equal weights it equals that of ``torch.std``, which is unbiased.
        With few effective samples it is the variance of the particles that hold the weight. NaN if a single particle
        holds all of it.
        """
        flat, mean = self.samples.flatten(2), self._sample_mean().flatten(1).unsqueeze(1)
        own = precise(self.log_weights).exp()
        weights = torch.where(pair_mass(own)[:, None] < 1e-6, torch.nan, variance_weights(own)[0])
        weights = weights.to(flat.dtype).unsqueeze(1)
        variance = torch.zeros_like(mean)
        for rows, part in pieces(self.num_observations, self.num_samples, flat.shape[2], _VALUES_AT_A_TIME):
            variance[rows] += weights[rows, :, part] @ (flat[rows, part] - mean[rows]).square()
        return variance.sqrt().reshape(-1, *self.image_shape)

    @explained(like="posterior.quantile(0.05)")
    def quantile(self, q: float) -> Tensor:
        r"""Weighted quantile of each pixel, ``(B, *image_shape)``.

        It is the mean of the inverse of the weighted empirical distribution function over the window
        :math:`[(h - 1) / n, h / n]`, where n is the effective sample size :math:`1 / \sum w^2` and
        :math:`h = q (n + 1)` is clamped to [1, n] (Akinshin 2023, "Weighted quantile estimators"). Particles
        of weight zero are ignored. With equal weights it is the linear interpolation of the order statistics
        at k / (N + 1) (Weibull's; ``numpy.quantile(..., method="weibull")``), so that a new draw lies below
        it with probability q. (The default of numpy and torch lies closer to the median and makes
        intervals too narrow: for 64 uniform draws, 87% instead of 90%.)

        Args:
            q: Level in [0, 1]. Within 1 / (N + 1) of either end, the quantile is the smallest or largest sample.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"a quantile lies in [0, 1], not at {q}: write quantile(0.05) for 5%")
        return self._quantiles(q)[0]

    def _quantiles(self, *levels: float) -> list[Tensor]:
        weights = precise(self.log_weights).exp() if self.weighted else None
        return quantiles(self.samples, weights, levels, _VALUES_AT_A_TIME)

    @explained(like="low, high = posterior.interval(0.9)")
    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """Central credible interval of each pixel, ``(low, high)``, each ``(B, *image_shape)``.

        Args:
            level: Probability inside the interval, in (0, 1); the ends are the quantiles at (1 - level) / 2 and
                (1 + level) / 2. With N equally weighted samples the highest possible level is (N - 1) / (N + 1); with
                weights, N is the effective sample size. For a higher level the widest possible interval is returned,
                with a :class:`FewSamplesWarning` that states its level.
        """
        if not 0 < level < 1:
            raise ValueError(f"an interval's level lies in (0, 1), not at {level}: interval(0.9) is 90%")
        size = effective_size(self.weights)
        few = size < least_samples(level) * (1 - 1e-6)
        if bool(few.any()):
            least, what = float(size.min()), "effective samples" if self.weighted else "samples"
            most = max(0.0, (least - 1) / (least + 1))
            which = "" if bool(few.all()) else f" ({int(few.sum())} of {len(few)} observations have too few)"
            warnings.warn(f"{least:.4g} {what} allow no interval above {most:.1%}{which}: returned the widest "
                          f"one, from the smallest to the largest sample; {level:.4g} needs {least_samples(level)}",
                          FewSamplesWarning, stacklevel=3)
        low, high = self._quantiles((1 - level) / 2, (1 + level) / 2)
        return low, high

    def ess(self) -> Tensor | None:
        """Effective sample size 1 / sum w^2, ``(B,)``, in particles; None for a solver without weights."""
        if not self.weighted:
            return None
        return 1 / precise(self.log_weights).exp().square().sum(1).to(self.log_weights.dtype)

    # -- posteriors derived from this one --------------------------------------------------------------------

    @explained(like="posterior.resample(16, generator=generator)")
    def resample(self, n: int, *, generator: torch.Generator | int | None = None) -> Posterior:
        """Draw n equally weighted particles for each observation, in random order.

        Uses systematic resampling (Kitagawa 1996): a particle of weight w appears n w times, rounded up or down,
        so with equal weights and n <= N none appears twice. The result has no weights and no :meth:`ess`;
        its diagnostic ``resampled_from_ess`` holds the previous effective sample size.

        Args:
            n: Number of particles to draw, at least 1.
            generator: Random generator, or a seed.

        Returns:
            A posterior with samples ``(B, n, *image_shape)``.
        """
        if n < 1:
            raise ValueError(f"resample draws at least one particle, not n={n}")
        generator, shape = as_generator(generator), (self.num_observations, n)
        device = generator.device
        offset = torch.rand((shape[0], 1), generator=generator, device=device, dtype=torch.float64)
        order = torch.rand(shape, generator=generator, device=device, dtype=torch.float64).argsort(1)
        total = self.log_weights.to(device).double().exp().cumsum(1)
        points = (torch.arange(n, device=device) + offset) / n * total[:, -1:]
        # right=True: the first particle whose cumulative weight is above the point, never one of weight zero
        index = torch.searchsorted(total, points, right=True).clamp(max=self.num_samples - 1)
        index = index.gather(1, order).to(self.samples.device)
        rows = torch.arange(shape[0], device=self.samples.device).unsqueeze(1)
        ess = self.ess()
        extra = {} if ess is None else {"resampled_from_ess": ess}
        return Posterior(self.samples[rows, index], None, self.log_evidence, self.nfe, self.seconds,
                         {**self.diagnostics, **extra}, {**self.settings, "resampled_from": self.num_samples})

    @explained(like="posterior.select(0)")
    def select(self, index: int | slice | Sequence[int] | Tensor) -> Posterior:
        """Select observations; the batch dimension is kept, even for a single observation.

        Args:
            index: An integer, a slice, a list of integers, or an index or boolean tensor, over B.
        """
        rows = as_index(index, self.num_observations).to(self.samples.device)
        diagnostics = {
            key: value[rows.to(value.device)] if _per_observation(value, self.num_observations) else value
            for key, value in self.diagnostics.items()
        }
        return Posterior(
            self.samples[rows], self.log_weights[rows] if self.weighted else None,
            None if self.log_evidence is None else self.log_evidence[rows],
            self.nfe, self.seconds, diagnostics, self.settings,
        )

    @explained(arrays=True, like="posterior.plot(truth, likelihood.y)")
    def plot(self, truth: Tensor | None = None, observation: Tensor | None = None, **options: Any) -> Figure:
        """Plot a row for each observation: truth, observation, samples, mean, standard deviation.

        Args:
            truth: ``(B, *image_shape)`` or None.
            observation: ``(B, *measurement_shape)`` or None.
            **options: Options of :func:`invflow.views.figure.posterior_figure`.

        Returns:
            A matplotlib figure; ``figure.savefig("figure.png")`` writes it.
        """
        from invflow.views.figure import posterior_figure

        return posterior_figure(self, truth, observation, **options)

    # -- files -----------------------------------------------------------------------------------------------

    @explained(like="posterior.save('posterior.safetensors')")
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file, atomically, with the library versions used.

        Args:
            path: Path of the file, such as ``"posterior.safetensors"``; its folder is created if needed.

        Raises:
            TypeError: If a setting or a diagnostic cannot be stored as JSON.
        """
        from invflow._core.records import write_posterior

        tensors = {"samples": self.samples}
        if self.weighted:
            tensors["log_weights"] = self.log_weights
        if self.log_evidence is not None:
            tensors["log_evidence"] = self.log_evidence
        write_posterior(Path(path), tensors, self.diagnostics, self.settings, asdict(self.nfe), self.seconds)

    @classmethod
    @explained(like="invflow.Posterior.load('posterior.safetensors')")
    def load(cls, path: str | os.PathLike[str]) -> Posterior:
        """Read a file written by :meth:`save`, onto the CPU. Nothing in it is executed: no pickles.

        The library versions that wrote it are in ``settings["versions"]``.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is truncated, is not a safetensors file, or does not hold a posterior.
        """
        from invflow._core.records import read_posterior

        fields = read_posterior(Path(path))
        try:
            return cls(**{**fields, "nfe": NFE(**fields["nfe"])})
        except TypeError as error:
            raise ValueError(f"{path} does not hold a posterior: {error}") from error

    def to_xarray(self) -> Any:
        """Convert to an ``xarray.Dataset``, with weights, evidence and all diagnostics that it can hold.

        Returns:
            ``samples`` over observation, sample and the axes of an image; ``log_weight`` if the posterior is weighted,
            ``log_evidence`` and each diagnostic that belongs to the observations. Calls, seconds, settings and the
            rest are attributes, as JSON. ``to_netcdf`` writes it to a file.

        Raises:
            ImportError: If xarray is not installed; the message says how to install it.
        """
        from invflow.views.export import to_xarray

        return to_xarray(self)

    def to_arviz(self, *, generator: torch.Generator | None = None) -> Any:
        """Convert to arviz's data structure: one chain of N draws of the variable ``x`` over observation and image.

        Arviz treats draws as equally weighted, so a weighted posterior is resampled; its effective sample size becomes
        an attribute. Diagnostics for Markov chains, such as R-hat, are meaningless here.

        Args:
            generator: Random generator, for a weighted posterior.

        Returns:
            A ``DataTree`` or, before version 1, an ``InferenceData``, with the group ``posterior``.

        Raises:
            ImportError: If arviz is not installed; the message says how to install it.
        """
        from invflow.views.export import to_arviz

        return to_arviz(self, generator)

    # -- short descriptions ----------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.num_observations

    if not TYPE_CHECKING:  # so that type checkers still report missing attributes

        def __getattr__(self, name: str) -> Any:
            """Point to the attribute that holds the tensor."""
            hint = (": posterior.samples, (B, N, *image_shape), is the tensor"
                    if name in ("shape", "dtype", "device", "numpy", "to", "cpu") else "")
            raise AttributeError(f"a {type(self).__name__} has no {name!r}{hint}")

    def __getitem__(self, index: object) -> Posterior:
        """Raise an error, since an index could mean an observation or a sample."""
        raise TypeError(f"posterior[{index!r}] could mean an observation or a sample: posterior.select({index!r}) is "
                        f"the posterior of an observation, posterior.samples[{index!r}] its samples (N, *image_shape)")

    def _facts(self) -> dict[str, str]:
        shape = " x ".join(map(str, self.image_shape))
        facts = {"samples": f"{self.num_observations} x {self.num_samples} of {shape}"}
        ess = self.ess()
        if ess is not None:
            facts["ess"] = f"{ess.min():.0f} at least of {self.num_samples}"
        if self.log_evidence is not None:
            facts["log evidence"] = ", ".join(f"{v:.4g}" for v in self.log_evidence[:4].tolist())
        k_hat = self.diagnostics.get("k_hat")
        if isinstance(k_hat, Tensor) and k_hat.numel() and not bool(k_hat.isnan().all()):
            facts["k-hat"] = f"{float(k_hat.nan_to_num(nan=-torch.inf).max()):.2f} at most (unreliable above 0.7)"
        facts["calls per sample"] = str(self.nfe)
        facts["seconds"] = f"{self.seconds:.3g}"
        return facts

    def __repr__(self) -> str:
        return "Posterior(" + "; ".join(f"{k}: {v}" for k, v in self._facts().items()) + ")"

    def _repr_html_(self) -> str:
        from invflow.views.export import posterior_html

        return posterior_html(self, self._facts())

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": repr(self), "text/html": self._repr_html_()}


def _per_observation(value: Any, num_observations: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == num_observations
