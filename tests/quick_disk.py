"""For tests that write many small files: no waiting for the disk to be flushed, which no test can observe."""

import pytest

from pipeline import receipts


@pytest.fixture(autouse=True, scope="module")
def quick_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(receipts, "_sync", lambda path: None)
        yield
