"""Has pytest rewrite the asserts of the tests that all backends share."""

import pytest

pytest.register_assert_rewrite("tests.queues.contract")
