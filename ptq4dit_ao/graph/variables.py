"""Scale variables: a vectorised union-find, independent of graphs.

A variable is an unknown positive scale. Variable 0 is *pinned*: its scale is 1. Joining a variable with it pins that
variable too, because the smallest id of a class is its representative.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

Ids = NDArray[np.int64]
PINNED = 0


class ScaleVariables:
    """Union-find over int64 ids, whose operations take and return whole arrays."""

    def __init__(self) -> None:
        self._parent: Ids = np.zeros(1, dtype=np.int64)
        self._count = 1

    def fresh(self, shape: tuple[int, ...]) -> Ids:
        """An array of new variables of this shape."""
        n = int(np.prod(shape, dtype=np.int64))
        end = self._count + n
        if end > len(self._parent):
            grown = np.arange(max(end, 2 * len(self._parent)), dtype=np.int64)
            grown[: self._count] = self._parent[: self._count]
            self._parent = grown
        ids = np.arange(self._count, end, dtype=np.int64).reshape(shape)
        self._parent[self._count : end] = ids.ravel()
        self._count = end
        return ids

    def find(self, ids: Ids) -> Ids:
        """The representative of each id."""
        roots = self._parent[ids]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self._parent[ids] = roots
        return roots

    def union(self, a: Ids, b: Ids) -> bool:
        """Join ``a`` and ``b``, broadcast against each other; return whether any of them were different before."""
        left, right = np.broadcast_arrays(self.find(a), self.find(b))
        different = left != right
        if not different.any():
            return False
        pairs = np.stack([left[different], right[different]])
        nodes, edges = np.unique(pairs, return_inverse=True)
        edges = edges.reshape(2, -1)
        graph = coo_matrix((np.ones(edges.shape[1], dtype=np.int8), (edges[0], edges[1])), shape=(len(nodes),) * 2)
        count, component = connected_components(graph, directed=False)
        smallest = np.full(count, np.iinfo(np.int64).max)
        np.minimum.at(smallest, component, nodes)
        self._parent[nodes] = smallest[component]
        return True

    def pin(self, ids: Ids) -> bool:
        """Set the scale of ``ids`` to 1; return whether any of them was free."""
        return self.union(ids, np.zeros((), dtype=np.int64))

    def is_free(self, ids: Ids) -> bool:
        """Whether any of ``ids`` is not pinned."""
        return bool((self.find(ids) != PINNED).any())
