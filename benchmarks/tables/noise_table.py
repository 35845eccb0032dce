"""Error of :func:`invflow.estimate_sigma` on photographs, compared with scikit-image's wavelet estimate.

``python -m benchmarks.tables.noise_table`` uses the photographs of scikit-image and scikit-learn with noise of 0.01 to
0.1, at full size or averaged over 2 x 2 and 4 x 4 pixels, as they are, saved as JPEG, or demosaiced. It takes a minute.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, pad

from invflow.likelihood import noise_levels

__all__ = ["main", "measurements"]

NAMES = ("astronaut", "chelsea", "coffee", "rocket", "camera", "brick", "page", "grass", "gravel", "moon", "coins",
         "motorcycle", "china", "flower")


def photograph(name: str) -> Tensor:
    """The upper left 400 x 400 pixels, ``(1, C, 400, 400)``."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    if name in ("china", "flower"):
        pixels = load_sample_image(f"{name}.jpg")
    else:
        pixels = data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)()
    return torch.from_numpy(np.atleast_3d(pixels) / 255).float().permute(2, 0, 1)[None, :, :400, :400]


def measurements(name: str) -> Iterator[tuple[str, Tensor, float]]:
    """Name of each kind of processing, the resulting picture, and its noise level."""
    x, g = photograph(name), torch.Generator().manual_seed(0)

    def noisy(image: Tensor, sigma: float) -> Tensor:
        return image + sigma * torch.randn(image.shape, generator=g)

    for factor, levels in ((1, (0.01, 0.025, 0.05, 0.1)), (2, (0.01, 0.05)), (4, (0.01, 0.05))):
        for sigma in levels:
            yield "white" if factor == 1 else f"white, x{factor}", noisy(avg_pool2d(x, factor), sigma), sigma
    if x.shape[1] == 3:
        for sigma in (0.025, 0.05):
            for quality in (95, 85, 75):
                y = _jpeg(noisy(x, sigma), quality)
                yield f"JPEG {quality}", y, float((y - x).std())
            y, clean = _demosaiced(noisy(x, sigma)), _demosaiced(x)
            yield "demosaiced", y, float((y - clean).std())


def _jpeg(x: Tensor, quality: int) -> Tensor:
    from PIL import Image

    file = io.BytesIO()
    pixels = (x[0].permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=2)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None] / 255


def _demosaiced(x: Tensor) -> Tensor:
    kept = torch.zeros_like(x)
    kept[:, 0, ::2, ::2] = kept[:, 1, ::2, 1::2] = kept[:, 1, 1::2, ::2] = kept[:, 2, 1::2, 1::2] = 1
    kernel = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]).expand(3, 1, 3, 3)

    def spread(y: Tensor) -> Tensor:
        return conv2d(pad(y, (1, 1, 1, 1), mode="reflect"), kernel, groups=3)

    return spread(x * kept) / spread(kept)


def main() -> None:
    """Print the table."""
    from skimage.restoration import estimate_sigma as wavelets

    ours: dict[str, list[float]] = {}
    theirs: dict[str, list[float]] = {}
    refused: dict[str, int] = {}
    doubts: dict[tuple[bool, bool], int] = {}  # by: off by over a quarter, and a warning or an error
    inside = 0
    for name in NAMES:
        for kind, y, truth in measurements(name):
            level = noise_levels(y)[0]
            refused[kind] = refused.get(kind, 0) + (not level.known)
            key = abs(math.log(level.sigma / truth)) > math.log(1.25), bool(level.doubt)
            doubts[key] = doubts.get(key, 0) + 1
            inside += level.low <= truth <= level.high
            if level.known:
                other = wavelets(y[0].numpy(), channel_axis=0, average_sigmas=True)
                ours.setdefault(kind, []).append(abs(math.log(level.sigma / truth)))
                theirs.setdefault(kind, []).append(abs(math.log(other / truth)))
    print("factor of the error: geometric mean, worst | scikit-image on the same | refused")
    for kind, count in refused.items():
        print(f"{kind:12} {_factors(ours[kind])} | {_factors(theirs[kind])} | {count} of {count + len(ours[kind])}")
    good, bad = ([doubts.get((off, doubt), 0) for doubt in (False, True)] for off in (False, True))
    print(f"alarms on estimates within a quarter of the level: {good[1]} of {sum(good)}; misses on the others: "
          f"{bad[0]} of {sum(bad)}; levels in their range: {inside} of {sum(good) + sum(bad)}")


def _factors(errors: list[float]) -> str:
    return f"{math.exp(sum(errors) / len(errors)):.2f} {math.exp(max(errors)):.2f}"


if __name__ == "__main__":
    main()
