"""How fast and lean the toolkit is, side by side with plain formulations: `python -m benchmarks`."""
