"""Models that users bring, at random initialisation: they work, or the error says what to do; schedulers' own steps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers_models import SHAPE, randn, unet
from prior_classes import CLASSES, TEXT, anyflow, diffusers, flux2, hunyuan, sana
from torch import Tensor

import invflow
from invflow import from_diffusers


@pytest.mark.parametrize("name", list(CLASSES))
def test_it_works_or_says_what_to_do(name: str) -> None:
    build, wanted = CLASSES[name]
    if wanted not in ("velocity", "map", "jump"):
        with pytest.raises((TypeError, ValueError), match=wanted):
            build()
        return
    state = torch.get_rng_state()
    prior = build()
    assert prior.has_velocity == (wanted != "jump")
    with prior.count() as calls:
        images = prior.generate(2, generator=torch.Generator().manual_seed(0))
    assert images.shape == (2, *prior.image_shape)
    assert images.isfinite().all()
    assert calls.forward == (2 * 2 * 2 if wanted == "velocity" else 2)  # two midpoint steps, or one call a draw
    torch.testing.assert_close(prior.generate(2, generator=torch.Generator().manual_seed(0)), images)
    assert torch.equal(torch.get_rng_state(), state) or "deepinv" in name  # whose constructors draw first weights
    if wanted == "jump":
        with pytest.raises(ValueError, match=r"FMTT needs a score.*invflow.NoiseSMC\(prior\)"):
            invflow.FMTT(prior)
        assert prior.generate(2, 3, generator=torch.Generator().manual_seed(0)).isfinite().all()


# -- the schedulers' own loops, with the same noises ----------------------------------------------------------------


def noises(steps: int, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, list[Tensor]]:
    """A start and what a scheduler draws afterwards from a generator of seed 7."""
    g = torch.Generator().manual_seed(7)
    fresh = [torch.randn(2, *shape, generator=g) for _ in range(steps - 1)]
    return randn(2, *shape, seed=3).float(), fresh


def own_loop(scheduler: Any, model: Any, z: Tensor, steps: int, scale: float = 1.0, **settings: Any) -> Tensor:
    scheduler.set_timesteps(steps if not settings else None, **settings)
    g, x = torch.Generator().manual_seed(7), z * scale
    with torch.no_grad():
        for t in scheduler.timesteps:
            given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            out = model(given, t.expand(2), return_dict=False)[0]
            extra = {"eta": 1.0} if type(scheduler).__name__ == "TCDScheduler" else {}
            x = scheduler.step(out, t, x, generator=g, return_dict=False, **extra)[0]
    return x


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_latent_consistency_steps_are_the_scheduler_s(steps: int, prediction: str) -> None:
    model, scheduler = unet().eval(), diffusers.LCMScheduler(prediction_type=prediction)
    z, fresh = noises(steps)
    prior = from_diffusers(model, scheduler)
    with torch.no_grad():
        torch.testing.assert_close(prior.flow(z, steps, *fresh), own_loop(scheduler, model, z, steps), rtol=1e-3,
                                   atol=1e-3)


@pytest.mark.parametrize("steps", [1, 3])
def test_consistency_steps_are_the_scheduler_s(steps: int) -> None:
    model = unet().eval()
    scheduler = diffusers.CMStochasticIterativeScheduler(clip_denoised=False)
    z, fresh = noises(steps)
    prior = from_diffusers(model, scheduler)
    with torch.no_grad():  # the scheduler adds sqrt(sigma^2 - sigma_min^2) of noise, which is sigma to 1e-5
        torch.testing.assert_close(prior.flow(z, steps, *fresh), own_loop(scheduler, model, z, steps, 80.0), rtol=1e-3,
                                   atol=1e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_consistency_steps_are_the_scheduler_s(shift: float) -> None:
    model, scheduler = unet().eval(), diffusers.FlowMatchLCMScheduler(shift=shift)
    z, fresh = noises(3)
    prior = from_diffusers(model, scheduler)
    with torch.no_grad():
        own = own_loop(scheduler, model, z, 3, sigmas=np.linspace(1, 1 / 3, 3).tolist())
        torch.testing.assert_close(prior.flow(z, 3, *fresh), own, rtol=1e-4, atol=1e-4)


def test_trigonometric_steps_are_the_scheduler_s() -> None:
    model, scheduler = unet().eval(), diffusers.SCMScheduler()
    z, fresh = noises(2)
    prior = from_diffusers(model, scheduler)
    own = diffusers.SCMScheduler()
    own.set_timesteps(2)
    g, x = torch.Generator().manual_seed(7), 0.5 * z
    with torch.no_grad():
        for t in own.timesteps[:-1]:
            out = 0.5 * model(x / 0.5, t.expand(2), return_dict=False)[0]
            x, clean = own.step(out, t, x, generator=g, return_dict=False)
        torch.testing.assert_close(prior.flow(z, 2, *fresh), clean / 0.5, rtol=1e-3, atol=1e-3)


def test_sana_sprint_s_steps_are_its_pipeline_s() -> None:
    """Its transformer predicts noise - data of the linear path; the pipeline turns that into TrigFlow's F and back."""
    model, spread = sana(guidance_embeds=True).eval(), 0.5
    z, fresh = noises(2, (4, 4, 4))
    prior = from_diffusers(model, diffusers.SCMScheduler(), guidance=0.45, **TEXT)
    own = diffusers.SCMScheduler()
    own.set_timesteps(2)
    g, x = torch.Generator().manual_seed(7), spread * z
    text = TEXT["encoder_hidden_states"].float().expand(2, -1, -1)
    with torch.no_grad():
        for t in own.timesteps[:-1]:
            share = torch.sin(t) / (torch.cos(t) + torch.sin(t))
            norm = math.sqrt(float(share**2 + (1 - share) ** 2))
            linear = x / spread * norm
            out = model(linear, encoder_hidden_states=text, timestep=share.expand(2), guidance=torch.full((2,), 0.45),
                        return_dict=False)[0]
            turned = ((1 - 2 * share) * linear + norm**2 * out) / norm
            x, clean = own.step(turned * spread, t, x, generator=g, return_dict=False)
        torch.testing.assert_close(prior.flow(z, 2, *fresh), clean / spread, rtol=1e-3, atol=1e-3)


def test_tcd_is_its_own_jump_to_data() -> None:
    """With gamma 1 the scheduler goes to step 0, whose share of noise is 0.029, and adds noise from there."""
    model, scheduler = unet().eval(), diffusers.TCDScheduler()
    z = noises(1)[0]
    with torch.no_grad():
        out = model(z, torch.tensor([999, 999]), return_dict=False)[0]
        square = scheduler.alphas_cumprod[999]
        torch.testing.assert_close(from_diffusers(model, scheduler).jump(z, 0.0, 1.0),
                                   (z - (1 - square).sqrt() * out) / square.sqrt(), rtol=1e-3, atol=1e-3)


def test_flow_map_steps_are_the_scheduler_s() -> None:
    model, scheduler = anyflow().eval(), diffusers.FlowMapEulerDiscreteScheduler()
    z = randn(2, 2, 4, 4, 4, seed=3).float()
    prior = from_diffusers(model, scheduler, state_shape=(2, 4, 4, 4), **TEXT)
    scheduler.set_timesteps(3)
    text, x = TEXT["encoder_hidden_states"].float().expand(2, -1, -1), z
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            now, then = t.float().expand(2, 2), (scheduler.sigmas[i + 1] * 1000).float().expand(2, 2)
            out = model(x, timestep=now, r_timestep=then, encoder_hidden_states=text, return_dict=False)[0]
            x = scheduler.step(out, t, x, return_dict=False)[0]
        torch.testing.assert_close(prior.flow(z, 3), x, rtol=1e-4, atol=1e-4)


def test_mean_flow_of_hunyuan_passes_where_the_jump_ends() -> None:
    seen: list[tuple[Any, Any]] = []
    model = hunyuan(True)
    model.register_forward_pre_hook(
        lambda _, args, given: seen.append((given["timestep"], given["timestep_r"])), with_kwargs=True)
    mask = {"encoder_attention_mask": torch.ones(1, 3, dtype=torch.bool)}
    prior = from_diffusers(model, diffusers.FlowMatchEulerDiscreteScheduler(), state_shape=(4, 4, 4), **TEXT, **mask)
    prior.jump(torch.zeros(1, 4, 4, 4), 0.2, 0.6)
    torch.testing.assert_close(torch.cat(seen[0]), torch.tensor([800.0, 400.0]))


def test_clock_of_sana_is_its_configuration_s() -> None:
    seen: list[Tensor] = []
    for scale in (1.0, 0.001):
        model = sana(timestep_scale=scale)
        model.register_forward_pre_hook(lambda _, args, given: seen.append(given["timestep"]), with_kwargs=True)
        from_diffusers(model, diffusers.FlowMatchEulerDiscreteScheduler(), steps=1, **TEXT).velocity(
            torch.zeros(1, 4, 4, 4), 0.25)
    torch.testing.assert_close(torch.cat(seen), torch.tensor([750.0, 0.75]))


def test_places_of_flux_2_are_its_pipeline_s() -> None:
    seen: dict[str, Tensor] = {}
    model = flux2()
    model.register_forward_pre_hook(lambda _, args, given: seen.update(given), with_kwargs=True)
    prior = from_diffusers(model, diffusers.FlowMatchEulerDiscreteScheduler(), steps=1, state_shape=(4, 4, 6),
                           guidance=3.5, **TEXT)
    x = randn(2, 4, 4, 6).float()
    prior.velocity(x, 0.25)
    pipeline = diffusers.Flux2Pipeline
    patches = pipeline._patchify_latents(x)
    torch.testing.assert_close(seen["hidden_states"], pipeline._pack_latents(patches))
    torch.testing.assert_close(seen["img_ids"], pipeline._prepare_latent_ids(patches)[0].float())
    torch.testing.assert_close(seen["txt_ids"], pipeline._prepare_text_ids(torch.zeros(1, 3, 8))[0].float())
    torch.testing.assert_close(seen["timestep"], torch.full((2,), 0.75))
