"""Mistakes that the tests must catch, each with the test that goes red: ``python tests/mutations.py`` tries them all.

Each mutation is applied to a copy of the source tree, never to the tree itself.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Mutation:
    """One deliberate mistake: ``original`` becomes ``mistake`` in ``file``, and ``test`` must fail."""

    name: str
    file: str
    original: str
    mistake: str
    test: str


MUTATIONS = [
    Mutation("an adjoint that is not one", "operators/invflow_operators/superresolution.py",
             "return self.rows.to(y.dtype).mT @ y @ self.columns.to(y.dtype)",
             "return self.rows_inverse.to(y.dtype) @ y @ self.columns_inverse.to(y.dtype).mT",
             "tests/test_operators.py"),
    Mutation("mean instead of sum in the likelihood", "invflow/reward.py",
             "return terms.flatten(2).sum(2)", "return terms.flatten(2).mean(2)", "tests/test_reward.py"),
    Mutation("time reversed in the MeanFlow target", "invflow/training/losses.py",
             "target = v + correction", "target = v - correction",
             "tests/test_losses.py::test_true_average_velocity_is_a_stationary_point"),
    Mutation("the map's gradient left in the observation term", "invflow/training/vfm.py",
             "fixed = {k: p.detach() for k, p in", "fixed = {k: p for k, p in",
             "tests/test_training.py::test_observation_term_leaves_the_map_alone"),
    Mutation("a global seed in the training loop", "invflow/training/loop.py",
             "    accelerator = Accelerator(", "    torch.manual_seed(settings.seed)\n    accelerator = Accelerator(",
             "tests/test_training.py::test_training_does_not_touch_the_global_seed"),
    Mutation("the loss averaged over the state", "invflow/training/losses.py",
             ".square().flatten(1).sum(dim=1)\n\n\ndef gaussian_kl",
             ".square().flatten(1).mean(dim=1)\n\n\ndef gaussian_kl",
             "tests/test_losses.py::test_loss_is_summed_over_the_state_and_reaches_the_noise"),
    Mutation("the noise cut off from the MeanFlow loss", "invflow/training/losses.py",
             "    v = data - noise\n", "    noise = noise.detach()\n    v = data - noise\n",
             "tests/test_losses.py::test_loss_is_summed_over_the_state_and_reaches_the_noise"),
    Mutation("a checkpoint without the optimiser's state", "invflow/training/loop.py",
             "            optimizer.state[p] = state\n", "            pass\n",
             "tests/test_training.py::test_resuming_gives_the_same_bits"),
    Mutation("noise drawn chunk by chunk", "invflow/solvers/vfm.py",
             "z = torch.addcmul(mean[owner[part]], std[owner[part]], noise[part])",
             "z = torch.addcmul(mean[owner[part]], std[owner[part]], noise[: len(owner[part])])",
             "tests/test_vfm.py::test_samples_do_not_depend_on_chunks"),
    Mutation("an adapter accepted by any map", "invflow/adapter.py",
             "if self.trained_for is not None and own != self.trained_for:", "if False:",
             "tests/test_vfm.py::test_adapter_of_another_map_is_refused"),
]


def survives(mutation: Mutation) -> bool:
    """Whether the test stays green although the mistake is in."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        ignore = shutil.ignore_patterns(".git", "__pycache__", "*.egg-info", "runs", ".venv", "venv", ".*_cache")
        shutil.copytree(ROOT, tree, ignore=ignore)
        path = tree / mutation.file
        text = path.read_text()
        if text.count(mutation.original) != 1:
            raise SystemExit(f"{mutation.name}: found {text.count(mutation.original)} times in {mutation.file}")
        path.write_text(text.replace(mutation.original, mutation.mistake))
        search = os.pathsep.join(str(tree / part) for part in (".", "operators", "problems"))
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", mutation.test]
        result = subprocess.run(command, cwd=tree, env={**os.environ, "PYTHONPATH": search}, capture_output=True,
                                text=True, check=False)
        if result.returncode not in (0, 1):
            raise SystemExit(f"{mutation.name}: pytest ended with {result.returncode}\n{result.stdout[-2000:]}")
        return result.returncode == 0


def main() -> None:
    """Try every mutation; exit with 1 if a test lets one through."""
    survivors = []
    for mutation in MUTATIONS:
        alive = survives(mutation)
        print(f"{'SURVIVES' if alive else 'caught':9s} {mutation.name} ({mutation.test})", flush=True)
        survivors += [mutation.name] * alive
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
