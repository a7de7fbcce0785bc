"""What happens when something breaks, on purpose and from a seed; and what it costs to be ready for it."""
