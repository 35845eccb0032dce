"""A plug-in package written from docs/extending.md alone: every command finds its contents by name."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import invflow
from invflow.datasets.files import write_image

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")


def block(start: str) -> str:
    """The code of the first fenced block whose opening line, or first line, is this."""
    found = re.search(rf"^```{re.escape(start)}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert found, f"the page has no block {start!r}"
    return found[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the module and its entry points, as pip would leave them."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "invflow_stripes.py").write_text(block('python title="src/invflow_stripes/__init__.py"'))
    points = next(text for text in re.findall(r"^```toml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
                  if "invflow_stripes" in text)
    info = folder / "invflow_stripes-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: invflow-stripes\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(re.sub(r'project\.entry-points\."([\w.]+)"', r"\1", points).replace('"', ""))
    return folder


def run(site: Path, folder: Path, commands: list[str], code: int = 0) -> tuple[str, str]:
    """Standard output and error of commands, all in one process with the package installed."""
    script = ("import shlex, sys\nfrom invflow.cli.entry import app\nfor line in sys.argv[1:]:\n"
              "    code = app(shlex.split(line), standalone_mode=False)\n    assert not code, (line, code)\n")
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    result = subprocess.run([sys.executable, "-c", script, *commands], capture_output=True, text=True, check=False,
                            env=environment, cwd=folder, timeout=600)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout, result.stderr


def test_every_command_of_the_page_knows_the_package(site: Path, tmp_path: Path) -> None:
    commands = [line.removeprefix("invflow ") for text in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.DOTALL | re.M)
                for line in text.splitlines() if "waves" in text and line.startswith("invflow ")]
    assert [shlex.split(c)[0] for c in commands] == ["list", "solve", "compare", "calibrate", "train", "solve"]
    mask = torch.ones(1, 8, 8)
    mask[:, 3:5, 2:7] = 0
    write_image(mask, tmp_path / "m.png")
    write_image(torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)), tmp_path / "a.png")
    own = (f"solve --image {tmp_path / 'a.png'} --operator stripe-inpainting --mask {tmp_path / 'm.png'} --sigma 0.1 "
           "--prior waves-map --solver importance --samples 4 --output masked")
    out, error = run(site, tmp_path, [*commands, own])
    for line in ("stripe-inpainting +Hides stripes", "importance +Draws", "waves/stripes +Waves", "stripes +VFM",
                 "waves-map +A prior"):
        assert re.search(rf"^  {line}", out, re.MULTILINE), line
    assert "left out" not in error
    assert invflow.Posterior.load(tmp_path / "solved" / "posterior.safetensors").settings["steps"] == 2
    assert invflow.Certificate.load(tmp_path / "calibrated").problem == "waves/stripes"
    assert "importance" in (tmp_path / "compared" / "table.md").read_text()
    again = invflow.Posterior.load(tmp_path / "again" / "posterior.safetensors")
    assert again.settings["solver_name"] == "vfm"
    # the third party's operator itself was used, with the mask of the file
    masked = invflow.Posterior.load(tmp_path / "masked" / "posterior.safetensors")
    assert "StripeInpainting" in masked.settings["operator"]
    assert torch.equal(masked.diagnostics["observation"][0] == 0, mask == 0)


BROKEN = {
    "bad_exit": "import sys\nsys.exit('no licence')\n",
    "bad_import": "import nothing_of_that_name\n",
    "bad_names": "__all__ = ['Missing']\n",
    "bad_list": "__all__ = 7\n",
    "bad_double": ("from invflow.problem import load_problem\nfrom invflow_problems.gaussian import gaussian_linear\n"
                   "import copy\nfrom invflow.plugins import SolverEntry\nfrom invflow.operators import Denoising\n"
                   "double = copy.copy(gaussian_linear)\nclass Denoising(Denoising): pass\n"
                   "vfm = SolverEntry('VFM', 'mine', 'x:y')\n__all__ = ['double', 'Denoising', 'vfm']\n"),
    "bad_training": "from invflow.training.recipe import Recipe\nbad = Recipe('bad')\n__all__ = ['bad']\n",
    "bad_recipe": "def train(): ...\n__all__ = ['train']\n",
}


def test_broken_packages_are_left_out_with_a_note_everywhere(tmp_path: Path) -> None:
    """Whatever is wrong with a package, list, solve, compare, calibrate and train go on, and say what is left out."""
    groups = ("operators", "priors", "solvers", "problems", "recipes")
    for name, text in BROKEN.items():
        (tmp_path / f"{name}.py").write_text(text)
        info = tmp_path / f"{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (info / "entry_points.txt").write_text("".join(f"[invflow.{g}]\n{name} = {name}\n" for g in (
            ["recipes"] if name == "bad_recipe" else groups)))
    out, error = run(tmp_path, tmp_path, [
        "list", "solve gaussian/linear --solver exact --samples 4 --output solved",
        "compare gaussian/linear --solver exact --observations 2 --samples 4 --output compared",
        "calibrate gaussian/linear --solver exact --simulations 20 --samples 9 --output calibrated",
        "train checkerboard --steps 1 --batch-size 4 --output trained"])
    for name in BROKEN:
        assert re.search(rf"note: .*{name}.* was left out: ", error), (name, error)
    assert "no licence" in error
    assert "gaussian/linear" in out
    assert re.search(r"^  denoising +The identity", out, re.MULTILINE)
    assert re.search(r"^  vfm +one network call", out, re.MULTILINE)
