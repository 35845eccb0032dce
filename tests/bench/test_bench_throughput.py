"""The throughput benchmark: operation counts against hand counts, and shares between 0 and 1."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from invflow.bench import runner as bench
from invflow.bench import throughput as bench_throughput
from invflow.bench import timing
from invflow.likelihood import GaussianLikelihood
from invflow.nets.unet import UNet


def test_operations_of_a_convolution_are_those_on_paper() -> None:
    layer = nn.Conv2d(3, 8, 5, padding=2)
    # two for each multiply-add: 8 outputs of 3 x 5 x 5 products at 10 x 12 places of 4 images
    assert bench_throughput.flops_of(lambda: layer(torch.zeros(4, 3, 10, 12))) == 2 * 4 * 8 * 3 * 25 * 120


def test_a_network_costs_in_proportion_to_its_pixels() -> None:
    network = UNet(1, 1, channels=(8, 16), blocks=1, embedding=4, attention=False)
    embedding = torch.zeros(1, 4)
    blocks = [block for level in (*network.down, *network.up) for block in level]
    with torch.no_grad():
        small = bench_throughput.flops_of(lambda: network(torch.zeros(1, 1, 16, 16), embedding))
        large = bench_throughput.flops_of(lambda: network(torch.zeros(1, 1, 32, 32), embedding))
        dense = bench_throughput.flops_of(lambda: [block.film(embedding) for block in blocks])
    assert large - dense == 4 * (small - dense)


def test_share_of_peak_is_work_over_time_over_what_the_device_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_throughput, "medians", lambda first, second, repeats, device: (2.2, 2.0))
    monkeypatch.setattr(bench_throughput, "flops_of", lambda function: 3_000)
    monkeypatch.setattr(bench_throughput, "matmul_rate", lambda dtype, device: 5_000.0)
    results = list(bench.bench_throughput(1, torch.device("cpu"), torch.Generator().manual_seed(0)))
    assert [r.name for r in results] == ["VFM.sample, float32", "VFM.sample, bfloat16"]
    assert results[0].details == pytest.approx({"samples a second": 1024 / 2.2, "share of peak": 3_000 / 2.0 / 5_000})
    text = bench.format_results(results)
    assert "samples a second 465.5, share of peak 0.3" in text
    monkeypatch.setattr(bench_throughput, "matmul_rate", lambda dtype, device: 1_000.0)  # exceeded: 1,500 a second
    results = list(bench.bench_throughput(1, torch.device("cpu"), torch.Generator().manual_seed(0)))
    assert [list(result.details) for result in results] == [["samples a second"]] * 2


def test_bfloat16_samples_are_those_of_single_precision_to_its_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    vfm = timing.fresh_vfm(torch.device("cpu"), generator)
    for parameter in vfm.prior.parameters():  # layers that start at zero would hide the network
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    operator = timing.training_problems()[0].operator
    y = operator.measure(torch.rand(1, *timing.SHAPE, generator=generator), 0.2, generator=generator)
    likelihood = GaussianLikelihood(operator, y, sigma=0.2)
    exact = vfm.sample(likelihood, 4, generator=torch.Generator().manual_seed(1)).samples
    with torch.autocast("cpu", torch.bfloat16):
        rounded = vfm.sample(likelihood, 4, generator=torch.Generator().manual_seed(1)).samples
    error = float((rounded - exact).square().mean().sqrt() / exact.std())
    assert rounded.dtype == exact.dtype == torch.float32
    assert 1e-5 < error < 0.02  # eight bits of mantissa through a dozen layers
