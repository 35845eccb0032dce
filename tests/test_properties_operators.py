"""Properties of every operator found through the entry points, over shapes, types, sets and batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from property_tools import assert_near, dtypes, generator, property_test, seeds, tensor

import invflow
import invflow.operators as shipped

ROUNDING = {torch.float32: 2e-5, torch.float64: 1e-10}


def _mask(draw: Any, shape: tuple[int, ...], seed: int) -> invflow.Operator:
    sets, channels = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, shape[0]]))
    mask = torch.rand(sets, channels, *shape[1:], generator=generator(seed)) < 0.6
    mask[..., 0, 0] = True
    return shipped.MaskInpainting(mask, image_shape=shape)


def _kernel(draw: Any, shape: tuple[int, ...], seed: int) -> invflow.Operator:
    size = draw(st.integers(1, min(4, *shape[1:]))), draw(st.integers(1, min(4, *shape[1:])))
    kernel = tensor(seed, draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, shape[0]])), *size) / 5
    return shipped.Blur(kernel, shape, draw(st.sampled_from(["circular", "reflect", "zeros"])))


def _matrix(draw: Any, shape: tuple[int, ...], seed: int) -> invflow.Operator:
    rows, columns = draw(st.integers(1, 6)), shape[0] * shape[1] * shape[2]
    sets = draw(st.sampled_from([(), (3,)]))
    return shipped.MatrixOperator(tensor(seed, *sets, rows, columns), image_shape=shape)


def _super_resolution(draw: Any, shape: tuple[int, ...], seed: int) -> invflow.Operator:
    factor = draw(st.integers(1, 4))
    shape = (shape[0], 2 * factor, factor * draw(st.integers(2, 3)))
    filter = draw(st.sampled_from(["average", "bicubic", "lanczos"]))
    return shipped.SuperResolution(shape, factor=factor, filter=filter)


def _deepinv(draw: Any, shape: tuple[int, ...], seed: int) -> invflow.Operator:
    from deepinv.physics import Inpainting

    mask = (torch.rand(1, *shape, generator=generator(seed)) < 0.6).float()
    return shipped.DeepinvOperator(Inpainting(shape, mask=mask), shape)


#: how to make those whose first argument is no image shape, or that have settings worth varying
BUILDERS: dict[str, Callable[[Any, tuple[int, ...], int], invflow.Operator]] = {
    "Blur": _kernel, "MaskInpainting": _mask, "Inpainting": _mask, "MatrixOperator": _matrix,
    "SuperResolution": _super_resolution, "DeepinvOperator": _deepinv,
    "GaussianBlur": lambda draw, s, seed: shipped.GaussianBlur(
        s, kernel_size=draw(st.sampled_from([1, 3])), std=draw(st.floats(0.3, 2)),
        padding=draw(st.sampled_from(["circular", "reflect", "zeros"]))),
    "MotionBlur": lambda draw, s, seed: shipped.MotionBlur(
        s, kernel_size=draw(st.sampled_from([1, 3])), generator=generator(seed)),
    "ComposedOperator": lambda draw, s, seed: _mask(draw, s, seed) @ shipped.GaussianBlur(s, kernel_size=3),
}
NAMES = shipped.names()


@st.composite
def operators(draw: Any, name: str) -> invflow.Operator:
    """An operator of that name in a floating-point type, with its own parameters or with fresh ones."""
    shape = draw(st.sampled_from([1, 2, 3])), draw(st.integers(4, 9)), draw(st.integers(4, 9))
    seed = draw(seeds)
    build = BUILDERS.get(name)
    operator = getattr(shipped, name)(shape) if build is None else build(draw, shape, seed)
    if draw(st.booleans()):
        operator = operator.randomize(draw(st.integers(1, 4)), generator(seed + 1))
    return operator.to(draw(dtypes))


def images(operator: invflow.Operator, n: int, seed: int) -> torch.Tensor:
    return tensor(seed, n, *operator.image_shape).to(operator.device, operator.dtype)


@pytest.mark.parametrize("name", NAMES)
def test_operators_keep_their_contract(name: str, device: torch.device) -> None:
    """Adjoint, linearity, expand, select and randomize; B observations of N images at once against a loop."""
    @property_test(5, data=st.data(), seed=seeds, k=st.integers(1, 3))
    def test_operator(data: Any, seed: int, k: int) -> None:
        operator = data.draw(operators(name)).to(device)
        n = operator.num_sets if operator.num_sets > 1 else data.draw(st.integers(1, 4))
        x = images(operator, n, seed)
        tolerance = ROUNDING[operator.dtype]
        y = operator(x)
        assert y.shape == (n, *operator.measurement_shape)
        assert y.dtype == operator.dtype
        other = images(operator, n, seed + 1)
        if operator.linear:
            assert_near(operator(2.5 * x - other), 2.5 * y - operator(other), tolerance, y)
            back = tensor(seed + 2, *y.shape).to(y)
            one = (y * back).flatten(1).double().sum(1)
            two = (x * operator.adjoint(back)).flatten(1).double().sum(1)
            assert_near(one, two, tolerance, float(y.double().norm() * back.double().norm()))
        # each image of each observation, in a loop
        many = torch.stack([images(operator, n, seed + 3 + i) for i in range(k)], 1)
        together = operator.expand(k)(many.flatten(0, 1)).unflatten(0, (n, k))
        for b in range(n):
            single = operator if operator.num_sets == 1 else operator.select(b)
            assert single.num_sets == 1
            for i in range(k):
                assert_near(together[b, i], single(many[b, i][None])[0], tolerance, together)
        # some of the rows, in any order and with repeats
        index = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5))
        assert_near(operator.select(index)(x[index]), y[index], tolerance, y)
        embedded = operator.embed(y)
        assert embedded.shape == x.shape
        assert bool(embedded.isfinite().all())

    test_operator()


@pytest.mark.parametrize("name", NAMES)
def test_randomize_and_measure_draw_from_their_generator_alone(name: str, device: torch.device) -> None:
    @property_test(4, data=st.data(), seed=seeds, n=st.integers(1, 4))
    def test_random_operator(data: Any, seed: int, n: int) -> None:
        operator = data.draw(operators(name)).to(device)
        first, second = (operator.randomize(n, generator(seed)) for _ in range(2))
        assert first.num_sets in (1, n)
        x = images(operator, n, seed)
        assert torch.equal(first(x), second(x))
        y = first.measure(x, 0.3, generator=generator(seed))
        assert torch.equal(y, second.measure(x, 0.3, generator=generator(seed)))
        assert_near(first.measure(x, 0.0, generator=generator(seed)), first(x), 1e-6)
        seen = first.observed()
        if seen is not None:
            hidden = ~seen.expand(y.shape)
            assert_near(y[hidden], first(x)[hidden], 1e-6)

    test_random_operator()


def test_every_operator_can_be_made() -> None:
    """A new operator is tested by itself where a shape is enough; else it needs a line in BUILDERS."""
    for name in set(NAMES) - set(BUILDERS):
        parameters = list(inspect.signature(getattr(shipped, name)).parameters.values())
        needed = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        assert needed == ["image_shape"], f"{name} takes {needed}: say in BUILDERS how to make one"
