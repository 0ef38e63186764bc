"""Running a recipe: budgets, evaluation, checkpoints, the loop."""
