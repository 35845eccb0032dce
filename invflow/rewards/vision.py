"""Rewards from vision models of the transformers library: image-text scores and yes-or-no questions.

Images in [0, 1] are converted to the model's input by operations of torch only (resize, crop, normalise), so gradients
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

# mean and std of CLIP's training images (Radford et al. 2021), for processors that state none
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def preprocess(x: Tensor, size: tuple[int, int], mean: Sequence[float] = MEAN, std: Sequence[float] = STD, *,
               shortest_edge: int | None = None, mode: str = "bicubic") -> Tensor:
    """Convert images in [0, 1] to the input of a vision model; differentiable.

    Same as the image processors of transformers, but in one dtype throughout and without rounding to bytes: the
    shorter side is resized (bicubic, antialiased), the centre is cropped, and the channels are normalised. Grey images
    are repeated to three channels. Values outside [0, 1] are kept, and so are their gradients.

    Args:
        x: ``(n, 1 or 3, H, W)``.
        size: Height and width of the result.
        mean: Mean of each channel.
        std: Standard deviation of each channel.
        shortest_edge: Length of the shorter side before cropping; None stretches the image to ``size``.
        mode: ``"bicubic"`` or ``"bilinear"``.

    Returns:
        ``(n, 3, *size)``.

    Raises:
        ValueError: For other numbers of channels, or a shorter side that is smaller than the crop.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"images have shape {tuple(x.shape)}, expected (n, 1, H, W) or (n, 3, H, W)")
    x = x.expand(-1, 3, -1, -1)
    resized = size
    if shortest_edge is not None:
        if shortest_edge < max(size):
            raise ValueError(f"a shorter side of {shortest_edge} is smaller than the crop of {size}: pass at least "
                             f"{max(size)}, or shortest_edge=None to stretch the image")
        short = min(x.shape[2:])
        resized = (shortest_edge * x.shape[2] // short, shortest_edge * x.shape[3] // short)
    if resized != tuple(x.shape[2:]):
        x = interpolate(x, size=resized, mode=mode, antialias=True, align_corners=False)
    top, left = (resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2
    x = x[:, :, top : top + size[0], left : left + size[1]]
    return (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]


class _VisionReward(_ImageReward):
    """A frozen model with its preprocessing."""

    def __init__(self, model: nn.Module, image_processor: Any, size: tuple[int, int]) -> None:
        self.model = model.eval().requires_grad_(False)
        self.size = size
        self.mean = tuple(getattr(image_processor, "image_mean", None) or MEAN)
        self.std = tuple(getattr(image_processor, "image_std", None) or STD)
        wanted: Any = getattr(image_processor, "size", None)
        # a dictionary, or an object that behaves like one
        edge = wanted.get("shortest_edge") if hasattr(wanted, "get") else getattr(wanted, "shortest_edge", None)
        self.shortest_edge = None if wanted is not None and edge is None else max(edge or 0, *size)
        # 2 means bilinear in PIL; everything else is bicubic, or close to it
        self.mode = "bilinear" if getattr(image_processor, "resample", 3) == 2 else "bicubic"

    def pixel_values(self, x: Tensor) -> Tensor:
        """Convert images ``(n, C, H, W)`` in [0, 1] to the model's input, in its dtype."""
        values = preprocess(x, self.size, self.mean, self.std, shortest_edge=self.shortest_edge, mode=self.mode)
        return values.to(next(self.model.parameters()).dtype)

    def to(self, *args: Any, **kwargs: Any) -> Reward:
        """Copy on another device or with another dtype."""
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
    r"""Match of an image to a text, by a model with a joint embedding (CLIP; Radford et al. 2021).

    r(x) = scale cos(image(x), text). With competing texts ``against``, it is the log probability of the text among
    all of them, r(x) = scale log softmax(logit_scale cos)[0]; this is bounded by 0 and needs no choice of scale.

    Args:
        model: A CLIPModel, or a model with its ``get_image_features``, ``get_text_features`` and
            ``config.vision_config``, which is put into evaluation mode; or a folder or Hub repository of one
            (safetensors only).
        text: Description of the wanted images.
        processor: Processor that tokenises texts and defines the preprocessing of images; None loads the model's own
            by name.
        against: Competing texts; none uses the cosine.
        scale: Factor of the reward. Cosines differ by a few hundredths between images: CLIP was trained with 100.

    Raises:
        ImportError: If a model is to be loaded and transformers is not installed.
        TypeError: For a model without those methods, or without a processor.

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
        """Copy on another device or with another dtype."""
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
    r"""Log odds that a vision-language model answers yes to a question about the image.

    r(x) = scale (log p("Yes" | x, question) - log p("No" | x, question)), both for the first token of the answer.

    Args:
        model: A model that takes ``input_ids`` and ``pixel_values`` (n, 3, H, W) and returns logits over tokens, such
            as LlavaForConditionalGeneration, which is put into evaluation mode; or a folder or Hub repository of one.
        question: Question about the image.
        processor: Processor that tokenises a text with an image; None loads the model's own by name.
        prompt: Prompt of the model, with ``{question}`` and the processor's image token in it; None uses the
            processor's chat template or, without one, the image token, the question and "Answer:".
        yes: Answer that counts for the image; its first token is used.
        no: Answer that counts against it.
        scale: Factor of the reward.

    Raises:
        ImportError: If a model is to be loaded and transformers is not installed.
        TypeError: Without a processor.
        ValueError: If both answers start with the same token, or the model does not take plain images (Qwen-VL and
            others cut them into patches before the model)

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
            raise ValueError(f"{type(processor).__name__} returns pixel_values {tuple(values.shape)}, but plain images "
                             "(1, 3, H, W) are needed, so that gradients reach them: use a model such as Llava")
        super().__init__(network, processor.image_processor, (int(values.shape[2]), int(values.shape[3])))
        self.question, self.scale = question, float(scale)
        self.inputs = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
        self.yes, self.no = (_first_token(processor.tokenizer, answer) for answer in (yes, no))
        if self.yes == self.no:
            raise ValueError(f"{yes!r} and {no!r} start with the same token: pass answers whose first tokens differ")
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
        raise TypeError(f"{type(model).__name__} has no tokenizer: pass processor=, such as "
                        "transformers.AutoProcessor.from_pretrained(name)")
    return model, processor


def _features(out: Any) -> Tensor:
    """The embedding; some versions of transformers return it directly, others in an output object."""
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
    """First token of an answer, as it follows a prompt."""
    return int(tokenizer(answer, add_special_tokens=False)["input_ids"][0])
