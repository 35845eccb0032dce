"""The objectives against closed forms, and known mistakes."""

from __future__ import annotations

import pytest
import torch

from invflow.training.losses import (
    average_velocity_jvp,
    gaussian_kl,
    meanflow_loss,
    normalise,
    pair_score,
    patch_score,
    sample_between,
    sample_times,
    scale_gradient,
    semigroup_average,
)

STD = 0.6  # of the Gaussian data in these tests


def gaussian_u(x, s, t):
    """Average velocity of the flow of N(0, I) to N(0, STD^2 I): x scales by g_t / g_s."""
    def scale(a):
        return ((1 - a) ** 2 + (a * STD) ** 2).sqrt()

    s, t = s[:, None], t[:, None]
    velocity = x * (STD**2 * s - (1 - s)) / scale(s) ** 2
    gap = torch.where(s == t, torch.ones_like(s), t - s)
    return torch.where(s == t, velocity, x * (scale(t) / scale(s) - 1) / gap)


def gaussian_pairs(n, generator):
    z = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    m = STD * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    return z, m


@pytest.mark.parametrize("tangent", ["map", "path"])
@pytest.mark.parametrize(("s", "t"), [(0.0, 1.0), (0.2, 0.7), (0.5, 0.5), (0.0, 0.3)])
def test_true_average_velocity_is_a_stationary_point(s, t, tangent):
    """At the true u the expected gradient vanishes: E[(u - target) phi(x_s)] = 0 for every test function phi.

    A target with time reversed, v - (t - s) du/ds, fails by tens of standard errors.
    """
    g = torch.Generator().manual_seed(0)
    n = 200_000
    z, m = gaussian_pairs(n, g)
    s_rows, t_rows = torch.full((n,), s, dtype=torch.float64), torch.full((n,), t, dtype=torch.float64)
    coefficients = torch.zeros(n, 2, dtype=torch.float64, requires_grad=True)

    def u(x, a, b):
        features = torch.cat([x, x**3], dim=1)
        shift = (coefficients[: len(x)] * features).sum(dim=1, keepdim=True)
        return gaussian_u(x, a, b) + (shift if x.shape[0] == n else 0)

    meanflow_loss(u, z, m, s_rows, t_rows, tangent=tangent).sum().backward()
    gradient = coefficients.grad
    assert gradient is not None
    error = gradient.mean(dim=0) / (gradient.std(dim=0) / n**0.5)
    assert error.abs().max() < 4, f"z-scores {error.tolist()}"


def test_noise_of_the_target_under_both_tangents():
    """Both lead to one regression; its target has the noise v - b itself, or what the map's derivative makes of it."""
    g = torch.Generator().manual_seed(3)
    z, m = gaussian_pairs(100_000, g)
    s, t = torch.zeros(len(z), dtype=torch.float64), torch.ones(len(z), dtype=torch.float64)
    target_noise = {kind: meanflow_loss(gaussian_u, z, m, s, t, tangent=kind).mean() for kind in ("map", "path")}
    # u is the true average velocity, so that the loss is the variance of its target: at s = 0, v - b = m, and the
    # path's tangent adds (du/dx) (v - b) with du/dx = STD - 1 to it, the derivative of the jump times v - b in all
    assert target_noise["map"] == pytest.approx(STD**2, rel=0.02)
    assert target_noise["path"] == pytest.approx((STD * STD) ** 2, rel=0.02)


def test_two_jumps_have_the_average_velocity_of_one():
    g = torch.Generator().manual_seed(5)
    x = torch.randn(100, 1, generator=g, dtype=torch.float64)
    s, t = torch.rand(2, 100, generator=g, dtype=torch.float64).sort(dim=0).values
    s[:10], t[:10] = 0.0, 1.0
    middle = sample_between(s, t, g)
    assert ((s <= middle) & (middle <= t)).all()
    assert (middle - s).gt(0).float().mean() > 0.9
    torch.testing.assert_close(semigroup_average(gaussian_u, x, s, t, middle), gaussian_u(x, s, t))


def test_two_draws_of_the_same_time_are_no_division_by_zero():
    """In single precision a pair of draws in sixteen million is one: a long training meets it, and lost all to it."""
    x, s = torch.tensor([[0.3], [0.7]]), torch.tensor([0.25, 0.5])
    t = torch.tensor([0.25, 1.0])
    middle = sample_between(s, t, torch.Generator().manual_seed(0))

    def u(x, a, b):
        return gaussian_u(x.double(), a.double(), b.double()).float()

    average = semigroup_average(u, x, s, t, middle)
    torch.testing.assert_close(average, u(x, s, t))
    loss = meanflow_loss(u, torch.ones(2, 1), x, s, t, 2, middle, tangent="semigroup")
    assert loss.isfinite().all()


def test_semigroup_loss_is_consistency_apart_and_flow_matching_together():
    """Rows with s < t have the noise-free target of an exact map, and only the others shape the noise."""
    g = torch.Generator().manual_seed(6)
    z, m = gaussian_pairs(64, g)
    z.requires_grad_(True)
    s, t, k = sample_times(64, generator=g)
    s, t = s.double(), t.double()
    middle = sample_between(s, t, g)
    losses = meanflow_loss(gaussian_u, z, m, s, t, k, middle, tangent="semigroup")
    assert losses[:k].max() < 1e-20
    torch.testing.assert_close(losses[k:], meanflow_loss(gaussian_u, z, m, s, t, k, tangent="path")[k:])
    torch.testing.assert_close(losses, meanflow_loss(gaussian_u, z, m, s, t, None, middle, tangent="semigroup"))
    wrong = meanflow_loss(lambda x, a, b: gaussian_u(x, a, b) + x * (b - a)[:, None] ** 2, z, m, s, t, k, middle,
                          tangent="semigroup")
    assert wrong[:k].mean() > 1e-3
    (gradient,) = torch.autograd.grad(wrong.sum(), z)
    assert (gradient[:k] == 0).all()
    assert (gradient[k:] != 0).all()
    with pytest.raises(ValueError, match="sample_between"):
        meanflow_loss(gaussian_u, z, m, s, t, k, tangent="semigroup")


def test_derivative_matches_finite_differences():
    g = torch.Generator().manual_seed(1)
    z, m = gaussian_pairs(50, g)
    s, t = torch.rand(2, 50, generator=g, dtype=torch.float64).sort(dim=0).values
    x, v = (1 - s[:, None]) * z + s[:, None] * m, m - z
    h = 1e-6
    numeric = (gaussian_u(x + h * v, s + h, t) - gaussian_u(x - h * v, s - h, t)) / (2 * h)
    torch.testing.assert_close(average_velocity_jvp(gaussian_u, x, s, t, v), numeric, rtol=1e-5, atol=1e-6)


def test_derivative_only_for_rows_with_distinct_times():
    seen = []

    def u(x, s, t):
        seen.append(len(x))
        return x * (t - s)[:, None]

    g = torch.Generator().manual_seed(2)
    z, m = torch.randn(2, 8, 3, generator=g)
    s, t, k = sample_times(8, distinct=0.25, generator=g)
    meanflow_loss(u, z, m, s, t, k)
    assert k == 2
    assert seen == [2, 8]  # two rows through the Jacobian-vector product, then all through the network
    seen.clear()
    meanflow_loss(u, z, m, s, s)
    assert seen == [8]


def test_loss_is_summed_over_the_state_and_reaches_the_noise():
    z = torch.zeros(2, 1, 4, 4, requires_grad=True)
    m = torch.full((2, 1, 4, 4), 3.0)
    half = torch.full((2,), 0.5)
    loss = meanflow_loss(lambda x, s, t: torch.zeros_like(x), z, m, half, half)
    assert loss.tolist() == [16 * 9.0, 16 * 9.0]
    loss.sum().backward()
    assert torch.equal(z.grad, torch.full_like(z, -6.0))


def test_times_are_ordered_and_shared_out():
    s, t, k = sample_times(600, distinct=0.5, one_step=1 / 3, generator=torch.Generator().manual_seed(0))
    assert k == 300
    assert (s[:k] < t[:k]).all()
    assert torch.equal(s[k:], t[k:])
    assert (s[:100] == 0).all() and (t[:100] == 1).all()  # noqa: PT018
    assert 0.4 < s[k:].mean() < 0.6
    with pytest.raises(ValueError, match="shares"):
        sample_times(4, distinct=1.5, generator=torch.Generator())


def test_kl_against_torch():
    g = torch.Generator().manual_seed(0)
    mean, log_std = torch.randn(2, 5, 2, 3, generator=g, dtype=torch.float64)
    q = torch.distributions.Normal(mean, log_std.exp())
    p = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(q, p).flatten(1).sum(dim=1)
    torch.testing.assert_close(gaussian_kl(mean, log_std), expected)


def test_scalings_leave_values_alone():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = scale_gradient(x, torch.tensor([0.5, 3.0]))
    assert torch.equal(y, x)
    y.sum().backward()
    assert x.grad.tolist() == [0.5, 3.0]
    loss = torch.tensor(20.0, requires_grad=True)
    normalise(loss, power=1.0, offset=0.0).backward()
    assert loss.grad.item() == pytest.approx(1 / 20)


def test_patches_tell_a_wrong_covariance_from_right_margins():
    """All pixels alike, or each by itself: the same N(0, 1) in every pixel, the same CRPS, another energy score."""
    g, n = torch.Generator().manual_seed(0), 4000
    truth, first, second = torch.randn(3, n, 1, 1, 1, generator=g).expand(3, n, 1, 8, 8)
    apart, further = torch.randn(2, n, 1, 8, 8, generator=g)

    def gap(score):
        """Score of the wrong law minus that of the right one, in standard errors."""
        difference = score(apart, further, truth) - score(first, second, truth)
        return float(difference.mean() / (difference.std() / n**0.5))

    assert abs(gap(pair_score)) < 4
    assert gap(patch_score) > 6


def test_patch_score_is_the_energy_score_of_a_patch():
    """On one patch at one scale: E|a - x| - E|a - b| / 2 in the norm over pixels, times pixels over its root."""
    g = torch.Generator().manual_seed(0)
    a, b, x = torch.rand(3, 5, 9, generator=g, dtype=torch.float64)
    norm = torch.linalg.vector_norm
    expected = 0.5 * (norm(a - x, dim=1) + norm(b - x, dim=1) - norm(a - b, dim=1)) * 9 / 3
    torch.testing.assert_close(patch_score(a, b, x), expected, rtol=1e-6, atol=1e-6)
    image = torch.rand(2, 1, 28, 28, generator=g).requires_grad_()
    gradient = torch.autograd.grad(patch_score(image, image.flip(3), image.detach()).sum(), image)[0]
    assert bool(torch.isfinite(gradient).all())  # where a sample is the truth itself
