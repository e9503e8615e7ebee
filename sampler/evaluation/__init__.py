"""Scores of finished images with clustered and paired intervals."""
