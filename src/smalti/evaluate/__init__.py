"""Measures of what a model makes: prompt and caption accuracy, reconstruction, likelihood tables."""
