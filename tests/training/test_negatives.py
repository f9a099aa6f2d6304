"""How many negatives each loss has, which a run says when it starts."""

import pytest

from sclkern.training.config import load_config
from sclkern.training.negatives import describe_negatives


@pytest.fixture
def described(arguments):
    def describe(world_size=1, **changes):
        config = load_config(None, arguments(run__accumulation=2, **changes))
        numbers, _, less = describe_negatives(config, world_size, 100).partition("; less those of the same picture: ")
        without = [
            name for name in ("ITC", "MVSC", "MLSC") if name in numbers and config.objectives.same_image == "ignore"
        ]
        assert less.split(", ") == [*without, *["ITM"] * ("ITM" in numbers)] or not (less or numbers)
        return numbers

    return describe


def test_contrasts_are_over_processes_and_matching_over_the_step(described):
    assert described() == "ITC 7, MVSC 7, MLSC 7, ITM one of the 15 other images of a step"
    assert described(3) == "ITC 23, MVSC 23, MLSC 23, ITM one of the 47 other images of a step"
    assert described(3, run__contrastive_batch=48).startswith("ITC 47, MVSC 47, MLSC 47, ITM")
    assert described(3, objectives__negatives="published").startswith("ITC 23, MVSC 23, MLSC 7, ITM")


def test_the_line_says_how_pairs_of_the_same_picture_count(arguments):
    def described(**changes):
        return describe_negatives(load_config(None, arguments(**changes)), 1, 100).partition("; ")[2]

    assert described() == "less those of the same picture: ITC, MVSC, MLSC, ITM"
    assert described(objectives__same_image="negative") == "less those of the same picture: ITM"
    assert described(objectives__recipe="[itc]", objectives__same_image="published") == ""


def test_hard_negatives_stay_within_a_forward_pass(described):
    other = described(2, objectives__itm_negatives="hard").partition("ITM ")[2]
    assert other == "one of the 7 other images of a forward pass, the similar ones more often"
    assert described(2, objectives__itm_negatives="dataset").endswith("ITM one of the 99 other images of the data")


def test_tokens_are_counted_as_they_are_contrasted(described):
    # Of 4 patches one is replaced; of a caption's 16 tokens up to 6 are completed.
    options = {"objectives__recipe": "glscl", "objectives__patch_token_ratio": 0.3}
    assert "MLTC up to 47 text tokens and 7 image tokens" in described(**options)
    assert "MLTC up to 95 text tokens and 15 image tokens" in described(2, **options)
    assert "MLTC up to 95 text tokens and 7 image tokens" in described(2, objectives__negatives="published", **options)


def test_a_recipe_without_negatives(described):
    assert described(objectives__recipe="[mlm]") == ""
