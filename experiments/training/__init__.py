"""What a training run is made of, and its folder."""
