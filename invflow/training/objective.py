"""Objective of a Variational Flow Map: the joint loss of map and adapter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from invflow._core.random import draw_noise
from invflow._core.shapes import column, with_axes
from invflow.linear.correction import correct
from invflow.models.adapter import LEAST_LEVEL, LOG_DEVIATION, Adapter
from invflow.models.neural import NeuralFlowMap
from invflow.operator import Operator
from invflow.reward import Reward
from invflow.training.loop import Objective
from invflow.training.losses import (
    gaussian_kl,
    meanflow_loss,
    normalise,
    pair_score,
    patch_score,
    sample_between,
    sample_times,
    scale_gradient,
)
from invflow.training.settings import ObjectiveSettings, TrainingProblem

__all__ = ["VFMObjective"]

#: weight of a new batch in the running estimate of the map's own error
MODEL_ERROR_RATE = 0.05
#: smallest noise level of a row before ``level_power``: rows without noise count too
LEAST_WEIGHT = 0.01
#: weight of the deviations' likelihood, which only keeps them near the samples' spread
DEVIATION_WEIGHT = 0.1


class VFMObjective(Objective):
    r"""The joint objective of map and adapter (VFM, arXiv 2603.07276), summed over the state and the measurement.

    .. math:: \tfrac{1}{2 \tau^2} L_{MF} + \tfrac{1}{2 \sigma^2} \|y - A f(z)\|^2 + KL(q(z \mid y, c) \| N(0, I))

    z is drawn from the adapter by reparametrisation. The noise end of the MeanFlow path is that z with probability
    alpha, otherwise fresh noise, so that the map keeps its unconditional samples. Only L_MF trains the map: the
    observation term holds its weights fixed. With a reward r instead of problems, the observation term is
    -r(f(z)), and paths from the adapter's noise end in images drawn from the batch with weights e^r: pairing them with
    the unweighted batch would teach the map to undo the tilt. Batches must be large compared with the spread of e^r.

    A learned map does not reach every image. With ``model_error``, its own error, of variance delta^2 for each problem
    class, is added to the noise, and the observation term divides by sigma^2 + delta^2 (the approximation error of
    Kaipio and Somersalo 2007). delta^2 is estimated during training, by maximum likelihood. At the exact posterior it
    is zero, since (x, y) is then a joint draw and the mean squared residual is sigma^2. With sigma^2 alone, fitting a
    map that is still rough pins down the noise everywhere: residuals shrink, and so does the spread where y has no
    information. The drawback: delta^2 also includes the misfit of a diagonal Gaussian, which biases the mean towards
    the prior if the map itself is exact; it is therefore off by default.

    Args:
        prior: The map.
        adapter: The adapter.
        problems: Problem classes of the observations; each batch is split among them by their shares.
        reward: Instead of problems, a differentiable reward for any number of observations.
        settings: Weights of the terms; or its fields by name.
    """

    problems: tuple[TrainingProblem, ...]
    reward: Reward | None
    model_variance: Tensor

    def __init__(self, prior: NeuralFlowMap, adapter: Adapter, problems: Sequence[TrainingProblem] = (), *,
                 reward: Reward | None = None, settings: ObjectiveSettings | None = None, **changes: Any) -> None:
        super().__init__()
        own = dataclasses.replace(settings or ObjectiveSettings(), **changes)
        if own.score and reward is not None:
            raise ValueError("score compares samples with the observed truth, but a reward has none: pass problems")
        if bool(problems) == (reward is not None):
            raise ValueError("pass either problems to observe or one reward to align with")
        if own.consistency and not adapter.deviations:
            raise ValueError("consistency=True corrects samples by the adapter's deviations, but it has none: "
                             "train one with deviations=True, or adapter.grown(adapter.classes, {})")
        self.prior, self.adapter = prior.requires_grad_(not own.frozen), adapter.requires_grad_(True)
        # kept out of the module: their parameters are not trained, and this class moves them
        self.__dict__["problems"] = tuple(problems)
        self.__dict__["reward"] = reward
        self.settings = own
        if own.deviations_alone:
            _free_deviations(adapter)
        # for each problem class, NaN before the first batch; a buffer, so that checkpoints store it
        self.register_buffer("model_variance", torch.full((len(self.problems) if own.model_error else 0,), torch.nan))
        self.highest = max((p.levels[1] for p in problems), default=1.0) or LEAST_LEVEL

    def trained(self) -> dict[str, nn.Module]:
        """Map and adapter, or the adapter alone."""
        return {"adapter": self.adapter} if self.settings.frozen else {"map": self.prior, "adapter": self.adapter}

    def forward(self, data: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch of images ``(n, *image_shape)``, and its parts."""
        n, device, own = len(data), data.device, self.settings
        groups = self._observe(data, generator)
        mean, log_std, log_deviation, sigma = self._propose(groups, n, device)
        # an observation's weight may depend on the adapter's inputs, such as the noise level, without changing
        # the optimum; otherwise the gradients of the lowest levels, of size 1 / sigma, dominate all others
        if own.deviations_alone:
            return self._alone(mean.detach(), log_std.detach(), log_deviation, data, groups, generator)
        weight = with_axes((sigma / self.highest).clamp(min=LEAST_WEIGHT) ** own.level_power, mean.ndim)
        mean, log_std = scale_gradient(mean, weight), scale_gradient(log_std, weight)
        draws = 2 if own.score else 1
        noise = draw_noise((draws, *mean.shape), generator).to(mean)
        z = self.adapter.to_state((mean + log_std.exp() * noise).flatten(0, 1))
        kl = gaussian_kl(mean, log_std)
        objective = kl
        metrics = {"kl": kl.detach().mean(), "adapter_std": log_std.detach().exp().mean()}
        images = None
        if own.misfit or not own.joint:
            fixed = {k: p.detach() for k, p in self.prior.named_parameters()}
            states = torch.func.functional_call(self.prior, fixed, (z[:n] if own.joint else z, 0.0, 1.0))
            images = self.prior.decode(states)
        if own.misfit:
            assert images is not None
            misfit, reports = self._misfit(groups, images[:n])
            objective = objective + own.misfit * misfit
            metrics |= reports
        if own.score:
            pair = self.prior.decode(self.prior(z, 0.0, 1.0)) if own.joint or images is None else images
            score, further = self._score(pair.unflatten(0, (2, n)), data, groups, log_deviation, generator)
            objective = objective + score
            metrics |= further
        z = z[:n]
        if not own.frozen:
            flow, k = self._flow_loss(data, z, generator)
            objective = objective + flow / (2 * own.tau**2)
            per_value = flow.detach() / self.prior.dimension
            metrics |= {"flow_matching": per_value[k:].mean(), "meanflow": per_value[:k].mean()}
        return normalise(objective.mean()), metrics

    def _alone(self, mean: Tensor, log_std: Tensor, log_deviation: Tensor | None, data: Tensor,
               groups: list[tuple[Operator, Tensor, Tensor]],
               generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Score of corrected samples as a function of the deviations."""
        with torch.no_grad():
            noise = draw_noise((2, *mean.shape), generator).to(mean)
            z = self.adapter.to_state((mean + log_std.exp() * noise).flatten(0, 1))
            pair = self.prior.decode(self.prior(z, 0.0, 1.0)).unflatten(0, (2, len(mean)))
        score, reports = self._score(pair, data, groups, log_deviation, generator)
        return normalise(score.mean()), reports

    def _score(self, pair: Tensor, data: Tensor, groups: list[tuple[Operator, Tensor, Tensor]],
               log_deviation: Tensor | None, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted score of two samples ``(2, n, *image_shape)`` of each row, corrected on request; and reports."""
        own, extra, reports = self.settings, torch.zeros((), device=data.device), {}
        if own.consistency:
            assert log_deviation is not None
            apart = (pair[0] - pair[1]).detach()
            # the difference of two samples has twice their variance; bounded below to stay positive
            density = log_deviation - LOG_DEVIATION[0] + 0.25 * (apart * (-log_deviation).exp()).square()
            extra = DEVIATION_WEIGHT * density.flatten(1).sum(1)
            corrected = self._correct(pair, groups, log_deviation, generator)
            moved = (corrected - pair).detach().square().flatten(2).mean(2).sqrt().mean()
            reports = {"deviation": log_deviation.detach().exp().mean(), "correction": moved}
            pair = corrected
        score = (patch_score if own.patches else pair_score)(pair[0], pair[1], data)
        reports["energy" if own.patches else "crps"] = score.detach().mean() / math.prod(data.shape[1:])
        return own.score * score + extra, reports

    def _correct(self, pair: Tensor, groups: list[tuple[Operator, Tensor, Tensor]], log_deviation: Tensor,
                 generator: torch.Generator) -> Tensor:
        """Both samples of each row, corrected as in the solver."""
        counts, done = [len(y) for _, y, _ in groups], []
        variance = (2 * log_deviation.float()).exp()
        for (operator, y, sigma), x, spread in zip(groups, pair.split(counts, 1), variance.split(counts)):
            spread = spread * column(self._factors(operator, sigma), spread).square()
            twice = operator if operator.num_sets == 1 else operator.select(torch.arange(len(y)).repeat(2))
            noise = draw_noise((2 * len(y), *y.shape[1:]), generator).to(y)
            moved, _ = correct(twice, torch.cat([y, y]), sigma.repeat(2), x.flatten(0, 1).float(),
                               torch.cat([spread, spread]), noise)
            done.append(moved.unflatten(0, (2, len(y))))
        return torch.cat(done, dim=1)

    def _factors(self, operator: Operator, sigma: Tensor) -> Tensor:
        """Factors of the deviations, ``(n,)``: the adapter's; 0 for a class without correction."""
        if self.settings.deviations_alone or not self.adapter.consistency:
            return torch.ones_like(sigma)
        known = self.adapter.correction(str(operator.problem_class), sigma)
        return torch.zeros_like(sigma) if known is None else known

    def _observe(self, data: Tensor, generator: torch.Generator) -> list[tuple[Operator, Tensor, Tensor]]:
        """Assign rows to problem classes and draw operators, noise levels and measurements."""
        groups = []
        for problem, images in zip(self.problems, data.split(self._rows(len(data)))):
            operator = problem.operator.randomize(len(images), generator).to(data.device)
            sigma = problem.draw_sigma(len(images), generator).to(data.device)
            groups.append((operator, operator.measure(images, sigma, generator=generator), sigma))
        return groups

    def _rows(self, n: int) -> list[int]:
        """Number of rows of each problem out of n: by their shares, at least one."""
        if not self.problems:
            return [n]
        if n < len(self.problems):
            raise ValueError(f"a batch of {n} has no row for each of {len(self.problems)} problems: raise batch_size")
        shares = torch.tensor([problem.share for problem in self.problems], dtype=torch.float64)

        def split(rows: int) -> Tensor:
            ends = (shares.cumsum(0) / shares.sum() * rows).round().long()
            return ends.diff(prepend=ends.new_zeros(1))

        counts = split(n)
        if bool((counts < 1).any()):
            counts = 1 + split(n - len(shares))
        return [int(count) for count in counts]

    def _propose(self, groups: list[tuple[Operator, Tensor, Tensor]], n: int,
                 device: torch.device) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """The adapter's mean, log standard deviation and log deviation for all rows, and their noise levels."""
        if not groups:
            embedded, observed, summary, sigma = (a.to(device) for a in self.adapter.unconditional(n))
            classes = torch.zeros(n, dtype=torch.long, device=device)
            return *self.adapter.outputs(embedded, observed, summary, classes, sigma), sigma
        parts: list[tuple[Tensor, ...]] = []
        for operator, y, level in groups:
            index = self.adapter.classes.index(str(operator.problem_class))
            told = self.adapter.nearest_level(str(operator.problem_class), level)
            parts.append((*self.adapter.observe(operator, y, told), torch.full((len(y),), index, device=device)))
        embedded, observed, summary, told, classes = (torch.cat(column) for column in zip(*parts))
        sigma = torch.cat([level for _, _, level in groups])
        return *self.adapter.outputs(embedded, observed, summary, classes, told), sigma

    def _misfit(self, groups: list[tuple[Operator, Tensor, Tensor]],
                images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """``|y - A x|^2 / (2 (sigma^2 + delta^2))`` of each row, or minus the reward; and numbers to report."""
        if self.reward is not None:
            return -self.reward(images[None])[0], {}
        misfit, misfit_in_sigma = [], []
        for c, ((operator, y, sigma), x) in enumerate(zip(groups, images.split([len(y) for _, y, _ in groups]))):
            # unobserved entries are zero on both sides
            square = (y - operator(x)).flatten(1).square().sum(dim=1)
            count = num_values(operator, y)
            # without noise the weight of an error would be unbounded
            variance = sigma.clamp(min=LEAST_LEVEL if self.problems[c].levels[0] == 0 else 0.0) ** 2
            misfit_in_sigma.append(square.detach() / count / variance)
            if self.settings.model_error:
                variance = variance + self._model_variance(c, square.detach(), count, variance)
            misfit.append(0.5 * square / variance)
        reports = {"misfit": torch.cat(misfit_in_sigma).mean()}
        if self.settings.model_error:
            reports["model_error"] = self.model_variance.mean().sqrt()
        return torch.cat(misfit), reports

    @torch.no_grad()
    def _model_variance(self, c: int, square: Tensor, count: Tensor, noise_variance: Tensor) -> Tensor:
        """Delta^2 of a problem class after a step of Fisher scoring on this batch (0-d)."""
        old = self.model_variance[c]
        start = torch.isnan(old)
        weight = count / (noise_variance + torch.where(start, 1.0, old)) ** 2
        now = (weight * (square / count - noise_variance)).sum() / weight.sum()
        self.model_variance[c] = torch.where(start, now, torch.lerp(old, now, MODEL_ERROR_RATE)).clamp(min=0.0)
        return self.model_variance[c].clone()

    def _flow_loss(self, data: Tensor, z: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
        states = self.prior.encode(data)
        fresh = draw_noise(tuple(states.shape), generator).to(states)
        joint = torch.rand(len(states), generator=generator, device=generator.device) < self.settings.alpha
        joint = joint.to(states.device)
        joint = with_axes(joint, states.ndim)
        if self.reward is not None:
            # an observation pairs its noise with its own image; a reward has no such image, and its noise is paired
            # with images of the tilted law, drawn from the batch with weights e^r
            with torch.no_grad():
                weights = self.reward(data[None])[0].float().softmax(dim=0)
            rows = torch.multinomial(weights.to(generator.device), len(states), replacement=True, generator=generator)
            states = torch.where(joint, states[rows.to(states.device)], states)
        noise = torch.where(joint, z, fresh)
        # rows are ordered by problem class and times by kind: shuffle them
        order = torch.randperm(len(states), generator=generator, device=generator.device).to(states.device)
        s, t, k = sample_times(len(states), distinct=self.settings.distinct, one_step=self.settings.one_step,
                               generator=generator, device=states.device)
        middle = (sample_between(s, t, generator),) if self.settings.tangent == "semigroup" else ()
        return meanflow_loss(self.prior.average_velocity, noise[order], states[order], s, t, k, *middle,
                             tangent=self.settings.tangent), k


def _free_deviations(adapter: Adapter) -> None:
    """Train only the rows of the last layer that produce the deviations."""
    adapter.requires_grad_(False)
    last = [layer for layer in adapter.network.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))][-1]
    channels = 2 * adapter.state_shape[0] + adapter.image_shape[0]
    own = len(last.weight) // channels * 2 * adapter.state_shape[0]
    for p in last.parameters():
        p.requires_grad_().register_hook(
            lambda gradient: torch.cat([torch.zeros_like(gradient[:own]), gradient[own:]]))


def num_values(operator: Operator, y: Tensor) -> Tensor:
    """Number of observed values in each measurement, ``(n,)``."""
    observed = operator.observed()
    if observed is None:
        return torch.full((len(y),), float(math.prod(y.shape[1:])), device=y.device)
    return observed.flatten(1).sum(dim=1).expand(len(y)).to(y)
