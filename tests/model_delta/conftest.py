"""Property tests here touch disks and curves on shared machines: correctness is judged, not the time of one example."""

from hypothesis import settings

settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")
