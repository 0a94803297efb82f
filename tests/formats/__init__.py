"""Tests of the formats."""

import pytest

pytest.register_assert_rewrite("tests.formats.conformance")
