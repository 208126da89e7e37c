"""What runs on one device and knows nothing of Ray: feature extractors, SimpleClick, its losses, clicks and weights."""
