"""How far agreement with the base's own majority answers replaces accuracy: tracking, the gate and the stop, on the lab's task."""
