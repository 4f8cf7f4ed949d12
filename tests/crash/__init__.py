"""Death of the agent, many times over: see run, campaign.py and guest.py."""
