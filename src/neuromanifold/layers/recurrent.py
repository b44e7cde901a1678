"""Recurrent layers and cells: what they do at every step, written out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from neuromanifold.layers._base import CompositeRule, Piece, Reporter, Use, register
from neuromanifold.layers.linear import LinearRule
from neuromanifold.linalg import Block, Slot

__all__ = ["CellRule", "RecurrentRule"]

_LINEAR = LinearRule()

State: TypeAlias = tuple[Tensor, ...]
"""`(h,)`, or `(h, c)` of an LSTM: `(N, H)` each."""
Step: TypeAlias = Callable[[nn.Module, Tensor, Tensor, State], State]
"""The state after, from the input's and the hidden state's share of the gates `(N, gates·H)` and
the state before."""


class _UnrolledRule(CompositeRule):
    """Three matrices: "ih" takes the input, "hh" the hidden state, "hr" makes it narrower.

    Each is a block with its bias, named after the module and the matrix, and after layer and
    direction where there are several: "lstm.hh_l0_reverse". It is used once at every position; what
    the uses of "hh" tell each other through the hidden state is in their cotangents.

    Args:
        step: what happens at one position.
        remembers: whether there is a cell state beside the hidden state.
    """

    name = "recurrent"

    def __init__(self, step: Step, *, remembers: bool = False) -> None:
        self._step = step
        self._remembers = remembers

    def pieces(self, module: nn.Module, name: str, trainable: frozenset[str]) -> list[Piece]:
        """`(1, gates·H, I)`; of a projection `(1, O, H)`."""
        prefix = f"{name}." if name else ""
        found = []
        own = [local for local, _ in module.named_parameters(recurse=False)]
        for port in dict.fromkeys(local.partition("_")[2] for local in own):
            fan_out, fan_in = getattr(module, f"weight_{port}").shape
            columns = {f"weight_{port}": fan_in, f"bias_{port}": 1}
            slots = tuple(
                Slot.plain(prefix + local, 1, fan_out, number)
                for local, number in columns.items()
                if local in trainable
            )
            block = Block(prefix + port, 1, fan_out, slots, biased=f"bias_{port}" in trainable)
            if slots:
                found.append(Piece(block, (Use(port, _LINEAR),)))
        return found

    @abstractmethod
    def forward(self, module: nn.Module, use: Reporter, *args: Any, **kwargs: Any) -> Any:
        """Ports are named as blocks are, without the module."""

    def _start(self, x: Tensor, hx: Any, *shapes: tuple[int, ...]) -> State | None:
        """The state that is given, or zeros; None if what is given has other shapes."""
        shapes = shapes if self._remembers else shapes[:1]
        if hx is None:
            return tuple(x.new_zeros(shape) for shape in shapes)
        given = tuple(hx) if self._remembers else (hx,)
        if any(not isinstance(h, Tensor) for h in given):
            return None
        return given if [tuple(h.shape) for h in given] == list(shapes) else None

    def _returned(self, state: State) -> Any:
        return state if self._remembers else state[0]


class RecurrentRule(_UnrolledRule):
    """`nn.RNN`, `nn.GRU` and `nn.LSTM`: several layers, in one direction or both.

    Packed sequences, inputs without a sample axis, and dropout between layers in training are left
    to the module.
    """

    def forward(
        self,
        module: nn.Module,
        use: Reporter,
        input: Any,  # noqa: A002
        hx: Any = None,
    ) -> Any:
        """Outputs `(N, T, H)` or `(T, N, H)`, and the last state of each layer and direction."""
        assert isinstance(module, nn.RNNBase)
        drops = module.training and module.dropout > 0 and module.num_layers > 1
        if not isinstance(input, Tensor) or input.ndim != 3 or drops:
            return type(module).forward(module, input, hx)
        directions = ("", "_reverse") if module.bidirectional else ("",)
        num_samples = input.shape[0 if module.batch_first else 1]
        lead = (module.num_layers * len(directions), num_samples)
        width = module.hidden_size
        start = self._start(input, hx, (*lead, module.proj_size or width), (*lead, width))
        if start is None:
            return type(module).forward(module, input, hx)
        starts = zip(*start, strict=True)
        x, ends = input, []
        for layer in range(module.num_layers):
            outputs = []
            for direction in directions:
                name = f"l{layer}{direction}"
                output, end = self._scan(module, use, name, x, next(starts))
                outputs.append(output)
                ends.append(end)
            x = torch.cat(outputs, dim=-1)
        return x, self._returned(tuple(torch.stack(states) for states in zip(*ends, strict=True)))

    def _scan(
        self, module: nn.RNNBase, use: Reporter, name: str, x: Tensor, state: State
    ) -> tuple[Tensor, State]:
        """One layer in one direction: hidden states in the arrangement of `x`, and the last."""
        time = 1 if module.batch_first else 0
        shares = list(_product(module, use, f"ih_{name}", x).unbind(time))
        hidden = []
        for share in reversed(shares) if name.endswith("_reverse") else shares:
            gates = _product(module, use, f"hh_{name}", state[0])
            state = self._step(module, share, gates, state)
            if module.proj_size:
                state = (_product(module, use, f"hr_{name}", state[0]), *state[1:])
            hidden.append(state[0])
        if name.endswith("_reverse"):
            hidden.reverse()
        return torch.stack(hidden, dim=time), state


class CellRule(_UnrolledRule):
    """`nn.RNNCell`, `nn.GRUCell` and `nn.LSTMCell`: one step.

    Inputs without a sample axis are left to the module.
    """

    def forward(
        self,
        module: nn.Module,
        use: Reporter,
        input: Tensor,  # noqa: A002
        hx: Any = None,
    ) -> Any:
        """The state after, `(N, H)`; of an LSTM a pair."""
        assert isinstance(module, nn.RNNCellBase)
        shape = (input.shape[0], module.hidden_size)
        state = self._start(input, hx, shape, shape) if input.ndim == 2 else None
        if state is None:
            return type(module).forward(module, input, hx)
        share = _product(module, use, "ih", input)
        gates = _product(module, use, "hh", state[0])
        return self._returned(self._step(module, share, gates, state))


def _product(module: nn.Module, use: Reporter, port: str, x: Tensor) -> Tensor:
    """A matrix of the module times x, plus its bias if it has one."""
    weight, bias = getattr(module, f"weight_{port}"), getattr(module, f"bias_{port}", None)
    return use(port, x, functional.linear(x, weight, bias))


def _elman(module: nn.Module, share: Tensor, gates: Tensor, _: State) -> State:
    """`h = tanh(s + z)`, or the positive part."""
    total = share + gates
    return (total.tanh() if module.nonlinearity == "tanh" else total.relu(),)


def _gru(_: nn.Module, share: Tensor, gates: Tensor, state: State) -> State:
    """`h = (1 − u) n + u h` with `n = tanh(s_n + r z_n)`."""
    (h,) = state
    share_r, share_u, share_n = share.chunk(3, dim=-1)
    gate_r, gate_u, gate_n = gates.chunk(3, dim=-1)
    reset, update = (share_r + gate_r).sigmoid(), (share_u + gate_u).sigmoid()
    new = (share_n + reset * gate_n).tanh()
    return (new + update * (h - new),)


def _lstm(_: nn.Module, share: Tensor, gates: Tensor, state: State) -> State:
    """`c = f c + i j` and `h = o tanh(c)`."""
    write, forget, new, read = (share + gates).chunk(4, dim=-1)
    c = forget.sigmoid() * state[1] + write.sigmoid() * new.tanh()
    return read.sigmoid() * c.tanh(), c


register(nn.RNN, RecurrentRule(_elman))
register(nn.GRU, RecurrentRule(_gru))
register(nn.LSTM, RecurrentRule(_lstm, remembers=True))
register(nn.RNNCell, CellRule(_elman))
register(nn.GRUCell, CellRule(_gru))
register(nn.LSTMCell, CellRule(_lstm, remembers=True))
