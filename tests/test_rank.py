"""lora_lab.rank against numpy and scipy in float64, its invariances, what chance gives, and what it refuses."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lab import rank

QUICK = settings(max_examples=40, deadline=None)
SIZES = st.integers(1, 12)
SEEDS = st.integers(0, 2**31)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def basis(n, k, seed=0):
    return torch.linalg.qr(normal(n, k, seed=seed)).Q


def of_spectrum(S, out, width, seed=0):
    S = torch.as_tensor(S, dtype=torch.float64)
    return basis(out, len(S), seed) * S @ basis(width, len(S), seed + 1).T


# Decompositions


@QUICK
@given(SIZES, SIZES, SIZES, SEEDS, st.floats(0.01, 100))
def test_the_svd_of_a_product_is_numpys_of_the_product(out, r, width, seed, scaling):
    B, A = normal(out, r, seed=seed), normal(r, width, seed=seed + 1)
    U, S, Vh = rank.product_svd(B, A, scaling)
    k = min(out, r, width)
    expected = np.linalg.svd(scaling * B.numpy() @ A.numpy(), compute_uv=False)
    assert (U.shape, S.shape, Vh.shape) == ((out, k), (k,), (k, width))
    np.testing.assert_allclose(S, expected[:k], rtol=1e-9, atol=1e-12 * expected[0])
    torch.testing.assert_close(U * S @ Vh, scaling * B @ A, rtol=1e-9, atol=1e-9 * float(S[0]))
    torch.testing.assert_close(U.T @ U, torch.eye(k, dtype=torch.float64))
    torch.testing.assert_close(Vh @ Vh.T, torch.eye(k, dtype=torch.float64))
    assert (S.diff() <= 0).all()


def test_products_of_one_shape_are_decomposed_together_each_with_its_scaling():
    B, A, scaling = normal(3, 4, 6, 2), normal(3, 4, 2, 5, seed=1), 0.1 + normal(3, 4, seed=2).abs()
    U, S, Vh = rank.product_svd(B, A, scaling)
    for i in range(3):
        for j in range(4):
            alone = rank.product_svd(B[i, j], A[i, j], float(scaling[i, j]))
            torch.testing.assert_close(S[i, j], alone.S)
            torch.testing.assert_close(U[i, j] * S[i, j] @ Vh[i, j], scaling[i, j] * B[i, j] @ A[i, j])
    assert not torch.allclose(S[0, 0], S[0, 1])


def test_the_product_is_never_made():
    """100,000 x 100,000 numbers would be 40 GB."""
    B, A = normal(100_000, 2, dtype=torch.float32), normal(2, 100_000, dtype=torch.float32)
    U, S, _ = rank.product_svd(B, A)
    assert U.shape == (100_000, 2)
    gram = np.linalg.eigvals((B.T @ B).double().numpy() @ (A @ A.T).double().numpy())
    np.testing.assert_allclose(S, np.sqrt(sorted(gram)[::-1]), rtol=1e-4)


@QUICK
@given(SIZES, SIZES, SEEDS)
def test_singular_values_are_numpys(out, width, seed):
    W = normal(out, width, seed=seed)
    expected = np.linalg.svd(W.numpy(), compute_uv=False)
    np.testing.assert_allclose(rank.singular_values(W), expected, atol=3e-8 * expected[0])
    np.testing.assert_allclose(rank.svd(W).S, expected, rtol=1e-9, atol=1e-12 * expected[0])


@pytest.mark.parametrize("shape", [(64, 64), (48, 96), (96, 48)])
def test_singular_values_of_a_steep_spectrum_are_right_to_a_tenth_of_a_millionth(shape):
    S = torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -2
    W = of_spectrum(S, *shape)
    assert (rank.singular_values(W) - S).abs().max() < 1e-7
    single = W.float()
    if shape[0] > shape[1]:
        single = single.T
    gram = torch.linalg.eigvalsh((single @ single.T).double()).flip(-1).clamp_min(0).sqrt()
    assert (gram - S).abs().max() > 1e-7  # what a product in float32 loses


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_singular_values_of_tiny_and_huge_matrices(size):
    W = normal(5, 4)
    torch.testing.assert_close(rank.singular_values(W * size) / size, rank.singular_values(W))


@QUICK
@given(SIZES, SIZES, SEEDS, st.data())
def test_truncation_is_the_best_there_is(out, width, seed, data):
    r = data.draw(st.integers(1, min(out, width)))
    W = normal(out, width, seed=seed)
    U, S, Vh = np.linalg.svd(W.numpy(), full_matrices=False)
    B, A, error = rank.truncate(W, r)
    assert (B.shape, A.shape) == ((out, r), (r, width))
    np.testing.assert_allclose(B @ A, U[:, :r] * S[:r] @ Vh[:r], atol=1e-9)
    missing = np.linalg.norm(W.numpy() - (B @ A).numpy()) / np.linalg.norm(W.numpy())
    assert float(error) == pytest.approx(missing, abs=1e-9)
    torch.testing.assert_close(B.norm(dim=0), A.norm(dim=1))  # the factors share the size
    other = normal(out, r, seed=seed + 1) @ normal(r, width, seed=seed + 2)
    assert float(error) <= np.linalg.norm(W.numpy() - other.numpy()) / np.linalg.norm(W.numpy()) + 1e-12


def test_a_given_decomposition_is_used():
    W = normal(6, 5)
    for given_, whole in zip(rank.truncate(rank.svd(W), 2), rank.truncate(W, 2), strict=True):
        torch.testing.assert_close(given_, whole)
    assert rank.singular_values(rank.svd(W)) is not None
    torch.testing.assert_close(rank.singular_values(rank.svd(W)), rank.singular_values(W))


# Singular values


def test_ranks_of_known_spectra():
    flat = torch.ones(7)
    assert [float(f(flat)) for f in (rank.effective_rank, rank.stable_rank)] == pytest.approx([7, 7])
    assert int(rank.energy_rank(flat, 0.9)) == 7
    one = torch.tensor([3.0, 0.0, 0.0])
    assert [float(f(one)) for f in (rank.effective_rank, rank.stable_rank, rank.energy_rank)] == [1, 1, 1]
    two = torch.tensor([2.0, 1.0])  # energy 4 and 1
    assert float(rank.stable_rank(two)) == pytest.approx(1.25)
    assert float(rank.effective_rank(two)) == pytest.approx(
        math.exp(-(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3))
    )
    assert [int(rank.energy_rank(two, share)) for share in (0.5, 0.79, 0.81, 1.0)] == [1, 1, 2, 2]


def test_the_last_direction_of_all_the_energy_is_not_rounding():
    S = torch.cat([torch.ones(5), torch.zeros(50)])
    assert int(rank.energy_rank(S, 1.0)) == 5


@QUICK
@given(st.integers(1, 10), SEEDS, st.floats(1e-6, 1e6))
def test_ranks_do_not_depend_on_scale_or_order(k, seed, scale):
    S = normal(k, seed=seed).abs() + 1e-3
    mixed = S[torch.randperm(k, generator=torch.Generator().manual_seed(seed))]
    for statistic in (rank.effective_rank, rank.stable_rank, rank.energy_rank):
        assert float(statistic(S * scale)) == pytest.approx(float(statistic(S)), rel=1e-9)
        assert float(statistic(mixed)) == pytest.approx(float(statistic(S)), rel=1e-9)
        assert 1 - 1e-9 <= float(statistic(S)) <= k + 1e-9


@QUICK
@given(SIZES, SIZES, SEEDS)
def test_ranks_do_not_depend_on_rotation_or_transposition(out, width, seed):
    W = normal(out, width, seed=seed)
    turned = basis(out, out, seed=seed + 1) @ W @ basis(width, width, seed=seed + 2)
    for statistic in (rank.effective_rank, rank.stable_rank):
        expected = float(statistic(rank.svd(W).S))
        assert float(statistic(rank.svd(turned).S)) == pytest.approx(expected, rel=1e-6)
        assert float(statistic(rank.svd(W.T).S)) == pytest.approx(expected, rel=1e-6)


def test_a_matrix_of_zeros_has_rank_0():
    """As a fresh adapter's update is."""
    S = rank.product_svd(torch.zeros(6, 2), normal(2, 5, dtype=torch.float32)).S
    assert [float(f(S)) for f in (rank.effective_rank, rank.stable_rank, rank.energy_rank)] == [0, 0, 0]
    assert float(rank.truncate(torch.zeros(6, 5), 2).error) == 0
    assert float(rank.amplification(torch.zeros(6, 5), torch.ones(6, 5), 2).factor) == 0
    both = torch.stack([torch.zeros(2), torch.ones(2)])
    assert rank.stable_rank(both).tolist() == [0, 2]


# Subspaces


@QUICK
@given(st.integers(2, 12), SEEDS, st.data())
def test_similarity_is_the_papers_sum(n, seed, data):
    i, j = data.draw(st.integers(1, n)), data.draw(st.integers(1, n))
    V1, V2 = basis(n, i, seed), basis(n, j, seed + 1)
    found = rank.subspace_similarity(V1, V2)
    expected = [
        [np.linalg.norm(V1[:, :a].T.numpy() @ V2[:, :b].numpy()) ** 2 / min(a, b) for b in range(1, j + 1)]
        for a in range(1, i + 1)
    ]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(found, rank.subspace_similarity(V2, V1).T)


def test_similarity_by_chance_is_the_larger_part_of_the_space():
    band = rank.by_chance(
        lambda g: rank.subspace_similarity(rank.orthonormal(40, 4, generator=g), rank.orthonormal(40, 10, generator=g))
    )
    i, j = torch.arange(1, 5.0)[:, None], torch.arange(1, 11.0)
    np.testing.assert_allclose(band.mean, torch.maximum(i, j) / 40, rtol=0.25)
    assert float(band.mean[-1, -1]) == pytest.approx(10 / 40, rel=0.05)


def test_amplification_is_the_papers_quotient():
    delta, W = of_spectrum([5, 2, 1], 12, 9), normal(12, 9, seed=7)
    U, _, Vh = np.linalg.svd(delta.numpy(), full_matrices=False)
    found = rank.amplification(delta, W, 2)
    projected = np.linalg.norm(U[:, :2].T @ W.numpy() @ Vh[:2].T)
    assert float(found.projected) == pytest.approx(projected)
    assert float(found.factor) == pytest.approx(math.sqrt(30) / projected)
    assert float(rank.amplification_factor(delta, W, 2)) == pytest.approx(math.sqrt(30) / projected)
    assert float(found.largest) == pytest.approx(np.linalg.norm(np.linalg.svd(W.numpy())[1][:2]))
    assert float(found.largest) > float(found.random)
    given_ = rank.amplification(rank.svd(delta), rank.svd(W), 2)
    assert [float(x) for x in given_] == pytest.approx([float(x) for x in found])


def test_an_update_along_weak_directions_amplifies_more_than_one_along_strong_ones():
    W = of_spectrum([100, 50, 20, 1, 0.5], 12, 9)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    strong, weak = (U[:, k : k + 1] @ Vh[k : k + 1] for k in (0, 3))
    assert float(rank.amplification(strong, W, 1).factor) == pytest.approx(1 / 100)
    assert float(rank.amplification(weak, W, 1).factor) == pytest.approx(1)


# Intruders


def test_a_strong_foreign_direction_intrudes_and_a_weak_one_does_not():
    W = of_spectrum(torch.linspace(3, 1, 40), 60, 40)
    foreign = torch.outer(normal(60, seed=5), normal(40, seed=6))
    foreign /= foreign.norm()
    none, one = rank.intruder_dimensions(W, W + 0.01 * foreign), rank.intruder_dimensions(W, W + 30 * foreign)
    assert (int(none.count), float(none.energy_share)) == (0, 0)
    assert int(one.count) >= 1
    assert float(one.cosines[0]) < 0.5
    energy = np.linalg.svd((W + 30 * foreign).numpy(), compute_uv=False) ** 2
    here = (one.cosines < 0.5).numpy()
    assert float(one.energy_share) == pytest.approx(energy[:10][here].sum() / energy.sum())
    assert 0.8 < float(one.energy_share) < 1


def test_cosines_are_to_the_nearest_old_direction():
    before, after = normal(12, 20), normal(12, 20, seed=1)
    X, Y = (np.linalg.svd(W.numpy(), full_matrices=False)[0] for W in (before, after))
    found = rank.intruder_dimensions(before, after, top=5, epsilon=0.6)
    expected = np.abs(Y[:, :5].T @ X).max(1)
    np.testing.assert_allclose(found.cosines, expected, atol=1e-9)
    assert int(found.count) == (expected < 0.6).sum()


@pytest.mark.parametrize(("width", "cosine"), [(576, 0.137), (192, 0.217), (64, 0.328)])
def test_the_floor_is_what_a_random_direction_has(width, cosine):
    assert rank.random_cosine(width) == pytest.approx(cosine, abs=0.004)
    assert rank.intruder_dimensions(normal(width, width), normal(width, width, seed=1)).floor == rank.random_cosine(
        width
    )


def test_the_floor_of_a_tall_matrix_is_that_of_its_few_directions():
    generator = np.random.default_rng(0)
    drawn = generator.normal(size=(20_000, 64))
    cosine = (np.abs(drawn[:, :8]).max(1) / np.linalg.norm(drawn, axis=1)).mean()
    assert rank.random_cosine(64, 8) == pytest.approx(cosine, abs=0.01)
    assert rank.random_cosine(64, 8) < rank.random_cosine(64) - 0.05
    assert rank.intruder_dimensions(normal(64, 8), normal(64, 8, seed=1), top=2).floor == rank.random_cosine(64, 8)


# Chance


def test_gaussian_matrices_have_the_norm_asked_for():
    assert float(rank.gaussian((6, 5), norm=3.0).norm()) == pytest.approx(3)
    B, A = rank.gaussian_factors((6, 5), 2, norm=3.0)
    assert float((B @ A).norm()) == pytest.approx(3)
    assert (B.shape, A.shape) == ((6, 2), (2, 5))
    stack = rank.gaussian((4, 6, 5), norm=3.0)
    torch.testing.assert_close(torch.linalg.matrix_norm(stack), torch.full((4,), 3.0, dtype=torch.float64))


def test_random_subspaces_are_orthonormal_and_the_generators():
    g = torch.Generator().manual_seed(3)
    one, two = rank.orthonormal(9, 4, generator=g), rank.orthonormal(9, 4, generator=g)
    torch.testing.assert_close(one.T @ one, torch.eye(4, dtype=torch.float64))
    assert not torch.allclose(one, two)


def test_what_chance_gives_for_a_full_matrix_and_for_an_adapter():
    """294 and 7 directions of 576 hold nine tenths, though neither has any signal."""
    adapter = rank.by_chance(
        lambda g: rank.energy_rank(rank.product_svd(*rank.gaussian_factors((576, 576), 8, generator=g)).S)
    )
    assert round(float(adapter.mean)) == 7
    one = rank.energy_rank(rank.singular_values(rank.gaussian((576, 576), generator=torch.Generator().manual_seed(0))))
    assert int(one) in (293, 294, 295)


def test_the_band_holds_ninety_five_of_a_hundred():
    """Coverage over many bands, each tried on one fresh draw."""
    generator, inside = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        band = rank.by_chance(lambda _: torch.rand((), generator=generator))
        inside += torch.rand((), generator=generator).double() in band
    assert 0.92 < inside / 400 < 0.975
    assert 0.5 in band
    assert 1.5 not in band


# Kinds of numbers, and what is refused


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    W = normal(8, 6, dtype=dtype)
    torch.testing.assert_close(rank.svd(W).S, rank.svd(W.float()).S)
    assert rank.svd(W).S.dtype == torch.float32
    B, A = normal(8, 2, dtype=dtype), normal(2, 6, dtype=dtype)
    torch.testing.assert_close(rank.product_svd(B, A).S, rank.product_svd(B.float(), A.float()).S)
    assert rank.singular_values(W).dtype == torch.float64
    assert float(rank.stable_rank(torch.ones(300, dtype=dtype))) == pytest.approx(300)
    V1, V2 = basis(40, 4).to(dtype), basis(40, 10, seed=1).to(dtype)
    found, exact = rank.subspace_similarity(V1, V2), rank.subspace_similarity(basis(40, 4), basis(40, 10, 1))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact.float(), rtol=0, atol=0.01)
    with pytest.raises(ValueError, match="columns of V2"):
        rank.subspace_similarity(V1, 0.3 * normal(40, 10, dtype=dtype))


W = normal(4, 6)
NAN = torch.full((4, 6), torch.nan)


REFUSED = [  # the call, what must be named
    (lambda: rank.svd(NAN), "W has"),
    (lambda: rank.singular_values(torch.full((4, 6), torch.inf)), "W has"),
    (lambda: rank.product_svd(NAN, normal(6, 3)), "B has"),
    (lambda: rank.product_svd(normal(4, 2), normal(3, 6)), r"B is \(4, 2\), A \(3, 6\)"),
    (lambda: rank.product_svd(normal(3, 4, 2), normal(2, 6)), r"B is \(3, 4, 2\), A \(2, 6\)"),
    (lambda: rank.product_svd(normal(4, 2), normal(2, 6), 0.0), r"scaling is 0\.0"),
    (lambda: rank.product_svd(normal(4, 2), normal(2, 6), math.nan), "scaling is nan"),
    (lambda: rank.product_svd(normal(2, 4, 2), normal(2, 2, 6), torch.tensor([1.0, 0.0])), "scaling is"),
    (lambda: rank.product_svd(normal(4, 2), normal(2, 6), 1e308), r"scaling \* B A has entries"),
    (lambda: rank.svd(torch.ones(4)), r"W is \(4,\)"),
    (lambda: rank.svd(torch.ones(4, 6, dtype=torch.long)), "torch.int64"),
    (lambda: rank.svd(torch.ones(0, 6)), r"W is \(0, 6\)"),
    (lambda: rank.svd(torch.ones(4, 6, device="meta")), "meta"),
    (lambda: rank.svd((W, W, W)), "U"),
    (lambda: rank.truncate(W, 0), "rank is 0.* 1 to 4"),
    (lambda: rank.truncate(W, 5), "rank is 5"),
    (lambda: rank.effective_rank(torch.tensor([1.0, -1.0])), "S has"),
    (lambda: rank.stable_rank(torch.tensor([1.0, torch.nan])), "S has"),
    (lambda: rank.energy_rank(torch.ones(3, device="meta")), "S is .*meta"),
    (lambda: rank.energy_rank(torch.ones(3), 0.0), r"share is 0\.0"),
    (lambda: rank.energy_rank(torch.ones(3), 90), "share is 90"),
    (lambda: rank.subspace_similarity(normal(6, 2), basis(6, 2)), "V1"),
    (lambda: rank.amplification(W, W, 5), "rank is 5"),
    (lambda: rank.amplification(W, W.T, 2), r"weight is \(6, 4\), but the update \(4, 6\)"),
    (lambda: rank.intruder_dimensions(W, normal(6, 4), 2), r"\(4, 6\) and \(6, 4\)"),
    (lambda: rank.intruder_dimensions(W, W), "top is 10"),
    (lambda: rank.intruder_dimensions(W, W, 2, 0.0), r"epsilon is 0\.0"),
    (lambda: rank.orthonormal(4, 5), "k is 5"),
    (lambda: rank.gaussian_factors((4, 6), 0), r"B is \(4, 0\)"),
]


@pytest.mark.parametrize(("call", "named"), REFUSED)
def test_what_is_refused_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_on_a_gpu_numbers_are_those_of_the_cpu():
    W, delta = normal(40, 30, dtype=torch.float32), normal(40, 30, seed=1, dtype=torch.float32)
    for call in (
        lambda *m: rank.svd(m[0]).S,
        lambda *m: rank.singular_values(m[0]),
        lambda *m: rank.truncate(m[0], 4).error,
        lambda *m: rank.amplification(m[1], m[0], 4).factor,
        lambda *m: rank.intruder_dimensions(m[0], m[0] + m[1]).cosines,
    ):
        torch.testing.assert_close(call(W.cuda(), delta.cuda()).cpu(), call(W, delta), rtol=1e-3, atol=1e-4)
