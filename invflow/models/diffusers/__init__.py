"""Models of diffusers as priors."""
