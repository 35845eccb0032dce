"""Tiny models of the classes that users bring, at random initialisation: diffusers and deepinv."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers_models import autoencoder, dit, randn, sd3, seeded, unet

import invflow

diffusers = pytest.importorskip("diffusers")


def conditional_unet() -> Any:
    return seeded(lambda: diffusers.UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(4, 4), norm_num_groups=2, layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, attention_head_dim=2, time_cond_proj_dim=6))


def flux() -> Any:
    return seeded(lambda: diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=1,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8), guidance_embeds=True))


def flux2() -> Any:
    return seeded(lambda: diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=1,
        joint_attention_dim=8, axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=8))


def sana(**settings: Any) -> Any:
    return seeded(lambda: diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=4, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=4, patch_size=1, **settings))


def hunyuan(use_meanflow: bool) -> Any:
    return seeded(lambda: diffusers.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=(1, 1), text_embed_dim=8, rope_axes_dim=(4, 4), use_meanflow=use_meanflow))


def anyflow() -> Any:
    return seeded(lambda: diffusers.AnyFlowTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=8, ffn_dim=16, num_layers=1, rope_max_seq_len=16))


def aura() -> Any:
    return seeded(lambda: diffusers.AuraFlowTransformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=4, num_attention_heads=2, caption_projection_dim=8, joint_attention_dim=8,
        pos_embed_max_size=16))


def lumina2() -> Any:
    return seeded(lambda: diffusers.Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=2, cap_feat_dim=8, axes_dim_rope=(4, 2, 2),
        axes_lens=(16, 16, 16)))


def pixart() -> Any:
    return seeded(lambda: diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, cross_attention_dim=8,
        sample_size=4, patch_size=2, caption_channels=8, use_additional_conditions=False))


def cogview4() -> Any:
    return seeded(lambda: diffusers.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2, out_channels=4,
        text_embed_dim=8, time_embed_dim=8, condition_dim=4))


def qwen() -> Any:
    return seeded(lambda: diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4)))


def z_image() -> Any:
    return seeded(lambda: diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[16, 16, 16]))


TEXT = {"encoder_hidden_states": randn(1, 3, 8)}
MASK = {"encoder_attention_mask": torch.ones(1, 3, dtype=torch.bool)}


def of(model: Callable[[], Any], scheduler: str, vae: bool = False, settings: dict[str, Any] | None = None,
       **options: Any) -> Callable[[], invflow.FlowMap]:
    def build() -> invflow.FlowMap:
        made = getattr(diffusers, scheduler)(**(settings or {}))
        return invflow.from_diffusers(model(), made, autoencoder() if vae else None, **options)

    return build


def deepinv_prior(name: str, settings: dict[str, Any], **options: Any) -> Callable[[], invflow.FlowMap]:
    def build() -> invflow.FlowMap:
        models = pytest.importorskip("deepinv.models")
        network = seeded(lambda: getattr(models, name)(**settings))
        return invflow.from_deepinv(network, (3, 16, 16), **{"steps": 2, "sigma_max": 10.0, **options})

    return build


#: what it is, or what a refusal says
CLASSES: dict[str, tuple[Callable[[], invflow.FlowMap], str]] = {
    "UNet2DModel, DDPM": (of(unet, "DDPMScheduler", steps=2), "velocity"),
    "UNet2DModel, DDIM, learned variance": (of(lambda: unet(out_channels=4), "DDIMScheduler", steps=2), "velocity"),
    "UNet2DModel, Euler": (of(unet, "EulerDiscreteScheduler", steps=2), "velocity"),
    "UNet2DModel, DPM-Solver": (of(unet, "DPMSolverMultistepScheduler", steps=2), "velocity"),
    "UNet2DModel, UniPC": (of(unet, "UniPCMultistepScheduler", steps=2), "velocity"),
    "UNet2DModel, flow matching": (of(unet, "FlowMatchEulerDiscreteScheduler", steps=2), "velocity"),
    "UNet2DModel, flow matching, Heun": (of(unet, "FlowMatchHeunDiscreteScheduler", steps=2), "velocity"),
    "UNet2DModel, consistency": (of(unet, "CMStochasticIterativeScheduler"), "jump"),
    "UNet2DModel, TrigFlow": (of(unet, "SCMScheduler"), "jump"),
    "UNet2DModel, flow matching, LCM": (of(unet, "FlowMatchLCMScheduler"), "jump"),
    "UNet2DModel, EDM": (of(unet, "EDMEulerScheduler", steps=2), "invflow.from_deepinv"),
    "UNet2DModel, VE": (of(unet, "ScoreSdeVeScheduler", steps=2), "invflow.from_deepinv"),
    "UNet2DModel, flow map": (of(unet, "FlowMapEulerDiscreteScheduler"), "takes no second time"),
    "UNet2DModel without steps": (of(unet, "DDPMScheduler"), "pass steps"),
    "UNet2DConditionModel, LCM": (of(conditional_unet, "LCMScheduler", True, timestep_cond=randn(1, 6), **TEXT),
                                  "jump"),
    "UNet2DConditionModel, TCD": (of(conditional_unet, "TCDScheduler", True, **TEXT), "jump"),
    "UNet2DConditionModel without text": (of(conditional_unet, "DDPMScheduler", steps=2),
                                          r"also takes encoder_hidden_states: pass from_diffusers\(..."),
    "DiTTransformer2DModel": (of(dit, "DDIMScheduler", True, steps=2, class_labels=3), "velocity"),
    "SD3Transformer2DModel": (of(sd3, "FlowMatchEulerDiscreteScheduler", True, steps=2, encoder_hidden_states=randn(
        1, 3, 16), pooled_projections=randn(1, 12)), "velocity"),
    "FluxTransformer2DModel": (of(flux, "FlowMatchEulerDiscreteScheduler", steps=2, state_shape=(4, 4, 4), guidance=3.5,
                                  pooled_projections=randn(1, 8), **TEXT), "velocity"),
    "Flux2Transformer2DModel": (of(flux2, "FlowMatchEulerDiscreteScheduler", steps=2, state_shape=(4, 4, 4),
                                   guidance=3.5, **TEXT), "velocity"),
    "SanaTransformer2DModel": (of(lambda: sana(timestep_scale=0.5), "FlowMatchEulerDiscreteScheduler", steps=2, **TEXT),
                               "velocity"),
    "SanaTransformer2DModel, SCM": (of(lambda: sana(guidance_embeds=True), "SCMScheduler", guidance=0.45, **TEXT),
                                    "jump"),
    "HunyuanImage": (of(lambda: hunyuan(False), "FlowMatchEulerDiscreteScheduler", steps=2, state_shape=(4, 4, 4),
                        **TEXT, **MASK), "velocity"),
    "HunyuanImage, MeanFlow": (of(lambda: hunyuan(True), "FlowMatchEulerDiscreteScheduler", state_shape=(4, 4, 4),
                                  **TEXT, **MASK), "map"),
    "AnyFlow": (of(anyflow, "FlowMapEulerDiscreteScheduler", state_shape=(2, 4, 4, 4), **TEXT), "map"),
    "AuraFlowTransformer2DModel": (of(aura, "FlowMatchEulerDiscreteScheduler", steps=2, **TEXT), "velocity"),
    "Lumina2Transformer2DModel": (of(lumina2, "FlowMatchEulerDiscreteScheduler", steps=2, **TEXT, **MASK), "velocity"),
    "PixArtTransformer2DModel": (of(pixart, "DPMSolverMultistepScheduler", True, steps=2, added_cond_kwargs={
        "resolution": None, "aspect_ratio": None}, **TEXT), "velocity"),
    "QwenImageTransformer2DModel": (of(qwen, "FlowMatchEulerDiscreteScheduler", steps=2, state_shape=(4, 4, 4), **TEXT),
                                    "the timesteps of QwenImageTransformer2DModel are unknown"),
    "ZImageTransformer2DModel": (of(z_image, "FlowMatchEulerDiscreteScheduler", steps=2), "invflow.from_velocity"),
    "deepinv DRUNet": (deepinv_prior("DRUNet", {"nc": (4, 4, 4, 4), "nb": 1, "pretrained": None}), "velocity"),
    "deepinv NCSNpp": (deepinv_prior("NCSNpp", {"img_resolution": 16, "model_channels": 32, "channel_mult": [1, 1],
                                                "num_blocks": 1, "attn_resolutions": [8], "pretrained": None}),
                       "velocity"),
    "deepinv ADMUNet of classes": (deepinv_prior("ADMUNet", {
        "img_resolution": 16, "model_channels": 32, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [8],
        "label_dim": 5, "pretrained": None}, class_labels=torch.eye(5)[2:3]), "velocity"),
    "deepinv DiffUNet": (deepinv_prior("DiffUNet", {"pretrained": None}), "velocity"),
    "deepinv DnCNN": (deepinv_prior("DnCNN", {"depth": 3, "nf": 4, "pretrained": None}), "velocity"),
}
