"""What a user hands us: configuration, model, data; checked at the edge, trusted inside."""
