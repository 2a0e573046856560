"""Reading and writing files: folders, file signatures, JSON lines, HTML pages, image grids."""
