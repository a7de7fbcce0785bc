"""Forward and backward on one rank: replica, loss, random numbers, gradient hooks."""
