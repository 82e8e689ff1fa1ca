"""Image classification (Sections 5.2 and 5.4 of the paper) on the core of this package."""
