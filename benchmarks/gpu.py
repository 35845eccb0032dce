"""Compare a GPU with the CPU, in about eight minutes: ``python -m benchmarks.gpu --output DIR``.

Every solver runs on both devices with the same random numbers from a CPU generator, in double precision. Samples must
agree up to rounding, which is then too small to change the decisions of particle methods, and calls must be equal. The
checks that follow are for single precision, bfloat16, compiled networks, chunk sizes chosen from the free memory, and a
chunk that does not fit. The last ones measure samples per second and the speed relative to the fastest matrix product.
The command writes ``DIR/gpu.json`` and prints a table; the exit status is 1 if a solver differs or fails. Use
``--device cpu`` to test the script.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import invflow
from invflow.bench.runner import BENCHES
from invflow.plugins import write_text
from invflow.registry import solver_by_name

__all__ = ["Check", "agreement", "main"]

PROBLEM = "mnist/super-resolution"
#: settings that keep solvers fast; all others run with their defaults
SHORT: dict[str, dict[str, Any]] = {
    "vfm": {}, "fmtt": {"steps": 8}, "noise-smc": {"num_moves": 2}, "noise-rto": {"max_iterations": 12}, "lmmse": {},
    "dps": {"steps": 8}, "pigdm": {"steps": 8}, "moment-matching": {"steps": 8}, "diffpir": {"steps": 8},
    "ddrm": {"steps": 8}, "ula": {"steps": 8}, "pnp-flow": {"steps": 8}, "flower": {"steps": 8}, "tds": {"steps": 8},
    "top-k": {"steps": 8}, "beam": {"steps": 8}, "best-of-n": {}, "bicubic": {}, "tv": {}, "wiener": {},
    "plug-and-play": {"steps": 8}, "daps": {"steps": 4, "langevin_steps": 4}, "flow-dps": {"steps": 8},
    "dpnp": {"iterations": 4, "diffusion_steps": 4}, "noise-langevin": {"steps": 8},
    "d-flow": {"iterations": 1, "ode_steps": 2}, "diamond": {"steps": 4}, "exact": {}, "bm3d": {},
}
TOLERANCE = 1e-6  # of images in [0, 1], in double precision


@dataclass
class Check:
    """Result for one solver.

    Attributes:
        name: Name of the solver.
        difference: Largest difference of any pixel between the devices; NaN if the solver was not run.
        calls: Forward and backward calls on the device.
        seconds: Time on the device.
        note: Why the solver was not run, or what was wrong; empty if there was no problem.
    """

    name: str
    difference: float
    calls: tuple[float, float]
    seconds: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the devices agree, or the solver was skipped for a stated reason."""
        return not self.note or self.note.startswith("not run")


def draw(name: str, device: torch.device, samples: int, seed: int) -> invflow.Posterior:
    """Posterior samples of two observations on a device, in double precision, with a CPU generator."""
    problem = invflow.load_problem(PROBLEM)
    generator = torch.Generator().manual_seed(seed)
    _, likelihood = problem.simulate(2, generator=generator, shuffle=False)
    solver = solver_by_name(name, problem, **SHORT[name])
    for value in vars(solver).values():
        if isinstance(value, torch.nn.Module):
            value.to(device, torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing converges in so few steps
        return solver.sample(likelihood.to(device, torch.float64), samples, generator=generator)


def agreement(name: str, device: torch.device, samples: int = 8, seed: int = 0) -> Check:
    """Compare a solver on the CPU and on a device, with the same noise."""
    try:
        here = draw(name, torch.device("cpu"), samples, seed)
        there = draw(name, device, samples, seed)
    except ImportError as error:
        return Check(name, float("nan"), (0, 0), 0.0, f"not run: {error}")
    except (TypeError, ValueError) as error:
        return Check(name, float("nan"), (0, 0), 0.0, f"not run: refuses this problem ({str(error)[:100]})")
    except Exception as error:
        return Check(name, float("nan"), (0, 0), 0.0, f"failed with {type(error).__name__}: {str(error)[:200]}")
    difference = float((here.samples - there.samples.cpu()).abs().max())
    calls = (there.nfe.forward, there.nfe.backward)
    note = "" if difference <= TOLERANCE else f"samples differ by {difference:.2g}"
    if calls != (here.nfe.forward, here.nfe.backward):
        note += f" calls differ: {calls} there, {(here.nfe.forward, here.nfe.backward)} here"
    return Check(name, difference, calls, there.seconds, note.strip())


# -- checks for a GPU only ---------------------------------------------------------------------------------------------


def precisions(device: torch.device, samples: int) -> dict[str, float]:
    """Root mean square differences of the VFM's samples from those in double precision, in units of their spread."""
    problem = invflow.load_problem(PROBLEM)
    vfm = invflow.VFM.load("mnist")
    exact = draw("vfm", device, samples, 1).samples.cpu()
    vfm.prior.to(device), vfm.adapter.to(device)
    _, likelihood = problem.simulate(2, generator=torch.Generator().manual_seed(1), shuffle=False)

    def difference(context: Any) -> float:
        generator = torch.Generator().manual_seed(1)
        problem.simulate(2, generator=generator, shuffle=False)  # as draw() does before
        with context:
            found = vfm.sample(likelihood.to(device), samples, generator=generator).samples.double().cpu()
        return float((found - exact).square().mean().sqrt() / exact.std(1).square().mean().sqrt())

    found = {"single": difference(nullcontext()), "bfloat16": difference(torch.autocast(device.type, torch.bfloat16))}
    if device.type == "cuda":
        invflow.compile_networks(vfm.prior)
        found["compiled"] = difference(nullcontext())
    return found


def memory(device: torch.device, rows: int) -> dict[str, Any]:
    """Number of rows chosen from the free memory, and whether a chunk that does not fit is replaced by smaller ones."""
    from invflow.flowmap import rows_at_a_time

    vfm = invflow.VFM.load("mnist", chunk_size=rows)
    vfm.prior.to(device), vfm.adapter.to(device)
    _, likelihood = invflow.load_problem(PROBLEM).simulate(1, generator=torch.Generator().manual_seed(2), shuffle=False)
    found: dict[str, Any] = {"rows": rows_at_a_time(None, vfm.prior)}
    held: Tensor | None = None
    if device.type == "cuda":  # leave too little memory for this many rows
        held = torch.empty(int(0.98 * torch.cuda.mem_get_info(device)[0]), dtype=torch.uint8, device=device)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        vfm.sample(likelihood.to(device), rows, generator=torch.Generator().manual_seed(2))
    del held
    found["halved"] = sum("do not fit in memory" in str(warning.message) for warning in said)
    return found


def speed(device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Throughput: samples per second, and the speed relative to the fastest matrix product."""
    return [{"name": result.name, "ratio": result.ratio, **result.details}
            for result in BENCHES["throughput"](repeats, device, torch.Generator().manual_seed(0))]


def main(arguments: list[str] | None = None) -> int:
    """Run all checks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("results/gpu"))
    parser.add_argument("--only", nargs="*", help="names of the solvers to check; default: all")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--no-speed", action="store_true", help="skip the checks of precision, memory and speed")
    options = parser.parse_args(arguments)
    device, start = torch.device(options.device), time.perf_counter()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    unknown = sorted(set(options.only or ()) - set(SHORT))
    if unknown:
        parser.error(f"there is no solver {unknown[0]!r} here: choose from {', '.join(SHORT)}")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {name}, compared with the CPU; {PROBLEM}, {options.samples} samples\n")
    record: dict[str, Any] = {"device": name, "torch": torch.__version__, "solvers": []}

    def save() -> None:
        write_text(options.output / "gpu.json", json.dumps(record, indent=1) + "\n")

    passed = True
    for solver in options.only or SHORT:
        check = agreement(solver, device, options.samples)
        passed &= check.passed
        print(f"{solver:16s} {check.difference:9.2g}  calls {check.calls[0]:7.4g} {check.calls[1]:7.4g}  "
              f"{check.seconds:7.2f} s  {check.note}", flush=True)
        record["solvers"].append(asdict(check))
        save()
    parts: dict[str, Callable[[], Any]] = {} if options.no_speed else {
        "precision": lambda: precisions(device, options.samples), "memory": lambda: memory(device, 2 * 4096),
        "speed": lambda: speed(device, 5)}
    for part, run in parts.items():
        record[part] = run()
        print(f"{part}: {json.dumps(record[part])}", flush=True)
        save()
    record["seconds"] = time.perf_counter() - start
    save()
    print(f"\n{record['seconds']:.0f} s; wrote {options.output / 'gpu.json'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
