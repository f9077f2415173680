"""Settings of the whole suite."""

from hypothesis import settings

# The cores are shared: an example that is slow once is not a failure.
settings.register_profile("shared cores", deadline=None, print_blob=True)
settings.load_profile("shared cores")
