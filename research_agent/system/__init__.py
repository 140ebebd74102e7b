"""What the trainer needs from the machine: files, threads, signals, terminals and torchrun."""
