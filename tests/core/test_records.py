"""One record on disk: it is read back unchanged, a changed one is rejected, and old files can be read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import invflow
from invflow._core.records import digest, read_record, write_record
from invflow.evaluation.certificate.certificate import Certificate
from invflow.evaluation.comparison import Comparison
from invflow.evaluation.results.parts import read_part

KIND = "invflow.thing/2"
PROBLEM = "gaussian/linear"


def plain_of(path: Path) -> dict:
    with safe_open(str(path), framework="pt") as file:
        return json.loads(file.metadata()["invflow"])


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(str(path), framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("tensors", [{"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor(True)}, {}, None])
def test_what_is_written_comes_back(tmp_path: Path, tensors) -> None:
    plain = {"one": 1, "list": (1, 2.5), "deep": {"x": None, 3: math.inf, "nan": math.nan}}
    whole = write_record(tmp_path / "r", KIND, plain, tensors)
    found, held = read_record(tmp_path / "r", KIND, tensors=None if tensors is None else True)
    assert found["digest"] == whole
    assert found["one"] == 1
    assert found["list"] == [1, 2.5]
    assert found["deep"]["3"] == math.inf
    assert math.isnan(found["deep"]["nan"])
    assert held.keys() == (tensors or {}).keys()
    assert all(torch.equal(held[key], value) for key, value in (tensors or {}).items())


def test_what_was_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    tensors = {"a": torch.rand(5), "b": torch.rand(2)}
    write_record(path, KIND, {"seed": 3, "name": "x"}, tensors)
    header = plain_of(path)
    without = {key: value for key, value in header.items() if key != "digest"}
    for changed, held in (({**header, "seed": 4}, tensors), (header, {**tensors, "a": tensors["a"] + 1}),
                          (header, {"a": tensors["a"]}), (without, tensors), ({**header, "more": 1}, tensors),
                          ({key: value for key, value in header.items() if key != "content"}, tensors)):
        save_file(held, path, {"invflow": json.dumps(changed)})
        with pytest.raises(ValueError, match="not as it was saved"):
            read_record(path, KIND)
    # without the tensors, the plain data are checked alone
    save_file({"a": tensors["a"] + 1}, path, {"invflow": json.dumps(header)})
    assert read_record(path, KIND, tensors=False)[0]["seed"] == 3
    with pytest.raises(ValueError, match=r"'invflow.thing/2', but this version of invflow reads invflow.other/1"):
        read_record(path, "invflow.other/1")


def certificate(folder: Path) -> Certificate:
    """Certificate of a posterior that is far too narrow."""
    problem = invflow.load_problem(PROBLEM)
    narrow = invflow.GaussianMixtureFlow(problem.prior.means, 0.1, problem.prior.log_weights.exp())
    return invflow.calibrate(invflow.ExactPosterior(narrow), problem, num_simulations=40, num_samples=9, source="data",
                             output=folder, generator=torch.Generator().manual_seed(0))


def test_an_edited_verdict_is_refused(tmp_path: Path) -> None:
    assert certificate(tmp_path).verdict == "fails"
    path = tmp_path / "certificate.json"
    text = path.read_text()
    path.write_text(text.replace('"verdict": "fails"', '"verdict": "passes"'))
    assert path.read_text() != text
    with pytest.raises(ValueError, match="not as it was saved"):
        Certificate.load(tmp_path)
    found = json.loads(path.read_text())
    del found["digest"]
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="not as it was saved"):
        Certificate.load(tmp_path)
    path.write_text(text)
    assert Certificate.load(tmp_path).verdict == "fails"
    # nor is the certificate of other simulations taken for theirs
    problem = invflow.load_problem(PROBLEM)
    invflow.calibrate(problem.exact_posterior(), problem, num_simulations=40, num_samples=9, output=tmp_path / "good",
                      generator=torch.Generator().manual_seed(0))
    path.write_text((tmp_path / "good" / "certificate.json").read_text())
    with pytest.raises(ValueError, match="does not belong to the simulations in its folder"):
        Certificate.load(tmp_path)


def test_an_edited_comparison_is_refused(tmp_path: Path) -> None:
    invflow.compare(PROBLEM, ["exact"], num_observations=2, num_samples=4, output=tmp_path)
    path = tmp_path / "comparison.json"
    found = json.loads(path.read_text())
    found["values"][PROBLEM]["exact"]["crps"][0] = 0.0
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="not as it was saved"):
        Comparison.load(tmp_path)


# -- what versions before wrote ----------------------------------------------------------------------------------------


def test_an_old_posterior_is_read(tmp_path: Path) -> None:
    path, tensors = tmp_path / "p.safetensors", {"samples": torch.rand(1, 3, 2), "diagnostics.k_hat": torch.rand(1)}
    header = {"format": "invflow.posterior/1", "nfe": {"forward": 2.0, "backward": 0.0}, "seconds": 1.0,
              "diagnostics": {}, "settings": {"solver": "FMTT"}, "versions": {"torch": "2"}}
    for known in ({}, {"digest": digest(tensors, header)}):  # the oldest have no digest
        save_file(tensors, path, {"invflow": json.dumps({**header, **known})})
        posterior = invflow.Posterior.load(path)
        assert torch.equal(posterior.samples, tensors["samples"])
        assert torch.equal(posterior.diagnostics["k_hat"], tensors["diagnostics.k_hat"])
        assert posterior.settings["versions"] == {"torch": "2"}
    save_file(tensors, path, {"invflow": json.dumps({**header, "seconds": 2.0, **known})})
    with pytest.raises(ValueError, match="not as it was saved"):
        invflow.Posterior.load(path)


def old_part(path: Path) -> None:
    """A part as versions up to 0.1.0 wrote it."""
    new, tensors = plain_of(path), tensors_of(path)
    setup = {key: value for key, value in new["setup"].items()
             if not key.startswith("content") and key not in ("stage", "versions")}
    header = {"format": "invflow.comparison.part/1", "setup": {**setup, "num_observations": 2}, "seed": new["seed"],
              "columns": new["columns"], "costs": new["costs"], "failure": None, "content": digest(tensors, {})}
    save_file(tensors, path, {"invflow": json.dumps({**header, "digest": digest({}, header)})})


def test_an_old_comparison_is_read_and_not_gone_on_with(tmp_path: Path) -> None:
    new = invflow.compare(PROBLEM, ["exact"], num_observations=2, num_samples=20, output=tmp_path)
    path, part = tmp_path / "comparison.json", next(tmp_path.glob("parts/*/*/*"))
    found = json.loads(path.read_text())
    del found["digest"], found["missing"]
    path.write_text(json.dumps({**found, "format": "invflow.comparison/1"}))
    old_part(part)
    read = Comparison.load(tmp_path)
    assert read.to_csv() == new.to_csv()
    assert torch.equal(read.examples(PROBLEM, "exact")["mean"], new.examples(PROBLEM, "exact")["mean"])
    assert read_part(part) is not None
    with pytest.raises(ValueError, match="did not record what determines a part"):
        invflow.compare(PROBLEM, ["exact"], num_observations=2, num_samples=20, output=tmp_path)


def test_an_old_certificate_is_read_and_judged_again(tmp_path: Path) -> None:
    from invflow.evaluation.certificate.judgement import judge

    new = certificate(tmp_path)
    path, record = tmp_path / "certificate.json", tmp_path / "simulations.safetensors"
    tensors = tensors_of(record)
    settings = {key: value for key, value in new.settings.items() if key not in ("content", "versions")}
    header = {"format": "invflow.certificate/1", "settings": settings}
    save_file(tensors, record, {"invflow": json.dumps({**header, "digest": digest(tensors, header)})})
    then = judge(tensors, new.settings["quantities"], 9, 0.05, merge=False)  # two quantities that are one, as two
    found = json.loads(path.read_text())
    del found["digest"], found["simulations"]
    for row, check in zip(found["judgement"]["checks"], then.checks, strict=True):
        row |= {"p_adjusted": check.p_adjusted, "passed": check.passed}
    found |= {"format": "invflow.certificate/1", "settings": settings}
    path.write_text(json.dumps(found))
    assert Certificate.load(tmp_path).verdict == "fails"
    found["judgement"]["verdict"] = "passes"
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="does not belong to the simulations"):
        Certificate.load(tmp_path)
