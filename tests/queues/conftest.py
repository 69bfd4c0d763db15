"""The tests that backends share say what they found, as other tests do."""

import pytest

pytest.register_assert_rewrite("tests.queues.contract")
