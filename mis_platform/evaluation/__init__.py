"""The click protocol: simulated user, predictor and the number of clicks (NoC)."""
