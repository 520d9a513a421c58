"""Hypothesis profiles: `quick` for `scripts/test unit`, the default for the whole run."""

from hypothesis import settings

settings.register_profile("quick", max_examples=25, deadline=None)
settings.register_profile("full", deadline=None)
settings.load_profile("full")
