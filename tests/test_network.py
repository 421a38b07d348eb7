"""The reference network against numbers of the public code (`tests/golden/`)."""
