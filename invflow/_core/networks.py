"""Third-party networks: kept in evaluation mode, and called with their arguments in the order that they expect."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Condition", "Network", "argument_order", "networks_of", "settle"]

#: usual names of network arguments, by role
STATES = frozenset(("x", "x_t", "xt", "z", "z_t", "zt", "y_t", "state", "states", "sample", "samples", "input",
                    "inputs", "image", "images", "img", "imgs", "latent", "latents", "hidden_states", "noisy"))
TIMES = frozenset(("t", "time", "times", "timestep", "timesteps", "ts", "tau", "sigma", "sigmas", "noise_level",
                   "level", "noise_labels", "t_cond", "time_cond", "s"))
TARGETS = frozenset(("r", "h", "dt", "t_r", "r_timestep", "timestep_r", "target", "t_target", "t_end", "end", "gap",
                     "t_next", "duration", "t_minus_r"))
ROLES = {"x": STATES, "t": TIMES, "r": TARGETS}


def networks_of(function: Any, depth: int = 2) -> list[nn.Module]:
    """Modules that a function runs, as far as they can be found.

    These are the function itself, the object that a method belongs to, closure variables and globals, and the same for
    the functions that it calls, down to ``depth`` levels.
    """
    if isinstance(function, nn.Module):
        return [function]
    parts: list[Any] = []
    if isinstance(function, functools.partial):
        parts = [function.func, *function.args, *function.keywords.values()]
    elif inspect.ismethod(function):
        parts = [function.__self__] if isinstance(function.__self__, nn.Module) else _held(function.__self__)
    elif inspect.isfunction(function):
        seen = inspect.getclosurevars(inspect.unwrap(function))
        parts = [*seen.nonlocals.values(), *seen.globals.values()]
    elif callable(function) and not isinstance(function, type):
        parts = _held(function)
    found: dict[int, nn.Module] = {}
    for part in parts:
        if isinstance(part, nn.Module):
            found[id(part)] = part
        elif depth and callable(part) and not isinstance(part, type):
            found |= {id(module): module for module in networks_of(part, depth - 1)}
    return list(found.values())


def _held(thing: Any) -> list[Any]:
    return list(getattr(thing, "__dict__", {}).values())


def settle(function: Any) -> list[nn.Module]:
    """Put the networks of a function into evaluation mode, so that dropout is off and BatchNorm is not updated.

    Returns:
        The networks.
    """
    modules = networks_of(function)
    for module in modules:
        if any(part.training for part in module.modules()):
            module.eval()
    return modules


def argument_order(function: Any, roles: Sequence[str], order: str | None, call: str) -> tuple[str, ...]:
    """Order of a function's arguments: state ``x``, its time ``t`` and, for an average velocity, the second time ``r``.

    Args:
        function: Function or module with named arguments.
        roles: Roles of its arguments, such as ``("x", "t")``.
        order: Order stated by the caller, such as ``"t, x"``. None infers it from the names.
        call: Call to suggest in the error message, up to the order.

    Returns:
        The roles in the function's order.

    Raises:
        TypeError: If the order cannot be inferred from the names.
        ValueError: For an order that does not name each role once.
    """
    if order is not None:
        stated = tuple(part.strip() for part in order.split(","))
        if sorted(stated) != sorted(roles):
            raise ValueError(f"order={order!r}: name each of {', '.join(roles)} once, in the order in which the "
                             f"network takes them, such as order={', '.join(roles)!r}")
        return stated
    names = _positional(function)
    if names is not None and len(names) >= len(roles):
        kinds = [next((role for role in roles if name.lower().strip("_") in ROLES[role]), None)
                 for name in names[:len(roles)]]
        unknown = [role for role in roles if role not in kinds]
        later = {name.lower() for name in names[len(roles):]}
        if len(unknown) == 1 and kinds.count(None) == 1 and not later & ROLES[unknown[0]]:
            kinds[kinds.index(None)] = unknown[0]
        if sorted(kind or "" for kind in kinds) == sorted(roles):
            return tuple(kind or "" for kind in kinds)
    examples = " or ".join(f"order={', '.join(example)!r}" for example in (tuple(roles), (*roles[1:], roles[0])))
    meaning = {"x": "x the state", "t": "t its time", "r": "r the second time"}
    taken = "arguments whose names cannot be read" if names is None else f"({', '.join(names)})"
    raise TypeError(f"{_name(function)} takes {taken}, which does not show the order of "
                    f"{', '.join(meaning[role] for role in roles)}: pass the order, {call}, {examples})")


def _positional(function: Any) -> list[str] | None:
    target = getattr(function, "_orig_mod", function)  # of a compiled module
    target = getattr(target, "module", target) if type(target).__name__ in ("DataParallel",
                                                                            "DistributedDataParallel") else target
    if isinstance(target, nn.Module):
        target = target.forward
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return None
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return names or None


def _name(function: Any) -> str:
    return getattr(function, "__name__", None) or type(function).__name__


class Condition(nn.Module):
    """Fixed arguments: one row of each tensor, repeated for the batch.

    The tensors move and change type with the module.

    Args:
        values: Values by argument name: tensors ``(1, ...)``, numbers (used for every row), dictionaries of these, or
            anything else, which is passed unchanged.

    Raises:
        ValueError: For a tensor with several rows.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        self.names: list[str] = []
        self.plain: dict[str, Any] = {}
        self.nested = nn.ModuleDict()
        for name, value in values.items():
            if isinstance(value, Mapping):
                self.nested[name] = Condition(value)
            elif isinstance(value, Tensor) or (isinstance(value, (int, float)) and not isinstance(value, bool)):
                tensor = torch.as_tensor(value).detach()
                tensor = tensor[None] if tensor.ndim == 0 else tensor
                if tensor.shape[0] != 1:
                    raise ValueError(
                        f"{name} has shape {tuple(tensor.shape)}, {tensor.shape[0]} rows, but a prior has one "
                        f"fixed condition: pass one row, (1, {', '.join(map(str, tensor.shape[1:])) or '...'})"
                    )
                self.names.append(name)
                self.register_buffer(f"value_{name}", tensor, persistent=False)
            else:
                self.plain[name] = value

    def rows(self, n: int, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments for n rows, with floating-point tensors in ``dtype``."""
        found: dict[str, Any] = dict(self.plain)
        for name in self.names:
            tensor: Tensor = getattr(self, f"value_{name}")
            tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
            found[name] = tensor.expand(n, *tensor.shape[1:])
        return found | {name: condition.rows(n, dtype) for name, condition in self.nested.items()}  # type: ignore[operator]


class _Seen(list[nn.Module]):
    """Modules that belong to other objects. A copy of the list holds the same modules."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Seen:
        return self


class Network(nn.Module):
    """Third-party function of a state and of times, with all its other arguments fixed.

    Its networks are put into evaluation mode and stay there. Calling ``train()`` on a parent module, or on the network
    itself between two calls, does not re-enable dropout or BatchNorm updates.

    Args:
        function: Function or module to call. A module becomes a submodule, and so does the module that a method
            belongs to.
        condition: Other arguments, by name.
        order: Order of the state x, the time t and the second time r; see :func:`argument_order`.
        roles: Which of these the function takes.
        call: Call that builds this network, for messages.

    Raises:
        TypeError: If the function cannot be called, its order cannot be inferred, or it has no argument with the name
            of a condition.
        ValueError: For an order that does not name each role once.
    """

    def __init__(self, function: Callable[..., Any], condition: Mapping[str, Any] | None = None,
                 order: str | None = None, roles: Sequence[str] = ("x", "t"), call: str = "from_velocity(...") -> None:
        super().__init__()
        self.order = argument_order(function, roles, order, call)
        self.roles, self.function = tuple(roles), function
        _check_names(function, self.roles, condition or {}, call)
        self.condition = Condition(condition or {})
        owner = getattr(function, "__self__", None)
        self.owner = owner if isinstance(owner, nn.Module) else None
        mine = {id(module) for module in (function, owner) if isinstance(module, nn.Module)}
        #: modules in a closure: they neither move nor are copied with this module
        self.elsewhere = _Seen(module for module in networks_of(function) if id(module) not in mine)
        device = next((p.device for p in self.parameters()), None)
        if device is not None:
            self.condition.to(device)
        self.eval()

    def train(self, mode: bool = True) -> Network:
        """Stay in evaluation mode, whatever ``mode`` is."""
        self.training = False
        settle(self.function)
        return self

    @property
    def dtype(self) -> torch.dtype | None:
        """Floating-point type of the network's weights; None for a function without weights."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), None)

    def forward(self, x: Tensor, *times: Tensor) -> Any:
        """Evaluate the function at states ``(n, *shape)`` and times ``(n,)``."""
        for module in (self.function, self.owner, *self.elsewhere):
            if isinstance(module, nn.Module) and module.training:
                module.eval()
        given = dict(zip(self.roles, (x, *times)))
        return self.function(*(given[role] for role in self.order), **self.condition.rows(len(x), x.dtype))


def _check_names(function: Any, roles: Sequence[str], condition: Mapping[str, Any], call: str) -> None:
    """Check that the function takes every condition, and that every required argument has one."""
    target = getattr(function, "_orig_mod", function)
    try:
        parameters = inspect.signature(target.forward if isinstance(target, nn.Module) else target).parameters
    except (TypeError, ValueError):
        return
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in condition:
        if name not in parameters and not anything:
            raise TypeError(f"{_name(function)} takes no argument {name!r}: it takes {', '.join(parameters)}")
    required = [p.name for p in parameters.values()
                if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    missing = [name for name in required[len(roles):] if name not in condition]
    if missing:
        raise TypeError(f"{_name(function)} also takes {', '.join(missing)}, fixed in a prior: pass "
                        f"{call}, {', '.join(f'{name}=...' for name in missing)}), each a number or one row")
