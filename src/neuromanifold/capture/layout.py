"""Which parameters are measured, and which layer rule reads each of them."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from neuromanifold.errors import UncoveredParameterError, UnsupportedError, listed
from neuromanifold.layers import CompositeRule, Port, rule_for
from neuromanifold.linalg import Block, Layout

__all__ = ["Place", "Plan", "Site", "plan", "unwrap"]


Place: TypeAlias = tuple[str, str]
"""A module's name, and "" for its own input and output or the port of a composite rule."""


@dataclass(frozen=True)
class Site:
    """A block that rules read, and the places where it is used.

    Attributes:
        block: its parameters.
        ports: by place; several where modules share a weight.
        rule: what the coverage table calls the rules that read it.
    """

    block: Block
    ports: dict[Place, Port]
    rule: str

    @property
    def needs_input(self) -> bool:
        """Whether there is more than a bias."""
        return self.block.fan_in > self.block.biased


@dataclass
class Plan:
    """Who reports what: blocks with a rule, and single parameters on the generic path.

    Attributes:
        model: the module that is run; wrappers for compilation and data parallelism taken off.
        parameters: what is measured, by name.
        sites: blocks that rules read, by name.
        composites: modules that run by their rule's `forward` while records are taken, by name.
        generic: parameter name to the reason why no rule reads it.
    """

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    sites: dict[str, Site]
    composites: dict[str, CompositeRule] = field(default_factory=dict)
    generic: dict[str, str] = field(default_factory=dict)
    uncovered: str = "generic"

    def __post_init__(self) -> None:
        self._refuse_uncovered()

    @cached_property
    def layout(self) -> Layout:
        """Names and shapes of what is measured."""
        return Layout({name: tuple(p.shape) for name, p in self.parameters.items()})

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of statistics and results: the widest measured parameter's, float32 at least."""
        dtypes = (p.dtype for p in self.parameters.values())
        return functools.reduce(torch.promote_types, dtypes, torch.float32)

    @cached_property
    def device(self) -> torch.device:
        """Where the first measured parameter is."""
        return next(iter(self.parameters.values())).device

    @cached_property
    def blocks(self) -> list[Block]:
        """All blocks, in the order of their first parameter."""
        blocks = [site.block for site in self.sites.values()]
        blocks += [Block.vector(name, self.layout) for name in self.generic]
        order = {name: i for i, name in enumerate(self.parameters)}
        return sorted(blocks, key=lambda block: min(order[name] for name in block.parameters))

    @cached_property
    def places(self) -> dict[Place, bool]:
        """Where uses are observed, and whether their inputs are needed."""
        places: dict[Place, bool] = {}
        for site in self.sites.values():
            for place in site.ports:
                places[place] = places.get(place, False) or site.needs_input
        return places

    def give_up(self, block_name: str, reason: str) -> None:
        """Move a block's parameters to the generic path."""
        for name in self.sites.pop(block_name).block.parameters:
            self.generic[name] = reason
        for cached in ("blocks", "places"):
            self.__dict__.pop(cached, None)
        self._refuse_uncovered()

    def _refuse_uncovered(self) -> None:
        if self.uncovered == "error" and self.generic:
            reasons = [f"{name} ({reason})" for name, reason in self.generic.items()]
            raise UncoveredParameterError(
                f"No layer rule covers {listed(reasons)}. Pass params=... without them, register a "
                f'layer rule, or use uncovered="generic" to read them by per-sample gradients.'
            )


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside torch.compile and (distributed) data parallel wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def plan(model: nn.Module, params: Iterable[str] | None, uncovered: str) -> Plan:
    """Assign every measured parameter to a module with a rule, or to the generic path.

    Args:
        model: any module.
        params: names or shell-style patterns; None for all trainable parameters.
        uncovered: "generic" or "error".

    Raises:
        ValueError: If a name matches nothing, nothing trainable is left, or a measured parameter
            is lazy.
        UnsupportedError: If the model couples samples by train-mode batch normalisation, or a
            measured parameter is complex.
    """
    if uncovered not in ("generic", "error"):
        raise ValueError(f'uncovered is "generic" or "error", got {uncovered!r}.')
    model = unwrap(model)
    _refuse_batch_statistics(model)
    parameters = _selected(model, params)
    _refuse_lazy(parameters)
    _refuse_complex(parameters)
    _refuse_empty(parameters)
    sites: dict[str, Site] = {}
    generic: dict[str, str] = {}
    for name, pieces in _pieces(model, parameters).items():
        lookup = all(piece.block.lookup for piece in pieces)
        blocks = {
            piece.block if piece.block.lookup == lookup else replace(piece.block, lookup=lookup)
            for piece in pieces
        }
        if len(blocks) > 1:
            unlike = " and ".join(piece.rule for piece in pieces)
            generic.update(dict.fromkeys(pieces[0].block.parameters, f"shared by {unlike}"))
            continue
        ports = {place: port for piece in pieces for place, port in piece.ports.items()}
        rules = " + ".join(dict.fromkeys(piece.rule for piece in pieces))
        sites[name] = Site(blocks.pop(), ports, rules)
    covered = {name for site in sites.values() for name in site.block.parameters}
    for name in parameters:
        if name not in covered:
            generic.setdefault(name, _owner_reason(model, name))
    used = [module for site in sites.values() for module, _ in site.ports]
    composites = {
        name: rule
        for name, module in model.named_modules()
        if module._parameters
        and isinstance(rule := rule_for(module), CompositeRule)
        # Also for layers inside, which only the rule calls as modules.
        and any(f"{module}.".startswith(f"{name}." if name else "") for module in used)
    }
    return Plan(model, parameters, sites, composites, generic, uncovered)


def _pieces(model: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, list[Site]]:
    """What each module's rule says of it, by the name of the block.

    Parameters have the names that the model gives them, those of their first owner.
    """
    names = {id(p): name for name, p in parameters.items()}
    shared = _shared(model)
    pieces: dict[str, list[Site]] = {}
    for module_name, module in model.named_modules():
        own = {name: p for name, p in module._parameters.items() if p is not None}
        local = frozenset(name for name, p in own.items() if id(p) in names)
        rule = rule_for(module) if local else None
        if rule is None:
            continue
        prefix = f"{module_name}." if module_name else ""
        for piece in rule.pieces(module, module_name, local):
            parts = [own[slot.parameter.removeprefix(prefix)] for slot in piece.block.slots]
            called = tuple(names[id(p)] for p in parts)
            ports = {
                (module_name, use.port): Port(use.rule, module, use.groups) for use in piece.uses
            }
            block = piece.block if piece.block.parameters == called else piece.block.renamed(called)
            cut = any(id(p) in shared for p in parts)
            for part in _apart(block) if cut else [block]:
                pieces.setdefault(part.name, []).append(Site(part, ports, rule.name))
    return pieces


def _apart(block: Block) -> list[Block]:
    """A block of each parameter, named after it.

    A weight that two layers share has one block, in which both take part; their biases have blocks
    of their own.
    """
    parts = [(name, block.restrict([name])) for name in block.parameters]
    return [replace(part[0], name=name) for name, part in parts if part is not None]


def _selected(model: nn.Module, params: Iterable[str] | None) -> dict[str, nn.Parameter]:
    parameters = dict(model.named_parameters())
    trainable = [name for name, p in parameters.items() if p.requires_grad]
    frozen = [name for name, p in parameters.items() if not p.requires_grad]
    if params is None:
        selected = set(trainable)
    else:
        first = {id(p): name for name, p in parameters.items()}
        # A shared weight has a name at each of its owners, and goes by the first.
        called = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        patterns = [params] if isinstance(params, str) else list(params)
        selected = set()
        other = [pattern for pattern in patterns if not isinstance(pattern, str)]
        if other:
            raise TypeError(
                f"params takes names or patterns, got a {type(other[0]).__name__}. Give names: "
                f"[name for name, _ in model.named_parameters()]."
            )
        for pattern in patterns:
            if pattern in called:  # a name: no look at all the others
                matching = {called[pattern]}
            else:
                matching = {name for alias, name in called.items() if fnmatchcase(alias, pattern)}
            found = matching.intersection(trainable)
            if not found and matching.intersection(frozen):
                raise ValueError(
                    f"params names {pattern!r}, which is frozen. Call requires_grad_(True) on it "
                    f"to measure its Fisher information."
                )
            if not found:
                raise ValueError(
                    f"params names {pattern!r}, but no parameter is called so. "
                    f"There are: {listed(trainable, near=pattern)}."
                )
            selected.update(found)
    if not selected and params is not None:
        raise ValueError("params is empty; name at least one parameter, or leave it out for all.")
    if not selected:
        raise ValueError(
            "The model has no trainable parameter. Call requires_grad_(True) on those whose Fisher "
            "information you want."
        )
    return {name: p for name, p in parameters.items() if name in selected}


def _refuse_lazy(parameters: dict[str, nn.Parameter]) -> None:
    found = [name for name, p in parameters.items() if nn.parameter.is_lazy(p)]
    if found:
        raise ValueError(
            f"Parameters {found} have no shape before the first forward pass. Call the model once "
            f"with a batch, then measure it."
        )


def _refuse_complex(parameters: dict[str, nn.Parameter]) -> None:
    found = [name for name, p in parameters.items() if p.is_complex()]
    if found:
        raise UnsupportedError(
            f"Parameters {found} are complex; the Fisher information is over real numbers. Store "
            f"their real and imaginary parts (torch.view_as_real), or leave them out by params=..."
        )


def _refuse_empty(parameters: dict[str, nn.Parameter]) -> None:
    found = [name for name, p in parameters.items() if not p.numel()]
    if found:
        raise ValueError(
            f"Parameters {found} have no entries, so there is nothing to measure. Call "
            f"requires_grad_(False) on them, or leave them out by params=..."
        )


def _shared(model: nn.Module) -> set[int]:
    """Identities of parameters that several modules own."""
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for p in module._parameters.values():
            owners.setdefault(id(p), set()).add(id(module))
    return {parameter for parameter, modules in owners.items() if len(modules) > 1}


def _owner_reason(model: nn.Module, name: str) -> str:
    owner = model.get_submodule(name.rpartition(".")[0])
    return f"no rule for {type(owner).__name__}"


def _refuse_batch_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            how = (
                "Call model.eval() first"
                if module.running_mean is not None
                else "Give it running statistics (track_running_stats=True) and call model.eval()"
            )
            raise UnsupportedError(
                f"{type(module).__name__} {name!r} normalises with the statistics of the batch, "
                f"which couples the samples: a Fisher information per sample does not exist. {how}."
            )
