"""N-GRPO in frameworks of others, one folder a framework."""
