"""From samples to a batch's rows: drawn, augmented, tokenised and masked by their place alone, into plain arrays."""
