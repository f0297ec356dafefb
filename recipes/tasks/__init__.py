"""Tasks: what a recipe learns, and where its data comes from. A file or a folder each; `kinds` registers all."""
