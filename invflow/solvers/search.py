"""Search for images of high reward at a stated budget of calls: optimisation, not posterior sampling."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from invflow._core.chunks import ChunkSize, check_chunk_size
from invflow._core.random import as_generator
from invflow._core.shapes import with_axes
from invflow.flowmap import FlowMap, check_prior, rows_at_a_time
from invflow.posterior import Posterior
from invflow.reward import Reward
from invflow.smc import count_distinct
from invflow.solver import Solver, plain
from invflow.solvers.finite import not_finite
from invflow.solvers.tilting.cost import JumpCalls, path_calls
from invflow.solvers.tilting.fmtt import FMTT
from invflow.solvers.tilting.look_ahead import Look
from invflow.solvers.tilting.particles import Chunk, FMTTState, first_bad, make_chunks, over_chunks
from invflow.solvers.tilting.schedules import Grid
from invflow.solvers.tilting.selection import BestGoOn

__all__ = ["BeamSearch", "BestOfN", "SearchState", "TopKSearch"]


@dataclass(frozen=True)
class SearchState:
    """State of a search after a round.

    Attributes:
        step: Number of rounds done, from 1.
        time: Time from which the look-ahead images were predicted.
        images: Images ``(B, N, *image_shape)``.
        rewards: Their rewards, ``(B, N)``.
        ancestors: Index of each image's ancestor among the first N, ``(B, N)``.
    """

    step: int
    time: float
    images: Tensor
    rewards: Tensor
    ancestors: Tensor


class SearchSolver(Solver):
    """Base class of searches: holds the budget and marks the result as a search.

    A subclass defines :meth:`iterate`, whose last state is returned.
    """

    prior: FlowMap
    _derived = frozenset({"_jumps"})

    def __init__(self, prior: FlowMap, budget: int, chunk_size: int | None) -> None:
        check_prior(type(self).__name__, prior)
        if budget < 1 or budget != int(budget):
            raise ValueError(f"budget={budget} must be a whole number of calls per sample, at least 1")
        self.prior, self.budget, self.chunk_size = prior, int(budget), check_chunk_size(chunk_size)
        self._jumps = JumpCalls(prior)

    def _size(self) -> ChunkSize:
        return ChunkSize(rows_at_a_time(self.chunk_size, self.prior), type(self).__name__)

    @abstractmethod
    def iterate(self, reward: Reward, num_samples: int, *,
                generator: torch.Generator | int | None = None) -> Iterator[SearchState]:
        """Yield the images after each round of the search; :meth:`sample` is a loop over it.

        Args:
            reward: A reward over B observations; one without observations of its own means B = 1.
            num_samples: N, the number of images for each observation.
            generator: Generator for all random numbers.
        """

    def _sample(self, reward: Reward, n: int, generator: torch.Generator, progress: bool) -> Posterior:
        """Search for images of high reward; see :meth:`Solver.sample`. They are no posterior samples at any budget.

        Returns:
            Samples without weights or evidence. ``diagnostics`` holds ``kind``, "search"; ``reward`` ``(B, N)``;
            ``reward_path`` ``(B, rounds)``, the mean reward after each round, and ``calls_path``, the calls per
            sample up to then; ``budget`` and ``calls``, the calls used, forward and backward together, at most the
            budget; ``distinct_ancestors`` ``(B,)``.

        Raises:
            ValueError: If the budget is too small (the message has the smallest possible one), or a reward is NaN.
        """
        from tqdm import tqdm

        rewards, spent = [], []
        rows = n * (reward.num_observations or 1)
        rounds = self.iterate(reward, n, generator=generator)
        with self.prior.count() as calls:
            for state in tqdm(rounds, disable=not progress, desc=type(self).__name__, unit="round", delay=2):
                rewards.append(state.rewards.mean(1))
                spent.append((calls.forward + calls.backward) / rows)
        diagnostics = {"kind": "search", "reward": state.rewards, "reward_path": torch.stack(rewards, 1),
                       "calls_path": spent, "budget": self.budget, "calls": spent[-1],
                       "distinct_ancestors": count_distinct(state.ancestors)}
        return Posterior(state.images, diagnostics=diagnostics, settings={"kind": "search"})


class BestOfN(SearchSolver):
    """Best of N: each sample is the best of as many prior draws as the budget allows. Optimisation, not sampling.

    With ``selections=1`` the candidates are independent draws of the prior. More selections divide the budget among
    rounds along the path, t = 0, 1/R, ... (**multi-best-of-N**, the searches of arXiv 2511.22688, which gives no code;
    this implementation is our reading): each round adds new noise to the best image so far, back to time t, looks ahead
    from there with the flow map, and keeps the best image. The samples have separate searches, so they are independent.

    Args:
        prior: The flow map.
        budget: Calls per sample, over all rounds.
        selections: R, the number of rounds.
        steps: Number of jumps of the flow map to the image of a candidate.
        chunk_size: Number of rows through the map at a time; None for 256 on a CPU, and as many as fit on a GPU.

    Raises:
        TypeError: If the prior is not a flow map.
        ValueError: If the budget does not allow one candidate in each round, or a setting is out of range.

    Example:
        >>> import torch, invflow
        >>> prior = invflow.GaussianMixtureFlow(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), std=0.5, steps=2)
        >>> right = invflow.FunctionReward(lambda x: x[:, 0])
        >>> best = invflow.BestOfN(prior, budget=200).sample(right, 4, generator=torch.Generator().manual_seed(0))
        >>> best.settings["kind"], best.ess()
        ('search', None)
    """

    #: whether the samples of an observation compete with each other
    shared = False

    def __init__(self, prior: FlowMap, *, budget: int = 64, selections: int = 1, steps: int = 1,
                 chunk_size: int | None = None) -> None:
        super().__init__(prior, budget, chunk_size)
        if selections < 1 or steps < 1:
            raise ValueError(f"selections={selections} and steps={steps} must be at least 1")
        self.rounds = self.selections = selections
        self.steps = steps
        cost = self._cost(selections)
        self.candidates = self.budget // cost
        if self.candidates < 1:
            raise ValueError(f"a budget of {budget} calls is too small for {selections} selections of one candidate, "
                             f"{cost} calls: pass budget={cost} or more, or fewer selections")

    def _cost(self, rounds: int) -> int:
        """Calls of one candidate in each of ``rounds`` rounds."""
        return sum(self._jumps.look(k / rounds, self.steps)[0] for k in range(rounds))

    def prior_samples(self, n: int, *, generator: torch.Generator | int | None = None) -> Tensor:
        """Draw from the law of a single candidate of the first round, ``(n, *image_shape)``."""
        return self.prior.generate(n, self.steps, generator=generator, chunk_size=self._size().rows)

    @torch.no_grad()
    def iterate(self, reward: Reward, num_samples: int, *,
                generator: torch.Generator | int | None = None) -> Iterator[SearchState]:
        """Yield the best images after each round; see :meth:`SearchSolver.iterate`."""
        generator, reward = as_generator(generator), reward.to(self.prior.device)
        shape = (reward.num_observations or 1, num_samples)
        size = self._size()
        chunks = make_chunks(reward, *shape, size.rows)
        best: tuple[Tensor, Tensor, Tensor] | None = None  # data states, rewards and ancestors, each (B, N, ...)
        for k in range(self.rounds):
            t, parents = k / self.rounds, best
            for _ in range(self.candidates):
                x = (1 - t) * self.prior.noise(shape[0] * num_samples, generator=generator)
                if parents is not None:
                    x = x + t * parents[0].flatten(0, 1)
                pieces = zip(*over_chunks(chunks, size, partial(self._try, x, k, shape[1])))
                landed, scores = (torch.cat(piece).unflatten(0, shape) for piece in pieces)
                lineage = torch.arange(num_samples, device=scores.device).expand(shape)
                tried = (landed, scores, lineage if parents is None else parents[2])
                best = tried if best is None else self._merge(best, tried)
            assert best is not None
            images = size.map(self.prior.decode, best[0].flatten(0, 1))
            yield SearchState(k + 1, t, images.unflatten(0, shape), best[1], best[2])

    def _try(self, states: Tensor, k: int, count: int, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Data states reached from a chunk of the states of round k, and their rewards."""
        x, t = states[chunk.rows], k / self.rounds
        for i in range(self.steps):
            x = self.prior.jump(x, t + (1 - t) * i / self.steps, t + (1 - t) * (i + 1) / self.steps)
        value = chunk.reward(self.prior.decode(x).unflatten(0, chunk.shape)).flatten()
        bad = first_bad(Look(value, x), states[chunk.rows])
        if bad is not None:
            raise not_finite(type(self).__name__, bad[0], f"step {k + 1} of {self.rounds} (t = {t:.4g})",
                             *divmod(chunk.rows.start + bad[1], count))
        return x, value

    def _merge(self, best: tuple[Tensor, ...], tried: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """The better of the two images at each place."""
        better = tried[1] > best[1]
        one, two, three = (torch.where(with_axes(better, new.ndim), new, old)
                           for new, old in zip(tried, best))
        return one, two, three


class BeamSearch(BestOfN):
    """Beam search: N beams branch along the path, and the N best of all branches continue. Optimisation, not sampling.

    At each of the times 0, 1/R, 2/R, ... every beam branches: new noise takes its image back to that time, the flow
    map looks ahead from there, and the N best images of an observation so far become its beams. Beams
    compete, so they end up sharing ancestors and modes.

    Args:
        prior: The flow map.
        budget: Calls per beam; it determines the number of rounds, R = budget / (branches steps).
        branches: Number of branches of each beam in each round.
        steps: Number of jumps of the flow map to the image of a branch.
        chunk_size: Number of rows through the map at a time; None for 256 on a CPU, and as many as fit on a GPU.

    Raises:
        TypeError: If the prior is not a flow map.
        ValueError: If the budget does not allow one round, or a setting is out of range.

    Example:
        >>> import torch, invflow
        >>> prior = invflow.GaussianMixtureFlow(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), std=0.5, steps=2)
        >>> right = invflow.FunctionReward(lambda x: x[:, 0])
        >>> beams = invflow.BeamSearch(prior, budget=200).sample(right, 4, generator=torch.Generator().manual_seed(0))
        >>> beams.diagnostics["calls"] <= 200
        True
    """

    shared = True

    def __init__(self, prior: FlowMap, *, budget: int = 64, branches: int = 4, steps: int = 1,
                 chunk_size: int | None = None) -> None:
        SearchSolver.__init__(self, prior, budget, chunk_size)
        if branches < 1 or steps < 1:
            raise ValueError(f"branches={branches} and steps={steps} must be at least 1")
        self.steps, self.candidates, self.branches = steps, branches, branches
        cost = branches * self._cost(1)
        if cost > self.budget:
            raise ValueError(f"a budget of {budget} calls is too small for one round of {branches} branches, {cost} "
                             f"calls: pass budget={cost} or more, or fewer branches")
        self.rounds = largest(lambda rounds: branches * self._cost(rounds) <= self.budget, 1, self.budget)

    def _merge(self, best: tuple[Tensor, ...], tried: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """The N best of both, for each observation."""
        count = best[1].shape[1]
        states, scores, lineage = (torch.cat(pair, 1) for pair in zip(best, tried))
        index = scores.topk(count, dim=1).indices
        rows = torch.arange(len(index), device=index.device)[:, None]
        return states[rows, index], scores[rows, index], lineage[rows, index]


class TopKSearch(SearchSolver):
    """Top-k search: FMTT's dynamics, whose particles are replaced by copies of the k best. Optimisation, not sampling.

    The particles follow :class:`~invflow.FMTT` with the gradient of the reward, if it has one. At selections evenly
    spaced along the path, copies of the k particles with the highest look-ahead reward replace all N (arXiv
    2511.22688). The search finds maximisers and loses modes: the more selections, the fewer remain.

    Args:
        prior: A flow map trained with noise independent of the data.
        budget: Calls per sample, forward and backward; it determines the number of steps.
        k: Number of particles kept at a selection; at most N.
        selections: Number of selections.
        look_ahead, look_ahead_steps, kernel, max_shift, time_grid, chunk_size: Same as in :class:`~invflow.FMTT`.

    Raises:
        TypeError: If the prior is not a flow map.
        ValueError: If a setting is out of range; in :meth:`sample`, if the budget does not allow a step between
            selections.

    Example:
        >>> import torch, invflow
        >>> prior = invflow.GaussianMixtureFlow(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), std=0.5, steps=2)
        >>> right = invflow.FunctionReward(lambda x: x[:, 0])
        >>> best = invflow.TopKSearch(prior, budget=500).sample(right, 8, generator=torch.Generator().manual_seed(0))
        >>> int(best.diagnostics["distinct_ancestors"])
        1
    """

    def __init__(self, prior: FlowMap, *, budget: int = 100, k: int = 1, selections: int = 4,
                 look_ahead: str = "flow_map", look_ahead_steps: int = 1, kernel: str = "sde", max_shift: float = 1.0,
                 time_grid: Grid = "uniform", chunk_size: int | None = None) -> None:
        super().__init__(prior, budget, chunk_size)
        if k < 1 or selections < 1:
            raise ValueError(f"k={k} and selections={selections} must be at least 1")
        if not isinstance(time_grid, str) and not callable(time_grid):
            raise ValueError("the budget determines the number of steps, so the times cannot be given one by one: pass "
                             "time_grid='uniform', 'logit', or a function of the number of steps")
        self.k, self.selections = k, selections
        self.options: dict[str, Any] = {
            "look_ahead": look_ahead, "look_ahead_steps": look_ahead_steps, "kernel": kernel, "max_shift": max_shift,
            "time_grid": time_grid,
        }
        self._dynamics(selections + 1)  # check the settings now

    def _dynamics(self, steps: int) -> FMTT:
        """FMTT that keeps only the best particles at evenly spaced steps, excluding the first and the last."""
        selected = frozenset(round(steps * (i + 1) / (self.selections + 1)) for i in range(self.selections))
        dynamics = FMTT(self.prior, weights="none", steps=steps, resampling=BestGoOn(self.k, selected),
                        chunk_size=self.chunk_size, **self.options)
        dynamics.name = type(self).__name__
        return dynamics

    def _affordable(self, reward: Reward) -> FMTT:
        """The dynamics with as many steps as the budget allows."""
        least = self._dynamics(self.selections + 1)
        cost = sum(path_calls(least, reward, self._jumps))
        if cost > self.budget:
            raise ValueError(f"a budget of {self.budget} calls is too small for {self.selections} selections along the "
                             f"path, which take {least.steps} steps and {cost} calls: pass budget={cost} or more, or "
                             "fewer selections")

        def pays(steps: int) -> bool:
            return sum(path_calls(self._dynamics(steps), reward, self._jumps)) <= self.budget

        return self._dynamics(largest(pays, least.steps, self.budget))

    def settings(self) -> dict[str, Any]:
        """Settings as JSON values, stored with each result."""
        return {**super().settings(), **{name: plain(value) for name, value in self.options.items()}}

    def prior_samples(self, n: int, *, generator: torch.Generator | int | None = None) -> Tensor:
        """Draw from the base dynamics, without reward and selection, in 50 steps: ``(n, *image_shape)``."""
        return self._dynamics(max(50, self.selections + 1)).prior_samples(n, generator=generator)

    def iterate(self, reward: Reward, num_samples: int, *,
                generator: torch.Generator | int | None = None) -> Iterator[SearchState]:
        """Yield the particles after each step; see :meth:`SearchSolver.iterate`.

        Raises:
            ValueError: If there are fewer particles than k; also as in :meth:`SearchSolver.sample`.
        """
        if self.k > num_samples:
            raise ValueError(f"{num_samples} particles are fewer than k={self.k}: pass num_samples={self.k} or more")
        return self._states(self._affordable(reward).iterate(reward, num_samples, generator=generator))

    def _states(self, states: Iterator[FMTTState]) -> Iterator[SearchState]:
        size = self._size()
        for state in states:
            if state.step == 0:
                continue
            rows = state.states.flatten(0, 1)
            with torch.no_grad():
                images = size.map(self.prior.decode, rows)
            yield SearchState(state.step, state.time, images.unflatten(0, state.states.shape[:2]), state.rewards,
                              state.ancestors)


def largest(holds: Callable[[int], bool], low: int, high: int) -> int:
    """Largest whole number up to ``high`` for which a condition holds that is true at ``low`` and changes only once."""
    high = max(low, high) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
