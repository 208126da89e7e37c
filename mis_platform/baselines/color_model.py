"""What colours the object and the background have, learnt from seed pixels (Gulshan et al., CVPR 2010)."""

import warnings

import numpy as np
from scipy.special import logsumexp
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

COMPONENTS = 5  # per side
UNIFORM_SHARE = 0.05  # of the mixture: an unseen colour is unlikely, not impossible
_VARIANCE_FLOOR = 1e-3  # of colours in [0, 1]: about 8 grey values; a seed may have one colour only
_MAX_PIXELS = 4000  # that a model is fitted to: more change nothing but the time


def log_density(colors: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """How likely each of `colors` is beside `seeds`: natural log of a density on [0, 1]^3, float64 [N].

    colors: float [N, 3] RGB in [0, 1]; seeds: the same, [M, 3], of one side. The density is 0.95 times a mixture of at
    most five Gaussians plus 0.05 times the uniform density; without seeds it is the uniform density, which is 1.
    """
    if not len(seeds):
        return np.zeros(len(colors))
    mixture = _fit(seeds[:: -(-len(seeds) // _MAX_PIXELS)])
    gaussians = _mixture_log_density(mixture, colors)
    return np.logaddexp(np.log(1 - UNIFORM_SHARE) + gaussians, np.log(UNIFORM_SHARE))


def _fit(seeds: np.ndarray) -> GaussianMixture:
    count = min(COMPONENTS, len(np.unique(seeds, axis=0)), len(seeds))
    if count == 1:
        seeds = np.concatenate([seeds, seeds])  # a mixture wants two samples
    mixture = GaussianMixture(
        count, covariance_type="full", reg_covar=_VARIANCE_FLOOR, max_iter=50, tol=1e-3, random_state=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # nearly converged will do
        return mixture.fit(seeds)


def _mixture_log_density(mixture: GaussianMixture, colors: np.ndarray) -> np.ndarray:
    """`mixture.score_samples`, several times faster for many colours of three channels."""
    terms = np.empty((len(mixture.weights_), len(colors)))
    for term, weight, mean, precision in zip(
        terms, mixture.weights_, mixture.means_, mixture.precisions_cholesky_, strict=True
    ):
        whitened = (colors - mean) @ precision
        term[:] = np.log(weight) + np.log(np.diag(precision)).sum() - 1.5 * np.log(2 * np.pi)
        term -= 0.5 * np.einsum("nc,nc->n", whitened, whitened)
    return logsumexp(terms, axis=0)
