"""A correct plug-in of each kind passes its check, and each broken variant is detected by name."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import invflow
from invflow import NFE, FlowMap, Operator, Posterior, Problem, Reward, Solver
from invflow._core.random import as_generator, draw_noise
from invflow.flowmap import expand_time
from invflow.likelihood import Likelihood
from invflow.operators import Denoising
from invflow.testing import check_flow_map, check_operator, check_problem, check_reward, check_solver

SHAPE = (1, 8, 8)
F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- operators -----------------------------------------------------------------------------------------------------


class Echo(Operator):
    """Each image plus half of itself moved by one column, times a gain of its own."""

    gain: Tensor

    def __init__(self, image_shape: tuple[int, ...] = SHAPE, gain: Tensor | None = None) -> None:
        super().__init__()
        self.image_shape = self.measurement_shape = tuple(image_shape)
        self.register_sets(gain=torch.ones(1, 1, 1, 1) if gain is None else gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain.to(x) * (x + 0.5 * x.roll(1, -1))

    def adjoint(self, y: Tensor) -> Tensor:
        y = self.gain.to(y) * y
        return y + 0.5 * y.roll(-1, -1)

    def randomize(self, n: int, generator: torch.Generator | None = None) -> Operator:
        return type(self)(self.image_shape, 0.5 + torch.rand(n, 1, 1, 1, generator=as_generator(generator)))


class WrongAdjoint(Echo):
    def adjoint(self, y: Tensor) -> Tensor:
        return self(y)


class TwiceTheAdjoint(Echo):
    def adjoint(self, y: Tensor) -> Tensor:
        return 2 * super().adjoint(y)


class Affine(Echo):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1


class Clipped(Echo):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(max=1.0)


class ScaledByTheBatch(Echo):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / x.amax()


class SeedsTorch(Echo):
    def randomize(self, n: int, generator: torch.Generator | None = None) -> Operator:
        torch.manual_seed(0)
        return super().randomize(n, generator)


class DrawsFromNumpy(Echo):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * float(np.random.rand())  # noqa: NPY002


class DrawsFromPython(Echo):
    def embed(self, y: Tensor) -> Tensor:
        return self.adjoint(y) * (1 + 0 * random.random())


class OneSeedForAll(Echo):
    def randomize(self, n: int, generator: torch.Generator | None = None) -> Operator:
        return super().randomize(n, seeded(7))


class CountsItsDraws(Echo):
    draws = 0

    def randomize(self, n: int, generator: torch.Generator | None = None) -> Operator:
        self.draws = self.draws + 1
        return super().randomize(n, generator)

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.draws = 0


class RemembersItsUses(Echo):
    """State that is no tensor and no plain number: only what it does tells."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.state = {"uses": 0}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + 0.01 * self.state["uses"])

    def adjoint(self, y: Tensor) -> Tensor:
        return super().adjoint(y) * (1 + 0.01 * self.state["uses"])

    def randomize(self, n: int, generator: torch.Generator | None = None) -> Operator:
        self.state["uses"] += 1
        return super().randomize(n, generator)


class Tiled(Echo):
    def expand(self, k: int) -> Operator:
        return self if self.num_sets == 1 else self._with_sets({"gain": self.gain.repeat(k, 1, 1, 1)})


class ThroughNumpy(Operator):
    """No adjoint either: the default one needs the gradient."""

    image_shape = measurement_shape = SHAPE

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(np.flip(x.numpy(), -1).copy())


class WithoutGradient(Echo):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class Unfinished(Operator):
    image_shape = measurement_shape = SHAPE


class OtherSize(Echo):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., 1:]


OPERATORS = [
    (WrongAdjoint, r"<A x, y> = .* but <x, A' y> = .*not the transpose of forward: remove it"),
    (TwiceTheAdjoint, r"not the transpose of forward but 2 times it: a factor is missing"),
    (Affine, r"affine: a black image gives 1\.00e-01"),
    (Clipped, "declares that it is linear: look for clipping"),
    (ScaledByTheBatch, r"row \d alone.*relative difference.*over the batch axis"),
    (SeedsTorch, "global random state, torch's"),
    (DrawsFromNumpy, "global random state, numpy's"),
    (DrawsFromPython, "global random state, Python's"),
    (OneSeedForAll, "same parameters for two generator seeds"),
    (CountsItsDraws, r"\['draws'\] changed in randomize.*must not change in use"),
    (RemembersItsUses, r"before and after randomize.*relative difference.*must not change in use"),
    (Tiled, r"repeat_interleave, a a b b, not a b a b \(repeat\)"),
    (ThroughNumpy, r"leaves torch for NumPy, where no gradient can follow.*compute its matrix once"),
    (WithoutGradient, "forward carries no gradient in x.*differentiate"),
    (Unfinished, r"TypeError: Unfinished does not define forward\(x\)"),
    (OtherSize, r"returned \(1, 1, 8, 7\).*expected a tensor \(n, \*measurement_shape\) = \(1, 1, 8, 8\)"),
]


# -- flow maps -----------------------------------------------------------------------------------------------------


class TwoTone(FlowMap):
    """The flow to states N(mean, 0.3^2) with mean 0.8 and -0.4; images are (state + 1) / 2."""

    state_shape = image_shape = (2,)
    decode_affine = (0.5, 0.5)  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.8, -0.4], dtype=F64))

    def spread(self, t: Tensor) -> Tensor:
        return ((1 - t) ** 2 + (0.3 * t) ** 2).sqrt()

    def velocity(self, x: Tensor, t: Any) -> Tensor:
        t = expand_time(t, x)
        return self.mean + (x - t * self.mean) * (0.09 * t - (1 - t)) / self.spread(t) ** 2

    def jump(self, x: Tensor, s: Any, t: Any) -> Tensor:
        s, t = expand_time(s, x), expand_time(t, x)
        return t * self.mean + (x - s * self.mean) * self.spread(t) / self.spread(s)


class DataAtZero(TwoTone):
    """Right within itself, in the other convention: x_t = (1 - t) m + t z."""

    def velocity(self, x: Tensor, t: Any) -> Tensor:
        return -super().velocity(x, 1 - expand_time(t, x).flatten())

    def jump(self, x: Tensor, s: Any, t: Any) -> Tensor:
        return super().jump(x, 1 - expand_time(s, x).flatten(), 1 - expand_time(t, x).flatten())


class Backwards(TwoTone):
    def velocity(self, x: Tensor, t: Any) -> Tensor:
        return -super().velocity(x, t)


class BrokenSemigroup(TwoTone):
    """Starts along the velocity; two jumps are not one."""

    def jump(self, x: Tensor, s: Any, t: Any) -> Tensor:
        return super().jump(x, s, t) + 0.2 * (expand_time(t, x) - expand_time(s, x)) ** 2 * x


class EncodesNothing(TwoTone):
    def encode(self, image: Tensor) -> Tensor:
        return image


class DenoisesImages(TwoTone):
    def denoise(self, x: Tensor, t: Any) -> Tensor:
        return self.decode(super().denoise(x, t))


class NormalisesTheBatch(TwoTone):
    def velocity(self, x: Tensor, t: Any) -> Tensor:
        return super().velocity(x - 0.05 * x.mean(0), t)


class DividesByZero(TwoTone):
    def velocity(self, x: Tensor, t: Any) -> Tensor:
        left = 1 - expand_time(t, x)
        return (x + left * super().velocity(x, t) - x) / left


class OwnNoise(TwoTone):
    def noise(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        return torch.randn(n, *self.state_shape, dtype=F64)


class TimesInThousands(TwoTone):
    def velocity(self, x: Tensor, t: Any) -> Tensor:
        return super().velocity(x, t / 1000)

    def jump(self, x: Tensor, s: Any, t: Any) -> Tensor:
        return super().jump(x, s / 1000, t / 1000)


FLOW_MAPS = [
    (DataAtZero, r"score at t = 0.5 averages .* expected 0\. .*Is its time reversed"),
    (Backwards, "against velocity.*relative difference.*direction of time"),
    (BrokenSemigroup, r"two jumps .* against one.*semigroup"),
    (EncodesNothing, r"encode\(decode\(x\)\) against x.*encode must invert decode"),
    (DenoisesImages, r"denoise\(x, t\) against .*a denoiser of images"),
    (NormalisesTheBatch, "a batch against its single rows.*Rows of a batch are not independent"),
    (DividesByZero, "not finite: a formula that divides by t or 1 - t"),
    (OwnNoise, "TwoTone.noise|OwnNoise.noise changed the global random state"),
    (TimesInThousands, r"against velocity|in other units"),
]


# -- rewards -------------------------------------------------------------------------------------------------------


class Brightness(Reward):
    def __call__(self, x: Tensor) -> Tensor:
        return -(x.flatten(2).mean(2) - 0.5).square()


class Measured(Likelihood):
    """Gaussian noise whose level grows with the clean measurement, 0.1 + 0.2 clean."""

    def level(self, clean: Tensor) -> Tensor:
        return 0.1 + 0.2 * clean

    def log_density(self, y: Tensor, clean: Tensor) -> Tensor:
        sigma = self.level(clean)
        return -0.5 * ((y - clean) / sigma).square() - sigma.log() - 0.5 * math.log(2 * math.pi)

    def draw(self, clean: Tensor, generator: torch.Generator | None) -> Tensor:
        return clean + self.level(clean) * draw_noise(tuple(clean.shape), generator).to(clean)


class Averaged(Measured):
    def _sum_observed(self, terms: Tensor) -> Tensor:
        return terms.flatten(2).mean(2)


class Unnormalised(Measured):
    def log_density(self, y: Tensor, clean: Tensor) -> Tensor:
        return -0.5 * ((y - clean) / self.level(clean)).square()


class NoHalf(Measured):
    def log_density(self, y: Tensor, clean: Tensor) -> Tensor:
        sigma = self.level(clean)
        return -((y - clean) / sigma).square() - sigma.log() - 0.5 * math.log(math.pi)


class SimulatesOtherNoise(Measured):
    def draw(self, clean: Tensor, generator: torch.Generator | None) -> Tensor:
        return clean + 0.2 * draw_noise(tuple(clean.shape), generator).to(clean)


class SimulatesAnOffset(Measured):
    def draw(self, clean: Tensor, generator: torch.Generator | None) -> Tensor:
        return super().draw(clean, generator) + 0.02


class MixesObservations(Measured):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) - super().__call__(x).mean(0)


class MixesParticles(Brightness):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x).log_softmax(1)


class SelectsNothing(Measured):
    def select(self, index: Any) -> Likelihood:
        other = copy.copy(super().select(index))
        other.y = self.y[: len(other.y)]
        return other


class SimulatesAlike(Measured):
    def draw(self, clean: Tensor, generator: torch.Generator | None) -> Tensor:
        return super().draw(clean, seeded(3))


class HalfAGradient(Brightness):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(0.5 * x + 0.5 * x.detach())


class Dropout(Brightness):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(torch.nn.functional.dropout(x, 0.1))


def reward(kind: type[Reward]) -> Reward:
    if not issubclass(kind, Likelihood):
        return kind()
    y = Echo()(torch.rand(3, *SHAPE, generator=seeded(1), dtype=F64))
    return kind(Echo(), y)


REWARDS = [
    (Averaged, "averaged over the 64 observed entries, a mean instead of a sum"),
    (Unnormalised, r"sums to .* but a density integrates to one.*not normalised"),
    (NoHalf, r"simulate does not draw from the density.*the score is about (1\.9|2\.0)\d* times a log density"),
    (SimulatesOtherNoise,
     r"entries of a measurement, (bright|dark) ones.*simulate does not draw from the density.*standard deviation"),
    (SimulatesAnOffset, r"simulate does not draw from the density that the score states.*look for an offset"),
    (MixesObservations, "scores of observation 0 before and after the images of the other.*mixes observations"),
    (MixesParticles, "particle 1 alone.*must not depend on the other images"),
    (SelectsNothing, r"select\(.*must keep the order of its index"),
    (SimulatesAlike, "simulate gave the same draws for two generator seeds"),
    (HalfAGradient, "finite differences.*relative difference 5"),
    (Dropout, "same images again.*deterministic"),
]


# -- solvers -------------------------------------------------------------------------------------------------------


class Importance(Solver):
    """Draws of the prior, weighted by the likelihood: they converge as the number of draws grows."""

    chunk_size: int | None = None  # as the library's own solvers have it

    def __init__(self, prior: FlowMap) -> None:
        self.prior = prior

    def draw(self, count: int, n: int, generator: torch.Generator | None) -> Tensor:
        return self.prior.generate(count * n, generator=generator).unflatten(0, (count, n))

    def sample(self, reward: Reward, num_samples: int, *, generator: torch.Generator | None = None,
               progress: bool = False) -> Posterior:
        count = reward.num_observations or 1
        with self.prior.count() as calls:
            x = self.draw(count, num_samples, generator)
        log_weights = reward(x)
        made = count * num_samples
        return Posterior(x, log_weights, log_weights.logsumexp(1) - math.log(num_samples), seconds=1e-3,
                         nfe=NFE(calls.forward / made, calls.backward / made))

    def prior_samples(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        return self.prior.generate(n, generator=generator)


class SeedsTheWorld(Importance):
    def draw(self, count: int, n: int, generator: torch.Generator | None) -> Tensor:
        torch.manual_seed(0)
        return super().draw(count, n, generator)


class DrawsFromTheWorld(Importance):
    def draw(self, count: int, n: int, generator: torch.Generator | None) -> Tensor:
        own = torch.Generator()
        own.seed()
        return super().draw(count, n, own)


class ParticlesFirst(Importance):
    def sample(self, reward: Reward, num_samples: int, **options: Any) -> Posterior:
        posterior = super().sample(reward, num_samples, **options)
        return Posterior(posterior.samples.transpose(0, 1), seconds=1e-3, nfe=posterior.nfe)


class WeightsThatDoNotSumToOne(Importance):
    def sample(self, reward: Reward, num_samples: int, **options: Any) -> Posterior:
        posterior = super().sample(reward, num_samples, **options)
        posterior.log_weights = posterior.log_weights + math.log(num_samples)
        return posterior


class DrawsInChunks(Importance):
    def draw(self, count: int, n: int, generator: torch.Generator | None) -> Tensor:
        at_a_time = self.chunk_size or 1000
        sizes = [min(at_a_time, n - start) for start in range(0, n, at_a_time)]
        return torch.cat([super(DrawsInChunks, self).draw(count, size, generator) for size in sizes], 1)


class WeighsAcrossObservations(Importance):
    def sample(self, reward: Reward, num_samples: int, **options: Any) -> Posterior:
        posterior = super().sample(reward, num_samples, **options)
        temperature = 1 / (1 + posterior.log_evidence.var())  # type: ignore[union-attr]
        return Posterior(posterior.samples, temperature * posterior.log_weights, seconds=1e-3, nfe=posterior.nfe)


class StartsWhereItStopped(Importance):
    last: Tensor | None = None

    def draw(self, count: int, n: int, generator: torch.Generator | None) -> Tensor:
        x = super().draw(count, n, generator)
        self.last, before = x, self.last
        return x if before is None or before.shape != x.shape else x + 0.01 * before


class FreeOfCharge(Importance):
    def sample(self, reward: Reward, num_samples: int, **options: Any) -> Posterior:
        posterior = super().sample(reward, num_samples, **options)
        posterior.nfe = NFE()
        return posterior


class WritesTheMeasurement(Importance):
    def sample(self, reward: Reward, num_samples: int, **options: Any) -> Posterior:
        posterior = super().sample(reward, num_samples, **options)
        reward.y.clamp_(0, 1)  # type: ignore[attr-defined]
        return posterior


class Tempered(Importance):
    def sample(self, reward: Reward, num_samples: int, **options: Any) -> Posterior:
        return super().sample(0.5 * reward, num_samples, **options)


class PriorOnly(Importance):
    def sample(self, reward: Reward, num_samples: int, **options: Any) -> Posterior:
        posterior = super().sample(reward, num_samples, **options)
        return Posterior(posterior.samples, seconds=1e-3, nfe=posterior.nfe)


SOLVERS = [
    (SeedsTheWorld, "SeedsTheWorld.sample changed the global random state, torch's"),
    (DrawsFromTheWorld, "same seed gave other samples, by .* draw all random numbers from the generator"),
    (ParticlesFirst, r"samples have shape \(500, 3, 2\), expected \(B, N, \*image_shape\) = \(3, 500, 2\)"),
    (WeightsThatDoNotSumToOne, "weights .* of an observation sum to 500, expected 1"),
    (DrawsInChunks, "samples with chunk_size 166 against the default.*all .B, N. at once"),
    (WeighsAcrossObservations, "weights of observation 0 before and after.*across observations"),
    (StartsWhereItStopped, "the solver keeps state between calls"),
    (FreeOfCharge, r"nfe states 0 forward, 0 backward, but [1-9]\d* forward"),
    (WritesTheMeasurement, "modified the measurement likelihood.y: work on a copy"),
    (Tempered, r"posterior mean: off by .* standard errors.*normalisation of the likelihood"),
    (PriorOnly, "posterior mean of an observation did not change with its measurement: is y used"),
]


# -- problems ------------------------------------------------------------------------------------------------------


def waves(n: int, generator: torch.Generator) -> Tensor:
    phase = torch.rand(n, 1, 1, 1, generator=generator) + torch.linspace(0, 2, 8)
    return 0.5 + 0.5 * torch.sin(2 * math.pi * phase).expand(n, *SHAPE)


def gaussians(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 2, generator=generator)


def stills(split: str) -> Tensor:
    return waves(6, seeded(1 if split == "test" else 2))


class Louder(Problem):
    """Twice the noise that the likelihood states."""

    def simulate(self, num_observations: int, **options: Any) -> tuple[Any, Any]:
        truth, likelihood = super().simulate(num_observations, **options)
        y = 2 * likelihood.y - likelihood.operator(truth)
        return truth, invflow.GaussianLikelihood(likelihood.operator, y, likelihood.sigma)


class OneSetForAll(Problem):
    def simulate(self, num_observations: int, *, generator: Any = None, **options: Any) -> tuple[Any, Any]:
        self.operator = self.operator.randomize(1, generator)
        self.random = False
        answer = super().simulate(num_observations, generator=generator, **options)
        self.random = True
        return answer


class TurnsItsOperator(Problem):
    def simulate(self, num_observations: int, **options: Any) -> tuple[Any, Any]:
        self.operator.gain.mul_(1.01)
        answer = super().simulate(num_observations, **options)
        self.operator.gain.div_(1.01).mul_(1.0 if num_observations > 3 else 1.001)
        return answer


class NarrowPosterior(invflow.ExactPosterior):
    def sample(self, reward: Reward, num_samples: int, **options: Any) -> Posterior:
        samples = super().sample(reward, num_samples, **options).samples
        mean = samples.mean(1, keepdim=True)
        return Posterior(mean + 0.7 * (samples - mean))


def problem(kind: type[Problem] = Problem, **changes: Any) -> Problem:
    return kind("mine", None, **{"operator": Echo(), "sigma": 0.1, "sampler": waves, **changes})


def toy(**changes: Any) -> Problem:
    prior = invflow.GaussianMixtureFlow(torch.zeros(1, 2), std=1.0)
    return problem(operator=Denoising((2,)), sampler=gaussians, prior=lambda: prior, **changes)


PROBLEMS = [
    ("louder", lambda: problem(Louder), r"residuals of the truth average 4\.\d+ sigma\^2.*2(\.\d+)? times the level"),
    ("global-truths", lambda: problem(sampler=lambda n, g: torch.rand(n, *SHAPE)), "global random state|other draws"),
    ("bytes", lambda: problem(sampler=lambda n, g: 255 * waves(n, g)), r"images lie in \[.*not in \[0, 1\]"),
    ("one-set", lambda: problem(OneSetForAll, random=True), "random, but has 1 parameter sets for 20 observations"),
    ("turns-operator", lambda: problem(TurnsItsOperator), "must not change in use|other draws"),
    ("narrow", lambda: toy(exact=lambda: NarrowPosterior(invflow.GaussianMixtureFlow(torch.zeros(1, 2), std=1.0))),
     r"intervals .* contain the truth in 0\.\d+ of cases: it is not the posterior"),
    ("same-images", lambda: problem(sampler=None, images=lambda split: stills("test")),
     "6 validation images are also test images"),
]


# -- all of them ---------------------------------------------------------------------------------------------------


def test_the_right_ones_pass() -> None:
    check_operator(Echo)
    check_flow_map(TwoTone)
    check_reward(Brightness(), SHAPE)
    check_reward(reward(Measured))
    check_solver(Importance, num_samples=500)
    check_problem(problem())
    check_problem(problem(random=True, sampler=None, images=stills))
    check_problem(toy())


CASES = [
    *(pytest.param(lambda k=kind: check_operator(k), words, id=kind.__name__) for kind, words in OPERATORS),
    *(pytest.param(lambda k=kind: check_flow_map(k), words, id=kind.__name__) for kind, words in FLOW_MAPS),
    *(pytest.param(lambda k=kind: check_reward(reward(k), SHAPE), words, id=kind.__name__) for kind, words in REWARDS),
    *(pytest.param(lambda k=kind: check_solver(k, num_samples=500), words, id=kind.__name__)
      for kind, words in SOLVERS),
    *(pytest.param(lambda m=make: check_problem(m()), words, id=name) for name, make, words in PROBLEMS),
]


@pytest.mark.filterwarnings("ignore:.*looks like .0, 255.")
@pytest.mark.parametrize(("check", "words"), CASES)
def test_is_caught_and_named(check: Any, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check()


def test_a_learned_map_in_the_other_time_is_caught_by_images() -> None:
    """A learned map keeps no semigroup, and no law that it makes: data tell the direction of its time."""
    prior = TwoTone()
    images = prior.decode(prior.jump(torch.randn(64, 2, generator=seeded(), dtype=F64), 0.0, 1.0))
    check_flow_map(prior, exact=False, images=images)
    check_flow_map(DataAtZero, exact=False)
    with pytest.raises(AssertionError, match=r"best with time reversed, -v\(x, 1 - t\).*reverse it where the network"):
        check_flow_map(DataAtZero, exact=False, images=images)
    with pytest.raises(AssertionError, match=r"explains nothing|best with"):
        check_flow_map(prior, exact=False, images=20 * images - 10)
    with pytest.raises(ValueError, match=r"\(n, 2\) with n at least 16"):
        check_flow_map(prior, exact=False, images=images[:4])


@pytest.mark.parametrize("seed_first", [torch.manual_seed, np.random.seed, random.seed])
def test_a_hidden_seed_is_caught_even_where_the_test_has_just_set_the_same(seed_first: Any) -> None:
    class Hidden(Echo):
        def forward(self, x: Tensor) -> Tensor:
            seed_first(0)
            return super().forward(x)

    seed_first(0)
    before = torch.random.get_rng_state(), random.getstate()
    with pytest.raises(AssertionError, match="global random state"):
        check_operator(Hidden)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == random.getstate()
