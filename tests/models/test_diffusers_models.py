"""Priors from the diffusers library: models of the real classes, their autoencoders and pipelines."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers_models import F64, SHAPE, autoencoder, dit, flow_scheduler, randn, sd3, seeded, unet
from torch import Tensor, nn

import invflow
from invflow import LatentFlowMap, from_diffusers
from invflow.testing import check_flow_map

diffusers = pytest.importorskip("diffusers")


# -- models of the real classes ---------------------------------------------------------------------------


def flux_prior() -> Any:
    model = seeded(lambda: diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=1,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8), guidance_embeds=True))
    return from_diffusers(model, flow_scheduler(use_dynamic_shifting=True), state_shape=(4, 4, 6), steps=2,
                          encoder_hidden_states=randn(1, 3, 8), pooled_projections=randn(1, 8, seed=1), guidance=3.5)


def sd3_prior() -> Any:
    return from_diffusers(sd3(), flow_scheduler(shift=3.0), autoencoder(), steps=2, method="euler",
                          encoder_hidden_states=randn(1, 3, 16), pooled_projections=randn(1, 12, seed=1))


def dit_prior() -> Any:
    return from_diffusers(dit(), diffusers.DDIMScheduler(), autoencoder(), steps=2, class_labels=3)


def conditional_unet_prior() -> Any:
    model = seeded(lambda: diffusers.UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(4, 4), norm_num_groups=2, layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, attention_head_dim=2))
    return from_diffusers(model, diffusers.DDPMScheduler(prediction_type="v_prediction"), autoencoder(), steps=2,
                          image_shape=(3, 8, 8), encoder_hidden_states=randn(1, 3, 8))


@pytest.mark.parametrize("build", [flux_prior, sd3_prior, dit_prior, conditional_unet_prior])
def test_real_classes_keep_the_contract(build: Callable[[], Any]) -> None:
    prior = build().double()
    assert not any(p.requires_grad for p in prior.parameters())
    check_flow_map(prior, exact=False, tolerance=0.1)


def test_flux_patches_are_where_they_were() -> None:
    """A model that gives its tokens back: packing and unpacking are inverse, and ids name row and column."""
    seen: dict[str, Tensor] = {}

    class Echo(nn.Module):
        def forward(self, hidden_states: Tensor, encoder_hidden_states: Any = None, timestep: Any = None,
                    img_ids: Any = None, txt_ids: Any = None, return_dict: bool = True) -> Any:
            seen.update(ids=img_ids, text=txt_ids, tokens=hidden_states, timestep=timestep)
            return (hidden_states,)

    prior = from_diffusers(Echo(), flow_scheduler(), steps=1, state_shape=(3, 4, 6), timestep_scale=1.0,
                           encoder_hidden_states=torch.zeros(1, 5, 2))
    x = randn(2, 3, 4, 6)
    torch.testing.assert_close(prior.velocity(x, 0.25), -x)
    torch.testing.assert_close(seen["timestep"], torch.full((2,), 0.75, dtype=F64))
    assert seen["text"].shape == (5, 3)
    # as FluxPipeline does it
    expected = diffusers.FluxPipeline._pack_latents(x, 2, 3, 4, 6)
    torch.testing.assert_close(seen["tokens"], expected)
    ids = diffusers.FluxPipeline._prepare_latent_image_ids(2, 2, 3, "cpu", F64)
    torch.testing.assert_close(seen["ids"], ids)


def test_forward_mode_passes_through_attention() -> None:
    prior, x = sd3_prior().double(), randn(2, 4, 4, 4)
    direction = randn(2, 4, 4, 4, seed=5)
    t, one = torch.full((2,), 0.4, dtype=F64), torch.ones(2, dtype=F64)
    _, tangent = torch.func.jvp(lambda a, b: prior.velocity(a, b), (x, t), (direction, one))
    h = 3e-5  # timesteps are 1000 times that, and the fastest of their sinusoids has frequency 1
    with torch.no_grad():
        ahead, behind = prior.velocity(x + h * direction, t + h), prior.velocity(x - h * direction, t - h)
    # the time features are float32
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * h), rtol=0.02, atol=0.02)


def test_half_precision_models_have_states_in_full_precision() -> None:
    prior = from_diffusers(unet().to(torch.bfloat16), diffusers.DDPMScheduler(), steps=1)
    assert prior.dtype == torch.float32
    assert prior.noise(2, generator=torch.Generator()).dtype == torch.float32
    out = prior.velocity(randn(2, *SHAPE).float(), 0.5)
    assert out.dtype == torch.float32
    full = from_diffusers(unet(), diffusers.DDPMScheduler(), steps=1).velocity(randn(2, *SHAPE).float(), 0.5)
    torch.testing.assert_close(out, full, rtol=0.1, atol=0.1)


# -- autoencoders and pipelines -----------------------------------------------------------------------------


def test_codes_are_scaled_and_shifted_as_the_pipelines_do() -> None:
    vae, prior = autoencoder(), sd3_prior().double()
    assert isinstance(prior, LatentFlowMap)
    assert (prior.state_shape, prior.image_shape, prior.decode_affine) == ((4, 4, 4), (3, 8, 8), None)
    code, image = randn(2, 4, 4, 4), torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=F64)
    vae = vae.eval().double()
    with torch.no_grad():
        # pipeline_stable_diffusion_3: latents / scaling_factor + shift_factor, then (image / 2 + 0.5)
        expected = vae.decode(code / 1.5 + 0.06).sample / 2 + 0.5
        torch.testing.assert_close(prior.decode(code), expected)
        mean = vae.encode(2 * image - 1).latent_dist.mean
        torch.testing.assert_close(prior.encode(image), (mean - 0.06) * 1.5)
    start = code.clone().requires_grad_()
    gradient = torch.autograd.grad(prior.decode(start).square().sum(), start)[0]
    h, direction = 1e-6, randn(2, 4, 4, 4, seed=7)
    with torch.no_grad():
        ahead, behind = (prior.decode(code + s * h * direction).square().sum() for s in (1, -1))
    torch.testing.assert_close((gradient * direction).sum(), (ahead - behind) / (2 * h), rtol=1e-5, atol=0)


def test_means_and_deviations_of_codes() -> None:
    class Identity(nn.Module):
        config = SimpleNamespace(scaling_factor=2.0, latents_mean=[1.0, 2.0], latents_std=[3.0, 4.0], shift_factor=None)

        def decode(self, z: Tensor, return_dict: bool = True) -> Any:
            return (z,)

        def encode(self, x: Tensor) -> Any:
            return SimpleNamespace(latents=x)

    prior = from_diffusers(unet(), diffusers.DDPMScheduler(), Identity(), steps=1).double()
    code = randn(3, *SHAPE)
    scale, shift = torch.tensor([1.5, 2.0], dtype=F64), torch.tensor([1.0, 2.0], dtype=F64)
    expected = code * scale[:, None, None] + shift[:, None, None]
    torch.testing.assert_close(prior.decode(code), expected / 2 + 0.5)
    torch.testing.assert_close(prior.encode(prior.decode(code)), code)


def test_pipelines_by_object_and_by_folder(tmp_path: Path) -> None:
    pipeline = diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler(prediction_type="v_prediction"))
    pipeline.save_pretrained(tmp_path)
    x = randn(2, *SHAPE).float()
    parts = from_diffusers(pipeline.unet, pipeline.scheduler, steps=2).jump(x, 0.0, 1.0)
    torch.testing.assert_close(from_diffusers(pipeline, steps=2).jump(x, 0.0, 1.0), parts)
    torch.testing.assert_close(from_diffusers(tmp_path, steps=2).jump(x, 0.0, 1.0), parts)
    latent = from_diffusers(diffusers.DiTPipeline(dit(), autoencoder(), diffusers.DDIMScheduler()), steps=1,
                            class_labels=2)
    assert latent.generate(1, generator=torch.Generator().manual_seed(0)).shape == (1, 3, 8, 8)


def test_import_is_lazy_and_helpful(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, invflow; invflow.from_diffusers; assert not {'diffusers', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(invflow.__file__).parents[1])
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'invflow\[diffusers\]'"):
        from_diffusers("somewhere", steps=1)
