"""How much memory the agent takes under long, mixed load: see run and soak.py."""
