"""Generation and log-probability actors over Ray Data."""
