"""What the trainer asks of the machine: files, threads, signals, terminals and torchrun."""
