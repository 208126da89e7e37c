"""Interaction simulation (paper section 3.1): merge trees, proposals drawn from them, clicks on proposals."""
