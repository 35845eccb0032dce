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
from invflow.models.neural import NeuralFlowMap, build_network, initialise, resized_copy
from invflow.models.trained_for import KNEE, TrainedFor, operator_traits
from invflow.nets.embedding import TimeEmbedding
from invflow.operator import SUMMARY_SIZE
from invflow.reward import Reward

if TYPE_CHECKING:
    from invflow.operator import Operator

__all__ = ["KNEE", "Adapter", "Proposal", "operator_traits"]


# the paper's bounds on the log-variance: wide enough for N(0, I) and for noise pinned to less than a percent
LOG_VARIANCE = (-10.0, 2.0)

# lower noise levels look alike to the network: rounding to 8 bits is a level of 0.001, and a logarithm needs an end
LEAST_LEVEL = 0.003

# bounds of the logarithm of a pixel's deviation, in image units, and where it starts
LOG_DEVIATION, FIRST_LOG_DEVIATION = (math.log(1e-3), 0.0), math.log(0.05)
class Proposal(NamedTuple):
    """What an adapter says of B observations.

    Attributes:
        mean: of the noise, ``(B, *state_shape)``.
        std: of the noise, the same shape.
        deviation: how far each pixel of a sample may have to move to meet the measurement, ``(B, *image_shape)`` in
            image units; None from an adapter that says nothing of it.
    """

    mean: Tensor
    std: Tensor
    deviation: Tensor | None = None


class Adapter(Countable, TrainedFor):
    r"""Proposes noise for an observation, q(z | y, c) = N(mean, diag std^2) (VFM, arXiv 2603.07276).

    The network sees the embedded observation, where the operator observes directly, the problem class, the noise
    level, and a summary of the operator's kernel, so that one adapter serves all masks, kernels and noise levels
    of the classes that it was trained for. It starts as q = N(0, I), the prior.

    Args:
        state_shape: of the map's states, ``(C, H, W)`` or ``(d,)``.
        image_shape: of the images, with the same axes; default ``state_shape``.
        classes: the problem classes, such as ``("box-inpainting", "denoising")``.
        network: ``"unet"`` or ``"mlp"``.
        options: of the network.
        trained_for: fingerprint of the map that it was trained with; None before training.
        generator: initialises the weights.
        deviations: whether the network also says how far each pixel of a sample may have to move to meet the
            measurement, which ``VFM(..., consistency=...)`` corrects by.
        levels: lowest and highest noise level that it was trained for, by problem class, where that is known. The
            network is told levels beyond as the nearest of these, with a warning.
        traits: lowest and highest of two numbers of the operators that it was trained for, by problem class: the share
            of pixels observed directly, and the share of low frequencies' power that a kernel passes
            (:func:`operator_traits`).
        consistency: factors of the deviations, by problem class: pairs (noise level, factor), levels rising, between
            which is interpolated. The samples of a class that is not named are not corrected unless asked for.

    Raises:
        ValueError: for deviations of pixels whose states have other places; for levels or factors of an unknown class,
            or that are none.

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

    #: whether the Gaussian is diagonal in other coordinates than the state's; :meth:`to_state` turns them
    turned = False
    #: the name by which a saved adapter's ``config.json`` knows its class
    form: ClassVar[str] = "plain"
    #: classes by their form; a subclass with a form of its own is entered as it is defined
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
            raise ValueError(f"states {self.state_shape} have other places than images {self.image_shape}: an adapter "
                             "of theirs says no deviations of pixels")
        self.network_name, self.options, self.trained_for = network, dict(options or {}), trained_for
        width = int(self.options.get("embedding", 128))
        with torch.random.fork_rng(devices=[]):
            self.noise_level = TimeEmbedding(width, num_scalars=1)
            # not drawn at random: on the meta device, where files are loaded, that would import torch's compiler
            self.problem = nn.Embedding.from_pretrained(torch.zeros(len(self.classes), width), freeze=False)
            self.summary = nn.Linear(SUMMARY_SIZE, width)
        extra = 1 if len(self.image_shape) == 3 else 0  # the map of what is observed directly
        out = 2 * self.state_shape[0] + (self.image_shape[0] if deviations else 0)
        self.network = build_network(network, self.state_shape, self.image_shape[0] + extra, out,
                                     {**self.options, "embedding": width})
        initialise(self, generator)
        nn.init.zeros_(self.problem.weight)

    def forward(self, embedded: Tensor, observed: Tensor, summary: Tensor, classes: Tensor,
                sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of the proposed noise.

        Args:
            embedded: observations as images, ``(n, *image_shape)``, in [0, 1].
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
        """As :meth:`forward`, and the logarithm of the pixels' deviations, ``(n, *image_shape)``, or None."""
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
        """Noise levels ``(n,)``, of 0 too, as the network is told them."""
        # levels of 0.01 to 1 lie in [-1, 1], where the slow sinusoids tell them apart
        return torch.log10(sigma.clamp(min=LEAST_LEVEL)) + 1

    def propose(self, reward: Reward) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the noise for each observation; see :meth:`proposal`."""
        mean, std, _ = self.proposal(reward)
        return mean, std

    def proposal(self, reward: Reward, quiet: bool = False) -> Proposal:
        """What the adapter says of each observation of a likelihood: of the noise, and of the pixels' deviations.

        Args:
            reward: a likelihood over B observations whose operator has one of :attr:`classes`; or a reward that
                the adapter was aligned with.
            quiet: leave the warnings out, which :meth:`warn_of` gives.

        Returns:
            Mean and standard deviation, each ``(B, *state_shape)``, and the deviations.

        Raises:
            ValueError: for a problem that the adapter was not trained for; names those that it knows.

        Warns:
            UserWarning: for noise beyond :attr:`levels`; for an operator that is taken for one of another class.
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
        """Warn, once for all observations, of an operator taken for another, and of noise beyond :attr:`levels`.

        Raises:
            ValueError: if the adapter was not trained for the reward.
        """
        name = self.classes[self.class_index(reward)]
        if not isinstance(reward, GaussianLikelihood):
            return
        inside = self.inside_levels(name, reward.sigma)
        if inside is not None and not bool(inside.all()):
            (low, high), first = self.levels[name], reward.sigma[~inside][:1]
            told = float(self.nearest_level(name, first))
            warnings.warn(f"sigma={float(first):.4g} is beyond the noise of {low:.4g} to {high:.4g} that the adapter "
                          f"was trained for: it is told {told:.4g}", stacklevel=3)

    def observe(self, operator: Operator, y: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the network is told of measurements ``(n, *measurement_shape)`` at noise levels ``(n,)``.

        Returns:
            The first three arguments of :meth:`forward`, and the noise levels.
        """
        observed, summary = operator.context()
        return (operator.embed(y), observed.expand(len(y), *observed.shape[1:]), summary.expand(len(y), -1), sigma)

    def slow_cosines(self, reward: Reward, n: int, generator: torch.Generator) -> Tensor | None:
        """What replaces the slow cosines of n samples of each observation; None: nothing, as here."""
        return None

    def to_state(self, z: Tensor) -> Tensor:
        """Noise of the map for noise in the adapter's coordinates, both ``(n, *state_shape)`` and N(0, I) a priori.

        Here they are the same. An adapter whose Gaussian is diagonal in other orthonormal coordinates turns them.
        """
        return z

    def unconditional(self, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs for a reward without an observation: a grey image, nothing observed, no kernel, unit noise."""
        shape = self.image_shape
        return (torch.full((n, *shape), 0.5), torch.zeros(n, 1, *shape[1:]), torch.zeros(n, SUMMARY_SIZE),
                torch.ones(n))

    def class_index(self, reward: Reward, quiet: bool = False) -> int:
        """Index of a reward's problem class; of an operator's stand-in, with a note unless ``quiet``.

        Raises:
            ValueError: if the adapter was not trained for it.
        """
        operator = getattr(reward, "operator", None)
        name = operator.problem_class if operator is not None else getattr(reward, "problem_class", None)
        instead = [other for other in getattr(operator, "stand_ins", ()) if other in self.classes]
        if name not in self.classes and instead:
            if not quiet:
                why = "names no class for it" if name is None else f"was trained before {name} was a class"
                warnings.warn(f"the adapter {why}: it takes this {type(operator).__name__} as one of {instead[0]}",
                              stacklevel=2)
            name = instead[0]
        what = type(operator).__name__ if operator is not None else type(reward).__name__
        if name is None and operator is None:
            raise ValueError(f"a {what} has no measurement that this adapter could look at: it was trained for "
                             f"{', '.join(self.classes)}. Use a solver that takes any reward, such as "
                             "invflow.FMTT(prior) or --solver fmtt, or align the map with this one by "
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
        """Refuse a map other than the one that the adapter was trained with.

        Raises:
            ValueError: if the fingerprints differ.
        """
        own = prior.fingerprint() if isinstance(prior, NeuralFlowMap) else None
        if self.trained_for is not None and own != self.trained_for:
            raise ValueError(
                f"the adapter was trained with the map {self.trained_for}, not with {own}: an adapter proposes noise "
                "for its own map only; use the pair that VFM.load gives, vfm.prior and vfm.adapter"
            )

    @property
    def resizable(self) -> bool:
        """Whether the adapter takes measurements of images of any size."""
        return False

    def resized(self, image_shape: tuple[int, ...]) -> Adapter:
        """The same adapter, with the same weights, for images ``(C, H, W)`` of another size.

        Raises:
            ValueError: for another number of channels, or an adapter that is tied to its size.
        """
        return resized_copy(self, image_shape, "adapter")

    def settings(self) -> dict[str, Any]:
        """Settings that are no weights, kept with each posterior; none here."""
        return {}

    def config(self) -> dict[str, Any]:
        """What :meth:`from_pretrained` needs, beside the weights."""
        return {
            "kind": "adapter", "state_shape": list(self.state_shape), "image_shape": list(self.image_shape),
            "classes": list(self.classes), "network": self.network_name, "options": self.options,
            "trained_for": self.trained_for, **self._known(),
        }

    def grown(self, classes: Sequence[str], like: Mapping[str, str], deviations: bool = True) -> Adapter:
        """A copy that knows further classes, and says deviations: what it knew, it answers as before.

        Args:
            classes: all that the copy is to know, in their order.
            like: for each new one the class that it begins as.
            deviations: whether the copy says how far pixels may have to move; they begin all alike.

        Raises:
            ValueError: for deviations of an adapter of another form, or a new class that is like none that is known.
        """
        if deviations and type(self) is not Adapter:
            raise ValueError(f"a {type(self).__name__} says no deviations: pass deviations=False")
        begins = [name if name in self.classes else like.get(name) for name in classes]
        unknown = [name for name, first in zip(classes, begins) if first not in self.classes]
        if unknown:
            raise ValueError(f"no class to begin {unknown} as: the adapter knows {', '.join(self.classes)}")
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
            wanted = tensors[key]  # the last layer has rows for the deviations after those that it had
            tensors[key] = torch.cat([value, torch.zeros_like(wanted[len(value) :])])
        other.load_state_dict(tensors)
        return other

    def save_pretrained(self, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors`` into a folder, atomically."""
        save_module(self, folder, self.config(), dtype)

    @classmethod
    def build(cls, config: Mapping[str, Any], shared: Mapping[str, Any]) -> Adapter:
        """Build an adapter of this form from a configuration; ``shared`` are the arguments that all forms take."""
        return cls(tuple(config["state_shape"]), network=config["network"],
                   deviations=config.get("deviations", False), consistency=config.get("consistency"), **shared)

    @staticmethod
    def shared(config: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that all forms take, of a configuration."""
        classes = config["classes"]
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise TypeError(f"classes are {classes!r}, no list of names")
        return {"image_shape": tuple(config["image_shape"]), "classes": classes, "options": config["options"],
                "trained_for": config["trained_for"], "levels": config.get("levels"), "traits": config.get("traits")}

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str]) -> Adapter:
        """Load an adapter from a folder.

        Raises:
            ValueError: if it is not there, is no adapter, or its files are damaged or do not fit each other.
        """
        folder = resolve_folder(name, "adapter")
        config = read_config(folder, "adapter")

        def build() -> Adapter:
            form = config.get("form", "plain")
            if form not in Adapter.FORMS:
                raise TypeError(f"the form of the adapter is {form!r}, none of {', '.join(sorted(Adapter.FORMS))}")
            kind = cls if form == cls.form else Adapter.FORMS[form]
            return kind.build(config, Adapter.shared(config))

        adapter = load_built(build, folder, config, "adapter")
        return adapter.eval().requires_grad_(False)


Adapter.FORMS[Adapter.form] = Adapter
