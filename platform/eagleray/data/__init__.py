"""From pictures to shards, and from shards to an ordered stream of training batches."""
