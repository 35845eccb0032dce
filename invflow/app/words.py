"""Description of a posterior in words, and the code that reproduces it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import torch

from invflow.app.damage import DAMAGES, HOLE
from invflow.app.state import SOLVERS, Restored, View
from invflow.datasets.files import write_image

__all__ = ["command_line", "describe", "python_code", "write_inputs"]


def describe(restored: Restored) -> str:
    """Cost, accuracy of the mean, and the solver's own diagnostics, as markdown."""
    view, posterior = restored.view, restored.posterior
    seconds = f"{posterior.seconds:.2g} s"
    lines = [f"**{view.solver}**: {posterior.num_samples} samples in {seconds}; network calls for each: "
             f"{posterior.nfe}."]
    error = float((posterior.mean()[0] - view.image).square().mean())
    if error > 0:
        lines.append(f"PSNR of the mean: {-10 * torch.tensor(error).log10():.1f} dB.")
    return " ".join([*lines, *_diagnostics(restored)])


def _diagnostics(restored: Restored) -> list[str]:
    posterior, found = restored.posterior, restored.posterior.diagnostics
    said = []
    if isinstance(found.get("verdict"), str):
        said.append(found["verdict"])
    ess = posterior.ess()
    if ess is not None:
        said.append(f"Effective sample size {float(ess[0]):.1f} of {posterior.num_samples}.")
    k_hat = found.get("k_hat")
    if isinstance(k_hat, torch.Tensor) and k_hat.numel() and not bool(k_hat.isnan().any()):
        said.append(f"Pareto k-hat {float(k_hat.max()):.2f}: over 0.7 the weights are unreliable.")
    converged = found.get("converged")
    if isinstance(converged, torch.Tensor):
        said.append("The solver's diagnostics found no problem." if bool(converged.all()) else
                    "The solver's diagnostics reject these samples.")
    if not said:
        residual = float(restored.likelihood.residual(restored.draws[None]).mean().sqrt())
        said.append(f"The solver has no diagnostics of its own. The residual of the samples is {residual:.2f} times "
                    "the noise level; 1 is expected.")
    return said + [_as_sentence(text) for text in restored.said if text not in said]


def _as_sentence(warning: str) -> str:
    """A warning of the library, rephrased for a single observation."""
    text = re.sub(r" for 1 of 1 observations?: in observation 0,", ":", warning).rstrip(".")
    return f"{text[:1].upper()}{text[1:]}."


def python_code(view: View) -> str:
    """Python code for the same samples, with the files of :func:`write_inputs` in the same folder."""
    damage = DAMAGES[view.damage]
    reads = "read_image, read_mask" if view.damage == HOLE else "read_image"
    if view.damage == HOLE:
        made = f'{damage.kind}(read_mask("mask.png", image.shape, hides="black"), image.shape)'
    else:
        own = "" if damage.setting is None else f", {damage.setting}={damage.value(view.parameter)!r}"
        drawn = ", generator=generator" if damage.command in ("random-inpainting", "motion-blur") else ""
        made = f"{damage.kind}(image.shape{own}{drawn})"
    settings = "".join(f", {key}={value!r}" for key, value in SOLVERS[view.prior][view.solver].items())
    return f'''import torch
import invflow
from invflow.datasets.files import {reads}
from invflow.operators import {damage.kind}
from invflow.registry import solver_by_name

generator = torch.Generator().manual_seed({view.seed})
image = read_image("image.png")
operator = {made}
y = operator.measure(image[None], {view.sigma!r}, generator=generator)
likelihood = invflow.GaussianLikelihood(operator, y, {view.sigma!r})
solver = solver_by_name("{view.solver}", "{view.prior}"{settings}).resized(image.shape)
posterior = solver.sample(likelihood, {view.samples}, generator=generator)
low, high = posterior.interval(0.9)
posterior.plot(image[None], y, observed=operator.observed()).savefig("posterior.png")
'''


def command_line(view: View) -> str:
    """The same as a command line."""
    damage, settings = DAMAGES[view.damage], SOLVERS[view.prior][view.solver]
    words = ["invflow", "solve", "--image", "image.png", "--operator", damage.command]
    if view.damage == HOLE:
        words += ["--mask", "mask.png", "--mask-hides", "black"]
    elif damage.setting == "factor":
        words += ["--factor", str(damage.value(view.parameter))]
    elif damage.setting is not None:
        words += ["--operator-set", f"{damage.setting}={damage.value(view.parameter)}"]
    words += ["--sigma", str(view.sigma), "--prior", view.prior, "--solver", view.solver]
    for key, value in settings.items():
        words += ["--set", f"{key}={value}"]
    words += ["--samples", str(view.samples), "--seed", str(view.seed), "--output", "out"]
    return shlex.join(words)


def write_inputs(view: View, folder: Path) -> list[Path]:
    """Write the files that the code reads: ``image.png`` and, for a painted hole, ``mask.png``."""
    files = [folder / "image.png"]
    write_image(view.image, files[0])
    if view.damage == HOLE and view.hole is not None:
        files.append(folder / "mask.png")
        write_image((~view.hole).float(), files[1])
    return files
