"""Keras callbacks on several ranks: the public ones, the list that runs them, and metric reduction."""
