"""Questions to a run folder; nothing is computed."""
