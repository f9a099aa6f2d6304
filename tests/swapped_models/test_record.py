"""The record, the table and docs/swapping_in.md say the same."""

from swapped_models import record
from swapped_models.table import MODELS


def test_every_model_is_recorded():
    assert sorted(record.load()["models"]) == sorted(MODELS)


def test_the_page_is_written_from_the_record():
    page = record.PAGE.read_text()
    assert page == record.page(record.load(), page), "make record-models writes it"
