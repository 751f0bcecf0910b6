"""The stages of a run, one entry for each line of `ecif status`."""
