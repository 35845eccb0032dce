"""The check of operators detects each broken one and names the fault."""

from __future__ import annotations

import pytest
import torch

from invflow.operators import BoxInpainting, Denoising, GaussianBlur, MotionBlur
from invflow.testing import check_operator


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class ScaledAdjoint(GaussianBlur):
    def adjoint(self, y):
        return 1.001 * super().adjoint(y)


class FlippedAdjoint(MotionBlur):
    def adjoint(self, y):
        return self(y)  # convolution again, where correlation is due


class DetachedAdjoint(Denoising):
    def adjoint(self, y):
        return y.detach() + 0 * y


class Offset(Denoising):
    def forward(self, x):
        return x + 0.01


class Wandering(Denoising):
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return x + 1e-3 * self.calls


class GlobalNoise(Denoising):
    def measure(self, x, sigma, *, generator=None):
        return super().measure(x, sigma, generator=generator) + 0 * torch.randn(1)


class BatchMean(Denoising):
    def forward(self, x):
        return x - 0.1 * x.mean(0, keepdim=True)


class TiledExpand(BoxInpainting):
    def expand(self, k):
        return self if self.num_sets == 1 else self._with_sets({"mask": self.mask.repeat(k, 1, 1, 1)})


class SortedSelect(BoxInpainting):
    def select(self, index):
        return super().select(index if isinstance(index, slice) else torch.as_tensor(index).sort().values)


class OneMaskForAll(BoxInpainting):
    def randomize(self, n, generator=None):
        one = super().randomize(1, generator)
        return one._with_sets({"mask": one.mask.repeat(n, 1, 1, 1)})


class IgnoresGenerator(BoxInpainting):
    def randomize(self, n, generator=None):
        return super().randomize(n, seeded(7))


class RandomizesInPlace(BoxInpainting):
    def randomize(self, n, generator=None):
        self.mask = super().randomize(1, generator).mask
        return super().randomize(n, generator)


class WritesInput(Denoising):
    def forward(self, x):
        return x.add_(1e-3)


class WrongShape(Denoising):
    def forward(self, x):
        return x.flatten(1)


class SinglePrecision(Denoising):
    def forward(self, x):
        return x.float()


class Unchecked(Denoising):
    def __call__(self, x):
        return self.forward(x)


class NaNEmbedding(BoxInpainting):
    def embed(self, y):
        return y / self.mask


class ShortContext(Denoising):
    def context(self):
        maps, vector = super().context()
        return maps, vector[:, :8]


class VarianceForDeviation(Denoising):
    def measure(self, x, sigma, *, generator=None):
        return super().measure(x, torch.as_tensor(sigma) ** 2, generator=generator)


class WrongObserved(Denoising):
    def observed(self):
        return torch.zeros(1, *self.image_shape, dtype=torch.bool)


class BadPseudoInverse(GaussianBlur):
    def pseudo_inverse(self, y):
        return self.adjoint(y)


@pytest.mark.parametrize(("broken", "message"), [
    (ScaledAdjoint, r"<x, A' y>.*not the transpose"), (FlippedAdjoint, "not the transpose"),
    (DetachedAdjoint, "gradient of <x, A' y>"), (Offset, r"A\(2x - 3x'\)"), (Wandering, "same images again"),
    (GlobalNoise, "global random state"), (BatchMean, "row 0 alone"), (TiledExpand, "repeat_interleave"),
    (SortedSelect, "select"), (OneMaskForAll, "same parameters for every image"),
    (IgnoresGenerator, "two generator seeds"), (RandomizesInPlace, "must not change in use"),
    (WritesInput, "changed its images in place"), (WrongShape, r"expected a tensor \(n, \*measurement_shape\)"),
    (SinglePrecision, "returns torch.float32"), (Unchecked, "without an error"), (NaNEmbedding, "finite"),
    (ShortContext, "context's vector"), (VarianceForDeviation, "standard deviation"),
    (WrongObserved, "unobserved entry changes"), (BadPseudoInverse, r"A A\^\+ A x"),
])
def test_check_operator_catches(broken, message):
    arguments = {"generator": seeded()} if issubclass(broken, MotionBlur) else {}
    with pytest.raises(AssertionError, match=message):
        check_operator(lambda: broken((1, 8, 8), **arguments))
