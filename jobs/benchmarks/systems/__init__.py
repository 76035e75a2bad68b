"""What is compared: one module per system, each run as a process of its own, peers in environments of their own."""
