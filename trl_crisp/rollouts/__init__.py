"""How rollouts are sampled. Does not import trl_crisp.trainer."""
