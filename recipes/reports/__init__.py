"""Reports of runs and studies: plain data in, text and figures out."""
