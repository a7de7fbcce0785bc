"""Tasks: what a row needs, how it becomes words, what a model predicts of it, and how that is judged."""
