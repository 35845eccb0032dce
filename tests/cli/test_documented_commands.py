"""The documentation's commands on files, run in a folder with the output of ``invflow examples``."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from test_docs import commands

from invflow.cli.entry import app
from invflow.cli.examples import write_examples

#: with few samples, since what is asked is whether the files and options fit each other
QUICK = {"solve": ["--samples", "2"], "restore": []}
OWN = re.compile(r"runs/|--operator radon")  # a training's result, an operator that the page has the reader write


def documented() -> list[str]:
    """Each command on files once, as it stands in the pages."""
    found = [text for _, text in commands() if re.match(r"invflow (restore|solve --image|examples|list|new)\b", text)]
    return [text for text in dict.fromkeys(found) if not OWN.search(text)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    write_examples(folder)
    with Image.open(folder / "scan.tif") as scan:  # what the reader of the page on photographs makes
        layer = Image.new("RGBA", scan.size)
    layer.paste((255, 0, 0, 255), (10, 10, 30, 14))
    layer.save(folder / "paint.png")
    return folder


def test_the_pages_have_such_commands() -> None:
    kinds = {text.split()[1] for text in documented()}
    assert kinds == {"restore", "solve", "examples", "list", "new"}
    assert len(documented()) > 20


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("line", documented())
def test_runs_on_the_example_files(line: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shlex

    from typer.testing import CliRunner

    words = shlex.split(line, comments=True)[1:]
    if words[0] != "examples":
        shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    if words[1:2] == ["filled.tif"]:  # of the command before
        shutil.copy(files / "scan.tif", tmp_path / "filled.tif")
    monkeypatch.chdir(tmp_path)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    result = CliRunner().invoke(app, [*words, *QUICK.get(words[0], [])])
    assert result.exit_code == 0, result.output + repr(result.exception)
    made = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert made or words[0] == "list"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_from_a_folder_of_images_to_samples(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first three commands of the page on a folder of images, with two steps of each training."""
    import shlex

    from typer.testing import CliRunner

    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    lines = [text for place, text in commands() if place.startswith("docs/your-images.md:")][:3]
    assert [line.split()[1] for line in lines] == ["train", "train", "restore"]
    for line in lines:
        few = ["--steps", "2", "--batch-size", "2"] if "train" in line else ["--samples", "1"]
        result = CliRunner().invoke(app, [*shlex.split(line)[1:], *few])
        assert result.exit_code == 0, result.output + repr(result.exception)
    assert (tmp_path / "photo-restored.png").is_file()
