"""The notebooks as stored: complete, run in order, with exercises. ``notebooks/run.py`` runs them."""

import base64
import importlib.util
import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 450_000  # bytes: the repository keeps every version
FOLDED = "jp-MarkdownHeadingCollapsed"  # JupyterLab shows what is under the heading when asked
# home and temporary folders, drives, and objects' addresses
LEAK = re.compile(r"(?<![\w.])/(?:home|root|Users|tmp|work|opt|var|mnt)/\w|\b[A-Z]:\\\w|\b0x[0-9a-f]{8,}|site-packages")


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def texts(notebook):
    """All text of the outputs, with the data of pictures left out."""
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            yield "".join(output.get("text", ""))
            for kind, data in output.get("data", {}).items():
                if kind.startswith("text/"):
                    yield "".join(data)


def run_module():
    spec = importlib.util.spec_from_file_location("notebooks_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def number(path):
    """What the notebook is called in text, such as 2b."""
    return path.name.partition("_")[0].lstrip("0") or "0"


def test_there_are_notebooks_with_distinct_numbers():
    numbers = [number(path) for path in PATHS]
    assert PATHS
    assert all(re.fullmatch(r"\d\d[a-z]?_[a-z0-9_]+\.ipynb", path.name) for path in PATHS)
    assert len(set(numbers)) == len(numbers)


def test_notebooks_refer_to_notebooks_that_exist():
    numbers = {number(path) for path in PATHS}
    for path in PATHS:
        named = {n for cell in load(path)["cells"] for n in re.findall(r"[Nn]otebook\s(\d+[a-z]?)\b", source(cell))}
        assert named <= numbers, path.name


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
class TestNotebook:
    def test_is_valid_and_small(self, path):
        nbformat = pytest.importorskip("nbformat")
        nbformat.validate(nbformat.read(path, as_version=4))
        assert path.stat().st_size <= LARGEST

    def test_has_ten_to_thirty_cells_and_begins_with_its_number(self, path):
        cells = load(path)["cells"]
        assert 10 <= len(cells) <= 30
        assert cells[0]["cell_type"] == "markdown"
        assert source(cells[0]).startswith(f"# {number(path)}. ")

    def test_every_code_cell_was_run_in_order_without_errors(self, path):
        cells = [cell for cell in load(path)["cells"] if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
        outputs = [output for cell in cells for output in cell["outputs"]]
        assert not [output for output in outputs if output["output_type"] == "error"]
        # a warning that a reader should see is caught and printed: its raw form names files of the machine
        assert not [output for output in outputs if output.get("name") == "stderr"]

    def test_every_code_cell_parses_and_seeds_are_explicit(self, path):
        for cell in load(path)["cells"]:
            if cell["cell_type"] == "code":
                compile(source(cell), path.name, "exec")
                assert "torch.manual_seed" not in source(cell)
                assert "%pip" not in source(cell)
                assert "!pip" not in source(cell)

    def test_shows_figures_and_they_are_pictures(self, path):
        data = [output.get("data", {}) for cell in load(path)["cells"] for output in cell.get("outputs", [])]
        pngs = [base64.b64decode("".join(d["image/png"])) for d in data if "image/png" in d]
        assert len(pngs) >= 5
        assert all(png.startswith(b"\x89PNG") for png in pngs)

    def test_has_exercises_before_their_solutions(self, path):
        text = "\n".join(source(cell) for cell in load(path)["cells"] if cell["cell_type"] == "markdown")
        exercises, solutions = text.find("## Exercises"), text.find("## Solutions")
        assert 0 < exercises < solutions
        asked = re.findall(r"(?m)^(\d)\. \*\*", text[exercises:solutions])
        solved = set(re.findall(r"\*\*(\d)\.\*\*", text[solutions:]))
        assert len(asked) >= 2
        assert set(asked) == solved

    def test_names_no_folder_of_a_machine(self, path):
        notebook = load(path)
        found = [LEAK.search(text) for text in [*texts(notebook), *map(source, notebook["cells"])]]
        assert not [match.group() for match in found if match]

    def test_carries_no_times_or_versions(self, path):
        notebook = load(path)
        assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
        assert set(notebook["metadata"]["language_info"]) == {"name"}
        assert all(set(cell["metadata"]) <= {"tags", FOLDED} for cell in notebook["cells"])

    def test_solutions_are_folded_under_a_heading_of_their_own(self, path):
        found = [cell for cell in load(path)["cells"] if "## Solutions" in source(cell)]
        assert len(found) == 1
        assert source(found[0]).startswith("## Solutions")
        assert found[0]["metadata"].get(FOLDED) is True

    def test_figures_have_110_dots_an_inch_and_words(self, path):
        text = "\n".join(source(cell) for cell in load(path)["cells"])
        assert "use_style(" in text
        assert "rcParams" not in text
        assert text.count("**See") >= 3


def test_runner_chooses_by_the_beginning_of_a_name():
    run = run_module()
    assert run.choose([]) == PATHS
    assert run.choose([PATHS[0].name[:2]]) == [PATHS[0]]
    assert run.choose([f"notebooks/{PATHS[0].name}"]) == [PATHS[0]]
    with pytest.raises(SystemExit, match="no notebook begins with '99'"):
        run.choose(["99"])


def test_student_version_has_exercises_and_neither_solutions_nor_outputs(tmp_path, capsys):
    pytest.importorskip("nbformat")
    run = run_module()
    assert run.main(["--student", str(tmp_path / "class")]) == 0
    assert sorted(path.name for path in (tmp_path / "class").iterdir()) == [path.name for path in PATHS]
    for path in PATHS:
        whole, copy = load(path), load(tmp_path / "class" / path.name)
        texts = [source(cell) for cell in copy["cells"]]
        assert "## Exercises" in "\n".join(texts)
        assert "## Solutions" not in "\n".join(texts)
        assert texts[:-1] == [source(cell) for cell in whole["cells"]][: len(texts) - 1]
        assert not [cell for cell in copy["cells"] if cell.get("outputs")]
    with pytest.raises(SystemExit, match="would lose its solutions"):
        run.main(["--student", str(FOLDER)])


def test_runner_finds_what_names_this_machine():
    nbformat = pytest.importorskip("nbformat")
    run, v4 = run_module(), nbformat.v4
    cases = {"share 0.85\n": 0, f"{FOLDER.parent}/x.py:3: UserWarning\n": 1, "<Axes at 0x7f0123456789>": 1}
    for text, leaks in cases.items():
        cell = v4.new_code_cell("f()", outputs=[v4.new_output("stream", name="stdout", text=text)])
        assert len(run.find_leaks(v4.new_notebook(cells=[cell]))) == leaks


def test_runner_fails_on_an_error_and_past_its_limit(tmp_path, monkeypatch, capsys):
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    run = run_module()
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    contents = {"01_good": "print(1)", "02_bad": "raise ValueError('broken')", "03_slow": "import time; time.sleep(60)"}
    for name, code in contents.items():
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), tmp_path / f"{name}.ipynb")
    assert run.main(["01", "--write"]) == 0
    good = load(tmp_path / "01_good.ipynb")["cells"][0]
    assert good["execution_count"] == 1
    assert "".join(good["outputs"][0]["text"]) == "1\n"
    before = (tmp_path / "02_bad.ipynb").read_text(encoding="utf-8")
    assert run.main(["02", "--write"]) == 1
    assert "broken" in capsys.readouterr().err
    assert (tmp_path / "02_bad.ipynb").read_text(encoding="utf-8") == before
    assert run.main(["03", "--limit", "2"]) == 1
    assert "03_slow.ipynb took over 2 s" in capsys.readouterr().err
