"""What all tests share: how hypothesis looks for examples. Fixtures live beside their tests."""

import os

import hypothesis

# No deadline for one example: the machine may be busy with something else.
hypothesis.settings.register_profile("here", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "here")
