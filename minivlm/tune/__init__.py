"""Search over projector kind and learning rate, each trial the same stage code."""
