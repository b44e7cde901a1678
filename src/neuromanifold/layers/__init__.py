"""How a module's gradient is made of its inputs and the cotangents at its output."""

from neuromanifold.layers._base import Call, LayerRule, Record, register, rule_for
from neuromanifold.layers.conv import ConvRule
from neuromanifold.layers.linear import LinearRule

__all__ = [
    "Call",
    "ConvRule",
    "LayerRule",
    "LinearRule",
    "Record",
    "register",
    "rule_for",
]
