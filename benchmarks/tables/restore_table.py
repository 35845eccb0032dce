"""Check that ``invflow restore`` does not degrade noisy photographs: PSNR of the file and of the result.

``python -m benchmarks.tables.restore_table`` uses 128 x 128 pixels of each of twenty images from scikit-image and
scikit-learn, with five given noise levels. It compares the result with the VFM's mean alone and with scikit-image's
non-local means. It takes two minutes on one core.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import invflow
from benchmarks.tables.noise_table import photograph
from invflow.metrics import psnr
from invflow.operators import Denoising
from invflow.restore.posterior import posterior_of, told

__all__ = ["main"]

NAMES = ("china", "flower", "astronaut", "chelsea", "coffee", "rocket", "motorcycle", "grass", "gravel", "brick",
         "camera", "coins", "moon", "retina", "immunohistochemistry", "hubble_deep_field", "cell", "clock", "page",
         "text")
LEVELS = (0.005, 0.01, 0.02, 0.04, 0.1)


def _quality(x: Tensor, truth: Tensor) -> float:
    return float(psnr(x[None], truth[None])[0])


def main() -> None:
    """Print the table."""
    from skimage.restoration import denoise_nl_means

    vfm, worst = invflow.VFM.load("photos"), 0.0
    print("picture               sigma  file   VFM    restored  non-local means")
    for name in NAMES:
        x = photograph(name)[0, :, 72:200, 72:200]
        for sigma in LEVELS:
            g = torch.Generator().manual_seed(0)
            y = (x + sigma * torch.randn(x.shape, generator=g))[None]
            operator = Denoising(tuple(x.shape))
            alone = float("nan")
            if len(x) == 3:
                level = told(vfm, operator, sigma)
                alone = _quality(vfm.sample(invflow.GaussianLikelihood(operator, y, level), 1).mean()[0], x)
            restored, _ = posterior_of(vfm, operator, y, sigma, 0, g)
            grey = len(x) == 1
            means = denoise_nl_means(y[0, 0].numpy() if grey else y[0].numpy(), h=0.6 * sigma, sigma=sigma,
                                     patch_size=5, patch_distance=6, channel_axis=None if grey else 0)
            means = torch.from_numpy(np.array(means)).view_as(x)
            found = _quality(y[0], x), alone, _quality(restored, x), _quality(means, x)
            worst = min(worst, found[2] - found[0])
            print(f"{name:21} {sigma:<6} {found[0]:.2f}  {found[1]:.2f}  {found[2]:.2f}     {found[3]:.2f}", flush=True)
    print(f"largest loss: {abs(worst):.2f} dB")


if __name__ == "__main__":
    main()
