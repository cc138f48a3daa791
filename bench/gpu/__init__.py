"""What a GPU makes of training, harvest and evaluation, each beside its floor: `make gpu`, docs/gpu.md."""
