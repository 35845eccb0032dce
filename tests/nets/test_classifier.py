"""The classifier that judges generated images."""

from __future__ import annotations

import pytest
import torch

from benchmarks.release.train_classifier import shift_images, train_classifier
from invflow.nets.classifier import Classifier, confident_share
from invflow_problems.samples import load_samples


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_the_shipped_classifiers_recognise_the_shipped_images(name):
    images, labels = load_samples(name)
    model = Classifier.load(name)
    guess = model.probabilities(images).argmax(1)
    assert (guess == labels).double().mean() > {"mnist": 0.97, "fashion-mnist": 0.85}[name]
    share = confident_share(images, name)
    assert share == (model.probabilities(images).amax(1) > 0.9).double().mean().item()
    noise = torch.rand(200, 1, 28, 28, generator=generator())
    assert confident_share(noise, name) < share - 0.3
    assert confident_share(images, name, threshold=0.5) > share


def test_a_classifier_saves_and_loads(tmp_path):
    before = torch.random.get_rng_state()
    model = Classifier((3, 20, 24), ["a", "b"], width=4, generator=generator())
    twin = Classifier((3, 20, 24), ["a", "b"], width=4, generator=generator())
    assert torch.equal(before, torch.random.get_rng_state())
    x = torch.rand(5, 3, 20, 24, generator=generator())
    assert torch.equal(model(x), twin(x))
    model.save_pretrained(tmp_path, note="a test")
    torch.testing.assert_close(Classifier.load(tmp_path).probabilities(x), model(x).softmax(1))
    with pytest.raises(ValueError, match=r"\(n, \*\(3, 20, 24\)\)"):
        model(torch.zeros(1, 1, 20, 24))
    with pytest.raises(ValueError, match="no classifier named"):
        Classifier.load("mnst")
    with pytest.raises(ValueError, match="at least one image"):
        confident_share(torch.zeros(0, 1, 28, 28))


def test_the_classifier_learns():
    labels = torch.randint(2, (512,), generator=generator())
    images = torch.zeros(512, 1, 12, 12, dtype=torch.uint8)
    images[labels == 1, :, 4:8, 2:10] = 200
    images[labels == 0, :, 2:10, 4:8] = 200
    model = train_classifier(images, labels, ["vertical", "horizontal"], batch_size=64, progress=False)
    assert (model.probabilities(images / 255).argmax(1) == labels).double().mean() > 0.98
    point = torch.zeros(200, 1, 5, 5)
    point[:, :, 2, 2] = 1
    moved = shift_images(point, 1, generator())
    assert torch.equal(moved.sum((1, 2, 3)), torch.ones(200))
    expected = torch.zeros(5, 5, dtype=torch.bool)
    expected[1:4, 1:4] = True
    assert torch.equal(moved.sum((0, 1)) > 0, expected)


def test_mirrored_training_forgets_left_and_right():
    """The bright half gives the label; if halves are exchanged in every other image, it carries no information."""
    labels = torch.randint(2, (512,), generator=generator())
    images = torch.zeros(512, 1, 12, 12, dtype=torch.uint8)
    images[labels == 1, :, :, :6] = 200
    images[labels == 0, :, :, 6:] = 200
    for mirror in (False, True):
        model = train_classifier(images, labels, ["right", "left"], batch_size=64, mirror=mirror, progress=False)
        sure = model.probabilities(images / 255).amax(1)
        assert (sure > 0.9).all() if not mirror else (sure < 0.8).all()
