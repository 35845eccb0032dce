"""Priors from the diffusers library: clocks, signs, scales and grids against Gaussians and its own schedulers."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers_models import F64, MEAN, SHAPE, STD, DiffusionUNet, FlowTransformer, flow_scheduler, randn, sd3, unet
from torch import nn

from invflow import GaussianMixtureFlow, from_diffusers

diffusers = pytest.importorskip("diffusers")


def gaussian() -> GaussianMixtureFlow:
    return GaussianMixtureFlow(torch.full((1, *SHAPE), MEAN, dtype=F64), STD)


# -- flow matching --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("trained", "shift"), [(1000, 1.0), (1000, 3.0), (250, 3.0)])
def test_velocity_of_flow_matching_has_our_sign_and_time(trained: int, shift: float) -> None:
    network = FlowTransformer(trained)
    prior = from_diffusers(network, flow_scheduler(num_train_timesteps=trained, shift=shift), state_shape=SHAPE,
                           steps=40, timestep_scale=trained).double()
    exact, x = gaussian(), randn(20, *SHAPE)
    times = torch.linspace(0, 1, 20, dtype=F64)
    torch.testing.assert_close(prior.velocity(x, times), exact.velocity(x, times), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(prior.score(x, 0.3), exact.score(x, 0.3), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(network.seen[0], trained * (1 - times))
    error = (prior.jump(x, 0.0, 1.0) - exact.jump(x, 0.0, 1.0)).square().mean().sqrt()
    assert error < 2e-3  # second order, 40 steps
    assert prior.decode_affine == (0.5, 0.5)


@pytest.mark.parametrize("settings", [{}, {"shift": 3.0}, {"shift": 0.5}, {"use_dynamic_shifting": True},
                                      {"use_dynamic_shifting": True, "time_shift_type": "linear"}])
def test_euler_steps_are_those_of_the_scheduler(settings: dict[str, Any]) -> None:
    """Shift and dynamic shift: the scheduler's own loop, in float32 as it runs it."""
    steps, model, scheduler = 6, sd3(), flow_scheduler(**settings)
    condition = {"encoder_hidden_states": randn(1, 3, 16).float(), "pooled_projections": randn(1, 12, seed=1).float()}
    x = z = randn(3, 4, 4, 4, seed=2).float()
    # 4 tokens on a line through (256 tokens, 0.5) and (4096 tokens, 1.15)
    mu = 0.5 + (4 - 256) * (1.15 - 0.5) / (4096 - 256) if "use_dynamic_shifting" in settings else None
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    rows = {k: v.expand(3, *v.shape[1:]) for k, v in condition.items()}
    model.eval()
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = model(hidden_states=x, timestep=t.expand(3), **rows, return_dict=False)[0]
            x = scheduler.step(out, t, x, return_dict=False)[0]
        prior = from_diffusers(model, scheduler, steps=steps, method="euler", **condition)
        ours = prior.jump(z, 0.0, 1.0)
    scale = float((x - z).square().mean().sqrt())
    assert scale > 0.05
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5 * max(1.0, scale))
    with torch.no_grad():
        other = from_diffusers(model, flow_scheduler(shift=8.0), steps=steps, method="euler", **condition)
        assert (other.jump(z, 0.0, 1.0) - x).abs().max() > 1e-3 * scale  # the comparison sees a wrong shift


def test_shift_of_the_caller_wins_and_grid_maps_invert() -> None:
    prior = from_diffusers(FlowTransformer(), flow_scheduler(shift=3.0), state_shape=SHAPE, steps=2, shift=5.0,
                           timestep_scale=1000)
    assert prior.path.shift == 5.0
    u = torch.linspace(0, 1, 11, dtype=F64)
    sigma = 5.0 * (1 - u) / (1 + 4.0 * (1 - u))
    torch.testing.assert_close(prior.path.to_time(u), 1 - sigma)
    torch.testing.assert_close(prior.path.to_position(prior.path.to_time(u)), u)


# -- variance-preserving diffusion ------------------------------------------------------------------------


SCHEDULES = [("linear", {}), ("scaled_linear", {"beta_start": 0.00085, "beta_end": 0.012}), ("squaredcos_cap_v2", {})]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("schedule", "betas"), SCHEDULES)
def test_diffusion_becomes_the_linear_path(schedule: str, betas: dict[str, float], prediction: str) -> None:
    """At the training steps everything is exact: the scheduler's own noising, and the flow of a Gaussian."""
    scheduler = diffusers.DDIMScheduler(beta_schedule=schedule, prediction_type=prediction, **betas)
    prior = from_diffusers(DiffusionUNet(scheduler), scheduler, state_shape=SHAPE, steps=5).double()
    k = torch.tensor([0, 1, 10, 300, 700, 900, 990])
    square = scheduler.alphas_cumprod.to(F64)[k]
    t = square.sqrt() / (square.sqrt() + (1 - square).sqrt())
    column = t.reshape(-1, 1, 1, 1)
    m, z = MEAN + STD * randn(7, *SHAPE, seed=3), randn(7, *SHAPE)
    x = (1 - column) * z + column * m
    scale = (square.sqrt() + (1 - square).sqrt()).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(scheduler.add_noise(m, z, k), scale * x)
    exact = gaussian()
    torch.testing.assert_close(prior.velocity(x, t), exact.velocity(x, t), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(prior.denoise(x, t), exact.denoise(x, t), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_diffusion_between_its_steps_and_at_the_ends(prediction: str) -> None:
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction)
    network = DiffusionUNet(scheduler, whole=False)
    prior = from_diffusers(network, scheduler, state_shape=SHAPE, steps=50).double()
    exact, z = gaussian(), randn(20, *SHAPE)
    for t in (0.02, 0.31, 0.77, 0.97):
        torch.testing.assert_close(prior.velocity(z, t), exact.velocity(z, t), rtol=0, atol=2e-3)
    # at t = 0 the model, whose training ends at t = 0.0063, is asked there; the last step is at t = 0.99
    torch.testing.assert_close(prior.velocity(z, 0.0), exact.velocity(z, 0.0), rtol=0, atol=0.02)
    x = MEAN + STD * z
    torch.testing.assert_close(prior.velocity(x, 1.0), exact.velocity(x, 1.0), rtol=0, atol=0.15)
    error = (prior.jump(z, 0.0, 1.0) - exact.jump(z, 0.0, 1.0)).square().mean().sqrt()
    assert error < 5e-3


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_before_its_first_time_the_model_sees_the_noise_of_that_time(prediction: str) -> None:
    """Training that ends with 7% of signal: pure noise z is asked about as sigma z, and the velocity is data - z."""
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                                        prediction_type=prediction)
    prior = from_diffusers(DiffusionUNet(scheduler), scheduler, state_shape=SHAPE, steps=2).double()
    z, square = randn(5, *SHAPE), scheduler.alphas_cumprod.to(F64)[-1]
    data = MEAN + square.sqrt() * STD**2 * ((1 - square).sqrt() * z - square.sqrt() * MEAN) / (
        square * STD**2 + 1 - square)
    torch.testing.assert_close(prior.velocity(z, 0.0), data - z, rtol=1e-6, atol=1e-6)
    assert float(square.sqrt()) > 0.06


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_euler_steps_are_deterministic_ddim(prediction: str) -> None:
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction, clip_sample=False)
    model = unet().eval()
    scheduler.set_timesteps(10)
    steps = scheduler.timesteps.tolist()
    assert (steps[0], steps[-1]) == (900, 0)
    square = scheduler.alphas_cumprod.to(F64)[steps]
    scale = square.sqrt() + (1 - square).sqrt()
    prior = from_diffusers(model, scheduler, steps=9, method="euler").double()
    x = randn(3, *SHAPE)
    noisy = scale[0] * x
    with torch.no_grad():
        for k in steps[:-1]:
            noisy = scheduler.step(model(noisy, k).sample, k, noisy).prev_sample
        times = (square.sqrt() / scale)[[0, -1]].tolist()
        ours = prior.jump(x, *times)
    # the scheduler's table is float32
    torch.testing.assert_close(scale[-1] * ours, noisy, rtol=1e-5, atol=1e-5)
    assert (noisy - x).abs().max() > 0.3


def test_zero_terminal_signal() -> None:
    """Betas rescaled to no signal at the last step: t = 0 is a training step, for v and sample predictions."""
    for prediction in ("v_prediction", "sample", "epsilon"):
        scheduler = diffusers.DDIMScheduler(prediction_type=prediction, rescale_betas_zero_snr=True)
        assert scheduler.alphas_cumprod[-1] == 0
        prior = from_diffusers(DiffusionUNet(scheduler), scheduler, state_shape=SHAPE, steps=4).double()
        z = randn(4, *SHAPE)
        loose = prediction == "epsilon"  # which is not asked where there is no signal
        torch.testing.assert_close(prior.velocity(z, 0.0), gaussian().velocity(z, 0.0), rtol=0,
                                   atol=0.02 if loose else 1e-5)
        grid = prior.path.to_position(torch.linspace(0, 1, 50, dtype=F64))
        assert (float(grid[0]), float(grid[-1])) == (0.0, 1.0)
        assert (grid.diff() > 0).all()


def test_learned_variance_is_cut_off() -> None:
    scheduler = diffusers.DDPMScheduler()
    options = dict(state_shape=SHAPE, steps=2)
    with_variance = from_diffusers(DiffusionUNet(scheduler, False, True), scheduler, **options).double()
    plain, x = from_diffusers(DiffusionUNet(scheduler, False), scheduler, **options).double(), randn(3, *SHAPE)
    torch.testing.assert_close(with_variance.velocity(x, 0.4), plain.velocity(x, 0.4))


# -- conditions -------------------------------------------------------------------------------------------


def test_conditions_are_expanded_and_move() -> None:
    network = FlowTransformer()
    prior = from_diffusers(network, flow_scheduler(), state_shape=SHAPE, steps=1, timestep_scale=1000,
                           encoder_hidden_states=torch.ones(1, 3, 5), pooled_projections={"inner": 2})
    prior.velocity(randn(4, *SHAPE), 0.5)
    text, pooled = network.conditions[-1]
    assert text.shape == (4, 3, 5)
    assert text.dtype == F64  # a model without weights works in the type of the states
    assert pooled["inner"].tolist() == [2] * 4
    assert prior.to("meta").network.condition.value_encoder_hidden_states.device.type == "meta"


def test_guidance_mixes_two_predictions_and_counts_both() -> None:
    scheduler = diffusers.DDIMScheduler()
    model = unet(num_class_embeds=4)
    options = dict(steps=3, method="euler")
    one, none = (from_diffusers(model, scheduler, class_labels=k, **options).double() for k in (1, 3))
    guided = from_diffusers(model, scheduler, class_labels=1, guidance_scale=2.5, unconditional={"class_labels": 3},
                            **options).double()
    x = randn(2, *SHAPE)
    with torch.no_grad():
        v, v_0 = one.velocity(x, 0.4), none.velocity(x, 0.4)
        assert (v - v_0).abs().max() > 1e-3
        torch.testing.assert_close(guided.velocity(x, 0.4), v_0 + 2.5 * (v - v_0), rtol=1e-5, atol=1e-5)
        with guided.count() as calls:
            guided.jump(x, 0.0, 1.0)
    assert calls.forward == 2 * 2 * 3


@pytest.mark.parametrize(("build", "error", "words"), [
    (lambda: from_diffusers(unet(), steps=2), ValueError, "pass its scheduler"),
    (lambda: from_diffusers(unet(), diffusers.DDPMScheduler(), steps=0), ValueError, "at least 1 step"),
    (lambda: from_diffusers(unet(), diffusers.DDPMScheduler(), steps=1, method="verlet"), ValueError, "choose one of"),
    (lambda: from_diffusers(unet(), diffusers.DDPMScheduler(), steps=1, shift=2.0), ValueError, "flow matching"),
    (lambda: from_diffusers(unet(), flow_scheduler(invert_sigmas=True), steps=1), ValueError, "run in reverse"),
    (lambda: from_diffusers(unet(), flow_scheduler(), steps=1, shift=-1.0), ValueError, "over 0"),
    (lambda: from_diffusers(unet(), diffusers.EDMEulerScheduler(), steps=1), ValueError, "from_velocity"),
    (lambda: from_diffusers(unet(), diffusers.DDPMScheduler(), steps=1, clas_labels=1), TypeError, "clas_labels"),
    (lambda: from_diffusers(unet(), diffusers.DDPMScheduler(), steps=1, timestep=1), TypeError, "is set by"),
    (lambda: from_diffusers(unet(), diffusers.DDPMScheduler(), steps=1, class_labels=torch.zeros(3)), ValueError,
     "one row"),
    (lambda: from_diffusers(unet(), diffusers.DDPMScheduler(), steps=1, guidance_scale=2.0), ValueError, "needs both"),
    (lambda: from_diffusers(FlowTransformer(), flow_scheduler(), steps=1, state_shape=SHAPE), ValueError,
     "timestep_scale"),
    (lambda: from_diffusers(unet(sample_size=None), diffusers.DDPMScheduler(), steps=1), ValueError, "state_shape="),
    (lambda: from_diffusers(unet(), diffusers.DDPMScheduler(), steps=1, state_shape=(2, 8, 8), image_shape=(2, 4, 4)),
     ValueError, "differ"),
    (lambda: from_diffusers(nn.Linear(2, 2), diffusers.DDPMScheduler(), steps=1), TypeError, "cannot wrap this model"),
    (lambda: from_diffusers(SimpleNamespace(), steps=1), TypeError, "pass the parts"),
])
def test_refusals(build: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        build()


def test_model_that_changes_the_shape_is_refused() -> None:
    prior = from_diffusers(unet(out_channels=3), diffusers.DDPMScheduler(), steps=1)
    with pytest.raises(ValueError, match="keep the shape"):
        prior.velocity(torch.zeros(1, *SHAPE), 0.5)


def test_gaussian_prior_is_sampled() -> None:
    prior = from_diffusers(FlowTransformer(), flow_scheduler(shift=2.0), state_shape=SHAPE, steps=20,
                           timestep_scale=1000).double()
    images = prior.generate(400, generator=torch.Generator().manual_seed(0), chunk_size=130)
    count = images.numel()
    assert abs(float(images.mean()) - (MEAN / 2 + 0.5)) < 4.5 * STD / 2 / math.sqrt(count)
    assert abs(float(images.std()) - STD / 2) < 4.5 * STD / 2 / math.sqrt(2 * count)
