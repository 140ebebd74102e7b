"""The policy, its attention and adapters, and PPO's critic."""
