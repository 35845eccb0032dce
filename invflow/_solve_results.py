"""What ``invflow solve`` writes: a figure, a posterior, numbers, and of an image file pictures too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invflow.imageio import write_image
from invflow.reward import GaussianLikelihood, Reward

if TYPE_CHECKING:
    from invflow.posterior import Posterior
    from invflow.problem import Problem

__all__ = ["write_results", "write_tilted_results"]

#: bytes of samples up to which a posterior is written without being asked for
LARGEST = 2**30


def write_results(folder: Path, posterior: Posterior, likelihood: GaussianLikelihood, truth: Tensor | None,
                  summary: dict[str, Any], title: str, *, pictures: int | None = None, keep: bool = True,
                  say: Callable[[str], None] = print) -> list[Path]:
    """Write ``figure.png``, ``posterior.safetensors`` and ``metrics.json``, each whole or not at all.

    Args:
        folder: made where it does not exist.
        posterior: of B observations; truth and observation are kept in its file too, among the diagnostics.
        likelihood: of these observations.
        truth: ``(B, *image_shape)`` or None.
        summary: of :func:`invflow.report.summarise`.
        title: of the figure.
        pictures: of an image file: samples to be written beside ``restored.png`` and ``std.png``, see
            :func:`write_pictures`; None: no pictures.
        keep: write ``posterior.safetensors`` also where it takes over a gigabyte.
        say: called with a sentence where it is not written.

    Returns:
        The files.
    """
    photograph = min(posterior.image_shape[1:], default=0) > 64
    figure = posterior.plot(truth, likelihood.y, observed=likelihood.operator.observed(), title=title,
                            samples=4 if photograph else 5)
    files: list[Path] = []
    if pictures is not None and len(posterior.image_shape) == 3 and posterior.image_shape[0] in (1, 3):
        files, scales = write_pictures(folder, posterior, pictures)
        summary = {**summary, "pictures": scales}
    size = posterior.samples.numel() * posterior.samples.element_size()
    if not keep and size > LARGEST:
        say(f"posterior.safetensors would take {size / 2**30:.1f} GB and is not written: --keep-posterior writes it")
        return [*_write(folder, figure, None, summary, posterior.settings), *files]
    posterior.diagnostics["observation"] = likelihood.y
    if truth is not None:
        posterior.diagnostics["truth"] = truth
    return [*_write(folder, figure, posterior, summary, posterior.settings), *files]


def write_pictures(folder: Path, posterior: Posterior, count: int) -> tuple[list[Path], dict[str, Any]]:
    """Write the first observation's posterior as image files.

    ``restored.png`` is the posterior mean; ``samples/0.png`` and so on are samples, of a weighted posterior resampled
    by their weights; ``std.png`` is the posterior standard deviation, root mean square over the channels, grey.

    Args:
        folder: made where it does not exist.
        posterior: of pictures with 1 or 3 channels.
        count: samples to write, at most those that there are.

    Returns:
        The files; and what the white of ``std.png`` stands for, the largest standard deviation but for one pixel in a
        thousand.
    """
    files, first = [folder / "restored.png"], posterior.select(0)
    write_image(first.mean()[0], files[0])
    scales: dict[str, Any] = {}
    std = first.std()[0].square().mean(0).sqrt()
    if not bool(std.isnan().any()):
        ordered = std.flatten().sort().values
        white = max(float(ordered[int(0.999 * (len(ordered) - 1))]), 1e-6)
        write_image(std / white, folder / "std.png")
        files.append(folder / "std.png")
        scales["std.png"] = {"black": 0.0, "white": white}
    if count and first.weighted:
        first = first.resample(min(count, first.num_samples), generator=torch.Generator().manual_seed(0))
    for i in range(min(count, first.num_samples)):
        files.append(folder / "samples" / f"{i}.png")
        write_image(first.samples[0, i], files[-1])
    return files, scales


def write_tilted_results(folder: Path, posterior: Posterior, problem: Problem, reward: Reward, summary: dict[str, Any],
                         title: str, generator: torch.Generator) -> list[Path]:
    """The files of :func:`write_results` for a problem with a reward: points in the plane are drawn beside exact ones.

    Args:
        folder: made where it does not exist.
        posterior: of B repeats.
        problem: whose exact draws are shown, where it knows how to draw them.
        reward: of the repeats.
        summary: of :func:`invflow.report.summarise_tilted`.
        title: of the figure.
        generator: draws the exact points.

    Returns:
        The files.
    """
    if posterior.image_shape != (2,):
        return _write(folder, posterior.plot(title=title), posterior, summary, posterior.settings)
    from invflow.plot_plane import plane_figure

    exact = None
    try:
        solver = problem.exact_posterior()
        exact = solver.sample(reward.select(0), 2000, generator=generator).samples[0]
    except TypeError:  # none is known
        pass
    prior = problem.prior.generate(2000, generator=generator)
    figure = plane_figure(posterior, exact=exact, prior=prior, title=title)
    return _write(folder, figure, posterior, summary, posterior.settings)


def _write(folder: Path, figure: Any, posterior: Posterior | None, summary: dict[str, Any],
           settings: dict[str, Any]) -> list[Path]:
    from invflow._posterior_file import versions
    from invflow.pretrained import write_atomically
    from invflow.report import write_json

    files = [folder / "figure.png", folder / "posterior.safetensors", folder / "metrics.json"]
    write_atomically(files[0], lambda name: figure.savefig(name, format="png"))
    if posterior is None:
        del files[1]
    else:
        posterior.save(files[1])
    write_json({**summary, "settings": settings, "versions": versions()}, files[-1])
    return files
