"""One module per server that is measured; each is run as a process with its task in the environment."""
