"""The contract of an operator, as one check for any operator."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from invflow._core.shapes import with_axes
from invflow.likelihood import GaussianLikelihood
from invflow.linear.structure import diagonal_values, transfer_function
from invflow.operator import SUMMARY_SIZE, Operator
from invflow.testing._tools import attempt, expect, expect_close, root_mean_square, rounding, watch_global_seed

__all__ = ["check_operator"]

_SETS = 4
#: largest relative error of an adjoint
_ADJOINT = {torch.float32: 1e-5, torch.float64: 1e-10}


def check_operator(operator: Operator | Callable[[], Operator], *, pseudo_inverse_tolerance: float = 0.02,
                   device: str | torch.device = "cpu", seed: int = 0) -> None:
    """Check that an operator satisfies the contract that likelihoods, training and solvers rely on.

    Checked, in float32 and float64, for the operator and for a randomised one: attributes; shapes,
    dtypes and finite values; independence of rows; errors for inputs of a wrong shape; the gradient;
    for a linear operator linearity, the adjoint (1e-5 relative in float32, 1e-10 in float64), its gradient, the
    pseudo-inverse, and the declared structure; ``embed``, ``context`` and ``observed``; the noise of
    ``measure``; the order of ``expand`` and ``select``; ``randomize`` reproducible and different from set to set;
    no change of operator or input in use; no use of global seeds (torch's, numpy's, Python's).

    The one statistical check, the noise of ``measure``, allows five standard errors: about one in 200,000 seeds would
    raise a false alarm. A seed that passes always passes.

    Args:
        operator: The operator, or a function without arguments that builds it.
        pseudo_inverse_tolerance: Relative error allowed in A A^+ A x = A x; conjugate gradients stop early.
        device: Device to run on.
        seed: Random seed of the test images.

    Raises:
        AssertionError: At the first failure; the message says what failed, by how much, and what to check.

    Example:
        >>> from invflow.operators import GaussianBlur
        >>> from invflow.testing import check_operator
        >>> check_operator(GaussianBlur((1, 16, 16)))
    """
    original = operator if isinstance(operator, Operator) else operator()
    expect(isinstance(original, Operator),
           f"a {type(original).__name__} is not an Operator: derive it from invflow.Operator, and pass an instance")
    _check_attributes(original)
    name = type(original).__name__
    before = _snapshot(original)
    with watch_global_seed(name):
        generator = torch.Generator().manual_seed(seed)
        image = torch.rand(original.num_sets, *original.image_shape, generator=generator)
        image = image.to(original.device, original.dtype)
        measured = _measured(original, image)
        _check_randomize(original, seed)
        random = original.randomize(_SETS, generator)
        for subject in (original,) if random is original else (original, random):
            for dtype in (torch.float32, torch.float64):
                moved = copy.deepcopy(subject).to(device=device, dtype=dtype)
                _check_moved(moved, dtype, torch.device(device), seed, pseudo_inverse_tolerance)
        _expect_unchanged(original, before, image, measured, "randomize, or through its copies")


def _check_moved(operator: Operator, dtype: torch.dtype, device: torch.device, seed: int,
                 pseudo_inverse_tolerance: float) -> None:
    """All checks of one operator, for one dtype and one device."""
    generator = torch.Generator().manual_seed(seed + 1)
    n = operator.num_sets if operator.num_sets > 1 else 3
    x = torch.rand(n, *operator.image_shape, generator=generator, dtype=torch.float64).to(device, dtype)
    other = torch.rand(n, *operator.image_shape, generator=generator, dtype=torch.float64).to(device, dtype)
    before, measured = _snapshot(operator), _measured(operator, x)
    _check_forward(operator, x)
    _check_rows(operator, x)
    _check_refusals(operator, x)
    _check_observed(operator, x, other)
    if operator.linear:
        _check_linear(operator, x, other)
        _check_adjoint(operator, x, generator)
        _check_pseudo_inverse(operator, x, pseudo_inverse_tolerance)
        _check_structure(operator, x)
    _check_gradient(operator, x, generator)
    _check_sets(operator, x)
    _check_views(operator, x)
    _check_noise(operator, x, seed)
    _expect_unchanged(operator, before, x, measured, "forward, adjoint, embed, measure, expand, select or context")


def _name(operator: Operator) -> str:
    return f"{type(operator).__name__} ({operator.dtype}, num_sets={operator.num_sets})"


def _measured(operator: Operator, x: Tensor) -> Tensor:
    """Apply the operator to a copy of the images, with a clear message for exceptions."""
    return attempt(lambda: operator(x.clone()), f"{_name(operator)}: forward of images {tuple(x.shape)}, {x.dtype},",
                   "It must accept (n, *image_shape) for any n, in float32 or float64: register parameters as buffers, "
                   "and convert them with value.to(x)")


def _floor(reference: Tensor) -> float:
    """Scale below which errors are absolute instead of relative, in units of the measurement."""
    return max(1e-3 * root_mean_square(reference), 1e-30)


def _check_attributes(operator: Operator) -> None:
    name = type(operator).__name__
    for attribute in ("image_shape", "measurement_shape"):
        shape = getattr(operator, attribute, None)
        sizes = shape if isinstance(shape, tuple) else (0,)
        expect(len(sizes) > 0 and all(isinstance(k, int) and k > 0 for k in sizes),
               f"{name}.{attribute} is {shape!r}: set a tuple of positive ints, such as (1, 28, 28)")
    expect(isinstance(operator.linear, bool), f"{name}.linear is {operator.linear!r}: set True or False")
    expect(operator.problem_class is None or isinstance(operator.problem_class, str),
           f"{name}.problem_class is {operator.problem_class!r}: set a string, or None")
    expect(isinstance(operator.num_sets, int) and operator.num_sets >= 1,
           f"{name}.num_sets is {operator.num_sets!r}: register_sets sets it from the parameters")


def _check_forward(operator: Operator, x: Tensor) -> None:
    kept, name = x.clone(), _name(operator)
    y = operator(x)
    expect(torch.equal(x, kept), f"{name}: forward modified its images: copy before writing in place")
    expected = (len(x), *operator.measurement_shape)
    expect(tuple(y.shape) == expected,
           f"{name}: forward of images {tuple(x.shape)} has shape {tuple(y.shape)}, expected "
           f"(n, *measurement_shape) = {expected}. Check measurement_shape and the batch axis")
    expect(y.dtype == x.dtype and y.device == x.device,
           f"{name}: forward of {x.dtype} on {x.device} returns {y.dtype} on {y.device}. Register parameters "
           "as buffers, and convert them with value.to(x)")
    expect(bool(torch.isfinite(y).all()), f"{name}: forward of images in [0, 1] is not finite")
    expect_close(operator(x), y, rounding(x.dtype), f"{name}: forward of the same images again",
                 "An operator is deterministic: noise belongs in measure, draws in randomize")


def _check_rows(operator: Operator, x: Tensor) -> None:
    y = operator(x)
    for i in (0, len(x) - 1):
        alone = operator.select([i])(x[i:i + 1])
        expect_close(alone, y[i:i + 1], rounding(x.dtype),
                     f"{_name(operator)}: row {i} alone, against that row of a batch",
                     "A row must not depend on the others: look for sums or normalisation over the batch "
                     "axis, and at select", _floor(y))


def _check_refusals(operator: Operator, x: Tensor) -> None:
    wrong = {"images with one more axis": x[:, None], "a single image without its batch": x[0],
             "no images": x[:0], "images of integers": (x * 255).to(torch.uint8)}
    for what, value in wrong.items():
        try:
            operator(value)
        except (ValueError, TypeError):
            continue
        raise AssertionError(
            f"{_name(operator)} accepted {what}, {value.dtype} {tuple(value.shape)}, without an error: keep the "
            "checks of Operator.__call__, or call self.check_images(x) yourself"
        )


def _check_observed(operator: Operator, x: Tensor, other: Tensor) -> None:
    observed, name = operator.observed(), _name(operator)
    if observed is None:
        return
    expected = (operator.num_sets, *operator.measurement_shape)
    expect(observed.dtype == torch.bool and tuple(observed.shape) == expected,
           f"{name}: observed() is {observed.dtype} {tuple(observed.shape)}, expected bool {expected}")
    first, second = operator(x), operator(other)
    difference = float(torch.where(observed, 0.0, first - second).abs().max())
    expect(difference <= 1e-6 * float(first.abs().max()),
           f"{name}: an unobserved entry changes with the image by up to {difference:.2e}. Unobserved "
           "entries must be constant, such as zero, because likelihoods ignore them")


def _check_linear(operator: Operator, x: Tensor, other: Tensor) -> None:
    y = operator(x)
    black, scale = root_mean_square(operator(torch.zeros_like(x))), root_mean_square(y)
    advice = "It declares that it is linear: look for clipping and for scaling by the image, or set linear = False"
    if black > rounding(x.dtype) * scale:
        advice = (f"It is affine: a black image gives {black:.2e}, not 0 (root mean square; a random one "
                  f"{scale:.2e}). Remove the offset, or set linear = False")
    expect_close(operator(2 * x - 3 * other), 2 * y - 3 * operator(other), 10 * rounding(x.dtype),
                 f"{_name(operator)}: A(2x - 3x') against 2 A(x) - 3 A(x')", advice, _floor(y))


_DIFFERENTIABLE = ("Solvers differentiate forward: write it in torch, without torch.no_grad, detach, numpy() or "
                   "in-place writes; for a linear map in another library, build the matrix once and multiply by it, "
                   "or wrap map and adjoint in a torch.autograd.Function")


def _check_adjoint(operator: Operator, x: Tensor, generator: torch.Generator) -> None:
    """Check <A x, y> = <x, A' y>, also for y = A x, where nothing cancels; and the gradient of A' in y."""
    name, limit = _name(operator), _ADJOINT[x.dtype]
    clean = operator(x)
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64).to(clean)
    found = {}
    for what, y in (("random y", noise), ("y = A x", clean)):
        back = attempt(lambda y=y: operator.adjoint(y),  # type: ignore[misc]
                       f"{name}: adjoint of {what}, {tuple(y.shape)},", _DIFFERENTIABLE)
        expect(back.shape == x.shape,
               f"{name}: adjoint has shape {tuple(back.shape)}, expected {tuple(x.shape)}")
        left = float((clean.double() * y.double()).sum())
        right = float((x.double() * back.double()).sum())
        error = abs(left - right) / max(float(clean.double().norm() * y.double().norm()), 1e-30)
        found[what] = left, right, error
    for what, (left, right, error) in found.items():
        expect(error <= limit,
               f"{name}: <A x, y> = {left:.6g} but <x, A' y> = {right:.6g} for {what}, relative error "
               f"{error:.1e}, allowed {limit:.0e}. The adjoint is not the transpose of forward{_factor(found)}: remove "
               "it to use the default, the vector-Jacobian product, which is exact")
    y = noise.clone().requires_grad_()
    back = operator.adjoint(y)
    advice = "The adjoint must be differentiable: avoid torch.no_grad, detach and in-place writes"
    expect(back.requires_grad, f"{name}: the adjoint carries no gradient in y. {advice}")
    (gradient,) = torch.autograd.grad((back * x).sum(), y)
    expect_close(gradient, clean, 10 * rounding(x.dtype), f"{name}: gradient of <x, A' y> in y, against A x",
                 advice, _floor(clean))


def _factor(found: dict[str, tuple[float, float, float]]) -> str:
    """Note if both pairs of products differ by the same factor, that is, only a scale is missing."""
    ratios = [right / left if left else math.nan for left, right, _ in found.values()]
    agree = abs(ratios[0] - ratios[1]) <= 1e-3 * abs(ratios[1])  # also false for NaN
    return f" but {ratios[1]:.6g} times it: a factor is missing" if agree else ""


def _check_gradient(operator: Operator, x: Tensor, generator: torch.Generator) -> None:
    """Check the gradient of <A x, w> in x: against A' w for a linear operator, else against finite differences."""
    name, images = _name(operator), x.clone().requires_grad_()
    y = attempt(lambda: operator(images), f"{name}: forward of images that require a gradient", _DIFFERENTIABLE)
    expect(y.requires_grad, f"{name}: forward carries no gradient in x. {_DIFFERENTIABLE}")
    weights = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    (gradient,) = torch.autograd.grad((y * weights).sum(), images)
    if operator.linear:
        back = operator.adjoint(weights)
        expect_close(gradient, back, 10 * rounding(x.dtype), f"{name}: gradient of <A x, w> in x, against A' w",
                     _DIFFERENTIABLE, _floor(back))
    elif x.dtype == torch.float64:
        direction = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        ends = [(operator(x + h * direction) * weights).flatten(1).sum(1) for h in (1e-6, -1e-6)]
        along = (gradient * direction).flatten(1).sum(1)
        expect_close(along, (ends[0] - ends[1]) / 2e-6, 1e-3,
                     f"{name}: gradient of <A(x), w> along a random direction, against finite differences",
                     _DIFFERENTIABLE, _floor(along))


def _check_pseudo_inverse(operator: Operator, x: Tensor, tolerance: float) -> None:
    y = operator(x)
    back = attempt(lambda: operator.pseudo_inverse(y), f"{_name(operator)}: pseudo_inverse",
                   "Remove it to use the default, conjugate gradients")
    expect(back.shape == x.shape,
           f"{_name(operator)}: pseudo_inverse has shape {tuple(back.shape)}, expected {tuple(x.shape)}")
    expect_close(operator(back), y, tolerance, f"{_name(operator)}: A A^+ A x against A x",
                 "pseudo_inverse must return a least-squares image; pass pseudo_inverse_tolerance=... if it "
                 "regularises on purpose", _floor(y))


def _check_structure(operator: Operator, x: Tensor) -> None:
    """Check the declared structure against the one found without the declaration."""
    said, silent = operator.structure, copy.copy(operator)
    kinds = ("identity", "diagonal", "circular", "dense", None)
    expect(said in kinds, f"{_name(operator)}: structure is {said!r}, expected one of {kinds}")
    silent.structure = None
    likelihood = GaussianLikelihood(silent, operator(x), 1.0)
    values = diagonal_values(likelihood)
    right = {"diagonal": values is not None, "circular": transfer_function(likelihood) is not None,
             "identity": values is not None and bool((values == 1).all())}
    expect(right.get(str(said), True),
           f"{_name(operator)}: structure is {said!r}, but its measurement of noise does not follow from its "
           f"measurement of {'an impulse' if said == 'circular' else 'ones'}: solvers would use a wrong "
           "operator. Leave structure out to have it determined automatically")


def _check_sets(operator: Operator, x: Tensor) -> None:
    """Check the order of expand and select, with different images in each row."""
    y, name = operator(x), _name(operator)
    doubled = operator.expand(2)
    expected = 2 * operator.num_sets if operator.num_sets > 1 else 1
    expect(doubled.num_sets == expected,
           f"{name}: expand(2) has {doubled.num_sets} sets, expected {expected}")
    expect_close(doubled(x.repeat_interleave(2, 0)), y.repeat_interleave(2, 0), rounding(x.dtype),
                 f"{name}: expand(2) on each image twice, against forward with each row twice",
                 "The order must be that of repeat_interleave, a a b b, not a b a b (repeat)", _floor(y))
    last = len(x) - 1
    for index in ([last, 0, last], torch.tensor([1, 0]), slice(1, None)):
        rows = torch.arange(len(x), device=x.device)[index]
        expect_close(operator.select(index)(x[rows]), y[rows], rounding(x.dtype),
                     f"{name}: select({index}) on those images, against those rows of forward",
                     "select must keep the order of its index, and repeats", _floor(y))


def _check_views(operator: Operator, x: Tensor) -> None:
    """Check the inputs of a neural adapter: embed and context."""
    name, y = _name(operator), operator(x)
    kept = y.clone()
    embedded = operator.embed(y)
    expect(embedded.shape == x.shape and bool(torch.isfinite(embedded).all()),
           f"{name}: embed has shape {tuple(embedded.shape)}, expected {tuple(x.shape)}, with finite values")
    expect_close(operator.embed(y), embedded, rounding(x.dtype), f"{name}: embed of the same y again",
                 "embed must be deterministic")
    expect(torch.equal(y, kept), f"{name}: embed modified the measurement: copy before writing in place")
    maps, vector = operator.context()
    spatial = operator.image_shape[1:] or operator.image_shape
    for what, value, shape in (("maps", maps, (operator.num_sets, 1, *spatial)),
                               ("vector", vector, (operator.num_sets, SUMMARY_SIZE))):
        finite = value.is_floating_point() and bool(torch.isfinite(value).all())
        expect(tuple(value.shape) == shape and finite,
               f"{name}: context's {what} is {value.dtype} {tuple(value.shape)}, expected finite {shape}")
        expect(not value.requires_grad, f"{name}: context's {what} requires a gradient: detach it")
    some = operator.select([len(x) - 1])
    expect_close(some.embed(y[-1:]), embedded[-1:], 10 * rounding(x.dtype),
                 f"{name}: embed of the last row alone", "embed must treat rows independently")
    expect_close(some.context()[0], maps[-1:], rounding(x.dtype), f"{name}: context of the last set alone",
                 "context must treat sets independently")


def _check_noise(operator: Operator, x: Tensor, seed: int) -> None:
    name, clean, observed = _name(operator), operator(x), operator.observed()
    sigma = torch.linspace(0.1, 0.3, len(x), dtype=x.dtype, device=x.device)
    level = with_axes(sigma, clean.ndim)
    seen = torch.ones_like(clean, dtype=torch.bool) if observed is None else observed.expand_as(clean)

    def scaled_noise(s: int, repeats: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(s)
        draws = [operator.measure(x, sigma, generator=generator) - clean for _ in range(repeats)]
        return torch.stack(draws) / level

    expect(torch.equal(scaled_noise(seed), scaled_noise(seed)),
           f"{name}: measure drew other noise for the same generator seed: draw from the generator passed to it")
    expect(not torch.equal(scaled_noise(seed), scaled_noise(seed + 1)),
           f"{name}: measure drew the same noise for two generator seeds: draw from the generator passed to it")
    noise = scaled_noise(seed, min(200, math.ceil(2000 / max(1, int(seen.sum())))))
    expect(bool((noise[:, ~seen] == 0).all()), f"{name}: measure adds noise to unobserved entries")
    values = noise[:, seen].double()
    mean, std, count = float(values.mean()), float(values.std()), values.numel()
    expect(abs(mean) <= 5 / math.sqrt(count) and abs(std - 1) <= 5 / math.sqrt(2 * count),
           f"{name}: measure's noise over sigma has mean {mean:.3f} and standard deviation {std:.3f} in "
           f"{count} draws, expected 0 and 1 within five standard errors. sigma is the standard deviation, not the "
           "variance, in the measurement's units")


def _check_randomize(operator: Operator, seed: int) -> None:
    name = type(operator).__name__
    first, again, other = (
        operator.randomize(_SETS, torch.Generator().manual_seed(s)) for s in (seed, seed, seed + 1)
    )
    expect(first.num_sets in (1, _SETS),
           f"{name}: randomize({_SETS}) has {first.num_sets} sets, expected {_SETS}, or 1 without draws")
    for attribute in ("image_shape", "measurement_shape"):
        expect(getattr(first, attribute) == getattr(operator, attribute),
               f"{name}: randomize changes {attribute} to {getattr(first, attribute)}")
    expect(first.problem_class == operator.problem_class and first.linear == operator.linear,
           f"{name}: randomize changes problem_class or linear")
    if first.num_sets == 1:
        return
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(1, *operator.image_shape, generator=generator).to(operator.device, operator.dtype)
    x = image.repeat_interleave(_SETS, 0)
    y = first(x)
    expect_close(again(x), y, 0.0, f"{name}: randomize twice with the same generator seed",
                 "Draw only from the generator passed to it")
    expect(bool((y[1:] != y[:1]).any()),
           f"{name}: randomize({_SETS}) drew the same parameters for every image: draw one set for each image")
    expect(bool((other(x) != y).any()),
           f"{name}: randomize drew the same parameters for two generator seeds: draw from the generator passed to it")


def _snapshot(operator: Operator) -> dict[str, Any]:
    """Tensors and plain attributes of the operator, excluding values computed and cached on first use."""
    tensors = {**dict(operator.named_buffers()), **dict(operator.named_parameters())}
    plain = {name: value for name, value in vars(operator).items() if name != "training"
             and all(isinstance(part, bool | int | float | str | Tensor)
                     for part in (value if isinstance(value, tuple) else (value,)))}
    kept = {name: value.clone() if isinstance(value, Tensor) else value for name, value in {**plain, **tensors}.items()}
    return {**kept, "names of tensors": tuple(sorted(tensors))}


def _expect_unchanged(operator: Operator, before: dict[str, Any], x: Tensor, measured: Tensor, what: str) -> None:
    now, advice = _snapshot(operator), "an operator must not change in use, so return a new one"
    changed = [name for name in before if name not in now or not _same(now[name], before[name])]
    expect(not changed,
           f"{_name(operator)}: {changed} changed in {what}: {advice}, as Operator.register_sets provides for")
    expect_close(operator(x.clone()), measured, rounding(x.dtype),
                 f"{_name(operator)}: forward of the same images before and after {what}",
                 f"It stores something that these calls change: {advice}", _floor(measured))


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and torch.equal(first, second)
    if isinstance(first, tuple) and isinstance(second, tuple):
        return len(first) == len(second) and all(_same(a, b) for a, b in zip(first, second))
    return type(first) is type(second) and bool(first == second)
