"""What adds responses, or prompts of its own, to what the cells answered; see ``sampler.py``."""
