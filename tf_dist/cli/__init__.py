"""The command line: ``tf-dist COMMAND``, ``python -m tf_dist COMMAND``, and what ``scripts/*.py`` call.

One module for each command: flags -> objects -> call. `main` finds the module by the command's name.
"""
