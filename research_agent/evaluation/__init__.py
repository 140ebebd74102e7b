"""Play every task with a fixed policy, and say what the results are worth."""
