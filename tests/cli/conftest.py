"""The tiny run of the stages' tests."""

from tests.stages.conftest import shapes_root, tiny  # noqa: F401
