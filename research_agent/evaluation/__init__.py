"""Play every task with a fixed policy, then summarize, compare and grade the results."""
