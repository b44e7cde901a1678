"""How a module's gradient is made of its inputs and the cotangents at its output."""

from neuromanifold.layers._base import (
    CompositeRule,
    ElementwiseRule,
    LayerRule,
    Piece,
    Reporter,
    Use,
    WeightRule,
    register,
    rule_for,
)
from neuromanifold.layers.attention import AttentionRule
from neuromanifold.layers.conv import ConvRule, ConvTransposeRule
from neuromanifold.layers.embedding import EmbeddingRule
from neuromanifold.layers.generic import record_of_parameter
from neuromanifold.layers.linear import LinearRule
from neuromanifold.layers.norm import ScaleRule
from neuromanifold.layers.parts import Factored, Indexed, Part, Side, Whole, count_uses
from neuromanifold.layers.recognised import recognised_scale
from neuromanifold.layers.record import Call, Port, Record
from neuromanifold.layers.recurrent import CellRule, RecurrentRule

__all__ = [
    "AttentionRule",
    "Call",
    "CellRule",
    "CompositeRule",
    "ConvRule",
    "ConvTransposeRule",
    "ElementwiseRule",
    "EmbeddingRule",
    "Factored",
    "Indexed",
    "LayerRule",
    "LinearRule",
    "Part",
    "Piece",
    "Port",
    "Record",
    "RecurrentRule",
    "Reporter",
    "ScaleRule",
    "Side",
    "Use",
    "WeightRule",
    "Whole",
    "count_uses",
    "recognised_scale",
    "record_of_parameter",
    "register",
    "rule_for",
]
