"""The sharpness-aware transformations, and what is measured of their perturbation."""
