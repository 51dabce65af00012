"""What every page this project writes has in common: one HTML file that needs nothing else."""
