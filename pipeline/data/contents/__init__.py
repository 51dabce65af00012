"""What a sample holds: its members and what they mean, pictures and texts decoded, and what is asked about them."""
