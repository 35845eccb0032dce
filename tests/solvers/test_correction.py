"""Samples corrected by the data: against the Gaussian's closed form, and the solver's promises."""

from __future__ import annotations

import pytest
import torch

import invflow
from invflow.linear.correction import correct, measurement_noise
from invflow.models.adapter import Adapter, operator_traits
from invflow.models.neural import NeuralFlowMap
from invflow.operators import (
    BoxInpainting,
    Denoising,
    FreeFormInpainting,
    GaussianBlur,
    MaskInpainting,
    MatrixOperator,
    RandomInpainting,
    SuperResolution,
)
from invflow.solvers.verdict import sentence
from invflow.training.loop import seeded

SHAPE = (1, 16, 16)
NETWORK = {"channels": [8, 16], "blocks": 1, "embedding": 16}
CLASSES = ["random-inpainting", "gaussian-blur", "denoising"]


def shaken(module, seed):
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=g)
    return module.eval().requires_grad_(False)


def tiny_vfm(deviations=True, consistency=None, factors=None, **settings):
    prior = shaken(NeuralFlowMap(SHAPE, options=NETWORK, generator=seeded(0, 0, 0)), 1)
    adapter = shaken(Adapter(SHAPE, classes=CLASSES, options=NETWORK, generator=seeded(0, 0, 1), deviations=deviations,
                             consistency=factors), 2)
    adapter.trained_for = prior.fingerprint()
    return invflow.VFM(prior, adapter, consistency=consistency, **settings)


def likelihood_for(operator, n=1, sigma=0.05):
    g = seeded(3, 0, 0)
    operator = operator.randomize(n, g)
    x = torch.rand(n, *SHAPE, generator=g)
    return invflow.GaussianLikelihood(operator, operator.measure(x, sigma, generator=g), sigma)


def matrix_of(operator):
    eye = torch.eye(256, dtype=torch.float64).view(256, *SHAPE)
    return operator.double()(eye).flatten(1).T


@pytest.mark.parametrize("operator", [RandomInpainting(SHAPE, generator=seeded(0, 0, 0)), SuperResolution(SHAPE),
                                      GaussianBlur(SHAPE), Denoising(SHAPE)], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("sigma", [0.1, 0.01])
def test_correction_is_the_formula(operator, sigma):
    """x + C A^T (A C A^T + sigma^2)^-1 (y + sigma e - A x), with the matrices written out."""
    g = seeded(5, 0, 0)
    x, truth = torch.rand(2, 3, *SHAPE, generator=g, dtype=torch.float64)
    variance = 0.01 + 0.1 * torch.rand(3, *SHAPE, generator=g, dtype=torch.float64)
    operator = operator.double()
    y = operator.measure(truth, sigma, generator=g)
    noise = torch.randn(y.shape, generator=g, dtype=torch.float64)
    found, steps = correct(operator, y, torch.full((3,), sigma, dtype=torch.float64), x, variance, noise)
    a, observed = matrix_of(operator), operator.observed()
    kept = torch.ones(len(a), dtype=torch.bool) if observed is None else observed.flatten()
    a = a[kept]
    for b in range(3):
        c = variance[b].flatten()
        error = (y[b] + sigma * noise[b]).flatten()[kept] - a @ x[b].flatten()
        gain = c[:, None] * a.T @ torch.linalg.inv(a * c @ a.T + sigma**2 * torch.eye(len(a), dtype=torch.float64))
        torch.testing.assert_close(found[b].flatten(), x[b].flatten() + gain @ error, atol=2e-3, rtol=0)
    if isinstance(operator, (RandomInpainting, SuperResolution, Denoising)):
        assert float(steps.max()) <= 6  # one step, where A C A^T is diagonal


def test_law_of_corrected_samples():
    """A sample that knows nothing of y becomes a posterior sample; one that is a posterior sample counts y twice.

    Scalar, prior N(0, 1), noise of variance 1: the posterior has the variance 1/2. An exact sample corrected with its
    own variance, gain 1/3, has the error (1 - 1/3) (x - truth) + (n + e) / 3, in which n has come twice.
    """
    g, n = seeded(0, 0, 0), 200_000
    truth, e, first = torch.randn(3, n, 1, generator=g)
    operator = MatrixOperator(torch.eye(1), image_shape=(1,))
    y, sigma = truth + torch.randn(n, 1, generator=g), torch.ones(n)
    blind, _ = correct(operator, y, sigma, first, torch.ones(n, 1), e)
    assert float((blind - y / 2).var()) == pytest.approx(0.5, abs=5 * 0.5 * (2 / n) ** 0.5)
    assert float(((blind - y / 2) * y).mean()) == pytest.approx(0, abs=5 / n**0.5)
    exact = y / 2 + 0.5**0.5 * first
    twice, _ = correct(operator, y, sigma, exact, torch.full((n, 1), 0.5), e)
    spread = float((twice - 2 * y / 3).std())  # given y: sqrt((2/3)^2 / 2 + 1/9)
    assert spread == pytest.approx((2 / 9 + 1 / 9) ** 0.5, rel=5 / (2 * n) ** 0.5)


def test_gradients_reach_samples_and_variances():
    """Implicit differentiation against finite differences."""
    g = seeded(7, 0, 0)
    operator = GaussianBlur((1, 8, 8), std=0.6).double()
    x, truth = torch.rand(2, 2, 1, 8, 8, generator=g, dtype=torch.float64)
    spread = 0.02 + 0.1 * torch.rand(2, 1, 8, 8, generator=g, dtype=torch.float64)
    y = operator.measure(truth, 0.2, generator=g)
    noise, weight = torch.randn(2, *y.shape, generator=g, dtype=torch.float64)

    def value(x, spread):
        return (weight * correct(operator, y, torch.full((2,), 0.2).double(), x, spread, noise)[0]).sum()

    x.requires_grad_(), spread.requires_grad_()
    gradients = torch.autograd.grad(value(x, spread), (x, spread))
    for k, gradient in enumerate(gradients):
        step = 1e-3 * torch.randn(x.shape, generator=g, dtype=torch.float64)
        with torch.no_grad():
            ends = [value(*(v + sign * step if i == k else v for i, v in enumerate((x, spread)))) for sign in (1, -1)]
        assert float((gradient * step).sum()) == pytest.approx(float(ends[0] - ends[1]) / 2, rel=2e-2)


class Squared(invflow.Operator):
    linear = False

    def __init__(self):
        super().__init__()
        self.image_shape = self.measurement_shape = (3,)

    def forward(self, x):
        return x.square()


def test_other_operators_are_linearised_at_the_sample():
    """A(x) = x^2 has the derivative 2 x: entry by entry x + 2 x c r / (4 x^2 c + sigma^2)."""
    x, c = torch.tensor([[0.5, 1.0, 2.0]]), torch.tensor([[0.1, 0.2, 0.05]])
    y, noise = torch.tensor([[0.3, 1.2, 4.2]]), torch.tensor([[0.5, -1.0, 0.2]])
    found, _ = correct(Squared(), y, torch.tensor([0.3]), x, c, noise)
    expected = x + 2 * x * c * (y + 0.3 * noise - x**2) / (4 * x**2 * c + 0.09)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("operator", [BoxInpainting(SHAPE), SuperResolution(SHAPE)], ids=lambda o: type(o).__name__)
def test_without_noise_observed_values_are_kept(operator):
    g = seeded(9, 0, 0)
    x, truth = torch.rand(2, 4, *SHAPE, generator=g)
    y = operator(truth)
    found, _ = correct(operator, y, torch.zeros(4), x, torch.full_like(x, 0.01), torch.randn(y.shape, generator=g))
    torch.testing.assert_close(operator(found), y, atol=1e-4, rtol=0)
    hidden = operator.observed()
    if hidden is not None:  # and what was not observed is left alone
        assert torch.equal(found[~hidden.expand_as(found)], x[~hidden.expand_as(x)])


def test_fewer_samples_are_the_first_of_more():
    vfm = tiny_vfm(consistency=1.0)
    for operator in (RandomInpainting(SHAPE, generator=seeded(0, 0, 0)), SuperResolution(SHAPE, factor=8)):
        operator.problem_class = "random-inpainting"
        likelihood = likelihood_for(operator)
        few, many = (vfm.sample(likelihood, n, generator=seeded(1, 0, 0)).samples for n in (5, 12))
        torch.testing.assert_close(few, many[:, :5], atol=1e-5, rtol=0)
    assert torch.equal(measurement_noise(3, (7,), seeded(1, 0, 0)), measurement_noise(9, (7,), seeded(1, 0, 0))[:3])


def test_noise_of_the_measurement_leaves_the_generator_alone():
    g = seeded(2, 0, 0)
    noise = measurement_noise(4, (16,), g)
    assert torch.equal(g.get_state(), seeded(2, 0, 0).get_state())
    assert not torch.equal(noise.flatten(), torch.randn(64, generator=g))


def test_correction_costs_no_call_and_says_what_it_did():
    likelihood = likelihood_for(RandomInpainting(SHAPE, generator=seeded(0, 0, 0)), n=3)
    plain = tiny_vfm(consistency=False).sample(likelihood, 4, generator=seeded(1, 0, 0))
    moved = tiny_vfm(consistency=2.0).sample(likelihood, 4, generator=seeded(1, 0, 0))
    assert moved.nfe == plain.nfe
    assert "consistency_steps" not in plain.diagnostics
    assert float(moved.diagnostics["consistency_steps"].max()) <= 6
    change = (moved.samples - plain.samples).square().flatten(1).mean(1).sqrt()
    torch.testing.assert_close(moved.diagnostics["correction"], change, atol=1e-5, rtol=1e-4)
    assert bool((moved.diagnostics["residual"] < plain.diagnostics["residual"]).all())
    torch.testing.assert_close(moved.diagnostics["residual"], likelihood.residual(moved.samples).mean(1).sqrt())
    torch.testing.assert_close(moved.diagnostics["residual_of_mean"],
                               likelihood.residual(moved.mean()[:, None])[:, 0].sqrt())
    assert "correction by the data moved" in moved.diagnostics["verdict"]


def test_the_adapter_says_which_classes_are_corrected():
    """By default the fitted factors, between which is interpolated; a class without any is left alone."""
    factors = {"random-inpainting": [(0.0, 2.0), (0.1, 1.0)]}
    vfm, never = tiny_vfm(factors=factors), tiny_vfm(consistency=False)
    blur, mask = likelihood_for(GaussianBlur(SHAPE)), likelihood_for(RandomInpainting(SHAPE, generator=seeded(0, 0, 0)))
    for likelihood, same in ((blur, True), (mask, False)):
        found, plain = (v.sample(likelihood, 3, generator=seeded(1, 0, 0)).samples for v in (vfm, never))
        assert torch.equal(found, plain) is same
    levels = torch.tensor([0.0, 0.05, 0.1, 0.5])
    share = torch.log(levels[1] / 0.01 + 1) / torch.log(torch.tensor(11.0))
    expected = torch.stack([torch.tensor(2.0), 2 - share, torch.tensor(1.0), torch.tensor(1.0)])
    torch.testing.assert_close(vfm.adapter.correction("random-inpainting", levels), expected)
    exact = tiny_vfm(consistency=float(2 - share), factors=factors).sample(mask, 3, generator=seeded(1, 0, 0))
    fitted = vfm.sample(mask, 3, generator=seeded(1, 0, 0))
    torch.testing.assert_close(exact.samples, fitted.samples, atol=1e-5, rtol=0)


def test_a_correction_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="gives no standard deviations"):
        tiny_vfm(deviations=False, consistency=True)
    with pytest.raises(ValueError, match="one of the two"):
        tiny_vfm(consistency=True, importance=True)
    with pytest.raises(ValueError, match="at least 0"):
        tiny_vfm(consistency=-1.0)
    with pytest.raises(ValueError, match="levels rising"):
        tiny_vfm(factors={"denoising": [(0.1, 1.0), (0.1, 0.5)]})
    with pytest.raises(ValueError, match="the adapter knows"):
        tiny_vfm(factors={"unknown": [(0.1, 1.0)]})


def test_what_is_known_survives_a_folder(tmp_path):
    vfm = tiny_vfm(factors={"denoising": [(0.0, 0.5), (0.1, 1.0)]})
    vfm.adapter.levels, vfm.adapter.traits = {"denoising": (0.0, 0.5)}, {"denoising": [(1.0, 1.0), (0.0, 0.0)]}
    vfm.save_pretrained(tmp_path)
    found = invflow.VFM.load(tmp_path).adapter
    assert found.config() == vfm.adapter.config()
    assert found.deviations
    assert found.levels == {"denoising": (0.0, 0.5)}


def test_a_grown_adapter_answers_as_before():
    small = tiny_vfm(deviations=False).adapter
    big = small.grown([*CLASSES, "free-form-inpainting"], {"free-form-inpainting": "random-inpainting"})
    likelihood = likelihood_for(RandomInpainting(SHAPE, generator=seeded(0, 0, 0)), n=2)
    before, after = small.proposal(likelihood), big.proposal(likelihood)
    torch.testing.assert_close(after.mean, before.mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(after.std, before.std, atol=1e-6, rtol=0)
    assert before.deviation is None
    torch.testing.assert_close(after.deviation, torch.full_like(after.deviation, 0.05))
    assert big.grown(big.classes, {}) is big
    free = likelihood_for(MaskInpainting(likelihood.operator.mask), n=2)
    torch.testing.assert_close(big.proposal(free).mean, big.proposal(
        invflow.GaussianLikelihood(likelihood.operator, free.y, 0.05)).mean, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="no class to initialise"):
        small.grown([*CLASSES, "new"], {})


def test_noise_levels_are_told_within_the_range(recwarn):
    """From 0 on; beyond the range the nearest level is told, and that is said."""
    adapter = tiny_vfm().adapter
    nothing, least, much, most = (likelihood_for(Denoising(SHAPE), sigma=level) for level in (0.0, 0.003, 2.0, 0.5))
    for likelihood in (nothing, least, much, most):
        likelihood.y = most.y
    assert bool(torch.isfinite(adapter.proposal(nothing).mean).all())
    torch.testing.assert_close(adapter.proposal(nothing).mean, adapter.proposal(least).mean)
    assert not recwarn.list
    adapter.levels = {"denoising": (0.0, 0.5)}
    with pytest.warns(UserWarning, match=r"sigma=2 .* 0 to 0\.5 .* uses 0\.5"):
        told = adapter.proposal(much).mean
    torch.testing.assert_close(told, adapter.proposal(most).mean)


def test_any_mask_goes_to_the_class_that_takes_it():
    adapter = tiny_vfm().adapter
    boxes = Adapter(SHAPE, classes=["box-inpainting", "random-inpainting"], options=NETWORK, generator=seeded(0, 0, 0))
    hidden_box = likelihood_for(MaskInpainting(BoxInpainting(SHAPE).mask))
    scattered = likelihood_for(MaskInpainting(RandomInpainting(SHAPE, generator=seeded(0, 0, 0)).mask))
    broad, thin = torch.ones(2, *SHAPE[1:])
    broad[3:10, 2:12], broad[8:15, 9:16], thin[3:5, 2:12] = 0, 0, 0
    thin[8, :] = 0
    strokes, scratches = (likelihood_for(MaskInpainting(mask, SHAPE)) for mask in (broad, thin))
    for who, likelihood, name in ((adapter, hidden_box, "random-inpainting"), (boxes, hidden_box, "box-inpainting"),
                                  (boxes, scattered, "random-inpainting"), (boxes, strokes, "box-inpainting"),
                                  (boxes, scratches, "random-inpainting")):
        with pytest.warns(UserWarning, match=rf"treats this \w+ as {name}"):
            assert who.classes[who.class_index(likelihood)] == name
    knows = Adapter(SHAPE, classes=["free-form-inpainting"], options=NETWORK, generator=seeded(0, 0, 0))
    assert knows.class_index(likelihood_for(FreeFormInpainting(SHAPE, seeded(0, 0, 0)))) == 0


def test_likelihood_without_noise_has_no_density():
    likelihood = likelihood_for(Denoising(SHAPE), sigma=0.0)
    with pytest.raises(ValueError, match="no density"):
        likelihood(torch.rand(1, 2, *SHAPE))
    x = likelihood.y[:, None] + 1 / 255
    torch.testing.assert_close(likelihood.residual(x), torch.full((1, 1), 12.0), rtol=1e-4, atol=0)  # of rounding
    with pytest.raises(ValueError, match="NoiseSMC needs the density"):
        invflow.Solver.sample(invflow.NoiseSMC(tiny_vfm().prior), likelihood, 2)
    posterior = tiny_vfm().sample(likelihood, 2, generator=seeded(0, 0, 0))
    assert bool(torch.isfinite(posterior.samples).all())


def test_verdicts_in_words():
    inside, outside = torch.tensor([True, True]), torch.tensor([True, False])
    good = sentence(torch.tensor([0.95, 1.1]), inside, inside)
    assert good == ("The samples fit the measurements: residuals of 0.95 to 1.10 times the noise. Noise and operator "
                    "are within the range that the adapter was trained for.")
    assert sentence(torch.tensor([1.0]), None, None).count(".") == 2
    missed = sentence(torch.tensor([0.95, 2.5]), inside, None)
    assert missed.startswith("In 1 of 2 observations the samples do not fit the measurement")
    assert "fit the measurement too closely" in sentence(torch.tensor([0.5]), None, None)
    assert "do not quite fit" in sentence(torch.tensor([1.5]), None, None)
    assert "in 1 of 2 observations the noise lies outside" in sentence(torch.tensor([1.0, 1.0]), outside, None)
    assert "treated as one of random-inpainting" in sentence(torch.tensor([1.0]), None, None, "random-inpainting")


def test_operators_beyond_the_training_are_told_apart():
    vfm = tiny_vfm()
    draws = operator_traits(RandomInpainting(SHAPE, (0.4, 0.6), seeded(0, 0, 0)).randomize(200, seeded(0, 0, 0)))
    vfm.adapter.traits = {"random-inpainting": [(float(c.min()), float(c.max())) for c in draws.unbind(1)]}
    vfm.adapter.levels = {"random-inpainting": (0.01, 0.2)}
    for keep, level, expected in ((0.5, 0.05, True), (0.95, 0.05, False), (0.5, 0.2, True)):
        likelihood = likelihood_for(RandomInpainting(SHAPE, keep, seeded(0, 0, 0)), sigma=level)
        assert bool(vfm.sample(likelihood, 2, generator=seeded(0, 0, 0)).diagnostics["trained_for"].all()) is expected
