"""Confidence intervals and tests for results that come in clusters (several questions about one image).

Bootstrap over clusters: Davison and Hinkley, "Bootstrap Methods and their Application" (1997), ch. 2-3;
McNemar's exact test: McNemar (1947), Psychometrika 12; degrees of freedom of a sum of variances: Satterthwaite
(1946), Biometrics Bulletin 2; the score interval: Wilson (1927), JASA 22.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
DRAWS = 2000
SAME = 1e-12  # resampled means closer than this differ by rounding alone


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval [lo, hi], the number of examples and the number of image clusters."""

    value: float
    lo: float
    hi: float
    n: int
    clusters: int

    @property
    def ci95(self) -> list[float]:
        return [round(self.lo, 4), round(self.hi, 4)]


@dataclass(frozen=True)
class Difference:
    """A paired difference (first minus second): bootstrap interval and p-value, and McNemar's p where it applies."""

    value: float
    lo: float
    hi: float
    p: float
    mcnemar_p: float | None
    n: int
    clusters: int

    @property
    def ci95(self) -> list[float]:
        return [round(self.lo, 4), round(self.hi, 4)]

    @property
    def real(self) -> bool:
        """Whether the 95% interval excludes zero."""
        return self.lo > 0 or self.hi < 0


class _Draws(NamedTuple):
    means: np.ndarray
    clusters: int


def _as_clusters(clusters, n: int) -> np.ndarray:
    codes = np.unique(np.asarray(clusters), return_inverse=True)[1].ravel()
    if len(codes) != n:
        raise ValueError(f"{n} values but {len(codes)} cluster labels")
    return codes


def _sums(columns: Sequence[np.ndarray], codes_N: np.ndarray, draws: int, seed: int) -> list[np.ndarray]:
    """Sums (draws,) of each column (N,) over the same resamples of whole clusters."""
    count = int(codes_N.max()) + 1
    per_cluster = [np.bincount(codes_N, weights=column_N, minlength=count) for column_N in columns]
    rng = np.random.default_rng(seed)
    found = []
    step = max(1, 20_000_000 // count)  # bounds the weight matrix at about 160 MB
    for start in range(0, draws, step):
        weights_DC = rng.multinomial(count, np.full(count, 1 / count), size=min(step, draws - start))
        found.append([weights_DC @ sums_C for sums_C in per_cluster])
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]


def _resample(values_N: np.ndarray, codes_N: np.ndarray, draws: int, seed: int) -> _Draws:
    """Means of resamples of whole clusters: a ratio of sums, because clusters differ in size."""
    sums_D, sizes_D = _sums([values_N, np.ones(len(values_N))], codes_N, draws, seed)
    return _Draws(sums_D / sizes_D, int(codes_N.max()) + 1)


def mean_interval(values, clusters, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Mean of ``values`` (N,) with a percentile bootstrap interval over ``clusters`` (N,) of any labels.

    Where every resample has the same mean (values that are all 0 or all 1, say), and for a single cluster, the Wilson
    score interval for as many independent trials as there are clusters is given.

    Raises:
        ValueError: no values, or labels of another length.
    """
    values_N = np.asarray(values, dtype=float)
    if not len(values_N):
        raise ValueError("an interval needs at least one value")
    codes_N = _as_clusters(clusters, len(values_N))
    drawn = _resample(values_N, codes_N, draws, seed)
    value = float(values_N.mean())
    if drawn.clusters == 1 or np.ptp(drawn.means) < SAME:
        lo, hi = _no_spread(value, values_N, drawn.clusters)
    else:
        lo, hi = np.quantile(drawn.means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(lo), float(hi), len(values_N), drawn.clusters)


def ratio_interval(above, below, clusters, draws: int = DRAWS, seed: int = 0) -> Interval:
    """sum(above) / sum(below) with a bootstrap interval over clusters: an F1 or a rate.

    Both are (N,), or (S, N) for S seeds asked the same N examples; then the interval covers seeds and examples as in
    `two_level`. A denominator of zero gives zero, as F1 of nothing is usually taken. Where resampling always gives the
    same 0 or 1, the interval is Wilson's for as many trials as there are clusters with a denominator; without any it
    is [0, 1].
    """
    above_SN, below_SN = np.atleast_2d(np.asarray(above, float)), np.atleast_2d(np.asarray(below, float))
    codes_N = _as_clusters(clusters, above_SN.shape[1])
    count, seeds = int(codes_N.max()) + 1, len(above_SN)
    over_D, under_D = _sums([above_SN.mean(0), below_SN.mean(0)], codes_N, draws, seed)
    drawn_D = _divided(over_D, under_D)
    value = float(_divided(above_SN.sum(), below_SN.sum()))
    picks_DM = _picks(seeds, draws, seed)
    seed_D = _divided(above_SN.sum(1)[picks_DM].sum(1), below_SN.sum(1)[picks_DM].sum(1)) if seeds > 1 else drawn_D
    if value in (0.0, 1.0) and np.ptp(drawn_D) < SAME and np.ptp(seed_D) < SAME:
        trials = len(set(codes_N[below_SN.sum(0) > 0]))
        lo, hi = _wilson(value, trials) if trials else (0.0, 1.0)
    elif seeds > 1:
        spread = added(value, float(seed_D.var()), float(drawn_D.var()), seeds, count)
        half = t_quantile(spread.df) * spread.se
        lo, hi = max(0.0, value - half), min(1.0, value + half)
    else:
        lo, hi = np.quantile(drawn_D, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(lo), float(hi), above_SN.shape[1], count)


def _divided(above, below) -> np.ndarray:
    """above / below, and zero where that is nothing by nothing."""
    above, below = np.asarray(above, float), np.asarray(below, float)
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def _no_spread(value: float, values: np.ndarray, clusters: int) -> tuple[float, float]:
    """Wilson's interval of a mean that resampling cannot spread; of grades above 1 on their own scale."""
    top = max(1.0, float(values.max()))
    lo, hi = _wilson(min(1.0, max(0.0, value / top)), clusters)
    return lo * top, hi * top


def _wilson(share: float, n: int) -> tuple[float, float]:
    z2 = 1.959964**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2) / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired(first, second, clusters, draws: int = DRAWS, seed: int = 0) -> Difference:
    """Mean of ``first - second`` (both (N,), the same examples in the same order), resampled by cluster.

    The standard error comes from the bootstrap, interval and p from Student's t with a degree of freedom less than
    there are clusters: in simulation the percentile interval calls a little more than 5% of equal arms different.
    p is never below 1 / (DRAWS + 1), less than which resampling cannot tell. Where every cluster changes alike there is
    no error to estimate: p and interval are those of the sign test on the clusters, so five images are never enough.
    McNemar's exact p comes beside it when both are right/wrong values; it knows nothing of clusters, so the
    bootstrap decides.

    Raises:
        ValueError: different lengths or no values.
    """
    first_N, second_N = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if first_N.shape != second_N.shape or first_N.ndim != 1 or not len(first_N):
        raise ValueError(f"paired values must match and not be empty: {first_N.shape} and {second_N.shape}")
    spread = _two_level((first_N - second_N)[None], clusters, draws, seed)
    binary = set(np.unique(first_N)) | set(np.unique(second_N)) <= {0.0, 1.0}
    return _difference(spread, len(first_N), mcnemar(first_N, second_N) if binary else None)


def _difference(spread: _Spread, n: int, exact: float | None) -> Difference:
    if spread.clusters == 1:  # one image tells nothing about others
        return Difference(spread.value, -1.0, 1.0, 1.0, exact, n, 1)
    if spread.se < SAME:  # the same answers everywhere, or the same change in every cluster
        p = 1.0 if spread.value == 0 else max(2 * 0.5**spread.clusters, 1 / (DRAWS + 1))
        # A share of clusters that change this way below which all of them would hardly do so; the others change back.
        least = 2 * ((1 - LEVEL) / 2) ** (1 / spread.clusters) - 1
        lo, hi = sorted((least * spread.value, spread.value))
        return Difference(spread.value, lo, hi, p, exact, n, spread.clusters)
    half = t_quantile(spread.df) * spread.se
    p = max(2 * (1 - t_cdf(abs(spread.value) / spread.se, spread.df)), 1 / (DRAWS + 1))
    return Difference(spread.value, spread.value - half, spread.value + half, p, exact, n, spread.clusters)


def mcnemar(first, second) -> float:
    """Exact two-sided p of McNemar's test on right/wrong values (N,): are the disagreements evenly split?"""
    first_N, second_N = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    wins, losses = int(np.sum(first_N & ~second_N)), int(np.sum(~first_N & second_N))
    n = wins + losses
    if n == 0:
        return 1.0
    logs = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
        for k in range(min(wins, losses) + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(x) for x in logs))


def two_level(values, clusters, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Mean of ``values`` (S, N): S seeds asked the same N examples; the interval covers seeds AND examples.

    Two bootstraps, one over seeds and one over image clusters of the per-example mean, whose variances are added.
    S is small, so S-1 of S seeds are drawn (else the variance would be too small by (S-1)/S) and the interval uses
    Student's t with Satterthwaite's degrees of freedom. The seed x example interaction is counted in both parts,
    which errs on the wide side.

    Raises:
        ValueError: not (S, N), or nothing in it.
    """
    spread = _two_level(values, clusters, draws, seed)
    values_SN = np.asarray(values, dtype=float)
    if len(values_SN) == 1:
        return mean_interval(values_SN[0], clusters, draws, seed)
    if spread.clusters == 1 or spread.se < SAME:
        lo, hi = _no_spread(spread.value, values_SN, spread.clusters)
    else:
        half = t_quantile(spread.df) * spread.se
        # Of two seeds t is 12.7, but no mean lies beyond what its values can be: a share, or a grade up to the highest.
        lo = max(spread.value - half, min(0.0, float(values_SN.min())))
        hi = min(spread.value + half, max(1.0, float(values_SN.max())))
    return Interval(spread.value, lo, hi, values_SN.shape[1], spread.clusters)


def two_level_paired(first, second, clusters, draws: int = DRAWS, seed: int = 0) -> Difference:
    """``two_level`` for the difference of two arms, (S, N) each, seeds paired in order; p from Student's t.

    An arm without seeds (the base) is given as (1, N) and compared with every seed of the other.

    Raises:
        ValueError: shapes that do not match.
    """
    first_SN, second_SN = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if first_SN.shape[1:] != second_SN.shape[1:] or (
        1 not in (len(first_SN), len(second_SN)) and len(first_SN) != len(second_SN)
    ):
        raise ValueError(f"arms do not pair: {first_SN.shape} and {second_SN.shape}")
    if len(first_SN) == len(second_SN) == 1:
        return paired(first_SN[0], second_SN[0], clusters, draws, seed)
    return _difference(_two_level(first_SN - second_SN, clusters, draws, seed), first_SN.shape[1], None)


class _Spread(NamedTuple):
    value: float
    se: float
    df: float
    clusters: int


def _two_level(values, clusters, draws: int, seed: int) -> _Spread:
    values_SN = np.asarray(values, dtype=float)
    if values_SN.ndim != 2 or not values_SN.size:
        raise ValueError(f"expected values (seeds, examples), got {values_SN.shape}")
    seeds, n = values_SN.shape
    codes_N = _as_clusters(clusters, n)
    drawn = _resample(values_SN.mean(0), codes_N, draws, seed)
    var_images = float(drawn.means.var())
    if seeds == 1:
        se = math.sqrt(var_images * drawn.clusters / max(1, drawn.clusters - 1))
        return _Spread(float(values_SN.mean()), se, max(1, drawn.clusters - 1), drawn.clusters)
    var_seeds = float(values_SN.mean(1)[_picks(seeds, draws, seed)].mean(1).var())
    return added(float(values_SN.mean()), var_seeds, var_images, seeds, drawn.clusters)


def _picks(seeds: int, draws: int, seed: int) -> np.ndarray:
    """Numbers of the seeds in each resample, (draws, S-1)."""
    return np.random.default_rng(seed + 1).integers(seeds, size=(draws, seeds - 1))


def added(value: float, var_seeds: float, var_images: float, seeds: int, clusters: int) -> _Spread:
    """The spread of a value whose variances over seeds and over images are independent: their sum, with Satterthwaite's
    degrees of freedom."""
    total = var_seeds + var_images
    parts = var_seeds**2 / (seeds - 1) + var_images**2 / max(1, clusters - 1)
    df = max(1.0, total**2 / parts) if parts > 0 else float(clusters)
    return _Spread(value, math.sqrt(total), df, clusters)


def t_cdf(t: float, df: float) -> float:
    """Student's t distribution function for df >= 1: with t = sqrt(df) tan(a), a has density cos(a)^(df-1)."""
    angle, cumulative = _t_grid(df)
    return float(np.interp(math.atan(t / math.sqrt(df)), angle, cumulative))


def t_quantile(df: float, level: float = LEVEL) -> float:
    """The t with ``level`` of Student's distribution between -t and t, for df >= 1."""
    angle, cumulative = _t_grid(df)
    return math.sqrt(df) * math.tan(float(np.interp((1 + level) / 2, cumulative, angle)))


def _t_grid(df: float) -> tuple[np.ndarray, np.ndarray]:
    # Only the middle of the angles matters when df is large: the density is then a narrow peak.
    reach = min(math.pi / 2, 12 / math.sqrt(df)) if df > 60 else math.pi / 2
    angle = np.linspace(-reach, reach, 40_001)
    density = np.cos(angle) ** (df - 1)
    cumulative = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return angle, cumulative / cumulative[-1]
