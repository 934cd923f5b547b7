"""How rollouts are sampled and handed on. Imports no trainer."""
