"""The exchange against hand arithmetic, and its parts one by one."""

import numpy as np
import pytest

from rsae.remez import Failed, Problem, _trimmed, apart, clustered, extrema, solve


@pytest.mark.parametrize(
    ("f", "interval", "degree", "error"),
    [
        (lambda x: x**2, (-1.0, 1.0), (1, 0), 1 / 2),  # 1/2
        (lambda x: x**3, (-1.0, 1.0), (2, 0), 1 / 4),  # 3x/4: what is left is a Chebyshev polynomial over 4
        (np.sqrt, (0.0, 1.0), (1, 0), 1 / 8),  # x + 1/8
        (np.sqrt, (0.0, 1.0), (0, 0), 1 / 2),
        (lambda x: 1 / (x + 3), (-1.0, 1.0), (0, 0), 1 / 8),
    ],
)
def test_by_hand(f, interval, degree, error):
    level = solve(Problem(f, (interval,), *degree))
    assert level.error == pytest.approx(error, rel=1e-9)
    assert level.max_error == pytest.approx(error, rel=1e-9)
    P, Q = level(np.linspace(*interval, 1001))
    assert Q.min() > 0
    assert np.abs(f(np.linspace(*interval, 1001)) - P / Q).max() <= error * (1 + 1e-9)


def test_a_weight_counts_the_error():
    # best constant c for max over [0, 1] of x |1 - c| is c = 1; of (1 + x) |x - c| it levels c = 2 (1 - c)
    level = solve(Problem(lambda x: x, ((0.0, 1.0),), 0, 0, lambda x: 1 + x))
    assert level.error == pytest.approx(2 / 3, rel=1e-9)


def test_failure_is_an_exception():
    with pytest.raises(Failed):
        solve(Problem(lambda x: (x > 0) * 1.0, ((-1.0, 1.0),), 3, 2))


def test_a_domain_without_a_reference_is_a_failure_too():
    with pytest.raises(Failed):
        solve(Problem(np.tanh, ((-1e-3, -9.99e-4), (1.0, 1000.0)), 9, 8))


def test_extrema_of_a_kink_and_of_a_parabola():
    x, e = extrema(
        lambda x: np.where(x < 1, 0.5 - np.abs(x - 0.3), (x - 1.2) ** 2 - 1), np.linspace(0, 2, 21), [(0, 2)]
    )
    assert x[[0, -1]] == pytest.approx([0.3, 1.2], abs=1e-4)
    assert e[[0, -1]] == pytest.approx([0.5, -1], abs=1e-4)


def test_extrema_stay_in_the_domain():
    x, _ = extrema(lambda x: 1 / (x - 0.05), np.array([-1.0, -0.1, 0.1, 1.0]), [(-1.0, -0.1), (0.1, 1.0)])
    assert x.tolist() == [-0.1, 0.1]


def test_trimmed_keeps_alternation_and_the_largest():
    x = np.arange(7.0)
    assert _trimmed(x, np.array([1, -5, 0.1, -0.2, 3, -4, 2.0]), 5).tolist() == [0, 1, 4, 5, 6]
    assert _trimmed(x, np.array([1, -5, 3, -4, 3, -4, 2.0]), 6).tolist() == [1, 2, 3, 4, 5, 6]


def test_grids_have_the_ends_and_no_near_doubles():
    points = np.array([0.3, 0.3 + 1e-12, 0.5, -2.0, 0.1, 1 - 1e-14])
    assert apart(points, (0.1, 1.0), np.zeros(1)).tolist() == [0.1, 0.3, 0.5, 1.0]
    grid = clustered([(-1.0, -0.01), (0.02, 1.0)], np.array([-0.5, 0.5]))
    assert (np.diff(grid) > 0).all()
    assert {-1.0, -0.01, 0.02, 1.0} <= set(grid.tolist())
    assert not ((grid > -0.01) & (grid < 0.02)).any()


def test_a_wider_gap_leaves_out_both_sides():
    problem = Problem(np.abs, ((-1.0, -0.1), (0.2, 1.0)), 1, 0)
    assert problem.gap == 0.1
    assert problem.widened(0.3).intervals == ((-1.0, -0.3), (0.3, 1.0))
    assert Problem(np.abs, ((-1.0, 1.0),), 1, 0).widened(0.3).intervals == ((-1.0, -0.3), (0.3, 1.0))
