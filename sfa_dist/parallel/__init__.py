"""Ranks, engines and signals. Only `runtime` reads the environment, and only `zero` imports deepspeed."""
