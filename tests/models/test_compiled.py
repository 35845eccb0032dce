"""Compiled networks give the same results as uncompiled ones, including gradients and tangents."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import invflow
from invflow.bench import compiled as bench_compiled
from invflow.cli.image_task import compile_solver
from invflow.flowmap import bytes_per_row
from invflow.models.compiled import compiled_networks
from invflow.nets.unet import UNet
from invflow.operators import BoxInpainting
from invflow.training import LoopSettings, TrainingProblem, loop, train_vfm

SHAPE = (1, 8, 8)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prior_and_compiled(**options: Any) -> tuple[invflow.NeuralFlowMap, invflow.NeuralFlowMap, list[int]]:
    """A map, one compiled with the same weights, and the numbers of nodes in the graphs that the compiler was given."""
    prior = invflow.NeuralFlowMap(SHAPE, options={"channels": [8, 8], "blocks": 1, "embedding": 8},
                                  generator=seeded(1))
    for parameter in prior.parameters():  # the last layer starts at zero
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=seeded(parameter.numel()))
    prior.requires_grad_(False)
    seen: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        seen.append(len(graph.graph.nodes))
        return graph.forward

    other = copy.deepcopy(prior)
    invflow.compile_networks(other, mode="default", backend=backend, **options)
    return prior, other, seen


def test_jumps_and_their_gradients_are_the_same() -> None:
    prior, other, seen = prior_and_compiled()
    x = torch.randn(3, *SHAPE, generator=seeded())
    with torch.no_grad():
        torch.testing.assert_close(other.jump(x, 0.2, 0.9), prior.jump(x, 0.2, 0.9))
    assert len(seen) == 1  # one graph, without a break
    assert seen[0] > 20
    grads = []
    for flow in (prior, other):
        z = x.clone().requires_grad_()
        grads.append(torch.autograd.grad(flow.flow(z, 2).square().sum(), z)[0])  # two calls before one backward pass
    torch.testing.assert_close(grads[1], grads[0])


def test_forward_mode_passes_through() -> None:
    prior, other, seen = prior_and_compiled()
    x, v = torch.randn(2, 3, *SHAPE, generator=seeded())
    expected = torch.func.jvp(lambda x: prior.jump(x, 0.2, 0.9), (x,), (v,))
    torch.testing.assert_close(torch.func.jvp(lambda x: other.jump(x, 0.2, 0.9), (x,), (v,)), expected)
    assert not seen
    torch.testing.assert_close(other.jump(x, 0.2, 0.9), expected[0])
    assert seen  # and is compiled as ever, once it is over


def test_what_is_saved_or_copied_is_not_compiled(tmp_path: Any) -> None:
    prior, other, seen = prior_and_compiled()
    other.save_pretrained(tmp_path)
    assert other.fingerprint() == prior.fingerprint()
    x = torch.randn(2, *SHAPE, generator=seeded())
    for twin in (invflow.load_prior(tmp_path), copy.deepcopy(other)):
        torch.testing.assert_close(twin.jump(x, 0.0, 1.0), prior.jump(x, 0.0, 1.0), rtol=0, atol=0)
    assert not seen
    other.jump(x, 0.0, 1.0)
    assert seen


def test_solvers_give_the_same_samples_and_count_the_same_calls() -> None:
    prior, other, seen = prior_and_compiled()
    operator = BoxInpainting(SHAPE)
    y = operator.measure(torch.rand(2, *SHAPE, generator=seeded()), 0.1, generator=seeded())
    likelihood = invflow.GaussianLikelihood(operator, y, sigma=0.1)
    plain, compiled = (invflow.FMTT(flow, steps=3, weights="none").sample(likelihood, 4, generator=seeded(2))
                       for flow in (prior, other))
    torch.testing.assert_close(compiled.samples, plain.samples, rtol=1e-4, atol=1e-4)
    assert compiled.nfe == plain.nfe
    assert seen


def test_results_outlive_the_next_call() -> None:
    """A CUDA graph has one place for its result: an adapter asked in parts must not find them all to be the last."""
    network = UNet(1, 1, channels=(8,), blocks=1, embedding=4, attention=False).requires_grad_(False)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=seeded(parameter.numel()))

    def replayed(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        place: list[Tensor] = []

        def run(*args: Tensor) -> list[Tensor]:
            result = graph.forward(*args)[0]
            if place:
                place[0].copy_(result)
            else:
                place.append(result.clone())
            return place

        return run

    x, embedding = torch.randn(2, 3, 1, 8, 8, generator=seeded()), torch.zeros(3, 4)
    expected = [network(part, embedding) for part in x]
    invflow.compile_networks(network, mode="default", backend=replayed)
    torch.testing.assert_close([network(part, embedding) for part in x], expected)


def test_nothing_is_compiled_to_learn_the_memory_of_a_row() -> None:
    prior, other, seen = prior_and_compiled()
    assert bytes_per_row(other) == bytes_per_row(prior) > 4 * SHAPE[1] * SHAPE[2]
    assert not seen
    other.jump(torch.zeros(2, *SHAPE), 0.0, 1.0)
    assert seen


def test_both_networks_of_a_vfm_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    vfm, compiled = invflow.VFM.load("mnist"), []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append((self, options)))
    compile_solver(vfm)
    assert {id(network) for network, _ in compiled} == {id(vfm.prior.network), id(vfm.adapter.network)}
    assert all(options == {"mode": "reduce-overhead"} for _, options in compiled)  # CUDA graphs, on a GPU


def test_what_has_no_network_is_refused() -> None:
    with pytest.raises(ValueError, match="GaussianMixtureFlow contains no network to compile"):
        invflow.compile_networks(invflow.GaussianMixtureFlow([[0.0, 1.0]], std=0.5))


def test_training_is_the_same_with_compiled_networks(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """To rounding; half of it without them, for a run may be taken up by another machine; nothing is left compiled."""
    runs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        def run(*args: Tensor) -> Any:
            runs.append(len(graph.graph.nodes))
            return graph.forward(*args)

        return run

    monkeypatch.setattr(loop, "compiled_networks", lambda module, **options: compiled_networks(module, backend=backend,
                                                                                             **options))
    prior, _, _ = prior_and_compiled()
    options = {"channels": [8, 8], "blocks": 1, "embedding": 8}
    images = torch.rand(40, *SHAPE, generator=seeded(3))
    problems = [TrainingProblem(BoxInpainting(SHAPE), (0.1, 0.5))]

    def train(folder: str, compile: bool, stop_at: int | None = None) -> invflow.VFM:
        settings = LoopSettings(steps=6, batch_size=8, warmup=2, precision="no", compile=compile)
        return train_vfm(images, prior, problems, settings, tmp_path / folder, options=options, tangent="semigroup",
                         progress=False, stop_at=stop_at)

    plain = train("plain", False)
    assert not runs
    compiled = train("compiled", True)
    # adapter, map in the observation term and map in its own: at least three calls a step
    assert len(runs) >= 18
    assert min(runs) > 6
    train("halves", False, stop_at=3)
    halves = train("halves", True)
    for other in (compiled, halves):
        for ours, theirs in ((other.prior, plain.prior), (other.adapter, plain.adapter)):
            assert all(module._compiled_call_impl is None for module in ours.modules())
            for name, value in ours.state_dict().items():
                torch.testing.assert_close(value, theirs.state_dict()[name], rtol=1e-3, atol=1e-5)


def test_benchmark_times_compiled_networks_over_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [0, 0]  # of compiled graphs, and of networks as they are

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        def run(*args: Tensor) -> Any:
            runs[0] += 1
            return graph.forward(*args)

        return run

    def forward(self: UNet, *args: Any, **kwargs: Any) -> Tensor:
        runs[1] += not torch.compiler.is_compiling()
        return as_it_is(self, *args, **kwargs)

    def compile_networks(module: torch.nn.Module) -> None:
        invflow.compile_networks(module, mode="default", backend=backend)

    def count(first: Callable[[], object], second: Callable[[], object], *rest: object) -> tuple[float, float]:
        first()
        compiled, runs[:] = tuple(runs), (0, 0)
        second()
        plain, runs[:] = tuple(runs), (0, 0)
        assert compiled[0] == plain[1] > 0 == compiled[1] == plain[0]
        return 3.0, 4.0

    as_it_is = UNet.forward
    monkeypatch.setattr(UNet, "forward", forward)
    monkeypatch.setattr(bench_compiled, "compile_networks", compile_networks)
    monkeypatch.setattr(bench_compiled, "medians", count)
    monkeypatch.setattr(bench_compiled, "PARTICLES", 2)
    results = list(bench_compiled.bench_compiled(1, torch.device("cpu"), seeded()))
    assert [result.name.partition(",")[0] for result in results] == ["VFM", "FMTT", "NoiseSMC"]
    assert all(result.ratio == 0.75 and result.passed for result in results)
