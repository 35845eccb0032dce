"""Training of the photographs' weights: the score of sample pairs, crops, the split, the recipes at small scale."""

import copy
import math
import statistics
from statistics import NormalDist

import pytest
import torch

import invflow
from benchmarks.release import fit_spread
from invflow.datasets.files import write_image
from invflow.metrics import crps
from invflow.models.spectral_adapter import SpectralAdapter
from invflow.nets.unet import UNet
from invflow.operators import Denoising, MatrixOperator
from invflow.solvers.vfm import VFM
from invflow.training import LoopSettings, TrainingProblem, train_vfm
from invflow.training.bands import band_factors, positive_solution
from invflow.training.losses import pair_score
from invflow.training.spread import spread_factor, spread_factors
from invflow_problems import photo_split
from invflow_problems.photos import PhotoCrops, find_photographs
from invflow_problems.recipes import digits as recipes


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_pair_score_is_the_fair_crps_of_two_samples():
    first, second, truth = torch.randn(3, 5, 2, 4, 6, generator=generator(), dtype=torch.float64)
    expected = crps(torch.stack([first, second], dim=1), truth)
    torch.testing.assert_close(pair_score(first, second, truth), expected.flatten(1).sum(1))


def test_pair_score_is_least_in_the_mean_for_the_law_of_the_truth():
    """E of a Gaussian N(m, s^2) scored against N(0, 1) is known in closed form; its least value is at m = 0, s = 1."""
    n = 200_000
    a, b, x = torch.randn(3, n, 1, generator=generator(), dtype=torch.float64)
    for shift, scale in ((0.0, 1.0), (0.0, 0.6), (0.0, 1.7), (0.5, 1.0)):
        scores = pair_score(shift + scale * a, shift + scale * b, x)
        spread = math.sqrt(1 + scale**2)
        folded = spread * math.sqrt(2 / math.pi) * math.exp(-0.5 * (shift / spread) ** 2)
        folded += shift * math.erf(shift / spread / math.sqrt(2))
        exact = folded - scale / math.sqrt(math.pi)
        assert abs(float(scores.mean()) - exact) < 3 * float(scores.std()) / math.sqrt(n)
        assert exact >= 1 / math.sqrt(math.pi) - 1e-12


def test_score_alone_teaches_the_posterior_of_a_gaussian(tmp_path):
    """x ~ N(0, 1) seen with noise 0.5: the posterior has std 0.447, mean 0.8 y; the other terms weigh a thousandth."""
    sigma = 0.5
    operator = MatrixOperator(torch.eye(1), image_shape=(1,), problem_class="seen")
    prior = invflow.NeuralFlowMap((1,), network="none", decode_affine=(1.0, 0.0), generator=generator())
    settings = LoopSettings(steps=500, batch_size=512, learning_rate=5e-3, warmup=20, ema=0.98, weight_decay=0.0,
                            precision="no")
    adapter = invflow.Adapter((1,), classes=["seen"], network="mlp", options={"width": 32, "depth": 2},
                              generator=generator(1))
    vfm = train_vfm(lambda n, g: torch.randn(n, 1, generator=g), prior, [TrainingProblem(operator, sigma)], settings,
                    tmp_path, adapter=adapter, frozen=True, score=1000.0, progress=False)
    y = torch.tensor([[-1.0], [0.0], [1.5]])
    mean, std = vfm.adapter.propose(invflow.GaussianLikelihood(operator, y, sigma))
    exact = 1 / math.sqrt(1 + 1 / sigma**2)
    # the bounds are a third of what N(0, 1), where it begins, is off by
    torch.testing.assert_close(mean, 0.8 * y, atol=0.1, rtol=0)
    torch.testing.assert_close(std, torch.full_like(std, exact), atol=0.08, rtol=0)


def test_a_reward_has_no_truth_to_score_against():
    prior = invflow.NeuralFlowMap((1,), network="none")
    adapter = invflow.Adapter((1,), classes=["r"], network="mlp", options={"width": 8, "depth": 1})
    from invflow.training.vfm import VFMObjective

    with pytest.raises(ValueError, match="a reward has none"):
        VFMObjective(prior, adapter, reward=invflow.FunctionReward(lambda x: x[:, 0]), score=1.0)


@pytest.fixture
def folder(tmp_path):
    """Two photographs of the training split, one of validation, one of the test, and one picture that is in none."""
    place = tmp_path / "pictures"
    place.mkdir()
    for k, name in enumerate(("Aqua", "Wood", photo_split.VALIDATION[0], photo_split.HELD_OUT[0], "drawing")):
        rows, columns = torch.meshgrid(torch.linspace(0, 1, 400), torch.linspace(0, 1, 600), indexing="ij")
        write_image(torch.stack([rows, columns, torch.full_like(rows, k / 5)]), place / f"{name}.png")
    return place


def test_splits_share_no_photograph():
    names = [*photo_split.TRAINING, *photo_split.VALIDATION, *photo_split.HELD_OUT]
    assert len(set(names)) == len(names) == 37


def test_only_photographs_of_the_split_are_found(folder, tmp_path):
    assert [f.stem for f in find_photographs(folder)] == ["Aqua", "Wood"]
    assert [f.stem for f in find_photographs(folder, "validation")] == [photo_split.VALIDATION[0]]
    assert [f.stem for f in find_photographs([folder], "test")] == [photo_split.HELD_OUT[0]]
    own = tmp_path / "own"
    own.mkdir()
    write_image(torch.rand(3, 20, 20), own / "mine.png")
    assert [f.name for f in find_photographs(own)] == ["mine.png"]  # somebody's own: all of them are for training
    with pytest.raises(FileNotFoundError, match="no photographs"):
        find_photographs(own, "test")


def test_crops_lie_in_their_photograph_and_follow_the_generator(folder):
    crops = PhotoCrops(find_photographs(folder), size=48)
    x = crops(40, generator())
    assert x.shape == (40, 3, 48, 48)
    assert float(x.min()) >= 0
    assert float(x.max()) <= 1
    torch.testing.assert_close(x, crops(40, generator()), rtol=0, atol=0)
    assert not torch.equal(x, crops(40, generator(1)))
    # each photograph has one flat colour, 0 or 0.2 before its weight of 0.8 to 1.2: exactly one channel has no contrast
    flat = (x.std(dim=(2, 3)) < 1e-3).sum(1)
    assert bool((flat == 1).all())
    assert set(x.std(dim=(2, 3)).argmin(1).tolist()) == {0, 1, 2}  # channels are exchanged


def test_recipes_run_in_small(folder, tmp_path, monkeypatch):
    small = {"channels": [8, 8, 8], "blocks": 1, "attention": False}
    monkeypatch.setattr(recipes, "PHOTO_MAP", small)
    monkeypatch.setattr(recipes, "PHOTO_ADAPTER", small)
    monkeypatch.setattr("invflow.training.prior.SAMPLE", 64)
    monkeypatch.setattr(recipes, "SAMPLE", 256)
    changes = {"data": str(folder), "progress": False, "batch_size": 18, "steps": 2, "precision": "no"}
    prior = recipes.photos(tmp_path / "prior", **changes)
    assert prior.resizable
    assert isinstance(prior.network, UNet)
    vfm = recipes.photos_vfm(tmp_path / "vfm", **changes)
    assert VFM.load(tmp_path / "vfm" / "vfm").prior.fingerprint() == vfm.prior.fingerprint()
    assert len(vfm.adapter.classes) == 9
    # weights from before masks of any form were a class go on, too
    old = copy.deepcopy(vfm)
    old.adapter = vfm.adapter.grown([c for c in vfm.adapter.classes if c != "free-form-inpainting"], {}, False)
    old.save_pretrained(tmp_path / "old")
    longer = recipes.photos_vfm(tmp_path / "longer", prior=str(tmp_path / "old"), **changes)
    assert longer.adapter.classes == vfm.adapter.classes
    begun = recipes.photos_vfm(tmp_path / "more", prior=str(tmp_path / "vfm" / "vfm"), **changes)
    assert begun.prior.fingerprint() == vfm.prior.fingerprint()
    with pytest.raises(ValueError, match="--data"):
        recipes.photos(tmp_path / "none", progress=False)


def test_files_without_a_prior_go_to_the_one_that_fits(tmp_path, capsys):
    from invflow.cli.image_task import ImageTask
    from invflow.cli.solve import _usual_prior

    for name, shape in (("digit", (1, 28, 28)), ("photo", (3, 90, 65))):
        write_image(torch.rand(*shape), tmp_path / f"{name}.png")
    digit, photo = (ImageTask(tmp_path / f"{name}.png", "denoising") for name in ("digit", "photo"))
    scaled = ImageTask(tmp_path / "photo.png", "denoising", resize=True)
    cases = ((digit, "vfm", "mnist"), (photo, "vfm", "photos"), (scaled, "vfm", "mnist"), (photo, "lmmse", "mnist"))
    for task, solver, prior in cases:
        assert _usual_prior(task, solver) == prior
        assert repr(prior) in capsys.readouterr().err
    assert _usual_prior(ImageTask(tmp_path / "nothing.png", "denoising"), "vfm") == "mnist"


@pytest.mark.parametrize("claimed", [0.5, 1.6])
def test_the_factor_of_the_spread_is_what_is_missing(claimed):
    """White images, whose untrained pair is the exact posterior: deviations of half the size are doubled."""
    shape = (3, 16, 16)
    options = {"channels": [4, 8], "blocks": 1, "attention": False}
    prior = invflow.NeuralFlowMap(shape, options=options, skip="spectral", mean=torch.zeros(3, 1, 1),
                                  std=torch.ones(3, 1, 1))
    vfm = VFM(prior, SpectralAdapter.for_map(prior, ["denoising"], options))
    images = 0.5 + 0.5 * torch.randn(120, *shape, generator=torch.Generator().manual_seed(0))
    problems = [TrainingProblem(Denoising(shape), (0.1, 0.5))]
    assert isinstance(vfm.adapter, SpectralAdapter)
    vfm.adapter.spread = {"denoising": claimed}
    found = spread_factors(vfm, images, problems, num_samples=200)
    normal = NormalDist()  # of 120 crops, one more might lie anywhere
    expected = normal.inv_cdf((1 + 0.9 * 121 / 120) / 2) / normal.inv_cdf(0.95)
    # the 90% quantile of 92,160 Gaussian errors has a relative standard error of 0.003; that a mean and a deviation of
    # 200 samples are rough widens it by up to 0.005
    assert found["denoising"] * claimed == pytest.approx(expected, abs=0.015)


def test_a_new_group_is_covered_as_often_as_asked():
    """Groups of many errors with a scale of their own: what counts is how many groups were seen."""
    g, groups, level = torch.Generator().manual_seed(0), 12, 0.9
    covered = []
    for _ in range(8000):
        scales = torch.randn(groups + 1, 1, generator=g).exp()
        scores = scales * torch.randn(groups + 1, 30, generator=g).abs()
        limit = spread_factor(scores[:-1], level) * NormalDist().inv_cdf((1 + level) / 2)
        covered.append(float((scores[-1] <= limit).float().mean()))
    share, error = statistics.mean(covered), statistics.stdev(covered) / len(covered) ** 0.5
    # never under the level, and over it by at most what one group of thirteen makes
    assert level - 3 * error < share < level + 1 / (groups + 1) + 3 * error


def test_few_crops_tell_nothing():
    with pytest.raises(ValueError, match=r"9 crops are too few .*at least 10"):
        spread_factor(torch.rand(9, 50))
    spread_factor(torch.rand(10, 50))


def test_bands_recover_the_spread_that_is_wrong():
    """White images, whose untrained pair is the exact posterior: what is claimed wrongly in a band is put right."""
    shape = (3, 64, 64)
    options = {"channels": [4, 8], "blocks": 1, "attention": False}
    prior = invflow.NeuralFlowMap(shape, network="none", skip="spectral", mean=torch.zeros(3, 1, 1),
                                  std=torch.ones(3, 1, 1))
    vfm = VFM(prior, SpectralAdapter.for_map(prior, ["denoising"], options))
    images = 0.5 + 0.5 * torch.randn(24, *shape, generator=torch.Generator().manual_seed(0))
    assert isinstance(vfm.adapter, SpectralAdapter)
    claimed = torch.tensor([[1.0, 1.0, 1.5, 1.0, 1.0, 1.0], [0.6] * 6, [1.0, 1.0, 1.0, 1.0, 1.0, 2.0]])
    vfm.adapter.bands = {"denoising": claimed.tolist()}
    found = torch.tensor(band_factors(vfm, images, [TrainingProblem(Denoising(shape), (0.2, 0.2))])["denoising"])
    # a block's coefficients have power in the neighbouring bands of the image, which blurs the answer between bands
    assert (found[1] * 0.6 - 1).abs().max() < 0.1, found
    assert found[0, 2] < 0.85 < found[0, 4], found
    assert found[2, 5] < 0.65 < 0.85 < found[2, 3], found


def test_positive_solution_is_positive_and_solves():
    matrix = torch.tensor([[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.1, 4.0]])
    expected = torch.tensor([0.2, 3.0, 0.01])
    found = positive_solution(matrix, matrix @ expected, steps=5000)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)
    assert bool((positive_solution(matrix, torch.tensor([1.0, 0.01, 5.0])) > 0).all())


def test_bands_need_gaussian_samples():
    shape, options = (3, 16, 16), {"channels": [4, 8], "blocks": 1, "attention": False}
    prior = invflow.NeuralFlowMap(shape, options=options, skip="spectral", mean=torch.zeros(3, 1, 1))
    vfm = VFM(prior, SpectralAdapter.for_map(prior, ["denoising"], options))
    with pytest.raises(ValueError, match=r"a map without a network, .* not a SpectralAdapter with network='unet'"):
        band_factors(vfm, torch.rand(2, *shape), [TrainingProblem(Denoising(shape), (0.1, 0.1))])


def test_the_spread_is_fitted_from_the_command_line(folder, tmp_path, monkeypatch, capsys):
    shape = (3, 32, 32)
    options = {"channels": [4, 8], "blocks": 1, "attention": False}
    prior = invflow.NeuralFlowMap(shape, network="none", skip="spectral", mean=torch.zeros(3, 1, 1),
                                  std=torch.full((3, 1, 1), 0.5), independent_noise=False)
    names = [str(problem.operator.problem_class) for problem in recipes.photo_problems(shape)]
    adapter = SpectralAdapter.for_map(prior, names, options)
    adapter.trained_for = prior.fingerprint()
    VFM(prior, adapter).save_pretrained(tmp_path / "vfm")
    monkeypatch.setattr("sys.argv", ["fit_spread", str(tmp_path / "vfm"), "--data", str(folder), "--output",
                                     str(tmp_path / "wider"), "--crops", "10", "--size", "40", "--symmetries", "2",
                                     "--transform", "lapped", "--bands"])
    fit_spread.main()
    wider = VFM.load(tmp_path / "wider").adapter
    assert isinstance(wider, SpectralAdapter)
    assert wider.symmetries == 2
    assert set(wider.spread) == set(names)
    assert wider.transform == "lapped"
    without = set(names) - set(wider.bands)  # boxes hide whole blocks, and free-form masks may
    assert {"box-inpainting"} <= without <= {"box-inpainting", "free-form-inpainting"}
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if ", bands: " not in line] == [f"{n}: {f}" for n, f in wider.spread.items()]
