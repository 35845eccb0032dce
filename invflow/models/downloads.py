"""Priors by name whose weights deepinv downloads on first use, each with its file, licence and range of noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from invflow._core.ode import Time, expand_time
from invflow._core.plugins import nearest
from invflow.models.wrappers import DenoiserFlow

__all__ = ["DOWNLOADS", "Download", "PartialDenoiserFlow", "load_download"]

#: tolerance at the end of a range, for the rounding of times
_SLACK = 1e-4


@dataclass(frozen=True)
class Download:
    """One prior whose weights are downloaded.

    Attributes:
        network: Class in ``deepinv.models``.
        file: File that deepinv downloads.
        megabytes: Approximate size of the file; its numbers are in single precision.
        licence: Licence of the weights, as stated by their authors.
        image_shape: (C, H, W) of the training images.
        sigma_max: Largest noise level in training, on images in [0, 1].
        sigma_min: Smallest noise level in training.
        options: Options of the class.
        condition: Names of its other required arguments.
    """

    network: str
    file: str
    megabytes: int
    licence: str
    image_shape: tuple[int, int, int]
    sigma_max: float
    sigma_min: float = 1e-3
    options: dict[str, Any] = field(default_factory=dict)
    condition: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether its largest noise level hides the data completely: only then can a prior start from noise."""
        return self.sigma_max >= 10

    def describe(self) -> str:
        """Description in one line."""
        use = "" if self.whole else ", for plug-and-play only"
        shape = " x ".join(map(str, self.image_shape))
        return (f"denoiser, {shape}, noise up to {self.sigma_max:g}{use}; {self.megabytes} MB on first use, "
                f"{self.licence}")


#: as stated on the pages that host the files, https://huggingface.co/deepinv/drunet and .../diffunet. The networks of
#: the latter were trained by others: the one on FFHQ is from https://github.com/jychoi118/ilvr_adm, which states no
#: licence for it; the one on ImageNet is from https://github.com/openai/guided-diffusion, under MIT
_HOSTED = "hosted under BSD-3-Clause"
_UNCLEAR = "hosted under BSD-3-Clause, its authors' licence unknown (see github.com/jychoi118/ilvr_adm)"
_OPENAI = "MIT, hosted under BSD-3-Clause"
#: licence of everything in https://github.com/NVlabs/edm
_EDM = "CC BY-NC-SA 4.0"
#: noise levels. DRUNet: its authors trained up to 50/255 (https://github.com/cszn/DPIR); deepinv states 20/255 for its
#: own first weights, and nothing for those that it downloads now, which were fine-tuned further. DiffUNet: the range of
#: its table of noise levels, on images in [0, 1]. EDM: the first and last level of its authors' samplers, 80 and
#: 0.002 on images in [-1, 1]
DOWNLOADS = {
    "deepinv/drunet": Download("DRUNet", "drunet_deepinv_color_finetune_22k.pth", 131, _HOSTED, (3, 256, 256),
                               50 / 255),
    "deepinv/drunet-grey": Download("DRUNet", "drunet_deepinv_gray_finetune_26k.pth", 131, _HOSTED, (1, 256, 256),
                                    50 / 255, options={"in_channels": 1, "out_channels": 1}),
    "deepinv/ffhq-diffunet": Download("DiffUNet", "diffusion_ffhq_10m.pt", 374, _UNCLEAR, (3, 256, 256), 78.0,
                                      5e-3),
    "deepinv/imagenet-diffunet": Download("DiffUNet", "diffusion_openai.pt", 2211, _OPENAI, (3, 256, 256), 78.0, 5e-3,
                                          {"large_model": True}),
    "deepinv/ffhq64-ncsnpp": Download("NCSNpp", "edm-ffhq-64x64-uncond-ve.pt", 251, _EDM, (3, 64, 64),
                                      40.0),
    "deepinv/imagenet64-adm": Download("ADMUNet", "adm-imagenet64-cond.pt", 1184, _EDM, (3, 64, 64), 40.0,
                                       condition=("class_labels",)),
}


class PartialDenoiserFlow(DenoiserFlow):
    """A denoiser for low noise only: it covers the end of a path and cannot start from pure noise."""

    def denoise(self, x: Tensor, t: Time) -> Tensor:
        """The denoiser's estimate, at noise levels that it was trained for.

        Raises:
            ValueError: For a time with more noise.
        """
        earliest = float(expand_time(t, x).min())
        if earliest < self.first_time - _SLACK:
            level = (1 - earliest) / (2 * max(earliest, 1e-12))
            known = (1 - self.first_time) / (2 * self.first_time)
            raise ValueError(f"this denoiser was trained for noise up to {known:.3g} on images in [0, 1], not at "
                             f"{level:.3g}: use it for plug-and-play restoration, such as invflow.PlugAndPlay(prior, "
                             f"first={known:.2g}), or use a prior that starts from pure noise: deepinv/ffhq-diffunet")
        return super().denoise(x, t)


def load_download(name: str, *, steps: int = 20, image_shape: tuple[int, ...] | None = None,
                  **condition: Any) -> DenoiserFlow:
    """Load a prior by name, through deepinv's own ``pretrained="download"``.

    Args:
        name: Key of :data:`DOWNLOADS`.
        steps: Midpoint steps of one jump.
        image_shape: (C, H, W) of the images; default: that of the training images.
        **condition: Arguments that its entry requires, such as ``class_labels``.

    Raises:
        ValueError: For an unknown name; the message gives the nearest known one.
        ImportError: Without deepinv.
        OSError: If the file is neither found nor downloadable; the message says where to put it.
    """
    if name not in DOWNLOADS:
        raise ValueError(f"there is no prior {name!r}: {nearest(name, list(DOWNLOADS))}")
    entry = DOWNLOADS[name]
    missing = [key for key in entry.condition if key not in condition]
    if missing:
        raise TypeError(f"{name} generates images of one class: pass load_download({name!r}, {missing[0]}=...)")
    try:
        from deepinv import models
    except ImportError as error:
        raise ImportError(f"{name} needs deepinv: pip install deepinv") from error
    network = _fetched(name, entry, lambda: getattr(models, entry.network)(pretrained="download", **entry.options))
    made = DenoiserFlow if entry.whole else PartialDenoiserFlow
    return made(network, image_shape or entry.image_shape, steps=steps, sigma_max=entry.sigma_max,
                sigma_min=entry.sigma_min, condition=condition)


def _fetched(name: str, entry: Download, build: Callable[[], Any]) -> Any:
    state = torch.get_rng_state()
    try:
        return build().eval().requires_grad_(False)
    except OSError as error:  # from urllib or the file system
        folder = f"{torch.hub.get_dir()}/checkpoints"
        raise OSError(f"{name} needs the file {entry.file} ({entry.megabytes} MB), which could not be downloaded "
                      f"({error}): put it into {folder}, or set TORCH_HOME to the folder that has "
                      "hub/checkpoints") from error
    finally:
        torch.set_rng_state(state)  # building the network draws random weights
