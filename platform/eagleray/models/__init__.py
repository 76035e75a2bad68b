"""The networks: name → builder."""
