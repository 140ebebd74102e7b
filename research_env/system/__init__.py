"""What the environment asks of the machine: folders, locks and terminals."""
