"""Relative Fisher information: the metric of a component, given what surrounds it.

Source: Sun and Nielsen, arXiv 1606.06069.
"""

__all__: list[str] = []
