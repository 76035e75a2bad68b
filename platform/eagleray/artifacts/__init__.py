"""What runs leave behind: checkpoints, model packages, and the registry that leads from one to the other."""
