"""Shared by all tests: hypothesis runs without deadlines, since CI machines are slow and shared."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "minisgl",
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("minisgl")
