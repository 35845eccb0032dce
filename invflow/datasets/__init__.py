"""Data sets and image files as tensors."""

from invflow.datasets.sets import DOWNLOADS, IMAGE_SUFFIXES, cache_folder, load_images, read_idx

__all__ = ["DOWNLOADS", "IMAGE_SUFFIXES", "cache_folder", "load_images", "read_idx"]
