"""From a model version to an endpoint with an experiment on it."""
