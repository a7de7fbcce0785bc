"""Startup, core binding, consensus checks, console output and exit of a job."""
