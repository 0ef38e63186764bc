"""From a recipe to a run and what is done with it: the catalogue, recipes, sessions and their uses."""
