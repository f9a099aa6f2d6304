"""What of a picture a model attends to: maps of attention and relevancy, as overlays and as a page."""
