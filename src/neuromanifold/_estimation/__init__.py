"""Estimates that run until they are sure enough."""

from neuromanifold._estimation.numbers import Wanted, checked_share
from neuromanifold._estimation.result import Estimated, shares
from neuromanifold._estimation.run import estimate

__all__ = ["Estimated", "Wanted", "checked_share", "estimate", "shares"]
