"""The pictures of the gallery: ``python docs/make_gallery.py`` makes all, ``python docs/make_gallery.py NAME`` one.

Written to ``docs/gallery``, with the shipped weights and seed 0;
some minutes on two CPU cores, most of it for ``solvers``.
"""

from __future__ import annotations

import argparse
import io
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import invflow
from invflow.registry import solver_by_name

FOLDER = Path(__file__).resolve().parent / "gallery"
TASKS = ("denoising", "random-inpainting", "box-inpainting", "super-resolution", "gaussian-blur", "motion-blur")


def generator(seed: int = 0) -> torch.Generator:
    """The random generator of a picture."""
    return torch.Generator().manual_seed(seed)


def tiles(rows: dict[str, list[Tensor]], headings: list[str], cell: float = 1.0) -> Any:
    """Rows of images ``(1, H, W)``, ``(3, H, W)`` or ``(h, w)`` with their names at the left and headings above."""
    columns = max(len(row) for row in rows.values())
    figure, axes = plt.subplots(len(rows), columns, squeeze=False, layout="constrained",
                                figsize=(cell * columns + 1.2, cell * len(rows) + 0.3))
    for line, (name, images) in zip(axes, rows.items()):
        for place in line:
            place.set_axis_off()
        line[0].text(-0.12, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=8)
        for place, image in zip(line, images):
            image = image.permute(1, 2, 0) if image.ndim == 3 and len(image) == 3 else image.squeeze()
            place.imshow(image.clamp(0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    for place, heading in zip(axes[0], headings):
        place.set_title(heading, fontsize=8)
    return figure


def six_problems(data: str) -> Any:
    """The first test image under six problems, with the one-step VFM."""
    vfm, rows = invflow.VFM.load(data), {}
    for k, task in enumerate(TASKS):
        truth, likelihood = invflow.load_problem(f"{data}/{task}").simulate(6, generator=generator(), shuffle=False)
        posterior = vfm.sample(likelihood, 64, generator=generator())
        seen = likelihood.y[k]
        observed = likelihood.operator.observed()
        if observed is not None:  # grey where nothing was seen
            seen = torch.where(observed[k % len(observed)], seen, 0.5)
        std = 2 * posterior.std()[k]
        rows[task] = [truth[k], seen, *posterior.samples[k, :4], posterior.mean()[k], std]
    return tiles(rows, ["truth", "observation", "sample", "sample", "sample", "sample", "mean", "2 x std"])


def solvers() -> Any:
    """One digit with a hole, five samples of each of several solvers."""
    truth, likelihood = invflow.load_problem("mnist/box-inpainting").simulate(1, generator=generator(), shuffle=False)
    vfm, prior = invflow.VFM.load("mnist"), invflow.load_prior("mnist")
    conjugate = {"look_ahead": "denoiser", "kernel": "ancestral", "proposal": "conjugate", "weights": "none",
                 "time_grid": "logit"}
    listed: dict[str, invflow.Solver] = {
        "LinearMMSE": invflow.LinearMMSE.load("mnist"), "VFM, 1 step": vfm,
        "VFM, 4 steps": invflow.VFM.load("mnist", steps=4),
        "FMTT, conjugate,\nno weights": invflow.FMTT(prior, steps=100, **conjugate),
        "NoiseRTO": invflow.NoiseRTO(vfm.prior, proposal=vfm.adapter), "PnPFlow\n(restoration)": invflow.PnPFlow(prior),
    }
    seen = torch.where(likelihood.operator.observed()[0], likelihood.y[0], 0.5)
    rows = {}
    for name, solver in listed.items():
        samples = solver.sample(likelihood, 5, generator=generator()).samples[0]
        rows[name] = [truth[0], seen, *samples]
    return tiles(rows, ["truth", "observation", *["sample"] * 5])


def prior_steps() -> Any:
    """The same noise carried to data in one, two and four jumps."""
    rows = {}
    for data in ("mnist", "fashion-mnist", "cifar10"):
        prior = invflow.load_prior(data)
        for steps in (1, 2, 4):
            rows[f"{data},\n{steps} step{'s' * (steps > 1)}"] = list(prior.generate(8, steps, generator=generator()))
    return tiles(rows, [])


def photographs() -> Any:
    """Windows of two of scikit-image's photographs, as the photographs' table observes them, pixel by pixel."""
    from PIL import Image, ImageDraw

    from benchmarks.tables.photo_parts import WINDOW, observe, scikit_image, window

    tasks = ("denoising", "super-resolution")
    headings = [h for task in tasks for h in (f"{task}: truth", "observation", "mean", "one sample")]
    shown = [p for p in scikit_image(512) if p.name in ("astronaut", "chelsea")]
    if not shown:
        raise SystemExit("scikit-image has these photographs: pip install 'invflow[baselines]'")
    gap, head, vfm = 4, 16, invflow.VFM.load("photos")
    sheet = Image.new("RGB", (len(headings) * (WINDOW + gap) - gap, head + len(shown) * (WINDOW + gap) - gap), "white")
    for j, heading in enumerate(headings):
        ImageDraw.Draw(sheet).text((j * (WINDOW + gap) + 2, 2), heading, fill="black")
    for i, picture in enumerate(shown):
        rows, columns = window(picture)
        for k, task in enumerate(tasks):
            likelihood = observe(picture, task, 0)
            posterior = vfm.sample(likelihood, 32, generator=generator())
            looks = (picture.image, likelihood.operator.embed(likelihood.y)[0], posterior.mean()[0],
                     posterior.samples[0, 0])
            for j, image in enumerate(looks):
                cut = (image[:, rows, columns].clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
                place = ((4 * k + j) * (WINDOW + gap), head + i * (WINDOW + gap))
                sheet.paste(Image.fromarray(cut.numpy()), place)
    return sheet


def half_plane() -> Any:
    """Eight Gaussians tilted away from the left half, by FMTT and exactly."""
    from invflow.views.plane import plane_figure

    problem = invflow.load_problem("mixture/half-plane")
    _, reward = problem.simulate(2, generator=generator())
    posterior = invflow.FMTT(problem.prior, steps=25).sample(reward, 1000, generator=generator())
    exact = problem.exact_posterior().sample(reward.select(0), 1000, generator=generator(1)).samples[0]
    prior = problem.prior.generate(1000, generator=generator(2))
    return plane_figure(posterior, exact=exact, prior=prior, title="FMTT, 25 steps, flow-map look-ahead")


def overconfident() -> Any:
    """A certificate of a sampler that is given half of the true noise level."""

    class Overconfident(invflow.Solver):
        def __init__(self, solver: invflow.Solver) -> None:
            self.solver = solver

        def sample(self, reward: Any, num_samples: int, **options: Any) -> invflow.Posterior:
            wrong = invflow.GaussianLikelihood(reward.operator, reward.y, reward.sigma / 2)
            return self.solver.sample(wrong, num_samples, **options)

        def prior_samples(self, n: int, **options: Any) -> Tensor:
            return self.solver.prior_samples(n, **options)

    problem = invflow.load_problem("gaussian/linear")
    solver = Overconfident(problem.exact_posterior())
    return invflow.calibrate(solver, problem, num_simulations=300, generator=generator()).plot()


def plane(*names: str, **settings: Any) -> Any:
    """Solvers on five Gaussians in the plane, with x + y/2 observed: samples over draws of the exact posterior."""
    problem = invflow.load_problem("gaussian/linear")
    _, likelihood = problem.simulate(1, generator=generator(3))
    exact = problem.exact_posterior().sample(likelihood, 2000, generator=generator(1)).samples[0]
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure, axes = plt.subplots(lines, columns, squeeze=False, sharex=True, sharey=True, layout="constrained",
                                figsize=(3 * columns, 2.4 * lines))
    for place in axes.flat[len(names):]:
        place.set_axis_off()
    for place, name in zip(axes.flat, names):
        # those made for images are told where the data lie
        own: dict[str, Any] = {"dps": {"zeta": 0.1}}.get(name, {})
        if name in ("dps", "pigdm", "moment-matching", "ddrm"):
            own["value_range"] = (-4.0, 4.0)
        solver = solver_by_name(name, problem, **settings, **own)
        posterior = solver.sample(likelihood, 256, generator=generator())
        posterior = posterior.resample(256, generator=generator()) if posterior.weighted else posterior
        place.scatter(*exact.T.tolist(), s=5, color="0.8", linewidths=0, label="exact posterior")
        place.scatter(*posterior.samples[0].T.tolist(), s=7, color="#3b4cc0", linewidths=0, label="samples")
        calls = posterior.nfe.forward + posterior.nfe.backward
        place.set_title(f"{name}, {calls:.0f} calls", fontsize=9)
    middle, half = exact.mean(0), 1.2 * float((exact - exact.mean(0)).abs().max())
    axes[0, 0].set_xlim(float(middle[0]) - half, float(middle[0]) + half)
    axes[0, 0].set_ylim(float(middle[1]) - half, float(middle[1]) + half)
    axes[0, 0].legend(fontsize=7, frameon=False, loc="lower left")
    return figure


def digits(task: str, *names: str) -> Any:
    """The fourth test digit: samples, mean and standard deviation of solvers."""
    problem = invflow.load_problem(f"mnist/{task}")
    truth, likelihood = problem.simulate(4, generator=generator(), shuffle=False)
    rows = {}
    for name in names:
        posterior = solver_by_name(name, problem).sample(likelihood.select([3]), 64, generator=generator())
        std = posterior.std()[0]
        rows[name] = [truth[3], likelihood.operator.embed(likelihood.y)[3], *posterior.samples[0, :4],
                      posterior.mean()[0], std / max(float(std.max()), 0.01)]
    return tiles(rows, ["truth", "observation", *(["sample"] * 4), "mean", "standard deviation"])


def pareto() -> Any:
    """The plot of a comparison: the distance from the exact posterior against the network calls of a sample."""
    solvers = {"exact": "exact", "noise-smc": "noise-smc", "noise-rto": "noise-rto",
               **{f"fmtt:steps={n}": partial(_steps, "fmtt", n) for n in (4, 8)},
               **{f"dps:steps={n}": partial(_steps, "dps", n) for n in (20, 60)}}
    found = invflow.compare("gaussian/linear", solvers, num_observations=8, num_samples=128)
    return found.plot("sliced_wasserstein")


def _steps(name: str, steps: int, problem: invflow.Problem) -> invflow.Solver:
    return solver_by_name(name, problem, steps=steps)


def samples_gif() -> list[Any]:
    """Frames: a digit and a photograph, each with a hole, and one posterior sample after the other."""
    from PIL import Image, ImageDraw

    side, gap, head, count = 144, 6, 16, 12
    rows = []
    for data, size, pick in (("mnist", None, 8), ("photos", 128, 2)):
        posed = invflow.load_problem(f"{data}/box-inpainting")
        truth = posed.simulate(pick + 1, generator=generator(), shuffle=False)[0][pick:]
        truth = truth if size is None else truth[:, :, 64:64 + size, 64:64 + size]
        shape = tuple(truth.shape[1:])
        box = 14 if size is None else 24  # photographs: what the adapter was trained on
        hole = invflow.operators.BoxInpainting(shape, box=(box, box))
        y = hole.measure(truth, sigma=0.025, generator=generator(1))
        likelihood = invflow.GaussianLikelihood(hole, y, sigma=0.025)
        posterior = invflow.VFM.load(data).sample(likelihood, 64, generator=generator())
        seen = torch.where(hole.observed()[0], y[0], 0.5)
        std = posterior.std()[0].square().mean(0, keepdim=True).sqrt()
        rows.append([seen, list(posterior.samples[0, :count]), posterior.mean()[0], std / std.max()])

    def tile(image: Tensor) -> Any:
        image = image.expand(3, -1, -1).clamp(0, 1)
        pixels = (image * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
        return Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)

    frames = []
    for k in range(count):
        sheet = Image.new("RGB", (4 * (side + gap) - gap, head + 2 * (side + gap) - gap), "white")
        for j, heading in enumerate(("observation", f"sample {k + 1}", "mean of 64", "standard deviation")):
            ImageDraw.Draw(sheet).text((j * (side + gap) + 2, 2), heading, fill="black")
        for i, (seen, samples, mean, std) in enumerate(rows):
            for j, image in enumerate((seen, samples[k], mean, std)):
                sheet.paste(tile(image), (j * (side + gap), head + i * (side + gap)))
        frames.append(sheet)
    return frames


PICTURES: dict[str, Callable[[], Any]] = {
    "six-problems": lambda: six_problems("mnist"), "six-problems-fashion": lambda: six_problems("fashion-mnist"),
    "solvers": solvers, "photographs": photographs, "prior-steps": prior_steps, "half-plane": half_plane,
    "overconfident": overconfident, "samples": samples_gif, "pareto": pareto,
    # one for each page on solvers
    "exact": lambda: plane("exact"), "fmtt": lambda: plane("fmtt", "tds"),
    "noise-smc": lambda: plane("noise-smc"), "noise-rto": lambda: plane("noise-rto"),
    "existing": lambda: plane("dps", "pigdm", "moment-matching", "ddrm", "pnp-flow", "flower", steps=50),
    "search": lambda: plane("best-of-n", "beam", "top-k", budget=800), "vfm": lambda: digits("box-inpainting", "vfm"),
    "lmmse": lambda: digits("super-resolution", "lmmse"),
    "baselines": lambda: digits("super-resolution", "bicubic", "wiener", "tv"),
}
COLOURFUL = ("photographs", "prior-steps")


def save(figure: Any, path: Path, width: int = 1000, colours: int = 64) -> None:
    """Write a figure as a small PNG, so many pixels wide; a picture as it is."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(figure, list):  # frames, which share a palette so that what does not change is stored once
        path = path.parents[1] / f"{path.stem}.gif"
        shared = figure[0].quantize(224)
        frames = [frame.quantize(palette=shared, dither=Image.Dither.NONE) for frame in figure]
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=450, loop=0, optimize=True)
    elif isinstance(figure, Image.Image):
        figure.quantize(colours).save(path, optimize=True)
    else:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=width / figure.get_figwidth(), facecolor="white")
        plt.close(figure)
        Image.open(buffer).convert("RGB").quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB", flush=True)


def main() -> None:
    """Make the pictures that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*PICTURES, []], help="default: all")
    names = parser.parse_args().names or list(PICTURES)
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of weights that were left out, which is the point there
            save(PICTURES[name](), FOLDER / f"{name}.png", colours=192 if name in COLOURFUL else 64)


if __name__ == "__main__":
    main()
