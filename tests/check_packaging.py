"""Build wheel and sdist, look into them, install the wheel elsewhere and use it: ``python tests/check_packaging.py``.

The wheel is built from the sdist, so files missing from the sdist are noticed. Needs the ``test`` extra (``build`` and
``hatchling``); without hatchling, ``build`` fetches it from the package index. Dependencies come from the environment.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {"invflow": ROOT / "invflow", "invflow_operators": ROOT / "operators" / "invflow_operators",
            "invflow_problems": ROOT / "problems" / "invflow_problems"}
#: of a package; of everything else nothing is wanted in it
SUFFIXES = {".py", ".pyi", ".json", ".safetensors", ".md", ".html", ".css", ".js", ".csv", ".png", ".typed", ".toml",
            ".j2", ".template", ".yaml", ".yml", ".txt"}
MEGABYTES = 40


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise SystemExit(f"packaging: {message}")


def run(*command: str, cwd: Path = ROOT, **environment: str) -> str:
    """A command's output; it must succeed."""
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    expect(done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def tracked() -> set[str] | None:
    """Files under version control, and those that are new and not ignored; None outside of a repository."""
    done = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                          capture_output=True, text=True)
    return {f for f in done.stdout.splitlines() if (ROOT / f).is_file()} if done.returncode == 0 else None


def build(out: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it."""
    isolation = [] if importlib.util.find_spec("hatchling") is None else ["--no-isolation"]
    run(sys.executable, "-m", "build", *isolation, "--outdir", str(out), str(ROOT))
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def check_wheel(wheel: Path) -> None:
    """Every file of the packages, the licence, and nothing else."""
    with zipfile.ZipFile(wheel) as file:
        names = {n for n in file.namelist() if not n.endswith("/")}
        metadata = next(n for n in names if n.endswith(".dist-info/METADATA"))
        text = file.read(metadata).decode()
    info = metadata.rpartition("/")[0]
    expect(any(n.startswith(info) and n.endswith("LICENSE") for n in names), "the wheel has no LICENSE")
    for part in ("entry_points.txt", "WHEEL", "RECORD"):
        expect(f"{info}/{part}" in names, f"the wheel has no {part}")
    expect("posterior" in text, "the wheel's description is not the README")
    known = tracked()
    wanted = set()
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*"):
            inside = path.relative_to(ROOT).as_posix()
            if path.is_file() and "__pycache__" not in path.parts and (known is None or inside in known):
                wanted.add(f"{package}/{path.relative_to(folder).as_posix()}")
    content = {n for n in names if not n.startswith(info)}
    expect(not wanted - content, f"the wheel lacks {sorted(wanted - content)[:5]}")
    expect(not content - wanted, f"the wheel holds stray files: {sorted(content - wanted)[:5]}")
    odd = sorted(n for n in content if Path(n).suffix not in SUFFIXES or "/." in n)
    expect(not odd, f"the wheel holds files of unknown kinds: {odd[:5]}")
    weights = [n for n in content if n.startswith("invflow/weights/") and n.endswith("model.safetensors")]
    images = [n for n in content if n.startswith("invflow_problems/data/")]
    expect(len(weights) >= 8 and bool(images), f"weights: {len(weights)}, sample images: {len(images)} files")
    expect(not any(n.startswith(("benchmarks/", "tests/")) for n in content), "the wheel holds benchmarks or tests")
    for package in PACKAGES:
        expect(f"{package}/py.typed" in content, f"{package} is not marked as typed")
    expect(any(line.startswith("License-Expression:") and "GPL-3.0" in line for line in text.splitlines()),
           "the wheel's metadata do not state the licences of the sample photographs")
    check_size(wheel)


def check_sdist(sdist: Path) -> None:
    """Sources, tests and notebooks; no environments, caches or data sets."""
    with tarfile.open(sdist) as file:
        names = {n.partition("/")[2] for n in file.getnames()}
    for wanted in ("pyproject.toml", "README.md", "LICENSE", "invflow/__init__.py", "tests/conftest.py", "PKG-INFO",
                   "operators/invflow_operators/__init__.py", "problems/invflow_problems/__init__.py"):
        expect(wanted in names, f"the sdist lacks {wanted}")
    bad = sorted(n for n in names if "__pycache__" in n or n.endswith((".pyc", ".gz", ".pt", ".pkl")) or "ubyte" in n)
    expect(not bad, f"the sdist holds {bad[:5]}")
    known = tracked()
    if known is not None:
        stray = sorted(n for n in names - known - {"PKG-INFO", ""} if not n.startswith(".git"))
        expect(not stray, f"the sdist holds files that are not under version control: {stray[:5]}")
    check_size(sdist)


def check_size(path: Path) -> None:
    size = path.stat().st_size / 1e6
    expect(size < MEGABYTES, f"{path.name} has {size:.1f} MB, over {MEGABYTES}")
    print(f"{path.name}: {size:.1f} MB")


def check_use(wheel: Path, scratch: Path) -> None:
    """Installed into a folder of its own, and used from another."""
    target, elsewhere = scratch / "site", scratch / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target),
        "--disable-pip-version-check", str(wheel))
    own = {"PYTHONPATH": str(target), "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1"}
    for module in PACKAGES:
        place = run(sys.executable, "-c", f"import {module}; print({module}.__file__)", cwd=elsewhere, **own).strip()
        expect(place.startswith(str(target)), f"{module} came from {place}, not from the wheel")
    listed = run(sys.executable, "-m", "invflow", "list", cwd=elsewhere, **own)
    for name in ("mnist-vfm", "gaussian-blur", "mnist/box-inpainting", "noise-smc"):
        expect(name in listed, f"invflow list does not name {name}:\n{listed}")
    run(sys.executable, "-m", "invflow", "solve", "mnist/box-inpainting", "--solver", "vfm", "--samples", "4", "--seed",
        "0", "--output", "out", cwd=elsewhere, **own)
    for file in ("figure.png", "posterior.safetensors", "metrics.json"):
        expect((elsewhere / "out" / file).stat().st_size > 0, f"invflow solve wrote no {file}")
    print("installed elsewhere: list and solve work")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="folder to leave the wheel and the sdist in")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        wheel, sdist = build(arguments.keep or scratch / "dist")
        check_sdist(sdist)
        check_wheel(wheel)
        check_use(wheel, scratch)
    print("packaging: all passed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
