"""Commands that ask a run folder: plan, status, verify and retry. They compute nothing themselves."""
