"""Means with standard errors over documents.

Tokens of one document are correlated, so a document is the unit of sampling, and documents differ in length. A mean per
token is then a ratio of two random sums, and its error is that of the ratio estimator (Cochran 1977, *Sampling
Techniques*, 3rd ed., section 6.4, with an infinite population):

    mean   = sum_d S_d / sum_d n_d
    stderr = sqrt( D / (D - 1) * sum_d (S_d - mean * n_d)^2 ) / sum_d n_d

S_d: sum over the n_d tokens of document d; D: documents with at least one token. For equal n_d it is the textbook
standard error of the mean of S_d / n_d. It is first order in 1/D: with a handful of documents it runs low.
"""

import numpy as np
from numpy.typing import ArrayLike


def mean_over_documents(sums: ArrayLike, counts: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Mean per token and its standard error, by the ratio estimator (formula in the module's docstring).

    Args:
      sums: `[D, ...]`, per document the sum of a quantity over its tokens.
      counts: `[D]`, tokens of each document; documents with none are left out.

    Returns:
      `(mean, stderr)`, float64 of shape `[...]`. One document says nothing about the spread between documents: the
      standard error is then NaN (unknown), never 0. Without any token both are NaN.
    """
    counts = np.asarray(counts, np.float64)
    used = counts > 0
    counts, sums = counts[used], np.asarray(sums, np.float64)[used]
    documents, tokens = len(counts), counts.sum()
    if documents == 0:
        return np.full(sums.shape[1:], np.nan), np.full(sums.shape[1:], np.nan)
    mean = sums.sum(axis=0) / tokens
    if documents == 1:
        return mean, np.full_like(mean, np.nan)
    with np.errstate(invalid="ignore"):  # an infinite sum has an infinite mean and an unknown error
        residual = sums - counts.reshape(-1, *[1] * mean.ndim) * mean
    return mean, np.sqrt(documents / (documents - 1) * np.square(residual).sum(axis=0)) / tokens


def paired_difference(a: ArrayLike, b: ArrayLike, counts: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Mean of `a - b` per token and its standard error, for two models scored on the same documents.

    What is common to both (hard documents are hard for both) cancels, so the error is far smaller than the two separate
    errors suggest.

    Args:
      a: `[D, ...]`, per document sums of the first model.
      b: `[D, ...]`, of the second, in the same order.
      counts: `[D]`, tokens of each document.

    Returns:
      `(mean, stderr)` as in `mean_over_documents`.
    """
    return mean_over_documents(np.asarray(a, np.float64) - np.asarray(b, np.float64), counts)


def sums_over_documents(values: ArrayLike, document: ArrayLike) -> np.ndarray:
    """Sums of per-window values over the windows of each document, in float64.

    Args:
      values: `[windows, ...]`.
      document: `int[windows]`, the document of each window, in any order.

    Returns:
      `float64[D, ...]`, documents in ascending order of their number (that of `np.unique`).
    """
    values = np.asarray(values, np.float64)
    ids, row = np.unique(np.asarray(document), return_inverse=True)
    sums = np.zeros((len(ids), *values.shape[1:]))
    np.add.at(sums, row, values)
    return sums
