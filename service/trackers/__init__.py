"""Where users watch the curves of their jobs: trackers of other makers, filled from our rows."""
