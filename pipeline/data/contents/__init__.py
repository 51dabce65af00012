"""The contents of a sample: parsing its members, decoding images, tokenising texts, questions and regions."""
