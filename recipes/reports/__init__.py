"""What a run has learned, in words and figures: plain data in, text and images out."""
