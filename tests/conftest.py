"""For all tests: one thread, so that they run side by side and add up the same way everywhere."""

import torch

torch.set_num_threads(1)
