"""From a model and a batch to a stream of records."""

from neuromanifold.capture.data import (
    Batch,
    Data,
    Forward,
    call_model,
    check_devices,
    logits_of,
)
from neuromanifold.capture.generic import (
    FEW,
    buffers_kept,
    functional_model,
    require_function,
)
from neuromanifold.capture.kernels import differentiable_twice
from neuromanifold.capture.layout import Plan, Site, plan, unwrap
from neuromanifold.capture.plain import attention_weights
from neuromanifold.capture.tape import Tape, is_measured
from neuromanifold.capture.units import ACTIVATIONS, UnitTape, function_name

__all__ = [
    "ACTIVATIONS",
    "FEW",
    "Batch",
    "Data",
    "Forward",
    "Plan",
    "Site",
    "Tape",
    "UnitTape",
    "attention_weights",
    "buffers_kept",
    "call_model",
    "check_devices",
    "differentiable_twice",
    "function_name",
    "functional_model",
    "is_measured",
    "logits_of",
    "plan",
    "require_function",
    "unwrap",
]
