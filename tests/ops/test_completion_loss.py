"""The completion loss against cross-entropy, confident positives, rows that take no part."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sclkern.reference import (
    completion_loss,
)


def pairs(rows=6, width=5, dtype=torch.float64, groups=()):
    return tuple(torch.randn(*groups, rows, width, dtype=dtype, requires_grad=True) for _ in range(2))


def plain_loss(recovered, complete, temperature, directions="both"):
    """The formula as it is usually written."""
    similarity = F.normalize(recovered, dim=-1) @ F.normalize(complete, dim=-1).T / temperature
    diagonal = torch.arange(len(similarity))
    loss = F.cross_entropy(similarity, diagonal)
    return loss + F.cross_entropy(similarity.T, diagonal) if directions == "both" else loss


DIRECTIONS = ["both", "recovered_to_complete"]


class TestCompletionLoss:
    @pytest.mark.parametrize("directions", DIRECTIONS)
    @pytest.mark.parametrize("temperature", [0.03, 0.5, 2.0])
    def test_equals_cross_entropy(self, temperature, directions):
        inputs = pairs()
        temperature = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
        leaves = (*inputs, temperature)
        ours = completion_loss(*inputs, temperature=temperature, directions=directions)
        plain = plain_loss(*inputs, temperature, directions)
        torch.testing.assert_close(ours, plain)
        for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(plain, leaves), strict=True):
            torch.testing.assert_close(a, b)

    @staticmethod
    def confident(dtype, rows=64, width=64, cosine=0.995):
        generator = torch.Generator().manual_seed(5)
        complete = F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=-1)
        noise = torch.randn(rows, width, generator=generator, dtype=torch.float64)
        noise = F.normalize(noise - (noise * complete).sum(-1, keepdim=True) * complete, dim=-1)
        recovered = cosine * complete + math.sqrt(1 - cosine**2) * noise
        return [x.to(dtype).requires_grad_() for x in (recovered, complete)]

    @staticmethod
    def errors(function, dtype, directions):
        truth_inputs, inputs = (TestCompletionLoss.confident(kind) for kind in (torch.float64, dtype))
        truth = completion_loss(*truth_inputs, temperature=0.03, directions=directions)
        loss = function(*inputs, temperature=0.03, directions=directions)
        errors = {"loss": ((loss - truth) / truth).abs().item()}
        gradients = torch.autograd.grad(truth, truth_inputs), torch.autograd.grad(loss, inputs)
        for name, exact, ours in zip(("recovered", "complete"), *gradients, strict=True):
            errors[name] = ((ours - exact).norm() / exact.norm()).item()
        return errors

    @pytest.mark.parametrize("directions", DIRECTIONS)
    def test_confident_positives_are_right_in_float32(self, directions):
        errors = self.errors(completion_loss, torch.float32, directions)
        assert max(errors.values()) < 1e-3, errors

    @pytest.mark.parametrize("directions", DIRECTIONS)
    def test_confident_positives_are_beyond_the_plain_formula_in_float32(self, directions):
        # Without this the test above proves nothing.
        errors = self.errors(plain_loss, torch.float32, directions)
        assert min(errors.values()) > 1e-2, errors
        assert max(self.errors(plain_loss, torch.float64, directions).values()) < 1e-3

    def test_autocast_does_not_round_the_similarities(self):
        recovered, complete = pairs(dtype=torch.float32)
        plain = completion_loss(recovered, complete, temperature=0.03)
        with torch.autocast("cpu", torch.bfloat16):
            cast = completion_loss(recovered, complete, temperature=0.03)
        torch.testing.assert_close(cast, plain)

    def test_one_row_has_no_negatives_and_no_loss(self):
        inputs = pairs(rows=1)
        loss = completion_loss(*inputs, temperature=0.03)
        assert loss.item() == 0
        assert all((g == 0).all() for g in torch.autograd.grad(loss, inputs))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_zero_feature_has_finite_gradients(self, dtype):
        recovered, complete = (x.detach() for x in pairs(dtype=dtype))
        recovered[0] = complete[3] = complete[0] = 0
        inputs = recovered.requires_grad_(), complete.requires_grad_()
        loss = completion_loss(*inputs, temperature=0.03)
        assert loss.isfinite()
        for gradient in torch.autograd.grad(loss, inputs):
            assert gradient.isfinite().all(), gradient

    @pytest.mark.parametrize("directions", DIRECTIONS)
    @pytest.mark.parametrize("garbage", [0.0, 1e3, math.nan, math.inf])
    def test_invalid_rows_are_neither_anchors_nor_negatives(self, garbage, directions):
        valid = torch.tensor([True, False, True, True, False, True])
        clean = pairs()
        inputs = [x.detach().masked_fill(~valid[:, None], garbage).requires_grad_() for x in clean]
        loss = completion_loss(*inputs, temperature=0.1, directions=directions, valid=valid)
        expected = plain_loss(*(x[valid] for x in clean), 0.1, directions)
        torch.testing.assert_close(loss, expected)
        gradients = torch.autograd.grad(loss, inputs)
        for ours, theirs in zip(gradients, torch.autograd.grad(expected, clean), strict=True):
            torch.testing.assert_close(ours, theirs)

    @pytest.mark.parametrize("rows", [0, 4])
    def test_no_valid_row_gives_zero_and_zero_gradients(self, rows):
        inputs = pairs(rows=rows)
        loss = completion_loss(*inputs, temperature=0.03, valid=torch.zeros(rows, dtype=torch.bool))
        assert loss.item() == 0
        assert all((g == 0).all() for g in torch.autograd.grad(loss, inputs))

    @pytest.mark.parametrize("directions", DIRECTIONS)
    def test_pairs_of_one_id_are_no_negatives(self, directions):
        same, inputs = torch.tensor([4, 2, 4, 9, 2, 4]), pairs()
        loss = completion_loss(*inputs, temperature=0.3, same=same, directions=directions)
        r, c = (F.normalize(x, dim=-1).tolist() for x in inputs)
        cosine = [[sum(a * b for a, b in zip(x, y, strict=True)) for y in c] for x in r]
        expected = 0.0
        for i in range(6):
            others = [j for j in range(6) if j == i or same[j] != same[i]]
            rows, columns = (
                [math.exp(s / 0.3) for s in of]
                for of in ([cosine[i][j] for j in others], [cosine[j][i] for j in others])
            )
            positive = math.exp(cosine[i][i] / 0.3)
            expected -= math.log(positive / sum(rows)) / 6
            if directions == "both":
                expected -= math.log(positive / sum(columns)) / 6
        assert loss.item() == pytest.approx(expected)
        different = completion_loss(*inputs, temperature=0.3, same=torch.arange(6), directions=directions)
        assert torch.equal(different, completion_loss(*inputs, temperature=0.3, directions=directions))

    def test_rows_whose_others_are_of_their_id_lose_nothing(self):
        inputs = pairs(groups=(2,))
        valid = torch.tensor([True, True, False, True, False, False])
        same = torch.tensor([1, 1, 2, 1, 3, 4])
        for mask in (None, valid.expand(2, 6)):
            ids = torch.ones(6, dtype=torch.int64) if mask is None else same
            losses = completion_loss(*inputs, temperature=0.03, valid=mask, same=ids, reduction="none")
            assert (losses == 0).all()
            assert all((g == 0).all() for g in torch.autograd.grad(losses.sum(), inputs))
        # One row of another id is enough.
        losses = completion_loss(*inputs, temperature=0.1, same=torch.tensor([1, 1, 2, 1, 1, 1]), reduction="none")
        assert (losses > 0).all()

    def test_gradients_of_both_orders_with_ids(self):
        inputs = (*pairs(rows=4, width=2, groups=(2,)), torch.tensor(0.7, dtype=torch.float64))
        inputs[2].requires_grad_()
        for same in ([1, 2, 1, 3], [1, 1, 1, 1]):

            def function(recovered, complete, temperature, same=same):
                return completion_loss(recovered, complete, temperature=temperature, same=torch.tensor(same))

            assert torch.autograd.gradcheck(function, inputs)
            assert torch.autograd.gradgradcheck(function, inputs)

    def test_groups_are_averaged(self):
        recovered, complete = pairs(groups=(3,))
        valid = torch.tensor([[True] * 6, [True, True, False, False, True, False], [False] * 6])
        grouped = completion_loss(recovered, complete, temperature=0.2)
        single = [completion_loss(r, c, temperature=0.2) for r, c in zip(recovered, complete, strict=True)]
        torch.testing.assert_close(grouped, sum(single) / 3)
        grouped = completion_loss(recovered, complete, temperature=0.2, valid=valid)
        single = [
            completion_loss(r, c, temperature=0.2, valid=v) for r, c, v in zip(recovered, complete, valid, strict=True)
        ]
        torch.testing.assert_close(grouped, sum(single) / 3)

    @pytest.mark.parametrize("grouped", [False, True])
    @pytest.mark.parametrize("with_valid", [False, True])
    @pytest.mark.parametrize("directions", DIRECTIONS)
    def test_gradients_of_both_orders(self, directions, with_valid, grouped):
        inputs = (*pairs(rows=3, width=2, groups=(2,) * grouped), torch.tensor(0.7, dtype=torch.float64))
        inputs[2].requires_grad_()
        valid = torch.tensor([True, True, False]).expand(*(2,) * grouped, 3) if with_valid else None

        def function(recovered, complete, temperature):
            return completion_loss(recovered, complete, temperature=temperature, directions=directions, valid=valid)

        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)

    @pytest.mark.parametrize("wanted", [(True, False), (False, True)])
    def test_a_side_without_gradient_leaves_the_other_as_it_is(self, wanted):
        inputs = pairs()
        both = torch.autograd.grad(completion_loss(*inputs, temperature=0.1), inputs)
        partial = [x.detach().requires_grad_(flag) for x, flag in zip(inputs, wanted, strict=True)]
        side = wanted.index(True)
        (gradient,) = torch.autograd.grad(completion_loss(*partial, temperature=0.1), [partial[side]])
        torch.testing.assert_close(gradient, both[side])
