"""Job files: one YAML, checked before a cluster is touched."""
