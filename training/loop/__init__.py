"""Training loops that people write themselves, averaged by a swarm: `shoal.training.exchange.Averager`."""
