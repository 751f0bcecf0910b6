"""What a person or a scheduler starts: the command line, the demo."""
