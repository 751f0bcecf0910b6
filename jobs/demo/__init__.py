"""The whole story on an embedded corpus of real image-text pairs."""
