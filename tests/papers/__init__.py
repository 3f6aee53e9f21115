"""Every formula of a paper written again in a few lines, and held to ours: a mirror that does not show the house."""
