"""Variational Flow Maps: posterior samples in one network call each."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invflow._memory import ChunkSize
from invflow._random import as_generator, draw_noise
from invflow.adapter import Adapter
from invflow.neural import NeuralFlowMap
from invflow.posterior import NFE, Posterior
from invflow.pretrained import read_config, resolve_folder, write_atomically
from invflow.reward import Reward
from invflow.smc import log_mean_weight, pareto_k_hat, precise
from invflow.solvers._finite import check_finite
from invflow.solvers.base import Solver
from invflow.solvers.noise_target import log_prior_over_proposal, score_rows

__all__ = ["VFM"]


class VFM(Solver):
    r"""Variational Flow Map: an adapter proposes noise, the flow map turns it into a posterior sample.

    x = decode(X_{0,1}(z)) with z ~ q(z | y, c) (arXiv 2603.07276). One call of the adapter for each observation and
    ``steps`` calls of the map for each sample. The samples are as good as the training made them, and come without
    weights unless ``importance`` asks for them.

    Args:
        prior: the map that was trained together with the adapter.
        adapter: the noise adapter.
        steps: jumps from noise to data; more follow the same flow map over equal sub-intervals.
        chunk_size: rows through the map at a time. Samples do not depend on it beyond rounding.
        importance: attach the log weights r(f(z)) + log N(z; 0, I) - log q(z) of the same samples, with the log
            evidence and, in the diagnostics, their tail index ``k_hat``: it says whether these samples can be
            trusted for this observation (:func:`invflow.smc.reliable_k_hat`). With several steps f is the map in
            as many steps, a function of z too: the weights then lead to the posterior of that prior, the law of
            :meth:`prior_samples`. Costs one reward for each sample, no network call.

    Raises:
        ValueError: if the adapter belongs to another map, or if a setting is under 1.

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import SuperResolution
        >>> vfm = invflow.VFM.load("mnist")
        >>> g = torch.Generator().manual_seed(0)
        >>> operator = SuperResolution((1, 28, 28), factor=4)
        >>> y = operator.measure(vfm.prior_samples(2, generator=g), sigma=0.025, generator=g)
        >>> vfm.sample(invflow.GaussianLikelihood(operator, y, sigma=0.025), 16, generator=g).samples.shape
        torch.Size([2, 16, 1, 28, 28])
    """

    needs_training = True

    def __init__(self, prior: NeuralFlowMap, adapter: Adapter, *, steps: int = 1, chunk_size: int = 256,
                 importance: bool = False) -> None:
        if steps < 1 or chunk_size < 1:
            raise ValueError(f"steps={steps} and chunk_size={chunk_size} must be at least 1")
        adapter.check_map(prior)
        self.prior, self.adapter = prior, adapter
        self._map = prior.fingerprint()  # a third of the time of a single sample, if taken at each call
        self.steps, self.chunk_size, self.importance = steps, chunk_size, importance

    @torch.no_grad()
    def sample(self, reward: Reward, num_samples: int, *, generator: torch.Generator | None = None,
               progress: bool = False) -> Posterior:
        """Draw posterior samples; see :meth:`Solver.sample`.

        Raises:
            ValueError: for a likelihood or reward that the adapter was not trained for; names the problem classes
                that it knows and the solvers that need no training.
        """
        from tqdm import tqdm

        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}: ask for at least one sample")
        start = time.perf_counter()
        with self.prior.count() as map_calls, self.adapter.count() as adapter_calls:
            mean, std = self.adapter.propose(reward)
            rows = len(mean) * num_samples
            noise = draw_noise((rows, *self.prior.state_shape), as_generator(generator)).to(mean)
            images = noise.new_empty((rows, *self.prior.image_shape))
            owner = torch.arange(len(mean), device=mean.device).repeat_interleave(num_samples)
            log_weights = precise(noise.new_empty(rows)) if self.importance else None

            def run(part: slice) -> None:
                z = torch.addcmul(mean[owner[part]], std[owner[part]], noise[part])
                images[part] = self.prior.decode(self.prior.flow(z, self.steps))
                if log_weights is not None:
                    ratio = log_prior_over_proposal(z, mean[owner[part]], std[owner[part]])
                    log_weights[part] = ratio + score_rows(reward, images[part], owner[part])

            chunks = ChunkSize(self.chunk_size, "VFM").over(rows, run)
            for _ in tqdm(chunks, total=-(-rows // self.chunk_size), disable=not progress, desc="VFM", unit="chunk",
                          delay=2):
                pass
            check_finite("VFM", f"after {self.steps} of {self.steps} steps", num_samples, images, log_weights)
        nfe = NFE(forward=(map_calls.forward + adapter_calls.forward) / rows,
                  backward=(map_calls.backward + adapter_calls.backward) / rows)
        diagnostics, log_evidence = {"noise_std": std.flatten(1).mean(dim=1)}, None
        if log_weights is not None:
            log_weights = log_weights.unflatten(0, (len(mean), num_samples))
            log_evidence = log_mean_weight(torch.zeros_like(log_weights), log_weights)
            diagnostics["k_hat"] = pareto_k_hat(log_weights)
        return Posterior(images.unflatten(0, (len(mean), num_samples)), log_weights, log_evidence, nfe=nfe,
                         seconds=time.perf_counter() - start, diagnostics=diagnostics, settings=self.settings())

    def prior_samples(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw from the map's own law, ``(n, *image_shape)``, in the same number of steps as :meth:`sample`."""
        return self.prior.generate(n, self.steps, generator=generator, chunk_size=self.chunk_size)

    def settings(self) -> dict[str, Any]:
        """Settings as plain values, kept with each posterior."""
        return {"solver": "VFM", "steps": self.steps, "chunk_size": self.chunk_size, "importance": self.importance,
                "map": self._map}

    def save_pretrained(self, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write map and adapter into ``folder/map`` and ``folder/adapter``, and a ``config.json`` beside them."""
        self.prior.save_pretrained(Path(folder) / "map", dtype)
        self.adapter.save_pretrained(Path(folder) / "adapter", dtype)
        text = json.dumps({"kind": "vfm", "steps": self.steps}, indent=2) + "\n"
        write_atomically(Path(folder) / "config.json", lambda p: Path(p).write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, name: str | os.PathLike[str], *, steps: int | None = None, chunk_size: int = 256,
             importance: bool = False) -> VFM:
        """Load a trained VFM.

        Args:
            name: of a shipped one, such as ``"mnist"``; a folder that :meth:`save_pretrained` wrote; or a Hub
                repository id ``owner/name``.
            steps: jumps from noise to data; None takes what the folder says.
            chunk_size: rows through the map at a time.
            importance: attach importance weights to the samples.

        Raises:
            ValueError: if it is not there, is no VFM, or its files are damaged or do not fit each other.
        """
        shipped = Path(__file__).parents[1] / "weights" / f"{name}-vfm"
        folder = shipped if shipped.is_dir() else resolve_folder(name, "vfm")
        own = read_config(folder, "vfm").get("steps", 1)
        if type(own) is not int or not 1 <= own <= 1000:
            raise ValueError(f"the config.json of {folder} asks for steps={own!r}: a whole number from 1 to 1000")
        return cls(NeuralFlowMap.from_pretrained(folder / "map"), Adapter.from_pretrained(folder / "adapter"),
                   steps=own if steps is None else steps, chunk_size=chunk_size, importance=importance)
