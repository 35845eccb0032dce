"""Rewards other than likelihoods: of images, and from vision models."""
