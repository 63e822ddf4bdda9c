"""Padding rows changes nothing but the shapes that torch meets, and these are few."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.kernels.reference import REFERENCE
from lmdeploy.kernels.row_buckets import bucket, buckets, padded


def test_a_bucket_holds_its_rows_and_wastes_little() -> None:
    for rows in range(1, 5000):
        assert rows <= bucket(rows) <= max(2 * rows, 1)
        assert bucket(bucket(rows)) == bucket(rows)
        if rows > 512:
            assert bucket(rows) <= 2 * rows
    assert [bucket(r) for r in (1, 2, 3, 100, 129, 513, 1025)] == [1, 2, 4, 128, 256, 640, 2048]


@pytest.mark.parametrize("limit", [1, 7, 128, 300, 1024, 3000])
def test_every_number_of_rows_has_its_bucket_in_the_list(limit: int) -> None:
    listed = buckets(limit)
    assert listed == sorted({bucket(rows) for rows in range(1, limit + 1)}, reverse=True)


@pytest.mark.parametrize("rows", [1, 3, 37, 130])
def test_a_padded_product_is_the_product(rows: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, 48), torch.randn(20, 48), torch.randn(20)
    plain, wide = torch.empty(rows, 20), torch.full((rows, 20), torch.nan)
    REFERENCE.linear(x, weight, bias, plain)
    padded(REFERENCE.linear)(x, weight, bias, wide)
    torch.testing.assert_close(wide, plain)
