"""What all stages print alike."""
