"""Types that every layer of the library shares."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

Params: TypeAlias = dict[str, Tensor]
"""Parameter name, as in `model.named_parameters()`, to a tensor of the parameter's shape."""

Outputs: TypeAlias = Tensor | tuple[Tensor, ...]
"""What a model returns and a likelihood understands; axis 0 is the sample axis N."""
