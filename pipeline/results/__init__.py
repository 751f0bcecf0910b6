"""What a curator takes away."""
