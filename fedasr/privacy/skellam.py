"""The Rényi divergence of Skellam noise, and of what chance selects; see `secure_aggregation`."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fedasr.errors import UserError


def skellam_rdp(order: Any, l2: float, l1: float, variance: float) -> Any:
    """Rényi divergence of symmetric Skellam noise, at most (arXiv 2110.04995, corollary 3.6).

    alpha l2^2 / (2 mu) + min(((2 alpha - 1) l2^2 + 6 l1) / (4 mu^2), 3 l1 / (2 mu)), of which the
    first term is that of a Gaussian of the same variance.

    Args:
      order: alpha, whole and at least 2; a number or an array.
      l2, l1: how far one user moves the integer vector.
      variance: mu, of every coordinate.
    """
    order = np.asarray(order, np.float64)
    gaussian = order * l2**2 / (2 * variance)
    return gaussian + np.minimum(
        ((2 * order - 1) * l2**2 + 6 * l1) / (4 * variance**2), 3 * l1 / (2 * variance)
    )


def sampled_rdp(
    orders: np.ndarray, probability: float, curve: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Rényi bound of a mechanism whose users take part by chance, each for themselves.

    With the user the law is (1 - q) Q + q P, without it is Q, the noise's own. At whole orders
    the divergence from Q is a binomial sum of those of P, as for the Gaussian (arXiv 1908.10530,
    section 3.3). The other direction is no larger, since reflecting swaps P and Q (there,
    theorem 5): noise that is symmetric and the same with and without the user is all it needs.
    Between whole orders the logarithm of the moment, which is convex, lies below its chord.

    Args:
      orders: above 1.
      probability: q, in [0, 1].
      curve: bounds on the divergence of P from Q, for an array of whole orders.

    Returns:
      float64 [orders].
    """
    from scipy.special import gammaln, logsumexp

    orders = np.asarray(orders, np.float64)
    if (orders <= 1).any():
        raise UserError("Rényi orders are above 1.")
    highest = math.ceil(orders.max())
    whole = np.arange(2, highest + 1)
    moments = np.zeros(highest + 1)  # of order k: (k - 1) times the divergence
    moments[2:] = (whole - 1) * curve(whole)
    needed = np.unique([np.floor(orders), np.ceil(orders)]).astype(int)
    if 0 < probability < 1:
        ways = gammaln(np.arange(highest + 1) + 1)
        log_q, log_rest = math.log(probability), math.log1p(-probability)
        mixed = moments.copy()
        for order in needed[needed > 1].tolist():
            k = np.arange(order + 1)
            chosen = ways[order] - ways[k] - ways[order - k] + k * log_q + (order - k) * log_rest
            mixed[order] = max(0.0, logsumexp(chosen + moments[: order + 1]))
        moments = mixed
    elif probability <= 0:
        moments *= 0
    return np.interp(orders, needed, moments[needed]) / (orders - 1)
