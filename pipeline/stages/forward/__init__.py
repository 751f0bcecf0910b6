"""Forward mode: influence on parameters other than the heads."""
