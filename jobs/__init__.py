"""The programs that a person or a scheduler starts: the command line and the demo."""
