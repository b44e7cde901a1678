"""How sure a measured Fisher information is: closed forms of its variance (papers.md §3).

Source: Soen and Sun, NeurIPS 2021 (arXiv 2107.04205) and NeurIPS 2024 (arXiv 2402.05379).
"""

from neuromanifold.variance.diagonal import diagonal

__all__ = ["diagonal"]
