"""The training loop and the joint objective: resuming, several processes, and which losses reach which weights."""

from __future__ import annotations

import csv
import dataclasses
import math
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import invflow
from invflow.models.adapter import Adapter
from invflow.models.neural import NeuralFlowMap
from invflow.operators import MatrixOperator
from invflow.training import (
    LoopSettings,
    ObjectiveSettings,
    TrainingProblem,
    VFMObjective,
    train_alignment,
    train_prior,
    train_vfm,
)
from invflow.training import objective as objective_module
from invflow.training.loop import seeded
from invflow.training.vfm import fresh_adapter

TINY = {"width": 16, "depth": 2}


def pairs(n, generator):
    """Correlated Gaussian data on the plane."""
    z = torch.randn(n, 2, generator=generator)
    return torch.stack([z[:, 0], 0.9 * z[:, 0] + 0.2 * z[:, 1]], dim=1)


def settings(**changes):
    return LoopSettings(**{"steps": 12, "batch_size": 32, "precision": "no", "log_every": 3, "warmup": 2, **changes})


def first_coordinate(sigma=0.3):
    operator = MatrixOperator(torch.tensor([[1.0, 0.0]]), image_shape=(2,))
    operator.problem_class = "first-coordinate"
    return TrainingProblem(operator, sigma)


def tiny_prior(seed=0):
    g = torch.Generator().manual_seed(seed)
    prior = NeuralFlowMap((2,), network="mlp", options=TINY, decode_affine=(1.0, 0.0), generator=g)
    for p in prior.parameters():  # layers that start at zero have no gradient to pass on
        p.data += 0.05 * torch.randn(p.shape, generator=g)
    return prior


@pytest.mark.parametrize("joint", [False, True])
def test_resuming_gives_the_same_bits(tmp_path, joint):
    data = pairs(100, torch.Generator().manual_seed(0))

    def run(folder, stop_at=None):
        if joint:
            return train_vfm(data, tiny_prior(), [first_coordinate()], settings(), folder, options=TINY,
                             model_error=True, progress=False, stop_at=stop_at)
        return train_prior(data, settings(), folder, network="mlp", options=TINY, decode_affine=(1.0, 0.0),
                           progress=False, stop_at=stop_at)

    run(tmp_path / "whole")
    run(tmp_path / "broken", stop_at=5)
    run(tmp_path / "broken")
    whole, broken = (load_file(tmp_path / f / "checkpoint.safetensors") for f in ("whole", "broken"))
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[k], broken[k]) for k in whole)
    rows = [[r for r in csv.DictReader((tmp_path / f / "metrics.csv").open()) if int(r["step"]) % 3 == 0]
            for f in ("whole", "broken")]
    assert rows[0] == rows[1]
    assert [int(r["step"]) for r in rows[0]] == [3, 6, 9, 12]


def test_checkpoint_of_other_settings_is_refused(tmp_path):
    data = pairs(100, torch.Generator().manual_seed(0))
    train_prior(data, settings(), tmp_path, network="mlp", options=TINY, progress=False, stop_at=2)
    with pytest.raises(ValueError, match=r"learning_rate=0\.001"):
        train_prior(data, settings(learning_rate=0.1), tmp_path, network="mlp", options=TINY, progress=False)


def test_each_training_has_its_own_precision(tmp_path):
    data = pairs(100, torch.Generator().manual_seed(0))

    def run(name, precision):
        prior = train_prior(data, settings(precision=precision), tmp_path / name, network="mlp", options=TINY,
                            decode_affine=(1.0, 0.0), progress=False)
        return prior.generate(4, steps=1, generator=torch.Generator().manual_seed(1))

    exact, rounded, again = run("a", "no"), run("b", "bf16"), run("c", "no")
    assert torch.equal(exact, again)
    assert not torch.equal(exact, rounded)


def test_training_does_not_touch_the_global_seed(tmp_path):
    before = torch.random.get_rng_state()
    train_vfm(pairs, tiny_prior(), [first_coordinate()], settings(steps=2), tmp_path, options=TINY, progress=False)
    assert torch.equal(before, torch.random.get_rng_state())


SCRIPT = """
import sys, torch
from invflow.training import LoopSettings, train_prior
def pairs(n, g):
    z = torch.randn(n, 2, generator=g)
    return torch.stack([z[:, 0], 0.9 * z[:, 0] + 0.2 * z[:, 1]], dim=1)
s = LoopSettings(steps=int(sys.argv[2]), batch_size=64, precision="no", log_every=10, warmup=2)
train_prior(pairs, s, sys.argv[1], network="mlp", options={"width": 16, "depth": 2}, decode_affine=(1.0, 0.0))
"""


def test_interrupted_run_saves_and_goes_on(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(tmp_path / "run"), "1500"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "the same command again to resume" in err
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()
    assert int(rows[-1]["step"]) < 1500
    subprocess.run(command, capture_output=True, timeout=240, check=True)
    assert (tmp_path / "run" / "prior" / "model.safetensors").exists()


def joint_gradients(monkeypatch, without_flow):
    prior = tiny_prior()
    adapter = Adapter((2,), classes=["first-coordinate"], network="mlp", options=TINY,
                      generator=torch.Generator().manual_seed(1))
    objective = VFMObjective(prior, adapter, [first_coordinate()])
    if without_flow:
        monkeypatch.setattr(objective_module, "meanflow_loss", lambda u, z, m, *times, tangent: 0 * m.sum(dim=1))
    loss, _ = objective(pairs(16, seeded(0, 0, 0)), seeded(0, 1, 0))
    loss.backward()
    return prior, adapter


def test_observation_term_leaves_the_map_alone(monkeypatch):
    """Without the MeanFlow term no gradient reaches the map, and the adapter has its own."""
    prior, adapter = joint_gradients(monkeypatch, without_flow=True)
    assert all(p.grad is None or not p.grad.any() for p in prior.parameters())
    assert any(p.grad is not None and p.grad.any() for p in adapter.parameters())


def test_meanflow_term_reaches_map_and_adapter(monkeypatch):
    prior, _ = joint_gradients(monkeypatch, without_flow=False)
    assert any(p.grad is not None and p.grad.any() for p in prior.parameters())


def score_gradients(monkeypatch, **changes):
    """Gradients of map and adapter, without the MeanFlow term."""
    prior = tiny_prior()
    adapter = Adapter((2,), classes=["first-coordinate"], network="mlp", options=TINY, deviations=True,
                      generator=torch.Generator().manual_seed(1))
    objective = VFMObjective(prior, adapter, [first_coordinate()], score=100.0, **changes)
    monkeypatch.setattr(objective_module, "meanflow_loss", lambda u, z, m, *times, tangent: 0 * m.sum(dim=1))
    loss, metrics = objective(pairs(16, seeded(0, 0, 0)), seeded(0, 1, 0))
    loss.backward()
    last = next(p.grad for name, p in adapter.named_parameters() if name.endswith("last.weight"))
    return any(p.grad is not None and p.grad.any() for p in prior.parameters()), last, metrics


def test_the_score_reaches_the_map_where_it_is_joint(monkeypatch):
    assert not score_gradients(monkeypatch)[0]
    assert not score_gradients(monkeypatch, patches=True)[0]
    assert score_gradients(monkeypatch, patches=True, joint=True)[0]


def test_the_score_reaches_the_deviations_through_the_correction(monkeypatch):
    """Rows of the last layer: two of the mean, two of the variance, two of the deviations."""
    _, without, _ = score_gradients(monkeypatch, patches=True, joint=True)
    monkeypatch.setattr(objective_module, "DEVIATION_WEIGHT", 0.0)  # the score alone
    reached, through, metrics = score_gradients(monkeypatch, patches=True, joint=True, consistency=True)
    assert not without[4:].any()
    assert through[4:].any()
    assert reached
    assert float(metrics["correction"]) > 0


def test_samples_are_trained_as_they_are_corrected():
    """By the factors that the adapter has, a class without any not at all; by 1 where nothing was fitted yet."""
    adapter = Adapter((2,), classes=["first-coordinate", "other"], network="mlp", options=TINY, deviations=True,
                      generator=torch.Generator().manual_seed(1))
    objective = VFMObjective(tiny_prior(), adapter, [first_coordinate((0.5, 0.5))], score=1.0, consistency=True)
    data = pairs(6, seeded(0, 0, 0))
    groups = objective._observe(data, seeded(1, 0, 0))
    pair, deviation = torch.stack([data, data + 1]), torch.full((6, 2), -1.0)

    def moved():
        return objective._correct(pair, groups, deviation, seeded(2, 0, 0)) - pair

    whole = moved()
    assert float(whole.abs().max()) > 0.1
    adapter.consistency = {"first-coordinate": [(0.0, 1.0)]}
    assert torch.equal(moved(), whole)
    adapter.consistency = {"first-coordinate": [(0.0, 0.5)]}
    # scalar: C / (C + sigma^2) with C = e^-2 and e^-2 / 4
    ratio = (0.25 / (0.25 * math.exp(-2) + 0.25)) / (1 / (math.exp(-2) + 0.25))
    torch.testing.assert_close(moved(), ratio * whole, atol=1e-4, rtol=1e-3)
    adapter.consistency = {"other": [(0.0, 1.0)]}
    assert torch.equal(moved(), torch.zeros_like(pair))


def test_deviations_are_drawn_to_the_spread_of_the_samples(tmp_path):
    """Alone, their term has its optimum at the standard deviation of a sample."""
    prior = tiny_prior()
    adapter = Adapter((2,), classes=["first-coordinate"], network="mlp", options=TINY, deviations=True,
                      generator=torch.Generator().manual_seed(1))
    objective = VFMObjective(prior, adapter, [first_coordinate()], score=1e-9, consistency=True)
    pair = 0.2 * torch.randn(2, 4000, 2, generator=torch.Generator().manual_seed(2))
    deviation = torch.full((2,), -1.0, requires_grad=True)
    data, generator = pair[0].clone(), torch.Generator().manual_seed(3)
    groups = objective._observe(data, generator)
    for _ in range(200):
        loss, _ = objective._score(pair, data, groups, deviation.expand(4000, 2), generator)
        gradient, = torch.autograd.grad(loss.mean(), deviation)
        deviation = (deviation - 2 * gradient).detach().requires_grad_()
    assert deviation.exp().tolist() == pytest.approx([0.2, 0.2], rel=0.05)


def test_deviations_alone_leave_samples_as_they_are(tmp_path):
    """Map, means and standard deviations are the same to the bit; the deviations are not."""
    prior = tiny_prior()
    adapter = fresh_adapter(prior, ["first-coordinate"], TINY, seeded(0, 0, 0), deviations=True)
    for p in adapter.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(4))
    vfm = train_vfm(pairs, prior, [first_coordinate()], settings(weight_decay=0.0), tmp_path, adapter=adapter,
                    progress=False, frozen=True, score=10.0, consistency=True, deviations_alone=True)
    likelihood = invflow.GaussianLikelihood(first_coordinate().operator, torch.ones(2, 1), 0.3)
    before, after = adapter.proposal(likelihood), vfm.adapter.proposal(likelihood)
    assert torch.equal(before.mean, after.mean)
    assert torch.equal(before.std, after.std)
    assert not torch.allclose(before.deviation, after.deviation, rtol=1e-3)
    assert vfm.prior.fingerprint() == prior.fingerprint()
    with pytest.raises(ValueError, match="frozen=True and consistency=True"):
        ObjectiveSettings(score=1.0, deviations_alone=True)


def test_the_observation_term_has_a_weight(monkeypatch):
    """The loss is linear in it, and says nothing of the observation where it is 0."""
    monkeypatch.setattr(objective_module, "normalise", lambda loss: loss)
    adapter = Adapter((2,), classes=["first-coordinate"], network="mlp", options=TINY, deviations=True,
                      generator=torch.Generator().manual_seed(1))
    found = {}
    for weight in (0.0, 1.0, 3.0):
        objective = VFMObjective(tiny_prior(), adapter, [first_coordinate()], score=2.0, joint=True, misfit=weight)
        loss, metrics = objective(pairs(16, seeded(0, 0, 0)), seeded(0, 1, 0))
        found[weight] = float(loss.detach())
        assert ("misfit" in metrics) is (weight > 0)
    assert found[3.0] - found[0.0] == pytest.approx(3 * (found[1.0] - found[0.0]), rel=1e-4)
    assert found[1.0] > found[0.0] * 1.01
    with pytest.raises(ValueError, match="leave no term"):
        ObjectiveSettings(misfit=0.0)
    with pytest.raises(ValueError, match="misfit=-1"):
        ObjectiveSettings(misfit=-1.0)


def test_settings_of_the_objective_are_checked():
    with pytest.raises(ValueError, match="whose weight is 0"):
        ObjectiveSettings(patches=True)
    with pytest.raises(ValueError, match="frozen=True keeps"):
        ObjectiveSettings(score=1.0, joint=True, frozen=True)
    with pytest.raises(TypeError, match="taus"):
        VFMObjective(tiny_prior(), Adapter((2,), classes=["first-coordinate"], network="mlp", options=TINY),
                     [first_coordinate()], taus=1.0)
    with pytest.raises(ValueError, match="deviations, but it has none"):
        VFMObjective(tiny_prior(), Adapter((2,), classes=["first-coordinate"], network="mlp", options=TINY),
                     [first_coordinate()], score=1.0, consistency=True)


def test_training_from_no_noise_on_is_finite(tmp_path):
    """Levels from 0, and one that is 0 throughout: losses, weights and samples stay finite."""
    levels = first_coordinate((0.0, 0.2)).draw_sigma(20_000, seeded(0, 0, 0))
    assert 0 <= float(levels.min()) < 1e-4
    assert float(levels.max()) <= 0.2
    below = (levels < 0.01).double().mean()  # log 2 over log 21
    assert float(below) == pytest.approx(0.2277, abs=4 * (0.2277 * 0.7723 / 20_000) ** 0.5)
    for sigma in ((0.0, 0.2), 0.0):
        vfm = train_vfm(pairs, tiny_prior(), [first_coordinate(sigma)], settings(steps=4), tmp_path / str(sigma),
                        options=TINY, progress=False, model_error=True, score=10.0, patches=True, joint=True,
                        consistency=True)
        assert vfm.adapter.levels == {"first-coordinate": sigma if isinstance(sigma, tuple) else (0.0, 0.0)}
        assert all(bool(torch.isfinite(p).all()) for p in (*vfm.prior.parameters(), *vfm.adapter.parameters()))
        likelihood = invflow.GaussianLikelihood(first_coordinate().operator, torch.ones(2, 1), 0.0)
        found = invflow.VFM(vfm.prior, vfm.adapter, consistency=True).sample(likelihood, 5, generator=seeded(0, 0, 0))
        torch.testing.assert_close(found.samples[..., 0], torch.ones(2, 5), atol=1e-4, rtol=0)


def test_frozen_training_changes_the_adapter_only(tmp_path):
    prior = tiny_prior()
    before = prior.fingerprint()
    vfm = train_vfm(pairs, prior, [first_coordinate()], settings(), tmp_path, options=TINY, frozen=True, progress=False)
    assert vfm.prior.fingerprint() == before
    assert vfm.prior.independent_noise
    assert any(p.any() for n, p in vfm.adapter.named_parameters() if "last" in n)


def test_model_error_is_the_variance_that_the_map_leaves_unexplained():
    """Fisher scoring finds delta^2 of residuals N(0, sigma^2 + delta^2), with noise levels that differ by row."""
    objective = VFMObjective(tiny_prior(), Adapter((2,), classes=["first-coordinate"], network="mlp", options=TINY),
                             [first_coordinate((0.05, 1.0))], model_error=True)
    g, delta = torch.Generator().manual_seed(0), 0.4
    operator = first_coordinate().operator
    estimates = []
    for _ in range(400):
        sigma = objective.problems[0].draw_sigma(64, g)
        y = (sigma**2 + delta**2).sqrt()[:, None] * torch.randn(64, 1, generator=g)
        misfit, reports = objective._misfit([(operator, y, sigma)], torch.zeros(64, 2))
        estimates.append(float(reports["model_error"]) ** 2)
        assert misfit.shape == (64,)
    settled = torch.tensor(estimates[100:])
    # a batch of 64 tells delta^2 to about 0.035; the running mean over some 40 batches, seen 300 times, to 0.003
    assert settled.mean() == pytest.approx(delta**2, abs=0.01)
    assert float(misfit.mean()) == pytest.approx(0.5, abs=0.3)


def test_model_error_vanishes_where_the_residual_is_noise():
    objective = VFMObjective(tiny_prior(), Adapter((2,), classes=["first-coordinate"], network="mlp", options=TINY),
                             [first_coordinate(0.3)], model_error=True)
    g = torch.Generator().manual_seed(0)
    operator = first_coordinate().operator
    for _ in range(300):
        y, sigma = 0.3 * torch.randn(256, 1, generator=g), torch.full((256,), 0.3)
        objective._misfit([(operator, y, sigma)], torch.zeros(256, 2))
    assert objective.model_variance[0] < 0.1 * 0.3**2


def test_rows_of_a_batch_are_shared_out_as_asked():
    one, three = first_coordinate(0.3), dataclasses.replace(first_coordinate(0.1), share=3.0)
    prior = tiny_prior()
    adapter = fresh_adapter(prior, ["first-coordinate"], TINY, torch.Generator().manual_seed(0))
    objective = VFMObjective(prior, adapter, [one, three, one])
    groups = objective._observe(pairs(20, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1))
    assert [len(y) for _, y, _ in groups] == [4, 12, 4]
    assert [float(sigma.max()) for _, _, sigma in groups] == pytest.approx([0.3, 0.1, 0.3])
    with pytest.raises(ValueError, match="must be a positive number"):
        TrainingProblem(one.operator, 0.3, share=0.0)
    few = VFMObjective(prior, adapter, [one, dataclasses.replace(one, share=0.01), three])
    assert few._rows(20) == [5, 1, 14]  # the smallest share is a row all the same
    assert few._rows(3) == [1, 1, 1]
    with pytest.raises(ValueError, match="a batch of 2 has no row for each of 3 problems: raise batch_size"):
        few._rows(2)


def test_problem_classes_must_differ(tmp_path):
    with pytest.raises(ValueError, match="its own problem_class"):
        train_vfm(pairs, tiny_prior(), [first_coordinate(), first_coordinate()], settings(), tmp_path)


class GaussianFlow(invflow.FlowMap):
    """The exact flow of N(0, I) to N(0, C): in the basis of C, each axis scales by g_t / g_s."""

    def __init__(self, covariance):
        super().__init__()
        self.state_shape = self.image_shape = (len(covariance),)
        self.values, self.vectors = torch.linalg.eigh(covariance)

    def velocity(self, x, t):
        raise AssertionError("only the map is used here")

    def jump(self, x, s, t):
        def scale(a):
            return ((1 - a) ** 2 + a**2 * self.values).sqrt()

        return x @ self.vectors * (scale(t) / scale(s)) @ self.vectors.T

    def forward(self, x, s, t):
        return self.jump(x, s, t)


def moments(prior, adapter, problem, y):
    likelihood = invflow.GaussianLikelihood(problem.operator, y, sigma=float(problem.sigma))
    mean, std = adapter.propose(likelihood)
    noise = torch.randn(len(y), 20_000, 2, generator=seeded(5, 0, 0))
    with torch.no_grad():
        x = prior.one_step((mean[:, None] + std[:, None] * noise).flatten(0, 1)).unflatten(0, noise.shape[:2])
    return x.mean(dim=1), torch.stack([torch.cov(rows.T) for rows in x])


def test_linear_gaussian_frozen_against_joint(tmp_path):
    """The linear-Gaussian case (Proposition 3.1 of the VFM paper): with an exact frozen linear map, noise of diagonal
    covariance gives the posterior's mean and, predictably, not its covariance; joint training turns the map so that
    most of that gap closes, at the price of a bias in the mean that stays under half a posterior deviation."""
    covariance = torch.tensor([[1.0, 0.9], [0.9, 0.85]])  # of `pairs`
    problem = first_coordinate(0.3)
    y = torch.tensor([[-1.0], [0.0], [1.2]])
    gain = covariance[:, :1] / (covariance[0, 0] + 0.3**2)
    true_mean, true_covariance = (gain @ y.T).T, covariance - gain @ covariance[:1]

    exact = GaussianFlow(covariance)
    adapter = Adapter((2,), classes=["first-coordinate"], network="mlp", options={"width": 32, "depth": 2},
                      generator=torch.Generator().manual_seed(0))
    frozen = VFMObjective(exact, adapter, [problem], frozen=True)
    optimiser = torch.optim.Adam(adapter.parameters(), lr=3e-3)
    for step in range(400):
        optimiser.zero_grad()
        loss, _ = frozen(pairs(256, seeded(1, step, 0)), seeded(2, step, 0))
        loss.backward()
        optimiser.step()
    frozen_mean, frozen_covariance = moments(exact, adapter, problem, y)

    # the best diagonal covariance of noise is one over the diagonal of the posterior precision in noise space
    root = exact.vectors * exact.values.sqrt() @ exact.vectors.T
    precision = torch.eye(2) + root[:, :1] @ root[:1] / 0.3**2
    predicted = root @ torch.diag(1 / precision.diagonal()) @ root
    torch.testing.assert_close(frozen_mean, true_mean, atol=0.06, rtol=0)
    torch.testing.assert_close(frozen_covariance, predicted.expand(3, 2, 2), atol=0.02, rtol=0.1)
    frozen_error = (predicted - true_covariance).norm() / true_covariance.norm()
    assert frozen_error > 0.25  # what no diagonal covariance can mend on this map

    loop = settings(steps=1500, batch_size=256, learning_rate=3e-3, warmup=50, ema=0.99, log_every=500)
    start = NeuralFlowMap((2,), network="mlp", options={"width": 64, "depth": 3}, decode_affine=(1.0, 0.0),
                          generator=seeded(0, 0, 0))
    joint = train_vfm(pairs, start, [problem], loop, tmp_path, options={"width": 32, "depth": 2}, tau=0.3, alpha=0.8,
                      progress=False)
    joint_mean, joint_covariance = moments(joint.prior, joint.adapter, problem, y)
    deviation = true_covariance.diagonal().sqrt()
    assert ((joint_mean - true_mean) / deviation).abs().max() < 0.6
    joint_error = (joint_covariance - true_covariance).flatten(1).norm(dim=1) / true_covariance.norm()
    assert joint_error.max() < 0.6 * frozen_error, (joint_error, frozen_error)


def test_reward_alignment_tilts_the_prior(tmp_path):
    """r(x) = x_0 tilts N(0, C) to N(C e_0, C)."""
    reward = invflow.FunctionReward(lambda x: x[:, 0])
    reward.problem_class = "to-the-right"
    loop = settings(steps=800, batch_size=256, learning_rate=3e-3, warmup=50, ema=0.99, log_every=400)
    start = NeuralFlowMap((2,), network="mlp", options={"width": 64, "depth": 3}, decode_affine=(1.0, 0.0),
                          generator=seeded(0, 0, 0))
    prior = train_prior(pairs, loop, tmp_path / "prior", network="mlp", options=start.options,
                        decode_affine=(1.0, 0.0), progress=False)
    vfm = train_alignment(pairs, prior, reward, "to-the-right", loop, tmp_path / "aligned",
                          options={"width": 16, "depth": 2}, progress=False)
    posterior = vfm.sample(reward, 20_000, generator=seeded(3, 0, 0))
    mean = posterior.mean()[0]
    torch.testing.assert_close(mean, torch.tensor([1.0, 0.9]), atol=0.25, rtol=0)
    prior_mean = vfm.prior_samples(20_000, generator=seeded(4, 0, 0)).mean(dim=0)
    assert prior_mean.abs().max() < 0.25  # the unconditional samples survive


def test_unknown_problem_names_classes_and_ways_out():
    vfm = invflow.VFM(tiny_prior(), Adapter((2,), classes=["first-coordinate"], network="mlp", options=TINY))
    operator = MatrixOperator(torch.eye(2), image_shape=(2,))
    likelihood = invflow.GaussianLikelihood(operator, torch.zeros(1, 2), sigma=0.1)
    with pytest.raises(ValueError, match=r"first-coordinate.*NoiseSMC"):
        vfm.sample(likelihood, 4)
    with pytest.raises(ValueError, match="a FunctionReward has no measurement"):
        vfm.sample(invflow.FunctionReward(lambda x: x[:, 0]), 4)
