"""weightcache.tools: what a person runs."""
