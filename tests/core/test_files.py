"""Files and folders on disk: permissions, leftovers of killed processes, locks, and unwritable places."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import invflow
from invflow._core.files import alone_in, check_writable, write_atomically
from invflow.cli.entry import app

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="modes, flock and kills are of POSIX")
PROBLEM = "gaussian/linear"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def text(path: str) -> None:
    Path(path).write_text("new")


def tensors(path: str) -> None:
    save_file({"a": torch.zeros(100)}, path)


def hold(folder: Path, code: str) -> subprocess.Popen[str]:
    """A process that runs some code in a folder, says so, and waits to be killed."""
    program = f"import sys, time\nfrom pathlib import Path\nfolder = Path(sys.argv[1])\n{code}\n"
    process = subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "ready"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


WRITES = """
from invflow._core.files import write_atomically
def write(name):
    Path(name).write_text("half")
    print("ready", flush=True)
    time.sleep(60)
write_atomically(folder / "file", write)
"""
RUNS = """
from invflow._core.files import alone_in
with alone_in(folder):
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("write", [text, tensors])
@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_new_files_have_what_the_umask_leaves(tmp_path: Path, write, umask: int, expected: int) -> None:
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "file", write)
    finally:
        os.umask(before)
    assert mode(tmp_path / "file") == expected


@pytest.mark.parametrize("write", [text, tensors])
@pytest.mark.parametrize("kept", [0o600, 0o640, 0o666])
def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path: Path, write, kept: int) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(kept)
    write_atomically(path, write)
    assert mode(path) == kept
    assert path.read_bytes() != b"old"


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path: Path) -> None:
    process = hold(tmp_path, WRITES)
    left = list(tmp_path.iterdir())
    assert len(left) == 1
    mine = tmp_path / ".file.notes"  # somebody's own hidden file
    mine.write_text("mine")
    # a writer that lives keeps its file
    other = "from invflow._core.files import write_atomically\nimport sys\nfrom pathlib import Path\n" \
            "write_atomically(Path(sys.argv[1]), lambda name: Path(name).write_text('x'))"
    subprocess.run([sys.executable, "-c", other, str(tmp_path / "other")], check=True)
    assert left[0].exists()
    kill(process)
    subprocess.run([sys.executable, "-c", other, str(tmp_path / "file")], check=True)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "other", ".file.notes"}


def test_a_run_removes_what_killed_ones_left_below_its_folder(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    kill(hold(tmp_path / "parts", WRITES))
    assert len(list((tmp_path / "parts").iterdir())) == 1
    with alone_in(tmp_path):
        assert list((tmp_path / "parts").iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    def fail(path: str) -> None:
        Path(path).write_text("half")
        raise KeyError("no")

    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyError):
        write_atomically(tmp_path / "file", fail)
    assert (tmp_path / "file").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_one_run_at_a_time_in_a_folder(tmp_path: Path) -> None:
    process = hold(tmp_path, RUNS)
    try:
        with pytest.raises(ValueError, match="another run is using"), alone_in(tmp_path):
            pass
        with pytest.raises(ValueError, match="another run is using"):
            invflow.compare(PROBLEM, ["exact"], num_observations=2, num_samples=4, output=tmp_path)
        problem = invflow.load_problem(PROBLEM)
        with pytest.raises(ValueError, match="another run is using"):
            invflow.calibrate(problem.exact_posterior(), problem, num_simulations=2, num_samples=4, output=tmp_path)
        with alone_in(tmp_path / "another"):  # which is free
            pass
    finally:
        kill(process)
    for _ in range(100):  # a process that died holds nothing, once the system has buried it
        try:
            with alone_in(tmp_path):
                break
        except ValueError:
            time.sleep(0.05)
    else:
        raise AssertionError("the folder of a killed run stays locked")
    assert [path.name for path in tmp_path.iterdir()] == ["another"]  # the lock is no file


def test_a_full_disk_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Never(invflow.Solver):
        def sample(self, *args: object, **kwargs: object) -> invflow.Posterior:
            raise AssertionError("it works though nothing can be written")

    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match="No space left on device"):
        invflow.compare(PROBLEM, {"never": Never()}, num_observations=2, num_samples=4, output=tmp_path)
    problem = invflow.load_problem(PROBLEM)
    with pytest.raises(OSError, match="No space left on device"):
        invflow.calibrate(Never(), problem, num_simulations=4, num_samples=4, num_particles=4, output=tmp_path)


@pytest.mark.parametrize("command", ["compare", "calibrate"])
def test_an_output_that_cannot_be_written_is_one_line_before_the_work(tmp_path: Path, command: str,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr("invflow.Problem.simulate", lambda *_, **__: pytest.fail("it worked first"))
    run = CliRunner().invoke(app, [command, PROBLEM, "--solver", "exact", "--output", str(tmp_path / "file" / "out")])
    assert run.exit_code == 2
    errors = [line for line in run.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert str(tmp_path / "file") in errors[0]
    assert "cannot write into this folder" in errors[0]


def test_a_file_too_large_for_the_disk_is_named_with_the_reason(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: safetensors and Python fail alike, with an error number."""
    program = ("import resource, sys, torch, invflow\n"
               "resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))\n"
               "try:\n    invflow.Posterior(torch.zeros(1, 5000, 2)).save(sys.argv[1])\n"
               "except OSError as error:\n    print(error)\n")
    path = tmp_path / "posterior.safetensors"
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout
    assert str(path) in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_made_where_it_can_be(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
