"""What a student types wrong: each call is answered by what was passed, and by the call that works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import invflow
from invflow._core.checks import check_setting
from invflow.operators import BoxInpainting, Denoising, GaussianBlur, SuperResolution

SHAPE = (1, 28, 28)
OPERATOR = Denoising(SHAPE)
MIXTURE = invflow.GaussianMixtureFlow(torch.zeros(1, 1, 8, 8), std=1.0)


class Forgetful(invflow.Operator):
    def __init__(self, image_shape: tuple[int, ...] = SHAPE) -> None:
        self.image_shape = self.measurement_shape = image_shape

    def forward(self, x: Tensor) -> Tensor:
        return x


class ForgetfulWithBuffer(Forgetful):
    def __init__(self) -> None:
        self.register_buffer("gain", torch.ones(1))


class NumPyInside(invflow.Operator):
    image_shape = measurement_shape = SHAPE

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.flip(x.numpy(), -1).copy())


class FlipsByNumPy(NumPyInside):
    def forward(self, x: Tensor) -> Any:
        return np.flip(x, -1)


class GivesNumPy(NumPyInside):
    def forward(self, x: Tensor) -> Any:
        return x.numpy()


class NoMeasurementShape(invflow.Operator):
    image_shape = SHAPE

    def forward(self, x: Tensor) -> Tensor:
        return x


class WrongMeasurementShape(NumPyInside):
    measurement_shape = (1, 14, 14)

    def forward(self, x: Tensor) -> Tensor:
        return x


def images() -> Tensor:
    return torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0))


def posterior() -> invflow.Posterior:
    return invflow.Posterior(torch.zeros(3, 4, 2))


BYTES = (255 * images()[0, 0]).numpy().astype("uint8")
CALLS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    # arrays and pictures: floats are not told to divide by 255, and colours at the end are moved
    (lambda: OPERATOR(images().numpy()), ValueError, r"ndarray of float32 .*torch.as_tensor\(x\)\.float\(\)$"),
    (lambda: OPERATOR(BYTES), ValueError, r"shape \(28, 28\).*as_tensor\(x\)\[None, None\]\.float\(\) / 255$"),
    (lambda: OPERATOR(np.zeros((28, 28, 3), "uint8")), ValueError, r"movedim\(-1, -3\)\[None\]\.float\(\) / 255"),
    (lambda: OPERATOR(Image.fromarray(BYTES)), ValueError, r"to_tensor\(x\)\[None\], or read its file"),
    (lambda: OPERATOR.measure(images().numpy(), 0.1), ValueError, "ndarray of float32"),
    (lambda: invflow.GaussianLikelihood(OPERATOR, images().numpy(), 0.1), ValueError, r"as_tensor\(y\)\.float\(\)$"),
    (lambda: invflow.GaussianLikelihood(OPERATOR, (255 * images()).byte(), 0.1), ValueError, r"y.float\(\) / 255"),
    (lambda: invflow.GaussianLikelihood(Denoising, images(), 0.1), TypeError, r"pass Denoising\(image_shape\)"),
    # a setting in the shape's place
    (lambda: BoxInpainting(box=14), TypeError, r"needs image_shape, .* as in BoxInpainting\(\(1, 28, 28\), box=14\)"),
    (lambda: SuperResolution(4), ValueError, r"image_shape is 4: .* SuperResolution\(\(1, 28, 28\), factor=4\)"),
    (lambda: SuperResolution(SHAPE, "4"), ValueError, "super-resolution by '4'"),
    (lambda: BoxInpainting(14), ValueError, r"image_shape is 14: .* box=\(14, 14\)\)"),
    (lambda: GaussianBlur(2.0), ValueError, r"image_shape is 2.0: .* std=2.0\)"),
    (lambda: Denoising(28), ValueError, r"Denoising\(\(1, 28, 28\)\)"),
    (lambda: GaussianBlur(SHAPE, kernel_size=10**6), ValueError, "the images only .* pass kernel_size=9"),
    # names and lists
    (lambda: invflow.calibrate(invflow.VFM, "gaussian/linear"), TypeError, r"invflow.calibrate\('exact', 'gau"),
    (lambda: invflow.calibrate("exact", 3), TypeError, "a solver and a problem, not 'exact' and 3"),
    (lambda: invflow.compare("gaussian/linear", invflow.ExactPosterior(MIXTURE)), ValueError, r"\[solver\], or {"),
    (lambda: invflow.load_problem("mnist"), ValueError, "there are mnist/box-inpainting, mnist/denoising"),
    # an operator that forgets something
    (lambda: Forgetful()(images()), AttributeError, r"does not begin with super\(\).__init__\(\)"),
    (lambda: ForgetfulWithBuffer(), AttributeError, r"no 'gain', .* super\(\).__init__\(\)"),
    (lambda: NumPyInside()(images().requires_grad_()), TypeError, "NumPyInside.forward leaves torch.*MatrixOperator"),
    (lambda: FlipsByNumPy()(images()), TypeError, "FlipsByNumPy.forward leaves torch"),
    (lambda: GivesNumPy()(images()), ValueError, r"made a ndarray of images \(2, 1, 28, 28\)"),
    (lambda: NoMeasurementShape()(images()), AttributeError, "write self.measurement_shape = "),
    (lambda: invflow.GaussianLikelihood(NoMeasurementShape(), images(), 0.1), AttributeError, "sets no measurement_sh"),
    (lambda: WrongMeasurementShape()(images()), ValueError, r"made \(2, 1, 28, 28\) .*\(2, 1, 14, 14"),
    # other words for what there is
    (lambda: invflow.NeuralFlowMap((2,), network="none").sample(4), AttributeError, r"prior.generate\(4, gen"),
    (lambda: posterior()[0], TypeError, r"posterior.select\(0\) .*posterior.samples\[0\]"),
    (lambda: list(posterior()), TypeError, r"posterior.select\(0\)"),
    (lambda: invflow.VFM.load("mnist").sample(invflow.FunctionReward(lambda x: x.sum((1, 2, 3))), 2), ValueError,
     r"a FunctionReward has no measurement .* invflow.FMTT\(prior\)"),
]


@pytest.mark.parametrize(("call", "error", "words"), CALLS)
def test_a_wrong_call_is_answered(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_what_can_be_meant_is_taken() -> None:
    assert int((~BoxInpainting(SHAPE, box=14).mask).sum()) == 14 * 14
    found = invflow.compare("gaussian/linear", ["exact", invflow.load_problem("gaussian/linear").exact_posterior()],
                            num_observations=2, num_samples=8)
    assert list(found.solvers) == ["exact", "ExactPosterior"]
    certificate = invflow.calibrate("exact", "gaussian/linear", num_simulations=20, num_samples=9)
    assert certificate.settings["problem"] == "gaussian/linear"


def test_forward_is_not_blamed_on_numpy_when_torch_fails() -> None:
    class Breaks(NumPyInside):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("of its own")

    with pytest.raises(RuntimeError, match=r"^of its own$"):
        Breaks()(images())


@pytest.mark.parametrize(("annotation", "value", "taken"), [
    ("int", 3, 3), ("int | None", None, None), ("float", 3, 3), ("tuple[int, int] | None", [3, 4], (3, 4)),
    ("float | tuple[float, float]", 0.5, 0.5), ("str", "a", "a"), ("Callable[[int], int]", 3, 3), ("bool", True, True),
    ("int", "abc", None), ("int", True, None), ("int", None, None), ("float", "nan", None), ("str | None", 3, None),
    ("tuple[int, int]", 3, None), ("int", 1.5, None),
])
def test_settings_are_of_the_kind_that_is_annotated(annotation: str, value: object, taken: object) -> None:
    import inspect

    parameter = inspect.Parameter("size", inspect.Parameter.KEYWORD_ONLY, default=7, annotation=annotation)
    if (taken is None and value is not None) or (value is None and "None" not in annotation):
        with pytest.raises(ValueError, match=rf"size of it is {value!r}: it takes .*size=7"):
            check_setting("it", "size", value, parameter)
    else:
        assert check_setting("it", "size", value, parameter) == taken
