"""Models for the tests of diffusers priors: exact networks of a Gaussian, and tiny ones of the real classes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")
F64 = torch.float64
SHAPE = (2, 4, 4)
MEAN, STD = 0.3, 0.5  # of the data states


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class FlowTransformer(nn.Module):
    """The call signature of SD3Transformer2DModel, and the exact noise - data of a Gaussian."""

    def __init__(self, trained: int = 1000) -> None:
        super().__init__()
        self.trained, self.seen, self.conditions = trained, [], []  # type: ignore[var-annotated]

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Any = None, pooled_projections: Any = None,
                timestep: Any = None, return_dict: bool = True) -> Any:
        self.seen.append(timestep)
        self.conditions.append((encoder_hidden_states, pooled_projections))
        sigma = (timestep / self.trained).reshape(-1, 1, 1, 1)
        variance = ((1 - sigma) * STD) ** 2 + sigma**2
        from_mean = hidden_states - (1 - sigma) * MEAN
        noise, data = sigma * from_mean / variance, MEAN + (1 - sigma) * STD**2 * from_mean / variance
        return (noise - data,) if not return_dict else SimpleNamespace(sample=noise - data)


class DiffusionUNet(nn.Module):
    """The call signature of UNet2DModel, and what an exact network of a Gaussian predicts, by the scheduler's table."""

    def __init__(self, scheduler: Any, whole: bool = True, learned_variance: bool = False) -> None:
        super().__init__()
        self.scheduler, self.whole, self.learned_variance = scheduler, whole, learned_variance

    def forward(self, sample: Tensor, timestep: Any, class_labels: Any = None, return_dict: bool = True) -> Any:
        k = torch.as_tensor(timestep, dtype=F64).expand(len(sample))
        table = self.scheduler.alphas_cumprod.to(F64)
        if self.whole:
            assert (k - k.round()).abs().max() < 1e-5, k
            square = table[k.round().long()]
        else:  # between the steps, by another rule than the library's
            low = k.floor().clamp(0, len(table) - 2).long()
            logs = (table / (1 - table)).log()
            square = torch.sigmoid(torch.lerp(logs[low], logs[low + 1], k - low))
        square = square.reshape(-1, 1, 1, 1)
        alpha, sigma = square.sqrt(), (1 - square).sqrt()
        from_mean = (sample - alpha * MEAN) / (square * STD**2 + 1 - square)
        data, noise = MEAN + alpha * STD**2 * from_mean, sigma * from_mean
        kind = self.scheduler.config.prediction_type
        out = {"epsilon": noise, "sample": data, "v_prediction": alpha * noise - sigma * data}[kind]
        out = torch.cat([out, 7 * out], dim=1) if self.learned_variance else out
        return (out,) if not return_dict else SimpleNamespace(sample=out)


def flow_scheduler(**settings: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


def seeded(build: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
        for p in model.parameters():  # last layers start at zero, which would hide everything behind them
            if not bool((p != 0).any()):
                nn.init.normal_(p, std=0.3)
        return model


def autoencoder() -> Any:
    return seeded(lambda: diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2, sample_size=8,
        up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(4, 4), latent_channels=4, norm_num_groups=2,
        layers_per_block=1, scaling_factor=1.5, shift_factor=0.06))


def sd3() -> Any:
    return seeded(lambda: diffusers.SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=12,
        pos_embed_max_size=4))


def unet(**settings: Any) -> Any:
    return seeded(lambda: diffusers.UNet2DModel(**{
        **dict(sample_size=4, in_channels=2, out_channels=2, block_out_channels=(4, 4), norm_num_groups=2,
               layers_per_block=1, attention_head_dim=2, down_block_types=("DownBlock2D",) * 2,
               up_block_types=("UpBlock2D",) * 2),
        **settings}))


def dit() -> Any:
    return seeded(lambda: diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, norm_num_groups=4,
        sample_size=4, patch_size=2, num_embeds_ada_norm=10))
