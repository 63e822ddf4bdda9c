"""What a model takes and how fast it can be, from config.json alone: no weights, no device, no torch."""
