"""What ``invflow restore`` does before its work begins: little."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

#: packages that restoring needs none of, and whose import takes a second or more
HEAVY = ["deepinv", "diffusers", "gradio", "matplotlib", "pandas", "scipy", "skimage", "sklearn", "torchvision",
         "transformers"]
SCRIPT = """
import json, sys, time
import torch
alone = time.process_time()
import invflow.restore

def work(*arguments):  # the prior is loaded
    print(json.dumps([alone, time.process_time(), sorted(name for name in sys.modules if "." not in name)]))
    raise SystemExit

invflow.restore.restore_file = work
from invflow.cli.entry import main
sys.argv = ["invflow", "restore", sys.argv[1]]
main()
"""


def test_the_command_starts_quickly(tmp_path: Path) -> None:
    """By processor time over that of importing torch, which a loaded machine changes little; and by its imports."""
    Image.new("RGB", (64, 64), (90, 120, 150)).save(tmp_path / "a.png")
    out = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "a.png")], capture_output=True, text=True,
                         check=True).stdout
    alone, until_work, modules = json.loads(out.splitlines()[-1])
    assert "torch" in modules
    assert "invflow" in modules
    assert not set(HEAVY) & set(modules)
    assert until_work < 2.5 * alone
