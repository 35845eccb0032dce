"""Exports a posterior to notebooks, xarray and arviz."""

from __future__ import annotations

import base64
import html
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from invflow.views.draws import Draws

__all__ = ["posterior_html", "to_arviz", "to_xarray"]


def posterior_html(posterior: Draws, facts: dict[str, str]) -> str:
    """The facts as a table and, for pictures and points in the plane, a figure of the first observations."""
    rows = "".join(f"<tr><th style='text-align:left'>{html.escape(k)}</th><td style='text-align:left'>{html.escape(v)}"
                   "</td></tr>" for k, v in facts.items())
    table = f"<table><caption>Posterior</caption>{rows}</table>"
    png = _png(posterior)
    if png is None:
        return table
    data = base64.b64encode(png).decode("ascii")
    image = f"<img alt='samples, mean and standard deviation' src='data:image/png;base64,{data}'"
    return f"{table}{image} style='max-width:100%'>"


def _png(posterior: Draws) -> bytes | None:
    """The figure, with truth and observation if they are among the diagnostics."""
    shape = posterior.image_shape
    if shape != (2,) and not (len(shape) == 3 and min(shape[1:]) > 1 and max(shape[1:]) <= 1024):
        return None
    known = {key: value for key in ("truth", "observation")
             if isinstance(value := posterior.diagnostics.get(key), Tensor) and len(value) == len(posterior)}
    try:
        figure: Any = posterior.plot(known.get("truth"), known.get("observation"), rows=2)
    except ValueError:  # diagnostics of those names that are something else
        figure = posterior.plot(rows=2)
    return bytes(figure._repr_png_())


def _dimensions(shape: tuple[int, ...]) -> tuple[str, ...]:
    """Names of an image's axes."""
    if len(shape) == 3:
        return ("channel", "height", "width")
    return ("value",) if len(shape) == 1 else tuple(f"axis_{i}" for i in range(len(shape)))


def _missing(package: str, method: str) -> ImportError:
    return ImportError(f"Posterior.{method} needs {package}, which is not installed: pip install {package}; "
                       "Posterior.save writes a file without it")


def to_xarray(posterior: Draws) -> Any:
    """See :meth:`invflow.Posterior.to_xarray`."""
    try:
        import xarray
    except ImportError as error:
        raise _missing("xarray", "to_xarray") from error
    count = len(posterior)
    image = _dimensions(posterior.image_shape)
    variables: dict[str, Any] = {"samples": (("observation", "sample", *image), _numpy(posterior.samples))}
    if posterior.weighted:
        variables["log_weight"] = (("observation", "sample"), _numpy(posterior.log_weights))
    if posterior.log_evidence is not None:
        variables["log_evidence"] = (("observation",), _numpy(posterior.log_evidence))
    rest: dict[str, Any] = {}
    for key, value in posterior.diagnostics.items():
        if key in variables:
            continue
        if isinstance(value, Tensor) and value.ndim and len(value) == count:
            own = value.shape[1:]
            named = image if tuple(own) == posterior.image_shape else tuple(f"{key}_{i}" for i in range(len(own)))
            variables[key] = (("observation", *named), _numpy(value))
        else:
            rest[key] = value
    return xarray.Dataset(variables, attrs=_attributes(posterior, rest))


def to_arviz(posterior: Draws, generator: torch.Generator | None = None) -> Any:
    """See :meth:`invflow.Posterior.to_arviz`."""
    try:
        import arviz
    except ImportError as error:
        raise _missing("arviz", "to_arviz") from error
    draws = posterior.resample(posterior.num_samples, generator=generator) if posterior.weighted else posterior
    # one chain of N draws; the observations are an axis of the variable
    samples = draws.samples.transpose(0, 1)[None]
    groups = {"posterior": {"x": _numpy(samples)}}
    dimensions = {"x": ["observation", *_dimensions(posterior.image_shape)]}
    if int(arviz.__version__.split(".")[0]) >= 1:
        data = arviz.from_dict(groups, dims=dimensions)
    else:
        data = arviz.from_dict(posterior=groups["posterior"], dims=dimensions)
    rest = {key: value for key, value in draws.diagnostics.items() if not isinstance(value, Tensor)}
    ess = posterior.ess()
    if ess is not None:
        rest["resampled_from_ess"] = ess
    data["posterior"].attrs.update(_attributes(posterior, rest))
    return data


def _numpy(values: Tensor) -> Any:
    return values.detach().cpu().numpy()


def _attributes(posterior: Draws, rest: dict[str, Any]) -> dict[str, Any]:
    """Attributes that a netCDF file can hold: numbers and strings, and everything else as JSON."""
    from invflow._core.records import as_json, versions

    held = {"calls_forward": posterior.nfe.forward, "calls_backward": posterior.nfe.backward,
            "seconds": posterior.seconds}
    texts = {"settings": posterior.settings, "diagnostics": rest, "versions": versions()}
    return {**held, **{key: json.dumps(as_json(value, key)) for key, value in texts.items()}}
