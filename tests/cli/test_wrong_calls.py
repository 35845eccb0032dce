"""Common mistakes of users: each error names what was passed and the call that works."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import invflow
from invflow._core.checks import check_setting
from invflow._core.explained import explained
from invflow.cli.entry import app
from invflow.cli.examples import write_examples
from invflow.metrics import coverage, crps, psnr, spread, ssim
from invflow.operators import (
    BoxInpainting,
    Denoising,
    GaussianBlur,
    MaskInpainting,
    MatrixOperator,
    SuperResolution,
)

SHAPE = (1, 28, 28)
OPERATOR = Denoising(SHAPE)
MIXTURE = invflow.GaussianMixtureFlow(torch.zeros(1, 1, 8, 8), std=1.0)


class Forgetful(invflow.Operator):
    def __init__(self, image_shape: tuple[int, ...] = SHAPE) -> None:
        self.image_shape = self.measurement_shape = image_shape

    def forward(self, x: Tensor) -> Tensor:
        return x


class ForgetfulWithBuffer(Forgetful):
    def __init__(self) -> None:
        self.register_buffer("gain", torch.ones(1))


class EarlyModule(Forgetful):
    def __init__(self) -> None:
        self.net = torch.nn.Linear(2, 2)
        super().__init__()


class EarlyParameter(Forgetful):
    def __init__(self) -> None:
        self.gain = torch.nn.Parameter(torch.ones(1))
        super().__init__()


class ForgetfulMap(invflow.FlowMap):
    def __init__(self) -> None:
        self.state_shape = self.image_shape = (2,)

    def velocity(self, x: Tensor, t: Any) -> Tensor:
        return -x


class EarlyMap(ForgetfulMap):
    def __init__(self) -> None:
        self.net = torch.nn.Linear(2, 2)
        super().__init__()


class NumPyInside(invflow.Operator):
    image_shape = measurement_shape = SHAPE

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.flip(x.numpy(), -1).copy())


class FlipsByNumPy(NumPyInside):
    def forward(self, x: Tensor) -> Any:
        return np.flip(x, -1)


class GivesNumPy(NumPyInside):
    def forward(self, x: Tensor) -> Any:
        return x.numpy()


class NoMeasurementShape(invflow.Operator):
    image_shape = SHAPE

    def forward(self, x: Tensor) -> Tensor:
        return x


class WrongMeasurementShape(NumPyInside):
    measurement_shape = (1, 14, 14)

    def forward(self, x: Tensor) -> Tensor:
        return x


def images() -> Tensor:
    return torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0))


def posterior() -> invflow.Posterior:
    return invflow.Posterior(torch.zeros(3, 4, 2))


def likelihood() -> invflow.GaussianLikelihood:
    return invflow.GaussianLikelihood(OPERATOR, images(), 0.1)


def pictures() -> invflow.Posterior:
    return invflow.Posterior(torch.rand(2, 20, *SHAPE, generator=torch.Generator().manual_seed(1)))


def gaussian() -> invflow.Problem:
    return invflow.load_problem("gaussian/linear")


BYTES = (255 * images()[0, 0]).numpy().astype("uint8")
CALLS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    # arrays and pictures: floats are not told to divide by 255, and colours at the end are moved
    (lambda: OPERATOR(images().numpy()), ValueError, r"ndarray of float32 .*torch.as_tensor\(x\)\.float\(\)$"),
    (lambda: OPERATOR(BYTES), ValueError, r"shape \(28, 28\).*as_tensor\(x\)\[None, None\]\.float\(\) / 255$"),
    (lambda: OPERATOR(np.zeros((28, 28, 3), "uint8")), ValueError, r"movedim\(-1, -3\)\[None\]\.float\(\) / 255"),
    (lambda: OPERATOR(Image.fromarray(BYTES)), ValueError, r"to_tensor\(x\)\[None\], or read its file"),
    (lambda: OPERATOR.measure(images().numpy(), 0.1), ValueError, "ndarray of float32"),
    (lambda: invflow.GaussianLikelihood(OPERATOR, images().numpy(), 0.1), ValueError, r"as_tensor\(y\)\.float\(\)$"),
    (lambda: invflow.GaussianLikelihood(OPERATOR, (255 * images()).byte(), 0.1), ValueError, r"y.float\(\) / 255"),
    (lambda: invflow.GaussianLikelihood(Denoising, images(), 0.1), TypeError, r"pass Denoising\(image_shape\)"),
    # a setting in the shape's place
    (lambda: BoxInpainting(box=14), TypeError, r"needs image_shape, .* as in BoxInpainting\(\(1, 28, 28\), box=14\)"),
    (lambda: SuperResolution(4), ValueError, r"image_shape is 4: .* SuperResolution\(\(1, 28, 28\), factor=4\)"),
    (lambda: SuperResolution(SHAPE, "4"), ValueError, "super-resolution by '4'"),
    (lambda: BoxInpainting(14), ValueError, r"image_shape is 14: .* box=\(14, 14\)\)"),
    (lambda: GaussianBlur(2.0), ValueError, r"image_shape is 2.0: .* std=2.0\)"),
    (lambda: Denoising(28), ValueError, r"Denoising\(\(1, 28, 28\)\)"),
    (lambda: GaussianBlur(SHAPE, kernel_size=10**6), ValueError, "the images only .* such as kernel_size=9"),
    # names and lists
    (lambda: invflow.calibrate(invflow.VFM, "gaussian/linear"), TypeError, r"invflow.calibrate\('exact', 'gau"),
    (lambda: invflow.calibrate("exact", 3), TypeError, "a solver and a problem, not 'exact' and 3"),
    (lambda: invflow.compare("gaussian/linear", invflow.ExactPosterior(MIXTURE)), ValueError, r"\[solver\], or {"),
    (lambda: invflow.load_problem("mnist"), ValueError, "there are mnist/box-inpainting, mnist/denoising"),
    # an operator that forgets something
    (lambda: Forgetful()(images()), AttributeError, r"does not begin with super\(\).__init__\(\)"),
    (lambda: ForgetfulWithBuffer(), AttributeError, r"no 'gain', .* super\(\).__init__\(\)"),
    (lambda: NumPyInside()(images().requires_grad_()), TypeError, "NumPyInside.forward leaves torch.*MatrixOperator"),
    (lambda: FlipsByNumPy()(images()), TypeError, "FlipsByNumPy.forward leaves torch"),
    (lambda: GivesNumPy()(images()), ValueError, r"returned a ndarray for images \(2, 1, 28, 28\)"),
    (lambda: NoMeasurementShape()(images()), AttributeError, "write self.measurement_shape = "),
    (lambda: invflow.GaussianLikelihood(NoMeasurementShape(), images(), 0.1), AttributeError,
     "does not set measurement_sh"),
    (lambda: WrongMeasurementShape()(images()), ValueError, r"returned \(2, 1, 28, 28\) .*\(2, 1, 14, 14"),
    # other words for what there is
    (lambda: invflow.NeuralFlowMap((2,), network="none").sample(4), AttributeError, r"prior.generate\(4, gen"),
    (lambda: posterior()[0], TypeError, r"posterior.select\(0\) .*posterior.samples\[0\]"),
    (lambda: list(posterior()), TypeError, r"posterior.select\(0\)"),
    (lambda: invflow.VFM.load("mnist").sample(invflow.FunctionReward(lambda x: x.sum((1, 2, 3))), 2), ValueError,
     r"a FunctionReward has no measurement .* invflow.FMTT\(prior\)"),
    # figures, metrics and files are given pictures, bytes, lists, whole posteriors
    (lambda: pictures().plot(Image.fromarray(BYTES)), TypeError,
     r"truth is an image of PIL.*to_tensor\(truth\)\[None"),
    (lambda: pictures().plot(BYTES), TypeError,
     r"truth is a ndarray of uint8.*as_tensor\(truth\)\[None, None\].*/ 255"),
    (lambda: pictures().plot((255 * images()).byte()), TypeError, r"truth.float\(\) / 255"),
    (lambda: pictures().plot(list(images())), TypeError, r"truth is a list of 2 Tensor: .*torch.stack\(truth\)"),
    (lambda: pictures().select(0).plot(images()[0]), ValueError, r"shape \(1, 28, 28\), .*pass truth\[None\]"),
    (lambda: pictures().plot(images(), Image.fromarray(BYTES)), TypeError, r"observation is an image of PIL"),
    (lambda: psnr(Image.fromarray(BYTES), images()), TypeError, r"x is an image of PIL.*to_tensor\(x\)\[None\]"),
    (lambda: psnr(BYTES[None, None], images()[:1]), TypeError, r"x is a ndarray of uint8 .*\.float\(\) / 255"),
    (lambda: psnr(pictures(), images()), TypeError, r"x of psnr is a Posterior.*x=posterior.samples.*mean\(\)"),
    (lambda: psnr(images(), images()[0]), ValueError,
     r"psnr: images \(2, 1, 28, 28\) do not fit the truth \(1, 28, 28\)"),
    (lambda: psnr(images()), TypeError, "psnr: missing a required argument: 'truth'; it takes x, truth, data_range"),
    (lambda: ssim(list(images()), images()), TypeError, r"x is a list of 2 Tensor: pass one tensor, torch.stack\(x\)"),
    (lambda: crps(pictures(), images()), TypeError, r"samples of crps is a Posterior: .*samples=posterior.samples"),
    (lambda: coverage(pictures(), images()), TypeError, r"samples of coverage is a Posterior"),
    (lambda: coverage(pictures().samples, images(), 90), ValueError, "level=90: .* between 0 and 1, such as 0.9"),
    (lambda: coverage(pictures().samples, images(), "0.9"), TypeError, "level of coverage is '0.9'.*such as level=0.9"),
    (lambda: spread(pictures()), TypeError, r"samples of spread is a Posterior"),
    (lambda: invflow.Posterior(Image.fromarray(BYTES)), TypeError, r"samples is an image of PIL"),
    (lambda: invflow.imageio.read_image(BYTES), TypeError, r"path of read_image is a ndarray of shape \(28, 28\)"),
    (lambda: invflow.imageio.write_image(images(), "a.png"), ValueError, r"one image of the batch, image\[0\]"),
    # what is of the wrong kind, or is no number
    (lambda: invflow.GaussianLikelihood(OPERATOR, images(), "0.1"), TypeError, "sigma is '0.1': .* sigma=0.1"),
    (lambda: invflow.GaussianLikelihood(images(), OPERATOR, 0.1), TypeError, r"is a tensor of shape \(2, 1, 28, 28\)"),
    (lambda: invflow.GaussianLikelihood(OPERATOR, list(images()), 0.1), ValueError, r"torch.stack\(y\)"),
    (lambda: likelihood()(images()[:, None].numpy()), TypeError, r"x is a ndarray of float32 .*torch.as_tensor\(x\)"),
    (lambda: likelihood().simulate(images().numpy()), TypeError, r"x is a ndarray of float32"),
    (lambda: OPERATOR(list(images())), ValueError, r"x is a list of 2 Tensor: .*torch.stack\(x\)"),
    (lambda: OPERATOR(images()[0]), ValueError, r"x has shape \(1, 28, 28\).*: pass x\[None\]"),
    (lambda: OPERATOR(images()[0, 0]), ValueError, r"x has shape \(28, 28\).*: pass x\[None, None\]"),
    (lambda: OPERATOR.measure(images()), TypeError, r"missing a required argument: 'sigma'.*measure\(x, sigma=0.05"),
    (lambda: OPERATOR.adjoint(images().numpy()), ValueError, r"y is a ndarray of float32"),
    (lambda: OPERATOR.to("gpu"), ValueError, "there is no device 'gpu': pass 'cpu', 'cuda'"),
    (lambda: likelihood().to("gpu"), ValueError, "there is no device 'gpu'"),
    (lambda: MIXTURE.to("cuda0"), ValueError, "there is no device 'cuda0'"),
    (lambda: SuperResolution(images(), factor=2), ValueError,
     r"is a Tensor of shape \(2, 1, 28, 28\).*images.shape\[1:\]"),
    (lambda: BoxInpainting(SHAPE, box=0.5), ValueError, r"box=0.5: pass \(height, width\)"),
    (lambda: GaussianBlur(SHAPE, std="2"), TypeError, "std of GaussianBlur is '2', expected a number.*std=2.0"),
    (lambda: GaussianBlur(SHAPE, sigma=2), TypeError, "unexpected keyword argument 'sigma'; it takes image_shape, std"),
    (lambda: MatrixOperator(torch.eye(4), image_shape=4), ValueError, r"image_shape is 4: .*image_shape=\(784,\)"),
    (lambda: MaskInpainting(SHAPE, mask=BYTES > 0), TypeError,
     "multiple values for argument 'mask'; it takes mask, im"),
    (lambda: invflow.FunctionReward(3), TypeError, "takes a function of images, not 3, as in invflow.FunctionReward"),
    (lambda: invflow.GaussianMixtureFlow(torch.zeros(2, 2), std="1"), TypeError, "std of GaussianMixtureFlow is '1'"),
    (lambda: MIXTURE.generate(2.0), TypeError, r"n of .*generate is 2.0, expected a whole number, such as n=2"),
    (lambda: MIXTURE.generate(2, steps="1"), TypeError, r"steps of .*generate is '1'.*such as steps=1"),
    (lambda: MIXTURE.generate(images()), TypeError, r"n of .* is a Tensor of shape \(2, 1, 28, 28\)"),
    (lambda: MIXTURE.velocity(torch.zeros(1, 8, 8), 0.5), ValueError, r"x has shape \(1, 8, 8\).*pass x\[None\]"),
    (lambda: MIXTURE.jump(np.zeros((2, 1, 8, 8)), 0.0, 1.0), TypeError, "x is a ndarray of float64"),
    (lambda: gaussian().simulate("4"), TypeError, r"num_observations of .* is '4', .* such as num_observations=4"),
    (lambda: gaussian().simulate(images().numpy()), TypeError,
     r"is a ndarray of shape \(2, 1, 28, 28\), expected a whole"),
    (lambda: gaussian().simulate(4, generator="0"), TypeError, "generator='0': pass a torch.Generator"),
    (lambda: invflow.Problem("mnist", OPERATOR, 0.1), TypeError,
     "second argument is the name of a prior or None, not De"),
    (lambda: invflow.Problem("mnist"), TypeError, "missing a required argument: 'prior_name'.*as in invflow.Problem"),
    (lambda: posterior().interval("0.9"), TypeError, r"level of Posterior.interval is '0.9'.*such as level=0.9"),
    (lambda: posterior().quantile([0.05, 0.95]), TypeError, r"is \[0.05, 0.95\], expected a number, as in"),
    (lambda: posterior().select("0"), TypeError, r"index of Posterior.select is '0'.*such as index=0"),
    (lambda: posterior().select(7), ValueError, "index 7 does not fit 3 rows"),
    (lambda: posterior().resample(4.0), TypeError, "n of Posterior.resample is 4.0.*such as n=4"),
    (lambda: posterior().save(3), TypeError, r"path of Posterior.save is 3.*save\('posterior.safetensors'\)"),
    (lambda: posterior().shape, AttributeError, r"a Posterior has no 'shape': posterior.samples"),
    (lambda: posterior().numpy(), AttributeError, r"a Posterior has no 'numpy': posterior.samples"),
    # exchanged, forgotten or misspelt
    (lambda: invflow.calibrate("gaussian/linear", "exact"), TypeError,
     r"the solver first and then the problem.*invflow.calibrate\('exact', 'gaussian/linear'\)"),
    (lambda: invflow.calibrate(gaussian(), invflow.ExactPosterior(MIXTURE)), TypeError,
     r"calibrate\(solver, problem\)"),
    (lambda: invflow.calibrate("exact"), TypeError, "missing a required argument: 'problem'.*as in invflow.calibrate"),
    (lambda: invflow.calibrate("exact", gaussian(), num_simulations="9"), TypeError, "num_simulations=9"),
    (lambda: invflow.calibrate(invflow.VFM.load("mnist"), gaussian()), ValueError,
     r"of this VFM has images \(1, 28, 28\), but the problem 'gaussian/linear' has \(2,\)"),
    (lambda: invflow.compare(["exact"], "gaussian/linear"), ValueError, "there is no problem 'exact'"),
    (lambda: invflow.compare("exact", "gaussian/linear"), TypeError, "takes the problems first and then the solvers"),
    (lambda: invflow.compare({"a": "exact"}, gaussian()), TypeError, "takes the problems first and then the solvers"),
    (lambda: invflow.compare("gaussian/linear", ["exact"], num_observations=10**12), MemoryError, "smaller num_obs"),
    (lambda: invflow.compare("gaussian/linear", {"a": invflow.FMTT}), TypeError, r"lambda problem: invflow.FMTT\("),
    (lambda: invflow.compare("gaussian/linear"), TypeError, "missing a required argument: 'solvers'"),
    (lambda: invflow.VFM("mnist"), TypeError, r"missing a required argument: 'adapter'.*invflow.VFM.load\('mnist'\)"),
    (lambda: invflow.VFM(MIXTURE, MIXTURE), TypeError, r"takes a map and then its adapter, .*VFM\(prior, adapter\)"),
    (lambda: invflow.VFM.load("mnist", device="cuda"), TypeError,
     "unexpected keyword argument 'device'; it takes name"),
    (lambda: invflow.load_prior("mnist-vfm"), ValueError,
     r"'flow-map' was expected: load it with invflow.VFM.load\('mnist'\)"),
    (lambda: invflow.load_prior(MIXTURE), TypeError,
     r"name of load_prior is GaussianMixtureFlow.*load_prior\('mnist'\)"),
    (lambda: invflow.load_problem(gaussian()), TypeError, r"name of load_problem is Problem\('gaussian/linear'"),
    (lambda: invflow.load_problem("mnist/inpainting"), ValueError, "did you mean 'mnist/box-inpainting'"),
    (lambda: invflow.FMTT(MIXTURE, particles=4), TypeError,
     "unexpected keyword argument 'particles'; it takes prior, s"),
    (lambda: invflow.FMTT(MIXTURE, steps="50"), TypeError, "steps of FMTT is '50', expected a whole number.*steps=50"),
    (lambda: invflow.FMTT("mnist"), TypeError, r"not a str: pass one, such as invflow.load_prior\('mnist'\)"),
    (lambda: invflow.NoiseSMC(), TypeError, "NoiseSMC: missing a required argument: 'prior'; it takes prior, prop"),
    (lambda: invflow.ExactPosterior(MIXTURE).sample(likelihood(), 4, seed=0), TypeError,
     r"unexpected keyword argument 'seed'; .*solver.sample\(likelihood, 64, generator=generator\)"),
    (lambda: invflow.ExactPosterior(MIXTURE).sample(images(), 4), TypeError,
     r"GaussianLikelihood\(operator, y, sigma\)"),
    (lambda: invflow.ExactPosterior(MIXTURE).sample(gaussian(), 4), TypeError, r"likelihood = problem.simulate\(4\)"),
    (lambda: invflow.ExactPosterior(MIXTURE).sample(likelihood(), "4"), TypeError,
     "num_samples is '4': ask for a whole"),
    (lambda: invflow.Vfm, AttributeError, "did you mean invflow.VFM"),
    (lambda: EarlyModule(), AttributeError,
     r"EarlyModule sets self.net, .* does not begin with super\(\).__init__\(\)"),
    (lambda: EarlyParameter(), AttributeError, "EarlyParameter sets self.gain"),
    (lambda: EarlyMap(), AttributeError, r"EarlyMap sets self.net, .* does not begin with super\(\).__init__\(\)"),
    (lambda: ForgetfulMap().generate(2), AttributeError, r"does not begin with super\(\).__init__\(\)"),
]


@pytest.mark.parametrize(("call", "error", "words"), CALLS)
def test_a_wrong_call_is_answered(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


#: what is typed at the command line, and words of the answer
COMMANDS = [
    ("solve mnist", "there are mnist/box-inpainting"),
    ("solve mnist/box-inpaint", "did you mean 'mnist/box-inpainting'"),
    ("solve photo.jpg", "is a file, not a problem: pass --image photo.jpg"), ("solve", "pass a problem, such as"),
    ("solve --image photo.jpg", "--image needs --operator NAME"), ("solve vfm", "vfm is a solver.*--solver vfm"),
    ("solve --image photo.jpg --operator bluring", "did you mean 'blur'"),
    ("solve --image photo.jpg --operator denoising --sigma 25", r"a scale of 0 to 255, pass sigma=0.098"),
    ("solve --image photo.jpg --operator gaussian-blur --operator-set sigma=2", "no setting 'sigma': it has std"),
    ("solve --image photo.jpg --operator gaussian-blur --operator-set std", "NAME=VALUE, such as --operator-set std=2"),
    ("solve --image photo.jpg --operator denoising --prior mnist", "pass --resize"),
    ("solve mnist/denoising --solver fmttt", "did you mean 'fmtt'"),
    ("solve mnist/denoising --solver exact", "such as 'gaussian/linear'"),
    ("solve mnist/denoising --set step=4", "no setting 'step': it has steps"),
    ("solve mnist/denoising --set steps=four", "'four': it takes int"),
    ("solve mnist/denoising --samples many", "valid integer"), ("solve mnist/denoising --device gpu", "'gpu'.*cuda"),
    ("solve mnist/denoising --sigma 0.1", "--sigma belongs to --image"),
    ("solve mnist/tilt-3 --solver vfm", "--solver fmtt"), ("solve mnist/denoising --prior nothing", "Known: cifar10"),
    ("compare mnist/denoising", "pass at least one --solver, such as --solver vfm"),
    ("compare vfm --solver lmmse", "vfm is a solver, not a problem: pass it as --solver vfm"),
    ("compare mnist/denoising --solver mnist/denoising", "is a problem, not a solver: solvers are"),
    ("compare mnist/denoising --solver vfm,lmmse", "one at a time, --solver vfm --solver lmmse"),
    ("compare mnist/denoising --solver no_module:Solver", "pass package.module:name"),
    ("calibrate exact", "exact is a solver, not a problem: pass it as --solver exact"),
    ("calibrate gaussian/linear --solver exakt", "did you mean 'exact'"),
    ("calibrate gaussian/linear --solver vfm", "use --solver exact, fmtt or noise-smc"),
    ("restore nothing.jpg", "there is no file 'nothing.jpg'"), ("restore", "Missing argument 'source'"),
    ("restore photo.jpg --factor 7", "enlarges by 2, 3, 4"), ("restore photo.jpg --sigma 25", "pass 0.098"),
    ("restore photo.jpg --mask photo.jpg", "looks like a photograph, not like a mask"),
    ("restore photo.jpg --mask mask.png --kernel psf.png", "one at a time"),
    ("list problem", "did you mean 'problems'"),
    ("train mnsit", "did you mean 'mnist'"), ("train prior", "pass --data FOLDER"),
    ("denoise photo.jpg", "no command 'denoise': did you mean invflow restore"), ("photo.jpg", "invflow restore"),
    ("solv mnist", "did you mean invflow solve"), ("frobnicate", "There are solve, restore, compare"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("examples")
    write_examples(made)
    return made


@pytest.mark.parametrize(("line", "words"), COMMANDS)
def test_a_wrong_command_is_answered(line: str, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(app, line.split())
    said = " ".join(result.output.split())
    assert result.exit_code == 2
    assert re.search(words, said), said
    assert "Traceback" not in said


def test_what_can_be_meant_is_taken() -> None:
    x, samples = images(), pictures().samples
    assert torch.equal(psnr(x.numpy(), 0.5 * x.numpy()), psnr(x, 0.5 * x))
    assert torch.equal(crps(samples.numpy(), x.numpy()), crps(samples, x))
    assert torch.equal(coverage(samples.numpy(), x), coverage(samples, x))
    assert len(pictures().plot(x.numpy(), x.numpy()).axes) == len(pictures().plot(x, x).axes)
    assert torch.equal(invflow.Posterior(samples.numpy()).samples, samples)  # type: ignore[arg-type]
    assert int((~BoxInpainting(SHAPE, box=14).mask).sum()) == 14 * 14
    found = invflow.compare("gaussian/linear", ["exact", invflow.load_problem("gaussian/linear").exact_posterior()],
                            num_observations=2, num_samples=8)
    assert list(found.solvers) == ["exact", "ExactPosterior"]
    certificate = invflow.calibrate("exact", "gaussian/linear", num_simulations=20, num_samples=9)
    assert certificate.settings["problem"] == "gaussian/linear"


def test_bytes_as_floats_are_told_to_divide() -> None:
    with pytest.warns(UserWarning, match=r"truth has values up to 25\d.*pass truth / 255, or data_range=255"):
        psnr(images(), 255 * images())
    with pytest.warns(UserWarning, match=r"looks like \[0, 255\].*pass y / 255"):
        invflow.GaussianLikelihood(OPERATOR, 255 * images(), 0.1)


def test_errors_of_ones_own_are_left_alone() -> None:
    """Where all arguments are of the right kind, and where the library itself has spoken."""
    def broken(x: Tensor) -> Tensor:
        return x.no_such_thing  # type: ignore[no-any-return, attr-defined]

    @explained
    def call(count: int, then: Callable[[Tensor], Tensor]) -> Tensor:
        return then(torch.zeros(count))

    with pytest.raises(AttributeError, match="no_such_thing"):
        call(2, broken)
    with pytest.raises(TypeError, match="count of call is '2', expected a whole number, such as count=2"):
        call("2", broken)  # type: ignore[arg-type]


def test_metrics_are_pickled_under_their_names() -> None:
    assert pickle.loads(pickle.dumps(psnr)) is psnr


def test_forward_is_not_blamed_on_numpy_when_torch_fails() -> None:
    class Breaks(NumPyInside):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("of its own")

    with pytest.raises(RuntimeError, match=r"^of its own$"):
        Breaks()(images())


@pytest.mark.parametrize(("annotation", "value", "taken"), [
    ("int", 3, 3), ("int | None", None, None), ("float", 3, 3), ("tuple[int, int] | None", [3, 4], (3, 4)),
    ("float | tuple[float, float]", 0.5, 0.5), ("str", "a", "a"), ("Callable[[int], int]", 3, 3), ("bool", True, True),
    ("int", "abc", None), ("int", True, None), ("int", None, None), ("float", "nan", None), ("str | None", 3, None),
    ("tuple[int, int]", 3, None), ("int", 1.5, None),
])
def test_settings_are_of_the_kind_that_is_annotated(annotation: str, value: object, taken: object) -> None:
    import inspect

    parameter = inspect.Parameter("size", inspect.Parameter.KEYWORD_ONLY, default=7, annotation=annotation)
    if (taken is None and value is not None) or (value is None and "None" not in annotation):
        with pytest.raises(ValueError, match=rf"size of it is {value!r}: it takes .*size=7"):
            check_setting("it", "size", value, parameter)
    else:
        assert check_setting("it", "size", value, parameter) == taken
