"""A loss, gradient or parameter that is not finite is named."""

import pytest
import torch

from sclkern.errors import UserError
from sclkern.training.health import FiniteCheck


@pytest.fixture
def layer():
    layer = torch.nn.Linear(2, 1)
    layer(torch.ones(1, 2)).sum().backward()
    return layer


def message_of(check, *args):
    with pytest.raises(UserError) as caught:
        check.require(*args)
    return str(caught.value)


def test_finite_values_pass(layer):
    check = FiniteCheck(layer, torch.device("cpu"))
    check.observe(torch.tensor(1.0), torch.tensor(-3.0))
    check.require(1, -1, {"total": torch.tensor(1.0)})


def test_the_cause_is_named_from_losses_to_parameters(layer):
    check = FiniteCheck(layer, torch.device("cpu"))
    check.observe(torch.tensor(float("inf")))
    check.observe(torch.tensor(1.0))  # what was seen once is not forgotten
    values = {"total": torch.tensor(1.0), "itm": torch.tensor(float("nan"))}
    assert message_of(check, 7, 4, values).startswith(
        "step 7: itm is not finite; the checkpoint of step 4 is kept; lower"
    )
    assert message_of(check, 7, -1).startswith(
        "step 7: an earlier loss is not finite; no step was saved; lower optimizer.learning_rate or"
    )
    layer.bias.data[0] = torch.nan
    assert "the parameter bias is not finite" in message_of(check, 7, -1)
    layer.weight.grad[0, 1] = torch.inf
    assert "the gradient of weight is not finite" in message_of(check, 7, -1)


def test_an_image_is_named_first(layer):
    check = FiniteCheck(layer, torch.device("cpu"))
    check.observe(torch.tensor(float("nan")))
    values = {"itm": torch.tensor(torch.nan)}
    images = torch.zeros(3, 3, 2, 2)
    batch = {"image": images, "false_image": images[:1], "pair": torch.tensor([4, 9, 2])}
    check.observe_images(6, batch, "row {}".format)
    with pytest.raises(UserError, match=r"step 7: itm is not finite; the checkpoint of step 4 is kept; lower"):
        check.require(7, 4, values)
    images[1, 2, 0, 1] = torch.inf
    check.observe_images(6, batch, "row {}".format)
    check.observe_images(7, {**batch, "image": images * torch.nan}, "row {}".format)
    assert "step 6: image row 9 is not finite; the checkpoint of step 4 is kept; look at" in message_of(check, 6, 4)
    assert "step 7: image row 9, read in step 6, is not finite; " in message_of(check, 7, 4, values)


def test_a_negative_image_that_no_row_has_is_named(layer):
    check = FiniteCheck(layer, torch.device("cpu"))
    check.observe(torch.tensor(float("nan")))
    false = torch.full((1, 3, 2, 2), torch.nan)
    batch = {"image": torch.zeros(2, 3, 2, 2, dtype=torch.uint8), "pair": torch.tensor([0, 1])}
    check.observe_images(1, {**batch, "false_image": false[:0]}, str)
    check.observe_images(1, {**batch, "false_image": false}, str)
    assert "step 1: a negative image is not finite" in message_of(check, 1, -1)
