"""The inner products of shared rows: each party's share of them, the exact product in float64, and their opening.

What is opened is checked before anything is decided from it (after Freivalds, 1977, on shares). G be the matrix as
opened, X the rows. A random A that nobody knows (w x 5) is multiplied by X first; only then a coin gives weights
R (n x 5) in [0, 256), X^T R + A is opened, which A hides, and X (X^T R + A) - X A - G R has to be zero. A row of G that
is off by E adds E R to that, of which a liar can take back only what it put into X A before there was an R. All inner
products are below 2^55, and a G that says anything else is refused: so some entry of E is not divisible by 2^56, its
multiples by two different weights differ modulo 2^64, and one of the 256 weights at most lets a column pass. A wrong G
passes with probability at most 2^-40. What was opened up to then is G alone, off by numbers of the liar's choice, which
tell it nothing that G does not.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fl_coordinator.shares.sharing import (
    Exchange,
    Pair,
    Session,
    Steps,
    are_zero,
    missing_share,
    plus_public,
    reshare,
    to_bytes,
    toss,
)
from fl_coordinator.shares.streams import Words64, expand_bytes
from model_delta.errors import Untrusted

_LIMB_BITS = 22
_GRAM_BLOCK = 512
_CHECKS = 5
_PRODUCT_BITS = 55
"""Of an inner product of what `bounds` lets through, without the sign."""


def open_gram(session: Session, lifted: Pair) -> Steps[NDArray[np.int64]]:
    """The inner products of all rows of shared `lifted` uint64[n, w], opened to all three: int64[n, n].

    Raises Untrusted for a peer's message of another length, by name, and for what is not the rows' products.
    """
    count, width = lifted.first.shape
    hidden = session.random("gram-hidden", np.zeros((_CHECKS, width), dtype=np.uint64))
    share, own = _products(lifted, hidden)
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
    taken = yield from reshare(session, "gram-taken", own)
    yield from _require_product(session, lifted, gram, hidden, taken)
    return gram


def _require_product(session: Session, rows: Pair, gram: NDArray[np.int64], hidden: Pair, taken: Pair) -> Steps[None]:
    """Raise Untrusted unless `gram` has the products of the rows. `taken` are those of rows and `hidden`."""
    coin = yield from toss(session, "gram-coin")
    octets = np.frombuffer(expand_bytes(coin, len(gram) * _CHECKS), dtype=np.uint8)
    weights = octets.astype(np.float64).reshape(-1, _CHECKS)
    summed = Pair(
        multiply_by_small(rows.first.T, weights).T + hidden.first,
        multiply_by_small(rows.second.T, weights).T + hidden.second,
    )
    told = summed.first + summed.second + (yield from missing_share(session, "gram-sums", summed))
    left = Pair(
        multiply_transposed(rows.first, told) - taken.first,
        multiply_transposed(rows.second, told) - taken.second,
    )
    due = multiply_by_small(gram.view(np.uint64), weights)
    # Who lacks share 0 would else look at what its peers were told of the matrix, not at what it was told itself.
    told_all = to_bytes(gram.view(np.uint64))
    if not (yield from are_zero(session, "gram-zero", plus_public(session, left, -due), told_all)):
        raise Untrusted("step 'gram': what was opened are not the products of the sketches; an aggregator has deviated")


def _products(rows: Pair, hidden: Pair) -> tuple[Words64, Words64]:
    """This party's additive shares, not yet masked, of twice the rows' products with each other, uint64[n, n], and of
    their products with `hidden`, uint64[n, 5]."""
    both = np.concatenate([rows.first + (rows.second << np.uint64(1)), hidden.first + hidden.second])
    products = multiply_transposed(rows.first, both)
    own, count = products[:, : len(rows.first)], len(rows.first)
    return own + own.T, products[:, count:] + multiply_transposed(rows.second, hidden.first)


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


def multiply_by_small(a: Words64, b: NDArray[np.float64]) -> Words64:
    """a b modulo 2^64, exactly: uint64[n, m] from uint64[n, d] and float64[d, m], whole numbers whose sum over a column
    is below 2^21 in magnitude."""
    low = (a & np.uint64(0xFFFFFFFF)).astype(np.float64) @ b
    high = (a >> np.uint64(32)).astype(np.float64) @ b
    return low.astype(np.int64).view(np.uint64) + (high.astype(np.int64).view(np.uint64) << np.uint64(32))


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
    if (
        (np.abs(real) >= 2.0**_PRODUCT_BITS).any()
        or (norms < 0).any()
        or (real * real > np.outer(norms, norms) * (1 + 1e-9)).any()
    ):
        raise Untrusted("step 'gram': the opened numbers are no inner products; an aggregator has deviated")
