"""What a run writes, and under which name."""
