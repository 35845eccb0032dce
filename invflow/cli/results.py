"""Writes the results of ``invflow solve``: a figure, a posterior, metrics and, for an image file, pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invflow.datasets.files import write_image
from invflow.likelihood import GaussianLikelihood
from invflow.reward import Reward

if TYPE_CHECKING:
    from invflow.posterior import Posterior
    from invflow.problem import Problem

__all__ = ["write_results", "write_tilted_results"]

#: size of the samples in bytes up to which a posterior is written by default
LARGEST = 2**30


class Written:
    """Writes files into a folder one by one; if one fails, the error is recorded and the others are still written.

    Attributes:
        folder: The folder, created if needed.
        files: Files that were written.
        failures: Errors of the files that were not written, by name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, list[Path]()
        self.failures: dict[str, Exception] = {}

    def clear(self) -> None:
        """Remove files of an earlier run, so that none of them remain among the new ones."""
        names = ("posterior.safetensors", "metrics.json", "figure.png", "restored.png", "std.png")
        for path in (*(self.folder / name for name in names), *self.folder.glob("samples/[0-9]*.png")):
            with contextlib.suppress(OSError):  # missing, or not removable; then writing it fails too
                path.unlink()

    def write(self, name: str, write: Callable[[Path], object]) -> None:
        """Call ``write(path)`` and record the file."""
        if self.attempt(name, lambda: write(self.folder / name)):
            self.files.append(self.folder / name)

    def attempt(self, name: str, call: Callable[[], object]) -> bool:
        """Make a call, record its failure under a name, and return whether it succeeded."""
        try:
            call()
        except Exception as error:  # an error in one file must not prevent the others
            self.failures[name] = error
        return name not in self.failures

    def check(self) -> None:
        """Raise a ValueError that names the files that were not written, if any, and why."""
        if self.failures:
            reasons: dict[str, list[str]] = {}
            for name, error in self.failures.items():
                reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                reasons.setdefault(reason, []).append(name)
            lines = [f"{', '.join(names)} ({reason})" for reason, names in reasons.items()]
            first = next(iter(self.failures.values()))
            raise ValueError(f"not written to {self.folder}: {'; '.join(lines)}") from first


def write_results(folder: Path, posterior: Posterior, likelihood: GaussianLikelihood, truth: Tensor | None,
                  summary: dict[str, Any], title: str, *, pictures: int | None = None, keep: bool = True,
                  say: Callable[[str], None] = print) -> Written:
    """Write ``posterior.safetensors``, ``metrics.json`` and ``figure.png``, each atomically.

    Args:
        folder: Folder for the results, created if needed.
        posterior: Posterior of B observations; its file also holds truth and observation, among the diagnostics.
        likelihood: Likelihood of these observations.
        truth: Truths ``(B, *image_shape)`` or None.
        summary: Result of :func:`invflow.evaluation.summary.summarise`.
        title: Title of the figure.
        pictures: For an image file, the number of samples to write in addition to ``restored.png`` and ``std.png``, see
            :func:`write_pictures`; None for no pictures.
        keep: Whether to write ``posterior.safetensors`` even if it takes over a gigabyte.
        say: Called with a sentence if it is not written.

    Returns:
        The files. It records those that could not be written; the others are not affected.
    """
    done = Written(folder)
    done.clear()
    size = posterior.samples.numel() * posterior.samples.element_size()
    if keep or size <= LARGEST:
        posterior.diagnostics["observation"] = likelihood.y
        if truth is not None:
            posterior.diagnostics["truth"] = truth
        done.write("posterior.safetensors", posterior.save)
    else:
        say(f"posterior.safetensors would take {size / 2**30:.1f} GB and is not written: --keep-posterior writes it")
    if pictures is not None and len(posterior.image_shape) == 3 and posterior.image_shape[0] in (1, 3):
        scales: dict[str, Any] = {}
        summary, count = {**summary, "pictures": scales}, pictures
        done.attempt("pictures", lambda: scales.update(write_pictures(done, posterior, count)))
    _write_metrics(done, posterior, summary)
    photograph = min(posterior.image_shape[1:], default=0) > 64
    _write_figure(done, lambda: posterior.plot(truth, likelihood.y, observed=likelihood.operator.observed(),
                                               title=title, samples=4 if photograph else 5))
    return done


def write_pictures(done: Written, posterior: Posterior, count: int) -> dict[str, Any]:
    """Write the first observation's posterior as image files.

    ``restored.png`` is the posterior mean; ``samples/0.png`` and so on are samples, resampled by their weights if the
    posterior is weighted; ``std.png`` is the posterior standard deviation in grey, root mean square over the channels.

    Args:
        done: Writer of the files.
        posterior: Posterior of pictures with 1 or 3 channels.
        count: Number of samples to write, at most the number available.

    Returns:
        The value of white in ``std.png``: the standard deviation that only one pixel in a thousand exceeds.
    """
    first = posterior.select(0)
    done.write("restored.png", lambda path: write_image(first.mean()[0], path))
    chosen = first
    if count and first.weighted:
        chosen = first.resample(min(count, first.num_samples), generator=torch.Generator().manual_seed(0))
    for i in range(min(count, first.num_samples)):
        done.write(f"samples/{i}.png", partial(write_image, chosen.samples[0, i]))
    std = first.std()[0].square().mean(0).sqrt()
    if bool(std.isnan().any()):
        return {}
    ordered = std.flatten().sort().values
    white = max(float(ordered[int(0.999 * (len(ordered) - 1))]), 1e-6)
    done.write("std.png", partial(write_image, std / white))
    return {"std.png": {"black": 0.0, "white": white}}


def write_tilted_results(folder: Path, posterior: Posterior, problem: Problem, reward: Reward, summary: dict[str, Any],
                         title: str, generator: torch.Generator) -> Written:
    """Write the files of :func:`write_results` for a problem with a reward; a plane is shown with exact points.

    Args:
        folder: Folder for the results, created if needed.
        posterior: Posterior of B repeats.
        problem: Problem whose exact draws are shown, if it can draw them.
        reward: Reward of the repeats.
        summary: Result of :func:`invflow.evaluation.summary.summarise_tilted`.
        title: Title of the figure.
        generator: Generator for the exact points.

    Returns:
        The files, as in :func:`write_results`.
    """
    def figure() -> Any:
        if posterior.image_shape != (2,):
            return posterior.plot(title=title)
        from invflow.views.plane import plane_figure

        exact = None
        try:
            solver = problem.exact_posterior()
            exact = solver.sample(reward.select(0), 2000, generator=generator).samples[0]
        except TypeError:  # no exact sampler is known
            pass
        prior = problem.prior.generate(2000, generator=generator)
        return plane_figure(posterior, exact=exact, prior=prior, title=title)

    done = Written(folder)
    done.clear()
    done.write("posterior.safetensors", posterior.save)
    _write_metrics(done, posterior, summary)
    _write_figure(done, figure)
    return done


def _write_metrics(done: Written, posterior: Posterior, summary: dict[str, Any]) -> None:
    from invflow._core.records import versions
    from invflow.evaluation.summary import write_json

    values = {**summary, "settings": posterior.settings, "versions": versions()}
    done.write("metrics.json", lambda path: write_json(values, path))


def _write_figure(done: Written, make: Callable[[], Any]) -> None:
    from invflow._core.records import write_atomically

    def write(path: Path) -> None:
        figure = make()
        write_atomically(path, lambda name: figure.savefig(name, format="png"))

    done.write("figure.png", write)
