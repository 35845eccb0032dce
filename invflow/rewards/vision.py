"""Rewards from vision models of the transformers library: an image-text score, the answer to a yes-or-no question.

Images go from [0, 1] to what the model takes by operations of torch alone (resize, crop, normalise), so that gradients
reach them. transformers is imported when a model is loaded by name; it comes with ``pip install 'invflow[diffusers]'``.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from invflow.reward import Reward
from invflow.rewards.images import _ImageReward

__all__ = ["ImageTextReward", "YesNoReward", "preprocess"]

# of CLIP's training images (Radford et al. 2021), for processors that name no other
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def preprocess(x: Tensor, size: tuple[int, int], mean: Sequence[float] = MEAN, std: Sequence[float] = STD, *,
               shortest_edge: int | None = None, mode: str = "bicubic") -> Tensor:
    """What a vision model takes, of images in [0, 1]; differentiable.

    As the image processors of transformers do it, but in one type throughout and without rounding to bytes: the
    shorter side is resized (bicubic, antialiased), the middle cut out, the channels normalised. Grey is repeated to
    three channels. Values outside [0, 1] are kept, so that their gradient is too.

    Args:
        x: ``(n, 1 or 3, H, W)``.
        size: height and width wanted.
        mean: of each channel.
        std: of each channel.
        shortest_edge: length that the shorter side is resized to before the cut; None stretches the image to ``size``.
        mode: ``"bicubic"`` or ``"bilinear"``.

    Returns:
        ``(n, 3, *size)``.

    Raises:
        ValueError: for other numbers of channels, or a shorter side that is smaller than the cut.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"images have shape {tuple(x.shape)}, expected (n, 1, H, W) or (n, 3, H, W)")
    x = x.expand(-1, 3, -1, -1)
    resized = size
    if shortest_edge is not None:
        if shortest_edge < max(size):
            raise ValueError(f"a shorter side of {shortest_edge} does not hold a cut of {size}: pass at least "
                             f"{max(size)}, or shortest_edge=None to stretch the image")
        short = min(x.shape[2:])
        resized = (shortest_edge * x.shape[2] // short, shortest_edge * x.shape[3] // short)
    if resized != tuple(x.shape[2:]):
        x = interpolate(x, size=resized, mode=mode, antialias=True, align_corners=False)
    top, left = (resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2
    x = x[:, :, top : top + size[0], left : left + size[1]]
    return (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]


class _VisionReward(_ImageReward):
    """Holds a frozen model and its preprocessing."""

    def __init__(self, model: nn.Module, image_processor: Any, size: tuple[int, int]) -> None:
        self.model = model.eval().requires_grad_(False)
        self.size = size
        self.mean = tuple(getattr(image_processor, "image_mean", None) or MEAN)
        self.std = tuple(getattr(image_processor, "image_std", None) or STD)
        wanted: Any = getattr(image_processor, "size", None)
        # a dictionary, or an object that reads like one
        edge = wanted.get("shortest_edge") if hasattr(wanted, "get") else getattr(wanted, "shortest_edge", None)
        self.shortest_edge = None if wanted is not None and edge is None else max(edge or 0, *size)
        # 2 is bilinear in PIL's numbering; all else is bicubic, or close to it
        self.mode = "bilinear" if getattr(image_processor, "resample", 3) == 2 else "bicubic"

    def pixel_values(self, x: Tensor) -> Tensor:
        """Images ``(n, C, H, W)`` in [0, 1] as the model takes them, in its type."""
        values = preprocess(x, self.size, self.mean, self.std, shortest_edge=self.shortest_edge, mode=self.mode)
        return values.to(next(self.model.parameters()).dtype)

    def to(self, *args: Any, **kwargs: Any) -> Reward:
        """The reward on another device or in another floating-point type; a copy."""
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model).to(*args, **kwargs)
        other._move(next(other.model.parameters()).device)
        return other

    def _move(self, device: torch.device) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
            elif isinstance(value, dict):
                setattr(self, name, {k: v.to(device) if isinstance(v, Tensor) else v for k, v in value.items()})


class ImageTextReward(_VisionReward):
    r"""How well an image fits a text, by a model with one embedding for both (CLIP; Radford et al. 2021).

    r(x) = scale cos(image(x), text). With texts ``against`` which it is weighed, the log probability of the text among
    all of them, r(x) = log softmax(logit_scale cos)[0], times scale; that is bounded by 0 and needs no choice of scale.

    Args:
        model: a CLIPModel, or one with its ``get_image_features``, ``get_text_features`` and ``config.vision_config``,
            which is put into evaluation mode; or a folder or Hub repository of one (safetensors only).
        text: what images should show.
        processor: turns texts into tokens, and says how images are prepared; None loads the model's own by name.
        against: texts that it competes with; none takes the cosine.
        scale: factor of the reward. A cosine moves by a few hundredths between images: 100 is what CLIP was trained
            with.

    Raises:
        ImportError: if a model is to be loaded and transformers is not installed.
        TypeError: for a model without those methods, or without a processor.

    Example:
        >>> from invflow.rewards.vision import ImageTextReward
        >>> cat = ImageTextReward(                                   # doctest: +SKIP
        ...     "openai/clip-vit-base-patch32", "a photo of a cat", against=["a photo of a dog"])
    """

    def __init__(self, model: nn.Module | str | os.PathLike[str], text: str, *, processor: Any = None,
                 against: Sequence[str] = (), scale: float = 1.0) -> None:
        network, processor = _load(model, processor, "AutoModel")
        for method in ("get_image_features", "get_text_features"):
            if not hasattr(network, method):
                raise TypeError(f"{type(network).__name__} has no {method}: pass a CLIPModel or one like it")
        vision: Any = getattr(network.config, "vision_config", network.config)
        super().__init__(network, getattr(processor, "image_processor", processor), _pair(vision.image_size))
        self.text, self.against, self.scale = text, tuple(against), float(scale)
        tokens = getattr(processor, "tokenizer", processor)([text, *against], padding=True, return_tensors="pt")
        known = inspect.signature(network.get_text_features).parameters  # type: ignore[arg-type]
        self.tokens = {k: v for k, v in dict(tokens).items() if k in known}
        self._move(next(network.parameters()).device)
        self.text_features = self._text()

    def score(self, x: Tensor) -> Tensor:
        """Scaled cosine, or scaled log probability among the texts: ``(n, C, H, W)`` to ``(n,)``."""
        features = _features(self.model.get_image_features(pixel_values=self.pixel_values(x)))  # type: ignore[operator]
        cosines = normalize(features, dim=-1) @ self.text_features.T
        if not self.against:
            return self.scale * cosines[:, 0]
        logit_scale: Any = getattr(self.model, "logit_scale", None)
        temperature = 100.0 if logit_scale is None else logit_scale.exp()
        return self.scale * (temperature * cosines).log_softmax(1)[:, 0]

    def to(self, *args: Any, **kwargs: Any) -> Reward:
        """The reward on another device or in another floating-point type; a copy."""
        other: Any = super().to(*args, **kwargs)
        other.text_features = other._text()
        result: Reward = other
        return result

    @torch.no_grad()
    def _text(self) -> Tensor:
        """Unit embeddings of the texts, ``(k, d)``."""
        return normalize(_features(self.model.get_text_features(**self.tokens)), dim=-1)  # type: ignore[operator]

    def __repr__(self) -> str:
        return f"ImageTextReward({self.text!r}, against={list(self.against)}, scale={self.scale})"


class YesNoReward(_VisionReward):
    r"""Log odds that a vision-language model answers a question about the image with yes.

    r(x) = scale (log p("Yes" | x, question) - log p("No" | x, question)), both of the first token of the answer.

    Args:
        model: a model that takes ``input_ids`` and ``pixel_values`` (n, 3, H, W) and gives logits over tokens, such as
            LlavaForConditionalGeneration, which is put into evaluation mode; or a folder or Hub repository of one.
        question: about the image.
        processor: makes the tokens of a text with an image in it; None loads the model's own by name.
        prompt: what the model reads, with ``{question}`` in it and the processor's token for the image; None takes the
            processor's chat template, or, without one, the image token, the question and "Answer:".
        yes: the answer that counts for the image; its first token is taken.
        no: the answer that counts against it.
        scale: factor of the reward.

    Raises:
        ImportError: if a model is to be loaded and transformers is not installed.
        TypeError: without a processor.
        ValueError: if both answers start with the same token, or the model's images are not plain (Qwen-VL and others
            cut them into patches before the model sees them).

    Example:
        >>> from invflow.rewards.vision import YesNoReward
        >>> cat = YesNoReward("llava-hf/llava-1.5-7b-hf", "Is there a cat in the picture?")  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module | str | os.PathLike[str], question: str, *, processor: Any = None,
                 prompt: str | None = None, yes: str = "Yes", no: str = "No", scale: float = 1.0) -> None:
        network, processor = _load(model, processor, "AutoModelForImageTextToText")
        blank = torch.zeros(3, 64, 64, dtype=torch.uint8)
        inputs = dict(processor(images=[blank.permute(1, 2, 0).numpy()], text=[_prompt(processor, question, prompt)],
                                return_tensors="pt"))
        values = inputs.pop("pixel_values")
        if values.ndim != 4 or values.shape[:2] != (1, 3):
            raise ValueError(f"{type(processor).__name__} makes pixel_values {tuple(values.shape)}, but plain images "
                             "(1, 3, H, W) are needed, so that gradients reach them: take a model such as Llava")
        super().__init__(network, processor.image_processor, (int(values.shape[2]), int(values.shape[3])))
        self.question, self.scale = question, float(scale)
        self.inputs = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
        self.yes, self.no = (_first_token(processor.tokenizer, answer) for answer in (yes, no))
        if self.yes == self.no:
            raise ValueError(f"{yes!r} and {no!r} start with the same token: pass answers that differ at once")
        self._move(next(network.parameters()).device)

    def score(self, x: Tensor) -> Tensor:
        """Scaled log odds: ``(n, C, H, W)`` to ``(n,)``."""
        inputs = {k: v.expand(len(x), *v.shape[1:]) for k, v in self.inputs.items()}
        logits = self.model(**inputs, pixel_values=self.pixel_values(x)).logits[:, -1]
        result: Tensor = self.scale * (logits[:, self.yes] - logits[:, self.no])
        return result

    def __repr__(self) -> str:
        return f"YesNoReward({self.question!r}, scale={self.scale})"


def _load(model: nn.Module | str | os.PathLike[str], processor: Any, kind: str) -> tuple[Any, Any]:
    if isinstance(model, (str, os.PathLike)):
        try:
            import transformers
        except ImportError as error:
            raise ImportError("loading a vision model needs transformers: pip install 'invflow[diffusers]'") from error
        name, auto = model, getattr(transformers, kind)
        model = auto.from_pretrained(name, use_safetensors=True)
        processor = processor or transformers.AutoProcessor.from_pretrained(name)
    if processor is None:
        raise TypeError(f"{type(model).__name__} does not come with a tokenizer: pass processor=, such as "
                        "transformers.AutoProcessor.from_pretrained(name)")
    return model, processor


def _features(out: Any) -> Tensor:
    """The embedding, which some versions of transformers return alone and others in an output object."""
    return out if isinstance(out, Tensor) else out.pooler_output


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _prompt(processor: Any, question: str, prompt: str | None) -> str:
    if prompt is not None:
        return prompt.format(question=question)
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question + " Answer yes or no."}]
        result: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return result
    return f"{getattr(processor, 'image_token', '<image>')} {question} Answer:"


def _first_token(tokenizer: Any, answer: str) -> int:
    """The token that an answer starts with, as it follows a prompt."""
    return int(tokenizer(answer, add_special_tokens=False)["input_ids"][0])
