"""Estimates that run until they are sure enough."""

from neuromanifold._estimation.run import Estimated, Wanted, estimate, shares

__all__ = ["Estimated", "Wanted", "estimate", "shares"]
