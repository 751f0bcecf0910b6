"""Scores of a pair beside its influence."""
