"""Contiguous clustering against naive code, scikit-learn, brute force and hand-worked numbers."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.cluster import AgglomerativeClustering

from ditq_converters.methods.timestep_groups import LINKAGES, exact_dp, greedy, refinement


def drift(calls, width, seed):
    """A random walk [T, K]: what centres do along a trajectory."""
    return np.random.default_rng(seed).normal(size=(calls, width)).cumsum(axis=0)


def naive_distance(a, b, linkage):
    gap = np.linalg.norm(a.mean(0) - b.mean(0))
    if linkage == "ward":  # by its definition: how much the sum of squares to the mean grows
        both = np.concatenate([a, b])
        return sum_to_mean(both, 2) - sum_to_mean(a, 2) - sum_to_mean(b, 2)
    if linkage == "centroid":
        return gap
    return np.mean([np.linalg.norm(p - q) for p in a for q in b])


def naive_greedy(z, num_groups, linkage):
    groups = [[i] for i in range(len(z))]
    while len(groups) > num_groups:
        distances = [naive_distance(z[a], z[b], linkage) for a, b in itertools.pairwise(groups)]
        g = int(np.argmin(distances))
        groups[g : g + 2] = [groups[g] + groups[g + 1]]
    return tuple(g for g, members in enumerate(groups) for _ in members)


def sum_to_mean(members, power):
    return (np.linalg.norm(members - members.mean(0), axis=1) ** power).sum()


def objective(z, group_of_call, power):
    groups = np.array(group_of_call)
    return sum(sum_to_mean(z[groups == g], power) for g in range(groups[-1] + 1))


def brute_force(z, num_groups, power):
    calls = len(z)
    partitions = itertools.combinations(range(1, calls), num_groups - 1)
    return min(
        objective(z, np.searchsorted(cuts, np.arange(calls), side="right"), power)
        for cuts in partitions
    )


def test_by_hand():
    """Calls at 0, 1, 3, 3.5, 9. Ward merges 3|3.5 (1/8), 0|1 (1/2), then {0,1}|{3,3.5}
    (2*2/4 * 2.75^2 = 7.5625, against {3,3.5}|9: 2/3 * 5.75^2 = 22.04)."""
    z = torch.tensor([[0.0], [1.0], [3.0], [3.5], [9.0]])
    for linkage in LINKAGES:
        assert greedy(z, 4, linkage) == (0, 1, 2, 2, 3)
        assert greedy(z, 3, linkage) == (0, 0, 1, 1, 2)
        assert greedy(z, 2, linkage) == (0, 0, 0, 0, 1)


def test_the_linkages_differ():
    """Calls at 0, 0, 0, 0, 3, 6.2 in two groups: {0,0,0,0}|3 costs 4/5 * 9 = 7.2 by Ward, 3 by centroid;
    3|6.2 costs 5.12 by Ward, 3.2 by centroid."""
    z = torch.tensor([[0.0], [0.0], [0.0], [0.0], [3.0], [6.2]])
    assert greedy(z, 2, "ward") == (0, 0, 0, 0, 1, 1)
    assert greedy(z, 2, "centroid") == (0, 0, 0, 0, 0, 1)
    # {0, 4} in two dimensions against a call off their axis: the mean is nearer than the members are
    z = torch.tensor([[0.0, 0.0], [4.0, 0.0], [2.0, 4.1], [2.0, 8.6]])
    assert greedy(z, 2, "centroid") == (0, 0, 0, 1)  # 4.1 to the mean, 4.5 to the next call
    assert greedy(z, 2, "average") == (0, 0, 1, 1)  # sqrt(4 + 4.1^2) = 4.56 to each member


@pytest.mark.parametrize("linkage", LINKAGES)
def test_ties_merge_the_earliest_pair(linkage):
    z = torch.arange(5.0)[:, None]
    assert greedy(z, 4, linkage) == (0, 0, 1, 2, 3)
    assert greedy(torch.zeros(4, 2), 2, linkage) == (0, 0, 0, 1)


@pytest.mark.parity("P17")
@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("seed", range(10))
def test_greedy_equals_a_naive_one(linkage, seed):
    z = drift(calls=5 + 3 * seed, width=1 + 4 * seed, seed=seed)
    for num_groups in (1, 2, len(z) // 2, len(z) - 1, len(z)):
        assert greedy(torch.from_numpy(z), num_groups, linkage) == naive_greedy(
            z, num_groups, linkage
        )


@pytest.mark.parity("P17")
@pytest.mark.parametrize("seed", range(10))
def test_ward_equals_scikit_learn_on_a_chain(seed):
    z = drift(calls=40, width=7, seed=seed)
    chain = np.eye(40) + np.eye(40, k=1) + np.eye(40, k=-1)
    model = AgglomerativeClustering(n_clusters=4, linkage="ward", connectivity=chain)
    labels = model.fit_predict(z)  # numbered arbitrarily
    expected = np.concatenate([[0], (np.diff(labels) != 0).cumsum()])
    assert greedy(torch.from_numpy(z), 4, "ward") == tuple(expected)


@pytest.mark.parity("P17")
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize(("calls", "num_groups"), [(5, 2), (9, 4), (12, 3), (12, 6), (12, 11)])
def test_dynamic_programming_equals_brute_force(squared, calls, num_groups):
    for seed in range(3):
        z = drift(calls, 6, seed) + 100  # far from the origin, as outlier channels are
        power = 2 if squared else 1
        found = objective(z, exact_dp(torch.from_numpy(z), num_groups, squared), power)
        np.testing.assert_allclose(found, brute_force(z, num_groups, power), rtol=1e-13)


def test_the_two_powers_of_the_objective_differ():
    """Two groups of 0, 0, 0, 4, 9 (mean of the last two 6.5): {0,0,0}{4,9} costs 5 unsquared, 12.5 squared;
    {0,0,0,4}{9} costs 3 * 1 + 3 = 6 unsquared, 3 + 9 = 12 squared."""
    z = torch.tensor([[0.0], [0.0], [0.0], [4.0], [9.0]])
    assert exact_dp(z, 2, squared=False) == (0, 0, 0, 1, 1)
    assert exact_dp(z, 2, squared=True) == (0, 0, 0, 0, 1)


@pytest.mark.parity("P17")
@pytest.mark.parametrize("seed", range(10))
def test_dynamic_programming_is_never_worse_than_greedy(seed):
    z = drift(30, 5, seed)
    tensor = torch.from_numpy(z)
    for squared, power in ((False, 1), (True, 2)):
        best = objective(z, exact_dp(tensor, 3, squared), power)
        for linkage in LINKAGES:
            # both sums of 30 positive terms carry rounding of at most 30 * 2^-53
            assert best <= objective(z, greedy(tensor, 3, linkage), power) * (1 + 1e-14)


def test_greedy_need_not_be_optimal():
    """Calls at 0, 5, 9, 14 in two groups. Ward joins 5|9 (8) first, then 0|{5,9} (2/3 * 49 = 32.7, a tie
    won by the earlier): total 40.7. The optimum {0,5}{9,14} costs 12.5 + 12.5 = 25."""
    z = torch.tensor([[0.0], [5.0], [9.0], [14.0]])
    assert greedy(z, 2, "ward") == (0, 0, 0, 1)
    assert exact_dp(z, 2, squared=True) == (0, 0, 1, 1)


@pytest.mark.parity("P17")
@pytest.mark.parametrize("partition", [*LINKAGES, "exact_dp"])
def test_every_call_is_in_one_of_contiguous_groups(partition):
    z = torch.from_numpy(drift(17, 4, seed=3))
    for num_groups in range(1, 18):
        groups = (
            exact_dp(z, num_groups) if partition == "exact_dp" else greedy(z, num_groups, partition)
        )
        assert len(groups) == 17
        assert groups[0] == 0
        assert groups[-1] == num_groups - 1
        assert set(np.diff(groups)) <= {0, 1}
    assert groups == tuple(range(17))  # as many groups as calls


@pytest.mark.parametrize("num_groups", [0, -1, 4])
def test_a_wrong_number_of_groups_is_refused(num_groups):
    with pytest.raises(ValueError, match="num_groups must be 1 to 3"):
        greedy(torch.zeros(3, 1), num_groups)
    with pytest.raises(ValueError, match="num_groups must be 1 to 3"):
        exact_dp(torch.zeros(3, 1), num_groups)


def test_an_unknown_linkage_is_refused():
    with pytest.raises(ValueError, match="linkage must be ward, centroid, average, got 'single'"):
        greedy(torch.zeros(3, 1), 2, "single")


@pytest.mark.parametrize("squared", [False, True])
def test_a_common_offset_does_not_matter(squared):
    """Squares of 1e9 leave no room in fp64 for distances near 1."""
    for seed in range(3):
        z = torch.from_numpy(drift(12, 6, seed))
        assert exact_dp(z + 1e9, 4, squared) == exact_dp(z, 4, squared)


def test_a_refinement_switches_where_any_partition_does():
    assert refinement([(0, 0, 1, 1, 1), (0, 0, 0, 1, 2)]) == (0, 0, 1, 2, 3)
    assert refinement([(0, 0, 1), (0, 0, 1)]) == (0, 0, 1)
    assert refinement([(0,)]) == (0,)
