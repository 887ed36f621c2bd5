"""Watch a policy, an expert or random actions play, or play yourself."""
