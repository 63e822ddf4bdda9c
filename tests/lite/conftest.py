"""What all tests of quantising share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lmdeploy.lite import evaluate


@pytest.fixture(autouse=True, scope="module")
def speeds_in_passing() -> Iterator[None]:
    """The speeds of a report come from one prompt, not from three within a second and a half: they are printed, and nothing here depends on them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "SHORT_SECONDS", 0.1)
        yield
