"""A chunk that does not fit in memory is halved; the result is that of smaller chunks, with the same random numbers."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tilting_models import Gaussian
from torch import Tensor

import invflow
from invflow import FMTT, BeamSearch, BestOfN, NoiseRTO, NoiseSMC, TopKSearch, TwistedDiffusion, flowmap
from invflow._core.chunks import ChunkSize, is_out_of_memory
from invflow.flowmap import bytes_per_row, rows_at_a_time
from invflow.likelihood import GaussianLikelihood
from invflow.models.adapter import Adapter
from invflow.operators import Denoising, MatrixOperator

F64 = torch.float64
B, N = 3, 7
ERRORS: list[Callable[[int], BaseException]] = [
    lambda n: torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {n}.00 GiB.\nGPU 0 has ..."),
    lambda n: RuntimeError(f"DefaultCPUAllocator: can't allocate memory: you tried to allocate {n} bytes."),
]


class Limited(Gaussian):
    """A map that takes so many rows at a time, in float64."""

    def __init__(self, limit: float = torch.inf, error: Callable[[int], BaseException] = ERRORS[0]) -> None:
        super().__init__()
        self.register_buffer("anchor", torch.zeros((), dtype=F64))
        self.limit, self.error, self.failed = limit, error, []

    def allocate(self, x: Tensor) -> None:
        if len(x) > self.limit:
            self.failed.append(len(x))
            raise self.error(len(x))

    def velocity(self, x: Tensor, t: Any) -> Tensor:
        self.allocate(x)
        return super().velocity(x, t)

    def jump(self, x: Tensor, s: Any, t: Any) -> Tensor:
        self.allocate(x)
        moved = super().jump(x, s, t)
        return moved + 0.1 * moved.flip(-1).sin()  # nothing is exact by accident

    def decode(self, state: Tensor) -> Tensor:
        self.allocate(state)
        return super().decode(state)


def likelihood() -> GaussianLikelihood:
    matrix = torch.tensor([[1.0, 0.3, -0.5], [0.2, -1.0, 0.4]], dtype=F64)
    y = torch.tensor([[0.5, -0.2], [1.5, 0.3], [-0.8, 0.9]], dtype=F64)
    return GaussianLikelihood(MatrixOperator(matrix, image_shape=(3,)), y, sigma=0.7)


SOLVERS: dict[str, Callable[..., Any]] = {
    "fmtt": lambda p, **c: FMTT(p, steps=4, **c),
    "fmtt-renoise": lambda p, **c: FMTT(p, steps=3, kernel="renoise", resample_threshold=0.9, **c),
    "fmtt-jarzynski": lambda p, **c: FMTT(p, steps=3, weights="jarzynski", look_ahead="denoiser", **c),
    "fmtt-conjugate": lambda p, **c: FMTT(p, steps=3, proposal="conjugate", **c),
    "tds": lambda p, **c: TwistedDiffusion(p, steps=4, **c),
    "noise-smc": lambda p, **c: NoiseSMC(p, num_moves=2, **c),
    "noise-smc-hamiltonian": lambda p, **c: NoiseSMC(p, moves="hamiltonian", num_moves=1, leapfrog_steps=2, **c),
    "noise-smc-slice": lambda p, **c: NoiseSMC(p, moves="elliptical-slice", num_moves=1, **c),
    "noise-smc-weights": lambda p, **c: NoiseSMC(p, num_moves=0, **c),
    "noise-smc-rto": lambda p, **c: NoiseSMC(p, start="rto", num_moves=1, num_adaptations=1, leapfrog_steps=2, **c),
    "noise-rto": lambda p, **c: NoiseRTO(p, max_iterations=6, **c),
    "noise-rto-weights": lambda p, **c: NoiseRTO(p, weights=True, max_iterations=6, **c),
    "top-k": lambda p, **c: TopKSearch(p, budget=40, k=2, selections=2, **c),
    "beam": lambda p, **c: BeamSearch(p, budget=12, branches=2, **c),
    "best-of-n": lambda p, **c: BestOfN(p, budget=6, selections=2, **c),
    "flower": lambda p, **c: invflow.Flower(p, steps=3, **c),
    "pnp-flow": lambda p, **c: invflow.PnPFlow(p, steps=3, **c),
}


def sample(solver: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few particles, too
        return solver.sample(likelihood(), N, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("error", ERRORS, ids=["device", "cpu"])
def test_a_solver_goes_on_with_half_the_rows(name: str, error: Callable[[int], BaseException]) -> None:
    free = sample(SOLVERS[name](Limited(), chunk_size=1000))
    prior = Limited(5, error)
    halved = sample(SOLVERS[name](prior, chunk_size=1000))
    assert prior.failed, "the limit was never met"
    torch.testing.assert_close(halved.samples, free.samples, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(halved.log_weights, free.log_weights, rtol=1e-8, atol=1e-8)
    assert len(prior.failed) < 16, "sizes that failed are tried again and again"


@pytest.mark.parametrize("name", ["fmtt", "noise-smc", "noise-rto", "best-of-n", "flower"])
def test_a_single_row_that_does_not_fit_says_what_was_asked(name: str) -> None:
    solver = SOLVERS[name](Limited(), chunk_size=16)
    solver.prior.limit = 0
    with pytest.raises(torch.OutOfMemoryError, match=r"single row does not fit.*chunk_size=16.*allocate 1"):
        sample(solver)


def test_the_warning_names_the_solver_and_both_sizes() -> None:
    with pytest.warns(UserWarning, match=r"FMTT: 16 rows at a time do not fit.*continuing with 8.*chunk_size=8"):
        FMTT(Limited(8), steps=2, chunk_size=16).sample(likelihood(), 16, generator=torch.Generator().manual_seed(0))


def test_prior_samples_are_halved_too() -> None:
    for make in (lambda p: p, lambda p: FMTT(p, steps=3)):
        free, less = make(Limited()), make(Limited(5))
        draw = "generate" if less is less and isinstance(less, Limited) else "prior_samples"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            first, second = (getattr(m, draw)(20, generator=torch.Generator().manual_seed(2)) for m in (free, less))
        torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("importance", [False, True])
def test_vfm_goes_on_with_half_the_rows(importance: bool) -> None:
    options = {"width": 8, "depth": 1, "embedding": 8}
    prior = invflow.NeuralFlowMap((3,), network="mlp", options=options, generator=torch.Generator().manual_seed(0))
    adapter = Adapter((3,), classes=["denoising"], network="mlp", options=options, trained_for=prior.fingerprint(),
                      generator=torch.Generator().manual_seed(1))
    observed = GaussianLikelihood(Denoising((3,)), likelihood().y[:, :1].float().repeat(1, 3), sigma=0.5)

    def run() -> Any:
        vfm = invflow.VFM(prior, adapter, steps=2, importance=importance)
        return vfm.sample(observed, N, generator=torch.Generator().manual_seed(3))

    free, whole, sizes = run(), prior.average_velocity, []

    def limited(x: Tensor, s: Any, t: Any) -> Tensor:
        sizes.append(len(x))
        if len(x) > 5:
            raise ERRORS[1](len(x))
        return whole(x, s, t)

    prior.average_velocity = limited  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="VFM: 21 rows at a time do not fit"):
        halved = run()
    assert sizes[:3] == [21, 11, 6]
    torch.testing.assert_close(halved.samples, free.samples, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(halved.log_weights, free.log_weights, rtol=1e-5, atol=1e-5)


# -- the pieces that do it ---------------------------------------------------------------------------------------------


def test_other_errors_pass_and_allocations_are_known() -> None:
    def broken(part: slice) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        list(ChunkSize(4, "test").over(4, broken))
    with pytest.raises(RuntimeError) as caught:  # a real one
        torch.empty(2**58)
    assert is_out_of_memory(caught.value) == ("allocate" in str(caught.value))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError("out of memory"))
    with pytest.raises(ValueError, match="chunk_size=0"):
        ChunkSize(0, "test")


def test_every_row_is_worked_on_once_in_order_whatever_fails() -> None:
    for total in (1, 5, 17):
        for limit in (1, 2, 3, 7):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                size = ChunkSize(8, "test")
                done = [i for part, rows in size.over(total, lambda p: limited(p, limit)) for i in rows]  # noqa: B023
                assert done == list(range(total))
                again = ChunkSize(8, "test")
                steps = list(again.stream(total, lambda p: slowly(p, limit)))  # noqa: B023
            assert [i for part, i in steps if part.stop - part.start <= limit] == list(range(total))
            assert size.rows <= limit or total <= limit


def slowly(part: slice, limit: int) -> Iterator[tuple[slice, int]]:
    """The rows one by one; work that does not fit fails at its second step."""
    for i in range(part.start, part.stop):
        if i > part.start:
            limited(part, limit)
        yield part, i


def limited(part: slice, limit: int) -> list[int]:
    if part.stop - part.start > limit:
        raise MemoryError
    return list(range(part.start, part.stop))


def test_nothing_of_a_failed_attempt_is_kept() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def work(part: slice) -> None:
        assert all(ref() is None for ref in alive), "the failed attempt still holds its tensors"
        held = torch.zeros(1000)
        alive.append(weakref.ref(held))
        if part.stop - part.start > 2:
            raise torch.OutOfMemoryError("out of memory")
        del held

    with pytest.warns(UserWarning, match="do not fit"):
        list(ChunkSize(8, "test").over(8, work))
    assert len(alive) == 2 + 4


# -- how many rows there is memory for ---------------------------------------------------------------------------------


class Stack(invflow.FlowMap):
    """Keeps so many states of each row for a backward pass through a jump, and one less through a velocity."""

    state_shape = image_shape = (50,)

    def __init__(self, kept: int) -> None:
        super().__init__()
        self.kept = kept
        self.register_buffer("matrix", torch.eye(50))

    def _through(self, x: Tensor, kept: int) -> Tensor:
        for _ in range(kept):
            x = x.sin()  # whose backward pass reads what it was taken of
        return x @ self.matrix  # whose backward pass reads the weights, which are no row's

    def velocity(self, x: Tensor, t: Any) -> Tensor:
        return self._through(x, self.kept - 1)

    def jump(self, x: Tensor, s: Any, t: Any) -> Tensor:
        return self._through(x, self.kept)


@pytest.mark.parametrize("kept", [3, 10])
def test_bytes_of_a_row_are_those_that_its_backward_pass_reads(kept: int) -> None:
    prior = Stack(kept)
    with prior.count() as calls:
        assert bytes_per_row(prior) == kept * 50 * 4
        assert bytes_per_row(prior, velocity=True) == max(kept - 1, 2) * 50 * 4
        assert (calls.forward, calls.backward) == (0, 0)
        prior.jump(torch.zeros(2, 50), 0.0, 1.0)
    assert calls.forward == 2  # which are counted again


@pytest.mark.parametrize(("free", "expected"), [(0, 1), (1100, 1), (12_500, 10), (1e12, 4096)])  # a row keeps 600
def test_rows_fill_half_of_the_free_memory_of_a_gpu(free: float, expected: int,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    prior = Stack(3)
    assert rows_at_a_time(None, prior) == 256  # on a CPU
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(Stack, "device", torch.device("cuda"))
    monkeypatch.setattr(flowmap, "_free_bytes", lambda device: free)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **kwargs: torch.ones(shape, **kwargs))
    assert rows_at_a_time(None, prior) == expected
    assert rows_at_a_time(7, prior) == 7
    monkeypatch.setattr(flowmap, "bytes_per_row", None)  # it is not asked again
    assert rows_at_a_time(None, prior) == expected


def test_a_row_that_cannot_be_weighed_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = Limited(limit=0)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(Limited, "device", torch.device("cuda"))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **kwargs: torch.ones(shape, **kwargs))
    assert rows_at_a_time(None, prior) == 1


@pytest.mark.parametrize("make", [
    lambda size: FMTT(Gaussian(), chunk_size=size), lambda size: invflow.DPS(Gaussian(), chunk_size=size),
    lambda size: NoiseRTO(Gaussian(), chunk_size=size), lambda size: NoiseSMC(Gaussian(), chunk_size=size),
    lambda size: BestOfN(Gaussian(), chunk_size=size), lambda size: TopKSearch(Gaussian(), chunk_size=size),
])
def test_a_chunk_of_no_rows_is_refused(make: Callable[[int | None], invflow.Solver]) -> None:
    make(None)
    with pytest.raises(ValueError, match=r"chunk_size=0: pass at least 1 row, or None"):
        make(0)
