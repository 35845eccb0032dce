"""Inputs of the command line: operators, sample files, closed streams, and requests that are too large."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import invflow
from invflow._core import plugins
from invflow.cli.entry import app
from invflow.cli.examples import write_examples
from invflow.cli.operators import operator_by_name
from invflow.datasets.files import read_image, read_kernel, read_mask
from invflow.models.neural import load_trainable
from invflow.operators import Blur, MaskInpainting
from invflow.registry import list_solvers, solver_by_name

SHAPE = (1, 8, 8)


def run(*arguments: object, code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + result.stderr
    return result.stdout, result.stderr


def refuse(*arguments: object) -> str:
    """The last line on standard error, which is all there is to say but for notes."""
    _, error = run(*arguments, code=2)
    assert "Traceback" not in error
    return error.splitlines()[-1]


# -- other people's operators --------------------------------------------------------------------------------------


class StripeInpainting(MaskInpainting):
    """A mask of stripes, unless one is given."""

    def __init__(self, image_shape: tuple[int, ...], mask: torch.Tensor | None = None, width: int = 2) -> None:
        rows = (torch.arange(image_shape[1]) // width % 2 == 0)[:, None].expand(image_shape)
        super().__init__(rows if mask is None else mask, image_shape)


class Camera(Blur):
    """A blur by a kernel that it does not know by itself."""

    def __init__(self, image_shape: tuple[int, ...], kernel: torch.Tensor, gain: float = 1.0) -> None:
        super().__init__(gain * kernel, image_shape)


class Zoom(invflow.Operator):
    """Every second pixel."""

    def __init__(self, image_shape: tuple[int, ...], generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.image_shape = tuple(image_shape)
        self.measurement_shape = (image_shape[0], image_shape[1] // 2, image_shape[2] // 2)
        self.drawn = generator is not None

    @classmethod
    def image_size(cls, size: tuple[int, int], settings: object) -> tuple[int, int]:
        return (2 * size[0], 2 * size[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, ::2, ::2]


class Same(invflow.Operator):
    """The identity, by somebody else."""

    structure = "identity"

    def __init__(self, image_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.image_shape = self.measurement_shape = tuple(image_shape)
        self.calls = [0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls[0] += 1
        return x.clone()

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        self.calls[0] += 1
        return y.clone()


def install(monkeypatch: pytest.MonkeyPatch, module: str, group: str) -> None:
    """Register a module beside what is there."""
    entry = importlib.metadata.EntryPoint("theirs", module, group)
    monkeypatch.setattr(plugins, "entry_points", lambda group: (
        *importlib.metadata.entry_points(group=group), *([entry] if group == entry.group else [])))
    plugins.offers.cache_clear()


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A plug-in with these operators, installed."""
    module = type(sys)("their_cameras")
    module.__all__ = ["StripeInpainting", "Camera", "Zoom", "Same"]  # type: ignore[attr-defined]
    vars(module).update({name: globals()[name] for name in module.__all__})
    monkeypatch.setitem(sys.modules, "their_cameras", module)
    install(monkeypatch, "their_cameras", "invflow.operators")
    yield
    plugins.offers.cache_clear()


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    mask = np.ones((8, 8))
    mask[2:5, 3:6] = 0
    np.save(tmp_path / "mask.npy", mask)
    np.save(tmp_path / "kernel.npy", np.array([[0.25, 0.5, 0.25]]))
    return tmp_path / "mask.npy", tmp_path / "kernel.npy"


def test_a_mask_file_goes_to_the_operator_that_was_asked_for(theirs: None, files: tuple[Path, Path]) -> None:
    mask, kernel = files
    said: list[str] = []
    own = operator_by_name("stripe-inpainting", SHAPE, mask=mask, say=said.append)
    assert type(own) is StripeInpainting
    assert torch.equal(own.mask[0], read_mask(mask, SHAPE).bool())
    assert type(operator_by_name("stripe-inpainting", SHAPE, mask=mask, settings={"width": 3}, say=said.append)
                ) is StripeInpainting
    # ours make a MaskInpainting of it, of their own class
    for name, problem_class in (("box-inpainting", "box-inpainting"), ("random-inpainting", "random-inpainting"),
                                ("mask-inpainting", "free-form-inpainting")):
        made = operator_by_name(name, SHAPE, mask=mask, say=said.append)
        assert (type(made), made.problem_class) == (MaskInpainting, problem_class)
    assert all("hides 14.06% of the picture" in note for note in said)
    with pytest.raises(ValueError, match=r"--mask belongs to .*stripe-inpainting.*, not to camera"):
        operator_by_name("camera", SHAPE, mask=mask)
    with pytest.raises(ValueError, match=r"keep=.* conflicts with --mask"):
        operator_by_name("random-inpainting", SHAPE, mask=mask, settings={"keep": 0.5})
    with pytest.raises(ValueError, match=r"std=.* conflicts with --kernel"):
        operator_by_name("gaussian-blur", SHAPE, kernel=kernel, settings={"std": 0.5})


def test_a_kernel_file_and_a_border_go_to_the_operator_too(theirs: None, files: tuple[Path, Path]) -> None:
    said: list[str] = []
    own = operator_by_name("camera", SHAPE, kernel=files[1], observed=True, settings={"gain": 2.0}, say=said.append)
    assert type(own) is Camera
    assert own.padding == "circular"  # it has no say in it
    assert torch.equal(own.kernel[0, 0], 2 * read_kernel(files[1]))
    assert not said
    ours = operator_by_name("motion-blur", SHAPE, kernel=files[1], observed=True, say=said.append)
    assert (type(ours), ours.padding, ours.problem_class) == (Blur, "reflect", "motion-blur")
    assert len(said) == 1
    with pytest.raises(ValueError, match="camera needs its kernel: pass --kernel FILE"):
        operator_by_name("camera", SHAPE)


def test_sizes_and_draws_are_asked_for(theirs: None, tmp_path: Path) -> None:
    from invflow.cli.image_task import ImageTask

    assert ImageTask(tmp_path / "a.png", "zoom", observed=True)._image_size((4, 6)) == (8, 12)
    assert ImageTask(tmp_path / "a.png", "zoom")._image_size((4, 6)) == (4, 6)
    assert ImageTask(tmp_path / "a.png", "super-resolution", observed=True, factor=3)._image_size((4, 6)) == (12, 18)
    assert ImageTask(tmp_path / "a.png", "super-resolution", observed=True)._image_size((4, 6)) == (16, 24)
    assert operator_by_name("zoom", SHAPE, generator=torch.Generator()).drawn
    with pytest.raises(ValueError, match="zoom draws its parameters at random"):
        operator_by_name("zoom", SHAPE, observed=True)
    said: list[str] = []
    operator_by_name("stripe-inpainting", SHAPE, observed=True, say=said.append)
    assert said == ["assumed the defaults of StripeInpainting: pass --mask FILE to change them"]


def test_an_identity_that_says_so_costs_what_ours_costs() -> None:
    from invflow.linear.spectral import Spectrum, gaussian_estimate
    from invflow.operators import Denoising

    class Counted(Denoising):
        structure = "identity"  # another forward has to say so itself

        def __init__(self, image_shape: tuple[int, ...]) -> None:
            super().__init__(image_shape)
            self.calls = [0]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls[0] += 1
            return super().forward(x)

        def adjoint(self, y: torch.Tensor) -> torch.Tensor:
            self.calls[0] += 1
            return super().adjoint(y)

    shape, cost, found = (1, 16, 16), [], []
    y = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    for operator in (Counted(shape), Same(shape)):
        found.append(gaussian_estimate(Spectrum(1), torch.full((1, 1, 1), 0.5), (1.0, 0.0), operator, y,
                                       torch.tensor([0.1])))
        cost.append(operator.calls[0])
    assert cost[0] == cost[1] < 10
    torch.testing.assert_close(found[0], found[1])


def test_the_command_line_names_no_operator() -> None:
    names = {kind for kind in invflow.operators.names()}
    words = names | {plugins.kebab(kind) for kind in names if "-" in plugins.kebab(kind)}
    folder = Path(invflow.__file__).parent / "cli"
    for file in ("operators.py", "image_task.py", "results.py"):
        text = (folder / file).read_text(encoding="utf-8").split('"""', 2)[2]
        code = "\n".join(line for line in text.splitlines() if "``" not in line and "such as" not in line)
        assert not [word for word in words if f'"{word}"' in code], file


# -- other people's solvers ----------------------------------------------------------------------------------------


def test_a_solver_class_is_built_on_the_prior_and_its_settings_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(invflow.Solver):
        """The prior's own draws."""

        def __init__(self, prior: invflow.FlowMap, *, steps: int = 1) -> None:
            self.prior, self.steps = prior, steps

    class NoPrior(invflow.Solver):
        """Nothing at all."""

        def __init__(self, *, size: int = 1) -> None:
            self.size = size

    module = type(sys)("their_solvers")
    module.Plain, module.NoPrior, module.other = Plain, NoPrior, 3  # type: ignore[attr-defined]
    module.__all__ = ["Plain", "NoPrior", "other"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "their_solvers", module)
    install(monkeypatch, "their_solvers", "invflow.solvers")
    try:
        with pytest.warns(UserWarning, match="'other' .* left out: it is 3, not a Solver"):
            assert list_solvers()["plain"].description == "The prior's own draws."
        built = solver_by_name("Plain", invflow.load_problem("gaussian/linear"), steps=3)
        assert isinstance(built, Plain)
        assert built.steps == 3
        assert isinstance(solver_by_name("no-prior", "mnist"), NoPrior)  # the prior is not even loaded
        with pytest.raises(ValueError, match="no setting 'step': it has steps"):
            solver_by_name("plain", invflow.load_problem("gaussian/linear"), step=3)
        with pytest.raises(ValueError, match="steps of the solver 'plain' is 'many': it takes int, such as steps=1"):
            solver_by_name("plain", invflow.load_problem("gaussian/linear"), steps="many")
    finally:
        plugins.offers.cache_clear()


def test_a_prior_by_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_priors.py").write_text(
        "import torch, invflow\nwide = lambda: invflow.GaussianMixtureFlow(torch.zeros(1, 2), std=3.0)\nnumber = 7\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert float(invflow.load_prior("my_priors:wide").generate(4000, generator=torch.Generator().manual_seed(0)).std()
                 ) == pytest.approx(3, rel=0.05)
    assert sys.path == before
    for name, words in (("my_priors:number", "not a FlowMap"), ("my_priors:nothing", "cannot be imported"),
                        ("no_such_module:x", "installed or in the current folder")):
        with pytest.raises((ValueError, TypeError), match=words):
            invflow.load_prior(name)
    options = ("gaussian/linear", "--solver", "exact", "--prior", "my_priors:wide")
    run("solve", *options, "--samples", 500, "--output", "solved")
    wide = invflow.Posterior.load("solved/posterior.safetensors")
    run("solve", *options[:3], "--samples", 500, "--output", "plain")
    plain = invflow.Posterior.load("plain/posterior.safetensors")
    assert wide.std().mean() > 1.5 * plain.std().mean()
    run("compare", *options, "--observations", 2, "--samples", 8, "--output", "compared")
    run("calibrate", *options, "--simulations", 20, "--samples", 9, "--output", "calibrated")
    with pytest.raises(ValueError, match="is a GaussianMixtureFlow, but training starts from a NeuralFlowMap"):
        load_trainable("my_priors:wide")
    assert "has images (2,)" in refuse("solve", "mnist/denoising", "--solver", "fmtt", "--prior", "my_priors:wide")


# -- sample files, version -----------------------------------------------------------------------------------------


def test_the_sample_files_are_what_the_documentation_names(tmp_path: Path) -> None:
    out, _ = run("examples", tmp_path / "deep" / "files")
    assert "invflow solve --image" in out
    names = {file.name for file in (tmp_path / "deep" / "files").iterdir()}
    root = Path(__file__).resolve().parents[2]
    named = set()
    for page in (root / "README.md", *(root / "docs" / f"{name}.md" for name in ("index", "cli", "photographs"))):
        text = page.read_text(encoding="utf-8")
        named |= set(re.findall(r"(?:--image|--mask|--kernel|restore) (\w+\.(?!fits)\w+)", text))
        named -= {"paint.png", *re.findall(r"--output (\w+\.\w+)", text)}  # which the reader paints, and what is made
    assert named <= names
    assert read_image(tmp_path / "deep" / "files" / "digit.png").shape == (1, 28, 28)
    assert read_kernel(tmp_path / "deep" / "files" / "kernel.npy").shape == (21, 21)
    hidden = (read_mask(tmp_path / "deep" / "files" / "mask.png", (3, 192, 240)) == 0).expand(3, -1, -1)
    assert (read_image(tmp_path / "deep" / "files" / "damaged.png")[hidden] == 0).all()
    scratched = (read_mask(tmp_path / "deep" / "files" / "scratches.png", (3, 192, 240)) == 0).expand(3, -1, -1)
    assert 0.02 < scratched.float().mean() < 0.1
    assert read_image(tmp_path / "deep" / "files" / "scratched.jpg")[scratched].mean() > 0.9
    assert "pass another folder" in refuse("examples", tmp_path / "deep" / "files")


def test_sample_files_are_the_same_each_time(tmp_path: Path) -> None:
    first, second = write_examples(tmp_path / "a"), write_examples(tmp_path / "b")
    assert [a.read_bytes() == b.read_bytes() for a, b in zip(first, second)] == [True] * len(first)


def test_version() -> None:
    assert run("--version")[0] == f"invflow {invflow.__version__}\n"


# -- what is closed, what is too much ------------------------------------------------------------------------------


def shell(line: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = line.replace("invflow", f"{sys.executable} -m invflow", 1)
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd=folder, timeout=300,
                          env={**os.environ, **variables})


@pytest.mark.parametrize("stream", ["2>&-", "2>/dev/full", "2> >(exit)"])
def test_nobody_need_listen_to_notes(tmp_path: Path, stream: str) -> None:
    compared = shell("invflow compare gaussian/linear --solver exact --observations 4 --samples 8 --output 'an é' "
                     f"{stream}", tmp_path)
    assert compared.returncode == 0, compared.stderr
    assert (tmp_path / "an é" / "report.html").is_file()


def test_calibrate_and_train_go_on_without_a_standard_error(tmp_path: Path) -> None:
    assert shell("invflow calibrate gaussian/linear --solver exact --simulations 20 --samples 9 --output c 2>&-",
                 tmp_path).returncode == 0
    assert (tmp_path / "c" / "certificate.md").is_file()
    assert shell("invflow train checkerboard --steps 2 --batch-size 8 --output t 2>&-", tmp_path).returncode == 0


def test_a_reader_that_stops_reading_is_no_error(tmp_path: Path) -> None:
    result = shell("invflow list | head -n 1", tmp_path)
    assert result.stdout.splitlines() == ["priors"]
    assert "error" not in result.stderr


@pytest.mark.parametrize(("locale", "plain"), [
    ("C", {}), ("C", {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),  # the second as Python was before it knew better
])
def test_paths_with_accents_under_a_plain_locale(tmp_path: Path, locale: str, plain: dict[str, str]) -> None:
    folder = tmp_path / "données"
    folder.mkdir()
    write_examples(folder)
    result = shell("invflow solve --image 'données/digit.png' --operator denoising --solver lmmse --samples 4 --output "
                   "'données/gelöst'", tmp_path, LC_ALL=locale, **plain)
    assert result.returncode == 0, result.stderr
    assert invflow.Posterior.load(folder / "gelöst" / "posterior.safetensors").samples.shape == (1, 4, 1, 28, 28)
    assert (folder / "gelöst" / "restored.png").is_file()


@pytest.mark.parametrize("command", [("solve", "gaussian/linear"), ("calibrate", "gaussian/linear")])
def test_one_process_does_what_is_not_shared(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun started 2" in refuse(*command)


@pytest.mark.parametrize(("line", "words"), [
    ("solve gaussian/linear --solver exact --samples 1000000000000", "not enough memory"),
    ("solve gaussian/linear --solver exact --device meta", "'meta' cannot be used"),
    ("solve gaussian/linear --solver fmtt --set steps=abc", "steps of the solver 'fmtt' is 'abc': it takes int"),
    ("solve gaussian/linear --solver fmtt --set steps=null", "is None: it takes int"),
    ("solve gaussian/linear --solver noise-smc --set ess_threshold=abc", "it takes float"),
    ("solve gaussian/linear --solver exact --seed 99999999999999999999999", "--seed"),
    ("solve mnist/denoising --solver fmtt --prior photos", "(3, 64, 64), but the problem 'mnist/denoising' has (1, 28"),
    ("solve mnist", "there are mnist/box-inpainting"),
    ("solve mnist/tilt-3 --solver vfm", "--solver fmtt"),
    ("calibrate gaussian/linear --solver exact --simulations 100000000000", "not enough memory"),
    ("calibrate gaussian/linear --solver exact --simulations 2 --samples 100000000000", "do not fit into memory"),
    ("train checkerboard --set log_every=0 --output OUT", "log_every is 0: pass at least 1"),
    ("train checkerboard --set batch_size=abc --output OUT", "batch_size is 'abc': pass a whole number"),
    ("train checkerboard --set learning_rate=nan --output OUT", "learning_rate is 'nan': pass a number"),
    ("train checkerboard --precision fp64 --output OUT", "'no', 'bf16' or 'fp16'"),
])
def test_a_line_that_asks_too_much_is_answered_in_one(line: str, words: str, tmp_path: Path) -> None:
    assert words in refuse(*line.replace("OUT", str(tmp_path / "out")).split())


def test_any_error_is_one_line_that_says_where_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise KeyError("of a plug-in")

    monkeypatch.setattr("invflow.problem.load_problem", fail)
    assert "KeyError: 'of a plug-in'; INVFLOW_DEBUG=1 shows where" in refuse("solve", "gaussian/linear")


def test_notes_count_observations_as_tables_do() -> None:
    from invflow.cli.options import _counted_from_one

    assert _counted_from_one("in observation 0, 1 of 4 observations") == "in observation 1, 1 of 4 observations"


def test_labels_are_text_in_every_table(tmp_path: Path) -> None:
    """No label is a formula in a spreadsheet, and none breaks a table's row or cell."""
    import csv
    import io

    exact = invflow.load_problem("gaussian/linear").exact_posterior()
    labels = ["=1+1", "+a", "-a", "@a", "a|b", "a\nb"]
    found = invflow.compare("gaussian/linear", {label: exact for label in labels}, num_observations=2, num_samples=4)
    for text in (found.to_csv(), found.observations_csv()):
        column = [row["solver"] for row in csv.DictReader(io.StringIO(text))]
        assert list(dict.fromkeys(column)) == ["'=1+1", "'+a", "'-a", "'@a", "a|b", "a\nb"]
        assert all(float(row.get("value") or row["mean"]) > -1e9 for row in csv.DictReader(io.StringIO(text)))
    table = [line for line in found.to_markdown().splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(labels)
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert any(line.startswith("| a\\|b |") for line in table)
    assert any(line.startswith("| a b |") for line in table)


# -- a prior and a solver of one's own -----------------------------------------------------------------------------


def test_compare_takes_a_prior_and_solvers_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_parts.py").write_text("""
import torch, invflow

def prior():
    return invflow.GaussianMixtureFlow(torch.tensor([[0.0, 0.0], [2.0, 1.0]]), std=0.5)

class Guess(invflow.Solver):
    def __init__(self, prior, *, scale: float = 1.0):
        self.prior, self.scale = prior, scale
    def _sample(self, reward, n, generator, progress):
        count = reward.num_observations
        x = self.prior.generate(count * n, generator=generator).unflatten(0, (count, n))
        return invflow.Posterior(self.scale * x)

def of_the_problem(problem):
    return problem.exact_posterior()
""", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_parts", raising=False)
    own = ["--prior", "own_parts:prior", "--observations", 6, "--samples", 24]
    run("compare", "gaussian/linear", "--solver", "guess=own_parts:Guess", "--solver", "own_parts:Guess:scale=0.5",
        "--solver", "exact=own_parts:of_the_problem", *own, "--output", "out")
    found = invflow.Comparison.load("out")
    assert list(found.solvers) == ["guess", "own_parts:Guess:scale=0.5", "exact"]
    assert found.failures["gaussian/linear"] == {}
    assert found.descriptions["gaussian/linear"]["prior"] == "own_parts:prior"
    assert found.leaders("gaussian/linear", "sliced_wasserstein")[-1] == "exact"
    run("solve", "gaussian/linear", "--solver", "own_parts:Guess", "--samples", 4, "--set", "scale=2", "--output", "a")
    for wrong, words in (("own_parts:torch", "is a module: expected a solver class"),
                         ("nowhere:Guess", "No module named 'nowhere'; pass package.module:name"),
                         ("fmtt:steps", "takes NAME=VALUE")):
        assert words in refuse("compare", "gaussian/linear", "--solver", wrong, "--output", "none")


def test_few_numbers_get_many_samples_and_means_their_errors(tmp_path: Path) -> None:
    output, _ = run("solve", "gaussian/linear", "--solver", "exact", "--observations", 3, "--output", tmp_path)
    assert "1024 samples for each observation" in output
    found = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    for name, values in found["per_observation"].items():
        assert found["standard_error"][name] == pytest.approx(np.std(values, ddof=1) / 3**0.5)
    row = next(line for line in output.splitlines() if line.startswith("standard error"))
    assert row.split()[2:4] == [f"{found['standard_error']['rmse']:.3f}", f"{found['standard_error']['crps']:.4f}"]
    output, _ = run("solve", "gaussian/linear", "--solver", "exact", "--observations", 1, "--output", tmp_path)
    assert "standard error" not in output  # of a single one there is none


def test_a_file_is_no_problem(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"")
    words = refuse("solve", tmp_path / "photo.jpg")
    assert "is a file, not a problem" in words
    assert f"invflow restore {tmp_path / 'photo.jpg'}" in words
