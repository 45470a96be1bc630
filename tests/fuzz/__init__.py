"""Inputs that no host would send, for the agent's server: `scripts/fuzz` and its tests."""
