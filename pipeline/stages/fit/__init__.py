"""Stage `fit`: heads at a minimum on a sample of the corpus."""
