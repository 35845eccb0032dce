"""Problems: sources of truths, their measurement, and the exact posteriors of the toy problems."""

from __future__ import annotations

import copy
import inspect
import math
import pickle

import pytest
import torch

import invflow
from invflow import metrics
from invflow._core import plugins
from invflow.models.mixture import GaussianMixtureFlow
from invflow.operators import Denoising, MatrixOperator, RandomInpainting
from invflow.problem import Problem, TiltedProblem, list_problems, load_problem
from invflow.testing import check_problem
from invflow_problems import images as images_module
from invflow_problems import samples
from invflow_problems.checkerboard import board_sample, exact_posterior_samples, on_board

TASKS = ["denoising", "random-inpainting", "box-inpainting", "super-resolution", "gaussian-blur",
         "motion-blur"]
SHIPPED = ["checkerboard", "gaussian/linear", *(f"{data}/{task}" for data in samples.NAMES for task in TASKS),
           *(f"photos/{task}" for task in (*TASKS, "super-resolution-x2", "super-resolution-x3"))]
# checked in test_tilting_problems.py
TILTED = ["mixture/half-plane", "ring/wavy", "mnist/mirror", "mnist/open-centre", "mnist/rotation",
          *(f"mnist/tilt-{digit}" for digit in range(10))]
MIXTURES = ["mixture/25", *(f"mixture/25-{d}-{m}" for d in (8, 80, 800) for m in (1, 2, 4))]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vectors(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(n, 2, generator=generator)


def image_problem(**changes) -> Problem:
    sets = {"test": torch.rand(10, 1, 12, 12, generator=generator()),
            "validation": torch.rand(5, 1, 12, 12, generator=generator(1))}
    settings = {"name": "test/images", "prior_name": None, "operator": Denoising((1, 12, 12)), "sigma": 0.1,
                "images": sets.__getitem__, **changes}
    return Problem(**settings)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_problem_keeps_the_contract(name):
    check_problem(load_problem(name))


def test_the_shipped_problems_are_these():
    found = list_problems()
    assert {*SHIPPED, *TILTED, *MIXTURES} <= set(found)
    assert {name for name, problem in found.items() if problem.tilts} >= set(TILTED)
    assert all(problem.description for problem in found.values())
    assert found["mnist/denoising"].sigma == 0.25
    assert {p.sigma for n, p in found.items()
            if n.startswith(("mnist/", "fashion-mnist/")) and "denoising" not in n and not p.tilts} == {0.025}
    for data, side in (("mnist", 28), ("cifar10", 32)):
        box = load_problem(f"{data}/box-inpainting").operator.observed()[0, 0]
        hidden = torch.zeros(side, side, dtype=torch.bool)
        hidden[side // 4 : -side // 4, side // 4 : -side // 4] = True
        assert torch.equal(box, ~hidden)
        assert f"{side // 2} x {side // 2}" in found[f"{data}/box-inpainting"].description


def test_every_family_has_its_shape_and_its_noise():
    found = list_problems()
    for data, shape in images_module.SHAPES.items():
        for task in TASKS:
            problem = found[f"{data}/{task}"]
            assert problem.operator.image_shape == shape
            assert problem.sigma == (0.25 if task == "denoising" else 0.025)
            assert problem.prior_name == data
            assert problem.problem_class == found[f"mnist/{task}"].problem_class
    blur = found["cifar10/gaussian-blur"].operator.kernel[0, 0]
    offset = torch.arange(11.0) - 5
    std = float((blur.sum(0) * offset.square()).sum().sqrt())
    assert f"{std:.1f} pixels" in found["cifar10/gaussian-blur"].description


def test_problem_classes_are_those_that_adapters_know():
    classes = {load_problem(f"mnist/{task}").problem_class for task in TASKS}
    assert None not in classes
    assert len(classes) == 6
    assert load_problem("checkerboard").problem_class == "checkerboard"


def test_the_python_names_lead_to_the_same_problems():
    import invflow.problems
    from invflow.problems import fashion_mnist_box_inpainting, mnist_motion_blur

    assert mnist_motion_blur.name == "mnist/motion-blur"
    assert fashion_mnist_box_inpainting.name == "fashion-mnist/box-inpainting"
    assert "checkerboard" in dir(invflow.problems)
    with pytest.raises(AttributeError, match="mnist_denoising"):
        invflow.problems.mnist_denoise  # noqa: B018


def test_unknown_names_lead_to_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'mnist/box-inpainting'"):
        load_problem("mnist/box-inpaint")


def test_third_party_problems_are_found_and_double_names_left_out(monkeypatch):
    first, second = image_problem(name="hospital/scanner"), image_problem(name="hospital/scanner")
    offered = [("scanner", first, "hospital")]
    monkeypatch.setattr(plugins, "offers", lambda group: tuple(offered))
    assert load_problem("hospital/scanner").name == "hospital/scanner"
    offered.append(("scanner", second, "clinic"))
    with pytest.warns(UserWarning, match="'clinic' .* left out: 'hospital' already offers that name"):
        assert list_problems() == {"hospital/scanner": first}


def test_a_family_of_problems_is_listed():
    with pytest.raises(ValueError, match="'mnist': there are mnist/box-inpainting, mnist/denoising, mnist/gaussian"):
        load_problem("mnist")


def test_loaded_problems_share_no_operator():
    first, second = load_problem("mnist/gaussian-blur"), load_problem("mnist/gaussian-blur")
    assert first.operator is first.operator
    assert first.operator is not second.operator


# -- simulation ----------------------------------------------------------------------------------------------


def test_sigma_ranges_are_drawn_uniformly_in_the_logarithm():
    problem = Problem("range", None, MatrixOperator(torch.eye(2)), (0.01, 1.0), sampler=vectors)
    truth, likelihood = problem.simulate(20000, generator=generator())
    share = (likelihood.sigma.double() / 0.01).log() / math.log(100)
    assert share.min() >= 0
    assert share.max() <= 1
    assert abs(share.mean().item() - 0.5) < 4 / math.sqrt(12 * 20000)
    assert abs(share.var().item() - 1 / 12) < 0.002
    residual = likelihood.residual(truth[:, None])[:, 0].double()
    assert abs(residual.mean().item() - 1) < 4 / math.sqrt(20000)


def test_random_problems_draw_an_operator_for_each_observation():
    problem = image_problem(operator=RandomInpainting((1, 12, 12), generator=generator(5)), random=True)
    _, likelihood = problem.simulate(4, generator=generator())
    masks = likelihood.operator.observed()
    assert masks.shape[0] == 4
    assert not torch.equal(masks[0], masks[1])
    fixed = image_problem(operator=RandomInpainting((1, 12, 12), generator=generator(5)))
    assert fixed.simulate(4, generator=generator())[1].operator is fixed.operator


def test_truths_from_the_prior():
    prior = GaussianMixtureFlow(torch.tensor([[3.0, -3.0]]), std=0.5)
    problem = Problem("p", None, MatrixOperator(torch.eye(2)), 0.1, sampler=vectors, prior=lambda: prior)
    truth, _ = problem.simulate(2000, generator=generator(), source="prior")
    error = (truth.mean(0) - torch.tensor([3.0, -3.0])).abs()
    assert error.max() < 4 * 0.5 / math.sqrt(2000)


def test_truth_is_a_copy():
    problem = image_problem()
    truth, _ = problem.simulate(2, shuffle=False)
    truth.zero_()
    assert problem.images("test")[:2].abs().sum() > 0


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: image_problem(sigma=0.0), ValueError, "sigma=0.0"),
    (lambda: image_problem(sigma=(0.2, 0.1)), ValueError, r"range \(low, high\)"),
    (lambda: image_problem(sampler=vectors), ValueError, "either images or sampler"),
    (lambda: image_problem().simulate(0), ValueError, "at least one"),
    (lambda: image_problem().simulate(11), ValueError, "has 10 test images, but 11"),
    (lambda: image_problem().simulate(6, split="validation"), ValueError, "has 5 validation images"),
    (lambda: image_problem().simulate(2, split="train"), ValueError, "unknown split 'train'"),
    (lambda: image_problem().simulate(2, source="posterior"), ValueError, "unknown source"),
    (lambda: image_problem().simulate(2, source="prior"), ValueError, "no prior of its own"),
    (lambda: image_problem().exact_posterior(), TypeError, "no exact posterior"),
    (lambda: load_problem("checkerboard").images(), ValueError, "from a law"),
    (lambda: samples.load_samples("cifar"), ValueError, "no samples 'cifar' of split 'test'"),
])
def test_errors_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_reward_makes_a_tilted_problem():
    """One constructor for both kinds, whose signature says all arguments; copies and pickles stay of their kind."""
    reward = torch.nn.functional.relu  # any function that a pickle can name; it is not called
    prior = invflow.GaussianMixtureFlow(torch.zeros(1, 2), std=1.0)
    posed = Problem("tilted", None, prior=prior.double, reward=reward)
    kinds = [type(p) for p in (posed, copy.copy(posed), pickle.loads(pickle.dumps(posed)), posed.with_prior(prior))]
    assert kinds == [TiltedProblem] * 4
    assert posed.with_prior(prior).prior is prior
    assert (posed.tilts, posed.usual_solver, posed.problem_class, posed.image_shape) == (True, "fmtt", None, (2,))
    assert type(image_problem()) is Problem
    assert {"operator", "images", "reward", "quantities"} <= set(inspect.signature(Problem).parameters)
    with pytest.raises(TypeError, match=r"derive Overlapping from invflow\.problem\.TiltedProblem"):
        Overlapping("tilted", None, prior=lambda: prior, reward=reward)
    with pytest.raises(ValueError, match=r"'tilted' tilts its prior by a reward: .* no measurements"):
        invflow.calibrate(invflow.FMTT(prior), posed)


# -- the contract sees what is wrong -------------------------------------------------------------------------


class Overlapping(Problem):
    def images(self, split="test"):
        return super().images("test")


class WithReplacement(Problem):
    def _truths(self, count, generator, source, split, shuffle):
        images = self.images(split)
        if count > len(images):
            raise ValueError
        picked = torch.randint(len(images), (count,), generator=generator)
        return images[picked] if shuffle else images[:count]


class GlobalSeed(Problem):
    def _truths(self, count, generator, source, split, shuffle):
        return torch.rand(count, *self.image_shape)


class WrongNoise(Problem):
    def simulate(self, num_observations, **settings):
        truth, likelihood = super().simulate(num_observations, **settings)
        louder = truth + 1.3 * (likelihood.y - truth)
        return truth, invflow.GaussianLikelihood(likelihood.operator, louder, 0.1)


@pytest.mark.parametrize(("kind", "message"), [
    (Overlapping, "validation images are also test images"), (WithReplacement, "without replacement"),
    (GlobalSeed, "generator"), (WrongNoise, "standard errors from 1"),
])
def test_the_contract_catches(kind, message):
    good = image_problem()
    bad = kind(good.name, None, good.operator, 0.1, images=good.images)
    with pytest.raises(AssertionError, match=message):
        check_problem(bad)


@pytest.mark.parametrize("scale", [0.6, 1.6])
def test_the_contract_catches_a_posterior_that_is_not(scale):
    class Scaled(invflow.Solver):
        def sample(self, reward, num_samples, *, generator=None, progress=False):
            samples = exact_posterior_samples(reward.y, num_samples, generator)
            mean = samples.mean(1, keepdim=True)
            return invflow.Posterior(mean + scale * (samples - mean))

    good = load_problem("checkerboard")
    with pytest.raises(AssertionError, match="not the posterior"):
        check_problem(Problem("bad", None, good.operator, 0.1, sampler=board_sample, exact=Scaled))


# -- the checkerboard ----------------------------------------------------------------------------------------


def test_board_samples_fill_the_eight_cells_evenly():
    x = board_sample(40000, generator())
    assert on_board(x).all()
    cell = (x.floor() + 2).long()
    counts = torch.bincount(cell[:, 0] * 4 + cell[:, 1], minlength=16)
    assert torch.equal(counts.reshape(4, 4) > 0, (torch.arange(4)[:, None] + torch.arange(4)) % 2 == 0)
    chi_squared = ((counts[counts > 0] - 5000.0).square() / 5000).sum()
    assert chi_squared < 24.3  # 0.1% of a chi-squared law with 7 degrees of freedom
    place = (x - x.floor()).double()
    assert (place.mean(0) - 0.5).abs().max() < 4 / math.sqrt(12 * 40000)


def test_on_board_by_hand():
    points = torch.tensor([[0.5, 0.5], [-0.5, 0.5], [-1.5, -1.5], [1.5, -0.5], [2.5, 0.5], [0.5, -1.5],
                           [0.0, 0.0]])
    assert on_board(points).tolist() == [True, False, True, True, False, True, True]
    assert on_board(points.reshape(7, 1, 2)).shape == (7, 1)


@pytest.mark.parametrize("y", [0.3, 0.97, -1.02, 1.95, 2.3, -2.2, -3.2, 3.2])
def test_the_exact_posterior_against_quadrature(y):
    draws = exact_posterior_samples(torch.tensor([y], dtype=torch.float64), 20000, generator())[0]
    assert on_board(draws).all()
    grid = torch.linspace(-2, 2, 400001, dtype=torch.float64)
    log_weight = -0.5 * ((grid - y) / 0.1).square()
    weight = torch.softmax(log_weight, 0)
    mean, even = (weight * grid).sum(), weight[grid.floor() % 2 == 0].sum()
    std = (weight * (grid - mean).square()).sum().sqrt()
    assert (draws[:, 0].mean() - mean).abs() < 4 * std / math.sqrt(20000)
    assert (draws[:, 0].std() / std - 1).abs() < 0.04
    # an even column has the cells [-2, -1) and [0, 1), an odd one [-1, 0) and [1, 2), with means -1/2 and 1/2
    second = even * -0.5 + (1 - even) * 0.5
    assert (draws[:, 1].mean() - second).abs() < 4 * 1.2 / math.sqrt(20000)
    inner = ((draws[:, 1] >= -1) & (draws[:, 1] < 1)).double()
    assert (inner.mean() - 0.5).abs() < 4 * 0.5 / math.sqrt(20000)


def test_the_floor_of_the_published_table():
    # exact draws, as measured beside the published figures: NLPD -0.556, energy score 0.620, MMD 0.029,
    # spread 1.06
    problem = load_problem("checkerboard")
    g = generator()
    truth, likelihood = problem.simulate(1000, generator=g)
    exact = problem.exact_posterior()
    x, other = (exact.sample(likelihood, 100, generator=g).samples for _ in range(2))
    second = invflow.GaussianLikelihood(likelihood.operator, likelihood.simulate(truth, g), 0.1)
    assert metrics.nlpd(second(x)).mean().item() == pytest.approx(-0.556, abs=0.1)
    assert metrics.energy_score(x, truth, fair=False).mean().item() == pytest.approx(0.620, abs=0.04)
    assert metrics.mmd_root(x[:300], other[:300]).mean().item() == pytest.approx(0.029, abs=0.01)
    assert metrics.spread(x)[:, 1].mean().item() == pytest.approx(1.06, abs=0.01)


def test_board_errors():
    with pytest.raises(ValueError, match="off the board"):
        exact_posterior_samples(torch.tensor([9.0]), 2, generator())
    exact = load_problem("checkerboard").exact_posterior()
    other = MatrixOperator(torch.tensor([[0.0, 1.0]]))
    with pytest.raises(TypeError, match="first coordinate"):
        exact.sample(invflow.GaussianLikelihood(other, torch.zeros(1, 1), 0.1), 2)


# -- the shipped images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", samples.NAMES)
def test_samples_have_images_and_labels(name):
    for split, count in samples.COUNTS.items():
        images, labels = samples.load_samples(name, split)
        assert images.shape == (count, *images_module.SHAPES[name])
        assert labels.shape == (count,)
        assert images.amin() == 0
        assert images.amax() == 1
        assert set(labels.tolist()) == set(range(10))
    # known from the official files: the first test digits are 7, 2, 1, 0, 4; a cat, two ships, an aeroplane, a frog
    first = {"mnist": [7, 2, 1, 0, 4], "fashion-mnist": [9, 2, 1, 1, 6], "cifar10": [3, 8, 8, 0, 6]}[name]
    assert samples.load_samples(name)[1][:5].tolist() == first


def test_a_problem_on_other_images_takes_them_in_their_order():
    problem = load_problem("mnist/denoising")
    images = torch.rand(3, 1, 28, 28, generator=generator())
    other = problem.with_images(images)
    for split in ("test", "validation"):
        assert torch.equal(other.images(split), images)
        truth, _ = other.simulate(2, generator=generator(1), split=split, shuffle=False)
        assert torch.equal(truth, images[:2])
    assert other.name == problem.name
    assert torch.equal(problem.images("test"), samples.load_samples("mnist")[0])  # as it was
    with pytest.raises(ValueError, match=r"takes images \(n, 1, 28, 28\), not \(2, 28, 28\)"):
        problem.with_images(torch.zeros(2, 28, 28))
    with pytest.raises(ValueError, match="draws its own truths"):
        load_problem("gaussian/linear").with_images(torch.zeros(2, 2))
