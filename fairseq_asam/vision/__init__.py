"""Image classification (Sections 5.2 and 5.4 of the paper) with SGD, SAM or ASAM."""
