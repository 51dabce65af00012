"""Reports on runs, from the files in their folders: the report of one run, and comparisons of several."""
