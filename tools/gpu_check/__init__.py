"""`make gpu-check`: every GPU kernel that can be launched, compiled for every architecture.

No GPU is needed: Triton compiles ahead of time. What is compiled is what the launch code itself
asks a driver for (`stub`, `variants`); each result is read for its registers, its shared memory
and the instructions of its inner loop (`machine`, `judge`), and a variant that spills, does not
fit, misses its matrix instructions or waits for its loads is a failure. `model` predicts times.
"""
