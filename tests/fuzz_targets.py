"""Everything that is read from disk: how to write a small valid file, read it, and recognise its content."""

from __future__ import annotations

import functools
import gzip
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import invflow
from invflow._core.records import digest, write_record
from invflow.datasets.files import read_image, read_kernel, read_mask
from invflow.datasets.sets import load_images
from invflow.evaluation.certificate.certificate import Certificate, read_simulations, write_simulations
from invflow.evaluation.certificate.judgement import LEVELS, Check, Judgement
from invflow.evaluation.results.parts import Part, read_part, write_part
from invflow.models.adapter import Adapter
from invflow.nets.classifier import Classifier
from invflow.training.checkpoint import load, save
from invflow.training.loop import LoopSettings, _identity

__all__ = ["TARGETS", "Target"]

SHAPE = (1, 8, 8)
OPTIONS = {"channels": [4, 8], "blocks": 1, "embedding": 8}


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes:
        name: of the kind.
        make: writes a good one into a folder.
        load: reads the folder.
        describe: a text that tells what was read; fails where it is no object that can be used.
        files: those that are damaged.
        knows: of a damaged folder, whether the format can know that it is not as it was saved; None: it never can.
        errors: that a damaged one may give.
    """

    name: str
    make: Callable[[Path], None]
    load: Callable[[Path], Any]
    describe: Callable[[Any], str]
    files: list[str]
    knows: Callable[[Path], bool] | None = None
    errors: tuple[type[Exception], ...] = (ValueError, FileNotFoundError)


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _has_digest(place: Path, name: str = "config.json") -> bool:
    """Whether the digest is still there: a file without one may be of an older version."""
    return all(b'"digest"' in path.read_bytes() for path in place.rglob(name))


# -- models ------------------------------------------------------------------------------------------------------------


def _tell(module: nn.Module) -> str:
    plain = {name: str(getattr(module, name, None))
             for name in ("state_shape", "image_shape", "classes", "skip", "independent_noise", "decode_affine")}
    return digest(dict(module.state_dict()), plain)


def _prior(network: str = "unet") -> invflow.NeuralFlowMap:
    shape, options = (SHAPE, OPTIONS) if network == "unet" else ((3,), {"width": 8, "depth": 2, "embedding": 8})
    return invflow.NeuralFlowMap(shape, network=network, options=options, generator=_seeded())


def _adapter() -> Adapter:
    return Adapter(SHAPE, classes=["denoising", "box-inpainting"], options=OPTIONS, generator=_seeded(1),
                   trained_for=_prior().fingerprint())


def _make_lmmse(place: Path) -> None:
    images = torch.rand(40, *(1, 4, 4), generator=_seeded())
    invflow.LinearMMSE.fit(images).save_pretrained(place)


def _model(name: str, make: Callable[[Path], Any], load: Callable[[Path], Any], tell: Callable[[Any], str] = _tell,
           files: tuple[str, ...] = ("config.json", "model.safetensors")) -> Target:
    return Target(name, make, load, tell, list(files), _has_digest)


# -- results -----------------------------------------------------------------------------------------------------------


def _make_posterior(place: Path) -> None:
    samples = torch.randn(2, 5, *SHAPE, generator=_seeded())
    invflow.Posterior(samples, torch.randn(2, 5, generator=_seeded(1)), torch.tensor([1.0, 2.0]), seconds=1.5,
                      nfe=invflow.NFE(3.0, 1.0), settings={"solver": "FMTT", "steps": 3, "grid": [0.0, 0.5, 1.0]},
                      diagnostics={"k_hat": torch.tensor([0.3, 0.4]), "kind": "sampling"}).save(place / "p.safetensors")


def _tell_posterior(p: invflow.Posterior) -> str:
    tensors = {"samples": p.samples, "weights": p.log_weights, "mean": p.mean()}
    return digest(tensors, {"settings": str(p.settings), "nfe": str(p.nfe), "text": repr(p)})


def _make_part(place: Path) -> None:
    place.mkdir(parents=True)
    part = Part({"crps": [0.1, 0.2], "psnr": [20.0, 21.0]}, {"forward": 1.0, "memory": None},
                {"mean": torch.rand(2, *SHAPE, generator=_seeded())}, 3, None)
    write_part(part, place / "part.safetensors", {"problem": "a", "label": "b", "start": 0, "stop": 2})


def _load_part(place: Path) -> Part:
    part = read_part(place / "part.safetensors")
    if part is None:  # made anew
        raise ValueError("damaged")
    return part


def _make_record(place: Path) -> None:
    place.mkdir(parents=True)
    write_simulations(place, {"ranks": torch.arange(6).view(3, 2), "seconds": torch.rand(3, generator=_seeded())},
                      {"num_samples": 9, "solver": "vfm"})


def _make_certificate(place: Path) -> None:
    checks = tuple(Check(name, 0.3, 0.6, True, "", 0.1, 1.1, 0.5, 0.9, 0.01) for name in ("mean", "tarp"))
    judgement = Judgement(checks, "passes", 0.8, 1.2, 0.3, 1.0, 0.02)
    record = {"ranks": torch.arange(6).view(3, 2), "pixel_coverage": torch.rand(3, len(LEVELS), generator=_seeded())}
    Certificate("p", "s", "prior", 3, 9, 90, 0.05, judgement, record, {"solver": "FMTT"},
                {"forward": 2.0, "backward": 1.0}, 0.5).save(place)


def _make_comparison(place: Path) -> None:
    from invflow.evaluation.comparison import _KINDS
    from invflow.evaluation.results.results import _COSTS

    record = {"values": {"p": {"s": {"crps": [0.1, 0.2]}}}, "sets": {"p": {"s": {"sw": [0.3, 0.1]}}},
              "costs": {"p": {"s": dict.fromkeys(_COSTS, 1.0)}}, "failures": {"p": {}}, "settings": {"num_samples": 4},
              "solvers": {"s": {"solver": "VFM"}}, "seeds": {"p": [1]}, "versions": {"torch": "2"}, "missing": {}}
    write_record(place / "comparison.json", _KINDS[0], record)


def _load_comparison(place: Path) -> Any:
    from invflow.evaluation.comparison import Comparison

    return Comparison.load(place)


# -- training ----------------------------------------------------------------------------------------------------------


def _training() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], torch.optim.Optimizer, LoopSettings]:
    module = nn.Linear(3, 2)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.rand(p.shape, generator=_seeded(len(p.shape))))
    parameters: dict[str, Tensor] = {f"net.{k}": p for k, p in module.named_parameters()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    average = {k: p.detach().clone() for k, p in parameters.items()}
    return parameters, average, {"scale": torch.ones(2)}, optimizer, LoopSettings(steps=10)


def _make_checkpoint(place: Path) -> None:
    place.mkdir(parents=True)
    parameters, average, buffers, optimizer, settings = _training()
    save(place, 5, parameters, average, buffers, optimizer, _identity(settings), {"objective": "a", "data": "b"})


def _load_checkpoint(place: Path) -> str:
    if not (place / "checkpoint.safetensors").exists():
        raise FileNotFoundError("no checkpoint: training begins anew")
    parameters, average, buffers, optimizer, settings = _training()
    step = load(place, parameters, average, buffers, optimizer, _identity(settings), {"objective": "a", "data": "b"})
    state = {f"{i}.{k}": v for i, held in enumerate(optimizer.state.values()) for k, v in held.items()}
    return digest({**parameters, **{f"a.{k}": v for k, v in average.items()}, **buffers, **state}, {"step": step})


# -- images and arrays -------------------------------------------------------------------------------------------------


def _picture(kind: str) -> tuple[Image.Image, str]:
    grey = (torch.rand(12, 10, generator=_seeded()) * 255).byte().numpy()
    colour = np.stack([grey, 255 - grey, grey // 2], axis=2)
    return {
        "png": (Image.fromarray(colour), "i.png"), "png16": (Image.fromarray(grey.astype(np.uint16) * 257), "i.png"),
        "palette": (Image.fromarray(colour).quantize(16), "i.png"), "jpeg": (Image.fromarray(colour), "i.jpg"),
        "tiff": (Image.fromarray(colour), "i.tif"),
        "tiff-float": (Image.fromarray((grey / 255).astype(np.float32)), "i.tif"),
        "webp": (Image.fromarray(colour), "i.webp"), "bmp": (Image.fromarray(grey), "i.bmp"),
        "gif": (Image.fromarray(grey), "i.gif"),
    }[kind]


def _image(kind: str) -> Target:
    def make(place: Path) -> None:
        place.mkdir(parents=True)
        image, name = _picture(kind)
        image.save(place / name, **({"compression": "tiff_lzw"} if kind == "tiff" else {}))

    def load(place: Path) -> Tensor:
        return read_image(place / _picture(kind)[1], image_shape=SHAPE, resize=True, say=lambda message: None)

    return Target(kind, make, load, _in_range, [_picture(kind)[1]])


def _in_range(image: Tensor) -> str:
    if image.dtype != torch.float32 or not bool(((image >= 0) & (image <= 1 + 1e-6)).all()):
        raise AssertionError(f"an image in {image.dtype}, from {float(image.min())} to {float(image.max())}")
    return str(tuple(image.shape))


def _array(name: str, file: str, read: Callable[..., Tensor]) -> Target:
    def make(place: Path) -> None:
        place.mkdir(parents=True)
        values = (torch.rand(3, 3, generator=_seeded()) < 0.7).float().numpy()
        np.save(place / file, values) if file.endswith("npy") else np.savetxt(place / file, values)

    def tell(values: Tensor) -> str:
        assert bool(values.isfinite().all())
        return str(tuple(values.shape))

    return Target(name, make, lambda place: read(place / file, say=lambda message: None), tell, [file])


def _make_idx(place: Path, packed: bool) -> None:
    place.mkdir(parents=True)
    pixels = (torch.rand(5, 6, 6, generator=_seeded()) * 255).byte().numpy()
    for name, values in (("train-images-idx3-ubyte", pixels), ("train-labels-idx1-ubyte", pixels[:, 0, 0] % 10)):
        data = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
        (place / (name + ".gz" * packed)).write_bytes(gzip.compress(data, mtime=0) if packed else data)


def _make_cifar(place: Path) -> None:
    place.mkdir(parents=True)
    for i in range(1, 6):
        (place / f"data_batch_{i}.bin").write_bytes(bytes([i]) + bytes(3072))


def _tell_data(found: tuple[Tensor, Tensor]) -> str:
    images, labels = found
    assert len(images) == len(labels)
    return _in_range(images)


def _idx(name: str, packed: bool) -> Target:
    end = ".gz" * packed
    return Target(name, functools.partial(_make_idx, packed=packed), lambda place: load_images(place, labels=True),
                  _tell_data, [f"train-images-idx3-ubyte{end}", f"train-labels-idx1-ubyte{end}"])


TARGETS = [
    _model("prior", lambda p: _prior().save_pretrained(p), invflow.NeuralFlowMap.from_pretrained),
    _model("prior-mlp", lambda p: _prior("mlp").save_pretrained(p, torch.float16), invflow.load_prior),
    _model("adapter", lambda p: _adapter().save_pretrained(p), Adapter.from_pretrained),
    _model("vfm", lambda p: invflow.VFM(_prior(), _adapter()).save_pretrained(p), invflow.VFM.load,
           lambda vfm: _tell(vfm.prior) + _tell(vfm.adapter),
           ("config.json", "map/config.json", "map/model.safetensors", "adapter/config.json",
            "adapter/model.safetensors")),
    _model("classifier", lambda p: Classifier((1, 12, 12), ["a", "b"], width=2).save_pretrained(p), Classifier.load),
    _model("lmmse", _make_lmmse, invflow.LinearMMSE.load,
           lambda s: digest({"mean": s.mean, "factor": s.factor}, {"shape": s.image_shape})),
    Target("posterior", _make_posterior, lambda p: invflow.Posterior.load(p / "p.safetensors"), _tell_posterior,
           ["p.safetensors"], functools.partial(_has_digest, name="*.safetensors")),
    Target("part", _make_part, _load_part, lambda p: digest(p.tensors, {"rest": str((p.columns, p.costs, p.seed))}),
           ["part.safetensors"], functools.partial(_has_digest, name="*.safetensors")),
    Target("record", _make_record, read_simulations, lambda r: digest(r[0], {"settings": str(r[1])}),
           ["simulations.safetensors"], functools.partial(_has_digest, name="*.safetensors")),
    Target("certificate", _make_certificate, Certificate.load, lambda c: c.to_markdown(),
           ["certificate.json", "certificate.json", "simulations.safetensors"],
           lambda place: _has_digest(place, "certificate.json") and _has_digest(place, "*.safetensors")),
    Target("comparison", _make_comparison, _load_comparison, lambda c: c.to_markdown(), ["comparison.json"]),
    Target("checkpoint", _make_checkpoint, _load_checkpoint, str, ["checkpoint.safetensors"],
           functools.partial(_has_digest, name="*.safetensors")),
    *map(_image, ("png", "png16", "palette", "jpeg", "tiff", "tiff-float", "webp", "bmp", "gif")),
    _array("mask-npy", "m.npy", read_mask), _array("mask-txt", "m.txt", read_mask),
    _array("kernel-npy", "k.npy", read_kernel),
    _idx("idx", False), _idx("idx-gz", True),
    Target("cifar", _make_cifar, lambda p: load_images(p, labels=True), _tell_data,
           ["data_batch_1.bin", "data_batch_3.bin"]),
]

if __name__ == "__main__":
    print(json.dumps([target.name for target in TARGETS]))
