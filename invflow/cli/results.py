"""What ``invflow solve`` writes: a figure, a posterior, numbers, and of an image file pictures too."""

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

#: bytes of samples up to which a posterior is written without being asked for
LARGEST = 2**30


class Written:
    """Files written into a folder one by one: one that fails is noted, and the others are written all the same.

    Attributes:
        folder: made where it does not exist.
        files: that are there.
        failures: the error of each that is not, by its name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, list[Path]()
        self.failures: dict[str, Exception] = {}

    def clear(self) -> None:
        """Remove the files of another run, of which some might stay beside the new ones."""
        names = ("posterior.safetensors", "metrics.json", "figure.png", "restored.png", "std.png")
        for path in (*(self.folder / name for name in names), *self.folder.glob("samples/[0-9]*.png")):
            with contextlib.suppress(OSError):  # not there; or not to be removed, and then not to be written either
                path.unlink()

    def write(self, name: str, write: Callable[[Path], object]) -> None:
        """Call ``write(path)``, and note the file."""
        if self.attempt(name, lambda: write(self.folder / name)):
            self.files.append(self.folder / name)

    def attempt(self, name: str, call: Callable[[], object]) -> bool:
        """Make a call whose failure is noted under a name; whether it worked."""
        try:
            call()
        except Exception as error:  # whatever one file fails with, it is not to cost the others
            self.failures[name] = error
        return name not in self.failures

    def check(self) -> None:
        """Raise a ValueError that names what was not written and why, if anything."""
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
    """Write ``posterior.safetensors``, ``metrics.json`` and ``figure.png``, each whole or not at all.

    Args:
        folder: made where it does not exist.
        posterior: of B observations; truth and observation are kept in its file too, among the diagnostics.
        likelihood: of these observations.
        truth: ``(B, *image_shape)`` or None.
        summary: of :func:`invflow.evaluation.summary.summarise`.
        title: of the figure.
        pictures: of an image file: samples to be written beside ``restored.png`` and ``std.png``, see
            :func:`write_pictures`; None: no pictures.
        keep: write ``posterior.safetensors`` also where it takes over a gigabyte.
        say: called with a sentence where it is not written.

    Returns:
        The files; one that cannot be written is told there, and takes no other with it.
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

    ``restored.png`` is the posterior mean; ``samples/0.png`` and so on are samples, of a weighted posterior resampled
    by their weights; ``std.png`` is the posterior standard deviation, root mean square over the channels, grey.

    Args:
        done: takes the files.
        posterior: of pictures with 1 or 3 channels.
        count: samples to write, at most those that there are.

    Returns:
        What the white of ``std.png`` stands for, the largest standard deviation but for one pixel in a thousand.
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
    """The files of :func:`write_results` for a problem with a reward: points in the plane are drawn beside exact ones.

    Args:
        folder: made where it does not exist.
        posterior: of B repeats.
        problem: whose exact draws are shown, where it knows how to draw them.
        reward: of the repeats.
        summary: of :func:`invflow.evaluation.summary.summarise_tilted`.
        title: of the figure.
        generator: draws the exact points.

    Returns:
        The files, as there.
    """
    def figure() -> Any:
        if posterior.image_shape != (2,):
            return posterior.plot(title=title)
        from invflow.views.plane import plane_figure

        exact = None
        try:
            solver = problem.exact_posterior()
            exact = solver.sample(reward.select(0), 2000, generator=generator).samples[0]
        except TypeError:  # none is known
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
