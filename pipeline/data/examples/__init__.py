"""Building of training examples: augmentation, masking, and writing into batch buffers."""
