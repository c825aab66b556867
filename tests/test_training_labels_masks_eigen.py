import numpy as np
import pytest
import torch

from training.labels.masks.eigen import WEAK_EDGE, solve_cut, solve_cuts, solve_densely


def draw_graph(seed: int, nodes: int) -> np.ndarray:
    """Nodes on a line of three clumps; near are those less than a step apart."""
    generator = np.random.default_rng(seed)
    places = generator.normal(0.0, 0.7, nodes) + generator.integers(0, 3, nodes)
    is_near: np.ndarray = np.abs(places[:, None] - places) < 1.0
    return is_near


def test_two_cliques_are_cut_between_them() -> None:
    vector = solve_cut(np.kron(np.eye(2, dtype=bool), np.ones((3, 3), bool)))
    assert np.abs(vector) == pytest.approx(1 / np.sqrt(6))
    assert (np.sign(vector[:3]) == -np.sign(vector[3:])).all()


def test_the_vector_solves_the_generalised_problem_and_is_orthogonal_to_the_trivial_one() -> None:
    is_near = draw_graph(0, 60)
    weights = np.where(is_near, 1.0, WEAK_EDGE)
    degrees = weights.sum(1)
    vector = solve_cut(is_near)
    image = degrees * vector - weights @ vector
    value = (vector @ image) / (vector @ (degrees * vector))
    # Lanczos stops at a relative residual of 1e-6; degrees reach 60.
    assert image == pytest.approx(value * degrees * vector, abs=1e-4)
    assert degrees @ vector == pytest.approx(0.0, abs=1e-4)
    assert np.linalg.norm(vector) == pytest.approx(1.0)


@pytest.mark.parametrize("nodes", [50, 1300])
def test_lanczos_gives_what_the_dense_solver_gives(nodes: int) -> None:
    is_near = draw_graph(1, nodes)
    # Beyond 1,200 nodes products are in single precision.
    assert solve_cut(is_near) == pytest.approx(solve_densely(is_near), abs=1e-5)


def test_a_batch_gives_what_each_graph_gives_alone() -> None:
    graphs = np.stack([draw_graph(seed, 80) for seed in range(5)])
    together = solve_cuts(torch.from_numpy(graphs)).numpy()
    alone = np.stack([solve_cut(graph) for graph in graphs])
    assert together == pytest.approx(alone, abs=1e-4)  # single precision


def test_a_graph_with_few_distinct_eigenvalues_does_not_end_in_nan() -> None:
    """Lanczos runs dry after two steps here."""
    graph = np.kron(np.eye(2, dtype=bool), np.ones((10, 10), bool))
    vector = solve_cuts(torch.from_numpy(graph[None])).numpy()[0]
    assert np.abs(vector) == pytest.approx(1 / np.sqrt(20), abs=1e-5)


def test_a_graph_whose_nodes_are_all_near_has_some_vector_orthogonal_to_the_trivial_one() -> None:
    vector = solve_cut(np.ones((30, 30), bool))
    assert np.linalg.norm(vector) == pytest.approx(1.0)
    assert vector.sum() == pytest.approx(0.0, abs=1e-6)
