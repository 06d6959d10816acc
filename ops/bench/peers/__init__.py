"""This engine beside those that one would otherwise choose: same weights, same prompts, same cores, in turn."""
