"""What a model would do on a device: traces, replays, devices, clocks. Knows no torch."""
