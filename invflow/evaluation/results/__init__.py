"""What a comparison found: parts on disk, numbers with paired errors, text and figure. Knows no page."""
