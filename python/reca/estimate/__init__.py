"""Parameters, FLOPs and memory of a recipe, predicted without weights, and the settings that fit a GPU."""
