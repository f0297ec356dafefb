"""Pathfinder and Path-X: whether two discs are on one dashed contour."""
