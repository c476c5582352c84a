"""A Gaussian process over losses, and how much a further trial is expected to improve on them.

Expected improvement is averaged over the kernel's parameters, as in Snoek, Larochelle and Adams
2012 ("Practical Bayesian Optimization of Machine Learning Algorithms"), instead of fitting them:
after a few trials many lengthscales explain the losses, and the best-fitting one is a guess. They
sample the parameters with a Markov chain; here a fixed set of draws from their prior is weighted by
how well each explains the losses, which has no state and costs the same every time.

Shapes: N trials, M candidates, R running trials, C columns of a point, P parameters of the space,
K draws of the kernel's parameters.
"""

from __future__ import annotations

import functools
import math

import numpy as np

Array = np.ndarray

_DRAWS = 128
_HEAVIEST = 16  # draws that candidates are judged with; the others have hardly any weight
# Lengthscales are uniform up to twice a parameter's range, as in their implementation (Spearmint).
_LONGEST = 2.0
# Noise, as a share of the losses' variance: mean and standard deviation of its logarithm, BoTorch's
# default.
_NOISE = (-4.0, 1.0)
# By how much a loss must be lower to count as an improvement, in standard deviations of the losses
# (Brochu, Cora and de Freitas 2010, section 2.3.1). Without it, searches spent many trials right
# beside the best one. 0.2 is the best of 0, 0.2, 0.4 and 0.8 (benchmarks/README.md).
_MARGIN = 0.2


def expected_improvement(
    points_NC: Array, losses_N: Array, running_RC: Array, candidates_MC: Array, parameter_C: Array
) -> Array:
    """How far below the lowest loss, less a margin, each candidate is expected to be (M), in
    standard deviations of the losses.

    A running trial counts as if it had ended with the loss that is expected of it ("kriging
    believer", Ginsbourger, Le Riche and Carraro 2010), so the next one is suggested elsewhere.

    parameter_C: the parameter that each column belongs to, from 0
    """
    from scipy.special import ndtr  # importing it takes a third of a second

    losses_N = losses_N - losses_N.mean()
    losses_N = losses_N / (losses_N.std() or 1.0)
    lengthscales_KP, noise_K = kernel_draws(int(parameter_C.max()) + 1)
    lengthscales_KC = lengthscales_KP[:, parameter_C]
    likelihood_K = log_likelihood(points_NC, losses_N, lengthscales_KC, noise_K)
    heaviest = np.argsort(-likelihood_K, kind="stable")[:_HEAVIEST]
    weights_K = np.exp(likelihood_K[heaviest] - likelihood_K[heaviest[0]])
    weights_K /= weights_K.sum()
    kernel = lengthscales_KC[heaviest], noise_K[heaviest]
    losses_KN = np.broadcast_to(losses_N, (len(heaviest), len(losses_N)))
    if len(running_RC):
        believed_KR, _ = posterior(points_NC, losses_KN, running_RC, *kernel)
        points_NC = np.concatenate([points_NC, running_RC])
        losses_KN = np.concatenate([losses_KN, believed_KR], axis=1)
    mean_KM, deviation_KM = posterior(points_NC, losses_KN, candidates_MC, *kernel)
    below_KM = losses_KN.min(axis=1, keepdims=True) - _MARGIN - mean_KM
    z_KM = below_KM / deviation_KM
    density_KM = np.exp(-(z_KM**2) / 2) / math.sqrt(2 * math.pi)
    return weights_K @ (below_KM * ndtr(z_KM) + deviation_KM * density_KM)


def log_likelihood(
    points_NC: Array, losses_N: Array, lengthscales_KC: Array, noise_K: Array
) -> Array:
    """Log marginal likelihood of the losses under each kernel, up to a constant (K)."""
    covariance_KNN = _covariance(points_NC, lengthscales_KC, noise_K)
    root_KNN = np.linalg.cholesky(covariance_KNN)
    half_log_det_K = np.log(np.diagonal(root_KNN, axis1=1, axis2=2)).sum(axis=1)
    columns_KN1 = np.broadcast_to(losses_N[:, None], (*covariance_KNN.shape[:2], 1))
    explained_K = (np.linalg.solve(covariance_KNN, columns_KN1)[..., 0] * losses_N).sum(axis=1)
    return -half_log_det_K - explained_K / 2


def posterior(
    points_NC: Array,
    losses_KN: Array,
    at_MC: Array,
    lengthscales_KC: Array,
    noise_K: Array,
) -> tuple[Array, Array]:
    """Mean and standard deviation of the loss without noise at other points, under each kernel
    (K, M)."""
    covariance_KNN = _covariance(points_NC, lengthscales_KC, noise_K)
    between_KMN = matern52(at_MC, points_NC, lengthscales_KC)
    right_sides = np.concatenate([losses_KN[..., None], between_KMN.transpose(0, 2, 1)], axis=2)
    solved = np.linalg.solve(covariance_KNN, right_sides)
    mean_KM = (between_KMN @ solved[..., :1])[..., 0]
    known_KM = np.einsum("kmn,knm->km", between_KMN, solved[..., 1:])
    return mean_KM, np.sqrt(np.maximum(1.0 - known_KM, 1e-10))


def matern52(a_NC: Array, b_MC: Array, lengthscales_KC: Array) -> Array:
    """The Matérn 5/2 kernel with a lengthscale for each column (K, N, M)."""
    a_KNC, b_KMC = a_NC / lengthscales_KC[:, None], b_MC / lengthscales_KC[:, None]
    squares_KNM = (a_KNC**2).sum(axis=2)[:, :, None] + (b_KMC**2).sum(axis=2)[:, None]
    squares_KNM = squares_KNM - 2 * a_KNC @ b_KMC.transpose(0, 2, 1)
    r_KNM = np.sqrt(5 * np.maximum(squares_KNM, 0))
    return (1 + r_KNM + r_KNM**2 / 3) * np.exp(-r_KNM)


def _covariance(points_NC: Array, lengthscales_KC: Array, noise_K: Array) -> Array:
    between_KNN = matern52(points_NC, points_NC, lengthscales_KC)
    return between_KNN + noise_K[:, None, None] * np.eye(len(points_NC))


@functools.cache
def kernel_draws(parameters: int) -> tuple[Array, Array]:
    """Lengthscales (K, P) and noise (K): a Latin hypercube of their prior, always the same."""
    from scipy.special import ndtri

    rng = np.random.default_rng(0)
    places = rng.permuted(np.tile(np.arange(_DRAWS), (parameters + 1, 1)), axis=1)
    share_KP = (places.T + 0.5) / _DRAWS
    mean, deviation = _NOISE
    return _LONGEST * share_KP[:, 1:], np.exp(mean + deviation * ndtri(share_KP[:, 0]))
