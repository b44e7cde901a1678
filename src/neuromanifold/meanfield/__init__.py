"""Random deep networks: what theory predicts of their Fisher matrix, next to what is measured."""

from neuromanifold.meanfield.locality import OffBlock, off_block

__all__ = ["OffBlock", "off_block"]
