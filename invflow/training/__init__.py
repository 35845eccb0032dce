"""Training: priors, and the adapters and maps of Variational Flow Maps."""
