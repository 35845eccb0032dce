"""The photographs' problems: their contract, how photographs are split, and where the samples are cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

PHOTO_TASKS = ["denoising", "random_inpainting", "box_inpainting", "super_resolution", "super_resolution_x2",
               "super_resolution_x3", "gaussian_blur", "motion_blur"]


@pytest.mark.parametrize("task", PHOTO_TASKS)
def test_photo_problems_keep_the_contract(task):
    from invflow.testing import check_problem
    from invflow_problems import photo_problems

    problem = getattr(photo_problems, f"photos_{task}")
    assert problem.name == f"photos/{task.replace('_', '-')}"
    check_problem(problem)
    expected = "super_resolution_x4" if task == "super_resolution" else task
    assert problem.problem_class == expected.replace("_", "-")


def test_photographs_are_split_whole():
    from invflow_problems import photo_samples, photo_split

    splits = [photo_split.HELD_OUT, photo_split.VALIDATION, photo_split.TRAINING]
    names = [name for split in splits for name in split]
    assert len(names) == len(set(names))
    for split, own in (("test", photo_split.HELD_OUT), ("validation", photo_split.VALIDATION)):
        assert {crop.photo for crop in photo_samples.CROPS[split]} == set(own)
        images = photo_samples.load_photos(split)
        assert images.shape == (len(photo_samples.CROPS[split]), 3, 256, 256)
        assert images.min() >= 0
        assert images.max() <= 1
        assert (images.flatten(1).std(1) > 0.05).all(), "a crop shows nothing"
    with pytest.raises(ValueError, match="there is no split"):
        photo_samples.load_photos("training")


def test_samples_are_cut_where_the_crops_say(tmp_path):
    from PIL import Image
    from safetensors.torch import load_file

    from benchmarks.release import make_samples
    from benchmarks.release.make_samples import make_photos
    from invflow_problems import photo_samples

    for crop in {c.photo: c for crops in photo_samples.CROPS.values() for c in crops}.values():
        folder = tmp_path / "photos" / crop.photo / "contents" / "images"
        folder.mkdir(parents=True)
        ramp = torch.arange(1280).expand(1000, 1280) * 200 // 1279
        Image.fromarray(torch.stack([ramp, ramp, ramp], 2).to(torch.uint8).numpy()).save(folder / "a.jpg", quality=95)
    make_samples.main(["photos", str(tmp_path / "photos"), "--output", str(tmp_path)])
    tensors = load_file(tmp_path / "photos.safetensors")
    for split, crops in photo_samples.CROPS.items():
        assert tensors[f"{split}_images"].shape == (len(crops), 3, 256, 256)
        for image, crop in zip(tensors[f"{split}_images"].float(), crops, strict=True):
            expected = (crop.left + 128) / 640 * 200
            assert abs(float(image[:, :, 127:129].mean()) - expected) < 2
    with pytest.raises(ValueError, match="there is no photograph"):
        make_photos([tmp_path / "empty"], Path(tmp_path))
