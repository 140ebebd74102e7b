"""Opening models, running them in the learner, LoRA adapters, and PPO's critic."""
