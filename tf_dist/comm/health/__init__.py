"""Health of ranks: watchdog, status board, hang detector, stragglers."""
