"""Influence on any parameters, by forward-mode differentiation."""
