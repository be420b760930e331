"""Training backends behind one Protocol: `base.Backend`."""
