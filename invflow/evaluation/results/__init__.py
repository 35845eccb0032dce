"""Results of a comparison: parts on disk, numbers with paired errors, text and figure. Independent of the page."""
