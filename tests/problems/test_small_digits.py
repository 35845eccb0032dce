"""MNIST at 14 x 14 pixels: the problems, the shipped prior and its training."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

import invflow
from invflow._core.folders import SHIPPED
from invflow.nets.classifier import Classifier
from invflow.operators import Denoising
from invflow.testing import check_flow_map, check_problem
from invflow_problems import small_digits
from invflow_problems.samples import load_samples
from invflow_problems.small_digits import halve, small_digits_prior

PROBLEMS = [getattr(small_digits, name) for name in small_digits.__all__ if name.startswith("mnist_14_")]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_the_problems_keep_the_contract(problem: invflow.Problem) -> None:
    check_problem(problem)
    assert problem.image_shape == problem.prior.image_shape == (1, 14, 14)
    assert problem.sigma == 0.1
    assert problem.images("test").shape == (200, 1, 14, 14)


def test_images_are_the_shipped_ones_averaged() -> None:
    images = load_samples("mnist", "validation")[0]
    by_hand = images.reshape(-1, 1, 14, 2, 14, 2).mean((3, 5))
    torch.testing.assert_close(halve(images), by_hand)
    torch.testing.assert_close(PROBLEMS[0].images("validation"), by_hand)


def test_half_of_the_pixels_along_each_side_are_hidden_or_averaged() -> None:
    hidden = small_digits.mnist_14_box_inpainting.operator.observed()[0, 0].logical_not()
    expected = torch.zeros(14, 14, dtype=torch.bool)
    rows = hidden.any(1).nonzero()[:, 0]
    start = int(rows[0])
    expected[start:start + 7, start:start + 7] = True
    assert torch.equal(hidden, expected)
    assert start in (3, 4)  # centred as well as an odd box can be
    operator = small_digits.mnist_14_super_resolution.operator
    x = torch.rand(2, 1, 14, 14, generator=generator())
    torch.testing.assert_close(operator(x), halve(x))


def test_the_prior_keeps_the_contract() -> None:
    prior = small_digits_prior()
    check_flow_map(prior, exact=False, images=halve(load_samples("mnist", "validation")[0]))
    assert prior.state_shape == (196,)
    images = torch.rand(3, 1, 14, 14, generator=generator())
    torch.testing.assert_close(prior.decode(prior.encode(images)), images)
    # the picture is not transposed: states in the order of the pixels
    state = torch.full((1, 196), -1.0)
    state[0, 14 * 2 + 5] = 1.0
    assert prior.decode(state)[0, 0].nonzero().tolist() == [[2, 5]]


def test_the_prior_draws_digits() -> None:
    def recognised(images: torch.Tensor) -> float:
        logits = classifier(torch.nn.functional.interpolate(images, scale_factor=2, mode="bilinear"))
        return float((logits.softmax(1).amax(1) > 0.9).float().mean())

    prior, classifier = small_digits_prior(), Classifier.load("mnist")
    real = halve(load_samples("mnist", "test")[0])
    flat = real.flatten(1)
    gaussian = flat.mean(0) + torch.randn(400, len(flat), generator=generator(1)) @ (flat - flat.mean(0)) / 200**0.5
    drawn = prior.generate(400, steps=1, generator=generator())
    # what a Gaussian with the digits' moments shows is hardly ever one
    assert recognised(real) > 0.8
    assert recognised(drawn) > 0.33
    assert recognised(gaussian.view_as(drawn)) < 0.2


def test_the_files_are_small_and_say_where_they_come_from() -> None:
    folder = SHIPPED / "mnist-14"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_000_000
    card = (folder / "README.md").read_text()
    assert "invflow train mnist-14" in card
    assert "60,000 images" in card


def test_the_recipe_trains_and_resumes(tmp_path: Path) -> None:
    from invflow_problems.recipes.small_digits import mnist_14

    data = tmp_path / "data"
    data.mkdir()
    images = torch.randint(0, 256, (64, 28, 28), generator=generator(), dtype=torch.uint8)
    (data / "train-images-idx3-ubyte").write_bytes(struct.pack(">iiii", 2051, 64, 28, 28) + images.numpy().tobytes())
    options = {"data": str(data), "progress": False, "steps": 4, "batch_size": 8, "warmup": 1}
    whole = mnist_14(tmp_path / "whole", **options)
    assert mnist_14.settings.steps == 16000
    mnist_14(tmp_path / "parts", stop_at=2, **options)
    resumed = mnist_14(tmp_path / "parts", **options)
    assert resumed.fingerprint() == whole.fingerprint()
    expected = halve(images[:, None] / 255).flatten(1).mean(0)
    torch.testing.assert_close(whole.mean, 2 * expected - 1, atol=1e-5, rtol=0)
    prior = small_digits_prior(str(tmp_path / "whole" / "prior"))
    assert prior.generate(2, steps=1, generator=generator()).shape == (2, 1, 14, 14)
    likelihood = invflow.GaussianLikelihood(Denoising((1, 14, 14)), torch.rand(1, 1, 14, 14), 0.5)
    assert invflow.NoiseSMC(prior, num_moves=1).sample(likelihood, 16).samples.shape == (1, 16, 1, 14, 14)
