"""Structure of A: diagonal, circular, or a small matrix; an operator may declare it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import invflow
from invflow._core.conjugate_gradients import conjugate_gradient, solve
from invflow.linear.structure import dense_matrix, diagonal_values, find_system, matrix_shape, transfer_function
from invflow.operators import Blur, Denoising, MaskInpainting, MatrixOperator, SuperResolution
from invflow.testing import check_operator

SHAPE = (1, 6, 6)


class Scale(invflow.Operator):
    """Each pixel times a number of its own."""

    def __init__(self, structure: str | None = "diagonal") -> None:
        super().__init__()
        self.image_shape = self.measurement_shape = SHAPE
        self.structure = structure
        self.register_buffer("factors", torch.linspace(-1, 2, 36).reshape(SHAPE))
        self.calls = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        return self.factors.to(x) * x


def likelihood(operator: invflow.Operator) -> invflow.GaussianLikelihood:
    return invflow.GaussianLikelihood(operator, operator(torch.full((1, *operator.image_shape), 0.5)), sigma=0.1)


def mask() -> MaskInpainting:
    return MaskInpainting(torch.arange(36).reshape(6, 6) % 3 > 0, SHAPE)


KERNEL = torch.tensor([[0.0, 0.2, 0.0], [0.1, 0.4, 0.1], [0.0, 0.1, 0.1]])


@pytest.mark.parametrize(("operator", "diagonal", "circular"), [
    (Denoising(SHAPE), True, True), (mask(), True, False), (Scale(None), True, False),
    (Blur(KERNEL, SHAPE), False, True), (Blur(KERNEL, SHAPE, padding="reflect"), False, False),
    (SuperResolution(SHAPE, factor=2), False, False), (MatrixOperator(torch.rand(5, 36), SHAPE), False, False)])
def test_the_answer_is_that_of_the_matrix(operator: invflow.Operator, diagonal: bool, circular: bool) -> None:
    own = likelihood(operator)
    matrix, values, transfer = dense_matrix(own), diagonal_values(own), transfer_function(own)
    assert matrix.shape == matrix_shape(operator)
    assert (values is not None) == diagonal
    assert (transfer is not None) == circular
    if values is not None:
        assert torch.allclose(torch.diag_embed(values.flatten(1)).double(), matrix, atol=1e-6)
    if transfer is not None:  # the matrix of a convolution has the transfer function for eigenvalues
        eigenvalues = torch.linalg.eigvals(matrix[0])
        distance = (transfer.flatten().to(eigenvalues)[:, None] - eigenvalues).abs().amin(1)
        assert float(distance.max()) < 1e-5
    system = find_system(own)
    assert system is not None
    singular = torch.linalg.svdvals(matrix)
    found = system.values.sort(descending=True).values[:, : singular.shape[1]]
    assert torch.allclose(found.double(), singular, atol=1e-5)


def test_a_large_image_is_no_matrix() -> None:
    assert find_system(likelihood(SuperResolution(SHAPE, factor=2)), largest=35) is None
    assert find_system(likelihood(SuperResolution(SHAPE, factor=2)), largest=36) is not None


def test_an_operator_that_says_what_it_is_is_asked_once() -> None:
    said, silent = Scale("diagonal"), Scale(None)
    calls = []
    for operator in (said, silent):
        own = likelihood(operator)
        operator.calls[0] = 0
        found = diagonal_values(own)
        assert found is not None
        assert torch.equal(found[0], operator.factors)
        calls.append(operator.calls[0])
    assert calls == [1, 2]
    dense = Scale("dense")
    own = likelihood(dense)
    dense.calls[0] = 0
    assert diagonal_values(own) is None
    assert transfer_function(own) is None
    assert dense.calls[0] == 0


@pytest.mark.parametrize("said", ["identity", "circular", "smooth"])
def test_a_wrong_word_is_found(said: str) -> None:
    check_operator(Scale("diagonal"))
    with pytest.raises(AssertionError, match=f"structure is '{said}'"):
        check_operator(Scale(said))


def test_another_forward_does_not_inherit_the_word() -> None:
    class Bleeding(MaskInpainting):
        """A mask whose pixels run into each other."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 0.5 * x.roll(1, -1))

    operator = Bleeding(mask().mask[0], SHAPE)
    assert operator.structure is None
    assert MaskInpainting.structure == "diagonal"
    assert diagonal_values(likelihood(operator)) is None


def test_both_forms_of_conjugate_gradients_agree_with_the_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    wanted = torch.linalg.lstsq(matrix, y.mT).solution.mT
    least = conjugate_gradient(MatrixOperator(matrix, image_shape=(4,)), y)
    normal, steps = solve(lambda x: x @ (matrix.mT @ matrix), y @ matrix, None, 50, 1e-12)
    assert torch.allclose(least, wanted, atol=1e-10)
    assert torch.allclose(normal, wanted, atol=1e-10)
    assert int(steps.max()) <= math.prod(matrix.shape)
    assert torch.equal(solve(lambda x: 2 * x, y, None, 3, 0.0)[0], y / 2)
