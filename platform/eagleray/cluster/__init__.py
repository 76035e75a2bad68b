"""Ray clusters: start or join one, submit jobs to it, and tell what is wrong with a set-up."""
