"""Other libraries on our workloads. One module per peer; each imports its peer only when asked.

A row is a function that gets a batch and labels drawn from the model, and returns the timed call.
An answer is brought to the scale and the form said in `benchmarks.quantities` where the peer's
documentation says what its own scale is; an answer that is wrong by it stays wrong.
"""

from __future__ import annotations

from benchmarks.peers._peer import Peer, Prepare
from benchmarks.peers.with_asdl import ASDL
from benchmarks.peers.with_backpack import BACKPACK
from benchmarks.peers.with_curvlinops import CURVLINOPS
from benchmarks.peers.with_hessian_eigenthings import HESSIAN_EIGENTHINGS
from benchmarks.peers.with_kronfluence import KRONFLUENCE
from benchmarks.peers.with_laplace import LAPLACE
from benchmarks.peers.with_nngeometry import NNGEOMETRY
from benchmarks.peers.with_pytorch_optimizer import PYTORCH_OPTIMIZER
from benchmarks.peers.with_singd import SINGD
from benchmarks.peers.with_torch_func import TORCH_FUNC

__all__ = ["PEERS", "Peer", "Prepare"]

PEERS = (
    CURVLINOPS,
    BACKPACK,
    NNGEOMETRY,
    ASDL,
    KRONFLUENCE,
    LAPLACE,
    HESSIAN_EIGENTHINGS,
    TORCH_FUNC,
    SINGD,
    PYTORCH_OPTIMIZER,
)
"""In the order of the tables."""
