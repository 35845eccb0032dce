"""The noise adapter of a Variational Flow Map: from an observation to the noise that explains it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from invflow._core.counting import Countable
from invflow._core.folders import load_built, read_config, resolve_folder, save_module
from invflow.likelihood import GaussianLikelihood
from invflow.models.neural import NeuralFlowMap, build_network, initialise, resized_copy
from invflow.nets.embedding import TimeEmbedding
from invflow.operator import SUMMARY_SIZE
from invflow.reward import Reward

if TYPE_CHECKING:
    from invflow.operator import Operator

__all__ = ["Adapter"]


# the paper's bounds on the log-variance: wide enough for N(0, I) and for noise pinned to less than a percent
LOG_VARIANCE = (-10.0, 2.0)


class Adapter(Countable):
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
                 generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.state_shape = tuple(state_shape)
        self.image_shape = tuple(image_shape or state_shape)
        self.classes = tuple(classes)
        self.network_name, self.options, self.trained_for = network, dict(options or {}), trained_for
        width = int(self.options.get("embedding", 128))
        with torch.random.fork_rng(devices=[]):
            self.noise_level = TimeEmbedding(width, num_scalars=1)
            # not drawn at random: on the meta device, where files are loaded, that would import torch's compiler
            self.problem = nn.Embedding.from_pretrained(torch.zeros(len(self.classes), width), freeze=False)
            self.summary = nn.Linear(SUMMARY_SIZE, width)
        extra = 1 if len(self.image_shape) == 3 else 0  # the map of what is observed directly
        self.network = build_network(network, self.state_shape, self.image_shape[0] + extra, 2 * self.state_shape[0],
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
        level = torch.log10(sigma) + 1  # levels of 0.01 to 1 lie in [-1, 1], where the slow sinusoids tell them apart
        embedding = self.noise_level(level) + self.problem(classes) + self.summary(summary)
        x = embedded
        if embedded.ndim == 4:
            x = torch.cat([2 * embedded - 1, observed], dim=1)
        out = self.network(x, embedding).to(embedded.dtype)
        mean, log_variance = out.chunk(2, dim=1)
        self.record_output(out, len(out))
        return mean, 0.5 * log_variance.clamp(*LOG_VARIANCE)

    def propose(self, reward: Reward) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the noise for each observation of a likelihood.

        Args:
            reward: a likelihood over B observations whose operator has one of :attr:`classes`; or a reward that
                the adapter was aligned with.

        Returns:
            Mean and standard deviation, each ``(B, *state_shape)``.

        Raises:
            ValueError: for a problem that the adapter was not trained for; names those that it knows.
        """
        index = self.class_index(reward)
        device, dtype = self.summary.weight.device, self.summary.weight.dtype
        if not isinstance(reward, GaussianLikelihood):
            n = reward.num_observations or 1
            arguments = self.unconditional(n)
        else:
            n = len(reward.y)
            arguments = self.observe(reward.operator, reward.y, reward.sigma.expand(n))
        embedded, observed, summary, sigma = (a.to(device, dtype) for a in arguments)
        classes = torch.full((n,), index, device=device, dtype=torch.long)
        mean, log_std = self(embedded, observed, summary, classes, sigma)
        return mean, log_std.exp()

    def observe(self, operator: Operator, y: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the network is told of measurements ``(n, *measurement_shape)`` at noise levels ``(n,)``.

        Returns:
            The first three arguments of :meth:`forward`, and the noise levels.
        """
        observed, summary = operator.context()
        return (operator.embed(y), observed.expand(len(y), *observed.shape[1:]), summary.expand(len(y), -1), sigma)

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

    def class_index(self, reward: Reward) -> int:
        """Index of a reward's problem class.

        Raises:
            ValueError: if the adapter was not trained for it.
        """
        operator = getattr(reward, "operator", None)
        name = operator.problem_class if operator is not None else getattr(reward, "problem_class", None)
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
            "trained_for": self.trained_for,
        }

    def save_pretrained(self, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors`` into a folder, atomically."""
        save_module(self, folder, self.config(), dtype)

    @classmethod
    def build(cls, config: Mapping[str, Any], shared: Mapping[str, Any]) -> Adapter:
        """Build an adapter of this form from a configuration; ``shared`` are the arguments that all forms take."""
        return cls(tuple(config["state_shape"]), network=config["network"], **shared)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str]) -> Adapter:
        """Load an adapter from a folder.

        Raises:
            ValueError: if it is not there, is no adapter, or its files are damaged or do not fit each other.
        """
        folder = resolve_folder(name, "adapter")
        config = read_config(folder, "adapter")

        def build() -> Adapter:
            classes = config["classes"]
            if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
                raise TypeError(f"classes are {classes!r}, no list of names")
            form = config.get("form", "plain")
            if form not in Adapter.FORMS:
                raise TypeError(f"the form of the adapter is {form!r}, none of {', '.join(sorted(Adapter.FORMS))}")
            shared: dict[str, Any] = {"image_shape": tuple(config["image_shape"]), "classes": classes,
                                      "options": config["options"], "trained_for": config["trained_for"]}
            kind = cls if form == cls.form else Adapter.FORMS[form]
            return kind.build(config, shared)

        adapter = load_built(build, folder, config, "adapter")
        return adapter.eval().requires_grad_(False)


Adapter.FORMS[Adapter.form] = Adapter
