"""Everything runs on the device of the tensors: on a pretended GPU that counts how often it is waited for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import invflow
from invflow import metrics, smc
from invflow.linear import spectral
from invflow.models.spectral_adapter import SpectralAdapter
from invflow.operators import (
    BoxInpainting,
    DeepinvOperator,
    Denoising,
    GaussianBlur,
    MatrixOperator,
    MotionBlur,
    RandomInpainting,
    SuperResolution,
)

try:
    from pretended_gpu import GPU, PretendGPU, bare, count, generator, on_gpu, put, same, shaken, wrap

    with PretendGPU():  # parts of torch without a promise: where they have changed, there is nothing to test with
        w = wrap(torch.ones(2, requires_grad=True))
        assert torch.autograd.grad((w * torch.ones(2, device=GPU)).sum(), w)[0].device == GPU
except (ImportError, AttributeError, TypeError, RuntimeError, AssertionError) as error:
    pytest.skip(f"torch {torch.__version__} does not let a GPU be pretended: {error}", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:.*onverged", "ignore:.*CUDA is not available")

SMALL, PHOTO = (1, 8, 8), (3, 16, 16)


@pytest.fixture(autouse=True, scope="module")
def _forget() -> Iterator[None]:
    """Clear what is cached per device, so that tests with a real one do not see it."""
    yield
    for kept in (spectral.dct_matrix, spectral.opponent_matrix, spectral._makhoul):
        kept.cache_clear()


def prior_of(shape: tuple[int, ...], **kwargs: Any) -> invflow.NeuralFlowMap:
    options = {"channels": [8, 8], "blocks": 1, "embedding": 8, "attention": shape == SMALL}
    skip = "spectral" if shape == PHOTO else None
    return shaken(invflow.NeuralFlowMap(shape, options=options, skip=skip, generator=generator(1), **kwargs))


def vfm_of(shape: tuple[int, ...]) -> tuple[invflow.NeuralFlowMap, invflow.Adapter]:
    make: Any = SpectralAdapter if shape == PHOTO else invflow.Adapter
    options = {"channels": [8, 8], "blocks": 1, "embedding": 8, "attention": shape == SMALL}
    adapter = make(shape, classes=["box-inpainting", "gaussian-blur"], options=options, generator=generator(2))
    return prior_of(shape, independent_noise=False), shaken(adapter)


def likelihood_of(operator: invflow.Operator, sigma: float = 0.3) -> invflow.GaussianLikelihood:
    x = torch.rand(2, *operator.image_shape, generator=generator(4))
    return invflow.GaussianLikelihood(operator, operator.measure(x, sigma, generator=generator(5)), sigma=sigma)


def solve(make: Callable[..., Any], parts: tuple[Any, ...], likelihood: invflow.Reward, n: int = 6) -> Counter[str]:
    """Solve on the CPU and on the pretended GPU; the results are the same bits. What the GPU was waited for."""
    expected = make(*parts).sample(likelihood, n, generator=generator(7))
    moved, there = [put(part) for part in parts], on_gpu(likelihood)
    with PretendGPU() as seen:
        solver = make(*moved)
        solver.sample(there, n, generator=generator(7))  # reads the networks once, for the record of what made samples
        seen.clear()
        found = solver.sample(there, n, generator=generator(7))
    tensors = {k: v for k, v in expected.diagnostics.items() if isinstance(v, Tensor)}
    same((expected.samples, expected.log_weights, tensors),
         (found.samples, found.log_weights, {k: found.diagnostics[k] for k in tensors}))
    return Counter(seen)


def boxes(shape: tuple[int, ...] = SMALL) -> invflow.GaussianLikelihood:
    return likelihood_of(BoxInpainting(shape).randomize(2, generator(6)))


def test_the_pretence_sees_mistakes() -> None:
    with PretendGPU() as seen:
        x = torch.randn(3, 4, generator=generator()).to("cuda")
        with pytest.raises(RuntimeError, match="on the cpu"):
            x + torch.ones(3, 4)
        with pytest.raises(RuntimeError, match="on the cpu"):
            torch.ones(3)[x[:, 0] > 0]
        assert bool((x > -9).all())  # 1
        assert x[x > -9].shape == (12,)  # 2
        assert x.sum().item() == x.cpu().sum().item()  # 3, 4
        assert x[torch.tensor([0])].device == GPU
        x[x > 0] = 0.0  # a masked fill
    assert count(seen, "wait") == 4
    assert count(seen, "upload") == 2


@pytest.mark.parametrize("settings", [
    {}, {"kernel": "renoise"}, {"kernel": "heun", "weights": "jarzynski"},
    {"kernel": "ancestral", "look_ahead": "denoiser", "proposal": "conjugate"}], ids=str)
def test_fmtt_waits_once_for_a_look_and_twice_for_resampling(settings: dict[str, Any]) -> None:
    looks = 2 if settings.get("kernel") in ("renoise", "heun") else 1
    short, long = (solve(lambda prior, k=k: invflow.FMTT(prior, steps=k, chunk_size=6, **settings), (prior_of(SMALL),),
                         boxes()) for k in (3, 6))
    chunks, steps = 2, 3
    assert count(long - short, "wait") <= steps * (looks * chunks + 2)
    assert count(long - short, "upload") <= 2 * steps  # noise, and the resampler's uniform numbers


@pytest.mark.parametrize(("moves", "evaluations"), [("crank-nicolson-langevin", 1), ("preconditioned-hamiltonian", 2)])
def test_noise_smc_waits_once_for_an_evaluation(moves: str, evaluations: int) -> None:
    parts = (prior_of(SMALL),)
    few, many = (solve(lambda prior, k=k: invflow.NoiseSMC(
        prior, num_moves=k, moves=moves, leapfrog_steps=2, temperatures=[0.3, 1.0]), parts, boxes()) for k in (1, 3))
    more = 2 * 2  # moves, at two temperatures
    assert count(many - few, "wait") <= more * evaluations + 1  # one to say how many ancestors are left, too few here
    assert count(many - few, "upload") <= more * (2 + 2 * evaluations)  # random numbers; which rows, for y and masks
    assert count(few, "wait") <= 2 * (9 + evaluations) + 15  # at two temperatures, and once; once for the residual


def test_noise_smc_waits_no_more_for_a_gradient_seen() -> None:
    seen = solve(lambda prior: invflow.NoiseSMC(prior, start=invflow.NoiseRTO(prior, max_iterations=3), num_moves=1,
                                                num_adaptations=1, leapfrog_steps=2), (prior_of(SMALL),), boxes())
    assert sum(n for place, n in seen.items() if "noise_metric" in place) <= 4  # two observations, one fit


def test_rto_waits_a_few_times_for_an_evaluation() -> None:
    likelihood, evaluations = boxes(), 0

    def make(prior: invflow.NeuralFlowMap) -> invflow.NoiseRTO:
        nonlocal evaluations
        evaluations = 0

        def counted(z: Tensor) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            return invflow.FlowMap.one_step(prior, z)

        prior.one_step = counted  # type: ignore[method-assign]
        return invflow.NoiseRTO(prior, max_iterations=14, memory=8, tolerance=3.0)

    seen = solve(make, (prior_of(SMALL),), likelihood)
    # which rows are meant, whether they are finite, which have fallen and which have not, and which go on
    assert count(seen, "wait") <= 5 * evaluations + 12


@pytest.mark.parametrize("shape", [SMALL, PHOTO], ids=["digits", "photographs"])
@pytest.mark.parametrize("settings", [{}, {"steps": 3}, {"importance": True}], ids=str)
def test_vfm_waits_for_no_chunk(shape: tuple[int, ...], settings: dict[str, Any]) -> None:
    whole, cut = (solve(lambda prior, adapter, k=k: invflow.VFM(prior, adapter, chunk_size=k, **settings),
                        vfm_of(shape), boxes(shape)) for k in (12, 4))
    assert count(cut - whole, "wait") == 0
    # which rows, for y and masks: to weigh the samples, and for the residual in their verdict
    assert count(cut - whole, "upload") <= 2 * 2 * (2 if settings.get("importance") else 1)
    assert count(whole, "wait") <= 7  # one of them for the residual of the mean


@pytest.mark.parametrize("name", ["BestOfN", "BeamSearch", "TopKSearch"])
def test_search(name: str) -> None:
    settings = {"TopKSearch": {"budget": 20, "k": 2, "selections": 1}}.get(name, {"budget": 8})
    seen = solve(lambda prior: getattr(invflow, name)(prior, **settings), (prior_of(SMALL),), boxes())
    assert count(seen, "wait") <= 12


def test_generate_waits_for_nothing() -> None:
    for shape in (SMALL, PHOTO):
        prior = prior_of(shape)
        moved = put(prior)
        with PretendGPU() as seen:
            found = moved.generate(4, 2, generator=generator(), chunk_size=2)
        same(prior.generate(4, 2, generator=generator(), chunk_size=2), found)
        assert count(seen, "wait") == 0
    mixture = invflow.GaussianMixtureFlow(torch.randn(3, 4, generator=generator()))
    x, moved = torch.randn(5, 4, generator=generator(1)), put(mixture)
    with PretendGPU() as seen:
        found = moved.velocity(wrap(x), 0.5), moved.score(wrap(x), 0.5), invflow.FlowMap.score(moved, wrap(x), 0.5)
    same((mixture.velocity(x, 0.5), mixture.score(x, 0.5), invflow.FlowMap.score(mixture, x, 0.5)), found)
    assert count(seen, "wait") == 0


def operators() -> dict[str, invflow.Operator]:
    import deepinv

    g = generator(8)
    return {
        "box": BoxInpainting(PHOTO), "pixels": RandomInpainting(PHOTO, generator=g).randomize(2, g),
        "blur": GaussianBlur(PHOTO).randomize(2, g), "motion": MotionBlur(PHOTO, generator=g, padding="reflect"),
        "average": SuperResolution(PHOTO), "bicubic": SuperResolution(PHOTO, filter="bicubic"),
        "denoising": Denoising(PHOTO), "composed": SuperResolution(PHOTO, 2) @ GaussianBlur(PHOTO),
        "matrix": MatrixOperator(torch.randn(2, 5, 6, generator=g)),
        "deepinv": DeepinvOperator(deepinv.physics.Demosaicing(PHOTO), PHOTO),
    }


@pytest.mark.parametrize("name", ["box", "pixels", "blur", "motion", "average", "bicubic", "denoising", "composed",
                                  "matrix", "deepinv"])
def test_operators_and_likelihoods(name: str) -> None:
    operator = operators()[name]
    x = torch.rand(2, *operator.image_shape, generator=generator(9))
    y, moved = operator(x), on_gpu(operator)
    calls: dict[str, Callable[..., Any]] = {
        "forward": lambda a, x, y: a(x), "adjoint": lambda a, x, y: a.adjoint(y), "embed": lambda a, x, y: a.embed(y),
        "pseudo_inverse": lambda a, x, y: a.pseudo_inverse(y), "observed": lambda a, x, y: a.observed(),
        "randomize": lambda a, x, y: a.randomize(2, generator()).measure(x, 0.1, generator=generator(1)),
        "likelihood": lambda a, x, y: (lik := invflow.GaussianLikelihood(a, y, 0.1)).select([1, 0])(x[:, None]) +
        lik.residual(x[:, None]) + lik.simulate(x, generator()).flatten(1).sum(1, keepdim=True),
        "poisson": lambda a, x, y: (lik := invflow.PoissonLikelihood(a, (9 * y.abs()).round(), 9.0))(x[:, None]) +
        lik.simulate(x, generator()).flatten(1).sum(1, keepdim=True),
    }
    for what, call in calls.items():
        with PretendGPU() as seen:
            found = call(moved, wrap(x), wrap(y))
        same(call(operator, x, y), found, exact=False)
        assert what != "pseudo_inverse" or count(seen, "wait") <= 14  # of a hundred conjugate gradient steps
        assert what not in ("forward", "adjoint") or not seen
    with PretendGPU() as seen:
        moved.observed()
    assert not seen  # what it has to ask for it has asked for


@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
def test_summaries_and_metrics(weighted: bool) -> None:
    g = generator(10)
    x, truth, log_weights = (torch.randn(2, 20, *PHOTO, generator=g), torch.randn(2, *PHOTO, generator=g),
                             torch.randn(2, 20, generator=g))

    def summaries(x: Tensor, truth: Tensor, weights: Tensor) -> dict[str, Any]:
        given = weights if weighted else None
        p = invflow.Posterior(x, given, weights[:, 0])
        return {"mean": p.mean(), "std": p.std(), "quantile": p.quantile(0.1), "interval": p.interval(0.5),
                "ess": p.ess(), "resample": p.resample(5, generator=generator()).samples, "select": p.select(1).samples,
                "crps": metrics.crps(x, truth, given), "energy": metrics.energy_score(x, truth, given),
                "coverage": metrics.coverage(x, truth, 0.5, given), "psnr": metrics.psnr(x, truth),
                "ssim": metrics.ssim(p.mean(), truth), "nlpd": metrics.nlpd(weights, given),
                "wasserstein": metrics.sliced_wasserstein(x, x.flip(0), log_weights=given, generator=generator(),
                                                          num_projections=8),
                "mmd": metrics.mmd(x, x.flip(0), given), "k_hat": smc.pareto_k_hat(weights.repeat(1, 2)),
                "temperature": smc.next_temperature(9 * weights, 0 * weights[:, 0], 0.5),
                **{name: resample(weights.softmax(1), 20, generator()) for name, resample in smc.RESAMPLERS.items()}}

    with PretendGPU() as seen:
        found = summaries(wrap(x), wrap(truth), wrap(log_weights))
    same(summaries(x, truth, log_weights), found, exact=False)
    assert bare(found["mean"]).shape == truth.shape
    assert count(seen, "wait") <= 18
