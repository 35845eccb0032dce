"""Law of residuals: spectrum, correlations, block means, grid, and a classifier that tells two sets apart.

If samples come from the posterior, (truth - mean) and (sample - mean) have the same law over images and measurements.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

from invflow.linear.spectral import BLOCK, dct2, mix_channels, opponent_matrix

__all__ = ["BANDS", "SIDES", "moments", "told_apart"]

#: upper ends of the eight bands of radial frequency, in cycles per pixel
BANDS = (1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 1.0)
#: sides of the blocks whose means are compared
SIDES = (8, 16, 64)
PATCH, EPOCHS, BATCH = 16, 8, 100


def moments(residuals: Tensor) -> dict[str, float]:
    """Second moments of residuals around zero.

    Args:
        residuals: ``(n, 3, H, W)``, sides multiples of 8 and at least 64.

    Returns:
        ``power 0`` to ``power 7``: mean power of the cosines in each of :data:`BANDS`, over opponent colours.
        ``brightness 0`` and so on: the same of brightness alone, and ``colour 0`` of the two colour differences.
        ``red-green`` and so on: correlations of channels. ``horizontal``, ``vertical``, ``diagonal``: correlations of
        neighbours. ``block 8`` and so on: root mean square of block means, of each channel. ``border``: root mean
        square of the pixels at the border of the blocks of 8 x 8 pixels over that of the inner 4 x 4. ``step``: the
        same ratio for the difference of two neighbours in different blocks over that of the middle two of a block.
    """
    x = residuals
    power = dct2(mix_channels(opponent_matrix(3, x.dtype, x.device), x)).square().mean(0)
    rows, columns = (torch.arange(side) / (2 * side) for side in x.shape[-2:])
    band = torch.bucketize(torch.hypot(rows[:, None], columns), torch.tensor(BANDS[:-1]), right=True)
    found: dict[str, float] = {}
    for name, part in (("power", power), ("brightness", power[:1]), ("colour", power[1:])):
        found |= {f"{name} {i}": float(part[:, band == i].mean()) for i in range(len(BANDS))}
    square = x.square().mean((0, 2, 3))
    for name, i, j in (("red-green", 0, 1), ("red-blue", 0, 2), ("green-blue", 1, 2)):
        found[name] = float((x[:, i] * x[:, j]).mean() / (square[i] * square[j]).sqrt())
    pairs = {"horizontal": (x[..., 1:], x[..., :-1]), "vertical": (x[..., 1:, :], x[..., :-1, :]),
             "diagonal": (x[..., 1:, 1:], x[..., :-1, :-1])}
    found |= {name: float((a * b).mean() / square.mean()) for name, (a, b) in pairs.items()}
    found |= {f"block {side}": float(avg_pool2d(x, side).square().mean().sqrt()) for side in SIDES}
    cells = x.square().mean((0, 1)).unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).mean((0, 2))
    inner = cells[2:6, 2:6]
    border = torch.cat([cells[[0, -1]].flatten(), cells[1:-1, [0, -1]].flatten()])
    found["border"] = float((border.mean() / inner.mean()).sqrt())
    steps = [(y[..., 1:] - y[..., :-1]).square().mean((0, 1, 2)) for y in (x, x.mT)]
    across, within = (sum(float(s[start::BLOCK].mean()) for s in steps) for start in (BLOCK - 1, BLOCK // 2 - 1))
    found["step"] = (across / within) ** 0.5
    return found


def told_apart(truth: Tensor, drawn: Tensor, seed: int = 0) -> float:
    """Share of patches of 16 x 16 pixels that a small network assigns correctly to truths or to draws.

    It learns from the patches of every second image and is tested on those of the others. Each patch is given in units
    of the root mean square of all residuals, and in units of its own.

    Args:
        truth: ``(n, C, H, W)``, residuals of truths.
        drawn: The same of samples, one of each observation.
        seed: Seed of weights and order.

    Returns:
        Accuracy on patches that it has not seen; 0.5 for equal laws.
    """
    unit = truth.square().mean().sqrt()
    sets: list[tuple[Tensor, Tensor]] = []
    for part in (slice(0, None, 2), slice(1, None, 2)):
        x = torch.cat([_patches(truth[part] / unit), _patches(drawn[part] / unit)])
        own = x.square().mean((1, 2, 3), keepdim=True).sqrt() + 1e-3
        label = torch.arange(2).repeat_interleave(len(x) // 2)
        sets.append((torch.cat([x.clamp(-8, 8), x / own, own.log().expand(-1, 1, PATCH, PATCH)], 1), label))
    (x, label), (new, asked) = sets
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(x.shape[1], 24, 3), nn.ReLU(), nn.Conv2d(24, 32, 3, stride=2), nn.ReLU(),
                            nn.Conv2d(32, 48, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 2))
    generator = torch.Generator().manual_seed(seed)
    steps = EPOCHS * -(-len(x) // BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(net(x[rows]), label[rows]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        guess = torch.cat([net(part).argmax(1) for part in new.split(1000)])
    return float((guess == asked).double().mean())


def _patches(x: Tensor) -> Tensor:
    """Disjoint patches ``(m, C, 16, 16)`` of images whose sides are multiples of 16."""
    return x.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).movedim(1, 3).flatten(0, 2)
