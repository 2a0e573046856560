"""Sources of samples: folders, tars, tables, conversations, and mixtures of them, on disk and at URLs."""
