"""One contract for all registered solvers: what ``sample`` accepts, counts, reports and leaves unchanged."""

from __future__ import annotations

import pytest
import torch

import invflow
from invflow.problem import load_problem
from invflow.registry import list_solvers, solver_by_name

FEW = {"fmtt": {"steps": 3}, "tds": {"steps": 3}, "noise-smc": {"num_moves": 1, "max_temperatures": 2},
       "noise-rto": {"max_iterations": 2}, "dps": {"steps": 3}, "pigdm": {"steps": 3}, "moment-matching": {"steps": 3},
       "diffpir": {"steps": 3}, "ddrm": {"steps": 3}, "ula": {"burn_in": 2, "thinning": 1}, "pnp-flow": {"steps": 2},
       "flower": {"steps": 3}, "top-k": {"budget": 30}, "beam": {"budget": 8}, "best-of-n": {"budget": 4},
       "daps": {"steps": 2, "langevin_steps": 2}, "flow-dps": {"steps": 2}, "diamond": {"steps": 2},
       "dpnp": {"iterations": 2, "diffusion_steps": 2},
       "noise-langevin": {"steps": 2}, "d-flow": {"iterations": 2, "ode_steps": 1},
       "plug-and-play": {"steps": 2}, "tv": {"iterations": 5}}
#: draw nothing from a network
FREE = {"lmmse", "exact", "bicubic", "wiener", "tv", "bm3d"}
PACKAGE = {"bm3d": "bm3d", "ula": "deepinv"}


def posed(name: str) -> tuple[invflow.Solver, invflow.GaussianLikelihood]:
    if name in PACKAGE:
        pytest.importorskip(PACKAGE[name])
    problem = load_problem("gaussian/linear" if name == "exact" else "mnist/denoising")
    _, likelihood = problem.simulate(2, generator=torch.Generator().manual_seed(1))
    return solver_by_name(name, problem, **FEW.get(name, {})), likelihood


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list_solvers())
def test_contract(name: str) -> None:
    solver, likelihood = posed(name)
    before = solver.fingerprint()
    first = solver.sample(likelihood, 3, generator=5)
    second = solver.sample(likelihood, 3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(first.samples, second.samples)  # an int is a seed
    assert first.nfe == second.nfe
    assert (first.nfe.forward > 0) == (name not in FREE)
    assert first.seconds > 0
    assert solver.fingerprint() == before == solver_by_name(name, load_problem(
        "gaussian/linear" if name == "exact" else "mnist/denoising"), **FEW.get(name, {})).fingerprint()
    settings = solver.settings()
    assert settings["solver"] == type(solver).__name__ in repr(solver)
    assert {key: settings[key] for key in FEW.get(name, {})} == FEW.get(name, {})
    assert settings.items() <= first.settings.items()
    held = {"operator"} | ({"prior"} if solver.prior is not None else set()) | (
        {"adapter"} if hasattr(solver, "adapter") else set())
    assert set(first.settings["identity"]) == held
    assert None not in first.settings["identity"].values()
    assert solver.to("cpu") is solver
    assert solver.resized(likelihood.operator.image_shape) is solver


@pytest.mark.parametrize("name", list_solvers())
def test_what_is_no_reward_gets_one_sentence(name: str) -> None:
    solver, likelihood = posed(name)
    for given, words in ((likelihood.y, "pass a measurement y with its operator"),
                         (load_problem("gaussian/linear"), r"truth, likelihood = problem.simulate"),
                         ((likelihood.y, likelihood), "unpack it and pass the reward"), (len, "FunctionReward"),
                         ("picture.png", "an image or a measurement")):
        with pytest.raises(TypeError, match=f"{type(solver).__name__}.sample takes a Reward, .*{words}"):
            solver.sample(given, 2)  # type: ignore[arg-type]
    for count, error in ((0, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match=f"num_samples is {count}"):
            solver.sample(likelihood, count)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="an int as a seed"):
        solver.sample(likelihood, 2, generator="seed")  # type: ignore[arg-type]


class Scaled(invflow.Solver):
    """A third party's, written before ``_sample``: it states no cost."""

    def __init__(self, prior: invflow.FlowMap, width: float = 1.0) -> None:
        self.prior, self.width = prior, width

    def sample(self, reward, num_samples, *, generator=None, progress=False):  # type: ignore[no-untyped-def]
        x = self.width * self.prior.generate(num_samples, generator=generator)
        return invflow.Posterior(x[None])


def test_solver_that_overrides_sample_alone_goes_on_working() -> None:
    prior = invflow.GaussianMixtureFlow(torch.zeros(1, 2), std=1.0)
    reward = invflow.FunctionReward(lambda x: x[:, 0])
    assert Scaled(prior).sample(reward, 4, generator=0).samples.shape == (1, 4, 2)
    assert Scaled(prior).settings() == {"solver": "Scaled", "width": 1.0}
    assert Scaled(prior).fingerprint() == Scaled(prior).fingerprint() != Scaled(prior, 0.1).fingerprint()


def test_solver_that_writes_nothing_says_what_to_write() -> None:
    class Empty(invflow.Solver):
        pass

    with pytest.raises(TypeError, match=r"must define _sample\(reward, n, generator, progress\)"):
        Empty().sample(invflow.FunctionReward(lambda x: x[:, 0]), 1)


def test_planning_a_search_costs_no_sample_anything() -> None:
    problem = load_problem("mixture/half-plane")
    _, reward = problem.simulate(1, generator=torch.Generator().manual_seed(0))
    posterior = invflow.TopKSearch(problem.prior, budget=800).sample(reward, 4, generator=0)
    assert posterior.nfe.forward + posterior.nfe.backward == posterior.diagnostics["calls"] <= 800


def test_resized_copy_shares_weights_and_reaches_all_parts() -> None:
    options = {"channels": [8, 16], "blocks": 1, "attention": False}
    prior = invflow.NeuralFlowMap((1, 16, 16), options=options)
    solver = invflow.FMTT(prior, steps=2)
    larger = solver.resized((1, 24, 16))
    assert larger.prior is larger.look_ahead.prior is not prior
    assert larger.prior.image_shape == (1, 24, 16)
    assert prior.image_shape == (1, 16, 16)
    assert next(larger.prior.parameters()) is next(prior.parameters())
    with pytest.raises(ValueError, match="cannot take"):
        solver.resized((3, 16, 16))
    with pytest.raises(ValueError, match=r"GaussianMixtureFlow .* cannot take \(3,\)"):
        invflow.FMTT(invflow.GaussianMixtureFlow(torch.zeros(1, 2), std=1.0)).resized((3,))
