from __future__ import annotations

import logging

import pytest

from sclkern.data.undecodable import UndecodableImages
from sclkern.errors import UserError


def test_one_percent_may_be_undecodable(caplog: pytest.LogCaptureFixture) -> None:
    first = UndecodableImages(1000)
    with caplog.at_level(logging.WARNING, "sclkern.data"):
        for _ in range(3):
            first.add(["t.arrow row 0", "t.arrow row 0"])
        first.add(f"t.arrow row {row}" for row in range(10))
    assert len(first) == 10
    assert [record.getMessage().rsplit(" ", 1)[1] for record in caplog.records] == [str(row) for row in range(10)]

    again = UndecodableImages(1000)
    again.load_state_dict(first.state_dict())
    for counter in (first, again):
        counter.add(["t.arrow row 3"])
        with pytest.raises(UserError) as caught:
            counter.add(["t.arrow row 11"])
        assert str(caught.value).startswith("11 of 1000 images cannot be decoded, expected 1 % at most; the first")
        assert "is t.arrow row 0;" in str(caught.value) and "\n" not in str(caught.value)
    assert first.state_dict() == again.state_dict()
