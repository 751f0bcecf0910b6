"""What a curator takes away from a run: a subset, an export, answers of the index, a judgement of the scores."""
