"""Training on two processes: one set of weights, the gradient of all rows, and stops that all agree on."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time

import torch
from safetensors import safe_open

from invflow.models.neural import NeuralFlowMap
from invflow.training.loop import seeded

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]

SCRIPT = """
import sys, torch
from invflow.training import LoopSettings, train_prior
def pairs(n, g):
    z = torch.randn(n, 2, generator=g)
    return torch.stack([z[:, 0], 0.9 * z[:, 0] + 0.2 * z[:, 1]], dim=1)
s = LoopSettings(steps=int(sys.argv[2]), batch_size=64, precision="no", log_every=10, warmup=2, checkpoint_seconds=1e9)
train_prior(pairs, s, sys.argv[1], network="mlp", options={"width": 16, "depth": 2}, decode_affine=(1.0, 0.0))
"""

ONE_STEP = """
import os, sys, torch
from pathlib import Path
from invflow.training.loop import LoopSettings, Objective, batches_of, fit
class Regression(Objective):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1).double()
        torch.nn.init.zeros_(self.layer.weight), torch.nn.init.zeros_(self.layer.bias)
    def trained(self):
        return {"layer": self.layer}
    def forward(self, data, generator):
        loss = (self.layer(data) - data.sum(dim=1, keepdim=True)).square().mean()
        return loss, {"rows": torch.tensor(float(len(data)))}
data = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
settings = LoopSettings(steps=3, batch_size=8, learning_rate=0.1, warmup=1, ema=0.0, precision="no")
objective = Regression()
folder = Path(sys.argv[1])
fit(objective, batches_of(data, settings), settings, folder, progress=False)
if os.environ["RANK"] == "0":
    torch.save(objective.layer.weight.detach(), folder / "weights.pt")
"""

TOGETHER = """
import sys, torch
from pathlib import Path
from invflow.operators import MatrixOperator
from invflow.training import LoopSettings, TrainingProblem, train_prior, train_vfm
def pairs(n, g):
    z = torch.randn(n, 2, generator=g)
    return torch.stack([z[:, 0], 0.9 * z[:, 0] + 0.2 * z[:, 1]], dim=1)
folder, steps = Path(sys.argv[1]), int(sys.argv[2])
s = LoopSettings(steps=steps, batch_size=64, precision="no", log_every=10, warmup=2)
options = {"width": 16, "depth": 2}
prior = train_prior(pairs, s, folder, network="mlp", options=options, decode_affine=(1.0, 0.0), progress=False)
problem = TrainingProblem(MatrixOperator(torch.tensor([[1.0, 0.0]]), problem_class="first"), (0.1, 0.5))
vfm = train_vfm(pairs, prior, [problem], s, folder / "joint", options=options, progress=False)
state = torch.distributed.get_rank(), torch.distributed.get_world_size()
weights = torch.cat([p.flatten() for m in (prior, vfm.prior, vfm.adapter) for p in m.parameters()])
torch.save({"place": state, "weights": weights}, folder / f"rank{state[0]}.pt")
"""


def test_two_processes(tmp_path):
    """Two processes share the batch and end with one set of weights, and with one log."""
    script = tmp_path / "train.py"
    script.write_text(TOGETHER)
    result = subprocess.run([*LAUNCH, "2", str(script), str(tmp_path / "run"), "40"], capture_output=True, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    ranks = [torch.load(tmp_path / "run" / f"rank{i}.pt", weights_only=True) for i in range(2)]
    assert [r["place"] for r in ranks] == [(0, 2), (1, 2)]
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])
    for folder in ("run", "run/joint"):
        rows = list(csv.DictReader((tmp_path / folder / "metrics.csv").open()))
        assert [int(r["step"]) for r in rows] == [10, 20, 30, 40]
        assert all(0 < float(r["flow_matching"]) < 10 for r in rows)
    prior = NeuralFlowMap.from_pretrained(tmp_path / "run" / "prior")
    assert prior.generate(8, generator=seeded(0, 0, 0)).isfinite().all()


def test_the_gradient_of_two_processes_is_that_of_all_their_rows(tmp_path):
    """The plain mean of the rows' losses, whichever process has them: one step ends where a single process does."""
    script = tmp_path / "step.py"
    script.write_text(ONE_STEP)
    ends = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        result = subprocess.run([*LAUNCH, str(processes), str(script), str(folder)], capture_output=True, text=True,
                                env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300, check=False)
        assert result.returncode == 0, result.stderr[-2000:]
        ends.append(torch.load(folder / "weights.pt", weights_only=True))
    assert ends[0].abs().max() > 0.05
    torch.testing.assert_close(ends[0], ends[1], atol=1e-12, rtol=1e-9)


def test_two_interrupted_processes_stop_together_and_go_on(tmp_path):
    """The checkpoint is that of the step they agreed on: nothing else has written one."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [*LAUNCH, "2", str(script), str(tmp_path / "run"), "600"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "the same command again to resume" in err
    with safe_open(tmp_path / "run" / "checkpoint.safetensors", framework="pt") as file:
        step = int(file.metadata()["step"])
    assert 0 < step < 600
    assert step % 10 == 0
    subprocess.run(command, capture_output=True, timeout=240, check=True, env=environment)
    assert (tmp_path / "run" / "prior" / "model.safetensors").exists()
