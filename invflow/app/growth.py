"""A growing certificate, updated after every few simulations."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from invflow.evaluation.certificate.certificate import Certificate

__all__ = ["CERTIFIED", "grow", "rank_picture", "sentence"]

_SAMPLES, _CHUNK, _BINS = 49, 5, 10
#: available tests, as (problem, solver)
CERTIFIED = {
    "the exact posterior of five Gaussians": ("gaussian/linear", "exact"),
    "the linear estimate's Gaussian, on noisy digits": ("mnist/denoising", "lmmse"),
    "VFM in one call, on noisy digits": ("mnist/denoising", "vfm"),
    "VFM in one call, on digits with a box missing": ("mnist/box-inpainting", "vfm"),
}


class _LeftError(Exception):
    """Raised when the page is no longer open."""


def grow(what: str, simulations: int, seed: int = 0) -> Iterator[Certificate]:
    """Calibrate, and yield the certificate so far after every five simulations.

    Args:
        what: Key of :data:`CERTIFIED`.
        simulations: Final number of simulations, from 10 to 500.
        seed: Random seed.

    Raises:
        ValueError: For an unknown key or a number out of range.
    """
    if what not in CERTIFIED or not 10 <= simulations <= 500:
        raise ValueError(f"choose one of {', '.join(CERTIFIED)}, and 10 to 500 simulations, not {what!r} and "
                         f"{simulations}")
    problem, solver = CERTIFIED[what]
    waiting: queue.Queue[Any] = queue.Queue(maxsize=2)
    left = threading.Event()

    def tell(news: object) -> None:
        while not left.is_set():
            try:
                return waiting.put(news, timeout=0.2)
            except queue.Full:
                continue
        raise _LeftError

    def work() -> None:
        from invflow.evaluation.calibrate import calibrate

        try:
            calibrate(solver, problem, num_simulations=simulations, num_samples=_SAMPLES, chunk_size=_CHUNK,
                      generator=torch.Generator().manual_seed(seed), watch=tell)
            tell(None)
        except _LeftError:
            pass
        except Exception as error:  # from another thread: raised again in the waiting one
            tell(error)

    threading.Thread(target=work, name="certificate", daemon=True).start()
    try:
        while (news := waiting.get()) is not None:
            if isinstance(news, Exception):
                raise news
            yield news
    finally:
        left.set()


def sentence(certificate: Certificate, simulations: int) -> str:
    """The verdict, once all simulations are done; before that, the progress and a warning against early conclusions."""
    done = certificate.num_simulations
    if done >= simulations:
        return certificate.sentence
    return (f"{done} of {simulations} simulations. No verdict yet: a test that is checked repeatedly during the "
            "simulations rejects more often than its level.")


def rank_picture(certificate: Certificate) -> Any:
    """Rank histograms of two pixels, the residual and TARP; if calibrated, nine in ten bars end in the grey band."""
    import io

    import matplotlib
    from PIL import Image
    from scipy.stats import binom

    from invflow.views.figure import STYLE, PosteriorFigure

    count, record = certificate.num_simulations, certificate.record
    names = [check.name for check in certificate.judgement.checks][: record["ranks"].shape[1]]
    chosen = [*range(min(2, len(names))), next((k for k, name in enumerate(names) if "residual" in name), 0)]
    panels = [(names[k], record["ranks"][:, k]) for k in chosen] + [("TARP", record["tarp_ranks"])]
    low, high = binom.ppf([0.05, 0.95], count, 1 / _BINS)
    with matplotlib.rc_context(STYLE):
        figure = PosteriorFigure(figsize=(6.4, 3.6), dpi=100, facecolor="white", layout="constrained")
        for i, (name, ranks) in enumerate(panels):
            heights = torch.bincount((ranks.long() * _BINS // (_SAMPLES + 1)).clamp(0, _BINS - 1), minlength=_BINS)
            axes = figure.add_subplot(2, 2, i + 1, yticks=[], xticks=[0, _BINS])
            axes.axhspan(low, high, color="#dddddd", linewidth=0)
            axes.bar(torch.arange(_BINS).numpy() + 0.5, heights.numpy(), width=0.9, color="#3b4cc0")
            axes.set_title(name, fontsize=9)
            axes.set_xticklabels(["below all samples", "above"], fontsize=7)
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
    return Image.open(stream).convert("RGB")
