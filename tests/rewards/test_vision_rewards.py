"""Rewards from vision models: tiny models of the real classes, their own processors, finite differences."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import invflow
from invflow import GaussianMixtureFlow, NoiseSMC
from invflow.rewards.vision import ImageTextReward, YesNoReward, preprocess
from invflow.testing import check_reward

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
F64 = torch.float64
SIDE = 12
WORDS = ["<pad>", "<unk>", "<image>", "a", "dark", "bright", "picture", "is", "it", "Yes", "No", "Answer", "<eos>"]


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def seeded(build: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


def tokenizer(end: bool) -> Any:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.add_special_tokens(["<pad>", "<unk>", "<image>", "<eos>"])
    if end:
        words.post_processor = tokenizers.processors.TemplateProcessing(
            single="$A <eos>", special_tokens=[("<eos>", WORDS.index("<eos>"))])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>",
                                                unk_token="<unk>", extra_special_tokens={"image_token": "<image>"})


def image_processor(side: int = SIDE) -> Any:
    return transformers.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": SIDE, "width": SIDE})


VISION = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
              patch_size=4, initializer_factor=5.0, initializer_range=0.3)
TEXT = dict(vocab_size=len(WORDS), hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16)


@cache
def clip() -> tuple[Any, Any]:
    config = transformers.CLIPConfig(
        text_config={**TEXT, "eos_token_id": WORDS.index("<eos>"), "pad_token_id": 0, "bos_token_id": 1},
        vision_config=VISION, projection_dim=6)
    return seeded(lambda: transformers.CLIPModel(config)).double(), transformers.CLIPProcessor(image_processor(),
                                                                                             tokenizer(True))


@cache
def llava() -> tuple[Any, Any]:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), image_token_index=WORDS.index("<image>"),
        text_config=transformers.LlamaConfig(**TEXT, num_key_value_heads=2, pad_token_id=0, initializer_range=0.5),
        vision_feature_select_strategy="default", vision_feature_layer=-1)
    processor = transformers.LlavaProcessor(image_processor(), tokenizer(False), patch_size=4,
                                            vision_feature_select_strategy="default", num_additional_image_tokens=1)
    return seeded(lambda: transformers.LlavaForConditionalGeneration(config)).double(), processor


def score(**options: Any) -> ImageTextReward:
    model, processor = clip()
    return ImageTextReward(model, "a dark picture", processor=processor, **options)


def question(**options: Any) -> YesNoReward:
    model, processor = llava()
    return YesNoReward(model, "is it dark", processor=processor, **options)


# -- preprocessing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(28, 28), (12, 12), (20, 31), (8, 9)])
@pytest.mark.parametrize("side", [12, 15])
def test_images_are_prepared_as_the_processor_does(shape: tuple[int, int], side: int) -> None:
    smooth = torch.nn.functional.interpolate(images(2, 3, 4, 4), size=shape, mode="bilinear")
    # away from black and white, beyond which they clip what the kernel overshoots
    pictures = (255 * (0.2 + 0.6 * smooth)).round().to(torch.uint8)
    theirs = image_processor(side)(list(pictures), return_tensors="pt")["pixel_values"]
    ours = preprocess(pictures.double() / 255, (SIDE, SIDE), shortest_edge=side)
    # they round to bytes after resizing: half a byte, over the smallest deviation, and a little for their kernel
    torch.testing.assert_close(ours, theirs.double(), rtol=0, atol=1.1 / 255 / 0.26)
    plain = (pictures.double() / 255)[:, :, :SIDE, :SIDE]
    if shape == (12, 12) and side == 12:
        mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
        expected = (plain - plain.new_tensor(mean)[:, None, None]) / plain.new_tensor(std)[:, None, None]
        torch.testing.assert_close(ours, expected)


def test_grey_is_repeated_and_stretching_keeps_all() -> None:
    grey = images(2, 1, 9, 14)
    torch.testing.assert_close(preprocess(grey, (6, 6)), preprocess(grey.repeat(1, 3, 1, 1), (6, 6)))
    edge = torch.zeros(1, 3, 6, 18, dtype=F64)
    edge[..., 0] = 1.0  # a column at the left, cut off where the middle is taken
    assert (preprocess(edge, (6, 6), (0, 0, 0), (1, 1, 1)).abs() > 1e-3).any()
    assert (preprocess(edge, (6, 6), (0, 0, 0), (1, 1, 1), shortest_edge=6) == 0).all()
    for bad, words in ((images(2, 2, 8, 8), "expected"), (images(3, 8, 8), "expected")):
        with pytest.raises(ValueError, match=words):
            preprocess(bad, (6, 6))
    with pytest.raises(ValueError, match="at least"):
        preprocess(grey, (6, 6), shortest_edge=5)


# -- rewards ------------------------------------------------------------------------------------------------


def test_image_text_score_is_clips() -> None:
    model, processor = clip()
    x = images(4, 3, SIDE, SIDE)
    texts = ["a dark picture", "a bright picture"]
    inputs = processor(text=texts, images=list((255 * x).round().to(torch.uint8)), return_tensors="pt", padding=True)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    logits = model(**inputs).logits_per_image.detach()
    rounded = (255 * x).round()[None] / 255
    assert logits.std(0).min() > 0.05  # images differ in their score
    torch.testing.assert_close(score(scale=3.0)(rounded)[0], 3 * logits[:, 0] / model.logit_scale.exp(), rtol=1e-5,
                               atol=1e-5)
    weighed = score(against=["a bright picture"])(rounded)[0]
    torch.testing.assert_close(weighed, logits.log_softmax(1)[:, 0], rtol=1e-4, atol=1e-4)
    assert (logits.log_softmax(1)[:, 0] < -0.01).any()


def test_log_odds_are_those_of_the_model() -> None:
    model, processor = llava()
    x = (255 * images(3, 3, SIDE, SIDE)).round() / 255
    inputs = processor(images=list((255 * x).to(torch.uint8)), text=["<image> is it dark Answer"] * 3,
                       return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].double()
    logits = model(**inputs).logits[:, -1].detach().log_softmax(1)
    expected = logits[:, WORDS.index("Yes")] - logits[:, WORDS.index("No")]
    assert expected.std() > 1e-3
    found = question(prompt="<image> {question} Answer", scale=2.0)(x[None])[0]
    torch.testing.assert_close(found, 2 * expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(question(prompt="<image> it is a picture")(x[None])[0], expected)


@pytest.mark.parametrize("shape", [(1, 10, 10), (3, 17, 13)])
@pytest.mark.parametrize(("build", "h", "tolerance"), [
    (score, 1e-5, 1e-5), (lambda: score(against=["a bright picture"]), 1e-5, 1e-5),
    (question, 1e-3, 5e-3),  # the language model normalises in float32, whatever its type
])
def test_gradients_reach_the_image(build: Callable[[], Any], h: float, tolerance: float,
                                   shape: tuple[int, ...]) -> None:
    reward, x, direction = build(), images(2, 2, *shape).requires_grad_(), images(2, 2, *shape, seed=1) - 0.5
    gradient = torch.autograd.grad(reward(x).sum(), x)[0]
    with torch.no_grad():
        ahead, behind = (reward(x + s * h * direction).sum() for s in (1, -1))
    wanted = (ahead - behind) / (2 * h)
    assert abs(wanted) > 1e-5
    torch.testing.assert_close((gradient * direction).sum(), wanted, rtol=tolerance, atol=0)


@pytest.mark.parametrize(("build", "tolerance"), [(score, 1e-4), (question, 0.05)])
def test_contract(build: Callable[[], Any], tolerance: float) -> None:
    check_reward(build(), (3, SIDE, SIDE), gradient_tolerance=tolerance)


@pytest.mark.parametrize("build", [score, question])
def test_moves_to_another_type_as_a_copy(build: Callable[[], Any]) -> None:
    reward, x = build(), images(1, 3, 3, SIDE, SIDE)
    other = reward.to(torch.float32)
    assert next(reward.model.parameters()).dtype == F64
    out = other(x.float())
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), reward(x), rtol=1e-3, atol=1e-3)
    assert other(x).dtype == F64  # a reward answers in the type that it is asked in
    assert not any(p.requires_grad for p in reward.model.parameters())
    assert type(reward).__name__ in repr(reward)


def test_a_prior_is_tilted() -> None:
    """Mean score of tempered draws against that of weighted draws of the prior."""
    prior = GaussianMixtureFlow(torch.full((1, 1, 6, 6), 0.5, dtype=F64), 0.25)
    reward = score(scale=3.0)
    with torch.no_grad():
        values = reward(prior.generate(3000, generator=torch.Generator().manual_seed(1))[None])[0]
    weights = (values - values.max()).exp()
    weights = weights / weights.sum()
    expected = (weights * values).sum()
    error = (weights.square() * (values - expected).square()).sum().sqrt()
    posterior = NoiseSMC(prior).sample(reward, 1000, generator=torch.Generator().manual_seed(2))
    found = reward(posterior.samples)[0]
    weighted = (posterior.log_weights[0].exp() * found).sum()
    tolerance = 4 * (error**2 + found.var() / 250).sqrt()  # moves leave some dependence: count a quarter of the draws
    assert abs(weighted - expected) < tolerance
    assert expected - values.mean() > 2 * tolerance  # and the tilt is seen


def test_refusals() -> None:
    model, processor = clip()
    with pytest.raises(TypeError, match="AutoProcessor"):
        ImageTextReward(model, "a")
    with pytest.raises(TypeError, match="get_image_features"):
        ImageTextReward(nn.Linear(1, 1), "a", processor=processor)
    with pytest.raises(ValueError, match="same token"):
        question(yes="dark", no="dark it")
    with pytest.raises(ValueError, match=r"B, N, C, H, W"):
        score()(images(2, 3, 8, 8))

    class Patches:
        def __call__(self, **inputs: Any) -> dict[str, Tensor]:
            return {"input_ids": torch.zeros(1, 3), "pixel_values": torch.zeros(16, 1176)}

    with pytest.raises(ValueError, match="Llava"):
        YesNoReward(llava()[0], "a", processor=Patches())


def test_models_load_from_folders_and_import_is_lazy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = clip()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    x = images(1, 2, 3, SIDE, SIDE)
    torch.testing.assert_close(ImageTextReward(tmp_path, "a dark picture").to(F64)(x), score()(x), rtol=1e-4, atol=1e-5)
    code = "import sys, invflow.rewards.vision; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(invflow.__file__).parents[1])
    monkeypatch.setitem(sys.modules, "transformers", None)
    for build in (ImageTextReward, YesNoReward):
        with pytest.raises(ImportError, match=r"pip install 'invflow\[diffusers\]'"):
            build("somewhere", "a")
