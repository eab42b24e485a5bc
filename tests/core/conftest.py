"""How hypothesis runs."""

from __future__ import annotations

from hypothesis import settings

# No deadline for one example: a busy machine is not a bug. What else is set (in CI: no randomness) stays.
settings.register_profile("patient", settings.get_profile(settings.get_current_profile_name()), deadline=None)
settings.load_profile("patient")
