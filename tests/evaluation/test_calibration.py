"""invflow.calibrate: exact solvers pass, wrong ones fail, few simulations certify nothing, kills lose little."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import invflow
from invflow._core.identity import identity
from invflow.evaluation.calibrate import Certificate
from invflow.operators import Denoising, MatrixOperator
from invflow.posterior import Posterior
from invflow.solver import Solver

ALPHA = 0.05


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Wrong(Solver):
    """The exact posterior, its samples spread about their mean and shifted by so many standard deviations."""

    def __init__(self, exact: Solver, spread: float = 1.0, shift: float = 0.0, dies_at: int | None = None) -> None:
        self.exact, self.spread, self.shift, self.calls, self.dies_at = exact, spread, shift, 0, dies_at

    def fingerprint(self) -> str:
        return f"{self.spread} {self.shift} {identity(self.exact)}"  # how often it was called decides no number

    def sample(self, reward, num_samples, *, generator=None, progress=False) -> Posterior:
        if self.calls == self.dies_at:
            raise KeyboardInterrupt
        self.calls += 1
        x = self.exact.sample(reward, num_samples, generator=generator).samples
        mean, covariance = self.exact.moments(reward)
        std = covariance.diagonal(dim1=1, dim2=2).sqrt().reshape(mean.shape)
        return Posterior(mean[:, None] + self.spread * (x - mean[:, None]) + self.shift * std[:, None])

    def prior_samples(self, n, *, generator=None) -> Tensor:
        return self.exact.prior_samples(n, generator=generator)

    def settings(self) -> dict[str, float]:
        return {"spread": self.spread, "shift": self.shift}


class Importance(Solver):
    """Draws of the prior with their likelihoods as weights; or without, which ignores the data."""

    def __init__(self, prior: invflow.FlowMap, weighted: bool) -> None:
        self.prior, self.weighted = prior, weighted

    def sample(self, reward, num_samples, *, generator=None, progress=False) -> Posterior:
        b = reward.num_observations
        x = self.prior.sample(b * num_samples, generator=generator).unflatten(0, (b, num_samples))
        return Posterior(x, reward(x) if self.weighted else None)

    def prior_samples(self, n, *, generator=None) -> Tensor:
        return self.prior.sample(n, generator=generator)


def conjugate() -> tuple[invflow.Problem, Solver]:
    """Three pixels N(0, 1), two of their combinations measured."""
    prior = invflow.GaussianMixtureFlow(torch.zeros(1, 3, dtype=torch.float64), std=1.0)
    matrix = torch.tensor([[1.0, 0.5, 0.0], [0.0, -0.5, 1.0]], dtype=torch.float64)
    problem = invflow.Problem("conjugate", None, MatrixOperator(matrix, image_shape=(3,)), 0.5,
                              sampler=lambda n, g: prior.sample(n, generator=g), prior=lambda: prior)
    return problem, invflow.ExactPosterior(prior)


def linear() -> tuple[invflow.Problem, Solver]:
    problem = invflow.load_problem("gaussian/linear")
    return problem, problem.exact_posterior()


# -- the triad -------------------------------------------------------------------------------------------------


def verdicts(solver: Solver, problem: invflow.Problem, repetitions: int, **options) -> list[Certificate]:
    g = generator()
    return [invflow.calibrate(solver, problem, num_simulations=60, num_samples=39, generator=g, **options)
            for _ in range(repetitions)]


def test_an_exact_posterior_fails_at_most_at_the_nominal_rate():
    problem, exact = conjugate()
    certificates = verdicts(exact, problem, 200)
    failed = sum(c.verdict == "fails" for c in certificates) / 200
    error = math.sqrt(ALPHA * (1 - ALPHA) / 200)
    assert failed < ALPHA + 3 * error  # Holm keeps all checks together at 5%, whatever their dependence
    # each check by itself is rejected at its nominal rate, without the correction
    total = len(certificates[0].checks)
    rates = {name: sum(c.checks[name].p_value <= ALPHA for c in certificates) / 200 for name in certificates[0].checks}
    assert total == 12 + 1
    assert all(abs(rate - ALPHA) < 3 * error + 0.005 for rate in rates.values()), rates  # 13 checks of 3 errors


@pytest.mark.parametrize(("spread", "shift", "reading"), [
    (0.5, 0.0, "samples too narrow"), (2.0, 0.0, "samples too wide"), (1.0, 1.0, "samples too high"),
])
def test_a_wrong_posterior_is_caught_and_named(spread, shift, reading):
    problem, exact = conjugate()
    certificates = verdicts(Wrong(exact, spread, shift), problem, 200)
    assert sum(c.verdict == "fails" for c in certificates) >= 198  # a power of 0.99
    pooled = "all pixels, mean" if shift else "all pixels, spread"
    named = [c for c in certificates if c.checks[pooled].reading == reading]
    assert len(named) >= 190
    ratio = sum(c.judgement.spread_skill for c in certificates) / 200
    # the error of a mean of 39 samples, and the skill's correction for how many they are
    expected = spread / math.sqrt((1 + shift**2 + spread**2 / 39) * 39 / 40)
    assert ratio == pytest.approx(expected, rel=0.02)
    assert "is not calibrated" in named[0].sentence


# -- the mixture -------------------------------------------------------------------------------------------------


def test_the_exact_posterior_passes_on_the_mixture():
    problem, exact = linear()
    certificate = invflow.calibrate(exact, problem, generator=generator())
    assert (certificate.num_simulations, certificate.num_samples, certificate.num_particles) == (200, 99, 99)
    assert certificate.verdict == "passes"
    assert certificate.passed
    assert "ExactPosterior on gaussian/linear passes" in certificate.sentence
    for level, (value, error) in certificate.coverage.items():
        assert abs(value - level) < 4 * error
    again = invflow.calibrate(exact, problem, generator=generator())
    assert all(torch.equal(again.record[key], value) for key, value in certificate.record.items() if key != "seconds")


@pytest.mark.parametrize("spread", [0.6, 1.6])
def test_an_overconfident_or_vague_solver_is_caught_on_the_mixture(spread):
    problem, exact = linear()
    certificate = invflow.calibrate(Wrong(exact, spread), problem, generator=generator())
    assert certificate.verdict == "fails"
    reading = "samples too narrow" if spread < 1 else "samples too wide"
    assert certificate.checks["all pixels, spread"].reading == reading


def test_noise_smc_passes_on_the_mixture():
    exact = linear()[0].prior
    # fewer steps make another map, whose own posterior it draws, in a quarter of the time
    prior = invflow.GaussianMixtureFlow(exact.means, 0.5, exact.log_weights.exp(), steps=4)
    solver = invflow.NoiseSMC(prior, moves="crank-nicolson", num_moves=2, ess_threshold=0.5, chunk_size=1 << 15)
    certificate = invflow.calibrate(solver, linear()[0], num_simulations=100, num_samples=49, num_particles=200,
                                    generator=generator())
    assert certificate.verdict == "passes"
    assert certificate.calls["forward"] > 0


@pytest.mark.slow
def test_noise_smc_passes_on_the_mixture_at_full_size():
    exact = linear()[0].prior
    prior = invflow.GaussianMixtureFlow(exact.means, 0.5, exact.log_weights.exp(), steps=8)
    solver = invflow.NoiseSMC(prior, num_moves=5, ess_threshold=0.5, chunk_size=1 << 15)
    certificate = invflow.calibrate(solver, linear()[0], generator=generator())
    assert certificate.num_particles == 990
    assert certificate.verdict == "passes"


def test_weighted_samples_are_resampled_from_ten_times_as_many():
    problem, _ = linear()
    weighted = invflow.calibrate(Importance(problem.prior, True), problem, num_samples=49, generator=generator())
    assert weighted.num_particles == 490
    assert weighted.verdict == "passes"
    # the prior is calibrated in pixels, though it ignores the data: what sees the measurement finds it out
    blind = invflow.calibrate(Importance(problem.prior, False), problem, num_samples=49, generator=generator())
    assert blind.num_particles == 49
    assert blind.checks["pixel 0"].passed
    assert blind.checks["all pixels, spread"].passed
    assert not blind.checks["log likelihood"].passed
    assert not blind.checks["residual |y - Ax|^2"].passed
    assert abs(blind.checks["pixel 0"].contraction) < 0.3


def test_truths_from_data_show_the_misfit_of_the_prior():
    problem, _ = linear()
    narrow = invflow.GaussianMixtureFlow(problem.prior.means, 0.25, problem.prior.log_weights.exp())
    solver = invflow.ExactPosterior(narrow)
    own = invflow.calibrate(solver, problem, num_samples=49, generator=generator())
    data = invflow.calibrate(solver, problem, num_samples=49, source="data", generator=generator())
    assert own.verdict == "passes"
    assert data.verdict == "fails"
    assert "source='prior'" in data.sentence
    assert data.settings["truths"] == "data"


def test_truths_are_images_of_the_split():
    images = torch.rand(80, 1, 8, 8, generator=generator())
    splits = {"test": images[:40], "validation": images[40:]}
    problem = invflow.Problem("images", None, Denoising((1, 8, 8)), 0.1, images=lambda split: splits[split])

    class Peek(Solver):
        def sample(self, reward, num_samples, *, generator=None, progress=False):
            return Posterior(torch.rand(reward.num_observations, num_samples, 1, 8, 8, generator=generator))

    certificate = invflow.calibrate(Peek(), problem, num_simulations=40, num_samples=9, source="data",
                                    quantities={"mean": lambda x, _: x.flatten(2).mean(2)}, generator=generator())
    # without replacement: all 40 images, each once
    found = certificate.record["truths"][:, certificate.settings["quantities"].index("mean")]
    torch.testing.assert_close(found.sort().values, images[:40].flatten(1).mean(1).double().sort().values)
    with pytest.raises(ValueError, match="has 40 test images"):
        invflow.calibrate(Peek(), problem, num_simulations=41, num_samples=9, source="data")


# -- power ---------------------------------------------------------------------------------------------------------


def test_few_simulations_certify_nothing():
    problem, exact = conjugate()
    certificate = invflow.calibrate(exact, problem, num_simulations=20, generator=generator())
    assert certificate.verdict == "too few to certify"
    assert not certificate.passed
    assert certificate.sentence.startswith("Too few simulations to certify ExactPosterior on conjugate")
    judgement = certificate.judgement
    assert judgement.detectable_narrow < 0.5
    # what it says that it could have found it would have found, in any one quantity at the corrected level
    level = ALPHA / (len(certificate.checks) - 1)  # the residual and the log likelihood are one
    power = invflow.metrics.rank_power(20, 99, level, spread=judgement.detectable_narrow)
    assert power == pytest.approx(0.8, abs=0.01)
    assert invflow.calibrate(Wrong(exact, 0.1), problem, num_simulations=20, generator=generator()).verdict == "fails"
    two = invflow.calibrate(exact, problem, num_simulations=2, num_samples=9, generator=generator())
    assert two.verdict == "too few to certify"
    assert "No error in a single quantity would have been found" in two.sentence
    assert math.isnan(two.checks["all pixels, mean"].p_value)


# -- quantities -----------------------------------------------------------------------------------------------------


def test_users_add_their_own_quantities():
    problem, exact = conjugate()
    seen = []

    def second(x: Tensor, likelihood: invflow.GaussianLikelihood) -> Tensor:
        seen.append((tuple(x.shape), likelihood.num_observations))
        return x[..., 1].round()  # with many ties

    both = invflow.calibrate(exact, problem, num_simulations=30, num_samples=19, quantities={"second": second},
                             generator=generator())
    assert "second" in both.checks
    assert "pixel 1" in both.checks
    assert {(25, 19, 3), (25, 1, 3), (5, 19, 3), (5, 1, 3)} == {shape for shape, _ in seen}
    assert {25, 5} == {count for _, count in seen}
    alone = invflow.calibrate(exact, problem, num_simulations=60, num_samples=19, quantities={"second": second},
                              defaults=False, generator=generator())
    assert list(alone.checks) == ["second", "TARP", "all pixels, spread", "all pixels, mean"]
    assert alone.checks["second"].passed
    for quantity, message in ((lambda x, _: x, r"returned \(25, 19, 3\)"),
                              (lambda x, _: x[..., 0] * math.nan, "returned NaN")):
        with pytest.raises(ValueError, match=message):
            invflow.calibrate(exact, problem, num_simulations=30, num_samples=19, quantities={"mine": quantity})
    with pytest.raises(ValueError, match="taken by a default"):
        invflow.calibrate(exact, problem, quantities={"pixel 1": second})


def test_default_quantities_of_pictures():
    from invflow.evaluation.certificate.quantities import default_quantities, evaluate, total_variation

    pilot = torch.zeros(50, 1, 4, 5)
    pilot[:, 0, 1, 2:4] = torch.rand(50, 2, generator=generator())
    chosen = default_quantities(pilot, generator())
    # constant pixels are not chosen
    assert [name for name in chosen if "pixel" in name] == ["pixel (0, 1, 2)", "pixel (0, 1, 3)"]
    x = torch.randn(2, 3, 1, 4, 5, generator=generator(), dtype=torch.float64)
    likelihood = invflow.GaussianLikelihood(Denoising((1, 4, 5)), torch.zeros(2, 1, 4, 5, dtype=torch.float64), 0.5)
    values = evaluate(chosen, x, likelihood)
    torch.testing.assert_close(values[..., 0], x[:, :, 0, 1, 2])
    torch.testing.assert_close(values[..., list(chosen).index("residual |y - Ax|^2")], x.square().sum((2, 3, 4)))
    torch.testing.assert_close(values[..., list(chosen).index("log likelihood")], likelihood(x))
    by_hand = x.diff(dim=-1).abs().sum((2, 3, 4)) + x.diff(dim=-2).abs().sum((2, 3, 4))
    torch.testing.assert_close(total_variation(x), by_hand)
    blocks = [name for name in chosen if name.startswith("mean of rows")]
    assert blocks
    for name in blocks:
        rows, columns = ([int(i) for i in part.split("-")] for part in name[13:].split(", columns "))
        assert rows[1] < 4
        assert columns[1] < 5
        by_hand = x[..., rows[0] : rows[1] + 1, columns[0] : columns[1] + 1].mean((2, 3, 4))
        torch.testing.assert_close(values[..., list(chosen).index(name)], by_hand)
    projections = values[..., [list(chosen).index(f"projection {k}") for k in (1, 2, 3, 4)]]
    assert (projections.abs() <= x.flatten(2).norm(dim=2, keepdim=True)).all()


def test_quantities_that_order_images_alike_count_once():
    problem, exact = conjugate()
    certificate = invflow.calibrate(Wrong(exact, 0.8), problem, num_simulations=100, num_samples=19,
                                    generator=generator())
    names = list(certificate.checks)
    ranks = certificate.record["ranks"]
    twins = [names.index(name) for name in ("residual |y - Ax|^2", "log likelihood")]
    assert float((ranks[:, twins].sum(1) - 19).abs().double().mean()) < 0.01  # one is the other's mirror image
    checks = list(certificate.checks.values())
    once = [check.p_value for k, check in enumerate(checks) if k != twins[1]]
    expected = invflow.metrics.holm(torch.tensor(once, dtype=torch.float64)).tolist()  # of one fewer
    expected.insert(twins[1], expected[twins[0]])
    assert [check.p_adjusted for check in checks] == pytest.approx(expected)
    # a quantity that is nearly another is a check of its own
    noisy = invflow.calibrate(exact, problem, num_simulations=100, num_samples=19, defaults=False,
                              quantities={"a": lambda x, _: x[..., 0], "b": lambda x, _: x[..., 0] + 0.1 * x[..., 1]},
                              generator=generator())
    least = min(noisy.checks.values(), key=lambda check: check.p_value)
    assert least.p_adjusted == pytest.approx(min(1, 5 * least.p_value))


def test_regions_are_tested_where_every_pixel_is_right():
    """Pixels that go together in truth and not in the samples: each interval is right, those of regions too narrow."""
    shape, g = (1, 8, 8), generator()
    covariance = 0.2 * torch.eye(64, dtype=torch.float64) + 0.8
    gain = covariance @ torch.linalg.inv(covariance + 64.0 * torch.eye(64, dtype=torch.float64))
    posterior = covariance - gain @ covariance
    factor = torch.linalg.cholesky(posterior)

    class Pixelwise(Solver):
        def __init__(self, together: bool) -> None:
            self.root = factor if together else posterior.diagonal().sqrt().diag()

        def sample(self, reward, num_samples, *, generator=None, progress=False):
            mean = (reward.y.flatten(1) @ gain.T)[:, None]
            z = torch.randn(len(mean), num_samples, 64, generator=generator, dtype=torch.float64)
            return Posterior((mean + z @ self.root.T).unflatten(2, shape))

    def truths(n: int, g: torch.Generator) -> Tensor:
        z = torch.randn(n, 64, generator=g, dtype=torch.float64)
        return (z @ torch.linalg.cholesky(covariance).T).unflatten(1, shape)

    problem = invflow.Problem("together", None, Denoising(shape), 8.0, sampler=truths)
    options = {"num_simulations": 150, "num_samples": 39, "num_particles": 39, "source": "data"}
    wrong = invflow.calibrate(Pixelwise(False), problem, generator=g, **options)
    blocks = [check for name, check in wrong.checks.items() if name.startswith("mean of rows")]
    assert len(blocks) >= 2
    assert all(check.reading == "samples too narrow" for check in blocks)
    assert all(check.coverage < 0.75 for check in blocks)
    assert all(check.passed for name, check in wrong.checks.items() if name.startswith("pixel"))
    for level, (value, error) in wrong.coverage.items():
        assert abs(value - level) < 4 * error
    assert invflow.calibrate(Pixelwise(True), problem, generator=g, **options).verdict == "passes"


# -- files ---------------------------------------------------------------------------------------------------------


def test_a_certificate_is_saved_and_shown(tmp_path):
    problem, exact = conjugate()
    certificate = invflow.calibrate(exact, problem, num_simulations=12, num_samples=9, generator=generator())
    certificate.save(tmp_path)
    loaded = Certificate.load(tmp_path)
    assert str(loaded) == str(certificate)
    assert loaded.checks.keys() == certificate.checks.keys()
    assert loaded.judgement.detectable_wide == certificate.judgement.detectable_wide
    assert all(torch.equal(loaded.record[key], value) for key, value in certificate.record.items())
    assert certificate.sentence in certificate.to_markdown()
    assert "| pixel 0 | passes |" in certificate.to_markdown()
    assert "<table>" in certificate._repr_html_()
    figure = loaded.plot()
    assert len(figure.axes) == certificate.record["ranks"].shape[1] + 4
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(FileNotFoundError, match=r"Certificate\.save"):
        Certificate.load(tmp_path / "nothing")
    (tmp_path / "certificate.json").write_text("{}")
    with pytest.raises(ValueError, match="no certificate"):
        Certificate.load(tmp_path)


def test_a_killed_calibration_goes_on(tmp_path):
    problem, exact = conjugate()
    options = {"num_simulations": 30, "num_samples": 19, "num_particles": 19, "chunk_size": 8}
    whole = invflow.calibrate(Wrong(exact), problem, generator=generator(), **options)

    with pytest.raises(KeyboardInterrupt):
        invflow.calibrate(Wrong(exact, dies_at=2), problem, generator=generator(), output=tmp_path, **options)
    assert not (tmp_path / "certificate.json").exists()
    solver = Wrong(exact)
    resumed = invflow.calibrate(solver, problem, generator=generator(), output=tmp_path, **options)
    assert solver.calls == 2  # of four chunks
    assert all(torch.equal(resumed.record[key], value) for key, value in whole.record.items() if key != "seconds")
    # finished: nothing is run again, also without the generator
    solver = Wrong(exact)
    again = invflow.calibrate(solver, problem, output=tmp_path, **options)
    assert solver.calls == 0
    assert str(again) == str(resumed)
    with pytest.raises(ValueError, match=r"its solver was .*'spread': 1\.0.* not .*'spread': 0\.5"):
        invflow.calibrate(Wrong(exact, 0.5), problem, output=tmp_path, **options)
    with pytest.raises(ValueError, match="its seed was"):
        invflow.calibrate(Wrong(exact), problem, generator=generator(1), output=tmp_path, **options)
    (tmp_path / "simulations.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="truncated"):
        invflow.calibrate(Wrong(exact), problem, generator=generator(), output=tmp_path, **options)


def test_the_command_line(tmp_path):
    from invflow.cli.entry import app

    arguments = ["calibrate", "gaussian/linear", "--solver", "exact", "--simulations", "100", "--samples", "19",
                 "--seed", "3", "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "ExactPosterior on gaussian/linear passes" in result.output
    names = {"certificate.json", "simulations.safetensors", "certificate.md", "figure.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    expected = invflow.calibrate(linear()[1], linear()[0], num_simulations=100, num_samples=19, generator=generator(3))
    loaded = Certificate.load(tmp_path / "out")
    assert torch.equal(loaded.record["ranks"], expected.record["ranks"])
    bad = CliRunner().invoke(app, [*arguments[:-2], "--source", "nowhere"])
    assert bad.exit_code == 2
    assert "source='data'" in bad.output


@pytest.mark.parametrize(("options", "message"), [
    ({"num_simulations": 1}, "at least 2"),
    ({"num_samples": 2}, "at least 3"),
    ({"num_particles": 50}, "at least num_samples=99"),
    ({"source": "posterior"}, "source='prior' or source='data'"),
    ({"defaults": False}, "no quantities"),
])
def test_errors_say_what_is_wrong(options, message):
    problem, exact = conjugate()
    with pytest.raises(ValueError, match=message):
        invflow.calibrate(exact, problem, **options)


def test_calibrating_does_not_touch_the_global_seed():
    before = torch.random.get_rng_state()
    problem, exact = conjugate()
    invflow.calibrate(exact, problem, num_simulations=4, num_samples=9)
    assert torch.equal(before, torch.random.get_rng_state())


def test_every_chunk_has_random_numbers_of_its_own():
    problem, exact = conjugate()
    seeds = []

    class Recorded(Wrong):
        def sample(self, reward, num_samples, *, generator=None, progress=False):
            seeds.append(generator.initial_seed())
            return super().sample(reward, num_samples, generator=generator)

    invflow.calibrate(Recorded(exact), problem, num_simulations=12, num_samples=9, num_particles=9, chunk_size=3)
    assert len(seeds) == len(set(seeds)) == 4


def test_a_calibration_is_watched() -> None:
    seen: list[Certificate] = []
    certificate = invflow.calibrate("exact", "gaussian/linear", num_simulations=6, num_samples=9, chunk_size=2,
                                    generator=generator(), watch=seen.append)
    assert [part.num_simulations for part in seen] == [2, 4, 6]
    for part in seen:
        assert torch.equal(part.record["ranks"], certificate.record["ranks"][: part.num_simulations])
    assert seen[-1].sentence == certificate.sentence

    def stop(_: Certificate) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        invflow.calibrate("exact", "gaussian/linear", num_simulations=6, num_samples=9, chunk_size=2,
                          generator=generator(), watch=stop)
