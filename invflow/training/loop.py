"""The training loop: Hugging Face accelerate, moving averages, and checkpoints that survive a killed process."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from invflow._core.files import alone_in
from invflow._core.records import write_atomically
from invflow._core.source import code_digest
from invflow.models.compiled import compiled_networks
from invflow.training.checkpoint import CHECKPOINT, known, load
from invflow.training.checkpoint import save as save_checkpoint

__all__ = ["LoopSettings", "Objective", "fit", "speaks_for_all"]

#: number of steps between synchronised checks for a request to stop, for which a launcher waits half a minute
ASK_EVERY = 10
#: subpackages that training does not run: a change in them does not prevent resuming
_UNUSED = ("app", "deepinv_bridge", "evaluation", "metrics", "restore", "teaching")
Batches = Callable[[int, int, int], Tensor]
Sampler = Callable[[int, torch.Generator], Tensor]


class Objective(nn.Module):
    """Training objective: a module whose forward returns the loss of a batch and numbers to report."""

    def trained(self) -> dict[str, nn.Module]:
        """Modules to optimise, by name; gradients are clipped for each separately."""
        raise TypeError(f"{type(self).__name__} defines no modules to train: override trained()")

    def forward(self, data: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (0-d) of a batch, and detached 0-d numbers to report."""
        raise TypeError(f"{type(self).__name__} defines no loss: override forward()")


@dataclass(frozen=True)
class LoopSettings:
    """Settings of :func:`fit`.

    Attributes:
        steps: Total number of optimiser steps.
        batch_size: Rows of one step, over all processes.
        learning_rate: Peak learning rate of AdamW, after ``warmup`` steps and before a cosine decay to a hundredth.
        warmup: Number of steps of linear warm-up.
        weight_decay: Weight decay of AdamW.
        betas: Betas of AdamW.
        ema: Decay of the moving average of the weights, which becomes the final model.
        clip: Largest norm of the gradient, for each trained module separately.
        seed: Random seed. Numbers depend only on (seed, step, process), so a resumed run repeats them.
        precision: ``"no"``, ``"bf16"`` or ``"fp16"``.
        checkpoint_seconds: Time between checkpoints.
        log_every: Number of steps between rows of the CSV.
        compile: Whether to train with compiled networks (:func:`invflow.compile_networks`). This pays off in long
            runs: the first steps take minutes.

    Raises:
        ValueError: For a setting of the wrong type or out of range, or an unknown precision.
    """

    steps: int
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    ema: float = 0.999
    clip: float = 1.0
    seed: int = 0
    precision: str = "bf16"
    checkpoint_seconds: float = 60.0
    log_every: int = 25
    compile: bool = False

    def __post_init__(self) -> None:
        for entry in fields(self):
            value, name = getattr(self, entry.name), entry.name
            kinds: Any = {"int": (int,), "float": (int, float)}.get(str(entry.type))
            if kinds is None:
                continue
            if not isinstance(value, kinds) or isinstance(value, bool) or value != value:
                what = "a whole number" if kinds == (int,) else "a number"
                raise ValueError(f"the setting {name} is {value!r}: pass {what}, such as {name}={self._example(name)}")
            least = 1 if name in ("steps", "batch_size", "log_every") else 0
            if name != "seed" and value < least:
                raise ValueError(f"the setting {name} is {value}: pass at least {least}, such as "
                                 f"{name}={self._example(name)}")
        if self.precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"the setting precision is {self.precision!r}: pass 'no', 'bf16' or 'fp16'")

    @classmethod
    def _example(cls, name: str) -> Any:
        return getattr(cls, name, 1000)

    def rate(self, step: int) -> float:
        """Learning rate at a step: linear warm-up, then half a cosine."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        share = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))


@dataclass(frozen=True)
class _Shuffled:
    """Rows of a data set in memory, shuffled for each epoch by the seed."""

    data: Tensor
    batch_size: int
    seed: int
    orders: dict[int, Tensor] = field(default_factory=dict)  # of the current epoch
    _derived = ("orders",)

    def __call__(self, step: int, process: int, processes: int) -> Tensor:
        epoch, position = divmod(step, len(self.data) // self.batch_size)
        if epoch not in self.orders:
            self.orders.clear()
            self.orders[epoch] = torch.randperm(len(self.data), generator=seeded(self.seed, epoch, -1))
        rows = self.orders[epoch][position * self.batch_size : (position + 1) * self.batch_size]
        chosen = self.data[rows[process::processes]]
        return chosen.float() / 255 if chosen.dtype == torch.uint8 else chosen


def shuffled(data: Tensor, settings: LoopSettings) -> Batches:
    """Batches of a data set in memory: shuffled for each epoch by the seed; every process has its own rows.

    Args:
        data: ``(n, ...)``; bytes become floats in [0, 1].
        settings: Settings with the batch size and the seed.

    Returns:
        A function of (step, process, number of processes).
    """
    if len(data) < settings.batch_size:
        raise ValueError(f"the data set has {len(data)} rows, fewer than one batch of {settings.batch_size}: lower "
                         "batch_size")
    return _Shuffled(data, settings.batch_size, settings.seed)


def batches_of(data: Tensor | Sampler, settings: LoopSettings) -> Batches:
    """Batches of a data set in memory, or of a function ``(n, generator) -> (n, ...)`` that makes new data."""
    if isinstance(data, Tensor):
        return shuffled(data, settings)
    sampler, size, seed = data, settings.batch_size, settings.seed  # no other setting, as those may change

    def batch(step: int, process: int, processes: int) -> Tensor:
        return sampler(len(range(process, size, processes)), seeded(seed + 1, step, process))

    return batch


def seeded(seed: int, step: int, process: int) -> torch.Generator:
    """A CPU generator for one step of one process, so that no generator state has to be stored."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 1_009 + process + 1)


def fit(objective: Objective, batches: Batches, settings: LoopSettings, folder: str | os.PathLike[str], *,
        progress: bool = True, stop_at: int | None = None) -> bool:
    """Train until ``settings.steps``; resumes from the folder's checkpoint if there is one.

    At the end, the trained modules hold the moving average of their weights. Ctrl-C and a termination signal save a
    checkpoint first. A killed run resumes from the last checkpoint, on the CPU bit for bit (same threads,
    same processes).

    Args:
        objective: Objective to minimise.
        batches: Function of (step, process, number of processes) to this process's rows.
        settings: Settings of the loop.
        folder: Folder for ``checkpoint.safetensors``, the previous checkpoint and ``metrics.csv``.
        progress: Whether to show a progress bar.
        stop_at: Step at which to stop with a checkpoint, as if interrupted; for tests and time-limited runs.

    Returns:
        Whether training is complete.

    Raises:
        ValueError: If the folder's checkpoint belongs to other settings, data, modules (including their initial state,
            and hence a prior, its statistics and the settings of an objective) or other code of the library, or
            another run uses the folder.
        FloatingPointError: If the loss, a weight or its average is not finite; the message gives the step. The last
            good checkpoint is kept.
    """
    with alone_in(Path(folder)) if speaks_for_all() else contextlib.nullcontext():
        return _fit(objective, batches, settings, Path(folder), progress, stop_at)


def speaks_for_all() -> bool:
    """Whether this process, of all that train together, writes the files."""
    return os.environ.get("RANK", "0") == "0"


def _fit(objective: Objective, batches: Batches, settings: LoopSettings, folder: Path, progress: bool,
         stop_at: int | None) -> bool:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from tqdm import tqdm

    # accelerate keeps the precision of a process's first training and rejects any other: reset it for each training
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=settings.precision, cpu=not torch.cuda.is_available())
    run = _Run(objective, batches, settings, folder, accelerator)
    step = run.step
    log = MetricsFile(folder / "metrics.csv", step) if accelerator.is_main_process else None
    end = min(settings.steps, stop_at or settings.steps)
    bar = tqdm(total=settings.steps, initial=step, disable=not (progress and accelerator.is_main_process),
               unit="step", dynamic_ncols=True, mininterval=0.5)
    saved = time.monotonic()
    # without CUDA graphs: weights change, and the map is called both with fixed and with trained weights
    compiled = compiled_networks(objective, mode="default") if settings.compile else contextlib.nullcontext()
    with bar, compiled, stop_requests() as stop:
        while run.step < end:
            reports = run.advance()
            step = run.step
            bar.update()
            if step % settings.log_every == 0 or step == end:
                numbers = {k: float(v) for k, v in reports.items()}
                if not math.isfinite(numbers["loss"]):
                    raise FloatingPointError(f"the loss is {numbers['loss']} at step {step}: lower the learning rate "
                                             f"({settings.learning_rate}) or the clipping norm ({settings.clip})")
                bar.set_postfix({k: f"{v:.3g}" for k, v in numbers.items() if k != "loss" and k[:5] != "grad_"})
                if log is not None:
                    log.write(step, {"learning_rate": settings.rate(step - 1), **numbers})
            if _all_stop(accelerator, stop, step):
                break
            if time.monotonic() - saved > settings.checkpoint_seconds:
                run.save()
                saved = time.monotonic()
        run.save()
    accelerator.wait_for_everyone()
    if step < end or stop():
        raise KeyboardInterrupt(f"stopped at step {step} of {settings.steps} and saved {folder / CHECKPOINT}: run "
                                "the same command again to resume")
    run.finish()
    return step >= settings.steps


class _Run:
    """State of a training: parameters, their moving average, optimiser and step, from the folder's checkpoint."""

    def __init__(self, objective: Objective, batches: Batches, settings: LoopSettings, folder: Path,
                 accelerator: Any) -> None:
        self.objective, self.batches, self.settings, self.folder = objective, batches, settings, folder
        self.accelerator = accelerator
        self.parameters: dict[str, Tensor] = {
            f"{name}.{key}": p for name, module in objective.trained().items()
            for key, p in module.named_parameters() if p.requires_grad
        }
        # compute digests before anything is loaded or moved
        self.made_with = {"objective": known(objective), "data": known(batches), "code": code_digest(*_UNUSED)}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=settings.learning_rate, betas=settings.betas,
                                           weight_decay=settings.weight_decay)
        objective.to(accelerator.device)
        self.average = {k: p.detach().clone() for k, p in self.parameters.items()}
        self.buffers = dict(objective.named_buffers(recurse=False))
        self.step = self.kept = load(folder, self.parameters, self.average, self.buffers, self.optimizer,
                                     _identity(settings), self.made_with)
        self._wrapped, self._prepared = accelerator.prepare(objective, self.optimizer)

    def advance(self) -> dict[str, Tensor]:
        """Take a step; return its loss, the numbers reported by the objective, and the gradient norms."""
        accelerator, settings, step = self.accelerator, self.settings, self.step
        for group in self._prepared.param_groups:
            group["lr"] = settings.rate(step)
        process = accelerator.process_index
        data = self.batches(step, process, accelerator.num_processes)
        if accelerator.device.type == "cuda" and data.device.type == "cpu":
            data = data.pin_memory()  # for an asynchronous copy to the GPU
        data = data.to(accelerator.device, non_blocking=True)
        loss, metrics = self._wrapped(data, seeded(settings.seed, step, process))
        accelerator.backward(loss)
        norms = {f"grad_{name}": accelerator.clip_grad_norm_(module.parameters(), settings.clip)
                 for name, module in self.objective.trained().items()}
        self._prepared.step()
        self._prepared.zero_grad(set_to_none=True)
        decay = min(settings.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), [self.parameters[k].detach() for k in self.average],
                             1 - decay)
        self.step += 1
        return {"loss": loss.detach(), **metrics, **norms}

    def save(self) -> None:
        """Write a checkpoint; raise an error and keep the last one if a weight is not finite."""
        wrong = [key for key, p in self.parameters.items()
                 if not bool(p.isfinite().all() & self.average[key].isfinite().all())]
        if wrong:
            kept_here = f"{self.folder / CHECKPOINT} holds step {self.kept}" if self.kept else "nothing was saved yet"
            raise FloatingPointError(f"weights are not finite at step {self.step}, in {wrong[0]} and {len(wrong) - 1} "
                                     f"more: lower the learning rate ({self.settings.learning_rate}) or the clipping "
                                     f"norm ({self.settings.clip}); {kept_here}")
        if self.accelerator.is_main_process:
            save_checkpoint(self.folder, self.step, self.parameters, self.average, self.buffers, self.optimizer,
                            _identity(self.settings), self.made_with)
        self.kept = self.step

    @torch.no_grad()
    def finish(self) -> None:
        """Copy the moving average into the modules."""
        for key, p in self.parameters.items():
            p.copy_(self.average[key])
        self.accelerator.free_memory()


def _all_stop(accelerator: Any, stop: Callable[[], bool], step: int) -> bool:
    """Whether to stop after this step; all processes agree, so that none waits for a process that has exited."""
    if accelerator.num_processes == 1:
        return stop()
    if step % ASK_EVERY:
        return False
    return bool(accelerator.reduce(torch.tensor(float(stop()), device=accelerator.device), reduction="sum") > 0)


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C and SIGTERM into a flag for the loop, so that no step is interrupted."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True

    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        previous = {number: signal.signal(number, ask) for number in numbers}
    except ValueError:  # signals can be handled only in the main thread; elsewhere leave them unchanged
        previous = {}
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class MetricsFile:
    """A CSV file that grows row by row; resuming drops the rows after the checkpoint."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.columns: list[str] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            try:
                text = path.read_text(encoding="utf-8")
                table = csv.DictReader(io.StringIO(text))
                found, self.columns = list(table), list(table.fieldnames or ())
                whole = found if text.endswith("\n") else found[:-1]  # a kill may leave an incomplete row
                rows = [row for row in whole if int(row["step"]) <= step]
            except (KeyError, TypeError, ValueError, csv.Error) as error:
                raise ValueError(f"{path} is not a table of metrics ({error!r}): move it and train again") from error
            if len(rows) < len(found):  # written atomically: a kill must not lose the other rows
                self._rewrite(rows)
            if not rows:
                self.columns = []

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Append one row."""
        self._append({"step": step, **{k: f"{v:.6g}" for k, v in numbers.items()}})

    def _append(self, row: dict[str, Any]) -> None:
        new = [name for name in row if name not in self.columns]
        if new:  # the first row, or a row with numbers that no earlier batch had
            rows = list(csv.DictReader(io.StringIO(self.path.read_text(encoding="utf-8")))) if self.columns else []
            self.columns += new
            self._rewrite(rows)
        with self.path.open("a", newline="") as handle:
            csv.DictWriter(handle, self.columns, restval="").writerow(row)

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        def write(name: str | os.PathLike[str]) -> None:
            with Path(name).open("w", newline="") as handle:
                writer = csv.DictWriter(handle, self.columns, restval="")
                writer.writeheader()
                writer.writerows(rows)

        write_atomically(self.path, write)


def _identity(settings: LoopSettings) -> dict[str, Any]:
    """Settings that must agree between a checkpoint and the run that resumes from it."""
    loose = ("checkpoint_seconds", "log_every", "compile")
    result: dict[str, Any] = json.loads(json.dumps({k: v for k, v in asdict(settings).items() if k not in loose}))
    return result
