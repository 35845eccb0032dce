"""Rewards beyond likelihoods: of images, and of vision models."""
