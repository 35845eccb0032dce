"""The contract of a flow map, as one check for any flow map."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from invflow.flowmap import FlowMap
from invflow.testing._flow_laws import check_law, check_regression
from invflow.testing._tools import attempt, expect, expect_close, rounding, watch_global_seed

__all__ = ["check_flow_map"]

_ROWS = 6


def check_flow_map(flow_map: FlowMap | Callable[[], FlowMap], *, exact: bool = True, tolerance: float = 1e-3,
                   images: Tensor | None = None, seed: int = 0) -> None:
    """Check that a flow map satisfies the contract that solvers rely on.

    Checked: shapes and dtypes; independence of rows; times as floats or one for each row;
    X_{s,s} as the identity; the velocity as the derivative of the jump at t = s; the semigroup
    X_{s,t} = X_{u,t} o X_{s,u}; decoding and its inverse; denoiser and score; the count of calls, forward and
    backward; ``generate`` reproducible, independent of chunks and of global random state.

    The direction of time is checked in two ways. For an exact map trained with independent noise, the score must be
    that of the map's own samples: E[s_t(x)] = 0 and E[x . s_t(x)] = -d (Stein 1981), within five
    standard errors and a tenth. About one in a million seeds would raise a false alarm; a seed that passes always
    passes. (A reversed flow of a Gaussian centred at zero is a flow of another Gaussian, and this check does not detect
    it.) With ``images``, the velocity must predict m - z better than its network would with any other conventions, and
    the message names the conventions that do better: time or sign reversed, only the time argument reversed, times
    in thousands or not, a linear, cosine or variance-preserving path, noise or data predicted instead of a velocity,
    the other second argument of an average velocity, states in [0, 1], [-1, 1] or [0, 255], colours in reverse order.

    A map without a velocity, which only jumps to data, skips the checks that do not apply.

    Args:
        flow_map: The map, or a function without arguments that builds it.
        exact: Whether the jump solves the ODE of the velocity, and the velocity is that of a law. False, for a learned
            map, skips the semigroup, Stein's identities and the inverse of a decoder that is not affine.
        tolerance: Relative root-mean-square error allowed in the semigroup and in the velocity as a
            derivative (by finite differences: at best about 1e-4 in float32, 1e-7 in float64).
        images: ``(n, *image_shape)``, at least 16 images of the kind that the map was trained on: the best test of a
            learned map's conventions.
        seed: Random seed of the test states.

    Raises:
        AssertionError: At the first failure; the message says what failed, by how much, and what to check.

    Example:
        >>> import torch, invflow
        >>> from invflow.testing import check_flow_map
        >>> check_flow_map(invflow.GaussianMixtureFlow(torch.eye(3), std=0.5))
    """
    prior = flow_map if isinstance(flow_map, FlowMap) else flow_map()
    expect(isinstance(prior, FlowMap),
           f"a {type(prior).__name__} is not a FlowMap: derive it from invflow.FlowMap, and pass an instance")
    _check_attributes(prior)
    generator = torch.Generator().manual_seed(seed)
    with watch_global_seed(f"{type(prior).__name__}.noise"):
        noise = prior.noise(_ROWS, generator=generator)
    with watch_global_seed(f"{type(prior).__name__}.velocity or jump"), torch.no_grad():
        # states as they occur at t = 1/4: not noise, so that the later times are not tried far off the data
        end = 0.25 if prior.has_velocity else 1.0
        x = attempt(lambda: prior.jump(noise, 0.0, end), f"{type(prior).__name__}: jump(x, 0.0, {end}) of states "
                    f"{tuple(noise.shape)}", "It must accept (n, *state_shape), and times as floats or tensors (n,)")
        x = x if prior.has_velocity else 0.75 * noise + 0.25 * x
        _check_evaluation(prior, x)
        _check_rows(prior, x)
        _check_jump(prior, x, exact, tolerance)
        _check_denoiser_and_score(prior, x)
        _check_decoding(prior, prior.jump(noise, 0.0, 1.0), exact)
        if exact and prior.independent_noise and prior.has_velocity:
            check_law(prior, seed)
        if images is not None:
            check_regression(prior, images, seed)
    _check_counting(prior, x)
    _check_generate(prior, seed)


def _check_attributes(prior: FlowMap) -> None:
    name = type(prior).__name__
    for attribute in ("state_shape", "image_shape"):
        shape = getattr(prior, attribute, None)
        sizes = shape if isinstance(shape, tuple) else (0,)
        expect(len(sizes) > 0 and all(isinstance(k, int) and k > 0 for k in sizes),
               f"{name}.{attribute} is {shape!r}: set a tuple of positive ints, such as (1, 28, 28)")
    expect(isinstance(prior.independent_noise, bool),
           f"{name}.independent_noise is {prior.independent_noise!r}: set True or False")
    expect(isinstance(prior.has_velocity, bool), f"{name}.has_velocity is {prior.has_velocity!r}: set True or False")


def _check_evaluation(prior: FlowMap, x: Tensor) -> None:
    """Shapes, types and finite values, at the ends of the path too."""
    times = torch.linspace(0, 1, len(x), dtype=x.dtype, device=x.device)
    calls: dict[str, Callable[[], Tensor]] = {
        "velocity(x, 0.5)": lambda: prior.velocity(x, 0.5),
        "velocity(x, 0.0)": lambda: prior.velocity(x, 0.0),
        "velocity(x, t) with t of shape (n,)": lambda: prior.velocity(x, times),
        "velocity(x, t) with a 0-d t": lambda: prior.velocity(x, torch.tensor(0.5)),
        "jump(x, 0.0, 1.0)": lambda: prior.jump(x, 0.0, 1.0),
        "jump(x, s, t) with t of shape (n,)": lambda: prior.jump(x, times / 2, times),
    }
    if not prior.has_velocity:
        calls = {"jump(x, 0.0, 1.0)": calls["jump(x, 0.0, 1.0)"],
                 "jump(x, s, 1.0) with s of shape (n,)": lambda: prior.jump(x, times, 1.0)}
    for what, call in calls.items():
        out = attempt(call, what,
                      "It must accept times as floats, 0-d tensors or tensors (n,): see invflow.flowmap.expand_time")
        expect(out.shape == x.shape and out.dtype == x.dtype,
               f"{what} returned {tuple(out.shape)} {out.dtype} for states {tuple(x.shape)} {x.dtype}: both must "
               "be kept")
        expect(bool(out.isfinite().all()),
               f"{what} is not finite: a formula that divides by t or 1 - t needs its limit at the ends")


def _check_rows(prior: FlowMap, x: Tensor) -> None:
    """Check that rows are independent, and that per-row times agree with floats."""
    advice = ("Rows of a batch are not independent: look for batch normalisation, a mean over the first axis, a step "
              "size chosen for all rows together; or wrong broadcasting of times (n,) (expand_time).")
    starts = torch.linspace(0.1, 0.5, len(x), dtype=x.dtype, device=x.device)
    ends = starts.flip(0) + 0.4
    limit = rounding(x.dtype)
    if prior.has_velocity:
        alone = [prior.velocity(x[i:i + 1], float(starts[i])) for i in range(len(x))]
        expect_close(prior.velocity(x, starts), torch.cat(alone), limit,
                     "velocity: a batch against its single rows", advice)
    else:
        ends = torch.ones_like(starts)
    alone = [prior.jump(x[i:i + 1], float(starts[i]), float(ends[i])) for i in range(len(x))]
    expect_close(prior.jump(x, starts, ends), torch.cat(alone), limit,
                 "jump: a batch against its single rows", advice)


def _check_jump(prior: FlowMap, x: Tensor, exact: bool, tolerance: float) -> None:
    for s in (0.0, 0.25, 1.0):
        expect_close(prior.jump(x, s, s), x, rounding(x.dtype), f"jump(x, s, s) against x, at s = {s}",
                     "A jump of length zero must be the identity: write it as x + (t - s) u(x, s, t).")
    if not prior.has_velocity:
        return
    h = 1e-4 if x.dtype == torch.float64 else 5e-3
    for s in (0.25, 0.5, 0.9):
        state = prior.jump(x, 0.25, s)
        slope = (4 * prior.jump(state, s, s + h) - 3 * state - prior.jump(state, s, s + 2 * h)) / (2 * h)
        expect_close(slope, prior.velocity(state, s), tolerance,
                     f"(d/dt) jump(x, s, t) at t = s = {s} against velocity(x, s)",
                     "The jump does not start in the direction of the velocity: check the sign and the "
                     "direction of time (data at t = 1), or at u(x, t, t) = b_t(x).", floor=0.1)
    if not exact:
        return
    for s, u, t in ((0.25, 0.6, 1.0), (0.25, 0.3, 0.95), (0.25, 0.1, 0.0)):
        expect_close(prior.jump(prior.jump(x, s, u), u, t), prior.jump(x, s, t), tolerance,
                     f"two jumps {s} -> {u} -> {t} against one",
                     "The semigroup X_{s,t} = X_{u,t} o X_{s,u} is broken: the jump is not the flow of one ODE, or "
                     "solves it too coarsely (raise its number of steps); for a learned map pass exact=False.")


def _check_denoiser_and_score(prior: FlowMap, x: Tensor) -> None:
    t, limit = 0.25, 100 * rounding(x.dtype)
    if not prior.has_velocity:
        for call in (prior.velocity, prior.denoise, prior.score):
            try:
                call(x, t)
            except ValueError:
                continue
            expect(False, f"{type(prior).__name__}.has_velocity is False, but {call.__name__}(x, t) returns a value: "
                          "it must raise ValueError, with the message of invflow.FlowMap.refusal")
        return
    velocity = prior.velocity(x, t)
    expect_close(prior.denoise(x, t), x + (1 - t) * velocity, limit,
                 "denoise(x, t) against x + (1 - t) velocity",
                 "This identity holds on the linear path x_t = (1 - t) z + t m. Both sides are states: a "
                 "denoiser of images in [0, 1] needs decode(x), and its output encode (as in invflow.from_deepinv).")
    if prior.independent_noise:
        expect_close(prior.score(x, t), (t * velocity - x) / (1 - t), limit,
                     "score(x, t) against (t velocity - x) / (1 - t)",
                     "This identity holds if the noise is independent of the data.")
        return
    try:
        prior.score(x, t)
    except ValueError:
        return
    expect(False, f"{type(prior).__name__}.independent_noise is False, but score(x, t) returns a value: it must "
                  "raise ValueError, since the velocity of a jointly trained map does not define a score")


def _check_decoding(prior: FlowMap, state: Tensor, exact: bool) -> None:
    image = prior.decode(state)
    expect(tuple(image.shape) == (len(state), *prior.image_shape),
           f"decode returned {tuple(image.shape)} for states {tuple(state.shape)}, expected (n, *image_shape) = "
           f"{(len(state), *prior.image_shape)}")
    back = prior.encode(image)
    affine = prior.decode_affine
    if affine is not None:
        scale, shift = affine
        expect(tuple(prior.image_shape) == tuple(prior.state_shape),
               f"decode_affine is {affine}, but states {prior.state_shape} and images "
               f"{prior.image_shape} differ in shape: set it to None, or make the shapes equal")
        expect_close(image, scale * state + shift, rounding(state.dtype),
                     f"decode(x) against {scale} x + {shift}, its decode_affine",
                     "Solvers for linear-Gaussian problems rely on decode_affine: correct it, or use None.")
    if affine is not None or exact:
        expect_close(back, state, 10 * rounding(state.dtype), "encode(decode(x)) against x",
                     "encode must invert decode: images lie in [0, 1], states in the range of the map's training.")
    expect(tuple(back.shape) == tuple(state.shape),
           f"encode returned {tuple(back.shape)} for images {tuple(image.shape)}, expected {tuple(state.shape)}")


def _check_counting(prior: FlowMap, x: Tensor) -> None:
    advice = ("velocity and jump of a FlowMap are counted automatically; a method that evaluates a network "
              "in another way must call self.record_output(output, rows).")
    calls: dict[str, Callable[[Tensor], Tensor]] = {"velocity": lambda x: prior.velocity(x, 0.5),
                                                    "jump": lambda x: prior.jump(x, 0.25, 0.75)}
    if not prior.has_velocity:
        calls = {"jump": lambda x: prior.jump(x, 0.25, 1.0)}
    for name, call in calls.items():
        counts = []
        for rows in (2, 4):
            start = x[:rows].detach().clone().requires_grad_()
            with prior.count() as outer, prior.count() as inner:
                out = call(start)
                forward = inner.forward
                expect(out.requires_grad, f"{name}(x) cannot be differentiated with respect to x")
                torch.autograd.grad(out.sum(), start)
            expect(forward == inner.forward == outer.forward, f"{name}: nested scopes disagree. {advice}")
            expect(inner.backward == forward,
                   f"{name}, differentiated, counted {forward} rows forward and {inner.backward} backward: "
                   f"expected equal numbers. {advice}")
            counts.append(forward)
        expect(counts[0] > 0 and counts[1] == 2 * counts[0],
               f"{name} counted {counts[0]} rows forward for 2 states and {counts[1]} for 4. {advice}")
        if name == "velocity":
            expect(counts[0] == 2, f"velocity counted {counts[0]} rows forward for 2 states. {advice}")


def _check_generate(prior: FlowMap, seed: int) -> None:
    def draw(seed: int, chunk_size: int = 256, steps: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return prior.generate(_ROWS, steps, generator=generator, chunk_size=chunk_size)

    with watch_global_seed("generate"):
        first = draw(seed)
    expect(tuple(first.shape) == (_ROWS, *prior.image_shape) and bool(first.isfinite().all()),
           f"generate returned {tuple(first.shape)}, expected finite images {(_ROWS, *prior.image_shape)}")
    expect(torch.equal(first, draw(seed)),
           "generate with the same seed returned other images: draw all random numbers from the generator")
    expect(not torch.equal(first, draw(seed + 1)), "generate with another seed returned the same images")
    expect_close(draw(seed, chunk_size=4), first, rounding(first.dtype),
                 "generate: chunks of 4 against all at once",
                 "Draw all noise before the first chunk; also look for batch normalisation.")
    expect(draw(seed, steps=2).shape == first.shape, "generate with two steps changed the shape")
