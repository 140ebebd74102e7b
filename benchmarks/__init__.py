"""Where environment and trainer meet: the demo, and measurements beside peers."""
