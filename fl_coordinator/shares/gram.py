"""The inner products of shared rows: each party's share of them, the exact product in float64, and their opening."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fl_coordinator.shares.sharing import Exchange, Pair, Session, Steps, to_bytes
from fl_coordinator.shares.streams import Words64
from model_delta.errors import Untrusted

_LIMB_BITS = 22
_GRAM_BLOCK = 512


def open_gram(session: Session, lifted: Pair) -> Steps[NDArray[np.int64]]:
    """The inner products of all rows of shared `lifted` uint64[n, w], opened to all three: int64[n, n].

    Raises Untrusted for a peer's message of another length, by name, and for what no three honest shares add up to.
    """
    share = gram_share(lifted.first, lifted.second)
    count = len(share)
    upper = np.triu_indices(count)
    masked = share[upper] + session.zero_sum("gram", share[upper])
    data = to_bytes(masked)
    received = yield Exchange("gram", dict.fromkeys(session.peers, data), session.peers)
    doubled = masked
    for peer in sorted(session.peers):
        doubled = doubled + session.read_words(received, peer, "gram", masked)
    if (doubled & np.uint64(1)).any():
        raise Untrusted("step 'gram': the three shares add up to odd numbers; an aggregator has deviated")
    gram = np.zeros((count, count), dtype=np.int64)
    gram[upper] = doubled.view(np.int64) >> 1
    gram = gram + np.triu(gram, 1).T
    _require_possible(gram)
    return gram


def gram_share(first: Words64, second: Words64) -> Words64:
    """This party's additive share of 2 X X^T modulo 2^64, not yet masked: uint64[n, n] from shares uint64[n, d].

    With M_i = X_i (X_i + 2 X_{i+1})^T the sum over i of M_i + M_i^T is 2 (X_0 + X_1 + X_2)(X_0 + X_1 + X_2)^T: one
    product instead of two. Twice the matrix is opened and halved, so its entries must lie in [-2^62, 2^62).
    """
    product = multiply_transposed(first, first + (second << np.uint64(1)))
    return product + product.T


def multiply_transposed(a: Words64, b: Words64) -> Words64:
    """a b^T modulo 2^64, exactly: uint64[n, m] from uint64[n, d] and uint64[m, d].

    NumPy multiplies integers without BLAS. Here each word is three balanced limbs (22, 22, 20 bits, magnitude at most
    2^21) in float64; of the nine limb products the three above 2^64 vanish. In blocks of 512 columns no sum exceeds
    3 * 512 * 2^42 < 2^53, hence nothing is rounded.
    """
    total = np.zeros((a.shape[0], b.shape[0]), dtype=np.uint64)
    for start in range(0, a.shape[1], _GRAM_BLOCK):
        left = _limbs(a[:, start : start + _GRAM_BLOCK])
        right = _limbs(b[:, start : start + _GRAM_BLOCK])
        for order in range(3):
            x = np.concatenate(left[: order + 1], axis=1)
            y = np.concatenate(right[order::-1], axis=1)
            exact = (x @ y.T).astype(np.int64).view(np.uint64)
            total += exact << np.uint64(_LIMB_BITS * order)
    return total


def _limbs(block: Words64) -> list[NDArray[np.float64]]:
    """Balanced digits in base 2^22, lowest first: float64 of magnitude at most 2^21."""
    half = 1 << (_LIMB_BITS - 1)
    mask = np.uint64((1 << _LIMB_BITS) - 1)
    raised = block + np.uint64(half + (half << _LIMB_BITS) + (1 << 63))
    low = (raised & mask).astype(np.float64) - half
    middle = ((raised >> np.uint64(_LIMB_BITS)) & mask).astype(np.float64) - half
    high = (raised >> np.uint64(2 * _LIMB_BITS)).astype(np.float64) - float(1 << 19)
    return [low, middle, high]


def _require_possible(gram: NDArray[np.int64]) -> None:
    """Inner products obey Cauchy-Schwarz; random numbers in their place do not. In float64 with 1e-9 to spare."""
    real = gram.astype(np.float64)
    norms = np.diagonal(real)
    if (norms < 0).any() or (real * real > np.outer(norms, norms) * (1 + 1e-9)).any():
        raise Untrusted("step 'gram': the opened numbers are no inner products; an aggregator has deviated")
