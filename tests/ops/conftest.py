"""Outputs of published code, to compare with."""

from collections.abc import Callable

import numpy as np
import pytest
from tests.conftest import SHARED

Oracle = Callable[[str], dict[str, np.ndarray]]


@pytest.fixture
def oracle() -> Oracle:
    """Reads the arrays of an oracle by its name; skips where it is not there."""

    def read(name: str) -> dict[str, np.ndarray]:
        file = SHARED / "oracles" / f"{name}.npz"
        if not file.exists():
            pytest.skip(f"no file {file}")
        with np.load(file) as arrays:
            return dict(arrays)

    return read
