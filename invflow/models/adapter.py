"""The noise adapter of a Variational Flow Map: from an observation to the noise that explains it."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from invflow._core.counting import Countable
from invflow._core.folders import load_built, read_config, resolve_folder, save_module
from invflow._core.watch import without_gradients
from invflow.likelihood import GaussianLikelihood
from invflow.models.neural import NeuralFlowMap, build_network, initialise
from invflow.models.trained_for import KNEE, TrainedFor, operator_traits
from invflow.nets.embedding import TimeEmbedding
from invflow.operator import SUMMARY_SIZE
from invflow.reward import Reward

if TYPE_CHECKING:
    from invflow.operator import Operator

__all__ = ["KNEE", "Adapter", "Proposal", "operator_traits"]


# bounds on the log-variance as in the paper: wide enough for N(0, I) and for noise known to less than a percent
LOG_VARIANCE = (-10.0, 2.0)

# the network cannot tell lower noise levels apart: 8-bit rounding is a level of 0.001, and the logarithm needs a floor
LEAST_LEVEL = 0.003

# bounds of the log of a pixel's deviation, in image units, and its initial value
LOG_DEVIATION, FIRST_LOG_DEVIATION = (math.log(1e-3), 0.0), math.log(0.05)
class Proposal(NamedTuple):
    """The output of an adapter for B observations.

    Attributes:
        mean: Mean of the noise, ``(B, *state_shape)``.
        std: Standard deviation of the noise, ``(B, *state_shape)``.
        deviation: Distance that each pixel of a sample may have to move to fit the measurement, ``(B, *image_shape)``
            in image units; None from an adapter that does not predict it.
    """

    mean: Tensor
    std: Tensor
    deviation: Tensor | None = None


class Adapter(Countable, TrainedFor):
    r"""A network that proposes noise for an observation, q(z | y, c) = N(mean, diag std^2) (VFM, arXiv 2603.07276).

    The inputs of the network are the embedded observation, a mask of the directly observed pixels, the problem class,
    the noise level, and a summary of the operator's kernel. One adapter therefore serves all masks, kernels and noise
    levels of the classes that it was trained for. It is initialised to q = N(0, I), the prior.

    Args:
        state_shape: Shape of the map's states, ``(C, H, W)`` or ``(d,)``.
        image_shape: Shape of the images, with the same axes; default ``state_shape``.
        classes: Problem classes, such as ``("box-inpainting", "denoising")``.
        network: ``"unet"`` or ``"mlp"``.
        options: Options of the network.
        trained_for: Fingerprint of the map that it was trained with; None before training.
        generator: Random generator for the initial weights.
        deviations: Whether the network also predicts how far each pixel of a sample may have to move to fit the
            measurement. ``VFM(..., consistency=...)`` uses these deviations for its correction.
        levels: Lowest and highest noise level in training, by problem class, where known. A level outside this range
            is replaced by the nearest end of the range, with a warning.
        traits: Lowest and highest value of two numbers of the training operators, by problem class: the share
            of pixels observed directly, and the share of low-frequency power that a kernel passes
            (:func:`operator_traits`).
        consistency: Factors of the deviations, by problem class: pairs (noise level, factor) with increasing levels,
            interpolated in between. Samples of a class without an entry are corrected only on request.

    Raises:
        ValueError: If deviations are requested but states and images differ in their pixel grid; for levels or factors
            of an unknown class, or invalid ones.

    Example:
        >>> import torch
        >>> from invflow import Adapter, GaussianLikelihood
        >>> from invflow.operators import MatrixOperator
        >>> operator = MatrixOperator(torch.tensor([[1.0, 0.0]]), image_shape=(2,), problem_class="first")
        >>> options = {"width": 16, "depth": 2}
        >>> adapter = Adapter((2,), classes=["first"], network="mlp", options=options, generator=torch.Generator())
        >>> mean, std = adapter.propose(GaussianLikelihood(operator, torch.ones(3, 1), sigma=0.1))
        >>> mean.shape
        torch.Size([3, 2])
    """

    #: whether the Gaussian is diagonal in coordinates other than the state's; :meth:`to_state` converts them
    turned = False
    #: the name of the class in a saved adapter's ``config.json``
    form: ClassVar[str] = "plain"
    #: classes by their form; a subclass that defines a form registers itself
    FORMS: ClassVar[dict[str, type[Adapter]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "form" in cls.__dict__:
            Adapter.FORMS[cls.form] = cls

    def __init__(self, state_shape: tuple[int, ...], *, classes: Sequence[str],
                 image_shape: tuple[int, ...] | None = None, network: str = "unet",
                 options: dict[str, Any] | None = None, trained_for: str | None = None,
                 generator: torch.Generator | None = None, deviations: bool = False,
                 levels: Mapping[str, Sequence[float]] | None = None,
                 traits: Mapping[str, Sequence[Sequence[float]]] | None = None,
                 consistency: Mapping[str, Sequence[Sequence[float]]] | None = None) -> None:
        super().__init__()
        self.state_shape = tuple(state_shape)
        self.image_shape = tuple(image_shape or state_shape)
        self.classes = tuple(classes)
        self.deviations, self.levels, self.consistency = deviations, levels or {}, consistency or {}
        self.traits = traits or {}
        if deviations and self.image_shape[1:] != self.state_shape[1:]:
            raise ValueError(f"states {self.state_shape} and images {self.image_shape} have different pixel grids: "
                             "this adapter cannot predict deviations of pixels")
        self.network_name, self.options, self.trained_for = network, dict(options or {}), trained_for
        width = int(self.options.get("embedding", 128))
        with torch.random.fork_rng(devices=[]):
            self.noise_level = TimeEmbedding(width, num_scalars=1)
            # not random: random initialisation on the meta device, used for loading, would import torch's compiler
            self.problem = nn.Embedding.from_pretrained(torch.zeros(len(self.classes), width), freeze=False)
            self.summary = nn.Linear(SUMMARY_SIZE, width)
        extra = 1 if len(self.image_shape) == 3 else 0  # the mask of directly observed pixels
        out = 2 * self.state_shape[0] + (self.image_shape[0] if deviations else 0)
        self.network = build_network(network, self.state_shape, self.image_shape[0] + extra, out,
                                     {**self.options, "embedding": width})
        initialise(self, generator)
        nn.init.zeros_(self.problem.weight)

    def forward(self, embedded: Tensor, observed: Tensor, summary: Tensor, classes: Tensor,
                sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of the proposed noise.

        Args:
            embedded: Observations as images, ``(n, *image_shape)``, in [0, 1].
            observed: ``(n, 1, H, W)``, 1 where the operator observes directly; ignored for vectors.
            summary: ``(n, 32)``, the operator's summary of its kernel.
            classes: ``(n,)``, indices into :attr:`classes`.
            sigma: ``(n,)``, noise levels in the measurement's units.

        Returns:
            Mean and log standard deviation, each ``(n, *state_shape)``.
        """
        return self.outputs(embedded, observed, summary, classes, sigma)[:2]

    def outputs(self, embedded: Tensor, observed: Tensor, summary: Tensor, classes: Tensor,
                sigma: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Same as :meth:`forward`, plus the log deviations of the pixels, ``(n, *image_shape)``, or None."""
        embedding = self.noise_level(self.told(sigma)) + self.problem(classes) + self.summary(summary)
        x = embedded
        if embedded.ndim == 4:
            x = torch.cat([2 * embedded - 1, observed], dim=1)
        out = self.network(x, embedding).to(embedded.dtype)
        self.record_output(out, len(out))
        k = self.state_shape[0]
        mean, log_variance, rest = out[:, :k], out[:, k : 2 * k], out[:, 2 * k :]
        log_deviation = (rest + FIRST_LOG_DEVIATION).clamp(*LOG_DEVIATION) if self.deviations else None
        return mean, 0.5 * log_variance.clamp(*LOG_VARIANCE), log_deviation

    def told(self, sigma: Tensor) -> Tensor:
        """Noise levels ``(n,)``, including 0, transformed to the network's input."""
        # levels from 0.01 to 1 map to [-1, 1], where the slow sinusoids separate them
        return torch.log10(sigma.clamp(min=LEAST_LEVEL)) + 1

    def propose(self, reward: Reward) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the noise for each observation; see :meth:`proposal`."""
        mean, std, _ = self.proposal(reward)
        return mean, std

    def proposal(self, reward: Reward, quiet: bool = False) -> Proposal:
        """Propose a Gaussian of the noise, and deviations of the pixels, for each observation of a likelihood.

        Args:
            reward: A likelihood over B observations whose operator has one of :attr:`classes`, or a reward that
                the adapter was aligned with.
            quiet: Whether to skip the warnings of :meth:`warn_of`.

        Returns:
            Mean and standard deviation, each ``(B, *state_shape)``, and the deviations.

        Raises:
            ValueError: If the adapter was not trained for the problem; the message lists the classes it knows.

        Warns:
            UserWarning: For noise outside :attr:`levels`; for an operator that is treated as one of another class.
        """
        if not quiet:
            self.warn_of(reward)
        index = self.class_index(reward, quiet=True)
        device, dtype = self.summary.weight.device, self.summary.weight.dtype
        if not isinstance(reward, GaussianLikelihood):
            n = reward.num_observations or 1
            arguments = self.unconditional(n)
        else:
            n = len(reward.y)
            sigma = self.nearest_level(self.classes[index], reward.sigma.expand(n))
            arguments = self.observe(reward.operator, reward.y, sigma)
        embedded, observed, summary, sigma = (a.to(device, dtype) for a in arguments)
        classes = torch.full((n,), index, device=device, dtype=torch.long)
        with without_gradients():
            mean, log_std, log_deviation = self.outputs(embedded, observed, summary, classes, sigma)
        return Proposal(mean.clone(), log_std.exp(), None if log_deviation is None else log_deviation.exp())

    def warn_of(self, reward: Reward) -> None:
        """Warn once if an operator is treated as one of another class or noise lies outside :attr:`levels`.

        Raises:
            ValueError: If the adapter was not trained for the reward.
        """
        name = self.classes[self.class_index(reward)]
        if not isinstance(reward, GaussianLikelihood):
            return
        inside = self.inside_levels(name, reward.sigma)
        if inside is not None and not bool(inside.all()):
            (low, high), first = self.levels[name], reward.sigma[~inside][:1]
            told = float(self.nearest_level(name, first))
            warnings.warn(f"sigma={float(first):.4g} is outside the noise of {low:.4g} to {high:.4g} that the adapter "
                          f"was trained for: it uses {told:.4g} instead", stacklevel=3)

    def observe(self, operator: Operator, y: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Network inputs for measurements ``(n, *measurement_shape)`` at noise levels ``(n,)``.

        Returns:
            The first three arguments of :meth:`forward`, and the noise levels.
        """
        observed, summary = operator.context()
        return (operator.embed(y), observed.expand(len(y), *observed.shape[1:]), summary.expand(len(y), -1), sigma)

    def slow_cosines(self, reward: Reward, n: int, generator: torch.Generator) -> Tensor | None:
        """Replacement for the slow cosines of n samples of each observation; None: no replacement, as here."""
        return None

    def to_state(self, z: Tensor) -> Tensor:
        """Convert noise from the adapter's coordinates to the map's, both ``(n, *state_shape)`` and N(0, I) a priori.

        Here they are the same. Adapters with a Gaussian diagonal in other orthonormal coordinates override this.
        """
        return z

    def unconditional(self, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs for a reward without an observation: a grey image, nothing observed, no kernel, unit noise."""
        shape = self.image_shape
        return (torch.full((n, *shape), 0.5), torch.zeros(n, 1, *shape[1:]), torch.zeros(n, SUMMARY_SIZE),
                torch.ones(n))

    def class_index(self, reward: Reward, quiet: bool = False) -> int:
        """Index of a reward's problem class, or of a substitute class, with a warning unless ``quiet``.

        Raises:
            ValueError: If the adapter was not trained for it.
        """
        operator = reward.operator
        name = reward.problem_class if operator is None else operator.problem_class
        instead = [other for other in (operator.stand_ins if operator is not None else ()) if other in self.classes]
        if name not in self.classes and instead:
            if not quiet:
                why = "has no class for it" if name is None else f"was trained before {name} was a class"
                warnings.warn(f"the adapter {why}: it treats this {type(operator).__name__} as {instead[0]}",
                              stacklevel=2)
            name = instead[0]
        what = type(operator).__name__ if operator is not None else type(reward).__name__
        if name is None and operator is None:
            raise ValueError(f"a {what} has no measurement for this adapter to use: the adapter was trained for "
                             f"{', '.join(self.classes)}. Use a solver that takes any reward, such as "
                             "invflow.FMTT(prior) or --solver fmtt, or align the map with this reward using "
                             "invflow.training.train_alignment")
        if name not in self.classes or (operator is not None and not isinstance(reward, GaussianLikelihood)):
            raise ValueError(
                f"the adapter was not trained for {what} (problem class {name!r}, {type(reward).__name__}); it knows "
                f"Gaussian likelihoods of {', '.join(self.classes)}. Train one with invflow.training.train_vfm, or "
                "use a solver that needs no training: FMTT, NoiseSMC, NoiseRTO, or ExactPosterior for a mixture"
            )
        if operator is not None and tuple(operator.image_shape) != self.image_shape and not self.resizable:
            raise ValueError(
                f"the operator takes images {tuple(operator.image_shape)}, but the adapter was trained on "
                f"{self.image_shape}: build the operator with image_shape={self.image_shape}"
            )
        return self.classes.index(name)

    def check_map(self, prior: Any) -> None:
        """Raise an error unless the map is the one that the adapter was trained with.

        Raises:
            ValueError: If the fingerprints differ.
        """
        own = prior.fingerprint() if isinstance(prior, NeuralFlowMap) else None
        if self.trained_for is not None and own != self.trained_for:
            raise ValueError(
                f"the adapter was trained with the map {self.trained_for}, not with {own}: an adapter proposes noise "
                "for its own map only; use the pair from VFM.load, vfm.prior and vfm.adapter"
            )

    def settings(self) -> dict[str, Any]:
        """Settings that are not weights, stored with each posterior; none here."""
        return {}

    def config(self) -> dict[str, Any]:
        """Everything that :meth:`from_pretrained` needs in addition to the weights."""
        return {
            "kind": "adapter", "state_shape": list(self.state_shape), "image_shape": list(self.image_shape),
            "classes": list(self.classes), "network": self.network_name, "options": self.options,
            "trained_for": self.trained_for, **self._known(),
        }

    def grown(self, classes: Sequence[str], like: Mapping[str, str], deviations: bool = True) -> Adapter:
        """Copy that knows further classes and predicts deviations; its output for the old classes is unchanged.

        Args:
            classes: All classes of the copy, in order.
            like: For each new class, the old class that it is initialised from.
            deviations: Whether the copy predicts how far pixels may have to move; all start equal.

        Raises:
            ValueError: For deviations of an adapter of another form, or a new class without a known one to start from.
        """
        if deviations and type(self) is not Adapter:
            raise ValueError(f"a {type(self).__name__} predicts no deviations: pass deviations=False")
        begins = [name if name in self.classes else like.get(name) for name in classes]
        unknown = [name for name, first in zip(classes, begins) if first not in self.classes]
        if unknown:
            raise ValueError(f"no class to initialise {unknown} from: the adapter knows {', '.join(self.classes)}")
        if tuple(classes) == self.classes and (self.deviations or not deviations):
            return self
        config = {**self.config(), "classes": list(classes), "deviations": self.deviations or deviations}
        for key in ("levels", "traits", "consistency"):
            known = config.get(key, {})
            config[key] = {name: known[str(first)] for name, first in zip(classes, begins) if first in known}
        other = type(self).build(config, Adapter.shared(config))
        tensors, own = other.state_dict(), self.state_dict()
        for key, value in own.items():
            if key == "problem.weight":
                value = value[[self.classes.index(str(name)) for name in begins]]
            wanted = tensors[key]  # the rows for the deviations are the last of the last layer
            tensors[key] = torch.cat([value, torch.zeros_like(wanted[len(value) :])])
        other.load_state_dict(tensors)
        return other

    def save_pretrained(self, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors`` into a folder, atomically."""
        save_module(self, folder, self.config(), dtype)

    @classmethod
    def build(cls, config: Mapping[str, Any], shared: Mapping[str, Any]) -> Adapter:
        """Build an adapter of this form from a configuration; ``shared`` holds the arguments common to all forms."""
        return cls(tuple(config["state_shape"]), network=config["network"],
                   deviations=config.get("deviations", False), consistency=config.get("consistency"), **shared)

    @staticmethod
    def shared(config: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments common to all forms, from a configuration."""
        classes = config["classes"]
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise TypeError(f"classes is {classes!r}, expected a list of names")
        return {"image_shape": tuple(config["image_shape"]), "classes": classes, "options": config["options"],
                "trained_for": config["trained_for"], "levels": config.get("levels"), "traits": config.get("traits")}

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str]) -> Adapter:
        """Load an adapter from a folder.

        Raises:
            ValueError: If the folder is missing or holds no adapter, or its files are damaged or inconsistent.
        """
        folder = resolve_folder(name, "adapter")
        config = read_config(folder, "adapter")

        def build() -> Adapter:
            form = config.get("form", "plain")
            if form not in Adapter.FORMS:
                raise TypeError(f"the form of the adapter is {form!r}, not one of {', '.join(sorted(Adapter.FORMS))}")
            kind = cls if form == cls.form else Adapter.FORMS[form]
            return kind.build(config, Adapter.shared(config))

        adapter = load_built(build, folder, config, "adapter")
        return adapter.eval().requires_grad_(False)


Adapter.FORMS[Adapter.form] = Adapter
