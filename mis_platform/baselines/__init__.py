"""The other rows of Table 1: classical interactive segmentation, and proposals of other unsupervised methods."""
