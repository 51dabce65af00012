"""HTML pages: rendering, charts, and the formats of numbers."""
