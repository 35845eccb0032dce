from __future__ import annotations

import importlib.metadata
import math
import subprocess
import sys
import types
import warnings

import pytest
import torch
import torch.nn.functional as F

import invflow
from invflow import operators as registry
from invflow._core import plugins
from invflow._core.conjugate_gradients import conjugate_gradient
from invflow.operator import Operator
from invflow.operators import (
    Blur,
    BoxInpainting,
    ComposedOperator,
    Denoising,
    FreeFormInpainting,
    GaussianBlur,
    MaskInpainting,
    MatrixOperator,
    MotionBlur,
    RandomInpainting,
    SuperResolution,
)
from invflow.testing import check_operator

SHAPES = [(1, 28, 28), (3, 16, 24)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.rand(*shape, generator=seeded(seed), dtype=dtype)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def dense(operator: Operator) -> torch.Tensor:
    """The matrix ``(m, d)`` of a linear operator with one set, from the images of unit vectors."""
    d = math.prod(operator.image_shape)
    return operator(torch.eye(d, dtype=torch.float64).reshape(d, *operator.image_shape)).flatten(1).T


# -- the contract, for every operator that ships ---------------------------------------------------

SHIPPED = {
    "denoising": lambda s: Denoising(s),
    "random-inpainting": lambda s: RandomInpainting(s, generator=seeded()),
    "random-inpainting-half": lambda s: RandomInpainting(s, keep=0.5, generator=seeded()),
    "box-inpainting": lambda s: BoxInpainting(s),
    "mask": lambda s: MaskInpainting(rand(*s[1:]) < 0.5, image_shape=s),
    "free-form": lambda s: FreeFormInpainting(s, seeded()),
    "masks-per-channel": lambda s: MaskInpainting(rand(3, *s) < 0.5),
    "gaussian-blur": lambda s: GaussianBlur(s),
    "motion-blur": lambda s: MotionBlur(s, generator=seeded()),
    "kernels": lambda s: Blur(rand(3, s[0], 4, 3) / 12, s),
    "super-resolution": lambda s: SuperResolution(s),
    "super-resolution-bicubic": lambda s: SuperResolution(s, factor=2, filter="bicubic"),
    "super-resolution-lanczos": lambda s: SuperResolution(s, factor=2, filter="lanczos"),
    "composed": lambda s: SuperResolution(s) @ GaussianBlur(s, std=0.7),
    "composed-mask": lambda s: BoxInpainting(s) @ GaussianBlur(s, std=0.7),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SHIPPED)
def test_contract(name, shape, device):
    check_operator(lambda: SHIPPED[name](shape), device=device)


@pytest.mark.parametrize("padding", ["reflect", "zeros"])
def test_contract_of_other_borders(padding, device):
    check_operator(GaussianBlur((1, 12, 14), std=0.6, padding=padding), device=device)


@pytest.mark.parametrize("shape", [(3, 5), (4, 3, 5)], ids=["shared", "per-set"])
def test_contract_of_matrices(shape, device):
    check_operator(MatrixOperator(randn(*shape)), device=device)


@pytest.mark.parametrize(("name", "problem_class"), [
    ("denoising", "denoising"), ("random-inpainting", "random-inpainting"),
    ("box-inpainting", "box-inpainting"), ("super-resolution", "super-resolution-x4"),
    ("super-resolution-bicubic", "super-resolution-x2"),
    ("gaussian-blur", "gaussian-blur"), ("motion-blur", "motion-blur"), ("mask", "free-form-inpainting"),
    ("free-form", "free-form-inpainting"),
    ("kernels", None),
    ("composed", None),
])
def test_problem_classes(name, problem_class):
    assert SHIPPED[name]((1, 16, 16)).problem_class == problem_class


def test_a_kernel_without_a_class_stands_for_one_of_its_kind():
    grid = torch.arange(-3, 4)
    line, bell = torch.eye(7) / 7, torch.exp(-(grid[:, None] ** 2 + grid**2) / 4)
    for kernel in (bell, F.pad(bell, (3, 3)), F.pad(bell, (1, 0, 1, 0))):  # to an even side about the same origin
        assert Blur(kernel, (1, 16, 16)).stand_ins == ("gaussian-blur",)
    assert Blur(line, (1, 16, 16)).stand_ins == Blur(torch.stack([bell, line])[:, None],
                                                     (1, 16, 16)).stand_ins == ("motion-blur",)
    assert Blur(torch.ones(1, 5) / 5, (1, 16, 16)).stand_ins == ("motion-blur",)
    assert Blur(line, (1, 16, 16), problem_class="gaussian-blur").stand_ins == ()


# -- closed forms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["circular", "reflect", "zeros"])
@pytest.mark.parametrize("size", [(5, 5), (4, 3), (1, 6)], ids=str)
def test_blur_is_deepinvs_convolution(padding, size):
    from deepinv.physics.functional import conv2d

    kernels, x = rand(4, 3, *size), rand(4, 3, 9, 11, seed=1)
    expected = conv2d(x, kernels, padding="constant" if padding == "zeros" else padding)
    torch.testing.assert_close(Blur(kernels, (3, 9, 11), padding)(x), expected, rtol=0, atol=1e-12)


def test_gaussian_kernels_are_deepinvs_and_have_their_width():
    from deepinv.physics.functional import gaussian_blur

    kernel = GaussianBlur((1, 28, 28), std=1.3).kernel
    torch.testing.assert_close(kernel, gaussian_blur((9, 9), 1.3), rtol=0, atol=1e-6)
    wide = GaussianBlur((1, 64, 64), std=2.0, kernel_size=31).kernel.double()
    offset = torch.arange(31, dtype=torch.float64) - 15
    assert float((wide.sum((1, 2))[0] * offset**2).sum()) == pytest.approx(4.0, rel=1e-5)


def test_gaussian_widths_are_uniform_in_their_range():
    random = GaussianBlur((1, 28, 28)).randomize(2000, seeded())
    # for a Gaussian profile, the ratio of neighbours at the centre is exp(-1 / 2 std^2)
    profile = random.kernel[:, 0, 4].double()
    std = (-0.5 / (profile[:, 5] / profile[:, 4]).log()).sqrt()
    assert 0.5 <= float(std.min()) < 0.51
    assert 1.99 < float(std.max()) <= 2.0001
    assert float(std.mean()) == pytest.approx(1.25, abs=5 * 1.5 / math.sqrt(12 * 2000))


def test_motion_kernels_are_deepinvs():
    from deepinv.physics.generator import MotionBlurGenerator

    operator = MotionBlur((1, 28, 28), intensity=0.15, generator=seeded(3))
    drawn = MotionBlurGenerator((9, 9), rng=seeded(3), sigma=0.15).step(1)["filter"]
    torch.testing.assert_close(operator.kernel, drawn, rtol=0, atol=2e-6)
    many = MotionBlur((1, 28, 28), intensity=1.0, generator=seeded()).randomize(50, seeded(1)).kernel
    assert many.shape == (50, 1, 9, 9)
    assert float(many.min()) >= 0
    torch.testing.assert_close(many.sum((1, 2, 3)), torch.ones(50))


def test_inverse_filter_recovers_the_image():
    operator = GaussianBlur((1, 28, 28), std=0.6).to(torch.float64)
    x = rand(2, 1, 28, 28)
    torch.testing.assert_close(operator.pseudo_inverse(operator(x)), x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_average_pooling(factor):
    operator, x = SuperResolution((2, 12, 24), factor).to(torch.float64), rand(3, 2, 12, 24)
    y = operator(x)
    torch.testing.assert_close(y, F.avg_pool2d(x, factor), rtol=0, atol=1e-7)
    repeated = y.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    torch.testing.assert_close(operator.pseudo_inverse(y), repeated, rtol=0, atol=1e-6)


def test_bicubic_is_torchs():
    x = rand(3, 2, 12, 24)
    expected = F.interpolate(x, scale_factor=1 / 3, mode="bicubic", antialias=True, align_corners=False)
    torch.testing.assert_close(SuperResolution((2, 12, 24), 3, "bicubic")(x), expected, rtol=0, atol=1e-6)


def test_inpainting_embeds_grey_and_knows_its_mask():
    mask = torch.tensor([[1, 0], [1, 1]])
    operator = MaskInpainting(mask, image_shape=(3, 2, 2), problem_class="box-inpainting")
    x = rand(5, 3, 2, 2)
    assert operator.problem_class == "box-inpainting"
    assert bool((operator.embed(operator(x))[:, :, 0, 1] == 0.5).all())
    assert operator.context()[0].tolist() == [[[[1, 0], [1, 1]]]]
    assert operator.observed().shape == (1, 3, 2, 2)
    assert bool((operator(x)[:, :, 0, 1] == 0).all())


def test_boxes_keep_their_sides_and_reach_every_place():
    assert (~BoxInpainting((1, 28, 28)).mask).nonzero().aminmax(dim=0).min.tolist() == [0, 0, 7, 7]
    holes = ~BoxInpainting((3, 16, 24)).randomize(3000, seeded()).mask[:, 0]
    height, width = holes.any(2).sum(1), holes.any(1).sum(1)
    assert torch.equal(height * width, holes.sum((1, 2)))  # boxes, not other shapes
    assert sorted(set(height.tolist())) == [4, 5, 6, 7, 8]
    assert sorted(set(width.tolist())) == list(range(6, 13))
    assert bool(holes.any(0).all())
    counts = torch.bincount(height - 4).double()
    assert float(((counts - 600).square() / 600).sum()) < 25  # chi-square with 4 degrees, beyond p = 1e-4
    fixed = BoxInpainting((1, 16, 24), box=(3, 5), sides=None).randomize(50, seeded())
    assert (~fixed.mask).sum((1, 2, 3)).tolist() == [15] * 50


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 40, 64), (1, 8, 8)], ids=str)
def test_free_form_masks_hide_and_show_something_of_every_kind(shape):
    """Each mask hides a pixel and shows one; shares reach from specks to most of the picture; a seed gives the same."""
    masks = FreeFormInpainting(shape, seeded()).randomize(400, seeded(1)).mask
    again = FreeFormInpainting(shape, seeded(5)).randomize(400, seeded(1)).mask
    assert masks.shape == (400, 1, *shape[1:])
    assert torch.equal(masks, again)
    shown = masks.flatten(1).double().mean(1)
    assert 0 < float(shown.min()) < 0.45
    assert 0.97 < float(shown.max()) < 1
    assert 0.5 < float(shown.mean()) < 0.9
    # a scratch or a lost pixel is a thin thing, a box or a brush a thick one: a hidden 3 x 3 square tells them apart
    thick = F.avg_pool2d((~masks).double(), 3, 1).flatten(1).amax(1) > 0.99
    assert 0.2 < float(thick.double().mean()) < 0.95


@pytest.mark.parametrize("all_hidden", [False, True])
def test_a_mask_settles_one_pixel_where_damage_takes_none_or_all(monkeypatch, all_hidden):
    from invflow_operators import _free_form as kinds

    for name in ("_lines_of_a_brush", "_scratches", "_captions", "_boxes", "_scattered"):
        monkeypatch.setattr(kinds, name, lambda n, size, g: torch.full((n, *size), all_hidden))
    shown = kinds.draw_free_form(50, (9, 7), seeded()).flatten(1).sum(1)
    assert shown.tolist() == [1 if all_hidden else 62] * 50


def test_every_kind_of_damage_is_drawn():
    from invflow_operators import _free_form as kinds

    for kind in (kinds._lines_of_a_brush, kinds._scratches, kinds._captions, kinds._boxes, kinds._scattered):
        hidden = kind(64, (28, 40), seeded())
        assert hidden.shape == (64, 28, 40)
        assert 0.005 < float(hidden.double().mean()) < 0.5, kind
        assert float(hidden.flatten(1).any(1).double().mean()) > 0.7, kind


def test_random_masks_draw_the_share_they_keep():
    mask = RandomInpainting((3, 40, 40), generator=seeded()).randomize(500, seeded(1)).mask
    assert mask.shape == (500, 1, 40, 40)  # the same mask for all channels
    share = mask.double().mean((1, 2, 3))
    assert 0.25 < float(share.min()) < 0.33
    assert 0.67 < float(share.max()) < 0.75
    assert float(share.mean()) == pytest.approx(0.5, abs=5 * 0.4 / math.sqrt(12 * 500))
    half = RandomInpainting((1, 40, 40), keep=0.5, generator=seeded()).randomize(500, seeded(1)).mask.double()
    assert float(half.mean()) == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(500 * 1600))
    tiny = RandomInpainting((1, 2, 2), keep=1e-6, generator=seeded()).randomize(100, seeded(1))
    assert tiny.mask.sum((1, 2, 3)).tolist() == [1] * 100


@pytest.mark.parametrize("size", [28, 256])
def test_default_kernels_scale_with_the_image(size):
    assert GaussianBlur((1, size, size)).kernel.shape[-1] == {28: 9, 256: 61}[size]


def test_transfer_summary():
    identity = torch.zeros(3, 3)
    identity[1, 1] = 1
    vector = Blur(identity, (1, 12, 12)).context()[1]
    torch.testing.assert_close(vector[0], torch.cat([torch.ones(16), torch.zeros(16)]))
    # a Gaussian of standard deviation s has transfer function exp(-2 pi^2 s^2 f^2); the first frequencies are
    # three and six periods over the image, along either axis
    vector = GaussianBlur((1, 32, 64), std=1.5, kernel_size=21).context()[1][0]
    for entry, f in ((0, 3 / 64), (1, 3 / 32), (4, 6 / 64), (5, 6 / 32)):
        assert float(vector[entry]) == pytest.approx(math.exp(-2 * (math.pi * 1.5 * f) ** 2), abs=1e-5)
    # one pixel to the right turns the phase by -2 pi f
    shifted = Blur(identity.roll(1, 1), (1, 12, 12)).context()[1][0]
    angle = torch.tensor(2 * math.pi * 3 / 12)
    torch.testing.assert_close(shifted[[0, 16]], torch.stack([angle.cos(), -angle.sin()]))
    # average pooling over 4 pixels, about its centre: a real transfer function, sin(4a) / 4 sin(a), a = pi f
    vector = SuperResolution((1, 32, 32), 4).context()[1][0]
    a = math.pi * 3 / 32
    assert float(vector[0]) == pytest.approx(math.sin(4 * a) / (4 * math.sin(a)), abs=1e-6)
    assert float(vector[16:].abs().max()) < 1e-6


def test_matrices_per_image():
    matrices, x = randn(4, 3, 6), rand(4, 2, 3, seed=1)
    y = MatrixOperator(matrices, image_shape=(2, 3))(x)
    for i in range(4):
        torch.testing.assert_close(y[i], matrices[i] @ x[i].flatten())


def test_composition_applies_the_inner_operator_first():
    inner, outer = GaussianBlur((1, 12, 12)), SuperResolution((1, 12, 12), 3)
    x = rand(2, 1, 12, 12)
    composed = outer @ inner
    assert isinstance(composed, ComposedOperator)
    torch.testing.assert_close(composed(x), outer(inner(x)))
    with pytest.raises(ValueError, match=r"\(1, 4, 4\).*applies inner first|applies inner first"):
        inner @ outer


def test_conjugate_gradients_give_the_pseudo_inverse():
    matrix, y = randn(8, 5), randn(3, 8, seed=1)
    matrix[:, 4] = matrix[:, 3]  # rank 4: the answer of smallest norm is asked for
    operator = MatrixOperator(matrix)
    torch.testing.assert_close(conjugate_gradient(operator, y), y @ torch.linalg.pinv(matrix).T)
    alone = conjugate_gradient(operator, y[1:2], iterations=3)
    torch.testing.assert_close(conjugate_gradient(operator, y, iterations=3)[1:2], alone)


def test_default_adjoint_is_the_transposed():
    class Shear(Operator):
        image_shape, measurement_shape = (1, 3, 4), (7,)

        def forward(self, x):
            return x.flatten(1) @ weights

    weights, y = randn(12, 7), randn(5, 7, seed=1)
    torch.testing.assert_close(Shear().adjoint(y).flatten(1), y @ weights.T)
    torch.testing.assert_close(dense(Shear()), weights.T)


# -- use -------------------------------------------------------------------------------------------


def test_parameters_survive_a_change_of_type():
    operator = MotionBlur((1, 12, 12), generator=seeded())
    x = rand(2, 1, 12, 12)
    torch.testing.assert_close(operator.to(torch.float64)(x), operator.to(torch.float32)(x.float()).double(),
                               rtol=0, atol=1e-6)


def test_mixed_precision_does_not_reach_the_measurement():
    operator, x = SuperResolution((1, 16, 16)), rand(2, 1, 16, 16, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        measured = operator(x)
    assert measured.dtype == torch.float32
    assert torch.equal(measured, operator(x))
    assert operator(x.bfloat16()).dtype == torch.float32


def test_measure_warns_of_the_range_of_pictures():
    operator, x = Denoising((1, 16, 16)), rand(2, 1, 16, 16)
    with pytest.warns(UserWarning, match=r"\[0, 255\].*x / 255"):
        operator.measure(255 * x, 0.1, generator=seeded())
    with pytest.warns(UserWarning, match=r"\[-1, 1\].*half the noise"):
        operator.measure(2 * x - 1, 0.1, generator=seeded())


def test_measure_leaves_what_is_not_observed():
    operator = BoxInpainting((1, 8, 8))
    y = operator.measure(rand(2, 1, 8, 8), 0.5, generator=seeded())
    assert bool((y[:, :, 2:6, 2:6] == 0).all())


def test_given_masks_are_drawn_with_replacement():
    masks = torch.eye(4, dtype=torch.bool).reshape(4, 1, 2, 2)
    drawn = MaskInpainting(masks).randomize(200, seeded()).mask.flatten(1).long()
    assert drawn.sum(1).tolist() == [1] * 200
    assert int(drawn.sum(0).min()) > 20


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Denoising((1, 8, 8))(rand(1, 8, 8)), r"\(1, 8, 8\).*pass x\[None\]"),
    (lambda: Denoising((1, 8, 8))(rand(2, 3, 8, 8)), r"\(2, 3, 8, 8\).*\(n, 1, 8, 8\)"),
    (lambda: Denoising((1, 8, 8))(rand(2, 5, 1, 8, 8)), r"flatten\(0, 1\) to operator.expand\(5\)"),
    (lambda: Denoising((1, 8, 8))(rand(0, 1, 8, 8)), "empty batch"),
    (lambda: Denoising((1, 8, 8))((rand(2, 1, 8, 8) * 255).byte()), r"uint8.*float\(\) / 255"),
    (lambda: BoxInpainting((1, 8, 8)).randomize(3, seeded())(rand(6, 1, 8, 8)), r"3 parameter.*expand\(2\)"),
    (lambda: BoxInpainting((1, 8, 8)).randomize(3, seeded())(rand(4, 1, 8, 8)), r"3 param.*randomize\(4\)"),
    (lambda: SuperResolution((1, 8, 8)).adjoint(rand(2, 1, 8, 8)), r"\(n, 1, 2, 2\)"),
    (lambda: SuperResolution((1, 9, 9), 10), r"by 10 of images \(1, 9, 9\).* from 1 to 9"),
    (lambda: SuperResolution((1, 8, 8), filter="cubic"), "'average', .*'bicubic'"),
    (lambda: MaskInpainting(rand(8, 8)), "pass mask > 0.5"),
    (lambda: MaskInpainting(torch.ones(8, 8), image_shape=(1, 8, 9)), r"\(8, 8\).*\(1, 8, 9\)"),
    (lambda: MaskInpainting(torch.zeros(8, 8)), "observes nothing"),
    (lambda: BoxInpainting((1, 8, 8), box=(9, 3)), r"\(9, 3\).*\(1, 8, 8\)"),
    (lambda: RandomInpainting((1, 8, 8), keep=0.0), "keep=0.0"),
    (lambda: Blur(torch.ones(9, 3), (1, 8, 8)), r"\(9, 3\) pixels"),
    (lambda: Blur(torch.ones(2, 3, 3), (3, 8, 8)), r"\(2, 3, 3\).*\(3, 8, 8\)"),
    (lambda: Blur(torch.ones(3, 3), (1, 8, 8), padding="valid"), "'circular'"),
    (lambda: GaussianBlur((1, 8, 8), std=0.0), "pass std > 0 in pixels"),
    (lambda: MotionBlur((1, 8, 8), intensity=2.0), "intensity=2.0"),
    (lambda: MatrixOperator(torch.ones(3, 4), image_shape=(5,)), r"\(3, 4\).*\(5,\)"),
    (lambda: Denoising((1, 8, 8)).measure(rand(2, 1, 8, 8), -0.1), "sigma is .*>= 0"),
    (lambda: Denoising((1, 8, 8)).measure(rand(2, 1, 8, 8), torch.ones(3)), r"\(3,\).*\(2,\)"),
    (lambda: BoxInpainting((1, 8, 8)).randomize(3, seeded()).select([3]), "does not fit 3 rows"),
    (lambda: BoxInpainting((1, 8, 8)).randomize(3, seeded()).select([]), "none of 3 rows"),
])
def test_bad_input_is_named_with_what_would_work(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_no_pseudo_inverse_without_linearity():
    class Square(Operator):
        image_shape = measurement_shape = (2,)
        linear = False

        def forward(self, x):
            return x**2

    with pytest.raises(TypeError, match=r"not linear.*embed"):
        Square().pseudo_inverse(rand(1, 2))
    # the Jacobian at mid grey is the identity
    torch.testing.assert_close(Square().embed(rand(3, 2)), rand(3, 2))
    check_operator(Square())


# -- the door for plug-ins -------------------------------------------------------------------------


def test_names_and_nearest_names():
    assert {"GaussianBlur", "DeepinvOperator", "ComposedOperator"} <= set(registry.names())
    assert registry.find("box-inpainting") is registry.find("BoxInpainting") is BoxInpainting
    with pytest.raises(ValueError, match="did you mean 'GaussianBlur'"):
        registry.find("gausian-blur")
    with pytest.raises(AttributeError, match="did you mean 'MotionBlur'"):
        registry.MotinBlur  # noqa: B018


def test_third_party_operators_are_found_and_broken_ones_left_out(monkeypatch):
    module = types.ModuleType("their_operators")
    module.Mirror, module.__all__ = type("Mirror", (Denoising,), {}), ["Mirror"]
    monkeypatch.setitem(sys.modules, "their_operators", module)
    entries = [importlib.metadata.EntryPoint(name, value, "invflow.operators")
               for name, value in (("broken", "not_installed_anywhere"), ("theirs", "their_operators"))]
    monkeypatch.setattr(plugins, "entry_points", lambda group: entries)
    plugins.offers.cache_clear()
    try:
        with pytest.warns(UserWarning, match="not_installed_anywhere"):
            assert registry.names() == ["Mirror"]
        assert registry.find("mirror") is module.Mirror
        assert registry.__getattr__("Mirror") is module.Mirror
    finally:
        vars(registry).pop("Mirror", None)
        plugins.offers.cache_clear()


def test_looking_up_an_operator_imports_no_heavy_package():
    code = ("import sys; from invflow.operators import MotionBlur, DeepinvOperator; "
            "sys.exit(','.join({'deepinv', 'matplotlib', 'scipy'} & set(sys.modules)) or 0)")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_public_names():
    assert invflow.Operator is Operator
    assert invflow.operators is registry


@pytest.mark.parametrize("padding", ["reflect", "zeros"])
def test_the_pseudo_inverse_of_a_blur_is_reached_or_not_said_to_be(padding: str) -> None:
    """Undone to a thousandth at condition 110 and 145, where a hundred steps did not do; and beyond, a warning."""
    x = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    operator = GaussianBlur((1, 12, 12), std=0.8, kernel_size=7, padding=padding).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = operator.pseudo_inverse(operator(x))
    torch.testing.assert_close(found, x, rtol=0, atol=1e-3)
    assert float((conjugate_gradient(operator, operator(x), iterations=100) - x).abs().max()) > 1e-3
    hopeless = GaussianBlur((1, 12, 12), std=2.0, kernel_size=9, padding=padding).double()
    with pytest.warns(UserWarning, match="GaussianBlur was not reached: after 1000 conjugate gradient steps"):
        hopeless.pseudo_inverse(hopeless(x))


def test_motion_blur_where_float64_is_the_default() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        kernel = MotionBlur((1, 16, 16), generator=torch.Generator().manual_seed(0)).kernel
    finally:
        torch.set_default_dtype(torch.float32)
    assert kernel.dtype == torch.float64
    assert float(kernel.sum()) == pytest.approx(1)
