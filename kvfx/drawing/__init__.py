"""A layer of a graph as a picture: which nodes matter, where they stand, and the SVG of them."""
