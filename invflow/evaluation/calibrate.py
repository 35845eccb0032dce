"""``invflow.calibrate``: test by simulation whether a solver's posteriors are calibrated."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invflow._core.checks import host_memory
from invflow._core.explained import explained
from invflow._core.files import alone_in
from invflow._core.identity import identity
from invflow._core.random import as_generator
from invflow._core.records import as_json, code_versions, finite
from invflow.evaluation.certificate.certificate import Certificate, clear, read_simulations, write_simulations
from invflow.evaluation.certificate.quantities import Quantity, default_quantities
from invflow.evaluation.certificate.ranking import rank_truths, tarp_references
from invflow.flowmap import FlowMap
from invflow.posterior import Posterior
from invflow.problem import Problem, list_problems, load_problem
from invflow.solver import Solver, plain

if TYPE_CHECKING:
    from invflow.likelihood import Likelihood

__all__ = ["Certificate", "calibrate"]

_PILOT = 64  # truths for choosing pixels and placing the references of TARP
_VALUES_AT_A_TIME = 2**25
_MOST_AT_A_TIME = 25  # largest number of simulations lost when a run is killed


@explained(like="invflow.calibrate('exact', 'gaussian/linear')")
def calibrate(solver: Solver | str, problem: Problem | str, *, num_simulations: int = 200, num_samples: int = 99,
              num_particles: int | None = None, source: str = "prior", split: str = "test",
              quantities: Mapping[str, Quantity] | None = None, defaults: bool = True, alpha: float = 0.05,
              chunk_size: int | None = None, output: str | os.PathLike[str] | None = None,
              generator: torch.Generator | None = None, progress: bool = False,
              watch: Callable[[Certificate], object] | None = None) -> Certificate:
    """Test by simulation whether a solver's posteriors are calibrated.

    Draws truths, measures them, samples their posteriors, and ranks each truth among its samples by several
    quantities. For an exact solver the ranks are uniform (Talts et al. 2018; Modrak et al. 2023). Each quantity
    is tested by simultaneous bands (Saeilynoja et al. 2022), distances to random references by TARP (Lemos et al.
    2023), and spread and mean of all pixels together by their randomised ranks. All p-values are corrected for
    their number (Holm 1979). Quantities that order images in the same way, such as residual and log likelihood with
    Gaussian noise, count once. A calibrated solver is not necessarily good: draws from the prior that ignore the data
    pass the tests of pixels. The quantities that use the measurement, the contraction and the scores reveal this.

    Args:
        solver: Any solver, or the name of one that suits the problem.
        problem: A problem or its name. It provides operator and noise, and truths if ``source`` is ``"data"``.
        num_simulations: S, the number of pairs of a truth and a measurement.
        num_samples: N, the number of samples among which each truth is ranked; with 99, ranks have 100 values.
        num_particles: Number of particles that the solver runs for each measurement, from which N are resampled. None
            means ten times N for solvers with importance weights or resampling, which are exact only for many
            particles, and N for others.
        source: ``"prior"`` for truths from ``solver.prior_samples`` (from the problem's prior if the solver has none):
            an exact solver passes. ``"data"`` for the problem's own truths: this also detects a misfit of the prior.
        split: Split of a problem with images, for ``source="data"``.
        quantities: Your own quantities by name, ``(images (B, N, *image_shape), likelihood) -> (B, N)``, in addition
            to the default ones.
        defaults: Whether to also test random pixels and projections, means over blocks of pictures, residual, log
            likelihood and total variation.
        alpha: Probability of any false alarm.
        chunk_size: Number of measurements per call of the solver.
        output: Folder for the certificate, locked by this run. Numbers are written after each chunk, and a calibration
            that was killed resumes if it is called with the same arguments. Solver, truths,
            measurements and quantities must have the same content; if this cannot be determined, it does not resume.
        generator: Random generator; one number is drawn from it, and all others follow from that number.
        progress: Whether to show a progress bar.
        watch: Function called after each chunk with the certificate of all simulations so far, if there are at least
            two; an exception in it ends the calibration.

    Returns:
        A :class:`~invflow.evaluation.calibrate.Certificate`, which can be printed, plotted by ``plot()`` and saved by
        ``save``.

    Raises:
        ValueError: If a setting is out of range, or if the folder holds another calibration or is used by another run.
        MemoryError: If the particles of one measurement do not fit in this machine's memory.
        OSError: If the folder is not writable; this is checked before anything is computed.

    Example:
        >>> import torch, invflow
        >>> problem = invflow.load_problem("gaussian/linear")
        >>> g = torch.Generator().manual_seed(0)
        >>> certificate = invflow.calibrate(problem.exact_posterior(), problem, num_simulations=100, generator=g)
        >>> certificate.verdict
        'passes'
    """
    solver, problem = _named(solver, problem)
    _check(problem, source, num_simulations, num_samples, num_particles, alpha)
    folder = None if output is None else Path(output)
    with contextlib.nullcontext() if folder is None else alone_in(folder):
        seed = _seed(generator, folder)
        posed, base = _posed(solver, problem, source)
        pilot = _pilot(posed, problem, source, split, _child(seed, "pilot"))
        chosen = _chosen(quantities or {}, default_quantities(pilot, _child(seed, "quantities")) if defaults else {})
        # drawn all at once: truths from data do not repeat, and the chunk size does not change them
        truth, likelihood = posed.simulate(num_simulations, generator=_child(seed, "truths"), source="data",
                                           split=split)
        references = tarp_references(pilot, truth, _child(seed, "references"))
        content = _contents(solver, (truth, likelihood, references), chosen)  # before the solver is changed in any way
        if num_particles is None:
            weighted = _uses_weights(solver, likelihood.select(0), _child(seed, "probe"))
            num_particles = 10 * num_samples if weighted else num_samples
        values = num_particles * max(1, truth[0].numel())
        if 4 * values * truth.element_size() > host_memory():  # samples, resampled samples, and their quantities
            raise MemoryError(f"{num_particles} particles of {truth[0].numel()} values do not fit into memory, even "
                              "for one measurement; pass a smaller num_samples or num_particles")
        if chunk_size is None:
            chunk_size = max(1, min(_MOST_AT_A_TIME, num_simulations, _VALUES_AT_A_TIME // values))
        settings = {
            "solver": _settings(solver), "truths": base, "split": split if source == "data" else None, "seed": seed,
            "chunk_size": chunk_size, "quantities": list(chosen), "image_shape": list(problem.image_shape),
            "num_simulations": num_simulations, "num_samples": num_samples, "num_particles": num_particles,
            "problem": problem.name, "versions": code_versions(), "content": content,
        }
        done = _resume(folder, settings)
        parts = [done] if done else []

        def judged(simulations: int) -> Certificate:
            return Certificate.from_record(_joined(parts), list(chosen), {
                "problem": problem.name, "solver": type(solver).__name__, "source": source,
                "num_simulations": simulations, "num_samples": num_samples, "num_particles": num_particles,
                "alpha": alpha, "settings": settings})

        start = len(done["tarp_ranks"]) if done else 0
        if folder is not None and start < num_simulations:
            clear(folder)  # so that no certificate of other simulations remains
        for rows in _chunks(start, num_simulations, chunk_size, progress, type(solver).__name__):
            part = slice(rows.start, rows.stop)
            parts.append(_simulate(solver, truth[part], likelihood.select(part), references[part], chosen, num_samples,
                                   num_particles, _child(seed, f"chunk {rows.start}")))
            if folder is not None:
                write_simulations(folder, _joined(parts), settings)
            if watch is not None and rows.stop > 1:
                watch(judged(rows.stop))
        certificate = judged(num_simulations)
        if folder is not None:
            certificate.save(folder)
    return certificate


def _named(solver: Solver | str, problem: Problem | str) -> tuple[Solver, Problem]:
    """Solver and problem, looked up if they are names."""
    from invflow.registry import solver_by_name

    if isinstance(solver, Problem) or (isinstance(solver, str) and solver in list_problems()):
        call = f"{problem!r}, {solver!r}" if isinstance(problem, str) and isinstance(solver, str) else "solver, problem"
        raise TypeError(f"calibrate takes the solver first and then the problem, not {solver!r:.60} and "
                        f"{problem!r:.60}: write invflow.calibrate({call})")
    posed = load_problem(problem) if isinstance(problem, str) else problem
    built = solver_by_name(solver, posed) if isinstance(solver, str) and isinstance(posed, Problem) else solver
    if not isinstance(built, Solver) or not isinstance(posed, Problem):
        raise TypeError(f"calibrate takes a solver and a problem, not {solver!r:.60} and {problem!r:.60}: pass both, "
                        "or their names, as in invflow.calibrate('exact', 'gaussian/linear')")
    prior = built.prior
    if isinstance(prior, FlowMap) and not prior.resizable and tuple(prior.image_shape) != posed.image_shape:
        raise ValueError(f"the prior of this {type(built).__name__} has images {tuple(prior.image_shape)}, but the "
                         f"problem {posed.name!r} has {posed.image_shape}: pass a solver with a prior for this shape")
    return built, posed


def _check(problem: Problem, source: str, num_simulations: int, num_samples: int, num_particles: int | None,
           alpha: float) -> None:
    """Raise an error for settings out of range, and for problems without measurements."""
    if num_simulations < 2 or num_samples < 3 or not 0 < alpha < 1:
        raise ValueError(f"num_simulations={num_simulations} must be at least 2, num_samples={num_samples} at least 3, "
                         f"alpha={alpha} in (0, 1)")
    if num_particles is not None and num_particles < num_samples:
        raise ValueError(f"num_particles={num_particles} must be at least num_samples={num_samples}, since the samples "
                         "are drawn from the particles")
    _ = problem.operator  # raises an error for a problem without measurements
    if source not in ("prior", "data"):
        raise ValueError(f"unknown source {source!r}: pass source='prior' or source='data'")


def _chosen(own: Mapping[str, Quantity], default: dict[str, Quantity]) -> dict[str, Quantity]:
    """All quantities by name."""
    clash = sorted(set(default) & set(own))
    if clash or not (own or default):
        raise ValueError(f"the name {clash[0]!r} is taken by a default quantity: choose another" if clash else
                         "no quantities: pass some, or defaults=True")
    return {**default, **own}


# -- truths and measurements --------------------------------------------------------------------------------------


def _posed(solver: Solver, problem: Problem, source: str) -> tuple[Problem, str]:
    """The problem with truths from this source, and a name for the source."""
    if source == "data":
        return problem, "data"
    own = type(solver).prior_samples is not Solver.prior_samples
    posed = copy.copy(problem)
    posed._images = None
    posed._sampler = ((lambda n, generator: solver.prior_samples(n, generator=generator).detach().cpu()) if own else
                      (lambda n, generator: problem.prior.generate(n, generator=generator).detach().cpu()))
    return posed, "the solver's own prior" if own else "the problem's prior"


def _pilot(posed: Problem, problem: Problem, source: str, split: str, generator: torch.Generator) -> Tensor:
    """Truths ``(n, *image_shape)`` that are not among the simulations: new draws, or the other split."""
    if source == "data" and problem.has_images:
        return problem.images("validation" if split == "test" else "test")
    result: Tensor = posed.simulate(_PILOT, generator=generator)[0]
    return result


def _uses_weights(solver: Solver, likelihood: Likelihood, generator: torch.Generator) -> bool:
    """Whether posteriors have weights or resampled particles, found by a run on one measurement."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few particles cannot converge
        posterior = _sample(solver, likelihood, 32, generator)
    return posterior.weighted or "distinct_ancestors" in posterior.diagnostics


def _sample(solver: Solver, likelihood: Likelihood, count: int, generator: torch.Generator) -> Posterior:
    likelihood = likelihood.to(solver.prior.device) if isinstance(solver.prior, FlowMap) else likelihood
    with solver.counting() as cost:  # the sample method of a third party may not report its calls
        posterior = solver.sample(likelihood, count, generator=generator)
    posterior.nfe = cost(posterior.nfe, posterior.num_observations * posterior.num_samples)
    return posterior


# -- one chunk ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _simulate(solver: Solver, truth: Tensor, likelihood: Likelihood, references: Tensor,
              quantities: Mapping[str, Quantity], num_samples: int, num_particles: int,
              generator: torch.Generator) -> dict[str, Tensor]:
    """Numbers of B simulations, each ``(B, ...)`` on the CPU."""
    began = time.perf_counter()
    posterior = _sample(solver, likelihood, num_particles, generator)
    seconds = time.perf_counter() - began
    shape = (len(truth), num_particles, *truth.shape[1:])
    if tuple(posterior.samples.shape) != shape:
        raise ValueError(f"{type(solver).__name__} returned samples {tuple(posterior.samples.shape)}, expected "
                         f"{shape}, (B, N, *image_shape)")
    rank_generator = _child(int(torch.randint(2**62, (1,), generator=generator)), "ranks")
    if posterior.weighted or num_particles != num_samples:
        posterior = posterior.resample(num_samples, generator=generator)
    x = posterior.samples
    ranked = rank_truths(x, truth, likelihood.to(x.device), references, quantities, rank_generator)
    cost = torch.ones(len(truth), dtype=torch.float64) * num_particles
    found = {**ranked, "forward": cost * posterior.nfe.forward, "backward": cost * posterior.nfe.backward,
             "seconds": torch.full_like(cost, seconds / len(truth))}
    return {key: value.cpu() for key, value in found.items()}


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _chunks(start: int, stop: int, size: int, progress: bool, name: str) -> Any:
    from tqdm import tqdm

    with tqdm(total=stop, initial=start, disable=not progress, desc=f"calibrating {name}", unit="simulation") as bar:
        for first in range(start, stop, size):
            rows = range(first, min(first + size, stop))
            yield rows
            bar.update(len(rows))


# -- seeds, settings, resuming ------------------------------------------------------------------------------------


def _seed(generator: torch.Generator | None, folder: Path | None) -> int:
    """Draw a seed from the generator; without one, use the seed of the calibration in the folder, if any."""
    if generator is None and folder is not None and (folder / "simulations.safetensors").is_file():
        return int(read_simulations(folder)[1]["seed"])
    generator = as_generator(generator)
    return int(torch.randint(2**62, (1,), generator=generator, device=generator.device))


def _child(seed: int, purpose: str) -> torch.Generator:
    """A generator on the CPU for one purpose, independent of the others."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _settings(solver: Solver) -> dict[str, Any]:
    return {"class": type(solver).__name__, **plain(solver.settings())}


def _contents(solver: Solver, simulated: object, quantities: object) -> dict[str, str | None]:
    """Digests of everything that determines the numbers; None for content that cannot be identified."""
    found: dict[str, str | None] = {}
    for name, value in (("solver", solver), ("truths and measurements", simulated), ("quantities", quantities)):
        try:
            found[name] = identity(value)
        except Exception:  # including any error in a user's fingerprint()
            found[name] = None
    return found


def _resume(folder: Path | None, settings: dict[str, Any]) -> dict[str, Tensor]:
    """Numbers of the simulations already in a folder, if they belong to the same calibration."""
    if folder is None or not (folder / "simulations.safetensors").is_file():
        return {}
    record, before = read_simulations(folder)
    if "content" not in before:
        raise ValueError(f"{folder} was started by a version of invflow that did not record what determines the "
                         "simulations: choose another folder")
    now = finite(as_json(settings, "settings"))
    for key in now:
        if before.get(key) != now[key]:
            raise ValueError(f"{folder} holds another calibration: its {key} was {before.get(key)!r}, not "
                             f"{now[key]!r}; choose another folder, or pass the same arguments to resume it")
    unknown = [name for name, digest in now["content"].items() if digest is None]
    if unknown:
        raise ValueError(f"{folder} holds simulations, but cannot determine whether they have the same {unknown[0]}: "
                         "choose another folder")
    return record
