"""Every model of the table: fused it does what it did, and what is taken and left is what the record says."""

import importlib.metadata

import pytest

from swapped_models import record
from swapped_models.checks import examine
from swapped_models.others import OTHERS
from swapped_models.table import MODELS

RECORD = record.load()
pytestmark = pytest.mark.models


def installed():
    """The models that the installed transformers has: all, where it is that of the record."""
    version = importlib.metadata.version("transformers")
    if version == RECORD["transformers"]:
        return list(MODELS)
    if version == RECORD["oldest"]["transformers"]:
        return [name for name in MODELS if name not in RECORD["oldest"]["without"]]
    import transformers

    return [name for name in MODELS if name in OTHERS or name in dir(transformers)]


@pytest.mark.parametrize("name", installed())
def test_model(name):
    outcome, faults = examine(name)
    assert not faults, "\n".join(faults)
    if importlib.metadata.version("transformers") == RECORD["transformers"]:
        assert outcome == RECORD["models"][name]
