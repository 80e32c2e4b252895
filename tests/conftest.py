"""Settings of the whole suite."""

from hypothesis import settings

# The same examples in every run: a suite that fails must fail again. Drop the profile to search for new ones.
settings.register_profile("suite", derandomize=True, deadline=None)
settings.load_profile("suite")
