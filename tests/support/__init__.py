"""Rigs, factories and fakes that several test modules share."""
