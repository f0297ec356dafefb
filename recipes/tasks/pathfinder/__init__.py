"""Pathfinder and Path-X: do two discs sit on one dashed contour?"""
